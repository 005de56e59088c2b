"""Runs, checkpoints, adapters and merges changed at random, as the commands after training read them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from falcon_qlora import __main__ as cli
from falcon_qlora.assembly import adapted, held_out
from falcon_qlora.bench.scaling import read_run
from falcon_qlora.commands import eval as evaluating
from falcon_qlora.commands import generate
from falcon_qlora.config.configuration import parse
from falcon_qlora.run_directory import RunDirectory
from tests.fuzzing import change, fresh_copy, fuzz, read_or_refused

RUN_FILES = [
    "config.yaml",
    "data.json",
    "summary.json",
    "kernels.json",
    "metrics.jsonl",
    "environment.json",
    "trackers.json",
    "samples.jsonl",
]


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch")


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


@fuzz(60)
@given(
    data=st.data(),
    name=st.sampled_from(["run", "full", "streamed", "merged", "run/adapter", "streamed/checkpoints/step-2"]),
)
def test_inspect(written, scratch, capsys, data, name):
    folder = fresh_copy(written / name, scratch)
    file = folder / data.draw(st.sampled_from(files_in(folder)))
    before = file.read_bytes()
    change(data.draw, file)
    capsys.readouterr()

    def inspect() -> tuple[int, Any]:
        return cli.main(["inspect", str(folder)]), capsys.readouterr()

    status, printed = read_or_refused(folder, inspect)
    said = printed.out + printed.err
    assert status in (0, 2), said
    assert "Traceback" not in said
    if status:
        assert "fault: " in said or "error: " in said
    assert len(said) < 20_000


# What `generate`, `eval` and `merge` do before the model is loaded.
def before_generate(folder: Path) -> None:
    adapter = adapted.adapter_folder(str(folder))
    configuration = parse(
        ["--prompt", "x", "--adapter", str(folder)], extra_arguments=generate.GenerateArguments
    )
    record = adapted.read_trained(configuration, adapter, named=configuration.explicit)
    generate._template(configuration, record)


def before_eval(folder: Path) -> None:
    adapter = adapted.adapter_folder(str(folder))
    run = adapted.run_of(adapter)
    configuration, named = adapted.parse_with_run(
        ["--adapter", str(folder)], run, extra_arguments=evaluating.EvalArguments
    )
    record = adapted.read_trained(configuration, adapter, named=named)
    held_out.data_record(run)
    adapted.tokenizer_of(configuration, record)


def bench(folder: Path) -> None:
    try:
        read_run(None, RunDirectory(folder), warmup=0)
    except Exception:
        raise


COMMANDS = [before_generate, before_eval]


@fuzz(60)
@given(data=st.data(), command=st.sampled_from(COMMANDS), name=st.sampled_from(["run", "full"]))
def test_before(written, scratch, data, command, name):
    folder = fresh_copy(written / name, scratch)
    file = folder / data.draw(
        st.sampled_from([*RUN_FILES, *(f"adapter/{f}" for f in files_in(folder / "adapter"))])
    )
    if not file.exists():
        return
    change(data.draw, file)
    read_or_refused(folder, lambda: command(folder))
