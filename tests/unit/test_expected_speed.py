"""What the start says of the speed: what the records have, and only what would help this run."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from falcon_qlora.config import parse
from falcon_qlora.kernels import libraries
from falcon_qlora.kernels.libraries import FLASH_ATTENTION_4, QUACK
from falcon_qlora.models import fast_path, packed_attention
from falcon_qlora.models.layouts import layout_of, preset_config
from falcon_qlora.processes import devices
from falcon_qlora.training.activations import Activations
from falcon_qlora.training.expected_speed import FP8, GPU, LEAST_TOKENS, LIBRARIES, Run, speed_note, told
from tests.unit.test_fast_path import adapted

BOTH = [FLASH_ATTENTION_4, QUACK]


def test_every_measured_step_is_as_fast_as_is_told(repository: Path) -> None:
    checked = 0
    for row in csv.DictReader((repository / "tests/benchmarks/records.csv").open()):
        kept = (
            row["checkpointing"] == "none" and row["gpus"] == "1" and row["tflops_4n"] and GPU in row["gpu"]
        )
        # 11B's documents have 8,192 tokens.
        alike = row["variant"].startswith("ours") and "fast (" in row["note"] and "11b" not in row["model"]
        if not (kept and alike) or "dropout" in row["variant"]:
            continue
        layout = layout_of(preset_config(row["model"].removeprefix("random:")))
        run = Run(
            gpu=row["gpu"],
            parameters=layout.parameter_count(),
            mixes=bool(layout.other_mixers()),
            micro_batch_tokens=int(row["micro_batch_tokens"]),
            in_fp8=row["compute_dtype"] == "fp8",
            plain_lora=True,
            all_fast=True,
        )
        if run.is_as_measured:
            least, most = run.tokens_per_second
            assert least <= int(row["tokens_per_second"]) <= most, row
            checked += 1
    assert checked > 30


SEVEN_B: dict[str, Any] = {
    "gpu": "NVIDIA H200",
    "parameters": 6_921_720_704,
    "micro_batch_tokens": LEAST_TOKENS,
    "in_fp8": False,
    "plain_lora": True,
    "all_fast": True,
}


def test_a_speed_is_told_only_where_it_was_measured() -> None:
    assert told(Run(**SEVEN_B), []) == (
        "expect 18,100 to 21,700 tokens/s of each H200 with documents of 512 to 2,048 tokens"
    )
    others: list[dict[str, Any]] = [
        {"mixes": True},
        {"mixes": True, "micro_batch_tokens": 2 * LEAST_TOKENS, "in_fp8": True},
        {"gpu": "NVIDIA A100-SXM4-80GB"},
        {"parameters": 10**9},
        {"micro_batch_tokens": 2048},
        {"plain_lora": False},
        {"all_fast": False},
    ]
    for other in others:
        assert told(Run(**SEVEN_B | other), []) is None
        assert told(Run(**SEVEN_B | other), [FP8]) == f"faster, as measured with Falcon-7B on an H200: {FP8}"


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
        ((9, 0), "falcon-7b", "--compute_dtype fp8", [], [LIBRARIES]),
        ((9, 0), "falcon-7b", "--compute_dtype fp8", [FLASH_ATTENTION_4], []),  # GELU has its own kernels
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
    note = speed_note(parse(flags.split()), model, {}, Activations([]))
    expected = f"faster, as measured with Falcon-7B on an H200: {'; '.join(faster)}" if faster else None
    assert note == expected


def test_dropout_keeps_fp8_out(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 9))
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16", dropout=0.1)
    assert speed_note(parse([]), model, {}, Activations([])) is None
