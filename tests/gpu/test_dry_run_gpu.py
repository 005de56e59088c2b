"""A dry run on a GPU: the kernels that a run uses, against the model's own forward and their plain forms."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from falcon_qlora import __main__ as cli

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("model", ["falcon-7b", "falcon3-1b", "falcon-h1-0.5b"])
@pytest.mark.parametrize("words", ["-q 4bit --lora_dropout 0.1", "-q 8bit", "-q 4bit --compute_dtype fp8"])
def test_the_kernels_of_a_run_are_like_their_references(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], model: str, words: str
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = f"-m random:{model} --tokenizer_name_or_path tiny --dataset_name sample"
    flags += f" --report_to none --gpus 1 -b 2 --dry_run {words}"
    assert cli.main(["train", *flags.split()]) == 0
    told = capfd.readouterr().out
    print(told)
    assert "in Triton like their references" in told
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("compute_dtype", ["auto", "fp8"])
def test_so_does_every_start(tmp_path: Path, compute_dtype: str) -> None:
    flags = "-m tiny --dataset_name sample --report_to none --gpus 1 -b 2 --max_steps 1".split()
    flags += ["--output_dir", str(tmp_path / "r"), "--compute_dtype", compute_dtype]
    assert cli.main(["train", *flags]) == 0
    check = json.loads((tmp_path / "r/summary.json").read_text())["checks"]["kernels"]
    assert check["state"] == "passed"
    assert 0 < check["gradients"] < (0.3 if compute_dtype == "fp8" else 0.1)
