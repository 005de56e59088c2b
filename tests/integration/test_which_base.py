"""An adapter belongs to the base that it was trained on, wherever that lies now."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.checkpoint.manifest import describe_file
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.recorded_paths import started_in
from falcon_qlora.models import fingerprint
from falcon_qlora.models.fingerprint import is_fingerprint_of, model_fingerprint
from falcon_qlora.models.tiny import tiny_path
from tests.integration.runs import write_jsonl

SHORT = "-q 16bit --max_length 32".split()
VERBS = {
    "generate": ["generate", *SHORT, "--prompt", "x", "--max_new_tokens", "1"],
    "eval": ["eval", *SHORT, "--most_tokens", "40"],
    "merge": [
        "merge",
        *SHORT,
        "--held_out_tokens",
        "40",
        "--max_loss_increase",
        "9",
        "--max_kl_divergence",
        "9",
    ],
}


def copy_of_base(folder: Path) -> Path:
    """The packaged base with one number of one weight changed."""
    copy = Path(shutil.copytree(tiny_path(), folder))
    file = copy / "model.safetensors"
    tensors = load_file(file)
    tensors["transformer.h.3.mlp.dense_4h_to_h.weight"][7, 11] += 0.25
    save_file(tensors, file, metadata={"format": "pt"})
    return copy


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the bases `one` and `two`, rows, and `run`, which was told of them by relative paths."""
    folder = tmp_path_factory.mktemp("bases")
    shutil.copytree(tiny_path(), folder / "bases" / "one")
    copy_of_base(folder / "bases" / "two")
    write_jsonl(folder / "rows.jsonl", [{"text": f"{n} and {n} is {2 * n}."} for n in range(20)])
    (folder / "elsewhere").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        falcon_qlora.train(
            model_name_or_path="bases/one",
            tokenizer_name_or_path="bases/two",
            dataset_name="rows.jsonl",
            eval_split=0.2,
            output_dir="run",
            quantize_mode="16bit",
            lora_r=2,
            learning_rate=1e-2,
            warmup_steps=0,
            max_length=32,
            max_steps=2,
            save_steps=1,
            report_to="none",
            cache_dir="cache",
        )
    return folder


def copied(folder: Path, tmp_path: Path, *, old: bool) -> Path:
    """A copy of everything; returns the run's, with records as of a run there.

    Args:
        old: as they were while paths were kept as they had been given.
    """
    run = Path(shutil.copytree(folder, tmp_path / "all")) / "run"
    before = fingerprint._hash(folder / "bases" / "one", samples=16, whole_bytes=0)
    for file in [*run.glob("**/falcon_qlora.json"), *run.glob("**/adapter_config.json"), run / "config.yaml"]:
        text = file.read_text().replace(f"{folder}/", "" if old else f"{tmp_path}/all/")
        if old and file.name == "falcon_qlora.json":
            text = json.dumps(json.loads(text) | {"base_fingerprint": before})
        file.write_text(text)
    for file in run.glob("**/manifest.json"):
        content = json.loads(file.read_text())
        names = [name for name in ("falcon_qlora.json", "adapter_config.json") if name in content["files"]]
        content["files"] |= {name: describe_file(file.parent / name) for name in names}
        file.write_text(json.dumps(content))
    return run


@pytest.mark.parametrize("verb", VERBS)
def test_verbs_say_that_the_base_is_another(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    verb: str,
) -> None:
    monkeypatch.chdir(folder)
    words = [*VERBS[verb], "--adapter", "run", *(["--out", str(tmp_path / "out")] if verb == "merge" else [])]
    assert cli.main([*words, "-m", "bases/two"]) == 0
    said = capsys.readouterr().err
    assert f"was trained on another base: {folder}/bases/one (fingerprint " in said
    assert f"not {folder}/bases/two (fingerprint " in said
    if verb == "merge":
        origin = json.loads((tmp_path / "out" / "certificate.json").read_text())["origin"]
        assert origin["adapter_base"] == str(folder / "bases" / "one")
        assert origin["is_the_adapters_base"] is False
        told = [origin[name] for name in ("adapter_base_fingerprint", "base_fingerprint")]
        assert told == [model_fingerprint(str(folder / "bases" / each)) for each in ("one", "two")]
        assert "trained on another base" in (tmp_path / "out" / "README.md").read_text()
        return
    # The same content under another name is the same base: the packaged one was copied.
    assert cli.main([*words, "-m", "tiny"]) == 0
    assert "another" not in capsys.readouterr().err


