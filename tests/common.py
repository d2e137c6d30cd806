"""What the tests share: small models with random weights, the references, comparisons.

The references are diffusers (UNet, VAE, samplers, whole pipelines) and transformers (token ids,
text vectors). Every weight is random, those of the norms and of the layers that start at zero too,
so that no path multiplies by zero or one. Names are translated by diffusers' own code.
"""
import gzip
import math
import os
import random
import re
import subprocess
import sys
import time
import unicodedata
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import transformers
from diffusers.loaders.single_file_utils import (
    convert_ldm_clip_checkpoint,
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    convert_open_clip_checkpoint,
)
from PIL import Image
from torch import Tensor, nn
from transformers.convert_slow_tokenizer import bytes_to_unicode

from clip import MERGES, CLIPTextConfig
from extras.openclip import official_state_dict
from model import UNetConfig
from sampler import SIGMAS
from sd import PRESETS, LazyTensor, Preset, StableDiffusion
from vae import VAEConfig

torch.set_num_threads(1)  # most networks here are so small that threads cost more than they bring

ROOT = Path(__file__).resolve().parents[1]
SMALL = Preset(  # SD 1.x in small: same structure, same prefixes, 64x64 pictures
    UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1),
               num_heads=(2, 4), context_dim=32, num_groups=8),
    VAEConfig(ch=16, num_res_blocks=1, num_groups=4),
    (CLIPTextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2),), size=64)
SDXL_UNET = dict(class_embed_type=None, addition_embed_type="text_time")  # SDXL's y in diffusers
PROMPTS = dict(prompt="a red apple", negative_prompt="a blurry photograph, 4k")


@pytest.fixture(autouse=True)
def fixed_seed():
    """The same random numbers in every test, whichever tests run before it; and one thread."""
    torch.manual_seed(0)
    torch.set_num_threads(1)


# --- commands ---

def run_command(*args: str | Path, cwd: Path = ROOT, check: bool = True, threads: int = 1,
                **env: str) -> subprocess.CompletedProcess:
    """Run `python *args` and return stdout, stderr and the exit status.

    With `check`, a status other than 0 fails the test, which then shows stderr.
    """
    env = os.environ | {"OMP_NUM_THREADS": str(threads)} | env
    done = subprocess.run([sys.executable, *map(str, args)], cwd=cwd, env=env,
                          capture_output=True, text=True)
    assert not check or done.returncode == 0, done.stderr
    return done


def assert_linear(read: Callable[[str], object], make: Callable[[int], str]) -> None:
    """`read` takes less than a second for make(100_000), a text of so many characters.

    On a slow machine that may be more, but ten times the characters may not take a hundred times
    as long, then. The best of three tries counts: collecting garbage takes half a second here.
    """
    def seconds(text: str) -> float:
        began = time.process_time()
        read(text)
        return time.process_time() - began

    def best(length: int) -> float:
        return min(seconds(make(length)) for _ in range(3))
    assert seconds(make(100_000)) < 1 or best(100_000) < 30 * best(10_000)


# --- models ---

def small(name: str) -> Preset:
    """The row of PRESETS with its widths and depths cut, for 64x64 pictures; all else is kept."""
    row = PRESETS[name]
    levels = len(row.unet.channel_mult)
    two = len(row.text_encoders) == 2
    encoders = [replace(row.text_encoders[0], hidden_size=32, num_hidden_layers=3,
                        num_attention_heads=2)]
    if two:
        encoders.append(replace(row.text_encoders[1], hidden_size=48, num_hidden_layers=3,
                                num_attention_heads=3))
    depths = [min(depth, level) for level, depth in enumerate(row.unet.transformer_depth, 1)]
    unet = replace(
        row.unet, model_channels=32, num_res_blocks=1, num_heads=(1, 2, 4, 4)[:levels],
        num_groups=8, transformer_depth=tuple(depths),
        transformer_depth_middle=min(levels, row.unet.transformer_depth_middle),
        context_dim=80 if two else 32, adm_in_channels=48 + 6 * 16 if two else None)
    vae = replace(row.vae, ch=16, num_res_blocks=1, num_groups=4)
    return replace(row, unet=unet, vae=vae, text_encoders=tuple(encoders), size=64)


