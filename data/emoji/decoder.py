"""Train a decoder that draws emoji at 128 pixels from the latents of the built-in model.

    python data/emoji/decoder.py --out runs/decoder [--steps 4000] [--gan 0.2 --gan-start 2000]
    python sd.py --ckpt runs/decoder/model.safetensors "a red apple"

Run prepare.py and originals.py first. The encoder, its latents and the UNet stay as they are. The
new decoder has one upsampling level more than the encoder. It starts as the old decoder: wider
levels compute what the narrow ones did (Net2Net, Chen et al. 2016), and the new level enlarges
their picture. A model that has the larger decoder already is trained further.

The loss is that of extras/vae_loss.py, late in the training with a discriminator. The latents that
it is for are the UNet's, not the encoder's. So they get a little noise (--noise), and a share of
them (--unet-share) is noised further and denoised by the UNet, in one step, with the caption.
64 pictures of train128/ are held back for sharpness.py (--all trains on them too).

It writes model.safetensors, a whole model with the average of the decoder's weights, and state.pt,
from which the same command goes on.
"""
import argparse
import random
import sys
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from compose import KINDS, Emoji, compose, fits, load_emoji, on_background
from PIL import Image
from prepare import HERE, STYLES
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

sys.path.insert(0, str(HERE.parents[1]))

from extras.files import atomic_write, make_folder
from extras.formats import save
from extras.vae_loss import discriminator, reconstruction_loss
from sampler import make_denoiser
from sd import StableDiffusion, pixels
from vae import AutoencoderKL, Decoder, VAEConfig

SHARES = {"train": 35, "rest": 20, "scene": 45}  # of the pictures it is trained on, in %
HELD_BACK = 64


# --- pictures ---

def load_large(folder: str) -> Emoji:
    """All pictures of train128/ or rest128/."""
    emoji = load_emoji(folder)
    if not emoji:
        sys.exit(f"no pictures in {HERE / folder}: run data/emoji/originals.py first")
    return emoji


def held_back(train: Emoji) -> list[tuple[str, str]]:
    """64 pictures of different names; of each style as many, or one more."""
    names = sorted({name for name, _ in train})
    chosen = random.Random("held back").sample(names, len(names))
    wanted = [(name, list(STYLES)[i % len(STYLES)]) for i, name in enumerate(chosen)]
    return [key for key in wanted if key in train][:HELD_BACK]


class Pictures(Dataset):
    """Pictures to train on: (3, 128, 128) in [-1, 1], and the caption. Number i is always the same.

    The caption is empty where the UNet has not learned it.
    """

    def __init__(self, train: Emoji, rest: Emoji, held: Sequence[tuple[str, str]], seed: int):
        self.seed = seed
        self.emoji = {"train": {key: image for key, image in train.items() if key not in held},
                      "rest": rest}
        self.names = {(kind, style): [name for name, its in self.emoji["train"]
                                      if its == style and fits(name, kind)]
                      for kind in KINDS for style in STYLES}

    def __getitem__(self, i: int) -> tuple[Tensor, str]:
        image, caption = self.picture(random.Random(f"{self.seed} {i}"))
        return pixels([image])[0], caption

    def picture(self, rng: random.Random) -> tuple[Image.Image, str]:
        """An emoji on white, or a scene of compose.py."""
        source = rng.choices(list(SHARES), SHARES.values())[0]
        if source == "scene":
            kind, style = rng.choices(list(KINDS), KINDS.values())[0], rng.choice(list(STYLES))
            names = self.names[kind, style]
            image, captions, _ = compose(kind, style, names, self.emoji["train"], rng)
            return image, captions[0]
        name, style = rng.choice(list(self.emoji[source]))
        image = on_background(self.emoji[source][name, style])
        if rng.random() < 0.25:
            return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), ""
        return image, f"{name}, {style}" if source == "train" else ""


# --- the decoder it starts as ---

