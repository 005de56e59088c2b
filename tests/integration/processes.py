"""Starting a command line with several processes, and finding what it leaves."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

from tests.integration.forks import Popen
from tests.integration.refusals import contents
from tests.integration.runs import ENVIRONMENT, each_once


class Processes:
    """Starts a command in a folder, and finds what it leaves: files there, and processes anywhere."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._mark = f"falcon-qlora-test-{uuid.uuid4().hex}"

    def start(self, *command: str, **environment: str) -> subprocess.Popen[str]:
        return Popen(
            [sys.executable, "-m", *each_once(command)],
            cwd=self.folder,
            env=os.environ | ENVIRONMENT | {"MARK": self._mark} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, *command: str, **environment: str) -> tuple[int, str, str]:
        """Exit status, stdout and stderr, of a command that leaves nothing behind."""
        before = contents(self.folder)
        process = self.start(*command, **environment)
        output, errors = process.communicate(timeout=120)
        assert self.none_left()
        assert contents(self.folder) == before
        return process.returncode, output, errors

    def none_left(self, within_s: float = 5.0) -> bool:
        """Whether every process that inherited this object's environment, or its folder, is gone."""
        deadline = time.monotonic() + within_s
        while self.left() and time.monotonic() < deadline:
            time.sleep(0.1)
        return not self.left()

    def left(self) -> list[Path]:
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            if process.name == str(os.getpid()):
                continue
            with contextlib.suppress(OSError):  # gone meanwhile, or another user's
                marked = self._mark.encode() in (process / "environ").read_bytes()
                if marked or (process / "cwd").readlink() == self.folder.resolve():
                    found.append(process)
        return found

    def end(self) -> None:
        """Kill what is left."""
        for process in self.left():
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(process.name), signal.SIGKILL)
