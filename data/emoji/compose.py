"""Compose captioned pictures of the emoji in train/, at 64x64 pixels.

They teach colours, backgrounds, sizes, places, pairs and numbers.

    python data/emoji/compose.py [--n 40000] [--seed 0] [--out DIR] [--size 64]
    python train.py --data data/emoji/train data/emoji/composed ...

Run data/emoji/prepare.py first. It writes composed/NUMBER-KIND.png (RGB) and .txt (one to three
captions, all of them true). The same seed writes the same pictures. Some colours of objects and
some pairs of objects are never written (`set_aside`): a model that draws those has composed them,
not remembered them. `recolour`, `place` and `pair` can draw the true picture of any.
With --size 128 it writes the same scenes of train128/ (originals.py) into composed128/.
"""
import argparse
import random
import re
import sys
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image
from prepare import HERE, STYLES, listed, replaced_folders, with_article

KINDS = {  # what is composed: its weight
    "plain": 10, "background": 12, "colour": 18, "size": 5, "place": 10, "pair": 18, "number": 7,
    "colour background": 6, "colour size": 3, "colour place": 2, "colour pair": 6,
    "colour number": 2, "background pair": 2, "background place": 1}
COLOURS = {  # name: RGB of recoloured objects, then other shades of a background of that name
    "red": [(222, 35, 45), (190, 20, 30), (245, 75, 75)],
    "orange": [(246, 135, 25), (255, 160, 60), (235, 115, 10)],
    "yellow": [(250, 208, 35), (255, 230, 90), (245, 220, 20)],
    "green": [(52, 172, 70), (20, 110, 45), (135, 210, 120)],
    "blue": [(40, 110, 228), (20, 50, 150), (115, 175, 250)],
    "purple": [(138, 66, 200), (90, 35, 140), (175, 120, 230)],
    "pink": [(250, 125, 185), (255, 175, 210), (240, 95, 160)],
    "brown": [(128, 78, 48), (95, 55, 30), (150, 100, 65)],
    "gray": [(150, 150, 153), (110, 110, 115), (185, 185, 188)],
    "black": [(48, 46, 50), (10, 10, 12), (30, 30, 33)],
    "white": [(238, 238, 240), (255, 255, 255), (247, 247, 250)]}
PLACES = {  # words: centre (x, y) in pixels of a 64x64 picture
    "on the left": (17, 32), "on the right": (47, 32),
    "at the top": (32, 17), "at the bottom": (32, 47),
    "in the top left corner": (16, 16), "in the top right corner": (48, 16),
    "in the bottom left corner": (16, 48), "in the bottom right corner": (48, 48)}
NUMBERS = {"two": [(17, 32), (47, 32)], "three": [(32, 17), (17, 47), (47, 47)],
           "four": [(17, 17), (47, 17), (17, 47), (47, 47)]}
PLURALS = {
    "mouse": "mice", "goose": "geese", "tooth": "teeth", "die": "dice", "wolf": "wolves",
    "leaf": "leaves", "knife": "knives", "scarf": "scarves", "cactus": "cacti",
    "potato": "potatoes", "tomato": "tomatoes", "mango": "mangoes", "volcano": "volcanoes",
    "tornado": "tornadoes", "mosquito": "mosquitoes", "snowman": "snowmen"}

# Names that read badly with an adjective or beside another name: only alone, or on a background.
ODD = listed("""bowling, camping, cooking, locked, star-struck, thumbs up, thumbs down,
high voltage, hourglass done, santa claus, mount fuji, tokyo tower, statue of liberty,
magnifying glass tilted left, globe showing americas, ice hockey, ping pong, tennis""")
# Names with a colour of their own, and scenes of many colours: never recoloured.
MANY = listed("""rainbow, fireworks, sunrise, world map, desert, desert island,
beach with umbrella, framed picture, artist palette, bento box, flag in hole, shooting star,
sun behind cloud, glass of milk""")
OWN = rf"\b({'|'.join(COLOURS)})"
# Names whose pictures have letters or digits: never mirrored.
TEXT = listed("""1st place medal, alarm clock, mantelpiece clock, watch, pool 8 ball, stop sign,
taxi, police car, ambulance, hospital, red envelope, white flower, slot machine,
dollar banknote, money bag, keyboard, newspaper, sleeping face, compass, world map,
globe showing americas, telephone, musical note, magnifying glass tilted left, postbox,
fuel pump, coin, stadium, bus, fire engine, sports medal, clapper board, joystick""")

