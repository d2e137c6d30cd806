"""Chapter 7, the process, visualised: how a picture comes out of noise, and what steps, guidance, text, noise and a first picture do to it.

The lecture's slides: the film of a generation, fewer steps, img2img, the video between two prompts. What is looked at:
    x_t      the noisy latent, sqrt(abar) x_0 + sqrt(1 - abar) eps                          Ho et al. 2020 (DDPM), equation 4
    x0-hat   the guess of x_0 in it; each step walks towards it                             Song et al. 2021 (DDIM), equation 9
    guided   x0-hat = uncond + s (cond - uncond)                                            Ho & Salimans 2022, equation 6
    slerp    (sin((1-u) w) a + sin(u w) b) / sin w, w the angle between noises a and b      Shoemake 1985
    img2img  the start is x_t of a given picture, as noisy as the strength says             Meng et al. 2022 (SDEdit), algorithm 2

    python lecture/process.py
    python lecture/process.py --prompt "cat face" --to "dog face" --init my_picture.png
    python lecture/process.py --ckpt v1-5-pruned-emaonly.safetensors --prompt "a castle" --to "a sand castle"
"""
import math
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from draw import UserError, run, save, save_gif, sheet
from sampler import SAMPLERS, SPACINGS, Step, denoiser, mixed, sample_dpmpp_2m, schedule, sigma_to_t
from sd import StableDiffusion, on_white, read_image


# --- one generation, looked into ---

def noise_of(sd: StableDiffusion, seed: int) -> Tensor:
    """What the seed stands for: standard normal noise (1, Z, h, w), drawn as sd.generate draws it."""
    side = sd.config.size // sd.config.vae.downsampling
    return torch.randn(sd.config.vae.z_channels, side, side, generator=torch.Generator().manual_seed(seed))[None].to(sd.device)


def sigmas_of(steps: int, prediction: str) -> list[float]:
    """The noise levels of `walk`, falling to 0."""
    return schedule("dpmpp_2m", steps, prediction=prediction)


def told(sd: StableDiffusion, prompt: str, guidance: float | None = None) -> list[tuple[float, dict[str, Tensor]]]:
    """What the UNet is told: with weight 1 - guidance no text, with weight guidance the prompt. Their weighted guesses add up to the guided one."""
    return sd.told([prompt], "", sd.config.guidance if guidance is None else guidance, sd.config.size, sd.config.size)


@torch.no_grad()
def walk(sd: StableDiffusion, weighted: list[tuple[float, dict[str, Tensor]]], noise: Tensor, steps: int) -> Iterator[Step]:
    """The whole process, from what is told and a noise, both of which may be made by hand: DPM-Solver++ 2M, as sd.generate runs it."""
    sigmas = sigmas_of(steps, sd.config.prediction)
    x = noise * (sigmas[0] ** 2 + 1) ** 0.5
    yield from sample_dpmpp_2m(mixed(denoiser(sd.unet, sd.config.prediction), weighted), x, sigmas, draw=lambda: torch.empty(0))


