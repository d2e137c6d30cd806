"""Parity: what this project computes against independent implementations and closed forms. No downloads.

    pip install -r requirements-test.txt
    pytest test_sd.py

The references are diffusers (UNet, VAE, samplers, whole pipelines), transformers (token ids, text features), the exact
solution of the reverse process for Gaussian data, and the formulas of the papers. Weights are random everywhere, the
norms and the zero-initialised layers too, so that no path multiplies by zero or one; diffusers' own code renames them.
"""
import gzip
import math
import platform
import random
import re
import subprocess
import sys
import unicodedata
import warnings
from collections import Counter
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from diffusers.loaders.single_file_utils import convert_ldm_clip_checkpoint, convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.convert_slow_tokenizer import bytes_to_unicode

import sampler
import sd as sd_module
from checkpoint import converted
from clip import MERGES, CLIPTextConfig, CLIPTextModel, Tokenizer
from heatmaps import HeatMaps
from model import (CrossAttention, Linear, ResBlock, UNetConfig, UNetModel, attention, attention_in_blocks, deep_kept, replayed, timestep_embedding,
                   upsample, watching)
from sampler import (ALPHAS_CUMPROD, PREDICTIONS, SAMPLERS, SIGMAS, SPACINGS, denoiser, guided, q_sample, sample_ancestral, sigma_to_t, target,
                     training_sigmas)
from sd import PRESETS, Preset, StableDiffusion, UserError
from vae import AutoencoderKL, Downsample, VAEConfig, kl_divergence

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
torch.set_num_threads(1)  # most networks here are so small that threads cost more than they bring

SMALL = Preset(  # SD 1.x in small: same structure, same prefixes, 64x64 pictures
    UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(1, 1), num_heads=(2, 4), context_dim=32,
               num_groups=8),
    VAEConfig(ch=16, num_res_blocks=1, num_groups=4),
    CLIPTextConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2), size=64)


# --- helpers ---

@pytest.fixture(autouse=True)
def same_numbers_every_time():
    torch.manual_seed(0)


