"""extras/files.py and edit.py: pictures of odd kinds, for --init, --mask and training."""
import warnings

import numpy as np
import pytest
from PIL import Image

from extras import edit, files
from extras.captions import Sample
from extras.data import crop, load_or_error
from extras.files import on_white, read_image
from sd import UserError
from tests.common import levels_apart, photograph, random_model

GRAY = np.full((64, 64), 100, np.uint8)


@pytest.fixture(scope="module")
def sd():
    return random_model()


@pytest.mark.parametrize("name, image", {
    "16 bits.png": Image.fromarray(GRAY.astype(np.uint16) * 257),
    "16 bits.tif": Image.fromarray(GRAY.astype(np.uint16) * 257),
    "32 bits.tif": Image.fromarray(GRAY.astype(np.int32) * 257),
    "8 bits in 32.tif": Image.fromarray(GRAY.astype(np.int32)),
    "floats to 1.tif": Image.fromarray((GRAY / 255).astype(np.float32)),
    "floats to 255.tif": Image.fromarray(GRAY.astype(np.float32)),
    "8 bits.png": Image.fromarray(GRAY)}.items())
def test_grays_are_kept(name, image, tmp_path):
    """100 of 255 stays 100, where Pillow alone makes 255 or 0 of it; in training too."""
    image.save(tmp_path / name)
    seen = read_image(tmp_path / name)
    assert seen.mode == "RGBA" and seen.getpixel((3, 3)) == (100, 100, 100, 255)
    pixels = crop(Sample("x", tmp_path / name, ["x"]), [(32, 32)]).pixels
    assert pixels.unique().tolist() == [100]


def test_dark_picture_of_16_bits_stays_dark(tmp_path):
    Image.fromarray(np.full((8, 8), 257, np.uint16)).save(tmp_path / "x.png")
    assert read_image(tmp_path / "x.png").getpixel((0, 0))[:3] == (1, 1, 1)


def test_not_a_number_is_black(tmp_path):
    values = np.full((8, 8), np.nan, np.float32)
    values[0, 0], values[1, 1], values[2, 2] = 1, -5, np.inf
    Image.fromarray(values).save(tmp_path / "x.tif")
    seen = np.asarray(read_image(tmp_path / "x.tif"))[..., 0]
    assert seen[0, 0] == 255 and seen.sum() == 255


@pytest.mark.parametrize("compression", [None, "tiff_lzw"])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16, np.int32])
def test_tiffs_are_turned(kind, compression, tmp_path):
    """Of all eight orientations, as the same picture in a PNG."""
    values = np.zeros((4, 8), np.uint8)
    values[:, 0], values[0] = 255, 100
    wide = values.astype(kind) * (1 if kind == np.uint8 else 257)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
        Image.fromarray(wide).save(tmp_path / "x.tif", tiffinfo={0x0112: orientation},
                                   compression=compression)
        wanted, seen = (np.asarray(read_image(tmp_path / name)) for name in ("x.png", "x.tif"))
        assert np.array_equal(seen, wanted)


def test_picture_of_16_bits_is_turned(tmp_path):
    values = np.zeros((4, 8), np.uint16)
    values[:, 0] = 65535
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(values).save(tmp_path / "x.png", exif=exif)
    seen = np.asarray(read_image(tmp_path / "x.png"))[..., 0]
    assert seen.shape == (8, 4) and (seen[0] == 255).all() and seen.sum() == 4 * 255


@pytest.mark.parametrize("kind", ["EPS", "PCX", "PPM", "TGA", "ICO", "SGI"])
def test_formats_that_are_not_meant_are_not_tried(kind, tmp_path):
    """Whatever the name says: for some of them Pillow starts other programs."""
    Image.new("RGB", (16, 16)).save(tmp_path / "x.png", kind)
    with pytest.raises(UserError, match="cannot read the picture") as error:
        read_image(tmp_path / "x.png")
    assert "\n" not in str(error.value)
    said = load_or_error(Sample("x", (tmp_path / "x.png").read_bytes(), ["x"]), [(8, 8)], True)
    assert "cannot read the picture x" in said


