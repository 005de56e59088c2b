"""Tokenize rows once into documents on disk, and make the corpora that a run draws from them.

The cache holds one source's rows as documents, under a key of their content and everything that decides the
tokens. Which documents are held out, and how often each is drawn, is chosen anew from the cache, so that
another seed, fraction or weight does not tokenize again.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.account import Account, nothing_left, told_dropped
from falcon_qlora.data.documents import Documents, Tokenizing
from falcon_qlora.data.formats import read_as
from falcon_qlora.data.origins import RowNames
from falcon_qlora.data.selection import draw, hold_out, is_fraction
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.tokens import COUNTED, Change, Status


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What became of the rows.

    `rows_*` count each row of the data once. `documents`, `tokens`, `target_tokens` and `longest` describe
    what the first epoch draws, in which weights may repeat rows. Later epochs draw as many rows.
    `rows_trained_too` counts the rows of named held-out data that are also in the training data.
    """

    rows_read: int
    rows_dropped_empty: int
    rows_dropped_missing: int
    rows_dropped_masked: int
    rows_dropped_cut: int
    rows_dropped_overlong: int
    rows_truncated: int
    rows_split: int
    rows_duplicate: int
    documents_dropped_masked: int
    documents: int
    tokens: int
    target_tokens: int
    longest: int
    rows_trained_too: int = 0


