"""Chapter 1, diffusion in two dimensions: noise is added, and a network learns the way back.

The data is a mixture of three Gaussians, so all that a network has to learn is known exactly.
    forward      dx = g(t) dw                             p_sigma = p_data * N(0, sigma^2), where
                                                          sigma^2 is the integral of g^2
    reverse SDE  dx = -g^2 grad log p_sigma(x) dt + g dw  Song et al. 2021 (score SDE), eq. 6 and 9
    ODE          dx = -1/2 g^2 grad log p_sigma(x) dt     equation 13: the same distribution at
                                                          every sigma, without noise
    learning     min ||eps + f(x_0 + sigma eps, t)||^2    f = sigma grad log p_sigma: a denoiser
                                                          knows the score (Vincent 2011)
                 min ||eps - f(x_0 + sigma eps, t)||^2    f = -sigma grad log p_sigma: the loss of
                                                          Stable Diffusion (Ho et al. 2020, eq. 14)
sampler.py takes the same steps with latents of pictures. It works with the best guess of x_0, which
is D = x + sigma^2 grad log p_sigma(x).

    python lecture/diffusion.py
    python lecture/diffusion.py --weights 0.8 0.1 0.1
"""
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import torch
from draw import Plot, UserError, heat, run, save, save_gif, sheet
from PIL import Image
from torch import Tensor, nn

from model import timestep_embedding, zero_module
from sampler import (
    SIGMAS,
    Denoise,
    Noise,
    NoiseSchedule,
    Step,
    karras,
    make_denoiser,
    sample_dpmpp_2m,
    sample_euler,
)

COLORS = ("royalblue", "darkorange", "seagreen")  # of the three Gaussians


# --- the data, and its score at every noise level ---

class Mixture(NamedTuple):
    weights: Tensor  # (3,), their sum is 1
    centres: Tensor  # (3, 2)
    widths: Tensor   # (3,): the standard deviation of each Gaussian


def make_mixture(weights: list[float]) -> Mixture:
    """Three round Gaussians, moved and scaled to mean 0 and variance 1.

    The factor 0.18215 does the same to Stable Diffusion's latents.
    """
    # written so that NaN is refused too
    if not (min(weights) > 0 and abs(sum(weights) - 1) < 1e-4):
        raise UserError(f"--weights {' '.join(map(str, weights))}: give three numbers greater"
                        " than 0 whose sum is 1, such as 0.5 0.3 0.2")
    w = torch.tensor(weights)
    centres = torch.tensor([[-1.6, -0.4], [2.0, -0.8], [1.0, 2.2]])
    widths = torch.tensor([0.40, 0.25, 0.30])
    centres = centres - w @ centres
    scale = (w @ (centres.square().mean(1) + widths**2)).sqrt()
    return Mixture(w, centres / scale, widths / scale)


def draw_data(mixture: Mixture, n: int) -> Tensor:
    """n points (n, 2)."""
    which = mixture.weights.multinomial(n, replacement=True)
    return mixture.centres[which] + mixture.widths[which, None] * torch.randn(n, 2)


def log_shares(mixture: Mixture, x: Tensor, sigma: float | Tensor) -> Tensor:
    """log of each noised Gaussian's part of the density p_sigma at x (n, 2): (n, 3).

    sigma is a number, or one per point (n, 1).
    """
    variance = mixture.widths**2 + sigma**2
    squares = (x[:, None] - mixture.centres).square().sum(-1)
    return mixture.weights.log() - (2 * math.pi * variance).log() - squares / (2 * variance)


def score(mixture: Mixture, x: Tensor, sigma: float | Tensor) -> Tensor:
    """grad log p_sigma at x (n, 2).

    Each Gaussian pulls with (centre - x) / (width^2 + sigma^2), weighted by the probability that
    x belongs to it.
    """
    variance = mixture.widths**2 + sigma**2
    pull = (mixture.centres - x[:, None]) / variance[..., None]
    return (log_shares(mixture, x, sigma).softmax(1)[..., None] * pull).sum(1)


def exact_denoise(mixture: Mixture, x: Tensor, sigma: float) -> Tensor:
    """The best guess of x_0, as the samplers of sampler.py take it."""
    return x + sigma**2 * score(mixture, x, sigma)


# --- forward ---

def lecture_sigma(t: float) -> float:
    """The noise at time t of the lecture's code, where g(t) = 25^t for t from 0 to 1.

    sigma^2 is the integral of 25^(2t).
    """
    return ((25 ** (2 * t) - 1) / (2 * math.log(25))) ** 0.5


