"""Chapter 6, latents: an autoencoder makes the picture small, and diffusion works on the result.

    x (3, H, W) -- encoder --> z (Z, H/f, W/f) -- decoder --> x', close to x
                                                        Rombach et al. 2022, section 3.1
    KL    z = mean + std n
          loss + weight * 1/2 sum(mean^2 + std^2 - 1 - log std^2)
                                                        Kingma & Welling 2014, appendix B
    VQ    z = the nearest of K codes
          loss + |code - sg(z)|^2 + 1/4 |z - sg(code)|^2
                                                        van den Oord et al. 2017, equation 3
Stable Diffusion has f = 8 and Z = 4: 3 x 512 x 512 numbers become 4 x 64 x 64. The lecture shows
z[0:3] as red, green and blue, which is a sketch of the picture. This chapter shows a round trip,
sketches, autoencoders of f = 2 to 16 trained equally long, and KL beside VQ. LDM's autoencoders
also learn from a perceptual loss and a discriminator, for days, and are sharp. The repository has
no photo, so the script draws a landscape.

    python lecture/latents.py
    python lecture/latents.py --photo holiday.jpg --ckpt v1-5-pruned-emaonly.safetensors
"""
import math
import time
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from draw import Plot, UserError, beside, run, save, sheet
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from extras.files import on_white, read_image
from extras.vae_loss import kl_divergence
from extras.vq import VQModel
from model import UNetConfig, UNetModel, zero_module
from sd import PRESETS, StableDiffusion, pixels
from vae import AttnBlock, AutoencoderKL, ResnetBlock, VAEConfig

# of the autoencoders trained here: latent channels, codes in the codebook, side of their pictures
Z, CODES, SIDE = 4, 512, 64
COLORS = ("seagreen", "royalblue", "darkorange", "crimson", "purple")
Autoencoder = AutoencoderKL | VQModel
Curve = list[tuple[int, float]]  # (step, PSNR)


# --- pictures ---

class Painter:
    """n random pictures (n, 3, side, side), painted over each other. The seed decides all."""

    def __init__(self, n: int, side: int, seed: int):
        self.n, self.side, self.g = n, side, torch.Generator().manual_seed(seed)
        line = torch.linspace(0, 1, side)
        self.y, self.x = torch.meshgrid(line, line, indexing="ij")

    def uniform(self, low: float, high: float) -> Tensor:
        """A number per picture (n, 1, 1, 1)."""
        return low + (high - low) * torch.rand(self.n, 1, 1, 1, generator=self.g)

    def color(self, *rgb: float) -> Tensor:
        """A colour per picture (n, 3, 1, 1), near rgb."""
        noise = torch.rand(self.n, 3, 1, 1, generator=self.g)
        return torch.tensor(rgb)[:, None, None] + 0.25 * noise

    def waves(self, rows: int, columns: int, height: int | None = None) -> Tensor:
        """A smooth random field (n, 1, height, side)."""
        height = self.side if height is None else height
        coarse = torch.rand(self.n, 1, rows, columns, generator=self.g)
        return F.interpolate(coarse, size=(height, self.side), mode="bicubic")

    def paint(self, picture: Tensor, inside: Tensor, colors: Tensor) -> Tensor:
        """Paint where `inside` is above 0. Edges are one pixel soft."""
        return torch.lerp(picture, colors, (self.side * inside).clamp(0, 1))


