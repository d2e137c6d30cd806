"""Checkpoints in every format: official single files (.safetensors, .ckpt), diffusers folders,
models of the hub. What they hold, what model it is, and how a model is saved.

`StableDiffusion.load` calls `load_model`. Tensors go from the names of a file to official names
(renames.py), and from there, network by network, to those of this program (components.py).
"""
import json
import re
import warnings
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

import sd as core  # for PRESETS as they are now: a fork or a test may change them
from extras.checks import check_preset, checked_preset
from extras.components import FOLDERS, take_components, without_missing_layers
from extras.diffusers_config import scheduler_settings, vae_config, with_configs
from extras.diffusers_folder import Marks, open_component, open_folder
from extras.diffusers_names import check_diffusers_has, drop_unused_layers
from extras.diffusers_save import save_folder
from extras.fast import loading, optimize
from extras.files import (
    Tensors,
    atomic_write,
    check_new,
    open_tensors,
    read_json,
    save_tensors,
)
from extras.hub import resolve_checkpoint, resolve_component
from extras.memory import building
from extras.openclip import official_state_dict
from extras.prediction import marks_in_file, settle_prediction
from extras.renames import UNET, VAE, standard_names
from sd import Preset, StableDiffusion, UserError, preset_to_dict


class Opened(NamedTuple):
    """A checkpoint whose tensors are not read yet."""
    path: Path
    tensors: Tensors            # by official names, or as diffusers' component/name
    preset: Preset
    rows: list[Preset]          # that it may be, if nothing says what it predicts
    metadata: dict[str, str]


def load_model(cls: type[StableDiffusion], path: str | Path, device: str, dtype: torch.dtype,
               preset: Preset | str | None = None, prediction_type: str | None = None,
               fast: bool = True, vae: str | None = None, unet: str | None = None
               ) -> StableDiffusion:
    """What StableDiffusion.load does for a path, with every format and, if `fast`, at speed.

    `vae` and `unet`: files, folders or names of the hub that these networks come from instead.
    Raises UserError.
    """
    half = dtype == torch.float16
    opened = open_model(path, preset, prediction_type, half, unet)
    found_vae, preset = None, opened.preset
    if vae is not None:
        found_vae, preset = open_vae(vae, preset, half)
    size = [tensor for name, tensor in opened.tensors.items() if "model_ema." not in name]
    with loading(dict(enumerate(size)), device, dtype) if fast else nullcontext(Tensor.to) as to:
        with building():
            sd = cls(preset)
        sd.metadata = opened.metadata
        without = () if vae is None else (VAE,)
        tensors = take_components(opened.path, opened.tensors, sd, without=without)
        if vae is not None:
            tensors |= take_components(vae, found_vae, sd, only=VAE)
        try:
            sd.load_weights(tensors, device, dtype, to)
        except UserError as error:
            raise UserError(f"{path}: {error}") from error
    settle_prediction(sd, opened.rows, path if unet is None else unet)
    if fast:
        optimize(sd)
    return sd


def open_checkpoint(path: str | Path, preset: Preset | str | None = None,
                    prediction_type: str | None = None, dtype: torch.dtype = torch.float32,
                    strict: bool = True) -> tuple[Tensors, Preset, dict[str, str]]:
    """A file, folder or model of the hub: tensors by name, what model it is, and its metadata.

    `preset` and `prediction_type` replace what the checkpoint says of itself. Folders may hold
    the weights twice; those in fp16 are taken if `dtype` is fp16. Without `strict`, tensors may be
    missing or not fit.
    Raises UserError if it is missing, damaged, or no model of PRESETS.
    """
    opened = open_model(path, preset, prediction_type, dtype == torch.float16)
    with building():
        sd = StableDiffusion(opened.preset)
    tensors = take_components(opened.path, opened.tensors, sd, strict)
    return tensors, opened.preset, opened.metadata


