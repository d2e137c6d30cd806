"""extras/samplers.py and the rescaled guidance, against diffusers and closed forms."""
import importlib
import math
import sys
import types

import diffusers
import pytest
import torch

from extras import edit, samplers
from sampler import NUM_TIMESTEPS, SAMPLERS, SIGMAS, SPACINGS, noise_sampler
from sd import UserError
from tests.common import (
    BETAS,
    DPMPP,
    EULER_START,
    KARRAS,
    LINSPACE,
    PREDICTION_TYPES,
    PROMPTS,
    TRAILING,
    latents_psnr,
    levels_apart,
    our_picture,
    psnr,
    random_model,
    small_pair,
    their_picture,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
OURS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance=7.5)
THEIRS = dict(negative_prompt=PROMPTS["negative_prompt"], guidance_scale=7.5)
SQUARE = dict(width=64, height=64)


class Brownian:
    """In place of torchsde's tree: increments of a Brownian motion over sigma, scaled to 1.

    Of each step first the half is asked for, then the whole.
    """

    def __init__(self, x, low, high, seed):
        self.noise = noise_sampler((4, 8, 8), [5], "cpu")
        self.noise()                                    # the first is the picture's
        self.path = {}

    def __call__(self, start, stop):
        if float(start) not in self.path:
            first, rest = self.noise(), self.noise()
            self.path[float(start)] = float(stop), (start - stop) ** 0.5 * first, rest
            return first
        middle, moved, rest = self.path[float(start)]
        return (moved + (middle - stop) ** 0.5 * rest) / (start - stop) ** 0.5


@pytest.fixture
def sde_scheduler(monkeypatch):
    """diffusers' DPMSolverSDEScheduler, without torchsde."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module("diffusers.schedulers.scheduling_dpmsolver_sde")
    monkeypatch.setattr(module, "BrownianTreeNoiseSampler", Brownian)
    return module.DPMSolverSDEScheduler


SDE = DPMPP | dict(algorithm_type="sde-dpmsolver++")
COMPARED = {  # (sampler, spacing): (diffusers' scheduler, its settings, the factor of its noise)
    ("heun", "linspace"): (diffusers.HeunDiscreteScheduler, LINSPACE, EULER_START),
    ("heun", "karras"): (diffusers.HeunDiscreteScheduler, LINSPACE | KARRAS, EULER_START),
    ("dpmpp_2m_sde", "trailing"): (diffusers.DPMSolverMultistepScheduler, SDE, 1),
    ("dpmpp_sde", "linspace"): (None, LINSPACE, EULER_START),
    ("dpmpp_sde", "karras"): (None, LINSPACE | KARRAS, EULER_START),
    ("unipc", "trailing"): (diffusers.UniPCMultistepScheduler, TRAILING, 1),
}


@pytest.mark.parametrize("steps, prediction_type", [(5, "eps"), (10, "v"), (20, "eps")])
@pytest.mark.parametrize("name, spacing", COMPARED)
def test_picture_matches_diffusers(name, spacing, steps, prediction_type, sde_scheduler):
    """To 50 dB as it is; with the same start, where diffusers starts lower, to rounding.

    (Times and sigmas are in fp32 there, so that rounding is not always below 100 dB.)
    """
    sd, pipe = small_pair(prediction_type)
    kind, settings, start = COMPARED[name, spacing]
    pipe.scheduler = (kind or sde_scheduler)(
        **BETAS, **settings, prediction_type=PREDICTION_TYPES[prediction_type])
    ours, latents = our_picture(sd, **OURS, steps=steps, sampler=name, timestep_spacing=spacing)
    found = [their_picture(pipe, **THEIRS, num_inference_steps=steps, **SQUARE, start=factor)
             for factor in sorted({1, start})]
    print(f"{name} {spacing} {steps} {prediction_type}: picture {psnr(ours, found[0][0]):.1f} dB,"
          f" latents from the same start {latents_psnr(latents, found[-1][1]):.1f} dB")
    assert psnr(ours, found[0][0]) >= 50
    assert latents_psnr(latents, found[-1][1]) >= 95


# --- closed forms: data is normal, so the best guess is known ---

MU, STD = 0.3, 0.5


def run(name, x, sigmas, noise=None):
    def exact_denoise(x, sigma):
        return (STD**2 * x + sigma**2 * MU) / (STD**2 + sigma**2)
    *_, last = SAMPLERS[name].sample(exact_denoise, x, sigmas, noise)
    return last.x


@pytest.mark.parametrize("name, order", [("heun", 2), ("unipc", 3)])
def test_solvers_converge_to_the_exact_path_with_their_order(name, order):
    """UniPC's corrector makes it one order better than its step. Zhao et al. 2023, theorem 3.1."""
    x = torch.linspace(-30, 30, 7, dtype=torch.float64)
    errors = []
    for n in (50, 100, 200, 400):
        sigmas = SPACINGS["karras"](n + 1, SIGMAS)
        shrunk = math.sqrt((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2))
        errors.append(float((run(name, x, sigmas) - MU - (x - MU) * shrunk).abs().max()))
    found = [math.log2(a / b) for a, b in zip(errors, errors[1:])]
    assert found == pytest.approx([order] * 3, abs=0.2), errors


