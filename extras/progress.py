"""What train.py says: a progress bar, lines, metrics.jsonl and the curve of the loss."""
import json
import time
from pathlib import Path

from tqdm import tqdm

from extras.files import atomic_write
from extras.sheets import curve


def say(rank: int, text: str) -> None:
    """Rank 0 prints a line, above the progress bar."""
    if rank == 0:
        with tqdm.external_write_mode():
            print(text, flush=True)


def hidden(rank: int) -> bool | None:
    """tqdm's `disable`: bars are for rank 0, and for terminals."""
    return None if rank == 0 else True


class Progress:
    """The loss and speed since the last line. `images`: pictures per step of all processes."""

    def __init__(self, out: str, step: int, steps: int, images: int, rank: int):
        self.out, self.steps, self.images, self.rank = Path(out), steps, images, rank
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
        path, lines = self.out / "metrics.jsonl", []
        if path.exists():
            lines = [json.loads(line) for line in path.read_text().splitlines()]
        # a run that was killed may have gone further than it had saved
        lines = [line for line in lines if line["step"] < step]
        lines.append({"step": step, "loss": loss, "lr": lr, "grad_norm": grad_norm,
                      "images_per_s": speed, "skipped": skipped})
        with atomic_write(path) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        if len(lines) > 1:
            page = curve([line["step"] for line in lines], [line["loss"] for line in lines])
            page.save(self.out / "train.png")
