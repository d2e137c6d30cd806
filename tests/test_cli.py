"""The command sd.py as a user meets it: right use, wrong use."""
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import types
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from extras import cli
from extras.formats import save
from extras.lora import LoRA
from extras.options import FIELDS, Options, flag, make_parser, parse, read_params
from sampler import SAMPLERS, SPACINGS
from sd import BUILTIN, PRESETS, StableDiffusion
from tests.command import ROOT, SHEET, array, assert_refused, lines_of, params, run_cli
from tests.training import TINY, tiny  # noqa: F401

OUT = "model.diffusion_model.out.2.bias"


def config_of(path: Path) -> dict[str, str]:
    return {"config": safe_open(path, "pt").metadata()["config"]}


# --- the process ---

def test_first_command_of_the_readme(tmp_path):
    """A new process, another folder, no network: the built-in model draws a red apple.

    Where the picture is not white it is mostly red.
    """
    done = subprocess.run([sys.executable, ROOT / "sd.py", "a red apple"], cwd=tmp_path,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("built-in model") == 1 and "--ckpt" in done.stderr
    assert done.stdout == "a-red-apple.png\n"
    picture = array(tmp_path / "a-red-apple.png")
    assert picture.shape == (128, 128, 3)
    drawn = picture[picture.min(-1) < 200].mean(0)
    assert drawn[0] > drawn[1] + 50 and drawn[0] > drawn[2] + 50


@pytest.mark.parametrize("start", [
    "import extras.cli", "import runpy; runpy.run_path('sd.py', run_name='__main__')"])
def test_threads_spin_for_a_short_time(start):
    """GOMP_SPINCOUNT is set before torch is imported; the user's own value stays."""
    code = f"""if True:
        import os, sys
        class Look:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ["GOMP_SPINCOUNT"], flush=True)
                    os._exit(0)
        sys.meta_path.insert(0, Look())
        {start}
    """
    clean = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"}
    for given, wanted in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=clean | given,
                              capture_output=True, text=True)
        assert done.stdout.strip() == wanted


@pytest.mark.skipif(sys.platform == "win32", reason="signals of Unix")
def test_ctrl_c_ends_in_one_line(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "sd.py", "a red apple", "--steps", "1000", "--out", "a.png"],
        cwd=tmp_path, stderr=subprocess.PIPE, text=True,
        # a shell's background job ignores it, and passes that on
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    line = process.stderr.readline()                # about the built-in model: main has begun
    assert "built-in model" in line
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert lines_of(err)[-1].endswith("sd.py: stopped") and "Traceback" not in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried ..."), MemoryError(),
    RuntimeError("[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't "
                 "allocate memory: you tried to allocate 9 bytes.")])
def test_out_of_memory_is_one_line(error, tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    def fail(*args, **options):
        raise error
    monkeypatch.setattr(cli.edit, "draw", fail)
    line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny)
    assert line.startswith("sd.py: out of memory: try --lowmem")
    monkeypatch.setattr(cli, "out_of_memory", lambda error: False)
    with pytest.raises(type(error)):                # other errors keep their traceback
        run_cli(capsys, "a cat", "--ckpt", tiny, "--out", tmp_path / "o.png")


# --- options ---

def test_help_lists_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as end:
        cli.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert not end.value.code
    for one in fields(Options):
        shown = f" {flag(one.name)} " in text or one.name == "prompt"
        assert shown == (one.metadata["group"] != "hidden"), one.name
        for old in one.metadata["old"]:
            assert f" {old} " not in text
    assert "--n N number of pictures of each prompt (default: 1)" in text
    assert "(default: the model's; built-in 20)" in text
    for group in "prompt:", "sampling:", "model:", "files:", "speed and memory:":
        assert f" {group} " in text


def test_old_names_of_options_are_accepted():
    old = parse(["a", "--guided-share", "0.5", "--deep-every", "3", "--film", "f.gif",
                 "--spacing", "Karras", "--batch", "4"])
    new = parse(["a", "--cfg-end", "0.5", "--deepcache", "3", "--gif", "f.gif",
                 "--timestep-spacing", "karras", "--n", "4", "--batch-size", "4"])
    assert replace(old, batch=None) == new
    many = parse(["--prompts", "p.txt", "--batch", "4"])
    assert (many.n, many.batch_size) == (1, 4)


