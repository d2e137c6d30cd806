"""ControlNet, as an example of a fork: a picture of edges, depths or poses says where things are.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3. The
UNet stays frozen and model.py unchanged. A copy of the UNet's input and middle blocks is trained,
which also gets the hint. Its outputs are added to the UNet's skips and to its middle, each through
a 1x1 convolution that starts at zero, so training starts from the unchanged UNet.

             the UNet, frozen                             the copy
    x -> input_blocks.0 -----> (+) <--- zero_convs.0 <--- input_blocks.0(x)
               |                |                               | + input_hint_block(hint)
         input_blocks.1 -----> (+) <--- zero_convs.1 <--- input_blocks.1
               :                :            :                  :
         middle_block -------> (+) <- middle_block_out <- middle_block
                                |
                                '--> output_blocks -> noise

    python examples/controlnet.py "a bird" --control edges.png \\
        --controlnet control_sd15_canny.safetensors --ckpt v1-5-pruned-emaonly.safetensors
    python examples/controlnet.py "a red apple" --control any.png

The second draws with the built-in model and an untrained copy, which changes nothing.
examples/train_controlnet.py trains one in minutes.
"""
import argparse
import math
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to import sd, model, extras

from extras.cli import output_paths, write
from extras.diffusers_names import diffusers_name
from extras.edit import concat_kind
from extras.files import on_white, open_tensors, read_image
from model import UNetConfig, UNetModel, timestep_embedding, zero_module
from sd import (
    LazyTensor,
    Preset,
    StableDiffusion,
    UserError,
    check_names_and_shapes,
    pixels,
)


class ControlNet(nn.Module):
    """A copy of a UNet's first half, on its device and in its dtype, with the names of cldm.py.

    hint (1 or B, 3, 8H, 8W) in [0, 1], or twice as large, then the UNet's inputs: x (B, in, H, W),
    t (B,), context (B, T, D), y or None. Returns what to add to each skip, first to last, and to
    the middle: each (B, C_i, H_i, W_i).
    """

    def __init__(self, unet: UNetModel):
        super().__init__()
        self.config = unet.config
        for part in "time_embed", "label_emb", "input_blocks", "middle_block":
            if hasattr(unet, part):
                setattr(self, part, deepcopy(getattr(unet, part)))
        widths = skip_widths(self.config)
        self.zero_convs = nn.ModuleList(
            nn.Sequential(zero_module(nn.Conv2d(c, c, 1))) for c in widths)
        self.middle_block_out = nn.Sequential(zero_module(nn.Conv2d(widths[-1], widths[-1], 1)))
        self.input_hint_block = make_hint_block(self.config.model_channels)
        self.to(unet.out[2].weight)

    def forward(self, hint: Tensor, x: Tensor, t: Tensor, context: Tensor,
                y: Tensor | None = None) -> list[Tensor]:
        dtype = self.time_embed[0].weight.dtype
        x, hint, context = x.to(dtype), hint.to(dtype), context.to(dtype)
        if hint.shape[-1] == 16 * x.shape[-1]:  # the built-in model's f is 16
            hint = F.avg_pool2d(hint, 2)
        emb = self.time_embed(timestep_embedding(t, self.config.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(dtype))
        first, *others = self.input_blocks
        outputs = [first(x, emb, context) + self.input_hint_block(hint)]
        for block in others:
            outputs.append(block(outputs[-1], emb, context))
        outputs.append(self.middle_block(outputs[-1], emb, context))
        convs = [*self.zero_convs, self.middle_block_out]
        return [conv(h) for conv, h in zip(convs, outputs)]


def skip_widths(config: UNetConfig) -> list[int]:
    """The channels of each skip, first to last."""
    widths = [config.model_channels]
    for level, mult in enumerate(config.channel_mult):
        downsamples = level < len(config.channel_mult) - 1
        widths += [config.model_channels * mult] * (config.num_res_blocks + downsamples)
    return widths


def make_hint_block(width: int) -> nn.Sequential:
    """The hint (B, 3, 8H, 8W) -> (B, width, H, W), zero at first."""
    layers, c = [nn.Conv2d(3, 16, 3, padding=1)], 16
    for c_out in 32, 96, 256:  # each halves the size: f = 8, as the VAE of SD 1.x
        layers += [nn.SiLU(), nn.Conv2d(c, c, 3, padding=1),
                   nn.SiLU(), nn.Conv2d(c, c_out, 3, stride=2, padding=1)]
        c = c_out
    return nn.Sequential(*layers, nn.SiLU(), zero_module(nn.Conv2d(c, width, 3, padding=1)))


@contextmanager
def controlled(unet: UNetModel, control: ControlNet, hint: Tensor,
               scale: float = 1.0) -> Iterator[None]:
    """Within, every call of the UNet follows the hint, whoever makes it.

    Hooks run the ControlNet before the UNet and add its outputs where they belong.
    """
    residuals, hint = [], hint.to(control.middle_block_out[0].weight)

    def run_control(unet, args, kwargs):
        residuals[:] = [scale * residual for residual in control(hint, *args, **kwargs)]

    def add_to_middle(block, args, h):
        return h + residuals.pop()

    def add_to_skip(block, args):
        """The last channels of an output block's input are the skip. The last skip comes first."""
        residual = residuals.pop()
        args[0][:, -residual.shape[1]:] += residual

    hooks = [unet.register_forward_pre_hook(run_control, with_kwargs=True),
             unet.middle_block.register_forward_hook(add_to_middle)]
    hooks += [block.register_forward_pre_hook(add_to_skip) for block in unet.output_blocks]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


# --- files ---

PREFIX = "control_model."  # of the names in official files; some files lack it
# diffusers' names of the hint's eight convolutions; our index also counts the SiLUs between them
HINT = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]


