"""The options of sd.py: each declared once, in `Options`.

From the declarations come the parser, --help, and the settings in a PNG (see png_info.py).
"""
import argparse
import difflib
import json
import secrets
import warnings
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import torch

from extras import a1111
from extras.files import MAX_PIXELS
from extras.png_info import NO_SETTINGS, read_png, to_text
from extras.samplers import sampler_and_spacing, spacing_name
from extras.settings import Parser, flag
from sampler import PREDICTIONS, SAMPLERS, SPACINGS
from sd import BUILTIN, PRESETS, UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = PRESETS["emoji"]


def read_seed(text: str) -> int:
    """A seed; "random" and -1 stand for any."""
    return secrets.randbelow(2**32) if text in ("random", "-1") else int(text)


def option(
    default: object,
    group: str,
    help: str,
    read: Callable[[str], object] = str,
    *,
    metavar: str | None = None,
    shown: object = None,
    png: str | None = None,
    old: tuple[str, ...] = (),
    old_png: str | None = None,
    choices: list[str] | None = None,
    many: bool = False,
) -> Field:
    """A field of `Options`.

    `read` turns its text into a value. `shown` is the default as --help says it, if it is not
    `default`. `png` is its name in a PNG's settings. `old` and `old_png` are names it had before;
    they are still read. `many`: it may be given several times.
    """
    return field(default=default, metadata={
        "group": group, "help": help, "read": read, "metavar": metavar, "shown": shown,
        "png": png, "old": old, "old_png": old_png, "choices": choices, "many": many})


