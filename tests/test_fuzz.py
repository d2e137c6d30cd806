"""Damaged and hostile files: every one ends in a result or in a UserError of one line.

The cases are seeded, so they are the same in every run. FUZZ_SECONDS=600 goes on with further
seeds for so long on each reader.
"""
import io
import itertools
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import cache
from itertools import chain, takewhile
from pathlib import Path

import pytest
import torch
from PIL import Image, PngImagePlugin

from extras import prompts
from extras.captions import list_folder
from extras.check_settings import read_state
from extras.data import load_or_error
from extras.files import open_tensors, read_image
from extras.formats import load_model, open_checkpoint, our_config, save
from extras.lora import apply_lora
from extras.lora_tags import find_tags
from extras.options import read_params
from extras.prediction import marks_in_file
from extras.shards import samples_or_warning
from extras.textual_inversion import add_embedding
from sd import StableDiffusion, UserError, preset_to_dict
from tests.common import SMALL, random_model

FOUND = {  # cases that failed once
    "lora": [15633, 72155], "adapter": [5258, 40822], "embedding": [35488]}
MOST_SECONDS, MOST_MEMORY = 20, 2**31   # of a case; of all cases of a reader together
STRANGE = [  # values that are put into JSON
    None, True, False, 0, -1, 1, 3, 10**12, 10**400, -10**40, 0.5, -0.0, 1e308, float("inf"),
    float("nan"), "", "a", "\ud800", "\x1b[2J", "x" * 1000, "../../etc/passwd", "/dev/zero", [],
    {}, [[]], [None], {"a": {}}, [1, "a"], [10**12] * 3, list(range(3000)), "UNetConfig", "1e999"]
WORDS = [  # that are put into texts and files
    b"", b"\0", b"\xff" * 8, b"(" * 300, b"[" * 3000, b"{" * 300, b":" * 100, b"1" * 5000, b"\\",
    b'"', b"1e999", b"-", b"nan", b"\xed\xa0\x80", b"\x1b[31m", b"<lora:a:", b"Steps: 9, Size: ",
    b"999999999x999999999", b"\n", b", ", b"BREAK", b"\xe2\x80\xae"]


# --- mutations ---

def mutated(data: bytes, rng: random.Random) -> bytes:
    """The bytes with one to four changes."""
    data = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        i, j = sorted(rng.randrange(len(data) + 1) for _ in range(2))
        kind = rng.randrange(7)
        if kind == 0:
            data[i:i + 1] = bytes([rng.randrange(256)])
        elif kind == 1:
            data[i:i] = rng.choice(WORDS)
        elif kind == 2:
            del data[i:min(j, i + 50)]
        elif kind == 3:
            data[i:i] = data[i:min(j, i + 200)]
        elif kind == 4 and i < len(data):
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 5:
            del data[rng.choice([i, j]):]
        elif kind == 6:
            data[i:i + 4] = rng.choice([0, 1, 2**31 - 1, 2**32 - 1]).to_bytes(4, "little")
    return bytes(data)


def places(value: object) -> Iterator[tuple[object, object]]:
    """(container, key) of everything in a JSON value."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, inner in list(pairs):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def mutated_json(value: object, rng: random.Random) -> object:
    """A copy in which some values are others, or missing."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 3)):
        spots = list(places(value))
        if not spots:
            break
        container, key = rng.choice(spots)
        kind = rng.randrange(6)
        if kind == 0 and isinstance(container, dict):
            del container[key]
        elif kind == 1 and isinstance(container, dict):
            container[rng.choice(["", "x", "kind", "unet"])] = deepcopy(rng.choice(STRANGE))
        elif kind == 2 and isinstance(container[key], (int, float)):
            container[key] = container[key] * rng.choice([-1, 2, 3, 1000, 10**9])
        elif len(container):
            container[key] = deepcopy(rng.choice(STRANGE))
    return value


