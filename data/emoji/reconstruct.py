"""How well and how sharply VAEs reconstruct emoji they were not trained on. Run data/emoji/prepare.py first.

    python train.py --init emoji --train vae --data data/emoji/train --out runs/kl ...
    python data/emoji/reconstruct.py runs/kl/model.safetensors runs/vq/vq.safetensors ...

For each file: PSNR over 200 pictures of rest/, on white, and the energy of the gradients (mean square of the difference of neighbouring pixels) of
the reconstructions as a share of that of the pictures: below 1 is blurred.
"""
import json
import sys
from pathlib import Path

import torch
from prepare import HERE
from safetensors import safe_open
from torch import Tensor

sys.path.insert(0, str(HERE.parents[1]))
from sd import StableDiffusion, on_white, pixels, read_image  # noqa: E402
from vae import VAEConfig, VQModel  # noqa: E402


def main() -> None:
    paths = sorted((HERE / "rest").glob("*.png"))
    x = pixels([on_white(read_image(path)) for path in paths[::len(paths) // 200][:200]])
    print(f"{'':40}{'PSNR':>8}{'gradients':>12}")
    for file in sys.argv[1:] or [None]:
        with torch.no_grad():
            y = torch.cat([reconstructed(file, part) for part in x.split(20)]).clamp(-1, 1)
        psnr = -10 * ((y - x) / 2).square().mean((1, 2, 3)).log10().mean()
        print(f"{str(file or 'the built-in model'):40}{float(psnr):8.2f}{energy(y) / energy(x):12.3f}")


def reconstructed(file: str | None, x: Tensor) -> Tensor:
    """By a model, or by the autoencoder of codes that `train.py --vq` wrote."""
    if file is None or Path(file).name != "vq.safetensors":
        vae = StableDiffusion.load(file, "cpu", torch.float32).vae
        return vae.decode(vae.encode(x))
    with safe_open(file, "pt") as f:
        config = json.loads(f.metadata()["config"])
        vae = VQModel(VAEConfig(**config | {"ch_mult": tuple(config["ch_mult"])}), int(f.metadata()["n_embed"]))
        vae.load_state_dict({name.removeprefix("first_stage_model."): f.get_tensor(name) for name in f.keys()})
    return vae(x)[0]


def energy(x: Tensor) -> float:
    return float(x.diff(dim=-1).square().mean() + x.diff(dim=-2).square().mean())


if __name__ == "__main__":
    main()
