"""A dry run on a GPU: the kernels that a run uses, against the model's own forward and their plain forms."""

from __future__ import annotations

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
