"""Tokenizing in several processes: none is a fork, none is waited for in vain, none is left behind."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.processes import run_each
from tests.unit.test_cli import assert_gone

SLEEP = functools.partial(time.sleep, 600)


class OddError(Exception):
    """`pickle` can write it, and not read it."""

    def __init__(self, first: str, second: str):
        super().__init__(first + second)


def raise_odd() -> None:
    raise OddError("o", "dd")


def show_a_bar(shown: Path) -> None:
    datasets.utils.tqdm([], disable=True)
    shown.touch()
    time.sleep(600)


def fail_after(shown: Path) -> None:
    while not shown.exists():
        time.sleep(0.05)
    raise ValueError("after the bar")


def leave_pid(folder: Path) -> None:
    (folder / str(os.getpid())).touch()
    time.sleep(600)


# Without `if __name__ == "__main__"`.
SCRIPT = """
import os, sys, threading
print("the script runs", flush=True)
os.register_at_fork(before=lambda: print("a fork", flush=True))
from functools import partial
from pathlib import Path
from falcon_qlora.data.processes import run_each
from falcon_qlora.common.errors import UserError
from tests.unit.test_data_processes import fail_after, show_a_bar
from tests.unit.test_data_tokenize import alpaca, prepare, write
folder = Path(sys.argv[1])
corpus, _ = prepare(folder, write(folder / "a.jsonl", alpaca(9)), num_proc=2)
print(len(corpus.dataset), "documents,", threading.active_count(), "thread")
rows = [*alpaca(9), {"instruction": ["x"], "output": "y"}]
try:
    prepare(folder, write(folder / "b.jsonl", rows), num_proc=2)
except UserError as error:
    print(error)
try:
    run_each([partial(show_a_bar, folder / "bar"), partial(fail_after, folder / "bar")])
except ValueError as error:
    print(error)
"""


def test_a_script_runs_once_and_nothing_is_forked(tmp_path: Path, repository: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, script, tmp_path],
        env=os.environ | {"PYTHONPATH": str(repository)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    said = ["the script runs", "9 documents, 1 thread"]
    said.append(f"{tmp_path}/b.jsonl:10: column instruction: expected text, found a list")
    said.append("after the bar")
    assert (done.stdout.splitlines(), done.stderr) == (said, "")
    assert len(list((tmp_path / "cache").glob("*/documents_*.arrow"))) == 2


@pytest.mark.parametrize(
    ("task", "error", "said"),
    [
        (functools.partial(int, "x"), ValueError, "invalid literal"),
        (raise_odd, RuntimeError, "in raise_odd"),
        (
            functools.partial(os._exit, 9),
            UserError,
            r"ended without a word \(status 9\).*--dataset_num_proc 1",
        ),
    ],
)
def test_one_that_fails_ends_all(task: Any, error: type[Exception], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(error, match=said):
        run_each([SLEEP, task, SLEEP])
    assert time.monotonic() - began < 60


def test_none_outlives_a_process_that_was_killed(tmp_path: Path, repository: Path) -> None:
    code = (
        "from functools import partial\n"
        "from pathlib import Path\n"
        "from falcon_qlora.data.processes import run_each\n"
        "from tests.unit.test_data_processes import leave_pid\n"
        f"run_each([partial(leave_pid, Path({str(tmp_path)!r}))] * 2)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], cwd=repository) as parent:
        deadline = time.monotonic() + 60
        while len(children := [int(file.name) for file in tmp_path.iterdir()]) < 2:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        parent.kill()
        parent.wait()
        assert_gone(children, within_s=60)
