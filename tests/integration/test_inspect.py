"""``falcon-qlora inspect``: what is whole is called whole, and every kind of damage is named by its file."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter_folder import ReadTensor, SavedAdapter
from falcon_qlora.methods.table import METHODS
from tests.integration.runs import command, write_jsonl
from tests.integration.test_adapter import fine_tune
from tests.integration.test_trained_at_all import still


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with checkpoints from its first step on, and the merge of its adapter in several files."""
    folder = tmp_path_factory.mktemp("whole")
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(12)]
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(folder / "rows.jsonl", rows),
        output_dir=folder / "run",
        max_length=64,
        max_steps=4,
        save_steps=1,
        save_total_limit=4,
        lora_r=4,
        report_to="none",
        eval_split=0.25,
        cache_dir=folder / "cache",
    )
    words = ["--adapter", str(folder / "run"), "--out", str(folder / "merged")]
    assert cli.main(["merge", *words, "--base", "dequantized", "--max_shard_size", "3MB"]) == 0
    assert len(list((folder / "merged").glob("model-*.safetensors"))) > 2
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "copy")


def inspect(folder: Path, capsys: Any) -> tuple[int, str]:
    capsys.readouterr()
    status = cli.main(["inspect", str(folder)])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return status, printed.out + printed.err.removeprefix("loading libraries …\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run", "run"),
        ("run/adapter", "adapter"),
        ("run/checkpoints/step-2", "checkpoint"),
        ("merged", "merge"),
    ],
)
def test_what_is_whole(whole, capsys, name, kind):
    status, said = inspect(whole / name, capsys)
    assert status == 0, said
    assert f"{kind}, whole" in said
    assert "tiny" in said
    assert re.search(r"template +alpaca\n", said)


def test_a_run_says_what_it_was_trained_on(whole, capsys):
    _, said = inspect(whole / "run", capsys)
    fingerprint = json.loads((whole / "run" / "data.json").read_text())["fingerprint"]
    assert fingerprint in said
    assert "rows.jsonl" in said
    assert "step-2: whole" in said
    assert "step-1: whole" in said


@pytest.mark.parametrize("method", ["lora", "adapter", "adapter_v2", "full"])
def test_a_run_at_rate_zero_is_not_trained_yet(tmp_path, capsys, monkeypatch, method):
    # As releases left one that refused none. Shorter than --logging_steps, it has logged no loss.
    monkeypatch.setattr("falcon_qlora.training.finish.require_moved", lambda trainer, **_: None)
    monkeypatch.setattr("falcon_qlora.training.trainer.FalconTrainer.create_scheduler", still)
    settings = {"max_steps": 1, "logging_steps": 10}
    run = fine_tune(tmp_path, method=method, **settings)
    status, said = inspect(run, capsys)
    assert status == 0, said
    rows = {
        words[0]: words[1] for words in (re.split(r"  +", line.strip()) for line in said.splitlines()[1:])
    }
    assert rows["method"] == METHODS[method]().describe()
    assert "loss" not in rows
    state = "whole" if method == "full" else "not trained yet"
    assert said.splitlines()[0] == f"{run}: run, {state}"
    assert rows[{"full": "model"}.get(method, "adapter")] == f"adapter: {state}"
    if method == "full":
        return
    # What did not start at zero was lost.
    change_tensors(lambda tensors: next(v for v in tensors.values() if v.any()).zero_())(
        run / "adapter" / ADAPTER
    )
    status, said = inspect(run / "adapter", capsys)
    assert (status, said.count("is zero throughout: lost")) == (2, 1)
    assert ": adapter, not whole" in said


def test_a_run_without_a_checkpoint_or_an_adapter_is_not_called_whole(copy, capsys):
    run = copy / "run"
    (run / "summary.json").unlink()
    shutil.rmtree(run / "adapter")
    assert inspect(run, capsys)[1].startswith(f"{run}: run, whole\n")  # it can go on
    shutil.rmtree(run / "checkpoints")
    status, said = inspect(run, capsys)
    assert status == 2
    assert said.startswith(f"{run}: run, not finished, holds nothing to go on from\n")
    assert "start it again with --overwrite" in said
    (run / "config.yaml").write_text("{")
    assert inspect(run, capsys)[1].startswith(f"{run}: run, not whole\n")


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def alter_last_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def alter_middle(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 255
    file.write_bytes(content)


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    def changed(file: Path) -> None:
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})

    return changed


