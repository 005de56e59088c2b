"""Every signal, every process, kill -9 before, inside and after a save: always one run."""

from __future__ import annotations

import itertools
import random
import re
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.checkpoint.manifest import newest_whole
from tests.integration.interrupted import NEVER_SAVING, ROWS, SETTINGS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.refusals import only_message
from tests.integration.runs import metrics, summary, write_jsonl

pytestmark = pytest.mark.slow

LONG = ("--steps", "24")
REPOSITORY = str(Path(__file__).resolve().parents[2])


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as processes:
        yield processes


@pytest.fixture(scope="module")
def whole(processes: Processes) -> Path:
    assert run(processes, *LONG, "--output_dir", "whole")[0] == 0
    return processes.folder / "whole"


def go_on(processes: Processes, folder: str, faults: list[dict[str, Any]]) -> tuple[int, str, str]:
    """Start the run, or go on with it from its last checkpoint."""
    resume = ["--resume"] if newest_step(processes, folder) else []
    if (processes.folder / folder).exists() and not resume:
        resume = ["--overwrite"]
    return run(processes, *LONG, "--output_dir", folder, *resume, faults=faults)


def newest_step(processes: Processes, folder: str) -> int:
    """The step of the last complete checkpoint, which is what it says it is; 0 without any."""
    found, faulty = newest_whole(processes.folder / folder / "checkpoints")
    assert faulty == []
    return int(found.name.split("-")[1]) if found else 0


def test_each_signal_to_the_launcher_and_to_each_process(processes: Processes, whole: Path) -> None:
    places: list[dict[str, Any]] = [{"to": "launcher", "rank": 0}, {"rank": 0}, {"rank": 1}]
    for place, number in itertools.product(places, (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)):
        before = newest_step(processes, "signals")
        asked = {"do": "signal", "step": before + 1, "number": number, **place}
        status, output, errors = go_on(processes, "signals", [asked])
        assert (status, errors) == (75, ""), (place, number)
        assert f"stopped at step {newest_step(processes, 'signals')} of 24" in output
        assert before + 1 <= newest_step(processes, "signals") <= before + 2
        who = "rank 1 got " if place == {"rank": 1} else ""
        assert re.findall(r"note: (.*): saving at", output) == [f"{who}{signal.Signals(number).name}"]
    assert go_on(processes, "signals", [])[0] == 0
    assert_same_run(processes.folder / "signals", whole)


