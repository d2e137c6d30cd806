"""train.py: what it learns, that an interruption changes nothing, and how it answers mistakes."""
import json
import os
import re
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sd as sd_module
import train as train_module
from clip import CLIPTextModel
from extras.data import Folder
from extras.diffusers_names import diffusers_name
from extras.formats import save
from sampler import NoiseSchedule
from sd import PRESETS, StableDiffusion
from tests.training import (  # noqa: F401
    TINY,
    command,
    draw,
    five,
    grouped,
    metrics,
    original_signals,
    tiny,
    trained,
)


@pytest.mark.parametrize("what", ["unet+text", "unet", "vae", "decoder"])
def test_resumed_training_equals_uninterrupted(tiny, five, tmp_path, capsys, what):  # noqa: F811
    """Killed after step 4 of 8 and started again: the same weights in both files, to the bit."""
    common = ["--data", five, "--init", tiny, "--train", what, "--steps", 8, "--batch", 3,
              "--save-every", 4, "--sample-every", 0, "--device", "cpu", "--warmup", 6,
              "--decay", 3]
    trained(capsys, *common, "--out", tmp_path / "whole")
    kind = train_module.UNetLoss if "unet" in what else train_module.VAELoss
    original, saves = kind.save, []

    class Killed(BaseException):
        """Nobody catches it."""

    def save_then_die(self, sd, out):
        if saves:
            raise Killed
        saves.append(out)
        original(self, sd, out)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(kind, "save", save_then_die)
        command(train_module.main, capsys, *common, "--out", tmp_path / "cut")
    assert "steps 4 to 8" in trained(capsys, *common, "--out", tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / run / "state.pt") for run in ("whole", "cut"))
    start = load_file(tiny)
    moved = load_file(tmp_path / "whole/model.safetensors")
    assert any(not torch.equal(moved[name].float(), start[name].half().float())
               for name in start)
    assert whole["step"] == cut["step"] == 8
    for key in ("params", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole[key], cut[key], strict=True))
    again = load_file(tmp_path / "cut/model.safetensors")
    assert all(torch.equal(moved[name], again[name]) for name in moved)


def test_one_batch_is_learned_by_heart(five, tmp_path, capsys, monkeypatch):  # noqa: F811
    """A random UNet and text encoder on the built-in VAE and five discs.

    The loss falls from over 1 to about 0.25, and the words then choose the color.
    """
    row = PRESETS["emoji"]
    text, = row.text_encoders   # narrow too: its table of 49,408 words would take half of the time
    text = replace(text, hidden_size=32, num_attention_heads=2)
    unet = replace(row.unet, model_channels=64, num_heads=(2, 4), context_dim=32,
                   adm_in_channels=32)
    monkeypatch.setitem(PRESETS, "narrow", replace(row, unet=unet, text_encoders=(text,)))
    out = trained(capsys, "--data", five, "--out", tmp_path / "o", "--init", "narrow",
                  "--steps", 150, "--batch", 5, "--lr", 2e-3, "--log-every", 10, "--tokens", 16,
                  "--time-shift", 3, "--caption-dropout", 0, "--ema", 0.9, "--device", "cpu")
    torch.set_num_threads(1)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert np.mean(losses[-4:]) < 0.33 and losses[0] > 1, losses
    sd = StableDiffusion.load(tmp_path / "o/model.safetensors")
    for name, rgb in (("red", (1, 0, 0)), ("blue", (0, 0, 1)), ("yellow", (1, 1, 0))):
        picture = np.asarray(sd.generate(f"{name} disc", guidance=1)[0])
        middle = picture[48:80, 48:80].mean((0, 1)) / 255
        assert np.abs(middle - rgb).max() < 0.3, (name, middle)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_nearly_as_fp32(tiny, five, tmp_path, capsys, amp):  # noqa: F811
    losses = {}
    for kind in (amp, ""):
        out = trained(capsys, "--data", five, "--init", tiny, "--steps", 3, "--batch", 2,
                      "--log-every", 1, "--device", "cpu", "--amp", kind,
                      "--out", tmp_path / f"o{kind}")
        losses[kind] = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses[amp]) == 3 and np.allclose(losses[amp], losses[""], rtol=0.02), losses


