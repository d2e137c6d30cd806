"""Chapter 5, conditions: class labels and sets of attributes in place of text.

    training    || eps - f(x + sigma eps, y, t) ||^2, where y need not be a text: cross-attention takes any vectors, one per class, or one
                per attribute, as many as apply. In place of the text encoder stands a table with a row per word, trained with the UNet
    not told    one row more: it pads the sets, and learns by words being left out in training       Ho & Salimans 2022, algorithm 1
    guidance    D = D(x, not told) + scale (D(x, told) - D(x, not told)), D the guess of the picture     their equation 6, w = scale - 1
The vectors of a set carry no place and attention sums over them, so their order means nothing. A label is a set of one: its weight is 1 at every
pixel and in every head, and so the same vector is added everywhere. Whether the condition acts at all, a falling loss does not tell: the lecture's
companion code (DiffusionFromScratch, StableDiff_toy_celebA.py) never fills in its table of CelebA attributes, all are 40, the padding, and it
trains. What tells is to train with shuffled labels as well: if that is no worse, the labels do nothing.

    python lecture/conditions.py
    python lecture/conditions.py --ask "large hollow"
"""
import argparse

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from draw import UserError, palette_of, run, save, sheet
from model import UNetConfig, UNetModel
from sampler import NUM_TIMESTEPS, denoiser, guided, q_sample, sample_dpmpp_2m, schedule, target

# The kinds of words, of each kind at most one in a set. Ids number the words through; the id after the last is "not told".
DIGITS = [list("0123456789")]
SHAPES = [["red", "green", "blue", "yellow"], ["circle", "square", "triangle"], ["small", "large"], ["filled", "hollow"]]
RGB = {"red": (215, 35, 35), "green": (25, 150, 60), "blue": (45, 85, 220), "yellow": (240, 190, 0)}
UNSEEN = "yellow triangle"  # no picture of one is trained on, only yellow others and other triangles
SCALES = [0, 0.5, 1, 2, 4, 8]
SIDE = 52  # of a picture on the sheet


# --- words and pictures ---

def spans(kinds: list[list[str]]) -> list[tuple[int, int]]:
    """Where the ids of each kind begin and end."""
    ends = np.cumsum([len(kind) for kind in kinds]).tolist()
    return list(zip([0, *ends], ends))


def ids_of(text: str, kinds: list[list[str]]) -> Tensor:
    """Words -> their ids (1, kinds), "not told" where no word of the kind is among them."""
    words, known = list(dict.fromkeys(text.lower().split())), sum(kinds, [])
    for word in words:
        if word not in known:
            raise UserError(f"{word!r} is no attribute this chapter draws; there are {', '.join(known)}")
    ids = []
    for kind in kinds:
        asked = [word for word in words if word in kind]
        if len(asked) > 1:
            raise UserError(f"{' and '.join(asked)} exclude each other: ask for at most one of {', '.join(kind)}")
        ids.append(known.index(asked[0]) if asked else len(known))
    return torch.tensor([ids])


def draw_digits(n: int, seed: int) -> tuple[Tensor, Tensor]:
    """n pictures (n, 1, 16, 16) in [-1, 1], the ten digits in turn, differing in place, size, weight and slant; their ids (n, 1)."""
    rng = np.random.default_rng(seed)
    fonts = [ImageFont.load_default(size) for size in range(40, 64, 4)]
    pages = []
    for i in range(n):
        page, s = Image.new("L", (64, 64), "white"), rng.uniform(-0.25, 0.25)
        place = tuple(32 + rng.uniform(-3, 3, 2))
        ImageDraw.Draw(page).text(place, str(i % 10), "black", fonts[rng.integers(6)], "mm", stroke_width=int(rng.integers(3)))
        pages.append(page.transform(page.size, Image.Transform.AFFINE, (1, s, -32 * s, 0, 1, 0), Image.Resampling.BILINEAR, fillcolor="white"))
    return pixels(pages), torch.arange(n)[:, None] % 10