def open_model(path: str | Path, preset: Preset | str | None, prediction_type: str | None,
               half: bool, unet: str | None = None) -> Opened:
    """A checkpoint, with the UNet of another one if `unet` is given. Raises UserError."""
    path = resolve_checkpoint(path, half)
    source = open_source(path, half)
    if unet is not None:
        other = open_unet(unet, half)
        tensors = {name: tensor for name, tensor in source.tensors.items()
                   if not name.startswith((UNET, FOLDERS[UNET], "model_ema."))}
        source = source._replace(tensors=tensors | other.tensors, marks=other.marks,
                                 metadata=other.metadata)
    found, rows = identify(source, preset, prediction_type)
    if path.is_dir():
        check_diffusers_has(found)
        found = drop_unused_layers(found)
        if preset is None and isinstance(found.unet, core.UNetConfig):
            index = read_json(path / "model_index.json")
            index |= {} if unet is None else {"unet": None}
            found = with_configs(path, index, found)
    if preset is None:
        check_preset(path, found)
    found = without_missing_layers(source.tensors, found)
    return Opened(path, source.tensors, found, rows, source.metadata)


class Source(NamedTuple):
    """What stands in a file or folder."""
    path: Path
    tensors: Tensors
    metadata: dict[str, str]
    marks: Marks


def open_source(path: Path, half: bool) -> Source:
    """A whole model's file or folder. Raises UserError if it cannot be read."""
    if path.is_dir():
        tensors, metadata, marks = open_folder(path, half)
        return Source(path, standard_names(tensors), metadata, marks)
    tensors, metadata = open_tensors(path)
    marks = marks_in_file(path, tensors, metadata)
    tensors = standard_names(tensors)
    return Source(path, tensors, metadata, marks)


# --- parts in files of their own ---

def open_unet(name: str, half: bool) -> Source:
    """The UNet of a file, a folder or a model of the hub. Raises UserError."""
    source = open_part(name, "unet", half)
    tensors = {key: tensor for key, tensor in source.tensors.items()
               if key.startswith((UNET, FOLDERS[UNET]))}
    if not tensors:
        raise UserError(f"{name} holds no UNet{what_it_is(source.tensors)}")
    metadata = {key: value for key, value in source.metadata.items() if key != "config"}
    return source._replace(tensors=tensors, metadata=metadata)


def open_vae(name: str, preset: Preset, half: bool) -> tuple[Tensors, Preset]:
    """The VAE of a file, a folder or a model of the hub, and the preset with its config."""
    source = open_part(name, "vae", half)
    tensors = {key: tensor for key, tensor in source.tensors.items()
               if key.startswith((VAE, FOLDERS[VAE]))}
    if not tensors:
        raise UserError(f"{name} holds no VAE{what_it_is(source.tensors)}")
    config = None
    for file in (source.path / "vae/config.json", source.path / "config.json"):
        if config is None and file.is_file():
            config = vae_config(file, read_json(file), preset.vae)
    stored = our_config(source.path, source.metadata)
    if config is None and stored is not None:
        config = stored.vae
    if config is None:
        return tensors, preset
    if config.scale_factor != preset.vae.scale_factor:
        warnings.warn(f"{name} scales latents by {config.scale_factor}, the model by "
                      f"{preset.vae.scale_factor}: the VAE's is taken, and it may be for another "
                      "family of models")
    return tensors, replace(preset, vae=config)


def open_part(name: str, component: str, half: bool) -> Source:
    """A file or folder of one network alone, or of a whole model that has it."""
    path = resolve_component(name, component, half)
    if not path.is_dir():
        return open_source(path, half)
    tensors = open_component(path, component, half)
    if tensors is None:
        raise UserError(f"{name} is a folder without weights of a {component}")
    marks = Marks()
    if (path / "scheduler/scheduler_config.json").is_file():
        marks = Marks(prediction_type=scheduler_settings(path)["prediction_type"])
    return Source(path, standard_names(tensors), {}, marks)


# --- which model is it? ---

def identify(source: Source, preset: Preset | str | None = None,
             prediction_type: str | None = None) -> tuple[Preset, list[Preset]]:
    """The preset of a checkpoint, a copy; and the rows that it may be, if nothing says what it
    predicts.

    The sources, strongest first: what the caller gives; the JSON files of a folder; the config
    that `save` wrote; marks of other programs in a single file or beside it; shapes. What it
    predicts is asked of the UNet once it is loaded (prediction.py).
    Raises UserError if it is none of PRESETS.
    """
    marks, stored = source.marks, our_config(source.path, source.metadata)
    if preset is not None:
        candidates = [core.find_preset(preset) if isinstance(preset, str) else preset]
        marks = Marks()
    elif stored is not None:
        candidates = [stored]
        if not source.path.is_dir():
            marks = Marks()
    else:
        candidates = candidate_presets(source.path, source.tensors)

    if prediction_type is None:
        prediction_type = marks.prediction_type
    unknown = preset is None and stored is None and prediction_type is None
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
    if marks.sampler == "lcm" and found.sampler != "lcm":
        found.sampler, found.steps, found.guidance = "lcm", 4, 1.0
    return found, candidates if unknown else []


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