@pytest.mark.parametrize("name", ["dpmpp_2m_sde", "dpmpp_sde"])
def test_sampling_with_noise_reproduces_the_data(name):
    """Mean and standard deviation within three standard errors: 20,000 samples, 500 steps."""
    n, sigmas = 20_000, SPACINGS["karras"](500, SIGMAS)
    x = MU + torch.randn(n) * (sigmas[0] ** 2 + STD**2) ** 0.5
    x = run(name, x, sigmas, lambda: torch.randn(n))
    std = (STD**2 + sigmas[-1] ** 2) ** 0.5
    assert float(x.mean()) == pytest.approx(MU, abs=3 * std / n**0.5)
    assert float(x.std()) == pytest.approx(std, abs=3 * std / (2 * n) ** 0.5)


# --- schedules ---

@pytest.mark.parametrize("steps", [5, 10, 20])
def test_exponential_matches_diffusers(steps):
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, **LINSPACE, use_exponential_sigmas=True)
    scheduler.set_timesteps(steps)
    found = SPACINGS["exponential"](steps, SIGMAS)
    assert found == pytest.approx(scheduler.sigmas[:-1].tolist(), rel=2e-5)  # fp32 there


def test_beta_quantiles_are_those_of_scipy():
    """scipy.stats.beta.ppf(p, 0.6, 0.6), of version 1.16; and as diffusers lays sigmas by them."""
    p = torch.tensor([1, 0.9, 0.7, 0.5, 0.25, 0.1, 0.01, 1e-4, 0], dtype=torch.float64)
    theirs = [1.0, 0.9604155944112192, 0.7659829961247643, 0.5, 0.17568037865269498,
              0.03958440558878085, 0.0008612388215429059, 3.998377158137721e-07, 0]
    assert samplers.beta_quantile(p).tolist() == pytest.approx(theirs, rel=1e-12, abs=1e-30)
    first, middle, last = SPACINGS["beta"](3, SIGMAS)
    assert (first, last) == (float(SIGMAS[-1]), float(SIGMAS[0]))
    assert middle == pytest.approx((first + last) / 2)


@pytest.mark.parametrize("steps", [1, 3, 9, 37])
def test_sgm_uniform_takes_equal_times(steps):
    """999/n apart, without 0. Where the time is a whole number, sigma is the schedule's."""
    found = SPACINGS["sgm_uniform"](steps, SIGMAS)
    whole = (NUM_TIMESTEPS - 1) // steps
    wanted = [float(SIGMAS[999 - i * whole]) for i in range(steps)]
    assert 999 % steps == 0 and found == pytest.approx(wanted, rel=1e-12)
    between = SPACINGS["sgm_uniform"](2, SIGMAS)[1]
    assert between == pytest.approx(float((SIGMAS[499] * SIGMAS[500]) ** 0.5), rel=1e-12)