def widened(tensor: Tensor, size: int, dim: int, divide: bool) -> Tensor:
    """Each channel along `dim` becomes several neighbouring copies, `size` channels in all.

    With `divide`, for a layer that reads widened features, the copies share the channel's weight.
    The shares are not quite equal, so that the copies learn different things.
    """
    times = size // tensor.shape[dim]
    tensor = tensor.repeat_interleave(times, dim)
    if divide and times > 1:
        copies = (size // times, times)
        share = 1 + 0.2 * torch.randn_like(tensor.unflatten(dim, copies))
        share = share / share.sum(dim + 1, keepdim=True)
        tensor = tensor * share.flatten(dim, dim + 1)
    return tensor


def fitted(tensor: Tensor, shape: torch.Size) -> Tensor:
    """A weight of the old decoder in the shape of the new one, (C_out, C_in, ...) or (C,)."""
    for dim in range(min(2, len(shape))):
        tensor = widened(tensor, shape[dim], dim, divide=dim == 1)
    return tensor


@torch.no_grad()
def grow(old: AutoencoderKL, config: VAEConfig) -> AutoencoderKL:
    """The same autoencoder with a wider decoder of one level more, which starts as the old one."""
    torch.manual_seed(0)
    new = AutoencoderKL(config)
    weights = new.state_dict()
    for name, tensor in old.state_dict().items():
        parts = name.split(".")
        if parts[:2] == ["decoder", "up"]:
            parts[2] = str(int(parts[2]) + 1)  # levels count from full resolution
        target = weights[".".join(parts)]
        target.copy_(fitted(tensor, target.shape))
    for block_old, block_new in zip(blocks(old.decoder.up), blocks(new.decoder.up[1:])):
        # where only the new block changes the width, its shortcut starts as the identity
        if block_old.conv1.in_channels == block_old.conv1.out_channels \
                and isinstance(block_new.nin_shortcut, nn.Conv2d):
            shortcut, identity = block_new.nin_shortcut, torch.eye(block_old.conv1.in_channels)
            shortcut.weight.copy_(fitted(identity[:, :, None, None], shortcut.weight.shape))
            shortcut.bias.zero_()
    query_old, query_new = (vae.decoder.mid.attn_1.q for vae in (old, new))
    for tensor in query_new.parameters():  # attention divides by the root of the width
        tensor.mul_((query_old.out_channels / query_new.out_channels) ** 0.5)
    start_last_level(new.decoder, old.decoder)
    return new


def blocks(levels: nn.ModuleList) -> list[nn.Module]:
    return [block for level in levels for block in level.block]


def start_last_level(new: Decoder, old: Decoder) -> None:
    """The new level enlarges the features smoothly and passes them on as they are."""
    up, last = new.up[1].upsample.conv, new.conv_out
    smooth = torch.tensor([1.0, 2.0, 1.0]) / 4
    up.weight.zero_()
    up.bias.zero_()
    for i in range(len(up.weight)):
        up.weight[i, i] = smooth[:, None] * smooth
    for block in new.up[0].block:
        block.conv2.weight.mul_(0.1)
        block.conv2.bias.zero_()
    shortcut, times = new.up[0].block[0].nin_shortcut, up.out_channels // last.in_channels
    if times > 1:  # the mean of the copies of each channel
        shortcut.weight.zero_()
        shortcut.bias.zero_()
        for i in range(up.out_channels):
            shortcut.weight[i // times, i] = 1 / times
    # the neighbours that the old last convolution read are two pixels away: they are added up
    last.weight.zero_()
    last.weight[:, :, 1, 1] = fitted(old.conv_out.weight.sum((2, 3)), last.weight.shape[:2])


# --- latents to decode ---

@torch.no_grad()
def latents(sd: StableDiffusion, x: Tensor, captions: list[str], noise: float,
            unet_share: float, rng: torch.Generator) -> Tensor:
    """Pictures -> scaled latents (B, Z, 8, 8): samples, as the UNet was trained on, and noise.

    The noise is up to `noise`. Those with a caption are the UNet's, as often as `unet_share` says.
    """
    mean, logvar = sd.vae.moments(x)

    def normal(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=rng).to(x.device)

    z = sd.vae.sample(mean, logvar, normal(mean))
    level = noise * torch.rand(len(x), 1, 1, 1, generator=rng)
    z = z + level.to(x.device) * normal(z)
    denoise = make_denoiser(sd.unet, sd.schedule)
    for i, caption in enumerate(captions):
        t = int(torch.randint(30, 500, (), generator=rng))
        if torch.rand((), generator=rng) < unet_share and caption:
            sigma, one = float(sd.schedule.sigmas[t]), z[i:i + 1]
            z[i:i + 1] = denoise(one + sigma * normal(one), sigma, **sd.encode_prompt([caption]))
    return z


# --- training ---

class Training:
    """The model with its new decoder, the average of its weights, the discriminator, optimizers."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.done = args, 0
        self.sd = sd = StableDiffusion.load(args.ckpt, dtype=torch.float32, fast=False)
        config = replace(sd.preset.vae, decoder_ch_mult=tuple(args.ch_mult))
        if len(args.ch_mult) != len(config.ch_mult) + 1:
            sys.exit(f"decoder.py: --ch-mult must have {len(config.ch_mult) + 1} numbers")
        if sd.preset.vae.decoder_ch_mult is None:
            sd.preset.size *= config.downsampling // sd.preset.vae.downsampling
            sd.preset.vae = config
            sd.vae = grow(sd.vae.cpu(), config)
        elif sd.preset.vae != config:
            sys.exit("decoder.py: this model has a larger decoder already: give --ch-mult "
                     + " ".join(map(str, sd.preset.vae.decoder_ch_mult)))
        sd.vae.requires_grad_(False)
        sd.vae.to(sd.device, memory_format=torch.channels_last)
        self.averaged = deepcopy(sd.vae)
        trained = nn.ModuleList([sd.vae.decoder, sd.vae.post_quant_conv]).requires_grad_(True)
        self.params, decoder = list(trained.parameters()), sd.vae.decoder
        new = nn.ModuleList([decoder.up[0], decoder.up[1].upsample, decoder.norm_out,
                             decoder.conv_out])
        fresh = list(new.parameters())
        old = [p for p in self.params if not any(p is one for one in fresh)]
        groups = [{"params": fresh, "share": 1}, {"params": old, "share": args.lr_share}]
        self.optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=(0.9, 0.99))
        self.critic = discriminator(sd.preset.size).to(sd.device)
        self.critic_optimizer = torch.optim.AdamW(self.critic.parameters(), 3e-4, (0.5, 0.9))
        self.parts = {"vae": sd.vae, "averaged": self.averaged, "optimizer": self.optimizer,
                      "critic": self.critic, "critic_optimizer": self.critic_optimizer}

    def resume(self, path: Path) -> None:
        state = torch.load(path, map_location=self.sd.device)
        self.done = state["step"]
        for name, part in self.parts.items():
            part.load_state_dict(state[name])

    def save(self) -> None:
        state = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_write(self.args.out / "state.pt") as temporary:
            torch.save(state | {"step": self.done}, temporary)
        trained, self.sd.vae = self.sd.vae, self.averaged
        save(self.sd, self.args.out / "model.safetensors")
        self.sd.vae = trained

    def step(self, x: Tensor, captions: list[str]) -> float:
        """One step on pictures (B, 3, 128, 128). Returns the loss without the discriminator's."""
        args, sd, x = self.args, self.sd, x.to(self.sd.device)
        rng = torch.Generator().manual_seed(args.seed * 10**9 + self.done)
        y = sd.vae.decode(latents(sd, x, captions, args.noise, args.unet_share, rng))
        loss = reconstruction_loss(x, y)
        total = loss
        if args.gan and self.done >= args.gan_start:
            total = loss + args.gan * self.fooling(loss, y)
        rate = min(1, (self.done + 1) / max(args.warmup, 1),
                   (args.steps - self.done) / max(args.decay, 1))
        for group in self.optimizer.param_groups:
            group["lr"] = args.lr * group["share"] * rate
        self.descend(self.optimizer, total)
        if args.gan and self.done >= args.gan_start - args.gan_lead:
            real, made = self.critic(x), self.critic(y.detach())
            hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())  # Lim & Ye 2017
            self.descend(self.critic_optimizer, hinge)
        self.done += 1
        keep = min(args.ema, (1 + self.done) / (10 + self.done))
        for mean, p in zip(self.averaged.parameters(), sd.vae.parameters()):
            mean.lerp_(p.detach(), 1 - keep)
        return float(loss.detach())

    def fooling(self, loss: Tensor, y: Tensor) -> Tensor:
        """The decoder's part of the discriminator's loss, with as much pull on y as `loss` has.

        Esser et al. 2021, equation 7.
        """
        fool = -self.critic(y).mean()
        norm, fool_norm = (torch.autograd.grad(one, y, retain_graph=True)[0].norm()
                           for one in (loss, fool))
        return norm / (fool_norm + 1e-8) * fool

    @staticmethod
    def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
        optimizer.zero_grad()
        loss.backward()
        params = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()


# --- the script ---

def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder to write to")
    add("--ckpt", help="the model; default: the built-in one")
    add("--ch-mult", type=int, nargs="+", default=[1, 1, 2, 4, 4], help="of the new decoder")
    add("--steps", type=int, default=4000)
    add("--batch", type=int, default=16, help="pictures per step")
    add("--lr", type=float, default=2e-3, help="learning rate of the new level")
    add("--lr-share", type=float, default=0.25, help="of it for what was there before")
    add("--warmup", type=int, default=50, help="steps of rising learning rate")
    add("--decay", type=int, default=1000, help="steps of falling learning rate at the end")
    add("--ema", type=float, default=0.995, help="averaging of the weights that are saved")
    add("--noise", type=float, default=0.05, help="most noise on latents, of their unit variance")
    add("--unet-share", type=float, default=0.4, help="share of captions that the UNet denoises")
    add("--gan", type=float, default=0.0, help="weight of the discriminator's loss; 0: none")
    add("--gan-start", type=int, default=0, help="step from which the decoder hears it")
    add("--gan-lead", type=int, default=150, help="steps that it learns before that")
    add("--all", action="store_true", help="train on the pictures that are held back, too")
    add("--seed", type=int, default=0)
    add("--workers", type=int, default=1, help="processes that compose the pictures")
    add("--log-every", type=int, default=40)
    add("--save-every", type=int, default=200)
    return parser.parse_args()


def main() -> None:
    args = parse()
    make_folder(args.out)
    train, rest = load_large("train128"), load_large("rest128")
    pictures = Pictures(train, rest, [] if args.all else held_back(train), args.seed)
    training = Training(args)
    if (args.out / "state.pt").exists():
        training.resume(args.out / "state.pt")
    print(f"{sum(p.numel() for p in training.params):,} parameters, steps {training.done} to"
          f" {args.steps}", flush=True)
    numbers = range(training.done * args.batch, args.steps * args.batch)
    losses = []
    for x, captions in DataLoader(pictures, args.batch, sampler=numbers, num_workers=args.workers):
        losses.append(training.step(x, captions))
        if training.done % args.log_every == 0:
            print(f"step {training.done}  loss {sum(losses) / len(losses):.4f}", flush=True)
            losses = []
        if training.done % args.save_every == 0 or training.done == args.steps:
            training.save()


if __name__ == "__main__":
    main()
