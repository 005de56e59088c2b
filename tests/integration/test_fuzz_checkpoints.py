"""Checkpoints changed at random: `--resume` goes on as the run would have, or refuses in one line.

Their manifests are true of what lies there, so that what reads the files is reached and not their checksums
alone. Which file is changed by which test: `tests/integration/test_fuzz_every_file.py`.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import falcon_qlora
from falcon_qlora.checkpoint.manifest import describe_file
from falcon_qlora.config.configuration import parse
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training import resume, same_run
from falcon_qlora.training.trainer import FalconTrainer
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused
from tests.integration.conftest import STEP

ADAPTER = ["adapter_model.safetensors", "adapter_config.json", "falcon_qlora.json"]
TORCH = ["processes.pt", "optimizer.pt", "scheduler.pt"]
FILES = ["manifest.json", "trainer_state.json", "stream.json.gz", *TORCH, *ADAPTER]
OF_THE_RUN = ["config.yaml", "metrics.jsonl", "samples.jsonl", "trackers.json", "data.json", "summary.json"]
# What is said of a run's settings names the setting.
ABOUT = ("--", "unknown recipe", "ybelkada/")  # the default model, where a run names none
PARTS = ["optimizer-00001-of-00002.pt", "optimizer-00002-of-00002.pt"]


def checkpoint_of(run: Path) -> Path:
    return run / "checkpoints" / f"step-{STEP}"


def with_true_manifest(checkpoint: Path) -> None:
    """Let the manifest say what lies there now."""
    file = checkpoint / "manifest.json"
    manifest = json.loads(file.read_text())
    for name in manifest["files"]:
        path = checkpoint / name
        if path.is_file() and path.stat().st_size < 2**28:
            manifest["files"][name] = describe_file(path)
    file.write_text(json.dumps(manifest))


def go_on(run: Path) -> Path:
    return falcon_qlora.train(resume=run, max_steps=STEP + 1, hang_minutes=0)


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.slow
@fuzz(2)
@given(
    data=st.data(),
    name=st.sampled_from([*FILES, *OF_THE_RUN, "model.safetensors"]),
    kind=st.sampled_from(["run", "streamed", "full"]),
)
def test_resume(written, scratch, data, name, kind):
    run = fresh_copy(written / kind, scratch)
    file = (run if name in OF_THE_RUN else checkpoint_of(run)) / name
    if not file.exists():
        return
    change(data.draw, file)
    if name not in OF_THE_RUN and name != "manifest.json":
        with_true_manifest(checkpoint_of(run))
    read_or_refused(run, lambda: go_on(run), or_about=ABOUT)


@fuzz(20)
@given(data=st.data(), name=st.sampled_from(["manifest.json", "trainer_state.json", "config.yaml"]))
def test_before_anything_is_loaded(written, scratch, data, name):
    run = fresh_copy(written / "streamed", scratch)
    unchanged = json.loads((checkpoint_of(run) / "manifest.json").read_text())
    file = run / name if name == "config.yaml" else checkpoint_of(run) / name
    change(data.draw, file)
    if name == "trainer_state.json":
        with_true_manifest(checkpoint_of(run))

    def begin() -> Any:
        configuration = parse(["--resume", str(run), "--report_to", "none"])
        checkpoint = resume.checkpoint_to_resume(RunDirectory(run), resume=str(run), overwrite=False)
        if checkpoint is not None:
            same_run.adopt(configuration, checkpoint)
        return configuration

    configuration = read_or_refused(run, begin, or_about=ABOUT)
    if configuration is not None and name == "manifest.json":
        # What a manifest decides is as it was.
        assert configuration.run.global_batch_size == unchanged["global_batch"]


@pytest.fixture(scope="module")
def trainer(written: Path, tmp_path_factory: pytest.TempPathFactory) -> FalconTrainer:
    """As `--resume` makes it, after a whole run: it takes up one checkpoint after another."""
    run = shutil.copytree(written / "streamed", tmp_path_factory.mktemp("trainer") / "run")
    caught: list[FalconTrainer] = []
    train = FalconTrainer.train

    def caught_and_trained(self: FalconTrainer, *args: Any, **kwargs: Any) -> Any:
        caught.append(self)
        return train(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FalconTrainer, "train", caught_and_trained)
        go_on(run)
    return caught[0]


def take_up(trainer: FalconTrainer, checkpoint: Path) -> bool:
    """What Transformers' loop does with a checkpoint up to the first step, and then a step."""
    resume._refuse_if_not_whole(checkpoint)
    trainer._load_from_checkpoint(str(checkpoint))
    trainer._init_training_state(STEP + 1, STEP + 1, 1, str(checkpoint), None)
    trainer._load_optimizer_and_scheduler(str(checkpoint))
    trainer._load_scaler(str(checkpoint))
    trainer.before_training()
    [share], _ = trainer.get_batch_samples(
        iter(each for each in trainer.steps if each), 1, trainer.args.device
    )
    assert share.step == STEP
    for parameter in trainer.model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    trainer.optimizer.step()
    trainer.lr_scheduler.step()
    trainer.store_flos()
    trainer.meter.interval()
    trainer.step.finish(STEP + 1)
    return True