def safetensors_bytes(header: object, content: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content


# --- running a case ---

@contextmanager
def limited() -> Iterator[None]:
    """A case that hangs raises TimeoutError."""
    def stop(*_) -> None:
        raise TimeoutError(f"it ran for more than {MOST_SECONDS} s")
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, MOST_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def peak_memory() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def attempt(case: Callable[[], object]) -> None:
    """A result or a UserError of one line; anything else is raised."""
    with limited(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            case()
        except UserError as error:
            assert 0 < len(str(error)) < 5000


STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork",
          "socket.connect", "socket.getaddrinfo"}
WATCHING: list[list[str]] = []   # what is watched notes here what it did and may not


@contextmanager
def watched() -> Iterator[list[str]]:
    """Gives the list of programs, requests and files outside that the block starts or writes."""
    WATCHING.append([])
    try:
        yield WATCHING[-1]
    finally:
        WATCHING.pop()


def watch(event: str, args: tuple) -> None:
    """An audit hook. It only notes: what it raised might be caught where damage is expected."""
    if not WATCHING:
        return
    if event in STARTS:
        WATCHING[-1].append(f"{event} {args[:1]}")
    elif event == "open" and isinstance(args[0], str) and isinstance(args[1], str) \
            and set(args[1]) & set("wax+"):
        inside = Path(tempfile.gettempdir()).resolve() in Path(args[0]).resolve().parents
        if not inside and "__pycache__" not in args[0]:
            WATCHING[-1].append(f"writes {args[0]}")


sys.addaudithook(watch)


def run_cases(reader: str, count: int, case: Callable[[random.Random, int], object]) -> None:
    before, stop = peak_memory(), time.time() + float(os.environ.get("FUZZ_SECONDS", 0))
    numbers = chain(FOUND.get(reader, ()), range(count),
                    takewhile(lambda _: time.time() < stop, itertools.count(count)))
    for cases, number in enumerate(numbers, 1):
        rng = random.Random(f"{reader} {number}")
        try:
            with watched() as seen:
                attempt(lambda: case(rng, number))
            assert not seen
        except Exception as error:
            error.add_note(f"reader {reader}, case {number}")
            raise
    print(f"{reader}: {cases} cases")
    assert peak_memory() - before < MOST_MEMORY


@pytest.fixture(scope="module")
def model() -> StableDiffusion:
    found = random_model(SMALL)
    prompts.attach(found)
    return found


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "a.bin"


def read_everything(path: Path) -> None:
    tensors, metadata = open_tensors(path)
    marks_in_file(path, tensors, metadata)
    for tensor in tensors.values():
        assert tensor.read().shape == tensor.shape


# --- tensors ---

NAMES = ["unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q",
         "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k",
         "lora_te_text_model_encoder_layers_0_mlp_fc1", "double_blocks.0"]
ROLES = ["lora_down.weight", "lora_up.weight", "lora_A.weight", "lora_B.weight", "alpha",
         "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "lokr_w1", "lokr_w2", "diff",
         "lora_mid.weight", "dora_scale", "diff_b", "lokr_w2_a", "lokr_w2_b", "on_input", "weight"]
SIZES = [0, 1, 2, 3, 4, 32, 32, 32, 64, 128]


def random_tensors(rng: random.Random) -> dict[str, list[int]]:
    names = [f"{rng.choice(NAMES)}.{rng.choice(ROLES)}" for _ in range(rng.randint(1, 6))]
    return {name: [rng.choice(SIZES) for _ in range(rng.choice([0, 1, 2, 2, 2, 4]))]
            for name in names}


def lora_bytes(rng: random.Random) -> bytes:
    header, size = {}, 0
    for name, shape in random_tensors(rng).items():
        numbers = torch.Size(shape).numel()
        if numbers > 10**6:
            continue
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [size, size + 4 * numbers]}
        size += 4 * numbers
    about = {"lora_alpha": rng.choice(STRANGE), "alpha_pattern": rng.choice(STRANGE)}
    metadata = {"lora_adapter_metadata": json.dumps(about), "ss_network_alpha": "1e999",
                "ss_v_parameterization": "True", "modelspec.prediction_type": "v"}
    header["__metadata__"] = {key: text for key, text in metadata.items() if rng.random() < 0.5}
    return safetensors_bytes(header, rng.choice([b"\0", b"\x01", b"\x3c"]) * size)


def test_safetensors(path):
    def case(rng: random.Random, number: int) -> None:
        path.write_bytes(mutated(lora_bytes(rng), rng))
        read_everything(path)
    run_cases("safetensors", 250, case)


def test_loras(model, tmp_path):
    def case(rng: random.Random, number: int) -> None:
        path = tmp_path / "a.safetensors"
        path.write_bytes(lora_bytes(rng) if number % 4 else mutated(lora_bytes(rng), rng))
        apply_lora(model, path, 0.5)
    run_cases("lora", 200, case)


def test_adapter_folders(model, tmp_path):
    about = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": False,
             "alpha_pattern": {"a": 1}, "rank_pattern": {}, "bias": "none",
             "init_lora_weights": True, "base_model_name_or_path": "x"}

    def case(rng: random.Random, number: int) -> None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(mutated_json(about, rng)))
        (tmp_path / "adapter_model.safetensors").write_bytes(lora_bytes(rng))
        apply_lora(model, tmp_path, 0.5)
    run_cases("adapter", 80, case)


