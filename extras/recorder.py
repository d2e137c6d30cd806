"""Sees a run step by step: the latents, the guesses and the attention of each step.

    recorder = Recorder(sd, [prompt], edit.run_sigmas(sd, settings, 1.0))
    with capture_attention(sd.unet, recorder.maps), recorder.watch():
        sd.generate(prompt, callback=recorder.step, **settings)

It looks through the seams that GIFs and attention maps use: `callback` is given each Step, `guide`
is given the network's guesses, and the layers of cross-attention give their matrices. The picture
stays the same. extras/report.py makes a page of it.

Shapes: B pictures, Z latent channels, h w the latents' size, h' w' that of a level of the UNet,
T tokens of context.
"""
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from extras.attention_maps import AttentionStore
from sampler import Step, cfg
from sd import StableDiffusion

MOST_STEPS = 50  # that are kept: the first, the last, and some between them


class Frame(NamedTuple):
    """A step of B pictures, on the CPU."""
    index: int
    sigma: float
    latents: dict[str, Tensor]  # (B, Z, h, w): "x" as the UNet got it, "guess" of x_0, and where
                                # guided "negative" and "positive", the guesses with these prompts
    maps: dict[str, Tensor]     # the matrices (B, h' w', T), by the UNet's block


class Recorder:
    """Sees a run with these prompts and noise levels. The layers give their matrices to `maps`."""

    def __init__(self, sd: StableDiffusion, texts: list[str], sigmas: list[float],
                 maps: AttentionStore | None = None):
        self.sd, self.texts, self.sigmas, self.guide = sd, texts, sigmas, cfg
        self.maps = AttentionStore() if maps is None else maps
        self.kept, self.frames = spread(len(sigmas) - 1, MOST_STEPS), []
        self.now: tuple | None = None   # what the guide was given and gave in this step

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Within, the recorder stands around the guide that `sd.generate` is given."""
        generate = self.sd.generate
        self.sd.generate = lambda *words, guide=cfg, **options: generate(
            *words, guide=self.around(guide), **options)
        try:
            yield
        finally:
            del self.sd.generate

    def around(self, guide: Callable) -> Callable:
        """The same guide. What it was given and gave first in a step is remembered."""
        self.guide = guide

        def watched(denoise, cond, uncond, scale):
            answers = []
            guided = guide(lambda *x, **given: answers.append(denoise(*x, **given)) or answers[-1],
                           cond, uncond, scale)

            def remember(x: Tensor, sigma: float) -> Tensor:
                answers.clear()
                guess = guided(x, sigma)
                if self.now is None:    # Heun's second look at a step does not count
                    self.now = x, sigma, guess, torch.cat(answers)
                return guess
            return remember
        return watched

    def step(self, step: Step) -> None:
        """The callback of `generate`. Raises UserError if no layer gave a map."""
        (x, sigma, guess, answers), self.now = self.now, None
        self.maps.step(step)
        c_in, batch = self.sd.schedule.prediction.c_in, len(x)
        self.last = (c_in(self.sigmas[-1]) * step.x).float().cpu()
        if step.index not in self.kept:
            return
        latents = {"x": c_in(sigma) * x, "guess": guess}
        if len(answers) >= 2 * batch:           # `cfg` puts the negative prompt first
            latents |= {"negative": answers[-2 * batch:-batch], "positive": answers[-batch:]}
        latents = {name: value.float().cpu() for name, value in latents.items()}
        blocks: dict[str, list[Tensor]] = {}
        for name, parts in self.maps.captured.items():  # of input_blocks.3.1.transformer_blocks.0
            block = name.split(".transformer_blocks")[0].rpartition(".")[0]     # input_blocks.3
            blocks.setdefault(block, []).append(torch.cat(parts)[-batch:])
        maps = {name: torch.stack(layers).mean(0).cpu() for name, layers in blocks.items()}
        self.frames.append(Frame(step.index, sigma, latents, maps))


def spread(count: int, most: int) -> list[int]:
    """At most `most` of the numbers 0 ... count - 1, evenly, with the first and the last."""
    return sorted(set(np.linspace(0, count - 1, min(count, most)).round().astype(int).tolist()))
