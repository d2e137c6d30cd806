"""A second judge for evaluate.py: a small convolutional network that recognises emoji.

It names the emoji, its style and its colour, and is trained on the real pictures alone.

    python data/emoji/classify.py [--steps 2000]      writes judge.safetensors; run prepare.py first

It sees what is not white, cropped and scaled to one size, at 32x32. It is trained on the pictures
of train/, half of them recoloured by compose.py, a little moved, blurred and noisy. So it judges by
other means than the nearest picture does, and has seen no picture of any model.
"""
import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from compose import COLOURS, STYLES, Emoji, load_emoji, on_background, place, recolour
from PIL import Image
from prepare import HERE
from safetensors.torch import load_file
from torch import Tensor, nn

sys.path.insert(0, str(HERE.parents[1]))

from extras.files import atomic_write, save_tensors

FILE = HERE / "judge.safetensors"


class Judge(nn.Module):
    """Cropped pictures (N, 3, 64, 64) in [0, 1] -> scores of names, styles and colours.

    They are (N, 562), (N, 3) and (N, 12). The first colour is the object's own.
    """

    def __init__(self, names: int):
        super().__init__()

        def stage(c_in: int, c_out: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, padding=1), nn.BatchNorm2d(c_out),
                                 nn.ReLU(), nn.AvgPool2d(2))

        self.body = nn.Sequential(
            nn.AvgPool2d(2), stage(3, 32), stage(32, 64), stage(64, 128), stage(128, 256),
            nn.Flatten(), nn.Linear(1024, 256), nn.ReLU())
        outputs = (names, len(STYLES), 1 + len(COLOURS))
        self.heads = nn.ModuleList(nn.Linear(256, n) for n in outputs)

    def forward(self, x: Tensor) -> list[Tensor]:
        h = self.body(x)
        return [head(h) for head in self.heads]


def load_judge(names: int, path: Path = FILE) -> Judge:
    judge = Judge(names)
    judge.load_state_dict(load_file(path))
    return judge.eval()


def filling(rgba: Image.Image) -> Image.Image:
    """The object as large as fits into 64x64."""
    return place(rgba, 32, 32, 64, 64)


def cut_out(image: Image.Image) -> Image.Image:
    """What is not white, as large as fits into 64x64."""
    darkness = Image.fromarray(255 - np.asarray(image.convert("RGB")).min(-1))
    box = darkness.point(lambda value: 255 * (value > 16)).getbbox()
    if box is None:
        return image.resize((64, 64))
    return on_background(filling(image.crop(box).convert("RGBA")))


def varied(rgba: Tensor, g: torch.Generator) -> Tensor:
    """Bytes (N, 4, 64, 64) -> (N, 3, 64, 64) in [0, 1]: moved, blurred, brighter, noisy."""
    n = len(rgba)
    x = rgba.float() / 255
    x = torch.cat([x[:, :3] * x[:, 3:], x[:, 3:]], 1)  # premultiplied: no fringes
    scale = 0.85 + 0.2 * torch.rand(n, generator=g)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    theta[:, :, 2] = 0.2 * torch.rand(n, 2, generator=g) - 0.1
    # before shrinking, and as a blur
    small = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
    x = torch.where((torch.rand(n, generator=g) < 0.5)[:, None, None, None], small, x)
    field = F.affine_grid(theta, list(x.shape), align_corners=False)
    x = F.grid_sample(x, field, align_corners=False)
    x = x[:, :3] + 1 - x[:, 3:]  # on white
    brightness = 0.92 + 0.16 * torch.rand(n, 1, 1, 1, generator=g)
    return (x * brightness + 0.02 * torch.randn(x.shape, generator=g)).clamp(0, 1)


def all_colours(rgba: Image.Image) -> Tensor:
    """The object as it is, then in every colour: bytes (1 + colours, 4, 64, 64)."""
    own = filling(rgba)
    images = [own, *(recolour(own, colour) for colour in COLOURS)]
    return torch.stack([torch.from_numpy(np.array(image)).permute(2, 0, 1) for image in images])


def learn(emoji: Emoji, steps: int, batch: int = 64, lr: float = 2e-3) -> Judge:
    """Train on the pictures, half of each batch recoloured at random."""
    torch.manual_seed(0)
    names, styles = sorted({name for name, _ in emoji}), list(STYLES)
    pictures = torch.stack([all_colours(rgba) for rgba in emoji.values()])
    name = torch.tensor([names.index(name) for name, _ in emoji])
    style = torch.tensor([styles.index(style) for _, style in emoji])
    judge, g = Judge(len(names)), torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=lr, weight_decay=0.05, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1,
                                               pct_start=0.1)
    clock, losses = time.time(), torch.zeros(3)
    for step in range(steps):
        i = torch.randint(len(pictures), (batch,), generator=g)
        colour = torch.randint(1, pictures.shape[1], (batch,), generator=g)
        colour = colour * (torch.rand(batch, generator=g) < 0.5)
        scores = judge(varied(pictures[i, colour], g))
        each = torch.stack([F.cross_entropy(guess, right)
                            for guess, right in zip(scores, (name[i], style[i], colour))])
        optimizer.zero_grad()
        each.sum().backward()
        optimizer.step()
        rate.step()
        losses += each.detach()
        if (step + 1) % 250 == 0:
            shown = ", ".join(f"{loss / 250:.3f}" for loss in losses.tolist())
            print(f"step {step + 1}/{steps}  loss of name, style, colour {shown}"
                  f"  {time.time() - clock:.0f} s", flush=True)
            losses.zero_()
    return judge.eval()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2000)
    args = parser.parse_args()
    emoji = load_emoji()
    if not emoji:
        parser.exit(1, f"classify.py: no pictures in {HERE / 'train'}: run data/emoji/prepare.py"
                       " first\n")
    judge = learn(emoji, args.steps)
    with atomic_write(FILE) as temporary:
        save_tensors(judge.state_dict(), temporary, torch.float32, {})


if __name__ == "__main__":
    main()