def diffusers_control_name(name: str, preset: Preset) -> str:
    """The name of a parameter in diffusers' ControlNetModel."""
    name = re.sub(r"^input_hint_block\.(\d+)",
                  lambda match: f"controlnet_cond_embedding.{HINT[int(match[1]) // 2]}", name)
    name = re.sub(r"^zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", name)
    name = re.sub(r"^middle_block_out\.0", "controlnet_mid_block", name)
    # all others have the name that they have in a UNet
    return diffusers_name("model.diffusion_model." + name, preset).removeprefix("unet/")


def load(path: str | Path, sd: StableDiffusion) -> ControlNet:
    """A ControlNet for this model, on its device.

    `path` is a diffusers folder or file, or a file with official names, with PREFIX or without.
    Raises UserError if it is missing, no ControlNet, or one for other models.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "diffusion_pytorch_model.safetensors"
    found, _ = open_tensors(path)
    # the first official files held the whole model too
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found.items()
               if name.startswith(PREFIX)}
    if not tensors:
        tensors = found
    with torch.device("meta"):
        control = ControlNet(UNetModel(sd.preset.unet))
    state = control.state_dict()
    names = {name: name for name in state}
    if "controlnet_mid_block.weight" in tensors:
        names = {name: diffusers_control_name(name, sd.preset) for name in state}
    check_fits(path, tensors, {names[name]: tensor for name, tensor in state.items()}, names)
    dtype = sd.unet.out[2].weight.dtype
    for name, tensor in state.items():
        read = tensors[names[name]].read()
        state[name] = read.to(sd.device, dtype).reshape(tensor.shape)
    control.load_state_dict(state, assign=True)
    return control.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def check_fits(path: Path, found: dict[str, LazyTensor], wanted: dict[str, Tensor],
               names: dict[str, str]) -> None:
    """Raises UserError if the file holds no ControlNet of the wanted shapes.

    `names` are the file's names of our tensors.
    """
    middle = names["middle_block_out.0.weight"]
    to_k = names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    if middle not in found or to_k not in found:
        raise UserError(f"{path} is no ControlNet: it has no {middle}")
    if found[to_k].shape != wanted[to_k].shape:
        width, context_dim = found[to_k].shape
        our_width, our_context_dim = wanted[to_k].shape
        raise UserError(f"{path} is for a UNet with {width} channels in the middle and a"
                        f" context_dim of {context_dim}; this one has {our_width} and"
                        f" {our_context_dim}: give the --ckpt that it goes with")
    try:
        check_names_and_shapes(found, wanted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


# --- hints ---

def hints(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [0, 1]."""
    return pixels(images) / 2 + 0.5


def outlines(image: Image.Image) -> Image.Image:
    """White lines on black where the colour changes sharply: a rough stand-in for Canny's edges."""
    a = np.asarray(on_white(image), dtype=np.int16)
    down = np.abs(np.diff(a, axis=0, append=a[-1:]))
    right = np.abs(np.diff(a, axis=1, append=a[:, -1:]))
    return Image.fromarray(np.uint8(255 * ((down + right).max(-1) > 40)))


# --- the command ---

def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False)
    parser.add_argument("prompt")
    parser.add_argument("--control", required=True, metavar="IMG",
                        help="the hint, of the kind that the ControlNet was trained with, such as"
                             " white edges on black")
    parser.add_argument("--controlnet", metavar="PATH",
                        help="a file, or a diffusers folder; default: a new copy of the UNet, which"
                             " changes nothing")
    parser.add_argument("--outlines", action="store_true",
                        help="use the outlines of IMG as the hint")
    parser.add_argument("--scale", type=float, default=1.0,
                        help="factor of what the ControlNet adds (default 1)")
    parser.add_argument("--ckpt", help="the model that it goes with, as for sd.py; default: the"
                                       " built-in one")
    parser.add_argument("--out", default="controlled.png",
                        help="the .png to write (default controlled.png)")
    options = [("--negative", str, ""), ("--steps", int, None), ("--guidance", float, None),
               ("--width", int, None), ("--height", int, None), ("--seed", int, 0),
               ("--n", int, 1)]
    for option, kind, default in options:
        parser.add_argument(option, type=kind, default=default, help="as for sd.py")
    parser.add_argument("--batch", type=int, dest="n", default=argparse.SUPPRESS,
                        help=argparse.SUPPRESS)  # the old name of --n
    try:
        run(parser.parse_args())
    except UserError as error:
        print(f"controlnet.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    """Draw what the command's options ask for."""
    if not math.isfinite(args.scale):
        raise UserError(f"the scale must be a number, not {args.scale}")
    paths = output_paths("--out", Path(args.out), ".png", args.seed, args.n)
    control_image = read_image(args.control)
    sd = StableDiffusion.load(args.ckpt)
    if concat_kind(sd) != "none":
        raise UserError(f"{args.ckpt} changes pictures: give a --ckpt that draws from noise alone")
    if args.controlnet is None:
        print("no --controlnet: a new copy of the UNet, which changes nothing until it is trained")
        control = ControlNet(sd.unet)
    else:
        control = load(args.controlnet, sd)
    options = sd.resolve_options(args.width, args.height, args.steps, args.guidance)
    size = options["width"], options["height"]
    image = ImageOps.fit(control_image, size, Image.Resampling.LANCZOS)
    hint = hints([outlines(image) if args.outlines else image])
    with controlled(sd.unet, control, hint, args.scale):
        images = sd.generate(args.prompt, args.negative, seed=args.seed, batch=args.n, **options)
    for image, path in zip(images, paths):
        write(image, path)
        print(path)


if __name__ == "__main__":
    main()