def randomise(module: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random: matrices keep the variance, norms are 1 +- 0.1, biases 0 +- 0.1. Meta tensors become real."""
    module.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.uniform_(-(3**0.5), 3**0.5, generator=generator)
            if p.ndim == 1:
                p.mul_(0.1).add_(name.endswith("weight"))
            else:
                p.mul_(p[0].numel() ** -0.5)
    return module.eval().requires_grad_(False)


def random_model(config: Preset = SMALL) -> StableDiffusion:
    sd = StableDiffusion(config)
    for seed, part in enumerate(sd.parts.values()):
        randomise(part, seed)
    return sd


def on_meta(network, config):
    with torch.device("meta"):
        return network(config)


def reference_unet(cfg: UNetConfig, state: dict, **more) -> nn.Module:
    """`more`: what diffusers calls things, where the usual is not meant."""
    def kinds(side):
        return [("CrossAttn" if depth else "") + side + "Block2D" for depth in cfg.transformer_depth]
    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            in_channels=cfg.in_channels, out_channels=cfg.out_channels, block_out_channels=[cfg.model_channels * m for m in cfg.channel_mult],
            layers_per_block=cfg.num_res_blocks, down_block_types=kinds("Down"), up_block_types=kinds("Up")[::-1],
            cross_attention_dim=cfg.context_dim, attention_head_dim=cfg.num_heads, norm_num_groups=cfg.num_groups,
            transformer_layers_per_block=[depth or 1 for depth in cfg.transformer_depth], use_linear_projection=cfg.use_linear, sample_size=64,
            time_cond_proj_dim=cfg.time_cond_proj_dim,
            **dict(class_embed_type=cfg.adm_in_channels and "projection", projection_class_embeddings_input_dim=cfg.adm_in_channels) | more)
    state = convert_ldm_unet_checkpoint(state, unet.config) | {  # which does not know this one
        "time_embedding.cond_proj.weight": t for name, t in state.items() if name.endswith("cond_proj.weight")}
    unet.load_state_dict(state, strict=True, assign=True)
    return unet.eval().requires_grad_(False)


def reference_vae(cfg: VAEConfig, state: dict) -> nn.Module:
    levels = len(cfg.ch_mult)
    with torch.device("meta"):
        vae = diffusers.AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
            block_out_channels=[cfg.ch * m for m in cfg.ch_mult], layers_per_block=cfg.num_res_blocks, latent_channels=cfg.z_channels,
            norm_num_groups=cfg.num_groups, scaling_factor=cfg.scale_factor)
    vae.load_state_dict(convert_ldm_vae_checkpoint(state, vae.config), strict=True, assign=True)
    return vae.eval().requires_grad_(False)


def reference_text(cfg: CLIPTextConfig, state: dict) -> nn.Module:
    text = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=4 * cfg.hidden_size, hidden_act="quick_gelu",
        num_hidden_layers=cfg.num_hidden_layers, num_attention_heads=cfg.num_attention_heads, layer_norm_eps=1e-5,
        max_position_embeddings=cfg.max_position_embeddings, bos_token_id=49406, eos_token_id=49407))
    state = {name.removeprefix("text_model."): t for name, t in convert_ldm_clip_checkpoint(state).items()}  # transformers 5 drops it
    text.load_state_dict(state, strict=True)
    return text.eval().requires_grad_(False)


@cache
def reference_tokenizer() -> transformers.CLIPTokenizer:
    merges = [tuple(line.split()) for line in gzip.open(MERGES, "rt", encoding="utf-8").read().split("\n")[1:48895]]
    alphabet = list(bytes_to_unicode().values())
    words = alphabet + [a + "</w>" for a in alphabet] + ["".join(m) for m in merges] + ["<|startoftext|>", "<|endoftext|>"]
    return transformers.CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=merges, model_max_length=77)


@cache
def pair(prediction: str, pipeline=diffusers.StableDiffusionPipeline):
    """A small random model, and diffusers' pipeline with the same weights."""
    sd = random_model(replace(SMALL, prediction=prediction))
    state = sd.state_dict()
    pipe = pipeline(reference_vae(SMALL.vae, state), reference_text(SMALL.text, state), reference_tokenizer(), reference_unet(SMALL.unet, state),
                    None, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return sd, pipe


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    assert a.shape == b.shape
    return float((a - b).abs().max() / b.abs().max())


def epsilons(network: nn.Module) -> Counter:
    """How many norms divide by sqrt(variance + this): too small a matter for random weights to show."""
    return Counter(m.eps for m in network.modules() if isinstance(m, (nn.GroupNorm, nn.LayerNorm)))


def psnr(a, b, peak: float = 255) -> float:
    """In dB; 100 dB of latents is a relative error of about 1e-5, 50 dB of pictures is 0.8 levels out of 255."""
    error = np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2)
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


# --- names and shapes ---

def test_names_and_shapes_are_those_of_official_files():
    """sd1.tsv.gz was derived from the original code and configs, not from this project."""
    rows = [line.split("\t") for line in gzip.open(Path(MERGES).with_name("sd1.tsv.gz"), "rt")]
    wanted = {row[0]: row[1].strip() for row in rows if not row[0].endswith("position_ids")}
    state = on_meta(StableDiffusion, PRESETS["sd1"]).state_dict()
    assert {name: "x".join(map(str, t.shape)) for name, t in state.items()} == wanted
    assert sum(t.numel() for t in state.values()) == 859_520_964 + 83_653_863 + 123_060_480


# --- the networks, full size (SD 2.x and SDXL: test_family.py) ---

@pytest.mark.parametrize("name", ["sd1", "emoji"])
def test_text_equals_transformers(name):
    text = randomise(on_meta(CLIPTextModel, PRESETS[name].text))
    reference = reference_text(text.cfg, {"cond_stage_model.transformer.text_model." + k: v for k, v in text.state_dict().items()})
    assert epsilons(text) == epsilons(reference)
    tokens = Tokenizer()(["a red apple", "", "cat " * 75])
    features, wanted = text(tokens), reference(tokens)
    assert relative_error(features, wanted.last_hidden_state) < 1e-5
    assert relative_error(text.pool(features, tokens), wanted.pooler_output) < 1e-5


@pytest.mark.parametrize("name", ["sd1", "emoji"])
def test_unet_equals_diffusers(name):
    """At a usual and an odd size, each row with a time of its own, one of them a fraction."""
    unet = randomise(on_meta(UNetModel, PRESETS[name].unet))
    cfg = unet.cfg
    reference = reference_unet(cfg, {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()})
    assert epsilons(unet) == epsilons(reference)
    t, context = torch.tensor([981.0, 37.25]), torch.randn(2, 77, cfg.context_dim)
    y = None if cfg.adm_in_channels is None else torch.randn(2, cfg.adm_in_channels)
    for height, width in (16, 16), (11, 13):
        x = torch.randn(2, cfg.in_channels, height, width)
        assert relative_error(unet(x, t, context, y), reference(x, t, context, class_labels=y).sample) < 1e-5


def test_one_x_meets_several_contexts():
    """As in guidance: x without copies, what comes before the words is computed once. With copies, it is not; nor if the times differ."""
    unet = randomise(UNetModel(SMALL.unet))
    reference = reference_unet(SMALL.unet, {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()})
    x, contexts, sizes = torch.randn(1, 4, 16, 24).expand(3, -1, -1, -1), torch.randn(3, 77, 32), []
    for layer in unet.input_blocks[0], unet.input_blocks[1][0], unet.input_blocks[1][1].transformer_blocks[0].attn1, unet.input_blocks[1]:
        layer.register_forward_hook(lambda layer, args, out: sizes.append(len(out)))
    for given, t, once in (x, torch.tensor([500]).expand(3), True), (x.contiguous(), torch.tensor([500]).expand(3), False), (x, torch.tensor([1, 500, 999]), False):
        sizes.clear()
        assert relative_error(unet(given, t, contexts), reference(x, t, contexts).sample) < 1e-5
        assert sizes == ([1, 1, 1, 3] if once else [3, 3, 3, 3])
    sizes.clear()
    guided(denoiser(unet, "eps"), *({"context": one} for one in contexts.split(1)[:2]), 7.5)(x[:1], 7.0)
    assert sizes == [1, 1, 1, 2]


def test_guidance_of_a_function_that_ignores_its_condition():
    """As if there were none; with one x and with two, and where the condition is a picture beside it alone."""
    for x in torch.randn(1, 4, 8, 8), torch.randn(2, 4, 8, 8):
        one = {"context": torch.zeros(len(x), 77, 32)}
        torch.testing.assert_close(guided(lambda x, sigma, context: x / 2, one, one, 7.5)(x, 3.0), x / 2)
        beside = {"concat": torch.ones(len(x), 4, 8, 8)}
        net = denoiser(lambda x, t: x[:, 4:] * t[:, None, None, None], "eps")  # of the picture alone
        torch.testing.assert_close(guided(net, beside, beside, 7.5)(x, 3.0), net(x, 3.0, **beside))


def test_deep_features_kept_equal_diffusers_with_the_last_block_given_them():
    """Every third call is whole; in those between, diffusers' last block is given what came up to it in the whole one. Two contexts go their own ways."""
    unet = randomise(UNetModel(SMALL.unet))
    reference = reference_unet(SMALL.unet, {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()})
    deep = []

    def give(block: nn.Module, args: tuple) -> tuple:
        came, skip = args[0].split([args[0].shape[1] - 32, 32], dim=1)
        if whole:
            deep.append(came)
        return torch.cat([deep[-1], skip], dim=1), *args[1:]
    reference.up_blocks[-1].resnets[-1].register_forward_pre_hook(give)
    contexts = list(torch.randn(2, 1, 77, 32))
    wanted = {}
    for which, context in enumerate(contexts):
        for call in range(5):
            whole = call % 3 == 0
            wanted[which, call] = reference(torch.full((1, 4, 16, 16), call + 1.0), 900 - call, context).sample
    alone = unet(torch.full((1, 4, 16, 16), 2.0), torch.tensor([899]), contexts[0])
    with deep_kept(unet, 3):
        for call in range(5):
            for which, context in enumerate(contexts):
                found = unet(torch.full((1, 4, 16, 16), call + 1.0), torch.tensor([900 - call]), context=context)
                assert relative_error(found, wanted[which, call]) < 1e-5
    assert relative_error(alone, wanted[0, 1]) > 1e-3
    assert torch.equal(unet(torch.full((1, 4, 16, 16), 2.0), torch.tensor([899]), contexts[0]), alone)


@pytest.mark.parametrize("name", ["sd1", "sdxl", "emoji"])
def test_vae_equals_diffusers(name):
    vae = randomise(on_meta(AutoencoderKL, PRESETS[name].vae))
    reference = reference_vae(vae.cfg, {"first_stage_model." + k: v for k, v in vae.state_dict().items()})
    assert epsilons(vae) == epsilons(reference)
    x = torch.rand(1, 3, 64, 80) * 2 - 1  # so that the decoder's last doubling, of 32x40, is by a transposed convolution
    wanted = reference.encode(x).latent_dist
    mean, logvar = vae.moments(x)
    assert relative_error(mean, wanted.mean) < 1e-5 and relative_error(logvar, wanted.logvar) < 1e-5
    noise = torch.randn_like(mean)
    assert relative_error(vae.encode(x, noise), (wanted.mean + wanted.std * noise) * vae.cfg.scale_factor) < 1e-5
    assert relative_error(vae.decode(mean * vae.cfg.scale_factor), reference.decode(mean).sample) < 1e-5


def test_log_variance_is_clamped():
    vae = randomise(AutoencoderKL(SMALL.vae))
    vae.quant_conv.bias[4:] = torch.tensor([-99.0, -9.0, 9.0, 99.0])
    _, logvar = vae.moments(torch.rand(1, 3, 16, 16))
    assert logvar.amin((0, 2, 3)).round().tolist()[::3] == [-30, 20] and -12 < logvar[:, 1].mean() < -6 and 6 < logvar[:, 2].mean() < 12


def test_kl_divergence_is_that_of_gaussians():
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    wanted = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (logvar / 2).exp()), torch.distributions.Normal(0, 1))
    torch.testing.assert_close(kl_divergence(mean, logvar), wanted.sum() / 3)


