"""Every method through the real command: it learns, is saved, resumes and answers."""

from __future__ import annotations

import json
import re
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.commands import generate, params
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.sample_data import path as sample_rows
from falcon_qlora.methods.table import METHODS
from falcon_qlora.run_folder import tracking
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training import build as builder
from falcon_qlora.training import rows
from falcon_qlora.training.batch_tokens import Cut, Cutter
from tests.integration.runs import command, metrics, summary, train
from tests.integration.test_adapter import fine_tune
from tests.layouts import trainable_names

# Two processes, and a quantized base where the method has one.
RUNS = {
    "lora": ["--lora_slices", "query", "value", "-q", "8bit", "--lora_r", "8", "--learning_rate", "2e-2"],
    "adapter": ["-q", "4bit", "--learning_rate", "1e-1"],
    "adapter_v2": ["-q", "4bit", "--gpus", "2", "--learning_rate", "3e-3"],
    "full": ["--learning_rate", "1e-4"],
}


# Other tests of the fast set train LoRA and Adapters.
SLOW = [pytest.param(method, marks=pytest.mark.slow) for method in ("lora", "adapter", "adapter_v2")]


@pytest.mark.parametrize("method", [*SLOW, "full"])
def test_it_learns_and_its_folder_answers(
    method: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-m", "tiny", "--method", method, *RUNS[method]]
    settings = "--max_length 64 --global_batch_size 8 -b 4 --steps 8 --eval_steps 4 --save_strategy no"
    settings += (
        f" --load_best_model_at_end false --eval_split 0.05 --max_rows 160 --dataset_name {sample_rows()}"
    )
    lines = train(tmp_path / "run", *flags, *settings.split())
    losses = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert len(losses) == 2
    assert losses[-1] < 0.9 * losses[0]
    record = summary(tmp_path / "run")
    assert record["world_size"] == (2 if "--gpus" in flags else 1)
    assert params.main([*flags, *settings.split()]) == 0
    told = capsys.readouterr().out.splitlines()[-1]
    assert told == f"trainable_parameters={record['trainable_parameters']}"

    folder = tmp_path / "run" / "adapter"
    about = json.loads((folder / "falcon_qlora.json").read_text())
    assert (about["method"], about["base_model"]) == (method, "tiny")
    assert (folder / "adapter_config.json").is_file() == (method != "full")
    assert method in (folder / "README.md").read_text()
    asked = ["--adapter", str(tmp_path / "run"), "--prompt", "What is the opposite of cold?"]
    assert generate.main([*asked, "--max_new_tokens", "8"]) == 0
    answer = capsys.readouterr().out.strip()
    assert answer
    check_the_offline_commands(tmp_path / "run", method, losses[-1], capsys)
    if method == "full":
        with pytest.raises(UserError, match="its base is not in it"):
            generate.main([*asked, "--compare"])
        return
    assert generate.main([*asked, "--max_new_tokens", "8", "--compare"]) == 0
    of_base, of_adapter = capsys.readouterr().out.split("base:")[1].split("adapter:")
    assert of_adapter.strip() == answer
    assert of_base.strip() != answer


def check_the_offline_commands(
    run: Path, method: str, eval_loss: float, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was trained is whole, measured as the run measured it, and merged where that can be."""
    assert cli.main(["inspect", str(run)]) == 0
    assert "adapter: whole" in capsys.readouterr().out
    assert cli.main(["inspect", str(run / "adapter")]) == 0
    assert METHODS[method].title.split()[0].lower() in capsys.readouterr().out.lower()
    results = run.parent / "figures.json"
    assert cli.main(["eval", "--adapter", str(run), "--results", str(results)]) == 0
    assert json.loads(results.read_text())["answer_loss"] == pytest.approx(eval_loss, rel=1e-5)
    capsys.readouterr()
    words = ["--adapter", str(run), "--out", str(run.parent / "merged"), "--max_kl_divergence", "1"]
    status = cli.main(["merge", *words, "--max_loss_increase", "1"])
    why_not = METHODS[method].why_not_merged
    assert status == (0 if why_not is None else 2)
    told = capsys.readouterr().err
    if why_not is not None:
        assert f"cannot be merged: {why_not}. Use it as it is: falcon-qlora generate and " in told
    assert (run.parent / "merged").exists() == (why_not is None)


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_slices": ["query", "value"], "lora_r": 4, "quantize_mode": "4bit"},
        pytest.param({"method": "adapter_v2", "quantize_mode": "4bit"}, marks=pytest.mark.slow),
        {"method": "full"},
    ],
)
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, settings: dict[str, object]) -> None:
    settings = {"max_steps": 3, "save_steps": 2, "logging_steps": 1, **settings}
    whole = fine_tune(tmp_path, **settings)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    shutil.rmtree(stopped / "checkpoints" / "step-3")
    shutil.rmtree(stopped / "adapter")
    resumed = fine_tune(tmp_path, **settings, output_dir=stopped, resume="latest")
    expected, lines = (
        [(line["loss"], line["grad_norm"]) for line in metrics(run)] for run in (whole, resumed)
    )
    assert lines == expected
    file = "model.safetensors" if settings.get("method") == "full" else "adapter_model.safetensors"
    first, second = (load_file(run / "adapter" / file) for run in (whole, resumed))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "compute_dtype", "allowed"), [("adapter_v2", "fp32", 1e-4), ("full", "fp32", 1e-4)]
)
def test_two_processes_give_the_losses_of_one(
    method: str, compute_dtype: str, allowed: float, tmp_path: Path
) -> None:
    settings = f"-m tiny -q 16bit --compute_dtype {compute_dtype} --norms_in_float32 true --max_length 128"
    settings += " --logging_steps 1 --steps 4 --optim sgd"
    settings += " --learning_rate 0.1 --max_grad_norm 1.0 --warmup_steps 0 --save_strategy no"
    settings += f" --global_batch_size 8 --method {method} --dataset_name {sample_rows()} --max_rows 200"
    alone = train(tmp_path / "alone", *settings.split(), "-b", "4")
    pair = train(tmp_path / "pair", *settings.split(), "-b", "1", gpus=2)
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=allowed)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=10 * allowed)


def test_params_counts_falcon_7b_with_the_output_head_apart_as_published(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert params.main(["-m", "random:falcon-7b", "--recipe", "lit-adapter"]) == 0
    table = [re.split(r"\s*[│|]\s*", line.strip()) for line in capsys.readouterr().out.splitlines()]
    assert ["with the output head counted apart", "7,217,189,760"] in table
    assert ["trained", "1,365,330"] in table


def test_no_weight_decay_acts_on_the_scales_biases_and_norms_of_adapter_v2(tmp_path: Path) -> None:
    words = (
        f"--recipe lit-adapter-v2 -m tiny --compute_dtype fp32 --dataset_name {sample_rows()} --max_rows 40"
    )
    configuration = parse([*words.split(), "--eval_split", "0.1", "--steps", "2", "--report_to", "none"])
    assert configuration.training.weight_decay == 0.02
    tokenizer = rows.load_tokenizer(configuration.model)
    trainer = builder.build_trainer(
        configuration.training,
        configuration.run,
        RunDirectory(tmp_path),
        max_length=configuration.data.max_length,
        tokenizer=tokenizer,
        data=rows.training_data(configuration.data, configuration.run, tokenizer),
        model=builder.model_with_adapter(
            configuration.model, configuration.method, tokenizer, seed=configuration.run.seed
        ),
        trackers=tracking.choose(["none"]),
        describe_adapter=lambda folder: None,
        settings={},
        began=time.time(),
        cutter=Cutter(cut=Cut(tokens=2048, part=2048, micro_batches=1, why="")),
    )
    trainer.create_optimizer()
    assert trainer.optimizer is not None
    name_of = {parameter: name for name, parameter in trainer.model.named_parameters()}
    decay_of = {
        name_of[parameter]: group["weight_decay"]
        for group in trainer.optimizer.param_groups
        for parameter in group["params"]
    }
    assert decay_of.keys() == set(trainable_names(trainer.model))
    decayed = {name.rpartition(".")[2] for name, decay in decay_of.items() if decay}
    # What is left has the recipe's: prefixes, and gates, which it draws to where they started.
    assert decayed == {"prefix", "gate"}
    kinds = ("scale_and_bias.scale", "scale_and_bias.bias", "layernorm.weight", "ln_f.weight", "ln_f.bias")
    for kind in kinds:
        assert {decay for name, decay in decay_of.items() if name.endswith(kind)} == {0.0}, kind


def test_every_weight_of_a_quantized_base_is_refused(tmp_path: Path) -> None:
    result = command(
        "train", "-m", "tiny", "--method", "full", "-q", "4bit", "--output_dir", tmp_path / "run"
    )
    assert result.returncode == 2
    assert "quantized weights cannot take a step" in result.stderr
    with pytest.raises(UserError, match="--lora_r does nothing with --method adapter"):
        falcon_qlora.train(model_name_or_path="tiny", method="adapter", lora_r=8)