@dataclass
class Options:
    """Everything the command can be asked. None: the model's default, or nothing."""

    prompt: str | None = option(
        None, "prompt", "what to draw; (red:1.3) gives a word weight. Needed unless there is "
        "--prompts, --params-from, --save or --captions")
    negative: str = option("", "prompt", "what the picture should not be", metavar="PROMPT",
                           shown="nothing")
    prompts: str | None = option(
        None, "prompt", "draw each line of this text file, into the folder --out; under torchrun "
        "each process draws its share", metavar="FILE")
    params_from: str | None = option(
        None, "prompt", "draw this picture again with the settings stored in it by sd.py, A1111 or "
        "ComfyUI; other options replace them", metavar="PICTURE", old=("--from",))
    trust: bool = option(False, "prompt", "with --params-from: also open the files and models that "
                         "are named in the picture")

    steps: int | None = option(None, "sampling", "1 to 1000", int, metavar="N", png="Steps",
                               shown=f"the model's; built-in {SMALL.steps}")
    sampler: str | None = option(
        None, "sampling", ", ".join(SAMPLERS) + "; also as A1111, ComfyUI and diffusers spell them",
        png="Sampler", shown=f"the model's; built-in {SMALL.sampler}", metavar="NAME")
    timestep_spacing: str | None = option(
        None, "sampling", "how the steps' noise levels are chosen: " + ", ".join(SPACINGS),
        spacing_name, png="Schedule type", shown="the sampler's", old=("--spacing",),
        metavar="NAME")
    guidance: float | None = option(
        None, "sampling", "how strongly to follow the prompt; 1 is the model's own guess, in half "
        "the time", float, metavar="SCALE", png="CFG scale",
        shown=f"the model's; built-in {SMALL.guidance}")
    cfg_end: float | None = option(
        None, "sampling", "guide only this share of the steps, from the first: 0.5 saves a quarter "
        "of the time", float, metavar="SHARE", png="CFG end", old_png="Guided share",
        old=("--guided-share",), shown=1.0)
    cfg_rescale: float | None = option(
        None, "sampling", "against washed-out or burnt colors of a strong guidance: this share of "
        "the way back to the contrast of the prompt's own guess, 0 to 1; zero-SNR models 0.7",
        float, metavar="SHARE", png="CFG rescale", shown=0.0)
    seed: int = option(0, "sampling", "of the first picture, a number or random (or -1); the next "
                       "picture has seed + 1", read_seed, metavar="N", png="Seed")
    n: int = option(1, "sampling", "number of pictures of each prompt", int, metavar="N")
    width: int | None = option(None, "sampling", "in pixels, a multiple of 8 (built-in: 16)", int,
                               metavar="N", shown=f"the model's; built-in {SMALL.size}")
    height: int | None = option(None, "sampling", "in pixels, a multiple of 8 (built-in: 16)", int,
                                metavar="N", shown=f"the model's; built-in {SMALL.size}")

    init: str | None = option(
        None, "pictures from pictures", "start from this picture, cropped to the size, instead of "
        "noise", metavar="IMAGE", png="Init")
    strength: float | None = option(
        None, "pictures from pictures", "with --init: how much of it to redraw, up to 1", float,
        png="Denoising strength", shown="0.75; with --mask 1", metavar="SHARE")
    mask: str | None = option(
        None, "pictures from pictures", "with --init: redraw only what is white in this picture of "
        "the same size", metavar="IMAGE", png="Mask")
    image_guidance: float | None = option(
        None, "pictures from pictures", "InstructPix2Pix models: how closely to keep to --init",
        float, metavar="SCALE", png="Image CFG scale", shown=1.5)

    ckpt: str | None = option(
        None, "model", "a .safetensors or .ckpt, a folder of train.py or diffusers, or owner/name "
        "on the Hugging Face hub", metavar="MODEL", png="Checkpoint", shown="the built-in model")
    vae: str | None = option(
        None, "model", "take the VAE from this file, folder or model of the hub", metavar="FILE",
        png="VAE", shown="that of --ckpt")
    unet: str | None = option(
        None, "model", "take the UNet from this file, folder or model of the hub", metavar="FILE",
        png="UNet", shown="that of --ckpt")
    lora: list[str] | None = option(
        None, "model", "add a LoRA, as kohya, diffusers, peft or train.py write it; may be given "
        "several times", metavar="FILE[:SCALE]", png="Lora", many=True)
    embedding: list[str] | None = option(
        None, "model", "add a word learned by textual inversion; may be given several times",
        metavar="FILE", png="Embedding", many=True)
    lora_dir: str | None = option(
        None, "model", "where <lora:name:1> in a prompt finds its file", metavar="FOLDER")
    clip_skip: int | None = option(
        None, "model", "use the text encoder's last layer (1), the one before it (2) and so on",
        int, metavar="N", png="Clip skip", shown="as it was trained: SD 1.x 1, others 2")
    preset: str | None = option(
        None, "model", "the kind of model, if --ckpt is taken for another: " + ", ".join(PRESETS),
        metavar="NAME", png="Preset")
    prediction: str | None = option(
        None, "model", "what the model predicts, if that is guessed wrong", png="Prediction",
        choices=list(PREDICTIONS))
    save: str | None = option(
        None, "model", "write the model to PATH, a .safetensors or else a diffusers folder, in "
        "fp16 or as --dtype says", metavar="PATH")
    captions: bool = option(False, "model", "list what the model was trained on, if it says so, as "
                            "the built-in one does")

    out: str | None = option(
        None, "files", "the .png to write; with --prompts a folder", metavar="PATH",
        shown="named after the prompt; with --prompts pictures/")
    grid: str | None = option(None, "files", "also write all the pictures side by side into one",
                              metavar="PNG")
    gif: str | None = option(None, "files", "also write the model's guess of the picture at every "
                             "step", metavar="GIF", old=("--film",))
    attn: str | None = option(None, "files", "also write, for each word, where in the picture it "
                              "was used", metavar="FOLDER")
    report: str | None = option(None, "files", "also write a page that shows how the picture came "
                                "about, step by step and word by word", metavar="HTML")
    words: str | None = option(None, "files", "with --attn: only these words of the prompt, "
                               "separated by commas", metavar="WORDS")
    scale: int = option(1, "files", "make what --gif and --attn write N times as large", int,
                        metavar="N")

    batch_size: int = option(1, "speed and memory", "pictures drawn at a time", int, metavar="N")
    deepcache: int | None = option(
        None, "speed and memory", "compute the UNet's deep blocks only at every N-th call of "
        "it: 3 saves half of the time or more", int, metavar="N", png="DeepCache",
        old_png="Deep every", old=("--deep-every",), shown=1)
    lowmem: bool = option(False, "speed and memory", "use less memory and more time: one network "
                          "on the device at a time, guidance in two passes, decoding in tiles")
    int8: bool = option(False, "speed and memory", "compute the UNet's layers in 8 bits, on CPUs "
                        "with VNNI: faster, in less memory, slightly different pictures")
    no_fast: bool = option(False, "speed and memory", "run the plain modules of model.py and "
                           "vae.py, more slowly")
    dtype: str | None = option(None, "speed and memory", "precision of the weights",
                               choices=list(DTYPES), shown="fp16 on GPUs; on a CPU bf16 if it "
                               "computes in it, else fp32")
    device: str | None = option(None, "speed and memory", "cuda, mps or cpu", metavar="NAME",
                                shown="the first of them that is there")
    clip_skip_sd1: int | None = option(None, "hidden", "--clip-skip of a picture of A1111, which "
                                       "takes it for SD 1.x only", int)
    batch: int | None = option(None, "hidden", "the old name of --n, and with --prompts of "
                               "--batch-size", int)


