"""SIGKILL at any moment: nothing half-written stays, and training goes on bit for bit.

KILLS=30 does each of them so often; so often too for two processes, in test_distributed.py.
"""
import os
import random
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from tests.forked import start_forked
from tests.training import (  # noqa: F401
    ROOT,
    five,
    grouped,
    metrics,
    shards,
)

KILLS = range(int(os.environ.get("KILLS", 1)))


@pytest.fixture
def start(tmp_path) -> Callable[..., BaseProcess]:
    """`python program.py words` in a process of its own."""
    def start(program: str, *words: object) -> BaseProcess:
        return start_forked(ROOT / program, *words, out=tmp_path / "log", err=tmp_path / "log")
    return start


def finished(process: BaseProcess, log: Path) -> None:
    process.join(300)
    process.kill()
    process.join()
    assert process.exitcode == 0, log.read_text()


@pytest.mark.parametrize("number", KILLS)
@pytest.mark.parametrize("kind", ["folder", "shards"])
def test_killed_training_goes_on(
        kind, number, grouped, five, shards, start, tmp_path):  # noqa: F811
    """Killed twice after it made a step, also while it writes: it saves at every second step."""
    data = five if kind == "folder" else shards
    words = ["train.py", "--data", data, "--init", grouped, "--train", "unet", "--batch", 2,
             "--steps", 20, "--save-every", 2, "--log-every", 1, "--sample-every", 0,
             "--shuffle", 7, "--workers", 0, "--device", "cpu", "--out"]
    words = words if kind == "shards" else [word for word in words if word not in ("--shuffle", 7)]
    finished(start(*words, tmp_path / "whole"), tmp_path / "log")
    cut, rng = tmp_path / "cut", random.Random(f"{kind} {number}")
    for kill in range(2):
        path, process = cut / "metrics.jsonl", start(*words, cut)
        before = path.stat().st_size if path.exists() else 0
        while process.is_alive() and (not path.exists() or path.stat().st_size == before):
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.join()
        assert process.exitcode in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
    finished(start(*words, cut), tmp_path / "log")
    whole, resumed = (torch.load(path / "state.pt") for path in (tmp_path / "whole", cut))
    for key in ("params", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole[key], resumed[key], strict=True))
    losses = [[line["loss"] for line in metrics(path)] for path in (tmp_path / "whole", cut)]
    assert losses[0] == losses[1]
    assert sorted(path.name for path in cut.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir())


@pytest.mark.parametrize("number", KILLS)
def test_killed_saving_leaves_no_half_file(number, start, tmp_path):
    """The next one saves, and removes what the killed one left."""
    folder = tmp_path / "out"
    folder.mkdir()
    words = ["sd.py", "--save", folder / "a.safetensors", "--device", "cpu"]
    process = start(*words)
    while process.is_alive() and not list(folder.iterdir()):
        time.sleep(0.001)
    time.sleep(random.Random(number).uniform(0, 0.1))
    process.kill()
    process.join()
    assert process.exitcode in (-signal.SIGKILL, 0), (tmp_path / "log").read_text()
    if (folder / "a.safetensors").exists():     # it was complete already
        with safe_open(folder / "a.safetensors", "pt") as file:
            assert len(file.keys()) > 500
    finished(start(*words), tmp_path / "log")
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    with safe_open(folder / "a.safetensors", "pt") as file:
        assert len(file.keys()) > 500