def landscapes(n: int, side: int, seed: int) -> Tensor:
    """n random landscapes (n, 3, side, side) in [-1, 1]: sky, clouds, sun, three ridges, trees."""
    p = Painter(n, side, seed)
    picture = torch.lerp(p.color(0.1, 0.3, 0.6), p.color(0.7, 0.5, 0.4), p.y)
    clouds = 0.6 * p.waves(5, 4) + 0.4 * p.waves(16, 9) - p.uniform(0.55, 0.75)
    picture = p.paint(picture, clouds * 4 / side, p.color(0.75, 0.75, 0.75))
    radius = p.uniform(0.04, 0.1)
    from_sun = ((p.x - p.uniform(0, 1)) ** 2 + (p.y - p.uniform(0.1, 0.45)) ** 2).sqrt()
    picture = p.paint(picture, radius - from_sun, p.color(0.9, 0.75, 0.3))
    for k, land in enumerate([(0.3, 0.3, 0.45), (0.2, 0.35, 0.15), (0.35, 0.4, 0.1)]):
        edge = (p.uniform(0.35, 0.5) + 0.14 * k
                + 0.3 * (1 - 0.3 * k) * (p.waves(1, 4 + 3 * k, 1) - 0.5)
                + 0.04 * (p.waves(1, 24, 1) - 0.5))
        color = p.color(*land) * (0.6 + 0.3 * p.waves(12, 12) + 0.5 * p.waves(32, 16))
        picture = p.paint(picture, p.y - edge, color)
    for _ in range(6):
        at, foot, height = p.uniform(0, 1), p.uniform(0.6, 0.95), p.uniform(0.1, 0.22)
        off, up = (p.x - at).abs(), p.y - foot + height
        trunk = torch.minimum(0.012 - off, torch.minimum(foot - p.y, up))
        picture = p.paint(picture, trunk, p.color(0.2, 0.1, 0.0))
        crown = torch.minimum(up * 0.35 - off, foot - 0.3 * height - p.y)
        picture = p.paint(picture, crown, p.color(0.0, 0.15, 0.0))
    return (2 * picture - 1).clamp(-1, 1)