def film(sd: StableDiffusion, prompt: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """x_t (steps + 1, Z, h, w), from pure noise to the output, and the guess of x_0 in each; the last guess is the output."""
    noise = noise_of(sd, seed)
    path = list(walk(sd, told(sd, prompt), noise, steps))
    held = [noise] + [step.x / (sigma**2 + 1) ** 0.5 for step, sigma in zip(path, sigmas_of(steps, sd.config.prediction)[1:])]  # variance preserving
    return torch.cat(held), torch.cat([step.denoised for step in path] + [path[-1].x])


def fit_sketch(z: Tensor, rgb: Tensor) -> tuple[Tensor, float]:
    """The linear map (Z + 1, 3) that best makes colours (N, 3, h, w) of latents (N, Z, h, w), and the share of the variance it explains."""
    A, b = with_one(z), rgb.movedim(1, -1).flatten(0, 2)
    M = torch.linalg.lstsq(A, b).solution
    return M, float(1 - (A @ M - b).square().sum() / (b - b.mean(0)).square().sum())


def with_one(z: Tensor) -> Tensor:
    """(N, Z, h, w) -> (N h w, Z + 1): latent vectors, with a 1 for the constant."""
    return F.pad(z.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)


def sketch(z: Tensor, M: Tensor) -> list[Image.Image]:
    """Latents as pictures of their own size, without the decoder."""
    rgb = (with_one(z) @ M).clamp(0, 255).round().byte().view(len(z), *z.shape[2:], 3)
    return [Image.fromarray(one) for one in rgb.cpu().numpy()]


def show_film(args: Namespace, sd: StableDiffusion, steps: int) -> None:
    """process.gif and process.png: x_t and x0-hat, decoded and as sketches."""
    held, guess = film(sd, args.prompt, steps, args.seed)
    decoded = {"x_t": sd.decode_latents(held), "x0-hat": sd.decode_latents(guess)}
    colors = torch.stack([torch.from_numpy(np.array(p)).permute(2, 0, 1).float() for p in decoded["x0-hat"]]).to(sd.device)
    M, explained = fit_sketch(guess, F.adaptive_avg_pool2d(colors, guess.shape[2:]))
    rows = {"x_t, decoded": decoded["x_t"], "x_t, sketch": sketch(held, M), "x0-hat, decoded": decoded["x0-hat"], "x0-hat, sketch": sketch(guess, M)}
    sigmas = sigmas_of(steps, sd.config.prediction)
    times = [sigma_to_t(sigma, sd.config.prediction) if sigma else 0 for sigma in sigmas]

    print(f'"{args.prompt}" in {steps} steps. How far, on average, pixels are from those of the finished picture (of 255):')
    shown = sorted(set(np.linspace(0, steps, min(8, steps + 1)).round().astype(int).tolist()))
    for i in shown:
        print(f"  t {times[i]:5.0f}, sigma {sigmas[i]:5.2f}: x_t {distance(decoded['x_t'][i], decoded['x_t'][-1]):5.1f}, "
              f"x0-hat {distance(decoded['x0-hat'][i], decoded['x_t'][-1]):5.1f}")
    print(f"  The sketch is {M.shape[0] - 1} latent channels times a matrix: it explains {explained:.0%} of the decoded guesses' colours.")

    frames = []
    for i in sorted(set(np.linspace(0, steps, min(11, steps + 1)).round().astype(int).tolist())):  # of more steps, eleven: the file grows with each
        page = sheet([[decoded["x_t"][i], decoded["x0-hat"][i]], [rows["x_t, sketch"][i], rows["x0-hat, sketch"][i]]],
                     ["x_t, what is held", "x0-hat, the guess in it"], ["decoded", "sketch"], side=128)
        frame = Image.new("RGB", (page.width, page.height + 22), "white")
        frame.paste(page, (0, 22))
        when = f"t = {times[i]:.0f}" if i < steps else "done"
        ImageDraw.Draw(frame).text((frame.width // 2, 4), f'"{args.prompt}", {when}', "black", anchor="ma", font_size=12)
        frames.append(frame)
    save_gif(frames, args.out / "process.gif", seconds=0.4, colors=96)
    save(sheet([[row[i] for i in shown] for row in rows.values()], [f"t = {times[i]:.0f}" for i in shown[:-1]] + ["done"], list(rows)), args.out / "process.png")


def distance(a: Image.Image, b: Image.Image) -> float:
    """The mean difference of two pictures, in gray levels of 255."""
    return float(np.abs(np.asarray(a.convert("RGB"), dtype=float) - np.asarray(b.convert("RGB"), dtype=float)).mean())


# --- what the settings do ---

def show_samplers(args: Namespace, sd: StableDiffusion, steps: tuple[int, ...]) -> None:
    """Every sampler at every number of steps, each with its usual spacing of them."""
    rows = {name: [sd.generate(args.prompt, steps=n, sampler=name, seed=args.seed)[0] for n in steps] for name in SAMPLERS}
    best = rows["dpmpp_2m"][-1]
    print(f"\nSamplers: how far the picture is from that of dpmpp_2m in {steps[-1]} steps, and where on the way a single step is made:")
    print("  steps   " + "".join(f"{n:7}" for n in steps))
    for name, row in rows.items():
        spacing = SAMPLERS[name].spacing
        print(f"  {name:8}" + "".join(f"{distance(picture, best):7.1f}" for picture in row) + f"   {spacing:8} t = {sigma_to_t(SPACINGS[spacing](1)[0]):.0f}")
    print("  ddim, euler and dpmpp_2m solve one equation, so that with more steps they meet; the others put noise back and end elsewhere.")
    print("  A single 'leading' step is made at t = 1, where the network is told that the noise it sees is a picture almost done.")
    print("  lcm belongs to models distilled for it, which guess the whole picture in one step.")
    save(sheet(list(rows.values()), [f"{n} steps" if n > 1 else "1 step" for n in steps], list(rows)), args.out / "process-samplers.png")


def show_guidance(args: Namespace, sd: StableDiffusion, scales: tuple[float, ...], steps: int) -> None:
    """0 is the picture of no text, 1 that of the model's own guess, more goes beyond what the model believes."""
    columns = [sd.generate(args.prompt, guidance=s, steps=steps, seed=args.seed, batch=3) for s in scales]
    print("\nGuidance: spread of the pictures' values, and the share of them cut off at black or white:")
    for s, column in zip(scales, columns):
        a = np.stack([np.asarray(picture) for picture in column])
        print(f"  {s:4}: {a.std():4.0f}, {np.isin(a, (0, 255)).mean():.0%}")
    save(sheet([list(row) for row in zip(*columns)], [f"guidance {s}" for s in scales], [f"seed {args.seed + i}" for i in range(3)]),
         args.out / "process-guidance.png")


# --- between two pictures, and from one ---

def slerp(a: Tensor, b: Tensor, u: float) -> Tensor:
    """From a (u = 0) to b (u = 1) on the arc between them: halfway noises are as strong as noise is; those of a straight line are not."""
    w = math.acos(F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0).clamp(-1, 1))
    if math.sin(w) < 1e-4:  # one direction: no arc
        return torch.lerp(a, b, u)
    return math.sin((1 - u) * w) / math.sin(w) * a + math.sin(u * w) / math.sin(w) * b


def between(sd: StableDiffusion, prompts: tuple[str, str], seeds: tuple[int, int], us: list[float], steps: int) -> list[Image.Image]:
    """A picture for each u: noise on the arc, what is told on the straight line. u = 0 and 1 are the pictures of sd.generate."""
    (one, two), (noise, noise_to) = [told(sd, prompt) for prompt in prompts], [noise_of(sd, seed) for seed in seeds]
    pictures = []
    for u in us:  # one by one: in a batch the CPU rounds otherwise, and the ends would differ from the stills by a gray level
        weighted = [(weight, {name: torch.lerp(a[name], b[name], u) for name in a}) for (weight, a), (_, b) in zip(one, two)]
        *_, last = walk(sd, weighted, slerp(noise, noise_to, u), steps)
        pictures += sd.decode_latents(last.x)
    return pictures


def show_between(args: Namespace, sd: StableDiffusion, count: int, steps: int) -> None:
    """A film from one prompt and seed to another, and back."""
    seeds = args.seed, args.seed + 1
    us = [i / (count - 1) for i in range(count)]
    pictures = between(sd, (args.prompt, args.to), seeds, us, steps)
    a, b = (noise_of(sd, seed) for seed in seeds)
    print(f'\nFrom "{args.prompt}", seed {seeds[0]}, to "{args.to}", seed {seeds[1]}. Halfway the noise has a spread of {slerp(a, b, 0.5).std():.2f} '
          f"on the arc, {torch.lerp(a, b, 0.5).std():.2f} on a straight line.")
    print("  From picture to picture: " + " ".join(f"{distance(p, q):.0f}" for p, q in zip(pictures, pictures[1:])) + " gray levels")
    frames = [sheet([[picture]], [f"{1 - u:.0%} {args.prompt}, {u:.0%} {args.to}"], side=192) for u, picture in zip(us, pictures)]
    save_gif([frames[0]] * 3 + frames + [frames[-1]] * 3 + frames[-2:0:-1], args.out / "process-between.gif", seconds=0.15, colors=96)


def ball() -> Image.Image:
    """A first picture: a blue ball with a stem."""
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    pen.line((128, 80, 150, 20), fill="saddlebrown", width=14)
    pen.ellipse((40, 60, 216, 236), fill="royalblue")
    return image


def show_img2img(args: Namespace, sd: StableDiffusion, first: Image.Image, strengths: tuple[float, ...], steps: int) -> None:
    """The more noise the first picture gets, the less of it is left; at strength 1 nothing is."""
    rows, names = [], []
    print(f"\nimg2img, {steps} steps; how far the picture is from the first one:")
    for guidance in 1.0, sd.config.guidance:
        row = [sd.generate(args.prompt, guidance=guidance, steps=steps, seed=args.seed, init=first, strength=s)[0] for s in strengths]
        print(f"  guidance {guidance}: " + ", ".join(f"strength {s}: {distance(picture, first):.0f}" for s, picture in zip(strengths, row)))
        rows.append([first, *row])
        names.append(f"guidance {guidance}")
    save(sheet(rows, ["first picture", *(f"strength {s}" for s in strengths)], names), args.out / "process-img2img.png")


def main(args: Namespace) -> None:
    first = ball() if args.init is None else on_white(read_image(args.init))
    sd = StableDiffusion.load(args.ckpt)
    if sd.sees != "noise":
        raise UserError(f"{args.ckpt} is a model for inpainting or instructions, which sees a {sd.sees} beside the noise: give one that draws from text alone")
    size, steps, quick = sd.config.size, sd.config.steps, args.quick
    show_film(args, sd, 3 if quick else steps)
    show_samplers(args, sd, (1, 2) if quick else (1, 2, 4, 8, 20, 50))
    show_guidance(args, sd, (0, 4) if quick else (0, 1, 2, 4, 8, 16), 1 if quick else steps // 2)
    show_between(args, sd, 3 if quick else 13, 2 if quick else steps // 2)
    first = ImageOps.fit(first, (size, size), Image.Resampling.LANCZOS)
    show_img2img(args, sd, first, (0.5, 1) if quick else (0.2, 0.4, 0.6, 0.8, 1), 2 if quick else steps // 2)


if __name__ == "__main__":
    run(main, __doc__, ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"},
        prompt={"default": "a red apple"}, to={"default": "a rocket", "help": "the prompt at the other end of the film"},
        seed={"type": int, "default": 0}, init={"metavar": "IMG", "help": "the first picture of img2img; default: a ball"})