def randomize(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random: matrices keep the variance, norms are 1 +- 0.1, biases 0 +- 0.1.

    Tensors on the meta device become real. Large ones repeat two million numbers, to save time.
    """
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            parts = p.as_strided((p.numel(),), (1,)).split(2_000_003)   # a prime: rows differ
            parts[0].uniform_(-(3**0.5), 3**0.5, generator=generator)
            for part in parts[1:]:
                part.copy_(parts[0][:len(part)])
            if p.ndim == 1:
                p.mul_(0.1).add_(name.endswith("weight"))
            else:
                p.mul_(p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def random_model(preset: Preset = SMALL) -> StableDiffusion:
    sd = StableDiffusion(preset)
    for seed, network in enumerate(sd.components.values()):
        randomize(network, seed)
    return sd


def cast(sd: StableDiffusion, dtype: torch.dtype) -> None:
    """Load a model's own weights anew, as another dtype."""
    tensors = {name: LazyTensor(tensor.shape, tensor.clone)
               for name, tensor in sd.state_dict().items()}
    sd.load_weights(tensors, "cpu", dtype)


def available_memory() -> float:
    """GB that are free or would be at once. Only Linux says so; elsewhere infinity."""
    if sys.platform != "linux":
        return math.inf
    found = re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())
    return int(found[1]) / 1e6


def on_meta(network: Callable, config) -> nn.Module | StableDiffusion:
    """Without memory for its weights."""
    with torch.device("meta"):
        return network(config)


def with_prefix(prefix: str, state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {prefix + name: tensor for name, tensor in state.items()}


def manifest(name: str) -> dict[str, str]:
    """Name -> shape, such as "320x4x3x3", of what an official file holds.

    The .tsv.gz were made from the original code and configs, not from this project.
    """
    unused = "position_ids", "logit_scale"
    with gzip.open(MERGES.with_name(name + ".tsv.gz"), "rt") as lines:
        rows = [line.split("\t") for line in lines]
    return {row[0]: row[1].strip() for row in rows if not row[0].endswith(unused)}


# --- comparisons ---

def relative_error(a: Tensor, b: Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def psnr(a, b, peak: float = 255) -> float:
    """In dB. 100 dB of latents is a relative error of about 1e-5, 50 dB of pictures 0.8 of 255."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def latents_psnr(a: Tensor, b: Tensor) -> float:
    return psnr(a, b, np.ptp(b.numpy()))


def levels_apart(a, b) -> int:
    """The largest difference of two pictures, out of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def count_epsilons(network: nn.Module) -> Counter:
    """How many norms divide by sqrt(variance + this). Random weights do not show so little."""
    norms = [m for m in network.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm))]
    return Counter(norm.eps for norm in norms)


# --- the references, with our weights ---

def reference_unet(cfg: UNetConfig, state: dict[str, Tensor], **settings) -> nn.Module:
    """diffusers' UNet. `state` has official names; `settings` replace what is usual."""
    def kinds(side: str) -> list[str]:
        return [f"{'CrossAttn' if depth else ''}{side}Block2D" for depth in cfg.transformer_depth]

    usual = dict(class_embed_type=cfg.adm_in_channels and "projection",
                 projection_class_embeddings_input_dim=cfg.adm_in_channels)
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            in_channels=cfg.in_channels, out_channels=cfg.out_channels,
            block_out_channels=[cfg.model_channels * m for m in cfg.channel_mult],
            layers_per_block=cfg.num_res_blocks, norm_num_groups=cfg.num_groups,
            down_block_types=kinds("Down"), up_block_types=kinds("Up")[::-1],
            cross_attention_dim=cfg.context_dim, attention_head_dim=cfg.num_heads,
            transformer_layers_per_block=[depth or 1 for depth in cfg.transformer_depth],
            use_linear_projection=cfg.use_linear, sample_size=64,
            time_cond_proj_dim=cfg.time_cond_proj_dim, **usual | settings)
    cond_proj = [tensor for name, tensor in state.items() if name.endswith("cond_proj.weight")]
    state = convert_ldm_unet_checkpoint(state, unet.config)
    for tensor in cond_proj:  # which their code does not know
        state["time_embedding.cond_proj.weight"] = tensor
    unet.load_state_dict(state, strict=True, assign=True)
    return unet.eval().requires_grad_(False)


