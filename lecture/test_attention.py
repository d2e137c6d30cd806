"""Chapter 4 against closed forms, and its maps against the network they come from."""
import math
import re
import sys
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
import torch
from PIL import Image

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import attention as chapter

from clip import Tokenizer
from model import CrossAttention, UNetConfig, attention_probs
from sd import StableDiffusion, UserError

torch.set_num_threads(1)
torch.manual_seed(0)


@pytest.fixture(scope="module")
def sd():
    return StableDiffusion.load(dtype=torch.float32)


@pytest.fixture(scope="module")
def seen(sd):
    return chapter.look(sd, "a red apple", steps=2, seed=1)


# --- the mechanism ---


def test_a_strong_query_returns_the_row_exactly():
    values = torch.randn(5, 7)
    keys = torch.linalg.qr(torch.randn(6, 6)).Q[:5]
    for entry in range(5):
        value, a = chapter.look_up(keys, values, entry, strength=1000.0)
        assert torch.equal(value, values[entry]) and torch.equal(a, torch.eye(5)[entry])


def test_the_slides_mix():
    values = torch.randn(3, 4)
    value, a = chapter.look_up(torch.eye(3), values, 0, math.log(8))
    torch.testing.assert_close(a, torch.tensor([0.8, 0.1, 0.1]))
    torch.testing.assert_close(value, 0.8 * values[0] + 0.1 * values[1] + 0.1 * values[2])
    torch.testing.assert_close(chapter.look_up(torch.eye(3), values, 0, 0.0)[0], values.mean(0))


@pytest.mark.parametrize("d, factor", [(40, 0.1581), (80, 0.1118), (160, 0.0791)])
def test_the_scale_is_one_over_the_root_of_the_head_size(d, factor, capsys):
    """The query e_0 against keys 0 and (1 / factor) e_0: scores 0 and 1, weights 1 to e."""
    q, k = torch.zeros(1, 1, 1, d), torch.zeros(1, 1, 2, d)
    q[..., 0], k[..., 1, 0] = 1, 1 / factor
    a = attention_probs(q, k)
    assert abs(float(a[0, 0, 0, 1]) - 1 / (1 + math.exp(-1))) < 2e-4
    chapter.scale(draws=50)
    line = next(line for line in capsys.readouterr().out.splitlines() if f"d {d:3}," in line)
    assert f"= {factor}" in line
    assert abs(float(re.search(r"spread +([\d.]+)", line)[1]) / d**0.5 - 1) < 0.1


@pytest.mark.parametrize("context_dim", [None, 24])
def test_einsum_equals_the_fused_kernel(context_dim):
    layer = CrossAttention(32, context_dim or 32, 4, UNetConfig())
    x = torch.randn(2, 9, 32)
    context = None if context_dim is None else torch.randn(2, 5, context_dim)
    with torch.no_grad():
        slow, a = chapter.by_einsum(layer, x, context)
        torch.testing.assert_close(layer(x, context), slow, rtol=1e-5, atol=1e-6)
    assert a.shape == (2, 4, 9, 9 if context is None else 5)
    torch.testing.assert_close(a.sum(-1), torch.ones(a.shape[:3]))


def test_einsum_by_loops():
    """One number of the output, from sums written out."""
    layer = CrossAttention(6, 4, 2, UNetConfig()).double()
    x, context = torch.randn(1, 3, 6).double(), torch.randn(1, 5, 4).double()
    with torch.no_grad():
        out, a = chapter.by_einsum(layer, x, context)
        q, k, v = (
            layer.to_q.weight @ x[0, 1],
            layer.to_k.weight @ context[0].T,
            layer.to_v.weight @ context[0].T,
        )  # (6,), (6, 5), (6, 5)
        h = []
        for head in range(2):
            rows = range(3 * head, 3 * head + 3)
            e = [
                math.exp(sum(float(q[i] * k[i, s]) for i in rows) / math.sqrt(3)) for s in range(5)
            ]
            assert np.allclose(a[0, head, 1], [w / sum(e) for w in e])
            h += [sum(e[s] / sum(e) * float(v[i, s]) for s in range(5)) for i in rows]
        torch.testing.assert_close(out[0, 1], layer.to_out(torch.tensor(h).double()))


def test_self_attention_is_cross_attention_to_itself():
    layer, x = CrossAttention(32, 32, 4, UNetConfig()), torch.randn(2, 9, 32)
    assert torch.equal(layer(x), layer(x, context=x))
    assert not torch.equal(layer(x), layer(x, context=x.flip(2)))


# --- the maps ---


def test_maps_sum_to_one_over_the_tokens(seen):
    _, maps, matrices = seen
    for one in (maps.mean(), *maps.layers.values()):
        assert one.shape[:2] == (1, 77)
        torch.testing.assert_close(one.sum(1), torch.ones_like(one[:, 0]))
    assert matrices.keys() == maps.layers.keys()
    for a in matrices.values():
        torch.testing.assert_close(a.sum(1), torch.ones(len(a)))