def to_pil(x: Tensor) -> Image.Image:
    """(3, H, W), black at -1 and white at 1."""
    x = ((x.clamp(-1, 1) + 1) * 127.5).round().byte()
    return Image.fromarray(x.permute(1, 2, 0).numpy())                  # 'c h w -> h w c'


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures (B, 3, H, W) in [-1, 1], the mean over B.

    It is 10 log10(2^2 / mean square error).
    """
    error = ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3))
    return float((-10 * error.log10()).mean())


def read_photo(path: str, f: int) -> Image.Image:
    """A photo on white, at most 512 wide and high, cropped at right and bottom to multiples of f.

    Raises UserError if it cannot be read or is smaller than f.
    """
    photo = on_white(read_image(path))
    photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
    if min(photo.size) < f:
        raise UserError(f"{path} is {photo.width}x{photo.height} (shrunk to 512 at most): it must"
                        f" be at least {f}x{f}")
    return photo.crop((0, 0, photo.width // f * f, photo.height // f * f))


# --- there and back ---

def sizes() -> None:
    """Stable Diffusion's own numbers, from networks without weights."""
    cfg = PRESETS["sd1"].vae
    with torch.device("meta"):
        vae = AutoencoderKL(cfg)
    whole, encoder, decoder = (sum(p.numel() for p in part.parameters())
                               for part in (vae, vae.encoder, vae.decoder))
    x = (3, 512, 512)
    z = (cfg.z_channels, 512 // cfg.downsampling, 512 // cfg.downsampling)
    print(f"Stable Diffusion 1: a picture {shape(x)} has {math.prod(x):,} numbers, its latent"
          f" {shape(z)} has {math.prod(z):,}: {math.prod(x) // math.prod(z)} times fewer")
    print(f"its autoencoder has {whole:,} parameters: encoder {encoder:,}, decoder {decoder:,}")
    work = multiply_adds(PRESETS["sd1"].unet, z[1]) / 1e9
    print(f"its UNet does {work:.0f} G multiply-adds for one step on that latent")


def shape(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def round_trip(sd: StableDiffusion, name: str, picture: Image.Image) -> list[Image.Image]:
    """Encode and decode, from the mode and from a sample.

    Returns the picture, its reconstruction, and two sketches of its latent.
    """
    x, z = pixels([picture]), sd.encode_image([picture]).cpu()
    noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(0))
    sample = sd.encode_image([picture], noise).cpu()
    (back,), (other,) = sd.decode_latents(z), sd.decode_latents(sample)
    sketch = best_rgb(z, x)
    print(f"{name}, {shape(x.shape[1:])} -> {shape(z.shape[1:])}:"
          f" PSNR {psnr(pixels([back]), x):.1f} dB from the mode,"
          f" {psnr(pixels([other]), x):.1f} from a sample; latents: mean {z.mean():.2f},"
          f" std {z.std():.2f}; a sample is {(sample - z).std():.3f} from the mode")
    print(f"   its best linear sketch against the picture shrunk to {z.shape[3]}x{z.shape[2]}:"
          f" PSNR {psnr(sketch, shrunk(x, z)):.1f} dB")
    return [picture, back, to_pil(first_three(z)[0]), to_pil(sketch[0])]


def first_three(z: Tensor) -> Tensor:
    """The lecture's sketch: z[0:3] of scaled latents (B, Z, h, w) as red, green, blue.

    Two standard deviations are black or white.
    """
    return z[:, :3] / 2


def best_rgb(z: Tensor, x: Tensor) -> Tensor:
    """The best sketch that one matrix makes of latents: (B, Z, h, w) -> (B, 3, h, w).

    The matrix takes a latent vector and a 1 to the colours of the pictures x, by least squares.
    """
    a = F.pad(z.movedim(1, -1), (0, 1), value=1.0)                      # 'b z h w -> b h w z+1'
    colors = shrunk(x, z).movedim(1, -1).flatten(0, 2)
    matrix = torch.linalg.lstsq(a.flatten(0, 2), colors).solution       # (Z + 1, 3)
    return (a @ matrix).movedim(-1, 1)


def shrunk(x: Tensor, z: Tensor) -> Tensor:
    """The picture at the size of its latent."""
    return F.adaptive_avg_pool2d(x, z.shape[2:])


# --- training ---

def make(f: int, vq: bool = False) -> Autoencoder:
    """A small autoencoder that learns much in few steps.

    Residual blocks start as the identity, convolutions orthogonal, the latents' noise small.
    """
    torch.manual_seed(0)
    levels = {2: 2, 4: 3, 8: 4, 16: 5}[f]
    cfg = VAEConfig(ch=8, ch_mult=(1, 2, 4, 4, 4)[:levels], num_res_blocks=1, z_channels=Z,
                    double_z=not vq, num_groups=2)
    net = VQModel(cfg, CODES) if vq else AutoencoderKL(cfg)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, ResnetBlock):
            zero_module(module.conv2)
        if isinstance(module, AttnBlock):
            zero_module(module.proj_out)
    if not vq:
        nn.init.constant_(net.quant_conv.bias[Z:].data, -4.0)  # log variance
    return net.to(memory_format=torch.channels_last)  # faster on a CPU


def reconstruct(net: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor]:
    """Reconstructions as in training, and what the regulariser adds to the loss."""
    if isinstance(net, VQModel):
        y, loss, _ = net(x)
        return y, loss
    mean, logvar = net.moments(x)
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return net.decoder(net.post_quant_conv(z)), 1e-6 * kl_divergence(mean, logvar)


def train(net: Autoencoder, pictures: Tensor, steps: int) -> Iterator[int]:
    """Adam on the mean square error and the regulariser. Yields the steps done, 0 first.

    At the end the scale factor is set so that latents have variance 1.
    """
    torch.manual_seed(0)
    if isinstance(net, VQModel):
        start_codes(net, pictures)
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 20, 2.02 - 2 * i / steps))
    for step in range(steps):
        yield step
        x = pictures[torch.randint(len(pictures), (4,))]
        if step % 2 == 1:
            x = x.flip(-1)
        y, regulariser = reconstruct(net, x)
        optimizer.zero_grad()
        ((y - x).square().mean() + regulariser).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        rate.step()
    if isinstance(net, AutoencoderKL):
        with torch.no_grad():
            net.config.scale_factor = 1 / float(net.moments(pictures[:64])[0].std())
    yield steps


