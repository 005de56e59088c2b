"""The parts of a stream: iterators over rows in an order that a seed decides, which can be resumed.

Between two rows each iterator returns its `state` as values for JSON. An iterator made with that state
continues at the next row. It does not reread files and shards that were finished, and buffered rows are part
of the state.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from dataclasses import InitVar, dataclass
from typing import Any

from falcon_qlora.common.untrusted import is_count
from falcon_qlora.data.account import Account
from falcon_qlora.data.json_rows import columns_of
from falcon_qlora.data.origins import Origin
from falcon_qlora.data.rendering import render
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import Rows, Source
from falcon_qlora.data.special_text import SpecialText
from falcon_qlora.data.templates import Segment, Template

State = dict[str, Any]
Rendered = tuple[Origin, str | None, list[Segment]]
"""Where a row comes from, as numbers and for messages (None if it has been counted before); its segments."""

_ROWS_TO_RECOGNISE = 100


def recognise_first(settings: RowSettings, source: Source) -> tuple[str, dict[str, str]]:
    """The format of a source's rows by the first ones, in whatever order its files are read afterwards.

    Raises:
        UserError: if the data is empty, or its columns fit no format.
    """
    head = itertools.islice(source.read(), _ROWS_TO_RECOGNISE)
    return settings.recognise(columns_of(row for _, row in head), source.name)


@dataclass(eq=False)
class Reader:
    """One source's rows, rendered; at their end it can be restarted.

    Args:
        source: of the rows.
        settings: how they are read.
        tokenizer: whose special tokens a template may write.
        seed: of the order of the files.
        first_part: index of the source's first part in `Origin`.
        account: counts what is not read, is missing or is altered.
        before: the state to resume from, of a reader with the same source, settings and seed.
    """

    source: Source
    settings: RowSettings
    tokenizer: Any
    seed: InitVar[float]
    first_part: int
    account: Account
    before: InitVar[State | None] = None

    def __post_init__(self, seed: float, before: State | None) -> None:
        self._order = random.Random(seed)
        self._special = SpecialText(self.tokenizer)
        self._format: tuple[str, dict[str, str]] | None = None
        self._template: Template | None = None
        self.ended = False
        self.restart()
        if before is not None:
            self.ended = before["ended"]
            restore(self._order, before["began"])
            self._begin(before["position"])
            self._format = before["format"] and tuple(before["format"])

    def next(self) -> Rendered | None:
        """The next row, or None at the end."""
        if self._format is None:
            self._format = recognise_first(self.settings, self.source)
        row_format, columns = self._format
        if self._template is None:
            self._template = self.settings.load_template(row_format, self.tokenizer)
        found = next(self._rows, None)
        if found is None:
            self.ended = True
            return None
        (place, row), (part, number) = found, self._rows.origin()
        segments = render(
            row,
            row_format,
            self._template,
            columns=columns,
            place=place,
            special=self._special,
            account=Account() if self.ended else self.account,
        )
        if self.ended:  # the source was restarted, and counts once
            return (self.first_part + part, number), None, segments
        self.account.counts["rows_rendered"] += 1
        return (self.first_part + part, number), place, segments

    def restart(self) -> None:
        self._begin(None)

    def state(self) -> State:
        return {
            "began": plain(self._began),
            "position": self._rows.position(),
            "format": list(self._format) if self._format else None,
            "ended": self.ended,
        }

    def _begin(self, position: Any) -> None:
        self._began = self._order.getstate()  # of the order of the files in this pass
        self._rows: Rows = self.source.read(self._order, position)


@dataclass(eq=False)
class Mix(Iterator[Rendered]):
    """The rows of several readers, drawn by weight or in turn.

    Args:
        readers: of the sources.
        weights: one per reader; a reader that ends is restarted until all have ended once. None: readers
            take turns, and one that ends drops out.
        order: of the draws.
        most: end after this many rows.
        before: the state to resume from, of a mix with the same arguments.
    """

    readers: list[Reader]
    weights: list[float] | None
    order: random.Random
    most: int | None
    before: InitVar[State | None]

    def __post_init__(self, before: State | None) -> None:
        self._given = 0
        self._waiting = list(range(len(self.readers)))
        self._turn: list[int] = []
        self._ended = False
        if before is not None:
            restore(self.order, before["order"])
            self._given, self._waiting, self._turn = before["given"], before["waiting"], before["turn"]
            self._ended = before["ended"]

    def __next__(self) -> Rendered:
        row = None
        if not self._ended and (self.most is None or self._given < self.most):
            row = self._in_turn() if self.weights is None else self._drawn(self.weights)
        if row is None:
            self._ended = True
            raise StopIteration
        self._given += 1
        return row

    def state(self) -> State:
        return {
            "order": plain(self.order.getstate()),
            "given": self._given,
            "waiting": list(self._waiting),
            "turn": list(self._turn),
            "ended": self._ended,
            "readers": [reader.state() for reader in self.readers],
        }

    def _in_turn(self) -> Rendered | None:
        while self._waiting:
            if not self._turn:
                self._turn = list(self._waiting)
            index = self._turn.pop(0)
            row = self.readers[index].next()
            if row is not None:
                return row
            self._waiting.remove(index)
        return None

    def _drawn(self, weights: list[float]) -> Rendered | None:
        while True:
            reader = self.order.choices(self.readers, weights)[0]
            row = reader.next()
            if row is not None:
                return row
            if all(each.ended for each in self.readers):
                return None
            reader.restart()


@dataclass(eq=False)
class Shuffled(Iterator[Rendered]):
    """Rows drawn from a buffer that is kept full.

    Args:
        rows: to draw from.
        size: of the buffer; 1 keeps the order.
        order: of the draws.
        before: the state to resume from, of a shuffle with the same arguments.
    """

    rows: Mix
    size: int
    order: random.Random
    before: InitVar[State | None]

    def __post_init__(self, before: State | None) -> None:
        self._buffer: list[Rendered] | None = None
        self._draining = False
        if before is not None:
            restore(self.order, before["order"])
            self._draining = before["draining"]
            if before["buffer"] is not None:
                self._buffer = [
                    # Earlier releases kept no place, and did not count.
                    ((part, number), place[0] if place else None, [Segment(*each) for each in row])
                    for (part, number), row, *place in before["buffer"]
                ]

    def __next__(self) -> Rendered:
        if self.size <= 1:
            return next(self.rows)
        if self._buffer is None:
            self._buffer = list(itertools.islice(self.rows, self.size))
        if not self._draining:
            row = next(self.rows, None)
            if row is not None:
                place = self.order.randrange(len(self._buffer))
                drawn, self._buffer[place] = self._buffer[place], row
                return drawn
            self.order.shuffle(self._buffer)
            self._buffer.reverse()  # taken from its end
            self._draining = True
        if not self._buffer:
            raise StopIteration
        return self._buffer.pop()

    def state(self) -> Callable[[], State]:
        """A function that returns the state, as the buffer is large and seldom needed."""
        rows, order = self.rows.state(), plain(self.order.getstate())
        buffer, draining = None if self._buffer is None else list(self._buffer), self._draining

        def state() -> State:
            kept = None
            if buffer is not None:
                kept = [
                    [list(origin), [[part.text, part.train, part.end, part.why] for part in row], place]
                    for origin, place, row in buffer
                ]
            return {"rows": rows, "order": order, "draining": draining, "buffer": kept}

        return state


def plain(state: tuple[Any, ...]) -> list[Any]:
    """The state of a `random.Random`, as values for JSON."""
    version, numbers, gauss = state
    return [version, list(numbers), gauss]


def restore(order: random.Random, state: list[Any]) -> None:
    version, numbers, gauss = state
    order.setstate((version, tuple(numbers), gauss))


def check_cursor(cursor: Any, *, step: int, vocabulary: int) -> None:
    """Check that `cursor` is well-formed, before rows and documents are taken from it.

    Args:
        cursor: as `batches.Share.cursor` returned it.
        step: that the run resumes at.
        vocabulary: size of the model's vocabulary; token ids must be below it.

    Raises:
        ValueError, TypeError, LookupError, AttributeError: if it is malformed.
    """
    numbers = [cursor[name] for name in ("step", "epoch", "began")]
    _require(all(map(is_count, numbers)) and cursor["began"] <= cursor["step"] == step, "step")
    for document in cursor["waiting"]:
        _check_document(document, vocabulary)
    for name, counts in (cursor.get("account") or {}).items():  # earlier releases kept none
        right = (lambda each: isinstance(each, str)) if name == "first" else is_count
        _require(name in vars(Account()) and all(map(right, counts.values())), "account")
    stream = cursor["stream"]
    if stream is None:
        return
    for document in stream["waiting"]:
        _check_document(document, vocabulary)
    shuffled = stream["shuffled"]
    rows = shuffled["rows"]
    for order in (shuffled["order"], rows["order"], *(reader["began"] for reader in rows["readers"])):
        restore(random.Random(), order)
    for flag in (shuffled["draining"], rows["ended"], *(reader["ended"] for reader in rows["readers"])):
        _require(isinstance(flag, bool), "draining or ended")
    count = len(rows["readers"])
    _require(count > 0, "rows.readers")
    for name in ("waiting", "turn"):
        _require(all(is_count(index) and index < count for index in rows[name]), f"rows.{name}")
    _require(is_count(rows["given"]), "rows.given")
    for reader in rows["readers"]:
        _check_format(reader["format"])
        position = reader["position"]
        _require(isinstance(position, list) and len(position) == 2 and is_count(position[0]), "position")
    for origin, row, *place in shuffled["buffer"] or ():
        _check_origin(origin, "buffer")
        _require(len(place) < 2 and all(isinstance(each, str | None) for each in place), "buffer")
        for text, train, end, *why in row:
            _require(len(why) < 2 and all(isinstance(each, str) for each in (text, *why)), "buffer")
            _require(isinstance(train, bool) and isinstance(end, bool), "buffer")


def _check_document(document: Any, vocabulary: int) -> None:
    ids, mask, origin = document
    _check_origin(origin, "waiting")
    _require(len(ids) == len(mask) > 0, "waiting")
    _require(all(is_count(token) and token < vocabulary for token in ids), "waiting")
    _require(all(value in (0, 1) for value in mask), "waiting")


def _check_origin(origin: Any, where: str) -> None:
    _require(len(origin) == 2 and all(map(is_count, origin)), where)


def _check_format(row_format: Any) -> None:
    if row_format is not None:
        name, columns = row_format
        _require(isinstance(name, str), "format")
        _require(all(isinstance(text, str) for pair in columns.items() for text in pair), "format")


def _require(fits: bool, what: str) -> None:
    if not fits:
        raise ValueError(f"{what} is not of the form that it is written in")
