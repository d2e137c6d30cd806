"""The autoencoder's parts. At full size against diffusers: test_sd.py."""
from dataclasses import replace

import pytest
import torch
from torch import nn

from extras.checks import checked_preset
from extras.formats import save
from sd import StableDiffusion, UserError, preset_from_dict, preset_to_dict
from tests.common import SMALL, random_model, randomize
from vae import AutoencoderKL, Downsample


def test_log_variance_is_clamped():
    vae = randomize(AutoencoderKL(SMALL.vae))
    vae.quant_conv.bias[4:] = torch.tensor([-99.0, -9.0, 9.0, 99.0])
    _, logvar = vae.moments(torch.rand(1, 3, 16, 16))
    assert logvar.amin((0, 2, 3)).round().tolist()[::3] == [-30, 20]
    assert -12 < logvar[:, 1].mean() < -6 and 6 < logvar[:, 2].mean() < 12


def test_downsample_pads_right_and_bottom_only():
    down, x = Downsample(1).requires_grad_(False), torch.rand(1, 1, 6, 6) + 1
    down.conv.bias.zero_()
    last_tap = nn.functional.pad(x[:, :, 2::2, 2::2], (0, 1, 0, 1))
    for tap, wanted in ((0, 0), x[:, :, ::2, ::2]), ((2, 2), last_tap):
        down.conv.weight.zero_()[0, 0][tap] = 1
        assert torch.equal(down(x), wanted)


def test_a_decoder_with_more_levels_gives_larger_pictures():
    """The encoder reads them reduced; the latents and the files of other models stay the same."""
    x, plain = torch.rand(2, 3, 64, 64) * 2 - 1, random_model()
    same = AutoencoderKL(replace(SMALL.vae, decoder_ch_mult=None))
    same.load_state_dict(plain.vae.state_dict())
    assert torch.equal(same.encode(x), plain.vae.encode(x))
    assert torch.equal(same.decode(same.encode(x)), plain.vae.decode(plain.vae.encode(x)))

    cfg = replace(SMALL.vae, decoder_ch_mult=(1, 1, 2, 4, 4))
    assert (SMALL.vae.downsampling, cfg.downsampling) == (8, 16)
    larger = random_model(replace(SMALL, vae=cfg, size=128))
    larger.vae.encoder.load_state_dict(plain.vae.encoder.state_dict())
    larger.vae.quant_conv.load_state_dict(plain.vae.quant_conv.state_dict())
    wide = nn.functional.interpolate(x, scale_factor=2, mode="bicubic")
    z = larger.vae.encode(wide)
    assert z.shape == (2, 4, 8, 8) and larger.vae.decode(z).shape == (2, 3, 128, 128)
    reduced = nn.functional.interpolate(wide, scale_factor=0.5, mode="bicubic", antialias=True)
    torch.testing.assert_close(z, plain.vae.encode(reduced))
    assert larger.vae.bfloat16().moments(wide.bfloat16())[0].dtype == torch.bfloat16


def test_files_say_whether_the_decoder_has_more_levels(tmp_path):
    """A file of before this field is loaded; diffusers has no such VAE."""
    cfg = replace(SMALL.vae, decoder_ch_mult=(1, 1, 2, 4, 4))
    larger = random_model(replace(SMALL, vae=cfg, size=128))
    save(larger, tmp_path / "larger.safetensors")
    again = StableDiffusion.load(tmp_path / "larger.safetensors", "cpu", torch.float32)
    assert again.preset.vae == cfg
    assert again.generate("a", steps=1)[0].size == (128, 128)
    with pytest.raises(UserError, match="^diffusers has no VAE whose decoder .*[^\n]$"):
        save(larger, tmp_path / "folder")
    assert not (tmp_path / "folder").exists()

    stored = preset_to_dict(SMALL)
    del stored["vae"]["decoder_ch_mult"]
    assert preset_from_dict(stored) == checked_preset("a file", stored) == SMALL
    for ch_mult, reason in ([1, 1, 2], "levels"), ([1, 1, 2, 4, -4], "must lie"):
        stored["vae"]["decoder_ch_mult"] = ch_mult
        with pytest.raises(UserError, match=f"a file: vae: decoder_ch_mult .*{reason}"):
            checked_preset("a file", stored)
