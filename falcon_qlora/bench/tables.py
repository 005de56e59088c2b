"""Results of steps and of whole commands, as rows of one CSV and as Markdown."""

from __future__ import annotations

import csv
import datetime
import itertools
import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.bench.machine import Machine, summary
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import check_writable
from falcon_qlora.common.quantities import GB, GIB, counted
from falcon_qlora.terminal import markdown
from falcon_qlora.terminal.charts import Line, Product
from falcon_qlora.terminal.markdown import escaped

if TYPE_CHECKING:
    from falcon_qlora.bench.measure import Result
    from falcon_qlora.bench.scaling import Measured

Row = dict[str, Any]
COLUMNS = tuple(
    "date commit gpu gpus driver torch model variant quantize_mode compute_dtype checkpointing "
    "micro_batch_tokens tokens_per_second samples_per_second_512 tflops_4n ceiling_share peak_allocated_gb "
    "peak_reserved_gb step_ms ratio_to_first note".split()
)
_HEADER_BYTES = 10_000  # more than the bench's own header takes
_SAMPLE_TOKENS = 512
_CONFIDENCE = 0.95
# Title → column, and how it is shown; the CSV has GB (10^9 bytes), people get GiB as everywhere.
_OF_STEPS = {
    "variant": ("variant", "{}"),
    "base": ("quantize_mode", "{}"),
    "tokens a micro batch": ("micro_batch_tokens", "{:,}"),
    "tokens/s": ("tokens_per_second", "{:,}"),
    "512-token samples/s": ("samples_per_second_512", "{:g}"),
    "TFLOP/s by 4N": ("tflops_4n", "{:g}"),
    "of the ceiling": ("ceiling_share", "{:.1%}"),
    "peak GiB allocated": ("peak_allocated_gb", "{:.2f}"),
    "reserved": ("peak_reserved_gb", "{:.2f}"),
    "ms a step": ("step_ms", "{:,.1f}"),
    "ratio": ("ratio_to_first", "{:.3f}x"),
    "95% interval": ("interval", "{}"),
}
_OF_COMMANDS = {
    "recipe": ("variant", "{}"),
    "GPUs": ("gpus", "{}"),
    "512-token samples/s": ("samples_per_second_512", "{:.2f}"),
    "tokens/s": ("tokens_per_second", "{:,}"),
    "scaling": ("ratio_to_first", "{:.3f}x"),
    "of the same GPUs alone": ("share_of_alone", "{:.1%}"),
    "peak GiB a GPU": ("peak_reserved_gb", "{:.1f}"),
    "ms a step": ("step_ms", "{:,.1f}"),
    "whole command, s": ("command_seconds", "{:.0f}"),
}


def check_csv(file: Path) -> None:
    """Refuse a file that is not writable or has other columns.

    Raises:
        UserError: naming the file.
    """
    check_writable(file, "--csv")
    if not file.exists():
        return
    with file.open("rb") as opened:
        first = opened.readline(_HEADER_BYTES)
    # A file that is not text also counts as one with other columns.
    if first and first.decode(errors="replace").strip() != ",".join(COLUMNS):
        raise UserError(f"--csv {file}: its columns are not the bench's; name another file")


def append_csv(file: Path, rows: Sequence[Row]) -> None:
    """Append the rows to `file`, which is created if it does not exist."""
    file.parent.mkdir(parents=True, exist_ok=True)
    written = file.read_bytes() if file.exists() else b""
    with file.open("a", newline="", encoding="utf-8") as opened:
        if written and not written.endswith(b"\n"):
            opened.write("\n")  # an editor removed it: the first row would continue the last line
        writer = csv.DictWriter(opened, COLUMNS, extrasaction="ignore", lineterminator="\n")
        if not written:
            writer.writeheader()
        writer.writerows(rows)


def rows_of_steps(
    results: Sequence[Result], machine: Machine, ceilings: Mapping[tuple[str, str], float | None]
) -> list[Row]:
    """One row per result: the CSV's columns, and ``interval``. Ratios are to the model's first row.

    Args:
        results: of one device.
        machine: where they were measured.
        ceilings: (model, compute dtype) → TFLOP/s of a plain product of its shapes, or None.
    """
    made = []
    firsts: dict[str, Result | None] = {}
    for result in results:
        first = firsts.setdefault(result.model, None if result.failure else result)
        ceiling = ceilings.get((result.model, result.variant.compute_dtype))
        made.append(_row_of_steps(result, first, machine, ceiling))
    return made


