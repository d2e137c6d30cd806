"""LoRA files of every naming, against peft and diffusers. No downloads.

Small random models. The LoRAs are made by peft and written by diffusers or peft, or by this
project and read by diffusers.
"""
import json
import random
import re
import warnings
from copy import deepcopy

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from lycoris.modules.full import FullModule
from lycoris.modules.ia3 import IA3Module
from lycoris.modules.locon import LoConModule
from lycoris.modules.loha import LohaModule
from lycoris.modules.lokr import LokrModule
from safetensors.torch import load_file, save_file
from torch import nn

from clip import load_bpe
from extras import lora_names, lycoris
from extras.lora import LoRA, apply_lora, layers, open_lora
from sd import PRESETS, StableDiffusion, UserError
from tests.common import (
    PROMPTS,
    assert_agree,
    on_meta,
    our_picture,
    pair,
    psnr,
    relative_error,
    their_picture,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's, about each other
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
TEXT = ["q_proj", "k_proj", "v_proj", "out_proj"]
ALL = ATTENTION + ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut",
                   "time_emb_proj", "downsamplers.0.conv"]
NEGATIVE = PROMPTS["negative_prompt"]
SETTINGS = dict(negative_prompt=NEGATIVE, steps=4, sampler="ddim")
DIFFUSERS_FILE = "pytorch_lora_weights.safetensors"


# --- helpers ---

def copy_model(name: str) -> StableDiffusion:
    """A small model, to be changed. Not so its tokenizer, which takes longer than all the rest."""
    bpe = load_bpe()
    return deepcopy(pair_of(name)[0], {id(bpe): bpe})


def pair_of(name: str):
    pipeline = diffusers.StableDiffusionPipeline
    if len(PRESETS[name].text_encoders) == 2:
        pipeline = diffusers.StableDiffusionXLPipeline
    return pair(name, pipeline)


def copies(name: str):
    """A small model and diffusers' pipeline with the same weights, to be changed."""
    pipe = pair_of(name)[1]
    pipe = type(pipe)(**{part: module if "tokenizer" in part else deepcopy(module)
                         for part, module in pipe.components.items()})
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    pipe.set_progress_bar_config(disable=True)
    return copy_model(name), pipe


def add_adapter(model: torch.nn.Module, rank: int, alpha: float,
                targets: list[str]) -> dict[str, torch.Tensor]:
    """peft's random LoRA of a model of diffusers or transformers, which then has it; its
    tensors."""
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets,
                             init_lora_weights=False)
    model.add_adapter(config)
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.15)
    return peft.get_peft_model_state_dict(model)


def peft_config(rank: int, targets: list[str], **settings) -> peft.LoraConfig:
    return peft.LoraConfig(r=rank, target_modules=targets, init_lora_weights=False, **settings)


def config_of(model: torch.nn.Module) -> dict:
    return model.peft_config["default"].to_dict()


def picture(sd: StableDiffusion):
    return our_picture(sd, **SETTINGS)


def picture_by_diffusers(pipe):
    guidance = 5.0 if hasattr(pipe, "text_encoder_2") else 7.5
    return their_picture(pipe, negative_prompt=NEGATIVE, num_inference_steps=4,
                         guidance_scale=guidance, height=64, width=64)


def assert_changed(sd: StableDiffusion, before) -> None:
    """The LoRA must matter for a test to mean something."""
    assert psnr(picture(sd)[0], before) < 40


def randomize_up(lora: LoRA, std: float) -> LoRA:
    for matrices in lora.layers.values():
        torch.nn.init.normal_(matrices["lora_up"].weight, std=std)
    return lora


def save_contiguous(tensors: dict, path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)


# --- files of others ---

@pytest.mark.parametrize("name, targets", [("sd1", ATTENTION), ("sd1", ALL), ("sd2-base", ALL),
                                           ("sdxl", ALL)])
def test_files_of_diffusers_and_peft_draw_what_diffusers_draws(name, targets, tmp_path):
    """Several ranks and alphas, which are in the metadata; text encoders too."""
    sd, pipe = copies(name)
    before = picture(sd)[0]
    texts = {"text_encoder": pipe.text_encoder,
             "text_encoder_2": getattr(pipe, "text_encoder_2", None)}
    made = {"unet_lora_layers": add_adapter(pipe.unet, 4, 6, targets),
            "unet_lora_adapter_metadata": config_of(pipe.unet)}
    for component, text in texts.items():
        if text is not None:
            made[f"{component}_lora_layers"] = add_adapter(text, 2, 1, TEXT)
            made[f"{component}_lora_adapter_metadata"] = config_of(text)
    pipe.save_lora_weights(tmp_path, **made)
    apply_lora(sd, tmp_path / DIFFUSERS_FILE)
    assert_changed(sd, before)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


