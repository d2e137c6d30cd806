"""Teach the text tower what the words look like before the UNet draws: CLIP's game (lecture/contrastive.py) on the emoji's latents.

    python data/emoji/contrast.py --vae runs/vae/model.safetensors --out runs/text [--steps 1500]
    python train.py --init runs/text/model.safetensors ...

Run data/emoji/prepare.py, compose.py and vectors.py first. The token table is vectors.py's and stays as it is, so that a word in no caption is
told by its neighbours in it. Of a batch of pictures and captions each is to find its own, twice over: by one vector for the whole text and
one for the whole picture, as in CLIP, and by the words, each with the place in the picture that suits it best (FILIP: Yao et al. 2021,
equations 4 to 6). The second is for the UNet, which looks at the words one by one: CLIP's loss alone never reaches their vectors in the last layer.

Printed: of captions of 200 new pictures each, how many find their own among the 200, for pictures like the training ones, with colours and
objects that were set aside, with pairs that were; and how many words of synonyms.txt have one of their names among the nearest five.
"""
import argparse
import math
import random
import sys
import time
from copy import deepcopy
from pathlib import Path

import torch
import torch.nn.functional as F
from classify import load_emoji
from PIL import Image
from prepare import HERE, STYLES, with_article
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(HERE.parents[1]))
sys.path.insert(0, str(HERE.parents[1] / "lecture"))
from clip import EOS, Tokenizer  # noqa: E402
from compose import COLOURS, fits, moved, on_ground, pair, recolour, set_aside  # noqa: E402
from contrastive import contrastive_loss  # noqa: E402
from sd import PRESETS, StableDiffusion, on_white, pixels, read_image  # noqa: E402

TOKENS = 24  # the longest caption of compose.py


