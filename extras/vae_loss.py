"""Training of the autoencoder: `python train.py --train vae` or `--train decoder`.

The loss has an L1 and a gradient term, a weak KL term (or the codebook's loss, with --vq), and
optionally a discriminator. Rombach et al. 2022, section 3.1 and appendix G.
"""
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from extras.data import Batch, Folder, generator
from extras.files import atomic_write, save_tensors
from extras.formats import save
from extras.vq import VQModel
from sd import StableDiffusion


class VAELoss(nn.Module):
    """The reconstruction's loss for a batch of pictures.

    `s` are train.py's settings, `trained` holds what of the VAE is trained. With --disc-weight a
    discriminator learns to tell reconstructions from pictures.
    """

    def __init__(self, s, sd: StableDiffusion, trained: nn.Module):
        super().__init__()
        self.s, self.sd, self.trained = s, sd, trained
        self.discriminator = None
        if s.disc_weight:
            self.discriminator = discriminator(sd.preset.size).to(sd.device)
        self.shown = torch.zeros(0)  # pictures for the sample sheets

    def prepare(self, folders: list[Folder], rank: int, world: int) -> None:
        for folder in folders[:1]:
            chosen = torch.linspace(0, len(folder) - 1, min(256, len(folder)))
            self.shown = torch.stack([folder.pixels(int(i)) for i in chosen])

    def forward(self, batch: Batch, step: int) -> Tensor:
        if len(self.shown) == 0:  # shards: the first batch
            self.shown = batch.pixels
        generators = [generator(self.s.seed, 6, index) for index in batch.sample_index]
        flipped = [picture.flip(-1) if torch.rand((), generator=g) < 0.5 else picture
                   for picture, g in zip(batch.pixels, generators)]
        x = self.to_unit(torch.stack(flipped))
        y, regular = self.reconstruct(x, generators, step)
        loss = reconstruction_loss(x, y)
        if self.discriminator is not None:
            regular = regular + self.adversarial_loss(loss, x, y, step >= self.s.disc_start)
        return loss + regular

    def to_unit(self, pixels: Tensor) -> Tensor:
        return pixels.to(self.sd.device) / 127.5 - 1

    def reconstruct(self, x: Tensor, generators: list[torch.Generator],
                    step: int) -> tuple[Tensor, Tensor]:
        """Reconstructions (B, 3, H, W), and the loss that regularizes the latents."""
        vae = self.sd.vae
        if self.s.vq:
            if step == 0:
                self.init_codes(vae.quant_conv(vae.encoder(x)))
            return vae(x)[:2]
        mean, logvar = vae.moments(x)
        noise = torch.stack([torch.randn(mean.shape[1:], generator=g) for g in generators])
        z = mean + (0.5 * logvar).exp() * noise.to(x.device)  # not scaled: the scale comes later
        kl = kl_divergence(mean.float(), logvar.float())
        return vae.decoder(vae.post_quant_conv(z)), self.s.kl * kl

    @torch.no_grad()
    def init_codes(self, z: Tensor) -> None:
        """Start the codes at latents of the first batch: a code that is never nearest learns
        nothing."""
        vectors = z.movedim(1, -1).flatten(0, -2).float()
        codes = self.sd.vae.quantize.embedding.weight
        chosen = torch.randint(len(vectors), (len(codes),), generator=generator(self.s.seed, 8))
        noise = torch.randn(codes.shape, generator=generator(self.s.seed, 9)).to(z.device)
        codes.copy_(vectors[chosen.to(z.device)] + 0.01 * vectors.std() * noise)
        if dist.is_initialized():
            dist.broadcast(codes, 0)

    def adversarial_loss(self, loss: Tensor, x: Tensor, y: Tensor, decoder_learns: bool) -> Tensor:
        """The decoder's and the discriminator's loss in one; neither trains the other's weights.

        The decoder's is scaled so that its gradient at the last layer is as large as that of
        `loss` (Esser et al. 2021, equation 7). The discriminator's is the hinge loss (Lim & Ye
        2017).
        """
        fixed = {name: p.detach() for name, p in self.discriminator.named_parameters()}
        fool = -torch.func.functional_call(self.discriminator, fixed, (y,)).mean()
        last = self.sd.vae.decoder.conv_out.weight
        norm, fool_norm = (torch.autograd.grad(one, last, retain_graph=True)[0].norm()
                           for one in (loss, fool))
        weight = (norm / (fool_norm + 1e-4)).clamp(max=1e4)
        real, fake = self.discriminator(x), self.discriminator(y.detach())
        hinge = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return decoder_learns * self.s.disc_weight * weight * fool + hinge

    @torch.no_grad()
    def save(self, sd: StableDiffusion, out: str) -> None:
        """model.safetensors, its scale measured; or vq.safetensors, which sd.py does not read."""
        if self.s.vq:
            tensors = {f"first_stage_model.{name}": tensor
                       for name, tensor in sd.vae.state_dict().items()}
            metadata = {"config": json.dumps(asdict(sd.vae.config)), "n_embed": str(self.s.vq)}
            with atomic_write(Path(out) / "vq.safetensors") as temporary:
                save_tensors(tensors, temporary, torch.float32, metadata)
            return
        if self.s.train == "vae":
            means = [sd.vae.moments(self.to_unit(x))[0] for x in self.shown.split(8)]
            sd.preset.vae.scale_factor = 1 / float(torch.cat(means).std())
        save(sd, f"{out}/model.safetensors")

    @torch.no_grad()
    def samples(self, sd: StableDiffusion) -> list[tuple[Image.Image, str]]:
        """Twelve of the pictures, each before its reconstruction."""
        chosen = torch.linspace(0, len(self.shown) - 1, min(12, len(self.shown))).long()
        x = self.to_unit(self.shown[chosen])
        y = sd.vae(x)[0] if self.s.vq else sd.vae.decode(sd.vae.encode(x))
        mse = ((y.clamp(-1, 1) - x) / 2).square().mean((1, 2, 3))
        print(f"reconstruction: {float(-10 * mse.log10().mean()):.2f} dB PSNR", flush=True)
        pairs = torch.stack([x, y], 1).flatten(0, 1).clamp(-1, 1) * 127.5 + 127.5
        pictures = [Image.fromarray(one) for one in
                    pairs.round().byte().permute(0, 2, 3, 1).cpu().numpy()]
        return list(zip(pictures, ["picture", "decoded"] * len(x)))


