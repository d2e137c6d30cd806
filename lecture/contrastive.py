"""Chapter 8, CLIP's game: of N pictures and N captions, find the pairs.

Two encoders, one for pictures and one for texts, end in vectors of length 1. Their cosines, times a
learned scale, are scores. Each picture chooses among N captions, and each caption among N pictures.
Training moves the right pairs together and all others apart.
    s_ij = exp(scale) I_i . T_j
    loss = 1/2 mean over i of ( -log softmax_j(s_ij)[j = i] )
         + 1/2 mean over j of ( -log softmax_i(s_ij)[i = j] )
Radford et al. 2021, "Learning Transferable Visual Models From Natural Language Supervision",
figure 3; it is InfoNCE, van den Oord et al. 2018, equation 4, in both directions.

CLIP's text encoder learned from this game alone. Stable Diffusion takes the text encoder as it is,
without the projection; its official files hold no picture encoder. Here both encoders are small and
learn from shapes that this script draws.

    python lecture/contrastive.py
    python lecture/contrastive.py --steps 100
"""
import math
from collections.abc import Callable, Iterator
from itertools import product

import numpy as np
import torch
import torch.nn.functional as F
from draw import Plot, UserError, beside, grid, run, save
from PIL import Image, ImageDraw
from torch import Tensor, nn

from clip import CLIPTextConfig, CLIPTextModel, Tokenizer

KINDS = ("size", "colour", "shape", "place")
SIZES = {"small": 0.13, "big": 0.22}  # half the side, as a share of the picture's
COLORS = {"red": (214, 40, 40), "orange": (245, 150, 30), "yellow": (240, 215, 50),
          "green": (50, 160, 70), "blue": (50, 90, 210), "purple": (140, 60, 170)}
SHAPES = {  # corners in a square from -1 to 1; a circle has many
    "circle": [(math.cos(a / 5), math.sin(a / 5)) for a in range(32)],
    "square": [(-0.9, -0.9), (0.9, -0.9), (0.9, 0.9), (-0.9, 0.9)],
    "triangle": [(0, -1), (1, 0.8), (-1, 0.8)],
    "star": [(r * math.sin(a * math.pi / 5), -r * math.cos(a * math.pi / 5))
             for a, r in enumerate([1.1, 0.45] * 5)],
}
PLACES = {"on the left": (0.27, 0.5), "on the right": (0.73, 0.5), "at the top": (0.5, 0.27),
          "at the bottom": (0.5, 0.73)}
# in no training picture: a red circle, an orange square, ...
HELD_OUT = {(color, list(SHAPES)[i % 4]) for i, color in enumerate(COLORS)}

Caption = tuple[str, str, str, str]  # size, colour, shape, place


# --- the pictures and their captions ---

def captions(held_out: bool) -> list[Caption]:
    """All captions whose colour and shape are held out, or all the others."""
    return [caption for caption in product(SIZES, COLORS, SHAPES, PLACES)
            if ((caption[1], caption[2]) in HELD_OUT) == held_out]


def text_of(caption: Caption) -> str:
    return "a {} {} {} {}".format(*caption)


def draw(caption: Caption, rng: np.random.Generator, side: int = 32) -> Image.Image:
    """A picture of the caption. Place, size, colour and background vary a little.

    It is drawn four times too large, for smooth edges.
    """
    size, color, shape, place = caption
    large = 4 * side
    center = large * (np.array(PLACES[place]) + rng.uniform(-0.05, 0.05, 2))
    half = large * SIZES[size] * rng.uniform(0.85, 1.1)
    background = rng.integers(200, 256, 3)
    ink = np.clip(np.array(COLORS[color]) + rng.integers(-18, 19, 3), 0, 255)
    picture = Image.new("RGB", (large, large), tuple(map(int, background)))
    corners = [tuple(map(float, center + half * np.array(corner))) for corner in SHAPES[shape]]
    ImageDraw.Draw(picture).polygon(corners, fill=tuple(map(int, ink)))
    return picture.resize((side, side), Image.Resampling.BOX)


def as_tensor(pictures: list[Image.Image]) -> Tensor:
    """(N, 3, H, W), from -1 to 1."""
    x = torch.from_numpy(np.stack([np.array(picture) for picture in pictures]))
    return x.permute(0, 3, 1, 2) / 127.5 - 1                            # 'n h w c -> n c h w'