# --- names ---

@pytest.mark.parametrize("ours, names", {
    "euler": "Euler, euler, sample_euler, k_euler, EulerDiscreteScheduler",
    "euler_a": "Euler a, euler_ancestral, sample_euler_ancestral, EulerAncestralDiscreteScheduler",
    "heun": "Heun, heun, sample_heun, HeunDiscreteScheduler",
    "dpmpp_2m": "DPM++ 2M, dpmpp_2m, sample_dpmpp_2m, DPMSolverMultistepScheduler",
    "dpmpp_2m_sde": "DPM++ 2M SDE, dpmpp_2m_sde, dpmpp_2m_sde_gpu, sample_dpmpp_2m_sde",
    "dpmpp_sde": "DPM++ SDE, dpmpp_sde, dpmpp_sde_gpu, sample_dpmpp_sde, DPMSolverSDEScheduler",
    "unipc": "UniPC, uni_pc, uni_pc_bh2, unipc, UniPCMultistepScheduler",
    "lcm": "LCM, lcm, LCMScheduler", "ddim": "DDIM, ddim, DDIMScheduler"}.items())
def test_samplers_by_the_names_of_other_programs(ours, names):
    for name in names.split(", "):
        assert samplers.sampler_and_spacing(name) == (ours, None)
        assert samplers.sampler_and_spacing(f"{name} Karras") == (ours, "karras")
    assert ours in SAMPLERS


@pytest.mark.parametrize("ours, names", {
    "linspace": "Uniform, normal, linspace", "karras": "Karras, karras",
    "exponential": "Exponential, exponential", "sgm_uniform": "SGM Uniform, sgm_uniform",
    "beta": "Beta, beta", "leading": "DDIM, ddim_uniform, leading", "trailing": "Simple, trailing",
    "lcm": "lcm"}.items())
def test_schedules_by_the_names_of_other_programs(ours, names):
    assert {samplers.spacing_name(name) for name in names.split(", ")} == {ours}
    assert ours in SPACINGS


def test_a_row_that_is_there_stays(monkeypatch):
    """As of a fork."""
    mine = SAMPLERS["heun"]._replace(timestep_spacing="trailing")
    monkeypatch.setitem(SAMPLERS, "heun", mine)
    importlib.reload(samplers)
    assert SAMPLERS["heun"] is mine


# --- guidance ---

@pytest.mark.parametrize("prediction_type", ["eps", "v"])
def test_rescaled_guidance_matches_diffusers(prediction_type):
    sd, pipe = small_pair(prediction_type)
    pipe.scheduler = diffusers.DDIMScheduler(
        **BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="leading",
        steps_offset=1, prediction_type=PREDICTION_TYPES[prediction_type])
    ours, latents = our_picture(sd, draw=edit.draw, **OURS, steps=10, sampler="ddim",
                                timestep_spacing="leading", cfg_rescale=0.7)
    theirs, their_latents = their_picture(pipe, **THEIRS, num_inference_steps=10, **SQUARE,
                                          guidance_rescale=0.7)
    assert psnr(ours, theirs) >= 50 and latents_psnr(latents, their_latents) >= 100
    plain, _ = our_picture(sd, **OURS, steps=10, sampler="ddim", timestep_spacing="leading")
    assert levels_apart(ours, plain) > 10


def test_rescaling_by_nothing_changes_nothing():
    sd = random_model()
    for options in (dict(cfg_rescale=0.0), dict(cfg_rescale=1.0, guidance=1.0)):
        alone = {name: value for name, value in options.items() if name == "guidance"}
        a, b = (edit.draw(sd, "a cat", steps=2, **some)[0] for some in (options, alone))
        assert levels_apart(a, b) == 0
    with pytest.raises(UserError, match="between 0 and 1"):
        edit.draw(sd, "a cat", cfg_rescale=1.5)
