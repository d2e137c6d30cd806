"""Parity: what the core computes, against independent programs and closed forms. No downloads.

    pip install -r requirements-test.txt
    pytest test_sd.py

The references are diffusers (UNet, VAE, samplers, whole pipelines), transformers (text), the exact
solution of the reverse process for Gaussian data, and the formulas of the papers. Weights are
random. The original authors' own programs are the reference of tests/test_oracle.py; SD 2.x, SDXL,
the turbos and LCM are in tests/test_family.py. At the end, one run of each command.
"""
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip import CLIPTextModel, Tokenizer
from extras import fast
from model import UNetModel
from sampler import (
    PREDICTIONS,
    SAMPLERS,
    SIGMAS,
    SPACINGS,
    NoiseSchedule,
    make_denoiser,
    sample_euler,
)
from sd import PRESETS, StableDiffusion
from tests.common import (  # noqa: F401
    PROMPTS,
    SCHEDULERS,
    count_epsilons,
    fixed_seed,
    latents_psnr,
    make_scheduler,
    manifest,
    on_meta,
    our_picture,
    photograph,
    psnr,
    randomize,
    reference_text,
    reference_unet,
    reference_vae,
    relative_error,
    run_command,
    small_pair,
    their_picture,
    with_prefix,
)
from vae import AutoencoderKL

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
CPU = torch.device("cpu")
ABAR = 1 / (SIGMAS**2 + 1)
OURS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance=7.5)
THEIRS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance_scale=7.5, width=64, height=64)


# --- the networks, at full size ---

def test_names_and_shapes_are_those_of_official_files():
    state = on_meta(StableDiffusion, PRESETS["sd1"]).state_dict()
    shapes = {name: "x".join(map(str, tensor.shape)) for name, tensor in state.items()}
    assert shapes == manifest("sd1")
    parameters = sum(tensor.numel() for tensor in state.values())
    assert parameters == 859_520_964 + 83_653_863 + 123_060_480


@pytest.mark.parametrize("name", ["sd1", "emoji"])
def test_text_matches_transformers(name):
    text = randomize(on_meta(CLIPTextModel, PRESETS[name].text_encoders[0]))
    reference = reference_text(text.config, with_prefix(text.config.prefix, text.state_dict()))
    assert count_epsilons(text) == count_epsilons(reference)
    tokens = Tokenizer()(["a red apple", "", "cat " * 75])
    (features, pooled), wanted = text(tokens), reference(tokens)
    assert relative_error(features, wanted.last_hidden_state) < 1e-5
    assert relative_error(pooled, wanted.pooler_output) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "emoji"])
def test_unet_matches_diffusers(name):
    """At a usual and an odd size, each row with its own time, one of them a fraction; fast too."""
    unet = randomize(on_meta(UNetModel, PRESETS[name].unet))
    cfg = unet.config
    reference = reference_unet(cfg, with_prefix("model.diffusion_model.", unet.state_dict()))
    assert count_epsilons(unet) == count_epsilons(reference)
    t, context, y = torch.tensor([981.0, 37.25]), torch.randn(2, 77, cfg.context_dim), None
    if cfg.adm_in_channels is not None:
        y = torch.randn(2, cfg.adm_in_channels)
    inputs = [torch.randn(2, cfg.in_channels, *size) for size in ((16, 16), (11, 13))]
    wanted = [reference(x, t, context, class_labels=y).sample for x in inputs]
    for _ in "plain", "fast":
        for x, answer in zip(inputs, wanted):
            assert relative_error(unet(x, t, context, y), answer) < 1e-5
        fast.swap_classes(unet, CPU)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "emoji"])
