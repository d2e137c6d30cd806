"""Does the built-in model draw what it is asked? Run data/emoji/prepare.py first, and classify.py for the second judge.

    python data/emoji/evaluate.py [--ckpt FILE] [--n 200] [--guidance G] [--steps N]    prints the table
    python data/emoji/evaluate.py --sheet docs/emoji.png                                draws 24 prompts instead

n prompts of each kind, drawn at random with a fixed seed, one picture each with the default settings (picture i from seed i):
    captions    of train/
    synonyms    words of synonyms.txt, which stand in no caption (vectors.py has the rule)
    colours     "a blue cat": a colour and an object that compose.py sets aside, and that is not the object's own colour
    pairs       "a cat next to a dog": two objects that compose.py sets aside
    numbers     "three stars"; these and the next may have been trained on
    places      "a dog on the left"
Two judges, each beside what it says of true pictures (composed as the prompt says, then through the model's VAE and back): the most that can be reached.
    nearest     the nearest by L2 at 16x16 RGB. Captions and synonyms: of all pictures of train/. Colours and pairs: what is not white is cut out and
                brought to full size first; shape is right if of all objects in that colour the asked one is nearest, hue if of that object
                in all colours the asked one is; a pair, if left and right half each are nearest to their own object, either way round. Numbers and
                places: each square of 30 pixels where one is asked for, the whole picture if all of them are right.
    classifier  the same questions to classify.py's net.
"""
import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from pathlib import Path

import numpy as np
import torch
from classify import FILE, cut_out, load_emoji, load_judge
from compose import COLOURS, NUMBERS, PLACES, arrange, fits, moved, on_ground, pair, recolour, set_aside
from PIL import Image, ImageDraw
from prepare import HERE, STYLES, with_article
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(HERE.parents[1]))
from sd import StableDiffusion, pixels  # noqa: E402

CAPTIONS = ["a red apple", "pizza, twemoji", "a rocket", "cat face, noto", "a sunflower", "an octopus", "a penguin, twemoji", "a guitar",
            "a red heart", "smiling face with sunglasses, noto", "a crown", "a snowman"]
OTHERS = ["a blue cat", "an orange guitar", "a green butterfly", "a red octopus", "two green frogs", "a kitten", "a burger",
          "a blue heart next to a red apple", "three stars", "a rocket on a blue background", "a small dog on the left", "a cat next to a dog"]
BARS = {"captions: name": 60, "captions: name, of the nearest five": 80, "captions: style": 90, "synonyms: name, of the nearest five": 30,
        "colours: hue and shape": 60, "colours: hue": None, "colours: shape": None, "pairs: both halves": 40, "pairs: one half or both": None,
        "numbers: all of them": None, "numbers: one or more": None, "places: there and right": None}  # %
KINDS = ("captions", "synonyms", "colours", "pairs", "numbers", "places")  # of what is asked
Emoji = dict[tuple[str, str], Image.Image]  # (name, style): RGBA


@dataclass
class Asked:
    """A prompt, what it asks for, and a true picture of it."""
    prompt: str
    names: list[str]  # one of them; of a pair, both
    picture: Image.Image
    style: str = ""
    colour: str = ""
    spots: tuple[tuple[int, int], ...] = ()  # where the things are to be


# --- what is asked ---

def ask(kind: str, n: int, emoji: Emoji, captions: list[str] | None = None) -> list[Asked]:
    """n different prompts of a kind (fewer if there are not so many), the same for the same arguments."""
    rng = random.Random(f"0 {kind}")
    names = sorted({name for name, _ in emoji})
    if kind == "captions":
        known = {f"{name}, {style}": (name, style) for name, style in emoji}
        chosen = [known[caption] for caption in captions or known if caption in known]
        return [Asked(f"{name}, {style}", [name], on_ground(moved(emoji[name, style], 0.92, rng)), style)
                for name, style in rng.sample(chosen, min(n, len(chosen)))]
    if kind == "synonyms":
        lines = [line.split(": ") for line in (HERE / "synonyms.txt").read_text().splitlines()]
        lines = [(word, of.split(", ")) for word, of in lines if all((name, "3d") in emoji for name in of.split(", "))]
        return [Asked(word, of, on_ground(moved(emoji[rng.choice(of), "3d"], 0.92, rng))) for word, of in rng.sample(lines, min(n, len(lines)))]
    if kind == "colours":
        facts = [(colour, name) for colour, name in product(COLOURS, names) if fits(name, "colour") and set_aside(colour, name)]
        rng.shuffle(facts)
        facts = [(colour, name, rng.choice(list(STYLES))) for colour, name in facts]
        facts = islice(((colour, name, style) for colour, name, style in facts if colour != own_colour(emoji[name, style])), n)
        return [Asked(said(with_article(f"{colour} {name}"), style), [name], on_ground(moved(recolour(emoji[name, style], colour), 0.92, rng)), style, colour)
                for colour, name, style in facts]
    if kind in ("numbers", "places"):
        able, asked = [name for name in names if fits(name, kind[:-1])], []
        for name in rng.sample(able, min(n, len(able))):
            style = rng.choice(list(STYLES))
            picture, (phrase, *_) = arrange(kind[:-1], [emoji[name, style]], [name], rng)
            spots = NUMBERS[phrase.split()[0]] if kind == "numbers" else [PLACES[phrase.removeprefix(with_article(name) + " ")]]
            asked.append(Asked(said(phrase, style), [name], on_ground(picture), style, spots=tuple(spots)))
        return asked
    pairs = [(a, b) for a, b in product(names, names) if a != b and fits(a, kind) and fits(b, kind) and set_aside(a, b)]
    return [Asked(said(f"{with_article(a)} next to {with_article(b)}", style), [a, b], on_ground(pair(emoji[a, style], emoji[b, style])), style)
            for (a, b), style in ((fact, rng.choice(list(STYLES))) for fact in rng.sample(pairs, min(n, len(pairs))))]