def test_embeddings(model, path):
    def case(rng: random.Random, number: int) -> None:
        shape = [rng.choice([1, 2, 76]), rng.choice([1, 32, 768])][rng.randrange(2):]
        names = ["*", "emb_params", "clip_l", "clip_g", "", "cat", "x" * 500, "\ud800", 7]
        vectors = torch.full(shape, rng.choice([0.0, 1.0, float("nan")]))
        about = {rng.choice(names): vectors, rng.choice(names): vectors}
        torch.save(rng.choice([about, {"string_to_param": about}, about | {"name": 1}]), path)
        if rng.random() < 0.5:
            path.write_bytes(mutated(path.read_bytes(), rng))
        add_embedding(model, path)
    run_cases("embedding", 80, case)


@cache
def pickle_bytes(zipped: bool) -> bytes:
    stream = io.BytesIO()
    inner = {f"model.{i}.weight": torch.ones(3, i) for i in range(4)}
    torch.save({"state_dict": inner, "epoch": 3, "optimizer": {0: {"x": torch.ones(2)}}}, stream,
               _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


@pytest.mark.parametrize("zipped", [True, False])
def test_pickles(path, zipped):
    def case(rng: random.Random, number: int) -> None:
        path.write_bytes(mutated(pickle_bytes(zipped), rng))
        read_everything(path)
    run_cases(f"pickle {zipped}", 150, case)


def test_states(path):
    stream = io.BytesIO()
    torch.save({"step": 1, "params": [torch.ones(2)], "ema": [], "optimizer": {}, "scaler": {},
                "positions": [], "workers": 0, "settings": {}}, stream)

    def case(rng: random.Random, number: int) -> None:
        path.write_bytes(mutated(stream.getvalue(), rng))
        read_state(path)
    run_cases("state", 50, case)


# --- configs ---

def use(sd: StableDiffusion) -> None:
    """One call of each network, on a device without memory."""
    cfg, width = sd.preset.unet, sum(one.hidden_size for one in sd.preset.text_encoders)
    for encoder in sd.text_encoders:
        encoder(torch.zeros(1, 77, dtype=torch.long))
    y = None if cfg.adm_in_channels is None else torch.zeros(1, cfg.adm_in_channels)
    w = None if cfg.time_cond_proj_dim is None else torch.zeros(1)
    side = 8 * 2 ** len(cfg.channel_mult)
    sd.unet(torch.zeros(1, cfg.in_channels, side, side), torch.zeros(1),
            torch.zeros(1, 77, width), y, w)
    sd.vae.decode(torch.zeros(1, sd.preset.vae.z_channels, 8, 8))


def test_configs_in_metadata(tmp_path):
    stored = preset_to_dict(SMALL)
    old = {"text" if key == "text_encoders" else key: value for key, value in stored.items()}
    old["text"] = old["text"][0]

    def case(rng: random.Random, number: int) -> None:
        changed = mutated_json(old if number % 10 == 0 else stored, rng)
        preset = our_config(tmp_path, {"config": json.dumps(changed)})
        if preset is None:
            return
        with torch.device("meta"):
            sd = StableDiffusion(preset)
            if number % 2:
                use(sd)
        sd.resolve_options()
    run_cases("config", 200, case)


def test_whole_checkpoints(model, tmp_path):
    path = tmp_path / "a.safetensors"
    save(model, path)
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header, content = json.loads(data[8:start]), data[start:]

    def case(rng: random.Random, number: int) -> None:
        about = header["__metadata__"]
        config = mutated_json(json.loads(about["config"]), rng)
        changed = dict(header)
        if number % 3 == 0:
            changed = mutated_json(header, rng)
        elif number % 3 == 1:
            changed["__metadata__"] = about | {"config": json.dumps(config)}
        path.write_bytes(safetensors_bytes(changed, content))
        load_model(StableDiffusion, path, "cpu", torch.float32, fast=False)
    run_cases("checkpoint", 30, case)


def test_folders(model, tmp_path):
    folder = tmp_path / "folder"
    save(model, folder)
    files = sorted(file for file in folder.glob("**/*.json") if "tokenizer" not in str(file))
    contents = {file: file.read_text() for file in files}

    def case(rng: random.Random, number: int) -> None:
        file = rng.choice(files)
        if number % 4:
            file.write_text(json.dumps(mutated_json(json.loads(contents[file]), rng)))
        else:
            file.write_bytes(mutated(contents[file].encode(), rng))
        try:
            open_checkpoint(folder)
        finally:
            file.write_text(contents[file])
    run_cases("folder", 100, case)


def test_yaml_beside(tmp_path):
    text = b"model:\n  target: x\n  params:\n    linear_start: 0.00085\n    linear_end: 0.0120\n" \
           b"    scale_factor: 0.18215\n    parameterization: \"v\"\n"

    def case(rng: random.Random, number: int) -> None:
        (tmp_path / "a.yaml").write_bytes(mutated(text, rng))
        marks_in_file(tmp_path / "a.ckpt", {}, {})
    run_cases("yaml", 60, case)


# --- pictures, prompts, data ---

def picture_bytes(kind: str, parameters: str = "") -> bytes:
    stream, info = io.BytesIO(), PngImagePlugin.PngInfo()
    if parameters:
        info.add_text("parameters", parameters)
    options = {"pnginfo": info} if kind == "PNG" else {}
    Image.linear_gradient("L").resize((24, 16)).convert("RGB").save(stream, kind, **options)
    return stream.getvalue()


def test_pictures(path):
    kinds = {kind: picture_bytes(kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")}

    def case(rng: random.Random, number: int) -> None:
        path.write_bytes(mutated(rng.choice(list(kinds.values())), rng))
        read_image(path)
    run_cases("picture", 250, case)


SETTINGS = ('a (red:1.3) apple\nNegative prompt: blurry\nSteps: 20, Sampler: DPM++ 2M Karras, '
            'CFG scale: 7, Seed: 1, Size: 512x512, Model: x, Clip skip: 2, Init: "a.png", '
            'Strength: 0.5, Lora: ["a:1", "b"], Version: sd.py')
GRAPH = {"3": {"class_type": "KSampler", "inputs": {
    "seed": 1, "steps": 20, "cfg": 8, "sampler_name": "euler", "scheduler": "normal", "denoise": 1,
    "model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "x"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 512}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a", "clip": ["4", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "b", "clip": ["4", 1]}}}


def test_settings_in_pictures(path):
    def case(rng: random.Random, number: int) -> None:
        if number % 3:
            text = mutated(SETTINGS.encode(), rng).decode("utf-8", "replace")
        else:
            text = json.dumps(mutated_json(GRAPH, rng))
        path.write_bytes(picture_bytes("PNG", text))
        read_params(path)
    run_cases("settings", 250, case)


PIECES = ["(", ")", "[", "]", ":", "1.3", "a", " red ", "apple", "BREAK", "\\", "<lora:x:1>",
          "<lora:", ">", "\ud800", "\0", "\x1b[2J", "1e999", "|", "é", "🍎", "((((", "))))", ","]


def test_prompts(model):
    def case(rng: random.Random, number: int) -> None:
        prompt = "".join(rng.choices(PIECES, k=rng.choice([1, 5, 30, 200])))
        find_tags(prompt)
        prompt.encode("utf-8", "replace" if number % 2 else "surrogatepass")
        prompts.count_chunks(model, [prompt.replace("\ud800", "")])
    run_cases("prompt", 150, case)


def tar_bytes() -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            files = {"png": picture_bytes("PNG"), "txt": b"a cat", "json": b'{"caption": "a"}'}
            for kind, data in files.items():
                info = tarfile.TarInfo(f"{i:03}" + "é" * 80 * (i == 1) + f".{kind}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return stream.getvalue()


def test_shards(tmp_path, capsys):
    data, path = tar_bytes(), tmp_path / "a.tar"

    def case(rng: random.Random, number: int) -> None:
        path.write_bytes(mutated(data, rng))
        for sample in samples_or_warning(str(path)):
            load_or_error(sample, [(16, 16)], True)
    run_cases("shard", 150, case)


TABLES = {"metadata.jsonl": b'{"file_name": "a.png", "text": "a cat"}\n{"file_name": "b.png"}\n',
          "metadata.csv": b"file_name,text\na.png,a cat\nb.png,\n", "a.txt": b"a cat\nthe cat\n"}


def test_captions(tmp_path, capsys):
    (tmp_path / "a.png").write_bytes(picture_bytes("PNG", SETTINGS))
    (tmp_path / "b.png").write_bytes(picture_bytes("PNG"))

    def case(rng: random.Random, number: int) -> None:
        name = rng.choice(list(TABLES))
        file = tmp_path / name
        data = mutated(TABLES[name], rng)
        if name == "metadata.jsonl" and rng.random() < 0.5:
            rows = [mutated_json(json.loads(row), rng) for row in TABLES[name].splitlines()]
            data = "\n".join(map(json.dumps, rows)).encode()
        file.write_bytes(data)
        try:
            for sample in list_folder(tmp_path):
                load_or_error(sample, [(16, 16)], True)
        finally:
            file.unlink()
    run_cases("captions", 120, case)


def test_the_watch_sees_programs_requests_and_files(tmp_path):
    with watched() as seen:
        (tmp_path / "x").write_text("allowed")
        assert not seen
        with suppress(OSError):
            open("/nowhere/x", "w")
        with suppress(OSError):
            socket.create_connection(("localhost", 1))
        subprocess.run(["true"])
    assert {"writes", "socket.connect", "subprocess.Popen"} <= {line.split()[0] for line in seen}
