"""Runs by several methods on the same rows, side by side: a table, a CSV file and two pictures.

Everything comes from the run directories; no model is loaded and no model code imported.
"""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from falcon_qlora.common.files import replaced, write_text
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.common.untrusted import of_a_run
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal import charts

FULL = "full"

TABLE, CSV = "comparison.md", "comparison.csv"
TIME_PICTURE, MEMORY_PICTURE = "training-time.png", "memory-requirements.png"


@dataclass(frozen=True, kw_only=True)
class Published:
    """What the comparison of June 2023 measured for Falcon-7B on A100 GPUs; GB is 10^9 bytes."""

    samples: int
    seconds: int
    peak_memory_gb: float
    gpus: int

    @property
    def seconds_per_1000_samples(self) -> float:
        return 1000 * self.seconds / self.samples

    @property
    def total_peak_memory_gb(self) -> float:
        return self.peak_memory_gb * self.gpus


PUBLISHED = {
    "adapter": Published(samples=52_000, seconds=4140, peak_memory_gb=16.20, gpus=1),
    "adapter_v2": Published(samples=52_000, seconds=5160, peak_memory_gb=16.97, gpus=1),
    "lora": Published(samples=52_000, seconds=4140, peak_memory_gb=16.27, gpus=1),
    FULL: Published(samples=300_000, seconds=31_920, peak_memory_gb=39.45, gpus=6),
}


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


class Bar(NamedTuple):
    """A bar of a picture: its height, and what stands above it."""

    label: str
    height: float
    text: str


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
        full = next((row.seconds_per_1000_samples for row in rows if row.method == FULL), None)
        return [
            replace(row, time_ratio_to_full=row.seconds_per_1000_samples / full)
            if full and row.seconds_per_1000_samples
            else row
            for row in rows
        ]

    def on_gpus(self) -> bool:
        """Whether the runs were made on GPUs; if not, memory is what the processes held on the CPU."""
        done = [RunDirectory(run.folder) for run in self.compared if run.reason is None]
        return any(directory.read_environment().get("gpus") for directory in done)

    def time_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: seconds per 1,000 samples."""
        return self._bars(
            lambda of: of.seconds_per_1000_samples, lambda of: f"{of.seconds_per_1000_samples:.3g} s"
        )

    def memory_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: peak memory of all processes, GB."""
        return self._bars(lambda of: of.total_peak_memory_gb, _of_gpus)

    def _bars(
        self, height: Callable[[Row | Published], float | None], text: Callable[[Row | Published], str]
    ) -> dict[str, list[Bar]]:
        figures: dict[str, list[tuple[str, Row | Published]]] = {
            "this comparison": [(row.method, row) for row in self.rows]
        }
        if self.published:
            known = [row.method for row in self.rows if row.method in PUBLISHED]
            figures["June 2023, A100"] = [(method, PUBLISHED[method]) for method in known]
        return {
            series: [Bar(method, high, text(of)) for method, of in each if (high := height(of)) is not None]
            for series, each in figures.items()
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
        names = (TABLE, CSV, TIME_PICTURE, MEMORY_PICTURE)
        return [folder / name for name in names if (folder / name).exists()]

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
        titles = (
            f"method | base | trainable parameters | {each}{'s' if each == 'GPU' else 'es'} | samples | "
            f"time | s per 1,000 samples | ratio to full | peak GB a {each} | in total | "
            "evaluation loss before | after | on disk, MB"
        ).split(" | ")
        lines = [f"# {self.title}", "", f"| {' | '.join(titles)} |", "|---" * len(titles) + "|"]
        lines += [f"| {' | '.join(_cells(row, len(titles)))} |" for row in self.rows]
        lines += [
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
            lines += ["", *_published_table()]
        lines += ["", "## Settings", ""]
        for run in self.compared:
            lines += [f"- {run.method}: recipe {run.recipe}{_settings(run)}", f"  `{run.command}`"]
        return "\n".join(lines) + "\n"


def _row(run: Compared) -> Row:
    if run.reason is not None:
        return Row(method=run.method, reason=run.reason)
    with of_a_run(run.folder):
        directory = RunDirectory(run.folder)
        summary, metrics = directory.read_summary(), directory.read_metrics()
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
    intervals, before = [], 0
    for line in metrics:
        if line.get("tokens_per_second"):
            tokens = line["tokens"] - before
            intervals.append((tokens, tokens / line["tokens_per_second"]))
            before = line["tokens"]
    later = intervals[1:] or intervals
    if not later:
        return None
    tokens, seconds = (sum(values) for values in zip(*later, strict=True))
    return tokens / seconds


def _of_gpus(of: Row | Published) -> str:
    return f"{of.peak_memory_gb:.2f}" if of.gpus in (None, 1) else f"{of.gpus} × {of.peak_memory_gb:.2f}"


def _cells(row: Row, count: int) -> list[str]:
    if row.reason is not None:
        cells = [row.method, f"not run: {' '.join(row.reason.split()).replace('|', '/')}"]
        return cells + [""] * (count - len(cells))
    return [
        row.method,
        row.base or "",
        f"{row.trainable_parameters:,}",
        f"{row.gpus}",
        _number(row.samples, ","),
        _duration(row.seconds),
        _number(row.seconds_per_1000_samples, ".4g"),
        _number(row.time_ratio_to_full, ".2f"),
        _number(row.peak_memory_gb, ".2f"),
        _number(row.total_peak_memory_gb, ".2f"),
        _number(row.eval_loss_before, ".4f"),
        _number(row.eval_loss_after, ".4f"),
        _number(row.disk_bytes / 1e6 if row.disk_bytes is not None else None, ",.2f"),
    ]


def _settings(run: Compared) -> str:
    if run.reason is not None:
        return ""
    config = RunDirectory(run.folder).read_config()
    return (
        f"; learning rate {config['learning_rate']:g} ({config['lr_scheduler_type']}), {config['optim']}, "
        f"{config['compute_dtype']}"
    )


def _published_table() -> list[str]:
    lines = [
        "As published in June 2023 (Lit-Parrot, Falcon-7B in bf16, A100 GPUs):",
        "",
        "| method | GPUs | samples | time | s per 1,000 samples | peak GB a GPU | in total |",
        "|---|---|---|---|---|---|---|",
    ]
    return lines + [
        f"| {method} | {of.gpus} | {of.samples:,} | {_duration(of.seconds)} | "
        f"{of.seconds_per_1000_samples:.4g} | {of.peak_memory_gb:.2f} | {of.total_peak_memory_gb:.2f} |"
        for method, of in PUBLISHED.items()
    ]


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return ""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60}:{minutes % 60:02d} h" if minutes >= 60 else f"{minutes} min"