def test_what_is_not_given_is_the_default():
    assert parse([]) == Options()
    assert {name for name, one in FIELDS.items() if one.default is False} \
        == {"captions", "int8", "lowmem", "no_fast", "trust"}


@pytest.mark.parametrize("words, settings", [
    (["--sampler", "Euler a"], ("euler_a", None)),
    (["--sampler", "DPM++ 2M Karras"], ("dpmpp_2m", "karras")),
    (["--sampler", "DPM++ 2M Karras", "--spacing", "trailing"], ("dpmpp_2m", "trailing")),
    (["--sampler", "EulerAncestralDiscreteScheduler"], ("euler_a", None))])
def test_samplers_by_their_other_names(words, settings):
    options = parse(["a cat", *words])
    assert (options.sampler, options.timestep_spacing) == settings


def test_a_random_seed_is_stored(tiny, tmp_path, capsys):  # noqa: F811
    seeds = set()
    for given in "random", "-1", "random":
        assert run_cli(capsys, "a cat", "--steps", 1, "--seed", given, "--ckpt", tiny, "--out",
                       tmp_path / "o.png")[0] == 0
        seeds.add(read_params(tmp_path / "o.png")["seed"])
    assert len(seeds) == 3 and all(0 <= seed < 2**32 for seed in seeds)


@pytest.mark.parametrize("words, said", [
    (["a", "red", "apple"], 'in quotes: "a red apple"'),
    (["a cat", "--stepps", "3"], "unrecognized arguments: --stepps 3: did you mean --steps?"),
    (["a cat", "--step", "3"], "did you mean --steps?"),        # abbreviations are off
    (["a cat", "--neg", "dog"], "did you mean --negative?"),
    (["a cat", "--negative_prompt", "x"], "did you mean --negative?"),
    (["a cat", "--batch_size", "2"], "did you mean --batch-size?"),
    (["a cat", "--size", "512x512"], "did you mean --width and --height?"),
    (["a cat", "--size=64"], "did you mean --width and --height?"),
    (["a cat", "--cfg", "7"], "did you mean --guidance?"),
    (["a cat", "-o", "x.png"], "did you mean --out?"),
    (["a cat", "--frobnicate"], "unrecognized arguments: --frobnicate: sd.py --help lists all"),
    (["a cat", "--steps", "many"], "invalid int value: 'many'"),
    (["a cat", "--seed", "x"], "argument --seed: invalid"),
    (["a cat", "--dtype", "fp8"], "invalid choice: 'fp8'"), ([], "are required: prompt")])
def test_words_that_are_no_options(words, said, capsys):
    code, err, _ = run_cli(capsys, *words)
    assert code == 2 and said in err and err.count("\n") == 1


def test_every_hint_names_an_option():
    known = {word for action in make_parser()._actions for word in action.option_strings}
    for hint in cli_hints().values():
        assert set(hint.split(" and ")) <= known


def cli_hints() -> dict[str, str]:
    from extras.options import ELSEWHERE
    return ELSEWHERE


# --- rightly used: what is written ---

def test_gif_ends_with_the_picture(tiny, tmp_path, capsys):  # noqa: F811
    """One frame a step; the last is the picture itself, to the GIF's 256 colors."""
    code, _, _ = run_cli(capsys, "a cat", "--steps", 5, "--n", 2, "--width", 16, "--height", 24,
                         "--ckpt", tiny, "--out", tmp_path / "p.png", "--gif", tmp_path / "f.gif")
    assert code == 0
    for seed in (0, 1):
        gif = Image.open(tmp_path / f"f-{seed}.gif")
        picture = Image.open(tmp_path / f"p-{seed}.png")
        assert gif.n_frames == 5 and gif.size == picture.size
        gif.seek(4)
        error = np.abs(np.asarray(gif.convert("RGB"), float) - np.asarray(picture)).mean()
        assert error < 6


def test_scale_enlarges_gifs_and_maps(tiny, tmp_path, capsys):  # noqa: F811
    code, _, _ = run_cli(capsys, "a cat", "--steps", 2, "--ckpt", tiny, "--out", tmp_path / "p.png",
                         "--gif", tmp_path / "f.gif", "--attn", tmp_path / "maps", "--scale", 3)
    assert code == 0 and Image.open(tmp_path / "p.png").size == (32, 32)
    assert Image.open(tmp_path / "f.gif").size == (96, 96)
    assert {Image.open(path).size for path in (tmp_path / "maps").iterdir()} == {(96, 96)}


