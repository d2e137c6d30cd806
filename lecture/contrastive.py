"""Chapter 8, CLIP's game: of N pictures and N captions, tell which belongs to which.

Two towers, one for pictures and one for texts, end in vectors of length 1. Their cosines, times a learned scale, are scores: every picture
is a question with N captions to choose from, and every caption one with N pictures. Right pairs are drawn together, all others pushed apart.
    s_ij = exp(scale) I_i . T_j
    loss = 1/2 mean over i of ( -log softmax_j(s_ij)[j = i] ) + 1/2 mean over j of ( -log softmax_i(s_ij)[i = j] )
Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision", figure 3; InfoNCE of van den Oord et al. 2018,
equation 4, in both directions. This game is all that CLIP's text tower ever learned from. Stable Diffusion takes that tower as it is, without
the projection, and its official files hold no picture tower. Here both towers are small, and learn on shapes that this script draws.

    python lecture/contrastive.py
    python lecture/contrastive.py --steps 100
"""
import math
from collections.abc import Iterator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn

from draw import Plot, UserError, beside, grid, run, save
from clip import CLIPTextConfig, CLIPTextModel, Tokenizer

WORDS = ("size", "colour", "shape", "place")
SIZES = {"small": 0.13, "big": 0.22}  # half the side, as a share of the picture's
COLORS = {"red": (214, 40, 40), "orange": (245, 150, 30), "yellow": (240, 215, 50),
          "green": (50, 160, 70), "blue": (50, 90, 210), "purple": (140, 60, 170)}
SHAPES = {  # corners in a square from -1 to 1; a circle has many
    "circle": [(math.cos(a / 5), math.sin(a / 5)) for a in range(32)],
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": [(r * math.sin(a * math.pi / 5), -r * math.cos(a * math.pi / 5)) for a, r in enumerate([1.1, 0.45] * 5)],
}
PLACES = {"on the left": (0.27, 0.5), "on the right": (0.73, 0.5), "at the top": (0.5, 0.27), "at the bottom": (0.5, 0.73)}
HELD_OUT = {(color, list(SHAPES)[i % 4]) for i, color in enumerate(COLORS)}  # in no training picture: a red circle, an orange square, ...


# --- the pictures and their captions ---

def captions(held_out: bool) -> list[tuple[str, str, str, str]]:
    """All (size, color, shape, place) whose color and shape are held out, or all the others."""
    return [c for c in product(SIZES, COLORS, SHAPES, PLACES) if ((c[1], c[2]) in HELD_OUT) == held_out]


def say(caption: tuple[str, str, str, str]) -> str:
    return "a {} {} {} {}".format(*caption)