@dataclass(frozen=True)
class SourceUse:
    """How one source was read: its format and the template that writes it.

    `rows_kept` counts rows with something left to train on; weights may draw more or fewer. `columns` has
    the renamed ones: standard name → name in the data. `notes` are `Source.notes`. `account` is
    `account.Account.plain` of all its rows, also those of which a fraction is held out. `train_on` is the
    setting.
    """

    name: str
    format: str
    template: str
    rows_read: int
    rows_kept: int
    rows_drawn: int
    columns: dict[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    account: dict[str, dict[str, Any]] = field(default_factory=dict)
    train_on: str = "answers"

    def read_as(self) -> str:
        """The format, its renamed columns, and the template, for a message."""
        return read_as(self.format, self.columns, self.template)

    def told(self) -> list[str]:
        """What to tell the user about its rows: what was not read, missing or altered."""
        return Account.from_plain(self.account).told(self.template, self.train_on)

    def drawn(self) -> str:
        """How many of its rows an epoch draws, as text; empty if as many as are kept."""
        return f"{self.rows_drawn:,} drawn each epoch" if self.rows_drawn != self.rows_kept else ""


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Tokenized documents, memory-mapped.

    Attributes:
        dataset: columns `input_ids` (int32 ``[tokens]``), `mask` (int8 ``[tokens]``, 1: the token is a
            target) and `row` (the source row's index, counted through all sources).
        lengths: int64 ``[documents]``, tokens.
        target_counts: int64 ``[documents]``, target tokens; the first token of a document is never one.
        fingerprint: hexadecimal hash of the documents in their order.
        statistics: what became of the rows.
        names: of the rows, by `row`.
        sources: how each source was read.
        draw: returns the documents of an epoch (from 0) as often as weights draw them; None: each once.
    """

    dataset: datasets.Dataset
    lengths: np.ndarray
    target_counts: np.ndarray
    fingerprint: str
    statistics: Statistics
    names: RowNames
    sources: tuple[SourceUse, ...] = ()
    draw: Callable[[int], np.ndarray] | None = None

    def dropped(self) -> list[str]:
        """How many rows were dropped, one text for each cause."""
        return told_dropped(Account.from_plain(use.account) for use in self.sources)


def prepare_corpora(
    *,
    eval_split: str | None = None,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    max_rows: int | None = None,
    progress: Callable[[str], None] | None = None,
    use: str = "train on",
    **rows: Any,
) -> tuple[Corpus, Corpus | None]:
    """Tokenize what is not yet cached, and open the training corpus and the held-out one.

    Weights decide in which proportion an epoch draws rows of the data sets. They do not change the number of
    rows in an epoch: a source's rows are repeated or left out to match its share, chosen anew every epoch.

    Args:
        eval_split: a fraction of the rows, ``split:NAME`` of the same data sets, or a hub id, file or folder;
            None holds nothing out.
        tokenizer: a fast tokenizer.
        tokenizer_fingerprint: identifies the tokenizer.
        seed: of the held-out rows and of the draw by weights.
        num_proc: threads that tokenize; None: one per core.
        cache_dir: of the tokenized documents; None: the user's.
        max_rows: as in `RowSettings.limits`; held-out data that is named is read whole.
        progress: called with a line about each piece of work that takes time.
        use: what the rows are for, for an error.
        rows: the arguments of `RowSettings`, which decide what documents the rows become.

    Returns:
        The training corpus, and the held-out one if `eval_split` asks for it.

    Raises:
        UserError: for data that cannot be found or read, or of which no row is left.
    """
    settings = RowSettings(**rows)
    work = Tokenizing(
        settings=settings,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint,
        num_proc=num_proc,
        cache_dir=cache_dir,
        progress=progress or (lambda message: None),
    )
    parts = list(map(work.documents, settings.sources(), settings.limits(max_rows)))
    settings.check_used(part.columns for part in parts)
    documents = _joined(parts)
    everything = np.ones(len(documents.row), bool)
    weights = settings.dataset_weights
    if eval_split is not None and is_fraction(eval_split):
        try:
            held_out = hold_out(documents.status == Status.KEPT, documents.content, float(eval_split), seed)
        except UserError as error:
            dropped = told_dropped(part.account for part in parts)
            raise UserError(*error.lines, *(f"  dropped: {each}" for each in dropped)) from None
        train, part = (_corpus(documents, ~held_out, weights, seed), _corpus(documents, held_out, None, seed))
        # What became of the rows is told of the training corpus, to which every dropped row belongs.
        return train, replace(part, sources=tuple(replace(use, account={}) for use in part.sources))
    train = _corpus(documents, everything, weights, seed, use=use)
    if eval_split is None:
        return train, None
    trained = np.unique(documents.content[documents.status == Status.KEPT])
    documents, named = _named(work, eval_split)
    both = documents.rows((documents.status == Status.KEPT) & np.isin(documents.content, trained))
    return train, replace(named, statistics=replace(named.statistics, rows_trained_too=both))


def prepare_held_out(
    eval_split: str,
    *,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    **rows: Any,
) -> Corpus:
    """As the second of `prepare_corpora`, for held-out data that is named; the training data is not read."""
    work = Tokenizing(
        settings=RowSettings(**rows),
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint,
        num_proc=num_proc,
        cache_dir=cache_dir,
        progress=lambda message: None,
    )
    return _named(work, eval_split)[1]


def _named(work: Tokenizing, eval_split: str) -> tuple[_Joined, Corpus]:
    work = replace(work, settings=replace(work.settings, held_out=True))
    sources = work.settings.held_out_sources(eval_split)
    documents = _joined([work.documents(source, None) for source in sources])
    everything = np.ones(len(documents.row), bool)
    return documents, _corpus(documents, everything, None, 0, eval_split=eval_split)


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """The documents of all sources one after another; arrays are ``[documents]``.

    Attributes:
        parts: the documents of each source.
        dataset: all documents.
        source: the index of each document's source.
        row: the index of its row, counted through all sources.
        lengths: its tokens.
        status, change, targets, content: as in `Documents.dataset`.
    """

    parts: list[Documents]
    dataset: datasets.Dataset
    source: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    status: np.ndarray
    change: np.ndarray
    targets: np.ndarray
    content: np.ndarray

    def rows(self, chosen: np.ndarray) -> int:
        """How many rows the chosen documents (a mask or indexes) come from."""
        return len(np.unique(self.row[chosen]))


def _joined(parts: list[Documents]) -> _Joined:
    dataset = datasets.concatenate_datasets([part.dataset for part in parts])

    def column(name: str) -> np.ndarray:
        return np.asarray(dataset.data.column(name).to_numpy())

    source = np.repeat(np.arange(len(parts)), [len(part.dataset) for part in parts])
    first_rows = np.cumsum([0, *[sum(part.rows_of_parts) for part in parts]])
    return _Joined(
        parts=parts,
        dataset=dataset,
        source=source,
        row=column("row") + first_rows[source],
        lengths=pc.list_value_length(dataset.data.column("input_ids")).to_numpy().astype(np.int64),
        **{name: column(name) for name in ("status", "change", "targets", "content")},
    )


def _corpus(
    documents: _Joined,
    chosen: np.ndarray,
    weights: list[float] | None,
    seed: int,
    *,
    use: str = "train on",
    eval_split: str | None = None,
) -> Corpus:
    """A corpus of the chosen documents.

    Args:
        documents: of all sources.
        chosen: bool ``[documents]``; a row's documents are all chosen or none.
        weights: as in `RowSettings.dataset_weights`.
        seed: of the draw.
        use, eval_split: see `nothing_left`.

    Raises:
        UserError: if no row is left.
    """
    kept = np.flatnonzero(chosen & (documents.status == Status.KEPT))
    drawn, of_epoch = kept, None
    if weights is not None:
        of_epoch = functools.partial(draw, documents.source[kept], documents.row[kept], weights, seed)
        drawn = kept[of_epoch(0)]
    names = RowNames(
        [name for part in documents.parts for name in part.source.parts()],
        [count for part in documents.parts for count in part.rows_of_parts],
    )
    statistics = _statistics(documents, chosen, drawn)
    uses = _uses(documents, chosen, kept, drawn)
    if len(drawn) == 0:
        raise nothing_left(
            [use.name for use in uses],
            "; ".join(dict.fromkeys(use.read_as() for use in uses)),
            statistics.rows_read,
            [part.account for part in documents.parts],
            [line for use in uses for line in use.told()],
            use=use,
            eval_split=eval_split,
        )
    digest = hashlib.sha256()
    first = 0
    for index, part in enumerate(documents.parts):
        digest.update(part.fingerprint.encode())
        for some in (drawn,) if weights is None else (drawn, kept):
            digest.update((some[documents.source[some] == index] - first).tobytes())
        first += len(part.dataset)
    fingerprint = digest.hexdigest()
    return Corpus(
        dataset=_dataset(documents, kept, fingerprint),
        lengths=documents.lengths[kept],
        target_counts=documents.targets[kept],
        fingerprint=fingerprint,
        statistics=statistics,
        names=names,
        sources=uses,
        draw=of_epoch,
    )


def _dataset(documents: _Joined, kept: np.ndarray, fingerprint: str) -> datasets.Dataset:
    whole = documents.dataset.select_columns(["input_ids", "mask", "row"])
    if len(documents.parts) > 1:
        whole = whole.remove_columns("row").add_column(
            "row", documents.row, new_fingerprint=documents.dataset._fingerprint
        )
    if len(kept) == len(whole):
        return whole
    return whole.select(kept, new_fingerprint=fingerprint[:32])


def _uses(
    documents: _Joined, chosen: np.ndarray, kept: np.ndarray, drawn: np.ndarray
) -> tuple[SourceUse, ...]:
    # A row's first document is drawn as often as the row.
    firsts = kept[np.diff(documents.row[kept], prepend=-1) > 0]
    rows_drawn = drawn[np.isin(drawn, firsts)]
    return tuple(
        SourceUse(
            part.source.name,
            part.format,
            part.template,
            rows_read=documents.rows(chosen & (documents.source == index)),
            rows_kept=documents.rows(kept[documents.source[kept] == index]),
            rows_drawn=int((documents.source[rows_drawn] == index).sum()),
            columns=part.columns,
            notes=tuple(part.source.notes()),
            account=part.account.plain(),
            train_on=part.train_on,
        )
        for index, part in enumerate(documents.parts)
    )


def _statistics(documents: _Joined, chosen: np.ndarray, drawn: np.ndarray) -> Statistics:
    status, change = documents.status, documents.change
    kept = chosen & (status == Status.KEPT)
    # One entry per row, its first document. Rows without an answer do not count as duplicates of each other.
    first = np.diff(documents.row, prepend=-1) > 0
    contents = documents.content[chosen & first & (documents.content != 0)]
    dropped = {name: chosen & (status == each) for each, name in COUNTED.items()}
    return Statistics(
        rows_read=documents.rows(chosen),
        **{name: documents.rows(some) for name, some in dropped.items()},
        rows_truncated=documents.rows(kept & (change == Change.TRUNCATED)),
        rows_split=documents.rows(kept & (change == Change.SPLIT)),
        rows_duplicate=len(contents) - len(np.unique(contents)),
        documents_dropped_masked=int((chosen & (status == Status.MASKED_PIECE)).sum()),
        documents=len(drawn),
        tokens=int(documents.lengths[drawn].sum()),
        target_tokens=int(documents.targets[drawn].sum()),
        longest=int(documents.lengths[drawn].max(initial=0)),
    )