def test_grid_holds_all_the_pictures(tiny, tmp_path, capsys):  # noqa: F811
    """Side by side, in rows, in their order; whatever the size of the batches."""
    code, _, out = run_cli(capsys, "a cat", "--steps", 2, "--ckpt", tiny, "--n", 3, "--batch-size",
                           2, "--out", tmp_path / "p.png", "--grid", tmp_path / "new" / "g.png")
    assert code == 0 and out.split("\n")[:4] == [
        *(str(tmp_path / f"p-{seed}.png") for seed in range(3)), str(tmp_path / "new" / "g.png")]
    grid = array(tmp_path / "new" / "g.png")
    assert grid.shape == (64, 64, 3) and (grid[32:, 32:] == 255).all()
    for seed, part in enumerate((grid[:32, :32], grid[:32, 32:], grid[32:, :32])):
        assert np.array_equal(part, array(tmp_path / f"p-{seed}.png"))


def test_a_missing_folder_is_made(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for path in "new/a.png", "other/new/a.png":
        assert run_cli(capsys, "a cat", "--steps", 1, "--ckpt", tiny, "--out", path)[0] == 0
        assert Path(path).exists()
    assert run_cli(capsys, "--ckpt", tiny, "--save", "models/new/m.safetensors")[0] == 0
    assert Path("models/new/m.safetensors").exists()


def test_many_prompts_are_the_pictures_of_each(tiny, tmp_path, capsys):  # noqa: F811
    """Line i (blank ones not counted) is drawn from seed + i.

    Whatever the batch, and whichever process of several draws it.
    """
    file = tmp_path / "p.txt"
    file.write_text("a cat\n\na (red:1.3) dog\n a cat \na moon\na very long hat\n")
    ask = ["--ckpt", tiny, "--steps", 2, "--seed", 5]
    assert run_cli(capsys, "--prompts", file, "--batch-size", 2, "--out", tmp_path / "all",
                   *ask)[0] == 0
    names = ["0000-a-cat.png", "0001-a-red-1-3-dog.png", "0002-a-cat.png", "0003-a-moon.png",
             "0004-a-very-long-hat.png"]
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == names
    for rank, expected in enumerate([names[:1], names[1:3], names[3:]]):
        folder = tmp_path / f"r{rank}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "3")
            patch.setenv("RANK", str(rank))
            assert run_cli(capsys, "--prompts", file, "--batch", 4, "--out", folder, *ask)[0] == 0
        assert sorted(p.name for p in folder.iterdir()) == expected
        for name in expected:
            assert np.abs(array(folder / name) - array(tmp_path / "all" / name)).max() <= 1
    assert run_cli(capsys, "a (red:1.3) dog", *ask[:-1], 6, "--out", tmp_path / "one.png")[0] == 0
    one, among = tmp_path / "one.png", tmp_path / "all/0001-a-red-1-3-dog.png"
    assert params(one) == params(among)
    assert np.abs(array(one) - array(among)).max() <= 1


def test_several_pictures_of_each_prompt(tiny, tmp_path, capsys):  # noqa: F811
    (tmp_path / "p.txt").write_text("a cat\na dog\n")
    assert run_cli(capsys, "--prompts", tmp_path / "p.txt", "--n", 2, "--seed", 5, "--steps", 1,
                   "--ckpt", tiny, "--out", tmp_path / "all")[0] == 0
    names = ["0000-a-cat-5.png", "0000-a-cat-6.png", "0001-a-dog-7.png", "0001-a-dog-8.png"]
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == names
    found = [read_params(tmp_path / "all" / name) for name in names]
    assert [(one["prompt"], one["seed"]) for one in found] \
        == [("a cat", 5), ("a cat", 6), ("a dog", 7), ("a dog", 8)]


def test_a_long_prompt_changes_no_other_picture(tiny, tmp_path, capsys):  # noqa: F811
    (tmp_path / "p.txt").write_text("a cat\n" + "dog " * 90 + "\na moon\na sun\n")
    ask = ["--ckpt", tiny, "--steps", 2, "--guidance", 4, "--batch-size"]
    for size in 1, 4:
        assert run_cli(capsys, "--prompts", tmp_path / "p.txt", *ask, size, "--out",
                       tmp_path / str(size))[0] == 0
    for one in (tmp_path / "1").iterdir():
        assert np.abs(array(one) - array(tmp_path / "4" / one.name)).max() <= 1


def test_what_comes_after_75_tokens_counts(tiny, tmp_path, capsys):  # noqa: F811
    for name, end in ("a", "spaceship moon"), ("b", "spaceship sun"):
        code, err, _ = run_cli(capsys, "cat " * 75 + end, "--guidance", 4, "--ckpt", tiny, "--out",
                               tmp_path / f"{name}.png")
        assert code == 0 and "cut" not in err
    assert np.abs(array(tmp_path / "a.png") - array(tmp_path / "b.png")).max() > 0


def test_empty_prompt_is_allowed(tiny, tmp_path, capsys):  # noqa: F811
    assert run_cli(capsys, "", "--ckpt", tiny, "--out", tmp_path / "o.png")[0] == 0
    assert (tmp_path / "o.png").exists()


# --- rightly used: pictures from pictures, speed, memory ---

def test_init_picture(tiny, tmp_path, capsys):  # noqa: F811
    """Any mode and size of picture is taken; strength 1 forgets it."""
    Image.new("LA", (50, 70), (10, 128)).save(tmp_path / "grey.png")
    Image.new("RGB", (50, 70), (250, 0, 0)).save(tmp_path / "red.jpg")
    out, pictures = tmp_path / "o.png", {}
    for name, strength in ("grey.png", 0.4), ("red.jpg", 0.4), ("grey.png", 1), ("red.jpg", 1):
        code, _, _ = run_cli(capsys, "", "--init", tmp_path / name, "--strength", strength,
                             "--ckpt", tiny, "--out", out)
        assert code == 0 and f", Denoising strength: {float(strength)}," in params(out)
        pictures[name, strength] = array(out)
    assert not np.array_equal(pictures["grey.png", 0.4], pictures["red.jpg", 0.4])
    assert np.array_equal(pictures["grey.png", 1], pictures["red.jpg", 1])
    assert run_cli(capsys, "", "--init", tmp_path / "red.jpg", "--ckpt", tiny, "--out",
                   out)[0] == 0
    assert ", Denoising strength: 0.75," in params(out)


def test_little_strength_keeps_the_picture(tmp_path, capsys):
    """One step of fifty, unguided, with the built-in model.

    A blue disc comes back within the VAE's precision; at strength 1 it is gone.
    """
    shape = Image.radial_gradient("L").resize((128, 128)).point(lambda v: 255 * (v < 90))
    blue, white = (Image.new("RGB", (128, 128), color) for color in ("blue", "white"))
    disc = Image.composite(blue, white, shape)
    disc.save(tmp_path / "disc.png")
    error = {}
    for strength in (0.02, 1):
        assert run_cli(capsys, "a red apple", "--init", tmp_path / "disc.png", "--steps", 50,
                       "--guidance", 1, "--strength", strength, "--out",
                       tmp_path / "o.png")[0] == 0
        error[strength] = np.square(array(tmp_path / "o.png") / 255 - np.asarray(disc) / 255).mean()
    assert error[0.02] < 0.01 and error[1] > 0.05, error


def test_lowmem_draws_the_same(tiny, tmp_path, capsys):  # noqa: F811
    """Two passes for one, and one tile for the whole: the same picture to the last rounding.

    In fp32: bf16, the default on some CPUs, rounds other products otherwise.
    """
    for name, more in {"plain": [], "lowmem": ["--lowmem"], "slow": ["--no-fast"]}.items():
        assert run_cli(capsys, "a cat", "--negative", "a dog", "--n", 2, "--ckpt", tiny, "--dtype",
                       "fp32", "--out", tmp_path / f"{name}.png", *more)[0] == 0
    for seed in (0, 1):
        plain = array(tmp_path / f"plain-{seed}.png")
        assert plain.std() > 1
        for name in "lowmem", "slow":
            assert np.abs(plain - array(tmp_path / f"{name}-{seed}.png")).max() <= 1


def test_options_reach_the_pipeline(tiny, tmp_path, capsys):  # noqa: F811
    """The UNet's blocks are computed as often, and for as many rows, as the options say."""
    def deep_rows(*words: object) -> list[int]:
        seen = []
        load = cli.load_model

        def watched(*args, **options):
            sd = load(*args, **options)
            sd.unet.middle_block[0].register_forward_hook(
                lambda module, inputs, out: seen.append(len(out)))
            return sd
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cli, "load_model", watched)
            assert run_cli(capsys, "a cat", "--steps", 6, "--ckpt", tiny, "--out",
                           tmp_path / "o.png", *words)[0] == 0
        return seen
    assert deep_rows() == [2] * 6 == deep_rows("--deepcache", 1)
    assert deep_rows("--n", 3) == [2] * 18
    assert deep_rows("--n", 3, "--batch-size", 2) == [4] * 6 + [2] * 6
    assert deep_rows("--batch", 3) == [6] * 6
    assert deep_rows("--cfg-end", 0.5) == [2] * 3 + [1] * 3
    assert len(deep_rows("--deepcache", 3)) == 2
    assert len(deep_rows("--deepcache", 3, "--lowmem")) == 4


