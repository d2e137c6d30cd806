"""Stable Diffusion: python sd.py "a red apple"

    prompt -> Tokenizer -> CLIPTextModel -> context (B, 77, D)
                                               |
    noise (B, Z, h, w) -> sampler( denoise = guided(UNet) ) -> latents -> AutoencoderKL.decode -> picture -> PNG

Read this file first, then model.py (the UNet), sampler.py, clip.py, vae.py; checkpoint.py reads and writes files and folders, train.py makes the weights.

Shapes: B pictures, 77 tokens, D width of a token's vector, Z latent channels (4 in SD 1.x), H W picture size, h = H/f,
w = W/f latent size with f = 8. Numbers: sampling runs in fp32 whatever the weights are; noise comes from the CPU.
"""
import os

# How often a thread looks again for the others before it sleeps; read when torch comes. By default 300,000 times: where other programs compute as well, it
# so keeps those it waits for from their core, and a picture took 32 s instead of 1.9 (on 2 cores; alone 1.5 either way).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import argparse
import json
import math
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, PngImagePlugin
from torch import Tensor, nn
from tqdm import tqdm

from checkpoint import (UserError, check_names_and_shapes, check_new, claimed, collector_off, converted, cut, diffusers_name, find, folder_files,
                        give_back_freed_memory, keep_freed_memory, make_folder, open_checkpoint, open_folder, save_folder, save_tensors, whole)
from clip import CLIPTextConfig, CLIPTextModel, Tokenizer, emphasised, load_bpe
from heatmaps import HeatMaps, chosen_words, overlay
from lora import add_embedding, apply_lora
from model import AMX, UNetConfig, UNetModel, deep_kept, replayed, timestep_embedding, watching, words_kept
from sampler import PREDICTIONS, SAMPLERS, SPACINGS, Step, denoiser, inpainted, mixed, schedule, until
from vae import AutoencoderKL, VAEConfig, decode_tiled

