"""What a pickle would cost to read, found without reading it: `check_pickle`.

PyTorch's reader runs no code of a pickle, but a few bytes may ask it for years of work. The tuple
(a, a), whose a is (b, b), and so on, has 2^n ends, and as a key of a dict all of them are hashed.
So the instructions are followed with sizes in place of values (pickletools says what each takes
from the stack and puts there).
"""
import io
import pickletools
import zipfile
from mmap import ACCESS_READ, mmap
from pathlib import Path
from typing import BinaryIO

from sd import UserError

MOST_BYTES = 2**25          # of a pickle in an archive; that of SD 1.x has 170,000
MOST_INSTRUCTIONS = 10**6   # that of SD 1.x has 36,000
MOST_VALUES = 10**7         # in what it makes, shared ones counted as often as they are used
ZEROS = b"bytearray"        # a class that makes zeros, of any number
PICKLES = 5                 # in files of old versions: three of a few numbers, the state, the keys


def check_pickle(path: Path, zipped: bool) -> None:
    """Raises UserError for a file that would unpack to far more than its own size."""
    if not zipped:
        with path.open("rb") as file:
            with mmap(file.fileno(), 0, access=ACCESS_READ) as content:
                check_content(path, content.find(ZEROS) >= 0, file, PICKLES)
        return
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        packed = any(entry.compress_type != zipfile.ZIP_STORED for entry in entries)
        if packed or sum(entry.file_size for entry in entries) > path.stat().st_size:
            raise UserError(f"{path} is a compressed archive, which torch does not write: ask "
                            "for a .safetensors file of it")
        for entry in entries:
            if entry.filename.endswith(".pkl"):
                if entry.file_size > MOST_BYTES:
                    raise too_large(path)
                content = archive.read(entry)
                check_content(path, ZEROS in content, io.BytesIO(content), 1)


def check_content(path: Path, makes_zeros: bool, file: BinaryIO, pickles: int) -> None:
    if makes_zeros:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: "
                        "ask for a .safetensors file of it")
    if is_too_large(file, pickles):
        raise too_large(path)


def too_large(path: Path) -> UserError:
    return UserError(f"{path} is damaged, or made to take very long to read: ask for a .safetensors"
                     " file of it")


def is_too_large(file: BinaryIO, pickles: int) -> bool:
    """Whether the pickles in a file, one behind the other, have too many instructions or values."""
    try:
        return any(is_one_too_large(file) for _ in range(pickles))
    except (ValueError, IndexError, KeyError, TypeError):
        return False    # damaged, as the reader will say when it comes there


def is_one_too_large(file: BinaryIO) -> bool:
    stack: list[int | None] = []    # sizes; None is a mark
    memo: dict[object, int] = {}
    for number, (code, argument, _) in enumerate(pickletools.genops(file)):
        if "PUT" in code.name or code.name == "MEMOIZE":
            memo[len(memo) if argument is None else argument] = stack[-1]
            continue
        size = 1 + (memo[argument] if "GET" in code.name else taken(code, stack))
        if size > MOST_VALUES or number > MOST_INSTRUCTIONS:
            return True
        stack += [None if made is pickletools.markobject else size for made in code.stack_after]
    return False


def taken(code: pickletools.OpcodeInfo, stack: list[int | None]) -> int:
    """The sizes that an instruction takes from the stack, added up."""
    size, single = 0, len(code.stack_before)
    if pickletools.stackslice in code.stack_before:     # all that lies on the uppermost mark
        single -= 2
        while (top := stack.pop()) is not None:
            size += top
    for _ in range(single):
        top = stack.pop()
        size += 0 if top is None else top
    return size
