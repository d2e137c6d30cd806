"""The example against diffusers' ControlNetModel and its pipelines, with random weights."""
import re
import sys
from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import controlnet
from controlnet import ControlNet, controlled, diffusers_control_name, load

from extras.formats import save
from model import UNetModel
from sd import BUILTIN, PRESETS, Preset, StableDiffusion, UserError
from tests.command import SHEET
from tests.common import (
    SDXL_UNET,
    assert_agree,
    make_scheduler,
    manifest,
    on_meta,
    our_picture,
    pair,
    psnr,
    random_model,
    randomize,
    relative_error,
    small,
    their_picture,
)

pytestmark = pytest.mark.filterwarnings(  # diffusers with numpy 2
    "ignore:__array__ implementation:DeprecationWarning"
)
torch.set_num_threads(1)
PIPELINES = {
    "sd1": diffusers.StableDiffusionControlNetPipeline,
    "sd2": diffusers.StableDiffusionControlNetPipeline,
    "sdxl": diffusers.StableDiffusionXLControlNetPipeline,
}


def in_diffusers(preset: Preset, state: dict) -> dict:
    """Our tensors by the names diffusers' own code gives them."""
    kind = SDXL_UNET | {"num_class_embeds": None} if preset.unet.adm_in_channels else {}
    return convert_controlnet_checkpoint(
        dict(state), {"layers_per_block": preset.unet.num_res_blocks} | kind
    )


def models(name: str):
    if len(PRESETS[name].text_encoders) == 2:
        return pair(name, diffusers.StableDiffusionXLPipeline)
    return pair(name, diffusers.StableDiffusionPipeline)


@cache
def controls(name: str) -> tuple[StableDiffusion, ControlNet, diffusers.ControlNetModel]:
    """A small random model of this row, a random ControlNet for it, and diffusers' equal."""
    sd, pipe = models(name)
    control = randomize(ControlNet(sd.unet), seed=7)
    reference = diffusers.ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
    state = {
        diffusers_control_name(key, sd.preset): tensor
        for key, tensor in control.state_dict().items()
    }
    reference.load_state_dict(state, strict=True)
    return sd, control, reference.eval().requires_grad_(False)


