"""What a pickle would cost to read, found without reading it: `check_pickle`.

PyTorch's reader runs no code of a pickle, but a few bytes may ask it for years of work. The tuple
(a, a), whose a is (b, b), and so on, has 2^n ends, and as a key of a dict all of them are hashed.
So the instructions are followed with sizes in place of values (pickletools says what each takes
from the stack and puts there).
"""
import codecs
import io
import pickletools
import zipfile
from itertools import count
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

import torch

from sd import UserError

MOST_INSTRUCTIONS = 2 * 10**6   # of a file; SD 1.x takes 36,000
MOST_VALUES = 5 * 10**7         # put into others, shared ones as often as they are
MOST_LONG = 1000                # whole numbers from 2^60 on: many of them may have one hash
PICKLES = 5     # in files of old versions: three of a few numbers, the state, the keys
GROWING = {"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"}  # they change what they are given
Cell = list[int]                # the size of a value, which may still grow


def check_pickle(path: Path, zipped: bool) -> None:
    """Raises UserError for a file that would unpack to far more than its own size."""
    if not zipped:
        with path.open("rb") as file:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                zeros = content.find(b"bytearray") >= 0     # a class that makes any number of them
            check_content(path, zeros, file, PICKLES)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if (any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
            or sum(entry.file_size for entry in entries) > path.stat().st_size
            or min((entry.header_offset for entry in entries), default=0) > 0):
        raise UserError(f"{path} is a compressed archive, or more than one, which torch does not "
                        "write: ask for a .safetensors file of it")
    try:    # as PyTorch finds it, whatever else the archive may hold
        content = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    except RuntimeError as error:
        raise UserError(f"{path} is damaged: PyTorch finds no pickle in it") from error
    check_content(path, b"bytearray" in content, io.BytesIO(content), 1)


def check_content(path: Path, zeros: bool, file: BinaryIO, pickles: int) -> None:
    if zeros:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: "
                        "ask for a .safetensors file of it")
    try:
        Follower(file, pickles).follow()
    except TooMuchError as error:
        raise UserError(f"{path} is damaged, or made to take very long to read, with {error}: ask "
                        "for a .safetensors file of it") from error
    except (ValueError, IndexError, KeyError, TypeError, AttributeError):
        pass    # damaged, as the reader will say when it comes there


class TooMuchError(Exception):
    """The message says of what."""


class Follower:
    """It follows the pickles in a file, one behind the other."""

    def __init__(self, file: BinaryIO, pickles: int):
        self.file, self.pickles = file, pickles
        self.numbers, self.values, self.long = count(1), 0, 0
        self.encodes, self.texts = False, set()

    def follow(self) -> None:
        for _ in range(self.pickles):
            stack: list[Cell | None] = []   # None is a mark
            memo: dict[object, Cell] = {}
            for code, argument, _ in pickletools.genops(self.file):
                if next(self.numbers) > MOST_INSTRUCTIONS:
                    raise TooMuchError(f"more than {MOST_INSTRUCTIONS} instructions")
                self.look_at(code.name, argument)
                if "PUT" in code.name or code.name == "MEMOIZE":
                    memo[len(memo) if argument is None else argument] = stack[-1]
                else:
                    made = memo[argument] if "GET" in code.name else self.make(code, stack)
                    stack += [None if kind is pickletools.markobject else made
                              for kind in code.stack_after]

    def make(self, code: pickletools.OpcodeInfo, stack: list[Cell | None]) -> Cell:
        """What an instruction makes of what it takes from the stack."""
        taken = take(code, stack)
        made = taken[0] if code.name in GROWING else [1]
        size = sum(cell[0] for cell in taken if cell is not made)
        made[0] += size
        self.values += 1 + size
        if self.values > MOST_VALUES:
            raise TooMuchError(f"more than {MOST_VALUES} values")
        return made

    def look_at(self, name: str, argument: object) -> None:
        """Numbers whose hashes are alike, and texts that may grow when they are encoded."""
        if name.startswith("LONG") and isinstance(argument, int) and abs(argument) >= 2**60:
            self.long += 1
            if self.long > MOST_LONG:
                raise TooMuchError(f"more than {MOST_LONG} large numbers")
        if not isinstance(argument, str):
            return
        new = {argument} - self.texts if len(argument) < 30 and "." not in argument else set()
        self.texts |= new
        if "_codecs" in argument and not self.encodes:
            self.encodes, new = True, self.texts
        if self.encodes and any(map(is_other_encoding, new)):
            raise TooMuchError("texts in a code that may make them longer")


def take(code: pickletools.OpcodeInfo, stack: list[Cell | None]) -> list[Cell]:
    """What an instruction takes from the stack, the lowest first."""
    taken, single = [], len(code.stack_before)
    if pickletools.stackslice in code.stack_before:     # all that lies on the uppermost mark
        single -= 2
        while (top := stack.pop()) is not None:
            taken.append(top)
    taken += [stack.pop() for _ in range(single)]
    return [cell for cell in reversed(taken) if cell is not None]


def is_other_encoding(text: str) -> bool:
    """Whether it names an encoding that is not latin1, in which pickles write bytes.

    Numbers are code pages, which make no text longer; storages have numbers as names too.
    """
    if text.isdigit():
        return False
    try:
        return codecs.lookup(text).name != "iso8859-1"
    except (LookupError, ValueError):
        return False