def test_vae_matches_diffusers(name):
    """Plain and fast, which doubles sizes from 32x32 on by a transposed convolution."""
    vae = randomize(on_meta(AutoencoderKL, PRESETS[name].vae))
    encodes, decodes = references(vae)
    x, scale = torch.rand(1, 3, 64, 80) * 2 - 1, vae.config.scale_factor
    small = x if encodes is decodes else F.interpolate(x, (32, 40), mode="bicubic", antialias=True)
    wanted = encodes.encode(small).latent_dist
    noise = torch.randn_like(wanted.mean)
    latents = (wanted.mean + wanted.std * noise) * scale
    for _ in "plain", "fast":
        mean, logvar = vae.moments(x)
        assert relative_error(mean, wanted.mean) < 1e-5
        assert relative_error(logvar, wanted.logvar) < 1e-5
        assert relative_error(vae.encode(x, noise), latents) < 1e-5
        assert relative_error(vae.decode(mean * scale), decodes.decode(mean).sample) < 1e-5
        fast.swap_classes(vae, CPU)


def references(vae: AutoencoderKL):
    """diffusers' VAEs with this encoder and with this decoder: one VAE, but for the built-in model.
    Its decoder has one level more than its encoder, which diffusers' cannot have."""
    def reference(whole: AutoencoderKL):
        state = with_prefix("first_stage_model.", whole.state_dict())
        theirs = reference_vae(whole.config, state)
        assert count_epsilons(whole) == count_epsilons(theirs)
        return theirs

    def with_part(part: str, ch_mult: tuple[int, ...]) -> AutoencoderKL:
        """As many levels in both halves, and this half is the one of `vae`."""
        whole = on_meta(AutoencoderKL, replace(config, ch_mult=ch_mult, decoder_ch_mult=None))
        randomize(whole)
        for name in part, "quant_conv", "post_quant_conv":
            whole.get_submodule(name).load_state_dict(vae.get_submodule(name).state_dict())
        return whole

    config = vae.config
    if config.decoder_ch_mult is None:
        return [reference(vae)] * 2
    return [reference(with_part("encoder", config.ch_mult)),
            reference(with_part("decoder", config.decoder_ch_mult))]


# --- whole pictures against diffusers' pipelines. More numbers of steps: tests/test_sampler.py ---

@pytest.mark.parametrize("name, spacing", SCHEDULERS)
def test_picture_matches_diffusers(name, spacing):
    """From the same weights, prompts and seed. 7 steps do not divide 1000."""
    sd, pipe = small_pair()
    pipe.scheduler = make_scheduler(name, spacing)
    ours, our_latents = our_picture(sd, **OURS, steps=7, sampler=name, timestep_spacing=spacing)
    theirs, their_latents = their_picture(pipe, **THEIRS, num_inference_steps=7)
    print(f"{name} {spacing}: picture {psnr(ours, theirs):.1f} dB,"
          f" latents {latents_psnr(our_latents, their_latents):.1f} dB")
    assert psnr(ours, theirs) >= 50


def test_the_comparison_tells_samplers_apart():
    """The control: another sampler, step, guidance or letter is below 40 dB."""
    sd, pipe = small_pair()
    ours, _ = our_picture(sd, **OURS, steps=20, sampler="ddim", timestep_spacing="leading")
    pipe.scheduler = make_scheduler("euler", "linspace")
    assert psnr(ours, their_picture(pipe, **THEIRS, num_inference_steps=20)[0]) < 40
    pipe.scheduler = make_scheduler("ddim", "leading")
    usual = THEIRS | dict(num_inference_steps=20)
    for other in (dict(num_inference_steps=21), dict(guidance_scale=6.5),
                  dict(prompt="a red apples")):
        assert psnr(ours, their_picture(pipe, **usual | other)[0]) < 40


