"""Micro-batches in halves, for where memory runs out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from falcon_qlora.data.packing import MicroBatch

MOST_HALVINGS = 8


def halved(batch: MicroBatch, times: int) -> list[MicroBatch]:
    """`batch` in up to 2^times parts of whole documents with about the same number of positions each."""
    documents = len(batch.lengths)
    if times == 0 or documents == 1:
        return [batch]
    starts = batch.cu_seqlens.tolist()
    middle = min(range(1, documents), key=lambda place: abs(2 * starts[place] - starts[-1]))
    parts = (_documents(batch, starts, 0, middle), _documents(batch, starts, middle, documents))
    return [smaller for part in parts for smaller in halved(part, times - 1)]


def _documents(batch: MicroBatch, starts: list[int], first: int, last: int) -> MicroBatch:
    begin, end = starts[first], starts[last]
    within = (batch.target_positions >= begin) & (batch.target_positions < end)
    changes: dict[str, Any] = {
        "input_ids": batch.input_ids[:, begin:end],
        "position_ids": batch.position_ids[:, begin:end],
        "cu_seqlens": batch.cu_seqlens[first : last + 1] - begin,
        "target_positions": batch.target_positions[within] - begin,
        "targets": batch.targets[within],
        "lengths": batch.lengths[first:last],
        # Which of the positions are padding is not known here, and nothing in a step asks.
        "tokens": min(batch.tokens, end - begin),
    }
    return replace(batch, **changes)
