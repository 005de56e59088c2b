"""The lock on a run directory: one process has it, and it is gone with that process, however it ends."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.run_folder.lock import RunLock

HOLDER = """
import multiprocessing, pathlib, sys, time
from falcon_qlora.run_folder.lock import RunLock
with RunLock(print) as lock:
    lock.take(pathlib.Path(sys.argv[1]))
    lock.take(pathlib.Path(sys.argv[1]) / ".." / pathlib.Path(sys.argv[1]).name)
    # Children have copies of its descriptors, and close them.
    child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(0.01,))
    child.start()
    child.join()
    print("has it", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[str]]:
    words = [sys.executable, "-c", HOLDER, str(folder)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "has it\n"
        yield process
        process.kill()


def never(message: str) -> None:
    raise AssertionError(message)


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_a_folder_is_one_process_s_as_long_as_it_lives(tmp_path: Path, how: signal.Signals | None) -> None:
    with holder(tmp_path) as process, RunLock(never) as lock:
        told = rf"process {process.pid} on {re.escape(socket.gethostname())} \(since 20\d\d-.*\) is training"
        with pytest.raises(UserError, match=told):
            lock.take(tmp_path)
        if how is not None:
            process.send_signal(how)
        elif process.stdin is not None:
            process.stdin.close()
        process.wait(timeout=10)
        assert (tmp_path / ".lock").exists() == (how is not None)
        lock.take(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with holder(tmp_path):
        pass


def test_a_file_that_another_process_removes_meanwhile_is_no_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = fcntl.lockf
    removed: list[Path] = []

    def lockf(handle: int, how: int) -> None:
        if not removed:
            (tmp_path / ".lock").unlink()  # its owner's last act
            removed.append(tmp_path)
        real(handle, how)

    monkeypatch.setattr(fcntl, "lockf", lockf)
    with RunLock(never) as lock:
        lock.take(tmp_path)
        words = [sys.executable, "-c", HOLDER, str(tmp_path)]
        other = subprocess.run(words, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert f"process {os.getpid()} on" in other.stderr


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_where_there_are_no_locks_the_run_goes_on_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    def lockf(*arguments: Any) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "lockf", lockf)
    said: list[str] = []
    with RunLock(said.append) as lock:
        lock.take(tmp_path)
    assert len(said) == 1
    assert f"{tmp_path} cannot be locked ({os.strerror(number)})" in said[0]


def test_a_link_in_the_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.write_text("what is in it")
    run = tmp_path / "run"
    run.mkdir()
    (run / ".lock").symlink_to(precious)
    said: list[str] = []
    with RunLock(said.append) as lock:
        lock.take(run)
    assert precious.read_text() == "what is in it"
    assert "cannot be locked" in said[0]


@pytest.mark.parametrize(
    ("left", "told"),
    [
        ("", None),
        ("\x1b[2J{", None),
        ("[1]", None),
        ("fifo", None),
        ('{"host": "else\x1bwhere", "process": 1, "since": "2020"}', "process 1 on elsewhere (since 2020)"),
        (f'{{"host": {json.dumps(socket.gethostname())}, "process": 1, "since": "2020"}}', None),
    ],
)
def test_a_lock_that_another_host_left_is_taken_over(tmp_path: Path, left: str, told: str | None) -> None:
    """It is the kernel's lock that counts, not what the file says of its holder."""
    left = left.replace("\x1b", "\\u001b") if told else left
    if left == "fifo":
        os.mkfifo(tmp_path / ".lock")
    else:
        (tmp_path / ".lock").write_text(left)
    said: list[str] = []
    with RunLock(said.append) as lock:
        lock.take(tmp_path)
    assert list(tmp_path.iterdir()) == []
    if told is None:
        assert said == []
    else:
        assert [told in line for line in said] == [True]