def reference_vae(cfg: VAEConfig, state: dict[str, Tensor]) -> nn.Module:
    """diffusers' AutoencoderKL. `state` has official names."""
    levels = len(cfg.ch_mult)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels,
            up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[cfg.ch * m for m in cfg.ch_mult],
            layers_per_block=cfg.num_res_blocks, latent_channels=cfg.z_channels,
            norm_num_groups=cfg.num_groups, scaling_factor=cfg.scale_factor)
    state = convert_ldm_vae_checkpoint(state, vae.config)
    vae.load_state_dict(state, strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def clip_config(cfg: CLIPTextConfig, **settings) -> transformers.CLIPTextConfig:
    return transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size,
        intermediate_size=4 * cfg.hidden_size, num_attention_heads=cfg.num_attention_heads,
        bos_token_id=49406, eos_token_id=49407, **settings)


def reference_text(cfg: CLIPTextConfig, state: dict[str, Tensor]) -> nn.Module:
    """transformers' CLIP. `state` has official names."""
    text = transformers.CLIPTextModel(clip_config(
        cfg, hidden_act="quick_gelu", num_hidden_layers=cfg.num_hidden_layers,
        layer_norm_eps=1e-5, max_position_embeddings=cfg.max_position_embeddings))
    text.load_state_dict(without_text_model(convert_ldm_clip_checkpoint(state)), strict=True)
    return text.eval().requires_grad_(False)


def reference_openclip(cfg: CLIPTextConfig, state: dict[str, Tensor]) -> nn.Module:
    """transformers' CLIP with OpenCLIP's weights; `state` has OpenCLIP's names.

    As in files of diffusers: SD 2.x's lacks the last layer, which is never used, and the
    projection; SDXL's has both.
    """
    layers = cfg.num_hidden_layers - cfg.final_norm
    kind = transformers.CLIPTextModelWithProjection
    if cfg.final_norm:
        kind = transformers.CLIPTextModel
    with torch.device("meta"):
        text = kind(clip_config(cfg, hidden_act="gelu", num_hidden_layers=layers,
                                projection_dim=cfg.hidden_size))
    used = {name: t for name, t in state.items() if f"resblocks.{layers}." not in name}
    state = convert_open_clip_checkpoint(text, used, prefix=cfg.prefix)
    if cfg.final_norm:
        state = without_text_model(state)
    text.load_state_dict(state, strict=True, assign=True)
    for module in text.modules():  # a buffer, which stayed on the meta device
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    return text.eval().requires_grad_(False)


def without_text_model(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """transformers 5 has no `text_model.` in the names of a CLIPTextModel."""
    return {name.removeprefix("text_model."): tensor for name, tensor in state.items()}


@cache
def reference_tokenizer() -> transformers.CLIPTokenizer:
    with gzip.open(MERGES, "rt", encoding="utf-8") as file:
        merges = [tuple(line.split()) for line in file.read().split("\n")[1:48895]]
    alphabet = list(bytes_to_unicode().values())
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(merge) for merge in merges]
    words += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {word: i for i, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=77)


@cache
def zero_padding_tokenizer() -> transformers.CLIPTokenizer:
    """SD 2.x's, and SDXL's second one: it pads with id 0, "!" without the end of a word."""
    tokenizer = deepcopy(reference_tokenizer())
    tokenizer.pad_token = "!"
    return tokenizer


@cache
def small_pair(prediction_type: str = "eps", pipeline=diffusers.StableDiffusionPipeline):
    """SMALL with random weights, and diffusers' pipeline with the same weights."""
    return model_and_pipeline(replace(SMALL, prediction_type=prediction_type), pipeline)


@cache
def pair(name: str, pipeline=diffusers.StableDiffusionPipeline):
    """A row of PRESETS in small with random weights, and diffusers' pipeline with the same."""
    return model_and_pipeline(small(name), pipeline)


