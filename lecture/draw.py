"""What the chapters draw with: Pillow and numpy, nothing else. Pictures are PIL images; fields and maps are numpy arrays."""
import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # so that chapters import sd, model, ... from the folder above
from checkpoint import UserError, make_folder, whole  # noqa: E402


def run(chapter: Callable[[argparse.Namespace], None], doc: str, **options: dict) -> None:
    """The command line of a chapter: its docstring, --out, --quick and its own options; UserError becomes one line."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("lecture/out"), help="folder for the pictures (default lecture/out)")
    parser.add_argument("--quick", action="store_true", help="a few seconds: to see that it runs, not to learn from")
    for name, settings in options.items():
        parser.add_argument(f"--{name}", **settings)
    args = parser.parse_args()
    try:
        make_folder(args.out)
        chapter(args)
    except UserError as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)


def save(image: Image.Image, path: Path) -> None:
    """Whole or not at all, and told."""
    with whole(path) as temporary:
        image.save(temporary, "PNG")
    print(f"wrote {path}")


def save_gif(frames: list[Image.Image], path: Path, seconds: float = 0.1, colors: int | None = None) -> None:
    """An endless film, its last frame held for a second; with `colors`, only so many in all frames together: a smaller file."""
    if colors is not None:
        palette = palette_of(frames, colors)
        frames = [frame.convert("RGB").quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    milliseconds = [int(1000 * seconds)] * (len(frames) - 1) + [1000]
    with whole(path) as temporary:
        frames[0].save(temporary, "GIF", save_all=True, append_images=frames[1:], duration=milliseconds, loop=0)
    print(f"wrote {path}")


def palette_of(pictures: list[Image.Image], colors: int) -> Image.Image:
    """The best so many colours for pictures of one size, found on every ninth pixel of some of them; for Image.quantize."""
    few = [np.asarray(picture.convert("RGB"))[::3, ::3] for picture in pictures[::max(1, len(pictures) // 6)]]
    return Image.fromarray(np.concatenate(few)).quantize(colors, kmeans=3)


def sheet(rows: list[list[Image.Image]], across: list[str] = (), down: list[str] = (), side: int = 96) -> Image.Image:
    """Rows of pictures, each scaled to `side` high, with headings `across` above the columns and `down` beside the rows."""
    width = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    top, left = 16 if across else 0, 8 + int(max(width(word, font_size=10) for word in down)) if down else 0
    pictures = [[p.convert("RGB").resize((round(side * p.width / p.height), side), Image.Resampling.NEAREST if p.height < side else
                                         Image.Resampling.LANCZOS) for p in row] for row in rows]
    column = max(p.width for row in pictures for p in row) + 2
    page = Image.new("RGB", (left + column * max(map(len, pictures)), top + (side + 2) * len(pictures)), "white")
    pen = ImageDraw.Draw(page)
    for j, heading in enumerate(across):
        pen.text((left + j * column + column // 2, 2), heading, "black", anchor="ma", font_size=10)
    for i, row in enumerate(pictures):
        if down:
            pen.text((left - 4, top + i * (side + 2) + side // 2), down[i], "black", anchor="rm", font_size=10)
        for j, picture in enumerate(row):
            page.paste(picture, (left + j * column, top + i * (side + 2)))
    return page


def beside(pages: list[Image.Image], title: str = "") -> Image.Image:
    """Pictures in a row as they are, their lower edges in line, below a title."""
    top = 26 if title else 0
    page = Image.new("RGB", (sum(p.width + 14 for p in pages) - 14, top + max(p.height for p in pages)), "white")
    ImageDraw.Draw(page).text((page.width // 2, 4), title, "black", anchor="ma", font_size=15)
    for i, picture in enumerate(pages):
        page.paste(picture, (sum(p.width + 14 for p in pages[:i]), page.height - picture.height))
    return page


def gray(a: np.ndarray) -> Image.Image:
    """An array (H, W), its least value black and its greatest white."""
    a = np.asarray(a, dtype=np.float64)
    return Image.fromarray(np.uint8(255 * (a - a.min()) / max(np.ptp(a), 1e-12)))


def heat(a: np.ndarray, low: float | None = None, high: float | None = None) -> Image.Image:
    """An array (H, W) in colours: from dark blue (`low`, default its least value) through red to light yellow (`high`)."""
    a = np.asarray(a, dtype=np.float64)
    low, high = a.min() if low is None else low, a.max() if high is None else high
    u = np.clip((a - low) / max(high - low, 1e-12), 0, 1)
    stops = np.array([[10, 10, 60], [90, 20, 120], [200, 50, 80], [250, 140, 40], [255, 245, 190]])
    return Image.fromarray(np.uint8(np.stack([np.interp(u, np.linspace(0, 1, 5), stops[:, c]) for c in range(3)], axis=-1)))


def grid(a: np.ndarray, across: list[str | Image.Image], down: list[str], title: str = "", cell: int = 30,
         low: float | None = None, high: float | None = None, mark: list[tuple[int, int]] = ()) -> Image.Image:
    """A matrix (rows, columns) in the colours of `heat` with its numbers in it; NaN is left white, the cells of `mark` are framed.

    Above the columns stand words, turned upright, or pictures; beside the rows words.
    """
    a = np.asarray(a, dtype=np.float64)
    low, high = np.nanmin(a) if low is None else low, np.nanmax(a) if high is None else high
    width = ImageDraw.Draw(Image.new("L", (1, 1))).textlength
    upright = [0 if isinstance(head, Image.Image) else int(width(head, font_size=11)) for head in across]
    left, top = 8 + int(max(width(word, font_size=11) for word in down)), 24 + (max(upright) if max(upright) else cell)
    page = Image.new("RGB", (left + cell * a.shape[1] + 1, top + cell * a.shape[0] + 1), "white")
    pen = ImageDraw.Draw(page)
    pen.text((left + cell * a.shape[1] // 2, 2), title, "black", anchor="ma", font_size=12)
    for j, head in enumerate(across):
        if isinstance(head, Image.Image):
            page.paste(head.convert("RGB").resize((cell - 2, cell - 2), Image.Resampling.LANCZOS), (left + cell * j + 1, top - cell))
        else:
            strip = Image.new("RGB", (upright[j] + 4, 14), "white")
            ImageDraw.Draw(strip).text((0, 7), head, "black", anchor="lm", font_size=11)
            page.paste(strip.rotate(90, expand=True), (left + cell * j + cell // 2 - 7, top - upright[j] - 6))
    for i, word in enumerate(down):
        pen.text((left - 4, top + cell * i + cell // 2), word, "black", anchor="rm", font_size=11)
    colors = heat(np.nan_to_num(a), low, high)
    for i, j in zip(*np.nonzero(~np.isnan(a))):
        x, y, color = left + cell * int(j), top + cell * int(i), colors.getpixel((int(j), int(i)))
        pen.rectangle((x, y, x + cell - 1, y + cell - 1), fill=color)
        if cell >= 24:
            number = f"{round(a[i, j], 2) + 0.0:.2f}"  # never -0.00
            pen.text((x + cell // 2, y + cell // 2), number, "black" if sum(color) > 330 else "white", anchor="mm", font_size=10)
    for i, j in mark:
        pen.rectangle((left + cell * j, top + cell * i, left + cell * (j + 1) - 1, top + cell * (i + 1) - 1), outline="cyan", width=2)
    return page


class Plot:
    """A square of the plane on a white page: points, arrows, lines. x and y lie in `span` = (low, high)."""

    def __init__(self, span: tuple[float, float], side: int = 320, title: str = "", yspan: tuple[float, float] | None = None):
        self.span, self.yspan, self.side = span, span if yspan is None else yspan, side
        self.image = Image.new("RGB", (side, side + 16), "white")
        self.pen = ImageDraw.Draw(self.image)
        self.pen.text((side // 2, 2), title, "black", anchor="ma", font_size=11)
        self.pen.rectangle((0, 16, side - 1, side + 15), outline="lightgray")

    def at(self, points: np.ndarray) -> np.ndarray:
        """Points (N, 2) of the plane -> pixels, y upwards."""
        points = np.asarray(points, dtype=np.float64)
        u = (points[:, 0] - self.span[0]) / (self.span[1] - self.span[0])
        v = (points[:, 1] - self.yspan[0]) / (self.yspan[1] - self.yspan[0])
        return np.stack([u * self.side, 16 + (1 - v) * self.side], axis=1)

    def background(self, image: Image.Image) -> None:
        """A picture (of any size) below everything drawn after it."""
        self.image.paste(image.convert("RGB").resize((self.side - 2, self.side - 2), Image.Resampling.BILINEAR), (1, 17))

    def points(self, points: np.ndarray, color: str = "royalblue", r: float = 1.2) -> None:
        for x, y in self.at(points):
            if y > 16:
                self.pen.ellipse((x - r, y - r, x + r, y + r), fill=color)

    def line(self, points: np.ndarray, color: str = "black", width: int = 1) -> None:
        self.pen.line([tuple(p) for p in self.at(points)], fill=color, width=width)

    def arrows(self, points: np.ndarray, vectors: np.ndarray, color: str = "black", length: float = 14) -> None:
        """Arrows from the points (N, 2); the longest is `length` pixels, the others in proportion to the root of theirs."""
        size = np.linalg.norm(vectors, axis=1, keepdims=True)
        step = vectors / np.maximum(size, 1e-12) * np.sqrt(size / max(size.max(), 1e-12)) * length * np.array([1, -1])
        for (x, y), (dx, dy) in zip(self.at(points), step):
            self.pen.line((x, y, x + dx, y + dy), fill=color)
            self.pen.line((x + dx, y + dy, x + 0.7 * dx - 0.25 * dy, y + 0.7 * dy + 0.25 * dx), fill=color)
            self.pen.line((x + dx, y + dy, x + 0.7 * dx + 0.25 * dy, y + 0.7 * dy - 0.25 * dx), fill=color)
