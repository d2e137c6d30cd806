"""Chapter 1, diffusion in two dimensions: data into noise, noise into data, and a network that learns the way back.

The lecture's particles. The data is a mixture of three Gaussians, so that all a network has to learn is known exactly.
    forward      dx = g(t) dw                             after it p_sigma = p_data * N(0, sigma^2), sigma^2 = the integral of g^2
    reverse SDE  dx = -g^2 grad log p_sigma(x) dt + g dw  Song et al. 2021 (score SDE), equations 6 and 9
    ODE          dx = -1/2 g^2 grad log p_sigma(x) dt     the same, equation 13: the same crowd at every sigma, without noise
    learning     min ||eps + f(x_0 + sigma eps, t)||^2    f = sigma grad log p_sigma: to denoise is to know the score (Vincent 2011)
                 min ||eps - f(x_0 + sigma eps, t)||^2    f = -sigma grad log p_sigma: Stable Diffusion's (Ho et al. 2020, equation 14)
sampler.py takes these steps with latents of pictures, in terms of the best guess of x_0: D = x + sigma^2 grad log p_sigma(x).

    python lecture/diffusion.py
    python lecture/diffusion.py --weights 0.8 0.1 0.1
"""
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from draw import Plot, UserError, heat, run, save, save_gif, sheet
from model import timestep_embedding, zero
from sampler import SIGMAS, Denoise, Step, denoiser, karras, q_sample, sample_ancestral, sample_dpmpp_2m


# --- the data, and its score at every noise level ---

class Mixture(NamedTuple):
    weights: Tensor  # (3,), their sum is 1
    centres: Tensor  # (3, 2)
    widths: Tensor   # (3,): the standard deviation of each Gaussian


def make_mixture(weights: list[float]) -> Mixture:
    """Three round Gaussians, moved and scaled together to mean 0 and variance 1, as SD's latents are by the factor 0.18215."""
    if not (min(weights) > 0 and abs(sum(weights) - 1) < 1e-4):  # so put, NaN is refused too
        raise UserError(f"--weights {' '.join(map(str, weights))}: give three numbers greater than 0 whose sum is 1, such as 0.5 0.3 0.2")
    w, centres, widths = torch.tensor(weights), torch.tensor([[-1.6, -0.4], [2.0, -0.8], [1.0, 2.2]]), torch.tensor([0.40, 0.25, 0.30])
    centres = centres - w @ centres
    scale = (w @ (centres.square().mean(1) + widths**2)).sqrt()
    return Mixture(w, centres / scale, widths / scale)


def draw_data(mixture: Mixture, n: int) -> Tensor:
    """n points (n, 2)."""
    which = mixture.weights.multinomial(n, replacement=True)
    return mixture.centres[which] + mixture.widths[which, None] * torch.randn(n, 2)


def log_shares(mixture: Mixture, x: Tensor, sigma: float | Tensor) -> Tensor:
    """log of what each noised Gaussian adds to the density p_sigma at x (n, 2): (n, 3). sigma is a number, or one per point (n, 1)."""
    variance = mixture.widths**2 + sigma**2
    return mixture.weights.log() - (2 * math.pi * variance).log() - (x[:, None] - mixture.centres).square().sum(-1) / (2 * variance)


def score(mixture: Mixture, x: Tensor, sigma: float | Tensor) -> Tensor:
    """grad log p_sigma at x (n, 2): each Gaussian pulls with (centre - x) / (width^2 + sigma^2), as strongly as x is likely to be its."""
    pull = (mixture.centres - x[:, None]) / (mixture.widths**2 + sigma**2)[..., None]
    return (log_shares(mixture, x, sigma).softmax(1)[..., None] * pull).sum(1)


def exact_denoise(mixture: Mixture, x: Tensor, sigma: float) -> Tensor:
    """The best guess of x_0, in the form sampler.py wants it."""
    return x + sigma**2 * score(mixture, x, sigma)


# --- forward ---

