"""Writes diffusers folders, which diffusers' from_pretrained opens."""
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from clip import CLIPTextConfig, load_bpe
from extras.diffusers_folder import SCHEDULERS
from extras.diffusers_names import check_diffusers_has, drop_unused_layers, names_in_folder
from extras.files import atomic_write, save_tensors
from extras.memory import building
from sd import Preset, StableDiffusion, UserError


def save_folder(sd: StableDiffusion, path: Path, dtype: torch.dtype,
                metadata: Callable[[Preset], dict[str, str]]) -> None:
    """Writes a new diffusers folder. `metadata`, of the preset as it is saved, goes to the UNet's
    weights. Raises UserError if it cannot be written, or diffusers has no such model."""
    pipeline = pipeline_class(sd.preset)
    preset = drop_unused_layers(sd.preset)
    with building():
        smaller = StableDiffusion(preset)
    tensors = sd.state_dict()
    folder_tensors = {file_name: to_folder_layout(file_name, tensors[name])
                      for name, file_name in names_in_folder(smaller).items()}
    spacing = sd.resolve_options()["timestep_spacing"]
    with atomic_write(path) as temporary:
        for name, content in folder_files(preset, pipeline, spacing).items():
            if not isinstance(content, str):
                content = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(content, "utf-8")
        for component in dict.fromkeys(name.split("/")[0] for name in folder_tensors):
            part = {name.removeprefix(component + "/"): tensor
                    for name, tensor in folder_tensors.items() if name.startswith(component + "/")}
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            about = {"format": "pt"} | (metadata(preset) if component == "unet" else {})
            save_tensors(part, temporary / component / f"{stem}.safetensors", dtype, about)


def to_folder_layout(name: str, tensor: Tensor) -> Tensor:
    """A tensor as folders hold it: the projection transposed, the VAE's attention as matrices."""
    if name.endswith("text_projection.weight"):
        return tensor.T
    if name.startswith("vae/") and ".attentions." in name and tensor.ndim == 4:
        return tensor[:, :, 0, 0]
    return tensor


def pipeline_class(preset: Preset) -> str:
    """The diffusers class that draws with this model. Raises UserError if there is none."""
    check_diffusers_has(preset)
    one_encoder = len(preset.text_encoders) == 1
    if preset.unet.adm_in_channels is not None and one_encoder:
        raise UserError("diffusers has no pipeline for this model, whose UNet takes the pooled "
                        "vector of one text encoder: save it as .safetensors")
    if preset.vae.decoder_ch_mult is not None:
        raise UserError("diffusers has no VAE whose decoder has other levels than its encoder: "
                        "save it as .safetensors")
    if preset.prediction_type not in ("eps", "v", "v-zero-snr"):
        raise UserError(f"diffusers has no pipeline for this model, which predicts "
                        f"{preset.prediction_type!r}: save it as .safetensors")
    if preset.sampler not in SCHEDULERS:
        raise UserError(f"no scheduler of diffusers is known for this model's sampler "
                        f"{preset.sampler!r}: save it as .safetensors")
    z = preset.vae.z_channels
    kinds = {z: "", 2 * z: "InstructPix2Pix", 2 * z + 1: "Inpaint"}
    kind = kinds[preset.unet.in_channels]
    return f"StableDiffusion{'' if one_encoder else 'XL'}{kind}Pipeline"


# --- the files beside the weights ---

def folder_files(preset: Preset, pipeline: str, timestep_spacing: str) -> dict[str, dict | str]:
    """Path -> content of the files that diffusers' from_pretrained reads beside the weights.

    They hold only what differs from diffusers' defaults.
    """
    scheduler = SCHEDULERS[preset.sampler]
    files = {
        "unet/config.json": unet_config(preset),
        "vae/config.json": vae_config(preset),
        "scheduler/scheduler_config.json": scheduler_config(preset, scheduler, timestep_spacing),
    }
    index = dict(
        _class_name=pipeline, _diffusers_version="0.21.0",
        scheduler=["diffusers", scheduler], unet=["diffusers", "UNet2DConditionModel"],
        vae=["diffusers", "AutoencoderKL"], feature_extractor=[None, None],
        image_encoder=[None, None])
    if len(preset.text_encoders) == 1:
        index |= dict(safety_checker=[None, None], requires_safety_checker=False)
    else:
        index |= dict(force_zeros_for_empty_prompt=preset.zero_negative)
    for i, cfg in enumerate(preset.text_encoders):
        n = "" if i == 0 else f"_{i + 1}"
        encoder = "CLIPTextModelWithProjection" if cfg.projection else "CLIPTextModel"
        index |= {"text_encoder" + n: ["transformers", encoder],
                  "tokenizer" + n: ["transformers", "CLIPTokenizer"]}
        files[f"text_encoder{n}/config.json"] = text_encoder_config(cfg, encoder)
        for name, content in tokenizer_files(cfg).items():
            files[f"tokenizer{n}/{name}"] = content
    return files | {"model_index.json": index}


