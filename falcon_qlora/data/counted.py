"""How many tokens rows have, without reading them all: from the cache, or from the first of them.

Needs neither torch nor `datasets`, and never asks the hub.
"""

from __future__ import annotations

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import cache
from falcon_qlora.data.rendering import render
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import LocalSource
from falcon_qlora.data.tokens import Status

_SAMPLED_ROWS = 2000


@dataclass(frozen=True, kw_only=True)
class Counted:
    """Documents of the first rows.

    Attributes:
        lengths: ``[documents]``, tokens.
        share: of all rows, those that the documents are of.
        how: where they come from, for readers.
    """

    lengths: np.ndarray
    share: float
    how: str

    @property
    def tokens(self) -> float:
        """Of all rows."""
        return float(self.lengths.sum()) / self.share


def count(
    settings: RowSettings,
    tokenizer: Any,
    tokenizer_fingerprint: str,
    *,
    max_rows: int | None = None,
    cache_dir: Path | None = None,
) -> Counted:
    """Count the documents that rows become.

    Args:
        settings: as for training. Weights are not looked at.
        tokenizer: a fast tokenizer.
        tokenizer_fingerprint: identifies it.
        max_rows, cache_dir: as for `corpus.prepare_corpora`.

    Raises:
        UserError: for rows that are not on this machine, or cannot be read.
    """
    found = []
    for source, limit in zip(settings.sources(), settings.limits(max_rows), strict=True):
        if not isinstance(source, LocalSource):
            raise UserError(f"{source.name} is not on this machine, and the hub is not asked")
        row_format, columns = settings.recognise(source.columns(), source.name)
        template = settings.load_template(row_format, tokenizer)
        key = settings.cache_key(source, limit, row_format, columns, template, tokenizer_fingerprint)
        if (entry := cache.place_of(cache_dir, key)).is_dir():
            found.append((_cached(entry), 1.0, "all rows, tokenized before"))
            continue
        rows = list(source.rows(_SAMPLED_ROWS if limit is None else min(limit, _SAMPLED_ROWS)))
        segments = [render(row, row_format, template, columns=columns, place=place) for place, row in rows]
        documents = itertools.chain(*settings.encoder(tokenizer).documents(segments))
        lengths = [len(each.input_ids) for each in documents if each.status == Status.KEPT]
        share = 1.0
        if len(rows) == _SAMPLED_ROWS and len(rows) != limit:
            share = min(1.0, len(rows) / min(_all_rows(source, rows), limit or 2**63))
        how = "all rows" if share == 1 else f"a sample, the first {len(rows):,} rows"
        found.append((np.array(lengths, dtype=np.int64), share, how))
    all_lengths = np.concatenate([each for each, *_ in found])
    if not len(all_lengths):
        raise UserError(f"{', '.join(settings.dataset_name)}: no row has anything to train on")
    tokens = sum(float(each.sum()) / share for each, share, _ in found)
    return Counted(
        lengths=all_lengths,
        share=float(all_lengths.sum()) / tokens,
        how="; ".join(dict.fromkeys(how for *_, how in found)),
    )


def _cached(entry: Path) -> np.ndarray:
    """Tokens of the documents of a cache entry."""
    import pyarrow as pa
    import pyarrow.compute as pc

    lengths = []
    for file in sorted(entry.glob("documents*.arrow")):
        with pa.memory_map(str(file)) as source:
            for batch in pa.ipc.open_stream(source):
                kept = batch.column("status").to_numpy() == int(Status.KEPT)
                lengths.append(pc.list_value_length(batch.column("input_ids")).to_numpy()[kept])
    return np.concatenate(lengths).astype(np.int64) if lengths else np.zeros(0, np.int64)


def _all_rows(source: LocalSource, first: list[tuple[str, Any]]) -> float:
    """How many rows files have: by the size of their first rows, where they need not be counted."""
    if all(file.suffix == ".parquet" for file in source.files):
        import pyarrow.parquet as pq

        return float(sum(pq.read_metadata(file).num_rows for file in source.files))
    if any(file.suffix in (".parquet", ".gz") for file in source.files):
        return float(sum(source.rows_of_parts(None)))
    mean = sum(_bytes_of(row, source.files[0].suffix) for _, row in first) / len(first)
    return sum(file.stat().st_size for file in source.files) / mean


def _bytes_of(row: Any, suffix: str) -> int:
    """Of a row in a file of text, some of its spaces and quotes left out."""
    if ".json" in suffix:
        return len(json.dumps(row, ensure_ascii=False, default=str).encode()) + 1
    return len(",".join(map(str, row.values())).encode()) + 1
