"""Rows tokenized once into documents on disk, and the corpora that a run draws from them.

What is cached is one source's rows as documents, under a key of their content and of everything that decides
the tokens. Which of them are held out, and how often each is drawn, is chosen anew from the cached documents,
so that another seed, fraction or weight tokenizes nothing.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.documents import Documents, Reading
from falcon_qlora.data.origins import RowNames
from falcon_qlora.data.selection import checked_weights, draw, hold_out, is_fraction
from falcon_qlora.data.sources import find_source
from falcon_qlora.data.tokens import Change, Encoder, Status


@dataclass(frozen=True, kw_only=True)
class Statistics:
    """What became of the rows.

    `rows_*` count rows of the data, each once; `documents`, `tokens`, `target_tokens` and `longest` are of
    what one epoch draws, which weights may repeat.
    """

    rows_read: int
    rows_dropped_empty: int
    rows_dropped_masked: int
    rows_dropped_overlong: int
    rows_truncated: int
    rows_split: int
    rows_duplicate: int
    documents_dropped_masked: int
    documents: int
    tokens: int
    target_tokens: int
    longest: int

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class SourceUse:
    """How one source was read: the format recognised and the template that writes it.

    `rows_kept` are those of which something is left to train on; weights may draw more of them or less.
    """

    name: str
    format: str
    template: str
    rows_read: int
    rows_kept: int
    rows_drawn: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


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
    """

    dataset: datasets.Dataset
    lengths: np.ndarray
    target_counts: np.ndarray
    fingerprint: str
    statistics: Statistics
    names: RowNames
    sources: tuple[SourceUse, ...] = ()


def prepare_corpora(
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
    eval_split: str | None = None,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    seed: int = 0,
    num_proc: int | None = None,
    cache_dir: Path | None = None,
    max_rows: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Corpus, Corpus | None]:
    """Tokenize what was not tokenized before, and open the training corpus and the held-out one.

    Args:
        dataset_name: hub ids, files or folders.
        dataset_weights: in which proportion one epoch draws rows of them. An epoch has as many rows as
            without weights; rows of a source are repeated or left out as its share demands.
        dataset_config: configuration of hub data sets.
        dataset_split: split to train on.
        dataset_format: a key of `formats.FORMATS`, or ``"auto"``.
        columns: standard column name → its name in the data, for those that differ.
        template: a name of `templates.TEMPLATES`, a ``.jinja`` file, or ``"auto"``.
        train_on: ``"answers"`` or ``"all"``.
        append_end_token: whether the end token follows every answer.
        overlong: ``"split"``, ``"truncate"`` or ``"drop"``, for what is longer than `max_length`.
        max_length: tokens.
        eval_split: a fraction of the rows, ``split:NAME`` of the same data sets, or a hub id, file or folder;
            None holds nothing out.
        tokenizer: a fast tokenizer.
        tokenizer_fingerprint: identifies the tokenizer.
        seed: of the held-out rows and of the draw by weights.
        num_proc: processes that tokenize; None: chosen by rows and cores.
        cache_dir: of the tokenized documents; None: the user's.
        max_rows: read only so many rows, evenly from the data sets.
        progress: called with a line about what is being done, where it takes time.

    Returns:
        The training corpus, and the held-out one where `eval_split` asks for it.

    Raises:
        UserError: for data that cannot be found or read, or that leaves nothing to train on.
    """
    encoder = Encoder(
        tokenizer=tokenizer,
        train_on=train_on,
        append_end_token=append_end_token,
        overlong=overlong,
        max_length=max_length,
    )
    encoder.check()
    work = Reading(
        encoder=encoder,
        tokenizer_fingerprint=tokenizer_fingerprint,
        dataset_format=dataset_format,
        columns=dict(columns or {}),
        template=template,
        num_proc=num_proc,
        cache_dir=cache_dir,
        progress=progress or (lambda message: None),
    )
    limits = _shares(max_rows, len(dataset_name))
    sources = [find_source(name, config=dataset_config, split=dataset_split) for name in dataset_name]
    documents = _joined(
        [work.documents(source, limit) for source, limit in zip(sources, limits, strict=True)]
    )
    weights = checked_weights(dataset_weights, dataset_name)
    everything = np.ones(len(documents.row), bool)
    if eval_split is None:
        return _corpus(documents, everything, weights, seed), None
    if is_fraction(eval_split):
        held_out = hold_out(documents.status == Status.KEPT, documents.content, float(eval_split), seed)
        return _corpus(documents, ~held_out, weights, seed), _corpus(documents, held_out, None, seed)
    if eval_split.startswith("split:"):
        split = eval_split.removeprefix("split:")
        others = [find_source(name, config=dataset_config, split=split) for name in dataset_name]
    else:
        is_file = Path(eval_split).expanduser().is_file()  # which has no splits
        others = [find_source(eval_split, config=dataset_config, split="train" if is_file else dataset_split)]
    train = _corpus(documents, everything, weights, seed)
    documents = _joined([work.documents(source, None) for source in others])
    return train, _corpus(documents, np.ones(len(documents.row), bool), None, seed)


