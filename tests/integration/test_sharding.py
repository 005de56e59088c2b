"""Full fine-tuning whose weights, gradients and optimizer are shared out over processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from falcon_qlora.checkpoint import manifest
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.sample_data import path as sample_rows
from falcon_qlora.models import sharded
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training import same_run, sharding
from tests.integration.interrupted import assert_same_run
from tests.integration.runs import command, train

SETTINGS = (
    f"-m tiny --method full -q 16bit --compute_dtype fp32 --max_length 128 --steps 4 --logging_steps 1 "
    f"--optim sgd --learning_rate 0.05 --max_grad_norm 1.0 --warmup_steps 0 --global_batch_size 7 "
    f"--packing false --dataset_name {sample_rows()} --max_rows 200 --eval_split 0.05 --eval_steps 2 "
    "--save_steps 2"
).split()


@pytest.mark.slow
def test_a_sharded_run_goes_on_to_the_last_bit_from_before_a_torn_part(tmp_path: Path) -> None:
    words = (
        "-m tiny --method full --sharding fsdp --max_length 64 -b 1 --global_batch_size 4 --steps 4 "
        f"--save_steps 2 --warmup_steps 2 --logging_steps 1 --learning_rate 1e-3 --max_rows 40 "
        f"--dataset_name {sample_rows()}"
    ).split()
    run = tmp_path / "run"
    train(run, *words, gpus=2)
    whole = run.rename(tmp_path / "whole")
    shutil.copytree(whole, run)
    shutil.rmtree(run / "adapter")
    newest = run / "checkpoints/step-4"
    parts = sorted(newest.glob("optimizer*"))
    assert [part.name for part in parts] == [f"optimizer-0000{n}-of-00002.pt" for n in (1, 2)]
    # AdamW's two float32 states a weight: half of them in each part.
    weights = (newest / "model.safetensors").stat().st_size
    assert [part.stat().st_size for part in parts] == [pytest.approx(weights, rel=0.02)] * 2
    parts[1].write_bytes(parts[1].read_bytes()[:-1000])
    # What the method is, its own settings say.
    result = command("train", "--resume", run, "--sharding", "fsdp", "--gpus", "2")
    assert (result.returncode, result.stderr) == (0, "")
    assert "step-4 is skipped: optimizer-00002-of-00002.pt has" in result.stdout
    assert "going on from step 2" in result.stdout
    assert_same_run(run, whole)


@pytest.mark.slow
def test_two_processes_with_half_of_the_model_each_train_what_one_does(tmp_path: Path) -> None:
    # 7 documents, one at a time: 4 forwards on one process and 3 on the other, and each takes both. SGD, as
    # it is not blind to the gradients' size.
    alone = train(tmp_path / "alone", *SETTINGS, "-b", "3")
    pair = train(tmp_path / "pair", *SETTINGS, "-b", "1", "--sharding", "fsdp", gpus=2)
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert two.get("eval_loss", 0) == pytest.approx(one.get("eval_loss", 0), rel=1e-4)
    assert alone[-1]["eval_loss"] < 0.9 * alone[1]["eval_loss"]
    first, second = (load_file(tmp_path / run / "adapter" / "model.safetensors") for run in ("alone", "pair"))
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-5)
    # Transformers itself opens it, and it is not what training began with.
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "pair" / "adapter", dtype=torch.float32)
    before = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    assert all(not torch.equal(a, b) for a, b in zip(opened.parameters(), before.parameters(), strict=True))
    assert opened.lm_head.weight is opened.transformer.word_embeddings.weight
    assert (tmp_path / "pair" / "checkpoints" / "step-4" / "model.safetensors").exists()


def test_a_large_model_is_written_file_by_file(tmp_path: Path) -> None:
    model = load_model("tiny", quantize_mode="16bit", compute_dtype="fp32")
    sharded.save_whole(model, tmp_path, file_bytes=4_000_000)
    files = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(files) > 3
    assert files[0] == f"model-00001-of-{len(files):05}.safetensors"
    for file in files:
        assert len(load_file(tmp_path / file)) == 1 or (tmp_path / file).stat().st_size < 4_100_000
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"].values()) == set(files)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    for name, tensor in model.state_dict().items():
        assert torch.equal(opened.state_dict()[name], tensor), name


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--use_dora", "--gpus", "2"], "--sharding fsdp: DoRA reads every weight of the base before the"),
        (["--sharding", "zero3", "--gpus", "2"], "--sharding zero3 is for --method full: --sharding fsdp"),
        (["--method", "full", "--gpus", "1"], "there is only one"),
        (["--method", "full", "--gpus", "2", "--optim", "adamw_bnb_8bit"], "give --optim adamw_torch_fused"),
    ],
)
@pytest.mark.slow
def test_what_cannot_be_sharded_is_refused(tmp_path: Path, flags: list[str], message: str) -> None:
    words = f"-m tiny --sharding fsdp --dataset_name {sample_rows()} --max_rows 20 --report_to none".split()
    result = command("train", *words, *flags, "--output_dir", tmp_path / "run")
    assert result.returncode == 2
    assert message in result.stderr
    assert not (tmp_path / "run").exists()


def test_a_recipes_optimizer_gives_way_where_a_replica_does_not_fit_and_a_named_one_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["--recipe", "lit-full", "-m", "tiny", "--compute_dtype", "fp32", "--report_to", "none"]
    model = load_model("tiny", quantize_mode="16bit", compute_dtype="fp32")
    # As `auto` finds where the machine's GPUs are too small.
    monkeypatch.setattr(sharding, "_wanted", lambda *_: True)
    monkeypatch.setattr(sharded, "shard", lambda *_: None)
    configuration = parse(words)
    told = sharding.shard_if_wanted(configuration, model)
    assert "adamw_bnb_8bit does not work on a sharded model: adamw_torch_fused takes its place" in told[1]
    assert configuration.optimizer == configuration.resolved()["optim"] == "adamw_torch_fused"
    assert configuration.training.optim is type(parse(words).training.optim).ADAMW_TORCH_FUSED
    settings = tmp_path / "settings.yaml"
    settings.write_text("optim: adamw_bnb_8bit\n")
    for named in (["--optim", "adamw_bnb_8bit"], ["--config", str(settings)]):
        with pytest.raises(UserError, match="give --optim adamw_torch_fused"):
            sharding.shard_if_wanted(parse([*words, *named]), model)


def test_a_run_that_took_another_optimizer_than_its_recipes_goes_on_with_it(tmp_path: Path) -> None:
    # As torchrun starts its processes again: by the words that the run began with.
    words = ["--recipe", "lit-full", "-m", "tiny", "--compute_dtype", "fp32", "--report_to", "none"]
    configuration = parse([*words, "--optim", "adamw_torch_fused"])
    RunDirectory(tmp_path).write_config(configuration.resolved())
    checkpoint = tmp_path / "checkpoints" / "step-1"
    checkpoint.mkdir(parents=True)
    batch = configuration.run.global_batch_size
    manifest.write_manifest(checkpoint, {"global_batch": batch, "processes": 1})
    going_on = parse(words)
    same_run.adopt(going_on, str(checkpoint))
    assert going_on.optimizer == "adamw_torch_fused"
    with pytest.raises(UserError, match="optim was adamw_torch_fused"):
        same_run.adopt(parse([*words, "--optim", "adamw_bnb_8bit"]), str(checkpoint))