def test_python_warns_that_the_base_is_another(folder: Path, tmp_path: Path) -> None:
    adapter, one, two = folder / "run" / "adapter", folder / "bases" / "one", folder / "bases" / "two"
    options: dict[str, Any] = {"quantize_mode": "16bit", "device": "cpu"}
    for base in (str(two), falcon_qlora.load_model(str(two), **options)):
        with pytest.warns(UserWarning, match=rf"trained on another base: {one} \(.*\), not {two} \("):
            falcon_qlora.load_adapter(adapter, base_model=base, **options)
    # Of an adapter by itself only the name is known.
    alone = Path(shutil.copytree(adapter, tmp_path / "alone", ignore=shutil.ignore_patterns("falcon_qlora*")))
    with pytest.warns(UserWarning, match=f"trained on {one}; whether tiny is the same model cannot be"):
        falcon_qlora.load_adapter(alone, base_model="tiny", **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for base in ("tiny", falcon_qlora.load_model("tiny", **options), None):
            falcon_qlora.load_adapter(adapter, base_model=base, **options)


def test_training_on_from_it_on_another_base_is_refused(folder: Path, tmp_path: Path) -> None:
    more = {"dataset_name": folder / "rows.jsonl", "max_steps": 1, "report_to": "none", "max_length": 32}
    with pytest.raises(UserError, match=r"was trained on another base: .*/one .*, not .*/two"):
        falcon_qlora.train(
            adapter=folder / "run", model_name_or_path=folder / "bases/two", output_dir=tmp_path / "n", **more
        )
    assert not (tmp_path / "n").exists()
    with pytest.raises(UserError, match=r"model_name_or_path was .*/one in the run to resume and is .*/two"):
        falcon_qlora.train(resume=folder / "run", model_name_or_path=folder / "bases/two", max_steps=3)
    # Only the quantization is another.
    run = falcon_qlora.train(
        adapter=folder / "run",
        model_name_or_path="tiny",
        quantize_mode="8bit",
        output_dir=tmp_path / "n",
        **more,
    )
    assert (run / "adapter").is_dir()


@pytest.mark.parametrize("old", [False, True])
def test_a_run_opens_and_goes_on_from_anywhere(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: bool,
) -> None:
    run = copied(folder, tmp_path, old=old)
    assert (f": {tmp_path}/all/bases/one\n" in (run / "config.yaml").read_text()) is not old
    assert (f"- {tmp_path}/all/rows.jsonl\n" in (run / "config.yaml").read_text()) is not old
    assert started_in(run) == tmp_path / "all"
    monkeypatch.chdir(tmp_path / "all" / "elsewhere")
    assert cli.main([*VERBS["generate"], "--adapter", str(run)]) == 0
    assert cli.main([*VERBS["eval"], "--adapter", str(run)]) == 0
    assert f"the base model is {tmp_path}/all/bases/one, which" in capsys.readouterr().err
    falcon_qlora.train(resume=run, max_steps=3)
    # A base that was exchanged in its place.
    for each in ("one", "two"):
        (tmp_path / "all" / "bases" / each).rename(tmp_path / "all" / "bases" / f"{each}-away")
    (tmp_path / "all" / "bases" / "two-away").rename(tmp_path / "all" / "bases" / "one")
    with pytest.raises(UserError, match=r"--resume: the adapter in .* was trained on another base"):
        falcon_qlora.train(resume=run, max_steps=4, tokenizer_name_or_path=tmp_path / "all" / "bases" / "one")
    shutil.rmtree(tmp_path / "all" / "bases" / "one")
    # One that was moved goes on as what it is.
    moved = tmp_path / "all" / "bases" / "one-away"
    falcon_qlora.train(resume=run, max_steps=4, model_name_or_path=moved, tokenizer_name_or_path=moved)


@pytest.mark.parametrize("old", [False, True])
def test_a_folder_that_is_gone_is_said_to_be_and_not_looked_for_on_the_hub(
    folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: bool,
) -> None:
    run = copied(folder, tmp_path, old=old)
    shutil.rmtree(tmp_path / "all" / "bases")
    # Nor does the first line of its settings help, where the run itself was moved.
    (tmp_path / "moved").mkdir()
    run = run.rename(tmp_path / "moved" / "renamed")
    monkeypatch.chdir(tmp_path)
    asked: list[str] = []
    ask: Callable[..., None] = lambda name, *_, **__: asked.append(str(name))  # noqa: E731
    for function in ("fetch_model", "fetch_tokenizer", "plan_model"):
        monkeypatch.setattr(f"falcon_qlora.models.hub.{function}", ask)
    name = "bases/one" if old else f"{tmp_path}/all/bases/one"
    for verb, words in VERBS.items():
        more = ["--out", "out"] if verb == "merge" else ["--dataset_name", "sample"][: 2 * (verb == "eval")]
        assert cli.main([*words, *more, "--adapter", str(run)]) == 2
        said = capsys.readouterr().err
        assert f"error: The base model folder {name}" in said
        assert f"recorded in {run}/adapter, is gone; give --model_name_or_path FOLDER" in said
    with pytest.raises(UserError, match=rf"The base model folder {name}.*, is gone; give -m FOLDER"):
        falcon_qlora.train(resume=run, max_steps=3)
    newest = max((run / "checkpoints").glob("step-*"))
    for resumed in (
        ["--output_dir", str(run), "--resume"],
        ["--resume", str(run)],
        ["--resume", str(newest)],
    ):
        assert cli.main(["train", *resumed, "--max_steps", "3"]) == 2
        said = capsys.readouterr().err
        assert f"error: The base model folder {name}" in said
        assert f"recorded in {newest}, is gone; give -m FOLDER" in said
    named = ["-m", "/no/such", "--tokenizer_name_or_path", "tiny"]
    assert cli.main(["train", "--resume", str(run), *named, "--max_steps", "3"]) == 2
    assert "There is no folder '/no/such'" in capsys.readouterr().err
    with pytest.raises(UserError, match=rf"The base model folder {name}.*, is gone; give"):
        falcon_qlora.train(adapter=run, dataset_name=folder / "rows.jsonl", output_dir="n", report_to="none")
    assert not asked


def test_a_fingerprint_tells_models_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = Path(shutil.copytree(tiny_path(), tmp_path / "one")), copy_of_base(tmp_path / "two")
    told = model_fingerprint("tiny")
    assert told == model_fingerprint(str(one)) != model_fingerprint(str(two))
    assert [is_fingerprint_of(told, str(each)) for each in (one, two, tmp_path)] == [True, False, None]
    assert is_fingerprint_of(None, "tiny") is None
    # As of before, of samples; so are large files still, and what was changed throughout shows.
    old = fingerprint._hash(tiny_path(), samples=16, whole_bytes=0)
    assert [is_fingerprint_of(old, str(each)) for each in (one, tmp_path)] == [True, None]
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 2**20)
    tensors = {name: each + 0.01 for name, each in load_file(one / "model.safetensors").items()}
    before = model_fingerprint(str(one))
    save_file(tensors, one / "model.safetensors", metadata={"format": "pt"})
    assert model_fingerprint(str(one)) != before
    # Random weights are what their name says.
    assert model_fingerprint("random:falcon-7b") == model_fingerprint("random:falcon-7b")
    assert is_fingerprint_of(model_fingerprint("random:falcon-7b"), "random:falcon-7b?seed=1") is False
