"""Chapter 6, latents: an autoencoder makes the picture small, and diffusion runs in there.

    x (3, H, W)  -- encoder -->  z (Z, H/f, W/f)  -- decoder -->  x', as near to x as may be        Rombach et al. 2022, section 3.1
    KL    z = mean + std n,  loss + weight * 1/2 sum(mean^2 + std^2 - 1 - log std^2)                Kingma & Welling 2014, appendix B
    VQ    z = the nearest of K codes,  loss + |code - sg(z)|^2 + 1/4 |z - sg(code)|^2               van den Oord et al. 2017, equation 3
The lecture: Stable Diffusion has f = 8 and Z = 4, so 3 x 512 x 512 numbers become 4 x 64 x 64, and z[0:3], looked at as red, green and blue,
is a sketch of the picture. Here: a round trip, sketches, autoencoders of f = 2 to 16 trained equally long, and KL beside VQ. LDM's also learn
from a perceptual loss and a discriminator, for days: theirs are sharp. The repository has no photo: the script draws a landscape.

    python lecture/latents.py
    python lecture/latents.py --photo holiday.jpg --ckpt v1-5-pruned-emaonly.safetensors
"""
import math
import time
from argparse import Namespace
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from draw import Plot, UserError, beside, run, save, sheet
from model import UNetConfig, UNetModel, zero
from sd import PRESETS, StableDiffusion, on_white, pixels, read_image
from vae import AttnBlock, AutoencoderKL, ResnetBlock, VAEConfig, VQModel, kl_divergence

Z, CODES, SIDE = 4, 512, 64  # of the autoencoders trained here: latent channels, length of the codebook; side of their pictures
COLORS = ("seagreen", "royalblue", "darkorange", "crimson", "purple")


# --- pictures ---

def landscapes(n: int, side: int, seed: int) -> Tensor:
    """n pictures (n, 3, side, side) in [-1, 1]: sky, clouds, sun, three ridges, trees, each where chance puts it."""
    g = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")

    def chance(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, 1, 1, 1, generator=g)

    def color(*rgb: float) -> Tensor:
        return torch.tensor(rgb)[:, None, None] + 0.25 * torch.rand(n, 3, 1, 1, generator=g)

    def waves(rows: int, columns: int, height: int = side) -> Tensor:
        return F.interpolate(torch.rand(n, 1, rows, columns, generator=g), size=(height, side), mode="bicubic")

    def paint(inside: Tensor, colors: Tensor) -> Tensor:
        return torch.lerp(picture, colors, (side * inside).clamp(0, 1))  # edges one pixel soft

    picture = torch.lerp(color(0.1, 0.3, 0.6), color(0.7, 0.5, 0.4), y)
    picture = paint((0.6 * waves(5, 4) + 0.4 * waves(16, 9) - chance(0.55, 0.75)) * 4 / side, color(0.75, 0.75, 0.75))
    picture = paint(chance(0.04, 0.1) - ((x - chance(0, 1)) ** 2 + (y - chance(0.1, 0.45)) ** 2).sqrt(), color(0.9, 0.75, 0.3))
    for k, land in enumerate([(0.3, 0.3, 0.45), (0.2, 0.35, 0.15), (0.35, 0.4, 0.1)]):
        edge = chance(0.35, 0.5) + 0.14 * k + 0.3 * (1 - 0.3 * k) * (waves(1, 4 + 3 * k, 1) - 0.5) + 0.04 * (waves(1, 24, 1) - 0.5)
        picture = paint(y - edge, color(*land) * (0.6 + 0.3 * waves(12, 12) + 0.5 * waves(32, 16)))
    for _ in range(6):
        at, foot, height = chance(0, 1), chance(0.6, 0.95), chance(0.1, 0.22)
        picture = paint(torch.minimum(0.012 - (x - at).abs(), torch.minimum(foot - y, y - foot + height)), color(0.2, 0.1, 0.0))
        picture = paint(torch.minimum((y - foot + height) * 0.35 - (x - at).abs(), foot - 0.3 * height - y), color(0.0, 0.15, 0.0))
    return (2 * picture - 1).clamp(-1, 1)


