"""Training in many processes, started by torchrun: process group, sums over ranks, FSDP.

`python train.py` alone is one process. torchrun sets RANK, WORLD_SIZE and LOCAL_RANK.
"""
import gc
import os
import re
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sd import StableDiffusion, UserError, best_device_and_dtype


def init_distributed(device: str = "") -> tuple[int, int, str]:
    """(rank of this process, number of processes, device). Raises UserError for a wrong device."""
    device, _ = best_device_and_dtype(device or None, torch.float32)
    if "RANK" not in os.environ:
        return 0, 1, device
    check_environment()
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    # while the first process saves, the others wait
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo",
                            timeout=timedelta(hours=1))
    return dist.get_rank(), dist.get_world_size(), device


def check_environment() -> None:
    """Raises UserError if what torchrun sets is damaged, or was set by something else."""
    numbers = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    good = all(re.fullmatch("[0-9]{1,6}", text) for text in numbers.values()) \
        and int(numbers["RANK"]) < int(numbers["WORLD_SIZE"]) and "MASTER_ADDR" in os.environ
    if not good:
        said = ", ".join(f"{name}={text!r}" for name, text in numbers.items())
        raise UserError(f"the environment says {said}: start many processes with torchrun, or "
                        "unset RANK for one")


def end_process(status: int) -> None:
    """Leave the process group and end the process with this exit status, if it is not 0.

    A rank of torchrun always ends here, without Python's own clean-up. Gloo's threads outlive
    `destroy_process_group`, because caches of FSDP's tensors hold the group. A thread that frees
    the tensor of its last exchange while Python cleans up would abort the process ("terminate
    called without an active exception").
    """
    if not dist.is_initialized():
        if status:
            sys.exit(status)
        return
    gc.collect()  # ends workers of DataLoaders that are part of reference cycles
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def all_reduce_stats(loss: Tensor, stop: bool, skipped: int) -> tuple[float, bool, int]:
    """The same for all processes: mean loss, whether any was told to stop, sum of skipped."""
    if not dist.is_initialized():
        return float(loss), stop, skipped
    stats = torch.tensor([1, loss, stop, skipped], device=loss.device, dtype=torch.float64)
    dist.all_reduce(stats)
    world, loss, stopping, skipped = stats.tolist()
    return loss / world, stopping > 0, int(skipped)


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def gather_objects(mine: object) -> list:
    """`mine` of every process, in the order of ranks."""
    if not dist.is_initialized():
        return [mine]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


@contextmanager
def gradient_sync(model: nn.Module, sync: bool) -> Iterator[None]:
    """Inside, a backward pass averages gradients over the processes only if `sync`."""
    if hasattr(model, "set_requires_gradient_sync"):    # FSDP's
        model.set_requires_gradient_sync(sync)
    skip = isinstance(model, DistributedDataParallel) and not sync
    with model.no_sync() if skip else nullcontext():
        yield


# --- FSDP: weights, gradients and averages are divided among the processes ---

def fsdp(model: nn.Module, blocks: list[nn.Module]) -> nn.Module:
    """Shard the model, block by block. Zhao et al. 2023."""
    from torch.distributed.fsdp import fully_shard  # importing it takes a second: only if used

    for p in model.parameters():
        p.data = p.data.contiguous()  # FSDP does not take channels last
    for block in blocks:
        if any(p.requires_grad for p in block.parameters()):
            fully_shard(block)
    return fully_shard(model)


def is_sharded(x: Tensor) -> bool:
    """Whether it is one of FSDP's tensors (torch.distributed.tensor.DTensor)."""
    return hasattr(x, "full_tensor")


def unshard(x: Tensor) -> Tensor:
    """The whole of a tensor that FSDP has divided. All processes must call it."""
    return x.full_tensor() if is_sharded(x) else x


def unshard_on_first(x: Tensor, rank: int) -> Tensor:
    """The same on the CPU for rank 0; an empty tensor for the others."""
    if not is_sharded(x):
        return x
    whole = unshard(x)
    return whole.cpu() if rank == 0 else whole[:0]


def shard_like(x: Tensor, like: Tensor) -> Tensor:
    """Divide a whole tensor as `like` is divided."""
    if is_sharded(like) and x.shape == like.shape:
        from torch.distributed.tensor import distribute_tensor

        return distribute_tensor(x.to(like.device), like.device_mesh, like.placements)
    return x


@contextmanager
def full_model(sd: StableDiffusion, sharded: bool, rank: int) -> Iterator[StableDiffusion]:
    """The model. If it is sharded, rank 0 gets a copy with whole weights. All must call it."""
    if not sharded:
        yield sd
        return
    with torch.device("meta"):
        copy = StableDiffusion(sd.preset)
    copy.metadata, copy.device, copy.dtype = sd.metadata, sd.device, sd.dtype
    for prefix, network in copy.components.items():
        mine = sd.components[prefix]
        weights = {name: unshard(p.detach()) for name, p in mine.named_parameters()}
        if rank == 0:
            buffers = dict(mine.named_buffers())
            network.load_state_dict(weights | buffers, strict=False, assign=True)
            network.to(sd.device).eval().requires_grad_(False)
    yield copy


# --- stopping ---

class StoppedError(BaseException):
    """A signal came while the process waited."""


class Signals(list[int]):
    """The signals that came. If `alone`, one that comes inside `heeded` raises StoppedError."""

    waiting = False

    @contextmanager
    def heeded(self) -> Iterator[None]:
        self.waiting = True
        try:
            yield
        finally:
            self.waiting = False


def catch_signals(alone: bool) -> Signals:
    """A list that Ctrl-C or SIGTERM is put into, so that the step ends and is saved.

    A second one kills the process if it is `alone`. torchrun passes on every signal it gets.
    """
    received = Signals()

    def receive(number: int, _: object) -> None:
        received.append(number)
        if alone:
            signal.signal(number, signal.SIG_DFL)
            if received.waiting:
                raise StoppedError

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, receive)
    return received
