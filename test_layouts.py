"""What is on disk: single files, diffusers folders, models on the hub; what is read of them and written. No downloads.

    pip install -r requirements-test.txt
    pytest test_layouts.py

The references are manifests of published folders, and what diffusers and transformers themselves write, open and draw. The hub is a server
on this machine that answers as huggingface.co does. Models are those of test_family.py: the rows of PRESETS with their widths cut.
"""
import functools
import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import diffusers
import huggingface_hub
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sd as sd_module
import train
from checkpoint import diffusers_name, find, in_folder, needed
from clip import MERGES
from sampler import ALPHAS_CUMPROD
from sd import PRESETS, StableDiffusion, UserError, cut
from test_cli import command, refused, signals_as_they_were  # noqa: F401
from test_family import pair, photograph, small
from test_sd import PROMPTS, awkward_prompts, on_meta, psnr, random_model, reference_unet, same_numbers_every_time, scheduler  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # diffusers with numpy 2
HERE = Path(__file__).parent
XL, INPAINT, PIX2PIX = diffusers.StableDiffusionXLPipeline, diffusers.StableDiffusionInpaintPipeline, diffusers.StableDiffusionInstructPix2PixPipeline
PIPELINES = {"sd1": diffusers.StableDiffusionPipeline, "sd1-inpaint": INPAINT, "instruct-pix2pix": PIX2PIX, "sd2-base": diffusers.StableDiffusionPipeline,
             "sd2": diffusers.StableDiffusionPipeline, "sd-turbo": diffusers.StableDiffusionPipeline, "sdxl": XL, "sdxl-turbo": XL,
             "lcm": diffusers.StableDiffusionPipeline}
TURBO = {"sd-turbo": "EulerDiscreteScheduler", "sdxl-turbo": "EulerAncestralDiscreteScheduler"}  # as their folders are published
FAMILIES = {"sd1": ("sd1",), "sd1-inpaint": ("sd1-inpaint",), "instruct-pix2pix": ("instruct-pix2pix",), "sd2-base": ("sd2-base", "sd2", "sd-turbo"),
            "sd2": ("sd2-base", "sd2", "sd-turbo"), "sd-turbo": ("sd2-base", "sd2", "sd-turbo"), "sdxl": ("sdxl", "sdxl-turbo"), "sdxl-turbo": ("sdxl", "sdxl-turbo"),
            "lcm": ("lcm",)}
WHITE = Image.new("L", (64, 64), 255)  # a mask: all of the picture is drawn anew


# --- helpers ---

@pytest.fixture
def rows(monkeypatch):
    """PRESETS with the rows of one family alone, their widths cut."""
    def only(name):
        monkeypatch.setattr(sd_module, "PRESETS", {row: small(row) for row in FAMILIES[name]})
    return only


@functools.cache
def model_and_pipeline(name: str):
    """As test_family.pair, with what its folder says beside the weights."""
    sd, pipe = pair(name, PIPELINES[name])
    pipe.unet.register_to_config(sample_size=8)
    steps = scheduler("ddim", "leading", sd.config.prediction)
    if name in TURBO:
        steps = getattr(diffusers, TURBO[name])(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing")
    pipe.register_modules(scheduler=steps)  # and not pipe.scheduler = steps, which leaves it out of model_index.json where it was None before
    return sd, pipe


@functools.cache
def written(name: str, **how) -> tempfile.TemporaryDirectory:
    """The folder that diffusers writes; the files of its fp16 variant are fp16 indeed."""
    folder = tempfile.TemporaryDirectory()
    model_and_pipeline(name)[1].save_pretrained(folder.name, **how)
    for file in Path(folder.name).glob("*/*fp16*.safetensors"):
        save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    return folder


def their_folder(name: str, path: Path, **how) -> Path:
    return shutil.copytree(written(name, **how).name, path, dirs_exist_ok=True)


def same_tensors(found: StableDiffusion, wanted: StableDiffusion, dtype: torch.dtype = torch.float32) -> bool:
    """All that is found is wanted and equal, and what is not found is what no folder holds: SD 2.x's last layer, the projection."""
    found, wanted = found.state_dict(), wanted.state_dict()
    rest = [name for name in wanted if name not in found]
    return (all(torch.equal(tensor.float(), wanted[name].to(dtype).float()) for name, tensor in found.items())
            and all(re.search(r"resblocks\.2\.|text_projection$", name) for name in rest) and len(found) > 100)


def asked(name: str) -> dict:
    """What a picture is drawn from, beside the prompt, for both."""
    return {"sd1-inpaint": dict(init=photograph(), mask=WHITE), "instruct-pix2pix": dict(init=photograph())}.get(name, {})


def their_picture(pipe, name: str, **kw):
    more = {"sd1-inpaint": dict(image=photograph(), mask_image=WHITE, strength=1.0, width=64, height=64),
            "instruct-pix2pix": dict(image=photograph(), image_guidance_scale=1.5)}.get(name, dict(width=64, height=64))
    pipe.set_progress_bar_config(disable=True)
    return pipe(PROMPTS["prompt"], generator=torch.Generator().manual_seed(5), **more, **kw).images[0]


def one_line(load, words: str) -> str:
    with pytest.raises(UserError, match=words) as caught:
        load()
    assert "\n" not in str(caught.value)
    return str(caught.value)


# --- names ---

def manifest(name: str) -> dict[str, str]:
    """The published folder: component/name -> shape."""
    rows = [line.strip().split("\t") for line in gzip.open(Path(MERGES).with_name(f"{name}-diffusers.tsv.gz"), "rt")]
    return {f"{component}/{name}": shape for component, name, shape, *_ in rows}


@pytest.mark.parametrize("name, tensors", [("sd1", 1130), ("sd2", 1306), ("sdxl", 2641)])
def test_names_and_shapes_are_those_of_published_folders(name, tensors):
    """One to one: as many of ours as of theirs, all found. SD 2.x's folder has 23 of the 24 layers."""
    folder = on_meta(StableDiffusion, cut(PRESETS[name]))
    ours = [(prefix, own, where) for prefix in folder.parts for where, own, _ in folder.weights(prefix, folder=True)]
    assert {where: "x".join(map(str, in_folder(where, t).shape)) for where, t in folder.state_dict(folder=True).items()} == manifest(name)
    assert len(ours) == len({where for _, _, where in ours}) == tensors
    whole = on_meta(StableDiffusion, PRESETS[name])
    cut_away = [where for prefix in whole.parts for where, *_ in whole.weights(prefix, folder=True) if where not in manifest(name)]
    assert all(re.search(r"layers\.23\.|text_projection", where) for where in cut_away) and len(cut_away) == (17 if name == "sd2" else 0)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_modules_are_named_too(name):
    """Not only tensors: LoRAs name layers. diffusers' own UNet is the reference."""
    sd, pipe = model_and_pipeline(name)
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)
    ours = {diffusers_name("model.diffusion_model." + module, sd.config) for module, layer in sd.unet.named_modules() if isinstance(layer, kinds)}
    assert ours == {"unet/" + module for module, layer in pipe.unet.named_modules() if isinstance(layer, kinds)} and len(ours) > 100
    ours = {diffusers_name("first_stage_model." + module, sd.config) for module, layer in sd.vae.named_modules() if isinstance(layer, kinds)}
    assert ours == {"vae/" + module for module, layer in pipe.vae.named_modules() if isinstance(layer, kinds)}