def test_changed_row_is_trained_on_the_builtin_vae(five, tmp_path, capsys):  # noqa: F811
    """--init emoji takes the row of PRESETS as it is, with random weights, and the trained VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "emoji", replace(PRESETS["emoji"], prediction_type="eps"))
        trained(capsys, "--data", five, "--out", tmp_path / "o", "--init", "emoji", "--steps", 1,
                "--batch", 2, "--device", "cpu")
    sd, builtin = StableDiffusion.load(tmp_path / "o/model.safetensors"), StableDiffusion.load()
    assert sd.preset.prediction_type == "eps" and sd.preset.vae == builtin.preset.vae
    ours, theirs = sd.vae.state_dict().values(), builtin.vae.state_dict().values()
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(sd.unet.out[0].weight, builtin.unet.out[0].weight)


def test_times_stay_in_range():
    """fp32 rounds the largest u up to time 1000 for some shifts."""
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for shift in (1, 2, 3, 6, 10):
        middle = int(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5))
        assert train_module.shifted(u, shift).tolist() == [0, middle, 999]


def test_sigterm_saves_and_leaves(tiny, five, tmp_path, capsys):  # noqa: F811
    """Stopped in the middle, it ends the step, saves, and the same command resumes."""
    common = ["--data", five, "--init", tiny, "--batch", 2, "--sample-every", 0, "--device", "cpu",
              "--out", tmp_path / "o", "--steps", 6]
    original = train_module.UNetLoss.draw

    def draw_then_signal(self, batch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch, step)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.UNetLoss, "draw", draw_then_signal)
        assert "stopped and saved after step 4" in trained(capsys, *common)
    StableDiffusion.load(tmp_path / "o/model.safetensors")
    out = trained(capsys, *common)
    assert "steps 4 to 6" in out and f"resumes {tmp_path / 'o'} at step 4" in out


def test_finetune_loads_in_sd(five, tmp_path, capsys):  # noqa: F811
    """The README's fine-tuning command, shortened: its file draws."""
    trained(capsys, "--data", five, "--out", tmp_path / "mine", "--steps", 3, "--batch", 2,
            "--sample-every", 3)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == [
        "metrics.jsonl", "model.safetensors", "sample-0000003.png", "state.pt"]
    assert draw(capsys, "red disc", "--ckpt", tmp_path / "mine/model.safetensors",
                "--out", tmp_path / "o.png") == 0


# --- what is computed ---

@pytest.mark.parametrize("prediction", ["eps", "v", "v-zero-snr"])
@pytest.mark.parametrize("gamma", [0, 5])
def test_gradient_equals_diffusers(grouped, five, tmp_path, prediction, gamma):  # noqa: F811
    """One step of the loss beside the same with diffusers' UNet and scheduler.

    min-SNR weights after Hang et al. 2023. The loss and every gradient agree to 1e-5 of the
    largest.
    """
    diffusers = pytest.importorskip("diffusers")
    sd = StableDiffusion.load(grouped, "cpu", torch.float32, prediction_type=prediction)
    s = train_module.Settings(data=[str(five)], train="unet", batch=4, caption_dropout=0.5,
                              min_snr=gamma, tokens=77)
    loss_fn = train_module.UNetLoss(s, sd)
    folder = Folder(s.data, [(32, 32)], 4, 0)
    loss_fn.prepare([folder], 0, 1)
    batch = next(folder.batches(0, 1))
    loss = loss_fn(batch, 3)
    loss.backward()
    loss = loss.detach()

    save(sd, tmp_path / "folder", torch.float32)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "folder/unet")
    kind = "epsilon" if prediction == "eps" else "v_prediction"
    scheduler = diffusers.DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=kind,
        rescale_betas_zero_snr=prediction == "v-zero-snr")
    x0, t, noise, keep, _ = loss_fn.draw(batch, 3)
    captions = [caption if kept else "" for caption, kept in zip(batch.captions, keep)]
    context = sd.encode_prompt(captions)["context"].detach()
    assert 0 < keep.sum() < 4
    wanted = noise if prediction == "eps" else scheduler.get_velocity(x0, noise, t)
    out = unet(scheduler.add_noise(x0, noise, t), t, context).sample
    error = (out - wanted).square().mean((1, 2, 3))
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weight = snr.clamp(max=gamma) / (snr + (prediction != "eps")) if gamma else 1.0
    theirs = (error * weight).mean()
    theirs.backward()
    theirs = theirs.detach()
    assert abs(float(loss / theirs) - 1) < 1e-5
    grads = {name: p.grad for name, p in unet.named_parameters()}
    for name, p in sd.unet.named_parameters():
        their_name = diffusers_name("model.diffusion_model." + name, sd.preset)
        other = grads[their_name.removeprefix("unet/")].reshape(p.shape)
        largest = max(float(other.abs().max()), 1e-3)
        assert (p.grad - other).abs().max() <= 1e-5 * largest, name


