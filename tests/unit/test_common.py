"""The small helpers that every floor uses."""

from __future__ import annotations

import errno
import fcntl
import gzip
import math
import os
import pwd
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from falcon_qlora.common.errors import UserError, first_line, message_of, one_line, reason_of
from falcon_qlora.common.files import (
    disk_errors,
    replaced_folder,
    temporary_files,
    user_cache,
    write_json,
    write_text,
)
from falcon_qlora.common.quantities import counted, passes, sized
from falcon_qlora.common.record_files import check_format
from falcon_qlora.common.untrusted import is_count, is_number
from falcon_qlora.data.cache import entry
from falcon_qlora.merge.out import check_out
from tests.integration.runs import room_for
from tests.small_tokenizer import small_tokenizer


@pytest.mark.parametrize("value", [True, False, 1.0, "1", None, -1, [1]])
def test_what_is_no_count(value: object) -> None:
    assert not is_count(value)


def test_a_count_has_its_ends() -> None:
    assert is_count(0)
    assert not is_count(0, least=1)
    assert is_count(7, least=7, most=7)
    assert not is_count(8, most=7)


def test_a_user_without_a_home_is_told_where_a_cache_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(number: int) -> None:
        raise KeyError(number)

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.delenv("HOME")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(UserError, match="has no home folder for caches: set HOME, or XDG_CACHE_HOME"):
        user_cache("data")
    with temporary_files():  # it is not needed yet
        assert Path(tempfile.gettempdir()).name.startswith("falcon-qlora-")


@pytest.mark.parametrize("value", [True, "1", None, math.nan, math.inf, -math.inf, 10**400])
def test_what_is_no_number(value: object) -> None:
    assert not is_number(value)


def test_numbers_are_whole_or_not() -> None:
    assert all(map(is_number, (0, -3, 2.5, 1e308)))


def test_an_error_becomes_one_line_or_its_first() -> None:
    error = ValueError("  no such\n   thing\nread the manual ")
    assert one_line(error) == "no such thing read the manual"
    assert first_line(error) == "no such"
    assert one_line(ValueError("x" * 1000), limit=50) == "x" * 50
    assert one_line(KeyboardInterrupt()) == first_line(KeyboardInterrupt()) == "KeyboardInterrupt"


def test_the_systems_reason_comes_first() -> None:
    assert reason_of(OSError(errno.ENOSPC, "No space left on device")) == "No space left on device"
    assert reason_of(OSError("torn\noff")) == "torn off"


def test_a_write_that_fails_is_told_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    with room_for(10), pytest.raises(OSError, match="too large") as failed:
        write_json(file, {"a": "b" * 99})
    assert message_of(failed.value) == f"error: {file}: {os.strerror(errno.EFBIG)}"
    with room_for(10), pytest.raises(OSError, match="too large") as failed, replaced_folder(tmp_path / "out"):
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG))  # as a library does, which names no file
    assert message_of(failed.value) == f"error: {tmp_path / 'out'}: {os.strerror(errno.EFBIG)}"
    with room_for(10), pytest.raises(UserError, match=f"the cache folder {tmp_path} cannot be .* too large;"):
        entry(tmp_path, "key", lambda folder: write_text(folder / "a", "b" * 99))
    assert [path.name for path in tmp_path.iterdir()] == []


def test_what_a_library_cannot_write_is_told_with_its_file(tmp_path: Path) -> None:
    out, too_large = tmp_path / "out", os.strerror(errno.EFBIG)

    def write_python(file: Path) -> None:
        with file.open("w") as opened:
            opened.write("b" * 99)

    def write_gzip(file: Path) -> None:
        with gzip.open(file, "wt") as opened:
            opened.write("b" * 99)

    for write in (
        write_python,
        write_gzip,
        lambda file: save_file({"a": torch.zeros(99)}, file),
        lambda file: small_tokenizer().backend_tokenizer.save(str(file)),
    ):
        with (
            room_for(10),
            pytest.raises(OSError, match="too large") as failed,
            replaced_folder(out) as partial,
            disk_errors(partial / "a"),
        ):
            write(partial / "a")
        assert message_of(failed.value) == f"error: {out / 'a'}: {too_large}"
        assert reason_of(failed.value, out) == f"a: {too_large}"
        assert reason_of(failed.value) == reason_of(failed.value, tmp_path) == too_large


def test_where_nothing_can_be_locked_what_a_killed_merge_left_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with (
        replaced_folder(out) as partial,
        pytest.raises(UserError, match=r"is writing this merge\. Wait for it to end$"),
    ):
        check_out(out, overwrite=True)
    shutil.rmtree(out)

    def no_locks(handle: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    partial.mkdir()  # as it is after a SIGKILL
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks)
        with pytest.raises(UserError, match=rf"or was killed at it: if none .* \(rm -r {partial}\)$"):
            check_out(out, overwrite=False)
    check_out(out, overwrite=False)  # with locks it is known to be left, and removed
    assert [*tmp_path.iterdir()] == []


def test_quantities_carry_their_units() -> None:
    assert sized(3 * 2**29) == "1.50 GiB"
    assert sized(2**30, 1) == "1.0 GiB"
    assert sized(2**30 / 10) == "0.10 GiB"
    assert [sized(0.09 * 2**power) for power in (30, 20, 10)] == ["92.2 MiB", "92.2 KiB", "92 bytes"]
    assert [sized(count) for count in (0, 1)] == ["0 bytes", "1 byte"]
    assert counted(1, "GPU") == "1 GPU"
    assert counted(2000, "process", "processes") == "2,000 processes"


def test_passes_over_the_data_are_told_in_plain_figures() -> None:
    for epochs, told in {
        0.00506: "0.5% of an epoch",
        0.0149: "1.5% of an epoch",
        0.667: "67% of an epoch",
        1.0: "1 epoch",
        2.5: "2.5 epochs",
        15.0: "15 epochs",
        10.444: "10.4 epochs",
        33_333.333: "33,333.3 epochs",
    }.items():
        assert passes(epochs) == told


def test_a_record_of_a_later_form_is_refused_in_one_sentence() -> None:
    for old in ({}, {"format": 1}):
        check_format(old, "summary.json")
    check_format({"format": 2}, "summary.json", newest=2)
    with pytest.raises(UserError, match=r"^a/summary.json: format 2 is newer than this falcon_qlora reads;"):
        check_format({"format": 2}, "a/summary.json")
    for strange in (0, True, "1", None, {}):
        with pytest.raises(UserError, match="is not a number from 1"):
            check_format({"format": strange}, "summary.json")
