"""Words: text to token ids, and token ids to one vector per token (the text side of CLIP).

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", section 2.4. Modules carry
the names of transformers' `CLIPTextModel` below `text_model.`, which are those in SD 1.x checkpoints.

Shapes: B batch, T tokens (77), D width.
"""
import gzip
import re
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import AddedToken, Regex, Tokenizer as BPETokenizer, models, normalizers, pre_tokenizers
from torch import Tensor, nn

MERGES = Path(__file__).parent / "weights" / "bpe_simple_vocab_16e6.txt.gz"
BOS, EOS = 49406, 49407
WORDS = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
         r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # letters run together, digits stand alone, the rest runs together


WEIGHTED = re.compile(r"\(([^()]+):([+-]?\d*\.?\d+)\)")  # "(red:1.3)"


class Piece(NamedTuple):
    """A token of a text."""
    id: int
    place: tuple[int, int]  # in the text, from and to
    word: int               # which of the text's words it belongs to: 0, 1, ...
    weight: float


class Tokenizer:
    """Text -> rows of `length` ids: start, at most length - 2 ids of the text, end, padding.

    `pad` is the end token for SD 1.x; the UNet attends to the padding, so it matters.
    """

    def __init__(self, pad: int = EOS, length: int = 77):
        self.bpe, self.pad, self.length = load_bpe(), pad, length
        self.added: dict[int, list[int]] = {}  # of each word added to the vocabulary, the ids of its vectors

    def __call__(self, text: str | list[str]) -> Tensor:
        """One prompt or a list of B -> LongTensor (B, length). Warns with the words that did not fit."""
        texts = [text] if isinstance(text, str) else text
        return torch.tensor([self.row(t) for t in texts], dtype=torch.long).reshape(len(texts), self.length)

    def row(self, text: str) -> list[int]:
        pieces = self.encode(text)
        room = self.length - 2
        if len(pieces) > room:
            cut = text[pieces[room].place[0]:]
            warnings.warn(f"the prompt is {len(pieces)} tokens long and {room} fit; cut off: {cut!r}", stacklevel=3)
        ids = [BOS, *(piece.id for piece in pieces[:room]), EOS]
        return ids + [self.pad] * (self.length - len(ids))

    def rows(self, texts: list[str], count: int = 1) -> tuple[Tensor, Tensor]:
        """B texts of any length, in which (red:1.3) gives weight to words -> ids (B, N, length), weights (B, N, length): N rows each,
        at least `count`, as many as the longest text fills."""
        room, pieces = self.length - 2, [self.pieces(text) for text in texts]
        count = max([count] + [-(-len(some) // room) for some in pieces])
        ids = torch.full((len(texts), count, self.length), self.pad)
        weights = torch.ones(ids.shape)
        ids[:, :, 0] = BOS
        for i, some in enumerate(pieces):
            for j in range(count):
                part = some[j * room:(j + 1) * room]
                ids[i, j, 1:len(part) + 2] = torch.tensor([piece.id for piece in part] + [EOS])
                weights[i, j, 1:len(part) + 1] = torch.tensor([piece.weight for piece in part])
        return ids, weights

    def pieces(self, text: str) -> list[Piece]:
        """All tokens of a text with weights, such as "a (red:1.3) apple"; the brackets are none of them."""
        parts, end = [], 0
        for match in WEIGHTED.finditer(text):
            parts += [(end, match.start(), 1.0), (*match.span(1), float(match[2]))]
            end = match.end()
        pieces: list[Piece] = []
        for start, stop, weight in [*parts, (end, len(text), 1.0)]:
            pieces += self.encode(text, start, stop, weight, pieces[-1].word + 1 if pieces else 0)
        return pieces

    def encode(self, text: str, start: int = 0, stop: int | None = None, weight: float = 1.0, word: int = 0) -> list[Piece]:
        """The tokens of text[start:stop], its words counted from `word` on."""
        encoding = self.bpe.encode(text[start:stop])
        return [Piece(id, (start + a, start + b), word + number, weight)
                for token, (a, b), number in zip(encoding.ids, encoding.offsets, encoding.word_ids) for id in self.added.get(token, [token])]

    def add_word(self, word: str, ids: list[int]) -> None:
        """A word, none of the vocabulary's own, that stands for these ids wherever it stands alone in a text."""
        self.bpe = BPETokenizer.from_str(self.bpe.to_str())  # load_bpe's is everybody's
        self.bpe.add_tokens([AddedToken(word, single_word=True, normalized=False)])
        self.added[self.bpe.token_to_id(word)] = ids

    def tokens(self, text: str) -> list[tuple[int, str]]:
        """The ids of the text alone, none cut, each with its piece; `</w>` marks the end of a word."""
        encoding = self.bpe.encode(text)
        return list(zip(encoding.ids, encoding.tokens))


@cache
def load_bpe() -> BPETokenizer:
    """CLIP's byte-pair encoding: 256 bytes, the same ending a word, 48,894 merges, start and end make 49,408 ids."""
    with gzip.open(MERGES, "rt", encoding="utf-8") as f:
        words = "".join(islice(f, 1, 1 + 49152 - 256 - 2)).split()  # the first line is the version; of the rest CLIP uses a fifth
    merges = list(zip(words[::2], words[1::2]))
    # The order of the 256 byte characters is that of the printable Latin-1 ones, then the rest from U+0100 on.
    alphabet = [chr(c) for lo, hi in ((33, 126), (161, 172), (174, 255), (256, 323)) for c in range(lo, hi + 1)]
    symbols = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    vocab = {symbol: i for i, symbol in enumerate(symbols + ["<|startoftext|>", "<|endoftext|>"])}
    bpe = BPETokenizer(models.BPE(vocab, merges, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe


@dataclass
class CLIPTextConfig:
    """The defaults are CLIP ViT-L/14's text side as SD 1.x uses it."""
    vocab_size: int = 49408
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"    # a row of ACTIVATIONS; OpenCLIP: "gelu"
    layers_skipped: int = 0           # at the end; 1: the words' vectors are the penultimate layer's (SD 2.x, SDXL)
    final_norm: bool = True           # of the words' vectors; the pooled one always has it
    projection: bool = False          # of the pooled vector
    pad: int = EOS                    # the id after the end: EOS for CLIP, 0 for OpenCLIP
    openclip: bool = False            # files name the tensors as OpenCLIP does
    prefix: str = "cond_stage_model.transformer.text_model."  # of their names in single files


ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": F.gelu,
}


class CLIPTextModel(nn.Module):
    """Token ids (B, T) -> a vector per token (B, T, D). Causal: a token's vector depends on it and on those before it."""

    def __init__(self, cfg: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.cfg = cfg
        self.embeddings = CLIPTextEmbeddings(cfg)
        self.encoder = CLIPEncoder(cfg)
        self.final_layer_norm = nn.LayerNorm(cfg.hidden_size)
        if cfg.projection:
            self.text_projection = nn.Parameter(nn.Linear(cfg.hidden_size, cfg.hidden_size, bias=False).weight)
        if cfg.openclip:
            self.register_load_state_dict_pre_hook(lambda module, state, prefix, *_: from_openclip(state))
            self.register_state_dict_post_hook(lambda module, state, prefix, _: to_openclip(state))

    def forward(self, tokens: Tensor) -> Tensor:
        return self.encode(tokens)[0]

    def encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, T) -> a vector per token (B, T, D), and one for the whole text (B, D)."""
        x = self.embeddings(tokens)
        states = [x]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        features = states[-1 - self.cfg.layers_skipped]
        pooled = self.pool(self.final_layer_norm(states[-1]), tokens)
        return (self.final_layer_norm(features) if self.cfg.final_norm else features,
                pooled @ self.text_projection if self.cfg.projection else pooled)

    def pool(self, features: Tensor, tokens: Tensor) -> Tensor:
        """The vector at the first end token, which has seen the whole text: (B, T, D), (B, T) -> (B, D)."""
        end = (tokens == EOS).int().argmax(dim=1)
        return features[torch.arange(len(tokens), device=features.device), end]


class CLIPTextEmbeddings(nn.Module):
    """The word's row in the token table plus the place's row in the position table: (B, T) -> (B, T, D)."""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.token_embedding = embedding(cfg.vocab_size, cfg.hidden_size, std=0.02)
        self.position_embedding = embedding(cfg.max_position_embeddings, cfg.hidden_size, std=0.01)
        self.learned: Tensor | None = None  # (N, D): further rows of the token table, which are not saved with the model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.embed(tokens) + self.position_embedding.weight[:tokens.shape[1]]

    def embed(self, tokens: Tensor) -> Tensor:
        if self.learned is None:
            return self.token_embedding(tokens)
        rows = self.token_embedding.num_embeddings
        x = self.token_embedding(tokens.clamp(max=rows - 1))
        return torch.where(tokens[..., None] < rows, x, self.learned.to(x)[(tokens - rows).clamp(min=0)])

    def learn(self, vectors: Tensor) -> list[int]:
        """Further rows (N, D) -> their ids."""
        old = [] if self.learned is None else [self.learned]
        self.learned = torch.cat([*old, vectors.to(self.token_embedding.weight.device)])
        last = self.token_embedding.num_embeddings + len(self.learned)
        return list(range(last - len(vectors), last))


def emphasised(features: Tensor, weights: Tensor) -> Tensor:
    """Vectors (B, T, D) times their weights (B, T), then brought back to the mean that each row had."""
    new = features * weights[..., None].to(features)
    return new * (features.mean((1, 2), keepdim=True) / new.mean((1, 2), keepdim=True))


def embedding(rows: int, width: int, std: float) -> nn.Embedding:
    """Uniform, not normal: to draw normal numbers on the meta device torch first imports its compiler, which takes over a second."""
    weight = torch.empty(rows, width).uniform_(-(3**0.5) * std, 3**0.5 * std)
    return nn.Embedding(rows, width, _weight=weight)


class CLIPEncoder(nn.Module):
    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(CLIPEncoderLayer(cfg) for _ in range(cfg.num_hidden_layers))


class CLIPEncoderLayer(nn.Module):
    """x + causal self-attention, + MLP, each on a normalised x. (B, T, D) -> (B, T, D)"""

    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.self_attn = CLIPAttention(cfg)
        self.layer_norm1 = nn.LayerNorm(cfg.hidden_size)
        self.mlp = CLIPMLP(cfg)
        self.layer_norm2 = nn.LayerNorm(cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nn.Module):
    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (nn.Linear(cfg.hidden_size, cfg.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # 'b t (h d) -> b h t d'
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)         # the only mask: padding is attended to
        return self.out_proj(h.transpose(1, 2).flatten(2))                  # 'b h t d -> b t (h d)'


class CLIPMLP(nn.Module):
    def __init__(self, cfg: CLIPTextConfig):
        super().__init__()
        self.act = ACTIVATIONS[cfg.hidden_act]
        self.fc1 = nn.Linear(cfg.hidden_size, 4 * cfg.hidden_size)
        self.fc2 = nn.Linear(4 * cfg.hidden_size, cfg.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


OPENCLIP = [  # transformers' names, which the modules above carry, and OpenCLIP's, which SD 2.x and SDXL files hold
    ("embeddings.token_embedding.", "token_embedding."), ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."), (".layer_norm1.", ".ln_1."), (".layer_norm2.", ".ln_2."), (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."), (".mlp.fc2.", ".mlp.c_proj."), ("final_layer_norm.", "ln_final."),
]


def to_openclip(state: dict[str, Tensor]) -> None:
    """Rename the tensors in place; query, key and value become one."""
    for name in list(state):
        tensor = state.pop(name)
        if match := re.fullmatch(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
            name = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[3]}"
            state.setdefault(name, {})[match[2]] = tensor
        else:
            for ours, theirs in OPENCLIP:
                name = name.replace(ours, theirs)
            state[name] = tensor
    for name, tensor in state.items():
        if isinstance(tensor, dict):
            state[name] = torch.cat([tensor[letter] for letter in "qkv"])


def from_openclip(state: dict[str, Tensor]) -> None:
    """And back; names that are ours already stay."""
    if "final_layer_norm.weight" in state:
        return
    for name in list(state):
        tensor = state.pop(name)
        for ours, theirs in OPENCLIP:
            name = name.replace(theirs, ours)
        if ".attn.in_proj_" in name:
            for letter, part in zip("qkv", tensor.chunk(3)):
                state[name.replace(".attn.in_proj_", f".self_attn.{letter}_proj.")] = part
        else:
            state[name] = tensor
