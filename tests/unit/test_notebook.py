"""In a notebook: one bar, one picture, one message; and nothing of the caller's own is silenced for good."""

from __future__ import annotations

import io
import logging
import sys
import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from PIL import Image

import falcon_qlora
from falcon_qlora.common.errors import UserError, told_in_one_line
from falcon_qlora.terminal import charts, console, notebook
from falcon_qlora.training.progress import ProgressCallback
from tests.notebook_cell import Cell, Shell, ZMQInteractiveShell, pretend_notebook
from tests.panics import PanicException


class TerminalInteractiveShell:
    """IPython's, in a terminal."""


@pytest.fixture
def cell(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cell]:
    console.console.cache_clear()
    yield pretend_notebook(monkeypatch)
    console.console.cache_clear()


def _run(steps: int) -> None:
    state = SimpleNamespace(
        global_step=0, max_steps=steps, best_global_step=2, best_model_checkpoint="step-2", log_history=[]
    )
    callback = ProgressCallback(lambda: "")
    callback.on_train_begin(None, state, None)
    for step in range(1, steps + 1):
        state.global_step = step
        callback.on_step_end(None, state, None)
        callback.on_log(None, state, None, logs={"loss": 3.0 / step, "learning_rate": 1e-4})
    callback.on_log(None, state, None, logs={"eval_loss": 0.5})
    callback.on_train_end(SimpleNamespace(load_best_model_at_end=True), state, None)


def test_a_kernel_is_told_from_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not notebook.in_notebook()
    for shell, expected in ((ZMQInteractiveShell, True), (Shell, True), (TerminalInteractiveShell, False)):
        pretend_notebook(monkeypatch, shell)
        assert notebook.in_notebook() is expected
    pretend_notebook(monkeypatch, lambda: None)  # type: ignore[arg-type]  # imported, but not what runs
    assert not notebook.in_notebook()


def test_one_bar_and_one_picture_are_redrawn_and_no_line_is_printed(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[list[dict[str, float]]] = []
    kept_steps: list[int | None] = []
    draw = charts.draw_loss

    def noted(metrics: list[dict[str, float]], file: io.BytesIO, *, kept: int | None) -> None:
        drawn.append(list(metrics))
        kept_steps.append(kept)
        draw(metrics, file, kept=kept)

    monkeypatch.setattr(charts, "draw_loss", noted)
    _run(300)
    told = capsys.readouterr()
    assert told.out == told.err == ""
    bars, pictures = cell.displays
    assert 'value="300" max="300"' in bars[-1]["text/html"]
    assert "step 300/300  loss 0.0100" in bars[-1]["text/html"]
    assert len(pictures) == len(drawn) < 30 > len(bars), "drawing must not hold up the training"
    assert drawn[-1][299:] == [
        {"step": 300, "loss": 0.01, "learning_rate": 1e-4},
        {"step": 300, "eval_loss": 0.5},
    ]
    assert kept_steps == [None] * (len(drawn) - 1) + [2]
    with Image.open(io.BytesIO(pictures[-1]["image/png"])) as picture:
        assert min(picture.size) > 300


def test_a_picture_that_cannot_be_drawn_is_told_once(
    cell: Cell, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    _run(50)
    assert capsys.readouterr().out.count("note: the losses cannot be drawn") == 1
    assert len(cell.displays) == 1


def test_lines_of_a_notebook_are_plain_text(cell: Cell, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_start([("model", "tiny"), ("writes to", "runs/" + "long " * 40)], ["a note"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert title == "falcon-qlora"
    assert lines == ["  model      tiny", "  writes to  runs/" + "long " * 40, "note: a note", ""]
    assert cell.displays == []


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (UserError("--b: bad"), "error: --b: bad"),
        (PermissionError(13, "Permission denied", "/a/b"), "error: /a/b: Permission denied"),
        (PanicException("index out\nof bounds"), "error: native code of a library panicked: index out"),
    ],
)
def test_ipython_is_given_one_line(error: BaseException, told: str) -> None:
    with pytest.raises(Exception) as caught, told_in_one_line():
        raise error
    assert caught.value._render_traceback_() == [told]  # type: ignore[attr-defined]


def test_bugs_keep_their_traceback_and_the_callers_own_settings_stay() -> None:
    with pytest.raises(ZeroDivisionError) as caught, told_in_one_line():
        raise ZeroDivisionError
    assert not hasattr(caught.value, "_render_traceback_")
    filters, level = list(warnings.filters), logging.getLogger("transformers").level
    with pytest.raises(UserError, match="did you mean --max_steps") as refused:
        falcon_qlora.train(max_step=3)
    assert refused.value._render_traceback_()[0].startswith("error: unknown flag --max_step")  # type: ignore[attr-defined]
    assert warnings.filters == filters
    assert logging.getLogger("transformers").level == level
