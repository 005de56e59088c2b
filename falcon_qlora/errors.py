"""What a user can mend, told apart from a bug."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

EXIT_USER_ERROR = 2
EXIT_BUG = 1
# Of a process that has said which one hangs: the launcher has no more to say of those that it then ends.
EXIT_HANGING = 3


class UserError(Exception):
    """Something the user can mend: the message says what is wrong, where, and what to do.

    A command prints the message alone, once over all processes, and exits with status 2.
    """


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean X?)"`` for the known name closest to `name`, or an empty string."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
