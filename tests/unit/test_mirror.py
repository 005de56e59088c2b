"""A run's folder and its copy in an object store, which is a folder here."""

from __future__ import annotations

import asyncio
import gc
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fsspec
import fsspec.asyn
import pytest

from falcon_qlora.checkpoint import mirror as mirrors
from falcon_qlora.checkpoint.bring import bring_checkpoint, bring_run, is_here
from falcon_qlora.checkpoint.manifest import write_manifest
from falcon_qlora.checkpoint.mirror import Mirror
from falcon_qlora.common import by_url, stores
from falcon_qlora.common.errors import UserError
from falcon_qlora.run_folder.choose import choose
from falcon_qlora.run_folder.directory import RunDirectory
from tests.folder_store import FolderStore, objects

URL = "s3://bucket/run"


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of the store; a machine's cache lies beside it."""
    monkeypatch.setenv("STORE", str(tmp_path / "store"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("FALCON_QLORA_CACHE", raising=False)
    monkeypatch.setattr(mirrors, "_LOOK_SECONDS", 0.01)
    monkeypatch.setattr(mirrors, "_PAUSE_AT_END_SECONDS", 0.01)
    monkeypatch.setattr(FolderStore, "calls", [])
    monkeypatch.setitem(sys.modules["fsspec.registry"]._registry, "s3", FolderStore)
    (tmp_path / "store").mkdir()
    stores.fetched.cache_clear()
    return tmp_path / "store"


def a_run(folder: Path, *steps: int) -> RunDirectory:
    directory = RunDirectory(folder, address=URL)
    for step in steps:
        save(directory, step)
    directory.write_config({"seed": 1})
    return directory


def save(directory: RunDirectory, step: int, word: str = "") -> None:
    """A checkpoint, complete as it appears, as training makes it."""
    partial = directory.checkpoints / f".step-{step}"
    partial.mkdir(parents=True)
    (partial / "weights").write_text(f"weights of step {step} {word}")
    (partial / "trainer_state.json").write_text(json.dumps({"best_global_step": None}))
    write_manifest(partial, {"step": step})
    partial.rename(directory.checkpoints / f"step-{step}")


def until(seen: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not seen():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def whole(store: Path) -> list[int]:
    return by_url.steps_at({name.removeprefix("bucket/run/"): None for name in objects(store)})


def ended(mirror: Mirror) -> None:
    """As if its process had ended."""
    mirror.stop()


def puts() -> list[str]:
    return [path.removeprefix("bucket/run/") for call, path in FolderStore.calls if call == "put"]


def test_the_manifest_is_uploaded_last_and_removed_first(store: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 2)
    mirror = Mirror(run, limit=1, goes_on=False)
    assert mirror.flush(10) is None
    named = [path for path in puts() if path != "mirror.json"]
    assert named[:2] == ["checkpoints/step-2/trainer_state.json", "checkpoints/step-2/weights"]
    assert named[-1] == "checkpoints/step-2/manifest.json"
    FolderStore.calls.clear()
    save(run, 4)
    shutil.rmtree(run.checkpoints / "step-2")
    assert mirror.flush(10) is None
    calls = [(call, path.removeprefix("bucket/run/checkpoints/")) for call, path in FolderStore.calls]
    removed = calls.index(("rm", "step-2/manifest.json"))
    assert calls.index(("put", "step-4/manifest.json")) < removed < calls.index(("rm", "step-2/weights"))
    assert whole(store) == [4]
    ended(mirror)


def test_nothing_is_removed_before_the_newest_is_there(store: Path, tmp_path: Path) -> None:
    run = a_run(tmp_path / "run", 2)
    mirror = Mirror(run, limit=1, goes_on=False)
    assert mirror.flush(10) is None
    ended(mirror)
    save(run, 4)  # as between its passes
    shutil.rmtree(run.checkpoints / "step-2")
    mirror._prune()
    assert whole(store) == [2]


def test_what_the_run_removes_during_its_upload_is_uploaded_whole(store: Path, tmp_path: Path) -> None:
    (store / "HELD").write_text("step-2/weights")
    run = a_run(tmp_path / "run", 2)
    mirror = Mirror(run, limit=1, goes_on=False)
    until((store / "WAITING").exists)
    save(run, 4)
    shutil.rmtree(run.checkpoints / "step-2")
    (store / "HELD").unlink()
    assert mirror.flush(10) is None
    order = [path for path in puts() if path.endswith("manifest.json")]
    assert order == ["checkpoints/step-2/manifest.json", "checkpoints/step-4/manifest.json"]
    assert whole(store) == [4]
    assert not list(run.path.glob(".mirror-*"))
    ended(mirror)


def test_a_store_that_is_gone_for_a_while_loses_nothing(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run")
    mirror = Mirror(run, limit=3, goes_on=False)
    until(lambda: "config.yaml" in puts())
    (store / "GONE").touch()
    save(run, 2)
    until(lambda: mirror._failure is not None)
    save(run, 4)
    missing = mirror.flush(0.1, hurry=True)
    assert missing is not None
    assert missing.startswith(f"{URL} lacks step-2, step-4 (UnreachableError: Could not connect")
    (store / "GONE").unlink()
    assert mirror.flush(10) is None
    assert whole(store) == [2, 4]
    told = " ".join(capsys.readouterr().out.split())
    assert told.count("nothing could be uploaded since") == 1
    assert told.count("answers again: nothing is missing there") == 1
    ended(mirror)


def test_a_second_start_takes_the_address_over(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", 2)
    first = Mirror(run, limit=3, goes_on=False)
    assert first.flush(10) is None
    there = RunDirectory(by_url.local_folder(URL), address=URL)
    bring_run(there)
    second = Mirror(there, limit=3, goes_on=True)
    assert second.flush(10) is None
    save(run, 4)
    assert "another start of the run uploads there" in str(first.flush(10))
    assert whole(store) == [2]
    save(there, 6)
    assert second.flush(10) is None
    assert whole(store) == [2, 6]
    ended(second)


def test_a_run_is_brought_without_what_is_torn_altered_or_older(
    store: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = a_run(tmp_path / "run", 2, 4, 6, 8)
    mirror = Mirror(run, limit=None, goes_on=False)
    assert mirror.flush(10) is None
    ended(mirror)
    at = store / "objects/bucket/run/checkpoints"
    (at / "step-8/manifest.json").unlink()
    (at / "step-6/weights").write_text("something else")
    there = RunDirectory(by_url.local_folder(URL), address=URL)
    bring_run(there)
    assert by_url.steps_here(there.path) == [4]
    assert there.read_config() == run.read_config()
    assert "step-6 is skipped: weights has 14 bytes" in " ".join(capsys.readouterr().out.split())
    # What goes on there keeps the limit: of what it never had the oldest goes, and what it has passed.
    mirror = Mirror(there, limit=2, goes_on=True)
    save(there, 5)
    assert mirror.flush(10) is None
    assert whole(store) == [4, 5]
    assert not [name for name in objects(store) if "step-8" in name]
    ended(mirror)


def test_what_is_further_here_stays_and_what_another_node_needs_is_brought(
    store: Path, tmp_path: Path
) -> None:
    run = a_run(tmp_path / "run", 2)
    mirror = Mirror(run, limit=None, goes_on=False)
    assert mirror.flush(10) is None
    ended(mirror)
    save(run, 4)
    bring_run(run)
    assert by_url.steps_here(run.path) == [2, 4]
    content = {step: (run.checkpoints / f"step-{step}/manifest.json").read_bytes() for step in (2, 4)}
    assert is_here(bring_checkpoint(URL, tmp_path / "other", 2, content[2]), content[2])
    with pytest.raises(UserError, match="has no whole step-4"):
        bring_checkpoint(URL, tmp_path / "other", 4, content[4])
    (store / "GONE").touch()
    bring_run(run)  # with a note: there is something here to go on from
    with pytest.raises(UserError, match="cannot be reached"):
        bring_run(RunDirectory(tmp_path / "nothing", address=URL))


def test_another_run_in_the_folder_here_is_set_aside(store: Path, tmp_path: Path) -> None:
    here = RunDirectory(by_url.local_folder(URL), address=URL)
    old = Mirror(a_run(here.path, 90), limit=None, goes_on=False)
    assert old.flush(10) is None
    ended(old)
    shutil.rmtree(store / "objects")
    new = Mirror(a_run(tmp_path / "elsewhere", 2), limit=None, goes_on=False)
    assert new.flush(10) is None
    ended(new)
    bring_run(here)
    assert by_url.steps_here(here.path) == [2]
    (aside,) = here.path.parent.glob(f"{here.path.name}-*")
    assert by_url.steps_here(aside) == [90]


def test_overwriting_removes_the_run_and_nothing_else(store: Path, tmp_path: Path) -> None:
    mirror = Mirror(a_run(tmp_path / "one", 2), limit=None, goes_on=False)
    assert mirror.flush(10) is None
    ended(mirror)
    (store / "objects/bucket/run/notes.txt").write_text("mine")
    refused = Mirror(a_run(tmp_path / "two", 4), limit=None, goes_on=False)
    assert "another run is there by now" in str(refused.flush(10))
    mirror = Mirror(a_run(tmp_path / "three", 6), limit=None, goes_on=False, overwrite=True)
    assert mirror.flush(10) is None
    ended(mirror)
    assert whole(store) == [6]
    assert (store / "objects/bucket/run/notes.txt").exists()


def test_a_second_start_without_resume_is_refused(store: Path, tmp_path: Path) -> None:
    known = {"model": "tiny", "settings": "x"}
    assert choose(URL, **known) == by_url.local_folder(URL)
    mirror = Mirror(a_run(tmp_path / "run"), limit=None, goes_on=False)
    assert mirror.flush(10) is None
    ended(mirror)
    shutil.rmtree(tmp_path / "cache")
    with pytest.raises(UserError, match=f"{URL}: a run is there already. Go on with it"):
        choose(URL, **known)
    assert choose(URL, **known, overwrite=True) == by_url.local_folder(URL)


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("hdfs://host/run", "of addresses only s3:// and gs:// are supported"),
        ("https://host/run", "of addresses only s3:// and gs:// are supported"),
        ("s3://", "name a bucket and a folder in it"),
        ("s3://bucket/../other", "name a bucket and a folder in it"),
    ],
)
def test_other_addresses_are_refused(store: Path, address: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        choose(address, model="tiny", settings="x")


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(scheme: str) -> None:
        raise ImportError("Install gcsfs")

    monkeypatch.setattr(fsspec, "get_filesystem_class", missing)
    with pytest.raises(UserError, match=r"pip install 'falcon_qlora\[gcs\]'"):
        stores.check("gs://bucket/run", "--output_dir")


def test_a_folder_or_file_is_copied_once_for_each_content(store: Path) -> None:
    at = store / "objects/bucket/rows"
    at.mkdir(parents=True)
    (at / "a.jsonl").write_text("{}")
    folder = stores.fetched("s3://bucket/rows", "--dataset_name")
    file = stores.fetched("s3://bucket/rows/a.jsonl", "--dataset_name")
    assert (folder / "a.jsonl").read_text() == file.read_text() == "{}"
    assert file.name == "a.jsonl"
    (at / "a.jsonl").write_text('{"text": "b"}')
    stores.fetched.cache_clear()
    assert stores.fetched("s3://bucket/rows/a.jsonl", "--dataset_name").read_text() == '{"text": "b"}'
    with pytest.raises(UserError, match="--dataset_name s3://bucket/none: there is nothing"):
        stores.fetched("s3://bucket/none", "--dataset_name")


@pytest.mark.parametrize("name", ["checkpoints/foreign/x.txt", "adapter/other.bin"])
@pytest.mark.parametrize("option", [{"resume": "auto"}, {"overwrite": True}])
def test_what_is_no_run_at_the_address_is_not_replaced(
    store: Path, tmp_path: Path, name: str, option: dict[str, Any]
) -> None:
    file = store / "objects/bucket/run" / name
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    with pytest.raises(UserError, match="s3://bucket/run: there is no run, but things with the names"):
        choose(URL, model="tiny", settings="4bit", root=tmp_path, **option)


def test_what_is_no_run_is_not_replaced_by_a_run_that_began_without_the_store(
    store: Path, tmp_path: Path
) -> None:
    file = store / "objects/bucket/run/adapter/other.bin"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    (store / "GONE").touch()
    assert choose(URL, model="tiny", settings="4bit", root=tmp_path, resume="auto").is_dir()
    (store / "GONE").unlink()
    mirror = Mirror(a_run(tmp_path / "a", 2), limit=None, goes_on=False)
    assert "things with the names of a run's are there, and no run" in str(mirror.flush(10))
    ended(mirror)
    assert file.read_text() == "mine"


def test_others_folders_among_a_runs_checkpoints_stay(store: Path, tmp_path: Path) -> None:
    first = Mirror(a_run(tmp_path / "a", 2), limit=None, goes_on=False)
    assert first.flush(10) is None
    ended(first)
    file = store / "objects/bucket/run/checkpoints/foreign/x.txt"
    file.parent.mkdir(parents=True)
    file.write_text("mine")
    second = Mirror(a_run(tmp_path / "b", 3), limit=None, goes_on=False, overwrite=True)
    assert second.flush(10) is None
    ended(second)
    assert whole(store) == [3]
    assert file.read_text() == "mine"


def test_a_bucket_alone_is_no_runs_folder(store: Path) -> None:
    with pytest.raises(UserError, match="s3://bucket/: name a folder in the bucket, such as s3://bucket/run"):
        by_url.local_folder("s3://bucket/")


def test_what_breaks_beside_a_call_prints_no_trace(store: Path, caplog: pytest.LogCaptureFixture) -> None:
    # aiohttp leaves a task behind where a connection is reset; asyncio reports it when it is collected.
    async def leave_a_task_behind() -> None:
        async def breaks() -> None:
            raise ConnectionResetError("Cannot write to closing transport")

        task = asyncio.ensure_future(breaks())
        await asyncio.sleep(0)
        del task
        gc.collect()

    stores.Store("s3://bucket/run").files()
    fsspec.asyn.sync(fsspec.asyn.get_loop(), leave_a_task_behind)
    assert not caplog.records