# --- the two encoders and the loss ---

class CLIP(nn.Module):
    """Pictures (N, 3, 32, 32) and tokens (N, T) -> their vectors (N, D), of length 1."""

    def __init__(self, width: int = 64):
        super().__init__()
        self.text = CLIPTextModel(CLIPTextConfig(
            hidden_size=width, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=16))
        self.text_projection = nn.Linear(width, width, bias=False)
        self.image = nn.Sequential(
            nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Conv2d(64, 64, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(64 * 4 * 4, width))
        self.logit_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))

    def encode_image(self, x: Tensor) -> Tensor:
        return F.normalize(self.image(x), dim=1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        _, pooled = self.text(tokens)
        return F.normalize(self.text_projection(pooled), dim=1)


def contrastive_loss(image: Tensor, text: Tensor, logit_scale: Tensor) -> Tensor:
    """Vectors (N, D) of N pairs, of length 1 -> the mean cross-entropy of both choices."""
    # above 100 training is unstable: section 2.5
    scores = logit_scale.exp().clamp(max=100) * image @ text.T
    right = torch.arange(len(scores))
    return (F.cross_entropy(scores, right) + F.cross_entropy(scores.T, right)) / 2


# --- the game ---

def learn(model: CLIP, tokens: Tensor, pictures: Tensor, steps: int,
          batch: int) -> Iterator[float]:
    """Train on the captions' tokens (C, T) and their pictures (C, n, 3, H, W).

    The captions of a batch differ. Yields the loss of each step.
    """
    # without `fused` Adam on the token table takes half of the time
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-3, total_steps=steps + 1,
                                               pct_start=0.1)
    for _ in range(steps):
        i = torch.randperm(len(tokens))[:batch]
        x = pictures[i, torch.randint(pictures.shape[1], (batch,))]
        image, text = model.encode_image(x), model.encode_text(tokens[i])
        loss = contrastive_loss(image, text, model.logit_scale)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
        yield loss.item()


@torch.no_grad()
def similarity(model: CLIP, tokens: Tensor, x: Tensor) -> np.ndarray:
    """The cosine of every caption with every picture: (captions, pictures)."""
    return (model.encode_text(tokens) @ model.encode_image(x).T).numpy()


def retrieval(s: np.ndarray, asked: np.ndarray) -> tuple[float, float]:
    """The share of the pictures `asked` that choose their own caption, and of the captions.

    Entry i, i of s (captions, pictures) is the right pair.
    """
    own = np.arange(len(s))
    by_picture, by_caption = (s.argmax(0) == own)[asked], (s.argmax(1) == own)[asked]
    return float(by_picture.mean()), float(by_caption.mean())


