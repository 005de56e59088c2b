"""Of two trainings in one folder at once the second is refused, and the first does not notice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.integration.interrupted import at_work
from tests.integration.processes import Processes
from tests.integration.refusals import only_message
from tests.integration.runs import command, metrics, summary

ROWS = [{"text": f"{n} and {n} is {2 * n}."} for n in range(40)]
# A checkpoint of rank 8 takes a few megabytes: all that are kept must fit the disk that a test finds.
WORDS = (
    "-m tiny --max_length 32 -b 1 --lora_r 8 --save_steps 20 --save_total_limit 100 --logging_steps 1 "
    "--report_to none --dataset_name rows.jsonl --learning_rate 1e-4 --lr_scheduler_type constant "
    "--output_dir run"
).split()

pytestmark = pytest.mark.slow


@pytest.fixture
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as processes:
        yield processes


def until(true: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not true():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)


def train(processes: Processes, *words: str) -> subprocess.Popen[str]:
    return processes.start("falcon_qlora", "train", *words)


def logged(run: Path) -> int:
    return len((run / "metrics.jsonl").read_text().splitlines()) if (run / "metrics.jsonl").exists() else 0


@pytest.mark.parametrize("gpus", ["1", "2"])
def test_the_second_is_refused_and_after_a_kill_goes_on_at_once(processes: Processes, gpus: str) -> None:
    run = processes.folder / "run"
    first = train(processes, *WORDS, "--gpus", gpus, "--max_steps", "100000")
    until(lambda: (run / "checkpoints").is_dir() and any((run / "checkpoints").glob("step-*")), first)
    about = json.loads((run / ".lock").read_text())
    for words in (["--resume", "run"], [*WORDS, "--overwrite", "--max_steps", "2"]):
        second = train(processes, *words, "--gpus", gpus)
        _, errors = second.communicate(timeout=120)
        assert second.returncode == 2
        told = only_message(errors)
        assert f"process {about['process']} on {about['host']} (since {about['since']}) is training" in told
    # Other commands read what is there; and it trains on.
    assert command("inspect", run).returncode in (0, 1)
    before = logged(run)
    until(lambda: logged(run) > before + 5, first)
    words = ["--adapter", run / "checkpoints" / f"step-{newest(run)}", "--dataset_name", "sample"]
    assert command("eval", *words, "--most_tokens", "200").returncode == 0
    so_far = [line["step"] for line in metrics(run)]
    assert so_far == list(range(1, len(so_far) + 1))
    # The launcher's death is the processes' too.
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    third = train(processes, "--resume", "run", "--gpus", gpus, "--max_steps", str(newest(run) + 3))
    output, errors = third.communicate(timeout=240)
    assert (third.returncode, errors) == (0, "")
    assert summary(run)["steps"] == metrics(run)[-1]["step"]
    assert [line["step"] for line in metrics(run)] == list(range(1, summary(run)["steps"] + 1))
    assert re.search(r"going on from step", output)
    assert not (run / ".lock").exists()


def newest(run: Path) -> int:
    return max(int(path.name.removeprefix("step-")) for path in (run / "checkpoints").glob("step-*"))


def test_a_run_that_is_asked_to_stop_goes_on_right_after(processes: Processes) -> None:
    run = processes.folder / "run"
    first = train(processes, *WORDS, "--gpus", "1", "--max_steps", "100000")
    until(lambda: logged(run) > 3, first)
    first.send_signal(signal.SIGTERM)
    output, errors = first.communicate(timeout=120)
    assert (first.returncode, errors) == (75, "")
    stopped = re.search(r"stopped at step (\d+)", output)
    assert stopped is not None
    second = train(processes, "--resume", "run", "--gpus", "1", "--max_steps", str(int(stopped[1]) + 2))
    output, errors = second.communicate(timeout=240)
    assert (second.returncode, errors) == (0, "")
    assert summary(run)["steps"] == int(stopped[1]) + 2


def test_two_that_begin_in_one_new_folder(processes: Processes) -> None:
    """Neither finds a run there when it starts."""
    both = [train(processes, *WORDS, "--gpus", "1", "--max_steps", "200") for _ in range(2)]
    ended = [(process.communicate(timeout=240), process.returncode) for process in both]
    assert sorted(status for _, status in ended) == [0, 2]
    told = next(errors for (_, errors), status in ended if status == 2)
    assert re.search(r"is training there|holds a run already", only_message(told))
    assert [line["step"] for line in metrics(processes.folder / "run")] == list(range(1, 201))
