"""What test_formats.py and test_hub.py share: diffusers folders of small random models."""
import functools
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sd as core
from sd import StableDiffusion, UserError
from tests.common import PROMPTS, make_scheduler, model_and_pipeline, photograph, small

SD, XL = diffusers.StableDiffusionPipeline, diffusers.StableDiffusionXLPipeline
PIPELINES = {
    "sd1": SD, "sd1-inpaint": diffusers.StableDiffusionInpaintPipeline,
    "instruct-pix2pix": diffusers.StableDiffusionInstructPix2PixPipeline,
    "sd2-base": SD, "sd2": SD, "sd-turbo": SD, "sdxl": XL, "sdxl-turbo": XL, "lcm": SD,
    "sd2-inpaint": diffusers.StableDiffusionInpaintPipeline,
    "sdxl-inpaint": diffusers.StableDiffusionXLInpaintPipeline,
    "sdxl-instruct-pix2pix": diffusers.StableDiffusionXLInstructPix2PixPipeline}
TURBO = {  # as their folders are published
    "sd-turbo": diffusers.EulerDiscreteScheduler,
    "sdxl-turbo": diffusers.EulerAncestralDiscreteScheduler}
SD2_ROWS, SDXL_ROWS = ("sd2-base", "sd2", "sd-turbo"), ("sdxl", "sdxl-turbo")
FAMILIES = {  # the rows of PRESETS with the same shapes
    "sd1": ("sd1",), "sd1-inpaint": ("sd1-inpaint",), "instruct-pix2pix": ("instruct-pix2pix",),
    "sd2-base": SD2_ROWS, "sd2": SD2_ROWS, "sd-turbo": SD2_ROWS,
    "sdxl": SDXL_ROWS, "sdxl-turbo": SDXL_ROWS, "lcm": ("lcm",),
    **{name: (name,) for name in ("sd2-inpaint", "sdxl-inpaint", "sdxl-instruct-pix2pix")}}
WHITE = Image.new("L", (64, 64), 255)  # a mask: all of the picture is drawn anew
SHARDED = dict(max_shard_size="400KB")


@pytest.fixture
def rows(monkeypatch):
    """PRESETS with the rows of one family alone, in small, and the built-in model's."""
    builtin = core.PRESETS["emoji"]

    def only(name: str) -> None:
        table = {row: small(row) for row in FAMILIES[name]} | {"emoji": builtin}
        monkeypatch.setattr(core, "PRESETS", table)
    return only


@functools.cache
def small_model_and_pipeline(name: str):
    """As `pair`, with what a published folder says beside the weights. Nobody else changes it."""
    sd, pipe = model_and_pipeline(small(name), PIPELINES[name])
    pipe.unet.register_to_config(sample_size=8)
    scheduler = make_scheduler("ddim", "leading", sd.preset.prediction_type)
    if name in TURBO:
        scheduler = TURBO[name](beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                timestep_spacing="trailing")
    # pipe.scheduler = scheduler would leave it out of model_index.json where it was None before
    pipe.register_modules(scheduler=scheduler)
    return sd, pipe


@functools.cache
def saved_by_diffusers(name: str, **settings) -> tempfile.TemporaryDirectory:
    """The folder that diffusers writes. The files of its fp16 variant are made fp16."""
    folder = tempfile.TemporaryDirectory()
    small_model_and_pipeline(name)[1].save_pretrained(folder.name, **settings)
    for file in Path(folder.name).glob("*/*fp16*.safetensors"):
        tensors = {name: tensor.half() for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    return folder


def their_folder(name: str, path: Path, **settings) -> Path:
    """A copy of what diffusers writes."""
    return shutil.copytree(saved_by_diffusers(name, **settings).name, path, dirs_exist_ok=True)


def load(path: str | Path, dtype: torch.dtype = torch.float32, **settings) -> StableDiffusion:
    return StableDiffusion.load(path, "cpu", dtype, **settings)


def assert_one_line(call: Callable, pattern: str) -> str:
    """The call must raise UserError, one line that matches the pattern. Returns the line."""
    with pytest.raises(UserError, match=pattern) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def picture_by_diffusers(pipe, name: str, **settings) -> Image.Image:
    """A picture from seed 5. Models that change pictures are given one."""
    size = dict(width=64, height=64)
    inputs = size
    if name.endswith("inpaint"):
        inputs = dict(image=photograph(), mask_image=WHITE, strength=1.0, **size)
    if name.endswith("instruct-pix2pix"):
        inputs = dict(image=photograph(), image_guidance_scale=1.5)
        if name.startswith("sdxl"):  # which does not take the picture's size
            inputs |= size
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(5)
    return pipe(PROMPTS["prompt"], generator=generator, **inputs, **settings).images[0]


def inputs_of(name: str) -> dict:
    """The same inputs for extras.edit.draw."""
    if name.endswith("inpaint"):
        return dict(image=photograph(), mask=WHITE)
    return dict(image=photograph()) if name.endswith("instruct-pix2pix") else {}
