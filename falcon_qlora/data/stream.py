"""Documents one by one, from data that is never held as a whole."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from falcon_qlora.data.cursor import ROWS_TO_RECOGNISE, Mix, Reader, Shuffled, State, recognise_rows
from falcon_qlora.data.encode import Encoder, Status
from falcon_qlora.data.formats import resolve_template
from falcon_qlora.data.selection import checked_weights
from falcon_qlora.data.sources import find_source

_ROWS_AT_A_TIME = 64
_DROPPED = {
    Status.EMPTY: "rows_dropped_empty",
    Status.MASKED: "rows_dropped_masked",
    Status.OVERLONG: "rows_dropped_overlong",
    Status.MASKED_PIECE: "documents_dropped_masked",
}


def stream_documents(
    *,
    dataset_name: list[str],
    dataset_weights: list[float] | None = None,
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    columns: dict[str, str] | None = None,
    template: str = "auto",
    train_on: str = "answers",
    append_end_token: bool = True,
    overlong: str = "split",
    max_length: int,
    tokenizer: Any,
    seed: int = 0,
    epoch: int = 0,
    shuffle_buffer: int = 10_000,
    max_rows: int | None = None,
    counts: Counter[str] | None = None,
    state: State | None = None,
) -> DocumentStream:
    """The documents of one pass over the data, as they are read: the same for the same seed and epoch.

    Files and shards are read in another order every epoch, and rows are drawn from a buffer.

    Args:
        dataset_name, dataset_config, dataset_split, dataset_format, columns, template, train_on,
            append_end_token, overlong, max_length, tokenizer: as in `tokenize.prepare_corpora`.
        dataset_weights: in which proportion rows of several data sets are drawn. One that ends before the
            others have ended once starts again. Without weights they take turns, and one that ends leaves.
        seed: of the order.
        epoch: of the order, from 0.
        shuffle_buffer: rows to draw from; 1 leaves them in order.
        max_rows: end after so many rows.
        counts: gets `rows_read` and, by the names of `tokenize.Statistics`, what was dropped.
        state: of a stream with the same arguments: go on from there, without reading again what was read.

    Raises:
        UserError: for data that cannot be found; when it is read, for data that cannot be, or has no row.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        train_on=train_on,
        append_end_token=append_end_token,
        overlong=overlong,
        max_length=max_length,
    )
    encoder.check()
    weights = checked_weights(dataset_weights, dataset_name)
    # Of this seed and epoch alone, so that a pass can be repeated.
    order = random.Random(f"{seed} {epoch}")
    settings = {
        "dataset_format": dataset_format,
        "columns": dict(columns or {}),
        "template": template,
        "tokenizer": tokenizer,
    }
    sources = [find_source(name, config=dataset_config, split=dataset_split) for name in dataset_name]
    of_rows: State = state["shuffled"]["rows"] if state else {}
    of_readers = of_rows.get("readers") or [None] * len(sources)
    readers = [
        Reader(source, settings, order.random(), of_reader)
        for source, of_reader in zip(sources, of_readers, strict=True)
    ]
    of_buffer = random.Random(order.random())
    rows = Mix(readers, weights, order, most=max_rows, state=of_rows or None)
    shuffled = Shuffled(rows, shuffle_buffer, of_buffer, state["shuffled"] if state else None)
    waiting = state["waiting"] if state else []
    return DocumentStream(shuffled, encoder, Counter() if counts is None else counts, waiting)


class DocumentStream:
    """``{"input_ids": int32 [tokens], "mask": int8 [tokens]}`` of one document after another.

    Args:
        rows: what documents are made of.
        encoder: makes them, of some rows at a time.
        counts: gets what became of the rows.
        waiting: documents to begin with, as `state` has them.
    """

    def __init__(self, rows: Shuffled, encoder: Encoder, counts: Counter[str], waiting: list[Any]):
        self._rows = rows
        self._encoder = encoder
        self._counts = counts
        self._waiting = deque(document_of(each) for each in waiting)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        return self

    def __next__(self) -> dict[str, np.ndarray]:
        while not self._waiting:
            some = list(itertools.islice(self._rows, _ROWS_AT_A_TIME))
            if not some:
                raise StopIteration
            self._encode(some)
        return self._waiting.popleft()

    def state(self) -> Callable[[], State]:
        """Where the stream is now, in plain values that JSON keeps; made when it is called."""
        shuffled, waiting = self._rows.state(), list(self._waiting)
        return lambda: {"shuffled": shuffled(), "waiting": [plain_document(each) for each in waiting]}

    def _encode(self, rows: list[Any]) -> None:
        for documents in self._encoder.documents(rows):
            self._counts["rows_read"] += 1
            for document in documents:
                if document.status == Status.KEPT:
                    self._waiting.append({"input_ids": document.input_ids, "mask": document.mask})
                else:
                    self._counts[_DROPPED[document.status]] += 1


def plain_document(document: dict[str, np.ndarray]) -> list[list[int]]:
    """A stream's document as JSON keeps it."""
    return [document["input_ids"].tolist(), document["mask"].tolist()]


def document_of(kept: list[list[int]]) -> dict[str, np.ndarray]:
    """What `plain_document` was made of."""
    ids, mask = kept
    return {"input_ids": np.array(ids, dtype=np.int32), "mask": np.array(mask, dtype=np.int8)}


def recognise_stream(
    *,
    dataset_name: list[str],
    dataset_config: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    columns: dict[str, str] | None = None,
    template: str = "auto",
) -> tuple[str, str]:
    """The format and the template of the first data set's rows, by the columns of its first ones.

    Raises:
        UserError: if the data is empty, or its columns fit no format.
    """
    source = find_source(dataset_name[0], config=dataset_config, split=dataset_split)
    head = list(itertools.islice(source.read(), ROWS_TO_RECOGNISE))
    row_format = recognise_rows(head, dataset_format, columns or {}, source.name)[0]
    return row_format, resolve_template(template, row_format)
