"""A disk that fails costs a run no more than what could not be written just then."""

from __future__ import annotations

import errno
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from falcon_qlora.checkpoint import insist, write
from falcon_qlora.checkpoint.content import Filling
from falcon_qlora.methods.lora import Lora
from falcon_qlora.run_folder.directory import RunDirectory
from tests.integration.interrupted import NEVER_SAVING, ROWS, SETTINGS, at_work, run
from tests.integration.runs import metrics, room_for
from tests.integration.test_adapter import fine_tune
from tests.integration.test_sharded_interruption import SHARDED

ENOUGH = 2**30


def within(rooms: Iterator[int], work: Callable[..., Any]) -> Callable[..., Any]:
    """`work` with so much room the first time, the second, and so on."""

    def limited(*arguments: Any, **named: Any) -> Any:
        with room_for(next(rooms, ENOUGH)):
            return work(*arguments, **named)

    return limited


def test_a_disk_that_fails_for_a_while_costs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    # The second line of metrics.jsonl is cut off in its middle; with the third there is room again.
    monkeypatch.setattr(
        RunDirectory, "append_metrics", within(iter([ENOUGH, 400]), RunDirectory.append_metrics)
    )
    save = within(iter([10_000]), Lora.save)

    def save_and_be_in_the_way(self: Lora, model: Any, folder: Path, *state: Any) -> None:
        save(self, model, folder, *state)
        for name in ("summary.json", "loss.png"):
            (folder.parent / name / "in the way").mkdir(parents=True)

    monkeypatch.setattr(Lora, "save", save_and_be_in_the_way)
    monkeypatch.setattr(insist, "PATIENT_SECONDS", 0.0)
    (tmp_path / "run" / "samples.jsonl").mkdir(parents=True)
    folder = fine_tune(tmp_path, logging_steps=1, save_strategy="no", generate_samples=1, eval_split=0.3)
    assert [line["step"] for line in metrics(folder)] == [1, 2, 3]
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    for what in (
        "metrics.jsonl cannot",
        "samples.jsonl cannot",
        "run/adapter could not be written (adapter_model.safetensors: File too large)",
        "summary.json",
        "loss",
    ):
        assert sum(what in line for line in told) == 1, (what, told)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "steps", "weights"),
    [(SETTINGS, 10, "adapter_model.safetensors"), (SHARDED, 8, "model.safetensors")],
)
def test_an_adapter_that_cannot_be_written_is_by_going_on(
    tmp_path_factory: pytest.TempPathFactory, settings: list[str], steps: int, weights: str
) -> None:
    with at_work(tmp_path_factory, ROWS) as processes:
        full = {"do": "full", "bytes": 10_000, "times": 2}
        status, output, errors = run(processes, "--output_dir", "run", faults=[full], settings=settings)
        last = f"run/checkpoints/step-{steps}"
        assert status == 2
        found = re.fullmatch(
            rf"error: all steps are done, but run/adapter could not be written \({weights}: File too "
            rf"large\)\. The last complete checkpoint is {last}: make room there, and go on with:  "
            r"falcon-qlora (train .*)\n",
            errors,
        )
        assert found is not None, errors
        assert output.count("retrying in") == 1
        folder = processes.folder / "run"
        assert [path.name for path in folder.glob("*adapter*")] == []
        process = processes.start("falcon_qlora", *shlex.split(found[1]))
        _, errors = process.communicate(timeout=240)
        assert (process.returncode, errors) == (0, "")
        whole, kept = (load_file(path / weights) for path in (folder / "adapter", processes.folder / last))
        assert whole.keys() == kept.keys()
        assert all(torch.equal(whole[name], kept[name]) for name in kept)


def test_a_state_that_cannot_be_written_is_told_with_its_file_and_the_systems_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as failed:
        write.save({"state": torch.zeros(99)}, Path("/dev/full"))
    assert failed.value.errno == errno.ENOSPC
    monkeypatch.setattr(Filling, "fill", within(iter([6_000_000]), Filling.fill))  # the adapter, no more
    fine_tune(tmp_path, save_steps=2)
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    failed_save = "note: step 2: the checkpoint could not be saved (optimizer.pt: File too large)"
    assert told == [f"{failed_save}. The training goes on until the next save"]


def test_a_save_that_does_not_begin_leaves_the_adapter_as_it_is_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And not as the save before has copied it."""
    begin = write.begin

    def begin_unless_last(partial: Path) -> None:
        if partial.name == ".step-3.partial":
            raise OSError(errno.EROFS, "Read-only file system")
        begin(partial)

    monkeypatch.setattr(write, "begin", begin_unless_last)
    folder = fine_tune(tmp_path, save_steps=2)
    assert (folder / "adapter" / "adapter_model.safetensors").is_file()
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: ")]
    assert told == [
        "note: step 3: the checkpoint could not be saved (Read-only file system); the adapter is whole"
    ]


@pytest.mark.slow
def test_an_end_without_a_checkpoint_waits_for_room_or_for_a_signal(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with at_work(tmp_path_factory, ROWS) as processes:
        full = {"do": "full", "bytes": 10_000, "times": 1}
        faults = [full, {"do": "patience", "seconds": 5}]
        words = ["--output_dir", "run", "--hang_minutes", "0.05"]  # less than the waiting
        status, output, errors = run(processes, *words, faults=faults, settings=NEVER_SAVING, gpus=1)
        assert (status, errors) == (0, "")
        assert len(re.findall(r"run/adapter could not .*, and there is no .*: make room on", output)) == 1
        assert (processes.folder / "run/adapter/adapter_model.safetensors").is_file()
        ended = {"do": "later", "step": 10, "rank": 0, "to": "launcher", "seconds": 5, "number": 15}
        faults = [full, {"do": "patience", "seconds": 300}, ended]
        status, output, errors = run(processes, "--output_dir", "lost", faults=faults, settings=NEVER_SAVING)
        assert status == 2
        assert re.fullmatch(
            r"error: all steps are done, but lost/adapter could not be written "
            r"\(adapter_model\.safetensors: .+\)\. There is no complete checkpoint\.\n",
            errors,
        )
        assert "SIGTERM: saving" not in output
