"""Checkpoints as other programs and older versions write them: drawn, or refused in one line.

Each case is a small random model whose file is changed. What is loaded must be the model's own
tensors, bit for bit.
"""
import functools
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import sd as core
from extras import prediction
from extras.formats import load_model, official_state_dict
from extras.nan import explain_nan
from sampler import PREDICTIONS
from sd import StableDiffusion, UserError
from tests.command import run_cli
from tests.common import random_model, small
from tests.folders import assert_one_line, load, rows, their_folder  # noqa: F401
from tests.test_formats import answering, change_json, save_plain

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
UNET, VAE, CLIP = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.transformer."


@functools.cache
def model(name: str) -> StableDiffusion:
    return random_model(small(name))


def state_of(name: str) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in official_state_dict(model(name)).items()}


def write(state: dict[str, Tensor], path: Path, **metadata: str) -> Path:
    if path.suffix == ".safetensors":
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, path, metadata)
    else:
        torch.save(state, path)
    return path


def equals(found: StableDiffusion, name: str) -> bool:
    mine, wanted = found.state_dict(), model(name).state_dict()
    return mine.keys() == wanted.keys() and all(
        torch.equal(tensor, wanted[key]) for key, tensor in mine.items())


def renamed(state: dict[str, Tensor], old: str, new: str) -> dict[str, Tensor]:
    return {key.replace(old, new): tensor for key, tensor in state.items()}


# --- other names ---

def transposed_projection(state: dict[str, Tensor]) -> dict[str, Tensor]:
    name = "conditioner.embedders.1.model.text_projection"
    return state | {name + ".weight": state.pop(name).T}


def ema_only(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"model_ema." + key[6:].replace(".", "") if key.startswith(UNET) else key: tensor
            for key, tensor in state.items()}


def vae_of_later_diffusers(state: dict[str, Tensor]) -> dict[str, Tensor]:
    for old, new in {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0",
                     "norm": "group_norm"}.items():
        state = renamed(state, f".mid.attn_1.{old}.", f".mid.attn_1.{new}.")
    return state


NAMES = {  # case: (model, what is done to its tensors)
    "sd-turbo in SGM's names": ("sd-turbo", lambda state: renamed(
        state, "cond_stage_model.model.", "conditioner.embedders.0.model.")),
    "sd1 in SGM's names": ("sd1", lambda state: renamed(
        state, "cond_stage_model.", "conditioner.embedders.0.")),
    "projection transposed": ("sdxl", transposed_projection),
    "no text_model": ("sd1", lambda state: renamed(state, CLIP + "text_model.", CLIP)),
    "A1111's wrapped": ("sd1", lambda state: renamed(
        state, CLIP, "cond_stage_model.wrapped.transformer.")),
    "ComfyUI's clip_l": ("sd1", lambda state: renamed(state, CLIP, "text_encoders.clip_l."
                                                      "transformer.")),
    "ComfyUI's clip_l and clip_g": ("sdxl", lambda state: renamed(
        state, "conditioner.embedders.0.", "text_encoders.clip_l.")),
    "vae.": ("sd1", lambda state: renamed(state, VAE, "vae.")),
    "to_q in the VAE": ("sd1", vae_of_later_diffusers),
    "torch.compile": ("sd1", lambda state: renamed(state, UNET, UNET + "_orig_mod.")),
    "EMA alone": ("sd1", ema_only),
}


@pytest.mark.filterwarnings("ignore:.*moving averages")
@pytest.mark.parametrize("case", NAMES)
def test_other_names(rows, tmp_path, case):  # noqa: F811
    name, change = NAMES[case]
    rows(name)
    path = write(change(state_of(name)), tmp_path / "a.safetensors")
    preset = name if name == "sd-turbo" else None
    found = load(path, preset=preset)
    assert equals(found, name) and found.preset == small(name)


SURPLUS = {
    "sd1": ["cond_stage_model.text_projection", CLIP + "text_projection.weight",
            CLIP + "vision_model.encoder.layers.0.mlp.fc1.weight", "loss.logvar",
            "model_ema.diffusion_modelinput_blocks00weight", "embedding_manager.x"],
    "sdxl": ["conditioner.embedders.0.text_projection", "conditioner.embedders.2.x",
             "conditioner.embedders.0.transformer.text_projection.weight"]}