def unet_shapes(tensors: Tensors) -> tuple[int, int] | None:
    """The UNet's input channels and text width; None if there is no UNet."""
    conv_in = next((name for name in (f"{UNET}input_blocks.0.0.weight", "unet/conv_in.weight")
                    if name in tensors), None)
    to_k = next((name for name in tensors if name.startswith((UNET, "unet/"))
                 and name.endswith("attn2.to_k.weight")), None)
    if conv_in is None or to_k is None:
        return None
    return tensors[conv_in].shape[1], tensors[to_k].shape[1]


def candidate_presets(path: Path, tensors: Tensors) -> list[Preset]:
    """The rows of PRESETS with the same input channels and text width. Raises UserError if there
    are none."""
    widths = unet_shapes(tensors)
    if widths is None:
        raise UserError(f"{path} is not a Stable Diffusion checkpoint: it has no UNet under "
                        f"{UNET} or unet/{what_it_is(tensors)}")
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


OTHER_FILES = [  # names in files that are no checkpoints -> what they are, and what to do
    (r"lora_|hada_|lokr_|\.lora\.|\.lora_[AB]\.", "it is a LoRA: give it as --lora"),
    (r"^(emb_params|\*|clip_l|clip_g)$", "it is a learned word: give it as --embedding"),
    (r"^control_model\.|controlnet_|^input_hint_block", "it is a ControlNet, which goes with "
     "examples/controlnet.py"),
    (r"double_blocks\.|joint_blocks\.|single_blocks\.|^transformer_blocks\.",
     "it is of another family (Flux, SD 3 or the like), which is not supported"),
    (rf"^({re.escape(VAE)}|vae/)", "it is a VAE: give it as --vae, beside a --ckpt"),
    (r"text_model\.|transformer\.resblocks\.", "it is a text encoder: give a whole model"),
]


def what_it_is(tensors: Tensors) -> str:
    """The end of a message about a file without what is sought."""
    for pattern, what in OTHER_FILES:
        if any(re.search(pattern, name) for name in tensors):
            return f"; {what}"
    some = ", ".join(list(tensors)[:3])
    return f"; its tensors are {some}, ..." if some else "; it holds no tensors"


# --- the config in a file's metadata ---

# of fields in files from before the present names
RENAMED_FIELDS = {"prediction": "prediction_type", "spacing": "timestep_spacing",
                  "layers_skipped": "clip_skip"}


def our_config(path: Path, metadata: dict[str, str]) -> Preset | None:
    """The preset that `save` wrote; None if there is none. Another program's "config" is not
    read, which a warning says. Raises UserError if ours does not fit this version."""
    if "config" not in metadata:
        return None
    try:
        stored = json.loads(metadata["config"])
    except (ValueError, RecursionError):
        stored = None
    if not isinstance(stored, dict) or not {"unet", "vae"} <= stored.keys():
        warnings.warn(f"{path} has a config of another program in its metadata, which is not read")
        return None
    return checked_preset(f"{path}: the config in its metadata", upgrade_config(dict(stored)))


def upgrade_config(stored: dict) -> dict:
    """A config with "text" and "text_2", as files had it before, as preset_from_dict takes it.

    Others are not changed.
    """
    def rename(fields: dict) -> dict:
        return {RENAMED_FIELDS.get(name, name): value for name, value in fields.items()}

    texts = [stored.get("text"), stored.get("text_2")]
    configs = [stored["unet"], stored["vae"], *(one for one in texts if one is not None)]
    if "text" not in stored or not all(isinstance(one, dict) for one in configs):
        return stored       # ours, or what checked_preset refuses
    stored = {name: value for name, value in rename(stored).items()
              if name not in ("text", "text_2")}
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