def draw_shapes(n: int, seed: int, without: str = "") -> tuple[Tensor, Tensor]:
    """n pictures (n, 3, 16, 16) of one thing of each kind of word, at random, but never all words of `without`; their ids (n, 4)."""
    rng = np.random.default_rng(seed)
    pages, ids = [], []
    while len(pages) < n:
        words = [kind[rng.integers(len(kind))] for kind in SHAPES]
        if without and set(without.split()) <= set(words):
            continue
        color, shape, size, fill = words
        page, radius = Image.new("RGB", (64, 64), "white"), rng.uniform(14, 16) if size == "small" else rng.uniform(22, 24)
        place, paint = 32 + rng.uniform(-3, 3, 2), tuple(int(c) for c in np.clip(RGB[color] + rng.normal(0, 8, 3), 0, 255))
        style = {"fill": paint} if fill == "filled" else {"outline": paint, "width": 5}
        if shape == "circle":
            ImageDraw.Draw(page).ellipse((*(place - radius), *(place + radius)), **style)
        else:
            corners, reach = (4, 1.25) if shape == "square" else (3, 1.5)  # of the circle around it, for areas that are alike
            ImageDraw.Draw(page).regular_polygon((*place, radius * reach), corners, **style)
        pages.append(page)
        ids.append(ids_of(" ".join(words), SHAPES))
    return pixels(pages), torch.cat(ids)


def pixels(pages: list[Image.Image]) -> Tensor:
    """n pages -> (n, C, 16, 16) in [-1, 1]"""
    arrays = np.stack([np.array(page.resize((16, 16), Image.Resampling.BOX)) for page in pages])
    return torch.from_numpy(arrays.reshape(len(pages), 16, 16, -1)).permute(0, 3, 1, 2).float() / 127.5 - 1


def pictures(x: Tensor) -> list[Image.Image]:
    """(n, C, 16, 16) in [-1, 1] -> n pictures, enlarged"""
    arrays = (x * 127.5 + 127.5).round().byte().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    return [Image.fromarray(array).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for array in arrays]


# --- training and sampling ---

def leave_out(ids: Tensor, nothing: int) -> Tensor:
    """Ids (B, T), some no longer told: whole sets, for guidance, and single words, so that a set may be of any size."""
    lost = (torch.rand(len(ids), 1) < 0.1) | (torch.rand(ids.shape) < (0.15 if ids.shape[1] > 1 else 0))
    return torch.where(lost, nothing, ids)


