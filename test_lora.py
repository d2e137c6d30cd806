"""LoRA files of every naming, and words of textual inversion, against peft and diffusers. No downloads.

    pip install -r requirements-test.txt
    pytest test_lora.py

Small random models as in test_family.py. The LoRAs are made by peft and written by diffusers or peft, or by this project and read by diffusers.
"""
import json
import re
from copy import deepcopy

import diffusers
import numpy as np
import peft
import pytest
import torch
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import load_file, save_file

from lora import LoRA, add_embedding, apply_lora, layers, open_lora
from sd import PRESETS, StableDiffusion, UserError
from test_family import agree, ours, pair, small, theirs
from test_sd import PROMPTS, on_meta, psnr, random_model, relative_error, same_numbers_every_time  # noqa: F401

pytestmark = pytest.mark.filterwarnings("ignore")  # diffusers' and peft's, about each other
ATTENTION, TEXT = ["to_q", "to_k", "to_v", "to_out.0"], ["q_proj", "k_proj", "v_proj", "out_proj"]
ALL = ATTENTION + ["proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv"]
SETTINGS = dict(negative_prompt=PROMPTS["negative_prompt"], steps=4, sampler="ddim")


def copies(name: str):
    """A small model and diffusers' pipeline with the same weights, to be changed."""
    pipeline = diffusers.StableDiffusionXLPipeline if PRESETS[name].text_2 else diffusers.StableDiffusionPipeline
    sd, pipe = pair(name, pipeline)
    pipe = pipeline(**{part: deepcopy(module) for part, module in pipe.components.items()})
    pipe.scheduler = diffusers.DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                                             set_alpha_to_one=False, steps_offset=1)
    pipe.set_progress_bar_config(disable=True)
    return deepcopy(sd), pipe


def adapter(model: torch.nn.Module, rank: int, alpha: float, targets: list[str]) -> dict[str, torch.Tensor]:
    """peft's random LoRA of a model of diffusers or transformers, which then has it; its tensors."""
    model.add_adapter(peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=False))
    for name, p in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(p, std=0.15)
    return peft.get_peft_model_state_dict(model)


def drawn(pipe):
    return theirs(pipe, negative_prompt=PROMPTS["negative_prompt"], num_inference_steps=4, guidance_scale=pipe_guidance(pipe), height=64, width=64)


def pipe_guidance(pipe) -> float:
    return 5.0 if hasattr(pipe, "text_encoder_2") else 7.5


def pipe_layers(pipe, unet: dict, *texts: dict) -> dict:
    names = ["text_encoder_lora_layers", "text_encoder_2_lora_layers"]
    return {"unet_lora_layers": unet} | dict(zip(names, texts))


def changes(sd, before) -> None:
    """The LoRA must matter for a test to mean something."""
    assert psnr(ours(sd, **SETTINGS)[0], before) < 40


@pytest.mark.parametrize("name, targets", [("sd1", ATTENTION), ("sd1", ALL), ("sd2-base", ALL), ("sdxl", ALL)])
def test_files_of_diffusers_and_peft_draw_what_diffusers_draws(name, targets, tmp_path):
    """Several ranks and alphas, told in the metadata; text encoders too."""
    sd, pipe = copies(name)
    before = ours(sd, **SETTINGS)[0]
    texts = [text for text in (pipe.text_encoder, getattr(pipe, "text_encoder_2", None)) if text is not None]
    made = [adapter(pipe.unet, 4, 6, targets)] + [adapter(text, 2, 1, TEXT) for text in texts]
    about = dict(zip(["unet_lora_adapter_metadata", "text_encoder_lora_adapter_metadata", "text_encoder_2_lora_adapter_metadata"],
                     [model.peft_config["default"].to_dict() for model in (pipe.unet, *texts)]))
    pipe.save_lora_weights(tmp_path, **pipe_layers(pipe, *made), **about)
    apply_lora(sd, tmp_path / "pytorch_lora_weights.safetensors")
    changes(sd, before)
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)


