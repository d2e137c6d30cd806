"""Train a model on captioned pictures, or fine-tune one.

    python train.py --data my_pictures --out runs/mine        fine-tune the built-in model; then
    python sd.py "..." --ckpt runs/mine                       draw with it
    python train.py --init emoji --data ...                   UNet and text from random weights
    torchrun --nproc-per-node=8 train.py ...                  on eight GPUs, --batch on each

--data: folders in which x.txt has the captions of x.png, one a line, or tar shards. They become
batches of pixels or cached latents, captions and numbers of samples (Batch in extras/data.py; see
extras/captions.py and extras/shards.py). --train: what is trained,
    unet+text   the UNet and its text encoders, on latents of the frozen VAE
    unet        the UNet alone
    word        the vectors of a new word (textual inversion)
    vae         the autoencoder; with --vq one with a codebook
    decoder     the VAE's decoder alone, which leaves the latents as they are
--lora trains thin matrices beside the weights of UNet and text encoders instead.

Ctrl-C saves; the same command resumes. All randomness is a function of the seed, the step and a
sample's number, so a resumed run ends with the same weights as an uninterrupted one.
"""
import json
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

try:
    import torch  # it takes a second, in which Ctrl-C may come
except KeyboardInterrupt:
    sys.exit("train.py: stopped")
from PIL import Image
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from clip import CLIPEncoderLayer
from extras import distributed, fast
from extras.check_settings import (
    check_same_run,
    check_settings,
    damaged_state,
    read_state,
    stored_settings,
)
from extras.data import Batch, Folder, TensorCache, bucket_sizes, encode_once, generator, text_scope
from extras.distributed import shard_like, unshard, unshard_on_first, world_size
from extras.files import atomic_write, make_folder
from extras.formats import save
from extras.locks import alone_in
from extras.lora import LoRA
from extras.progress import Progress, say
from extras.settings import parse, setting
from extras.shards import Position, Shards, is_shards
from extras.sheets import save_page, sheet
from extras.start import check_loadable, load_with_new_weights, random_model
from extras.terminal import printable, tolerant_streams
from extras.vae_loss import VAELoss, make_vq
from extras.word import TrainedWord
from model import BasicTransformerBlock, ResBlock
from sampler import NUM_TIMESTEPS, Cond, NoiseSchedule
from sd import PRESETS, StableDiffusion, UserError
from vae import ResnetBlock

