"""Noise and its removal: the noise schedule, what the network predicts, guidance, the samplers.

Noise is added in two ways that are the same up to a factor (Ho et al. 2020, equation 4):
    variance preserving  x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps     the UNet's input
    variance exploding   x   = x_0 + sigma eps                             the samplers' x
with sigma = sqrt((1 - abar) / abar) and x_t = x / sqrt(sigma^2 + 1). abar_t is the product of
1 - beta over the times up to t.
The way back is dx/dsigma = (x - D(x, sigma)) / sigma, where D, called `denoise` here, is the best
guess of x_0 (Karras et al. 2022, equation 3; the score is (D - x) / sigma^2). A sampler is a
generator over a list of sigmas, in fp32. It yields after each step, and the caller may look at the
step, draw it, or stop.

Shapes: x, x0, denoised (B, C, H, W) latents; sigma a float. A sampler's `sigmas` is a list that
falls, and its `noise` is a function. A schedule's `sigmas` is a tensor (1000,) that rises.
"""
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

Denoise = Callable[[Tensor, float], Tensor]  # (x, sigma) -> the guess of x_0
Noise = Callable[[], Tensor]                 # () -> standard normal noise, shaped like x
Cond = dict[str, Tensor]                     # what the UNet is given beside x and t, by name
NUM_TIMESTEPS = 1000                         # training times 0...999


def make_sigmas(beta_start: float = 0.00085, beta_end: float = 0.012,
                beta_schedule: str = "scaled_linear") -> Tensor:
    """The noise levels (1000,) of times 0...999, in fp64. Stable Diffusion: 0.02917 ... 14.6146.

    "linear": beta grows linearly (Ho et al. 2020). "scaled_linear": its square root does.
    """
    power = {"linear": 1, "scaled_linear": 2}[beta_schedule]
    start, end = beta_start ** (1 / power), beta_end ** (1 / power)
    roots = torch.linspace(start, end, NUM_TIMESTEPS, dtype=torch.float64, device="cpu")
    betas = roots**power
    abar = torch.cumprod(1 - betas, dim=0)
    return ((1 - abar) / abar).sqrt()


SIGMAS = make_sigmas()


# --- what the network predicts: denoised = c_skip x + c_out net(c_in x, t), Karras et al. 2022 ---

class Prediction(NamedTuple):
    """A prediction type (Karras et al. 2022, equation 7). The c's take a float or a tensor."""
    c_in: Callable
    c_skip: Callable
    c_out: Callable
    # (sigmas, base) -> these sigmas as this type has them; most leave them (see zero_snr)
    levels: Callable[[Tensor, Tensor], Tensor] = lambda sigmas, base: sigmas


def vp_scale(sigma):
    """The factor from variance exploding to variance preserving: sqrt(abar)."""
    return (sigma**2 + 1) ** -0.5


def zero_snr(sigmas: Tensor, base: Tensor) -> Tensor:
    """Levels moved so that the last is pure noise. Lin et al. 2024, section 3.1.

    sqrt(abar) is shifted to end at 0 and scaled to begin as before. The end is not quite 0, so
    that sigma stays finite there (4519). The limit is the one in common use.
    """
    first, last, scale = vp_scale(base[0]), vp_scale(base[-1]), vp_scale(sigmas)
    abar = ((scale - last) * first / (first - last)) ** 2
    limit = 4.8973451890853435e-08 * scale / last  # falls too, so that no two levels are equal
    return (1 / torch.maximum(abar, limit) - 1).sqrt()


EPS = Prediction(  # the noise
    c_in=vp_scale, c_skip=lambda sigma: 1.0, c_out=lambda sigma: -sigma)
V = Prediction(    # the velocity: Salimans & Ho 2022, appendix D
    c_in=vp_scale,
    c_skip=lambda sigma: vp_scale(sigma) ** 2, c_out=lambda sigma: -sigma * vp_scale(sigma))

PREDICTIONS = {"eps": EPS, "v": V, "v-zero-snr": V._replace(levels=zero_snr)}


