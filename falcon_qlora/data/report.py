"""Tables and pictures of what the model will see: rendered rows, lengths, what became of the rows."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from falcon_qlora.common.errors import printable
from falcon_qlora.common.quantities import counted
from falcon_qlora.data.corpus import Corpus, Statistics
from falcon_qlora.terminal import drawing

Ints = Sequence[int] | np.ndarray

_TRAINED = "bold green"
_PROMPT = "dim"
# Without colour, these stand around what is trained.
_OPEN, _CLOSE = "⟦", "⟧"
# Characters that a terminal would obey, except line breaks and tabs.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SHOWN_TOKENS = 600
_BINS = 16
_BAR_WIDTH = 40


def preview(documents: Iterable[tuple[Ints, Ints]], tokenizer: Any, *, color: bool = True) -> Group:
    """Documents as the model sees them, decoded from their tokens, with the trained parts highlighted.

    Args:
        documents: ``(input_ids, mask)`` of each.
        tokenizer: to decode with.
        color: highlight with colour; otherwise with brackets.
    """
    parts: list[RenderableType] = []
    for number, (ids, mask) in enumerate(documents, start=1):
        targets = int(np.sum(mask[1:]))
        title = f"document {number}: {len(ids):,} tokens, {targets:,} trained"
        parts += [Rule(title, style="cyan", align="left"), document_text(ids, mask, tokenizer, color=color)]
    return Group(*parts)


def document_text(ids: Ints, mask: Ints, tokenizer: Any, *, color: bool = True) -> Text:
    """One document's text; a long one is cut to its beginning and its end.

    Args:
        ids: int ``[tokens]``.
        mask: ``[tokens]``, 1 where the token is a target. The first token is never predicted.
    """
    trained = np.asarray(mask, dtype=bool).copy()
    trained[:1] = False
    text = Text()
    head, tail = _shown(len(ids))
    _append(text, ids[:head], trained[:head], tokenizer, color)
    if tail:
        text.append(f"\n… {len(ids) - head - tail:,} tokens more …\n", style="italic yellow")
        _append(text, ids[-tail:], trained[-tail:], tokenizer, color)
    return text


def summary(corpus: Corpus, *, title: str, efficiency: float | None = None) -> Table:
    """A table of what was read, in which format, and what became of it.

    Args:
        corpus: to summarize.
        title: of the table.
        efficiency: real tokens over the positions of a step, if known.
    """
    rows: list[tuple[str, str]] = []
    for use in corpus.sources:
        how_many = ", ".join(filter(None, [counted(use.rows_read, "row"), use.drawn()]))
        rows.append((use.name, f"{how_many}: {use.read_as()}"))
        rows += [("note", note) for note in (*use.notes, *use.told())]
    rows += _statistics_rows(corpus.statistics, corpus.dropped())
    rows.append(("tokens in a document", _quantiles(corpus.lengths)))
    if efficiency is not None:
        rows.append(("packing efficiency", f"{efficiency:.1%} of a step's positions are real tokens"))
    rows.append(("fingerprint", corpus.fingerprint[:16]))
    return labelled(title, rows)


def _statistics_rows(statistics: Statistics, dropped: list[str]) -> list[tuple[str, str]]:
    """The counts as ``(label, text)``; what did not happen is shown as ``none``."""
    share = statistics.target_tokens / max(statistics.tokens, 1)
    rows = [
        ("rows read", f"{statistics.rows_read:,}"),
        ("dropped", "; ".join(dropped) or "none"),
        ("truncated", _count(statistics.rows_truncated)),
        ("split", _count(statistics.rows_split)),
        ("duplicates", f"{statistics.rows_duplicate:,} (kept)" if statistics.rows_duplicate else "none"),
        ("documents", f"{statistics.documents:,}"),
        ("tokens", f"{statistics.tokens:,}"),
        ("trained tokens", f"{statistics.target_tokens:,} ({share:.1%})"),
    ]
    if statistics.documents_dropped_masked:
        rows.insert(
            4, ("pieces dropped", f"{statistics.documents_dropped_masked:,} (no answer token in them)")
        )
    if statistics.rows_trained_too:
        rows.append(
            ("trained too", f"{counted(statistics.rows_trained_too, 'row')}, in the training data as well")
        )
    return rows


def histogram(lengths: np.ndarray) -> list[tuple[int, int, int]]:
    """Bins ``(first, last, count)``: how many documents have `first` to `last` tokens.

    Bins have a round width. If a few documents are many times longer than most, each bin is instead twice as
    wide as the one before.
    """
    shortest, longest = int(lengths.min()), int(lengths.max())
    if _has_long_tail(lengths):
        edges = [2**power for power in range(shortest.bit_length() - 1, longest.bit_length() + 1)]
    else:
        width = _round_width(longest / _BINS)
        edges = list(range(shortest // width * width, longest + width + 1, width))
    counts = np.histogram(lengths, edges)[0]
    steps = zip(itertools.pairwise(edges), counts.tolist(), strict=True)
    return [(first, end - 1, count) for (first, end), count in steps]


def histogram_text(lengths: np.ndarray) -> Table:
    """The histogram of document lengths for a terminal."""
    bins = histogram(lengths)
    most = max(count for _, _, count in bins)
    table = Table.grid(padding=(0, 2))
    table.title = "tokens in a document"
    table.title_justify = "left"
    table.add_column(justify="right")
    table.add_column()
    table.add_column(justify="right")
    for first, last, count in bins:
        bar = "█" * math.ceil(_BAR_WIDTH * count / most)
        step = f"{first:,}–{last:,}" if last > first else f"{first:,}"
        table.add_row(step, Text(bar, style="blue"), f"{count:,}")
    return table


def draw_histogram(lengths: np.ndarray, max_length: int, file: Path, *, title: str = "") -> None:
    """Draw the histogram of document lengths, and the maximum length, as a PNG."""
    longest, mean = int(lengths.max()), float(lengths.mean())
    with drawing.picture(file, title=title, height=4) as (_, axes):
        if _has_long_tail(lengths):
            axes.hist(
                lengths, bins=np.geomspace(lengths.min(), longest + 1, 60).tolist(), color=drawing.PALE_BLUE
            )
            axes.set_xscale("log")
        else:
            width = _round_width(longest / 60)
            axes.hist(lengths, bins=list(range(0, longest + width + 1, width)), color=drawing.PALE_BLUE)
        if longest > max_length / 2:
            label = f"maximum length {max_length:,}"
            axes.axvline(max_length, color=drawing.RED, linewidth=1.2, linestyle="--", label=label)
        axes.axvline(mean, color=drawing.AMBER, linewidth=1.2, label=f"mean {mean:,.0f}")
        axes.set(xlabel="tokens in a document", ylabel="documents")
        drawing.key(axes)


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` indexes spread evenly over `count` documents, the first among them."""
    return (
        [round(index * count / wanted) for index in range(wanted)] if wanted < count else list(range(count))
    )