def test_peft_folder_is_read(tmp_path):
    """As PeftModel.save_pretrained writes one of a UNet: the alpha is in adapter_config.json."""
    sd, pipe = copies("sd1")
    peft.get_peft_model(pipe.unet, peft_config(4, ATTENTION, lora_alpha=7)) \
        .save_pretrained(tmp_path)
    before = picture(sd)[0]
    apply_lora(sd, tmp_path)
    assert_changed(sd, before)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


@pytest.mark.parametrize("folder", [False, True])
def test_layers_outside_the_blocks_have_their_alpha_too(folder, tmp_path):
    """conv_in, conv_out and those of the time, in diffusers' file and in peft's folder, which
    names no network."""
    sd, pipe = copies("sd1")
    before, outside = picture(sd)[0], ["conv_in", "conv_out", "time_embedding.linear_1"]
    if folder:
        peft.get_peft_model(pipe.unet, peft_config(2, outside, lora_alpha=9)) \
            .save_pretrained(tmp_path)
    else:
        made = add_adapter(pipe.unet, 2, 9, outside)
        pipe.save_lora_weights(tmp_path, unet_lora_layers=made,
                               unet_lora_adapter_metadata=config_of(pipe.unet))
    apply_lora(sd, tmp_path if folder else tmp_path / DIFFUSERS_FILE)
    assert_changed(sd, before)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


def test_peft_folder_of_a_text_encoder_is_read(tmp_path):
    _, pipe = copies("sd1")
    peft.get_peft_model(pipe.text_encoder, peft_config(2, TEXT, lora_alpha=9)) \
        .save_pretrained(tmp_path)
    sd = copy_model("sd1")
    found = open_lora(tmp_path)
    assert len(found) == 4 * sd.preset.text_encoders[0].num_hidden_layers
    assert found.keys() <= layers(sd).keys()
    assert {change.alpha for change in found.values()} == {9.0}


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_kohya_file_draws_what_diffusers_draws(scale, tmp_path):
    """Written by diffusers' own converter, read here; and diffusers reads it too."""
    sd, pipe = copies("sd1")
    made, text = add_adapter(pipe.unet, 4, 4, ALL), add_adapter(pipe.text_encoder, 4, 4, TEXT)
    state = {f"unet.{name}": tensor for name, tensor in made.items()}
    for name, tensor in text.items():
        state[f"text_encoder.text_model.{name.removeprefix('text_model.')}"] = tensor
    kohya = {name.replace("lora_te1_", "lora_te_"): tensor  # as tools for one encoder write
             for name, tensor in convert_state_dict_to_kohya(state).items()}
    assert {name.split("_")[1] for name in kohya} == {"unet", "te"}
    for name in kohya:
        if name.endswith(".alpha"):
            kohya[name] = torch.tensor(2.5)
    save_contiguous(kohya, tmp_path / "k.safetensors")
    sd, pipe = copies("sd1")
    pipe.load_lora_weights(tmp_path, weight_name="k.safetensors", adapter_name="k")
    pipe.set_adapters("k", scale)
    apply_lora(sd, tmp_path / "k.safetensors", scale)
    assert_changed(sd, picture(pair("sd1")[0])[0])
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


def first_names_of_diffusers(state: dict) -> dict:
    """to_q.lora_A -> processor.to_q_lora.down, to_out.0.lora_A -> processor.to_out_lora.down, with
    no prefix."""
    renamed = {}
    for name, tensor in state.items():
        layer, part = name.replace("to_out.0", "to_out").rsplit(".lora_", 1)
        block, layer = layer.rsplit(".", 1)
        role = "down" if part.startswith("A") else "up"
        renamed[f"{block}.processor.{layer}_lora.{role}.weight"] = tensor
    return renamed


def test_older_names_are_read(tmp_path):
    _, pipe = copies("sd1")
    state = add_adapter(pipe.unet, 4, 4, ATTENTION)
    save_contiguous({f"unet.{name}": tensor for name, tensor in state.items()},
                    tmp_path / "new.safetensors")
    save_contiguous(first_names_of_diffusers(state), tmp_path / "old.safetensors")
    new, old = open_lora(tmp_path / "new.safetensors"), open_lora(tmp_path / "old.safetensors")
    assert new.keys() == old.keys() and len(new) == 8 * 10  # ten transformer blocks
    for name, change in new.items():
        for role in "down", "up":
            assert torch.equal(change.tensors[role].read(), old[name].tensors[role].read())
        assert change.alpha is None and old[name].alpha is None     # the rank


