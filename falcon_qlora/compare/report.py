"""Compare runs in a table, a CSV file and pictures, made from the run directories alone."""

from __future__ import annotations

import csv
import functools
import io
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import one_line
from falcon_qlora.common.files import replaced, write_text
from falcon_qlora.common.quantities import GB, GIB, duration, sized
from falcon_qlora.common.untrusted import of_a_run
from falcon_qlora.compare.figures import Compared, Figures, figures
from falcon_qlora.run_folder.directory import RunDirectory, batch_of
from falcon_qlora.terminal import charts, markdown
from falcon_qlora.terminal.charts import Bar
from falcon_qlora.terminal.markdown import code, escaped

TABLE, CSV = "comparison.md", "comparison.csv"
TIME_PICTURE, MEMORY_PICTURE = "training-time.png", "memory-requirements.png"
LOSS_PICTURE, CURVES = "evaluation-loss.png", "loss-curves.png"


def _published(name: str, samples: int, seconds: int, peak_memory_gb: float, gpus: int = 1) -> Figures:
    peak = peak_memory_gb * GB / GIB
    return Figures(
        name=name,
        gpus=gpus,
        samples=samples,
        seconds=seconds,
        seconds_per_1000_samples=1000 * seconds / samples,
        peak_memory_gib=peak,
        total_peak_memory_gib=peak * gpus,
    )


