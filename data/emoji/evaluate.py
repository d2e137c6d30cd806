"""Does the built-in model draw what the prompt asks for?

    python data/emoji/evaluate.py [--ckpt FILE] [--n 200] [--guidance G] [--steps N]
    python data/emoji/evaluate.py --seeds 12 --n 100
    python data/emoji/evaluate.py --sheet docs/emoji.png

The first prints a table, the second looks at many seeds of one prompt, the third draws 24 prompts.
Run data/emoji/prepare.py first, and classify.py for the second judge.

There are n prompts of each kind, chosen at random with a fixed seed. Each is drawn once with the
default settings, picture i from seed i:
    captions    of train/
    synonyms    words of synonyms.txt, which are in no caption (vectors.py has the rule)
    colours     "a blue cat": a colour and an object that compose.py sets aside; it is not the
                object's own colour
    pairs       "a cat next to a dog": two objects that compose.py sets aside
    numbers     "three stars"; these and the places may have been trained on
    places      "a dog on the left"
Two judges look at them. Beside each answer stands what the judge says of true pictures (composed as
the prompt says, then encoded and decoded by the model's VAE): the most that can be reached.
    nearest     the nearest by L2 at 16x16 RGB. Captions and synonyms: of all pictures of train/.
                Colours and pairs: what is not white is cropped and scaled to full size first. The
                shape is right if the object is the nearest of all objects in that colour, the hue
                if the colour is the nearest of that object in all colours. A pair is right if the
                left and the right half are each nearest to their own object, in either order.
                Numbers and places: each square of 30 pixels where one is asked for; the whole
                picture is right if all of them are.
    classifier  the same questions, asked of classify.py's network.

With --seeds, n names are drawn, each from so many seeds. A picture is right if it, or its mirror
image, is nearest to a picture of its name. The distance of the pictures of one name to each other
says how much seeds matter.
"""
import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice, product
from statistics import median

import numpy as np
import torch
from classify import FILE, cut_out, load_judge
from compose import (
    COLOURS,
    NUMBERS,
    PLACES,
    Emoji,
    arrange,
    fits,
    load_emoji,
    moved,
    on_background,
    pair,
    recolour,
    set_aside,
)
from PIL import Image, ImageDraw
from prepare import HERE, STYLES, with_article
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(HERE.parents[1]))

from extras import int8
from sd import StableDiffusion, pixels

CAPTIONS = [
    "a red apple", "pizza, twemoji", "a rocket", "cat face, noto", "a sunflower", "an octopus",
    "a penguin, twemoji", "a guitar", "a red heart", "smiling face with sunglasses, noto",
    "a crown", "a snowman"]
OTHERS = [
    "a blue cat", "an orange guitar", "a green butterfly", "a red octopus", "two green frogs",
    "a kitten", "a burger", "a blue heart next to a red apple", "three stars",
    "a rocket on a blue background", "a small dog on the left", "a cat next to a dog"]
BARS = {  # the rows of the table, and the % that was aimed at
    "captions: name": 60, "captions: name, or mirrored": None,
    "captions: name, of the nearest five": 80, "captions: style": 90,
    "synonyms: name, of the nearest five": 30,
    "colours: hue and shape": 60, "colours: hue": None, "colours: shape": None,
    "pairs: both halves": 40, "pairs: one half or both": None,
    "numbers: all of them": None, "numbers: one or more": None,
    "places: there and right": None}
KINDS = ("captions", "synonyms", "colours", "pairs", "numbers", "places")
Images = list[Image.Image]


@dataclass
class Asked:
    """A prompt, what it asks for, and a true picture of it."""
    prompt: str
    names: list[str]  # one of them is asked for; of a pair, both
    picture: Image.Image
    style: str = ""
    colour: str = ""
    spots: tuple[tuple[int, int], ...] = ()  # the centres of the things


# --- what is asked ---

def ask(kind: str, n: int, emoji: Emoji, captions: list[str] | None = None) -> list[Asked]:
    """n different prompts of a kind, or all there are; the same for the same arguments."""
    rng = random.Random(f"0 {kind}")
    names = sorted({name for name, _ in emoji})
    if kind == "captions":
        return ask_captions(n, emoji, captions, rng)
    if kind == "synonyms":
        return ask_synonyms(n, emoji, rng)
    if kind == "colours":
        return ask_colours(n, emoji, names, rng)
    if kind == "pairs":
        return ask_pairs(n, emoji, names, rng)
    return ask_spots(kind, n, emoji, names, rng)


def ask_captions(n: int, emoji: Emoji, captions: list[str] | None,
                 rng: random.Random) -> list[Asked]:
    known = {f"{name}, {style}": (name, style) for name, style in emoji}
    able = [known[caption] for caption in captions or known if caption in known]
    return [Asked(f"{name}, {style}", [name], true_picture(emoji[name, style], rng), style)
            for name, style in rng.sample(able, min(n, len(able)))]