# --- files of this project ---

@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_is_saved_here_diffusers_draws_with(name, tmp_path):
    """LoRA(...) beside the layers, saved in kohya's names, loaded by diffusers: the same picture.
    Merged here: the same again."""
    sd, pipe = copies(name)
    before = picture(sd)[0]
    lora = LoRA(sd, 4, alpha=3, text=True)
    assert np.array_equal(picture(sd)[0], before)  # up is zero: nothing changes
    randomize_up(lora, 0.15).save(tmp_path / "mine.safetensors", torch.float32)
    assert_changed(sd, before)
    pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    theirs = picture_by_diffusers(pipe)
    assert_agree(picture(sd), theirs, 80)
    merged = copy_model(name)
    apply_lora(merged, tmp_path / "mine.safetensors")
    assert_agree(picture(merged), theirs, 80)


def test_known_size():
    """Rank 4 on the attention of SD 1.x: 797,184 numbers."""
    lora = LoRA(on_meta(StableDiffusion, PRESETS["sd1"]), 4)
    assert sum(p.numel() for p in lora.parameters()) == 797_184


def test_gradients_flow_into_the_lora_alone():
    sd = copy_model("sd1")
    lora = LoRA(sd, 2)
    for p in lora.parameters():
        p.requires_grad_()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    sd.unet(x, t, context).square().mean().backward()
    ups = [matrices["lora_up"].weight.grad for matrices in lora.layers.values()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in ups)
    assert all(p.grad is None for p in sd.unet.parameters())


def test_official_names_lead_to_the_same_layers(tmp_path, name="sdxl"):
    """Tools for SDXL call the UNet's layers by their official names; diffusers reads those too."""
    sd, pipe = copies(name)
    randomize_up(LoRA(sd, 2), 0.3).save(tmp_path / "a.safetensors", torch.float32)
    named = {layer_name: layer for layer_name, layer in layers(sd).items()}
    official = {layer: layer_name for layer_name, layer in named.items()
                if re.match("unet_(input|middle|output)", layer_name)}
    renamed = {f"lora_{layer_name}": f"lora_{official[layer]}"
               for layer_name, layer in named.items() if re.match("unet_(down|mid|up)", layer_name)}
    state = {re.sub(r"^\w+", lambda match: renamed[match[0]], key): tensor
             for key, tensor in load_file(tmp_path / "a.safetensors").items()}
    middle = "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight"
    assert middle in state
    save_file(state, tmp_path / "b.safetensors")
    dotted = {f"lora_unet_{part.replace('.', '_')}": f"diffusion_model.{part}"  # as ComfyUI's are
              for part, _ in sd.unet.named_modules()}
    save_file({re.sub(r"^\w+", lambda match: dotted[match[0]], key): tensor
               for key, tensor in state.items() if "_te" not in key}, tmp_path / "c.safetensors")
    found = open_lora(tmp_path / "b.safetensors")
    assert open_lora(tmp_path / "c.safetensors").keys() \
        == {layer for layer in found if layer.startswith("unet")}
    sd = copy_model(name)
    before = picture(sd)[0]
    apply_lora(sd, tmp_path / "b.safetensors")
    assert_changed(sd, before)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


def test_two_at_once_and_out_again(tmp_path):
    """Each with its own scale, as diffusers' adapters with weights; taken out with -scale."""
    sd, pipe = copies("sd1")
    for i, rank in enumerate((2, 5)):
        lora = randomize_up(LoRA(copy_model("sd1"), rank, text=bool(i)), 0.15)
        lora.save(tmp_path / f"{i}.safetensors", torch.float32)
        pipe.load_lora_weights(tmp_path, weight_name=f"{i}.safetensors", adapter_name=f"a{i}")
    pipe.set_adapters(["a0", "a1"], [0.7, -0.5])
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    scales = {tmp_path / "0.safetensors": 0.7, tmp_path / "1.safetensors": -0.5}
    for path, scale in scales.items():
        apply_lora(sd, path, scale)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)
    for path, scale in scales.items():
        apply_lora(sd, path, -scale)
    errors = [relative_error(tensor, before[name]) for name, tensor in sd.state_dict().items()
              if tensor.abs().max() > 0]
    assert max(errors) < 1e-6


