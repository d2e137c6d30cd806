"""Many processes: they compute what one would, and survive being killed and stopped."""
import random
import signal
import time

import numpy as np
import pytest
import torch

from sd import StableDiffusion
from tests.test_kills import KILLS
from tests.training import (  # noqa: F401
    all_finished,
    five,
    grouped,
    metrics,
    ranks,
    shards,
    torchrun,
    trained,
)


def test_two_processes_equal_one_with_twice_the_batch(
        grouped, five, tmp_path, capsys):  # noqa: F811
    """And two passes of half the batch too.

    20 steps: losses, weights and averages, by DDP and FSDP. One process resumes the run of two.
    """
    common = ["--data", five, "--init", grouped, "--train", "unet", "--log-every", 1,
              "--sample-every", 0, "--device", "cpu", "--ema", 0.9, "--warmup", 5, "--lr", 1e-3]
    runs = {"one": (0, "--batch", 4), "passes": (0, "--batch", 2, "--accumulate", 2),
            "ddp": (2, "--batch", 2),
            "fsdp": (2, "--batch", 1, "--accumulate", 2, "--fsdp", "--checkpointing")}
    for name, (n, *more) in runs.items():
        args = [*common, *more, "--steps", 20, "--out", tmp_path / name]
        if n:
            log = tmp_path / f"{name}.log"
            all_finished(ranks(n, log, *args), log)
        else:
            trained(capsys, *args)
    losses = {name: np.array([line["loss"] for line in metrics(tmp_path / name)])
              for name in runs}
    states = {name: torch.load(tmp_path / name / "state.pt") for name in runs}
    for name in runs:
        assert len(losses[name]) == 20
        assert np.abs(losses[name] / losses["one"] - 1).max() < 1e-5, name
        for key in ("params", "ema"):
            both = zip(states[name][key], states["one"][key], strict=True)
            assert max(float((a - b).norm() / b.norm()) for a, b in both) < 1e-4, (name, key)
        moments = [state["optimizer"]["state"][0]["exp_avg"]
                   for state in (states[name], states["one"])]
        assert torch.allclose(*moments, rtol=1e-3, atol=1e-6)
        StableDiffusion.load(tmp_path / name / "model.safetensors")
    out = trained(capsys, *common, "--batch", 4, "--steps", 21, "--out", tmp_path / "fsdp")
    assert "steps 20 to 21" in out


@pytest.mark.parametrize("number", KILLS)
def test_killed_and_stopped_anywhere_it_resumes(number, grouped, shards, tmp_path):  # noqa: F811
    """Two processes on shards, with a worker each. torchrun hands on a SIGTERM.

    SIGKILL to all at a random step, later SIGTERM: the result is that of an uninterrupted run,
    bit for bit.
    """
    common = ["--data", shards, "--init", grouped, "--batch", 2, "--steps", 24, "--shuffle", 7,
              "--workers", 1, "--save-every", 3, "--log-every", 1, "--sample-every", 0,
              "--device", "cpu"]
    log = tmp_path / "log"
    all_finished(ranks(2, log, *common, "--out", tmp_path / "whole"), log)

    def wait_for(step, runs):
        def reached():
            path = tmp_path / "cut/metrics.jsonl"
            return path.exists() and metrics(tmp_path / "cut")[-1]["step"] >= step
        while runs() and not reached():
            time.sleep(0.05)

    processes = ranks(2, log, *common, "--out", tmp_path / "cut")
    wait_for(random.Random(number).randint(4, 10), processes[0].is_alive)
    assert all([process.is_alive() for process in processes]), log.read_text()
    for process in processes:
        process.kill()
    for process in processes:
        process.join()
    process = torchrun(2, *common, "--out", tmp_path / "cut")
    wait_for(13, lambda: process.poll() is None)
    assert process.poll() is None, process.communicate()[0]
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert "stopped and saved" in out, out
    StableDiffusion.load(tmp_path / "cut/model.safetensors").generate("7", steps=1)
    step = torch.load(tmp_path / "cut/state.pt")["step"]
    assert 13 <= step < 24
    log = tmp_path / "log-of-the-last"
    resumed = all_finished(ranks(2, log, *common, "--out", tmp_path / "cut"), log)
    assert f"steps {step} to 24" in resumed
    whole, cut = (torch.load(tmp_path / run / "state.pt") for run in ("whole", "cut"))
    for key in ("params", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole[key], cut[key], strict=True))
    assert whole["positions"] == cut["positions"] and whole["positions"][0][0]["count"] > 0
    losses = [[line["loss"] for line in metrics(tmp_path / run)] for run in ("whole", "cut")]
    assert losses[0] == losses[1]
    assert not list((tmp_path / "cut").glob("*.tmp"))
