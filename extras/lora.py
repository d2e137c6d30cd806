"""LoRA: a fine-tune as a small file (Hu et al. 2021, section 4.1).

Beside the weight W of a layer stands the product of two thin matrices:
W + scale * alpha / rank * up @ down. lora_names.py knows how files name the layers, lycoris.py what
other kinds of such files (LoHa, LoKr, DoRA and more) do to a weight.
"""
import json
import re
import warnings
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from clip import CLIPTextModel
from extras.checks import shown
from extras.diffusers_names import diffusers_name
from extras.files import Tensors, atomic_write, open_tensors, read_json, save_tensors
from extras.lora_names import Sorted, other_family, sort_tensors
from extras.lycoris import BIASES, changed_weight, factor, kind_of, whole_lokr
from extras.textual_inversion import add_words
from model import UNetModel
from sd import StableDiffusion, UserError

# settings of peft that change what its tensors mean, and their values that do not
NOT_KNOWN = {"use_qalora": (False, None), "layer_replication": (None,), "fan_in_fan_out": (False,),
             "peft_type": ("LORA", "LOHA", "LOKR", None), "bias": ("none", None),
             "modules_to_save": (None, [])}
OTHER_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")    # they change the model as well
# what `LoRA` trains: attention
TRAINED = re.compile(r"(unet_(down|mid|up)_|text_encoder_).*_"
                     r"(to_q|to_k|to_v|to_out_0|[qkv]_proj|out_proj)$")


# --- the layers of a model ---

def layers(sd: StableDiffusion) -> dict[str, nn.Module]:
    """The linear layers, convolutions and norms of the UNet and the text encoders, by name.

    A name is diffusers', such as "unet_down_blocks_0_attentions_0_proj_in". The UNet's layers
    have their official name too. Raises UserError if the UNet is not model.py's.
    """
    if not isinstance(sd.unet, UNetModel):
        raise UserError(f"LoRA needs the UNet of model.py, and this model has "
                        f"{type(sd.unet).__name__}: leave LoRA out")
    found = {}
    for prefix, network in sd.components.items():
        if not isinstance(network, (UNetModel, CLIPTextModel)):
            continue
        for name, layer in network.named_modules():
            if not isinstance(layer, (nn.Linear, nn.Conv2d, nn.GroupNorm, nn.LayerNorm)):
                continue
            found[re.sub(r"[./]", "_", diffusers_name(prefix + name, sd.preset))] = layer
            if network is sd.unet:
                found["unet_" + name.replace(".", "_")] = layer
    return found


class Projection(NamedTuple):
    """A text encoder's `text_projection`, which is used as x @ p, as if it were a linear layer."""
    encoder: CLIPTextModel

    @property
    def weight(self) -> Tensor:
        return self.encoder.text_projection.T

    @property
    def bias(self) -> None:
        return None


def targets(sd: StableDiffusion) -> dict[str, nn.Module | Projection]:
    """All that a file can change, by name: the layers and the text encoders' projections."""
    found = layers(sd)
    for i, encoder in enumerate(sd.text_encoders):
        if hasattr(encoder, "text_projection"):
            name = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
            found[f"{name}_text_projection"] = Projection(encoder)
    return found


# --- apply ---

class Change(NamedTuple):
    """What a file has for one layer."""
    tensors: Tensors        # role, as in lycoris.py -> tensor
    alpha: float | None     # None: the rank
    rslora: bool            # divide it by the square root of the rank


@torch.no_grad()
def apply_lora(sd: StableDiffusion, path: str | Path, scale: float = 1.0,
               text_scale: float | None = None) -> None:
    """Adds a LoRA to the model's weights, computed in fp32. With -scale it is taken out again, up
    to rounding (but for DoRA, which is no sum).

    `text_scale` is the text encoders' scale, if it is another. Warns of layers that the model does
    not have. Learned words in the file are added too.
    Raises UserError if the file cannot be read, is of no known kind, or fits nowhere in this
    model. Then the model is not changed.
    """
    path = Path(path)
    changes, words = open_file(path)
    found, fitting, misfits = targets(sd), {}, []
    for name, change in changes.items():
        reason = why_not(found.get(name), name, change)
        if reason is None:
            fitting[name] = read_all(path, name, change.tensors)
        else:
            misfits.append((name, reason))
    check_family(path, list(fitting), misfits)
    add_bundled(sd, path, words)
    scales = dict.fromkeys(fitting, scale)
    if text_scale is not None:
        scales |= {name: text_scale for name in fitting if name.startswith("text_")}
    changed = [apply_change(found[name], roles, changes[name], scales[name])
               for name, roles in fitting.items()]
    if any(scales.values()) and not any(changed):
        warnings.warn(f"{path.name} changes nothing: its numbers are 0, or too small beside the "
                      f"model's in {sd.dtype}", stacklevel=2)
    if misfits:
        name, reason = misfits[0]
        warnings.warn(f"{path.name}: {len(misfits)} of {len(changes)} layers do not fit this model "
                      f"and are left out; the first is {name}: {reason}", stacklevel=2)


