"""Heat maps: where in the picture each word of the prompt was looked for.

In cross-attention each position of the picture takes something of every token of the prompt: a row of the matrix a. A column of it, how much all
positions took of one token, laid out as a picture, is that token's map. Hertz et al. 2022 (prompt-to-prompt); Tang et al. 2022 (DAAM).

Shapes: B pictures, N rows of 77 tokens, h w size of the latent.
"""
import re

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor

from checkpoint import UserError
from clip import Piece, Tokenizer
from sampler import Step


class HeatMaps:
    """The cross-attention matrices of a run, averaged over its steps and over the heads of each layer.

        maps = HeatMaps()
        with watching(sd.unet, maps.watch):
            images = sd.generate(prompt, callback=maps.step)

    `layers` has {name: (B, N*77, h, w)}, brought to the latent's size; `mean()` is their average. At each position they sum to 1 over the tokens.
    """

    def __init__(self):
        self.last: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.steps = 0

    def watch(self, name: str, a: Tensor) -> None:
        self.last[name] = a.mean(1)                                                    # 'b heads hw t -> b hw t'

    def step(self, step: Step) -> None:
        self.steps += 1
        B, _, h, w = step.x.shape
        for name, a in self.last.items():
            a, (H, W) = a[-B:].transpose(1, 2), (h, w)                                 # guidance puts the prompt's half last
            while H * W > a.shape[2]:
                H, W = (H + 1) // 2, (W + 1) // 2                                      # as Downsample does
            a = F.interpolate(a.unflatten(2, (H, W)), size=(h, w), mode="bilinear").cpu()
            self.layers[name] = a if self.steps == 1 else torch.lerp(self.layers[name], a, 1 / self.steps)

    def mean(self) -> Tensor:
        return torch.stack(list(self.layers.values())).mean(0)


def words_of(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with its places among the tokens of all its rows (the start token is at 0)."""
    words: dict[int, list[tuple[int, Piece]]] = {}
    for i, piece in enumerate(tokenizer.pieces(prompt)):
        row, place = divmod(i, tokenizer.length - 2)
        words.setdefault(piece.word, []).append((row * tokenizer.length + place + 1, piece))
    return [(prompt[found[0][1].place[0]:found[-1][1].place[1]].lower(), [place for place, _ in found]) for found in words.values()]


def chosen_words(tokenizer: Tokenizer, prompt: str, wanted: list[str] | None = None) -> list[tuple[str, list[int]]]:
    """Of `words_of` those with a letter or digit, or those wanted. Raises UserError for one that is not in the prompt, or if there are none."""
    words = [(word, places) for word, places in words_of(tokenizer, prompt) if re.search(r"\w", word)]
    if not words:
        raise UserError(f"the prompt {prompt!r} has no words to look at, unlike 'a red apple'")
    wanted = [word for word, _ in words] if wanted is None else [word.strip().lower() for word in wanted]
    if unknown := [word for word in wanted if word not in dict(words)]:
        raise UserError(f"{unknown[0]!r} is no word of the prompt: its words are {', '.join(dict(words))}")
    return [(word, places) for word, places in words if word in wanted]


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in gray, with red where `heat` (h, w) is high, from its least value to its greatest."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    mask = Image.fromarray((heat * 255).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    gray = ImageOps.autocontrast(image.convert("L")).convert("RGB")
    return Image.composite(Image.blend(gray, Image.new("RGB", image.size, "red"), 0.6), gray, mask)
