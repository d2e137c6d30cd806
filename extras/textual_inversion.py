"""Words learned by textual inversion (Gal et al. 2022): new rows of the token table.

The tokenizer and the token table of a model get another class that knows the new words. The new
rows are not part of the model's weights: they are neither saved nor loaded with it.
"""
from pathlib import Path
from typing import NamedTuple

import torch
from tokenizers import AddedToken
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor, nn

from clip import CLIPTextModel, Token, Tokenizer
from extras.files import open_tensors
from sd import LazyTensor, StableDiffusion, UserError

UNNAMED = {  # names of tensors that are no words: their text encoder, if they say which
    "*": None, "emb_params": None, "string_to_param": None, "clip_l": 0, "clip_g": 1, "clip_h": 0,
    "text_encoders_0": 0, "text_encoders_1": 1}     # also of trainers of diffusers
MOST_VECTORS = 75   # of a word: more do not fit between start and end


class LearnedWord(NamedTuple):
    encoder: CLIPTextModel
    word: str
    vectors: Tensor  # (N, D)


def add_embedding(sd: StableDiffusion, path: str | Path) -> list[str]:
    """Adds the words in a file {word: vectors (N, D)}. Returns them.

    The word of a tensor with a name in UNNAMED is in the metadata, where training writes it; else
    it is the name of the file. In a prompt it may be written in upper or lower case.
    Raises UserError if the file cannot be read, is for another family of models, or has a word
    that the vocabulary has already. Then the model is not changed.
    """
    path = Path(path)
    tensors, metadata = open_tensors(path)
    word = metadata.get("word", path.stem)
    return add_words(sd, path, [(word if name in UNNAMED else name, name, tensor)
                                for name, tensor in tensors.items()])


def add_words(sd: StableDiffusion, path: Path,
              found: list[tuple[str, str, LazyTensor]]) -> list[str]:
    """As `add_embedding`, for tensors (word, name of the tensor, vectors) of a file."""
    learned: list[LearnedWord] = []
    for word, name, tensor in found:
        vectors = read_vectors(path, word, tensor)
        encoder = encoder_of_width(sd, vectors.shape[1], path, UNNAMED.get(name))
        vocabulary = encoder.tokenizer.bpe.get_vocab()
        taken = word in vocabulary or word.lower() in vocabulary
        same = [other for other in learned
                if other.encoder is encoder and other.word.lower() == word.lower()]
        if taken or same:
            raise UserError(f"{path}: {word!r} is in the vocabulary already: rename it")
        learned.append(LearnedWord(encoder, word, vectors))
    served = [encoder for encoder in sd.text_encoders
              if any(one.encoder is encoder for one in learned)]
    if len(served) < len(sd.text_encoders):
        raise UserError(f"{path} is for another family of models: it has vectors for "
                        f"{len(served)} of {len(sd.text_encoders)} text encoders")
    for encoder, word, vectors in learned:
        add_word(encoder.tokenizer, word, add_embeddings(encoder, vectors))
    return [one.word for one in learned]


def read_vectors(path: Path, word: str, tensor: LazyTensor) -> Tensor:
    """(N, D) in fp32. Raises UserError for other shapes, too many vectors, and NaN."""
    shape = tensor.shape
    rows = shape[0] if len(shape) == 2 else 1
    if not 1 <= len(shape) <= 2 or not 1 <= rows <= MOST_VECTORS or shape[-1] > 2**16:
        raise UserError(f"{path} holds no learned word: {word!r} has the shape {list(shape)}, not "
                        f"1 to {MOST_VECTORS} vectors")
    if not word.strip() or len(word) > 200:
        raise UserError(f"{path} holds no learned word: its name {word[:40]!r} cannot be one")
    vectors = torch.atleast_2d(tensor.read().detach().float())
    if not vectors.isfinite().all():
        raise UserError(f"{path} is damaged: there is NaN or infinity in {word!r}")
    return vectors


def encoder_of_width(sd: StableDiffusion, width: int, path: Path,
                     index: int | None = None) -> CLIPTextModel:
    """The text encoder with vectors of this width; `index`: the one it must be.

    Raises UserError if there is none.
    """
    for encoder in sd.text_encoders:
        check_takes_words(encoder)
    allowed = sd.text_encoders if index is None else sd.text_encoders[index:index + 1]
    for encoder in allowed:
        if encoder.config.hidden_size == width:
            return encoder
    widths = " and ".join(str(encoder.config.hidden_size) for encoder in sd.text_encoders)
    raise UserError(f"{path} is for another family of models: its vectors are {width} wide, here "
                    f"{widths}")


def check_takes_words(encoder: nn.Module) -> None:
    """Raises UserError for encoders and tokenizers of other classes than clip.py's."""
    if not isinstance(encoder, CLIPTextModel):
        raise UserError(f"learned words need the text encoder of clip.py, and this model has "
                        f"{type(encoder).__name__}: leave them out")
    if type(encoder.tokenizer) not in (Tokenizer, TokenizerWithWords):
        raise UserError(f"learned words need the tokenizer of clip.py, and this model has "
                        f"{type(encoder.tokenizer).__name__}: leave them out")


# --- the tokenizer ---

class TokenizerWithWords(Tokenizer):
    """A tokenizer that gives several ids for an added word."""

    words: dict[int, list[int]]  # the added word's id in the BPE -> ids of its vectors

    def tokenize(self, text: str) -> list[Token]:
        tokens = []
        for token in super().tokenize(text):
            tokens += [token._replace(id=id) for id in self.words.get(token.id, [token.id])]
        return tokens


def add_word(tokenizer: Tokenizer, word: str, ids: list[int]) -> None:
    """From now on `word` stands for these ids wherever it is a word of its own in a prompt, in
    upper or lower case.

    It must not be in the vocabulary. Only this tokenizer changes.
    """
    if not isinstance(tokenizer, TokenizerWithWords):
        tokenizer.__class__ = TokenizerWithWords
        tokenizer.words = {}
    tokenizer.bpe = BPETokenizer.from_str(tokenizer.bpe.to_str())  # all tokenizers share load_bpe's
    tokenizer.bpe.add_tokens([AddedToken(word, single_word=True, normalized=True)])
    tokenizer.words[tokenizer.bpe.token_to_id(word)] = ids


# --- the token table ---

class EmbeddingWithWords(nn.Embedding):
    """A token table with more rows behind its own.

    They stand in a list, so that they are no parameters or buffers of the module: they are not
    in its state dict. One may be an nn.Parameter that is trained.
    """

    learned: list[Tensor]  # each (N, D)

    def forward(self, tokens: Tensor) -> Tensor:
        x = super().forward(tokens.clamp(max=self.num_embeddings - 1))
        learned = torch.cat(self.learned).to(x)
        rows = (tokens - self.num_embeddings).clamp(min=0)
        return torch.where(tokens[..., None] < self.num_embeddings, x, learned[rows])


def add_embeddings(encoder: CLIPTextModel, vectors: Tensor) -> list[int]:
    """Adds rows (N, D) to the token table. Returns their ids.

    If `vectors` is a parameter on the encoder's device, it gets gradients.
    """
    table = encoder.embeddings.token_embedding
    if not isinstance(table, EmbeddingWithWords):
        table.__class__ = EmbeddingWithWords
        table.learned = []
    first = table.num_embeddings + sum(len(rows) for rows in table.learned)
    table.learned.append(vectors.to(table.weight.device))
    return list(range(first, first + len(vectors)))
