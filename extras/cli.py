"""The command: python sd.py "a red apple".

options.py declares what can be asked. `main` loads the model, draws in batches, and writes
pictures, GIFs and attention maps.
"""
import os

# How often a waiting thread checks for the others before it sleeps. torch reads it when it is
# imported. The default of 300,000 keeps the others from their core when another program computes
# there too: a picture of the built-in model took 32 s instead of 1.9 on 2 busy cores, and 1.5
# either way on 2 idle ones.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import json
import math
import re
import sys
import warnings
from contextlib import ExitStack
from dataclasses import asdict
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

try:
    import torch  # it takes a second, in which Ctrl-C may come
except KeyboardInterrupt:
    sys.exit("sd.py: stopped")
from PIL import Image
from tqdm import tqdm

from extras import edit, int8, lowmem, prompts
from extras.attention_maps import AttentionStore, Word, capture_attention, chosen_words, overlay
from extras.deepcache import deepcache
from extras.files import atomic_write, check_new, make_folder, open_tensors, read_image
from extras.formats import load_model as load_parts
from extras.formats import save
from extras.lora import apply_lora
from extras.lora_tags import common_tags, find_file, find_tags
from extras.nan import explain_nan
from extras.options import DTYPES, SMALL, Options, flag, params_text, parse
from extras.png_info import png_chunk
from extras.recorder import Recorder
from extras.report import write_page
from extras.terminal import printable, tolerant_streams
from extras.textual_inversion import add_embedding
from sampler import Step
from sd import BUILTIN, StableDiffusion, UserError, best_device_and_dtype, num_steps

OFFICIAL = "stable-diffusion-v1-5/stable-diffusion-v1-5"


# --- the command ---

def main(words: list[str] | None = None) -> int:
    """Run the command and return its exit status: 0, 2 after an error, 130 after Ctrl-C."""
    with tolerant_streams(), warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: say(message)
        try:
            run(parse(sys.argv[1:] if words is None else words))
        except UserError as error:
            say(error)
            return 2
        except KeyboardInterrupt:
            say("stopped")
            return 130
        except OSError as error:    # a name of 300 characters, a folder that cannot be read
            say(f"cannot open {error.filename or 'a file'}: {error.strerror or error}")
            return 2
        except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
            if not out_of_memory(error):
                raise
            say("out of memory: try --lowmem, a smaller --width and --height, --batch-size 1, or "
                "--dtype fp16")
            return 2
    return 0


def say(message: object) -> None:
    """A line on stderr, above the progress bar if there is one."""
    tqdm.write(f"sd.py: {printable(message)}", file=sys.stderr)


