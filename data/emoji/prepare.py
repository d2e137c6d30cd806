"""Fetch about 1,600 emoji in three drawing styles and write captioned pictures for training.

    python data/emoji/prepare.py [--out DIR] [--size 64]

It needs npm (only to download), Pillow, and about 160 MB in .npm/ beside this file. Sources:
    @lobehub/fluent-emoji-3d  style "3d"       Microsoft Fluent Emoji, MIT
    emoji-datasource-google   style "noto"     Google Noto Emoji, Apache-2.0
    emoji-datasource-twitter  style "twemoji"  Twemoji, CC-BY 4.0
    emojibase-data            names and groups, MIT
It writes train/ (the names chosen below, each in all three styles) and rest/ (all other names):
NAME.STYLE.png is RGBA with its transparency kept. NAME.STYLE.txt has one caption per line; each
describes the picture, and the first is the main one.
"""
import argparse
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent
STYLES = {  # style: (package, version, folder of its pictures)
    "3d": ("@lobehub/fluent-emoji-3d", "1.1.0", "package/assets/"),
    "noto": ("emoji-datasource-google", "16.0.0", "package/img/google/64/"),
    "twemoji": ("emoji-datasource-twitter", "16.0.0", "package/img/twitter/64/")}
NAMES = ("emojibase-data", "17.0.0", "package/")
LEFT_OUT = {None, "component", "flags"}  # group None: the regional indicator letters

# The names trained on: what a newcomer would type and what differs at 16 x 16 pixels. They are all
# names of the emojibase subgroups in SUBGROUPS without those in SKIP (obscure, or too similar to
# another), and those in PICK.
SUBGROUPS = """animal-mammal animal-bird animal-amphibian animal-reptile animal-marine animal-bug
plant-flower plant-other food-fruit food-vegetable food-prepared food-asian food-sweet drink
dishware sport game arts-crafts musical-instrument"""
SKIP = """guide dog, service dog, pig nose, ox, water buffalo, two-hump camel, rat, bison, boar,
badger, chipmunk, ewe, moose, front-facing baby chick, black bird, wing, dodo, oyster,
cockroach, microbe, cricket, worm, beetle, rosette, wilted flower, hyacinth,
leaf fluttering in wind, sheaf of rice, herb, empty nest, ginger root, leafy green, flatbread,
tamale, stuffed flatbread, shallow pan of food, pot of food, bowl with spoon, fondue, falafel,
canned food, cut of meat, oden, curry rice, dango, fish cake with swirl, moon cake,
rice cracker, takeout box, custard, pouring liquid, mate, sake, tumbler glass, beverage box,
teacup without handle, clinking glasses, clinking beer mugs, amphora, spoon, softball,
rugby football, goal net, field hockey, lacrosse, cricket game, badminton, flying disc,
curling stone, running shirt, martial arts uniform, nesting dolls, mahjong red dragon,
flower playing cards, joker, mirror ball, performing arts, knot, sewing needle"""
PICK = """grinning face, face with tears of joy, upside-down face, winking face,
smiling face with smiling eyes, smiling face with halo, smiling face with hearts,
smiling face with heart-eyes, star-struck, face blowing a kiss, face with tongue, zany face,
thinking face, neutral face, sleeping face, face with medical mask, hot face, cold face,
exploding head, cowboy hat face, partying face, smiling face with sunglasses, nerd face,
frowning face, crying face, loudly crying face, face screaming in fear, angry face,
enraged face, smiling face with horns, skull, pile of poo, clown face, ghost, alien,
alien monster, robot, grinning cat, smiling cat with heart-eyes, crying cat, see-no-evil monkey,
heart with arrow, sparkling heart, broken heart, heart on fire, red heart, orange heart,
yellow heart, green heart, blue heart, purple heart, brown heart, black heart, white heart,
santa claus, mermaid, thumbs up, thumbs down, brain, tooth, bone, eyes, globe showing americas,
world map, compass, mountain, volcano, mount fuji, camping, beach with umbrella, desert,
desert island, stadium, brick, rock, hut, house, house with garden, office building, hospital,
factory, castle, japanese castle, tokyo tower, statue of liberty, church, mosque, fountain,
tent, sunrise, carousel horse, playground slide, ferris wheel, roller coaster, circus tent,
locomotive, bullet train, train, tram, bus, ambulance, fire engine, police car, taxi,
automobile, sport utility vehicle, pickup truck, delivery truck, tractor, racing car,
motorcycle, motor scooter, bicycle, kick scooter, skateboard, roller skate, fuel pump,
vertical traffic light, stop sign, wheel, anchor, sailboat, canoe, speedboat, ship, airplane,
parachute, helicopter, rocket, flying saucer, luggage, hourglass done, watch, alarm clock,
mantelpiece clock, full moon, crescent moon, thermometer, sun, sun with face, ringed planet,
star, glowing star, shooting star, cloud, sun behind cloud, cloud with rain, cloud with snow,
cloud with lightning, tornado, rainbow, closed umbrella, umbrella, high voltage, snowflake,
snowman, comet, fire, droplet, water wave, jack-o-lantern, christmas tree, fireworks,
firecracker, sparkles, balloon, party popper, red envelope, ribbon, wrapped gift, trophy,
sports medal, 1st place medal, musical note, studio microphone, microphone, headphone, radio,
megaphone, bell, glasses, sunglasses, necktie, t-shirt, jeans, scarf, gloves, coat, socks,
dress, shorts, bikini, handbag, shopping bags, backpack, man's shoe, running shoe, hiking boot,
high-heeled shoe, woman's boot, crown, woman's hat, top hat, graduation cap, billed cap,
lipstick, ring, gem stone, mobile phone, telephone, battery, laptop, desktop computer, printer,
keyboard, computer mouse, floppy disk, abacus, movie camera, clapper board, television, camera,
magnifying glass tilted left, candle, light bulb, flashlight, red paper lantern, closed book,
open book, books, scroll, newspaper, coin, money bag, dollar banknote, envelope, package,
postbox, pencil, pen, paintbrush, crayon, briefcase, file folder, pushpin, paperclip, scissors,
wastebasket, locked, key, old key, hammer, axe, pick, dagger, crossed swords, bomb, boomerang,
bow and arrow, shield, wrench, screwdriver, gear, magnet, ladder, toolbox, test tube, dna,
microscope, telescope, syringe, pill, adhesive bandage, stethoscope, moai, door, bed, chair,
toilet, bathtub, broom, basket, bucket, soap, toothbrush, sponge, shopping cart"""
NO_ARTICLE = set("""bacon bowling bread broccoli butter camping claus cooking corn dna
down food fuji garlic ice locked lightning luggage pong popcorn rice salt soap spaghetti
struck sushi up voltage yarn hockey""".split())