def to_pil(x: Tensor) -> Image.Image:
    """(3, H, W), black at -1 and white at 1."""
    return Image.fromarray(((x.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())  # 'c h w -> h w c'


def psnr(a: Tensor, b: Tensor) -> float:
    """Peak signal-to-noise ratio of pictures (B, 3, H, W) in [-1, 1], in dB, averaged over them: 10 log10(2^2 / mean square error)."""
    return float((-10 * ((a.clamp(-1, 1) - b) / 2).square().mean((1, 2, 3)).log10()).mean())


def read_photo(path: str, f: int) -> Image.Image:
    """On white, at most 512 wide and high, cut at the right and below to multiples of f."""
    photo = on_white(read_image(path))
    photo.thumbnail((512, 512), Image.Resampling.LANCZOS)
    if min(photo.size) < f:
        raise UserError(f"{path} is {photo.width}x{photo.height} (brought to 512 at most): at least {f}x{f} is needed")
    return photo.crop((0, 0, photo.width // f * f, photo.height // f * f))


# --- there and back ---

def sizes() -> None:
    """Stable Diffusion's own numbers, from networks without weights."""
    cfg = PRESETS["sd1"].vae
    with torch.device("meta"):
        vae = AutoencoderKL(cfg)
    whole, encoder, decoder = (sum(p.numel() for p in part.parameters()) for part in (vae, vae.encoder, vae.decoder))
    x, z = (3, 512, 512), (cfg.z_channels, 512 // cfg.downsampling, 512 // cfg.downsampling)
    print(f"Stable Diffusion 1: a picture {shape(x)} has {math.prod(x):,} numbers, its latent {shape(z)} has {math.prod(z):,}: "
          f"{math.prod(x) // math.prod(z)} times fewer")
    print(f"its autoencoder has {whole:,} parameters: encoder {encoder:,}, decoder {decoder:,}")
    print(f"its UNet does {multiply_adds(PRESETS['sd1'].unet, z[1]) / 1e9:.0f} G multiply-adds for one step on that latent")


def shape(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))


def round_trip(sd: StableDiffusion, name: str, picture: Image.Image) -> list[Image.Image]:
    """Encode and decode by the mode and by a sample; the picture, its reconstruction, and two sketches of its latent."""
    x, z = pixels([picture]), sd.encode_image([picture]).cpu()
    sample = sd.encode_image([picture], torch.randn(z.shape, generator=torch.Generator().manual_seed(0))).cpu()
    (back,), (other,) = sd.decode_latents(z), sd.decode_latents(sample)
    sketch = best_rgb(z, x)
    print(f"{name}, {shape(x.shape[1:])} -> {shape(z.shape[1:])}: PSNR {psnr(pixels([back]), x):.1f} dB by the mode, {psnr(pixels([other]), x):.1f} "
          f"by a sample; latents: mean {z.mean():.2f}, std {z.std():.2f}; a sample is {(sample - z).std():.3f} from the mode")
    print(f"   its best linear sketch and the picture shrunk to {z.shape[3]}x{z.shape[2]}: PSNR {psnr(sketch, shrunk(x, z)):.1f} dB")
    return [picture, back, to_pil(first_three(z)[0]), to_pil(sketch[0])]


def first_three(z: Tensor) -> Tensor:
    """The lecture's sketch: z[0:3] of scaled latents (B, Z, h, w) as red, green, blue; two standard deviations are black or white."""
    return z[:, :3] / 2


def best_rgb(z: Tensor, x: Tensor) -> Tensor:
    """The best sketch that one matrix makes: latents (B, Z, h, w) and a 1 -> colours (B, 3, h, w) of the pictures x, by least squares."""
    a = F.pad(z.movedim(1, -1), (0, 1), value=1.0)                                                # 'b z h w -> b h w z+1'
    matrix = torch.linalg.lstsq(a.flatten(0, 2), shrunk(x, z).movedim(1, -1).flatten(0, 2)).solution  # (Z + 1, 3)
    return (a @ matrix).movedim(-1, 1)


def shrunk(x: Tensor, z: Tensor) -> Tensor:
    """The picture as small as its latent."""
    return F.adaptive_avg_pool2d(x, z.shape[2:])


# --- training ---

def make(f: int, vq: bool = False) -> AutoencoderKL | VQModel:
    """A small autoencoder, so begun that a few steps teach it much: residual blocks as the identity, convolutions orthogonal, little noise."""
    torch.manual_seed(0)
    levels = {2: 2, 4: 3, 8: 4, 16: 5}[f]
    cfg = VAEConfig(ch=8, ch_mult=(1, 2, 4, 4, 4)[:levels], num_res_blocks=1, z_channels=Z, double_z=not vq, num_groups=2)
    net = VQModel(cfg, CODES) if vq else AutoencoderKL(cfg)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.orthogonal_(module.weight)
            nn.init.zeros_(module.bias)
    for module in net.modules():
        if isinstance(module, (ResnetBlock, AttnBlock)):
            zero(module.conv2 if isinstance(module, ResnetBlock) else module.proj_out)
    if not vq:
        nn.init.constant_(net.quant_conv.bias[Z:].data, -4.0)  # log variance
    return net.to(memory_format=torch.channels_last)  # faster on a CPU


def reconstruct(net: AutoencoderKL | VQModel, x: Tensor) -> tuple[Tensor, Tensor]:
    """Pictures as the decoder gives them while training, and what the regulariser adds to the loss."""
    if isinstance(net, VQModel):
        return net(x)[:2]
    mean, logvar = net.moments(x)
    z = mean + (0.5 * logvar).exp() * torch.randn_like(mean)
    return net.decoder(net.post_quant_conv(z)), 1e-6 * kl_divergence(mean, logvar)


def train(net: AutoencoderKL | VQModel, pictures: Tensor, steps: int) -> Iterator[int]:
    """Adam on the mean square error and the regulariser; yields the number of steps done, 0 first. Ends with latents scaled to variance 1."""
    torch.manual_seed(0)
    if isinstance(net, VQModel):  # a code that is never the nearest never learns: let all start where latents are
        with torch.no_grad():
            z = net.quant_conv(net.encoder(pictures[:64])).movedim(1, -1).flatten(0, 2)
            net.quantize.embedding.weight.copy_(z[torch.randint(len(z), (CODES,))])
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: min(1, (i + 1) / 20, 2.02 - 2 * i / steps))
    for step in range(steps):
        yield step
        x = pictures[torch.randint(len(pictures), (4,))]
        x = x.flip(-1) if step % 2 else x
        y, regulariser = reconstruct(net, x)
        optimizer.zero_grad()
        ((y - x).square().mean() + regulariser).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    if isinstance(net, AutoencoderKL):
        with torch.no_grad():
            net.cfg.scale_factor = 1 / float(net.moments(pictures[:64])[0].std())
    yield steps


@torch.no_grad()
def look(net: AutoencoderKL | VQModel, x: Tensor) -> tuple[Tensor, Tensor, str]:
    """Pictures there and back without noise, their latents (B, Z, h, w), and how the regulariser fares."""
    if isinstance(net, VQModel):
        codes = net(x)[2]
        z = net.quantize.embedding(codes).movedim(-1, 1)
        return decode_codes(net, codes), z / z.std(), f"{codes.unique().numel()} of {CODES} codes in use"
    mean, logvar = net.moments(x)
    z = net.encode(x)
    return net.decode(z), z, f"KL {kl_divergence(mean, logvar):.0f} nats, latents' std {mean.std():.2f}, noise {(0.5 * logvar).exp().mean():.2f}"


def decode_codes(net: VQModel, codes: Tensor) -> Tensor:
    """Numbers of codes (B, h, w) -> pictures: all that VQ keeps of a picture."""
    return net.decoder(net.post_quant_conv(net.quantize.embedding(codes).movedim(-1, 1)))


def learn(name: str, net: AutoencoderKL | VQModel, pictures: Tensor, tests: Tensor, steps: int, every: int) -> list[tuple[int, float]]:
    """Train, and tell how well new pictures come back: (step, PSNR)."""
    curve, start = [], time.perf_counter()
    for step in train(net, pictures, steps):
        if step % every == 0 or step == steps:
            y, _, told = look(net, tests)
            curve.append((step, psnr(y, tests)))
            if step in (0, steps // 4, steps // 2, steps):
                print(f"   {name:<11}{step:>4} steps, {time.perf_counter() - start:>3.0f} s: PSNR {curve[-1][1]:.1f} dB, {told}")
    return curve


# --- what a small latent saves ---

def small_unet(channels: int = Z) -> UNetConfig:
    """As Stable Diffusion's, a tenth as wide, and with no attention at full size."""
    return UNetConfig(in_channels=channels, out_channels=channels, model_channels=32, transformer_depth=(0, 1, 1, 0), num_heads=(4, 4, 4, 4),
                      context_dim=64, num_groups=8)


def inputs(cfg: UNetConfig, side: int) -> tuple[Tensor, Tensor, Tensor]:
    """A latent, a time and a text."""
    return torch.zeros(1, cfg.in_channels, side, side), torch.zeros(1), torch.zeros(1, 77, cfg.context_dim)


def multiply_adds(cfg: UNetConfig, side: int) -> int:
    """Of one step on a latent side x side, counted without computing."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        UNetModel(cfg)(*inputs(cfg, side))
    return counter.get_total_flops() // 2


@torch.no_grad()
def seconds_per_step(unet: UNetModel, side: int) -> float:
    """The least of up to five, as long as they fit a second."""
    times = []
    while len(times) < 5 and sum(times) < 1:
        start = time.perf_counter()
        unet(*inputs(unet.cfg, side))
        times.append(time.perf_counter() - start)
    return min(times)


def trade_off(curves: dict[str, list[tuple[int, float]]], timed: tuple[int, ...]) -> None:
    """One table: what each f keeps and what it costs; f = 1 is diffusion on the pixels themselves."""
    side, unet = 256, UNetModel(small_unet()).eval()
    seconds = {f: seconds_per_step(unet, side // f) for f in sorted(timed, reverse=True)}
    print(f"\na {side}x{side} picture      numbers             PSNR of a small       one step of a small UNet\n"
          f"   f   latent          kept    fewer    autoencoder, dB    G multiply-adds    seconds")
    for f in (1, 2, 4, 8, 16):
        z = (3 if f == 1 else Z, side // f, side // f)
        quality, work = "exact" if f == 1 else f"{curves[f'KL, f = {f}'][-1][1]:.1f}", multiply_adds(small_unet(z[0]), side // f) / 1e9
        print(f"  {f:>2}   {shape(z):<13}{math.prod(z):>8,}{3 * side**2 / math.prod(z):>6.0f}x{quality:>15}{work:>20.1f}"
              f"{f'{seconds[f]:.2f}' if f in seconds else 'not run':>15}")


# --- pictures of it all ---

def page(parts: list[tuple[str, Image.Image]]) -> Image.Image:
    """Pictures below each other, each under its title, in 256 colours."""
    whole = Image.new("RGB", (max(part.width for _, part in parts), sum(part.height + 30 for _, part in parts)), "white")
    top = 0
    for title, part in parts:
        ImageDraw.Draw(whole).text((4, top + 10), title, "black", font_size=14)
        whole.paste(part, (0, top + 30))
        top += part.height + 30
    return whole.quantize(256, dither=Image.Dither.NONE)


@torch.no_grad()
def from_nothing(net: AutoencoderKL | VQModel, z: Tensor) -> Tensor:
    """What the decoder makes of latents without a picture: standard normal ones, or codes drawn evenly. Shapes as z (B, Z, h, w)."""
    g = torch.Generator().manual_seed(0)
    if isinstance(net, AutoencoderKL):
        return net.decode(torch.randn(z.shape, generator=g))
    return decode_codes(net, torch.randint(CODES, (len(z), *z.shape[2:]), generator=g))


def curves_plot(curves: dict[str, list[tuple[int, float]]]) -> Image.Image:
    """PSNR against steps, a line per autoencoder."""
    steps, learned = max(step for curve in curves.values() for step, _ in curve), [value for curve in curves.values() for _, value in curve[1:]]
    low, high = math.floor(min(learned)), math.ceil(max(learned))
    plot = Plot((0, 1.25 * steps), 390, "PSNR of new pictures, dB, against training steps", yspan=(low, high))
    for level in range(low + 1, high):
        plot.line([(0, level), (1.25 * steps, level)], "gainsboro")
        plot.pen.text(plot.at([(1.24 * steps, level)])[0], str(level), "gray", anchor="rb", font_size=11)
    for step in (steps // 4, steps // 2, 3 * steps // 4, steps):
        plot.pen.text(plot.at([(step, low)])[0] - (0, 4), str(step), "gray", anchor="mb", font_size=11)
    for (name, curve), color in zip(curves.items(), COLORS):
        plot.line(curve[1:], color, width=2)
        plot.pen.text(plot.at([(1.01 * steps, curve[-1][1])])[0], name, color, anchor="lt" if name[0] == "V" else "lm", font_size=12)
    return plot.image


def main(args: Namespace) -> None:
    quick = args.quick
    sd = StableDiffusion.load(args.ckpt, dtype=torch.float32)
    f = sd.config.vae.downsampling
    photo = to_pil(landscapes(1, 64 if quick else 256, seed=5)[0]) if args.photo is None else read_photo(args.photo, f)
    sizes()

    print(f"\nround trips through {'the built-in model' if args.ckpt is None else args.ckpt}")
    trips = {"a landscape" if args.photo is None else "the photo": photo}
    if args.ckpt is None:  # made for emoji: on its own kind its latents have std 1
        trips["an emoji"] = sd.generate("a red apple", steps=2 if quick else 10)[0]
    trips = {name: round_trip(sd, name, picture) for name, picture in trips.items()}

    torch.set_num_threads(1)  # the nets below are too small to gain from more, and one thread gives the same numbers everywhere
    steps, pictures, tests = (1, 32, 4) if quick else (160, 512, 16)
    pictures, tests = landscapes(pictures, SIDE, seed=0), landscapes(tests, SIDE, seed=1)
    print(f"\nautoencoders trained on {len(pictures)} landscapes, 4 at a time, and tried on {len(tests)} others")
    nets = {"KL, f = 2": make(2), "KL, f = 4": make(4), "VQ, f = 4": make(4, vq=True), "KL, f = 8": make(8), "KL, f = 16": make(16)}
    curves = {name: learn(name, net, pictures, tests, steps, every=max(1, steps // 16)) for name, net in nets.items()}
    print(f"VQ, f = 4: {SIDE // 4} x {SIDE // 4} codes of {math.log2(CODES):.0f} bits, {(SIDE // 4)**2 * math.log2(CODES) / 8:.0f} bytes, "
          f"are all the decoder needs; the picture has {3 * SIDE**2:,}")
    trade_off(curves, timed=(8, 16) if quick else (2, 4, 8, 16))

    heads, model = ["the picture", "there and back", "z[0:3]", "best linear sketch"], "the built-in model" if args.ckpt is None else args.ckpt
    looks = [look(net, tests) for net in nets.values()]
    rows = [[to_pil(x) for x in (tests[i], *(y[i] for y, _, _ in looks))] for i in (0, 1)]
    blank = Image.new("RGB", (SIDE, SIDE), "white")
    rows += [[blank, *(to_pil(sketch[0]) for sketch in sketches)] for sketches in zip(*((first_three(z), best_rgb(z, tests)) for _, z, _ in looks))]
    names = [f"{name}:  {curve[-1][1]:.1f} dB" for name, curve in curves.items()]
    save(page([(f"Through the autoencoder of {model}: f = {f}, {sd.config.vae.z_channels} channels",
                sheet(list(trips.values()), heads, list(trips), side=max(1, round(180 * min(1, photo.height / photo.width))))),
               (f"Small autoencoders, {Z} channels, {steps} steps of training each, and pictures they have not seen",
                sheet(rows, [heads[0], *names], [heads[1], heads[1], *heads[2:]], side=122))]),
         args.out / "latents.png")
    dreams = zip(*([to_pil(x) for x in from_nothing(nets[name], looks[i][1][:3])] for i, name in ((1, "KL, f = 4"), (2, "VQ, f = 4"))))
    save(beside([curves_plot(curves), sheet(list(dreams), ["KL, f = 4: normal latents", "VQ, f = 4: random codes"], side=128)],
                "They learn to copy; latents that come from no picture give none. Those are diffusion's work"), args.out / "latents-training.png")


if __name__ == "__main__":
    run(main, __doc__, photo={"metavar": "IMG", "help": "the picture of the round trip; default: a drawn landscape"},
        ckpt={"help": "an SD 1.x file or one of train.py; default: the built-in model"})
