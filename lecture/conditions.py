"""Chapter 5, conditions: class labels and sets of attributes in place of text.

    training    || eps - f(x + sigma eps, y, t) ||^2    y need not be a text: cross-attention takes
                                                        any vectors, one per class, or one for each
                                                        attribute of a set
    dropout     one more row of the table means         Ho & Salimans 2022, algorithm 1
                "not given"; some words of a set are
                replaced by it in training
    guidance    D = uncond + scale (cond - uncond)      their equation 6, w = scale - 1; D is the
                                                        guess of the picture
A table with one row per word takes the place of the text encoder and is trained with the UNet. The
vectors of a set have no position and attention sums over them, so their order has no effect. A
label is a set of one: its attention weight is 1 at every position and in every head, so the same
vector is added everywhere.

A falling loss does not show that the condition has any effect. The lecture's companion code
(DiffusionFromScratch, StableDiff_toy_celebA.py) never fills in its table of CelebA attributes: all
are 40, the padding, and it still trains. The test is to train with shuffled labels too: if the
result is no worse, the labels do nothing.

    python lecture/conditions.py
    python lecture/conditions.py --ask "large hollow"
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from draw import UserError, palette_of, run, save, sheet
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from model import UNetConfig, UNetModel
from sampler import (
    NUM_TIMESTEPS,
    NoiseSchedule,
    cfg,
    get_sigmas,
    make_denoiser,
    sample_dpmpp_2m,
)

# The kinds of words; a set has at most one word of each kind. Ids number the words through all
# kinds; the id after the last means "not given".
DIGITS = [list("0123456789")]
SHAPES = [["red", "green", "blue", "yellow"], ["circle", "square", "triangle"],
          ["small", "large"], ["filled", "hollow"]]
RGB = {"red": (215, 35, 35), "green": (25, 150, 60), "blue": (45, 85, 220),
       "yellow": (240, 190, 0)}
UNSEEN = "yellow triangle"  # in no training picture; other yellow shapes and triangles are
SCALES = [0, 0.5, 1, 2, 4, 8]
SIDE = 52  # of a picture on the sheet
SCHEDULE = NoiseSchedule("v")


# --- words and pictures ---

def spans(kinds: list[list[str]]) -> list[tuple[int, int]]:
    """The first id of each kind, and the one after its last."""
    ends = np.cumsum([len(kind) for kind in kinds]).tolist()
    return list(zip([0, *ends], ends))


def ids_of(text: str, kinds: list[list[str]]) -> Tensor:
    """Words -> their ids (1, kinds), "not given" for a kind without a word.

    Raises UserError for unknown words, and for two words of one kind.
    """
    words, known = list(dict.fromkeys(text.lower().split())), sum(kinds, [])
    for word in words:
        if word not in known:
            raise UserError(f"{word!r} is not an attribute: use {', '.join(known)}")
    ids = []
    for kind in kinds:
        asked = [word for word in words if word in kind]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} exclude each other: use at most one of"
                            f" {', '.join(kind)}")
        ids.append(known.index(asked[0]) if asked else len(known))
    return torch.tensor([ids])


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures (n, 1, 16, 16) in [-1, 1] of the ten digits in turn, and their ids (n, 1).

    They differ in position, size, weight and slant.
    """
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(40, 64, 4)]
    pages = []
    for i in range(n):
        page, s = Image.new("L", (64, 64), "white"), rng.uniform(-0.25, 0.25)
        center = tuple(32 + rng.uniform(-3, 3, 2))
        ImageDraw.Draw(page).text(center, str(i % 10), "black", fonts[rng.integers(6)], "mm",
                                  stroke_width=int(rng.integers(3)))
        slanted = page.transform(page.size, Image.Transform.AFFINE, (1, s, -32 * s, 0, 1, 0),
                                 Image.Resampling.BILINEAR, fillcolor="white")
        pages.append(slanted)
    return pixels(pages), torch.arange(n)[:, None] % 10


def draw_shapes(n: int, seed: int, without: str = "") -> tuple[Tensor, Tensor]:
    """n pictures (n, 3, 16, 16) of random shapes, and their ids (n, 4), one word of each kind.

    No picture has all words of `without`.
    """
    rng = np.random.default_rng(seed)
    pages, ids = [], []
    while len(pages) < n:
        words = [kind[rng.integers(len(kind))] for kind in SHAPES]
        if without and set(without.split()) <= set(words):
            continue
        pages.append(draw_shape(words, rng))
        ids.append(ids_of(" ".join(words), SHAPES))
    return pixels(pages), torch.cat(ids)


