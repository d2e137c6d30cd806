"""Chapter 2, the UNet: every layer, its shape, and what it costs.

The lecture prints the network block by block: ResBlock and SpatialTransformer in turn, a Downsample
after each level, and the same way back up, where each block gets a skip. Each ResBlock gets the
time as one number per channel,
    h = conv(x) + W silu(emb(t))[:, :, None, None],   emb = MLP([cos(w_k t), sin(w_k t)]),
    w_k = 10000^(-k / 160)
(Rombach et al. 2022, section 3.3, after Ronneberger et al. 2015; the embedding: Vaswani et al.
2017, section 3.5.) The sizes are counted from the code, on PyTorch's "meta" device. A network there
has shapes but no numbers, so a full-size one needs no memory.

    python lecture/unet.py
    python lecture/unet.py --model emoji      (or any other row of sd.py's PRESETS, such as sdxl)
"""
import math
from collections import Counter
from itertools import groupby
from typing import NamedTuple

import torch
from draw import UserError, heat, run, save, sheet
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from model import ResBlock, TimestepEmbedSequential, UNetConfig, UNetModel, timestep_embedding
from sd import PRESETS, StableDiffusion

COLORS = {"ResBlock": "steelblue", "SpatialTransformer": "darkorange", "Downsample": "gray",
          "Upsample": "seagreen", "Conv2d": "gray"}


class Layer(NamedTuple):
    block: str                # such as input_blocks.4; layers of one block follow each other
    kind: str                 # its class, or the classes in a plain sequence of layers
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    params: int
    flops: int                # 2 per multiply-add, of matrix products and convolutions, one latent


def record(cfg: UNetConfig, size: int) -> tuple[list[Layer], dict[str, int]]:
    """One pass over a latent of size x size: its layers in order, and the FLOPs of every module."""
    with torch.device("meta"):
        unet = UNetModel(cfg)
        x, t = torch.empty(1, cfg.in_channels, size, size), torch.empty(1)
        cond = {"context": torch.empty(1, 77, cfg.context_dim)}
        if cfg.adm_in_channels is not None:
            cond["y"] = torch.empty(1, cfg.adm_in_channels)
        if cfg.time_cond_proj_dim is not None:
            cond["w"] = torch.empty(1)
    seen = []

    def watch(name: str, module: nn.Module) -> None:
        module.register_forward_hook(lambda module, args, out: seen.append(
            (name, module, tuple(args[0].shape[1:]), tuple(out.shape[1:]))))

    for name, module in unet.named_modules():
        parent = unet.get_submodule(name.rpartition(".")[0])
        whole = name in ("time_embed", "label_emb", "out")
        if whole or isinstance(parent, TimestepEmbedSequential):
            watch(name, module)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(x, t, **cond)
    flops = {name.removeprefix("UNetModel."): sum(by_op.values())
             for name, by_op in counter.get_flop_counts().items()}
    layers = [Layer(name.rpartition(".")[0] or name, kind_of(module), shape_in, shape_out,
                    sum(p.numel() for p in module.parameters()), flops.get(name, 0))
              for name, module, shape_in, shape_out in seen]
    return layers, flops


def kind_of(module: nn.Module) -> str:
    parts = [module]
    if isinstance(module, nn.Sequential):
        parts = [part for part in module.modules() if not list(part.children())]
    return " + ".join(type(part).__name__ for part in parts)


def by_block(layers: list[Layer]) -> dict[str, list[Layer]]:
    return {block: list(group) for block, group in groupby(layers, lambda layer: layer.block)}


def skips(layers: list[Layer]) -> dict[str, tuple[str, int]]:
    """For each output block the input block whose skip it gets, and the skip's channels.

    The skips are a stack: first in, last out.
    """
    blocks = by_block(layers)
    stack = [(block, group[-1].shape_out[0]) for block, group in blocks.items()
             if block.startswith("input")]
    return {block: stack.pop() for block in blocks if block.startswith("output")}


def total_params(layers: list[Layer]) -> int:
    return sum(layer.params for layer in layers)


def total_flops(layers: list[Layer]) -> int:
    return sum(layer.flops for layer in layers)


# --- tables ---

