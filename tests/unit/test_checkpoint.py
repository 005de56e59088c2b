"""A checkpoint that is not what was written is found out, and the one before is taken."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.checkpoint.manifest import MANIFEST, fault, newest_whole, write_manifest
from falcon_qlora.checkpoint.write import last_complete, rotate, set_aside_after


def make(folder: Path, step: int) -> Path:
    path = folder / f"step-{step}"
    (path / "inner").mkdir(parents=True)
    (path / "weights.bin").write_bytes(bytes(range(256)) * 8)
    (path / "inner" / "state.json").write_text("{}")
    write_manifest(path, {"step": step, "processes": 2})
    return path


def truncate(path: Path) -> None:
    (path / "weights.bin").write_bytes((path / "weights.bin").read_bytes()[:-1])


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "weights.bin").read_bytes())
    data[1000] ^= 1
    (path / "weights.bin").write_bytes(data)


def lose_a_file(path: Path) -> None:
    (path / "inner/state.json").unlink()


def lose_the_manifest(path: Path) -> None:
    (path / MANIFEST).unlink()


def cut_the_manifest(path: Path) -> None:
    (path / MANIFEST).write_text((path / MANIFEST).read_text()[:50])


def point_outside(path: Path) -> None:
    manifest = json.loads((path / MANIFEST).read_text())
    manifest["files"]["../../elsewhere"] = {"bytes": 1, "sha256": ""}
    (path / MANIFEST).write_text(json.dumps(manifest))


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        (truncate, "weights.bin has 2,047 bytes instead of 2,048"),
        (flip_a_bit, "weights.bin is not what was written"),
        (lose_a_file, "inner/state.json is missing"),
        (lose_the_manifest, "manifest.json is missing"),
        (cut_the_manifest, "cannot be read"),
        (point_outside, "outside"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(
    tmp_path: Path, damage: Callable[[Path], None], told: str
) -> None:
    older, newer = make(tmp_path, 9), make(tmp_path, 10)
    assert newest_whole(tmp_path) == (newer, [])
    damage(newer)
    assert told in str(fault(newer))
    found, ((passed_over, wrong),) = newest_whole(tmp_path)
    assert (found, passed_over) == (older, newer)
    assert told in wrong


def test_a_manifest_of_a_later_form_is_refused_and_one_without_a_number_is_of_the_first(
    tmp_path: Path,
) -> None:
    path = make(tmp_path, 9)
    manifest = json.loads((path / MANIFEST).read_text())
    assert manifest["format"] == 2
    for number, told in ((None, None), (3, "format 3 is newer than this falcon_qlora reads; update it")):
        manifest["format"] = number
        (path / MANIFEST).write_text(json.dumps({k: v for k, v in manifest.items() if v is not None}))
        assert fault(path) == (told and f"its {MANIFEST}: {told}")


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [(None, None, [1, 2, 3, 10]), (2, None, [3, 10]), (1, None, [10]), (2, 1, [1, 10]), (1, 2, [2, 10])],
)
def test_the_newest_and_the_best_stay(
    tmp_path: Path, limit: int | None, best: int | None, left: list[int]
) -> None:
    for step in (1, 2, 3, 10):
        make(tmp_path, step)
    rotate(tmp_path, 10, limit, str(tmp_path / f"step-{best}") if best else None)
    assert sorted(int(path.name.split("-")[1]) for path in tmp_path.iterdir()) == left


def test_checkpoints_after_the_one_gone_on_from_stay_until_they_are_made_again(tmp_path: Path) -> None:
    for step in (3, 6, 9):
        make(tmp_path, step)
    (tmp_path / ".step-8.partial").mkdir()
    assert [path.name for path in set_aside_after(tmp_path, 3)] == ["step-6", "step-9"]
    assert newest_whole(tmp_path)[0] == tmp_path / "step-3"
    make(tmp_path, 6)
    rotate(tmp_path, 6, 2, None)
    assert {path.name for path in tmp_path.iterdir()} == {"step-3", "step-6", "replaced-step-9"}


def test_a_large_file_has_a_checksum_for_every_piece_and_in_older_manifests_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("falcon_qlora.checkpoint.manifest._PIECE_BYTES", 100)
    path = tmp_path / "step-1"
    path.mkdir()
    content = bytes(range(250))
    (path / "large").write_bytes(content)
    write_manifest(path, {"step": 1})
    record = json.loads((path / MANIFEST).read_text())
    pieces = [hashlib.sha256(content[start : start + 100]).hexdigest() for start in (0, 100, 200)]
    assert record["files"]["large"] == {"bytes": 250, "sha256": pieces}
    whole = {"bytes": 250, "sha256": hashlib.sha256(content).hexdigest()}
    older = {**record, "format": 1, "files": {"large": whole}}
    for written in (record, older):
        (path / MANIFEST).write_text(json.dumps(written))
        (path / "large").write_bytes(content)
        assert fault(path) is None
        for place in (0, 99, 100, 249):
            altered = bytearray(content)
            altered[place] ^= 1
            (path / "large").write_bytes(altered)
            assert fault(path) == "large is not what was written (its checksum differs)"


def test_the_model_is_left_alone_until_a_save_has_read_it(tmp_path: Path) -> None:
    writer = Checkpointer(tmp_path, describe_adapter=print, record={}, on_saved=print, at=lambda *place: None)
    writer.wait_until_unread()  # none is under way
    goes_on, free = threading.Event(), threading.Event()
    writer._beside(goes_on.wait)
    waiting = threading.Thread(target=lambda: (writer.wait_until_unread(), free.set()))
    waiting.start()
    assert not free.wait(0.2)
    goes_on.set()
    assert free.wait(5)


def test_the_last_complete_checkpoint_is_named_with_what_goes_on_from_it(tmp_path: Path) -> None:
    assert last_complete(tmp_path, None) == "There is no complete checkpoint."
    folder = tmp_path / "step-4"
    folder.mkdir()
    write_manifest(folder, {"step": 4, "resumable": True})
    told = f"The last complete checkpoint is {folder}"
    assert last_complete(tmp_path, None) == f"{told}: resume it with --resume."
    # By the folder here it would go on without being copied to its address.
    assert last_complete(tmp_path, "s3://b/run") == f"{told}: go on from it with --resume s3://b/run."
    write_manifest(folder, {"step": 4, "resumable": False})
    assert last_complete(tmp_path, None) == f"{told}, weights only: the run cannot be resumed."