@pytest.mark.parametrize("kind", files.FORMATS)
def test_formats_that_are_meant_are_read(kind, tmp_path):
    Image.new("RGB", (16, 16), (200, 100, 50)).save(tmp_path / "x", kind)
    seen = np.asarray(on_white(read_image(tmp_path / "x")), int)
    assert np.abs(seen - (200, 100, 50)).max() < 12


def test_pixels_are_bounded(tmp_path, monkeypatch):
    Image.new("L", (9000, 9000)).save(tmp_path / "x.png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserError, match="9000x9000 pixels, and at most 67108864"):
            read_image(tmp_path / "x.png")


def test_what_is_no_picture_is_told_in_a_line(tmp_path):
    photograph().save(tmp_path / "cut.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "cut.jpg").read_bytes()[:-200])
    (tmp_path / "text.png").write_text("hello")
    for path in (tmp_path / "cut.jpg", tmp_path / "text.png", tmp_path, tmp_path / "gone.png"):
        with pytest.raises(UserError, match="cannot read the picture") as error:
            read_image(path)
        assert "\n" not in str(error.value)


# --- masks ---

PICTURE = Image.new("RGBA", (64, 64), (200, 100, 50, 255))
HALF = Image.new("L", (64, 64))
HALF.paste(255, (0, 0, 32, 64))


def painted(background, color) -> Image.Image:
    """The left half in a color."""
    mask = Image.new("RGBA", (64, 64), background)
    mask.paste(color, (0, 0, 32, 64))
    return mask


NEARLY_BLACK = Image.fromarray(np.where(np.asarray(HALF) > 0, 65535, 300).astype(np.uint16))


@pytest.mark.parametrize("mask", [
    HALF, HALF.convert("RGB"), HALF.convert("1"),
    painted((255, 255, 255, 0), (255, 255, 255, 255)), painted((0, 0, 0, 0), (255, 255, 255, 255)),
    painted((200, 100, 50, 255), (200, 100, 50, 0)), NEARLY_BLACK,
    Image.fromarray(np.asarray(HALF).astype(np.uint16) * 257)])
def test_half_of_the_picture_is_masked(mask, tmp_path):
    """Also by white strokes on transparent, and by the picture itself with a hole."""
    mask.save(tmp_path / "mask.png")
    found = edit.mask_of_drawing(read_image(tmp_path / "mask.png"), PICTURE)
    assert levels_apart(edit.black_and_white(found), HALF) == 0 and not edit.is_soft(found)


@pytest.mark.parametrize("mask, most", [
    (Image.new("L", (64, 64)), 0), (HALF.point(lambda value: value // 255), 1),
    (painted((0, 0, 0, 0), (0, 0, 0, 255)), 0), (Image.new("RGBA", (64, 64)), 0)])
def test_mask_that_redraws_nothing_is_refused(sd, mask, most):
    with pytest.raises(UserError, match=f"largest value is {most} of 255"):
        edit.draw(sd, "a cat", PICTURE, mask, steps=1)


@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_soft_masks_blend(sd, strength):
    """Black stays to the pixel, white is as with a hard mask, and gray lies in between."""
    image = Image.new("RGB", (64, 64), "red")
    ramp = Image.fromarray(np.tile(np.linspace(-64, 319, 64).clip(0, 255), (64, 1)).astype("uint8"))
    assert edit.is_soft(ramp)
    drawn, hard = (np.asarray(edit.draw(sd, "a cat", image, mask, strength, steps=3)[0], float)
                   for mask in (ramp, edit.black_and_white(ramp)))
    moved = np.abs(drawn - np.asarray(image)).mean((0, 2))
    black = np.asarray(ramp)[0] == 0
    assert moved[black].max() == 0 and moved[-4:].min() > 10
    assert np.abs(np.diff(moved)).max() < np.abs(np.diff(np.abs(
        hard - np.asarray(image)).mean((0, 2)))).max()


def test_gray_rim_is_no_soft_mask():
    """Of an edge drawn smoothly, or as JPEG leaves it."""
    large = Image.new("L", (640, 640))
    large.paste(255, (200, 150, 500, 470))
    assert not edit.is_soft(large.resize((64, 64), Image.Resampling.BILINEAR))
    assert edit.is_soft(Image.new("L", (64, 64), 100))
