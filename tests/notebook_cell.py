"""IPython in a kernel, as far as it is used here."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest


class ZMQInteractiveShell:
    """IPython's, in a kernel."""

    config: dict[str, Any] = {}


class Shell(ZMQInteractiveShell):
    """Colab's inherits from it."""


class Cell:
    """The output of a notebook's cell: every display, and what each was updated with."""

    def __init__(self) -> None:
        self.displays: list[list[dict[str, Any]]] = []

    def display(self, data: dict[str, Any], *, raw: bool, display_id: bool) -> Any:
        assert raw
        assert display_id
        shown = [data]
        self.displays.append(shown)

        def update(data: dict[str, Any], *, raw: bool) -> None:
            assert raw
            shown.append(data)

        return SimpleNamespace(update=update)


def pretend_notebook(monkeypatch: pytest.MonkeyPatch, shell: type = Shell) -> Cell:
    """Have this process be a kernel's, and return what its cell shows."""
    cell = Cell()
    ipython, display = ModuleType("IPython"), ModuleType("IPython.display")
    ipython.get_ipython = shell  # type: ignore[attr-defined]
    ipython.version_info = (9, 0)  # type: ignore[attr-defined]  # for matplotlib
    display.display = cell.display  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython", ipython)
    monkeypatch.setitem(sys.modules, "IPython.display", display)
    return cell
