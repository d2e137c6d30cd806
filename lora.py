"""What is put on top of a model: LoRA and words learned by textual inversion.

LoRA is a fine-tune as a small file, one product of two thin matrices beside each of some layers: W + scale * alpha / rank * up @ down.
Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language Models", section 4.1. A file names the layers as kohya's tools do
(`lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight` and `.alpha`; for SDXL also `lora_unet_input_blocks_...`), or as diffusers and peft
do (`unet.down_blocks.0...attn1.to_q.lora_A.weight`). With underscores for dots, and a few beginnings changed, both come to the names in `layers`.
"""
import json
import re
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from checkpoint import UserError, diffusers_name, open_tensors, read_json, save_tensors, whole

if TYPE_CHECKING:
    from sd import StableDiffusion

PART = re.compile(r"(.+?)(?:[._]lora(?:_linear_layer)?[._](down|up|A|B)\.weight|\.(alpha))$")  # layer, which of its tensors
BEGINNINGS = [(r"^lora_(?=unet_)|^base_model_model_|^diffusion_model_", ""), (r"^lora_te1?_", "text_encoder_"), (r"^lora_te2_", "text_encoder_2_"),
              (r"^(?=(text_model_)?encoder_)", "text_encoder_"), (r"^(?!unet_|text_)", "unet_"), (r"^(text_encoder_(2_)?)(?=encoder_)", r"\1text_model_")]
ADAPTED = re.compile(r"(unet_(down|mid|up)_|text_encoder_).*_(to_q|to_k|to_v|to_out_0|[qkv]_proj|out_proj)$")  # what `LoRA` trains: attention


def layers(sd: "StableDiffusion") -> dict[str, nn.Module]:
    """The linear layers and convolutions of UNet and text encoders by diffusers' name, such as "unet_down_blocks_0_attentions_0_proj_in";
    the UNet's by their official one too."""
    found = {}
    for prefix, part in sd.parts.items():
        for name, layer in part.named_modules() if part is not sd.vae else []:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                found[re.sub(r"[./]", "_", diffusers_name(prefix + name, sd.config))] = layer
                if part is sd.unet:
                    found["unet_" + name.replace(".", "_")] = layer
    return found


@torch.no_grad()
def apply_lora(sd: "StableDiffusion", path: str | Path, scale: float = 1.0) -> None:
    """Add a LoRA to the model's weights, computed in fp32. The same with -scale takes it out again, to rounding.

    Raises UserError if the file cannot be read, is no plain LoRA, or is for another family of models; the model then stays as it was.
    """
    found, added = layers(sd), []
    for name, (down, up, alpha) in open_lora(Path(path)).items():
        weight = found[name].weight if name in found else torch.empty(1, 0)
        if (up.shape[0], down[0].numel(), up.shape[1]) != (weight.shape[0], weight[0].numel(), down.shape[0]):
            here = f"{weight.shape[0]}x{weight[0].numel()}" if name in found else "not"
            raise UserError(f"{path} is for another family of models: {name} is {up.shape[0]}x{down[0].numel()} there and {here} here")
        added.append((found[name], down, up, scale * alpha / len(down)))
    for layer, down, up, factor in added:
        down, up = (matrix.flatten(1).to(layer.weight.device, torch.float32) for matrix in (down, up))
        weight = layer.weight.float() + factor * (up @ down).view(layer.weight.shape)
        layer.weight = nn.Parameter(weight.to(layer.weight.dtype), requires_grad=False)


def open_lora(path: Path) -> dict[str, tuple[Tensor, Tensor, float]]:
    """Of each layer: down (rank, in, ...), up (out, rank, ...), alpha. `path` is a file, or a folder written by peft."""
    about = read_json(path / "adapter_config.json") if path.is_dir() else {}
    tensors, metadata = open_tensors(path / "adapter_model.safetensors" if path.is_dir() else path)
    try:
        about |= json.loads(metadata.get("lora_adapter_metadata", "{}"))  # where diffusers says it
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    if special := [key for key, value in about.items() if re.search("(use_rslora|use_dora|alpha_pattern)$", key) and value]:
        raise UserError(f"{path} is no plain LoRA: {special[0]} is {about[special[0]]}")
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = PART.match(name.replace(".processor.", ".").replace("to_out_lora", "to_out.0_lora"))  # as in diffusers' first files
        if match is None:
            raise UserError(f"{path} is no plain LoRA: it holds {name}")
        layer, kind = match[1].replace(".", "_"), match[2] or match[3]
        for theirs, ours in BEGINNINGS:
            layer = re.sub(theirs, ours, layer)
        parts.setdefault(layer, {})[{"A": "down", "B": "up"}.get(kind, kind)] = tensor.read()
    for layer, part in parts.items():
        if not {"down", "up"} <= part.keys():
            raise UserError(f"{path} is damaged: of {layer} it holds only {', '.join(part)}")
        component = re.match("unet|text_encoder(_2)?|", layer)[0]
        part.setdefault("alpha", about.get(f"{component}.lora_alpha", about.get("lora_alpha", len(part["down"]))))
    if not parts:
        raise UserError(f"{path} holds no tensors")
    return {layer: (part["down"], part["up"], float(part["alpha"])) for layer, part in parts.items()}


