"""What is on disk: single files and diffusers folders, read and written. No downloads.

The references are lists of the tensors of published folders, and what diffusers and transformers
write, open and draw. The models are rows of PRESETS in small, with random weights.
"""
import functools
import gzip
import json
import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import sd as core
from clip import MERGES
from extras import edit, formats, prediction
from extras.diffusers_names import diffusers_name, drop_unused_layers, names_in_folder
from extras.diffusers_save import pipeline_class, to_folder_layout
from extras.formats import official_state_dict, save
from extras.prediction import computing_in_fp32
from sampler import PREDICTIONS, make_sigmas
from sd import PRESETS, Preset, StableDiffusion, UserError, preset_to_dict
from tests.command import run_cli
from tests.common import (
    PROMPTS,
    awkward_prompts,
    latents_psnr,
    on_meta,
    psnr,
    random_model,
    relative_error,
    small,
)
from tests.folders import (  # noqa: F401
    FAMILIES,
    PIPELINES,
    SD,
    SHARDED,
    TURBO,
    XL,
    assert_one_line,
    inputs_of,
    load,
    picture_by_diffusers,
    rows,
    saved_by_diffusers,
    small_model_and_pipeline,
    their_folder,
)

# diffusers with numpy 2
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")


def same_tensors(found: StableDiffusion, wanted: StableDiffusion,
                 dtype: torch.dtype = torch.float32) -> bool:
    """All that is found is wanted and equal. What is not found is what no folder holds: the last
    layer of SD 2.x, and its projection."""
    found, wanted = official_state_dict(found), official_state_dict(wanted)
    missing = [name for name in wanted if name not in found]
    equal = [torch.equal(tensor.float(), wanted[name].to(dtype).float())
             for name, tensor in found.items()]
    unused = [re.search(r"resblocks\.2\.|text_projection$", name) for name in missing]
    return all(equal) and all(unused) and len(found) > 100


def their_guidance(sd: StableDiffusion, name: str) -> float:
    return 0.0 if name in TURBO else sd.preset.guidance


def save_plain(sd: StableDiffusion, path: Path, marks: dict | None = None,
               **metadata: str) -> Path:
    """An official file as other programs write it: without our config."""
    tensors = {name: tensor.contiguous() for name, tensor in official_state_dict(sd).items()}
    save_file(tensors | (marks or {}), path, metadata)
    return path


# --- names ---

def folder_manifest(name: str) -> dict[str, str]:
    """The published folder: component/name -> shape."""
    with gzip.open(MERGES.with_name(f"{name}-diffusers.tsv.gz"), "rt") as lines:
        table = [line.strip().split("\t") for line in lines]
    return {f"{component}/{name}": shape for component, name, shape, *_ in table}


@pytest.mark.parametrize("name, tensors", [("sd1", 1130), ("sd2", 1306), ("sdxl", 2641)])
def test_names_and_shapes_are_those_of_published_folders(name, tensors):
    """One to one: as many of ours as of theirs, all found. SD 2.x's folder has 23 of 24 layers."""
    wanted = folder_manifest(name)
    folder = on_meta(StableDiffusion, drop_unused_layers(PRESETS[name]))
    names, state = names_in_folder(folder), folder.state_dict()
    shapes = {file_name: to_folder_layout(file_name, state[ours]).shape
              for ours, file_name in names.items()}
    assert {file_name: "x".join(map(str, shape)) for file_name, shape in shapes.items()} == wanted
    assert len(names) == len(set(names.values())) == tensors
    whole = names_in_folder(on_meta(StableDiffusion, PRESETS[name]))
    dropped = [file_name for file_name in whole.values() if file_name not in wanted]
    assert all(re.search(r"layers\.23\.|text_projection", file_name) for file_name in dropped)
    assert len(dropped) == (17 if name == "sd2" else 0)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_modules_are_named_too(name):
    """Not only tensors: LoRAs name layers. diffusers' own UNet is the reference."""
    sd, pipe = small_model_and_pipeline(name)
    kinds = (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)

    def names_of(network: nn.Module) -> list[str]:
        return [module for module, layer in network.named_modules() if isinstance(layer, kinds)]

    ours = {diffusers_name("model.diffusion_model." + module, sd.preset)
            for module in names_of(sd.unet)}
    assert ours == {"unet/" + module for module in names_of(pipe.unet)} and len(ours) > 100
    ours = {diffusers_name("first_stage_model." + module, sd.preset)
            for module in names_of(sd.vae)}
    assert ours == {"vae/" + module for module in names_of(pipe.vae)}


# --- folders that diffusers wrote ---

