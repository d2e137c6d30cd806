"""extras/vae_loss.py and extras/vq.py: the autoencoder's losses, codes and discriminator."""
import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file

from extras import vae_loss
from extras.sheets import sheet
from extras.vae_loss import kl_divergence
from sd import StableDiffusion
from tests.training import five, metrics, original_signals, tiny, trained  # noqa: F401


def test_kl_divergence_is_that_of_gaussians():
    mean, logvar = torch.randn(3, 4, 5, 5), torch.randn(3, 4, 5, 5)
    normal = torch.distributions.Normal
    wanted = torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(0, 1))
    torch.testing.assert_close(kl_divergence(mean, logvar), wanted.sum() / 3)


def test_vae_with_codes_and_discriminator(tiny, five, tmp_path, capsys):  # noqa: F811
    """VQ starts at latents and its loss falls.

    The discriminator learns from the first step and changes the decoder from --disc-start on.
    """
    common = ["--data", five, "--init", tiny, "--train", "vae", "--batch", 5, "--device", "cpu",
              "--warmup", 0, "--lr", 1e-3, "--log-every", 1]
    out = trained(capsys, *common, "--vq", 16, "--steps", 60, "--out", tmp_path / "vq")
    losses = [line["loss"] for line in metrics(tmp_path / "vq")]
    saved = load_file(tmp_path / "vq/vq.safetensors")
    codes = saved["first_stage_model.quantize.embedding.weight"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5])
    assert codes.shape == (16, 4) and codes.std() > 1 / 16 and "dB PSNR" in out

    decoders, params = {}, {}
    runs = {"plain": [], "unheard": ["--disc-weight", 0.5, "--disc-start", 4],
            "heard": ["--disc-weight", 0.5, "--disc-start", 2]}
    for name, more in runs.items():
        trained(capsys, *common, "--max-grad-norm", 1e9, "--steps", 4, "--sample-every", 0,
                "--out", tmp_path / name, *more)
        sd = StableDiffusion.load(tmp_path / name / "model.safetensors")
        decoders[name] = sd.vae.decoder.conv_out.weight
        params[name] = torch.load(tmp_path / name / "state.pt")["params"]
    assert torch.allclose(decoders["plain"], decoders["unheard"], atol=1e-6)
    assert not torch.allclose(decoders["plain"], decoders["heard"], atol=1e-4)
    torch.manual_seed(0)
    first = vae_loss.discriminator(32)[0].weight
    learned = [p for p in params["unheard"][len(params["plain"]):] if p.shape == first.shape]
    assert len(learned) == 1 and (learned[0] - first).abs().mean() > 5e-4


def test_sheets_carry_captions():
    """Below each picture, wrapped; pictures of 64 pixels are drawn at twice the size."""
    pictures = [(Image.new("RGB", (64, 64), "red"), "a red square, and much more to say of it"),
                (Image.new("RGB", (64, 64), "blue"), "")]
    page = sheet(pictures, columns=2)
    assert page.width == 2 * 128 and page.height > 128 + 12
    pixels = np.asarray(page).astype(int)
    assert (pixels[:128, :128] == (255, 0, 0)).all() and (pixels[:128, 128:] == (0, 0, 255)).all()
    assert (pixels[128:, :128] < 100).any() and (pixels[128:, 128:] == 255).all()