def ask_synonyms(n: int, emoji: Emoji, rng: random.Random) -> list[Asked]:
    lines = [line.split(": ") for line in (HERE / "synonyms.txt").read_text().splitlines()]
    able = [(word, of.split(", ")) for word, of in lines
            if all((name, "3d") in emoji for name in of.split(", "))]
    return [Asked(word, of, true_picture(emoji[rng.choice(of), "3d"], rng))
            for word, of in rng.sample(able, min(n, len(able)))]


def ask_colours(n: int, emoji: Emoji, names: list[str], rng: random.Random) -> list[Asked]:
    facts = [(colour, name) for colour, name in product(COLOURS, names)
             if fits(name, "colour") and set_aside(colour, name)]
    rng.shuffle(facts)
    facts = [(colour, name, rng.choice(list(STYLES))) for colour, name in facts]
    able = ((colour, name, style) for colour, name, style in facts
            if colour != own_colour(emoji[name, style]))
    asked = []
    for colour, name, style in islice(able, n):
        prompt = with_style(with_article(f"{colour} {name}"), style)
        picture = true_picture(recolour(emoji[name, style], colour), rng)
        asked.append(Asked(prompt, [name], picture, style, colour))
    return asked


def ask_pairs(n: int, emoji: Emoji, names: list[str], rng: random.Random) -> list[Asked]:
    facts = [(a, b) for a, b in product(names, names)
             if a != b and fits(a, "pairs") and fits(b, "pairs") and set_aside(a, b)]
    asked = []
    for a, b in rng.sample(facts, min(n, len(facts))):
        style = rng.choice(list(STYLES))
        prompt = with_style(f"{with_article(a)} next to {with_article(b)}", style)
        picture = on_background(pair(emoji[a, style], emoji[b, style]))
        asked.append(Asked(prompt, [a, b], picture, style))
    return asked


def ask_spots(kind: str, n: int, emoji: Emoji, names: list[str],
              rng: random.Random) -> list[Asked]:
    """Numbers and places."""
    able, asked = [name for name in names if fits(name, kind[:-1])], []
    for name in rng.sample(able, min(n, len(able))):
        style = rng.choice(list(STYLES))
        picture, (phrase, *_) = arrange(kind[:-1], [emoji[name, style]], [name], rng)
        if kind == "numbers":
            spots = NUMBERS[phrase.split()[0]]
        else:
            spots = [PLACES[phrase.removeprefix(with_article(name) + " ")]]
        asked.append(Asked(with_style(phrase, style), [name], on_background(picture), style,
                           spots=tuple(spots)))
    return asked


def true_picture(rgba: Image.Image, rng: random.Random) -> Image.Image:
    return on_background(moved(rgba, 0.92, rng))


def with_style(phrase: str, style: str) -> str:
    """A prompt that names no style means 3d."""
    return phrase if style == "3d" else f"{phrase}, {style}"


def own_colour(rgba: Image.Image) -> str:
    """The colour that changes the object least."""
    own = feature(on_background(rgba))

    def change(colour: str) -> float:
        return np.square(feature(on_background(recolour(rgba, colour))) - own).sum()
    return min(COLOURS, key=change)


def reduced(image: Image.Image) -> Image.Image:
    """At 64x64, as the pictures of train/ are."""
    return image.resize((64, 64), Image.Resampling.BOX)


# --- the first judge: the nearest picture ---

def feature(image: Image.Image) -> np.ndarray:
    """The picture at 16x16, values in [0, 1]."""
    small = image.resize((16, 16), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32).ravel() / 255


def halves(image: Image.Image) -> Images:
    return [image.crop((x, 0, x + 32, 64)) for x in (0, 32)]


def around(image: Image.Image, spot: tuple[int, int]) -> Image.Image:
    x, y = spot
    return image.crop((x - 15, y - 15, x + 15, y + 15))


