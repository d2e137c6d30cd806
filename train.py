"""Train a model on captioned pictures: a folder (x.png beside x.txt, one caption a line) or tar shards; data.py says which forms they take.

    python train.py --data my_pictures --out runs/mine            fine-tunes the built-in model; then
    python sd.py "..." --ckpt runs/mine/model.safetensors         draws with it
    python train.py --init emoji --train vae --data ...           from scratch: the VAE first; weights/README.md goes on
    torchrun --nproc-per-node=8 train.py ...                      the same on eight GPUs, --batch on each

--train says what: `unet+text` (the UNet with its text encoders, on latents of the frozen VAE), `unet`, `word` (the vectors of a new word and
nothing else), `vae` (pictures to latents and back) or `decoder` (its second half, which leaves the latents what they were). --lora trains thin
matrices beside the weights of UNet and text encoders instead; --vq makes a VAE of codes.
The same command again goes on where the last run stopped, to the same end: all randomness comes from the seed, the step and a sample's place.
"""
import argparse
import json
import math
import os
import shutil
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from copy import copy, deepcopy
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from checkpoint import make_folder, save_tensors, whole
from clip import CLIPEncoderLayer, CLIPTextModel, Tokenizer
from data import Batch, Folder, Kept, Position, Shards, fingerprint, generator, is_shards, shapes
from lora import LoRA
from model import BasicTransformerBlock, ResBlock
from sampler import NUM_TIMESTEPS, PREDICTIONS, q_sample, target, training_sigmas
from sd import DTYPES, PRESETS, StableDiffusion, UserError, best_device_and_dtype
from vae import ResnetBlock, VQModel, kl_divergence


def setting(default: object, help: str) -> object:
    return field(default=default, metadata={"help": help})


@dataclass
class Settings:
    data: list[str] = setting(None, "folders of pictures with captions, or tar shards")
    out: str = setting("runs/new", "folder for model.safetensors (for sd.py), state.pt (to go on), metrics.jsonl, train.png and sample sheets")
    train: str = setting("unet+text", "unet+text, unet, word, vae, or decoder")
    init: str = setting("", "start from this checkpoint, or from random weights for a row of PRESETS; default: the built-in model")
    vae: str = setting("", "with a row of PRESETS: the checkpoint whose VAE gives the latents; default: the built-in model's")
    freeze: list[str] = setting((), "leave weights as they are whose official name begins so")
    lora: int = setting(0, "train matrices of this rank beside the attention layers, for sd.py --lora; 0: the weights themselves")
    word: str = setting("", "with --train word: the word, as the captions have it, such as <cat-toy>")
    vectors: int = setting(1, "of the word")
    init_word: str = setting("object", "what the word means at first")
    prior: list[str] = setting((), "folders of pictures that a model fine-tuned on few others shall not forget (DreamBooth)")
    prior_weight: float = setting(1.0, "of the loss on them")
    steps: int = setting(1000, "steps in all")
    batch: int = setting(32, "pictures per pass of a process")
    accumulate: int = setting(1, "passes per step")
    lr: float = setting(1e-4, "learning rate of AdamW")
    warmup: int = setting(100, "steps of rising learning rate")
    decay: int = setting(0, "steps of falling learning rate at the end")
    weight_decay: float = setting(0.01, "of AdamW")
    clip: float = setting(1.0, "largest norm of the gradient")
    ema: float = setting(0.999, "averaging of the weights that are saved; 0: none")
    caption_dropout: float = setting(0.1, "share of empty captions, for classifier-free guidance")
    pooled_dropout: float = setting(0.0, "share of captions whose one vector is zeroed, so that the UNet must read those of the words")
    time_shift: float = setting(1.0, "above 1: more training at high noise, t' = s t / (1 + (s - 1) t)")
    min_snr: float = setting(0.0, "gamma of min-SNR weighting, usually 5; 0: none")
    tokens: int = setting(77, "length of the caption rows; shorter is faster, and what does not fit is cut off")
    kl: float = setting(1e-6, "weight of the VAE's KL term")
    vq: int = setting(0, "with --train vae: snap latents to this many learned codes; 0: the usual VAE")
    gan: float = setting(0.0, "weight of a discriminator's loss in training the VAE, LDM's is 0.5; 0: none")
    gan_start: int = setting(0, "step from which the decoder hears the discriminator, which learns from the first")
    buckets: bool = setting(False, "cut pictures to shapes near their own instead of squares")
    cache: str = setting("", "folder to keep latents in, and the vectors of captions if the text encoder is not trained; default: latents in memory")
    shuffle: int = setting(1000, "samples of shards that are mixed before they are given")
    workers: int = setting(0, "processes that read pictures, for each process that trains")
    checkpointing: bool = setting(False, "compute activations twice instead of keeping them: less memory")
    fsdp: bool = setting(False, "with torchrun: divide weights, gradients and averages among the processes")
    amp: str = setting("", "autocast to bf16 or fp16")
    compile: bool = setting(False, "torch.compile")
    device: str = setting("", "default: the best there is")
    seed: int = setting(0, "of everything random")
    log_every: int = setting(50, "steps between lines")
    save_every: int = setting(500, "steps between saves; 0: only at the end")
    sample_every: int = setting(1000, "steps between sample sheets; 0: only at the end")

    @property
    def captioned(self) -> bool:
        """Whether the UNet is at work, not the VAE alone."""
        return self.train not in ("vae", "decoder")