def lecture_sigma(t: float) -> float:
    """Noise at time t in the lecture's code, where g(t) = 25^t for t from 0 to 1: sigma^2 = the integral of 25^(2t)."""
    return ((25 ** (2 * t) - 1) / (2 * math.log(25))) ** 0.5


def forward_sde(x: Tensor, steps: int) -> Tensor:
    """dx = 25^t dw from t = 0 to 1."""
    for i in range(steps):
        x = x + 25 ** ((i + 0.5) / steps) * steps**-0.5 * torch.randn_like(x)
    return x


def noising(mixture: Mixture, n: int) -> Image.Image:
    """A crowd at five noise levels, variance exploding and variance preserving: the same but for the scale."""
    x0, noise, rows, worst = draw_data(mixture, n), torch.randn(n, 2), [[], []], 0.0
    spread = (forward_sde(x0, steps=500) - x0).std()
    print(f"forward: 500 steps of dx = 25^t dw add noise of std {spread:.2f}; the integral says {lecture_sigma(1):.4f}, and one draw does it")
    for t in (0, 200, 400, 600, 999):
        sigma = float(SIGMAS[t])
        ve = x0 + sigma * noise
        vp = q_sample(x0[..., None, None], torch.full((n,), t), noise[..., None, None])[..., 0, 0]  # what the UNet would be fed
        worst = max(worst, float((vp - ve / (1 + sigma**2) ** 0.5).abs().max()))
        for pictures, x, span in ((rows[0], ve, 20), (rows[1], vp, 3.2)):
            pictures.append(crowd(Plot((-span, span), 164, f"t {t}   sigma {sigma:.2f}"), x[:400], nearest(mixture, x0[:400])))
    print(f"        x preserving = x exploding / sqrt(1 + sigma^2): largest difference {worst:.0e}")
    return sheet(rows, down=["exploding", "preserving"], side=180)


def nearest(mixture: Mixture, x: Tensor) -> Tensor:
    """Which Gaussian each point belongs to: (n,)."""
    return torch.cdist(x, mixture.centres).argmin(1)


def crowd(plot: Plot, x: Tensor, which: Tensor) -> Image.Image:
    for k, color in enumerate(("royalblue", "darkorange", "seagreen")):
        plot.points(x[which == k], color, r=1.5)
    return plot.image


# --- backward ---

def reverse_sde(denoise: Denoise, x: Tensor, sigmas: list[float], draw: Callable[[], Tensor]) -> Iterator[Step]:
    """Euler-Maruyama. g^2 dt is what sigma^2 loses in the step, so any clock g will do: it is in the sigmas."""
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised, lost = denoise(x, sigma), sigma**2 - sigma_next**2
        x = x + lost * (denoised - x) / sigma**2 + lost**0.5 * draw()
        yield Step(i, x, denoised)


def sample(sampler: Callable[..., Iterator[Step]], denoise: Denoise, sigmas: list[float], n: int) -> Tensor:
    """n points (n, 2) from pure noise, which starts as in sd.py with the variance of noise and data together."""
    *_, last = sampler(denoise, (sigmas[0]**2 + 1) ** 0.5 * torch.randn(n, 2), sigmas, lambda: torch.randn(n, 2))
    return last.x


