"""What rows hold beyond what is trained, counted, so that nothing of them is left out without a word."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from falcon_qlora.data.json_rows import spelled

# Rows may have other keys every time; of so many different ones the rest are counted together.
_MOST_NAMES = 1000
_OTHERS = "(others)"
_SHOWN = 40


@dataclass(frozen=True)
class Account:
    """Counts of rows, and of messages, by what of them was not read or not left as it was.

    Attributes:
        columns: column that is not read → rows that have a value there.
        message_keys: key that is not read → messages that have a value there.
        missing: column without which a row cannot be trained → rows that lack it.
        rows: one of `_ROWS` → rows.
    """

    columns: Counter[str] = field(default_factory=Counter)
    message_keys: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    rows: Counter[str] = field(default_factory=Counter)

    @classmethod
    def from_plain(cls, record: Mapping[str, Mapping[str, int]]) -> Account:
        """What `plain` made."""
        return cls(**{name: Counter(counts) for name, counts in record.items()})

    def plain(self) -> dict[str, dict[str, int]]:
        """As JSON keeps it."""
        return {name: dict(+counts) for name, counts in vars(self).items()}

    def told(self, template: str) -> list[str]:
        """One line for each thing to say of the rows.

        Args:
            template: the name of the one that wrote them.
        """
        lines = []
        if self.columns:
            lines.append(f"columns not read: {_listed(self.columns, 'row')}")
        if self.message_keys:
            lines.append(f"keys of messages not read: {_listed(self.message_keys, 'message')}")
        if self.missing:
            lines.append(f"dropped rows lack: {_listed(self.missing, 'row')}")
        for name, text in _ROWS.items():
            if count := self.rows[name]:
                verb, rest = text
                verb = f"s {verb}" if count > 1 else f" {_SINGULAR[verb]}"
                lines.append(f"{count:,} row{verb} {rest.format(template=template)}")
        return lines


# What so many rows do, as it is told.
_ROWS = {
    "special_text": ("hold", "text that looks like special tokens; it stays text"),
    "special_tokens": ("spell", "special tokens in their text; they are read as those tokens"),
    "altered": (
        "have",
        "text that template {template} writes differently (white space at the ends of messages, empty lines)",
    ),
    "surrogates": ("hold", "halves of surrogate pairs, which are no characters; they are read as \ufffd"),
    "like_missing": (
        "hold",
        "a text that pandas reads as missing, such as NaN or NA, alone in a column; it is read as that text",
    ),
    "joined": (
        "have",
        "a prompt and an answer that the tokenizer would join; they are tokenized apart, as when it is asked",
    ),
}
_SINGULAR = {"hold": "holds", "spell": "spells", "have": "has"}


def count(counts: Counter[str], name: object) -> None:
    """Count one more of `name`."""
    name = str(name)
    counts[name if name in counts or len(counts) < _MOST_NAMES else _OTHERS] += 1


def _listed(counts: Counter[str], what: str) -> str:
    shown = [
        f"{spelled(name)} ({number:,} {what}{'s' if number > 1 else ''})"
        for name, number in counts.most_common(_SHOWN)
    ]
    more = len(counts) - len(shown)
    return ", ".join([*shown, f"{more} more (data.json names them)"] if more > 0 else shown)
