"""What the start says of the speed: an estimate, and only what would help this run."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from falcon_qlora.config import parse
from falcon_qlora.data.packing import Plan
from falcon_qlora.kernels import libraries
from falcon_qlora.kernels.libraries import FLASH_ATTENTION_4, QUACK
from falcon_qlora.models import fast_path, packed_attention
from falcon_qlora.models.locate import find_outline_here
from falcon_qlora.processes import devices
from falcon_qlora.training.batch_tokens import estimate_here
from falcon_qlora.training.cards import CARDS, MEASURED, card_of
from falcon_qlora.training.estimate import Estimate, Estimator
from falcon_qlora.training.speed_note import FP8, LIBRARIES, LIBRARIES_IN_FP8, speed_note, told
from tests.unit.test_fast_path import adapted

BOTH = [FLASH_ATTENTION_4, QUACK]


@pytest.fixture
def an_estimate() -> Estimate:
    configuration = parse(["-m", "random:falcon-7b"])
    return Estimator(configuration, find_outline_here("random:falcon-7b")).on(MEASURED)


def test_a_speed_is_told_with_what_it_is_from(an_estimate: Estimate) -> None:
    note = told(an_estimate, [FP8])
    assert note is not None
    assert re.match(r"estimated: 1\d,\d00 tokens/s and \d\d\.\d GiB of the card; the speed by steps", note)
    assert note.endswith(f". faster, as measured with Falcon-7B on an H200: {FP8}")
    of_another = told(dataclasses.replace(an_estimate, card=CARDS["l4"]), [])
    assert of_another is not None
    assert "by published ceilings and the share of them reached on an H200" in of_another
    assert told(dataclasses.replace(an_estimate, tokens_per_second=None), []) is None
    assert told(None, []) is None


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A CPU that says it is a GPU with CUDA 13."""
    packed_attention._capability.cache_clear()
    monkeypatch.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA some GPU")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    yield monkeypatch
    packed_attention._capability.cache_clear()


@pytest.mark.parametrize(
    ("capability", "layout", "flags", "installed", "faster"),
    [
        ((9, 0), "falcon-7b", "", [], [LIBRARIES, FP8]),
        ((9, 0), "falcon-7b", "", [QUACK], [LIBRARIES, FP8]),
        ((9, 0), "falcon-7b", "", BOTH, [FP8]),
        ((9, 0), "falcon-7b", "--kernels portable", [], [FP8]),
        ((9, 0), "falcon-7b", "--kernels off", [], []),
        ((9, 0), "falcon-7b", "--compute_dtype fp8", [], [LIBRARIES_IN_FP8]),
        ((9, 0), "falcon-7b", "--compute_dtype fp8", [FLASH_ATTENTION_4], [LIBRARIES_IN_FP8]),
        ((9, 0), "falcon-7b", "--compute_dtype fp8", BOTH, []),
        ((10, 0), "falcon-7b", "--compute_dtype fp8", [FLASH_ATTENTION_4], []),  # GELU has its own kernels
        ((9, 0), "falcon3", "", [], [FP8]),  # neither heads of 32 nor SwiGLU have any in libraries
        ((9, 0), "falcon-h1", "", [], [FP8]),
        ((9, 0), "falcon-rw-1b", "", [], []),  # ALiBi runs on the reference path
        ((8, 9), "falcon-7b", "", [], [FP8]),
        ((8, 0), "falcon-7b", "", [], []),
    ],
    ids=str,
)
def test_only_what_would_help_is_told(
    capability: tuple[int, int],
    layout: str,
    flags: str,
    installed: list[str],
    faster: list[str],
    on_gpu: pytest.MonkeyPatch,
) -> None:
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    for module in (libraries, fast_path):
        on_gpu.setattr(module, "is_installed", lambda library: library in installed)
    model = adapted(layout, "4bit", compute_dtype="bf16")
    note = speed_note(parse(flags.split()), model, None)
    expected = f"faster, as measured with Falcon-7B on an H200: {'; '.join(faster)}" if faster else None
    assert note == expected


@pytest.mark.parametrize(("name", "is_known"), [("NVIDIA H200", True), ("NVIDIA L40S", False)])
def test_a_run_is_estimated_on_its_own_gpu(name: str, is_known: bool, on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "get_device_name", lambda *_: name)
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (1, 47 * 2**30))
    words, outline = ["-m", "random:falcon-7b"], find_outline_here("random:falcon-7b")
    found = estimate_here(parse(words), outline, None)
    assert found is not None
    assert found.card is not None
    assert found.card.gib == 47
    assert found.parts == Estimator(parse(words), outline).on(card_of("47GiB")).parts
    assert (found.tokens_per_second is not None) == is_known
    plan = Plan(
        lengths=np.full(64, 100), fingerprint="0", seed=0, global_batch=4, max_length=200, packed=False
    )
    padded = estimate_here(parse([*words, "--packing", "false", "--padding", "max_length"]), outline, plan)
    if is_known:
        assert padded is not None
        assert padded.tokens_per_second == pytest.approx(found.tokens_per_second / 2, rel=0.05)


def test_dropout_keeps_fp8_out(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16", dropout=0.1)
    assert speed_note(parse([]), model, None) is None
