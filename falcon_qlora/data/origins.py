"""Name the rows and files that documents are made of, so that a user can find them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import groupby

import numpy as np

Origin = tuple[int, int]
"""The index of a part of the data, counted through all sources' `Source.parts`; and the row in that part,
from 1, or 0 if unknown."""

_ROWS_SHOWN = 8


class RowNames:
    """Names rows of the data.

    Args:
        parts: names of the files and data sets that rows are read from.
        counts: rows of each; None for a stream, whose rows come with their origin.
    """

    def __init__(self, parts: Sequence[str], counts: Sequence[int] | None = None):
        self._parts = list(parts)
        self._first = np.cumsum([0, *(counts or ())])

    def of_rows(self, rows: Iterable[int]) -> str:
        """Name rows given by their index, counted from 0 through all parts."""
        indexes = np.unique(np.fromiter(rows, dtype=np.int64))
        parts = np.searchsorted(self._first, indexes, side="right") - 1
        numbers = indexes - self._first[parts] + 1
        return self.of(zip(parts.tolist(), numbers.tolist(), strict=True))

    def of(self, origins: Iterable[Origin]) -> str:
        """Name rows, such as ``rows 3, 7 of a.jsonl and row 2 of b.jsonl``."""
        different = sorted(set(origins))
        shown = different[:_ROWS_SHOWN]
        named = [
            self._named(part, [number for _, number in of_part])
            for part, of_part in groupby(shown, key=lambda origin: origin[0])
        ]
        if len(different) > len(shown):
            named.append(f"{len(different) - len(shown)} more")
        return " and ".join([", ".join(named[:-1]), named[-1]] if len(named) > 1 else named)

    def _named(self, part: int, numbers: list[int]) -> str:
        name = self._parts[part] if part < len(self._parts) else "the data"
        if numbers == [0]:
            return f"rows of {name}"
        return f"row{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))} of {name}"
