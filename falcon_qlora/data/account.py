"""Counts what rows hold beyond what is trained, so that nothing is left out silently."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.json_rows import spelled

# Each row may have other keys. Past this many different ones, the rest are counted together.
_MOST_NAMES = 1000
_OTHERS = "(others)"
_SHOWN = 40
# What else becomes of rows, by the fields of `corpus.Statistics`.
CHANGED = {
    "rows_truncated": "rows truncated",
    "rows_split": "rows split",
    "documents_dropped_masked": "pieces of split rows dropped (no answer token in them)",
}

# Names that other tools give to a key or column that says whether a message or row is learned.
_MAY_MARK = re.compile(r"\w*(train|learn|loss|mask|supervis|weight)\w*", re.IGNORECASE)


@dataclass(frozen=True)
class Account:
    """Counts of rows and messages in which something was not read, was missing or was altered.

    Attributes:
        columns: column that is not read → rows with a value there.
        message_keys: key that is not read → messages with a value there.
        dropped: why a row was dropped → rows.
        marks: key that marks a message as not to be trained → messages.
        rows: a key of `_ROWS` → rows.
        counts: a key of `CHANGED` → how many; in a stream also `rows_rendered`, of which `rows_read` have
            left the shuffle buffer.
        first: a name in `dropped` or `rows` → the place of the first such row.
    """

    columns: Counter[str] = field(default_factory=Counter)
    message_keys: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    marks: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict, compare=False)

    @classmethod
    def from_plain(cls, record: Mapping[str, Mapping[str, Any]]) -> Account:
        """The inverse of `plain`."""
        first = dict(record.get("first", {}))
        return cls(**{name: Counter(each) for name, each in record.items() if name != "first"}, first=first)

    def plain(self) -> dict[str, dict[str, Any]]:
        """The counts as values for JSON."""
        counts = {name: dict(+each) for name, each in vars(self).items() if name != "first"}
        return {**counts, "first": dict(self.first)}

    def moved(self, before: Iterable[str], now: Iterable[str]) -> Account:
        """The same account after files were renamed.

        Args:
            before, now: the old and new names of the files, with which the places of rows begin.
        """
        first = dict(self.first)
        for old, new in zip(before, now, strict=True):
            for name, place in self.first.items():
                if place.startswith((f"{old}:", f"{old} ")):
                    first[name] = new + place.removeprefix(old)
        return Account.from_plain({**self.plain(), "first": first})

    def note(self, counts: Counter[str], name: str, place: str) -> None:
        """Count `name` in `counts`, one of this account's, and remember the place of the first."""
        counts[name] += 1
        self.first.setdefault(name, place)

    def told(self, template: str, train_on: str) -> list[str]:
        """What to tell the user about the rows, one line each, beside `told_dropped`.

        Args:
            template: the name of the one that wrote them.
            train_on: the setting.
        """
        lines = []
        if self.columns:
            lines.append(f"columns not read: {_listed(self.columns, 'row')}")
        if self.message_keys:
            lines.append(f"keys of messages not read: {_listed(self.message_keys, 'message')}")
        unread = {*self.columns, *self.message_keys}
        if may_mark := ", ".join(spelled(name) for name in sorted(unread) if _MAY_MARK.fullmatch(name)):
            lines.append(
                f"{may_mark}: not read; these rows and messages are trained whatever it says there. Give "
                'messages that are not to be trained "train": false, and take out rows that are not'
            )
        for name, (verb, rest, only) in _ROWS.items():
            if (number := self.rows[name]) and only in (None, train_on):
                verb = f"s {verb}" if number > 1 else f" {_SINGULAR[verb]}"
                first = f" (first: {self.first[name]})" if name in self.first else ""
                marks = _listed(self.marks, "message")
                lines.append(f"{number:,} row{verb} {rest.format(template=template, marks=marks)}{first}")
        return lines


