"""``falcon-qlora bench`` through its command line, on the CPU, with other tools' recipes beside ours."""

from __future__ import annotations

import contextlib
import csv
import io
import math
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_qlora.__main__ import main
from tests.benchmarks import against
from tests.integration.forks import Popen
from tests.integration.runs import write_jsonl

MODEL = "random:falcon-7b?num_hidden_layers=1,hidden_size=64,num_attention_heads=2,vocab_size=512"
COLUMNS = (
    "date,commit,gpu,gpus,driver,torch,model,variant,quantize_mode,compute_dtype,checkpointing,micro_batch_tokens,"
    "tokens_per_second,samples_per_second_512,tflops_4n,ceiling_share,peak_allocated_gb,peak_reserved_gb,step_ms,"
    "ratio_to_first,note"
)
SHORT = ("--steps", "4", "--rounds", "2", "--warmup", "1")


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def table(output: str) -> list[dict[str, str]]:
    lines = [line for line in output.splitlines() if line.startswith("|")]
    titles = cells(lines[0])
    return [dict(zip(titles, cells(line), strict=True)) for line in lines[2:]]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    folder = tmp_path_factory.mktemp("bench")
    files = (
        "--csv",
        str(folder / "records.csv"),
        "--plot",
        str(folder / "picture.png"),
        "--commit",
        "abc1234",
    )
    asked = ("--variants", "stock-8bit-fast,ours,ours-fp8", "--tokens", "64,128")
    size = ("--models", MODEL, "--max_length", "32", "--lora_r", "4")
    # Not in a process of its own, which would take most of the time to import the libraries.
    with contextlib.redirect_stdout(io.StringIO()) as output:
        assert against.main([*size, *asked, *SHORT, *files]) == 0
    return output.getvalue(), folder


def test_a_row_for_every_variant_and_size(measured: tuple[str, Path], repository: Path) -> None:
    output, folder = measured
    found = [(row["variant"], row["base"], row["tokens a micro batch"]) for row in table(output)]
    assert found == [
        ("stock-8bit-fast", "8bit", "512"),  # 16 documents: the largest that is tried on a CPU
        ("ours", "4bit", "64"),
        ("ours", "4bit", "128"),
        ("ours-fp8", "4bit", "64"),
        ("ours-fp8", "4bit", "128"),
    ]
    lines = (folder / "records.csv").read_text().splitlines()
    assert lines[0] == COLUMNS
    assert lines[0] == (repository / "tests/benchmarks/records.csv").read_text().splitlines()[0]
    with (folder / "records.csv").open() as file:
        recorded = list(csv.DictReader(file))
    assert [(row["variant"], row["micro_batch_tokens"]) for row in recorded] == [
        (variant, tokens) for variant, _, tokens in found
    ]
    assert {row["commit"] for row in recorded} == {"abc1234"}
    assert (folder / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_ratios_are_the_tables_own_speeds(measured: tuple[str, Path]) -> None:
    rows = [row for row in table(measured[0]) if row["ratio"]]
    assert len(rows) == 3
    speeds = [float(row["tokens/s"].replace(",", "")) for row in rows]
    for row, speed in zip(rows, speeds, strict=True):
        assert row["ratio"] == f"{speed / speeds[0]:.3f}x"
        ms = float(row["ms a step"].replace(",", ""))
        tokens = int(row["tokens a micro batch"])
        assert speed * ms / 1e3 == pytest.approx(tokens, rel=0.01 + 1 / speed)
    for row in rows[1:]:
        low, high = map(float, row["95% interval"].split("–"))
        assert low <= high


def test_what_cannot_run_has_a_row_that_says_why(measured: tuple[str, Path]) -> None:
    (row, _) = [row for row in table(measured[0]) if row["variant"] == "ours-fp8"]
    assert row["tokens/s"] == "not run: there is no FP8 on the CPU"


def test_all_start_from_the_same_loss(measured: tuple[str, Path]) -> None:
    notes = [line for line in measured[0].splitlines() if "first loss" in line]
    losses = [float(line.partition("first loss ")[2].partition(";")[0]) for line in notes]
    assert len(losses) == 3
    # Of random weights: the uniform distribution's. A little apart: other tokens, 8 bits.
    assert losses == pytest.approx([math.log(512)] * 3, rel=0.02)


def test_real_rows_packed_and_padded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = "one two three four five six seven eight nine ten".split()
    texts = [" ".join(words[: 2 + number % 9]) for number in range(60)]
    data = write_jsonl(tmp_path / "rows.jsonl", [{"text": text} for text in texts])
    sizes = ("--max_length", "32", "--tokens", "128", "--steps", "2", "--rounds", "1", "--lora_r", "4")
    # The packaged model itself takes minutes, where processors compute in bfloat16 by halves.
    model = ("--models", MODEL.replace("512", "4096"), "--tokenizer_name_or_path", "tiny")
    assert main(["bench", *model, "--dataset_name", str(data), *sizes]) == 0
    output = capsys.readouterr().out
    rows = table(output)
    assert [row["variant"] for row in rows] == ["packed", "padded-512", "padded-longest"]
    speeds = [float(row["tokens/s"].replace(",", "")) for row in rows]
    notes = [line for line in output.splitlines() if line.startswith("- ") and " steps in " in line]
    steps = [int(line.partition(" steps in ")[0].split()[-1]) for line in notes]
    assert steps[0] == 2 < steps[1] == steps[2]
    # The same rows, so the same real tokens in all; printed are whole tokens/s, and tenths of milliseconds.
    times = [float(row["ms a step"].replace(",", "")) for row in rows]
    tokens = [speed * each / 1e3 * n for speed, each, n in zip(speeds, times, steps, strict=True)]
    assert tokens == pytest.approx([tokens[0]] * 3, rel=0.01 + 1 / min(speeds) + 0.1 / min(times))
    assert 128 < tokens[0] <= 256 * (1.01 + 1 / min(speeds))


@pytest.mark.slow
def test_a_time_limit_leaves_what_was_measured(tmp_path: Path) -> None:
    size = ("--models", MODEL, "--tokens", "64", "--max_length", "32", "--lora_r", "4")
    pace = ("--rounds", "500", "--steps", "1000", "--csv", str(tmp_path / "records.csv"))
    arguments = ["bench", "--variants", "ours,reference", *size, *pace]
    bench = Popen(
        [sys.executable, "-m", "falcon_qlora", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert bench.stderr is not None
    assert any("ours, 64 tokens, round 1" in line for line in bench.stderr)
    bench.terminate()
    output, _ = bench.communicate(timeout=60)
    assert bench.returncode == 130
    rows = {row["variant"]: row["tokens/s"] for row in table(output)}
    assert float(rows["ours"].replace(",", "")) > 0
    assert rows.keys() == {"ours", "reference"}
    assert len((tmp_path / "records.csv").read_text().splitlines()) >= 2
