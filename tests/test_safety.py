"""What a stranger's file must not do: fill the memory, leave its folder, write to the terminal.

And what happens to the outside must not lose a picture: closed and full streams, long names.
"""
import codecs
import json
import os
import pickle
import subprocess
import sys
import time
import zipfile
from collections import Counter, OrderedDict
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from extras.captions import list_folder
from extras.cli import captions_of, main
from extras.diffusers_folder import open_weights
from extras.files import open_tensors, read_json, save_tensors
from extras.formats import our_config
from extras.prediction import read_yaml
from extras.terminal import printable
from sd import PRESETS, UserError, preset_to_dict
from tests.command import ROOT, run_cli
from tests.common import SMALL

DEVICES = Path("/dev/zero").exists() and hasattr(os, "mkfifo")


def refused(action, *words: str) -> str:
    with pytest.raises(UserError) as caught:
        action()
    text = str(caught.value)
    assert "\n" not in text and all(word in text for word in words), text
    return text


# --- memory and time ---

class Zeros:
    def __reduce__(self):
        return bytearray, (10**11,)


def shared_dicts() -> dict:
    inner = {"x": torch.ones(1)}
    for _ in range(30):
        inner = dict.fromkeys("abcdefgh", inner)
    return inner


def endless() -> dict:
    state = {"x": torch.ones(1)}
    state["model"] = state
    return state


BOMBS = {
    "stride 0": lambda: {"x": torch.ones(1).expand(10**9, 2)},
    "overlapping strides": lambda: {"x": torch.ones(100).as_strided((90, 90, 90), (0, 1, 0))},
    "shared dicts": shared_dicts,
    "a dict in itself": endless,
    "meta": lambda: {"x": torch.ones(10**9, 10**3, device="meta")},
    "sparse": lambda: {"x": torch.sparse_coo_tensor([[0]], [1.0], (10**12,),
                                                    check_invariants=True)},
    "half a character": lambda: {"\ud800": torch.ones(1)},
}


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("name", BOMBS)
def test_small_pickles_that_stand_for_much(tmp_path, name, zipped):
    path = tmp_path / "a.pt"
    torch.save(BOMBS[name](), path, _use_new_zipfile_serialization=zipped)
    refused(lambda: open_tensors(path), str(path))


def test_zeros_made_by_a_pickle(tmp_path):
    path = tmp_path / "a.pt"
    torch.save({"x": Zeros()}, path)
    refused(lambda: open_tensors(path))
    path.write_bytes(pickle.dumps(Zeros(), 2))
    refused(lambda: open_tensors(path))


def nested_tuples(depth: int) -> bytes:
    """Instructions that make ((..., ...), (..., ...)), with 2^depth ends."""
    inner: tuple = ("x",)
    for _ in range(depth):
        inner = inner, inner
    return pickle.dumps(inner, 2)[2:-1]


class Hex:
    """It doubles when it is read, and so does each around it."""

    def __init__(self, inner: object):
        self.inner = inner

    def __reduce__(self):
        return codecs.encode, (self.inner, "hex")


def grown(times: int) -> object:
    text: object = b"x"
    for _ in range(times):
        text = Hex(text)
    return text


PRIME = 2**61 - 1       # whole numbers have their remainder by it as hash
SLOW = {  # pickles
    "a key of nested tuples": b"\x80\x02}" + nested_tuples(200) + b"K\x01s.",
    "many such keys": (b"\x80\x02}" + nested_tuples(21) + b"q\xffNs"
                       + 100 * b"}h\xffNs" + b"0" * 100 + b"."),
    "text that grows": pickle.dumps(grown(40), 2),
    "keys with one hash": pickle.dumps({k * PRIME: 1 for k in range(1, 3000)}, 2),
    "instructions": b"\x80\x02}" + 2_500_000 * b"q\x00" + b".",
}


@pytest.mark.parametrize("name", SLOW)
def test_pickles_that_take_long_to_read(tmp_path, name):
    paths = [tmp_path / name for name in ("old.pt", "new.pt", "capitals.pt")]
    paths[0].write_bytes(SLOW[name])
    for path, entry in zip(paths[1:], ("data.pkl", "data.PKL")):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr(f"archive/{entry}", SLOW[name])
            archive.writestr("archive/version", "3\n")
    start = time.perf_counter()
    for path in paths:
        refused(lambda: open_tensors(path), str(path), "very long to read")
    assert time.perf_counter() - start < 60


