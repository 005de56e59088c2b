"""``train --dry_run``: a good run passes and leaves nothing; a fault is named with its rank and host."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import falcon_qlora
from falcon_qlora.common.errors import UserError
from tests.integration import interrupted
from tests.integration.processes import Processes
from tests.integration.refusals import contents

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(20)]
SETTINGS = (
    "-m tiny --max_length 64 -b 2 --lora_r 4 --report_to none --dataset_name rows.jsonl --eval_split 0.2 "
    "--dry_run"
).split()
HERE = socket.gethostname()


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with interrupted.at_work(tmp_path_factory, ROWS) as processes:
        (processes.folder / "kept").mkdir()
        (processes.folder / "kept/mine.txt").write_text("mine")
        yield processes


def dry_run(work: Processes, *words: str, faults: list[dict[str, Any]]) -> tuple[int, str, str]:
    """Exit status, stdout and stderr, of a dry run into a folder that holds a file; it leaves nothing."""
    before = contents(work.folder)
    found = interrupted.run(work, "--output_dir", "kept", *words, settings=SETTINGS, faults=faults)
    assert contents(work.folder) == before
    return found


@pytest.mark.slow
@pytest.mark.parametrize("faults", [[], [{"do": "dawdle", "rank": 1}]], ids=["together", "one later"])
def test_two_ranks_pass_and_leave_nothing(work: Processes, faults: list[dict[str, Any]]) -> None:
    status, told, errors = dry_run(work, faults=faults)
    assert status == 0, errors
    (table,) = re.findall(r"dry run: passed on 2 ranks; nothing was left behind\n(.*)", told, re.S)
    labels = [line.split()[0] for line in table.splitlines()]
    assert labels == (
        "versions data disk all-reduce kernels step cut save quantized adapter end packing reopened".split()
    )
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    assert f"{backend}, the right sum on 2 ranks" in table
    assert re.search(r"kernels +loss within \S+ and gradients within \S+ of the model's own", table)
    assert "read back and loaded, the optimizer too" in table
    assert "step 1/" not in told
    begun = ("reading rows …", "loading the base model …", "trying an all-reduce", "passed on")
    assert sorted(begun, key=told.index) == list(begun)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "rank", "where", "cause", "cure"),
    [
        ({"do": "gone", "rank": 1}, 1, "rows", r"gone/rows\.jsonl", ""),
        ({"do": "kernel", "rank": 1}, 1, "kernels", "differs from", "--kernels "),
        ({"do": "sum", "rank": 1}, 1, "all-reduce", "gave 4 where 3 is right", "NCCL_DEBUG=INFO"),
        ({"do": "room", "bytes": 1000}, 0, "model", "checkpoints need .* are free", "--output_dir"),
        (
            {"do": "memory", "rank": 1, "most": 0},
            1,
            "first step",
            "(out of memory|does not fit)",
            "--max_length",
        ),
        (
            {"do": "disk", "bytes": 50_000},
            None,
            "save",
            r"kept/checkpoints could not be written \(\S+: File too large\)",
            "make room",
        ),
        (
            {"do": "full", "bytes": 10_000},
            None,
            "save",
            r"kept/adapter could not be written \(adapter_model.safetensors: ",
            "make room",
        ),
        ({"do": "alpha"}, 0, "save", "what was saved failed its check", ""),
        ({"do": "odd", "step": 1, "rank": 1}, None, "first step", r"replicas diverged: ranks \[1\]", "GPUs"),
        ({"do": "blind", "rank": 1}, 1, "reading back", "the checkpoint is not there", ""),
        ({"do": "version", "rank": 1}, None, "versions", rf"rank 1 on {HERE} has peft 0\.0\.1", "install"),
    ],
    ids=lambda value: value["do"] if isinstance(value, dict) else None,
)
def test_a_fault_on_one_rank(
    work: Processes, fault: dict[str, Any], rank: int | None, where: str, cause: str, cure: str
) -> None:
    status, told, errors = dry_run(work, faults=[fault])
    assert status == 2, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    who = "[01]" if rank is None else str(rank)
    assert re.match(rf"error: dry run: rank {who} on {re.escape(HERE)}, {where}: .*{cause}", line), line
    assert cure in line
    assert [line for line in told.splitlines() if re.match("note: (?!estimated)", line)] == []
    assert "passed" not in told
    assert "Traceback" not in errors


@pytest.mark.slow
def test_a_rank_that_is_killed(work: Processes) -> None:
    kill = {"do": "kill", "where": "computing", "rank": 0, "step": 1}  # in the step: it made the folder
    status, _, errors = dry_run(work, faults=[kill])
    assert status == 2
    assert f"error: rank 0 on {HERE} was killed by SIGKILL; out of CPU memory?" in errors


def test_one_rank_in_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.chdir(tmp_path)
    settings: dict[str, Any] = {
        "model_name_or_path": "tiny",
        "dataset_name": "sample",
        "max_length": 64,
        "per_device_train_batch_size": 1,
        "max_rows": 20,
        "lora_r": 4,
        "report_to": "none",
        "dry_run": True,
        "cache_dir": os.environ.get("XDG_CACHE_HOME", str(tmp_path.parent / "cache")),
    }
    falcon_qlora.train(**settings)
    told = capsys.readouterr().out
    assert "dry run: passed on 1 rank" in told
    assert "data       21 documents, 977 tokens · 9 rows split · 8 pieces of split rows dropped" in told
    assert "20 steps in all" in told
    assert "note: the rows make" not in told
    with pytest.raises(UserError, match="leave out --resume"):
        falcon_qlora.train(**settings, output_dir="run", resume="latest")
    assert not list(tmp_path.iterdir())
