"""Prompts of any length, and weights for their words: "a (red:1.3) apple".

CLIP reads 77 tokens: a start token, 75 tokens of text, an end token. `attach(sd)` makes the text
encoders read longer prompts in chunks of 75 tokens, each with a start and an end of its own, and
joins the vectors of the chunks. "(red:1.3)" multiplies the vectors of the word by 1.3; brackets
within brackets multiply. Both are as A1111's web UI has them; neither is part of CLIP.

Shapes: B prompts, N chunks, 77 tokens in a chunk, D width.
"""
import re
from functools import partial

import torch
from torch import Tensor

from clip import BOS, EOS, CLIPTextModel, Token, Tokenizer
from sd import StableDiffusion

BRACKET = re.compile(r"\(|:([+-]?\d*\.?\d+)\)|\)")


def attach(sd: StableDiffusion) -> None:
    """Let `sd.encode_prompt` read weights and prompts of any length.

    Its context is (B, N*77, D) then, with as many chunks N as the longest of the prompts fills.
    The pooled vector is the first chunk's. Text encoders of other classes stay as they are.
    """
    encoders = clip_encoders(sd)
    for encoder in encoders:
        encoder.encode = partial(encode, encoder, encoders)


def clip_encoders(sd: StableDiffusion) -> list[CLIPTextModel]:
    return [encoder for encoder in sd.text_encoders if isinstance(encoder, CLIPTextModel)]


def count_chunks(sd: StableDiffusion, prompts: list[str]) -> int:
    """How many chunks of context the longest of the prompts fills; 1 without CLIP."""
    counts = [num_chunks(encoder.tokenizer, prompts) for encoder in clip_encoders(sd)]
    return max(counts, default=1)


def encode(
    encoder: CLIPTextModel, encoders: list[CLIPTextModel], prompts: list[str]
) -> dict[str, Tensor]:
    """As `CLIPTextModel.encode`, in as many chunks as the longest prompt fills in any encoder.

    Encoders may differ in it: a learned word can have another number of vectors in each.
    """
    count = max(num_chunks(one.tokenizer, prompts) for one in encoders)
    tokens, weights = chunks(encoder.tokenizer, prompts, count)
    features, pooled = encoder(tokens.flatten(0, 1).to(next(encoder.parameters()).device))
    if (weights != 1).any():
        features = apply_token_weights(features, weights.flatten(0, 1))
    features = features.unflatten(0, (-1, count)).flatten(1, 2)     # (b n) t d -> b (n t) d
    return {"context": features, "y": pooled[::count]}


def num_chunks(tokenizer: Tokenizer, prompts: list[str]) -> int:
    """How many chunks the longest of the prompts fills; an empty one fills one."""
    longest = max(len(weighted_tokens(tokenizer, prompt)) for prompt in prompts)
    return max(1, -(-longest // (tokenizer.length - 2)))


def chunks(tokenizer: Tokenizer, prompts: list[str], count: int) -> tuple[Tensor, Tensor]:
    """Token ids and weights of the prompts, each (B, count, 77). What a prompt leaves is empty."""
    room = tokenizer.length - 2
    ids = torch.full((len(prompts), count, tokenizer.length), tokenizer.pad)
    weights = torch.ones(ids.shape)
    ids[:, :, 0] = BOS
    for i, prompt in enumerate(prompts):
        found = weighted_tokens(tokenizer, prompt)
        for j in range(count):
            chunk = found[j * room:(j + 1) * room]
            stop = len(chunk) + 1
            ids[i, j, 1:stop] = torch.tensor([token.id for token, _ in chunk], dtype=torch.long)
            ids[i, j, stop] = EOS
            weights[i, j, 1:stop] = torch.tensor([weight for _, weight in chunk])
    return ids, weights


def weighted_tokens(tokenizer: Tokenizer, prompt: str) -> list[tuple[Token, float]]:
    """All tokens of a prompt with their weights. Spans and words are those of the whole prompt."""
    found: list[tuple[Token, float]] = []
    for start, stop, weight in weighted_spans(prompt):
        first_word = found[-1][0].word + 1 if found else 0
        for token in tokenizer.tokenize(prompt[start:stop]):
            span = (start + token.span[0], start + token.span[1])
            found.append((token._replace(span=span, word=first_word + token.word), weight))
    return found


def weighted_spans(prompt: str) -> list[tuple[int, int, float]]:
    """The pieces (start, stop, weight) of a prompt, without the brackets that give weights.

    Brackets without a number, and numbers without a bracket, are text.
    """
    weights = [1.0] * len(prompt)
    is_text = [True] * len(prompt)
    opened: list[int] = []
    for match in BRACKET.finditer(prompt):
        if match[0] == "(":
            opened.append(match.start())
        elif opened:
            start = opened.pop()
            if match[1] is None or match.start() == start + 1:
                continue
            for i in range(start + 1, match.start()):
                weights[i] *= float(match[1])
            for i in (start, *range(*match.span())):
                is_text[i] = False
    changes = [i for i in range(1, len(prompt)) if is_text[i] != is_text[i - 1]]
    edges = [0, *changes, len(prompt)]
    return [(a, b, weights[a]) for a, b in zip(edges, edges[1:]) if a < b and is_text[a]]


def apply_token_weights(features: Tensor, weights: Tensor) -> Tensor:
    """Vectors (B, T, D) times their weights (B, T), scaled to the mean that each chunk had."""
    weighted = features * weights[..., None].to(features)
    before = features.mean((1, 2), keepdim=True)
    return weighted * (before / weighted.mean((1, 2), keepdim=True))