class Towers(nn.Module):
    """The text tower, and a small one for latents (N, Z, 8, 8); vectors of length 1, of the whole and of the parts."""

    def __init__(self, text: nn.Module, channels: int, width: int = 64, dim: int = 128):
        super().__init__()
        self.text = text
        self.image = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, width, 3, padding=1), nn.GroupNorm(8, width), nn.SiLU(),
            nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU(),
            nn.Conv2d(2 * width, 2 * width, 3, padding=1), nn.GroupNorm(8, 2 * width), nn.SiLU())
        self.image_whole, self.image_part = nn.Linear(16 * 2 * width, dim), nn.Linear(2 * width, dim)
        self.text_whole, self.text_part = (nn.Linear(text.cfg.hidden_size, dim, bias=False) for _ in range(2))
        self.scales = nn.Parameter(torch.full((2,), math.log(10.0)))

    def encode_image(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """(N, Z, 8, 8) -> (N, D), (N, 16, D)"""
        h = self.image(z)
        return F.normalize(self.image_whole(h.flatten(1)), dim=-1), F.normalize(self.image_part(h.flatten(2).transpose(1, 2)), dim=-1)

    def encode_text(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(N, T) -> (N, D), (N, T, D), and which of the T are the text's own, (N, T)"""
        words, pooled = self.text.encode(tokens)
        end = (tokens == EOS).int().argmax(1, keepdim=True)
        place = torch.arange(tokens.shape[1])
        return (F.normalize(self.text_whole(pooled), dim=-1), F.normalize(self.text_part(words), dim=-1),
                (place > 0) & ((place < end) | (end == 1)))  # an empty text has its end token alone


def by_parts(image: Tensor, text: Tensor, own: Tensor) -> Tensor:
    """(N, P, D), (M, T, D), (M, T) -> scores (N, M): each word's best place, averaged over the words."""
    best = torch.einsum("npd,mtd->nmtp", image, text).amax(-1)       # 'n m t p -> n m t'
    return (best * own).sum(-1) / own.sum(-1)


def loss_of(model: Towers, z: Tensor, tokens: Tensor) -> Tensor:
    whole_image, part_image = model.encode_image(z)
    whole_text, part_text, own = model.encode_text(tokens)
    scores = by_parts(part_image, part_text, own) * model.scales[1].exp().clamp(max=100)
    right = torch.arange(len(z))
    parts = (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2
    return contrastive_loss(whole_image, whole_text, model.scales[0]) + parts


@torch.no_grad()
def latents(sd: StableDiffusion, paths: list[Path]) -> Tensor:
    x = (pixels([on_white(read_image(path)) for path in paths[i:i + 16]]) for i in range(0, len(paths), 16))
    return torch.cat([sd.vae.moments(some)[0].half() for some in x])


def quiz(kind: str, n: int, emoji: dict, seed: int = 0) -> tuple[list[str], list[Image.Image]]:
    """n different prompts with true pictures that training has not seen: 'known' (facts it has seen), 'colours' or 'pairs' (set aside)."""
    rng, names, asked = random.Random(f"{kind} {seed}"), sorted({name for name, _ in emoji}), {}
    while len(asked) < n:
        style = rng.choice(list(STYLES))
        colour, a, b = rng.choice(list(COLOURS)), *rng.sample(names, 2)
        if kind == "pairs" or kind == "known" and rng.random() < 0.5:
            fact, picture, said = (a, b), pair(emoji[a, style], emoji[b, style]), f"{with_article(a)} next to {with_article(b)}, {style}"
            ok = fits(a, "pair") and fits(b, "pair")
        else:
            fact, picture, said = (colour, a), None, f"{with_article(f'{colour} {a}')}, {style}"
            ok = fits(a, "colour")
        if ok and set_aside(*fact) == (kind != "known"):
            asked[said] = on_ground(picture or moved(recolour(emoji[a, style], colour), 0.92, rng))
    return list(asked), list(asked.values())


@torch.no_grad()
def retrieval(model: Towers, tokenizer: Tokenizer, z: Tensor, prompts: list[str]) -> tuple[float, float]:
    """The share of captions that find their own picture among all, by the whole and by the parts."""
    whole_image, part_image = model.encode_image(z)
    whole_text, part_text, own = model.encode_text(tokenizer(prompts))
    right = torch.arange(len(z))
    return tuple(float((scores.argmax(0) == right).float().mean()) for scores in (whole_image @ whole_text.T, by_parts(part_image, part_text, own)))


@torch.no_grad()
def found_synonyms(model: Towers, tokenizer: Tokenizer, z: Tensor, names: list[str]) -> tuple[float, float]:
    """The share of words of synonyms.txt that have a picture of one of their names among the nearest five, by the whole and by the parts."""
    lines = [line.split(": ") for line in (HERE / "synonyms.txt").read_text().splitlines()]
    whole_image, part_image = model.encode_image(z)
    whole_text, part_text, own = model.encode_text(tokenizer([word for word, _ in lines]))
    wanted = [set(of.split(", ")) for _, of in lines]
    return tuple(sum(any(names[j] in of for j in column.topk(5).indices) for column, of in zip(scores.T, wanted)) / len(wanted)
                 for scores in (whole_image @ whole_text.T, by_parts(part_image, part_text, own)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vae", help="the checkpoint whose VAE gives the latents; default: the built-in model")
    parser.add_argument("--out", type=Path, default=Path("runs/text"), help="folder for model.safetensors")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    args = parser.parse_args()
    torch.manual_seed(0)
    old = StableDiffusion.load(args.vae, "cpu", torch.float32)
    config = deepcopy(PRESETS["emoji"])
    config.vae = old.config.vae
    sd = StableDiffusion(config)
    sd.vae.load_state_dict(old.vae.state_dict())
    sd.text.embeddings.token_embedding.weight.data.copy_(load_file(HERE / "vectors.safetensors")["embeddings.token_embedding.weight"])
    sd.text.embeddings.token_embedding.requires_grad_(False)

    paths = sorted((HERE / "train").glob("*.png"))
    emoji = load_emoji()  # of those paths, in their order
    names = [name for name, _ in emoji]
    paths += sorted((HERE / "composed").glob("*.png"))
    captions = [path.with_suffix(".txt").read_text().splitlines() for path in paths]
    z = latents(sd, paths)
    quizzes = {kind: quiz(kind, 200, emoji) for kind in ("known", "colours", "pairs")}
    with torch.no_grad():
        quizzes = {kind: (prompts, sd.vae.moments(pixels(pictures))[0]) for kind, (prompts, pictures) in quizzes.items()}
    print(f"{len(paths)} pictures", flush=True)

    tokenizer, model = Tokenizer(length=TOKENS), Towers(sd.text, config.unet.in_channels)
    params = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=args.lr, betas=(0.9, 0.98), weight_decay=0.02, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=args.lr, total_steps=args.steps + 1, pct_start=0.05)
    rng, total, clock = random.Random(0), 0.0, time.time()
    bare = len(names)  # a fifth of every batch from train/, the rest composed
    for step in range(args.steps):
        i = torch.cat([torch.randperm(bare)[:args.batch // 5], bare + torch.randperm(len(paths) - bare)[:args.batch - args.batch // 5]])
        tokens = tokenizer([rng.choice(captions[j]) for j in i])
        tokens = tokens[:, :int((tokens != EOS).sum(1).max()) + 1]  # padding that all have changes nothing: the tower is causal
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel's backward is slow
            loss = loss_of(model, z[i].float() + 0.05 * torch.randn(len(i), *z.shape[1:]), tokens)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        schedule.step()
        total += loss.item()
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            found = {kind: retrieval(model.eval(), tokenizer, pictures, prompts) for kind, (prompts, pictures) in quizzes.items()}
            found["synonyms"] = found_synonyms(model, tokenizer, z[:bare].float(), names)
            print(f"step {step + 1}/{args.steps}  loss {total / (step % 100 + 1):.3f}  {time.time() - clock:.0f} s  whole, parts: "
                  + ", ".join(f"{kind} {a:.0%} {b:.0%}" for kind, (a, b) in found.items()), flush=True)
            total = 0.0
    args.out.mkdir(parents=True, exist_ok=True)
    sd.save(args.out / "model.safetensors")


if __name__ == "__main__":
    main()
