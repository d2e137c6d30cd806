"""The settings of a picture in its PNG: written, read, and drawn again."""
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from extras import png_info
from extras.lora import LoRA
from extras.options import PNG_NAMES, params_text, read_params
from sd import SAMPLERS, StableDiffusion, UserError
from tests.command import params, run_cli
from tests.training import tiny  # noqa: F401


def save_png(path: Path, text: str) -> Path:
    Image.new("RGB", (8, 8)).save(path, pnginfo=png_info.png_chunk(text))
    return path


# --- written and read again ---

def test_png_holds_what_is_needed_to_make_it_again(tiny, tmp_path, capsys):  # noqa: F811
    code, _, _ = run_cli(
        capsys, "naïve 猫\nsecond line", "--negative", "grey", "--steps", 4, "--guidance", 0,
        "--seed", 7, "--width", 40, "--sampler", "euler_a", "--timestep-spacing", "karras", "--n",
        2, "--ckpt", tiny, "--device", "cpu", "--out", tmp_path / "p.png")
    assert code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["p-7.png", "p-8.png"]
    pattern = r"(?s)(.*)\nNegative prompt: (.*)\n(Steps: .*)"
    prompt, negative, rest = re.fullmatch(pattern, params(tmp_path / "p-8.png")).groups()
    found = dict(pair.split(": ") for pair in rest.split(", "))
    width, height = map(int, found["Size"].split("x"))
    again = StableDiffusion.load(tiny, "cpu").generate(
        prompt, negative, seed=int(found["Seed"]), width=width, height=height,
        steps=int(found["Steps"]), guidance=float(found["CFG scale"]), sampler=found["Sampler"],
        timestep_spacing=found["Schedule type"])[0]
    assert (width, height) == (40, 32)
    assert np.array_equal(np.asarray(again), np.asarray(Image.open(tmp_path / "p-8.png")))


def test_picture_is_drawn_again_from_itself(tiny, tmp_path, capsys):  # noqa: F811
    """All that is stored comes back, commas, quotes and newlines too; other options replace it."""
    lora = LoRA(StableDiffusion.load(tiny), 2, text=True)
    for pair in lora.layers.values():
        torch.nn.init.normal_(pair["lora_up"].weight)
    file = tmp_path / "a, b: c.safetensors"
    lora.save(file)
    save_file({"<zz>": torch.randn(2, 32)}, tmp_path / "w.safetensors")
    Image.new("RGB", (40, 32), "red").save(tmp_path / "i, 1.png")
    Image.new("L", (40, 32), 255).save(tmp_path / "m.png")
    first = [
        "naïve <zz>, a \"(cat:1.2)\"\nNegative prompts: none", "--negative", "grey, \nblue: 1",
        "--steps", 3, "--guidance", 2.5, "--seed", 7, "--width", 40, "--sampler", "euler_a",
        "--spacing", "karras", "--ckpt", tiny, "--lora", f"{file}:0.5", "--lora", f"{file}:-0.2",
        "--embedding", tmp_path / "w.safetensors", "--init", tmp_path / "i, 1.png", "--strength",
        0.9, "--mask", tmp_path / "m.png", "--guided-share", 0.5, "--deep-every", 2]
    again = ["--params-from", tmp_path / "1.png"]
    assert run_cli(capsys, *first, "--out", tmp_path / "1.png")[0] == 0
    assert run_cli(capsys, *again, "--out", tmp_path / "2.png")[0] == 0
    assert run_cli(capsys, *again, "--seed", 8, "--out", tmp_path / "3.png")[0] == 0
    one, two, three = (Image.open(tmp_path / f"{i}.png") for i in (1, 2, 3))
    assert one.text == two.text and np.array_equal(np.asarray(one), np.asarray(two))
    expected = one.text["parameters"].replace("Seed: 7", "Seed: 8")
    assert three.text["parameters"] == expected
    assert not np.array_equal(np.asarray(one), np.asarray(three))


def test_options_beside_params_from_replace_lists_and_the_prompt(
    tiny, tmp_path, capsys  # noqa: F811
):
    """Else a new LoRA would be added to the stored one, and --prompts collide with the prompt."""
    file = tmp_path / "a.safetensors"
    LoRA(StableDiffusion.load(tiny), 2).save(file)
    assert run_cli(capsys, "a cat", "--steps", 2, "--ckpt", tiny, "--lora", file, "--seed", 3,
                   "--out", tmp_path / "1.png")[0] == 0
    (tmp_path / "p.txt").write_text("a dog")
    assert run_cli(capsys, "--from", tmp_path / "1.png", "--lora", f"{file}:0.3", "--prompts",
                   tmp_path / "p.txt", "--out", tmp_path / "many")[0] == 0
    found = read_params(tmp_path / "many" / "0000-a-dog.png")
    assert (found["lora"], found["prompt"], found["steps"]) == ([f"{file}:0.3"], "a dog", 2)
    assert run_cli(capsys, "--params-from", tmp_path / "1.png", "--seed", 0, "--out",
                   tmp_path / "2.png")[0] == 0
    assert read_params(tmp_path / "2.png")["seed"] == 0         # a default that was asked for


