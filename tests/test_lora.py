"""LoRA files of every naming, against peft and diffusers. No downloads.

Small random models. The LoRAs are made by peft and written by diffusers or peft, or by this
project and read by diffusers.
"""
import re
from copy import deepcopy

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

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

def copies(name: str):
    """A small model and diffusers' pipeline with the same weights, to be changed."""
    pipeline = diffusers.StableDiffusionPipeline
    if len(PRESETS[name].text_encoders) == 2:
        pipeline = diffusers.StableDiffusionXLPipeline
    sd, pipe = pair(name, pipeline)
    pipe = pipeline(**{part: deepcopy(module) for part, module in pipe.components.items()})
    pipe.scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        set_alpha_to_one=False, steps_offset=1)
    pipe.set_progress_bar_config(disable=True)
    return deepcopy(sd), pipe


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
    sd, _ = copies("sd1")
    found = open_lora(tmp_path)
    assert len(found) == 4 * sd.preset.text_encoders[0].num_hidden_layers
    assert found.keys() <= layers(sd).keys() and {alpha for *_, alpha in found.values()} == {9.0}


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
    for name, (down, up, alpha) in new.items():
        assert torch.equal(down, old[name][0]) and torch.equal(up, old[name][1])
        assert alpha == old[name][2] == 4


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
    merged, _ = copies(name)
    apply_lora(merged, tmp_path / "mine.safetensors")
    assert_agree(picture(merged), theirs, 80)


def test_known_size():
    """Rank 4 on the attention of SD 1.x: 797,184 numbers."""
    lora = LoRA(on_meta(StableDiffusion, PRESETS["sd1"]), 4)
    assert sum(p.numel() for p in lora.parameters()) == 797_184


def test_gradients_flow_into_the_lora_alone():
    sd, _ = copies("sd1")
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
    sd, _ = copies(name)
    before = picture(sd)[0]
    apply_lora(sd, tmp_path / "b.safetensors")
    assert_changed(sd, before)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    assert_agree(picture(sd), picture_by_diffusers(pipe), 80)


def test_two_at_once_and_out_again(tmp_path):
    """Each with its own scale, as diffusers' adapters with weights; taken out with -scale."""
    sd, pipe = copies("sd1")
    for i, rank in enumerate((2, 5)):
        lora = randomize_up(LoRA(copies("sd1")[0], rank, text=bool(i)), 0.15)
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
    sd, _ = copies("sd1")
    lora = randomize_up(LoRA(copies("sd1")[0], 4), 1.0)
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


@pytest.mark.parametrize("state, said", [
    ({DOWN: (2, 64), UP: (64, 2)},
     OTHER_FAMILY + "unet_down_blocks_0.* is 64x64 there and 32x32 here"),
    ({f"{LAYER}9.lora_down.weight": (2, 32), f"{LAYER}9.lora_up.weight": (32, 2)},
     OTHER_FAMILY + ".*to_q9 is 32x32 there and not here"),
    ({DOWN: (2, 32)}, "damaged: of unet_.* it holds only down"),
    ({f"{LAYER}.hada_w1_a": (2, 32)}, "no plain LoRA: it holds .*hada_w1_a"),
    ({DOWN: (2, 32), UP: (32, 2), f"{LAYER}.dora_scale": (1, 32)},
     "no plain LoRA: it holds .*dora_scale"),
    ({}, "holds no tensors"),
])
def test_what_is_no_lora_for_this_model_is_refused_and_changes_nothing(state, said, tmp_path):
    sd, _ = copies("sd1")
    before = {name: tensor.clone() for name, tensor in sd.state_dict().items()}
    good = {"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": (2, 128),
            "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": (128, 2)}
    shapes = good | state if state else {}
    save_file({name: torch.ones(shape) for name, shape in shapes.items()},
              tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        apply_lora(sd, tmp_path / "x.safetensors")
    assert all(torch.equal(tensor, before[name]) for name, tensor in sd.state_dict().items())


@pytest.mark.parametrize("key", ["use_rslora", "use_dora"])
def test_other_kinds_of_peft_are_refused(key, tmp_path):
    _, pipe = copies("sd1")
    config = peft.LoraConfig(r=4, target_modules=ATTENTION, **{key: True})
    peft.get_peft_model(pipe.unet, config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no plain LoRA: "):
        open_lora(tmp_path)


def test_models_without_the_layers_are_refused(tmp_path):
    """Never silently nothing: another UNet, one without attention, another text encoder."""
    sd, _ = copies("sd1")
    LoRA(sd, 2).save(tmp_path / "a.safetensors")
    other, _ = copies("sd1")
    other.unet = torch.nn.Linear(2, 2)
    with pytest.raises(UserError, match="needs the UNet of model.py, and this model has Linear"):
        LoRA(other, 2)
    with pytest.raises(UserError, match="needs the UNet of model.py"):
        apply_lora(other, tmp_path / "a.safetensors")
    other, _ = copies("sd1")
    other.unet.middle_block = other.unet.input_blocks = other.unet.output_blocks = None
    with pytest.raises(UserError, match="found no attention layers in unet"):
        LoRA(other, 2)
    other, _ = copies("sd1")
    other.text_encoders[0].encoder = torch.nn.Identity()
    with pytest.raises(UserError, match="found no attention layers in text_encoder"):
        LoRA(other, 2, text=True)
