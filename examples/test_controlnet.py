"""The example against diffusers' ControlNetModel and its pipelines, with random weights; no downloads. python -m pytest -q examples/test_controlnet.py"""
import gzip
import re
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_controlnet_checkpoint
from PIL import Image
from safetensors.torch import save_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import controlnet  # noqa: E402
from clip import MERGES  # noqa: E402
from controlnet import ControlNet, controlled, diffusers_control_name, load  # noqa: E402
from model import UNetModel  # noqa: E402
from sd import PRESETS, BUILTIN, StableDiffusion, UserError  # noqa: E402
from test_cli import DOCS, command  # noqa: E402
from test_family import SDXL_UNET, agree, ours, pair, small, theirs  # noqa: E402
from test_sd import on_meta, psnr, random_model, randomise, relative_error, same_numbers_every_time, scheduler  # noqa: E402, F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
torch.set_num_threads(1)
PIPELINES = {"sd1": diffusers.StableDiffusionControlNetPipeline, "sd2": diffusers.StableDiffusionControlNetPipeline,
             "sdxl": diffusers.StableDiffusionXLControlNetPipeline}


def in_diffusers(config, state: dict) -> dict:
    """Our tensors by the names diffusers' own code gives them."""
    kind = SDXL_UNET | {"num_class_embeds": None} if config.unet.adm_in_channels else {}
    return convert_controlnet_checkpoint(dict(state), {"layers_per_block": config.unet.num_res_blocks} | kind)


def models(name: str):
    return pair(name, diffusers.StableDiffusionXLPipeline if PRESETS[name].text_2 else diffusers.StableDiffusionPipeline)


@cache
def controls(name: str) -> tuple[StableDiffusion, ControlNet, diffusers.ControlNetModel]:
    """A small random model of this row, a random ControlNet for it, and diffusers' with the same weights."""
    sd, pipe = models(name)
    control = randomise(ControlNet(sd.unet), seed=7)
    reference = diffusers.ControlNetModel.from_unet(pipe.unet, load_weights_from_unet=False)
    state = {diffusers_control_name(key, sd.config): tensor for key, tensor in control.state_dict().items()}
    reference.load_state_dict(state, strict=True)
    return sd, control, reference.eval().requires_grad_(False)


@cache
def drawing(width: int = 64, height: int = 64) -> Image.Image:
    """Some white lines on black, and a red one."""
    a = np.zeros((height, width, 3), np.uint8)
    a[height // 4], a[:, width // 3], a[height // 2, :, 0] = 255, 255, 255
    return Image.fromarray(a)


def hint(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255


# --- names and shapes ---

def test_names_and_shapes_are_those_of_the_first_control_sd15_files():
    """cldm_v15.yaml and cldm.py: the UNet's first half as in any SD 1.x file, eight convolutions for the hint, 12 + 1 that start at zero."""
    first_half = r"model\.diffusion_model\.((time_embed|input_blocks|middle_block)\..*)"
    rows = [line.split("\t") for line in gzip.open(Path(MERGES).with_name("sd1.tsv.gz"), "rt")]
    wanted = {match[1]: tuple(map(int, row[1].split("x"))) for row in rows if (match := re.fullmatch(first_half, row[0]))}

    def convolution(name: str, c_in: int, c_out: int, side: int) -> None:
        wanted.update({f"{name}.weight": (c_out, c_in, side, side), f"{name}.bias": (c_out,)})
    for i, (c_in, c_out) in enumerate([(3, 16), (16, 16), (16, 32), (32, 32), (32, 96), (96, 96), (96, 256), (256, 320)]):
        convolution(f"input_hint_block.{2 * i}", c_in, c_out, 3)
    for i, c in enumerate([320, 320, 320, 320, 640, 640, 640, 1280, 1280, 1280, 1280, 1280]):
        convolution(f"zero_convs.{i}.0", c, c, 1)
    convolution("middle_block_out.0", 1280, 1280, 1)
    state = ControlNet(on_meta(UNetModel, PRESETS["sd1"].unet)).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == wanted


@pytest.mark.parametrize("name, reference", [
    ("sd1", dict(cross_attention_dim=768)),
    ("sd2", dict(cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20), use_linear_projection=True)),
    ("sdxl", dict(cross_attention_dim=2048, attention_head_dim=(5, 10, 20), use_linear_projection=True, block_out_channels=(320, 640, 1280),
                  down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), transformer_layers_per_block=(1, 2, 10),
                  addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816))])
