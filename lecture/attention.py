"""Chapter 4, attention: from a dictionary to soft indexing, and which words the positions of a picture look at.

The lecture: a dictionary returns the one value whose key equals the query, a one-hot choice; attention returns all values mixed,
say .8, .1 and .1 of them, by how well their keys match (Vaswani et al. 2017, equation 1):
    attention(q, k, v) = a v,   a = softmax(q k^T / sqrt(d))             the slide lost the root: `scale` shows what it is for
Queries come from the positions of the picture, q = W_q x. In cross-attention keys and values come from the words' vectors e,
k = W_k e and v = W_v e; in self-attention e = x (Rombach et al. 2022, section 3.3). Row i of the matrix a says what position i looks
at; a column of it, laid out as a picture, is a word's heat map (Hertz et al. 2022, prompt-to-prompt; Tang et al. 2022, DAAM).
Such maps fall on the things the words name: in the built-in model most plainly those of its last layer, which has 8x8 positions. What the
others show is where they look; the numbers printed say how far, on average, that is where something is drawn.

    python lecture/attention.py --word blue heart red apple
    python lecture/attention.py --prompt "three stars on a blue background" --word three stars blue
    python lecture/attention.py --ckpt v1-5-pruned-emaonly.safetensors --prompt "a cat on a red sofa" --word cat red sofa
"""
import math
from argparse import Namespace

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from draw import heat, palette_of, run, save, sheet
from heatmaps import HeatMaps, chosen_words
from model import CrossAttention, attention, watching
from process import distance, noise_of, told, walk
from sd import StableDiffusion


# --- the mechanism, on numbers ---

def look_up(keys: Tensor, values: Tensor, entry: int, strength: float) -> tuple[Tensor, Tensor]:
    """Ask a dictionary of keys (n, d) and values (n, c) for one entry -> the mixed value (c,) and the weights (n,)."""
    query = strength * keys.shape[1] ** 0.5 * keys[entry]
    value, a = attention(query[None, None, None], keys[None, None], values[None, None], return_weights=True)
    return value.flatten(), a.flatten()


def dictionary() -> None:
    """The louder the query, the harder the choice; at the end it is a dictionary, exact to the last bit."""
    keys, values = torch.eye(3), torch.tensor([[255.0, 165.0, 0.0], [90.0, 60.0, 40.0], [20.0, 90.0, 255.0]])
    print("A dictionary of colours: cat 255 165 0, dog 90 60 40, sea 20 90 255. Asked for the cat's, in queries of different strength:")
    for strength in 0.0, 1.0, math.log(8), 4.0, 1000.0:
        value, a = look_up(keys, values, 0, strength)
        print(f"  strength {strength:7.2f}: weights {' '.join(f'{w:.3f}' for w in a)} -> colour {' '.join(f'{c:5.1f}' for c in value)}")
    print(f"  At log 8 the weights are the slide's .8 .1 .1; at 1000 the answer is the cat's row itself: {torch.equal(value, values[0])}.")


def scale(draws: int) -> None:
    """q.k sums d products: with numbers of variance 1 its variance is d. Unscaled, a wider head would choose harder."""
    print("\nWhy / sqrt(d): random queries and 77 random keys of SD 1.x's head sizes. At how many of the 77 does a query look (exp of the entropy of a)?")
    for d in 40, 80, 160:
        scores = torch.einsum("nd,nsd->ns", torch.randn(draws, d), torch.randn(draws, 77, d))
        looks = [torch.special.entr((scores * s).softmax(-1)).sum(-1).exp().mean() for s in (1, d**-0.5, 1 / d)]
        print(f"  d {d:3}, 1 / sqrt(d) = {d**-0.5:.4f}, q.k spread {scores.std():5.2f}: at {looks[0]:.1f} unscaled, at {looks[1]:.1f} with / sqrt(d), "
              f"at {looks[2]:.1f} with the slide's / d")


