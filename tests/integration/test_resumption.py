"""What a run may have changed when it goes on, and what makes it another run: of settings and of data."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

import falcon_qlora
from falcon_qlora.commands.inspection import inspect_folder
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.stream import stream_documents
from tests.integration.interrupted import SMALL
from tests.integration.runs import metrics, write_jsonl

ROWS = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(12)]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, and its rows: a stream of a file and a folder."""
    folder = tmp_path_factory.mktemp("stopped")
    write_jsonl(folder / "rows.jsonl", ROWS)
    (folder / "more").mkdir()
    for name in "ab":
        write_jsonl(folder / "more" / f"{name}.jsonl", ROWS)
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=[folder / "rows.jsonl", folder / "more"],
        streaming=True,
        output_dir=folder / "run",
        max_length=64,
        max_steps=2,
        logging_steps=1,
        save_steps=1,
        lora_r=4,
        report_to="none",
    )
    shutil.rmtree(folder / "run" / "checkpoints" / "step-2")
    return folder


@pytest.fixture
def data(stopped: Path, tmp_path: Path) -> Path:
    """A copy of the rows, which lie elsewhere than they did."""
    return shutil.copytree(stopped, tmp_path / "data", ignore=shutil.ignore_patterns("run"))


def refusal(folder: Path, **settings: Any) -> str:
    """Why the run does not go on, with which nothing of it may be lost."""
    before = {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    with pytest.raises(UserError) as refused:
        falcon_qlora.train(resume=folder / "run", **settings)
    assert before == {path: path.read_bytes() for path in (folder / "run").rglob("*") if path.is_file()}
    return str(refused.value)


@pytest.mark.parametrize(
    ("setting", "value", "was"),
    [
        ("compute_dtype", "bf16", "auto"),
        ("optim_args", "momentum=0.5", "None"),
        ("lr_scheduler_kwargs", '{"num_cycles": 2}', "None"),
        ("neftune_noise_alpha", 5, "None"),
        ("max_rows", 6, "None"),
        ("dataset_weights", [1, 2], "None"),
        ("dataset_format", "alpaca", "auto"),
    ],
)
def test_a_setting_that_changes_the_losses_is_refused(stopped, setting, value, was):
    assert refusal(stopped, **{setting: value}).startswith(f"--resume: --{setting} was {was} in the run")


def test_an_edited_record_of_the_settings_is_refused_as_a_flag_is(stopped: Path) -> None:
    file = stopped / "run" / "config.yaml"
    before = file.read_text()
    assert "quantize_mode: 4bit" in before
    file.write_text(before.replace("quantize_mode: 4bit", "quantize_mode: 8bit"))
    try:
        assert refusal(stopped).startswith(
            "--resume: --quantize_mode was 4bit in the run to resume and is 8bit"
        )
    finally:
        file.write_text(before)


def test_what_changes_the_rounding_alone_is_said(stopped, data, capsys):
    (data / "rows.jsonl").unlink()  # so that it ends before the model is read
    sources = [data / "rows.jsonl", data / "more"]
    refusal(stopped, kernels="off", per_device_train_batch_size=1, dataset_name=sources)
    said = capsys.readouterr().out
    assert "note: kernels was auto and is off now: the losses agree up to rounding" in said
    assert "note: per_device_train_batch_size was 4 and is 1 now: the losses agree up to rounding" in said


def alter(file: Path) -> None:
    file.write_text(file.read_text().replace("It is 3.", "It is 4."))


def grow(file: Path) -> None:
    write_jsonl(file, [*ROWS, ROWS[0]])


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda d: alter(d / "rows.jsonl"), "data/rows.jsonl is another file or has been altered"),
        (lambda d: grow(d / "more/b.jsonl"), r"data/more/b.jsonl has [\d,]+ bytes instead of [\d,]+"),
        (lambda d: write_jsonl(d / "more/c.jsonl", ROWS), "data/more holds c.jsonl too"),
        (lambda d: (d / "more/a.jsonl").unlink(), "data/more no longer holds a.jsonl"),
    ],
)
def test_a_stream_of_other_data_is_refused_and_the_file_named(stopped, data, change, told):
    change(data)
    message = refusal(stopped, dataset_name=[data / "rows.jsonl", data / "more"])
    assert message.startswith("--resume: the data is not what the run began with: ")
    assert message.endswith("Bring the old data back, or start a new run")
    assert re.search(told, message), message


def test_a_stream_of_more_or_fewer_data_sets_is_refused(stopped, data):
    told = f"{data}/rows.jsonl instead of {stopped}/rows.jsonl, {stopped}/more."
    assert told in refusal(stopped, dataset_name=[data / "rows.jsonl"])


def test_a_stream_goes_on_over_the_same_rows_elsewhere(stopped, data):
    run = shutil.copytree(stopped / "run", data / "run")
    (data / "more/a.jsonl").rename(data / "more/_.jsonl")
    falcon_qlora.train(resume=run, dataset_name=[data / "rows.jsonl", data / "more"])
    assert metrics(run)[-1]["step"] == 2


