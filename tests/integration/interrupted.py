"""A run that is made to fail or stop, again and again, beside the same run left alone."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.processes import Processes
from tests.integration.runs import metrics, write_jsonl

STEPS = 10
# Two small blocks: what is tried with them does not depend on how much a step computes.
SMALL = (
    "-m random:falcon-7b?num_hidden_layers=2,hidden_size=128,num_attention_heads=2,vocab_size=4096 "
    "--tokenizer_name_or_path tiny"
)
# Two epochs and a bit, several micro batches, random draws, and a loss averaged over steps.
SETTINGS = (
    f"{SMALL} -q 4bit --max_length 64 -b 2 --gradient_accumulation_steps 2 --lora_dropout 0.1 --lora_r 8 "
    f"--steps {STEPS} --save_steps 2 --logging_steps 3 --learning_rate 1e-3 --warmup_steps 2 "
    "--report_to none --dataset_name rows.jsonl"
).split()
NEVER_SAVING = " ".join(SETTINGS).replace("--save_steps 2", "--save_strategy no").split()
ROWS = [
    {"instruction": f"Count to {number}.", "output": " ".join(map(str, range(number % 13 + 2)))}
    for number in range(60)
]


@contextmanager
def at_work(temporary: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> Iterator[Processes]:
    """A folder with these rows and a cache of its own, in which processes are started; none outlives it."""
    folder = temporary.mktemp("work")
    write_jsonl(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(temporary.mktemp("cache")))
        result = Processes(folder)
        yield result
        result.end()


def start(
    processes: Processes,
    *words: str,
    faults: list[dict[str, Any]] | None = None,
    gpus: int = 2,
    settings: Sequence[str] = SETTINGS,
) -> subprocess.Popen[str]:
    """Start a run in the folder of `processes`, its settings given unless it resumes by a config."""
    return processes.start(
        "tests.integration.faulty_launch",
        "train",
        *settings,
        "--gpus",
        str(gpus),
        *words,
        FAULTS=json.dumps(faults or []),
        PYTHONPATH=f"{Path(__file__).resolve().parents[2]}:{os.environ.get('PYTHONPATH', '')}".rstrip(":"),
    )


def run(
    processes: Processes,
    *words: str,
    faults: list[dict[str, Any]] | None = None,
    gpus: int = 2,
    settings: Sequence[str] = SETTINGS,
) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a run that leaves no process behind."""
    process = start(processes, *words, faults=faults, gpus=gpus, settings=settings)
    output, errors = process.communicate(timeout=240)
    assert processes.none_left(), "a process stayed"
    return process.returncode, output, errors


def assert_same_run(one: Path, other: Path) -> None:
    """Every number that does not come from a clock, and the adapter, to the last bit."""
    names = "step epoch loss grad_norm learning_rate tokens packing_efficiency eval_loss".split()
    # A line of an evaluation between two logs has no loss.
    kept = [[{name: line.get(name) for name in names} for line in metrics(each)] for each in (one, other)]
    assert kept[0] == kept[1]
    assert any(line["loss"] is not None for line in kept[0])
    files = [next((folder / "adapter").glob("*.safetensors")) for folder in (one, other)]
    adapters = [load_file(file) for file in files]
    assert adapters[0].keys() == adapters[1].keys()
    assert all(torch.equal(adapters[0][name], adapters[1][name]) for name in adapters[0])