@pytest.mark.parametrize("prompt, negative", [
    ("", ""), ("", "blue"), ("  a cat", ""), ("Negative prompt: none", ""), ("a\n\n", "\n")])
def test_odd_prompts_come_back(prompt, negative, tmp_path):
    options = {one.name: None for one in PNG_NAMES.values()}
    given = dict(prompt=prompt, negative=negative, width=8, height=16, steps=3, seed=2)
    path = save_png(tmp_path / "x.png", params_text(options | given))
    assert read_params(path) == given


def test_every_option_in_the_png_comes_back(tmp_path):
    given = {
        "prompt": "a", "negative": "b", "width": 8, "height": 16, "steps": 3, "sampler": "ddim",
        "timestep_spacing": "leading", "guidance": 1.5, "cfg_end": 0.25, "seed": 2**40,
        "init": "a \"b\".png", "strength": 0.5, "mask": "c:\\d, e.png", "image_guidance": 2.0,
        "ckpt": "x/y", "lora": ["a, b:0.5", "c"], "embedding": ["d"], "preset": "sd1",
        "prediction": "v", "deepcache": 3}
    assert {one.name for one in PNG_NAMES.values()} < set(given)
    assert read_params(save_png(tmp_path / "x.png", params_text(given))) == given


# --- as other programs write them, and this one before ---

@pytest.mark.parametrize("written, read", [
    ("Sampler: Euler a", {"sampler": "euler_a"}),
    ("Sampler: DPM++ 2M, Schedule type: Karras",
     {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),
    ("Sampler: DPM++ 2M Karras", {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),
    ("Sampler: Euler, Schedule type: Automatic", {"sampler": "euler"}),
    ("Sampler: ddim, Guided share: 0.5, Deep every: 3",
     {"sampler": "ddim", "cfg_end": 0.5, "deepcache": 3})])
def test_settings_as_other_tools_write_them_are_read(written, read, tmp_path):
    """The strength is that of a second pass, there being no --init."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", (
        f"a cat, (red:1.2)\nNegative prompt: ugly\nSteps: 20, {written}, CFG scale: 7, Seed: 42, "
        "Size: 512x768, Denoising strength: 0.5, Hires upscale: 2, Model hash: 6ce, "
        "Model: v1-5-pruned, Hashes: {\"model\": \"6ce0\"}, Version: v1.9.4"))
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert read_params(tmp_path / "x.png") == {
        "prompt": "a cat, (red:1.2)", "negative": "ugly", "width": 512, "height": 768, "steps": 20,
        "guidance": 7.0, "seed": 42} | read


def test_a_picture_without_prompt_as_a1111_writes_it(tmp_path):
    path = save_png(tmp_path / "x.png", "Negative prompt: ugly\nSteps: 20, Size: 8x8")
    assert read_params(path) == dict(prompt="", negative="ugly", width=8, height=8, steps=20)


@pytest.mark.parametrize("text, said", [
    ("a cat", "holds no settings of a picture, as sd.py"),
    ("a cat\nSteps: 2, Size: large", "holds no settings of a picture: "),
    ("a cat\nSteps: two, Size: 8x8", "holds no settings of a picture: "),
    ('a cat\nSteps: 2, Size: 8x8, Lora: "[1"', "holds no settings of a picture: ")])
def test_damaged_settings_are_refused(text, said, tmp_path):
    with pytest.raises(UserError, match=said) as error:
        read_params(save_png(tmp_path / "x.png", text))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name, ours", [
    ("Euler a", "euler_a"), ("Euler", "euler"), ("DPM++ 2M", "dpmpp_2m"), ("DDIM", "ddim"),
    ("LCM", "lcm"),                                                                     # A1111
    ("euler_ancestral", "euler_a"), ("euler", "euler"), ("dpmpp_2m", "dpmpp_2m"),       # ComfyUI
    ("ddpm", "ddpm"), ("k_euler_a", "euler_a"), ("k_dpmpp_2m", "dpmpp_2m"), ("k_euler", "euler"),
    ("EulerDiscreteScheduler", "euler"), ("EulerAncestralDiscreteScheduler", "euler_a"),
    ("DPMSolverMultistepScheduler", "dpmpp_2m"), ("DDIMScheduler", "ddim"),
    ("DDPMScheduler", "ddpm"), ("LCMScheduler", "lcm")])                                # diffusers
def test_names_of_samplers(name, ours):
    assert png_info.normalize_name(name) == ours
    assert png_info.sampler_and_spacing(name) == (ours, None)
    assert png_info.sampler_and_spacing(f"{name} Karras") == (ours, "karras")


def test_our_names_of_samplers_are_kept():
    for name in SAMPLERS:
        assert png_info.normalize_name(name) == name
    assert png_info.normalize_name("heun_2") == "heun_2"        # of a fork