def test_half_precision_weights_stay_half(tmp_path):
    """The sum is made in fp32 and rounded once."""
    sd = copy_model("sd1")
    lora = randomize_up(LoRA(copy_model("sd1"), 4), 1.0)
    lora.save(tmp_path / "a.safetensors", torch.float32)
    half = deepcopy(sd)
    half.unet.half()
    apply_lora(sd, tmp_path / "a.safetensors")
    apply_lora(half, tmp_path / "a.safetensors")
    for (name, p), q in zip(sd.unet.named_parameters(), half.unet.parameters()):
        assert q.dtype == torch.float16, name
        assert (q.float() - p).abs().max() <= 1.001 * 2**-10 * p.abs().max(), name


# --- what is refused ---

LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
DOWN, UP = f"{LAYER}.lora_down.weight", f"{LAYER}.lora_up.weight"
OTHER_FAMILY = "for another family of models: "


GOOD = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 128),
        "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (128, 2)}
TO_K = LAYER.replace("attn1_to_q", "attn2_to_")


def shaped(shapes: dict) -> dict:
    return {name: torch.full(shape, 0.1) for name, shape in shapes.items()}


@pytest.mark.parametrize("state, said", [
    ({DOWN: (2, 64), UP: (64, 2)},
     OTHER_FAMILY + "unet_down_blocks_0.* is 64x64 there and 32x32 here"),
    ({f"{LAYER}9.lora_down.weight": (2, 32), f"{LAYER}9.lora_up.weight": (32, 2)},
     OTHER_FAMILY + ".*to_q9: it is 32x32 there and not here"),
    (GOOD | {f"{TO_K}{letter}.lora_{side}.weight": shape for letter in "kv"
             for side, shape in (("down", (2, 99)), ("up", (32, 2)))},
     OTHER_FAMILY + ".*attn2_to_k: it is 32x99 there and 32x32 here"),
    ({"diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight": (2, 32),
      "diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight": (96, 2)}, "looks like Flux"),
    (GOOD | {DOWN: (2, 32)}, "damaged: of unet_.* it holds only down"),
    (GOOD | {f"{LAYER}.hada_w1_a": (2, 32)}, "damaged: of unet_.*LoHa it holds only hada_w1_a"),
    (GOOD | {f"{LAYER}.lokr_w1": (2, 32)}, "damaged: of unet_.*LoKr it holds only lokr_w1"),
    (GOOD | {f"{LAYER}.dora_scale": (1, 32)}, "damaged: of unet_.* it holds only dora_scale"),
    (GOOD | {f"{LAYER}.oft_blocks": (1, 32)}, "holds .*oft_blocks, no LoRA, LoHa"),
    (GOOD | {f"{LAYER}.weight": (32, 32)}, "holds .*to_q.weight, no LoRA"),
    (GOOD | {f"{LAYER}.oft_blocks": (1, 32), f"{TO_K}k.oft_blocks": (1, 32)}, "and 1 more, no L"),
    (GOOD | {DOWN: (2, 32), UP: (32, 2), f"{LAYER.replace('lora_', 'lycoris_')}.lora_up.weight":
             (32, 2)}, "holds lycoris_.*lora_up.weight twice, under two names"),
    ({"model.diffusion_model.out.2.weight": (4, 4)}, "is no LoRA: it holds model.diffusion"),
    ({}, "holds no tensors"),
])
def test_what_is_no_lora_for_this_model_is_refused_and_changes_nothing(state, said, tmp_path):
    sd = copy_model("sd1")
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    save_file(shaped(state), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said) as error:
        apply_lora(sd, tmp_path / "x.safetensors")
    assert "\n" not in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.state_dict().items())


@pytest.mark.parametrize("state, count", [
    ({DOWN: (2, 64), UP: (64, 2)}, "1 of 2"),
    ({f"{LAYER}9.lora_down.weight": (2, 32), f"{LAYER}9.lora_up.weight": (32, 2)}, "1 of 2"),
    ({DOWN: (2, 32), UP: (32, 2), f"{LAYER}.lora_mid.weight": (2, 2, 3, 3)}, "1 of 2"),
    ({f"{LAYER}.diff_b": (32,)}, "1 of 2"),     # to_q has no bias
    ({DOWN: (99_000, 32), UP: (32, 99_000)}, "1 of 2"),
    ({f"{LAYER}{i}.alpha": () for i in range(3)}, None)])