def test_peft_folder_is_read(tmp_path):
    """As PeftModel.save_pretrained writes one of a UNet: the alpha lies in adapter_config.json."""
    sd, pipe = copies("sd1")
    model = peft.get_peft_model(pipe.unet, peft.LoraConfig(r=4, lora_alpha=7, target_modules=ATTENTION, init_lora_weights=False))
    model.save_pretrained(tmp_path)
    before = ours(sd, **SETTINGS)[0]
    apply_lora(sd, tmp_path)
    changes(sd, before)
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)


@pytest.mark.parametrize("folder", [False, True])
def test_layers_outside_the_blocks_have_their_alpha_too(folder, tmp_path):
    """conv_in, conv_out and those of the time, in diffusers' file and in peft's folder, which names no network."""
    sd, pipe = copies("sd1")
    before, outside = ours(sd, **SETTINGS)[0], ["conv_in", "conv_out", "time_embedding.linear_1"]
    if folder:
        model = peft.get_peft_model(pipe.unet, peft.LoraConfig(r=2, lora_alpha=9, target_modules=outside, init_lora_weights=False))
        model.save_pretrained(tmp_path)
    else:
        made = adapter(pipe.unet, 2, 9, outside)
        pipe.save_lora_weights(tmp_path, unet_lora_layers=made, unet_lora_adapter_metadata=pipe.unet.peft_config["default"].to_dict())
    apply_lora(sd, tmp_path if folder else tmp_path / "pytorch_lora_weights.safetensors")
    changes(sd, before)
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)


def test_peft_folder_of_a_text_encoder_is_read(tmp_path):
    _, pipe = copies("sd1")
    peft.get_peft_model(pipe.text_encoder, peft.LoraConfig(r=2, lora_alpha=9, target_modules=TEXT, init_lora_weights=False)).save_pretrained(tmp_path)
    sd, _ = copies("sd1")
    found = open_lora(tmp_path)
    assert len(found) == 4 * sd.config.text.num_hidden_layers and found.keys() <= layers(sd).keys() and {alpha for *_, alpha in found.values()} == {9.0}


@pytest.mark.parametrize("scale", [1.0, 0.4])
def test_kohya_file_draws_what_diffusers_draws(scale, tmp_path):
    """Written by diffusers' own converter, read here; and diffusers reads it too."""
    sd, pipe = copies("sd1")
    made, text = adapter(pipe.unet, 4, 4, ALL), adapter(pipe.text_encoder, 4, 4, TEXT)
    state = {f"unet.{name}": t for name, t in made.items()} | {f"text_encoder.text_model.{name.removeprefix('text_model.')}": t for name, t in text.items()}
    kohya = {name.replace("lora_te1_", "lora_te_"): t for name, t in convert_state_dict_to_kohya(state).items()}  # as tools for one encoder write
    assert {name.split("_")[1] for name in kohya} == {"unet", "te"}
    for name in kohya:
        if name.endswith(".alpha"):
            kohya[name] = torch.tensor(2.5)
    save_file({name: t.contiguous() for name, t in kohya.items()}, tmp_path / "k.safetensors")
    sd, pipe = copies("sd1")
    pipe.load_lora_weights(tmp_path, weight_name="k.safetensors", adapter_name="k")
    pipe.set_adapters("k", scale)
    apply_lora(sd, tmp_path / "k.safetensors", scale)
    changes(sd, ours(pair("sd1")[0], **SETTINGS)[0])
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)


@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_what_is_saved_here_diffusers_draws_with(name, tmp_path):
    """LoRA(...) beside the layers, saved in kohya's names, loaded by diffusers: the same picture. Merged here: the same again."""
    sd, pipe = copies(name)
    before = ours(sd, **SETTINGS)[0]
    beside = LoRA(sd, 4, alpha=3, text=True)
    assert np.array_equal(ours(sd, **SETTINGS)[0], before)                    # up is zero: nothing changes
    for pair_of in beside.layers.values():
        torch.nn.init.normal_(pair_of["lora_up"].weight, std=0.15)
    beside.save(tmp_path / "mine.safetensors", torch.float32)
    changes(sd, before)
    pipe.load_lora_weights(tmp_path, weight_name="mine.safetensors")
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)
    merged, _ = copies(name)
    apply_lora(merged, tmp_path / "mine.safetensors")
    agree(ours(merged, **SETTINGS), drawn(pipe), 80)


