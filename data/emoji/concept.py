"""A new thing for the built-in model, from five pictures: what is learned, and what is forgotten. Run data/emoji/prepare.py first.

    python data/emoji/concept.py [--out DIR] [--steps 300] [--only lora full ...]

The dodo is not among what the model was trained on. Five pictures of it, called "zorblat", are learned in four ways. Then, for the default settings of
sd.py: how far from the nearest of the five (root mean square at 16x16 RGB) are eight drawings of "a zorblat"; is a dodo the nearest of all 4,871 emoji;
and of 40 captions of the training set, how many are still drawn as what they name, and how near to what the model drew before (PSNR).
"""
import argparse
import json
import random
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from evaluate import HERE, feature
from PIL import Image, ImageOps

sys.path.insert(0, str(HERE.parents[1]))
from lora import add_embedding, apply_lora  # noqa: E402
from sd import StableDiffusion, on_white, read_image  # noqa: E402

WAYS = {  # settings of train.py, and where the result lies
    "full": (["--lr", "1e-4"], "model.safetensors"),
    "full, with --prior": (["--lr", "1e-4", "--prior", "PRIOR"], "model.safetensors"),
    "--lora 8": (["--lora", "8", "--lr", "2e-3"], "lora.safetensors"),
    "--train word": (["--train", "word", "--word", "<zorblat>", "--vectors", "4", "--init-word", "bird", "--lr", "5e-3", "--weight-decay", "0"], "<zorblat>.safetensors"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE.parents[1] / "runs" / "concept")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS)
    args = parser.parse_args()
    paths = sorted(path for folder in ("train", "rest") for path in (HERE / folder).glob("*.png"))
    known = {path: feature(on_white(read_image(path))) for path in paths}
    five = concept(args.out / "five", "a zorblat")
    concept(args.out / "five-word", "a <zorblat>")
    captions = [caption for caption in json.loads(StableDiffusion.load().metadata["captions"])]
    captions = random.Random(0).sample(captions, 40)
    before = draw(StableDiffusion.load(), captions)
    prior(args.out / "prior", random.Random(1).sample(json.loads(StableDiffusion.load().metadata["captions"]), 64))
    print(f"{'':20}{'distance':>10}{'is a dodo':>11}{'others are':>12}{'kept':>10}{'PSNR':>9}")
    report("before", StableDiffusion.load(), "a zorblat", five, known, captions, before)
    for way in args.only:
        settings, file = WAYS[way]
        word = "--word" in settings
        out = args.out / "".join(c for c in way if c.isalnum())
        subprocess.run([sys.executable, HERE.parents[1] / "train.py", "--data", args.out / ("five-word" if word else "five"), "--out", out, "--batch", "8", "--steps", str(args.steps),
                        "--warmup", "20", "--ema", "0.99", "--time-shift", "4", "--sample-every", "0", "--tokens", "16",
                        *[str(args.out / "prior") if x == "PRIOR" else x for x in settings]], check=True, stdout=subprocess.DEVNULL)
        sd = StableDiffusion.load(out / file if file == "model.safetensors" else None)
        if file == "lora.safetensors":
            apply_lora(sd, out / file)
        elif word:
            add_embedding(sd, out / file)
        report(way, sd, "a <zorblat>" if word else "a zorblat", five, known, captions, before)


def concept(folder: Path, caption: str) -> list[np.ndarray]:
    """The dodo in three styles, two of them mirrored too. Returns their features."""
    folder.mkdir(parents=True, exist_ok=True)
    images = [read_image(HERE / "rest" / f"dodo.{style}.png") for style in ("3d", "noto", "twemoji")]
    images += [ImageOps.mirror(image) for image in images[:2]]
    for i, image in enumerate(images):
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"{caption}\n{caption.split()[1]}\n")
    return [feature(on_white(image)) for image in images]


def prior(folder: Path, captions: list[str]) -> None:
    """What the model draws of some other captions, as sd.py writes it."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder.parent / "prior.txt").write_text("\n".join(captions))
    subprocess.run([sys.executable, HERE.parents[1] / "sd.py", "--prompts", folder.parent / "prior.txt", "--batch", "8", "--out", folder], check=True, capture_output=True)


def draw(sd: StableDiffusion, captions: list[str]) -> list[Image.Image]:
    return [sd.generate(caption)[0] for caption in captions]


def report(name: str, sd: StableDiffusion, prompt: str, five: list, known: dict, captions: list[str], before: list[Image.Image]) -> None:
    """One line: distance to the concept, share of dodos for the word and for other captions, captions drawn as what they name, PSNR to what was drawn before."""
    def nearest(image: Image.Image) -> str:
        drawn = feature(image)
        return min(known, key=lambda path: np.square(known[path] - drawn).sum()).name.split(".")[0]
    of_word = sd.generate(prompt, batch=8)
    distance = np.mean([min(np.square(feature(image) - one).mean() ** 0.5 for one in five) for image in of_word])
    after = draw(sd, captions)
    names = {(path.with_suffix(".txt").read_text().split("\n")[0]): path.name.split(".")[0] for path in known if path.parent.name == "train"}
    found = [nearest(image) for image in after]
    psnr = np.mean([-10 * np.log10(np.square((np.asarray(a, float) - np.asarray(b)) / 255).mean() + 1e-6) for a, b in zip(after, before)])
    print(f"{name:20}{distance:10.3f}{np.mean([nearest(image) == 'dodo' for image in of_word]):11.0%}{np.mean([one == 'dodo' for one in found]):12.0%}"
          f"{np.mean([one == names[caption] for one, caption in zip(found, captions)]):10.0%}{psnr:9.1f}", flush=True)


if __name__ == "__main__":
    main()
