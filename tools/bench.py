"""How fast is this: beside diffusers, beside the machine's best, and beside another checkout?

    pip install -r requirements.txt -r requirements-test.txt
    python tools/bench.py                 the tables of PARTS: a quarter of an hour on 2 cores
    python tools/bench.py step vae        only these
    python tools/bench.py run share sizes packed compiled int8 openvino
                                          MORE, which take as long again and longer
    python tools/bench.py step load --against ../old
                                          this and the other checkout, without diffusers

Weights are random, in the shapes of SD 1.x; random weights cost what trained ones cost. Each
contestant has its own process, and they are timed in turns (ours, theirs, ours, theirs, ...). The
figures are medians over the turns. Ratios are medians of the ratios within a turn, so that a
machine that slows down slows both. Needs 16 GB of memory and 6 GB of disk in the folder for
temporary files.
"""
import os
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as the command sets it, before torch is there

import argparse
import importlib.util
import multiprocessing
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from functools import partial
from multiprocessing.connection import Connection
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip import Tokenizer
from extras import edit, fast, int8, lowmem, packed
from extras.deepcache import deepcache
from extras.options import DTYPES
from sampler import NoiseSchedule, cfg, make_denoiser
from sd import PRESETS, StableDiffusion, best_device_and_dtype

# A guided step at 512x512 as written: two rows through the UNet (lecture/unet.py counts them).
GFLOP = 2 * 803
PROMPT = "a photograph of an astronaut riding a horse"
RUN_STEPS = "20"

Action = Callable[[], object]
Seconds = dict[str, list[float]]


# --- timing ---

def in_turns(rounds: int, **actions: Action) -> Seconds:
    """Seconds of each action, once a round, after one round that does not count."""
    seconds: Seconds = {name: [] for name in actions}
    others, began = cpu_of_others(), time.perf_counter()
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            synchronize()
            if turn > 0:
                seconds[name].append(time.perf_counter() - start)
    say_what_else_ran(others, time.perf_counter() - began)
    return seconds


def cpu_of_others() -> dict[tuple[int, str], float]:
    """Seconds of CPU that each process has used which is not of this program, on Linux."""
    parents, used = {}, {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            before, _, after = path.read_text(errors="replace").rpartition(")")
            fields, pid = after.split(), int(path.parent.name)
            parents[pid] = int(fields[1])
            ticks = int(fields[11]) + int(fields[12])
            used[pid, before.partition("(")[2]] = ticks / os.sysconf("SC_CLK_TCK")

    def ours(pid: int) -> bool:
        return pid == os.getpid() or pid in parents and ours(parents[pid])
    return {key: seconds for key, seconds in used.items() if not ours(key[0])}


def say_what_else_ran(before: dict[tuple[int, str], float], elapsed: float) -> None:
    """A line if other programs took more than a hundredth of a core."""
    shares = {key: (seconds - before.get(key, 0)) / elapsed
              for key, seconds in cpu_of_others().items()}
    busy = sorted(((share, name) for (_, name), share in shares.items() if share > 0.01),
                  reverse=True)
    if busy:
        print("meanwhile ran, in cores: "
              + ", ".join(f"{name} {share:.2f}" for share, name in busy[:5]), flush=True)


def in_processes(rounds: int, **builders: Callable[[], Action]) -> Seconds:
    """The same for actions that are each built, and then run, in a process of their own.

    The settings of memory of one are then not those of the other.
    """
    workers = {}
    for name, build in builders.items():
        workers[name] = build if isinstance(build, OtherCheckout) else Worker(build)
        workers[name].start()
    seconds = in_turns(rounds, **{name: worker.work for name, worker in workers.items()})
    for worker in workers.values():
        worker.stop()
    return seconds


class Worker:
    """An action in a process of its own."""

    def __init__(self, build: Callable[[], Action]):
        self.build = build

    def start(self) -> None:
        spawn = multiprocessing.get_context("spawn")
        self.link, theirs = spawn.Pipe()
        self.process = spawn.Process(target=serve, args=(theirs, self.build), daemon=True)
        self.process.start()
        theirs.close()  # then recv raises EOFError if the process ends, and does not wait
        self.link.recv()

    def work(self) -> None:
        self.link.send("go")
        self.link.recv()

    def stop(self) -> None:
        self.process.terminate()


def serve(link: Connection, build: Callable[[], Action]) -> None:
    with torch.no_grad():
        action = build()
        while True:
            synchronize()
            link.send("done")
            link.recv()
            action()


class OtherCheckout:
    """An action of another checkout's bench.py: one of its functions that build one."""
    CODE = """if True:
        import sys
        root, name, dtype, device = sys.argv[1:]
        sys.path[:0] = [root, root + "/tools"]
        import bench, torch
        with torch.no_grad():
            action = getattr(bench, name)(getattr(torch, dtype), device)
            print("ready", flush=True)
            for line in sys.stdin:
                action()
                bench.synchronize()
                print("done", flush=True)
    """

    def __init__(self, root: Path, name: str, dtype: torch.dtype, device: str):
        self.root, self.arguments = root, [str(root), name, str(dtype)[6:], device]

    def start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", self.CODE, *self.arguments], cwd=self.root, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self.wait()

    def wait(self) -> None:
        if not self.process.stdout.readline():
            raise EOFError(f"the process of {self.root} ended")

    def work(self) -> None:
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        self.wait()

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, seconds: Seconds, unit: str = "s", digits: int = 2,
          more: dict[str, str] | None = None) -> None:
    """A row for each action: its median, and the median of the first one's share of it."""
    notes, ours = more or {}, next(iter(seconds.values()))
    print(f"\n| {title} | median {unit} (min to max) | ours takes |\n|---|---|---|")
    for name, values in seconds.items():
        share = ""
        if values is not ours:
            share = f"{median(a / b for a, b in zip(ours, values)):.3f}"
        low, middle, high = (f"{f(values):.{digits}f}" for f in (min, median, max))
        print(f"| {name} {notes.get(name, '')}| {middle} ({low} to {high}) | {share} |",
              flush=True)