def clean(label: str) -> str:
    """The label in lower-case ASCII: piñata -> pinata, 'family: man, boy' -> 'family man boy'."""
    label = label.lower().replace("’", "'").replace("#", "hash").replace("*", "star")
    ascii_only = unicodedata.normalize("NFKD", label).encode("ascii", "ignore").decode()
    return " ".join(re.sub(r"[^a-z0-9' -]", " ", ascii_only).split())


def with_article(name: str) -> str:
    """'a NAME' or 'an NAME'; the name alone if it is plural or a substance."""
    # "nest with eggs": one nest
    head = re.split(r" (?:with|of|in|on|behind|showing) ", name)[0].split()[-1]
    if head in NO_ARTICLE or re.search(r"(?<![su])s$", head) and head != "rhinoceros":
        return name
    an = re.match(r"[aeiou]|hourglass|x-ray", name) and not re.match(r"uni|eu|ewe|one", name)
    return f"{'an' if an else 'a'} {name}"


def captions(name: str, style: str) -> list[str]:
    """The captions of a picture. A prompt that names no style means 3d."""
    lines = [f"{name}, {style}", f"{with_article(name)}, {style}"]
    if style == "3d":
        lines += [name, with_article(name)]
    return list(dict.fromkeys(lines))


def download(package: str, version: str) -> Path:
    """The package's .tgz. It is downloaded into .npm/ if it is not there yet."""
    tgz = HERE / ".npm" / f"{package.lstrip('@').replace('/', '-')}-{version}.tgz"
    if tgz.exists():
        return tgz
    npm = shutil.which("npm")
    if npm is None:
        sys.exit("prepare.py: npm is needed to download the emoji packages: install Node.js, then"
                 " run this again")
    tgz.parent.mkdir(exist_ok=True)
    print(f"downloading {package}@{version}", flush=True)
    # only a complete download gets the final name
    with tempfile.TemporaryDirectory(dir=tgz.parent) as folder:
        done = subprocess.run([npm, "pack", f"{package}@{version}"], cwd=folder,
                              capture_output=True, text=True)
        if done.returncode != 0 or not (Path(folder) / tgz.name).exists():
            errors = [line for line in done.stderr.splitlines() if "err" in line.lower()]
            why = errors[0] if errors else "no reason given"
            sys.exit(f"prepare.py: npm could not download {package}@{version}: {why}")
        os.replace(Path(folder) / tgz.name, tgz)
    return tgz


