"""Parity of the other rows of PRESETS: SD 2.x, SDXL, the turbos, LCM, inpainting, InstructPix2Pix. No downloads.

    pip install -r requirements-test.txt
    pytest test_family.py

As in test_sd.py, whose helpers these tests use: random weights, renamed by diffusers' own code, compared with diffusers and
transformers. The text encoders and UNets are run at full size; what
draws pictures here are the rows of PRESETS with their widths cut (`small`), so that everything else in a row is what is tested.
"""
import gzip
import math
import re
import sys
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
from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
from PIL import Image
from torch import nn

from clip import MERGES, CLIPTextConfig, CLIPTextModel, Tokenizer
from model import CrossAttention, UNetModel, timestep_embedding
from sampler import SAMPLERS, SIGMAS, SPACINGS, sigma_to_t
from sd import PRESETS, Preset, StableDiffusion, UserError
from test_sd import (BETAS, PROMPTS, epsilons, levels_apart, on_meta, psnr, random_model, randomise, reference_text, reference_tokenizer, reference_unet,
                     reference_vae, relative_error, same_numbers_every_time, scheduler)  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
SDXL_UNET = dict(class_embed_type=None, addition_embed_type="text_time")  # what diffusers calls SDXL's y


# --- helpers ---

def small(name: str) -> Preset:
    """The row of PRESETS with its widths and depths cut, for 64x64 pictures; all else as it stands."""
    row = PRESETS[name]
    levels = len(row.unet.channel_mult)
    text = replace(row.text, hidden_size=32, num_hidden_layers=3, num_attention_heads=2)
    text_2 = row.text_2 and replace(row.text_2, hidden_size=48, num_hidden_layers=3, num_attention_heads=3)
    unet = replace(row.unet, model_channels=32, num_res_blocks=1, num_heads=(1, 2, 4, 4)[:levels], num_groups=8,
                   transformer_depth=tuple(min(depth, level) for level, depth in enumerate(row.unet.transformer_depth, 1)),
                   transformer_depth_middle=min(levels, row.unet.transformer_depth_middle),
                   context_dim=80 if text_2 else 32, adm_in_channels=48 + 6 * 16 if text_2 else None)
    return replace(row, unet=unet, vae=replace(row.vae, ch=16, num_res_blocks=1, num_groups=4), text=text, text_2=text_2, size=64)


def reference_openclip(cfg: CLIPTextConfig, state: dict) -> nn.Module:
    """As in files of diffusers: SD 2.x's lacks the last layer, which is never used, and the projection; SDXL's has both."""
    layers = cfg.num_hidden_layers - cfg.final_norm
    kind = transformers.CLIPTextModel if cfg.final_norm else transformers.CLIPTextModelWithProjection
    with torch.device("meta"):
        text = kind(transformers.CLIPTextConfig(
            vocab_size=cfg.vocab_size, hidden_size=cfg.hidden_size, intermediate_size=4 * cfg.hidden_size, hidden_act="gelu", num_hidden_layers=layers,
            num_attention_heads=cfg.num_attention_heads, projection_dim=cfg.hidden_size, bos_token_id=49406, eos_token_id=49407))
    state = convert_open_clip_checkpoint(text, {name: t for name, t in state.items() if f"resblocks.{layers}." not in name}, prefix=cfg.prefix)
    state = state if not cfg.final_norm else {name.removeprefix("text_model."): t for name, t in state.items()}  # transformers 5 drops it
    text.load_state_dict(state, strict=True, assign=True)
    for module in text.modules():  # a buffer, which stayed on the meta device
        if hasattr(module, "position_ids"):
            module.position_ids = torch.arange(77)[None]
    return text.eval().requires_grad_(False)


@cache
def zero_padding_tokenizer() -> transformers.CLIPTokenizer:
    """SD 2.x's, and SDXL's second one: "!" without the end of a word, id 0, is the padding."""
    tokenizer = deepcopy(reference_tokenizer())
    tokenizer.pad_token = "!"
    return tokenizer