FIELDS = {f.name: f for f in fields(Options)}
PNG_NAMES = {f.metadata["png"]: f for f in FIELDS.values() if f.metadata["png"]}
OLD_PNG_NAMES = {f.metadata["old_png"]: f for f in FIELDS.values() if f.metadata["old_png"]}
ELSEWHERE = {  # what other programs call it
    "--size": "--width and --height", "-W": "--width", "-H": "--height", "--W": "--width",
    "--H": "--height", "--cfg": "--guidance", "--cfg-scale": "--guidance",
    "--cfg_scale": "--guidance", "--guidance-scale": "--guidance", "--guidance_scale": "--guidance",
    "--scheduler": "--sampler", "--model": "--ckpt", "--num-inference-steps": "--steps",
    "--num_inference_steps": "--steps", "--ddim_steps": "--steps", "--n_samples": "--n",
    "--num-images": "--n", "--negative-prompt": "--negative", "--negative_prompt": "--negative",
    "--image": "--init", "--denoise": "--strength", "--output": "--out", "--outdir": "--out",
    "-o": "--out", "-n": "--n", "-s": "--steps",
}


# --- the command line ---

def make_parser() -> Parser:
    """Without defaults: it gives only what the user gave."""
    parser = Parser(
        "sd.py", usage='sd.py "a red apple" [--option value ...]', allow_abbrev=False,
        description="Draw a picture of a prompt.", argument_default=argparse.SUPPRESS,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100))
    groups = {"hidden": parser}
    for one in FIELDS.values():
        about = one.metadata
        group = groups.get(about["group"])
        if group is None:
            group = groups[about["group"]] = parser.add_argument_group(about["group"])
        if one.name == "prompt":
            group.add_argument("prompt", nargs="?", help=about["help"])
            continue
        if one.default is False:
            how = {"action": "store_true"}
        else:
            how = {"action": "append" if about["many"] else "store", "type": about["read"],
                   "metavar": about["metavar"], "choices": about["choices"]}
        help = argparse.SUPPRESS if about["group"] == "hidden" else help_of(one)
        group.add_argument(flag(one.name), help=help, **how)
        for old in about["old"]:
            group.add_argument(old, dest=one.name, help=argparse.SUPPRESS, **how)
    return parser


def help_of(one: Field) -> str:
    """The help of an option, with its default if there is one."""
    shown = one.metadata["shown"]
    if shown is None and one.default is not False:
        shown = one.default
    text = one.metadata["help"] if shown is None else f"{one.metadata['help']} (default: {shown})"
    return text.replace("%", "%%")


def parse(words: list[str]) -> Options:
    """Raises UserError for what is no option, and for values that cannot be read."""
    found, unknown = make_parser().parse_known_args(words)
    given = vars(found)
    if unknown:
        raise UserError(explain_unknown(unknown, given.get("prompt")))
    if "sampler" in given:
        given = with_sampler(given)
    stored = {}
    if "params_from" in given:
        path = Path(given["params_from"])
        stored = read_params(path, given)
        if "prompts" in given:
            del stored["prompt"]
        if "trust" not in given:
            stored = without_files(path, stored)
        stored = without_dependents(stored, given)
    elif "trust" in given:
        raise UserError("--trust means nothing without --params-from: give that too")
    options = Options(**stored | given)
    if options.batch is not None:
        options.batch_size = options.batch
        if options.prompts is None:
            options.n = options.batch
    return options


def with_sampler(settings: dict[str, object]) -> dict[str, object]:
    """The settings with the sampler's name in our spelling. "... Karras" is a spacing as well."""
    sampler, spacing = sampler_and_spacing(settings["sampler"])
    extra = {} if spacing is None else {"timestep_spacing": spacing}
    return extra | settings | {"sampler": sampler}


