"""Less memory, more time: `attach(sd)`.

    sd = StableDiffusion.load(path, "cpu", dtype)
    lowmem.attach(sd, "cuda")

Each network is on the device only while it works. The UNet takes the rows of a batch one by one,
and the VAE decodes in tiles. `detach(sd)` undoes it.
"""
import math
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary


def attach(sd: object, device: str | torch.device | None = None) -> None:
    """Make a StableDiffusion draw with little memory, on this device (None: where it is now)."""
    if hasattr(sd, "placement"):
        detach(sd)
    if device is not None:
        sd.device = torch.device(device)
    sd.placement = Placement([*sd.text_encoders, sd.unet, sd.vae], sd.device)
    add_to_class(sd.unet, RowByRow)
    add_to_class(sd.vae, Tiled)


def detach(sd: object) -> None:
    """Undo `attach`: all networks are on the device again, and stay there."""
    sd.placement.remove()
    del sd.placement
    remove_from_class(sd.unet, RowByRow)
    remove_from_class(sd.vae, Tiled)


def add_to_class(module: nn.Module, addition: type) -> None:
    """Let the methods of `addition` go before those of the module's class."""
    cls = type(module)
    module.__class__ = type(f"{addition.__name__}{cls.__name__}", (addition, cls), {})


def remove_from_class(module: nn.Module, addition: type) -> None:
    first, cls = type(module).__bases__
    if first is addition:
        module.__class__ = cls


# --- one network at a time ---

class Placement:
    """Keeps the network that works on the device and the others in the CPU's memory."""

    def __init__(self, networks: list[nn.Module], device: torch.device):
        self.networks, self.device, self.working = networks, device, None
        self.hooks = []
        for network in networks:
            network.to("cpu")
            for part in entrances(network):
                hook = partial(self.before, network)
                self.hooks.append(part.register_forward_pre_hook(hook, prepend=True,
                                                                 with_kwargs=True))

    def before(self, network: nn.Module, part: nn.Module, args: tuple,
               kwargs: dict) -> tuple[tuple, dict]:
        """A hook: the network is about to work."""
        if self.working is not network:
            if self.working is not None:
                self.working.to("cpu")
            network.to(self.device)
            self.working = network
        return (tuple(self.moved(value) for value in args),
                {name: self.moved(value) for name, value in kwargs.items()})

    def moved(self, value: object) -> object:
        return value.to(self.device) if isinstance(value, Tensor) else value

    def remove(self) -> None:
        for hook in self.hooks:
            hook.remove()
        for network in self.networks:
            network.to(self.device)


def entrances(network: nn.Module) -> list[nn.Module]:
    """The modules that are called from outside: of an autoencoder its parts, else the network."""
    if hasattr(network, "encode") and hasattr(network, "decode"):
        return list(network.children())
    return [network]


# --- one row at a time ---

class RowByRow:
    """Added to a network's class: forward(x, ...) takes the rows of its batch one by one."""

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        compute, batch = super().forward, len(x)
        if batch == 1:
            return compute(x, *args, **kwargs)
        args = [rows_of(value, batch) for value in args]
        kwargs = {name: rows_of(value, batch) for name, value in kwargs.items()}
        out = [compute(x[i:i + 1], *(rows[i] for rows in args),
                       **{name: rows[i] for name, rows in kwargs.items()}) for i in range(batch)]
        return torch.cat(out)


ROWS = WeakTensorKeyDictionary()  # tensor -> its version, its rows


def rows_of(value: object, batch: int) -> list:
    """A tensor's rows (1, ...). What is not a tensor of so many rows is given to each row.

    While a tensor lives unchanged, its rows are the same tensors at every call: what is kept for a
    row of the context (see fast.py and deepcache.py) is found again.
    """
    if not isinstance(value, Tensor) or value.ndim == 0 or len(value) != batch:
        return [value] * batch
    if torch.is_grad_enabled() or value.is_inference():
        return list(value.split(1))
    version, rows = ROWS.get(value, (None, []))
    if version != value._version:
        rows = [row.clone() for row in value.split(1)]
        ROWS[value] = value._version, rows
    return rows


# --- one tile at a time ---

class Tiled:
    """Added to an autoencoder's class: decode(z) in tiles."""

    def decode(self, z: Tensor) -> Tensor:
        return decode_tiled(super().decode, z, self.config.downsampling)


def decode_tiled(decode: Callable[[Tensor], Tensor], z: Tensor, downsampling: int,
                 tile: int = 64, overlap: int = 16) -> Tensor:
    """decode(z) in tiles of tile x tile latents, which blend linearly where they overlap.

    z (B, Z, h, w) -> pictures (B, 3, H, W) in fp32. It takes the memory of one tile, whatever the
    picture's size. Not exactly equal: GroupNorm and attention see one tile at a time.
    """
    f, (batch, _, h, w) = downsampling, z.shape
    out, total = (torch.zeros(batch, channels, h * f, w * f, device=z.device)
                  for channels in (3, 1))
    for y in tile_starts(h, tile, overlap):
        for x in tile_starts(w, tile, overlap):
            picture = decode(z[:, :, y:y + tile, x:x + tile]).to(out)
            height, width = picture.shape[2:]
            weight = ramp(height, overlap * f, z.device)[:, None] * ramp(width, overlap * f,
                                                                         z.device)
            here = (..., slice(y * f, y * f + height), slice(x * f, x * f + width))
            out[here] += weight * picture
            total[here] += weight
    return out / total


def ramp(side: int, overlap: int, device: torch.device) -> Tensor:
    """A tile's weights (side,): 1, 2, ... from each end, up to `overlap`."""
    up = torch.arange(1, side + 1, device=device)
    return up.minimum(up.flip(0)).clamp(max=overlap)


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: evenly spread, with an overlap of at least `overlap`."""
    if side <= tile:
        return [0]
    count = 1 + math.ceil((side - tile) / (tile - overlap))
    return [round(i * (side - tile) / (count - 1)) for i in range(count)]
