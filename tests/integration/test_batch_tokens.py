"""``--batch_tokens`` in whole runs: every cut is the same training, and ranks agree on theirs."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import falcon_qlora
from falcon_qlora.commands.inspection import inspect_folder
from falcon_qlora.config import parse
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.training.rows import corpora
from tests.integration.interrupted import ROWS, SETTINGS, assert_same_run, at_work, run
from tests.integration.processes import Processes
from tests.integration.runs import metrics, summary, write_jsonl

# Eight sequences of 64 tokens a step on each of two ranks.
WORDS = [*SETTINGS, "--gradient_accumulation_steps", "4", "--steps", "6"]


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    with at_work(tmp_path_factory, ROWS) as made:
        yield made


def test_every_cut_has_the_loss_of_the_base_document_by_document(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", ROWS[:30])
    settings: dict[str, Any] = {
        "model_name_or_path": "tiny",
        "quantize_mode": "16bit",
        "compute_dtype": "fp32",
        "dataset_name": rows,
        "max_length": 64,
        "global_batch_size": 40,
        "max_steps": 3,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lora_r": 4,
        "report_to": "none",
        "save_strategy": "no",
        "optim": "sgd",
    }
    words = ["-m", "tiny", "--dataset_name", str(rows), "--max_length", "64"]
    corpus, _ = corpora(parse(words).data, load_tokenizer("tiny"), seed=42)
    model = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for document in corpus.dataset:
            ids = torch.tensor(document["input_ids"])
            logits = model(ids[None]).logits[0, :-1]
            losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
            total += losses[torch.tensor(document["mask"][1:]) > 0].double().sum()
    expected = float(total) / int(corpus.target_counts.sum())
    assert int(corpus.lengths.sum()) < 40 * 64  # all of them make one step

    found = {}
    for tokens in (64, 100, 40 * 64):
        folder = tmp_path / str(tokens)
        falcon_qlora.train(output_dir=folder, batch_tokens=tokens, **settings)
        found[tokens] = [line["loss"] for line in metrics(folder)]
        assert summary(folder)["micro_batch_tokens"] == tokens
    assert all(losses[0] == pytest.approx(expected, rel=1e-6) for losses in found.values())
    # What was learned from the first step is the same too.
    assert found[64] == pytest.approx(found[40 * 64], rel=1e-6)
    assert found[100] == pytest.approx(found[40 * 64], rel=1e-6)
    assert abs(found[64][2] / found[64][0] - 1) > 1e-3
    kept = dict(inspect_folder(tmp_path / "100").rows)["micro-batches"]
    assert kept == "100 tokens (--batch_tokens)"


def record(folder: Path, step: int) -> dict[str, Any]:
    return json.loads((folder / f"checkpoints/step-{step}/manifest.json").read_text())["cut"]


@pytest.mark.slow
def test_ranks_with_other_cards_cut_alike_and_the_losses_are_those_of_b(processes: Processes) -> None:
    cards = [{"do": "card", "mib": 60, "rank": 0}, {"do": "card", "mib": 5, "rank": 1}]
    plain = ["--lora_dropout", "0", "--logging_steps", "1"]
    found = {}
    for name, faults in {"b": [], "cards": cards, "alike": [{"do": "card", "mib": 5}]}.items():
        status, output, errors = run(processes, "--output_dir", name, *plain, faults=faults, settings=WORDS)
        assert (status, errors) == (0, "")
        found[name] = output
    folder = processes.folder
    assert "4 micro-batches of 128 tokens on each device (-b, on the CPU)" in found["b"]
    assert "2 micro-batches of 256 tokens on each device (auto: the fastest that fits)" in found["cards"]
    assert "activations: the largest recomputed" in found["cards"]
    assert record(folder / "cards", 6) == {
        "tokens": 256,
        "checkpointing": "selective",
        "card_gib": 5 / 1024,
        "gib": None,
        "as_before": False,
    }
    assert_same_run(folder / "cards", folder / "alike")
    ours, as_b = metrics(folder / "cards"), metrics(folder / "b")
    for name in ("loss", "grad_norm"):
        assert [line[name] for line in ours] == pytest.approx([line[name] for line in as_b], rel=1e-5)
    for name in ("tokens", "packing_efficiency", "epoch"):
        assert [line[name] for line in ours] == [line[name] for line in as_b]


@pytest.mark.slow
def test_out_of_memory_in_the_first_step_gives_all_ranks_the_next_cut_and_keeps_it(
    processes: Processes,
) -> None:
    card = {"do": "card", "mib": 60}
    short = [card, {"do": "memory", "step": 1, "rank": 1, "tokens": 200}]
    folder = processes.folder
    # A worker reads ahead shares that are cut as the run began.
    words = ["--output_dir", "short", "--dataloader_num_workers", "1"]
    status, output, errors = run(processes, *words, faults=short, settings=WORDS)
    assert (status, errors) == (0, "")
    told = [line for line in output.splitlines() if "out of memory in the first step on rank 1" in line]
    assert len(told) == 1
    assert "all ranks began it again with" in told[0]
    kept = record(folder / "short", 6)
    assert kept["tokens"] < 512
    assert kept["gib"] < kept["card_gib"] == 60 / 1024
    assert summary(folder / "short")["micro_batch_tokens"] == kept["tokens"]
    assert summary(folder / "short")["micro_batch_reason"] == "smaller, as memory had run out"
    assert summary(folder / "short")["micro_batch_parts"] == 1
    # To the last bit what a run is that had this cut from the start, dropout too.
    same = [{"do": "card", "mib": kept["gib"] * 1024}]
    assert run(processes, "--output_dir", "same", faults=same, settings=WORDS)[0] == 0
    assert record(folder / "same", 6)["tokens"] == kept["tokens"]
    assert_same_run(folder / "short", folder / "same")
    # And so it is where it stops and goes on.
    stop = [*short, {"do": "signal", "step": 3, "rank": 0, "number": 15, "to": "launcher"}]
    status, _, _ = run(processes, "--output_dir", "stopped", faults=stop, settings=WORDS)
    assert status != 0 or not (folder / "stopped/summary.json").exists()
    status, output, _ = run(processes, "--resume", "stopped", faults=[card], settings=[])
    assert status == 0
    assert "(as the run began)" in output
    assert_same_run(folder / "stopped", folder / "same")


@pytest.mark.slow
def test_memory_that_lacks_only_once_the_optimizers_state_is_there_shows_in_the_first_step(
    processes: Processes,
) -> None:
    """Not in the second, which could only split its micro-batches."""
    short = [{"do": "card", "mib": 60}, {"do": "memory", "rank": 1, "tokens": 200, "beside": "optimizer"}]
    folder = processes.folder
    status, output, errors = run(processes, "--output_dir", "later", faults=short, settings=WORDS)
    assert (status, errors) == (0, "")
    assert output.count("out of memory") == 1
    assert "out of memory in the first step on rank 1: all ranks began it again with" in output
    assert summary(folder / "later")["micro_batch_parts"] == 1
    kept = record(folder / "later", 6)
    assert kept["tokens"] <= 200
    same = [{"do": "card", "mib": kept["gib"] * 1024}]
    assert run(processes, "--output_dir", "from_the_start", faults=same, settings=WORDS)[0] == 0
    assert record(folder / "from_the_start", 6)["tokens"] == kept["tokens"]
    assert_same_run(folder / "later", folder / "from_the_start")
    # It goes on with what it has, beside a state that is there.
    stop = [*short, {"do": "signal", "step": 3, "rank": 0, "number": 15, "to": "launcher"}]
    run(processes, "--output_dir", "halted", faults=stop, settings=WORDS)
    assert not (folder / "halted/summary.json").exists()
    assert run(processes, "--resume", "halted", faults=short, settings=[])[0] == 0
    assert_same_run(folder / "halted", folder / "from_the_start")


@pytest.mark.slow
def test_another_cut_on_resume_is_told(processes: Processes) -> None:
    folder = processes.folder
    stop = [{"do": "signal", "step": 3, "rank": 0, "number": 15, "to": "launcher"}]
    words = ["--lora_dropout", "0", "--logging_steps", "1"]
    assert run(processes, "--output_dir", "whole", *words, settings=WORDS)[0] == 0
    run(processes, "--output_dir", "other", *words, faults=stop, settings=WORDS)
    status, output, _ = run(processes, "--resume", "other", "--batch_tokens", "300", settings=[])
    assert status == 0
    assert (
        "batch_tokens was auto and is 300 now: the losses agree up to rounding, but not with dropout"
        in output
    )
    assert "2 micro-batches of 300 tokens on each device (--batch_tokens)" in output
    ours, whole = metrics(folder / "other"), metrics(folder / "whole")
    assert [line["loss"] for line in ours] == pytest.approx([line["loss"] for line in whole], rel=1e-4)
    assert record(folder / "other", 6)["tokens"] == 300
