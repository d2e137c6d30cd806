"""Pictures in folders and their captions, as train.py and other programs' users keep them.

    x.png beside x.txt or x.caption (or x.png.txt), one caption a line
    metadata.jsonl or metadata.csv, as Hugging Face has them: "file_name" and "text"
    10_name    folders of kohya: each picture 10 times an epoch; "name" is the caption of those
               that have no other
    PNGs written by sd.py or A1111, which hold their prompt
"""
import codecs
import csv
import io
import json
import re
from collections import Counter
from pathlib import Path, PurePath
from typing import NamedTuple

from extras.files import open_image
from extras.terminal import complain
from sd import UserError

PICTURES = ("png", "jpg", "jpeg", "webp", "bmp", "gif", "tif", "tiff", "avif")
CAPTIONS = (".txt", ".caption")
# formats of pictures that are not read
OTHERS = ("heic", "heif", "jxl", "jp2", "psd", "tga", "svg", "exr", "hdr", "ico", "eps", "pdf",
          "raw", "cr2", "nef", "arw", "dng", "mp4", "mov", "webm", "mkv")
TABLES = ("metadata.jsonl", "metadata.csv")
FILE_FIELDS = ("file_name", "image", "image_path", "file", "filename", "path", "img")
TEXT_FIELDS = ("text", "caption", "prompt", "description", "captions", "additional_feature")
KOHYA = re.compile(r"(\d+)_(.*)")


class Sample(NamedTuple):
    name: str
    picture: Path | bytes
    captions: list[str]


def nonempty_lines(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


def captions_of(value: object) -> list[str]:
    """The captions in a value of JSON: the lines of a text, or a list of such; else none."""
    if isinstance(value, str):
        return nonempty_lines(value)
    if isinstance(value, list):
        return [line for one in value if isinstance(one, str) for line in nonempty_lines(one)]
    return []


def field_of(row: dict, names: tuple[str, ...]) -> str | None:
    """The first of the names that the row has."""
    return next((name for name in names if row.get(name) not in (None, "")), None)


# --- a folder ---

def list_folder(folder: Path) -> list[Sample]:
    """The samples of a folder, and of its 10_name folders, each as often as it says.

    Pipes and devices, which may have no end, are not among them. What is left out is counted in a
    line on stderr. Raises UserError if a table of captions is damaged, or captions are in no
    encoding that is known.
    """
    try:
        files = sorted(path for path in folder.iterdir() if not path.name.startswith(".")
                       and (path.is_file() or path.is_dir() or not path.exists()))
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error}") from error
    subfolders = [path for path in files if path.is_dir()]
    files = [path for path in files if path not in set(subfolders)]
    for name in TABLES:
        if folder / name in files:
            samples = read_table(folder / name)
            break
    else:
        samples = list_pictures(folder, files)
    left_out = count_left_out(files, samples)
    if not samples and any(path.name == "img" for path in subfolders):
        return list_folder(folder / "img")          # kohya's, beside its log and model
    for path in subfolders:
        if KOHYA.fullmatch(path.name):
            samples = samples + list_folder(path)
        else:
            left_out["in subfolders"] += sum(is_picture(inner) for inner in path.glob("*"))
    say_left_out(folder, left_out)
    match = KOHYA.fullmatch(folder.resolve().name)
    return samples * max(1, min(int(match[1]), 10_000)) if match else samples


def is_picture(path: PurePath) -> bool:
    return path.suffix[1:].lower() in PICTURES


def count_left_out(files: list[Path], samples: list[Sample]) -> Counter:
    """How many pictures, and captions without one, are not in the samples."""
    used = {sample.picture for sample in samples}
    left_out = Counter()
    for path in files:
        if is_picture(path) and path not in used:
            left_out["not in the table of captions"] += 1
        elif path.suffix[1:].lower() in OTHERS:
            left_out[f"of a format that is not read ({path.suffix.lower()})"] += 1
    return left_out