def test_layers_that_do_not_fit_are_counted(state, count, tmp_path):
    sd = copy_model("sd1")
    alone = copy_model("sd1")
    save_file(shaped(GOOD), tmp_path / "a.safetensors")
    save_file(shaped(GOOD | state), tmp_path / "b.safetensors")
    apply_lora(alone, tmp_path / "a.safetensors")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        apply_lora(sd, tmp_path / "b.safetensors")
    lines = [str(one.message) for one in caught]
    assert count is None and lines == [] or f"{count} layers do not fit this model" in lines[0]
    assert same_weights(sd, alone) == 0


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_a_file_is_found_while_it_is_read(value, tmp_path):
    state = shaped({DOWN: (2, 32), UP: (32, 2)})
    state[UP][3, 1] = value
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="there is NaN or infinity in unet_.*to_q, up"):
        apply_lora(copy_model("sd1"), tmp_path / "x.safetensors")


# --- all namings are one ---

def same_weights(a: StableDiffusion, b: StableDiffusion) -> float:
    theirs = b.state_dict()
    return max(float((tensor - theirs[name]).abs().max())
               for name, tensor in a.state_dict().items())


def kohya_file(name: str) -> dict:
    """A random LoRA of a model, text encoders too: rank 4, alpha 2, under kohya's names."""
    lora = randomize_up(LoRA(copy_model(name), 4, alpha=2, text=True), 0.3)
    state = {key.removeprefix("layers."): tensor.clone()
             for key, tensor in lora.state_dict().items()}
    return state | {f"{layer}.alpha": torch.tensor(2.0) for layer in lora.layers}


def merged(name: str, state: dict, path, metadata: dict | None = None) -> StableDiffusion:
    sd = copy_model(name)
    if path.suffix == ".safetensors":
        save_file(state, path, metadata)
    else:
        torch.save(state, path)
    apply_lora(sd, path)
    return sd


def dotted_names(sd: StableDiffusion) -> dict[str, str]:
    """kohya's name of a layer -> "unet.official.name", "te1.encoder...", "te2.encoder..."."""
    found = layers(sd)
    official = {id(module): name for name, module in sd.unet.named_modules()}
    names = {}
    for name, module in found.items():
        if id(module) in official:
            names[f"lora_{name}"] = f"unet.{official[id(module)]}"
    for number, encoder in enumerate(sd.text_encoders, 1):
        for name, _ in encoder.named_modules():
            end = name.replace(".", "_")
            for start in [f"te{number}"] + (["te"] if len(sd.text_encoders) == 1 else []):
                names[f"lora_{start}_text_model_{end}"] = f"te{number}.text_model.{name}"
    return names


STARTS = {  # unet., te1. and te2. as other tools have them
    "OneTrainer": ("unet.", "clip_l.", "clip_g."),
    "ComfyUI": ("diffusion_model.", "text_encoders.clip_l.transformer.",
                "text_encoders.clip_g.transformer."),
    "peft": ("base_model.model.unet.", "base_model.model.text_encoder.",
             "base_model.model.text_encoder_2."),
    "lycoris": ("lycoris_unet_", "lycoris_te1_", "lycoris_te2_"),
    "short": ("unet.", "te1.", "te2."),
    "official": ("model.diffusion_model.", "text_encoder.", "text_encoder_2."),
}
ROLE_NAMES = {
    "kohya": {}, "peft": {"lora_down": "lora_A", "lora_up": "lora_B"},
    "adapter": {"lora_down.weight": "lora_A.default.weight",
                "lora_up.weight": "lora_B.default.weight"},
    "diffusers": {"lora_down": "lora.down", "lora_up": "lora.up"},
    "linear": {"lora_down": "lora_linear_layer.down", "lora_up": "lora_linear_layer.up"}}


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_every_naming_gives_the_same_weights(name, tmp_path):
    """30 of them for sd1; for sdxl, which is slower, each beginning once."""
    state = kohya_file(name)
    file = tmp_path / "x.safetensors"
    like = merged(name, state, file)
    assert same_weights(like, copy_model(name)) > 0.1
    dotted = dotted_names(copy_model(name))
    every = list(ROLE_NAMES.values())
    for i, starts in enumerate(STARTS.values()):
        for roles in every if name == "sd1" else [every[i % len(every)]]:
            renamed = {}
            for key, tensor in state.items():
                layer, _, role = key.partition(".")
                for ours, theirs in zip(("unet.", "te1.", "te2."), starts):
                    if dotted[layer].startswith(ours):
                        layer = theirs + dotted[layer].removeprefix(ours)
                        break
                for ours, theirs in roles.items():
                    role = role.replace(ours, theirs)
                renamed[f"{layer}.{role}"] = tensor
            assert len(renamed) == len(state)
            assert same_weights(merged(name, renamed, file), like) == 0