@pytest.mark.parametrize("name, extra", [(n, e) for n, extras in SURPLUS.items() for e in extras])
def test_what_no_network_uses_is_named_and_ignored(rows, tmp_path, name, extra):  # noqa: F811
    rows(name)
    path = write(state_of(name) | {extra: torch.ones(3)}, tmp_path / "a.safetensors")
    with pytest.warns(UserWarning, match=f"ignored 1 tensor that no network uses: {extra}$"):
        assert equals(load(path), name)


def test_buffers_of_official_files_are_not_mentioned(rows, tmp_path, recwarn):  # noqa: F811
    rows("sd1")
    buffers = {CLIP + "text_model.embeddings.position_ids": torch.arange(77)[None],
               "betas": torch.ones(1000), "model_ema.decay": torch.ones(1)}
    assert equals(load(write(state_of("sd1") | buffers, tmp_path / "a.safetensors")), "sd1")
    assert not recwarn.list


@pytest.mark.parametrize("extra, said", [
    ("edm_mean", "EDM"), (UNET + "label_emb.0.0.weight", "classes or vectors"),
    ("scaled_fp8", "quantized"), (UNET + "out.2.scale_weight", "quantized"),
    ("lora_unet_x.lora_up.weight", "LoRA"),
    (UNET + "input_blocks.1.1.transformer_blocks.0.fuser.linear.weight", "GLIGEN"),
    (CLIP + "text_model.encoder.layers.3.mlp.fc1.weight", "more layers")])
def test_what_changes_the_model_is_refused(rows, tmp_path, extra, said):  # noqa: F811
    rows("sd1")
    path = write(state_of("sd1") | {extra: torch.ones(3)}, tmp_path / "a.safetensors")
    assert_one_line(lambda: load(path), f"a.safetensors .*{said}")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_weights_in_codes_are_refused(rows, tmp_path, dtype):  # noqa: F811
    rows("sd1")
    state = state_of("sd1")
    state[UNET + "out.2.bias"] = state[UNET + "out.2.bias"].to(dtype)
    path = write(state, tmp_path / "a.ckpt")
    kind = str(dtype).removeprefix("torch.")
    assert_one_line(lambda: load(path), f"out.2.bias holds numbers of the type {kind}, perhaps")


def test_layers_that_are_never_used_may_be_missing(rows, tmp_path):  # noqa: F811
    """SD 2's last one and its projection; SDXL's last one of the first encoder."""
    for name, missing in ("sd2", ("resblocks.2.", "text_projection")), \
            ("sdxl", ("embedders.0.transformer.text_model.encoder.layers.2.",
                      "embedders.0.transformer.text_model.final_layer_norm")):
        rows(name)
        state = {key: tensor for key, tensor in state_of(name).items()
                 if not any(part in key for part in missing)}
        found = load(write(state, tmp_path / "a.safetensors"), preset=name)
        whole, cut = (sd.encode_prompt(["a cat"]) for sd in (model(name), found))
        assert torch.equal(whole["context"], cut["context"])
        assert name == "sd2" or torch.equal(whole["y"], cut["y"])


def test_a_used_tensor_that_is_missing_names_its_network(rows, tmp_path):  # noqa: F811
    rows("sd1")
    for name, kind in {CLIP + "text_model.final_layer_norm.bias": "text encoder",
                       VAE + "decoder.conv_in.bias": "VAE", UNET + "out.2.bias": "UNet"}.items():
        state = {key: tensor for key, tensor in state_of("sd1").items() if key != name}
        path = write(state, tmp_path / "a.safetensors")
        assert_one_line(lambda: load(path), f"its {kind} is damaged .*1 missing: {name}$")


# --- other containers ---

