"""Every file of a run directory: whole or not there, in the documented form; others' are refused."""

from __future__ import annotations

import datetime
import errno
import json
import os
import shlex
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import save_file

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import replaced, replaced_folder, write_json
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config.arguments import our_settings
from falcon_qlora.config.trainer_arguments import TrainerArguments
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.lora import Lora
from falcon_qlora.run_folder.choose import choose
from falcon_qlora.run_folder.directory import METRICS_FIELDS, RunDirectory
from falcon_qlora.run_folder.environment import collect_environment, without_secrets
from falcon_qlora.run_folder.model_card import ModelCard
from falcon_qlora.run_folder.summary import Summary

NOON = datetime.datetime(2026, 1, 2, 12, 0, 0)
SUMMARY = Summary(
    steps=20,
    first_loss=3.0,
    final_loss=1.5,
    train_seconds=12.5,
    tokens_per_second=1000.0,
    samples_per_second_512=1.95,
    peak_memory_gib=0.5,
    trainable_parameters=10,
    total_parameters=100,
    quantized_linears=8,
    world_size=2,
)


def _choose(output_dir: Path | None, root: Path, **options: object) -> Path:
    return choose(output_dir, model="org/falcon-7b", settings="4bit lora64", root=root, now=NOON, **options)


def _holding_run(path: Path) -> RunDirectory:
    directory = RunDirectory(path)
    directory.write_config({"seed": 1})
    directory.append_metrics(1, {"loss": 2.0})
    return directory


def test_a_fresh_folder_is_named_by_date_model_and_settings(tmp_path: Path) -> None:
    assert _choose(None, tmp_path) == tmp_path / "20260102-120000-falcon-7b-4bit-lora64"


def test_two_runs_of_one_second_get_two_folders(tmp_path: Path) -> None:
    assert _choose(None, tmp_path) != _choose(None, tmp_path)


def test_a_restart_by_torchrun_finds_its_unnamed_folder_again(tmp_path: Path) -> None:
    first = _choose(None, tmp_path)
    _holding_run(first)
    assert _choose(None, tmp_path, restarted=True) == first


def test_another_launch_does_not_take_an_unnamed_folder(tmp_path: Path) -> None:
    first = _choose(None, tmp_path)
    (first / ".launcher").write_text("elsewhere 1")
    assert _choose(None, tmp_path, restarted=True) != first


def test_a_named_folder_that_holds_a_run_is_refused(tmp_path: Path) -> None:
    _holding_run(tmp_path / "mine")
    with pytest.raises(UserError, match=r"mine.*holds a run.*--resume.*--overwrite"):
        _choose(tmp_path / "mine", tmp_path)


@pytest.mark.parametrize(
    "option", [{"resume": "latest"}, {"resume": "auto"}, {"overwrite": True}, {"restarted": True}]
)
def test_a_named_folder_that_holds_a_run_is_taken_when_asked(tmp_path: Path, option: dict[str, Any]) -> None:
    _holding_run(tmp_path / "mine")
    assert _choose(tmp_path / "mine", tmp_path, **option) == tmp_path / "mine"
    assert (tmp_path / "mine/config.yaml").exists(), "nothing is removed before the run starts"


def test_a_named_folder_with_other_files_is_taken(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert _choose(tmp_path, tmp_path) == tmp_path


def test_a_file_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="this is a file"):
        _choose(tmp_path / "file", tmp_path)


def test_an_address_is_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ftp://bucket/run: of addresses only s3:// and gs:// are supported"):
        choose("ftp://bucket/run", model="tiny", settings="4bit", root=tmp_path)


@pytest.mark.parametrize("name", ["checkpoints/foreign/x.bin", "adapter/other.bin", "metrics.jsonl"])
def test_what_is_no_run_is_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="there is no run, but things with the names of a run's"):
        _choose(tmp_path, tmp_path, overwrite=True)
    _holding_run(tmp_path)
    assert _choose(tmp_path, tmp_path, overwrite=True) == tmp_path