@cache
def drawing(width: int = 64, height: int = 64) -> Image.Image:
    """Some white lines on black, and a red one."""
    a = np.zeros((height, width, 3), np.uint8)
    a[height // 4], a[:, width // 3], a[height // 2, :, 0] = 255, 255, 255
    return Image.fromarray(a)


def contiguous(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As save_file needs them."""
    return {name: tensor.contiguous() for name, tensor in state.items()}


def hint(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


# --- names and shapes ---


def test_names_and_shapes_are_those_of_the_first_control_sd15_files():
    """cldm_v15.yaml and cldm.py.

    The UNet's first half as in any SD 1.x file, eight convolutions for the hint, 12 + 1 that
    start at zero.
    """
    first_half = r"model\.diffusion_model\.((time_embed|input_blocks|middle_block)\..*)"
    matches = {re.fullmatch(first_half, name): shape for name, shape in manifest("sd1").items()}
    wanted = {
        match[1]: tuple(map(int, shape.split("x"))) for match, shape in matches.items() if match
    }

    def convolution(name: str, c_in: int, c_out: int, side: int) -> None:
        wanted.update({f"{name}.weight": (c_out, c_in, side, side), f"{name}.bias": (c_out,)})

    for i, (c_in, c_out) in enumerate(
        [(3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320)]
    ):
        convolution(f"input_hint_block.{2 * i}", c_in, c_out, 3)
    for i, c in enumerate([320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]):
        convolution(f"zero_convs.{i}.0", c, c, 1)
    convolution("middle_block_out.0", 1280, 1280, 1)
    state = ControlNet(on_meta(UNetModel, PRESETS["sd1"].unet)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted


@pytest.mark.parametrize(
    "name, reference",
    [
        ("sd1", dict(cross_attention_dim=768)),
        (
            "sd2",
            dict(
                cross_attention_dim=1024,
                attention_head_dim=(5, 10, 20, 20),
                use_linear_projection=True,
            ),
        ),
        (
            "sdxl",
            dict(
                cross_attention_dim=2048,
                attention_head_dim=(5, 10, 20),
                use_linear_projection=True,
                block_out_channels=(320, 640, 1280),
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                transformer_layers_per_block=(1, 2, 10),
                addition_embed_type="text_time",
                addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=2816,
            ),
        ),
    ],
)
def test_names_and_shapes_are_those_of_diffusers(name, reference):
    """At full size; what diffusers' own code makes of our names is the same again."""
    with torch.device("meta"):
        wanted = {
            key: tensor.shape
            for key, tensor in diffusers.ControlNetModel(**reference).state_dict().items()
        }
        state = ControlNet(UNetModel(PRESETS[name].unet)).state_dict()
    found = {
        diffusers_control_name(key, PRESETS[name]): tensor.shape for key, tensor in state.items()
    }
    assert len(found) == len(state) and found == wanted
    renamed = in_diffusers(PRESETS[name], state)
    assert {key for key in renamed if "add_embedding" not in key} == {
        key for key in found if "add_embedding" not in key
    }
    assert all(
        renamed[diffusers_control_name(key, PRESETS[name])] is tensor
        for key, tensor in state.items()
        if not key.startswith("label_emb")
    )


# --- numbers ---


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("width, height", [(64, 64), (72, 40)])
def test_residuals_equal_diffusers(name, width, height):
    """Each row of the batch has its own text and time; all have the same hint."""
    sd, control, reference = controls(name)
    cfg = sd.preset.unet
    x, t, context = (
        torch.randn(2, 4, height // 8, width // 8),
        torch.tensor([3, 950]),
        torch.randn(2, 77, cfg.context_dim),
    )
    y, added = None, None
    if cfg.adm_in_channels is not None:
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [96, 64, 8, 0, 64, 64]])
        y = torch.cat(
            [torch.randn(2, 48), controlnet.timestep_embedding(sizes.flatten(), 16).reshape(2, -1)],
            dim=1,
        )
        added = {"text_embeds": y[:, :48], "time_ids": sizes}
    found = control(hint(drawing(width, height)), x, t, context, y)
    skips, middle = reference(
        x,
        t,
        context,
        hint(drawing(width, height)).expand(2, -1, -1, -1),
        added_cond_kwargs=added,
        return_dict=False,
    )
    assert len(found) == len(skips) + 1
    for residual, theirs in zip(found, [*skips, middle]):
        assert relative_error(residual, theirs) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("scale, size", [(1.0, (64, 64)), (0.6, (72, 40))])
def test_picture_equals_diffusers(name, scale, size):
    sd, control, reference = controls(name)
    unused = ("safety_checker", "feature_extractor", "image_encoder")
    parts = {key: part for key, part in models(name)[1].components.items() if key not in unused}
    more = dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    if name == "sdxl":
        more = dict(add_watermarker=False)
    pipe = PIPELINES[name](**parts | more, controlnet=reference)
    pipe.scheduler = make_scheduler("ddim", "leading", sd.preset.prediction_type)
    pipe.set_progress_bar_config(disable=True)
    width, height = size
    options = dict(negative_prompt="grey", width=width, height=height)
    ours = dict(steps=7, guidance=7.5, sampler="ddim")
    with controlled(sd.unet, control, hint(drawing(*size)), scale):
        mine = our_picture(sd, **options, **ours)
    theirs = their_picture(pipe, **options, image=drawing(*size), num_inference_steps=7,
                           guidance_scale=7.5, controlnet_conditioning_scale=scale)
    assert_agree(mine, theirs, latents=90)
    plain = our_picture(sd, **options, **ours)
    assert psnr(mine[0], plain[0]) < 30  # the hint has an effect, and none after it


@pytest.mark.parametrize("kind", ["fresh", "scale 0"])
@pytest.mark.parametrize("fast", [True, False])
def test_a_fresh_one_and_scale_0_change_nothing(kind, fast):
    """Bitwise, with the built-in model."""
    sd = StableDiffusion.load(BUILTIN, "cpu", torch.float32, fast=fast)
    control, scale = ControlNet(sd.unet), 1.0
    if kind == "scale 0":
        control, scale = randomize(control), 0.0
    calls = []
    control.register_forward_hook(lambda *_: calls.append(1))
    options = dict(steps=4, seed=3, batch=2)
    plain = sd.generate("a red apple", **options)
    with controlled(sd.unet, control, hint(drawing()), scale):
        images = sd.generate("a red apple", **options)
    assert len(calls) == 4 and all(np.array_equal(a, b) for a, b in zip(images, plain))


def test_fast_and_plain_agree():
    """extras/fast.py runs the hooks, between two pictures without a hint."""
    pictures, state = [], None
    for fast in (False, True):
        sd = StableDiffusion.load(BUILTIN, "cpu", torch.float32, fast=fast)
        control = randomize(ControlNet(sd.unet))
        if state is None:
            state = control.state_dict()
        control.load_state_dict(state)  # random numbers follow the memory format
        before = sd.generate("a red apple", steps=4)[0]
        with controlled(sd.unet, control, hint(drawing())):
            led = sd.generate("a red apple", steps=4)[0]
        assert psnr(led, before) < 30
        assert np.array_equal(sd.generate("a red apple", steps=4)[0], before)
        pictures.append(led)
    assert psnr(*pictures) > 50


def test_a_fresh_one_is_diffusers_fresh_one():
    """A copy of the UNet. The hint's first seven convolutions start at random in both."""
    sd, pipe = models("sd1")
    reference = diffusers.ControlNetModel.from_unet(pipe.unet).state_dict()
    for key, tensor in ControlNet(sd.unet).state_dict().items():
        if not key.startswith("input_hint_block") or key.startswith("input_hint_block.14"):
            assert torch.equal(tensor, reference[diffusers_control_name(key, sd.preset)]), key


def test_an_error_leaves_no_hooks():
    sd, control, _ = controls("sd1")
    with pytest.raises(UserError), controlled(sd.unet, control, hint(drawing())):
        sd.generate("a cat", steps=0)
    for module in sd.unet.modules():
        assert not (module._forward_hooks or module._forward_pre_hooks)


# --- files ---


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["prefixed", "bare", "whole", "pth", "folder", "folder's file"])
def test_every_layout_holds_the_same(kind, name, tmp_path):
    """`whole`: as the first control_sd15 files, the frozen model beside it."""
    sd, control, reference = controls(name)
    prefixed = {
        "control_model." + key: tensor.contiguous() for key, tensor in control.state_dict().items()
    }
    path = tmp_path / "c.safetensors"
    if kind == "prefixed":
        save_file(prefixed, path)
    elif kind == "bare":
        save_file(
            {key.removeprefix("control_model."): tensor for key, tensor in prefixed.items()}, path
        )
    elif kind == "whole":
        save_file(
            prefixed
            | {key: tensor.contiguous() for key, tensor in sd.state_dict().items()}
            | {"betas": torch.zeros(1000)},
            path,
        )
    elif kind == "pth":
        path = path.with_suffix(".pth")
        torch.save({"state_dict": prefixed}, path)
    else:
        path = tmp_path / "folder"
        reference.save_pretrained(path)
        path = path if kind == "folder" else path / "diffusion_pytorch_model.safetensors"
    state = load(path, sd).state_dict()
    assert state.keys() == control.state_dict().keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in control.state_dict().items())


