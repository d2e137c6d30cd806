"""Chapter 2, the UNet: the lecture's giant sandwich, taken apart.

The lecture prints the network block by block: ResBlock and SpatialTransformer in turn, a Downsample after each level, the same
way back up with a skip laid on each block, and the time told to every ResBlock as one number per channel,
    h = conv(x) + W silu(emb(t))[:, :, None, None],    emb = MLP([cos(w_k t), sin(w_k t)]),    w_k = 10000^(-k / 160)
(Rombach et al. 2022, section 3.3, after Ronneberger et al. 2015; the embedding: Vaswani et al. 2017, section 3.5.) Here the sizes
are counted from the code, on PyTorch's "meta" device: a full-size network that has shapes but no numbers, so it needs no memory.

    python lecture/unet.py
    python lecture/unet.py --model emoji      (or any other row of sd.py's PRESETS, such as sdxl)
"""
import math
from collections import Counter
from itertools import groupby
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from draw import UserError, heat, run, save, sheet
from model import ResBlock, TimestepEmbedSequential, UNetConfig, UNetModel, timestep_embedding
from sd import PRESETS, StableDiffusion

COLORS = {"ResBlock": "steelblue", "SpatialTransformer": "darkorange", "Downsample": "gray", "Upsample": "seagreen", "Conv2d": "gray"}


class Layer(NamedTuple):
    block: str                # such as input_blocks.4; layers of one block follow each other
    kind: str                 # its class; of a plain row of layers, theirs
    shape_in: tuple[int, ...]
    shape_out: tuple[int, ...]
    params: int
    flops: int                # 2 per multiply-add, of matrix products and convolutions, for one latent


def record(cfg: UNetConfig, size: int) -> tuple[list[Layer], dict[str, int]]:
    """The layers in the order they run, from one pass over a latent of size x size; and the FLOPs of every module by name."""
    with torch.device("meta"):
        unet = UNetModel(cfg)
        x, t, context = torch.empty(1, cfg.in_channels, size, size), torch.empty(1), torch.empty(1, 77, cfg.context_dim)
        y = None if cfg.adm_in_channels is None else torch.empty(1, cfg.adm_in_channels)
    seen = []
    for name, module in unet.named_modules():
        if name in ("time_embed", "label_emb", "out") or isinstance(unet.get_submodule(name.rpartition(".")[0]), TimestepEmbedSequential):
            module.register_forward_hook(lambda module, args, out, name=name: seen.append((name, module, args[0].shape[1:], out.shape[1:])))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        unet(x, t, context, y)
    flops = {name.removeprefix("UNetModel."): sum(by_op.values()) for name, by_op in counter.get_flop_counts().items()}
    return [Layer(name.rpartition(".")[0] or name, kind(m), tuple(a), tuple(b), sum(p.numel() for p in m.parameters()), flops.get(name, 0))
            for name, m, a, b in seen], flops


def kind(module: nn.Module) -> str:
    row = [m for m in module.modules() if not list(m.children())] if isinstance(module, nn.Sequential) else [module]
    return " + ".join(type(m).__name__ for m in row)


def by_block(layers: list[Layer]) -> dict[str, list[Layer]]:
    return {block: list(group) for block, group in groupby(layers, lambda layer: layer.block)}


def skips(layers: list[Layer]) -> dict[str, tuple[str, int]]:
    """Each output block -> the input block laid on it and that one's channels: a stack, first in, last out."""
    blocks = by_block(layers)
    stack = [(block, group[-1].shape_out[0]) for block, group in blocks.items() if block.startswith("input")]
    return {block: stack.pop() for block in blocks if block.startswith("output")}


