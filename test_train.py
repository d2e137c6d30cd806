"""train.py and data.py: what they learn, that interruption and division change nothing, and what they say when wrongly used."""
import io
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from dataclasses import asdict, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import data as data_module
import sd as sd_module
import train as train_module
from clip import CLIPTextModel
from data import Folder, Shards
from sd import PRESETS, StableDiffusion
from test_cli import TINY, command, signals_as_they_were, tiny  # noqa: F401

HERE = Path(__file__).parent
torch.set_num_threads(1)


@pytest.fixture(scope="module")
def five(tmp_path_factory):
    """Five captioned pictures: discs of five colours on transparent ground."""
    folder = tmp_path_factory.mktemp("five")
    for name in ("red", "green", "blue", "yellow", "black"):
        disc = Image.composite(Image.new("RGBA", (80, 80), name), Image.new("RGBA", (80, 80)), Image.radial_gradient("L").resize((80, 80)).point(lambda v: 255 * (v < 90)))
        disc.save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"{name} disc\na {name} disc\n")
    return folder


def trained(capsys, *args):
    code, err, out = command(train_module, capsys, *args)
    assert code == 0, err
    return out


@pytest.mark.parametrize("what", ["unet+text", "unet", "vae", "decoder"])
def test_resumed_training_equals_uninterrupted(tiny, five, tmp_path, capsys, what):
    """Killed after step 4 of 8 and started again: the same weights, bit for bit, in model.safetensors and state.pt."""
    common = ["--data", five, "--init", tiny, "--train", what, "--steps", 8, "--batch", 3, "--save-every", 4, "--sample-every", 0, "--device", "cpu", "--warmup", 6, "--decay", 3]
    trained(capsys, *common, "--out", tmp_path / "whole")
    save = StableDiffusion.save

    def save_then_die(self, path, *rest):
        if save_then_die.saves == 1:
            raise KeyboardInterrupt
        save_then_die.saves += 1
        save(self, path, *rest)
    save_then_die.saves = 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(StableDiffusion, "save", save_then_die)
        command(train_module, capsys, *common, "--out", tmp_path / "cut")
    assert "steps 4 to 8" in trained(capsys, *common, "--out", tmp_path / "cut")
    whole, cut = (torch.load(tmp_path / run / "state.pt") for run in ("whole", "cut"))
    start = load_file(tiny)
    moved = load_file(tmp_path / "whole/model.safetensors")
    assert any(not torch.equal(moved[name].float(), start[name].half().float()) for name in start)
    assert whole["step"] == cut["step"] == 8
    for key in ("params", "ema"):
        assert all(torch.equal(a, b) for a, b in zip(whole[key], cut[key], strict=True))
    again = load_file(tmp_path / "cut/model.safetensors")
    assert all(torch.equal(moved[name], again[name]) for name in moved)


def test_one_batch_is_learned_by_heart(five, tmp_path, capsys):
    """A random UNet on the built-in VAE and five discs: the loss falls from over 1 to about 0.25, and words then choose the colour."""
    out = trained(capsys, "--data", five, "--out", tmp_path / "o", "--init", "emoji", "--steps", 150, "--batch", 5, "--lr", 2e-3, "--log-every", 10, "--tokens", 16,
                  "--time-shift", 3, "--caption-dropout", 0, "--ema", 0.9, "--device", "cpu")
    torch.set_num_threads(1)
    losses = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert np.mean(losses[-4:]) < 0.33 and losses[0] > 1, losses
    sd = StableDiffusion.load(tmp_path / "o/model.safetensors")
    for name, rgb in (("red", (1, 0, 0)), ("blue", (0, 0, 1)), ("yellow", (1, 1, 0))):
        middle = np.asarray(sd.generate(f"{name} disc", guidance=1)[0])[24:40, 24:40].mean((0, 1)) / 255
        assert np.abs(middle - rgb).max() < 0.3, (name, middle)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_autocast_trains_nearly_as_fp32(tiny, five, tmp_path, capsys, amp):
    losses = {}
    for kind in (amp, ""):
        out = trained(capsys, "--data", five, "--init", tiny, "--steps", 3, "--batch", 2, "--log-every", 1, "--device", "cpu", "--amp", kind, "--out", tmp_path / f"o{kind}")
        losses[kind] = [float(x) for x in re.findall(r"loss ([\d.]+)", out)]
    assert len(losses[amp]) == 3 and np.allclose(losses[amp], losses[""], rtol=0.02), losses


