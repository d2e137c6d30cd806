"""Samplers, guidance and the pipeline. Closed forms and a first comparison: test_sd.py."""
import math
from itertools import combinations

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from sampler import (
    SAMPLERS,
    SIGMAS,
    SPACINGS,
    NoiseSchedule,
    cfg,
    get_sigmas,
    make_denoiser,
    make_sigmas,
    noise_sampler,
)
from sd import UserError
from tests.common import (
    BETAS,
    EULER_START,
    PROMPTS,
    SCHEDULERS,
    latents_psnr,
    levels_apart,
    make_scheduler,
    our_picture,
    photograph,
    psnr,
    random_model,
    relative_error,
    small_pair,
    their_picture,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
OURS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance=7.5)
THEIRS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance_scale=7.5)
SQUARE = dict(width=64, height=64)


# --- pictures against diffusers' pipelines ---

# left out: diffusers' Euler makes its only step from time 0, where there is no noise to remove
NOT_COMPARED = [(name, spacing, 1) for name in ("euler", "euler_a")
                for spacing in ("linspace", "karras")]
COMPARED = [(name, spacing, steps) for name, spacing in SCHEDULERS
            for steps in (1, 20, 30)  # 7: test_sd.py. 7 and 30 do not divide 1000
            if (name, spacing, steps) not in NOT_COMPARED]


@pytest.mark.parametrize("name, spacing, steps", COMPARED)
def test_picture_matches_diffusers(name, spacing, steps):
    """From the same weights, prompts, seed and number of steps. `pytest -s` shows the dB."""
    sd, pipe = small_pair()
    pipe.scheduler = make_scheduler(name, spacing)
    ours, our_latents = our_picture(
        sd, **OURS, steps=steps, sampler=name, timestep_spacing=spacing)
    theirs, their_latents = their_picture(pipe, **THEIRS, num_inference_steps=steps, **SQUARE)
    print(f"{name} {spacing} {steps}: picture {psnr(ours, theirs):.1f} dB,"
          f" latents {latents_psnr(our_latents, their_latents):.1f} dB")
    assert psnr(ours, theirs) >= 50


@pytest.mark.parametrize("prediction_type", ["eps", "v"])
@pytest.mark.parametrize("name, spacing", SCHEDULERS)
def test_two_choices_explain_every_difference_from_diffusers(name, spacing, prediction_type,
                                                             monkeypatch):
    """Undo both, and latents agree to rounding.

    We start from noise * sqrt(sigma_max^2 + 1), the exact scale, where diffusers' Euler takes
    noise * sigma_max. We give the UNet fractional times with karras, diffusers' DPM++ rounds them.
    """
    sd, pipe = small_pair(prediction_type)
    pipe.scheduler = make_scheduler(name, spacing, prediction_type)
    if name == "dpmpp_2m":
        exact = NoiseSchedule.sigma_to_t
        monkeypatch.setattr(NoiseSchedule, "sigma_to_t",
                            lambda schedule, sigma: float(round(exact(schedule, sigma))))
    start = EULER_START if name.startswith("euler") and spacing != "leading" else 1
    _, ours = our_picture(sd, **OURS, steps=13, sampler=name, timestep_spacing=spacing)
    _, theirs = their_picture(pipe, **THEIRS, num_inference_steps=13, **SQUARE, start=start)
    print(f"{name} {spacing} {prediction_type}: latents {latents_psnr(ours, theirs):.1f} dB")
    assert latents_psnr(ours, theirs) >= 100


@pytest.mark.parametrize("last, wanted", [(0, 60), (4.8973451890853435e-08, 100)])
def test_zero_terminal_snr_matches_diffusers(last, wanted):
    """Its DDIM with rescaled betas, whose last abar is 0: noising, velocity and picture.

    To rounding, if the last abar is the number that ours is.
    """
    sd, pipe = small_pair("v-zero-snr")
    pipe.scheduler = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing",
        prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    pipe.scheduler.alphas_cumprod[-1] = last
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 4, 2, 2)
    noised, velocity = sd.schedule.q_sample(x0, t, noise), sd.schedule.target(x0, t, noise)
    for ours, theirs in ((noised, pipe.scheduler.add_noise(x0, noise, t)),
                         (velocity, pipe.scheduler.get_velocity(x0, noise, t))):
        assert latents_psnr(ours, theirs) >= wanted
        assert relative_error(ours, theirs) < (1e-3 if last == 0 else 1e-5)
    # divisors of 1000: else diffusers' DDIM steps to other times than those it goes on with
    for steps in (1, 20):
        _, ours = our_picture(sd, **OURS, steps=steps, sampler="ddim", timestep_spacing="trailing")
        _, theirs = their_picture(pipe, **THEIRS, num_inference_steps=steps, **SQUARE)
        print(f"zero SNR, {steps} steps: latents {latents_psnr(ours, theirs):.1f} dB")
        assert latents_psnr(ours, theirs) >= wanted