def _append(text: Text, ids: Ints, trained: np.ndarray, tokenizer: Any, color: bool) -> None:
    if len(ids) == 0:
        return
    bounds = [0, *(np.flatnonzero(np.diff(trained.astype(np.int8))) + 1).tolist(), len(ids)]
    for start, end in itertools.pairwise(bounds):
        words = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
        words = _CONTROL.sub(lambda sign: ascii(sign[0])[1:-1], words)
        if trained[start] and not color:
            words = f"{_OPEN}{words}{_CLOSE}"
        text.append(words, style=_TRAINED if trained[start] else _PROMPT)


def _shown(tokens: int) -> tuple[int, int]:
    if tokens <= _SHOWN_TOKENS:
        return tokens, 0
    return _SHOWN_TOKENS * 2 // 3, _SHOWN_TOKENS // 3


def _quantiles(lengths: np.ndarray) -> str:
    median, most = np.median(lengths), np.quantile(lengths, 0.95, method="higher")
    return (
        f"mean {lengths.mean():,.0f}, median {median:,.0f}, 95% up to {most:,.0f}, longest {lengths.max():,}"
    )


def _has_long_tail(lengths: np.ndarray) -> bool:
    """Whether half of the documents or more would fall into the first of `_BINS` equally wide bins."""
    return bool(lengths.max() > _BINS * np.median(lengths))


def _round_width(width: float) -> int:
    """The smallest of 1, 2, 5, 10, 20, 50, … that is at least `width`."""
    power = 10 ** math.floor(math.log10(max(width, 1)))
    return next(int(step * power) for step in (1, 2, 5, 10) if step * power >= width)


def _count(count: int) -> str:
    return f"{count:,}" if count else "none"


def labelled(title: str, rows: list[tuple[str, str]]) -> Table:
    """A table of labels and texts under a title."""
    grid = Table.grid(padding=(0, 2))
    grid.title = Text(title, style="bold")
    grid.title_justify = "left"
    grid.add_column(style="cyan", overflow="fold")
    grid.add_column(overflow="fold")
    for label, text in rows:
        grid.add_row(Text(printable(label)), Text(printable(text)))
    return grid
