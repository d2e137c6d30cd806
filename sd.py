"""Stable Diffusion: python sd.py "a red apple"

    prompt -> Tokenizer -> CLIPTextModel -> cond {"context": (B, 77, D), ...}
                                              |
    noise (B, Z, h, w) -> sampler( denoise = cfg(UNet) ) -> latents -> AutoencoderKL -> picture

Read this file first, then model.py (the UNet), sampler.py, clip.py and vae.py. They are the core.
What else the command can do is attached from outside, in extras/.

Shapes: B pictures, 77 tokens, D width of a token's vector, Z latent channels (4 in SD 1.x), H W
picture size, h = H/f and w = W/f latent size, f = 8 (built-in: 16). Sampling runs in fp32 with any
weights.

Words: sigma says how much noise there is, x = x_0 + sigma eps. denoise(x, sigma) is the guess of
x_0. c_in(sigma) scales x for the UNet (all in sampler.py). A pooled vector stands for a whole text
(clip.py).
"""
if __name__ == "__main__":  # the command stands first: it sets up the process before torch is there
    from extras.cli import main
    raise SystemExit(main())

import json
import math
import re
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from safetensors import safe_open
from torch import Tensor, nn

from clip import CLIPTextConfig, CLIPTextModel
from model import UNetConfig, UNetModel, timestep_embedding
from sampler import (
    SAMPLERS,
    SPACINGS,
    Cond,
    Noise,
    NoiseSchedule,
    Step,
    cfg,
    get_sigmas,
    make_denoiser,
    make_sigmas,
    noise_sampler,
)
from vae import AutoencoderKL, VAEConfig

BUILTIN = Path(__file__).parent / "weights" / "emoji.safetensors"
EXTRAS = Path(__file__).parent / "extras"


class UserError(ValueError):
    """A mistake that the user can mend. The message says how, in one line."""


@dataclass
class Preset:
    """A family of models: its networks, its noise, and the defaults of its pictures."""
    unet: UNetConfig = field(default_factory=UNetConfig)
    vae: VAEConfig = field(default_factory=VAEConfig)
    text_encoders: tuple[CLIPTextConfig, ...] = (CLIPTextConfig(),)
    prediction_type: str = "eps"         # what the UNet predicts: a row of sampler.PREDICTIONS
    beta_start: float = 0.00085          # the noise schedule: see sampler.make_sigmas
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    size: int = 512                      # side of the pictures it was trained on
    steps: int = 20
    guidance: float = 7.5
    sampler: str = "dpmpp_2m"
    timestep_spacing: str | None = None  # None: the sampler's own
    zero_negative: bool = False          # an empty negative prompt is all zeros


SD2_UNET = UNetConfig(num_heads=(5, 10, 20, 20), context_dim=1024, upcast_attention=True,
                      use_linear=True)
OPENCLIP_H = CLIPTextConfig(
    hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, hidden_act="gelu", clip_skip=1,
    projection=True, pad=0, openclip=True, prefix="cond_stage_model.model.")
SDXL = Preset(
    UNetConfig(channel_mult=(1, 2, 4), transformer_depth=(0, 2, 10), transformer_depth_middle=10,
               num_heads=(5, 10, 20), context_dim=2048, adm_in_channels=2816, use_linear=True),
    VAEConfig(scale_factor=0.13025),
    (CLIPTextConfig(clip_skip=1, final_norm=False,
                    prefix="conditioner.embedders.0.transformer.text_model."),
     CLIPTextConfig(hidden_size=1280, num_hidden_layers=32, num_attention_heads=20,
                    hidden_act="gelu", clip_skip=1, final_norm=False, projection=True, pad=0,
                    openclip=True, prefix="conditioner.embedders.1.model.")),
    size=1024, guidance=5.0, zero_negative=True)

