"""N processes train what one process trains, through the real command line."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from trl import SFTConfig

from tests.integration.runs import summary, train, write_jsonl
from tests.integration.test_adapter import fine_tune


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of very different lengths, so that processes get unequal numbers of target tokens."""
    rng = random.Random(0)
    words = "the a cat dog house tree river stone walks sleeps near under green small".split()
    texts = [" ".join(rng.choices(words, k=rng.choice([2, 3, 5, 40, 90]))) + "." for _ in range(160)]
    return write_jsonl(tmp_path_factory.mktemp("rows") / "rows.jsonl", [{"text": text} for text in texts])


def exact(rows: Path) -> list[str]:
    settings = "-m tiny -q 16bit --compute_dtype fp32 --lora_dropout 0 --max_length 128 --logging_steps 1"
    settings += " --steps 6 --learning_rate 1.0 --max_grad_norm 1.0 --warmup_steps 0 --save_strategy no"
    return [*settings.split(), "--dataset_name", str(rows)]


@pytest.mark.slow
@pytest.mark.parametrize("packing", ["true", "false"])
def test_two_processes_give_the_losses_of_one(rows: Path, tmp_path: Path, packing: str) -> None:
    settings = [*exact(rows), "--optim", "sgd", "--packing", packing, "--global_batch_size", "8"]
    # One process with two micro batches of four against two with several of one.
    alone = train(tmp_path / "alone", *settings, "-b", "4")
    pair = train(tmp_path / "pair", *settings, "-b", "1", gpus=2)
    assert len(alone) == len(pair) == 6
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
        assert two["tokens"] == one["tokens"]
    assert summary(tmp_path / "pair")["world_size"] == 2
    waited = summary(tmp_path / "pair")["reduction_shares"]
    assert len(waited) == 2
    assert all(0 < share < 1 for share in waited)
    assert summary(tmp_path / "alone")["reduction_shares"] is None
    adapters = [
        load_file(tmp_path / name / "adapter/adapter_model.safetensors") for name in ("alone", "pair")
    ]
    for name, weight in adapters[0].items():
        assert weight.abs().max() > 1e-3, f"{name} has hardly moved: the comparison would say little"
        torch.testing.assert_close(adapters[1][name], weight, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_adamw_stays_within_its_tolerance(rows: Path, tmp_path: Path) -> None:
    # Adam divides by the gradient's size, so what differs in the last bits of a tiny gradient shows.
    settings = [*exact(rows), "--optim", "adamw_torch", "--learning_rate", "2e-4", "--global_batch_size", "8"]
    alone = train(tmp_path / "alone", *settings, "-b", "8")
    pair = train(tmp_path / "pair", *settings, "-b", "2", gpus=2)
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)


@pytest.mark.slow
def test_the_same_seed_gives_the_same_losses_and_another_does_not(rows: Path, tmp_path: Path) -> None:
    settings = [*exact(rows), "-q", "4bit", "-b", "4", "--lora_dropout", "0.1"]
    first = train(tmp_path / "first", *settings)
    again = train(tmp_path / "again", *settings)
    other = train(tmp_path / "other", *settings, "--seed", "7")
    assert [line["loss"] for line in first] == [line["loss"] for line in again]
    assert [line["loss"] for line in first] != [line["loss"] for line in other]


def test_one_process_takes_one_gpu_of_several(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Transformers would wrap the model in DataParallel, which TRL refuses."""
    monkeypatch.setattr(SFTConfig, "n_gpu", property(lambda self: getattr(self, "_n_gpu", 2) or 2))
    run = fine_tune(tmp_path, max_steps=1)
    assert summary(run)["steps"] == 1
    assert "one of 2 GPUs is used" in capsys.readouterr().out
