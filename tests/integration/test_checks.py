"""What a finished run says was proved: each check with its figure, and failing where its fault is put in."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.training.checks import told_in_lines
from tests.integration import interrupted
from tests.integration.processes import Processes
from tests.integration.runs import summary

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(20)]
EMPTY = [{"instruction": f"Say nothing {number}.", "output": ""} for number in range(3)]
SETTINGS = (
    "-m model --max_length 64 -b 2 --lora_r 4 --steps 2 --report_to none --dataset_name rows.jsonl "
    "--save_strategy no --overlong truncate"
).split()
KEYS = (
    "quantized adapter_coverage end_token kernels packing ranks reopened memory clock data versions "
    "fingerprints command"
).split()
# Rank 1 alone has another version: elsewhere replicas would differ, which ends a run.
FAULTS = [{"do": name} for name in "unquantized unadapted endless leak lost twice peak rebased".split()]
FAULTS.append({"do": "version", "rank": 1})


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with interrupted.at_work(tmp_path_factory, ROWS + EMPTY) as processes:
        shutil.copytree(tiny_path(), processes.folder / "model")
        yield processes


def run(work: Processes, output: str, *words: str, **named: Any) -> tuple[str, dict[str, Any]]:
    status, told, errors = interrupted.run(work, "--output_dir", output, *words, settings=SETTINGS, **named)
    assert status == 0, errors
    return told, summary(work.folder / output)["checks"]


def inspect(folder: Path, capsys: Any, *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), *words]) == 0
    return capsys.readouterr().out


@pytest.mark.slow
def test_what_two_ranks_prove_and_inspect_tells(work: Processes, capsys: Any) -> None:
    told, checks = run(work, "good", faults=[{"do": "compiled"}])
    assert list(checks) == KEYS
    states = {name: check["state"] for name, check in checks.items()}
    assert states.pop("memory") == "not checked"  # nothing is predicted on the CPU
    assert states.pop("command") == "recorded"
    assert set(states.values()) == {"passed"}, checks
    assert (checks["quantized"]["found"], checks["quantized"]["of"]) == (20, 20)
    assert (checks["adapter_coverage"]["found"], checks["adapter_coverage"]["weights"]) == (20, 1)
    assert checks["end_token"]["share"] == 1
    assert checks["packing"]["moved"] == 0
    assert checks["packing"]["ranks"] == checks["kernels"]["ranks"] == 2
    assert checks["kernels"]["gradients"] < 1e-5
    assert re.search(r"gradients of fast blocks within \S+ of the model's own", told)
    assert checks["reopened"]["by"] == "plain PEFT"
    assert checks["reopened"]["logits"] > 10_000
    assert checks["reopened"]["difference"] == 0
    assert (checks["data"]["read"], checks["data"]["used"]) == (23, 20)
    assert checks["data"]["left_out"] == {"empty answer": 3}
    assert checks["command"]["words"][:2] == ["falcon-qlora", "train"]
    assert "--gpus" in checks["command"]["words"]
    adapter = json.loads((work.folder / "good/adapter/manifest.json").read_text())["files"]
    found = checks["fingerprints"]["of"]["adapter"]
    assert found == adapter["adapter_model.safetensors"]["sha256"]
    assert told.count("20 of 20 linears") == 2
    assert "2 ranks identical" in told
    assert "23 rows read, 20 used, 3 left out (3 empty answer); " in told
    sheet = inspect(work.folder / "good", capsys, "--markdown")
    assert "| ranks | passed | 2 ranks identical" in sheet
    assert "| memory | not checked | " in sheet


@pytest.mark.slow
def test_each_check_fails_where_its_fault_is_put_in(work: Processes, capsys: Any) -> None:
    told, checks = run(work, "bad", "--kernels", "off", faults=FAULTS)
    states = {name: check["state"] for name, check in checks.items()}
    assert states.pop("command") == "recorded"
    assert (states.pop("ranks"), states.pop("reopened")) == ("passed", "passed")  # their faults end a run
    assert states.pop("kernels") == "not checked"  # so does its, and there are none
    assert set(states.values()) == {"failed"}, checks
    words = {
        "quantized": "19 of 20 linears",
        "adapter_coverage": "19 of 20 linears",
        "end_token": "0.0% of",
        "packing": "moved by",
        "memory": "(+",
        "clock": "its parts add up to",
        "data": "3 are not accounted for",
        "versions": "rank 1 on ",
        "fingerprints": "the base's files changed",
    }
    for name, word in words.items():
        assert word in checks[name]["told"], checks[name]
    assert "packed documents reach each other" in told
    assert "FAILED: 19 of 20 linears" in told
    assert "FAILED: the base's files changed" in inspect(work.folder / "bad", capsys)


@pytest.mark.slow
def test_no_run_begins_with_wrong_kernels(work: Processes) -> None:
    faults = [{"do": "compiled"}, {"do": "kernel", "rank": 1}]
    status, _, errors = interrupted.run(work, "--output_dir", "wrong", settings=SETTINGS, faults=faults)
    assert status == 2
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.search(r"error: .*the fast path differs from the model's own: a loss of .* --kernels off", line)
    assert not (work.folder / "wrong").exists()


def test_what_was_not_checked_or_failed_stands_apart_from_what_passed() -> None:
    found = {name: {"state": "passed", "told": name} for name in KEYS}
    found["ranks"] = found["memory"] = {"state": "not checked", "told": "why not"}
    found["end_token"]["state"] = found["versions"]["state"] = "failed"
    assert told_in_lines(found) == [
        "FAILED: end_token",
        "FAILED: versions",
        "quantized · adapter_coverage",
        "packing",
        "kernels · reopened",
        "clock",
        "data",
        "not checked: why not; why not",
    ]


@pytest.mark.parametrize(
    ("checks", "plain", "sheet"),
    [
        ({}, "checks +not recorded", "\nnot recorded: an earlier release"),
        ({"checks": ["x"]}, "checks +not recorded", "\nnot recorded: an earlier release"),
        (
            {"checks": {"a": 1, "the_ranks": {"state": "failed", "told": "\x1b[31mtwo"}}},
            r"the ranks +FAILED: \\x1b\[31mtwo",
            r"\| the ranks \| failed \| \\\\x1b\\\[31mtwo \|",
        ),
    ],
)
def test_an_older_run_and_a_strange_one_are_told_too(
    tmp_path: Path, capsys: Any, checks: dict[str, Any], plain: str, sheet: str
) -> None:
    (tmp_path / "config.yaml").write_text("model_name_or_path: tiny\n")
    (tmp_path / "summary.json").write_text(json.dumps({"steps": 1, **checks}))
    for words, expected in (((), plain), (("--markdown",), sheet)):
        capsys.readouterr()
        assert cli.main(["inspect", str(tmp_path), *words]) == 2  # its adapter is gone
        assert re.search(expected, capsys.readouterr().out)
