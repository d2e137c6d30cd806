"""Pictures from pictures: img2img, inpainting, InstructPix2Pix. Also: guidance for some steps.

Each is a few lines around `sd.generate`: start latents (`init`), a source of noise, and a guide.
A guide is a function (denoise, cond, uncond, scale) -> denoise(x, sigma), as `sampler.cfg` is.
`draw` takes whatever picture, mask and settings there are and calls the right one.

Shapes: B pictures, latents (B, Z, h, w), masks (1, 1, h, w) that are 1 where is drawn anew.
"""
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter, ImageOps
from torch import Tensor

from extras import samplers  # noqa: F401  (it adds samplers and schedules)
from extras.files import on_white
from sampler import Cond, Denoise, Noise, NoiseSchedule, cfg, get_sigmas
from sd import StableDiffusion, UserError, num_steps, pixels

Guide = Callable[..., Denoise]
SETTINGS = ("width", "height", "steps", "guidance", "sampler", "timestep_spacing")


def draw(
    sd: StableDiffusion,
    prompt: str | list[str],
    image: Image.Image | None = None,
    mask: Image.Image | None = None,
    strength: float | None = None,
    image_guidance: float | None = None,
    cfg_end: float | None = None,
    cfg_rescale: float | None = None,
    **options,
) -> list[Image.Image]:
    """As `sd.generate`, and with a picture what the model can do with it.

    An ordinary model changes the picture (`img2img`), or with a mask fills it in (`inpaint`); an
    inpainting model fills it in; InstructPix2Pix takes the prompt as an instruction (`instruct`).
    `cfg_end` is the share of the steps, from the first, that are guided (`cfg_interval`),
    `cfg_rescale` that of `rescaled_cfg`.
    Raises UserError for pictures, masks and settings that do not go together.
    """
    check_inputs(sd, image, mask, image_guidance, cfg_end, cfg_rescale)
    if strength is None:
        strength = default_strength(sd, mask)
    guide = rescaled_cfg(cfg_rescale, sd.schedule) if cfg_rescale else cfg
    if concat_kind(sd) == "image":
        guide = pix2pix_cfg(1.5 if image_guidance is None else image_guidance)
    if cfg_end is not None:
        asked = sd.resolve_options(**{name: options.get(name) for name in SETTINGS})
        sigmas = run_sigmas(sd, asked, 1.0 if image is None else strength)
        guide = cfg_interval(guide, sigmas[round(cfg_end * (len(sigmas) - 1))])
    if image is None:
        return sd.generate(prompt, guide=guide, **options)
    if concat_kind(sd) == "image":
        return instruct(sd, prompt, image, strength, guide, **options)
    if mask is not None:
        return inpaint(sd, prompt, image, mask, strength, guide, **options)
    return img2img(sd, prompt, image, strength, guide, **options)


def concat_kind(sd: StableDiffusion) -> str:
    """What the UNet takes as `concat`, channels beside the noisy latents, by their number.

    "none"; "image" (InstructPix2Pix: the latents of a picture); "mask" (inpainting models: a mask
    and the latents of the picture without what it covers).
    """
    z = sd.preset.vae.z_channels
    extra = getattr(sd.preset.unet, "in_channels", z) - z
    return {z: "image", z + 1: "mask"}.get(extra, "none")


def default_strength(sd: StableDiffusion, mask: Image.Image | None) -> float:
    """How much of a picture is redrawn unless asked otherwise."""
    return 0.75 if mask is None and concat_kind(sd) == "none" else 1.0


def check_inputs(
    sd: StableDiffusion,
    image: Image.Image | None,
    mask: Image.Image | None,
    image_guidance: float | None,
    cfg_end: float | None,
    cfg_rescale: float | None = None,
) -> None:
    """Raises UserError, before any work, for what does not go together."""
    kind = concat_kind(sd)
    if kind != "none" and image is None:
        raise UserError("this model changes pictures: give it one with --init")
    if kind == "mask" and mask is None:
        raise UserError("this model fills in a picture: give --mask, white where --init is to be "
                        "drawn anew")
    if mask is not None and (image is None or kind == "image"):
        raise UserError("a mask goes with --init, and not with models that follow instructions")
    if mask is not None and mask.size != image.size:
        raise UserError(f"the mask is {mask.width}x{mask.height}, the picture "
                        f"{image.width}x{image.height}: they must be of one size")
    if image_guidance is not None and kind != "image":
        raise UserError("image guidance is for models that change pictures by instruction, such as "
                        "InstructPix2Pix")
    if image_guidance is not None and not math.isfinite(image_guidance):
        raise UserError(f"image guidance must be a number, not {image_guidance}")
    if cfg_end is not None and not 0 <= cfg_end <= 1:
        raise UserError(f"the guided share of the steps must lie between 0 and 1, not {cfg_end}")
    if cfg_rescale is not None and not 0 <= cfg_rescale <= 1:
        raise UserError(f"the share of the rescaled guidance must lie between 0 and 1, not "
                        f"{cfg_rescale}")
    if cfg_rescale and kind == "image":
        raise UserError("--cfg-rescale is not for models that follow instructions: leave it out")
    if mask is not None:
        mask_of_drawing(mask, image)


