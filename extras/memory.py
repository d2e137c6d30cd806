"""Load weights fast: conversion, memory that is ready in time, and no search for garbage.

The figures are of the commands in tools/bench.py on the CPUs named.
"""
import ctypes
import gc
import mmap
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn


def cpu_has(*names: str) -> bool:
    """Whether the CPU has one of these instruction sets, by PyTorch's names."""
    found = torch.cpu.get_capabilities()
    return any(found.get(name, False) for name in names)


AMX = cpu_has("amx_bf16")  # Intel's unit for matrices
PIECE = 2**18              # numbers that fit a CPU's cache


def to(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
    """`tensor.to(device, dtype)`, and convolutions channels last (see `layout`), faster."""
    memory_format = torch.contiguous_format
    if tensor.ndim == 4:
        memory_format = layout(device, dtype)
    on_cpu = torch.device(device).type == "cpu"
    if not on_cpu or dtype != torch.bfloat16 or tensor.dtype == dtype:
        return tensor.to(device, dtype, memory_format=memory_format)
    return to_bfloat16(tensor, memory_format)


def to_bfloat16(tensor: Tensor, memory_format: torch.memory_format) -> Tensor:
    """PyTorch writes bf16 number by number, unless it comes from fp32 in the same layout.

    So go to fp32 first, and change the layout last, when it is bf16 and half as large. In pieces
    that fit the cache this takes 1/4 to 3/4 of the time.
    """
    out = torch.empty_like(tensor, dtype=torch.bfloat16, memory_format=memory_format)
    rows = max(1, PIECE * len(tensor) // tensor.numel())
    for piece, source in zip(out.split(rows), tensor.split(rows)):
        source = source.float()
        if tensor.ndim == 4:
            source = source.bfloat16()
        piece.copy_(source)
    return out


def layout(device: str | torch.device, dtype: torch.dtype,
           is_unet: bool = True) -> torch.memory_format:
    """How a convolution's weights are best stored: channels last, with one exception.

    On an Intel Xeon with AMX, in fp32, a guided step of SD 1.x at 512x512 takes 4.65 s with the
    layout of the files and 4.85 s channels last. The VAE takes the same time with both.
    """
    on_cpu = torch.device(device).type == "cpu"
    if AMX and is_unet and on_cpu and dtype == torch.float32:
        return torch.contiguous_format
    return torch.channels_last


@contextmanager
def building() -> Iterator[None]:
    """Within, modules are built on the meta device, for the names and shapes of their weights.

    There PyTorch goes through the motions of drawing random numbers too, in more than half of the
    time that it takes to build SD 1.x.
    """
    kinds = nn.Linear, nn.Embedding, nn.modules.conv._ConvNd
    kept = [kind.reset_parameters for kind in kinds]
    for kind in kinds:
        kind.reset_parameters = lambda module: None
    try:
        with torch.device("meta"):
            yield
    finally:
        for kind, reset_parameters in zip(kinds, kept):
            kind.reset_parameters = reset_parameters


@contextmanager
def loading(tensors: dict[str, object], device: str | torch.device,
            dtype: torch.dtype) -> Iterator[Callable[..., Tensor]]:
    """Within, a model is built on the meta device and its weights are read. Gives `to` for them.

    `tensors`: what will be read (anything with a `shape`). On a CPU in bf16, which no file
    contains, all weights are copies; other threads prepare the memory for them while the modules
    are built.
    """
    on_cpu = torch.device(device).type == "cpu"
    if on_cpu:
        keep_freed_memory()
    with collector_off(), ExitStack() as prepared:
        if on_cpu and dtype == torch.bfloat16:
            size = sum(tensor.shape.numel() for tensor in tensors.values()) * dtype.itemsize
            prepared.enter_context(prefault_heap(size))

        def convert(tensor: Tensor, device: str | torch.device, dtype: torch.dtype) -> Tensor:
            prepared.close()  # the first call waits for the threads
            return to(tensor, device, dtype)
        yield convert


@contextmanager
def collector_off() -> Iterator[None]:
    """Within, Python does not search for garbage.

    While modules and tensors are made it would look at every imported object, again and again:
    a twentieth of the time of loading.
    """
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


# --- the heap of glibc ---

M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1  # malloc.h
MADV_POPULATE_WRITE = 23               # Linux 5.14 or later; others refuse it, which does no harm


def glibc() -> ctypes.CDLL | None:
    """The C library, if it is glibc."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    return libc if hasattr(libc, "mallopt") else None


def keep_freed_memory() -> None:
    """Have glibc keep the memory that is freed.

    Otherwise it returns large blocks to the system and gets them again, page by page, for every
    layer: a tenth of a CPU's time.
    """
    libc = glibc()
    if libc is not None:
        libc.mallopt(M_MMAP_MAX, 0)
        libc.mallopt(M_TRIM_THRESHOLD, 2**31 - 1)


def give_back_freed_memory() -> None:
    """Return it to the system: between two networks, while decoding, while weights are packed.

    The blocks of one network seldom fit the other: SD 1.x at 512x512 saves 0.1 to 0.2 GB.
    """
    libc = glibc()
    if libc is not None:
        libc.malloc_trim(0)


@contextmanager
def prefault_heap(size: int) -> Iterator[None]:
    """Meanwhile two threads get `size` bytes from the system, for glibc to use afterwards.

    The system gives memory page by page, each when it is first written. For 2.1 GB this takes
    0.4 s, as long as the rest of loading a model. Only in the main thread: its memory is one heap.
    """
    keep_freed_memory()
    libc = glibc()
    if libc is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    libc.free.argtypes = [ctypes.c_void_p]
    block, page, piece = libc.malloc(size), mmap.PAGESIZE, 2**24
    try:
        with ThreadPoolExecutor(2) as pool:
            if block is not None:
                first = -(-block // page) * page
                for start in range(first, block + size - piece, piece):
                    pool.submit(libc.madvise, start, piece, MADV_POPULATE_WRITE)
            yield
    finally:
        libc.free(block)  # newer blocks lie above it on the heap, so the system does not get it