@cache
def pair(name: str, pipeline=diffusers.StableDiffusionPipeline):
    """A small random model, and diffusers' pipeline with the same weights."""
    sd = random_model(small(name))
    cfg, state = sd.config, sd.state_dict()
    vae = reference_vae(cfg.vae, state)
    if cfg.text_2 is not None:
        unet = reference_unet(cfg.unet, state, **SDXL_UNET, addition_time_embed_dim=16)
        pipe = pipeline(vae, reference_text(cfg.text, state), reference_openclip(cfg.text_2, state), reference_tokenizer(), zero_padding_tokenizer(),
                        unet, scheduler("ddim", "leading"), add_watermarker=False)
    else:
        text, tokenizer = (reference_openclip, zero_padding_tokenizer) if cfg.text.openclip else (reference_text, reference_tokenizer)
        pipe = pipeline(vae, text(cfg.text, state), tokenizer(), reference_unet(cfg.unet, state), None, None, None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return sd, pipe


def ours(sd: StableDiffusion, prompt: str = PROMPTS["prompt"], **kw):
    """The picture and the latents it was decoded from."""
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sd, "decode_latents", lambda z: seen.append(z) or StableDiffusion.decode_latents(sd, z))
        image, = sd.generate(prompt, seed=5, **kw)
    return image, seen[0]