def run(args: list, cwd: Path = ROOT) -> tuple[float, str]:
    """Run it to its end: its greatest memory in GB, and what it printed."""
    child = subprocess.Popen(list(map(str, args)), cwd=cwd, stdout=subprocess.PIPE,
                             stderr=subprocess.STDOUT)
    said = child.stdout.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"bench.py: {args[1:3]} failed:\n{said[-2000:]}")
    return usage.ru_maxrss / 1e6, said


# --- networks ---

def our_network(name: str, dtype: torch.dtype, device: str, how: str = "fast") -> nn.Module:
    """Random weights, as `load` converts them, of this network alone: all take half a minute.

    `how`: "plain", "fast", "unpacked" (fast, but for its weights' order) or "int8".
    """
    torch.manual_seed(0)
    with torch.device("meta"):
        sd = StableDiffusion(PRESETS["sd1"])
    network = sd.text_encoders[0] if name == "text" else getattr(sd, name)
    network.to_empty(device="cpu")
    for layer in network.modules():
        if hasattr(layer, "reset_parameters"):
            layer.reset_parameters()
    if name == "vae" and dtype == torch.float16:
        dtype = torch.float32
    state = {key: fast.to(tensor, device, dtype) for key, tensor in network.state_dict().items()}
    network.load_state_dict(state, assign=True)
    network.eval().requires_grad_(False)
    sd.device, sd.dtype = torch.device(device), dtype
    if how != "plain":
        fast.optimize(sd)
    if how == "int8":
        int8.attach(sd)
    if how == "unpacked":
        packed.cpu_multiplies_bf16 = lambda: False  # in this process
    return network


def their_network(name: str, dtype: torch.dtype, device: str, channels_last: bool) -> nn.Module:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    build = {
        "unet": partial(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768),
        "vae": partial(diffusers.AutoencoderKL, block_out_channels=(128, 256, 512, 512),
                       layers_per_block=2, down_block_types=("DownEncoderBlock2D",) * 4,
                       up_block_types=("UpDecoderBlock2D",) * 4),
        "text_encoder": partial(CLIPTextModel, CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12,
            num_attention_heads=12)),
    }[name]
    memory_format = torch.channels_last if channels_last else torch.preserve_format
    return build().to(device, dtype, memory_format=memory_format).eval().requires_grad_(False)


def their_settings(dtype: torch.dtype) -> dict[str, tuple[torch.dtype, bool]]:
    """diffusers as it comes, and its best: (dtype, channels last)."""
    settings = {"diffusers, fp32 (its default)": (torch.float32, False),
                "diffusers, fp32, channels last": (torch.float32, True)}
    if dtype != torch.float32:
        name = dtype_name(dtype)
        settings |= {f"diffusers, {name}": (dtype, False),
                     f"diffusers, {name}, channels last": (dtype, True)}
    return settings


def dtype_name(dtype: torch.dtype) -> str:
    return next(name for name, value in DTYPES.items() if value == dtype)


