"""The cache: entries are whole or not there, whoever else fills them."""

from __future__ import annotations

import errno
import fcntl
import os
import threading
from pathlib import Path

import pytest

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import cache


def fill(folder: Path) -> None:
    (folder / "content").write_text("x")


def test_an_entry_is_filled_once(tmp_path: Path) -> None:
    calls: list[Path] = []

    def counted(folder: Path) -> None:
        calls.append(folder)
        fill(folder)

    first = cache.entry(tmp_path / "deep" / "cache", "k" * 64, counted)
    assert cache.entry(tmp_path / "deep" / "cache", "k" * 64, counted) == first
    assert len(calls) == 1
    assert (first / "content").read_text() == "x"
    assert cache.entry(tmp_path / "deep" / "cache", "l" * 64, counted) != first


def test_a_failed_entry_leaves_nothing(tmp_path: Path) -> None:
    def fail(folder: Path) -> None:
        fill(folder)
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        cache.entry(tmp_path, "k" * 64, fail)
    assert list(tmp_path.iterdir()) == []


def test_several_may_fill_the_same_entry_at_once(tmp_path: Path) -> None:
    together = threading.Barrier(4)
    results: list[Path] = []

    def slow(folder: Path) -> None:
        together.wait(timeout=10)
        fill(folder)

    threads = [
        threading.Thread(target=lambda: results.append(cache.entry(tmp_path, "k" * 64, slow)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=20)
    assert len(results) == 4
    assert len(set(results)) == 1
    assert [each.name for each in tmp_path.iterdir()] == [results[0].name]
    assert (results[0] / "content").read_text() == "x"


def test_a_full_disk_is_the_user_s_to_mend(tmp_path: Path) -> None:
    def full(folder: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"is full; .*--cache_dir"):
        cache.entry(tmp_path, "k" * 64, full)


def test_what_killed_processes_left_is_removed(tmp_path: Path) -> None:
    left, held = tmp_path / ".abc-partial-abcdefgh", tmp_path / ".def-partial-abcdefgh"
    left.mkdir()
    held.mkdir()
    handle = os.open(held, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)  # as the process does that fills it
    cache.entry(tmp_path, "k" * 64, fill)
    os.close(handle)
    assert not left.exists()
    assert held.exists()


def test_an_entry_that_is_not_whole_is_made_again(tmp_path: Path) -> None:
    made = cache.entry(tmp_path, "k" * 64, fill)
    (made / "content").write_text("damaged")
    whole = lambda entry: (entry / "content").read_text() == "x"  # noqa: E731
    assert cache.entry(tmp_path, "k" * 64, fill, whole) == made
    assert whole(made)
    assert list(tmp_path.iterdir()) == [made]


def test_a_damaged_entry_that_cannot_be_removed_is_not_used(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    cache.entry(tmp_path, "k" * 64, fill)

    def refuse(folder: Path) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(cache.shutil, "rmtree", refuse)
    with pytest.raises(UserError, match=r"cannot be written: .*--cache_dir"):
        cache.entry(tmp_path, "k" * 64, fill, lambda entry: False)


def test_the_user_s_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache.entry(None, "k" * 64, fill).parent == tmp_path / "falcon_qlora" / "data"


def test_keys_tell_settings_apart() -> None:
    assert cache.key_of({"a": 1, "b": None}) == cache.key_of({"b": None, "a": 1})
    assert cache.key_of({"a": 1}) != cache.key_of({"a": "1"})
