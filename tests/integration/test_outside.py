"""The whole commands that `tests.benchmarks.outside` times, and what its rows say of them."""

from __future__ import annotations

import contextlib
import csv
import json
import re
import tempfile
from pathlib import Path

import pytest

from falcon_qlora.bench.tables import COLUMNS
from falcon_qlora.common.quantities import GB, GIB
from falcon_qlora.data.sample_data import path as sample_rows
from tests.benchmarks import outside


@pytest.mark.slow
def test_a_row_says_of_a_command_what_its_run_and_the_clock_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "TemporaryDirectory", lambda prefix: contextlib.nullcontext(str(kept)))
    records = tmp_path / "records.csv"
    words = ["-m", "tiny", "--dataset_name", str(sample_rows()), "-b", "2", "-q", "16bit", "--max_steps", "3"]
    words += ["--max_length", "64", "--device", "cpu"]
    outside.main(["--csv", str(records), "--commit", "abc", "--", *words])
    with records.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [tuple(row) for row in rows] == [COLUMNS] * 2
    for row, caches in zip(rows, ("cold", "warm"), strict=True):
        summary = json.loads((kept / caches / "summary.json").read_text())
        assert (row["commit"], row["model"], row["quantize_mode"]) == ("abc", "tiny", "16bit")
        # Which were left to the run.
        assert (row["compute_dtype"], row["checkpointing"]) == ("fp32", "none")
        assert (int(row["gpus"]), summary["steps"]) == (summary["world_size"], 3)
        assert float(row["tokens_per_second"]) == round(summary["tokens_per_second"])
        assert int(row["micro_batch_tokens"]) == summary["micro_batch_tokens"]
        assert float(row["step_ms"]) == pytest.approx(1e3 * summary["train_seconds"] / 3, abs=0.1)
        assert float(row["peak_reserved_gb"]) == pytest.approx(
            summary["peak_memory_gib"] * GIB / GB, abs=0.01
        )
        assert float(row["samples_per_second_512"]) == round(summary["samples_per_second_512"], 2)
        outside_told, told = re.fullmatch(
            rf"{caches}; 3 steps; from outside: (.*); (the run .*)", row["note"]
        ).groups()
        seconds = {name: f"{summary[f'{name}_seconds']:.2f} s" for name in ("start", "save", "end")}
        assert told == (
            f"the run said {summary['wall_seconds']:.1f} s, "
            f"{summary['wall_tokens_per_second']:,.0f} tokens/s over the whole command; "
            f"start {seconds['start']}, waiting for saves {seconds['save']}, end {seconds['end']}"
        )
        wall, first, rest = map(float, re.findall(r"[\d.]+", outside_told))
        # From outside a command takes what the run says and Python's start and end.
        assert summary["wall_seconds"] - 0.1 < wall < summary["wall_seconds"] + 30
        assert summary["start_seconds"] - 0.1 < first < wall
        assert rest == pytest.approx(wall - summary["train_seconds"], abs=0.11)
    assert "tokens/s; cold; 3 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("setting", "capabilities", "computed"),
    [
        ("auto", [], "fp32"),
        ("auto", ["9.0", "9.0"], "bf16"),
        ("auto", ["8.0"], "bf16"),
        ("auto", ["10.0"], "bf16"),
        ("auto", ["7.5"], "fp16"),
        ("fp8", ["9.0"], "fp8"),
        ("bf16", [], "bf16"),
    ],
)
def test_a_row_has_the_dtype_that_was_chosen(setting: str, capabilities: list[str], computed: str) -> None:
    gpus = [{"name": "a GPU", "compute_capability": each} for each in capabilities]
    assert outside.computed_in(setting, gpus) == computed
