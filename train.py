"""Train a model from folders of captioned pictures: x.png beside x.txt, one caption a line, one line drawn at random each time.

    python train.py --data my_pictures --out runs/mine            fine-tunes the built-in model; then
    python sd.py "..." --ckpt runs/mine/model.safetensors         draws with it
    python train.py --init emoji --train vae --data ...           from scratch: the VAE first; weights/README.md goes on

Three things can be trained: `vae` (pictures to latents and back), `decoder` (its second half alone, which leaves the
latents what they were) and `unet` (the UNet with its text encoder, on latents of the frozen VAE). The same command again
goes on where the last run stopped, to the same end: all randomness of a step comes from (seed, step).
"""
import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from checkpoint import make_folder
from clip import Tokenizer
from sampler import NUM_TIMESTEPS, q_sample, target
from sd import DTYPES, PRESETS, StableDiffusion, UserError, best_device_and_dtype, read_image
from vae import kl_divergence


def setting(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    data: list[str] = setting(None, "folders of pictures with captions")
    out: str = setting("runs/new", "folder for model.safetensors (for sd.py), state.pt (to go on) and sample sheets")
    train: str = setting("unet", "unet (with the text encoder), vae, or decoder")
    init: str = setting("", "start from this checkpoint, or from random weights for a row of PRESETS; default: the built-in model")
    vae: str = setting("", "with a row of PRESETS: the checkpoint whose VAE gives the latents; default: the built-in model's")
    steps: int = setting(1000, "steps in all")
    batch: int = setting(32, "pictures per step")
    lr: float = setting(1e-4, "learning rate of AdamW")
    warmup: int = setting(100, "steps of rising learning rate")
    decay: int = setting(0, "steps of falling learning rate at the end")
    weight_decay: float = setting(0.01, "of AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.999, "averaging of the weights that are saved; 0: none")
    caption_dropout: float = setting(0.1, "share of empty captions, for classifier-free guidance")
    time_shift: float = setting(1.0, "above 1: more training at high noise, t' = s t / (1 + (s - 1) t)")
    tokens: int = setting(77, "length of the caption rows; shorter is faster")
    kl: float = setting(1e-6, "weight of the VAE's KL term")
    amp: str = setting("", "autocast to bf16 or fp16")
    compile: bool = setting(False, "torch.compile")
    device: str = setting("", "default: the best there is")
    seed: int = setting(0, "of everything random")
    log_every: int = setting(50, "steps between lines")
    save_every: int = setting(500, "steps between saves; 0: only at the end")
    sample_every: int = setting(1000, "steps between sample sheets; 0: only at the end")


def main() -> None:
    try:
        train(parse_settings())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)


def train(s: Settings) -> None:
    check(s)
    device, _ = best_device_and_dtype(s.device or None, torch.float32)
    kind = device.split(":")[0]
    sd = load_model(s, device)
    pictures = Pictures(s, sd.config.size)
    params = [p.requires_grad_() for part in TRAINED[s.train](sd) for p in part.parameters()]
    ema = [p.detach().clone() if s.ema else p.detach() for p in params]
    optimizer = torch.optim.AdamW(params, s.lr, betas=(0.9, 0.99), weight_decay=s.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(kind, enabled=s.amp == "fp16")
    start = resume(s, params, ema, optimizer, scaler)
    loss_of = (UNetLoss if s.train == "unet" else VAELoss)(s, sd, pictures, device)
    autocast = torch.autocast(kind, DTYPES[s.amp]) if s.amp else nullcontext()
    stop = stop_signals()
    print(f"{sum(p.numel() for p in params):,} parameters, {len(pictures)} pictures, steps {start} to {s.steps} on {device}", flush=True)

    seen, total, clock = 0, torch.zeros((), device=device), time.time()
    for step in range(start, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1, (step + 1) / max(s.warmup, 1), (s.steps - step) / max(s.decay, 1))
        with autocast, sdpa_kernel(SDPBackend.MATH) if kind == "cpu" else nullcontext():  # the fused CPU kernel's backward is slow
            loss = loss_of(step)
        if not loss.isfinite():
            raise UserError(f"the loss is {loss.item()} at step {step + 1}: lower --lr; {s.out} holds what was saved before, if anything")
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(params, s.clip)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(s.ema, (1 + step) / (10 + step)))

        seen, total, last = seen + 1, total + loss.detach(), step + 1 == s.steps
        if (step + 1) % s.log_every == 0 or last:
            speed = seen * s.batch / (time.time() - clock)
            print(f"step {step + 1}/{s.steps}  loss {float(total) / seen:.4f}  {speed:.1f} images/s", flush=True)
            seen, total, clock = 0, torch.zeros((), device=device), time.time()
        if last or stop or (s.save_every and (step + 1) % s.save_every == 0):
            with averaged(params, ema):
                loss_of.before_saving()
                sd.save(f"{s.out}/model.safetensors")
            write(f"{s.out}/state.pt", {"step": step + 1, "params": [p.detach() for p in params], "ema": ema,
                                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()})
        if last or (s.sample_every and (step + 1) % s.sample_every == 0):
            with averaged(params, ema), torch.no_grad():
                sheet(loss_of.samples()).save(f"{s.out}/sample-{step + 1:07d}.png")
        if stop:
            print(f"stopped and saved after step {step + 1}; the same command goes on")
            break


TRAINED = {
    "unet": lambda sd: [sd.unet, sd.text],
    "vae": lambda sd: [sd.vae],
    "decoder": lambda sd: [sd.vae.decoder, sd.vae.post_quant_conv],
}


class UNetLoss:
    """|| target - UNet(x_t, t, words) ||^2, with words left out now and then. Ho et al. 2020, equation 14; Ho & Salimans 2022."""

    def __init__(self, s: Settings, sd: StableDiffusion, pictures: "Pictures", device: str):
        self.s, self.sd, self.pictures, self.device = s, sd, pictures, device
        sd.tokenizer = Tokenizer(length=s.tokens)
        self.unet = torch.compile(sd.unet) if s.compile else sd.unet
        with torch.no_grad():  # the VAE is frozen: its mean and standard deviation are computed once
            chunks = [sd.vae.moments(pictures.pixels(i).to(device)) for i in torch.arange(len(pictures)).split(8)]
        self.mean = torch.cat([mean for mean, _ in chunks])
        self.std = torch.cat([(0.5 * logvar).exp() for _, logvar in chunks])

    def __call__(self, step: int) -> Tensor:
        s, g = self.s, generator(self.s.seed, step)
        i = self.pictures.order(step)
        mean, std = self.mean[i], self.std[i]

        def randn() -> Tensor:
            return torch.randn(mean.shape, generator=g).to(self.device)

        x0 = (mean + std * randn()) * self.sd.config.vae.scale_factor
        keep = torch.rand(s.batch, generator=g) >= s.caption_dropout
        captions = [self.pictures.caption(int(j), g) if kept else "" for j, kept in zip(i, keep)]
        tokens = self.sd.tokenizer(captions).to(self.device)
        context, y = self.sd.text.encode(tokens)
        u = (torch.rand((), generator=g) + torch.arange(s.batch) / s.batch) % 1  # evenly spread: less noise in the loss
        t = shifted(u, s.time_shift).to(self.device)
        noise = randn()
        out = self.unet(q_sample(x0, t, noise), t, context, None if self.sd.config.unet.adm_in_channels is None else y)
        return F.mse_loss(out.float(), target(self.sd.config.prediction, x0, t, noise))

    def before_saving(self) -> None:
        self.sd.metadata["captions"] = json.dumps([lines[0] for lines in self.pictures.captions])

    def samples(self) -> list[Image.Image]:
        n = len(self.pictures)
        prompts = [self.pictures.captions[i * n // min(n, 24)][0] for i in range(min(n, 24))]
        return [self.sd.generate(prompt)[0] for prompt in prompts]


def shifted(u: Tensor, shift: float) -> Tensor:
    """Uniform u in [0, 1) -> times 0...999, more of them at high noise the larger the shift. Esser et al. 2024, equation 23."""
    return (NUM_TIMESTEPS * shift * u / (1 + (shift - 1) * u)).long().clamp(max=NUM_TIMESTEPS - 1)  # rounding can give 1000


class VAELoss:
    """L1 between picture and reconstruction at three scales and in their gradients, plus a weak KL term."""

    def __init__(self, s: Settings, sd: StableDiffusion, pictures: "Pictures", device: str):
        self.s, self.sd, self.pictures, self.device = s, sd, pictures, device
        self.reconstruct = torch.compile(self._reconstruct) if s.compile else self._reconstruct

    def _reconstruct(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.sd.vae.moments(x)
        z = mean + (0.5 * logvar).exp() * noise
        return self.sd.vae.decoder(self.sd.vae.post_quant_conv(z)), mean, logvar

    def __call__(self, step: int) -> Tensor:
        g = generator(self.s.seed, step)
        x = self.pictures.pixels(self.pictures.order(step), g).to(self.device)
        x = x.flip(-1) if step % 2 else x
        vae = self.sd.config.vae
        noise = torch.randn(len(x), vae.z_channels, *(side // vae.downsampling for side in x.shape[2:]), generator=g)
        y, mean, logvar = self.reconstruct(x, noise.to(self.device))
        error = y.float() - x
        loss = sum(F.avg_pool2d(error, scale).abs().mean() for scale in (1, 2, 4))
        loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        return loss + self.s.kl * kl_divergence(mean.float(), logvar.float())

    def some(self, n: int) -> Tensor:
        """At most n of the pictures, evenly chosen."""
        return self.pictures.pixels(torch.linspace(0, len(self.pictures) - 1, min(n, len(self.pictures))).long()).to(self.device)

    def before_saving(self) -> None:
        if self.s.train == "vae":
            with torch.no_grad():
                means = [self.sd.vae.moments(x)[0] for x in self.some(256).split(8)]
            self.sd.config.vae.scale_factor = 1 / float(torch.cat(means).std())

    def samples(self) -> list[Image.Image]:
        x = self.some(12)
        y = self.sd.vae.decode(self.sd.vae.encode(x))
        print(f"reconstruction: {float(-10 * ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)).log10().mean()):.2f} dB PSNR", flush=True)
        pairs = (torch.stack([x, y], 1).flatten(0, 1).clamp(-1, 1) * 127.5 + 127.5).round().byte()
        return [Image.fromarray(p) for p in pairs.permute(0, 2, 3, 1).cpu().numpy()]


class Pictures:
    """All pictures (as RGBA bytes, cut to squares of the model's size) and captions of some folders, in memory."""

    def __init__(self, s: Settings, size: int):
        self.s = s
        paths = sorted(path for folder in s.data for path in Path(folder).glob("*") if path.suffix.lower() in (".png", ".jpg", ".jpeg", ".webp"))
        if not paths:
            raise UserError(f"no pictures (png, jpg, webp) in {', '.join(s.data)}")
        self.rgba = torch.stack([read_rgba(path, size) for path in paths])
        self.captions = [read_captions(path.with_suffix(".txt")) for path in paths]

    def __len__(self) -> int:
        return len(self.captions)

    def order(self, step: int) -> Tensor:
        """The pictures of a step (batch,): every picture once before any comes again."""
        places = torch.arange(step * self.s.batch, (step + 1) * self.s.batch)
        rounds = {int(r): torch.randperm(len(self), generator=generator(self.s.seed, r)) for r in (places // len(self)).unique()}
        return torch.stack([rounds[int(p) // len(self)][int(p) % len(self)] for p in places])

    def pixels(self, i: Tensor, g: torch.Generator | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1], on white, or with a generator half of them on a random colour."""
        rgba = self.rgba[i].float() / 255
        ground = torch.ones(len(i), 3, 1, 1)
        if g is not None:
            ground = torch.where(torch.rand(len(i), 1, 1, 1, generator=g) < 0.5, torch.rand(len(i), 3, 1, 1, generator=g), ground)
        return torch.lerp(ground, rgba[:, :3], rgba[:, 3:]) * 2 - 1

    def caption(self, i: int, g: torch.Generator) -> str:
        """One of the picture's captions."""
        lines = self.captions[i]
        return lines[int(torch.randint(len(lines), (), generator=g))]


def read_rgba(path: Path, size: int) -> Tensor:
    """(4, size, size) bytes: the middle square of the picture."""
    image = read_image(path)
    if image.size != (size, size):
        image = ImageOps.fit(image, (size, size), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def read_captions(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"no captions at {path}: each picture needs a .txt of its name, one caption a line")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"the captions in {path} are not UTF-8: {error}") from error
    return [line.strip() for line in text.splitlines() if line.strip()] or [""]


# --- starting, stopping, saving ---

def generator(seed: int, step: int) -> torch.Generator:
    """The randomness of one step: a function of seed and step, so that a resumed run repeats an uninterrupted one."""
    return torch.Generator().manual_seed((seed << 40) + int(step))


def check(s: Settings) -> None:
    """Raises UserError for settings out of range."""
    least = {"steps": 1, "batch": 1, "log_every": 1, "save_every": 0, "sample_every": 0, "tokens": 2, "seed": 0}
    for name, low in least.items():
        if getattr(s, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(s, name)}")
    if s.tokens > 77 or s.seed >= 2**20:
        raise UserError(f"--tokens is at most 77 and --seed below 2^20, not {s.tokens} and {s.seed}")
    if s.train not in TRAINED or s.amp not in ("", "bf16", "fp16"):
        raise UserError(f"--train takes {', '.join(TRAINED)}, --amp takes bf16 or fp16; not {s.train!r} and {s.amp!r}")


def load_model(s: Settings, device: str) -> StableDiffusion:
    """A checkpoint, or a row of PRESETS with random weights (to train its UNet, on another model's VAE); all in fp32."""
    if s.init not in PRESETS:
        return StableDiffusion.load(s.init or None, device, torch.float32)
    config = deepcopy(PRESETS[s.init])
    torch.manual_seed(s.seed)
    if s.train == "unet":
        vae = StableDiffusion.load(s.vae or None, device, torch.float32).vae
        if vae.cfg.z_channels != config.unet.in_channels:
            raise UserError(f"the UNet of {s.init!r} takes {config.unet.in_channels} latent channels, the VAE gives {vae.cfg.z_channels}: give another --vae")
        config.vae = vae.cfg
    sd = StableDiffusion(config)
    if s.train == "unet":
        sd.vae.load_state_dict(vae.state_dict())
    sd.place(device, torch.float32)
    return sd


def resume(s: Settings, params: list[Tensor], ema: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> int:
    """Fill everything from s.out/state.pt and return the step to go on with; 0 if there is none."""
    path = Path(s.out) / "state.pt"
    make_folder(path.parent)
    if not path.exists():
        return 0
    state = torch.load(path, map_location="cpu", weights_only=True)
    if [p.shape for p in state["params"]] != [p.shape for p in params]:
        raise UserError(f"{path} is of another model: give another --out")
    with torch.no_grad():
        for mine, saved in zip([*params, *ema], [*state["params"], *state["ema"]]):
            mine.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    return state["step"]


def stop_signals() -> list[int]:
    """A list that the first Ctrl-C or SIGTERM is put into, so that the step ends and is saved; a second one kills."""
    received = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


def write(path: str, state: dict) -> None:
    """Whole or not at all: a run killed while saving keeps the file before."""
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)


@contextmanager
def averaged(params: list[Tensor], ema: list[Tensor]) -> Iterator[None]:
    """Within, the model has its averaged weights."""
    def swap() -> None:
        for p, e in zip(params, ema):
            p.data, e.data = e.data, p.data
    swap()
    try:
        yield
    finally:
        swap()


def sheet(images: list[Image.Image], columns: int = 8) -> Image.Image:
    """The pictures side by side, row by row."""
    w, h = images[0].size
    page = Image.new("RGB", (columns * w, -(-len(images) // columns) * h), "white")
    for i, image in enumerate(images):
        page.paste(image, (i % columns * w, i // columns * h))
    return page


def parse_settings() -> Settings:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for f in fields(Settings):
        name, help = "--" + f.name.replace("_", "-"), f.metadata["help"]
        if f.name == "data":
            parser.add_argument(name, nargs="+", required=True, help=help)
        elif f.type is bool:
            parser.add_argument(name, action="store_true", help=help)
        else:
            parser.add_argument(name, type=f.type, default=f.default, help=help + (f" ({f.default})" if f.default != "" else ""))
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
