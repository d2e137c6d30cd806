"""Does the built-in model draw what it is asked? Run data/emoji/prepare.py first.

    python data/emoji/evaluate.py [--ckpt FILE] [--n 200] [--guidance G] [--steps N]    prints the figures
    python data/emoji/evaluate.py --sheet docs/emoji.png                                draws 24 prompts instead

Figures: n captions of the training set, drawn at random with a fixed seed, one picture each with the default settings
(picture i from seed i); then the nearest of all emoji pictures, of train/ and rest/ alike, by L2 distance at 16x16 RGB on white.
"""
import argparse
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))
from sd import StableDiffusion, on_white, read_image  # noqa: E402

CAPTIONS = ["a red apple", "pizza, twemoji", "a rocket", "cat face, noto", "a sunflower", "an octopus", "a penguin, twemoji", "a guitar",
            "a red heart", "smiling face with sunglasses, noto", "a crown", "a snowman"]
OTHERS = ["a blue car", "a green cat", "a yellow heart with arrow", "a purple mushroom", "an angry dog face", "a pink rocket", "a red fish, noto",
          "a slice of melon", "a happy robot", "a golden key, twemoji", "a small white rabbit", "fruit"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="default: the built-in model")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--sheet", help="write a contact sheet here and stop")
    args = parser.parse_args()
    sd = StableDiffusion.load(args.ckpt)
    settings = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    if args.sheet:
        contact_sheet(sd, settings).save(args.sheet)
        return

    paths = sorted(path for folder in ("train", "rest") for path in (HERE / folder).glob("*.png"))
    if not paths:
        sys.exit("no pictures: run data/emoji/prepare.py first")
    known = [path.stem.rsplit(".", 1) for path in paths]  # [name, style]
    features = np.stack([feature(on_white(read_image(path))) for path in paths])
    by_caption = {(HERE / "train" / f"{name}.{style}.txt"): (name, style) for name, style in known}
    by_caption = {path.read_text().split("\n")[0]: key for path, key in by_caption.items() if path.exists()}
    captions = random.Random(0).sample([c for c in json.loads(sd.metadata["captions"]) if c in by_caption], args.n)
    top1 = top5 = styles = 0
    for i, caption in enumerate(tqdm(captions)):
        drawn = feature(sd.generate(caption, seed=i, **settings)[0])
        nearest = [known[j] for j in np.square(features - drawn).sum(1).argsort()[:5]]
        name, style = by_caption[caption]
        top1 += nearest[0][0] == name
        top5 += any(near[0] == name for near in nearest)
        styles += nearest[0][1] == style
    print(f"{args.n} captions against {len(paths)} pictures: nearest has the right name {top1 / args.n:.1%}, "
          f"one of the nearest five {top5 / args.n:.1%}, nearest has the right style {styles / args.n:.1%}")


def feature(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() / 255


def contact_sheet(sd: StableDiffusion, settings: dict) -> Image.Image:
    """Twelve training captions above twelve prompts that are none, each picture from seed 0."""
    side, text = 2 * sd.config.size, 16
    page = Image.new("RGB", (6 * side, 4 * (side + text)), "white")
    for i, prompt in enumerate(CAPTIONS + OTHERS):
        x, y = i % 6 * side, i // 6 * (side + text)
        page.paste(sd.generate(prompt, **settings)[0].resize((side, side), Image.Resampling.LANCZOS), (x, y))
        ImageDraw.Draw(page).text((x + side // 2, y + side), prompt, "black", anchor="ma", font_size=9)
    return page


if __name__ == "__main__":
    main()
