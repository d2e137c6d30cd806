"""A second judge for evaluate.py: a small convolutional net that tells name, style and colour of an emoji, trained on the real pictures alone.

    python data/emoji/classify.py [--steps 2000]      writes judge.safetensors; run prepare.py first

It sees what is not white, cut out and brought to one size, at 32x32: in training the pictures of train/, half of them recoloured by compose.py,
a little moved, blurred and noisy. So it judges by other means than the nearest picture does, and knows nothing of any model's pictures.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compose import COLOURS, STYLES, on_ground, place, recolour
from PIL import Image
from prepare import HERE
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

sys.path.insert(0, str(HERE.parents[1]))
import checkpoint  # noqa: E402

FILE = HERE / "judge.safetensors"


class Judge(nn.Module):
    """Pictures (N, 3, 64, 64), cut out, in [0, 1] -> scores of the names (N, 562), the styles (N, 3), and the colours (N, 12), the first of which is its own."""

    def __init__(self, names: int):
        super().__init__()

        def stage(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out), nn.ReLU(), nn.AvgPool2d(2))

        self.body = nn.Sequential(nn.AvgPool2d(2), stage(3, 32), stage(32, 64), stage(64, 128), stage(128, 256), nn.Flatten(), nn.Linear(1024, 256), nn.ReLU())
        self.heads = nn.ModuleList(nn.Linear(256, n) for n in (names, len(STYLES), 1 + len(COLOURS)))

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.body(x)
        return [head(h) for head in self.heads]


def load_emoji() -> dict[tuple[str, str], Image.Image]:
    """(name, style): the RGBA picture, of all in train/."""
    paths = sorted((HERE / "train").glob("*.png"))
    return {tuple(path.with_suffix(".txt").read_text().split("\n")[0].split(", ")): Image.open(path).convert("RGBA") for path in paths}


def whole(rgba: Image.Image) -> Image.Image:
    """The object as large as it fits."""
    return place(rgba, 32, 32, 64, 64)


def load_judge(names: int, path: Path = FILE) -> Judge:
    judge = Judge(names)
    judge.load_state_dict(load_file(path))
    return judge.eval()


def cut_out(image: Image.Image) -> Image.Image:
    """What is not white, as large as it fits into 64x64."""
    box = Image.fromarray(255 - np.asarray(image.convert("RGB")).min(-1)).point(lambda value: 255 * (value > 16)).getbbox()
    return on_ground(place(image.crop(box).convert("RGBA"), 32, 32, 64, 64)) if box else image.resize((64, 64))


def varied(rgba: Tensor, g: torch.Generator) -> Tensor:
    """Bytes (N, 4, 64, 64) -> (N, 3, 64, 64) in [0, 1]: moved, blurred, brighter or darker, noisy."""
    n = len(rgba)
    x = rgba.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied: no fringes
    scale = 0.85 + 0.2 * torch.rand(n, generator=g)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = 0.2 * torch.rand(n, 2, generator=g) - 0.1
    small = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)  # before shrinking, and as a blur
    x = torch.where((torch.rand(n, generator=g) < 0.5)[:, None, None, None], small, x)
    x = F.grid_sample(x, F.affine_grid(theta, list(x.shape), align_corners=False), align_corners=False)
    x = x[:, :3] + 1 - x[:, 3:]  # on white
    return (x * (0.92 + 0.16 * torch.rand(n, 1, 1, 1, generator=g)) + 0.02 * torch.randn(x.shape, generator=g)).clamp(0, 1)


def learn(emoji: dict[tuple[str, str], Image.Image], steps: int, batch: int = 64, lr: float = 2e-3) -> Judge:
    """Train on the pictures, half of each batch recoloured at random."""
    torch.manual_seed(0)
    names, styles = sorted({name for name, _ in emoji}), list(STYLES)
    pictures = torch.stack([torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in (own, *(recolour(own, colour) for colour in COLOURS))])
                            for own in (whole(rgba) for rgba in emoji.values())])  # (pictures, colours, 4, 64, 64), the first as it is
    name = torch.tensor([names.index(name) for name, _ in emoji])
    style = torch.tensor([styles.index(style) for _, style in emoji])
    judge, g = Judge(len(names)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1, pct_start=0.1)
    clock, losses = time.time(), torch.zeros(3)
    for step in range(steps):
        i = torch.randint(len(pictures), (batch,), generator=g)
        colour = torch.randint(1, pictures.shape[1], (batch,), generator=g) * (torch.rand(batch, generator=g) < 0.5)
        scores = judge(varied(pictures[i, colour], g))
        each = torch.stack([F.cross_entropy(guess, right) for guess, right in zip(scores, (name[i], style[i], colour))])
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        schedule.step()
        losses += each.detach()
        if (step + 1) % 250 == 0:
            print(f"step {step + 1}/{steps}  loss of name, style, colour " + ", ".join(f"{loss / 250:.3f}" for loss in losses.tolist())
                  + f"  {time.time() - clock:.0f} s", flush=True)
            losses.zero_()
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    emoji = load_emoji()
    if not emoji:
        parser.exit(1, f"classify.py: no pictures in {HERE / 'train'}: run data/emoji/prepare.py first\n")
    judge = learn(emoji, args.steps)
    with checkpoint.whole(FILE) as temporary:
        save_file(judge.state_dict(), temporary)


if __name__ == "__main__":
    main()
