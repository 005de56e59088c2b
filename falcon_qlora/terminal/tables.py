"""Markdown tables."""

from __future__ import annotations

from collections.abc import Sequence


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a table; a row with fewer cells than titles is filled up with empty ones."""
    padded = ([*row, *[""] * (len(titles) - len(row))] for row in rows)
    head, *lines = (f"| {' | '.join(cells)} |" for cells in (titles, *padded))
    return [head, "|" + "---|" * len(titles), *lines]
