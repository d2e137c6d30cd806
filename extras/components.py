"""From the tensors of a checkpoint to those of each network, under the names of this program.

One network after the other: where its tensors stand, in which names, what is missing, and what
nobody needs. `take_components` gives tensors under the names of StableDiffusion.state_dict().
"""
import re
import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clip import CLIPTextConfig
from extras.diffusers_names import diffusers_name, drop_unused_layers
from extras.files import Tensors
from extras.memory import building
from extras.openclip import from_openclip, to_openclip
from extras.renames import UNET, VAE
from sd import (
    LazyTensor,
    Preset,
    StableDiffusion,
    UserError,
    check_names_and_shapes,
    make_network,
)

CLIP = ("cond_stage_model.transformer.text_model.",
        "conditioner.embedders.0.transformer.text_model.",
        "conditioner.embedders.1.transformer.text_model.")
OPENCLIP = ("cond_stage_model.model.", "conditioner.embedders.0.model.",
            "conditioner.embedders.1.model.")

# Buffers of training that official files hold; nobody needs to read of them.
BUFFERS = re.compile(
    r".*position_ids$|.*logit_scale$|.*attn_mask$"
    r"|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar"
    r"|denoiser\.sigmas|v_pred|ztsnr|model_ema\.(decay|num_updates))$")

CHANGES_MODEL = [  # surplus tensors that change what the model computes -> what they are
    (r"(^|\.)edm_(mean|std|vpred)", "its noise is EDM's, which is not supported"),
    (r"scaled_fp8$|scale_weight$|weight_scale|scale_input$|\.SCB$|absmax|quant_map|quant_state"
     r"|\.qweight$|\.qzeros$|comfy_quant|weight_format$",
     "its weights are quantized, which is not supported: give it in fp16, bf16 or fp32"),
    (r"lora_|hada_|lokr_|\.lora\.", "a LoRA is in it that is not merged: give that as --lora"),
    (r"\.fuser\.|position_net", "it is GLIGEN, which is not supported"),
    (r"motion_module|temporal_|time_stack|time_mix", "it draws videos, which is not supported"),
    (r"_ip\.|ip_adapter|image_proj|encoder_hid_proj|add_[kv]_proj",
     "it sees pictures (IP-Adapter or the like), which is not supported"),
    (r"^(model\.diffusion_model\.label_emb|unet/(class|add)_embedding)",
     "its UNet takes classes or vectors, which is not supported"),
]


FOLDERS = {UNET: "unet/", VAE: "vae/"}  # where diffusers has them


class Component(NamedTuple):
    """A network in the tensors of a checkpoint."""
    kind: str                  # as messages call it
    prefix: str                # of its names in StableDiffusion.state_dict()
    start: str                 # of its names in the checkpoint
    names: dict[str, str]      # name in state_dict() -> in the checkpoint; but for OpenCLIP's
    wanted: dict[str, Tensor]  # name in the checkpoint -> tensor on the meta device
    found: Tensors             # name in the checkpoint -> tensor
    tensors: Tensors           # name in state_dict() -> tensor


def take_components(path: Path | str, tensors: Tensors, sd: StableDiffusion, strict: bool = True,
                    only: str | None = None, without: tuple[str, ...] = ()) -> Tensors:
    """The tensors of the networks of `sd` by name in its state_dict(), from those of a checkpoint.

    `only` this network (a prefix), or all but those in `without`. What no network uses is named
    in a warning. Raises UserError, if `strict`, for a network that is missing or does not fit, and
    for tensors that would change the model.
    """
    taken, known, missing = {}, dict.fromkeys(names_of_whole_encoders(sd.preset)), []
    for part in components(tensors, sd):
        known |= part.wanted
        if part.prefix in without or only not in (None, part.prefix):
            known |= part.found
            continue
        zeros = unused_and_missing(part, sd)
        if not part.found:
            missing.append(part)
        elif strict and not missing:
            check_component(path, part, {part.names[name] for name in zeros})
        taken |= part.tensors | zeros
    surplus = [name for name in tensors if name not in known and not is_buffer(name)]
    if strict and missing:
        raise UserError(f"{path} holds no {' and no '.join(part.kind for part in missing)}: "
                        f"{what_fills(missing)}")
    if strict and only is None:
        check_surplus(path, surplus, known)
    if not strict:
        taken |= {name: tensors[name] for name in surplus if name not in taken}
    return {name: tensor._replace(read=partial(read_numbers, path, name, tensor))
            for name, tensor in taken.items()}