def contestants(ours: str, theirs: Callable[..., Action], dtype: torch.dtype, device: str,
                against: Path | None, layouts: bool = True) -> dict[str, Callable[[], Action]]:
    """This, and either diffusers in its settings or another checkout."""
    found = {"this": partial(globals()[ours], dtype, device)}
    if against is not None:
        return found | {str(against): OtherCheckout(against, ours, dtype, device)}
    return found | {name: partial(theirs, device, *settings)
                    for name, settings in their_settings(dtype).items()
                    if layouts or not settings[1]}


# --- one network ---

def bench_step(dtype: torch.dtype, device: str, rounds: int, against: Path | None = None) -> None:
    seconds = in_processes(rounds, **contestants("our_step", their_step, dtype, device, against))
    speed = f"({GFLOP / median(seconds['this']):.0f} GFLOP/s) "
    table("guided step, 512x512", seconds, digits=3, more={"this": speed})


def our_step(dtype: torch.dtype, device: str, every: int | None = None,
             how: str = "fast") -> Action:
    unet, x = our_network("unet", dtype, device, how), torch.randn(1, 4, 64, 64, device=device)
    cond, uncond = ({"context": torch.randn(1, 77, 768, device=device).to(dtype)}
                    for _ in range(2))
    attached = ExitStack()
    if every is not None:
        attached.enter_context(deepcache(unet, every))
    denoise = cfg(make_denoiser(unet, NoiseSchedule()), cond, uncond, 7.5)
    if device.startswith("cuda"):
        denoise(x, 7.0), denoise(x, 7.0)  # the second one is recorded
    return lambda: (attached, denoise(x, 7.0))  # `attached` is held: dropped, its context ends


def their_step(device: str, dtype: torch.dtype, channels_last: bool,
               unet: Callable | None = None) -> Action:
    unet = their_network("unet", dtype, device, channels_last) if unet is None else unet
    x = torch.randn(2, 4, 64, 64, device=device, dtype=dtype)
    context = torch.randn(2, 77, 768, device=device, dtype=dtype)

    def step() -> torch.Tensor:
        uncond, cond = unet(x, 500, context, return_dict=False)[0].chunk(2)
        return uncond + 7.5 * (cond - uncond)
    return step


def bench_compiled(dtype: torch.dtype, device: str, rounds: int) -> None:
    """A guided step beside diffusers as its guide for speed sets it up, and weights frozen on CPUs.

    Compiling takes minutes.
    """
    table("guided step, 512x512", in_processes(rounds, **{
        "this": partial(our_step, dtype, device),
        f"diffusers, {dtype_name(dtype)}, channels last, compiled":
            partial(their_compiled_step, device, dtype)}), digits=3)


def their_compiled_step(device: str, dtype: torch.dtype) -> Action:
    import torch._inductor.config
    torch._inductor.config.freezing = device == "cpu"  # it packs weights for oneDNN, as packed.py
    unet = their_network("unet", dtype, device, channels_last=True)
    unet.fuse_qkv_projections()
    return their_step(device, dtype, True, torch.compile(unet, mode="max-autotune", fullgraph=True))


def bench_vae(dtype: torch.dtype, device: str, rounds: int, against: Path | None = None) -> None:
    table("decoding, 512x512", in_processes(rounds, **contestants(
        "our_decoding", their_decoding, dtype, device, against)), digits=3)


def our_decoding(dtype: torch.dtype, device: str) -> Action:
    vae = our_network("vae", dtype, device)
    z = torch.randn(1, 4, 64, 64).to(vae.quant_conv.weight)
    return lambda: vae.decode(z)


def their_decoding(device: str, dtype: torch.dtype, channels_last: bool) -> Action:
    vae = their_network("vae", dtype, device, channels_last)
    z = torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
    return lambda: vae.decode(z, return_dict=False)


def bench_text(dtype: torch.dtype, device: str, rounds: int, against: Path | None = None) -> None:
    table("two prompts through the text encoder", in_processes(4 * rounds, **contestants(
        "our_text", their_text, dtype, device, against, layouts=False)), digits=3)


def our_text(dtype: torch.dtype, device: str) -> Action:
    text, tokens = our_network("text", dtype, device), Tokenizer()([PROMPT, ""]).to(device)
    return lambda: text(tokens)


def their_text(device: str, dtype: torch.dtype, _: bool) -> Action:
    text = their_network("text_encoder", dtype, device, False)
    tokens = Tokenizer()([PROMPT, ""]).to(device)
    return lambda: text(tokens)


