"""What a person sees of a run: a summary, one progress bar, a summary.

Only the main process prints. On a terminal there is one bar at the bottom; into a file or a pipe the same
numbers go as plain lines, at most some fifty of them. What cannot be written there ends no run: see `output`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from textwrap import indent
from threading import Timer
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from falcon_qlora.common.files import quoted
from falcon_qlora.common.quantities import counted, duration
from falcon_qlora.processes import ranks

_LABEL_WIDTH = 11
_PATIENCE_SECONDS = 5.0


@lru_cache(maxsize=1)
def console() -> Console:
    """The terminal of the run: standard output on the main process, nowhere on the others."""
    return Console(quiet=not ranks.is_main_process(), highlight=False)


def note(message: str) -> None:
    """One line that a user should see, above the progress bar."""
    console().print(Text(f"note: {message}", style="yellow"), soft_wrap=True)


@contextmanager
def patience(seconds: float = _PATIENCE_SECONDS) -> Iterator[Callable[[str], None]]:
    """Give a function that is told what is done from now on, and says it to the user if it takes long.

    Args:
        seconds: after which it is said.
    """
    timer: Timer | None = None

    def stop() -> None:
        if timer is not None:
            timer.cancel()

    def doing(message: str) -> None:
        nonlocal timer
        stop()
        line = Text(f"{message} …", style="dim")
        timer = Timer(seconds, lambda: console().print(line, soft_wrap=True))
        timer.daemon = True
        timer.start()

    try:
        yield doing
    finally:
        stop()


@dataclass(kw_only=True)
class StartSummary:
    """What is about to be trained; what is None or empty is left out.

    Attributes:
        model: The name or path it was asked for by.
        layout: What it is, such as ``falcon-7b layout, 32 blocks``.
        total_parameters: All parameters, quantized ones counted unpacked, the adapter included.
        trainable_parameters: Those that will be trained.
        quantize_mode: ``4bit``, ``8bit`` or ``16bit``.
        quantization: More about it, such as ``NF4, double quantization, computing in bf16``.
        quantized_linears: How many linear layers are quantized.
        model_gib: What the weights take on one device, GiB.
        kernels: What runs the blocks.
        activations: What of the blocks' activations is kept for the backward pass.
        method: The adapter, such as ``LoRA r 64, alpha 16, dropout 0``.
        world_size: Processes, one replica in each.
        device: What a replica runs on, such as ``NVIDIA H200`` or ``CPU``.
        nodes: Machines.
        documents: Tokenized documents to train on; None for a stream.
        tokens: Tokens in them.
        target_tokens: Tokens in them that the loss counts.
        data_notes: What else happened to the rows, such as ``12 dropped (empty)``.
        eval_documents: Held-out documents.
        steps: Optimizer steps.
        epochs: Passes over the data.
        batch: What one step takes, such as ``8 × 4 × 2,048 tokens``.
        packing_efficiency: Real tokens in a micro batch over its room, 0 to 1.
        tracking: Where the trackers write, a line each.
        output_dir: The run directory.
        resumed_step: The step the run goes on from.
        notes: Lines to end with.
    """

    model: str
    layout: str = ""
    total_parameters: int | None = None
    trainable_parameters: int | None = None
    quantize_mode: str = ""
    quantization: str = ""
    quantized_linears: int | None = None
    model_gib: float | None = None
    kernels: str = ""
    activations: str = ""
    method: str = ""
    world_size: int = 1
    device: str = "CPU"
    nodes: int = 1
    documents: int | None = None
    tokens: int | None = None
    target_tokens: int | None = None
    data_notes: list[str] = field(default_factory=list)
    eval_documents: int | None = None
    steps: int | None = None
    epochs: float | None = None
    batch: str = ""
    packing_efficiency: float | None = None
    tracking: list[str] = field(default_factory=list)
    output_dir: str | Path | None = None
    resumed_step: int | None = None
    notes: list[str] = field(default_factory=list)

    def rows(self) -> list[tuple[str, str]]:
        """Label and text of each line."""
        return [
            ("model", _join(self.model, self.layout, _count(self.total_parameters, "parameters"))),
            ("quantized", self._quantized()),
            ("kernels", self.kernels),
            ("memory", self.activations),
            ("training", _join(self.method, self._share())),
            ("devices", self._devices()),
            ("data", self._data()),
            ("held out", _count(self.eval_documents, "documents")),
            ("steps", self._steps()),
            *[("tracking" if index == 0 else "", line) for index, line in enumerate(self.tracking)],
            ("writes to", str(self.output_dir) if self.output_dir else ""),
        ]

    def _quantized(self) -> str:
        if self.quantize_mode == "16bit":
            return _join("no: 16bit", self.quantization, _gib(self.model_gib, "on each device"))
        linears = _count(self.quantized_linears, "linear layers")
        return _join(self.quantize_mode, self.quantization, linears, _gib(self.model_gib, "on each device"))

    def _share(self) -> str:
        if self.trainable_parameters is None:
            return ""
        if not self.total_parameters:
            return f"{self.trainable_parameters:,} trainable parameters"
        percent = 100 * self.trainable_parameters / self.total_parameters
        return f"{self.trainable_parameters:,} of {self.total_parameters:,} parameters ({percent:.2f}%)"

    def _devices(self) -> str:
        if self.device.upper() == "CPU":
            text = f"CPU, {counted(self.world_size, 'process', 'processes')}"
        else:
            text = f"{self.world_size} × {self.device}"
        return _join(text, f"{self.nodes} machines" if self.nodes > 1 else "")

    def _data(self) -> str:
        tokens = _count(self.tokens, "tokens")
        if tokens and self.target_tokens is not None:
            tokens += f", {self.target_tokens:,} of them in the loss"
        return _join(_count(self.documents, "documents"), tokens, *self.data_notes)

    def _steps(self) -> str:
        epochs = f"{self.epochs:.3g} epoch{'' if self.epochs == 1 else 's'}" if self.epochs else ""
        packed = (
            "" if self.packing_efficiency is None else f"packed {100 * self.packing_efficiency:.0f}% full"
        )
        resumed = "" if self.resumed_step is None else f"going on from step {self.resumed_step:,}"
        return _join(_count(self.steps, ""), epochs, self.batch, packed, resumed)


def print_start(summary: StartSummary) -> None:
    """Print what is about to be trained."""
    _print_rows("falcon-qlora", summary.rows())
    for line in summary.notes:
        note(line)
    console().print()


def print_end(summary: Mapping[str, Any], contents: Sequence[Path], *, adapter: Path) -> None:
    """Print what came of the run and the path of everything written.

    Args:
        summary: The fields of `summary.json`.
        contents: What was written: `RunDirectory.contents()`.
        adapter: The adapter's folder, to say how it is tried.
    """
    losses = ""
    if summary.get("first_loss") is not None and summary.get("final_loss") is not None:
        losses = f"{summary['first_loss']:.4g} → {summary['final_loss']:.4g}"
    best = ""
    if summary.get("best_eval_loss") is not None:
        best = f"best on held-out data {summary['best_eval_loss']:.4g}"
        best += f" at step {summary['best_step']:,}" if summary.get("best_step") is not None else ""
    rows = [
        ("steps", f"{summary['steps']:,} in {duration(summary['train_seconds'])}"),
        ("loss", _join(losses, best)),
        (
            "speed",
            _join(
                f"{summary['tokens_per_second']:,.0f} tokens/s",
                f"{summary['samples_per_second_512']:,.3g} samples/s of 512 tokens",
            ),
        ),
        ("memory", _join(_gib(summary.get("peak_memory_gib"), "at most on one device"), _split(summary))),
        ("processes", _reductions(summary)),
        ("skipped", f"{summary['bad_steps']:,} steps, not finite" if summary.get("bad_steps") else ""),
        *[("wrote" if index == 0 else "", _path(path)) for index, path in enumerate(contents)],
        ("try it", f'falcon-qlora generate --adapter {quoted(str(adapter))} --prompt "…"'),
    ]
    console().print()
    _print_rows("done", rows)


def _reductions(summary: Mapping[str, Any]) -> str:
    """How long the processes waited for each other, of several."""
    shares = summary.get("reduction_shares")
    if not shares:
        return ""
    slowest = shares.index(min(shares))
    return (
        f"adding up gradients took {min(shares):.1%} of the time of the slowest (process {slowest}), "
        f"{max(shares):.1%} of the fastest, which waited"
    )


def print_answers(title: str, answers: Sequence[tuple[str, str]]) -> None:
    """Print prompts and what the model makes of them.

    Args:
        title: When they were given, such as ``before training`` or ``step 200``.
        answers: Pairs of prompt and answer.
    """
    out = console()
    out.print(Text(f"answers {title}", style="bold"))
    for prompt, answer in answers:
        out.print(Text(indent(prompt.strip(), "  > "), style="dim"), soft_wrap=True)
        out.print(Text(indent(answer.strip() or "(nothing)", "    "), style="cyan"), soft_wrap=True)
    out.print()


def _print_rows(title: str, rows: Sequence[tuple[str, str]]) -> None:
    out = console()
    out.print(Text(title, style="bold"))
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="bold blue", no_wrap=True, min_width=_LABEL_WIDTH)
    grid.add_column(overflow="fold")
    for label, text in rows:
        if text and out.is_terminal:
            grid.add_row(f"  {label}", Text(text))
        elif text:
            # In a file a line stays whole, so that paths and commands can be copied and searched for.
            print_plain(f"  {label}".ljust(_LABEL_WIDTH + 2) + text)
    if out.is_terminal:
        out.print(grid)


def print_plain(line: str) -> None:
    """Print `line` as it is: no markup, no wrapping."""
    console().print(Text(line), soft_wrap=True)


def _join(*parts: str) -> str:
    return " · ".join(part for part in parts if part)


def _count(number: int | None, unit: str) -> str:
    return "" if number is None else f"{number:,} {unit}".rstrip()


def _gib(amount: float | None, where: str) -> str:
    return "" if not amount else f"{amount:.2f} GiB {where}"


def _split(summary: Mapping[str, Any]) -> str:
    parts = summary.get("micro_batch_parts", 1)
    return f"it ran out, and micro batches were split in {parts}" if parts > 1 else ""


def _path(path: Path) -> str:
    return f"{path}/" if path.is_dir() else str(path)
