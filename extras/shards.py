"""Tar shards for train.py, as WebDataset and img2dataset write them. They are read as a stream.

    "laion/{00000..99999}.tar"    files or URLs with 000.jpg beside 000.txt or 000.json
    "pipe:aws s3 cp s3://laion/{00000..23207}.tar -"    what a command prints

Nothing is unpacked to disk, and a shard may be endless. In each epoch each shard is read by one
reader: one worker of one process.
"""
import itertools
import json
import os
import re
import signal
import subprocess
import tarfile
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch.utils.data import IterableDataset, get_worker_info

from extras.captions import PICTURES, Sample, captions_of, nonempty_lines
from extras.data import (
    Batch,
    Crop,
    choose_caption,
    generator,
    load_or_error,
    load_with_workers,
)
from extras.terminal import complain
from sd import UserError

MAX_BYTES = 2**28    # of a file in a shard
MAX_SKIPPED = 2**34  # of a file that is skipped: to skip what is not there takes time too
MAX_BEHIND = 2**26   # bytes that a command prints behind the end of its archive
MAX_FILES = 1000     # of one name
MAX_USELESS = 100_000   # files, or samples, in a row of which nothing can be used
KINDS = (*PICTURES, "txt", "caption", "json")


@dataclass
class Position:
    """Where a reader stands: the start of its current block of samples, and how far it is in it.

    A reader reads a block of `shuffle` samples, mixes them and gives them in batches.
    """
    epoch: int = 0
    shard: int = 0          # number among the shards that this reader reads in this epoch
    sample: int = 0         # number in the shard
    count: int = 0          # samples read in all
    skipped: int = 0        # those of them that could not be used
    skipped_since: int = 0  # the same, in this block
    left: list = field(default_factory=list)  # (sample index, sample) of the blocks before, which
    #                                           were too few for a batch of their size
    given: int = 0          # batches given of this block


class Next(NamedTuple):
    """A sample, and where the reader stands after it."""
    sample: Sample
    epoch: int
    shard: int
    number: int


