"""``prepare --output_dir``: a base that is quantized once trains, opens and merges as the original does."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from falcon_qlora import __main__ as cli
from falcon_qlora.common.record_files import PREPARED
from falcon_qlora.models.fingerprint import model_fingerprint
from falcon_qlora.models.prepare import Preparation
from falcon_qlora.models.prepared import read_prepared, write_prepared
from falcon_qlora.models.tiny import tiny_path
from tests.integration.interrupted import assert_same_run
from tests.integration.processes import Processes
from tests.integration.refusals import contents, only_message
from tests.integration.runs import command, room_for, train

STEPS = (
    "--dataset_name sample --max_rows 40 --max_length 64 -b 2 --global_batch_size 3 --steps 4 --save_steps 2 "
    "--logging_steps 1 --learning_rate 1e-3 --lora_r 4 --eval_split 0.2"
).split()
LOOSE = "--held_out_tokens 256 --max_loss_increase 9 --max_kl_divergence 9".split()
MODES = ("4bit", "8bit")


def rewrite(base: Path, **changed: Any) -> None:
    """Have the record of a prepared base say something else, as if it had been written so."""
    told = read_prepared(base)
    assert told is not None
    write_prepared(base, replace(told, **changed))


def edit(base: Path, name: str, value: Any, *, file: str = PREPARED) -> None:
    """Change the record, or another file, by hand; None removes the value."""
    told = json.loads((base / file).read_text())
    assert told[name] != value
    told = told | {name: value} if value is not None else {key: told[key] for key in told if key != name}
    (base / file).write_text(json.dumps(told, indent=2))


def prepare(*words: str | Path) -> int:
    return cli.main(["prepare", *map(str, words)])


def refused(capsys: pytest.CaptureFixture[str], *words: str | Path) -> str:
    """The one message of a command that is refused."""
    capsys.readouterr()
    assert cli.main([*map(str, words)]) == 2
    return only_message(capsys.readouterr().err)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With ``4bit`` and ``8bit``, prepared of a copy of the packaged model, which is ``base``."""
    folder = tmp_path_factory.mktemp("prepared")
    shutil.copytree(tiny_path(), folder / "base")
    for mode in MODES:
        assert prepare("-m", folder / "base", "-q", mode, "--output_dir", folder / mode) == 0
    return folder


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """The same run on each base, by the command line; the prepared ones say themselves how to be read."""
    for mode in MODES:
        train(folder / f"on-base-{mode}", "-m", folder / "base", "-q", mode, *STEPS)
        train(folder / f"on-{mode}", "-m", folder / mode, *STEPS)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_run_is_that_on_the_original_to_the_last_bit(runs: Path, mode: str) -> None:
    assert_same_run(runs / f"on-{mode}", runs / f"on-base-{mode}")
    records = [
        json.loads((runs / name / "adapter/falcon_qlora.json").read_text())
        for name in (f"on-{mode}", f"on-base-{mode}")
    ]
    assert records[0].pop("base_model") == str(runs / mode)
    assert records[1].pop("base_model") == str(runs / "base")
    assert records[0] == records[1]


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_an_adapter_of_either_opens_on_both_without_a_word(runs: Path, mode: str) -> None:
    told: dict[str, set[str]] = {"generate": set(), "eval": set()}
    for run in (f"on-{mode}", f"on-base-{mode}"):
        for base in (mode, "base"):
            opened = ["--adapter", runs / run, "-m", runs / base]
            for verb, more in (
                ("generate", ["--prompt", "What is a falcon?", "--max_new_tokens", "8"]),
                ("eval", ["--most_tokens", "200"]),
            ):
                result = command(verb, *opened, *more)
                assert result.returncode == 0, result.stderr
                assert "another base" not in result.stderr + result.stdout
                assert "cannot be checked" not in result.stderr + result.stdout
                assert "adapter was trained on" not in result.stderr
                told[verb].add(result.stdout)
    assert [len(each) for each in told.values()] == [1, 1]  # word for word, number for number
    other = next(each for each in MODES if each != mode)
    result = command("eval", "--adapter", runs / f"on-{mode}", "-m", runs / other, "--most_tokens", "200")
    assert result.returncode == 0
    note = f"note: {runs / other} is stored in {other}, and the adapter was trained on {mode}\n"
    assert result.stderr.count(note) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_merge_finds_the_original(runs: Path, tmp_path: Path, mode: str) -> None:
    certificates = []
    for run in (f"on-{mode}", f"on-base-{mode}"):
        for base in ("16bit", "dequantized"):
            out = tmp_path / f"{run}-{base}"
            words = ["--adapter", str(runs / run), "--out", str(out), "--base", base, *LOOSE]
            assert cli.main(["merge", *words]) == 0
            certificates.append(json.loads((out / "certificate.json").read_text()))
    on_prepared, on_base = certificates[:2], certificates[2:]
    for one, other in zip(on_prepared, on_base, strict=True):
        assert one["tensors"] == other["tensors"]
        assert one["merges"] == other["merges"]
        assert one["origin"]["base_model"] == other["origin"]["base_model"] == str(runs / "base")
        assert one["origin"]["is_the_adapters_base"] is other["origin"]["is_the_adapters_base"] is True