def test_known_size():
    """Rank 4 on the attention of SD 1.x: 797,184 numbers."""
    assert sum(p.numel() for p in LoRA(on_meta(StableDiffusion, PRESETS["sd1"]), 4).parameters()) == 797_184


def test_gradients_flow_into_the_lora_alone():
    sd, _ = copies("sd1")
    beside = LoRA(sd, 2)
    for p in beside.parameters():
        p.requires_grad_()
    x, t, context = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 77, 32)
    sd.unet(x, t, context).square().mean().backward()
    ups = [pair_of["lora_up"].weight.grad for pair_of in beside.layers.values()]
    assert all(grad is not None and grad.abs().max() > 0 for grad in ups)
    assert all(p.grad is None for p in sd.unet.parameters())


def test_official_names_lead_to_the_same_layers(tmp_path, name="sdxl"):
    """Tools for SDXL call the UNet's layers by their official names; diffusers reads those too."""
    sd, pipe = copies(name)
    beside = LoRA(sd, 2)
    for one in beside.layers.values():
        torch.nn.init.normal_(one["lora_up"].weight, std=0.3)
    beside.save(tmp_path / "a.safetensors", torch.float32)
    official = {id(layer): layer_name for layer_name, layer in layers(sd).items() if re.match("unet_(input|middle|output)", layer_name)}
    renamed = {f"lora_{layer_name}": f"lora_{official[id(layer)]}" for layer_name, layer in layers(sd).items() if re.match("unet_(down|mid|up)", layer_name)}
    state = {re.sub(r"^\w+", lambda match: renamed[match[0]], key): t for key, t in load_file(tmp_path / "a.safetensors").items()}
    assert "lora_unet_middle_block_1_transformer_blocks_0_attn1_to_q.lora_up.weight" in state
    save_file(state, tmp_path / "b.safetensors")
    dotted = {f"lora_unet_{part.replace('.', '_')}": f"diffusion_model.{part}" for part, _ in sd.unet.named_modules()}  # as ComfyUI writes them
    save_file({re.sub(r"^\w+", lambda match: dotted[match[0]], key): t for key, t in state.items() if "_te" not in key}, tmp_path / "c.safetensors")
    assert open_lora(tmp_path / "c.safetensors").keys() == {layer for layer in open_lora(tmp_path / "b.safetensors") if layer.startswith("unet")}
    sd, _ = copies(name)
    before = ours(sd, **SETTINGS)[0]
    apply_lora(sd, tmp_path / "b.safetensors")
    changes(sd, before)
    pipe.load_lora_weights(tmp_path, weight_name="b.safetensors")
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)


def test_two_at_once_and_out_again(tmp_path):
    """Each with its own scale, as diffusers' adapters with weights; taken out with the scale turned round."""
    sd, pipe = copies("sd1")
    for i, rank in enumerate((2, 5)):
        beside = LoRA(copies("sd1")[0], rank, text=bool(i))
        for one in beside.layers.values():
            torch.nn.init.normal_(one["lora_up"].weight, std=0.15)
        beside.save(tmp_path / f"{i}.safetensors", torch.float32)
        pipe.load_lora_weights(tmp_path, weight_name=f"{i}.safetensors", adapter_name=f"a{i}")
    pipe.set_adapters(["a0", "a1"], [0.7, -0.5])
    before = {name: t.clone() for name, t in sd.state_dict().items()}
    for path, scale in (tmp_path / "0.safetensors", 0.7), (tmp_path / "1.safetensors", -0.5):
        apply_lora(sd, path, scale)
    agree(ours(sd, **SETTINGS), drawn(pipe), 80)
    for path, scale in (tmp_path / "0.safetensors", 0.7), (tmp_path / "1.safetensors", -0.5):
        apply_lora(sd, path, -scale)
    assert max(relative_error(t, before[name]) for name, t in sd.state_dict().items() if t.abs().max() > 0) < 1e-6


