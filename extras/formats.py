"""Checkpoints in every format: official single files (.safetensors, .ckpt), diffusers folders,
models of the hub. What they hold, what model it is, and how a model is saved.

`StableDiffusion.load` calls `open_checkpoint`, which gives the tensors under the names of
StableDiffusion.state_dict(), none of them read yet.
"""
import json
import re
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

import sd as core  # for PRESETS as they are now: a fork or a test may change them
from extras.diffusers_folder import (
    IGNORED,
    PREDICTION_TYPES,
    Marks,
    from_folder_layout,
    open_folder,
)
from extras.diffusers_names import drop_unused_layers
from extras.diffusers_save import save_folder
from extras.files import (
    Tensors,
    atomic_write,
    check_fits,
    check_new,
    open_tensors,
    save_tensors,
)
from extras.hub import resolve_checkpoint
from extras.memory import keep_freed_memory
from extras.openclip import from_single_file_layout, official_state_dict
from sampler import PREDICTIONS
from sd import Preset, StableDiffusion, UserError, make_network, preset_from_dict, preset_to_dict

UNET = "model.diffusion_model."
TEXT = "cond_stage_model.transformer."


def open_checkpoint(path: str | Path, preset: Preset | str | None = None,
                    prediction_type: str | None = None, dtype: torch.dtype = torch.float32,
                    strict: bool = True) -> tuple[Tensors, Preset, dict[str, str]]:
    """A file, folder or model of the hub: tensors by name, what model it is, and its metadata.

    `preset` and `prediction_type` replace what the checkpoint says of itself. Folders may hold
    the weights twice; those in fp16 are taken if `dtype` is fp16. Without `strict`, tensors may be
    missing or not fit.
    Raises UserError if it is missing, damaged, or no model of PRESETS.
    """
    half = dtype == torch.float16
    path = resolve_checkpoint(path, half)
    if path.is_dir():
        tensors, metadata, marks = open_folder(path, half)
        preset = identify(path, tensors, metadata, marks, preset, prediction_type)
        preset = drop_unused_layers(preset)
        return from_folder_layout(path, tensors, preset, strict), preset, metadata
    tensors, metadata, marks = open_single_file(path)
    preset = identify(path, tensors, metadata, marks, preset, prediction_type)
    return from_single_file_layout(path, tensors, preset, strict), preset, metadata


def open_single_file(path: Path) -> tuple[Tensors, dict[str, str], Marks]:
    """A file's tensors by official name, its metadata, and its marks.

    Raises UserError if it cannot be read.
    """
    tensors, metadata = open_tensors(path)
    # Two kinds of marks: SAI's model specification in the metadata, and empty tensors that
    # trainers of SDXL variants add. The specification has no word for zero SNR.
    mark = metadata.get("modelspec.prediction_type", "v" if "v_pred" in tensors else None)
    prediction_type = PREDICTION_TYPES.get(mark, mark)
    if prediction_type == "v" and "ztsnr" in tensors:
        prediction_type = "v-zero-snr"
    if prediction_type not in PREDICTIONS:
        prediction_type = None
    # old merges lack text_model.
    tensors = {re.sub(rf"^{TEXT}(?!text_model\.)", f"{TEXT}text_model.", name): tensor
               for name, tensor in tensors.items()}
    weights = {name: tensor for name, tensor in tensors.items() if not IGNORED.match(name)}
    return weights, metadata, Marks(prediction_type)


# --- which model is it? ---

def identify(path: Path, tensors: Tensors, metadata: dict[str, str], marks: Marks,
             preset: Preset | str | None = None, prediction_type: str | None = None) -> Preset:
    """The preset of a checkpoint, a copy. `tensors` have the names that they have there.

    The sources, strongest first: what the caller gives; the JSON files of a folder; the config
    that `save` wrote; marks of other programs in a single file; shapes; for the prediction type,
    if rows of the same shapes differ in it, a probe of the UNet.
    Raises UserError if it is none of PRESETS.
    """
    if preset is not None:
        candidates = [core.find_preset(preset) if isinstance(preset, str) else preset]
        marks = Marks()
    elif "config" in metadata:
        candidates = [stored_preset(path, metadata)]
        if not path.is_dir():
            marks = Marks()
    else:
        candidates = candidate_presets(path, tensors)

    if prediction_type is None:
        prediction_type = marks.prediction_type
    if prediction_type is None and len({row.prediction_type for row in candidates}) > 1:
        prediction_type = probe_prediction_type(path, tensors, candidates[0])

    found = deepcopy(closest(candidates, prediction_type, marks))
    if prediction_type is not None:
        found.prediction_type = prediction_type
    if isinstance(marks.sample_size, int):
        found.size = marks.sample_size * found.vae.downsampling
    if marks.scale_factor is not None:
        found.vae.scale_factor = marks.scale_factor
    for name in "beta_start", "beta_end", "beta_schedule":
        if getattr(marks, name) is not None:
            setattr(found, name, getattr(marks, name))
    return found


def closest(candidates: list[Preset], prediction_type: str | None, marks: Marks) -> Preset:
    """The first candidate that has all that is known; else the first with the prediction type;
    else the first."""
    # zero SNR has no rows of its own: it is v with other noise levels
    known = {"prediction_type": "v" if prediction_type == "v-zero-snr" else prediction_type,
             "timestep_spacing": marks.timestep_spacing, "sampler": marks.sampler}
    known = {name: value for name, value in known.items() if value is not None}
    for names in (list(known), ["prediction_type"] if "prediction_type" in known else []):
        for row in candidates:
            if all(getattr(row, name) == known[name] for name in names):
                return row
    return candidates[0]


