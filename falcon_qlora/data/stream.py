"""Documents one by one, from data that is never held as a whole."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np

from falcon_qlora.data.documents import load_template
from falcon_qlora.data.encode import Encoder, Status
from falcon_qlora.data.formats import recognise, renamed_columns, render, resolve_template
from falcon_qlora.data.selection import checked_weights
from falcon_qlora.data.sources import Source, find_source
from falcon_qlora.data.templates import Segment
from falcon_qlora.errors import UserError

_ROWS_AT_A_TIME = 64
_ROWS_TO_RECOGNISE = 100
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
) -> Iterator[dict[str, np.ndarray]]:
    """Yield the documents of one pass over the data, as they are read: the same for the same seed and epoch.

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

    Yields:
        ``{"input_ids": int32 [tokens], "mask": int8 [tokens]}``.

    Raises:
        UserError: for data that cannot be found or read, or has no row.
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
    rows = _mix([_Reader(source, settings, order.random()) for source in sources], weights, order)
    rows = itertools.islice(rows, max_rows)
    counts = Counter() if counts is None else counts
    shuffled = _shuffle(rows, shuffle_buffer, random.Random(order.random()))
    while some := list(itertools.islice(shuffled, _ROWS_AT_A_TIME)):
        for documents in encoder.documents(some):
            counts["rows_read"] += 1
            for document in documents:
                if document.status == Status.KEPT:
                    yield {"input_ids": document.input_ids, "mask": document.mask}
                else:
                    counts[_DROPPED[document.status]] += 1


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
    head = list(itertools.islice(source.rows(), _ROWS_TO_RECOGNISE))
    row_format = _recognise_rows(head, dataset_format, columns or {}, source.name)[0]
    return row_format, resolve_template(template, row_format)


def _recognise_rows(
    head: list[tuple[str, Any]], dataset_format: str, columns: dict[str, str], name: str
) -> tuple[str, dict[str, str]]:
    """The format of rows, and their renamed columns."""
    if not head:
        raise UserError(f"{name}: the data is empty, there is no row in it")
    found = {column for _, row in head for column in row}
    renamed = renamed_columns(found, columns, name)
    return recognise(found, columns=renamed, dataset_format=dataset_format, source=name), renamed


class _Reader:
    """One source's rows, rendered; it can start again where they end.

    Args:
        source: whose rows.
        settings: `dataset_format`, `columns`, `template` and `tokenizer` as `stream_documents` takes them.
        seed: of the order of the files.
    """

    def __init__(self, source: Source, settings: dict[str, Any], seed: float):
        self._source = source
        self._settings = settings
        self._order = random.Random(seed)
        self._rows = self._read()
        self.ended = False

    def next(self) -> list[Segment] | None:
        """The next row, or None at the end."""
        row = next(self._rows, None)
        self.ended = self.ended or row is None
        return row

    def restart(self) -> None:
        self._rows = self._read()

    def _read(self) -> Iterator[list[Segment]]:
        rows = self._source.rows(shuffle_files=self._order)
        head = list(itertools.islice(rows, _ROWS_TO_RECOGNISE))
        row_format, columns = _recognise_rows(
            head, self._settings["dataset_format"], self._settings["columns"], self._source.name
        )
        template = load_template(self._settings["template"], row_format, self._settings["tokenizer"])
        for place, row in itertools.chain(head, rows):
            yield render(row, row_format, template, columns=columns, place=place)


def _mix(
    readers: list[_Reader], weights: list[float] | None, order: random.Random
) -> Iterator[list[Segment]]:
    if weights is None:
        waiting = list(readers)
        while waiting:
            for reader in list(waiting):
                row = reader.next()
                if row is None:
                    waiting.remove(reader)
                else:
                    yield row
        return
    while True:
        reader = order.choices(readers, weights)[0]
        row = reader.next()
        if row is None:
            if all(each.ended for each in readers):
                return
            reader.restart()
        else:
            yield row


def _shuffle(rows: Iterator[list[Segment]], size: int, order: random.Random) -> Iterator[list[Segment]]:
    buffer = list(itertools.islice(rows, max(size, 1)))
    if size <= 1:
        yield from itertools.chain(buffer, rows)
        return
    for row in rows:
        place = order.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = row
    order.shuffle(buffer)
    yield from buffer