# --- token ids ---

def awkward_prompts() -> list[str]:
    prompts = [
        "I love cats and dogs.", "", " ", " \t\n ", "a", "!", "!!!", "?!...,,,;;", "--==##@@",
        "a photo of a cat, 4k, 8K uhd, trending on artstation", "café", unicodedata.normalize("NFD", "café Ångström ñandú ệ"),
        "Ångström ñandú ệ", "naïve façade", "straße STRASSE ẞ", "İstanbul ıI", "ΌΣΟΣ ὈΔΥΣΣΕΎΣ", "猫と犬が好き", "红色的苹果", "사과 두 개",
        "красное яблоко", "تفاحة حمراء", "תפוח אדום", "लाल सेब", "แอปเปิ้ล", "mixed 日本語 and English и русский", "🍎", "👨‍👩‍👧‍👦 family",
        "❤️🔥", "🏳️‍🌈flag", "👍🏽ok", "cat🐱dog", "1️⃣", "I'm you're they've we'll he'd it's can't",
        "I'M YOU'RE THEY'VE WE'LL HE'D IT'S CAN'T", "'s't're've'm'll'd", "rock'n'roll o'clock '90s", "don’t “quote”",
        "h2o 3d 1234567890 4k2 v1.5 3.14", "²³½ Ⅷ ٣ ①", "&amp; &lt;b&gt; &#39; &nbsp;", "<b>bold</b>", "a\tb\nc\r\nd", "a\u00a0b",
        "a\u200bb", "a\u200db", "\ufeffbom", "a\u2003b\u3000c", "a\u0085b\u001cc\u180ed", "a\x00b\x07c", "  many   spaces  ",
        "word " * 200, "supercalifragilisticexpialidocious" * 5, "a" * 300, "." * 300, "<|endoftext|>", "a <|endoftext|> b",
        "<|startoftext|>a<|endoftext|>", "a<|endoftext|>b", "<|ENDOFTEXT|>", "a <|StartOfText|>, b", "<|endoftext|",
        "snake_case CamelCase kebab-case", "http://a.b/c?d=e&f=g#h", "C:\\path\\file.txt", "a_b__c", "ﬁne ligature", "ǅ ŉ ß ſ",
        "e\u0301\u0301", "\u0301", "क्ष", "a\u0308\u0323 \u1e00", "𝔘𝔫𝔦𝔠𝔬𝔡𝔢", "ＦＵＬＬｗｉｄｔｈ", "(a:1.3) [b] {c|d}", "100% $5 €7 £8 ¥9",
        "~`^*+=|",
    ]
    rng = random.Random(0)
    ranges = [(0x20, 0x7E), (0xA0, 0x24F), (0x300, 0x36F), (0x370, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF),
              (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0x1F300, 0x1FAFF), (0x20, 0xD7FF)]
    for i in range(300):
        chosen = rng.sample(ranges, rng.randint(1, 3))
        prompts.append("".join(chr(rng.randint(*rng.choice(chosen))) if rng.random() < 0.8 else " " for _ in range(rng.randint(1, 60))))
    return prompts


