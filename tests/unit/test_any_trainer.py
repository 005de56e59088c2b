"""Fast blocks under other trainers' batches: what Transformers' own forward gives, row by row."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from torch.testing import assert_close
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

import falcon_qlora
from falcon_qlora.kernels import block as kernel
from falcon_qlora.kernels import sublayer
from falcon_qlora.models.fast_path import remove_fast_path
from falcon_qlora.models.tokenizer import load_tokenizer
from tests.layouts import attach_lora, documents, tiny_model

LENGTHS = [7, 40, 1, 12]


@pytest.fixture
def ran(monkeypatch):
    """One entry for every fast block that ran."""
    entries = []
    for function in (kernel._BlockFunction, sublayer._SublayersFunction):
        original = function.forward

        def run(*args, _original=original):
            entries.append(1)
            return _original(*args)

        monkeypatch.setattr(function, "forward", staticmethod(run))
    return entries


def adapted(layout="falcon-7b", mode="4bit", **settings):
    model = attach_lora(tiny_model(layout, mode, "cpu", "fp32"), r=4, alpha=8, seed=3, **settings)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.train()


def padded(docs, side):
    """A batch as a collator makes it; a third of each row, and its first token, are no targets."""
    longest = max(map(len, docs))
    batch = {name: [] for name in ("input_ids", "attention_mask", "labels")}
    for doc in docs:
        pad = [0] * (longest - len(doc))
        first = len(doc) // 3 + 1
        labels = [-100] * first + doc.tolist()[first:]
        for name, row, filler in (
            ("input_ids", doc.tolist(), pad),
            ("attention_mask", [1] * len(doc), pad),
            ("labels", labels, [-100] * len(pad)),
        ):
            batch[name].append(filler + row if side == "left" else row + filler)
    return {name: torch.tensor(rows) for name, rows in batch.items()}


def step(model, batch):
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}
    return output, grads


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize(
    "layout", ["falcon-7b", "falcon-40b", "falcon-11b", "falcon-rw-1b", "falcon3", "falcon-h1"]
)
def test_a_padded_batch_gives_what_transformers_gives(layout, side, ran):
    model, batch = adapted(layout), padded(documents(LENGTHS), side)
    expected, expected_grads = step(model, batch)
    falcon_qlora.apply_fast_path(model)
    ours, grads = step(model, batch)
    assert len(ran) == (0 if layout == "falcon-rw-1b" else model.config.num_hidden_layers)
    assert_close(ours.loss, expected.loss, rtol=1e-5, atol=0)
    real = batch["attention_mask"].bool()
    assert_close(ours.logits[real], expected.logits[real], rtol=1e-4, atol=1e-4)
    assert not ours.logits[~real].any()
    for name, grad in grads.items():
        scale = float(expected_grads[name].abs().max())
        assert scale > 0
        assert_close(grad, expected_grads[name], rtol=1e-4, atol=1e-4 * scale, msg=name)
    remove_fast_path(model)
    again, _ = step(model, batch)
    assert torch.equal(again.logits, expected.logits)


def test_positions_that_begin_anew_are_documents_of_their_own(ran):
    model, docs = adapted(), documents(LENGTHS)
    rows = [padded([doc], "right") for doc in docs]
    alone = [model(**row).logits[0] for row in rows]
    falcon_qlora.apply_fast_path(model)
    labels = torch.cat([torch.tensor([-100, *row["labels"][0][1:]]) for row in rows])[None]
    positions = torch.cat([torch.arange(len(doc)) for doc in docs])[None]
    ours = model(input_ids=torch.cat(docs)[None], position_ids=positions, labels=labels)
    assert ran
    assert_close(ours.logits[0], torch.cat(alone), rtol=1e-4, atol=1e-4)
    before = len(ran)
    mask = torch.ones(1, 60, dtype=torch.long)
    mask[0, 20:25] = 0  # no documents of ours: positions run on behind the hole
    ids = torch.cat(docs)[None]
    model(input_ids=ids, attention_mask=mask, labels=labels)
    model(input_ids=ids, position_ids=2 * positions, labels=labels)
    model(input_ids=ids, labels=labels, output_hidden_states=True)
    assert len(model.eval()(input_ids=ids).past_key_values) == model.config.num_hidden_layers
    assert len(ran) == before
    model(input_ids=ids, use_cache=False)
    assert len(ran) > before


def losses(kind, model, rows, folder):
    settings = {
        "output_dir": str(folder),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": "none",
        "use_cpu": True,
        "save_strategy": "no",
        "bf16": False,
        "disable_tqdm": True,
    }
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = tokenizer.eos_token
    if kind == "trl":
        arguments = SFTConfig(**settings, gradient_checkpointing=True)
        trainer = SFTTrainer(model, arguments, train_dataset=rows, processing_class=tokenizer)
    else:
        collator = DataCollatorForSeq2Seq(tokenizer, padding=True)
        trainer = Trainer(model, TrainingArguments(**settings), train_dataset=rows, data_collator=collator)
    trainer.train()
    return [line["loss"] for line in trainer.state.log_history if "loss" in line]


@pytest.mark.parametrize("kind", ["transformers", "trl"])
def test_other_trainers_train_the_same_on_fast_blocks(kind, ran, tmp_path: Path):
    docs = [doc.tolist() for doc in documents([30, 7, 21, 12, 40, 9, 16, 25])]
    rows = Dataset.from_list([{"input_ids": doc, "labels": doc} for doc in docs])
    expected = losses(kind, adapted(), rows, tmp_path / "stock")
    assert not ran
    model = adapted()
    falcon_qlora.apply_fast_path(model)
    ours = losses(kind, model, rows, tmp_path / "fast")
    assert ran
    assert len(set(expected)) == 4
    assert ours == pytest.approx(expected, rel=1e-4)


def preferences(way, fast, folder):
    """Losses and margins of TRL's DPOTrainer on the packaged model."""
    model, more = falcon_qlora.load_model("tiny", quantize_mode="4bit", device="cpu"), {}
    if way == "its own LoRA":  # whose reference is the base, LoRA switched off
        more["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    else:  # whose reference is TRL's copy of it, as a second adapter
        model = attach_lora(model, r=4, alpha=8, seed=3)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora_B" in name:
                    parameter.add_(0.01)
    tokenizer = load_tokenizer("tiny")
    tokenizer.pad_token = tokenizer.eos_token
    rows = [
        {"prompt": f"What is {n} and one?", "chosen": f" {n + 1}.", "rejected": " I do not know that, sorry."}
        for n in range(8)
    ]
    settings = DPOConfig(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        max_length=64,
        # Adam's first steps are signs: of gradients near 0 they tell rounding, and nothing else.
        optim="sgd",
        learning_rate=3e-2,
        max_grad_norm=0,
        logging_steps=1,
        report_to="none",
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = DPOTrainer(
        model, args=settings, train_dataset=Dataset.from_list(rows), processing_class=tokenizer, **more
    )
    if fast:
        falcon_qlora.apply_fast_path(trainer.model)
    trainer.train()
    return [(line["loss"], line["rewards/margins"]) for line in trainer.state.log_history if "loss" in line]


@pytest.mark.slow
@pytest.mark.parametrize("way", ["its own LoRA", "an adapter from before"])
def test_preferences_are_trained_the_same_on_fast_blocks(way, ran, tmp_path: Path):
    expected = preferences(way, False, tmp_path / "stock")
    assert not ran
    ours = preferences(way, True, tmp_path / "fast")
    assert len(ran) >= 3 * 5 * 2, "the policy's and the reference's pass, five blocks each"
    assert expected[2][0] < 0.9 * expected[0][0]
    for (loss, margin), (expected_loss, expected_margin) in zip(ours, expected, strict=True):
        assert loss == pytest.approx(expected_loss, rel=2e-5)
        assert margin == pytest.approx(expected_margin, rel=1e-3, abs=1e-4)
