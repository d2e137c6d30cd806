"""Captioned pictures for train.py: folders, whose pictures come again and again, and tar shards, which pass by.

    folder   x.png beside x.txt, one caption a line, one of them drawn at random each time; or metadata.jsonl, as Hugging Face has it,
             with "file_name" and "text"; or PNGs written by sd.py, whose prompt is in them
    shards   "laion/{00000..99999}.tar" as WebDataset and img2dataset write them, 000.jpg beside 000.txt or 000.json: files, URLs, or what a
             command prints ("pipe:aws s3 cp s3://laion/{00000..99999}.tar -"); read as they come, never unpacked

Both give batches of pictures of one size, and every sample has a `place`, its number in the order of all that all processes are given: what is
random about it is a function of the seed and its place, so that neither the number of processes nor an interruption changes it.
"""
import hashlib
import io
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tarfile
import urllib.request
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from checkpoint import UserError, whole
from sd import read_image

PICTURES = ("png", "jpg", "jpeg", "webp")


class Sample(NamedTuple):
    name: str
    picture: Path | bytes
    captions: list[str]


class Cut(NamedTuple):
    pixels: Tensor      # (3, H, W) bytes
    size: list[int]     # SDXL's six numbers: height and width of the original, top and left of what was cut off, height and width


@dataclass
class Batch:
    places: list[int]
    captions: list[str]
    sizes: Tensor                                    # (B, 6)
    pixels: Tensor | None = None                     # (B, 3, H, W) bytes
    latents: tuple[Tensor, Tensor] | None = None     # or mean and standard deviation of their latents, (B, Z, h, w) each
    position: "Position | None" = None               # of the shards' reader, after this batch
    reader: int = 0


def generator(*numbers: int) -> torch.Generator:
    """The randomness that belongs to these numbers. (torch looks at 32 bits of a seed only: hash, don't shift.)"""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(numbers).generate_state(1)[0]))


# --- pictures ---