class _Bomb:
    def __reduce__(self) -> Any:
        return os.system, ("touch exploded",)


def change_json(**values: Any) -> Callable[[Path], None]:
    return lambda file: file.write_text(json.dumps(json.loads(file.read_text()) | values))


def poison(file: Path) -> None:
    torch.save({"state": _Bomb()}, file)


ADAPTER = "adapter_model.safetensors"


@pytest.mark.parametrize(
    ("file", "damage", "told"),
    [
        (f"run/adapter/{ADAPTER}", cut, f"{ADAPTER} is damaged"),
        (f"run/adapter/{ADAPTER}", Path.unlink, f"has no {ADAPTER}"),
        (f"run/adapter/{ADAPTER}", change_tensors(lambda t: t.popitem()), "is missing"),
        (
            f"run/adapter/{ADAPTER}",
            change_tensors(lambda t: next(iter(t.values())).fill_(float("nan"))),
            "non-finite",
        ),
        (
            f"run/adapter/{ADAPTER}",
            change_tensors(
                lambda t: [v.zero_() for k, v in t.items() if "h.3.mlp.dense_4h_to_h.lora_B" in k]
            ),
            "h.3.mlp.dense_4h_to_h.lora_B.weight is zero throughout",
        ),
        (
            f"run/checkpoints/step-4/{ADAPTER}",
            change_tensors(lambda t: t[next(name for name in t if "lora_B" in name)].zero_()),
            "lora_B.weight is zero throughout",
        ),
        ("run/adapter/adapter_config.json", cut, "adapter_config.json is not valid JSON"),
        ("run/checkpoints/step-4/optimizer.pt", cut, "optimizer.pt is damaged"),
        ("run/checkpoints/step-4/optimizer.pt", alter_middle, "optimizer.pt is damaged"),
        ("run/checkpoints/step-4/optimizer.pt", poison, "optimizer.pt would run posix.system"),
        ("run/checkpoints/step-4/trainer_state.json", cut, "trainer_state.json is not valid JSON"),
        ("run/summary.json", cut, "summary.json is not valid JSON"),
        ("run/config.yaml", lambda f: f.write_text("a: [1"), "config.yaml, line 1: not valid YAML"),
        ("merged/certificate.json", cut, "certificate.json is not valid JSON"),
        ("merged/certificate.json", change_json(format=2), "format 2 is newer than this falcon_qlora reads"),
        ("merged/model-00002-of-*.safetensors", alter_last_byte, "it was altered"),
        ("merged/model-00002-of-*.safetensors", Path.unlink, "which is not there"),
        ("merged/model-00002-of-*.safetensors", cut, "safetensors is damaged"),
        ("merged/config.json", lambda f: f.write_text("{}"), "of type None"),
    ],
)
@pytest.mark.slow
def test_damage_is_named(copy, capsys, monkeypatch, file, damage, told):
    monkeypatch.chdir(copy)
    (target,) = copy.glob(file)
    damage(target)
    status, said = inspect(copy / file.split("/")[0], capsys)
    assert status == 2
    assert told in said
    assert "not whole" in said
    assert not (copy / "exploded").exists()