def add_embedding(sd: "StableDiffusion", path: str | Path) -> list[str]:
    """Words learned by textual inversion (Gal et al. 2022): {word: vectors (N, D)}, or one that is called as the file is. Returns them.

    Raises UserError if the file cannot be read, is for another family of models, or takes a word for its own that the vocabulary has; the
    model then stays as it was.
    """
    path, learned = Path(path), []
    for name, tensor in open_tensors(path)[0].items():
        vectors = torch.atleast_2d(tensor.read().float())
        word = path.stem if name in ("*", "emb_params", "clip_l", "clip_g") else name  # as A1111 and for SDXL
        widths = [encoder.cfg.hidden_size for encoder in sd.encoders]
        if vectors.shape[1] not in widths:
            raise UserError(f"{path} is for another family of models: its vectors are {vectors.shape[1]} wide, here {' and '.join(map(str, widths))}")
        i = widths.index(vectors.shape[1])
        if word in sd.tokenizers[i].bpe.get_vocab() or (i, word) in [one[:2] for one in learned]:
            raise UserError(f"{path}: {word!r} is in the vocabulary already: rename it")
        learned.append((i, word, vectors))
    served = {i for i, _, _ in learned}
    if len(served) < len(sd.encoders):
        raise UserError(f"{path} is for another family of models: it has vectors for {len(served)} of {len(sd.encoders)} text encoders")
    for i, word, vectors in learned:
        sd.tokenizers[i].add_word(word, sd.encoders[i].embeddings.learn(vectors))
    return [word for _, word, _ in learned]


class LoRA(nn.Module):
    """Trainable matrices beside the UNet's attention layers, and with `text` those of the text encoders: from then on the model answers with them.
    `up` starts at zero, so that nothing changes at first. `save` writes them in kohya's names."""

    def __init__(self, sd: "StableDiffusion", rank: int, alpha: float | None = None, text: bool = False):
        super().__init__()
        self.factor, self.layers = (1.0 if alpha is None else alpha / rank), nn.ModuleDict()
        for name, layer in layers(sd).items():
            if ADAPTED.match(name) and (text or name.startswith("unet_")):
                pair = nn.ModuleDict({"lora_down": nn.Linear(layer.in_features, rank, bias=False), "lora_up": nn.Linear(rank, layer.out_features, bias=False)})
                nn.init.zeros_(pair["lora_up"].weight)
                self.layers[kohya_name(name, sd.config.text_2 is not None)] = pair.to(layer.weight.device)
                layer.register_forward_hook(partial(self.add, pair))

    def add(self, pair: nn.ModuleDict, layer: nn.Module, inputs: tuple[Tensor], output: Tensor) -> Tensor:
        x = inputs[0].to(pair["lora_down"].weight.dtype)
        return output + (self.factor * pair["lora_up"](pair["lora_down"](x))).to(output.dtype)

    def save(self, path: str | Path, dtype: torch.dtype = torch.float16) -> None:
        """Raises UserError if it cannot be written."""
        tensors = {name.removeprefix("layers."): tensor for name, tensor in self.state_dict().items()}
        for name, pair in self.layers.items():
            tensors[f"{name}.alpha"] = torch.tensor(self.factor * pair["lora_down"].out_features)
        with whole(Path(path)) as temporary:
            save_tensors(tensors, temporary, dtype, {})


def kohya_name(name: str, two_encoders: bool) -> str:
    """`lora_unet_...`, `lora_te_...`; of a model with two text encoders `lora_te1_...` and `lora_te2_...`."""
    name = re.sub(r"^text_encoder_2_", "te2_", name)
    return "lora_" + re.sub(r"^text_encoder_", "te1_" if two_encoders else "te_", name)
