"""What the JSON files of a diffusers folder say of the model: obeyed, or refused by name.

A value that changes the picture and that this program cannot follow stops with its name. What is
not listed here does not change pictures.
"""
from dataclasses import replace
from pathlib import Path

from clip import CLIPTextConfig
from extras.checks import check_json, shown
from extras.files import read_json
from model import UNetConfig
from sampler import PREDICTIONS
from sd import Preset, UserError
from vae import VAEConfig

# prediction_type of schedulers and of metadata -> row of PREDICTIONS
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v"}

# Key -> the values that mean what is computed here. A key that is missing has the first of them.
FIXED_UNET = {
    "_class_name": ["UNet2DConditionModel"], "act_fn": ["silu"], "norm_eps": [1e-5],
    "flip_sin_to_cos": [True], "freq_shift": [0], "center_input_sample": [False],
    "mid_block_type": ["UNetMidBlock2DCrossAttn"], "only_cross_attention": [False],
    "dual_cross_attention": [False], "downsample_padding": [1], "mid_block_scale_factor": [1],
    "class_embed_type": [None], "num_class_embeds": [None], "encoder_hid_dim": [None],
    "encoder_hid_dim_type": [None], "addition_embed_type": [None, "text_time"],
    "resnet_time_scale_shift": ["default"], "resnet_skip_time_act": [False],
    "resnet_out_scale_factor": [1.0], "time_embedding_type": ["positional"],
    "time_embedding_dim": [None], "time_embedding_act_fn": [None], "timestep_post_act": [None],
    "conv_in_kernel": [3], "conv_out_kernel": [3], "attention_type": ["default"],
    "class_embeddings_concat": [False], "mid_block_only_cross_attention": [None, False],
    "cross_attention_norm": [None], "reverse_transformer_layers_per_block": [None],
    "num_attention_heads": [None]}
FIXED_VAE = {
    "_class_name": ["AutoencoderKL"], "act_fn": ["silu"], "in_channels": [3], "out_channels": [3],
    "latents_mean": [None], "latents_std": [None], "shift_factor": [None, 0, 0.0],
    "use_quant_conv": [True], "use_post_quant_conv": [True], "mid_block_add_attention": [True]}
FIXED_TEXT = {
    "model_type": ["clip_text_model"], "layer_norm_eps": [1e-5], "max_position_embeddings": [77],
    "vocab_size": [49408]}
FIXED_SCHEDULER = {"num_train_timesteps": [1000], "trained_betas": [None]}

# Those whose models have these noise levels, c_in, c_skip and c_out
FAMILY = {f"{name}Scheduler" for name in (
    "DDIM DDIMInverse DDIMParallel DDPM DDPMParallel PNDM LMSDiscrete EulerDiscrete "
    "EulerAncestralDiscrete HeunDiscrete KDPM2Discrete KDPM2AncestralDiscrete DEISMultistep "
    "DPMSolverMultistep DPMSolverMultistepInverse DPMSolverSinglestep DPMSolverSDE UniPCMultistep "
    "SASolver LCM TCD").split()}
DISTILLED = {"LCMScheduler": "lcm"}  # class -> the sampler that such models need
NOISE = {"beta_start": 0.0001, "beta_end": 0.02, "beta_schedule": "linear"}  # diffusers' defaults
NOISE_OF_LCM = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
BESIDE = ("safety_checker", "feature_extractor", "image_encoder", "tokenizer", "tokenizer_2",
          "scheduler", "unet", "vae", "text_encoder", "text_encoder_2")


def check_fixed(file: Path, config: dict, fixed: dict[str, list]) -> None:
    """Raises UserError that names the first value that is not followed here."""
    for key, allowed in fixed.items():
        value = config.get(key, allowed[0])
        if value not in allowed:
            usual = " or ".join(map(str, allowed))
            raise UserError(f"{file} has {key} {shown(value)}, which is not supported: only "
                            f"{usual} is")


# --- scheduler and pipeline ---

