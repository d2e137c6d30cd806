"""The autoencoder: pictures to latents and back (KL-regularised VAE of latent diffusion).

Diffusion runs in a latent space f = 2^(levels - 1) times smaller per side than the picture: for SD 1.x a 3x512x512
picture (786,432 numbers) becomes a 4x64x64 latent (16,384 numbers). Rombach et al. 2022, section 3.1; the modules
carry the names of `ldm/modules/diffusionmodules/model.py`, which are those in official checkpoints.

Shapes: B batch, C channels, H W picture or feature size, Z latent channels, h = H/f, w = W/f.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import attention, upsample


@dataclass
class VAEConfig:
    ch: int = 128                                   # width of the level at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)         # width of each level / ch; each level but the last halves H and W
    num_res_blocks: int = 2                         # per level in the encoder; the decoder has one more
    z_channels: int = 4
    double_z: bool = True                           # the encoder gives mean and log variance; False for a VQModel
    num_groups: int = 32                            # of every GroupNorm
    scale_factor: float = 0.18215                   # 1/std of the latents over the training data

    @property
    def downsampling(self) -> int:
        """f: picture side / latent side."""
        return 2 ** (len(self.ch_mult) - 1)


class AutoencoderKL(nn.Module):
    """q(z|x) = N(mean, std^2) by the encoder, x by the decoder. Pictures lie in [-1, 1]."""

    def __init__(self, cfg: VAEConfig = VAEConfig()):
        super().__init__()
        self.cfg = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * cfg.z_channels, 2 * cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log variance of the latents, (B, Z, h, w) each."""
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) -> latents (B, Z, h, w) scaled to unit variance, as the UNet sees them.

        With `noise` (standard normal, shaped as the latents) a sample, mean + std * noise; without, the mode.
        """
        mean, logvar = self.moments(x)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise.to(mean)
        return z * self.cfg.scale_factor

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, Z, h, w) -> pictures (B, 3, H, W), about [-1, 1] (not clamped)."""
        return self.decoder(self.post_quant_conv(z / self.cfg.scale_factor))


def decode_tiled(vae: AutoencoderKL, z: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
    """`vae.decode` in tiles of tile x tile latents, blended linearly where they overlap: the memory of one tile, whatever the picture's size.

    Not exactly the whole: GroupNorm and attention see a tile at a time.
    """
    f, (B, _, h, w) = vae.cfg.downsampling, z.shape
    out, total = (torch.zeros(B, channels, h * f, w * f, device=z.device) for channels in (3, 1))
    for y in tile_starts(h, tile, overlap):
        for x in tile_starts(w, tile, overlap):
            picture = vae.decode(z[:, :, y:y + tile, x:x + tile]).float()
            ramps = [torch.arange(1, side + 1, device=z.device).minimum(torch.arange(side, 0, -1, device=z.device)).clamp(max=overlap * f)
                     for side in picture.shape[2:]]
            weight = ramps[0][:, None] * ramps[1]                            # falls off towards the tile's edges
            here = (..., slice(y * f, y * f + picture.shape[2]), slice(x * f, x * f + picture.shape[3]))
            out[here] += weight * picture
            total[here] += weight
    return out / total


def tile_starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin: evenly spread, overlapping by at least `overlap`."""
    count = 1 if side <= tile else 1 + math.ceil((side - tile) / (tile - overlap))
    return [round(i * max(side - tile, 0) / max(count - 1, 1)) for i in range(count)]


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats, summed over a latent, averaged over the batch. Kingma & Welling 2014, appendix B."""
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


class VQModel(nn.Module):
    """The other autoencoder of Rombach et al. 2022, section 3.1: latents are snapped to a learned codebook instead of drawn to N(0, 1).

    Modules as in LDM's `VQModel`. Build it with VAEConfig(double_z=False, ...); pictures (B, 3, H, W) in [-1, 1].
    """

    def __init__(self, cfg: VAEConfig, n_embed: int = 8192):
        super().__init__()
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = VectorQuantizer(n_embed, cfg.z_channels)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures -> reconstructions (B, 3, H, W), the codebook's loss, and the codes (B, h, w), which alone are the picture."""
        z, loss, codes = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(z)), loss, codes