TRAINED = {
    "unet+text": lambda sd: [sd.unet, *sd.text_encoders],
    "unet": lambda sd: [sd.unet],
    "word": lambda sd: [],
    "vae": lambda sd: [sd.vae],
    "decoder": lambda sd: [sd.vae.decoder, sd.vae.post_quant_conv],
}
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Settings:
    data: list[str] = setting(None, "folders of pictures with captions, or tar shards")
    out: str = setting("runs/new", "folder for model.safetensors (for sd.py), state.pt (to "
                       "resume), metrics.jsonl, train.png and sample sheets", free=True)
    train: str = setting("unet+text", "unet+text, unet, word, vae or decoder",
                         choices=tuple(TRAINED))
    init: str = setting("", "start from this checkpoint, or with random weights from a row of "
                        "PRESETS; default: the built-in model")
    preset: str = setting("", "row of PRESETS that the checkpoint --init is of; default: as the "
                          "file says")
    new_weights: bool = setting(False, "with --init FILE: what the file lacks starts at random")
    vae: str = setting("", "with --init ROW: the checkpoint whose VAE gives the latents; default: "
                       "the built-in model's")
    freeze: list[str] = setting((), "do not train weights whose official name begins so")
    lora: int = setting(0, "rank of LoRA matrices to train instead of weights; 0: none", least=0)
    placeholder_token: str = setting("", "with --train word: the new word, as the captions have "
                                     "it, such as <cat-toy>", old="word")
    num_vectors: int = setting(1, "vectors of the new word", old="vectors", least=1)
    initializer_token: str = setting("object", "what the new word means at first", old="init-word")
    class_data: list[str] = setting((), "folders of pictures of what the model should not forget "
                                    "(DreamBooth's class pictures)", old="prior")
    class_weight: float = setting(1.0, "weight of the loss on --class-data", old="prior-weight")

    steps: int = setting(1000, "steps in all", least=1, free=True)
    batch: int = setting(32, "pictures per pass of a process", least=1, free=True)
    accumulate: int = setting(1, "passes per step", least=1, free=True)
    lr: float = setting(1e-4, "learning rate of AdamW")
    warmup: int = setting(100, "steps in which the learning rate rises")
    decay: int = setting(0, "steps at the end in which the learning rate falls")
    weight_decay: float = setting(0.01, "weight decay of AdamW")
    max_grad_norm: float = setting(1.0, "largest norm of the gradient", old="clip")
    ema: float = setting(0.999, "decay of the averaged weights, which are those saved; 0: none")
    caption_dropout: float = setting(0.1, "share of empty captions, for guidance")
    pooled_dropout: float = setting(0.0, "share of captions whose pooled vector is zeroed, so "
                                    "that the UNet reads the tokens' vectors")
    time_shift: float = setting(1.0, "above 1: more training at high noise")
    min_snr: float = setting(0.0, "gamma of min-SNR loss weights, usually 5; 0: none", least=0)
    tokens: int = setting(77, "length of captions in tokens; fewer are faster, the rest is cut; "
                          "at 77 longer captions fill further chunks",
                          least=2)
    kl: float = setting(1e-6, "weight of the VAE's KL term")
    vq: int = setting(0, "with --train vae: number of codes of a codebook; 0: the usual VAE",
                      least=0)
    disc_weight: float = setting(0.0, "weight of a discriminator for the VAE, LDM's is 0.5; 0: "
                                 "none", old="gan", least=0)
    disc_start: int = setting(0, "step from which the decoder learns from it", old="gan-start")
    seed: int = setting(0, "seed of everything random", least=0)

    buckets: bool = setting(False, "crop pictures to rectangles near their shape, not squares")
    shuffle: int = setting(1000, "samples of shards that are mixed", least=1)
    cache: str = setting("", "folder to keep latents in, and text vectors if the text encoder is "
                         "not trained; default: latents in memory", free=True)
    workers: int = setting(0, "processes that read pictures, per training process", least=0,
                           free=True)
    checkpointing: bool = setting(False, "recompute activations: less memory", free=True)
    fsdp: bool = setting(False, "with torchrun: divide weights among the processes", free=True)
    amp: str = setting("", "autocast to bf16 or fp16", choices=("", *AMP), free=True)
    compile: bool = setting(False, "torch.compile", free=True)
    device: str = setting("", "default: the best there is", free=True)
    log_every: int = setting(50, "steps between log lines", least=1, free=True)
    save_every: int = setting(500, "steps between saves; 0: only at the end", least=0,
                              free=True)
    sample_every: int = setting(1000, "steps between sample sheets; 0: only at the end",
                                least=0, free=True)
    resume: bool = setting(False, "resume the run in --out though settings differ", free=True)

    @property
    def captioned(self) -> bool:
        """Whether it trains on captions: all but the VAE."""
        return self.train not in ("vae", "decoder")


# --- the loss of the UNet ---

class Draw(NamedTuple):
    x0: Tensor           # (B, Z, h, w) latents
    t: Tensor            # (B,) times
    noise: Tensor        # (B, Z, h, w)
    keep: Tensor         # (B,) whether the caption is kept
    keep_pooled: Tensor  # (B,) whether its pooled vector is


