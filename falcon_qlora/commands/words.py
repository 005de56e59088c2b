"""Flags that take several words, separated by blanks or commas."""

from __future__ import annotations

from collections.abc import Sequence

from falcon_qlora.common.errors import UserError


def split(given: Sequence[str]) -> list[str]:
    """The names in the words, each once."""
    return list(dict.fromkeys(part.strip() for word in given for part in word.split(",") if part.strip()))


def names(flag: str, given: Sequence[str]) -> list[str]:
    """The names that a flag gives, each once.

    Raises:
        UserError: if it names nothing.
    """
    found = split(given)
    if not found:
        raise UserError(f"{flag}: nothing is named")
    return found


def numbers(flag: str, given: Sequence[str]) -> list[int]:
    """The whole numbers above 0 that a flag gives, each once.

    Raises:
        UserError: if it names nothing, or something else.
    """
    found = names(flag, given)
    for word in found:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"{flag}: {word!r} is not a whole number above 0")
    return list(dict.fromkeys(map(int, found)))
