"""The settings of a picture in its PNG: written, read, and drawn again."""
import json
import random
import re
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from extras import png_info, samplers
from extras.lora import LoRA
from extras.options import PNG_NAMES, params_text, read_params
from sampler import SAMPLERS, SPACINGS
from sd import StableDiffusion, UserError
from tests.command import params, run_cli
from tests.common import assert_linear
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
        steps=int(found["Steps"]), guidance=float(found["CFG scale"]),
        sampler=samplers.sampler_name(found["Sampler"]),
        timestep_spacing=samplers.spacing_name(found["Schedule type"]))[0]
    assert (found["Sampler"], found["Schedule type"]) == ("Euler a", "Karras")  # A1111's names
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
    again = ["--params-from", tmp_path / "1.png", "--trust"]
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
                   tmp_path / "p.txt", "--trust", "--out", tmp_path / "many")[0] == 0
    found = read_params(tmp_path / "many" / "0000-a-dog.png")
    assert (found["lora"], found["prompt"], found["steps"]) == ([f"{file}:0.3"], "a dog", 2)
    assert run_cli(capsys, "--params-from", tmp_path / "1.png", "--seed", 0, "--trust", "--out",
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
        "cfg_rescale": 0.7, "clip_skip": 2, "vae": "v.pt", "unet": "u/v",
        "init": "a \"b\".png", "strength": 0.5, "mask": "c:\\d, e.png", "image_guidance": 2.0,
        "ckpt": "x/y", "lora": ["a, b:0.5", "c"], "embedding": ["d"], "preset": "sd1",
        "prediction": "v", "deepcache": 3}
    assert {one.name for one in PNG_NAMES.values()} < set(given)
    assert read_params(save_png(tmp_path / "x.png", params_text(given))) == given


# --- as other programs write them, and this one before ---