@pytest.mark.slow
def test_a_merge_without_the_original(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    moved = Path(shutil.copytree(runs, tmp_path / "all"))
    rewrite(moved / "4bit", origin=str(tmp_path / "gone"))
    words = ["merge", "--adapter", moved / "on-4bit", "-m", moved / "4bit", *LOOSE]
    told = refused(capsys, *words, "--out", tmp_path / "no", "--base", "16bit")
    assert "quantized from is not known here, or has changed" in told
    assert not (tmp_path / "no").exists()
    assert cli.main([*map(str, words), "--out", str(tmp_path / "a")]) == 0
    capsys.readouterr()
    whole = ["merge", "--adapter", str(runs / "on-4bit"), "--base", "dequantized", *LOOSE]
    assert cli.main([*whole, "--out", str(tmp_path / "b")]) == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in "ab")
    assert all((one[name] == other[name]).all() for name in other)


@pytest.mark.slow
@pytest.mark.parametrize(("there", "here"), [("4bit", "base"), ("base", "4bit")])
def test_a_run_goes_on_on_the_other(runs: Path, tmp_path: Path, there: str, here: str) -> None:
    name = f"on-{there}" if there == "4bit" else "on-base-4bit"
    run = Path(shutil.copytree(runs / name, tmp_path / "run"))
    for path in ("checkpoints/step-4", "adapter", "summary.json"):
        shutil.rmtree(run / path) if (run / path).is_dir() else (run / path).unlink()
    result = command("train", "--resume", run, "-m", runs / here, "--report_to", "none")
    assert result.returncode == 0, result.stderr
    assert "the content is the same" in result.stdout
    assert_same_run(run, runs / name)


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_blocks_in_cpu_memory_are_filled_from_it(runs: Path, tmp_path: Path, mode: str) -> None:
    train(tmp_path / "run", "-m", runs / mode, *STEPS, "--offload_base")
    assert_same_run(tmp_path / "run", runs / f"on-{mode}")


