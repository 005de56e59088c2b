"""Whole runs, from the command to the adapter on disk: ours with cold and warm caches, the guide's recipe."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from falcon_qlora.bench.scaling import Measured, Row

STEPS = 200
TOKENS = 16384
RECIPE_BATCH = 16
# Of the recipe at least so many steps are timed, however small its share.
_LEAST_TIMED = 5
# What a first run leaves for the next, beside the tokenized rows.
_COMPILED = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}

Run = Callable[[Row, int, int, dict[str, str]], Measured]


def whole_runs(
    ours: Sequence[Row], recipe: Row | None, *, steps: int, share: float, warmup: int, run: Run
) -> Iterator[tuple[Measured, str]]:
    """Time each of `ours` in full, twice, and then the recipe over a share of the rows that they took.

    The recipe's seconds are extrapolated: those of its command, and the mean of its timed steps for every
    step left out.

    Args:
        ours: run with caches of their own, first empty, then filled.
        recipe: over the same rows as the first of `ours` that ended well; None: left out.
        steps: of ours.
        share: of the recipe's steps, above 0 and at most 1.
        warmup: steps at the beginning whose speed does not count.
        run: measures a row over so many steps, the first ones not counted, with these variables set.

    Yields:
        What was measured, and a note on it.
    """
    finished: Measured | None = None
    named: list[Measured] = []
    for row in ours:
        with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
            for caches in ("cold", "warm"):
                cached, variables = _with_caches(row, Path(folder))
                measured = run(replace(cached, caches=caches), steps, min(warmup, steps - 1), variables)
                if measured.failure is None:
                    finished = finished or measured
                    named.append(measured)
                yield measured, "from the command to the adapter on disk, no checkpoints between"
    if recipe is None:
        return
    if finished is None:
        yield Measured(row=recipe, failure="not run: ours did not end, so its rows are not known"), ""
        return
    total = recipe_steps(finished, recipe)
    few = min(total, max(warmup + _LEAST_TIMED, math.ceil(share * total)))
    with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
        cached, variables = _with_caches(recipe, Path(folder))
        measured = run(cached, few, min(warmup, few - 1), variables)
    if measured.failure is None:
        measured.command_seconds += (total - few) * measured.step_seconds
    yield measured, _comparison(measured, named, few, total)


def recipe_steps(ours: Measured, recipe: Row) -> int:
    """The recipe's steps over as many rows as `ours` took, rows that came again counted again."""
    rows = ours.kept["last"]["epoch"] * ours.kept["data"]["rows_read"]
    return max(1, math.ceil(round(rows / recipe.work.step_rows(recipe.gpus), 6)))


def _with_caches(row: Row, folder: Path) -> tuple[Row, dict[str, str]]:
    cached = replace(row, flags=(*row.flags, "--cache_dir", str(folder / "rows")))
    return cached, {name: str(folder / place) for name, place in _COMPILED.items()}


def _comparison(recipe: Measured, ours: Sequence[Measured], few: int, total: int) -> str:
    notes = [f"{total:,} steps over the same rows as ours"]
    if recipe.failure is None:
        if few < total:
            notes.append(f"{few:,} of them run, the seconds of the others extrapolated linearly")
        for each in ours:
            times = recipe.command_seconds / each.command_seconds
            notes.append(f"{each.row.label} {times:.2f}x as fast ({each.command_seconds:.1f} s)")
    return "; ".join(notes)
