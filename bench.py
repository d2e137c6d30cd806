"""How fast is this beside diffusers on the same machine, and beside what the machine can do?

    pip install -r requirements.txt -r requirements-test.txt && python bench.py        the tables of PARTS, at the end: a quarter of an hour on 2 cores
    python bench.py step vae          only these
    python bench.py run share sizes   and MORE, which take as long again and longer

Weights are random, in the shapes of SD 1.x; random weights cost what trained ones do. Each contestant has a process of its own, and they are
timed in turns (ours, theirs, ours, theirs, ...); the figures are medians over the turns; ratios are medians of the ratios within a turn, so that
a machine that slows down slows both. Needs 16 GB of memory and 6 GB of disk in the folder for temporary files.
"""
import argparse
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from clip import Tokenizer
from model import deep_kept, replayed, words_kept
from sampler import denoiser, guided, q_sample, target
from sd import DTYPES, PRESETS, StableDiffusion, best_device_and_dtype

HERE = Path(__file__).parent
GFLOP = 2 * 803  # of a guided step at 512x512 as written: two samples through the UNet (lecture/unet.py counts them), whatever is then saved
PROMPT = "a photograph of an astronaut riding a horse"


def in_turns(rounds: int, **actions: Callable[[], object]) -> dict[str, list[float]]:
    """Seconds of each action, once a round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in actions}
    for turn in range(rounds + 1):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def in_processes(rounds: int, **builders: Callable[[], Callable[[], object]]) -> dict[str, list[float]]:
    """The same for actions that are each built, and then run, in a process of their own: one's settings of memory are not the other's."""
    spawn, links, workers = multiprocessing.get_context("spawn"), {}, []
    for name, build in builders.items():
        links[name], theirs = spawn.Pipe()
        workers.append(spawn.Process(target=serve, args=(theirs, build), daemon=True))
        workers[-1].start()
        theirs.close()  # so that recv raises EOFError, and does not wait, if the process ends
        links[name].recv()
    seconds = in_turns(rounds, **{name: (lambda link=link: (link.send("go"), link.recv())) for name, link in links.items()})
    for worker in workers:
        worker.terminate()
    return seconds


def serve(link: Connection, build: Callable[[], Callable[[], object]]) -> None:
    with torch.no_grad():
        action = build()
        while True:
            synchronize()
            link.send("done")
            link.recv()
            action()


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def table(title: str, seconds: dict[str, list[float]], unit: str = "s", digits: int = 2, more: dict[str, str] = {}) -> None:
    """A row for each action: its median, and the median of what ours, the first, takes of it."""
    ours = next(iter(seconds.values()))
    print(f"\n| {title} | median {unit} (min to max) | ours takes |\n|---|---|---|")
    for name, values in seconds.items():
        ratio = median(a / b for a, b in zip(ours, values))
        share = "" if values is ours else f"{ratio:.2f}"
        print(f"| {name} {more.get(name, '')}| {median(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f}) | {share} |", flush=True)


def our_part(part: str, dtype: torch.dtype, device: str) -> torch.nn.Module:
    """Random weights, placed as `load` places them, of this part alone: drawing them all takes half a minute."""
    torch.manual_seed(0)
    with torch.device("meta"):
        sd = StableDiffusion(PRESETS["sd1"])
    network = getattr(sd, part).to_empty(device="cpu").apply(lambda layer: layer.reset_parameters() if hasattr(layer, "reset_parameters") else None)
    sd.parts = {prefix: one for prefix, one in sd.parts.items() if one is network}
    sd.place(device, dtype)
    return network


def their_part(part: str, dtype: torch.dtype, device: str, channels_last: bool) -> torch.nn.Module:
    import diffusers
    from transformers import CLIPTextConfig, CLIPTextModel
    torch.manual_seed(0)
    build = {
        "unet": partial(diffusers.UNet2DConditionModel, sample_size=64, cross_attention_dim=768),
        "vae": partial(diffusers.AutoencoderKL, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
                       down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4),
        "text_encoder": partial(CLIPTextModel, CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)),
    }[part]
    return build().to(device, dtype, memory_format=torch.channels_last if channels_last else torch.preserve_format).eval().requires_grad_(False)


def their_settings(dtype: torch.dtype) -> dict[str, tuple[torch.dtype, bool]]:
    """diffusers as it comes, and its best: (dtype, channels last)."""
    settings = {"diffusers, fp32 (its default)": (torch.float32, False), "diffusers, fp32, channels last": (torch.float32, True)}
    if dtype != torch.float32:
        name = next(name for name, value in DTYPES.items() if value == dtype)
        settings |= {f"diffusers, {name}": (dtype, False), f"diffusers, {name}, channels last": (dtype, True)}
    return settings


def bench_step(dtype: torch.dtype, device: str, rounds: int) -> None:
    seconds = in_processes(rounds, this=partial(our_step, dtype, device), **{
        name: partial(their_step, device, *settings) for name, settings in their_settings(dtype).items()})
    table("guided step, 512x512", seconds, digits=3, more={"this": f"({GFLOP / median(seconds['this']):.0f} GFLOP/s) "})


def our_step(dtype: torch.dtype, device: str, deep_every: int | None = None) -> Callable[[], object]:
    unet = our_part("unet", dtype, device)
    x, told = torch.randn(1, 4, 64, 64, device=device), torch.randn(2, 77, 768, device=device)
    keep = ExitStack()  # open for good
    keep.enter_context(words_kept(unet))
    if deep_every is not None:
        keep.enter_context(deep_kept(unet, deep_every))
    replay = device.startswith("cuda") and deep_every is None  # as `generate` has it
    network = keep.enter_context(replayed(unet)) if replay else unet
    denoise = guided(denoiser(network, "eps"), *({"context": half.to(dtype)} for half in told.split(1)), scale=7.5)
    if replay:
        denoise(x, 7.0), denoise(x, 7.0)  # is recorded the second time
    return lambda: (keep, denoise(x, 7.0))  # keep is held: dropped, its contexts end


def their_step(device: str, dtype: torch.dtype, channels_last: bool) -> Callable[[], object]:
    unet = their_part("unet", dtype, device, channels_last)
    x, told = torch.randn(2, 4, 64, 64, device=device, dtype=dtype), torch.randn(2, 77, 768, device=device, dtype=dtype)

    def step() -> torch.Tensor:
        uncond, cond = unet(x, 500, told, return_dict=False)[0].chunk(2)
        return uncond + 7.5 * (cond - uncond)
    return step


def bench_vae(dtype: torch.dtype, device: str, rounds: int) -> None:
    table("decoding, 512x512", in_processes(rounds, this=partial(our_decoding, dtype, device), **{
        name: partial(their_decoding, device, *settings) for name, settings in their_settings(dtype).items()}), digits=3)


def our_decoding(dtype: torch.dtype, device: str) -> Callable[[], object]:
    vae = our_part("vae", dtype, device)
    z = torch.randn(1, 4, 64, 64).to(vae.quant_conv.weight)
    return lambda: vae.decode(z)


def their_decoding(device: str, dtype: torch.dtype, channels_last: bool) -> Callable[[], object]:
    vae, z = their_part("vae", dtype, device, channels_last), torch.randn(1, 4, 64, 64, device=device, dtype=dtype)
    return lambda: vae.decode(z, return_dict=False)


def bench_text(dtype: torch.dtype, device: str, rounds: int) -> None:
    table("two prompts through the text encoder", in_processes(4 * rounds, this=partial(our_text, dtype, device), **{
        name: partial(their_text, device, *settings) for name, settings in their_settings(dtype).items() if not settings[1]}), digits=3)


def our_text(dtype: torch.dtype, device: str) -> Callable[[], object]:
    text, tokens = our_part("text", dtype, device), Tokenizer()([PROMPT, ""]).to(device)
    return lambda: text(tokens)


def their_text(device: str, dtype: torch.dtype, _: bool) -> Callable[[], object]:
    text, tokens = their_part("text_encoder", dtype, device, False), Tokenizer()([PROMPT, ""]).to(device)
    return lambda: text(tokens)


def bench_load(dtype: torch.dtype, device: str, rounds: int) -> None:
    """A file of 2.1 GB (fp16), ours and that of a diffusers folder, to a ready model; imports not counted. In bf16 too, which any CPU can hold."""
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=True)
        for each in dict.fromkeys([dtype, torch.bfloat16]):
            timed = "import sys, time, torch; {0}; start = time.perf_counter(); {1}; print(time.perf_counter() - start)"
            codes = {"this": timed.format("from sd import *", f"sd = StableDiffusion.load('{tmp}/sd1.safetensors', '{device}', {each})"),
                     "diffusers": timed.format("from diffusers import StableDiffusionPipeline as P",
                                               f"pipe = P.from_pretrained('{tmp}/theirs', torch_dtype={each}, variant='fp16').to('{device}')")}
            seconds, memory = {who: [] for who in codes}, {}
            for turn in range(rounds + 1):
                for who, code in codes.items():
                    memory[who], said = run([sys.executable, "-c", code])
                    seconds[who] += [float(said.split()[-1])] * (turn > 0)
            table(f"loading 2.1 GB, {str(each)[6:]}", seconds, more={who: f"(peak memory {gb:.1f} GB) " for who, gb in memory.items()})


def bench_run(dtype: torch.dtype, device: str, rounds: int) -> None:
    """A picture of 512x512 in 3 steps from process start to PNG."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=True)
        code = (f"import torch; from diffusers import StableDiffusionPipeline as P; pipe = P.from_pretrained('{tmp}/theirs', torch_dtype={dtype}, variant='fp16')"
                f".to('{device}'); pipe('{PROMPT}', num_inference_steps=3).images[0].save('{tmp}/theirs.png')")
        commands = {"this": [sys.executable, HERE / "sd.py", PROMPT, "--ckpt", f"{tmp}/sd1.safetensors", "--steps", "3", "--dtype", name, "--device", device,
                             "--out", f"{tmp}/ours.png"], "diffusers": [sys.executable, "-c", code]}
        memory: dict[str, float] = {}
        seconds = in_turns(max(1, rounds - 1), **{who: (lambda who=who: memory.update({who: run(commands[who])[0]})) for who in commands})
    table(f"process start to PNG, 512x512, 3 steps, {name}", seconds, more={who: f"(peak memory {gb:.1f} GB) " for who, gb in memory.items()})


