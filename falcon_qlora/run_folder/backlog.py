"""What is not yet written of what a run could do without."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

from falcon_qlora.common.errors import reason_of
from falcon_qlora.terminal.console import note


class Backlog:
    """Writes what a run could do without: an OSError is told once, and what waits goes with the next.

    Args:
        write: what is called; all or nothing of one call is written.
        what: for the message, such as a file's name.
    """

    def __init__(self, write: Callable[..., None], what: str):
        self._write = write
        self._what = what
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._told = False

    def __call__(self, *arguments: Any) -> None:
        self._waiting.append(arguments)
        try:
            while self._waiting:
                self._write(*self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._told:
                note(
                    f"{self._what} cannot be written ({reason_of(error)}). The training goes on; what "
                    "is missing there is added once that works again"
                )
            self._told = True
