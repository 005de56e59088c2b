"""What the tests of bad input share: a working folder, its content, and the one message."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.integration.runs import write_jsonl

PLAIN = ["-m", "tiny", "-q", "4bit", "--max_length", "64", "-b", "2", "--report_to", "none"]
ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(8)]


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a command, with good rows in it; the caches lie elsewhere."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.chdir(folder)
    write_jsonl(folder / "rows.jsonl", ROWS)
    return folder


def train(*words: str) -> list[str]:
    """A good command line, with `words` that make it a bad one."""
    return ["train", *PLAIN, "--dataset_name", "rows.jsonl", *words]


def contents(folder: Path) -> dict[str, bytes | None]:
    """Everything in `folder`, with the bytes of the files."""
    return {str(path): path.read_bytes() if path.is_file() else None for path in sorted(folder.rglob("*"))}


def only_message(errors: str) -> str:
    """The message of what a refused command has printed on stderr; beside the first line that is all.

    `train` repeats flags of `PLAIN`, which a note tells.
    """
    errors = re.sub(r"^(?:note: --?\w+ is given twice: .*\n)+", "", errors)
    errors = errors.removeprefix("loading libraries …\n")
    assert errors.startswith("error: "), errors
    assert sum(line.startswith("error:") for line in errors.splitlines()) == 1, errors
    assert "Traceback" not in errors
    return errors.removeprefix("error: ").rstrip()


def is_no_more_than_phases(output: str) -> bool:
    """Whether what a refused command has printed on stdout says what was begun, and nothing else."""
    return all(line.endswith(" …") for line in output.splitlines())