def by_einsum(layer: CrossAttention, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What the layer computes, every axis named: batch b, head h, position t, word s, head size d, width c. Also its matrix a (b, h, t, s)."""
    context = x if context is None else context
    W_q, W_k, W_v = (proj.weight.unflatten(0, (layer.heads, -1)) for proj in (layer.to_q, layer.to_k, layer.to_v))  # '(h d) c -> h d c'
    q = torch.einsum("btc,hdc->bhtd", x, W_q)
    k = torch.einsum("bsc,hdc->bhsd", context, W_k)
    v = torch.einsum("bsc,hdc->bhsd", context, W_v)
    a = (torch.einsum("bhtd,bhsd->bhts", q, k) / q.shape[-1] ** 0.5).softmax(-1)
    return layer.to_out(torch.einsum("bhts,bhsd->bthd", a, v).flatten(2)), a


@torch.no_grad()
def layers() -> None:
    """SD 1.x's layers, fast and written out; cross-attention to itself is self-attention."""
    print("\nSD 1.x's layers, 8 heads, random weights, 2 x 64 positions; model.py's fused kernel beside torch.einsum:")
    for width in 320, 640, 1280:
        x, words = torch.randn(2, 64, width), torch.randn(2, 77, 768)
        for kind, layer, context in ("cross", CrossAttention(width, 768, 8), words), ("self", CrossAttention(width, width, 8), None):
            fast, (slow, a) = layer(x, context), by_einsum(layer, x, context)
            print(f"  {kind:5} {width:4}: a {tuple(a.shape)}, W_k {layer.to_k.weight.numel():9,} numbers, largest difference {(fast - slow).abs().max():.0e}")
    print(f"  Self-attention is cross-attention to x: layer(x) equals layer(x, context=x): {torch.equal(layer(x), layer(x, x))}.")


# --- the matrices of a generation ---

def look(sd: StableDiffusion, prompt: str, **settings) -> tuple[Image.Image, HeatMaps, dict[str, Tensor]]:
    """Draw the prompt: the picture, its heat maps, and each layer's matrix (positions, 77) in the last step, heads averaged."""
    maps, matrices = HeatMaps(), {}

    def watch(name: str, a: Tensor) -> None:
        maps.watch(name, a)
        matrices[name] = a[-1].mean(0)  # guidance puts the prompt's half of the batch last

    with watching(sd.unet, watch):
        image = sd.generate(prompt, callback=maps.step, **settings)[0]
    return image, maps, {name: a.cpu() for name, a in matrices.items()}


def columns(sd: StableDiffusion, prompt: str, wanted: list[str] | None = None) -> dict[str, list[int]]:
    """The matrix's columns: those of each word (or of the wanted ones), and of what is no word: start, end, and the padding up to 77."""
    words: dict[str, list[int]] = {}
    for word, places in chosen_words(sd.tokenizer, prompt, wanted):
        words.setdefault(word, []).extend(places)
    end = 1 + min(len(sd.tokenizer.tokens(prompt)), sd.tokenizer.length - 2)
    rest = {"start": [0], "end": [end], "padding": list(range(end + 1, sd.tokenizer.length))}
    return words | {f"<{name}>": places for name, places in rest.items() if places}


def thing(image: Image.Image, h: int, w: int) -> Tensor:
    """Which of h x w positions show something: those unlike the colour of the picture's border. bool (h, w)"""
    a = np.asarray(image.convert("RGB").resize((w, h), Image.Resampling.BOX), dtype=float)
    border = np.median(np.concatenate([a[0], a[-1], a[:, 0], a[:, -1]]), axis=0)
    return torch.from_numpy(np.abs(a - border).max(-1) > 32)


def tell(image: Image.Image, mean: Tensor, matrices: dict[str, Tensor], places: dict[str, list[int]]) -> None:
    """How much attention each column of the mean map (77, h, w) gets, and whether it gets more where something is drawn."""
    print("\nPositions per layer: " + ", ".join(f"{short(name)} {len(a)}" for name, a in matrices.items())
          + ". That is how many numbers a map has; what looks finer is interpolated.")
    print("  looked at     of the attention, from ... to    on what is drawn / beside it")
    drawn, shares = thing(image, *mean.shape[1:]), {name: mean[where].sum(0) for name, where in places.items()}
    for name, share in shares.items():
        print(f"  {name:16}{share.mean():6.1%} {share.min():13.1%} ... {share.max():5.1%} {share[drawn].mean() / share[~drawn].mean():15.2f}")
    words = [share.flatten() for name, share in shares.items() if not name.startswith("<")]
    if len(words) > 1:
        alike = torch.corrcoef(torch.stack(words))[*torch.triu_indices(len(words), len(words), 1)]
        print(f"  The words' maps correlate by {alike.mean():.2f} with each other, on average: at 1 there would be one map for all of them.")


def maps_picture(image: Image.Image, maps: HeatMaps, matrices: dict[str, Tensor], places: dict[str, list[int]]) -> Image.Image:
    """Maps over the picture, a column per word; all layers averaged, then each layer (of many, five)."""
    names = [list(maps.layers)[i] for i in np.linspace(0, len(maps.layers) - 1, min(5, len(maps.layers))).round().astype(int)]
    side = min(110, 740 // (len(places) + 1))
    rows = [[image.resize((side, side))] + [overlay(image, one[0, where].sum(0), side) for where in places.values()]
            for one in (maps.mean(), *(maps.layers[name] for name in names))]
    return sheet(rows, ["picture", *places], ["all layers", *(f"{short(name)} ({len(matrices[name])})" for name in names)], side)


def overlay(image: Image.Image, share: Tensor, side: int) -> Image.Image:
    """The map in colours over the picture in gray. The colours are stretched from its least value to its greatest, however close: both are written."""
    gray, colors = (p.convert("RGB").resize((side, side), Image.Resampling.BICUBIC) for p in (image.convert("L"), heat(share.numpy())))
    page = Image.blend(gray, colors, 0.6)
    ImageDraw.Draw(page).text((side // 2, side - 2), f"{share.min():.1%} to {share.max():.1%}", "black", anchor="md", font_size=10,
                              stroke_width=2, stroke_fill="white")
    return page


def matrix_picture(a: Tensor, tokens: list[str]) -> Image.Image:
    """The matrix a (positions, 77) itself, the tokens before the padding written above their columns."""
    cell, tall, left, top = 11, max(2, min(11, 300 // len(a))), 30, 62
    page = Image.new("RGB", (left + cell * a.shape[1], top + tall * len(a)), "white")
    page.paste(heat(a.numpy(), low=0).resize((cell * a.shape[1], tall * len(a)), Image.Resampling.NEAREST), (left, top))
    pen = ImageDraw.Draw(page)
    for j, token in enumerate(tokens):
        strip = Image.new("RGB", (56, cell), "white")
        ImageDraw.Draw(strip).text((0, cell // 2), token[:10], "black", anchor="lm", font_size=10)
        page.paste(strip.rotate(90, expand=True), (left + cell * j, top - 58))
    pen.text((left + cell * len(tokens) + 6, top - 14), "padding ..." if len(tokens) < 60 else "", "black", font_size=10)
    for i in range(0, len(a), max(1, len(a) // 4)):
        pen.text((left - 4, top + tall * i), str(i), "black", anchor="ra", font_size=10)
    return page


def short(name: str) -> str:
    """input_blocks.3.1.transformer_blocks.0.attn2 -> input 3"""
    part, number = name.split(".")[:2]
    return "middle" if part == "middle_block" else f"{part.split('_')[0]} {number}"


def pooled(sd: StableDiffusion, prompt: str, other: str, seed: int, steps: int) -> Image.Image:
    """For a model that is told the text twice: whose picture comes if it is told two?"""
    pictures = []
    for words, vector in (prompt, prompt), (prompt, other), (other, prompt), (other, other):
        (weight, nothing), (guidance, condition) = told(sd, words)
        mixture = condition | {"y": told(sd, vector)[1][1]["y"]}
        *_, last = walk(sd, [(weight, nothing), (guidance, mixture)], noise_of(sd, seed), steps)
        pictures += sd.decode_latents(last.x)
    print(f'\nThis model is told the text twice: word by word, to attend to, and in one pooled vector beside the time. Whom does it believe?')
    for what, picture in ("words", pictures[1]), ("pooled vector", pictures[2]):
        print(f'  "{prompt}" in the {what} only, "{other}" in the other: {distance(picture, pictures[0]):.0f} gray levels from the picture of '
              f'"{prompt}", {distance(picture, pictures[3]):.0f} from that of "{other}"')
    return sheet([pictures], [f"A = {prompt}", "the words of A, the vector of B", "the vector of A, the words of B", f"B = {other}"], side=200)


def main(args: Namespace) -> None:
    torch.manual_seed(0)
    sd = StableDiffusion.load(args.ckpt)
    places = columns(sd, args.prompt, args.word)
    dictionary()
    scale(100 if args.quick else 1000)
    layers()

    steps = 3 if args.quick else sd.config.steps
    image, maps, matrices = look(sd, args.prompt, steps=steps, seed=args.seed)
    tell(image, maps.mean()[0], matrices, places)
    rows = max(256, min(map(len, matrices.values())))  # more do not fit on a page
    name = [name for name, a in matrices.items() if len(a) <= rows][-1]
    tokens = ["start", *(piece.removesuffix("</w>") for _, piece in sd.tokenizer.tokens(args.prompt)[:75]), "end"]
    parts = {f'"{args.prompt}": what the positions of the picture look at: dark least, light most, written below; in layers of so many (positions)': maps_picture(image, maps, matrices, places),
             f"One such matrix itself: {short(name)}, last step. A row per position, a column per token; rows sum to 1, light is {matrices[name].max():.2f}":
             matrix_picture(matrices[name], tokens)}
    page = Image.new("RGB", (max(part.width for part in parts.values()), sum(part.height + 30 for part in parts.values())), "white")
    y = 0
    for title, part in parts.items():
        ImageDraw.Draw(page).text((4, y + 6), title, "black", font_size=13)
        page.paste(part, (0, y + 26))
        y += part.height + 30
    save(page.quantize(palette=palette_of([page], 200), dither=Image.Dither.NONE), args.out / "attention.png")
    if sd.config.unet.adm_in_channels is not None:
        save(pooled(sd, args.prompt, args.other, args.seed, steps), args.out / "attention-pooled.png")


if __name__ == "__main__":
    run(main, __doc__, ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"},
        prompt={"default": "a blue heart next to a red apple"}, word={"nargs": "+", "help": "words of the prompt; default: all"}, seed={"type": int, "default": 0},
        other={"default": "a rocket", "help": "a second prompt, for a model that is also told a pooled vector"})
