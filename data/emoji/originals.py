"""Render the emoji of train/ and rest/ at 128 pixels, from originals that are larger than that.

    pip install resvg-py fonttools brotli
    python data/emoji/prepare.py && python data/emoji/originals.py

It writes train128/ and rest128/, with the names and captions of train/ and rest/. Sources (npm
downloads them into .npm/ beside this file):
    @lobehub/fluent-emoji-3d        style "3d"       pictures of 256 pixels, MIT
    @infolektuell/noto-color-emoji  style "noto"     a vector font (COLRv1), Apache-2.0
    @iconify-json/noto              style "noto"     the same artwork as SVG, Apache-2.0
    @discordapp/twemoji             style "twemoji"  SVG files, CC-BY 4.0
The artwork changes from version to version. So each rendering is compared with the picture of 64
pixels. Of two renderings the nearer one is taken, and one that is another drawing is left out.
"""
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import resvg_py
from compose import on_background
from fontTools.ttLib import TTFont
from PIL import Image
from prepare import HERE, NAMES, STYLES, clean, code, members, picture, replaced_folders, stem_of

SIZE = 128
RENDER = 256         # side of the renderings of vector art, in pixels
LEAST_PSNR = 22.0    # dB at 64 pixels; below, it is another drawing
TWEMOJI = ("@discordapp/twemoji", "16.0.1", "package/dist/svg/")
NOTO_FONT = ("@infolektuell/noto-color-emoji", "0.2.0", "package/files/")
NOTO_SVG = ("@iconify-json/noto", "1.2.9", "package/")
# where a glyph of the font lies in Noto's pictures (fitted on 20 of them)
FONT_SIZE, FONT_X, FONT_Y = 218.4, -7.95, 202.6
SVG = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}">{body}</svg>'
Render = Callable[[str], Image.Image | None]  # code points -> RGBA, or None if it has no such


# --- the sources ---

def render_svg(svg: str, **options) -> Image.Image:
    data = resvg_py.svg_to_bytes(svg_string=svg, width=RENDER, height=RENDER,
                                 skip_system_fonts=True, **options)
    return Image.open(io.BytesIO(bytes(data))).convert("RGBA")


def fluent() -> Render:
    found = members(STYLES["3d"], r"[^/]+\.(png|webp)")
    files = {code(name): data for name, data in found.items()}

    def render(codes: str) -> Image.Image | None:
        if codes not in files:
            return None
        return Image.open(io.BytesIO(files[codes])).convert("RGBA")
    return render


def twemoji() -> Render:
    files = {code(name): data for name, data in members(TWEMOJI, r"[^/]+\.svg").items()}

    def render(codes: str) -> Image.Image | None:
        return render_svg(files[codes].decode()) if codes in files else None
    return render


def noto_svg() -> Render:
    files = members(NOTO_SVG, r"(icons|chars)\.json")
    icons = json.loads(files["icons.json"])
    names = {code(codes): name for codes, name in json.loads(files["chars.json"]).items()}

    def render(codes: str) -> Image.Image | None:
        icon = icons["icons"].get(names.get(codes))
        if icon is None:
            return None
        width, height = (icon.get(side, icons.get(side, 16)) for side in ("width", "height"))
        return render_svg(SVG.format(box=f"0 0 {width} {height}", body=icon["body"]))
    return render


def noto_font(folder: Path) -> Render:
    """The font comes in parts, each for some of the characters. It is unpacked into `folder`."""
    parts = {}
    for name, data in sorted(members(NOTO_FONT, r"[^/]+\.woff2").items()):
        font = TTFont(io.BytesIO(data))
        font.flavor = None  # no compression
        path = str(folder / f"{name}.ttf")
        font.save(path)
        parts[path] = set(font.getBestCmap())

    def render(codes: str) -> Image.Image | None:
        characters = [int(one, 16) for one in codes.split("-")]
        files = [path for path, has in parts.items() if has.issuperset(characters)]
        if not files:
            return None
        body = (f'<text x="{FONT_X}" y="{FONT_Y}" font-size="{FONT_SIZE}"'
                f' font-family="Noto Color Emoji">{"".join(map(chr, characters))}</text>')
        return render_svg(SVG.format(box=f"0 0 {RENDER} {RENDER}", body=body),
                          font_files=files[:1])
    return render


# --- the folders ---

def reduced(image: Image.Image, size: int) -> Image.Image:
    """The picture in a square of that size, as prepare.py makes it."""
    data = io.BytesIO()
    image.save(data, "png", compress_level=0)
    return picture(data.getvalue(), size)


def psnr(image: Image.Image, small: Image.Image) -> float:
    """Of the picture, reduced to the size of the small one; both on white."""
    a, b = (np.asarray(on_background(one), dtype=np.float64) / 255
            for one in (reduced(image, small.width), small))
    return -10 * np.log10(np.square(a - b).mean() + 1e-9)


def nearest(images: list[Image.Image], small: Image.Image) -> Image.Image | None:
    """The picture most like the small one, or None if all are other drawings."""
    best = max(images, key=lambda image: psnr(image, small), default=None)
    if best is None or psnr(best, small) < LEAST_PSNR:
        return None
    return best


def write(split: str, folder: Path, codes_of: dict[str, str],
          renders: dict[str, list[Render]]) -> None:
    counts, left_out = dict.fromkeys(STYLES, 0), []
    for path in sorted((HERE / split).glob("*.png")):
        name, style = path.stem.split(".")
        images = [render(codes_of[name]) for render in renders[style]]
        found = nearest([image for image in images if image], Image.open(path).convert("RGBA"))
        if found is None:
            left_out.append(path.stem)
            continue
        reduced(found, SIZE).save(folder / path.name)
        shutil.copy(path.with_suffix(".txt"), folder)
        counts[style] += 1
    print(f"{split}128/: {sum(counts.values())} pictures ("
          + ", ".join(f"{style} {n}" for style, n in counts.items())
          + f"); {len(left_out)} left out: {' '.join(left_out)}", flush=True)


def main() -> None:
    if not (HERE / "train").exists():
        sys.exit(f"originals.py: no folder {HERE / 'train'}: run data/emoji/prepare.py first")
    codes_of = {}
    for entry in json.loads(members(NAMES, r"en/data\.json")["en/data.json"]):
        # the first of a name, as prepare.py takes it
        codes_of.setdefault(stem_of(clean(entry["label"])), code(entry["hexcode"]))
    with (tempfile.TemporaryDirectory() as fonts,
          replaced_folders(HERE, ["train128", "rest128"]) as folder):
        renders = {"3d": [fluent()], "noto": [noto_font(Path(fonts)), noto_svg()],
                   "twemoji": [twemoji()]}
        for split in ("train", "rest"):
            write(split, folder / f"{split}128", codes_of, renders)


if __name__ == "__main__":
    main()