def out_of_memory(error: BaseException) -> bool:
    """A GPU's is an error of its own class; the CPU's is a RuntimeError with one of these texts."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return any(text in str(error) for text in ("can't allocate memory", "not enough memory"))


def run(o: Options) -> None:
    check_options(o)
    if o.captions:
        print_captions(o.ckpt)
        return
    if o.prompt is None and o.prompts is None and o.save is None:
        raise UserError('the following arguments are required: prompt, such as "a red apple"')
    if o.save is not None:
        save_model(o)
    if o.prompt is not None or o.prompts is not None:
        draw_all(o)


def print_captions(ckpt: str | None) -> None:
    """The captions in the file's metadata; the built-in model's without style, behind a comma."""
    path = BUILTIN if ckpt is None else Path(model_path(ckpt))
    metadata = open_tensors(path)[1]
    if "captions" not in metadata:
        raise UserError(f"{path} does not say what it was trained on")
    captions = {printable(caption) for caption in captions_of(path, metadata)}
    if ckpt is not None:
        print("\n".join(sorted(captions)))
        return
    names, _, styles = zip(*(caption.rpartition(", ") for caption in captions))
    print("\n".join(sorted(set(names))))
    say(f"each also with a style behind a comma: {', '.join(sorted(set(styles)))}")


def captions_of(path: Path, metadata: dict[str, str]) -> list[str]:
    """The captions that train.py writes into a file's metadata. Raises UserError."""
    try:
        captions = json.loads(metadata["captions"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: captions in the metadata are damaged: {error}") from error
    if not isinstance(captions, list) or not all(isinstance(one, str) for one in captions):
        raise UserError(f"{path}: captions in the metadata are no list of texts")
    return captions


def save_model(o: Options) -> None:
    """Read the model on the CPU, in the precision it is written in, and write it."""
    path = Path(o.save)
    make_folder(path.parent)
    check_new(path)
    dtype = DTYPES["fp16" if o.dtype is None else o.dtype]
    if o.embedding:
        say("learned words are not part of a model's file: give --embedding again when drawing")
    save(load_model(o, "cpu", dtype, fast=False), path, dtype)
    print(path)


def load_model(o: Options, device: str, dtype: torch.dtype, fast: bool) -> StableDiffusion:
    """The model with its LoRAs and learned words."""
    path = None if o.ckpt is None else model_path(o.ckpt)
    if o.vae is None and o.unet is None:
        sd = StableDiffusion.load(path, device, dtype, o.preset, o.prediction, fast)
    else:
        sd = load_parts(StableDiffusion, path, device, dtype, o.preset, o.prediction, fast, o.vae,
                        o.unet)
    prompts.attach(sd)
    clip_skip(sd, o)
    for lora in o.lora or []:
        file, scale = split_scale(lora)
        apply_lora(sd, lora_path(file), scale)
    texts = asked_prompts(o)
    apply_tags(sd, o, texts)
    for embedding in o.embedding or []:
        tell_words(Path(embedding), add_embedding(sd, embedding), [*texts, o.negative])
    return sd


def asked_prompts(o: Options) -> list[str]:
    if o.prompts is not None:
        return read_prompts(Path(o.prompts))
    return [] if o.prompt is None else [o.prompt]


def clip_skip(sd: StableDiffusion, o: Options) -> None:
    """--clip-skip, or that of a picture of A1111, which takes it for SD 1.x only."""
    if o.clip_skip is None and o.clip_skip_sd1 is not None:
        if any(encoder.config.clip_skip or encoder.config.openclip
               for encoder in prompts.clip_encoders(sd)):
            say(f"Clip skip: {o.clip_skip_sd1} is left out, as A1111 does for SD 2.x and SDXL")
        else:
            o.clip_skip = o.clip_skip_sd1
    if o.clip_skip is not None:
        prompts.set_clip_skip(sd, o.clip_skip)


def split_scale(lora: str) -> tuple[str, float]:
    """FILE[:SCALE] -> FILE and the scale; 1 if there is none."""
    file, _, scale = lora.rpartition(":")
    try:
        value = float(scale)
    except ValueError:
        return lora, 1.0
    if file == "" or "_" in scale or not math.isfinite(value):
        return lora, 1.0
    return file, value


def apply_tags(sd: StableDiffusion, o: Options, texts: list[str]) -> None:
    """The LoRAs that the prompts name, as <lora:name:1>."""
    if find_tags(o.negative):
        say("<lora:...> does nothing in the negative prompt: move it to the prompt")
    tags = common_tags(texts)
    if tags and o.lora_dir is None:
        say(f"{', '.join(tag.text for tag in tags)}: left out, as --lora-dir FOLDER does not say "
            "where the file is")
        return
    for tag in tags:
        apply_lora(sd, find_file(Path(o.lora_dir), tag), tag.scale, tag.text_scale)


def tell_words(path: Path, words: list[str], texts: list[str]) -> None:
    """Which words a file brought, and whether a prompt has one of them."""
    used = [word for word in words
            if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", "\n".join(texts), re.IGNORECASE)]
    what = "which the prompt has" if used else "and the prompt has none of them: write one into it"
    say(f"{path.name} brings {', '.join(dict.fromkeys(words))}, {what}")


def model_path(ckpt: str) -> str:
    """A folder of train.py stands for the model in it."""
    folder = Path(ckpt)
    if not folder.is_dir() or (folder / "model_index.json").exists():
        return ckpt
    if (folder / "model.safetensors").exists():
        return str(folder / "model.safetensors")
    if (folder / "lora.safetensors").exists():
        raise UserError(f"{ckpt} holds a LoRA and no model: give it as --lora {ckpt}")
    return ckpt


def lora_path(lora: str) -> str:
    """A folder of train.py stands for the LoRA in it; one of peft stays as it is."""
    folder = Path(lora)
    if lora != "" and not folder.exists() and Path(f"{lora}.safetensors").is_file():
        return f"{lora}.safetensors"
    if lora == "" or not folder.is_dir() or (folder / "adapter_config.json").exists():
        return lora
    if not (folder / "lora.safetensors").exists():
        raise UserError(f"{lora} holds no LoRA: neither lora.safetensors nor peft's "
                        "adapter_config.json")
    return str(folder / "lora.safetensors")


def pick_device(device: str | None) -> str | None:
    """Under torchrun each process has a GPU of its own."""
    if device in (None, "cuda") and "LOCAL_RANK" in os.environ and torch.cuda.is_available():
        return f"cuda:{os.environ['LOCAL_RANK']}"
    return device


# --- what is asked ---

class Job(NamedTuple):
    """One picture to draw."""
    prompt: str
    seed: int
    path: Path


def check_options(o: Options) -> None:
    """Raises UserError, before any work, for options that are out of range or do not fit."""
    try:
        f"{o.prompt} {o.negative}".encode()
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not valid UTF-8") from error
    for name in "ckpt", "vae", "unet", "init", "mask", "prompts", "attn":
        if getattr(o, name) == "":
            raise UserError(f"{flag(name)} is empty: give a file or folder, or leave it out")
    needs = {"strength": "init", "mask": "init", "image_guidance": "init", "words": "attn",
             "preset": "ckpt", "vae": "ckpt", "unet": "ckpt"}
    for name, needed in needs.items():
        if getattr(o, name) is not None and getattr(o, needed) is None:
            raise UserError(f"{flag(name)} means nothing without {flag(needed)}: give that too")
    for name in "batch", "n", "batch_size", "scale":
        value = getattr(o, name)
        if value is not None and value < 1:
            raise UserError(f"{flag(name)} must be at least 1, not {value}")
    if o.deepcache is not None and o.deepcache < 1:
        raise UserError("the deep blocks must be computed at every step (1), every second (2) or "
                        f"the like, not {o.deepcache}")
    if not 0 <= o.seed < 2**63:
        raise UserError(f"the seed must lie between 0 and 2^63, not {o.seed}")
    if o.scale > 1 and o.gif is None and o.attn is None:
        raise UserError("--scale means nothing without --gif or --attn: give one of them too")
    for name in "prompt", "gif", "attn", "report":
        if o.prompts is not None and getattr(o, name) is not None:
            shown = name if name == "prompt" else flag(name)
            raise UserError(f"--prompts does not go with {shown}: leave one of them out")
    if o.grid is not None and ranks()[1] > 1:
        raise UserError("--grid does not go with torchrun: each process draws some of the pictures")


def ranks() -> tuple[int, int]:
    """This process' number and how many there are, as torchrun sets them."""
    try:
        rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    except ValueError as error:
        raise UserError("RANK and WORLD_SIZE must be numbers, as torchrun sets them: unset "
                        f"them ({error})") from error
    if not 0 <= rank < world:
        raise UserError(f"RANK {rank} does not lie below WORLD_SIZE {world}: unset them")
    return rank, world


def make_jobs(o: Options) -> list[Job]:
    """The pictures asked for, in the order of their seeds, which are consecutive.

    Raises UserError, before any work, if they cannot be written.
    """
    if o.prompts is None:
        first = Path(file_name(o.prompt) if o.out is None else o.out)
        paths = output_paths("--out", first, ".png", o.seed, o.n)
        return [Job(o.prompt, o.seed + i, path) for i, path in enumerate(paths)]
    folder = Path("pictures" if o.out is None else o.out)
    make_folder(folder)
    jobs = []
    for i, line in enumerate(read_prompts(Path(o.prompts))):
        seed = o.seed + i * o.n
        paths = numbered(folder / f"{i:04d}-{file_name(line)}", seed, o.n)
        jobs += [Job(line, seed + j, path) for j, path in enumerate(paths)]
    rank, world = ranks()
    return jobs[rank * len(jobs) // world:(rank + 1) * len(jobs) // world]


def read_prompts(path: Path) -> list[str]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the prompts in {path}: {error}") from error
    lines = [line.strip() for line in lines if line.strip()]
    if not lines:
        raise UserError(f"{path} is empty: write one prompt a line")
    return lines


def file_name(prompt: str) -> str:
    """The prompt as a name, at most 100 bytes and .png."""
    name = re.sub(r"\W+", "-", prompt).strip("-").encode()[:100].decode(errors="ignore")
    return f"{name or 'picture'}.png"


def output_paths(option: str, path: Path, suffix: str, seed: int, n: int) -> list[Path]:
    """The n files to write. Makes their folder. Raises UserError if they cannot be written."""
    if path.suffix.lower() != suffix:
        raise UserError(f"{option} must end in {suffix}, not {path.name!r}")
    if len(path.name.encode()) > 220 or path.is_dir():
        raise UserError(f"cannot write {path}: its name is too long, or a folder's")
    make_folder(path.parent)
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: its folder is not writable")
    return numbered(path, seed, n)


def numbered(path: Path, seed: int, n: int) -> list[Path]:
    """The path itself, or n of them with the seed of each in its name."""
    if n == 1:
        return [path]
    return [path.with_stem(f"{path.stem}-{seed + i}") for i in range(n)]


# --- drawing ---

class Drawn(NamedTuple):
    """A batch of pictures, and what was seen while they were drawn."""
    images: list[Image.Image]
    guesses: list[torch.Tensor]     # of each step, for the GIF
    maps: AttentionStore
    recorder: Recorder | None       # for the report


class Plan(NamedTuple):
    """What all batches of a run share."""
    settings: dict[str, object]     # of `StableDiffusion.resolve_options`
    image: Image.Image | None
    mask: Image.Image | None
    strength: float
    words: list[Word]               # whose maps are written
    gifs: dict[Job, Path]
    reports: dict[Job, Path]


def draw_all(o: Options) -> None:
    jobs = make_jobs(o)
    there = [str(job.path) for job in jobs if job.path.exists()]
    if there and o.params_from is not None:
        say(f"replaces {there[0]}" + (f" and {len(there) - 1} more" if len(there) > 1 else ""))
    gifs = [] if o.gif is None else output_paths("--gif", Path(o.gif), ".gif", o.seed, o.n)
    reports = [] if o.report is None else output_paths(
        "--report", Path(o.report), ".html", o.seed, o.n)
    grid = [] if o.grid is None else output_paths("--grid", Path(o.grid), ".png", o.seed, 1)
    image, mask = (None if path is None else read_image(path) for path in (o.init, o.mask))
    if o.ckpt is None and ranks()[0] == 0:
        say(f"the built-in model draws {SMALL.size}x{SMALL.size} emoji. For full size, downloaded "
            f"once: --ckpt {OFFICIAL}")
    device, dtype = best_device_and_dtype(pick_device(o.device), DTYPES.get(o.dtype))
    if o.int8:
        int8.check(device, dtype)
    sd = load_model(o, "cpu" if o.lowmem else device, dtype, fast=not o.no_fast)
    if o.int8:
        int8.attach(sd)
    if o.lowmem:
        lowmem.attach(sd, device)
    edit.check_inputs(sd, image, mask, o.image_guidance, o.cfg_end, o.cfg_rescale)
    plan = make_plan(sd, o, image, mask, dict(zip(jobs, gifs)), dict(zip(jobs, reports)))
    warn(sd, o, plan, jobs)

    batches = make_batches(sd, jobs, o.batch_size)
    steps = num_steps(plan.settings["steps"], 1.0 if image is None else plan.strength)
    drawn: list[Image.Image] = []
    with tqdm(total=len(batches) * steps, unit="step", delay=0.1) as bar:
        for batch in batches:
            result = draw_batch(sd, o, plan, batch, bar)
            write_batch(sd, o, plan, batch, result)
            if grid:
                drawn += result.images
    if grid:
        write(make_grid(drawn), grid[0])
        print(grid[0])


def make_plan(
    sd: StableDiffusion, o: Options, image: Image.Image | None, mask: Image.Image | None,
    gifs: dict[Job, Path], reports: dict[Job, Path],
) -> Plan:
    """Raises UserError for settings out of range, and for words that the prompt lacks."""
    settings = sd.resolve_options(**{name: getattr(o, name) for name in edit.SETTINGS})
    strength = edit.default_strength(sd, mask) if o.strength is None else o.strength
    words, clip = [], prompts.clip_encoders(sd)
    reads_clip = len(clip) > 0 and clip[0] is sd.text_encoders[0]
    if (o.attn is not None or o.report is not None) and not reads_clip:
        raise UserError("--attn and --report show CLIP's tokens, and this model reads the prompt "
                        "otherwise: leave them out")
    if o.attn is not None:
        wanted = None if o.words is None else o.words.split(",")
        words = chosen_words(clip[0].tokenizer, o.prompt, wanted)
        make_folder(Path(o.attn))
    return Plan(settings, image, mask, strength, words, gifs, reports)


def make_batches(sd: StableDiffusion, jobs: list[Job], size: int) -> list[list[Job]]:
    """Jobs that are neighbours, in batches.

    All of a batch have prompts of as many chunks: next to a longer one a prompt gets empty chunks,
    which change its picture.
    """
    batches = []
    for _, alike in groupby(jobs, lambda job: prompts.count_chunks(sd, [job.prompt])):
        alike = list(alike)
        batches += [alike[i:i + size] for i in range(0, len(alike), size)]
    return batches


def draw_batch(
    sd: StableDiffusion, o: Options, plan: Plan, batch: list[Job], bar: tqdm
) -> Drawn:
    maps, guesses, recorder = AttentionStore(), [], None
    if plan.reports:
        sigmas = edit.run_sigmas(sd, plan.settings, 1.0 if plan.image is None else plan.strength)
        recorder = Recorder(sd, [job.prompt for job in batch], sigmas, maps)

    def callback(step: Step) -> None:
        bar.update()
        if plan.gifs:
            guesses.append(step.denoised)
        if recorder is not None:
            recorder.step(step)     # it also gives the step to `maps`
        elif plan.words:
            maps.step(step)

    with ExitStack() as attached:
        if plan.words or recorder is not None:
            attached.enter_context(capture_attention(sd.unet, maps))
        if recorder is not None:
            attached.enter_context(recorder.watch())
        if o.deepcache is not None:
            attached.enter_context(deepcache(sd.unet, o.deepcache))
        try:
            images = edit.draw(
                sd, [job.prompt for job in batch], plan.image, plan.mask, plan.strength,
                o.image_guidance, o.cfg_end, o.cfg_rescale, negative_prompt=o.negative,
                seed=batch[0].seed, callback=callback, **plan.settings)
        except UserError as error:
            if o.int8:
                raise  # the UNet's weights cannot be searched for NaN
            raise explain_nan(sd, error, [job.prompt for job in batch]) from error
    return Drawn(images, guesses, maps, recorder)


# --- warnings ---

def warn(sd: StableDiffusion, o: Options, plan: Plan, jobs: list[Job]) -> None:
    """Lines about what is allowed and will hardly be meant."""
    guidance, width, height = (plan.settings[name] for name in ("guidance", "width", "height"))
    guides_itself = getattr(sd.preset.unet, "time_cond_proj_dim", None) is not None
    if o.negative and edit.concat_kind(sd) != "image" and (guidance == 1 or guides_itself):
        say("the negative prompt does nothing at guidance 1, nor with a model that guides itself")
    if guidance < 0:
        say(f"--guidance {guidance:g} leads away from the prompt: use 1 or more")
    if max(width, height) >= 2 * sd.preset.size:
        usual = f"{sd.preset.size}x{sd.preset.size}"
        say(f"the model was trained on {usual}: a picture of {width}x{height} may be a jumble")
    if o.ckpt is None and "captions" in sd.metadata:
        unknown = unknown_words(json.loads(sd.metadata["captions"]), {job.prompt for job in jobs})
        if unknown:
            say(f"the built-in model was not trained on {', '.join(unknown[:5])}: what it draws "
                "may be anything (--captions lists what it knows)")


# words that say nothing about what is drawn, or that the built-in model knows from no caption
COMMON = frozenset(
    "a an the of on in at to by with and or next is are its his her my your this that from for "
    "photo photograph picture image emoji background left right top bottom middle corner side big "
    "large small little tiny red orange yellow green blue purple pink brown black white gray grey "
    "one two three four".split())


def unknown_words(captions: list[str], texts: set[str]) -> list[str]:
    """Of prompts most of whose words stand in no caption: those words."""
    known = {word for caption in captions for word in re.findall(r"[^\W_]+", caption.lower())}
    found: dict[str, None] = {}
    for text in sorted(texts):
        words = [word for word in re.findall(r"[^\W\d_]+", text.lower())
                 if len(word) > 1 and word not in COMMON]
        strange = [word for word in words
                   if not {word, word.removesuffix("s"), word.removesuffix("es")} & known]
        if len(strange) > len(words) / 2:
            found |= dict.fromkeys(strange)
    return list(found)


# --- writing ---

def write_batch(
    sd: StableDiffusion, o: Options, plan: Plan, batch: list[Job], drawn: Drawn
) -> None:
    """The pictures with their settings, and what was asked for beside them."""
    for i, (job, image) in enumerate(zip(batch, drawn.images)):
        strength = None if plan.image is None else plan.strength
        used = asdict(o) | plan.settings | {
            "prompt": job.prompt, "seed": job.seed, "strength": strength}
        write(image, job.path, pnginfo=png_chunk(params_text(used)))
        tqdm.write(str(job.path))
        if job in plan.gifs:
            guesses = [guess[i:i + 1] for guess in drawn.guesses[:-1]]
            frames = [sd.decode_latents(guess)[0] for guess in guesses] + [image]
            write_gif([enlarged(frame, o.scale) for frame in frames], plan.gifs[job])
        if job in plan.reports:
            given = asdict(o) | {"prompt": job.prompt, "seed": job.seed}
            write_page(drawn.recorder, i, image, plan.reports[job], given, used)
            tqdm.write(str(plan.reports[job]))
    if plan.words:
        for job, image, maps in zip(batch, drawn.images, drawn.maps.mean()):
            write_maps(enlarged(image, o.scale), maps, plan.words, Path(o.attn) / job.path.stem)


def write_gif(frames: list[Image.Image], path: Path) -> None:
    """The last frame, the picture itself, stays longer."""
    durations = [120] * (len(frames) - 1) + [1500]
    write(frames[0], path, save_all=True, append_images=frames[1:], duration=durations, loop=0)
    tqdm.write(str(path))


def write_maps(image: Image.Image, maps: torch.Tensor, words: list[Word], start: Path) -> None:
    """One file for each word, whose name begins as `start` and says the word and its place."""
    for word in words:
        name = re.sub(r"\W", "", word.text)[:40]
        path = start.with_name(f"{start.name}-{word.tokens[0]}-{name}.png")
        write(overlay(image, maps[word.tokens].sum(0)), path)
        tqdm.write(str(path))


def enlarged(image: Image.Image, scale: int) -> Image.Image:
    """Each pixel becomes scale x scale of them."""
    size = (image.width * scale, image.height * scale)
    return image if scale == 1 else image.resize(size, Image.Resampling.NEAREST)


def make_grid(images: list[Image.Image]) -> Image.Image:
    """The pictures, all of one size, in rows of about as many as there are rows."""
    columns = math.ceil(len(images) ** 0.5)
    width, height = images[0].size
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * height), "white")
    for i, image in enumerate(images):
        sheet.paste(image, (i % columns * width, i // columns * height))
    return sheet


def write(image: Image.Image, path: Path, **options) -> None:
    """A .png or .gif, whole or not at all."""
    with atomic_write(path) as temporary:
        image.save(temporary, path.suffix[1:].upper(), **options)


if __name__ == "__main__":
    sys.exit(main())
