"""ControlNet, as an example of a fork: beside the prompt, a picture of edges (or depths, or poses) says where things go.

Zhang et al. 2023, "Adding Conditional Control to Text-to-Image Diffusion Models", section 3. The UNet stays frozen, and model.py as it is. A copy of
the UNet's way down and middle, which also sees the hint, is trained; what it finds is added to the UNet's skips and middle, each through a 1x1
convolution that starts at zero, so that training starts from the UNet as it was.

             the UNet, frozen                             the copy
    x -> input_blocks.0 -----> (+) <--- zero_convs.0 <--- input_blocks.0 (x) + input_hint_block (hint)
               |                |                               |
         input_blocks.1 -----> (+) <--- zero_convs.1 <--- input_blocks.1
               :                :            :                  :
         middle_block -------> (+) <- middle_block_out <- middle_block
                                |
                                '--> output_blocks -> noise

    python examples/controlnet.py "a bird" --control edges.png --controlnet control_sd15_canny.safetensors --ckpt v1-5-pruned-emaonly.safetensors
    python examples/controlnet.py "a red apple" --control any.png         the built-in model, and a copy that is not trained yet: it changes nothing
    python examples/train_controlnet.py outlines.safetensors              trains it, in minutes
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
from PIL import Image, ImageOps
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # to import the files above
from checkpoint import UserError, check_names_and_shapes, diffusers_name, open_tensors  # noqa: E402
from model import UNetModel, timestep_embedding, zero  # noqa: E402
from sd import StableDiffusion, on_white, output_paths, pixels, read_image, write  # noqa: E402


class ControlNet(nn.Module):
    """A copy of a UNet's first half, on its device and in its dtype, with the names of cldm.py, the authors' file.

    hint (1 or B, 3, 8H, 8W) in [0, 1], then what the UNet is told: x (B, in, H, W), t (B,), context (B, T, D), y or None
    -> what to add to each skip, first to last, and to the middle: each (B, C_i, H_i, W_i).
    """

    def __init__(self, unet: UNetModel):
        super().__init__()
        cfg = self.cfg = unet.cfg
        for part in "time_embed", "label_emb", "input_blocks", "middle_block":
            if hasattr(unet, part):
                setattr(self, part, deepcopy(getattr(unet, part)))
        widths = [cfg.model_channels * m for i, m in enumerate(cfg.channel_mult) for _ in range(cfg.num_res_blocks + (i < len(cfg.channel_mult) - 1))]
        self.zero_convs = nn.ModuleList(nn.Sequential(zero(nn.Conv2d(c, c, 1))) for c in [cfg.model_channels, *widths])
        self.middle_block_out = nn.Sequential(zero(nn.Conv2d(widths[-1], widths[-1], 1)))
        layers, c = [nn.Conv2d(3, 16, 3, padding=1)], 16
        for c_out in 32, 96, 256:  # each to half the size: f = 8, as the VAE
            layers += [nn.SiLU(), nn.Conv2d(c, c, 3, padding=1), nn.SiLU(), nn.Conv2d(c, c_out, 3, stride=2, padding=1)]
            c = c_out
        self.input_hint_block = nn.Sequential(*layers, nn.SiLU(), zero(nn.Conv2d(c, cfg.model_channels, 3, padding=1)))
        self.to(unet.out[2].weight)

    def forward(self, hint: Tensor, x: Tensor, t: Tensor, context: Tensor, y: Tensor | None = None) -> list[Tensor]:
        dtype = self.time_embed[0].weight.dtype
        x, hint, context = x.to(dtype), hint.to(dtype), context.to(dtype)
        emb = self.time_embed(timestep_embedding(t, self.cfg.model_channels).to(dtype))
        if y is not None:
            emb = emb + self.label_emb(y.to(dtype))
        first, *others = self.input_blocks
        found = [first(x, emb, context) + self.input_hint_block(hint)]
        for block in others:
            found.append(block(found[-1], emb, context))
        middle = self.middle_block(found[-1], emb, context)
        return [conv(h) for conv, h in zip([*self.zero_convs, self.middle_block_out], [*found, middle])]


@contextmanager
def controlled(unet: UNetModel, control: ControlNet, hint: Tensor, scale: float = 1.0) -> Iterator[None]:
    """Within, the UNet draws by the hint, whoever calls it: hooks ask the ControlNet first and add what it says on the way."""
    found, hint = [], hint.to(control.middle_block_out[0].weight)

    def ask(unet, args, kwargs):
        found[:] = [scale * residual for residual in control(hint, *args, **kwargs)]

    def add_to_middle(block, args, h):
        return h + found.pop()

    def add_to_skip(block, args):
        """The last channels of an output block's input are those of the skip; the last skip comes first."""
        residual = found.pop()
        args[0][:, -residual.shape[1]:] += residual

    hooks = [unet.register_forward_pre_hook(ask, with_kwargs=True), unet.middle_block.register_forward_hook(add_to_middle),
             *(block.register_forward_pre_hook(add_to_skip) for block in unet.output_blocks)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


PREFIX = "control_model."  # in official files; some lack it
HINT = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]  # diffusers' names of the hint's eight convolutions; ours count the SiLUs between them too


