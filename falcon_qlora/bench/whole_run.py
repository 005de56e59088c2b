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
_COMPILED = {
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR": "flash_attention",
    "QUACK_CACHE_DIR": "quack",
}

Run = Callable[[Row, int, int, dict[str, str]], Measured]


def whole_runs(
    ours: Sequence[Row], recipe: Row | None, *, steps: int, share: float, warmup: int, run: Run
) -> Iterator[tuple[Measured, str]]:
    """Time each of `ours` in full, twice, and the recipe over a share of the rows that they took.

    The recipe comes as soon as its rows are known, so that a time limit does not cost the comparison. Its
    seconds are extrapolated: those of its command, and the mean of its timed steps for every step left out.

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
    compared: Measured | None = None
    for row in ours:
        with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
            for caches in ("cold", "warm"):
                cached, variables = _with_caches(row, Path(folder))
                measured = run(replace(cached, caches=caches), steps, min(warmup, steps - 1), variables)
                yield measured, _note(measured, compared)
                if recipe is not None and compared is None and measured.failure is None:
                    compared, note = _recipe_over_the_rows_of(measured, recipe, share, warmup, run)
                    yield compared, note
    if recipe is not None and compared is None:
        yield Measured(row=recipe, failure="not run: ours did not end, so its rows are not known"), ""


def _recipe_over_the_rows_of(
    ours: Measured, recipe: Row, share: float, warmup: int, run: Run
) -> tuple[Measured, str]:
    total = recipe_steps(ours, recipe)
    few = min(total, max(warmup + _LEAST_TIMED, math.ceil(share * total)))
    with tempfile.TemporaryDirectory(prefix="falcon_qlora_") as folder:
        cached, variables = _with_caches(recipe, Path(folder))
        measured = run(cached, few, min(warmup, few - 1), variables)
    notes = [f"{total:,} steps over the same rows as ours"]
    if measured.failure is None:
        measured.command_seconds += (total - few) * measured.step_seconds
        if few < total:
            notes.append(f"{few:,} of them run, the seconds of the others extrapolated linearly")
        times = measured.command_seconds / ours.command_seconds
        notes.append(f"{ours.row.label} {times:.2f}x as fast ({ours.command_seconds:.1f} s)")
    return measured, "; ".join(notes)


def _note(ours: Measured, recipe: Measured | None) -> str:
    note = "from the command to the adapter on disk, no checkpoints between"
    if recipe is not None and recipe.failure is None and ours.failure is None:
        times = recipe.command_seconds / ours.command_seconds
        note += f"; {times:.2f}x as fast as the recipe ({recipe.command_seconds:.1f} s)"
    return note


def recipe_steps(ours: Measured, recipe: Row) -> int:
    """The recipe's steps over as many rows as `ours` took, rows that came again counted again."""
    rows = ours.kept["last"]["epoch"] * ours.kept["data"]["rows_read"]
    return max(1, math.ceil(round(rows / recipe.work.step_rows(recipe.gpus), 6)))


def _with_caches(row: Row, folder: Path) -> tuple[Row, dict[str, str]]:
    cached = replace(row, flags=(*row.flags, "--cache_dir", str(folder / "rows")))
    return cached, {name: str(folder / place) for name, place in _COMPILED.items()}
