"""Names that other programs and older versions give to tensors -> official names.

After `standard_names` the tensors of a network have the names of official single files, such as
"first_stage_model.decoder.conv_in.weight", or those of diffusers folders, such as
"vae/decoder.conv_in.weight". Both are known to formats.py.
"""
import re
import warnings
from collections.abc import Iterable

import sd as core  # for PRESETS as they are now
from extras.memory import building
from sd import LazyTensor

Tensors = dict[str, LazyTensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."

# Where names of a UNet and of a VAE begin, in official files and in those of diffusers.
UNET_LDM = r"(?:time_embed|label_emb|cond_proj|input_blocks|middle_block|output_blocks|out)\."
UNET_DIFFUSERS = (r"(?:conv_in|conv_norm_out|conv_out|time_embedding|add_embedding|down_blocks"
                  r"|mid_block|up_blocks)\.")
VAE_BOTH = r"(?:encoder|decoder)\.conv_(?:in|out)\.|(?:post_)?quant_conv\."
VAE_LDM = r"(?:encoder|decoder)\.(?:norm_out|mid|down|up)\."
VAE_DIFFUSERS = r"(?:encoder|decoder)\.(?:conv_norm_out|mid_block|down_blocks|up_blocks)\."
NETWORKS = [  # what stands before the names; official names; those of diffusers; their prefixes
    (r"(?:model\.)*diffusion_model\.|unet\.|", UNET_LDM, UNET_DIFFUSERS, UNET, "unet/"),
    (r"first_stage_model\.|vae\.|", f"{VAE_BOTH}|{VAE_LDM}", f"{VAE_BOTH}|{VAE_DIFFUSERS}", VAE,
     "vae/"),
]

RENAMES = [  # pattern, replacement; applied in this order
    (r"^(?:_orig_mod|module|state_dict)\.", ""),
    (r"(?<=\.)_orig_mod\.", ""),                            # torch.compile
    # text encoders: A1111, ComfyUI, OneTrainer and others
    (r"^cond_stage_model\.(?:wrapped|clip_[lh])\.", "cond_stage_model."),
    (r"token_embedding\.wrapped\.weight$", "token_embedding.weight"),
    (r"^(?:text_encoders\.)?clip_[lh]\.transformer\.", "conditioner.embedders.0.transformer."),
    (r"^(?:text_encoders\.)?clip_g\.transformer\.", "conditioner.embedders.1.transformer."),
    (r"^(?:te1?|text_encoder(?:_1)?)[./](?=text_|embeddings|encoder|final_)", "text_encoder/"),
    (r"^(?:te2|text_encoder_2)[./](?=text_|embeddings|encoder|final_)", "text_encoder_2/"),
    # old merges, NovelAI and transformers 5 leave text_model. out
    (r"^(cond_stage_model\.transformer\.|conditioner\.embedders\.\d\.transformer\.|text_encoder/"
     r"|text_encoder_2/)(?=embeddings\.|encoder\.|final_layer_norm\.)", r"\1text_model."),
    # the VAE's attention: as later and as earlier versions of diffusers name it
    (r"(?<=\.mid\.attn_1\.)(?:to_)?([qkv])(?:uery|ey|alue)?(?=\.)", r"\1"),
    (r"(?<=\.mid\.attn_1\.)(?:to_out\.0|to_out|proj_attn)(?=\.)", "proj_out"),
    (r"(?<=\.mid\.attn_1\.)group_norm(?=\.)", "norm"),
    (r"(?<=mid_block\.attentions\.0\.)query(?=\.)", "to_q"),
    (r"(?<=mid_block\.attentions\.0\.)key(?=\.)", "to_k"),
    (r"(?<=mid_block\.attentions\.0\.)value(?=\.)", "to_v"),
    (r"(?<=mid_block\.attentions\.0\.)proj_attn(?=\.)", "to_out.0"),
]
PROJECTIONS = [  # x @ weight.T in these, x @ text_projection in official files and here
    (r"^(conditioner\.embedders\.1\.transformer\.)text_projection\.weight$",
     r"\1text_model.text_projection"),
    (r"^((?:cond_stage_model|conditioner\.embedders\.\d)\.model\.)text_projection\.weight$",
     r"\1text_projection"),
    (r"^(text_encoder(?:_2)?/text_projection\.weight)$", r"\1"),
]


def standard_names(tensors: Tensors) -> Tensors:
    """The tensors of a file or folder under official names, or under those of diffusers."""
    renamed = {}
    for name, tensor in tensors.items():
        for pattern, replacement in RENAMES:
            name = re.sub(pattern, replacement, name)
        for pattern, replacement in PROJECTIONS:
            if re.match(pattern, name):
                name, tensor = re.sub(pattern, replacement, name), transposed(tensor)
                break
        renamed.setdefault(name, tensor)
    for starts, ldm, diffusers, official, folder in NETWORKS:
        renamed = with_prefixes(renamed, starts, ldm, diffusers, official, folder)
    return from_ema(renamed)


def transposed(tensor: LazyTensor) -> LazyTensor:
    return LazyTensor(tensor.shape[::-1], lambda: tensor.read().T)


def with_prefixes(tensors: Tensors, starts: str, ldm: str, diffusers: str, official: str,
                  folder: str) -> Tensors:
    """One network's tensors under the prefix of its layout; all others are not changed."""
    if has_prefix(tensors, folder) or has_prefix(tensors, official, ldm):
        return tensors
    for pattern, prefix in (ldm, official), (diffusers, folder):
        own = re.compile(rf"^(?:{starts})(?=(?:{pattern}))")
        found = [name for name in tensors if own.match(name)]
        if sure(found, prefix):
            return {own.sub(prefix, name, count=1): tensor for name, tensor in tensors.items()}
    return tensors


def has_prefix(names: Iterable[str], prefix: str, then: str = "") -> bool:
    return any(re.match(re.escape(prefix) + f"(?:{then})", name) for name in names)


def sure(names: list[str], prefix: str) -> bool:
    """Whether names show the layout: some are the same in both."""
    if prefix == VAE:
        return any(re.search(r"(?:encoder|decoder)\.mid\.", name) for name in names)
    if prefix == "vae/":
        return any("mid_block." in name for name in names)
    return any(re.search(r"(?:input_blocks|down_blocks|conv_in)\.", name) for name in names)


def from_ema(tensors: Tensors) -> Tensors:
    """Where a file has only the moving averages of the UNet: these, under the usual names.

    Their names have lost their dots: "model_ema.diffusion_modelinput_blocks00weight".
    """
    ema = {name for name in tensors if name.startswith("model_ema.diffusion_model")}
    if not ema or has_prefix(tensors, UNET) or has_prefix(tensors, "unet/"):
        return tensors
    warnings.warn("the file has only the UNet's moving averages (EMA): these are used")
    dotted = {}
    for preset in core.PRESETS.values():
        if isinstance(preset.unet, core.UNetConfig):
            with building():
                names = list(core.make_network(preset.unet).state_dict())
            for name in names:
                dotted["model_ema.diffusion_model" + name.replace(".", "")] = UNET + name
    return {dotted.get(name, name): tensor for name, tensor in tensors.items()}
