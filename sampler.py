"""Noise and its removal: the forward process, what the network predicts, guidance, and the samplers.

Forward (Ho et al. 2020, equation 4), in two pictures of the same thing:
    variance preserving  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps       what the UNet is fed
    variance exploding   x   = x_0 + sigma eps,  sigma = sqrt((1 - abar)/abar)   = x_t / sqrt(abar); what samplers work in
In the second, the reverse process is dx/dsigma = (x - D(x, sigma)) / sigma, where D, `denoise`, is the best guess of x_0
(Song et al. 2021; Karras et al. 2022, equation 3; the score is (D - x) / sigma^2). Every sampler below is a generator over a list of
sigmas, in fp32: it yields after each step, and whoever runs it may look, draw or stop.

Shapes: x, noise, denoised (B, C, H, W) latents; sigma a float; sigmas a list falling from noise to (almost) none.
"""
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> the guess of x_0
NUM_TIMESTEPS = 1000                         # training times 0...999


def make_alphas_cumprod(beta_start: float = 0.00085, beta_end: float = 0.012) -> Tensor:
    """abar_t (1000,): the share of signal power left at each time; beta is linear in its square root. Computed in fp64."""
    betas = torch.linspace(beta_start**0.5, beta_end**0.5, NUM_TIMESTEPS, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, dim=0)


ALPHAS_CUMPROD = make_alphas_cumprod()                               # 0.99915 ... 0.00466
SIGMAS = ((1 - ALPHAS_CUMPROD) / ALPHAS_CUMPROD).sqrt()              # 0.02917 ... 14.6146


def zero_snr(sigma: Tensor) -> Tensor:
    """Levels in the place of those of SIGMAS, so that the last is pure noise: sqrt(abar) shifted to end at 0 and scaled to begin as before.
    Lin et al. 2024, section 3.1; not quite 0, so that sigma, 4518 then, is finite."""
    root, (first, last) = (sigma**2 + 1) ** -0.5, ALPHAS_CUMPROD[[0, -1]].sqrt()
    abar = ((root - last) * first / (first - last)).square().clamp(min=4.8973451890853435e-08)  # the number in common use
    return (1 / abar - 1).sqrt()


def training_sigmas(prediction: str) -> Tensor:
    """The noise levels (1000,) that networks of this row of PREDICTIONS saw at times 0...999, in fp64."""
    return NOISE_LEVELS[prediction](SIGMAS)


def q_sample(x0: Tensor, t: Tensor, noise: Tensor, prediction: str = "eps") -> Tensor:
    """Latents x0 (B, C, H, W) noised to times t (B,), variance preserving. Ho et al. 2020, equation 4."""
    abar = (1 / (training_sigmas(prediction) ** 2 + 1)).to(x0.dtype).to(x0.device)[t][:, None, None, None]
    return abar.sqrt() * x0 + (1 - abar).sqrt() * noise


def sigma_to_t(sigma: float, prediction: str = "eps") -> float:
    """The time at which the noise level is sigma: linear in log sigma between the training times, 0...999."""
    log_sigmas = training_sigmas(prediction).log()
    log_sigma = torch.tensor(sigma, dtype=torch.float64).log()
    low = int((torch.searchsorted(log_sigmas, log_sigma, right=True) - 1).clamp(0, NUM_TIMESTEPS - 2))
    t = low + (log_sigma - log_sigmas[low]) / (log_sigmas[low + 1] - log_sigmas[low])
    return float(t.clamp(0, NUM_TIMESTEPS - 1))


# --- what the network predicts: denoised = c_skip x + c_out net(x / sqrt(sigma^2 + 1), t). Karras et al. 2022, equation 7 ---

PREDICTIONS = {  # sigma -> (c_skip, c_out), for floats and tensors
    "eps": lambda sigma: (1.0, -sigma),                                              # the noise
    "v": lambda sigma: (1 / (sigma**2 + 1), -sigma / (sigma**2 + 1) ** 0.5),         # Salimans & Ho 2022, appendix D
}
PREDICTIONS["v-zero-snr"] = PREDICTIONS["v"]
NOISE_LEVELS = {"eps": lambda sigma: sigma, "v": lambda sigma: sigma, "v-zero-snr": zero_snr}  # levels among SIGMAS -> those in their place