def test_a_changed_row_is_trained_on_the_builtin_vae(five, tmp_path, capsys):
    """README, "Change one thing": --init emoji takes the row of PRESETS as it stands, with random weights, and the trained VAE."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PRESETS, "emoji", replace(PRESETS["emoji"], prediction="eps"))
        trained(capsys, "--data", five, "--out", tmp_path / "o", "--init", "emoji", "--steps", 1, "--batch", 2, "--device", "cpu")
    sd, builtin = StableDiffusion.load(tmp_path / "o/model.safetensors"), StableDiffusion.load()
    assert sd.config.prediction == "eps" and sd.config.vae == builtin.config.vae
    assert all(torch.equal(a, b) for a, b in zip(sd.vae.state_dict().values(), builtin.vae.state_dict().values(), strict=True))
    assert not torch.equal(sd.unet.out[0].weight, builtin.unet.out[0].weight)


def test_times_stay_in_range():
    """fp32 rounds the largest u up to time 1000 for some shifts."""
    u = torch.tensor([0.0, 0.5, 1 - 2**-24])
    for shift in (1, 2, 3, 6, 10):
        assert train_module.shifted(u, shift).tolist() == [0, int(1000 * shift * 0.5 / (1 + (shift - 1) * 0.5)), 999]


def test_sigterm_saves_and_leaves(tiny, five, tmp_path, capsys):
    """Stopped in the middle, it ends the step, saves, and the same command goes on."""
    common = ["--data", five, "--init", tiny, "--batch", 2, "--sample-every", 0, "--device", "cpu", "--out", tmp_path / "o", "--steps", 6]
    draw = train_module.UNetLoss.draw

    def draw_then_signal(self, batch, step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return draw(self, batch, step)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module.UNetLoss, "draw", draw_then_signal)
        assert "stopped and saved after step 4" in trained(capsys, *common)
    StableDiffusion.load(tmp_path / "o/model.safetensors")
    assert "steps 4 to 6" in trained(capsys, *common)


def test_finetune_loads_in_sd(five, tmp_path, capsys):
    """The README's fine-tuning command, shortened: built-in model, five pictures, and its file draws."""
    trained(capsys, "--data", five, "--out", tmp_path / "mine", "--steps", 3, "--batch", 2, "--sample-every", 3)
    assert sorted(p.name for p in (tmp_path / "mine").iterdir()) == ["metrics.jsonl", "model.safetensors", "sample-0000003.png", "state.pt"]
    assert command(sd_module, capsys, "red disc", "--ckpt", tmp_path / "mine/model.safetensors", "--out", tmp_path / "o.png")[0] == 0


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


# --- many processes ---

