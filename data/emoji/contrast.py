"""Train the text encoder before the UNet: CLIP's game (lecture/contrastive.py) with emoji latents.

    python data/emoji/contrast.py --vae runs/vae/model.safetensors --out runs/text [--steps 1500]
    python train.py --init runs/text/model.safetensors ...

Run data/emoji/prepare.py, compose.py and vectors.py first. The token table is vectors.py's and is
not trained, so that a word in no caption is understood by its neighbours in the table. In a batch
of pictures and captions each must find its partner, in two ways: by one vector for the whole text
and one for the whole picture, as in CLIP; and by the tokens, each with the part of the picture that
matches it best (FILIP: Yao et al. 2021, equations 4 to 6). The second is for the UNet, which
attends to single tokens: CLIP's loss alone never trains their vectors in the last layer.

It prints, for 200 captions each of new pictures, how many find their own picture among the 200: for
pictures like the training ones, for colours of objects that were set aside, for pairs that were. It
also prints how many words of synonyms.txt have one of their names among the nearest five.
"""
import argparse
import math
import random
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from compose import (
    COLOURS,
    Emoji,
    fits,
    load_emoji,
    moved,
    on_background,
    pair,
    recolour,
    set_aside,
)
from PIL import Image
from prepare import HERE, STYLES, with_article
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE.parents[1] / "lecture"))

from contrastive import contrastive_loss

from clip import EOS, Tokenizer
from extras.files import make_folder, on_white, read_image
from extras.formats import save
from sd import PRESETS, StableDiffusion, pixels
from vae import AutoencoderKL

TOKENS = 24  # the longest caption of compose.py


# --- the encoders and the loss ---

