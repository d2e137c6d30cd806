"""Chapter 3 against known ids, planted tables and the causal pattern."""
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import draw
import words

from clip import CLIPTextConfig, CLIPTextModel, Tokenizer
from sd import StableDiffusion, UserError

torch.set_num_threads(1)
BOOK = "I book a ticket to buy that book"


@pytest.fixture(scope="module")
def sd():
    """A text encoder with random weights and three layers, of a model that lists no captions."""
    torch.manual_seed(0)
    text = (
        CLIPTextModel(CLIPTextConfig(hidden_size=32, num_hidden_layers=3, num_attention_heads=4))
        .eval()
        .requires_grad_(False)
    )
    return SimpleNamespace(text_encoders=[text], metadata={})


def planted(rows: dict[int, list[float]], captions: list[str] | None = None) -> SimpleNamespace:
    """A model whose table has these rows, and zeros elsewhere."""
    table = torch.zeros(49408, len(next(iter(rows.values()))))
    for id, row in rows.items():
        table[id] = torch.tensor(row)
    text = SimpleNamespace(
        embeddings=SimpleNamespace(token_embedding=torch.nn.Embedding.from_pretrained(table)),
        tokenizer=Tokenizer(),
    )
    metadata = {} if captions is None else {"captions": json.dumps(captions)}
    return SimpleNamespace(text_encoders=[text], metadata=metadata)


# --- tokens ---


@pytest.mark.parametrize(
    "text, ids",
    [
        ("I love cats and dogs .", "328 793 3989 537 3255 269"),
        ("I love cats and dogs.", "328 793 3989 537 3255 269"),
        (BOOK + ".", "328 1116 320 4500 531 2131 682 1116 269"),
        (
            "a ballerina chasing her cat running on the grass in the style of monet",
            "320 34962 13376 899 2368 2761 525 518 5922 530 518 1844 539 24499",
        ),
    ],
)
def test_ids_are_shown(text, ids, capsys):
    words.show_tokens(Tokenizer(), text)
    heading, pieces, shown = capsys.readouterr().out.strip().splitlines()
    assert shown.split() == ids.split() and f"{len(ids.split())} tokens" in heading
    assert [piece.removesuffix("</w>") for piece in pieces.split()] == text.lower().replace(
        ".", " ."
    ).split()


def test_row_is_cut_at_77(capsys):
    words.show_row(Tokenizer(), "I love cats and dogs .")
    out = capsys.readouterr().out
    assert "[49406, 328, 793, 3989, 537, 3255, 269, 49407" in out and "77 long" in out
    assert (
        "78 tokens and 75 fit; cut off: 'and dogs .'" in out and "[793, 3989, 49407]" in out
    )  # 13 * 6 = 78 = 75 + 3


# --- the table ---


def test_known_words(sd):
    everything = words.known_words(sd)
    assert (everything["cat"], everything["dog"], everything["cats"], everything["dogs"]) == (
        2368,
        1929,
        3989,
        3255,
    )
    listed = words.known_words(
        planted({0: [1.0]}, ["a red cat, 3d", "a catfish"])
    )  # 3d is the tokens 3 and d
    assert listed == {"a": 320, "red": 736, "cat": 2368, "d": 323, "catfish": 26077}
    assert (words.CAT, words.DOG) == (2368, 1929)


def test_nearest_is_by_cosine():
    sd = planted(
        {2368: [1.0, 0.0], 1929: [20.0, 10.0], 3989: [0.0, 3.0], 736: [-1.0, 0.0]},
        ["cat dog cats red"],
    )
    best = words.nearest(sd, words.known_words(sd), "Cat")
    assert [other for other, _ in best] == ["dog", "cats", "red"]
    assert [cosine for _, cosine in best] == pytest.approx([2 / 5**0.5, 0, -1], abs=1e-6)
    assert words.nearest(sd, words.known_words(sd), "cat", k=1) == best[:1]


def test_sorted_by_meaning():
    """One direction per kind: all right. One per position in the list: all wrong.

    By chance (n - 1) of the (N - 1) others are of the same kind, for every word.
    """
    tokenizer = Tokenizer()
    kinds = {kind: members.split()[:4] for kind, members in words.KINDS.items()}
    ids = {word: tokenizer.tokenize(word)[0].id for members in kinds.values() for word in members}
    for rows, share in (
        (
            {
                ids[w]: [float(k == j) for j in range(5)]
                for k, members in enumerate(kinds.values())
                for w in members
            },
            1,
        ),
        (
            {
                ids[w]: [float(i == j) for j in range(4)]
                for members in kinds.values()
                for i, w in enumerate(members)
            },
            0,
        ),
    ):
        sd = planted(rows, [" ".join(ids)])
        assert words.sorted_by_meaning(sd, words.known_words(sd)) == (share, pytest.approx(3 / 19))
    assert np.isnan(words.sorted_by_meaning(sd, {})).all()
    for members in words.KINDS.values():
        assert all(len(tokenizer.tokenize(word)) == 1 for word in members.split())