def test_alphas_and_dtypes_of_all_kinds(tmp_path):
    state, file = kohya_file("sd1"), tmp_path / "x.safetensors"
    like = merged("sd1", state, file)

    def alphas(change) -> dict:
        return {key: change(tensor) if key.endswith(".alpha") else tensor
                for key, tensor in state.items()}

    for change in (lambda t: t.reshape(1), lambda t: t.long(), lambda t: t.reshape(1, 1, 1, 1),
                   lambda t: t.to(torch.float8_e4m3fn), lambda t: t.expand(4).clone()):
        assert same_weights(merged("sd1", alphas(change), file), like) == 0
    without = {key: tensor for key, tensor in state.items() if not key.endswith(".alpha")}
    metadata = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    assert same_weights(merged("sd1", without, file, metadata), like) == 0
    assert same_weights(merged("sd1", without, file, {"ss_network_alpha": "None"}), like) > 0.01
    double = {key: tensor.double() for key, tensor in state.items()}
    assert same_weights(merged("sd1", double, file), like) == 0
    pickled = tmp_path / "x.pt"
    assert same_weights(merged("sd1", {"state_dict": state}, pickled), like) == 0
    for wrong in (torch.tensor(float("nan")), torch.tensor([1.0, 2]), torch.zeros(0)):
        with pytest.raises(UserError, match="alpha"):
            merged("sd1", alphas(lambda t, wrong=wrong: wrong.clone()), file)


def test_projection_of_the_text_encoder(tmp_path):
    """OneTrainer's lora_te2_text_projection; the first encoder has none, which is told."""
    state = {"lora_te2_text_projection.lora_down.weight": torch.randn(4, 48),
             "lora_te2_text_projection.lora_up.weight": torch.randn(48, 4),
             "lora_te2_text_projection.alpha": torch.tensor(2.0)}
    change = 0.5 * state["lora_te2_text_projection.lora_up.weight"] \
        @ state["lora_te2_text_projection.lora_down.weight"]
    sd = merged("sdxl", state, tmp_path / "x.safetensors")
    before = copy_model("sdxl").text_encoders[1].text_projection
    assert torch.allclose(sd.text_encoders[1].text_projection, before + change.T, atol=1e-5)
    first = {"lora_te1_text_projection.lora_down.weight": torch.randn(4, 32),
             "lora_te1_text_projection.lora_up.weight": torch.randn(32, 4)}
    with pytest.warns(UserWarning, match="1 of 2 layers do not fit"):
        both = merged("sdxl", state | first, tmp_path / "y.safetensors")
    assert same_weights(both, sd) == 0


def test_learned_words_in_a_lora(tmp_path):
    state = shaped(GOOD) | {"bundle_emb.zyxcat.emb_params": torch.randn(2, 32)}
    sd = merged("sd1", state, tmp_path / "x.safetensors")
    assert sd.text_encoders[0].tokenizer("zyxcat")[0, 1:3].tolist() == [49408, 49409]
    with pytest.warns(UserWarning, match="'zyxcat' is left out: .* 1 of 2 text encoders"):
        merged("sdxl", shaped({
            "lora_unet_mid_block_resnets_0_time_emb_proj.diff_b": (128,)}) | {
            "bundle_emb.zyxcat.emb_params": torch.randn(2, 32)}, tmp_path / "y.safetensors")


def test_text_encoders_have_a_scale_of_their_own(tmp_path):
    state, file = kohya_file("sd1"), tmp_path / "x.safetensors"
    save_file(state, file)
    sd = copy_model("sd1")
    apply_lora(sd, file, 0.0, 1.0)
    like, before = merged("sd1", state, file), copy_model("sd1")
    text = {name for name in like.state_dict() if name.startswith("cond_stage")}
    for name, tensor in sd.state_dict().items():
        theirs = (like if name in text else before).state_dict()[name]
        assert torch.equal(tensor, theirs)


# --- other kinds, against lycoris-lora and peft ---