def brief(number: float) -> str:
    """Two digits or more."""
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def times(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def print_sandwich(layers: list[Layer]) -> None:
    """One line per block, as the lecture prints it."""
    laid_on = skips(layers)
    print(f"{'block':<17}{'layers':<42}{'in':<12}{'out':<12}{'parameters':>13}{'GFLOP':>9}  skip")
    for block, group in by_block(layers).items():
        skip = ""
        if block in laid_on:
            source, channels = laid_on[block]
            skip = f"{group[0].shape_in[0]} = {group[0].shape_in[0] - channels} + {channels} from {source}"
        print(f"{block:<17}{' + '.join(layer.kind for layer in group):<42}{times(group[0].shape_in):<12}{times(group[-1].shape_out):<12}"
              f"{sum(layer.params for layer in group):>13,}{brief(sum(layer.flops for layer in group) / 1e9):>9}  {skip}")


def print_totals(layers: list[Layer], flops: dict[str, int]) -> None:
    """Where the parameters are and where the work is: not the same places."""
    params, work = sum(layer.params for layer in layers), sum(layer.flops for layer in layers)
    print(f"\n{'kind':<33}{'number':>8}{'parameters':>15}{'':>8}{'GFLOP':>9}")

    def line(name: str, number: int, p: int | None, f: int) -> None:
        print(f"{name:<33}{number:>8}" + (f"{'':>23}" if p is None else f"{p:>15,}{p / params:>8.1%}") + f"{brief(f / 1e9):>9}{f / work:>8.1%}")
    for kind, number in Counter(layer.kind for layer in layers).most_common():
        line(kind, number, sum(a.params for a in layers if a.kind == kind), sum(a.flops for a in layers if a.kind == kind))
    line("all", len(layers), params, work)
    print("in the transformers, as shares of all work:")
    for part, name in (("attn1", "self-attention"), ("attn2", "cross-attention to the words"), ("ff", "feed-forward")):
        found = [f for module, f in flops.items() if module.endswith("." + part)]
        line("  " + name, len(found), None, sum(found))
    channels, seen = [c for _, c in skips(layers).values()], [group[0].shape_in[0] for block, group in by_block(layers).items() if "output" in block]
    print(f"\n{len(channels)} skips, of " + ", ".join(f"{c} channels x{n}" for c, n in Counter(sorted(channels)).items())
          + "; with them the output blocks see " + ", ".join(f"{c} x{n}" for c, n in Counter(seen).items()))


def print_sizes(cfg: UNetConfig, sizes: list[int]) -> None:
    """Convolutions grow with the number of pixels, self-attention with its square."""
    print("\nlatent         GFLOP   of it self-attention")
    for size in sizes:
        layers, flops = record(cfg, size)
        work, attention = sum(layer.flops for layer in layers), sum(f for name, f in flops.items() if name.endswith(".attn1"))
        print(f"{times((size, size)):<9}{brief(work / 1e9):>11}{attention / work:>23.1%}")


def picture(layers: list[Layer], title: str) -> Image.Image:
    """The U: a bar per block, as wide as it has channels and as high as its feature map, and the skips; below, what each block costs."""
    blocks = {block: group for block, group in by_block(layers).items() if "_block" in block}
    column, left = 800 // len(blocks), 70
    most = max(group[0].shape_out[0] for group in blocks.values())
    wide = {block: max(3, (column - 4) * group[0].shape_out[0] / most) for block, group in blocks.items()}
    middle = {block: left + column * i + column // 2 for i, block in enumerate(blocks)}
    sides = sorted({group[0].shape_out[1] for group in blocks.values()}, reverse=True)
    height = [max(110 * side / sides[0], 24) for side in sides]
    top = [40 + sum(height[:i]) + 22 * i for i in range(len(sides))]
    floor = top[-1] + height[-1] + 20
    page = Image.new("RGB", (left + column * len(blocks) + 10, round(floor) + 330), "white")
    pen = ImageDraw.Draw(page)
    pen.text((4, 4), title, "black", font_size=15)

    for block, group in blocks.items():
        level, slice_ = sides.index(group[0].shape_out[1]), wide[block] / len(group)
        for i, layer in enumerate(group):
            x = middle[block] - wide[block] / 2 + i * slice_
            pen.rectangle((x, top[level], x + slice_ - 1, top[level] + height[level]), COLORS[layer.kind])
        pen.text((middle[block], top[level] - 2), str(group[0].shape_out[0]), "black", anchor="mb", font_size=10)
        pen.text((middle[block], floor + 298), block.rpartition(".")[2][:3], "gray", anchor="ma", font_size=10)
    for level, side in enumerate(sides):
        pen.text((left - 12, top[level] + height[level] / 2), f"{side}x{side}", "black", anchor="rm", font_size=12)
        here = [(middle[source] + wide[source] / 2, middle[block] - wide[block] / 2)
                for block, (source, _) in skips(layers).items() if blocks[block][0].shape_out[1] == side]
        for i, (start, end) in enumerate(here):  # the outermost highest, so that all can be told apart
            y = top[level] + height[level] * (len(here) - i) / (len(here) + 1)
            pen.line((start, y, end, y), "black")
            pen.polygon((end, y, end - 5, y - 2.5, end - 5, y + 2.5), "black")
    for name, cost, base in (("parameters\n(millions)", lambda a: a.params / 1e6, floor + 145), ("GFLOP", lambda a: a.flops / 1e9, floor + 295)):
        pen.text((4, base - 60), name, "black", font_size=11)
        for block, group in blocks.items():
            y, scale = base, 110 / max(sum(map(cost, g)) for g in blocks.values())
            for layer in group:
                pen.rectangle((middle[block] - column * 0.36, y - scale * cost(layer), middle[block] + column * 0.36, y), COLORS[layer.kind])
                y -= scale * cost(layer)
            pen.text((middle[block], y - 1), brief(sum(map(cost, group))), "black", anchor="mb", font_size=10)
    for name, x in (("block", 4), ("input_blocks, going down", left), ("output_blocks, going up", middle["output_blocks.0"] - 10)):
        pen.text((x, floor + (298 if x == 4 else 312)), name, "gray", font_size=10)
    for i, name in enumerate(("ResBlock", "SpatialTransformer", "Upsample", "Downsample, first Conv2d")):
        pen.rectangle((left + 140 * i, floor + 4, left + 140 * i + 9, floor + 13), COLORS[name.split(",")[0]])
        pen.text((left + 140 * i + 14, floor + 8), name, "black", anchor="lm", font_size=11)
    return page


def time_picture(dim: int) -> Image.Image:
    """All times across, the embedding's numbers down; and how alike any two times are."""
    e = timestep_embedding(torch.arange(1000), dim)
    print(f"\ntime 1 is told as cos(1) = {e[1, 0]:.4f}, ..., sin(1) = {e[1, dim // 2]:.4f}, ...: {dim} numbers, "
          f"frequencies from 1 to {math.asin(e[1, -1]):.4e}")
    alike = (e @ e.T / (dim // 2)).numpy()  # cosine similarity: every e has length sqrt(dim / 2)
    print("cosine similarity of time 500 and 501, 510, 600, 900: " + ", ".join(f"{alike[500, t]:.3f}" for t in (501, 510, 600, 900)))
    return sheet([[heat(e.T.numpy()).resize((430, 300)), heat(alike).resize((430, 300))]], side=300, across=[
        f"time 0 ... 999 across; {dim // 2} cosines, then {dim // 2} sines, slower downwards", "similarity of two times"]).quantize(64)


@torch.no_grad()
def modulation(block: ResBlock, x: Tensor, embs: tuple[Tensor, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """x (1, C, H, W) at two times (1, E): what the block's second half is fed (after time came in), and what comes out."""
    fed = []
    hook = block.out_layers.register_forward_hook(lambda module, args, out: fed.append(args[0][0]))
    out = [block(x, emb)[0] for emb in embs]
    hook.remove()
    return fed, out


def show_modulation() -> Image.Image:
    """A trained ResBlock, the first of the built-in model, on a drawn picture, at t = 50 and t = 900."""
    sd = StableDiffusion.load(device="cpu", dtype=torch.float32)
    drawing = Image.new("RGB", (256, 256), "white")
    ImageDraw.Draw(drawing).ellipse((50, 70, 200, 220), "crimson", "darkred", 6)
    ImageDraw.Draw(drawing).line((125, 80, 150, 25), "saddlebrown", 12)
    with torch.no_grad():
        x = sd.unet.input_blocks[0][0](sd.encode_image([drawing]))
        embs = tuple(sd.unet.time_embed(timestep_embedding(torch.tensor([t]), sd.config.unet.model_channels)) for t in (50, 900))
    fed, out = modulation(sd.unet.input_blocks[1][0], x, embs)
    told, differs = fed[1] - fed[0], out[1] - out[0]
    print(f"\nthe built-in model's first ResBlock at t = 900 minus at t = 50, {told.shape[0]} channels of {times(told.shape[1:])}:\n"
          f"where the time comes in, std between channels {told.mean((1, 2)).std():.3f}, over space {told.std((1, 2)).max():.0e}: "
          "one number per channel\n"
          f"at the output, after another convolution, std over space {differs.std((1, 2)).mean():.3f}: by then it acts by place")
    rows, strongest = [], told.mean((1, 2)).abs().argsort(descending=True)[:4].tolist()
    most, most_out = float(told.abs().max()), float(differs.abs().max())
    for c in strongest:
        both = torch.stack([fed[0][c], fed[1][c]])
        low, high = float(both.min()), float(both.max())
        rows.append([heat(both[0], low, high), heat(both[1], low, high), heat(told[c], -most, most), heat(differs[c], -most_out, most_out)])
    return sheet(rows, across=["t = 50", "t = 900", "difference", "difference at the output"], down=[f"channel {c}" for c in strongest], side=128)


def main(args):
    if args.model not in PRESETS:
        raise UserError(f"--model {args.model}: there are {', '.join(PRESETS)}")
    preset = PRESETS[args.model]
    size = preset.size // 2 ** (len(preset.vae.ch_mult) - 1) if args.size is None else args.size
    if not 1 <= size <= 512:
        raise UserError(f"--size {size}: the side of the latent, 1 to 512; {args.model} was trained at {preset.size // 8}")
    layers, flops = record(preset.unet, size)
    print_sandwich(layers)
    print_totals(layers, flops)
    print_sizes(preset.unet, [size] if args.quick else [max(size // 2, 1), size, 2 * size])
    total, work = sum(layer.params for layer in layers), sum(layer.flops for layer in layers)
    title = f"The UNet of {args.model}: {total:,} parameters, {brief(work / 1e9)} GFLOP per pass over a latent of {size}x{size}"
    save(picture(layers, title), args.out / "unet.png")
    save(time_picture(preset.unet.model_channels), args.out / "unet_time.png")
    save(show_modulation(), args.out / "unet_modulation.png")


if __name__ == "__main__":
    run(main, __doc__, model=dict(default="sd1", help=f"{', '.join(PRESETS)} (default sd1)"),
        size=dict(type=int, help="side of the latent (default: the model's own, 64 for sd1)"))
