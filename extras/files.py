"""Small helpers for files: tensors and JSON in and out, atomic writes, pictures."""
import json
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from extras.checks import reason
from extras.locks import clean_up, unfinished_folder
from extras.pickles import check_pickle
from sd import LazyTensor, UserError, check_names_and_shapes

Tensors = dict[str, LazyTensor]

# --- read ---

# Old files name these classes. Of the first, the contents are not needed; the second holds tensors.
LIGHTNING_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"
PARAMETER_DICT = "torch.nn.modules.container.ParameterDict"
WRAPPERS = ("string_to_param", "state_dict", "model_state_dict", "model", "module", "params_ema",
            "params", "state_dict_ema", "ema", "ema_state_dict")  # dicts around the tensors
NOT_WEIGHTS = re.compile(r"optim|scheduler|callbacks|loops|hyper_parameters|scaler", re.IGNORECASE)


DTYPES_READ = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8",
               "BOOL")
MOST_ENTRIES, MOST_DEPTH = 200_000, 12  # of the dicts in a pickle
MOST_JSON = 2**26                       # bytes of a folder's JSON file


class Placeholder:
    """Stands in for LIGHTNING_CHECKPOINT, so that the file can be unpickled without lightning."""


class PlainParameterDict:
    """Stands in for PARAMETER_DICT."""


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors or PyTorch file, none of them read yet, and its metadata.

    The contents tell the format, not the name's ending. Files are memory-mapped, but for those of
    PyTorch before 1.6, and no code in them is run.
    Raises UserError if the file is missing, damaged, or holds more than tensors.
    """
    try:
        if not path.is_file():      # nor a pipe or a device, which may have no end
            raise UserError(f"no such file: {path}")
        if is_safetensors(path):
            return lazy_safetensors(path)
        return lazy_pickle(path), {}
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: "
                        "ask for a .safetensors file of it") from error
    except Exception as error:      # a pickle may raise anything
        raise UserError(f"{path} is not a checkpoint that can be read: {reason(error)}") from error


FOREIGN = [  # how files begin that are no checkpoints, and what to do
    (b"version https://git-lfs", "a pointer of Git LFS and not the file itself: run `git lfs pull`"
     ", or download it"),
    (b"<", "a web page and not a checkpoint: download the file again, after logging in if asked"),
    (b"GGUF", "in the format GGUF, which is not read: give a .safetensors in fp16, bf16 or fp32"),
    (b"{", "JSON and holds no weights: give the .safetensors or .ckpt beside it"),
]


def is_safetensors(path: Path) -> bool:
    """Raises UserError for files that are plainly something else."""
    with path.open("rb") as file:
        start = file.read(32)
    if not start:
        raise UserError(f"{path} is empty: download it again")
    for begin, what in FOREIGN:
        if start.lstrip().startswith(begin):
            raise UserError(f"{path} is {what}")
    if path.suffix.lower() in (".safetensors", ".sft"):
        return start[:4] != b"PK\x03\x04"
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def lazy_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    file = safe_open(path, framework="pt")
    read = remapping_reader(path)
    tensors = {}
    for name in file.keys():
        info = file.get_slice(name)
        if info.get_dtype() not in DTYPES_READ:
            raise UserError(f"{path}: {name} is of the type {info.get_dtype()}, which is not "
                            "supported: give it in fp16, bf16 or fp32")
        tensors[name] = LazyTensor(torch.Size(info.get_shape()), partial(read, name))
    return tensors, file.metadata() or {}


def remapping_reader(path: Path, max_bytes: int = 2**27) -> Callable[[str], Tensor]:
    """A function that reads tensors of a .safetensors by name.

    The pages of a mapped file that were read count as memory in use. So the file is mapped
    again after `max_bytes`, which lets go of the pages read before.
    """
    file, bytes_read = None, 0

    def read(name: str) -> Tensor:
        nonlocal file, bytes_read
        if file is None or bytes_read > max_bytes:
            file, bytes_read = safe_open(path, framework="pt"), 0
        tensor = file.get_tensor(name)
        bytes_read += tensor.nbytes
        return tensor

    return read


def lazy_pickle(path: Path) -> Tensors:
    """.ckpt, .pt and .bin, of old versions too. Raises UserError if the file has another format."""
    zipped = zipfile.is_zipfile(path)
    with path.open("rb") as file:
        if not zipped and file.read(1) != b"\x80":  # how a pickle begins
            raise UserError(f"{path} is damaged, or no checkpoint: give a .safetensors or .ckpt")
    check_pickle(path, zipped)
    known = [(Placeholder, LIGHTNING_CHECKPOINT), (PlainParameterDict, PARAMETER_DICT)]
    with torch.serialization.safe_globals(known):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # an error says it too
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    if not as_dict(state):
        raise UserError(f"{path} is not a checkpoint that can be read: it holds no dict of tensors")
    found = flat_tensors(unwrapped(state))
    for name, value in found.items():
        check_tensor(path, name, value)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes()
                for value in found.values()}
    if sum(storages.values()) > path.stat().st_size:
        raise UserError(f"{path} is damaged: its tensors have more numbers than the file holds")
    return {name: LazyTensor(value.shape, partial(found.get, name))
            for name, value in found.items()}


def as_dict(value: object) -> dict:
    """The dict in a value; empty if there is none."""
    if isinstance(value, PlainParameterDict):
        return vars(value).get("_parameters") or vars(value)
    return value if isinstance(value, dict) else {}


def unwrapped(state: object) -> dict:
    """The innermost of the dicts that training programs put around the tensors."""
    state = as_dict(state)
    for key in WRAPPERS:
        if flat_tensors(as_dict(state.get(key))):
            return unwrapped(state[key])
    return state


def flat_tensors(state: dict) -> dict[str, Tensor]:
    """All tensors in nested dicts, {"vae": {"x": tensor}} as {"vae.x": tensor}.

    Raises ValueError for more than MOST_ENTRIES: dicts may hold each other again and again.
    """
    found, waiting, seen = {}, [("", state, 0)], 0
    while waiting:
        prefix, inner, depth = waiting.pop()
        seen += len(inner)
        if seen > MOST_ENTRIES:
            raise ValueError(f"it holds more than {MOST_ENTRIES} entries")
        for key, value in inner.items():
            if not isinstance(key, (str, int)):
                continue
            name = f"{prefix}{key}"
            if isinstance(value, Tensor):
                found[name] = value
            elif depth < MOST_DEPTH and as_dict(value) and not NOT_WEIGHTS.search(name):
                waiting.append((name + ".", as_dict(value), depth + 1))
    return found


def check_tensor(path: Path, name: str, value: Tensor) -> None:
    """Raises UserError for a tensor with more numbers than the file has for it (its strides may
    repeat one), or without a plain layout."""
    plain = value.layout == torch.strided and value.device.type == "cpu" and not value.is_quantized
    if not plain or value.numel() * value.element_size() > value.untyped_storage().nbytes():
        raise UserError(f"{path} is damaged: {name[:80]} is no plain tensor, or has more numbers "
                        "than the file holds for it")
    if not is_text(name):
        raise UserError(f"{path} is damaged: the name {name[:80]!r} is no valid text")


def is_text(text: str) -> bool:
    """JSON and pickles can hold half a character (a lone surrogate), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_fits(path: Path, found: Tensors, wanted: dict[str, Tensor]) -> None:
    """Raises UserError that names the first five tensors of each kind that do not fit."""
    try:
        check_names_and_shapes(found, wanted)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def read_json(path: Path, key: str | None = None) -> dict:
    """The object in a JSON file, or the object under `key` in it.

    Raises UserError if the file is missing or damaged.
    """
    try:
        if path.exists() and not path.is_file():    # a pipe or a device has no end
            raise UserError(f"{path} is no file")
        if path.stat().st_size > MOST_JSON:
            raise UserError(f"{path} has more than {MOST_JSON} bytes, and is not read")
        found = json.loads(path.read_text("utf-8"))
        found = found if key is None else found[key]
        if not isinstance(found, dict):
            raise ValueError("it holds no object" + ("" if key is None else f" under {key!r}"))
        return found
    except UserError:
        raise
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