def test_pictures_to_numbers_and_back_match_diffusers():
    """Levels 0...255 are -1...1 and are rounded: cutting instead would change half of them."""
    sd, pipe = small_pair()
    scale, z = pipe.vae.config.scaling_factor, torch.randn(2, 4, 8, 8)
    ours = sd.decode_latents(z)
    theirs = pipe.image_processor.postprocess(pipe.vae.decode(z / scale).sample)
    assert np.mean(np.stack(ours) != np.stack(theirs)) < 1e-3
    mean = pipe.vae.encode(pipe.image_processor.preprocess(theirs)).latent_dist.mean
    assert relative_error(sd.encode_image(theirs), mean * scale) < 1e-5


# --- samplers against closed forms ---

# The data: N(MU, STD^2), for which the best guess and the reverse process are known exactly.
MU, STD = 0.3, 0.5


def exact_denoise(x, sigma):
    return (STD**2 * x + sigma**2 * MU) / (STD**2 + sigma**2)


def run(sample, x, sigmas, noise=None):
    *_, last = sample(exact_denoise, x, sigmas, noise)
    return last.x


def test_schedule_constants():
    assert ABAR[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046601], rel=1e-5)
    assert SIGMAS[[0, -1]].tolist() == pytest.approx([0.029167, 14.6146], rel=1e-5)
    wanted = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292]
    assert SPACINGS["karras"](10, SIGMAS) == pytest.approx(wanted, abs=5e-5)


def test_times_of_the_spacings():
    schedule = NoiseSchedule()

    def times(spacing, n):
        return [schedule.sigma_to_t(sigma) for sigma in SPACINGS[spacing](n, SIGMAS)]

    assert times("leading", 50) == pytest.approx(range(981, 0, -20), abs=1e-6)
    assert times("leading", 20) == pytest.approx(range(951, 0, -50), abs=1e-6)
    assert times("trailing", 20) == pytest.approx(range(999, 0, -50), abs=1e-6)
    found = times("linspace", 20)
    assert found[:3] + found[-1:] == pytest.approx([999, 946.42, 893.84, 0], abs=0.01)
    found = [schedule.sigma_to_t(float(sigma)) for sigma in SIGMAS]
    assert found == pytest.approx(range(1000), abs=1e-6)


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_solvers_converge_to_the_exact_path_with_their_order(name, order):
    x = torch.linspace(-30, 30, 7, dtype=torch.float64)
    errors = []
    for n in (50, 100, 200, 400):
        sigmas = SPACINGS["karras"](n + 1, SIGMAS)
        shrunk = math.sqrt((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2))
        exact = MU + (x - MU) * shrunk
        errors.append(float((run(SAMPLERS[name].sample, x, sigmas) - exact).abs().max()))
    found = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert found == pytest.approx([order] * 3, abs=0.15), errors


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_ancestral_sampling_reproduces_the_data(name):
    """Mean and standard deviation within three standard errors: 20,000 samples, 2000 steps."""
    n, sigmas = 20_000, SPACINGS["karras"](2000, SIGMAS)
    x = MU + torch.randn(n) * (sigmas[0] ** 2 + STD**2) ** 0.5
    x = run(SAMPLERS[name].sample, x, sigmas, lambda: torch.randn(n))
    std = (STD**2 + sigmas[-1] ** 2) ** 0.5
    assert float(x.mean()) == pytest.approx(MU, abs=3 * std / n**0.5)
    assert float(x.std()) == pytest.approx(std, abs=3 * std / (2 * n) ** 0.5)


@pytest.mark.parametrize("t, before", [(999, 979), (500, 100), (21, 1)])
def test_a_step_is_the_published_formula(t, before):
    """eta 0: DDIM (Song et al. 2021, equation 12).

    eta 1: the DDPM posterior (Ho et al. 2020, equations 6 and 7).
    """
    abar, abar_before = ABAR[t], ABAR[before]
    x0, eps, z = torch.randn(3, 10, dtype=torch.float64)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    ddim = abar_before.sqrt() * x0 + (1 - abar_before).sqrt() * eps
    alpha = abar / abar_before
    mean = (abar_before.sqrt() * (1 - alpha) / (1 - abar) * x0
            + alpha.sqrt() * (1 - abar_before) / (1 - abar) * x)
    ddpm = mean + ((1 - abar_before) / (1 - abar) * (1 - alpha)).sqrt() * z
    sigmas = SIGMAS[[t, before]].tolist()
    for eta, wanted in (0.0, ddim), (1.0, ddpm):
        step, = sample_euler(lambda x, sigma: x0, x / abar.sqrt(), sigmas, lambda: z, eta)
        torch.testing.assert_close(step.x * abar_before.sqrt(), wanted)