def test_lora_and_a_new_word_are_files_for_sd(tiny, five, tmp_path, capsys):  # noqa: F811
    """Each is saved alone and changes what is drawn, the new word only where it is named.

    Class pictures count in the loss. --freeze keeps weights.
    """
    shutil.copytree(five, tmp_path / "five")
    for path in (tmp_path / "five").glob("*.txt"):
        path.write_text(path.read_text().replace("disc", "<disc>"))
    common = ["--data", tmp_path / "five", "--init", tiny, "--steps", 4, "--batch", 2,
              "--lr", 1e-2, "--warmup", 0, "--device", "cpu"]
    trained(capsys, *common, "--lora", 2, "--train", "unet", "--out", tmp_path / "lora",
            "--sample-every", 2)
    trained(capsys, *common, "--train", "word", "--placeholder-token", "<disc>",
            "--num-vectors", 2, "--initializer-token", "cat", "--out", tmp_path / "word")
    assert not (tmp_path / "lora/model.safetensors").exists()
    assert load_file(tmp_path / "word/disc.safetensors")["<disc>"].shape == (2, 32)
    lora = load_file(tmp_path / "lora/lora.safetensors")
    assert all(name.startswith("lora_unet_") for name in lora)

    def drawn(prompt, *more):
        picture = tmp_path / "o.png"
        assert draw(capsys, prompt, "--ckpt", tiny, "--out", picture, *more) == 0
        return np.asarray(Image.open(picture), int)

    word = ["--embedding", tmp_path / "word/disc.safetensors"]
    lora = ["--lora", tmp_path / "lora/lora.safetensors"]
    assert not np.array_equal(drawn("a cat"), drawn("a cat", *lora))
    assert np.array_equal(drawn("a cat"), drawn("a cat", *word))
    assert not np.array_equal(drawn("a <disc>"), drawn("a <disc>", *word))

    runs = {"p": [], "q": ["--class-data", five, "--class-weight", 0.5]}
    first = []
    for name, more in runs.items():
        out = trained(capsys, *common, "--sample-every", 0, "--out", tmp_path / name, *more)
        first.append(float(re.search(r"loss ([\d.]+)", out)[1]))
    assert first[1] > 1.2 * first[0]

    trained(capsys, *common, "--out", tmp_path / "frozen",
            "--freeze", "cond_stage_model.", "model.diffusion_model.input_blocks.")
    before, after = load_file(tiny), load_file(tmp_path / "frozen/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    fixed = ("cond_stage_model.", "model.diffusion_model.input_blocks.", "first_stage_model.")
    assert moved and not any(name.startswith(fixed) for name in moved)


def test_two_text_encoders_and_rectangles(five, tmp_path, capsys):  # noqa: F811
    """A small SDXL on wide pictures.

    Sizes reach the UNet, empty captions are zeros, both encoders learn a word.
    """
    clip_l, clip_g = PRESETS["sdxl"].text_encoders
    layers = dict(num_hidden_layers=2, num_attention_heads=2)
    preset = replace(
        TINY, unet=replace(TINY.unet, context_dim=96, adm_in_channels=64 + 6 * 16),
        text_encoders=(replace(clip_l, hidden_size=32, **layers),
                       replace(clip_g, hidden_size=64, **layers)), zero_negative=True)
    save(StableDiffusion(preset), tmp_path / "xl.safetensors", torch.float32)
    (tmp_path / "wide").mkdir()
    for i in range(4):
        Image.new("RGB", (100, 40), (60 * i, 0, 0)).save(tmp_path / f"wide/{i}.png")
        (tmp_path / f"wide/{i}.txt").write_text(f"<w> {i}")
    common = ["--data", tmp_path / "wide", five, "--init", tmp_path / "xl.safetensors",
              "--buckets", "--steps", 3, "--batch", 2, "--device", "cpu",
              "--caption-dropout", 0.5]
    sizes_seen, conds_seen = [], []
    encode, load_model = StableDiffusion.encode_prompt, train_module.load_model

    def encode_and_note(self, prompts, sizes=None):
        sizes_seen.append(sizes)
        return encode(self, prompts, sizes)

    def note_conds(unet, args, cond):
        if torch.is_grad_enabled():  # not those of the sample sheet
            conds_seen.append((cond["context"], cond["y"]))

    def load_and_watch(s, device):
        sd = load_model(s, device)
        sd.unet.register_forward_pre_hook(note_conds, with_kwargs=True)
        return sd

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StableDiffusion, "encode_prompt", encode_and_note)
        patch.setattr(train_module, "load_model", load_and_watch)
        trained(capsys, *common, "--out", tmp_path / "o", "--sample-every", 0, "--steps", 8)
    assert len(conds_seen) == 8
    sizes = {tuple(some[0].tolist()) for some in sizes_seen if some is not None}
    of_the_sheet = (32, 32, 0, 0, 32, 32)
    assert sizes - {of_the_sheet} == {(80, 80, 0, 0, 32, 32), (40, 100, 2, 0, 16, 48)}
    assert any((context[0] == 0).all() and (y[0, :64] == 0).all() for context, y in conds_seen)
    assert not all((context == 0).all() for context, _ in conds_seen)

    trained(capsys, *common, "--train", "word", "--placeholder-token", "<w>",
            "--out", tmp_path / "w", "--sample-every", 0)
    vectors = load_file(tmp_path / "w/w.safetensors")
    assert {name: tuple(x.shape) for name, x in vectors.items()} == {
        "clip_l": (1, 32), "clip_g": (1, 64)}
    with safe_open(tmp_path / "w/w.safetensors", "pt") as file:
        assert file.metadata()["word"] == "<w>"
    assert draw(capsys, "a <w>", "--ckpt", tmp_path / "xl.safetensors",
                "--embedding", tmp_path / "w/w.safetensors", "--out", tmp_path / "o.png") == 0


