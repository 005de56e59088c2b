"""The device that a process computes on, and helpers for any device. Torch is imported on first use."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import launcher
from falcon_qlora.processes.ranks import local_process_index

if TYPE_CHECKING:
    import torch

# Only the fast path computes in FP8: the model and LoRA are in bfloat16.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}


def open_gpu() -> None:
    """Have a thread open this process's GPU, which takes about a second, while torch is being imported."""

    def retain() -> None:
        driver, device, context = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.c_void_p()
        driver.cuDeviceGet(ctypes.byref(device), local_process_index())
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)  # which torch will use

    if launcher.visible_gpus() > local_process_index():
        threading.Thread(target=retain, name="open_gpu", daemon=True).start()


def local_device() -> torch.device:
    """The device of this process's replica: the GPU of its local index, or the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", local_process_index())


def resolve(device: torch.device | str | None) -> torch.device:
    """The device that is meant: this process's for None, the current GPU for ``cuda``."""
    import torch

    device = local_device() if device is None else torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def compute_dtype(wanted: torch.dtype | str, device: torch.device | str | None = None) -> torch.dtype:
    """The activations' dtype, for the model and the trainer alike.

    Args:
        wanted: a dtype, ``bf16``, ``fp16``, ``fp32``, ``fp8``, or ``auto``: bfloat16 where the GPU computes
            in it, float16 on other GPUs, float32 on the CPU.
        device: this process's own where None.
    """
    import torch

    if isinstance(wanted, torch.dtype):
        return wanted
    if wanted in _DTYPES:
        return getattr(torch, _DTYPES[wanted])
    if wanted != "auto":
        raise UserError(f"compute_dtype {wanted!r} is none of auto, {', '.join(_DTYPES)}.")
    if resolve(device).type != "cuda":
        return torch.float32
    # Older GPUs emulate it, many times slower.
    has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has_bfloat16 else torch.float16


def free_memory() -> None:
    """Release unused memory, PyTorch's cache on the GPU included."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def undo_draws_since(device: torch.device) -> Callable[[], None]:
    """A function that sets the random generators of the CPU and of `device` to what they are now."""
    import torch

    of_cpu = torch.get_rng_state()
    of_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None

    def undo() -> None:
        torch.set_rng_state(of_cpu)
        if of_gpu is not None:
            torch.cuda.set_rng_state(of_gpu, device)

    return undo


def draws_undone(device: torch.device) -> AbstractContextManager[None]:
    """Restore the random generators of the CPU and of `device` at the block's end."""
    import torch

    return torch.random.fork_rng([device] if device.type == "cuda" else [])