@pytest.mark.filterwarnings("ignore:the prompt is")
def test_ids_equal_transformers():
    """377 awkward prompts, padded with the end token to 77 and cut to 77."""
    prompts = awkward_prompts()
    ours = Tokenizer()(prompts).tolist()
    theirs = reference_tokenizer()(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    assert {p: (a, b) for p, a, b in zip(prompts, ours, theirs) if a != b} == {}


def test_known_ids():
    tokenizer = Tokenizer()
    assert tokenizer("I love cats and dogs.")[0, :8].tolist() == [49406, 328, 793, 3989, 537, 3255, 269, 49407]
    assert tokenizer("").tolist() == [[49406] + [49407] * 76]
    assert [i for i, _ in tokenizer.tokens("4k !")] == [275, 330, 256]
    assert tokenizer(["a", "b", "c"]).shape == (3, 77)


def test_long_prompts_are_rows_of_75():
    """Each row with its own start and end, the shorter prompt's others empty, all as transformers encodes them; the vectors stand one row after the other."""
    sd = random_model()
    reference, ids = reference_text(SMALL.text, sd.state_dict()), reference_tokenizer()
    prompts = ["a cat", " ".join(f"word{i}" for i in range(40))]
    tokens = ids(prompts[1], add_special_tokens=False).input_ids
    assert 75 < len(tokens) <= 150
    rows = [[49406, *ids(prompts[0], add_special_tokens=False).input_ids], [49406], [49406, *tokens[:75]], [49406, *tokens[75:]]]
    rows = torch.tensor([row + [49407] * (77 - len(row)) for row in rows])
    theirs = reference(rows).last_hidden_state.reshape(2, 154, -1)
    assert relative_error(sd.condition(prompts)["context"], theirs) < 1e-5
    weighted = sd.told(["a cat"], prompts[1], 7.5, 64, 64)
    assert [told["context"].shape[1] for _, told in weighted] == [154, 154]
    assert relative_error(weighted[1][1]["context"], theirs[:1]) < 1e-5


def test_weighted_words():
    """The vectors of the words in brackets are multiplied, then all brought back to the mean they had; brackets and numbers are no tokens."""
    sd = random_model()
    plain, = sd.condition(["a red, big apple"])["context"]
    places = torch.tensor([2, 3, 4])                                                # "red", ",", "big"
    factors = torch.ones(77).index_fill(0, places, 1.3)
    factors[5] = 0.5                                                                # "apple"
    expected = plain * factors[:, None]
    expected = expected * (plain.mean() / expected.mean())
    found, = sd.condition(["a (red, big:1.3) (apple:.5)"])["context"]
    assert relative_error(found, expected) < 1e-5
    assert not torch.allclose(found, plain, atol=1e-3)


@pytest.mark.parametrize("prompt", ["a red apple", "(a red apple)", "((red)) [apple]", "a (red: apple)", ":1.3)", ""])
def test_a_plain_prompt_is_the_single_row_it_was(prompt):
    sd = random_model()
    assert torch.equal(sd.condition([prompt])["context"], sd.text(sd.tokenizer([prompt])))


def test_a_cut_prompt_keeps_its_end_and_warns_with_the_words_cut():
    with pytest.warns(UserWarning) as record:
        ids = Tokenizer()("cat " * 75 + "and two Dogs, café")[0]
    assert ids[75] == 2368 and ids[76] == 49407
    assert len(record) == 1 and "'and two Dogs, café'" in str(record[0].message)
    with warnings.catch_warnings(action="error"):
        Tokenizer()("cat " * 75)


# --- whole pictures against diffusers' pipelines ---

BETAS = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING = dict(timestep_spacing="leading", steps_offset=1)
DPMPP = dict(algorithm_type="dpmsolver++", solver_order=2)
SCHEDULERS = {  # (our sampler, our spacing): (diffusers' scheduler, its settings beside BETAS)
    ("ddim", "leading"): (diffusers.DDIMScheduler, dict(clip_sample=False, set_alpha_to_one=False, **LEADING)),
    ("ddpm", "leading"): (diffusers.DDPMScheduler, dict(clip_sample=False, **LEADING)),
    ("euler", "linspace"): (diffusers.EulerDiscreteScheduler, dict(timestep_spacing="linspace")),
    ("euler", "leading"): (diffusers.EulerDiscreteScheduler, LEADING),
    ("euler", "trailing"): (diffusers.EulerDiscreteScheduler, dict(timestep_spacing="trailing")),
    ("euler", "karras"): (diffusers.EulerDiscreteScheduler, dict(timestep_spacing="linspace", use_karras_sigmas=True)),
    ("euler_a", "linspace"): (diffusers.EulerAncestralDiscreteScheduler, dict(timestep_spacing="linspace")),
    ("dpmpp_2m", "trailing"): (diffusers.DPMSolverMultistepScheduler, dict(timestep_spacing="trailing", **DPMPP)),
    ("dpmpp_2m", "karras"): (diffusers.DPMSolverMultistepScheduler, dict(timestep_spacing="trailing", use_karras_sigmas=True, **DPMPP)),
}
PROMPTS = dict(prompt="a red apple", negative_prompt="a blurry photograph, 4k")


def scheduler(name: str, spacing: str, prediction: str = "eps"):
    kind, settings = SCHEDULERS[name, spacing]
    return kind(**BETAS, **settings, prediction_type={"eps": "epsilon", "v": "v_prediction"}[prediction])


def our_picture(sd: StableDiffusion, name: str, spacing: str, steps: int, **kw):
    """The picture and the latents it was decoded from."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "decode_latents", lambda z: seen.append(z) or StableDiffusion.decode_latents(sd, z))
        image, = sd.generate(**PROMPTS, steps=steps, guidance=7.5, sampler=name, spacing=spacing, seed=5, **kw)
    return image, seen[0]


def their_picture(pipe, steps: int, **kw):
    seen = []
    kw = dict(generator=torch.Generator().manual_seed(5), **PROMPTS) | kw
    image, = pipe(num_inference_steps=steps, guidance_scale=7.5,
                  callback_on_step_end=lambda pipe, i, t, now: seen.append(now["latents"]) or {}, **kw).images
    return image, seen[-1]


COMPARED = [(name, spacing, steps) for name, spacing in SCHEDULERS for steps in (1, 7, 20, 30)  # 7 and 30 do not divide 1000
            # left out: diffusers' Euler makes its only step from time 0, where there is no noise to remove
            if not (steps == 1 and name.startswith("euler") and spacing in ("linspace", "karras"))]


@pytest.mark.parametrize("name, spacing, steps", COMPARED)
def test_picture_equals_diffusers(name, spacing, steps):
    """From the same weights, prompts, seed and number of steps. `pytest -s` shows the dB."""
    sd, pipe = pair("eps")
    pipe.scheduler = scheduler(name, spacing)
    ours, our_latents = our_picture(sd, name, spacing, steps)
    theirs, their_latents = their_picture(pipe, steps, width=64, height=64)
    latents = psnr(our_latents, their_latents, np.ptp(their_latents.numpy()))
    print(f"{name} {spacing} {steps}: picture {psnr(ours, theirs):.1f} dB, latents {latents:.1f} dB")
    assert psnr(ours, theirs) >= 50


@pytest.mark.parametrize("prediction", ["eps", "v"])
@pytest.mark.parametrize("name, spacing", SCHEDULERS)
def test_two_choices_explain_every_difference_from_diffusers(name, spacing, prediction, monkeypatch):
    """Undo both and latents agree to rounding: we start from noise * sqrt(sigma_max^2 + 1), the exact scale, where diffusers' Euler
    takes noise * sigma_max; and we tell the UNet fractional times with karras, where diffusers' DPM++ rounds them."""
    sd, pipe = pair(prediction)
    pipe.scheduler = scheduler(name, spacing, prediction)
    if name == "dpmpp_2m":
        monkeypatch.setattr(sampler, "sigma_to_t", lambda *sigma: float(round(sigma_to_t(*sigma))))
    start = (1 + 1 / SIGMAS[-1] ** 2) ** 0.5 if name.startswith("euler") and spacing != "leading" else 1
    generator = torch.Generator().manual_seed(5)
    _, ours = our_picture(sd, name, spacing, 13)
    _, theirs = their_picture(pipe, 13, width=64, height=64, generator=generator, latents=torch.randn(1, 4, 8, 8, generator=generator) * start)
    print(f"{name} {spacing} {prediction}: latents {psnr(ours, theirs, np.ptp(theirs.numpy())):.1f} dB")
    assert psnr(ours, theirs, np.ptp(theirs.numpy())) >= 100


@pytest.mark.parametrize("last, wanted", [(0, 60), (4.8973451890853435e-08, 100)])
def test_zero_terminal_snr_equals_diffusers(last, wanted):
    """Its DDIM with rescaled betas, whose last abar is 0; to rounding, if it is the number that ours is: noising, velocity and picture."""
    sd, pipe = pair("v-zero-snr")
    pipe.scheduler = diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False, timestep_spacing="trailing", prediction_type="v_prediction",
                                             rescale_betas_zero_snr=True)
    assert pipe.scheduler.alphas_cumprod[-1] == 0
    pipe.scheduler.alphas_cumprod[-1] = last
    t = torch.arange(1000)
    x0, noise = torch.randn(2, 1000, 4, 2, 2)
    for ours, theirs in ((q_sample(x0, t, noise, "v-zero-snr"), pipe.scheduler.add_noise(x0, noise, t)),
                         (target("v-zero-snr", x0, t, noise), pipe.scheduler.get_velocity(x0, noise, t))):
        assert psnr(ours, theirs, np.ptp(theirs.numpy())) >= wanted
        assert relative_error(ours, theirs) < (1e-3 if last == 0 else 1e-5)
    for steps in (1, 20):  # divisors of 1000: else diffusers' DDIM steps to other times than those it goes on with
        _, ours = our_picture(sd, "ddim", "trailing", steps)
        _, theirs = their_picture(pipe, steps, width=64, height=64)
        print(f"zero SNR, {steps} steps: latents {psnr(ours, theirs, np.ptp(theirs.numpy())):.1f} dB")
        assert psnr(ours, theirs, np.ptp(theirs.numpy())) >= wanted