# --- the three ways ---

@torch.no_grad()
def img2img(
    sd: StableDiffusion,
    prompt: str | list[str],
    image: Image.Image,
    strength: float = 0.75,
    guide: Guide = cfg,
    **options,
) -> list[Image.Image]:
    """Start from the picture, noised to `strength` of the way. Meng et al. 2022 (SDEdit).

    int(steps * strength) steps are run. At strength 1 nothing of the picture is left.
    """
    run = prepare(sd, prompt, strength, options)
    init = None
    if run.steps_left_out > 0:
        init = sd.encode_image([fit(image, run)], run.noise())
    return sd.generate(prompt, init=init, strength=strength, noise=run.noise, guide=guide,
                       **options)


@torch.no_grad()
def inpaint(
    sd: StableDiffusion,
    prompt: str | list[str],
    image: Image.Image,
    mask: Image.Image,
    strength: float = 1.0,
    guide: Guide = cfg,
    **options,
) -> list[Image.Image]:
    """Draw anew only what is white in the mask; what is black stays as it was, to the pixel.

    A mask with soft edges blends the two (see `is_soft`).
    """
    run = prepare(sd, prompt, strength, options)
    mask = fit_mask(mask_of_drawing(mask, image), run)
    image = fit(image, run)
    inputs, seen = blended_mask, mask
    if concat_kind(sd) == "mask":       # such models know black and white only
        inputs, seen = seen_mask, black_and_white(mask)
    mask_pixels = torch.from_numpy(np.array(seen)[None, None] / 255).float()
    init, start, guide = inputs(sd, run, pixels([image]), mask_pixels, guide)
    images = sd.generate(prompt, init=init, strength=strength, guide=guide,
                         noise=beginning_with(start, run.noise), **options)
    return [Image.composite(drawn, image, mask) for drawn in images]


# The order in which the next two draw noise is part of what a seed means.

def seen_mask(
    sd: StableDiffusion, run: "Run", x: Tensor, mask: Tensor, guide: Guide
) -> tuple[Tensor | None, Tensor, Guide]:
    """Init latents, first noise and guide for a UNet that takes the mask and the rest of a picture.

    x (1, 3, H, W) is the picture, mask (1, 1, H, W).
    """
    init = encode_pixels(sd, x, run.noise()) if run.steps_left_out > 0 else None
    start = run.noise()
    rest = encode_pixels(sd, x * (1 - mask), run.noise())
    mask = latent_mask(sd, mask).expand(run.batch, -1, -1, -1)
    return init, start, with_concat(torch.cat([mask, rest], dim=1), guide)


def blended_mask(
    sd: StableDiffusion, run: "Run", x: Tensor, mask: Tensor, guide: Guide
) -> tuple[Tensor | None, Tensor, Guide]:
    """The same for an ordinary UNet: what it does not redraw is put into each of its guesses.

    All of it starts from noise around the picture, or at strength 1 what is redrawn from noise
    alone.
    """
    known, start, mask = encode_pixels(sd, x, run.noise()), run.noise(), latent_mask(sd, mask)
    guide = masked(guide, known, mask)
    if run.steps_left_out > 0:
        return known, start, guide
    c_in = sd.schedule.prediction.c_in(run.sigma)           # `generate` divides the noise by it
    return None, torch.lerp(c_in * (known + run.sigma * start), start, mask), guide


