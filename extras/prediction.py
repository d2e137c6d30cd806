"""Whether a model predicts the noise (eps) or the velocity (v), if no file says it."""
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

from extras.diffusers_config import PREDICTION_TYPES
from extras.diffusers_folder import Marks
from extras.files import Tensors
from sampler import PREDICTIONS, NoiseSchedule
from sd import Preset, StableDiffusion, UserError

TRUE = ("true", "1", "yes")


# --- what files say ---

def marks_in_file(path: Path, tensors: Tensors, metadata: dict[str, str]) -> Marks:
    """What a single file says of its noise: SAI's model specification and kohya's settings in the
    metadata, empty tensors that trainers of SDXL variants add, and A1111's .yaml beside it."""
    yaml = read_yaml(path)
    said = [metadata.get("modelspec.prediction_type"), "v" if "v_pred" in tensors else None,
            yaml.get("parameterization")]
    if metadata.get("ss_v_parameterization", "").lower() in TRUE:
        said.append("v")
    # an unknown word says nothing
    known = [PREDICTION_TYPES.get(one, one) for one in said]
    found = next((one for one in known if one in PREDICTIONS), None)
    zero_snr = ("ztsnr" in tensors or yaml.get("zero_snr", "").lower() in TRUE
                or metadata.get("ss_zero_terminal_snr", "").lower() in TRUE)
    if found == "v" and zero_snr:
        found = "v-zero-snr"

    def number(key: str) -> float | None:
        try:
            return float(yaml[key]) if key in yaml else None
        except ValueError as error:
            raise UserError(f"{path.with_suffix('.yaml')}: {key} is {yaml[key][:40]!r}, not a "
                            "number") from error
    return Marks(found, scale_factor=number("scale_factor"), beta_start=number("linear_start"),
                 beta_end=number("linear_end"))


def read_yaml(path: Path) -> dict[str, str]:
    """The settings of noise in the .yaml of A1111 and CompVis that has the file's name.

    A few lines of it are read, by their keys. A key that it lacks has CompVis' default.
    """
    file = path.with_suffix(".yaml")
    try:
        if not file.is_file() or file.stat().st_size > 2**20:   # a pipe or device has no end
            return {}
        text = file.read_text("utf-8")
    except (OSError, UnicodeDecodeError, ValueError):
        return {}
    keys = {"parameterization": r"\w+", "linear_start": r"[\d.e-]+", "linear_end": r"[\d.e-]+",
            "scale_factor": r"[\d.]+", "(?:rescale_betas_zero_snr|zero_snr|ztsnr|zsnr)": r"\w+"}
    found = {}
    for key, value in keys.items():
        match = re.search(rf"^[ \t]*(?:{key})[ \t]*:[ \t]*['\"]?({value})", text, re.MULTILINE)
        if match:
            found["zero_snr" if "zsnr" in key else key] = match[1]
    if "target:" in text and "parameterization" not in found:
        found["parameterization"] = "eps"
    return found


# --- what the UNet says ---

def settle_prediction(sd: StableDiffusion, rows: list[Preset], path: Path | str) -> None:
    """Ask the UNet of a loaded model what it predicts, and take the row of PRESETS that has it.

    `rows`: those the model may be, none if it is known already. Warns of what was found unless it
    is what all of them have.
    """
    if not rows:
        return
    found = probe_prediction_type(sd.unet, sd.preset)
    usual = {row.prediction_type for row in rows}
    if usual != {found}:
        warnings.warn(f"{path} does not say what it predicts: by its answers it is {found}; "
                      "--prediction replaces that")
    row = next((row for row in rows if row.prediction_type == found), None)
    if row is not None:
        for name in ("size", "steps", "guidance", "sampler", "timestep_spacing", "zero_negative"):
            setattr(sd.preset, name, getattr(row, name))
    sd.preset.prediction_type = found
    sd.schedule = NoiseSchedule(found, sd.schedule.base)


@torch.no_grad()
def probe_prediction_type(unet: nn.Module, preset: Preset) -> str:
    """"eps" or "v", by the UNet's answer to a constant at the noisiest time.

    There noise is nearly the input, and the velocity nearly minus the picture. stable-diffusion.cpp
    tells them apart like this. It takes one call with 8x8 latents.
    """
    cfg, weight = preset.unet, unet.out[2].weight

    def constant(*shape: int) -> Tensor:
        return torch.full(shape, 0.5, device=weight.device)
    y = None if cfg.adm_in_channels is None else constant(1, cfg.adm_in_channels)
    w = None if cfg.time_cond_proj_dim is None else constant(1)
    slow = weight.dtype == torch.float16 and weight.device.type == "cpu"
    with computing_in_fp32(unet) if slow else nullcontext():
        out = unet(constant(1, cfg.in_channels, 8, 8), torch.tensor([999], device=weight.device),
                   constant(1, 2, cfg.context_dim), y, w).float()
    return "v" if (out - 0.5).mean() < -1 else "eps"


@contextmanager
def computing_in_fp32(network: nn.Module) -> Iterator[None]:
    """Within, each layer has its weights in fp32 while it works: CPUs are slow in fp16."""
    kept: dict[nn.Module, list[Tensor]] = {}

    def widen(module: nn.Module, inputs: tuple) -> tuple:
        parameters = list(module.parameters(recurse=False))
        kept[module] = [p.data for p in parameters]
        for p in parameters:
            p.data = p.data.float()
        return tuple(one.float() if isinstance(one, Tensor) else one for one in inputs)

    def put_back(module: nn.Module, *_) -> None:
        for p, data in zip(module.parameters(recurse=False), kept.pop(module)):
            p.data = data

    leaves = [module for module in network.modules() if not list(module.children())]
    hooks = [leaf.register_forward_pre_hook(widen) for leaf in leaves]
    hooks += [leaf.register_forward_hook(put_back) for leaf in leaves]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
