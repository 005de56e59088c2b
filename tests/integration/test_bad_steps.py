"""A step whose numbers are not finite changes no weight, with whichever optimizer, and its rows are named."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
import torch

import falcon_qlora
from falcon_qlora.checkpoint.manifest import fault
from falcon_qlora.common.errors import UserError
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.step import global_batch
from falcon_qlora.step import loss as step_loss
from falcon_qlora.step.loss import accumulate_gradients
from tests.integration.interrupted import assert_same_run, at_work, run
from tests.integration.runs import metrics, summary, write_jsonl
from tests.integration.test_kernels_flag import fine_tune

BAD = 2
POISON = "xyzzy"
NOTE = r"note: step (\d+) \((.*)\): non-finite loss or gradient"


@pytest.mark.parametrize("optimizer", ["adamw_torch_fused", "adamw_torch", "paged_adamw_8bit"])
def test_a_bad_step_changes_nothing(optimizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before: list[torch.Tensor] = []

    def faulty(model: Any, *args: Any, **words: Any) -> Any:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        before.append(torch.cat([parameter.detach().flatten() for parameter in trained]))
        loss, halvings = accumulate_gradients(model, *args, **words)
        if len(before) == BAD:
            for parameter in trained[3:]:  # most; the loss is fine
                parameter.grad.fill_(torch.nan)  # type: ignore[union-attr]
        return loss, halvings

    monkeypatch.setattr(global_batch, "accumulate_gradients", faulty)
    settings: dict[str, Any] = {"optim": optimizer, "max_steps": 4, "max_rows": 40, "max_length": 64}
    settings |= {
        "eval_split": None,
        "eval_steps": None,
        "save_strategy": "no",
        "weight_decay": 0.1,
        "warmup_steps": 0,
    }
    run = fine_tune(tmp_path / "run", **settings)
    changed = [not torch.equal(one, other) for one, other in pairwise(before)]
    assert changed == [True, False, True]
    assert all(each.isfinite().all() for each in before)
    assert summary(run)["bad_steps"] == 1


def spoil(monkeypatch: pytest.MonkeyPatch, bad: set[int]) -> None:
    """Make the losses of these steps, from 1, not numbers."""

    def faulty(model: Any, share: Any, **words: Any) -> Any:
        loss, halvings = accumulate_gradients(model, share, **words)
        return loss * torch.nan if share.step + 1 in bad else loss, halvings

    monkeypatch.setattr(global_batch, "accumulate_gradients", faulty)


@pytest.mark.slow
def test_a_run_whose_numbers_stay_bad_is_saved_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"max_steps": 8, "max_rows": 40, "max_length": 64, "save_steps": 6}
    settings |= {"eval_split": None, "eval_steps": None, "max_bad_steps": 2, "logging_steps": 3}
    run = tmp_path / "run"
    with monkeypatch.context() as patch:
        spoil(patch, {3, 4})
        with pytest.raises(
            UserError,
            match=rf"2 steps in a row .* checkpoint is {run}/checkpoints/step-5: resume it with --resume",
        ):
            fine_tune(run, **settings)
        assert fault(run / "checkpoints" / "step-5") is None
        falcon_qlora.train(resume=run)
        whole = fine_tune(tmp_path / "whole", **{**settings, "max_bad_steps": 0})
    assert_same_run(run, whole)


def test_a_run_without_a_good_step_leaves_no_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spoil(monkeypatch, {1, 2})
    with pytest.raises(UserError, match="all 2 steps had a non-finite loss or gradient"):
        fine_tune(tmp_path / "run", max_steps=2, max_rows=40, max_length=64, eval_split=None, eval_steps=None)
    assert not (tmp_path / "run" / "adapter").exists()


def test_the_mean_loss_is_of_the_steps_that_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []

    def noted(model: Any, share: Any, **words: Any) -> Any:
        loss, halvings = accumulate_gradients(model, share, **words)
        losses.append(float(loss))
        return loss * torch.nan if share.step == 1 else loss, halvings

    monkeypatch.setattr(global_batch, "accumulate_gradients", noted)
    settings: dict[str, Any] = {"max_steps": 6, "logging_steps": 3, "max_rows": 40, "max_length": 64}
    run = fine_tune(tmp_path / "run", **settings, eval_split=None, eval_steps=None, save_strategy="no")
    expected = [(losses[0] + losses[2]) / 2, sum(losses[3:]) / 3]
    assert [line["loss"] for line in metrics(run)] == pytest.approx(expected, rel=1e-6)


def rows_with_poison(path: Path, poisoned: set[int], count: int) -> str:
    """A file of rows, of which those of these numbers (from 1) hold a word that no other has."""
    rows = [
        {"prompt": f"Say {n}.", "completion": f" {POISON if n in poisoned else 'good'} {path.stem} {n}"}
        for n in range(1, count + 1)
    ]
    if path.suffix == ".csv":
        lines = ["prompt,completion", *(f"{row['prompt']},{row['completion']}" for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    else:
        write_jsonl(path, rows)
    return str(path)


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The loss of what holds the word is not a number."""
    whole = step_loss.sum_of_losses
    tokenizer = load_tokenizer("tiny")

    def poisoned(model: Any, batch: Any) -> torch.Tensor:
        loss = whole(model, batch)
        return loss * torch.nan if POISON in tokenizer.decode(batch.input_ids[0]) else loss

    monkeypatch.setattr(step_loss, "sum_of_losses", poisoned)


