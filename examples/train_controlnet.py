"""Trains a ControlNet of outlines for the built-in model, in minutes and without data: the model draws its own, pictures of the captions it knows.

They are made smaller, moved and perhaps mirrored, so that where things are is told by the outlines alone; now and then the caption is left out, so
that they say what it is too. The loss is that of the UNet (train.py), which stays frozen. In the end it prints how far drawings of captions that
were kept back follow the outlines they are given, with the ControlNet and without.

    python examples/train_controlnet.py outlines.safetensors
    python examples/controlnet.py "a red apple" --control any.png --outlines --controlnet outlines.safetensors
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from controlnet import PREFIX, ControlNet, controlled, hints, outlines  # first: it finds the files above
from checkpoint import UserError, check_new, save_tensors, whole
from sampler import q_sample, target
from sd import StableDiffusion
from train import shifted

KEPT_BACK = 24  # captions


def moved(image: Image.Image, chance: random.Random) -> Image.Image:
    """Smaller, elsewhere on white, perhaps mirrored."""
    page, side = Image.new("RGB", image.size, "white"), chance.randint(image.width * 9 // 16, image.width)
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    page.paste(ImageOps.mirror(small) if chance.random() < 0.5 else small, (chance.randint(0, page.width - side), chance.randint(0, page.height - side)))
    return page


def train(sd: StableDiffusion, captions: list[str], steps: int, seed: int, batch: int = 16) -> ControlNet:
    """A ControlNet that has learned, for so many steps, to tell the UNet where things are by their outlines. Section 3.3 of the paper."""
    torch.manual_seed(seed)
    chance = random.Random(seed)
    control = ControlNet(sd.unet).requires_grad_()
    optimizer = torch.optim.AdamW(control.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    pictures = [sd.generate(caption, steps=10, guidance=1.0)[0] for caption in tqdm(captions, "pictures")]
    for _ in (bar := tqdm(range(steps), "training")):
        chosen = chance.choices(range(len(captions)), k=batch)
        images = [moved(pictures[i], chance) for i in chosen]
        told = sd.condition([captions[i] if chance.random() < 0.7 else "" for i in chosen])
        x0 = sd.encode_image(images)
        t, noise = shifted(torch.rand(batch), 6.0), torch.randn_like(x0)
        with controlled(sd.unet, control, hints([outlines(image) for image in images])):
            loss = F.mse_loss(sd.unet(q_sample(x0, t, noise, sd.config.prediction), t, **told), target(sd.config.prediction, x0, t, noise))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return control.requires_grad_(False)


def followed(sd: StableDiffusion, control: ControlNet, captions: list[str]) -> tuple[float, float]:
    """How well a drawing follows given outlines, those of the same thing drawn freely and moved: with the ControlNet and without, means of `overlap`."""
    chance, scores = random.Random(0), []
    for caption in tqdm(captions, "comparing"):
        free = sd.generate(caption)[0]
        given = outlines(moved(free, chance))
        with controlled(sd.unet, control, hints([given])):
            led = sd.generate(caption, seed=1)[0]
        scores.append((overlap(outlines(led), given), overlap(outlines(free), given)))
    return tuple(np.mean(scores, axis=0))


def overlap(a: Image.Image, b: Image.Image) -> float:
    """Of the outlines of each, the share within a pixel of the other's; the mean of the two shares."""
    def share(a, b):
        lines, near = np.asarray(a.convert("L")) > 0, np.asarray(b.convert("L").filter(ImageFilter.MaxFilter(3))) > 0
        return (lines & near).sum() / max(lines.sum(), 1)
    return (share(a, b) + share(b, a)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="the .safetensors to write")
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--pictures", type=int, default=256, help="how many of the captions to learn from (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    try:
        check_new(args.out)
        if args.steps < 1 or args.pictures < 1 or args.out.suffix != ".safetensors":
            raise UserError("steps and pictures must be at least 1, and the file's name must end in .safetensors")
        sd = StableDiffusion.load(device="cpu", dtype=torch.float32)
        captions = json.loads(sd.metadata["captions"])
        random.Random(args.seed).shuffle(captions)
        control = train(sd, captions[KEPT_BACK:KEPT_BACK + args.pictures], args.steps, args.seed)
        with whole(args.out) as temporary:
            save_tensors({PREFIX + name: tensor for name, tensor in control.state_dict().items()}, temporary, torch.float16, {})
        print(args.out)
        led, free = followed(sd, control, captions[:KEPT_BACK])
        print(f"outlines followed, on {KEPT_BACK} captions kept back: {led:.0%}; without the ControlNet {free:.0%}")
    except UserError as error:
        print(f"train_controlnet.py: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