# --- from files ---

LOAD = ("import sys, time, torch; {imports}; start = time.perf_counter(); {load}; "
        "print(time.perf_counter() - start)")
OUR_LOAD = "sd = StableDiffusion.load('{tmp}/sd1.safetensors', '{device}', {dtype})"
THEIR_LOAD = ("pipe = P.from_pretrained('{tmp}/theirs', torch_dtype={dtype}, variant='fp16')"
              ".to('{device}')")
THEIR_IMPORTS = "from diffusers import StableDiffusionPipeline as P"


def bench_load(dtype: torch.dtype, device: str, rounds: int, against: Path | None = None) -> None:
    """A file of 2.1 GB (fp16), ours and that of a diffusers folder, to a model that can draw.

    Imports are not counted. In bf16 too, which any CPU can hold.
    """
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=against is None)
        for each in dict.fromkeys([dtype, torch.bfloat16]):
            names = dict(tmp=tmp, device=device, dtype=each)
            ours = LOAD.format(imports="from sd import *", load=OUR_LOAD.format(**names))
            theirs = LOAD.format(imports=THEIR_IMPORTS, load=THEIR_LOAD.format(**names))
            codes = {"this": (ours, ROOT), "diffusers": (theirs, ROOT)}
            if against is not None:
                codes = {"this": (ours, ROOT), str(against): (ours, against)}
            seconds, memory = {who: [] for who in codes}, {}
            for turn in range(rounds + 1):
                for who, (code, cwd) in codes.items():
                    memory[who], said = run([sys.executable, "-c", code], cwd)
                    seconds[who] += [float(said.split()[-1])] * (turn > 0)
            table(f"loading 2.1 GB, {str(each)[6:]}", seconds, more=peaks(memory))


def peaks(memory: dict[str, float]) -> dict[str, str]:
    return {who: f"(peak memory {gb:.2f} GB) " for who, gb in memory.items()}


def bench_run(dtype: torch.dtype, device: str, rounds: int, against: Path | None = None) -> None:
    """A picture of 512x512 from process start to PNG."""
    name = dtype_name(dtype)
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=against is None)
        options = [PROMPT, "--ckpt", f"{tmp}/sd1.safetensors", "--steps", RUN_STEPS,
                   "--dtype", name, "--device", device, "--out", f"{tmp}/ours.png"]
        commands = {"this": [sys.executable, ROOT / "sd.py", *options]}
        if against is not None:
            commands[str(against)] = [sys.executable, against / "sd.py", *options]
        else:
            load = THEIR_LOAD.format(tmp=tmp, device=device, dtype=dtype)
            code = (f"import torch; {THEIR_IMPORTS}; {load}; "
                    f"pipe('{PROMPT}', num_inference_steps={RUN_STEPS}).images[0]"
                    f".save('{tmp}/theirs.png')")
            commands["diffusers"] = [sys.executable, "-c", code]
        seconds, memory = time_commands(max(1, rounds - 1), commands)
    table(f"process start to PNG, 512x512, {RUN_STEPS} steps, {name}", seconds, more=peaks(memory))


def time_commands(rounds: int, commands: dict[str, list]) -> tuple[Seconds, dict[str, float]]:
    memory: dict[str, float] = {}

    def work(who: str) -> None:
        memory[who] = run(commands[who])[0]
    return in_turns(rounds, **{who: partial(work, who) for who in commands}), memory


def bench_builtin(dtype: torch.dtype, device: str, rounds: int,
                  against: Path | None = None) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        options = ["a red apple", "--out", f"{tmp}/o.png"]
        commands = {"this": [sys.executable, ROOT / "sd.py", *options],
                    "python -c 'import torch'": [sys.executable, "-c", "import torch"]}
        if against is not None:
            commands[str(against)] = [sys.executable, against / "sd.py", *options]
        seconds, memory = time_commands(rounds + 2, commands)
    table("built-in model, process start to PNG", seconds, more=peaks(memory))


