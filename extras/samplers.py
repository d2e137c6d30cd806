"""More samplers and schedules, and the names that other programs have for them.

Importing this module adds them to `SAMPLERS` and `SPACINGS` of sampler.py. A row of the same name
that is there already stays.

Shapes and types are those of sampler.py. lambda = -log sigma; a step's h is its difference.
"""
import math
import re
from collections.abc import Iterator

import torch
from torch import Tensor

from sampler import NUM_TIMESTEPS, SAMPLERS, SPACINGS, Denoise, Noise, Sampler, Step

# --- samplers ---

def sample_heun(denoise: Denoise, x: Tensor, sigmas: list[float], noise: Noise) -> Iterator[Step]:
    """The mean of the slopes at both ends of a step. Karras et al. 2022, algorithm 1."""
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        slope = (x - denoised) / sigma
        if sigma_next > 0:
            end = x + (sigma_next - sigma) * slope
            slope = (slope + (end - denoise(end, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
        yield Step(i, x, denoised)


def sample_dpmpp_2m_sde(denoise: Denoise, x: Tensor, sigmas: list[float],
                        noise: Noise) -> Iterator[Step]:
    """SDE-DPM-Solver++(2M), Lu et al. 2022b, equation 18: 2M of which every step adds noise."""
    old, h_old = None, 0.0
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            guess = denoised
            if old is not None:
                guess = denoised + (denoised - old) * h / (2 * h_old)
            share = -math.expm1(-2 * h)
            x = (sigma_next / sigma) ** 2 * x + share * guess
            x = x + sigma_next * share**0.5 * noise()
            old, h_old = denoised, h
        yield Step(i, x, denoised)


def sample_dpmpp_sde(denoise: Denoise, x: Tensor, sigmas: list[float],
                     noise: Noise) -> Iterator[Step]:
    """DPM-Solver++ SDE as k-diffusion has it: to the middle in lambda, and by its guess the whole.

    Both are ancestral steps. The noise of the whole step has that of its first half in it, as a
    Brownian motion over sigma has.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        if sigma_next == 0:
            x = denoised
        else:
            middle = (sigma * sigma_next) ** 0.5
            first, rest = noise(), noise()
            share = (sigma - middle) / (sigma - sigma_next)
            whole = share**0.5 * first + (1 - share) ** 0.5 * rest
            half_way = ancestral_step(x, denoised, sigma, middle, first)
            x = ancestral_step(x, denoise(half_way, middle), sigma, sigma_next, whole)
        yield Step(i, x, denoised)


def ancestral_step(x: Tensor, denoised: Tensor, sigma: float, sigma_next: float,
                   noise: Tensor) -> Tensor:
    """A step of `sample_euler` with eta = 1."""
    sigma_up = sigma_next * (1 - (sigma_next / sigma) ** 2) ** 0.5
    sigma_down = sigma_next**2 / sigma
    return denoised + sigma_down * (x - denoised) / sigma + sigma_up * noise


def sample_unipc(denoise: Denoise, x: Tensor, sigmas: list[float],
                 noise: Noise) -> Iterator[Step]:
    """UniPC of order 2 with B(h) = e^h - 1, Zhao et al. 2023, algorithms 1 and 2.

    The step is DPM-Solver++(2M). The guess at its end then corrects it, without a further call.
    """
    past: list[tuple[float, Tensor]] = []       # lambda and guess of the two levels before
    before = x                                  # x there, corrected
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised = denoise(x, sigma)
        here = (-math.log(sigma), denoised)
        if past:
            x = unipc_corrector(before, past, here)
        before, past = x, [*past[-1:], here]
        if sigma_next == 0:
            x = denoised
        else:
            h = math.log(sigma / sigma_next)
            guess = denoised
            if len(past) == 2:
                guess = denoised + (denoised - past[0][1]) * h / (2 * (past[1][0] - past[0][0]))
            x = (sigma_next / sigma) * x - math.expm1(-h) * guess
        yield Step(i, x, denoised)


def unipc_corrector(x: Tensor, past: list[tuple[float, Tensor]],
                    here: tuple[float, Tensor]) -> Tensor:
    """From x at the level before to this one, by the guesses (lambda, guess) at both and, if there
    is one, at the level before them. The weights solve equation 5 of the paper."""
    (start, denoised), (end, denoised_next) = past[-1], here
    h = end - start
    change = math.expm1(-h)
    correction = (denoised_next - denoised) / 2
    if len(past) == 2:
        r = (past[0][0] - start) / h
        phi = -change / h - 1
        b1 = phi / change
        b2 = 2 * (-phi / h - 0.5) / change
        weight = (b1 - b2) / (1 - r)
        correction = (weight / r) * (past[0][1] - denoised) \
            + (b1 - weight) * (denoised_next - denoised)
    return math.exp(-h) * x - change * (denoised + correction)


# --- schedules ---

def exponential(n: int, sigmas: Tensor) -> list[float]:
    """From the largest sigma to the smallest, evenly in log sigma. k-diffusion."""
    high, low = math.log(sigmas[-1]), math.log(sigmas[0])
    return [math.exp(high + i / max(n - 1, 1) * (low - high)) for i in range(n)]


def sgm_uniform(n: int, sigmas: Tensor) -> list[float]:
    """The first n of n + 1 times evenly from 999 to 0. Stability AI's generative-models.

    Between two times sigma is interpolated in its logarithm, as k-diffusion does.
    """
    times = torch.linspace(NUM_TIMESTEPS - 1, 0, n + 1, dtype=torch.float64)[:-1]
    low = times.long().clamp(max=NUM_TIMESTEPS - 2)
    logs = sigmas.log()
    return torch.lerp(logs[low], logs[low + 1], times - low).exp().tolist()


def beta(n: int, sigmas: Tensor) -> list[float]:
    """Many levels near both ends: quantiles of a beta distribution. Lee et al. 2024, section 4.3.

    Of sigma, as A1111 and diffusers have it; ComfyUI takes quantiles of the time.
    """
    p = 1 - torch.linspace(0, 1, n, dtype=torch.float64)
    return torch.lerp(sigmas[0], sigmas[-1], beta_quantile(p)).tolist()


def beta_quantile(p: Tensor, a: float = 0.6, terms: int = 60) -> Tensor:
    """The x at which the distribution function of Beta(a, a) is p, by its power series."""
    k = torch.arange(terms, dtype=torch.float64)
    factors = torch.cat([torch.ones(1, dtype=torch.float64), (k[1:] - a) / k[1:]])
    series = torch.cumprod(factors, 0) / (a + k)

    def integral(x: Tensor) -> Tensor:
        return x**a * (x[..., None] ** k * series).sum(-1)

    tail = torch.minimum(p, 1 - p)              # it is symmetric; the series is for x <= 1/2
    wanted = tail * 2 * integral(torch.tensor(0.5, dtype=torch.float64))
    low, high = torch.zeros_like(p), torch.full_like(p, 0.5)
    for _ in range(100):
        middle = (low + high) / 2
        below = integral(middle) < wanted
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return torch.where(p > 0.5, 1 - high, low)


# --- the tables ---

ROWS = {
    "heun": Sampler(sample_heun, "linspace"),
    "dpmpp_2m_sde": Sampler(sample_dpmpp_2m_sde, "exponential"),    # the spacings are A1111's
    "dpmpp_sde": Sampler(sample_dpmpp_sde, "karras"),
    "unipc": Sampler(sample_unipc, "trailing"),
}
for _name, _row in ROWS.items():
    SAMPLERS.setdefault(_name, _row)
for _spacing in exponential, sgm_uniform, beta:
    SPACINGS.setdefault(_spacing.__name__, _spacing)


# --- names elsewhere: letters and digits, in lower case, with "++" as "pp" ---

SAMPLER_NAMES = {
    "eulera": "euler_a", "eulerancestral": "euler_a",
    "dpmpp2m": "dpmpp_2m", "dpmsolvermultistep": "dpmpp_2m",
    "dpmpp2msde": "dpmpp_2m_sde", "dpmpp2msdegpu": "dpmpp_2m_sde",
    "dpmppsde": "dpmpp_sde", "dpmppsdegpu": "dpmpp_sde", "dpmsolversde": "dpmpp_sde",
    "heun": "heun",
    "unipc": "unipc", "unipcbh2": "unipc", "unipcmultistep": "unipc",
    "ddim": "ddim", "ddpm": "ddpm", "euler": "euler", "lcm": "lcm",
}
SPACING_NAMES = {
    "uniform": "linspace", "normal": "linspace", "linspace": "linspace",
    "simple": "trailing", "trailing": "trailing",
    "ddim": "leading", "ddimuniform": "leading", "leading": "leading",
    "karras": "karras", "exponential": "exponential", "beta": "beta",
    "sgmuniform": "sgm_uniform",
}


def letters(name: str) -> str:
    """ "DPM++ 2M SDE" -> dpmpp2msde, the form in which names are compared."""
    name = name.strip().lower().replace("++", "pp")
    name = re.sub(r"^(sample_|k_)+|(discrete)?scheduler$", "", name)
    return re.sub("[^a-z0-9]", "", name)


def sampler_name(name: str) -> str:
    """A sampler's name in A1111, ComfyUI, k-diffusion or diffusers -> the one in SAMPLERS.

    A name that is not known comes back as it is spelled here, in lower case.
    """
    if name in SAMPLERS:
        return name
    return SAMPLER_NAMES.get(letters(name), name.strip().lower().replace(" ", "_"))


def spacing_name(name: str) -> str:
    """The same for schedules, as in SPACINGS."""
    if name in SPACINGS:
        return name
    return SPACING_NAMES.get(letters(name), name.strip().lower().replace(" ", "_"))


def sampler_and_spacing(name: str) -> tuple[str, str | None]:
    """"DPM++ 2M Karras", as A1111 had it before 1.9, -> dpmpp_2m and karras; else no spacing."""
    match = re.fullmatch(r"(.*\S) (Karras|Exponential|SGM ?Uniform|Beta)", name.strip(), re.I)
    if match:
        return sampler_name(match[1]), spacing_name(match[2])
    return sampler_name(name), None