def draw_shape(words: list[str], rng: np.random.Generator) -> Image.Image:
    color, shape, size, fill = words
    radius = rng.uniform(14, 16) if size == "small" else rng.uniform(22, 24)
    center = 32 + rng.uniform(-3, 3, 2)
    paint = tuple(int(c) for c in np.clip(RGB[color] + rng.normal(0, 8, 3), 0, 255))
    style = {"fill": paint} if fill == "filled" else {"outline": paint, "width": 5}
    page = Image.new("RGB", (64, 64), "white")
    pen = ImageDraw.Draw(page)
    if shape == "circle":
        pen.ellipse((*(center - radius), *(center + radius)), **style)
    else:
        # the radius of the circle around it is larger, so that the areas are similar
        corners, reach = (4, 1.25) if shape == "square" else (3, 1.5)
        pen.regular_polygon((*center, radius * reach), corners, **style)
    return page


def pixels(pages: list[Image.Image]) -> Tensor:
    """n pages -> (n, C, 16, 16) in [-1, 1]."""
    arrays = np.stack([np.array(page.resize((16, 16), Image.Resampling.BOX)) for page in pages])
    x = torch.from_numpy(arrays.reshape(len(pages), 16, 16, -1))
    return x.permute(0, 3, 1, 2).float() / 127.5 - 1                    # 'n h w c -> n c h w'