def say_left_out(folder: Path, left_out: Counter) -> None:
    found = [f"{count} {what}" for what, count in left_out.items() if count]
    if found:
        complain(f"{folder}: pictures left out: {', '.join(found)}")


def list_pictures(folder: Path, files: list[Path]) -> list[Sample]:
    beside = {(path.stem, path.suffix.lower()): path for path in files
              if path.suffix.lower() in CAPTIONS}
    match = KOHYA.fullmatch(folder.resolve().name)
    usual = nonempty_lines(match[2]) if match else []
    samples = []
    for path in filter(is_picture, files):
        texts = [beside[stem, suffix] for stem in (path.stem, path.name) for suffix in CAPTIONS
                 if (stem, suffix) in beside]
        captions = read_captions(texts[0]) if texts else prompt_in(path) or usual
        samples.append(Sample(str(path), path, captions))
    return samples


def decoded(data: bytes, path: Path) -> str:
    """UTF-8, or UTF-16 with its mark. Raises UserError for anything else."""
    utf16 = data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    try:
        return data.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the captions in {path} are not UTF-8 ({error}): save them as "
                        "UTF-8") from error


def read_captions(path: Path) -> list[str]:
    try:
        return nonempty_lines(decoded(path.read_bytes(), path))
    except OSError as error:
        raise UserError(f"cannot read the captions in {path}: {error}") from error


def prompt_in(path: Path) -> list[str]:
    """The prompt that sd.py or A1111 wrote into the PNG."""
    try:
        with open_image(path) as image:
            parameters = image.info.get("parameters", "")
    except Exception:  # a damaged picture: load_or_error reports it
        return []
    return nonempty_lines(re.split(r"\n(?:Negative prompt:|Steps: )", parameters)[0])


# --- tables ---

def read_table(path: Path) -> list[Sample]:
    """Raises UserError if the table is damaged, or its fields have names that are not known."""
    try:
        text = decoded(path.read_bytes(), path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = csv_rows(text, path) if path.suffix == ".csv" else json_rows(text, path)
    samples, text_fields = [], set()
    for number, row in enumerate(rows, 1):
        file_field, text_field = field_of(row, FILE_FIELDS), field_of(row, TEXT_FIELDS)
        if file_field is None or not isinstance(row[file_field], str):
            raise UserError(damaged(path, f"row {number} has {names_of(row)}, and no file_name"))
        name, picture = PurePath(row[file_field]), b""
        shown = f"{name}, which is outside of {path.parent}"
        if not name.is_absolute() and ".." not in name.parts:
            picture = path.parent / name
            shown = str(picture)
        captions = [] if text_field is None else captions_of(row[text_field])
        samples.append(Sample(shown, picture, captions))
        text_fields.add(text_field)
    others = text_fields - {None, "text"}
    if others:
        complain(f"{path}: captions are read from {', '.join(sorted(others))}")
    elif rows and text_fields == {None}:
        complain(f"{path}: no captions. They are read from {', '.join(TEXT_FIELDS[:4])}; it has "
                 f"{names_of(rows[0])}")
    return samples


def names_of(row: dict) -> str:
    return ", ".join(repr(name)[:60] for name in list(row)[:8]) or "nothing"


def damaged(path: Path, reason: object) -> str:
    example = '{"file_name": "x.png", "text": "..."}'
    if path.suffix == ".csv":
        example = "x.png,... below file_name,text"
    return f"{path} is damaged, each line must be like {example}: {reason}"


def json_rows(text: str, path: Path) -> list[dict]:
    rows = []
    for number, line in enumerate(nonempty_lines(text), 1):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(damaged(path, f"line {number}: {error}")) from error
        rows.append(row if isinstance(row, dict) else {})
    return rows


def csv_rows(text: str, path: Path) -> list[dict]:
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise UserError(damaged(path, error)) from error
