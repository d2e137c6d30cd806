"""What people have on disk: an official single file, a diffusers folder, or the name of a model on the Hugging Face hub.

All become the same: tensors by name, none read yet. A file's names are those of this project's modules, a folder's
`diffusers_name`s such as "unet/down_blocks.0.resnets.0.conv1.weight". `config` is a sd.Preset throughout.
"""
import ctypes
import gc
import json
import mmap
import os
import pickle
import re
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor


class Stored(NamedTuple):
    """A tensor in a file."""
    shape: torch.Size
    read: Callable[[], Tensor]


Tensors = dict[str, Stored]


class UserError(ValueError):
    """Something only the user can mend, said in one line."""


# --- a single file ---

IGNORED = re.compile(  # what files hold beside the weights: buffers, training state, another copy, marks
    r".*position_ids$|model_ema\.|.*logit_scale$|.*attn_mask$|(betas|alphas_cumprod|alphas_cumprod_prev|sqrt_.*|log_one_minus_.*|posterior_.*|logvar"
    r"|denoiser\.sigmas|v_pred|ztsnr)$")


LIGHTNING = "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint"  # old .ckpt files name this class; nothing of it is needed


class Inert:
    """Stands in for it."""


def open_checkpoint(path: Path) -> tuple[Tensors, dict[str, str], dict]:
    """A file's tensors by official name, its metadata, and what its marks say of the Preset: "prediction", None if they say nothing.
    Raises UserError if it cannot be read."""
    tensors, metadata = open_tensors(path)
    marked = "v" if "v_pred" in tensors else None  # of SDXL variants; the other mark is that of SAI's model specification
    prediction = PREDICTION_TYPES.get(metadata.get("modelspec.prediction_type", marked))
    if prediction == "v" and "ztsnr" in tensors:  # of which that specification knows nothing
        prediction = "v-zero-snr"
    text = "cond_stage_model.transformer."
    tensors = {re.sub(rf"^{text}(?!text_model\.)", text + "text_model.", name): tensor for name, tensor in tensors.items()}  # old merges lack it
    return {name: tensor for name, tensor in tensors.items() if not IGNORED.match(name)}, metadata, {"prediction": prediction}


def open_tensors(path: Path) -> tuple[Tensors, dict[str, str]]:
    """The same with the names as they are. The file is memory-mapped, and no code in it is run."""
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    try:
        if path.suffix == ".safetensors":
            file = safe_open(path, framework="pt")
            read = mapped(path)
            return {name: Stored(torch.Size(file.get_slice(name).get_shape()), partial(read, name)) for name in file.keys()}, file.metadata() or {}
        if not zipfile.is_zipfile(path):
            raise UserError(f"{path} is damaged, or no checkpoint of PyTorch 1.6 or later: give a .safetensors or .ckpt")
        with torch.serialization.safe_globals([(Inert, LIGHTNING)]):
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        state = state.get("state_dict", state.get("string_to_param", state))  # the latter in A1111's files of learned words
        return {name: Stored(value.shape, partial(state.get, name)) for name, value in state.items() if isinstance(value, Tensor)}, {}
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds more than tensors and could run code: ask for a .safetensors file of it") from error
    except (SafetensorError, OSError, RuntimeError, EOFError, AttributeError) as error:
        raise UserError(f"{path} is not a checkpoint that can be read: {str(error).splitlines()[0]}") from error


def mapped(path: Path, at_a_time: int = 2**27) -> Callable[[str], Tensor]:
    """Reads tensors of a .safetensors. What has been read of a mapped file counts as memory in use, so it is mapped anew after so many bytes."""
    file, read = None, 0

    def get(name: str) -> Tensor:
        nonlocal file, read
        if file is None or read > at_a_time:
            file, read = safe_open(path, framework="pt"), 0
        tensor = file.get_tensor(name)
        read += tensor.nbytes
        return tensor
    return get