@pytest.mark.parametrize("name", ["s3:/bucket/run", "gs:/run"])
def test_an_address_that_lacks_a_slash_is_no_folder(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"an address has two slashes: (s3|gs)://"):
        choose(name, model="tiny", settings="4bit", root=tmp_path)


def test_resume_takes_a_run_or_one_of_its_checkpoints(tmp_path: Path) -> None:
    directory = _holding_run(tmp_path / "mine")
    (directory.checkpoints / "step-10").mkdir(parents=True)
    assert _choose(None, tmp_path, resume=directory.path) == directory.path
    assert _choose(None, tmp_path, resume=str(directory.checkpoints / "step-10")) == directory.path


def test_resume_of_a_run_in_the_folder_of_another_is_refused(tmp_path: Path, monkeypatch: Any) -> None:
    directory, other = _holding_run(tmp_path / "mine"), _holding_run(tmp_path / "other")
    (directory.checkpoints / "step-10").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for resume in (directory.path, (directory.checkpoints / "step-10")):
        assert _choose(Path("mine"), tmp_path, resume=resume) == Path("mine")
        for elsewhere in (other.path, tmp_path / "new"):
            with pytest.raises(UserError, match=r"its own folder, .*mine, and --output_dir .*leave"):
                _choose(elsewhere, tmp_path, resume=resume)
    assert not (tmp_path / "new").exists()


def test_resume_of_nothing_is_an_error_and_names_the_newest_run(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no run there"):
        _choose(None, tmp_path, resume=tmp_path / "empty")
    _holding_run(tmp_path / "newest")
    with pytest.raises(UserError, match="newest"):
        _choose(None, tmp_path, resume="latest")
    with pytest.raises(
        UserError, match=rf"newst: there is no such folder \(did you mean {tmp_path}/newest\?"
    ):
        _choose(tmp_path / "newst", tmp_path, resume="latest")
    with pytest.raises(
        UserError, match=rf"newst: there is no such folder \(did you mean {tmp_path}/newest\?"
    ):
        _choose(None, tmp_path, resume=tmp_path / "newst")
    assert not (tmp_path / "newst").exists()


def test_overwrite_removes_the_run_and_nothing_else(tmp_path: Path) -> None:
    directory = _holding_run(tmp_path)
    (directory.checkpoints / "step-3").mkdir(parents=True)
    (tmp_path / "notes.txt").write_text("mine")
    directory.clear()
    assert [entry.name for entry in tmp_path.iterdir()] == ["notes.txt"]


def test_overwrite_keeps_what_the_new_run_has_written_already(tmp_path: Path) -> None:
    directory = _holding_run(tmp_path)
    directory.write_tracker_record("wandb", {"id": "new"})
    directory.clear(keep=("trackers.json", "wandb"))
    assert [entry.name for entry in tmp_path.iterdir()] == ["trackers.json"]


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_can_be_checked_without_being_made(tmp_path: Path, named: bool) -> None:
    path = _choose(tmp_path / "a/b" if named else None, tmp_path / "runs", make=False)
    assert list(tmp_path.iterdir()) == []
    assert _choose(tmp_path / "a/b" if named else None, tmp_path / "runs") == path
    assert path.is_dir()


def test_a_folder_below_a_file_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match=r"cannot write there \(.*\); name another folder"):
        _choose(tmp_path / "file/run", tmp_path, make=False)


def test_a_fresh_folder_of_a_run_that_never_started_goes(tmp_path: Path) -> None:
    fresh = RunDirectory(_choose(None, tmp_path))
    fresh.remove_if_empty()
    assert not fresh.path.exists()
    used = _holding_run(tmp_path / "used")
    used.remove_if_empty()
    assert used.path.exists()


