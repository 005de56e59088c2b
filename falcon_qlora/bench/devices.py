"""A device's peak memory, its synchronization, and its best matrix-product speed."""

from __future__ import annotations

import contextlib
import functools
import math
import time
from pathlib import Path

import torch

from falcon_qlora.kernels import fp8


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def reset_peak(device: torch.device) -> None:
    """Reset the peak of memory use."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    # On Linux this resets the peak resident size. Elsewhere the whole process's peak stays.
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def peaks(device: torch.device) -> tuple[int, int]:
    """Highest bytes allocated and reserved since `reset_peak`; on the CPU both are the resident memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="utf-8", errors="replace")
        line = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
        resident = int(line.split()[1]) * 1024
    except (OSError, StopIteration):
        import resource

        resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return resident, resident


def product_ceiling(device: torch.device, hidden: int, tokens: int, dtype: str = "bf16") -> float | None:
    """TFLOP/s of a product shaped like a block's first, on random data, after a warm-up of 1 s on a GPU.

    Args:
        device: where to measure.
        hidden: hidden size of the model.
        tokens: rows of the product.
        dtype: ``bf16``, or ``fp8`` with a scale for each row.

    Returns:
        None for ``fp8`` where the device does not support it.
    """
    if dtype == "fp8" and fp8.why_not(device) is not None:
        return None
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)
    weight = torch.randn(5 * hidden, hidden, device=device, dtype=torch.bfloat16)
    multiply = functools.partial(torch.matmul, x, weight.T)
    if dtype == "fp8":
        rows, columns = (torch.ones(count, 1, device=device) for count in (len(x), len(weight)))
        x8, weight8 = x.to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
        multiply = functools.partial(
            torch._scaled_mm,
            x8,
            weight8.T,
            scale_a=rows,
            scale_b=columns.T,
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )
    operations = 2 * x.numel() * weight.shape[0]
    repeat = max(1, int(6e14 / operations)) if device.type == "cuda" else 1
    seconds = math.inf
    for _ in range(2):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(repeat):
            multiply()
        synchronize(device)
        seconds = (time.perf_counter() - started) / repeat
    return operations / seconds / 1e12