@torch.no_grad()
def start_codes(net: VQModel, pictures: Tensor) -> None:
    """Start the codes at latents: a code that is never the nearest never learns."""
    z = net.quant_conv(net.encoder(pictures[:64])).movedim(1, -1).flatten(0, 2)
    net.quantize.embedding.weight.copy_(z[torch.randint(len(z), (CODES,))])


@torch.no_grad()
def look(net: Autoencoder, x: Tensor) -> tuple[Tensor, Tensor, str]:
    """Reconstructions without noise, latents (B, Z, h, w), and the state of the regulariser."""
    if isinstance(net, VQModel):
        codes = net(x)[2]
        z = net.quantize.embedding(codes).movedim(-1, 1)
        used = codes.unique().numel()
        return decode_codes(net, codes), z / z.std(), f"{used} of {CODES} codes in use"
    mean, logvar = net.moments(x)
    z, std = net.encode(x), (0.5 * logvar).exp().mean()
    about = (f"KL {kl_divergence(mean, logvar):.0f} nats, std of the latents {mean.std():.2f},"
             f" noise {std:.2f}")
    return net.decode(z), z, about


def decode_codes(net: VQModel, codes: Tensor) -> Tensor:
    """Numbers of codes (B, h, w) -> pictures. The codes are all that VQ keeps of a picture."""
    return net.decoder(net.post_quant_conv(net.quantize.embedding(codes).movedim(-1, 1)))


