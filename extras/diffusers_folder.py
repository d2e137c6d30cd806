"""Reads diffusers folders: one subfolder for each network, with config and weights."""
import re
from pathlib import Path
from typing import NamedTuple

import torch

from extras.diffusers_names import check_diffusers_has, names_in_folder
from extras.files import Tensors, check_fits, open_tensors, read_json
from sampler import PREDICTIONS
from sd import LazyTensor, Preset, StableDiffusion, UserError

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIG_FILES = ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")

# Files also hold buffers, training state, a second copy of the weights, and marks.
IGNORED = re.compile(
    r".*position_ids$|model_ema\.|.*logit_scale$|.*attn_mask$"
    r"|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar"
    r"|denoiser\.sigmas|v_pred|ztsnr)$")

# prediction_type of schedulers and of metadata -> row of PREDICTIONS
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v"}

SCHEDULERS = {  # our sampler -> diffusers' class, for those in rows of PRESETS
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}

# of the VAE's attention in folders from before 2023
OLD_VAE_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class Marks(NamedTuple):
    """What a checkpoint says about its preset beside the weights. None: it does not say."""
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    sampler: str | None = None
    sample_size: int | None = None  # of latents
    scale_factor: float | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None


def open_folder(path: Path, half: bool = False) -> tuple[Tensors, dict[str, str], Marks]:
    """The tensors of a folder under its own names, its metadata, and its marks.

    Of the weights, those in fp16 are taken if `half`.
    Raises UserError if something is missing or damaged.
    """
    if not (path / "model_index.json").exists():
        raise UserError(f"{path} is a folder without model_index.json: give a diffusers folder, "
                        "or a single .safetensors or .ckpt file")
    index = read_json(path / "model_index.json")
    files = {file.relative_to(path).as_posix() for file in path.glob("*/*")}
    tensors, metadata = {}, {}
    for component in COMPONENTS:
        if not any(index.get(component) or []):  # [null, null] means that there is none
            continue
        file = weights_file(files, component, half)
        if file is None:
            raise UserError(f"{path} lacks the weights of its {component}, a .safetensors or .bin "
                            f"in {component}/")
        shards = [Path(file).name]
        if file.endswith(".json"):
            shards = sorted(set(read_json(path / file, "weight_map").values()))
        for shard in shards:
            found, about = open_tensors(path / component / shard)
            for name, tensor in found.items():
                tensors |= modern_name_and_layout(f"{component}/{name}", tensor)
            if component == "unet":  # where save_folder writes it
                metadata |= {key: value for key, value in about.items() if key != "format"}
    return tensors, metadata, read_marks(path)


def modern_name_and_layout(name: str, tensor: LazyTensor) -> Tensors:
    """The tensor as today's diffusers writes it; nothing if it is no weight."""
    if IGNORED.match(name.partition("/")[2]):
        return {}
    if name.endswith("text_projection.weight"):  # x @ projection.T there, x @ projection here
        tensor = transposed(tensor)
    # transformers 5 may leave text_model. out
    name = re.sub(r"^(text_encoder(_2)?/)(?!text_model\.|text_projection)", r"\1text_model.", name)
    name = re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)",
                  lambda match: OLD_VAE_ATTENTION[match[1]], name)
    return {name: tensor}


def transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[::-1], lambda: tensor.read().T)


def weights_file(files: set[str], component: str, half: bool) -> str | None:
    """The file with the weights of a component, or the index of several.

    A .safetensors comes before a .bin. The fp16 variant comes first if `half`, else last.
    """
    variants = (".fp16", "") if half else ("", ".fp16")
    for kind in "safetensors", "bin":
        for variant in variants:
            for stem in "diffusion_pytorch_model", "model", "pytorch_model":
                for file in (f"{component}/{stem}{variant}.{kind}",
                             f"{component}/{stem}.{kind}.index{variant}.json"):
                    if file in files:
                        return file
    return None


def read_marks(path: Path) -> Marks:
    """What the folder's JSON files say. Raises UserError for a model that cannot be drawn with."""
    scheduler, unet, vae = (read_json(path / file) for file in CONFIG_FILES)
    prediction = scheduler.get("prediction_type", "epsilon")
    prediction_type = PREDICTION_TYPES.get(prediction, prediction)
    if scheduler.get("rescale_betas_zero_snr"):
        # Only v works with it: where all is noise, the noise says nothing about the picture.
        prediction_type += "-zero-snr"
        prediction += "-zero-snr"
    if prediction_type not in PREDICTIONS:
        raise UserError(f"{path} predicts {prediction!r}, not epsilon or v_prediction")
    beta_schedule = scheduler.get("beta_schedule")
    if beta_schedule not in (None, "scaled_linear", "linear"):
        raise UserError(f"{path} has the noise schedule {beta_schedule!r}, not scaled_linear or "
                        "linear")
    marks = Marks(prediction_type, None, None, unet.get("sample_size"), vae.get("scaling_factor"),
                  scheduler.get("beta_start"), scheduler.get("beta_end"), beta_schedule)
    for sampler, theirs in SCHEDULERS.items():
        kind = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
        if kind == (theirs, "trailing"):  # as turbo models come
            marks = marks._replace(timestep_spacing="trailing", sampler=sampler)
    return marks


def from_folder_layout(path: Path, tensors: Tensors, preset: Preset,
                       strict: bool = True) -> Tensors:
    """The tensors of `open_folder` under the names of StableDiffusion.state_dict().

    Raises UserError, if `strict`, unless the folder holds exactly this model.
    """
    check_diffusers_has(preset)
    with torch.device("meta"):
        sd = StableDiffusion(preset)
    names, wanted = names_in_folder(sd), sd.state_dict()
    if strict:
        check_fits(path, tensors, {names[name]: tensor for name, tensor in wanted.items()})
    return {name: tensors[names[name]] for name in wanted if names[name] in tensors}