def latent_mask(sd: StableDiffusion, mask: Tensor) -> Tensor:
    """(1, 1, H, W) -> (1, 1, h, w). Gray values are averaged, black and white stay so."""
    f = sd.preset.vae.downsampling
    size = (mask.shape[2] // f, mask.shape[3] // f)
    mode = "nearest" if ((mask == 0) | (mask == 1)).all() else "area"
    return F.interpolate(mask, size, mode=mode).to(sd.device)


@torch.no_grad()
def instruct(
    sd: StableDiffusion,
    prompt: str | list[str],
    image: Image.Image,
    strength: float = 1.0,
    guide: Guide | None = None,
    **options,
) -> list[Image.Image]:
    """Change the picture as the prompt says, with a model made for it (InstructPix2Pix).

    The model sees the picture's latents, not scaled, beside the noise at every step.
    `guide` is `pix2pix_cfg` unless given.
    """
    run = prepare(sd, prompt, strength, options)
    image, init = fit(image, run), None
    if run.steps_left_out > 0:
        init = sd.encode_image([image], run.noise())
    seen = sd.encode_image([image]).expand(run.batch, -1, -1, -1) / sd.preset.vae.scale_factor
    guide = with_concat(seen, pix2pix_cfg(1.5) if guide is None else guide)
    return sd.generate(prompt, init=init, strength=strength, noise=run.noise, guide=guide,
                       **options)


# --- guides ---

def cfg_interval(guide: Guide, stop: float) -> Guide:
    """Guidance at noise levels above `stop` only; from there on the prompt's guess alone.

    After Kynkäänniemi et al. 2024. An unguided step takes half the time.
    """
    def interval(denoise: Callable, cond: Cond, uncond: Cond, scale: float) -> Denoise:
        early = guide(denoise, cond, uncond, scale)
        late = cfg(denoise, cond, uncond, 1.0)
        return lambda x, sigma: early(x, sigma) if sigma > stop else late(x, sigma)
    return interval


def rescaled_cfg(share: float, schedule: NoiseSchedule) -> Guide:
    """Guidance of which the contrast is brought back by `share` of the way to the prompt's guess.

    Lin et al. 2024, section 3.4, equations 14 to 16; of what the network answers.
    """
    def guide(denoise: Callable, cond: Cond, uncond: Cond, scale: float) -> Denoise:
        if scale in (0, 1):
            return cfg(denoise, cond, uncond, scale)
        both = {name: torch.cat([uncond[name], cond[name]]) for name in cond}

        def guided(x: Tensor, sigma: float) -> Tensor:
            c_skip, c_out = schedule.prediction.c_skip(sigma), schedule.prediction.c_out(sigma)
            guesses = denoise(torch.cat([x, x]), sigma, **both).chunk(2)
            negative, positive = ((guess - c_skip * x) / c_out for guess in guesses)
            answer = negative + scale * (positive - negative)
            std, wanted = (one.std((1, 2, 3), keepdim=True) for one in (answer, positive))
            return c_skip * x + c_out * answer * (share * wanted / std + 1 - share)
        return guided
    return guide


def masked(guide: Guide, known: Tensor, mask: Tensor) -> Guide:
    """The network's guess counts where the mask is 1. Elsewhere the guess is `known`.

    So every sampler goes straight to `known` there.
    """
    def masked_guide(denoise: Callable, cond: Cond, uncond: Cond, scale: float) -> Denoise:
        guess = guide(denoise, cond, uncond, scale)
        return lambda x, sigma: torch.lerp(known, guess(x, sigma), mask)
    return masked_guide


def with_concat(concat: Tensor, guide: Guide) -> Guide:
    """Give the UNet `concat` (B, C', h, w) beside the noise, with the prompt and without."""
    def concat_guide(denoise: Callable, cond: Cond, uncond: Cond, scale: float) -> Denoise:
        extra = {"concat": concat}
        return guide(denoise, cond | extra, uncond | extra, scale)
    return concat_guide


def pix2pix_cfg(image_guidance: float) -> Guide:
    """The guidance of InstructPix2Pix, Brooks et al. 2023, equation 3. It needs `with_concat`.

    Three guesses, with neither, with the picture, and with the picture and the instruction:
    neither + image_guidance (picture - neither) + scale (both - picture).
    """
    def guide(denoise: Callable, cond: Cond, uncond: Cond, scale: float) -> Denoise:
        neither = uncond | {"concat": torch.zeros_like(uncond["concat"])}
        return weighted_sum(denoise, [
            (1 - image_guidance, neither), (image_guidance - scale, uncond), (scale, cond)])
    return guide


def weighted_sum(denoise: Callable, weighted: list[tuple[float, Cond]]) -> Denoise:
    """The weighted sum of the guesses under several conditions, computed as one batch.

    Conditions of weight 0 are left out.
    """
    used = [(weight, cond) for weight, cond in weighted if weight != 0]
    weights, conds = zip(*used)
    batch = {name: torch.cat([cond[name] for cond in conds]) for name in conds[0]}

    def sum_denoise(x: Tensor, sigma: float) -> Tensor:
        guesses = denoise(torch.cat([x] * len(conds)), sigma, **batch).chunk(len(conds))
        return sum(weight * guess for weight, guess in zip(weights, guesses))
    return sum_denoise


# --- parts ---

class Run(NamedTuple):
    """What an edit needs to know of the run that `sd.generate` will make."""
    width: int
    height: int
    batch: int
    sigma: float         # the noise level it starts at
    steps_left_out: int  # at the beginning, because of the strength
    noise: Noise         # the source of noise of the pictures' seeds


def prepare(
    sd: StableDiffusion, prompt: str | list[str], strength: float, options: dict
) -> Run:
    """Raises UserError for settings out of range."""
    asked = sd.resolve_options(**{name: options.get(name) for name in SETTINGS})
    width, height, steps = asked["width"], asked["height"], asked["steps"]
    batch = options.get("batch", 1) if isinstance(prompt, str) else len(prompt)
    noise = sd.noise_sampler(options.get("seed", 0), batch, width, height)
    sigma = run_sigmas(sd, asked, strength)[0]
    return Run(width, height, batch, sigma, steps - num_steps(steps, strength), noise)


def run_sigmas(sd: StableDiffusion, asked: dict, strength: float) -> list[float]:
    """The noise levels that a run of this strength goes through."""
    sigmas = get_sigmas(asked["sampler"], asked["steps"], sd.schedule, asked["timestep_spacing"])
    return sigmas[asked["steps"] - num_steps(asked["steps"], strength):]


def fit(image: Image.Image, run: Run) -> Image.Image:
    """The middle of the picture at the run's size, on white where it is transparent."""
    return ImageOps.fit(on_white(image), (run.width, run.height), Image.Resampling.LANCZOS)


def fit_mask(mask: Image.Image, run: Run) -> Image.Image:
    """The mask likewise. Each pixel is black or white, but for soft masks."""
    soft = is_soft(mask)
    how = Image.Resampling.BILINEAR if soft else Image.Resampling.NEAREST
    mask = ImageOps.fit(mask, (run.width, run.height), how)
    return mask if soft else black_and_white(mask)


def black_and_white(mask: Image.Image) -> Image.Image:
    return mask.point(lambda value: 255 * (value >= 128))


def is_soft(mask: Image.Image) -> bool:
    """Whether grays are meant: somewhere 3x3 pixels are gray, between a tenth and nine tenths.

    The gray rim of an edge that is drawn smoothly is thinner. It is cut at one half.
    """
    values = np.asarray(mask)
    gray = Image.fromarray(np.uint8(255 * ((values > 25) & (values < 230))))
    return gray.filter(ImageFilter.MinFilter(3)).getbbox() is not None


def mask_of_drawing(mask: Image.Image, image: Image.Image) -> Image.Image:
    """The mask in gray, white where the picture is drawn anew.

    What is transparent in a mask is black, as in one of white strokes. Only where the mask is the
    picture itself with a hole, what is transparent is drawn anew. Raises UserError for a mask in
    which nothing is white.
    """
    mask = mask.convert("RGBA")
    black = Image.new("RGBA", mask.size, "black")
    gray = Image.alpha_composite(black, mask).convert("L")
    if has_hole(mask, image):
        gray = ImageChops.invert(mask.getchannel("A"))
    most = gray.getextrema()[1]
    if most < 128 and not is_soft(gray):
        raise UserError("nothing would be drawn anew: that is white in the mask (128 or more), "
                        f"and its largest value is {most} of 255")
    return gray


def has_hole(mask: Image.Image, image: Image.Image) -> bool:
    """Whether the mask, where it is opaque, is the picture, and not a drawing in black and white.

    Both are RGBA.
    """
    opaque = np.asarray(mask.getchannel("A")) == 255
    if mask.size != image.size or opaque.all() or not opaque.any():
        return False
    mine, theirs = (np.asarray(one.convert("RGB"), float)[opaque] for one in (mask, image))
    drawing = np.isin(mine, (0, 255)).all()
    return not drawing and np.abs(mine - theirs).mean() < 8


def encode_pixels(sd: StableDiffusion, x: Tensor, noise: Tensor) -> Tensor:
    """As `sd.encode_image`, for values (B, 3, H, W) in [-1, 1] that no PIL picture can hold."""
    dtype = next(sd.vae.parameters()).dtype
    return sd.vae.encode(x.to(sd.device, dtype), noise).float()


def beginning_with(first: Tensor, noise: Noise) -> Noise:
    """A source of noise that gives `first`, then what `noise` gives."""
    waiting = [first]
    return lambda: waiting.pop() if waiting else noise()
