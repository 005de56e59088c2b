"""Checkpoints that others may have made, their manifests true of them: `--resume` refuses with a reason."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.checkpoint.manifest import describe_file
from falcon_qlora.common.errors import UserError
from tests.fuzzing import EXPLODED, Bomb
from tests.integration.runs import write_jsonl

STEP = 2


def train(folder: Path, **settings: Any) -> Path:
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(40)]
    return falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(folder / "rows.jsonl", rows),
        output_dir=folder / "run",
        max_length=64,
        max_steps=STEP,
        save_steps=STEP,
        lora_r=4,
        report_to="none",
        cache_dir=folder / "cache",
        **settings,
    )


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("good"))


@pytest.fixture(scope="module")
def streamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(tmp_path_factory.mktemp("streamed"), streaming=True)


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEP}"


def with_true_manifest(checkpoint: Path, **changes: Any) -> None:
    """Let the manifest say what lies there now."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text()) | changes
    manifest["files"] = {name: describe_file(checkpoint / name) for name in manifest["files"]}
    file.write_text(json.dumps(manifest))


def refused(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, craft: Callable[[Path], Any]) -> str:
    """What going on says of a copy of `run` that `craft` has changed; nothing of it was executed."""
    monkeypatch.chdir(tmp_path)
    copy = shutil.copytree(run, tmp_path / "copy")
    changes = craft(checkpoint_of(copy))
    with_true_manifest(checkpoint_of(copy), **(changes if isinstance(changes, dict) else {}))
    with pytest.raises(UserError) as error:
        falcon_qlora.train(resume=copy, max_steps=STEP + 1)
    assert not (tmp_path / EXPLODED).exists()
    return str(error.value)


def json_with(name: str, **changes: Any) -> Callable[[Path], None]:
    def craft(checkpoint: Path) -> None:
        file = checkpoint / name
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return craft


def pickled(name: str) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / name).write_bytes(pickle.dumps(Bomb()))


def saved(name: str, content: Any) -> Callable[[Path], None]:
    return lambda checkpoint: torch.save(content, checkpoint / name)


def other_shapes(checkpoint: Path) -> None:
    file = checkpoint / "adapter_model.safetensors"
    save_file({name: torch.zeros(3, 3) for name in load_file(file)}, file)


def without_loss(checkpoint: Path) -> None:
    (state,) = torch.load(checkpoint / "processes.pt", weights_only=True)
    torch.save(
        [{name: value for name, value in state.items() if name != "meter"}], checkpoint / "processes.pt"
    )


def other_random_states(checkpoint: Path) -> None:
    (state,) = torch.load(checkpoint / "processes.pt", weights_only=True)
    torch.save([{**state, "random": {"python": 1}}], checkpoint / "processes.pt")


CRAFTED = {
    "processes.pt: a pickle": (pickled("processes.pt"), "processes.pt cannot be loaded"),
    "optimizer.pt: a pickle": (pickled("optimizer.pt"), "optimizer.pt cannot be loaded"),
    "scheduler.pt: a pickle": (pickled("scheduler.pt"), "scheduler.pt cannot be loaded"),
    "optimizer.pt: a list": (saved("optimizer.pt", [1]), "optimizer.pt cannot be loaded: it holds a list"),
    "optimizer.pt: empty": (saved("optimizer.pt", {}), "optimizer.pt cannot be loaded"),
    "scheduler.pt: a list": (saved("scheduler.pt", [1]), "scheduler.pt cannot be loaded: it holds a list"),
    "processes.pt: none": (saved("processes.pt", []), "processes.pt cannot be loaded: it holds no process"),
    "processes.pt: numbers": (saved("processes.pt", [1]), "processes.pt cannot be loaded"),
    "processes.pt: too little": (without_loss, "processes.pt cannot be loaded: 'meter'"),
    "processes.pt: other random states": (other_random_states, "processes.pt cannot be loaded"),
    "the step: a word": (
        json_with("trainer_state.json", global_step="abc"),
        "trainer_state.json cannot be loaded: global_step is 'abc'",
    ),
    "the step: another": (json_with("trainer_state.json", global_step=1), "global_step is 1 in step-2"),
    "the trainer's state: a key more": (json_with("trainer_state.json", x=1), "trainer_state.json cannot be"),
    "the trainer's state: a list": (
        lambda checkpoint: (checkpoint / "trainer_state.json").write_text("[]"),
        "trainer_state.json is not valid",
    ),
    "the log: numbers": (json_with("trainer_state.json", log_history=[1]), "log_history holds a line"),
    "the manifest: no batch": (lambda _: {"global_batch": None}, "global_batch is 'None'"),
    "the manifest: a negative batch": (lambda _: {"global_batch": -3}, "global_batch is '-3'"),
    "the manifest: processes": (lambda _: {"processes": "x"}, "processes is 'x'"),
    "the adapter: other shapes": (other_shapes, "does not fit this model: "),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CRAFTED)
