"""VQModel, the other autoencoder of latent diffusion: latents are entries of a learned codebook.

Rombach et al. 2022, section 3.1. `python train.py --train vae --vq 1024` trains one.
Shapes as in vae.py.
"""
import torch
from torch import Tensor, nn

from vae import Decoder, Encoder, VAEConfig


class VQModel(nn.Module):
    """Each latent vector is replaced by the nearest code. Module names are those of LDM's VQModel.

    Build it with VAEConfig(double_z=False, ...). Pictures (B, 3, H, W) are in [-1, 1].
    """

    def __init__(self, cfg: VAEConfig, n_embed: int = 8192):
        super().__init__()
        self.config = cfg
        self.encoder = Encoder(cfg)
        self.decoder = Decoder(cfg)
        self.quantize = VectorQuantizer(n_embed, cfg.z_channels)
        self.quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)
        self.post_quant_conv = nn.Conv2d(cfg.z_channels, cfg.z_channels, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures -> reconstructions (B, 3, H, W), the codebook's loss, the codes (B, h, w)."""
        z, loss, codes = self.quantize(self.quant_conv(self.encoder(x)))
        return self.decoder(self.post_quant_conv(z)), loss, codes


class VectorQuantizer(nn.Module):
    """The nearest of n_embed codes. van den Oord et al. 2017, equation 3.

    z (B, Z, h, w) -> the codes' vectors (B, Z, h, w), a loss, the codes' numbers (B, h, w).
    The gradient passes to z unchanged (straight-through). The loss pulls codes to latents and,
    with weight beta, latents to codes.
    """

    def __init__(self, n_embed: int, dim: int, beta: float = 0.25):
        super().__init__()
        self.beta = beta
        self.embedding = nn.Embedding(n_embed, dim)
        nn.init.uniform_(self.embedding.weight, -1 / n_embed, 1 / n_embed)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        vectors = z.movedim(1, -1)                # 'b z h w -> b h w z'
        distances = torch.cdist(vectors.flatten(0, -2), self.embedding.weight)
        codes = distances.argmin(1).view(vectors.shape[:-1])
        q = self.embedding(codes).movedim(-1, 1)  # 'b h w z -> b z h w'
        codebook_loss = (q - z.detach()).square().mean()
        commitment_loss = (q.detach() - z).square().mean()
        return z + (q - z).detach(), codebook_loss + self.beta * commitment_loss, codes
