"""Progress in a notebook: one bar and one chart of the losses, updated in place.

IPython is imported only where it runs this process.
"""

from __future__ import annotations

import html
import io
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from falcon_qlora.common.errors import first_line
from falcon_qlora.terminal import charts

_BAR_SECONDS = 0.3
_PICTURE_SECONDS = 2.0
_PICTURE_SHARE = 20  # drawing takes at most one part in this many of the time


def in_notebook() -> bool:
    """Whether this process is the kernel of a notebook (Jupyter, Colab)."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    return any(each.__name__ == "ZMQInteractiveShell" for each in type(shell).__mro__)


class NotebookProgress:
    """A run's progress bar and its chart of the losses, in the output of a notebook's cell."""

    def __init__(self) -> None:
        self._displays: dict[str, Any] = {}
        self._next = {"bar": 0.0, "picture": 0.0}

    def show_bar(self, done: int, total: int, text: str, *, last: bool = False) -> None:
        """Show `done` of `total` steps, and `text` beside them; most calls but the last are skipped."""
        if last or time.monotonic() >= self._next["bar"]:
            bar = f'<progress value="{done}" max="{total}" style="width: 16em"></progress>'
            self._show("bar", {"text/html": f"{bar} {html.escape(text)}", "text/plain": text})
            self._next["bar"] = time.monotonic() + _BAR_SECONDS

    def show_losses(
        self, metrics: Sequence[Mapping[str, Any]], *, last: bool = False, kept: int | None = None
    ) -> str | None:
        """Show the chart of `charts.draw_loss`, seldom enough not to slow down training.

        Returns:
            Why it could not be drawn, after which it is not tried again; None otherwise.
        """
        began, due = time.monotonic(), self._next["picture"]
        if not metrics or math.isinf(due) or (began < due and not last):
            return None
        try:
            picture = io.BytesIO()
            charts.draw_loss(metrics, picture, kept=kept)
            self._show("picture", {"image/png": picture.getvalue(), "text/plain": "losses"})
        except Exception as error:
            self._next["picture"] = math.inf
            return first_line(error)
        now = time.monotonic()
        self._next["picture"] = now + max(_PICTURE_SECONDS, _PICTURE_SHARE * (now - began))
        return None

    def _show(self, name: str, data: dict[str, Any]) -> None:
        from IPython.display import display

        if name in self._displays:
            self._displays[name].update(data, raw=True)
        else:
            self._displays[name] = display(data, raw=True, display_id=True)