def add_bundled(sd: StableDiffusion, path: Path, words: dict[str, Tensors]) -> None:
    """Adds the learned words of a LoRA's file. Says which, and which do not fit."""
    for word, vectors in words.items():
        try:
            add_words(sd, path, [(word, key, tensor) for key, tensor in vectors.items()])
            warnings.warn(f"{path.name} brings the learned word {word!r}", stacklevel=3)
        except UserError as error:
            warnings.warn(f"the learned word {word!r} is left out: {error}", stacklevel=3)


def why_not(layer: nn.Module | Projection | None, name: str, change: Change) -> str | None:
    """Why a change does not fit a layer. Only shapes are looked at, no tensors are read."""
    if layer is None:
        return f"it is {size_of(change.tensors)}there and not here"
    kind_of(change.tensors)
    if BIASES & change.tensors.keys() and layer.bias is None:
        return "it has no bias here"
    weight = torch.empty(layer.weight.shape, device="meta")
    most = 16 * weight.numel() + 2**16      # no sensible rank is larger
    if any(tensor.shape.numel() > most for tensor in change.tensors.values()):
        return "it is far larger than the layer"
    roles = {role: torch.empty(tensor.shape, device="meta")
             for role, tensor in change.tensors.items()}
    if "on_input" in roles:
        roles["on_input"] = change.tensors["on_input"].read()
    try:
        changed_weight(roles, weight, change.alpha, change.rslora, 1.0)
    except UserError as error:
        theirs, ours = size_of(change.tensors), f"{len(weight)}x{weight[0].numel()} "
        if theirs == ours:
            return f"its {', '.join(sorted(roles))} do not fit together: {error}"
        return f"it is {theirs or 'of another shape '}there and {ours}here"
    biases = [roles[role] for role in BIASES & roles.keys()]
    if any(bias.numel() != layer.bias.numel() for bias in biases):
        return "its bias has another length"
    return None


def size_of(tensors: Tensors) -> str:
    """ "320x768 ", out and in, where that can be seen."""
    down, up = (tensors[role].shape if role in tensors else () for role in ("down", "up"))
    if len(down) < 2 or len(up) < 2 or 0 in down:
        return ""
    return f"{up[0]}x{down[1:].numel()} "


def check_family(path: Path, fitting: list[str], misfits: list[tuple[str, str]]) -> None:
    """Raises UserError if nothing fits, or none of the layers that read the text."""
    def reads_text(name: str) -> bool:
        return name.endswith(("_attn2_to_k", "_attn2_to_v"))

    texts = [name for name, _ in misfits if reads_text(name)]
    if not misfits or (fitting and (len(texts) < 2 or any(map(reads_text, fitting)))):
        return
    family = other_family([name for name, _ in misfits])
    if family is not None:
        raise UserError(f"{path} is for another family of models: it looks like {family}")
    name, reason = next(pair for pair in misfits if not texts or reads_text(pair[0]))
    raise UserError(f"{path} is for another family of models: {name}: {reason}")


def read_all(path: Path, name: str, tensors: Tensors) -> dict[str, Tensor]:
    """The tensors of a layer in fp32. Raises UserError for NaN and infinity."""
    roles = {}
    for role, tensor in tensors.items():
        found = tensor.read()
        if not found.is_floating_point() and role not in ("alpha", "on_input"):
            kind = str(found.dtype).removeprefix("torch.")
            raise UserError(f"{path} holds {name}, {role} in numbers of the type {kind}, perhaps "
                            "quantized, which is not supported: give it in fp16, bf16 or fp32")
        roles[role] = found.float()
        if not roles[role].isfinite().all():
            raise UserError(f"{path} is damaged: there is NaN or infinity in {name}, {role}: "
                            "download it again or ask for another")
    return roles


