"""The autoencoder's parts. At full size against diffusers: test_sd.py."""
import torch
from torch import nn

from tests.common import SMALL, randomize
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