def candidate_presets(path: Path, tensors: Tensors) -> list[Preset]:
    """The rows of PRESETS with the same input channels and text width. Raises UserError if there
    are none."""
    prefixes = (UNET, "unet/")
    conv_in = next((name for name in (f"{UNET}input_blocks.0.0.weight", "unet/conv_in.weight")
                    if name in tensors), None)
    to_k = next((name for name in tensors
                 if name.startswith(prefixes) and name.endswith("attn2.to_k.weight")), None)
    if to_k is None or conv_in is None:
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: it has no UNet under "
                        f"{' or '.join(prefixes)}")
    widths = tensors[conv_in].shape[1], tensors[to_k].shape[1]
    guides_itself = any(name.endswith("cond_proj.weight") for name in tensors)
    known, rows = [], []
    for row in core.PRESETS.values():
        if not isinstance(row.unet, core.UNetConfig):  # a fork's, whose files have a config
            continue
        known.append((row.unet.in_channels, row.unet.context_dim))
        if known[-1] == widths and guides_itself == (row.unet.time_cond_proj_dim is not None):
            rows.append(row)
    if not rows:
        texts = dict.fromkeys(f"{channels} and {width}" for channels, width in known)
        raise UserError(f"{path} is of another family: {widths[0]} input channels and text width "
                        f"{widths[1]}; known are {', '.join(texts)}")
    return rows


@torch.no_grad()
def probe_prediction_type(path: Path, tensors: Tensors, preset: Preset) -> str:
    """"eps" or "v", by the UNet's answer to a constant at the noisiest time.

    There noise is nearly the input, and the velocity nearly minus the picture. stable-diffusion.cpp
    tells them apart like this. The weights are read layer by layer and not kept.
    """
    keep_freed_memory()  # each layer then reuses the last one's: 1.9 s instead of 3 for SD 2
    unet = unet_that_reads(path, tensors, preset)
    cfg = preset.unet
    y = None if cfg.adm_in_channels is None else torch.full((1, cfg.adm_in_channels), 0.5)
    out = unet(torch.full((1, cfg.in_channels, 8, 8), 0.5), torch.tensor([999]),
               torch.full((1, 2, cfg.context_dim), 0.5), y)
    return "v" if (out - 0.5).mean() < -1 else "eps"


def unet_that_reads(path: Path, tensors: Tensors, preset: Preset) -> nn.Module:
    """A UNet in fp32 whose modules read their weights before they work and drop them after."""
    with torch.device("meta"):
        unet = make_network(preset.unet)
    wanted = {UNET + name: tensor for name, tensor in unet.state_dict().items()}
    check_fits(path, {name: tensor for name, tensor in tensors.items() if name.startswith(UNET)},
               wanted)

    def fill(name: str, module: nn.Module, *_) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            stored = tensors[UNET + f"{name}.{own}".lstrip(".")].read()
            weight = stored.float().reshape(parameter.shape)
            setattr(module, own, nn.Parameter(weight, requires_grad=False))

    def empty(module: nn.Module, *_) -> None:
        for own, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, own, nn.Parameter(parameter.to("meta"), requires_grad=False))

    for name, module in unet.named_modules():
        module.register_forward_pre_hook(partial(fill, name))
        module.register_forward_hook(empty)
    return unet.eval()


# --- the config in a file's metadata ---

# of fields in files from before the present names
RENAMED_FIELDS = {"prediction": "prediction_type", "spacing": "timestep_spacing",
                  "layers_skipped": "clip_skip"}


def stored_preset(path: Path, metadata: dict[str, str]) -> Preset:
    """The preset that `save` wrote. Raises UserError if it does not fit this version."""
    try:
        return preset_from_dict(upgrade_config(dict(json.loads(metadata["config"]))))
    except (ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} has a config in its metadata that does not fit this version: "
                        f"{error}") from error


def upgrade_config(stored: dict) -> dict:
    """A config with "text" and "text_2", as files had it before, as preset_from_dict takes it.

    Others are not changed.
    """
    def rename(fields: dict) -> dict:
        return {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}

    if "text" not in stored:
        return stored
    stored = rename(stored)
    texts = [stored.pop("text"), stored.pop("text_2", None)]
    return stored | {
        "unet": {"kind": "UNetConfig"} | stored["unet"],
        "vae": {"kind": "VAEConfig"} | stored["vae"],
        "text_encoders": [{"kind": "CLIPTextConfig"} | rename(text)
                          for text in texts if text is not None]}


# --- save ---

def save(sd: StableDiffusion, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
    """Writes the model, complete or not at all, with its preset in the metadata.

    A path that ends in .safetensors becomes one file with official names, any other a new
    diffusers folder. Raises UserError if it cannot be written.
    """
    path = Path(path)
    check_new(path)
    if path.suffix != ".safetensors":
        save_folder(sd, path, dtype, partial(metadata_of, sd))
        return
    tensors = official_state_dict(sd) | marks_of(sd.preset)
    with atomic_write(path) as temporary:
        save_tensors(tensors, temporary, dtype, metadata_of(sd, sd.preset))


def metadata_of(sd: StableDiffusion, preset: Preset) -> dict[str, str]:
    """The metadata of the file it came from, SAI's model specification, and the config."""
    names = {"eps": "epsilon", "v-zero-snr": "v"}
    prediction = names.get(preset.prediction_type, preset.prediction_type)
    return sd.metadata | {"modelspec.prediction_type": prediction,
                          "config": json.dumps(preset_to_dict(preset))}


def marks_of(preset: Preset) -> dict[str, Tensor]:
    """Empty tensors by which other programs know zero terminal SNR."""
    if preset.prediction_type != "v-zero-snr":
        return {}
    return {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