def target(prediction: str, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
    """What the network should answer for q_sample(x0, t, noise): the same two coefficients, solved for the net."""
    sigma = training_sigmas(prediction).to(x0.dtype).to(x0.device)[t][:, None, None, None]  # Apple GPUs hold no fp64
    c_skip, c_out = PREDICTIONS[prediction](sigma)
    return (x0 - c_skip * (x0 + sigma * noise)) / c_out


def denoiser(net: Callable[..., Tensor], prediction: str) -> Callable[..., Tensor]:
    """The network net(x, t, ...) as denoise(x, sigma, ...). `concat` (B, C', H, W) are further input channels, such as a mask.

    What the network is given may be one x, or one time, B times without a copy: not to be written into.
    """
    def denoise(x: Tensor, sigma: float, concat: Tensor | None = None, **condition: Tensor) -> Tensor:
        c_skip, c_out = PREDICTIONS[prediction](sigma)
        t = torch.full((1,), sigma_to_t(sigma, prediction), device=x.device).expand(len(x))
        one_or_all = x[:1] if x.stride(0) == 0 else x
        scaled = (one_or_all / (sigma**2 + 1) ** 0.5).expand(x.shape)
        if concat is not None:
            scaled = torch.cat([scaled, concat], dim=1)
        return c_skip * x + c_out * net(scaled, t, **condition).float()
    return denoise


def guided(denoise: Callable[..., Tensor], condition: dict[str, Tensor], negative: dict[str, Tensor], scale: float,
           two_passes: bool = False) -> Denoise:
    """Classifier-free guidance, Ho & Salimans 2022: negative + scale (condition - negative). Scale 1 needs one of them only."""
    return mixed(denoise, [(1 - scale, negative), (scale, condition)], two_passes)


def mixed(denoise: Callable[..., Tensor], weighted: list[tuple[float, dict[str, Tensor]]], one_by_one: bool = False) -> Denoise:
    """The weighted sum of what the network guesses under several conditions; those of weight 0 are left out.

    All go through it as one batch, or `one_by_one`, in less memory.
    """
    weights, conditions = zip(*((weight, condition) for weight, condition in weighted if weight != 0))
    if one_by_one or len(weights) == 1:
        return lambda x, sigma: sum(weight * denoise(x, sigma, **condition) for weight, condition in zip(weights, conditions))
    batch = {name: torch.cat([condition[name] for condition in conditions]) for name in conditions[0]}

    def mixed_denoise(x: Tensor, sigma: float) -> Tensor:
        every = x.expand(len(weights), *x.shape[1:]) if len(x) == 1 else torch.cat([x] * len(weights))  # without a copy: UNetModel makes use of it
        guesses = denoise(every, sigma, **batch).chunk(len(weights))
        return sum(weight * guess for weight, guess in zip(weights, guesses, strict=True))
    return mixed_denoise


def inpainted(denoise: Denoise, known: Tensor, mask: Tensor) -> Denoise:
    """Only where mask (B, 1, H, W) is 1 is the guess the network's; elsewhere it is known (B, C, H, W), to which every sampler then goes straight."""
    return lambda x, sigma: torch.lerp(known, denoise(x, sigma), mask)


def until(turn: float, early: Denoise, late: Denoise) -> Denoise:
    """`early` at noise levels above `turn`, from there on `late`."""
    return lambda x, sigma: early(x, sigma) if sigma > turn else late(x, sigma)


# --- the samplers ---

class Step(NamedTuple):
    index: int        # 0, 1, ...
    x: Tensor         # after the step
    denoised: Tensor  # the guess of x_0 the step was made with


def sample_ancestral(denoise: Denoise, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor], eta: float = 0.0) -> Iterator[Step]:
    """Step towards the guess, then put some noise back: DDPM, DDIM, Euler and Euler-ancestral in one.

    `eta` is the share of the posterior's noise put back (DDIM, Song et al. 2021, equations 12 and 16): at 0 this is an
    Euler step of the probability-flow ODE and equals DDIM; at 1 it is Euler-ancestral and equals the DDPM posterior.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        sigma_up = eta * sigma_next * max(0.0, 1 - (sigma_next / sigma) ** 2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        x = denoised + sigma_down * (x - denoised) / sigma
        if sigma_up > 0:
            x = x + sigma_up * draw()
        yield Step(i, x, denoised)


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: the guess is extrapolated from the last two, in log sigma. Draws no noise."""
    old, h_old = None, 0.0
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        if sigma_next == 0:  # infinitely far in log sigma: first order
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            guess = denoised if old is None else denoised + (denoised - old) * h / (2 * h_old)
            x = (sigma_next / sigma) * x - math.expm1(-h) * guess
            old, h_old = denoised, h
        yield Step(i, x, denoised)