PRESETS = {  # if nothing tells the rows of a file apart, the first is taken
    "sd1": Preset(),
    "sd1-inpaint": Preset(UNetConfig(in_channels=9)),
    "instruct-pix2pix": Preset(UNetConfig(in_channels=8)),
    "sd2-base": Preset(SD2_UNET, text_encoders=(OPENCLIP_H,)),
    "sd2": Preset(SD2_UNET, text_encoders=(OPENCLIP_H,), prediction_type="v", size=768),
    "sd-turbo": Preset(SD2_UNET, text_encoders=(OPENCLIP_H,), steps=1, guidance=1.0,
                       sampler="euler", timestep_spacing="trailing"),
    "sd2-inpaint": Preset(replace(SD2_UNET, in_channels=9), text_encoders=(OPENCLIP_H,)),
    "sdxl": SDXL,
    "sdxl-turbo": replace(SDXL, size=512, steps=1, guidance=1.0, sampler="euler_a",
                          timestep_spacing="trailing"),
    "sdxl-inpaint": replace(SDXL, unet=replace(SDXL.unet, in_channels=9)),
    "sdxl-instruct-pix2pix": replace(SDXL, unet=replace(SDXL.unet, in_channels=8), size=768),
    "lcm": Preset(UNetConfig(time_cond_proj_dim=256), steps=4, guidance=8.0, sampler="lcm"),
    "emoji": Preset(  # the built-in model: small, with the text's pooled vector as y
        UNetConfig(in_channels=16, out_channels=16, model_channels=96, channel_mult=(1, 2),
                   num_res_blocks=1, transformer_depth=(1, 1), num_heads=(3, 6), context_dim=128,
                   adm_in_channels=128, num_groups=8),
        VAEConfig(ch=16, decoder_ch_mult=(1, 1, 2, 4, 4), num_res_blocks=1, z_channels=16,
                  num_groups=4, scale_factor=1.029765277672752),
        (CLIPTextConfig(hidden_size=128, num_hidden_layers=2, num_attention_heads=4),),
        prediction_type="v", size=128, guidance=3.0),
}

NETWORKS = {UNetConfig: UNetModel, VAEConfig: AutoencoderKL, CLIPTextConfig: CLIPTextModel}


