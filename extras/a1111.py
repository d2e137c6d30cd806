"""What the settings in a picture of A1111 or ComfyUI mean here, and our names as A1111 has them.

A1111's defaults are A1111's: before 1.9 a sampler without "Karras" in its name has evenly spaced
times (linspace), from 1.9 "Automatic" is Karras for most DPM++ samplers.
"""
import re
from collections.abc import Callable

from extras import prompts
from extras.png_info import Params
from extras.samplers import sampler_and_spacing, spacing_name
from sampler import SAMPLERS, SPACINGS
from sd import UserError

SAMPLER_NAMES = {
    "ddim": "DDIM", "ddpm": "DDPM", "euler": "Euler", "euler_a": "Euler a", "lcm": "LCM",
    "dpmpp_2m": "DPM++ 2M", "dpmpp_2m_sde": "DPM++ 2M SDE", "dpmpp_sde": "DPM++ SDE",
    "heun": "Heun", "unipc": "UniPC"}
SPACING_NAMES = {
    "leading": "DDIM", "linspace": "Uniform", "trailing": "Simple", "karras": "Karras",
    "exponential": "Exponential", "sgm_uniform": "SGM Uniform", "beta": "Beta"}
AUTOMATIC = {"dpmpp_2m": "karras", "dpmpp_sde": "karras", "dpmpp_2m_sde": "exponential",
             "ddim": "leading", "lcm": None, "unipc": None}     # others: linspace
OWN_NOISE = ("dpmpp_sde", "dpmpp_2m_sde")   # A1111 draws theirs from a Brownian tree
FILES = {"Init", "Mask", "Lora", "Embedding", "Checkpoint", "VAE", "UNet"}
FOLLOWED = FILES | {
    "Steps", "Sampler", "Schedule type", "Spacing", "CFG scale", "Seed", "Size", "Clip skip",
    "Denoising strength", "CFG end", "CFG rescale", "Guided share", "Deep every", "DeepCache",
    "Image CFG scale", "Preset", "Prediction", "Emphasis", "RNG"}
IGNORED = {  # what does not change the picture, or is spoken of elsewhere
    "Model", "Model hash", "Version", "Hashes", "Lora hashes", "TI hashes", "VAE hash", "User",
    "Created Date", "Civitai metadata", "Civitai resources", "Time taken", "Batch size",
    "Batch pos", "Template", "Negative Template", "Wildcard prompt", "Wildcard negative prompt",
    "Pad conds"}
GROUPS = {  # how the names of settings begin: what is not followed
    "Hires": "the second, larger pass (Hires) is left out",
    "ADetailer": "ADetailer's corrections are left out", "ControlNet": "ControlNet is left out",
    "Refiner": "the refiner is left out", "Variation": "the variation of the seed is left out",
    "Seed resize": "the resized seed is left out", "Mask": "the mask is not in the picture",
    "Inpaint": "the mask is not in the picture", "Face": "the correction of faces is left out",
    "Eta": "another eta is left out", "ENSD": "A1111's shift of the seed (ENSD) is left out",
    "Discard": "leaving out the last but one noise level (Discard penultimate) is not followed",
    "Downcast": "the noise levels in fp16 (Downcast alphas_cumprod) are left out",
    "Tiling": "tiling is left out", "FreeU": "FreeU is left out",
    "Schedule": "other ends of the noise levels are left out",
    "Sigma": "other ends of the noise levels are left out"}


# --- our settings as A1111 names them ---

def names_for(sampler: str | None, spacing: str | None) -> dict[str, str]:
    """The fields of sampler and schedule, and ours beside where A1111 has no such schedule."""
    fields = {}
    if sampler is not None:
        fields["Sampler"] = SAMPLER_NAMES.get(sampler, sampler)
    if spacing is not None:
        fields["Schedule type"] = SPACING_NAMES.get(spacing, "Automatic")
        if spacing_name(fields["Schedule type"]) != spacing:
            fields["Spacing"] = spacing
    return fields


def is_ours(fields: dict[str, str]) -> bool:
    """Whether sd.py wrote the settings, now or before it named itself."""
    old = {"Guided share", "Deep every", "DeepCache", "CFG end"} & fields.keys()
    version = fields.get("Version")
    if version == "sd.py" or (version is not None and not old):
        return version == "sd.py"
    return fields.get("Sampler") in SAMPLERS and bool(
        old or fields.get("Schedule type") in SPACINGS)


# --- theirs as ours ---

def sampler_of(fields: dict[str, str], ours: bool, program: str) -> dict[str, str]:
    """The options `sampler` and `timestep_spacing` that the fields mean."""
    found = {}
    if "Sampler" in fields:
        found["sampler"], spacing = sampler_and_spacing(fields["Sampler"])
        if spacing is not None:
            return found | {"timestep_spacing": spacing}
    schedule = fields.get("Spacing", fields.get("Schedule type", ""))
    if schedule.lower() not in ("", "automatic"):
        found["timestep_spacing"] = spacing_name(schedule)
    elif found and not ours and program == "A1111":
        automatic = schedule != "" or version_of(fields) >= (1, 9)
        usual = AUTOMATIC.get(found["sampler"], "linspace")
        if not automatic and usual in ("karras", "exponential"):
            usual = "linspace"
        if usual is not None:
            found["timestep_spacing"] = usual
    return found