def sample_lcm(denoise: Denoise, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Iterator[Step]:
    """Guess, noise the guess anew, guess again. Luo et al. 2023, algorithm 3; their c_skip is below 1e-5 at the 50 times of `lcm`."""
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        x = denoised + sigma_next * draw() if sigma_next > 0 else denoised
        yield Step(i, x, denoised)


class Sampler(NamedTuple):
    sample: Callable[..., Iterator[Step]]
    spacing: str             # its usual one, a name in SPACINGS
    last: float = 0.0        # the sigma it ends at


SAMPLERS = {
    "ddim": Sampler(sample_ancestral, "leading", last=float(SIGMAS[0])),  # as released: set_alpha_to_one=False
    "ddpm": Sampler(partial(sample_ancestral, eta=1.0), "leading"),
    "euler": Sampler(sample_ancestral, "linspace"),
    "euler_a": Sampler(partial(sample_ancestral, eta=1.0), "linspace"),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, "trailing"),
    "lcm": Sampler(sample_lcm, "lcm"),
}


# --- which sigmas: n of them, falling. The names are those of Lin et al. 2024, table 2, and diffusers' `timestep_spacing` ---

def leading(n: int) -> list[float]:
    """Times (n-1)c + 1, ..., c + 1, 1 with c = 1000 // n."""
    c = NUM_TIMESTEPS // n
    offset = min(1, NUM_TIMESTEPS - 1 - (n - 1) * c)  # 1, but 0 for n = 1000
    return [float(SIGMAS[i * c + offset]) for i in reversed(range(n))]


def linspace(n: int) -> list[float]:
    """n times evenly from 999 to 0 (fractions interpolate sigma)."""
    times = torch.linspace(NUM_TIMESTEPS - 1, 0, n, dtype=torch.float64)
    low = times.long().clamp(max=NUM_TIMESTEPS - 2)
    return torch.lerp(SIGMAS[low], SIGMAS[low + 1], times - low).tolist()


def trailing(n: int) -> list[float]:
    """Times 999, 999 - 1000/n, ..., rounded: the first is always pure noise."""
    return [float(SIGMAS[round(NUM_TIMESTEPS - i * NUM_TIMESTEPS / n) - 1]) for i in range(n)]


def karras(n: int, rho: float = 7.0) -> list[float]:
    """Karras et al. 2022, equation 5, from the schedule's largest sigma to its smallest."""
    high, low = float(SIGMAS[-1]) ** (1 / rho), float(SIGMAS[0]) ** (1 / rho)
    return [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]


def lcm(n: int) -> list[float]:
    """n of the 50 times 999, 979, ..., 19 that latent consistency models were distilled at, evenly from the top (trailing, if n > 50)."""
    return [float(SIGMAS[(50 - i * 50 // n) * NUM_TIMESTEPS // 50 - 1]) for i in range(n)] if n <= 50 else trailing(n)


SPACINGS = {f.__name__: f for f in (leading, linspace, trailing, karras, lcm)}


def schedule(sampler: str, steps: int, spacing: str | None = None, prediction: str = "eps") -> list[float]:
    """The noise levels of a run: `steps` of them, by the spacing (None: the sampler's own), then the one it ends at. With zero terminal SNR
    the spacing's levels are mapped one by one, those of karras too, which then no longer are evenly spaced in sigma^(1/7)."""
    _, usual, last = SAMPLERS[sampler]
    spaced = SPACINGS[usual if spacing is None else spacing](steps)
    sigmas = NOISE_LEVELS[prediction](torch.tensor(spaced, dtype=torch.float64)).tolist()
    return sigmas + [last if last < 0.999 * sigmas[-1] else 0.0]  # a spacing may already go down to `last`
