"""The training example: its parts against what must hold exactly, and a run of three steps."""
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
import train_controlnet
from controlnet import load, outlines
from train_controlnet import moved, overlap, train

from sd import BUILTIN, StableDiffusion

torch.set_num_threads(1)


def disc(x: int, color: str = "red", background: str = "white") -> Image.Image:
    image = Image.new("RGB", (64, 64), background)
    ImageDraw.Draw(image).ellipse((x - 8, 24, x + 8, 40), color)
    return image


def test_outlines_are_where_the_colour_changes():
    """A plain picture has none, at its border too; a disc has a ring. Transparency is white."""
    assert not np.any(outlines(Image.new("RGB", (64, 64), "navy")))
    ring = np.asarray(outlines(disc(32)))
    y, x = np.nonzero(ring)
    assert (
        set(np.unique(ring)) == {0, 255}
        and np.all(np.abs(np.hypot(x - 31.5, y - 31.5) - 8) < 2)
        and len(x) > 40
    )
    clear = np.array(disc(32).convert("RGBA"))
    clear[clear.min(-1) == 255] = 0
    assert np.array_equal(outlines(Image.fromarray(clear)), ring)
    assert np.any(outlines(disc(32, "yellow")))


def test_overlap_of_known_lines():
    ring = outlines(disc(32))
    assert (
        overlap(ring, ring) == 1
        and overlap(ring, outlines(disc(33))) == 1
        and overlap(ring, outlines(disc(10))) == 0
    )
    half = Image.fromarray(
        np.where(np.arange(64)[:, None] < 32, np.asarray(ring), 0).astype(np.uint8)
    )
    # all of the half is near the ring, about half of the ring is near the half
    assert 0.7 < overlap(ring, half) < 0.8
    assert overlap(ring, Image.new("L", (64, 64))) == 0


def test_moved_keeps_the_whole_thing_on_the_page():
    chance, places = random.Random(0), []
    for _ in range(50):
        dark = np.asarray(moved(Image.new("RGB", (64, 64), "red"), chance))[..., 1] < 128
        y, x = np.nonzero(dark)
        assert (
            dark.sum() == (np.ptp(x) + 1) * (np.ptp(y) + 1)
            and 36 <= np.ptp(x) + 1 == np.ptp(y) + 1 <= 64
        )
        places.append((x[0], y[0]))
    assert len(set(places)) > 40
    sides = [
        np.nonzero(np.asarray(moved(disc(16), chance))[..., 1] < 128)[1].mean() for _ in range(20)
    ]
    assert min(sides) < 24 and max(sides) > 40  # some are mirrored


def test_training_moves_the_copy_and_nothing_else():
    sd = StableDiffusion.load(BUILTIN, "cpu", torch.float32)
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    first, again = (
        train(sd, ["a red apple", "a cat"], steps=2, seed=3, batch=2).state_dict() for _ in range(2)
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.state_dict().items())
    assert not any(p.requires_grad for p in sd.unet.parameters())
    assert all(torch.equal(first[name], again[name]) for name in first)
    # All that starts at zero has changed. It takes two steps: the hint's last convolution has no
    # gradient before the others have moved.
    start_at_zero = ("zero_convs", "middle_block_out", "input_hint_block.14")
    for name, tensor in first.items():
        assert tensor.any() or not name.startswith(start_at_zero), name


def test_command_writes_a_controlnet_and_prints_how_well_it_is_followed(
    tmp_path, command, monkeypatch
):
    monkeypatch.setattr(train_controlnet, "KEPT_BACK", 2)
    out = tmp_path / "c.safetensors"
    code, _, out_text = command(train_controlnet, out, "--steps", 3, "--pictures", 3)
    assert code == 0 and "on 2 captions kept back" in out_text
    assert all(name.startswith("control_model.") for name in load_file(out))
    state = load(out, StableDiffusion.load(BUILTIN)).state_dict()
    assert any(tensor.any() for name, tensor in state.items() if name.startswith("zero_convs"))


@pytest.mark.parametrize(
    "args",
    [
        ("c.ckpt",),
        ("none/c.safetensors",),
        ("c.safetensors", "--steps", 0),
        ("c.safetensors", "--pictures", 0),
    ],
)
def test_wrong_use_ends_in_one_line(args, tmp_path, command):
    code, err, _ = command(train_controlnet, tmp_path / args[0], *args[1:])
    assert code == 2 and len(err.strip().splitlines()) == 1 and not list(tmp_path.iterdir())
