"""What a stranger's file says of a model, checked before it is used.

The types are those of the dataclasses (UNetConfig and the like). The ranges are far above every
known model, and small enough that nothing of such a size is built or allocated by mistake.
"""
import math
from collections.abc import Iterable
from dataclasses import fields
from pathlib import Path
from types import UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from clip import ACTIVATIONS, CLIPTextConfig
from model import UNetConfig
from sampler import PREDICTIONS, SAMPLERS, SPACINGS
from sd import NETWORKS, Preset, UserError
from vae import VAEConfig

MOST = 2**16            # of whole numbers without a range of their own
MOST_LEVELS = 8
MOST_BLOCKS = 1000      # of a UNet, counted roughly; SDXL has about 100
MOST_WIDTH = 2**15      # of a layer

RANGES = {  # field -> least, most
    "in_channels": (1, 1024), "out_channels": (1, 1024), "model_channels": (2, 2**13),
    "channel_mult": (1, 64), "num_res_blocks": (1, 64), "transformer_depth": (0, 256),
    "transformer_depth_middle": (0, 256), "num_heads": (1, 1024), "context_dim": (1, MOST_WIDTH),
    "adm_in_channels": (1, MOST_WIDTH), "time_cond_proj_dim": (2, MOST_WIDTH),
    "num_groups": (1, 1024), "ch": (1, 2**13), "ch_mult": (1, 64), "decoder_ch_mult": (1, 64),
    "z_channels": (1, 1024), "scale_factor": (1e-6, 1e6), "vocab_size": (49408, 2**20),
    "hidden_size": (1, MOST_WIDTH), "num_hidden_layers": (1, 256),
    "num_attention_heads": (1, 1024), "max_position_embeddings": (77, 2**12),
    "clip_skip": (0, 255), "pad": (0, 49407),
    "beta_start": (1e-9, 0.999), "beta_end": (1e-9, 0.999), "size": (1, 2**13),
    "steps": (1, 1000), "guidance": (-1000, 1000)}
CHOICES = {
    "hidden_act": ACTIVATIONS, "prediction_type": PREDICTIONS, "sampler": SAMPLERS,
    "timestep_spacing": SPACINGS, "beta_schedule": ("scaled_linear", "linear")}

Whole, Text = int | None, str | None
JSON_TYPES = {  # key in the files of diffusers and transformers -> type
    "_class_name": Text, "model_type": Text, "hidden_act": str, "prediction_type": str,
    "beta_schedule": str, "timestep_spacing": Text, "addition_embed_type": Text,
    "beta_start": float, "beta_end": float, "scaling_factor": float, "in_channels": int,
    "out_channels": int, "latent_channels": int, "hidden_size": int, "intermediate_size": int,
    "num_hidden_layers": int, "num_attention_heads": int | tuple[int, ...] | None,
    "norm_num_groups": int, "time_cond_proj_dim": Whole,
    "projection_class_embeddings_input_dim": Whole, "addition_time_embed_dim": Whole,
    "block_out_channels": tuple[int, ...], "architectures": tuple[str, ...] | None,
    "down_block_types": tuple[str, ...], "up_block_types": tuple[str, ...]}
POSITIVE = ("block_out_channels", "in_channels", "out_channels", "latent_channels", "hidden_size",
            "num_hidden_layers", "num_attention_heads", "norm_num_groups")


# --- one value ---