@pytest.mark.slow
def test_a_checkpoint_of_the_hub_says_how_it_is_stored(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name, commit = "some/falcon-bnb-8bit", "0" * 40
    cached = tmp_path / "hub" / "models--some--falcon-bnb-8bit"
    shutil.copytree(runs / "8bit", cached / "snapshots" / commit)
    (cached / "snapshots" / commit / PREPARED).unlink()  # so it is like any other's
    (cached / "refs").mkdir()
    (cached / "refs/main").write_text(commit)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    train(tmp_path / "run", "-m", name, *STEPS)
    assert_same_run(tmp_path / "run", runs / "on-8bit")
    # An adapter of another tool names its base alone.
    other = Path(shutil.copytree(tmp_path / "run/adapter", tmp_path / "other"))
    (other / "falcon_qlora.json").unlink()
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": name}))
    train(tmp_path / "more", "--adapter", other, *STEPS)
    assert "quantize_mode: 8bit" in (tmp_path / "more/config.yaml").read_text()
    for more, status in (([], 0), (["-q", "4bit"], 2)):
        result = command("generate", "--adapter", other, "--prompt", "x", "--max_new_tokens", "2", *more)
        assert result.returncode == status, result.stderr
    assert "which cannot be loaded with -q 4bit" in result.stderr


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_a_base_that_is_shared_out_loads_from_it(folder: Path, tmp_path: Path, mode: str) -> None:
    shared = [*STEPS, "--sharding", "fsdp"]
    train(tmp_path / "one", "-m", folder / mode, *shared, gpus=2)
    train(tmp_path / "other", "-m", folder / "base", "-q", mode, *shared, gpus=2)
    assert_same_run(tmp_path / "one", tmp_path / "other")


def test_what_contradicts_how_it_is_stored_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare(
        *("-m", "tiny", "-q", "4bit", "--double_quantization", "false", "--output_dir", tmp_path / "single")
    ) == 0  # fmt: skip
    capsys.readouterr()
    bad = [
        (folder / "4bit", ["-q", "8bit"], "4bit with double quantization), which cannot be loaded with -q 8"),
        (folder / "8bit", ["-q", "4bit"], "(8bit), which cannot be loaded with -q 4bit"),
        (folder / "4bit", ["-q", "16bit"], "cannot be loaded with -q 16bit"),
        (folder / "4bit", ["--double_quantization", "false"], "with --double_quantization false"),
        (tmp_path / "single", ["--double_quantization", "true"], "with --double_quantization true"),
        (folder / "8bit", ["--method", "full"], "name the model that it was made of"),
    ]
    before = contents(tmp_path)
    for base, words, told in bad:
        out = ["--output_dir", tmp_path / "run", "--dataset_name", "sample"]
        assert told in refused(capsys, "train", "-m", base, *words, *out)
    for base in (folder / "4bit", tmp_path / "single"):
        told = refused(capsys, "prepare", "-m", base, "--output_dir", tmp_path / "again")
        assert "is quantized already" in told
    other = Path(shutil.copytree(folder / "4bit", tmp_path / "gptq"))
    raw = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(raw | {"quantization_config": {"quant_method": "gptq"}}))
    told = refused(capsys, "train", "-m", other, "--dataset_name", "sample", "--output_dir", tmp_path / "run")
    assert "quantized by 'gptq', which is not read" in told
    shutil.rmtree(other)
    assert contents(tmp_path) == before


def _flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-2000] ^= 1
    file.write_bytes(content)


CHANGES: dict[str, Callable[[Path], object]] = {
    "a bit": lambda base: _flip(base / "model.safetensors"),
    "cut": lambda base: os.truncate(base / "model.safetensors", 2_000_000),
    "longer": lambda base: (base / "model.safetensors").open("ab").write(b"more"),
    "of the other": lambda base: shutil.copyfile(
        base.parent / "8bit/model.safetensors", base / "model.safetensors"
    ),
    "config": lambda base: (base / "config.json").write_text(
        (base / "config.json").read_text().replace("10000.0", "10001.0")
    ),
    "not quantized": lambda base: edit(base, "quantization_config", None, file="config.json"),
    "record": lambda base: (base / PREPARED).write_text("{}"),
    "origin": lambda base: edit(base, "origin", "tiiuae/falcon-7b"),
    "revision": lambda base: edit(base, "revision", "main"),
    "device": lambda base: edit(base, "settings", {"quantize_mode": "4bit"}),
    "checksum": lambda base: edit(base, "sha256", None),
}


FILES = {
    "model.safetensors": [CHANGES[name] for name in ("a bit", "cut", "longer", "of the other")],
    "config.json": [CHANGES[name] for name in ("config", "not quantized")],
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_folder_that_was_changed_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: Callable[[Path], object]
) -> None:
    for mode in MODES:
        shutil.copytree(folder / mode, tmp_path / mode)
    assert model_fingerprint(str(tmp_path / "4bit")) == model_fingerprint(str(folder / "base"))
    change(tmp_path / "4bit")
    assert model_fingerprint(str(tmp_path / "4bit")) != model_fingerprint(str(folder / "base"))
    told = refused(capsys, "generate", "-m", tmp_path / "4bit", "--prompt", "x")
    assert "changed or damaged since" in told or "is damaged" in told
    assert cli.main(["inspect", str(tmp_path / "4bit")]) != 0
    said = capsys.readouterr().out
    assert "damaged" in said
    assert said.count("fault:") == 1
    kind = "model.safetensors" if change in FILES["model.safetensors"] else "config.json"
    if change in (*FILES["model.safetensors"], *FILES["config.json"]):
        assert f"4bit: {kind} is not as prepare wrote it" in told
        assert f"4bit: {kind} is not as prepare wrote it" in said


