"""Chapter 4, attention: from a dictionary to soft indexing, and where a picture used each word.

A dictionary returns the one value whose key equals the query: a one-hot choice. Attention returns a
mixture of all values, such as .8, .1 and .1 of them, weighted by how well their keys match (Vaswani
et al. 2017, equation 1):
    attention(q, k, v) = a v,   a = softmax(q k^T / sqrt(d))      the slide has d without the root:
                                                                  `scale` shows why it matters
Queries come from the positions of the picture, q = W_q x. In cross-attention keys and values come
from the vectors e of the tokens, k = W_k e and v = W_v e; in self-attention e = x (Rombach et al.
2022, section 3.3). Row i of the matrix a says which tokens position i uses. A column of it, laid
out as a picture, is the heat map of a token (Hertz et al. 2022, prompt-to-prompt; Tang et al. 2022,
DAAM).

Such maps lie on the things that the words name. In the built-in model this is clearest in the last
layer, which has 8x8 positions. The printed numbers say how far, on average, attention to a word is
higher where something is drawn. attention.html is a page to play with: point at a word, pick a
layer and a step.

    python lecture/attention.py --word blue heart red apple
    python lecture/attention.py --prompt "three stars on a blue background" --word three stars blue
    python lecture/attention.py --ckpt v1-5-pruned-emaonly.safetensors \\
        --prompt "a cat on a red sofa" --word cat red sofa
"""
import math
from argparse import Namespace

import numpy as np
import torch
from draw import heat, palette_of, run, save, sheet
from PIL import Image, ImageDraw
from process import condition, distance, noise_of, walk
from torch import Tensor

from extras.attention_maps import AttentionStore, capture_attention, chosen_words
from extras.report import report
from model import CrossAttention, UNetConfig, attention, attention_probs
from sd import StableDiffusion

Matrices = dict[str, Tensor]     # the matrix (positions, 77) of each layer, by its name
Columns = dict[str, list[int]]   # the columns of each word


# --- the mechanism, on numbers ---

def look_up(keys: Tensor, values: Tensor, entry: int, strength: float) -> tuple[Tensor, Tensor]:
    """Ask a dictionary of keys (n, d) and values (n, c) for one entry.

    Returns the mixed value (c,) and the weights (n,).
    """
    query = strength * keys.shape[1] ** 0.5 * keys[entry]
    q, k, v = query[None, None, None], keys[None, None], values[None, None]
    return attention(q, k, v).flatten(), attention_probs(q, k).flatten()


def dictionary() -> None:
    """The stronger the query, the harder the choice. In the limit it is an exact dictionary."""
    keys = torch.eye(3)
    values = torch.tensor([[255.0, 165.0, 0.0], [90.0, 60.0, 40.0], [20.0, 90.0, 255.0]])
    print("A dictionary of colours: cat 255 165 0, dog 90 60 40, sea 20 90 255. Asked for the"
          " cat's, by queries of different strength:")
    for strength in 0.0, 1.0, math.log(8), 4.0, 1000.0:
        value, a = look_up(keys, values, 0, strength)
        weights = " ".join(f"{w:.3f}" for w in a)
        colour = " ".join(f"{c:5.1f}" for c in value)
        print(f"  strength {strength:7.2f}: weights {weights} -> colour {colour}")
    print("  At log 8 the weights are the slide's .8 .1 .1; at 1000 the answer is the cat's row"
          f" itself: {torch.equal(value, values[0])}.")


def scale(draws: int) -> None:
    """q.k sums d products: for numbers of variance 1 its variance is d.

    Without a scale a wider head would choose harder.
    """
    print("\nWhy / sqrt(d): random queries and 77 random keys of SD 1.x's head sizes. How many of"
          " the 77 does a query use (exp of the entropy of a)?")
    for d in 40, 80, 160:
        scores = torch.einsum("nd,nsd->ns", torch.randn(draws, d), torch.randn(draws, 77, d))
        used = []
        for factor in 1, d**-0.5, 1 / d:
            a = (scores * factor).softmax(-1)
            used.append(torch.special.entr(a).sum(-1).exp().mean())
        print(f"  d {d:3}, 1 / sqrt(d) = {d**-0.5:.4f}, q.k spread {scores.std():5.2f}:"
              f" {used[0]:.1f} unscaled, {used[1]:.1f} with / sqrt(d),"
              f" {used[2]:.1f} with the slide's / d")