def test_half_precision_weights_stay_half(tmp_path):
    """The sum is made in fp32 and rounded once."""
    sd, _ = copies("sd1")
    beside = LoRA(copies("sd1")[0], 4)
    for one in beside.layers.values():
        torch.nn.init.normal_(one["lora_up"].weight)
    beside.save(tmp_path / "a.safetensors", torch.float32)
    half = deepcopy(sd)
    half.unet.half()
    apply_lora(sd, tmp_path / "a.safetensors")
    apply_lora(half, tmp_path / "a.safetensors")
    for (name, p), q in zip(sd.unet.named_parameters(), half.unet.parameters()):
        assert q.dtype == torch.float16 and (q.float() - p).abs().max() <= 1.001 * 2**-10 * p.abs().max(), name


def first_names_of_diffusers(state):
    """to_q.lora_A -> processor.to_q_lora.down, to_out.0.lora_A -> processor.to_out_lora.down, with no prefix."""
    new = {}
    for name, t in state.items():
        layer, part = name.replace("to_out.0", "to_out").rsplit(".lora_", 1)
        block, layer = layer.rsplit(".", 1)
        new[f"{block}.processor.{layer}_lora.{'down' if part.startswith('A') else 'up'}.weight"] = t
    return new


def test_older_names_are_read(tmp_path):
    _, pipe = copies("sd1")
    state = adapter(pipe.unet, 4, 4, ATTENTION)
    save_file({f"unet.{name}": t.contiguous() for name, t in state.items()}, tmp_path / "new.safetensors")
    save_file({name: t.contiguous() for name, t in first_names_of_diffusers(state).items()}, tmp_path / "old.safetensors")
    new, old = open_lora(tmp_path / "new.safetensors"), open_lora(tmp_path / "old.safetensors")
    assert new.keys() == old.keys() and len(new) == 8 * 10  # ten transformer blocks
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[2] == b[2] == 4 for a, b in zip(new.values(), (old[name] for name in new)))


LAYER = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.mark.parametrize("state, said", [
    ({f"{LAYER}.lora_down.weight": (2, 64), f"{LAYER}.lora_up.weight": (64, 2)}, "for another family of models: unet_down_blocks_0.* is 64x64 there and 32x32 here"),
    ({f"{LAYER}9.lora_down.weight": (2, 32), f"{LAYER}9.lora_up.weight": (32, 2)}, "for another family of models: .*to_q9 is 32x32 there and not here"),
    ({f"{LAYER}.lora_down.weight": (2, 32)}, "damaged: of unet_.* it holds only down"),
    ({f"{LAYER}.hada_w1_a": (2, 32)}, "no plain LoRA: it holds .*hada_w1_a"),
    ({f"{LAYER}.lora_down.weight": (2, 32), f"{LAYER}.lora_up.weight": (32, 2), f"{LAYER}.dora_scale": (1, 32)}, "no plain LoRA: it holds .*dora_scale"),
    ({}, "holds no tensors"),
])
def test_what_is_no_lora_for_this_model_is_told_and_changes_nothing(state, said, tmp_path):
    sd, _ = copies("sd1")
    before = {name: t.clone() for name, t in sd.state_dict().items()}
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 128), "lora_unet_mid_block_attentions_0_proj_in.lora_up.weight": torch.ones(128, 2)}
              | {name: torch.ones(shape) for name, shape in state.items()} if state else {}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=said):
        apply_lora(sd, tmp_path / "x.safetensors")
    assert all(torch.equal(t, before[name]) for name, t in sd.state_dict().items())


@pytest.mark.parametrize("key", ["use_rslora", "use_dora"])
def test_other_kinds_of_peft_are_told(key, tmp_path):
    _, pipe = copies("sd1")
    peft.get_peft_model(pipe.unet, peft.LoraConfig(r=4, target_modules=ATTENTION, **{key: True})).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="no plain LoRA: "):
        open_lora(tmp_path)


# --- textual inversion ---

