"""The examples of the help pages, as they stand there; and that commands read the settings they declare."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest

from falcon_qlora import __main__ as cli
from falcon_qlora.commands import train as launcher
from falcon_qlora.common.settings import settings_of
from falcon_qlora.config import configuration
from falcon_qlora.config.arguments import DataArguments, ModelArguments, RunArguments
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.methods.table import METHODS
from tests.integration.runs import command, in_process

# Read before there is a configuration, or through another name; of a stream and of an adapter alone.
INDIRECT = {"recipe", "config", "device", "method", "max_steps", "adapter_sha256"}
INDIRECT |= {each.name for each in settings_of(DataArguments) if each.name.endswith("_column")}
SAMPLE = "-m tiny --dataset_name sample"


class Reads:
    """Which settings of the configurations that a command makes it reads."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        self.names: set[str] = set()
        self._watched: dict[int, Any] = {}
        for arguments in (ModelArguments, DataArguments, RunArguments, *METHODS.values()):
            self._watch(monkeypatch, arguments)
        make, reads = configuration._configuration, self.names

        class Trainer(dict[str, Any]):
            def __getitem__(self, name: str) -> Any:
                reads.add(name)
                return super().__getitem__(name)

        def watched(*arguments: Any, **how: Any) -> Any:
            made = make(*arguments, **how)
            made.trainer = Trainer(made.trainer)
            self._watched |= {id(part): part for part in (made.model, made.data, made.run, made.method)}
            return made

        monkeypatch.setattr(configuration, "_configuration", watched)

    def _watch(self, monkeypatch: pytest.MonkeyPatch, arguments: type) -> None:
        names = {each.field: each.name for each in settings_of(arguments)}
        plain = arguments.__getattribute__

        def read(part: Any, field: str) -> Any:
            copies = sys._getframe(1).f_code.co_filename == dataclasses.__file__  # `replace` uses nothing
            if field in names and id(part) in self._watched and not copies:
                self.names.add(names[field])
            return plain(part, field)

        monkeypatch.setattr(arguments, "__getattribute__", read)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("examples")


@pytest.fixture
def reads(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Reads:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(launcher, "_run_one", in_process)
    return Reads(monkeypatch)


@pytest.mark.parametrize(
    ("verb", "more"),
    [
        ("data", [f"{SAMPLE} --no_packing", f"{SAMPLE} --streaming -s 2"]),
        ("prepare", []),
        ("params", []),
        ("estimate", [f"{SAMPLE} --no_packing --gpus 2", f"{SAMPLE} --method adapter"]),
    ],
)
def test_what_looks_ahead_runs_as_its_page_says_and_reads_what_it_declares(
    reads: Reads, verb: str, more: list[str]
) -> None:
    of_training = {"resume", "output_dir", "bf16", "fp16", "gradient_checkpointing"}  # read at the parsing
    check(reads, verb, more, but=of_training if verb == "estimate" else set())


@pytest.mark.slow
def test_the_others_run_as_their_pages_say_and_read_what_they_declare(reads: Reads) -> None:
    for words in VERBS["train"].examples:
        assert cli.main(["train", *shlex.split(words)]) == 0
    stored = "-m tiny -q 4bit --double_quantization true"  # else as the run or the checkpoint says
    plain = "--prompt x --template none --dataset_format text --max_new_tokens 2"
    check(reads, "generate", [f"{stored} {plain}"])
    check(reads, "eval", [f"{stored} --dataset_name sample --most_tokens 512"])
    check(reads, "inspect", [])
    check(reads, "bench", [], but=VERBS["bench"].uses())
    # Its certificate holds the run's whole record, and the run's rows were one file's share.
    check(reads, "merge", [], but=VERBS["merge"].uses() | {"adapter", "global_batch_size"})


@pytest.mark.slow
def test_methods_are_compared_as_the_page_says(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    for words in VERBS["compare"].examples:
        done = command("compare", *shlex.split(words))
        assert done.returncode == 0, done.stderr
        assert "comparison.md" in done.stdout


def check(reads: Reads, verb: str, more: list[str], but: frozenset[str] | set[str] = frozenset()) -> None:
    reads.names.clear()
    for words in (*VERBS[verb].examples, *more):
        assert cli.main([verb, *shlex.split(words)]) == 0
    uses = VERBS[verb].uses()
    assert reads.names - uses <= but, f"{verb} reads what it does not declare"
    assert uses - reads.names <= INDIRECT | but, f"{verb} declares what it does not read"
