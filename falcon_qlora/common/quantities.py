"""Units, and how quantities are written for people. Imports nothing: every room uses it."""

from __future__ import annotations

GIB = 2**30
GB = 10**9


def gib(size_bytes: float, digits: int = 2) -> str:
    """``1.50 GiB``, where a GiB is 2^30 bytes."""
    return f"{size_bytes / GIB:.{digits}f} GiB"


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def counted(number: int, unit: str, units: str | None = None) -> str:
    """``1 GPU``, ``2 GPUs``, or ``2 processes`` where `units` is the plural."""
    return f"{number:,} {unit if number == 1 else units or f'{unit}s'}"