LAYERS = [nn.Linear(24, 36), nn.Conv2d(12, 18, 3, padding=1), nn.Conv2d(12, 18, 1)]
KINDS = [
    (LoConModule, {}), (LoConModule, {"use_tucker": True}),
    (LoConModule, {"weight_decompose": True}),
    (LoConModule, {"weight_decompose": True, "wd_on_out": False}), (LoConModule, {"rs_lora": True}),
    (LohaModule, {}), (LohaModule, {"use_tucker": True}), (LohaModule, {"weight_decompose": True}),
    (LokrModule, {"factor": 3}), (LokrModule, {"factor": 3, "decompose_both": True}),
    (LokrModule, {"factor": 3, "use_tucker": True}),
    (LokrModule, {"factor": 3, "full_matrix": True}),
    (LokrModule, {"factor": 2, "weight_decompose": True}), (FullModule, {}), (IA3Module, {}),
    (IA3Module, {"train_on_input": True})]


@pytest.mark.parametrize("kind, options", KINDS)
@pytest.mark.parametrize("number", range(3))
def test_weights_are_those_of_lycoris(kind, options, number):
    layer = deepcopy(LAYERS[number]).requires_grad_(False)
    theirs = kind("x", layer, 1.0, 2, 3, **options)
    for p in theirs.parameters():
        p.data.add_(torch.randn_like(p) * 0.3)
    state = theirs.custom_state_dict() if kind is not FullModule else {"diff": theirs.weight}
    if state is None:
        state = theirs.state_dict()
    tensors = {}
    for name, tensor in state.items():
        role = lora_names.split(f"x.{name}")[1]
        tensors[role] = tensor.detach().clone()
    alpha = tensors.pop("alpha", None)
    alpha = None if alpha is None or lycoris.whole_lokr(tensors.keys()) else float(alpha)
    if kind in (LohaModule, LokrModule):    # their get_merged_weight has alpha / rank twice
        expected = layer.weight + theirs.get_weight(layer.weight.shape)
        if theirs.wd:
            expected = theirs.apply_weight_decompose(expected)
    else:
        expected = theirs.get_merged_weight(1.0)[0].reshape(layer.weight.shape)
    if kind is FullModule:
        expected = layer.weight + theirs.weight
    found, expected = (weight.detach() for weight in (
        lycoris.changed_weight(tensors, layer.weight, alpha, False, 1.0), expected))
    assert not torch.allclose(found, layer.weight, atol=1e-3)
    assert relative_error(found, expected) < 1e-6
    none = lycoris.changed_weight(tensors, layer.weight, alpha, False, 0.0)
    assert torch.equal(none, layer.weight)


@pytest.mark.parametrize("settings", [
    {"use_rslora": True}, {"use_dora": True}, {"alpha_pattern": {"to_k": 7, "attn1.to_v": 2}},
    {"use_rslora": True, "use_dora": True}, {"rank_pattern": {"to_q": 2}}])
def test_other_kinds_of_peft_draw_what_peft_draws(settings, tmp_path):
    sd, pipe = copies("sd1")
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=[*ATTENTION, "conv1"],
                             init_lora_weights=False, **settings)
    peft.get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    before = picture(sd)[0]
    apply_lora(sd, tmp_path)
    assert_changed(sd, before)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


@pytest.mark.parametrize("config", [
    peft.LoHaConfig(r=4, alpha=24, target_modules=ATTENTION, init_weights=False),
    peft.LoKrConfig(r=2, alpha=6, target_modules=ATTENTION, init_weights=False),
    peft.LoKrConfig(r=64, alpha=96, target_modules=ATTENTION, init_weights=False,
                    rank_pattern={"to_k": 96})])    # both matrices whole: peft scales them too
def test_loha_and_lokr_of_peft(config, tmp_path):
    sd, pipe = copies("sd1")
    peft.get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    before = picture(sd)[0]
    apply_lora(sd, tmp_path)
    assert_changed(sd, before)
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


@pytest.mark.parametrize("up, alpha, said", [
    (torch.ones(32, 2, dtype=torch.int8), 1.0, "up in numbers of the type int8, perhaps quantized"),
    (torch.ones(32, 2), float("nan"), "the alpha of unet_.* is nan, no number")])
