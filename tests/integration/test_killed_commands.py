"""kill -9 inside merge, prepare and compare, and to W&B's process: nothing half done is taken for whole.

Also of two at once into one folder.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

import falcon_qlora
from tests.integration.processes import Processes
from tests.integration.refusals import contents, only_message
from tests.integration.runs import metrics, write_jsonl

pytestmark = pytest.mark.slow

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(3000)]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    """A folder with rows and a finished run."""
    folder = tmp_path_factory.mktemp("killed")
    write_jsonl(folder / "rows.jsonl", ROWS)
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=folder / "rows.jsonl",
        max_rows=40,
        output_dir=folder / "run",
        max_length=64,
        max_steps=1,
        lora_r=4,
        report_to="none",
        cache_dir=folder / "cache-of-run",
    )
    found = Processes(folder)
    yield found
    found.end()


def begun(processes: Processes, there: str, *words: str) -> subprocess.Popen[str]:
    """Run a command until a path of this pattern is in the folder."""
    process = processes.start("falcon_qlora", *words)
    deadline = time.monotonic() + 120
    while not [*processes.folder.glob(there)]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


def killed_when(processes: Processes, there: str, *words: str) -> None:
    """Run a command, and kill it as soon as a path of this pattern is in the folder."""
    process = begun(processes, there, *words)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    assert processes.none_left(within_s=1.0), "a process stayed"


def done(processes: Processes, *words: str) -> str:
    process = processes.start("falcon_qlora", *words)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, (output, errors)
    return output


def test_merge(processes: Processes) -> None:
    words = ["merge", "--adapter", "run", "--out", "merges/m", "--held_out_tokens", "256"]
    for there in ("merges/.m-partial-*/*/model*.safetensors", "merges/m/config.json"):
        killed_when(processes, there, *words)
        if (processes.folder / "merges/m").exists():  # it is whole, then
            done(processes, "inspect", "merges/m")
            words = [*words, "--overwrite"]
    done(processes, *words)
    assert [path.name for path in (processes.folder / "merges").iterdir()] == ["m"]
    done(processes, "inspect", "merges/m")


MERGE = "merge --adapter run --held_out_tokens 256 --out".split()
PREPARE = "prepare -m tiny --output_dir".split()


@pytest.mark.parametrize(("words", "other"), [(MERGE, "--dtype fp32"), (PREPARE, "-q 8bit")])
def test_of_two_into_one_folder_one_is_told(processes: Processes, words: list[str], other: str) -> None:
    folder, out = processes.folder, f"twice/{words[0]}"
    done(processes, *words, "elsewhere", *other.split())
    process = begun(processes, f"{out.replace('/', '/.')}-partial-*/**/model*.safetensors", *words, out)
    os.kill(process.pid, signal.SIGSTOP)
    assert processes.start("falcon_qlora", *words, out).wait(120) == 2
    shutil.move(folder / "elsewhere", folder / out)  # as one that began at the same moment puts it there
    before = contents(folder / out)
    os.kill(process.pid, signal.SIGCONT)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 2, errors
    assert "another process has written this folder meanwhile" in only_message(errors)
    assert contents(folder / out) == before
    assert [path.name for path in (folder / out).parent.iterdir()] == [words[0]]
    shutil.rmtree(folder / "twice")


def test_prepare_and_its_cache(processes: Processes) -> None:
    words = ["prepare", "-m", "tiny", "--dataset_name", "rows.jsonl", "--max_length", "64"]
    told = done(processes, *words, "--cache_dir", "whole").splitlines()[-3:]
    for there in ("cache/.*-partial-*", "cache/.*-partial-*/documents.arrow", "cache/[0-9a-f]*"):
        killed_when(processes, there, *words, "--cache_dir", "cache")
    assert done(processes, *words, "--cache_dir", "cache").splitlines()[-3:] == told
    files = [sorted(each.rglob("*")) for each in (processes.folder / "cache", processes.folder / "whole")]
    names = [[path.relative_to(processes.folder).parts[1:] for path in found] for found in files]
    assert names[0] == names[1]  # nothing of the killed ones is left
    assert all(
        one.read_bytes() == other.read_bytes() for one, other in zip(*files, strict=True) if one.is_file()
    )


def test_compare(processes: Processes) -> None:
    # Of so many steps a run that outlived the command would be found.
    words = "compare -m tiny --dataset_name rows.jsonl --max_rows 40 --max_length 64 -b 2 --steps 40".split()
    words += "--save_steps 2 --logging_steps 1 --report_to none --methods lora --output_dir c".split()
    killed_when(processes, "c/runs/lora/checkpoints/step-2", *words)
    assert "going on from step" in done(processes, *words)
    lines = metrics(processes.folder / "c/runs/lora")
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 41))


def test_the_process_of_wandb(processes: Processes) -> None:
    words = "train -m tiny --dataset_name rows.jsonl --max_rows 40 --max_length 64 -b 2 --steps 20".split()
    words += "--logging_steps 1 --report_to wandb --output_dir w".split()
    process = processes.start("falcon_qlora", *words, WANDB_MODE="offline")
    log, killed = processes.folder / "w/metrics.jsonl", []
    while not killed and process.poll() is None:
        if log.exists() and len(log.read_text().splitlines()) > 2:
            for each in processes.left():
                if b"wandb-core" in (each / "cmdline").read_bytes():
                    os.kill(int(each.name), signal.SIGKILL)
                    killed.append(each)
        time.sleep(0.01)
    output, errors = process.communicate(timeout=120)
    assert (process.returncode, errors, len(killed)) == (0, "", 1)
    assert "note: W&B failed" in output
    assert [line["step"] for line in metrics(processes.folder / "w")] == list(range(1, 21))