def settings_of(trainer: FalconTrainer) -> list[dict[str, Any]]:
    groups = trainer.optimizer.param_groups
    left_out = ("params", "foreach", "fused", "capturable", "amsgrad", "maximize", "differentiable")
    return [{name: value for name, value in group.items() if name not in left_out} for group in groups]


def in_parts(checkpoint: Path) -> None:
    """Let the optimizer be saved as two processes save a sharded model's."""
    whole = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    for index, name in enumerate(PARTS):
        state = {
            number: {
                key: value.chunk(2)[index].clone() if value.dim() else value for key, value in of.items()
            }
            for number, of in whole["state"].items()
        }
        torch.save({**whole, "state": state}, checkpoint / name)
        manifest["files"][name] = describe_file(checkpoint / name)
    del manifest["files"]["optimizer.pt"]
    (checkpoint / "optimizer.pt").unlink()
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


@fuzz(25)
@given(data=st.data(), name=st.sampled_from([*FILES[1:], *TORCH, *PARTS, "scaler.pt", None]))
def test_what_is_taken_up(written, scratch, trainer, data, name):
    run = fresh_copy(written / "streamed", scratch)
    checkpoint = checkpoint_of(run)
    if name in PARTS:
        in_parts(checkpoint)
    scaler = torch.amp.GradScaler("cpu") if name == "scaler.pt" else None
    if scaler is not None:
        torch.save(scaler.state_dict(), checkpoint / name)
    if name is not None:
        change(data.draw, checkpoint / name)
    with_true_manifest(checkpoint)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer.accelerator, "scaler", scaler)
        found = read_or_refused(run, lambda: take_up(trainer, checkpoint))
    assert found or name is not None
    if not found:
        return
    # What decides the steps to come is the run's, and not the files'.
    for group in settings_of(trainer):
        assert (group["initial_lr"], group["betas"], group["eps"]) == (2e-4, (0.9, 0.999), 1e-8)
        assert group["weight_decay"] == 0.0
    assert trainer.lr_scheduler.base_lrs == [2e-4] * 2
    assert trainer.state.best_model_checkpoint is None
    assert all(bool(each.isfinite().all()) for each in trainer.model.parameters() if each.requires_grad) or (
        name == "adapter_model.safetensors"
    )


@pytest.mark.parametrize("name", TORCH)
def test_each_value_of_the_torch_files_matters(written, tmp_path, trainer, name):
    """One after the other they are left out, where a random choice would seldom come."""
    run = fresh_copy(written / "streamed", tmp_path)
    checkpoint = checkpoint_of(run)
    content = torch.load(checkpoint / name, weights_only=True)
    inner = content[0] if name == "processes.pt" else content
    for key in list(inner):
        left_out = {other: value for other, value in inner.items() if other != key}
        torch.save([left_out] if name == "processes.pt" else left_out, checkpoint / name)
        with_true_manifest(checkpoint)
        taken = read_or_refused(run, lambda: take_up(trainer, checkpoint))
        # What PyTorch has come to write of late is not asked for.
        assert not taken or key.startswith("_"), key


@pytest.mark.parametrize(
    "name", ["step", "processes", "global_batch", "data_fingerprint", "resumable", "settings"]
)
def test_each_value_of_the_manifest_matters(written, tmp_path, name):
    run = fresh_copy(written / "run", tmp_path)
    file = checkpoint_of(run) / "manifest.json"
    manifest = json.loads(file.read_text())
    others = {"data_fingerprint": "0" * 64, "resumable": False, "settings": {"seed": 99}}
    manifest[name] = others[name] if name in others else manifest[name] + 1
    file.write_text(json.dumps(manifest))
    assert read_or_refused(run, lambda: go_on(run), or_about=ABOUT) is None
