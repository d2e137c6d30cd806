"""The settings of a picture as text in it, as A1111's web UI writes and reads them.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: Euler a, Schedule type: Uniform, CFG scale: 7.5, Seed: 3, Size: 512x512

In a PNG the text is the entry `parameters`, in JPEG and WebP the EXIF UserComment. Values with a
comma, a colon, a quote or a newline are written as JSON strings. ComfyUI's PNGs hold the graph of
its nodes instead (see comfyui.py). a1111.py says what the settings mean.
"""
import json
import re
from pathlib import Path
from typing import NamedTuple

from PIL import Image, PngImagePlugin

from extras.comfyui import read_graph
from extras.files import open_image
from sd import UserError

STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.S)
EXIF_IFD, USER_COMMENT = 0x8769, 0x9286
MOST_TEXT = 2**20   # characters of settings that are looked at
MOST_FIELDS = 200   # in which lists and objects are looked for: an error in one takes long
OTHERS = {  # entries of a PNG: the program that writes them
    "invokeai_metadata": "InvokeAI", "sd-metadata": "InvokeAI", "Comment": "NovelAI",
    "fooocus_scheme": "Fooocus", "sui_image_params": "SwarmUI"}
NO_SETTINGS = "holds no settings of a picture"


class Params(NamedTuple):
    prompt: str
    negative: str
    fields: dict[str, str]
    program: str        # "A1111", "ComfyUI"; sd.py writes as A1111 does
    notes: list[str]    # what of it is not followed


# --- text ---

def to_text(prompt: str, negative: str, fields: dict[str, object]) -> str:
    """The three parts of `parameters`. Lists are written as JSON."""
    line = ", ".join(f"{name}: {quote(value)}" for name, value in fields.items())
    return f"{prompt}\nNegative prompt: {negative}\n{line}"


def quote(value: object) -> str:
    text = json.dumps(value) if isinstance(value, list) else str(value)
    if re.search('[,:"\n]', text):
        return json.dumps(text, ensure_ascii=False)
    return text


def from_text(text: str) -> tuple[str, str, dict[str, str]]:
    """Prompt, negative prompt and fields of `parameters`. Raises ValueError if it is damaged.

    The settings begin at the last line that begins with "Steps: ", else at the last line.
    """
    text = "\n" + text.replace("\r\n", "\n").rstrip()
    start = text.rfind("\nSteps: ")
    if start < 0:
        start = text.rfind("\n")
    above, line = text[:start], text[start + 1:]
    prompt, mark, negative = above.rpartition("\nNegative prompt:")
    if not mark:
        prompt, negative = above, ""
    return prompt[1:], negative.removeprefix(" "), split_fields(line)


def split_fields(line: str) -> dict[str, str]:
    """ 'Steps: 20, Lora: "a, b"' -> {"Steps": "20", "Lora": "a, b"}. Linear in its length."""
    fields: dict[str, str] = {}
    position = tries = 0
    while True:
        tries += 1
        colon = line.find(":", position)
        if colon < 0:
            return fields
        start = max(position, line.rfind(",", position, colon) + 1)  # else a piece without a name
        name = line[start:colon].rpartition("\n")[2].strip()
        value, position = read_value(line, colon + 1, tries < MOST_FIELDS)
        fields[name] = value


def read_value(line: str, start: int, structured: bool) -> tuple[str, int]:
    """The value that begins there, and where the next field begins. `structured`: it may be JSON.

    A quote that is never closed is looked for once only: a later one would have closed it.
    """
    while line[start:start + 1] == " ":
        start += 1
    first, stop = line[start:start + 1], None
    if first == '"':
        match = STRING.match(line, start)
        if match is not None:
            stop = match.end()
            try:
                value = json.loads(match[0], strict=False)
            except ValueError:
                value = match[0][1:-1]
    elif structured and first in ("[", "{"):
        try:
            stop = json.JSONDecoder(strict=False).raw_decode(line, start)[1]
            value = line[start:stop]
        except (ValueError, RecursionError):
            pass
    if stop is None:
        ends = [line.find(mark, start) for mark in ",\n"]
        stop = min((end for end in ends if end >= 0), default=len(line))
        return line[start:stop].strip(), stop + 1
    comma = line.find(",", stop)
    return value, len(line) if comma < 0 else comma + 1


# --- pictures ---

def read_png(path: Path) -> Params:
    """The settings in a picture. Raises UserError if there is no such file, or none in it."""
    try:
        with open_image(path) as image:
            info = dict(image.info)
            if image.format == "PNG" and "parameters" not in info:
                info |= image.text      # entries behind the pixels
            text = info.get("parameters") or user_comment(image)
        return read_entries(path, info, text)
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(f"{path} {NO_SETTINGS}: {reason}") from error


def read_entries(path: Path, info: dict, text: str | None) -> Params:
    """`info` are the entries of a PNG, `text` is what stands in `parameters` or EXIF."""
    if text and len(text) > MOST_TEXT:
        raise UserError(f"{path} {NO_SETTINGS}: {len(text)} characters are too many")
    if text and not text.lstrip().startswith("{"):
        return Params(*from_text(text), "A1111", [])
    for source in (info.get("prompt"), text):
        if isinstance(source, str) and '"class_type"' in source:
            try:
                return Params(*read_graph(json.loads(source[:MOST_TEXT])))
            except (ValueError, TypeError, AttributeError, RecursionError) as error:
                raise UserError(f"{path}: its graph of ComfyUI cannot be read: {error}") from error
    others = [name for name in OTHERS if name in info or (text and f'"{name}"' in text)]
    if others or text:
        program = OTHERS[others[0]] if others else "another program"
        raise UserError(f"{path} {NO_SETTINGS}, as sd.py, A1111 and ComfyUI write them, but those "
                        f"of {program}: give the prompt and the settings as options")
    raise UserError(f"{path} {NO_SETTINGS}, as sd.py and A1111 write them into a picture")


def user_comment(image: Image.Image) -> str | None:
    """The text in a picture's EXIF data, where A1111 writes it into JPEG and WebP."""
    found = image.getexif().get_ifd(EXIF_IFD).get(USER_COMMENT)
    if isinstance(found, str):
        return found
    if not isinstance(found, bytes):
        return None
    mark, body = found[:8], found[8:]
    if mark == b"UNICODE\0":    # 16 bits, the first byte high as the standard says or low
        texts = [body.decode(name, "replace") for name in ("utf-16-be", "utf-16-le", "utf-8")]
        return next((text for text in texts if "Steps: " in text), texts[0])
    return (body if mark == b"ASCII\0\0\0" else found).decode("utf-8", "replace").strip("\0")


def png_chunk(text: str) -> PngImagePlugin.PngInfo:
    """`parameters` for `image.save(path, pnginfo=...)`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", text)
    return info
