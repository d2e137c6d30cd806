"""Chapter 7, the process: how a picture comes out of noise, and what each setting does to it.

The lecture's slides: the film of a generation, fewer steps, img2img, the video between two prompts.
    x_t      the noisy latent, sqrt(abar) x_0 + sqrt(1 - abar) eps    Ho et al. 2020 (DDPM), eq. 4
    x0-hat   the guess of x_0 in it; each step goes towards it        Song et al. 2021 (DDIM), eq. 9
    cfg      x0-hat = uncond + s (cond - uncond)                      Ho & Salimans 2022, eq. 6
    slerp    (sin((1-u) w) a + sin(u w) b) / sin w                    Shoemake 1985; w is the angle
                                                                      between the noises a and b
    img2img  the start is x_t of a given picture, as noisy as the     Meng et al. 2022 (SDEdit),
             strength says                                            algorithm 2

process.html is the same as a page to play with: each step, each word, both guesses of guidance.

    python lecture/process.py
    python lecture/process.py --prompt "cat face" --to "dog face" --init my_picture.png
    python lecture/process.py --ckpt v1-5-pruned-emaonly.safetensors --prompt "a castle" \\
        --to "a sand castle"
"""
import math
from argparse import Namespace
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F
from draw import UserError, run, save, save_gif, sheet
from PIL import Image, ImageDraw, ImageOps
from torch import Tensor

from extras.edit import concat_kind, img2img
from extras.files import on_white, read_image
from extras.report import report
from sampler import (
    SAMPLERS,
    SPACINGS,
    Cond,
    NoiseSchedule,
    Step,
    cfg,
    get_sigmas,
    make_denoiser,
    sample_dpmpp_2m,
)
from sd import StableDiffusion

# --- one generation, step by step ---

def noise_of(sd: StableDiffusion, seed: int) -> Tensor:
    """The noise (1, Z, h, w) that the seed stands for, as sd.generate draws it."""
    return sd.noise_sampler(seed, 1, sd.preset.size, sd.preset.size)()


def sigmas_of(steps: int, schedule: NoiseSchedule) -> list[float]:
    """The noise levels of `walk`, falling to 0."""
    return get_sigmas("dpmpp_2m", steps, schedule)


def condition(sd: StableDiffusion, prompt: str) -> tuple[Cond, Cond]:
    """cond and uncond: what the UNet gets for the prompt, and for no text."""
    return sd.encode_both([prompt], "", sd.preset.size, sd.preset.size)


@torch.no_grad()
def walk(sd: StableDiffusion, cond: Cond, uncond: Cond, guidance: float, noise: Tensor,
         steps: int) -> Iterator[Step]:
    """The whole process from conditions and a noise, both of which may be made by hand.

    It is DPM-Solver++ 2M, as sd.generate runs it.
    """
    sigmas = sigmas_of(steps, sd.schedule)
    x = noise / sd.schedule.prediction.c_in(sigmas[0])
    denoise = cfg(make_denoiser(sd.unet, sd.schedule), cond, uncond, guidance)
    yield from sample_dpmpp_2m(denoise, x, sigmas, noise=None)


def film(sd: StableDiffusion, prompt: str, steps: int, seed: int) -> tuple[Tensor, Tensor]:
    """x_t (steps + 1, Z, h, w), from noise to the output, and the guess of x_0 in each.

    The last guess is the output.
    """
    noise = noise_of(sd, seed)
    path = list(walk(sd, *condition(sd, prompt), sd.preset.guidance, noise, steps))
    sigmas = sigmas_of(steps, sd.schedule)[1:]
    x_t = [noise] + [step.x / (sigma**2 + 1) ** 0.5 for step, sigma in zip(path, sigmas)]
    return torch.cat(x_t), torch.cat([step.denoised for step in path] + [path[-1].x])


