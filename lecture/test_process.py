"""Chapter 7 against closed forms, and its own walk against sd.generate."""
import math
import sys
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import pytest
import torch
from PIL import Image

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import draw
import process

from extras.edit import img2img
from sampler import SAMPLERS, NoiseSchedule, make_denoiser, sample_dpmpp_2m
from sd import PRESETS, Preset, StableDiffusion

torch.set_num_threads(1)
torch.manual_seed(0)
STEPS = 3


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load()


@pytest.fixture(scope="module")
def apple(sd):
    return sd.generate("a red apple", steps=STEPS, seed=5, sampler="dpmpp_2m")[0]


# --- the film ---


def test_the_last_frame_is_the_output(sd, apple):
    x_t, guess = process.film(sd, "a red apple", STEPS, seed=5)
    assert len(x_t) == len(guess) == STEPS + 1
    assert torch.equal(x_t[:1], process.noise_of(sd, 5))
    assert torch.equal(x_t[-1], guess[-1])
    assert sd.decode_latents(x_t[-1:])[0].tobytes() == apple.tobytes()
    assert sd.decode_latents(x_t[-2:-1])[0].tobytes() != apple.tobytes()


def test_the_film_of_a_perfect_guess(monkeypatch):
    """If every guess is x_0, then x_t = (x_0 + sigma eps) / sqrt(1 + sigma^2) with one eps."""
    x0 = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    perfect = lambda x, sigma, **cond: x0.expand(len(x), -1, -1, -1)  # noqa: E731
    monkeypatch.setattr(process, "make_denoiser", lambda net, schedule: perfect)
    fake = SimpleNamespace(
        preset=Preset(size=64),
        schedule=NoiseSchedule("eps"),
        device=torch.device("cpu"),
        unet=None,
        encode_both=lambda *_: ({}, {}),
    )
    fake.noise_sampler = partial(StableDiffusion.noise_sampler, fake)
    x_t, guess = process.film(fake, "", 6, seed=0)
    sigmas = process.sigmas_of(6, fake.schedule)
    noise = process.noise_of(fake, 0).double()
    eps = (noise * (sigmas[0] ** 2 + 1) ** 0.5 - x0) / sigmas[0]
    for x, sigma in zip(x_t, sigmas):
        torch.testing.assert_close(
            x, ((x0 + sigma * eps) / (sigma**2 + 1) ** 0.5)[0], rtol=1e-4, atol=1e-4
        )
    assert all(torch.equal(one, x0[0]) for one in guess)


def test_the_noise_levels():
    sigmas = process.sigmas_of(20, NoiseSchedule("eps"))
    assert [
        round(sigma, 4)
        for sigma in (sigmas[0], sigmas[-1])
    ] == [14.6146, 0.0]
    assert len(sigmas) == 21


def test_the_sketch_finds_a_linear_map():
    matrix = torch.tensor([[20.0, 0, 5], [0, -30, 0], [3, 3, 3], [0, 0, 40], [128, 100, 90]])
    z = torch.randn(3, 4, 8, 8)
    rgb = torch.einsum("nzhw,zc->nchw", z, matrix[:4]) + matrix[4][:, None, None]
    found, explained = process.fit_sketch(z, rgb)
    torch.testing.assert_close(found, matrix, rtol=1e-3, atol=1e-2)
    assert explained > 0.9999
    _, of_noise = process.fit_sketch(z, torch.randn(3, 3, 8, 8))
    assert of_noise < 0.2
    pixel = process.sketch(z, matrix)[2].getpixel((5, 1))  # column 5 of row 1
    assert pixel == tuple(rgb[2, :, 1, 5].clamp(0, 255).round().int().tolist())


def test_distance():
    black, white, half = (
        Image.new("RGB", (4, 4), color) for color in ("black", "white", (51, 51, 51))
    )
    assert (
        process.distance(black, white),
        process.distance(black, black),
        process.distance(half, black),
    ) == (255, 0, 51)


# --- guidance ---


def test_guidance_1_is_the_prompt_alone(sd):
    """At each step it equals the denoiser with the prompt's condition alone."""
    cond = sd.encode_prompt(["a red apple"])
    sigmas = process.sigmas_of(STEPS, sd.schedule)
    x = process.noise_of(sd, 5) / sd.schedule.prediction.c_in(sigmas[0])
    denoise = make_denoiser(sd.unet, sd.schedule)
    with torch.no_grad():
        path = list(
            sample_dpmpp_2m(lambda x, sigma: denoise(x, sigma, **cond), x, sigmas, noise=None)
        )
    steps = []
    sd.generate(
        "a red apple",
        negative_prompt="a rocket",
        guidance=1,
        steps=STEPS,
        sampler="dpmpp_2m",
        seed=5,
        callback=steps.append,
    )
    assert len(steps) == STEPS and all(torch.equal(a.x, b.x) for a, b in zip(path, steps))
    walked = list(
        process.walk(
            sd, *process.condition(sd, "a red apple"), 1, process.noise_of(sd, 5), STEPS
        )
    )
    assert all(torch.equal(a.denoised, b.denoised) for a, b in zip(path, walked))