def test_pictures_become_numbers_and_back_as_in_diffusers():
    """Levels 0...255 are -1...1 and are rounded: cutting instead would change half of them."""
    sd, pipe = pair("eps")
    z = torch.randn(2, 4, 8, 8)
    ours = sd.decode_latents(z)
    theirs = pipe.image_processor.postprocess(pipe.vae.decode(z / pipe.vae.config.scaling_factor).sample)
    assert np.mean(np.stack(ours) != np.stack(theirs)) < 1e-3
    mean = pipe.vae.encode(pipe.image_processor.preprocess(theirs)).latent_dist.mean * pipe.vae.config.scaling_factor
    assert relative_error(sd.encode_image(theirs), mean) < 1e-5


def test_the_comparison_tells_samplers_apart():
    """The control: ddim against diffusers' Euler, one step more, a little less guidance, one letter more are all below 40 dB."""
    sd, pipe = pair("eps")
    ours, _ = our_picture(sd, "ddim", "leading", 20)
    pipe.scheduler = scheduler("euler", "linspace")
    assert psnr(ours, their_picture(pipe, 20, width=64, height=64)[0]) < 40
    pipe.scheduler = scheduler("ddim", "leading")
    for other in (dict(steps=21), dict(steps=20, guidance_scale=6.5), dict(steps=20, prompt="a red apples")):
        seen = pipe(**dict(guidance_scale=7.5, num_inference_steps=other.pop("steps"), width=64, height=64) | PROMPTS | other,
                    generator=torch.Generator().manual_seed(5)).images[0]
        assert psnr(ours, seen) < 40


