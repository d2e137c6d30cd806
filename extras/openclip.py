"""The names of OpenCLIP's text encoders, which single files of SD 2.x and SDXL hold.

clip.py names its modules as transformers does. OpenCLIP (github.com/mlfoundations/open_clip)
has other names, and keeps the weights of query, key and value in one tensor.
"""
import re

import torch
from torch import Tensor

from clip import CLIPTextModel
from extras.files import Tensors
from sd import LazyTensor, StableDiffusion

NAMES = [  # transformers, OpenCLIP
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
    ("encoder.layers.", "transformer.resblocks."),
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".self_attn.out_proj.", ".attn.out_proj."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    ("final_layer_norm.", "ln_final."),
]
QKV = re.compile(r"encoder\.layers\.(\d+)\.self_attn\.([qkv])_proj\.(weight|bias)")
IN_PROJ = re.compile(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)")


def to_openclip(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a CLIPTextModel under OpenCLIP's names."""
    renamed: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    for name, tensor in state.items():
        match = QKV.fullmatch(name)
        if match:
            layer, letter, kind = match.groups()
            name = f"transformer.resblocks.{layer}.attn.in_proj_{kind}"
            parts.setdefault(name, {})[letter] = tensor
            continue
        for ours, theirs in NAMES:
            name = name.replace(ours, theirs)
        renamed[name] = tensor
    for name, part in parts.items():
        renamed[name] = torch.cat([part["q"], part["k"], part["v"]])
    return renamed


def from_openclip(tensors: Tensors) -> Tensors:
    """The inverse: tensors under OpenCLIP's names -> under those of CLIPTextModel."""
    renamed = {}
    for name, tensor in tensors.items():
        match = IN_PROJ.fullmatch(name)
        if match:
            layer, kind = match.groups()
            for i, letter in enumerate("qkv"):
                renamed[f"encoder.layers.{layer}.self_attn.{letter}_proj.{kind}"] = third(tensor, i)
            continue
        for ours, theirs in NAMES:
            name = name.replace(theirs, ours)
        renamed[name] = tensor
    return renamed


def third(tensor: LazyTensor, i: int) -> LazyTensor:
    """Rows i/3 to (i + 1)/3."""
    shape = torch.Size([tensor.shape[0] // 3, *tensor.shape[1:]])
    return LazyTensor(shape, lambda: tensor.read().chunk(3)[i])


def with_prefix(prefix: str, state: dict) -> dict:
    return {prefix + name: tensor for name, tensor in state.items()}


def official_state_dict(sd: StableDiffusion) -> dict[str, Tensor]:
    """Every tensor of a model under the name that it has in official single files."""
    state = {}
    for prefix, network in sd.components.items():
        part = network.state_dict()
        if isinstance(network, CLIPTextModel) and network.config.openclip:
            part = to_openclip(part)
        state |= with_prefix(prefix, part)
    return state