def version_of(fields: dict[str, str]) -> tuple[int, ...]:
    match = re.match(r"[vf]*(\d{1,4})\.(\d{1,4})", fields.get("Version", ""))
    return (int(match[1]), int(match[2])) if match else (0, 0)


def check_sampler(path: object, fields: dict[str, str], found: dict, given: dict) -> None:
    """Raises UserError for names that are not known here, unless others are given."""
    for option, table, name, field in (
            ("sampler", SAMPLERS, "sampler", "Sampler"),
            ("timestep_spacing", SPACINGS, "schedule", "Schedule type")):
        if option in found and found[option] not in table and option not in given:
            theirs = fields.get(field, found[option])[:60]
            raise UserError(f"{path}: its {name} {theirs!r} is not known here: give one with --"
                            f"{option.replace('_', '-')}: {', '.join(table)}")


def notes_on(params: Params, found: dict, given: dict) -> list[str]:
    """A line for each setting of A1111 or ComfyUI that changes the picture and is not followed."""
    fields, lines = params.fields, list(params.notes)
    for names, line in RULES:
        if names(params, found, given):
            lines.append(line.format(**{"model": fields.get("Model", "")[:80],
                                        "program": params.program,
                                        "words": fields.get("TI hashes", "")[:80]}))
    for start, line in GROUPS.items():
        if any(name.split(" ")[0].startswith(start) or name.startswith(start)
               for name in fields.keys() - FOLLOWED - IGNORED) and line not in lines:
            lines.append(line)
    unknown = [name for name in fields if name not in FOLLOWED | IGNORED
               and not name.startswith(tuple(GROUPS))]
    if unknown:
        more = f" and {len(unknown) - 8} more" if len(unknown) > 8 else ""
        lines.append(f"not known, so not followed: {', '.join(n[:40] for n in unknown[:8])}{more}")
    return lines


def has_weights(prompt: str) -> bool:
    try:
        return any(piece.weight != 1 for section in prompts.parse(prompt) for piece in section)
    except UserError:
        return True


def weighted(params: Params) -> bool:
    return has_weights(params.prompt) or has_weights(params.negative)


def has_noise(params: Params, found: dict) -> bool:
    name = found.get("sampler", "")
    return name in (*OWN_NOISE, "ddpm", "lcm") or name.endswith("_a")


Rule = Callable[[Params, dict, dict], bool]
RULES: list[tuple[Rule, str]] = [
    (lambda p, found, given: "Model" in p.fields and "ckpt" not in given,
     "the model {model!r} is not taken from a picture: give it with --ckpt"),
    (lambda p, found, given: p.program == "A1111" and p.fields.get("RNG") != "CPU",
     "A1111 drew the noise on its GPU, so the picture will be another one"),
    (lambda p, found, given: p.fields.get("RNG") == "CPU" and found.get("sampler") in OWN_NOISE,
     "A1111 draws the noise between the steps of this sampler in another way"),
    (lambda p, found, given: p.program == "ComfyUI" and has_noise(p, found),
     "ComfyUI draws the noise between the steps of this sampler in another way"),
    (lambda p, found, given: p.program == "ComfyUI" and weighted(p),
     "ComfyUI weighs words in another way, and there [ ] give no weight"),
    (lambda p, found, given: p.program == "ComfyUI" and found.get("timestep_spacing") == "beta",
     "ComfyUI's schedule beta has other noise levels"),
    (lambda p, found, given: found.get("sampler") == "unipc",
     "{program}'s UniPC has another order or other noise levels"),
    (lambda p, found, given: p.fields.get("Emphasis") in ("None", "Ignore") and weighted(p),
     "A1111 gave the words no weights there (Emphasis), and here they have them"),
    (lambda p, found, given: p.program == "A1111" and weighted(p)
     and p.fields.get("Emphasis") not in ("No norm", "None", "Ignore"),
     "A1111 scales the vectors of weighted words to their mean, which is left out"),
    (lambda p, found, given: p.fields.get("Seed") == "-1",
     "the seed is not stored: any other is taken"),
    (lambda p, found, given: "Size" not in p.fields and not {"width", "height"} <= given.keys(),
     "the size is not stored: it is the model's"),
    (lambda p, found, given: "strength" in found and "init" not in given,
     "it was made of another picture, which is not in it: give that with --init"),
    (lambda p, found, given: "TI hashes" in p.fields and "embedding" not in given,
     "it has learned words ({words}): give them with --embedding"),
    (lambda p, found, given: "Lora hashes" in p.fields and "<lora:" not in p.prompt
     and "lora" not in given, "it was drawn with LoRAs: give them with --lora"),
    (lambda p, found, given: '"lora"' in p.fields.get("Civitai resources", "").lower()
     and not {"lora", "lora_dir"} & given.keys(),
     "it was drawn with LoRAs of Civitai: give them with --lora"),
]