def model_and_pipeline(preset: Preset, pipeline) -> tuple[StableDiffusion, object]:
    sd = random_model(preset)
    state, text = official_state_dict(sd), preset.text_encoders[0]
    vae = reference_vae(preset.vae, state)
    if len(preset.text_encoders) == 2:
        unet = reference_unet(preset.unet, state, **SDXL_UNET, addition_time_embed_dim=16)
        pipe = pipeline(vae, reference_text(text, state),
                        reference_openclip(preset.text_encoders[1], state), reference_tokenizer(),
                        zero_padding_tokenizer(), unet, make_scheduler("ddim", "leading"),
                        add_watermarker=False)
    else:
        encoder, tokenizer = reference_text, reference_tokenizer
        if text.openclip:
            encoder, tokenizer = reference_openclip, zero_padding_tokenizer
        pipe = pipeline(vae, encoder(text, state), tokenizer(), reference_unet(preset.unet, state),
                        None, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return sd, pipe


# --- pictures, theirs and ours ---

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING = dict(timestep_spacing="leading", steps_offset=1)
LINSPACE = dict(timestep_spacing="linspace")
TRAILING = dict(timestep_spacing="trailing")
DPMPP = dict(algorithm_type="dpmsolver++", solver_order=2, **TRAILING)
KARRAS = dict(use_karras_sigmas=True)
SCHEDULERS = {  # (our sampler, our spacing): (diffusers' scheduler, its settings beside BETAS)
    ("ddim", "leading"): (
        diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False, **LEADING)),
    ("ddpm", "leading"): (diffusers.DDPMScheduler, dict(clip_sample=False, **LEADING)),
    ("euler", "linspace"): (diffusers.EulerDiscreteScheduler, LINSPACE),
    ("euler", "leading"): (diffusers.EulerDiscreteScheduler, LEADING),
    ("euler", "trailing"): (diffusers.EulerDiscreteScheduler, TRAILING),
    ("euler", "karras"): (diffusers.EulerDiscreteScheduler, LINSPACE | KARRAS),
    ("euler_a", "linspace"): (diffusers.EulerAncestralDiscreteScheduler, LINSPACE),
    ("dpmpp_2m", "trailing"): (diffusers.DPMSolverMultistepScheduler, DPMPP),
    ("dpmpp_2m", "karras"): (diffusers.DPMSolverMultistepScheduler, DPMPP | KARRAS),
}
PREDICTION_TYPES = {"eps": "epsilon", "v": "v_prediction"}  # ours: diffusers'
# We start from noise * sqrt(sigma_max^2 + 1), the exact scale; diffusers' Euler from
# noise * sigma_max. This is the factor between them.
EULER_START = (1 + 1 / float(SIGMAS[-1]) ** 2) ** 0.5


def make_scheduler(name: str, spacing: str, prediction_type: str = "eps"):
    """diffusers' scheduler that does what this sampler of ours does."""
    kind, settings = SCHEDULERS[name, spacing]
    return kind(**BETAS, **settings, prediction_type=PREDICTION_TYPES[prediction_type])


def our_picture(sd: StableDiffusion, prompt: str = PROMPTS["prompt"],
                draw: Callable = StableDiffusion.generate, **options):
    """`draw(sd, prompt, ...)` from seed 5: the picture, and the latents it was decoded from."""
    seen = []

    def decode_latents(z: Tensor) -> list[Image.Image]:
        seen.append(z)
        return StableDiffusion.decode_latents(sd, z)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "decode_latents", decode_latents)
        image, = draw(sd, prompt, seed=5, **options)
    return image, seen[0]


def their_picture(pipe, prompt: str = PROMPTS["prompt"], start: float = 1.0, **options):
    """The same of diffusers. `start` is a factor of the first noise."""
    generator, seen = torch.Generator().manual_seed(5), []
    if start != 1:
        shape = 1, 4, options.get("height", 64) // 8, options.get("width", 64) // 8
        options["latents"] = torch.randn(shape, generator=generator) * start

    def on_step_end(pipe, index: int, time: int, inputs: dict) -> dict:
        seen.append(inputs["latents"])
        return {}

    image, = pipe(prompt, generator=generator, callback_on_step_end=on_step_end, **options).images
    return image, seen[-1]