def test_half_precision_file(tiny):  # noqa: F811
    """fp16 as on a GPU: UNet and text in fp16, VAE in fp32; nearly fp32's picture."""
    half, full = (StableDiffusion.load(tiny, "cpu", dtype)
                  for dtype in (torch.float16, torch.float32))
    networks = half.text_encoders[0], half.unet, half.vae
    assert [next(network.parameters()).dtype for network in networks] \
        == [torch.float16, torch.float16, torch.float32]
    for image in (None, Image.new("RGB", (32, 32), "red")):
        a, b = (np.asarray(cli.edit.draw(sd, "a cat", image)[0], float) for sd in (half, full))
        assert 0 < b.std() and np.abs(a - b).mean() < 1


def test_every_step_moves(tiny):  # noqa: F811
    """Also where a spacing ends at the sigma the sampler ends at."""
    sd = StableDiffusion.load(tiny)
    for name in SAMPLERS:
        for spacing in SPACINGS:
            seen = []
            sd.generate("a cat", steps=4, sampler=name, timestep_spacing=spacing,
                        callback=lambda step: seen.append(step.x))
            moves = [(a - b).abs().max() > 1e-4 for a, b in zip(seen, seen[1:])]
            assert len(seen) == 4 and all(moves), (name, spacing)


# --- rightly used: models ---

