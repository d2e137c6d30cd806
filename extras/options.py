"""The options of sd.py: each declared once, in `Options`.

From the declarations come the parser, --help, and the settings in a PNG (see png_info.py).
"""
import argparse
import difflib
import json
import secrets
from collections.abc import Callable
from dataclasses import Field, dataclass, field, fields
from pathlib import Path

import torch

from extras.png_info import normalize_name, read_png, sampler_and_spacing, to_text
from sampler import PREDICTIONS, SAMPLERS, SPACINGS
from sd import BUILTIN, PRESETS, UserError

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SMALL = PRESETS["emoji"]


def seed(text: str) -> int:
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

    `read` makes its value of a text. `shown` is the default as --help says it, if it is not
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
        None, "prompt", "draw this picture again with the settings stored in it; other options "
        "replace them", metavar="PNG", old=("--from",))

    steps: int | None = option(None, "sampling", "1 to 1000", int, metavar="N", png="Steps",
                               shown=f"the model's; built-in {SMALL.steps}")
    sampler: str | None = option(
        None, "sampling", ", ".join(SAMPLERS) + "; also as A1111, ComfyUI and diffusers spell them",
        png="Sampler", shown=f"the model's; built-in {SMALL.sampler}", metavar="NAME")
    timestep_spacing: str | None = option(
        None, "sampling", "how the steps' noise levels are chosen: " + ", ".join(SPACINGS),
        normalize_name, png="Schedule type", shown="the sampler's", old=("--spacing",),
        metavar="NAME")
    guidance: float | None = option(
        None, "sampling", "how strongly to follow the prompt; 1 is the model's own guess, in half "
        "the time", float, metavar="SCALE", png="CFG scale",
        shown=f"the model's; built-in {SMALL.guidance}")
    cfg_end: float | None = option(
        None, "sampling", "guide only this share of the steps, from the first: 0.5 saves a quarter "
        "of the time", float, metavar="SHARE", png="CFG end", old_png="Guided share",
        old=("--guided-share",), shown=1.0)
    seed: int = option(0, "sampling", "of the first picture, a number or random (or -1); the next "
                       "picture has seed + 1", seed, metavar="N", png="Seed")
    n: int = option(1, "sampling", "number of pictures of each prompt", int, metavar="N")
    width: int | None = option(None, "sampling", "in pixels, a multiple of 8", int, metavar="N",
                               shown=f"the model's; built-in {SMALL.size}")
    height: int | None = option(None, "sampling", "in pixels, a multiple of 8", int, metavar="N",
                                shown=f"the model's; built-in {SMALL.size}")

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
    lora: list[str] | None = option(
        None, "model", "add a LoRA, as kohya, diffusers, peft or train.py write it; may be given "
        "several times", metavar="FILE[:SCALE]", png="Lora", many=True)
    embedding: list[str] | None = option(
        None, "model", "add a word learned by textual inversion; may be given several times",
        metavar="FILE", png="Embedding", many=True)
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
    words: str | None = option(None, "files", "with --attn: only these words of the prompt, "
                               "separated by commas", metavar="WORDS")
    scale: int = option(1, "files", "enlarge what --gif and --attn write so many times", int,
                        metavar="N")

    batch_size: int = option(1, "speed and memory", "pictures drawn at a time", int, metavar="N")
    deepcache: int | None = option(
        None, "speed and memory", "compute the UNet's deep blocks only at every N-th step: 3 saves "
        "half of the time or more", int, metavar="N", png="DeepCache", old_png="Deep every",
        old=("--deep-every",), shown=1)
    lowmem: bool = option(False, "speed and memory", "use less memory and more time: one network "
                          "on the device at a time, guidance in two passes, decoding in tiles")
    no_fast: bool = option(False, "speed and memory", "run the plain modules of model.py and "
                           "vae.py, more slowly")
    dtype: str | None = option(None, "speed and memory", "precision of the weights",
                               choices=list(DTYPES), shown="fp16 on GPUs; on a CPU bf16 if it "
                               "computes in it, else fp32")
    device: str | None = option(None, "speed and memory", "cuda, mps or cpu", metavar="NAME",
                                shown="the first of them that is there")
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


def flag(name: str) -> str:
    """The option of a field."""
    return "--" + name.replace("_", "-")


# --- the command line ---

class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(message)


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
        stored = read_params(Path(given["params_from"]))
        if "prompts" in given:
            del stored["prompt"]
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
    stored = {name: options[one.name] for name, one in PNG_NAMES.items()
              if options.get(one.name) is not None}
    stored["Size"] = f"{options['width']}x{options['height']}"
    ckpt = options.get("ckpt")
    stored["Model"] = Path(BUILTIN if ckpt is None else ckpt).stem
    return to_text(options["prompt"], options["negative"], stored)


def read_params(path: Path) -> dict[str, object]:
    """The options in a PNG of sd.py or A1111. Raises UserError if it has none."""
    prompt, negative, found = read_png(path)
    if "Init" not in found:
        found.pop("Denoising strength", None)       # of A1111's second pass
    if found.get("Schedule type") == "Automatic":
        del found["Schedule type"]
    if "Size" not in found:
        raise UserError(f"{path} holds no settings of a picture, as sd.py and A1111 write them "
                        "into a PNG")
    try:
        width, height = map(int, found["Size"].split("x"))
        stored = {"prompt": prompt, "negative": negative, "width": width, "height": height}
        for name, one in (OLD_PNG_NAMES | PNG_NAMES).items():
            if name in found:
                read = json.loads if one.metadata["many"] else one.metadata["read"]
                stored[one.name] = read(found[name])
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} holds no settings of a picture: {error}") from error
    return with_sampler(stored) if "sampler" in stored else stored
