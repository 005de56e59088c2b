"""The progress bar of a training run, as a callback of Transformers' loop."""

from __future__ import annotations

import atexit
import math
import time
from collections.abc import Callable
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn
from rich.text import Text
from transformers import TrainerCallback

from falcon_qlora.common.quantities import GIB, duration, sized
from falcon_qlora.processes import ranks
from falcon_qlora.terminal.console import console, note, print_plain
from falcon_qlora.terminal.notebook import NotebookProgress, in_notebook

# Without a terminal: at most this many lines for a run, but one at least each half minute.
_PLAIN_LINES = 50
_PLAIN_SECONDS = 30.0
_DRAWN = ("loss", "eval_loss", "learning_rate")


class ProgressCallback(TrainerCallback):
    """Shows step, loss, tokens/s, memory and time left; replaces Transformers' own callback.

    The numbers are those the trainer logs: `loss`, `tokens_per_second`, `peak_memory_gib`, `eval_loss`.

    Args:
        warning: returns a few words to show after the numbers, or an empty text.
    """

    def __init__(self, warning: Callable[[], str]) -> None:
        self._warning = warning
        self._progress: Progress | None = None
        self._notebook: NotebookProgress | None = None
        self._losses: list[dict[str, float]] = []  # for the notebook's picture
        self._task: Any = None
        self._shown: dict[str, float] = {}
        self._best: float | None = None
        self._step = 0
        self._last_step = 0
        self._printed_step = -1
        self._printed_at = 0.0
        self._warm: tuple[int, float] | None = None  # (step, time) after this start's first step

    def close(self) -> None:
        """Remove the bar from the terminal; safe to call at any time, and repeatedly."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
            atexit.unregister(self.close)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not ranks.is_main_process():
            return
        self._step, self._last_step = state.global_step, state.max_steps
        before = [entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry]
        self._best = min(before, default=None)  # of a run that is resumed
        self._printed_at = time.monotonic()
        self._warm = None
        if in_notebook():
            self._notebook = NotebookProgress()
        if not console().is_terminal:
            return
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TextColumn("{task.fields[numbers]}"),
            console=console(),
            auto_refresh=True,
            refresh_per_second=5,
        )
        self._task = self._progress.add_task(
            self._counter(), total=self._last_step, completed=self._step, numbers=""
        )
        self._progress.start()
        # Rich hides the cursor until the bar stops; if the process is killed, it would stay hidden.
        console().show_cursor(True)
        # A traceback must not be drawn over.
        atexit.register(self.close)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not ranks.is_main_process():
            return
        self._step = state.global_step
        if self._warm is None:
            self._warm = self._step, time.monotonic()
        self._refresh(self._counter())

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not ranks.is_main_process() or not logs:
            return
        names = (
            *("loss", "tokens_per_second", "wall_tokens_per_second"),
            *("peak_memory_gib", "learning_rate", "eval_loss"),
        )
        self._shown |= {name: float(logs[name]) for name in names if logs.get(name) is not None}
        self._step = max(self._step, state.global_step)
        self._refresh(self._counter())
        if self._notebook is not None:
            shown = {name: float(logs[name]) for name in _DRAWN if logs.get(name) is not None}
            self._losses += [{"step": state.global_step, **shown}] if shown else []
            self._draw_losses(self._notebook)
        elif "eval_loss" in logs:
            self._print_evaluation(float(logs["eval_loss"]))
        elif "loss" in logs and self._progress is None:
            self._print_line()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._notebook is not None:
            self._refresh(self._counter(), last=True)
            best = args.load_best_model_at_end and state.best_model_checkpoint is not None
            kept = state.best_global_step if best else state.global_step
            self._draw_losses(self._notebook, last=True, kept=kept)
        elif self._progress is None and self._shown and self._printed_step != self._step:
            self._print_line(force=True)
        self.close()

    def _counter(self) -> str:
        return f"step {self._step:,}/{self._last_step:,}"

    def _numbers(self) -> list[str]:
        shown = self._shown
        numbers = []
        if "loss" in shown:
            numbers.append(f"loss {_loss(shown['loss'])}")
        if "tokens_per_second" in shown:
            speed, by_clock = shown["tokens_per_second"], shown.get("wall_tokens_per_second", 0.0)
            told = f" ({by_clock:,.0f} with saves and evaluations)" if 0 < by_clock < 0.98 * speed else ""
            numbers.append(f"{speed:,.0f} tokens/s{told}")
        if shown.get("peak_memory_gib"):
            numbers.append(sized(shown["peak_memory_gib"] * GIB))
        left = self._seconds_left()
        if left is not None:
            numbers.append(f"{duration(left)} left")
        return [*numbers, warning] if (warning := self._warning()) else numbers

    def _seconds_left(self) -> float | None:
        """From this start's wall clock, so including the time of saves and evaluations so far."""
        if self._warm is None or not self._warm[0] < self._step < self._last_step:
            return None  # how long the first step takes, which compiles and is checked, says little
        step, at = self._warm
        return (time.monotonic() - at) / (self._step - step) * (self._last_step - self._step)

    def _draw_losses(self, notebook: NotebookProgress, **how: Any) -> None:
        if failure := notebook.show_losses(self._losses, **how):
            note(f"the losses cannot be drawn ({failure})")

    def _refresh(self, description: str, *, last: bool = False) -> None:
        if self._notebook is not None:
            text = "  ".join([description, *self._numbers()])
            self._notebook.show_bar(self._step, self._last_step, text, last=last)
        if self._progress is not None:
            self._progress.update(
                self._task, completed=self._step, description=description, numbers="  ".join(self._numbers())
            )

    def _print_line(self, force: bool = False) -> None:
        now = time.monotonic()
        enough = self._step - self._printed_step >= math.ceil(self._last_step / _PLAIN_LINES)
        first_or_last = self._printed_step < 0 or self._step >= self._last_step
        if force or enough or first_or_last or now - self._printed_at >= _PLAIN_SECONDS:
            counter = self._counter().ljust(len(f"step {self._last_step:,}/{self._last_step:,}"))
            print_plain("  ".join([counter, *self._numbers()]))
            self._printed_step, self._printed_at = self._step, now

    def _print_evaluation(self, loss: float) -> None:
        better = self._best is None or loss < self._best
        self._best = loss if better else self._best
        text = f"step {self._step:,}: held-out loss {_loss(loss)}"
        console().print(Text(text + (", the best so far" if better else ""), style="green" if better else ""))


def _loss(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1000 else f"{value:.3e}"