def forward_sde(x: Tensor, steps: int) -> Tensor:
    """dx = 25^t dw from t = 0 to 1."""
    for i in range(steps):
        x = x + 25 ** ((i + 0.5) / steps) * steps**-0.5 * torch.randn_like(x)
    return x


def noising(mixture: Mixture, n: int) -> Image.Image:
    """The points at five noise levels, variance exploding and variance preserving.

    The two differ in scale only.
    """
    x0, noise = draw_data(mixture, n), torch.randn(n, 2)
    spread = (forward_sde(x0, steps=500) - x0).std()
    print(f"forward: 500 steps of dx = 25^t dw add noise of std {spread:.2f}; the integral gives"
          f" {lecture_sigma(1):.4f}, and one draw does the same")
    schedule, rows, worst = NoiseSchedule("eps"), [[], []], 0.0
    which = nearest(mixture, x0[:400])
    for t in (0, 200, 400, 600, 999):
        sigma = float(SIGMAS[t])
        ve = x0 + sigma * noise
        times = torch.full((n,), t)
        vp = schedule.q_sample(x0[..., None, None], times, noise[..., None, None])[..., 0, 0]
        worst = max(worst, float((vp - ve / (1 + sigma**2) ** 0.5).abs().max()))
        title = f"t {t}   sigma {sigma:.2f}"
        rows[0].append(draw_points(Plot((-20, 20), 164, title), ve[:400], which))
        rows[1].append(draw_points(Plot((-3.2, 3.2), 164, title), vp[:400], which))
    print("        x preserving = x exploding / sqrt(1 + sigma^2): largest difference"
          f" {worst:.0e}")
    return sheet(rows, down=["exploding", "preserving"], side=180)


def nearest(mixture: Mixture, x: Tensor) -> Tensor:
    """The number of the Gaussian that each point is nearest to: (n,)."""
    return torch.cdist(x, mixture.centres).argmin(1)


def draw_points(plot: Plot, x: Tensor, which: Tensor) -> Image.Image:
    for k, color in enumerate(COLORS):
        plot.points(x[which == k], color, r=1.5)
    return plot.image


# --- backward ---

def reverse_sde(denoise: Denoise, x: Tensor, sigmas: list[float],
                noise: Noise) -> Iterator[Step]:
    """Euler-Maruyama steps of the reverse SDE.

    g^2 dt is the part of sigma^2 that the step removes. So the sigmas hold all that g says.
    """
    for i, (sigma, sigma_next) in enumerate(zip(sigmas, sigmas[1:])):
        denoised, removed = denoise(x, sigma), sigma**2 - sigma_next**2
        x = x + removed * (denoised - x) / sigma**2 + removed**0.5 * noise()
        yield Step(i, x, denoised)


def sample(sampler: Callable[..., Iterator[Step]], denoise: Denoise, sigmas: list[float],
           n: int) -> Tensor:
    """n points (n, 2) from pure noise. As in sd.py it has the variance of data plus noise."""
    start = (sigmas[0] ** 2 + 1) ** 0.5 * torch.randn(n, 2)
    *_, last = sampler(denoise, start, sigmas, lambda: torch.randn(n, 2))
    return last.x


def weights_and_widths(mixture: Mixture, x: Tensor) -> tuple[Tensor, Tensor]:
    """The share of the points at each Gaussian (3,), and their standard deviation (3,)."""
    groups = [x[nearest(mixture, x) == k] for k in range(3)]
    shares = torch.tensor([len(group) / len(x) for group in groups])
    widths = torch.stack([(g - g.mean(0)).square().mean().sqrt() for g in groups])
    return shares, widths


def compare_samplers(mixture: Mixture, n: int, steps: int) -> None:
    """All ways back end in the same distribution."""
    fine = karras(steps, SIGMAS) + [0.0]
    clock = [lecture_sigma(1 - i / steps) for i in range(steps + 1)]
    ways = {
        "reverse SDE, Euler-Maruyama": (reverse_sde, fine),
        "... with the lecture's g(t) = 25^t": (reverse_sde, clock),
        "ancestral (DDPM): eta 1": (partial(sample_euler, eta=1.0), fine),
        "ODE (DDIM, Euler): eta 0": (sample_euler, fine),
        "ODE, DPM-Solver++ 2M": (sample_dpmpp_2m, karras(20, SIGMAS) + [0.0]),
    }
    print(f"\n{f'{n} points drawn with the exact score':<44}steps   weight of each Gaussian"
          "   width of each")
    denoise = partial(exact_denoise, mixture)
    for name, (sampler, sigmas) in ways.items():
        weights, widths = weights_and_widths(mixture, sample(sampler, denoise, sigmas, n))
        print(f"{name:<44}{len(sigmas) - 1:>5}     {row(weights)}       {row(widths)}")
    error = (mixture.weights * (1 - mixture.weights) / n).sqrt()
    print(f"{'the data, and its sampling error':<54}{row(mixture.weights)}"
          f"       {row(mixture.widths)}\n{'':<52}+-{row(error)}")


