"""The guide's table of 2023 with ours beside it: as Markdown, as rows of the CSV, as lines of a picture."""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence
from typing import Any

from falcon_qlora.bench.records import COLUMNS
from falcon_qlora.bench.scaling import Measured

# Samples of 512 positions a second, as published with the guide (Lambda, June 2023); of one GPU and of eight.
PUBLISHED: dict[tuple[str, str], dict[str, dict[int, float]]] = {
    ("7b", "4bit"): {
        "H100 80GB SXM5": {1: 6.7, 8: 55.423},
        "A100 80GB SXM4": {1: 5.024, 8: 39.535},
        "A100 40GB SXM4": {1: 3.9},
        "A6000": {1: 1.895},
        "A10": {1: 1.45},
    },
    ("7b", "8bit"): {
        "A100 80GB SXM4": {1: 1.923, 8: 15.241},
        "A100 40GB SXM4": {1: 1.688},
        "A6000": {1: 1.513},
    },
    ("40b", "4bit"): {"A100 80GB SXM4": {1: 1.111, 8: 8.705}},
    ("40b", "8bit"): {"A100 80GB SXM4": {1: 0.36, 8: 2.85}},
}
_TITLES = (
    "recipe",
    "GPUs",
    "512-token samples/s",
    "tokens/s",
    "scaling",
    "peak GB a GPU",
    "ms a step",
    "whole command, s",
)
_VERSIONS = ("torch", "transformers", "trl", "peft", "bitsandbytes")


def csv_row(
    measured: Measured, one_gpu: Measured | None, *, machine: Mapping[str, str], notes: Sequence[str]
) -> dict[str, Any]:
    """The columns of the bench's CSV, and ``command_seconds``.

    Args:
        measured: what was run.
        one_gpu: the same on one GPU, which `ratio_to_first` is to.
        machine: ``commit``, ``gpu``, ``driver`` and ``torch``.
        notes: put behind what the run itself says.
    """
    row = measured.row
    on_gpu = machine["gpu"] != "CPU"
    dtype = {"recipe": "fp16", "ours-fp8": "fp8"}.get(row.name, "bf16") if on_gpu else "fp32"
    made: dict[str, Any] = dict.fromkeys(COLUMNS, "") | {
        "date": datetime.date.today().isoformat(),
        **machine,
        "gpus": row.gpus,
        "model": row.model,
        "variant": row.label,
        "quantize_mode": row.quantize_mode,
        "compute_dtype": dtype,
        "checkpointing": _flag(row.flags, "--checkpointing") or ("full" if row.recipe else "auto"),
        "micro_batch_tokens": row.work.tokens,
        "command_seconds": round(measured.command_seconds, 1),
    }
    said = [measured.failure] if measured.failure else []
    if not measured.failure:
        speed = measured.tokens_per_second
        made |= {
            "tokens_per_second": round(speed),
            "samples_per_second_512": round(measured.samples_per_second, 2),
            "tflops_4n": round(4 * measured.parameters * speed / 1e12, 3),
            "peak_reserved_gb": round(measured.peak_gb, 2),
            "step_ms": round(1e3 * measured.step_seconds, 1),
        }
        if one_gpu is not None:
            # Of the speeds as they are shown, so that a reader who divides finds the same.
            made["ratio_to_first"] = round(made["tokens_per_second"] / round(one_gpu.tokens_per_second), 3)
            said.append("ratio to one GPU")
        low, high = (f"{1e3 * seconds:,.0f}" for seconds in measured.step_range)
        last, summary = measured.kept["last"], measured.kept["summary"]
        said += [
            f"{measured.timed_steps} of {measured.steps} steps timed, {low} to {high} ms each",
            f"packing efficiency {last.get('packing_efficiency', 1.0):.3f}",
            f"loss {summary['first_loss']:.4f} to {summary['final_loss']:.4f}",
        ]
        if measured.kernels:
            said.append(measured.kernels)
        if shares := summary.get("reduction_shares"):
            each = ", ".join(f"{share:.1%}" for share in shares)
            said.append(f"adding up gradients, share of each process's time, waiting included: {each}")
    if measured.command_seconds:
        said.append(f"command_seconds {measured.command_seconds:.1f}")
    made["note"] = "; ".join([*said, row.work.described(), *notes])
    return made


def _flag(words: Sequence[str], name: str) -> str | None:
    return words[words.index(name) + 1] if name in words else None


def versions(measured: Sequence[Measured]) -> dict[str, str]:
    """Of the libraries, as the first run that got so far recorded them."""
    for each in measured:
        if "environment" in each.kept:
            packages = each.kept["environment"]["packages"]
            return {name: packages[name] for name in _VERSIONS if name in packages}
    return {}


def markdown(rows: Sequence[Mapping[str, Any]], *, caption: str) -> str:
    """A table for each model and quantization, the published figures first, with notes below."""
    counted = "Samples are 512 computed positions, padding included, as in 2023; tokens are real ones."
    lines = [caption, counted, ""]
    for model, mode in dict.fromkeys((row["model"], row["quantize_mode"]) for row in rows):
        of_both = [row for row in rows if (row["model"], row["quantize_mode"]) == (model, mode)]
        lines += [f"### {model}, {mode}", "", f"| {' | '.join(_TITLES)} |", "|" + "---|" * len(_TITLES)]
        lines += [f"| {' | '.join(cells)} |" for cells in _published(model, mode)]
        lines += [f"| {' | '.join(_cells(row))} |" for row in of_both]
        lines.append("")
        lines += [f"- {row['variant']}, GPUs {row['gpus']}: {row['note']}" for row in of_both]
        lines.append("")
    return "\n".join(lines).rstrip()


def _published(model: str, mode: str) -> list[list[str]]:
    # With a changed shape (random:falcon-7b?…) it is another model.
    size = next((size for size in ("40b", "7b") if size in model.lower() and "?" not in model), "")
    found = []
    for gpu, speeds in PUBLISHED.get((size, mode), {}).items():
        for gpus, speed in speeds.items():
            scaling = f"{speed / speeds[1]:.2f}x"
            found.append([f"published in 2023, {gpu}", str(gpus), f"{speed:g}", "", scaling, "", "", ""])
    return found


def _cells(row: Mapping[str, Any]) -> list[str]:
    start = [row["variant"], str(row["gpus"])]
    if row["tokens_per_second"] == "":
        why = row["note"].partition("; ")[0].replace("|", "/")
        return [*start, why, *[""] * (len(_TITLES) - len(start) - 1)]
    return [
        *start,
        f"{row['samples_per_second_512']:.2f}",
        f"{row['tokens_per_second']:,}",
        f"{row['ratio_to_first']:.3f}x" if row["ratio_to_first"] != "" else "",
        f"{row['peak_reserved_gb']:.1f}",
        f"{row['step_ms']:,.1f}",
        f"{row['command_seconds']:.0f}",
    ]


def series(rows: Sequence[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Label to GPUs and samples/s, of each recipe that has figures."""
    many = len({(row["model"], row["quantize_mode"]) for row in rows}) > 1
    found: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row["tokens_per_second"] == "":
            continue
        label = f"{row['model']} {row['quantize_mode']}, {row['variant']}" if many else row["variant"]
        found.setdefault(label, []).append((row["gpus"], row["samples_per_second_512"]))
    return found