@pytest.mark.parametrize("strength", [0.5, 0.8])
@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "linspace")])
def test_start_latents_match_diffusers(name, spacing, strength):
    """`init` and `strength`: noise is drawn for the picture's latents first, as diffusers does."""
    sd, pipe = small_pair("eps", diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = make_scheduler(name, spacing)
    noise = noise_sampler((4, 8, 8), [5], "cpu")
    init = sd.encode_image([photograph()], noise())
    ours, _ = our_picture(sd, **OURS, steps=30, sampler=name, timestep_spacing=spacing,
                          init=init, noise=noise, strength=strength)
    theirs, _ = their_picture(pipe, **THEIRS, num_inference_steps=30, image=photograph(),
                              strength=strength)
    print(f"{name} {strength}: {psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


# --- noise levels ---

@pytest.mark.parametrize("spacing", SPACINGS)
def test_n_steps_have_n_falling_sigmas(spacing):
    some = 49, 50, 99, 100, 110, 250, 333, 334, 500, 501, 700, 998, 999, 1000
    for n in [*range(1, 41), *some]:
        sigmas = SPACINGS[spacing](n, SIGMAS)
        assert len(sigmas) == n and all(a > b > 0 for a, b in zip(sigmas, sigmas[1:])), n
        assert SIGMAS[0] * 0.999999 <= sigmas[-1] and sigmas[0] <= SIGMAS[-1] * 1.000001


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("prediction_type", ["eps", "v-zero-snr"])
def test_a_run_has_one_level_more_than_steps(name, prediction_type):
    schedule = NoiseSchedule(prediction_type)
    for spacing in None, *SPACINGS:
        for steps in 1, 2, 20, 1000:
            sigmas = get_sigmas(name, steps, schedule, spacing)
            assert len(sigmas) == steps + 1 and all(a > b for a, b in zip(sigmas, sigmas[1:]))
            end = 0 if SAMPLERS[name].ends_at_zero else float(schedule.sigmas[0])
            assert sigmas[-1] in (0, end)
            assert math.isclose(schedule.sigmas[0], SIGMAS[0], rel_tol=1e-12)


@pytest.mark.parametrize("beta_schedule", ["linear", "scaled_linear"])
def test_noise_schedules_match_diffusers(beta_schedule):
    reference = diffusers.DDIMScheduler(beta_start=0.0001, beta_end=0.02,
                                        beta_schedule=beta_schedule)
    abar = 1 / (make_sigmas(0.0001, 0.02, beta_schedule) ** 2 + 1)
    assert relative_error(abar.float(), reference.alphas_cumprod) < 1e-5


# --- guidance ---

def test_guidance():
    """Scale 1: one pass of B rows, cond's; 0: one pass, uncond's; 7.5: both in one pass."""
    calls = []

    def denoise(x, sigma, context):
        calls.append(len(x))
        return x * context

    x, c, n = torch.randn(3, 2, 4)
    cond, uncond = {"context": c}, {"context": n}
    assert torch.equal(cfg(denoise, cond, uncond, 1)(x, 3.0), x * c) and calls == [2]
    torch.testing.assert_close(cfg(denoise, cond, uncond, 0)(x, 3.0), x * n)
    wanted = x * n + 7.5 * (x * c - x * n)
    torch.testing.assert_close(cfg(denoise, cond, uncond, 7.5)(x, 3.0), wanted)
    assert calls == [2, 2, 4]


def test_guidance_of_a_function_that_ignores_its_condition():
    """As if there were none; with one x and with two, and for a network that sees `concat` only."""
    for x in torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8):
        text = {"context": torch.zeros(len(x), 77, 32)}
        guided = cfg(lambda x, sigma, context: x / 2, text, text, 7.5)
        torch.testing.assert_close(guided(x, 3.0), x / 2)
        concat = {"concat": torch.ones(len(x), 4, 8, 8)}
        denoise = make_denoiser(lambda x, t: x[:, 4:] * t[:, None, None, None], NoiseSchedule())
        guided = cfg(denoise, concat, concat, 7.5)
        torch.testing.assert_close(guided(x, 3.0), denoise(x, 3.0, **concat))


def test_guidance_can_be_replaced():
    """`guide` is given what `cfg` is given, and what it returns is sampled."""
    sd, _ = small_pair()
    seen = []

    def guide(denoise, cond, uncond, scale):
        seen.append((sorted(cond), sorted(uncond), scale))
        return cfg(denoise, cond, uncond, 1.0)

    found = sd.generate("a cat", steps=3, guidance=4.0, guide=guide)[0]
    assert seen == [(["context"], ["context"], 4.0)]
    assert levels_apart(found, sd.generate("a cat", steps=3, guidance=1.0)[0]) == 0


# --- properties of the pipeline ---

@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_equals_its_pictures_one_by_one(name):
    sd, _ = small_pair("v")
    together = sd.generate("a cat", steps=5, sampler=name, seed=7, batch=4)
    alone = [sd.generate("a cat", steps=5, sampler=name, seed=7 + i)[0] for i in range(4)]
    assert max(map(levels_apart, together, alone)) <= 1
    assert min(levels_apart(a, b) for a, b in combinations(together, 2)) > 10


def test_a_list_of_prompts_is_a_picture_of_each():
    sd, _ = small_pair()
    prompts = ["a cat", "a dog", "a cat"]
    together = sd.generate(prompts, "blue", steps=3, seed=7)
    alone = [sd.generate(prompt, "blue", steps=3, seed=7 + i)[0]
             for i, prompt in enumerate(prompts)]
    assert len(together) == 3 and max(map(levels_apart, together, alone)) <= 1


def test_a_seed_gives_the_same_picture_twice():
    sd, _ = small_pair()
    first, second = (sd.generate("a cat", seed=3, sampler="euler_a")[0] for _ in range(2))
    assert levels_apart(first, second) == 0


@pytest.mark.parametrize("width, height", [(8, 8), (72, 40), (40, 104)])
def test_sizes_are_multiples_of_8(width, height):
    sd, _ = small_pair()
    picture, = sd.generate("a cat", steps=2, width=width, height=height)
    assert picture.size == (width, height)


def test_full_strength_leaves_nothing_of_the_picture():
    sd, _ = small_pair()
    init = sd.encode_image([Image.new("RGB", (64, 64), "red")])
    without, = sd.generate("a cat", steps=4)
    assert levels_apart(sd.generate("a cat", steps=4, init=init, strength=1)[0], without) == 0


def test_callback_sees_every_step():
    sd, _ = small_pair()
    seen = []
    sd.generate("a cat", steps=6, callback=seen.append)
    assert [step.index for step in seen] == list(range(6))
    assert all(step.x.shape == step.denoised.shape == (1, 4, 8, 8) for step in seen)
    assert torch.equal(seen[-1].x, seen[-1].denoised)  # the last step of DPM++ ends at the guess


def test_nan_is_an_error_and_not_a_black_picture():
    sd = random_model()
    sd.unet.out[2].bias[0] = math.nan
    with pytest.raises(UserError, match="NaN at step 1"):
        sd.generate("a cat", steps=2)
    sd = random_model()
    sd.vae.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(UserError, match="NaN in the decoded picture"):
        sd.generate("a cat", steps=2)


@pytest.mark.parametrize("options, words", [
    (dict(width=60), "multiple of 8"), (dict(height=0), "multiple of 8"),
    (dict(steps=0), "between 1 and 1000"), (dict(steps=1001), "between 1 and 1000"),
    (dict(guidance=math.nan), "guidance"), (dict(sampler="plms"), "dpmpp_2m"),
    (dict(timestep_spacing="cosine"), "karras"), (dict(batch=0), "batch"), (dict(seed=-1), "seed"),
    (dict(strength=0.0, init=0), "strength"), (dict(strength=1.5, init=0), "strength"),
    (dict(strength=0.1, steps=9, init=0), "0.111")], ids=str)
def test_options_out_of_range_are_errors(options, words):
    """One line, which says what is possible; and not a step runs."""
    sd, steps = random_model(), []
    with pytest.raises(UserError, match=words) as error:
        sd.generate("a cat", callback=steps.append, **options)
    assert "\n" not in str(error.value) and not steps


def test_noise_is_of_the_seed_alone():
    shape = 4, 8, 8
    both, second = noise_sampler(shape, [3, 4], "cpu"), noise_sampler(shape, [4], "cpu")
    for _ in range(3):
        one, two = both(), second()
        assert one.shape == (2, *shape) and torch.equal(one[1:], two)
    assert not np.array_equal(one[0], one[1])
