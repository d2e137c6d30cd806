"""Chapter 8 against closed forms: the loss, its scale, what is held out, what is drawn."""
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import contrastive
import draw
from contrastive import (
    CLIP,
    COLORS,
    HELD_OUT,
    SHAPES,
    captions,
    contrastive_loss,
    learn,
    retrieval,
    similarity,
    text_of,
    words_right,
)

from clip import Tokenizer

torch.set_num_threads(1)


@pytest.mark.parametrize("n", [2, 8, 64])
@pytest.mark.parametrize("scale", [0.0, 2.6593])
def test_equal_vectors_cost_ln_n(n, scale):
    same = F.normalize(torch.ones(n, 5), dim=1)
    assert contrastive_loss(same, same, torch.tensor(scale)).item() == pytest.approx(
        math.log(n), abs=1e-5
    )
    assert math.log(8) == pytest.approx(2.0794, abs=1e-4)


def test_loss_of_perfect_and_of_swapped_pairs():
    """Orthogonal pairs: each choice has one score s and N - 1 scores 0."""
    one_hot, s = torch.eye(6), math.exp(1.5)
    assert contrastive_loss(one_hot, one_hot, torch.tensor(1.5)).item() == pytest.approx(
        math.log(1 + 5 * math.exp(-s)), rel=1e-5
    )
    assert contrastive_loss(one_hot, one_hot.roll(1, 0), torch.tensor(1.5)).item() == pytest.approx(
        math.log(math.exp(s) + 5), rel=1e-5
    )


def test_loss_is_the_mean_of_both_directions():
    g = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(5, 3, generator=g, dtype=torch.float64), dim=1) for _ in range(2)
    )
    s = [
        [math.exp(0.7) * sum(a * b for a, b in zip(i, t)) for t in text.tolist()]
        for i in image.tolist()
    ]
    captions_chosen = (
        sum(math.log(sum(math.exp(s[i][j]) for j in range(5))) - s[i][i] for i in range(5)) / 5
    )
    pictures_chosen = (
        sum(math.log(sum(math.exp(s[i][j]) for i in range(5))) - s[j][j] for j in range(5)) / 5
    )
    assert (
        abs(captions_chosen - pictures_chosen) > 1e-3
    )  # a loss of one direction only is noticed
    loss = contrastive_loss(image, text, torch.tensor(0.7, dtype=torch.float64))
    assert loss.item() == pytest.approx((captions_chosen + pictures_chosen) / 2, rel=1e-9)


def test_scale_starts_at_one_over_007_and_ends_at_100():
    assert CLIP().logit_scale.item() == pytest.approx(2.6593, abs=1e-4)
    g = torch.Generator().manual_seed(0)
    a, b = (F.normalize(torch.randn(4, 3, generator=g), dim=1) for _ in range(2))
    loss_at = lambda scale: contrastive_loss(a, b, torch.tensor(scale))  # noqa: E731
    assert torch.equal(loss_at(10.0), loss_at(math.log(100) + 1e-3)) and loss_at(
        math.log(99)
    ) != loss_at(math.log(100) + 1e-3)


def test_held_out_pairs_are_in_no_training_caption():
    train, test = captions(held_out=False), captions(held_out=True)
    assert (len(train), len(test), len(set(train + test))) == (144, 48, 192)
    assert (
        not {c[1:3] for c in train} & {c[1:3] for c in test} and {c[1:3] for c in test} == HELD_OUT
    )
    assert {c[1] for c in train} == {c[1] for c in test} == set(COLORS) and {
        c[2] for c in train
    } == {c[2] for c in test} == set(SHAPES)


def test_captions_fit_and_have_the_ids_of_clip():
    tokenizer = Tokenizer(length=16)
    row = tokenizer(text_of(("big", "red", "circle", "on the left")))[0].tolist()
    assert (
        row[:2] == [49406, 320] and row[5:7] == [525, 518] and row[8:] == [49407] * 8
    )  # a; on the
    assert max(len(tokenizer.tokenize(text_of(c))) for c in captions(True) + captions(False)) <= 14