def unet_config(preset: Preset) -> dict:
    cfg = preset.unet
    levels = ["CrossAttn" * (depth > 0) for depth in cfg.transformer_depth]
    # diffusers takes the depth of the middle from the last level
    depths = [max(depth, 1) for depth in cfg.transformer_depth[:-1]]
    depths.append(cfg.transformer_depth_middle)
    config = dict(
        _class_name="UNet2DConditionModel",
        sample_size=preset.size // preset.vae.downsampling,
        in_channels=cfg.in_channels, out_channels=cfg.out_channels,
        block_out_channels=[cfg.model_channels * m for m in cfg.channel_mult],
        layers_per_block=cfg.num_res_blocks,
        down_block_types=[level + "DownBlock2D" for level in levels],
        up_block_types=[level + "UpBlock2D" for level in reversed(levels)],
        transformer_layers_per_block=depths,
        attention_head_dim=cfg.num_heads, cross_attention_dim=cfg.context_dim,
        norm_num_groups=cfg.num_groups, upcast_attention=cfg.upcast_attention,
        use_linear_projection=cfg.use_linear, time_cond_proj_dim=cfg.time_cond_proj_dim)
    if len(preset.text_encoders) > 1:
        pooled = preset.text_encoders[-1].hidden_size
        config |= dict(addition_embed_type="text_time",
                       projection_class_embeddings_input_dim=cfg.adm_in_channels,
                       addition_time_embed_dim=(cfg.adm_in_channels - pooled) // 6)
    return config


def vae_config(preset: Preset) -> dict:
    cfg = preset.vae
    levels = len(cfg.ch_mult)
    return dict(
        _class_name="AutoencoderKL", sample_size=preset.size,
        block_out_channels=[cfg.ch * m for m in cfg.ch_mult], layers_per_block=cfg.num_res_blocks,
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        latent_channels=cfg.z_channels, norm_num_groups=cfg.num_groups,
        scaling_factor=cfg.scale_factor)


def scheduler_config(preset: Preset, scheduler: str, timestep_spacing: str) -> dict:
    config = dict(
        _class_name=scheduler, beta_start=preset.beta_start, beta_end=preset.beta_end,
        beta_schedule=preset.beta_schedule,
        prediction_type="epsilon" if preset.prediction_type == "eps" else "v_prediction",
        timestep_spacing=timestep_spacing, steps_offset=1)
    if preset.prediction_type == "v-zero-snr":
        config["rescale_betas_zero_snr"] = True
    return config


def text_encoder_config(cfg: CLIPTextConfig, encoder: str) -> dict:
    return dict(
        architectures=[encoder], model_type="clip_text_model", vocab_size=cfg.vocab_size,
        hidden_size=cfg.hidden_size, intermediate_size=4 * cfg.hidden_size,
        projection_dim=cfg.hidden_size, num_hidden_layers=cfg.num_hidden_layers,
        num_attention_heads=cfg.num_attention_heads,
        max_position_embeddings=cfg.max_position_embeddings, hidden_act=cfg.hidden_act)


def tokenizer_files(cfg: CLIPTextConfig) -> dict[str, dict | str]:
    vocab, merges = vocab_and_merges()
    return {
        "vocab.json": vocab,
        "merges.txt": merges,
        "tokenizer_config.json": dict(
            tokenizer_class="CLIPTokenizer", model_max_length=cfg.max_position_embeddings,
            pad_token=load_bpe().id_to_token(cfg.pad)),
    }


@cache
def vocab_and_merges() -> tuple[dict[str, int], str]:
    bpe = load_bpe()
    vocab = dict(sorted(bpe.get_vocab().items(), key=lambda item: item[1]))  # it has no order
    merges = json.loads(bpe.to_str())["model"]["merges"]
    return vocab, "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges)