@pytest.mark.parametrize("strength", [0.5, 0.8])
@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "linspace")])
def test_picture_from_picture_equals_diffusers(name, spacing, strength):
    sd, pipe = pair("eps", diffusers.StableDiffusionImg2ImgPipeline)
    pipe.scheduler = scheduler(name, spacing)
    init = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    ours, _ = our_picture(sd, name, spacing, 30, init=init, strength=strength)
    theirs, _ = their_picture(pipe, 30, image=init, strength=strength)
    print(f"{name} {strength}: {psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


# --- samplers against closed forms ---

MU, STD = 0.3, 0.5  # the data: N(MU, STD^2), for which the best guess and the reverse process are known exactly


def exact_denoise(x, sigma):
    return (STD**2 * x + sigma**2 * MU) / (STD**2 + sigma**2)


def run(sample, x, sigmas, draw=None, denoise=exact_denoise):
    *_, last = sample(denoise, x, sigmas, draw)
    return last.x


def test_schedule_constants():
    assert ALPHAS_CUMPROD[[0, -1]].tolist() == pytest.approx([0.99915, 0.0046601], rel=1e-5)
    assert SIGMAS[[0, -1]].tolist() == pytest.approx([0.029167, 14.6146], rel=1e-5)
    wanted = [14.6146, 9.1029, 5.4784, 3.1686, 1.7494, 0.9141, 0.4469, 0.2014, 0.0819, 0.0292]
    assert SPACINGS["karras"](10) == pytest.approx(wanted, abs=5e-5)


def test_times_of_the_spacings():
    def times(spacing, n):
        return [sigma_to_t(sigma) for sigma in SPACINGS[spacing](n)]
    assert times("leading", 50) == pytest.approx(range(981, 0, -20), abs=1e-6)
    assert times("leading", 20) == pytest.approx(range(951, 0, -50), abs=1e-6)
    assert times("trailing", 20) == pytest.approx(range(999, 0, -50), abs=1e-6)
    assert times("linspace", 20)[:3] + times("linspace", 20)[-1:] == pytest.approx([999, 946.42, 893.84, 0], abs=0.01)
    assert [sigma_to_t(float(sigma)) for sigma in SIGMAS] == pytest.approx(range(1000), abs=1e-6)


@pytest.mark.parametrize("spacing", SPACINGS)
def test_n_steps_have_n_falling_sigmas(spacing):
    for n in [*range(1, 41), 49, 50, 99, 100, 110, 250, 333, 334, 500, 501, 700, 998, 999, 1000]:
        sigmas = SPACINGS[spacing](n)
        assert len(sigmas) == n and all(a > b > 0 for a, b in zip(sigmas, sigmas[1:])), n
        assert SIGMAS[0] * 0.999999 <= sigmas[-1] and sigmas[0] <= SIGMAS[-1] * 1.000001


@pytest.mark.parametrize("name, order", [("ddim", 1), ("euler", 1), ("dpmpp_2m", 2)])
def test_solvers_converge_to_the_exact_path_with_their_order(name, order):
    x = torch.linspace(-30, 30, 7, dtype=torch.float64)
    errors = []
    for n in (50, 100, 200, 400):
        sigmas = SPACINGS["karras"](n + 1)
        exact = MU + (x - MU) * math.sqrt((STD**2 + sigmas[-1] ** 2) / (STD**2 + sigmas[0] ** 2))
        errors.append(float((run(SAMPLERS[name].sample, x, sigmas) - exact).abs().max()))
    assert [math.log2(a / b) for a, b in zip(errors, errors[1:])] == pytest.approx([order] * 3, abs=0.15), errors


@pytest.mark.parametrize("name", ["ddpm", "euler_a"])
def test_ancestral_sampling_reproduces_the_data(name):
    """Mean and standard deviation within three standard errors, from 20,000 samples of 2000 steps."""
    n, sigmas = 20_000, SPACINGS["karras"](2000)
    x = run(SAMPLERS[name].sample, MU + torch.randn(n) * (sigmas[0] ** 2 + STD**2) ** 0.5, sigmas, lambda: torch.randn(n))
    std = (STD**2 + sigmas[-1] ** 2) ** 0.5
    assert float(x.mean()) == pytest.approx(MU, abs=3 * std / n**0.5)
    assert float(x.std()) == pytest.approx(std, abs=3 * std / (2 * n) ** 0.5)


@pytest.mark.parametrize("t, before", [(999, 979), (500, 100), (21, 1)])
def test_a_step_is_the_published_formula(t, before):
    """eta 0: DDIM (Song et al. 2021, equation 12); eta 1: the DDPM posterior (Ho et al. 2020, equations 6 and 7)."""
    abar, abar_before = ALPHAS_CUMPROD[t], ALPHAS_CUMPROD[before]
    x0, eps, z = torch.randn(3, 10, dtype=torch.float64)
    x = abar.sqrt() * x0 + (1 - abar).sqrt() * eps
    ddim = abar_before.sqrt() * x0 + (1 - abar_before).sqrt() * eps
    alpha = abar / abar_before
    mean = abar_before.sqrt() * (1 - alpha) / (1 - abar) * x0 + alpha.sqrt() * (1 - abar_before) / (1 - abar) * x
    ddpm = mean + ((1 - abar_before) / (1 - abar) * (1 - alpha)).sqrt() * z
    for eta, wanted in (0.0, ddim), (1.0, ddpm):
        step, = sample_ancestral(lambda x, sigma: x0, x / abar.sqrt(), SIGMAS[[t, before]].tolist(), lambda: z, eta)
        torch.testing.assert_close(step.x * abar_before.sqrt(), wanted)


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_training_target_and_sampler_agree(prediction):
    """The target is the noise (eps) or sqrt(abar) eps - sqrt(1 - abar) x0 (v); a network that answers it makes denoise return x0."""
    t = torch.tensor([0, 37, 500, 999])
    x0, noise = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    sigma = training_sigmas(prediction)[t]
    abar = (ALPHAS_CUMPROD[t] if prediction != "v-zero-snr" else 1 / (sigma**2 + 1))[:, None, None, None]
    x, answer = q_sample(x0, t, noise, prediction), target(prediction, x0, t, noise)
    torch.testing.assert_close(x, abar.sqrt() * x0 + (1 - abar).sqrt() * noise)
    torch.testing.assert_close(answer, noise if prediction == "eps" else abar.sqrt() * noise - (1 - abar).sqrt() * x0)
    for i in range(4):
        def net(net_x, net_t):
            torch.testing.assert_close(net_x, x[i:i + 1])
            assert net_t.tolist() == pytest.approx([int(t[i])], abs=1e-3)
            return answer[i:i + 1]
        denoised = denoiser(net, prediction)(x[i:i + 1] / abar[i].sqrt(), float(sigma[i]))
        torch.testing.assert_close(denoised, x0[i:i + 1], atol=1e-5, rtol=1e-5)  # nets answer in fp32


def test_guidance():
    """Scale 1: one pass of B rows, the condition's; 0: one pass, the negative's; 7.5: negative + 7.5 (condition - negative)."""
    calls = []

    def denoise(x, sigma, context):
        calls.append(len(x))
        return x * context
    x, c, n = torch.randn(3, 2, 4)
    assert torch.equal(guided(denoise, {"context": c}, {"context": n}, 1)(x, 3.0), x * c) and calls == [2]
    torch.testing.assert_close(guided(denoise, {"context": c}, {"context": n}, 0)(x, 3.0), x * n)
    torch.testing.assert_close(guided(denoise, {"context": c}, {"context": n}, 7.5)(x, 3.0), x * n + 7.5 * (x * c - x * n))
    assert calls == [2, 2, 4]


def test_one_step_from_pure_noise_is_the_guess():
    """Whatever the sampler, if it ends at sigma 0 (what diffusers' Euler does with one step cannot be compared)."""
    for name in ("ddpm", "euler", "euler_a", "dpmpp_2m"):
        x = torch.randn(5, dtype=torch.float64)
        torch.testing.assert_close(run(SAMPLERS[name].sample, x, [float(SIGMAS[-1]), 0.0]), exact_denoise(x, float(SIGMAS[-1])))


# --- properties of the pipeline ---

def levels_apart(a, b) -> int:
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


@pytest.mark.parametrize("name", SAMPLERS)
def test_a_batch_equals_its_pictures_one_by_one(name):
    sd, _ = pair("v")
    together = sd.generate("a cat", steps=5, sampler=name, seed=7, batch=4)
    alone = [sd.generate("a cat", steps=5, sampler=name, seed=7 + i)[0] for i in range(4)]
    assert max(map(levels_apart, together, alone)) <= 1
    assert min(levels_apart(a, b) for i, a in enumerate(together) for b in together[:i]) > 10


def test_a_seed_gives_the_same_picture_twice():
    sd, _ = pair("eps")
    assert levels_apart(sd.generate("a cat", seed=3, sampler="euler_a")[0], sd.generate("a cat", seed=3, sampler="euler_a")[0]) == 0


@pytest.mark.parametrize("width, height", [(8, 8), (72, 40), (40, 104)])
def test_sizes_are_multiples_of_8(width, height):
    sd, _ = pair("eps")
    assert sd.generate("a cat", steps=2, width=width, height=height)[0].size == (width, height)


def test_full_strength_leaves_nothing_of_the_picture():
    sd, _ = pair("eps")
    init = Image.new("RGB", (64, 64), "red")
    assert levels_apart(sd.generate("a cat", steps=4, init=init, strength=1)[0], sd.generate("a cat", steps=4)[0]) == 0


def test_callback_sees_every_step():
    sd, _ = pair("eps")
    seen = []
    sd.generate("a cat", steps=6, callback=seen.append)
    assert [step.index for step in seen] == list(range(6)) and all(step.x.shape == step.denoised.shape == (1, 4, 8, 8) for step in seen)
    assert torch.equal(seen[-1].x, seen[-1].denoised)  # the last step of DPM++ ends at the guess


@pytest.mark.parametrize("source", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(1001, 2100), (400, 333, 3, 3), (1280,), (1, 1)], ids=str)
def test_weights_become_bf16_as_pytorch_converts_them(shape, source):
    """The first two are of more than one piece, the last of which is shorter."""
    tensor = torch.randn(shape).to(source)
    found = converted(tensor, "cpu", torch.bfloat16)
    assert found.dtype == torch.bfloat16 and torch.equal(found, tensor.to(torch.bfloat16))
    assert found.is_contiguous(memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format)


@pytest.mark.skipif(sys.platform != "linux" or tuple(map(int, re.findall(r"\d+", platform.release())[:2])) < (5, 14), reason="needs Linux 5.14")
def test_memory_that_was_claimed_is_what_tensors_then_get():
    """Page faults of writing 64 MB for the first time: 16,384 pages."""
    code = """if True:
        import resource, torch
        from contextlib import nullcontext
        from checkpoint import claimed
        faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for context in nullcontext(), claimed(2**27):
            with context:
                pass
            before, x = faults(), torch.empty(2**26, dtype=torch.uint8).fill_(1)
            print(faults() - before)
    """
    first, then = map(int, subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.split())
    assert then < first / 10


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_memory_is_kept_until_it_is_given_back():
    code = """if True:
        import torch
        from checkpoint import give_back_freed_memory, keep_freed_memory
        resident = lambda: int(open("/proc/self/statm").read().split()[1]) * 4096 >> 20
        keep_freed_memory()
        tensors = [torch.empty(2**20, dtype=torch.uint8).fill_(1) for _ in range(200)]
        full = resident()
        del tensors[::2]
        kept = resident()
        give_back_freed_memory()
        print(full - kept, full - resident())
    """
    kept, given = map(int, subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.split())
    assert kept < 10 and given > 90