def test_a_hint_of_twice_the_size_is_halved():
    """For the built-in model, whose latents are a 16th of the picture."""
    sd = StableDiffusion.load(BUILTIN, "cpu", torch.float32)
    control = randomize(ControlNet(sd.unet))
    large = torch.rand(1, 3, 128, 128)
    inputs = torch.randn(1, 16, 8, 8), torch.tensor([500])
    cond = sd.encode_prompt(["a red apple"])
    with torch.no_grad():
        found = control(large, *inputs, **cond)
        wanted = control(torch.nn.functional.avg_pool2d(large, 2), *inputs, **cond)
    assert all(map(torch.equal, found, wanted))


# --- the command ---

@pytest.fixture
def run(command):
    return partial(command, controlnet, "a red apple")


def test_without_a_controlnet_the_command_draws_as_sd_does(tmp_path, run):
    drawing().save(tmp_path / "edges.png")
    code, err, out = run("--control", tmp_path / "edges.png", "--seed", 4, "--steps", 3,
                         "--out", tmp_path / "x.png")
    assert code == 0 and "no --controlnet" in out
    (plain,) = StableDiffusion.load(BUILTIN).generate("a red apple", seed=4, steps=3)
    assert np.array_equal(Image.open(tmp_path / "x.png"), plain)


def test_outlines_of_a_picture_are_taken_as_the_hint(tmp_path, run, monkeypatch):
    photo = Image.open(SHEET).convert("RGB").crop((0, 0, 128, 128))
    photo.save(tmp_path / "photo.png")
    seen = []

    def spy(unet, control, hint, scale):
        seen.append((hint, scale))
        return nullcontext()

    monkeypatch.setattr(controlnet, "controlled", spy)
    code, _, _ = run("--control", tmp_path / "photo.png", "--outlines", "--steps", 1,
                     "--out", tmp_path / "x.png")
    assert code == 0
    ((found, scale),) = seen
    assert scale == 1 and torch.equal(found, hint(controlnet.outlines(photo).convert("RGB")))
    assert 0.02 < found.mean() < 0.5


