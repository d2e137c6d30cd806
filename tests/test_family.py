"""Parity of the other rows of PRESETS: SD 2.x, SDXL, the turbos, LCM. No downloads.

As in test_sd.py: random weights, renamed by diffusers' own code, compared with diffusers and
transformers. Text encoders and UNets run at full size. What draws pictures here are the rows of
PRESETS with their widths cut (`small`), so that everything else in a row is what is tested.
Inpainting and InstructPix2Pix: test_edit.py.
"""
import math
from dataclasses import replace

import diffusers
import pytest
import torch
import torch.nn.functional as F

from clip import CLIPTextModel, Tokenizer
from extras import fast
from extras.formats import save
from extras.openclip import official_state_dict, to_openclip
from model import CrossAttention, UNetConfig, UNetModel, timestep_embedding
from sampler import SIGMAS, SPACINGS, NoiseSchedule
from sd import PRESETS, StableDiffusion, crop_sizes
from tests.common import (
    BETAS,
    EULER_START,
    PREDICTION_TYPES,
    PROMPTS,
    SDXL_UNET,
    assert_agree,
    available_memory,
    cast,
    count_epsilons,
    levels_apart,
    make_scheduler,
    manifest,
    on_meta,
    our_picture,
    pair,
    psnr,
    random_model,
    randomize,
    reference_openclip,
    reference_text,
    reference_tokenizer,
    reference_unet,
    relative_error,
    small,
    their_picture,
    with_prefix,
    zero_padding_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
NEGATIVE = PROMPTS["negative_prompt"]
SQUARE = dict(width=64, height=64)
SDXL_PIPELINE = diffusers.StableDiffusionXLPipeline


# --- names and shapes ---

def names_and_shapes(name: str) -> dict[str, str]:
    state = official_state_dict(on_meta(StableDiffusion, PRESETS[name]))
    return {name: "x".join(map(str, tensor.shape)) for name, tensor in state.items()}


@pytest.mark.parametrize("file, rows, parameters", [
    ("sd1-inpaint", ["sd1-inpaint"], 859_535_364 + 83_653_863 + 123_060_480),
    ("sd2", ["sd2-base", "sd2", "sd-turbo"], 865_910_724 + 83_653_863 + 354_032_640),
    ("sdxl", ["sdxl", "sdxl-turbo"], 2_567_463_684 + 83_653_863 + 123_060_480 + 694_659_840)])
def test_names_and_shapes_are_those_of_official_files(file, rows, parameters):
    wanted = manifest(file)
    sizes = [math.prod(map(int, shape.split("x"))) for shape in wanted.values()]
    assert sum(sizes) == parameters
    for row in rows:
        assert names_and_shapes(row) == wanted


def test_instruct_pix2pix_is_sd1_with_eight_channels():
    wanted = manifest("sd1") | {"model.diffusion_model.input_blocks.0.0.weight": "320x8x3x3"}
    assert names_and_shapes("instruct-pix2pix") == wanted


SD1_ROWS = ["sd1", "sd1-inpaint", "instruct-pix2pix"]
VERSIONS = {name: "sd1" for name in SD1_ROWS} | {
    "sd2-base": "sd2", "sd2": "sd2", "sd-turbo": "sd2", "sdxl": "sdxl", "sdxl-turbo": "sdxl"}
TEXT_ENCODERS = {  # activation, width of a head, clip skip, final norm, pad
    "sd1": [("quick_gelu", 64, 0, True, 49407)],
    "sd2": [("gelu", 64, 1, True, 0)],
    "sdxl": [("quick_gelu", 64, 1, False, 49407), ("gelu", 64, 1, False, 0)]}


@pytest.mark.parametrize("name", VERSIONS)
def test_what_shapes_do_not_show(name):
    """As published, since the references below are built from the rows.

    v2-inference.yaml, v2-inference-v.yaml, sd_xl_base.yaml; open_clip's ViT-H-14 and ViT-bigG-14:
    heads of 64 in all but SD 1.x's UNet, which has 8; the scale of latents; activation and padding
    of CLIP and OpenCLIP; what is predicted.
    """
    row, version = PRESETS[name], VERSIONS[name]
    heads_of_64 = tuple(row.unet.model_channels * m // 64 for m in row.unet.channel_mult)
    assert row.unet.num_heads == ((8,) * 4 if version == "sd1" else heads_of_64)
    assert row.unet.upcast_attention == (version == "sd2")
    assert row.vae.scale_factor == (0.13025 if version == "sdxl" else 0.18215)
    assert row.prediction_type == ("v" if name == "sd2" else "eps")
    found = [(text.hidden_act, text.hidden_size // text.num_attention_heads, text.clip_skip,
              text.final_norm, text.pad) for text in row.text_encoders]
    assert found == TEXT_ENCODERS[version]


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_files_come_back_as_they_went_in(suffix, tmp_path, monkeypatch):
    """Both encoders, with query, key and value cut apart again.

    What model it is stands in the metadata, or, in a .ckpt as in official files, nowhere.
    """
    sd, path = random_model(small("sdxl")), tmp_path / f"a{suffix}"
    if suffix == ".ckpt":
        monkeypatch.setitem(PRESETS, "small", sd.preset)
        first, second = (encoder.config.prefix for encoder in sd.text_encoders)
        unused = {first + "embeddings.position_ids": torch.arange(77)[None],
                  second + "logit_scale": torch.tensor(4.6)}
        torch.save(official_state_dict(sd) | unused, path)
    else:
        save(sd, path, torch.float32)
    again = StableDiffusion.load(path, "cpu", torch.float32)
    assert again.preset == sd.preset
    state, found = sd.state_dict(), again.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())
    cond, found = sd.encode_prompt(["a cat"]), again.encode_prompt(["a cat"])
    assert found.keys() == cond.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in cond.items())


