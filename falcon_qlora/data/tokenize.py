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
from falcon_qlora.data.encode import Change, Encoder, Status
from falcon_qlora.data.origins import RowNames
from falcon_qlora.data.selection import checked_weights, draw, hold_out, is_fraction
from falcon_qlora.data.sources import find_source


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
    parts = [work.documents(source, limit) for source, limit in zip(sources, limits, strict=True)]
    weights = checked_weights(dataset_weights, dataset_name)
    if eval_split is None:
        return _corpus(parts, [part.row >= 0 for part in parts], weights, seed), None
    if is_fraction(eval_split):
        kept = [(part.status == Status.KEPT, part.content) for part in parts]
        held_out = hold_out(kept, float(eval_split), seed)
        train = _corpus(parts, [~each for each in held_out], weights, seed)
        return train, _corpus(parts, held_out, None, seed)
    if eval_split.startswith("split:"):
        split = eval_split.removeprefix("split:")
        others = [find_source(name, config=dataset_config, split=split) for name in dataset_name]
    else:
        is_file = Path(eval_split).expanduser().is_file()  # which has no splits
        others = [find_source(eval_split, config=dataset_config, split="train" if is_file else dataset_split)]
    train = _corpus(parts, [part.row >= 0 for part in parts], weights, seed)
    parts = [work.documents(source, None) for source in others]
    return train, _corpus(parts, [part.row >= 0 for part in parts], None, seed)


def _corpus(
    parts: list[Documents], chosen: list[np.ndarray], weights: list[float] | None, seed: int
) -> Corpus:
    """A corpus of the chosen documents of every part.

    Args:
        parts: one a source.
        chosen: bool ``[documents]`` for each part; a row is chosen with all its documents or not at all.
        weights: as `prepare_corpora` takes them, one a part.
        seed: of the draw.
    """
    kept = [
        np.flatnonzero(pick & (part.status == Status.KEPT)) for part, pick in zip(parts, chosen, strict=True)
    ]
    rows = [part.row[documents] for part, documents in zip(parts, kept, strict=True)]
    drawn = [documents[order] for documents, order in zip(kept, draw(rows, weights, seed), strict=True)]
    lengths = np.concatenate([part.lengths[each] for part, each in zip(parts, drawn, strict=True)])
    targets = np.concatenate([part.targets[each] for part, each in zip(parts, drawn, strict=True)])
    statistics = _statistics(parts, chosen, lengths, targets)
    if len(lengths) == 0:
        raise UserError(_nothing_left(parts, statistics))
    digest = hashlib.sha256()
    for part, each in zip(parts, drawn, strict=True):
        digest.update(part.fingerprint.encode() + each.tobytes())
    fingerprint = digest.hexdigest()
    uses = tuple(
        SourceUse(
            part.source.name,
            part.format,
            part.template,
            rows_read=_count_rows(part.row[pick]),
            rows_kept=_count_rows(part.row[documents]),
            # A row's first document is drawn as often as the row.
            rows_drawn=int(np.isin(each, _first_documents(part.row, each)).sum()),
        )
        for part, pick, documents, each in zip(parts, chosen, kept, drawn, strict=True)
    )
    return Corpus(
        dataset=_dataset(parts, drawn, fingerprint),
        lengths=lengths,
        target_counts=targets,
        fingerprint=fingerprint,
        statistics=statistics,
        names=RowNames(
            [name for part in parts for name in part.source.parts()],
            [count for part in parts for count in part.rows_of_parts],
        ),
        sources=uses,
    )


def _dataset(parts: list[Documents], drawn: list[np.ndarray], fingerprint: str) -> datasets.Dataset:
    documents = np.cumsum([0, *[len(part.dataset) for part in parts]])
    rows = np.cumsum([0, *[part.rows for part in parts]])
    tables = []
    for part, offset in zip(parts, rows, strict=False):
        table = part.dataset
        if offset:
            table = table.remove_columns("row").add_column(
                "row", part.row + offset, new_fingerprint=part.fingerprint
            )
        tables.append(table)
    whole = datasets.concatenate_datasets(tables)
    indices = np.concatenate([each + offset for each, offset in zip(drawn, documents, strict=False)])
    if len(indices) == len(whole) and (np.diff(indices) == 1).all():
        return whole
    return whole.select(indices, new_fingerprint=fingerprint[:32])


def _statistics(
    parts: list[Documents], chosen: list[np.ndarray], lengths: np.ndarray, targets: np.ndarray
) -> Statistics:
    def count(of: Callable[[Documents], np.ndarray]) -> int:
        return sum(_count_rows(part.row[pick & of(part)]) for part, pick in zip(parts, chosen, strict=True))

    # One entry a row, the first of its documents; rows without an answer are no duplicates of each other.
    contents = [
        part.content[pick & (np.diff(part.row, prepend=-1) > 0) & (part.content != 0)]
        for part, pick in zip(parts, chosen, strict=True)
    ]
    all_contents = np.concatenate(contents)
    return Statistics(
        rows_read=count(lambda part: part.row >= 0),
        rows_dropped_empty=count(lambda part: part.status == Status.EMPTY),
        rows_dropped_masked=count(lambda part: part.status == Status.MASKED),
        rows_dropped_overlong=count(lambda part: part.status == Status.OVERLONG),
        rows_truncated=count(lambda part: (part.change == Change.TRUNCATED) & (part.status == Status.KEPT)),
        rows_split=count(lambda part: (part.change == Change.SPLIT) & (part.status == Status.KEPT)),
        rows_duplicate=len(all_contents) - len(np.unique(all_contents)),
        documents_dropped_masked=sum(
            int((pick & (part.status == Status.MASKED_PIECE)).sum())
            for part, pick in zip(parts, chosen, strict=True)
        ),
        documents=len(lengths),
        tokens=int(lengths.sum()),
        target_tokens=int(targets.sum()),
        longest=int(lengths.max(initial=0)),
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


def _count_rows(row: np.ndarray) -> int:
    return len(np.unique(row))


def _first_documents(row: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """Of every drawn row, its first drawn document."""
    documents = np.unique(drawn)
    return documents[np.diff(row[documents], prepend=-1) > 0]
