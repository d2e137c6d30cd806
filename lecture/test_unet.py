"""Chapter 2 against known sizes and closed forms."""
import math
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch
from PIL import ImageColor
from torch import nn

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import draw
import unet as chapter

from model import ResBlock, UNetConfig, timestep_embedding
from sd import PRESETS

torch.set_num_threads(1)
SCRIPT = Path(chapter.__file__)


@cache
def sd1() -> tuple[list[chapter.Layer], dict[str, int]]:
    return chapter.record(PRESETS["sd1"].unet, 64)


def total(layers: list[chapter.Layer], kind: str | None = None) -> tuple[int, int]:
    """How many, and their parameters."""
    chosen = [layer for layer in layers if kind in (None, layer.kind)]
    return len(chosen), sum(layer.params for layer in chosen)


def test_parameters_of_sd1():
    layers, _ = sd1()
    assert total(layers)[1] == 859_520_964
    assert total(layers, "ResBlock") == (22, 537_670_400) and total(
        layers, "SpatialTransformer"
    ) == (16, 267_239_360)
    assert total(layers, "Downsample")[0] == total(layers, "Upsample")[0] == 3


@pytest.mark.parametrize(
    "model, params, gflop",
    [("sd2", 865_910_724, None), ("sdxl", 2_567_463_684, 6761), ("sd1-inpaint", 859_535_364, None)],
)
def test_parameters_of_other_rows(model, params, gflop):
    layers, _ = chapter.record(PRESETS[model].unet, 128 if gflop else 8)
    assert total(layers)[1] == params
    assert gflop is None or round(sum(layer.flops for layer in layers) / 1e9) == gflop


def test_shapes_and_skips_of_sd1():
    layers, _ = sd1()
    blocks, skips = chapter.by_block(layers), chapter.skips(layers)
    assert Counter(channels for _, channels in skips.values()) == {320: 4, 640: 3, 1280: 5}
    assert skips == {
        f"output_blocks.{i}": (f"input_blocks.{11 - i}", channels)
        for i, channels in enumerate([1280] * 5 + [640] * 3 + [320] * 4)
    }
    assert [blocks[f"output_blocks.{i}"][0].shape_in[0] for i in range(12)] == [2560] * 5 + [
        1920
    ] * 2 + [1280] + [960] * 2 + [640] * 2
    assert [group[0].shape_out[1] for name, group in blocks.items() if "_block" in name] == [
        64
    ] * 3 + [32] * 3 + [16] * 3 + [8] * 7 + [16] * 3 + [32] * 3 + [64] * 3
    assert blocks["out"][0].shape_out == (4, 64, 64) and blocks["time_embed"][0].shape_out == (
        1280,
    )


def test_flops_of_sd1():
    """803 GFLOP in all; one ResBlock and one SpatialTransformer counted by hand."""
    layers, flops = sd1()
    assert round(sum(layer.flops for layer in layers) / 1e9) == 803
    assert flops["Global"] == sum(layer.flops for layer in layers)
    res, transformer = chapter.by_block(layers)["input_blocks.1"]
    n, c, tokens, d = 64 * 64, 320, 77, 768
    assert res.flops == 2 * (2 * n * 9 * c * c + 1280 * c)
    attn1 = 2 * (4 * n * c * c + 2 * n * n * c)
    attn2 = 2 * (2 * n * c * c + 2 * tokens * d * c + 2 * n * tokens * c)
    ff = 2 * (n * c * 8 * c + n * 4 * c * c)
    assert transformer.flops == 2 * 2 * n * c * c + attn1 + attn2 + ff
    name = "input_blocks.1.1.transformer_blocks.0."
    assert (flops[name + "attn1"], flops[name + "attn2"], flops[name + "ff"]) == (attn1, attn2, ff)


def test_time_embedding(capsys):
    chapter.time_picture(320)
    assert "cos(1) = 0.5403" in capsys.readouterr().out
    e = timestep_embedding(torch.tensor([1.0]), 320)[0]
    assert (
        abs(e[0] - math.cos(1)) < 1e-6
        and abs(e[160] - math.sin(1)) < 1e-6
        and abs(math.asin(e[319]) - 1.0593e-4) < 1e-8
    )


def test_time_acts_on_whole_channels():
    """A ResBlock adds W silu(emb) everywhere. After the next convolution positions differ."""
    torch.manual_seed(0)
    block = ResBlock(8, 16, UNetConfig(model_channels=8, num_groups=4))
    nn.init.normal_(
        block.out_layers[3].weight, std=0.1
    )  # it starts at zero, which hides the time
    x, embs = torch.randn(1, 8, 12, 10), (torch.randn(1, 32), torch.randn(1, 32))
    fed, out = chapter.modulation(block, x, embs)
    weight, bias = block.emb_layers[1].weight, block.emb_layers[1].bias
    values = [weight @ nn.functional.silu(emb[0]) + bias for emb in embs]
    assert torch.allclose(
        fed[1] - fed[0], (values[1] - values[0])[:, None, None].expand(16, 12, 10), atol=1e-5
    )
    assert (fed[1] - fed[0]).std((1, 2)).max() < 1e-5 and (out[1] - out[0]).std((1, 2)).min() > 0.01
    assert not block.out_layers._forward_hooks


def test_a_fresh_resblock_ignores_the_time():
    block = ResBlock(8, 8, UNetConfig(model_channels=8, num_groups=4))
    x = torch.randn(1, 8, 4, 4)
    _, out = chapter.modulation(block, x, (torch.randn(1, 32), torch.randn(1, 32)))
    assert torch.equal(out[0], out[1]) and torch.equal(out[0], x[0])


def test_script_runs(tmp_path):
    done = run_forked(SCRIPT, "--quick", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert (
        "859,520,964" in done.stdout
        and "12 skips, of 320 channels x4, 640 channels x3, 1280 channels x5" in done.stdout
    )
    assert {p.name for p in tmp_path.iterdir()} == {
        "unet.png",
        "unet_time.png",
        "unet_modulation.png",
    }


@pytest.mark.parametrize("model, size", [("emoji", 8), ("emoji", 1), ("sd1", 5)])
def test_picture_of_any_row_and_size(model, size):
    layers, _ = chapter.record(PRESETS[model].unet, size)
    page = chapter.picture(layers, "a title")
    assert 700 < page.width <= 900
    drawn = {color for _, color in page.getcolors(maxcolors=100000)}
    assert {ImageColor.getrgb(color) for color in chapter.COLORS.values()} <= drawn


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--model", "sd9"], "sd9: use sd1"),
        (["--size", "0"], "--size 0"),
        (["--size", "-8"], "--size -8"),
    ],
)
def test_wrong_use_gets_one_line(wrong, message, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["unet.py", "--out", str(tmp_path), *wrong])
    with pytest.raises(SystemExit) as left:
        draw.run(chapter.main, chapter.__doc__, model=dict(default="sd1"), size=dict(type=int))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and message in error
