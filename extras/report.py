"""One page that shows how a picture came about: python sd.py "a red apple" --report story.html

The page is one file: report.html with the data of a run in it. It needs no network and no library.

    report(sd, Path("story.html"), "a red apple", seed=3)     # draws, and writes the page

extras/recorder.py sees the run; `write_page` makes the file of it. Decoding six latents takes as
long as a step, so only MOST_DECODED of a kind are decoded, evenly along the way that they go. The
page shows the nearest and says so. It is bounded: MOST_MAPS bytes of maps, THUMBNAIL pixels.

Shapes: Z latent channels, h w the latents' size, h' w' that of a level of the UNet, T tokens of
context, G chips (a chip is a token, or the padding).
"""
import io
import json
import os
import shlex
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor, nn

from clip import Tokenizer
from extras import edit, prompts
from extras.attention_maps import capture_attention
from extras.files import atomic_write
from extras.options import FIELDS, flag, params_text
from extras.png_info import from_text
from extras.recorder import Frame, Recorder, spread
from model import UNetModel
from sampler import SAMPLERS
from sd import StableDiffusion

ROOT, TEMPLATE = Path(__file__).resolve().parents[1], Path(__file__).with_suffix(".html")
MOST_MAPS, THUMBNAIL = 7_500_000, 256
MOST_DECODED = {("x",): 3, ("guess",): 6, ("negative", "positive"): 2}  # steps
NOT_AGAIN = ("prompt", "prompts", "params_from", "trust", "n", "save", "captions", "batch_size")


def report(sd: StableDiffusion, path: Path, prompt: str, negative: str = "", seed: int = 0,
           text: str = "", ckpt: str | None = None, **options) -> Image.Image:
    """Draw the prompt, read as the command does, and write its page. Returns the picture.

    `text` stands beside the page, `ckpt` in its command. `options` are those of
    `StableDiffusion.resolve_options`. Raises UserError.
    """
    prompts.attach(sd)
    settings = sd.resolve_options(**options)
    recorder = Recorder(sd, [prompt], edit.run_sigmas(sd, settings, 1.0))
    with capture_attention(sd.unet, recorder.maps), recorder.watch():
        image = sd.generate(prompt, negative, seed, callback=recorder.step, **settings)[0]
    given = options | {"prompt": prompt, "negative": negative, "seed": seed, "ckpt": ckpt}
    write_page(recorder, 0, image, path, given, given | settings, text)
    return image


# --- the page ---

def write_page(recorder: Recorder, i: int, image: Image.Image, path: Path, given: dict,
               used: dict, text: str = "") -> None:
    """Write the page of picture `i`, whole or not at all. Raises UserError.

    `given` are the options that were asked for, `used` also those that the model chose.
    """
    folder = path.resolve().parent              # the page links to the code if it lies beside it
    home = Path(os.path.relpath(ROOT, folder)) if folder.is_relative_to(ROOT) else None
    data = page_data(recorder, i, image, used) | {"text": text, "home": home and home.as_posix()}
    data["command"] = command(given | {"report": path.name})
    content = json.dumps(data, separators=(",", ":"))   # ASCII: U+2028 and the like are escaped
    for sign in "<>&":                                  # no text can end the script tag
        content = content.replace(sign, f"\\u{ord(sign):04x}")
    with atomic_write(path) as temporary:
        temporary.write_text(TEMPLATE.read_text("utf-8").replace("__DATA__", content), "utf-8")