class NoiseSchedule:
    """The noise levels (1000,) a network was trained at, and what it predicts there.

    `base` has the levels that follow from beta, `sigmas` what the prediction type makes of them.
    """

    def __init__(self, prediction_type: str = "eps", base: Tensor = SIGMAS):
        self.prediction, self.base = PREDICTIONS[prediction_type], base
        self.sigmas = self.prediction.levels(base, base)

    def sigma_to_t(self, sigma: float) -> float:
        """The time of a noise level: linear in log sigma between the times 0...999."""
        logs = self.sigmas.log()
        log_sigma = torch.tensor(sigma, dtype=torch.float64).log()
        low = int(torch.searchsorted(logs, log_sigma, right=True)) - 1
        low = min(max(low, 0), NUM_TIMESTEPS - 2)
        t = low + (log_sigma - logs[low]) / (logs[low + 1] - logs[low])
        return float(t.clamp(0, NUM_TIMESTEPS - 1))

    def sigma_at(self, t: Tensor, like: Tensor) -> Tensor:
        """The levels of the times t (B,), as (B, 1, 1, 1) beside latents."""
        return self.sigmas.to(like.dtype).to(like.device)[t][:, None, None, None]

    def q_sample(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """x_t: latents x0 (B, C, H, W) with noise of the times t (B,). Ho et al., equation 4."""
        sigma = self.sigma_at(t, x0)
        return self.prediction.c_in(sigma) * (x0 + sigma * noise)

    def target(self, x0: Tensor, t: Tensor, noise: Tensor) -> Tensor:
        """What the network should answer for q_sample(x0, t, noise): equation 7, solved for it."""
        sigma = self.sigma_at(t, x0)
        c_skip, c_out = self.prediction.c_skip(sigma), self.prediction.c_out(sigma)
        return (x0 - c_skip * (x0 + sigma * noise)) / c_out


def make_denoiser(net: Callable[..., Tensor], schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Turn the network net(x_t, t, **cond) into denoise(x, sigma, **cond) -> the guess of x_0.

    `concat` (B, C', H, W) in cond: further input channels, such as a mask.
    """
    def denoise(x: Tensor, sigma: float, concat: Tensor | None = None, **cond: Tensor) -> Tensor:
        prediction = schedule.prediction
        t = torch.full((len(x),), schedule.sigma_to_t(sigma), device=x.device)
        x_t = prediction.c_in(sigma) * x
        if concat is not None:
            x_t = torch.cat([x_t, concat], dim=1)
        answer = net(x_t, t, **cond).float()
        return prediction.c_skip(sigma) * x + prediction.c_out(sigma) * answer
    return denoise


# --- guidance ---

def cfg(denoise: Callable[..., Tensor], cond: Cond, uncond: Cond, scale: float) -> Denoise:
    """Classifier-free guidance, Ho & Salimans 2022: uncond + scale (cond - uncond), scale = 1 + w.

    `cond` and `uncond` are the prompt's and the negative prompt's, B rows each. Both go through
    the network as one batch, uncond first. At scale 1 only cond counts, and only it is computed;
    at scale 0 uncond.
    """
    if scale in (0, 1):
        alone = cond if scale == 1 else uncond
        return lambda x, sigma: denoise(x, sigma, **alone)
    both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}

    def guided(x: Tensor, sigma: float) -> Tensor:
        negative, positive = denoise(torch.cat([x, x]), sigma, **both).chunk(2)
        return negative + scale * (positive - negative)
    return guided


# --- the samplers ---

class Step(NamedTuple):
    index: int        # 0, 1, ...
    x: Tensor         # after the step
    denoised: Tensor  # the guess of x_0 that the step used


def sample_euler(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise,
                 eta: float = 0.0) -> Iterator[Step]:
    """Step towards the guess, then add some noise: DDPM, DDIM, Euler and Euler-ancestral.

    `eta` is the share of the posterior's noise that is added (Song et al. 2021, DDIM, equations 12
    and 16). 0 is an Euler step of the probability-flow ODE, which is DDIM. 1 is Euler-ancestral,
    which is the DDPM posterior.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        sigma_up = eta * sigma_next * max(0.0, 1 - (sigma_next / sigma) ** 2) ** 0.5
        sigma_down = (sigma_next**2 - sigma_up**2) ** 0.5
        x = denoised + sigma_down * (x - denoised) / sigma
        if sigma_up > 0:
            x = x + sigma_up * noise()
        yield Step(i, x, denoised)


def sample_dpmpp_2m(denoise: Denoise, x: Tensor, sigmas: list[float],
                    noise: Noise) -> Iterator[Step]:
    """DPM-Solver++(2M), Lu et al. 2022b, algorithm 2: extrapolate the last two guesses."""
    old, h_old = None, 0.0
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        if sigma_next == 0:  # log sigma ends here, and with it the extrapolation
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            guess = denoised
            if old is not None:
                guess = denoised + (denoised - old) * h / (2 * h_old)
            x = (sigma_next / sigma) * x - math.expm1(-h) * guess
            old, h_old = denoised, h
        yield Step(i, x, denoised)


def sample_lcm(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
    """Guess, add noise to the guess, guess again. Luo et al. 2023, algorithm 3.

    Their c_skip is left out: it is below 1e-5 at the 50 times of `lcm`.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        x = denoised
        if sigma_next > 0:
            x = denoised + sigma_next * noise()
        yield Step(i, x, denoised)


def noise_sampler(shape: tuple[int, ...], seeds: list[int], device: torch.device | str) -> Noise:
    """Noise (B, *shape), row i from seeds[i]. The CPU draws it, so every device gets the same."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return lambda: torch.stack([torch.randn(shape, generator=g) for g in generators]).to(device)


# --- the noise levels of a run. Names: Lin et al. 2024, table 2; diffusers' timestep_spacing ---

def leading(n: int, sigmas: Tensor) -> list[float]:
    """Times (n-1)c + 1, ..., c + 1, 1 with c = 1000 // n."""
    c = NUM_TIMESTEPS // n
    offset = min(1, NUM_TIMESTEPS - 1 - (n - 1) * c)  # 0 for n = 1000, which has no room for 1
    return [float(sigmas[i * c + offset]) for i in reversed(range(n))]


def linspace(n: int, sigmas: Tensor) -> list[float]:
    """n times evenly from 999 to 0. Between two times sigma is interpolated."""
    times = torch.linspace(NUM_TIMESTEPS - 1, 0, n, dtype=torch.float64)
    low = times.long().clamp(max=NUM_TIMESTEPS - 2)
    return torch.lerp(sigmas[low], sigmas[low + 1], times - low).tolist()


def trailing(n: int, sigmas: Tensor) -> list[float]:
    """Times 999, 999 - 1000/n, ..., rounded. The first is always the noisiest."""
    times = [round(NUM_TIMESTEPS - i * NUM_TIMESTEPS / n) - 1 for i in range(n)]
    return [float(sigmas[t]) for t in times]


def karras(n: int, sigmas: Tensor, rho: float = 7.0) -> list[float]:
    """From the largest sigma to the smallest. Karras et al. 2022, equation 5."""
    high, low = float(sigmas[-1]) ** (1 / rho), float(sigmas[0]) ** (1 / rho)
    return [(high + i / max(n - 1, 1) * (low - high)) ** rho for i in range(n)]


def lcm(n: int, sigmas: Tensor) -> list[float]:
    """n of the 50 times 999, 979, ..., 19 of latent consistency models, from the top."""
    if n > 50:
        return trailing(n, sigmas)
    times = [(50 - i * 50 // n) * NUM_TIMESTEPS // 50 - 1 for i in range(n)]
    return [float(sigmas[t]) for t in times]


SPACINGS = {f.__name__: f for f in (leading, linspace, trailing, karras, lcm)}


class Sampler(NamedTuple):
    sample: Callable[..., Iterator[Step]]
    timestep_spacing: str          # its usual one, a name in SPACINGS
    ends_at_zero: bool = True      # its last sigma is 0; else the first training level


SAMPLERS = {
    "ddim": Sampler(sample_euler, "leading", ends_at_zero=False),  # as it was released
    "ddpm": Sampler(partial(sample_euler, eta=1.0), "leading"),
    "euler": Sampler(sample_euler, "linspace"),
    "euler_a": Sampler(partial(sample_euler, eta=1.0), "linspace"),
    "dpmpp_2m": Sampler(sample_dpmpp_2m, "trailing"),
    "lcm": Sampler(sample_lcm, "lcm"),
}


def get_sigmas(sampler: str, steps: int, schedule: NoiseSchedule = NoiseSchedule(),
               timestep_spacing: str | None = None) -> list[float]:
    """The steps + 1 noise levels of a run, falling. None: the sampler's own spacing.

    The levels are chosen on the base schedule; `levels` then moves each (zero terminal SNR).
    """
    row = SAMPLERS[sampler]
    spacing = SPACINGS[row.timestep_spacing if timestep_spacing is None else timestep_spacing]
    chosen = torch.tensor(spacing(steps, schedule.base), dtype=torch.float64)
    sigmas = schedule.prediction.levels(chosen, schedule.base).tolist()
    final = 0.0 if row.ends_at_zero else float(schedule.sigmas[0])
    reached = final >= 0.999 * sigmas[-1]  # a spacing may itself go down to it
    return sigmas + [0.0 if reached else final]