def test_capture_changes_nothing_and_leaves_nothing(sd, seen):
    plain = sd.generate("a red apple", steps=2, seed=1)[0]
    assert (
        np.abs(np.asarray(seen[0], dtype=int) - np.asarray(plain, dtype=int)).max() <= 1
    )  # the open path rounds otherwise
    before = {name: a.clone() for name, a in seen[2].items()}
    sd.generate("a rocket", steps=1)
    assert all(torch.equal(a, before[name]) for name, a in seen[2].items())


def test_the_matrix_is_the_prompts_and_not_the_negatives(sd, seen):
    """Guidance 1 computes the prompt alone. From the same noise its matrix is the same."""
    both, alone = (
        chapter.look(sd, "a red apple", steps=1, seed=1, guidance=guidance)[2]
        for guidance in (3.0, 1.0)
    )
    for name in both:
        torch.testing.assert_close(both[name], alone[name], rtol=1e-3, atol=1e-5)


def test_columns(sd):
    assert chapter.columns(sd, "a red apple") == {
        "a": [1],
        "red": [2],
        "apple": [3],
        "<start>": [0],
        "<end>": [4],
        "<padding>": list(range(5, 77)),
    }
    assert list(chapter.columns(sd, "a Red apple!", ["RED"])) == [
        "red",
        "<start>",
        "<end>",
        "<padding>",
    ]
    assert chapter.columns(sd, "a cat and a dog")["a"] == [1, 4]
    pieces = len(Tokenizer().tokenize("antidisestablishmentarianism"))
    assert pieces > 1 and chapter.columns(sd, "antidisestablishmentarianism")[
        "antidisestablishmentarianism"
    ] == list(range(1, pieces + 1))
    assert "<padding>" not in chapter.columns(sd, "dog " * 75) and chapter.columns(sd, "dog " * 75)[
        "<end>"
    ] == [76]


def test_drawn_positions_and_the_attention_on_them(capsys):
    image = Image.new("RGB", (64, 64), "white")
    image.paste("blue", (16, 32, 48, 48))
    drawn = chapter.drawn_positions(image, 8, 8)
    assert drawn.nonzero().tolist() == [[y, x] for y in (4, 5) for x in range(2, 6)]
    mean = torch.full((77, 8, 8), 0.1)
    mean[3][drawn] = 0.25
    matrices, places = {"middle_block.1": torch.zeros(16, 77)}, {"apple": [3], "pear": [2]}
    chapter.print_shares(image, mean, matrices, places)
    apple, pear = (
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith(("  apple", "  pear"))
    )
    assert apple.endswith("2.50") and "10.0% ... 25.0%" in apple
    assert pear.endswith("1.00")


def test_the_matrix_is_drawn_where_it_says():
    a = torch.zeros(16, 77)
    a[3, 70] = 1
    page = np.asarray(chapter.matrix_picture(a, ["start", "cat", "end"])).astype(int)
    bright = np.argwhere((abs(page - [255, 245, 190]).sum(-1) == 0))
    left, top, cell = 30, 62, 11
    assert (
        bright.min(0).tolist() == [top + 3 * cell, left + 70 * cell] and len(bright) == cell * cell
    )


def test_one_text_for_both_inputs_draws_it(sd, capsys):
    if sd.preset.unet.adm_in_channels is None:
        pytest.skip("this model has no pooled vector")
    chapter.pooled(sd, "a rocket", "a rocket", seed=0, steps=1)
    assert capsys.readouterr().out.count(": 0 gray levels") == 2


# --- the script ---


def test_unknown_word(sd):
    with pytest.raises(
        UserError, match="'banana' is not in the prompt: its words are a, red, apple"
    ):
        chapter.columns(sd, "a red apple", ["red", "banana"])


@pytest.mark.parametrize("prompt", ["", "!?"])
def test_no_words(sd, prompt):
    with pytest.raises(UserError, match="no words"):
        chapter.columns(sd, prompt)


def script(*args: str) -> CompletedProcess:
    return run_forked(Path(__file__).with_name("attention.py"), *args)


def test_script(tmp_path):
    done = script("--quick", "--out", str(tmp_path), "--prompt", "a red apple", "--word", "apple")
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert Image.open(tmp_path / "attention.png").width <= 900
    assert (
        "equals layer(x, context=x): True" in done.stdout
        and re.search(r"^  apple +\d", done.stdout, re.M)
        and not re.search(r"^  red ", done.stdout, re.M)
    )


@pytest.mark.parametrize(
    "args, said",
    [
        (("--word", "banana"), "'banana' is not in the prompt"),
        (("--ckpt", "no.safetensors"), "no such file"),
    ],
)
def test_wrong_use_gets_one_line(tmp_path, args, said):
    done = script("--quick", "--out", str(tmp_path), *args)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        len(done.stderr.splitlines()) == 1
        and done.stderr.startswith("attention.py: ")
        and said in done.stderr
    )