# --- the networks ---

@pytest.mark.parametrize("name, encoder", [("sdxl", 0), ("sd2", 0), ("sdxl", 1)])
def test_text_matches_transformers(name, encoder):
    """CLIP-L: the vectors of the layer before the last, no norm.

    OpenCLIP-H: with the final norm. OpenCLIP-bigG: no norm; and the pooled vector. OpenCLIP-H at
    full size, of the others the first 8 layers, to save time.
    """
    cfg, prompts = PRESETS[name].text_encoders[encoder], ["a red apple", "cat " * 75]
    if name != "sd2":
        cfg = replace(cfg, num_hidden_layers=8)
    text = randomize(on_meta(CLIPTextModel, cfg))
    reference, tokenizer = reference_text, reference_tokenizer()
    state = text.state_dict()
    if cfg.openclip:
        reference, tokenizer = reference_openclip, zero_padding_tokenizer()
        state = to_openclip(state)
    reference = reference(cfg, with_prefix(cfg.prefix, state))
    assert set(count_epsilons(text)) == set(count_epsilons(reference)) == {1e-5}
    tokens = Tokenizer(cfg.pad)(prompts)
    wanted = tokenizer(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    assert tokens.tolist() == wanted
    with torch.no_grad():
        (features, pooled), answer = text(tokens), reference(tokens, output_hidden_states=True)
    wanted = answer.last_hidden_state if cfg.final_norm else answer.hidden_states[-2]
    errors = [relative_error(features, wanted)]
    if (name, encoder) == ("sdxl", 1):
        errors.append(relative_error(pooled, answer.text_embeds))
    print(errors)
    assert max(errors) < 1e-5


FULL_SDXL = pytest.param("sdxl", 320, marks=pytest.mark.skipif(
    available_memory() < 14, reason="SDXL's UNet takes 10.3 GB in fp32: needs 14 GB of memory"))


@pytest.mark.parametrize("name, width", [("sd2", 320), ("sdxl", 64), FULL_SDXL])
def test_unet_matches_diffusers(name, width):
    """At full size, SDXL with a fifth of its widths too; plain and fast.

    At an odd size, each row with a time and with six sizes of its own.
    """
    cfg, settings = PRESETS[name].unet, {}
    if name == "sdxl":
        heads = tuple(width // 64 * m for m in cfg.channel_mult)
        cfg = replace(cfg, model_channels=width, num_heads=heads)
        settings = dict(SDXL_UNET, addition_time_embed_dim=256)
    unet = randomize(on_meta(UNetModel, cfg))
    state = with_prefix("model.diffusion_model.", unet.state_dict())
    reference = reference_unet(cfg, state, **settings)
    assert count_epsilons(unet) == count_epsilons(reference)
    t, context = torch.tensor([981.0, 37.25]), torch.randn(2, 77, cfg.context_dim)
    y, added = None, None
    if name == "sdxl":
        pooled = torch.randn(2, 1280)
        sizes = torch.tensor([[1024, 768, 0, 0, 1024, 768], [640, 1536, 8, 248, 512, 1024]])
        embedded = timestep_embedding(sizes.flatten(), 256).view(2, -1)
        y = torch.cat([pooled, embedded], dim=1)
        added = dict(text_embeds=pooled, time_ids=sizes)
    x = torch.randn(2, 4, 11, 13)
    with torch.no_grad():
        wanted = reference(x, t, context, added_cond_kwargs=added).sample
        for _ in "plain", "fast":
            error = relative_error(unet(x, t, context, y), wanted)
            print(error)
            assert error < 1e-5
            fast.swap_classes(unet, torch.device("cpu"))


def test_sdxl_takes_six_sizes():
    """Height and width, top and left, height and width, behind the pooled vector.

    They are the preset's size unless another is asked for.
    """
    sd, pipe = pair("sdxl", SDXL_PIPELINE)
    for sizes, numbers in ((crop_sizes(2, width=96, height=72), [72, 96, 0, 0, 72, 96]),
                           (None, [64, 64, 0, 0, 64, 64])):
        y = sd.encode_prompt(["a cat", "a dog"], sizes)["y"]
        wanted = pipe.unet.add_time_proj(torch.tensor(numbers)).flatten().expand(2, -1)
        assert y.shape == (2, 144) and relative_error(y[:, 48:], wanted) < 1e-5


# --- whole pictures against diffusers' pipelines ---

@pytest.mark.parametrize("name, spacing", [("ddim", "leading"), ("euler", "linspace"),
                                           ("dpmpp_2m", "trailing")])
@pytest.mark.parametrize("row", ["sd2-base", "sd2"])
def test_sd2_matches_diffusers(row, name, spacing):
    """eps and v."""
    sd, pipe = pair(row)
    pipe.scheduler = make_scheduler(name, spacing, sd.preset.prediction_type)
    start = EULER_START if name == "euler" else 1
    assert_agree(our_picture(sd, negative_prompt=NEGATIVE, steps=5, guidance=7.5, sampler=name,
                             timestep_spacing=spacing),
                 their_picture(pipe, negative_prompt=NEGATIVE, num_inference_steps=5,
                               guidance_scale=7.5, **SQUARE, start=start), 100)


@pytest.mark.parametrize("negative", ["", NEGATIVE])
@pytest.mark.parametrize("width, height", [(64, 64), (96, 56)])
def test_sdxl_matches_diffusers(negative, width, height):
    """An empty negative prompt is zeros for it, as None is for diffusers."""
    sd, pipe = pair("sdxl", SDXL_PIPELINE)
    pipe.scheduler = make_scheduler("ddim", "leading")
    assert_agree(our_picture(sd, negative_prompt=negative, steps=5, sampler="ddim", width=width,
                             height=height),
                 their_picture(pipe, negative_prompt=negative or None, num_inference_steps=5,
                               guidance_scale=5.0, width=width, height=height), 100)


def test_the_comparison_tells_conditions_apart():
    """The control: each of these is below 50 dB.

    Other sizes, the vectors of an empty text instead of zeros, another letter, another pad.
    """
    sd, pipe = pair("sdxl", SDXL_PIPELINE)
    pipe.scheduler = make_scheduler("ddim", "leading")
    settings = dict(num_inference_steps=4, guidance_scale=5.0, **SQUARE)
    image, _ = our_picture(sd, steps=4, sampler="ddim")

    def compare(**other) -> float:
        found = psnr(image, their_picture(pipe, **settings | other)[0])
        print(other, f"{found:.1f} dB")
        return found

    assert compare() >= 50
    for other in (dict(original_size=(72, 64)), dict(crops_coords_top_left=(0, 8)),
                  dict(negative_prompt=""), dict(prompt="a red apples")):
        assert compare(**other) < 50
    pipe.tokenizer_2 = reference_tokenizer()
    found = compare()
    pipe.tokenizer_2 = zero_padding_tokenizer()
    assert found < 50


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("row, pipeline, kind", [
    ("sd-turbo", diffusers.StableDiffusionPipeline, diffusers.EulerDiscreteScheduler),
    ("sdxl-turbo", SDXL_PIPELINE, diffusers.EulerAncestralDiscreteScheduler)])
def test_turbo_matches_diffusers(row, pipeline, kind, steps):
    """Only the number of steps is given: sampler, spacing and guidance are the row's.

    Guidance 0 in diffusers is our 1: none.
    """
    sd, pipe = pair(row, pipeline)
    pipe.scheduler = kind(**BETAS, timestep_spacing="trailing")
    ours = our_picture(sd, **dict(steps=steps) if steps > 1 else {})
    settings = dict(num_inference_steps=steps, guidance_scale=0.0, **SQUARE)
    assert_agree(ours, their_picture(pipe, **settings))
    assert_agree(ours, their_picture(pipe, **settings, start=EULER_START), 100)


@pytest.mark.parametrize("steps", [1, 2, 4, 8])
@pytest.mark.parametrize("row, pipeline", [("sd2", diffusers.StableDiffusionPipeline),
                                           ("sdxl", SDXL_PIPELINE)])  # v and eps
def test_lcm_matches_diffusers(row, pipeline, steps):
    sd, pipe = pair(row, pipeline)
    prediction_type = PREDICTION_TYPES[sd.preset.prediction_type]
    pipe.scheduler = diffusers.LCMScheduler(**BETAS, prediction_type=prediction_type)
    assert_agree(our_picture(sd, steps=steps, guidance=1.0, sampler="lcm"),
                 their_picture(pipe, num_inference_steps=steps, guidance_scale=0.0, **SQUARE), 100)


@pytest.mark.parametrize("guidance", [1.0, 8.5])
def test_lcm_that_guides_itself_matches_diffusers(guidance):
    """The scale goes into the time embedding; one pass, and no negative prompt."""
    sd, pipe = pair("lcm")
    components = pipe.components | {"scheduler": diffusers.LCMScheduler(**BETAS)}
    pipe = diffusers.LatentConsistencyModelPipeline(**components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    calls = []
    sd.unet.register_forward_pre_hook(lambda module, inputs: calls.append(len(inputs[0])))
    ours = our_picture(sd, guidance=guidance, negative_prompt="blue")
    assert calls == [1] * 4
    theirs = their_picture(pipe, num_inference_steps=4, guidance_scale=guidance, **SQUARE)
    assert_agree(ours, theirs, 100)
    assert psnr(ours[0], our_picture(sd, guidance=3.0)[0]) < 50


def test_times_of_lcm():
    schedule = NoiseSchedule()
    for steps in range(1, 51):
        reference = diffusers.LCMScheduler(**BETAS)
        reference.set_timesteps(steps)
        times = [schedule.sigma_to_t(sigma) for sigma in SPACINGS["lcm"](steps, SIGMAS)]
        assert times == pytest.approx(reference.timesteps.tolist(), abs=1e-6)
    for steps in 51, 300, 334, 501, 1000:  # more than there are: from pure noise all the same
        assert SPACINGS["lcm"](steps, SIGMAS)[0] == pytest.approx(float(SIGMAS[-1]))


# --- properties ---

@pytest.mark.parametrize("row", ["sd2", "sdxl"])
def test_a_batch_equals_its_pictures_one_by_one(row):
    sd = random_model(small(row))
    settings = dict(steps=3, negative_prompt="a dog", sampler="euler_a")
    together = sd.generate("a cat", seed=7, batch=2, **settings)
    alone = [sd.generate("a cat", seed=7 + i, **settings)[0] for i in range(2)]
    assert max(map(levels_apart, together, alone)) <= 1
    assert levels_apart(*together) > 10


@pytest.mark.parametrize("row, dtype", [("sd2", torch.float16), ("sdxl", torch.float16),
                                        ("sdxl", torch.bfloat16)])
def test_half_precision_draws_much_the_same(row, dtype):
    sd = random_model(small(row))
    settings = dict(steps=3, guidance=2.0)
    exact = sd.generate("a cat", **settings)[0]
    cast(sd, dtype)
    found = psnr(sd.generate("a cat", **settings)[0], exact)
    print(f"{found:.1f} dB")
    assert found > (35 if dtype == torch.bfloat16 else 50)


# --- scores that fp16 cannot hold ---

def attention_in_fp16(q, k, v):
    """Attention whose scores have the inputs' dtype: LDM computes it so, and some devices.

    PyTorch's kernel on the CPU has them in fp32.
    """
    return (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.mark.parametrize("kernel", [F.scaled_dot_product_attention, attention_in_fp16])
@pytest.mark.parametrize("upcast", [True, False])
def test_scores_beyond_fp16(upcast, kernel, monkeypatch):
    """Every query is its own key times 40: q.k is about 100,000, and the input is found."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", kernel)
    layer = CrossAttention(64, 64, 1, UNetConfig(upcast_attention=upcast)).requires_grad_(False)
    x = torch.randn(1, 16, 64).half()
    for projection, scale in ((layer.to_q, 40), (layer.to_k, 40), (layer.to_v, 1),
                              (layer.to_out[0], 1)):
        projection.weight.copy_(scale * torch.eye(64))
    layer.to_out[0].bias.zero_()
    assert float((1600 * x.float() @ x.float().mT).max()) > 65504
    found = layer.half()(x)
    if upcast:
        assert relative_error(found, x) < 1e-3
    elif kernel is attention_in_fp16:
        assert found.isnan().any()


def test_sd2_upcasts(monkeypatch):
    """The whole UNet in fp16: finite as its row has it, not without."""
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_in_fp16)
    cfg = small("sd2").unet
    assert cfg.upcast_attention
    for upcast in True, False:
        unet = randomize(UNetModel(replace(cfg, upcast_attention=upcast)))
        for name, p in unet.named_parameters():
            if "to_q" in name or "to_k" in name:
                p.mul_(150)
        context = torch.randn(1, 77, cfg.context_dim)
        out = unet.half()(torch.randn(1, 4, 8, 8), torch.tensor([500]), context)
        assert out.isfinite().all() == upcast
