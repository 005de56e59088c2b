"""Runs by several methods on the same rows, side by side: a table, a CSV file and two pictures.

Everything comes from the run directories; no model is loaded and no model code imported.
"""

from __future__ import annotations

import csv
import functools
import io
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from falcon_qlora.common.files import replaced, write_text
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.common.untrusted import of_a_run, refuse_links
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal import charts
from falcon_qlora.terminal.tables import markdown_table

Bar = tuple[str, float, str]
"""A bar of a picture: its label, its height, and what stands above it."""

TABLE, CSV = "comparison.md", "comparison.csv"
TIME_PICTURE, MEMORY_PICTURE = "training-time.png", "memory-requirements.png"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A method's run, or why there is none.

    Attributes:
        method: as the table names it.
        folder: the run directory.
        recipe: that has its settings where the command does not say otherwise.
        command: that trains it alone.
        reason: why it could not run; None where it did.
    """

    method: str
    folder: Path
    recipe: str
    command: str
    reason: str | None = None

    @property
    def directory(self) -> RunDirectory:
        """The run directory; of one whose files are links that lead out of it nothing is read."""
        refuse_links(self.folder)
        return RunDirectory(self.folder)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the table; what is not known is None. GB are 10^9 bytes.

    Attributes:
        seconds: in the training loop, without evaluations and saving.
        seconds_per_1000_samples: after the first logged interval, in which kernels are compiled.
        time_ratio_to_full: of the seconds per 1,000 samples.
        peak_memory_gb: of the process that reserved the most.
        total_peak_memory_gb: of all processes.
        eval_loss_before: before the first step.
        eval_loss_after: of what was kept: the last step's, or the best checkpoint's.
        disk_bytes: of the trained tensors.
    """

    method: str
    base: str | None = None
    trainable_parameters: int | None = None
    gpus: int | None = None
    samples: int | None = None
    seconds: float | None = None
    seconds_per_1000_samples: float | None = None
    time_ratio_to_full: float | None = None
    peak_memory_gb: float | None = None
    total_peak_memory_gb: float | None = None
    eval_loss_before: float | None = None
    eval_loss_after: float | None = None
    disk_bytes: int | None = None
    reason: str | None = None


def _published(method: str, samples: int, seconds: int, peak_memory_gb: float, gpus: int = 1) -> Row:
    return Row(
        method=method,
        gpus=gpus,
        samples=samples,
        seconds=seconds,
        seconds_per_1000_samples=1000 * seconds / samples,
        peak_memory_gb=peak_memory_gb,
        total_peak_memory_gb=peak_memory_gb * gpus,
    )


# What the comparison of June 2023 measured for Falcon-7B on A100 GPUs.
PUBLISHED = [
    _published("adapter", 52_000, 4140, 16.20),
    _published("adapter_v2", 52_000, 5160, 16.97),
    _published("lora", 52_000, 4140, 16.27),
    _published("full", 300_000, 31_920, 39.45, gpus=6),
]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The rows and what they were made from.

    Attributes:
        published: whether the model has Falcon-7B's shapes, which the comparison of June 2023 measured.
    """

    title: str
    compared: Sequence[Compared]
    published: bool = False

    @functools.cached_property
    def rows(self) -> list[Row]:
        """A line for each of what is compared."""
        rows = [_row(run) for run in self.compared]
        full = next((row.seconds_per_1000_samples for row in rows if row.method == "full"), None)
        return [
            replace(row, time_ratio_to_full=row.seconds_per_1000_samples / full)
            if full and row.seconds_per_1000_samples
            else row
            for row in rows
        ]

    def on_gpus(self) -> bool:
        """Whether the runs were made on GPUs; if not, memory is what the processes held on the CPU."""
        done = [run.directory for run in self.compared if run.reason is None]
        return any(directory.read("environment").get("gpus") for directory in done)

    def time_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: seconds per 1,000 samples."""
        return self._bars("seconds_per_1000_samples", lambda row: f"{row.seconds_per_1000_samples:.3g} s")

    def memory_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: peak memory of all processes, GB."""
        return self._bars("total_peak_memory_gb", _of_gpus)

    def _bars(self, height: str, text: Callable[[Row], str]) -> dict[str, list[Bar]]:
        figures = {"this comparison": self.rows}
        if self.published:
            methods = {row.method for row in self.rows}
            figures["June 2023, A100"] = [row for row in PUBLISHED if row.method in methods]
        return {
            series: [
                (row.method, high, text(row)) for row in rows if (high := getattr(row, height)) is not None
            ]
            for series, rows in figures.items()
        }

    def write(self, folder: Path) -> list[Path]:
        """Write the table, the CSV file and the pictures; returns what was written."""
        write_text(folder / TABLE, self.markdown())
        write_text(folder / CSV, self.csv())
        where = "GPUs" if self.on_gpus() else "processes"
        memory = f"peak memory, GB, all {where} together"
        pictures = {
            TIME_PICTURE: (self.time_bars(), "seconds per 1,000 samples", "Training time"),
            MEMORY_PICTURE: (self.memory_bars(), memory, "Memory requirements"),
        }
        for name, (series, axis, title) in pictures.items():
            with replaced(folder / name) as temporary:
                charts.draw_bars(series, temporary, axis=axis, title=f"{title}: {self.title}")
        return [folder / name for name in (TABLE, CSV, *pictures) if (folder / name).exists()]

    def csv(self) -> str:
        """Every row with all digits."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        """The table, with what it counts and where every method's settings are from below it."""
        each = "GPU" if self.on_gpus() else "process"
        cells = [_cells(row, each) for row in self.rows]
        lines = [
            f"# {self.title}",
            "",
            *markdown_table(list(cells[0]), [list(row.values()) for row in cells]),
            "",
            "A sample is a row of the data as it was tokenized. Time is that of the training loop, without "
            "evaluations and saving; the seconds per 1,000 samples leave out the first logged interval, in "
            "which kernels are compiled. GB and MB are 10^9 and 10^6 bytes; peak memory is what "
            + (
                "PyTorch reserved."
                if each == "GPU"
                else "the processes held, their libraries included: there was no GPU."
            ),
        ]
        if self.published:
            titles = "method|GPUs|samples|time|s per 1,000 samples|peak GB a GPU|in total".split("|")
            figures = [[_cells(row, "GPU")[title] for title in titles] for row in PUBLISHED]
            lines += ["", "As published in June 2023 (Lit-Parrot, Falcon-7B in bf16, A100 GPUs):", ""]
            lines += markdown_table(titles, figures)
        lines += ["", "## Settings", ""]
        for run in self.compared:
            lines += [f"- {run.method}: recipe {run.recipe}{_settings(run)}", f"  `{run.command}`"]
        return "\n".join(lines) + "\n"


