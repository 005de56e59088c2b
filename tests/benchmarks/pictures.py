"""Draws the pictures of this folder from `records.csv`: the rows that the README's tables are of.

python -m tests.benchmarks.pictures
"""

from __future__ import annotations

import csv
from pathlib import Path

from falcon_qlora.bench.tables import Row, speed_over_memory
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.compare.figures import Figures
from falcon_qlora.compare.report import Comparison
from falcon_qlora.terminal.charts import draw_speed_and_memory

HERE = Path(__file__).parent
MODEL = "random:falcon-7b"
# Variants measured in a later run than the others, by its commit.
LATER = {"ours-dropout": "de5f079", "ours-fp8-kept": "de5f079"}

COMPARED = "de5f079"


def steps(rows: list[Row]) -> list[Row]:
    """Of the steps that took turns in three rounds, on documents of 512 tokens."""
    return [
        row
        for row in rows
        if row["model"] == MODEL
        and " in 3 rounds" in row["note"]
        and row["commit"] == LATER.get(row["variant"], "9464a09")
    ]


def methods(rows: list[Row]) -> Comparison:
    """Of the methods on GSM8K, beside what was published in June 2023."""
    comparison = Comparison(title=f"{MODEL}, rows of GSM8K, one NVIDIA H200", compared=[], published=True)
    vars(comparison)["on_gpus"] = True
    vars(comparison)["rows"] = [
        Figures(
            name=row["variant"].removeprefix("compare: "),
            gpus=int(row["gpus"]),
            seconds_per_1000_samples=1000 / float(row["note"].partition(" ")[0]),
            total_peak_memory_gib=float(row["peak_reserved_gb"]) * GB / GIB,
        )
        for row in rows
        if row["commit"] == COMPARED
        and row["variant"].startswith("compare: ")
        and " rows of GSM8K a second" in row["note"]
    ]
    return comparison


def main(folder: Path = HERE) -> None:
    """Draw them into `folder`."""
    with (HERE / "records.csv").open(newline="") as file:
        rows: list[Row] = list(csv.DictReader(file))
    title = "NVIDIA H200, Falcon-7B, documents of 512 tokens, micro batches of 8,192 and 16,384 tokens"
    draw_speed_and_memory(speed_over_memory(steps(rows)), folder / "speed_and_memory.png", title=title)
    methods(rows).draw_bars(folder)


if __name__ == "__main__":
    main()
