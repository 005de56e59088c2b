"""A run that is stopped and goes on is the run that was never stopped; faults it survives, it survives."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.interrupted import NEVER_SAVING, ROWS, SETTINGS, STEPS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(processes: Processes) -> Path:
    """The run that nothing happens to."""
    status, _, errors = run(processes, "--output_dir", "whole")
    assert (status, errors) == (0, "")
    return processes.folder / "whole"


@pytest.mark.slow
@pytest.mark.parametrize("full", [False, True])
def test_a_signal_saves_and_the_command_it_names_goes_on_to_the_last_bit(
    processes: Processes, whole: Path, full: bool
) -> None:
    """Also where the saves before have failed, and this one at first."""
    asked = {"do": "signal", "step": 5, "rank": 0, "to": "launcher", "number": signal.SIGTERM}
    disk = [{"do": "disk", "bytes": 50_000, "times": 3}, {"do": "patience", "seconds": 0.2}]
    name = f"stopped-{full}"
    status, output, errors = run(processes, "--output_dir", name, faults=[asked, *disk * full])
    assert (status, errors) == (75, "")
    assert (len(re.findall(r"step [24]: .* could not be saved", output))) == 2 * full
    assert "earlier checkpoints" not in output
    assert len(re.findall(r"step [56]: .*, and there is no complete checkpoint: make room", output)) == full
    stopped = processes.folder / name
    assert not (stopped / "adapter").exists()
    found = re.search(r"stopped at step (\d+) of 10\. Go on with:  falcon-qlora (.*)", output)
    assert found is not None, output
    # The step that was on its way, and the one that learned of it.
    assert 5 <= int(found[1]) <= 6
    assert (stopped / f"checkpoints/step-{found[1]}/manifest.json").is_file()
    process = processes.start("falcon_qlora", *shlex.split(found[2]))
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert_same_run(stopped, whole)


@pytest.mark.slow
def test_one_command_starts_goes_on_and_is_done(processes: Processes, whole: Path) -> None:
    words = ["--output_dir", "auto", "--resume", "auto"]
    # Killed before there is a checkpoint, it starts over; its records are the new start's.
    killed = {"do": "kill", "step": 5, "rank": 1, "where": "step"}
    logging = [*words, "--logging_steps", "1"]
    status, _, errors = run(processes, *logging, faults=[killed], settings=NEVER_SAVING)
    assert (status, "was killed by SIGKILL" in errors) == (1, True)
    assert metrics(processes.folder / "auto")
    asked = {"do": "signal", "step": 5, "rank": 1, "number": signal.SIGTERM}
    status, output, errors = run(processes, *words, faults=[asked])
    assert (status, errors, "going on from" in output) == (75, "", False)
    status, output, errors = run(processes, *words)
    assert (status, errors, "going on from step" in output) == (0, "", True)
    assert_same_run(processes.folder / "auto", whole)
    status, output, _ = run(processes, *words)
    assert (status, "nothing is left to train" in output) == (0, True)
    assert_same_run(processes.folder / "auto", whole)


def test_a_finished_run_without_checkpoints_is_not_started_over(processes: Processes) -> None:
    (processes.folder / "finished/adapter").mkdir(parents=True)
    status, _, errors = run(processes, "--output_dir", "finished", "--resume", "auto", gpus=1)
    assert (status, errors.startswith("error: --resume auto: finished holds a finished run")) == (2, True)


@pytest.mark.slow
def test_memory_numbers_and_disk_that_fail_are_survived_and_told(processes: Processes, whole: Path) -> None:
    faults = [
        {"do": "memory", "step": 2, "rank": 1, "most": 1},
        {"do": "nan", "step": 5, "rank": 0},
        {"do": "disk", "step": 6, "bytes": 50_000},
        {"do": "gradient", "step": 7, "rank": 1},
    ]
    words = ["--save_steps", "1", "--save_total_limit", "10", "--logging_steps", "1", "--lora_dropout", "0"]
    status, output, errors = run(processes, "--output_dir", "faulty", *words, faults=faults)
    assert (status, errors) == (0, "")
    faulty = processes.folder / "faulty"
    steps = sorted(int(path.name.split("-")[1]) for path in (faulty / "checkpoints").iterdir())
    assert steps == [step for step in range(1, STEPS + 1) if step != 6]
    assert "step 6: the checkpoint could not be saved" in output
    assert re.search(r"out of memory at step 2.*split into [248] on all processes", output)
    assert re.search(r"step 5 \(rows [\d, ]+.*\): non-finite loss or gradient", output)
    assert re.search(r"step 7 \(rows [\d, ]+.*\): non-finite loss or gradient", output)
    assert (summary(faulty)["bad_steps"], summary(faulty)["micro_batch_parts"] > 1) == (2, True)
    assert [line["loss"] is None for line in metrics(faulty)] == [step == 5 for step in range(1, STEPS + 1)]
    assert [line["grad_norm"] is None for line in metrics(faulty)] == [
        step in (5, 7) for step in range(1, STEPS + 1)
    ]
    # Nothing of a bad step is in the weights or in what the optimizer remembers.
    kept = [
        (
            load_file(faulty / f"checkpoints/step-{step}/adapter_model.safetensors"),
            torch.load(faulty / f"checkpoints/step-{step}/optimizer.pt", weights_only=True)["state"],
        )
        for step in (4, 5)
    ]
    assert all(torch.equal(kept[0][0][name], kept[1][0][name]) for name in kept[0][0])
    for index, state in kept[0][1].items():
        assert all(torch.equal(value, kept[1][1][index][name]) for name, value in state.items())


@pytest.mark.slow
def test_a_run_whose_numbers_stay_bad_ends_and_names_the_rows(processes: Processes) -> None:
    faults = [{"do": "nan", "step": step} for step in (2, 3, 4)]
    status, _, errors = run(processes, "--output_dir", "bad", "--max_bad_steps", "2", faults=faults)
    assert status == 2
    assert re.match(r"error: 2 steps in a row .* the last one step 3 \(rows ", errors)


@pytest.mark.parametrize(
    ("settings", "step", "last"),
    [
        (SETTINGS, 4, "The last complete checkpoint is odd-4/checkpoints/step-2: resume it with"),
        pytest.param(NEVER_SAVING, 10, "There is no complete checkpoint.", marks=pytest.mark.slow),
    ],
)
def test_replicas_that_differ_are_not_saved_as_one(
    processes: Processes, settings: list[str], step: int, last: str
) -> None:
    fault = {"do": "odd", "step": 3, "rank": 1}
    status, _, errors = run(processes, "--output_dir", f"odd-{step}", faults=[fault], settings=settings)
    assert (status, errors.count("error:"), "Traceback" in errors) == (2, 1, False)
    assert errors.startswith(
        f"error: step {step}: the replicas diverged: ranks [1] do not match rank 0. Nothing "
    )
    assert last in errors
    folder = processes.folder / f"odd-{step}"
    assert [path.name for path in folder.glob("checkpoints/*")] == (["step-2"] if step == 4 else [])
    assert not (folder / "adapter").exists()
