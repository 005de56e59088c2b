"""Stream documents one by one, without holding the data as a whole."""

from __future__ import annotations

import itertools
import random
from collections import Counter, deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from falcon_qlora.data.account import Account
from falcon_qlora.data.cursor import (
    Mix,
    Reader,
    Rendered,
    Shuffled,
    State,
    recognise_first,
)
from falcon_qlora.data.formats import resolve_template
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import Source
from falcon_qlora.data.tokens import Encoder, Status

_ROWS_AT_A_TIME = 64


def stream_documents(
    *,
    tokenizer: Any,
    seed: int = 0,
    epoch: int = 0,
    shuffle_buffer: int = 10_000,
    max_rows: int | None = None,
    account: Account | None = None,
    state: State | None = None,
    **rows: Any,
) -> DocumentStream:
    """Stream the documents of one pass over the data: the same for the same seed and epoch.

    Files and shards are read in another order every epoch, and rows are drawn from a shuffle buffer. Several
    data sets with weights are drawn in that proportion, and one that ends starts again until all have ended
    once. Without weights they take turns, and one that ends drops out.

    Args:
        tokenizer: a fast tokenizer.
        seed: of the order.
        epoch: of the order, from 0.
        shuffle_buffer: rows to draw from; 1 keeps the order.
        max_rows: end after this many rows.
        account: counts what was not read, was dropped or was altered.
        state: of a stream with the same arguments; resume there, without rereading earlier rows.
        rows: the arguments of `RowSettings`, which decide what documents the rows become.

    Raises:
        UserError: for data that cannot be found. While streaming, for data that cannot be read or has no row.
    """
    settings = RowSettings(**rows)
    encoder = settings.encoder(tokenizer)
    settings.limits(max_rows)  # refuses too few
    # Depends on the seed and epoch alone, so that a pass can be repeated.
    order = random.Random(f"{seed} {epoch}")
    sources = settings.sources()
    of_rows: State = state["shuffled"]["rows"] if state else {}
    of_readers = of_rows.get("readers") or [None] * len(sources)
    first_parts = list(itertools.accumulate((len(source.parts()) for source in sources), initial=0))[:-1]
    account = Account() if account is None else account
    readers = [
        Reader(source, settings, tokenizer, order.random(), first_part, account, of_reader)
        for source, first_part, of_reader in zip(sources, first_parts, of_readers, strict=True)
    ]
    of_buffer = random.Random(order.random())
    mix = Mix(readers, settings.dataset_weights, order, max_rows, of_rows or None)
    shuffled = Shuffled(mix, shuffle_buffer, of_buffer, state["shuffled"] if state else None)
    waiting = state["waiting"] if state else []
    return DocumentStream(shuffled, encoder, waiting, account)


class DocumentStream(Iterator[dict[str, Any]]):
    """One document after another.

    Each is ``{"input_ids": int32 [tokens], "mask": int8 [tokens], "origin": Origin}``.

    Args:
        rows: that documents are made of.
        encoder: makes documents of several rows at a time.
        waiting: documents to begin with, as in `state`.
        account: of the rows.
    """

    def __init__(self, rows: Shuffled, encoder: Encoder, waiting: list[Any], account: Account):
        self._rows = rows
        self._encoder = encoder
        self._account = account
        self._waiting = deque(document_of(each) for each in waiting)

    def __next__(self) -> dict[str, Any]:
        while not self._waiting:
            some = list(itertools.islice(self._rows, _ROWS_AT_A_TIME))
            if not some:
                raise StopIteration
            self._encode(some)
        return self._waiting.popleft()

    def state(self) -> Callable[[], State]:
        """A function that returns where the stream is now, as values for JSON."""
        shuffled, waiting = self._rows.state(), list(self._waiting)
        return lambda: {"shuffled": shuffled(), "waiting": [plain_document(each) for each in waiting]}

    def _encode(self, rows: list[Rendered]) -> None:
        origins, places, segments = zip(*rows, strict=True)
        encoded = self._encoder.documents(segments, self._account, places)
        self._account.counts["rows_read"] += len(rows) - places.count(None)
        for origin, documents in zip(origins, encoded, strict=True):
            for document in documents:
                if document.status == Status.KEPT:
                    kept = {"input_ids": document.input_ids, "mask": document.mask, "origin": origin}
                    self._waiting.append(kept)


def plain_document(document: dict[str, Any]) -> list[list[int]]:
    """A stream's document as values for JSON."""
    return [document["input_ids"].tolist(), document["mask"].tolist(), list(document["origin"])]


def document_of(kept: list[list[int]]) -> dict[str, Any]:
    """The inverse of `plain_document`."""
    ids, mask, (part, number) = kept
    return {
        "input_ids": np.array(ids, dtype=np.int32),
        "mask": np.array(mask, dtype=np.int8),
        "origin": (part, number),
    }


def recognise_stream(settings: RowSettings, tokenizer: Any) -> tuple[str, str]:
    """The format and the template of the first data set, recognised by the columns of its first rows.

    Raises:
        UserError: if a data set is empty, its columns fit no format, or a flag names a column of none.
    """
    found = [recognise_first(settings, source) for source in settings.sources()]
    settings.check_used(renamed for _, renamed in found)
    return found[0][0], resolve_template(settings.template, found[0][0], tokenizer)


def recognise_source(
    settings: RowSettings, source: Source, tokenizer: Any
) -> tuple[str, dict[str, str], str]:
    """As `recognise_stream`, for any data set, with its renamed columns between."""
    row_format, columns = recognise_first(settings, source)
    return row_format, columns, resolve_template(settings.template, row_format, tokenizer)


def changed_source(before: list[State], now: list[State]) -> str | None:
    """What differs between two results of `Source.describe`, with the file; None if nothing does.

    The folders and names of files do not matter.
    """
    if len(before) != len(now):
        names = [", ".join(each["name"] for each in sources) for sources in (now, before)]
        return f"{names[0]} instead of {names[1]}"
    for old, new in zip(before, now, strict=True):
        if ("commit" in old) != ("commit" in new):
            return f"{new['name']} instead of {old['name']}"
        if "commit" in new:
            if (old["name"], old["commit"]) != (new["name"], new["commit"]):
                return f"{new['name']} at commit {new['commit']} instead of {old['name']} at {old['commit']}"
            continue
        if len(old["files"]) != len(new["files"]):
            return _files_more_or_less(new["name"], old["files"], new["files"])
        pairs = list(zip(old["files"], new["files"], strict=True))
        # Sizes first: if a source is now hashed in the other way, a changed size is the cause.
        for key, told in _TOLD.items():
            for was, is_now in pairs:
                if was.get(key) != is_now.get(key):
                    return f"{is_now['file']} {told.format(was=was.get(key), now=is_now.get(key))}"
    return None


_TOLD = {
    "bytes": "has {now:,} bytes instead of {was:,}",
    "sha256": "is another file or has been altered (its checksum differs)",
    "sha256_of_ends": "is another file or has been altered (the checksum of its ends differs)",
    "modified": "was modified {now} instead of {was}; if it is the same, set that back (touch -d {was} FILE)",
}


def _files_more_or_less(name: str, before: list[State], now: list[State]) -> str:
    old, new = ([Path(each["file"]).name for each in files] for files in (before, now))
    added, gone = Counter(new) - Counter(old), Counter(old) - Counter(new)
    told = [f"no longer holds {', '.join(sorted(gone))}"] if gone else []
    told += [f"holds {', '.join(sorted(added))} too"] if added else []
    return f"{name} {' and '.join(told)}"
