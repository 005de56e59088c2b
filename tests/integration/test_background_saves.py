"""Checkpoints are written while the training goes on, and hold what was trained at their step."""

from __future__ import annotations

import errno
import json
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_qlora.checkpoint import checkpointer, host_copy
from falcon_qlora.checkpoint.adapter_check import AdapterFaultError
from falcon_qlora.checkpoint.checkpointer import Checkpointer
from falcon_qlora.checkpoint.manifest import fault
from falcon_qlora.common import host_memory
from falcon_qlora.common.errors import UserError
from falcon_qlora.processes import launcher
from falcon_qlora.training.trainer import FalconTrainer
from tests.integration.interrupted import assert_same_run
from tests.integration.runs import metrics
from tests.integration.test_adapter import fine_tune

OF_CLOCKS = ("tokens_per_second", "wall_tokens_per_second", "samples_per_second_512", "peak_memory_gib")


@pytest.fixture
def held_until(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Call it with a number of steps: none is written before so many more, or until it is waited for."""
    begun, waiting = 0, threading.Event()
    real_step, real_write, real_join = FalconTrainer.training_step, Checkpointer._write, Checkpointer.join
    real_wait = Checkpointer.wait_until_unread

    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        nonlocal begun
        begun = self.state.global_step + 1
        return real_step(self, *arguments, **named)

    def hold(steps: int) -> None:
        def write(self: Checkpointer, content: Any) -> None:
            while begun < content.step + steps and not waiting.is_set():
                time.sleep(0.01)
            waiting.clear()
            real_write(self, content)

        monkeypatch.setattr(Checkpointer, "_write", write)

    def join(self: Checkpointer, *, failing: bool = False) -> None:
        if self._thread is not None and self._thread.is_alive():
            waiting.set()
        real_join(self, failing=failing)

    def wait_until_unread(self: Checkpointer) -> None:
        waiting.set()
        real_wait(self)

    monkeypatch.setattr(FalconTrainer, "training_step", training_step)
    monkeypatch.setattr(Checkpointer, "wait_until_unread", wait_until_unread)
    monkeypatch.setattr(Checkpointer, "join", join)
    return hold


def fail_save(monkeypatch: pytest.MonkeyPatch, step: int, error: Exception) -> None:
    """Have the checkpoint of a step fail as it is written."""
    real = Checkpointer._write

    def write(self: Checkpointer, content: Any) -> None:
        if content.step == step:
            raise error
        real(self, content)

    monkeypatch.setattr(Checkpointer, "_write", write)


def same(one: Any, other: Any) -> bool:
    """To the last bit; the numbers that come from a clock apart."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        names = one.keys() - {*OF_CLOCKS, "meter"}
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in names)
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_checkpoint_is_of_its_step_whatever_comes_while_it_is_written(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    held_until: Callable[[int], None],
    method: str,
) -> None:
    settings: dict[str, Any] = {"max_steps": 5, "save_steps": 2, "save_total_limit": 9, "method": method}
    settings |= {"logging_steps": 1, "full_determinism": True}
    held_until(2)
    going_on = fine_tune(tmp_path, output_dir=tmp_path / "going_on", **settings)
    assert "training waits" not in capsys.readouterr().out
    monkeypatch.undo()
    monkeypatch.setattr(checkpointer, "free_host_bytes", lambda: 0)
    held = fine_tune(tmp_path, output_dir=tmp_path / "held", **settings)
    assert capsys.readouterr().out.count("training waits for every save") == 1
    for step in (2, 4, 5):
        one, other = (run / "checkpoints" / f"step-{step}" for run in (going_on, held))
        names = {file.name for file in one.iterdir()}
        assert names == {file.name for file in other.iterdir()}
        assert "optimizer.pt" in names
        assert (fault(one), fault(other)) == (None, None)
        for file in one.glob("*.pt"):
            assert same(torch.load(file), torch.load(other / file.name)), file
        for file in (*one.glob("*.safetensors"), one / "adapter_config.json"):
            assert not file.exists() or file.read_bytes() == (other / file.name).read_bytes(), file
        states = [json.loads((run / "trainer_state.json").read_text()) for run in (one, other)]
        for state in states:
            state.pop("best_model_checkpoint")
        assert same(*states)
    assert_same_run(going_on, held)