CONTAINERS: dict[str, Callable[[dict], dict]] = {
    "flat": lambda state: state,
    "state_dict": lambda state: {"state_dict": state, "global_step": 3},
    "model": lambda state: {"model": state, "optimizer": {"state": {0: torch.ones(2)}}},
    "twice": lambda state: {"state_dict": {"state_dict": state}},
    "parts": lambda state: {prefix.rstrip("."): {
        key.removeprefix(prefix): tensor for key, tensor in state.items()
        if key.startswith(prefix)} for prefix in (UNET, VAE, CLIP)}}


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("case", CONTAINERS)
def test_pickles(rows, tmp_path, case, old):  # noqa: F811
    """Nested in any way, and as PyTorch wrote them before 1.6."""
    rows("sd1")
    torch.save(CONTAINERS[case](state_of("sd1")), tmp_path / "a.ckpt",
               _use_new_zipfile_serialization=not old)
    assert equals(load(tmp_path / "a.ckpt"), "sd1")


@pytest.mark.parametrize("name", ["a.sft", "A.SAFETENSORS", "a.ckpt", "a.bin", "a"])
def test_the_contents_tell_the_format(rows, tmp_path, name):  # noqa: F811
    rows("sd1")
    shutil.copy(write(state_of("sd1"), tmp_path / "b.safetensors"), tmp_path / name)
    assert equals(load(tmp_path / name), "sd1")


@pytest.mark.parametrize("content, said", [
    (b"", "is empty"), (b"<!DOCTYPE html>", "web page"), (b'{"a": 1}', "is JSON"),
    (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"), (b"GGUF\0\0", "GGUF"),
    (b"\x80\x02]q\x00.", "cannot|can be read"), (b"abcdefgh", "no checkpoint")])
def test_files_that_are_no_checkpoints(tmp_path, content, said):
    (tmp_path / "a.ckpt").write_bytes(content)
    assert_one_line(lambda: load(tmp_path / "a.ckpt"), said)


@pytest.mark.parametrize("names, said", [
    (["lora_unet_x.lora_up.weight"], "a LoRA: give it as --lora"),
    (["emb_params"], "--embedding"), (["double_blocks.0.x"], "another family"),
    (["first_stage_model.decoder.mid.x"], "--vae"), (["what"], "its tensors are what")])
def test_other_files_are_named(tmp_path, names, said):
    path = write({name: torch.ones(2) for name in names}, tmp_path / "a.safetensors")
    assert_one_line(lambda: load(path), f"it has no UNet .*{said}")


# --- parts in files of their own ---

def part(prefix: str, keep: bool) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in state_of("sd1").items()
            if key.startswith(prefix) == keep}


def test_a_vae_in_a_file_of_its_own(rows, tmp_path, capsys):  # noqa: F811
    """Official names with a prefix or without, diffusers' names, a folder, a whole model."""
    rows("sd1")
    base = write(part(VAE, False), tmp_path / "base.safetensors")
    assert_one_line(lambda: load(base), "holds no VAE: give one with --vae FILE$")
    folder = their_folder("sd1", tmp_path / "f")
    theirs = folder / "vae/diffusion_pytorch_model.safetensors"
    own = part(VAE, True)
    files = {
        "own": write(own, tmp_path / "v.safetensors"),
        "no prefix": write(renamed(own, VAE, ""), tmp_path / "n.safetensors"),
        "whole": write(state_of("sd1"), tmp_path / "w.safetensors"),
        "diffusers": theirs, "folder": folder / "vae", "pipeline": folder}
    for vae in files.values():
        assert equals(load_model(StableDiffusion, base, "cpu", torch.float32, vae=vae), "sd1")
    code, err, _ = run_cli(capsys, "a cat", "--ckpt", base, "--vae", files["own"], "--steps", 1,
                           "--out", tmp_path / "o.png", "--device", "cpu")
    assert code == 0 and (tmp_path / "o.png").exists(), err
    code, err, _ = run_cli(capsys, "a cat", "--ckpt", base, "--vae", base, "--out",
                           tmp_path / "p.png")
    assert code == 2 and "base.safetensors holds no VAE" in err