def fit_sketch(z: Tensor, rgb: Tensor) -> tuple[Tensor, float]:
    """The best linear map (Z + 1, 3) from latents (N, Z, h, w) to colours (N, 3, h, w).

    Also returns the share of the colours' variance that it explains.
    """
    a, b = with_one(z), rgb.movedim(1, -1).flatten(0, 2)
    matrix = torch.linalg.lstsq(a, b).solution
    error = (a @ matrix - b).square().sum() / (b - b.mean(0)).square().sum()
    return matrix, float(1 - error)


def with_one(z: Tensor) -> Tensor:
    """(N, Z, h, w) -> (N h w, Z + 1): the latent vectors, with a 1 for the constant."""
    return F.pad(z.movedim(1, -1).flatten(0, 2), (0, 1), value=1.0)


def sketch(z: Tensor, matrix: Tensor) -> list[Image.Image]:
    """Latents as pictures of their own size, without the decoder."""
    rgb = (with_one(z) @ matrix).clamp(0, 255).round().byte().view(len(z), *z.shape[2:], 3)
    return [Image.fromarray(one) for one in rgb.cpu().numpy()]


def show_film(args: Namespace, sd: StableDiffusion, steps: int) -> None:
    """process.gif and process.png: x_t and x0-hat, decoded and as sketches."""
    x_t, guess = film(sd, args.prompt, steps, args.seed)
    decoded, decoded_guess = sd.decode_latents(x_t), sd.decode_latents(guess)
    colors = torch.from_numpy(np.stack([np.array(p) for p in decoded_guess])).to(sd.device)
    colors = colors.permute(0, 3, 1, 2).float()                         # 'n h w c -> n c h w'
    matrix, explained = fit_sketch(guess, F.adaptive_avg_pool2d(colors, guess.shape[2:]))
    rows = {"x_t, decoded": decoded, "x_t, sketch": sketch(x_t, matrix),
            "x0-hat, decoded": decoded_guess, "x0-hat, sketch": sketch(guess, matrix)}
    sigmas = sigmas_of(steps, sd.schedule)
    times = [sd.schedule.sigma_to_t(sigma) if sigma > 0 else 0 for sigma in sigmas]

    print(f'"{args.prompt}" in {steps} steps. The mean difference of the pixels to the finished'
          " picture (of 255):")
    shown = spread(steps, 8)
    for i in shown:
        print(f"  t {times[i]:5.0f}, sigma {sigmas[i]:5.2f}:"
              f" x_t {distance(decoded[i], decoded[-1]):5.1f},"
              f" x0-hat {distance(decoded_guess[i], decoded[-1]):5.1f}")
    print(f"  The sketch is {len(matrix) - 1} latent channels times a matrix: it explains"
          f" {explained:.0%} of the colours of the decoded guesses.")

    frames = [film_frame({name: row[i] for name, row in rows.items()}, args.prompt,
                         f"t = {times[i]:.0f}" if i < steps else "done")
              for i in spread(steps, 11)]  # the file grows with each frame
    save_gif(frames, args.out / "process.gif", seconds=0.4, colors=96)
    titles = [f"t = {times[i]:.0f}" for i in shown[:-1]] + ["done"]
    page = sheet([[row[i] for i in shown] for row in rows.values()], titles, list(rows))
    save(page, args.out / "process.png")


def spread(last: int, most: int) -> list[int]:
    """At most `most` whole numbers, evenly from 0 to `last`."""
    return sorted(set(np.linspace(0, last, min(most, last + 1)).round().astype(int).tolist()))