def apply_change(layer: nn.Module | Projection, roles: dict[str, Tensor], change: Change,
                 scale: float) -> bool:
    """Returns whether the layer is another then."""
    old = layer.weight
    roles = {role: tensor.to(old.device) for role, tensor in roles.items()}
    weight = changed_weight(roles, old, change.alpha, change.rslora, scale).to(old.dtype)
    if isinstance(layer, Projection):
        layer.encoder.text_projection = nn.Parameter(weight.T.contiguous(), requires_grad=False)
    else:
        layer.weight = nn.Parameter(weight, requires_grad=False)
    for role in BIASES & roles.keys():
        bias = changed_bias(role, roles, layer.bias.float(), change, scale)
        layer.bias = nn.Parameter(bias.to(layer.bias.dtype), requires_grad=False)
    return bool(BIASES & roles.keys()) or not torch.equal(weight, old)


def changed_bias(role: str, roles: dict[str, Tensor], bias: Tensor, change: Change,
                 scale: float) -> Tensor:
    if role == "bias_up":   # it stands behind `up`, so it is scaled as that is
        scale = scale * factor(change.alpha, len(roles["down"]), change.rslora)
    return bias + scale * roles[role].reshape(bias.shape)


# --- read ---

def open_lora(path: Path) -> dict[str, Change]:
    """What a file has for each layer, none of it read yet.

    `path` is a file, or a folder that peft wrote. Raises UserError as `apply_lora` does.
    """
    return open_file(path)[0]


def open_file(path: Path) -> tuple[dict[str, Change], dict[str, Tensors]]:
    """`open_lora`, and the learned words in the file."""
    about = read_json(path / "adapter_config.json") if path.is_dir() else {}
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, metadata = open_tensors(file)
    try:
        about |= dict(json.loads(metadata.get("lora_adapter_metadata", "{}")))  # diffusers'
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error
    check_settings(path, about)
    if not tensors:
        raise UserError(f"{path} holds no tensors")
    found = sort_tensors(tensors)
    check_known(path, found)
    parts = {}
    for layer, part in found.layers.items():
        try:
            kind_of(part)
        except UserError as error:
            if part.keys() == {"alpha"}:    # which changes nothing
                continue
            raise UserError(f"{path} is damaged: of {layer}: {error}") from error
        parts[layer] = Change(part, alpha_of(path, layer, part, about, metadata),
                              setting(about, layer, "use_rslora") is True)
    return parts, found.words


def check_known(path: Path, found: Sorted) -> None:
    """Raises UserError for tensors of no known kind: without them the picture would be another."""
    if found.twice:
        raise UserError(f"{path} holds {found.twice[0]} twice, under two names: ask for it in the "
                        "names of one program")
    if not found.unknown:
        return
    first, more = found.unknown[0], len(found.unknown) - 1
    if not found.layers:
        hint = ": a whole model is given as --ckpt" if len(found.unknown) > 400 else ""
        raise UserError(f"{path} is no LoRA: it holds {first}{hint}")
    raise UserError(f"{path} holds {first}{f' and {more} more' if more else ''}, no LoRA, LoHa, "
                    "LoKr, DoRA, IA3 or difference of weights: ask for it in one of these")


def check_settings(path: Path, about: dict) -> None:
    """Raises UserError for settings of peft by which its tensors mean something else."""
    for key, value in about.items():
        name = key.rpartition(".")[2]
        if name == "init_lora_weights" and str(value).lower().startswith(OTHER_BASE):
            raise UserError(f"{path} goes with a changed base model: {key[:80]} is {shown(value)}: "
                            "save it with peft's path_initial_model_for_weight_conversion")
        if name in NOT_KNOWN and value not in NOT_KNOWN[name]:
            raise UserError(f"{path} is no LoRA that can be read here: {key[:80]} is "
                            f"{shown(value)}")


def setting(about: dict, layer: str, name: str) -> object:
    """A setting of peft: of the layer's network, as diffusers writes it, else of the file."""
    component = re.match("unet|text_encoder(_2)?|", layer)[0]
    return about.get(f"{component}.{name}", about.get(name))


def alpha_of(path: Path, layer: str, part: Tensors, about: dict,
             metadata: dict[str, str]) -> float | None:
    """A layer's own alpha, else that of its network or file, else None: the rank.

    Raises UserError if it is no number.
    """
    if whole_lokr(part.keys()):
        return None if "alpha" in part else scale_of_peft(path, layer, about)
    if "alpha" in part:
        return one_number(path, layer, part["alpha"])
    found = setting(about, layer, "lora_alpha")
    if found is None:
        found = about.get("alpha")      # peft's LoHa and LoKr
    found = by_pattern(path, layer, about, "alpha_pattern", found)
    if found is None:
        try:
            return float(metadata["ss_network_alpha"])  # kohya's: it also writes "None"
        except (KeyError, ValueError):
            return None
    return number(path, "alpha", found)


