"""Chapter 5 against exact denoisers, pictures of known class, and what must have no effect."""
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import conditions
import draw
from conditions import DIGITS, RGB, SHAPES, ids_of

from model import CrossAttention, UNetConfig
from sampler import PREDICTIONS, SIGMAS

torch.set_num_threads(1)
ALL = torch.cartesian_prod(
    *[torch.arange(a, b) for a, b in conditions.spans(SHAPES)]
)  # the 48 sets of four words


@pytest.fixture(scope="module")
def net():
    """Random weights, also where they start at zero, so that all parts act. No pixel is clamped."""
    net, _ = conditions.train(torch.zeros(4, 3, 16, 16), ALL[:4], SHAPES, steps=1)
    torch.manual_seed(1)
    for name, p in net.named_parameters():
        nn.init.normal_(p, std=1.0 if name.startswith("embed") else 0.1)
    return net.requires_grad_(False)


# --- words and pictures ---


def test_ids_number_all_words_and_the_one_after_the_last_is_not_given():
    assert ids_of("small green", SHAPES).tolist() == [[1, 11, 7, 11]]
    assert ids_of("Hollow large hollow triangle red", SHAPES).tolist() == [[0, 6, 8, 10]]
    assert ids_of("", SHAPES).tolist() == [[11] * 4] and ids_of("7", DIGITS).tolist() == [[7]]


def test_digits_are_what_their_labels_say_and_differ():
    x, ids = conditions.draw_digits(300, seed=0)
    assert x.shape == (300, 1, 16, 16) and x.min() >= -1 and x.max() == 1
    assert ids[:, 0].tolist() == list(range(10)) * 30
    means = torch.stack([x[ids[:, 0] == k].mean(0) for k in range(10)])
    fresh, asked = conditions.draw_digits(200, seed=1)
    nearest = (fresh[:, None] - means).square().sum((2, 3, 4)).argmin(1)
    assert (nearest == asked[:, 0]).float().mean() > 0.5  # chance 0.1
    assert x[ids[:, 0] == 1].mean() > x[ids[:, 0] == 8].mean()  # a 1 has less ink
    assert len(x.flatten(1).unique(dim=0)) == 300 and torch.equal(
        x, conditions.draw_digits(300, seed=0)[0]
    )


def test_shapes_are_what_their_words_say():
    x, ids = conditions.draw_shapes(150, seed=0)
    assert x.shape == (150, 3, 16, 16)
    widths, known = {"circle": [], "square": [], "triangle": []}, sum(SHAPES, [])
    for picture, row in zip((x * 127.5 + 127.5), ids):
        color, shape, size, fill = (known[i] for i in row)
        ink = (255 - picture).sum(0)  # (16, 16), 0 where white
        paint = picture.flatten(1)[:, ink.argmax()]
        assert min(RGB, key=lambda name: (torch.tensor(RGB[name]) - paint).square().sum()) == color
        rows, columns = (ink > 60).any(1).nonzero()[:, 0], (ink > 60).any(0).nonzero()[:, 0]
        height = int(rows[-1] - rows[0]) + 1
        assert (height <= (11 if shape == "triangle" else 9)) == (size == "small")
        y, x0 = (
            int(rows[0] + rows[-1] + 1) // 2 + (shape == "triangle"),
            int(columns[0] + columns[-1] + 1) // 2,
        )
        hollow = ink[y - 1 : y + 1, x0 - 1 : x0 + 1].min() < 0.3 * ink.max()
        assert hollow == (fill == "hollow")
        widths[shape].append(
            float((ink[rows[0]] > 60).sum() / (ink[rows[-1]] > 60).sum())
        )  # top row to bottom row
    assert max(widths["triangle"]) < min(widths["square"]) and min(widths["square"]) > 0.7


def test_the_unseen_combination_is_not_drawn_and_its_words_are():
    _, ids = conditions.draw_shapes(200, seed=0, without="yellow triangle")
    yellow, triangle = ids[:, 0] == 3, ids[:, 1] == 6
    assert yellow.any() and triangle.any() and not (yellow & triangle).any()
    _, ids = conditions.draw_shapes(200, seed=0)
    assert ((ids[:, 0] == 3) & (ids[:, 1] == 6)).any()
    assert len(ids.unique(dim=0)) > 40  # of 48


