"""Devices, precisions, the name of a machine, and memory."""

import ctypes
import mmap
import os
import platform
import re
import sys
from pathlib import Path

import torch

from harness.terminal import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def choose_device(name: str) -> torch.device:
    """Return the device of that name. "auto" is CUDA, else MPS, else the CPU. Raise UserError if there is none."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device {name!r} is not one of auto, cpu, cuda, cuda:N, mps") from None
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0  # with an old driver it counts all the same
    count = {"cpu": 1, "cuda": gpus, "mps": int(torch.backends.mps.is_available())}
    if not 0 <= (device.index or 0) < count.get(device.type, 0):  # cuda:200 has the index -56
        raise UserError(f"--device {name}: this machine or this build of PyTorch has none; --device cpu always works")
    return device


def choose_precision(name: str, device: torch.device) -> str:
    """Return a key of DTYPES. "auto" is bf16 on a CUDA GPU or x86 CPU that computes it, else fp16 on CUDA, else fp32.

    Raises UserError for fp16 without CUDA.
    """
    if name == "fp16" and device.type != "cuda":  # on MPS, optimizers ignored the scaler (pytorch pull request 186360)
        raise UserError("--precision fp16 needs CUDA; use bf16 or fp32")
    if name != "auto":
        return name
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    if device.type == "cpu" and (torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()):
        return "bf16"
    return "fp32"


def name_precision(dtype: torch.dtype) -> str:
    """Return the key of DTYPES that stands for `dtype`."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def autocast(images: torch.Tensor) -> torch.autocast:
    """Return the context in which a network computes in its images' precision."""
    return torch.autocast(images.device.type, images.dtype, enabled=images.dtype != torch.float32)


def keep_freed_memory() -> None:
    """Make glibc keep freed memory for the next allocation (mallopt(3)), on huge pages; do nothing elsewhere.

    By default glibc returns blocks of 32 MiB and more to the system. Each step's large activations then lie on fresh
    pages, which the system clears 4 KiB at a time: a third to half of MobileNetV2's time on a CPU (docs/speed.md).
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if hasattr(libc, "mallopt"):  # musl has none
        m_trim_threshold, m_mmap_max = -1, -4
        libc.mallopt(m_trim_threshold, -1)
        libc.mallopt(m_mmap_max, 0)
        lay_heap_on_huge_pages(libc)


def lay_heap_on_huge_pages(libc: ctypes.CDLL) -> None:
    """Enlarge the heap, without using more memory, and ask for pages of 2 MiB there (madvise(2)).

    Many Linux systems give them only if asked. The processor finds few large pages faster than many of 4 KiB.
    """
    libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
    libc.free.restype, libc.free.argtypes = None, [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    size = min(8 << 30, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)  # all of r5 takes up to 3 GiB
    if block := libc.malloc(size):  # None under a limit such as ulimit -v
        start = -(-block // mmap.PAGESIZE) * mmap.PAGESIZE
        libc.madvise(start, block + size - start, mmap.MADV_HUGEPAGE)
        libc.free(block)  # stays part of the heap, as glibc keeps what is freed


def device_name(device: torch.device) -> str:
    """Return the GPU's name, or the CPU's with the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpu = platform.processor() or platform.machine()
    if Path("/proc/cpuinfo").exists():
        names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    return f"{cpu}, MPS" if device.type == "mps" else f"{cpu}, {torch.get_num_threads()} threads"


def peak_memory(device: torch.device) -> dict[str, int]:
    """Return the peak memory of this process in MB: "resident", and "cuda" for PyTorch's on a GPU."""
    peak = {}
    if sys.platform == "linux":  # where ru_maxrss includes the process that started this one
        status = Path("/proc/self/status").read_text()
        if found := re.search(r"VmHWM:\s*(\d+) kB", status):  # gVisor, for example, has no such line
            peak["resident"] = round(int(found[1]) * 1024 / 1e6)
    elif sys.platform == "darwin":
        import resource  # not on Windows

        peak["resident"] = round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6)  # bytes
    if device.type == "cuda":
        peak["cuda"] = round(torch.cuda.max_memory_allocated(device) / 1e6)
    return peak