class Nearest:
    """Answers by the nearest of known pictures."""

    def __init__(self, emoji: Emoji):
        self.emoji, self.keys = emoji, list(emoji)
        on_white = [on_background(rgba) for rgba in emoji.values()]
        self.whole = np.stack([feature(image) for image in on_white])
        self.cut = np.stack([feature(cut_out(image)) for image in on_white])
        self.coloured: dict[str, np.ndarray] = {}

    def of_colour(self, colour: str) -> np.ndarray:
        if colour not in self.coloured:
            self.coloured[colour] = np.stack(
                [feature(cut_out(on_background(recolour(rgba, colour))))
                 for rgba in self.emoji.values()])
        return self.coloured[colour]

    def names(self, image: Image.Image) -> list[tuple[str, str]]:
        """(name, style) of the nearest five."""
        distances = np.square(self.whole - feature(image)).sum(1)
        return [self.keys[j] for j in distances.argsort()[:5]]

    def style(self, image: Image.Image) -> str:
        return self.names(image)[0][1]

    def shape(self, image: Image.Image, colour: str) -> str:
        distances = np.square(self.of_colour(colour) - feature(cut_out(image))).sum(1)
        return self.keys[distances.argmin()][0]

    def hue(self, image: Image.Image, name: str) -> str:
        cut, rows = feature(cut_out(image)), [j for j, key in enumerate(self.keys)
                                              if key[0] == name]

        def distance(colour: str) -> float:
            return np.square(self.of_colour(colour)[rows] - cut).sum(1).min()
        return min(COLOURS, key=distance)

    def half(self, image: Image.Image) -> str:
        distances = np.square(self.cut - feature(cut_out(image))).sum(1)
        return self.keys[distances.argmin()][0]


# --- the second judge: classify.py's network ---

class Classifier:
    """Answers the same questions by the network."""

    def __init__(self, emoji: Emoji):
        self.all = sorted({name for name, _ in emoji})
        self.net = load_judge(len(self.all))  # numbered as in classify.py

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
        return list(COLOURS)[self.scores(image)[2][1:].argmax()]  # 0 is the object's own

    def half(self, image: Image.Image) -> str:
        return self.names(image)[0][0]


def right(kind: str, judge: Nearest | Classifier, asked: Asked,
          image: Image.Image) -> dict[str, bool]:
    """The judge's answers for the rows of the table that are about this kind."""
    if kind == "colours":
        hue = judge.hue(image, asked.names[0]) == asked.colour
        shape = judge.shape(image, asked.colour) in asked.names
        return {"colours: hue and shape": hue and shape, "colours: hue": hue,
                "colours: shape": shape}
    if kind == "pairs":
        found = [judge.half(half) for half in halves(image)]
        hits = max(sum(f == name for f, name in zip(found, order))
                   for order in (asked.names, asked.names[::-1]))
        return {"pairs: both halves": hits == 2, "pairs: one half or both": hits > 0}
    if kind in ("numbers", "places"):
        found = [judge.half(around(image, spot)) in asked.names for spot in asked.spots]
        if kind == "places":
            return {"places: there and right": found[0]}
        return {"numbers: all of them": all(found), "numbers: one or more": any(found)}
    names = [name for name, _ in judge.names(image)]
    five = {f"{kind}: name, of the nearest five": any(name in asked.names for name in names)}
    if kind == "synonyms":
        return five
    return {"captions: name": names[0] in asked.names,
            "captions: name, or mirrored": either_way_round(judge, asked.names[0], image), **five,
            "captions: style": judge.style(image) == asked.style}


# --- the table ---

def make_judges(emoji: Emoji) -> list[Nearest | Classifier]:
    """The second one only if classify.py has trained it."""
    return [Nearest(emoji)] + ([Classifier(emoji)] if FILE.exists() else [])


def table(draw: Callable[[list[str]], Images], vae: Callable[[Images], Images], n: int,
          emoji: Emoji, captions: list[str] | None = None
          ) -> tuple[dict[str, list[float]], dict[str, float]]:
    """For each row of BARS the % right, and for each kind the median distance.

    The percentages: nearest, nearest of true pictures, classifier, classifier of true pictures.
    """
    judges = make_judges(emoji)
    rows, apart = {}, {}
    for kind in KINDS:
        asked = ask(kind, n, emoji, captions)
        drawn, true = draw([a.prompt for a in asked]), vae([a.picture for a in asked])
        for judge, images in product(judges, (drawn, true)):
            answers = [right(kind, judge, a, image) for a, image in zip(asked, images)]
            for row in answers[0]:
                share = sum(answer[row] for answer in answers) / len(answers)
                rows.setdefault(row, []).append(100 * share)
        apart[kind] = median_distance([(judges[0].whole, image) for image in drawn])
    others = []
    for (name, style), rgba in emoji.items():
        keys = [(name, other) for other in STYLES if other != style]
        features = judges[0].whole[[judges[0].keys.index(key) for key in keys]]
        others.append((features, on_background(rgba)))
    apart["styles of one emoji"] = median_distance(others)
    return rows, apart