def _row_of_steps(result: Result, first: Result | None, machine: Machine, ceiling: float | None) -> Row:
    variant = result.variant
    row = new_row(machine) | {
        "gpus": 1,
        "model": result.model,
        "variant": variant.name,
        "quantize_mode": variant.quantize_mode,
        "compute_dtype": variant.compute_dtype,
        "checkpointing": variant.checkpointing,
        "micro_batch_tokens": result.micro_batch_tokens,
        "interval": "",
    }
    notes = [f"not run: {result.failure}"] if result.failure else []
    if not result.failure:
        speed = result.tokens_per_second
        teraflops = 4 * result.parameters * speed / 1e12
        row |= {
            "tokens_per_second": round(speed),
            "samples_per_second_512": round(speed / _SAMPLE_TOKENS, 1),
            "tflops_4n": _digits(teraflops),
            "ceiling_share": round(teraflops / ceiling, 3) if ceiling else "",
            "peak_allocated_gb": round(result.peak_allocated_gb, 2),
            "peak_reserved_gb": round(result.peak_reserved_gb, 2),
            "step_ms": round(result.step_ms, 1),
        }
        if first is not None:
            row["ratio_to_first"] = _ratio(speed, first.tokens_per_second)
            if interval := ratio_interval(first, result):
                row["interval"] = f"{interval[0]:.3f}–{interval[1]:.3f}"
                notes.append(f"95% interval {row['interval']}")
        if result.loss is not None:
            notes.append(f"first loss {result.loss:.4f}")
        notes.append(f"{sum(result.steps)} steps in {len(result.seconds)} rounds")
        if ceiling:
            notes.append(f"product ceiling {_digits(ceiling)} TFLOP/s")
        if not machine.gpus:
            notes.append("memory is the process's")
        if clocks := summary(result.states_of_gpu):
            notes.append(clocks)
    row["note"] = "; ".join([*notes, *result.notes])
    return row


def row_of_command(
    measured: Measured, alone: Sequence[Measured], *, machine: Machine, notes: Sequence[str]
) -> Row:
    """The columns of the CSV, ``command_seconds`` and ``share_of_alone``.

    Args:
        measured: what was run.
        alone: the same command on each GPU alone, as far as there are figures; `ratio_to_first` is to the
            first, `share_of_alone` to the sum of as many as the row has.
        machine: where it was measured.
        notes: appended to the row's note.
    """
    row = measured.row
    flags = dict(itertools.pairwise(row.flags))
    made = new_row(machine) | {
        "gpus": row.gpus,
        "model": row.model,
        "variant": row.label,
        "quantize_mode": row.quantize_mode,
        "compute_dtype": row.command.compute_dtype if machine.gpus else "fp32",
        "checkpointing": flags.get("--checkpointing", row.command.checkpointing),
        "micro_batch_tokens": row.work.tokens,
        "command_seconds": round(measured.command_seconds, 1),
        "share_of_alone": "",
    }
    said = [measured.failure] if measured.failure else []
    if not measured.failure:
        speed = measured.tokens_per_second
        last, of_run = measured.kept["last"], measured.kept["summary"]
        parameters = of_run["total_parameters"] - of_run["trainable_parameters"]
        made |= {
            "tokens_per_second": round(speed),
            "samples_per_second_512": round(measured.samples_per_second, 2),
            "tflops_4n": round(4 * parameters * speed / 1e12, 3),
            "peak_reserved_gb": round(measured.peak_gb, 2),
            "step_ms": round(1e3 * measured.step_seconds, 1),
        }
        if row.card is not None:
            said.append(f"GPU {row.card} alone")
        if alone:
            made["ratio_to_first"] = _ratio(speed, alone[0].tokens_per_second)
            said.append("ratio to one GPU")
        if 1 < row.gpus <= len(alone):
            speeds = [round(one.tokens_per_second) for one in alone[: row.gpus]]
            made["share_of_alone"] = round(round(speed) / sum(speeds), 4)
            summed = " + ".join(f"{one:,}" for one in speeds)
            said.append(f"{made['share_of_alone']:.1%} of the same GPUs alone ({summed} tokens/s)")
        low, high = (f"{1e3 * seconds:,.0f}" for seconds in measured.step_range)
        said += [
            f"{measured.timed_steps} of {measured.steps} steps timed, {low} to {high} ms each",
            f"packing efficiency {last.get('packing_efficiency', 1.0):.3f}",
            f"loss {of_run['first_loss']:.4f} to {of_run['final_loss']:.4f}",
        ]
        ways = Counter(measured.kept["kernels"].values())
        said += [f"{counted(count, 'block')}: {what}" for what, count in ways.items()]
        if shares := of_run.get("reduction_shares"):
            each = ", ".join(f"{share:.1%}" for share in shares)
            said.append(f"adding up gradients, share of each process's time, waiting included: {each}")
    if measured.command_seconds:
        said.append(f"command_seconds {measured.command_seconds:.1f}")
    made["note"] = "; ".join([*said, row.work.described(), *notes])
    return made


