"""The settings of a picture as text in its PNG, as A1111's web UI writes and reads them.

    a red apple
    Negative prompt: blurry
    Steps: 20, Sampler: euler_a, CFG scale: 7.5, Seed: 3, Size: 512x512, Model: v1-5

The text is the PNG's entry `parameters`. Values with a comma, a colon, a quote or a newline are
written as JSON strings.
"""
import json
import re
from pathlib import Path

from PIL import Image, PngImagePlugin

from sd import UserError

FIELD = re.compile(r'([A-Z][\w ]*): ("(?:\\.|[^"\\])*"|[^,]*)')
SAMPLER_NAMES = {  # letters and digits of a name elsewhere -> a row of SAMPLERS
    "eulera": "euler_a", "eulerancestral": "euler_a",               # A1111; ComfyUI and diffusers
    "dpmpp2m": "dpmpp_2m", "dpmsolvermultistep": "dpmpp_2m",        # A1111 and ComfyUI; diffusers
}


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
    """Prompt, negative prompt and fields of `parameters`. Raises ValueError if it is damaged."""
    above, _, line = ("\n" + text.rstrip()).rpartition("\n")
    prompt, mark, negative = above.rpartition("\nNegative prompt: ")
    if not mark:
        prompt, negative = above, ""
    fields = {}
    for name, value in FIELD.findall(line):
        fields[name] = json.loads(value) if value.startswith('"') else value
    return prompt[1:], negative, fields


def read_png(path: Path) -> tuple[str, str, dict[str, str]]:
    """`from_text` of a PNG. Raises UserError if there is no such file, or no text in it."""
    try:
        with Image.open(path) as image:
            if "parameters" not in image.info:
                raise UserError(f"{path} holds no settings of a picture, as sd.py and A1111 write "
                                "them into a PNG")
            return from_text(image.info["parameters"])
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except UserError:
        raise
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        kind = type(error).__name__
        raise UserError(f"{path} holds no settings of a picture: {kind}: {error}") from error


def png_chunk(text: str) -> PngImagePlugin.PngInfo:
    """`parameters` for `image.save(path, pnginfo=...)`."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt("parameters", text)
    return info


def normalize_name(name: str) -> str:
    """A sampler's or schedule's name as it is spelled here: "DPM++ 2M" is dpmpp_2m.

    Names of A1111, ComfyUI, k-diffusion and diffusers' classes are known.
    """
    name = name.strip().lower().replace("++", "pp")
    name = re.sub(r"^k_|(discrete)?scheduler$", "", name)
    letters = re.sub("[^a-z0-9]", "", name)
    return SAMPLER_NAMES.get(letters, name.replace(" ", "_"))


def sampler_and_spacing(name: str) -> tuple[str, str | None]:
    """"DPM++ 2M Karras", as A1111 had it before 1.9, -> dpmpp_2m and karras; else no spacing."""
    name = name.strip()
    if name.lower().endswith(" karras"):
        return normalize_name(name[:-len(" karras")]), "karras"
    return normalize_name(name), None
