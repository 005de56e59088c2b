"""On GPUs: trained weights shared out over two go on, with one optimizer state in two parts."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest
import torch

from tests.integration.interrupted import ROWS, assert_same_run, at_work, run
from tests.integration.processes import Processes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

SETTINGS = (
    "-m random:falcon-rw-1b?num_hidden_layers=6 --tokenizer_name_or_path tiny --method full --sharding fsdp "
    "--kernels off --compute_dtype bf16 --max_length 512 -b 2 --global_batch_size 8 --steps 6 --save_steps 6 "
    "--logging_steps 1 --learning_rate 1e-4 --warmup_steps 2 --full_determinism true --save_total_limit 1 "
    "--report_to none --dataset_name rows.jsonl"
).split()


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    rows = [{"text": " ".join([str(row)] * 200)} for row in range(len(ROWS) * 2)]
    with at_work(tmp_path_factory, rows) as processes:
        yield processes


def test_weights_shared_out_go_on_to_the_last_bit(processes: Processes) -> None:
    status, _, errors = run(processes, "--output_dir", "whole", settings=SETTINGS)
    assert status == 0, errors
    asked = {"do": "signal", "step": 3, "rank": 1, "number": signal.SIGTERM}
    status, output, errors = run(processes, "--output_dir", "stopped", faults=[asked], settings=SETTINGS)
    assert (status, "stopped at step" in output) == (75, True), errors
    (checkpoint,) = (processes.folder / "stopped/checkpoints").iterdir()
    weights = (checkpoint / "model.safetensors").stat().st_size
    for part in (1, 2):  # AdamW's two states a weight, in bfloat16 as the weights, half of them in each
        size = (checkpoint / f"optimizer-0000{part}-of-00002.pt").stat().st_size
        assert size == pytest.approx(weights, rel=0.01)
    status, _, errors = run(processes, "--output_dir", "stopped", "--resume", settings=SETTINGS)
    assert status == 0, errors
    assert_same_run(processes.folder / "stopped", processes.folder / "whole")
