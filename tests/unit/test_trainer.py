"""What the trainer replaces of Transformers' own, and what it takes up of a run that goes on."""

from __future__ import annotations

import inspect
import multiprocessing
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer
from trl import SFTTrainer

from falcon_qlora.checkpoint.process_state import seed_anew
from falcon_qlora.config import parse
from falcon_qlora.data.packing import Plan
from falcon_qlora.models.layouts import preset_config
from falcon_qlora.processes import devices
from falcon_qlora.step.agreed import Reports, notes
from falcon_qlora.step.reduction import Reduction
from falcon_qlora.training.activations import Activations
from falcon_qlora.training.record import start_notes
from falcon_qlora.training.trainer import OVERRIDDEN, FalconTrainer


def test_every_private_method_that_is_replaced_is_listed() -> None:
    inherited = set(dir(SFTTrainer))
    own = {name for name in vars(FalconTrainer) if name.startswith("_") and not name.startswith("__")}
    assert own & inherited == set(OVERRIDDEN)


@pytest.mark.parametrize("name", OVERRIDDEN)
def test_what_is_replaced_takes_what_is_relied_on(name: str) -> None:
    relied_on = list(inspect.signature(getattr(FalconTrainer, name)).parameters)
    theirs = list(inspect.signature(getattr(Trainer, name)).parameters.values())
    assert [each.name for each in theirs[: len(relied_on)]] == relied_on
    assert all(each.default is not inspect.Parameter.empty for each in theirs[len(relied_on) :])


@pytest.mark.parametrize(
    ("wanted", "emulates", "expected"),
    [("auto", True, torch.float16), ("auto", False, torch.bfloat16), ("fp32", True, torch.float32)],
)
def test_the_trainer_computes_in_the_models_dtype(
    monkeypatch: pytest.MonkeyPatch, wanted: str, emulates: bool, expected: torch.dtype
) -> None:
    """A T4 emulates bfloat16, many times slower."""
    given: dict[str, Any] = {}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80"])
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5) if emulates else (8, 0))
    monkeypatch.setattr("trl.SFTConfig", lambda **settings: given.update(settings))
    configuration = parse(["-m", "tiny", "--compute_dtype", wanted])
    assert configuration.training is None
    assert devices.compute_dtype(wanted) == expected
    assert (given["fp16"], given["bf16"]) == (expected == torch.float16, expected == torch.bfloat16)


def test_a_wish_to_stop_has_been_heeded_when_a_run_goes_on() -> None:
    before, after = Reports(), Reports()
    told = notes(torch.tensor(0.5), stop=True, save=True, halvings=2)
    before.put(7, told, torch.tensor(False))
    after.load_state(before.state())
    (report,) = after.take(newest=True)
    assert (report.step, report.loss, report.halvings) == (7, 0.5, 2)
    assert not report.stop
    assert not report.save


def test_draws_begun_anew_are_of_their_step_and_process_alone() -> None:
    def draws(seed: int, step: int, process: int) -> tuple[Any, ...]:
        seed_anew(seed, step=step, process=process)
        return random.random(), np.random.rand(), torch.rand(()).item()

    kept = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    try:
        assert draws(1, 2, 3) == draws(1, 2, 3)
        others = [draws(1, 2, 3), draws(1, 4, 3), draws(1, 2, 0), draws(5, 2, 3)]
        for of_a_generator in zip(*others, strict=True):
            assert len(set(of_a_generator)) == len(others)
    finally:
        torch.random.set_rng_state(kept[0])
        np.random.set_state(kept[1])
        random.setstate(kept[2])


def _share(rank: int, file: Path, held: Any) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    parameters = [nn.Parameter(torch.full((3,), float(rank + 1))), nn.Parameter(torch.eye(2) * rank)]
    Reduction(parameters, processes=2).share_parameters()
    held.put([rank, [parameter.tolist() for parameter in parameters]])
    dist.barrier()


def test_every_process_begins_with_the_main_process_parameters(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    held: Any = context.SimpleQueue()
    processes = [context.Process(target=_share, args=(rank, tmp_path / "store", held)) for rank in (0, 1)]
    for process in processes:
        process.start()
    found = dict(held.get() for _ in processes)
    for process in processes:
        process.join(30)
    assert found[0] == found[1] == [[1.0, 1.0, 1.0], [[0.0, 0.0], [0.0, 0.0]]]


@pytest.mark.parametrize(
    ("preset", "positions", "told"),
    [
        ("falcon-7b", 2048, "rotary positions beyond were never trained"),
        ("falcon-rw-1b", 2048, "ALiBi has no limit"),
        ("falcon3-7b", 32768, "rotary positions beyond were never trained"),
    ],
)
def test_sequences_beyond_the_models_positions_are_told(preset: str, positions: int, told: str) -> None:
    model = SimpleNamespace(config=preset_config(preset))
    data: Any = SimpleNamespace(statistics=SimpleNamespace(longest=3000), epochs=None, plan=None)
    at_most, beyond = (
        start_notes(parse(["-m", "tiny", "--max_length", str(length)]), data, model, {}, Activations([]))
        for length in (positions, positions + 1)
    )
    assert at_most == []
    (note,) = beyond
    assert f"--max_length {positions + 1:,} is beyond the {positions:,} positions" in note
    assert told in note
    assert note.endswith("The longest document has 3,000 tokens")


@pytest.mark.parametrize(
    ("words", "lengths", "told"),
    [
        ([], [64] * 8, "at least 1 is idle in every step; give --global_batch_size 3 or more, or fewer GPUs"),
        (["--resume", "run"], [64] * 8, "at least 1 is idle in every step; give fewer GPUs"),
        ([], [64] * 6 + [16] * 8, "at least 1 is idle in 75% of the steps; give"),
        ([], [16] * 32, None),  # eight documents a step
        (["--global_batch_size", "3"], [64] * 9, None),
    ],
)
def test_processes_that_steps_have_no_document_for_are_told(
    monkeypatch: pytest.MonkeyPatch, words: list[str], lengths: list[int], told: str | None
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    settings = parse(["-m", "tiny", "--max_length", "64", "--global_batch_size", "2", *words])
    batch = settings.run.global_batch_size or 0
    about = {"fingerprint": "", "seed": 0, "max_length": 64, "order": "sequential"}
    plan = Plan(lengths=np.array(lengths), global_batch=batch, **about)
    data: Any = SimpleNamespace(statistics=None, epochs=None, plan=plan)
    model: Any = SimpleNamespace(config=preset_config("falcon-7b"))
    found = [each for each in start_notes(settings, data, model, {}, None) if "share" in each]
    assert len(found) == (told is not None)
    assert all(note.startswith(f"3 processes share 2 sequences a step: {told}") for note in found)