class UNetLoss(nn.Module):
    """|| target - unet(x_t, t, **cond) ||^2, with some captions left out.

    Ho et al. 2020, equation 14; Ho & Salimans 2022. Its parameters are those that are trained.
    """

    def __init__(self, s: Settings, sd: StableDiffusion):
        super().__init__()
        self.s, self.sd = s, sd
        channels, unet = sd.preset.vae.z_channels, sd.preset.unet
        if getattr(unet, "in_channels", channels) != channels:
            raise UserError("this UNet takes a picture beside the noise: train.py trains those "
                            "that take noise alone")
        if s.pooled_dropout and getattr(unet, "adm_in_channels", None) is None:
            raise UserError("--pooled-dropout is for UNets that take a text's pooled vector")
        if s.lora:
            torch.manual_seed(s.seed)
            self.trained = LoRA(sd, s.lora, text=s.train == "unet+text")
        elif s.train == "word":
            self.trained = TrainedWord(sd, s.placeholder_token, s.num_vectors, s.initializer_token)
        else:
            self.trained = trained_networks(s, sd)
        self.text_cache: tuple[TensorCache, list[str]] | None = None  # set by encode_once
        self.shown: list[str] = []  # prompts of the sample sheets

    def prepare(self, folders: list[Folder], rank: int, world: int) -> None:
        """Encode once what stays the same, and choose the prompts of the sample sheets."""
        captions = list(dict.fromkeys(one for folder in folders for one in folder.captions))
        word = self.s.placeholder_token
        if word and folders and not any(word in caption for caption in captions):
            raise UserError(f"no caption has the word {word}")
        encode_once(self, folders, captions, rank, world)
        if folders:
            firsts = list(dict.fromkeys(sample.captions[0] for sample in folders[0].samples))
            self.sd.metadata["captions"] = json.dumps(firsts[:10_000])
            count = min(len(firsts), 24)
            self.shown = [firsts[i * len(firsts) // count] for i in range(count)]

    @torch.no_grad()
    def moments(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W), uint8 -> mean and log variance of their latents."""
        with torch.autocast(self.sd.device.type, enabled=False):
            return self.sd.vae.moments(pixels.to(self.sd.device) / 127.5 - 1)

    def encode_prompt(self, captions: list[str], sizes: Tensor | None) -> Cond:
        """The UNet's inputs beside x and t. Captions are cut or continued as --tokens says."""
        trains_text = self.s.train != "unet" and torch.is_grad_enabled()
        scope = text_scope(self.sd.text_encoders, self.s.tokens, self.text_cache)
        with scope, torch.set_grad_enabled(trains_text):
            return self.sd.encode_prompt(captions, sizes)

    def draw(self, batch: Batch, step: int) -> "Draw":
        """The random choices of a batch."""
        s, device, indices = self.s, self.sd.device, batch.sample_index
        mean, logvar = self.moments(batch.pixels) if batch.moments is None else batch.moments
        # 6, 7: each use of randomness has a number of its own
        generators = [generator(s.seed, 6, index) for index in indices]

        def randn() -> Tensor:
            noise = [torch.randn(mean.shape[1:], generator=g) for g in generators]
            return torch.stack(noise).to(device)

        def keep(dropout: float) -> Tensor:
            kept = torch.stack([torch.rand((), generator=g) for g in generators]) >= dropout
            return kept.to(device)

        x0 = self.sd.vae.sample(mean.to(device), logvar.to(device), randn())
        noise = randn()
        u = torch.rand((), generator=generator(s.seed, 7, step), dtype=torch.float64)
        # stratified: one time in each of as many equal parts as the step has samples, so that the
        # loss has less noise
        samples = s.batch * s.accumulate * world_size()
        u = (u + torch.tensor(indices, dtype=torch.float64) / samples) % 1
        t = shifted(u, s.time_shift).to(device)
        return Draw(x0, t, noise, keep(s.caption_dropout), keep(s.pooled_dropout))

    def forward(self, batch: Batch, step: int) -> Tensor:
        self.shown = self.shown or batch.captions[:24]  # shards: of the first batch
        x0, t, noise, keep, keep_pooled = self.draw(batch, step)
        captions = [caption if kept else "" for caption, kept in zip(batch.captions, keep)]
        cond = self.encode_prompt(captions, batch.sizes)
        if self.sd.preset.zero_negative:
            cond = where(keep, cond, self.sd.zero_text(cond))
        if self.s.pooled_dropout:
            cond |= where(keep_pooled, {"y": cond["y"]}, self.sd.zero_text(cond))
        schedule = self.sd.schedule
        out = self.sd.unet(schedule.q_sample(x0, t, noise), t, **cond)
        error = (out.float() - schedule.target(x0, t, noise)).square().mean((1, 2, 3))
        return (error * min_snr_weight(schedule, t, self.s.min_snr)).mean()

    def save(self, sd: StableDiffusion, out: str) -> None:
        """Write what was trained: a model, a LoRA or a word."""
        if isinstance(self.trained, LoRA):
            self.trained.save(f"{out}/lora.safetensors")
        elif isinstance(self.trained, TrainedWord):
            self.trained.save(out)
        else:
            save(sd, f"{out}/model.safetensors")

    def samples(self, sd: StableDiffusion) -> list[tuple[Image.Image, str]]:
        """Pictures for a sample sheet, each with its caption."""
        with text_scope(sd.text_encoders, 77, None):    # long captions fill more chunks
            return [(sd.generate(prompt)[0], prompt) for prompt in self.shown]


def trained_networks(s: Settings, sd: StableDiffusion) -> nn.ModuleList:
    """The networks that --train names, with gradients for all but what --freeze names."""
    networks = nn.ModuleList(TRAINED[s.train](sd)).requires_grad_()
    names = {prefix + name: p for prefix, network in sd.components.items()
             for name, p in network.named_parameters()}
    for start in s.freeze:
        chosen = [p for name, p in names.items() if name.startswith(start)]
        if not chosen:
            raise UserError(f"--freeze {start}: no weight's name begins so; they are like "
                            f"{next(iter(names))}")
        for p in chosen:
            p.requires_grad_(False)
    return networks


def where(keep: Tensor, cond: Cond, other: Cond) -> Cond:
    """For each sample, cond or the other. keep (B,)."""
    return {name: torch.where(keep.view(-1, *[1] * (value.ndim - 1)), value, other[name])
            for name, value in cond.items()}


def shifted(u: Tensor, shift: float) -> Tensor:
    """Uniform u in [0, 1) -> times 0...999, more of them at high noise the larger the shift.

    Esser et al. 2024, equation 23.
    """
    t = NUM_TIMESTEPS * shift * u / (1 + (shift - 1) * u)
    return t.long().clamp(max=NUM_TIMESTEPS - 1)  # rounding can give 1000


def min_snr_weight(schedule: NoiseSchedule, t: Tensor, gamma: float) -> Tensor | float:
    """min(SNR, gamma) on the error of x_0, expressed by c_out for the network's own error.

    That is min(SNR, gamma) / SNR for eps and / (SNR + 1) for v. Hang et al. 2023, section 3.4.
    """
    if gamma == 0:
        return 1.0
    sigma = schedule.sigmas.float().to(t.device)[t]
    return schedule.prediction.c_out(sigma) ** 2 * (sigma**-2).clamp(max=gamma)


# --- the loop ---

def train(s: Settings) -> None:
    """One run, from its start or from where --out stands, to the last step or a signal.

    Raises UserError while another run writes into --out.
    """
    check_settings(s)
    rank, world, device = distributed.init_distributed(s.device)
    sd = load_model(s, device)  # before there is a folder: it refuses what cannot be trained
    make_folder(Path(s.out))
    with alone_in(Path(s.out), rank):
        loss_fn = make_loss(s, sd)
        model = wrap_model(s, loss_fn)
        state = State(s, loss_fn)
        if resume(s, state, rank) and state.step >= s.steps:
            say(rank, f"{s.out} is finished, at step {state.step}: --steps N trains longer")
            return
        signals = distributed.catch_signals(alone=world == 1)
        loaders = make_loaders(s, state, loss_fn, rank, world)
        count = sum(p.numel() for p in state.params)
        say(rank, f"{count:,} parameters, steps {state.step} to {s.steps} on {world} x {device}")
        loop(s, state, model, loaders, signals, rank)


def loop(s: Settings, state: "State", model: nn.Module, loaders: list["Loader"],
         signals: distributed.Signals, rank: int) -> None:
    images = s.batch * s.accumulate * len(loaders) * world_size()
    progress = Progress(s.out, state.step, s.steps, images, rank)

    while state.step < s.steps:
        lr = learning_rate(s, state.step)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        before = dict(state.positions)
        try:
            loss = backward(s, state, model, loaders, signals)
        except distributed.StoppedError:  # by a signal, while no pictures came
            state.positions = before
            if state.step > progress.first:
                save_run(s, state, rank)
            return say(rank, f"stopped after step {state.step}; the same command resumes")
        loss, stopping, skipped = distributed.all_reduce_stats(loss, bool(signals), state.skipped)
        if not math.isfinite(loss):
            raise UserError(f"the loss is {loss} at step {state.step + 1}: lower --lr; {s.out} "
                            "holds what was saved before, if anything")
        norm = state.update(s)
        progress.update(loss)

        step, last = state.step, state.step == s.steps
        if last or stopping or step % s.log_every == 0:
            progress.log(step, lr, float(norm), skipped)
        if last or stopping or (s.save_every and step % s.save_every == 0):
            save_run(s, state, rank)
        if last or (s.sample_every and step % s.sample_every == 0):
            page = Path(s.out) / f"sample-{step:07d}.png"
            write(s, state, rank, lambda sd: save_page(sheet(state.loss_fn.samples(sd)), page))
        if stopping:
            return say(rank, f"stopped and saved after step {step}; the same command resumes")


def learning_rate(s: Settings, step: int) -> float:
    """A linear rise over the first --warmup steps, a linear fall over the last --decay steps."""
    return s.lr * min(1, (step + 1) / max(s.warmup, 1), (s.steps - step) / max(s.decay, 1))


def backward(s: Settings, state: "State", model: nn.Module, loaders: list["Loader"],
             signals: distributed.Signals) -> Tensor:
    """The gradients of one step, over all its passes, and its loss."""
    device = state.params[0].device
    # the CPU's fused attention kernel has a slow backward pass for small pictures
    slow = device.type == "cpu" and state.size < 256
    passes = [loader for _ in range(s.accumulate) for loader in loaders]
    total = torch.zeros((), device=device)
    for i, (weight, batches) in enumerate(passes, 1):
        with signals.heeded():
            batch = next(batches)
        with (distributed.gradient_sync(model, i == len(passes)),
              sdpa_kernel(SDPBackend.MATH) if slow else nullcontext()):
            with torch.autocast(device.type, AMP[s.amp]) if s.amp else nullcontext():
                loss = weight / s.accumulate * model(batch, state.step)
            state.scaler.scale(loss).backward()
        total += loss.detach()
    return total


class State:
    """All that changes from step to step: what state.pt holds."""

    def __init__(self, s: Settings, loss_fn: nn.Module):
        self.step, self.loss_fn = 0, loss_fn
        self.params = [p for p in loss_fn.parameters() if p.requires_grad]
        self.ema = [p.detach().clone() for p in self.params] if s.ema else None
        self.optimizer = torch.optim.AdamW(self.params, s.lr, betas=(0.9, 0.99),
                                           weight_decay=s.weight_decay, fused=True)
        self.scaler = torch.amp.GradScaler(loss_fn.sd.device.type, enabled=s.amp == "fp16")
        self.positions: dict[int, Position] = {}  # of the readers of shards
        self.size = loss_fn.sd.preset.size

    @property
    def skipped(self) -> int:
        """How many samples of shards this process could not use."""
        return sum(at.skipped + at.skipped_since for at in self.positions.values())

    def update(self, s: Settings) -> Tensor:
        """One step of the optimizer and of the averages. Returns the gradient's norm."""
        self.scaler.unscale_(self.optimizer)
        norm = unshard(nn.utils.clip_grad_norm_(self.params, s.max_grad_norm))
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        if self.ema is not None:  # young averages forget faster
            decay = min(s.ema, (1 + self.step) / (10 + self.step))
            torch._foreach_lerp_(self.ema, [p.detach() for p in self.params], 1 - decay)
        self.step += 1
        return norm

    @contextmanager
    def ema_scope(self) -> Iterator[None]:
        """Inside, the model has the averaged weights."""
        def swap() -> None:
            for p, average in zip(self.params, self.ema or []):
                mine = p.detach().clone()
                p.data.copy_(average)
                average.copy_(mine)
        swap()
        try:
            yield
        finally:
            swap()


# --- start ---

def load_model(s: Settings, device: str) -> StableDiffusion:
    """A checkpoint, or a row of PRESETS with random weights; in fp32."""
    if s.init in PRESETS:
        sd = random_model(s.init, device, s.seed, s.vae if s.captioned else None)
    elif s.new_weights:
        sd = load_with_new_weights(s.init, device, s.preset or None, s.seed)
    else:
        sd = StableDiffusion.load(s.init or None, device, torch.float32, s.preset or None)
    check_loadable(sd)
    fast.optimize(sd)
    return sd


def make_loss(s: Settings, sd: StableDiffusion) -> nn.Module:
    if s.captioned:
        return UNetLoss(s, sd)
    torch.manual_seed(s.seed)
    if s.vq:
        make_vq(s, sd)
    return VAELoss(s, sd, trained_networks(s, sd))


BLOCKS = (ResBlock, BasicTransformerBlock, CLIPEncoderLayer, ResnetBlock)


def wrap_model(s: Settings, loss_fn: nn.Module) -> nn.Module:
    """The loss as this process computes it: checkpointed, compiled, in one or many processes."""
    sd = loss_fn.sd
    blocks = [module for network in sd.components.values() for module in network.modules()
              if isinstance(module, BLOCKS)]
    if s.checkpointing:  # Chen et al. 2016
        main = sd.unet if s.captioned else sd.vae
        if not any(block in blocks for block in main.modules()):
            raise UserError(f"--checkpointing knows no block of {type(main).__name__}: add its "
                            "class to BLOCKS in train.py")
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    if s.compile:
        for network in (sd.unet,) if s.captioned else (sd.vae.encoder, sd.vae.decoder):
            network.compile()
    if s.fsdp:
        return distributed.fsdp(loss_fn, blocks)
    if world_size() == 1:
        return loss_fn
    # with clip skip, the last layers of a text encoder have no part in the loss
    idle = s.train == "unet+text" and any(
        getattr(encoder.config, "clip_skip", 0) for encoder in sd.text_encoders)
    return DistributedDataParallel(loss_fn, gradient_as_bucket_view=True,
                                   find_unused_parameters=idle)


Loader = tuple[float, Iterator[Batch]]  # the weight of the loss on its batches, and the batches


def make_loaders(s: Settings, state: State, loss_fn: nn.Module, rank: int,
                 world: int) -> list[Loader]:
    """What every pass takes a batch from: --data, and --class-data if there is any."""
    preset = loss_fn.sd.preset
    sizes = bucket_sizes(preset.size, preset.vae.downsampling, s.buckets)
    passes, shards = state.step * s.accumulate, is_shards(s.data[0])

    def folder(paths: list[str], first_index: int) -> Folder:
        return Folder(paths, sizes, s.batch, s.seed, s.captioned,
                      random_background=not s.captioned, first_index=first_index)

    data = [] if shards else [folder(s.data, 0)]
    class_data = [folder(s.class_data, 1 << 40)] if s.class_data else []
    loss_fn.prepare(data + class_data, rank, world)

    def batches(some: Folder) -> Iterator[Batch]:
        return some.batches(passes * world + rank, world, s.workers)

    loaders = [(1.0, batches(some)) for some in data]
    if shards:
        reader = Shards(s.data, sizes, s.batch, s.seed, s.captioned, s.shuffle, rank, world)
        loaders = [(1.0, reader.batches(state.positions, passes, s.workers))]
    return loaders + [(s.class_weight, batches(some)) for some in class_data]


# --- save and resume ---

def write(s: Settings, state: State, rank: int,
          to_file: Callable[[StableDiffusion], None]) -> None:
    """Rank 0 writes a file of the model with its averaged weights: to_file(sd)."""
    with state.ema_scope(), distributed.full_model(state.loss_fn.sd, s.fsdp, rank) as sd:
        if rank == 0:
            to_file(sd)


def save_run(s: Settings, state: State, rank: int) -> None:
    """The model, and what resumes the run."""
    write(s, state, rank, lambda sd: state.loss_fn.save(sd, s.out))
    save_state(s, state, rank)


def save_state(s: Settings, state: State, rank: int) -> None:
    """state.pt, of all processes, by rank 0. Any number of processes can resume from it."""
    mine = {worker: asdict(position) for worker, position in state.positions.items()}
    positions = distributed.gather_objects(mine)
    first = partial(unshard_on_first, rank=rank)
    optimizer = state.optimizer.state_dict()
    optimizer["state"] = {i: {name: first(x) for name, x in moments.items()}
                          for i, moments in optimizer["state"].items()}
    params = [first(p.detach()) for p in state.params]
    ema = params if state.ema is None else [first(average) for average in state.ema]
    if rank == 0:
        saved = {"step": state.step, "params": params, "ema": ema, "optimizer": optimizer,
                 "scaler": state.scaler.state_dict(), "positions": positions,
                 "workers": s.workers, "settings": stored_settings(s),
                 "shown": state.loss_fn.shown}
        with atomic_write(Path(s.out) / "state.pt") as temporary:
            torch.save(saved, temporary)


def resume(s: Settings, state: State, rank: int) -> bool:
    """Fill the state from state.pt in --out, if it is there. Raises UserError if it is the state
    of another run, or damaged."""
    path = Path(s.out) / "state.pt"
    if not path.exists():
        return False
    saved = read_state(path)
    check_same_run(s, saved.get("settings", {}))
    if any([p.shape for p in saved[key]] != [p.shape for p in state.params]
           for key in ("params", "ema")):
        raise UserError(f"{path} is of another model: give another --out")
    readers = len(saved["positions"]), saved["workers"]
    if any(saved["positions"]) and readers != (world_size(), s.workers):
        raise UserError(f"{path} was written by {readers[0]} processes with --workers "
                        f"{readers[1]}: with shards it must be as many again")
    try:
        fill(state, saved, rank)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
        raise damaged_state(path, error) from error
    say(rank, f"resumes {s.out} at step {state.step}")
    return True


def fill(state: State, saved: dict, rank: int) -> None:
    with torch.no_grad():
        averages = zip(state.ema or [], saved["ema"])
        for mine, theirs in [*zip(state.params, saved["params"]), *averages]:
            mine.copy_(shard_like(theirs, mine))
    saved["optimizer"]["state"] = {
        i: {name: shard_like(x, state.params[i]) for name, x in moments.items()}
        for i, moments in saved["optimizer"]["state"].items()}
    state.optimizer.load_state_dict(saved["optimizer"])
    if saved["scaler"] and state.scaler.is_enabled():
        state.scaler.load_state_dict(saved["scaler"])
    if any(saved["positions"]):
        state.positions |= {worker: Position(**position)
                            for worker, position in saved["positions"][rank].items()}
    state.step = saved["step"]
    state.loss_fn.shown = saved.get("shown", state.loss_fn.shown)


# --- the command ---

def main() -> None:
    status = 0
    with tolerant_streams():
        try:
            train(parse(Settings, __doc__))
        except UserError as error:
            print(f"train.py: {printable(error)}", file=sys.stderr)
            status = 2
        except KeyboardInterrupt:
            print("train.py: stopped before a step was made", file=sys.stderr)
            status = 130
    distributed.end_process(status)


if __name__ == "__main__":
    main()