@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_official_file_loads_with_its_extras(tiny, tmp_path, suffix):  # noqa: F811
    """Schedule buffers, position_ids, EMA copies and training state are passed over.

    The tensors come out as they went in.
    """
    tensors = load_file(tiny)
    extras = {
        "cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "betas": torch.ones(1000), "sqrt_recipm1_alphas_cumprod": torch.ones(1000),
        "model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    path = tmp_path / f"full{suffix}"
    if suffix == ".safetensors":
        save_file(tensors | extras, path, config_of(tiny))
    else:
        # old files name this class of the training framework in a key
        module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
                patch.setitem(sys.modules, name, module)
            torch.save({"callbacks": {module.ModelCheckpoint: {"best": 0.5}},
                        "state_dict": tensors | extras, "global_step": 5}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)  # a .ckpt has no metadata: widths find its row
        loaded = StableDiffusion.load(path, "cpu", torch.float32).state_dict()
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_saved_file_round_trips(tiny, tmp_path):  # noqa: F811
    sd = StableDiffusion.load(tiny, "cpu", torch.float32)
    save(sd, tmp_path / "again.safetensors", torch.float32)
    again = StableDiffusion.load(tmp_path / "again.safetensors", "cpu", torch.float32)
    assert again.preset == sd.preset == TINY
    pairs = zip(sd.state_dict().values(), again.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_builtin_file():
    """At most 50 MB, the row's config, the captions it was trained on listed."""
    assert BUILTIN.stat().st_size <= 50e6
    sd = StableDiffusion.load()
    row = PRESETS["emoji"]
    assert sd.preset == replace(row, vae=replace(row.vae, scale_factor=sd.preset.vae.scale_factor))
    captions = json.loads(sd.metadata["captions"])
    assert len({caption.split(",")[0] for caption in captions}) >= 500
    assert "red apple, 3d" in captions
    encoder = sd.text_encoders[0]
    assert encoder.tokenizer("I love cats and dogs.").shape == (1, 77)
    context = sd.encode_prompt(["a cat", "a dog"])["context"]
    assert context.shape == (2, 77, encoder.config.hidden_size)


def test_captions_are_listed(tiny, capsys, tmp_path):  # noqa: F811
    code, err, out = run_cli(capsys, "--captions")
    names = out.splitlines()
    assert code == 0 and len(names) >= 500 and "red apple" in names and names == sorted(names)
    assert "3d, noto, twemoji" in err and err.count("\n") == 1
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors",
              {"captions": json.dumps(["a dog", "a cat, on a mat", "a dog"])})
    code, err, out = run_cli(capsys, "--captions", "--ckpt", tmp_path / "a.safetensors")
    assert (code, err, out) == (0, "", "a cat, on a mat\na dog\n")
    code, err, _ = run_cli(capsys, "--captions", "--ckpt", tiny)
    assert code == 2 and "does not say what it was trained on" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, said", [
    (["a cat", "--n", "0"], "--n must be at least 1"),
    (["--vae", "v.safetensors"], "--vae means nothing without --ckpt")])
