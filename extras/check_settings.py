"""Which settings of train.py go together, and whether a run may be resumed with other ones.

`s` is train.py's Settings.
"""
import os
import re
from dataclasses import fields
from pathlib import Path

import torch

from extras.distributed import world_size
from extras.settings import check_ranges, flag
from extras.shards import is_shards
from sd import PRESETS, UserError


def check_settings(s) -> None:
    """Raises UserError for settings that are out of range or do not go together."""
    check_ranges(s)
    if s.lr <= 0:
        raise UserError(f"--lr must be above 0, not {s.lr}: else nothing is learned")
    if s.tokens > 77:
        raise UserError(f"--tokens is at most 77, not {s.tokens}")
    shards = [path for path in s.data if is_shards(path)]
    if 0 < len(shards) < len(s.data) or any(map(is_shards, s.class_data)):
        raise UserError("--data takes folders or tar shards, not both; --class-data takes folders")
    for path in [*s.data, *s.class_data]:
        if not is_shards(path) and not Path(path).is_dir():
            raise UserError(f"no such folder: {path}")
    if re.fullmatch(r"[\w-]+", s.init) and s.init not in PRESETS and not Path(s.init).exists():
        raise UserError(f"--init {s.init}: no such file, and no row of PRESETS "
                        f"({', '.join(PRESETS)})")
    for name, (fits, use) in uses(s, bool(shards)).items():
        if getattr(s, name) and not fits:
            raise UserError(f"{flag(name)} is for {use}")
    if s.train == "word" and not s.placeholder_token:
        raise UserError("--train word needs --placeholder-token, such as <cat-toy>")


def uses(s, shards: bool) -> dict[str, tuple[bool, str]]:
    """For settings that work only with others: whether they do, and what they are for."""
    weights, row = s.train in ("unet", "unet+text"), s.init in PRESETS
    return {
        "fsdp": (weights and not s.lora and "RANK" in os.environ,
                 "torchrun that trains the weights of a UNet"),
        "lora": (weights, "--train unet or unet+text"),
        "class_data": (s.captioned, "training on captions"),
        "cache": (s.captioned and not shards, "training on folders with captions"),
        "placeholder_token": (s.train == "word", "--train word"),
        "vq": (s.train == "vae", "--train vae"),
        "disc_weight": (not s.captioned, "--train vae or decoder"),
        "vae": (row and s.captioned, "training a UNet with --init ROW, a row of PRESETS"),
        "new_weights": (not row, "--init FILE"),
        "preset": (not row, "--init FILE"),
    }


def stored_settings(s) -> dict:
    """The settings that make a run what it is, for state.pt.

    Those of speed, and of how long it trains, may change.
    """
    stored = {}
    for f in fields(s):
        if not f.metadata["free"]:
            value = getattr(s, f.name)
            stored[f.name] = list(value) if isinstance(value, tuple) else value
    for name in "data", "class_data":
        stored[name] = [os.path.normpath(path) for path in stored[name]]
    stored["pictures per step"] = s.batch * s.accumulate * world_size()
    return stored


def check_same_run(s, before: dict) -> None:
    """Raises UserError if the run in --out was started with other settings (`before`)."""
    changed = []
    for name, value in stored_settings(s).items():
        if before.get(name, value) != value:
            shown = name if " " in name else flag(name)
            changed.append(f"{shown} was {before[name]!r} and is {value!r}")
    if changed and not s.resume:
        raise UserError(f"{s.out} holds a run with other settings ({'; '.join(changed)}): give "
                        "another --out, or --resume to go on with it")


# --- state.pt ---

STATE = {"step": int, "params": list, "ema": list, "optimizer": dict, "scaler": dict,
         "positions": list, "workers": int}


def read_state(path: Path) -> dict:
    """What state.pt holds. Raises UserError if it is damaged, or another program's."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a pickle may raise anything
        raise damaged_state(path, error) from error
    if not isinstance(saved, dict):
        raise damaged_state(path, "it holds no dict")
    for key, kind in STATE.items():
        if not isinstance(saved.get(key), kind):
            raise damaged_state(path, f"it has no {key!r}")
    tensors = [*saved["params"], *saved["ema"]]
    if not all(isinstance(one, torch.Tensor) for one in tensors):
        raise damaged_state(path, "not all of its weights are tensors")
    if not isinstance(saved.get("settings", {}), dict):
        raise damaged_state(path, "its settings are no dict")
    return saved


def damaged_state(path: Path, reason: object) -> UserError:
    line = (str(reason).splitlines() or [repr(reason)])[0]
    return UserError(f"{path} is damaged, or of another program ({line}): move it away to start "
                     "anew, or give another --out")