# --- folders that diffusers wrote ---

LAYOUTS = {"plain": {}, "fp16": dict(variant="fp16"), "sharded": dict(max_shard_size="400KB"), "sharded-fp16": dict(variant="fp16", max_shard_size="400KB")}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_folders_of_diffusers_are_read(rows, tmp_path, name, layout):
    """Tensor by tensor. The sharded ones are sharded in every network."""
    rows(name)
    folder = their_folder(name, tmp_path / "f", **LAYOUTS[layout])
    parts = ["unet", "vae", "text_encoder"] + ["text_encoder_2"] * (name == "sdxl")
    assert all(len(list((folder / part).glob("*.safetensors"))) > 1 for part in parts) == ("sharded" in layout)
    assert ("fp16" in layout) == any("fp16" in file.name for file in (folder / "unet").iterdir())
    assert same_tensors(StableDiffusion.load(folder, "cpu", torch.float32), model_and_pipeline(name)[0], torch.float16 if "fp16" in layout else torch.float32)


def test_of_both_precisions_the_one_asked_for_is_read(rows, tmp_path):
    """Files of both lie in a folder; the fp16 one is marked by a bias of 1."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    their_folder("sd1", folder, variant="fp16")
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file(load_file(file) | {"conv_out.bias": torch.ones(4)}, file)
    for dtype, marked in (torch.float16, True), (torch.float32, False), (torch.bfloat16, False):
        assert bool((StableDiffusion.load(folder, "cpu", dtype).unet.out[2].bias == 1).all()) == marked
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert (StableDiffusion.load(folder, "cpu", torch.float32).unet.out[2].bias == 1).all()


@pytest.mark.parametrize("age", ["2022", "transformers 5"])
def test_older_and_newer_folders_are_read(rows, tmp_path, age):
    """2022: .bin weights, position_ids, query, key, value and proj_attn in the VAE, as linear layers. transformers 5: no "text_model."."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    for file in folder.glob("*/*.safetensors"):
        tensors = load_file(file)
        file.unlink()
        for new, old in {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}.items() if file.parent.name == "vae" else ():
            tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor for name, tensor in tensors.items()}
        if file.parent.name == "text_encoder":
            tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
            if age == "2022":
                tensors = {"text_model." + name: tensor for name, tensor in tensors.items()} | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        if age == "2022":
            stem = "pytorch_model" if file.parent.name == "text_encoder" else "diffusion_pytorch_model"
            torch.save(tensors, file.with_name(stem + ".bin"))
        else:
            save_file(tensors, file)
    if age == "2022":
        assert "mid_block.attentions.0.proj_attn.weight" in " ".join(f"encoder.{n}" for n in torch.load(folder / "vae/diffusion_pytorch_model.bin"))
    assert same_tensors(StableDiffusion.load(folder, "cpu", torch.float32), model_and_pipeline("sd1")[0])


@pytest.mark.parametrize("name", PIPELINES)
def test_folders_of_diffusers_are_known_for_what_they_are(rows, tmp_path, name):
    """Among rows alike in shape: by the scheduler's file. The picture's size is the folder's. And it draws what diffusers draws."""
    rows(name)
    sd, pipe = model_and_pipeline(name)
    found = StableDiffusion.load(their_folder(name, tmp_path / "f"), "cpu", torch.float32)
    assert found.config == cut(sd.config)
    if name in TURBO:
        ours, = found.generate(PROMPTS["prompt"], seed=5)
        theirs = their_picture(pipe, name, num_inference_steps=1, guidance_scale=0.0)
    else:
        ours, = found.generate(PROMPTS["prompt"], seed=5, steps=8, sampler="ddim", **asked(name))
        theirs = their_picture(pipe, name, num_inference_steps=8, guidance_scale=sd.config.guidance)
    print(f"{psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


def test_what_a_folder_says_is_taken(rows, tmp_path):
    """Its latents' size and scale, a prediction no row has; what it does not know of, it names."""
    rows("sdxl")
    folder = their_folder("sdxl", tmp_path / "f")

    def change(file, **fields):
        (folder / file).write_text(json.dumps(json.loads((folder / file).read_text()) | fields))
    change("scheduler/scheduler_config.json", prediction_type="v_prediction")
    change("unet/config.json", sample_size=12)
    change("vae/config.json", scaling_factor=0.5)
    config = StableDiffusion.load(folder, "cpu", torch.float32).config
    assert (config.prediction, config.size, config.vae.scale_factor, config.steps) == ("v", 96, 0.5, 20)
    assert (sd_module.PRESETS["sdxl"].size, sd_module.PRESETS["sdxl"].vae.scale_factor) == (64, 0.13025)  # the table is not touched
    change("scheduler/scheduler_config.json", rescale_betas_zero_snr=True)
    sd = StableDiffusion.load(folder, "cpu", torch.float32)
    assert sd.config.prediction == "v-zero-snr"
    change("scheduler/scheduler_config.json", prediction_type="epsilon")
    one_line(lambda: StableDiffusion.load(folder), "predicts 'epsilon-zero-snr'")
    change("scheduler/scheduler_config.json", prediction_type="v_prediction")
    sd.save(tmp_path / "saved", torch.float32)
    assert json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())["rescale_betas_zero_snr"]
    assert diffusers.DPMSolverMultistepScheduler.from_pretrained(tmp_path / "saved/scheduler").alphas_cumprod[-1] < 1e-7
    config = StableDiffusion.load(folder, "cpu", torch.float32, preset="sdxl-turbo").config
    assert (config.prediction, config.size, config.steps) == ("eps", 64, 1)
    change("scheduler/scheduler_config.json", prediction_type="sample", rescale_betas_zero_snr=False)
    one_line(lambda: StableDiffusion.load(folder), "predicts 'sample'")


def damaged_folders(folder: Path):
    """(what is done to a good folder, words the answer must hold)"""
    index = "diffusion_pytorch_model.safetensors.index.json"

    def edit(file, change):
        tensors = load_file(folder / file)
        change(tensors)
        save_file(tensors, folder / file)
    yield lambda: (folder / "model_index.json").unlink(), "without model_index.json"
    yield lambda: (folder / "model_index.json").write_text('{"unet": '), "model_index.json is damaged"
    yield lambda: (folder / "model_index.json").write_text("[1]"), "model_index.json is damaged"
    yield lambda: (folder / "model_index.json").write_text("{}"), "no UNet"
    for part in "unet", "vae", "text_encoder":
        yield lambda part=part: shutil.rmtree(folder / part), f"lacks the weights of its {part}"
    yield lambda: shutil.rmtree(folder / "scheduler"), "no such file.*scheduler_config.json"
    yield lambda: (folder / "unet/config.json").unlink(), "no such file.*unet/config.json"
    yield lambda: (folder / "scheduler/scheduler_config.json").write_bytes(b"\xff\xfe"), "scheduler_config.json is damaged"
    yield lambda: (folder / "unet" / index).write_text("{}"), f"{index} is damaged.*weight_map"
    yield lambda: next((folder / "unet").glob("*-00002-of-*")).unlink(), "no such file.*00002-of"
    yield lambda: next((folder / "unet").glob("*-00001-of-*")).write_bytes(b"x" * 99), "00001-of.*can be read"
    yield lambda: edit("text_encoder/model.safetensors", lambda t: [t.pop(name) for name in list(t)[:7]]), r"7 missing: text_encoder/.*, \.\.\.$"
    yield lambda: edit("vae/diffusion_pytorch_model.safetensors", lambda t: t.update(more=torch.ones(1))), "1 surplus: vae/more$"
    yield lambda: edit("vae/diffusion_pytorch_model.safetensors", lambda t: t.update({"conv_norm": torch.ones(1)}) or t.pop("encoder.conv_in.bias")), \
        "1 missing: vae/encoder.conv_in.bias; 1 surplus: vae/conv_norm$"


def test_damaged_folders(rows, tmp_path, capsys):
    rows("sd1")
    good, folder = their_folder("sd1", tmp_path / "good"), tmp_path / "f"
    shutil.rmtree(good / "unet")
    shutil.copytree(Path(written("sd1", max_shard_size="400KB").name) / "unet", good / "unet")
    StableDiffusion.load(good, "cpu", torch.float32)
    for damage, words in damaged_folders(folder):
        shutil.copytree(good, folder)
        damage()
        line = refused(capsys, tmp_path / "o.png", "--ckpt", folder)
        assert re.search(words, line) and str(folder) in line, line
        shutil.rmtree(folder)


# --- folders and files written here ---

@pytest.mark.parametrize("name", PIPELINES)
def test_written_folders_open_in_diffusers(rows, tmp_path, name):
    """With from_pretrained and nothing else, to the class of the model; it draws our picture with the sampler, spacing and ids of its folder."""
    rows(name)
    sd, _ = model_and_pipeline(name)
    sd.save(tmp_path / "f", torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "f", local_files_only=True)
    assert type(pipe) is PIPELINES[name]
    found = pipe.vae.config.scaling_factor, pipe.text_encoder.config.hidden_act, pipe.unet.config.upcast_attention  # which hardly show in a random model's pictures
    assert found == {"sd2-base": (0.18215, "gelu", True), "sdxl": (0.13025, "quick_gelu", False)}.get(FAMILIES[name][0], (0.18215, "quick_gelu", False))
    assert torch.allclose(pipe.scheduler.alphas_cumprod.double(), ALPHAS_CUMPROD, rtol=1e-5) and pipe.scheduler.config.steps_offset == 1
    for n in ("", "_2") if name.startswith("sdxl") else ("",):
        prompts = [prompt for prompt in awkward_prompts() if n == "" and not sd.config.text.openclip or "!" not in prompt]  # as a pad, "!" is id 0 to transformers
        theirs = getattr(pipe, "tokenizer" + n)(prompts, padding="max_length", max_length=77, truncation=True).input_ids
        with pytest.warns(UserWarning):
            assert theirs == sd.tokenizers[n == "_2"](prompts).tolist()
    steps = sd.config.steps if name in TURBO else 8
    ours, = sd.generate(PROMPTS["prompt"], seed=5, steps=steps, **asked(name))
    theirs = their_picture(pipe, name, num_inference_steps=steps, guidance_scale=0.0 if name in TURBO else sd.config.guidance)
    print(f"{psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


@pytest.mark.parametrize("name", PIPELINES)
def test_from_layout_to_layout(rows, tmp_path, name):
    """Theirs -> file -> folder -> file: the same tensors, bit for bit, and the same config. Without our config in it, too."""
    rows(name)
    sd, _ = model_and_pipeline(name)
    loads = [StableDiffusion.load(their_folder(name, tmp_path / "theirs"), "cpu", torch.float32)]
    for path in "a.safetensors", "b", "c.safetensors":
        loads[-1].save(tmp_path / path, torch.float32)
        loads.append(StableDiffusion.load(tmp_path / path, "cpu", torch.float32))
    file = tmp_path / "b/unet/diffusion_pytorch_model.safetensors"
    assert set(safe_open(file, "pt").metadata()) == {"format", "config", "modelspec.prediction_type"}
    save_file(load_file(file), file)
    loads.append(StableDiffusion.load(tmp_path / "b", "cpu", torch.float32))
    for found in loads:
        assert found.config == cut(sd.config) and same_tensors(found, sd)
    assert load_file(tmp_path / "a.safetensors").keys() == load_file(tmp_path / "c.safetensors").keys() == loads[0].state_dict().keys()


@pytest.mark.parametrize("name, pipeline", [("sd1", diffusers.StableDiffusionPipeline), ("sd2", diffusers.StableDiffusionPipeline), ("sdxl", XL)])
def test_files_written_from_folders_open_in_diffusers(rows, tmp_path, name, pipeline):
    """from_single_file, which reads the configs in the folder, draws the folder's picture."""
    rows(name)
    _, reference = model_and_pipeline(name)
    folder = their_folder(name, tmp_path / "f")
    sd = StableDiffusion.load(folder, "cpu", torch.float32)
    sd.save(tmp_path / "a.safetensors", torch.float32)
    pipe = pipeline.from_single_file(tmp_path / "a.safetensors", config=str(folder), local_files_only=True)
    draw = functools.partial(their_picture, name=name, num_inference_steps=8, guidance_scale=5.0)
    ours, = sd.generate(PROMPTS["prompt"], seed=5, steps=8, guidance=5.0, sampler="ddim")
    assert psnr(draw(pipe), draw(reference)) >= 60 and psnr(draw(pipe), ours) >= 50


def test_a_fine_tune_opens_in_diffusers(rows, tmp_path, monkeypatch):
    """What train.py leaves is an official single file: diffusers draws the same picture with it, and another than before."""
    rows("sd1")
    _, reference = model_and_pipeline("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    StableDiffusion.load(folder, "cpu", torch.float32).save(tmp_path / "a.safetensors", torch.float32)
    (tmp_path / "data").mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"a {color} square\n")
    monkeypatch.setattr("sys.argv", ["train.py", "--data", str(tmp_path / "data"), "--init", str(tmp_path / "a.safetensors"), "--out", str(tmp_path / "run"),
                                     "--steps", "3", "--batch", "2", "--lr", "1e-2", "--warmup", "0", "--ema", "0", "--sample-every", "1000", "--device", "cpu"])
    train.main()
    tuned = tmp_path / "run" / "model.safetensors"
    pipe = diffusers.StableDiffusionPipeline.from_single_file(tuned, config=str(folder), local_files_only=True)
    draw = functools.partial(their_picture, name="sd1", num_inference_steps=8, guidance_scale=5.0)
    ours, = StableDiffusion.load(tuned, "cpu", torch.float32).generate(PROMPTS["prompt"], seed=5, steps=8, guidance=5.0, sampler="ddim")
    assert psnr(draw(pipe), ours) >= 50 and psnr(draw(reference), ours) < 40


def test_a_file_with_its_last_layer_becomes_a_folder_without(rows, tmp_path):
    """The official SD 2.x file, with the 24th layer and the projection, which no picture depends on."""
    rows("sd2")
    sd, _ = model_and_pipeline("sd2")
    sd.save(tmp_path / "a.safetensors", torch.float32)
    whole = StableDiffusion.load(tmp_path / "a.safetensors", "cpu", torch.float32)
    assert len(whole.text.encoder.layers) == 3 and whole.config == sd.config
    whole.save(tmp_path / "f", torch.float32)
    folder = StableDiffusion.load(tmp_path / "f", "cpu", torch.float32)
    assert len(folder.text.encoder.layers) == 2 and same_tensors(folder, sd)
    pictures = [one.generate("a cat", seed=3, steps=3)[0] for one in (whole, folder)]
    assert psnr(*pictures) > 70


def test_nothing_half_written_is_left(rows, tmp_path, monkeypatch):
    """Neither when the disk is full, nor over what is there; a single file is replaced."""
    rows("sd1")
    sd, _ = model_and_pipeline("sd1")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in "there", "file", "nowhere/f", "nowhere/a.safetensors":
        one_line(lambda: sd.save(tmp_path / path), f"cannot write .*{path}")
    monkeypatch.setattr("checkpoint.save_file", lambda tensors, path, metadata: (Path(path).write_bytes(b"half"), os.write(os.open("/dev/full", os.O_WRONLY), b"x")))
    for path in "a.safetensors", "b":
        one_line(lambda: sd.save(tmp_path / path), f"cannot write .*{path}.*No space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
    monkeypatch.undo()
    sd.save(tmp_path / "c")
    sd.save(tmp_path / "a.safetensors")
    sd.save(tmp_path / "a.safetensors", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.safetensors", "c", "file", "there"]


def test_the_save_command(rows, tmp_path, capsys):
    """Without a prompt it only writes, in fp16 or as told; with one it also draws; the built-in model has no pipeline of diffusers."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    assert command(sd_module, capsys, "--ckpt", folder, "--save", tmp_path / "a.safetensors")[0] == 0
    assert {tensor.dtype for tensor in load_file(tmp_path / "a.safetensors").values()} == {torch.float16}
    assert command(sd_module, capsys, "a cat", "--ckpt", tmp_path / "a.safetensors", "--save", tmp_path / "g", "--dtype", "fp32", "--steps", 2,
                   "--out", tmp_path / "o.png")[0] == 0
    assert (tmp_path / "o.png").exists() and same_tensors(StableDiffusion.load(tmp_path / "g", "cpu", torch.float32), model_and_pipeline("sd1")[0], torch.float16)
    code, err, _ = command(sd_module, capsys, "--ckpt", folder)
    assert code == 2 and "required: prompt" in err
    for args, words in ((("--save", tmp_path / "g"), "cannot write"), (("--save", tmp_path / "h"), "no pipeline")):
        code, err, _ = command(sd_module, capsys, *args)
        assert code == 2 and words in err and err.count("\n") == 1
    assert not (tmp_path / "h").exists()


# --- which row ---

def unmarked(sd: StableDiffusion, path: Path, **metadata: str) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in sd.state_dict().items()}, path, metadata)
    return path


def test_a_preset_by_hand(rows, tmp_path, capsys):
    rows("sdxl")
    path = unmarked(model_and_pipeline("sdxl")[0], tmp_path / "a.safetensors")
    assert StableDiffusion.load(path).config == small("sdxl")
    assert StableDiffusion.load(path, preset="sdxl-turbo").config == small("sdxl-turbo")
    config = {"config": json.dumps(asdict(small("sdxl")))}
    assert StableDiffusion.load(unmarked(model_and_pipeline("sdxl")[0], tmp_path / "b.safetensors", **config), preset="sdxl-turbo").config == small("sdxl-turbo")
    code, err, _ = command(sd_module, capsys, "a cat", "--ckpt", path, "--preset", "sdxl-turbo", "--out", tmp_path / "o.png")
    assert code == 0 and "Steps: 1, Sampler: euler_a, Schedule type: trailing" in Image.open(tmp_path / "o.png").text["parameters"]
    assert "no preset is called 'sd9'; there are sdxl, sdxl-turbo" in refused(capsys, tmp_path / "p.png", "--ckpt", path, "--preset", "sd9")
    sd_module.PRESETS["sd1"] = small("sd1")
    assert "does not fit" in refused(capsys, tmp_path / "p.png", "--ckpt", path, "--preset", "sd1")


def answering(sd: StableDiffusion, answer: float) -> StableDiffusion:
    """A UNet that gives a constant."""
    sd.unet.out[2].weight.zero_()
    sd.unet.out[2].bias.fill_(answer)
    return sd


@pytest.mark.parametrize("answer, name", [(0.4, "sd2-base"), (-0.4, "sd2-base"), (-0.6, "sd2")])
def test_eps_or_v_is_found_out_by_a_probe(rows, tmp_path, answer, name):
    """The mean of the answer - 0.5 is below -1 for v. The file looks like sd2-base, sd2 and sd-turbo."""
    rows("sd2")
    path = unmarked(answering(random_model(small("sd2-base")), answer), tmp_path / "a.safetensors")
    for lowmem in False, True:
        assert StableDiffusion.load(path, "cpu", torch.float32, lowmem).config == small(name)
    assert StableDiffusion.load(path, prediction="v").config == small("sd2")
    assert StableDiffusion.load(path, prediction="eps").config == small("sd2-base")
    assert StableDiffusion.load(path, preset="sd-turbo").config == small("sd-turbo")
    assert StableDiffusion.load(path, preset="sd-turbo", prediction="v").config == replace(small("sd-turbo"), prediction="v")


def test_no_probe_if_the_file_says_or_nothing_is_open(rows, tmp_path, monkeypatch):
    def probed(self):
        raise AssertionError("probed")
    monkeypatch.setattr(StableDiffusion, "probe_prediction", probed)
    rows("sd2")
    sd = random_model(small("sd2-base"))
    for told, name in ("v", "sd2"), ("v_prediction", "sd2"), ("epsilon", "sd2-base"):
        assert StableDiffusion.load(unmarked(sd, tmp_path / "a.safetensors", **{"modelspec.prediction_type": told})).config == small(name)
    sd.save(tmp_path / "b.safetensors")
    assert StableDiffusion.load(tmp_path / "b.safetensors").config == small("sd2-base")
    StableDiffusion.load(tmp_path / "a.safetensors", prediction="v").save(tmp_path / "c.safetensors")  # from a file that says it is eps
    assert StableDiffusion.load(tmp_path / "c.safetensors").config == small("sd2")
    with pytest.raises(AssertionError):
        StableDiffusion.load(unmarked(sd, tmp_path / "c.safetensors"))
    rows("sdxl")
    sd = model_and_pipeline("sdxl")[0]
    assert StableDiffusion.load(unmarked(sd, tmp_path / "d.safetensors")).config == small("sdxl")
    marks = {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0), "denoiser.sigmas": torch.ones(1000)}
    save_file({name: tensor.contiguous() for name, tensor in sd.state_dict().items()} | marks, tmp_path / "e.safetensors")
    assert StableDiffusion.load(tmp_path / "e.safetensors").config == replace(small("sdxl"), prediction="v-zero-snr")
    unmarked(sd, tmp_path / "f.safetensors", **{"modelspec.prediction_type": "v"})
    save_file(load_file(tmp_path / "f.safetensors") | {"ztsnr": torch.zeros(0)}, tmp_path / "f.safetensors", {"modelspec.prediction_type": "v"})
    assert StableDiffusion.load(tmp_path / "f.safetensors").config == replace(small("sdxl"), prediction="v-zero-snr")
    del marks["ztsnr"]
    save_file({name: tensor.contiguous() for name, tensor in sd.state_dict().items()} | marks, tmp_path / "g.safetensors")
    assert StableDiffusion.load(tmp_path / "g.safetensors").config == replace(small("sdxl"), prediction="v")


def test_zero_snr_of_sd2_is_the_row_of_v_and_is_saved_with_the_marks(rows, tmp_path):
    rows("sd2")
    zero = replace(small("sd2"), prediction="v-zero-snr")
    sd = random_model(small("sd2-base"))
    assert StableDiffusion.load(unmarked(sd, tmp_path / "a.safetensors"), prediction="v-zero-snr").config == zero
    save_file(load_file(tmp_path / "a.safetensors") | {"ztsnr": torch.zeros(0)}, tmp_path / "b.safetensors", {"modelspec.prediction_type": "v"})
    marked = StableDiffusion.load(tmp_path / "b.safetensors")
    assert marked.config == zero
    marked.save(tmp_path / "c.safetensors")
    with safe_open(tmp_path / "c.safetensors", "pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys()) and file.metadata()["modelspec.prediction_type"] == "v"
    save_file(load_file(tmp_path / "c.safetensors"), tmp_path / "d.safetensors")  # as other programs write it: without our config
    assert StableDiffusion.load(tmp_path / "c.safetensors").config == StableDiffusion.load(tmp_path / "d.safetensors").config == zero


# --- the hub: a server that answers as huggingface.co does ---

SHA = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Models me/NAME from folders under `root`. `gated`: files are refused. `breaks`: from which byte -> how many more until the connection ends."""
    daemon_threads = True

    def __init__(self, root: Path):
        super().__init__(("127.0.0.1", 0), Answer)
        self.root, self.gated, self.breaks, self.asked = root, False, None, []
        self.url = f"http://127.0.0.1:{self.server_port}"
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    def handle_error(self, *_):
        pass


class Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def answer(self, code, body=b"", **headers):
        self.send_response(code)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def do_GET(self):
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append((self.command, path, self.headers.get("Range")))
        if match := re.fullmatch(r"/api/models/(me/[^/]+)(/revision/[^/]+|/tree/[^/]+)?", path):
            folder = hub.root / match[1]
            if not folder.is_dir():
                return self.answer(401, b'{"error": "Invalid username or password."}', X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
            files = [{"type": "file", "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": "0" * 40}
                     for file in sorted(folder.rglob("*")) if file.is_file()]
            about = files if match[2] and "tree" in match[2] else {"id": match[1], "sha": SHA, "siblings": [{"rfilename": file["path"]} for file in files]}
            return self.answer(200, json.dumps(about).encode(), Content_Type="application/json")
        match = re.fullmatch(r"/(me/[^/]+)/resolve/[^/]+/(.*)", path)
        if match is None or not (hub.root / match[1]).is_dir():
            return self.answer(404, X_Error_Code="RepoNotFound")
        if hub.gated:
            return self.answer(403, X_Error_Code="GatedRepo", X_Error_Message="Access to this model is restricted.")
        file = hub.root / match[1] / match[2]
        if not file.is_file():
            return self.answer(404, X_Error_Code="EntryNotFound")
        body, start = file.read_bytes(), int(re.search(r"\d+", self.headers.get("Range", "bytes=0-"))[0])
        headers = dict(X_Repo_Commit=SHA, ETag=f'"{match[2].replace("/", "-")}"', Accept_Ranges="bytes")
        if start:
            headers |= dict(Content_Range=f"bytes {start}-{len(body) - 1}/{len(body)}")
        if self.command == "GET" and hub.breaks is not None:
            self.answer(206 if start else 200, body[start:start + hub.breaks(start)], **headers | dict(Content_Length=len(body) - start))
            self.wfile.flush()
            self.connection.shutdown(2)
            self.close_connection = True
        else:
            self.answer(206 if start else 200, body[start:], **headers)

    do_HEAD = do_GET


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    """me/both has everything twice and more beside, me/plain an ordinary folder, me/shards a sharded one, me/files no folder."""
    root = tmp_path_factory.mktemp("hub")
    sharded = dict(max_shard_size="400KB")
    for name, how in ("plain", {}), ("both", {}), ("both", dict(variant="fp16")), ("shards", sharded), ("shards", sharded | dict(variant="fp16")):
        their_folder("sd1", root / "me" / name, **how)
    for name in "unet/diffusion_pytorch_model.bin", "text_encoder/pytorch_model.bin", "v1-5.safetensors", "unet/flax_model.msgpack", "safety_checker/model.safetensors":
        (root / "me/both" / name).parent.mkdir(exist_ok=True)
        (root / "me/both" / name).write_bytes(b"not wanted")
    (root / "me/files").mkdir()
    (root / "me/files/model.safetensors").write_bytes(b"weights")
    return root


@pytest.fixture
def hub(repositories, tmp_path, monkeypatch):
    """The server, in place of huggingface.co, and an empty cache."""
    server, constants = Hub(repositories), huggingface_hub.constants
    for name, value in {"ENDPOINT": server.url, "HUGGINGFACE_CO_URL_TEMPLATE": server.url + "/{repo_id}/resolve/{revision}/{filename}", "HF_HUB_OFFLINE": False,
                        "HF_HUB_CACHE": str(tmp_path / "cache"), "HF_HUB_DOWNLOAD_TIMEOUT": 5}.items():
        monkeypatch.setattr(constants, name, value)
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    server.server_close()


def fetched(hub: Hub) -> set[str]:
    return {path.split("/", 5)[-1] for method, path, _ in hub.asked if method == "GET" and "/resolve/" in path}


def test_a_model_of_the_hub_is_loaded_and_kept(hub, rows):
    """The whole way; the second time nothing is fetched, and offline nothing is asked."""
    rows("sd1")
    assert same_tensors(StableDiffusion.load("me/plain", "cpu", torch.float32), model_and_pipeline("sd1")[0])
    assert fetched(hub) == {"model_index.json", "scheduler/scheduler_config.json", "unet/config.json", "vae/config.json", "unet/diffusion_pytorch_model.safetensors",
                            "vae/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"}
    hub.asked.clear()
    StableDiffusion.load("me/plain", "cpu", torch.float32)
    assert fetched(hub) == set()
    hub.asked.clear()
    huggingface_hub.constants.HF_HUB_OFFLINE = True  # monkeypatch puts it back
    StableDiffusion.load("me/plain", "cpu", torch.float32)
    assert hub.asked == []


def test_no_network_and_the_model_is_there_already(hub, rows):
    rows("sd1")
    find("me/plain")
    hub.shutdown()
    hub.server_close()
    StableDiffusion.load("me/plain", "cpu", torch.float32)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", ["both", "shards"])
def test_only_what_is_read_is_fetched(hub, rows, name, half):
    rows("sd1")
    sd = StableDiffusion.load(f"me/{name}", "cpu", torch.float16 if half else torch.float32)
    weights = {file for file in fetched(hub) if not file.endswith("json")}
    assert all(file.endswith(".safetensors") and ("fp16" in file) == half for file in weights)
    assert len(weights) == 3 if name == "both" else len(weights) > 6
    assert same_tensors(sd, model_and_pipeline("sd1")[0], torch.float16 if half else torch.float32)


def test_a_path_that_is_there_wins(hub, tmp_path):
    (tmp_path / "me/plain").mkdir(parents=True)
    assert find("me/plain") == Path("me/plain") and hub.asked == []
    for name in "nowhere.safetensors", "a/b.safetensors", "a/b.ckpt", "/a/b", "a/b/c", "../b", "./b", "a", "":
        assert find(name) == Path(name) and hub.asked == []


def test_what_the_hub_refuses(hub):
    for name, words in {"me/nothing": "me/nothing is no file or folder here, and no model at", "me/files": "me/files is no diffusers folder: download the file you want",
                        "me/a--b": "me/a--b is no file or folder here, and no model"}.items():
        one_line(lambda: StableDiffusion.load(name), words)
    hub.gated = True
    one_line(lambda: StableDiffusion.load("me/plain"), f"me/plain is gated: agree to its terms at {hub.url}/me/plain, then log in")


def test_offline_and_not_there(hub):
    huggingface_hub.constants.HF_HUB_OFFLINE = True
    one_line(lambda: StableDiffusion.load("me/plain"), "me/plain .*was not downloaded before.*HF_HUB_OFFLINE is set: unset it")
    assert hub.asked == []


def test_no_network_and_not_there(hub):
    hub.shutdown()
    hub.server_close()
    one_line(lambda: StableDiffusion.load("me/plain"), "me/plain .*was not downloaded before.*cannot be reached: connect")


@pytest.fixture
def impatient(monkeypatch):
    """huggingface_hub waits a second between its tries, and keeps what it has got in pieces of 10 MB."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    monkeypatch.setattr(huggingface_hub.constants, "DOWNLOAD_CHUNK_SIZE", 1000)


def test_a_connection_that_breaks_is_taken_up_again(hub, rows, impatient):
    """The network ends every answer after 1 MB: each file goes on where it stopped, within one command."""
    rows("sd1")
    hub.breaks = lambda start: 1_000_000
    assert same_tensors(StableDiffusion.load("me/plain", "cpu", torch.float32), model_and_pipeline("sd1")[0])
    ranges = [int(asked[6:].split("-")[0]) for method, path, asked in hub.asked if method == "GET" and path.endswith("text_encoder/model.safetensors") and asked]
    assert ranges == list(range(1_000_000, 1_000_000 * (len(ranges) + 1), 1_000_000)) and len(ranges) > 3


def test_a_download_that_stopped_goes_on_at_the_next_command(hub, rows, impatient):
    """The UNet's file ends in the middle, at every try. Then it holds: what was complete is not fetched again."""
    rows("sd1")
    hub.breaks = lambda start: 1_000_000 if start == 0 else 0
    line = one_line(lambda: StableDiffusion.load("me/plain", "cpu", torch.float32), "the download of me/plain stopped .*: run it again, the files that are complete are kept")
    assert "peer closed connection" in line or "incomplete" in line
    hub.breaks = None
    hub.asked.clear()
    assert same_tensors(StableDiffusion.load("me/plain", "cpu", torch.float32), model_and_pipeline("sd1")[0])
    assert "model_index.json" not in fetched(hub) and "unet/diffusion_pytorch_model.safetensors" in fetched(hub)


def test_the_command_with_a_model_of_the_hub(hub, repositories, tmp_path):
    """A new process, told by the usual variables; a built-in start does not import huggingface_hub."""
    environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home"), "NO_PROXY": "127.0.0.1"}
    run = functools.partial(subprocess.run, cwd=tmp_path, env=environment, capture_output=True, text=True)
    done = run([sys.executable, HERE / "sd.py", "a cat", "--ckpt", "me/nothing"])
    assert done.returncode == 2 and re.fullmatch(r"sd.py: me/nothing is no file or folder here, and no model at .*\n", done.stderr)
    done = run([sys.executable, HERE / "sd.py", "a cat", "--ckpt", "me/plain"])  # of no row's size
    assert done.returncode == 2 and "32; known are 4 and 768" in done.stderr and "Fetching" in done.stderr  # with a bar
    assert (tmp_path / "home/hub/models--me--plain/snapshots" / SHA / "model_index.json").exists()
    done = run([sys.executable, "-c", "import sys; sys.path.insert(0, sys.argv[1]); import sd; sd.StableDiffusion.load(); print('huggingface_hub' in sys.modules)", str(HERE)])
    assert done.stdout.strip() == "False", done.stderr


def test_needed_of_the_published_list():
    """Of what such repositories hold: one set of weights, shards by the index's name."""
    files = {"model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.safetensors.index.json", "unet/diffusion_pytorch_model.safetensors.index.fp16.json",
             "unet/diffusion_pytorch_model-00001-of-00002.safetensors", "unet/diffusion_pytorch_model-00002-of-00002.safetensors",
             "unet/diffusion_pytorch_model.fp16-00001-of-00001.safetensors", "unet/diffusion_pytorch_model-00001-of-00001.fp16.safetensors",
             "vae/diffusion_pytorch_model.bin", "text_encoder/model.fp16.safetensors", "text_encoder/pytorch_model.bin", "text_encoder/pytorch_model.fp16.bin"}
    fixed = {"model_index.json", "unet/config.json", "vae/config.json", "scheduler/scheduler_config.json", "vae/diffusion_pytorch_model.bin", "text_encoder/model.fp16.safetensors"}
    assert set(needed(files, half=False)) - fixed == {file for file in files if re.search(r"unet/.*(-\d+-of-00002|index)(?!.*fp16)", file)}
    assert set(needed(files, half=True)) - fixed == {file for file in files if "unet" in file and "fp16" in file}
