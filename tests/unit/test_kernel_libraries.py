"""Where the optional kernel libraries keep what they compile."""

import os
from pathlib import Path

import pytest
import torch

from falcon_qlora.kernels.libraries import usable

NAMES = (
    "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED",
    "FLASH_ATTENTION_CUTE_DSL_CACHE_DIR",
    "QUACK_CACHE_DIR",
)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    for name in NAMES:
        monkeypatch.setenv(name, "")  # so that it is as before after the test
        monkeypatch.delenv(name)
    return monkeypatch


def test_a_users_own_cache_is_named_before_the_import(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path))
    on_hopper.setenv("QUACK_CACHE_DIR", "/mine")
    assert usable("json")
    folder = os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_DIR"]
    assert (os.environ["FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"], folder.startswith(str(tmp_path))) == (
        "1",
        True,
    )
    assert os.environ["QUACK_CACHE_DIR"] == "/mine"  # a user's own setting stays


def test_a_cache_that_cannot_be_written_is_left_out(on_hopper: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    on_hopper.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert usable("json")
    assert not any(name in os.environ for name in NAMES)


def test_older_gpus_and_missing_libraries_have_none(on_hopper: pytest.MonkeyPatch) -> None:
    assert not usable("no_such_library")
    on_hopper.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert not usable("json")
