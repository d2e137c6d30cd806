"""LoRAs named in a prompt, as A1111's web UI has it: "a cat <lora:pixel:0.8>".

The file is looked for by its name in a folder, and in the folders in it. Nothing else is opened.
"""
import math
import re
from difflib import get_close_matches
from pathlib import Path
from typing import NamedTuple

from sd import UserError

TAG = re.compile(r"<(lora|lyco):([^<>]+)>")
ENDINGS = (".safetensors", ".pt", ".ckpt", ".bin")


class LoraTag(NamedTuple):
    name: str
    scale: float        # of the UNet
    text_scale: float   # of the text encoders

    @property
    def text(self) -> str:
        return f"<lora:{self.name}:{self.scale:g}>"


def find_tags(prompt: str) -> list[LoraTag]:
    """The LoRAs in a prompt. Raises UserError for scales that are no numbers.

    <lora:name>, <lora:name:scale>, <lora:name:text encoders' scale:UNet's scale>, and te=, unet=.
    """
    return [read_tag(match[0], match[2].split(":")) for match in TAG.finditer(prompt)]


def read_tag(tag: str, parts: list[str]) -> LoraTag:
    positional = [part.strip() for part in parts if "=" not in part]
    named = dict(part.strip().split("=", 1) for part in parts if "=" in part)
    strange = named.keys() - {"te", "unet"}
    if strange or len(positional) > 3 or not positional or positional[0] == "":
        raise UserError(f"{tag[:80]} cannot be read: write <lora:name:1>, or with the text "
                        "encoders' scale first <lora:name:1:0.5>")
    name, *numbers = positional
    text_scale = named.get("te", numbers[0] if numbers else "1")
    scale = named.get("unet", numbers[1] if len(numbers) > 1 else text_scale)
    return LoraTag(name, number(tag, scale), number(tag, text_scale))


def number(tag: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(f"{tag[:80]}: {text!r} is no number: write <lora:name:1>") from error
    if not math.isfinite(value):
        raise UserError(f"{tag[:80]}: {text!r} is no scale: write <lora:name:1>")
    return value


def find_file(folder: Path, tag: LoraTag) -> Path:
    """The file of that name. Raises UserError if there is none, or more than one."""
    if not folder.is_dir():
        raise UserError(f"--lora-dir {folder} is no folder")
    files = [path for path in sorted(folder.rglob("*"))
             if path.suffix.lower() in ENDINGS and path.is_file()]
    wanted = [tag.name, *(tag.name + ending for ending in ENDINGS)]
    found = [path for path in files if path.stem == tag.name or path.name in wanted]
    if not found:
        found = [path for path in files if path.stem.lower() == tag.name.lower()]
    if len(found) > 1:
        raise UserError(f"{tag.text} may be {found[0]} or {found[1]}: leave one of them out of "
                        "--lora-dir, or give it as --lora")
    if not found:
        near = get_close_matches(tag.name, [path.stem for path in files[:10000]], 1)
        hint = f": did you mean {near[0]}?" if near else ""
        raise UserError(f"{tag.text}: {folder} has no file of that name{hint}")
    return found[0]


def common_tags(prompts: list[str]) -> list[LoraTag]:
    """The LoRAs that the prompts name. Raises UserError if they name different ones."""
    found = [find_tags(prompt) for prompt in prompts]
    for prompt, tags in zip(prompts, found):
        if tags != found[0]:
            raise UserError(f"the prompts name different LoRAs, {prompt[:40]!r} others than the "
                            "first: give them in runs of their own")
    return found[0] if found else []
