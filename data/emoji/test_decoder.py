"""decoder.py and what it needs of compose.py. The emoji are drawn by the test: discs on nothing."""
import random
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]
import decoder
from compose import KINDS, STYLES, Emoji, compose
from decoder import Pictures, fitted, grow, held_back, widened

from extras.vae_loss import reconstruction_loss
from sd import StableDiffusion
from vae import AutoencoderKL, VAEConfig

torch.set_num_threads(1)
OLD = VAEConfig(ch=8, ch_mult=(1, 2, 2), num_res_blocks=1, z_channels=4, num_groups=4)


@pytest.fixture
def old() -> AutoencoderKL:
    torch.manual_seed(0)
    return AutoencoderKL(OLD).requires_grad_(False)


def disc(colour: tuple[int, int, int]) -> Image.Image:
    page = Image.new("RGBA", (128, 128))
    ImageDraw.Draw(page).ellipse((12, 24, 116, 104), fill=(*colour, 255))
    return page


@pytest.fixture(scope="module")
def emoji() -> Emoji:
    names = ("bell", "camera", "door", "pizza", "snake", "whale")
    return {(name, style): disc((40 * i, 200 - 30 * i, 60 + 60 * j))
            for i, name in enumerate(names) for j, style in enumerate(STYLES)}


# --- the decoder it starts as ---

@pytest.mark.parametrize("ch_mult", [(1, 1, 2, 2), (1, 2, 4, 4), (1, 1, 4, 8)])
def test_a_grown_decoder_computes_the_features_of_the_old_one(old, ch_mult):
    new = grow(old, replace(OLD, decoder_ch_mult=ch_mult)).requires_grad_(False)
    features = []
    for block in (old.decoder.up[0].block[-1], new.decoder.up[1].block[-1]):
        block.register_forward_hook(lambda module, args, out: features.append(out))
    z = torch.randn(2, 4, 4, 4)
    small, large = old.decode(z), new.decode(z)
    assert large.shape[-1] == 2 * small.shape[-1]
    before, after = features
    copies = after.shape[1] // before.shape[1]
    torch.testing.assert_close(after, before.repeat_interleave(copies, 1), atol=1e-4, rtol=1e-4)


def test_a_grown_encoder_reads_a_picture_of_twice_the_size(old):
    new = grow(old, replace(OLD, decoder_ch_mult=(1, 1, 2, 2))).requires_grad_(False)
    assert (old.config.downsampling, new.config.downsampling) == (4, 8)
    x = torch.nn.functional.interpolate(torch.rand(1, 3, 4, 4), size=(32, 32), mode="bicubic")
    small = torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bicubic", antialias=True)
    torch.testing.assert_close(new.encode(x), old.encode(small))


def test_copies_of_a_channel_share_its_weight_but_are_not_equal():
    weight = torch.randn(3, 4, 3, 3)
    wide = widened(weight, 8, 1, divide=True)
    torch.testing.assert_close(wide[:, ::2] + wide[:, 1::2], weight)
    assert not torch.equal(wide[:, ::2], wide[:, 1::2])
    assert torch.equal(fitted(weight, weight.shape), weight)


def test_the_loss_is_zero_for_equal_pictures_alone():
    x = torch.rand(1, 3, 16, 16)
    assert reconstruction_loss(x, x) == 0
    assert reconstruction_loss(x, x + 0.1) == pytest.approx(0.3, abs=1e-5)  # no gradients differ


# --- pictures ---

@pytest.mark.parametrize("kind", KINDS)
def test_scenes_of_128_pixels_are_those_of_64_pixels(emoji, kind):
    """But for places, which are rounded to pixels."""
    half = {key: rgba.resize((64, 64), Image.Resampling.BOX) for key, rgba in emoji.items()}
    names = ["bell", "camera", "door"]
    (small, captions, facts), (large, *same) = (
        compose(kind, "noto", names, source, random.Random(1)) for source in (half, emoji))
    assert (small.size, large.size) == ((64, 64), (128, 128)) and [captions, facts] == same
    reduced = np.asarray(large.resize((64, 64), Image.Resampling.BOX), dtype=float)
    assert np.abs(reduced - np.asarray(small)).mean() < 8


def test_a_picture_depends_on_its_number_alone(emoji):
    held = held_back(emoji)
    assert len(held) == 6 and {style for _, style in held} == set(STYLES)
    pictures = [Pictures(emoji, emoji, held, seed=0) for _ in range(2)]
    assert not set(held) & set(pictures[0].emoji["train"])
    for i in (5, 0, 17, 5):
        (x, caption), (again, same) = pictures[0][i], pictures[1][i]
        assert x.shape == (3, 128, 128) and torch.equal(x, again) and caption == same
        assert -1 <= x.min() and x.max() <= 1


# --- training ---

def test_a_trained_model_draws_128_pixels_and_goes_on(tmp_path, monkeypatch, emoji):
    monkeypatch.setattr(decoder, "load_large", lambda folder: emoji)

    def train(steps: int) -> StableDiffusion:
        words = ["decoder.py", "--out", str(tmp_path), "--steps", str(steps), "--batch", "2",
                 "--unet-share", "1", "--gan", "0.1", "--gan-start", "1", "--workers", "0", "--all"]
        monkeypatch.setattr(sys, "argv", words)
        decoder.main()
        return StableDiffusion.load(tmp_path / "model.safetensors", "cpu", torch.float32)

    base = StableDiffusion.load(None, "cpu", torch.float32)
    first, second = train(1), train(2)
    assert torch.load(tmp_path / "state.pt")["step"] == 2
    assert first.generate("a red apple", steps=1)[0].size == (128, 128)
    for name, tensor in base.state_dict().items():  # all but the decoder is as it was
        if not name.startswith(("first_stage_model.decoder", "first_stage_model.post_quant")):
            torch.testing.assert_close(first.state_dict()[name], tensor, atol=1e-3, rtol=1e-3)
    monkeypatch.setattr(sys, "argv", ["decoder.py", "--out", str(tmp_path / "x"), "--all",
                                      "--ch-mult", "1", "1", "2", "2", "4"])
    with pytest.raises(SystemExit, match="a larger decoder already: give --ch-mult 1 1 2 4 4"):
        decoder.main()
    weight = "conv_out.weight"
    assert not torch.equal(*(sd.vae.decoder.state_dict()[weight] for sd in (first, second)))