def theirs(pipe, prompt: str = PROMPTS["prompt"], start: float = 1.0, **kw):
    """The same; `start` is what the first noise is multiplied by."""
    generator, seen = torch.Generator().manual_seed(5), []
    if start != 1:
        kw["latents"] = torch.randn(1, 4, kw.get("height", 64) // 8, kw.get("width", 64) // 8, generator=generator) * start
    image, = pipe(prompt, generator=generator, callback_on_step_end=lambda pipe, i, t, now: seen.append(now["latents"]) or {}, **kw).images
    return image, seen[-1]


def agree(ours, theirs, latents: float = 0.0) -> None:
    """To 50 dB of the picture, and of the latents to so many."""
    pictures = psnr(ours[0], theirs[0])
    found = psnr(ours[1], theirs[1], np.ptp(theirs[1].numpy()))
    print(f"picture {pictures:.1f} dB, latents {found:.1f} dB")
    assert pictures >= 50 and found >= latents


EULERS_START = (1 + 1 / float(SIGMAS[-1]) ** 2) ** 0.5  # ours is noise * sqrt(sigma_max^2 + 1), diffusers' noise * sigma_max: see test_sd.py


# --- names and shapes ---

def manifest(name: str) -> dict[str, str]:
    rows = [line.split("\t") for line in gzip.open(Path(MERGES).with_name(name + ".tsv.gz"), "rt")]
    return {row[0]: row[1].strip() for row in rows if not row[0].endswith(("position_ids", "logit_scale"))}


def names_and_shapes(name: str) -> dict[str, str]:
    return {name: "x".join(map(str, t.shape)) for name, t in on_meta(StableDiffusion, PRESETS[name]).state_dict().items()}


@pytest.mark.parametrize("file, rows, parameters", [
    ("sd1-inpaint", ["sd1-inpaint"], 859_535_364 + 83_653_863 + 123_060_480),
    ("sd2", ["sd2-base", "sd2", "sd-turbo"], 865_910_724 + 83_653_863 + 354_032_640),
    ("sdxl", ["sdxl", "sdxl-turbo"], 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840)])
def test_names_and_shapes_are_those_of_official_files(file, rows, parameters):
    """The .tsv.gz were derived from the original code and configs, not from this project."""
    wanted = manifest(file)
    assert sum(math.prod(map(int, shape.split("x"))) for shape in wanted.values()) == parameters
    for row in rows:
        assert names_and_shapes(row) == wanted


def test_instruct_pix2pix_is_sd1_with_eight_channels():
    assert names_and_shapes("instruct-pix2pix") == manifest("sd1") | {"model.diffusion_model.input_blocks.0.0.weight": "320x8x3x3"}


def test_what_shapes_do_not_show():
    """As published (v2-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml; open_clip's ViT-H-14 and ViT-bigG-14), since the references below are built
    from the rows: heads of 64 in all but SD 1.x's UNet, which has 8; the scale of latents; CLIP's gelu and padding, OpenCLIP's; what is predicted."""
    for name in ["sd1", "sd1-inpaint", "instruct-pix2pix", "sd2-base", "sd2", "sd-turbo", "sdxl", "sdxl-turbo"]:
        row, version = PRESETS[name], "sd1" if name in ("sd1", "sd1-inpaint", "instruct-pix2pix") else "sdxl" if "xl" in name else "sd2"
        widths = [row.unet.model_channels * m for m in row.unet.channel_mult]
        assert row.unet.num_heads == ((8,) * 4 if version == "sd1" else tuple(width // 64 for width in widths))
        assert row.unet.upcast_attention == (version == "sd2")
        assert row.vae.scale_factor == (0.13025 if version == "sdxl" else 0.18215)
        assert row.prediction == ("v" if name == "sd2" else "eps")
        found = [(text.hidden_act, text.hidden_size // text.num_attention_heads, text.layers_skipped, text.final_norm, text.pad)
                 for text in (row.text, row.text_2) if text is not None]
        assert found == {"sd1": [("quick_gelu", 64, 0, True, 49407)], "sd2": [("gelu", 64, 1, True, 0)],
                         "sdxl": [("quick_gelu", 64, 1, False, 49407), ("gelu", 64, 1, False, 0)]}[version]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_come_back_as_they_went_in(suffix, tmp_path, monkeypatch):
    """Both encoders, q, k and v cut apart again. What it is stands in the metadata, or, in a .ckpt as in official files, nowhere."""
    sd, path = random_model(small("sdxl")), tmp_path / f"a{suffix}"
    if suffix == ".ckpt":
        monkeypatch.setitem(PRESETS, "small", sd.config)
        torch.save(sd.state_dict() | {"conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
                                      "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6)}, path)
    else:
        sd.save(path, torch.float32)
    again = StableDiffusion.load(path, "cpu", torch.float32)
    assert again.config == sd.config
    assert all(torch.equal(a, b) for a, b in zip(sd.state_dict().values(), again.state_dict().values(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sd.condition(["a cat"]).values(), again.condition(["a cat"]).values(), strict=True))


# --- the networks ---

@pytest.mark.parametrize("name, part", [("sdxl", "text"), ("sd2", "text"), ("sdxl", "text_2")])
def test_text_equals_transformers(name, part):
    """CLIP-L: the penultimate layer's output, no norm. OpenCLIP-H: with the final norm. OpenCLIP-bigG: no norm; and the pooled vector.
    OpenCLIP-H at full size, of the others the first 8 layers, to save time."""
    cfg, prompts = getattr(PRESETS[name], part), ["a red apple", "cat " * 75]
    cfg = cfg if name == "sd2" else replace(cfg, num_hidden_layers=8)
    text = randomise(on_meta(CLIPTextModel, cfg))
    state = {cfg.prefix + name: t for name, t in text.state_dict().items()}
    reference = (reference_openclip if cfg.openclip else reference_text)(cfg, state)
    assert set(epsilons(text)) == set(epsilons(reference)) == {1e-5}
    tokens = Tokenizer(cfg.pad)(prompts)
    tokenizer = zero_padding_tokenizer() if cfg.openclip else reference_tokenizer()
    assert tokens.tolist() == tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    with torch.no_grad():
        (features, pooled), wanted = text.encode(tokens), reference(tokens, output_hidden_states=True)
    errors = [relative_error(features, wanted.last_hidden_state if cfg.final_norm else wanted.hidden_states[-2])]
    if part == "text_2":
        errors.append(relative_error(pooled, wanted.text_embeds))
    print(errors)
    assert max(errors) < 1e-5


def free_memory() -> float:
    """GB that are free, or would be at once (Linux)."""
    return int(re.search(r"MemAvailable: +(\d+)", Path("/proc/meminfo").read_text())[1]) / 1e6


@pytest.mark.parametrize("name, width", [("sd2", 320), ("sdxl", 64), pytest.param("sdxl", 320, marks=pytest.mark.skipif(
    sys.platform != "linux" or free_memory() < 14, reason="SDXL's UNet takes 10.3 GB in fp32: needs 14 GB of free memory"))])
def test_unet_equals_diffusers(name, width):
    """At full size, SDXL with a fifth of its widths too; at an odd size, each row with a time and with six sizes of its own."""
    cfg, more = PRESETS[name].unet, {}
    if name == "sdxl":
        cfg, more = replace(cfg, model_channels=width, num_heads=tuple(width // 64 * m for m in cfg.channel_mult)), dict(SDXL_UNET, addition_time_embed_dim=256)
    unet = randomise(on_meta(UNetModel, cfg))
    reference = reference_unet(cfg, {"model.diffusion_model." + k: v for k, v in unet.state_dict().items()}, **more)
    assert epsilons(unet) == epsilons(reference)
    t, context = torch.tensor([981.0, 37.25]), torch.randn(2, 77, cfg.context_dim)
    y, added = None, None
    if name == "sdxl":
        pooled, sizes = torch.randn(2, 1280), torch.tensor([[1024, 768, 0, 0, 1024, 768], [640, 1536, 8, 248, 512, 1024]])
        y, added = torch.cat([pooled, timestep_embedding(sizes.flatten(), 256).view(2, -1)], dim=1), dict(text_embeds=pooled, time_ids=sizes)
    x = torch.randn(2, 4, 11, 13)
    with torch.no_grad():
        error = relative_error(unet(x, t, context, y), reference(x, t, context, added_cond_kwargs=added).sample)
    print(error)
    assert error < 1e-5


def test_sdxl_is_told_six_sizes():
    """Height and width, top and left, height and width, behind the pooled vector; the preset's size unless another is asked for."""
    sd, pipe = pair("sdxl", diffusers.StableDiffusionXLPipeline)
    for asked, sizes in ((96, 72), [72, 96, 0, 0, 72, 96]), ((None, None), [64, 64, 0, 0, 64, 64]):
        y = sd.condition(["a cat", "a dog"], *asked)["y"]
        wanted = pipe.unet.add_time_proj(torch.tensor(sizes)).flatten().expand(2, -1)
        assert y.shape == (2, 144) and relative_error(y[:, 48:], wanted) < 1e-5


# --- whole pictures against diffusers' pipelines ---

@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "linspace"), ("dpmpp_2m", "trailing")])
@pytest.mark.parametrize("row", ["sd2-base", "sd2"])
def test_sd2_draws_what_diffusers_draws(row, name, spacing):
    """eps and v."""
    sd, pipe = pair(row)
    pipe.scheduler = scheduler(name, spacing, sd.config.prediction)
    agree(ours(sd, negative_prompt=PROMPTS["negative_prompt"], steps=5, guidance=7.5, sampler=name, spacing=spacing),
          theirs(pipe, **PROMPTS, num_inference_steps=5, guidance_scale=7.5, width=64, height=64, start=EULERS_START if name == "euler" else 1), 100)


@pytest.mark.parametrize("negative", ["", PROMPTS["negative_prompt"]])
@pytest.mark.parametrize("width, height", [(64, 64), (96, 56)])
def test_sdxl_draws_what_diffusers_draws(negative, width, height):
    """No negative prompt is zeros for it, as None is for diffusers."""
    sd, pipe = pair("sdxl", diffusers.StableDiffusionXLPipeline)
    pipe.scheduler = scheduler("ddim", "leading")
    agree(ours(sd, negative_prompt=negative, steps=5, sampler="ddim", width=width, height=height),
          theirs(pipe, negative_prompt=negative or None, num_inference_steps=5, guidance_scale=5.0, width=width, height=height), 100)


def test_the_comparison_tells_conditions_apart():
    """The control: other sizes, the vectors of an empty text instead of zeros, a letter, the pad: each is below 50 dB."""
    sd, pipe = pair("sdxl", diffusers.StableDiffusionXLPipeline)
    pipe.scheduler = scheduler("ddim", "leading")
    settings = dict(num_inference_steps=4, guidance_scale=5.0, width=64, height=64)
    image, _ = ours(sd, steps=4, sampler="ddim")
    assert psnr(image, theirs(pipe, **settings)[0]) >= 50
    for other in dict(original_size=(72, 64)), dict(crops_coords_top_left=(0, 8)), dict(negative_prompt=""), dict(prompt="a red apples"):
        found = psnr(image, theirs(pipe, **settings | other)[0])
        print(other, f"{found:.1f} dB")
        assert found < 50
    pipe.tokenizer_2 = reference_tokenizer()
    found = psnr(image, theirs(pipe, **settings)[0])
    pipe.tokenizer_2 = zero_padding_tokenizer()
    print(f"pad {found:.1f} dB")
    assert found < 50


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("row, pipeline, kind", [
    ("sd-turbo", diffusers.StableDiffusionPipeline, diffusers.EulerDiscreteScheduler),
    ("sdxl-turbo", diffusers.StableDiffusionXLPipeline, diffusers.EulerAncestralDiscreteScheduler)])
def test_turbo_draws_what_diffusers_draws(row, pipeline, kind, steps):
    """With nothing but the number of steps asked for: sampler, spacing and guidance are the row's. Guidance 0 in diffusers is our 1: none."""
    sd, pipe = pair(row, pipeline)
    pipe.scheduler = kind(**BETAS, timestep_spacing="trailing")
    drawn = ours(sd, **dict(steps=steps) if steps > 1 else {})
    settings = dict(num_inference_steps=steps, guidance_scale=0.0, width=64, height=64)
    agree(drawn, theirs(pipe, **settings))
    agree(drawn, theirs(pipe, **settings, start=EULERS_START), 100)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("row, pipeline", [("sd2", diffusers.StableDiffusionPipeline), ("sdxl", diffusers.StableDiffusionXLPipeline)])  # v and eps
def test_lcm_draws_what_diffusers_draws(row, pipeline, steps):
    sd, pipe = pair(row, pipeline)
    pipe.scheduler = diffusers.LCMScheduler(**BETAS, prediction_type={"eps": "epsilon", "v": "v_prediction"}[sd.config.prediction])
    agree(ours(sd, steps=steps, guidance=1.0, sampler="lcm"), theirs(pipe, num_inference_steps=steps, guidance_scale=0.0, width=64, height=64), 100)


@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_lcm_that_guides_itself_draws_what_diffusers_draws(guidance):
    """The scale goes into the time embedding; one pass, and no negative prompt."""
    sd, pipe = pair("lcm")
    pipe = diffusers.LatentConsistencyModelPipeline(**pipe.components | {"scheduler": diffusers.LCMScheduler(**BETAS)}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    sd.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    drawn = ours(sd, guidance=guidance, negative_prompt="blue")
    assert calls == [1] * 4
    agree(drawn, theirs(pipe, num_inference_steps=4, guidance_scale=guidance, width=64, height=64), 100)
    assert psnr(drawn[0], ours(sd, guidance=3.0)[0]) < 50


def test_times_of_lcm():
    for steps in range(1, 51):
        reference = diffusers.LCMScheduler(**BETAS)
        reference.set_timesteps(steps)
        assert [sigma_to_t(sigma) for sigma in SPACINGS["lcm"](steps)] == pytest.approx(reference.timesteps.tolist(), abs=1e-6)
    for steps in 51, 300, 334, 501, 1000:  # more than there are: from pure noise all the same
        assert SPACINGS["lcm"](steps)[0] == pytest.approx(float(SIGMAS[-1]))


# --- pictures from pictures ---

@cache
def photograph(width: int = 64, height: int = 64) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@cache
def mask(width: int = 64, height: int = 64) -> Image.Image:
    """A disc with a gray rim, which cuts through latents."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray((255 * np.clip(0.36 * width - np.hypot(x - 0.4 * width, y - 0.6 * height), 0, 1)).astype(np.uint8))


def redrawn(mask: Image.Image) -> np.ndarray:
    """Where the mask is more white than black."""
    return np.asarray(mask) >= 128


MASK_LATENTS = torch.from_numpy(redrawn(mask())[::8, ::8]).float()


@pytest.mark.parametrize("strength", [1.0, 0.6])
@pytest.mark.parametrize("row, name, spacing", [("sd1-inpaint", "ddim", "leading"), ("sd1-inpaint", "ddpm", "leading"), ("sd1-inpaint", "euler", "leading"),
                                                ("sd1", "ddim", "leading"), ("sd1", "dpmpp_2m", "trailing"), ("sd1", "euler", "leading")])
def test_inpainting_draws_what_diffusers_draws(row, name, spacing, strength, monkeypatch):
    """With a UNet that sees the mask, and with an ordinary one, around whose pictures diffusers puts the noised original after each step.

    Three things differ. What was not to be redrawn is as it was in our pictures, so we paste diffusers' likewise and compare the latents
    inside. At full strength diffusers puts the original in after the first step, we before it too: that is undone, then latents
    agree to rounding. And with samplers that draw noise ours have it anew there too, where diffusers' is the first again: not compared.
    """
    sd, pipe = pair(row, diffusers.StableDiffusionInpaintPipeline)
    pipe.scheduler = scheduler(name, spacing)

    def compare(steps: int, at_least: float = 0) -> None:
        image, latents = ours(sd, negative_prompt=PROMPTS["negative_prompt"], steps=steps, guidance=7.5, sampler=name, spacing=spacing,
                              init=photograph(), mask=mask(), strength=strength)
        their_image, their_latents = theirs(pipe, **PROMPTS, num_inference_steps=steps, guidance_scale=7.5, width=64, height=64,
                                            image=photograph(), mask_image=mask(), strength=strength)
        pasted = np.where(redrawn(mask())[..., None], their_image, photograph())
        agree((image, latents * MASK_LATENTS), (pasted, their_latents * MASK_LATENTS), at_least)

    def prepare_latents(*args, prepare=pipe.prepare_latents, **kw):
        latents, noise, known = prepare(*args, **kw)
        return torch.lerp(pipe.scheduler.add_noise(known, noise, kw["timestep"]), latents, MASK_LATENTS), noise, known

    if row == "sd1" and strength == 1:
        compare(20)
        monkeypatch.setattr(pipe, "prepare_latents", prepare_latents)
    compare(5, 100)


@pytest.mark.parametrize("strength", [None, 0.5])
@pytest.mark.parametrize("row", ["sd1-inpaint", "sd1"])
def test_what_is_not_masked_stays_as_it_was(row, strength):
    """To the level, whatever the sampler, in a batch, at a size that is not square; what is masked does not."""
    sd, _ = pair(row, diffusers.StableDiffusionInpaintPipeline)
    init, here = photograph(72, 40), redrawn(mask(72, 40))
    for name in SAMPLERS:
        images = sd.generate("a cat", steps=2, sampler=name, width=72, height=40, batch=2, init=init, mask=mask(72, 40), strength=strength)
        for image in images:
            assert np.array_equal(np.asarray(image)[~here], np.asarray(init)[~here])
            assert np.mean(np.asarray(image)[here] != np.asarray(init)[here]) > 0.9
        assert not np.array_equal(*map(np.asarray, images))


@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "leading")])
@pytest.mark.parametrize("guidance, image_guidance", [(7.5, 1.5), (7.5, 1.0), (3.0, 3.0)])
def test_instructions_draw_what_diffusers_draws(guidance, image_guidance, name, spacing):
    sd, pipe = pair("instruct-pix2pix", diffusers.StableDiffusionInstructPix2PixPipeline)
    pipe.scheduler = scheduler(name, spacing)
    agree(ours(sd, negative_prompt=PROMPTS["negative_prompt"], steps=5, guidance=guidance, image_guidance=image_guidance, sampler=name, spacing=spacing,
               init=photograph()),
          theirs(pipe, **PROMPTS, num_inference_steps=5, guidance_scale=guidance, image_guidance_scale=image_guidance, image=photograph()), 100)


@pytest.mark.parametrize("row, settings", [
    ("sd1", dict(mask=mask())), ("sd1", dict(init=photograph(), mask=mask(72, 40))),
    ("sd1-inpaint", {}), ("sd1-inpaint", dict(init=photograph())), ("sd1-inpaint", dict(mask=mask())),
    ("sd1-inpaint", dict(init=photograph(72, 40), mask=mask())),
    ("instruct-pix2pix", {}), ("instruct-pix2pix", dict(init=photograph(), mask=mask()))])
def test_pictures_and_masks_that_do_not_go_together_are_told(row, settings):
    sd, steps = StableDiffusion(small(row)), []
    with pytest.raises(UserError) as error:
        sd.generate("a cat", steps=2, callback=steps.append, **settings)
    assert "\n" not in str(error.value) and ("mask" in str(error.value) or "picture" in str(error.value)) and not steps


# --- properties ---

FURTHER = {"sd2": {}, "sdxl": {}, "sd1-inpaint": dict(init=photograph(), mask=mask()), "instruct-pix2pix": dict(init=photograph())}


@pytest.mark.parametrize("deep_every", [1, 2])
@pytest.mark.parametrize("row", FURTHER)
def test_a_batch_equals_its_pictures_one_by_one(row, deep_every):
    """And with little memory: guidance in as many passes as there are conditions."""
    sd = random_model(small(row))
    settings = dict(steps=3, negative_prompt="a dog", sampler="euler_a", deep_every=deep_every) | FURTHER[row]
    together = sd.generate("a cat", seed=7, batch=2, **settings)
    for sd.lowmem in False, True:
        alone = [sd.generate("a cat", seed=7 + i, **settings)[0] for i in range(2)]
        assert max(map(levels_apart, together, alone)) <= 1
    assert levels_apart(*together) > 10


@pytest.mark.parametrize("row, dtype", [("sd2", torch.float16), ("sdxl", torch.float16), ("sdxl", torch.bfloat16), ("sd1-inpaint", torch.bfloat16),
                                        ("instruct-pix2pix", torch.float16)])
def test_half_precision_draws_much_the_same(row, dtype):
    sd = random_model(small(row))
    settings = dict(steps=3, guidance=2.0) | FURTHER[row]
    exact = sd.generate("a cat", **settings)[0]
    sd.place("cpu", dtype)
    found = psnr(sd.generate("a cat", **settings)[0], exact)
    print(f"{found:.1f} dB")
    assert found > (35 if dtype == torch.bfloat16 else 50)


# --- scores that fp16 cannot hold ---

def in_its_inputs_numbers(q, k, v):
    """Attention whose scores are of the inputs' dtype, as LDM computes it and some devices still do; PyTorch's kernel on the CPU has them in fp32."""
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("kernel", [F.scaled_dot_product_attention, in_its_inputs_numbers])
@pytest.mark.parametrize("upcast", [True, False])
def test_scores_beyond_fp16(upcast, kernel, monkeypatch):
    """Every query is its own key, 40 times as long: q.k is about 100,000 and what is found is the input."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    layer, x = CrossAttention(64, 64, 1, upcast).requires_grad_(False), torch.randn(1, 16, 64).half()
    for projection, scale in (layer.to_q, 40), (layer.to_k, 40), (layer.to_v, 1), (layer.to_out[0], 1):
        projection.weight.copy_(scale * torch.eye(64))
    layer.to_out[0].bias.zero_()
    assert float((1600 * x.float() @ x.float().mT).max()) > 65504
    found = layer.half()(x)
    if upcast:
        assert relative_error(found, x) < 1e-3
    elif kernel is in_its_inputs_numbers:
        assert found.isnan().any()


def test_sd2_upcasts(monkeypatch):
    """The whole UNet in fp16: finite as its row has it, not without."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", in_its_inputs_numbers)
    cfg = small("sd2").unet
    for upcast in True, False:
        unet = randomise(UNetModel(replace(cfg, upcast_attention=upcast) if not upcast else cfg))
        for name, p in unet.named_parameters():
            if "to_q" in name or "to_k" in name:
                p.mul_(150)
        out = unet.half()(torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, cfg.context_dim))
        assert out.isfinite().all() == upcast
