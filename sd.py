"""Stable Diffusion: python sd.py "a red apple"

    prompt -> Tokenizer -> CLIPTextModel -> context (B, 77, D)
                                               |
    noise (B, Z, h, w) -> sampler( denoise = guided(UNet) ) -> latents -> AutoencoderKL.decode -> picture -> PNG

Read this file first, then model.py (the UNet), sampler.py, clip.py, vae.py; train.py makes the weights.

Shapes: B pictures, 77 tokens, D width of a token's vector, Z latent channels (4 in SD 1.x), H W picture size, h = H/f,
w = W/f latent size with f = 8. Numbers: sampling runs in fp32 whatever the weights are; noise comes from the CPU.
"""
import argparse
import json
import math
import os
import pickle
import re
import sys
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from tqdm import tqdm

from clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from model import UNetConfig, UNetModel, timestep_embedding, watching, words_kept
from sampler import SAMPLERS, SPACINGS, Step, denoiser, inpainted, mixed
from vae import AutoencoderKL, VAEConfig, decode_tiled

BUILTIN = Path(__file__).parent / "weights" / "emoji.safetensors"


class UserError(ValueError):
    """Something only the user can mend, said in one line."""


@dataclass
class Preset:
    """One family of models: its three networks, and what its pictures are made with unless asked otherwise."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    text_2: CLIPTextConfig | None = None  # a second text encoder: its words' vectors are set beside the first's, its pooled vector is used
    prediction: str = "eps"      # what the UNet predicts: a row of sampler.PREDICTIONS
    size: int = 512              # side of the pictures it was trained on
    steps: int = 20
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    spacing: str | None = None   # None: the sampler's own
    zero_negative: bool = False  # an empty negative prompt is zeros, not the vectors of an empty text


SD2_UNET = UNetConfig(num_heads=(5, 10, 20, 20), context_dim=1024, upcast_attention=True, use_linear=True)
OPENCLIP_H = CLIPTextConfig(hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu", layers_skipped=1, projection=True,
                            pad=0, openclip=True, prefix="cond_stage_model.model.")
SDXL = Preset(
    UNetConfig(channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), transformer_depth_middle=10, num_heads=(5, 10, 20), context_dim=2048,
               adm_in_channels=2816, use_linear=True),
    VAEConfig(scale_factor=0.13025),
    CLIPTextConfig(layers_skipped=1, final_norm=False, prefix="conditioner.embedders.0.transformer.text_model."),
    CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20, hidden_act="gelu", layers_skipped=1, final_norm=False, projection=True,
                   pad=0, openclip=True, prefix="conditioner.embedders.1.model."),
    size=1024, guidance=5.0, zero_negative=True)

PRESETS = {  # of rows alike in shape, a file is taken for the first with its prediction
    "sd1": Preset(),
    "sd1-inpaint": Preset(UNetConfig(in_channels=9)),
    "instruct-pix2pix": Preset(UNetConfig(in_channels=8)),
    "sd2-base": Preset(SD2_UNET, text=OPENCLIP_H),
    "sd2": Preset(SD2_UNET, text=OPENCLIP_H, prediction="v", size=768),
    "sd-turbo": Preset(SD2_UNET, text=OPENCLIP_H, steps=1, guidance=1.0, sampler="euler", spacing="trailing"),
    "sdxl": SDXL,
    "sdxl-turbo": replace(SDXL, size=512, steps=1, guidance=1.0, sampler="euler_a", spacing="trailing"),
    "emoji": Preset(  # the built-in model: small, and told the text's pooled vector beside the time, as SDXL is
        UNetConfig(in_channels=16, out_channels=16, model_channels=96, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1),
                   num_heads=(3, 6), context_dim=128, adm_in_channels=128, num_groups=8),
        VAEConfig(ch=16, ch_mult=(1, 2, 4, 4), num_res_blocks=1, z_channels=16, num_groups=4),
        CLIPTextConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4),
        prediction="v", size=64, guidance=3.0),
}


class StableDiffusion:
    """The three networks and what turns a prompt into a picture with them. `load` is the usual way to make one."""

    def __init__(self, config: Preset):
        self.config = config
        self.encoders = [CLIPTextModel(text) for text in (config.text, config.text_2) if text is not None]
        self.tokenizers = [Tokenizer(encoder.cfg.pad) for encoder in self.encoders]
        self.text, self.tokenizer = self.encoders[0], self.tokenizers[0]
        self.unet = UNetModel(config.unet)
        self.vae = AutoencoderKL(config.vae)
        self.parts = {encoder.cfg.prefix: encoder for encoder in self.encoders} | {  # the prefix of each network in official single files
            "first_stage_model.": self.vae,
            "model.diffusion_model.": self.unet,
        }
        self.metadata: dict[str, str] = {}
        self.device, self.lowmem = torch.device("cpu"), False

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | None = None, dtype: torch.dtype | None = None,
             lowmem: bool = False) -> "StableDiffusion":
        """A model from an official single file (.safetensors or .ckpt); None: the built-in one, the best device, its best dtype.

        With `lowmem` each network is on the device only while it works, guidance takes two passes, and the VAE decodes in tiles.
        Raises UserError if the file is missing, damaged, or not exactly one of the models in PRESETS.
        """
        device, dtype = best_device_and_dtype(device, dtype)
        path = BUILTIN if path is None else Path(path)
        tensors, metadata = open_checkpoint(path)
        shapes = {name: tensor().shape for name, tensor in tensors.items()}
        with torch.device("meta"):
            sd = cls(preset_of(path, shapes, metadata))
        check_names_and_shapes(path, shapes, {name: tensor.shape for name, tensor in sd.state_dict().items()})
        sd.metadata, sd.lowmem = metadata, lowmem
        sd.place(device, dtype, lambda name: tensors[name]())
        return sd

    def place(self, device: str, dtype: torch.dtype, read: Callable[[str], Tensor] | None = None) -> None:
        """Put the networks on the device (with lowmem, into the CPU's memory) as they work best, their weights those that
        `read` gives for a name, taken one by one."""
        self.device = torch.device(device)
        for prefix, part in self.parts.items():
            # fp16's largest number, 65504, is too small for some VAE activations: keep that part in fp32
            part_dtype = torch.float32 if part is self.vae and dtype == torch.float16 else dtype
            home = "cpu" if self.lowmem else device
            weights = part.state_dict()
            part.load_state_dict({name: (weights[name] if read is None else read(prefix + name)).to(home, part_dtype) for name in weights}, assign=True)
            part.eval().requires_grad_(False)
            if part not in self.encoders:
                part.to(memory_format=torch.channels_last)  # convolutions like it, and positions become tokens without a copy

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor under its official single-file name."""
        return {prefix + name: tensor for prefix, part in self.parts.items() for name, tensor in part.state_dict().items()}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write one .safetensors in official naming, the config in its metadata, whole or not at all."""
        tensors = {name: t.detach().to("cpu", dtype).contiguous() for name, t in self.state_dict().items()}
        temporary = Path(f"{path}.tmp")
        save_file(tensors, temporary, self.metadata | {"config": json.dumps(asdict(self.config))})
        temporary.chmod(0o644)  # safetensors writes for the owner alone
        os.replace(temporary, path)

    @contextmanager
    def at_work(self, part: nn.Module) -> Iterator[nn.Module]:
        """The part on the device; with lowmem, back to the CPU's memory afterwards."""
        part.to(self.device)
        try:
            yield part
        finally:
            if self.lowmem:
                part.to("cpu")

    def encode_prompt(self, prompts: list[str]) -> Tensor:
        """B prompts -> a vector per token, (B, 77, D)."""
        return self.condition(prompts)["context"]

    @torch.no_grad()
    def condition(self, prompts: list[str], width: int | None = None, height: int | None = None) -> dict[str, Tensor]:
        """B prompts -> what the UNet is told about them: context (B, 77, D), and y (B, adm_in_channels) if it takes a pooled vector.

        SDXL's y goes on with the picture's size (Podell et al. 2023, section 2.2): original height and width, top and left of the
        cut, target height and width, each as a timestep embedding. None: the preset's size.
        """
        told = []
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            with self.at_work(encoder):
                told.append(encoder.encode(tokenizer(prompts).to(self.device)))
        context, y = torch.cat([features for features, _ in told], dim=-1), told[-1][1]
        if self.config.unet.adm_in_channels is None:
            return {"context": context}
        if room := self.config.unet.adm_in_channels - y.shape[1]:
            height, width = (self.config.size if side is None else side for side in (height, width))
            sizes = torch.tensor([height, width, 0, 0, height, width], device=self.device)
            y = torch.cat([y, timestep_embedding(sizes, room // 6).flatten().expand(len(y), -1).to(y)], dim=1)
        return {"context": context, "y": y}

    @torch.no_grad()
    def encode_image(self, images: list[Image.Image], noise: Tensor | None = None) -> Tensor:
        """PIL pictures of one size -> scaled latents (B, Z, h, w): the mode, or a sample if given standard normal `noise`."""
        return self.encode_pixels(pixels(images), noise)

    @torch.no_grad()
    def encode_pixels(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """The same for pictures (B, 3, H, W) in [-1, 1]. One picture with the noise of several gives several samples."""
        with self.at_work(self.vae) as vae:
            return vae.encode(x.to(vae.quant_conv.weight), noise).float()  # to the VAE's device and dtype

    @torch.no_grad()
    def decode_latents(self, z: Tensor) -> list[Image.Image]:
        """Scaled latents (B, Z, h, w) -> PIL pictures. Raises UserError rather than give a black picture for NaNs."""
        with self.at_work(self.vae) as vae:
            decode = partial(decode_tiled, vae) if self.lowmem else vae.decode
            x = torch.cat([decode(one.to(vae.quant_conv.weight)).float() for one in z.split(1)])  # one by one: memory
        if not x.isfinite().all():
            raise UserError("NaN in the decoded picture, try --dtype fp32")
        x = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # 'b c h w -> b h w c'
        return [Image.fromarray(picture) for picture in x.cpu().numpy()]

    @torch.no_grad()
    def generate(self, prompt: str, negative_prompt: str = "", width: int | None = None, height: int | None = None,
                 steps: int | None = None, guidance: float | None = None, sampler: str | None = None, seed: int = 0, batch: int = 1,
                 callback: Callable[[Step], None] | None = None, spacing: str | None = None,
                 init: Image.Image | None = None, strength: float | None = None, mask: Image.Image | None = None,
                 image_guidance: float = 1.5, guided_share: float = 1.0) -> list[Image.Image]:
        """`batch` pictures of the prompt, picture i from seed + i. None: the preset's (or sampler's) own default.

        With `init`, starts from that picture, noised to `strength` of the way (SDEdit, Meng et al. 2022; default 0.75): int(steps * strength)
        steps are run; at 1 nothing of it is left. With `mask` too, only what is white there is drawn anew (strength: default 1).
        A model made to change pictures by instruction (InstructPix2Pix, Brooks et al. 2023) sees `init` beside the noise at
        every step and follows it by `image_guidance`. Only the first `guided_share` of the steps are guided, the others take half the
        time (after Kynkäänniemi et al. 2024). `callback` is called after each step with a sampler.Step.
        Raises UserError for settings out of range and for NaNs on the way.
        """
        width, height, steps, guidance, sampler, spacing = self.settings(width, height, steps, guidance, sampler, spacing)
        run = self.steps_run(steps, init, mask, strength)
        if not 0 <= guided_share <= 1:
            raise UserError(f"the guided share of the steps must lie between 0 and 1, not {guided_share}")
        if batch < 1:
            raise UserError(f"batch must be at least 1, not {batch}")
        if not 0 <= seed < 2**63 - batch:
            raise UserError(f"the seed must lie between 0 and 2^63, not {seed}")
        sample, _, last = SAMPLERS[sampler]
        sigmas = SPACINGS[spacing](steps)
        sigmas.append(last if last < 0.999 * sigmas[-1] else 0.0)  # a spacing may already go down to `last`
        shape = (self.config.vae.z_channels, height // self.config.vae.downsampling, width // self.config.vae.downsampling)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]

        def draw() -> Tensor:
            """Standard normal noise (B, Z, h, w), the same for a seed on every device and in every batch."""
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        if init is not None:
            init = ImageOps.fit(on_white(init), (width, height), Image.Resampling.LANCZOS)
        sigmas = sigmas[steps - run:]
        if run == steps:
            x = draw() * (sigmas[0] ** 2 + 1) ** 0.5  # unit variance when variance preserving
        else:
            x = self.encode_image([init], draw()) + sigmas[0] * draw()

        weighted = self.told(prompt, negative_prompt, guidance, width, height, batch)
        if mask is not None:
            mask = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.NEAREST).point(lambda v: 255 * (v >= 128))
            mask_pixels = torch.from_numpy(np.array(mask)[None, None] / 255).float()
            mask_latents = F.interpolate(mask_pixels, shape[1:]).to(self.device)
        known = self.encode_image([init]) if mask is not None and self.sees == "noise" else None
        if self.sees == "picture":
            weighted = with_picture(weighted, self.encode_image([init]).expand(batch, *shape) / self.config.vae.scale_factor, image_guidance)
        elif self.sees == "mask":
            left = self.encode_pixels(pixels([init]) * (1 - mask_pixels), draw())
            concat = torch.cat([mask_latents.expand(batch, -1, -1, -1), left], dim=1)
            weighted = [(weight, told | {"concat": concat}) for weight, told in weighted]

        with self.at_work(self.unet) as unet, words_kept(unet):
            network = denoiser(unet, self.config.prediction)
            guided, unguided = mixed(network, weighted, one_by_one=self.lowmem), mixed(network, [(1.0, weighted[-1][1])])
            turn = sigmas[round(guided_share * run)]
            denoise = lambda x, sigma: guided(x, sigma) if sigma > turn else unguided(x, sigma)  # noqa: E731
            if known is not None:
                denoise = inpainted(denoise, known, mask_latents)
            for step in sample(denoise, x, sigmas, draw):
                if not step.x.isfinite().all():
                    raise UserError(f"NaN at step {step.index + 1}, try --dtype fp32")
                if callback is not None:
                    callback(step)
        images = self.decode_latents(step.x / (sigmas[-1] ** 2 + 1) ** 0.5)  # variance preserving again: ddim ends above 0
        return images if mask is None else [Image.composite(image, init, mask) for image in images]  # what was not masked stays as it was, exactly

    def told(self, prompt: str, negative_prompt: str, guidance: float, width: int, height: int, batch: int) -> list[tuple[float, dict[str, Tensor]]]:
        """The two conditions of classifier-free guidance, for `sampler.mixed`: the negative prompt's and, last, the prompt's."""
        negative, condition = ({name: c.expand(batch, *c.shape[1:]) for name, c in self.condition([text], width, height).items()}
                               for text in (negative_prompt, prompt))
        if self.config.zero_negative and negative_prompt == "":
            pooled = self.encoders[-1].cfg.hidden_size
            negative = {"context": negative["context"] * 0, "y": torch.cat([negative["y"][:, :pooled] * 0, negative["y"][:, pooled:]], dim=1)}
        return [(1 - guidance, negative), (guidance, condition)]

    @property
    def sees(self) -> str:
        """What the UNet is given at every step: the "noise" alone, beside it a "picture" (InstructPix2Pix), or a "mask" and the rest of a picture."""
        z = self.config.vae.z_channels
        return {z: "noise", 2 * z: "picture", 2 * z + 1: "mask"}[self.config.unet.in_channels]

    def steps_run(self, steps: int, init: Image.Image | None, mask: Image.Image | None, strength: float | None) -> int:
        """How many of the steps are run: all, but for a picture that is to be changed a little. Raises UserError if they do not go together."""
        if self.sees != "noise" and init is None:
            raise UserError("this model changes pictures: give it one with --init")
        if self.sees == "mask" and mask is None:
            raise UserError("this model fills in a picture: give --mask, white where --init is to be drawn anew")
        if mask is not None and (init is None or self.sees == "picture"):
            raise UserError("a mask goes with --init, and not with models that follow instructions")
        if mask is not None and mask.size != init.size:
            raise UserError(f"the mask is {mask.width}x{mask.height}, the picture {init.width}x{init.height}: they must be of one size")
        if init is None:
            return steps
        if strength is None:
            strength = 0.75 if mask is None and self.sees == "noise" else 1.0
        if not 0 < strength <= 1 or int(steps * strength) < 1:
            raise UserError(f"strength {strength} of {steps} steps: it must lie between {1 / steps:.3g} (one step) and 1")
        return int(steps * strength)

    def settings(self, width, height, steps, guidance, sampler, spacing) -> tuple[int, int, int, float, str, str]:
        """Fill in the preset's defaults and check the rest: what a picture is made with."""
        def default(value, preset):
            return preset if value is None else value
        width, height = default(width, self.config.size), default(height, self.config.size)
        steps, guidance = default(steps, self.config.steps), default(guidance, self.config.guidance)
        sampler = default(sampler, self.config.sampler)
        f = self.config.vae.downsampling
        if width < f or height < f or width % f or height % f:
            raise UserError(f"the size {width}x{height} must be multiples of {f}, such as {max(f, width // f * f)}x{max(f, height // f * f)}")
        if not 1 <= steps <= 1000:
            raise UserError(f"steps must lie between 1 and 1000, not {steps}")
        if not math.isfinite(guidance):
            raise UserError(f"guidance must be a number, not {guidance}")
        if sampler not in SAMPLERS:
            raise UserError(f"no sampler is called {sampler!r}; there are {', '.join(SAMPLERS)}")
        spacing = default(spacing, default(self.config.spacing, SAMPLERS[sampler].spacing))
        if spacing not in SPACINGS:
            raise UserError(f"no spacing is called {spacing!r}; there are {', '.join(SPACINGS)}")
        return width, height, steps, guidance, sampler, spacing


def with_picture(weighted: list[tuple[float, dict[str, Tensor]]], seen: Tensor, image_guidance: float) -> list[tuple[float, dict[str, Tensor]]]:
    """The three conditions of InstructPix2Pix (Brooks et al. 2023, equation 3): nothing, the picture, the picture and the instruction.

    `seen` (B, Z, h, w) are latents that are not scaled, as it was trained on.
    """
    (_, negative), (guidance, condition) = weighted
    picture, none = {"concat": seen}, {"concat": torch.zeros_like(seen)}
    return [(1 - image_guidance, negative | none), (image_guidance - guidance, negative | picture), (guidance, condition | picture)]


class HeatMaps:
    """Where the words went: the cross-attention matrices of a run, averaged over its steps and over the heads of each layer.

        maps = HeatMaps()
        with watching(sd.unet, maps.watch):
            images = sd.generate(prompt, callback=maps.step)

    `layers` has {name: (B, 77, h, w)}, brought to the latent's size; `mean()` is their average. At each position they sum to 1 over the tokens.
    """

    def __init__(self):
        self.last: dict[str, Tensor] = {}
        self.layers: dict[str, Tensor] = {}
        self.steps = 0

    def watch(self, name: str, a: Tensor) -> None:
        self.last[name] = a.mean(1)                                                    # 'b heads hw t -> b hw t'

    def step(self, step: Step) -> None:
        self.steps += 1
        B, _, h, w = step.x.shape
        for name, a in self.last.items():
            a, (H, W) = a[-B:].transpose(1, 2), (h, w)                                 # guidance puts the prompt's half last
            while H * W > a.shape[2]:
                H, W = (H + 1) // 2, (W + 1) // 2                                      # as Downsample does
            a = F.interpolate(a.unflatten(2, (H, W)), size=(h, w), mode="bilinear").cpu()
            self.layers[name] = a if self.steps == 1 else torch.lerp(self.layers[name], a, 1 / self.steps)

    def mean(self) -> Tensor:
        return torch.stack(list(self.layers.values())).mean(0)


def words_of(tokenizer: Tokenizer, prompt: str) -> list[tuple[str, list[int]]]:
    """The words of a prompt, each with its places in the row of tokens (the start token is at 0); words cut off are left out."""
    encoding = tokenizer.bpe.encode(prompt)
    words: dict[int, list[int]] = {}
    for i, word in enumerate(encoding.word_ids[:tokenizer.length - 2]):
        words.setdefault(word, []).append(i)
    return [(prompt[encoding.offsets[ids[0]][0]:encoding.offsets[ids[-1]][1]].lower(), [i + 1 for i in ids]) for ids in words.values()]


def overlay(image: Image.Image, heat: Tensor) -> Image.Image:
    """The picture in gray, with red where `heat` (h, w) is high, from its least value to its greatest."""
    heat = (heat - heat.min()) / (heat.max() - heat.min()).clamp(min=1e-12)
    mask = Image.fromarray((heat * 255).round().byte().numpy()).resize(image.size, Image.Resampling.BICUBIC)
    gray = ImageOps.autocontrast(image.convert("L")).convert("RGB")
    return Image.composite(Image.blend(gray, Image.new("RGB", image.size, "red"), 0.6), gray, mask)


def pixels(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    x = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1  # 'b h w c -> b c h w'


# --- checkpoints ---

IGNORED = re.compile(  # what files hold beside the weights: buffers, training state, another copy
    r".*position_ids$|model_ema\.|.*logit_scale$|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar)$")


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # old .ckpt files name this class; nothing of it is needed


class Inert:
    """Stands in for it."""


def open_checkpoint(path: Path) -> tuple[dict[str, Callable[[], Tensor]], dict[str, str]]:
    """A file's tensors, by official name, each as a function that reads it, and its metadata.

    The file is memory-mapped, and no code in it is run. Raises UserError if it cannot be read so.
    """
    if path.is_dir():
        raise UserError(f"{path} is a folder: give a single .safetensors or .ckpt file")
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            tensors, metadata = {name: partial(file.get_tensor, name) for name in file.keys()}, file.metadata() or {}
        elif not zipfile.is_zipfile(path):
            raise UserError(f"{path} is damaged, or no checkpoint of PyTorch 1.6 or later")
        else:
            with torch.serialization.safe_globals([(Inert, LIGHTNING)]):
                state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
            state = state.get("state_dict", state)
            tensors, metadata = {name: partial(state.get, name) for name, value in state.items() if isinstance(value, Tensor)}, {}
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: ask for a .safetensors file of it") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error
    text = "cond_stage_model.transformer."
    tensors = {re.sub(rf"^{text}(?!text_model\.)", text + "text_model.", name): tensor for name, tensor in tensors.items()}  # old merges lack it
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.match(name)}, metadata


def preset_of(path: Path, shapes: dict[str, torch.Size], metadata: dict[str, str]) -> Preset:
    """The config in the file's metadata, or else the row of PRESETS with the same input and text widths."""
    if "config" in metadata:
        try:
            config = json.loads(metadata["config"])
            parts = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig, "text_2": CLIPTextConfig}
            return Preset(**config | {part: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()})
                                      for part, kind in parts.items() if config.get(part) is not None})
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} has a config in its metadata that does not fit this version: {error}") from error
    unet = "model.diffusion_model."
    conv_in = unet + "input_blocks.0.0.weight"
    to_k = next((name for name in shapes if name.startswith(unet) and name.endswith("attn2.to_k.weight")), None)
    if to_k is None or conv_in not in shapes:
        raise UserError(f"{path} is not a Stable Diffusion single file: it has no UNet under {unet}")
    widths = shapes[conv_in][1], shapes[to_k][1]
    for preset in PRESETS.values():
        if widths == (preset.unet.in_channels, preset.unet.context_dim):
            return deepcopy(preset)
    raise UserError(f"{path} is of another family: {widths[0]} input channels and text width {widths[1]}; SD 1.x has 4 and 768")


def check_names_and_shapes(path: Path, found: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """Raises UserError naming the first five tensors that are missing, surplus, or of another shape."""
    problems = {
        "missing": [name for name in wanted if name not in found],
        "surplus": [name for name in found if name not in wanted],
        "of another shape": [f"{name} {list(found[name])} instead of {list(wanted[name])}"
                             for name in wanted if name in found and found[name] != wanted[name]],
    }
    told = [f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for what, names in problems.items() if names]
    if told:
        raise UserError(f"{path} does not fit: {'; '.join(told)}")


DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


def best_device_and_dtype(device: str | None, dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    """CUDA or Apple: fp16. CPU: bf16 where it computes in it natively, else fp32. Raises UserError for a device that is not there."""
    if device is not None:
        device = str(device)
    else:
        device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error
    if dtype is None:
        native_bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
        dtype = torch.float16 if not device.startswith("cpu") else torch.bfloat16 if native_bf16 else torch.float32
    return device, dtype


# --- the command ---

def main() -> None:
    parser = argparse.ArgumentParser(description="Draw a picture of a prompt. What is not given takes the model's own default.")
    parser.add_argument("prompt")
    parser.add_argument("--negative", default="", help="what the picture should not be")
    parser.add_argument("--steps", type=int, help="1 to 1000")
    parser.add_argument("--guidance", type=float, help="how strongly to follow the prompt; 1: not beyond the model's own guess, and twice as fast")
    parser.add_argument("--guided-share", type=float, default=1.0, help="guide only this share of the steps, from the first: 0.5 saves a quarter of the time")
    parser.add_argument("--sampler", help=", ".join(SAMPLERS))
    parser.add_argument("--spacing", help="of the steps' noise levels; default: the sampler's own; " + ", ".join(SPACINGS))
    parser.add_argument("--seed", type=int, default=0, help="of the first picture (default 0); the next has seed + 1")
    parser.add_argument("--width", type=int, help="a multiple of 8, like the height")
    parser.add_argument("--height", type=int)
    parser.add_argument("--batch", type=int, default=1, help="number of pictures (default 1)")
    parser.add_argument("--init", metavar="IMG", help="start from this picture, cut to the size, instead of noise")
    parser.add_argument("--strength", type=float, help="with --init: how much of it to redraw, up to 1 (default 0.75; with --mask 1)")
    parser.add_argument("--mask", metavar="IMG", help="with --init: draw anew only what is white in this picture of the same size")
    parser.add_argument("--image-guidance", type=float, help="of InstructPix2Pix models: how closely to keep to --init (default 1.5)")
    parser.add_argument("--ckpt", help="an SD 1.x .safetensors or .ckpt, or a file of train.py; default: the built-in model")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on GPUs; on a CPU bf16 if it computes in it, else fp32")
    parser.add_argument("--lowmem", action="store_true", help="less memory, more time: one network on the device at a time, guidance in two passes, decoding in tiles")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is there")
    parser.add_argument("--out", help="the .png to write; default: named after the prompt")
    parser.add_argument("--film", metavar="GIF", help="also write how the picture came about: the model's guess of it at every step")
    parser.add_argument("--attn", metavar="DIR", help="also write, for each word, where in the picture it was looked for (a folder; made if need be)")
    parser.add_argument("--words", help="with --attn: these words of the prompt only, separated by commas")
    args = parser.parse_args()
    warnings.showwarning = lambda message, *_: print(f"sd.py: {message}", file=sys.stderr)
    try:
        run(args)
    except UserError as error:
        sys.exit(complain(error))
    except torch.OutOfMemoryError:
        sys.exit(complain("out of memory: try --lowmem, a smaller --width and --height, --batch 1, or --dtype fp16"))


def complain(what: object) -> int:
    print(f"sd.py: {what}", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> None:
    try:
        (args.prompt + args.negative).encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid UTF-8") from error
    for option, needs in ("strength", "init"), ("mask", "init"), ("image_guidance", "init"), ("words", "attn"):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            raise UserError(f"--{option.replace('_', '-')} means nothing without --{needs}: give that too")
    name = re.sub(r"\W+", "-", args.prompt).strip("-").encode()[:100].decode(errors="ignore") or "picture"  # file names are limited in bytes
    paths = output_paths("--out", args.out if args.out is not None else name + ".png", ".png", args)
    films = [] if args.film is None else output_paths("--film", args.film, ".gif", args)
    init, mask = (None if path is None else read_image(path) for path in (args.init, args.mask))
    if args.ckpt is None:
        print("using the built-in model (64x64 emoji). Full size: download v1-5-pruned-emaonly.safetensors of the model "
              "stable-diffusion-v1-5/stable-diffusion-v1-5 and give --ckpt FILE")
    sd = StableDiffusion.load(args.ckpt, args.device, None if args.dtype is None else DTYPES[args.dtype], args.lowmem)
    width, height, steps, guidance, sampler, spacing = sd.settings(
        args.width, args.height, args.steps, args.guidance, args.sampler, args.spacing)
    words = None if args.attn is None else chosen_words(sd.tokenizer, args)
    maps, guesses = HeatMaps(), []

    def callback(step: Step) -> None:
        bar.update()
        if films:
            guesses.append(step.denoised)
        if words is not None:
            maps.step(step)

    with (tqdm(total=sd.steps_run(steps, init, mask, args.strength), unit="step", delay=0.1) as bar,  # none before an error
          nullcontext() if words is None else watching(sd.unet, maps.watch)):
        images = sd.generate(args.prompt, args.negative, width, height, steps, guidance, sampler, seed=args.seed, batch=args.batch,
                             callback=callback, spacing=spacing, init=init, strength=args.strength, mask=mask,
                             image_guidance=1.5 if args.image_guidance is None else args.image_guidance, guided_share=args.guided_share)
    for i, (image, path) in enumerate(zip(images, paths)):
        about = (f"{args.prompt}\nNegative prompt: {args.negative}\nSteps: {steps}, Sampler: {sampler}, Schedule type: {spacing}, "
                 f"CFG scale: {guidance}, Seed: {args.seed + i}, Size: {width}x{height}, Model: {Path(args.ckpt or BUILTIN).stem}")
        if init is not None:
            about += f", Denoising strength: {args.strength}, Init: {args.init}"
        write(image, path, pnginfo=text_chunk(about))
        print(path)
    for i, path in enumerate(films):
        frames = [sd.decode_latents(guess[i:i + 1])[0] for guess in guesses[:-1]] + [images[i]]
        write(frames[0], path, save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500], loop=0)
        print(path)
    for i, image in enumerate(images if words is not None else []):
        for word, places in words:
            path = Path(args.attn) / (f"{paths[i].stem}-{places[0]}-" + re.sub(r"\W", "", word)[:40] + ".png")
            write(overlay(image, maps.mean()[i, places].sum(0)), path)
            print(path)


def chosen_words(tokenizer: Tokenizer, args: argparse.Namespace) -> list[tuple[str, list[int]]]:
    """The words for --attn, whose folder is made. Raises UserError for a word that is not in the prompt."""
    words = [(word, places) for word, places in words_of(tokenizer, args.prompt) if re.search(r"\w", word)]
    wanted = [word for word, _ in words] if args.words is None else [word.strip().lower() for word in args.words.split(",")]
    if unknown := [word for word in wanted if word not in dict(words)]:
        raise UserError(f"{unknown[0]!r} is no word of the prompt: its words are {', '.join(word for word, _ in words)}")
    try:
        Path(args.attn).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {args.attn}: {error}") from error
    return [(word, places) for word, places in words if word in wanted]


def output_paths(option: str, path: str, suffix: str, args: argparse.Namespace) -> list[Path]:
    """One path per picture, with its seed in it if there are several. Raises UserError, before any work, if they cannot be written."""
    path = Path(path)
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} must end in {suffix}, not {path.name!r}")
    if len(path.name.encode()) > 220 or not path.parent.is_dir() or not os.access(path.parent, os.W_OK) or path.is_dir():
        raise UserError(f"cannot write {path}: its folder must exist and be writable, its name short")
    return [path] if args.batch == 1 else [path.with_stem(f"{path.stem}-{args.seed + i}") for i in range(args.batch)]


def read_image(path: str | Path) -> Image.Image:
    """Any picture Pillow reads, the right way up, as RGBA. Raises UserError if it cannot."""
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error


def on_white(image: Image.Image) -> Image.Image:
    """RGB, with what is transparent white."""
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")


def text_chunk(parameters: str) -> PngImagePlugin.PngInfo:
    """The settings as other tools read and write them."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", parameters)
    return info


def write(image: Image.Image, path: Path, **options) -> None:
    """A .png or .gif, whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        image.save(temporary, path.suffix[1:].upper(), **options)
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UserError(f"cannot write {path}: {error}") from error


if __name__ == "__main__":
    main()