def make_vq(s, sd: StableDiffusion) -> None:
    """Put a VQModel in the place of the VAE."""
    sd.vae = VQModel(replace(sd.preset.vae, double_z=False), s.vq).to(sd.device)


def reconstruction_loss(x: Tensor, y: Tensor) -> Tensor:
    """L1 at three scales, and L1 of the gradients. Both are (B, 3, H, W)."""
    error = y.float() - x
    loss = sum(F.avg_pool2d(error, scale).abs().mean() for scale in (1, 2, 4))
    return loss + error.diff(dim=-1).abs().mean() + error.diff(dim=-2).abs().mean()


def kl_divergence(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) || N(0, 1)) in nats: summed over a latent, the batch's mean.

    Kingma & Welling 2014, appendix B. Both (B, Z, h, w).
    """
    return 0.5 * (mean**2 + logvar.exp() - 1 - logvar).flatten(1).sum(1).mean()


def discriminator(size: int) -> nn.Sequential:
    """(B, 3, H, W) -> a logit for each patch of 70x70 pixels; of 34x34 if pictures are small.

    Isola et al. 2017, section 3.2.2, with GroupNorm instead of BatchNorm: batches may be small.
    """
    c, strides = (64, (2, 2, 1)) if size >= 256 else (32, (2, 1))
    layers = [nn.Conv2d(3, c, 4, 2, 1), nn.LeakyReLU(0.2)]
    for stride in strides:
        layers += [nn.Conv2d(c, 2 * c, 4, stride, 1, bias=False), nn.GroupNorm(8, 2 * c),
                   nn.LeakyReLU(0.2)]
        c *= 2
    layers.append(nn.Conv2d(c, 1, 4, 1, 1))
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            nn.init.normal_(layer.weight, std=0.02)
    return nn.Sequential(*layers)