@pytest.mark.parametrize("dtype, bound", [(torch.bfloat16, 0.035), (torch.float16, 0.0035)])
def test_half_precision_weights_work_on_the_cpu(dtype, bound):
    sd = random_model()
    x, t, context = torch.randn(2, 4, 8, 8), torch.tensor([900.0, 10.5]), sd.encode_prompt(["a cat", ""])
    exact = sd.unet(x, t, context)
    assert relative_error(sd.unet.to(dtype)(x, t, context).float(), exact) < bound
    assert len(sd.generate("a cat", steps=2)) == 1


@torch.no_grad()
def test_bf16_is_as_near_to_fp32_as_in_diffusers():
    """The built-in model's latents after 20 guided steps, 16x16, so that attention goes in blocks (without AMX). `pytest -s` shows the relative errors.
    Of twelve prompts the median: now and then rounding sends a run another way, ours or theirs, and its error is twice the others'."""
    sd = StableDiffusion.load(None, "cpu", torch.float32)
    theirs = reference_unet(sd.config.unet, sd.state_dict())
    half, their_half = deepcopy(sd.unet).bfloat16(), deepcopy(theirs).bfloat16()

    def latents(unet, seed: int, prompt: str) -> torch.Tensor:
        (_, negative), (_, condition) = sd.told([prompt], "", 3.0, 128, 128)
        noise = torch.randn(1, 16, 16, 16, generator=torch.Generator().manual_seed(seed)) * float(SIGMAS[-1])
        return run(SAMPLERS["dpmpp_2m"].sample, noise, [*SPACINGS["leading"](20), 0.0], denoise=guided(denoiser(unet, "v"), condition, negative, 3.0))

    def diffusers_unet(x, t, context, y) -> torch.Tensor:
        return their_half(x.bfloat16(), t, context.bfloat16(), class_labels=y.bfloat16()).sample
    errors = []
    for case in enumerate(["a red apple", "a blue cat", "three stars", "a rocket", "pizza, twemoji", "a crown", "two green frogs", "a guitar", "a snowman",
                           "a small dog on the left", "a bus", "a tiger"]):
        exact = latents(sd.unet, *case)
        errors.append([float((latents(unet, *case) - exact).norm() / exact.norm()) for unet in (half, diffusers_unet)])
    ours, others = np.median(errors, 0)
    print(f"bf16 and fp32 lie {ours:.4f} apart, in diffusers {others:.4f}")
    assert ours < 0.02 and ours < 1.1 * others


class Recording(TorchDispatchMode):
    """What a CUDA graph does, on a CPU: every operation within is written down, and done again, into the same memory, by `replay`."""

    def __init__(self):
        super().__init__()
        self.done = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        self.done.append((operation, args, kwargs or {}, out))
        return out

    def replay(self):
        for operation, args, kwargs, out in self.done:
            again = operation(*args, **kwargs)
            for new, old in zip(*((x if isinstance(x, tuple) else (x,) for x in (again, out)))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():  # else a view
                    old.copy_(new)


@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_steps_replayed_are_steps_computed(monkeypatch, count):
    """Guided steps and others between them: for the first two of a kind alone the UNet is called."""
    sd, called = random_model(), []
    sd.unet.register_forward_pre_hook(lambda *_: called.append(1))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Recording)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **_: graph)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr("model.recording_stream", lambda device: None)
    negative, condition = ({"context": sd.encode_prompt([prompt] * count)} for prompt in ("", "a cat"))
    x = torch.randn(7, count, 4, 8, 8)

    def answers(network) -> list[torch.Tensor]:
        denoise = {scale: guided(denoiser(network, "eps"), condition, negative, scale) for scale in (7.5, 1.0)}
        return [denoise[scale](x[i], sigma) for i, (scale, sigma) in enumerate([(7.5, 14), (7.5, 9), (1.0, 5), (7.5, 3), (7.5, 1), (1.0, 0.5), (1.0, 0.1)])]
    computed = answers(sd.unet)
    called.clear()
    with replayed(sd.unet) as network:
        again = answers(network)
    assert all(map(torch.equal, computed, again)) and len(called) == 4


on_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@on_cuda
def test_a_gpu_draws_what_the_cpu_draws():
    cpu, gpu = StableDiffusion.load(None, "cpu", torch.float32), StableDiffusion.load(None, "cuda")
    assert gpu.unet.out[2].weight.dtype == torch.float16
    for prompt in "a red apple", "a penguin, twemoji", "a blue heart next to a red apple":
        assert psnr(gpu.generate(prompt)[0], cpu.generate(prompt)[0]) > 50


@on_cuda
@pytest.mark.parametrize("how", [{}, {"batch": 3}, {"guidance": 1.0}, {"guided_share": 0.5}, {"sampler": "euler_a"}, {"width": 96}])
def test_what_a_gpu_replays_is_what_it_would_compute(monkeypatch, how):
    """Pictures and heat maps, to the last bit."""
    sd, found = StableDiffusion.load(None, "cuda"), []
    recorded, capture = [], torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **more: recorded.append(1) or capture(*args, **more))
    for _ in range(2):
        maps = HeatMaps()
        with watching(sd.unet, maps.watch):
            images = sd.generate("a blue heart next to a red apple", steps=6, callback=maps.step, **how)
        images += sd.generate("a red apple", steps=6, **how)
        found.append([*map(np.asarray, images), maps.mean().numpy()])
        assert len(recorded) == (4 if "guided_share" in how else 2)
        monkeypatch.setattr(sd_module, "replayed", nullcontext)
    assert all(np.array_equal(replayed, computed) for replayed, computed in zip(*found))


def test_nan_is_an_error_and_not_a_black_picture():
    sd = random_model()
    sd.unet.out[2].bias[0] = math.nan
    with pytest.raises(UserError, match="NaN at step 1"):
        sd.generate("a cat", steps=2)
    sd = random_model()
    sd.vae.decoder.conv_out.bias[0] = math.nan
    with pytest.raises(UserError, match="NaN in the decoded picture"):
        sd.generate("a cat", steps=2)


# --- the parts ---