def torchrun(n: int, *args) -> subprocess.Popen:
    """train.py in n processes (0: without torchrun)."""
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={n}", "--master-port=0", "--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"] if n else []
    return subprocess.Popen([sys.executable, *launcher, HERE / "train.py", *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"})


def finished(process: subprocess.Popen) -> str:
    out = process.communicate()[0]
    assert process.returncode == 0, out
    return out


@pytest.fixture(scope="module")
def grouped(tmp_path_factory):
    """A tiny model with four channels in a norm's group. With one, as in `tiny`, a bias before a norm has no gradient but rounding, which Adam makes as large as any."""
    torch.manual_seed(0)
    sd = StableDiffusion(replace(TINY, unet=replace(TINY.unet, num_groups=8)))
    for p in sd.unet.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.05)
    path = tmp_path_factory.mktemp("grouped") / "grouped.safetensors"
    sd.save(path, torch.float32)
    return path


def test_two_processes_equal_one_with_twice_the_batch(grouped, five, tmp_path):
    """And two passes of half the batch too. 20 steps: losses, weights and averages, by DDP and FSDP; and one goes on where two stopped."""
    common = ["--data", five, "--init", grouped, "--train", "unet", "--log-every", 1, "--sample-every", 0, "--device", "cpu", "--ema", 0.9, "--warmup", 5, "--lr", 1e-3]
    runs = {"one": (0, "--batch", 4), "passes": (0, "--batch", 2, "--accumulate", 2), "ddp": (2, "--batch", 2),
            "fsdp": (2, "--batch", 1, "--accumulate", 2, "--fsdp", "--checkpointing")}
    for name, (n, *more) in runs.items():
        finished(torchrun(n, *common, *more, "--steps", 20, "--out", tmp_path / name))
    losses = {name: np.array([line["loss"] for line in metrics(tmp_path / name)]) for name in runs}
    states = {name: torch.load(tmp_path / name / "state.pt") for name in runs}
    for name in runs:
        assert len(losses[name]) == 20 and np.abs(losses[name] / losses["one"] - 1).max() < 1e-5, name
        for key in ("params", "ema"):
            assert max(float((a - b).norm() / b.norm()) for a, b in zip(states[name][key], states["one"][key], strict=True)) < 1e-4, (name, key)
        moments = [state["optimizer"]["state"][0]["exp_avg"] for state in (states[name], states["one"])]
        assert torch.allclose(*moments, rtol=1e-3, atol=1e-6)
        StableDiffusion.load(tmp_path / name / "model.safetensors")
    assert "steps 20 to 21" in finished(torchrun(0, *common, "--batch", 4, "--steps", 21, "--out", tmp_path / "fsdp"))


def test_killed_and_stopped_anywhere_it_goes_on(grouped, shards, tmp_path):
    """Two processes on shards, with a worker each: SIGKILL to all at a random step, later SIGTERM, and what comes out is what an uninterrupted run gives, bit for bit."""
    common = ["--data", shards, "--init", grouped, "--batch", 2, "--steps", 24, "--shuffle", 7, "--workers", 1, "--save-every", 3, "--log-every", 1, "--sample-every", 0, "--device", "cpu"]
    finished(torchrun(2, *common, "--out", tmp_path / "whole"))

    def reached(process, step):
        while process.poll() is None and (not (tmp_path / "cut/metrics.jsonl").exists() or metrics(tmp_path / "cut")[-1]["step"] < step):
            time.sleep(0.05)
        assert process.poll() is None, process.communicate()[0]
    process = torchrun(2, *common, "--out", tmp_path / "cut")
    reached(process, random.randint(4, 10))
    for pid in [process.pid, *map(int, Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split())]:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    process = torchrun(2, *common, "--out", tmp_path / "cut")
    reached(process, 13)
    process.send_signal(signal.SIGTERM)
    out = process.communicate()[0]
    assert "stopped and saved" in out, out
    StableDiffusion.load(tmp_path / "cut/model.safetensors").generate("7", steps=1)
    step = torch.load(tmp_path / "cut/state.pt")["step"]
    assert 13 <= step < 24 and f"steps {step} to 24" in finished(torchrun(2, *common, "--out", tmp_path / "cut"))
    whole, cut = (torch.load(tmp_path / run / "state.pt") for run in ("whole", "cut"))
    assert all(torch.equal(a, b) for key in ("params", "ema") for a, b in zip(whole[key], cut[key], strict=True))
    assert whole["positions"] == cut["positions"] and whole["positions"][0][0]["count"] > 0
    assert [line["loss"] for line in metrics(tmp_path / "whole")] == [line["loss"] for line in metrics(tmp_path / "cut")]
    assert not list((tmp_path / "cut").glob("*.tmp"))


# --- what is computed ---

@pytest.mark.parametrize("prediction", ["eps", "v", "v-zero-snr"])
@pytest.mark.parametrize("gamma", [0, 5])
def test_gradient_equals_diffusers(grouped, five, tmp_path, prediction, gamma):
    """One step of the loss beside the same with diffusers' UNet and scheduler, min-SNR weights after Hang et al. 2023: loss and every gradient to 1e-5 of the largest."""
    diffusers = pytest.importorskip("diffusers")
    sd = StableDiffusion.load(grouped, "cpu", torch.float32)
    sd.config.prediction = prediction
    s = train_module.Settings(data=[str(five)], train="unet", batch=4, caption_dropout=0.5, min_snr=gamma, tokens=77)
    loss_of = train_module.UNetLoss(s, sd)
    folder = Folder(s.data, [(32, 32)], 4, 0)
    loss_of.prepare([folder], 0, 1)
    batch = next(folder.batches(0, 1))
    loss = loss_of(batch, 3)
    loss.backward()
    loss = loss.detach()

    sd.save(tmp_path / "folder", torch.float32)
    unet = diffusers.UNet2DConditionModel.from_pretrained(tmp_path / "folder/unet")
    scheduler = diffusers.DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                        prediction_type="epsilon" if prediction == "eps" else "v_prediction", rescale_betas_zero_snr=prediction == "v-zero-snr")
    x0, t, noise, keep, _ = loss_of.draw(batch, 3)
    context = sd.encode_prompt([caption if kept else "" for caption, kept in zip(batch.captions, keep)])
    assert 0 < keep.sum() < 4
    wanted = noise if prediction == "eps" else scheduler.get_velocity(x0, noise, t)
    error = (unet(scheduler.add_noise(x0, noise, t), t, context).sample - wanted).square().mean((1, 2, 3))
    snr = scheduler.alphas_cumprod[t] / (1 - scheduler.alphas_cumprod[t])
    weight = snr.clamp(max=gamma) / (snr + (prediction != "eps")) if gamma else 1.0
    theirs = (error * weight).mean()
    theirs.backward()
    theirs = theirs.detach()
    assert abs(float(loss / theirs) - 1) < 1e-5
    with torch.device("meta"):
        names = StableDiffusion(sd.config)
    grads = {name: p.grad for name, p in unet.named_parameters()}
    for name, p in sd.unet.named_parameters():
        other = grads[sd_module.diffusers_name("model.diffusion_model." + name, names.config).removeprefix("unet/")].reshape(p.shape)
        assert (p.grad - other).abs().max() <= 1e-5 * max(float(other.abs().max()), 1e-3), name