def test_a_record_of_an_older_release_opens(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(folder / "4bit", tmp_path / "4bit"))
    old = json.loads((base / PREPARED).read_text())
    del old["sha256"], old["files"]
    (base / PREPARED).write_text(json.dumps(old | {"format": 1}))
    assert model_fingerprint(str(base)) == model_fingerprint(str(folder / "base"))
    words = ["--prompt", "x", "--max_new_tokens", "2"]
    assert cli.main(["generate", "-m", str(base), *words]) == 0
    assert cli.main(["inspect", str(base)]) == 0
    assert str(folder / "base") in capsys.readouterr().out
    (base / "tokenizer.json").unlink()
    assert cli.main(["inspect", str(base)]) == 2
    assert f"{base} has no tokenizer.json" in capsys.readouterr().out


def test_a_change_between_the_samples_of_a_large_file_is_found(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from falcon_qlora.models import fingerprint

    base = Path(shutil.copytree(folder / "4bit", tmp_path / "4bit"))
    monkeypatch.setattr(fingerprint, "_WHOLE_BYTES", 0)
    monkeypatch.setattr(fingerprint, "_SAMPLES", 2)
    rewrite(base, content=fingerprint.content_hash(base))
    content = bytearray((base / "model.safetensors").read_bytes())
    content[1_500_000] ^= 1
    (base / "model.safetensors").write_bytes(content)
    assert fingerprint.content_hash(base) == json.loads((base / PREPARED).read_text())["content"]
    told = refused(capsys, "generate", "-m", base, "--prompt", "x")
    assert ".weight is not as prepare wrote it" in told


def test_a_disk_that_fills_leaves_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for room in (10_000, 3_000_000):
        with room_for(room):
            assert prepare("-m", "tiny", "--output_dir", tmp_path / "out") != 0
        assert only_message(capsys.readouterr().err) == f"{tmp_path}/out/model.safetensors: File too large"
        assert contents(tmp_path) == {}


def test_too_little_room_is_told_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Preparation, "needed_bytes", lambda _: 2**60)
    told = refused(capsys, "prepare", "-m", "tiny", "--output_dir", tmp_path / "out")
    assert "the prepared base needs 1073741824.00 GiB" in told
    assert contents(tmp_path) == {}


def test_only_a_prepared_base_is_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = Path(shutil.copytree(folder / "4bit", tmp_path / "out"))
    words = ["prepare", "-m", "tiny", "-q", "8bit", "--output_dir"]
    assert "exists already" in refused(capsys, *words, out)
    assert "not a prepared base" in refused(capsys, *words, tmp_path, "--overwrite")
    assert "give -q 4bit or 8bit" in refused(capsys, *words[:3], "-q", "16bit", *words[5:], tmp_path / "new")
    assert "into a folder, not a URL" in refused(capsys, *words, "s3://bucket/base")
    assert cli.main([*words, str(out), "--overwrite"]) == 0
    assert json.loads((out / "config.json").read_text())["quantization_config"]["load_in_8bit"]


def test_tokenizer_generation_config_and_template_come_along(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(tiny_path(), tmp_path / "base"))
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": [0, 5], "temperature": 0.5}))
    assert prepare("-m", base, "--output_dir", tmp_path / "out", "--dataset_name", "no such rows") == 0
    assert "prepare with --output_dir does not use --dataset_name" in capsys.readouterr().err
    for name in ("chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes()
    assert json.loads((tmp_path / "out/generation_config.json").read_text())["eos_token_id"] == [0, 5]
    assert cli.main(["generate", "-m", str(tmp_path / "out"), "--prompt", "x", "--max_new_tokens", "2"]) == 0


@pytest.mark.parametrize("others", [[], ["tokenizer_config.json"], [PREPARED]])
def test_without_its_tokenizer_a_base_is_not_whole(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], others: list[str]
) -> None:
    base = Path(shutil.copytree(folder / "4bit", tmp_path / "4bit"))
    for name in ("tokenizer.json", *others):
        (base / name).unlink()
    capsys.readouterr()
    assert cli.main(["inspect", str(base)]) == 2
    assert f"fault: {base} has no tokenizer.json" in capsys.readouterr().out
    told = refused(capsys, "generate", "-m", base, "--prompt", "x")
    assert told.startswith(f"{base} has no tokenizer.json: name a ")


