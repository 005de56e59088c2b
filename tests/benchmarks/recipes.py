"""The recipes' speed and memory, through the real command line.

    python tests/benchmarks/recipes.py --dataset gsm8k.json --tokenizer FOLDER --gpus 1 2

Runs each recipe in turn on random weights of Falcon-7B's shapes, prints a Markdown table and appends a row
a run to a CSV. Speeds are of the steps after the first ones, evaluation and saving left out.
"""

from __future__ import annotations

import argparse
import csv
import datetime
import json
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

FIELDS = (
    "date commit gpu gpus torch model recipe quantize_mode steps tokens_per_second samples_per_second_512 "
    "peak_memory_gib packing_efficiency first_loss final_loss whole_run_seconds scaling"
).split()


def run(recipe: str, quantize_mode: str, gpus: int, arguments: argparse.Namespace) -> dict[str, Any] | None:
    """Train once and return the row of the table, or None where the run failed."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "falcon_qlora", "train", "--recipe", recipe, "-m", arguments.model]
        command += ["--tokenizer_name_or_path", arguments.tokenizer, "--dataset_name", arguments.dataset]
        command += ["--dataset_format", "alpaca", "--template", "alpaca", "--output_dir", str(output)]
        command += ["--steps", str(arguments.steps), "--logging_steps", "5", "--save_strategy", "no"]
        command += ["--report_to", "none", "--gpus", str(gpus), "-q", quantize_mode]
        started = time.perf_counter()
        result = subprocess.run(command, capture_output=True, text=True)
        seconds = time.perf_counter() - started
        if result.returncode:
            print(result.stdout[-2000:], result.stderr[-4000:], file=sys.stderr)
            return None
        summary = json.loads((output / "summary.json").read_text())
        environment = json.loads((output / "environment.json").read_text())
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    steady = lines[1:] or lines
    tokens = [after["tokens"] - before["tokens"] for before, after in pairwise(lines)]
    spent = [count / line["tokens_per_second"] for count, line in zip(tokens, steady, strict=True)]
    samples = [line["samples_per_second_512"] * each for line, each in zip(steady, spent, strict=True)]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": environment["commit"] or arguments.commit,
        "gpu": environment["gpus"][0]["name"] if environment["gpus"] else "CPU",
        "gpus": gpus,
        "torch": environment["packages"]["torch"],
        "model": arguments.model,
        "recipe": recipe,
        "quantize_mode": quantize_mode,
        "steps": summary["steps"],
        "tokens_per_second": round(sum(tokens) / sum(spent)),
        "samples_per_second_512": round(sum(samples) / sum(spent), 2),
        "peak_memory_gib": round(summary["peak_memory_gib"], 1),
        "packing_efficiency": round(lines[-1].get("packing_efficiency", 1.0), 3),
        "first_loss": round(summary["first_loss"], 4),
        "final_loss": round(summary["final_loss"], 4),
        "whole_run_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", required=True, help="a file with Alpaca columns")
    parser.add_argument("--tokenizer", required=True, help="folder or hub id")
    parser.add_argument("--model", default="random:falcon-7b")
    parser.add_argument("--gpus", type=int, nargs="+", default=[1])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument(
        "--recipes",
        nargs="+",
        default=["lambda-7b-4bit", "lambda-7b-8bit", "default", "default:8bit"],
        help="recipe names, with :MODE for another quantization than the recipe's",
    )
    parser.add_argument("--commit", default="", help="for the record, where this is no checkout")
    parser.add_argument("--csv", type=Path, default=Path("recipes.csv"))
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in arguments.recipes:
        recipe, _, mode = name.partition(":")
        mode = mode or ("8bit" if recipe.endswith("8bit") else "4bit")
        one: float | None = None
        for gpus in arguments.gpus:
            row = run(recipe, mode, gpus, arguments)
            if row is None:
                continue
            if gpus == 1:
                one = row["tokens_per_second"]
            row["scaling"] = round(row["tokens_per_second"] / one, 2) if one else ""
            rows.append(row)
            print(row, flush=True)
    is_new = not arguments.csv.exists()
    with arguments.csv.open("a", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        if is_new:
            writer.writeheader()
        writer.writerows(rows)
    print("| recipe | base | GPUs | tokens/s | 512-position samples/s | peak GiB | scaling | whole run, s |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        print(
            f"| {row['recipe']} | {row['quantize_mode']} | {row['gpus']} | {row['tokens_per_second']:,} | "
            f"{row['samples_per_second_512']} | {row['peak_memory_gib']} | {row['scaling']}x | "
            f"{row['whole_run_seconds']:.0f} |"
        )


if __name__ == "__main__":
    main()