def explain_unknown(unknown: list[str], prompt: str | None) -> str:
    """What is wrong with the words that are no options."""
    options = [word for word in unknown if word.startswith("-")]
    if not options:
        return f'a prompt of several words goes in quotes: "{prompt} {" ".join(unknown)}"'
    name = options[0].split("=")[0]
    flags = [flag(one) for one in FIELDS if one not in ("prompt", "batch")]
    near = [one for one in flags if len(name) > 3 and one.startswith(name)]
    near += difflib.get_close_matches(name.replace("_", "-"), flags, 1)
    hint = ELSEWHERE.get(name, near[0] if near else None)
    text = f"unrecognized arguments: {' '.join(unknown)}"
    return f"{text}: sd.py --help lists all" if hint is None else f"{text}: did you mean {hint}?"


# --- settings in a PNG ---

def params_text(options: dict[str, object]) -> str:
    """The options as a PNG holds them: prompt, negative prompt, and those that are set."""
    stored = {}
    for name, one in PNG_NAMES.items():
        value = options.get(one.name)
        if name == "Sampler":
            stored |= a1111.names_for(value, options.get("timestep_spacing"))
        elif value is not None and name != "Schedule type":
            stored[name] = value
    stored["Size"] = f"{options['width']}x{options['height']}"
    ckpt = options.get("ckpt")
    stored["Model"] = Path(BUILTIN if ckpt is None else ckpt).stem
    stored["Version"] = "sd.py"
    return to_text(options["prompt"], options["negative"], stored)


def read_params(path: Path, given: dict[str, object] | None = None) -> dict[str, object]:
    """The options in a picture of sd.py, A1111 or ComfyUI, but those that are `given`.

    Warns of what changes the picture and is not followed. Raises UserError if it has no settings,
    or a sampler that is not known here.
    """
    given = {} if given is None else given
    params = read_png(path)
    fields = params.fields
    ours = a1111.is_ours(fields)
    if "Steps" not in fields and "Size" not in fields:
        raise UserError(f"{path} {NO_SETTINGS}, as sd.py and A1111 write them into a picture")
    try:
        stored = {"prompt": params.prompt, "negative": params.negative, **size_of(fields)}
        for name, one in (OLD_PNG_NAMES | PNG_NAMES).items():
            if name in fields and name not in ("Sampler", "Schedule type"):
                stored[one.name] = read_field(one, fields[name])
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"{path} {NO_SETTINGS}: {str(error)[:200]}") from error
    stored |= a1111.sampler_of(fields, ours, params.program)
    a1111.check_sampler(path, fields, stored, given)
    if any(name.startswith("Hires") for name in fields) or (ours and "init" not in stored):
        stored.pop("strength", None)                # of A1111's second pass
    if not ours:
        if params.program == "A1111" and "clip_skip" in stored:
            stored["clip_skip_sd1"] = stored.pop("clip_skip")
        for line in a1111.notes_on(params, stored, given):
            warnings.warn(f"{path.name}: {line}", stacklevel=3)
    return {name: value for name, value in stored.items() if name not in given}


def size_of(fields: dict[str, str]) -> dict[str, int]:
    """The options `width` and `height`. Raises ValueError if the size is no size."""
    if "Size" not in fields:
        return {}
    width, height = (int(side) for side in fields["Size"].lower().split("x"))
    if not 1 <= width * height <= MAX_PIXELS:
        raise ValueError(f"the size {width}x{height} is out of range")
    return {"width": width, "height": height}


def read_field(one: Field, text: str) -> object:
    """The value of an option in a picture. Raises ValueError."""
    if not one.metadata["many"]:
        return one.metadata["read"](text)
    if not text.startswith("["):        # another program's
        return [text]
    found = json.loads(text)
    if not all(isinstance(value, str) for value in found):
        raise ValueError(f"{text[:80]} is no list of names")
    return found


def without_files(path: Path, stored: dict[str, object]) -> dict[str, object]:
    """The settings without the files and models that a picture names, which may be anybody's.

    Says which.
    """
    named = sorted(PNG_NAMES[name].name for name in a1111.FILES)
    left_out = [f"{flag(name)} {str(stored[name])[:60]}" for name in named if name in stored]
    if left_out:
        warnings.warn(f"{path.name} names files, left out: {', '.join(left_out)}: give them "
                      "again, or --trust to open all", stacklevel=3)
    return {name: value for name, value in stored.items() if name not in named}


def without_dependents(stored: dict[str, object], given: dict[str, object]) -> dict[str, object]:
    """The settings without those that mean nothing without a file that is not there."""
    there = stored.keys() | given.keys()
    for needed, names in {"init": ("mask", "strength", "image_guidance"),
                          "ckpt": ("preset", "prediction", "vae", "unet")}.items():
        if needed not in there:
            stored = {name: value for name, value in stored.items() if name not in names}
    return stored
