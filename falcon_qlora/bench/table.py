"""The results as a Markdown table, as rows of the CSV and as points of a picture."""

from __future__ import annotations

import datetime
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from falcon_qlora.bench.clock import summary
from falcon_qlora.bench.measure import Result
from falcon_qlora.bench.records import COLUMNS

_SAMPLE_TOKENS = 512
_CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What the rows were measured on.

    Attributes:
        commit: of this project.
        gpu: its name, or CPU.
        driver: its version, or empty.
        torch: PyTorch's version.
        ceilings: model and compute dtype to TFLOP/s of a plain product of its shapes, or None.
    """

    commit: str
    gpu: str
    driver: str
    torch: str
    ceilings: Mapping[tuple[str, str], float | None]


def ratio_interval(first: Result, result: Result) -> tuple[float, float] | None:
    """95 % interval of the ratio of speeds, from the rounds as pairs; None where there are too few of them.

    Student's t on the logarithms of the ratios of each round.
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


def rows(results: Sequence[Result], machine: Machine) -> list[dict[str, Any]]:
    """One dict a result: the CSV's columns, and ``interval``. Ratios are to the model's first row."""
    made = []
    firsts: dict[str, Result | None] = {}
    for result in results:
        first = firsts.setdefault(result.model, None if result.failure else result)
        made.append(_row(result, first, machine))
    return made


def _row(result: Result, first: Result | None, machine: Machine) -> dict[str, Any]:
    variant = result.entry.variant
    row: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
        "date": datetime.date.today().isoformat(),
        "commit": machine.commit,
        "gpu": machine.gpu,
        "gpus": 1,
        "driver": machine.driver,
        "torch": machine.torch,
        "model": result.model,
        "variant": variant.name,
        "quantize_mode": variant.quantize_mode,
        "compute_dtype": variant.compute_dtype,
        "checkpointing": variant.checkpointing,
        "micro_batch_tokens": result.micro_batch_tokens or result.entry.tokens,
        "interval": "",
    }
    notes = [f"not run: {result.failure}"] if result.failure else []
    if not result.failure:
        speed = result.tokens_per_second
        ceiling = machine.ceilings[result.model, variant.compute_dtype]
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
            # Of the speeds as they are shown, so that a reader who divides finds the same.
            row["ratio_to_first"] = round(round(speed) / round(first.tokens_per_second), 3)
            interval = ratio_interval(first, result)
            if interval is not None:
                row["interval"] = f"{interval[0]:.3f}–{interval[1]:.3f}"
                notes.append(f"95% interval {row['interval']}")
        if result.loss is not None:
            notes.append(f"first loss {result.loss:.4f}")
        notes.append(f"{sum(result.steps)} steps in {len(result.seconds)} rounds")
        if ceiling:
            notes.append(f"product ceiling {_digits(ceiling)} TFLOP/s")
        if machine.gpu == "CPU":
            notes.append("memory is the process's")
        if clocks := summary(result.kept.get("states_of_gpu", [])):
            notes.append(clocks)
    row["note"] = "; ".join([*notes, *result.notes])
    return row


def _digits(value: float) -> float:
    """Three significant digits at least, whole numbers from 100 on."""
    return round(value) if value >= 100 else float(f"{value:.3g}")


def markdown(made: Sequence[Mapping[str, Any]]) -> str:
    """A table for each model, with its notes below."""
    titles = (
        "variant",
        "base",
        "tokens a micro batch",
        "tokens/s",
        "512-token samples/s",
        "TFLOP/s by 4N",
        "of the ceiling",
        "peak GB allocated",
        "reserved",
        "ms a step",
        "ratio",
        "95% interval",
    )
    lines = []
    for model in dict.fromkeys(row["model"] for row in made):
        of_model = [row for row in made if row["model"] == model]
        lines += [f"### {model}", "", f"| {' | '.join(titles)} |", "|" + "---|" * len(titles)]
        lines += [f"| {' | '.join(_cells(row, len(titles)))} |" for row in of_model]
        lines.append("")
        lines += [
            f"- {row['variant']}, {row['micro_batch_tokens']:,} tokens: {row['note']}" for row in of_model
        ]
        lines.append("")
    return "\n".join(lines).rstrip()


def _cells(row: Mapping[str, Any], count: int) -> list[str]:
    start = [row["variant"], row["quantize_mode"], f"{row['micro_batch_tokens']:,}"]
    if row["tokens_per_second"] == "":
        return [*start, row["note"].partition("; ")[0].replace("|", "/"), *[""] * (count - len(start) - 1)]
    return [
        *start,
        f"{row['tokens_per_second']:,}",
        f"{row['samples_per_second_512']:g}",
        f"{row['tflops_4n']:g}",
        f"{row['ceiling_share']:.1%}" if row["ceiling_share"] != "" else "",
        f"{row['peak_allocated_gb']:.2f}",
        f"{row['peak_reserved_gb']:.2f}",
        f"{row['step_ms']:,.1f}",
        f"{row['ratio_to_first']:.3f}x" if row["ratio_to_first"] != "" else "",
        row["interval"],
    ]


def points(made: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, float]]:
    """Label, peak GB allocated and tokens/s of each row that has figures; the label is the variant's."""
    many_models = len({row["model"] for row in made}) > 1
    return [
        (
            (f"{row['model'].partition('?')[0]} " if many_models else "") + row["variant"],
            row["peak_allocated_gb"],
            row["tokens_per_second"],
        )
        for row in made
        if row["tokens_per_second"] != ""
    ]