# Count of rows → the verb and the rest of its line, and the only `train_on` that prints it (None: any).
_ROWS = {
    "marked": (
        "have",
        "messages that are marked as not to be trained: {marks}; --train_on all trains them all the same",
        "all",
    ),
    "special_text": ("hold", "text that looks like special tokens; it stays text", None),
    "special_tokens": ("spell", "special tokens in their text; they are tokenized as those tokens", None),
    "altered": (
        "have",
        "text whose white space template {template} changes (at the ends of messages, empty lines)",
        None,
    ),
    "rewritten": (
        "have",
        "text that template {template} rewrites: other characters than white space differ",
        None,
    ),
    "surrogates": ("hold", "halves of surrogate pairs, which are no characters: read as \ufffd", None),
    "control": ("hold", "control characters, such as NUL or escape; they are trained as they are", None),
    "arguments": (
        "have",
        "arguments of calls as JSON text; template {template} gets objects, and spaces them its own way",
        None,
    ),
    "broken_arguments": (
        "have",
        "calls whose arguments are neither an object nor the JSON text of one; they are trained as they are",
        None,
    ),
    "respelled": (
        "have",
        "numbers in tools or calls that template {template} respells (12.50 as 12.5)",
        None,
    ),
    "unspelled": (
        "have",
        "a fraction or a date out of a table, which keeps no spelling: it is trained as Python writes it",
        None,
    ),
    "like_missing": (
        "have",
        "a column whose text is NaN, NA, inf or the like; it is read as that text, not as a missing value",
        None,
    ),
    "messages_as_text": (
        "have",
        "JSON of messages as a text; it is trained as that text (--messages_column names one of messages)",
        None,
    ),
    "joined": (
        "have",
        "a token that would span prompt and answer; the two are tokenized apart, as in generation",
        None,
    ),
}
_SINGULAR = {"hold": "holds", "spell": "spells", "have": "has"}


def count(counts: Counter[str], name: object) -> None:
    """Count `name`, or `_OTHERS` past `_MOST_NAMES` different names."""
    name = str(name)
    counts[name if name in counts or len(counts) < _MOST_NAMES else _OTHERS] += 1


def told_dropped(accounts: Iterable[Account]) -> list[str]:
    """How many rows were dropped for each cause, with the place of the first, one text each."""
    counts, first = Counter[str](), dict[str, str]()
    for account in accounts:
        counts += account.dropped
        first = account.first | first
    return [f"{number:,} ({why}; first: {first[why]})" for why, number in counts.most_common()]


def told_changed(counts: Mapping[str, int]) -> list[str]:
    """How many rows became something else, by `CHANGED`."""
    words = {name: (re.sub(r"s\b", "", what, count=1), what) for name, what in CHANGED.items()}
    return [f"{counts[name]:,} {words[name][counts[name] > 1]}" for name in CHANGED if counts.get(name)]


def nothing_left(
    names: Sequence[str],
    read_as: str,
    rows_read: int,
    accounts: Iterable[Account],
    told: list[str],
    *,
    use: str = "train on",
    eval_split: str | None = None,
) -> UserError:
    """The error for data of which no row is left.

    Args:
        names: of the data sets.
        read_as: their formats and templates.
        rows_read: of all.
        accounts: of these rows.
        told: lines of `Account.told`.
        use: what they are for.
        eval_split: the value that named these rows as held out, if it did.
    """
    lines = [*(f"dropped: {each}" for each in told_dropped(accounts)), *told]
    named = ", ".join(names)
    if eval_split is not None:
        of = "" if named == eval_split else f" of {named}"
        named, use = f"--eval_split {eval_split}{of}", "evaluate on"
    return UserError(
        f"{named}: nothing is left to {use}. Rows read ({read_as}): {rows_read:,}",
        *(f"  {line}" for line in lines),
    )


def _listed(counts: Counter[str], what: str) -> str:
    shown = [
        f"{spelled(name)} ({number:,} {what}{'s' if number > 1 else ''})"
        for name, number in counts.most_common(_SHOWN)
    ]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"{more} more (data.json names them)"] if more > 0 else shown)
