"""On a GPU: a base in CPU memory trains as one on the device does, in less memory, and waits for nothing.

The figures of 40B are printed (`pytest -s`): tokens/s and peak, offloaded and resident, and their estimates.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import torch

from falcon_qlora.models.sizes import stored_bytes
from tests.integration.interrupted import ROWS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary
from tests.integration.shared_out import CASES, computing, difference, made, one_pass
from tests.layouts import documents
from tests.packing import packed
from tests.unit.test_memory import step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
BLOCKS = 8
SETTINGS = (
    "--tokenizer_name_or_path tiny -q 4bit --max_length 2048 --lora_r 64 --steps 6 --save_steps 6 "
    "--logging_steps 1 --learning_rate 1e-4 --warmup_steps 2 --kernels required --save_total_limit 1 "
    "--report_to none --dataset_name rows.jsonl"
).split()
SEVEN = ["-m", f"random:falcon-7b?num_hidden_layers={BLOCKS}", "-b", "2", "--full_determinism", "true"]


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    rows = [{"text": " ".join([str(row)] * 400)} for row in range(len(ROWS) * 16)]
    with at_work(tmp_path_factory, rows) as processes:
        yield processes


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_what_is_offloaded_computes_what_is_on_the_device(case: tuple[str, str, str, str, str]) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    models = made(device, *case), made(device, *case, offload=True)  # type: ignore[arg-type]
    batches = [packed(documents(lengths, seed=3, device=device)) for lengths in ([7, 40, 3], [12])]
    with computing(device, case[2]):
        for batch, trains in ((0, True), (1, True), (0, False), (1, False), (0, True)):
            assert difference(*(one_pass(model, batches[batch], trains) for model in models)) == ""
        if case[2] == "reference":  # of which bitsandbytes' int8 waits
            return
        torch.cuda.set_sync_debug_mode("error")
        try:
            models[1](**batches[0]).loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def test_7b_offloaded_is_the_resident_run_in_less_memory_and_goes_on(processes: Processes) -> None:
    offloaded = [*SETTINGS, *SEVEN, "--checkpointing", "none", "--offload_base"]
    for name, settings in (("resident", offloaded[:-1]), ("offloaded", offloaded)):
        status, _, errors = run(processes, "--output_dir", name, gpus=1, settings=settings)
        assert status == 0, errors
    losses = [
        [line["loss"] for line in metrics(processes.folder / name)] for name in ("resident", "offloaded")
    ]
    assert losses[0] == losses[1]
    assert_same_run(processes.folder / "offloaded", processes.folder / "resident")
    resident, less = (summary(processes.folder / name) for name in ("resident", "offloaded"))
    of_blocks = stored_bytes(step("falcon-7b").config, "4bit") / 32 * BLOCKS / 2**30
    saved = resident["peak_memory_gib"] - less["peak_memory_gib"]
    assert saved == pytest.approx(of_blocks * (1 - 2 / BLOCKS), rel=0.15)
    over = less["predicted_peak_memory_gib"] - less["peak_memory_gib"]  # about the same of 40B
    assert -0.1 * less["peak_memory_gib"] < over < 1
    stopped = [{"do": "signal", "step": 3, "rank": 0, "number": 15}]
    status, output, errors = run(
        processes, "--output_dir", "stopped", gpus=1, faults=stopped, settings=offloaded
    )
    assert (status, "stopped at step" in output) == (75, True), errors
    status, _, errors = run(processes, "--output_dir", "stopped", "--resume", gpus=1, settings=offloaded)
    assert status == 0, errors
    assert_same_run(processes.folder / "stopped", processes.folder / "resident")


@pytest.mark.parametrize("sequences", [4, 8])
def test_40b_offloaded_is_about_as_fast_as_on_the_device(processes: Processes, sequences: int) -> None:
    if torch.cuda.mem_get_info()[1] < 100e9:
        pytest.skip("needs room for 40B beside its activations")
    settings = [*SETTINGS, "-m", "random:falcon-40b", "-b", str(sequences), "--checkpointing", "full"]
    found = {}
    for name, more in (("resident", []), ("offloaded", ["--offload_base"])):
        status, _, errors = run(processes, "--output_dir", name, gpus=1, settings=[*settings, *more])
        assert status == 0, errors
        told = summary(processes.folder / name)
        keys = "tokens_per_second estimated_tokens_per_second peak_memory_gib predicted_peak_memory_gib"
        found[name] = {key: told[key] for key in keys.split()}
        print(f"{sequences * 2048:,} tokens a step, {name}: {json.dumps(found[name])}")
    assert found["offloaded"]["peak_memory_gib"] < found["resident"]["peak_memory_gib"] - 17
    assert found["offloaded"]["tokens_per_second"] > 0.9 * found["resident"]["tokens_per_second"]
