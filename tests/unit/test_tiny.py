"""The packaged model has really been trained, is what its record says, and is as small as promised."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconConfig, FalconForCausalLM

from falcon_qlora.models.load import load_model
from falcon_qlora.models.tiny import held_out_documents, tiny_path
from tests.tiny_model.train import configuration, held_out_loss, window_logits

PARTS = ("documentation", "generated")


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(tiny_path())


@pytest.fixture(scope="module")
def tiny() -> FalconForCausalLM:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def held_out(tokenizer: Any) -> dict[str, torch.Tensor]:
    """The first few thousand held-out tokens of each part, an end token after each document."""
    tokens = {}
    for part in PARTS:
        texts = tokenizer(held_out_documents()[part])["input_ids"]
        ids = [token for document in texts for token in [*document, tokenizer.eos_token_id]]
        tokens[part] = torch.tensor(ids[:4097])
    return tokens


def loss_of(model: torch.nn.Module, tokens: torch.Tensor) -> float:
    """Mean loss by the model's own forward pass, in nats a token."""
    windows = tokens[:-1].view(-1, 256)
    targets = tokens[1:].view(-1, 256)
    with torch.no_grad():
        logits = torch.cat([model(input_ids=window).logits for window in windows.split(4)])
    return torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), targets.flatten()).item()


def test_weights_are_at_most_ten_megabytes_and_the_layout_is_7bs() -> None:
    assert sum(file.stat().st_size for file in tiny_path().iterdir()) < 10_000_000
    config = json.loads((tiny_path() / "config.json").read_text())
    assert config["architectures"] == ["FalconForCausalLM"]
    assert config["multi_query"]
    assert config["parallel_attn"]
    assert config["tie_word_embeddings"]
    assert not config["alibi"]
    assert not config["bias"]
    assert not config["new_decoder_architecture"]


def test_tokenizer_has_one_end_token_no_padding_and_gives_text_back(tokenizer: Any) -> None:
    assert tokenizer.is_fast
    assert len(tokenizer) == 4096
    assert tokenizer.eos_token == "<|endoftext|>"
    assert tokenizer.pad_token is None
    assert tokenizer.all_special_tokens == ["<|endoftext|>"]
    text = "Naïve  café:\n\t21 + 4 = 25 → 🦅 done. "
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("part", PARTS)
def test_held_out_loss_is_far_below_an_untrained_models_and_a_unigram_models(
    part: str, tiny: FalconForCausalLM, held_out: dict[str, torch.Tensor]
) -> None:
    tokens = held_out[part]
    torch.manual_seed(0)
    untrained = loss_of(FalconForCausalLM(configuration(4096)).float().eval(), tokens)
    # The best that any unigram model can do on these very tokens, since it is fitted to them.
    counts = Counter(tokens[1:].tolist())
    total = sum(counts.values())
    unigram = -sum(count / total * math.log(count / total) for count in counts.values())
    trained = loss_of(tiny, tokens)
    assert untrained > 8
    assert trained < 0.75 * unigram
    assert trained < 0.5 * untrained


@pytest.mark.slow
def test_record_holds_the_held_out_losses_that_the_weights_have(
    tiny: FalconForCausalLM, held_out: dict[str, torch.Tensor]
) -> None:
    record = json.loads((tiny_path() / "training.json").read_text())
    assert record["parameters"] == tiny.num_parameters()
    # The packaged documents are a part of those that the record's losses are over.
    assert held_out_loss(tiny, held_out["generated"]) == pytest.approx(
        record["held_out_loss"]["generated"], rel=0.15
    )
    for part in PARTS:
        assert record["held_out_loss"][part] < 0.6 * record["unigram_loss"][part]


@pytest.mark.parametrize(("quantize_mode", "most"), [("4bit", 0.15), ("8bit", 0.02)])
def test_quantization_moves_the_loss_a_little_and_only_a_little(
    quantize_mode: Any, most: float, tiny: FalconForCausalLM, held_out: dict[str, torch.Tensor]
) -> None:
    quantized = load_model("tiny", quantize_mode=quantize_mode, device="cpu")
    tokens = held_out["documentation"][:2049]
    moved = loss_of(quantized, tokens) - loss_of(tiny, tokens)
    assert moved != 0
    assert abs(moved) < most


def test_training_forward_equals_transformers_forward() -> None:
    torch.manual_seed(0)
    config: FalconConfig = configuration(128)
    model = FalconForCausalLM(config).float().eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    ids = torch.randint(128, (2, 40))
    with torch.no_grad():
        torch.testing.assert_close(window_logits(model, ids), model(ids).logits, rtol=1e-4, atol=1e-4)


def test_sample_rows_are_written_anew_alike_and_do_not_answer_the_prompts(tmp_path: Any) -> None:
    from falcon_qlora.data import sample_data
    from tests.sample_rows.__main__ import main

    main(["build", "--out", str(tmp_path)])
    for file in (sample_data.path(), sample_data.prompts_path()):
        assert (tmp_path / file.name).read_bytes() == file.read_bytes()
    rows = [json.loads(line) for line in sample_data.path().read_text().splitlines()]
    assert len(rows) == 800
    assert len({(row["instruction"], row["input"]) for row in rows}) == len(rows)
    assert all(row["output"].strip() for row in rows)
    assert not {row["instruction"] for row in rows} & set(sample_data.prompts())
    answers = {row["output"] for row in rows}
    assert not answers & {
        "The opposite of cold is hot.",
        "A whale lives in the sea.",
        "The capital of Japan is Tokyo.",
    }


def test_generated_documents_are_the_same_for_the_same_seed_and_end_in_sentences() -> None:
    from itertools import islice

    from tests.tiny_model.english import write_documents

    first, again, other = (list(islice(write_documents(seed), 200)) for seed in (0, 0, 1))
    assert first == again != other
    # What fine-tuning is to teach must not be known before.
    assert not any("###" in text or "Instruction" in text for text in first)
