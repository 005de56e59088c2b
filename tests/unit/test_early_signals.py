"""A signal at any import of a command's own: one line, and 128 + its number as the exit status."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from falcon_qlora.processes import early

REPOSITORY = Path(__file__).resolve().parents[2]
# Python imports this before anything else. The signal comes while a text is executed: Python by itself would
# then end by the signal in the end, whatever becomes of the exception.
HOOK = """
import os, signal, sys
class Finder:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == os.environ.get("AT"):
            exec("os.kill(os.getpid(), int(os.environ['NUMBER']))\\nfor _ in range(100): pass")
sys.meta_path.insert(0, Finder)
"""
WORDS = ("falcon_qlora", "params", "-m", "tiny")
IN_THE_COMMAND = "falcon_qlora.models.locate"


def ended(folder: Path, at: str, number: int, *words: str) -> tuple[int, str, str]:
    (folder / "sitecustomize.py").write_text(HOOK)
    result = subprocess.run(
        [sys.executable, "-m", *words],
        env=os.environ
        | {
            "PYTHONPATH": f"{folder}:{REPOSITORY}",
            "AT": at,
            "NUMBER": str(int(number)),
            "TMPDIR": str(folder),
        },
        capture_output=True,
        text=True,
        # The shell may have had pytest ignore one, as it does in the background; so may an earlier test.
        preexec_fn=lambda: [signal.signal(each, signal.SIG_DFL) for each in early.STOP_SIGNALS],
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.parametrize(
    "at",
    ["falcon_qlora.common", "falcon_qlora.__main__", "falcon_qlora.commands.params", IN_THE_COMMAND],
)
@pytest.mark.parametrize(
    ("number", "said"),
    [
        (signal.SIGINT, "interrupted"),
        (signal.SIGTERM, f"ended by SIGTERM on {socket.gethostname()}"),
        (signal.SIGUSR1, f"ended by SIGUSR1 on {socket.gethostname()}"),
    ],
)
def test_one_line(tmp_path: Path, at: str, number: signal.Signals, said: str) -> None:
    assert ended(tmp_path, at, number, *WORDS) == (128 + number, "", f"error: {said}\n")
    assert [path.name for path in tmp_path.iterdir()] == ["sitecustomize.py"]


def test_a_rank_leaves_telling_to_its_launcher(tmp_path: Path) -> None:
    words = ("falcon_qlora.commands.worker", str(os.getpid()), "falcon_qlora.train")
    assert ended(tmp_path, "falcon_qlora.common", signal.SIGINT, *words) == (130, "", "")


def test_other_programs_keep_their_signals(tmp_path: Path) -> None:
    shows = "signal.getsignal(2) is signal.default_int_handler, signal.getsignal(15) == 0"
    for package in ("falcon_qlora_of_others", "others"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").write_text("import falcon_qlora")
        (tmp_path / package / "__main__.py").write_text(f"import signal; print({shows})")
        assert ended(tmp_path, "", 0, package) == (0, "True True\n", "")