class Shards(IterableDataset):
    """The samples of tar shards, each once an epoch."""

    def __init__(self, patterns: list[str], sizes: list[tuple[int, int]], batch: int, seed: int,
                 captioned: bool = True, shuffle: int = 1000, rank: int = 0, world: int = 1):
        self.bucket_sizes, self.batch, self.seed = sizes, batch, seed
        self.captioned, self.shuffle, self.rank, self.world = captioned, shuffle, rank, world
        self.shards = [shard for pattern in patterns for shard in expand(pattern)]
        missing = [one for one in self.shards if not is_remote(one) and not Path(one).is_file()]
        if missing:
            raise UserError(f"{len(missing)} of {len(self.shards)} shards are missing, "
                            f"such as {missing[0]}")

    def batches(self, positions: dict[int, Position], number: int,
                workers: int = 0) -> Iterator[Batch]:
        """Batches from where the readers stand; `number` batches were given before.

        `positions` (worker -> Position) is updated as batches are given. Raises UserError if
        there are fewer shards than readers.
        """
        readers = self.world * max(workers, 1)
        if len(self.shards) < readers:
            raise UserError(f"{len(self.shards)} shards for {readers} readers ({self.world} "
                            f"processes, {workers} workers each): give at least as many shards")
        self.positions, self.number = positions, number
        for batch in load_with_workers(self, workers):
            positions[batch.reader] = batch.position
            yield batch

    def __iter__(self) -> Iterator[Batch]:
        worker, workers = self.this_worker()
        reader, readers = self.rank * workers + worker, self.world * workers
        position = self.positions.get(worker, Position())
        stream = self.read(reader, readers, position)
        self.useless = 0
        whole = position.count == 0     # whether the first epoch is read from its beginning
        for _, epoch in itertools.groupby(stream, key=lambda item: item.epoch):
            self.used, self.error = 0, ""
            while block := list(itertools.islice(epoch, self.shuffle)):
                g = generator(self.seed, 4, reader, position.count)
                samples = [(index, Sample(*sample)) for index, sample in position.left]
                for i in torch.randperm(len(block), generator=g).tolist():
                    samples.append(((position.count + i) * readers + reader, block[i].sample))
                position = yield from self.block_batches(samples, block, position, worker)
            if whole and self.used == 0:
                raise UserError(f"no sample in {len(self.shards)} shards can be used; the last: "
                                f"{self.error}")
            whole = True

    def this_worker(self) -> tuple[int, int]:
        """(number of this worker, how many there are).

        The DataLoader asks worker 0 first. After a resume that is the worker whose turn is next.
        """
        info = get_worker_info()
        if info is None:
            return 0, 1
        return (info.id + self.number) % info.num_workers, info.num_workers

    def block_batches(self, samples: list[tuple[int, Sample]], block: list[Next],
                      position: Position, worker: int) -> Iterator[Batch]:
        """The batches of a block's samples, without those given before. Returns the position
        after the block."""
        waiting: dict[tuple, list[tuple[int, Sample, Crop]]] = {}
        given, skipped = 0, position.skipped
        for index, sample in samples:
            loaded = load_or_error(sample, self.bucket_sizes, self.captioned)
            if isinstance(loaded, str):
                skipped, self.error = skipped + 1, loaded
                self.useless += 1
                if self.useless >= MAX_USELESS:
                    raise UserError(f"{self.useless} samples in a row cannot be used; the last: "
                                    f"{loaded}")
                continue
            self.used, self.useless = self.used + 1, 0
            size = tuple(loaded.size[4:])
            waiting.setdefault(size, []).append((index, sample, loaded))
            if len(waiting[size]) == self.batch:
                full = waiting.pop(size)
                given += 1
                if given > position.given:
                    here = replace(position, given=given,
                                   skipped_since=skipped - position.skipped)
                    yield self.make_batch(full, here, worker)
        left = [(index, tuple(sample)) for some in waiting.values() for index, sample, _ in some]
        last = block[-1]
        return Position(last.epoch, last.shard, last.number, position.count + len(block), skipped,
                        left=left)

    def make_batch(self, full: list[tuple[int, Sample, Crop]], position: Position,
                   worker: int) -> Batch:
        return Batch([index for index, _, _ in full],
                     [choose_caption(sample.captions, self.seed, index)
                      for index, sample, _ in full],
                     torch.tensor([loaded.size for _, _, loaded in full]),
                     torch.stack([loaded.pixels for _, _, loaded in full]),
                     position=position, reader=worker)

    def read(self, reader: int, readers: int, start: Position) -> Iterator[Next]:
        """This reader's samples after `start`, without end."""
        for epoch in itertools.count(start.epoch):
            first = epoch == start.epoch
            order = torch.randperm(len(self.shards), generator=generator(self.seed, 5, epoch))
            mine = order.tolist()[reader::readers]
            found = first and start.shard + start.sample > 0
            for shard in range(start.shard if first else 0, len(mine)):
                url = self.shards[mine[shard]]
                done = start.sample if first and shard == start.shard else 0
                for number, sample in enumerate(samples_or_warning(url), 1):
                    if number > done:
                        yield Next(sample, epoch, shard, number)
                        found = True
            if not found:
                raise UserError(f"no samples in {len(mine)} shards, such as {url}")


def is_shards(path: str) -> bool:
    return is_remote(path) or re.search(r"\.tar(\.\w+)?$", path) is not None


def is_remote(path: str) -> bool:
    return path.startswith("pipe:") or "://" in path