def test_pictures_show_what_the_caption_says():
    rng, share = np.random.default_rng(0), {}
    for caption in captions(True) + captions(False):
        size, color, _, place = caption
        a = np.array(contrastive.draw(caption, rng), dtype=float)
        y, x = np.nonzero(np.abs(a - COLORS[color]).max(2) < 40)
        x, y = x.mean() / 31 - 0.5, y.mean() / 31 - 0.5
        where = (
            ("on the right" if x > 0 else "on the left")
            if abs(x) > abs(y)
            else ("at the bottom" if y > 0 else "at the top")
        )
        assert where == place, caption
        share.setdefault(size, []).append((np.abs(a - COLORS[color]).max(2) < 40).mean())
    assert np.mean(share["big"]) > 2 * np.mean(share["small"])


def test_encoders_give_vectors_of_length_one_and_read_the_whole_caption():
    torch.manual_seed(0)
    model, tokens = (
        CLIP(),
        Tokenizer(length=16)(["a big red star at the top", "a big red star at the bottom"]),
    )
    image, text = model.encode_image(torch.randn(3, 3, 32, 32)), model.encode_text(tokens)
    assert image.shape == (3, 64) and text.shape == (2, 64)
    torch.testing.assert_close(torch.cat([image, text]).norm(dim=1), torch.ones(5))
    assert not torch.equal(text[0], text[1])


def test_retrieval_and_words_counted_by_hand():
    s = np.array([[0.9, 0.8, 0.1], [0.2, 0.3, 0.4], [0.0, 0.1, 0.5]])  # (captions, pictures)
    everyone = np.array([True] * 3)
    assert retrieval(s, everyone) == (
        pytest.approx(2 / 3),
        pytest.approx(2 / 3),
    )  # picture 1 takes caption 0; caption 1 takes picture 2
    assert retrieval(s, np.array([True, False, True])) == (1, 1)
    assert retrieval(np.array([[0.9, 0.8], [0.2, 0.3]]), everyone[:2]) == (
        0.5,
        1,
    )  # the two directions are not mixed up
    members = np.array(
        [
            ("big", "red", "star", "top"),
            ("big", "blue", "star", "top"),
            ("small", "blue", "star", "left"),
        ]
    )
    np.testing.assert_allclose(words_right(s, members, everyone), [1, 2 / 3, 1, 1])


def test_training_beats_chance_and_needs_the_right_pairs():
    """30 steps bring the loss well below ln N. With random pairs there is nothing to learn."""
    rng, known = np.random.default_rng(0), captions(False)
    tokens = Tokenizer(length=16)([text_of(c) for c in known])
    pictures = torch.stack([contrastive.as_tensor([contrastive.draw(c, rng)]) for c in known])
    torch.manual_seed(0)
    model = CLIP()
    s = similarity(model, tokens, pictures[:, 0])
    losses = list(learn(model, tokens, pictures, 30, 32))
    assert (
        len(losses) == 30
        and losses[-1] < 0.6 * math.log(32)
        and abs(losses[0] - math.log(32)) < 0.6
    )
    assert s.shape == (144, 144) and max(retrieval(s, np.full(144, True))) < 0.05
    assert min(retrieval(similarity(model, tokens, pictures[:, 0]), np.full(144, True))) > 0.1

    torch.manual_seed(0)
    unpaired = pictures[torch.randperm(144 * 20) % 144].unflatten(0, (144, 20))[
        :, :, 0
    ]  # each caption with 20 pictures of anything
    assert list(learn(CLIP(), tokens, unpaired, 30, 32))[-1] > 0.95 * math.log(32)


def test_same_seed_same_losses():
    tokens, x = Tokenizer(length=16)(["a", "b", "c"]), torch.randn(3, 2, 3, 32, 32)
    runs = []
    for _ in range(2):
        torch.manual_seed(1)
        runs.append(list(learn(CLIP(), tokens, x, 3, 2)))
    assert runs[0] == runs[1]


def test_script_runs(tmp_path):
    done = run_forked(contrastive.__file__, "--quick", "--out", tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ln 8 = 2.0794" in done.stdout and "loss 2.0794" in done.stdout
    assert {p.name for p in tmp_path.iterdir()} == {"contrastive.png", "contrastive_words.png"}
    assert (tmp_path / "contrastive.png").stat().st_size < 150_000


@pytest.mark.parametrize("wrong", [["--batch", "1"], ["--batch", "145"], ["--steps", "0"]])
def test_wrong_use_gets_one_line(wrong, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["contrastive.py", *wrong, "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as exit:
        draw.run(contrastive.main, "", steps=dict(type=int), batch=dict(type=int, default=64))
    printed = capsys.readouterr()
    assert (
        exit.value.code == 2
        and printed.err.count("\n") == 1
        and "2 to 144" in printed.err
        and printed.out == ""
    )