def _row(run: Compared) -> Row:
    if run.reason is not None:
        return Row(method=run.method, reason=run.reason)
    with of_a_run(run.folder):
        directory = run.directory
        summary, metrics = directory.read("summary"), directory.read_metrics()
        config = directory.read_config()
        samples, tokens = summary["samples"], summary["tokens"]
        speed = summary["tokens_per_second"]
        late_speed = _speed_after_first(metrics) or speed
        peak, total = float(summary["peak_memory_gib"]), float(summary["total_peak_memory_gib"])
        losses = {line["step"]: line["eval_loss"] for line in metrics if line.get("eval_loss") is not None}
        after = losses.get(max(losses, default=0))
        if config.get("load_best_model_at_end") and summary["best_eval_loss"] is not None:
            after = summary["best_eval_loss"]
        return Row(
            method=run.method,
            base=str(config["quantize_mode"]),
            trainable_parameters=summary["trainable_parameters"],
            gpus=summary["world_size"],
            samples=samples,
            seconds=tokens / speed if speed else None,
            seconds_per_1000_samples=1000 * tokens / samples / late_speed if samples and late_speed else None,
            peak_memory_gb=peak * GIB / GB,
            total_peak_memory_gb=total * GIB / GB,
            eval_loss_before=losses.get(0),
            eval_loss_after=after,
            disk_bytes=sum(file.stat().st_size for file in directory.adapter.glob("*.safetensors")),
        )


def _speed_after_first(metrics: Sequence[Mapping[str, Any]]) -> float | None:
    """Tokens/s over all logged intervals but the first, or over that where there is no other."""
    lines = [{"tokens": 0}, *(line for line in metrics if line.get("tokens_per_second"))]
    intervals = [
        (line["tokens"] - before["tokens"], line["tokens_per_second"])
        for before, line in itertools.pairwise(lines)
    ]
    later = intervals[1:] or intervals
    seconds = sum(tokens / speed for tokens, speed in later)
    return sum(tokens for tokens, _ in later) / seconds if later else None


def _of_gpus(row: Row) -> str:
    return f"{row.peak_memory_gb:.2f}" if row.gpus == 1 else f"{row.gpus} × {row.peak_memory_gb:.2f}"


def _cells(row: Row, each: str) -> dict[str, str]:
    """Title → text; `each` is what memory is counted for, a GPU or a process."""
    why = None if row.reason is None else f"not run: {' '.join(row.reason.split()).replace('|', '/')}"
    return {
        "method": row.method,
        "base": why or row.base or "",
        "trainable parameters": _number(row.trainable_parameters, ","),
        "GPUs" if each == "GPU" else "processes": _number(row.gpus, "d"),
        "samples": _number(row.samples, ","),
        "time": _duration(row.seconds),
        "s per 1,000 samples": _number(row.seconds_per_1000_samples, ".4g"),
        "ratio to full": _number(row.time_ratio_to_full, ".2f"),
        f"peak GB a {each}": _number(row.peak_memory_gb, ".2f"),
        "in total": _number(row.total_peak_memory_gb, ".2f"),
        "evaluation loss before": _number(row.eval_loss_before, ".4f"),
        "after": _number(row.eval_loss_after, ".4f"),
        "on disk, MB": _number(row.disk_bytes and row.disk_bytes / 1e6, ",.2f"),
    }


def _settings(run: Compared) -> str:
    if run.reason is not None:
        return ""
    config = RunDirectory(run.folder).read_config()
    return (
        f"; learning rate {config['learning_rate']:g} ({config['lr_scheduler_type']}), {config['optim']}, "
        f"{config['compute_dtype']}"
    )


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"
