"""What train.py says: a progress bar, lines, metrics.jsonl and the curve of the loss."""
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from extras.files import atomic_write
from extras.sheets import curve, save_page
from extras.terminal import printable
from sd import UserError


def say(rank: int, text: str) -> None:
    """Rank 0 prints a line, above the progress bar."""
    if rank == 0:
        with tqdm.external_write_mode():
            print(printable(text), flush=True)


def hidden(rank: int) -> bool | None:
    """tqdm's `disable`: bars are for rank 0, and for terminals."""
    return None if rank == 0 else True


class Progress:
    """The loss and speed since the last line. `images`: pictures per step of all processes."""

    def __init__(self, out: str, step: int, steps: int, images: int, rank: int):
        self.out, self.steps, self.images, self.rank = Path(out), steps, images, rank
        self.first, self.warned = step, False
        self.bar = tqdm(total=steps, initial=step, unit="step", disable=hidden(rank))
        self.seen, self.total, self.clock = 0, 0.0, time.time()

    def update(self, loss: float) -> None:
        self.seen, self.total = self.seen + 1, self.total + loss
        self.bar.update()

    def log(self, step: int, lr: float, grad_norm: float, skipped: int) -> None:
        """A line with the means since the last one, here and in metrics.jsonl; and train.png."""
        speed = self.seen * self.images / (time.time() - self.clock)
        loss = self.total / self.seen
        self.seen, self.total, self.clock = 0, 0.0, time.time()
        if self.rank != 0:
            return
        say(0, f"step {step}/{self.steps}  loss {loss:.4f}  {speed:.1f} images/s"
               + f"  {skipped} skipped" * (skipped > 0))
        path = self.out / "metrics.jsonl"
        # a run that was killed may have gone further than it had saved
        lines = [line for line in self.read(path) if line.step is None or line.step < step]
        new = {"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
               "images_per_s": speed, "skipped": skipped}
        lines.append(Line(json.dumps(new).encode(), step, loss))
        with atomic_write(path) as temporary:
            temporary.write_bytes(b"".join(line.text + b"\n" for line in lines))
        points = [(line.step, line.loss) for line in lines if line.step is not None]
        if len(points) > 1:
            save_page(curve(*map(list, zip(*points))), self.out / "train.png")

    def read(self, path: Path) -> list["Line"]:
        """The lines of metrics.jsonl. Those that cannot be read are kept, and named once."""
        try:
            lines = [parse_line(text) for text in path.read_bytes().splitlines()]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise UserError(f"cannot read {path}: {error}") from error
        broken = [number for number, line in enumerate(lines, 1) if line.step is None]
        if broken and not self.warned:
            self.warned = True
            say(0, f"{path}: line {broken[0]} cannot be read ({len(broken)} in all); kept as it is")
        return lines


class Line(NamedTuple):
    """A line of metrics.jsonl. One that cannot be read has no step."""
    text: bytes
    step: int | None
    loss: float


def parse_line(text: bytes) -> Line:
    try:
        found = json.loads(text)
        step, loss = int(found["step"]), float(found["loss"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return Line(text, None, 0.0)
    return Line(text, step if math.isfinite(loss) else None, loss)