def test_a_unet_in_a_file_of_its_own(rows, tmp_path):  # noqa: F811
    rows("sd1")
    base = random_model(replace(small("sd1"), size=64))
    answering(base, 3.0)
    whole = save_plain(base, tmp_path / "base.safetensors")
    folder = their_folder("sd1", tmp_path / "f")
    own = part(UNET, True)
    files = [write(own, tmp_path / "u.safetensors"), folder / "unet", folder,
             write(renamed(own, UNET, ""), tmp_path / "n.safetensors"),
             folder / "unet/diffusion_pytorch_model.safetensors"]
    for unet in files:
        assert equals(load_model(StableDiffusion, whole, "cpu", torch.float32, unet=unet), "sd1")
    assert_one_line(lambda: load(files[0]), "holds no text encoder and no VAE: give a whole model "
                    "of the same kind as --ckpt, and this one as --unet$")
    found = load_model(StableDiffusion, folder, "cpu", torch.float32, unet=whole)
    assert (found.unet.out[2].bias == 3).all()
    other = tmp_path / "x.safetensors"
    write({"lora_unet_x.lora_up.weight": torch.ones(2)}, other)
    assert_one_line(lambda: load_model(StableDiffusion, whole, "cpu", torch.float32, unet=other),
                    "x.safetensors holds no UNet; it is a LoRA")


# --- eps or v ---

@pytest.mark.parametrize("name", ["sd1", "sdxl"])
def test_models_whose_rows_are_all_eps_are_asked_too(rows, tmp_path, name, recwarn):  # noqa: F811
    rows(name)
    path = save_plain(answering(random_model(small(name)), -0.6), tmp_path / "a.safetensors")
    found = load(path)
    assert "a.safetensors does not say what it predicts: by its answers it is v" in str(
        recwarn.pop(UserWarning).message)
    assert found.preset == replace(small(name), prediction_type="v")
    assert found.schedule.prediction is PREDICTIONS["v"]
    save_plain(answering(random_model(small(name)), 0.6), path)
    assert load(path).preset == small(name) and not recwarn.list