def has_type(value: object, kind: Any) -> bool:
    """Whether a value of JSON, or of a config, is of a field's type. Types of forks are not
    looked at."""
    if get_origin(kind) in (Union, UnionType):
        return any(has_type(value, one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return (isinstance(value, (list, tuple)) and 1 <= len(value) <= 1000
                and all(has_type(one, get_args(kind)[0]) for one in value))
    if kind is float:
        return type(value) in (int, float) and abs(value) < 1e30 and math.isfinite(value)
    if kind in (int, bool, str):
        return type(value) is kind
    return value is None if kind is type(None) else True


def type_name(kind: Any) -> str:
    """As a message says it."""
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(type_name(one) for one in get_args(kind))
    if get_origin(kind) is tuple:
        return f"a list of {type_name(get_args(kind)[0])}"
    names = {int: "whole number", float: "number", bool: "true or false", str: "text",
             type(None): "null"}
    return names.get(kind, str(kind))


def check_value(where: str, name: str, value: object, kind: Any) -> None:
    """Raises UserError for another type, a number out of range, or a name that is not known."""
    if not has_type(value, kind):
        raise UserError(f"{where}: {name} is {shown(value)}, not {type_name(kind)}")
    least, most = RANGES.get(name, (-MOST, MOST))
    for one in value if isinstance(value, (list, tuple)) else [value]:
        number = type(one) in (int, float)
        if number and (name in RANGES or type(one) is int) and not least <= one <= most:
            raise UserError(f"{where}: {name} is {shown(one)}, and must lie between {least} and "
                            f"{most}")
    if name in CHOICES and value is not None and value not in CHOICES[name]:
        raise UserError(f"{where}: {name} is {shown(value)}, not {', '.join(CHOICES[name])}")


def shown(value: object) -> str:
    """The value in a message, at most 60 characters of it."""
    if type(value) is int and abs(value) > 10**30:  # Python refuses to write very long ones
        return "a very large number"
    if isinstance(value, (dict, list, tuple)) and len(value) > 10:
        return f"a {type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def reason(error: BaseException) -> str:
    """What a library says went wrong: its first line, at most 200 characters of it."""
    line = (str(error).splitlines() or [type(error).__name__])[0]
    return line if len(line) <= 200 else line[:197] + "..."


def check_json(file: Path, config: dict) -> None:
    """Raises UserError for the first key of a diffusers JSON file whose value has another type."""
    for key, value in config.items():
        kind = JSON_TYPES.get(key)
        if kind is None:
            continue
        if not has_type(value, kind):
            raise UserError(f"{file}: {key} is {shown(value)}, not {type_name(kind)}")
        least = 1 if key in POSITIVE else -MOST
        for one in value if isinstance(value, list) else [value]:
            if type(one) is int and not least <= one <= MOST:
                raise UserError(f"{file}: {key} is {shown(one)}, and must lie between {least} and "
                                f"{MOST}")


def check_index(file: Path, index: dict) -> None:
    """Raises UserError if a network of model_index.json is no pair of names."""
    for key in ("unet", "vae", "text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2",
                "scheduler"):
        value = index.get(key)
        if not has_type(value, tuple[str | None, ...] | None) and value != []:
            raise UserError(f"{file}: {key} is {shown(value)}, not a pair of names")


# --- a preset ---

def checked_preset(where: str | Path, stored: dict) -> Preset:
    """As sd.preset_from_dict, for a config that anybody may have written.

    Raises UserError that names the field.
    """
    encoders = stored.get("text_encoders")
    if not isinstance(encoders, list) or len(encoders) > 8:
        raise UserError(f"{where}: text_encoders is {shown(encoders)}, not a list of configs")
    unet, vae = (checked_part(where, name, stored.get(name)) for name in ("unet", "vae"))
    texts = tuple(checked_part(where, "text_encoders", one) for one in encoders)
    check_names(where, stored, Preset)
    preset = Preset(**stored | {"unet": unet, "vae": vae, "text_encoders": texts})
    check_preset(where, preset)
    return preset


def checked_part(where: str | Path, name: str, part: object) -> Any:
    """The config of a network. Raises UserError for no known kind, other fields or types."""
    if not isinstance(part, dict):
        raise UserError(f"{where}: {name} is {shown(part)}, not a config")
    kinds = {kind.__name__: kind for kind in NETWORKS}
    kind = part.get("kind")
    if not isinstance(kind, str) or kind not in kinds:
        raise UserError(f"{where}: the kind of {name} is {shown(kind)}, not {', '.join(kinds)}")
    check_names(f"{where}: {name}", part, kinds[kind], ("kind",))
    hints = get_type_hints(kinds[kind])
    values = {key: tuple(value) if isinstance(value, list) else value
              for key, value in part.items() if key != "kind"}
    for key, value in values.items():   # before a fork's own code sees them
        check_value(f"{where}: {name}", key, value, hints[key])
    try:
        return kinds[kind](**values)
    except (ValueError, TypeError) as error:
        raise UserError(f"{where}: {name}: {error}") from error


def check_names(where: str | Path, stored: dict, kind: type, others: Iterable[str] = ()) -> None:
    known = {field.name for field in fields(kind)} | set(others)
    for name in stored:
        if name not in known:
            raise UserError(f"{where} has {shown(name)}, which does not fit this version")


def check_preset(where: str | Path, preset: Preset) -> None:
    """Raises UserError for types and ranges that no model has, and for parts that do not fit
    together."""
    check_fields(str(where), preset)
    for name in "unet", "vae":
        check_fields(f"{where}: {name}", getattr(preset, name))
    for encoder in preset.text_encoders:
        check_fields(f"{where}: text_encoders", encoder)
    if isinstance(preset.unet, UNetConfig):
        check_unet(f"{where}: unet", preset.unet)
    if isinstance(preset.vae, VAEConfig):
        check_vae(f"{where}: vae", preset.vae)
    for encoder in preset.text_encoders:
        if isinstance(encoder, CLIPTextConfig):
            check_text(f"{where}: text_encoders", encoder)
    prefixes = [encoder.prefix for encoder in preset.text_encoders if hasattr(encoder, "prefix")]
    reserved = ("first_stage_model.", "model.diffusion_model.")
    if len(set(prefixes)) < len(prefixes) or any(one.startswith(reserved) for one in prefixes):
        raise UserError(f"{where}: text_encoders: prefix is another network's")
    check_together(str(where), preset)


def check_fields(where: str, config: object) -> None:
    for name, kind in get_type_hints(type(config)).items():
        if name not in ("unet", "vae", "text_encoders"):
            check_value(where, name, getattr(config, name), kind)


def check_unet(where: str, config: UNetConfig) -> None:
    levels = len(config.channel_mult)
    check_levels(f"{where}: channel_mult", levels)
    for name in "transformer_depth", "num_heads":
        if len(getattr(config, name)) != levels:
            raise UserError(f"{where}: {name} must have a number for each of {levels} levels")
    widths = [config.model_channels * one for one in config.channel_mult]
    check_widths(f"{where}: channel_mult", [*widths, config.model_channels], config.num_groups)
    for width, heads in zip(widths, config.num_heads):
        if width % heads:
            raise UserError(f"{where}: num_heads: {heads} heads do not divide the width {width}")
    blocks = sum((2 * config.num_res_blocks + 1) * (1 + depth)
                 for depth in config.transformer_depth)
    if blocks > MOST_BLOCKS:
        raise UserError(f"{where}: num_res_blocks and transformer_depth make {blocks} blocks, and "
                        f"at most {MOST_BLOCKS} are built")
    if config.model_channels % 2:
        raise UserError(f"{where}: model_channels is {config.model_channels}, and must be even")


def check_vae(where: str, config: VAEConfig) -> None:
    for name in "ch_mult", "decoder_ch_mult":
        levels = getattr(config, name) or ()
        check_levels(f"{where}: {name}", len(levels))
        check_widths(f"{where}: {name}", [config.ch * one for one in levels], config.num_groups)
    if config.decoder_ch_mult is not None and len(config.decoder_ch_mult) < len(config.ch_mult):
        raise UserError(f"{where}: decoder_ch_mult has {len(config.decoder_ch_mult)} levels, and "
                        f"ch_mult {len(config.ch_mult)}: the decoder needs as many or more")


def check_levels(where: str, levels: int) -> None:
    if levels > MOST_LEVELS:
        raise UserError(f"{where} has {levels} levels, and at most {MOST_LEVELS} are built")


def check_widths(where: str, widths: list[int], groups: int) -> None:
    for width in widths:
        if width % groups or width > MOST_WIDTH:
            raise UserError(f"{where}: the width {width} is above {MOST_WIDTH}, or no multiple of "
                            f"num_groups, {groups}")


def check_text(where: str, config: CLIPTextConfig) -> None:
    if config.hidden_size % config.num_attention_heads:
        raise UserError(f"{where}: num_attention_heads: {config.num_attention_heads} heads do not "
                        f"divide the width {config.hidden_size}")
    if config.clip_skip >= config.num_hidden_layers:
        raise UserError(f"{where}: clip_skip is {config.clip_skip}, of "
                        f"{config.num_hidden_layers} layers")


def check_together(where: str, preset: Preset) -> None:
    """The networks must take what the others give."""
    f = getattr(preset.vae, "downsampling", 1)
    if preset.size % f:
        raise UserError(f"{where}: size is {preset.size}, and must be a multiple of {f}")
    widths = [encoder.hidden_size for encoder in preset.text_encoders
              if isinstance(encoder, CLIPTextConfig)]
    if not isinstance(preset.unet, UNetConfig) or len(widths) < len(preset.text_encoders):
        return
    if not widths or sum(widths) != preset.unet.context_dim:
        raise UserError(f"{where}: unet: context_dim is {preset.unet.context_dim}, and the text "
                        f"encoders are {sum(widths)} wide")
    y = preset.unet.adm_in_channels
    if y is not None and (y < widths[-1] or (y - widths[-1]) % 12):
        raise UserError(f"{where}: unet: adm_in_channels is {y}, which does not fit a text encoder "
                        f"of {widths[-1]}")
    z = getattr(preset.vae, "z_channels", None)
    if z is not None and (preset.unet.in_channels < z or preset.unet.out_channels != z):
        raise UserError(f"{where}: unet: in_channels is {preset.unet.in_channels} and out_channels "
                        f"{preset.unet.out_channels}, and the VAE has {z}")
