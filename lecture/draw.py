"""How the chapters draw, with Pillow and numpy: sheets of pictures, heat maps, matrices, plots."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

# the chapters import sd, model, ... from the folder above
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from extras.files import atomic_write, make_folder
from sd import UserError

HEAT = np.array([[10, 10, 60], [90, 20, 120], [200, 50, 80], [250, 140, 40], [255, 245, 190]])


def run(chapter: Callable[[argparse.Namespace], None], doc: str, **options: dict) -> None:
    """The command line of a chapter: its docstring, --out, --quick and its own options.

    A UserError is printed in one line, and the exit status is then 2.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lecture/out"),
                        help="folder for the pictures (default lecture/out)")
    parser.add_argument("--quick", action="store_true",
                        help="a run of a few seconds that shows that all works and teaches little")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args()
    try:
        make_folder(args.out)
        chapter(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


# --- files ---

def save(image: Image.Image, path: Path) -> None:
    """Write a PNG and print its path."""
    with atomic_write(path) as temporary:
        image.save(temporary, "PNG")
    print(f"wrote {path}")


def save_gif(frames: list[Image.Image], path: Path, seconds: float = 0.1,
             colors: int | None = None) -> None:
    """Write a film that repeats. Its last frame stays for a second.

    With `colors` all frames together have only so many colours, which makes a smaller file.
    """
    if colors is not None:
        palette = palette_of(frames, colors)
        frames = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE)
                  for frame in frames]
    milliseconds = [int(1000 * seconds)] * (len(frames) - 1) + [1000]
    with atomic_write(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:],
                       duration=milliseconds, loop=0)
    print(f"wrote {path}")