@pytest.mark.parametrize("vectors", [1, 3])
def test_learned_word_draws_what_diffusers_draws(vectors, tmp_path):
    sd, pipe = copies("sd1")
    learned = torch.randn(vectors, 32)
    torch.save({"<my-cat>": learned if vectors > 1 else learned[0]}, tmp_path / "learned_embeds.bin")
    prompt = "a photo of <my-cat>, on a <my-cat> mat"
    before = ours(sd, prompt, **SETTINGS)[0]
    assert add_embedding(sd, tmp_path / "learned_embeds.bin") == ["<my-cat>"]
    assert psnr(ours(sd, prompt, **SETTINGS)[0], before) < 45
    pipe.load_textual_inversion(str(tmp_path / "learned_embeds.bin"))
    agree(ours(sd, prompt, **SETTINGS), theirs(pipe, prompt, negative_prompt=PROMPTS["negative_prompt"], num_inference_steps=4, guidance_scale=7.5,
                                               height=64, width=64), 80)


def test_two_encoders_learn_each_their_own(tmp_path):
    """SDXL's files hold clip_l and clip_g, and the word is the file's name."""
    sd, pipe = copies("sdxl")
    state = {"clip_l": torch.randn(2, 32), "clip_g": torch.randn(2, 48)}
    save_file(state, tmp_path / "mycat.safetensors")
    assert add_embedding(sd, tmp_path / "mycat.safetensors") == ["mycat", "mycat"]
    pipe.load_textual_inversion(state["clip_l"], token="mycat", text_encoder=pipe.text_encoder, tokenizer=pipe.tokenizer)
    pipe.load_textual_inversion(state["clip_g"], token="mycat", text_encoder=pipe.text_encoder_2, tokenizer=pipe.tokenizer_2)
    prompt = "a mycat on a mat"
    agree(ours(sd, prompt, **SETTINGS), theirs(pipe, prompt, negative_prompt=PROMPTS["negative_prompt"], num_inference_steps=4, guidance_scale=5.0,
                                               height=64, width=64), 80)


def test_a_learned_word_is_found_alone_only_and_not_in_others_tokenizers(tmp_path):
    sd, _ = copies("sd1")
    other = StableDiffusion(small("sd1")).tokenizer
    torch.save({"string_to_param": {"*": torch.randn(2, 32)}, "name": "zyxcat"}, tmp_path / "zyxcat.pt")  # as A1111 writes it
    plain = other("a zyxcats photo")
    add_embedding(sd, tmp_path / "zyxcat.pt")
    assert sd.tokenizer("a zyxcat photo")[0, :6].tolist() == [49406, 320, 49408, 49409, 1125, 49407]
    assert torch.equal(sd.tokenizer("a zyxcats photo"), plain) and torch.equal(other("a zyxcat photo"), StableDiffusion(small("sd1")).tokenizer("a zyxcat photo"))
    assert 49408 not in other("a zyxcat photo")


def test_a_learned_word_is_not_in_a_saved_folder(tmp_path):
    """Whose token table has no row for it."""
    sd, _ = copies("sd1")
    torch.save({"<my-cat>": torch.randn(2, 32)}, tmp_path / "w.bin")
    add_embedding(sd, tmp_path / "w.bin")
    sd.save(tmp_path / "folder")
    assert max(json.loads((tmp_path / "folder/tokenizer/vocab.json").read_text("utf-8")).values()) == 49407


def test_a_word_for_one_of_two_encoders_is_told(tmp_path):
    """As one of SD 1.x is, whose width SDXL's first encoder has."""
    save_file({"emb_params": torch.ones(1, 32)}, tmp_path / "zyxcat.safetensors")
    sd, _ = copies("sdxl")
    with pytest.raises(UserError, match="another family of models: it has vectors for 1 of 2 text encoders"):
        add_embedding(sd, tmp_path / "zyxcat.safetensors")
    assert sd.encoders[0].embeddings.learned is None and "zyxcat" not in sd.tokenizer.bpe.get_vocab()  # the model stays as it was


@pytest.mark.parametrize("state, name, said", [
    ({"<x>": torch.ones(1, 33)}, "x.safetensors", "another family of models: its vectors are 33 wide, here 32"),
    ({"emb_params": torch.ones(1, 32)}, "cat.safetensors", "'cat' is in the vocabulary already"),
])
def test_words_that_do_not_fit_are_told(state, name, said, tmp_path):
    save_file(state, tmp_path / name)
    with pytest.raises(UserError, match=said):
        add_embedding(copies("sd1")[0], tmp_path / name)