def main() -> None:
    try:
        train(parse_settings())
    except UserError as error:
        print(f"train.py: {error}", file=sys.stderr)
        sys.exit(2)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def train(s: Settings) -> None:
    check(s)
    rank, world, device = join(s)
    sd = load_model(s, device)
    loss_of = (UNetLoss if s.captioned else VAELoss)(s, sd)
    model, params = spread(s, loss_of), [p for p in loss_of.parameters() if p.requires_grad]
    ema = [p.detach().clone() if s.ema else p.detach() for p in params]
    optimizer = torch.optim.AdamW(params, s.lr, betas=(0.9, 0.99), weight_decay=s.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(sd.device.type, enabled=s.amp == "fp16")
    start, positions = resume(s, rank, params, ema, optimizer, scaler)
    autocast = torch.autocast(sd.device.type, DTYPES[s.amp]) if s.amp else nullcontext()
    stop = stop_signals(alone=world == 1)
    streams = sources(s, loss_of, rank, world, start, positions)
    if rank == 0:
        print(f"{sum(p.numel() for p in params):,} parameters, steps {start} to {s.steps} on {world} x {device}", flush=True)

    seen, total, clock = 0, 0.0, time.time()
    for step in range(start, s.steps):
        for group in optimizer.param_groups:
            group["lr"] = s.lr * min(1, (step + 1) / max(s.warmup, 1), (s.steps - step) / max(s.decay, 1))
        loss = torch.zeros((), device=device)
        for i, (weight, batches) in enumerate(streams, 1):
            with one_pass(model, i == len(streams), sd.device.type == "cpu" and sd.config.size < 256):
                with autocast:
                    part = weight / s.accumulate * model(next(batches), step)
                scaler.scale(part).backward()
            loss += part.detach()
        loss, stopping, skipped = agreed(loss, stop, positions)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {step + 1}: lower --lr; {s.out} holds what was saved before, if anything")
        scaler.unscale_(optimizer)
        norm = full(nn.utils.clip_grad_norm_(params, s.clip))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        torch._foreach_lerp_(ema, [p.detach() for p in params], 1 - min(s.ema, (1 + step) / (10 + step)))

        seen, total, last = seen + 1, total + loss, step + 1 == s.steps or stopping
        if rank == 0 and (last or (step + 1) % s.log_every == 0):
            speed = seen * s.batch * len(streams) * world / (time.time() - clock)
            log(s, {"step": step + 1, "loss": total / seen, "lr": group["lr"], "grad_norm": float(norm), "images_per_s": speed, "skipped": skipped})
            seen, total, clock = 0, 0.0, time.time()
        if last or (s.save_every and (step + 1) % s.save_every == 0):
            with averaged(params, ema), gathered(s, sd, rank) as finished:
                if rank == 0:
                    loss_of.save(finished, s.out)
            save_state(s, rank, step + 1, params, ema, optimizer, scaler, positions)
        if step + 1 == s.steps or (s.sample_every and (step + 1) % s.sample_every == 0):
            with averaged(params, ema), gathered(s, sd, rank) as finished:
                if rank == 0:
                    sheet(loss_of.samples(finished)).save(f"{s.out}/sample-{step + 1:07d}.png")
        if stopping:
            print(f"stopped and saved after step {step + 1}; the same command goes on" * (rank == 0), flush=True)
            break


# --- losses: modules whose parameters are those that are trained ---

TRAINED = {
    "unet+text": lambda sd: [sd.unet, *sd.encoders],
    "unet": lambda sd: [sd.unet],
    "word": lambda sd: [],
    "vae": lambda sd: [sd.vae],
    "decoder": lambda sd: [sd.vae.decoder, sd.vae.post_quant_conv],
}


class UNetLoss(nn.Module):
    """|| target - UNet(x_t, t, words) ||^2, with words left out now and then. Ho et al. 2020, equation 14; Ho & Salimans 2022."""

    def __init__(self, s: Settings, sd: StableDiffusion):
        super().__init__()
        self.s, self.sd = s, sd
        if sd.sees != "noise":
            raise UserError("this model sees a picture beside the noise: train.py trains those that see noise alone")
        if s.pooled_dropout and sd.config.unet.adm_in_channels is None:
            raise UserError("--pooled-dropout is for models whose UNet is told a text's one vector beside those of its words; this one is not")
        if s.lora:
            torch.manual_seed(s.seed)
            self.trained = LoRA(sd, s.lora, text=s.train == "unet+text")
        elif s.train == "word":
            self.trained = nn.ParameterList([new_word(s, encoder, tokenizer) for encoder, tokenizer in zip(sd.encoders, sd.tokenizers)])
        else:
            self.trained = trainable(s, sd)
        self.tokenizers = [copy(tokenizer) for tokenizer in sd.tokenizers]
        for tokenizer in self.tokenizers:
            tokenizer.length = s.tokens
        self.samples_a_step = s.batch * s.accumulate * (dist.get_world_size() if dist.is_initialized() else 1)
        self.words: Kept | None = None  # the captions' vectors, if they are kept
        self.prompts: list[str] = []

    def prepare(self, folders: list[Folder], rank: int, world: int) -> None:
        """Encode what is encoded only once: latents of folders' pictures, with --cache captions too, of which each process then encodes its share."""
        s, cache = self.s, Path(self.s.cache) if self.s.cache else None
        if cache is not None:
            make_folder(cache)
        kept, key, share = Kept(cache), fingerprint(self.sd.vae) if cache else "", slice(rank, None, world) if cache else slice(None)
        for folder in folders:
            folder.latents = partial(self.latents, kept, key, folder)
            for i in range(len(folder))[share]:
                folder.latents(i)
        captions = [sample.captions for folder in folders for sample in folder.samples]
        if s.word and folders and not any(s.word in caption for lines in captions for caption in lines):
            raise UserError(f"no caption has the word {s.word}")
        if cache is not None and s.train == "unet":
            self.words, self.words_key = kept, f"{' '.join(map(fingerprint, self.sd.encoders))} {s.tokens}"
            for caption in ["", *dict.fromkeys(caption for lines in captions for caption in lines)][share]:
                self.told([caption])
        if dist.is_initialized():
            dist.barrier()
        if folders:
            firsts = list(dict.fromkeys(sample.captions[0] for sample in folders[0].samples))
            self.sd.metadata["captions"] = json.dumps(firsts[:10_000])
            self.prompts = [firsts[i * len(firsts) // min(len(firsts), 24)] for i in range(min(len(firsts), 24))]

    def latents(self, kept: Kept, vae: str, folder: Folder, i: int) -> dict[str, Tensor]:
        return kept(f"{vae} {folder.identity(i)}", lambda: dict(zip(("mean", "std"), (one[0].cpu() for one in self.moments(folder.pixels(i)[None])))))

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) as bytes -> mean and standard deviation of their latents, by the frozen VAE, in its own precision."""
        with torch.autocast(self.sd.device.type, enabled=False):
            mean, logvar = self.sd.vae.moments(pixels.to(self.sd.device) / 127.5 - 1)
        return mean, (0.5 * logvar).exp()

    def told(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """A vector per token (B, T, D), and one for each caption (B, D')."""
        if self.words is None:
            return self.encoded(captions)
        kept = [self.words(f"{self.words_key} {caption}", lambda: dict(zip(("context", "pooled"), self.encoded([caption])))) for caption in captions]
        return tuple(torch.cat([one[name] for one in kept]).to(self.sd.device) for name in ("context", "pooled"))

    def encoded(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        with warnings.catch_warnings(), torch.set_grad_enabled(torch.is_grad_enabled() and self.s.train != "unet"):
            warnings.simplefilter("ignore")  # that a caption is cut: of millions many are
            told = [encoder.encode(tokenizer(captions).to(self.sd.device)) for encoder, tokenizer in zip(self.sd.encoders, self.tokenizers)]
        return torch.cat([features for features, _ in told], dim=-1), told[-1][1]

    def draw(self, batch: Batch, step: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Of each sample latents x0 (B, Z, h, w), a time (B,), noise (B, Z, h, w), and whether its caption is kept, and that one's pooled vector (B,)."""
        s, device = self.s, self.sd.device
        mean, std = self.moments(batch.pixels) if batch.latents is None else (moment.to(device) for moment in batch.latents)
        generators = [generator(s.seed, 6, place) for place in batch.places]
        first, noise = (torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(device) for _ in range(2))
        keep, keep_pooled = (torch.stack([torch.rand((), generator=g) for g in generators]) >= share for share in (s.caption_dropout, s.pooled_dropout))
        u = torch.rand((), generator=generator(s.seed, 7, step), dtype=torch.float64)
        u = (u + torch.tensor(batch.places, dtype=torch.float64) / self.samples_a_step) % 1  # evenly spread: less noise in the loss
        return (mean + std * first) * self.sd.config.vae.scale_factor, shifted(u, s.time_shift).to(device), noise, keep, keep_pooled

    def forward(self, batch: Batch, step: int) -> Tensor:
        self.prompts = self.prompts or batch.captions[:24]  # of shards
        x0, t, noise, keep, keep_pooled = self.draw(batch, step)
        context, pooled = self.told([caption if kept else "" for caption, kept in zip(batch.captions, keep)])
        pooled = pooled * keep_pooled.to(pooled)[:, None]
        if self.sd.config.zero_negative:
            keep = keep.to(context)
            context, pooled = context * keep[:, None, None], pooled * keep[:, None]
        prediction = self.sd.config.prediction
        out = self.sd.unet(q_sample(x0, t, noise, prediction), t, **self.sd.sized(context, pooled, batch.sizes))
        error = (out.float() - target(prediction, x0, t, noise)).square().mean((1, 2, 3))
        return (error * min_snr_weight(prediction, t, self.s.min_snr)).mean()

    def save(self, sd: StableDiffusion, out: str) -> None:
        if self.s.lora:
            self.trained.save(f"{out}/lora.safetensors")
        elif self.s.train == "word":
            names = [self.s.word] if len(self.trained) == 1 else ["clip_l", "clip_g"]
            with whole(Path(out) / f"{self.s.word}.safetensors") as temporary:
                save_tensors(dict(zip(names, self.trained)), temporary, torch.float32, {})
        else:
            sd.save(f"{out}/model.safetensors")

    def samples(self, sd: StableDiffusion) -> list[Image.Image]:
        return [sd.generate(prompt)[0] for prompt in self.prompts]


def new_word(s: Settings, encoder: CLIPTextModel, tokenizer: Tokenizer) -> nn.Parameter:
    """Vectors (N, D) that the encoder takes for the word, all of them at first the mean of those of --init-word. Gal et al. 2022, section 3."""
    if s.word in tokenizer.bpe.get_vocab() or len(set(s.word) & set("/ ")) > 0:
        raise UserError(f"--word {s.word!r}: it must be a word that the vocabulary lacks, without spaces and slashes, such as <{s.word.strip('</> ')}>")
    known = [id for id, _ in tokenizer.tokens(s.init_word)]
    vectors = nn.Parameter(encoder.embeddings.token_embedding.weight[known].mean(0).repeat(s.vectors, 1))
    tokenizer.add_word(s.word, encoder.embeddings.learn(vectors.detach()))
    vars(encoder.embeddings)["learned"] = vectors  # not as a parameter of the encoder: it is not saved with it
    return vectors


def shifted(u: Tensor, shift: float) -> Tensor:
    """Uniform u in [0, 1) -> times 0...999, more of them at high noise the larger the shift. Esser et al. 2024, equation 23."""
    return (NUM_TIMESTEPS * shift * u / (1 + (shift - 1) * u)).long().clamp(max=NUM_TIMESTEPS - 1)  # rounding can give 1000


def min_snr_weight(prediction: str, t: Tensor, gamma: float) -> Tensor | float:
    """min(SNR, gamma) on the error of x_0, told by c_out for the network's own: min(SNR, gamma) / SNR for eps, / (SNR + 1) for v. Hang et al. 2023, section 3.4."""
    if gamma == 0:
        return 1.0
    sigma = training_sigmas(prediction).float().to(t.device)[t]
    return PREDICTIONS[prediction](sigma)[1] ** 2 * (sigma**-2).clamp(max=gamma)


class VAELoss(nn.Module):
    """L1 between picture and reconstruction at three scales and in their gradients, plus a weak KL term, or the codebook's loss with --vq.
    With --gan a discriminator learns beside it to tell reconstructions from pictures. Rombach et al. 2022, section 3.1 and appendix G."""

    def __init__(self, s: Settings, sd: StableDiffusion):
        super().__init__()
        self.s, self.sd = s, sd
        torch.manual_seed(s.seed)
        if s.vq:
            sd.vae = VQModel(replace(sd.config.vae, double_z=False), s.vq).to(sd.device)
        self.trained = trainable(s, sd)
        self.discriminator = discriminator(sd.config.size).to(sd.device) if s.gan else None
        self.shown = torch.zeros(0)  # pictures for sample sheets

    def prepare(self, folders: list[Folder], rank: int, world: int) -> None:
        for folder in folders[:1]:
            self.shown = torch.stack([folder.pixels(int(i)) for i in torch.linspace(0, len(folder) - 1, min(256, len(folder)))])

    def forward(self, batch: Batch, step: int) -> Tensor:
        self.shown = self.shown if len(self.shown) else batch.pixels  # of shards
        generators = [generator(self.s.seed, 6, place) for place in batch.places]
        x = torch.stack([one.flip(-1) if torch.rand((), generator=g) < 0.5 else one for one, g in zip(batch.pixels, generators)])
        x = x.to(self.sd.device) / 127.5 - 1
        y, regular = self.reconstruct(x, generators, step)
        error = y.float() - x
        loss = sum(F.avg_pool2d(error, scale).abs().mean() for scale in (1, 2, 4))
        loss = loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()
        if self.discriminator is not None:
            regular = regular + self.adversarial(loss, x, y, heard=step >= self.s.gan_start)
        return loss + regular

    def reconstruct(self, x: Tensor, generators: list[torch.Generator], step: int) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, H, W), and the loss that keeps the latents in order."""
        vae = self.sd.vae
        if self.s.vq:
            if step == 0:
                self.start_codes(vae.quant_conv(vae.encoder(x)))
            return vae(x)[:2]
        mean, logvar = vae.moments(x)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators]).to(x.device)
        return vae.decoder(vae.post_quant_conv(mean + (0.5 * logvar).exp() * noise)), self.s.kl * kl_divergence(mean.float(), logvar.float())

    @torch.no_grad()
    def start_codes(self, z: Tensor) -> None:
        """Where latents are: a code that is never the nearest never learns."""
        vectors, codes = z.movedim(1, -1).flatten(0, -2).float(), self.sd.vae.quantize.embedding.weight
        chosen = torch.randint(len(vectors), (len(codes),), generator=generator(self.s.seed, 8)).to(z.device)
        codes.copy_(vectors[chosen] + 0.01 * vectors.std() * torch.randn(codes.shape, generator=generator(self.s.seed, 9)).to(z.device))
        if dist.is_initialized():
            dist.broadcast(codes, 0)

    def adversarial(self, loss: Tensor, x: Tensor, y: Tensor, heard: bool) -> Tensor:
        """The decoder shall fool the discriminator, its gradient scaled to that of `loss` at the last layer (Esser et al. 2021, equation 7); the
        discriminator shall not be fooled (hinge loss, Lim & Ye 2017). One gradient step does both, each with the other held."""
        held = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fooled = -torch.func.functional_call(self.discriminator, held, (y,)).mean()
        last = self.sd.vae.decoder.conv_out.weight
        ours, theirs = (torch.autograd.grad(one, last, retain_graph=True)[0].norm() for one in (loss, fooled))
        real, made = self.discriminator(x), self.discriminator(y.detach())
        return heard * self.s.gan * (ours / (theirs + 1e-4)).clamp(max=1e4) * fooled + 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())

    @torch.no_grad()
    def save(self, sd: StableDiffusion, out: str) -> None:
        if self.s.vq:  # sd.py has no use for it
            with whole(Path(out) / "vq.safetensors") as temporary:
                save_tensors({f"first_stage_model.{name}": tensor for name, tensor in sd.vae.state_dict().items()}, temporary, torch.float32,
                             {"config": json.dumps(asdict(replace(sd.config.vae, double_z=False))), "n_embed": str(self.s.vq)})
            return
        if self.s.train == "vae":
            means = [sd.vae.moments(x.to(sd.device) / 127.5 - 1)[0] for x in self.shown.split(8)]
            sd.config.vae.scale_factor = 1 / float(torch.cat(means).std())
        sd.save(f"{out}/model.safetensors")

    @torch.no_grad()
    def samples(self, sd: StableDiffusion) -> list[Image.Image]:
        """Twelve of the pictures, each beside its reconstruction."""
        x = self.shown[torch.linspace(0, len(self.shown) - 1, min(12, len(self.shown))).long()].to(sd.device) / 127.5 - 1
        y = sd.vae(x)[0] if self.s.vq else sd.vae.decode(sd.vae.encode(x))
        print(f"reconstruction: {float(-10 * ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3)).log10().mean()):.2f} dB PSNR", flush=True)
        pairs = (torch.stack([x, y], 1).flatten(0, 1).clamp(-1, 1) * 127.5 + 127.5).round().byte()
        return [Image.fromarray(p) for p in pairs.permute(0, 2, 3, 1).cpu().numpy()]


def discriminator(size: int) -> nn.Sequential:
    """(B, 3, H, W) -> a verdict for each patch of 70x70 pixels, or of 34x34 if pictures are small. Isola et al. 2017, section 3.2.2; norms over
    groups, as batches may be small."""
    c, strides = (64, (2, 2, 1)) if size >= 256 else (32, (2, 1))
    layers = [nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(0.2)]
    for stride in strides:
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.GroupNorm(8, 2 * c), nn.LeakyReLU(0.2)]
        c *= 2
    layers.append(nn.Conv2d(c, 1, 4, 1, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers)


# --- starting ---

def check(s: Settings) -> None:
    """Raises UserError for settings out of range."""
    least = {"steps": 1, "batch": 1, "accumulate": 1, "log_every": 1, "save_every": 0, "sample_every": 0, "tokens": 2, "seed": 0, "workers": 0, "shuffle": 1,
             "lora": 0, "min_snr": 0, "vectors": 1, "vq": 0, "gan": 0}
    for name, low in least.items():
        if getattr(s, name) < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {getattr(s, name)}")
    if s.tokens > 77:
        raise UserError(f"--tokens is at most 77, not {s.tokens}")
    if s.train not in TRAINED or s.amp not in ("", "bf16", "fp16"):
        raise UserError(f"--train takes {', '.join(TRAINED)}, --amp takes bf16 or fp16; not {s.train!r} and {s.amp!r}")
    if len(set(map(is_shards, s.data))) > 1 or any(map(is_shards, s.prior)):
        raise UserError("--data takes folders or tar shards, not both; --prior takes folders")
    if missing := [folder for folder in [*s.data, *s.prior] if not is_shards(folder) and not Path(folder).is_dir()]:
        raise UserError(f"no such folder: {missing[0]}")
    networks = s.train in ("unet", "unet+text")
    only = {"fsdp": (networks and not s.lora and "RANK" in os.environ, "torchrun that trains the weights of a UNet"), "lora": (networks, "--train unet or unet+text"),
            "prior": (s.captioned, "training on captions"), "cache": (s.captioned and not any(map(is_shards, s.data)), "training on folders with captions"),
            "word": (s.train == "word", "--train word"), "vq": (s.train == "vae", "--train vae"), "gan": (not s.captioned, "--train vae or decoder")}
    for name, (fits, use) in only.items():
        if getattr(s, name) and not fits:
            raise UserError(f"--{name} is for {use}")
    if s.train == "word" and not s.word:
        raise UserError("--train word needs --word, such as <cat-toy>")


def join(s: Settings) -> tuple[int, int, str]:
    """Rank of this process, number of processes, device. torchrun says so in the environment; without it, this one is alone."""
    device, _ = best_device_and_dtype(s.device or None, torch.float32)
    if "RANK" not in os.environ:
        return 0, 1, device
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo", timeout=timedelta(hours=1))  # while the first saves, the others wait
    return dist.get_rank(), dist.get_world_size(), device


def load_model(s: Settings, device: str) -> StableDiffusion:
    """A checkpoint, or a row of PRESETS with random weights (to train its UNet, on another model's VAE); all in fp32."""
    if s.init not in PRESETS:
        return StableDiffusion.load(s.init or None, device, torch.float32)
    config = deepcopy(PRESETS[s.init])
    torch.manual_seed(s.seed)
    unet = s.captioned
    if unet:
        vae = StableDiffusion.load(s.vae or None, device, torch.float32).vae
        if vae.cfg.z_channels != config.unet.in_channels:
            raise UserError(f"the UNet of {s.init!r} takes {config.unet.in_channels} latent channels, the VAE gives {vae.cfg.z_channels}: give another --vae")
        config.vae = vae.cfg
    sd = StableDiffusion(config)
    if unet:
        sd.vae.load_state_dict(vae.state_dict())
    sd.place(device, torch.float32)
    return sd


def trainable(s: Settings, sd: StableDiffusion) -> nn.ModuleList:
    """The networks that --train names, with gradients but for what --freeze names."""
    parts = nn.ModuleList(TRAINED[s.train](sd)).requires_grad_()
    names = {prefix + name: p for prefix, part in sd.parts.items() for name, p in part.named_parameters()}
    for start in s.freeze:
        chosen = [p for name, p in names.items() if name.startswith(start)]
        if not chosen:
            raise UserError(f"--freeze {start}: no weight's name begins so; they are like {next(iter(names))}")
        for p in chosen:
            p.requires_grad_(False)
    return parts


def sources(s: Settings, loss_of: "UNetLoss | VAELoss", rank: int, world: int, start: int, positions: dict[int, Position]) -> list[tuple[float, Iterator[Batch]]]:
    """A step's passes, each the weight of its loss and what its batches come from."""
    captioned, vae = s.captioned, loss_of.sd.config.vae
    kinds = shapes(loss_of.sd.config.size, vae.downsampling, s.buckets)
    passes = start * s.accumulate
    folders = [Folder(paths, kinds, s.batch, s.seed, captioned, coloured=not captioned, first_place=i << 40)
               for i, paths in enumerate((s.data, s.prior)) if paths and not is_shards(paths[0])]
    loss_of.prepare(folders, rank, world)
    streams = [(1.0, folder.batches(passes * world + rank, world, s.workers)) for folder in folders]
    if is_shards(s.data[0]):
        streams.insert(0, (1.0, Shards(s.data, kinds, s.batch, s.seed, captioned, s.shuffle, rank, world).batches(positions, passes, s.workers)))
    return [(s.prior_weight if i else 1.0, batches) for i, (_, batches) in enumerate(streams)] * s.accumulate


BLOCKS = (ResBlock, BasicTransformerBlock, CLIPEncoderLayer, ResnetBlock)  # what is computed again, or brought together, at once


def spread(s: Settings, loss_of: UNetLoss | VAELoss) -> nn.Module:
    """The loss as this process computes it: with checkpoints, compiled, its gradients averaged with those of the others."""
    blocks = [module for part in loss_of.sd.parts.values() for module in part.modules() if isinstance(module, BLOCKS)]
    if s.checkpointing:  # Chen et al. 2016
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if s.compile:
        for part in (loss_of.sd.unet,) if s.captioned else (loss_of.sd.vae.encoder, loss_of.sd.vae.decoder):
            part.compile()
    if s.fsdp:
        for p in loss_of.parameters():
            p.data = p.data.contiguous()  # not channels last
        for block in blocks:
            if any(p.requires_grad for p in block.parameters()):
                fully_shard(block)
        return fully_shard(loss_of)
    if dist.is_initialized():
        idle = s.train == "unet+text" and any(encoder.cfg.layers_skipped for encoder in loss_of.sd.encoders)  # some weights have no part in the loss
        return DistributedDataParallel(loss_of, gradient_as_bucket_view=True, find_unused_parameters=idle)
    return loss_of


# --- many processes ---

@contextmanager
def one_pass(model: nn.Module, last: bool, step_by_step: bool) -> Iterator[None]:
    """Gradients are exchanged after the last pass of a step only. Attention goes `step_by_step` where the fused CPU kernel's backward is slow: over few positions."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last)
    with (model.no_sync() if isinstance(model, DistributedDataParallel) and not last else nullcontext(),
          sdpa_kernel(SDPBackend.MATH) if step_by_step else nullcontext()):
        yield


def agreed(loss: Tensor, stop: list[int], positions: dict[int, Position]) -> tuple[float, bool, int]:
    """For all processes the same: their mean loss, whether one of them was told to stop, and how many samples of shards they skipped."""
    skipped = sum(at.skipped + at.skipped_since for at in positions.values())
    if not dist.is_initialized():
        return float(loss), bool(stop), skipped
    told = torch.tensor([1, loss, len(stop), skipped], device=loss.device, dtype=torch.float64)
    dist.all_reduce(told)
    world, loss, stopping, skipped = told.tolist()
    return loss / world, stopping > 0, int(skipped)


def full(x: Tensor) -> Tensor:
    """What FSDP has divided, as a whole. All processes must ask."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def divided(x: Tensor, like: Tensor) -> Tensor:
    """And back."""
    return distribute_tensor(x.to(like.device), like.device_mesh, like.placements) if isinstance(like, DTensor) and x.shape == like.shape else x


@contextmanager
def gathered(s: Settings, sd: StableDiffusion, rank: int) -> Iterator[StableDiffusion]:
    """The model, with FSDP a copy of it whose weights are whole."""
    if not s.fsdp:
        yield sd
        return
    with torch.device("meta"):
        copied = StableDiffusion(sd.config)
    copied.metadata = sd.metadata
    for part, mine in zip(copied.parts.values(), sd.parts.values()):
        tensors = {name: full(p.detach()) for name, p in mine.named_parameters()}
        if rank == 0:
            part.load_state_dict(tensors, assign=True)
    if rank == 0:
        copied.place(str(sd.device), torch.float32)
    yield copied


# --- stopping, saving ---

def resume(s: Settings, rank: int, params: list[Tensor], ema: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler) -> tuple[int, dict[int, Position]]:
    """Fill everything from s.out/state.pt and return the step to go on with (0 if there is none) and where the shards' readers stand."""
    path = Path(s.out) / "state.pt"
    make_folder(path.parent)
    if rank == 0:
        for left in path.parent.glob("tmp*.tmp"):  # by a run that was killed while it wrote
            shutil.rmtree(left)
    if not path.exists():
        return 0, {}
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if [p.shape for p in state["params"]] != [p.shape for p in params]:
        raise UserError(f"{path} is of another model: give another --out")
    readers = len(state["positions"]), state["workers"]
    if any(state["positions"]) and readers != (dist.get_world_size() if dist.is_initialized() else 1, s.workers):
        raise UserError(f"{path} was written by {readers[0]} processes with --workers {readers[1]}: with shards it must be as many again")
    with torch.no_grad():
        for mine, saved in zip([*params, *ema], [*state["params"], *state["ema"]]):
            mine.copy_(divided(saved, mine))
    moments = {i: {name: divided(x, params[i]) for name, x in one.items()} for i, one in state["optimizer"]["state"].items()}
    optimizer.load_state_dict(state["optimizer"] | {"state": moments})
    if state["scaler"] and scaler.is_enabled():
        scaler.load_state_dict(state["scaler"])
    mine = state["positions"][rank] if any(state["positions"]) else {}
    return state["step"], {worker: Position(**at) for worker, at in mine.items()}


def save_state(s: Settings, rank: int, step: int, params: list[Tensor], ema: list[Tensor], optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler,
               positions: dict[int, Position]) -> None:
    """One file, of all processes, by the first of them: whatever their number was, others can go on with it."""
    def on_first(x: Tensor) -> Tensor | None:
        return x if not isinstance(x, DTensor) else full(x).cpu() if rank == 0 else full(x)[:0]

    mine = {worker: asdict(at) for worker, at in positions.items()}
    everyones = [mine]
    if dist.is_initialized():
        everyones = [None] * dist.get_world_size()
        dist.all_gather_object(everyones, mine)
    state = optimizer.state_dict()
    moments = {i: {name: on_first(x) for name, x in one.items()} for i, one in state["state"].items()}
    tensors = {"params": [on_first(p.detach()) for p in params], "ema": [on_first(e) for e in ema], "optimizer": state | {"state": moments}}
    if rank == 0:
        with whole(Path(s.out) / "state.pt") as temporary:
            torch.save(tensors | {"step": step, "scaler": scaler.state_dict(), "positions": everyones, "workers": s.workers}, temporary)


def stop_signals(alone: bool) -> list[int]:
    """A list that Ctrl-C or SIGTERM is put into, so that the step ends and is saved. A second one kills, if the process is alone: torchrun passes on what it gets."""
    received = []

    def receive(number: int, _: object) -> None:
        received.append(number)
        if alone:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received


@contextmanager
def averaged(params: list[Tensor], ema: list[Tensor]) -> Iterator[None]:
    """Within, the model has its averaged weights."""
    def swap() -> None:
        for p, e in zip(params, ema):
            mine = p.detach().clone()
            p.data.copy_(e)
            e.copy_(mine)
    swap()
    try:
        yield
    finally:
        swap()


# --- telling ---

def log(s: Settings, line: dict[str, float]) -> None:
    """A line for the reader, one for metrics.jsonl, and the curve of all of them in train.png."""
    path = Path(s.out) / "metrics.jsonl"
    print(f"step {line['step']}/{s.steps}  loss {line['loss']:.4f}  {line['images_per_s']:.1f} images/s" + f"  {line['skipped']} skipped" * (line["skipped"] > 0), flush=True)
    lines = [json.loads(one) for one in path.read_text().splitlines()] if path.exists() else []
    lines = [one for one in lines if one["step"] < line["step"]] + [line]  # a run that was killed may have gone further than it had saved
    with whole(path) as temporary:
        temporary.write_text("".join(json.dumps(one) + "\n" for one in lines))
    if len(lines) > 1:
        curve([one["step"] for one in lines], [one["loss"] for one in lines]).save(f"{s.out}/train.png")


def curve(steps: list[int], losses: list[float], size: tuple[int, int] = (800, 400), margin: int = 50) -> Image.Image:
    """The loss over the steps."""
    page = Image.new("RGB", size, "white")
    pen, (width, height) = ImageDraw.Draw(page), size
    low, high = min(losses), max(losses) + 1e-9

    def at(step: float, loss: float) -> tuple[float, float]:
        return margin + (width - 2 * margin) * (step - steps[0]) / (steps[-1] - steps[0]), height - margin - (height - 2 * margin) * (loss - low) / (high - low)
    for i in range(5):
        step, loss = steps[0] + (steps[-1] - steps[0]) * i / 4, low + (high - low) * i / 4
        pen.line([at(steps[0], loss), at(steps[-1], loss)], "lightgray")
        pen.text((margin - 5, at(step, loss)[1]), f"{loss:.3g}", "black", anchor="rm")
        pen.text((at(step, loss)[0], height - margin + 8), f"{step:.0f}", "black", anchor="mt")
    pen.text((width / 2, margin / 2), "loss by step", "black", anchor="mm")
    pen.line([at(step, loss) for step, loss in zip(steps, losses)], "steelblue", 2)
    return page


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
        if f.type == list[str]:
            parser.add_argument(name, nargs="+", required=f.default is None, default=f.default, help=help)
        elif f.type is bool:
            parser.add_argument(name, action="store_true", help=help)
        else:
            parser.add_argument(name, type=f.type, default=f.default, help=help + (f" ({f.default})" if f.default != "" else ""))
    return Settings(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
