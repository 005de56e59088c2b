"""Full fine-tuning that DeepSpeed's ZeRO-3 shares out: the numbers are those of one process."""

from __future__ import annotations

import importlib.util
import json
import re
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.models import zero3
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.processes import ranks
from falcon_qlora.training.sharding import shard_if_wanted
from tests.integration.processes import Processes
from tests.integration.runs import command, metrics, summary, train
from tests.integration.test_sharding import SETTINGS

needs_deepspeed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed, the extra [deepspeed], is not installed"
)
ADAMW = "--optim adamw_torch --learning_rate 1e-3 --weight_decay 0.1 --max_grad_norm 0".split()


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "model.safetensors")


def assert_same_numbers(alone: Path, pair: Path) -> None:
    for name in ("loss", "grad_norm", "eval_loss"):
        one, two = ([line.get(name, 0.0) for line in metrics(run)] for run in (alone, pair))
        assert two == pytest.approx(one, rel=1e-5), name


def run_faulty(
    folder: Path, name: str, *words: str, faults: list[dict[str, Any]], status: int = 0
) -> tuple[str, str]:
    """stdout and stderr of a run in which `faulty_worker` has something go wrong."""
    start = ("tests.integration.faulty_launch", "train", *SETTINGS, "--report_to", "none")
    processes = Processes(folder)
    repository = Path(__file__).resolve().parents[2]
    path = ":".join([str(repository), *(entry for entry in sys.path if entry)])
    process = processes.start(
        *start, "--output_dir", name, *words, FAULTS=json.dumps(faults), PYTHONPATH=path
    )
    output, errors = process.communicate(timeout=240)
    assert process.returncode == status, output + errors
    assert processes.none_left()
    return output, errors


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("flags", [[], [*ADAMW, "--load_best_model_at_end", "true"]], ids=["sgd", "adamw"])
def test_two_processes_train_what_one_does(tmp_path: Path, flags: list[str]) -> None:
    # As in `test_sharding`: of 7 documents 4 on one process and 3 on the other. With AdamW the best
    # checkpoint is not the last: it is read back into the parts.
    train(tmp_path / "alone", *SETTINGS, *flags, "-b", "3")
    train(tmp_path / "pair", *SETTINGS, *flags, "-b", "1", "--sharding", "zero3", gpus=2)
    assert_same_numbers(tmp_path / "alone", tmp_path / "pair")
    alone, pair = summary(tmp_path / "alone"), summary(tmp_path / "pair")
    assert pair["best_step"] == alone["best_step"] == (2 if flags else 4)
    assert pair["trainable_parameters"] == alone["trainable_parameters"] > 4e6
    assert weights(tmp_path / "alone").keys() == weights(tmp_path / "pair").keys()
    for name, tensor in weights(tmp_path / "alone").items():
        # AdamW steps as far on the smallest gradients as on others, rounding noise or not.
        atol = 5e-4 if flags else 1e-6
        torch.testing.assert_close(weights(tmp_path / "pair")[name], tensor, rtol=1e-5, atol=atol)


@needs_deepspeed
@pytest.mark.slow
def test_a_step_whose_numbers_are_bad_leaves_nothing_behind(tmp_path: Path) -> None:
    # The loss of one process alone, then the gradients of the other alone: all leave both steps out.
    ways = {"alone": ["-b", "3"], "pair": ["-b", "1", "--sharding", "zero3", "--gpus", "2"]}
    for name, words in ways.items():
        last = 1 if name == "pair" else 0
        faults = [{"do": "nan", "step": 2, "rank": 0}, {"do": "gradient", "step": 3, "rank": last}]
        run_faulty(tmp_path, name, *words, *ADAMW, faults=faults)
        assert summary(tmp_path / name)["bad_steps"] == 2
    one, two = ([line["loss"] for line in metrics(tmp_path / name)] for name in ways)
    assert one.pop(1) is two.pop(1) is None
    assert two == pytest.approx(one, rel=1e-5)
    one, two = (summary(tmp_path / name)["best_eval_loss"] for name in ways)
    assert two == pytest.approx(one, rel=1e-5)


