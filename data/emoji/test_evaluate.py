"""The judges of evaluate.py, the rules for words, and CLIP's game by parts.

The emoji are drawn by the test: twelve outlines in three styles. Nothing is downloaded.
"""
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import classify
import contrast
import evaluate
from classify import cut_out
from compose import COLOURS, STYLES, place, recolour, set_aside
from vectors import remove_common

torch.set_num_threads(1)
NAMES = [
    "airplane",
    "bell",
    "camera",
    "dog face",
    "door",
    "mushroom",
    "pizza",
    "snake",
    "tooth",
    "trophy",
    "volcano",
    "whale",
]


def drawn(i: int, style: int) -> Image.Image:
    """An outline of its own for each name; the style is its colour and its rim."""
    rng = np.random.default_rng(i)
    angles, page = np.sort(rng.uniform(0, 2 * np.pi, 9)), Image.new("RGBA", (256, 256))
    radius = rng.uniform(40, 125, 9)
    corners = [(128 + r * np.cos(a), 128 + r * np.sin(a)) for a, r in zip(angles, radius)]
    ImageDraw.Draw(page).polygon(
        corners,
        fill=[(200, 60, 40), (220, 120, 60), (150, 30, 60)][style],
        outline=(30, 20, 20, 255),
        width=4 * style,
    )
    return page.resize((64, 64), Image.Resampling.LANCZOS)


@pytest.fixture(scope="module")
def emoji() -> evaluate.Emoji:
    return {
        (name, style): drawn(i, j) for i, name in enumerate(NAMES) for j, style in enumerate(STYLES)
    }


@pytest.fixture(scope="module")
def judged(emoji) -> dict[str, dict]:
    """The tables of a model that draws the truth, and of one that draws another prompt's."""
    truth = {a.prompt: a.picture for kind in evaluate.KINDS for a in evaluate.ask(kind, 30, emoji)}

    def table(shift: int) -> dict[str, list[float]]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(evaluate, "FILE", HERE / "no such file")
            return evaluate.table(
                lambda prompts: [truth[p] for p in prompts[shift:] + prompts[:shift]],
                lambda images: images,
                30,
                emoji,
            )[0]

    return {"right": table(0), "wrong": table(1)}


def test_many_seeds_of_one_name(emoji, monkeypatch, capsys):
    """True pictures and mirrored ones are right, another's is not; and how far two lie apart."""
    monkeypatch.setattr(evaluate, "FILE", HERE / "no such file")
    true = {name: evaluate.on_background(emoji[name, "3d"]) for name in NAMES}

    def draw(prompts: list[str]) -> list[Image.Image]:
        name = next(name for name in NAMES if evaluate.with_article(name) == prompts[0])
        mirrored = true[name].transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        other = true["snake"] if name == "bell" else true[name]
        return [true[name], mirrored, other]
    evaluate.seeds_table(draw, 100, 3, emoji)
    said = capsys.readouterr().out
    assert "97.2% of 12 names, 3 seeds each, are right; wrong: bell 1\n" in said

    def two_grays(prompts: list[str]) -> list[Image.Image]:
        return [Image.new("RGB", (64, 64), (level,) * 3) for level in (100, 130)]
    evaluate.seeds_table(two_grays, 100, 2, emoji)
    assert capsys.readouterr().out.endswith("of two pictures of one name: 30.0\n")


def test_true_pictures_are_right(judged):
    for row, (nearest, nearest_true) in judged["right"].items():
        assert nearest == nearest_true >= 90, row


def test_wrong_pictures_are_wrong(judged):
    for row in (
        "captions: name",
        "colours: hue and shape",
        "pairs: both halves",
        "numbers: all of them",
        "places: there and right",
    ):
        nearest, nearest_true = judged["wrong"][row]
        assert nearest <= 25 and nearest_true >= 90, row


def test_classifier_names_what_its_net_says(emoji, monkeypatch):
    """The net is sure of the third name, the second style, its own colour, then the fourth."""
    scores = [
        torch.eye(12)[2][None],
        torch.eye(3)[1][None],
        (2 * torch.eye(12)[0] + torch.eye(12)[4])[None],
    ]
    seen = []
    monkeypatch.setattr(evaluate, "load_judge", lambda names: lambda x: (seen.append(x), scores)[1])
    judge, half = evaluate.Classifier(emoji), Image.new("RGB", (32, 64), (0, 0, 255))
    assert (
        judge.half(half) == judge.names(half)[0][0] == sorted(NAMES)[2]
        and judge.style(half) == list(STYLES)[1]
    )
    assert judge.hue(half, "bell") == list(COLOURS)[3]
    assert (
        seen[0].shape == (1, 3, 64, 64)
        and seen[0][0, :, 31, 31].tolist() == [0, 0, 1]
        and seen[0][0, :, 31, 5].tolist() == [1, 1, 1]
    )


def test_classifier_learns(emoji):
    """Two outlines: after 60 steps it recognises them at other sizes and places."""
    few = {key: image for key, image in emoji.items() if key[0] in NAMES[:2]}
    names, g = torch.arange(2).repeat_interleave(3).repeat(8), torch.Generator().manual_seed(1)
    x = classify.varied(
        torch.stack(
            [
                torch.from_numpy(np.array(classify.filling(image))).permute(2, 0, 1)
                for image in few.values()
            ]
        ).repeat(8, 1, 1, 1),
        g,
    )
    assert x.shape == (48, 3, 64, 64) and 0 <= x.min() and x.max() <= 1
    assert (classify.learn(few, 60, batch=16)(x)[0].argmax(1) == names).float().mean() > 0.8