def test_the_yaml_beside_a_file_is_read(rows, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(prediction, "probe_prediction_type", None)
    rows("sd2")
    path = save_plain(random_model(small("sd2-base")), tmp_path / "a.safetensors")
    start = "model:\n  target: ldm.models.diffusion.ddpm.LatentDiffusion\n  params:\n"
    for text, name in ('    parameterization: "v"\n', "sd2"), ("    channels: 4\n", "sd2-base"):
        path.with_suffix(".yaml").write_text(start + text)
        assert load(path).preset == small(name)
    path.with_suffix(".yaml").write_text(
        start + "    parameterization: v\n    linear_start: 0.001\n    scale_factor: 0.2\n"
        "    zsnr: true\n")
    preset = load(path).preset
    assert (preset.prediction_type, preset.beta_start, preset.vae.scale_factor) \
        == ("v-zero-snr", 0.001, 0.2)


# --- configs of folders ---

UNET_FILE, VAE_FILE, TEXT_FILE, SCHEDULER_FILE, INDEX = (
    "unet/config.json", "vae/config.json", "text_encoder/config.json",
    "scheduler/scheduler_config.json", "model_index.json")


@pytest.mark.parametrize("file, fields, said", [
    (SCHEDULER_FILE, dict(_class_name="EDMEulerScheduler"), "EDMEulerScheduler"),
    (SCHEDULER_FILE, dict(_class_name="FlowMatchEulerDiscreteScheduler"), "FlowMatch"),
    (SCHEDULER_FILE, dict(trained_betas=[0.1]), "trained_betas"),
    (SCHEDULER_FILE, dict(num_train_timesteps=100), "num_train_timesteps"),
    (VAE_FILE, dict(latents_mean=[0.1] * 4), "latents_mean"),
    (VAE_FILE, dict(shift_factor=0.1), "shift_factor"),
    (VAE_FILE, dict(_class_name="AutoencoderTiny"), "AutoencoderTiny"),
    (UNET_FILE, dict(act_fn="gelu"), "act_fn"),
    (UNET_FILE, dict(layers_per_block=[1, 2, 1, 1]), "layers_per_block"),
    (UNET_FILE, dict(class_embed_type="timestep"), "class_embed_type"),
    (TEXT_FILE, dict(hidden_act="relu"), "hidden_act"),
    (TEXT_FILE, dict(architectures=["T5EncoderModel"]), "T5EncoderModel"),
    (TEXT_FILE, dict(intermediate_size=96), "intermediate_size"),
    (INDEX, dict(controlnet=["diffusers", "ControlNetModel"]), "controlnet")])
def test_configs_that_cannot_be_followed_are_refused(
        rows, tmp_path, file, fields, said):  # noqa: F811
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    change_json(folder / file, **fields)
    assert_one_line(lambda: load(folder), said)


def test_configs_are_followed(rows, tmp_path):  # noqa: F811
    """Heads, activation, and noise that diffusers has where the file is silent."""
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    change_json(folder / UNET_FILE, attention_head_dim=2)
    change_json(folder / TEXT_FILE, hidden_act="gelu", num_attention_heads=4)
    scheduler = json.loads((folder / SCHEDULER_FILE).read_text())
    for key in "beta_start", "beta_end", "beta_schedule":
        del scheduler[key]
    (folder / SCHEDULER_FILE).write_text(json.dumps(scheduler))
    preset = load(folder).preset
    text = preset.text_encoders[0]
    assert preset.unet.num_heads == (2, 2, 2, 2)
    assert (text.hidden_act, text.num_attention_heads) == ("gelu", 4)
    reference = diffusers.DDIMScheduler.from_pretrained(folder / "scheduler").config
    assert (preset.beta_start, preset.beta_end, preset.beta_schedule) \
        == (reference.beta_start, reference.beta_end, reference.beta_schedule)


@pytest.mark.parametrize("name", ["vocab.json", "tokenizer.json"])
def test_other_words_than_those_of_clip_are_refused(rows, tmp_path, name):  # noqa: F811
    rows("sd1")
    folder = their_folder("sd1", tmp_path / "f")
    words = json.loads((folder / "tokenizer/tokenizer.json").read_text())["model"]["vocab"]

    def write_words() -> None:
        content = words if name == "vocab.json" else {"model": {"vocab": words}}
        (folder / "tokenizer" / name).write_text(json.dumps(content))

    write_words()
    assert load(folder).preset == load(their_folder("sd1", tmp_path / "g")).preset
    words["cat</w>"], words["dog</w>"] = words["dog</w>"], words["cat</w>"]
    write_words()
    assert_one_line(lambda: load(folder), f"{name} has other words than CLIP's")
    change_json(folder / INDEX, tokenizer=["transformers", "BertTokenizer"])
    assert_one_line(lambda: load(folder), "model_index.json has the tokenizer BertTokenizer")


@pytest.mark.parametrize("zeros", [True, False])
def test_zeros_for_an_empty_prompt(rows, tmp_path, zeros):  # noqa: F811
    rows("sdxl")
    folder = their_folder("sdxl", tmp_path / "f")
    change_json(folder / INDEX, force_zeros_for_empty_prompt=zeros)
    assert load(folder).preset.zero_negative == zeros


# --- NaN ---

def test_nan_names_its_network_and_what_helps():
    sd, error = random_model(small("sd1")), UserError("NaN at step 1, with weights in x")
    assert "from the UNet): its weights are finite and in fp32" in str(
        explain_nan(sd, error, ["a cat"]))
    sd.dtype = torch.float16
    assert str(explain_nan(sd, error, ["a cat"])).endswith("from the UNet): try --dtype fp32")
    sd.text_encoders[0].encoder.layers[0].mlp.fc1.bias.fill_(float("nan"))
    assert "NaN from the text encoder: its weights hold NaN" in str(
        explain_nan(sd, error, ["a cat"]))
    other = UserError("something else")
    assert explain_nan(sd, other, ["a cat"]) is other


def test_the_new_rows_are_in_the_table():
    for name, channels in ("sd2-inpaint", 9), ("sdxl-inpaint", 9), ("sdxl-instruct-pix2pix", 8):
        assert core.PRESETS[name].unet.in_channels == channels