def film_frame(pictures: dict[str, Image.Image], prompt: str, when: str) -> Image.Image:
    page = sheet([[pictures["x_t, decoded"], pictures["x0-hat, decoded"]],
                  [pictures["x_t, sketch"], pictures["x0-hat, sketch"]]],
                 ["x_t, the noisy latent", "x0-hat, the guess in it"], ["decoded", "sketch"],
                 side=128)
    frame = Image.new("RGB", (page.width, page.height + 22), "white")
    frame.paste(page, (0, 22))
    ImageDraw.Draw(frame).text((frame.width // 2, 4), f'"{prompt}", {when}', "black", anchor="ma",
                               font_size=12)
    return frame


def distance(a: Image.Image, b: Image.Image) -> float:
    """The mean difference of two pictures, in gray levels of 255."""
    a, b = (np.asarray(image.convert("RGB"), dtype=float) for image in (a, b))
    return float(np.abs(a - b).mean())


# --- what the settings do ---

def show_samplers(args: Namespace, sd: StableDiffusion, steps: tuple[int, ...]) -> None:
    """Every sampler at several numbers of steps, each with its usual spacing."""
    rows = {name: [sd.generate(args.prompt, steps=n, sampler=name, seed=args.seed)[0]
                   for n in steps] for name in SAMPLERS}
    best = rows["dpmpp_2m"][-1]
    print(f"\nSamplers: the distance to the picture of dpmpp_2m in {steps[-1]} steps, and the time"
          " of a single step:")
    print("  steps   " + "".join(f"{n:7}" for n in steps))
    for name, row in rows.items():
        spacing = SAMPLERS[name].timestep_spacing
        (sigma,) = SPACINGS[spacing](1, sd.schedule.base)
        distances = "".join(f"{distance(picture, best):7.1f}" for picture in row)
        time = NoiseSchedule("eps", sd.schedule.base).sigma_to_t(sigma)
        print(f"  {name:8}{distances}   {spacing:8} t = {time:.0f}")
    print("  ddim, euler and dpmpp_2m solve one equation, so with more steps they agree. The others"
          " add noise and end elsewhere.\n"
          "  A single 'leading' step runs at t = 1, where the network takes pure noise for a nearly"
          " finished picture.\n"
          "  lcm is for models that were distilled to guess the whole picture in one step.")
    titles = [f"{n} steps" if n > 1 else "1 step" for n in steps]
    save(sheet(list(rows.values()), titles, list(rows)), args.out / "process-samplers.png")


def show_guidance(args: Namespace, sd: StableDiffusion, scales: tuple[float, ...],
                  steps: int) -> None:
    """0 ignores the text, 1 is the model's own guess, and more goes beyond that guess."""
    columns = [sd.generate(args.prompt, guidance=s, steps=steps, seed=args.seed, batch=3)
               for s in scales]
    print("\nGuidance: spread of the pixels, and the share of them clipped to black or white:")
    for s, column in zip(scales, columns):
        a = np.stack([np.asarray(picture) for picture in column])
        print(f"  {s:4}: {a.std():4.0f}, {np.isin(a, (0, 255)).mean():.0%}")
    page = sheet([list(row) for row in zip(*columns)], [f"guidance {s}" for s in scales],
                 [f"seed {args.seed + i}" for i in range(3)])
    save(page, args.out / "process-guidance.png")


# --- between two pictures, and from one ---

def slerp(a: Tensor, b: Tensor, u: float) -> Tensor:
    """From a (u = 0) to b (u = 1) along the arc between them.

    On the arc noise keeps its standard deviation; on a straight line it loses some of it.
    """
    cosine = F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0)
    w = math.acos(cosine.clamp(-1, 1))
    if math.sin(w) < 1e-4:  # parallel: there is no arc
        return torch.lerp(a, b, u)
    return math.sin((1 - u) * w) / math.sin(w) * a + math.sin(u * w) / math.sin(w) * b


def between(sd: StableDiffusion, prompts: tuple[str, str], seeds: tuple[int, int],
            us: list[float], steps: int) -> list[Image.Image]:
    """A picture for each u: noise along the arc, conditions along the straight line.

    u = 0 and u = 1 are the pictures of sd.generate.
    """
    (cond_a, uncond), (cond_b, _) = (condition(sd, prompt) for prompt in prompts)
    noise_a, noise_b = (noise_of(sd, seed) for seed in seeds)
    pictures = []
    for u in us:  # one by one: a batch rounds differently, and the ends would differ a little
        cond = {name: torch.lerp(cond_a[name], cond_b[name], u) for name in cond_a}
        *_, last = walk(sd, cond, uncond, sd.preset.guidance, slerp(noise_a, noise_b, u), steps)
        pictures += sd.decode_latents(last.x)
    return pictures


