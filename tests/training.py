"""What the tests of train.py share: tiny models, captioned pictures, runs in and out of process."""
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from PIL import Image

import train as train_module
from clip import CLIPTextConfig
from extras import cli
from extras.formats import save
from model import UNetConfig
from sd import Preset, StableDiffusion
from tests.forked import start_forked
from vae import VAEConfig

ROOT = Path(__file__).resolve().parents[1]
TINY = Preset(
    UNetConfig(model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1),
               num_heads=(2, 2), context_dim=32),
    VAEConfig(ch=32, ch_mult=(1, 1, 1, 1), num_res_blocks=1),
    (CLIPTextConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2),),
    size=32, steps=3)
SQUARE = [(16, 16)]
torch.set_num_threads(1)  # most networks here are so small that threads cost more than they bring


# --- models and pictures ---

@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A small random model as a file."""
    return save_random(TINY, tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="module")
def grouped(tmp_path_factory) -> Path:
    """A tiny model with four channels in a norm's group.

    With one, as in `tiny`, the gradient of a bias before a norm is only rounding, which Adam
    makes as large as any other.
    """
    preset = replace(TINY, unet=replace(TINY.unet, num_groups=8))
    return save_random(preset, tmp_path_factory.mktemp("grouped") / "grouped.safetensors")


def save_random(preset: Preset, path: Path) -> Path:
    torch.manual_seed(0)
    sd = StableDiffusion(preset)
    for network in sd.components.values():
        for p in network.parameters():
            if not p.any():  # what starts at zero would hide mistakes
                torch.nn.init.normal_(p, std=0.05)
    save(sd, path, torch.float32)
    return path


@pytest.fixture(scope="module")
def five(tmp_path_factory) -> Path:
    """Five captioned pictures: discs of five colors on a transparent background."""
    folder = tmp_path_factory.mktemp("five")
    shape = Image.radial_gradient("L").resize((80, 80)).point(lambda v: 255 * (v < 90))
    for name in ("red", "green", "blue", "yellow", "black"):
        disc = Image.composite(Image.new("RGBA", (80, 80), name), Image.new("RGBA", (80, 80)),
                               shape)
        disc.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} disc\na {name} disc\n")
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory) -> str:
    """16 shards of 10 samples. Their captions are their numbers, every fourth is wide."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(16):
        files = {}
        for number in range(10 * shard, 10 * shard + 10):
            size = (32, 16) if number % 4 == 0 else (16, 16)
            files[f"{number:05}.jpg"] = numbered_picture(number, size)
            files[f"{number:05}.txt"] = str(number).encode()
            files[f"{number:05}.json"] = b"{}"
        write_tar(folder / f"{shard:04}.tar", files)
    return f"{folder}/{{0000..0015}}.tar"


def numbered_picture(number: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture file of one color that encodes its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


# --- commands ---

@pytest.fixture(autouse=True)
def original_signals() -> Iterator[None]:
    """train() catches Ctrl-C and SIGTERM."""
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def command(main: Callable, capsys, *args: object) -> tuple[int, str, str]:
    """`python program.py args` in this process -> (exit code, stderr, stdout)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["program.py", *map(str, args)])
        patch.setattr(warnings, "showwarning", warnings.showwarning)  # the command sets its own
        try:
            code = main() or 0
        except SystemExit as stop:
            code = stop.code or 0
    out, err = capsys.readouterr()
    return code, err, out


def trained(capsys, *args: object) -> str:
    """Run train.py and return what it prints."""
    code, err, out = command(train_module.main, capsys, *args)
    assert code == 0, err
    return out


def draw(capsys, *args: object) -> int:
    """Run sd.py and return its exit code."""
    return command(cli.main, capsys, *args)[0]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def torchrun(n: int, *args: object) -> subprocess.Popen:
    """train.py in n processes (0: without torchrun)."""
    launcher = []
    if n:
        launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--master-port=0",
                    "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    return subprocess.Popen([sys.executable, *launcher, ROOT / "train.py", *map(str, args)],
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            start_new_session=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


def ranks(n: int, log: Path, *args: object) -> list[BaseProcess]:
    """train.py in n processes as torchrun starts them, without its seconds of imports."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    env = {"WORLD_SIZE": str(n), "LOCAL_WORLD_SIZE": str(n), "MASTER_ADDR": "localhost",
           "MASTER_PORT": str(port)}
    return [start_forked(ROOT / "train.py", *args, out=log, err=log, RANK=str(i),
                         LOCAL_RANK=str(i), **env)
            for i in range(n)]


def all_finished(processes: list[BaseProcess], log: Path) -> str:
    try:
        for process in processes:
            process.join(600)
            assert process.exitcode == 0, log.read_text()
    finally:
        for process in processes:   # if one failed, the others wait for it
            process.kill()
    return log.read_text()