@pytest.mark.parametrize(
    "name", ["a\nb: 1\r\t'x' \\n #", pytest.param("\x1b[31m\x07\u2028é", marks=pytest.mark.slow)]
)
def test_a_path_of_odd_characters_is_in_the_record_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = os.fsdecode(name.encode() + b"\xe9\xff.jsonl")
    write_jsonl(Path(rows), [{"text": f"{n} and {n} is {2 * n}."} for n in range(20)])
    settings: dict[str, Any] = {"model_name_or_path": "tiny", "max_length": 32, "report_to": "none"}
    settings |= {"dataset_name": rows, "max_steps": 2, "save_steps": 1}
    run = falcon_qlora.train(**settings, output_dir=name)
    header, *lines = (run / "config.yaml").read_text(encoding="utf-8").split("\n")
    assert header.startswith("# Run again:  falcon-qlora train --config ")
    assert lines[0] == "format: 2"
    assert lines[1].startswith("model_name_or_path: ")
    words = header.removeprefix("# Run again:  ").removesuffix(" --output_dir NEW_FOLDER")
    typed = subprocess.run(["bash", "-c", f"printf '%s\\0' {words}"], capture_output=True, check=True).stdout
    assert typed.decode().split("\0")[:-1] == ["falcon-qlora", "train", "--config", f"{name}/config.yaml"]
    assert parse(["--resume", str(run)]).data.dataset_name == [str(Path(rows).absolute())]
    assert json.loads((run / "data.json").read_text())["sources"][0]["name"] == rows
    falcon_qlora.train(resume=run, max_steps=4)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    with pytest.raises(UserError, match=r"'caf\\xe9': not a name in UTF-8"):
        falcon_qlora.train(**settings, output_dir=os.fsdecode(b"caf\xe9"))
    assert not Path(os.fsdecode(b"caf\xe9")).exists()


@pytest.mark.parametrize("resume", [True, "auto"])
def test_a_finished_run_stays_as_it_is(
    stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], resume: Any
) -> None:
    folder = shutil.copytree(stopped, tmp_path / "data")
    run = folder / "run"
    falcon_qlora.train(resume=run)
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    capsys.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "falcon_qlora.training.build.model_with_adapter", lambda *_, **__: pytest.fail("loaded")
        )
        assert falcon_qlora.train(resume=resume, output_dir=run) == run
    assert (
        "run is done: nothing is left to train of 2 steps, and nothing was changed" in capsys.readouterr().out
    )
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    # What it made is made again where it is lost; and it goes on from a checkpoint that is named.
    shutil.rmtree(run / "adapter")
    falcon_qlora.train(resume=run)
    assert (run / "adapter/adapter_model.safetensors").is_file()
    shutil.copytree(stopped / "run/checkpoints/step-1", run / "checkpoints/step-1", dirs_exist_ok=True)
    falcon_qlora.train(resume=run / "checkpoints/step-1")
    assert "going on from step 1" in capsys.readouterr().out


def test_a_checkpoint_that_is_a_link_out_of_its_run(stopped: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(stopped, tmp_path / "data")
    inside, outside = folder / "run/checkpoints/step-1", tmp_path / "step-1"
    inside.rename(outside)
    inside.symlink_to(outside)
    assert "no checkpoint in" in refusal(folder)
    found = inspect_folder(folder / "run")
    assert f"{inside} is a link that leads out of the run" in found.faults


@pytest.mark.slow
def test_a_row_that_breaks_a_stream_late_is_told_with_the_ways_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stream_documents.__kwdefaults__ is not None
    monkeypatch.setitem(stream_documents.__kwdefaults__, "shuffle_buffer", 4)
    file = tmp_path / "rows.jsonl"
    write_jsonl(file, ROWS * 90)  # the start reads the first thousand
    whole = file.read_text()
    file.write_text(whole + '{"instruction": "torn\n')
    settings: dict[str, Any] = {
        "model_name_or_path": SMALL.split()[1],
        "tokenizer_name_or_path": "tiny",
        "dataset_name": file,
        "streaming": True,
        "max_length": 256,
        "per_device_train_batch_size": 8,
        "save_steps": 5,
        "lora_r": 4,
        "report_to": "none",
    }
    with pytest.raises(UserError) as refused:
        falcon_qlora.train(**settings, output_dir=tmp_path / "run", max_steps=1000)
    broken, how = str(refused.value).splitlines()
    assert f"{file}:1081: not valid JSON" in broken
    found = re.fullmatch(
        r"The last complete checkpoint is (\S+step-\d+): resume it with --resume. Once rows are changed it "
        r"cannot be resumed: begin a new run with its weights \(--adapter (\S+)\).",
        how,
    )
    assert found is not None
    assert found[1] == found[2]
    file.write_text(whole)
    refusal(tmp_path)
    falcon_qlora.train(**settings, output_dir=tmp_path / "anew", adapter=found[2], max_steps=1)