@pytest.mark.parametrize("option", ["--n", "--batch"])  # --batch is the old name
def test_with_one_it_draws_as_from_python(tmp_path, run, option):
    sd = StableDiffusion.load(BUILTIN)
    state = randomize(ControlNet(sd.unet)).state_dict()
    save_file(contiguous(state), tmp_path / "c.safetensors")
    edges = drawing().resize((128, 128), Image.Resampling.NEAREST)
    edges.save(tmp_path / "edges.png")
    code, _, _ = run("--control", tmp_path / "edges.png",
                     "--controlnet", tmp_path / "c.safetensors", "--scale", 2, "--steps", 3,
                     option, 2, "--out", tmp_path / "x.png")
    names = sorted(path.name for path in tmp_path.glob("x*"))
    assert code == 0 and names == ["x-0.png", "x-1.png"]
    control = load(tmp_path / "c.safetensors", sd)
    small_edges = Image.open(tmp_path / "edges.png").resize((128, 128), Image.Resampling.LANCZOS)
    with controlled(sd.unet, control, hint(small_edges), 2):
        images = sd.generate("a red apple", steps=3, batch=2)
    for i, image in enumerate(images):
        assert psnr(Image.open(tmp_path / f"x-{i}.png"), image) > 50
    assert psnr(images[0], sd.generate("a red apple", steps=3)[0]) < 30


def write_wrong_files(tmp_path: Path) -> None:
    """What the command must refuse: no picture, no checkpoint, ControlNets that do not fit."""
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "damaged.safetensors").write_bytes(b"0123456789")
    (tmp_path / "empty").mkdir()
    sd, control, reference = controls("sd1")
    save_file(contiguous(control.state_dict()), tmp_path / "narrow.safetensors")
    reference.save_pretrained(tmp_path / "narrow")
    builtin = contiguous(ControlNet(StableDiffusion.load(BUILTIN).unet).state_dict())
    del builtin["zero_convs.1.0.bias"]
    save_file(builtin, tmp_path / "cut.safetensors")
    save(random_model(small("sd1-inpaint")), tmp_path / "inpaint.safetensors")


def test_wrong_use_ends_in_one_line(tmp_path, run):
    write_wrong_files(tmp_path)
    drawing().save(tmp_path / "edges.png")
    edges, out = ("--control", tmp_path / "edges.png"), ("--out", tmp_path / "x.png")
    given = (*edges, *out)
    before = set(tmp_path.iterdir())
    for message, args in {
        "cannot read the picture": ("--control", tmp_path / "text.png", *out),
        "cannot read the picture ": ("--control", tmp_path / "none.png", *out),
        "must end in .png": (*edges, "--out", tmp_path / "x.jpg"),
        "the scale must be a number": (*given, "--scale", "nan"),
        "no such file": (*given, "--controlnet", tmp_path / "none.safetensors"),
        "no such file: .*diffusion_pytorch_model.safetensors":
            (*given, "--controlnet", tmp_path / "empty"),
        "not a checkpoint that can be read":
            (*given, "--controlnet", tmp_path / "damaged.safetensors"),
        "is no ControlNet": (*given, "--controlnet", BUILTIN),
        "is for a UNet with 128 channels in the middle and a context_dim of 32;"
        " this one has 192 and 128":
            (*given, "--controlnet", tmp_path / "narrow.safetensors"),
        "is for a UNet with 128 channels": (*given, "--controlnet", tmp_path / "narrow"),
        "1 missing: zero_convs.1.0.bias":
            (*given, "--controlnet", tmp_path / "cut.safetensors"),
        "a multiple of 16": (*given, "--width", 63),
        "inpaint.safetensors changes pictures":
            (*given, "--ckpt", tmp_path / "inpaint.safetensors"),
        "no such file: .*none.ckpt": (*given, "--ckpt", tmp_path / "none.ckpt"),
    }.items():
        code, err, _ = run(*args)
        lines = err.strip().splitlines()
        assert code == 2 and re.search(message, err) and len(lines) == 1, (message, err)
        assert set(tmp_path.iterdir()) == before