class Encoders(nn.Module):
    """The text encoder, and a small one for latents (N, Z, 8, 8).

    They give vectors of length 1, of the whole and of the parts.
    """

    def __init__(self, text: nn.Module, channels: int, width: int = 64, dim: int = 128):
        super().__init__()
        self.text = text

        def layer(c_in: int, c_out: int, stride: int = 1) -> list[nn.Module]:
            conv = nn.Conv2d(c_in, c_out, 3, stride=stride, padding=1)
            return [conv, nn.GroupNorm(8, c_out), nn.SiLU()]

        self.image = nn.Sequential(
            *layer(channels, width), *layer(width, width),
            *layer(width, 2 * width, stride=2), *layer(2 * width, 2 * width))
        self.image_whole = nn.Linear(16 * 2 * width, dim)
        self.image_part = nn.Linear(2 * width, dim)
        self.text_whole = nn.Linear(text.config.hidden_size, dim, bias=False)
        self.text_part = nn.Linear(text.config.hidden_size, dim, bias=False)
        self.scales = nn.Parameter(torch.full((2,), math.log(10.0)))

    def encode_image(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(N, Z, 8, 8) -> (N, D), (N, 16, D)"""
        h = self.image(z)
        whole = self.image_whole(h.flatten(1))
        parts = self.image_part(h.flatten(2).transpose(1, 2))       # 'n c h w -> n (h w) c'
        return F.normalize(whole, dim=-1), F.normalize(parts, dim=-1)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T) -> (N, D), (N, T, D), and which of the T are the text's own, (N, T)."""
        features, pooled = self.text(tokens)
        end = (tokens == EOS).int().argmax(1, keepdim=True)
        position = torch.arange(tokens.shape[1])
        # an empty text has only its end token
        own = (position > 0) & ((position < end) | (end == 1))
        whole, parts = self.text_whole(pooled), self.text_part(features)
        return F.normalize(whole, dim=-1), F.normalize(parts, dim=-1), own


def by_parts(image: Tensor, text: Tensor, own: Tensor) -> Tensor:
    """(N, P, D), (M, T, D), (M, T) -> scores (N, M): the mean over tokens of their best part."""
    best = torch.einsum("npd,mtd->nmtp", image, text).amax(-1)      # 'n m t p -> n m t'
    return (best * own).sum(-1) / own.sum(-1)


def loss_of(model: Encoders, z: Tensor, tokens: Tensor) -> Tensor:
    """CLIP's loss plus FILIP's."""
    whole_image, part_image = model.encode_image(z)
    whole_text, part_text, own = model.encode_text(tokens)
    scores = by_parts(part_image, part_text, own) * model.scales[1].exp().clamp(max=100)
    right = torch.arange(len(z))
    parts = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
    return contrastive_loss(whole_image, whole_text, model.scales[0]) + parts


# --- measuring ---

def quiz(kind: str, n: int, emoji: Emoji, seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """n different prompts with true pictures that are new.

    The kinds: "known" (facts that were trained on), "colours" or "pairs" (set aside).
    """
    rng, names = random.Random(f"{kind} {seed}"), sorted({name for name, _ in emoji})
    found = {}
    while len(found) < n:
        style = rng.choice(list(STYLES))
        colour, a, b = rng.choice(list(COLOURS)), *rng.sample(names, 2)
        if kind == "pairs" or kind == "known" and rng.random() < 0.5:
            fact, prompt = (a, b), f"{with_article(a)} next to {with_article(b)}, {style}"
            picture = pair(emoji[a, style], emoji[b, style])
            able = fits(a, "pair") and fits(b, "pair")
        else:
            fact, prompt = (colour, a), f"{with_article(f'{colour} {a}')}, {style}"
            picture, able = None, fits(a, "colour")
        if able and set_aside(*fact) == (kind != "known"):
            if picture is None:
                picture = moved(recolour(emoji[a, style], colour), 0.92, rng)
            found[prompt] = on_background(picture)
    return list(found), list(found.values())


@torch.no_grad()
def all_scores(model: Encoders, tokenizer: Tokenizer, z: Tensor,
               prompts: list[str]) -> tuple[Tensor, Tensor]:
    """Scores (pictures, prompts), by the whole and by the parts."""
    whole_image, part_image = model.encode_image(z)
    whole_text, part_text, own = model.encode_text(tokenizer(prompts))
    return whole_image @ whole_text.T, by_parts(part_image, part_text, own)


def retrieval(model: Encoders, tokenizer: Tokenizer, z: Tensor,
              prompts: list[str]) -> tuple[float, float]:
    """The share of captions that find their own picture, by the whole and by the parts."""
    right = torch.arange(len(z))
    return tuple(float((scores.argmax(0) == right).float().mean())
                 for scores in all_scores(model, tokenizer, z, prompts))


def found_synonyms(model: Encoders, tokenizer: Tokenizer, z: Tensor,
                   names: list[str]) -> tuple[float, float]:
    """The share of words of synonyms.txt with one of their names among the nearest five pictures.

    By the whole and by the parts.
    """
    lines = [line.split(": ") for line in (HERE / "synonyms.txt").read_text().splitlines()]
    wanted = [set(of.split(", ")) for _, of in lines]
    shares = []
    for scores in all_scores(model, tokenizer, z, [word for word, _ in lines]):
        nearest = [[names[j] for j in column.topk(5).indices] for column in scores.T]
        hits = [bool(of & set(five)) for five, of in zip(nearest, wanted)]
        shares.append(sum(hits) / len(hits))
    return tuple(shares)


# --- training ---

def make_model(vae: str | None) -> StableDiffusion:
    """A new model with this VAE and with vectors.py's token table."""
    old = StableDiffusion.load(vae, "cpu", torch.float32)
    sd = StableDiffusion(replace(PRESETS["emoji"], vae=old.preset.vae, size=old.preset.size))
    sd.vae.load_state_dict(old.vae.state_dict())
    table = sd.text_encoders[0].embeddings.token_embedding.requires_grad_(False)
    vectors = load_file(HERE / "vectors.safetensors")["embeddings.token_embedding.weight"]
    table.weight.copy_(vectors)
    return sd


@torch.no_grad()
def latents(sd: StableDiffusion, paths: list[Path]) -> Tensor:
    batches = [paths[i:i + 16] for i in range(0, len(paths), 16)]
    images = ([on_white(read_image(path)) for path in batch] for batch in batches)
    return torch.cat([moments(sd.vae, pixels(some)).half() for some in images])


def moments(vae: AutoencoderKL, x: Tensor) -> Tensor:
    """Pictures (B, 3, 64, 64) -> the mean of their latents (B, Z, 8, 8). A VAE of larger pictures
    is given them enlarged."""
    side = 8 * vae.config.downsampling
    if x.shape[-1] != side:
        x = F.interpolate(x, (side, side), mode="bicubic")
    return vae.moments(x)[0]


class Data:
    """Latents and captions of train/ (first) and composed/, and the quizzes."""

    def __init__(self, sd: StableDiffusion):
        emoji = load_emoji()
        paths = sorted((HERE / "train").glob("*.png"))  # in the order of load_emoji
        self.names = [name for name, _ in emoji]
        paths += sorted((HERE / "composed").glob("*.png"))
        self.captions = [path.with_suffix(".txt").read_text().splitlines() for path in paths]
        self.z = latents(sd, paths)
        self.quizzes = {}
        for kind in ("known", "colours", "pairs"):
            prompts, pictures = quiz(kind, 200, emoji)
            with torch.no_grad():
                self.quizzes[kind] = moments(sd.vae, pixels(pictures)), prompts

    def batch(self, tokenizer: Tokenizer, size: int, rng: random.Random) -> tuple[Tensor, Tensor]:
        """Latents and tokens; a fifth from train/, the rest composed."""
        first, rest = len(self.names), len(self.z) - len(self.names)
        i = torch.cat([torch.randperm(first)[:size // 5],
                       first + torch.randperm(rest)[:size - size // 5]])
        tokens = tokenizer([rng.choice(self.captions[j]) for j in i])
        # the encoder is causal, so padding that all texts have changes nothing
        tokens = tokens[:, :int((tokens != EOS).sum(1).max()) + 1]
        z = self.z[i].float()
        return z + 0.05 * torch.randn(len(i), *self.z.shape[1:]), tokens

    def measure(self, model: Encoders, tokenizer: Tokenizer) -> str:
        found = {kind: retrieval(model, tokenizer, z, prompts)
                 for kind, (z, prompts) in self.quizzes.items()}
        z = self.z[:len(self.names)].float()
        found["synonyms"] = found_synonyms(model, tokenizer, z, self.names)
        return ", ".join(f"{kind} {a:.0%} {b:.0%}" for kind, (a, b) in found.items())


def train(model: Encoders, data: Data, steps: int, batch: int, lr: float) -> None:
    tokenizer, rng = Tokenizer(length=TOKENS), random.Random(0)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps + 1,
                                               pct_start=0.05)
    total, clock = 0.0, time.time()
    for step in range(steps):
        z, tokens = data.batch(tokenizer, batch, rng)
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel's backward is slow
            loss = loss_of(model, z, tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        rate.step()
        total += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            print(f"step {step + 1}/{steps}  loss {total / (step % 100 + 1):.3f}"
                  f"  {time.time() - clock:.0f} s  whole, parts: {data.measure(model, tokenizer)}",
                  flush=True)
            total = 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", help="the checkpoint whose VAE gives the latents; default: the"
                                      " built-in model")
    parser.add_argument("--out", type=Path, default=Path("runs/text"),
                        help="folder for model.safetensors")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    sd = make_model(args.vae)
    data = Data(sd)
    print(f"{len(data.z)} pictures", flush=True)
    model = Encoders(sd.text_encoders[0], sd.preset.unet.in_channels)
    train(model, data, args.steps, args.batch, args.lr)
    make_folder(args.out)
    save(sd, args.out / "model.safetensors")


if __name__ == "__main__":
    main()