@dataclass(frozen=True, kw_only=True)
class _Joined:
    """The documents of all sources one after another; arrays are ``[documents]``.

    Attributes:
        parts: of each source.
        source: the index of the source.
        row: of the source row, counted through all sources.
        status, change, targets, content, lengths: as in `Documents`.
    """

    parts: list[Documents]
    source: np.ndarray
    row: np.ndarray
    status: np.ndarray
    change: np.ndarray
    targets: np.ndarray
    content: np.ndarray
    lengths: np.ndarray

    def rows(self, chosen: np.ndarray) -> int:
        """How many rows the chosen documents, a mask or indexes, are of."""
        return len(np.unique(self.row[chosen]))


def _joined(parts: list[Documents]) -> _Joined:
    first_rows = np.cumsum([0, *[part.rows for part in parts]])
    names = ("status", "change", "targets", "content", "lengths")
    return _Joined(
        parts=parts,
        source=np.repeat(np.arange(len(parts)), [len(part.row) for part in parts]),
        row=np.concatenate([part.row + first for part, first in zip(parts, first_rows, strict=False)]),
        **{name: np.concatenate([getattr(part, name) for part in parts]) for name in names},
    )


def _corpus(documents: _Joined, chosen: np.ndarray, weights: list[float] | None, seed: int) -> Corpus:
    """A corpus of the chosen documents.

    Args:
        documents: of all sources.
        chosen: bool ``[documents]``; a row is chosen with all its documents or not at all.
        weights: as `prepare_corpora` takes them.
        seed: of the draw.
    """
    kept = np.flatnonzero(chosen & (documents.status == Status.KEPT))
    drawn = kept[draw(documents.source[kept], documents.row[kept], weights, seed)]
    statistics = _statistics(documents, chosen, drawn)
    if len(drawn) == 0:
        raise UserError(_nothing_left(documents.parts, statistics))
    digest = hashlib.sha256()
    first = 0
    for index, part in enumerate(documents.parts):
        of_part = drawn[documents.source[drawn] == index] - first
        digest.update(part.fingerprint.encode() + of_part.tobytes())
        first += len(part.row)
    fingerprint = digest.hexdigest()
    return Corpus(
        dataset=_dataset(documents, drawn, fingerprint),
        lengths=documents.lengths[drawn],
        target_counts=documents.targets[drawn],
        fingerprint=fingerprint,
        statistics=statistics,
        names=RowNames(
            [name for part in documents.parts for name in part.source.parts()],
            [count for part in documents.parts for count in part.rows_of_parts],
        ),
        sources=_uses(documents, chosen, kept, drawn),
    )


def _dataset(documents: _Joined, drawn: np.ndarray, fingerprint: str) -> datasets.Dataset:
    tables, first = [], 0
    for part in documents.parts:
        table = part.dataset
        if first:
            rows = documents.row[first : first + len(part.row)]
            table = table.remove_columns("row").add_column("row", rows, new_fingerprint=part.fingerprint)
        tables.append(table)
        first += len(part.row)
    whole = datasets.concatenate_datasets(tables)
    if len(drawn) == len(whole) and (np.diff(drawn) == 1).all():
        return whole
    return whole.select(drawn, new_fingerprint=fingerprint[:32])


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
        )
        for index, part in enumerate(documents.parts)
    )


def _statistics(documents: _Joined, chosen: np.ndarray, drawn: np.ndarray) -> Statistics:
    status, change = documents.status, documents.change
    kept = chosen & (status == Status.KEPT)
    # One entry a row, the first of its documents; rows without an answer are no duplicates of each other.
    first = np.diff(documents.row, prepend=-1) > 0
    contents = documents.content[chosen & first & (documents.content != 0)]
    return Statistics(
        rows_read=documents.rows(chosen),
        rows_dropped_empty=documents.rows(chosen & (status == Status.EMPTY)),
        rows_dropped_masked=documents.rows(chosen & (status == Status.MASKED)),
        rows_dropped_overlong=documents.rows(chosen & (status == Status.OVERLONG)),
        rows_truncated=documents.rows(kept & (change == Change.TRUNCATED)),
        rows_split=documents.rows(kept & (change == Change.SPLIT)),
        rows_duplicate=len(contents) - len(np.unique(contents)),
        documents_dropped_masked=int((chosen & (status == Status.MASKED_PIECE)).sum()),
        documents=len(drawn),
        tokens=int(documents.lengths[drawn].sum()),
        target_tokens=int(documents.targets[drawn].sum()),
        longest=int(documents.lengths[drawn].max(initial=0)),
    )


def _nothing_left(parts: list[Documents], statistics: Statistics) -> str:
    names = ", ".join(part.source.name for part in parts)
    reasons = [
        (statistics.rows_dropped_empty, "have an empty answer"),
        (statistics.rows_dropped_masked, "have no answer token within --max_length"),
        (statistics.rows_dropped_overlong, "are longer than --max_length and --overlong is drop"),
    ]
    told = "; ".join(f"{count:,} {why}" for count, why in reasons if count)
    formats = ", ".join(sorted({f"{part.format} with template {part.template}" for part in parts}))
    return (
        f"{names}: nothing is left to train on. Of {statistics.rows_read:,} rows (read as {formats}) {told}. "
        "`falcon-qlora data` with the same flags shows what the model would see"
    )


def _shares(max_rows: int | None, count: int) -> list[int | None]:
    if max_rows is None:
        return [None] * count
    if max_rows < 1:
        raise UserError(f"--max_rows {max_rows}: must be at least 1")
    return [max(max_rows // count + (index < max_rows % count), 1) for index in range(count)]
