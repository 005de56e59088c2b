"""What a run leaves is a plain PEFT adapter that was really trained."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import falcon_qlora
from falcon_qlora.common.errors import UserError
from falcon_qlora.data.corpus import prepare_corpora
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from falcon_qlora.step import loss as step_loss
from tests.integration.runs import metrics, write_jsonl
from tests.layouts import attach_lora

TEXTS = [
    "The cat sleeps.",
    "A river runs through the old town, past the mill and under two stone bridges, to the sea.",
    "Blue.",
    "One and one is two, and two and two is four.",
    "Hello! How are you today? I am well, thank you.",
    "Yes.",
]

# A rate that moves what is zero, and changes no loss.
TOO_LITTLE = 1e-20


def fine_tune(folder: Path, **settings: object) -> Path:
    rows = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in TEXTS])
    defaults: dict[str, object] = {
        "model_name_or_path": "tiny",
        "quantize_mode": "16bit",
        "dataset_name": rows,
        "output_dir": folder / "run",
        "max_length": 64,
        "max_steps": 3,
        "warmup_steps": 0,
        "learning_rate": 1e-2,
        "per_device_train_batch_size": 2,
        "report_to": "none",
        "cache_dir": folder / "cache",
    }
    return falcon_qlora.train(**defaults | settings)


def test_plain_peft_on_plain_transformers_gives_the_same_logits(tmp_path: Path) -> None:
    targets = ["query_key_value", "dense_h_to_4h"]
    run = fine_tune(tmp_path, lora_r=16, lora_alpha=24, lora_target_modules=targets)
    record = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert (record["r"], record["lora_alpha"]) == (16, 24)
    assert set(record["target_modules"]) == set(targets)
    ids = load_tokenizer("tiny")(TEXTS[1], return_tensors="pt")["input_ids"]
    base = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    with torch.no_grad():
        before = base(ids).logits
        plain = PeftModel.from_pretrained(base, run / "adapter").eval()(ids).logits
        ours = load_adapter(run / "adapter", quantize_mode="16bit")(ids).logits
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)
    assert (plain - before).abs().max() > 0.1, "the adapter changes nothing"


@pytest.mark.parametrize("quantize_mode", ["4bit", "8bit", "16bit"])
def test_every_trained_tensor_is_float32_and_has_moved(tmp_path: Path, quantize_mode: str) -> None:
    run = fine_tune(tmp_path, quantize_mode=quantize_mode, seed=5)
    model = load_model("tiny", quantize_mode=quantize_mode)
    started = attach_lora(model, r=64, alpha=16, seed=5).state_dict()
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    assert len(trained) == 2 * 4 * model.config.num_hidden_layers
    for name, weight in trained.items():
        assert weight.dtype == torch.float32
        layer, matrix = name.rsplit(".", 2)[0], name.rsplit(".", 2)[1]
        start = started[f"{layer}.{matrix}.default.weight" if matrix.startswith("lora") else name]
        assert (weight != start).float().mean() > 0.9, f"{name} has hardly moved"


def test_packed_and_padded_losses_are_those_of_each_document_alone(tmp_path: Path) -> None:
    """The oracle is Transformers' own Falcon in float32, a document at a time."""
    tokenizer = load_tokenizer("tiny")
    base = AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32).eval()
    total, targets = 0.0, 0
    for text in TEXTS:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = base(ids, labels=ids).loss.item()
        total, targets = total + loss * (ids.shape[1] - 1), targets + ids.shape[1] - 1
    shared = {"max_steps": 1, "global_batch_size": len(TEXTS), "logging_steps": 1}
    packed = metrics(fine_tune(tmp_path, **shared, packing=True))
    longest = metrics(fine_tune(tmp_path, **shared, packing=False, output_dir=tmp_path / "longest"))
    full = metrics(
        fine_tune(tmp_path, **shared, packing=False, padding="max_length", output_dir=tmp_path / "full")
    )
    for lines in (packed, longest, full):
        assert lines[0]["loss"] == pytest.approx(total / targets, rel=1e-5)
        assert lines[0]["grad_norm"] == pytest.approx(packed[0]["grad_norm"], rel=1e-4)


def test_held_out_loss_is_the_mean_over_its_tokens_and_the_best_adapter_is_kept(tmp_path: Path) -> None:
    held_out = write_jsonl(tmp_path / "held_out.jsonl", [{"text": text} for text in TEXTS[:4]])
    run = fine_tune(
        tmp_path, max_steps=8, learning_rate=0.1, eval_split=held_out, eval_steps=2, logging_steps=2
    )
    lines = metrics(run)
    assert [line["step"] for line in lines] == [2, 4, 6, 8]
    assert all("loss" in line and "eval_loss" in line for line in lines)
    best = min(lines, key=lambda line: line["eval_loss"])
    summary = json.loads((run / "summary.json").read_text())
    assert (summary["best_step"], summary["best_eval_loss"]) == (best["step"], best["eval_loss"])
    assert (run / "checkpoints" / f"step-{best['step']}").is_dir()
    tokenizer = load_tokenizer("tiny")
    model = load_adapter(run / "adapter", quantize_mode="16bit")
    total, targets = 0.0, 0
    for text in TEXTS[:4]:
        ids = torch.tensor([tokenizer(text)["input_ids"] + [tokenizer.eos_token_id]])
        with torch.no_grad():
            loss = model(input_ids=ids, labels=ids).loss.item()
        total, targets = total + loss * (ids.shape[1] - 1), targets + ids.shape[1] - 1
    assert best["eval_loss"] == pytest.approx(total / targets, rel=1e-4)