def assert_agree(ours, theirs, latents: float = 0.0) -> None:
    """Pictures agree to 50 dB, latents to so many. `pytest -s` shows the dB."""
    found, found_latents = psnr(ours[0], theirs[0]), latents_psnr(ours[1], theirs[1])
    print(f"picture {found:.1f} dB, latents {found_latents:.1f} dB")
    assert found >= 50 and found_latents >= latents


@cache
def photograph(width: int = 64, height: int = 64) -> Image.Image:
    """A picture of random colors."""
    colors = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(colors)


@cache
def disc_mask(width: int = 64, height: int = 64) -> Image.Image:
    """A disc with a gray rim, which cuts through latents."""
    y, x = np.mgrid[:height, :width]
    inside = np.clip(0.36 * width - np.hypot(x - 0.4 * width, y - 0.6 * height), 0, 1)
    return Image.fromarray((255 * inside).astype(np.uint8))


# --- prompts ---

def awkward_prompts() -> list[str]:
    """377 prompts with what tokenizers stumble over."""
    prompts = [
        "I love cats and dogs.", "", " ", " \t\n ", "a", "!", "!!!", "?!...,,,;;", "--==##@@",
        "a photo of a cat, 4k, 8K uhd, trending on artstation", "café",
        unicodedata.normalize("NFD", "café Ångström ñandú ệ"), "Ångström ñandú ệ", "naïve façade",
        "straße STRASSE ẞ", "İstanbul ıI", "ΌΣΟΣ ὈΔΥΣΣΕΎΣ", "猫と犬が好き", "红色的苹果",
        "사과 두 개", "красное яблоко", "تفاحة حمراء", "תפוח אדום", "लाल सेब", "แอปเปิ้ล",
        "mixed 日本語 and English и русский", "🍎", "👨‍👩‍👧‍👦 family", "❤️🔥", "🏳️‍🌈flag", "👍🏽ok",
        "cat🐱dog", "1️⃣", "I'm you're they've we'll he'd it's can't",
        "I'M YOU'RE THEY'VE WE'LL HE'D IT'S CAN'T", "'s't're've'm'll'd", "rock'n'roll o'clock '90s",
        "don’t “quote”", "h2o 3d 1234567890 4k2 v1.5 3.14", "²³½ Ⅷ ٣ ①",
        "&amp; &lt;b&gt; &#39; &nbsp;", "<b>bold</b>", "a\tb\nc\r\nd", "a\u00a0b", "a\u200bb",
        "a\u200db", "\ufeffbom", "a\u2003b\u3000c", "a\u0085b\u001cc\u180ed", "a\x00b\x07c",
        "  many   spaces  ", "word " * 200, "supercalifragilisticexpialidocious" * 5, "a" * 300,
        "." * 300, "<|endoftext|>", "a <|endoftext|> b", "<|startoftext|>a<|endoftext|>",
        "a<|endoftext|>b", "<|ENDOFTEXT|>", "a <|StartOfText|>, b", "<|endoftext|",
        "snake_case CamelCase kebab-case", "http://a.b/c?d=e&f=g#h", "C:\\path\\file.txt", "a_b__c",
        "ﬁne ligature", "ǅ ŉ ß ſ", "e\u0301\u0301", "\u0301", "क्ष", "a\u0308\u0323 \u1e00",
        "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ＦＵＬＬｗｉｄｔｈ", "(a:1.3) [b] {c|d}", "100% $5 €7 £8 ¥9", "~`^*+=|",
    ]
    rng = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF),
              (0x900, 0xDFF), (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF),
              (0x20, 0xD7FF)]
    for _ in range(300):
        chosen = rng.sample(ranges, rng.randint(1, 3))
        letters = [chr(rng.randint(*rng.choice(chosen))) if rng.random() < 0.8 else " "
                   for _ in range(rng.randint(1, 60))]
        prompts.append("".join(letters))
    return prompts