def new_row(machine: Machine) -> Row:
    return dict.fromkeys(COLUMNS, "") | {
        "date": datetime.date.today().isoformat(),
        **asdict(machine),
    }


def _ratio(speed: float, first: float) -> float:
    """Ratio of the speeds as rounded for the table, so that a reader who divides them gets the same."""
    return round(round(speed) / round(first), 3)


def ratio_interval(first: Result, result: Result) -> tuple[float, float] | None:
    """95 % interval of the ratio of speeds, paired by round; None for the first row or below two rounds.

    Student's t on the logarithms of the rounds' ratios.
    """
    from scipy import stats

    logs = [
        math.log((tokens / seconds) / (first_tokens / first_seconds))
        for tokens, seconds, first_tokens, first_seconds in zip(
            result.tokens, result.seconds, first.tokens, first.seconds, strict=False
        )
    ]
    if result is first or len(logs) < 2:
        return None
    found = stats.ttest_1samp(logs, 0.0).confidence_interval(_CONFIDENCE)
    return math.exp(found.low), math.exp(found.high)


def _digits(value: float) -> float:
    """Three significant digits at least, whole numbers from 100 on."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def steps_in_markdown(rows: Sequence[Row]) -> str:
    """A table for each model, with its notes below."""
    return _markdown(
        rows, _OF_STEPS, heading="{model}", label="{variant}, {micro_batch_tokens:,} tokens", figures_from=3
    )


def commands_in_markdown(rows: Sequence[Row], *, caption: str) -> str:
    """A table for each model and quantization, with its notes below."""
    counted = "Samples are 512 computed positions, padding included, as in 2023; tokens are real ones."
    tables = _markdown(
        rows,
        _OF_COMMANDS,
        heading="{model}, {quantize_mode}",
        label="{variant}, GPUs {gpus}",
        figures_from=2,
    )
    return f"{caption}\n{counted}\n\n{tables}".rstrip()


def _markdown(
    rows: Sequence[Row],
    columns: Mapping[str, tuple[str, str]],
    *,
    heading: str,
    label: str,
    figures_from: int,
) -> str:
    """A table for the rows of each heading, notes below; a row without figures shows the reason instead."""
    sections: dict[str, list[Row]] = {}
    for row in rows:
        sections.setdefault(heading.format_map(row), []).append(row)
    lines = []
    for section, of_section in sections.items():
        cells = []
        for row in of_section:
            shown = [
                "" if row[name] == "" else form.format(_shown(row, name)) for name, form in columns.values()
            ]
            if row["tokens_per_second"] == "":
                shown[figures_from:] = [row["note"].partition("; ")[0]]
            cells.append(shown)
        lines += [f"### {escaped(section)}", "", *markdown.table(list(columns), cells), ""]
        lines += [*(f"- {escaped(label.format_map(row))}: {escaped(row['note'])}" for row in of_section), ""]
    return "\n".join(lines).rstrip()


def _shown(row: Row, column: str) -> Any:
    return float(row[column]) * GB / GIB if column.endswith("_gb") else row[column]


def speed_over_memory(rows: Sequence[Row]) -> dict[str, Line]:
    """Label → peak GiB allocated and tokens/s, for each variant that has figures."""
    return _lines(
        rows, "peak_allocated_gb", "tokens_per_second", lambda row: f"{row['model'].partition('?')[0]} "
    )


def speed_over_gpus(rows: Sequence[Row]) -> dict[str, Line]:
    """Label → GPUs and samples/s, for each recipe that has figures; of GPUs alone the first."""
    once = {(row["model"], row["quantize_mode"], row["variant"], row["gpus"]): row for row in rows[::-1]}
    shown = [row for row in rows if row in once.values()]
    return _lines(shown, "gpus", "samples_per_second_512", "{model} {quantize_mode}, ".format_map)


def _lines(rows: Sequence[Row], x: str, y: str, kind: Callable[[Row], str]) -> dict[str, Line]:
    """Lines by label: the variant's name, after its kind if there are several kinds."""
    many = len({kind(row) for row in rows}) > 1
    found: dict[str, Line] = {}
    for row in rows:
        if row["tokens_per_second"] != "":
            label = (kind(row) if many else "") + row["variant"]
            found.setdefault(label, Line(_product(row), [])).points.append(
                (float(_shown(row, x)), float(row[y]))
            )
    return found


def _product(row: Row) -> Product:
    own = VARIANTS.get(row["variant"].partition(",")[0])  # without the caches of a whole run
    if own is None or own.engine is not None:
        return "other tools"
    if own.kernels == "off":
        return "reference"
    return "FP8" if row["compute_dtype"] == "fp8" else "bf16"