def scheduler_settings(path: Path) -> dict[str, object]:
    """The fields of Preset that scheduler_config.json sets. Raises UserError."""
    file = path / "scheduler/scheduler_config.json"
    config = read_json(file)
    check_json(file, config)
    kind = config.get("_class_name", "DDIMScheduler")
    if kind not in FAMILY:
        raise UserError(f"{file} asks for {str(kind)[:80]}, whose noise is another (EDM, flow "
                        "matching or the like): such models are not supported")
    check_fixed(file, config, FIXED_SCHEDULER)
    prediction = config.get("prediction_type", "epsilon")
    prediction_type = PREDICTION_TYPES.get(prediction, prediction)
    if config.get("rescale_betas_zero_snr"):
        # Only v works with it: where all is noise, the noise says nothing about the picture.
        prediction_type += "-zero-snr"
        prediction += "-zero-snr"
    if prediction_type not in PREDICTIONS:
        raise UserError(f"{path} predicts {prediction!r}, not epsilon or v_prediction")
    usual = NOISE_OF_LCM if kind in ("LCMScheduler", "TCDScheduler") else NOISE
    noise = {key: config.get(key, value) for key, value in usual.items()}
    if noise["beta_schedule"] not in ("scaled_linear", "linear"):
        raise UserError(f"{path} has the noise schedule {noise['beta_schedule']!r}, not "
                        "scaled_linear or linear")
    return noise | {"prediction_type": prediction_type}


def check_pipeline(path: Path, index: dict) -> None:
    """Raises UserError for networks in model_index.json that would change the picture."""
    file = path / "model_index.json"
    for name in "tokenizer", "tokenizer_2":
        kind = (index.get(name) or [None])[-1]
        if kind not in (None, "CLIPTokenizer", "CLIPTokenizerFast"):
            raise UserError(f"{file} has the tokenizer {str(kind)[:80]}, which is not supported: "
                            "CLIPTokenizer is")
    if index.get("is_cosxl_edit"):
        raise UserError(f"{file} has is_cosxl_edit, which is not supported: its noise is EDM's")
    for name, value in index.items():
        if isinstance(value, list) and any(value) and name not in BESIDE:
            raise UserError(f"{file} has a {name} ({value[-1]}), which is not supported: give a "
                            "model without it")


# --- the networks ---

def with_configs(path: Path, index: dict, preset: Preset) -> Preset:
    """The preset with what the configs of the networks say. Raises UserError."""
    unet_file, vae_file = path / "unet/config.json", path / "vae/config.json"
    encoders = [text_config(path, part, cfg) for part, cfg in zip(
        ("text_encoder", "text_encoder_2"), preset.text_encoders)]
    if len(encoders) == 1:
        encoders = [with_layers_of_one(encoders[0], preset.text_encoders[0])]
    changes = {"text_encoders": tuple(encoders)}
    if any(index.get("unet") or []):
        changes["unet"] = unet_config(unet_file, read_json(unet_file), preset.unet, encoders)
    if any(index.get("vae") or []):
        changes["vae"] = vae_config(vae_file, read_json(vae_file), preset.vae)
    if len(encoders) > 1:
        changes["zero_negative"] = bool(index.get("force_zeros_for_empty_prompt", True))
    return replace(preset, **changes)