LAYOUTS = {"plain": {}, "fp16": dict(variant="fp16"), "sharded": SHARDED,
           "sharded-fp16": dict(variant="fp16", **SHARDED)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["sd1", "sd2", "sdxl"])
def test_folders_of_diffusers_are_read(rows, tmp_path, name, layout):  # noqa: F811
    """Tensor by tensor. The sharded ones are sharded in every network."""
    rows(name)
    folder = their_folder(name, tmp_path / "f", **LAYOUTS[layout])
    components = ["unet", "vae", "text_encoder"] + ["text_encoder_2"] * (name == "sdxl")
    sharded = [len(list((folder / part).glob("*.safetensors"))) > 1 for part in components]
    assert all(sharded) == ("sharded" in layout)
    assert ("fp16" in layout) == any("fp16" in file.name for file in (folder / "unet").iterdir())
    dtype = torch.float16 if "fp16" in layout else torch.float32
    assert same_tensors(load(folder), small_model_and_pipeline(name)[0], dtype)


def test_of_both_precisions_the_one_asked_for_is_read(rows, tmp_path):  # noqa: F811
    """Files of both are in a folder; the fp16 one is marked by a bias of 1."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    their_folder("sd1", folder, variant="fp16")
    file = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    save_file(load_file(file) | {"conv_out.bias": torch.ones(4)}, file)
    for dtype, marked in ((torch.float16, True), (torch.float32, False),
                          (torch.bfloat16, False)):
        assert bool((load(folder, dtype).unet.out[2].bias == 1).all()) == marked
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert (load(folder).unet.out[2].bias == 1).all()


def as_of_2022(component: str, tensors: dict) -> dict:
    """Other names in the VAE's attention, and position_ids among the weights."""
    old_names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    for new, old in old_names.items() if component == "vae" else ():
        tensors = {name.replace(f"attentions.0.{new}.", f"attentions.0.{old}."): tensor
                   for name, tensor in tensors.items()}
    if component == "text_encoder":
        tensors = {"text_model." + name.removeprefix("text_model."): tensor
                   for name, tensor in tensors.items()}
        tensors["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    return tensors


@pytest.mark.parametrize("age", ["2022", "transformers 5"])
def test_older_and_newer_folders_are_read(rows, tmp_path, age):  # noqa: F811
    """2022: .bin weights, position_ids, query, key, value and proj_attn in the VAE, as linear
    layers. transformers 5: no "text_model."."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    for file in folder.glob("*/*.safetensors"):
        tensors, component = load_file(file), file.parent.name
        file.unlink()
        if age == "2022":
            stem = "pytorch_model" if component == "text_encoder" else "diffusion_pytorch_model"
            torch.save(as_of_2022(component, tensors), file.with_name(stem + ".bin"))
        else:
            old_vae = as_of_2022(component, tensors) if component == "vae" else tensors
            save_file({name.removeprefix("text_model."): tensor
                       for name, tensor in old_vae.items()}, file)
    if age == "2022":
        names = [f"encoder.{n}" for n in torch.load(folder / "vae/diffusion_pytorch_model.bin")]
        assert "mid_block.attentions.0.proj_attn.weight" in " ".join(names)
    assert same_tensors(load(folder), small_model_and_pipeline("sd1")[0])


@pytest.mark.parametrize("name", PIPELINES)
def test_folders_of_diffusers_are_identified(rows, tmp_path, name):  # noqa: F811
    """Among rows with the same shapes: by the scheduler's file. The picture's size is the
    folder's. And it draws what diffusers draws."""
    rows(name)
    sd, pipe = small_model_and_pipeline(name)
    found = load(their_folder(name, tmp_path / "f"))
    assert found.preset == drop_unused_layers(sd.preset)
    if name in TURBO:
        ours, = found.generate(PROMPTS["prompt"], seed=5)
        theirs = picture_by_diffusers(pipe, name, num_inference_steps=1, guidance_scale=0.0)
    else:
        ours, = edit.draw(found, PROMPTS["prompt"], seed=5, steps=8, sampler="ddim",
                          **inputs_of(name))
        theirs = picture_by_diffusers(pipe, name, num_inference_steps=8,
                                      guidance_scale=sd.preset.guidance)
    print(f"{psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


def change_json(file: Path, **fields) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def test_what_a_folder_says_is_taken(rows, tmp_path):  # noqa: F811
    """The size and scale of its latents, and a prediction that no row has. It names the ones that
    it does not know."""
    rows("sdxl")
    folder = their_folder("sdxl", tmp_path / "f")
    scheduler = folder / "scheduler/scheduler_config.json"
    change_json(scheduler, prediction_type="v_prediction")
    change_json(folder / "unet/config.json", sample_size=12)
    change_json(folder / "vae/config.json", scaling_factor=0.5)
    preset = load(folder).preset
    assert (preset.prediction_type, preset.size, preset.vae.scale_factor, preset.steps) \
        == ("v", 96, 0.5, 20)
    row = core.PRESETS["sdxl"]  # the table is not changed
    assert (row.size, row.vae.scale_factor) == (64, 0.13025)
    change_json(scheduler, rescale_betas_zero_snr=True)
    sd = load(folder)
    assert sd.preset.prediction_type == "v-zero-snr"
    change_json(scheduler, prediction_type="epsilon")
    assert_one_line(lambda: StableDiffusion.load(folder), "predicts 'epsilon-zero-snr'")
    change_json(scheduler, prediction_type="v_prediction")
    save(sd, tmp_path / "saved", torch.float32)
    written = json.loads((tmp_path / "saved/scheduler/scheduler_config.json").read_text())
    assert written["rescale_betas_zero_snr"]
    kind = diffusers.DPMSolverMultistepScheduler
    assert kind.from_pretrained(tmp_path / "saved/scheduler").alphas_cumprod[-1] < 1e-7
    preset = load(folder, preset="sdxl-turbo").preset
    assert (preset.prediction_type, preset.size, preset.steps) == ("eps", 64, 1)
    change_json(scheduler, prediction_type="sample", rescale_betas_zero_snr=False)
    assert_one_line(lambda: StableDiffusion.load(folder), "predicts 'sample'")


def test_the_noise_schedule_of_a_folder_is_taken_and_saved(rows, tmp_path):  # noqa: F811
    """In folders and in single files; one that is not known is refused."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    scheduler = folder / "scheduler/scheduler_config.json"
    change_json(scheduler, beta_start=0.001, beta_end=0.02, beta_schedule="linear")
    sd = load(folder)
    wanted = make_sigmas(0.001, 0.02, "linear")
    theirs = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").alphas_cumprod.double()
    assert torch.allclose(1 / (wanted**2 + 1), theirs, rtol=1e-5)
    save(sd, tmp_path / "saved")
    save(sd, tmp_path / "a.safetensors")
    for path in folder, tmp_path / "saved", tmp_path / "a.safetensors":
        assert torch.equal(load(path).schedule.base, wanted)
    change_json(scheduler, beta_schedule="squaredcos_cap_v2")
    assert_one_line(lambda: StableDiffusion.load(folder), "noise schedule 'squaredcos_cap_v2'")


def damages(folder: Path) -> Iterator:
    """(what is done to a good folder, a pattern of the answer)"""
    index = "diffusion_pytorch_model.safetensors.index.json"
    scheduler = folder / "scheduler/scheduler_config.json"
    vae = folder / "vae/diffusion_pytorch_model.safetensors"

    def edit_tensors(file, change):
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    def remove_seven(tensors):
        for name in list(tensors)[:7]:
            del tensors[name]

    def rename_one(tensors):
        tensors["conv_norm"] = torch.ones(1)
        del tensors["encoder.conv_in.bias"]

    yield lambda: (folder / "model_index.json").unlink(), "without model_index.json"
    for text, pattern in {'{"unet": ': "model_index.json is damaged",
                          "[1]": "model_index.json is damaged", "{}": "no UNet"}.items():
        yield lambda text=text: (folder / "model_index.json").write_text(text), pattern
    for part in "unet", "vae", "text_encoder":
        yield (lambda part=part: shutil.rmtree(folder / part),
               f"lacks the weights of its {part}")
    yield lambda: shutil.rmtree(folder / "scheduler"), "no such file.*scheduler_config.json"
    yield lambda: (folder / "unet/config.json").unlink(), "no such file.*unet/config.json"
    yield lambda: scheduler.write_bytes(b"\xff\xfe"), "scheduler_config.json is damaged"
    yield (lambda: (folder / "unet" / index).write_text("{}"), f"{index} is damaged.*weight_map")
    yield (lambda: next((folder / "unet").glob("*-00002-of-*")).unlink(),
           "no such file.*00002-of")
    yield (lambda: next((folder / "unet").glob("*-00001-of-*")).write_bytes(b"x" * 99),
           "00001-of.*can be read")
    yield (lambda: edit_tensors(folder / "text_encoder/model.safetensors", remove_seven),
           r"7 missing: text_encoder/.*, \.\.\.$")
    yield (lambda: edit_tensors(vae, rename_one),
           "1 missing: vae/encoder.conv_in.bias; 1 surplus: vae/conv_norm$")


def assert_refused(capsys, out: Path, *words) -> str:
    """sd.py must end with status 2 and one line, and write no file beside `out`."""
    before = set(out.parent.glob("*"))
    code, err, _ = run_cli(capsys, "a cat", "--out", out, *words)
    lines = [line for line in err.replace("\r", "\n").split("\n")
             if line.strip() and not re.search(r"\d+%\|", line)]  # a progress bar
    assert code == 2 and len(lines) == 1, (code, lines)
    assert set(out.parent.glob("*")) == before
    return lines[0]


def test_damaged_folders(rows, tmp_path, capsys):  # noqa: F811
    rows("sd1")
    good, folder = their_folder("sd1", tmp_path / "good"), tmp_path / "f"
    shutil.rmtree(good / "unet")
    shutil.copytree(Path(saved_by_diffusers("sd1", **SHARDED).name) / "unet", good / "unet")
    load(good)
    for damage, pattern in damages(folder):
        shutil.copytree(good, folder)
        damage()
        line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", folder)
        assert re.search(pattern, line) and str(folder) in line, line
        shutil.rmtree(folder)
    vae = good / "vae/diffusion_pytorch_model.safetensors"
    save_file(load_file(vae) | {"more": torch.ones(1)}, vae)
    with pytest.warns(UserWarning, match="ignored 1 tensor that no network uses: vae/more$"):
        load(good)


# --- folders and files written here ---

@pytest.mark.parametrize("name", PIPELINES)
def test_written_folders_open_in_diffusers(rows, tmp_path, name):  # noqa: F811
    """With from_pretrained and nothing else, to the class of the model. It draws our picture with
    the sampler, spacing and ids of its folder."""
    rows(name)
    sd, _ = small_model_and_pipeline(name)
    save(sd, tmp_path / "f", torch.float32)
    assert [file.name for file in tmp_path.iterdir()] == ["f"]
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "f", local_files_only=True)
    assert type(pipe) is PIPELINES[name]
    # random weights hardly show these in pictures
    found = (pipe.vae.config.scaling_factor, pipe.text_encoder.config.hidden_act,
             pipe.unet.config.upcast_attention)
    wanted = {"sd2": (0.18215, "gelu", True), "sdxl": (0.13025, "quick_gelu", False)}
    family = FAMILIES[name][0].split("-")[0]
    assert found == wanted.get(family, (0.18215, "quick_gelu", False))
    alphas_cumprod = 1 / (make_sigmas() ** 2 + 1)
    assert torch.allclose(pipe.scheduler.alphas_cumprod.double(), alphas_cumprod, rtol=1e-5)
    assert pipe.scheduler.config.steps_offset == 1
    assert_tokenizers_agree(pipe, sd)
    steps = sd.preset.steps if name in TURBO else 8
    ours, = edit.draw(sd, PROMPTS["prompt"], seed=5, steps=steps, **inputs_of(name))
    theirs = picture_by_diffusers(pipe, name, num_inference_steps=steps,
                                  guidance_scale=their_guidance(sd, name))
    print(f"{psnr(ours, theirs):.1f} dB")
    assert psnr(ours, theirs) >= 50


def assert_tokenizers_agree(pipe, sd: StableDiffusion) -> None:
    for n, encoder in zip(("", "_2"), sd.text_encoders):
        # where "!" is the padding, it is id 0 to transformers
        prompts = [prompt for prompt in awkward_prompts()
                   if not encoder.config.openclip or "!" not in prompt]
        tokenizer = getattr(pipe, "tokenizer" + n)
        theirs = tokenizer(prompts, padding="max_length", max_length=77, truncation=True)
        with pytest.warns(UserWarning):
            assert theirs.input_ids == encoder.tokenizer(prompts).tolist()


@pytest.mark.parametrize("name", PIPELINES)
def test_from_layout_to_layout(rows, tmp_path, name):  # noqa: F811
    """Theirs -> file -> folder -> file: the same tensors, bit for bit, and the same preset. Also
    without our config in it."""
    rows(name)
    sd, _ = small_model_and_pipeline(name)
    loaded = [load(their_folder(name, tmp_path / "theirs"))]
    for path in "a.safetensors", "b", "c.safetensors":
        save(loaded[-1], tmp_path / path, torch.float32)
        loaded.append(load(tmp_path / path))
    file = tmp_path / "b/unet/diffusion_pytorch_model.safetensors"
    with safe_open(file, "pt") as opened:
        assert set(opened.metadata()) == {"format", "config", "modelspec.prediction_type"}
    save_file(load_file(file), file)
    loaded.append(load(tmp_path / "b"))
    for found in loaded:
        assert found.preset == drop_unused_layers(sd.preset) and same_tensors(found, sd)
    first, last = (load_file(tmp_path / f"{letter}.safetensors") for letter in "ac")
    assert first.keys() == last.keys() == official_state_dict(loaded[0]).keys()


@pytest.mark.parametrize("name, pipeline", [("sd1", SD), ("sd2", SD), ("sdxl", XL)])
def test_files_written_from_folders_open_in_diffusers(
        rows, tmp_path, name, pipeline):  # noqa: F811
    """from_single_file, which reads the configs in the folder, draws the folder's picture."""
    rows(name)
    _, reference = small_model_and_pipeline(name)
    folder = their_folder(name, tmp_path / "f")
    sd = load(folder)
    save(sd, tmp_path / "a.safetensors", torch.float32)
    pipe = pipeline.from_single_file(tmp_path / "a.safetensors", config=str(folder),
                                     local_files_only=True)
    draw = functools.partial(picture_by_diffusers, name=name, num_inference_steps=8,
                             guidance_scale=5.0)
    ours, = sd.generate(PROMPTS["prompt"], seed=5, steps=8, guidance=5.0, sampler="ddim")
    assert psnr(draw(pipe), draw(reference)) >= 60 and psnr(draw(pipe), ours) >= 50


def test_a_fine_tune_opens_in_diffusers(rows, tmp_path, monkeypatch):  # noqa: F811
    """What train.py leaves is an official single file: diffusers draws the same picture with it,
    and another than before."""
    import train
    rows("sd1")
    _, reference = small_model_and_pipeline("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    save(load(folder), tmp_path / "a.safetensors", torch.float32)
    (tmp_path / "data").mkdir()
    for i, color in enumerate(("red", "green", "blue")):
        Image.new("RGB", (64, 64), color).save(tmp_path / "data" / f"{i}.png")
        (tmp_path / "data" / f"{i}.txt").write_text(f"a {color} square\n")
    words = ["--data", tmp_path / "data", "--init", tmp_path / "a.safetensors", "--out",
             tmp_path / "run", "--steps", 3, "--batch", 2, "--lr", 1e-2, "--warmup", 0,
             "--ema", 0, "--sample-every", 1000, "--device", "cpu"]
    monkeypatch.setattr("sys.argv", ["train.py", *map(str, words)])
    train.main()
    tuned = tmp_path / "run" / "model.safetensors"
    pipe = SD.from_single_file(tuned, config=str(folder), local_files_only=True)
    draw = functools.partial(picture_by_diffusers, name="sd1", num_inference_steps=8,
                             guidance_scale=5.0)
    ours, = load(tuned).generate(PROMPTS["prompt"], seed=5, steps=8, guidance=5.0, sampler="ddim")
    assert psnr(draw(pipe), ours) >= 50 and psnr(draw(reference), ours) < 40


def test_a_file_with_its_last_layer_becomes_a_folder_without(rows, tmp_path):  # noqa: F811
    """The official SD 2.x file, with the 24th layer and the projection, which no picture needs."""
    rows("sd2")
    sd, _ = small_model_and_pipeline("sd2")
    save(sd, tmp_path / "a.safetensors", torch.float32)
    whole = load(tmp_path / "a.safetensors")
    assert len(whole.text_encoders[0].encoder.layers) == 3 and whole.preset == sd.preset
    save(whole, tmp_path / "f", torch.float32)
    folder = load(tmp_path / "f")
    assert len(folder.text_encoders[0].encoder.layers) == 2 and same_tensors(folder, sd)
    pictures = [one.generate("a cat", seed=3, steps=3)[0] for one in (whole, folder)]
    assert psnr(*pictures) > 70


def test_nothing_half_written_is_left(rows, tmp_path, monkeypatch):  # noqa: F811
    """Neither when the disk is full, nor over what is there; a single file is replaced."""
    rows("sd1")
    sd, _ = small_model_and_pipeline("sd1")
    (tmp_path / "there").mkdir()
    (tmp_path / "file").write_text("mine")
    for path in "there", "file", "nowhere/f", "nowhere/a.safetensors":
        assert_one_line(lambda: save(sd, tmp_path / path), f"cannot write .*{path}")

    def disk_is_full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        os.write(os.open("/dev/full", os.O_WRONLY), b"x")

    monkeypatch.setattr("extras.files.save_file", disk_is_full)
    for path in "a.safetensors", "b":
        assert_one_line(lambda: save(sd, tmp_path / path), f"cannot write .*{path}.*No space")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "there"]
    monkeypatch.undo()
    save(sd, tmp_path / "c")
    save(sd, tmp_path / "a.safetensors")
    save(sd, tmp_path / "a.safetensors", torch.float32)
    assert sorted(path.name for path in tmp_path.iterdir()) \
        == ["a.safetensors", "c", "file", "there"]


def test_the_save_command(rows, tmp_path, capsys):  # noqa: F811
    """Without a prompt it only writes, in fp16 or as --dtype says; with one it also draws.
    diffusers has no pipeline for the built-in model."""
    rows("sd1")
    folder, file = their_folder("sd1", tmp_path / "f"), tmp_path / "a.safetensors"
    assert run_cli(capsys, "--ckpt", folder, "--save", file)[0] == 0
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float16}
    code, _, _ = run_cli(capsys, "a cat", "--ckpt", file, "--save", tmp_path / "g",
                         "--dtype", "fp32", "--steps", 2, "--out", tmp_path / "o.png")
    assert code == 0 and (tmp_path / "o.png").exists()
    assert same_tensors(load(tmp_path / "g"), small_model_and_pipeline("sd1")[0], torch.float16)
    code, err, _ = run_cli(capsys, "--ckpt", folder)
    assert code == 2 and "required: prompt" in err
    for path, said in (tmp_path / "g", "cannot write"), (tmp_path / "h", "no pipeline"):
        code, err, _ = run_cli(capsys, "--save", path)
        assert code == 2 and said in err and err.count("\n") == 1
    assert not (tmp_path / "h").exists()


def test_a_decoder_of_more_levels_has_no_folder():
    preset = small("sd1")
    vae = replace(preset.vae, decoder_ch_mult=(1, *preset.vae.ch_mult))
    with pytest.raises(UserError, match="whose decoder has other levels than its encoder"):
        pipeline_class(replace(preset, vae=vae))


# --- the config in the metadata ---

def old_config(preset: Preset) -> dict:
    """The preset as files held it before `text_encoders`."""
    def old_text(cfg) -> dict:
        fields = asdict(cfg)
        fields["layers_skipped"] = fields.pop("clip_skip")
        return fields

    texts = [old_text(cfg) for cfg in preset.text_encoders] + [None]
    return dict(unet=asdict(preset.unet), vae=asdict(preset.vae), text=texts[0], text_2=texts[1],
                prediction=preset.prediction_type, size=preset.size, steps=preset.steps,
                guidance=preset.guidance, sampler=preset.sampler,
                spacing=preset.timestep_spacing, zero_negative=preset.zero_negative)


@pytest.mark.parametrize("name", ["sd1", "sd-turbo", "sdxl-turbo", "lcm"])
def test_files_with_the_old_config_are_read(rows, tmp_path, name):  # noqa: F811
    rows(name)
    sd = small_model_and_pipeline(name)[0]
    unusual = replace(sd.preset, prediction_type="v", steps=7)
    path = save_plain(sd, tmp_path / "a.safetensors", config=json.dumps(old_config(unusual)))
    assert load(path).preset == unusual
    save(load(path), path)
    with safe_open(path, "pt") as file:
        stored = json.loads(file.metadata()["config"])
    assert stored == json.loads(json.dumps(preset_to_dict(unusual)))


def test_configs_that_do_not_fit_are_refused(rows, tmp_path):  # noqa: F811
    rows("sd1")
    sd, path = small_model_and_pipeline("sd1")[0], tmp_path / "a.safetensors"
    for config in '{"unet": {"width": 3}, "vae": {}}', '{"unet": 1, "vae": 2, "text": 3}':
        save_plain(sd, path, config=config)
        assert_one_line(lambda: load(path), "a.safetensors: the config in its metadata: ")
    for config in '{"unet": {"width": 3}}', "[1]", "{", '{"text": 3}', '"text"':  # of others
        save_plain(sd, path, config=config)
        with pytest.warns(UserWarning, match="a.safetensors has a config of another program"):
            assert load(path).preset == small("sd1")


@pytest.mark.parametrize("name", ["sd1", "sd2"])
def test_tensors_may_be_missing_if_asked(rows, tmp_path, name):  # noqa: F811
    """As training from parts of a model needs it: in folders and in single files."""
    rows(name)
    folder, file = their_folder(name, tmp_path / "f"), tmp_path / "a.safetensors"
    sd = load(folder)
    save(sd, file)
    config = {"config": json.dumps(preset_to_dict(sd.preset))}
    for path in folder / "text_encoder/model.safetensors", file:
        tensors = load_file(path)
        lost = next(key for key in tensors if key.endswith(("mlp.fc1.bias", "mlp.c_fc.bias")))
        save_file({key: tensor for key, tensor in tensors.items() if key != lost}, path,
                  config)
    for path in folder, file:
        tensors, preset, _ = formats.open_checkpoint(path, strict=False)
        wanted = on_meta(StableDiffusion, preset).state_dict()
        missing = [key for key in wanted if key not in tensors]
        assert len(missing) == 1 and missing[0].endswith("mlp.fc1.bias")
        assert tensors.keys() < wanted.keys()


# --- which preset ---

def test_a_preset_by_hand(rows, tmp_path, capsys):  # noqa: F811
    rows("sdxl")
    sd = small_model_and_pipeline("sdxl")[0]
    path, out = save_plain(sd, tmp_path / "a.safetensors"), tmp_path / "p.png"
    assert load(path).preset == small("sdxl")
    assert load(path, preset="sdxl-turbo").preset == small("sdxl-turbo")
    assert load(path, preset=small("sdxl-turbo")).preset == small("sdxl-turbo")
    config = json.dumps(preset_to_dict(small("sdxl")))
    other = save_plain(sd, tmp_path / "b.safetensors", config=config)
    assert load(other, preset="sdxl-turbo").preset == small("sdxl-turbo")
    code, err, _ = run_cli(capsys, "a cat", "--ckpt", path, "--preset", "sdxl-turbo", "--out",
                           tmp_path / "o.png")
    text = Image.open(tmp_path / "o.png").text["parameters"]
    assert code == 0 and "Steps: 1, Sampler: Euler a, Schedule type: Simple" in text
    line = assert_refused(capsys, out, "--ckpt", path, "--preset", "sd9")
    assert re.search("no preset is called 'sd9'.* sdxl, sdxl-turbo", line)
    core.PRESETS["sd1"] = small("sd1")
    assert re.search("do(es)? not fit", assert_refused(capsys, out, "--ckpt", path,
                                                       "--preset", "sd1"))


def answering(sd: StableDiffusion, answer: float) -> StableDiffusion:
    """With a UNet that gives a constant."""
    sd.unet.out[2].weight.zero_()
    sd.unet.out[2].bias.fill_(answer)
    return sd


@pytest.mark.parametrize("answer, name", [(0.4, "sd2-base"), (-0.4, "sd2-base"), (-0.6, "sd2")])
def test_prediction_type_probe(rows, tmp_path, answer, name):  # noqa: F811
    """The mean of the answer - 0.5 is below -1 for v. The file looks like sd2-base, sd2 and
    sd-turbo."""
    rows("sd2")
    path = tmp_path / "a.safetensors"
    save_plain(answering(random_model(small("sd2-base")), answer), path)
    for fast in True, False:
        assert load(path, fast=fast).preset == small(name)
    assert StableDiffusion.load(path, prediction_type="v").preset == small("sd2")
    assert StableDiffusion.load(path, prediction_type="eps").preset == small("sd2-base")
    assert StableDiffusion.load(path, preset="sd-turbo").preset == small("sd-turbo")
    turbo_v = replace(small("sd-turbo"), prediction_type="v")
    assert StableDiffusion.load(path, preset="sd-turbo", prediction_type="v").preset == turbo_v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_probe_asks_the_loaded_unet_and_changes_nothing(
        rows, tmp_path, dtype):  # noqa: F811
    """In any precision. A CPU computes fp16 layer by layer in fp32."""
    rows("sd2")
    sd = answering(random_model(small("sd2-base")), -0.6)
    path = save_plain(sd, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match="does not say what it predicts: by its answers it is v;"):
        found = load(path, dtype)
    assert found.preset == small("sd2") and found.schedule.prediction is PREDICTIONS["v"]
    unet, stored = found.unet.state_dict(), sd.unet.state_dict()
    assert all(torch.equal(unet[name], stored[name].to(dtype)) for name in stored)
    x, context = torch.randn(2, 4, 8, 8), torch.randn(2, 5, 32)
    t = torch.tensor([3, 999])
    with torch.no_grad(), computing_in_fp32(found.unet):
        wide = found.unet(x, t, context)
    assert relative_error(wide, sd.unet(x, t, context)) < 0.02
    assert not any(module._forward_pre_hooks for module in found.unet.modules())


def test_no_probe_if_the_file_says_or_nothing_is_open(rows, tmp_path, monkeypatch):  # noqa: F811
    def probed(*_):
        raise AssertionError("probed")

    monkeypatch.setattr(prediction, "probe_prediction_type", probed)
    rows("sd2")
    sd, path = random_model(small("sd2-base")), tmp_path / "a.safetensors"
    for stored, name in ("v", "sd2"), ("v_prediction", "sd2"), ("epsilon", "sd2-base"):
        save_plain(sd, path, **{"modelspec.prediction_type": stored})
        assert StableDiffusion.load(path).preset == small(name)
    save(sd, tmp_path / "b.safetensors")
    assert StableDiffusion.load(tmp_path / "b.safetensors").preset == small("sd2-base")
    # from a file that says it is eps
    save(StableDiffusion.load(path, prediction_type="v"), tmp_path / "c.safetensors")
    assert StableDiffusion.load(tmp_path / "c.safetensors").preset == small("sd2")
    with pytest.raises(AssertionError):
        StableDiffusion.load(save_plain(sd, tmp_path / "c.safetensors"))


def test_sdxl_is_known_by_its_marks(rows, tmp_path, monkeypatch):  # noqa: F811
    """Without a probe, but for the file that says nothing."""
    rows("sdxl")
    sd, path = small_model_and_pipeline("sdxl")[0], tmp_path / "d.safetensors"
    assert StableDiffusion.load(save_plain(sd, path)).preset == small("sdxl")
    monkeypatch.setattr(prediction, "probe_prediction_type", None)
    zero_snr = replace(small("sdxl"), prediction_type="v-zero-snr")
    v_pred, ztsnr = {"v_pred": torch.zeros(0)}, {"ztsnr": torch.zeros(0)}
    sigmas = {"denoiser.sigmas": torch.ones(1000)}
    save_plain(sd, path, v_pred | ztsnr | sigmas)
    assert StableDiffusion.load(path).preset == zero_snr
    save_plain(sd, path, ztsnr, **{"modelspec.prediction_type": "v"})
    assert StableDiffusion.load(path).preset == zero_snr
    save_plain(sd, path, v_pred | sigmas)
    assert StableDiffusion.load(path).preset == replace(small("sdxl"), prediction_type="v")


def test_zero_snr_of_sd2_is_the_row_of_v_and_is_saved_with_the_marks(
        rows, tmp_path):  # noqa: F811
    rows("sd2")
    zero = replace(small("sd2"), prediction_type="v-zero-snr")
    sd = random_model(small("sd2-base"))
    a, b, c, d = (tmp_path / f"{letter}.safetensors" for letter in "abcd")
    save_plain(sd, a)
    assert StableDiffusion.load(a, prediction_type="v-zero-snr").preset == zero
    save_plain(sd, b, {"ztsnr": torch.zeros(0)}, **{"modelspec.prediction_type": "v"})
    marked = StableDiffusion.load(b)
    assert marked.preset == zero
    save(marked, c)
    with safe_open(c, "pt") as file:
        assert {"v_pred", "ztsnr"} <= set(file.keys())
        assert file.metadata()["modelspec.prediction_type"] == "v"
    save_file(load_file(c), d)  # as other programs write it: without our config
    assert StableDiffusion.load(c).preset == StableDiffusion.load(d).preset == zero


# --- OpenCLIP's names ---

@pytest.mark.parametrize("name", ["sd2", "sdxl"])
def test_openclip_names_in_single_files(rows, tmp_path, name):  # noqa: F811
    """They stand in the file and in what is said of a damaged one, and nowhere else."""
    rows(name)
    sd, path = small_model_and_pipeline(name)[0], tmp_path / "a.safetensors"
    save(sd, path, torch.float32)
    tensors, prefix = load_file(path), sd.text_encoders[-1].config.prefix
    in_proj = f"{prefix}transformer.resblocks.0.attn.in_proj_weight"
    width = sd.text_encoders[-1].config.hidden_size
    assert tensors[in_proj].shape == (3 * width, width)
    assert not any("resblocks" in key for key in sd.state_dict())
    again, state = load(path).state_dict(), sd.state_dict()
    assert again.keys() == state.keys()
    assert all(torch.equal(again[key], tensor) for key, tensor in state.items())
    save_file({key: tensor for key, tensor in tensors.items() if key != in_proj}, path)
    assert_one_line(lambda: load(path, preset=name),
                    f"a.safetensors.*text encoder .*1 missing: {in_proj}$")
    save_file(tensors | {in_proj: torch.ones(3, width)}, path)
    assert_one_line(lambda: load(path, preset=name), rf"{in_proj} \[3, {width}\] instead of")


def test_latents_after_a_round_trip(rows, tmp_path):  # noqa: F811
    """What is loaded draws to the bit what was saved."""
    rows("sdxl")
    sd, seen = small_model_and_pipeline("sdxl")[0], []
    save(sd, tmp_path / "a.safetensors", torch.float32)
    for model in sd, load(tmp_path / "a.safetensors", fast=False):
        model.generate("a cat", seed=3, steps=2, callback=lambda step: seen.append(step.x))
    assert torch.equal(seen[1], seen[3]) and latents_psnr(seen[1], seen[3]) > 100
