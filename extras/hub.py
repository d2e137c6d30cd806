"""Models of the Hugging Face hub: owner/name -> a diffusers folder on this machine."""
import re
from pathlib import Path

from extras.diffusers_folder import COMPONENTS, CONFIG_FILES, weights_file
from sd import UserError


def resolve_checkpoint(name: str | Path, half: bool = False) -> Path:
    """A path that exists, unchanged. For owner/name: the folder of that model of the hub.

    The files are downloaded unless they were before. Of the weights, those in fp16 are taken if
    `half`. Raises UserError if the hub has no such model, refuses it, or cannot be reached.
    """
    path, name = Path(name), str(name)
    looks_like_a_model = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    if path.exists() or not looks_like_a_model or path.suffix in (".safetensors", ".ckpt"):
        return path
    from huggingface_hub import constants  # not above: the import takes 0.2 s
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    hub = constants.ENDPOINT
    try:
        return download(name, half)
    except UserError:
        raise
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: agree to its terms at {hub}/{name}, then log in with "
                        "`hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name} is no file or folder here, and no model at {hub} (or a private "
                        "one: log in with `hf auth login`)") from error
    except LocalEntryNotFoundError as error:
        why = f"{hub} cannot be reached: connect to it"
        if constants.HF_HUB_OFFLINE:
            why = "HF_HUB_OFFLINE is set: unset it"
        raise UserError(f"{name} is no file or folder here, was not downloaded before, and {why}, "
                        "or give a file") from error
    except (Exception, KeyboardInterrupt) as error:  # of the network, a full disk, Ctrl-C
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the download of {name} stopped ({why}): run it again, the files that "
                        "are complete are kept") from error


def download(name: str, half: bool) -> Path:
    """The folder that holds the files of a model. Raises the errors of huggingface_hub."""
    from huggingface_hub import HfApi, constants, snapshot_download
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
    try:
        files = {file.rfilename for file in HfApi().model_info(name).siblings}
    except (RepositoryNotFoundError, HFValidationError):  # GatedRepoError is one of the former
        raise
    except Exception:  # no network, or HF_HUB_OFFLINE: use what was downloaded before
        return Path(snapshot_download(name, allow_patterns=["model_index.json"],
                                      local_files_only=True))
    if "model_index.json" not in files:
        raise UserError(f"{name} is no diffusers folder: download the file you want of "
                        f"{constants.ENDPOINT}/{name}/tree/main and give that")
    return Path(snapshot_download(name, allow_patterns=allow_patterns(files, half)))


def allow_patterns(files: set[str], half: bool) -> list[str]:
    """Those of the hub's files that `open_folder` reads."""
    chosen = []
    for component in COMPONENTS:
        file = weights_file(files, component, half)
        if file is not None:
            chosen.append(file)
        if file is not None and file.endswith(".json"):
            chosen += shards_of(file, files)
    return ["model_index.json", *CONFIG_FILES, *chosen]


def shards_of(index: str, files: set[str]) -> list[str]:
    """The weights that belong to an index of shards, such as
    unet/diffusion_pytorch_model.safetensors.index.json."""
    pattern = re.sub(r"\.(safetensors|bin)\.index.*",
                     r"(.fp16)?-\\d+-of-\\d+(.fp16)?.\1", index)
    same_variant = [file for file in files if ("fp16" in file) == ("fp16" in index)]
    return [file for file in same_variant if re.fullmatch(pattern, file)]