def unet_config(file: Path, config: dict, usual: UNetConfig,
                encoders: list[CLIPTextConfig]) -> UNetConfig:
    """Raises UserError for what model.py does not compute."""
    check_json(file, config)
    check_fixed(file, config, FIXED_UNET)
    widths = config.get("block_out_channels", [320, 640, 1280, 1280])
    levels = len(widths)
    down = config.get("down_block_types", ["CrossAttnDownBlock2D"] * (levels - 1) + ["DownBlock2D"])
    up = config.get("up_block_types", [one.replace("Down", "Up") for one in reversed(down)])
    check_blocks(file, down, up)
    depths = per_level(file, config, "transformer_layers_per_block", 1, levels)
    heads = per_level(file, config, "attention_head_dim", 8, levels)
    if any(width % widths[0] for width in widths):
        raise UserError(f"{file} has block_out_channels {shown(widths)}, which is not supported: "
                        "they must be multiples of the first")
    y = adm_width(file, config, encoders)
    return replace(
        usual, in_channels=config.get("in_channels", 4), out_channels=config.get("out_channels", 4),
        model_channels=widths[0], channel_mult=tuple(width // widths[0] for width in widths),
        num_res_blocks=one_number(file, config, "layers_per_block", 2),
        transformer_depth=tuple(depth if "CrossAttn" in block else 0
                                for depth, block in zip(depths, down)),
        transformer_depth_middle=depths[-1], num_heads=tuple(heads),
        context_dim=one_number(file, config, "cross_attention_dim", 1280), adm_in_channels=y,
        time_cond_proj_dim=config.get("time_cond_proj_dim"),
        num_groups=config.get("norm_num_groups", 32),
        # the same numbers, and none too large for fp16; SD 2.0's folder does not ask for it
        upcast_attention=usual.upcast_attention or bool(config.get("upcast_attention", False)),
        use_linear=bool(config.get("use_linear_projection", False)))


def check_blocks(file: Path, down: list[str], up: list[str]) -> None:
    same = [one.replace("Up", "Down") for one in reversed(up)]
    for block in down:
        if block not in ("CrossAttnDownBlock2D", "DownBlock2D") or same != list(down):
            raise UserError(f"{file} has the blocks {', '.join([*down, *up])}, which are not all "
                            "supported")


def adm_width(file: Path, config: dict, encoders: list[CLIPTextConfig]) -> int | None:
    """The width of y: the pooled vector and six embedded sizes."""
    if config.get("addition_embed_type") is None:
        return None
    width = config.get("projection_class_embeddings_input_dim")
    size = config.get("addition_time_embed_dim")
    if width != encoders[-1].hidden_size + 6 * (size or 0):
        raise UserError(f"{file} has projection_class_embeddings_input_dim {width} and "
                        f"addition_time_embed_dim {size}, which is not supported with a pooled "
                        f"vector of {encoders[-1].hidden_size}")
    return width


def one_number(file: Path, config: dict, key: str, usual: int) -> int:
    value = config.get(key, usual)
    values = value if isinstance(value, (list, tuple)) else [value]
    if not all(type(one) is int for one in values) or len(set(values)) != 1:
        raise UserError(f"{file} has {key} {shown(value)}, which is not supported: it must be one "
                        "number")
    return values[0]


def per_level(file: Path, config: dict, key: str, usual: int, levels: int) -> list[int]:
    """A number for each level, of one for all or a list."""
    value = config.get(key, usual)
    values = value if isinstance(value, (list, tuple)) else [value] * levels
    if len(values) != levels or not all(type(one) is int for one in values):
        raise UserError(f"{file} has {key} {shown(value)}, which is not supported: it must be a "
                        f"number, or {levels} of them")
    return list(values)


def vae_config(file: Path, config: dict, usual: VAEConfig) -> VAEConfig:
    """Raises UserError for what vae.py does not compute."""
    check_json(file, config)
    check_fixed(file, config, FIXED_VAE)
    widths = config.get("block_out_channels", [128, 256, 512, 512])
    for key, kind in ("down_block_types", "DownEncoderBlock2D"), ("up_block_types",
                                                                 "UpDecoderBlock2D"):
        if any(block != kind for block in config.get(key, [kind])):
            raise UserError(f"{file} has {key} {config[key]}, which are not all supported")
    return replace(
        usual, ch=widths[0], ch_mult=tuple(width // widths[0] for width in widths),
        decoder_ch_mult=None,
        num_res_blocks=one_number(file, config, "layers_per_block", 2),
        z_channels=config.get("latent_channels", 4), num_groups=config.get("norm_num_groups", 32),
        scale_factor=config.get("scaling_factor", usual.scale_factor))


def text_config(path: Path, part: str, usual: CLIPTextConfig) -> CLIPTextConfig:
    """The text encoder's config; the usual one where the folder has none. Raises UserError."""
    file = path / part / "config.json"
    if not file.is_file():
        return usual
    config = read_json(file)
    check_json(file, config)
    check_fixed(file, config, FIXED_TEXT)
    kind = (config.get("architectures") or ["CLIPTextModel"])[0]
    if kind not in ("CLIPTextModel", "CLIPTextModelWithProjection"):
        raise UserError(f"{file} is a {kind[:80]}, which is not supported: CLIPTextModel is")
    width, act = config.get("hidden_size", 512), config.get("hidden_act", "quick_gelu")
    if config.get("intermediate_size", 4 * width) != 4 * width:
        raise UserError(f"{file} has intermediate_size {config['intermediate_size']}, which is not "
                        f"supported: only {4 * width} is")
    if act not in ("quick_gelu", "gelu"):
        raise UserError(f"{file} has hidden_act {act!r}, which is not supported: quick_gelu and "
                        "gelu are")
    return replace(usual, hidden_size=width, hidden_act=act,
                   num_hidden_layers=config.get("num_hidden_layers", 12),
                   num_attention_heads=config.get("num_attention_heads", 8))


def with_layers_of_one(found: CLIPTextConfig, usual: CLIPTextConfig) -> CLIPTextConfig:
    """diffusers uses the last layer that a folder has, where there is one text encoder; so SD 2.x's
    folders lack the layers after the one that is used, and the projection."""
    return replace(found, clip_skip=0, projection=False, final_norm=usual.final_norm)