# Measured in June 2023 for Falcon-7B on A100 GPUs; memory as published, in GB (10^9 bytes).
PUBLISHED = [
    _published("adapter", 52_000, 4140, 16.20),
    _published("adapter_v2", 52_000, 5160, 16.97),
    _published("lora", 52_000, 4140, 16.27),
    _published("full", 300_000, 31_920, 39.45, gpus=6),
]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The runs, and the files made from them.

    Attributes:
        published: whether the model has Falcon-7B's shapes, so that the figures of June 2023 are shown too.
        differences: as `plan.differences` returns them.
    """

    title: str
    compared: Sequence[Compared]
    published: bool = False
    differences: Sequence[str] = ()

    @functools.cached_property
    def rows(self) -> list[Figures]:
        """The figures of every run."""
        rows = [figures(run) for run in self.compared]
        of_full = [row.seconds_per_1000_samples for row in rows if row.name == "full"]
        full = _mean([each for each in of_full if each is not None])
        return [
            replace(row, time_ratio_to_full=row.seconds_per_1000_samples / full)
            if full and row.seconds_per_1000_samples
            else row
            for row in rows
        ]

    @functools.cached_property
    def on_gpus(self) -> bool:
        """Whether the runs used GPUs; if not, memory is what the processes held on the CPU."""
        found = False
        for run in self._made():
            with of_a_run(run.folder):
                directory = RunDirectory(run.folder)
                if (directory.path / "environment.json").exists():  # runs of earlier releases have none
                    found |= bool(directory.read("environment").get("gpus"))
        return found

    def time_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: seconds per 1,000 samples."""
        return self._with_published("seconds_per_1000_samples", lambda mean, row: f"{mean:.3g} s")

    def memory_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: peak memory of all processes together, GiB."""
        return self._with_published("total_peak_memory_gib", _of_gpus)

    def loss_bars(self) -> dict[str, list[Bar]]:
        """Series → its bars: evaluation loss, after and before training."""
        figures = {"after training": "eval_loss_after", "before": "eval_loss_before"}
        return {
            title: _bars(self.rows, name, lambda mean, row: f"{mean:.3f}") for title, name in figures.items()
        }

    def _with_published(self, height: str, text: Callable[[float, Figures], str]) -> dict[str, list[Bar]]:
        series = {"this comparison": _bars(self.rows, height, text)}
        if self.published:
            series["June 2023, A100"] = _bars(self._published_figures(), height, text)
        return series

    def write(self, folder: Path) -> list[Path]:
        """Write the table, the CSV file and the pictures; returns their paths."""
        write_text(folder / TABLE, self.markdown())
        write_text(folder / CSV, self.csv())
        curves = [(run.name, RunDirectory(run.folder).read_metrics()) for run in self._made()]
        with replaced(folder / CURVES) as temporary:
            charts.draw_curves(curves, temporary, title=self.title)
        written = (TABLE, CSV, *self.draw_bars(folder), CURVES)
        return [folder / name for name in written if (folder / name).exists()]

    def draw_bars(self, folder: Path) -> list[str]:
        """Draw the bar charts; returns their file names."""
        where = "GPUs" if self.on_gpus else "processes"
        memory = f"peak memory, GiB, all {where} together"
        loss = "loss on held-out rows (nats per target token)"
        pictures = {
            TIME_PICTURE: (self.time_bars(), "seconds per 1,000 samples", "Training time"),
            MEMORY_PICTURE: (self.memory_bars(), memory, "Memory requirements"),
            LOSS_PICTURE: (self.loss_bars(), loss, "Evaluation loss"),
        }
        for name, (series, axis, title) in pictures.items():
            with replaced(folder / name) as temporary:
                charts.draw_bars(series, temporary, axis=axis, title=f"{title}: {self.title}")
        return list(pictures)

    def csv(self) -> str:
        """One line for each run, with all digits."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [each.name for each in fields(Figures)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(row) for row in self.rows)
        return text.getvalue()

    def markdown(self) -> str:
        """The table, followed by what it counts and which settings differ."""
        each, held = "GPU", "what PyTorch reserved"
        if not self.on_gpus:
            each, held = "process", "what the processes held, their libraries included: there was no GPU"
        done = [row for row in self.rows if row.reason is None]
        lines = [f"# {escaped(self.title)}", "", *_table(done, each), ""]
        for row in self.rows:
            if row.reason is not None:
                lines += [escaped(f"{row.name} was not run: {one_line(row.reason)}"), ""]
        lines.append(
            "A sample is a row of the data as it was tokenized. The time of the steps leaves out start, "
            "evaluations and saving; that of the whole command has them. The seconds per 1,000 samples are "
            "of the steps after the first logged interval, in which kernels are compiled. Peak memory is "
            f"{held}."
        )
        if len({row.name for row in self.rows}) < len(self.rows):
            lines += ["", "Of several seeds: the mean (lowest to highest); on the charts, too."]
        if self.published:
            lines += ["", "As published in June 2023 (Lit-Parrot, Falcon-7B in bf16, A100 GPUs):", ""]
            lines += _table(self._published_figures(), "GPU")
        lines += self._settings_that_differ()
        if self.differences:
            lines += ["", "## Not as `train` with these flags", ""]
            lines += [f"- {escaped(line)}" for line in self.differences]
        commands = [
            f"- {escaped(run.folder.name)}: {code(run.command)}" for run in self.compared if run.command
        ]
        lines += ["", "## Commands", "", *commands] if commands else []
        return "\n".join(lines) + "\n"

    def _settings_that_differ(self) -> list[str]:
        """A table of the settings in which runs differ; the first run of a name stands for all its seeds."""
        settings: dict[str, dict[str, Any]] = {}
        for run, row in zip(self.compared, self.rows, strict=True):
            if run.reason is None and run.name not in settings:
                with of_a_run(run.folder):
                    of_run = RunDirectory(run.folder).read_config()
                # A run that went on has written down the size of its steps, others what makes it.
                batch = {"global_batch_size": batch_of(of_run, row.gpus)}
                left_out = {*batch, "gradient_accumulation_steps"}
                settings[run.name] = {name: of_run[name] for name in of_run if name not in left_out}
                settings[run.name] |= batch if batch["global_batch_size"] is not None else {}
        differing = []
        for setting in dict.fromkeys(name for each in settings.values() for name in each):
            # Runs of other methods or earlier releases lack some settings.
            had = {_shown(each[setting]) for each in settings.values() if setting in each}
            if len(had) > 1:
                differing.append([setting, *(_shown(each.get(setting)) for each in settings.values())])
        if not differing:
            return []
        return ["", "## Settings that differ", "", *markdown.table(["", *settings], differing)]

    def _made(self) -> list[Compared]:
        return [run for run in self.compared if run.reason is None]

    def _published_figures(self) -> list[Figures]:
        names = {row.name for row in self.rows}
        return [row for row in PUBLISHED if row.name in names]