def test_pixels_are_the_picture_on_a_scale_from_black_to_white():
    page = Image.new("RGB", (64, 64), "white")
    page.paste((255, 0, 51), (0, 0, 32, 16))
    x = conditions.pixels([page])
    assert x.shape == (1, 3, 16, 16) and (x[0, :, 4:] == 1).all() and (x[0, :, :, 8:] == 1).all()
    torch.testing.assert_close(
        x[0, :, :4, :8], torch.tensor([1, -1, -0.6])[:, None, None].expand(3, 4, 8)
    )
    back = conditions.pictures(x)[0]
    assert (
        back.size == (conditions.SIDE,) * 2
        and back.getpixel((2, 2)) == (255, 0, 51)
        and back.getpixel((45, 45)) == (255, 255, 255)
    )


# --- conditions ---


def test_words_are_dropped_as_often_as_stated():
    torch.manual_seed(0)
    dropped = conditions.drop_words(torch.zeros(20000, 1, dtype=torch.long), 10) == 10
    assert abs(dropped.float().mean() - 0.1) < 0.01
    ids = torch.tensor([[0, 4, 7, 9]]).expand(20000, -1)
    left = conditions.drop_words(ids, 11)
    assert ((left == 11) | (left == ids)).all()
    assert ((left == 11).float().mean(0) - (0.1 + 0.9 * 0.15)).abs().max() < 0.015
    assert abs((left == 11).all(1).float().mean() - (0.1 + 0.9 * 0.15**4)) < 0.01


def test_the_order_of_a_set_has_no_effect_and_its_words_have(net):
    x, t = torch.randn(6, 12, 8, 8), torch.tensor([0, 100, 300, 500, 800, 999])
    ids = torch.cat([ALL[::10][:5], ids_of("small green", SHAPES)])
    out = net["unet"](x, t, net["embed"](ids))
    turned = net["unet"](x, t, net["embed"](ids[:, [2, 0, 3, 1]]))
    torch.testing.assert_close(turned, out, atol=1e-5 * float(out.abs().max()), rtol=0)
    made, turned = (
        conditions.sample(net, some, 2, steps=2) for some in (ids, ids[:, [2, 0, 3, 1]])
    )
    torch.testing.assert_close(turned, made, atol=1e-5, rtol=0)
    for k, (a, b) in enumerate(conditions.spans(SHAPES)):
        other = ids.clone()
        other[:, k] = torch.where(ids[:, k] == a, b - 1, a)
        changed = (net["unet"](x, t, net["embed"](other)) - out).abs().amax((1, 2, 3))
        assert (changed > 1e-3 * out.abs().max()).all()


def test_a_set_of_one_is_the_same_vector_added_everywhere():
    torch.manual_seed(0)
    layer, x, label, weights = (
        CrossAttention(32, 16, 4, UNetConfig()),
        torch.randn(2, 64, 32),
        torch.randn(2, 1, 16),
        [],
    )
    layer.capture = weights.append
    torch.testing.assert_close(layer(x, label), layer.to_out(layer.to_v(label)).expand(2, 64, 32))
    assert torch.equal(weights[0], torch.ones(2, 4, 64, 1))


def test_guidance_0_ignores_words_1_is_the_prompt_alone_and_beyond_is_linear(net):
    ids, others = ALL[:3], ALL[-3:]
    given = {scale: conditions.sample(net, ids, scale, steps=1) for scale in (0, 1, 3)}
    assert max(x.abs().max() for x in given.values()) < 1  # nothing was clamped
    torch.testing.assert_close(given[3], given[0] + 3 * (given[1] - given[0]), atol=1e-5, rtol=0)
    assert torch.equal(conditions.sample(net, others, 0, steps=1), given[0]) and not torch.allclose(
        given[0], given[1], atol=1e-3
    )
    not_given = net["embed"].weight[-1].clone()
    net["embed"].weight[-1] = 7.0
    assert torch.equal(conditions.sample(net, ids, 1, steps=1), given[1])
    assert not torch.allclose(conditions.sample(net, ids, 0, steps=1), given[0], atol=1e-3)
    net["embed"].weight[-1] = not_given


class TwoBumps(nn.Module):
    """The exact network for two classes of pixels, normal around +0.6 and -0.6, deviation 0.6.

    The context is +1, -1, or 0, which means "not given".
    """

    config = SimpleNamespace(in_channels=4)

    def forward(self, x, t, context):
        sigma = SIGMAS[t.round().long()].float()[:, None, None, None]
        x, c, mean, var = x * (sigma**2 + 1).sqrt(), context[:, 0, :, None, None], 0.6, 0.36
        plus, minus = ((var * x + sigma**2 * m) / (var + sigma**2) for m in (mean, -mean))
        share = torch.sigmoid(2 * mean * x / (var + sigma**2))
        share = torch.where(c == 0, share, (c + 1) / 2)
        c_skip, c_out = PREDICTIONS["v"].c_skip(sigma), PREDICTIONS["v"].c_out(sigma)
        return (share * plus + (1 - share) * minus - c_skip * x) / c_out


