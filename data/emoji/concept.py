"""A new thing for the built-in model, from five pictures: what is learned, and what is forgotten.

    python data/emoji/concept.py [--out DIR] [--steps 300] [--only full lora ...]

Run data/emoji/prepare.py first. The dodo is not among the pictures that the model was trained on.
Five pictures of it, called "zorblat", are learned in four ways. Then, with the default settings of
sd.py, the script prints: how far eight drawings of "a zorblat" are from the nearest of the five
(root mean square at 16x16 RGB); whether a dodo is the nearest of all 4,871 emoji; and of 40
captions of the training set, how many are still drawn as what they name, and the PSNR to what the
model drew before.
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
from evaluate import HERE, feature
from PIL import Image, ImageOps

sys.path.insert(0, str(HERE.parents[1]))

from extras.files import on_white, read_image
from extras.lora import apply_lora
from extras.textual_inversion import add_embedding
from sd import StableDiffusion

ROOT = HERE.parents[1]
WAYS = {  # options of train.py, and the file with the result
    "full": (["--lr", "1e-4"], "model.safetensors"),
    "class-data": (["--lr", "1e-4", "--class-data", "CLASS"], "model.safetensors"),
    "lora": (["--lora", "8", "--lr", "2e-3"], "lora.safetensors"),
    "word": (["--train", "word", "--placeholder-token", "<zorblat>", "--num-vectors", "4",
              "--initializer-token", "bird", "--lr", "5e-3", "--weight-decay", "0"],
             "zorblat.safetensors"),
}
OPTIONS = ["--batch", "8", "--warmup", "20", "--ema", "0.99", "--time-shift", "4",
           "--sample-every", "0", "--tokens", "16"]


class Known(NamedTuple):
    """What drawings are compared with."""
    five: list[np.ndarray]            # the features of the concept's pictures
    features: dict[Path, np.ndarray]  # of all emoji
    captions: list[str]
    before: list[Image.Image]         # what the model drew of the captions before training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "concept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    paths = sorted(path for folder in ("train", "rest") for path in (HERE / folder).glob("*.png"))
    features = {path: feature(on_white(read_image(path))) for path in paths}
    five = write_concept(args.out / "five", "a zorblat")
    write_concept(args.out / "five-word", "a <zorblat>")
    sd = StableDiffusion.load()
    listed = json.loads(sd.metadata["captions"])
    captions = random.Random(0).sample(listed, 40)
    known = Known(five, features, captions, draw(sd, captions))
    write_class_data(args.out / "class", random.Random(1).sample(listed, 64))
    print(f"{'':14}{'distance':>10}{'is a dodo':>11}{'others are':>12}{'kept':>10}{'PSNR':>9}")
    report("before", sd, "a zorblat", known)
    for way in args.only:
        sd = learn(way, args.out, args.steps)
        report(way, sd, "a <zorblat>" if way == "word" else "a zorblat", known)


def learn(way: str, out: Path, steps: int) -> StableDiffusion:
    """Train in one of the WAYS, and load the result."""
    options, file = WAYS[way]
    options = [str(out / "class") if option == "CLASS" else option for option in options]
    data = out / ("five-word" if way == "word" else "five")
    run = out / f"run-{way}"
    subprocess.run([sys.executable, ROOT / "train.py", "--data", data, "--out", run,
                    "--steps", str(steps), *OPTIONS, *options],
                   check=True, stdout=subprocess.DEVNULL)
    if file == "model.safetensors":
        return StableDiffusion.load(run / file)
    sd = StableDiffusion.load()
    if file == "lora.safetensors":
        apply_lora(sd, run / file)
    else:
        add_embedding(sd, run / file)
    return sd


def write_concept(folder: Path, caption: str) -> list[np.ndarray]:
    """Write the dodo in three styles, two of them mirrored too. Returns their features."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [read_image(HERE / "rest" / f"dodo.{style}.png")
              for style in ("3d", "noto", "twemoji")]
    images += [ImageOps.mirror(image) for image in images[:2]]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\n{caption.split()[1]}\n")
    return [feature(on_white(image)) for image in images]


def write_class_data(folder: Path, captions: list[str]) -> None:
    """Write what the model draws of some other captions, by sd.py."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    prompts = folder.parent / "class.txt"
    prompts.write_text("\n".join(captions))
    subprocess.run([sys.executable, ROOT / "sd.py", "--prompts", prompts, "--batch-size", "8",
                    "--out", folder], check=True, capture_output=True)


def draw(sd: StableDiffusion, captions: list[str]) -> list[Image.Image]:
    return [sd.generate(caption)[0] for caption in captions]


def report(name: str, sd: StableDiffusion, prompt: str, known: Known) -> None:
    """Print one line: how near the concept is, and what has become of the captions."""
    def nearest(image: Image.Image) -> str:
        drawn = feature(image)
        distances = {path: np.square(one - drawn).sum() for path, one in known.features.items()}
        return min(distances, key=distances.get).name.split(".")[0]

    of_concept = sd.generate(prompt, batch=8)
    distance = np.mean([min(np.square(feature(image) - one).mean() ** 0.5 for one in known.five)
                        for image in of_concept])
    dodos = np.mean([nearest(image) == "dodo" for image in of_concept])
    after = draw(sd, known.captions)
    found = [nearest(image) for image in after]
    names = {path.with_suffix(".txt").read_text().split("\n")[0]: path.name.split(".")[0]
             for path in known.features if path.parent.name == "train"}
    others = np.mean([one == "dodo" for one in found])
    kept = np.mean([one == names[caption] for one, caption in zip(found, known.captions)])
    similar = np.mean([psnr(a, b) for a, b in zip(after, known.before)])
    print(f"{name:14}{distance:10.3f}{dodos:11.0%}{others:12.0%}{kept:10.0%}{similar:9.1f}",
          flush=True)


def psnr(a: Image.Image, b: Image.Image) -> float:
    """In dB, at most 60."""
    error = np.square((np.asarray(a, float) - np.asarray(b)) / 255).mean()
    return -10 * np.log10(error + 1e-6)


if __name__ == "__main__":
    main()
