"""Chapter 6 against closed forms and known numbers."""
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.distributions import Independent, Normal
from torch.distributions import kl_divergence as kl_of

from tests.forked import run_forked

sys.path.insert(0, str(Path(__file__).parent))
import draw
import latents as chapter

from extras.vae_loss import kl_divergence
from extras.vq import VectorQuantizer, VQModel
from sd import PRESETS, StableDiffusion, pixels
from vae import AutoencoderKL

torch.set_num_threads(1)
SCRIPT = Path(chapter.__file__)


def randn(*size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


# --- the regularisers ---


def test_kl_formula():
    mean, logvar = randn(3, 4, 5, 5), randn(3, 4, 5, 5, seed=1)
    latent = Independent(Normal(mean, (0.5 * logvar).exp()), 3)
    expected = kl_of(latent, Independent(Normal(torch.zeros(3, 4, 5, 5), 1.0), 3)).mean()
    assert torch.allclose(kl_divergence(mean, logvar), expected)
    assert kl_divergence(torch.zeros(2, 4, 3, 3), torch.zeros(2, 4, 3, 3)) == 0
    assert math.isclose(
        float(kl_divergence(torch.full((1, 1, 1, 1), 2.0), torch.zeros(1, 1, 1, 1))), 2.0
    )  # 1/2 mean^2


def test_kl_is_what_training_adds():
    net, x = chapter.make(8), chapter.landscapes(2, 64, seed=0)
    with torch.no_grad():
        mean, logvar = net.moments(x)
        added = chapter.reconstruct(net, x)[1]
    expected = (
        kl_of(Normal(mean, (0.5 * logvar).exp()), Normal(torch.zeros_like(mean), 1.0)).sum() / 2
    )
    assert torch.allclose(added, 1e-6 * expected, rtol=1e-4)


def test_vq_of_a_code_is_lossless():
    torch.manual_seed(0)
    quantizer = VectorQuantizer(32, 4)
    torch.nn.init.normal_(quantizer.embedding.weight)
    codes = torch.randint(32, (2, 5, 7))
    z = quantizer.embedding.weight[codes].movedim(-1, 1)
    q, loss, found = quantizer(z)
    assert torch.equal(q, z) and torch.equal(found, codes) and loss == 0


def test_vq_takes_the_nearest_code_and_lets_gradients_pass():
    quantizer = VectorQuantizer(3, 2)
    with torch.no_grad():
        quantizer.embedding.weight.copy_(torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0]]))
    z = torch.tensor([[1.0, 2.0], [9.0, 4.0], [4.0, 9.0]]).T.reshape(1, 2, 1, 3).requires_grad_()
    q, loss, codes = quantizer(z)
    assert codes.tolist() == [[[0, 1, 2]]]
    assert math.isclose(
        loss.item(), 1.25 * (5 + 17 + 17) / 6, rel_tol=1e-6
    )  # both terms; 6 numbers
    weight = randn(*q.shape)
    (q * weight).sum().backward()
    assert torch.equal(z.grad, weight)


def test_codes_alone_are_the_picture():
    net, x = chapter.make(4, vq=True), chapter.landscapes(2, 64, seed=0)
    *_, _ = chapter.train(net, x, 1)
    with torch.no_grad():
        y, _, codes = net(x)
        again = chapter.decode_codes(net, codes)
    assert codes.shape == (2, 16, 16) and 0 <= codes.min() and codes.max() < chapter.CODES
    assert torch.allclose(again, y, atol=1e-4)
    with torch.no_grad():
        assert not torch.allclose(chapter.decode_codes(net, codes.flip(0)), y, atol=1e-2)


# --- sizes ---


def test_stable_diffusions_numbers(capsys):
    chapter.sizes()
    printed = capsys.readouterr().out
    for known in (
        "3 x 512 x 512",
        "786,432",
        "4 x 64 x 64",
        "16,384",
        "48 times",
        "83,653,863",
        "34,163,592",
        "49,490,179",
    ):
        assert known in printed
    assert abs(2 * chapter.multiply_adds(PRESETS["sd1"].unet, 64) / 1e9 - 803) < 1