def palette_of(pictures: list[Image.Image], colors: int) -> Image.Image:
    """The best `colors` colours for pictures of one size, as Image.quantize takes them.

    They are chosen from every ninth pixel of about six of the pictures.
    """
    some = pictures[::max(1, len(pictures) // 6)]
    sampled = [np.asarray(picture.convert("RGB"))[::3, ::3] for picture in some]
    return Image.fromarray(np.concatenate(sampled)).quantize(colors, kmeans=3)


# --- pages ---

def text_width(text: str, size: int) -> int:
    """The width of a text in pixels."""
    return int(ImageDraw.Draw(Image.new("L", (1, 1))).textlength(text, font_size=size))


def sheet(rows: list[list[Image.Image]], across: list[str] = (), down: list[str] = (),
          side: int = 96) -> Image.Image:
    """Rows of pictures, each `side` high, with titles above the columns and beside the rows."""
    top = 16 if across else 0
    left = 8 + max(text_width(title, 10) for title in down) if down else 0
    pictures = [[resized(picture, side) for picture in row] for row in rows]
    column = max(picture.width for row in pictures for picture in row) + 2
    size = (left + column * max(map(len, pictures)), top + (side + 2) * len(pictures))
    page = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(page)
    for j, title in enumerate(across):
        pen.text((left + j * column + column // 2, 2), title, "black", anchor="ma", font_size=10)
    for i, row in enumerate(pictures):
        y = top + i * (side + 2)
        if down:
            pen.text((left - 4, y + side // 2), down[i], "black", anchor="rm", font_size=10)
        for j, picture in enumerate(row):
            page.paste(picture, (left + j * column, y))
    return page


def resized(picture: Image.Image, height: int) -> Image.Image:
    """The picture at this height. Small ones keep their square pixels."""
    enlarged = picture.height < height
    method = Image.Resampling.NEAREST if enlarged else Image.Resampling.LANCZOS
    width = round(height * picture.width / picture.height)
    return picture.convert("RGB").resize((width, height), method)


def beside(pages: list[Image.Image], title: str = "") -> Image.Image:
    """Pictures in a row at their own sizes, lower edges aligned, below a title."""
    top = 26 if title else 0
    width = sum(page.width + 14 for page in pages) - 14
    whole = Image.new("RGB", (width, top + max(page.height for page in pages)), "white")
    ImageDraw.Draw(whole).text((width // 2, 4), title, "black", anchor="ma", font_size=15)
    x = 0
    for page in pages:
        whole.paste(page, (x, whole.height - page.height))
        x += page.width + 14
    return whole


# --- arrays ---

def heat(a: np.ndarray, low: float | None = None, high: float | None = None) -> Image.Image:
    """An array (H, W) in colours, from dark blue (`low`) through red to light yellow (`high`).

    `low` and `high` are the array's own lowest and highest values unless given.
    """
    a = np.asarray(a, dtype=np.float64)
    low = a.min() if low is None else low
    high = a.max() if high is None else high
    u = np.clip((a - low) / max(high - low, 1e-12), 0, 1)
    channels = [np.interp(u, np.linspace(0, 1, len(HEAT)), HEAT[:, c]) for c in range(3)]
    return Image.fromarray(np.uint8(np.stack(channels, axis=-1)))


def grid(a: np.ndarray, across: list[str | Image.Image], down: list[str], title: str = "",
         cell: int = 30, low: float | None = None, high: float | None = None,
         mark: list[tuple[int, int]] = ()) -> Image.Image:
    """A matrix (rows, columns) as cells in the colours of `heat`, with its numbers in them.

    Columns are titled by upright texts or by pictures, rows by texts. The cells in `mark` are
    framed. NaN stays white.
    """
    a = np.asarray(a, dtype=np.float64)
    low = np.nanmin(a) if low is None else low
    high = np.nanmax(a) if high is None else high
    widths = [0 if isinstance(head, Image.Image) else text_width(head, 11) for head in across]
    left = 8 + max(text_width(text, 11) for text in down)
    top = 24 + (max(widths) if max(widths) > 0 else cell)
    page = Image.new("RGB", (left + cell * a.shape[1] + 1, top + cell * a.shape[0] + 1), "white")
    pen = ImageDraw.Draw(page)
    pen.text((left + cell * a.shape[1] // 2, 2), title, "black", anchor="ma", font_size=12)
    for j, head in enumerate(across):
        if isinstance(head, Image.Image):
            small = head.convert("RGB").resize((cell - 2, cell - 2), Image.Resampling.LANCZOS)
            page.paste(small, (left + cell * j + 1, top - cell))
        else:
            strip = upright(head, widths[j])
            page.paste(strip, (left + cell * j + cell // 2 - 7, top - widths[j] - 6))
    for i, text in enumerate(down):
        y = top + cell * i + cell // 2
        pen.text((left - 4, y), text, "black", anchor="rm", font_size=11)
    fill_cells(pen, a, (left, top), cell, heat(np.nan_to_num(a), low, high))
    for i, j in mark:
        x, y = left + cell * j, top + cell * i
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), outline="cyan", width=2)
    return page


def upright(text: str, width: int) -> Image.Image:
    """A text that reads upwards."""
    strip = Image.new("RGB", (width + 4, 14), "white")
    ImageDraw.Draw(strip).text((0, 7), text, "black", anchor="lm", font_size=11)
    return strip.rotate(90, expand=True)


def fill_cells(pen: ImageDraw.ImageDraw, a: np.ndarray, corner: tuple[int, int], cell: int,
               colors: Image.Image) -> None:
    """The cells of `grid`: a square of its colour for each number, and the number if it fits."""
    for i, j in np.argwhere(~np.isnan(a)).tolist():
        x, y, color = corner[0] + cell * j, corner[1] + cell * i, colors.getpixel((j, i))
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=color)
        if cell >= 24:
            number = f"{round(a[i, j], 2) + 0.0:.2f}"  # + 0.0: never -0.00
            ink = "black" if sum(color) > 330 else "white"
            pen.text((x + cell // 2, y + cell // 2), number, ink, anchor="mm", font_size=10)


class Plot:
    """A square of the plane on a white page, for points, arrows and lines.

    x lies in `span` = (low, high), y in `yspan`, which is `span` unless given.
    """

    def __init__(self, span: tuple[float, float], side: int = 320, title: str = "",
                 yspan: tuple[float, float] | None = None):
        self.span, self.side = span, side
        self.yspan = span if yspan is None else yspan
        self.image = Image.new("RGB", (side, side + 16), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.pen.text((side // 2, 2), title, "black", anchor="ma", font_size=11)
        self.pen.rectangle((0, 16, side - 1, side + 15), outline="lightgray")

    def at(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the plane -> pixels (N, 2). y points upwards."""
        points = np.asarray(points, dtype=np.float64)
        u = (points[:, 0] - self.span[0]) / (self.span[1] - self.span[0])
        v = (points[:, 1] - self.yspan[0]) / (self.yspan[1] - self.yspan[0])
        return np.stack([u * self.side, 16 + (1 - v) * self.side], axis=1)

    def background(self, image: Image.Image) -> None:
        """A picture of any size, below all that is drawn later."""
        size = (self.side - 2, self.side - 2)
        self.image.paste(image.convert("RGB").resize(size, Image.Resampling.BILINEAR), (1, 17))

    def points(self, points: np.ndarray, color: str = "royalblue", r: float = 1.2) -> None:
        for x, y in self.at(points):
            if y > 16:
                self.pen.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def line(self, points: np.ndarray, color: str = "black", width: int = 1) -> None:
        self.pen.line([tuple(p) for p in self.at(points)], fill=color, width=width)

    def arrows(self, points: np.ndarray, vectors: np.ndarray, color: str = "black",
               length: float = 14) -> None:
        """Arrows at the points (N, 2). The longest has `length` pixels.

        The length of an arrow grows with the square root of its vector's.
        """
        size = np.linalg.norm(vectors, axis=1, keepdims=True)
        unit = vectors / np.maximum(size, 1e-12) * np.array([1, -1])
        steps = unit * np.sqrt(size / max(size.max(), 1e-12)) * length
        for (x, y), (dx, dy) in zip(self.at(points), steps):
            tip = (x + dx, y + dy)
            self.pen.line((x, y, *tip), fill=color)
            for side in (1, -1):
                barb = (x + 0.7 * dx - side * 0.25 * dy, y + 0.7 * dy + side * 0.25 * dx)
                self.pen.line((*tip, *barb), fill=color)