def weights_and_widths(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the points that each Gaussian got (3,), and their standard deviation (3,)."""
    groups = [x[nearest(mixture, x) == k] for k in range(3)]
    return torch.tensor([len(g) / len(x) for g in groups]), torch.stack([(g - g.mean(0)).square().mean().sqrt() for g in groups])


def compare_samplers(mixture: Mixture, n: int, steps: int) -> None:
    """All ways back end in the same crowd."""
    fine, clock = karras(steps) + [0.0], [lecture_sigma(1 - i / steps) for i in range(steps + 1)]
    ways = {"reverse SDE, Euler-Maruyama": (reverse_sde, fine), "... on the lecture's clock, 25^t": (reverse_sde, clock),
            "ancestral (DDPM): eta 1": (partial(sample_ancestral, eta=1.0), fine), "ODE (DDIM, Euler): eta 0": (sample_ancestral, fine),
            "ODE, DPM-Solver++ 2M": (sample_dpmpp_2m, karras(20) + [0.0])}
    print(f"\n{f'{n} points drawn with the exact score':<44}steps   weight of each Gaussian   width of each")
    for name, (sampler, sigmas) in ways.items():
        weights, widths = weights_and_widths(mixture, sample(sampler, partial(exact_denoise, mixture), sigmas, n))
        print(f"{name:<44}{len(sigmas) - 1:>5}     {row(weights)}       {row(widths)}")
    error = (mixture.weights * (1 - mixture.weights) / n).sqrt()
    print(f"{'the data, and its sampling error':<54}{row(mixture.weights)}       {row(mixture.widths)}\n{'':<52}+-{row(error)}")


def row(values: Tensor) -> str:
    return "  ".join(f"{v:.3f}" for v in values.tolist())


def ddim(denoise: Denoise, x_t: Tensor, sigmas: list[float]) -> Tensor:
    """The ODE as DDIM's authors write it, variance preserving. Song et al. 2021 (DDIM), equation 12 without noise."""
    for abar, abar_next in ((1 / (1 + a**2), 1 / (1 + b**2)) for a, b in zip(sigmas, sigmas[1:])):
        x0 = denoise(x_t / abar**0.5, ((1 - abar) / abar) ** 0.5)
        eps = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
        x_t = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
    return x_t


def film(mixture: Mixture, n: int, steps: int, frames: int) -> list[Image.Image]:
    """The same noise taken back by the SDE and by the ODE, in the scale the UNet sees. Arrows: the score. Colours: where each will end."""
    sigmas, pages, denoise = karras(steps), [], partial(exact_denoise, mixture)
    start, arrows = (sigmas[0]**2 + 1) ** 0.5 * torch.randn(n, 2), 2.4 * grid(9)
    paths = [[start, *(step.x for step in sampler(denoise, start, sigmas, lambda: torch.randn(n, 2)))] for sampler in (reverse_sde, sample_ancestral)]
    for i in torch.linspace(0, steps - 1, frames).round().int().tolist():
        scale, pictures = (1 + sigmas[i]**2) ** 0.5, []
        for name, path in zip(("reverse SDE", "probability-flow ODE"), paths):
            plot = Plot((-2.6, 2.6), 240, f"{name}   sigma {sigmas[i]:.2f}")
            plot.arrows(arrows, score(mixture, arrows * scale, sigmas[i]), "silver", 13)
            pictures.append(crowd(plot, path[i] / scale, nearest(mixture, path[-1])))
        page = sheet([pictures], across=["colour: where it will end; noise decides", "colour: where it will end; the start decides"], side=256)
        pages.append(page.quantize(16, dither=Image.Dither.NONE))
    return pages


def grid(side: int) -> Tensor:
    """(side^2, 2) points of the square from -1 to 1, row by row from the top."""
    line = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(-line, line).flip(1)


# --- learning ---

def learn(mixture: Mixture, steps: int, sign: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Minimise ||eps + sign f||^2 over random points, times and noise, and yield the net f(x_t (n, 2), t (n,)) before each step."""
    torch.manual_seed(1)
    layers = nn.Sequential(nn.Linear(2 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
                           zero(nn.Linear(128, 2)))  # starts at zero, as the UNet does
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=steps)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return layers(torch.cat([x, timestep_embedding(t, 32)], dim=1))
    for _ in range(steps):
        yield f
        x, t, sigma, noise = noised(mixture, 256)
        loss = (noise + sign * f(x / (1 + sigma**2) ** 0.5, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    yield f


def noised(mixture: Mixture, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points x = x_0 + sigma eps (n, 2), their times t (n,) drawn evenly, sigma (n, 1) and eps (n, 2)."""
    t, noise = torch.randint(len(SIGMAS), (n,)), torch.randn(n, 2)
    sigma = SIGMAS.float()[t, None]
    return draw_data(mixture, n) + sigma * noise, t, sigma, noise


@torch.no_grad()
def fields(mixture: Mixture, denoise: Denoise) -> list[Image.Image]:
    """The score (D - x) / sigma^2 as arrows over the density p_sigma, at three sigmas."""
    pictures = []
    for sigma in (0.2, 0.7, 3.0):
        span = max(2.6, 2.2 * sigma)
        root = log_shares(mixture, span * grid(80), sigma).exp().sum(1).sqrt().reshape(80, 80)  # the root shows the tails
        plot, points = Plot((-span, span), 240), 0.93 * span * grid(13)
        plot.background(heat(root, low=0, high=1.5 * float(root.max())))
        plot.arrows(points, (denoise(points, sigma) - points) / sigma**2, "white", 16)
        pictures.append(plot.image.crop((0, 16, 240, 256)))
    return pictures


def watch_learning(mixture: Mixture, steps: int, n: int) -> Image.Image:
    """Compare the net with the exact answer, -sigma score, on points it never sees; then draw with it."""
    x, t, sigma, noise = noised(mixture, 50000)
    exact, rows = -sigma * score(mixture, x, sigma), {"exact": fields(mixture, partial(exact_denoise, mixture))}
    print(f"\n steps   loss ||eps - f||^2   error ||f exact - f||^2   (the exact score's loss: {(noise - exact).square().mean():.4f})")
    for step, f in enumerate(learn(mixture, steps, sign=-1)):
        if step in (0, 10, 30, 100, 300, 1000, steps):
            with torch.no_grad():
                answer = f(x / (1 + sigma**2) ** 0.5, t)
            error = (exact - answer).square().mean()
            print(f"{step:>6}   {(noise - answer).square().mean():18.4f}   {error:23.4f}")
            if step in (30, steps):
                rows[f"{step} steps"] = fields(mixture, denoiser(f, "eps"))
    with torch.no_grad():
        weights, widths = weights_and_widths(mixture, sample(sample_ancestral, denoiser(f, "eps"), karras(100) + [0.0], n))
    print(f"{n} points drawn with it: weights {row(weights)}, widths {row(widths)}")
    return sheet(list(rows.values()), across=["sigma 0.2", "sigma 0.7", "sigma 3"], down=list(rows), side=240).quantize(96)


def main(args):
    torch.set_num_threads(1)  # nets this small gain nothing from more
    torch.manual_seed(0)
    mixture = make_mixture(args.weights)
    n, steps, train_steps = (2000, 50, 60) if args.quick else (20000, 400, 3000)
    save(noising(mixture, n), args.out / "diffusion_forward.png")
    compare_samplers(mixture, n, steps)

    x, sigmas = 14 * torch.randn(1000, 2), karras(20)
    *_, last = sample_ancestral(partial(exact_denoise, mixture), x, sigmas, draw=None)
    x_t = ddim(partial(exact_denoise, mixture), x / (1 + sigmas[0]**2) ** 0.5, sigmas)
    difference = (x_t * (1 + sigmas[-1]**2) ** 0.5 - last.x).abs().max()
    print(f"DDIM on x_t (preserving) and the ODE on x (exploding) move a particle to the same place: largest difference {difference:.0e}")
    save_gif(film(mixture, 200, steps, frames=6 if args.quick else 26), args.out / "diffusion.gif")

    x, t, *_ = noised(mixture, 1000)
    *_, score_net = learn(mixture, train_steps // 10, sign=+1)
    *_, eps_net = learn(mixture, train_steps // 10, sign=-1)
    difference = (score_net(x, t) + eps_net(x, t)).abs().max()
    print(f"\nthe lecture's two losses, {train_steps // 10} steps each: f of one = -f of the other, largest difference {difference:.0e}")
    save(watch_learning(mixture, train_steps, n), args.out / "diffusion_field.png")


if __name__ == "__main__":
    run(main, __doc__, weights=dict(type=float, nargs=3, default=[0.5, 0.3, 0.2], help="of the three Gaussians (default 0.5 0.3 0.2)"))