def test_unknown_words_are_refused():
    sd = planted({2368: [1.0]}, ["a cat"])
    with pytest.raises(UserError, match="'unphotographable' is 4 tokens"):
        words.nearest(sd, words.known_words(sd), "unphotographable")
    with pytest.raises(UserError, match="'dog' is in none of the captions.*such as cat"):
        words.nearest(sd, words.known_words(sd), "dog")
    sd = planted({2368: [1.0]})
    with pytest.raises(UserError, match="'!' is not made of letters"):
        words.nearest(sd, words.known_words(sd), "!")


# --- context ---


def test_one_row_two_vectors(sd):
    tokens = sd.text_encoders[0].tokenizer(BOOK)
    assert tokens[0, 2] == tokens[0, 8] == 1116
    states = words.layers(sd, tokens)
    assert list(states) == ["table", "+ position", "layer 1", "layer 2", "layer 3", "out"]
    assert torch.equal(states["table"][2], states["table"][8])
    position = sd.text_encoders[0].embeddings.position_embedding.weight
    difference = states["+ position"][2] - states["+ position"][8]
    torch.testing.assert_close(difference, position[2] - position[8])
    assert not torch.allclose(states["layer 1"][2], states["layer 1"][8], atol=1e-3)
    assert torch.equal(states["out"], sd.text_encoders[0](tokens)[0][0])


def test_cosines():
    np.testing.assert_allclose(
        words.cosines(torch.tensor([[2.0, 0.0], [3.0, 3.0], [0.0, -1.0]])),
        [[1, 0.5**0.5, 0], [0.5**0.5, 1, -(0.5**0.5)], [0, -(0.5**0.5), 1]],
        atol=1e-6,
    )


def test_an_edit_leaves_what_stands_before_bitwise_equal(sd):
    moved = words.effect_of_edits(sd, sd.text_encoders[0].tokenizer(BOOK)[:, :10], 8)
    for i in range(8):
        for j in range(10):
            assert np.isnan(moved[i, j]) == (j <= i), (i, j)  # token i stands at position i + 1
    assert (moved[~np.isnan(moved)] > 0).all()


def test_without_the_mask_every_edit_moves_everything(sd, monkeypatch):
    masked = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, k, v, is_causal: masked(q, k, v),
    )
    tokens = sd.text_encoders[0].tokenizer(BOOK)[:, :10]
    assert not np.isnan(words.effect_of_edits(sd, tokens, 8)).any()


def test_padding_can_be_left_out(sd):
    text = sd.text_encoders[0]
    tokens = text.tokenizer(BOOK)
    torch.testing.assert_close(text(tokens)[0][:, :10], text(tokens[:, :10])[0])


def test_a_word_that_is_cat_already_is_edited_too(sd):
    tokens = sd.text_encoders[0].tokenizer("a cat")[:, :4]
    assert not np.isnan(words.effect_of_edits(sd, tokens, 2)[1, 2])


def test_words_before_count_and_words_after_do_not(sd, capsys):
    words.compare(sd, "I book a table", "a book of tables", "book")
    words.compare(sd, "book a table", "book of tables", "book")
    before, after = capsys.readouterr().out.splitlines()
    assert "apart" in before and "bitwise equal" in after


# --- the drawing helper, and the command ---


def test_grid_colours():
    page = np.array(
        draw.grid(
            np.array([[0.0, 1.0], [np.nan, 0.5]]), ["x", "y"], ["", ""], cell=20, low=0, high=1
        )
    )[-41:, -41:]
    assert (
        page[10, 10].tolist() == [10, 10, 60]
        and page[10, 30].tolist() == [255, 245, 190]
        and page[30, 10].tolist() == [255, 255, 255]
    )


def test_script_runs(tmp_path):
    done = run_forked(words.__file__, "--quick", "--out", tmp_path, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    for line in (
        "  table 1.00, + position",
        "36 of 80 vectors stay bitwise equal; 36 of these stand before",
        "328   1116     320   4500",
    ):
        assert line in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["words.png"] and 1000 < (
        tmp_path / "words.png"
    ).stat().st_size < 150_000


@pytest.mark.parametrize(
    "wrong, message",
    [
        (["--word", "cat", "unphotographable"], "is 4 tokens"),
        (["--text", "book"], "1 tokens long"),
        (["--text", " ".join(["a"] * 21)], "21 tokens long"),
        (["--text", ""], "0 tokens long"),
        (["--ckpt", "nowhere.safetensors"], "no such file"),
    ],
)
def test_wrong_use_gets_one_line(wrong, message, sd, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["words.py", *wrong, "--out", str(tmp_path)])
    if "--ckpt" not in wrong:
        monkeypatch.setattr(StableDiffusion, "load", lambda *_: sd)
    with pytest.raises(SystemExit) as exit:
        draw.run(
            words.main, "", text=dict(default=BOOK), word=dict(nargs="+", default=["cat"]), ckpt={}
        )
    captured = capsys.readouterr()
    assert (
        exit.value.code == 2
        and captured.err.count("\n") == 1
        and message in captured.err
        and captured.out == ""
    )


def test_long_and_short_texts_are_drawn(sd, tmp_path, monkeypatch):
    monkeypatch.setattr(StableDiffusion, "load", lambda *_: sd)
    for text in ("two words", " ".join(["cat"] * 20)):
        words.main(SimpleNamespace(text=text, word=["cat"], ckpt=None, out=tmp_path, quick=True))
        with draw.Image.open(tmp_path / "words.png") as picture:
            assert picture.width <= 900