@pytest.mark.parametrize("written, read", [
    ("Sampler: Euler a", {"sampler": "euler_a", "timestep_spacing": "linspace"}),
    ("Sampler: DPM++ 2M, Schedule type: Karras",
     {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),
    ("Sampler: DPM++ 2M Karras", {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),
    ("Sampler: Euler, Schedule type: Automatic",
     {"sampler": "euler", "timestep_spacing": "linspace"}),
    ("Sampler: DPM++ 2M, Schedule type: Automatic",
     {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),
    ("Sampler: DPM++ 2M", {"sampler": "dpmpp_2m", "timestep_spacing": "karras"}),   # v1.9.4
    ("Sampler: DPM++ 2M SDE, Schedule type: Automatic",
     {"sampler": "dpmpp_2m_sde", "timestep_spacing": "exponential"}),
    ("Sampler: DDIM, Clip skip: 2",
     {"sampler": "ddim", "timestep_spacing": "leading", "clip_skip_sd1": 2}),
    ("Sampler: LCM, Schedule type: Automatic", {"sampler": "lcm"}),
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


SETTINGS = "Steps: 2, Sampler: Euler, CFG scale: 7, Seed: 42, Size: 64x48"


def lines_of_reading(path: Path, **given) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        read_params(path, given)
    return [str(one.message) for one in caught]


def test_before_1_9_a_sampler_without_karras_is_evenly_spaced(tmp_path):
    for version, spacing in (("v1.8.0", "linspace"), ("v1.9.0", "karras"), ("v1.10.1", "karras")):
        text = f"a\nSteps: 2, Sampler: DPM++ 2M, Size: 8x8, Version: {version}"
        found = read_params(save_png(tmp_path / "x.png", text))
        assert found["timestep_spacing"] == spacing, version


def test_names_that_a1111_reads(tmp_path):
    """Each of our samplers and schedules goes into a picture and comes back."""
    for sampler in SAMPLERS:
        for spacing in SPACINGS:
            text = params_text(dict(prompt="a", negative="", width=8, height=8, steps=3,
                                    sampler=sampler, timestep_spacing=spacing))
            assert text.split("\n")[-1].startswith("Steps: 3, Sampler: ")
            found = read_params(save_png(tmp_path / "x.png", text))
            assert (found["sampler"], found["timestep_spacing"]) == (sampler, spacing)
    assert "Sampler: UniPC, Schedule type: SGM Uniform, " in params_text(dict(
        prompt="a", negative="", width=8, height=8, steps=3, sampler="unipc",
        timestep_spacing="sgm_uniform"))


@pytest.mark.parametrize("fields, said", [
    ("Variation seed: 7, Variation seed strength: 0.3", "variation of the seed"),
    ("Hires upscale: 2, Hires steps: 10", "second, larger pass"),
    ('ADetailer model: face.pt, ADetailer prompt: "a, b: c"', "ADetailer"),
    ('ControlNet 0: "Module: canny, Weight: 1"', "ControlNet"),
    ("Refiner: xl [1234], Refiner switch at: 0.8", "refiner"), ("ENSD: 31337", "ENSD"),
    ("Eta: 0.5", "eta"), ("Denoising strength: 0.6", "--init"), ("Mask blur: 4", "mask"),
    ("Inpaint area: Only masked", "mask"), ("Something new: 3", "not known.*: Something new"),
    ('TI hashes: "badhands: 0123"', "badhands: 0123.*--embedding"), ("Model: my", "'my'.*--ckpt"),
    ('Lora hashes: "pixel: 01"', "LoRAs.*--lora"), ("Seed: -1", "the seed is not stored"),
    ('Civitai resources: [{"type":"lora","modelName":"X, Y"}]', "LoRAs of Civitai"),
    ("RNG: NV", "noise on its GPU"), ("Tiling: True", "tiling"), ("FreeU Stages: x", "FreeU")])
def test_a_line_for_what_is_not_followed(fields, said, tmp_path):
    path = save_png(tmp_path / "x.png", f"a cat\nNegative prompt: ugly\n{SETTINGS}, {fields}")
    assert sum(bool(re.search(said, line)) for line in lines_of_reading(path)) == 1


def test_nothing_is_said_when_all_is_followed(tmp_path):
    path = save_png(tmp_path / "x.png", f"a cat\n{SETTINGS}, RNG: CPU, Version: v1.10.1, "
                    'Template: "a {{red|blue}} cat, b", Negative Template: ugly')
    assert lines_of_reading(path) == []
    path = save_png(tmp_path / "x.png", f"a (cat)\n{SETTINGS}, RNG: CPU")
    assert len(lines_of_reading(path)) == 1     # of the weight
    path = save_png(tmp_path / "x.png", f"a (cat)\n{SETTINGS}, RNG: CPU, Emphasis: No norm")
    assert lines_of_reading(path) == []


@pytest.mark.parametrize("text, prompt, negative", [
    (f"a cat,\n\nred hat\nNegative prompt: ugly,\nblurry\n{SETTINGS}", "a cat,\n\nred hat",
     "ugly,\nblurry"),
    (f"a cat\r\nNegative prompt: ugly\r\n{SETTINGS}", "a cat", "ugly"),
    (f"a cat\n{SETTINGS}", "a cat", ""),
    (f"a cat\nNegative prompt: ugly\n{SETTINGS}\nTemplate: a {{red|blue}}\nNegative Template: b",
     "a cat", "ugly"),
    (f'a cat\nNegative prompt: ugly\n{SETTINGS}, Wildcard prompt: "a\nb", Version: v1.5', "a cat",
     "ugly")])
def test_forms_of_the_text(text, prompt, negative, tmp_path):
    found = read_params(save_png(tmp_path / "x.png", text))
    assert (found["prompt"], found["negative"], found["seed"], found["height"]) \
        == (prompt, negative, 42, 48)


@pytest.mark.parametrize("fields, given, said", [
    ("Sampler: Undefined", {}, "its sampler 'Undefined' is not known here: give one with --samp"),
    ("Sampler: Euler, Schedule type: Polyexponential", {}, "its schedule 'Polyexponential'"),
    ("Sampler: Undefined", {"sampler": "euler"}, None)])
def test_what_is_not_known_stops_unless_it_is_given(fields, given, said, tmp_path):
    path = save_png(tmp_path / "x.png", f"a cat\nSteps: 2, {fields}, Size: 8x8")
    if said is None:
        assert "sampler" not in read_params(path, given)
        return
    with pytest.raises(UserError, match=said):
        read_params(path, given)


@pytest.mark.parametrize("encoding, mark", [
    ("utf-16-be", b"UNICODE\0"), ("utf-16-le", b"UNICODE\0"), ("utf-8", b"ASCII\0\0\0")])
@pytest.mark.parametrize("ending", ["jpg", "webp", "png"])
def test_exif_of_jpeg_and_webp(encoding, mark, ending, tmp_path):
    exif = Image.Exif()
    exif[0x0131] = "some program"   # else Pillow writes none into a PNG
    text = f"a 猫\nNegative prompt: ugly\n{SETTINGS}"
    exif.get_ifd(0x8769)[0x9286] = mark + text.encode(encoding)
    Image.new("RGB", (8, 8)).save(tmp_path / f"x.{ending}", exif=exif)
    found = read_params(tmp_path / f"x.{ending}")
    assert (found["prompt"], found["steps"]) == ("a 猫", 2)


def comfyui_png(path: Path, **changes) -> Path:
    """A graph as ComfyUI's own example has it. `changes` replace inputs of the sampler."""
    sampler = {"seed": 42, "steps": 2, "cfg": 7.5, "sampler_name": "euler", "scheduler": "normal",
               "denoise": 1.0, "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0],
               "latent_image": ["5", 0]}
    nodes = {"3": ("KSampler", sampler | changes),
             "4": ("CheckpointLoaderSimple", {"ckpt_name": "v1-5.safetensors"}),
             "5": ("EmptyLatentImage", {"width": 64, "height": 48, "batch_size": 1}),
             "6": ("CLIPTextEncode", {"text": ["9", 0], "clip": ["4", 1]}),
             "7": ("CLIPTextEncode", {"text": "ugly", "clip": ["4", 1]}),
             "9": ("PrimitiveStringMultiline", {"value": "a cat"}),
             "10": ("LoraLoader", {"lora_name": "p.safetensors", "strength_model": 0.5,
                                   "strength_clip": 1, "model": ["4", 0], "clip": ["4", 1]})}
    info = PngImagePlugin.PngInfo()
    info.add_text("prompt", json.dumps({number: {"class_type": kind, "inputs": inputs}
                                        for number, (kind, inputs) in nodes.items()}))
    Image.new("RGB", (8, 8)).save(path, pnginfo=info)
    return path


def test_comfyui(tmp_path):
    found = read_params(comfyui_png(tmp_path / "x.png"))
    assert found == {
        "prompt": "a cat", "negative": "ugly", "width": 64, "height": 48, "steps": 2,
        "guidance": 7.5, "seed": 42, "sampler": "euler", "timestep_spacing": "linspace",
        "lora": ["p.safetensors:0.5"]}
    found = read_params(comfyui_png(tmp_path / "x.png", sampler_name="dpmpp_2m_sde_gpu",
                                    scheduler="karras"))
    assert (found["sampler"], found["timestep_spacing"]) == ("dpmpp_2m_sde", "karras")


def test_comfyui_beside_the_path_of_the_sampler(tmp_path):
    """Its names are ours, and all that changes the picture is told."""
    def notes(nodes: dict, **changes) -> str:
        path = comfyui_png(tmp_path / "x.png", **{"scheduler": "karras"} | changes)
        graph = json.loads(Image.open(path).text["prompt"]) | {
            number: {"class_type": kind, "inputs": inputs}
            for number, (kind, inputs) in nodes.items()}
        info = PngImagePlugin.PngInfo()
        info.add_text("prompt", json.dumps(graph))
        Image.new("RGB", (8, 8)).save(path, pnginfo=info)
        with pytest.warns(UserWarning) as said:
            read_params(path)
        return "\n".join(str(one.message) for one in said)

    end = {"8": ("VAEDecode", {"samples": ["3", 0], "vae": ["4", 2]}),
           "99": ("SaveImage", {"images": ["8", 0]})}
    assert "the model 'v1-5.safetensors' is not taken" in notes(end)
    assert "nodes that are not" not in notes(end) and "UNet and text" in notes(end)
    assert "nodes that are not followed: ImageUpscaleWithModel" in notes(
        end | {"20": ("ImageUpscaleWithModel", {"image": ["8", 0]})})
    assert "only the last 0.5 of the noise" in notes(end, denoise=0.5)
    assert "ended at an earlier step" in notes(end, end_at_step=1)
    assert "added no noise" in notes(end, add_noise="disable")
    assert "UniPC has another order" in notes(end, sampler_name="uni_pc")
    texts = {"6": ("CLIPTextEncode", {"text": "a", "clip": ["20", 0]}),
             "20": ("CLIPLoader", {"clip_name": "c.safetensors"})}
    assert "CLIPLoader changes the text encoder" in notes(end | texts)
    assert "read by different text encoders" in notes(end | texts)
    vae = {"8": ("VAEDecode", {"samples": ["3", 0], "vae": ["21", 0]}),
           "21": ("VAELoader", {"vae_name": "v.pt"})}
    notes(end | vae)
    assert read_params(tmp_path / "x.png")["vae"] == "v.pt"


@pytest.mark.parametrize("changes, said", [
    ({"positive": ["4", 1]}, "node CheckpointLoaderSimple between prompt and sampler"),
    ({"positive": ["99", 0]}, "not whole"), ({"positive": None}, "not whole"),
    ({"sampler_name": "res_multistep"}, "its sampler 'res_multistep' is not known here"),
    ({"scheduler": "kl_optimal"}, "its schedule 'kl_optimal' is not known here")])
def test_graphs_that_are_not_understood_are_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        read_params(comfyui_png(tmp_path / "x.png", **changes))


@pytest.mark.parametrize("entries, said", [
    ({"prompt": '{"3": {"inputs": {}, "class_type": "SaveImage"}}'}, "no KSampler"),
    ({"prompt": '{"3": {"class_type": '}, "cannot be read"),
    ({"invokeai_metadata": '{"seed": 42}'}, "those of InvokeAI"),
    ({"parameters": '{"prompt": "a"}', "fooocus_scheme": "fooocus"}, "those of Fooocus"),
    ({"parameters": '{"sui_image_params": {"prompt": "a"}}'}, "those of SwarmUI"),
    ({"Description": "a", "Comment": "{}"}, "those of NovelAI"),
    ({"Software": "x"}, "no settings")])
def test_other_programs_are_named(entries, said, tmp_path):
    info = PngImagePlugin.PngInfo()
    for name, text in entries.items():
        info.add_text(name, text)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    with pytest.raises(UserError, match=said) as error:
        read_params(tmp_path / "x.png")
    assert "\n" not in str(error.value)


# --- files named in a picture ---

def test_files_in_a_picture_are_left_out_without_trust(tmp_path, capsys):
    """Nothing of what it names is opened: none of it is there."""
    text = params_text(dict(
        prompt="a cat", negative="", width=64, height=64, steps=1, sampler="euler", seed=1,
        init="/no/i.png", mask="/no/m.png", strength=0.5, ckpt="someone/model", preset="sd1",
        prediction="v", lora=["/no/l.safetensors"], embedding=["/no/e.pt"]))
    path = save_png(tmp_path / "x.png", text)
    code, err, _ = run_cli(capsys, "--from", path, "--device", "cpu", "--out", tmp_path / "o.png")
    assert code == 0
    line, = [line for line in err.split("\n") if "--trust" in line]
    for name in ("--init", "--mask", "--ckpt", "--lora", "--embedding"):
        assert name in line
    code, err, _ = run_cli(capsys, "--from", path, "--trust", "--out", tmp_path / "p.png")
    assert code == 2 and "/no/i.png" in err
    code, err, _ = run_cli(capsys, "a cat", "--trust", "--out", tmp_path / "p.png")
    assert code == 2 and "--trust means nothing" in err


# --- time ---

@pytest.mark.parametrize("unit", [
    "a", "a:", "a: ", ":", ",", ", ", '"', ': "', 'a: "\\', "a: [", "a: {", "a: [1,", "[", "\n",
    'a: [",', "a:\n", "\nSteps: ", "\nNegative prompt: ", "\\", "a, ", "a: 1, ", " "])
@pytest.mark.parametrize("start", ["", "x\nSteps: 1, ", "Steps: 1, a: ", 'Steps: 1, a: "'])
def test_awkward_texts_take_no_time(unit, start):
    assert_linear(png_info.from_text, lambda length: start + unit * (length // len(unit)))


def test_thirty_damaged_and_odd_texts_end_in_a_line(tmp_path):
    """Random changes of good texts: read, or one line."""
    rng = random.Random(0)
    good = f'a (cat:1.2)\nNegative prompt: ugly\n{SETTINGS}, Lora: "[\\"a\\"]", Clip skip: 2'
    for _ in range(60):
        text = list(good)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(len(text))
            text[at:at + rng.randint(0, 4)] = rng.choice(
                [":", ",", '"', "\n", "x", "[", "{", "9" * 30, "", "nan", "-", "é"])
        try:
            found = read_params(save_png(tmp_path / "x.png", "".join(text)))
        except UserError as error:
            assert "\n" not in str(error)
        else:
            assert {"prompt", "negative"} <= found.keys()


@pytest.mark.parametrize("name, ours", [
    ("Euler a", "euler_a"), ("Euler", "euler"), ("DPM++ 2M", "dpmpp_2m"), ("DDIM", "ddim"),
    ("LCM", "lcm"),                                                                     # A1111
    ("euler_ancestral", "euler_a"), ("euler", "euler"), ("dpmpp_2m", "dpmpp_2m"),       # ComfyUI
    ("ddpm", "ddpm"), ("k_euler_a", "euler_a"), ("k_dpmpp_2m", "dpmpp_2m"), ("k_euler", "euler"),
    ("EulerDiscreteScheduler", "euler"), ("EulerAncestralDiscreteScheduler", "euler_a"),
    ("DPMSolverMultistepScheduler", "dpmpp_2m"), ("DDIMScheduler", "ddim"),
    ("DDPMScheduler", "ddpm"), ("LCMScheduler", "lcm")])                                # diffusers
def test_names_of_samplers(name, ours):
    assert samplers.sampler_name(name) == ours
    assert samplers.sampler_and_spacing(name) == (ours, None)
    for theirs, spacing in (("Karras", "karras"), ("SGM Uniform", "sgm_uniform"),
                            ("exponential", "exponential"), ("Beta", "beta")):
        assert samplers.sampler_and_spacing(f"{name} {theirs}") == (ours, spacing)


def test_our_names_of_samplers_are_kept():
    for name in SAMPLERS:
        assert samplers.sampler_name(name) == name
    assert samplers.sampler_name("heun_2") == "heun_2"        # of a fork
