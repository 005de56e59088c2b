"""Runs whose --output_dir is an address: killed in an upload, on another machine, without the store."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora.common import by_url, stores
from tests.folder_store import objects
from tests.integration.forks import Popen
from tests.integration.interrupted import ROWS, SETTINGS, STEPS, assert_same_run
from tests.integration.runs import ENVIRONMENT, each_once, write_jsonl

pytestmark = pytest.mark.slow
URL = "s3://bucket/run"
OF_TINY = [*SETTINGS, "-m", "tiny"]
WORDS = ["train", *OF_TINY, "--output_dir", URL, "--resume", "auto"]


class Machine:
    """A machine without anything of the run: a home and a cache of its own."""

    def __init__(self, folder: Path, store: Path, name: str):
        self.store, self.cache, self.work = store, folder / name, folder / "work"
        self.run = self.cache / "falcon_qlora/runs" / stores.slug(URL)

    def start(self, *words: str, module: str = "tests.integration.with_store", **more: str) -> Any:
        given = {"STORE": str(self.store), "XDG_CACHE_HOME": str(self.cache), "PATIENCE": "2"}
        given["PYTHONPATH"] = f"{Path(__file__).parents[2]}:{os.environ.get('PYTHONPATH', '')}".rstrip(":")
        return Popen(
            [sys.executable, "-m", module, *each_once(words)],
            env={**os.environ, **ENVIRONMENT, **given, **more},
            cwd=self.work,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *words: str, **more: str) -> tuple[int, str, str]:
        process = self.start(*words, **more)
        output, errors = process.communicate(timeout=120)
        return process.returncode, " ".join(output.split()), errors


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the rows, and the run that nothing has interrupted."""
    folder = tmp_path_factory.mktemp("by_url")
    (folder / "work").mkdir()
    write_jsonl(folder / "work/rows.jsonl", ROWS)
    machine = Machine(folder, folder, "reference")
    status, _, errors = machine("train", *OF_TINY, "--output_dir", str(folder / "reference_run"))
    assert (status, errors) == (0, "")
    return folder


def a_store(work: Path, name: str) -> Path:
    (work / name).mkdir()
    return work / name


def seen(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_killed_in_an_upload_it_goes_on_on_another_machine_to_the_last_bit(work: Path) -> None:
    store = a_store(work, "killed")
    (store / "HELD").write_text("checkpoints/step-6/processes.pt")
    first = Machine(work, store, "first")
    process = first.start(*WORDS, PACED="1")
    seen((store / "WAITING").exists)
    process.kill()
    process.communicate()
    (store / "HELD").unlink()
    torn = [name for name in objects(store) if "/step-6/" in name]
    assert torn
    assert not any(name.endswith("manifest.json") for name in torn)
    second = Machine(work, store, "second")
    status, output, errors = second(*WORDS)
    assert (status, errors) == (0, "")
    assert "going on from step 4" in output
    assert f"copied to {URL}" in output
    end = output.partition(" done ")[2]
    assert f"try it falcon-qlora generate --adapter {URL} --prompt" in end
    assert end.count(str(second.run)) == 1
    assert_same_run(second.run, work / "reference_run")
    there = {name.removeprefix("bucket/run/"): name for name in objects(store)}
    assert by_url.steps_at(there) == by_url.steps_here(second.run)
    for name, at in there.items():
        assert (second.run / name).read_bytes() == (store / "objects" / at).read_bytes()
    # A third has nothing to train; without --resume it is refused.
    assert "nothing is left to train" in Machine(work, store, "third")(*WORDS)[1]
    status, _, errors = Machine(work, store, "fourth")(*WORDS[:-2])
    assert (status, errors.split(":")[0]) == (2, "error")
    assert f"{URL}: a run is there already" in errors


def test_a_store_that_is_gone_for_the_whole_run_is_told_and_the_run_is_uploaded_later(work: Path) -> None:
    store = a_store(work, "gone")
    machine = Machine(work, store, "alone")
    process = machine.start(*WORDS)
    assert process.stdout is not None
    assert any(f"copied to {URL}" in line for line in process.stdout)
    assert any(line.startswith("reading rows") for line in process.stdout)
    (store / "GONE").touch()
    output, errors = process.communicate(timeout=120)
    output = " ".join(output.split())
    assert (process.returncode, errors) == (75, "")
    assert output.count("nothing could be uploaded yet (UnreachableError: Could not connect") == 1
    found = re.search(rf"all steps are done, but {URL} lacks (.*) \(UnreachableError", output)
    assert found is not None
    assert {"step-8", "step-10", "adapter", "summary.json"} <= set(found[1].split(", "))
    assert output.endswith(f"; upload it with: falcon-qlora train --resume {URL}")
    assert_same_run(machine.run, work / "reference_run")
    status, _, errors = Machine(work, store, "nothing")(*WORDS)
    told = (
        f"error: --output_dir {URL}: cannot be reached (UnreachableError: Could not connect to the endpoint"
    )
    assert (status, errors) == (2, f"{told} URL)\n")
    (store / "GONE").unlink()
    status, output, errors = machine("train", "--resume", URL)
    assert (status, errors) == (0, "")
    assert f"copied to {URL}" in output
    assert f"{URL} is done: nothing is left to train of {STEPS} steps" in output
    anew = f"falcon-qlora train --config {machine.run}/config.yaml --output_dir {URL} --overwrite"
    assert f"begun anew with: {anew}" in output
    assert by_url.steps_at({name.removeprefix("bucket/run/"): 0 for name in objects(store)}) == [8, STEPS]


def test_stopped_it_has_been_uploaded_and_rows_base_and_adapter_are_read_from_there(work: Path) -> None:
    from falcon_qlora.models.tiny import tiny_path

    store = a_store(work, "stopped")
    for folder, files in (("rows", [work / "work/rows.jsonl"]), ("tiny", sorted(tiny_path().iterdir()))):
        at = store / "objects/bucket" / folder
        at.mkdir(parents=True)
        for file in files:
            (at / file.name).write_bytes(file.read_bytes())
    words = [*WORDS, "-m", "s3://bucket/tiny", "--dataset_name", "s3://bucket/rows/rows.jsonl"]
    machine = Machine(work, store, "stopping")
    process = machine.start(*words)
    assert process.stdout is not None
    assert any(line.startswith("step 3/") for line in process.stdout)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 75, errors
    stopped = re.search(
        r"stopped at step (\d+) of 10\. Go on with:\s+falcon-qlora train --resume (\S+)", output
    )
    assert stopped is not None
    assert stopped[2] == URL
    at = store / "objects/bucket/run/checkpoints" / f"step-{stopped[1]}"
    assert json.loads((at / "manifest.json").read_text())["step"] == int(stopped[1])
    # What it says, elsewhere: all settings are those of the run.
    other = Machine(work, store, "other")
    status, output, errors = other("train", "--resume", URL)
    assert status == 0, errors
    assert f"going on from step {stopped[1]}" in output
    assert_same_run(other.run, work / "reference_run")
    last = Machine(work, store, "last")
    status, output, errors = last(
        "generate", "--adapter", URL, "--prompt", "Count to 3.", "--max_new_tokens", "4"
    )
    assert status == 0, errors
    status, output, errors = last("inspect", URL)
    assert (status, output.split(",")[0]) == (0, f"{URL}: run")
