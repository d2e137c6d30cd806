"""The names in LoRA files: which layer a tensor belongs to, and what it is there.

kohya's tools write `lora_unet_down_blocks_0_..._attn1_to_q.lora_down.weight` and `.alpha`, for SDXL
also `lora_unet_input_blocks_...`; diffusers and peft
`unet.down_blocks.0...attn1.to_q.lora_A.weight`, perhaps with an adapter's name before `.weight`;
OneTrainer `unet.`, `clip_l.`, `clip_g.`;
ComfyUI `diffusion_model.` and `text_encoders.clip_l.transformer.`. With underscores instead of
dots, and by PREFIX_RULES, all become the names in `lora.layers`.
"""
import re
from typing import NamedTuple

from extras.files import Tensors
from extras.lycoris import ROLES

BUNDLED = "bundle_emb."     # learned words in the same file: bundle_emb.WORD.KEY
# behind the layer: what the tensor is; peft has an adapter's name in it
SUFFIX = re.compile(
    r"[._]lora(?:_linear_layer)?[._](?P<matrix>down|up|mid|A|B)(?:\.[^.]+)?\.(?P<kind>weight|bias)$"
    r"|\.lora_(?P<magnitude>magnitude_vector)(?:\.[^.]+)?(?:\.weight)?$"
    r"|\.(?P<other>(?:hada|lokr)_[a-z0-9_]+)(?:\.[^.]+)?$"
    r"|\.(?P<plain>alpha|dora_scale|diff|diff_b|w_norm|b_norm|on_input|weight)$")
PEFT_ROLES = {"A": "down", "B": "up", "magnitude_vector": "magnitude"}
PREFIX_RULES = [
    (r"base_model_model_", ""),
    (r"^(model_)?diffusion_model_", "unet_"),
    (r"^(lora|lycoris)_(?=unet_)", ""),
    (r"^(lora_|lycoris_)?te1?_|^(text_encoders_)?clip_[lh]_(transformer_)?|^text_encoder_1_",
     "text_encoder_"),
    (r"^(lora_|lycoris_)?te2_|^(text_encoders_)?clip_g_(transformer_)?", "text_encoder_2_"),
    (r"^(?=(text_model_)?encoder_)", "text_encoder_"),
    (r"^(?!unet_|text_)", "unet_"),
    (r"^(text_encoder_(2_)?)(?=encoder_|final_layer_norm)", r"\1text_model_"),
    # the first files of diffusers
    (r"^(text_encoder_.*_self_attn_)to_([qkv])$", r"\1\2_proj"),
    (r"^(text_encoder_.*_self_attn_)to_out(_0)?$", r"\1out_proj"),
    (r"_processor_", "_"),
    (r"_to_out$", "_to_out_0"),
]
# marks of other families in the names of layers
OTHERS = {"double_blocks": "Flux", "single_blocks": "Flux", "single_transformer_blocks": "Flux",
          "joint_blocks": "SD 3", "joint_transformer_blocks": "SD 3", "context_refiner": "Lumina",
          "cap_embedder": "Lumina", "caption_projection": "PixArt", "prior_unet": "Cascade",
          "temporal": "a video model"}


class Sorted(NamedTuple):
    layers: dict[str, Tensors]      # layer -> role -> tensor
    words: dict[str, Tensors]       # learned word -> key -> vectors
    unknown: list[str]              # names that are none of these
    twice: list[str]                # names of what another name has given already


def sort_tensors(tensors: Tensors) -> Sorted:
    """The tensors of a LoRA file by layer, as in `lora.layers`, and role, as in lycoris.py."""
    layers: dict[str, Tensors] = {}
    words: dict[str, Tensors] = {}
    unknown, twice = [], []
    for name, tensor in tensors.items():
        if name.startswith(BUNDLED):
            word, _, key = name.removeprefix(BUNDLED).removesuffix(".*").rpartition(".")
            words.setdefault(word, {})[key] = tensor
            continue
        found = split(name)
        if found is None or (found[1] == "weight" and f"{found[0]}.on_input" not in tensors):
            unknown.append(name)
        else:
            layer = layers.setdefault(layer_name(found[0]), {})
            if found[1] in layer:
                twice.append(name)
            layer[found[1]] = tensor
    return Sorted(layers, words, unknown, twice)


def split(name: str) -> tuple[str, str] | None:
    """A tensor's name -> its layer as the file has it, and its role; None if it is no LoRA's."""
    match = SUFFIX.search(name)
    if match is None or match.start() == 0:
        return None
    role = match["matrix"] or match["magnitude"] or match["other"] or match["plain"]
    role = PEFT_ROLES.get(role, role)
    if match["kind"] == "bias":
        role = f"bias_{role}"
    return (name[:match.start()], role) if role in ROLES else None


def layer_name(name: str) -> str:
    """The name of a layer in a file -> in `lora.layers`."""
    name = name.replace(".", "_")
    for pattern, replacement in PREFIX_RULES:
        name = re.sub(pattern, replacement, name)
    return name


def other_family(layers: list[str]) -> str | None:
    """The family that the names of layers belong to, if it is none of this project."""
    for mark, family in OTHERS.items():
        if any(mark in layer for layer in layers):
            return family
    return None