def test_an_evaluation_whose_memory_runs_out_is_done_in_smaller_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"learning_rate": TOO_LITTLE, "eval_split": 0.7, "eval_steps": 1, "max_steps": 1}
    whole = fine_tune(tmp_path, **settings)
    real = step_loss.sum_of_losses

    def scarce(model: torch.nn.Module, batch: MicroBatch) -> torch.Tensor:
        if not torch.is_grad_enabled() and len(batch.lengths) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return real(model, batch)

    monkeypatch.setattr(step_loss, "sum_of_losses", scarce)
    pieces = fine_tune(tmp_path, **settings, output_dir=tmp_path / "pieces")
    assert metrics(pieces)[-1]["eval_loss"] == pytest.approx(metrics(whole)[-1]["eval_loss"], rel=1e-6)


def test_a_run_leaves_exactly_its_record(tmp_path: Path) -> None:
    run = fine_tune(tmp_path, max_steps=2, save_steps=1, save_total_limit=1)
    assert {path.name for path in run.iterdir()} == {
        "adapter",
        "checkpoints",
        "config.yaml",
        "data.json",
        "environment.json",
        "kernels.json",
        "loss.png",
        "metrics.jsonl",
        "summary.json",
    }
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-2"]
    adapter = {path.name for path in (run / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md", "falcon_qlora.json"} <= adapter
    assert "tokenizer.json" in adapter
    assert not any(name.endswith((".bin", ".pt", ".pth")) for name in adapter)


def test_the_end_token_is_trained_and_the_prompt_is_not(tmp_path: Path) -> None:
    rows = write_jsonl(tmp_path / "rows.jsonl", [{"prompt": "Say yes: ", "completion": "yes"}])
    tokenizer = load_tokenizer("tiny")
    corpus, _ = prepare_corpora(
        dataset_name=[str(rows)],
        max_length=64,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        cache_dir=tmp_path / "cache",
    )
    row = corpus.dataset[0]
    trained = [token for token, target in zip(row["input_ids"], row["mask"], strict=True) if target]
    assert trained[-1] == tokenizer.eos_token_id
    assert tokenizer.decode(trained[:-1]) == "yes"


@pytest.mark.parametrize("data", [{"packing": True}, {"packing": False}, {"streaming": True}])
def test_a_resumed_run_goes_on_as_if_it_had_not_stopped(tmp_path: Path, data: dict[str, bool]) -> None:
    settings = {
        "quantize_mode": "4bit",
        "max_steps": 5,
        "save_steps": 3,
        "logging_steps": 1,
        "lora_dropout": 0.1,
        **data,
    }
    whole = fine_tune(tmp_path, **settings)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    shutil.rmtree(stopped / "checkpoints" / "step-5")
    shutil.rmtree(stopped / "adapter")
    resumed = fine_tune(tmp_path, **settings, output_dir=stopped, resume="latest")
    numbers = ("step", "loss", "grad_norm", "learning_rate", "tokens", "epoch")
    expected, lines = (
        [{name: line[name] for name in numbers} for line in metrics(run)] for run in (whole, resumed)
    )
    assert lines == expected
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (whole, resumed)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_early_stopping_ends_a_run_that_gets_no_better(tmp_path: Path) -> None:
    settings = {"learning_rate": TOO_LITTLE, "eval_split": 0.3, "eval_steps": 1, "early_stopping": 3}
    run = fine_tune(tmp_path, max_steps=9, **settings)
    assert json.loads((run / "summary.json").read_text())["steps"] == 4
    adapter = run / "adapter" / "adapter_model.safetensors"
    before = adapter.read_bytes()
    shutil.rmtree(adapter.parent)
    falcon_qlora.train(resume=run)  # its adapter had not been written: there is no step left
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert adapter.read_bytes() == before
    falcon_qlora.train(resume=run, early_stopping=5)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]


def test_early_stopping_needs_no_checkpoint(tmp_path: Path) -> None:
    settings = {"learning_rate": TOO_LITTLE, "eval_split": 0.3, "eval_steps": 1, "early_stopping": 1}
    run = fine_tune(tmp_path, **settings, save_strategy="no")
    assert json.loads((run / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("relative", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_python_opens_a_base_on_this_machine_only_for_who_can_tell_what_is_in_it(
    relative: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    base = shutil.copytree(tiny_path(), tmp_path / "base")
    run = fine_tune(
        tmp_path,
        model_name_or_path="./base" if relative else base,
        output_dir=tmp_path / "run",
        max_steps=1,
        save_strategy="steps",
        save_steps=1,
    )
    for folder in (run / "adapter", run / "checkpoints" / "step-1"):
        assert load_adapter(folder, device="cpu").name_or_path
    record = run / "adapter" / "falcon_qlora.json"
    told = json.loads(record.read_text())
    for crafted in (
        told | {"base_fingerprint": "0" * 64},
        {name: told[name] for name in told.keys() - {"base_fingerprint"}},
        told | {"base_model": "/etc"},
        told | {"base_model": "../../elsewhere"},
        told | {"base_model": "~root/model"},
    ):
        record.write_text(json.dumps(crafted))
        told_so = r"(the local folder .* give|is gone; give) base_model=FOLDER"
        with pytest.raises(UserError, match=told_so):
            load_adapter(run / "adapter", device="cpu")
    assert load_adapter(run / "adapter", base_model=str(base), device="cpu") is not None
    # PEFT's own file alone, as it comes from anywhere.
    record.unlink()
    with pytest.raises(UserError, match=r"base'? as its base model"):
        load_adapter(run / "adapter", device="cpu")