def test_accuracy_rises_with_guidance_from_chance_over_the_exact_share():
    """The share on the right side of 0.

    It is one half at scale 0, Phi(mean / deviation) = Phi(1) = 0.841 at scale 1, more above.
    """
    net = nn.ModuleDict(
        {
            "embed": nn.Embedding.from_pretrained(torch.tensor([[1.0], [-1.0], [0.0]])),
            "unet": TwoBumps(),
        }
    )
    ids = torch.arange(1000)[:, None] % 2
    wanted = torch.tensor([1.0, -1.0])[ids[:, 0]][:, None, None, None]
    right = {
        scale: (conditions.sample(net, ids, scale, steps=30, side=2) * wanted > 0)
        .float()
        .mean()
        .item()
        for scale in (0, 1, 2, 4)
    }
    assert (
        abs(right[0] - 0.5) < 0.025 and abs(right[1] - 0.8413) < 0.025
    )  # 4000 pixels: standard error 0.006 to 0.008
    assert right[1] + 0.05 < right[2] < right[4] and right[4] > 0.97


def test_what_is_learned_follows_the_labels_and_shuffled_or_empty_ones_do_nothing():
    """Black and white pictures, so that the class is the sign of the mean."""
    torch.manual_seed(0)
    ids = torch.arange(64)[:, None] % 2
    x = (ids * 1.6 - 0.8)[:, :, None, None] + 0.1 * torch.randn(64, 1, 4, 4)
    asked, right = torch.arange(40)[:, None] % 2, {}
    for name, labels in {
        "as drawn": ids,
        "shuffled": torch.arange(64)[:, None] // 2 % 2,
        "all padding": torch.full_like(ids, 2),
    }.items():
        net, loss = conditions.train(x, labels, [["black", "white"]], steps=25, batch=16)
        assert 0 < loss < 1
        made = conditions.sample(net, asked, 2, side=4)
        right[name] = ((made.mean((1, 2, 3)) > 0) == (asked[:, 0] == 1)).float().mean().item()
    assert (
        right["as drawn"] > 0.95
        and 0.3 < right["shuffled"] < 0.7
        and 0.3 < right["all padding"] < 0.7
    )


# --- measuring ---


def test_accuracy_needs_every_given_word_and_no_other():
    found = torch.tensor([[0, 4, 7, 9], [1, 5, 7, 10], [1, 5, 8, 10], [3, 6, 8, 9]])
    judge = lambda x: torch.zeros(4, 11).scatter(1, found, 1.0)  # noqa: E731
    assert conditions.accuracy(judge, None, found, SHAPES) == 1
    assert (
        conditions.accuracy(judge, None, ids_of("green hollow", SHAPES).expand(4, -1), SHAPES)
        == 0.5
    )
    assert (
        conditions.accuracy(judge, None, ids_of("small green hollow", SHAPES).expand(4, -1), SHAPES)
        == 0.25
    )
    assert conditions.accuracy(judge, None, ids_of("", SHAPES).expand(4, -1), SHAPES) == 1


def test_the_judge_learns_drawn_digits():
    judge = conditions.train_judge(*conditions.draw_digits(600, seed=0), DIGITS, steps=60)
    assert (
        conditions.accuracy(judge, *conditions.draw_digits(200, seed=1), DIGITS) > 0.6
    )  # chance 0.1


# --- the script ---


def test_the_script_runs(tmp_path):
    done = run_forked(conditions.__file__, "--quick", "--ask", "large hollow", "--out", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "large hollow" in done.stdout and "have the labels an effect?" in done.stdout
    assert Image.open(tmp_path / "conditions.png").width <= 900


@pytest.mark.parametrize(
    "ask, said",
    [
        (
            "small purple",
            "conditions.py: 'purple' is not an attribute: use red, green, blue, yellow, circle",
        ),
        (
            "red small blue",
            "conditions.py: red and blue exclude each other: use at most one of red, green,"
            " blue, yellow",
        ),
    ],
)
def test_wrong_use_is_one_line(ask, said, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(
        sys, "argv", ["lecture/conditions.py", "--ask", ask, "--out", str(tmp_path)]
    )
    with pytest.raises(SystemExit) as stopped:
        draw.run(conditions.main, conditions.__doc__, ask={})
    printed = capsys.readouterr()
    assert (
        stopped.value.code == 2
        and printed.err.startswith(said)
        and printed.err.count("\n") == 1
        and printed.out == ""
    )
