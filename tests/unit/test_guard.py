"""Steps that come to nothing, losses that jump, micro batches that are split, processes that hang."""

from __future__ import annotations

import json
import os
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch._C import _distributed_c10d
from torch.distributed.flight_recorder.components.loader import read_dump

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import collate
from falcon_qlora.models.load import load_model
from falcon_qlora.processes.watchdog import describe, record_collectives, write_record
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.step.agreed import Reports, StepReport, notes
from falcon_qlora.step.bad_steps import BadSteps
from falcon_qlora.step.loss import halved
from falcon_qlora.training.disk import check_disk, predicted_bytes
from tests.layouts import attach_lora


def report(step: int, loss: float, bad: bool = False) -> StepReport:
    return StepReport(step=step, loss=loss, bad=bad)


def test_only_bad_steps_in_a_row_end_a_run() -> None:
    said: list[str] = []
    steps = BadSteps(most=3, rows_of=lambda report: f"rows {report.step}", say=said.append)
    for step, bad in enumerate([True, True, False, True, True]):
        steps.see(report(step, 1.0, bad))
    assert (steps.total, len(said)) == (4, 4)
    again = BadSteps(most=3, rows_of=lambda report: f"rows {report.step}", say=said.append)
    again.load_state(steps.state())
    with pytest.raises(UserError, match=r"3 steps in a row.*the last one step 6 \(rows 5\)"):
        again.see(report(5, 1.0, True))


def test_a_loss_that_jumps_is_told_and_one_that_wavers_is_not() -> None:
    said: list[str] = []
    steps = BadSteps(most=0, rows_of=lambda report: "rows 7", say=said.append)
    for step, noise in enumerate(np.random.default_rng(0).normal(0, 0.1, 200)):
        steps.see(report(step, 2.0 + float(noise)))
    assert said == []
    steps.see(report(200, 4.5))
    assert said[0].startswith("step 201 (rows 7): the loss jumped to 4.5; lately it was ")


def test_reports_come_a_step_late_and_notes_are_what_any_process_says() -> None:
    one = notes(torch.tensor(0.25), halvings=1)
    other = notes(torch.tensor(0.5), stop=True, halvings=3)
    reports = Reports()
    origins = ((0, 7), (1, 2))
    reports.put(4, one + other, torch.tensor(False), origins)
    assert reports.take() == []
    reports.put(5, one, torch.tensor(True))
    assert reports.take() == [StepReport(step=4, loss=0.75, stop=True, halvings=3, origins=origins)]
    (last,) = reports.take(newest=True)
    assert (last.step, last.bad, last.halvings) == (5, True, 1)


@pytest.mark.parametrize("times", [1, 2, 8])
@pytest.mark.parametrize("pad_to", [None, 12])
def test_halves_hold_the_same_documents(times: int, pad_to: int | None) -> None:
    documents = [np.arange(100 * index, 100 * index + length) for index, length in enumerate([3, 9, 2, 6, 4])]
    masks = [np.r_[0, np.ones(len(document) - 1)] for document in documents]
    whole = collate(documents, masks, pad_to=pad_to)
    parts = halved(whole, times)
    alone = [
        collate([document], [mask], pad_to=pad_to) for document, mask in zip(documents, masks, strict=True)
    ]
    assert len(parts) == min(2**times, 5)
    assert sum((part.lengths for part in parts), ()) == whole.lengths
    for name in ("input_ids", "position_ids"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts], dim=1), getattr(whole, name))
    assert torch.equal(torch.cat([part.targets for part in parts]), whole.targets)
    for part in parts:
        predicted = part.input_ids[0][part.target_positions + 1]
        assert torch.equal(predicted, part.targets)
        assert part.cu_seqlens.tolist() == np.r_[0, np.cumsum(part.lengths)].tolist()
    if times == 8:
        for part, document in zip(parts, alone, strict=True):
            assert torch.equal(part.target_positions, document.target_positions)


def test_the_process_that_is_behind_or_silent_is_the_one_that_hangs() -> None:
    waiting = json.dumps([7, 1, "adding up the gradients", "in all_reduce"])
    behind = json.dumps([7, 0, "computing", "in sleep"])
    assert describe({0: waiting, 1: behind, 2: waiting}, 3, 60.0) == (
        "rank 1 has made no progress for 60 s, computing at step 7. Its Python stack:\nin sleep"
    )
    assert describe({0: waiting, 2: waiting}, 3, 60.0).startswith("rank 1 is not responding")
    assert describe({0: waiting, 1: waiting}, 2, 60.0).startswith("all 2 ranks have made no progress")