def said(phrase: str, style: str) -> str:
    """No style word means 3d."""
    return phrase if style == "3d" else f"{phrase}, {style}"


def own_colour(rgba: Image.Image) -> str:
    """The colour that changes the object least."""
    own = feature(on_ground(rgba))
    return min(COLOURS, key=lambda colour: np.square(feature(on_ground(recolour(rgba, colour))) - own).sum())


# --- the first judge: the nearest picture ---

def feature(image: Image.Image) -> np.ndarray:
    return np.asarray(image.resize((16, 16), Image.Resampling.BOX), dtype=np.float32).ravel() / 255


def halves(image: Image.Image) -> list[Image.Image]:
    return [image.crop((x, 0, x + 32, 64)) for x in (0, 32)]


def around(image: Image.Image, spot: tuple[int, int]) -> Image.Image:
    return image.crop((spot[0] - 15, spot[1] - 15, spot[0] + 15, spot[1] + 15))


class Nearest:
    """Answers by the nearest of known pictures."""

    def __init__(self, emoji: Emoji):
        self.emoji, self.keys = emoji, list(emoji)
        self.whole = np.stack([feature(on_ground(rgba)) for rgba in emoji.values()])
        self.cut = np.stack([feature(cut_out(on_ground(rgba))) for rgba in emoji.values()])
        self.coloured = {}

    def of_colour(self, colour: str) -> np.ndarray:
        if colour not in self.coloured:
            self.coloured[colour] = np.stack([feature(cut_out(on_ground(recolour(rgba, colour)))) for rgba in self.emoji.values()])
        return self.coloured[colour]

    def names(self, image: Image.Image) -> list[tuple[str, str]]:
        """(name, style) of the nearest five."""
        return [self.keys[j] for j in np.square(self.whole - feature(image)).sum(1).argsort()[:5]]

    def style(self, image: Image.Image) -> str:
        return self.names(image)[0][1]

    def shape(self, image: Image.Image, colour: str) -> str:
        return self.keys[np.square(self.of_colour(colour) - feature(cut_out(image))).sum(1).argmin()][0]

    def hue(self, image: Image.Image, name: str) -> str:
        cut, rows = feature(cut_out(image)), [j for j, key in enumerate(self.keys) if key[0] == name]
        return min(COLOURS, key=lambda colour: np.square(self.of_colour(colour)[rows] - cut).sum(1).min())

    def half(self, image: Image.Image) -> str:
        return self.keys[np.square(self.cut - feature(cut_out(image))).sum(1).argmin()][0]


# --- the second: classify.py's net ---

class Classifier:
    """The same questions to the net."""

    def __init__(self, emoji: Emoji):
        self.all = sorted({name for name, _ in emoji})
        self.net = load_judge(len(self.all))  # as classify.py numbers them

    @torch.no_grad()
    def scores(self, image: Image.Image) -> list[Tensor]:
        return [scores[0] for scores in self.net(pixels([cut_out(image)]) / 2 + 0.5)]

    def names(self, image: Image.Image) -> list[tuple[str, str]]:
        return [(self.all[j], "") for j in self.scores(image)[0].topk(5).indices]

    def style(self, image: Image.Image) -> str:
        return list(STYLES)[self.scores(image)[1].argmax()]

    def shape(self, image: Image.Image, colour: str) -> str:
        return self.names(image)[0][0]

    def hue(self, image: Image.Image, name: str) -> str:
        return ["", *COLOURS][1 + self.scores(image)[2][1:].argmax()]

    def half(self, image: Image.Image) -> str:
        return self.names(image)[0][0]


