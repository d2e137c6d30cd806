"""LoRA: a fine-tune as a small file (Hu et al. 2021, section 4.1).

Beside the weight W of a layer stands the product of two thin matrices:
W + scale * alpha / rank * up @ down. A file names the layers as kohya's tools do
(`lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight` and `.alpha`; for SDXL also
`lora_unet_input_blocks_...`), or as diffusers and peft do
(`unet.down_blocks.0...attn1.to_q.lora_A.weight`). With underscores instead of dots, and by
PREFIX_RULES, both become the names in `layers`.
"""
import json
import re
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from clip import CLIPTextModel
from extras.diffusers_names import diffusers_name
from extras.files import Tensors, atomic_write, open_tensors, read_json, save_tensors
from model import UNetModel
from sd import StableDiffusion, UserError

# layer, which of its tensors
TENSOR = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|A|B)\.weight|\.(alpha))$")
PREFIX_RULES = [
    (r"^lora_(?=unet_)|^base_model_model_|^diffusion_model_", ""),
    (r"^lora_te1?_", "text_encoder_"),
    (r"^lora_te2_", "text_encoder_2_"),
    (r"^(?=(text_model_)?encoder_)", "text_encoder_"),
    (r"^(?!unet_|text_)", "unet_"),
    (r"^(text_encoder_(2_)?)(?=encoder_)", r"\1text_model_"),
]
PEFT_ROLES = {"A": "down", "B": "up"}
NOT_PLAIN = re.compile(r"(use_rslora|use_dora|alpha_pattern)$")  # settings of other kinds of LoRA
# what `LoRA` trains: attention
TRAINED = re.compile(r"(unet_(down|mid|up)_|text_encoder_).*_"
                     r"(to_q|to_k|to_v|to_out_0|[qkv]_proj|out_proj)$")


def layers(sd: StableDiffusion) -> dict[str, nn.Module]:
    """The linear layers and convolutions of the UNet and the text encoders, by name.

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
            if not isinstance(layer, (nn.Linear, nn.Conv2d)):
                continue
            found[re.sub(r"[./]", "_", diffusers_name(prefix + name, sd.preset))] = layer
            if network is sd.unet:
                found["unet_" + name.replace(".", "_")] = layer
    return found


# --- apply ---

@torch.no_grad()
def apply_lora(sd: StableDiffusion, path: str | Path, scale: float = 1.0) -> None:
    """Adds a LoRA to the model's weights, computed in fp32. With -scale it is taken out again, up
    to rounding.

    Raises UserError if the file cannot be read, is no plain LoRA, or belongs to another family of
    models. Then the model is not changed.
    """
    found, changes = layers(sd), []
    for name, (down, up, alpha) in open_lora(Path(path)).items():
        theirs = (up.shape[0], down[0].numel())
        ours = None
        if name in found:
            ours = (found[name].weight.shape[0], found[name].weight[0].numel())
        if theirs != ours or up.shape[1] != down.shape[0]:
            here = "not" if ours is None else f"{ours[0]}x{ours[1]}"
            raise UserError(f"{path} is for another family of models: {name} is "
                            f"{theirs[0]}x{theirs[1]} there and {here} here")
        changes.append((found[name], down, up, scale * alpha / len(down)))
    for layer, down, up, factor in changes:
        device = layer.weight.device
        down, up = (matrix.flatten(1).to(device, torch.float32) for matrix in (down, up))
        weight = layer.weight.float() + factor * (up @ down).view(layer.weight.shape)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def open_lora(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """For each layer: down (rank, in, ...), up (out, rank, ...), alpha.

    `path` is a file, or a folder that peft wrote. Raises UserError as `apply_lora` does.
    """
    about = read_json(path / "adapter_config.json") if path.is_dir() else {}
    file = path / "adapter_model.safetensors" if path.is_dir() else path
    tensors, metadata = open_tensors(file)
    try:
        about |= json.loads(metadata.get("lora_adapter_metadata", "{}"))  # diffusers writes it
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for key, value in about.items():
        if NOT_PLAIN.search(key) and value:
            raise UserError(f"{path} is no plain LoRA: {key} is {value}")
    parts = tensors_of_layers(path, tensors)
    if not parts:
        raise UserError(f"{path} holds no tensors")
    found = {}
    for layer, part in parts.items():
        if "down" not in part or "up" not in part:
            raise UserError(f"{path} is damaged: of {layer} it holds only {', '.join(part)}")
        found[layer] = part["down"], part["up"], alpha_of(layer, part, about)
    return found


def tensors_of_layers(path: Path, tensors: Tensors) -> dict[str, dict[str, Tensor]]:
    """Layer, as in `layers` -> its tensors "down", "up" and perhaps "alpha"."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        # diffusers' first files have a processor, and to_out without an index
        modern = name.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora")
        match = TENSOR.match(modern)
        if match is None:
            raise UserError(f"{path} is no plain LoRA: it holds {name}")
        layer, role = match[1].replace(".", "_"), match[2] or match[3]
        for pattern, replacement in PREFIX_RULES:
            layer = re.sub(pattern, replacement, layer)
        parts.setdefault(layer, {})[PEFT_ROLES.get(role, role)] = tensor.read()
    return parts


def alpha_of(layer: str, part: dict[str, Tensor], about: dict) -> float:
    """A layer's own alpha, else that of its network, else that of the file, else the rank."""
    if "alpha" in part:
        return float(part["alpha"])
    component = re.match("unet|text_encoder(_2)?|", layer)[0]
    for key in f"{component}.lora_alpha", "lora_alpha":
        if key in about:
            return float(about[key])
    return float(len(part["down"]))


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