def brief(number: float) -> str:
    """Two digits or more."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def print_blocks(layers: list[Layer]) -> None:
    """One line per block, as the lecture prints it."""
    sources = skips(layers)
    print(f"{'block':<17}{'layers':<42}{'in':<12}{'out':<12}{'parameters':>13}{'GFLOP':>9}  skip")
    for block, group in by_block(layers).items():
        skip, channels_in = "", group[0].shape_in[0]
        if block in sources:
            source, channels = sources[block]
            skip = f"{channels_in} = {channels_in - channels} + {channels} from {source}"
        kinds = " + ".join(layer.kind for layer in group)
        shapes = f"{times(group[0].shape_in):<12}{times(group[-1].shape_out):<12}"
        print(f"{block:<17}{kinds:<42}{shapes}"
              f"{total_params(group):>13,}{brief(total_flops(group) / 1e9):>9}  {skip}")


def print_totals(layers: list[Layer], flops: dict[str, int]) -> None:
    """Where the parameters are, and where the work is. They are not at the same places."""
    params, work = total_params(layers), total_flops(layers)
    print(f"\n{'kind':<33}{'number':>8}{'parameters':>15}{'':>8}{'GFLOP':>9}")

    def line(name: str, number: int, p: int | None, f: int) -> None:
        columns = f"{'':>23}" if p is None else f"{p:>15,}{p / params:>8.1%}"
        print(f"{name:<33}{number:>8}{columns}{brief(f / 1e9):>9}{f / work:>8.1%}")

    for kind, number in Counter(layer.kind for layer in layers).most_common():
        some = [layer for layer in layers if layer.kind == kind]
        line(kind, number, total_params(some), total_flops(some))
    line("all", len(layers), params, work)
    print("in the transformers, as shares of all work:")
    parts = {"attn1": "self-attention", "attn2": "cross-attention to the text",
             "ff": "feed-forward"}
    for part, name in parts.items():
        found = [f for module, f in flops.items() if module.endswith("." + part)]
        line("  " + name, len(found), None, sum(found))
    print_skips(layers)


def print_skips(layers: list[Layer]) -> None:
    channels = Counter(sorted(c for _, c in skips(layers).values()))
    seen = Counter(group[0].shape_in[0] for block, group in by_block(layers).items()
                   if "output" in block)
    print(f"\n{channels.total()} skips, of "
          + ", ".join(f"{c} channels x{n}" for c, n in channels.items())
          + "; with them the output blocks see " + ", ".join(f"{c} x{n}" for c, n in seen.items()))


def print_sizes(cfg: UNetConfig, sizes: list[int]) -> None:
    """Convolutions grow with the number of pixels, self-attention with its square."""
    print("\nlatent         GFLOP   of it self-attention")
    for size in sizes:
        layers, flops = record(cfg, size)
        work = total_flops(layers)
        attention = sum(f for name, f in flops.items() if name.endswith(".attn1"))
        print(f"{times((size, size)):<9}{brief(work / 1e9):>11}{attention / work:>23.1%}")


# --- the picture of the U ---

class UPicture:
    """The U. Each block is a bar: wide as its channels, high as its features, cut into its layers.

    Arrows are the skips. Below stand the parameters and the work of each block.
    """

    def __init__(self, layers: list[Layer], title: str):
        self.layers = layers
        self.blocks = {name: group for name, group in by_block(layers).items() if "_block" in name}
        groups = list(self.blocks.values())
        self.column, self.left = 800 // len(groups), 70
        most = max(group[0].shape_out[0] for group in groups)
        self.width = {name: max(3, (self.column - 4) * group[0].shape_out[0] / most)
                      for name, group in self.blocks.items()}
        self.middle = {name: self.left + self.column * i + self.column // 2
                       for i, name in enumerate(self.blocks)}
        self.sides = sorted({group[0].shape_out[1] for group in groups}, reverse=True)
        self.height = [max(110 * side / self.sides[0], 24) for side in self.sides]
        self.top = [40 + sum(self.height[:i]) + 22 * i for i in range(len(self.sides))]
        self.floor = self.top[-1] + self.height[-1] + 20
        size = (self.left + self.column * len(groups) + 10, round(self.floor) + 330)
        self.page = Image.new("RGB", size, "white")
        self.pen = ImageDraw.Draw(self.page)
        self.pen.text((4, 4), title, "black", font_size=15)

    def draw_blocks(self) -> None:
        for name, group in self.blocks.items():
            level, part = self.sides.index(group[0].shape_out[1]), self.width[name] / len(group)
            top, middle = self.top[level], self.middle[name]
            for i, layer in enumerate(group):
                x = middle - self.width[name] / 2 + i * part
                box = (x, top, x + part - 1, top + self.height[level])
                self.pen.rectangle(box, COLORS[layer.kind])
            self.pen.text((middle, top - 2), str(group[0].shape_out[0]), "black", anchor="mb",
                          font_size=10)
            self.pen.text((middle, self.floor + 298), name.rpartition(".")[2][:3], "gray",
                          anchor="ma", font_size=10)

    def draw_skips(self) -> None:
        sources = skips(self.layers)
        for level, side in enumerate(self.sides):
            top, height = self.top[level], self.height[level]
            self.pen.text((self.left - 12, top + height / 2), f"{side}x{side}", "black",
                          anchor="rm", font_size=12)
            here = [(source, block) for block, (source, _) in sources.items()
                    if self.blocks[block][0].shape_out[1] == side]
            for i, (source, block) in enumerate(here):
                start = self.middle[source] + self.width[source] / 2
                end = self.middle[block] - self.width[block] / 2
                # the outermost is the highest, so that none hides another
                y = top + height * (len(here) - i) / (len(here) + 1)
                self.pen.line((start, y, end, y), "black")
                self.pen.polygon((end, y, end - 5, y - 2.5, end - 5, y + 2.5), "black")

    def draw_costs(self) -> None:
        costs = [("parameters\n(millions)", lambda layer: layer.params / 1e6, self.floor + 145),
                 ("GFLOP", lambda layer: layer.flops / 1e9, self.floor + 295)]
        for name, cost, base in costs:
            self.pen.text((4, base - 60), name, "black", font_size=11)
            scale = 110 / max(sum(map(cost, group)) for group in self.blocks.values())
            for block, group in self.blocks.items():
                middle, y = self.middle[block], base
                for layer in group:
                    high = scale * cost(layer)
                    box = (middle - self.column * 0.36, y - high, middle + self.column * 0.36, y)
                    self.pen.rectangle(box, COLORS[layer.kind])
                    y -= high
                self.pen.text((middle, y - 1), brief(sum(map(cost, group))), "black", anchor="mb",
                              font_size=10)

    def draw_legend(self) -> None:
        labels = [("block", 4, 298), ("input_blocks, going down", self.left, 312),
                  ("output_blocks, going up", self.middle["output_blocks.0"] - 10, 312)]
        for name, x, y in labels:
            self.pen.text((x, self.floor + y), name, "gray", font_size=10)
        kinds = ("ResBlock", "SpatialTransformer", "Upsample", "Downsample, first Conv2d")
        for i, name in enumerate(kinds):
            x, y = self.left + 140 * i, self.floor + 4
            self.pen.rectangle((x, y, x + 9, y + 9), COLORS[name.split(",")[0]])
            self.pen.text((x + 14, y + 4), name, "black", anchor="lm", font_size=11)


def picture(layers: list[Layer], title: str) -> Image.Image:
    """The U of these layers."""
    u = UPicture(layers, title)
    u.draw_blocks()
    u.draw_skips()
    u.draw_costs()
    u.draw_legend()
    return u.page


# --- the time ---

def time_picture(dim: int) -> Image.Image:
    """The embeddings of all times, a column each; and how similar any two times are."""
    e = timestep_embedding(torch.arange(1000), dim)
    print(f"\ntime 1 is given as cos(1) = {e[1, 0]:.4f}, ..., sin(1) = {e[1, dim // 2]:.4f}, ...:"
          f" {dim} numbers, frequencies from 1 to {math.asin(e[1, -1]):.4e}")
    similar = (e @ e.T / (dim // 2)).numpy()  # the cosine: every e has length sqrt(dim / 2)
    print("cosine similarity of time 500 and 501, 510, 600, 900: "
          + ", ".join(f"{similar[500, t]:.3f}" for t in (501, 510, 600, 900)))
    pictures = [heat(e.T.numpy()).resize((430, 300)), heat(similar).resize((430, 300))]
    titles = [f"time 0 ... 999 across; {dim // 2} cosines, then {dim // 2} sines, slower downwards",
              "similarity of two times"]
    return sheet([pictures], side=300, across=titles).quantize(64)


@torch.no_grad()
def modulation(block: ResBlock, x: Tensor,
               embs: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """x (1, C, H, W) at two times (1, E): the input of the block's second half, and its output.

    The time has been added at the input of the second half.
    """
    inner = []
    hook = block.out_layers.register_forward_hook(
        lambda module, args, out: inner.append(args[0][0]))
    out = [block(x, emb)[0] for emb in embs]
    hook.remove()
    return inner, out


def red_ball() -> Image.Image:
    drawing = Image.new("RGB", (256, 256), "white")
    pen = ImageDraw.Draw(drawing)
    pen.ellipse((50, 70, 200, 220), "crimson", "darkred", 6)
    pen.line((125, 80, 150, 25), "saddlebrown", 12)
    return drawing


def show_modulation() -> Image.Image:
    """A trained ResBlock, the first of the built-in model, on a drawn picture at t = 50 and 900."""
    sd = StableDiffusion.load(device="cpu", dtype=torch.float32)
    with torch.no_grad():
        x = sd.unet.input_blocks[0][0](sd.encode_image([red_ball()]))
        width = sd.preset.unet.model_channels
        embs = tuple(sd.unet.time_embed(timestep_embedding(torch.tensor([t]), width))
                     for t in (50, 900))
    inner, out = modulation(sd.unet.input_blocks[1][0], x, embs)
    added, differs = inner[1] - inner[0], out[1] - out[0]
    print(f"\nthe built-in model's first ResBlock at t = 900 minus at t = 50, {added.shape[0]}"
          f" channels of {times(added.shape[1:])}:\n"
          f"where the time is added, std between channels {added.mean((1, 2)).std():.3f}, over"
          f" space {added.std((1, 2)).max():.0e}: one number per channel\n"
          "at the output, after another convolution, std over space"
          f" {differs.std((1, 2)).mean():.3f}: there it depends on the position")
    strongest = added.mean((1, 2)).abs().argsort(descending=True)[:4].tolist()
    most, most_out, rows = float(added.abs().max()), float(differs.abs().max()), []
    for c in strongest:
        both = torch.stack([inner[0][c], inner[1][c]])
        low, high = float(both.min()), float(both.max())
        rows.append([heat(both[0], low, high), heat(both[1], low, high),
                     heat(added[c], -most, most), heat(differs[c], -most_out, most_out)])
    titles = ["t = 50", "t = 900", "difference", "difference at the output"]
    return sheet(rows, across=titles, down=[f"channel {c}" for c in strongest], side=128)


def main(args) -> None:
    if args.model not in PRESETS:
        raise UserError(f"no --model {args.model}: use {', '.join(PRESETS)}")
    preset = PRESETS[args.model]
    usual = preset.size // preset.vae.downsampling
    size = usual if args.size is None else args.size
    if not 1 <= size <= 512:
        raise UserError(f"--size {size}: the side of the latent must lie between 1 and 512;"
                        f" {args.model} was trained at {usual}")
    layers, flops = record(preset.unet, size)
    print_blocks(layers)
    print_totals(layers, flops)
    print_sizes(preset.unet, [size] if args.quick else [max(size // 2, 1), size, 2 * size])
    title = (f"The UNet of {args.model}: {total_params(layers):,} parameters,"
             f" {brief(total_flops(layers) / 1e9)} GFLOP per pass over a latent of {size}x{size}")
    save(picture(layers, title), args.out / "unet.png")
    save(time_picture(preset.unet.model_channels), args.out / "unet_time.png")
    save(show_modulation(), args.out / "unet_modulation.png")


if __name__ == "__main__":
    run(main, __doc__, model=dict(default="sd1", help=f"{', '.join(PRESETS)} (default sd1)"),
        size=dict(type=int, help="side of the latent (default: the model's own, 64 for sd1)"))
