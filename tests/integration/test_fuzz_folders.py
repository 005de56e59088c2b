"""Runs, checkpoints, adapters and merges changed at random, as the commands after training read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora import __main__ as cli
from falcon_qlora.bench.scaling import Row, read_run
from falcon_qlora.commands import eval as evaluating
from falcon_qlora.commands import generate, opening
from falcon_qlora.common.untrusted import of_a_run, refuse_links
from falcon_qlora.compare.figures import Compared
from falcon_qlora.compare.report import Comparison
from falcon_qlora.config.configuration import parse
from falcon_qlora.data.templates import template_fingerprint
from falcon_qlora.inference import base_and_adapter
from falcon_qlora.methods.open_adapter import load_adapter  # noqa: F401  # imported before memory is limited
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.training import held_out
from tests.fuzzing import SECRET, change, fresh_copy, fuzz, read_or_refused

OF_A_RUN = [
    *("config.yaml", "data.json", "summary.json", "kernels.json", "metrics.jsonl", "environment.json"),
    *("trackers.json", "samples.jsonl"),
]
# What has a checksum in a manifest or certificate, or is checked tensor by tensor, as far as may be told.
NOT_PROVED = ("README.md", "certificate.json", "manifest.json")
FOLDERS = ["run", "full", "streamed", "merged", "run/adapter", "full/adapter", "streamed/checkpoints/step-2"]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def is_altered(file: Path, before: bytes) -> bool:
    return not file.is_file() or file.stat().st_size != len(before) or file.read_bytes() != before


def run_command(folder: Path, words: list[str], capsys: Any) -> tuple[int, str]:
    """The exit status of a command and all it said; 0 and 2 are the only ones it may end with."""
    capsys.readouterr()

    def run() -> tuple[int, Any]:
        return cli.main(words), capsys.readouterr()

    status, printed = read_or_refused(folder, run)
    said = printed.out + printed.err
    assert status in (0, 2), said
    assert "Traceback" not in said
    assert len(said) < 20_000
    if status:
        assert "fault: " in said or "error: " in said
    return status, said


@fuzz(20)
@given(data=st.data(), name=st.sampled_from(FOLDERS))
def test_inspect(written, scratch, capsys, data, name):
    folder = fresh_copy(written / name, scratch)
    file = folder / data.draw(st.sampled_from(files_in(folder)))
    before = file.read_bytes()
    change(data.draw, file)
    status, said = run_command(folder, ["inspect", str(folder)], capsys)
    of_manifest = file.parent != folder or "/" in name
    proved = of_manifest or (name == "merged" and file.suffix != ".safetensors")
    if proved and file.name not in NOT_PROVED and is_altered(file, before):
        assert status == 2, said


@fuzz(2)
@given(data=st.data(), verb=st.sampled_from(["generate", "eval", "merge"]))
def test_commands(written, scratch, capsys, data, verb):
    folder = fresh_copy(written / "run", scratch)
    of_the_adapter = [f"adapter/{name}" for name in files_in(folder / "adapter")]
    change(data.draw, folder / data.draw(st.sampled_from([*OF_A_RUN, *of_the_adapter])))
    flags = {
        "generate": ["--prompt", "x", "--max_new_tokens", "1"],
        "eval": ["--results", str(folder.parent / "results.json")],
        "merge": ["--out", str(folder.parent / "out"), "--base", "dequantized"],
    }[verb]
    run_command(folder, [verb, "--adapter", str(folder), *flags], capsys)


def before_generate(folder: Path) -> None:
    words = ["--prompt", "x", "--adapter", str(folder)]
    configuration = parse(words, extra_arguments=generate.GenerateArguments)
    _, record = opening.source_of(
        configuration, base_and_adapter.adapter_folder(str(folder)), named=configuration.explicit
    )
    generate._template(configuration, record, None)


def before_eval(folder: Path) -> None:
    words = ["--adapter", str(folder)]
    configuration, named, adapter, run = opening.parse_with_run(
        words, verb="eval", extra_arguments=evaluating.EvalArguments
    )
    source, _ = opening.source_of(configuration, adapter, named=named)
    held_out.data_record(run)
    base_and_adapter.tokenizer_of(source)


def compare(folder: Path) -> None:
    """What `falcon-qlora compare` makes of the figures of a run."""
    run = Compared(name="lora", folder=folder, command="falcon-qlora train")
    report = Comparison(title="t", compared=[run])
    report.markdown()
    report.write(folder.parent)


def bench(folder: Path) -> None:
    row = Row(name="ours", model="tiny", quantize_mode="4bit", gpus=1, work="packed", flags=())
    with of_a_run(folder):
        read_run(row, RunDirectory(folder), warmup=0)


def record(folder: Path) -> None:
    """What a run that goes on does with its own record."""
    refuse_links(folder)  # as the command does where it reads the settings
    directory = RunDirectory(folder)
    directory.drop_metrics_after(1)
    directory.draw_loss()
    directory.tracker_record("wandb")
    directory.write_tracker_record("wandb", {"id": "x"})


@fuzz(15)
@given(
    data=st.data(),
    read=st.sampled_from([before_generate, before_eval, compare, bench, record]),
    name=st.sampled_from(["run", "full"]),
)
def test_readers(written, scratch, data, read, name):
    folder = fresh_copy(written / name, scratch)
    figures = read in (compare, bench, record)
    adapter = [] if figures else [f"adapter/{file}" for file in files_in(folder / "adapter")]
    file = folder / data.draw(st.sampled_from([*OF_A_RUN, *adapter]))
    if file.exists():
        change(data.draw, file)
    read_or_refused(folder, lambda: read(folder), or_about=("--template", "unknown recipe"))


@pytest.mark.parametrize("read", [before_generate, before_eval, compare, bench, record])
def test_what_is_good_is_read(written, tmp_path, read):
    read(fresh_copy(written / "run", tmp_path))


@pytest.mark.parametrize(
    "name",
    "config.yaml data.json adapter/adapter_config.json adapter/tokenizer.json trainer_state.json".split(),
)
def test_a_link_out_of_the_folder_is_not_followed(written, tmp_path, capsys, name):
    folder = fresh_copy(written / "run", tmp_path)
    file = folder / ("checkpoints/step-2" if name == "trainer_state.json" else ".") / name
    file.rename(folder.parent / SECRET)
    file.symlink_to(folder.parent / SECRET)
    status, said = run_command(folder, ["inspect", str(file.parent)], capsys)
    assert (status, "is a link that leads out of" in said) == (2, True)
    if "checkpoints" not in file.parts:
        words = ["merge", "--adapter", str(folder), "--out", str(folder.parent / "out")]
        status, said = run_command(folder, words, capsys)
        assert (status, "is a link that leads out of" in said) == (2, True)
    # A folder may be one: checkpoints lie on another disk at times.
    file.unlink()
    (folder.parent / SECRET).rename(file)
    (folder / "checkpoints").rename(folder.parent / "elsewhere")
    (folder / "checkpoints").symlink_to(folder.parent / "elsewhere")
    assert run_command(folder, ["inspect", str(folder)], capsys)[0] == 0


def test_a_template_of_this_machine_is_not_opened_for_an_adapter(written, tmp_path, capsys):
    folder = fresh_copy(written / "run", tmp_path)
    file = folder / "adapter" / "falcon_qlora.json"
    (folder.parent / "mine.jinja").write_text("{{ messages[0]['content'] }}")
    record = json.loads(file.read_text()) | {"template": str(folder.parent / "mine.jinja")}
    file.write_text(json.dumps(record))
    words = ["generate", "--adapter", str(folder), "--prompt", "x", "--max_new_tokens", "1"]
    status, said = run_command(folder, words, capsys)
    assert (status, "records no fingerprint of what it" in said) == (2, True)
    assert run_command(folder, [*words, "--template", record["template"]], capsys)[0] == 0
    # Who has had it open may name it, as a run on this machine.
    file.write_text(json.dumps(record | {"template_fingerprint": template_fingerprint(record["template"])}))
    assert run_command(folder, words, capsys)[0] == 0