Emoji = dict[tuple[str, str], Image.Image]  # (name, style): RGBA
WHITE = (255, 255, 255)


def set_aside(a: str, b: str) -> bool:
    """Whether a fact is never trained on.

    A fact is a colour and an object (8% of them), or two objects in any order (10%).
    """
    key, share = (f"{a} {b}", 8) if a in COLOURS else (" + ".join(sorted((a, b))), 10)
    return zlib.crc32(key.encode()) % 100 < share


# --- colours ---

def hue_chroma_light(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Colours (..., 3) in [0, 1] -> hue in degrees, distance from gray, lightness.

    The last two are in [0, 1].
    """
    r, g, b = np.moveaxis(rgb, -1, 0)
    hue = np.degrees(np.arctan2(3**0.5 * (g - b), 2 * r - g - b)) % 360
    return hue, rgb.max(-1) - rgb.min(-1), rgb @ np.array([0.3, 0.59, 0.11])


def body(rgb: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """The part of an object that its colour word is about, 0 to 1 at each pixel.

    It is the main hue (a rose without its leaf) if that is most of the object; else all that is
    not gray (a lollipop without its stick) if that is; else everything (a white ghost).
    """
    hue, chroma, _ = hue_chroma_light(rgb)
    coloured = np.clip((chroma - 0.08) / 0.06, 0, 1)
    # cos(hue - angle) from these two is much faster than a cosine for each angle
    x, y, weight = np.cos(np.radians(hue)), np.sin(np.radians(hue)), coloured * alpha

    def amount(angle: int) -> float:
        cosine = x * np.cos(np.radians(angle)) + y * np.sin(np.radians(angle))
        return (np.square(np.square(cosine.clip(0))) * weight).sum()

    main = max(range(0, 360, 10), key=amount)
    distance = np.abs((hue - main + 180) % 360 - 180)
    one = coloured * np.clip((60 - distance) / 20, 0, 1)
    everything = np.ones_like(alpha)
    of_one, of_coloured, of_all = [(part * alpha).sum() for part in (one, coloured, everything)]
    if of_one >= max(0.55 * of_all, 0.7 * of_coloured):
        return one
    return coloured if of_coloured >= 0.55 * of_all else everything


def recolour(rgba: Image.Image, colour: str) -> Image.Image:
    """The object in another colour.

    The middle lightness of its body becomes the colour; darker parts go to black, lighter ones to
    white. (A mere change of hue would leave white things white, and would make brown of a dark
    orange and olive of a dark yellow.)
    """
    pixels = np.asarray(rgba, dtype=np.float64) / 255
    rgb, alpha, target = pixels[..., :3], pixels[..., 3], np.array(COLOURS[colour][0]) / 255
    where, light = body(rgb, alpha), hue_chroma_light(rgb)[2]
    order = light.ravel().argsort()
    weight = (where * alpha).ravel()[order].cumsum()
    median = light.ravel()[order][np.searchsorted(weight, weight[-1] / 2)]
    middle = np.clip(median, 0.15, 0.95)
    shade = np.minimum(light / middle, 1)
    shine = 0.6 * np.clip((light - middle) / max(1 - middle, 0.3), 0, 1)
    new = target * shade[..., None] + (1 - target) * shine[..., None]
    mixed = np.dstack([rgb + (new - rgb) * where[..., None], alpha])
    return Image.fromarray((mixed * 255).round().astype(np.uint8))


# --- places ---

def place(rgba: Image.Image, x: float, y: float, width: float, height: float,
          side: int = 64) -> Image.Image:
    """The object alone on a transparent picture of side x side pixels.

    It is as large as fits into width x height, and its middle is at (x, y). These four are in
    pixels of a 64x64 picture, whatever the side is.
    """
    thing, unit = rgba.crop(rgba.getchannel("A").getbbox()), side / 64
    scale = unit * min(width / thing.width, height / thing.height)
    size = [max(1, round(length * scale)) for length in thing.size]
    thing = thing.convert("RGBa").resize(size, Image.Resampling.LANCZOS)  # RGBa: no fringes
    page = Image.new("RGBa", (side, side))
    page.paste(thing, (round(unit * x - thing.width / 2), round(unit * y - thing.height / 2)))
    return page.convert("RGBA")


def pair(left: Image.Image, right: Image.Image, size: float = 36) -> Image.Image:
    """Two objects side by side, each at most `size` high and half a picture wide."""
    return Image.alpha_composite(place(left, 16, 32, 30, size, left.width),
                                 place(right, 48, 32, 30, size, right.width))


def on_background(rgba: Image.Image, rgb: tuple[int, int, int] = WHITE) -> Image.Image:
    return Image.alpha_composite(Image.new("RGBA", rgba.size, rgb), rgba).convert("RGB")


def moved(rgba: Image.Image, scale: float, rng: random.Random) -> Image.Image:
    """The whole picture smaller, and shifted by up to 3/64 if nothing is cut off."""
    box = rgba.getchannel("A").getbbox()
    left, top, right, bottom = (64 / rgba.width * side for side in box)
    room = min(3, 32 * (1 - scale))
    x, y = [32 + scale * ((a + b) / 2 - 32) + rng.uniform(-room, room)
            for a, b in ((left, right), (top, bottom))]
    return place(rgba, x, y, scale * (right - left), scale * (bottom - top), rgba.width)


# --- words ---

def plural(name: str) -> str | None:
    """'cats'; None where a plural would be unnatural.

    That is for substances, plurals, and names longer than a noun phrase.
    """
    long = r" (with|of|in|on|behind|showing|and|a) |'s |^four "
    if with_article(name) == name or name in ODD or re.search(long, name):
        return None
    start, last = re.fullmatch(r"(.*[ -])?([^ -]+)", name).groups(default="")
    if last in PLURALS or re.search(r"(fish|deer|shrimp|squid|moai)$", last):
        return start + PLURALS.get(last, last)
    if re.search(r"(s|x|z|ch|sh)$", last):
        return name + "es"
    return name[:-1] + "ies" if re.search(r"[^aeiou]y$", name) else name + "s"


def fits(name: str, kind: str) -> bool:
    """Whether pictures of this kind may show the name."""
    if name in ODD and kind not in ("plain", "background"):
        return False
    if "colour" in kind and (name in MANY or re.search(OWN, name)):
        return False
    return "number" not in kind or plural(name) is not None


# --- pictures ---

def compose(kind: str, style: str, names: list[str], emoji: Emoji, rng: random.Random
            ) -> tuple[Image.Image, list[str], list[tuple[str, str]]]:
    """A picture of that kind, its captions, and its facts: (colour, name) and (name, name)."""
    while True:
        chosen = rng.sample(names, 2 if "pair" in kind else 1)
        colours = [rng.choice(list(COLOURS)) if "colour" in kind else "" for _ in chosen]
        if "pair" in kind and rng.random() < 0.7:  # mostly only one of the two is recoloured
            colours[rng.randrange(2)] = ""
        facts = [(colour, name) for colour, name in zip(colours, chosen) if colour]
        if "pair" in kind:
            facts.append(tuple(chosen))
        if not any(set_aside(*fact) for fact in facts):
            break
    things = [recolour(emoji[name, style], colour) if colour else emoji[name, style]
              for colour, name in zip(colours, chosen)]
    words = [f"{colour} {name}".strip() for colour, name in zip(colours, chosen)]
    picture, phrases = arrange(kind, things, words, rng)
    background = WHITE
    if "background" in kind:
        colour, background = choose_background(picture, rng)
        endings = [f" on {with_article(colour + ' background')}"] * 3 + [f", {colour} background"]
        phrases = [phrase + rng.choice(endings) for phrase in phrases]
    phrases = list(dict.fromkeys(phrases))  # "scissors" has no article
    phrases = rng.sample(phrases, min(3, len(phrases)))
    # a caption that names no style means 3d
    lines = [phrase if style == "3d" and rng.random() < 0.6 else f"{phrase}, {style}"
             for phrase in phrases]
    return on_background(picture, background), lines, facts


def arrange(kind: str, things: list[Image.Image], words: list[str],
            rng: random.Random) -> tuple[Image.Image, list[str]]:
    """The things on a transparent picture, and the phrases that describe it."""
    thing, word = things[0], words[0]
    if "pair" in kind:
        a, b = map(with_article, words)
        phrases = [f"{a} next to {b}", f"{a} and {b}", f"{a} to the left of {b}",
                   f"{b} to the right of {a}"]
        return pair(*things, size=rng.uniform(34, 38)), phrases
    if "number" in kind:
        number, side = rng.choice(list(NUMBERS)), rng.uniform(26, 29)
        picture, height = Image.new("RGBA", thing.size), side + 8 * (number == "two")
        for x, y in NUMBERS[number]:
            one = place(thing, x, y, side, height, thing.width)
            picture = Image.alpha_composite(picture, one)
        return picture, [f"{number} {plural(word)}"]
    if "place" in kind:
        where, side = rng.choice(list(PLACES)), rng.uniform(25, 31)
        phrases = [f"{with_article(word)} {where}", f"{word} {where}"]
        return place(thing, *PLACES[where], side, side, thing.width), phrases
    if "size" in kind:
        size = rng.choice(["small", "big"])
        # a big one is cut off a little
        side, off = (rng.uniform(20, 29), 2) if size == "small" else (rng.uniform(66, 70), 0)
        x, y = 32 + rng.uniform(-off, off), 32 + rng.uniform(-off, off)
        picture = place(thing, x, y, side, side, thing.width)
        return picture, [with_article(f"{size} {word}"), f"{size} {word}"]
    if kind == "plain" and word not in TEXT and rng.random() < 0.5:
        thing = thing.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    # some emoji fill their whole square: with a background they are smaller
    scale = rng.uniform(0.75, 0.92) if "background" in kind else rng.uniform(0.85, 1)
    return moved(thing, scale, rng), [with_article(word), word]


def choose_background(picture: Image.Image,
                      rng: random.Random) -> tuple[str, tuple[int, int, int]]:
    """The name and RGB of a background that differs from the picture's mean colour."""
    pixels = np.asarray(picture, dtype=np.float64).reshape(-1, 4)
    mean = pixels[:, :3].T @ pixels[:, 3] / pixels[:, 3].sum()
    able = [(colour, rgb) for colour in COLOURS for rgb in COLOURS[colour]
            if np.linalg.norm(mean - rgb) > 80]
    colour, rgb = rng.choice(able)
    shift = rng.randint(-8, 8)  # the same for all three: a gray stays gray
    return colour, tuple(min(255, max(0, value + shift)) for value in rgb)


def load_emoji(folder: str = "train") -> Emoji:
    """All pictures of a folder that prepare.py or originals.py wrote."""
    emoji = {}
    for path in sorted((HERE / folder).glob("*.png")):
        name, style = path.with_suffix(".txt").read_text().split("\n")[0].split(", ")
        emoji[name, style] = Image.open(path).convert("RGBA")
    return emoji


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=40000, help="pictures to write")
    parser.add_argument("--seed", type=int, default=0, help="another seed writes other pictures")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write composed/ into")
    parser.add_argument("--size", type=int, choices=(64, 128), default=64, help="of the pictures")
    args = parser.parse_args()
    if args.n < 1:
        parser.error("--n must be at least 1")
    suffix, source = ("", "prepare.py") if args.size == 64 else ("128", "originals.py")
    train, composed = f"train{suffix}", f"composed{suffix}"
    emoji = load_emoji(train)
    if not emoji:
        sys.exit(f"compose.py: no pictures in {HERE / train}: run data/emoji/{source} first")
    names = sorted({name for name, _ in emoji})
    names_for = {kind: [name for name in names if fits(name, kind)] for kind in KINDS}
    counts, facts = Counter(), set()
    with replaced_folders(args.out, [composed]) as folder:
        for i in range(args.n):
            # a picture depends only on the seed and its number
            rng = random.Random(f"{args.seed} {i}")
            kind = rng.choices(list(KINDS), KINDS.values())[0]
            style = rng.choices(list(STYLES), [2, 1, 1])[0]
            picture, lines, new_facts = compose(kind, style, names_for[kind], emoji, rng)
            path = folder / composed / f"{i:05d}-{kind.replace(' ', '-')}"
            picture.save(f"{path}.png", compress_level=1)
            path.with_suffix(".txt").write_text("\n".join(lines) + "\n")
            counts[kind] += 1
            facts.update(new_facts)
        assert not any(set_aside(*fact) for fact in facts)
    print(f"{composed}/: {args.n} pictures ("
          + ", ".join(f"{kind} {counts[kind]}" for kind in KINDS) + ")")


if __name__ == "__main__":
    main()