def test_pooled_dropout_zeros_the_pooled_vector_alone(five, tmp_path):  # noqa: F811
    """y without its text part where the caption's pooled vector is dropped, context as it is."""
    sd = StableDiffusion.load(None, "cpu", torch.float32)
    s = train_module.Settings(data=[str(five)], train="unet", batch=5, caption_dropout=0,
                              pooled_dropout=0.5)
    loss_fn, seen = train_module.UNetLoss(s, sd), {}

    def unet(x, t, context, y):
        seen.update(context=context, y=y)
        return x

    loss_fn.sd.unet = unet
    folder = Folder(s.data, [(64, 64)], 5, 0)
    batch = next(folder.batches(0, 1))
    loss_fn(batch, 0)
    *_, keep = loss_fn.draw(batch, 0)
    cond = sd.encode_prompt(batch.captions)
    assert 0 < keep.sum() < 5
    assert torch.equal(seen["context"], cond["context"])
    assert torch.equal(seen["y"], cond["y"] * keep[:, None])


def test_seed_counts(tiny, five, tmp_path, capsys):  # noqa: F811
    losses = [trained(capsys, "--data", five, "--init", tiny, "--steps", 1, "--batch", 2,
                      "--device", "cpu", "--seed", seed, "--sample-every", 0,
                      "--out", tmp_path / str(seed)) for seed in (0, 1)]
    assert len({re.search(r"loss [\d.]+", out)[0] for out in losses}) == 2


