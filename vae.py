"""The autoencoder: pictures to latents and back (the KL-regularised VAE of latent diffusion).

Diffusion works on latents, which are f times smaller per side than the picture. f is
2^(levels - 1), by the levels of the decoder.
In SD 1.x a 3x512x512 picture (786,432 numbers) becomes a 4x64x64 latent (16,384 numbers).
Rombach et al. 2022, section 3.1. Modules have the names of `ldm/modules/diffusionmodules/model.py`,
which are the names in official checkpoints.

Shapes: B batch, C channels, H W picture or feature size, Z latent channels, h = H/f, w = W/f.
"""
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn

from model import attention


@dataclass
class VAEConfig:
    ch: int = 128                            # width of the level at full resolution
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)  # width of each level / ch; all but the last halve
    decoder_ch_mult: tuple[int, ...] | None = None  # None: ch_mult; more levels: larger pictures
    num_res_blocks: int = 2                  # per level of the encoder; the decoder has one more
    z_channels: int = 4
    double_z: bool = True                    # mean and log variance; False: extras/vq.py
    num_groups: int = 32                     # of every GroupNorm
    scale_factor: float = 0.18215            # 1 / standard deviation of the latents of the data

    @property
    def downsampling(self) -> int:
        """f: picture side / latent side."""
        return 2 ** (len(self.decoder_ch_mult or self.ch_mult) - 1)


class AutoencoderKL(nn.Module):
    """The encoder gives q(z|x) = N(mean, std^2), the decoder gives x. Pictures are in [-1, 1]."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        self.quant_conv = nn.Conv2d(2 * config.z_channels, 2 * config.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)

    def moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures (B, 3, H, W) in [-1, 1] -> mean and log variance (B, Z, h, w), not scaled."""
        encoder_downsampling = 2 ** (len(self.config.ch_mult) - 1)
        if encoder_downsampling < self.config.downsampling:  # the decoder has more levels
            scale = encoder_downsampling / self.config.downsampling
            small = F.interpolate(x.float(), scale_factor=scale, mode="bicubic", antialias=True)
            x = small.to(x.dtype)  # in fp32: PyTorch has no bf16 for it on CPUs
        mean, logvar = self.quant_conv(self.encoder(x)).chunk(2, dim=1)
        return mean, logvar.clamp(-30, 20)

    def sample(self, mean: Tensor, logvar: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments -> latents (B, Z, h, w), scaled to unit variance for the UNet.

        With `noise` (standard normal) a sample, mean + std * noise. Without, the mode.
        """
        z = mean
        if noise is not None:
            z = mean + (0.5 * logvar).exp() * noise.to(mean)
        return z * self.config.scale_factor

    def encode(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> scaled latents (B, Z, h, w)."""
        return self.sample(*self.moments(x), noise)

    def decode(self, z: Tensor) -> Tensor:
        """Scaled latents (B, Z, h, w) -> pictures (B, 3, H, W), about [-1, 1], not clamped."""
        return self.decoder(self.post_quant_conv(z / self.config.scale_factor))


class Encoder(nn.Module):
    """Pictures (B, 3, H, W) -> (B, 2Z, h, w): mean and log variance, before `quant_conv`.

    `moments` shrinks pictures first where the decoder draws larger ones.
    """

    def __init__(self, config: VAEConfig):
        super().__init__()
        c, groups = config.ch, config.num_groups
        self.conv_in = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList()
        for i, mult in enumerate(config.ch_mult):
            level = nn.Module()  # a holder: names read `down.0.block.1` as in the checkpoint
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks):
                level.block.append(ResnetBlock(c, config.ch * mult, groups))
                c = config.ch * mult
            if i < len(config.ch_mult) - 1:
                level.downsample = Downsample(c)
            self.down.append(level)
        self.mid = Middle(c, groups)
        self.norm_out = normalize(c, groups)
        self.conv_out = nn.Conv2d(c, (1 + config.double_z) * config.z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for block in level.block:
                h = block(h)
            if hasattr(level, "downsample"):
                h = level.downsample(h)
        h = self.mid(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Decoder(nn.Module):
    """(B, Z, h, w) -> (B, 3, H, W)."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        ch_mult = config.decoder_ch_mult or config.ch_mult
        c, groups = config.ch * ch_mult[-1], config.num_groups
        self.conv_in = nn.Conv2d(config.z_channels, c, 3, padding=1)
        self.mid = Middle(c, groups)
        self.up = nn.ModuleList()
        for i, mult in reversed(list(enumerate(ch_mult))):
            level = nn.Module()
            level.block = nn.ModuleList()
            for _ in range(config.num_res_blocks + 1):
                level.block.append(ResnetBlock(c, config.ch * mult, groups))
                c = config.ch * mult
            if i > 0:
                level.upsample = Upsample(c)
            self.up.insert(0, level)  # the checkpoint counts from full resolution: up.0 runs last
        self.norm_out = normalize(c, groups)
        self.conv_out = nn.Conv2d(c, 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        h = self.conv_in(z)
        h = self.mid(h)
        for level in reversed(self.up):
            for block in level.block:
                h = block(h)
            if hasattr(level, "upsample"):
                h = level.upsample(h)
        return self.conv_out(F.silu(self.norm_out(h)))


class Middle(nn.Module):
    """ResnetBlock, attention, ResnetBlock at the lowest resolution. Keeps (B, C, h, w)."""

    def __init__(self, c: int, num_groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, num_groups)
        self.attn_1 = AttnBlock(c, num_groups)
        self.block_2 = ResnetBlock(c, c, num_groups)

    def forward(self, h: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(h)))


class ResnetBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))): (B, C_in, H, W) -> (B, C_out, H, W)."""

    def __init__(self, c_in: int, c_out: int, num_groups: int):
        super().__init__()
        self.norm1 = normalize(c_in, num_groups)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = normalize(c_out, num_groups)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Identity() if c_in == c_out else nn.Conv2d(c_in, c_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class AttnBlock(nn.Module):
    """Self-attention over all positions, with one head. The projections are 1x1 convolutions."""

    def __init__(self, c: int, num_groups: int):
        super().__init__()
        self.norm = normalize(c, num_groups)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(c, c, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (conv(h).flatten(2).transpose(1, 2)[:, None]      # 'b c h w -> b 1 (h w) c'
                   for conv in (self.q, self.k, self.v))
        h = attention(q, k, v)
        h = h[:, 0].transpose(1, 2).reshape(x.shape)                # 'b 1 (h w) c -> b c h w'
        return x + self.proj_out(h)


class Downsample(nn.Module):
    """A stride-2 convolution, padded at the right and bottom only, as the weights were trained.

    Padding on both sides has the same shape, and gives a shifted picture: it fails silently.
    """

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour, then a convolution. (B, C, H, W) -> (B, C, 2H, 2W)"""

    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest"))


def normalize(c: int, num_groups: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups, c, eps=1e-6)  # PyTorch's default, 1e-5, is another network
