"""Captioned pictures for train.py: what both forms share, and folders. (Tar shards: shards.py.)

captions.py says what a folder may hold. Of a picture's captions one is drawn at random each time.
Batches are made of pictures of one size. Every sample has a `sample_index`, its number in the
order of all samples that all processes are given. What is random about a sample is a function of
the seed and of this number, so neither the number of processes nor an interruption changes it.
"""
import hashlib
import io
import itertools
import math
import os
import re
import signal
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from clip import BOS, EOS, CLIPTextModel, Tokenizer
from extras.captions import PICTURES, Sample, list_folder
from extras.checks import reason
from extras.distributed import barrier
from extras.files import atomic_write, follow_umask, is_text, make_folder, read_image
from extras.locks import release_locks
from extras.progress import hidden
from extras.terminal import complain
from sd import UserError

WHITE = (255, 255, 255)
MAX_ROWS = 3  # of 75 tokens, that captions may fill; as other programs have it
Encode = Callable[[list[str]], dict[str, Tensor]]  # of a text encoder


class Crop(NamedTuple):
    pixels: Tensor     # (3, H, W) uint8
    size: list[int]    # SDXL's six numbers: original H and W, top and left of the crop, H and W


@dataclass
class Batch:
    sample_index: list[int]                       # one number for each sample
    captions: list[str]
    sizes: Tensor                                 # (B, 6)
    pixels: Tensor | None = None                  # (B, 3, H, W) uint8
    moments: tuple[Tensor, Tensor] | None = None  # or their latents' mean and log variance
    position: Any = None                          # of the shards' reader after this batch
    reader: int = 0


def generator(*numbers: int) -> torch.Generator:
    """A random generator that is a function of these numbers.

    torch uses only 32 bits of a seed, so the numbers are hashed together.
    """
    seed = np.random.SeedSequence(numbers).generate_state(1)[0]
    return torch.Generator().manual_seed(int(seed))


# --- pictures ---

