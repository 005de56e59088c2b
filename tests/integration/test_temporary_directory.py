"""The temporary directory after each command: as it was before, whatever libraries leave behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import falcon_qlora
from falcon_qlora.common.files import remove_temporary_files, temporary_files, temporary_folder
from falcon_qlora.config.verbs import VERBS
from tests.integration.processes import Processes

ROWS = "-m tiny --dataset_name sample --max_rows 40 --max_length 64".split()
TRAIN = ["train", *ROWS, *"-b 2 --steps 2 --report_to wandb --output_dir new --overwrite".split()]
VERB = {
    "train": TRAIN,
    "train, two processes": [*TRAIN, "--gpus", "2"],
    "data": ["data", *ROWS],
    "prepare": ["prepare", *ROWS, "--cache_dir", "prepared"],
    "prepare, a base": "prepare -m tiny -q 4bit --output_dir base".split(),
    "params": ["params", "-m", "tiny"],
    "estimate": ["estimate", *ROWS],
    "generate": "generate --adapter run --prompt hello --max_new_tokens 4".split(),
    "compare": ["compare", *ROWS, *"-b 2 --steps 2 --methods lora --report_to wandb --output_dir c".split()],
    "bench": "bench -m tiny --steps 1 --rounds 1 --warmup 1 --tokens 512".split(),
    "bench, the recipe": [*"bench -m tiny --gpus 1 --steps 1 --warmup 1 --tokens 512".split()],
    "merge": "merge --adapter run --out merged --held_out_tokens 256".split(),
    "inspect": ["inspect", "run"],
    "eval": ["eval", "--adapter", "run", *ROWS],
}


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A folder with a finished run."""
    folder = tmp_path_factory.mktemp("work")
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name="sample",
        max_rows=40,
        output_dir=folder / "run",
        max_length=64,
        max_steps=1,
        report_to="none",
    )
    found = Processes(folder)
    yield found
    found.end()


def test_every_verb_is_here() -> None:
    assert {words[0] for words in VERB.values()} == set(VERBS)


@pytest.mark.slow
@pytest.mark.parametrize("name", VERB)
def test_it_is_empty_after(processes: Processes, tmp_path: Path, name: str) -> None:
    process = processes.start(
        "falcon_qlora", *VERB[name], TMPDIR=str(tmp_path), WANDB_MODE="offline", WANDB_SILENT="true"
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, (output, errors)
    assert [*tmp_path.iterdir()] == []


@pytest.mark.slow
def test_the_next_command_removes_what_a_killed_one_left(processes: Processes, tmp_path: Path) -> None:
    more = ["--steps", "2000", "--save_strategy", "no", "--logging_steps", "1"]
    environment = {"TMPDIR": str(tmp_path), "WANDB_MODE": "offline"}
    log = processes.folder / "new/metrics.jsonl"
    log.unlink(missing_ok=True)
    process = processes.start("falcon_qlora", *TRAIN, *more, **environment)
    deadline = time.monotonic() + 120
    while not log.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert processes.none_left()
    assert len([*tmp_path.iterdir()]) == 1
    assert any("wandb" in path.name for path in tmp_path.rglob("*"))
    process = processes.start("falcon_qlora", *VERB["params"], **environment)
    process.communicate(timeout=60)
    assert (process.returncode, [*tmp_path.iterdir()]) == (0, [])


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path.with_name("kept")))
    return tmp_path


ASKS = "import os, tempfile; print(tempfile.mkdtemp(), os.environ['TORCHINDUCTOR_CACHE_DIR'])"


def test_what_is_started_shares_the_folder_and_keeps_compiled_code(temporary: Path) -> None:
    with temporary_files():
        ours = Path(tempfile.mkdtemp()).parent
        with temporary_files():
            theirs, kept = subprocess.check_output([sys.executable, "-c", ASKS], text=True).split()
        assert ours.parent == temporary
        assert Path(theirs).parent == ours
    assert kept == str(temporary.with_name("kept") / "falcon_qlora/kernels/inductor")
    assert [*temporary.iterdir()] == []
    assert os.environ["TMPDIR"] == tempfile.gettempdir() == str(temporary)
    with temporary_files():
        tempfile.mkdtemp()
        remove_temporary_files()
        assert [*temporary.iterdir()] == []


def test_what_others_put_there_is_neither_waited_for_nor_followed(temporary: Path) -> None:
    precious = temporary / "precious"
    precious.mkdir()
    os.mkfifo(temporary / "falcon-qlora-aaaaaaaa")
    (temporary / "falcon-qlora-bbbbbbbb").symlink_to(precious)
    (temporary / "falcon-qlora-cccccccc").write_text("")
    (temporary / "falcon-qlora-dddddddd").mkdir()
    if os.getuid() == 0:
        (temporary / "falcon-qlora-eeeeeeee").mkdir()
        os.chown(temporary / "falcon-qlora-eeeeeeee", 1234, 1234)
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.alarm(20)
    with temporary_folder():
        signal.alarm(0)
    left = sorted(path.name.removeprefix("falcon-qlora-")[0] for path in temporary.iterdir())
    assert left == sorted(["a", "b", "c", "p", *["e"] * (os.getuid() == 0)])
