"""``eval --tasks``: what lm-evaluation-harness is handed, by a stand-in with the interface of 0.4.13."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from falcon_qlora import __main__ as cli
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.layouts import attach_lora

TEXT = "The opposite of hot is cold."

# As lm_eval does: a loaded model is taken as it is and called with token ids alone.
FILES = {
    "__init__.py": """
from lm_eval.models.huggingface import HFLM

def simple_evaluate(model, tasks, task_manager, log_samples):
    assert type(model) is HFLM
    assert not log_samples
    if "unreachable" in tasks:
        raise ConnectionError("Couldn't reach 'some/data' on the Hub")
    loss = model.loglikelihood("The opposite of hot is cold.")
    return {"results": {task: {"alias": task, "acc,none": loss, "acc_stderr,none": "N/A"} for task in tasks}}
""",
    "tasks/__init__.py": """
import fnmatch

class TaskManager:
    all_tasks = ["arc_easy", "arc_challenge", "hellaswag", "unreachable"]

    def match_tasks(self, names):
        return [task for task in self.all_tasks if any(fnmatch.fnmatch(task, name) for name in names)]
""",
    "models/__init__.py": "",
    "models/huggingface.py": """
import torch
import transformers

class HFLM:
    def __init__(self, pretrained, *, tokenizer, batch_size, max_length):
        assert isinstance(tokenizer, transformers.PreTrainedTokenizerFast)
        assert pretrained.config.model_type == "falcon"
        assert (batch_size, max_length) == (4, 128)
        self.model, self.tokenizer = pretrained, tokenizer
        self.model.tie_weights()
        assert not self.model.training

    def loglikelihood(self, text):
        ids = torch.tensor([self.tokenizer(text)["input_ids"]], device=self.model.device)
        with torch.no_grad():
            scores = self.model(ids).logits[0, :-1].log_softmax(-1)
        return scores.gather(-1, ids[0, 1:, None]).sum().item()
""",
}


@pytest.fixture
def lm_eval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in FILES.items():
        file = tmp_path / "site" / "lm_eval" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "lm_eval"]:
        del sys.modules[name]


@pytest.mark.usefixtures("lm_eval")
def test_tasks_are_run_on_the_base_with_the_adapter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = attach_lora(load_model("tiny", quantize_mode="8bit", device="cpu"), r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.02, generator=torch.Generator().manual_seed(0))
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    (tmp_path / "adapter" / "falcon_qlora.json").write_text('{"base_model": "tiny", "quantize_mode": "8bit"}')

    expected = []
    for loaded in (
        load_adapter(tmp_path / "adapter", quantize_mode="8bit", device="cpu"),
        load_model("tiny", quantize_mode="8bit", device="cpu"),
    ):
        ids = load_tokenizer("tiny")(TEXT, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected.append(-loaded(ids, labels=ids).loss.item() * (ids.shape[1] - 1))
    assert abs(expected[0] - expected[1]) > 0.1

    words = ["--max_length", "128", "--tasks", "arc_*,hellaswag", "--results", str(tmp_path / "figures.json")]
    for which, score in zip(
        (["--adapter", str(tmp_path / "adapter")], ["-m", "tiny", "-q", "8bit"]), expected, strict=True
    ):
        assert cli.main(["eval", *which, *words]) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert figures == {
            f"{task} acc": pytest.approx(score, rel=1e-5)
            for task in ("arc_easy", "arc_challenge", "hellaswag")
        }
        assert "arc_easy acc" in capsys.readouterr().out
    assert cli.main(["eval", "-m", "tiny", "--compute_dtype", "fp8", *words]) == 0
    assert "in bfloat16" in capsys.readouterr().out


@pytest.mark.usefixtures("lm_eval")
@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("arc_eazy", "has no 'arc_eazy' (did you mean arc_easy?)"),
        ("hellaswag --most_tokens 9", "--most_tokens does nothing with --tasks"),
        ("hellaswag,unreachable", "Couldn't reach 'some/data'"),
    ],
)
def test_tasks_that_cannot_run_are_told(tasks: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["eval", "-m", "tiny", "--max_length", "128", "--tasks", *tasks.split()]) == 2
    assert told in capsys.readouterr().err


def test_without_the_harness_it_says_what_to_install(capsys: pytest.CaptureFixture[str]) -> None:
    if importlib.util.find_spec("lm_eval") is not None:
        pytest.skip("it is installed")
    assert cli.main(["eval", "-m", "tiny", "--tasks", "arc_easy"]) == 2
    assert "pip install 'falcon-qlora[lm-eval]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("rows", "flags", "template"),
    [
        ("chat", "--dataset_name", "alpaca"),
        ("chat", "--eval_split", "alpaca"),
        ("chat", "--eval_split 0.5 --dataset_name", "alpaca"),
        ("chat", "--template auto --dataset_name", "falcon-instruct"),
        ("text", "--dataset_name", "none"),
    ],
)
def test_rows_that_are_named_are_written_with_the_template_of_training(
    rows: str, flags: str, template: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where it can write them; and as `--template` says where that is given."""
    model = attach_lora(load_model("tiny", device="cpu"), r=4)
    model.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    record = {"base_model": "tiny", "quantize_mode": "4bit", "template": "alpaca", "dataset_format": "alpaca"}
    (tmp_path / "adapter" / "falcon_qlora.json").write_text(json.dumps(record))
    file = tmp_path / "rows.jsonl"
    with file.open("w") as lines:
        for answer in ("Marta.", "Anna."):
            turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": answer}]
            print(json.dumps({"chat": {"messages": turns}, "text": {"text": answer}}[rows]), file=lines)
    words = ["eval", "--adapter", str(tmp_path / "adapter"), *flags.split(), str(file), "--results"]

    def figures(name: str, *more: str) -> str:
        assert cli.main([*words, str(tmp_path / name), *more]) == 0
        return (tmp_path / name).read_text()

    own = figures("own")
    told = capsys.readouterr().err
    assert (f"note: {file}: written with template none, as alpaca, with which" in told) == (rows == "text")
    assert ("0.5" in flags) or f"note: format {rows}, template {template}\n" in told
    assert own == figures("named", "--template", template)


def test_a_first_document_of_more_tokens_than_are_asked_for_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Documents are measured whole: as many as have no more tokens together, and the first."""
    texts = [TEXT, f"{TEXT} {TEXT}", "No."]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = load_tokenizer("tiny")
    first, second, third = (len(tokenizer(text)["input_ids"]) + 1 for text in texts)  # and the end token
    for asked, documents, tokens in (
        (5, 1, first - 1),
        (first, 1, first - 1),
        (first + second - 1, 1, first - 1),
        (first + second, 2, first + second - 2),
        (1000, 3, first + second + third - 3),
    ):
        words = ["--dataset_name", str(tmp_path / "rows.jsonl"), "--results", str(tmp_path / "figures.json")]
        assert cli.main(["eval", "-m", "tiny", *words, "--most_tokens", str(asked)]) == 0
        figures = json.loads((tmp_path / "figures.json").read_text())
        assert (figures["documents"], figures["tokens"]) == (documents, tokens)
        told = f"note: --most_tokens 5: the first document has {first} tokens, and is measured whole\n"
        errors = capsys.readouterr().err
        assert (told in errors) == ("is measured whole" in errors) == (asked == 5)