def expand(pattern: str) -> list[str]:
    """a-{08..11}.tar -> a-08.tar, a-09.tar, a-10.tar, a-11.tar, as a shell does."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if match is None:
        return [pattern]
    low, high = match.groups()
    paths = []
    for i in range(int(low), int(high) + 1):
        number = str(i).zfill(len(low))
        paths += expand(pattern[:match.start()] + number + pattern[match.end():])
    return paths


@contextmanager
def open_stream(url: str) -> Iterator[BinaryIO]:
    """Raises OSError if it cannot be read, or if a command fails."""
    if url.startswith("pipe:"):
        command = url.removeprefix("pipe:")
        alone = get_worker_info() is None   # else it is in the process group of its worker
        with subprocess.Popen(command, shell=True, stdout=subprocess.PIPE,
                              start_new_session=alone) as process:
            try:
                yield process.stdout
                behind = 0      # a command fails if its pipe is closed early
                while found := process.stdout.read(1 << 16):
                    behind += len(found)
                    if behind > MAX_BEHIND:
                        raise OSError("the command prints on behind the archive's end")
            except BaseException:  # else leaving would wait for a command that stands still
                end_command(process, alone)
                raise
        if process.returncode:
            raise OSError(f"the command ended with code {process.returncode}")
    elif is_remote(url):
        with urllib.request.urlopen(url, timeout=60) as response:
            yield response
    else:
        with open(url, "rb") as file:
            yield file


def end_command(process: subprocess.Popen, whole_group: bool) -> None:
    with suppress(ProcessLookupError):
        if whole_group and hasattr(os, "killpg"):
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()


def samples_or_warning(url: str) -> Iterator[Sample]:
    """The shard's samples. Where it breaks off, a line on stderr says so."""
    count = 0
    try:
        for sample in samples_in(url):
            yield sample
            count += 1
    except Exception as error:  # tarfile raises many kinds for odd headers
        reason = " ".join(str(error).split()) or repr(error)
        complain(f"{url} breaks off after {count} samples ({reason}); going on with the next")


def samples_in(url: str) -> Iterator[Sample]:
    """Consecutive files with the same name up to its first dot are a sample.

    Raises an error of tarfile or of the stream where the shard breaks off.
    """
    with (open_stream(url) as stream,
          tarfile.open(fileobj=stream, mode="r|*", tarinfo=Header, errors="replace") as tar):
        for name, group in itertools.groupby(members(tar), key=lambda member: member[0]):
            files = {}
            for number, (_, kind, member) in enumerate(group):
                if number == MAX_FILES:
                    raise tarfile.ReadError(f"more than {MAX_FILES} files are called {name}")
                files[kind] = content(tar, member)
            picture = next((files[kind] for kind in PICTURES if kind in files), b"")
            yield Sample(f"{url}: {name}", picture, captions_in(files))


class Header(tarfile.TarInfo):
    """A header. Those that say that a name of more than a megabyte follows are refused."""

    def _proc_member(self, tar: tarfile.TarFile) -> tarfile.TarInfo:
        if not self.isfile() and self.size > 2**20:
            raise tarfile.ReadError(f"a header of {self.size} bytes")
        return super()._proc_member(tar)


def content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """A file of the archive; nothing if it is too large, or sparse and so perhaps larger still."""
    if member.issparse() or member.size > MAX_BYTES:
        return b""
    return tar.extractfile(member).read()


def members(tar: tarfile.TarFile) -> Iterator[tuple[str, str, tarfile.TarInfo]]:
    """The files of an archive that may be of use: name up to the first dot, the rest of the name,
    the file."""
    useless = 0
    while (member := tar.next()) is not None:
        tar.members.clear()  # else it keeps every member it has seen
        useless += 1
        if useless > MAX_USELESS:
            raise tarfile.ReadError(f"{MAX_USELESS} files in a row are no pictures and captions")
        if member.size > MAX_SKIPPED:
            raise tarfile.ReadError(f"{member.name} is said to have {member.size} bytes")
        if member.isfile():
            folder, _, file = member.name.rpartition("/")
            name, _, kind = file.partition(".")
            if kind.lower() in KINDS:
                useless = 0
                yield f"{folder}/{name}", kind.lower(), member
    if tar.fileobj.tell() < tar.offset + 512:
        raise EOFError("the archive has no end")


def captions_in(files: dict[str, bytes]) -> list[str]:
    """The lines of the .txt, else "caption" or "text" of the .json; none if they are damaged."""
    try:
        for kind in "txt", "caption":
            if kind in files:
                return nonempty_lines(files[kind].decode("utf-8-sig"))
        about = json.loads(files.get("json", b"{}"))
        return captions_of(about.get("caption")) or captions_of(about.get("text"))
    except (ValueError, AttributeError, RecursionError):
        return []