def test_what_is_asked(emoji):
    colours, pairs = evaluate.ask("colours", 30, emoji), evaluate.ask("pairs", 30, emoji)
    assert colours and all(
        set_aside(a.colour, a.names[0]) and a.colour in a.prompt and a.names[0] in a.prompt
        for a in colours
    )
    assert pairs and all(
        set_aside(*a.names) and all(name in a.prompt for name in a.names) for a in pairs
    )
    assert [a.prompt for a in evaluate.ask("pairs", 30, emoji)] == [a.prompt for a in pairs]
    assert len({a.prompt for a in colours + pairs}) == len(colours + pairs)
    assert {
        ("twemoji" if "twemoji" in a.prompt else "noto" if "noto" in a.prompt else "3d") == a.style
        for a in colours + pairs
    } == {True}


def test_own_colour_is_not_asked(emoji):
    for colour in ("red", "green", "blue"):
        assert evaluate.own_colour(recolour(emoji["bell", "3d"], colour)) == colour


def test_cut_out_forgets_size_and_place(emoji):
    rgba = emoji["whale", "noto"]
    whole, small = (
        evaluate.feature(cut_out(evaluate.on_background(place(rgba, *where))))
        for where in ((32, 32, 64, 64), (20, 40, 32, 32))
    )
    other = evaluate.feature(cut_out(evaluate.on_background(emoji["door", "noto"])))
    assert np.abs(whole - small).mean() < 0.25 * np.abs(whole - other).mean()
    assert cut_out(Image.new("RGB", (64, 64), "white")).size == (64, 64)  # nothing drawn


def test_either_order_of_a_pair_is_right(emoji):
    judge = evaluate.Nearest(emoji)
    asked = evaluate.ask("pairs", 1, emoji)[0]
    a, b = ((name, "3d") for name in asked.names)
    both, one, twice = (
        evaluate.on_background(evaluate.pair(emoji[left], emoji[right]))
        for left, right in (
            (b, a),
            (a, (next(name for name in NAMES if name not in asked.names), "3d")),
            (a, a),
        )
    )
    answers = [evaluate.right("pairs", judge, asked, image) for image in (both, one, twice)]
    assert [answer["pairs: both halves"] for answer in answers] == [True, False, False]
    assert all(answer["pairs: one half or both"] for answer in answers)


def test_all_of_a_number_must_be_right(emoji):
    """Three bells; with a tooth for one of them; two bells where three are asked for."""
    judge, page = evaluate.Nearest(emoji), Image.new("RGBA", (64, 64))
    asked = evaluate.Asked("three bells", ["bell"], page, spots=tuple(evaluate.NUMBERS["three"]))

    def answer(*names: str, spots: list[tuple[int, int]] = evaluate.NUMBERS["three"]) -> list[bool]:
        image = page
        for name, (x, y) in zip(names, spots):
            image = Image.alpha_composite(image, place(emoji[name, "3d"], x, y, 27, 27))
        return list(evaluate.right("numbers", judge, asked, evaluate.on_background(image)).values())

    assert (
        answer("bell", "bell", "bell") == [True, True]
        and answer("bell", "bell", "tooth") == [False, True]
        and answer("tooth", "door", "pizza") == [False, False]
    )
    assert not answer("bell", "bell", spots=evaluate.NUMBERS["two"])[0]


def test_distances_are_in_255ths():
    black, grey = Image.new("RGB", (64, 64)), Image.new("RGB", (64, 64), (51, 51, 51))
    assert evaluate.distances(evaluate.feature(black)[None], grey) == pytest.approx([51], abs=1e-3)


def test_remove_common():
    """Closed form: no mean, nothing along the main directions (those of numpy's SVD), length 1."""
    x = np.random.default_rng(0).normal(size=(200, 8)) * [9, 5, 3, 1, 1, 1, 1, 1] + 4
    y = remove_common(x, directions=3)
    main = np.linalg.svd(x - x.mean(0), full_matrices=False)[2][:3]
    assert np.abs(y @ main.T).max() < 1e-9 and np.linalg.norm(y, axis=1) == pytest.approx(
        np.ones(200)
    )


def test_synonyms_stand_in_no_caption():
    """Of those pictures that can be checked without a download: the list's own form."""
    lines = [line.split(": ") for line in (HERE / "synonyms.txt").read_text().splitlines()]
    assert len(lines) >= 200 and len({word for word, _ in lines}) == len(lines)
    assert all(1 <= len(of.split(", ")) <= 3 and word not in COLOURS for word, of in lines)


def test_by_parts_is_the_mean_of_the_best():
    image, text = torch.randn(3, 5, 7), torch.randn(2, 4, 7)
    own = torch.tensor([[0, 1, 1, 0], [0, 1, 0, 0]]).bool()
    scores = contrast.by_parts(image, text, own)
    for n in range(3):
        assert scores[n, 0] == pytest.approx(
            float(((image[n] @ text[0, 1]).max() + (image[n] @ text[0, 2]).max()) / 2), abs=1e-5
        )
        assert scores[n, 1] == pytest.approx(float((image[n] @ text[1, 1]).max()), abs=1e-5)


def test_the_sheet_shows_what_is_set_aside():
    coloured = [
        match.groups()
        for prompt in evaluate.OTHERS
        if (match := re.fullmatch(rf"an? ({'|'.join(COLOURS)}) (\w+)", prompt))
    ]
    paired = [
        match.groups()
        for prompt in evaluate.OTHERS
        if (match := re.fullmatch(r"an? (\w+) next to an? (\w+)", prompt))
    ]
    assert (
        len(coloured) == 4
        and len(paired) == 1
        and all(set_aside(*fact) for fact in coloured + paired)
    )
    synonyms = [line.split(":")[0] for line in (HERE / "synonyms.txt").read_text().splitlines()]
    assert {"a kitten", "a burger"} <= {f"a {word}" for word in synonyms} & set(evaluate.OTHERS)
