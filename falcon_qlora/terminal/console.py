"""What a run prints: a summary, one progress bar, a summary.

Only the main process prints. A terminal shows one bar at the bottom. A file or a pipe gets the same numbers
as plain lines, about fifty at most. A notebook shows a bar and a chart. Output that cannot be written does
not end the run: see `output`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from textwrap import indent, wrap
from threading import Timer
from typing import IO, Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from falcon_qlora.common.errors import printable
from falcon_qlora.common.files import quoted
from falcon_qlora.common.quantities import GIB, counted, duration, sized
from falcon_qlora.processes import ranks
from falcon_qlora.terminal.notebook import in_notebook
from falcon_qlora.terminal.output import below

_LABEL_WIDTH = 11
_NARROWEST_TABLE = 79  # columns of a terminal
_TIED = "\u00a0"  # where `wrap` does not break a line
_MUCH_WAITING = 0.05  # of a step
_PATIENCE_SECONDS = 5.0


class _Console(Console):
    """Rich's console, which shows text as text: no markup in it, and no escape sequence but Rich's own."""

    @property
    def file(self) -> IO[str]:
        return below(super().file)  # type: ignore[arg-type]

    @file.setter
    def file(self, new_file: IO[str]) -> None:
        self._file = new_file

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        for segment in super().render(renderable, options):
            text = segment.text if segment.control else printable(segment.text, keep="\n\t")
            yield Segment(text, segment.style, segment.control)


@lru_cache(maxsize=1)
def console() -> Console:
    """The terminal of the run: standard output on the main process, nowhere on the others."""
    return _made(quiet=not ranks.is_main_process())


def _made(*, quiet: bool = False, stderr: bool = False) -> Console:
    # In a notebook, Rich would turn every line into an HTML table of its own.
    plain: dict[str, Any] = {"force_jupyter": False, "force_terminal": False} if in_notebook() else {}
    return _Console(quiet=quiet, stderr=stderr, highlight=False, markup=False, emoji=False, **plain)


def note(message: str) -> None:
    """Print one line that a user should see, above the progress bar."""
    _say(f"note: {message}", style="yellow")


def note_here(message: str) -> None:
    """As `note`, of this process alone: on any rank, which is named where there are several."""
    of_rank = f"{ranks.named()}: " if ranks.world_size() > 1 else ""
    _say(f"note: {of_rank}{message}", style="yellow", here=True)


@contextmanager
def aside() -> Iterator[None]:
    """Within the block, print on standard error: a command's results go to standard output."""
    out = console()
    before, out.stderr = out.stderr, True
    try:
        yield
    finally:
        out.stderr = before


def say_doing(message: str) -> None:
    """Print what begins now."""
    _say(f"{message} …", style="dim")


def _say(line: str, *, style: str, here: bool = False) -> None:
    """Print a line, on the main process unless `here`, also where a dry run keeps back what a run prints."""
    if not (here or ranks.is_main_process()):
        return
    out = console()
    if out.quiet:  # it stays quiet: what other threads print meanwhile is kept back
        out = _made(stderr=out.stderr)
    out.print(Text(printable(line), style=style), soft_wrap=True)


@contextmanager
def patience(seconds: float = _PATIENCE_SECONDS) -> Iterator[Callable[[str], None]]:
    """Yield a function that takes what is done from now on, and prints it if that takes long.

    Args:
        seconds: how long, before it is printed.
    """
    with ExitStack() as running:

        def doing(message: str) -> None:
            running.close()
            timer = Timer(seconds, say_doing, (message,))
            timer.daemon = True
            timer.start()
            running.callback(timer.cancel)

        yield doing


@contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """Yield a function that takes what is being done, and shows it.

    A terminal has one line that changes; a file or a pipe gets a line every few seconds.
    """
    out = console()
    if out.is_terminal:
        with out.status("") as status:
            out.show_cursor(True)  # hidden while a status is shown, and for good if the process is killed
            yield lambda message: status.update(Text(printable(f"{message} …"), style="dim"))
        return
    told = time.monotonic()

    def tell(message: str) -> None:
        nonlocal told
        if time.monotonic() - told >= _PATIENCE_SECONDS:
            told = time.monotonic()
            out.print(Text(printable(f"{message} …"), style="dim"), soft_wrap=True)

    yield tell


def print_start(rows: Sequence[tuple[str, str]], notes: Sequence[str]) -> None:
    """Print what is about to be trained: rows of label and text, without the rows that have no text."""
    _print_rows("falcon-qlora", rows)
    for line in notes:
        note(line)
    console().print()