@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_training_target_and_sampler_agree(prediction_type):
    """The target is the noise (eps) or sqrt(abar) eps - sqrt(1 - abar) x0 (v).

    A network that answers it makes denoise return x0.
    """
    schedule, t = NoiseSchedule(prediction_type), torch.tensor([0, 37, 500, 999])
    x0, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    sigma = schedule.sigmas[t]
    abar = 1 / (sigma**2 + 1) if prediction_type == "v-zero-snr" else ABAR[t]
    abar = abar[:, None, None, None]
    x, answer = schedule.q_sample(x0, t, noise), schedule.target(x0, t, noise)
    wanted = noise
    if prediction_type != "eps":
        wanted = abar.sqrt() * noise - (1 - abar).sqrt() * x0
    torch.testing.assert_close(x, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    torch.testing.assert_close(answer, wanted)
    for i in range(4):
        def net(net_x, net_t):
            torch.testing.assert_close(net_x, x[i:i + 1])
            assert net_t.tolist() == pytest.approx([int(t[i])], abs=1e-3)
            return answer[i:i + 1]

        denoised = make_denoiser(net, schedule)(x[i:i + 1] / abar[i].sqrt(), float(sigma[i]))
        # nets answer in fp32
        torch.testing.assert_close(denoised, x0[i:i + 1], atol=1e-5, rtol=1e-5)


def test_one_step_from_pure_noise_is_the_guess():
    """For every sampler that ends at sigma 0. diffusers' Euler cannot be compared here."""
    for name in ("ddpm", "euler", "euler_a", "dpmpp_2m"):
        x, sigma = torch.randn(5, dtype=torch.float64), float(SIGMAS[-1])
        found = run(SAMPLERS[name].sample, x, [sigma, 0.0])
        torch.testing.assert_close(found, exact_denoise(x, sigma))


# --- the commands ---

def test_draw_command(tmp_path):
    """It draws what Python draws, and makes the folder."""
    path = tmp_path / "new" / "apple.png"
    run_command("sd.py", "a red apple", "--seed", "3", "--steps", "8", "--device", "cpu",
                "--dtype", "fp32", "--out", path)
    sd = StableDiffusion.load(None, "cpu", torch.float32)
    wanted, = sd.generate("a red apple", seed=3, steps=8)
    assert psnr(Image.open(path), wanted) > 50


def test_train_command(tmp_path):
    """Three steps from the built-in model, which is loaded and draws; its weights have changed."""
    data, out = tmp_path / "pictures", tmp_path / "run"
    data.mkdir()
    for name in "cat", "dog":
        photograph().save(data / f"{name}.png")
        (data / f"{name}.txt").write_text(f"a {name}")
    run_command("train.py", "--data", data, "--out", out, "--steps", "3", "--batch", "2",
                "--log-every", "1", "--sample-every", "0", "--device", "cpu")
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert all(math.isfinite(line["loss"]) for line in lines if "loss" in line) and lines
    trained = StableDiffusion.load(out / "model.safetensors", "cpu", torch.float32)
    before = StableDiffusion.load(None, "cpu", torch.float32)
    assert trained.preset.unet == before.preset.unet
    name = "model.diffusion_model.out.2.weight"
    assert not torch.equal(trained.state_dict()[name], before.state_dict()[name])
    assert trained.generate("a cat", steps=2)[0].size == (128, 128)