def test_an_archive_in_an_archive(tmp_path):
    """Python finds the directory that lies last, PyTorch the one whose place is written down."""
    path, others = tmp_path / "a.pt", []
    for name in "first", "last":
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps({name: 1}, 2))
        others.append((tmp_path / name).read_bytes())
    path.write_bytes(others[0][:-22] + others[1][:-22] + others[0][-22:])
    refused(lambda: open_tensors(path), "more than one")


@pytest.mark.parametrize("zipped", [True, False])
def test_what_training_programs_write_is_still_read(tmp_path, zipped):
    betas = (0.9, 0.999)
    state = {
        "state_dict": {f"layer{i}.weight": torch.ones(2) for i in range(1000)},
        "optimizer_states": [{"state": {i: {"step": torch.tensor(1.0), "exp_avg": torch.ones(2)}
                                        for i in range(1000)},
                              "param_groups": [{"betas": betas, "params": list(range(1000))}] * 9
                              }],
        "seen": Counter(range(1000)), "set": {1, 2}, "bytes": bytes(1000), "large": 2**70,
        "losses": [0.5] * 300_000, "size": torch.Size([1, 2]), "loops": OrderedDict(a=betas)}
    torch.save(state, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    assert len(open_tensors(tmp_path / "a.pt")[0]) == 1000


@pytest.mark.parametrize("zipped", [True, False])
def test_a_tensor_that_the_file_does_not_hold(tmp_path, zipped):
    class Large:
        def __reduce__(self):
            return torch.FloatTensor, (10**9,)
    torch.save({"x": Large()}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    refused(lambda: open_tensors(tmp_path / "a.pt"), "a.pt")


def test_zip_bomb(tmp_path):
    path, bomb = tmp_path / "a.pt", tmp_path / "bomb.ckpt"
    torch.save({"x": torch.zeros(1000, 1000)}, path)
    with (zipfile.ZipFile(path) as archive,
          zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as packed):
        for entry in archive.infolist():
            packed.writestr(entry.filename, archive.read(entry))
    assert bomb.stat().st_size < 20_000
    refused(lambda: open_tensors(bomb), "compressed archive")


def test_ties_and_views_are_still_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    torch.save({"a": whole, "b": whole, "c": whole[1:], "d": whole.T}, tmp_path / "a.pt")
    tensors, _ = open_tensors(tmp_path / "a.pt")
    assert torch.equal(tensors["d"].read(), whole.T) and torch.equal(tensors["c"].read(), whole[1:])


WRONG = [  # part of a config, field, its value; the message names the field
    ("unet", "num_res_blocks", 10**12),
    ("unet", "num_res_blocks", "2"),
    ("unet", "num_res_blocks", True),
    ("unet", "channel_mult", [1] * 500),
    ("unet", "channel_mult", []),
    ("unet", "num_heads", [3, 4]),
    ("unet", "transformer_depth", [250, 250]),
    ("unet", "kind", "Popen"),
    ("unet", "kind", ["UNetConfig"]),
    ("unet", "more", 1),
    ("unet", "context_dim", 64),
    ("vae", "num_groups", 0),
    ("vae", "scale_factor", float("nan")),
    ("vae", "scale_factor", None),
    (None, "size", 10**9),
    (None, "sampler", "x"),
    (None, "sampler", ["euler"]),
    (None, "steps", 10**400),
    (None, "beta_start", "0.1"),
    (None, "unet", []),
    (None, "text_encoders", {}),
    (None, "text_encoders", [1]),
]


@pytest.mark.parametrize("part, field, value", WRONG)
def test_wrong_configs_are_named(part, field, value):
    stored = json.loads(json.dumps(preset_to_dict(SMALL)))
    (stored if part is None else stored[part])[field] = value
    text = json.dumps(stored)
    refused(lambda: our_config(Path("a.safetensors"), {"config": text}), "a.safetensors", field)


@pytest.mark.parametrize("name", PRESETS)
def test_every_known_model_passes(name):
    text = json.dumps(preset_to_dict(PRESETS[name]))
    assert our_config(Path("a"), {"config": text}) == PRESETS[name]


def test_captions_in_metadata_must_be_texts():
    for text in "{", "1", "[1]", '"a"', "[" * 100_000:
        refused(lambda: captions_of(Path("a.safetensors"), {"captions": text}), "captions")


# --- paths ---

@pytest.mark.parametrize("name", ["../a.safetensors", "/etc/passwd", "x/a.safetensors", "..", "",
                                  "a\0.safetensors", 7, None, ["a"]])
def test_shards_lie_beside_their_index(tmp_path, name):
    index = tmp_path / "unet" / "model.safetensors.index.json"
    index.parent.mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "a.safetensors")
    index.write_text(json.dumps({"weight_map": {"x": name}}))
    refused(lambda: open_weights(index), "weight_map")


@pytest.mark.skipif(not DEVICES, reason="no devices and pipes here")
def test_links_to_devices_and_pipes_are_not_read(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for i, target in enumerate([Path("/dev/zero"), pipe]):
        for name in "a.json", "a.safetensors", "a.yaml", "a.txt", "a.png", "metadata.jsonl":
            (tmp_path / f"{i}").mkdir(exist_ok=True)
            (tmp_path / f"{i}" / name).symlink_to(target)
        refused(lambda: read_json(tmp_path / f"{i}" / "a.json"))
        refused(lambda: open_tensors(tmp_path / f"{i}" / "a.safetensors"))
        assert read_yaml(tmp_path / f"{i}" / "a.ckpt") == {}
        assert list_folder(tmp_path / f"{i}") == []


# --- terminal and new files ---

def test_terminal_commands_are_shown_escaped(tmp_path, capsys):
    assert printable("a\x1b[2J\r\x9b\u202e\ud800\té🍎") == "a\\x1b[2J\\r\\x9b\\u202e\\ud800\té🍎"
    path = tmp_path / "a.safetensors"
    save_file({"\x1b[2Jx": torch.ones(1)}, path, {"captions": json.dumps(["a\x1b[2J, flat"])})
    code, err, out = run_cli(capsys, "--ckpt", path, "--captions")
    assert code == 0 and "\x1b" not in out + err and "\\x1b[2J" in out
    code, err, out = run_cli(capsys, "a", "--ckpt", path)
    assert code == 2 and "\x1b" not in out + err and "\\x1b[2J" in err


@pytest.mark.skipif(os.name != "posix", reason="no umask here")
def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        save_tensors({"x": torch.ones(1)}, tmp_path / "a.safetensors", torch.float32, {})
    finally:
        os.umask(before)
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o640
    assert [file.name for file in tmp_path.iterdir()] == ["a.safetensors"]


# --- streams and names ---

SHELL = ["2>&1 | head -c 1 >&2", ">/dev/full 2>/dev/full", ">&- 2>&-"]  # behind the command


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
@pytest.mark.parametrize("rest", SHELL)
def test_pictures_are_drawn_though_nobody_listens(tmp_path, rest):
    out = tmp_path / "a.png"
    command = f'"{sys.executable}" sd.py "a red apple" --steps 1 --out "{out}" {rest}'
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert out.exists() and "Traceback" not in done.stderr + done.stdout
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize("option", ["--ckpt", "--lora", "--embedding", "--init", "--prompts",
                                    "--params-from", "--lora-dir", "--out", "--save", "--vae"])
def test_names_of_300_characters(tmp_path, capsys, option):
    value = str(tmp_path / ("x" * 300 + ".safetensors"))
    words = ["a <lora:x:1>", "--steps", "1", "--out", tmp_path / "a.png", option, value]
    if option == "--vae":
        words += ["--ckpt", ROOT / "weights" / "emoji.safetensors"]
    code, err, _ = run_cli(capsys, *words)
    assert code == 2 and "Traceback" not in err


def test_half_a_character_and_odd_ranks(tmp_path, capsys, monkeypatch):
    assert main(["a \ud800", "--out", str(tmp_path / "a.png")]) == 2
    monkeypatch.setenv("RANK", "x")
    assert main(["a", "--out", str(tmp_path / "a.png")]) == 2
    assert "RANK" in capsys.readouterr().err


def test_other_presets_of_forks_pass():
    """The bounds are far from what is built."""
    wide = replace(PRESETS["sdxl"], unet=replace(PRESETS["sdxl"].unet, model_channels=640))
    text = json.dumps(preset_to_dict(wide))
    assert our_config(Path("a"), {"config": text}).unet == wide.unet
