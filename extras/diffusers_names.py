"""Names and layout of diffusers folders.

Inside the program every tensor has its name in official single files, such as
"model.diffusion_model.input_blocks.1.0.in_layers.2.weight". `diffusers_name` says where a folder
has it: "unet/down_blocks.0.resnets.0.conv1.weight".
"""
import re
from dataclasses import replace

from clip import CLIPTextConfig
from model import UNetConfig
from sd import Preset, StableDiffusion, UserError
from vae import VAEConfig

LDM_TO_DIFFUSERS = [  # first the UNet's, then the VAE's
    (r"^time_embed\.0", "time_embedding.linear_1"),
    (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^cond_proj", "time_embedding.cond_proj"),
    (r"^label_emb\.0\.0", "add_embedding.linear_1"),
    (r"^label_emb\.0\.2", "add_embedding.linear_2"),
    (r"^input_blocks\.0\.0", "conv_in"),
    (r"^out\.0", "conv_norm_out"),
    (r"^out\.2", "conv_out"),
    (r"^middle_block\.0", "mid_block.resnets.0"),
    (r"^middle_block\.1", "mid_block.attentions.0"),
    (r"^middle_block\.2", "mid_block.resnets.1"),
    (r"\bin_layers\.0", "norm1"),
    (r"\bin_layers\.2", "conv1"),
    (r"\bemb_layers\.1", "time_emb_proj"),
    (r"\bout_layers\.0", "norm2"),
    (r"\bout_layers\.3", "conv2"),
    (r"\bskip_connection", "conv_shortcut"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"),
    (r"\.mid\.block_2", ".mid_block.resnets.1"),
    (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.([qkv])\b", r".mid_block.attentions.0.to_\1"),
    (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
    (r"\.(down|up)\.(\d+)\.block", r".\1_blocks.\2.resnets"),
    (r"\.(down|up)\.(\d+)\.(down|up)sample\b", r".\1_blocks.\2.\3samplers.0"),
    (r"\.norm_out", ".conv_norm_out"),
    (r"\.nin_shortcut", ".conv_shortcut"),
]


def diffusers_name(name: str, preset: Preset) -> str:
    """Where a folder has a parameter or module.

    `name` is one of named_parameters() or named_modules() behind the prefix of its network in
    StableDiffusion.components.
    """
    prefixes = {"model.diffusion_model.": "unet", "first_stage_model.": "vae"}
    for i, encoder in enumerate(preset.text_encoders):
        prefixes[encoder.prefix] = "text_encoder" if i == 0 else f"text_encoder_{i + 1}"
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    component, name = prefixes[prefix], name.removeprefix(prefix)
    if name == "text_projection" and component.startswith("text"):
        return f"{component}/text_projection.weight"
    if component.startswith("text"):
        return f"{component}/text_model.{name}"
    for ours, theirs in LDM_TO_DIFFUSERS:
        name = re.sub(ours, theirs, name)
    if component == "unet":
        return f"unet/{unet_block(name, preset.unet)}"
    return f"vae/{vae_block(name, preset.vae)}"


def unet_block(name: str, cfg: UNetConfig) -> str:
    """input_blocks and output_blocks as levels: each has num_res_blocks + 1 of them, and conv_in
    stands before those on the way down."""
    def rename(match: re.Match) -> str:
        side, index, layer, resampler = match.groups()
        down = "down" if side == "input" else "up"
        level, j = divmod(int(index) - (side == "input"), cfg.num_res_blocks + 1)
        if resampler is not None:
            return f"{down}_blocks.{level}.{down}samplers.0.conv"
        kind = "resnets" if layer == "0" else "attentions"
        return f"{down}_blocks.{level}.{kind}.{j}"

    return re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)(\.(?:op|conv)\b)?", rename, name)


def vae_block(name: str, cfg: VAEConfig) -> str:
    """The decoder counts levels from full resolution; diffusers counts from where it starts."""
    def rename(match: re.Match) -> str:
        return f"decoder.up_blocks.{len(cfg.ch_mult) - 1 - int(match[1])}"

    return re.sub(r"^decoder\.up_blocks\.(\d+)", rename, name)


def drop_unused_layers(preset: Preset) -> Preset:
    """The model as folders hold it: without the layers after the one that is used.

    SD 2.x uses only the features of its penultimate layer, so its folders lack the last layer
    and the projection. SDXL's encoders are whole.
    """
    cfg = preset.text_encoders[0]
    only_features = len(preset.text_encoders) == 1 and isinstance(cfg, CLIPTextConfig)
    if not only_features or not cfg.final_norm:
        return preset
    layers = cfg.num_hidden_layers - cfg.clip_skip
    cfg = replace(cfg, num_hidden_layers=layers, clip_skip=0, projection=False)
    return replace(preset, text_encoders=(cfg,))


def names_in_folder(sd: StableDiffusion) -> dict[str, str]:
    """Every tensor's name in official single files (but for OpenCLIP's) -> in a folder."""
    names = {}
    for prefix, network in sd.components.items():
        for name in network.state_dict():
            names[prefix + name] = diffusers_name(prefix + name, sd.preset)
    return names


def check_diffusers_has(preset: Preset) -> None:
    """Raises UserError if the model has a network that diffusers' folders do not describe."""
    known = (UNetConfig, VAEConfig, CLIPTextConfig)
    for cfg in (preset.unet, preset.vae, *preset.text_encoders):
        if not isinstance(cfg, known):
            raise UserError(f"diffusers has no pipeline for this model, because of its "
                            f"{type(cfg).__name__}: use a .safetensors file")
