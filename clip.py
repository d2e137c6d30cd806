"""The text encoder: a prompt to token ids, token ids to one vector per token (CLIP's text side).

Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
section 2.4. Modules have the names of transformers' `CLIPTextModel` below `text_model.`, which are
the names in SD 1.x checkpoints.

Shapes: B batch, T tokens (77), D width.
"""
import gzip
import warnings
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from tokenizers import Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as BPETokenizer
from torch import Tensor, nn

MERGES = Path(__file__).parent / "weights" / "bpe_simple_vocab_16e6.txt.gz"
BOS, EOS = 49406, 49407
PATTERN = (r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d"
           r"|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")  # runs of letters, single digits, other runs


class Token(NamedTuple):
    id: int
    text: str              # the piece; </w> marks the end of a word
    span: tuple[int, int]  # where it stands in the prompt: from, to
    word: int              # the number of its word in the prompt: 0, 1, ...


class Tokenizer:
    """Prompt -> `length` ids: the start, at most length - 2 tokens, the end, padding.

    `pad` is the end token in SD 1.x and 0 in OpenCLIP. The UNet attends to padding: it matters.
    """

    def __init__(self, pad: int = EOS, length: int = 77):
        self.bpe, self.pad, self.length = load_bpe(), pad, length

    def tokenize(self, text: str) -> list[Token]:
        """All tokens of a prompt, without start, end and padding.

        Raises UnicodeEncodeError for half a character (a lone surrogate).
        """
        text.encode()  # the error of `tokenizers` would not say what is wrong
        found = self.bpe.encode(text)
        return [Token(*one) for one in zip(found.ids, found.tokens, found.offsets, found.word_ids)]

    def __call__(self, prompts: str | list[str]) -> Tensor:
        """One prompt or a list of B -> LongTensor (B, length). Warns of words that do not fit."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        rows = [self.pad_row(self.fit(prompt)) for prompt in prompts]
        return torch.tensor(rows, dtype=torch.long).reshape(len(prompts), self.length)

    def fit(self, prompt: str) -> list[int]:
        """The ids of the tokens that fit."""
        tokens, room = self.tokenize(prompt), self.length - 2
        if len(tokens) > room:
            cut = prompt[tokens[room].span[0]:]
            warnings.warn(f"the prompt has {len(tokens)} tokens and {room} fit; cut off: {cut!r}",
                          stacklevel=4)
        return [token.id for token in tokens[:room]]

    def pad_row(self, ids: list[int]) -> list[int]:
        """At most length - 2 ids -> length ids."""
        return [BOS, *ids, EOS] + [self.pad] * (self.length - 2 - len(ids))


@cache
def load_bpe() -> BPETokenizer:
    """CLIP's byte-pair encoding (Sennrich et al. 2016): 49,408 ids.

    They are 256 bytes, the same 256 as the end of a word, 48,894 merges, the start and the end.
    """
    with gzip.open(MERGES, "rt", encoding="utf-8") as f:
        # the first line is a version; CLIP uses the first fifth of the rest
        words = "".join(islice(f, 1, 1 + 49152 - 256 - 2)).split()
    merges = list(zip(words[::2], words[1::2]))
    # a byte is written as a printable character: Latin-1 where it is one, else U+0100 and on
    alphabet = [chr(c) for first, last in ((33, 126), (161, 172), (174, 255), (256, 323))
                for c in range(first, last + 1)]
    pieces = alphabet + [a + "</w>" for a in alphabet] + [a + b for a, b in merges]
    vocab = {piece: i for i, piece in enumerate(pieces + ["<|startoftext|>", "<|endoftext|>"])}
    bpe = BPETokenizer(models.BPE(vocab, merges, continuing_subword_prefix="",
                                  end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([
        normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(PATTERN), behavior="removed", invert=True),
        pre_tokenizers.ByteLevel(add_prefix_space=False)])
    bpe.add_special_tokens(["<|startoftext|>", "<|endoftext|>"])
    return bpe


@dataclass
class CLIPTextConfig:
    """The defaults are CLIP ViT-L/14's text side, as SD 1.x uses it."""
    vocab_size: int = 49408
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"   # a row of ACTIVATIONS; OpenCLIP: "gelu"
    # 0: vectors of the last layer, 1: of the one before (SD 2.x, SDXL); --clip-skip counts from 1
    clip_skip: int = 0
    final_norm: bool = True          # of the tokens' vectors; the pooled vector always has it
    projection: bool = False         # of the pooled vector
    pad: int = EOS                   # the id after the end: EOS for CLIP, 0 for OpenCLIP
    openclip: bool = False           # official files have OpenCLIP's names (extras/openclip.py)
    prefix: str = "cond_stage_model.transformer.text_model."  # of its names in an official file