def learn(name: str, net: Autoencoder, pictures: Tensor, tests: Tensor, steps: int,
          every: int) -> Curve:
    """Train, and measure how well new pictures are reconstructed."""
    curve, start = [], time.perf_counter()
    for step in train(net, pictures, steps):
        if step % every == 0 or step == steps:
            y, _, about = look(net, tests)
            curve.append((step, psnr(y, tests)))
            if step in (0, steps // 4, steps // 2, steps):
                seconds = time.perf_counter() - start
                print(f"   {name:<11}{step:>4} steps, {seconds:>3.0f} s:"
                      f" PSNR {curve[-1][1]:.1f} dB, {about}")
    return curve


# --- what a small latent saves ---

def small_unet(channels: int = Z) -> UNetConfig:
    """Like Stable Diffusion's, a tenth as wide, without attention at full size."""
    return UNetConfig(in_channels=channels, out_channels=channels, model_channels=32,
                      transformer_depth=(0, 1, 1, 0), num_heads=(4, 4, 4, 4), context_dim=64,
                      num_groups=8)


def inputs(cfg: UNetConfig, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a time and a text."""
    x = torch.zeros(1, cfg.in_channels, side, side)
    return x, torch.zeros(1), torch.zeros(1, 77, cfg.context_dim)


def multiply_adds(cfg: UNetConfig, side: int) -> int:
    """Of one step on a latent side x side, counted without computing."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNetModel(cfg)(*inputs(cfg, side))
    return counter.get_total_flops() // 2


@torch.no_grad()
def seconds_per_step(unet: UNetModel, side: int) -> float:
    """The shortest of up to five, within about a second."""
    times = []
    while len(times) < 5 and sum(times) < 1:
        start = time.perf_counter()
        unet(*inputs(unet.config, side))
        times.append(time.perf_counter() - start)
    return min(times)


def trade_off(curves: dict[str, Curve], timed: tuple[int, ...]) -> None:
    """A table of what each f keeps and costs. f = 1 is diffusion on the pixels themselves."""
    side, unet = 256, UNetModel(small_unet()).eval()
    seconds = {f: seconds_per_step(unet, side // f) for f in sorted(timed, reverse=True)}
    print(f"\na {side}x{side} picture      numbers             PSNR of a small       one step of a"
          " small UNet\n"
          "   f   latent          kept    fewer    autoencoder, dB    G multiply-adds    seconds")
    for f in (1, 2, 4, 8, 16):
        z = (3 if f == 1 else Z, side // f, side // f)
        quality = "exact" if f == 1 else f"{curves[f'KL, f = {f}'][-1][1]:.1f}"
        work = multiply_adds(small_unet(z[0]), side // f) / 1e9
        took = f"{seconds[f]:.2f}" if f in seconds else "not run"
        numbers, fewer = math.prod(z), 3 * side**2 / math.prod(z)
        print(f"  {f:>2}   {shape(z):<13}{numbers:>8,}{fewer:>6.0f}x{quality:>15}{work:>20.1f}"
              f"{took:>15}")


# --- pages ---

def page(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its title, in 256 colours."""
    size = (max(part.width for _, part in parts), sum(part.height + 30 for _, part in parts))
    whole, top = Image.new("RGB", size, "white"), 0
    for title, part in parts:
        ImageDraw.Draw(whole).text((4, top + 10), title, "black", font_size=14)
        whole.paste(part, (0, top + 30))
        top += part.height + 30
    return whole.quantize(256, dither=Image.Dither.NONE)


@torch.no_grad()
def from_nothing(net: Autoencoder, z: Tensor) -> Tensor:
    """Decoded latents that come from no picture; shapes as z (B, Z, h, w).

    They are standard normal, or codes drawn uniformly.
    """
    g = torch.Generator().manual_seed(0)
    if isinstance(net, AutoencoderKL):
        return net.decode(torch.randn(z.shape, generator=g))
    return decode_codes(net, torch.randint(CODES, (len(z), *z.shape[2:]), generator=g))


def curves_plot(curves: dict[str, Curve]) -> Image.Image:
    """PSNR against steps, a line per autoencoder."""
    steps = max(step for curve in curves.values() for step, _ in curve)
    learned = [value for curve in curves.values() for _, value in curve[1:]]
    low, high = math.floor(min(learned)), math.ceil(max(learned))
    plot = Plot((0, 1.25 * steps), 390, "PSNR of new pictures, dB, against training steps",
                yspan=(low, high))
    for level in range(low + 1, high):
        plot.line([(0, level), (1.25 * steps, level)], "gainsboro")
        plot.pen.text(plot.at([(1.24 * steps, level)])[0], str(level), "gray", anchor="rb",
                      font_size=11)
    for step in (steps // 4, steps // 2, 3 * steps // 4, steps):
        plot.pen.text(plot.at([(step, low)])[0] - (0, 4), str(step), "gray", anchor="mb",
                      font_size=11)
    for (name, curve), color in zip(curves.items(), COLORS):
        plot.line(curve[1:], color, width=2)
        anchor = "lt" if name.startswith("VQ") else "lm"  # VQ's label would cover KL's
        plot.pen.text(plot.at([(1.01 * steps, curve[-1][1])])[0], name, color, anchor=anchor,
                      font_size=12)
    return plot.image


def main(args: Namespace) -> None:
    quick = args.quick
    sd = StableDiffusion.load(args.ckpt, dtype=torch.float32)
    if args.photo is None:
        name, photo = "a landscape", to_pil(landscapes(1, 128 if quick else 256, seed=5)[0])
    else:
        name, photo = "the photo", read_photo(args.photo, sd.preset.vae.downsampling)
    sizes()
    model = "the built-in model" if args.ckpt is None else args.ckpt
    print(f"\nround trips through {model}")
    trips = {name: photo}
    if args.ckpt is None:  # it was made for emoji: their latents have std 1
        trips["an emoji"] = sd.generate("a red apple", steps=2 if quick else 10)[0]
    trips = {name: round_trip(sd, name, picture) for name, picture in trips.items()}
    heads = ["the picture", "there and back", "z[0:3]", "best linear sketch"]
    side = max(1, round(180 * min(1, photo.height / photo.width)))
    title = (f"Through the autoencoder of {model}: f = {sd.preset.vae.downsampling},"
             f" {sd.preset.vae.z_channels} channels")
    top = (title, sheet(list(trips.values()), heads, list(trips), side=side))

    torch.set_num_threads(1)  # these networks gain nothing from more, and one is reproducible
    steps = 1 if quick else 160
    pictures = landscapes(32 if quick else 512, SIDE, seed=0)
    tests = landscapes(4 if quick else 16, SIDE, seed=1)
    nets, curves = train_all(pictures, tests, steps)
    trade_off(curves, timed=(8, 16) if quick else (2, 4, 8, 16))
    title = (f"Small autoencoders, {Z} channels, {steps} steps of training each, and pictures that"
             " are new to them")
    bottom = (title, reconstructions(nets, curves, tests, heads))
    save(page([top, bottom]), args.out / "latents.png")
    save(training_page(nets, curves, tests), args.out / "latents-training.png")


def train_all(pictures: Tensor, tests: Tensor,
              steps: int) -> tuple[dict[str, Autoencoder], dict[str, Curve]]:
    """The five autoencoders, trained, and their curves."""
    print(f"\nautoencoders trained on {len(pictures)} landscapes, 4 at a time, and tested on"
          f" {len(tests)} others")
    nets = {"KL, f = 2": make(2), "KL, f = 4": make(4), "VQ, f = 4": make(4, vq=True),
            "KL, f = 8": make(8), "KL, f = 16": make(16)}
    every = max(1, steps // 16)
    curves = {name: learn(name, net, pictures, tests, steps, every) for name, net in nets.items()}
    side, bits = SIDE // 4, math.log2(CODES)
    print(f"VQ, f = 4: the decoder needs {side} x {side} codes of {bits:.0f} bits,"
          f" {side**2 * bits / 8:.0f} bytes; the picture has {3 * SIDE**2:,}")
    return nets, curves


def reconstructions(nets: dict[str, Autoencoder], curves: dict[str, Curve], tests: Tensor,
                    heads: list[str]) -> Image.Image:
    """Two test pictures there and back, and the sketches of the first one's latents."""
    looks = [look(net, tests) for net in nets.values()]
    rows = [[to_pil(x) for x in (tests[i], *(y[i] for y, _, _ in looks))] for i in (0, 1)]
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    latents = [z for _, z, _ in looks]
    rows.append([blank, *(to_pil(first_three(z)[0]) for z in latents)])
    rows.append([blank, *(to_pil(best_rgb(z, tests)[0]) for z in latents)])
    titles = [f"{name}:  {curve[-1][1]:.1f} dB" for name, curve in curves.items()]
    return sheet(rows, [heads[0], *titles], [heads[1], *heads[1:]], side=122)


def training_page(nets: dict[str, Autoencoder], curves: dict[str, Curve],
                  tests: Tensor) -> Image.Image:
    """The curves, and what the decoders make of random latents."""
    columns = []
    for name in ("KL, f = 4", "VQ, f = 4"):
        _, z, _ = look(nets[name], tests)
        columns.append([to_pil(x) for x in from_nothing(nets[name], z[:3])])
    titles = ["KL, f = 4: normal latents", "VQ, f = 4: random codes"]
    dreams = sheet([list(row) for row in zip(*columns)], titles, side=128)
    return beside([curves_plot(curves), dreams],
                  "They learn to copy. Random latents give no picture: diffusion makes better ones")


if __name__ == "__main__":
    run(main, __doc__,
        photo={"metavar": "IMG", "help": "the picture of the round trip; default: a landscape"},
        ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"})
