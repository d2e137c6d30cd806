"""Train a ControlNet of outlines for the built-in model, in minutes and without data.

The model draws its own training pictures, of captions that it knows. They are shrunk, moved and
perhaps mirrored, so that only the outlines say where things are. Some captions are dropped, so that
the outlines also say what things are. The loss is the UNet's (train.py); the UNet stays frozen. At
the end the script prints how well drawings of captions that were kept back follow given outlines,
with the ControlNet and without.

    python examples/train_controlnet.py outlines.safetensors
    python examples/controlnet.py "a red apple" --control any.png --outlines \\
        --controlnet outlines.safetensors
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

# controlnet comes first: it makes sd, extras and train importable
from controlnet import PREFIX, ControlNet, controlled, hints, outlines
from PIL import Image, ImageFilter, ImageOps
from tqdm import tqdm

from extras.files import atomic_write, check_new, save_tensors
from sd import StableDiffusion, UserError
from train import shifted

KEPT_BACK = 24  # captions


def moved(image: Image.Image, rng: random.Random) -> Image.Image:
    """The picture smaller, elsewhere on white, perhaps mirrored."""
    side = rng.randint(image.width * 9 // 16, image.width)
    small = image.resize((side, side), Image.Resampling.LANCZOS)
    if rng.random() < 0.5:
        small = ImageOps.mirror(small)
    page = Image.new("RGB", image.size, "white")
    page.paste(small, (rng.randint(0, page.width - side), rng.randint(0, page.height - side)))
    return page


def train(sd: StableDiffusion, captions: list[str], steps: int, seed: int,
          batch: int = 16) -> ControlNet:
    """Train a ControlNet on outlines for so many steps. Section 3.3 of the paper."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    control = ControlNet(sd.unet).requires_grad_()
    optimizer = torch.optim.AdamW(control.parameters(), fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps)
    pictures = [sd.generate(caption, steps=10, guidance=1.0)[0]
                for caption in tqdm(captions, "pictures")]
    bar = tqdm(range(steps), "training")
    for _ in bar:
        chosen = rng.choices(range(len(captions)), k=batch)
        images = [moved(pictures[i], rng) for i in chosen]
        cond = sd.encode_prompt([captions[i] if rng.random() < 0.7 else "" for i in chosen])
        x0 = sd.encode_image(images)
        t, noise = shifted(torch.rand(batch), 6.0), torch.randn_like(x0)
        hint = hints([outlines(image) for image in images])
        with controlled(sd.unet, control, hint):
            answer = sd.unet(sd.schedule.q_sample(x0, t, noise), t, **cond)
        loss = F.mse_loss(answer, sd.schedule.target(x0, t, noise))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(control.parameters(), 1.0)
        optimizer.step()
        rate.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return control.requires_grad_(False)


def followed(sd: StableDiffusion, control: ControlNet,
             captions: list[str]) -> tuple[float, float]:
    """How well drawings follow given outlines, with the ControlNet and without: mean `overlap`.

    The given outlines are those of a free drawing of the caption, moved.
    """
    rng, scores = random.Random(0), []
    for caption in tqdm(captions, "comparing"):
        free = sd.generate(caption)[0]
        given = outlines(moved(free, rng))
        with controlled(sd.unet, control, hints([given])):
            led = sd.generate(caption, seed=1)[0]
        scores.append((overlap(outlines(led), given), overlap(outlines(free), given)))
    return tuple(np.mean(scores, axis=0))


def overlap(a: Image.Image, b: Image.Image) -> float:
    """The share of each one's outlines that are within a pixel of the other's; the mean of both."""
    def share(a: Image.Image, b: Image.Image) -> float:
        lines = np.asarray(a.convert("L")) > 0
        near = np.asarray(b.convert("L").filter(ImageFilter.MaxFilter(3))) > 0
        return (lines & near).sum() / max(lines.sum(), 1)
    return (share(a, b) + share(b, a)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("out", type=Path, help="the .safetensors to write")
    parser.add_argument("--steps", type=int, default=600, help="training steps (default 600)")
    parser.add_argument("--pictures", type=int, default=256,
                        help="captions to learn from, each with a picture (default 256)")
    parser.add_argument("--seed", type=int, default=0)
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"train_controlnet.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    check_new(args.out)
    if args.steps < 1 or args.pictures < 1 or args.out.suffix != ".safetensors":
        raise UserError("--steps and --pictures must be at least 1, and the file's name must end in"
                        " .safetensors")
    sd = StableDiffusion.load(device="cpu", dtype=torch.float32)
    captions = json.loads(sd.metadata["captions"])
    random.Random(args.seed).shuffle(captions)
    kept_back, learned = captions[:KEPT_BACK], captions[KEPT_BACK:KEPT_BACK + args.pictures]
    control = train(sd, learned, args.steps, args.seed)
    tensors = {PREFIX + name: tensor for name, tensor in control.state_dict().items()}
    with atomic_write(args.out) as temporary:
        save_tensors(tensors, temporary, torch.float16, {})
    print(args.out)
    led, free = followed(sd, control, kept_back)
    print(f"outlines followed, on {KEPT_BACK} captions kept back: {led:.0%}; without the ControlNet"
          f" {free:.0%}")


if __name__ == "__main__":
    main()