def bench_sizes(dtype: torch.dtype, device: str, rounds: int) -> None:
    """How time and memory grow with the picture: its first guided step (the text's 0.3 s with it) and decoding, each size in a process of its own."""
    name = next(name for name, value in DTYPES.items() if value == dtype)
    code = ("import sys, time; from sd import *; path, device, dtype, side, lowmem = sys.argv[1:]; sd = StableDiffusion.load(path, device, DTYPES[dtype], lowmem=bool(lowmem)); "
            "times = [time.perf_counter()]; "
            f"sd.generate('{PROMPT}', steps=1, width=int(side), height=int(side), callback=lambda step: times.append(time.perf_counter())); "
            "times.append(time.perf_counter()); print(times[1] - times[0], times[2] - times[1], sum(t.nbytes for t in sd.state_dict().values()) / 1e9)")
    print("\n| side | guided step | decoding | memory beyond the weights | --lowmem: step | decoding | memory |\n|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as tmp:
        write_files(tmp, theirs=False)
        for side in (256, 512, 768, 1024):
            cells = []
            for lowmem in ("", "lowmem"):
                peak, said = run([sys.executable, "-c", code, f"{tmp}/sd1.safetensors", device, name, side, lowmem])
                step, decoding, weights = map(float, said.split())
                cells.append(f"{step:.1f} s | {decoding:.1f} s | {peak - weights:.1f} GB")
            print(f"| {side} | {' | '.join(cells)} |", flush=True)


def run(args: list) -> tuple[float, str]:
    """Run it to its end: its greatest memory in GB, and what it printed."""
    child = subprocess.Popen(list(map(str, args)), cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = child.stdout.read().decode()
    _, status, usage = os.wait4(child.pid, 0)
    if status:
        sys.exit(f"bench.py: {args[1:3]} failed:\n{said[-2000:]}")
    return usage.ru_maxrss / 1e6, said


def write_files(tmp: str, theirs: bool) -> None:
    """In a process of its own: the greatest memory of a process is counted from that of the one that starts it."""
    writer = multiprocessing.get_context("spawn").Process(target=write_files_here, args=(tmp, theirs))
    writer.start()
    writer.join()


def write_files_here(tmp: str, theirs: bool) -> None:
    torch.manual_seed(0)
    StableDiffusion(PRESETS["sd1"]).save(f"{tmp}/sd1.safetensors")
    if theirs:
        write_their_folder(tmp)


def write_their_folder(tmp: str) -> None:
    from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
    from transformers import CLIPTokenizerFast
    tokenizer = CLIPTokenizerFast(tokenizer_object=Tokenizer().bpe, bos_token="<|startoftext|>", eos_token="<|endoftext|>", pad_token="<|endoftext|>", model_max_length=77)
    parts = {part: their_part(part, torch.float16, "cpu", False) for part in ("unet", "vae", "text_encoder")}
    pipe = StableDiffusionPipeline(**parts, tokenizer=tokenizer, scheduler=DPMSolverMultistepScheduler(),
                                   safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    pipe.save_pretrained(f"{tmp}/theirs", variant="fp16")


def bench_builtin(dtype: torch.dtype, device: str, rounds: int) -> None:
    with tempfile.TemporaryDirectory() as tmp:
        seconds = in_turns(rounds + 2, **{
            "this": lambda: run([sys.executable, HERE / "sd.py", "a red apple", "--out", f"{tmp}/o.png"]),
            "python -c 'import torch'": lambda: run([sys.executable, "-c", "import torch"])})
    table("built-in model, process start to PNG", seconds)


@torch.no_grad()
def bench_share(dtype: torch.dtype, device: str, rounds: int) -> None:
    """--guided-share and --deep-every: what they save and what they change, with the built-in model, eight prompts; and a step of SD 1.x."""
    sd, prompts = StableDiffusion.load(None, device, dtype), ["a red apple", "a rocket", "cat face", "a blue car", "a green cat", "a penguin, twemoji",
                                                              "a golden key", "a pink rocket"]
    pictures = {}

    def draw(name: str, **options: float) -> None:
        pictures[name] = np.stack([np.asarray(sd.generate(prompt, **options)[0]) / 255 for prompt in prompts])
    options = {"all of every step": {}} | {f"--guided-share {share}": {"guided_share": share} for share in (0.75, 0.5, 0.25)} | {
        f"--deep-every {n}": {"deep_every": n} for n in (2, 3, 5)}
    seconds = in_turns(rounds, **{name: partial(draw, name, **one) for name, one in options.items()})
    whole = pictures["all of every step"]
    decibels = {name: f"({-10 * np.log10(np.square(p - whole).mean((1, 2, 3))).mean():.1f} dB to the first) " for name, p in pictures.items() if p is not whole}
    table("eight pictures, built-in model", seconds, more=decibels)
    step = our_step(dtype, device, deep_every=2)  # every second call is one between
    table("guided step, 512x512, --deep-every", in_turns(rounds, **{"whole": step, "between two whole ones": step}))


def bench_train(dtype: torch.dtype, device: str, rounds: int) -> None:
    """The loop of train.py on the built-in model's UNet, fp32, batches of 32; and with diffusers' UNet of the same shape in its place."""
    from diffusers import UNet2DConditionModel
    cfg, batch = PRESETS["emoji"].unet, 32
    ours = StableDiffusion(PRESETS["emoji"]).unet.to(device)
    theirs = UNet2DConditionModel(
        sample_size=8, in_channels=cfg.in_channels, out_channels=cfg.out_channels, block_out_channels=tuple(cfg.model_channels * m for m in cfg.channel_mult),
        down_block_types=tuple("CrossAttnDownBlock2D" if depth else "DownBlock2D" for depth in cfg.transformer_depth),
        up_block_types=tuple("CrossAttnUpBlock2D" if depth else "UpBlock2D" for depth in reversed(cfg.transformer_depth)),
        layers_per_block=cfg.num_res_blocks, attention_head_dim=cfg.num_heads, cross_attention_dim=cfg.context_dim, norm_num_groups=cfg.num_groups,
        class_embed_type="projection", projection_class_embeddings_input_dim=cfg.adm_in_channels).to(device)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    x0, noise = torch.randn(2, batch, cfg.in_channels, 8, 8, device=device)
    context, y, t = torch.randn(batch, 16, cfg.context_dim, device=device), torch.randn(batch, cfg.adm_in_channels, device=device), torch.arange(batch, device=device) * 31

    def training_step(unet: torch.nn.Module, call: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        optimizer = torch.optim.AdamW(unet.parameters(), 1e-4, fused=True)

        def step() -> None:
            for _ in range(3):
                with sdpa_kernel(SDPBackend.MATH) if device == "cpu" else nullcontext():
                    loss = F.mse_loss(call(q_sample(x0, t, noise)), target("v", x0, t, noise))
                loss.backward()
                torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        return step
    table(f"training, 3 steps of {batch} latents 16x8x8, fp32", in_turns(rounds + 2, **{
        "this": training_step(ours, lambda x: ours(x, t, context, y)),
        "diffusers' UNet": training_step(theirs, lambda x: theirs(x, t, context, class_labels=y, return_dict=False)[0])}))


@torch.no_grad()
def bench_machine(dtype: torch.dtype, device: str, rounds: int) -> None:
    """What the machine reaches in one large matrix product and in one of SD 1.x's convolutions."""
    a = torch.randn(4096, 4096, device=device, dtype=dtype)
    x, w = torch.randn(2, 640, 64, 64, device=device, dtype=dtype), torch.randn(640, 640, 3, 3, device=device, dtype=dtype)
    x, w = (z.contiguous(memory_format=torch.channels_last) for z in (x, w))
    seconds = in_turns(rounds + 2, product=lambda: a @ a, convolution=lambda: F.conv2d(x, w, padding=1))
    for name, flops in {"product": 2 * 4096**3, "convolution": 2 * x.numel() * 640 * 9}.items():
        print(f"the machine, {name} in {str(dtype)[6:]}: {flops / min(seconds[name]) / 1e9:.0f} GFLOP/s at best", flush=True)


PARTS = {"machine": bench_machine, "step": bench_step, "vae": bench_vae, "text": bench_text, "load": bench_load, "builtin": bench_builtin, "train": bench_train}
MORE = {"run": bench_run, "share": bench_share, "sizes": bench_sizes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=list(PARTS), metavar="PART", help=f"{', '.join(PARTS)} (all of them are the default); {', '.join(MORE)}")
    parser.add_argument("--dtype", choices=DTYPES, help="default: sd.py's own on this device")
    parser.add_argument("--device")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    parts = PARTS | MORE
    if unknown := set(args.parts) - set(parts):
        parser.error(f"no part is called {unknown.pop()!r}; there are {', '.join(parts)}")
    device, dtype = best_device_and_dtype(args.device, None if args.dtype is None else DTYPES[args.dtype])
    print(f"torch {torch.__version__}, {device}, {str(dtype)[6:]}, {torch.get_num_threads()} threads, capability {torch.backends.cpu.get_cpu_capability()}")
    for part in args.parts:
        parts[part](dtype, device, args.rounds)


if __name__ == "__main__":
    main()
