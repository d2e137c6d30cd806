"""Textual inversion: training the vectors of one new word. Gal et al. 2022, section 3.

    python train.py --train word --placeholder-token "<cat-toy>" --initializer-token cat ...
"""
import re
from pathlib import Path

import torch
from torch import Tensor, nn

from extras.files import atomic_write, save_tensors
from extras.textual_inversion import add_embeddings, add_word, check_takes_words
from sd import StableDiffusion, UserError


class TrainedWord(nn.Module):
    """The vectors (N, D) of a new word, for each text encoder. They are all that is trained.

    All N start as the mean of the initializer's vectors. Raises UserError if the word is known.
    """

    def __init__(self, sd: StableDiffusion, word: str, num_vectors: int, initializer: str):
        super().__init__()
        self.word, self.vectors = word, nn.ParameterList()
        for encoder in sd.text_encoders:
            check_new_word(encoder, word)
            ids = [token.id for token in encoder.tokenizer.tokenize(initializer)]
            if not ids:
                raise UserError("--initializer-token must have a word in it")
            table = encoder.embeddings.token_embedding.weight
            vectors = nn.Parameter(table[ids].mean(0).repeat(num_vectors, 1))
            add_word(encoder.tokenizer, word, add_embeddings(encoder, vectors))
            self.vectors.append(vectors)

    def save(self, out: str) -> None:
        """Write a file for sd.py --embedding, under a name that every file system takes."""
        names = [self.word] if len(self.vectors) == 1 else ["clip_l", "clip_g"]
        tensors: dict[str, Tensor] = dict(zip(names, self.vectors))
        with atomic_write(Path(out) / f"{file_name(self.word)}.safetensors") as temporary:
            save_tensors(tensors, temporary, torch.float32, {"word": self.word})


def check_new_word(encoder: nn.Module, word: str) -> None:
    check_takes_words(encoder)
    if word in encoder.tokenizer.bpe.get_vocab() or set(word) & set("/ "):
        example = f"<{word.strip('</> ')}>"
        raise UserError(f"--placeholder-token {word!r}: give a word that the vocabulary lacks, "
                        f"without spaces and slashes, such as {example}")


def file_name(word: str) -> str:
    """The word without what Windows does not take in file names: <cat-toy> -> cat-toy."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "", word).strip(". ")
    reserved = re.fullmatch(r"(?i)(con|prn|aux|nul|com\d|lpt\d)(\..*)?", name)
    return f"word-{name}" if reserved or not name else name
