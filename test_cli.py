"""The command sd.py as a user meets it: right use, wrong use."""
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import types
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd as sd_module
from clip import CLIPTextConfig
from heatmaps import words_of
from model import UNetConfig
from sd import BUILTIN, PRESETS, Preset, StableDiffusion
from vae import VAEConfig, decode_tiled

HERE = Path(__file__).parent
DOCS = str(HERE / "docs" / "emoji.png")
torch.set_num_threads(1)  # most networks here are so small that threads cost more than they bring
TINY = Preset(UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1), num_heads=(2, 2), context_dim=32),
              VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1), CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),
              size=32, steps=3)


@pytest.fixture(autouse=True)
def signals_as_they_were():
    """train() takes Ctrl-C and SIGTERM for itself."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A small random model as a file."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("tiny") / "tiny.safetensors"
    sd = StableDiffusion(TINY)
    for part in sd.parts.values():
        for p in part.parameters():
            if not p.any():  # what starts at zero would hide mistakes
                torch.nn.init.normal_(p, std=0.05)
    sd.save(path, torch.float32)
    return path


def command(module, capsys, *args):
    """`python module.py args` in this process -> (exit code, stderr, stdout)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__ + ".py", *map(str, args)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # sd.main() sets its own
        try:
            module.main()
            code = 0
        except SystemExit as stop:
            code = stop.code
    out, err = capsys.readouterr()
    return code, err, out


def refused(capsys, out, *args):
    """sd.py must end with exit code 2, one line, and no file at or beside `out`; returns the line."""
    before = set(Path(out).parent.glob("*")) if Path(out).parent.is_dir() else set()
    code, err, _ = command(sd_module, capsys, "a cat", "--out", out, *args)
    lines = [line for line in err.replace("\r", "\n").split("\n") if line.strip() and not re.search(r"\d+%\|", line)]  # but for a bar already begun
    assert code == 2 and len(lines) == 1, (code, lines)
    assert not Path(out).parent.is_dir() or set(Path(out).parent.glob("*")) == before
    return lines[0]


# --- sd.py, rightly used ---