def bench_sizes(dtype: torch.dtype, device: str, rounds: int) -> None:
    """How time and memory grow with the picture: its first guided step (with the text: 0.3 s) and
    decoding, each size in a process of its own."""
    code = (f"import sys; sys.path[:0] = ['{ROOT}', '{ROOT}/tools']; "
            "import bench; bench.draw_size(*sys.argv[1:])")
    print("\n| side | guided step | decoding | memory beyond the weights "
          "| --lowmem: step | decoding | memory |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=False)
        for side in (256, 512, 768, 1024):
            cells = []
            for low in ("", "lowmem"):
                peak, said = run([sys.executable, "-c", code, f"{tmp}/sd1.safetensors", device,
                                  dtype_name(dtype), side, low])
                step, decoding, weights = map(float, said.split())
                cells.append(f"{step:.1f} s | {decoding:.1f} s | {peak - weights:.1f} GB")
            print(f"| {side} | {' | '.join(cells)} |", flush=True)


def draw_size(path: str, device: str, dtype: str, side: str, low: str) -> None:
    """Prints the seconds of a step and of decoding, and the GB of the weights."""
    if low:
        sd = StableDiffusion.load(path, "cpu", DTYPES[dtype])
        lowmem.attach(sd, device)
    else:
        sd = StableDiffusion.load(path, device, DTYPES[dtype])
    times = [time.perf_counter()]
    sd.generate(PROMPT, steps=1, width=int(side), height=int(side),
                callback=lambda step: times.append(time.perf_counter()))
    times.append(time.perf_counter())
    weights = sum(tensor.nbytes for tensor in sd.state_dict().values()) / 1e9
    print(times[1] - times[0], times[2] - times[1], weights)


def write_files(tmp: str, theirs: bool) -> None:
    """In its own process: the greatest memory of a process counts from that of its parent."""
    in_its_own_process(write_files_here, tmp, theirs)


def in_its_own_process(function: Callable[..., None], *arguments: object) -> None:
    """Its memory is given back when it ends."""
    child = multiprocessing.get_context("spawn").Process(target=function, args=arguments)
    child.start()
    child.join()
    if child.exitcode:
        sys.exit(f"bench.py: {function.__name__} failed")


def write_files_here(tmp: str, theirs: bool) -> None:
    torch.manual_seed(0)
    state = StableDiffusion(PRESETS["sd1"]).state_dict()
    save_file({name: tensor.half().contiguous() for name, tensor in state.items()},
              f"{tmp}/sd1.safetensors")
    if theirs:
        write_their_folder(tmp)


def write_their_folder(tmp: str) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizerFast
    tokenizer = CLIPTokenizerFast(
        tokenizer_object=Tokenizer().bpe, bos_token="<|startoftext|>", eos_token="<|endoftext|>",
        pad_token="<|endoftext|>", model_max_length=77)
    networks = {name: their_network(name, torch.float16, "cpu", False)
                for name in ("unet", "vae", "text_encoder")}
    pipe = StableDiffusionPipeline(
        **networks, tokenizer=tokenizer, scheduler=DPMSolverMultistepScheduler(),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(f"{tmp}/theirs", variant="fp16")


# --- the rest ---

@torch.no_grad()
def bench_share(dtype: torch.dtype, device: str, rounds: int) -> None:
    """--cfg-end and --deepcache: what they save and what they change, with the built-in model,
    eight prompts; and a step of SD 1.x."""
    sd = StableDiffusion.load(None, device, dtype)
    prompts = ["a red apple", "a rocket", "cat face", "a blue car", "a green cat",
               "a penguin, twemoji", "a golden key", "a pink rocket"]
    pictures = {}

    def draw(name: str, cfg_end: float | None = None, every: int | None = None) -> None:
        with nullcontext() if every is None else deepcache(sd.unet, every):
            images = [edit.draw(sd, prompt, cfg_end=cfg_end)[0] for prompt in prompts]
        pictures[name] = np.stack([np.asarray(image) / 255 for image in images])
    options = {"all of every step": {}}
    options |= {f"--cfg-end {share}": {"cfg_end": share} for share in (0.75, 0.5, 0.25)}
    options |= {f"--deepcache {n}": {"every": n} for n in (2, 3, 5)}
    seconds = in_turns(rounds, **{name: partial(draw, name, **one)
                                  for name, one in options.items()})
    whole = pictures.pop("all of every step")
    notes = {}
    for name, found in pictures.items():
        decibels = -10 * np.log10(np.square(found - whole).mean((1, 2, 3))).mean()
        notes[name] = f"({decibels:.1f} dB to the first) "
    table("eight pictures, built-in model", seconds, more=notes)
    step = our_step(dtype, device, every=2)  # every second call is one between
    table("guided step, 512x512, --deepcache",
          in_turns(rounds, **{"whole": step, "between two whole ones": step}))


# --- weights in oneDNN's order, 8 bits, and OpenVINO ---

def bench_packed(dtype: torch.dtype, device: str, rounds: int) -> None:
    """A guided step in bf16 with packed weights, and without."""
    ways = {"this": "fast", "this, weights not packed": "unpacked"}
    table("guided step, 512x512, bf16", in_processes(rounds, **{
        name: partial(our_step, torch.bfloat16, device, how=how) for name, how in ways.items()}),
        digits=3)


def bench_int8(dtype: torch.dtype, device: str, rounds: int) -> None:
    """--int8: a guided step, the memory it takes, and what it changes."""
    ways = {"this, --int8": "int8", "this": "fast", "this, --no-fast": "plain"}
    table("guided step, 512x512", in_processes(rounds, **{
        name: partial(our_step, dtype, device, how=how) for name, how in ways.items()}), digits=3)
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=False)
        load = OUR_LOAD.format(tmp=tmp, device=device, dtype=dtype)
        for name, more in {"--int8": "; int8.attach(sd)", "without": ""}.items():
            code = f"from sd import *; from extras import int8; {load}{more}; {RESIDENT}"
            peak, said = run([sys.executable, "-c", code])
            print(f"memory after loading SD 1.x, {name}: {float(said.split()[-1]) / 1e6:.2f} GB"
                  f" (at most {peak:.2f} while loading)", flush=True)
    print(f"\none call of the UNet of SD 1.x: {int8_error(dtype):.4f} from the UNet without --int8"
          " (relative)", flush=True)
    print(f"24 pictures of the built-in model: {int8_decibels(dtype)}", flush=True)


RESIDENT = ("print(next(line.split()[1] for line in open('/proc/self/status')"
            " if line.startswith('VmRSS')))")


@torch.no_grad()
def int8_error(dtype: torch.dtype) -> float:
    """|a - b| / |b| of one call with the same random weights and inputs."""
    x, t, context = torch.randn(2, 4, 64, 64), torch.tensor([500, 500]), torch.randn(2, 77, 768)
    answers = [our_network("unet", dtype, "cpu", how)(x, t, context.to(dtype)).float()
               for how in ("int8", "fast")]
    return ((answers[0] - answers[1]).norm() / answers[1].norm()).item()


def int8_decibels(dtype: torch.dtype) -> str:
    """PSNR beside the pictures without it, of the 24 prompts in docs/emoji.png."""
    source = (ROOT / "data" / "emoji" / "evaluate.py").read_text("utf-8")
    prompts = [prompt for name in ("CAPTIONS", "OTHERS") for prompt in
               re.findall('"(.*?)"', re.search(rf"^{name} = \[(.*?)\]", source, re.M | re.S)[1])]
    assert len(prompts) == 24
    pictures = []
    for attach in (int8.attach, lambda sd: None):
        sd = StableDiffusion.load(None, "cpu", dtype)
        attach(sd)
        images = [sd.generate(prompt)[0] for prompt in prompts]
        pictures.append(np.stack([np.asarray(image) / 255 for image in images]))
    found = -10 * np.log10(np.square(pictures[0] - pictures[1]).mean((1, 2, 3)))
    return f"{found.mean():.1f} dB ({found.min():.1f} to {found.max():.1f})"


def bench_openvino(dtype: torch.dtype, device: str, rounds: int) -> None:
    """A guided step and decoding beside OpenVINO, which is left out where it is not installed."""
    missing = [name for name in ("openvino", "nncf") if importlib.util.find_spec(name) is None]
    for name in missing:
        print(f"{name} is not installed: pip install {name}, to compare with it", flush=True)
    name = f"OpenVINO, {dtype_name(dtype)}"
    steps = {"this": partial(our_step, dtype, device),
             "this, --int8": partial(our_step, dtype, device, how="int8")}
    decoding = {"this": partial(our_decoding, dtype, device)}
    with tempfile.TemporaryDirectory() as tmp:
        if "openvino" not in missing:
            in_its_own_process(convert, f"{tmp}/unet.xml", "unet", False)
            in_its_own_process(convert, f"{tmp}/vae.xml", "vae", False)
            steps[name] = partial(openvino_step, f"{tmp}/unet.xml", dtype)
            decoding[name] = partial(openvino_decoding, f"{tmp}/vae.xml", dtype)
        if not missing:
            in_its_own_process(convert, f"{tmp}/int8.xml", "unet", True)
            steps["OpenVINO, int8"] = partial(openvino_step, f"{tmp}/int8.xml", dtype)
        seconds = in_processes(rounds, **steps)
        table("guided step, 512x512", seconds, digits=3)
        both = {name: values for name, values in seconds.items() if "int8" in name}
        table("guided step, 512x512, 8 bits", both, digits=3)
        table("decoding, 512x512", in_processes(rounds, **decoding), digits=3)


class Answer(nn.Module):
    """A method of diffusers' that returns a tensor, as a module that can be traced."""

    def __init__(self, network: nn.Module, method: str):
        super().__init__()
        self.network, self.method = network, method

    def forward(self, *given: torch.Tensor) -> torch.Tensor:
        return getattr(self.network, self.method)(*given, return_dict=False)[0]


def openvino_inputs(name: str) -> list[torch.Tensor]:
    if name == "vae":
        return [torch.randn(1, 4, 64, 64)]
    return [torch.randn(2, 4, 64, 64), torch.tensor(500), torch.randn(2, 77, 768)]


def convert(path: str, name: str, calibrated: bool) -> None:
    """Write diffusers' network as OpenVINO's file, for inputs of these shapes.

    `calibrated`: in 8 bits.
    """
    import openvino
    network, given = their_network(name, torch.float32, "cpu", False), openvino_inputs(name)
    module = Answer(network, {"unet": "forward", "vae": "decode"}[name])
    converted = openvino.convert_model(module, example_input=tuple(given),
                                       input=[tuple(x.shape) for x in given])
    if calibrated:
        import nncf
        dataset = nncf.Dataset([[x.numpy() for x in given]])
        converted = nncf.quantize(converted, dataset, subset_size=1,
                                  model_type=nncf.ModelType.TRANSFORMER)
    openvino.save_model(converted, path, compress_to_fp16=False)


def openvino_network(path: str, name: str, dtype: torch.dtype) -> Callable[[], np.ndarray]:
    import openvino
    hints = {"INFERENCE_PRECISION_HINT": {torch.bfloat16: "bf16"}.get(dtype, "f32"),
             "INFERENCE_NUM_THREADS": torch.get_num_threads()}
    compiled = openvino.compile_model(path, "CPU", hints)
    inputs = [x.numpy() for x in openvino_inputs(name)]
    return lambda: compiled(inputs)[0]


def openvino_step(path: str, dtype: torch.dtype) -> Action:
    unet = openvino_network(path, "unet", dtype)

    def step() -> np.ndarray:
        uncond, cond = np.split(unet(), 2)
        return uncond + 7.5 * (cond - uncond)
    return step


def openvino_decoding(path: str, dtype: torch.dtype) -> Action:
    return openvino_network(path, "vae", dtype)


def bench_train(dtype: torch.dtype, device: str, rounds: int) -> None:
    """Steps of training of the built-in model's UNet, fp32, batches of 32; and of diffusers' UNet
    of the same shape."""
    from diffusers import UNet2DConditionModel
    config, sd = PRESETS["emoji"].unet, StableDiffusion(PRESETS["emoji"])
    sd.device = torch.device(device)
    ours = sd.unet.to(device)
    fast.optimize(sd)

    def kinds(side: str) -> tuple[str, ...]:
        return tuple(f"{'CrossAttn' if depth else ''}{side}Block2D"
                     for depth in config.transformer_depth)
    theirs = UNet2DConditionModel(
        sample_size=8, in_channels=config.in_channels, out_channels=config.out_channels,
        block_out_channels=tuple(config.model_channels * m for m in config.channel_mult),
        down_block_types=kinds("Down"), up_block_types=kinds("Up")[::-1],
        layers_per_block=config.num_res_blocks, attention_head_dim=config.num_heads,
        cross_attention_dim=config.context_dim, norm_num_groups=config.num_groups,
        class_embed_type="projection",
        projection_class_embeddings_input_dim=config.adm_in_channels).to(device)
    sizes = [sum(p.numel() for p in unet.parameters()) for unet in (ours, theirs)]
    assert sizes[0] == sizes[1]
    table("training, 3 steps of 32 latents 16x8x8, fp32", in_turns(rounds + 2, **{
        "this": training_steps(ours, device),
        "diffusers' UNet": training_steps(theirs, device, theirs=True)}))


def training_steps(unet: nn.Module, device: str, theirs: bool = False, batch: int = 32) -> Action:
    optimizer, config = torch.optim.AdamW(unet.parameters(), 1e-4, fused=True), PRESETS["emoji"]
    x0, noise = torch.randn(2, batch, config.unet.in_channels, 8, 8, device=device)
    context = torch.randn(batch, 16, config.unet.context_dim, device=device)
    y = torch.randn(batch, config.unet.adm_in_channels, device=device)
    t, schedule = torch.arange(batch, device=device) * 31, NoiseSchedule("v")

    def answer(x_t: torch.Tensor) -> torch.Tensor:
        if theirs:
            return unet(x_t, t, context, class_labels=y, return_dict=False)[0]
        return unet(x_t, t, context, y)

    def steps() -> None:
        for _ in range(3):
            with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
                loss = F.mse_loss(answer(schedule.q_sample(x0, t, noise)),
                                  schedule.target(x0, t, noise))
            loss.backward()
            nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
    return steps


@torch.no_grad()
def bench_machine(dtype: torch.dtype, device: str, rounds: int) -> None:
    """What the machine reaches in one large matrix product and in a convolution of SD 1.x."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    x, w = (torch.randn(shape, device=device, dtype=dtype).to(memory_format=torch.channels_last)
            for shape in ((2, 640, 64, 64), (640, 640, 3, 3)))
    seconds = in_turns(rounds + 2, product=lambda: a @ a, convolution=lambda: F.conv2d(x, w,
                                                                                       padding=1))
    for name, flops in {"product": 2 * 4096**3, "convolution": 2 * x.numel() * 640 * 9}.items():
        print(f"the machine, {name} in {str(dtype)[6:]}: {flops / min(seconds[name]) / 1e9:.0f}"
              " GFLOP/s at best", flush=True)


# --- against another checkout ---

def bench_against(part: str, options: list[str], rounds: int, against: Path) -> None:
    """A whole part of both checkouts' bench.py in turns, row by row of what they print."""
    benches = {"this": ROOT / "tools" / "bench.py", str(against): against / "tools" / "bench.py"}
    if not benches[str(against)].exists():
        benches[str(against)] = against / "bench.py"
    found: dict[str, list[list[tuple[str, float]]]] = {who: [] for who in benches}
    for _ in range(rounds):
        for who, bench in benches.items():
            _, said = run([sys.executable, bench, part, "--rounds", 1, *options], bench.parent)
            found[who].append(figures(said))
    print(f"\n| {part} | this | {against} | this takes |\n|---|---|---|---|")
    ours, others = found.values()
    for i, (label, _) in enumerate(ours[0]):
        a, b = ([turn[i][1] for turn in turns] for turns in (ours, others))
        ratio = median(x / y for x, y in zip(a, b) if y)
        print(f"| {label} | {median(a)} | {median(b)} | {ratio:.3f} |", flush=True)


def figures(said: str) -> list[tuple[str, float]]:
    """The numbers of the rows of tables, and of the lines about the machine."""
    found = re.findall(r"the machine, (.*): (\d+) GFLOP/s", said)
    for line in re.findall(r"^\| (.*) \|$", said, re.MULTILINE):
        label, *cells = line.split(" | ")
        numbers = [match for cell in cells if (match := re.match(r"-?[\d.]+", cell))]
        if re.search(r"\(.* to ", line):  # a row of `table`: what follows is a ratio
            numbers = numbers[:1]
        found += [(label.strip(), number[0]) for number in numbers]
    return [(label, float(number)) for label, number in found]


PARTS = {"machine": bench_machine, "step": bench_step, "vae": bench_vae, "text": bench_text,
         "load": bench_load, "builtin": bench_builtin, "train": bench_train}
MORE = {"run": bench_run, "share": bench_share, "sizes": bench_sizes, "packed": bench_packed,
        "compiled": bench_compiled, "int8": bench_int8, "openvino": bench_openvino}
TAKE_AGAINST = "step", "vae", "text", "load", "builtin", "run"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART",
                        help=f"{', '.join(PARTS)} (the default: all of them); {', '.join(MORE)}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: sd.py's own on this device")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--against", type=Path, metavar="FOLDER", help="another checkout")
    args = parser.parse_args()
    parts = PARTS | MORE
    unknown = [part for part in args.parts if part not in parts]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are {', '.join(parts)}")
    given = None if args.dtype is None else DTYPES[args.dtype]
    device, dtype = best_device_and_dtype(args.device, given)
    print(f"torch {torch.__version__}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()}"
          f" threads, capability {torch.backends.cpu.get_cpu_capability()}", flush=True)
    for part in args.parts:
        if args.against is None:
            parts[part](dtype, device, args.rounds)
        elif part in TAKE_AGAINST:
            parts[part](dtype, device, args.rounds, args.against.resolve())
        else:
            options = ["--dtype", dtype_name(dtype), "--device", device]
            bench_against(part, options, args.rounds, args.against.resolve())


if __name__ == "__main__":
    main()