def train(x: Tensor, ids: Tensor, kinds: list[list[str]], steps: int, batch: int = 32, lr: float = 4e-3) -> tuple[nn.ModuleDict, float]:
    """Pictures (n, C, H, W) and ids (n, T) -> a table of vectors with the UNet that looks into it, and the loss of the last quarter."""
    torch.manual_seed(0)
    x, nothing = F.pixel_unshuffle(x, 2), sum(map(len, kinds))  # squares of 2x2 pixels as channels: a quarter of the places
    unet = UNetConfig(x.shape[1], x.shape[1], 32, (1, 1), 1, transformer_depth=(0, 1), num_heads=(4, 4), context_dim=32, num_groups=8)
    net = nn.ModuleDict({"embed": nn.Embedding(nothing + 1, 32), "unet": UNetModel(unet)})
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), fused=True), []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 20, 2 * (steps - step) / steps)
        i = torch.randint(len(x), (batch,))
        t = (NUM_TIMESTEPS * ((torch.rand(()) + torch.arange(batch) / batch) % 1)).long()
        noise = torch.randn_like(x[i])
        with sdpa_kernel(SDPBackend.MATH):  # the fused CPU kernel's backward is slow
            v = net["unet"](q_sample(x[i], t, noise), t, net["embed"](leave_out(ids[i], nothing)))
        loss = F.mse_loss(v, target("v", x[i], t, noise))
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return net, float(np.mean(losses[-max(1, steps // 4):]))


@torch.no_grad()
def sample(net: nn.ModuleDict, ids: Tensor, scale: float, steps: int = 6, side: int = 16) -> Tensor:
    """A picture for each row of ids (n, T) -> (n, C, side, side), from the same noise whatever the scale."""
    sigmas = schedule("dpmpp_2m", steps)
    shape = (len(ids), net["unet"].cfg.in_channels, side // 2, side // 2)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * (sigmas[0] ** 2 + 1) ** 0.5
    x = []
    for start, part in zip(noise.split(100), ids.split(100)):
        told, not_told = net["embed"](part), net["embed"](torch.full_like(part, net["embed"].num_embeddings - 1))
        denoise = guided(denoiser(net["unet"], "v"), {"context": told}, {"context": not_told}, scale)
        *_, step = sample_dpmpp_2m(denoise, start, sigmas, None)
        x.append(step.x)
    return F.pixel_shuffle(torch.cat(x), 2).clamp(-1, 1)


# --- measuring, by a classifier that has seen drawn pictures only ---

def train_judge(x: Tensor, ids: Tensor, kinds: list[list[str]], steps: int) -> nn.Sequential:
    """Pictures (n, C, 16, 16) and ids (n, T) -> a network giving each word a score (n, words)."""
    torch.manual_seed(0)
    judge = nn.Sequential(nn.Conv2d(x.shape[1], 32, 5, 2, 2), nn.ReLU(), nn.Conv2d(32, 32, 5, 2, 2), nn.ReLU(), nn.Flatten(),
                          nn.Linear(512, sum(map(len, kinds))))
    optimizer = torch.optim.AdamW(judge.parameters(), 3e-3)
    for _ in range(steps):
        i = torch.randint(len(x), (128,))
        scores = judge(x[i] + 0.3 * torch.randn_like(x[i]))
        sum(F.cross_entropy(scores[:, a:b], ids[i, k] - a) for k, (a, b) in enumerate(spans(kinds))).backward()
        optimizer.step()
        optimizer.zero_grad()
    return judge


@torch.no_grad()
def accuracy(judge: nn.Module, x: Tensor, ids: Tensor, kinds: list[list[str]]) -> float:
    """The share of pictures (n, C, 16, 16) in which the judge finds every word of ids (n, T); what was not told may be anything."""
    scores = judge(x)
    found = torch.stack([scores[:, a:b].argmax(1) + a for a, b in spans(kinds)], dim=1)
    return ((found == ids) | (ids == scores.shape[1])).all(1).float().mean().item()


# --- the three experiments ---

def guidance_table(net: nn.ModuleDict, judge: nn.Module, drawn: Tensor, ids: Tensor) -> tuple[list[list[Image.Image]], list[str]]:
    """Digits as `ids` (n, 1) ask at every scale, and what the judge makes of them: ten of each in a row, the drawn ones first."""
    rows, names = [pictures(drawn[:10])], ["drawn by the script"]
    print("  guidance   right (standard error)   ink (drawn pictures: 1.00)")
    for scale in SCALES:
        made = sample(net, ids, scale)
        share = accuracy(judge, made, ids, DIGITS)
        error = (share * (1 - share) / len(ids)) ** 0.5
        print(f"  {scale:<8}  {share:6.1%} ({error:.1%})             {(1 - made).mean() / (1 - drawn).mean():.2f}", flush=True)
        rows.append(pictures(made[:10]))
        names.append(f"guidance {scale}: {share:.0%} right")
    return rows, names


def shuffle_test(judge: nn.Module, x: Tensor, ids: Tensor, asked: Tensor, steps: int) -> None:
    """The same training with three sets of labels: does the condition act?"""
    torch.manual_seed(0)
    print(f"do the labels act? {steps} steps with each of three sets of them, then {len(asked)} pictures at guidance 4; chance is 10%")
    print("  labels          loss   right")
    for name, labels in {"as drawn": ids, "shuffled": ids[torch.randperm(len(ids))], "all padding": torch.full_like(ids, 10)}.items():
        net, loss = train(x, labels, DIGITS, steps)
        print(f"  {name:<14} {loss:.3f}  {accuracy(judge, sample(net, asked, 4), asked, DIGITS):6.1%}", flush=True)


def sets_table(net: nn.ModuleDict, judge: nn.Module, texts: list[str], n: int) -> tuple[list[list[Image.Image]], list[str]]:
    """n pictures of each set of words at guidance 1 and 2: ten of the latter in a row, and how many have every word of the set."""
    rows, names = [], []
    print("  right at 1  at 2   set")
    for text in texts:
        ids = ids_of(text, SHAPES).expand(n, -1)
        plain, made = sample(net, ids, 1), sample(net, ids, 2)
        share, never = accuracy(judge, made, ids, SHAPES), " (never seen)" if set(UNSEEN.split()) <= set(text.split()) else ""
        if text:
            print(f"      {accuracy(judge, plain, ids, SHAPES):6.1%} {share:6.1%}  {text}{never}", flush=True)
        rows.append(pictures(made[:10]))
        names.append(f"{text}{never}: {share:.0%}" if text else "nothing told")
    return rows, names


def stack(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, flush right, each under its title."""
    width, y = max(page.width for _, page in parts), 0
    whole = Image.new("RGB", (width, sum(page.height + 28 for _, page in parts)), "white")
    for title, page in parts:
        ImageDraw.Draw(whole).text((width // 2, y + 6), title, "black", anchor="ma", font_size=14)
        whole.paste(page, (width - page.width, y + 28))
        y += page.height + 28
    return whole


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # with layers this small, a second thread that has to wait for a busy core makes a step several times slower
    ask = " ".join(dict.fromkeys(args.ask.lower().split()))
    ids_of(ask, SHAPES)  # said before minutes of training, not after
    steps, n, n_drawn, judging = (4, 10, 100, 4) if args.quick else (500, 300, 3000, 250)

    x, ids = draw_digits(n_drawn, seed=0)
    fresh, asked = draw_digits(n, seed=1)
    judge = train_judge(x, ids, DIGITS, judging)
    print(f"{n_drawn} pictures of digits drawn; the judge names {accuracy(judge, fresh, asked, DIGITS):.1%} of {n} others rightly", flush=True)
    net, loss = train(x, ids, DIGITS, steps)
    print(f"class labels: trained for {steps} steps, loss {loss:.3f}; {n} pictures at each scale, from the same noise")
    rows, names = guidance_table(net, judge, fresh, asked)
    shuffle_test(judge, x, ids, asked[:n * 2 // 3], max(1, steps // 4))

    x, ids = draw_shapes(n_drawn, seed=0, without=UNSEEN)
    judge = train_judge(*draw_shapes(n_drawn, seed=2), SHAPES, judging)  # it has to know what the network has never seen
    right = accuracy(judge, *draw_shapes(n, seed=1), SHAPES)
    print(f"{n_drawn} pictures of shapes drawn, none of a {UNSEEN}; the judge gets all four words of {right:.1%} of {n} others", flush=True)
    net, loss = train(x, ids, SHAPES, steps)
    print(f"attribute sets: trained for {steps} steps, loss {loss:.3f}; {n // 4} pictures of each set of words")
    texts = ["", "blue", "blue square", "small hollow blue square", "large filled yellow triangle", ask]
    more_rows, more_names = sets_table(net, judge, texts, n // 4)
    one, other = ids_of("small hollow blue square", SHAPES), ids_of("small hollow red square", SHAPES)
    made, turned, changed = (sample(net, some, 1) for some in (one, one.flip(1), other))
    print("small hollow blue square, its words in another order: "
          f"a pixel changes by {(made - turned).abs().max():.0e} at most; with red for blue: by {(made - changed).abs().max():.1f}")

    page = stack([("class labels: what was asked for (across), at several guidance scales (down)", sheet(rows, DIGITS[0], names, SIDE)),
                  ("sets of attributes: ten pictures of each, at guidance 2; what is not told is free", sheet(more_rows, (), more_names, SIDE))])
    save(page.quantize(palette=palette_of([page], 64), dither=Image.Dither.NONE), args.out / "conditions.png")


if __name__ == "__main__":
    run(main, __doc__, ask={"default": "small green", "help": "a set of attributes to draw as the last row (default: small green)"})