def by_einsum(layer: CrossAttention, x: Tensor,
              context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the layer computes, with every axis named; and its matrix a (b, h, t, s).

    batch b, head h, position t, token s, head size d, width c
    """
    context = x if context is None else context
    w_q, w_k, w_v = (proj.weight.unflatten(0, (layer.heads, -1))    # '(h d) c -> h d c'
                     for proj in (layer.to_q, layer.to_k, layer.to_v))
    q = torch.einsum("btc,hdc->bhtd", x, w_q)
    k = torch.einsum("bsc,hdc->bhsd", context, w_k)
    v = torch.einsum("bsc,hdc->bhsd", context, w_v)
    a = (torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.to_out(torch.einsum("bhts,bhsd->bthd", a, v).flatten(2)), a


@torch.no_grad()
def layers() -> None:
    """SD 1.x's layers, fused and written out. Cross-attention to itself is self-attention."""
    print("\nSD 1.x's layers, 8 heads, random weights, 2 x 64 positions; model.py's fused kernel"
          " beside torch.einsum:")
    cfg = UNetConfig()
    for width in 320, 640, 1280:
        x, text = torch.randn(2, 64, width), torch.randn(2, 77, 768)
        kinds = [("cross", CrossAttention(width, 768, 8, cfg), text),
                 ("self", CrossAttention(width, width, 8, cfg), None)]
        for kind, layer, context in kinds:
            fused, (slow, a) = layer(x, context), by_einsum(layer, x, context)
            print(f"  {kind:5} {width:4}: a {tuple(a.shape)}, W_k {layer.to_k.weight.numel():9,}"
                  f" numbers, largest difference {(fused - slow).abs().max():.0e}")
    print("  Self-attention is cross-attention to x: layer(x) equals layer(x, context=x):"
          f" {torch.equal(layer(x), layer(x, x))}.")


# --- the matrices of a generation ---

def look(sd: StableDiffusion, prompt: str,
         **options) -> tuple[Image.Image, AttentionStore, Matrices]:
    """Draw the prompt: the picture, its attention maps, and the matrices of the last step.

    A matrix (positions, 77) is the mean over the heads of its layer.
    """
    store = AttentionStore()
    with capture_attention(sd.unet, store):
        image = sd.generate(prompt, callback=store.step, **options)[0]
    # cfg puts the prompt's rows of the batch last
    matrices = {name: torch.cat(parts)[-1].cpu() for name, parts in store.captured.items()}
    return image, store, matrices


def columns(sd: StableDiffusion, prompt: str, wanted: list[str] | None = None) -> Columns:
    """The columns of each word, or of the wanted ones, and of start, end and padding up to 77.

    Raises UserError for a wanted word that the prompt lacks.
    """
    tokenizer, found = sd.text_encoders[0].tokenizer, {}
    for word in chosen_words(tokenizer, prompt, wanted):
        found.setdefault(word.text, []).extend(word.tokens)
    end = 1 + min(len(tokenizer.tokenize(prompt)), tokenizer.length - 2)
    rest = {"<start>": [0], "<end>": [end], "<padding>": list(range(end + 1, tokenizer.length))}
    return found | {name: places for name, places in rest.items() if places}


def drawn_positions(image: Image.Image, h: int, w: int) -> Tensor:
    """Which of h x w positions differ in colour from the picture's border: bool (h, w)."""
    small = image.convert("RGB").resize((w, h), Image.Resampling.BOX)
    a = np.asarray(small, dtype=float)
    border = np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]), axis=0)
    return torch.from_numpy(np.abs(a - border).max(-1) > 32)