def seeds_table(draw: Callable[[list[str]], Images], n: int, seeds: int, emoji: Emoji) -> None:
    """Print how many pictures of n names are right, and how far apart those of one name lie."""
    judges = make_judges(emoji)
    names = sorted({name for name, _ in emoji})
    names = random.Random("0 seeds").sample(names, min(n, len(names)))
    wrong, apart = [Counter() for _ in judges], []
    for name in names:
        images = draw([with_article(name)] * seeds)
        for judge, found in zip(judges, wrong):
            found[name] = sum(not either_way_round(judge, name, image) for image in images)
        features = np.stack([feature(image) for image in images])
        apart.append(median(distance for i, image in enumerate(images)
                            for distance in distances(features[:i], image)))
    for judge, found in zip(judges, wrong):
        print(f"{type(judge).__name__}: {100 - 100 * found.total() / len(names) / seeds:.1f}% of "
              f"{len(names)} names, {seeds} seeds each, are right; wrong: "
              + ", ".join(f"{name} {count}" for name, count in found.most_common() if count))
    print(f"Median distance at 16x16, in 255ths, of two pictures of one name: {median(apart):.1f}")


def either_way_round(judge: Nearest | Classifier, name: str, image: Image.Image) -> bool:
    """Whether the picture shows the name, or its mirror image does: training has seen both."""
    mirrored = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return any(judge.names(one)[0][0] == name for one in (image, mirrored))


def median_distance(pairs: list[tuple[np.ndarray, Image.Image]]) -> float:
    """The median of the distances of pictures to the nearest of their features."""
    return float(np.median([distances(features, image).min() for features, image in pairs]))


def distances(features: np.ndarray, image: Image.Image) -> np.ndarray:
    """Root mean square difference at 16x16, in 255ths."""
    return 255 * np.square(features - feature(image)).mean(1) ** 0.5


# --- the script ---

def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ckpt", help="default: the built-in model")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance", type=float)
    parser.add_argument("--sampler")
    parser.add_argument("--int8", action="store_true", help="as sd.py --int8")
    parser.add_argument("--seeds", type=int, help="draw n names from so many seeds, and stop")
    parser.add_argument("--sheet", help="write a sheet of 24 prompts here and stop")
    args = parser.parse_args()
    if args.seeds is not None and args.seeds < 2:
        parser.error("--seeds must be at least 2, to compare their pictures")
    sd = StableDiffusion.load(args.ckpt)
    if args.int8:
        int8.attach(sd)
    options = {"steps": args.steps, "guidance": args.guidance, "sampler": args.sampler}
    if args.sheet:
        contact_sheet(sd, options).save(args.sheet)
        return
    emoji = load_emoji()
    if not emoji:
        sys.exit("evaluate.py: no pictures: run data/emoji/prepare.py first")

    def draw(prompts: list[str]) -> Images:
        images = []
        for i in tqdm(range(0, len(prompts), 10)):
            images += map(reduced, sd.generate(prompts[i:i + 10], seed=i, **options))
        return images

    def through_vae(images: Images) -> Images:
        sides = (sd.preset.size, sd.preset.size)
        large = [image.resize(sides, Image.Resampling.BICUBIC) for image in images]
        return [reduced(sd.decode_latents(sd.encode_image([image]))[0]) for image in large]

    if args.seeds is not None:
        seeds_table(draw, args.n, args.seeds, emoji)
        return
    captions = json.loads(sd.metadata.get("captions", "[]"))
    print_table(*table(draw, through_vae, args.n, emoji, captions))


def print_table(rows: dict[str, list[float]], apart: dict[str, float]) -> None:
    print(f"{'':36}{'bar':>6}  {'nearest':>8} {'(true)':>7}   classifier (true)")
    for row, bar in BARS.items():
        nearest, of_true, *other = rows[row]
        second = f"{other[0]:5.1f}% {other[1]:5.1f}%" if other else "run classify.py"
        print(f"{row:36}{'' if bar is None else f'{bar}%':>6}  {nearest:7.1f}% {of_true:6.1f}%"
              f"      {second}")
    kinds = ("captions", "synonyms", "colours", "pairs")
    print("Median distance at 16x16, in 255ths, of a drawn picture to the nearest of train/: "
          + ", ".join(f"{kind} {apart[kind]:.1f}" for kind in kinds)
          + "; of a picture of train/ to the nearest other style of its emoji:"
          f" {apart['styles of one emoji']:.1f}")


def contact_sheet(sd: StableDiffusion, options: dict) -> Image.Image:
    """Twelve training captions above twelve other prompts, all from seed 0.

    The colours, synonyms and pairs among the others were never trained on.
    """
    side, text = 128, 16
    page = Image.new("RGB", (6 * side, 4 * (side + text)), "white")
    pen = ImageDraw.Draw(page)
    for i, prompt in enumerate(CAPTIONS + OTHERS):
        x, y = i % 6 * side, i // 6 * (side + text)
        image = sd.generate(prompt, **options)[0]
        page.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.text((x + side // 2, y + side), prompt, "black", anchor="ma", font_size=9)
    return page


if __name__ == "__main__":
    main()
