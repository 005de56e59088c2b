"""The 2023 data-parallel QLoRA guide's recipe as a row of ``bench --gpus``, and its published throughput."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from falcon_qlora.bench import scaling
from falcon_qlora.bench.scaling import Command, Measured, Row, Run, with_caches
from falcon_qlora.common.errors import UserError

BATCH = 16  # rows of a micro batch of a whole run
# Of the recipe at least so many steps are timed, however small its share.
_LEAST_TIMED = 5

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


def published() -> str:
    """The guide's table as Markdown."""
    lines = ["### Published in 2023, 512-token samples/s", "", "| model | base | GPU | 1 | 8 | scaling |"]
    lines.append("|---|---|---|---|---|---|")
    for (size, mode), speeds in PUBLISHED.items():
        for gpu, of_gpus in speeds.items():
            one, eight = of_gpus[1], of_gpus.get(8)
            ends = f"{eight:g} | {eight / one:.2f}x" if eight else "| "
            lines.append(f"| Falcon-{size.upper()} | {mode} | {gpu} | {one:g} | {ends} |")
    return "\n".join(lines)


def _name(model: str, quantize_mode: str) -> str:
    size = "40b" if "40b" in model.lower() else "7b"
    return f"lambda-{size}-{'8bit' if quantize_mode == '8bit' else '4bit'}"


COMMAND = Command(
    what="the data-parallel QLoRA guide's recipe (--recipe lambda-7b-4bit and kin)",
    compute_dtype="fp16",
    checkpointing="full",
    recipe=_name,
)


def whole_runs(
    rows: Sequence[Row], *, steps: int, warmup: int, run: Run, share: float
) -> Iterator[tuple[Measured, str]]:
    """`scaling.whole_runs`, with the recipe over a share of the rows that ours took.

    The recipe comes as soon as its rows are known, so that a time limit does not cost the comparison. Its
    seconds are extrapolated: those of its command, and the mean of its timed steps for every step left out.

    Args:
        rows: what to run: of each model, quantization and number of GPUs the recipe over the same rows as the
            first of ours that ends well.
        steps: of ours.
        warmup: steps at the beginning whose speed does not count.
        run: see `scaling.Run`.
        share: of the recipe's steps, above 0 and at most 1.

    Raises:
        UserError: if there is nothing to compare the recipe with.
    """
    groups: dict[tuple[str, str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((row.model, row.quantize_mode, row.gpus), []).append(row)
    for group in groups.values():
        ours = [row for row in group if row.recipe is None]
        recipe = next((row for row in group if row.recipe is not None), None)
        if not ours:
            raise UserError(
                "--whole_run: the recipe runs over the rows that ours took; --variants needs ours"
            )
        compared: Measured | None = None
        for measured, note in scaling.whole_runs(ours, steps=steps, warmup=warmup, run=run):
            if compared is not None and compared.failure is None and measured.failure is None:
                times = compared.command_seconds / measured.command_seconds
                note += f"; {times:.2f}x as fast as the recipe ({compared.command_seconds:.1f} s)"
            yield measured, note
            if recipe is not None and compared is None and measured.failure is None:
                compared, note = _over_the_rows_of(measured, recipe, share, warmup, run)
                yield compared, note
        if recipe is not None and compared is None:
            yield Measured(row=recipe, failure="not run: ours did not end, so its rows are not known"), ""


def _over_the_rows_of(
    ours: Measured, recipe: Row, share: float, warmup: int, run: Run
) -> tuple[Measured, str]:
    recipe = replace(recipe, work=replace(recipe.work, tokens=BATCH * recipe.work.document))
    rows = ours.kept["last"]["epoch"] * ours.kept["data"]["rows_read"]  # those that came again counted again
    rows_a_step = recipe.work.step_tokens(recipe.gpus) // recipe.work.document
    total = max(1, math.ceil(round(rows / rows_a_step, 6)))
    few = min(total, max(warmup + _LEAST_TIMED, math.ceil(share * total)))
    with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
        cached, variables = with_caches(recipe, Path(folder))
        measured = run(cached, few, min(warmup, few - 1), variables)
    notes = [f"{total:,} steps over the same rows as ours"]
    if measured.failure is None:
        measured.command_seconds += (total - few) * measured.step_seconds
        if few < total:
            notes.append(f"{few:,} of them run, the seconds of the others extrapolated linearly")
        times = measured.command_seconds / ours.command_seconds
        notes.append(f"{ours.row.label} {times:.2f}x as fast ({ours.command_seconds:.1f} s)")
    return measured, "; ".join(notes)
