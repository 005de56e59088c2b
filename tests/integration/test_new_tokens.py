"""Tokens of one's own through the command line: trained, resumed, asked, merged."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, AutoTokenizer

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.models.tiny import tiny_path
from tests.integration.runs import metrics, write_jsonl

TOKENS = ["<|so|>", "[YES]"]
ROWS = "base_model.model.transformer.word_embeddings.token_adapter.trainable_tokens_delta"
STEPS, HALF = 24, 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run in which every answer begins with both tokens."""
    folder = tmp_path_factory.mktemp("new_tokens")
    rows = [
        {"prompt": f"Say {number}.", "completion": f"<|so|>[YES] It is {number}."} for number in range(48)
    ]
    return falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(folder / "rows.jsonl", rows),
        new_tokens=TOKENS,
        output_dir=folder / "run",
        max_length=64,
        max_steps=STEPS,
        save_steps=HALF,
        logging_steps=1,
        learning_rate=1e-2,
        lora_r=4,
        per_device_train_batch_size=4,
        eval_split=0.25,
        report_to="none",
        cache_dir=folder / "cache",
    )


def first_token(model: torch.nn.Module, ids: list[int]) -> int:
    with torch.no_grad():
        return int(model(torch.tensor([ids])).logits[0, -1].argmax())


def test_the_model_answers_with_the_tokens_and_every_reader_finds_them(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, size = run / "adapter", len(AutoTokenizer.from_pretrained(tiny_path()))
    assert load_file(adapter / "adapter_model.safetensors")[ROWS].shape == (2, 256)
    assert json.loads((adapter / "adapter_config.json").read_text())["trainable_token_indices"] == [
        size,
        size + 1,
    ]
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == [size, size + 1]
    prompt = tokenizer("<|so|>", add_special_tokens=False)["input_ids"]
    ours = falcon_qlora.load_adapter(adapter, device="cpu", quantize_mode="16bit", compute_dtype="fp32")
    assert first_token(ours, prompt) == size + 1, "the second token follows the first"

    for words in (
        ["inspect", run],
        ["generate", "--adapter", run, "--prompt", "Say 3.", "--max_new_tokens", "9"],
    ):
        assert cli.main([*map(str, words)]) == 0
    told = capsys.readouterr().out
    assert "rows of the new tokens <|so|>, [YES] in embedding and head" in told
    assert "It is" in told
    assert cli.main(["eval", "--adapter", str(run)]) == 0

    limits = ["--max_loss_increase", "9", "--max_kl_divergence", "9", "--held_out_tokens", "200"]
    words = ["--adapter", str(run), "--out", str(tmp_path / "merged"), "--base", "16bit", "--dtype", "fp32"]
    assert cli.main(["merge", *words, *limits]) == 0
    plain = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)
    plain.resize_token_embeddings(size + 2)
    opened = PeftModel.from_pretrained(plain, adapter).eval()
    ids = torch.tensor([tokenizer("Say 3.<|so|>[YES] It")["input_ids"]])
    with torch.no_grad():
        expected = opened(ids).logits
        oracle = opened.merge_and_unload()(ids).logits
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
        assert_close(merged(ids).logits, oracle, rtol=1e-4, atol=1e-4)
        assert_close(oracle, expected, rtol=1e-3, atol=1e-3)
        assert_close(ours(ids).logits, expected, rtol=1e-3, atol=1e-3)
    assert merged.config.vocab_size == size + 2
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids(TOKENS) == [
        size,
        size + 1,
    ]
    capsys.readouterr()
    words = ["-m", str(tmp_path / "merged"), "--prompt", "Say 3.", "--max_new_tokens", "9"]
    assert cli.main(["generate", *words]) == 0


def test_a_resumed_run_is_the_same_run_and_other_tokens_are_another(run: Path, tmp_path: Path) -> None:
    again = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(again / "checkpoints" / f"step-{STEPS}")
    shutil.rmtree(again / "adapter")
    with pytest.raises(UserError, match="new_tokens was"):
        falcon_qlora.train(resume=again, new_tokens=["<|other|>"])
    falcon_qlora.train(resume=again)
    before, after = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (run, again))
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert [line["loss"] for line in metrics(again) if "loss" in line] == [
        line["loss"] for line in metrics(run) if "loss" in line
    ]


def test_new_tokens_that_no_row_has_are_named_at_the_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Under a template of its own a row's text stays text.
    rows = [{"instruction": f"Say {number}.", "output": f"[YES] {number}."} for number in range(8)]
    falcon_qlora.train(
        model_name_or_path="tiny",
        dataset_name=write_jsonl(tmp_path / "rows.jsonl", rows),
        new_tokens=TOKENS,
        output_dir=tmp_path / "run",
        max_length=64,
        max_steps=1,
        report_to="none",
        cache_dir=tmp_path / "cache",
    )
    told = " ".join(capsys.readouterr().out.split())
    assert "no document has <|so|>, [YES]: what no template writes is not trained" in told
    assert "8 rows hold text that looks like special tokens; it stays text" in told