def test_a_crafted_checkpoint(good, tmp_path, monkeypatch, what):
    craft, told = CRAFTED[what]
    said = refused(good, tmp_path, monkeypatch, craft)
    assert told in said
    assert str(tmp_path / "copy" / "checkpoints" / "step-2") in said
    assert "weights_only" not in said


def cursor_with(**changes: Any) -> Callable[[Path], None]:
    def craft(checkpoint: Path) -> None:
        file = checkpoint / "stream.json.gz"
        cursor = json.loads(gzip.decompress(file.read_bytes()))
        for path, value in changes.items():
            *parents, last = path.split("__")
            inner = cursor
            for name in parents:
                inner = inner[int(name) if isinstance(inner, list) else name]
            assert last in inner
            inner[last] = value
        file.write_bytes(gzip.compress(json.dumps(cursor).encode()))

    return craft


def bytes_of(content: bytes) -> Callable[[Path], None]:
    return lambda checkpoint: (checkpoint / "stream.json.gz").write_bytes(content)


CURSORS = {
    "junk": (bytes_of(b"junk"), ""),
    "cut short": (bytes_of(gzip.compress(b"{}" * 99)[:-9]), ""),
    "a list": (bytes_of(gzip.compress(b"[1, 2]")), ""),
    "deeply nested": (bytes_of(gzip.compress(b"[" * 100_000)), ""),
    "a bomb": (bytes_of(gzip.compress(bytes(2**22))), "unpacked it has more than"),
    "no stream": (cursor_with(stream=[]), ""),
    "another step": (cursor_with(step=1), "step"),
    "a token beyond the vocabulary": (cursor_with(waiting=[[[10**6], [1], [0, 1]]]), "waiting"),
    "a mask of another length": (cursor_with(waiting=[[[1, 2], [1], [0, 1]]]), "waiting"),
    "an origin of words": (cursor_with(waiting=[[[1, 2], [0, 1], ["a.jsonl", 1]]]), "waiting"),
    "an order of another kind": (cursor_with(stream__shuffled__order=[3, [1], None]), ""),
    "a turn of no reader": (cursor_with(stream__shuffled__rows__turn=[7]), "turn"),
    "no reader": (cursor_with(stream__shuffled__rows__readers=[]), ""),
    "a position of words": (cursor_with(stream__shuffled__rows__readers__0__position="x"), "position"),
    "rows that are none": (cursor_with(stream__shuffled__buffer=[["abc"]]), ""),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", CURSORS)
def test_a_crafted_cursor(streamed, tmp_path, monkeypatch, what):
    monkeypatch.setattr("falcon_qlora.checkpoint.process_state._CURSOR_BYTES", 2**20)
    craft, told = CURSORS[what]
    said = refused(streamed, tmp_path, monkeypatch, craft)
    assert "stream.json.gz cannot be loaded" in said
    assert told in said


@pytest.mark.slow
def test_what_is_good_goes_on_beside_metrics_that_are_none(streamed, tmp_path, monkeypatch, capsys):
    copy = shutil.copytree(streamed, tmp_path / "copy")
    with (copy / "metrics.jsonl").open("a") as metrics:
        metrics.write('[1]\n"x"\n{"step": "x"}\n')
    falcon_qlora.train(resume=copy, max_steps=STEP + 1)
    capsys.readouterr()
    assert cli.main(["inspect", str(copy)]) == 0