BUILTIN = Path(__file__).parent / "weights" / "emoji.safetensors"


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
    "lcm": Preset(UNetConfig(time_cond_proj_dim=256), steps=4, guidance=8.0, sampler="lcm"),
    "emoji": Preset(  # the built-in model: small, and told the text's pooled vector beside the time, as SDXL is
        UNetConfig(in_channels=16, out_channels=16, model_channels=96, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1),
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
    @collector_off()
    def load(cls, path: str | Path | None = None, device: str | None = None, dtype: torch.dtype | None = None,
             lowmem: bool = False, preset: str | None = None, prediction: str | None = None) -> "StableDiffusion":
        """A model from an official single file (.safetensors or .ckpt), a diffusers folder, or the hub (owner/name); None: the built-in
        one, the best device, its best dtype.

        With `lowmem` each network is on the device only while it works, guidance takes two passes, and the VAE decodes in tiles.
        `preset` and `prediction` (a row of sampler.PREDICTIONS) overrule what the file says or its shapes suggest.
        Raises UserError if the file is missing, damaged, or not exactly one of the models in PRESETS.
        """
        device, dtype = best_device_and_dtype(device, dtype)
        half = dtype == torch.float16
        path = BUILTIN if path is None else find(path, half)
        folder = path.is_dir()
        tensors, metadata, told = open_folder(path, half) if folder else open_checkpoint(path)
        overruled = preset is not None or (not folder and "config" in metadata)
        told = {key: value for key, value in told.items() if value is not None and not overruled}
        if prediction is not None:
            told["prediction"] = prediction
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        config = preset_of(path, shapes, metadata, told, preset)
        copied = device == "cpu" and dtype == torch.bfloat16  # which files are not in: they hold fp16 or fp32
        with torch.device("meta"), claimed(sum(shape.numel() for shape in shapes.values()) * dtype.itemsize) if copied else nullcontext():
            sd = cls(cut(config) if folder else config)
        check_names_and_shapes(path, shapes, {name: tensor.shape for name, tensor in sd.state_dict(folder).items()})
        sd.metadata, sd.lowmem = metadata, lowmem
        sd.place(device, dtype, lambda name: tensors[name].read(), folder)
        if preset is None and "config" not in metadata and "prediction" not in told and len({row.prediction for row in rows_like(path, shapes)}) > 1:
            sd.config = preset_of(path, shapes, metadata, {"prediction": sd.probe_prediction()})
        return sd

    def place(self, device: str, dtype: torch.dtype, read: Callable[[str], Tensor] | None = None, folder: bool = False) -> None:
        """Put the networks on the device (with lowmem, into the CPU's memory) as they work best, their weights those that
        `read` gives for a name in the file or folder, taken one by one."""
        self.device = torch.device(device)
        if device.startswith("cpu"):
            keep_freed_memory()
        for prefix, part in self.parts.items():
            # fp16's largest number, 65504, is too small for some VAE activations: keep that part in fp32
            part_dtype = torch.float32 if part is self.vae and dtype == torch.float16 else dtype
            home = "cpu" if self.lowmem else device
            # in fp32 on an Intel Xeon with AMX a guided step of SD 1.x at 512x512 takes 4.65 s as files have it, channels last 4.85; the VAE gains nothing
            channels_last = not (AMX and part is self.unet and device.startswith("cpu") and dtype == torch.float32)
            state = {}
            for file_name, name, tensor in self.weights(prefix, folder):
                tensor = tensor if read is None else read(file_name).reshape(tensor.shape)
                state[name] = converted(tensor, home, part_dtype, channels_last)
            part.load_state_dict(state, assign=True)
            part.eval().requires_grad_(False)

    def weights(self, prefix: str, folder: bool = False) -> Iterator[tuple[str, str, Tensor]]:
        """The tensors of the network with this prefix: name in an official single file or a diffusers folder, name in the network, tensor."""
        part = self.parts[prefix]
        for name, tensor in part.named_parameters() if folder and part in self.encoders else part.state_dict().items():
            yield diffusers_name(prefix + name, self.config) if folder else prefix + name, name, tensor

    def state_dict(self, folder: bool = False) -> dict[str, Tensor]:
        """Every tensor under its official single-file name, or that in a diffusers folder."""
        return {file_name: tensor for prefix in self.parts for file_name, _, tensor in self.weights(prefix, folder)}

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Write what was loaded, whole or not at all, the config in its metadata: to a path that ends in .safetensors one file in
        official naming, to any other a new diffusers folder. Raises UserError if it cannot be written."""
        path = Path(path)
        check_new(path)
        metadata = self.metadata | {"modelspec.prediction_type": "epsilon" if self.config.prediction == "eps" else "v"}
        if path.suffix == ".safetensors":
            marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)} if self.config.prediction == "v-zero-snr" else {}  # for other programs
            with whole(path) as temporary:
                save_tensors(self.state_dict() | marks, temporary, dtype, metadata | {"config": json.dumps(asdict(self.config))})
            return
        with torch.device("meta"):
            held = StableDiffusion(cut(self.config))
        tensors = self.state_dict(folder=True)
        save_folder(path, {name: tensors[name] for name in held.state_dict(folder=True)}, dtype, metadata | {"config": json.dumps(asdict(held.config))},
                    folder_files(held.config, self.pipeline, self.settings(*[None] * 6)[-1], load_bpe()))

    @torch.no_grad()
    def probe_prediction(self) -> str:
        """"eps" or "v", by the UNet's answer to a constant at the noisiest time (as stable-diffusion.cpp tells them apart). There noise is
        nearly the input, and the velocity nearly minus the picture."""
        cfg = self.config.unet
        y = None if cfg.adm_in_channels is None else torch.full((1, cfg.adm_in_channels), 0.5, device=self.device)
        with self.at_work(self.unet) as unet:
            out = unet(torch.full((1, cfg.in_channels, 8, 8), 0.5, device=self.device), torch.tensor([999], device=self.device),
                       torch.full((1, 2, cfg.context_dim), 0.5, device=self.device), y)
        return "v" if (out.float() - 0.5).mean() < -1 else "eps"

    @property
    def pipeline(self) -> str:
        """diffusers' class for it. Raises UserError for models that none of them draws with."""
        if self.config.unet.adm_in_channels is not None and self.config.text_2 is None:
            raise UserError("diffusers has no pipeline for this model, told the pooled vector of one text encoder: save it as .safetensors")
        kind = {"noise": "", "picture": "InstructPix2Pix", "mask": "Inpaint"}[self.sees]
        return f"StableDiffusion{'' if self.config.text_2 is None else 'XL'}{kind}Pipeline"

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
        """B prompts -> a vector per token, (B, N*77, D); N is 1 up to 75 tokens."""
        return self.condition(prompts)["context"]

    @torch.no_grad()
    def condition(self, prompts: list[str], width: int | None = None, height: int | None = None, rows: int | None = None) -> dict[str, Tensor]:
        """B prompts -> what the UNet is told about them: context (B, 77, D), and y (B, adm_in_channels) if it takes a pooled vector.

        The context is that of N rows of 77 tokens (B, N*77, D): `rows`, or as many as the longest prompt fills, 75 tokens each; the pooled vector is the
        first row's. Words as in "a (red:1.3) apple" have their vectors multiplied.
        SDXL's y goes on with the picture's size (Podell et al. 2023, section 2.2): original height and width, top and left of the
        cut, target height and width, each as a timestep embedding. None: the preset's size.
        """
        told, rows = [], self.rows(prompts) if rows is None else rows
        for encoder, tokenizer in zip(self.encoders, self.tokenizers):
            tokens, weights = tokenizer.rows(prompts, rows)  # (B, N, 77)
            with self.at_work(encoder):
                features, pooled = encoder.encode(tokens.flatten(0, 1).to(self.device))
            if (weights != 1).any():
                features = emphasised(features, weights.flatten(0, 1))
            told.append((features.unflatten(0, (-1, rows)).flatten(1, 2), pooled[::rows]))  # '(b n) t d -> b (n t) d'
        height, width = (self.config.size if side is None else side for side in (height, width))
        return self.sized(torch.cat([features for features, _ in told], dim=-1), told[-1][1], torch.tensor([[height, width, 0, 0, height, width]] * len(prompts)))

    def sized(self, context: Tensor, pooled: Tensor, sizes: Tensor) -> dict[str, Tensor]:
        """What the UNet is told: the words' vectors, the texts', and for SDXL each picture's sizes (B, 6)."""
        if self.config.unet.adm_in_channels is None:
            return {"context": context}
        if room := self.config.unet.adm_in_channels - pooled.shape[1]:
            times = timestep_embedding(sizes.flatten().to(self.device), room // 6)
            pooled = torch.cat([pooled, times.view(len(sizes), room).to(pooled)], dim=1)
        return {"context": context, "y": pooled}

    def rows(self, prompts: list[str]) -> int:
        """How many rows of 77 tokens the longest of them takes."""
        return max(tokenizer.rows(prompts)[0].shape[1] for tokenizer in self.tokenizers)

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
    def generate(self, prompt: str | list[str], negative_prompt: str = "", width: int | None = None, height: int | None = None,
                 steps: int | None = None, guidance: float | None = None, sampler: str | None = None, seed: int = 0, batch: int = 1,
                 callback: Callable[[Step], None] | None = None, spacing: str | None = None,
                 init: Image.Image | None = None, strength: float | None = None, mask: Image.Image | None = None,
                 image_guidance: float | None = None, guided_share: float | None = None, deep_every: int | None = None) -> list[Image.Image]:
        """`batch` pictures of the prompt, or one of each of several prompts, as long as the longest; picture i from seed + i. None: the preset's (or
        sampler's) own default.

        With `init`, starts from that picture, noised to `strength` of the way (SDEdit, Meng et al. 2022; default 0.75): int(steps * strength)
        steps are run; at 1 nothing of it is left. With `mask` too, only what is white there is drawn anew (strength: default 1).
        A model made to change pictures by instruction (InstructPix2Pix, Brooks et al. 2023) sees `init` beside the noise at
        every step and follows it by `image_guidance` (default 1.5). Only the first `guided_share` of the steps are guided, the others take half the
        time (after Kynkäänniemi et al. 2024). All but the UNet's outermost blocks are computed at every `deep_every`-th step only.
        `callback` is called after each step with a sampler.Step.
        Raises UserError for settings out of range and for NaNs on the way.
        """
        width, height, steps, guidance, sampler, spacing = self.settings(width, height, steps, guidance, sampler, spacing)
        run = self.steps_run(steps, init, mask, strength)
        if guided_share is not None and not 0 <= guided_share <= 1:
            raise UserError(f"the guided share of the steps must lie between 0 and 1, not {guided_share}")
        if deep_every is not None and deep_every < 1:
            raise UserError(f"the deep blocks must be computed at every step (1), every second (2) or the like, not {deep_every}")
        if image_guidance is not None and self.sees != "picture":
            raise UserError("image guidance is for models that change pictures by instruction, such as InstructPix2Pix")
        if batch < 1:
            raise UserError(f"batch must be at least 1, not {batch}")
        prompts = [prompt] * batch if isinstance(prompt, str) else prompt
        batch = len(prompts)
        if not 0 <= seed < 2**63 - batch:
            raise UserError(f"the seed must lie between 0 and 2^63, not {seed}")
        shape = (self.config.vae.z_channels, height // self.config.vae.downsampling, width // self.config.vae.downsampling)
        generators = [torch.Generator().manual_seed(seed + i) for i in range(batch)]

        def draw() -> Tensor:
            """Standard normal noise (B, Z, h, w), the same for a seed on every device and in every batch."""
            return torch.stack([torch.randn(shape, generator=g) for g in generators]).to(self.device)

        if init is not None:
            init = ImageOps.fit(on_white(init), (width, height), Image.Resampling.LANCZOS)
        sigmas = schedule(sampler, steps, spacing, self.config.prediction)[steps - run:]
        blended = mask is not None and self.sees == "noise"
        known = self.encode_image([init], draw()) if blended or run < steps else None
        noise = draw()
        x = noise * (sigmas[0] ** 2 + 1) ** 0.5 if run == steps else known + sigmas[0] * noise  # unit variance when variance preserving

        weighted = self.told(prompts, negative_prompt, guidance, width, height)
        if mask is not None:
            mask = ImageOps.fit(mask.convert("L"), (width, height), Image.Resampling.NEAREST).point(lambda v: 255 * (v >= 128))
            mask_pixels = torch.from_numpy(np.array(mask)[None, None] / 255).float()
            mask_latents = F.interpolate(mask_pixels, shape[1:]).to(self.device)
        if self.sees == "picture":
            weighted = with_picture(weighted, self.encode_image([init]).expand(batch, *shape) / self.config.vae.scale_factor,
                                    1.5 if image_guidance is None else image_guidance)
        elif self.sees == "mask":
            left = self.encode_pixels(pixels([init]) * (1 - mask_pixels), draw())
            concat = torch.cat([mask_latents.expand(batch, -1, -1, -1), left], dim=1)
            weighted = [(weight, told | {"concat": concat}) for weight, told in weighted]

        replay = self.device.type == "cuda" and not self.lowmem and deep_every is None
        with (self.at_work(self.unet) as unet, words_kept(unet), nullcontext() if deep_every is None else deep_kept(unet, deep_every),
              replayed(unet) if replay else nullcontext(unet) as called):
            network = denoiser(called, self.config.prediction)
            denoise = mixed(network, weighted, one_by_one=self.lowmem)
            if guided_share is not None:
                denoise = until(sigmas[round(guided_share * run)], denoise, mixed(network, [(1.0, weighted[-1][1])]))
            if blended:
                x, denoise = torch.lerp(known + sigmas[0] * noise, x, mask_latents), inpainted(denoise, known, mask_latents)
            for step in SAMPLERS[sampler].sample(denoise, x, sigmas, draw):
                if not step.x.isfinite().all():
                    raise UserError(f"NaN at step {step.index + 1}, try --dtype fp32")
                if callback is not None:
                    callback(step)
        give_back_freed_memory()
        images = self.decode_latents(step.x / (sigmas[-1] ** 2 + 1) ** 0.5)  # variance preserving again: ddim ends above 0
        return images if mask is None else [Image.composite(image, init, mask) for image in images]  # what was not masked stays as it was, exactly

    def told(self, prompts: list[str], negative_prompt: str, guidance: float, width: int, height: int) -> list[tuple[float, dict[str, Tensor]]]:
        """The two conditions of classifier-free guidance, for `sampler.mixed`: the negative prompt's and, last, the prompts' (B, ...)."""
        rows = self.rows([*prompts, negative_prompt])  # as many of both
        different = list(dict.fromkeys(prompts))
        condition = {name: c[[different.index(prompt) for prompt in prompts]] for name, c in self.condition(different, width, height, rows).items()}
        if self.config.unet.time_cond_proj_dim is not None:  # the model was taught to guide itself
            return [(1.0, condition | {"w": torch.full((len(prompts),), guidance, device=self.device)})]
        negative = {name: c.expand(len(prompts), *c.shape[1:]) for name, c in self.condition([negative_prompt], width, height, rows).items()}
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
            strength = self.usual_strength(mask)
        if not 0 < strength <= 1 or int(steps * strength) < 1:
            raise UserError(f"strength {strength} of {steps} steps: it must lie between {1 / steps:.3g} (one step) and 1")
        return int(steps * strength)

    def usual_strength(self, mask: Image.Image | None) -> float:
        """How much of a picture is redrawn unless asked otherwise."""
        return 0.75 if mask is None and self.sees == "noise" else 1.0

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
    picture, none = {"concat": seen}, {"concat": torch.zeros_like(seen), "context": negative["context"].clone()}  # deep_kept tells passes apart by it
    return [(1 - image_guidance, negative | none), (image_guidance - guidance, negative | picture), (guidance, condition | picture)]


def pixels(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [-1, 1]."""
    x = torch.stack([torch.from_numpy(np.array(image.convert("RGB"))) for image in images])
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1  # 'b h w c -> b c h w'


# --- checkpoints ---

def preset_of(path: Path, shapes: dict[str, torch.Size], metadata: dict[str, str], told: dict, name: str | None = None) -> Preset:
    """The row of PRESETS called `name`; else the config in the metadata; else the row with the same input and text widths, the first that
    fits what is `told` (see checkpoint.open_folder). What is told of prediction, size and scale then takes the place of the row's own."""
    if name is not None and name not in PRESETS:
        raise UserError(f"no preset is called {name!r}; there are {', '.join(PRESETS)}")
    rows = [PRESETS[name]] if name is not None else [config_in(path, metadata)] if "config" in metadata else rows_like(path, shapes)
    fitting = {key: "v" if value == "v-zero-snr" else value for key, value in told.items()}  # which has no rows of its own
    for fields in ("prediction", "spacing", "sampler"), ("prediction",), ():
        if like := [row for row in rows if all(getattr(row, key) == fitting[key] for key in fields if key in fitting)]:
            break
    preset = deepcopy(like[0])
    preset.prediction = told.get("prediction", preset.prediction)
    if isinstance(told.get("sample_size"), int):
        preset.size = told["sample_size"] * preset.vae.downsampling
    if told.get("scale_factor") is not None:
        preset.vae.scale_factor = told["scale_factor"]
    return preset


def config_in(path: Path, metadata: dict[str, str]) -> Preset:
    """The preset that `StableDiffusion.save` put there."""
    try:
        config = json.loads(metadata["config"])
        parts = {"unet": UNetConfig, "vae": VAEConfig, "text": CLIPTextConfig, "text_2": CLIPTextConfig}
        return Preset(**config | {part: kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in config[part].items()})
                                  for part, kind in parts.items() if config.get(part) is not None})
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has a config in its metadata that does not fit this version: {error}") from error


def rows_like(path: Path, shapes: dict[str, torch.Size]) -> list[Preset]:
    """The rows of PRESETS with the same input and text widths."""
    unet = ("model.diffusion_model.", "unet/")
    conv_in = next((name for name in ("model.diffusion_model.input_blocks.0.0.weight", "unet/conv_in.weight") if name in shapes), None)
    to_k = next((name for name in shapes if name.startswith(unet) and name.endswith("attn2.to_k.weight")), None)
    if to_k is None or conv_in is None:
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: it has no UNet under {' or '.join(unet)}")
    widths, guides_itself = (shapes[conv_in][1], shapes[to_k][1]), any(name.endswith("cond_proj.weight") for name in shapes)
    rows = [row for row in PRESETS.values() if widths == (row.unet.in_channels, row.unet.context_dim)
            and guides_itself == (row.unet.time_cond_proj_dim is not None)]
    if not rows:
        known = dict.fromkeys(f"{row.unet.in_channels} and {row.unet.context_dim}" for row in PRESETS.values())
        raise UserError(f"{path} is of another family: {widths[0]} input channels and text width {widths[1]}; known are {', '.join(known)}")
    return rows


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
    parser.add_argument("prompt", nargs="?", help="(red:1.3) gives weight to words; may be left out with --prompts, --from and --save")
    parser.add_argument("--prompts", metavar="FILE", help="draw each line of this text file, --batch of them at a time, into the folder --out; under torchrun each process its share")
    parser.add_argument("--from", dest="source", metavar="PNG", help="draw this picture again, by the settings stored in it; what else is given overrules them")
    parser.add_argument("--negative", default="", help="what the picture should not be")
    parser.add_argument("--steps", type=int, help="1 to 1000")
    parser.add_argument("--guidance", type=float, help="how strongly to follow the prompt; 1: not beyond the model's own guess, and twice as fast")
    parser.add_argument("--guided-share", type=float, help="guide only this share of the steps, from the first: 0.5 saves a quarter of the time")
    parser.add_argument("--deep-every", type=int, metavar="N", help="compute the UNet's deep blocks at every N-th step only: 3 saves half of the time or more")
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
    parser.add_argument("--ckpt", help="a .safetensors or .ckpt, a diffusers folder, or owner/name on the Hugging Face hub; default: the built-in model")
    parser.add_argument("--lora", metavar="FILE[:SCALE]", action="append", help="add a LoRA to the model (kohya's, diffusers' or peft's); may be given several times")
    parser.add_argument("--embedding", metavar="FILE", action="append", help="add a word learned by textual inversion; may be given several times")
    parser.add_argument("--preset", help=f"what kind of model it is, if that is guessed wrong: {', '.join(PRESETS)}")
    parser.add_argument("--prediction", choices=PREDICTIONS, help="what it predicts, if that is guessed wrong")
    parser.add_argument("--save", metavar="PATH", help="write the model to PATH: a .safetensors, else a diffusers folder (fp16, or as --dtype says)")
    parser.add_argument("--dtype", choices=DTYPES, help="default: fp16 on GPUs; on a CPU bf16 if it computes in it, else fp32")
    parser.add_argument("--lowmem", action="store_true", help="less memory, more time: one network on the device at a time, guidance in two passes, decoding in tiles")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the first of them that is there")
    parser.add_argument("--out", help="the .png to write (default: named after the prompt); with --prompts a folder (default: pictures)")
    parser.add_argument("--film", metavar="GIF", help="also write how the picture came about: the model's guess of it at every step")
    parser.add_argument("--attn", metavar="DIR", help="also write, for each word, where in the picture it was looked for (a folder; made if need be)")
    parser.add_argument("--words", help="with --attn: these words of the prompt only, separated by commas")
    args, more = parser.parse_known_args()
    if more:
        options = any(word.startswith("-") for word in more)
        parser.error(f"unrecognized arguments: {' '.join(more)}" if options else f'a prompt of several words goes in quotes: "{args.prompt} {" ".join(more)}"')
    warnings.showwarning = lambda message, *_: print(f"sd.py: {message}", file=sys.stderr)
    try:
        if args.source is not None:
            stored = stored_settings(Path(args.source)) | ({} if args.prompts is None else {"prompt": None})
            parser.set_defaults(**{option: value for option, value in stored.items() if getattr(args, option) == parser.get_default(option)})
            args = parser.parse_args()
        if args.prompt is None and args.prompts is None and args.save is None:
            parser.error("the following arguments are required: prompt")
        if args.save is not None:
            save_as(args)
        if args.prompt is not None or args.prompts is not None:
            run(args)
    except UserError as error:
        sys.exit(complain(error))
    except torch.OutOfMemoryError:
        sys.exit(complain("out of memory: try --lowmem, a smaller --width and --height, --batch 1, or --dtype fp16"))


def complain(what: object) -> int:
    print(f"sd.py: {what}", file=sys.stderr)
    return 2


def save_as(args: argparse.Namespace) -> None:
    """Read on the CPU, in the precision it is written in."""
    check_new(Path(args.save))
    dtype = DTYPES["fp16" if args.dtype is None else args.dtype]
    if args.embedding:
        warnings.warn("learned words are not part of a model's file: give --embedding again when drawing")
    load(args, "cpu", dtype).save(args.save, dtype)
    print(args.save)


def load(args: argparse.Namespace, device: str | None, dtype: torch.dtype | None) -> StableDiffusion:
    """The model asked for, with what is to be put on top of it."""
    sd = StableDiffusion.load(args.ckpt, device, dtype, args.lowmem, args.preset, args.prediction)
    for lora in args.lora or []:
        match = re.fullmatch(r"(?s)(.*?)(?::([+-]?\d*\.?\d+))?", lora)
        apply_lora(sd, match[1], 1.0 if match[2] is None else float(match[2]))
    for path in args.embedding or []:
        add_embedding(sd, path)
    return sd


class Job(NamedTuple):
    prompt: str
    seed: int
    path: Path


def jobs_of(args: argparse.Namespace) -> list[Job]:
    """The pictures asked for, in the order of their seeds. Raises UserError, before any work, if they cannot be written."""
    if args.prompts is None:
        paths = output_paths("--out", args.out if args.out is not None else file_name(args.prompt), ".png", args)
        return [Job(args.prompt, args.seed + i, path) for i, path in enumerate(paths)]
    if given := [option for option in ("prompt", "film", "attn") if getattr(args, option) is not None]:
        raise UserError(f"--prompts does not go with {given[0]}: leave one of them out")
    try:
        lines = [line.strip() for line in Path(args.prompts).read_text("utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {args.prompts}: {error}") from error
    if not lines:
        raise UserError(f"{args.prompts} is empty: write one prompt a line")
    folder = Path("pictures" if args.out is None else args.out)
    make_folder(folder)
    jobs = [Job(line, args.seed + i, folder / f"{i:04d}-{file_name(line)}") for i, line in enumerate(lines)]
    rank, ranks = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))  # set by torchrun
    return jobs[rank * len(jobs) // ranks:(rank + 1) * len(jobs) // ranks]


def file_name(prompt: str) -> str:
    """Limited in bytes, as names of files are."""
    return (re.sub(r"\W+", "-", prompt).strip("-").encode()[:100].decode(errors="ignore") or "picture") + ".png"


def check_options(args: argparse.Namespace) -> None:
    """Raises UserError for those that do not go together."""
    try:
        f"{args.prompt} {args.negative}".encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid UTF-8") from error
    for option, needs in ("strength", "init"), ("mask", "init"), ("image_guidance", "init"), ("words", "attn"), ("preset", "ckpt"):
        if getattr(args, option) is not None and getattr(args, needs) is None:
            raise UserError(f"--{option.replace('_', '-')} means nothing without --{needs}: give that too")
    if args.batch < 1:
        raise UserError(f"batch must be at least 1, not {args.batch}")


def run(args: argparse.Namespace) -> None:
    check_options(args)
    jobs = jobs_of(args)
    films = [] if args.film is None else output_paths("--film", args.film, ".gif", args)
    init, mask = (None if path is None else read_image(path) for path in (args.init, args.mask))
    if args.ckpt is None:
        print("using the built-in model (64x64 emoji). Full size, downloaded once: --ckpt stable-diffusion-v1-5/stable-diffusion-v1-5")
    device = f"cuda:{os.environ['LOCAL_RANK']}" if args.device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available() else args.device
    sd = load(args, device, None if args.dtype is None else DTYPES[args.dtype])
    asked = dict(zip(("width", "height", "steps", "guidance", "sampler", "spacing"),
                     sd.settings(args.width, args.height, args.steps, args.guidance, args.sampler, args.spacing)))
    if args.negative and sd.sees != "picture" and (asked["guidance"] == 1 or sd.config.unet.time_cond_proj_dim is not None):
        warnings.warn("the negative prompt does nothing at guidance 1, nor with a model that guides itself")
    words, maps, guesses = [], HeatMaps(), []
    if args.attn is not None:
        words = chosen_words(sd.tokenizer, args.prompt, None if args.words is None else args.words.split(","))
        make_folder(Path(args.attn))

    def callback(step: Step) -> None:
        bar.update()
        if films:
            guesses.append(step.denoised)
        if words:
            maps.step(step)

    alike = [list(group) for _, group in groupby(jobs, lambda job: sd.rows([job.prompt]))]  # longer neighbours would change a picture
    batches = [group[i:i + args.batch] for group in alike for i in range(0, len(group), args.batch)]
    with (tqdm(total=len(batches) * sd.steps_run(asked["steps"], init, mask, args.strength), unit="step", delay=0.1) as bar,  # none before an error
          watching(sd.unet, maps.watch) if words else nullcontext()):
        for batch in batches:
            images = sd.generate([job.prompt for job in batch], args.negative, **asked, seed=batch[0].seed, callback=callback, init=init,
                                 strength=args.strength, mask=mask, image_guidance=args.image_guidance, guided_share=args.guided_share,
                                 deep_every=args.deep_every)
            for image, job in zip(images, batch):
                strength = sd.usual_strength(mask) if init is not None and args.strength is None else args.strength
                write(image, job.path, pnginfo=text_chunk(parameters(vars(args) | asked | {"prompt": job.prompt, "seed": job.seed, "strength": strength})))
                tqdm.write(str(job.path))
    for i, path in enumerate(films):
        frames = [sd.decode_latents(guess[i:i + 1])[0] for guess in guesses[:-1]] + [images[i]]
        write(frames[0], path, save_all=True, append_images=frames[1:], duration=[120] * (len(frames) - 1) + [1500], loop=0)
        print(path)
    if words:
        write_maps(images, jobs, maps, words, Path(args.attn))


def write_maps(images: list[Image.Image], jobs: list[Job], maps: HeatMaps, words: list[tuple[str, list[int]]], folder: Path) -> None:
    for image, job, heat in zip(images, jobs, maps.mean()):
        for word, places in words:
            file = folder / (f"{job.path.stem}-{places[0]}-" + re.sub(r"\W", "", word)[:40] + ".png")
            write(overlay(image, heat[places].sum(0)), file)
            print(file)


# --- what a picture was made with, as the text that A1111's and other tools read and write ---

def spelled(name: str) -> str:
    """As it is spelled here: A1111's "DPM++ 2M" and "Euler a" are dpmpp_2m and euler_a."""
    return name.lower().replace("++", "pp").replace(" ", "_")


STORED = {  # its name there: the option, and how to read it
    "Steps": ("steps", int), "Sampler": ("sampler", spelled), "Schedule type": ("spacing", spelled), "CFG scale": ("guidance", float), "Seed": ("seed", int),
    "Denoising strength": ("strength", float), "Init": ("init", str), "Mask": ("mask", str),
    "Image CFG scale": ("image_guidance", float), "Guided share": ("guided_share", float), "Deep every": ("deep_every", int),
    "Checkpoint": ("ckpt", str), "Preset": ("preset", str), "Prediction": ("prediction", str), "Lora": ("lora", json.loads), "Embedding": ("embedding", json.loads)}


def parameters(options: dict[str, object]) -> str:
    """Prompt, negative prompt, then a line of the options that are set."""
    def quoted(value: object) -> str:
        text = json.dumps(value) if isinstance(value, list) else str(value)
        return json.dumps(text, ensure_ascii=False) if re.search('[,:"\n]', text) else text
    said = [f"{name}: {quoted(options[option])}" for name, (option, _) in STORED.items() if options[option] is not None]
    size, model = f"Size: {options['width']}x{options['height']}", f"Model: {quoted(Path(options['ckpt'] or BUILTIN).stem)}"
    return f"{options['prompt']}\nNegative prompt: {options['negative']}\n{', '.join([*said, size, model])}"


def stored_settings(path: Path) -> dict[str, object]:
    """And back, from a PNG. Raises UserError if it holds none."""
    try:
        with Image.open(path) as image:
            about, _, said = ("\n" + image.info["parameters"].rstrip()).rpartition("\n")
        prompt, mark, negative = about.rpartition("\nNegative prompt: ")
        prompt, negative = (prompt[1:], negative) if mark else (about[1:], "")
        found = dict(re.findall(r'([A-Z][\w ]*): ("(?:\\.|[^"\\])*"|[^,]*)', said))
        width, height = map(int, found["Size"].split("x"))
        if "Init" not in found:
            found.pop("Denoising strength", None)  # of A1111's second pass
        if found.get("Sampler", "").endswith(" Karras"):  # A1111 before 1.9
            found |= {"Sampler": found["Sampler"].removesuffix(" Karras"), "Schedule type": "Karras"}
        if found.get("Schedule type") == "Automatic":  # the sampler's usual one
            del found["Schedule type"]
        return {"prompt": prompt, "negative": negative, "width": width, "height": height} | {
            option: read(json.loads(found[name]) if found[name].startswith('"') else found[name]) for name, (option, read) in STORED.items() if name in found}
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except KeyError as error:
        raise UserError(f"{path} holds no settings of a picture, as sd.py and A1111 write them into a PNG") from error
    except (OSError, TypeError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise UserError(f"{path} holds no settings of a picture: {type(error).__name__}: {error}") from error


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
    with whole(path) as temporary:
        image.save(temporary, path.suffix[1:].upper(), **options)


if __name__ == "__main__":
    main()