def test_numbers_that_are_none_are_refused(up, alpha, said, tmp_path):
    state = shaped({DOWN: (2, 32)}) | {UP: up, f"{LAYER}.alpha": torch.tensor(alpha)}
    save_file(state, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        apply_lora(copy_model("sd1"), tmp_path / "x.safetensors")


def test_what_changes_nothing_is_told(tmp_path):
    """Never trained, alpha 0, or lost in the rounding."""
    sd = copy_model("sd1")
    for state in ({UP: torch.zeros(32, 2)}, {f"{LAYER}.alpha": torch.tensor(0.0)},
                  {UP: torch.full((32, 2), 1e-12)}):
        save_file(shaped({DOWN: (2, 32), UP: (32, 2)}) | state, tmp_path / "x.safetensors")
        with pytest.warns(UserWarning, match="x.safetensors changes nothing: its numbers are 0"):
            apply_lora(sd, tmp_path / "x.safetensors")


def test_whole_lokr_of_lycoris_and_matrices_that_do_not_fit(tmp_path, recwarn):
    """LyCORIS writes an alpha beside whole matrices, and it counts for nothing."""
    wanted, whole = copy_model("sd1"), {f"{LAYER}.lokr_w1": (2, 2), f"{LAYER}.lokr_w2": (16, 16)}
    state = shaped(whole)
    weight = layers(wanted)[lora_names.layer_name(LAYER)].weight
    weight.data += torch.kron(state[f"{LAYER}.lokr_w1"], state[f"{LAYER}.lokr_w2"])
    save_file(state | {f"{LAYER}.alpha": torch.tensor(7.0)}, tmp_path / "x.safetensors")
    sd = copy_model("sd1")
    apply_lora(sd, tmp_path / "x.safetensors")
    found = layers(sd)[lora_names.layer_name(LAYER)].weight
    assert torch.allclose(found, weight) and not recwarn.list
    bad = f"{LAYER[:-4]}to_k"
    save_file(state | shaped({f"{bad}.lora_down.weight": (2, 32), f"{bad}.lora_up.weight": (32, 2),
                              f"{bad}.lora_mid.weight": (3, 3)}), tmp_path / "y.safetensors")
    with pytest.warns(UserWarning, match="1 of 2 layers .* its down, mid, up do not fit together"):
        apply_lora(copy_model("sd1"), tmp_path / "y.safetensors")


@pytest.mark.parametrize("about", [
    {"peft_type": "OFT"}, {"init_lora_weights": "pissa_niter_4"}, {"bias": "all"},
    {"modules_to_save": ["conv_in"]}, {"lora_alpha": "many"}, {"lora_alpha": None, "alpha": [1]},
    {"alpha_pattern": {"(a+)+": 1}}, {"layer_replication": [[0, 4]]}, {"lora_alpha": 1e300}])
def test_settings_of_peft_that_change_the_meaning_are_refused(about, tmp_path):
    save_file(shaped({"unet.mid_block.attentions.0.proj_in.lora_A.weight": (2, 128),
                      "unet.mid_block.attentions.0.proj_in.lora_B.weight": (128, 2)}),
              tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError) as error:
        open_lora(tmp_path)
    assert "\n" not in str(error.value)


def test_odd_files_end_in_a_line(tmp_path):
    """60 random changes of a good file's names and shapes: applied, told, or refused."""
    rng, file = random.Random(0), tmp_path / "x.safetensors"
    good = shaped(GOOD | {DOWN: (2, 32), UP: (32, 2), f"{LAYER}.alpha": ()})
    for _ in range(60):
        state = dict(good)
        for name in rng.sample(sorted(state), rng.randint(1, 3)):
            tensor = state.pop(name)
            at = rng.randrange(len(name))
            name = rng.choice([name, name[:at] + rng.choice("._x0A") + name[at + 1:], name[at:],
                               name + rng.choice(["", ".x", ".default", "9"])])
            shape = rng.choice([tensor.shape, (), (1,), (0,), (2, 2), (3, 5, 1, 1), (2, 0)])
            state[name] = torch.full(shape, rng.choice([0.1, 1e30, float("nan")]))
        save_file(state, file)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                apply_lora(copy_model("sd1"), file)
            except UserError as error:
                assert "\n" not in str(error)


def test_models_without_the_layers_are_refused(tmp_path):
    """Never silently nothing: another UNet, one without attention, another text encoder."""
    sd = copy_model("sd1")
    LoRA(sd, 2).save(tmp_path / "a.safetensors")
    other = copy_model("sd1")
    other.unet = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="needs the UNet of model.py, and this model has Linear"):
        LoRA(other, 2)
    with pytest.raises(UserError, match="needs the UNet of model.py"):
        apply_lora(other, tmp_path / "a.safetensors")
    other = copy_model("sd1")
    other.unet.middle_block = other.unet.input_blocks = other.unet.output_blocks = None
    with pytest.raises(UserError, match="found no attention layers in unet"):
        LoRA(other, 2)
    other = copy_model("sd1")
    other.text_encoders[0].encoder = torch.nn.Identity()
    with pytest.raises(UserError, match="found no attention layers in text_encoder"):
        LoRA(other, 2, text=True)
