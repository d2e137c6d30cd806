"""Models of the Hugging Face hub: owner/name -> a diffusers folder on this machine."""
import re
from collections.abc import Callable
from pathlib import Path
from urllib.parse import unquote

from extras.checks import reason
from extras.diffusers_folder import (
    COMPONENTS,
    CONFIG_FILES,
    TEXT_CONFIG_FILES,
    VOCABULARIES,
    weights_file,
)
from sd import UserError

WEB = re.compile(r"https?://")
PAGE = re.compile(r"(?:blob|resolve|raw)/([^/]+)/([^?#]+)")  # of a file: revision, path


def resolve_checkpoint(name: str | Path, half: bool = False) -> Path:
    """A path that exists, unchanged. For owner/name, or the address of a model or of one of its
    files: that folder or file of the hub.

    The files are downloaded unless they were before. Of the weights, those in fp16 are taken if
    `half`. Raises UserError if the hub has no such model, refuses it, or cannot be reached.
    """
    return resolve(str(name), lambda model: download(model, half))


def resolve_component(name: str | Path, component: str, half: bool = False) -> Path:
    """The same for one network: a model's own ("vae"), or a model of the hub that is one."""
    return resolve(str(name), lambda model: download_component(model, component, half))


def resolve(name: str, get: Callable[[str], Path]) -> Path:
    """`get` downloads a model. Raises UserError."""
    path = Path(name)
    if WEB.match(name):
        model, revision, file = parse_address(name)
        if file is not None:
            return explained(model, lambda: download_file(model, revision, file))
        return explained(model, lambda: get(model))
    looks_like_a_model = re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name)
    ending = path.suffix.lower() in (".safetensors", ".ckpt", ".sft", ".pt", ".pth", ".bin")
    try:
        exists = path.exists()
    except OSError as error:    # a name of 300 characters, a folder that cannot be read
        raise UserError(f"cannot open {name}: {error.strerror}") from error
    if exists or not looks_like_a_model or ending:
        return path
    return explained(name, lambda: get(name))


def parse_address(address: str) -> tuple[str, str, str | None]:
    """Of an address of the hub: owner/name, revision, and the file if it is one's."""
    from huggingface_hub import constants
    hubs = (constants.ENDPOINT, "https://huggingface.co", "http://huggingface.co", "https://hf.co")
    hub = next((hub for hub in hubs if address.startswith(hub + "/")), None)
    parts = [] if hub is None else address.removeprefix(hub + "/").split("?")[0].split("/", 2)
    if len(parts) < 2 or not parts[1]:
        raise UserError(f"{address} is no address of a model at {constants.ENDPOINT}: download the "
                        "file and give that")
    match = PAGE.match(parts[2]) if len(parts) == 3 else None
    model = "/".join(parts[:2])
    return (model, "main", None) if match is None else (model, match[1], unquote(match[2]))


def ask(model: str, revision: str | None = None) -> set[str] | None:
    """The files of a model, as the hub lists them; None without a network or with HF_HUB_OFFLINE.

    Raises UserError for an unknown revision, and what huggingface_hub raises if the hub refuses.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    try:
        found = HfApi().model_info(model, revision=revision)
    except (RepositoryNotFoundError, HFValidationError):  # GatedRepoError is one of the former
        raise
    except RevisionNotFoundError as error:
        raise UserError(f"{model} has no revision {revision}: look at the address again") from error
    except Exception:
        return None
    return {file.rfilename for file in found.siblings}


def download_file(model: str, revision: str, file: str) -> Path:
    """One file. Without a network: as it was downloaded before."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
    # asked first: without a network hf_hub_download would try for half a minute
    local = ask(model, revision) is None
    try:
        return Path(hf_hub_download(model, file, revision=revision, local_files_only=local))
    except LocalEntryNotFoundError:
        raise
    except EntryNotFoundError as error:
        raise UserError(f"{model} has no file {file} at revision {revision}: look at the address "
                        "again") from error


def download_component(model: str, component: str, half: bool) -> Path:
    """The folder with one network of a model, or with a model that is one network."""
    from huggingface_hub import snapshot_download
    names = [f"{component}/config.json", "config.json", "scheduler/scheduler_config.json"]
    files = ask(model)
    if files is None:   # what was downloaded before
        return Path(snapshot_download(model, allow_patterns=["config.json"], local_files_only=True))
    start = f"{component}/" if any(file.startswith(f"{component}/") for file in files) else ""
    own = {f"{component}/{Path(file).name}" for file in files
           if file.startswith(start) and "/" not in file.removeprefix(start)}
    weights = weights_file(own, component, half)
    if weights is None:
        raise UserError(f"{model} has no weights of a {component} that diffusers wrote: give the "
                        "address of the file you want")
    chosen = [weights] if not weights.endswith(".json") else [weights, *shards_of(weights, own)]
    names += [start + Path(file).name for file in chosen]
    return Path(snapshot_download(model, allow_patterns=names))


def explained(name: str, get: Callable[[], Path]) -> Path:
    """What `get` downloads. Raises UserError for what can go wrong, with what to do."""
    from huggingface_hub import constants  # not above: the import takes 0.2 s
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )
    hub = constants.ENDPOINT
    try:
        return get()
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
        why = reason(error)
        raise UserError(f"the download of {name} stopped ({why}): run it again, the files that "
                        "are complete are kept") from error


def download(name: str, half: bool) -> Path:
    """The folder that holds the files of a model. Raises the errors of huggingface_hub."""
    from huggingface_hub import constants, snapshot_download
    files = ask(name)
    if files is None:   # what was downloaded before
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
    configs = [file for file in (*TEXT_CONFIG_FILES, *VOCABULARIES) if file in files]
    return ["model_index.json", *CONFIG_FILES, *configs, *chosen]


def shards_of(index: str, files: set[str]) -> list[str]:
    """The weights that belong to an index of shards, such as
    unet/diffusion_pytorch_model.safetensors.index.json."""
    pattern = re.sub(r"\.(safetensors|bin)\.index.*",
                     r"(.fp16)?-\\d+-of-\\d+(.fp16)?.\1", index)
    same_variant = [file for file in files if ("fp16" in file) == ("fp16" in index)]
    return [file for file in same_variant if re.fullmatch(pattern, file)]