def page_data(recorder: Recorder, i: int, image: Image.Image, used: dict) -> dict:
    """All that the page shows of picture `i`, as report.html reads it."""
    sd, frames, size = recorder.sd, recorder.frames, list(recorder.last.shape[2:])
    matrices = frames[0].maps
    count = next(iter(matrices.values())).shape[2]
    tokens = chips(sd.text_encoders[0].tokenizer, recorder.texts[i], count)
    numbers = len(tokens) * sum(one.shape[1] for one in matrices.values())
    with_maps = spread(len(frames), max(1, MOST_MAPS // numbers))
    pictures, decoded = decode_some(sd, frames, i)
    steps = [{"t": sd.schedule.sigma_to_t(frame.sigma), "decoded": decoded[n],
              "maps": in_8_bits(by_chip(frame, i, tokens)) if n in with_maps else None}
             | step_data(frame, frames[max(0, n - 1)], i) for n, frame in enumerate(frames)]
    return {
        "prompt": recorder.texts[i], "negative": used["negative"], "guidance": used["guidance"],
        "settings": from_text(params_text(used))[2], "chips": tokens, "sigmas": recorder.sigmas,
        "size": image.size, "latent": size[::-1], "steps": steps, "pictures": pictures,
        "layers": [{"name": name, "size": level_size(one.shape[1], size)[::-1]}
                   for name, one in matrices.items()], "rows": unet_rows(sd.unet, size),
        "code": [where(SAMPLERS[used["sampler"]].sample), where(recorder.guide)],
        "final": webp(image, lossless=max(image.size) <= THUMBNAIL),
        "last": sketches(recorder.last[i:i + 1])[0]}


def step_data(frame: Frame, before: Frame, i: int) -> dict:
    """The numbers and sketches of a step. `gap`: how far apart the two guesses are, (1, h w)."""
    z = {name: value[i] for name, value in frame.latents.items()}
    gap = (z["positive"] - z["negative"]).norm(dim=0).view(1, -1) if "negative" in z else None
    return {
        "index": frame.index, "sigma": frame.sigma, "gap": gap if gap is None else in_8_bits([gap]),
        "moved": {name: float((z[name] - before.latents[name][i]).norm())
                  for name in ("x", "guess")},
        "sketch": dict(zip(z, sketches(torch.stack(list(z.values())))))}


def by_chip(frame: Frame, i: int, tokens: list[dict]) -> list[Tensor]:
    """The attention of each layer (G, h' w'): that of a chip's tokens is added."""
    one_hot = torch.zeros(len(tokens), sum(len(chip["places"]) for chip in tokens))    # (G, T)
    for row, chip in zip(one_hot, tokens):
        row[chip["places"]] = 1
    return [one_hot @ probs[i].T for probs in frame.maps.values()]


def command(options: dict) -> str:
    """The command with these options, for a POSIX shell; without those that are the default."""
    words = ["python", "sd.py", options["prompt"]]
    for name, one in FIELDS.items():
        value, group = options.get(name), one.metadata["group"]
        other = name in NOT_AGAIN or group in ("files", "hidden") and name != "report"
        if other or value is None or value == one.default:
            continue
        for text in value if isinstance(value, list) else [str(value)]:
            words += [f"{flag(name)}={text}"] if text[:1] == "-" else [flag(name), text]
        words = words[:-1] if value is True else words
    return shlex.join(words)


def where(thing: Callable) -> str:
    """The file and the name of a function: "sampler.py sample_euler"."""
    thing = getattr(thing, "func", thing)       # of a partial
    return f"{thing.__module__.replace('.', '/')}.py {thing.__qualname__.split('.<')[0]}"


def chips(tokenizer: Tokenizer, text: str, count: int) -> list[dict]:
    """The `count` tokens of a prompt in their order. The padding of a chunk is one chip."""
    pieces, found, kind = dict(prompts.places(tokenizer, text)), [], ""
    ids = prompts.chunks(tokenizer, [text], count // tokenizer.length)[0].flatten().tolist()
    for place, id in enumerate(ids):
        piece = shown = pieces[place].text if place in pieces else ""
        if place in pieces:
            plain = piece.removesuffix("</w>")  # bytes of other letters look odd
            kind, shown = "word", plain if plain.isascii() else text[slice(*pieces[place].span)]
        elif kind == "padding" and place % tokenizer.length:
            found[-1]["places"].append(place)
            continue
        elif place % tokenizer.length == 0:
            kind = "start"
        else:
            kind = "end" if kind in ("word", "start") else "padding"
        found.append({"kind": kind, "text": shown or kind, "piece": piece or kind, "id": id,
                      "places": [place]})
    return found


def in_8_bits(layers: list[Tensor]) -> dict:
    """Maps (G, n) one after the other, each from its least (0) to its greatest value (255)."""
    values, ranges = b"", []
    for maps in layers:
        least, most = maps.aminmax(dim=1, keepdim=True)
        scaled = (maps - least) / (most - least).clamp(min=1e-30) * 255
        values += scaled.round().byte().numpy().tobytes()
        ranges.append([[float(f"{end:.5g}") for end in row]
                       for row in torch.cat([least, most], 1).tolist()])
    return {"values": b64encode(values).decode(), "ranges": ranges}


def level_size(positions: int, size: list[int]) -> list[int]:
    """The size (h', w') of a level of the UNet: each Downsample halves the sides, rounded up."""
    while size[0] * size[1] > positions:
        size = [(side + 1) // 2 for side in size]
    return size


def unet_rows(unet: nn.Module, size: list[int]) -> list[dict]:
    """A row for each block in its order, and of a UNetModel the size and width that it gives."""
    rows, skips = [], []
    parts = [(f"{name}.{i}", one) for name, part in unet.named_children() for i, one in
             (enumerate(part) if isinstance(part, nn.ModuleList) else [("", part)])]
    for name, part in parts:
        kinds = [type(layer).__name__.removeprefix("Fast") for layer in part.children()]
        if name.startswith("input_blocks"):
            size = [(side + 1) // 2 for side in size] if "Downsample" in kinds else size
            skips.append(size)
        elif name.startswith("output_blocks"):
            skips.pop()
            size = skips[-1] if "Upsample" in kinds else size
        rows.append({"name": name.rstrip("."), "what": ", ".join(dict.fromkeys(kinds)),
                     "parameters": sum(p.numel() for p in part.parameters())})
        convs = [one for one in part.modules() if isinstance(one, nn.Conv2d)]
        if convs and isinstance(unet, UNetModel):
            rows[-1] |= {"size": size[::-1], "channels": convs[-1].out_channels}
    return rows


# --- pictures ---

def decode_some(sd: StableDiffusion, frames: list[Frame], i: int) -> tuple[list[str], list[dict]]:
    """Some latents of each kind as pictures. For each frame: kind -> (picture, its step)."""
    chosen, places = [], [{} for _ in frames]
    for names, most in MOST_DECODED.items():
        there = [n for n, frame in enumerate(frames) if names[0] in frame.latents]
        if not there:
            continue
        z = torch.stack([torch.stack([frames[n].latents[name][i] for name in names])
                         for n in there])
        way = F.pad((z[1:] - z[:-1]).flatten(1).norm(dim=1).cumsum(0), (1, 0))
        goals = way[-1] * (torch.arange(most) + 0.5) / most     # the middles of equal parts
        keys = (way - goals[:, None]).abs().argmin(1).unique()
        for n, k in zip(there, (way[:, None] - way[keys]).abs().argmin(1).tolist()):
            for j, name in enumerate(names):
                picture = len(chosen) + k * len(names) + j
                places[n][name] = picture, frames[there[keys[k]]].index
        chosen += z[keys].flatten(0, 1)
    return [webp(one) for one in decode(sd, torch.stack(chosen))], places


@torch.no_grad()
def decode(sd: StableDiffusion, z: Tensor) -> list[Image.Image]:
    """Latents (N, Z, h, w) -> pictures. On a CPU large latents are reduced to THUMBNAIL first."""
    rate = THUMBNAIL / sd.preset.vae.downsampling / max(z.shape[2:])
    if rate < 1 and sd.device.type == "cpu":    # nearest: a mean would take noise away
        z = F.interpolate(z, scale_factor=rate, mode="nearest-exact")
    z = z.to(sd.device, next(sd.vae.parameters()).dtype)
    parts = z.chunk(-(-z[:, 0].numel() // 640))     # small ones together, which is faster
    x = torch.cat([sd.vae.decode(part).float().nan_to_num() for part in parts])
    x = ((x / 2 + 0.5).clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)
    images = [Image.fromarray(one) for one in x.cpu().numpy()]
    return [ImageOps.contain(one, (THUMBNAIL, THUMBNAIL)) if max(one.size) > THUMBNAIL else one
            for one in images]


def sketches(z: Tensor) -> list[str]:
    """The first three channels of latents (N, Z, h, w) as bytes (h, w, 3): -3 is 0, 3 is 255."""
    rgb = ((z[:, [c % z.shape[1] for c in range(3)]] / 6 + 0.5).clamp(0, 1) * 255).round().byte()
    return [b64encode(one.tobytes()).decode() for one in rgb.permute(0, 2, 3, 1).numpy()]


def webp(image: Image.Image, lossless: bool = False) -> str:
    """The picture as WebP in base64."""
    file = io.BytesIO()
    image.save(file, "WEBP", lossless=lossless, quality=90, method=0)
    return b64encode(file.getvalue()).decode()