def test_names_and_shapes_are_those_of_diffusers(name, reference):
    """At full size; what diffusers' own code makes of our names is the same again."""
    with torch.device("meta"):
        wanted = {key: tensor.shape for key, tensor in diffusers.ControlNetModel(**reference).state_dict().items()}
        state = ControlNet(UNetModel(PRESETS[name].unet)).state_dict()
    found = {diffusers_control_name(key, PRESETS[name]): tensor.shape for key, tensor in state.items()}
    assert len(found) == len(state) and found == wanted
    renamed = in_diffusers(PRESETS[name], state)
    assert {key for key in renamed if "add_embedding" not in key} == {key for key in found if "add_embedding" not in key}
    assert all(renamed[diffusers_control_name(key, PRESETS[name])] is tensor for key, tensor in state.items() if not key.startswith("label_emb"))


# --- numbers ---

@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("width, height", [(64, 64), (72, 40)])
def test_residuals_equal_diffusers(name, width, height):
    """Each row of the batch with words and a time of its own; the hint is the same for all."""
    sd, control, reference = controls(name)
    cfg = sd.config.unet
    x, t, context = torch.randn(2, 4, height // 8, width // 8), torch.tensor([3, 950]), torch.randn(2, 77, cfg.context_dim)
    y, added = None, None
    if cfg.adm_in_channels is not None:
        sizes = torch.tensor([[64, 64, 0, 0, 64, 64], [96, 64, 8, 0, 64, 64]])
        y = torch.cat([torch.randn(2, 48), controlnet.timestep_embedding(sizes.flatten(), 16).reshape(2, -1)], dim=1)
        added = {"text_embeds": y[:, :48], "time_ids": sizes}
    found = control(hint(drawing(width, height)), x, t, context, y)
    skips, middle = reference(x, t, context, hint(drawing(width, height)).expand(2, -1, -1, -1), added_cond_kwargs=added, return_dict=False)
    assert len(found) == len(skips) + 1
    for ours, theirs in zip(found, [*skips, middle]):
        assert relative_error(ours, theirs) < 1e-5


@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("scale, size", [(1.0, (64, 64)), (0.6, (72, 40))])
def test_picture_equals_diffusers(name, scale, size):
    sd, control, reference = controls(name)
    parts = {key: part for key, part in models(name)[1].components.items() if key not in ("safety_checker", "feature_extractor", "image_encoder")}
    more = dict(add_watermarker=False) if name == "sdxl" else dict(safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe = PIPELINES[name](**parts | more, controlnet=reference)
    pipe.scheduler = scheduler("ddim", "leading", sd.config.prediction)
    pipe.set_progress_bar_config(disable=True)
    width, height = size
    with controlled(sd.unet, control, hint(drawing(*size)), scale):
        mine = ours(sd, negative_prompt="grey", steps=7, guidance=7.5, sampler="ddim", width=width, height=height)
    agree(mine, theirs(pipe, negative_prompt="grey", image=drawing(*size), num_inference_steps=7, guidance_scale=7.5, width=width, height=height,
                       controlnet_conditioning_scale=scale), latents=90)
    plain = ours(sd, negative_prompt="grey", steps=7, guidance=7.5, sampler="ddim", width=width, height=height)
    assert psnr(mine[0], plain[0]) < 30  # so the hint counts, and nothing of it stays behind


@pytest.mark.parametrize("kind", ["fresh", "scale 0"])
def test_a_fresh_one_and_scale_0_change_nothing(kind):
    """Bit for bit, with the built-in model."""
    sd = StableDiffusion.load(BUILTIN, "cpu", torch.float32)
    control, scale = (ControlNet(sd.unet), 1.0) if kind == "fresh" else (randomise(ControlNet(sd.unet)), 0.0)
    asked = []
    control.register_forward_hook(lambda *_: asked.append(1))
    kw = dict(steps=4, seed=3, batch=2)
    plain = sd.generate("a red apple", **kw)
    with controlled(sd.unet, control, hint(drawing()), scale):
        images = sd.generate("a red apple", **kw)
    assert len(asked) == 4 and all(np.array_equal(a, b) for a, b in zip(images, plain))


def test_a_fresh_one_is_diffusers_fresh_one():
    """A copy of the UNet, but for the hint's first seven convolutions, which start at random in both."""
    sd, pipe = models("sd1")
    reference = diffusers.ControlNetModel.from_unet(pipe.unet).state_dict()
    for key, tensor in ControlNet(sd.unet).state_dict().items():
        if not key.startswith("input_hint_block") or key.startswith("input_hint_block.14"):
            assert torch.equal(tensor, reference[diffusers_control_name(key, sd.config)]), key


def test_whoever_leaves_by_an_error_leaves_no_hooks():
    sd, control, _ = controls("sd1")
    with pytest.raises(UserError), controlled(sd.unet, control, hint(drawing())):
        sd.generate("a cat", steps=0)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in sd.unet.modules())


# --- files ---

@pytest.mark.parametrize("name", PIPELINES)
@pytest.mark.parametrize("kind", ["prefixed", "bare", "whole", "pth", "folder", "folder's file"])
def test_every_layout_holds_the_same(kind, name, tmp_path):
    """`whole`: as the first control_sd15 files, the frozen model beside it."""
    sd, control, reference = controls(name)
    prefixed = {"control_model." + key: tensor.contiguous() for key, tensor in control.state_dict().items()}
    path = tmp_path / "c.safetensors"
    if kind == "prefixed":
        save_file(prefixed, path)
    elif kind == "bare":
        save_file({key.removeprefix("control_model."): tensor for key, tensor in prefixed.items()}, path)
    elif kind == "whole":
        save_file(prefixed | {key: tensor.contiguous() for key, tensor in sd.state_dict().items()} | {"betas": torch.zeros(1000)}, path)
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


# --- the command ---

def run(capsys, *args):
    return command(controlnet, capsys, "a red apple", *args)


def test_without_a_controlnet_the_command_draws_as_ever(tmp_path, capsys):
    drawing().save(tmp_path / "edges.png")
    code, err, out = run(capsys, "--control", tmp_path / "edges.png", "--seed", 4, "--steps", 3, "--out", tmp_path / "x.png")
    assert code == 0 and "no --controlnet" in out
    plain, = StableDiffusion.load(BUILTIN).generate("a red apple", seed=4, steps=3)
    assert np.array_equal(Image.open(tmp_path / "x.png"), plain)


def test_outlines_of_a_picture_are_taken_as_the_hint(tmp_path, capsys, monkeypatch):
    photo = Image.open(DOCS).convert("RGB").crop((0, 0, 64, 64))
    photo.save(tmp_path / "photo.png")
    seen = []
    monkeypatch.setattr(controlnet, "controlled", lambda unet, control, hint, scale: seen.append((hint, scale)) or nullcontext())
    assert run(capsys, "--control", tmp_path / "photo.png", "--outlines", "--steps", 1, "--out", tmp_path / "x.png")[0] == 0
    (found, scale), = seen
    assert scale == 1 and torch.equal(found, hint(controlnet.outlines(photo).convert("RGB"))) and 0.02 < found.mean() < 0.5


def test_with_one_it_draws_as_from_python(tmp_path, capsys):
    sd = StableDiffusion.load(BUILTIN)
    save_file({name: tensor.contiguous() for name, tensor in randomise(ControlNet(sd.unet)).state_dict().items()}, tmp_path / "c.safetensors")
    drawing().resize((128, 128), Image.Resampling.NEAREST).save(tmp_path / "edges.png")
    code, _, _ = run(capsys, "--control", tmp_path / "edges.png", "--controlnet", tmp_path / "c.safetensors", "--scale", 2, "--steps", 3, "--batch", 2,
                     "--out", tmp_path / "x.png")
    assert code == 0 and sorted(path.name for path in tmp_path.glob("x*")) == ["x-0.png", "x-1.png"]
    control = load(tmp_path / "c.safetensors", sd)
    with controlled(sd.unet, control, hint(Image.open(tmp_path / "edges.png").resize((64, 64), Image.Resampling.LANCZOS)), 2):
        images = sd.generate("a red apple", steps=3, batch=2)
    assert all(psnr(Image.open(tmp_path / f"x-{i}.png"), image) > 50 for i, image in enumerate(images))
    assert psnr(images[0], sd.generate("a red apple", steps=3)[0]) < 30


def test_wrong_use_ends_in_one_line(tmp_path, capsys):
    drawing().save(tmp_path / "edges.png")
    (tmp_path / "text.png").write_text("no picture")
    (tmp_path / "damaged.safetensors").write_bytes(b"0123456789")
    (tmp_path / "empty").mkdir()
    sd, control, reference = controls("sd1")
    save_file({key: tensor.contiguous() for key, tensor in control.state_dict().items()}, tmp_path / "narrow.safetensors")
    reference.save_pretrained(tmp_path / "narrow")
    builtin = {key: tensor.contiguous() for key, tensor in ControlNet(StableDiffusion.load(BUILTIN).unet).state_dict().items()}
    save_file({key: tensor for key, tensor in builtin.items() if key != "zero_convs.1.0.bias"}, tmp_path / "cut.safetensors")
    random_model(small("sd1-inpaint")).save(tmp_path / "inpaint.safetensors")
    edges, out = ("--control", tmp_path / "edges.png"), ("--out", tmp_path / "x.png")
    before = set(tmp_path.iterdir())
    for said, args in {
        "cannot read the picture": ("--control", tmp_path / "text.png", *out),
        "cannot read the picture ": ("--control", tmp_path / "none.png", *out),
        "must end in .png": (*edges, "--out", tmp_path / "x.jpg"),
        "the scale must be a number": (*edges, *out, "--scale", "nan"),
        "no such file": (*edges, *out, "--controlnet", tmp_path / "none.safetensors"),
        "no such file: .*diffusion_pytorch_model.safetensors": (*edges, *out, "--controlnet", tmp_path / "empty"),
        "not a checkpoint that can be read": (*edges, *out, "--controlnet", tmp_path / "damaged.safetensors"),
        "is no ControlNet": (*edges, *out, "--controlnet", BUILTIN),
        "goes with a UNet 128 channels wide in the middle and words of 32, not with this one of 192 and 128":
            (*edges, *out, "--controlnet", tmp_path / "narrow.safetensors"),
        "goes with a UNet 128 channels wide": (*edges, *out, "--controlnet", tmp_path / "narrow"),
        "1 missing: zero_convs.1.0.bias": (*edges, *out, "--controlnet", tmp_path / "cut.safetensors"),
        "multiples of 8": (*edges, *out, "--width", 63),
        "inpaint.safetensors changes pictures": (*edges, *out, "--ckpt", tmp_path / "inpaint.safetensors"),
        "no such file: .*none.ckpt": (*edges, *out, "--ckpt", tmp_path / "none.ckpt"),
    }.items():
        code, err, _ = run(capsys, *args)
        assert code == 2 and re.search(said, err) and len(err.strip().splitlines()) == 1, (said, err)
        assert set(tmp_path.iterdir()) == before