class VectorQuantizer(nn.Module):
    """Every latent vector becomes the nearest of n_embed codes; gradients pass as if it had not. van den Oord et al. 2017, equation 3.

    z (B, Z, h, w) -> the codes' vectors (B, Z, h, w); a loss that draws codes to latents and, with weight beta, latents to
    codes; the codes' numbers (B, h, w).
    """

    def __init__(self, n_embed: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors = z.movedim(1, -1)                                               # 'b z h w -> b h w z'
        codes = torch.cdist(vectors.flatten(0, -2), self.embedding.weight).argmin(1).view(vectors.shape[:-1])
        q = self.embedding(codes).movedim(-1, 1)                                 # 'b h w z -> b z h w'
        loss = (q - z.detach()).square().mean() + self.beta * (q.detach() - z).square().mean()
        return z + (q - z).detach(), loss, codes


def level(**modules: nn.Module) -> nn.Module:
    """One resolution of the encoder or decoder: a plain holder, so that names read `down.0.block.1` as in the checkpoint."""
    holder = nn.Module()
    for name, module in modules.items():
        holder.add_module(name, module)
    return holder


class Encoder(nn.Module):
    """(B, 3, H, W) -> (B, 2Z, h, w): mean and log variance, before `quant_conv`."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        self.conv_in = nn.Conv2d(3, cfg.ch, 3, padding=1)
        self.down = nn.ModuleList()
        c = cfg.ch
        for i, width in enumerate(widths):
            block = nn.ModuleList(ResnetBlock(c if j == 0 else width, width, cfg.num_groups) for j in range(cfg.num_res_blocks))
            down = level(block=block)
            if i < len(widths) - 1:
                down.downsample = Downsample(width)
            self.down.append(down)
            c = width
        self.mid = level(block_1=ResnetBlock(c, c, cfg.num_groups), attn_1=AttnBlock(c, cfg.num_groups),
                         block_2=ResnetBlock(c, c, cfg.num_groups))
        self.norm_out = normalize(c, cfg.num_groups)
        self.conv_out = nn.Conv2d(c, (1 + cfg.double_z) * cfg.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for down in self.down:
            for block in down.block:
                h = block(h)
            if hasattr(down, "downsample"):
                h = down.downsample(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, Z, h, w) -> (B, 3, H, W)."""

    def __init__(self, cfg: VAEConfig):
        super().__init__()
        widths = [cfg.ch * m for m in cfg.ch_mult]
        c = widths[-1]
        self.conv_in = nn.Conv2d(cfg.z_channels, c, 3, padding=1)
        self.mid = level(block_1=ResnetBlock(c, c, cfg.num_groups), attn_1=AttnBlock(c, cfg.num_groups),
                         block_2=ResnetBlock(c, c, cfg.num_groups))
        levels = []
        for i, width in reversed(list(enumerate(widths))):
            block = nn.ModuleList(ResnetBlock(c if j == 0 else width, width, cfg.num_groups) for j in range(cfg.num_res_blocks + 1))
            up = level(block=block)
            if i > 0:
                up.upsample = Upsample(width)
            levels.append(up)
            c = width
        self.up = nn.ModuleList(reversed(levels))  # the checkpoint counts levels from full resolution: up.0 runs last
        self.norm_out = normalize(c, cfg.num_groups)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        for up in reversed(self.up):
            for block in up.block:
                h = block(h)
            if hasattr(up, "upsample"):
                h = up.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, num_groups: int):
        super().__init__()
        self.norm1 = normalize(c_in, num_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = normalize(c_out, num_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return h + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class AttnBlock(nn.Module):
    """Self-attention over all H*W positions, one head as wide as the features. The projections are 1x1 convolutions."""

    def __init__(self, c: int, num_groups: int):
        super().__init__()
        self.norm = normalize(c, num_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (f(h).flatten(2).transpose(1, 2)[:, None] for f in (self.q, self.k, self.v))  # 'b c h w -> b 1 (h w) c'
        h = attention(q, k, v)
        return x + self.proj_out(h[:, 0].transpose(1, 2).reshape(x.shape))                       # 'b 1 (h w) c -> b c h w'


class Downsample(nn.Module):
    """Stride-2 convolution, padded at the right and bottom only, as the released weights were trained.

    Padding both sides gives the same shape, and a picture shifted by some pixels: it fails silently.
    """

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """(B, C, H, W) -> (B, C, 2H, 2W): nearest neighbour, then a convolution."""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return upsample(x, self.conv, torch.Size((2 * x.shape[2], 2 * x.shape[3])))


def normalize(c: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, c, eps=1e-6)  # PyTorch's default, 1e-5, is a different network
