"""The weights that training starts from: a checkpoint, a row of PRESETS, or some of both."""
import json
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from extras.checks import checked_part
from extras.components import take_components
from extras.files import open_tensors
from extras.formats import open_checkpoint, open_model
from extras.prediction import settle_prediction
from extras.terminal import complain
from sd import (
    BUILTIN,
    PRESETS,
    LazyTensor,
    Preset,
    StableDiffusion,
    UserError,
    check_names_and_shapes,
    make_network,
    preset_from_dict,
    preset_to_dict,
)
from vae import VAEConfig

VAE_PREFIX = "first_stage_model."
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")


def load_with_new_weights(path: str, device: str, preset: str | None, seed: int) -> StableDiffusion:
    """A checkpoint in fp32 of which parts may be missing. "": the built-in model.

    A tensor that the file lacks, or has in another shape, keeps its random start value. Lines on
    stderr list these, and those of the file that the model has no use for.
    """
    opened = open_model(path or BUILTIN, preset, None, half=False)
    check_size(opened.path, opened.preset, opened.tensors)
    torch.manual_seed(seed)
    sd = StableDiffusion(opened.preset)
    sd.metadata = opened.metadata
    tensors = take_components(opened.path, opened.tensors, sd, strict=False)
    sd.load_weights(with_start_values(tensors, sd), device, torch.float32)
    settle_prediction(sd, opened.rows, opened.path)
    return sd


def check_size(path: Path, preset: Preset, tensors: dict[str, LazyTensor]) -> None:
    """Raises UserError for a model far larger than what the file holds of it: a config of a few
    bytes can ask for any size."""
    with torch.device("meta"):
        wanted = sum(tensor.numel() for tensor in StableDiffusion(preset).state_dict().values())
    held = sum(tensor.shape.numel() for tensor in tensors.values())
    if wanted > 100 * held + 10**8:
        raise UserError(f"{path} holds {held} numbers, and the model that its config describes has "
                        f"{wanted}: give another file")


def with_start_values(tensors: dict[str, LazyTensor], sd: StableDiffusion) -> dict[str, LazyTensor]:
    """The tensors that the model needs: from the file where it has them, else from the model."""
    needed, start = {}, sd.state_dict()
    for name, value in start.items():
        if name in tensors and as_matrix(tensors[name].shape) == as_matrix(value.shape):
            needed[name] = tensors[name]
        else:
            needed[name] = LazyTensor(value.shape, partial(start.get, name))
    new = [name for name in needed if needed[name] is not tensors.get(name)]
    if len(new) == len(start):
        raise UserError("--new-weights: the file has none of this model's weights")
    print_names("start from random weights", new)
    print_names("of the file are not used", [name for name in tensors if name not in start])
    return needed


def as_matrix(shape: torch.Size) -> torch.Size:
    """A 1x1 convolution may be stored as a matrix."""
    return shape[:2] if shape[2:] == (1, 1) else shape


def print_names(what: str, names: list[str], most: int = 10) -> None:
    if names:
        more = ", ..." if len(names) > most else ""
        complain(f"{len(names)} tensors {what}: {', '.join(names[:most])}{more}")


def random_model(row: str, device: str, seed: int, vae: str | None) -> StableDiffusion:
    """A row of PRESETS with random weights. `vae`: the file to take the VAE from, "" is the
    built-in model's, None for a random one. Raises UserError if that does not fit the UNet."""
    preset, network = deepcopy(PRESETS[row]), None
    if vae is not None:
        network = load_vae(vae, preset.vae)
        channels = getattr(preset.unet, "in_channels", network.config.z_channels)
        if channels != network.config.z_channels:
            raise UserError(f"the UNet of {row!r} takes {channels} latent channels, the VAE gives "
                            f"{network.config.z_channels}: give another --vae")
        preset = replace(preset, vae=network.config)
    torch.manual_seed(seed)
    sd = StableDiffusion(preset, vae=network)
    sd.device, sd.dtype = torch.device(device), torch.float32
    for network in sd.components.values():
        network.to(device).eval().requires_grad_(False)
    return sd


def load_vae(path: str, usual: VAEConfig) -> nn.Module:
    """The VAE of a checkpoint, whatever its other networks are, or of a file with a VAE alone.

    `usual`: the config of a file that does not say its own. Raises UserError.
    """
    path, config = Path(path or BUILTIN), usual
    tensors, metadata = open_tensors(path) if path.is_file() else ({}, {})
    if "config" in metadata:
        config = vae_config(path, metadata["config"])
    elif not path.is_file() or any(name.startswith("model.diffusion_model.") for name in tensors):
        tensors, preset, _ = open_checkpoint(path, None, None, torch.float32)
        config = preset.vae
    found = {name.removeprefix(VAE_PREFIX): tensor for name, tensor in tensors.items()
             if name.removeprefix(VAE_PREFIX).startswith(VAE_PARTS)}
    with torch.device("meta"):
        vae = make_network(config)
    check_names_and_shapes(found, vae.state_dict())
    state = {name: found[name].read().to(torch.float32).reshape(mine.shape)
             for name, mine in vae.state_dict().items()}
    vae.load_state_dict(state, assign=True)
    return vae


def vae_config(path: Path, stored: str):
    """The VAE's part of the config in a file's metadata."""
    try:
        plain = {"kind": "VAEConfig"} | json.loads(stored)["vae"]  # older files have no kind
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise UserError(f"{path}: the VAE's config in the metadata does not fit this program: "
                        f"{error!r}") from error
    return checked_part(f"{path}: the config in its metadata", "vae", plain)


def check_loadable(sd: StableDiffusion) -> None:
    """Raises UserError if what is trained could not be loaded again from its file."""
    try:
        stored = json.loads(json.dumps(preset_to_dict(sd.preset)))
        with torch.device("meta"):
            loaded = StableDiffusion(preset_from_dict(stored))
    except (KeyError, TypeError, ValueError) as error:
        raise UserError("the preset could not be read from the saved file: every config must be a "
                        f"dataclass in sd.NETWORKS, with fields that JSON holds: {error!r}") \
            from error
    wanted = {name: LazyTensor(tensor.shape, None) for name, tensor in sd.state_dict().items()}
    check_names_and_shapes(wanted, loaded.state_dict())
    for prefix, network in loaded.components.items():
        state = network.state_dict()
        for name, buffer in network.named_buffers():
            if name not in state:
                raise UserError(f"{prefix}{name} is in no file, so it has no value after loading: "
                                "compute it in forward, or register it with persistent=True")
        for name, tensor in state.items():
            if not tensor.is_floating_point():
                raise UserError(f"{prefix}{name} holds integers, which loading turns into "
                                f"fractions: compute it in forward")
