"""Reads diffusers folders: one subfolder for each network, with config and weights."""
from pathlib import Path
from typing import NamedTuple

from clip import load_bpe
from extras.checks import check_index, shown
from extras.diffusers_config import check_pipeline, scheduler_settings
from extras.files import Tensors, open_tensors, read_json
from sd import UserError

COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIG_FILES = ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")
TEXT_CONFIG_FILES = ("text_encoder/config.json", "text_encoder_2/config.json")
VOCABULARIES = ("tokenizer/vocab.json", "tokenizer_2/vocab.json")

SCHEDULERS = {  # our sampler -> diffusers' class, for those in rows of PRESETS
    "dpmpp_2m": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
}


class Marks(NamedTuple):
    """What a checkpoint says about its preset beside the weights. None: it does not say."""
    prediction_type: str | None = None
    timestep_spacing: str | None = None
    sampler: str | None = None
    sample_size: int | None = None  # of latents
    scale_factor: float | None = None
    beta_start: float | None = None
    beta_end: float | None = None
    beta_schedule: str | None = None


def open_folder(path: Path, half: bool = False) -> tuple[Tensors, dict[str, str], Marks]:
    """The tensors of a folder as "component/name", its metadata, and its marks.

    Of the weights, those in fp16 are taken if `half`.
    Raises UserError if something is missing or damaged.
    """
    if not (path / "model_index.json").exists():
        raise UserError(f"{path} is a folder without model_index.json: give a diffusers folder, "
                        "or a single .safetensors or .ckpt file")
    index = read_json(path / "model_index.json")
    check_index(path / "model_index.json", index)
    check_pipeline(path, index)
    for component in "tokenizer", "tokenizer_2":
        check_tokenizer(path / component)
    files = {file.relative_to(path).as_posix() for file in path.glob("*/*")}
    tensors, metadata = {}, {}
    for component in COMPONENTS:
        if not any(index.get(component) or []):  # [null, null] means that there is none
            continue
        file = weights_file(files, component, half)
        if file is None:
            raise UserError(f"{path} lacks the weights of its {component}, a .safetensors or .bin "
                            f"in {component}/")
        found, about = open_weights(path / file)
        tensors |= {f"{component}/{name}": tensor for name, tensor in found.items()}
        if component == "unet":  # where save_folder writes it
            metadata = {key: value for key, value in about.items() if key != "format"}
    return tensors, metadata, read_marks(path)


def check_tokenizer(folder: Path) -> None:
    """Raises UserError if a tokenizer gives words other numbers than CLIP's: then the prompt would
    be another."""
    file = next((folder / name for name in ("vocab.json", "tokenizer.json")
                 if (folder / name).is_file()), None)
    if file is None:
        return
    found = read_json(file)
    if file.name == "tokenizer.json":
        model = found.get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
    if found != load_bpe().get_vocab():
        raise UserError(f"{file} has other words than CLIP's, which is not supported: give a model "
                        "with the tokenizer of CLIP")


def open_weights(file: Path) -> tuple[Tensors, dict[str, str]]:
    """The tensors and metadata of a file, or of the shards that an index lists."""
    if not file.name.endswith(".json") and ".index." not in file.name:
        return open_tensors(file)
    tensors, metadata = {}, {}
    for shard in shards_in(file):
        found, about = open_tensors(file.parent / shard)
        tensors |= found
        metadata |= about
    return tensors, metadata


def shards_in(file: Path) -> list[str]:
    """The files that an index of shards lists. Raises UserError for what is no plain name."""
    shards = list(read_json(file, "weight_map").values())
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard or shard in ("", "..") \
                or "\0" in shard:
            raise UserError(f"{file}: weight_map lists {shown(shard)}, which is no name of a file "
                            "beside it")
    return sorted(set(shards))


def open_component(path: Path, component: str, half: bool) -> Tensors | None:
    """The tensors in a folder of one network alone, or of this network in a whole model's folder.

    None: it has no weights of it.
    """
    folder = path / component if (path / component).is_dir() else path
    files = {f"{component}/{file.name}" for file in folder.glob("*")}
    file = weights_file(files, component, half)
    if file is None:
        return None
    tensors, _ = open_weights(folder / Path(file).name)
    return {f"{component}/{name}": tensor for name, tensor in tensors.items()}


def weights_file(files: set[str], component: str, half: bool) -> str | None:
    """The file with the weights of a component, or the index of several.

    A .safetensors comes before a .bin. The fp16 variant comes first if `half`, else last.
    """
    variants = (".fp16", "") if half else ("", ".fp16")
    for kind in "safetensors", "bin":
        for variant in variants:
            for stem in "diffusion_pytorch_model", "model", "pytorch_model":
                for file in (f"{component}/{stem}{variant}.{kind}",
                             f"{component}/{stem}.{kind}.index{variant}.json"):
                    if file in files:
                        return file
    return None


def read_marks(path: Path) -> Marks:
    """What the folder's JSON files say. Raises UserError for a model that cannot be drawn with."""
    scheduler, unet, vae = (read_json(path / file) for file in CONFIG_FILES)
    marks = Marks(sample_size=unet.get("sample_size"), scale_factor=vae.get("scaling_factor"),
                  **scheduler_settings(path))
    if scheduler.get("_class_name") == SCHEDULERS["lcm"]:
        marks = marks._replace(sampler="lcm")
    for sampler, theirs in SCHEDULERS.items():
        kind = scheduler.get("_class_name"), scheduler.get("timestep_spacing")
        if kind == (theirs, "trailing"):  # as turbo models come
            marks = marks._replace(timestep_spacing="trailing", sampler=sampler)
    return marks