def test_config_is_yaml_that_reads_back_equal(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path / "rün a b")
    resolved = {"seed": 1, "learning_rate": 2e-4, "dataset_name": ["a", "b"], "bf16": True, "warmup": None}
    directory.write_config(resolved)
    assert directory.read_config() == resolved
    assert yaml.safe_load(directory.config_file.read_text()) == {"format": 2, **resolved}
    first, _, command = directory.config_file.read_text().splitlines()[0].partition("falcon-qlora ")
    assert first == "# Run again:  "
    assert shlex.split(command)[:3] == ["train", "--config", str(directory.config_file)]


def test_summary_has_the_documented_fields(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write("summary", vars(SUMMARY))
    documented = {
        "steps",
        "first_loss",
        "final_loss",
        "train_seconds",
        "tokens_per_second",
        "samples_per_second_512",
        "peak_memory_gib",
        "trainable_parameters",
        "total_parameters",
        "quantized_linears",
        "world_size",
    }
    assert documented <= directory.read("summary").keys()


RECORDS = ("summary", "environment", "kernels")


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_tells_its_form_and_a_later_one_is_refused(tmp_path: Path, name: str) -> None:
    directory, file = RunDirectory(tmp_path), tmp_path / f"{name}.json"
    directory.write(name, {"steps": 3})
    assert json.loads(file.read_text()) == {"format": 1, "steps": 3}
    assert directory.read(name) == {"steps": 3}
    write_json(file, {"steps": 3})  # as releases before wrote it
    assert directory.read(name) == {"steps": 3}
    write_json(file, {"format": 2, "steps": 3})
    with pytest.raises(UserError, match=rf"{name}\.json: format 2 is newer than this falcon_qlora reads"):
        directory.read(name)


def test_metrics_are_one_line_a_log_step_with_the_documented_fields(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.append_metrics(1, dict.fromkeys(METRICS_FIELDS, 1.0) | {"other": 5})
    directory.append_metrics(2, {"train_runtime": 3.0})
    directory.append_metrics(2, {"eval_loss": np.float32(0.5), "epoch": 0.5})
    lines = directory.metrics_file.read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2]
    assert set(json.loads(lines[0])) == set(METRICS_FIELDS)
    assert json.loads(lines[1]) == {"step": 2, "epoch": 0.5, "eval_loss": 0.5}


def test_a_loss_that_is_not_finite_is_written_as_null(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.append_metrics(1, {"loss": float("nan"), "grad_norm": torch.tensor(2.0)})
    assert directory.read_metrics() == [{"step": 1, "loss": None, "grad_norm": 2.0}]


def test_a_line_cut_short_by_a_crash_is_left_out_and_mended_on_resume(tmp_path: Path) -> None:
    directory = _holding_run(tmp_path)
    directory.append_metrics(2, {"loss": 1.9})
    with directory.metrics_file.open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in directory.read_metrics()] == [1, 2]
    directory.drop_metrics_after(1)
    directory.append_metrics(2, {"loss": 1.8})
    assert directory.read_metrics() == [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.8}]