def words_right(s: np.ndarray, everything: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Of the captions chosen for the pictures `asked`, the share with the right word: (4,).

    The four are size, colour, shape and place.
    """
    return (everything[s.argmax(0)] == everything)[asked].mean(0)


def curves(shares: np.ndarray, steps: list[int]) -> Image.Image:
    """How the four shares (looks, 4) grew."""
    last = steps[-1]
    plot = Plot((-last / 8, last), 420,
                "held-out pictures: how often a word of the chosen caption is right",
                yspan=(0, 1.04))
    for share in (0.25, 0.5, 0.75, 1):
        plot.line([(0, share), (last, share)], "lightgray")
        plot.pen.text(plot.at([(-last / 60, share)])[0], f"{share:.0%}", "gray", anchor="rm",
                      font_size=11)
    for k, (kind, color) in enumerate(zip(KINDS, ("gray", "crimson", "seagreen", "royalblue"))):
        plot.line(list(zip(steps, shares[:, k])), color, 2)
        plot.pen.text((70 + 70 * k, 350), kind, color, font_size=14)
    plot.pen.text((60, 424), "step 0", "gray", anchor="mm", font_size=11)
    plot.pen.text((416, 424), f"step {last}", "gray", anchor="rm", font_size=11)
    return plot.image


# --- the script ---

def print_losses_of_equal_vectors(sizes: tuple[int, ...]) -> None:
    for n in sizes:
        same = F.normalize(torch.ones(n, 64), dim=1)
        loss = contrastive_loss(same, same, torch.tensor(0.0))
        print(f"{n} pairs of equal vectors: loss {loss:.4f}, ln {n} = {math.log(n):.4f}")


def print_retrieval(before: np.ndarray, after: np.ndarray, held_out: np.ndarray) -> None:
    n = len(before)
    print(f"{f'new pictures, right first choice of {n}':<44}{'picture -> caption':>20}"
          f"{'caption -> picture':>20}")
    for name, asked in ("trained captions", ~held_out), ("held-out captions", held_out):
        for when, s in ("before", before), ("after", after):
            shares = "".join(f"{share:>20.1%}" for share in retrieval(s, asked))
            print(f"  {name + ', ' + when:<42}{shares}")
    print(f"  {'by chance':<42}" + 2 * f"{1 / n:>20.1%}")


def watch_learning(losses: Iterator[float], measure: Callable[[], np.ndarray],
                   steps: int) -> dict[int, np.ndarray]:
    """Train, print some losses, and measure at the start and after every ten steps."""
    looks = {0: measure()}
    for step, loss in enumerate(losses, start=1):
        if step % 10 == 0 or step == steps:
            looks[step] = measure()
        if step in (1, 10, 30, 100, 300, 1000, steps):
            print(f"  step {step:>4}: loss {loss:.3f}")
    return looks


def cosines_page(tests: list[Image.Image], everything: list[Caption], shown: np.ndarray,
                 before: np.ndarray, after: np.ndarray, steps: int) -> Image.Image:
    """The cosines of a few held-out pictures and captions, before and after training."""
    pictures = [tests[i] for i in shown]
    texts = [text_of(everything[i]) for i in shown]
    pages = []
    for s, down, title in ((before, texts, "cosines before training"),
                           (after, [""] * len(shown), f"after {steps} steps")):
        some = s[np.ix_(shown, shown)]
        chosen = list(zip(some.argmax(0), range(len(shown))))
        pages.append(grid(some, pictures, down, title, 40, -1, 1, chosen))
    return beside(pages, "Colours and shapes never trained together; the caption that each picture"
                         " chooses is framed")


def main(args) -> None:
    torch.set_num_threads(1)  # threads cost more than they gain on networks this small
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    steps = (20 if args.quick else 600) if args.steps is None else args.steps
    trained, everything = captions(False), captions(False) + captions(True)
    held_out = np.array([(color, shape) in HELD_OUT for _, color, shape, _ in everything])
    if not 2 <= args.batch <= len(trained) or steps < 1:
        raise UserError(f"--batch {args.batch} --steps {steps}: a batch has 2 to {len(trained)}"
                        " captions, and there must be at least one step")

    print_losses_of_equal_vectors((8, args.batch))
    tokens = Tokenizer(length=16)([text_of(caption) for caption in everything])
    tests = [draw(caption, rng) for caption in everything]
    x, model, each = as_tensor(tests), CLIP(), 4 if args.quick else 30
    known = torch.stack([as_tensor([draw(caption, rng) for _ in range(each)])
                         for caption in trained])

    print(f"training on {len(known)} captions with {each} pictures each; the other"
          f" {held_out.sum()} captions are held out")
    losses = learn(model, tokens[:len(trained)], known, steps, args.batch)
    looks = watch_learning(losses, lambda: similarity(model, tokens, x), steps)
    print(f"the scale exp(logit_scale) went from {1 / 0.07:.2f} to"
          f" {model.logit_scale.exp():.2f}\n")
    print_retrieval(looks[0], looks[steps], held_out)

    words = np.stack([words_right(s, np.array(everything), held_out) for s in looks.values()])
    shares = ", ".join(f"{kind} for {share:.0%}" for kind, share in zip(KINDS, words[-1]))
    print(f"the caption that a held-out picture chooses has the right {shares} of them\n")
    shown = np.nonzero(held_out)[0][np.random.default_rng(3).permutation(held_out.sum())[:8]]
    page = cosines_page(tests, everything, shown, looks[0], looks[steps], steps)
    save(page, args.out / "contrastive.png")
    save(curves(words, list(looks)), args.out / "contrastive_words.png")


if __name__ == "__main__":
    run(main, __doc__, steps=dict(type=int, help="of training (default 600)"),
        batch=dict(type=int, default=64, help="pairs in a batch, 2 to 144 (default 64)"))