def test_lora_and_a_new_word_are_files_for_sd(tiny, five, tmp_path, capsys):
    """Each is saved alone and changes what is drawn; the new word only where it is named, and a prior folder counts in the loss."""
    shutil.copytree(five, tmp_path / "five")
    for path in (tmp_path / "five").glob("*.txt"):
        path.write_text(path.read_text().replace("disc", "<disc>"))
    common = ["--data", tmp_path / "five", "--init", tiny, "--steps", 4, "--batch", 2, "--lr", 1e-2, "--warmup", 0, "--device", "cpu"]
    trained(capsys, *common, "--lora", 2, "--train", "unet", "--out", tmp_path / "lora", "--sample-every", 2)
    trained(capsys, *common, "--train", "word", "--word", "<disc>", "--vectors", 2, "--init-word", "cat", "--out", tmp_path / "word")
    assert not (tmp_path / "lora/model.safetensors").exists() and load_file(tmp_path / "word/<disc>.safetensors")["<disc>"].shape == (2, 32)
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "lora/lora.safetensors"))

    def drawn(prompt, *more):
        assert command(sd_module, capsys, prompt, "--ckpt", tiny, "--out", tmp_path / "o.png", *more)[0] == 0
        return np.asarray(Image.open(tmp_path / "o.png"), int)
    word = ["--embedding", tmp_path / "word/<disc>.safetensors"]
    assert not np.array_equal(drawn("a cat"), drawn("a cat", "--lora", tmp_path / "lora/lora.safetensors"))
    assert np.array_equal(drawn("a cat"), drawn("a cat", *word)) and not np.array_equal(drawn("a <disc>"), drawn("a <disc>", *word))
    plain, prior = (trained(capsys, *common, "--sample-every", 0, "--out", tmp_path / name, *more) for name, more in {"p": [], "q": ["--prior", five, "--prior-weight", 0.5]}.items())
    first = [float(re.search(r"loss ([\d.]+)", out)[1]) for out in (plain, prior)]
    assert first[1] > 1.2 * first[0]
    trained(capsys, *common, "--out", tmp_path / "frozen", "--freeze", "cond_stage_model.", "model.diffusion_model.input_blocks.")
    before, after = load_file(tiny), load_file(tmp_path / "frozen/model.safetensors")
    moved = {name for name in before if not torch.equal(before[name].half(), after[name].half())}
    assert moved and not any(name.startswith(("cond_stage_model.", "model.diffusion_model.input_blocks.", "first_stage_model.")) for name in moved)


def test_two_text_encoders_and_shapes(five, tmp_path, capsys):
    """An SDXL in small, on wide pictures: sizes reach the UNet, empty captions are zeros, both encoders learn a word."""
    openclip = replace(PRESETS["sdxl"].text_2, hidden_size=64, num_hidden_layers=2, num_attention_heads=2)
    config = replace(TINY, unet=replace(TINY.unet, context_dim=96, adm_in_channels=64 + 6 * 16), text=replace(PRESETS["sdxl"].text, hidden_size=32, num_hidden_layers=2, num_attention_heads=2),
                     text_2=openclip, zero_negative=True)
    sd = StableDiffusion(config)
    sd.save(tmp_path / "xl.safetensors", torch.float32)
    (tmp_path / "wide").mkdir()
    for i in range(4):
        Image.new("RGB", (100, 40), (60 * i, 0, 0)).save(tmp_path / f"wide/{i}.png")
        (tmp_path / f"wide/{i}.txt").write_text(f"<w> {i}")
    common = ["--data", tmp_path / "wide", five, "--init", tmp_path / "xl.safetensors", "--buckets", "--steps", 3, "--batch", 2, "--device", "cpu", "--caption-dropout", 0.5]
    seen = []
    with pytest.MonkeyPatch.context() as patch:
        sized = StableDiffusion.sized
        patch.setattr(StableDiffusion, "sized", lambda self, context, pooled, sizes: seen.append((context, pooled, sizes)) or sized(self, context, pooled, sizes))
        trained(capsys, *common, "--out", tmp_path / "o", "--sample-every", 0, "--steps", 8)
    assert {tuple(sizes[0].tolist()) for *_, sizes in seen} - {(32, 32, 0, 0, 32, 32)} == {(80, 80, 0, 0, 32, 32), (40, 100, 2, 0, 16, 48)}  # the first: of the sample sheet
    assert any((context[0] == 0).all() and (pooled[0] == 0).all() for context, pooled, _ in seen) and not all((context == 0).all() for context, *_ in seen)
    trained(capsys, *common, "--train", "word", "--word", "<w>", "--out", tmp_path / "w", "--sample-every", 0)
    assert {name: tuple(x.shape) for name, x in load_file(tmp_path / "w/<w>.safetensors").items()} == {"clip_l": (1, 32), "clip_g": (1, 64)}
    assert command(sd_module, capsys, "a <w>", "--ckpt", tmp_path / "xl.safetensors", "--embedding", tmp_path / "w/<w>.safetensors", "--out", tmp_path / "o.png")[0] == 0