def treble_lora_b(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        if "lora_B" in name:
            tensor.mul_(3)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (ADAPTER, change_tensors(treble_lora_b)),
        ("adapter_config.json", change_json(lora_alpha=64)),
        ("falcon_qlora.json", change_json(quantize_mode="8bit")),
        ("tokenizer.json", Path.unlink),
    ],
)
def test_what_fits_an_adapter_and_is_not_what_the_run_left(copy, capsys, file, damage):
    folder = copy / "run" / "adapter"
    (folder / "README.md").write_text("A card is there to be written on.")
    assert inspect(folder, capsys)[0] == 0
    damage(folder / file)
    for each in (folder, copy / "run"):
        status, said = inspect(each, capsys)
        assert status == 2
        assert file in said
    (folder / "manifest.json").unlink()  # as adapters of other tools, and those of before, have none
    assert inspect(folder, capsys)[0] == 0


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("config.json", change_json(rope_theta=5000.0)),
        ("tokenizer.json", lambda f: f.write_text("")),
        ("generation_config.json", lambda f: f.write_text("{}")),
        ("tokenizer_config.json", Path.unlink),
    ],
)
def test_what_fits_a_merge_and_is_not_what_was_measured(copy, capsys, file, damage):
    folder = copy / "merged"
    (folder / "README.md").write_text("A card is there to be written on.")
    assert inspect(folder, capsys)[0] == 0
    damage(folder / file)
    status, said = inspect(folder, capsys)
    assert status == 2
    told = "is missing" if file == "tokenizer_config.json" else "does not match the certificate"
    assert f"{folder / file} {told}" in said
    certificate = json.loads((folder / "certificate.json").read_text())
    del certificate["files"]  # as those of before have none
    (folder / "certificate.json").write_text(json.dumps(certificate))
    assert inspect(folder, capsys)[0] == 0
    for files, told in (([], "lists no files"), ({"../run/config.yaml": ""}, "not a file of its own folder")):
        (folder / "certificate.json").write_text(json.dumps(certificate | {"files": files}))
        assert told in inspect(folder, capsys)[1]


def test_files_that_differ_from_a_manifest(copy, capsys):
    folder = copy / "run" / "checkpoints" / "step-4"
    alter_last_byte(folder / "README.md")
    status, said = inspect(folder, capsys)
    assert status == 2
    assert "README.md is not what was written" in said
    manifest = json.loads((folder / "manifest.json").read_text())
    for files, told in {
        '{"../../../../etc/passwd": {"bytes": 1, "sha256": ""}}': "names a file outside",
        '{"README.md": {"bytes": "1", "sha256": ""}}': "lists no files",
        "[]": "lists no files",
    }.items():
        (folder / "manifest.json").write_text(json.dumps({**manifest, "files": json.loads(files)}))
        assert told in inspect(folder, capsys)[1]
    (folder / "manifest.json").unlink()
    assert "manifest.json is missing" in inspect(folder, capsys)[1]


def test_nothing_is_said_of_the_checks_where_their_record_is_damaged(copy, capsys):
    (copy / "run/summary.json").write_text("{")
    told = inspect(copy / "run", capsys)[1]
    assert "summary.json is not valid JSON" in told
    assert "not recorded" not in told


def test_folders_that_are_none_of_these(tmp_path, capsys):
    assert inspect(tmp_path, capsys)[0] == 2
    assert inspect(tmp_path / "none", capsys)[0] == 2
    assert cli.main(["inspect", "--help"]) == 0
    capsys.readouterr()
    for words in ([], [""], [str(tmp_path), ""]):
        assert cli.main(["inspect", *words]) == 2
        assert capsys.readouterr().err.startswith("error: name one folder: ")
    assert cli.main(["inspect", str(tmp_path), "--makrdown"]) == 2
    assert capsys.readouterr().err == "error: unknown flag --makrdown: inspect takes --markdown alone\n"
    assert cli.main(["inspect", str(tmp_path), "--md", "-v"]) == 2
    assert capsys.readouterr().err == "error: unknown flags --md, -v: inspect takes --markdown alone\n"
    assert cli.main(["compare", "", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: a folder to compare has an empty name\n"


def test_as_a_user_runs_it(whole):
    result = command("inspect", whole / "merged")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"{whole / 'merged'}: merge, whole\n")
    assert result.stderr == "loading libraries …\n"


def test_what_was_wrong_before_an_error_ends_the_reading_is_named_too(copy, capsys, monkeypatch):
    def read(self: SavedAdapter, config: Any) -> Iterator[ReadTensor]:
        yield ReadTensor("first", fault="first is missing")
        raise UserError("the rest cannot be read")

    monkeypatch.setattr(SavedAdapter, "read", read)
    status, said = inspect(copy / "run" / "adapter", capsys)
    assert status == 2
    assert "first is missing" in said
    assert "the rest cannot be read" in said