def row(values: Tensor) -> str:
    return "  ".join(f"{v:.3f}" for v in values.tolist())


def ddim(denoise: Denoise, x_t: Tensor, sigmas: list[float]) -> Tensor:
    """The ODE as DDIM's authors write it, variance preserving.

    Song et al. 2021 (DDIM), equation 12 without noise.
    """
    abars = [1 / (1 + sigma**2) for sigma in sigmas]
    for abar, abar_next in zip(abars, abars[1:]):
        x0 = denoise(x_t / abar**0.5, ((1 - abar) / abar) ** 0.5)
        eps = (x_t - abar**0.5 * x0) / (1 - abar) ** 0.5
        x_t = abar_next**0.5 * x0 + (1 - abar_next) ** 0.5 * eps
    return x_t


def compare_with_ddim(mixture: Mixture) -> None:
    """DDIM, variance preserving, and the Euler steps of sampler.py are the same steps."""
    denoise, sigmas = partial(exact_denoise, mixture), karras(20, SIGMAS)
    x = 14 * torch.randn(1000, 2)
    *_, last = sample_euler(denoise, x, sigmas, noise=None)
    x_t = ddim(denoise, x / (1 + sigmas[0] ** 2) ** 0.5, sigmas)
    difference = (x_t * (1 + sigmas[-1] ** 2) ** 0.5 - last.x).abs().max()
    print("DDIM on x_t (preserving) and the ODE on x (exploding) move a point to the same place:"
          f" largest difference {difference:.0e}")


def film(mixture: Mixture, n: int, steps: int, frames: int) -> list[Image.Image]:
    """The same noise, taken back by the SDE and by the ODE, scaled as the UNet's input is.

    The arrows are the score. A point's colour is the Gaussian where it will end.
    """
    sigmas, denoise = karras(steps, SIGMAS), partial(exact_denoise, mixture)
    start = (sigmas[0] ** 2 + 1) ** 0.5 * torch.randn(n, 2)
    paths = []
    for sampler in (reverse_sde, sample_euler):
        run_ = sampler(denoise, start, sigmas, lambda: torch.randn(n, 2))
        paths.append([start, *(step.x for step in run_)])
    names = ("reverse SDE", "probability-flow ODE")
    titles = ["colour: where it will end; noise decides",
              "colour: where it will end; the start decides"]
    arrows, pages = 2.4 * square_grid(9), []
    for i in torch.linspace(0, steps - 1, frames).round().int().tolist():
        scale, pictures = (1 + sigmas[i] ** 2) ** 0.5, []
        for name, path in zip(names, paths):
            plot = Plot((-2.6, 2.6), 240, f"{name}   sigma {sigmas[i]:.2f}")
            plot.arrows(arrows, score(mixture, arrows * scale, sigmas[i]), "silver", 13)
            pictures.append(draw_points(plot, path[i] / scale, nearest(mixture, path[-1])))
        page = sheet([pictures], across=titles, side=256)
        pages.append(page.quantize(16, dither=Image.Dither.NONE))
    return pages


def square_grid(side: int) -> Tensor:
    """(side^2, 2) points of the square from -1 to 1, row by row from the top."""
    line = torch.linspace(-1, 1, side)
    return torch.cartesian_prod(-line, line).flip(1)


# --- learning ---