def diffusers_control_name(name: str, config) -> str:
    """What diffusers' ControlNetModel calls a parameter; `config` is a sd.Preset."""
    name = re.sub(r"^input_hint_block\.(\d+)", lambda match: f"controlnet_cond_embedding.{HINT[int(match[1]) // 2]}", name)
    name = re.sub(r"^zero_convs\.(\d+)\.0", r"controlnet_down_blocks.\1", name)
    name = re.sub(r"^middle_block_out\.0", "controlnet_mid_block", name)
    return diffusers_name("model.diffusion_model." + name, config).removeprefix("unet/")  # the rest is a UNet's


def load(path: str | Path, sd: StableDiffusion) -> ControlNet:
    """A ControlNet for this model, on its device: a diffusers folder or file, or one with official names, after PREFIX or nothing.

    Raises UserError if it is not there, no ControlNet, or one for other models.
    """
    path = Path(path)
    path = path / "diffusion_pytorch_model.safetensors" if path.is_dir() else path
    found, _ = open_tensors(path)
    # the first files held the whole model, and of it only this
    tensors = {name.removeprefix(PREFIX): tensor for name, tensor in found.items() if name.startswith(PREFIX)} or found
    with torch.device("meta"):
        control = ControlNet(UNetModel(sd.config.unet))
    names = {name: diffusers_control_name(name, sd.config) if "controlnet_mid_block.weight" in tensors else name for name in control.state_dict()}
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    wanted = {names[name]: tensor.shape for name, tensor in control.state_dict().items()}
    middle, words = names["middle_block_out.0.weight"], names["middle_block.1.transformer_blocks.0.attn2.to_k.weight"]
    if middle not in shapes or words not in shapes:
        raise UserError(f"{path} is no ControlNet: it has no {middle}")
    (c, d), (our_c, our_d) = shapes[words], wanted[words]
    if (c, d) != (our_c, our_d):
        raise UserError(f"{path} goes with a UNet {c} channels wide in the middle and words of {d}, not with this one of {our_c} and {our_d}: give its --ckpt")
    check_names_and_shapes(path, shapes, wanted)
    control.load_state_dict({name: tensors[names[name]].read().to(sd.device, sd.unet.out[2].weight.dtype).reshape(tensor.shape)
                             for name, tensor in control.state_dict().items()}, assign=True)
    return control.eval().requires_grad_(False).to(memory_format=torch.channels_last)


def hints(images: list[Image.Image]) -> Tensor:
    """PIL pictures of one size -> (B, 3, H, W) in [0, 1]."""
    return pixels(images) / 2 + 0.5


def outlines(image: Image.Image) -> Image.Image:
    """White lines on black where a picture's colour leaps: a rough stand-in for Canny's edges."""
    a = np.asarray(on_white(image), dtype=np.int16)
    leap = np.abs(np.diff(a, axis=0, append=a[-1:])) + np.abs(np.diff(a, axis=1, append=a[:, -1:]))
    return Image.fromarray(np.uint8(255 * (leap.max(-1) > 40)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt")
    parser.add_argument("--control", required=True, metavar="IMG", help="the hint, of the kind the ControlNet was trained with: white edges on black, ...")
    parser.add_argument("--controlnet", metavar="PATH", help="a file, or a diffusers folder; default: a fresh copy of the UNet, which changes nothing")
    parser.add_argument("--outlines", action="store_true", help="draw the outlines of IMG and take those")
    parser.add_argument("--scale", type=float, default=1.0, help="what the ControlNet adds is multiplied by this (default 1)")
    parser.add_argument("--ckpt", help="the model it goes with, as for sd.py; default: the built-in one")
    parser.add_argument("--out", default="controlled.png", help="the .png to write (default controlled.png)")
    for option, kind, default in (("--negative", str, ""), ("--steps", int, None), ("--guidance", float, None), ("--width", int, None),
                                  ("--height", int, None), ("--seed", int, 0), ("--batch", int, 1)):
        parser.add_argument(option, type=kind, default=default, help="as for sd.py")
    args = parser.parse_args()
    try:
        run(args)
    except UserError as error:
        print(f"controlnet.py: {error}", file=sys.stderr)
        sys.exit(2)


def run(args: argparse.Namespace) -> None:
    if not math.isfinite(args.scale):
        raise UserError(f"the scale must be a number, not {args.scale}")
    paths = output_paths("--out", args.out, ".png", args)
    control_image = read_image(args.control)
    sd = StableDiffusion.load(args.ckpt)
    if sd.sees != "noise":
        raise UserError(f"{args.ckpt} changes pictures; this draws from noise and the hint: give another --ckpt")
    if args.controlnet is None:
        print("no --controlnet: a fresh copy of the UNet, which changes nothing until it is trained")
    control = ControlNet(sd.unet) if args.controlnet is None else load(args.controlnet, sd)
    width, height, *_ = sd.settings(args.width, args.height, args.steps, args.guidance, None, None)
    image = ImageOps.fit(control_image, (width, height), Image.Resampling.LANCZOS)
    hint = hints([outlines(image) if args.outlines else image])
    with controlled(sd.unet, control, hint, args.scale):
        images = sd.generate(args.prompt, args.negative, width, height, args.steps, args.guidance, seed=args.seed, batch=args.batch)
    for image, path in zip(images, paths):
        write(image, path)
        print(path)


if __name__ == "__main__":
    main()
