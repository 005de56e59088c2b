"""On GPUs: 7B in 4 bits goes on to the last bit, and memory that runs out on one of two is survived."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.distributed.flight_recorder.components.loader import read_dump

from tests.integration.interrupted import ROWS, STEPS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary

pytestmark = pytest.mark.gpu

LARGE = (
    "-m random:falcon-7b --tokenizer_name_or_path tiny -q 4bit --max_length 1024 -b 4 --lora_dropout 0 "
    "--gradient_accumulation_steps 2 --lora_r 64 --steps 6 --save_steps 2 --logging_steps 1 "
    "--learning_rate 1e-4 --checkpointing none"
).split()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    rows = [{"text": " ".join([str(row)] * 400)} for row in range(len(ROWS) * 4)]
    with at_work(tmp_path_factory, rows) as processes:
        yield processes


def test_7b_on_the_fast_path_goes_on_to_the_last_bit(processes: Processes) -> None:
    words, gpus = [*LARGE, "--kernels", "required", "--full_determinism", "true"], torch.cuda.device_count()
    assert run(processes, *words, "--output_dir", "whole", gpus=gpus)[0] == 0
    asked = {"do": "signal", "step": 3, "rank": gpus - 1, "number": signal.SIGTERM}
    status, output, _ = run(processes, *words, "--output_dir", "stopped", faults=[asked], gpus=gpus)
    assert (status, "stopped at step" in output) == (75, True)
    assert run(processes, *words, "--output_dir", "stopped", "--resume", gpus=gpus)[0] == 0
    assert_same_run(processes.folder / "stopped", processes.folder / "whole")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_memory_that_runs_out_on_one_gpu_of_two_splits_on_both(processes: Processes) -> None:
    assert run(processes, *LARGE, "--output_dir", "room")[0] == 0
    hog = {"do": "hog", "step": 3, "rank": 1, "leave_gib": 6}
    status, output, errors = run(processes, *LARGE, "--output_dir", "hogged", faults=[hog])
    assert status == 0, errors
    assert re.search(r"out of memory at step 3.*split into \d+ on all processes", output)
    assert summary(processes.folder / "hogged")["micro_batch_parts"] > 1
    lines = [metrics(processes.folder / name) for name in ("room", "hogged")]
    assert [line["tokens"] for line in lines[0]] == [line["tokens"] for line in lines[1]]
    for one, other in zip(*lines, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=2e-2)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_hang_leaves_nccls_record_of_both_processes(processes: Processes) -> None:
    hang = {"do": "hang", "step": 3, "rank": 1}
    status, _, errors = run(processes, "--output_dir", "hung", "--hang_minutes", "1", faults=[hang])
    assert (status, "rank 1 has made no progress" in errors) == (1, True), errors
    assert "NCCL's last collectives are in hung/flight_record" in errors
    files = sorted((processes.folder / "hung/flight_record").iterdir())
    records = [read_dump("nccl_trace_rank_", str(file)) for file in files]
    assert [record["rank"] for record in records] == [0, 1]
    # Process 0 waits in a collective that process 1 has not come to.
    entries = [record["entries"] for record in records]
    latest = [max(entry["collective_seq_id"] for entry in each) for each in entries]
    assert latest[0] > latest[1]
    assert len(entries[0]) <= 128


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_restart_does_not_wait_for_the_processes_before_it(processes: Processes) -> None:
    faults = [
        {"do": "kill", "step": 5, "rank": 0, "where": "step", "restart": 0},
        {"do": "late", "rank": 0, "seconds": 5.0, "restart": 1},
    ]
    words = ["--output_dir", "restarted", "--max_restarts", "1"]
    status, _, errors = run(processes, *words, faults=faults)
    assert status == 0, errors  # NCCL may have a word on a process that is gone
    assert summary(processes.folder / "restarted")["steps"] == STEPS