def learn(mixture: Mixture, steps: int, sign: int) -> Iterator[Callable[[Tensor, Tensor], Tensor]]:
    """Minimise ||eps + sign f||^2 over random points, times and noise.

    Yields the network f(x_t (n, 2), t (n,)) before each step, and at the end.
    """
    torch.manual_seed(1)
    layers = nn.Sequential(
        nn.Linear(2 + 32, 128), nn.SiLU(), nn.Linear(128, 128), nn.SiLU(),
        nn.Linear(128, 128), nn.SiLU(),
        zero_module(nn.Linear(128, 2)))  # starts at zero, as the UNet does
    optimizer = torch.optim.Adam(layers.parameters(), lr=2e-3)
    rate = torch.optim.lr_scheduler.LinearLR(optimizer, 1, 0.02, total_iters=steps)

    def f(x: Tensor, t: Tensor) -> Tensor:
        return layers(torch.cat([x, timestep_embedding(t, 32)], dim=1))

    for _ in range(steps):
        yield f
        x, t, sigma, noise = noised(mixture, 256)
        loss = (noise + sign * f(x / (1 + sigma**2) ** 0.5, t)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    yield f


def noised(mixture: Mixture, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Points x = x_0 + sigma eps (n, 2), their uniform times t (n,), sigma (n, 1), eps (n, 2)."""
    t, noise = torch.randint(len(SIGMAS), (n,)), torch.randn(n, 2)
    sigma = SIGMAS.float()[t, None]
    return draw_data(mixture, n) + sigma * noise, t, sigma, noise


@torch.no_grad()
def fields(mixture: Mixture, denoise: Denoise) -> list[Image.Image]:
    """The score (D - x) / sigma^2 as arrows over the density p_sigma, at three sigmas."""
    pictures = []
    for sigma in (0.2, 0.7, 3.0):
        span = max(2.6, 2.2 * sigma)
        density = log_shares(mixture, span * square_grid(80), sigma).exp().sum(1)
        root = density.sqrt().reshape(80, 80)  # the root shows the tails
        plot, points = Plot((-span, span), 240), 0.93 * span * square_grid(13)
        plot.background(heat(root, low=0, high=1.5 * float(root.max())))
        plot.arrows(points, (denoise(points, sigma) - points) / sigma**2, "white", 16)
        pictures.append(plot.image.crop((0, 16, 240, 256)))
    return pictures


def compare_losses(mixture: Mixture, steps: int) -> None:
    """The loss with a plus and the loss with a minus train the same network up to its sign."""
    x, t, *_ = noised(mixture, 1000)
    *_, score_net = learn(mixture, steps, sign=+1)
    *_, eps_net = learn(mixture, steps, sign=-1)
    difference = (score_net(x, t) + eps_net(x, t)).abs().max()
    print(f"\nthe lecture's two losses, {steps} steps each: f of one = -f of the other, largest"
          f" difference {difference:.0e}")


def watch_learning(mixture: Mixture, steps: int, n: int) -> Image.Image:
    """Compare the network with the exact answer, -sigma score, on new points; then draw with it."""
    x, t, sigma, noise = noised(mixture, 50000)
    exact, schedule = -sigma * score(mixture, x, sigma), NoiseSchedule("eps")
    rows = {"exact": fields(mixture, partial(exact_denoise, mixture))}
    print("\n steps   loss ||eps - f||^2   error ||f exact - f||^2   (the exact score's loss:"
          f" {(noise - exact).square().mean():.4f})")
    for step, f in enumerate(learn(mixture, steps, sign=-1)):
        if step in (0, 10, 30, 100, 300, 1000, steps):
            with torch.no_grad():
                answer = f(x / (1 + sigma**2) ** 0.5, t)
            error = (exact - answer).square().mean()
            print(f"{step:>6}   {(noise - answer).square().mean():18.4f}   {error:23.4f}")
            if step in (30, steps):
                rows[f"{step} steps"] = fields(mixture, make_denoiser(f, schedule))
    with torch.no_grad():
        points = sample(sample_euler, make_denoiser(f, schedule), karras(100, SIGMAS) + [0.0], n)
    weights, widths = weights_and_widths(mixture, points)
    print(f"{n} points drawn with it: weights {row(weights)}, widths {row(widths)}")
    page = sheet(list(rows.values()), across=["sigma 0.2", "sigma 0.7", "sigma 3"],
                 down=list(rows), side=240)
    return page.quantize(96)


def main(args) -> None:
    torch.set_num_threads(1)  # networks this small gain nothing from more
    torch.manual_seed(0)
    mixture = make_mixture(args.weights)
    n, steps, train_steps = (2000, 50, 60) if args.quick else (20000, 400, 3000)
    save(noising(mixture, n), args.out / "diffusion_forward.png")
    compare_samplers(mixture, n, steps)
    compare_with_ddim(mixture)
    frames = film(mixture, 200, steps, frames=6 if args.quick else 26)
    save_gif(frames, args.out / "diffusion.gif")
    compare_losses(mixture, train_steps // 10)
    save(watch_learning(mixture, train_steps, n), args.out / "diffusion_field.png")


if __name__ == "__main__":
    run(main, __doc__, weights=dict(
        type=float, nargs=3, default=[0.5, 0.3, 0.2],
        help="of the three Gaussians (default 0.5 0.3 0.2)"))