def test_inspect_knows_it(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    assert cli.main(["inspect", str(folder / "4bit")]) == 0
    told = capsys.readouterr().out
    assert "4bit with double quantization" in told
    assert f"{folder / 'base'}" in told
    others = Path(shutil.copytree(folder / "8bit", tmp_path / "others"))
    (others / PREPARED).unlink()
    assert cli.main(["inspect", str(others)]) == 0
    tensors = load_file(others / "model.safetensors")
    del tensors["transformer.h.2.mlp.dense_4h_to_h.SCB"], tensors["transformer.ln_f.weight"]
    save_file(tensors, others / "model.safetensors", metadata={"format": "pt"})
    capsys.readouterr()
    assert cli.main(["inspect", str(others)]) != 0
    assert "dense_4h_to_h.SCB is missing" in capsys.readouterr().out


def test_what_quantizes_needs_the_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["-m", "tiny", "--dataset_name", "sample", "--max_rows", "20", "--cache_dir", tmp_path]
    assert prepare(*words, "-q", "8bit") == 0
    assert "prepare without --output_dir does not use --quantize_mode" in capsys.readouterr().err


def test_made_up_weights_are_prepared_by_their_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "random:falcon3-1b?num_hidden_layers=1,vocab_size=4096,hidden_size=64,intermediate_size=64,seed=3"
    assert prepare("-m", name, "--output_dir", tmp_path / "out") == 0
    assert "no tokenizer of its own" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / PREPARED).read_text())["origin"] == name
    assert model_fingerprint(str(tmp_path / "out")) == model_fingerprint(name)
    assert prepare("-m", name, "--output_dir", tmp_path / "b", "--tokenizer_name_or_path", "tiny") == 0
    assert (tmp_path / "b/tokenizer.json").read_bytes() == (tiny_path() / "tokenizer.json").read_bytes()
    one, other = ((tmp_path / each / "model.safetensors").read_bytes() for each in ("out", "b"))
    assert one == other


@pytest.fixture
def processes(tmp_path: Path) -> Iterator[Processes]:
    found = Processes(tmp_path)
    yield found
    found.end()


LARGER = "random:falcon3-1b?num_hidden_layers=6,vocab_size=4096,hidden_size=512,intermediate_size=2048"
WORDS = ["falcon_qlora", "prepare", "-m", LARGER, "--output_dir", "out/base"]


def at_work(processes: Processes) -> subprocess.Popen[str]:
    """A `prepare` that has begun to write."""
    process = processes.start(*WORDS)
    deadline = time.monotonic() + 120
    while not [*processes.folder.glob("out/.base-partial-*/model.safetensors")]:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    return process


@pytest.mark.slow
def test_interrupted_it_leaves_nothing_and_killed_nothing_that_counts(processes: Processes) -> None:
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        process = at_work(processes)
        os.kill(process.pid, number)
        process.communicate(timeout=60)
        assert process.returncode != 0
        assert processes.none_left(within_s=2.0)
        assert not (processes.folder / "out/base").exists()
        if number != signal.SIGKILL:
            assert [*(processes.folder / "out").iterdir()] == []
    process = processes.start(*WORDS)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, (output, errors)
    assert [path.name for path in (processes.folder / "out").iterdir()] == ["base"]


@pytest.mark.slow
def test_of_two_at_once_the_second_is_refused(processes: Processes) -> None:
    first = at_work(processes)
    os.kill(first.pid, signal.SIGSTOP)
    second = processes.start(*WORDS)
    output, errors = second.communicate(timeout=120)
    os.kill(first.pid, signal.SIGCONT)
    assert second.returncode == 2, (output, errors)
    assert "another process is writing this prepared base" in errors
    output, errors = first.communicate(timeout=240)
    assert first.returncode == 0, (output, errors)
    assert [path.name for path in (processes.folder / "out").iterdir()] == ["base"]