def test_attention_weights_open_and_fused_agree():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 3, 7, 8)
    h, a = attention(q, k, v, return_weights=True)
    assert a.shape == (2, 3, 5, 7) and a.dtype == torch.float32
    torch.testing.assert_close(a.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(h, attention(q, k, v))
    torch.testing.assert_close(a, torch.einsum("bhtd,bhsd->bhts", q, k).div(8**0.5).softmax(-1))


@torch.no_grad()
def test_attention_of_bf16_on_a_cpu_goes_in_blocks(monkeypatch):
    """Where products are slow in the fused kernel. Of 600 queries, which is no multiple of a block; against float64. Scores of up to 4, rounded to
    8 bits, are up to 0.008 off."""
    q, k, v = (torch.randn(2, n, 3, 40).bfloat16().transpose(1, 2) for n in (600, 300, 300))
    monkeypatch.setattr("model.AMX", False)
    h, exact = attention(q, k, v), F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert h.dtype == torch.bfloat16 and h.shape == q.shape and relative_error(h.double(), exact) < 0.01
    assert torch.equal(h, attention_in_blocks(q, k, v))
    monkeypatch.setattr("model.AMX", True)
    fused = attention(q, k, v)
    assert torch.equal(fused, F.scaled_dot_product_attention(q, k, v)) and relative_error(fused.double(), exact) < 0.01


@pytest.mark.parametrize("amx", [False, True])
def test_linear_by_way_of_a_convolution(monkeypatch, amx):
    seen, convolution = [], F.conv2d
    monkeypatch.setattr("model.AMX", amx)
    monkeypatch.setattr(F, "conv2d", lambda *args: seen.append(1) or convolution(*args))
    layer, x = Linear(24, 40), torch.randn(2, 5, 24, requires_grad=True)
    out, exact = layer(x), F.linear(x.double(), layer.weight.double(), layer.bias.double())
    assert len(seen) == (torch.backends.mkl.is_available() and not amx)
    assert out.is_contiguous() and relative_error(out.detach(), exact.detach().float()) < 1e-6
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), (x, *layer.parameters())) for y in (out, exact))):
        assert relative_error(mine, theirs.float()) < 1e-6


@pytest.mark.parametrize("size, transposed", [((64, 64), True), ((66, 62), False), ((64, 71), False)], ids=str)
def test_doubling_by_way_of_a_transposed_convolution(monkeypatch, size, transposed):
    """From 1,024 positions on, where the size doubles exactly; elsewhere as it is written."""
    seen, convolution = [], F.conv_transpose2d
    monkeypatch.setattr(F, "conv_transpose2d", lambda *args, **kw: seen.append(1) or convolution(*args, **kw))
    conv, x = nn.Conv2d(3, 3, 3, padding=1).double(), torch.randn(2, 3, (size[0] + 1) // 2, (size[1] + 1) // 2, dtype=torch.float64, requires_grad=True)
    out, exact = upsample(x, conv, torch.Size(size)), conv(F.interpolate(x, size=size, mode="nearest"))
    assert len(seen) == transposed
    assert relative_error(out.detach(), exact.detach()) < 1e-12
    for mine, theirs in zip(*(torch.autograd.grad(y.square().sum(), (x, *conv.parameters())) for y in (out, exact))):
        assert relative_error(mine, theirs) < 1e-12
    conv.requires_grad_(False)
    for dtype, bound in ((torch.float32, 1e-6), (torch.float16, 1e-3), (torch.bfloat16, 8e-3)):
        assert relative_error(upsample(x.detach().to(dtype), conv.to(dtype), torch.Size(size)).double(), exact.detach()) < bound


@pytest.mark.parametrize("amx", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("device, lowmem", [("cpu", False), ("cpu", True), ("meta", False), ("meta", True)])
def test_convolutions_lie_channels_last_but_the_unets_in_fp32_with_amx(monkeypatch, amx, dtype, device, lowmem):
    """Whatever they were before, and with lowmem too, where `device` (here one that is no CPU) is not where they are kept."""
    monkeypatch.setattr("sd.AMX", amx)
    sd = random_model()
    sd.unet.to(memory_format=torch.channels_last)
    sd.lowmem = lowmem
    sd.place(device, dtype)
    for part, plain in ((sd.unet, amx and device == "cpu" and dtype == torch.float32), (sd.vae, False)):
        weight = next(weight for weight in part.parameters() if weight.shape[2:] == (3, 3) and weight.shape[1] > 1)
        assert weight.is_contiguous() == plain
        assert weight.is_contiguous(memory_format=torch.channels_last) != plain


@pytest.mark.parametrize("tokens", [2047, 2048])
def test_attention_of_many_tokens_equals_the_open_one(tokens):
    q, k, v = (torch.randn(1, tokens, 2 * 8).unflatten(-1, (2, 8)).transpose(1, 2) for _ in range(3))
    assert relative_error(attention(q, k, v), attention(q, k, v, return_weights=True)[0]) < 1e-5


def test_attention_is_a_dictionary():
    """Keys that match a query perfectly, and the others not at all, return their row."""
    v, wanted = torch.randn(1, 1, 4, 4), [2, 0, 3]
    h, a = attention(1e4 * torch.eye(4)[wanted][None, None], torch.eye(4)[None, None], v, return_weights=True)
    assert torch.equal(h, v[:, :, wanted]) and torch.equal(a[0, 0], torch.eye(4)[wanted])


def test_self_attention_is_cross_attention_to_itself():
    layer, x = randomise(CrossAttention(16, 16, 4)), torch.randn(2, 5, 16)
    assert torch.equal(layer(x), layer(x, x))


def test_text_is_causal():
    """Editing a later word leaves the features of the earlier ones equal to the bit, and changes its own."""
    sd, _ = pair("eps")
    a, b = sd.encode_prompt(["I book a ticket to buy that book"])[0], sd.encode_prompt(["I book a ticket to buy that car"])[0]
    assert torch.equal(a[:8], b[:8]) and not torch.allclose(a[8], b[8])  # start and seven words
    assert not torch.allclose(a[2], a[8])  # "book" twice: one row of the table, two vectors


def test_time_enters_a_resblock_as_one_value_per_channel():
    block, seen = randomise(ResBlock(8, 16, 32, 4)), []
    block.out_layers.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    x, emb = torch.randn(1, 8, 5, 5), torch.randn(2, 1, 32)
    assert not torch.allclose(block(x, emb[0]), block(x, emb[1]))
    effect = seen[1] - seen[0]
    torch.testing.assert_close(effect, effect[:, :, :1, :1].expand_as(effect), atol=1e-5, rtol=1e-5)


def test_vae_downsample_pads_right_and_bottom_only():
    down, x = Downsample(1).requires_grad_(False), torch.rand(1, 1, 6, 6) + 1
    down.conv.bias.zero_()
    for tap, wanted in ((0, 0), x[:, :, ::2, ::2]), ((2, 2), nn.functional.pad(x[:, :, 2::2, 2::2], (0, 1, 0, 1))):
        down.conv.weight.zero_()[0, 0][tap] = 1
        assert torch.equal(down(x), wanted)


def test_timestep_embedding_has_the_cosines_first():
    e = timestep_embedding(torch.tensor([1.0, 500.5]), 320)
    assert e[0, [0, 160, 319]].tolist() == pytest.approx([math.cos(1), math.sin(1), 1.0593e-4], rel=1e-4)
    assert e[1, [0, 160]].tolist() == pytest.approx([math.cos(500.5), math.sin(500.5)], abs=1e-5)
