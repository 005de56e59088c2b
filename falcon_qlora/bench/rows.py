"""The documents that are measured on: made up, or real rows laid out in two ways."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from falcon_qlora.bench.settings import Document
from falcon_qlora.data.packing import Plan


def made_up(count: int, length: int, vocabulary: int, *, seed: int) -> list[Document]:
    """`count` documents of `length` random tokens, every token a target."""
    ids = np.random.default_rng(seed).integers(0, vocabulary, (count, length))
    return [(row, np.ones(length, dtype=bool)) for row in ids]


def in_batches(documents: Sequence[Document], size: int) -> list[list[Document]]:
    """Batches of `size` documents, in order; a smaller one only where it is the only one."""
    batches = [list(documents[start : start + size]) for start in range(0, len(documents), size)]
    return [batch for batch in batches if len(batch) == size] or batches


def same_rows(
    corpus: Any, *, tokens: int, max_length: int, batches: int, seed: int
) -> tuple[list[list[Document]], list[list[Document]]]:
    """The same rows as packed and as padded micro batches of the same room.

    Args:
        corpus: tokenized documents.
        tokens: room of a micro batch.
        max_length: what a document is padded to at the most.
        batches: how many packed micro batches.
        seed: of the order.

    Returns:
        Micro batches of as many whole documents as `tokens` hold, and the same documents in the same order as
        micro batches of ``tokens / max_length`` documents.
    """
    sequences = tokens // max_length
    plan = Plan(
        lengths=corpus.lengths,
        fingerprint=corpus.fingerprint,
        seed=seed,
        global_batch=sequences,
        max_length=max_length,
    )
    packed = [_read(corpus, plan.documents(step)) for step in range(batches)]
    rows = [document for batch in packed for document in batch]
    padded = [rows[start : start + sequences] for start in range(0, len(rows), sequences)]
    return packed, padded


def _read(corpus: Any, indexes: np.ndarray) -> list[Document]:
    found = corpus.dataset.with_format("numpy", columns=["input_ids", "mask"])[indexes.tolist()]
    return list(zip(found["input_ids"], found["mask"], strict=True))