def print_shares(image: Image.Image, mean: Tensor, matrices: Matrices, places: Columns) -> None:
    """The attention that each column of the mean map (77, h, w) gets, and where it gets more."""
    positions = ", ".join(f"{short(name)} {len(a)}" for name, a in matrices.items())
    print(f"\nPositions per layer: {positions}. A map has that many numbers; finer detail is"
          " interpolated.")
    print("  word         of the attention, from ... to    on what is drawn / beside it")
    drawn = drawn_positions(image, *mean.shape[1:])
    shares = {name: mean[where].sum(0) for name, where in places.items()}
    for name, share in shares.items():
        ratio = share[drawn].mean() / share[~drawn].mean()
        print(f"  {name:16}{share.mean():6.1%} {share.min():13.1%} ... {share.max():5.1%}"
              f" {ratio:15.2f}")
    words = [share.flatten() for name, share in shares.items() if not name.startswith("<")]
    if len(words) > 1:
        pairs = torch.triu_indices(len(words), len(words), 1)
        similar = torch.corrcoef(torch.stack(words))[*pairs]
        print(f"  The maps of the words correlate by {similar.mean():.2f} with each other, on"
              " average. At 1 all would be one map.")


# --- pictures ---

def maps_picture(image: Image.Image, store: AttentionStore, matrices: Matrices,
                 places: Columns) -> Image.Image:
    """Maps over the picture, a column per word: the mean of all layers, then up to five layers."""
    some = np.linspace(0, len(store.layers) - 1, min(5, len(store.layers))).round().astype(int)
    names = [list(store.layers)[i] for i in some]
    side = min(110, 740 // (len(places) + 1))
    rows = []
    for layer in (store.mean(), *(store.layers[name] for name in names)):
        maps = [overlay(image, layer[0, where].sum(0), side) for where in places.values()]
        rows.append([image.resize((side, side)), *maps])
    titles = ["all layers", *(f"{short(name)} ({len(matrices[name])})" for name in names)]
    return sheet(rows, ["picture", *places], titles, side)


def overlay(image: Image.Image, share: Tensor, side: int) -> Image.Image:
    """A map in colours over the picture in gray.

    The colours are stretched from its lowest value to its highest, however near, so both are
    written on it.
    """
    gray, colors = (p.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
                    for p in (image.convert("L"), heat(share.numpy())))
    page = Image.blend(gray, colors, 0.6)
    ImageDraw.Draw(page).text(
        (side // 2, side - 2), f"{share.min():.1%} to {share.max():.1%}", "black", anchor="md",
        font_size=10, stroke_width=2, stroke_fill="white")
    return page


def matrix_picture(a: Tensor, tokens: list[str]) -> Image.Image:
    """The matrix a (positions, 77) itself; above the columns the tokens before the padding."""
    cell, tall, left, top = 11, max(2, min(11, 300 // len(a))), 30, 62
    size = (cell * a.shape[1], tall * len(a))
    page = Image.new("RGB", (left + size[0], top + size[1]), "white")
    page.paste(heat(a.numpy(), low=0).resize(size, Image.Resampling.NEAREST), (left, top))
    pen = ImageDraw.Draw(page)
    for j, token in enumerate(tokens):
        strip = Image.new("RGB", (56, cell), "white")
        ImageDraw.Draw(strip).text((0, cell // 2), token[:10], "black", anchor="lm", font_size=10)
        page.paste(strip.rotate(90, expand=True), (left + cell * j, top - 58))
    if len(tokens) < 60:
        x = left + cell * len(tokens) + 6
        pen.text((x, top - 14), "padding ...", "black", font_size=10)
    for i in range(0, len(a), max(1, len(a) // 4)):
        pen.text((left - 4, top + tall * i), str(i), "black", anchor="ra", font_size=10)
    return page


def short(name: str) -> str:
    """input_blocks.3.1.transformer_blocks.0.attn2 -> input 3"""
    part, number = name.split(".")[:2]
    return "middle" if part == "middle_block" else f"{part.split('_')[0]} {number}"


def pooled(sd: StableDiffusion, prompt: str, other: str, seed: int, steps: int) -> Image.Image:
    """For a model that also gets the text as one pooled vector: which of the two does it follow?"""
    pictures, guidance = [], sd.preset.guidance
    for text, vector in (prompt, prompt), (prompt, other), (other, prompt), (other, other):
        cond, uncond = condition(sd, text)
        cond["y"] = condition(sd, vector)[0]["y"]
        *_, last = walk(sd, cond, uncond, guidance, noise_of(sd, seed), steps)
        pictures += sd.decode_latents(last.x)
    print("\nThis model gets the text twice: as a vector per token, for attention, and as one"
          " pooled vector beside the time. Which does it follow?")
    for what, picture in ("token vectors", pictures[1]), ("pooled vector", pictures[2]):
        print(f'  "{prompt}" in the {what} only, "{other}" in the other:'
              f' {distance(picture, pictures[0]):.0f} gray levels from the picture of "{prompt}",'
              f' {distance(picture, pictures[3]):.0f} from that of "{other}"')
    titles = [f"A = {prompt}", "the tokens of A, the vector of B",
              "the vector of A, the tokens of B", f"B = {other}"]
    return sheet([pictures], titles, side=200)


def attention_page(sd: StableDiffusion, prompt: str, image: Image.Image, store: AttentionStore,
                   matrices: Matrices, places: Columns) -> Image.Image:
    """The maps of the words, and one matrix."""
    rows = max(256, min(map(len, matrices.values())))  # more do not fit on a page
    name = [name for name, a in matrices.items() if len(a) <= rows][-1]
    pieces = [token.text for token in sd.text_encoders[0].tokenizer.tokenize(prompt)[:75]]
    tokens = ["start", *(piece.removesuffix("</w>") for piece in pieces), "end"]
    parts = {
        f'"{prompt}": where the picture uses each word: dark least, light most, as written below;'
        " in layers with this many (positions)":
            maps_picture(image, store, matrices, places),
        f"One matrix, of {short(name)} in the last step: a row per position, a column per token;"
        f" rows sum to 1, light is {matrices[name].max():.2f}":
            matrix_picture(matrices[name], tokens)}
    size = (max(part.width for part in parts.values()),
            sum(part.height + 30 for part in parts.values()))
    page, y = Image.new("RGB", size, "white"), 0
    for title, part in parts.items():
        ImageDraw.Draw(page).text((4, y + 6), title, "black", font_size=13)
        page.paste(part, (0, y + 26))
        y += part.height + 30
    return page.quantize(palette=palette_of([page], 200), dither=Image.Dither.NONE)


def main(args: Namespace) -> None:
    torch.manual_seed(0)
    sd = StableDiffusion.load(args.ckpt)
    places = columns(sd, args.prompt, args.word)
    dictionary()
    scale(100 if args.quick else 1000)
    layers()

    steps = 3 if args.quick else sd.preset.steps
    image, store, matrices = look(sd, args.prompt, steps=steps, seed=args.seed)
    print_shares(image, store.mean()[0], matrices, places)
    page = attention_page(sd, args.prompt, image, store, matrices, places)
    save(page, args.out / "attention.png")
    if sd.preset.unet.adm_in_channels is not None:
        page = pooled(sd, args.prompt, args.other, args.seed, steps)
        save(page, args.out / "attention-pooled.png")
    path = args.out / "attention.html"
    report(sd, path, args.prompt, seed=args.seed, text=__doc__, ckpt=args.ckpt, steps=steps)
    print(f"wrote {path}")


if __name__ == "__main__":
    run(main, __doc__,
        ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"},
        prompt={"default": "a blue heart next to a red apple"},
        word={"nargs": "+", "help": "words of the prompt; default: all"},
        seed={"type": int, "default": 0},
        other={"default": "a rocket",
               "help": "a second prompt, for a model that also gets a pooled vector"})
