"""Which path a model's blocks run on: for training, and for every measurement that is compared with it."""

from __future__ import annotations

from collections import Counter
from typing import Any

from falcon_qlora.common.errors import UserError


def choose_kernels(model: Any, *, kernels: str, compute_dtype: str) -> dict[str, str]:
    """Put the fast path on the blocks that it knows.

    Args:
        model: with packing enabled.
        kernels, compute_dtype: the settings of these names.

    Returns:
        For every block's name what runs, or why it was left alone; {} with ``--kernels off``.

    Raises:
        UserError: if ``--kernels required`` or FP8 meets a block, or a device, that cannot.
    """
    from falcon_qlora.models.fast_path import apply_fast_path

    if kernels == "off":
        return {}
    fp8 = compute_dtype == "fp8"
    report = apply_fast_path(model, fp8_products=fp8, libraries=kernels != "portable")
    left = [f"{name} runs on the {what}" for name, what in report.items() if not runs_fast(what)]
    if left and (kernels == "required" or fp8):
        asked = (
            "--kernels required" if kernels == "required" else "--compute_dtype fp8 is the fast path's alone"
        )
        raise UserError(f"{asked}: {left[0]} ({len(left)} of {len(report)} blocks)")
    return report


def runs_fast(what: str) -> bool:
    """Whether an entry of `choose_kernels` says that a block runs on the fast path."""
    return not what.startswith("reference")


def described(kernels: dict[str, str]) -> str:
    """What `choose_kernels` says, in a line."""
    if not kernels:
        return "the reference path"
    ways = Counter(kernels.values())
    return "; ".join(f"{count} of {len(kernels)} blocks {what}" for what, count in ways.items())
