"""Pages that train.py draws: sample sheets with captions, and the curve of the loss."""
import textwrap
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from extras.files import atomic_write

LINE_HEIGHT = 12


def save_page(page: Image.Image, path: Path) -> None:
    """Write a .png, whole or not at all. Raises UserError."""
    with atomic_write(path) as temporary:
        page.save(temporary)


def sheet(pictures: list[tuple[Image.Image, str]], columns: int = 8) -> Image.Image:
    """Pictures of one size, row by row, each above its caption. Small ones are enlarged."""
    w, h = pictures[0][0].size
    scale, columns = max(1, round(128 / w)), min(columns, len(pictures))
    w, h = w * scale, h * scale
    captions = [wrap(caption, w) for _, caption in pictures]
    below = LINE_HEIGHT * max(map(len, captions)) + 4
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * w, rows * (h + below)), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for i, (picture, _) in enumerate(pictures):
        x, y = i % columns * w, i // columns * (h + below)
        page.paste(picture.resize((w, h), Image.Resampling.NEAREST), (x, y))
        for n, line in enumerate(captions[i]):
            pen.text((x + 2, y + h + n * LINE_HEIGHT), line, "black", font)
    return page


def wrap(caption: str, width: int, most: int = 3) -> list[str]:
    """The caption in lines that fit into so many pixels; at most three."""
    return textwrap.wrap(caption, max(8, width // 6), max_lines=most, placeholder=" ...")


def curve(steps: list[int], losses: list[float], size: tuple[int, int] = (800, 400),
          margin: int = 50) -> Image.Image:
    """The loss over the steps."""
    page = Image.new("RGB", size, "white")
    pen, (width, height) = ImageDraw.Draw(page), size
    first, last = steps[0], steps[-1]
    low, high = min(losses), max(losses) + 1e-9

    def at(step: float, loss: float) -> tuple[float, float]:
        x = margin + (width - 2 * margin) * (step - first) / (last - first)
        y = height - margin - (height - 2 * margin) * (loss - low) / (high - low)
        return x, y

    for i in range(5):
        step, loss = first + (last - first) * i / 4, low + (high - low) * i / 4
        pen.line([at(first, loss), at(last, loss)], "lightgray")
        pen.text((margin - 5, at(step, loss)[1]), f"{loss:.3g}", "black", anchor="rm")
        pen.text((at(step, loss)[0], height - margin + 8), f"{step:.0f}", "black", anchor="mt")
    pen.text((width / 2, margin / 2), "loss by step", "black", anchor="mm")
    pen.line([at(step, loss) for step, loss in zip(steps, losses)], "steelblue", 2)
    return page