def test_nothing_is_saved_before_all_options_are_checked(tmp_path, capsys, words, said):
    code, err, _ = run_cli(capsys, *words, "--save", tmp_path / "m.safetensors")
    assert code == 2 and said in err and not list(tmp_path.iterdir())


@pytest.mark.parametrize("prompt, unknown", [
    ("a red apple", []), ("three cats on a blue background", []), ("kitten", ["kitten"]),
    ("a photo of an astronaut riding a horse", ["astronaut", "riding"]), ("", []), ("42", []),
    ("(red:1.3) mitochondria of quasars", ["mitochondria", "quasars"])])
def test_a_prompt_far_from_the_captions(prompt, unknown):
    captions = json.loads(safe_open(BUILTIN, "pt").metadata()["captions"])
    assert cli.unknown_words(captions, {prompt}) == unknown


def test_a_prompt_far_from_the_captions_says_so(tmp_path, capsys):
    for prompt, said in ("a red apple", 0), ("some mitochondria, quasars", 1):
        code, err, _ = run_cli(capsys, prompt, "--steps", 1, "--out", tmp_path / "o.png")
        assert code == 0 and err.count("was not trained on") == said
        assert len(lines_of(err)) == 1 + said


def test_folders_of_train_py_are_models_and_loras(tiny, tmp_path, capsys):  # noqa: F811
    model, lora = tmp_path / "model", tmp_path / "lora"
    model.mkdir()
    lora.mkdir()
    (model / "model.safetensors").write_bytes(tiny.read_bytes())
    LoRA(StableDiffusion.load(tiny), 2).save(lora / "lora.safetensors")
    ask = "a cat", "--steps", 1, "--out", tmp_path / "o.png", "--ckpt"
    for more in [model], [model, "--lora", lora], [model, "--lora", f"{lora}:0.5"]:
        assert run_cli(capsys, *ask, *more)[0] == 0
    for words, said in ([lora], f"{lora} holds a LoRA and no model: give it as --lora {lora}"), \
            ([model, "--lora", model], f"{model} holds no LoRA"):
        code, err, _ = run_cli(capsys, *ask, *words)
        assert code == 2 and said in err and err.count("\n") == 1


# --- allowed, but hardly meant ---

@pytest.mark.parametrize("words, said", [
    (["--negative", "blue", "--guidance", 1], "the negative prompt does nothing at guidance 1"),
    (["--guidance", -1], "--guidance -1 leads away from the prompt"),
    (["--width", 64, "--height", 64], "the model was trained on 32x32"),
    (["--negative", "blue", "--guidance", 2, "--width", 40], None)])
def test_warnings(words, said, tiny, tmp_path, capsys):  # noqa: F811
    code, err, _ = run_cli(capsys, "a cat", "--steps", 1, *words, "--ckpt", tiny, "--out",
                           tmp_path / "o.png")
    assert code == 0 and len(lines_of(err)) == (said is not None) and (said or "") in err


# --- wrongly used: exit code 2, one clear line, nothing written ---