def check_names_and_shapes(path: Path, found: dict[str, torch.Size], wanted: dict[str, torch.Size]) -> None:
    """Raises UserError naming the first five tensors that are missing, surplus, or of another shape. A 1x1 convolution may be a matrix."""
    def matrix(shape: torch.Size) -> torch.Size:
        return shape[:2] if shape[2:] == (1, 1) else shape
    problems = {
        "missing": [name for name in wanted if name not in found],
        "surplus": [name for name in found if name not in wanted],
        "of another shape": [f"{name} {list(found[name])} instead of {list(wanted[name])}"
                             for name in wanted if name in found and matrix(found[name]) != matrix(wanted[name])],
    }
    told = [f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}" for what, names in problems.items() if names]
    if told:
        raise UserError(f"{path} does not fit: {'; '.join(told)}")


# --- into memory, and fast ---

def converted(tensor: Tensor, device: str, dtype: torch.dtype, channels_last: bool = True) -> Tensor:
    """As `Tensor.to`, laid out as it is computed with: most convolutions like channels last, and positions become tokens without a copy."""
    layout = torch.channels_last if tensor.ndim == 4 and channels_last else torch.contiguous_format
    if device != "cpu" or dtype != torch.bfloat16 or tensor.dtype == dtype:
        return tensor.to(device, dtype, memory_format=layout)
    # PyTorch writes bf16 one number at a time, unless from fp32 in the same layout: to go there first, and to change the layout of bf16, half as large,
    # last, in pieces a cache can hold, is 1.3 to 4 times as fast
    out = torch.empty_like(tensor, device=device, dtype=dtype, memory_format=layout)
    rows = max(1, 2**18 * len(tensor) // tensor.numel())
    for piece, source in zip(out.split(rows), tensor.split(rows)):
        piece.copy_(source.float().to(dtype) if tensor.ndim == 4 else source.float())
    return out


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is that one."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    return libc if hasattr(libc, "mallopt") else None


def keep_freed_memory() -> None:
    """Have glibc keep what is freed: else it gives large blocks back and gets them anew at every layer, page by page, a tenth of a CPU's time."""
    if (libc := glibc()) is not None:
        libc.mallopt(-4, 0)          # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


def give_back_freed_memory() -> None:
    """But between two networks: the holes that one leaves are seldom of the sizes that the other needs (SD 1.x at 512x512: 0.1 to 0.2 GB)."""
    if (libc := glibc()) is not None:
        libc.malloc_trim(0)


@contextmanager
def claimed(size: int) -> Iterator[None]:
    """Meanwhile two threads get so many bytes from the system, for glibc to give out afterwards. Page by page, each when it is first written to, this
    takes as long as all else in loading a model (0.4 s for 2.1 GB) and both of a laptop's cores. In the main thread only, whose memory is one heap."""
    keep_freed_memory()
    libc, page, piece = glibc(), mmap.PAGESIZE, 2**24
    if libc is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    try:
        with ThreadPoolExecutor(2) as pool:
            if block is not None:
                for start in range(-(-block // page) * page, block + size - piece, piece):
                    pool.submit(libc.madvise, start, piece, 23)  # MADV_POPULATE_WRITE; Linux before 5.14 refuses, and loading takes as long as ever
            yield
    finally:
        libc.free(block)  # what was made meanwhile lies above it on the heap, so that it is not given back


@contextmanager
def collector_off() -> Iterator[None]:
    """Within, Python does not look for garbage: as modules and tensors are made, it would go through all that was imported, again and again, a
    twentieth of the time that loading takes."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- a diffusers folder ---

NAMES = [  # official -> diffusers; first the UNet's, then the VAE's
    (r"^time_embed\.0", "time_embedding.linear_1"), (r"^time_embed\.2", "time_embedding.linear_2"),
    (r"^cond_proj", "time_embedding.cond_proj"), (r"^label_emb\.0\.0", "add_embedding.linear_1"), (r"^label_emb\.0\.2", "add_embedding.linear_2"),
    (r"^input_blocks\.0\.0", "conv_in"), (r"^out\.0", "conv_norm_out"), (r"^out\.2", "conv_out"),
    (r"^middle_block\.0", "mid_block.resnets.0"), (r"^middle_block\.1", "mid_block.attentions.0"), (r"^middle_block\.2", "mid_block.resnets.1"),
    (r"\bin_layers\.0", "norm1"), (r"\bin_layers\.2", "conv1"), (r"\bemb_layers\.1", "time_emb_proj"),
    (r"\bout_layers\.0", "norm2"), (r"\bout_layers\.3", "conv2"), (r"\bskip_connection", "conv_shortcut"),
    (r"\.mid\.block_1", ".mid_block.resnets.0"), (r"\.mid\.block_2", ".mid_block.resnets.1"), (r"\.mid\.attn_1\.norm", ".mid_block.attentions.0.group_norm"),
    (r"\.mid\.attn_1\.([qkv])\b", r".mid_block.attentions.0.to_\1"), (r"\.mid\.attn_1\.proj_out", ".mid_block.attentions.0.to_out.0"),
    (r"\.(down|up)\.(\d+)\.block", r".\1_blocks.\2.resnets"), (r"\.(down|up)\.(\d+)\.(down|up)sample\b", r".\1_blocks.\2.\3samplers.0"),
    (r"\.norm_out", ".conv_norm_out"), (r"\.nin_shortcut", ".conv_shortcut"),
]


def diffusers_name(name: str, config) -> str:
    """Where a folder has a parameter or module: "model.diffusion_model.input_blocks.1.0.in_layers.2.weight" is
    "unet/down_blocks.0.resnets.0.conv1.weight". `name`: one of named_parameters() or named_modules() after its network's prefix in StableDiffusion.parts.
    """
    prefixes = {"model.diffusion_model.": "unet", "first_stage_model.": "vae"} | {
        text.prefix: component for text, component in ((config.text, "text_encoder"), (config.text_2, "text_encoder_2")) if text is not None}
    prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
    component, name = prefixes[prefix], name.removeprefix(prefix)
    if component.startswith("text"):
        return f"{component}/" + ("text_projection.weight" if name == "text_projection" else "text_model." + name)
    for ours, theirs in NAMES:
        name = re.sub(ours, theirs, name)

    def block(match: re.Match) -> str:
        """In the UNet each level has num_res_blocks + 1 of them, behind conv_in on the way down."""
        down = match[1] == "input"
        level, j = divmod(int(match[2]) - down, config.unet.num_res_blocks + 1)
        layer = f"{'down' if down else 'up'}samplers.0.conv" if match[4] else f"{'resnets' if match[3] == '0' else 'attentions'}.{j}"
        return f"{'down' if down else 'up'}_blocks.{level}.{layer}"
    name = re.sub(r"^(input|output)_blocks\.(\d+)\.(\d+)(\.(?:op|conv)\b)?", block, name)
    # the VAE's decoder counts levels from full resolution, diffusers from where it starts
    name = re.sub(r"^decoder\.up_blocks\.(\d+)", lambda match: f"decoder.up_blocks.{len(config.vae.ch_mult) - 1 - int(match[1])}", name)
    return f"{component}/{name}"


COMPONENTS = ("unet", "vae", "text_encoder", "text_encoder_2")
CONFIGS = ("scheduler/scheduler_config.json", "unet/config.json", "vae/config.json")  # what is read beside model_index.json and the weights
PREDICTION_TYPES = {"epsilon": "eps", "v_prediction": "v", "v": "v", "v-zero-snr": "v-zero-snr"}  # of schedulers, and of the metadata of files -> of sampler.py
SCHEDULERS = {  # our sampler -> diffusers' class, for those in rows of PRESETS
    "dpmpp_2m": "DPMSolverMultistepScheduler", "euler": "EulerDiscreteScheduler", "euler_a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler"}
OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # in the VAE of folders from before 2023


def open_folder(path: Path, half: bool = False) -> tuple[Tensors, dict[str, str], dict]:
    """A folder's tensors by `diffusers_name`, its metadata, and what it says of the Preset: "prediction", "spacing", "sampler", "sample_size",
    "scale_factor". Of its weights the fp16 ones are taken if `half`. Raises UserError if something is missing or damaged."""
    if not (path / "model_index.json").exists():
        raise UserError(f"{path} is a folder without model_index.json: give a diffusers folder, or a single .safetensors or .ckpt file")
    listed = read_json(path / "model_index.json")
    files = {file.relative_to(path).as_posix() for file in path.glob("*/*")}
    tensors, metadata = {}, {}
    for component in [component for component in COMPONENTS if any(listed.get(component) or [])]:  # [null, null]: none
        file = weights_file(files, component, half)
        if file is None:
            raise UserError(f"{path} lacks the weights of its {component}, a .safetensors or .bin in {component}/")
        for shard in sorted(set(read_json(path / file, "weight_map").values())) if file.endswith(".json") else [Path(file).name]:
            found, about = open_tensors(path / component / shard)
            tensors |= {f"{component}/{name}": tensor for name, tensor in found.items() if not IGNORED.match(name)}
            metadata |= {key: value for key, value in about.items() if key != "format" and component == "unet"}  # where save_folder puts it
    for name in list(tensors):
        tensor = tensors.pop(name)
        if name.endswith("text_projection.weight"):
            tensor = Stored(tensor.shape[::-1], partial(lambda read: read().T, tensor.read))
        name = re.sub(r"^(text_encoder(_2)?/)(?!text_model\.|text_projection)", r"\1text_model.", name)  # transformers 5 may leave it out
        tensors[re.sub(r"(?<=\.attentions\.0\.)(query|key|value|proj_attn)(?=\.)", lambda match: OLD_ATTENTION[match[1]], name)] = tensor

    scheduler, unet, vae = (read_json(path / file) for file in CONFIGS)
    prediction = scheduler.get("prediction_type", "epsilon")
    if scheduler.get("rescale_betas_zero_snr"):
        prediction = prediction.replace("v_prediction", "v") + "-zero-snr"  # of v alone: where all is noise, to predict it says nothing
    if prediction not in PREDICTION_TYPES:
        raise UserError(f"{path} predicts {prediction!r}, not epsilon or v_prediction")
    told = {"prediction": PREDICTION_TYPES[prediction], "sample_size": unet.get("sample_size"), "scale_factor": vae.get("scaling_factor")}
    for sampler, theirs in SCHEDULERS.items():
        if (scheduler.get("_class_name"), scheduler.get("timestep_spacing")) == (theirs, "trailing"):  # as turbo models come
            told |= {"spacing": "trailing", "sampler": sampler}
    return tensors, metadata, told


def cut(config):
    """A model as folders hold it: if the words' vectors alone are used, not what comes after them (SD 2.x: its last layer and the projection)."""
    if config.text_2 is not None or not config.text.final_norm:
        return config
    layers = config.text.num_hidden_layers - config.text.layers_skipped
    return replace(config, text=replace(config.text, num_hidden_layers=layers, layers_skipped=0, projection=False))


def read_json(path: Path, key: str | None = None) -> dict:
    """A file's object, or the one under `key` in it. Raises UserError if it is missing or damaged."""
    try:
        found = json.loads(path.read_text("utf-8"))
        return dict(found if key is None else found[key])
    except FileNotFoundError as error:
        raise UserError(f"no such file: {path}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: {error}") from error


def weights_file(files: set[str], component: str, half: bool) -> str | None:
    """The one with a component's weights, or the index of several: .safetensors before .bin; fp16 first if `half`, else last."""
    for kind in "safetensors", "bin":
        for variant in (".fp16", "") if half else ("", ".fp16"):
            for stem in "diffusion_pytorch_model", "model", "pytorch_model":
                for file in f"{component}/{stem}{variant}.{kind}", f"{component}/{stem}.{kind}.index{variant}.json":
                    if file in files:
                        return file


# --- the hub ---

def find(name: str | Path, half: bool = False) -> Path:
    """The path, if something is there; of owner/name the folder into which that model of the hub was, or now is, downloaded.

    Raises UserError if the hub has no such model, does not give it, or cannot be reached.
    """
    path, name = Path(name), str(name)
    if path.exists() or not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or path.suffix in (".safetensors", ".ckpt"):
        return path
    from huggingface_hub import HfApi, constants, snapshot_download  # not above: it takes a fifth of a second
    from huggingface_hub.errors import GatedRepoError, HFValidationError, LocalEntryNotFoundError, RepositoryNotFoundError
    hub = constants.ENDPOINT
    try:
        try:
            files = {file.rfilename for file in HfApi().model_info(name).siblings}
        except (RepositoryNotFoundError, HFValidationError):
            raise
        except Exception:  # no network, or HF_HUB_OFFLINE: what was downloaded before will do
            return Path(snapshot_download(name, allow_patterns=["model_index.json"], local_files_only=True))
        if "model_index.json" in files:
            return Path(snapshot_download(name, allow_patterns=needed(files, half)))
    except GatedRepoError as error:
        raise UserError(f"{name} is gated: agree to its terms at {hub}/{name}, then log in with `hf auth login`") from error
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise UserError(f"{name} is no file or folder here, and no model at {hub} (or a private one: log in with `hf auth login`)") from error
    except LocalEntryNotFoundError as error:
        why = "HF_HUB_OFFLINE is set: unset it" if constants.HF_HUB_OFFLINE else f"{hub} cannot be reached: connect to it"
        raise UserError(f"{name} is no file or folder here, was not downloaded before, and {why}, or give a file") from error
    except (Exception, KeyboardInterrupt) as error:  # the network's, of whatever library; a full disk's; Ctrl-C
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"the download of {name} stopped ({why}): run it again, the files that are complete are kept") from error
    raise UserError(f"{name} is no diffusers folder: download the file you want of {hub}/{name}/tree/main and give that")


def needed(files: set[str], half: bool) -> list[str]:
    """Those of the hub's files that open_folder reads."""
    chosen = [file for component in COMPONENTS if (file := weights_file(files, component, half)) is not None]
    shards = [file for file in files for index in chosen if index.endswith(".json") and ("fp16" in file) == ("fp16" in index)
              and re.fullmatch(re.sub(r"\.(safetensors|bin)\.index.*", r"(.fp16)?-\\d+-of-\\d+(.fp16)?.\1", index), file)]
    return ["model_index.json", *CONFIGS, *chosen, *shards]


# --- writing ---

@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """Another path for what shall be there, file or folder, which takes its place when all is written. Raises UserError if it cannot."""
    try:
        with tempfile.TemporaryDirectory(dir=path.parent, suffix=".tmp") as folder:
            temporary = Path(folder) / path.name
            yield temporary
            os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write {path}: {error}") from error


def make_folder(path: Path) -> None:
    """Raises UserError if it cannot be made; one that is there already will do."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write into {path}: {error}") from error


def check_new(path: Path) -> None:
    """Raises UserError if `StableDiffusion.save` could not write there: files are replaced, folders are not."""
    if path.is_dir() or (path.exists() and path.suffix != ".safetensors") or not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UserError(f"cannot write {path}: give a new name, in a folder that is there and writable")


def save_tensors(tensors: dict[str, Tensor], path: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    save_file({name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in tensors.items()}, path, metadata)
    path.chmod(0o644)  # safetensors writes for the owner alone


def save_folder(path: Path, tensors: dict[str, Tensor], dtype: torch.dtype, metadata: dict[str, str], files: dict[str, dict | str]) -> None:
    """A new diffusers folder: tensors by `diffusers_name`, the metadata with the UNet's, and `files` by path: text, or an object to write as JSON."""
    with whole(path) as temporary:
        for name, content in files.items():
            (temporary / name).parent.mkdir(parents=True, exist_ok=True)
            (temporary / name).write_text(content if isinstance(content, str) else json.dumps(content, indent=2, ensure_ascii=False) + "\n", "utf-8")
        for component in dict.fromkeys(name.split("/")[0] for name in tensors):
            part = {name.removeprefix(component + "/"): in_folder(name, tensor) for name, tensor in tensors.items() if name.startswith(component + "/")}
            stem = "model" if component.startswith("text") else "diffusion_pytorch_model"
            save_tensors(part, temporary / component / f"{stem}.safetensors", dtype, {"format": "pt"} | (metadata if component == "unet" else {}))


def in_folder(name: str, tensor: Tensor) -> Tensor:
    """A tensor of ours as folders hold it: the projection the other way round, the VAE's attention as matrices."""
    if name.endswith("text_projection.weight"):
        return tensor.T
    return tensor[:, :, 0, 0] if name.startswith("vae/") and ".attentions." in name and tensor.ndim == 4 else tensor


def folder_files(config, pipeline: str, spacing: str, bpe: Tokenizer) -> dict[str, dict | str]:
    """The files beside the weights that diffusers' from_pretrained opens with this class. Only what differs from diffusers' defaults."""
    unet, vae = config.unet, config.vae
    levels = ["CrossAttn" * (depth > 0) for depth in unet.transformer_depth]
    files = {
        "unet/config.json": dict(
            _class_name="UNet2DConditionModel", sample_size=config.size // vae.downsampling, in_channels=unet.in_channels, out_channels=unet.out_channels,
            block_out_channels=[unet.model_channels * m for m in unet.channel_mult], layers_per_block=unet.num_res_blocks,
            down_block_types=[level + "DownBlock2D" for level in levels], up_block_types=[level + "UpBlock2D" for level in reversed(levels)],
            transformer_layers_per_block=[*(max(depth, 1) for depth in unet.transformer_depth[:-1]), unet.transformer_depth_middle],  # the last is the middle's
            attention_head_dim=unet.num_heads, cross_attention_dim=unet.context_dim, norm_num_groups=unet.num_groups,
            upcast_attention=unet.upcast_attention, use_linear_projection=unet.use_linear, time_cond_proj_dim=unet.time_cond_proj_dim),
        "vae/config.json": dict(
            _class_name="AutoencoderKL", sample_size=config.size, block_out_channels=[vae.ch * m for m in vae.ch_mult], layers_per_block=vae.num_res_blocks,
            down_block_types=["DownEncoderBlock2D"] * len(vae.ch_mult), up_block_types=["UpDecoderBlock2D"] * len(vae.ch_mult),
            latent_channels=vae.z_channels, norm_num_groups=vae.num_groups, scaling_factor=vae.scale_factor),
        "scheduler/scheduler_config.json": dict(
            _class_name=SCHEDULERS[config.sampler], beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
            prediction_type="epsilon" if config.prediction == "eps" else "v_prediction", timestep_spacing=spacing, steps_offset=1)
            | ({"rescale_betas_zero_snr": True} if config.prediction == "v-zero-snr" else {}),
    }
    index = dict(_class_name=pipeline, _diffusers_version="0.21.0", scheduler=["diffusers", SCHEDULERS[config.sampler]], unet=["diffusers", "UNet2DConditionModel"],
                 vae=["diffusers", "AutoencoderKL"], feature_extractor=[None, None], image_encoder=[None, None])
    if config.text_2 is None:
        index |= dict(safety_checker=[None, None], requires_safety_checker=False)
    else:
        index |= dict(force_zeros_for_empty_prompt=config.zero_negative)
        files["unet/config.json"] |= dict(addition_embed_type="text_time", projection_class_embeddings_input_dim=unet.adm_in_channels,
                                          addition_time_embed_dim=(unet.adm_in_channels - config.text_2.hidden_size) // 6)
    for text, n in (config.text, ""), (config.text_2, "_2"):
        if text is None:
            continue
        encoder = "CLIPTextModelWithProjection" if text.projection else "CLIPTextModel"
        index |= {"text_encoder" + n: ["transformers", encoder], "tokenizer" + n: ["transformers", "CLIPTokenizer"]}
        files |= {
            f"text_encoder{n}/config.json": dict(
                architectures=[encoder], model_type="clip_text_model", vocab_size=text.vocab_size, hidden_size=text.hidden_size,
                intermediate_size=4 * text.hidden_size, projection_dim=text.hidden_size, num_hidden_layers=text.num_hidden_layers,
                num_attention_heads=text.num_attention_heads, max_position_embeddings=text.max_position_embeddings, hidden_act=text.hidden_act),
            f"tokenizer{n}/vocab.json": bpe.get_vocab(),
            f"tokenizer{n}/merges.txt": "#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in json.loads(bpe.to_str())["model"]["merges"]),
            f"tokenizer{n}/tokenizer_config.json": dict(
                tokenizer_class="CLIPTokenizer", model_max_length=text.max_position_embeddings, pad_token=bpe.id_to_token(text.pad)),
        }
    return files | {"model_index.json": index}