def read_numbers(path: Path | str, name: str, tensor: LazyTensor) -> Tensor:
    """Raises UserError for weights in whole or complex numbers: they are codes of something."""
    found = tensor.read()
    if not found.is_floating_point():
        kind = str(found.dtype).removeprefix("torch.")
        raise UserError(f"{path}: {name} holds numbers of the type {kind}, perhaps quantized, "
                        "which is not supported: give it in fp16, bf16 or fp32")
    return found


def components(tensors: Tensors, sd: StableDiffusion) -> Iterator[Component]:
    """Each network of `sd`, as far as it is there."""
    two = len(sd.text_encoders) > 1
    for i, (prefix, network) in enumerate(sd.components.items()):
        if prefix == UNET:
            kind, others = "UNet", ["unet/"]
        elif prefix == VAE:
            kind, others = "VAE", ["vae/"]
        elif i == 0:
            kind = "first text encoder" if two else "text encoder"
            # in SDXL's files, cond_stage_model is nothing
            others = ["text_encoder/", *CLIP[two:2], *OPENCLIP[two:2]]
        else:
            kind, others = "second text encoder", ["text_encoder_2/", CLIP[2], OPENCLIP[2]]
        yield read_component(kind, prefix, [prefix, *others], network, tensors, sd.preset)


def read_component(kind: str, prefix: str, starts: list[str], network: nn.Module,
                   tensors: Tensors, preset: Preset) -> Component:
    """Where nothing is found, `start` is the official prefix and `found` is empty."""
    held = [start for start in starts
            if any(name.startswith(start) and not is_buffer(name) for name in tensors)]
    start = held[0] if held else prefix
    found = {name: tensor for name, tensor in tensors.items()
             if name.startswith(start) and not is_buffer(name)}
    state = network.state_dict()
    if start in OPENCLIP and isinstance(getattr(network, "config", None), CLIPTextConfig):
        wanted = {start + name: tensor for name, tensor in to_openclip(state).items()}
        ours = from_openclip({name.removeprefix(start): tensor for name, tensor in found.items()})
        ours = {prefix + name: tensor for name, tensor in ours.items() if name in state}
        return Component(kind, prefix, start, {}, wanted, found, ours)
    if start.endswith("/"):
        names = {prefix + name: diffusers_name(prefix + name, preset) for name in state}
    else:
        names = {prefix + name: start + name for name in state}
    wanted = {names[prefix + name]: tensor for name, tensor in state.items()}
    ours = {name: found[theirs] for name, theirs in names.items() if theirs in found}
    return Component(kind, prefix, start, names, wanted, found, ours)


def is_buffer(name: str) -> bool:
    return bool(BUFFERS.match(name) or BUFFERS.match(name.partition("/")[2]))


# --- text layers that the model does not use ---

def without_missing_layers(tensors: Tensors, preset: Preset) -> Preset:
    """SD 2.x uses the layer before the last: the last one and the projection may be missing."""
    smaller = drop_unused_layers(preset)
    if smaller == preset:
        return preset
    whole, needed = (text_encoder_in(tensors, one) for one in (preset, smaller))
    unused = [name for name in whole.wanted if name not in needed.wanted]
    return smaller if any(name not in whole.found for name in unused) else preset


def text_encoder_in(tensors: Tensors, preset: Preset) -> Component:
    """The only text encoder of a preset."""
    cfg = preset.text_encoders[0]
    with building():
        network = make_network(cfg)
    starts = [cfg.prefix, "text_encoder/", *CLIP[:2], *OPENCLIP[:2]]
    return read_component("text encoder", cfg.prefix, starts, network, tensors, preset)


