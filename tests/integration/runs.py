"""Running the real command line and reading what a run leaves."""

from __future__ import annotations

import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.config.verbs import VERBS
from tests.integration.forks import Popen

ENVIRONMENT = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled", "NO_COLOR": "1"}


def each_once(words: Sequence[str]) -> list[str]:
    """A command with the last of each flag alone: of one that is given twice a note tells."""
    verbs = [at for at, word in enumerate(words) if word in VERBS or word == "falcon_qlora.train"]
    begin = verbs[0] + 1 if verbs else len(words)
    flags: dict[str, list[str]] = {"": []}
    for word in words[begin:]:
        if re.match(r"--\w|-[a-zA-Z]$", word):
            name = word.partition("=")[0]
            flags.pop(name, None)
            flags[name] = [word]
        else:
            flags[next(reversed(flags))].append(word)
    return [*words[:begin], *(word for group in flags.values() for word in group)]


def command(*arguments: str | Path, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """``falcon-qlora ARGUMENTS`` as a user would run it."""
    process = Popen(
        [sys.executable, "-m", "falcon_qlora", *each_once([*map(str, arguments)])],
        env={**os.environ, **ENVIRONMENT},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def in_process(argv: list[str], folder: Path, meanwhile: Callable[[], None]) -> int:
    """What `commands.train._run_one` does, in this process: for tests of what is typed, not of processes."""
    from falcon_qlora import config
    from falcon_qlora.processes import endings
    from falcon_qlora.training import run

    meanwhile()
    words = argv[argv.index("falcon_qlora.train") + 1 :]
    return endings.exit_status(lambda: run.train(config.parse(words)))


def train(output: Path, *arguments: str | Path, gpus: int = 1) -> list[dict[str, Any]]:
    """Train in `output` and return the lines of metrics.jsonl."""
    result = command("train", "--output_dir", output, "--gpus", str(gpus), "--report_to", "none", *arguments)
    if result.returncode:
        pytest.fail(f"exit status {result.returncode}\n{result.stdout[-3000:]}\n{result.stderr[-5000:]}")
    return metrics(output)


def metrics(output: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def summary(output: Path) -> dict[str, Any]:
    return json.loads((output / "summary.json").read_text())


@contextmanager
def room_for(size: int) -> Iterator[None]:
    """No file can be larger, in bytes: what goes beyond is cut off, and then refused."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