def test_cache_is_used_and_invalidated(tiny, five, tmp_path, capsys, monkeypatch):  # noqa: F811
    """The second run encodes nothing. A new picture, or another VAE, is encoded.

    Training is the same as without a cache.
    """
    shutil.copytree(five, tmp_path / "five")
    encoded, moments = [], train_module.UNetLoss.moments
    monkeypatch.setattr(train_module.UNetLoss, "moments",
                        lambda self, pixels: encoded.append(len(pixels)) or moments(self, pixels))
    texts, encode = [], CLIPTextModel.encode
    monkeypatch.setattr(CLIPTextModel, "encode",
                        lambda self, prompts: texts.append(prompts) or encode(self, prompts))

    def run(out, *more):
        encoded.clear()
        texts.clear()
        trained(capsys, "--data", tmp_path / "five", "--init", tiny, "--train", "unet",
                "--steps", 3, "--batch", 2, "--device", "cpu", "--sample-every", 0,
                "--out", tmp_path / out, *more)
        # the sheet at the end is drawn from five prompts, each beside the negative one
        assert all(len(prompts) == 2 and prompts[1] == "" for prompts in texts[-5:])
        return len(encoded), len(texts) - 5

    cached = ["--cache", tmp_path / "cache"]
    assert run("plain")[0] == 5
    assert run("first", *cached) == (5, 11) and run("second", *cached) == (0, 0)
    plain, second = (metrics(tmp_path / out)[-1]["loss"] for out in ("plain", "second"))
    assert abs(plain / second - 1) < 1e-6
    shutil.copy(five / "red.png", tmp_path / "five/blue.png")
    assert run("third", *cached) == (1, 0)
    sd = StableDiffusion.load(tiny, dtype=torch.float32)
    with torch.no_grad():
        sd.vae.encoder.conv_in.bias += 0.1
    save(sd, tmp_path / "other.safetensors", torch.float32)
    assert run("fourth", *cached, "--init", tmp_path / "other.safetensors") == (5, 0)