def show_between(args: Namespace, sd: StableDiffusion, count: int, steps: int) -> None:
    """A film from one prompt and seed to another, and back."""
    seeds = args.seed, args.seed + 1
    us = [i / (count - 1) for i in range(count)]
    pictures = between(sd, (args.prompt, args.to), seeds, us, steps)
    a, b = (noise_of(sd, seed) for seed in seeds)
    print(f'\nFrom "{args.prompt}", seed {seeds[0]}, to "{args.to}", seed {seeds[1]}. Halfway the'
          f" noise has a standard deviation of {slerp(a, b, 0.5).std():.2f} on the arc,"
          f" {torch.lerp(a, b, 0.5).std():.2f} on a straight line.")
    changes = " ".join(f"{distance(p, q):.0f}" for p, q in zip(pictures, pictures[1:]))
    print(f"  From picture to picture: {changes} gray levels")
    frames = [sheet([[picture]], [f"{1 - u:.0%} {args.prompt}, {u:.0%} {args.to}"], side=192)
              for u, picture in zip(us, pictures)]
    forth = [frames[0]] * 3 + frames + [frames[-1]] * 3
    save_gif(forth + frames[-2:0:-1], args.out / "process-between.gif", seconds=0.15, colors=96)


def ball() -> Image.Image:
    """A first picture: a blue ball with a stem."""
    image = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(image)
    pen.line((128, 80, 150, 20), fill="saddlebrown", width=14)
    pen.ellipse((40, 60, 216, 236), fill="royalblue")
    return image


def show_img2img(args: Namespace, sd: StableDiffusion, first: Image.Image,
                 strengths: tuple[float, ...], steps: int) -> None:
    """The more noise the first picture gets, the less of it is left. At strength 1 nothing is."""
    rows, names = [], []
    print(f"\nimg2img, {steps} steps; the distance of the picture to the first one:")
    for guidance in 1.0, sd.preset.guidance:
        row = [img2img(sd, args.prompt, first, strength, guidance=guidance, steps=steps,
                       seed=args.seed)[0] for strength in strengths]
        distances = ", ".join(f"strength {s}: {distance(picture, first):.0f}"
                              for s, picture in zip(strengths, row))
        print(f"  guidance {guidance}: {distances}")
        rows.append([first, *row])
        names.append(f"guidance {guidance}")
    titles = ["first picture", *(f"strength {s}" for s in strengths)]
    save(sheet(rows, titles, names), args.out / "process-img2img.png")


def main(args: Namespace) -> None:
    first = ball() if args.init is None else on_white(read_image(args.init))
    sd = StableDiffusion.load(args.ckpt)
    kind = concat_kind(sd)
    if kind != "none":
        raise UserError(f"{args.ckpt} is a model for inpainting or instructions: it takes a {kind}"
                        " beside the noise. Give one that draws from text alone")
    size, steps, quick = sd.preset.size, sd.preset.steps, args.quick
    half = 2 if quick else steps // 2
    show_film(args, sd, 3 if quick else steps)
    show_samplers(args, sd, (1, 2) if quick else (1, 2, 4, 8, 20, 50))
    show_guidance(args, sd, (0, 4) if quick else (0, 1, 2, 4, 8, 16), 1 if quick else half)
    show_between(args, sd, 3 if quick else 13, half)
    first = ImageOps.fit(first, (size, size), Image.Resampling.LANCZOS)
    show_img2img(args, sd, first, (0.5, 1) if quick else (0.2, 0.4, 0.6, 0.8, 1), half)
    path = args.out / "process.html"
    report(sd, path, args.prompt, seed=args.seed, text=__doc__, ckpt=args.ckpt,
           steps=3 if quick else steps)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main, __doc__,
        ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"},
        prompt={"default": "a red apple"},
        to={"default": "a rocket", "help": "the prompt at the other end of the film"},
        seed={"type": int, "default": 0},
        init={"metavar": "IMG", "help": "the first picture of img2img; default: a ball"})