def test_vae_with_codes_and_discriminator(tiny, five, tmp_path, capsys):
    """VQ starts where latents are and its loss falls; the discriminator learns from the first, and changes the decoder from when it is heard."""
    common = ["--data", five, "--init", tiny, "--train", "vae", "--batch", 5, "--device", "cpu", "--warmup", 0, "--lr", 1e-3, "--log-every", 1]
    out = trained(capsys, *common, "--vq", 16, "--steps", 60, "--out", tmp_path / "vq")
    losses = [line["loss"] for line in metrics(tmp_path / "vq")]
    codes = load_file(tmp_path / "vq/vq.safetensors")["first_stage_model.quantize.embedding.weight"]
    assert np.mean(losses[-5:]) < 0.8 * np.mean(losses[:5]) and codes.shape == (16, 4) and codes.std() > 1 / 16 and "dB PSNR" in out
    decoders, params = {}, {}
    for name, more in {"plain": [], "unheard": ["--gan", 0.5, "--gan-start", 4], "heard": ["--gan", 0.5, "--gan-start", 2]}.items():
        trained(capsys, *common, "--clip", 1e9, "--steps", 4, "--sample-every", 0, "--out", tmp_path / name, *more)
        decoders[name] = StableDiffusion.load(tmp_path / name / "model.safetensors").vae.decoder.conv_in.weight
        params[name] = torch.load(tmp_path / name / "state.pt")["params"]
    assert torch.allclose(decoders["plain"], decoders["unheard"], atol=1e-6) and not torch.allclose(decoders["plain"], decoders["heard"], atol=1e-4)
    torch.manual_seed(0)
    first = train_module.discriminator(32)[0].weight
    learned = [p for p in params["unheard"][len(params["plain"]):] if p.shape == first.shape]
    assert len(learned) == 1 and (learned[0] - first).abs().mean() > 5e-4


def test_a_stream_without_end_takes_no_memory(tmp_path):
    """Shards made by a command as they are read, 4 processes of 2 workers: all samples once, and memory that does not grow. STREAM=1000000 does it at full size."""
    n, shards = int(os.environ.get("STREAM", 16_000)), 16
    (tmp_path / "make.py").write_text(MAKE)
    url = f"pipe:{sys.executable} {tmp_path}/make.py {{00..{shards - 1:02}}} {n // shards}"
    (tmp_path / "read.py").write_text(READ)
    readers = [subprocess.Popen([sys.executable, tmp_path / "read.py", url, str(rank), str(n)], stdout=open(tmp_path / str(rank), "w"), cwd=HERE,
                                env=os.environ | {"PYTHONPATH": str(HERE), "OMP_NUM_THREADS": "1"}) for rank in range(4)]
    seen = bytearray(n)
    for rank, reader in enumerate(readers):
        assert reader.wait() == 0
        *numbers, memory = (tmp_path / str(rank)).read_text().splitlines()
        for line in numbers:
            for number in map(int, line.split()):
                seen[number] += 1
        early, late = map(float, memory.split())
        print(f"memory of a process with its workers after a tenth and at the end: {early:.0f} and {late:.0f} MB")
        assert late < 1.1 * early + 20
    assert set(seen) == {1}


MAKE = """
import io, sys, tarfile
from PIL import Image
shard, n = map(int, sys.argv[1:])
stream = io.BytesIO()
Image.new("RGB", (8, 8), (shard, 0, 0)).save(stream, "PNG")
picture = stream.getvalue()
with tarfile.open(fileobj=sys.stdout.buffer, mode="w|") as tar:
    for i in range(shard * n, shard * n + n):
        for kind, content in (("png", picture), ("txt", str(i).encode())):
            member = tarfile.TarInfo(f"{i:09}.{kind}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        tar.members.clear()
"""
READ = """
import os, sys
from pathlib import Path
from data import Shards

def memory(pid):  # not the clean pages: those of libraries count as private once the other processes have ended
    kb = sum(int(line.split()[1]) for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines() if line.startswith("Private_Dirty"))
    return kb / 1024 + sum(map(memory, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))

url, rank, n = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
batches = Shards([url], [(8, 8)], batch=50, seed=0, shuffle=500, rank=rank, world=4).batches({}, 0, workers=2)
for i in range(n // 4 // 50):
    print(*next(batches).captions)
    if i == n // 4 // 50 // 10:
        early = memory(os.getpid())
print(early, memory(os.getpid()), flush=True)
os._exit(0)
"""