def test_kill_9_of_each_process_before_inside_and_after_a_save(processes: Processes, whole: Path) -> None:
    # Saved is after every second step. The main process writes; the other is killed while it does.
    for rank, where in itertools.product((0, 1), ("computing", "save", "saved")):
        if (rank, where) == (1, "saved"):
            continue
        before = newest_step(processes, "killed")
        faults: list[dict[str, Any]] = [{"do": "kill", "step": before + 4, "rank": rank, "where": where}]
        if (rank, where) == (1, "save"):
            faults.append({"do": "slow", "step": before + 4, "rank": 0})
        status, _, errors = go_on(processes, "killed", faults)
        # What the main process writes becomes whole where it is the other that is gone.
        finished = (rank, where) == (1, "save")
        assert newest_step(processes, "killed") == before + (4 if where == "saved" or finished else 2)
        assert status == 1
        killed, hint = errors.splitlines()
        assert killed.startswith(f"error: rank {rank} on {socket.gethostname()} was killed by SIGKILL")
        # A save that is cut off after the rename, before the launcher hears of it, is found all the same.
        known = before + (4 if finished else 2)
        assert re.match(rf"the last complete checkpoint is killed/checkpoints/step-{known}; go on", hint)
    assert go_on(processes, "killed", [])[0] == 0
    assert_same_run(processes.folder / "killed", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_plain_torchrun_saves_within_its_shutdown_time(
    processes: Processes, whole: Path, number: int
) -> None:
    folder = f"torchrun-{number}"
    asked = f'[{{"do": "signal", "step": 3, "rank": 1, "to": "launcher", "number": {int(number)}}}]'
    torchrun = ["torch.distributed.run", "--nproc_per_node", "2", "-m", "tests.integration.faulty_worker"]
    process = processes.start(
        *torchrun, *SETTINGS, *LONG, "--output_dir", folder, FAULTS=asked, PYTHONPATH=REPOSITORY
    )
    output, _ = process.communicate(timeout=240)
    assert processes.none_left()
    assert f"stopped at step {newest_step(processes, folder)} of 24. Go on with:" in output
    assert newest_step(processes, folder) in (3, 4)
    assert go_on(processes, folder, [])[0] == 0
    assert_same_run(processes.folder / folder, whole)


@pytest.mark.parametrize("seed", [0])
def test_random_moments_one_after_another_in_a_run(processes: Processes, whole: Path, seed: int) -> None:
    """A process is killed, or one or the launcher asked to stop, whatever the run is doing just then."""
    draws, steps = random.Random(seed), 24
    seconds_a_step = summary(whole)["train_seconds"] / steps
    kinds = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1]
    draws.shuffle(kinds)
    folder = f"random-{seed}"
    came = 0
    # Up to where a stop comes before the end: it is heeded a step after the one that is on its way.
    for number, moment in zip(kinds, sorted(draws.uniform(0, 0.85 * steps) for _ in kinds), strict=True):
        before = newest_step(processes, folder)
        step, part = divmod(max(moment, before), 1)
        fault: dict[str, Any] = {"do": "later", "step": int(step) + 1, "rank": draws.randrange(2)}
        fault |= {"number": number, "seconds": part * seconds_a_step}
        if number != signal.SIGKILL and draws.random() < 0.5:
            fault["to"] = "launcher"
        status, output, errors = go_on(processes, folder, [fault])
        told = (fault, status, output, errors)
        assert newest_step(processes, folder) >= before, told
        if (processes.folder / folder / "adapter").exists():  # the machine was faster than before
            assert status == 0, told
            break
        came += 1
        killed = number == signal.SIGKILL
        errors_told = sum(line.startswith("error:") for line in errors.splitlines())
        assert (status, errors_told) == (1 if killed else 75, killed), told
        assert ("stopped at step" in output) == (not killed), told
    else:
        assert go_on(processes, folder, [])[0] == 0
    assert came >= 3
    assert_same_run(processes.folder / folder, whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_rank_that_gets_a_signal_before_there_is_anything_to_save_is_named(
    processes: Processes, number: int
) -> None:
    # As its handlers are there already, and as they are not yet.
    for fault in ({"do": "loaded"}, {"do": "early"}):
        words = ["--output_dir", f"early-{number}", "--overwrite"]
        status, _, errors = run(processes, *words, faults=[{**fault, "rank": 1, "number": number}])
        name = signal.Signals(number).name
        assert (status, errors) == (1, f"error: rank 1 on {socket.gethostname()} was killed by {name}\n")


@pytest.mark.parametrize("where", ["sharing", "end", "adapter"])
def test_a_death_that_a_collective_tells_of_outside_the_steps_is_one_message(
    processes: Processes, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIED", str(tmp_path / "died"))
    faults = [{"do": "kill", "rank": 0, "where": where}]
    status, _, errors = run(processes, "--output_dir", where, faults=faults)
    # torchrun would wait 30 seconds for a process that takes its SIGTERM for a wish to save.
    assert time.time() - (tmp_path / "died").stat().st_mtime < 20
    told, *hint = errors.splitlines()
    killed = f"error: rank 0 on {socket.gethostname()} was killed by SIGKILL; out of CPU memory?"
    assert (status, told) == (1, killed)
    assert [line.split(" is ")[0] for line in hint] == ["the last complete checkpoint"] * (where != "sharing")


def test_a_second_signal_ends_at_once(processes: Processes) -> None:
    twice = [
        {"do": "signal", "step": 3, "rank": 0, "to": "launcher", "number": signal.SIGTERM, "wait": wait}
        for wait in (2.0, 30.0)
    ]
    status, output, errors = run(processes, *LONG, "--output_dir", "twice", faults=twice)
    assert status == 128 + signal.SIGTERM
    ended, hint = errors.splitlines()
    assert ended == f"error: ended by SIGTERM on {socket.gethostname()}"
    assert re.fullmatch(r"the last complete checkpoint is twice/checkpoints/step-2; go on with: .*", hint)
    assert "SIGTERM: saving at the end of a step" in output
    assert "stopped at step" not in output
    assert newest_step(processes, "twice") == 2


def test_a_signal_that_comes_twice_within_a_moment_is_one(processes: Processes) -> None:
    twice = [
        {"do": "signal", "step": 3, "rank": 0, "to": "launcher", "number": number, "wait": 0.02}
        for number in (signal.SIGINT, signal.SIGTERM)
    ]
    status, output, errors = run(processes, *LONG, "--output_dir", "doubled", faults=twice)
    assert (status, errors) == (75, "")
    assert "stopped at step" in output
    assert newest_step(processes, "doubled") in (3, 4)


def test_a_signal_while_one_process_is_late_to_begin(processes: Processes) -> None:
    faults = [
        {"do": "slow_start", "rank": 1},
        {"do": "signal", "step": 1, "rank": 0, "to": "launcher", "number": signal.SIGTERM},
    ]
    status, output, errors = run(processes, *LONG, "--output_dir", "begun", faults=faults)
    assert (status, errors) == (75, "")
    assert "stopped at step" in output
    assert newest_step(processes, "begun") in (1, 2)


def test_a_signal_while_the_processes_start_again(processes: Processes) -> None:
    faults = [
        {"do": "kill", "step": 5, "rank": 1, "where": "step", "restart": 0},
        {"do": "early", "rank": 0, "to": "launcher", "number": signal.SIGINT, "restart": 1},
    ]
    words = ["--output_dir", "again", "--max_restarts", "2"]
    status, output, errors = run(processes, *LONG, *words, faults=faults)
    assert status == 128 + signal.SIGINT, (output, errors)
    *before, ended, last = errors.splitlines()
    assert "Traceback" not in before, errors
    assert ended == f"error: ended by SIGINT on {socket.gethostname()}"
    assert re.fullmatch(r"the last complete checkpoint is again/checkpoints/step-4; go on with: .*", last)
    assert newest_step(processes, "again") == 4


def test_torchruns_restarts_resume_by_themselves(processes: Processes, whole: Path) -> None:
    faults = [
        {"do": "kill", "step": 5 + 3 * each, "rank": each % 2, "where": "step", "restart": each}
        for each in (0, 1)
    ]
    # The other one looks first for where it is, and finds where it was before the restart.
    faults += [{"do": "late", "rank": 0, "seconds": 3.0, "restart": each} for each in (1, 2)]
    status, output, errors = run(
        processes, *LONG, "--output_dir", "restarted", "--max_restarts", "2", faults=faults
    )
    assert (status, "error:" in errors) == (0, False), (output, errors)
    assert_same_run(processes.folder / "restarted", whole)


def test_restarts_of_a_run_that_goes_on_from_an_older_checkpoint(processes: Processes, whole: Path) -> None:
    """Restarted before it has taken that up, it goes on from there; later, from where it has come to."""
    settings = [*LONG, "--save_total_limit", "20"]
    assert run(processes, *settings, "--output_dir", "older")[0] == 0
    faults = [
        {"do": "kill", "where": "loading", "rank": 1, "restart": 0},
        {"do": "kill", "where": "step", "step": 15, "rank": 0, "restart": 1},
    ]
    words = ["--resume", "older/checkpoints/step-10", "--max_restarts", "2"]
    status, output, errors = run(processes, *settings, *words, faults=faults)
    assert (status, "error:" in errors) == (0, False), (output, errors)
    assert re.findall(r"going on from step (\d+)", output) == ["10", "14"]
    assert_same_run(processes.folder / "older", whole)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (
            "hang",
            r"rank 1 has made no progress for \d+ s, computing at step 3\. Its Python (.|\n)*faulty_worker",
        ),
        ("stopped", "rank 1 is not responding"),
        (
            "write_hangs",
            r"rank 0 has made no progress .*saving a checkpoint at step 6(.|\n)*writes a checkpoint:",
        ),
    ],
)
def test_a_process_that_hangs_is_named_and_the_run_ends(processes: Processes, fault: str, told: str) -> None:
    where = {"step": 4} if fault == "write_hangs" else {"step": 3, "rank": 1}
    faults = [{"do": fault, **where}]
    status, _, errors = run(processes, *LONG, "--output_dir", fault, "--hang_minutes", "0.1", faults=faults)
    assert status == 1
    assert re.search(told, errors), errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1
    assert newest_step(processes, fault) == 2