def test_first_command_of_the_readme(tmp_path):
    """A new process, another folder, no network: the built-in model draws a red apple, mostly red where it is not white."""
    done = subprocess.run([sys.executable, HERE / "sd.py", "a red apple"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "built-in model" in done.stdout and "--ckpt" in done.stdout
    picture = np.asarray(Image.open(tmp_path / "a-red-apple.png")).astype(float)
    assert picture.shape == (64, 64, 3)
    drawn = picture[picture.min(-1) < 200].mean(0)
    assert drawn[0] > drawn[1] + 50 and drawn[0] > drawn[2] + 50


def test_threads_are_told_how_long_to_look_before_torch_comes():
    code = """if True:
        import os, sys
        class Look:
            def find_spec(self, name, *_):
                if name == "torch":
                    print(os.environ["GOMP_SPINCOUNT"], flush=True)
                    os._exit(0)
        sys.meta_path.insert(0, Look())
        import sd
    """
    for given, wanted in ({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"):
        env = {name: value for name, value in os.environ.items() if name != "GOMP_SPINCOUNT"} | given
        assert subprocess.run([sys.executable, "-c", code], cwd=HERE, env=env, capture_output=True, text=True).stdout.strip() == wanted


def test_png_holds_what_is_needed_to_make_it_again(tiny, tmp_path, capsys):
    code, _, _ = command(sd_module, capsys, "naïve 猫\nsecond line", "--negative", "grey", "--steps", 4, "--guidance", 0, "--seed", 7, "--width", 40,
                         "--sampler", "euler_a", "--spacing", "karras", "--batch", 2, "--ckpt", tiny, "--device", "cpu", "--out", tmp_path / "p.png")
    assert code == 0 and sorted(p.name for p in tmp_path.iterdir()) == ["p-7.png", "p-8.png"]
    picture = Image.open(tmp_path / "p-8.png")
    prompt, negative, rest = re.fullmatch(r"(?s)(.*)\nNegative prompt: (.*)\n(Steps: .*)", picture.text["parameters"]).groups()
    told = dict(pair.split(": ") for pair in rest.split(", "))
    width, height = map(int, told["Size"].split("x"))
    again = StableDiffusion.load(tiny, "cpu").generate(prompt, negative, width, height, int(told["Steps"]), float(told["CFG scale"]), told["Sampler"],
                                                int(told["Seed"]), spacing=told["Schedule type"])[0]
    assert (width, height) == (40, 32) and np.array_equal(np.asarray(again), np.asarray(picture))


def test_film_ends_with_the_picture(tiny, tmp_path, capsys):
    """One frame a step; the last is the picture itself, to the GIF's 256 colours."""
    code, _, _ = command(sd_module, capsys, "a cat", "--steps", 5, "--batch", 2, "--ckpt", tiny, "--out", tmp_path / "p.png", "--film", tmp_path / "f.gif")
    assert code == 0
    for seed in (0, 1):
        film, picture = Image.open(tmp_path / f"f-{seed}.gif"), Image.open(tmp_path / f"p-{seed}.png")
        assert film.n_frames == 5 and film.size == picture.size
        film.seek(4)
        assert np.abs(np.asarray(film.convert("RGB"), float) - np.asarray(picture)).mean() < 6


def test_watching_changes_no_picture_and_maps_sum_to_one(tiny, tmp_path, capsys):
    for name, more in {"plain": [], "watched": ["--attn", tmp_path / "maps", "--words", "cat,Hat"]}.items():
        assert command(sd_module, capsys, "a cat, a hat", "--width", 72, "--dtype", "fp32", "--ckpt", tiny, "--out", tmp_path / f"{name}.png", *more)[0] == 0
    assert np.abs(np.asarray(Image.open(tmp_path / "plain.png"), float) - np.asarray(Image.open(tmp_path / "watched.png"))).max() <= 1
    assert sorted(p.name for p in (tmp_path / "maps").iterdir()) == ["watched-2-cat.png", "watched-5-hat.png"]
    sd, maps = StableDiffusion.load(tiny), sd_module.HeatMaps()
    with sd_module.watching(sd.unet, maps.watch):
        sd.generate("a cat, a hat", batch=2, width=72, callback=maps.step)
    assert maps.mean().shape == (2, 77, 4, 9) and len(maps.layers) == 4
    for layer in [*maps.layers.values(), maps.mean()]:
        assert torch.allclose(layer.sum(1), torch.ones(2, 4, 9), atol=1e-5)
    assert all(layer.watch is None for layer in sd.unet.modules() if hasattr(layer, "watch"))


def test_words_and_their_places():
    """A word of several pieces has several places; the same word (id 2368: cat) is found where it stands, not where its letters do."""
    tokenizer = sd_module.Tokenizer()
    words = words_of(tokenizer, "A  floofycat, cat!!")
    ids = tokenizer("A  floofycat, cat!!")[0].tolist()
    assert [word for word, _ in words] == ["a", "floofycat", ",", "cat", "!!"]
    assert words[3][1] == [76 - ids[::-1].index(2368)] and len(words[1][1]) > 1 and sum((places for _, places in words), []) == list(range(1, ids.index(49407)))


def test_lowmem_draws_the_same(tiny, tmp_path, capsys):
    """Two passes for one, and one tile for the whole: the same picture to the last rounding."""
    for name, more in {"plain": [], "lowmem": ["--lowmem"]}.items():
        assert command(sd_module, capsys, "a cat", "--negative", "a dog", "--batch", 2, "--ckpt", tiny, "--out", tmp_path / f"{name}.png", *more)[0] == 0
    for seed in (0, 1):
        plain, lowmem = (np.asarray(Image.open(tmp_path / f"{name}-{seed}.png"), float) for name in ("plain", "lowmem"))
        assert np.abs(plain - lowmem).max() <= 1 and plain.std() > 1


def test_lowmem_takes_its_networks_off_the_device(tiny, monkeypatch):
    """On the meta device, which computes nothing and holds nothing: each network is there only while it works."""
    sd, seen = StableDiffusion.load(tiny, lowmem=True), []
    sd.device = torch.device("meta")
    for part in sd.parts.values():
        monkeypatch.setattr(part, "to", lambda device, part=part: seen.append((part, str(device))))
    with sd.at_work(sd.unet), pytest.raises(RuntimeError):
        assert seen == [(sd.unet, "meta")]
        raise RuntimeError
    assert seen == [(sd.unet, "meta"), (sd.unet, "cpu")]


def test_tiles_leave_no_seams():
    """The built-in VAE, a 512x512 page of its pictures: tiles of a quarter of it, against the whole. `pytest -s` shows the dB."""
    sd = StableDiffusion.load(dtype=torch.float32)
    with torch.no_grad():
        z = sd.encode_image([Image.open(DOCS).convert("RGB").crop((0, 0, 512, 512))])
        whole, tiled = sd.vae.decode(z).clamp(-1, 1), decode_tiled(sd.vae, z, tile=40, overlap=16).clamp(-1, 1)
    error = (tiled - whole) / 2
    across = error.diff(dim=-1).abs().mean((0, 1, 2))  # at each column: how much the error changes from this pixel to the next
    seams = across[[191, 192, 319, 320]]               # the second tile begins at 192, the first ends at 320
    print(f"tiles of 320x320 against the whole: {-10 * error.square().mean().log10():.1f} dB; change of the error at seams {seams.max():.1e}, on average {across.mean():.1e}")
    assert error.square().mean() < 1e-4                # 40 dB
    assert seams.max() < 1 / 255 and seams.max() < 2 * across.mean()


def test_keeping_keys_and_values_changes_nothing(tiny, monkeypatch):
    sd = StableDiffusion.load(tiny, "cpu")
    kept = np.asarray(sd.generate("a cat", batch=2)[0])
    computed = []
    to_k = next(layer for name, layer in sd.unet.named_modules() if name.endswith("attn2.to_k"))
    to_k.register_forward_hook(lambda *_: computed.append(1))
    sd.generate("a cat")
    assert len(computed) == 1  # for three steps
    monkeypatch.setattr(sd_module, "words_kept", lambda unet: sd_module.nullcontext())
    assert np.array_equal(np.asarray(sd.generate("a cat", batch=2)[0]), kept) and len(computed) == 1 + 3


def test_deep_blocks_at_every_nth_step(tiny, tmp_path, capsys):
    """At every step: nothing changes; with guidance for a share of the steps, or in two passes, the blocks are computed when they must be."""
    sd, computed = StableDiffusion.load(tiny, "cpu"), []
    sd.unet.middle_block[0].register_forward_hook(lambda *_: computed.append(1))

    def draw(**options):
        computed.clear()
        return np.asarray(sd.generate("a cat", steps=6, **options)[0]), len(computed)
    picture, calls = draw()
    assert np.array_equal(draw(deep_every=1)[0], picture) and calls == 6
    other, calls = draw(deep_every=3)
    assert not np.array_equal(other, picture) and calls == 2
    assert draw(deep_every=3, guided_share=0.5)[1] == 2  # one for each batch
    sd.lowmem = True
    two_passes, calls = draw(deep_every=3)
    assert calls == 4 and np.abs(two_passes.astype(int) - other).max() <= 1
    assert draw(deep_every=3, guided_share=0.5)[1] == 3
    code, err, _ = command(sd_module, capsys, "a cat", "--deep-every", 0, "--ckpt", tiny, "--out", tmp_path / "o.png")
    assert code == 2 and "must be computed at every step (1)" in err and not (tmp_path / "o.png").exists()


def test_init_picture(tiny, tmp_path, capsys):
    """Any mode and size of picture is taken; strength 1 forgets it."""
    Image.new("LA", (50, 70), (10, 128)).save(tmp_path / "grey.png")
    Image.new("RGB", (50, 70), (250, 0, 0)).save(tmp_path / "red.jpg")
    pictures = {}
    for name, strength in (("grey.png", 0.4), ("red.jpg", 0.4), ("grey.png", 1), ("red.jpg", 1)):
        code, _, _ = command(sd_module, capsys, "", "--init", tmp_path / name, "--strength", strength, "--ckpt", tiny, "--out", tmp_path / "o.png")
        assert code == 0 and f", Denoising strength: {float(strength)}," in Image.open(tmp_path / "o.png").text["parameters"]
        pictures[name, strength] = np.asarray(Image.open(tmp_path / "o.png"))
    assert not np.array_equal(pictures["grey.png", 0.4], pictures["red.jpg", 0.4])
    assert np.array_equal(pictures["grey.png", 1], pictures["red.jpg", 1])
    assert command(sd_module, capsys, "", "--init", tmp_path / "red.jpg", "--ckpt", tiny, "--out", tmp_path / "o.png")[0] == 0
    assert ", Denoising strength: 0.75," in Image.open(tmp_path / "o.png").text["parameters"]


def test_little_strength_keeps_the_picture(tmp_path, capsys):
    """One step of fifty, unguided, with the built-in model: a blue disc comes back within the VAE's precision; at strength 1 it is gone."""
    disc = Image.composite(Image.new("RGB", (64, 64), "blue"), Image.new("RGB", (64, 64), "white"), Image.radial_gradient("L").resize((64, 64)).point(lambda v: 255 * (v < 90)))
    disc.save(tmp_path / "disc.png")
    error = {}
    for strength in (0.02, 1):
        assert command(sd_module, capsys, "a red apple", "--init", tmp_path / "disc.png", "--steps", 50, "--guidance", 1, "--strength", strength, "--out", tmp_path / "o.png")[0] == 0
        error[strength] = np.square(np.asarray(Image.open(tmp_path / "o.png")) / 255 - np.asarray(disc) / 255).mean()
    assert error[0.02] < 0.01 and error[1] > 0.05, error


def test_half_precision_file(tiny):
    """fp16 as on a GPU: UNet and text in fp16, VAE in fp32; the picture is nearly that of fp32."""
    half, full = (StableDiffusion.load(tiny, "cpu", dtype) for dtype in (torch.float16, torch.float32))
    assert [next(part.parameters()).dtype for part in (half.text, half.unet, half.vae)] == [torch.float16, torch.float16, torch.float32]
    for init in (None, Image.new("RGB", (32, 32), "red")):
        a, b = (np.asarray(sd.generate("a cat", init=init)[0], dtype=float) for sd in (half, full))
        assert 0 < b.std() and np.abs(a - b).mean() < 1


def test_every_step_moves(tiny):
    """Also where a spacing ends at the sigma the sampler ends at."""
    sd = StableDiffusion.load(tiny)
    for name in sd_module.SAMPLERS:
        for spacing in sd_module.SPACINGS:
            seen = []
            sd.generate("a cat", steps=4, sampler=name, spacing=spacing, callback=lambda step: seen.append(step.x))
            assert len(seen) == 4 and all((a - b).abs().max() > 1e-4 for a, b in zip(seen, seen[1:])), (name, spacing)


def test_empty_prompt_is_allowed(tiny, tmp_path, capsys):
    assert command(sd_module, capsys, "", "--ckpt", tiny, "--out", tmp_path / "o.png")[0] == 0
    assert (tmp_path / "o.png").exists()


def test_what_comes_after_75_tokens_counts(tiny, tmp_path, capsys):
    for name, end in ("a", "spaceship moon"), ("b", "spaceship sun"):
        code, err, _ = command(sd_module, capsys, "cat " * 75 + end, "--guidance", 4, "--ckpt", tiny, "--out", tmp_path / f"{name}.png")
        assert code == 0 and "cut" not in err
    a, b = (np.asarray(Image.open(tmp_path / f"{name}.png"), float) for name in "ab")
    assert np.abs(a - b).max() > 0


def test_many_prompts_are_the_pictures_of_each(tiny, tmp_path, capsys):
    """Line i (blank ones not counted) is drawn from seed + i, whatever the batch, and whichever process of several draws it."""
    (tmp_path / "p.txt").write_text("a cat\n\na (red:1.3) dog\n a cat \na moon\na very long hat\n")
    ask = ["--ckpt", tiny, "--steps", 2, "--seed", 5]
    assert command(sd_module, capsys, "--prompts", tmp_path / "p.txt", "--batch", 2, "--out", tmp_path / "all", *ask)[0] == 0
    names = ["0000-a-cat.png", "0001-a-red-1-3-dog.png", "0002-a-cat.png", "0003-a-moon.png", "0004-a-very-long-hat.png"]
    assert sorted(p.name for p in (tmp_path / "all").iterdir()) == names
    for rank, expected in enumerate([names[:1], names[1:3], names[3:]]):
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("WORLD_SIZE", "3"), patch.setenv("RANK", str(rank))
            assert command(sd_module, capsys, "--prompts", tmp_path / "p.txt", "--batch", 4, "--out", tmp_path / f"r{rank}", *ask)[0] == 0
        assert sorted(p.name for p in (tmp_path / f"r{rank}").iterdir()) == expected
        for name in expected:
            assert np.abs(np.asarray(Image.open(tmp_path / f"r{rank}" / name), float) - np.asarray(Image.open(tmp_path / "all" / name))).max() <= 1
    assert command(sd_module, capsys, "a (red:1.3) dog", *ask[:-1], 6, "--out", tmp_path / "one.png")[0] == 0
    one, among = (Image.open(tmp_path / name) for name in ("one.png", "all/0001-a-red-1-3-dog.png"))
    assert one.text["parameters"] == among.text["parameters"]
    assert np.abs(np.asarray(one, float) - np.asarray(among)).max() <= 1


def test_a_long_prompt_changes_no_other_picture(tiny, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\n" + "dog " * 90 + "\na moon\na sun\n")
    ask = ["--ckpt", tiny, "--steps", 2, "--guidance", 4, "--batch"]
    for batch in 1, 4:
        assert command(sd_module, capsys, "--prompts", tmp_path / "p.txt", *ask, batch, "--out", tmp_path / str(batch))[0] == 0
    for one in (tmp_path / "1").iterdir():
        assert np.abs(np.asarray(Image.open(one), float) - np.asarray(Image.open(tmp_path / "4" / one.name))).max() <= 1


@pytest.mark.parametrize("more, said", [
    (["--prompts", "missing.txt"], "cannot read the prompts in missing.txt"),
    (["--prompts", "EMPTY"], "is empty: write one prompt a line"),
    (["--prompts", "FULL", "--film", "f.gif"], "--prompts does not go with film"),
    (["a cat", "--prompts", "FULL"], "--prompts does not go with prompt"),
    (["--from", "missing.png"], "no such file: missing.png"),
    (["--from", "PLAIN"], "holds no settings of a picture, as sd.py"),
    (["--from", "HUGE"], "holds no settings of a picture: DecompressionBombError"),
    (["a cat", "--lora", ""], "no such file: "),
    (["a cat", "--lora", "missing.safetensors:0.5"], "no such file: missing.safetensors"),
    (["a cat", "--embedding", "missing.safetensors"], "no such file: missing.safetensors"),
    (["a cat", "--batch", 0], "batch must be at least 1"),
])
def test_wrong_use_of_many_prompts_and_of_additions(more, said, tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "EMPTY").write_text("\n \n")
    (tmp_path / "FULL").write_text("a cat\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "PLAIN", "PNG")
    Image.new("1", (20000, 20000)).save(tmp_path / "HUGE", "PNG")
    code, err, _ = command(sd_module, capsys, *more, "--ckpt", tiny)
    assert code == 2 and said in err and err.count("\n") == 1


def test_negative_prompt_that_does_nothing_is_told(tiny, tmp_path, capsys):
    for guidance, told in (1, True), (2, False):
        _, err, _ = command(sd_module, capsys, "a cat", "--negative", "blue", "--guidance", guidance, "--ckpt", tiny, "--out", tmp_path / "o.png")
        assert ("the negative prompt does nothing at guidance 1" in err) == told


def test_image_guidance_elsewhere_is_told(tiny, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    code, err, _ = command(sd_module, capsys, "a cat", "--init", tmp_path / "i.png", "--image-guidance", 2, "--ckpt", tiny, "--out", tmp_path / "o.png")
    assert code == 2 and "image guidance is for models that change pictures by instruction" in err


def test_picture_is_drawn_again_from_itself(tiny, tmp_path, capsys):
    """All that is stored comes back, commas, quotes and newlines too; what is given beside --from overrules it."""
    from lora import LoRA
    beside = LoRA(StableDiffusion.load(tiny), 2, text=True)
    for pair in beside.layers.values():
        torch.nn.init.normal_(pair["lora_up"].weight)
    beside.save(tmp_path / "a, b: c.safetensors")
    save_file({"<zz>": torch.randn(2, 32)}, tmp_path / "w.safetensors")
    Image.new("RGB", (40, 32), "red").save(tmp_path / "i, 1.png")
    Image.new("L", (40, 32), 255).save(tmp_path / "m.png")
    first = ["naïve <zz>, a \"(cat:1.2)\"\nNegative prompts: none", "--negative", "grey, \nblue: 1", "--steps", 3, "--guidance", 2.5, "--seed", 7, "--width", 40,
             "--sampler", "euler_a", "--spacing", "karras", "--ckpt", tiny, "--lora", f"{tmp_path / 'a, b: c.safetensors'}:0.5", "--lora",
             f"{tmp_path / 'a, b: c.safetensors'}:-0.2", "--embedding", tmp_path / "w.safetensors", "--init", tmp_path / "i, 1.png", "--strength", 0.9,
             "--mask", tmp_path / "m.png", "--guided-share", 0.5, "--deep-every", 2]
    assert command(sd_module, capsys, *first, "--out", tmp_path / "1.png")[0] == 0
    assert command(sd_module, capsys, "--from", tmp_path / "1.png", "--out", tmp_path / "2.png")[0] == 0
    assert command(sd_module, capsys, "--from", tmp_path / "1.png", "--seed", 8, "--out", tmp_path / "3.png")[0] == 0
    one, two, three = (Image.open(tmp_path / f"{i}.png") for i in (1, 2, 3))
    assert one.text == two.text and np.array_equal(np.asarray(one), np.asarray(two))
    assert three.text["parameters"] == one.text["parameters"].replace("Seed: 7", "Seed: 8") and not np.array_equal(np.asarray(one), np.asarray(three))


@pytest.mark.parametrize("written, read", [
    ("Sampler: Euler a", {"sampler": "euler_a"}), ("Sampler: DPM++ 2M, Schedule type: Karras", {"sampler": "dpmpp_2m", "spacing": "karras"}),
    ("Sampler: DPM++ 2M Karras", {"sampler": "dpmpp_2m", "spacing": "karras"}), ("Sampler: Euler, Schedule type: Automatic", {"sampler": "euler"})])
def test_settings_as_other_tools_write_them_are_read(written, read, tmp_path):
    """The strength is that of a second pass, there being no --init."""
    info = PngImagePlugin.PngInfo()
    info.add_text("parameters", "a cat, (red:1.2)\nNegative prompt: ugly\nSteps: 20, " + written + ", CFG scale: 7, Seed: 42, Size: 512x768, Denoising strength: 0.5, Hires upscale: 2, Model hash: 6ce, "
                                "Model: v1-5-pruned, Hashes: {\"model\": \"6ce0\"}, Version: v1.9.4")
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=info)
    assert sd_module.stored_settings(tmp_path / "x.png") == {
        "prompt": "a cat, (red:1.2)", "negative": "ugly", "width": 512, "height": 768, "steps": 20, "guidance": 7.0, "seed": 42} | read


@pytest.mark.parametrize("prompt, negative", [("", ""), ("", "blue"), ("  a cat", ""), ("Negative prompt: none", ""), ("a\n\n", "\n")])
def test_odd_prompts_come_back(prompt, negative, tmp_path):
    options = {option: None for option, _ in sd_module.STORED.values()} | dict(prompt=prompt, negative=negative, width=8, height=16, steps=3, seed=2)
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=sd_module.text_chunk(sd_module.parameters(options)))
    assert sd_module.stored_settings(tmp_path / "x.png") == dict(prompt=prompt, negative=negative, width=8, height=16, steps=3, seed=2)


def test_a_picture_without_prompt_as_a1111_writes_it(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png", pnginfo=sd_module.text_chunk("Negative prompt: ugly\nSteps: 20, Size: 8x8"))
    assert sd_module.stored_settings(tmp_path / "x.png") == dict(prompt="", negative="ugly", width=8, height=8, steps=20)


def test_what_stands_beside_from_overrules_lists_and_the_prompt(tiny, tmp_path, capsys):
    """Else a LoRA given anew would be added to the stored one, and --prompts would not go with the stored prompt."""
    from lora import LoRA
    LoRA(StableDiffusion.load(tiny), 2).save(tmp_path / "a.safetensors")
    assert command(sd_module, capsys, "a cat", "--steps", 2, "--ckpt", tiny, "--lora", tmp_path / "a.safetensors", "--out", tmp_path / "1.png")[0] == 0
    (tmp_path / "p.txt").write_text("a dog")
    again = "--from", tmp_path / "1.png", "--lora", f"{tmp_path / 'a.safetensors'}:0.3", "--prompts", tmp_path / "p.txt", "--out", tmp_path / "many"
    assert command(sd_module, capsys, *again)[0] == 0
    told = sd_module.stored_settings(tmp_path / "many" / "0000-a-dog.png")
    assert (told["lora"], told["prompt"], told["steps"]) == ([f"{tmp_path / 'a.safetensors'}:0.3"], "a dog", 2)


@pytest.mark.parametrize("suffix", [".safetensors", ".ckpt"])
def test_official_file_loads_with_its_extras(tiny, tmp_path, suffix):
    """Schedule buffers, position_ids, EMA copies and training state are passed over; the tensors come out as they went in."""
    tensors = load_file(tiny)
    extras = {"cond_stage_model.transformer.text_model.embeddings.position_ids": torch.arange(77)[None], "betas": torch.ones(1000),
              "sqrt_recipm1_alphas_cumprod": torch.ones(1000), "model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2bias": torch.ones(4)}
    path = tmp_path / f"full{suffix}"
    config = {"config": safe_open(tiny, "pt").metadata()["config"]}
    if suffix == ".safetensors":
        save_file(tensors | extras, path, config)
    else:
        # old files name this class of the training framework in a key
        module = types.ModuleType("pytorch_lightning.callbacks.model_checkpoint")
        module.ModelCheckpoint = type("ModelCheckpoint", (), {"__module__": module.__name__})
        with pytest.MonkeyPatch.context() as patch:
            for name in ("pytorch_lightning", "pytorch_lightning.callbacks", module.__name__):
                patch.setitem(sys.modules, name, module)
            torch.save({"callbacks": {module.ModelCheckpoint: {"best": 0.5}}, "state_dict": tensors | extras, "global_step": 5}, path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)  # a .ckpt has no metadata: its row is found by its widths
        loaded = StableDiffusion.load(path, "cpu", torch.float32).state_dict()
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)


def test_saved_file_round_trips(tiny, tmp_path):
    sd = StableDiffusion.load(tiny, "cpu", torch.float32)
    sd.save(tmp_path / "again.safetensors", torch.float32)
    again = StableDiffusion.load(tmp_path / "again.safetensors", "cpu", torch.float32)
    assert again.config == sd.config == TINY
    assert all(torch.equal(a, b) for a, b in zip(sd.state_dict().values(), again.state_dict().values(), strict=True))


def test_builtin_file():
    """At most 50 MB, the row's config (with the scale measured in training), the captions it was trained on listed."""
    assert BUILTIN.stat().st_size <= 50e6
    sd = StableDiffusion.load()
    row = PRESETS["emoji"]
    assert sd.config == replace(row, vae=replace(row.vae, scale_factor=sd.config.vae.scale_factor))
    captions = json.loads(sd.metadata["captions"])
    assert len({caption.split(",")[0] for caption in captions}) >= 500 and "red apple, 3d" in captions
    assert sd.tokenizer("I love cats and dogs.").shape == (1, 77)
    assert sd.encode_prompt(["a cat", "a dog"]).shape == (2, 77, sd.config.text.hidden_size)


# --- sd.py, wrongly used: exit code 2, one clear line, nothing written ---

class RunsCode:
    def __reduce__(self):
        return (Path.touch, (Path("ran.txt"),))


def bad_checkpoints(tiny, folder):
    """name -> words the answer must hold; the files are made in `folder`."""
    good, tensors = tiny.read_bytes(), load_file(tiny)
    config = {"config": safe_open(tiny, "pt").metadata()["config"]}
    (folder / "truncated.safetensors").write_bytes(good[: len(good) // 2])
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
    unet = "model.diffusion_model."
    save_file({unet + "input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3), unet + "input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": torch.zeros(320, 1152)},
              folder / "family.safetensors")
    first, *_, last = tensors
    save_file({k: v for k, v in tensors.items() if k not in (first, last)}, folder / "missing.safetensors", config)
    save_file(tensors | {f"extra.{i}": torch.zeros(1) for i in range(7)}, folder / "surplus.safetensors", config)
    save_file(tensors | {first: torch.zeros(3, 5)}, folder / "shape.safetensors", config)
    save_file(tensors, folder / "config.safetensors", {"config": '{"unet": {"width": 3}}'})
    return {
        "none.safetensors": "no such file", "": "folder", "truncated.safetensors": "can be read", "garbage.safetensors": "can be read",
        "empty.safetensors": "can be read", "garbage.ckpt": "damaged", "empty.ckpt": "damaged", "truncated.ckpt": "damaged", "list.ckpt": "can be read",
        "code.ckpt": "could run code", "oldcode.ckpt": "damaged", "other.safetensors": "not a Stable Diffusion", "family.safetensors": "1152.*4 and 768",
        "missing.safetensors": f"2 missing: {re.escape(first)}, {re.escape(last)}|2 missing: {re.escape(last)}, {re.escape(first)}",
        "surplus.safetensors": r"7 surplus: extra.0, extra.1, extra.2, extra.3, extra.4, \.\.\.", "shape.safetensors": r"\[3, 5\] instead of \[", "config.safetensors": "config",
    }


def test_bad_checkpoints(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = tmp_path / "files"
    files.mkdir()
    for name, words in bad_checkpoints(tiny, files).items():
        line = refused(capsys, tmp_path / "o.png", "--ckpt", files / name)
        assert re.search(words, line) and str(files) in line, (name, line)
    assert not (tmp_path / "ran.txt").exists()


@pytest.mark.parametrize("args, words", [
    (["--width", "100"], "multiples of 8"), (["--height", "0"], "multiples of 8"), (["--width", "-64"], "multiples of 8"),
    (["--steps", "0"], "between 1 and 1000"), (["--steps", "1001"], "between 1 and 1000"), (["--sampler", "magic"], "dpmpp_2m"),
    (["--spacing", "magic"], "karras"), (["--guidance", "nan"], "guidance"), (["--seed", "-1"], "seed"), (["--batch", "0"], "batch"),
    (["--strength", "0", "--init", DOCS], "strength"), (["--strength", "1.5", "--init", DOCS], "strength"), (["--strength", "0.5"], "without --init"),
    (["--film", "f.png"], "must end in .gif"), (["--attn", "a", "--words", "dog"], "its words are a, cat"), (["--words", "cat"], "without --attn"),
    (["--attn", __file__], "cannot write into"),
    (["--init", "nowhere.png"], "nowhere.png"), (["--init", __file__], "cannot read"), (["--device", "toaster"], "toaster"),
])
def test_bad_settings(tiny, tmp_path, capsys, args, words):
    assert words in refused(capsys, tmp_path / "o.png", "--ckpt", tiny, *args)


def test_a_prompt_without_quotes(monkeypatch, capsys):
    for words, said in (["a", "red", "apple"], 'in quotes: "a red apple"'), (["a cat", "--stepps", "3"], "unrecognized arguments: --stepps 3"):
        monkeypatch.setattr(sys, "argv", ["sd.py", *words])
        with pytest.raises(SystemExit) as end:
            sd_module.main()
        assert end.value.code == 2 and said in capsys.readouterr().err


def test_a_preset_is_of_a_file(tmp_path, capsys):
    assert "without --ckpt" in refused(capsys, tmp_path / "o.png", "--preset", "sd1")


def test_strength_too_low_for_the_steps(tiny, tmp_path, capsys):
    Image.new("RGB", (32, 32)).save(tmp_path / "i.png")
    assert "0.1 of 3 steps" in refused(capsys, tmp_path / "o.png", "--ckpt", tiny, "--init", tmp_path / "i.png", "--strength", "0.1")


@pytest.mark.parametrize("out", ["n" * 250 + ".png", "nowhere/o.png", "o.txt", "", "/proc/sys/o.png", f"{__file__}/o.png"])
def test_bad_output_paths(tiny, tmp_path, capsys, monkeypatch, out):
    monkeypatch.chdir(tmp_path)
    assert re.search("cannot write|must end in .png", refused(capsys, out, "--ckpt", tiny))


def test_nan_is_told_and_never_drawn(tiny, tmp_path, capsys):
    tensors = load_file(tiny)
    tensors["model.diffusion_model.out.2.bias"][0] = torch.nan
    path = tmp_path / "nan.safetensors"
    save_file(tensors, path, {"config": safe_open(tiny, "pt").metadata()["config"]})
    assert "NaN at step 1, try --dtype fp32" in refused(capsys, tmp_path / "o.png", "--ckpt", path)
    tensors["model.diffusion_model.out.2.bias"][0] = 0
    tensors["first_stage_model.decoder.conv_out.bias"][0] = torch.nan
    save_file(tensors, path, {"config": safe_open(tiny, "pt").metadata()["config"]})
    assert "NaN in the decoded picture" in refused(capsys, tmp_path / "o.png", "--ckpt", path)


def test_bench_ends_when_one_of_its_processes_does():
    """And does not wait for it for ever: such as where diffusers is not installed."""
    code = "import sys, bench; from functools import partial; bench.in_processes(1, this=partial(sys.exit, 3))"
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "EOFError" in done.stderr