def draw(caption: tuple[str, str, str, str], rng: np.random.Generator, side: int = 32) -> Image.Image:
    """A picture of it; place, size, colour and ground vary a little. Drawn four times too large, for smooth edges."""
    size, color, shape, place = caption
    center, half = 4 * side * (np.array(PLACES[place]) + rng.uniform(-0.05, 0.05, 2)), 4 * side * SIZES[size] * rng.uniform(0.85, 1.1)
    ground, ink = rng.integers(200, 256, 3), np.clip(np.array(COLORS[color]) + rng.integers(-18, 19, 3), 0, 255)
    picture = Image.new("RGB", (4 * side, 4 * side), tuple(map(int, ground)))
    ImageDraw.Draw(picture).polygon([tuple(map(float, center + half * np.array(corner))) for corner in SHAPES[shape]], fill=tuple(map(int, ink)))
    return picture.resize((side, side), Image.Resampling.BOX)


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """(N, 3, H, W), from -1 to 1."""
    return torch.from_numpy(np.stack([np.array(p) for p in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


# --- the two towers and the loss ---

class CLIP(nn.Module):
    """Pictures (N, 3, 32, 32) and rows of tokens (N, T) -> their vectors (N, D), of length 1."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(hidden_size=width, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=16))
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64 * 4 * 4, width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x: Tensor) -> Tensor:
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return F.normalize(self.text_projection(self.text.pool(self.text(tokens), tokens)), dim=1)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Vectors (N, D) of N pairs, of length 1 -> the mean cross-entropy of choosing the right caption, and the right picture."""
    scores = logit_scale.exp().clamp(max=100) * image @ text.T  # above 100 training is unstable: section 2.5
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


# --- the game ---

def learn(model: CLIP, tokens: Tensor, pictures: Tensor, steps: int, batch: int) -> Iterator[float]:
    """Train with the captions' tokens (C, T) and their pictures (C, n, 3, H, W), each batch of different captions. Yields the loss of each step."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)  # else Adam on the token table takes half the time
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1, pct_start=0.1)
    for _ in range(steps):
        i = torch.randperm(len(tokens))[:batch]
        x = pictures[i, torch.randint(pictures.shape[1], (batch,))]
        loss = contrastive_loss(model.encode_image(x), model.encode_text(tokens[i]), model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        yield loss.item()


@torch.no_grad()
def similarity(model: CLIP, tokens: Tensor, x: Tensor) -> np.ndarray:
    """The cosine of every caption with every picture: (captions, pictures)."""
    return (model.encode_text(tokens) @ model.encode_image(x).T).numpy()


def retrieval(s: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """Of the pictures `asked`, the share whose best of all captions is their own, and of the captions the same; entry i, i of s is right."""
    return float((s.argmax(0) == np.arange(len(s)))[asked].mean()), float((s.argmax(1) == np.arange(len(s)))[asked].mean())


def words_right(s: np.ndarray, everything: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of the best captions for the pictures `asked`, the share with the right size, color, shape and place: (4,)."""
    return (everything[s.argmax(0)] == everything)[asked].mean(0)


def curves(shares: np.ndarray, steps: list[int]) -> Image.Image:
    """What it learned when: shares (looks, 4)."""
    plot = Plot((-steps[-1] / 8, steps[-1]), 420, "held-out pictures: how often a word of the best caption is right", yspan=(0, 1.04))
    for share in (0.25, 0.5, 0.75, 1):
        plot.line([(0, share), (steps[-1], share)], "lightgray")
        plot.pen.text(plot.at([(-steps[-1] / 60, share)])[0], f"{share:.0%}", "gray", anchor="rm", font_size=11)
    for k, (word, color) in enumerate(zip(WORDS, ("gray", "crimson", "seagreen", "royalblue"))):
        plot.line(list(zip(steps, shares[:, k])), color, 2)
        plot.pen.text((70 + 70 * k, 350), word, color, font_size=14)
    plot.pen.text((60, 424), "step 0", "gray", anchor="mm", font_size=11)
    plot.pen.text((416, 424), f"step {steps[-1]}", "gray", anchor="rm", font_size=11)
    return plot.image


def main(args):
    torch.set_num_threads(1)  # the networks are so small that threads cost more than they bring
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    steps = (20 if args.quick else 600) if args.steps is None else args.steps
    everything = captions(False) + captions(True)
    held_out = np.array([(color, shape) in HELD_OUT for _, color, shape, _ in everything])
    if not 2 <= args.batch <= (~held_out).sum() or steps < 1:
        raise UserError(f"--batch {args.batch} --steps {steps}: a batch holds 2 to {(~held_out).sum()} captions, and at least one step is needed")

    for n in (8, args.batch):
        same = F.normalize(torch.ones(n, 64), dim=1)
        print(f"{n} pairs of vectors that are all equal: loss {contrastive_loss(same, same, torch.tensor(0.0)):.4f}, ln {n} = {math.log(n):.4f}")
    tokens = Tokenizer(length=16)([say(caption) for caption in everything])
    tests = [draw(caption, rng) for caption in everything]
    x, model = as_tensor(tests), CLIP()
    known = torch.stack([as_tensor([draw(c, rng) for _ in range(4 if args.quick else 30)]) for c in everything if (c[1], c[2]) not in HELD_OUT])

    looks = {0: similarity(model, tokens, x)}
    print(f"training on {len(known)} captions with {known.shape[1]} pictures each; the other {held_out.sum()} captions are held out")
    for step, loss in enumerate(learn(model, tokens[~torch.from_numpy(held_out)], known, steps, args.batch), start=1):
        if step % 10 == 0 or step == steps:
            looks[step] = similarity(model, tokens, x)
        if step in (1, 10, 30, 100, 300, 1000, steps):
            print(f"  step {step:>4}: loss {loss:.3f}")
    print(f"the scale exp(logit_scale) went from {1 / 0.07:.2f} to {model.logit_scale.exp():.2f}\n")

    print(f"{'new pictures, right first choice of ' + str(len(tests)):<44}{'picture -> caption':>20}{'caption -> picture':>20}")
    for name, asked in ("captions it trained on", ~held_out), ("held-out captions", held_out):
        for when, s in ("before", looks[0]), ("after", looks[steps]):
            print(f"  {name + ', ' + when:<42}" + "".join(f"{share:>20.1%}" for share in retrieval(s, asked)))
    print(f"  {'by chance':<42}" + 2 * f"{1 / len(tests):>20.1%}")

    words = np.stack([words_right(s, np.array(everything), held_out) for s in looks.values()])
    print("the best of all captions for a held-out picture has the right " + ", ".join(
        f"{word} for {share:.0%}" for word, share in zip(WORDS, words[-1])) + " of them\n")

    shown = np.nonzero(held_out)[0][np.random.default_rng(3).permutation(held_out.sum())[:8]]
    pictures, pages = [tests[i] for i in shown], []
    for step, title in (0, "cosines before training"), (steps, f"after {steps} steps"):
        s = looks[step][np.ix_(shown, shown)]
        pages.append(grid(s, pictures, [say(everything[i]) if step == 0 else "" for i in shown], title, 40, -1, 1, list(zip(s.argmax(0), range(8)))))
    save(beside(pages, "Colours and shapes never trained together; framed is the caption each picture chooses"), args.out / "contrastive.png")
    save(curves(words, list(looks)), args.out / "contrastive_words.png")


if __name__ == "__main__":
    run(main, __doc__, steps=dict(type=int, help="of training (default 600)"),
        batch=dict(type=int, default=64, help="pairs at a time, up to 144: each is told from the others (default 64)"))
