"""Small helpers for files: tensors and JSON in and out, atomic writes, pictures."""
import json
import os
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sd import LazyTensor, UserError, check_names_and_shapes

Tensors = dict[str, LazyTensor]

# --- read ---

# Old .ckpt files name this class. Its contents are not needed.
LIGHTNING_CHECKPOINT = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"


class Placeholder:
    """Stands in for LIGHTNING_CHECKPOINT, so that the file can be unpickled without lightning."""


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors of a .safetensors or PyTorch file, none of them read yet, and its metadata.

    The file is memory-mapped, and no code in it is run.
    Raises UserError if the file is missing, damaged, or holds more than tensors.
    """
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            return lazy_safetensors(path)
        return lazy_pickle(path), {}
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: "
                        "ask for a .safetensors file of it") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path} is not a checkpoint that can be read: {reason}") from error


def lazy_safetensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    file = safe_open(path, framework="pt")
    read = remapping_reader(path)
    tensors = {}
    for name in file.keys():
        shape = torch.Size(file.get_slice(name).get_shape())
        tensors[name] = LazyTensor(shape, partial(read, name))
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
    """.ckpt, .pt and .bin. Raises UserError if the file has another format."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is damaged, or no checkpoint of PyTorch 1.6 or later: "
                        "give a .safetensors or .ckpt")
    with torch.serialization.safe_globals([(Placeholder, LIGHTNING_CHECKPOINT)]):
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    for key in "string_to_param", "state_dict":  # A1111's learned words; training checkpoints
        state = state.get(key, state)
    return {name: LazyTensor(value.shape, partial(state.get, name))
            for name, value in state.items() if isinstance(value, Tensor)}


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
        found = json.loads(path.read_text("utf-8"))
        return dict(found if key is None else found[key])
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


# --- write ---

@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives another path to write a file or folder to. It is moved to `path` once it is complete.

    Raises UserError if it cannot be written. Then nothing is left behind, and `path` is as it was.
    """
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def make_folder(path: Path) -> None:
    """Makes the folder if it is missing. Raises UserError if that fails."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error}") from error


def check_new(path: Path) -> None:
    """Raises UserError if a model cannot be saved at `path`.

    A .safetensors file is replaced; a folder or another file is not.
    """
    in_the_way = path.is_dir() or (path.exists() and path.suffix != ".safetensors")
    if in_the_way or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: give a new name, in a folder that exists "
                        "and is writable")


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype,
                 metadata: dict[str, str]) -> None:
    """Writes a .safetensors file, all tensors in `dtype`."""
    tensors = {name: tensor.detach().to("cpu", dtype).contiguous()
               for name, tensor in tensors.items()}
    save_file(tensors, path, metadata)
    path.chmod(0o644)  # safetensors makes files that only their owner can read


# --- pictures ---

def read_image(path: str | Path) -> Image.Image:
    """Any picture that Pillow reads, as RGBA, turned as its EXIF data says.

    Raises UserError if it cannot be read.
    """
    try:
        return ImageOps.exif_transpose(Image.open(path)).convert("RGBA")
    except (OSError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UserError(f"cannot read the picture {path}: {error}") from error


def on_white(image: Image.Image) -> Image.Image:
    """The picture as RGB. What was transparent is white."""
    image = image.convert("RGBA")
    background = Image.new("RGBA", image.size, "white")
    return Image.alpha_composite(background, image).convert("RGB")