def shapes(size: int, f: int, buckets: bool) -> list[tuple[int, int]]:
    """Widths and heights that pictures are cut to: the square alone, or with `buckets` those of no greater area, sides in steps of an eighth (but at
    most 64) and between half and double. All are multiples of f."""
    if not buckets:
        return [(size, size)]
    step = max(f, min(64, size // 8) // f * f)
    sides = range(max(step, size // 2 // step * step), 2 * size + 1, step)
    wide = {(w, size * size // w // step * step) for w in sides if size * size // w >= max(step, size // 2)}
    return sorted(wide | {(h, w) for w, h in wide})


def nearest(size: tuple[int, int], shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """The shape most like the picture's; of several the largest."""
    return min(shapes, key=lambda shape: (abs(math.log(shape[0] / shape[1] * size[1] / size[0])), -shape[0]))


def cut(sample: Sample, shapes: list[tuple[int, int]], ground: tuple[int, int, int] = (255, 255, 255)) -> Cut:
    """The middle of the picture in the nearest of the shapes, what is transparent in the ground's colour. Raises UserError if it cannot be read."""
    image = read_image(io.BytesIO(sample.picture) if isinstance(sample.picture, bytes) else sample.picture)
    (w, h), (W, H) = image.size, (shape := nearest(image.size, shapes))
    scale = max(W / w, H / h)
    image = image if image.size == shape else ImageOps.fit(image, shape, Image.Resampling.LANCZOS)
    image = Image.alpha_composite(Image.new("RGBA", shape, ground), image).convert("RGB")
    return Cut(torch.from_numpy(np.array(image)).permute(2, 0, 1), [h, w, round((h * scale - H) / 2), round((w * scale - W) / 2), H, W])


def tried(sample: Sample, shapes: list[tuple[int, int]], captioned: bool) -> Cut | str:
    """The picture, or what is wrong with the sample."""
    if captioned and not sample.captions:
        return f"{sample.name} has no caption"
    try:
        return cut(sample, shapes)
    except UserError as error:
        return str(error)
    except Exception as error:  # whatever Pillow's decoders come upon in a damaged file
        return f"cannot read the picture {sample.name}: {error!r}"


def out_of_reach(worker: int) -> None:
    """In a process group of their own, workers are not ended by a Ctrl-C, or torchrun's SIGTERM, meant to let the step end and be saved."""
    if hasattr(os, "setpgrp"):
        os.setpgrp()


def lines_of(text: str) -> list[str]:
    return [line.strip() for line in text.splitlines() if line.strip()]


# --- folders ---

class Folder(Dataset):
    """Pictures of some folders. All are looked at once, at the start; those that cannot be read or lack a caption are left out."""

    def __init__(self, folders: list[str], shapes: list[tuple[int, int]], batch: int, seed: int, captioned: bool = True, coloured: bool = False,
                 first_place: int = 0):
        self.shapes, self.batch, self.seed, self.coloured, self.first_place = shapes, batch, seed, coloured, first_place
        samples = [sample for folder in folders for sample in in_folder(Path(folder))]
        if not samples:
            raise UserError(f"no pictures (png, jpg, webp) in {', '.join(folders)}")
        with ThreadPoolExecutor() as pool:
            looked = list(pool.map(lambda sample: (sized if isinstance(sized := tried(sample, shapes, captioned), str) else sized.size), samples))
        wrong = [found for found in looked if isinstance(found, str)]
        self.samples = [sample for sample, found in zip(samples, looked) if not isinstance(found, str)]
        self.sizes = [found for found in looked if not isinstance(found, str)]
        if not self.samples:
            raise UserError(f"no pictures that can be used in {', '.join(folders)}: {wrong[0]}")
        if wrong:
            print(f"{len(wrong)} of {len(samples)} pictures skipped: {', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}", file=sys.stderr)
        self.latents: Callable[[int], dict[str, Tensor]] | None = None

    def __len__(self) -> int:
        return len(self.samples)

    def order(self) -> Iterator[list[tuple[int, int]]]:
        """The places and pictures of each batch, without end: every picture once before any comes again, a batch when enough of a shape are there."""
        waiting: dict[tuple, list[tuple[int, int]]] = {}
        for epoch in itertools.count():
            for n, i in enumerate(torch.randperm(len(self), generator=generator(self.seed, 1, epoch)).tolist()):
                shape = tuple(self.sizes[i][4:])
                waiting.setdefault(shape, []).append((self.first_place + epoch * len(self) + n, i))
                if len(waiting[shape]) == self.batch:
                    yield waiting.pop(shape)

    def batches(self, first: int, stride: int, workers: int = 0) -> Iterator[Batch]:
        """Batch number `first`, then every stride-th."""
        return iter(DataLoader(self, batch_size=None, sampler=itertools.islice(self.order(), first, None, stride), num_workers=workers, worker_init_fn=out_of_reach))

    def __getitem__(self, chosen: list[tuple[int, int]]) -> Batch:
        places, pictures = zip(*chosen)
        batch = Batch(list(places), [one_of(self.samples[i].captions, self.seed, place) for place, i in chosen], torch.tensor([self.sizes[i] for i in pictures]))
        if self.latents is not None:
            kept = [self.latents(i) for i in pictures]
            batch.latents = tuple(torch.stack([one[name] for one in kept]) for name in ("mean", "std"))
        else:
            batch.pixels = torch.stack([self.pixels(i, place if self.coloured else None) for place, i in chosen])
        return batch

    def pixels(self, i: int, place: int | None = None) -> Tensor:
        """Picture i (3, H, W) as bytes, on white, or with a place half of the time on a random colour."""
        ground = (255, 255, 255)
        if place is not None:
            g = generator(self.seed, 2, place)
            ground = ground if torch.rand((), generator=g) < 0.5 else tuple(torch.randint(256, (3,), generator=g).tolist())
        return cut(self.samples[i], self.shapes, ground).pixels

    def identity(self, i: int) -> str:
        """What its latents depend on, but for the VAE."""
        about = self.samples[i].picture.stat()
        return f"{self.samples[i].picture.resolve()} {about.st_size} {about.st_mtime_ns} {self.sizes[i]}"


def one_of(captions: list[str], seed: int, place: int) -> str:
    return captions[int(torch.randint(len(captions), (), generator=generator(seed, 3, place)))] if captions else ""


def in_folder(folder: Path) -> list[Sample]:
    """Raises UserError for a metadata.jsonl that is damaged."""
    table = folder / "metadata.jsonl"
    if not table.is_file():
        paths = sorted(path for path in folder.glob("*") if path.suffix[1:].lower() in PICTURES)
        return [Sample(str(path), path, captions_of(path)) for path in paths]
    try:
        rows = [json.loads(line) for line in lines_of(table.read_text("utf-8"))]
        return [Sample(str(folder / row["file_name"]), folder / row["file_name"], lines_of(row.get("text") or "")) for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{table} is damaged, each line must be like {{\"file_name\": \"x.png\", \"text\": \"...\"}}: {error!r}") from error


def captions_of(path: Path) -> list[str]:
    """Those in the .txt of its name; else the prompt that sd.py wrote into the PNG; else none."""
    try:
        return lines_of(path.with_suffix(".txt").read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"the captions in {path.with_suffix('.txt')} are not UTF-8: {error}") from error
    except FileNotFoundError:
        pass
    try:
        return lines_of(Image.open(path).info.get("parameters", "").split("\nNegative prompt:")[0])
    except Exception:  # a damaged picture: `tried` says so
        return []


# --- computed once ---

class Kept:
    """Tensors by the text that says what they depend on, computed once: kept in memory, or in a folder, where the next run finds them too."""

    def __init__(self, folder: Path | None):
        self.folder, self.memory = folder, {}

    def __call__(self, what: str, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        if self.folder is None:
            if what not in self.memory:
                self.memory[what] = compute()
            return self.memory[what]
        path = self.folder / (hashlib.sha256(what.encode()).hexdigest()[:32] + ".safetensors")
        if not path.exists():
            with whole(path) as temporary:
                save_file({name: tensor.contiguous().cpu() for name, tensor in compute().items()}, temporary)
        return load_file(path)


def fingerprint(module: nn.Module) -> str:
    """Of its configuration and weights."""
    digest = hashlib.sha256(repr(module.cfg).encode())
    for tensor in module.state_dict().values():
        digest.update(tensor.cpu().flatten().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


# --- shards ---

@dataclass
class Position:
    """Of a reader: it stood here when it began a block of samples, and has given this many batches of that block since."""
    epoch: int = 0
    shard: int = 0                      # of those it reads in this epoch
    sample: int = 0                     # of the shard
    count: int = 0                      # samples read in all
    skipped: int = 0                    # of them
    skipped_since: int = 0
    left: list = field(default_factory=list)  # (place, sample) read before the block and not yet given: too few for a batch of their shape
    given: int = 0


class Shards(IterableDataset):
    """Samples of tar shards. In each epoch each shard is read by one reader, that is one worker of one rank; all samples come once."""

    def __init__(self, patterns: list[str], shapes: list[tuple[int, int]], batch: int, seed: int, captioned: bool = True, shuffle: int = 1000, rank: int = 0, world: int = 1):
        self.shapes, self.batch, self.seed, self.captioned, self.shuffle, self.rank, self.world = shapes, batch, seed, captioned, shuffle, rank, world
        self.shards = [shard for pattern in patterns for shard in expanded(pattern)]
        if missing := [shard for shard in self.shards if not is_remote(shard) and not Path(shard).is_file()]:
            raise UserError(f"{len(missing)} of {len(self.shards)} shards are not there, such as {missing[0]}")

    def batches(self, positions: dict[int, Position], number: int, workers: int = 0) -> Iterator[Batch]:
        """From where the readers stand, of whom this rank has asked `number` times. `positions` is changed as batches are given."""
        readers = self.world * max(workers, 1)
        if len(self.shards) < readers:
            raise UserError(f"{len(self.shards)} shards for {readers} readers ({self.world} processes, {workers} workers each): there must be at least as many shards")
        self.positions, self.turn = positions, number  # workers take turns: the next to give a batch must be the first
        for batch in DataLoader(self, batch_size=None, num_workers=workers, worker_init_fn=out_of_reach):
            positions[batch.reader] = batch.position
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        info = get_worker_info()
        workers, worker = (1, 0) if info is None else (info.num_workers, (info.id + self.turn) % info.num_workers)
        reader, readers = self.rank * workers + worker, self.world * workers
        at = self.positions.get(worker, Position())
        for _, epoch in itertools.groupby(self.read(reader, readers, at), key=lambda item: item[1][0]):
            while read := list(itertools.islice(epoch, self.shuffle)):
                shuffled = torch.randperm(len(read), generator=generator(self.seed, 4, reader, at.count)).tolist()
                block = [(place, Sample(*sample)) for place, sample in at.left] + [((at.count + i) * readers + reader, read[i][0]) for i in shuffled]
                waiting: dict[tuple, list[tuple[int, Sample, Cut]]] = {}
                given, skipped = 0, at.skipped
                for place, sample in block:
                    found = tried(sample, self.shapes, self.captioned)
                    if isinstance(found, str):
                        skipped += 1
                        continue
                    shape = tuple(found.size[4:])
                    waiting.setdefault(shape, []).append((place, sample, found))
                    if len(waiting[shape]) == self.batch:
                        given, full = given + 1, waiting.pop(shape)
                        if given > at.given:
                            yield Batch([place for place, _, _ in full], [one_of(sample.captions, self.seed, place) for place, sample, _ in full],
                                        torch.tensor([found.size for _, _, found in full]), torch.stack([found.pixels for _, _, found in full]),
                                        position=replace(at, given=given, skipped_since=skipped - at.skipped), reader=worker)
                left = [(place, tuple(sample)) for some in waiting.values() for place, sample, _ in some]
                at = Position(*read[-1][1], count=at.count + len(read), skipped=skipped, left=left)

    def read(self, reader: int, readers: int, at: Position) -> Iterator[tuple[Sample, tuple[int, int, int]]]:
        """This reader's samples from there on, without end, each with the epoch, shard and sample that follow."""
        for epoch in itertools.count(at.epoch):
            order = torch.randperm(len(self.shards), generator=generator(self.seed, 5, epoch)).tolist()[reader::readers]
            anything = epoch == at.epoch and at.shard + at.sample > 0
            for shard in range(at.shard if epoch == at.epoch else 0, len(order)):
                seen, url = 0, self.shards[order[shard]]
                done = at.sample if (epoch, shard) == (at.epoch, at.shard) else 0
                try:
                    for seen, sample in enumerate(samples_in(url), 1):
                        if seen > done:
                            yield sample, (epoch, shard, seen)
                            anything = True
                except (OSError, EOFError, tarfile.TarError, zlib.error, HTTPException) as error:
                    print(f"{url} breaks off after {seen} samples ({error}); going on with the next", file=sys.stderr, flush=True)
            if not anything:
                raise UserError(f"no samples in {len(order)} shards, such as {url}")


def is_shards(path: str) -> bool:
    return is_remote(path) or re.search(r"\.tar(\.\w+)?$", path) is not None


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def expanded(pattern: str) -> list[str]:
    """a-{08..11}.tar -> a-08.tar, a-09.tar, a-10.tar, a-11.tar, as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    return [path for i in range(int(low), int(high) + 1) for path in expanded(pattern[:match.start()] + str(i).zfill(len(low)) + pattern[match.end():])]


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Raises OSError if it cannot be read, or if a command fails."""
    if url.startswith("pipe:"):
        with subprocess.Popen(url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE) as process:
            yield process.stdout
            while process.stdout.read(1 << 16):  # what follows the archive: a command whose pipe is closed early fails
                pass
        if process.returncode:
            raise OSError(f"the command ended with code {process.returncode}")
    elif is_remote(url):
        with urllib.request.urlopen(url, timeout=60) as response:
            yield response
    else:
        with open(url, "rb") as file:
            yield file


def samples_in(url: str) -> Iterator[Sample]:
    """Files that follow one another and have the same name up to its first dot are a sample. Raises tarfile.TarError, EOFError or OSError where the shard breaks off."""
    def members() -> Iterator[tuple[str, str, tarfile.TarInfo]]:
        while (member := tar.next()) is not None:
            tar.members.clear()  # it remembers all it has seen: a shard may be endless
            if member.isfile():
                folder, _, file = member.name.rpartition("/")
                name, _, kind = file.partition(".")
                yield f"{folder}/{name}", kind.lower(), member
        if tar.fileobj.tell() < tar.offset + 512:
            raise EOFError("the archive has no end")

    with opened(url) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:
        for name, group in itertools.groupby(members(), key=lambda member: member[0]):
            files = {kind: tar.extractfile(member).read() for _, kind, member in group}
            picture = next((files[kind] for kind in PICTURES if kind in files), b"")
            yield Sample(f"{url}: {name}", picture, captions_in(files))


def captions_in(files: dict[str, bytes]) -> list[str]:
    """The lines of the .txt, else "caption" or "text" of the .json; none if they cannot be read."""
    try:
        if "txt" in files:
            return lines_of(files["txt"].decode("utf-8-sig"))
        about = json.loads(files.get("json", b"{}"))
        return lines_of(about.get("caption") or about.get("text") or "")
    except (ValueError, AttributeError):
        return []