def test_guidance_0_ignores_the_prompt(sd):
    one, other = (
        sd.generate(prompt, guidance=0, steps=2)[0] for prompt in ("a red apple", "a rocket")
    )
    assert one.tobytes() == other.tobytes()


def test_guidance_goes_beyond_the_guess_in_proportion(sd):
    """One step from the same noise: cond - uncond, 4 times as far at guidance 4."""
    noise, conditions = process.noise_of(sd, 5), process.condition(sd, "a red apple")
    guess = {
        s: next(process.walk(sd, *conditions, s, noise, 1)).denoised
        for s in (0, 1, 4)
    }
    torch.testing.assert_close(guess[4] - guess[0], 4 * (guess[1] - guess[0]), rtol=1e-3, atol=1e-3)


# --- between two pictures ---


def test_slerp():
    a, b = torch.tensor([3.0, 0, 0]), torch.tensor([0, 3.0, 0])
    torch.testing.assert_close(
        process.slerp(a, b, 0.5), torch.tensor([1.0, 1, 0]) * 3 / math.sqrt(2)
    )
    torch.testing.assert_close(
        process.slerp(a, b, 1 / 3),
        3 * torch.tensor([math.cos(math.pi / 6), math.sin(math.pi / 6), 0]),
    )
    x, y = torch.randn(2, 1, 4, 8, 8).unbind()
    assert torch.equal(process.slerp(x, y, 0.0), x) and torch.equal(process.slerp(x, y, 1.0), y)
    assert torch.equal(process.slerp(x, x, 0.3), x)


def test_the_ends_are_the_two_stills(sd, apple):
    first, middle, last = process.between(
        sd, ("a red apple", "a rocket"), (5, 6), [0.0, 0.5, 1.0], STEPS
    )
    rocket = sd.generate("a rocket", steps=STEPS, seed=6, sampler="dpmpp_2m")[0]
    assert first.tobytes() == apple.tobytes() and last.tobytes() == rocket.tobytes()
    assert middle.tobytes() not in (apple.tobytes(), rocket.tobytes())


# --- img2img ---


def test_img2img(sd):
    """At strength 1 nothing of the first picture is left; the weaker, the more."""
    settings = dict(steps=4, guidance=1, seed=5)
    ball = process.ball().resize((sd.preset.size,) * 2)
    weak, middle, full = (
        img2img(sd, "a red apple", ball, strength, **settings)[0]
        for strength in (0.25, 0.5, 1)
    )
    assert full.tobytes() == sd.generate("a red apple", **settings)[0].tobytes()
    assert (
        process.distance(weak, ball) < process.distance(middle, ball) < process.distance(full, ball)
    )


# --- the script ---


def script(*args: str) -> CompletedProcess:
    return run_forked(Path(__file__).with_name("process.py"), *args)


def test_script(tmp_path):
    Image.new("RGBA", (50, 80), (0, 0, 255, 128)).save(tmp_path / "mine.png")
    done = script("--quick", "--out", str(tmp_path), "--init", str(tmp_path / "mine.png"))
    assert done.returncode == 0 and done.stderr == "", done.stderr
    for name in (
        "process.png",
        "process-samplers.png",
        "process-guidance.png",
        "process-img2img.png",
    ):
        assert Image.open(tmp_path / name).width <= 900
    assert Image.open(tmp_path / "process.gif").n_frames == 4  # the noise and 3 steps
    assert Image.open(tmp_path / "process-between.gif").n_frames > 1
    assert all(f"\n  {name} " in done.stdout for name in SAMPLERS)


@pytest.mark.parametrize(
    "option, said",
    [("--init", "cannot read the picture"), ("--ckpt", "is not a checkpoint that can be read")],
)
def test_wrong_use_gets_one_line(tmp_path, option, said):
    (tmp_path / "text.safetensors").write_text("no picture and no checkpoint")
    done = script("--quick", "--out", str(tmp_path), option, str(tmp_path / "text.safetensors"))
    assert done.returncode == 2 and done.stdout == ""
    assert (
        len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("process.py: ")
        and said in done.stderr
    )


def test_a_model_that_takes_more_than_noise_is_refused(tmp_path, monkeypatch):
    fake = SimpleNamespace(preset=PRESETS["sd1-inpaint"])
    monkeypatch.setattr(process.StableDiffusion, "load", lambda path: fake)
    with pytest.raises(draw.UserError, match="takes a mask beside the noise"):
        process.main(
            SimpleNamespace(init=None, ckpt="inpainting.safetensors", quick=True, out=tmp_path)
        )