@pytest.mark.parametrize("f", [2, 4, 8, 16])
def test_every_f_gives_its_latent_size(f):
    x = chapter.landscapes(1, 64, seed=0)
    for vq in (False, True):
        net = chapter.make(f, vq)
        assert isinstance(net, VQModel if vq else AutoencoderKL)
        y, z, _ = chapter.look(net, x)
        assert z.shape == (1, 4, 64 // f, 64 // f) and y.shape == x.shape
        assert chapter.from_nothing(net, z).shape == x.shape


def test_trade_off_table(capsys):
    chapter.trade_off(
        {f"KL, f = {f}": [(0, 1.0), (9, 10.0 + f)] for f in (2, 4, 8, 16)}, timed=(16,)
    )
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[-5:]]
    assert [row[0] for row in rows] == ["1", "2", "4", "8", "16"]
    assert ["".join(row[1:6]) for row in rows] == [
        "3x256x256",
        "4x128x128",
        "4x64x64",
        "4x32x32",
        "4x16x16",
    ]
    assert [row[6:8] for row in rows] == [
        ["196,608", "1x"],
        ["65,536", "3x"],
        ["16,384", "12x"],
        ["4,096", "48x"],
        ["1,024", "192x"],
    ]
    assert [row[8] for row in rows] == ["exact", "12.0", "14.0", "18.0", "26.0"]
    assert [row[-1] for row in rows[:4]] == ["run"] * 4 and float(rows[4][-1]) > 0
    work = [float(row[9]) for row in rows]
    assert all(
        4 * small < large for large, small in zip(work, work[1:4])
    )  # an area of 4 times costs more than that: attention


# --- pictures ---


def test_psnr_of_known_errors():
    x = torch.zeros(2, 3, 8, 8)
    assert math.isclose(chapter.psnr(x + 0.2, x), 20.0, abs_tol=1e-4)  # a tenth of the range
    both = x + torch.tensor([0.2, 0.02])[:, None, None, None]
    assert math.isclose(chapter.psnr(both, x), 30.0, abs_tol=1e-3)  # the mean of 20 and 40 dB
    assert math.isclose(
        chapter.psnr(x + 7, x + 0.8), 20.0, abs_tol=1e-4
    )  # what lies beyond white is white


def test_landscapes():
    a, b = chapter.landscapes(4, 32, seed=3), chapter.landscapes(4, 32, seed=3)
    assert a.shape == (4, 3, 32, 32) and torch.equal(a, b) and a.min() >= -1 and a.max() <= 1
    assert not torch.equal(a, chapter.landscapes(4, 32, seed=4)) and a.std(0).mean() > 0.1
    assert (pixels([chapter.to_pil(a[0])])[0] - a[0]).abs().max() <= 1 / 255 + 1e-6


def test_best_sketch_finds_the_matrix():
    z, matrix, shift = randn(2, 4, 6, 5), randn(3, 4, seed=1), randn(3, seed=2)
    small = torch.einsum("cz,bzhw->bchw", matrix, z) + shift[:, None, None]
    x = small.repeat_interleave(8, 2).repeat_interleave(8, 3)
    assert torch.allclose(chapter.best_rgb(z, x), small, atol=1e-4)
    noise = randn(2, 3, 6, 5, seed=3)
    left = noise - chapter.best_rgb(z, noise.repeat_interleave(8, 2).repeat_interleave(8, 3))
    assert left.mean((0, 2, 3)).abs().max() < 1e-5  # least squares: the rest is orthogonal
    assert torch.einsum("bchw,bzhw->cz", left, z).abs().max() < 1e-4


def test_first_three_channels():
    z = torch.stack([torch.full((2, 2), v) for v in (-2.0, 0.0, 2.0, 9.0)])[None]
    assert chapter.to_pil(chapter.first_three(z)[0]).getpixel((1, 1)) == (0, 128, 255)


