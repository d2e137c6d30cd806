"""Attention maps: where in the picture each word of the prompt was used.

In cross-attention each position of the picture takes a share of every token of the prompt. How
much all positions took of one token, laid out as a picture, is that token's map.
Hertz et al. 2022 (prompt-to-prompt); Tang et al. 2022 (DAAM).

    store = AttentionStore()
    with capture_attention(sd.unet, store):
        images = sd.generate(prompt, callback=store.step)
    words = chosen_words(sd.text_encoders[0].tokenizer, prompt)
    overlay(images[0], store.mean()[0, words[0].tokens].sum(0)).save("map.png")

Shapes: B pictures, T tokens (77, or 77 in each chunk), h w the latents' size.
"""
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from clip import Token, Tokenizer
from extras.prompts import places
from sampler import Step
from sd import UserError


class AttentionStore:
    """The cross-attention matrices of one run, averaged over its steps and each layer's heads.

    `layers` is {name: (B, T, h, w)}, each resized to the latents' size; `mean()` is the mean of
    the layers. At each position they sum to 1 over the tokens.
    """

    def __init__(self):
        self.layers: dict[str, Tensor] = {}
        self.steps = 0
        self.captured: dict[str, list[Tensor]] = {}  # of the step that runs now, or ran last
        self.complete: set[str] = set()              # layers whose list is of the step before

    def add(self, name: str, probs: Tensor) -> None:
        """Take a layer's matrix (B', heads, H*W, T). A step may give it in several calls.

        The lists are not emptied after a step: when a CUDA graph replays the UNet, this function
        is not called again, and the tensors that are here hold the new numbers.
        """
        if name in self.complete:
            self.complete.remove(name)
            self.captured[name] = []
        self.captured.setdefault(name, []).append(probs.mean(1))

    def step(self, step: Step) -> None:
        """Add what the UNet captured in this step. Raises UserError if that is nothing."""
        if not self.captured:
            raise UserError("the UNet's attention gave no maps: leave out --attn")
        self.steps += 1
        batch, _, height, width = step.x.shape
        for name, parts in self.captured.items():
            probs = torch.cat(parts)[-batch:]       # `cfg` puts the prompt behind the negative one
            maps = as_maps(probs, (height, width)).cpu()
            if self.steps == 1:
                self.layers[name] = maps
            else:
                self.layers[name] = torch.lerp(self.layers[name], maps, 1 / self.steps)
        self.complete = set(self.captured)

    def mean(self) -> Tensor:
        """(B, T, h, w)."""
        return torch.stack(list(self.layers.values())).mean(0)


def as_maps(probs: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities (B, H*W, T) of some level of the UNet -> (B, T, h, w), the latents' size."""
    height, width = size
    while height * width > probs.shape[1]:          # each Downsample halves the sides, rounded up
        height, width = (height + 1) // 2, (width + 1) // 2
    maps = probs.transpose(1, 2).unflatten(2, (height, width))
    return F.interpolate(maps, size=size, mode="bilinear")


@contextmanager
def capture_attention(unet: nn.Module, store: AttentionStore) -> Iterator[None]:
    """Within, every cross-attention of the UNet gives its matrix to `store`.

    Raises UserError for a network that has none.
    """
    layers = cross_attentions(unet)
    if not layers:
        raise UserError(f"{type(unet).__name__} has no CrossAttention named attn2, so no maps")
    for name, layer in layers.items():
        layer.capture = partial(store.add, name)
    try:
        yield
    finally:
        for layer in layers.values():
            layer.capture = None


def cross_attentions(unet: nn.Module) -> dict[str, nn.Module]:
    """The layers in which the picture attends to the words."""
    return {name: layer for name, layer in unet.named_modules()
            if name.endswith("attn2") and hasattr(layer, "capture")}


class Word(NamedTuple):
    """A word of a prompt, and where its tokens stand among all tokens (the start token is 0)."""
    text: str
    tokens: list[int]


def words_of(tokenizer: Tokenizer, prompt: str) -> list[Word]:
    """The words of a prompt in their order; runs of punctuation are words too."""
    words: dict[int, list[tuple[int, Token]]] = {}
    for position, token in places(tokenizer, prompt):
        words.setdefault(token.word, []).append((position, token))
    found = []
    for tokens in words.values():
        start, stop = tokens[0][1].span[0], tokens[-1][1].span[1]
        found.append(Word(prompt[start:stop].lower(), [position for position, _ in tokens]))
    return found


def chosen_words(
    tokenizer: Tokenizer, prompt: str, wanted: list[str] | None = None
) -> list[Word]:
    """The words that have a letter or digit; with `wanted` only those in it.

    Raises UserError for a wanted word that the prompt lacks, and for a prompt without words.
    """
    words = [word for word in words_of(tokenizer, prompt) if re.search(r"\w", word.text)]
    if not words:
        raise UserError(f"the prompt {prompt!r} has no words to show, unlike 'a red apple'")
    if wanted is None:
        return words
    wanted = [word.strip().lower() for word in wanted]
    known = list(dict.fromkeys(word.text for word in words))
    for word in wanted:
        if word not in known:
            raise UserError(f"{word!r} is not in the prompt: its words are {', '.join(known)}")
    return [word for word in words if word.text in wanted]


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in gray, red where `heat` (h, w) is high, between its least and its greatest."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    mask = Image.fromarray((heat * 255).round().byte().numpy())
    mask = mask.resize(image.size, Image.Resampling.BICUBIC)
    gray = ImageOps.autocontrast(image.convert("L")).convert("RGB")
    red = Image.blend(gray, Image.new("RGB", image.size, "red"), 0.6)
    return Image.composite(red, gray, mask)