def test_a_write_that_fails_leaves_the_earlier_file(tmp_path: Path) -> None:
    file = tmp_path / "summary.json"
    write_json(file, {"steps": 1})
    with pytest.raises(RuntimeError, match="stopped"), replaced(file) as temporary:
        temporary.write_text("half")
        raise RuntimeError("stopped")
    assert json.loads(file.read_text()) == {"steps": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["summary.json"]


def test_a_folder_replaces_another_only_when_it_is_whole(tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    with replaced_folder(adapter) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(RuntimeError, match="stopped"), replaced_folder(adapter) as folder:
        (folder / "weights").write_text("half")
        raise RuntimeError("stopped")
    assert (adapter / "weights").read_text() == "old"
    with replaced_folder(adapter) as folder:
        (folder / "weights").write_text("new")
    assert (adapter / "weights").read_text() == "new"
    assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]


def test_what_a_killed_process_left_of_a_folder_goes_and_what_a_living_one_fills_stays(
    tmp_path: Path,
) -> None:
    code = (
        "import os, pathlib, sys\n"
        "from falcon_qlora.common.files import replaced_folder\n"
        "with replaced_folder(pathlib.Path(sys.argv[1])) as folder:\n"
        "    (folder / 'half').write_text('a')\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    target = tmp_path / "merged"
    subprocess.run([sys.executable, "-c", code, target], check=False, timeout=60)
    (left,) = tmp_path.iterdir()
    assert (left / "half").exists()
    kept = {".merged-notebook", ".merged-partial-of-mine", ".other-partial-12345678"}
    for name in kept:
        (tmp_path / name).mkdir()
    with replaced_folder(target) as first:
        assert not left.exists()
        with replaced_folder(target) as second:
            assert first.exists()
            (second / "whole").write_text("b")
    assert {path.name for path in tmp_path.iterdir()} == kept | {"merged"}


def test_a_folder_that_cannot_take_the_place_of_another_leaves_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, move = tmp_path / "merged", os.replace
    target.mkdir()
    (target / "old").write_text("a")

    def replace(source: Path, there: Path) -> None:
        if there == target and "partial" in source.name:
            raise OSError("the disk is gone")
        move(source, there)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OSError, match="gone"), replaced_folder(target):
        pass
    assert [path.name for path in tmp_path.rglob("*")] == ["merged", "old"]


def test_what_the_disk_does_not_take_comes_to_no_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, folder = tmp_path / "summary.json", tmp_path / "adapter"
    write_json(file, {"steps": 1})

    def fsync(handle: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match="Input/output"):
        write_json(file, {"steps": 2})
    with pytest.raises(OSError, match="Input/output"), replaced_folder(folder) as filled:
        (filled / "weights").write_text("x")
    assert json.loads(file.read_text()) == {"steps": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["summary.json"]


def test_a_file_system_that_flushes_no_folders_is_one_to_write_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush = os.fsync

    def fsync(handle: int) -> None:
        if stat.S_ISDIR(os.fstat(handle).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")
        flush(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with replaced_folder(tmp_path / "adapter") as filled:
        (filled / "weights").write_text("x")
    assert (tmp_path / "adapter" / "weights").read_text() == "x"


def test_the_loss_is_drawn(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.draw_loss()
    assert not directory.loss_picture.exists()
    for step in range(1, 41):
        directory.append_metrics(step, {"loss": 3 / step, "learning_rate": 1e-4})
    directory.append_metrics(40, {"eval_loss": 0.5})
    directory.draw_loss("a run")
    with Image.open(directory.loss_picture) as picture:
        assert picture.format == "PNG"
        assert min(picture.size) > 300


def test_contents_lists_what_exists(tmp_path: Path) -> None:
    directory = _holding_run(tmp_path)
    directory.write("environment", collect_environment())
    assert {path.name for path in directory.contents()} == {
        "config.yaml",
        "metrics.jsonl",
        "environment.json",
    }


def test_environment_names_versions_and_hides_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["train", "--hub_token", "hf_abc", "--max_tokens", "5"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    environment = collect_environment()
    assert environment["packages"]["torch"] == torch.__version__
    assert environment["world_size"] == 2
    assert "hf_abc" not in json.dumps(environment)
    assert environment["command"][-2:] == ["--max_tokens", "5"]


@pytest.mark.parametrize(
    ("argv", "shown"),
    [
        (["--hub_token=x", "-b", "4"], ["--hub_token=<hidden>", "-b", "4"]),
        (["--api-key", "x", "y"], ["--api-key", "<hidden>", "y"]),
        (
            ["--WANDB_API_KEY", "x", "--hf-token", "y"],
            ["--WANDB_API_KEY", "<hidden>", "--hf-token", "<hidden>"],
        ),
        (["--seed", "1"], ["--seed", "1"]),
        (["--token_budget", "5", "--eos_token", "x"], ["--token_budget", "5", "--eos_token", "x"]),
        (["--dataset_name", "https://a:b@c/d"], ["--dataset_name", "https://c/d"]),
    ],
)
def test_secrets_in_a_command_line_are_hidden(argv: list[str], shown: list[str]) -> None:
    assert without_secrets(argv) == shown


def test_of_our_settings_those_that_are_secret_are_hidden_and_no_other() -> None:
    for each in [*our_settings(), *settings_of(TrainerArguments)]:
        assert (without_secrets([f"--{each.name}", "x"])[1] == "<hidden>") == each.secret, each.name


def about(method: type[Method]) -> dict[str, str]:
    names = {"title": method.title, "trains": method.trains, "opened_by": method.opened_by}
    return {"method": method.name, **names}


LORA = about(Lora)


def test_the_card_has_the_hubs_metadata_and_how_to_load_it(tmp_path: Path) -> None:
    card = ModelCard(
        **LORA,
        base_model="tiiuae/falcon-7b",
        datasets=["timdettmers/openassistant-guanaco", "my/rows.jsonl"],
        settings={"quantize_mode": "4bit", "lora_r": 64},
        data={"rows read": 9846},
        summary={"steps": 50, "final_loss": 1.23},
        template="chat.jinja",
        template_sha256="0a1b",
    )
    text = card.write(tmp_path).read_text()
    _, front, body = text.split("---\n", 2)
    metadata = yaml.safe_load(front)
    assert metadata["base_model"] == "tiiuae/falcon-7b"
    assert metadata["library_name"] == "peft"
    assert metadata["datasets"] == ["timdettmers/openassistant-guanaco"]
    parts = ("PeftModel.from_pretrained", "| lora_r | 64 |", "| rows read | 9,846 |", "1.23")
    for part in (*parts, "`chat.jinja` (SHA-256 `0a1b`)"):
        assert part in body


def test_the_code_in_a_card_runs(tmp_path: Path) -> None:
    import peft
    from transformers import AutoModelForCausalLM

    from falcon_qlora.models.tiny import tiny_path

    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(tiny_path())
    peft.get_peft_model(base, peft.LoraConfig(target_modules=["dense"])).save_pretrained(adapter)
    text = ModelCard(**LORA, base_model="tiny").write(adapter).read_text()
    code = text.split("```python\n")[1].split("```")[0].replace('"ADAPTER"', repr(str(adapter)))
    names: dict[str, object] = {}
    exec(code, names)
    assert isinstance(names["model"], peft.PeftModel)


def test_the_code_in_a_whole_models_card_runs(tmp_path: Path) -> None:
    from transformers import FalconForCausalLM, PreTrainedTokenizerBase

    from falcon_qlora.models.tiny import tiny_path

    text = ModelCard(**about(Full), base_model="tiny").render()
    blocks = [part.split("```")[0].replace("ADAPTER", str(tiny_path())) for part in text.split("```python\n")]
    names: dict[str, object] = {}
    exec(blocks[1], names)
    assert isinstance(names["model"], FalconForCausalLM)
    assert isinstance(names["tokenizer"], PreTrainedTokenizerBase)
    assert 'load_adapter("' in blocks[2]


def test_a_card_over_random_weights_says_so_and_names_no_hub_model() -> None:
    text = ModelCard(**LORA, base_model="random:falcon-7b").render()
    assert "weights are random" in text
    assert "base_model" not in yaml.safe_load(text.split("---\n")[1])


def test_what_is_written_can_be_read_by_whom_the_user_lets_read(tmp_path: Path) -> None:
    """safetensors makes its files for the user alone, whatever the umask says."""
    with replaced_folder(tmp_path / "adapter") as folder:
        save_file({"a": torch.zeros(2)}, folder / "adapter_model.safetensors")
        (folder / "plain").touch()
    found = {file.stat().st_mode & 0o777 for file in (tmp_path / "adapter").iterdir()}
    (tmp_path / "of_this_user").touch()
    assert found == {(tmp_path / "of_this_user").stat().st_mode & 0o777}