@pytest.mark.parametrize("version", [1, 2])
def test_a_control_group_without_room_for_a_copy_has_the_training_wait_and_the_start_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    """Version 2 with the limit on a group above, version 1 as a container sees it, at the root."""
    names, line, place = {
        1: (host_memory._VERSION_1, "4:cpu,memory:/as/the/host/has/it", "memory"),
        2: (host_memory._VERSION_2, "0::/job/step", "job"),
    }[version]
    groups, own = tmp_path / "groups", tmp_path / "own"
    (groups / place).mkdir(parents=True)
    for name, value in zip(names[:2], (101 * 2**20, 110 * 2**20), strict=True):
        (groups / place / name).write_text(f"{value}\n")
    (groups / place / "memory.stat").write_text(f"anon 7\n{names[2]} {10 * 2**20}\n")
    (groups / "job" / "step").mkdir(parents=True, exist_ok=True)
    (groups / "job" / "step" / "memory.max").write_text("max\n")
    own.write_text(f"9:name=systemd:/\n{line}\n")
    monkeypatch.setattr(host_memory, "_GROUPS", groups)
    monkeypatch.setattr(host_memory, "_OWN_GROUPS", own)
    assert host_memory.free_host_bytes() == 2**20
    needed, threads = [], set()
    real_decide, real_write = Checkpointer.too_large, Checkpointer._write
    monkeypatch.setattr(
        Checkpointer, "too_large", lambda self, size: needed.append(size) or real_decide(self, size)
    )
    monkeypatch.setattr(
        Checkpointer,
        "_write",
        lambda self, content: threads.add(threading.current_thread()) or real_write(self, content),
    )
    fine_tune(tmp_path, max_steps=4, save_steps=2)
    printed = capsys.readouterr().out
    assert printed.count("training waits for every save: ") == 1
    assert "note: training waits for every save: " in printed.partition("step 1/4")[0]
    predicted, *at_saves = needed
    assert at_saves == pytest.approx([predicted] * 2, rel=0.02)
    assert threads == {threading.main_thread()}


