"""Units, and how quantities are written for people. Imports nothing: every room uses it."""

from __future__ import annotations

GIB = 2**30
GB = 10**9


def sized(size_bytes: float, digits: int = 2) -> str:
    """``1.50 GiB``, ``12.0 MiB``, ``3.0 KiB`` or ``50 bytes``: in the largest unit of which it has a tenth.

    Args:
        digits: after the point, of GiB (2^30 bytes); smaller units have one.
    """
    if size_bytes >= GIB / 10:
        return f"{size_bytes / GIB:.{digits}f} GiB"
    for unit, scale in ("MiB", 2**20), ("KiB", 2**10):
        if size_bytes >= scale / 10:
            return f"{size_bytes / scale:,.1f} {unit}"
    return counted(round(size_bytes), "byte")


def duration(seconds: float) -> str:
    """``42 s``, ``3 min 05 s`` or ``2 h 07 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600:,} h {whole % 3600 // 60:02d} min"


def passes(epochs: float) -> str:
    """``2.5 epochs``, or ``1.5% of an epoch`` where there is less than one."""
    if epochs < 1:
        return f"{100 * epochs:.{0 if epochs >= 0.1 else 1}f}% of an epoch"
    number = f"{round(epochs, 2 if epochs < 10 else 1):,.12g}"
    return f"{number} epoch{'' if number == '1' else 's'}"


def counted(number: int, unit: str, units: str | None = None) -> str:
    """``1 GPU``, ``2 GPUs``, or ``2 processes`` where `units` is the plural."""
    return f"{number:,} {unit if number == 1 else units or f'{unit}s'}"
