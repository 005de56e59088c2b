"""The device that a process computes on, and helpers for any device. Torch is imported on first use."""

from __future__ import annotations

import ctypes
import gc
import threading
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import launcher
from falcon_qlora.processes.ranks import local_process_index

if TYPE_CHECKING:
    import torch

# Only the fast path computes in FP8: the model and LoRA are in bfloat16.
_DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp8": "bfloat16"}
# Ampere's compute capability. GPUs before it emulate bfloat16, many times slower, and no kernel of ours is
# compiled for them.
FIRST_WITH_BFLOAT16 = (8, 0)


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
    device = resolve(device)
    name = dtype_name(wanted, on_gpu=device.type == "cuda", bfloat16=has_bfloat16(device))
    return getattr(torch, name)


def dtype_name(wanted: str, *, on_gpu: bool = True, bfloat16: bool = True) -> str:
    """The name of `compute_dtype` in torch; `bfloat16`: whether the GPU computes in it."""
    if wanted in _DTYPES:
        return _DTYPES[wanted]
    if wanted != "auto":
        raise UserError(f"compute_dtype {wanted!r} is none of auto, {', '.join(_DTYPES)}.")
    if not on_gpu:
        return "float32"
    return "bfloat16" if bfloat16 else "float16"


def has_bfloat16(device: torch.device) -> bool:
    """Whether a device computes in bfloat16; a CPU does, if slowly."""
    import torch

    return device.type != "cuda" or torch.cuda.get_device_capability(device) >= FIRST_WITH_BFLOAT16


def check_served(device: torch.device) -> None:
    """Refuse a GPU for which the installed torch has no kernels.

    Raises:
        UserError: naming it, and the torch that has them.
    """
    import torch

    if device.type != "cuda":
        return
    built, here = torch.cuda.get_arch_list(), torch.cuda.get_device_capability(device)
    if is_served(here, built):
        return
    what = "a newer torch (https://pytorch.org/get-started)"
    if here < min(map(_capability_of, built)):
        what = (
            "a torch built for CUDA 12.6, the last with Volta and Pascal "
            "(https://pytorch.org/get-started/previous-versions), or use a newer GPU"
        )
    raise UserError(
        f"{torch.cuda.get_device_name(device)} (compute capability {here[0]}.{here[1]}) cannot run the "
        f"installed torch {torch.__version__}, which is built for {', '.join(built)}: install {what}"
    )


def is_served(here: tuple[int, int], built: Sequence[str]) -> bool:
    """Whether a GPU of this compute capability runs what is built for these architectures, if any is named.

    Machine code (``sm_86``) runs on the same major and the same or a later minor; that with a letter
    (``sm_90a``) on its own only. PTX (``compute_90``) is compiled for any later one.
    """
    for name in built:
        of = _capability_of(name)
        if name.endswith("a"):
            fits = here == of
        else:
            fits = here >= of and (name.startswith("compute") or here[0] == of[0])
        if fits:
            return True
    return not built


def _capability_of(name: str) -> tuple[int, int]:
    """``sm_86`` → 8, 6 and ``sm_120a`` → 12, 0."""
    digits = name.partition("_")[2].rstrip("af")
    return int(digits[:-1]), int(digits[-1])


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