# --- write ---

@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives another path to write a file or folder to. It is moved to `path` once it is complete.

    Raises UserError if it cannot be written. Then nothing is left behind, and `path` is as it was.
    """
    try:
        with unfinished_folder(path.parent) as folder:
            temporary = folder / path.name
            yield temporary
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error
    except RuntimeError as error:
        if "PytorchStreamWriter" not in str(error) and "inline_container" not in str(error):
            raise
        raise UserError(f"cannot write {path}: is the disk full?") from error


def make_folder(path: Path) -> None:
    """Makes the folder if it is missing, and removes what killed runs left unfinished in it.

    Raises UserError if that fails.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        clean_up(path)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error}") from error


def check_new(path: Path) -> None:
    """Raises UserError if a model cannot be saved at `path`.

    A .safetensors file is replaced; a folder or another file is not.
    """
    try:
        in_the_way = path.is_dir() or (path.exists() and path.suffix != ".safetensors")
    except OSError:     # the name is too long, or the folder cannot be read
        in_the_way = True
    if in_the_way or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: give a new name, in a folder that exists "
                        "and is writable")


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype,
                 metadata: dict[str, str]) -> None:
    """Writes a .safetensors file, all tensors in `dtype`."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in tensors.items()}
    save_file(tensors, path, metadata)
    follow_umask(path)


def follow_umask(path: Path) -> None:
    """safetensors makes files that only their owner can read; this is as all other new files."""
    beside = path.with_name(path.name[:100] + ".umask")
    beside.touch(0o666)
    path.chmod(beside.stat().st_mode & 0o777)
    beside.unlink()


# --- pictures ---

# Pillow tries 43 formats, and for some of them it starts other programs (EPS: Ghostscript).
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "AVIF")
MAX_PIXELS = 2**26  # of a picture, 8192 x 8192: a small file can say that it has far more
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)  # we have our own bound


def open_image(path: str | Path | BinaryIO) -> Image.Image:
    """As PIL.Image.open, for the formats in FORMATS. The pixels are not decoded yet.

    Raises UserError for a picture of more than MAX_PIXELS.
    """
    image = Image.open(path, formats=FORMATS)
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise UserError(f"cannot read the picture {path_of(path)}: it has {image.width}x"
                        f"{image.height} pixels, and at most {MAX_PIXELS} are read: make it "
                        "smaller")
    return image


def path_of(source: str | Path | BinaryIO) -> str:
    return str(source) if isinstance(source, (str, Path)) else "in the shard"


def read_image(path: str | Path | BinaryIO) -> Image.Image:
    """A picture as RGBA, turned as its EXIF data says. Raises UserError if it cannot be read."""
    try:
        image = open_image(path)
        if image.format == "TIFF":
            image.filename = ""     # Pillow maps it into memory by its size once it is turned
        turned = ImageOps.exif_transpose(image)
        if turned.mode.startswith(("I", "F")):
            turned = with_8_bits(turned, image.format)
        return turned.convert("RGBA")
    except UserError:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for a damaged file
        reason = " ".join(str(error).split()) or repr(error)
        raise UserError(f"cannot read the picture {path_of(path)}: {reason}") from error


def with_8_bits(image: Image.Image, file_format: str | None) -> Image.Image:
    """A gray picture of 16 or 32 bits or of floats in 8 bits, where Pillow would clip it.

    White is 65535 in 16 bits and 1.0 in floats. Numbers of 32 bits, and floats above 1, are taken
    for those of 8 or 16 bits if they fit into them.
    """
    values = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
    most = values.max()
    if image.mode == "F" and most <= 1:
        white = 1.0
    elif image.mode.startswith("I;16") or file_format == "PNG":
        white = 65535.0
    else:
        white = next((white for white in (255.0, 65535.0, 2.0**31 - 1) if most <= white), most)
    scaled = (values * (255 / white)).round().clip(0, 255)
    return Image.fromarray(scaled.astype(np.uint8))


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB. What was transparent is white."""
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image).convert("RGB")