def test_host_memory_of_a_copy_is_what_its_pieces_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU's host; nothing is locked here."""
    taken = []

    class Memory:
        def __init__(self, device: torch.device):
            assert device.type == "cuda"

        def new(self, size: int) -> torch.Tensor:
            taken.append(size)
            return torch.empty(size, dtype=torch.uint8)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(host_copy, "PageLocked", Memory)
    monkeypatch.setattr(host_copy, "_PIECE_BYTES", 1024)
    sizes = [1000, 10, 8, 3000, 0, 900, 0, 200, 1024, 64, 5000]
    tree = [torch.arange(size // 2, dtype=torch.int16) for size in sizes]
    copies = host_copy.HostCopies()
    expected = copies.more_bytes(each.nbytes for each in tree)
    assert all(torch.equal(one, other) for one, other in zip(copies.take(tree), tree, strict=True))
    assert expected == sum(taken)
    assert copies.more_bytes(sizes) == 0


def test_memory_that_is_not_locked_is_told_once_and_saves_as_well(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host_copy.PageLocked, "new", lambda *_: (_ for _ in ()).throw(MemoryError("refused")))
    monkeypatch.setattr(host_copy, "_PIECE_BYTES", 64)
    copies, tree = host_copy.HostCopies(), [torch.arange(100), torch.arange(200)]
    copies.reserve([1600])
    assert all(torch.equal(one, other) for one, other in zip(copies.take(tree), tree, strict=True))
    told = "memory for copies of what is saved: refused; the GPU waits for each copy"
    assert capsys.readouterr().out == f"note: {told}\n"
    # On any rank, which has memory of its own.
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    host_copy.HostCopies().take(tree)
    assert capsys.readouterr().out == f"note: rank 1 on {socket.gethostname()}: {told}\n"


def test_saves_that_come_faster_than_they_are_written_are_all_made(
    tmp_path: Path, held_until: Callable[[int], None]
) -> None:
    held_until(1)
    run = fine_tune(tmp_path, max_steps=6, save_steps=1, save_total_limit=2)
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["step-5", "step-6"]
    assert all(fault(path) is None for path in (run / "checkpoints").iterdir())


@pytest.mark.parametrize("of_bug", [False, True])
def test_a_checkpoint_that_fails_its_check_ends_the_run_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, of_bug: bool
) -> None:
    fault_found = AdapterFaultError("not what was in memory")
    fail_save(monkeypatch, 10, ZeroDivisionError() if of_bug else fault_found)
    with pytest.raises(ZeroDivisionError if of_bug else UserError):
        fine_tune(tmp_path, max_steps=30, save_steps=10, logging_steps=1)
    run = tmp_path / "run"
    assert metrics(run)[-1]["step"] < 20
    assert not list((run / "checkpoints").glob("step-*"))


def test_the_line_of_progress_says_since_when_nothing_was_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fail_save(monkeypatch, 4, OSError(errno.ENOSPC, "No space left on device"))
    fine_tune(tmp_path, max_steps=8, save_steps=2, logging_steps=1)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step ")]
    warned = [line.split("/")[0] for line in lines if line.endswith("nothing saved since step 2")]
    assert "step 6" in warned  # which began when the save of step 4 was settled
    assert set(warned) <= {"step 5", "step 6"}


def test_a_run_that_goes_on_names_the_checkpoint_it_goes_on_from_until_it_has_one_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    marks = tmp_path / "marks"
    marks.mkdir()
    monkeypatch.setenv(launcher.VARIABLE, str(marks))
    run = fine_tune(tmp_path, max_steps=2)
    (marks / launcher.GO_ON).unlink()
    for step in (4, 6):
        fail_save(monkeypatch, step, OSError(errno.ENOSPC, "No space left on device"))
    fine_tune(tmp_path, max_steps=6, save_steps=2, logging_steps=1, resume=run)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 6/")]
    assert lines[0].endswith("nothing saved since step 2")
    told = (marks / launcher.GO_ON).read_text()
    assert told.startswith(f"the last complete checkpoint is {run}/checkpoints/step-2; go on with: ")


def test_a_run_without_held_out_rows_spends_no_time_on_evaluation(tmp_path: Path) -> None:
    """Trying the packing, in the first step, belongs to the start."""
    summary = json.loads((fine_tune(tmp_path, max_steps=1) / "summary.json").read_text())
    assert summary["checks"]["packing"]["state"] == "passed"
    assert summary["evaluation_seconds"] == 0 < summary["start_seconds"]


def test_the_seconds_of_a_run_are_where_they_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, real = [], FalconTrainer.training_step

    def training_step(self: Any, *arguments: Any, **named: Any) -> Any:
        begun.append(time.time())
        time.sleep(0.2)
        return real(self, *arguments, **named)

    monkeypatch.setattr(FalconTrainer, "training_step", training_step)
    began = time.time()
    run = fine_tune(tmp_path, max_steps=4, save_steps=2, eval_split=0.3, eval_steps=1)
    whole = time.time() - began
    summary = json.loads((run / "summary.json").read_text())
    spent = {name: summary[f"{name}_seconds"] for name in ("train", "start", "save", "evaluation", "end")}
    assert sum(spent.values()) == pytest.approx(summary["wall_seconds"], rel=0.01)
    assert summary["wall_seconds"] == pytest.approx(whole, rel=0.1, abs=0.3)
    assert begun[0] - began - 0.2 <= spent["start"] <= begun[1] - began
    assert 0.8 <= spent["train"] <= begun[-1] - begun[0] + 1
    assert spent["evaluation"] > 0
    assert summary["wall_tokens_per_second"] == pytest.approx(summary["tokens"] / summary["wall_seconds"])
    assert summary["step_share"] == pytest.approx(summary["train_seconds"] / summary["wall_seconds"])