ACTIVATIONS = {"quick_gelu": lambda x: x * torch.sigmoid(1.702 * x), "gelu": F.gelu}


class CLIPTextModel(nn.Module):
    """Token ids (B, T) -> a vector per token (B, T, D), and one for the whole text (B, D).

    It is causal: a token's vector depends on this token and on those before it.
    """

    def __init__(self, config: CLIPTextConfig = CLIPTextConfig()):
        super().__init__()
        self.config, self.tokenizer = config, Tokenizer(config.pad)
        self.embeddings = CLIPTextEmbeddings(config)
        self.encoder = CLIPEncoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size)
        if config.projection:
            projection = nn.Linear(config.hidden_size, config.hidden_size, bias=False)
            self.text_projection = nn.Parameter(projection.weight)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        states = [self.embeddings(tokens)]
        for layer in self.encoder.layers:
            states.append(layer(states[-1]))
        features = states[-1 - self.config.clip_skip]
        if self.config.final_norm:
            features = self.final_layer_norm(features)
        # the first end token has seen the whole text
        end = (tokens == EOS).int().argmax(dim=1)
        rows = torch.arange(len(tokens), device=tokens.device)
        pooled = self.final_layer_norm(states[-1])[rows, end]
        if self.config.projection:
            pooled = pooled @ self.text_projection
        return features, pooled

    def encode(self, prompts: list[str]) -> dict[str, Tensor]:
        """B prompts -> what the UNet is given: context (B, 77, D) and y (B, D)."""
        tokens = self.tokenizer(prompts).to(self.final_layer_norm.weight.device)
        context, y = self(tokens)
        return {"context": context, "y": y}


class CLIPTextEmbeddings(nn.Module):
    """The token's row in one table plus its position's row in another: (B, T) -> (B, T, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        positions, width = config.max_position_embeddings, config.hidden_size
        self.token_embedding = embedding(config.vocab_size, width, std=0.02)
        self.position_embedding = embedding(positions, width, std=0.01)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens) + self.position_embedding.weight[:tokens.shape[1]]


def embedding(rows: int, width: int, std: float) -> nn.Embedding:
    weight = torch.empty(rows, width).uniform_(-(3**0.5) * std, 3**0.5 * std)
    return nn.Embedding(rows, width, _weight=weight)


class CLIPEncoder(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.layers = nn.ModuleList(
            CLIPEncoderLayer(config) for _ in range(config.num_hidden_layers))


class CLIPEncoderLayer(nn.Module):
    """Causal self-attention, then an MLP, each on a normalised x and added. Keeps (B, T, D)."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.self_attn = CLIPAttention(config)
        self.layer_norm1 = nn.LayerNorm(config.hidden_size)
        self.mlp = CLIPMLP(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class CLIPAttention(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.heads = config.num_attention_heads
        self.k_proj, self.v_proj, self.q_proj, self.out_proj = (
            nn.Linear(config.hidden_size, config.hidden_size) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (proj(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)  # 'b t (h d) -> b h t d'
                   for proj in (self.q_proj, self.k_proj, self.v_proj))
        # the causal mask is the only one: tokens attend to padding too
        h = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(h.transpose(1, 2).flatten(2))                  # 'b h t d -> b t (h d)'


class CLIPMLP(nn.Module):
    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        self.act = ACTIVATIONS[config.hidden_act]
        self.fc1 = nn.Linear(config.hidden_size, 4 * config.hidden_size)
        self.fc2 = nn.Linear(4 * config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))