@needs_deepspeed
@pytest.mark.slow
def test_bf16_weights_take_steps_that_are_smaller_than_their_rounding(tmp_path: Path) -> None:
    # The last norm's weights lie around 2, below which bfloat16's numbers are 0.0078 apart: a step of 0.002
    # leaves them where they are, four move them, if what was rounded off is kept.
    flags = [*SETTINGS, *ADAMW, "--learning_rate", "2e-3", "--weight_decay", "0", "-b", "1"]
    flags += ["--lr_scheduler_type", "constant", "--compute_dtype", "bf16", "--checkpointing", "full"]
    moved = {}
    for way in ("zero3", "fsdp"):
        train(tmp_path / way, *flags, "--sharding", way, gpus=2)
        name = "transformer.ln_f.weight"
        before, after = load_file(tiny_path() / "model.safetensors")[name], weights(tmp_path / way)[name]
        assert before.dtype == after.dtype == torch.bfloat16
        moved[way] = (after != before).float().mean()
    assert moved["fsdp"] == 0
    assert moved["zero3"] > 0.2


@needs_deepspeed
@pytest.mark.slow
def test_a_signal_ends_the_run_with_its_weights(tmp_path: Path) -> None:
    faults = [{"do": "signal", "step": 1, "rank": 0, "to": "launcher", "number": signal.SIGTERM}]
    words = ("-b", "1", "--sharding", "zero3", "--gpus", "2")
    _, errors = run_faulty(tmp_path, "run", *words, faults=faults, status=2)
    stopped = re.search(r"error: stopped at step [123] of 4\. (\S+) is weights only", errors)
    assert stopped is not None, errors
    assert load_file(tmp_path / stopped[1] / "model.safetensors")
    again = ("--report_to", "none", "--output_dir", tmp_path / "run", "--resume")
    refused = command("train", *SETTINGS, *words, *again)
    assert refused.returncode == 2
    assert "without the optimizer's state" in refused.stderr


@needs_deepspeed
@pytest.mark.slow
def test_a_checkpoint_of_another_way_is_refused(tmp_path: Path) -> None:
    train(tmp_path / "run", *SETTINGS, "-b", "1", "--sharding", "none", gpus=2)
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    words = ["-b", "1", "--sharding", "zero3", "--gpus", "2", "--report_to", "none", "--resume", checkpoint]
    refused = command("train", *SETTINGS, *words, "--output_dir", tmp_path / "run")
    assert refused.returncode == 2
    assert "checkpoints of --sharding zero3 hold the weights" in refused.stderr


def test_without_deepspeed_it_is_said_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(UserError, match=r"pip install 'falcon-qlora\[deepspeed\]'"):
        zero3.check_installed()


@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is not None, reason="DeepSpeed is installed")
@pytest.mark.slow
def test_the_command_line_says_so_before_it_writes(tmp_path: Path) -> None:
    words = [*SETTINGS, "-b", "1", "--sharding", "zero3", "--gpus", "2", "--report_to", "none"]
    result = command("train", *words, "--output_dir", tmp_path / "run")
    assert result.returncode == 2
    assert "falcon-qlora[deepspeed]" in result.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--sharding zero3 is for --method full"),
        (["--method", "full"], "there is only one"),
    ],
)
def test_it_needs_several_processes_and_all_weights_trained(flags: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        shard_if_wanted(parse(["-m", "tiny", "--sharding", "zero3", "--report_to", "none", *flags]), tiny())


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--norms_in_float32", "one dtype"),
        ("--generate_samples 2", "while the model is sharded"),
        ("--optim adamw_bnb_8bit", "give --optim adamw_torch_fused"),
    ],
)
def test_what_it_cannot_do_is_refused(monkeypatch: pytest.MonkeyPatch, flag: str, message: str) -> None:
    words = f"-m tiny --method full --sharding zero3 --eval_split 0.05 --report_to none {flag}".split()
    monkeypatch.setattr(ranks, "world_size", lambda: 2)
    with pytest.raises(UserError, match=message):
        shard_if_wanted(parse(words), tiny())


def tiny() -> nn.Module:
    return load_model("tiny", quantize_mode="16bit", compute_dtype="fp32")