@pytest.mark.parametrize(
    "words",
    ["-q 8bit --packing false", "-q 16bit --streaming true", "-q 16bit --packing false --padding max_length"],
)
def test_every_way_of_reading_goes_on_to_the_last_bit(processes: Processes, words: str) -> None:
    name = re.sub(r"\W", "", words)
    settings = [*words.split(), "--optim", "adamw_torch"]
    assert run(processes, *settings, "--output_dir", f"{name}-whole")[0] == 0
    asked = {"do": "signal", "step": 4, "rank": 1, "number": signal.SIGTERM}
    assert run(processes, *settings, "--output_dir", name, faults=[asked])[0] == 75
    stopped_at = newest_step(processes, name)
    assert stopped_at in (4, 5)
    cursor = processes.folder / name / f"checkpoints/step-{stopped_at}/stream.json.gz"
    assert cursor.is_file() == ("--streaming" in words)
    assert run(processes, *settings, "--output_dir", name, "--resume")[0] == 0
    assert_same_run(processes.folder / name, processes.folder / f"{name}-whole")


@pytest.mark.parametrize("words", ["--packing true", "--streaming true"])
def test_another_number_of_processes_makes_the_same_global_batches(processes: Processes, words: str) -> None:
    name = f"one{words.split()[0]}"
    settings = [*words.split(), "-q", "16bit", "--compute_dtype", "fp32", "--lora_dropout", "0"]
    settings += ["--logging_steps", "1", "--save_steps", "5"]
    assert run(processes, *settings, "--output_dir", f"{name}-whole")[0] == 0
    asked = {"do": "signal", "step": 4, "rank": 1, "number": signal.SIGTERM}
    assert run(processes, *settings, "--output_dir", name, faults=[asked])[0] == 75
    status, output, _ = run(processes, *settings, "--output_dir", name, "--resume", gpus=1)
    assert status == 0
    assert "keeping the run's global batch size of 8" in output
    assert "resuming on 1 process instead of 2: each step has the same documents" in output
    lines, expected = (metrics(processes.folder / each) for each in (name, f"{name}-whole"))
    assert [line["tokens"] for line in lines] == [line["tokens"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        assert line["loss"] == pytest.approx(other["loss"], rel=1e-5)


def test_a_run_is_not_gone_on_with_as_another_run(processes: Processes) -> None:
    write_jsonl(processes.folder / "other.jsonl", ROWS[1:])
    words = ["--steps", "2", "--save_steps", "1"]
    assert run(processes, "--output_dir", "first", *words)[0] == 0
    for changed, told in (
        (["--learning_rate", "1e-4"], "learning_rate was 0.001"),
        (["--max_length", "48"], "max_length was 64"),
        (["--dataset_name", "other.jsonl"], "the data is not what the run began with"),
    ):
        status, _, errors = run(processes, "--output_dir", "first", *words, *changed, "--resume")
        assert status == 2
        assert told in only_message(errors)


def test_an_altered_checkpoint_is_passed_over_for_the_one_before(processes: Processes) -> None:
    words = ["--steps", "3", "--save_steps", "1", "--output_dir", "altered"]
    assert run(processes, *words)[0] == 0
    adapter = processes.folder / "altered/adapter/adapter_model.safetensors"
    before = adapter.read_bytes()
    adapter.unlink()
    state = processes.folder / "altered/checkpoints/step-3/optimizer.pt"
    data = bytearray(state.read_bytes())
    data[len(data) // 2] ^= 1
    state.write_bytes(data)
    status, output, errors = run(processes, *words, "--resume")
    assert (status, errors) == (0, "")
    assert "step-3 is skipped: optimizer.pt is not what was written" in output
    assert "going on from step 2" in output
    assert adapter.read_bytes() == before


def test_the_clock_saves_too(processes: Processes) -> None:
    words = ["--save_every_minutes", "0.0001", "--output_dir", "clock"]
    assert run(processes, *words, settings=NEVER_SAVING)[0] == 0
    # Asked for with a step's gradients, heeded at the end of the next, and not asked for meanwhile.
    steps = [path.name for path in (processes.folder / "clock/checkpoints").iterdir()]
    assert newest_step(processes, "clock") >= 8, steps
