"""On two GPUs: a base that is shared out trains as replicas do, in less memory, and waits for nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
import torch

from tests.integration.interrupted import ROWS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary
from tests.integration.shared_out import CASES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]
SETTINGS = (
    "-m random:falcon-7b --tokenizer_name_or_path tiny -q 4bit --max_length 1024 -b 4 --global_batch_size 8 "
    "--lora_r 64 --steps 6 --save_steps 6 --logging_steps 1 --learning_rate 1e-4 --warmup_steps 2 "
    "--full_determinism true --kernels required --checkpointing none --save_total_limit 1 --report_to none "
    "--dataset_name rows.jsonl"
).split()


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    rows = [{"text": " ".join([str(row)] * 400)} for row in range(len(ROWS) * 4)]
    with at_work(tmp_path_factory, rows) as processes:
        yield processes


def test_what_is_shared_out_computes_what_is_whole_in_every_layout() -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*torchrun, "-m", "tests.integration.shared_out", "cuda"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr[-5000:]
    told = [line for line in result.stdout.splitlines() if line.startswith("falcon")]
    assert told == [f"{' '.join(case)} is the same" for case in CASES]


def test_7b_shared_out_is_the_replicas_run_in_less_memory_and_goes_on(processes: Processes) -> None:
    shared = [*SETTINGS, "--sharding", "fsdp"]
    for name, settings in (("replicas", SETTINGS), ("whole", shared)):
        status, _, errors = run(processes, "--output_dir", name, settings=settings)
        assert status == 0, errors
    for one, two in zip(*(metrics(processes.folder / name) for name in ("replicas", "whole")), strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=2e-4)
    assert_same_run(processes.folder / "whole", processes.folder / "replicas")
    replicas, whole = (summary(processes.folder / name) for name in ("replicas", "whole"))
    # Of 3.4 GB a half, less two of 32 blocks.
    saved = replicas["peak_memory_gib"] - whole["peak_memory_gib"]
    assert saved == pytest.approx(3.42e9 / 2**30 * (1 / 2 - 2 / 32), rel=0.15)
    assert 0.9 < whole["predicted_peak_memory_gib"] / whole["peak_memory_gib"] < 1.15
    asked = {"do": "signal", "step": 3, "rank": 1, "number": signal.SIGTERM}
    status, output, errors = run(processes, "--output_dir", "stopped", faults=[asked], settings=shared)
    assert (status, "stopped at step" in output) == (75, True), errors
    status, _, errors = run(processes, "--output_dir", "stopped", "--resume", settings=shared)
    assert status == 0, errors
    assert_same_run(processes.folder / "stopped", processes.folder / "whole")