def named(output: str) -> list[str]:
    """What the notes of bad steps name."""
    return [rows for _, rows in re.findall(NOTE, output)]


ONE_ROW_A_STEP: dict[str, Any] = {
    "packing": False,
    "per_device_train_batch_size": 1,
    "max_rows": None,
    "eval_split": None,
    "eval_steps": None,
    "save_strategy": "no",
    "max_bad_steps": 0,
}


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_whose_numbers_are_bad_are_named_with_their_file(
    streaming: bool,
    poison: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "more").mkdir()
    names = [
        rows_with_poison(Path("a.jsonl"), {2, 5}, 5),
        rows_with_poison(Path("more/b.csv"), {1}, 3),
        rows_with_poison(Path("more/c.jsonl"), {4}, 4),
    ]
    settings = ONE_ROW_A_STEP | {"streaming": streaming}
    fine_tune(tmp_path / "one", **settings, dataset_name=names[0], max_steps=5)
    told = {"row 2 of a.jsonl", "row 5 of a.jsonl"}
    assert sorted(named(capsys.readouterr().out)) == sorted(told)
    told |= {"row 1 of more/b.csv", "row 4 of more/c.jsonl"}
    fine_tune(tmp_path / "several", **settings, dataset_name=["a.jsonl", "more"], max_steps=12)
    assert sorted(named(capsys.readouterr().out)) == sorted(told)
    if streaming:
        settings |= {"max_bad_steps": 1, "dataset_name": ["a.jsonl", "more/c.jsonl"]}
        with pytest.raises(UserError, match=r"step \d+ \(row \d of (a|more/c).jsonl\)"):
            fine_tune(tmp_path / "ended", **settings, max_steps=9)


def test_a_stream_that_goes_on_names_the_rows_that_it_had_read(
    poison: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names = [rows_with_poison(Path("a.jsonl"), {1, 3}, 3), rows_with_poison(Path("b.jsonl"), {2}, 3)]
    settings = ONE_ROW_A_STEP | {"streaming": True, "dataset_name": names, "max_steps": 6}
    settings |= {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 20}
    run = fine_tune(tmp_path / "run", **settings)
    found = re.findall(NOTE, capsys.readouterr().out)
    assert sorted(rows for _, rows in found) == ["row 1 of a.jsonl", "row 2 of b.jsonl", "row 3 of a.jsonl"]
    # The checkpoint of a bad step is written before anyone has learned of it.
    checkpoint = run / "checkpoints" / f"step-{found[0][0]}"
    fine_tune(None, **settings | {"resume": checkpoint})
    assert re.findall(NOTE, capsys.readouterr().out) == found


@pytest.mark.parametrize("streaming", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_the_hub_are_named_by_data_set_and_split(
    streaming: bool,
    poison: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = datasets.Dataset.from_list([{"text": f"good {n} {POISON if n == 3 else ''}"} for n in range(1, 7)])
    builder = SimpleNamespace(hash="c0ffee")
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name, config: builder)
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda *names, streaming, **how: rows.to_iterable_dataset(num_shards=2) if streaming else rows,
    )
    name = f"some/bad-{'stream' if streaming else 'table'}"
    settings = ONE_ROW_A_STEP | {"streaming": streaming, "dataset_name": name, "max_steps": 6}
    fine_tune(tmp_path / "run", **settings)
    told = "rows" if streaming else "row 3"
    assert named(capsys.readouterr().out) == [f"{told} of {name}, split train"]


@pytest.mark.slow
def test_two_processes_name_the_rows_of_their_common_step(tmp_path_factory: pytest.TempPathFactory) -> None:
    words = ["-m", "tiny", "-q", "4bit", "--packing", "false", "-b", "1", "--max_length", "64"]
    words += ["--report_to", "none", "--dataset_name", "a.jsonl", "b.jsonl", "--output_dir", "run"]
    words += ["--max_bad_steps", "0", "--train_sampling_strategy", "sequential", "--num_train_epochs", "1"]
    with at_work(tmp_path_factory, []) as processes:
        rows_with_poison(processes.folder / "a.jsonl", {3}, 3)
        rows_with_poison(processes.folder / "b.jsonl", {4}, 5)
        status, output, errors = run(processes, faults=[{"do": "poison", "word": POISON}], settings=words)
    assert (status, errors) == (0, "")
    assert named(output) == ["row 3 of a.jsonl and row 1 of b.jsonl", "rows 4, 5 of b.jsonl"]