def names_of_whole_encoders(preset: Preset) -> list[str]:
    """In the checkpoint, of the layers that `drop_unused_layers` leaves out. A folder may have
    them all the same."""
    cfg = preset.text_encoders[0]
    if len(preset.text_encoders) > 1 or not getattr(cfg, "openclip", False):
        return []
    whole = replace(cfg, num_hidden_layers=cfg.num_hidden_layers + 1, projection=True)
    with building():
        state = make_network(whole).state_dict()
    plain = [start + name for start in CLIP[:2] for name in state]
    folder = [diffusers_name(cfg.prefix + name, preset) for name in state]
    return plain + folder + [start + name for start in OPENCLIP[:2] for name in to_openclip(state)]


def unused_and_missing(part: Component, sd: StableDiffusion) -> Tensors:
    """Zeros for what SDXL never uses of its first text encoder: its last layer and the norm.

    They keep their place, because diffusers counts the layers from the last one.
    """
    cfg = sd.preset.text_encoders[0]
    first_of_two = len(sd.text_encoders) > 1 and part.prefix == cfg.prefix
    is_clip = isinstance(cfg, CLIPTextConfig)
    if not (first_of_two and is_clip and part.found) or cfg.final_norm:
        return {}
    zeros = {}
    for name, theirs in part.names.items():
        layer = re.search(r"encoder\.layers\.(\d+)\.", name)
        unused = "final_layer_norm" in name
        if layer:
            unused = int(layer[1]) >= cfg.num_hidden_layers - cfg.clip_skip
        if unused and theirs not in part.found:
            shape = part.wanted[theirs].shape
            zeros[name] = LazyTensor(shape, partial(torch.zeros, shape))
    return zeros


# --- what does not fit ---

def what_fills(missing: list[Component]) -> str:
    """The options that give what a checkpoint lacks."""
    if [part.prefix for part in missing] == [VAE]:
        return "give one with --vae FILE"
    if [part.prefix for part in missing] == [UNET]:
        return "give one with --unet FILE"
    return "give a whole model of the same kind as --ckpt, and this one as --unet"


def check_component(path: Path | str, part: Component, may_be_missing: set[str]) -> None:
    """Raises UserError that says which network does not fit."""
    wanted = {name: tensor for name, tensor in part.wanted.items() if name not in may_be_missing}
    if all(name in part.found and as_matrix(part.found[name].shape) == as_matrix(tensor.shape)
           for name, tensor in wanted.items()):
        return
    try:
        check_names_and_shapes(part.found, wanted)
    except UserError as error:
        raise UserError(f"{path}: its {part.kind} is damaged or of a kind that is not known: "
                        f"{error}") from error


def as_matrix(shape: torch.Size) -> torch.Size:
    """A 1x1 convolution may be stored as a matrix."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def check_surplus(path: Path | str, surplus: list[str], known: dict[str, object]) -> None:
    """Warns of tensors that no network uses. Raises UserError for those that change the model."""
    if not surplus:
        return
    for pattern, what in CHANGES_MODEL:
        for name in surplus:
            if re.search(pattern, name):
                raise UserError(f"{path} holds {name}: {what}")
    kinds = {re.sub(r"\d+", "#", name) for name in known}
    larger = [name for name in surplus if re.sub(r"\d+", "#", name) in kinds]
    if larger:
        raise UserError(f"{path} has more layers than the models that are known: {short(larger)}. "
                        "Give its diffusers folder, whose config describes it")
    tensors = "tensor" if len(surplus) == 1 else "tensors"
    warnings.warn(f"{path}: ignored {len(surplus)} {tensors} that no network uses: "
                  f"{short(surplus)}")


def short(names: list[str]) -> str:
    """At most five names; of more, the beginnings."""
    if len(names) <= 5:
        return ", ".join(names)
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(".".join(re.split(r"[./]", name)[:2]), []).append(name)
    said = [f"{start}... ({len(group)})" if len(group) > 1 else group[0]
            for start, group in groups.items()]
    return ", ".join(said[:5]) + (", ..." if len(said) > 5 else "")