def bucket_sizes(size: int, f: int, buckets: bool) -> list[tuple[int, int]]:
    """Widths and heights that pictures are cropped to, all multiples of f.

    Without `buckets` the square alone. With them, rectangles of no greater area: sides are
    multiples of an eighth of `size` (of 64 at most) and lie between its half and its double.
    """
    if not buckets:
        return [(size, size)]
    step = max(f, min(64, size // 8) // f * f)
    least = max(step, size // 2)
    wide = set()
    for w in range(max(step, size // 2 // step * step), 2 * size + 1, step):
        if size * size // w >= least:
            wide.add((w, size * size // w // step * step))
    return sorted(wide | {(h, w) for w, h in wide})


def nearest(size: tuple[int, int], sizes: list[tuple[int, int]]) -> tuple[int, int]:
    """The one of `sizes` with the aspect ratio nearest to the picture's; the largest of several."""
    def distance(one: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(one[0] / one[1] * size[1] / size[0])), -one[0]
    return min(sizes, key=distance)


def crop(sample: Sample, sizes: list[tuple[int, int]],
         background: tuple[int, int, int] = WHITE) -> Crop:
    """The picture, resized and center-cropped to the nearest of the sizes.

    Transparent parts become the background. Raises UserError if the picture cannot be read.
    """
    source = sample.picture
    if isinstance(source, Path) and source.exists() and not source.is_file():
        raise UserError(f"{source} is no file")     # a device would be read without end
    image = read_image(io.BytesIO(source) if isinstance(source, bytes) else source)
    w, h = image.size
    W, H = nearest(image.size, sizes)  # noqa: N806
    scale = max(W / w, H / h)
    if image.size != (W, H):
        image = ImageOps.fit(image, (W, H), Image.Resampling.LANCZOS)
    image = Image.alpha_composite(Image.new("RGBA", (W, H), background), image).convert("RGB")
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # 'h w c -> c h w'
    return Crop(pixels, [h, w, round((h * scale - H) / 2), round((w * scale - W) / 2), H, W])


def load_or_error(sample: Sample, sizes: list[tuple[int, int]], captioned: bool) -> Crop | str:
    """The cropped picture, or a line that says what is wrong with the sample."""
    if captioned and not sample.captions:
        return f"{sample.name} has no caption"
    if captioned and not all(map(is_text, sample.captions)):
        return f"a caption of {sample.name} is no valid text"
    try:
        return crop(sample, sizes)
    except UserError as error:
        return str(error).replace("the picture in the shard", f"the picture {sample.name}")
    except Exception as error:  # one bad picture must not end a run
        return f"cannot read the picture {sample.name}: {error!r}"


def ignore_signals(worker: int) -> None:
    """Put a DataLoader worker into a process group of its own.

    A Ctrl-C, or torchrun's SIGTERM, then does not end the worker: train.py finishes its step.
    """
    release_locks()
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def load_with_workers(dataset: Dataset, workers: int,
                      sampler: Iterator | None = None) -> Iterator[Batch]:
    """The batches that a dataset makes, by so many processes; 0: by this one.

    Raises UserError for what is wrong in a process, and if one ends.
    """
    batches = iter(DataLoader(dataset, batch_size=None, sampler=sampler, num_workers=workers,
                              worker_init_fn=ignore_signals))
    try:
        yield from batches
    except UserError as error:      # of a worker, with its traceback
        raise UserError(str(error).rpartition("UserError: ")[2].strip()) from error
    except (RuntimeError, OSError) as error:
        if not re.search("DataLoader worker|shared memory|/dev/shm", str(error)):
            raise
        raise UserError("a process of --workers ended or found no memory: try fewer workers, or "
                        "a larger /dev/shm. The same command resumes from what was saved. "
                        f"({reason(error)})") from error
    finally:
        if workers:
            end_workers(batches)


def end_workers(batches: Iterator[Batch]) -> None:
    """With the commands they have started, which are in their process groups."""
    batches._shutdown_workers()
    for worker in batches._workers:
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(worker.pid, signal.SIGKILL)


def choose_caption(captions: list[str], seed: int, sample_index: int) -> str:
    if not captions:
        return ""
    return captions[int(torch.randint(len(captions), (),
                                      generator=generator(seed, 3, sample_index)))]


# --- folders ---

class Folder(Dataset):
    """The pictures of some folders.

    All are opened once at the start. Those that cannot be read, or have no caption, are left out
    with a line on stderr. Raises UserError if none is left.
    """

    def __init__(self, folders: list[str], sizes: list[tuple[int, int]], batch: int, seed: int,
                 captioned: bool = True, random_background: bool = False, first_index: int = 0):
        self.bucket_sizes, self.batch, self.seed = sizes, batch, seed
        self.random_background, self.first_index = random_background, first_index
        found = [sample for folder in folders for sample in list_folder(Path(folder))]
        if not found:
            raise UserError(f"no pictures ({', '.join(PICTURES)}) in {', '.join(folders)}")

        def check(sample: Sample) -> list[int] | str:
            loaded = load_or_error(sample, sizes, captioned)
            return loaded if isinstance(loaded, str) else loaded.size

        once = {(sample.name, *sample.captions): sample for sample in found}  # they may be repeated
        with ThreadPoolExecutor() as pool:
            results = dict(zip(once, pool.map(check, once.values())))
        checked = [results[sample.name, *sample.captions] for sample in found]
        errors = [result for result in checked if isinstance(result, str)]
        usable = [pair for pair in zip(found, checked) if not isinstance(pair[1], str)]
        if not usable:
            raise UserError(f"no usable pictures in {', '.join(folders)}: {errors[0]}")
        if errors:
            more = ", ..." if len(errors) > 3 else ""
            complain(f"{len(errors)} of {len(found)} pictures skipped: "
                     f"{', '.join(errors[:3])}{more}")
        self.samples = [sample for sample, _ in usable]
        self.sizes = [size for _, size in usable]
        self.moments: Callable[[int], dict[str, Tensor]] | None = None  # set by encode_once

    def __len__(self) -> int:
        return len(self.samples)

    def order(self) -> Iterator[list[tuple[int, int]]]:
        """The (sample index, picture) pairs of each batch, without end.

        Every picture comes once before any comes again. A batch is given when enough pictures of
        one size have come.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for epoch in itertools.count():
            first = self.first_index + epoch * len(self)
            order = torch.randperm(len(self), generator=generator(self.seed, 1, epoch))
            for n, picture in enumerate(order.tolist()):
                size = tuple(self.sizes[picture][4:])
                waiting.setdefault(size, []).append((first + n, picture))
                if len(waiting[size]) == self.batch:
                    yield waiting.pop(size)

    def batches(self, first: int, stride: int, workers: int = 0) -> Iterator[Batch]:
        """Batch number `first`, then every stride-th."""
        sampler = itertools.islice(self.order(), first, None, stride)
        return load_with_workers(self, workers, sampler)

    def __getitem__(self, chosen: list[tuple[int, int]]) -> Batch:
        pictures = [picture for _, picture in chosen]
        batch = Batch([index for index, _ in chosen],
                      [choose_caption(self.samples[i].captions, self.seed, index)
                       for index, i in chosen],
                      torch.tensor([self.sizes[i] for i in pictures]))
        if self.moments is not None:
            cached = [self.moments(i) for i in pictures]
            batch.moments = (torch.stack([one["mean"] for one in cached]),
                             torch.stack([one["logvar"] for one in cached]))
        else:
            batch.pixels = torch.stack([self.pixels(i, index) for index, i in chosen])
        return batch

    def pixels(self, i: int, sample_index: int | None = None) -> Tensor:
        """Picture i (3, H, W), uint8, on white.

        With `random_background` and a sample index, half of the time on a random color.
        """
        background = WHITE
        if self.random_background and sample_index is not None:
            g = generator(self.seed, 2, sample_index)
            if torch.rand((), generator=g) >= 0.5:
                background = tuple(torch.randint(256, (3,), generator=g).tolist())
        return crop(self.samples[i], self.bucket_sizes, background).pixels

    def identity(self, i: int) -> str:
        """All that the latents of picture i depend on, except the VAE."""
        stat = self.samples[i].picture.stat()
        path = self.samples[i].picture.resolve()
        return f"{path} {stat.st_size} {stat.st_mtime_ns} {self.sizes[i]}"

    @property
    def captions(self) -> list[str]:
        """All captions, each once."""
        every = (caption for sample in self.samples for caption in sample.captions)
        return list(dict.fromkeys(every))


# --- computed once ---

class TensorCache:
    """Tensors that are computed once, in memory or in a folder where the next run finds them.

    The key is a text that names all that the tensors depend on.
    """

    def __init__(self, folder: Path | None):
        self.folder = folder
        self.memory: dict[str, dict[str, Tensor]] = {}

    def __call__(self, key: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.folder is None:
            if key not in self.memory:
                self.memory[key] = compute()
            return self.memory[key]
        path = self.folder / (hashlib.sha256(key.encode()).hexdigest()[:32] + ".safetensors")
        if not path.exists():
            tensors = {name: tensor.contiguous().cpu() for name, tensor in compute().items()}
            with atomic_write(path) as temporary:
                save_file(tensors, temporary)
                follow_umask(temporary)
        return load_file(path)


def fingerprint(module: nn.Module) -> str:
    """A hash of a network's config and weights."""
    digest = hashlib.sha256(repr(module.config).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def encode_once(loss_fn: nn.Module, folders: list[Folder], captions: list[str], rank: int,
                world: int) -> None:
    """Encode now what needs it only once for train.py's UNetLoss, and keep it.

    That is the latents of folders; and, with --cache and a text encoder that is not trained, the
    vectors of captions. With a cache on disk each process encodes its share.
    """
    s, sd = loss_fn.s, loss_fn.sd
    cache, share, vae_key = TensorCache(None), slice(None), ""
    if s.cache:
        make_folder(Path(s.cache))
        cache, share = TensorCache(Path(s.cache)), slice(rank, None, world)
        vae_key = fingerprint(sd.vae)
    for folder in folders:
        folder.moments = CachedMoments(folder, cache, vae_key, loss_fn.moments)
        for i in tqdm(range(len(folder))[share], "encoding pictures", disable=hidden(rank)):
            folder.moments(i)
    if s.cache and s.train == "unet":
        keys = [f"{fingerprint(encoder)} {s.tokens} rows" for encoder in sd.text_encoders]
        loss_fn.text_cache = cache, keys
        mine = ["", *captions][share]
        for caption in tqdm(mine, "encoding captions", disable=hidden(rank)):
            loss_fn.encode_prompt([caption], None)
    barrier()


class CachedMoments:
    """i -> mean and log variance (Z, h, w) of the latents of a folder's picture i, by a cache.

    `encode`: pixels (B, 3, H, W) -> both (B, Z, h, w).
    """

    def __init__(self, folder: Folder, cache: TensorCache, vae_key: str,
                 encode: Callable[[Tensor], tuple[Tensor, Tensor]]):
        self.folder, self.cache, self.vae_key, self.encode = folder, cache, vae_key, encode

    def __call__(self, i: int) -> dict[str, Tensor]:
        return self.cache(f"moments {self.vae_key} {self.folder.identity(i)}",
                          lambda: self.compute(i))

    def compute(self, i: int) -> dict[str, Tensor]:
        mean, logvar = self.encode(self.folder.pixels(i)[None])
        return {"mean": mean[0].cpu(), "logvar": logvar[0].cpu()}

    def __getstate__(self) -> dict:
        """Workers of a DataLoader find everything in the cache and need no VAE."""
        return vars(self) | {"encode": None}


@contextmanager
def text_scope(encoders: list[nn.Module], tokens: int,
               text_cache: tuple[TensorCache, list[str]] | None) -> Iterator[None]:
    """Inside, text encoders work as training needs it.

    Captions are cut to so many tokens, without a warning: of many captions some are too long. At
    77, which is the encoder's own length, they are not cut but fill further rows of 77, up to
    MAX_ROWS: context is (B, N*77, D) then, with the N of the longest caption.
    With a cache, and a key for each encoder, what is in the cache is not encoded again.
    """
    clip = [one for one in encoders if isinstance(one, CLIPTextModel)]
    rows = partial(count_rows, [one.tokenizer for one in clip], tokens)
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for i, encoder in enumerate(encoders):
            if hasattr(encoder, "tokenizer"):
                length = min(tokens, encoder.tokenizer.length)
                stack.enter_context(attribute(encoder.tokenizer, "length", length))
            encode = encoder.encode
            if encoder in clip:
                encode = partial(encode_rows, encoder, encode, rows)
            if text_cache is not None:
                cache, keys = text_cache
                encode = cached_encode(encoder, encode, cache, keys[i])
            if encode != encoder.encode:
                stack.enter_context(attribute(encoder, "encode", encode))
        yield


@contextmanager
def attribute(thing: object, name: str, value: object) -> Iterator[None]:
    """Inside, the object has this attribute."""
    had, before = name in vars(thing), getattr(thing, name)
    setattr(thing, name, value)
    try:
        yield
    finally:
        if had:
            setattr(thing, name, before)
        else:
            delattr(thing, name)  # the one of the class again


def count_rows(tokenizers: list[Tokenizer], tokens: int, caption: str) -> int:
    """How many rows of 77 tokens the caption fills; of two encoders the one with more counts."""
    if tokens < 77:
        return 1
    longest = max(len(one.tokenize(caption)) for one in tokenizers)
    return min(max(1, -(-longest // (tokens - 2))), MAX_ROWS)


def encode_rows(encoder: CLIPTextModel, encode: Encode, rows: Callable[[str], int],
                captions: list[str]) -> dict[str, Tensor]:
    """As the encoder's `encode`, with further rows for captions of more than 75 tokens.

    Each row is encoded by itself, and the pooled vector is the first one's. Shorter captions get
    empty rows, as a prompt beside a longer negative prompt gets them. (extras/prompts.py)
    """
    count = max(map(rows, captions))
    if count == 1:
        return encode(captions)
    tokenizer = encoder.tokenizer
    room = tokenizer.length - 2
    ids = torch.full((len(captions), count, tokenizer.length), tokenizer.pad)
    ids[:, :, 0] = BOS
    for i, caption in enumerate(captions):
        found = [token.id for token in tokenizer.tokenize(caption)]
        for j in range(count):
            row = [*found[j * room:(j + 1) * room], EOS]
            ids[i, j, 1:len(row) + 1] = torch.tensor(row)
    features, pooled = encoder(ids.flatten(0, 1).to(next(encoder.parameters()).device))
    context = features.unflatten(0, (-1, count)).flatten(1, 2)      # (b n) t d -> b (n t) d
    return {"context": context, "y": pooled[::count]}


def cached_encode(encoder: nn.Module, encode: Encode, cache: TensorCache, key: str) -> Encode:
    """`encode`, one caption at a time, through the cache."""
    device = next(encoder.parameters()).device

    def cached(captions: list[str]) -> dict[str, Tensor]:
        def one(caption: str) -> dict[str, Tensor]:
            return cache(f"{key} {caption}", lambda: encode([caption]))

        encoded = [one(caption) for caption in captions]
        longest = max(len(each["context"][0]) for each in encoded)
        for i, each in enumerate(encoded):
            missing = longest - len(each["context"][0])
            if missing:
                empty = one("")["context"]
                rows = [empty] * (missing // len(empty[0]))
                encoded[i] = each | {"context": torch.cat([each["context"], *rows], dim=1)}
        return {name: torch.cat([each[name] for each in encoded]).to(device)
                for name in encoded[0]}
    return cached