def test_seed_counts(tiny, five, tmp_path, capsys):
    losses = [trained(capsys, "--data", five, "--init", tiny, "--steps", 1, "--batch", 2, "--device", "cpu", "--seed", seed, "--sample-every", 0, "--out", tmp_path / str(seed))
              for seed in (0, 1)]
    assert len({re.search(r"loss [\d.]+", out)[0] for out in losses}) == 2


# --- data ---

def jpeg(number: int, size: tuple[int, int] = (16, 16)) -> bytes:
    """A picture of one colour that tells its number."""
    stream = io.BytesIO()
    Image.new("RGB", size, (number % 256, number // 256, 0)).save(stream, "PNG")
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """16 shards of 10 samples; their captions are their numbers, every fourth is wide."""
    folder = tmp_path_factory.mktemp("shards")
    for shard in range(16):
        files = {}
        for number in range(10 * shard, 10 * shard + 10):
            files |= {f"{number:05}.jpg": jpeg(number, (32, 16) if number % 4 == 0 else (16, 16)), f"{number:05}.txt": str(number).encode(), f"{number:05}.json": b"{}"}
        write_tar(folder / f"{shard:04}.tar", files)
    return f"{folder}/{{0000..0015}}.tar"


SQUARE = [(16, 16)]


def captions(batches, n):
    return [[next(batches).captions for _ in range(n)] for batches in batches]


def test_every_sample_once_an_epoch(shards):
    """4 processes with 2 workers each: 20 samples for each worker, 8 batches of 5 for each process; then all again, in another order."""
    ranks = [Shards([shards], SQUARE, batch=5, seed=0, shuffle=7, rank=rank, world=4).batches({}, 0, workers=2) for rank in range(4)]
    epochs = [captions(ranks, 8) for _ in range(2)]
    for epoch in epochs:
        assert sorted(int(caption) for rank in epoch for batch in rank for caption in batch) == list(range(160))
    assert epochs[0] != epochs[1]
    again = [Shards([shards], SQUARE, batch=5, seed=seed, shuffle=7, rank=1, world=4).batches({}, 0, workers=2) for seed in (0, 1)]
    assert captions(again[:1], 8)[0] == epochs[0][1] != captions(again[1:], 8)[0]


def test_places_are_all_different_and_captions_belong_to_their_pictures(shards):
    ranks = [Shards([shards], SQUARE, batch=5, seed=0, rank=rank, world=2).batches({}, 0, workers=2) for rank in range(2)]
    batches = [next(rank) for rank in ranks for _ in range(20)]
    places = [place for batch in batches for place in batch.places]
    assert len(set(places)) == len(places) == 200
    for batch in batches:
        assert [int(x[0, 8, 8]) for x in batch.pixels] == [int(caption) for caption in batch.captions]


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_shards_repeat_and_skip_nothing(shards, tmp_path, workers):
    """After any number of batches, in blocks, shapes and epochs of whatever length: what comes next is what would have come."""
    def start(positions, number):
        return Shards([shards], [(16, 16), (32, 16)], batch=3, seed=0, shuffle=11, rank=1, world=3).batches(positions, number, workers)
    whole = start({}, 0)
    whole = [next(whole) for _ in range(48)]
    assert {batch.position.epoch for batch in whole} == {0, 1, 2} and any(batch.position.left for batch in whole)
    for number in (0, 1, 2, 5, 12, 23, 37):
        positions = {}
        before = start(positions, 0)
        for _ in range(number):
            next(before)
        torch.save({worker: asdict(at) for worker, at in positions.items()}, tmp_path / "p.pt")
        positions = {worker: data_module.Position(**at) for worker, at in torch.load(tmp_path / "p.pt", weights_only=True).items()}
        after = start(positions, number)
        for expected in whole[number:number + 10]:
            batch = next(after)
            assert batch.captions == expected.captions and batch.places == expected.places and torch.equal(batch.pixels, expected.pixels)


def test_damaged_shards_are_survived(tmp_path, capfd):
    """One cut off within a picture, one between two members, one within a header, one that is no archive, a command that fails, a caption and
    a picture that are none: everything else comes once."""
    files = {f"{number}.{kind}": jpeg(number) if kind == "png" else str(number).encode() for number in range(12) for kind in ("png", "txt")}
    parts = [dict(list(files.items())[8 * i:8 * i + 8]) for i in range(3)]
    for i, part in enumerate(parts):
        write_tar(tmp_path / f"{i}.tar", part)
    whole = (tmp_path / "1.tar").read_bytes()
    with tarfile.open(tmp_path / "1.tar") as tar:
        third = tar.getmembers()[4]
    for name, end in {"within": third.offset_data + 20, "between": third.offset, "header": third.offset + 100}.items():
        (tmp_path / f"{name}.tar").write_bytes(whole[:end])
    (tmp_path / "none.tar").write_bytes(b"no archive" * 1000)
    write_tar(tmp_path / "odd.tar", {"a.png": jpeg(0), "a.txt": b" \n", "b.png": jpeg(1)[:40], "b.txt": b"b", "c.txt": b"c", "d.png": jpeg(20), "d.json": b'{"caption": "20"}'})
    for name in ("within", "between", "header", "none", "fails"):
        url = "pipe:cat 2.tar; exit 3" if name == "fails" else str(tmp_path / f"{name}.tar")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(tmp_path)
            batches = Shards([str(tmp_path / "0.tar"), url, str(tmp_path / "odd.tar")], SQUARE, batch=1, seed=0, shuffle=3).batches({}, 0)
            expected = [*range(4), 20] + {"within": [4, 5], "none": [], "fails": [*range(8, 12)]}.get(name, [4])  # the last before an end that is missing may be incomplete
            found = [next(batches) for _ in expected]
            assert sorted(int(batch.captions[0]) for batch in found) == sorted(expected), name
            found += [next(batches) for _ in expected]
            assert found[-1].position.skipped + found[-1].position.skipped_since in (3, 4, 5, 6)
        assert f"{url} breaks off after {len(expected) - 5} samples" in capfd.readouterr().err, name


def test_shards_come_from_urls(tmp_path, capfd):
    """Two whole ones, one that breaks off before its promised length, and one that is not there: all that came comes once in each epoch, and it is said what did not."""
    for shard in range(3):
        write_tar(tmp_path / f"{shard}.tar", {f"{i}.{kind}": jpeg(i) if kind == "png" else str(i).encode() for i in range(4 * shard, 4 * shard + 4) for kind in ("png", "txt")})
    with tarfile.open(tmp_path / "2.tar") as tar:
        end = tar.getmembers()[4].offset_data + 20  # within the third sample's picture
    asked = []

    class Server(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            path = tmp_path / self.path[1:]
            if not path.exists():
                return self.send_error(404)
            content = path.read_bytes()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content[:end] if path.name == "2.tar" else content)

        def log_message(self, *_):
            pass
    server = ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}/"
        assert data_module.is_shards(url + "{0..3}.tar")
        batches = Shards([url + "{0..3}.tar"], SQUARE, batch=5, seed=0, shuffle=100).batches({}, 0)
        for _ in range(2):
            found = [next(batches) for _ in range(2)]
            assert sorted(int(caption) for batch in found for caption in batch.captions) == list(range(10))
            assert all(int(x[0, 8, 8]) == int(caption) for batch in found for caption, x in zip(batch.captions, batch.pixels))
    finally:
        server.shutdown()
        server.server_close()
    said = capfd.readouterr().err
    assert f"{url}2.tar breaks off after 2 samples" in said and f"{url}3.tar breaks off after 0 samples" in said and "0.tar" not in said and "1.tar" not in said
    assert sorted(asked[:4]) == [f"/{i}.tar" for i in range(4)]


def test_folders_say_what_they_skip(five, tmp_path, capfd):
    """metadata.jsonl, prompts in PNGs; broken pictures and empty captions are left out and counted."""
    (tmp_path / "sub").mkdir()
    shutil.copy(five / "red.png", tmp_path / "sub/red.png")
    (tmp_path / "broken.png").write_bytes((five / "blue.png").read_bytes()[:300])
    rows = [{"file_name": "sub/red.png", "text": "red"}, {"file_name": "broken.png", "text": "x"}, {"file_name": "gone.png", "text": "x"}, {"file_name": "sub/red.png", "text": ""}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    folder = Folder([str(tmp_path), str(five)], [(32, 32)], 2, 0)
    assert "3 of 9 pictures skipped" in capfd.readouterr().err and [sample.captions for sample in folder.samples][:2] == [["red"], ["black disc", "a black disc"]]
    (tmp_path / "drawn").mkdir()
    sd_module.write(Image.new("RGB", (32, 32)), tmp_path / "drawn/x.png", pnginfo=sd_module.text_chunk("a cat\nNegative prompt: a dog\nSteps: 3"))
    assert Folder([str(tmp_path / "drawn")], [(32, 32)], 1, 0).samples[0].captions == ["a cat"]


def test_pictures_keep_their_shape():
    """Shapes of 512 and 64; a wide picture is cut at its sides, and SDXL is told by how much."""
    for size, f, n in ((512, 8, None), (64, 8, None), (1024, 8, None)):
        kinds = data_module.shapes(size, f, True)
        assert (size, size) in kinds and all(w * h <= size**2 and w % f == h % f == 0 and max(w, h) <= 2 * size for w, h in kinds)
        assert all((h, w) in kinds for w, h in kinds) and all(w * h >= 0.8 * size**2 for w, h in kinds)
    assert data_module.nearest((1920, 1080), data_module.shapes(512, 8, True)) == (640, 384)
    sample = data_module.Sample("x", jpeg(7, (300, 100)), ["x"])
    cut = data_module.cut(sample, [(64, 32)])
    assert cut.pixels.shape == (3, 32, 64) and cut.size == [100, 300, 0, 16, 32, 64]


def test_folder_order_is_fair(five):
    """Batches of 4 from 5 pictures: each once before any comes again; two processes share what one would have."""
    folder = Folder([str(five)], [(16, 16)], 4, 0)
    one = folder.batches(0, 1)
    places = [place for batch in (next(one) for _ in range(5)) for place in batch.places]
    assert places == list(range(20))
    order = folder.order()
    pictures = [i for _ in range(5) for _, i in next(order)]
    assert all(sorted(pictures[i:i + 5]) == list(range(5)) for i in range(0, 20, 5))
    one, two = folder.batches(0, 1), [folder.batches(rank, 2, workers=rank) for rank in range(2)]
    for n in range(6):
        a, b = next(one), next(two[n % 2])
        assert a.captions == b.captions and torch.equal(a.pixels, b.pixels)


def test_cache_is_used_and_invalidated(tiny, five, tmp_path, capsys, monkeypatch):
    """The second run encodes nothing; a new picture, or another VAE, is encoded; and training is the same as without."""
    shutil.copytree(five, tmp_path / "five")
    encoded, moments = [], train_module.UNetLoss.moments
    monkeypatch.setattr(train_module.UNetLoss, "moments", lambda self, pixels: encoded.append(len(pixels)) or moments(self, pixels))
    words, encode = [], CLIPTextModel.encode
    monkeypatch.setattr(CLIPTextModel, "encode", lambda self, tokens: words.append(1) or encode(self, tokens))

    def run(out, *more):
        encoded.clear(), words.clear()
        trained(capsys, "--data", tmp_path / "five", "--init", tiny, "--train", "unet", "--steps", 3, "--batch", 2, "--device", "cpu", "--sample-every", 0, "--out", tmp_path / out, *more)
        return len(encoded), len(words) - 5 * 2  # the sheet at the end is drawn from five prompts

    assert run("plain")[0] == 5
    assert run("first", "--cache", tmp_path / "cache") == (5, 11) and run("second", "--cache", tmp_path / "cache") == (0, 0)
    plain, second = (metrics(tmp_path / out)[-1]["loss"] for out in ("plain", "second"))
    assert abs(plain / second - 1) < 1e-6
    shutil.copy(five / "red.png", tmp_path / "five/blue.png")
    assert run("third", "--cache", tmp_path / "cache") == (1, 0)
    sd = StableDiffusion.load(tiny, dtype=torch.float32)
    sd.vae.encoder.conv_in.bias += 0.1
    sd.save(tmp_path / "other.safetensors", torch.float32)
    assert run("fourth", "--cache", tmp_path / "cache", "--init", tmp_path / "other.safetensors") == (5, 0)


def test_train_wrongly_used(tiny, five, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "uncaptioned").mkdir()
    shutil.copy(five / "red.png", tmp_path / "uncaptioned")
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/x.png").write_bytes(b"no picture")
    (tmp_path / "broken/x.txt").write_text("x")
    for args, words in ((["--data", tmp_path / "nowhere"], "no such folder"), (["--data", five, "--prior", tmp_path / "nowhere"], "no such folder"),
                        (["--data", tmp_path / "empty"], "no pictures"), (["--data", tmp_path / "uncaptioned"], "red.png has no caption"),
                        (["--data", tmp_path / "broken"], "x.png"), (["--data", five, "--init", "nowhere.safetensors"], "no such file"), (["--data", five, "--lr", "1e9"], "the loss is"),
                        (["--data", five, "--train", "gan"], "gan"), (["--data", five, "--batch", 0], "--batch"), (["--data", five, "--tokens", 99], "--tokens"), (["--data", five, "--pooled-dropout", 0.5], "--pooled-dropout"),
                        (["--data", five, "--init", "sd1"], "latent channels"), (["--data", five, "--out", __file__ + "/x"], "cannot write"),
                        (["--data", five, "--device", "toaster"], "toaster")):
        code, err, _ = command(train_module, capsys, "--init", tiny, "--steps", 30, "--log-every", 5, "--out", tmp_path / "out", "--sample-every", 0, *args)
        assert code == 2 and words in err and err.count("\n") == 1, (args, err)
        assert words != "no such folder" or not (tmp_path / "out").exists()