def test_ema_of_zero_saves_the_weights_themselves(tiny, five, tmp_path, capsys):  # noqa: F811
    """And a run without averages can go on with them: they start from the weights."""
    common = ["--data", five, "--init", tiny, "--train", "unet", "--batch", 2, "--steps", 2,
              "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "o"]
    trained(capsys, *common, "--ema", 0)
    state = torch.load(tmp_path / "o/state.pt")
    assert all(torch.equal(a, b) for a, b in zip(state["params"], state["ema"], strict=True))
    saved = load_file(tmp_path / "o/model.safetensors")
    weight = saved["model.diffusion_model.out.2.weight"]
    assert any(p.shape == weight.shape and torch.equal(p.half(), weight)
               for p in state["params"])
    trained(capsys, *common, "--ema", 0.5, "--steps", 3, "--resume")
    state = torch.load(tmp_path / "o/state.pt")
    assert not all(torch.equal(a, b) for a, b in zip(state["params"], state["ema"]))


def test_network_of_a_fork_is_trained_without_its_config(five, tmp_path):  # noqa: F811
    """A network of a fork: any module unet(x, t, **cond), with a config that has no fields."""
    class Linear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.config, self.mix = object(), torch.nn.Conv2d(4, 4, 1)

        def forward(self, x, t, context):
            return self.mix(x) + context.mean()

    preset = replace(TINY, unet=object())
    sd = StableDiffusion(preset, unet=Linear())
    s = train_module.Settings(data=[str(five)], train="unet", batch=4)
    loss_fn = train_module.UNetLoss(s, sd)
    folder = Folder(s.data, [(32, 32)], 4, 0)
    loss_fn.prepare([folder], 0, 1)
    loss_fn(next(folder.batches(0, 1)), 0).backward()
    assert sd.unet.mix.weight.grad.any() and isinstance(sd.schedule, NoiseSchedule)


# --- start values ---

def test_new_weights_keep_start_values(tiny, five, tmp_path, capsys):  # noqa: F811
    """What the file lacks is random, and listed; without --new-weights it is refused."""
    tensors = load_file(tiny)
    with safe_open(tiny, "pt") as file:
        metadata = file.metadata()
    name = "model.diffusion_model.middle_block.1.proj_in.weight"
    del tensors[name]
    tensors["more"] = torch.zeros(1)
    save_file(tensors, tmp_path / "less.safetensors", metadata)
    common = ["--data", five, "--init", tmp_path / "less.safetensors", "--steps", 1, "--batch", 2,
              "--sample-every", 0, "--device", "cpu"]
    code, err, _ = command(train_module.main, capsys, *common, "--out", tmp_path / "no")
    assert code == 2 and name in err and err.count("\n") == 1
    code, err, _ = command(train_module.main, capsys, *common, "--new-weights",
                           "--out", tmp_path / "o")
    assert code == 0, err
    assert f"1 tensors start from random weights: {name}" in err
    assert "1 tensors of the file are not used: more" in err
    saved = load_file(tmp_path / "o/model.safetensors")
    assert saved[name].any() and saved.keys() == load_file(tiny).keys()


def test_vae_is_read_alone(tiny, five, tmp_path, capsys):  # noqa: F811
    """--vae takes a file whose other networks this program does not know, or a VAE alone."""
    tensors = load_file(tiny)
    vae = {name: t for name, t in tensors.items() if name.startswith("first_stage_model.")}
    with safe_open(tiny, "pt") as file:
        config = json.loads(file.metadata()["config"])
    config["unet"] = {"kind": "MyTransformer", "width": 8}
    save_file(vae, tmp_path / "fork.safetensors", {"config": json.dumps(config)})
    bare = {name.removeprefix("first_stage_model."): t for name, t in vae.items()}
    save_file(bare, tmp_path / "bare.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "tiny", TINY)
        for file in ("fork", "bare"):
            trained(capsys, "--data", five, "--init", "tiny", "--vae",
                    tmp_path / f"{file}.safetensors", "--steps", 1, "--batch", 2,
                    "--sample-every", 0, "--device", "cpu", "--out", tmp_path / file)
            saved = load_file(tmp_path / file / "model.safetensors")
            assert all(torch.equal(saved[name], t.half()) for name, t in vae.items())


class Broken(torch.nn.Module):
    """A UNet with a buffer that a file does not hold, or that a file would turn into floats."""

    persistent = False

    def __init__(self, cfg):
        super().__init__()
        self.config, self.mix = cfg, torch.nn.Conv2d(4, 4, 1)
        self.register_buffer("index", torch.arange(4), persistent=self.persistent)

    def forward(self, x, t, context):
        return self.mix(x)


@pytest.mark.parametrize("persistent, words", [(False, "is in no file"), (True, "integers")])
def test_what_could_not_be_loaded_is_not_trained(five, tmp_path, capsys,  # noqa: F811
                                                 persistent, words):
    """It is found before the first step."""
    class BrokenConfig(type(TINY.unet)):
        pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Broken, "persistent", persistent)
        patch.setitem(sd_module.NETWORKS, BrokenConfig, Broken)
        patch.setitem(PRESETS, "broken", replace(TINY, unet=BrokenConfig()))
        args = ["--data", five, "--init", "broken", "--steps", 1, "--device", "cpu"]
        sd = StableDiffusion(TINY)
        save(sd, tmp_path / "vae.safetensors", torch.float32)
        code, err, _ = command(train_module.main, capsys, *args, "--vae",
                               tmp_path / "vae.safetensors", "--out", tmp_path / "o")
    assert code == 2 and words in err and "index" in err and err.count("\n") == 1, err
    assert not (tmp_path / "o").exists()


def test_network_without_known_blocks_is_refused(five, tmp_path, capsys):  # noqa: F811
    """--checkpointing and --lora have nothing to work on: a line says so."""
    class PlainConfig(type(TINY.unet)):
        pass

    class Plain(torch.nn.Module):
        def __init__(self, cfg):
            super().__init__()
            self.config, self.mix = cfg, torch.nn.Conv2d(4, 4, 1)

        def forward(self, x, t, context):
            return self.mix(x)

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sd_module.NETWORKS, PlainConfig, Plain)
        patch.setitem(PRESETS, "plain", replace(TINY, unet=PlainConfig()))
        save(StableDiffusion(TINY), tmp_path / "vae.safetensors", torch.float32)
        args = ["--data", five, "--init", "plain", "--vae", tmp_path / "vae.safetensors",
                "--steps", 1, "--batch", 2, "--device", "cpu", "--sample-every", 0]
        for more, words in ((["--checkpointing"], "--checkpointing"), (["--lora", 2], "LoRA")):
            code, err, _ = command(train_module.main, capsys, *args, *more,
                                   "--out", tmp_path / "o")
            assert code == 2 and words in err and "Plain" in err and err.count("\n") == 1, err
        trained(capsys, *args, "--out", tmp_path / "plain")


# --- settings ---