class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("ran.txt"),))


def bad_checkpoints(good: Path, folder: Path) -> dict[str, str]:
    """Writes files into `folder`. Returns {name: pattern of the answer}."""
    whole, tensors, config = good.read_bytes(), load_file(good), config_of(good)
    (folder / "truncated.safetensors").write_bytes(whole[:len(whole) // 2])
    (folder / "garbage.safetensors").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.safetensors").write_bytes(b"")
    (folder / "garbage.ckpt").write_bytes(bytes(range(256)) * 20)
    (folder / "empty.ckpt").write_bytes(b"")
    torch.save(tensors, folder / "whole.ckpt")
    (folder / "truncated.ckpt").write_bytes((folder / "whole.ckpt").read_bytes()[:100_000])
    (folder / "whole.ckpt").unlink()
    torch.save([1, 2], folder / "list.ckpt")
    torch.save({"state_dict": {"x": RunsCode()}}, folder / "code.ckpt")
    (folder / "oldcode.ckpt").write_bytes(pickle.dumps({"x": RunsCode()}))
    save_file({"encoder.weight": torch.zeros(2)}, folder / "other.safetensors")
    unet = "model.diffusion_model.input_blocks."
    save_file({unet + "0.0.weight": torch.zeros(320, 4, 3, 3),
               unet + "1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1152)},
              folder / "family.safetensors")
    first, *_, last = tensors
    rest = {name: tensor for name, tensor in tensors.items() if name not in (first, last)}
    save_file(rest, folder / "missing.safetensors", config)
    surplus = {f"extra.{i}": torch.zeros(1) for i in range(7)}
    save_file(tensors | surplus, folder / "surplus.safetensors", config)
    save_file(tensors | {first: torch.zeros(3, 5)}, folder / "shape.safetensors", config)
    ours = '{"unet": {"width": 3}, "vae": {}}'
    save_file(tensors, folder / "config.safetensors", {"config": ours})
    a, b = re.escape(first), re.escape(last)
    return {
        "none.safetensors": "no such file", "": "folder", "truncated.safetensors": "can be read",
        "garbage.safetensors": "can be read", "empty.safetensors": "is empty",
        "garbage.ckpt": "damaged", "empty.ckpt": "is empty", "truncated.ckpt": "damaged",
        "list.ckpt": "can be read", "code.ckpt": "could run code", "oldcode.ckpt": "damaged",
        "other.safetensors": "not a Stable Diffusion", "family.safetensors": "1152.*4 and 768",
        # of two networks one tensor is missing each; the first that is read is named
        "missing.safetensors": f"1 missing: ({a}|{b})",
        "shape.safetensors": r"\[3, 5\] instead of \[", "config.safetensors": "config"}


def test_bad_checkpoints(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    for name, pattern in bad_checkpoints(tiny, files).items():
        line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", files / name)
        assert re.search(pattern, line) and str(files) in line, (name, line)
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize("words, said", [
    (["--width", "100"], "multiple of 8"), (["--height", "0"], "multiple of 8"),
    (["--width", "-64"], "multiple of 8"), (["--steps", "0"], "between 1 and 1000"),
    (["--steps", "1001"], "between 1 and 1000"), (["--sampler", "magic"], "dpmpp_2m"),
    (["--spacing", "magic"], "karras"), (["--guidance", "nan"], "guidance"),
    (["--seed", "-2"], "seed"), (["--seed", str(2**63)], "seed"), (["--batch", "0"], "batch"),
    (["--n", "0"], "--n must be"), (["--batch-size", "0"], "--batch-size must be"),
    (["--strength", "0", "--init", SHEET], "strength"),
    (["--strength", "1.5", "--init", SHEET], "strength"), (["--strength", "0.5"], "without --init"),
    (["--gif", "f.png"], "must end in .gif"), (["--film", "f.png"], "must end in .gif"),
    (["--grid", "f.gif"], "must end in .png"), (["--scale", "2"], "without --gif or --attn"),
    (["--scale", "0"], "--scale must be"),
    (["--attn", "a", "--words", "dog"], "its words are a, cat"),
    (["--words", "cat"], "without --attn"), (["--attn", __file__], "cannot write into"),
    (["--init", "nowhere.png"], "nowhere.png"), (["--init", __file__], "cannot read"),
    (["--deep-every", "0"], "must be computed at every step (1)"),
    (["--cfg-end", "1.5"], "between 0 and 1"), (["--device", "toaster"], "toaster"),
    (["--image-guidance", "2", "--init", SHEET],
     "image guidance is for models that change pictures by instruction"),
    (["--negative", "\udcff"], "not valid UTF-8"),
    (["--mask", SHEET], "without --init")])
def test_bad_settings(tiny, tmp_path, capsys, monkeypatch, words, said):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    assert said in assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, *words)


@pytest.mark.parametrize("words, said", [
    (["--prompts", "missing.txt"], "cannot read the prompts in missing.txt"),
    (["--prompts", "EMPTY"], "is empty: write one prompt a line"),
    (["--prompts", "FULL", "--gif", "f.gif"], "--prompts does not go with --gif"),
    (["--prompts", "FULL", "--attn", "maps"], "--prompts does not go with --attn"),
    (["a cat", "--prompts", "FULL"], "--prompts does not go with prompt"),
    (["--params-from", "missing.png"], "no such file: missing.png"),
    (["--from", "PLAIN"], "holds no settings of a picture, as sd.py"),
    (["--from", "HUGE"], "holds no settings of a picture: DecompressionBombError"),
    (["a cat", "--lora", ""], "no such file: "),
    (["a cat", "--lora", "missing.safetensors:0.5"], "no such file: missing.safetensors"),
    (["a cat", "--embedding", "missing.safetensors"], "no such file: missing.safetensors"),
    (["a cat", "--batch", 0], "batch must be at least 1")])
def test_wrong_use_of_many_prompts_and_of_additions(
    words, said, tiny, tmp_path, capsys, monkeypatch  # noqa: F811
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "FULL").write_text("a cat\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "PLAIN", "PNG")
    Image.new("1", (20000, 20000)).save(tmp_path / "HUGE", "PNG")
    code, err, _ = run_cli(capsys, *words, "--ckpt", tiny)
    assert code == 2 and said in err and err.count("\n") == 1


def test_a_grid_of_several_processes(tiny, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setenv("WORLD_SIZE", "2")
    line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, "--grid", tmp_path / "g.png")
    assert "--grid does not go with torchrun" in line


def test_a_preset_is_of_a_file(tmp_path, capsys):
    assert "without --ckpt" in assert_refused(capsys, tmp_path / "o.png", "--preset", "sd1")


def test_strength_too_low_for_the_steps(tiny, tmp_path, capsys):  # noqa: F811
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    assert "0.1 of 3 steps" in assert_refused(capsys, tmp_path / "o.png", "--ckpt", tiny, "--init",
                                              tmp_path / "i.png", "--strength", "0.1")


@pytest.mark.parametrize("out", [
    "n" * 250 + ".png", "o.txt", "", "/proc/sys/o.png", "/proc/nowhere/o.png", f"{__file__}/o.png",
    "folder.png"])
def test_bad_output_paths(tiny, tmp_path, capsys, monkeypatch, out):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    line = assert_refused(capsys, out, "--ckpt", tiny)
    assert re.search("cannot write|must end in .png", line)


def test_nan_is_refused_and_never_drawn(tiny, tmp_path, capsys):  # noqa: F811
    tensors, config, path = load_file(tiny), config_of(tiny), tmp_path / "nan.safetensors"
    tensors[OUT][0] = torch.nan
    save_file(tensors, path, config)
    line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", path)
    assert f"NaN from the UNet: its weights hold NaN or infinity ({OUT})" in line
    assert "fp32" not in line.replace("torch.float32", "")  # it runs in fp32 already
    tensors[OUT][0] = 0
    tensors["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, path, config)
    line = assert_refused(capsys, tmp_path / "o.png", "--ckpt", path)
    assert "NaN from the VAE: its weights hold NaN or infinity" in line


@pytest.mark.parametrize("option", ["--ckpt", "--vae", "--unet", "--init", "--mask",
                                    "--prompts", "--attn"])
def test_an_empty_name_is_refused(option, tmp_path, capsys):
    line = assert_refused(capsys, tmp_path / "o.png", option, "")
    assert line == f"sd.py: {option} is empty: give a file or folder, or leave it out"