def print_end(
    summary: Mapping[str, Any],
    contents: Sequence[str],
    *,
    adapter: str,
    opened_with: Sequence[str] = (),
    checked: Sequence[str] = (),
) -> None:
    """Print the results of the run and the path of everything written.

    Args:
        summary: the fields of `summary.json`.
        contents: what was written: `RunDirectory.told_contents()`.
        adapter: the adapter's folder, or the run's address, for the command that tries it.
        opened_with: flags of that command.
        checked: lines on what was proved.
    """
    losses = best = reduced = memory = ""
    if summary.get("first_loss") is not None and summary.get("final_loss") is not None:
        losses = f"{summary['first_loss']:.4g} → {summary['final_loss']:.4g}"
    if summary.get("best_eval_loss") is not None:
        best = f"best on held-out data {summary['best_eval_loss']:.4g}"
        best += f" at step {summary['best_step']:,}" if summary.get("best_step") is not None else ""
    if peak := summary.get("peak_memory_gib"):
        memory = f"{sized(peak * GIB)} at most on one device"
    if tokens := summary.get("micro_batch_tokens"):
        memory = joined(memory, f"micro-batches of {tokens:,} tokens ({summary.get('micro_batch_reason')})")
    if (parts := summary.get("micro_batch_parts", 1)) > 1:
        memory = joined(memory, f"ran out: micro-batches were split into {parts}")
    if shares := summary.get("reduction_shares"):
        slowest = shares.index(min(shares))
        reduced = (
            f"gradient all-reduce took {min(shares):.1%} of the time of the slowest (rank {slowest}), "
            f"{max(shares):.1%} of the fastest, which waited"
        )
    network = ""
    if (share := summary.get("network_share")) is not None:
        network = f"{share:.1%} of each step was waited for the network"
        if share > _MUCH_WAITING:
            less = share / (share + 8 * (1 - share))
            network += (
                f"; {less:.1%} with eight times the micro-batches a step (--gradient_accumulation_steps, or "
                "--global_batch_size)"
            )
    speed = f"{summary['tokens_per_second']:,.0f} tokens/s in the steps"
    if (by_clock := summary.get("wall_tokens_per_second")) is not None:
        speed += f", {by_clock:,.0f} over the whole command"
    samples = f"{summary['samples_per_second_512']:,.3g} samples/s (512 computed positions each)"
    opened = " ".join([quoted(adapter), *opened_with])
    refused, overflowed = summary.get("refused_by_peft"), summary.get("overflowed_steps")
    rows = [
        ("steps", f"{summary['steps']:,}"),
        ("loss", joined(losses, best)),
        ("time", _time_of(summary)),
        ("speed", joined(speed, samples)),
        ("memory", memory),
        ("processes", reduced),
        ("network", network),
        (
            "skipped",
            joined(
                f"{counted(summary['bad_steps'], 'step')}, not finite" if summary.get("bad_steps") else "",
                f"{counted(overflowed, 'step')}, overflowed in float16" if overflowed else "",
            ),
        ),
        *[("" if index else "checked", told) for index, told in enumerate(checked)],
        *[("" if index else "wrote", path) for index, path in enumerate(contents)],
        ("opens with", f"falcon_qlora, not plain PEFT (LoRA on {', '.join(refused)})" if refused else ""),
        ("try it", f'falcon-qlora generate --adapter {opened} --prompt "…"'),
    ]
    console().print()
    _print_rows("done", rows)


def _time_of(summary: Mapping[str, Any]) -> str:
    """How long the run took, and on what."""
    names = ("train_seconds", "start_seconds", "save_seconds", "evaluation_seconds", "end_seconds")
    labels = ("steps", "start", "saves", "evaluation", "end")
    told = [
        f"{label} {duration(summary[name])}"
        for name, label in zip(names, labels, strict=True)
        if summary.get(name) and (summary[name] >= 0.5 or name == "train_seconds")
    ]
    whole = summary.get("wall_seconds")
    return ", ".join(told) if whole is None else f"{duration(whole)} in all: {', '.join(told)}"


def print_answers(title: str, answers: Sequence[tuple[str, str]]) -> None:
    """Print prompts and the model's answers.

    Args:
        title: when they were given, such as ``before training`` or ``step 200``.
        answers: pairs of prompt and answer.
    """
    out = console()
    out.print(Text(f"answers {title}", style="bold"))
    for prompt, answer in answers:
        out.print(Text(indent(prompt.strip(), "  > "), style="dim"), soft_wrap=True)
        out.print(Text(indent(answer.strip() or "(nothing)", "    "), style="cyan"), soft_wrap=True)
    out.print()


def print_table(title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print rows of label and text under a title."""
    _print_rows(title, rows)


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    out = console()
    out.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold blue", no_wrap=True, min_width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    for label, text in rows:
        if text and out.is_terminal:
            grid.add_row(f"  {label}", Text(printable(text)))
        elif text:
            # In a file a line stays whole, so that paths and commands can be copied and searched for.
            print_plain(f"  {label}".ljust(_LABEL_WIDTH + 2) + text)
    if out.is_terminal:
        out.print(grid)


def print_plain(line: str) -> None:
    """Print `line` as one line: no markup, no wrapping."""
    console().print(Text(printable(line)), soft_wrap=True)


def print_columns(table: Table) -> None:
    """Print a table; in a narrow terminal each row as a few lines of what its columns say of it."""
    out = console()
    if out.width >= _NARROWEST_TABLE:
        out.print(table)
        return
    heads = [str(column.header) for column in table.columns]
    print_plain(f"{heads[0]}:")
    for name, *cells in zip(*(column.cells for column in table.columns), strict=True):
        print_plain(str(name))
        told = [f"{head} {cell}" for head, cell in zip(heads[1:], cells, strict=True) if cell]
        wide = out.width - 2
        tied = (each.replace(" ", _TIED) if len(each) < wide else each for each in told)
        for line in wrap(", ".join(tied), wide - 1):
            print_plain(f"  {line.replace(_TIED, ' ')}")


def joined(*parts: object) -> str:
    """The non-empty texts among `parts`, on one line."""
    return " · ".join(part for part in parts if isinstance(part, str) and part)