def scale_of_peft(path: Path, layer: str, about: dict) -> float | None:
    """alpha / rank, by which peft also scales a LoKr without a rank; LyCORIS does not."""
    alpha, rank = (by_pattern(path, layer, about, f"{name}_pattern", setting(about, layer, key))
                   for name, key in (("alpha", "alpha"), ("rank", "r")))
    if alpha is None or rank is None:
        return None
    return number(path, "alpha", alpha) / max(1.0, number(path, "r", rank))


def by_pattern(path: Path, layer: str, about: dict, name: str, usual: object) -> object:
    """A setting of peft for a layer, where `name` lists layers with values of their own.

    Raises UserError for patterns that are no plain names.
    """
    patterns, found = setting(about, layer, name), usual
    for key, value in (patterns if isinstance(patterns, dict) else {}).items():
        if not re.fullmatch(r"[\w.]+", key):
            raise UserError(f"{path}: {key!r} in {name} is no plain name of a layer")
        if f"_{layer}".endswith("_" + key.replace(".", "_")):
            found = value
    return found


def one_number(path: Path, layer: str, tensor) -> float:
    """The number in a tensor of any shape, if all in it are equal."""
    if not 1 <= tensor.shape.numel() <= 2**16:
        raise UserError(f"{path} is damaged: the alpha of {layer} is no number")
    values = tensor.read().double().flatten()
    if not (values == values[0]).all() and values.isfinite().all():
        raise UserError(f"{path}: the alpha of {layer} is {len(values)} numbers, not one")
    return number(path, f"the alpha of {layer}", values[0].item())


def number(path: Path, name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or abs(value) > 1e6 \
            or value != value:
        raise UserError(f"{path} is damaged: {name} is {shown(value)}, no number that makes "
                        "sense")
    return float(value)


# --- train ---

class LoRA(nn.Module):
    """Trainable matrices beside the UNet's attention layers, and with `text` beside those of the
    text encoders. The model uses them from then on.

    `up` starts at zero, so that nothing changes at first.
    Raises UserError if the model has no such layers.
    """

    def __init__(self, sd: StableDiffusion, rank: int, alpha: float | None = None,
                 text: bool = False):
        super().__init__()
        self.factor = 1.0 if alpha is None else alpha / rank
        self.layers = nn.ModuleDict()
        two_encoders = len(sd.text_encoders) > 1
        prefixes = ["unet_"] + ["text_encoder_"] * text
        for name, layer in layers(sd).items():
            if not TRAINED.match(name) or not name.startswith(tuple(prefixes)):
                continue
            pair = nn.ModuleDict({
                "lora_down": nn.Linear(layer.in_features, rank, bias=False),
                "lora_up": nn.Linear(rank, layer.out_features, bias=False)})
            nn.init.zeros_(pair["lora_up"].weight)
            self.layers[kohya_name(name, two_encoders)] = pair.to(layer.weight.device)
            layer.register_forward_hook(partial(self.add, pair))
        for prefix in prefixes:
            start = kohya_name(prefix, two_encoders)
            if not any(name.startswith(start) for name in self.layers):
                raise UserError(f"LoRA found no attention layers in {prefix.rstrip('_')}: it needs "
                                "the layer names of model.py and clip.py")

    def add(self, pair: nn.ModuleDict, layer: nn.Module, inputs: tuple[Tensor],
            output: Tensor) -> Tensor:
        x = inputs[0].to(pair["lora_down"].weight.dtype)
        change = self.factor * pair["lora_up"](pair["lora_down"](x))
        return output + change.to(output.dtype)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Writes it under kohya's names. Raises UserError if it cannot be written."""
        tensors = {name.removeprefix("layers."): tensor
                   for name, tensor in self.state_dict().items()}
        for name, pair in self.layers.items():
            alpha = self.factor * pair["lora_down"].out_features
            tensors[f"{name}.alpha"] = torch.tensor(alpha)
        with atomic_write(Path(path)) as temporary:
            save_tensors(tensors, temporary, dtype, {})


def kohya_name(name: str, two_encoders: bool) -> str:
    """`lora_unet_...`, `lora_te_...`; with two text encoders `lora_te1_...`, `lora_te2_...`."""
    name = re.sub(r"^text_encoder_2_", "te2_", name)
    return "lora_" + re.sub(r"^text_encoder_", "te1_" if two_encoders else "te_", name)