def members(source: tuple[str, str, str], wanted: str) -> dict[str, bytes]:
    """The files of a package whose path below its folder fully matches the pattern `wanted`."""
    package, version, folder = source
    found = {}
    with tarfile.open(download(package, version)) as tar:
        for member in tar:
            path = member.name.removeprefix(folder)
            if member.name.startswith(folder) and re.fullmatch(wanted, path):
                found[path] = tar.extractfile(member).read()
    return found


def code(name: str) -> str:
    """The code points without the variation selector, which only some file names have."""
    return Path(name).stem.upper().replace("-FE0F", "")


def picture(data: bytes, size: int) -> Image.Image:
    """An image file -> a square RGBA picture of this size."""
    # RGBa is premultiplied: no fringes when it is resized
    image = Image.open(io.BytesIO(data)).convert("RGBA").convert("RGBa")
    square = Image.new("RGBa", (max(image.size),) * 2)
    square.paste(image, tuple((square.width - side) // 2 for side in image.size))
    return square.resize((size, size), Image.Resampling.LANCZOS).convert("RGBA")


def listed(names: str) -> set[str]:
    return set(re.split(r",\s+", names))


# --- the folders ---

class Emoji(NamedTuple):
    name: str
    split: str               # train or rest
    code: str                # code points
    styles: list[str]        # those that have a picture of it


def choose(drawn: dict[str, dict[str, bytes]]) -> list[Emoji]:
    """All emoji with a picture, and the folder that each belongs to."""
    meta = members(NAMES, r"en/data\.json|meta/groups\.json")
    groups = json.loads(meta["meta/groups.json"])
    skip, pick, chosen = listed(SKIP), listed(PICK), {}
    for entry in json.loads(meta["en/data.json"]):
        group = groups["groups"].get(str(entry.get("group")))
        code_points, name = code(entry["hexcode"]), clean(entry["label"])
        styles = [style for style in STYLES if code_points in drawn[style]]
        # a second emoji of the same name is left out
        if group in LEFT_OUT or not styles or stem_of(name) in chosen:
            continue
        subgroup = groups["subgroups"][str(entry["subgroup"])]
        known = name in pick or (subgroup in SUBGROUPS.split() and name not in skip)
        split = "train" if known and len(styles) == len(STYLES) else "rest"
        chosen[stem_of(name)] = Emoji(name, split, code_points, styles)
    return list(chosen.values())


def stem_of(name: str) -> str:
    return name.replace(" ", "-").replace("'", "")


@contextmanager
def replaced_folders(parent: Path, names: list[str]) -> Iterator[Path]:
    """A new folder with empty folders of these names, which replace those in `parent` at the end.

    After an error the old ones stay.
    """
    parent.mkdir(parents=True, exist_ok=True)
    prefix = f".new-{names[0]}-"
    for left_over in parent.glob(f"{prefix}*"):  # of a run that was killed
        shutil.rmtree(left_over)
    with tempfile.TemporaryDirectory(dir=parent, prefix=prefix) as folder:
        for name in names:
            (Path(folder) / name).mkdir()
        yield Path(folder)
        for name in names:
            if (parent / name).exists():
                os.replace(parent / name, Path(folder) / f"old-{name}")
            os.replace(Path(folder) / name, parent / name)


def main() -> None:
    parser = argparse.ArgumentParser(description="Fetch the emoji and write train/ and rest/.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write into")
    parser.add_argument("--size", type=int, default=64, help="side of the pictures in pixels")
    args = parser.parse_args()
    drawn = {}
    for style, source in STYLES.items():
        files = members(source, r"[^/]+\.(png|webp)")
        drawn[style] = {code(name): data for name, data in files.items()}
    emoji = choose(drawn)
    with replaced_folders(args.out, ["train", "rest"]) as folder:
        for one in emoji:
            for style in one.styles:
                path = folder / one.split / f"{stem_of(one.name)}.{style}"
                picture(drawn[style][one.code], args.size).save(f"{path}.png")
                Path(f"{path}.txt").write_text("\n".join(captions(one.name, style)) + "\n")
    for split in ("train", "rest"):
        some = [one for one in emoji if one.split == split]
        counts = Counter(style for one in some for style in one.styles)
        print(f"{split}/: {len(some)} names, {counts.total()} pictures ("
              + ", ".join(f"{style} {counts[style]}" for style in STYLES) + ")")


if __name__ == "__main__":
    main()