def test_another_run_in_the_folder_is_not_continued(tiny, five, tmp_path, capsys):  # noqa: F811
    """The same command resumes, other settings are named, a finished run says so."""
    common = ["--data", five, "--init", tiny, "--batch", 2, "--sample-every", 0, "--device", "cpu",
              "--out", tmp_path / "o"]
    trained(capsys, *common, "--steps", 2)
    out = trained(capsys, *common, "--steps", 2)
    assert "is finished, at step 2" in out and "parameters" not in out
    for more, words in ((["--lr", "1e-3"], "--lr was 0.0001 and is 0.001"),
                        (["--batch", 3], "pictures per step was 2 and is 3"),
                        (["--train", "unet"], "--train was 'unet+text' and is 'unet'")):
        code, err, _ = command(train_module.main, capsys, *common, "--steps", 3, *more)
        assert code == 2 and words in err and "--resume" in err and err.count("\n") == 1, err
    assert torch.load(tmp_path / "o/state.pt")["step"] == 2
    out = trained(capsys, *common, "--steps", 3, "--lr", "1e-3", "--resume")
    assert f"resumes {tmp_path / 'o'} at step 2" in out
    out = trained(capsys, *common, "--steps", 4, "--lr", "1e-3", "--log-every", 1,
                  "--data", f"{five}/")
    assert "steps 3 to 4" in out  # speed, length and spelling may change


def test_former_option_names_still_work():
    """Hidden, and with the same meaning."""
    former = ["--clip", "2", "--word", "<w>", "--vectors", "3", "--init-word", "cat",
              "--prior", "a", "b", "--prior-weight", "0.5", "--gan", "0.1", "--gan-start", "7"]
    s = train_module.parse(train_module.Settings, "", ["--data", "x", *former])
    assert s == train_module.Settings(
        data=["x"], max_grad_norm=2.0, placeholder_token="<w>", num_vectors=3,
        initializer_token="cat", class_data=["a", "b"], class_weight=0.5, disc_weight=0.1,
        disc_start=7)


def test_help_names_every_option(capsys):
    code, _, out = command(train_module.main, capsys, "--help")
    assert code == 0 and "--max-grad-norm" in out and "--clip" not in out
    assert "learning rate of AdamW (0.0001)" in out


@pytest.mark.parametrize("given, near", [("--stepps", "--steps"), ("--batch_size", "--batch"),
                                         ("--sav", None), ("--max-grad", "--max-grad-norm")])
def test_unknown_option_names_the_nearest(capsys, given, near):
    code, err, _ = command(train_module.main, capsys, "--data", "x", given, "3")
    assert code == 2 and f"no option is called {given}" in err and err.count("\n") == 1
    assert near is None or f"did you mean {near}?" in err


def test_train_wrongly_used(tiny, five, tmp_path, capsys):  # noqa: F811
    (tmp_path / "empty").mkdir()
    (tmp_path / "uncaptioned").mkdir()
    shutil.copy(five / "red.png", tmp_path / "uncaptioned")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"no picture")
    (tmp_path / "broken/x.txt").write_text("x")
    cases = (
        (["--data", tmp_path / "nowhere"], "no such folder"),
        (["--data", five, "--prior", tmp_path / "nowhere"], "no such folder"),
        (["--data", tmp_path / "empty"], "no pictures"),
        (["--data", tmp_path / "uncaptioned"], "red.png has no caption"),
        (["--data", tmp_path / "broken"], "x.png"),
        (["--data", five, "--init", "nowhere.safetensors"], "no such file"),
        (["--data", five, "--lr", "1e9"], "the loss is"),
        (["--data", five, "--train", "gan"], "gan"),
        (["--data", five, "--batch", 0], "--batch"),
        (["--data", five, "--tokens", 99], "--tokens"),
        (["--data", five, "--pooled-dropout", 0.5], "--pooled-dropout"),
        (["--data", five, "--init", "sd1"], "latent channels"),
        (["--data", five, "--out", __file__ + "/x"], "cannot write"),
        (["--data", five, "--device", "toaster"], "toaster"),
        (["--data", five, "--lr", "0"], "--lr"),
        (["--data", five, "--vae", tiny], "--vae is for"),
        (["--data", five, "--init", "emoji", "--new-weights"], "--new-weights is for"),
        (["--data", five, "--word", "<x>"], "--placeholder-token is for --train word"),
        (["--data", five, "--train", "word"], "--placeholder-token"),
        (["--data", five, "--train", "word", "--word", "<x>"], "no caption has the word <x>"),
        (["--data", five, "--train", "word", "--word", "a/b"], "without spaces and slashes"),
    )
    for args, words in cases:
        code, err, _ = command(train_module.main, capsys, "--init", tiny, "--steps", 30,
                               "--log-every", 5, "--out", tmp_path / "out", "--sample-every", 0,
                               *args)
        assert code == 2 and words in err and err.count("\n") == 1, (args, err)
        assert words != "no such folder" or not (tmp_path / "out").exists()