def right(kind: str, judge: Nearest | Classifier, asked: Asked, image: Image.Image) -> dict[str, bool]:
    """The judge's answers to the rows of the table that are about this kind."""
    if kind == "colours":
        hue, shape = judge.hue(image, asked.names[0]) == asked.colour, judge.shape(image, asked.colour) in asked.names
        return {"colours: hue and shape": hue and shape, "colours: hue": hue, "colours: shape": shape}
    if kind == "pairs":
        found = [judge.half(half) for half in halves(image)]
        hits = max(sum(f == name for f, name in zip(found, order)) for order in (asked.names, asked.names[::-1]))
        return {"pairs: both halves": hits == 2, "pairs: one half or both": hits > 0}
    if kind in ("numbers", "places"):
        found = [judge.half(around(image, spot)) in asked.names for spot in asked.spots]
        return {"numbers: all of them": all(found), "numbers: one or more": any(found)} if kind == "numbers" else {"places: there and right": found[0]}
    names = [name for name, _ in judge.names(image)]
    five = {f"{kind}: name, of the nearest five": any(name in asked.names for name in names)}
    return five if kind == "synonyms" else {"captions: name": names[0] in asked.names, **five, "captions: style": judge.style(image) == asked.style}


# --- the table ---

def table(draw: Callable[[list[str]], list[Image.Image]], vae: Callable[[list[Image.Image]], list[Image.Image]], n: int, emoji: Emoji,
          captions: list[str] | None = None) -> tuple[dict[str, list[float]], dict[str, float]]:
    """For each row of BARS the % right: nearest, nearest of true pictures, classifier, classifier of true pictures; and the distances."""
    judges = [Nearest(emoji)] + ([Classifier(emoji)] if FILE.exists() else [])
    rows, apart = {}, {}
    for kind in KINDS:
        asked = ask(kind, n, emoji, captions)
        drawn, true = draw([a.prompt for a in asked]), vae([a.picture for a in asked])
        for judge, images in product(judges, (drawn, true)):
            answers = [right(kind, judge, a, image) for a, image in zip(asked, images)]
            for row in answers[0]:
                rows.setdefault(row, []).append(100 * sum(answer[row] for answer in answers) / len(answers))
        apart[kind] = float(np.median([distances(judges[0].whole, image).min() for image in drawn]))
    apart["styles of one emoji"] = float(np.median([distances(judges[0].whole[[judges[0].keys.index((name, other)) for other in STYLES if other != style]],
                                                              on_ground(rgba)).min() for (name, style), rgba in emoji.items()]))
    return rows, apart


def distances(features: np.ndarray, image: Image.Image) -> np.ndarray:
    """Root mean square difference at 16x16, in 255ths."""
    return 255 * np.square(features - feature(image)).mean(1) ** 0.5


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
    emoji = load_emoji()
    if not emoji:
        sys.exit("no pictures: run data/emoji/prepare.py first")

    def draw(prompts: list[str]) -> list[Image.Image]:
        return [image for i in tqdm(range(0, len(prompts), 10)) for image in sd.generate(prompts[i:i + 10], seed=i, **settings)]

    def through_vae(images: list[Image.Image]) -> list[Image.Image]:
        return [sd.decode_latents(sd.encode_image([image]))[0] for image in images]

    rows, apart = table(draw, through_vae, args.n, emoji, json.loads(sd.metadata.get("captions", "[]")))
    print(f"{'':36}{'bar':>6}  {'nearest':>8} {'(true)':>7}   classifier (true)")
    for row, bar in BARS.items():
        nearest, of_true, *other = rows[row]
        print(f"{row:36}{'' if bar is None else f'{bar}%':>6}  {nearest:7.1f}% {of_true:6.1f}%"
              + (f"      {other[0]:5.1f}% {other[1]:5.1f}%" if other else "      run classify.py"))
    print("Median distance at 16x16, in 255ths, of a drawn picture to the nearest of train/: "
          + ", ".join(f"{kind} {apart[kind]:.1f}" for kind in ("captions", "synonyms", "colours", "pairs"))
          + f"; of a picture of train/ to the nearest other style of its emoji: {apart['styles of one emoji']:.1f}")


def contact_sheet(sd: StableDiffusion, settings: dict) -> Image.Image:
    """Twelve training captions above twelve other prompts, of which at least the colours, words and pairs set aside were never shown, from seed 0."""
    side, text = 2 * sd.config.size, 16
    page = Image.new("RGB", (6 * side, 4 * (side + text)), "white")
    for i, prompt in enumerate(CAPTIONS + OTHERS):
        x, y = i % 6 * side, i // 6 * (side + text)
        page.paste(sd.generate(prompt, **settings)[0].resize((side, side), Image.Resampling.LANCZOS), (x, y))
        ImageDraw.Draw(page).text((x + side // 2, y + side), prompt, "black", anchor="ma", font_size=9)
    return page


if __name__ == "__main__":
    main()
