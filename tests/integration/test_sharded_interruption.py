"""A run whose model is shared out over processes is stopped, killed and gone on with like any other."""

from __future__ import annotations

import json
import re
import shlex
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.checkpoint.manifest import MANIFEST, newest_whole
from falcon_qlora.common.quantities import counted
from tests.integration.interrupted import ROWS, SMALL, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary

pytestmark = pytest.mark.slow

SETTINGS = (
    f"{SMALL} --method full --compute_dtype fp32 --max_length 64 -b 1 --global_batch_size 8 --steps 8 "
    "--save_steps 2 --logging_steps 3 --learning_rate 1e-3 --warmup_steps 2 --save_total_limit 8 "
    "--report_to none --dataset_name rows.jsonl"
).split()
SHARDED = [*SETTINGS, "--sharding", "fsdp"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(processes: Processes) -> Path:
    """The run that nothing happens to."""
    status, _, errors = run(processes, "--output_dir", "whole", settings=SHARDED)
    assert (status, errors) == (0, "")
    return processes.folder / "whole"


def newest_step(processes: Processes, folder: str) -> int:
    """The step of the last complete checkpoint, which is what it says it is; 0 without any."""
    found, faulty = newest_whole(processes.folder / folder / "checkpoints")
    assert faulty == []
    return int(found.name.split("-")[1]) if found else 0


def test_a_signal_saves_and_the_command_it_names_goes_on_to_the_last_bit(
    processes: Processes, whole: Path
) -> None:
    asked = {"do": "signal", "step": 3, "rank": 1, "number": signal.SIGTERM}
    status, output, errors = run(processes, "--output_dir", "stopped", faults=[asked], settings=SHARDED)
    assert (status, errors) == (75, "")
    found = re.search(r"stopped at step (\d) of 8\. Go on with:  falcon-qlora (.*)", output)
    assert found is not None, output
    assert newest_step(processes, "stopped") == int(found[1]) in (3, 4)
    process = processes.start("falcon_qlora", *shlex.split(found[2]))
    _, errors = process.communicate(timeout=240)
    assert (process.returncode, errors) == (0, "")
    assert_same_run(processes.folder / "stopped", whole)


def test_training_goes_on_beside_each_process_s_part(processes: Processes, whole: Path) -> None:
    """What is written two steps later is what there was at its own."""
    faults = [{"do": "held", "step": 2, "rank": rank} for rank in (0, 1)]
    status, _, errors = run(processes, "--output_dir", "held", faults=faults, settings=SHARDED)
    assert (status, errors) == (0, "")
    found, expected = (
        json.loads((folder / "checkpoints/step-2" / MANIFEST).read_text())["files"]
        for folder in (processes.folder / "held", whole)
    )
    # processes.pt has times.
    states = [name for name in expected if name.startswith(("model", "optimizer", "sched"))]
    assert {name: found[name] for name in states} == {name: expected[name] for name in states}
    assert sum(name.startswith("optimizer") for name in states) == 2
    assert_same_run(processes.folder / "held", whole)


def test_kill_9_of_each_process_inside_a_save(processes: Processes, whole: Path) -> None:
    # In the middle of its own part; where the main process writes the rest, which the other waits for.
    for step, rank, where in ((4, 0, "part"), (4, 1, "part"), (6, 0, "save"), (6, 1, "save")):
        faults: list[dict[str, Any]] = [{"do": "kill", "step": step, "rank": rank, "where": where}]
        if (rank, where) == (1, "save"):
            faults.append({"do": "slow", "step": step, "rank": 0})
        resume = ["--resume"] if newest_step(processes, "killed") else []
        status, _, errors = run(processes, "--output_dir", "killed", *resume, faults=faults, settings=SHARDED)
        assert status == 1
        assert re.search(f"rank {rank} on .* was killed by SIGKILL", errors)
        # What the main process had all parts of, it completed.
        assert newest_step(processes, "killed") == (step if (rank, where) == (1, "save") else step - 2)
    status, _, errors = run(processes, "--output_dir", "killed", "--resume", settings=SHARDED)
    assert (status, errors) == (0, "")
    assert_same_run(processes.folder / "killed", whole)


def test_a_disk_that_fails_under_one_process_is_survived_and_told(processes: Processes, whole: Path) -> None:
    faults = [
        {"do": "disk", "step": 2, "rank": 1, "bytes": 50_000},
        {"do": "disk", "step": 6, "rank": 0, "bytes": 50_000},
    ]
    status, output, errors = run(processes, "--output_dir", "disk", faults=faults, settings=SHARDED)
    assert (status, errors) == (0, "")
    checkpoints = processes.folder / "disk/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step-4", "step-8"]
    assert newest_step(processes, "disk") == 8
    for step, process in ((2, 1), (6, 0)):
        assert f"step {step}: the checkpoint could not be saved (rank {process}: " in output
    assert_same_run(processes.folder / "disk", whole)


def test_a_disk_without_room_for_the_parts_is_refused_before_the_run(
    processes: Processes, whole: Path
) -> None:
    files = [*(whole / "checkpoints").rglob("*"), *(whole / "adapter").iterdir()]
    written = sum(file.stat().st_size for file in files if file.is_file())
    room = {"do": "room", "bytes": written - 1_000_000}
    status, _, errors = run(processes, "--output_dir", "full", faults=[room], settings=SHARDED)
    assert status == 2
    found = re.search(r"full: the run's checkpoints need ([\d.]+) (MiB|GiB)", errors)
    assert found is not None, errors
    # Four checkpoints and the adapter, each with 16 MiB to spare.
    assert written < float(found[1]) * {"MiB": 2**20, "GiB": 2**30}[found[2]] < written + 5.5 * 2**24
    assert not (processes.folder / "full").exists()


@pytest.mark.parametrize(
    ("wrote", "goes_on"), [((2, "fsdp"), (3, "fsdp")), ((2, "fsdp"), (1, "none")), ((1, "none"), (2, "fsdp"))]
)
def test_another_number_of_processes_trains_the_same(
    processes: Processes, wrote: tuple[int, str], goes_on: tuple[int, str]
) -> None:
    # A base that is trained already: of one that is made up, gradients differ by more than rounding.
    every_step = [*SETTINGS, "-m", "tiny", "--logging_steps", "1", "--sharding"]
    name = f"from{wrote[0]}to{goes_on[0]}"
    gpus, sharding = wrote
    run_whole = run(processes, "--output_dir", f"{name}-whole", gpus=gpus, settings=[*every_step, sharding])
    assert run_whole[0] == 0
    asked = {"do": "signal", "step": 3, "rank": 0, "number": signal.SIGTERM}
    words = ["--output_dir", name]
    assert run(processes, *words, faults=[asked], gpus=gpus, settings=[*every_step, sharding])[0] == 75
    gpus, sharding = goes_on
    status, output, errors = run(processes, *words, "--resume", gpus=gpus, settings=[*every_step, sharding])
    assert status == 0, errors
    assert f"resuming on {counted(gpus, 'process', 'processes')} instead of {wrote[0]}: " in output
    assert summary(processes.folder / name)["world_size"] == gpus
    lines, expected = (metrics(processes.folder / each) for each in (name, f"{name}-whole"))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["learning_rate"] == other["learning_rate"]
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)
        assert line["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-4)