def pictures(x: Tensor) -> list[Image.Image]:
    """(n, C, 16, 16) in [-1, 1] -> n enlarged pictures."""
    arrays = (x * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return [Image.fromarray(a).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for a in arrays]


# --- training and sampling ---

def drop_words(ids: Tensor, not_given: int) -> Tensor:
    """Ids (B, T), some replaced by `not_given`: 10% of the sets for guidance, and single words.

    Single words are dropped so that sets of any size are learned.
    """
    single = 0.15 if ids.shape[1] > 1 else 0
    dropped = (torch.rand(len(ids), 1) < 0.1) | (torch.rand(ids.shape) < single)
    return torch.where(dropped, not_given, ids)


def train(x: Tensor, ids: Tensor, kinds: list[list[str]], steps: int, batch: int = 32,
          lr: float = 4e-3) -> tuple[nn.ModuleDict, float]:
    """Pictures (n, C, H, W) and ids (n, T) -> a table of vectors, its UNet, and the final loss.

    The loss is the mean of the last quarter of the steps.
    """
    torch.manual_seed(0)
    x = F.pixel_unshuffle(x, 2)  # 2x2 pixels become channels: a quarter of the positions
    not_given = sum(map(len, kinds))
    config = UNetConfig(x.shape[1], x.shape[1], 32, (1, 1), 1, transformer_depth=(0, 1),
                        num_heads=(4, 4), context_dim=32, num_groups=8)
    net = nn.ModuleDict({"embed": nn.Embedding(not_given + 1, 32), "unet": UNetModel(config)})
    optimizer = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), fused=True)
    losses = []
    for step in range(steps):
        rate = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        optimizer.param_groups[0]["lr"] = rate
        i = torch.randint(len(x), (batch,))
        u = (torch.rand(()) + torch.arange(batch) / batch) % 1  # evenly spread over the batch
        t, noise = (NUM_TIMESTEPS * u).long(), torch.randn_like(x[i])
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel's backward is slow
            context = net["embed"](drop_words(ids[i], not_given))
            v = net["unet"](SCHEDULE.q_sample(x[i], t, noise), t, context)
        loss = F.mse_loss(v, SCHEDULE.target(x[i], t, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return net, float(np.mean(losses[-max(1, steps // 4):]))


@torch.no_grad()
def sample(net: nn.ModuleDict, ids: Tensor, scale: float, steps: int = 6,
           side: int = 16) -> Tensor:
    """A picture per row of ids (n, T) -> (n, C, side, side). Every scale has the same noise."""
    sigmas = get_sigmas("dpmpp_2m", steps, SCHEDULE)
    shape = (len(ids), net["unet"].config.in_channels, side // 2, side // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    start = noise * (sigmas[0] ** 2 + 1) ** 0.5
    not_given = net["embed"].num_embeddings - 1
    x = []
    for part, some in zip(start.split(100), ids.split(100)):
        cond = {"context": net["embed"](some)}
        uncond = {"context": net["embed"](torch.full_like(some, not_given))}
        denoise = cfg(make_denoiser(net["unet"], SCHEDULE), cond, uncond, scale)
        *_, step = sample_dpmpp_2m(denoise, part, sigmas, noise=None)
        x.append(step.x)
    return F.pixel_shuffle(torch.cat(x), 2).clamp(-1, 1)


# --- measuring, by a classifier that is trained on drawn pictures only ---

def train_judge(x: Tensor, ids: Tensor, kinds: list[list[str]], steps: int) -> nn.Sequential:
    """Pictures (n, C, 16, 16) and ids (n, T) -> a network that scores the words: (n, words)."""
    torch.manual_seed(0)
    judge = nn.Sequential(
        nn.Conv2d(x.shape[1], 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 32, 5, 2, 2), nn.ReLU(),
        nn.Flatten(), nn.Linear(512, sum(map(len, kinds))))
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (128,))
        scores = judge(x[i] + 0.3 * torch.randn_like(x[i]))
        losses = [F.cross_entropy(scores[:, a:b], ids[i, k] - a)
                  for k, (a, b) in enumerate(spans(kinds))]
        sum(losses).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge


@torch.no_grad()
def accuracy(judge: nn.Module, x: Tensor, ids: Tensor, kinds: list[list[str]]) -> float:
    """The share of pictures (n, C, 16, 16) in which the judge finds every word of ids (n, T).

    For a word that is not given, anything is right.
    """
    scores = judge(x)
    found = torch.stack([scores[:, a:b].argmax(1) + a for a, b in spans(kinds)], dim=1)
    return ((found == ids) | (ids == scores.shape[1])).all(1).float().mean().item()


# --- the three experiments ---

Rows = tuple[list[list[Image.Image]], list[str]]  # rows of pictures, and their titles


def guidance_table(net: nn.ModuleDict, judge: nn.Module, drawn: Tensor, ids: Tensor) -> Rows:
    """The digits of `ids` (n, 1) at every scale, as the judge sees them.

    Returns ten pictures per row, the drawn ones first.
    """
    rows, titles = [pictures(drawn[:10])], ["drawn by the script"]
    print("  guidance   right (standard error)   ink (drawn pictures: 1.00)")
    for scale in SCALES:
        made = sample(net, ids, scale)
        share = accuracy(judge, made, ids, DIGITS)
        error = (share * (1 - share) / len(ids)) ** 0.5
        ink = (1 - made).mean() / (1 - drawn).mean()
        print(f"  {scale:<8}  {share:6.1%} ({error:.1%})             {ink:.2f}", flush=True)
        rows.append(pictures(made[:10]))
        titles.append(f"guidance {scale}: {share:.0%} right")
    return rows, titles


def shuffle_test(judge: nn.Module, x: Tensor, ids: Tensor, asked: Tensor, steps: int) -> None:
    """The same training with three sets of labels: has the condition an effect?"""
    torch.manual_seed(0)
    print(f"have the labels an effect? {steps} steps with each of three sets of labels, then"
          f" {len(asked)} pictures at guidance 4; chance is 10%")
    print("  labels          loss   right")
    label_sets = {"as drawn": ids, "shuffled": ids[torch.randperm(len(ids))],
                  "all padding": torch.full_like(ids, 10)}
    for name, labels in label_sets.items():
        net, loss = train(x, labels, DIGITS, steps)
        share = accuracy(judge, sample(net, asked, 4), asked, DIGITS)
        print(f"  {name:<14} {loss:.3f}  {share:6.1%}", flush=True)


def sets_table(net: nn.ModuleDict, judge: nn.Module, texts: list[str], n: int) -> Rows:
    """n pictures of each set of words at guidance 1 and 2, and how many have every word.

    Returns ten pictures per row, at guidance 2.
    """
    rows, titles = [], []
    print("  right at 1  at 2   set")
    for text in texts:
        ids = ids_of(text, SHAPES).expand(n, -1)
        plain, made = sample(net, ids, 1), sample(net, ids, 2)
        share = accuracy(judge, made, ids, SHAPES)
        never = " (never seen)" if set(UNSEEN.split()) <= set(text.split()) else ""
        if text:
            at_1 = accuracy(judge, plain, ids, SHAPES)
            print(f"      {at_1:6.1%} {share:6.1%}  {text}{never}", flush=True)
        rows.append(pictures(made[:10]))
        titles.append(f"{text}{never}: {share:.0%}" if text else "no words")
    return rows, titles


def label_experiment(n: int, n_drawn: int, steps: int, judge_steps: int) -> Rows:
    """Class labels: what guidance does, and whether the labels have an effect."""
    x, ids = draw_digits(n_drawn, seed=0)
    fresh, asked = draw_digits(n, seed=1)
    judge = train_judge(x, ids, DIGITS, judge_steps)
    print(f"{n_drawn} pictures of digits drawn; the judge recognises"
          f" {accuracy(judge, fresh, asked, DIGITS):.1%} of {n} others", flush=True)
    net, loss = train(x, ids, DIGITS, steps)
    print(f"class labels: trained for {steps} steps, loss {loss:.3f}; {n} pictures at each scale,"
          " from the same noise")
    table = guidance_table(net, judge, fresh, asked)
    shuffle_test(judge, x, ids, asked[:n * 2 // 3], max(1, steps // 4))
    return table


def set_experiment(ask: str, n: int, n_drawn: int, steps: int, judge_steps: int) -> Rows:
    """Sets of attributes: any number of words, a combination never seen, any order."""
    x, ids = draw_shapes(n_drawn, seed=0, without=UNSEEN)
    # the judge must know what the network has never seen
    judge = train_judge(*draw_shapes(n_drawn, seed=2), SHAPES, judge_steps)
    right = accuracy(judge, *draw_shapes(n, seed=1), SHAPES)
    print(f"{n_drawn} pictures of shapes drawn, none of a {UNSEEN}; the judge finds all four words"
          f" of {right:.1%} of {n} others", flush=True)
    net, loss = train(x, ids, SHAPES, steps)
    print(f"attribute sets: trained for {steps} steps, loss {loss:.3f}; {n // 4} pictures of each"
          " set of words")
    texts = ["", "blue", "blue square", "small hollow blue square", "large filled yellow triangle",
             ask]
    table = sets_table(net, judge, texts, n // 4)
    one = ids_of("small hollow blue square", SHAPES)
    other = ids_of("small hollow red square", SHAPES)
    made, reordered, changed = (sample(net, some, 1) for some in (one, one.flip(1), other))
    print("small hollow blue square, its words in another order: a pixel changes by"
          f" {(made - reordered).abs().max():.0e} at most; with red for blue: by"
          f" {(made - changed).abs().max():.1f}")
    return table


def stack(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, aligned at the right, each under its title."""
    width, y = max(page.width for _, page in parts), 0
    whole = Image.new("RGB", (width, sum(page.height + 28 for _, page in parts)), "white")
    for title, page in parts:
        ImageDraw.Draw(whole).text((width // 2, y + 6), title, "black", anchor="ma", font_size=14)
        whole.paste(page, (width - page.width, y + 28))
        y += page.height + 28
    return whole


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # layers this small get slower with a second thread on a busy CPU
    ask = " ".join(dict.fromkeys(args.ask.lower().split()))
    ids_of(ask, SHAPES)  # an error comes before minutes of training
    steps, n, n_drawn, judge_steps = (4, 10, 100, 4) if args.quick else (500, 300, 3000, 250)
    rows, titles = label_experiment(n, n_drawn, steps, judge_steps)
    set_rows, set_titles = set_experiment(ask, n, n_drawn, steps, judge_steps)
    page = stack([
        ("class labels: the digit asked for (across), at several guidance scales (down)",
         sheet(rows, DIGITS[0], titles, SIDE)),
        ("sets of attributes: ten pictures of each at guidance 2; kinds not given are free",
         sheet(set_rows, (), set_titles, SIDE))])
    page = page.quantize(palette=palette_of([page], 64), dither=Image.Dither.NONE)
    save(page, args.out / "conditions.png")


if __name__ == "__main__":
    run(main, __doc__, ask={
        "default": "small green",
        "help": "a set of attributes to draw as the last row (default: small green)"})
