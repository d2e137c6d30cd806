"""SD 1 and SD 2 at full size against what the original authors' code answers.

data/oracle/ holds the answers (see its README). The weights are random, a function of a seed and
of their official names, so that nothing of 4 GB has to be kept. Two correct fp32 programs lie about
3e-6 apart on one call of the UNet. The bounds are two to three times what was measured.
"""
import zlib
from collections.abc import Iterator
from functools import cache, partial
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from clip import BOS, EOS
from extras import fast
from extras.openclip import from_openclip
from sampler import SAMPLERS, cfg, get_sigmas, make_denoiser
from sd import PRESETS, LazyTensor, StableDiffusion
from tests.common import (
    ROOT,
    available_memory,
    manifest,
    on_meta,
    relative_error,
    with_prefix,
)

needs_memory = pytest.mark.skipif(
    available_memory() < 8, reason="SD 2 takes 5.2 GB in fp32: needs 8 GB of free memory")
VERSIONS = [("sd1", "plain"), ("sd1", "fast"), pytest.param(("sd2", "fast"), marks=needs_memory)]


# --- weights and inputs ---

# The last layer of a residual branch (some start at zero), then the query projections.
BRANCH_END = ("out_layers.3.weight", "proj_out.weight", "to_out.0.weight", "ff.net.2.weight",
              "conv2.weight", "out_proj.weight", "fc2.weight", "c_proj.weight")
QUERY = ("to_q.weight", "q_proj.weight", ".attn_1.q.weight")


def fill(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of an official file, by its name: Gaussian, scaled by fan-in, with no zeros."""
    p = torch.empty(shape)
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    p.normal_(generator=generator)
    if name.endswith("text_projection"):
        return p.mul_(shape[0] ** -0.5)
    if "embedding" in name:
        return p.mul_(0.7)
    if name.endswith("bias"):
        return p.mul_(0.1)
    if p.ndim == 1:  # weights of norms
        return p.mul_(0.2).add_(1.0)
    gain = 1.0
    if name.endswith(BRANCH_END):
        gain = 0.6
    elif name.endswith(QUERY):
        gain = 1.5
    return p.mul_(gain * (p.numel() / shape[0]) ** -0.5)


def filled_model(name: str) -> StableDiffusion:
    tensors = {}
    for tensor, text in manifest(name).items():
        shape = torch.Size(map(int, text.split("x")))
        tensors[tensor] = LazyTensor(shape, partial(fill, tensor, shape))
    sd = on_meta(StableDiffusion, PRESETS[name])
    for encoder in sd.text_encoders:
        if encoder.config.openclip:
            prefix = encoder.config.prefix
            text = [tensor for tensor in tensors if tensor.startswith(prefix)]
            text = {tensor.removeprefix(prefix): tensors.pop(tensor) for tensor in text}
            tensors |= with_prefix(prefix, from_openclip(text))
    sd.load_weights(tensors, "cpu", torch.float32)
    return sd


def randn(shape: tuple[int, ...], seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


ASTRONAUT = "a photograph of an astronaut riding a horse"


def token_rows(pad: int) -> Tensor:
    """(3, 77): the empty prompt, ASTRONAUT, a full row of ids from all over the vocabulary."""
    astronaut = [BOS, 320, 8853, 539, 550, 18376, 6765, 320, 4558]
    full = [(i * 48271 + 11) % 49406 for i in range(75)]
    full[0], full[-1] = 0, 49405
    rows = [[BOS], astronaut, [BOS, *full]]
    return torch.tensor([row + [EOS] + [pad] * (76 - len(row)) for row in rows])


# --- the comparison ---

class Case(NamedTuple):
    sd: StableDiffusion
    tokens: Tensor              # (3, 77)
    text: Tensor                # (3, 77, D), what the UNet is given for them
    answers: dict[str, Tensor]  # of the original code


@cache
def answers(name: str) -> dict[str, Tensor]:
    with np.load(ROOT / f"tests/data/oracle/{name}.npz") as arrays:
        return {key: torch.from_numpy(array) for key, array in arrays.items()}


@pytest.fixture(scope="module")
def models() -> Iterator[dict[str, StableDiffusion]]:
    """The model of the version that is compared now. One at a time, because of memory."""
    kept: dict[str, StableDiffusion] = {}
    yield kept
    kept.clear()


@pytest.fixture(scope="module", params=VERSIONS, ids="-".join)
def case(request, models) -> Iterator[Case]:
    """SD 1 as the core computes it, SD 1 made fast, SD 2 made fast."""
    name, how = request.param
    if name not in models:
        models.clear()
        models[name] = filled_model(name)
    sd = models[name]
    if how == "fast":
        fast.optimize(sd)
    encoder, = sd.text_encoders
    tokens = token_rows(encoder.config.pad)
    with torch.no_grad():
        yield Case(sd, tokens, encoder(tokens)[0], answers(name))
    fast.restore(sd)


def assert_near(found: Tensor, wanted: Tensor, bound: float) -> None:
    error = relative_error(found, wanted)
    print(f"{error:.1e}")
    assert error < bound


def test_text(case):
    tokens = case.sd.text_encoders[0].tokenizer(["", ASTRONAUT])
    assert torch.equal(tokens, case.tokens[:2])
    assert_near(case.text[..., ::8], case.answers["text"], 2e-6)


@pytest.mark.parametrize("time", [981, 21])
def test_unet(case, time):
    """SD 1 answers with the noise, SD 2 with v."""
    x, t = randn((2, 4, 32, 32), 1), torch.full((2,), time)
    found = case.sd.unet(x, t, context=case.text[1:])
    assert_near(found, case.answers[f"unet_t{time}"], 8e-6)


def test_vae(case):
    """SD 2's is SD 1's, with the same names, and so with the same weights here."""
    vae, wanted = case.sd.vae, answers("sd1")
    picture = (randn((1, 3, 64, 96), 2) * 0.5).clamp(-1, 1)
    moments = torch.cat(vae.moments(picture), dim=1)
    assert_near(moments, wanted["vae_moments"], 1e-5)
    z = randn((1, 4, 8, 12), 3)
    assert_near(vae.decode(z * vae.config.scale_factor), wanted["vae_decoded"], 1e-5)


@pytest.mark.parametrize("case", VERSIONS[1:], ids="-".join, indirect=True)
def test_ddim(case):
    """Four guided steps at the times 751, 501, 251, 1, and the picture."""
    sd = case.sd
    cond, uncond = {"context": case.text[1:2]}, {"context": case.text[:1]}
    denoise = cfg(make_denoiser(sd.unet, sd.schedule), cond, uncond, 7.5)
    sigmas, c_in = get_sigmas("ddim", 4, sd.schedule), sd.schedule.prediction.c_in
    times = [sd.schedule.sigma_to_t(sigma) for sigma in sigmas[:-1]]
    assert times == pytest.approx([751, 501, 251, 1])
    x = randn((1, 4, 16, 24), 4) / c_in(sigmas[0])
    steps = [step.x * c_in(sigmas[step.index + 1])
             for step in SAMPLERS["ddim"].sample(denoise, x, sigmas, noise=None)]
    assert_near(torch.cat(steps), case.answers["ddim_steps"], 2.5e-5)
    picture = sd.vae.decode(steps[-1])[..., ::2, ::2]
    assert_near(picture, case.answers["ddim_picture"], 3e-5)