def test_a_sample_is_as_far_from_the_mode_as_the_encoder_says():
    sd = StableDiffusion.load(device="cpu", dtype=torch.float32)
    image = chapter.to_pil(chapter.landscapes(1, 128, seed=5)[0])
    mode, noise = sd.encode_image([image]), randn(1, sd.preset.vae.z_channels, 8, 8)
    with torch.no_grad():
        std = (0.5 * sd.vae.moments(pixels([image]))[1]).exp() * sd.preset.vae.scale_factor
    assert torch.allclose(sd.encode_image([image], noise) - mode, std * noise, atol=1e-4)
    picture, back, first, sketch = chapter.round_trip(sd, "a landscape", image)
    assert picture is image and back.size == (128, 128) and first.size == sketch.size == (8, 8)
    assert chapter.psnr(pixels([back]), pixels([image])) > 18
    assert chapter.psnr(pixels([sketch]), chapter.shrunk(pixels([image]), mode)) > 20


# --- training ---


@pytest.mark.parametrize("vq", [False, True])
def test_training_teaches(vq):
    pictures, tests = chapter.landscapes(64, 64, seed=0), chapter.landscapes(4, 64, seed=1)
    net = chapter.make(8, vq)
    curve = chapter.learn("", net, pictures, tests, steps=12, every=6)
    assert [step for step, _ in curve] == [0, 6, 12]
    grey = chapter.psnr(
        tests.mean((2, 3), keepdim=True).mean(0, keepdim=True).expand_as(tests), tests
    )
    assert curve[-1][1] > curve[0][1] + 4 and curve[-1][1] > grey
    _, z, _ = chapter.look(net, pictures)
    assert abs(float(z.std()) - 1) < 1e-3  # scaled latents


def test_same_seed_same_numbers():
    pictures, curves = chapter.landscapes(4, 64, seed=0), []
    for _ in range(2):
        torch.rand(3)
        curves.append(chapter.learn("", chapter.make(16), pictures, pictures, steps=2, every=1))
    assert curves[0] == curves[1] and curves[0][0] != curves[0][2]


# --- the command ---


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents")
    Image.fromarray(
        (torch.rand(60, 88, 4, generator=torch.Generator().manual_seed(0)) * 255).byte().numpy()
    ).save(folder / "photo.png")
    done = run_forked(SCRIPT, "--quick", "--out", folder, "--photo", folder / "photo.png")
    return folder, done


def test_quick_run(quick):
    folder, done = quick
    assert done.returncode == 0, done.stderr
    for name in "latents.png", "latents-training.png":
        with Image.open(folder / name) as picture:
            assert 400 < picture.width <= 900
        assert (folder / name).stat().st_size <= 150_000
    assert "the photo, 3 x 48 x 80 -> 16 x 3 x 5" in done.stdout  # 88 x 60, cut to multiples of 16
    std = float(re.search(r"an emoji.*std ([\d.]+)", done.stdout)[1])
    assert 0.7 < std < 1.3  # 1 over the pictures the model was made for


def test_photo_is_put_on_white_shrunk_and_cut(tmp_path):
    Image.new("RGBA", (1000, 601), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    photo = chapter.read_photo(tmp_path / "clear.png", 8)
    assert photo.size == (512, 304) and photo.getpixel((3, 3)) == (255, 255, 255)


def error_line(capsys, monkeypatch, *options) -> str:
    """The one line that the command prints for a user's error."""
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), "--quick", *map(str, options)])
    with pytest.raises(SystemExit) as stopped:
        draw.run(chapter.main, "", photo={}, ckpt={})
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1
    return error


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("gone.png", None, "cannot read the picture"),
        ("text.png", b"not a picture", "cannot read the picture"),
        ("tiny.png", (7, 40), "at least 16x16"),
    ],
)
def test_wrong_photo_gets_one_line(tmp_path, capsys, monkeypatch, name, content, words):
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    elif content is not None:
        Image.new("RGB", content).save(tmp_path / name)
    error = error_line(capsys, monkeypatch, "--out", tmp_path, "--photo", tmp_path / name)
    assert words in error and name in error


def test_other_wrong_use_gets_one_line(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("")
    assert "cannot write into" in error_line(capsys, monkeypatch, "--out", tmp_path / "file" / "x")
    assert (
        "no such file"
        in error_line(
            capsys, monkeypatch, "--out", tmp_path, "--ckpt", tmp_path / "gone.safetensors"
        ).lower()
    )
