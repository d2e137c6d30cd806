"""How well and how sharply models draw emoji at 128 pixels.

    python data/emoji/sharpness.py [--drawn 48] [runs/decoder/model.safetensors ...]

Run prepare.py and originals.py first. The first line is the built-in model. A model that draws
smaller pictures gets them reduced, and what it draws is enlarged (bicubic). The sets of pictures:
    held back    64 that decoder.py does not train on, through the encoder and the decoder
    trained on   64 others, the same way
    drawn        what the model draws for --drawn captions of train/ (picture i from seed i),
                 compared with the true picture of the caption
The columns:
    PSNR       mean over the pictures, in dB
    gradients  energy of the gradients (mean square difference of neighbouring pixels) as a share
               of the true pictures'. Below 1 is blurred.
"""
import argparse
import random

import torch
import torch.nn.functional as F
from compose import Emoji, on_background
from decoder import HELD_BACK, held_back, load_large
from reconstruct import energy
from torch import Tensor

from sd import StableDiffusion, pixels

SIZE = 128


def reconstructed(sd: StableDiffusion, x: Tensor) -> Tensor:
    """Pictures (B, 3, 128, 128) in [-1, 1] through the encoder and the decoder."""
    if sd.preset.size < SIZE:
        x = F.interpolate(x, sd.preset.size, mode="bicubic", antialias=True)
    return enlarged(torch.cat([sd.vae.decode(sd.vae.encode(part)) for part in x.split(8)]))


def drawn(sd: StableDiffusion, captions: list[str]) -> Tensor:
    """What it draws with the default settings, one seed each: (B, 3, 128, 128) in [-1, 1]."""
    images = []
    for i in range(0, len(captions), 8):
        images += sd.generate(captions[i:i + 8], seed=i)
    return enlarged(pixels(images))


def enlarged(y: Tensor) -> Tensor:
    if y.shape[-1] < SIZE:
        y = F.interpolate(y, SIZE, mode="bicubic")
    return y.clamp(-1, 1)


def psnr(y: Tensor, x: Tensor) -> float:
    return float(-10 * ((y - x) / 2).square().mean((1, 2, 3)).log10().mean())


def on_white(emoji: Emoji, keys: list[tuple[str, str]]) -> Tensor:
    return pixels([on_background(emoji[key]) for key in keys])


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", help="models")
    parser.add_argument("--drawn", type=int, default=48, help="captions to draw; 0: none")
    args = parser.parse_args()
    train = load_large("train128")
    held = held_back(train)
    others = random.Random(0).sample([key for key in train if key not in held], HELD_BACK)
    sets = {"held back": held, "trained on": others}
    if args.drawn:
        sets["drawn"] = random.Random(1).sample(list(train), args.drawn)
    print(f"{'':40}" + "".join(f"{name:>20}" for name in sets))
    print(f"{'':40}" + f"{'PSNR':>10}{'gradients':>10}" * len(sets))
    for file in [None, *args.files]:
        sd = StableDiffusion.load(file, "cpu", torch.float32)
        row = f"{'the built-in model' if file is None else file:40}"
        for kind, keys in sets.items():
            x = on_white(train, keys)
            if kind == "drawn":
                y = drawn(sd, [", ".join(key) for key in keys])
            else:
                y = reconstructed(sd, x)
            row += f"{psnr(y, x):10.2f}{energy(y) / energy(x):10.3f}"
        print(row, flush=True)


if __name__ == "__main__":
    main()