def test_nccl_remembers_little_unless_it_is_told_how_much(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in (
        ({}, {"TORCH_FR_BUFFER_SIZE": "128"}),
        ({"TORCH_FR_BUFFER_SIZE": "7"}, {"TORCH_FR_BUFFER_SIZE": "7"}),
        ({"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}, {"TORCH_NCCL_TRACE_BUFFER_SIZE": "0"}),
    ):
        environment: dict[str, str] = dict(before)
        monkeypatch.setattr(os, "environ", environment)
        record_collectives()
        assert environment == after


def test_nccls_record_is_written_as_torch_reads_it_and_without_nccl_nothing_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "flight_record"
    record = {"entries": [{"profiling_name": "nccl:all_reduce"}], "version": "2.10", "pg_config": {}}
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "gloo")
    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: pickle.dumps(record), raising=False)
    assert write_record(folder) is None
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: "cpu:gloo,cuda:nccl")
    monkeypatch.delattr(_distributed_c10d, "_dump_nccl_trace")
    assert write_record(folder) is None
    assert not folder.exists()

    monkeypatch.setattr(_distributed_c10d, "_dump_nccl_trace", lambda: pickle.dumps(record), raising=False)
    monkeypatch.setenv("RANK", "3")
    assert write_record(folder) == folder
    (file,) = folder.iterdir()
    found = read_dump("nccl_trace_rank_", str(file))
    assert (found["rank"], found["entries"]) == (3, record["entries"])


def test_room_is_counted_for_every_checkpoint_that_lies_there_at_once() -> None:
    million = 1_000_000
    of_adapter = predicted_bytes(0, optimizer="adamw_torch_fused", saves=0, limit=2).bytes
    small = predicted_bytes(0, optimizer="adamw_torch_fused", saves=1, limit=2).bytes - of_adapter
    for saves, limit, best, count in [
        (10, 2, False, 3),
        (10, 2, True, 4),
        (1, 2, False, 1),
        (10, None, False, 10),
    ]:
        found = predicted_bytes(
            million, optimizer="adamw_torch_fused", saves=saves, limit=limit, keeps_best=best
        )
        assert found.bytes == count * (12 * million + small) + 4 * million + of_adapter
        assert (found.checkpoints, found.checkpoint_bytes) == (count, 12 * million + small)
    paged = predicted_bytes(million, optimizer="paged_adamw_8bit", saves=1, limit=None)
    assert paged.bytes == 10 * million + 31_250 + small + of_adapter  # two scales of 4 bytes to 256 numbers


@pytest.mark.parametrize("count", [0, 1, 3])
def test_the_parts_of_what_a_run_needs_of_the_disk_add_up_to_it(count: int) -> None:
    needed = predicted_bytes(2**20, optimizer="adamw_torch_fused", saves=count, limit=None)
    # 4 bytes a parameter and Adam's 8 more, 2 MiB of a checkpoint's small files, 16 of the run's.
    assert needed.bytes == (count * (12 + 2) + 4 + 16) * 2**20
    total, *parts = map(float, re.findall(r"([\d.]+) MiB", str(needed)))
    of_checkpoint = parts.pop(0) if count else 0
    assert total == count * of_checkpoint + sum(parts)
    assert str(needed).endswith("the adapter of 4.0 MiB and 16.0 MiB for small files")
    assert ("at once" in str(needed)) == (count > 0)


def test_fewer_checkpoints_are_advised_only_where_that_is_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = attach_lora(load_model("tiny", device="cpu"), r=4)
    training: Any = SimpleNamespace(
        save_strategy="steps",
        save_steps=1,
        save_total_limit=2,
        save_only_model=False,
        load_best_model_at_end=False,
    )

    def check(free: int) -> Any:
        monkeypatch.setattr("falcon_qlora.training.disk.free_bytes", lambda _: free)
        directory, optimizer = RunDirectory(tmp_path), "adamw_torch_fused"
        return check_disk(
            directory, model, training, optimizer=optimizer, whole=False, steps=9, by_clock=False
        )

    needed = check(2**40)
    with_limit_1 = needed.bytes - needed.checkpoint_bytes
    for free, advised in ((with_limit_1, True), (with_limit_1 - 1, False)):
        with pytest.raises(UserError) as refused:
            check(free)
        assert ("--save_total_limit" in str(refused.value)) == advised
    training.save_total_limit = 1
    assert check(with_limit_1).bytes == with_limit_1
