"""Attention maps: where in the picture each word was used."""
import numpy as np
import pytest
import torch
from PIL import Image

from clip import Tokenizer
from extras import prompts
from extras.attention_maps import (
    AttentionStore,
    as_maps,
    capture_attention,
    chosen_words,
    overlay,
    words_of,
)
from sd import StableDiffusion, UserError
from tests.command import array, run_cli
from tests.training import tiny  # noqa: F401


def test_capture_changes_no_picture_and_maps_sum_to_one(tiny, tmp_path, capsys):  # noqa: F811
    common = "a cat, a hat", "--width", 72, "--dtype", "fp32", "--ckpt", tiny
    for name, more in {"plain": [],
                       "watched": ["--attn", tmp_path / "maps", "--words", "cat,Hat"]}.items():
        assert run_cli(capsys, *common, "--out", tmp_path / f"{name}.png", *more)[0] == 0
    plain, watched = (array(tmp_path / f"{name}.png") for name in ("plain", "watched"))
    assert np.abs(plain - watched).max() <= 1
    files = sorted(path.name for path in (tmp_path / "maps").iterdir())
    assert files == ["watched-2-cat.png", "watched-5-hat.png"]

    sd, store = StableDiffusion.load(tiny), AttentionStore()
    with capture_attention(sd.unet, store):
        sd.generate("a cat, a hat", batch=2, width=72, callback=store.step)
    assert store.mean().shape == (2, 77, 4, 9) and len(store.layers) == 4
    for layer in [*store.layers.values(), store.mean()]:
        assert torch.allclose(layer.sum(1), torch.ones(2, 4, 9), atol=1e-5)
    assert all(m.capture is None for m in sd.unet.modules() if hasattr(m, "capture"))


@pytest.mark.parametrize("guidance", [1.0, 7.5])
def test_maps_are_the_prompts_own(tiny, guidance):  # noqa: F811
    """Guided or not, in one pass or row by row, the maps are those of the prompt's half."""
    sd = StableDiffusion.load(tiny, fast=False)
    prompts.attach(sd)

    def maps(one_by_one: bool = False, batch: int = 1) -> torch.Tensor:
        store, forward = AttentionStore(), sd.unet.forward

        def row_by_row(x, t, context):
            rows = zip(x.split(1), t.split(1), context.split(1))
            return torch.cat([forward(*row) for row in rows])
        if one_by_one:
            sd.unet.forward = row_by_row
        with capture_attention(sd.unet, store):
            sd.generate("a cat", "dog " * 80, guidance=guidance, steps=1, batch=batch,
                        callback=store.step)
        sd.unet.__dict__.pop("forward", None)
        return store.mean()
    alone = maps()
    assert alone.shape == (1, 154, 4, 4)
    assert torch.allclose(maps(batch=2)[:1], alone, atol=1e-5)
    assert torch.allclose(maps(one_by_one=True, batch=2)[:1], alone, atol=1e-5)
    store = AttentionStore()
    with capture_attention(sd.unet, store):
        sd.generate("a cat", "dog " * 80, guidance=1.0, steps=1, callback=store.step)
    assert torch.allclose(store.mean(), alone, atol=1e-5)       # the first step sees the same x


def test_maps_of_halved_sizes():
    """Each level halves the sides, rounded up: 5x7 latents have 3x4 and 2x2 positions below."""
    for height, width in (5, 7), (3, 4), (2, 2):
        probs = torch.full((1, height * width, 3), 1 / 3)
        assert torch.allclose(as_maps(probs, (5, 7)), torch.full((1, 3, 5, 7), 1 / 3))
    corner = torch.zeros(1, 12, 1)
    corner[0, 3] = 1                                            # the right end of the first row
    assert as_maps(corner, (5, 7))[0, 0].flatten().argmax() == 6


def test_words_and_their_tokens():
    """A word of several tokens has them all, and a word is found where it stands (2368: cat)."""
    tokenizer = Tokenizer()
    words = words_of(tokenizer, "A  floofycat, cat!!")
    ids = tokenizer("A  floofycat, cat!!")[0].tolist()
    assert [word for word, _ in words] == ["a", "floofycat", ",", "cat", "!!"]
    assert words[3].tokens == [76 - ids[::-1].index(2368)] and len(words[1].tokens) > 1
    all_tokens = [position for word in words for position in word.tokens]
    assert all_tokens == list(range(1, ids.index(49407)))
    second_chunk = words_of(tokenizer, "dog " * 80 + "(cat:1.3)")[-1]
    assert second_chunk == ("cat", [77 + 1 + 5])


def test_words_of_which_there_are_none():
    for call, said in (lambda: chosen_words(Tokenizer(), "?!"), "no words"), \
            (lambda: chosen_words(Tokenizer(), "a cat", ["dog"]), "its words are a, cat"):
        with pytest.raises(UserError, match=said) as error:
            call()
        assert "\n" not in str(error.value)
    assert [word for word, _ in chosen_words(Tokenizer(), "a cat, a hat", ["A", " hat"])] \
        == ["a", "a", "hat"]


def test_a_network_without_cross_attention_is_refused():
    with pytest.raises(UserError, match="Linear has no CrossAttention"):
        with capture_attention(torch.nn.Linear(2, 2), AttentionStore()):
            pass


def test_overlay_is_red_where_the_heat_is():
    heat = torch.zeros(4, 4)
    heat[0, 0] = 5
    picture = np.asarray(overlay(Image.new("RGB", (32, 32), "white"), heat), int)
    assert picture[2, 2, 0] > picture[2, 2, 1] + 50
    assert (picture[-1, -1] == picture[-1, -1, 0]).all()
    assert np.isfinite(np.asarray(overlay(Image.new("RGB", (8, 8)), torch.ones(2, 2)))).all()