def _bars(rows: Sequence[Figures], height: str, text: Callable[[float, Figures], str]) -> list[Bar]:
    """One bar for each name with this figure: the mean over its seeds."""
    bars = []
    for name, group in _by_name(rows).items():
        heights = [high for row in group if (high := getattr(row, height)) is not None]
        mean = _mean(heights)
        if mean is not None:
            bars.append(Bar(name, mean, text(mean, group[0]), min(heights), max(heights)))
    return bars


def _by_name(rows: Sequence[Figures]) -> dict[str, list[Figures]]:
    groups: dict[str, list[Figures]] = {}
    for row in rows:
        groups.setdefault(row.name, []).append(row)
    return groups


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _of_gpus(total: float, row: Figures) -> str:
    return f"{total:.2f}" if row.gpus in (None, 1) else f"{row.gpus} × {total / row.gpus:.2f}"


def _table(rows: Sequence[Figures], each: str) -> list[str]:
    """One column for each name, one line for each figure that any run has; `each`: ``GPU`` or ``process``."""
    figures: dict[str, tuple[str, Callable[[Any], str]]] = {
        "base": ("base", _shown),
        "trainable parameters": ("trainable_parameters", "{:,.0f}".format),
        "GPUs" if each == "GPU" else "processes": ("gpus", "{:.0f}".format),
        "steps": ("steps", "{:,.0f}".format),
        "samples": ("samples", "{:,.0f}".format),
        "time of the steps": ("seconds", _duration),
        "of the whole command": ("wall_seconds", _duration),
        "tokens/s in the steps": ("tokens_per_second", "{:,.0f}".format),
        "over the whole command": ("wall_tokens_per_second", "{:,.0f}".format),
        "s per 1,000 samples": ("seconds_per_1000_samples", "{:.4g}".format),
        "ratio to full": ("time_ratio_to_full", "{:.2f}".format),
        f"peak GiB a {each}": ("peak_memory_gib", "{:.2f}".format),
        "peak GiB in total": ("total_peak_memory_gib", "{:.2f}".format),
        "last training loss": ("loss", "{:.4f}".format),
        "evaluation loss before": ("eval_loss_before", "{:.4f}".format),
        "evaluation loss after": ("eval_loss_after", "{:.4f}".format),
        "on disk": ("disk_bytes", sized),
    }
    groups = _by_name(rows)
    lines = []
    for title, (field, form) in figures.items():
        cells = [_cell([getattr(row, field) for row in group], form) for group in groups.values()]
        if field == "steps":
            finished = [all(row.finished for row in group) for group in groups.values()]
            cells = [
                cell if whole else f"{cell or 0}, not finished"
                for cell, whole in zip(cells, finished, strict=True)
            ]
        if any(cells):
            lines.append([title, *cells])
    return markdown.table(["", *groups], lines)


def _cell(values: Sequence[Any], form: Callable[[Any], str]) -> str:
    """The mean of the known values, with the lowest and the highest if they print differently."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if isinstance(known[0], str):
        return form(known[0])
    low, high = form(min(known)), form(max(known))
    return low if low == high else f"{form(sum(known) / len(known))} ({low} to {high})"


def _duration(seconds: float) -> str:
    return duration(seconds) if seconds >= 60 else f"{seconds:.1f} s"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    text = "" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    return text.lower() if isinstance(value, bool) else text