class StableDiffusion:
    """The networks, and how they turn a prompt into a picture. Make one with `load`."""

    def __init__(self, preset: Preset, unet: nn.Module | None = None,
                 vae: nn.Module | None = None, text_encoders: list[nn.Module] | None = None):
        self.preset = preset = deepcopy(preset)
        self.text_encoders = text_encoders
        if text_encoders is None:
            self.text_encoders = [make_network(config) for config in preset.text_encoders]
        self.unet = make_network(preset.unet) if unet is None else unet
        self.vae = make_network(preset.vae) if vae is None else vae
        base = make_sigmas(preset.beta_start, preset.beta_end, preset.beta_schedule)
        self.schedule = NoiseSchedule(preset.prediction_type, base)
        self.device, self.dtype = torch.device("cpu"), torch.float32
        self.metadata: dict[str, str] = {}

    @classmethod
    def load(cls, path: str | Path | None = None, device: str | None = None,
             dtype: torch.dtype | None = None, preset: Preset | str | None = None,
             prediction_type: str | None = None, fast: bool = True) -> "StableDiffusion":
        """A model from an official SD 1.x file or one of train.py; None: the built-in model.

        With extras/ also SD 2.x and XL, a diffusers folder, a .ckpt or a name of the hub, and with
        `fast` at speed. `preset` and `prediction_type` replace what the file says of itself. The
        default device is the best there is, the default dtype the best for it. Raises UserError
        if the file is missing, damaged, or no model of PRESETS.
        """
        device, dtype = best_device_and_dtype(device, dtype)
        if path is None:
            path, preset = BUILTIN, PRESETS["emoji"] if preset is None else preset
        if EXTRAS.is_dir():  # it opens more, and does the same as what follows here
            from extras.formats import load_model
            return load_model(cls, path, device, dtype, preset, prediction_type, fast)
        tensors, preset, metadata = open_safetensors(path, preset, prediction_type)
        try:
            return build_model(cls, preset, tensors, metadata, device, dtype)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error

    @property
    def components(self) -> dict[str, nn.Module]:
        """The networks by the prefix of their names in an official file."""
        encoders = {getattr(config, "prefix", f"text_encoders.{i}."): self.text_encoders[i]
                    for i, config in enumerate(self.preset.text_encoders)}
        return encoders | {"first_stage_model.": self.vae, "model.diffusion_model.": self.unet}

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor by its name in a file; extras/openclip.py has those of OpenCLIP's files."""
        return {prefix + name: tensor for prefix, network in self.components.items()
                for name, tensor in network.state_dict().items()}

    def load_weights(self, tensors: dict[str, "LazyTensor"], device: str, dtype: torch.dtype,
                     to: Callable[..., Tensor] = Tensor.to) -> None:
        """Take all weights from a file, strictly by name and shape, one by one."""
        check_names_and_shapes(tensors, self.state_dict())
        self.device, self.dtype = torch.device(device), dtype
        for prefix, network in self.components.items():
            kept = dtype
            if network is self.vae and dtype == torch.float16:
                kept = torch.float32  # some activations are above 65504, the largest of fp16
            state = {name: to(tensors[prefix + name].read().reshape(mine.shape), device, kept)
                     for name, mine in network.state_dict().items()}
            network.load_state_dict(state, assign=True)
            network.eval().requires_grad_(False)

    # --- prompt, latents, picture ---

    def encode_prompt(self, prompts: list[str], sizes: Tensor | None = None) -> Cond:
        """B prompts -> what the UNet is given: context (B, 77, D) and, if it takes it, y.

        The vectors of two text encoders stand side by side. SDXL's y is the pooled vector and the
        picture's `sizes` (B, 6) as timestep embeddings: height and width before the crop, top and
        left of the crop, height and width after it (Podell et al. 2023, section 2.2).
        """
        encoded = [encoder.encode(prompts) for encoder in self.text_encoders]
        cond = {name: value for one in encoded for name, value in one.items()}  # y: the last one's
        cond["context"] = torch.cat([one["context"] for one in encoded], dim=-1)
        width = getattr(self.preset.unet, "adm_in_channels", None)
        if width is None:
            cond.pop("y", None)
        elif width > cond["y"].shape[1]:
            if sizes is None:
                sizes = crop_sizes(len(prompts), self.preset.size, self.preset.size)
            room = width - cond["y"].shape[1]
            embedded = timestep_embedding(sizes.flatten().to(self.device), room // 6)
            cond["y"] = torch.cat([cond["y"], embedded.view(-1, room).to(cond["y"])], dim=1)
        return cond

    def encode_both(self, prompts: list[str], negative_prompt: str, width: int,
                    height: int) -> tuple[Cond, Cond]:
        """cond and uncond: B prompts and B times the negative prompt, each text encoded once."""
        texts = list(dict.fromkeys([*prompts, negative_prompt]))
        encoded = self.encode_prompt(texts, crop_sizes(len(texts), width, height))
        rows = [texts.index(prompt) for prompt in prompts]
        negative = [texts.index(negative_prompt)] * len(prompts)
        uncond = {name: value[negative] for name, value in encoded.items()}
        if self.preset.zero_negative and negative_prompt == "":
            uncond = self.zero_text(uncond)
        return {name: value[rows] for name, value in encoded.items()}, uncond

    def zero_text(self, cond: Cond) -> Cond:
        """cond without its text: SDXL was trained with zeros there. Sizes stay as they are."""
        zeros = {name: torch.zeros_like(value) for name, value in cond.items()}
        if "y" in cond:
            pooled = self.text_encoders[-1].config.hidden_size
            zeros["y"][:, pooled:] = cond["y"][:, pooled:]
        return zeros

    @torch.no_grad()
    def encode_image(self, images: list[Image.Image], noise: Tensor | None = None) -> Tensor:
        """PIL pictures of one size -> scaled latents (B, Z, h, w); with `noise` a sample."""
        x = pixels(images).to(self.device, self.vae.quant_conv.weight.dtype)
        return self.vae.encode(x, noise).float()

    @torch.no_grad()
    def decode_latents(self, z: Tensor) -> list[Image.Image]:
        """Scaled latents (B, Z, h, w) -> PIL pictures. Raises UserError for NaN."""
        z = z.to(self.device, self.vae.post_quant_conv.weight.dtype)
        x = torch.cat([self.vae.decode(one).float() for one in z.split(1)])
        if not x.isfinite().all():
            raise UserError(f"NaN in the decoded picture, with weights in {z.dtype}")
        x = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        return [Image.fromarray(one) for one in x.permute(0, 2, 3, 1).cpu().numpy()]

    @torch.no_grad()
    def generate(self, prompt: str | list[str], negative_prompt: str = "", seed: int = 0,
                 batch: int = 1, init: Tensor | None = None, strength: float = 1.0,
                 noise: Noise | None = None, guide: Callable = cfg,
                 callback: Callable[[Step], None] | None = None, **options) -> list[Image.Image]:
        """`batch` pictures of the prompt, or one of each of several prompts.

        Picture i comes from seed + i. `options` are those of `resolve_options`: width, height,
        steps, guidance, sampler, timestep_spacing. `init` (B, Z, h, w): start from these latents,
        with noise, and run the last `strength` of the steps (SDEdit, Meng et al. 2022); at
        strength 1 nothing of them is left. `noise`: another source of noise.
        `guide(denoise, cond, uncond, guidance)` returns the guided denoise. `callback` sees each
        Step. Raises UserError for options out of range and for NaN.
        """
        prompts = [prompt] * batch if isinstance(prompt, str) else prompt
        width, height, steps, guidance, sampler, spacing = self.resolve_options(**options).values()
        left_out = 0 if init is None else steps - num_steps(steps, strength)
        sigmas = get_sigmas(sampler, steps, self.schedule, spacing)[left_out:]
        if noise is None:
            noise = self.noise_sampler(seed, len(prompts), width, height)

        cond, uncond = self.encode_both(prompts, negative_prompt, width, height)
        if getattr(self.preset.unet, "time_cond_proj_dim", None) is not None:
            cond["w"] = torch.full((len(prompts),), guidance, device=self.device)
            guidance = 1  # the network was trained to guide itself, by w
        denoise = guide(make_denoiser(self.unet, self.schedule), cond, uncond, guidance)

        c_in = self.schedule.prediction.c_in
        if left_out == 0:
            x = noise() / c_in(sigmas[0])  # the network's first input is then the noise itself
        else:
            x = init + sigmas[0] * noise()
        for step in SAMPLERS[sampler].sample(denoise, x, sigmas, noise):
            if not step.x.isfinite().all():
                raise UserError(f"NaN at step {step.index + 1}, with weights in {self.dtype}")
            if callback is not None:
                callback(step)
        return self.decode_latents(step.x * c_in(sigmas[-1]))  # ddim ends above sigma = 0

    def noise_sampler(self, seed: int, batch: int, width: int, height: int) -> Noise:
        """The noise of `batch` pictures, for latents of this size."""
        if batch < 1 or not 0 <= seed < 2**63 - batch:
            raise UserError(f"batch {batch}, seed {seed}: the batch must be 1 or more, the seed"
                            " must lie between 0 and 2^63")
        f = self.preset.vae.downsampling
        shape = (self.preset.vae.z_channels, height // f, width // f)
        return noise_sampler(shape, [seed + i for i in range(batch)], self.device)

    def resolve_options(self, width: int | None = None, height: int | None = None,
                        steps: int | None = None, guidance: float | None = None,
                        sampler: str | None = None, timestep_spacing: str | None = None) -> dict:
        """The options of a picture, in this order; None is the preset's. Raises UserError."""
        def either(given, default):
            return default if given is None else given

        preset = self.preset
        width, height = either(width, preset.size), either(height, preset.size)
        steps, guidance = either(steps, preset.steps), either(guidance, preset.guidance)
        sampler = either(sampler, preset.sampler)
        f = preset.vae.downsampling
        if width < f or height < f or width % f or height % f:
            near = f"{max(f, width // f * f)}x{max(f, height // f * f)}"
            raise UserError(f"the size {width}x{height} must be a multiple of {f}, and not 0:"
                            f" try {near}")
        if not 1 <= steps <= 1000:
            raise UserError(f"steps must lie between 1 and 1000, not {steps}")
        if not math.isfinite(guidance):
            raise UserError(f"guidance must be a number, not {guidance}")
        if sampler not in SAMPLERS:
            raise UserError(f"no sampler is called {sampler!r}: use {', '.join(SAMPLERS)}")
        usual = either(preset.timestep_spacing, SAMPLERS[sampler].timestep_spacing)
        spacing = either(timestep_spacing, usual)
        if spacing not in SPACINGS:
            raise UserError(f"no spacing is called {spacing!r}: use {', '.join(SPACINGS)}")
        return {"width": width, "height": height, "steps": steps, "guidance": guidance,
                "sampler": sampler, "timestep_spacing": spacing}


def num_steps(steps: int, strength: float) -> int:
    """How many of the steps run. Raises UserError if it is none."""
    if not 0 < strength <= 1 or int(steps * strength) < 1:
        raise UserError(f"strength {strength} of {steps} steps: it must lie between"
                        f" {1 / steps:.3g} (one step) and 1")
    return int(steps * strength)


def pixels(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    x = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1                    # 'b h w c -> b c h w'


def crop_sizes(batch: int, width: int, height: int) -> Tensor:
    """SDXL's six numbers (B, 6) of pictures that are not cropped."""
    return torch.tensor([[height, width, 0, 0, height, width]] * batch)


def best_device_and_dtype(device: str | None,
                          dtype: torch.dtype | None) -> tuple[str, torch.dtype]:
    """A GPU and fp16 if there is one. A CPU computes in bf16 if it has it, else in fp32."""
    if device is None:
        device = "mps" if torch.backends.mps.is_available() else "cpu"
        device = "cuda" if torch.cuda.is_available() else device
    device = str(device)
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"no device {device!r} here: {str(error).splitlines()[0]}") from error
    if dtype is None:
        dtype = torch.float16
        if device.startswith("cpu"):
            bf16 = torch.cpu.get_capabilities().get("avx512_bf16", False)
            dtype = torch.bfloat16 if bf16 else torch.float32
    return device, dtype


# --- files ---

NO_WEIGHT = re.compile(  # what official files hold beside weights
    r".*position_ids$|model_ema\.|betas$|alphas_cumprod|sqrt_|log_one_minus|posterior_|logvar$")


class LazyTensor(NamedTuple):
    """A tensor in a file."""
    shape: torch.Size
    read: Callable[[], Tensor]


def open_safetensors(path: str | Path, preset: Preset | str | None, prediction_type: str | None
                     ) -> tuple[dict[str, LazyTensor], Preset, dict[str, str]]:
    """An official file: its tensors by name, what model it is, and its metadata."""
    try:
        file = safe_open(path, framework="pt")
    except Exception as error:  # safetensors raises errors of several kinds
        raise UserError(f"cannot read {path}: {error}") from error
    tensors = {name: LazyTensor(torch.Size(file.get_slice(name).get_shape()),
                                partial(file.get_tensor, name))
               for name in file.keys() if not NO_WEIGHT.match(name)}
    metadata = file.metadata() or {}
    if isinstance(preset, str):
        preset = find_preset(preset)
    elif preset is None and "config" in metadata:
        try:
            preset = preset_from_dict(json.loads(metadata["config"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} has a config of another version: give a preset") from error
    elif preset is None:
        preset = guess_preset(tensors)
    if prediction_type is not None:
        preset = replace(preset, prediction_type=prediction_type)
    return tensors, preset, metadata


def build_model(cls: type[StableDiffusion], preset: Preset, tensors: dict[str, LazyTensor],
                metadata: dict[str, str], device: str, dtype: torch.dtype) -> StableDiffusion:
    with torch.device("meta"):  # no memory for weights that the file replaces
        sd = cls(preset)
    sd.metadata = metadata
    sd.load_weights(tensors, device, dtype)
    return sd


def make_network(config) -> nn.Module:
    return NETWORKS[type(config)](config)


def find_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"no preset is called {name!r}: use {', '.join(PRESETS)}")
    return PRESETS[name]


def guess_preset(tensors: dict[str, LazyTensor]) -> Preset:
    """The first row of PRESETS with these names and shapes. extras/formats.py knows better."""
    for preset in PRESETS.values():
        with torch.device("meta"):
            names = StableDiffusion(preset).state_dict()
        if {name: t.shape for name, t in names.items()} == {n: t.shape for n, t in tensors.items()}:
            return preset
    raise UserError("the file is no model of PRESETS: give a preset")


def preset_to_dict(preset: Preset) -> dict:
    """For JSON, as files hold it under "config". `kind` names the class of each config."""
    def plain(config) -> dict:
        return {"kind": type(config).__name__} | asdict(config)
    return vars(preset) | {"unet": plain(preset.unet), "vae": plain(preset.vae),
                           "text_encoders": [plain(config) for config in preset.text_encoders]}


def preset_from_dict(stored: dict) -> Preset:
    """The reverse. Raises KeyError for a kind that NETWORKS lacks, TypeError for other fields."""
    kinds = {kind.__name__: kind for kind in NETWORKS}

    def config(plain: dict):
        fields = {key: tuple(value) if isinstance(value, list) else value
                  for key, value in plain.items() if key != "kind"}
        return kinds[plain["kind"]](**fields)
    encoders = tuple(config(plain) for plain in stored["text_encoders"])
    return Preset(**stored | {"unet": config(stored["unet"]), "vae": config(stored["vae"]),
                              "text_encoders": encoders})


def check_names_and_shapes(found: dict[str, LazyTensor], wanted: dict[str, Tensor]) -> None:
    """Raises UserError that names the first five tensors of each kind that do not fit."""
    def matrix(shape: torch.Size) -> torch.Size:
        return shape[:2] if shape[2:] == (1, 1) else shape  # the same map, stored either way
    problems = {
        "missing": [name for name in wanted if name not in found],
        "surplus": [name for name in found if name not in wanted],
        "of another shape": [
            f"{name} {list(found[name].shape)} instead of {list(tensor.shape)}"
            for name, tensor in wanted.items()
            if name in found and matrix(found[name].shape) != matrix(tensor.shape)]}
    said = [f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in problems.items() if names]
    if said:
        raise UserError(f"the weights do not fit the model: {'; '.join(said)}")
