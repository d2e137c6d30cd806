"""How well and how sharply VAEs reconstruct emoji that they were not trained on.

    python train.py --init emoji --train vae --data data/emoji/train --out runs/kl ...
    python data/emoji/reconstruct.py runs/kl/model.safetensors runs/vq/vq.safetensors ...

Run data/emoji/prepare.py first. For each file it prints the PSNR over 200 pictures of rest/, on
white; and the energy of the gradients (mean square difference of neighbouring pixels) of the
reconstructions as a share of the pictures'. Below 1 is blurred.
"""
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from prepare import HERE
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(HERE.parents[1]))

from extras.files import on_white, read_image
from extras.vq import VQModel
from sd import StableDiffusion, pixels
from vae import VAEConfig


def main() -> None:
    paths = sorted((HERE / "rest").glob("*.png"))
    if len(paths) < 200:
        sys.exit(f"reconstruct.py: too few pictures in {HERE / 'rest'}: run"
                 " data/emoji/prepare.py first")
    some = paths[::len(paths) // 200][:200]
    x = pixels([on_white(read_image(path)) for path in some])
    print(f"{'':40}{'PSNR':>8}{'gradients':>12}")
    for file in sys.argv[1:] or [None]:
        with torch.no_grad():
            y = torch.cat([reconstructed(file, part) for part in x.split(20)]).clamp(-1, 1)
        psnr = -10 * ((y - x) / 2).square().mean((1, 2, 3)).log10().mean()
        name = "the built-in model" if file is None else file
        print(f"{name:40}{float(psnr):8.2f}{energy(y) / energy(x):12.3f}")


def reconstructed(file: str | None, x: Tensor) -> Tensor:
    """By the VAE of a model (None: the built-in one), or by what `train.py --vq` wrote."""
    if file is None or Path(file).name != "vq.safetensors":
        vae = StableDiffusion.load(file, "cpu", torch.float32).vae
        if vae.config.decoder_ch_mult is None:
            return vae.decode(vae.encode(x))
        # it reads and writes pictures of twice the side
        y = vae.decode(vae.encode(F.interpolate(x, scale_factor=2, mode="bicubic")))
        return F.avg_pool2d(y, 2)
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["config"])
        config["ch_mult"] = tuple(config["ch_mult"])
        vae = VQModel(VAEConfig(**config), int(f.metadata()["n_embed"]))
        vae.load_state_dict({name.removeprefix("first_stage_model."): f.get_tensor(name)
                             for name in f.keys()})
    return vae(x)[0]


def energy(x: Tensor) -> float:
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


if __name__ == "__main__":
    main()
