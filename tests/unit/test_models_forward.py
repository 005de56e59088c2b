"""Packed documents through a whole model: Transformers' own model on each document alone is the truth."""

import copy

import pytest
import torch
from torch.testing import assert_close
from trl.trainer.utils import add_fused_lm_head

from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import disable_packing, enable_packing
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import load_model
from tests.layouts import FAMILIES, MODES, VOCABULARY, documents, plain_float32, tiny_model, vary_norms
from tests.packing import gradients, one_by_one, packed, with_adapter

LENGTHS = [7, 40, 1, 12]
# Two blocks of the others have 0.3 to 4.4 billion weights: see test_models_gpu, which has all shapes.
NARROW = ("falcon-rw-1b", "falcon3-1b", "falcon3-3b", "falcon-h1-0.5b", "falcon-h1-1.5b-deep")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_loss_and_adapter_gradients_equal_each_document_alone(layout, mode):
    base = tiny_model(layout, mode)
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    expected = one_by_one(plain, docs)
    expected.backward()
    output = model(**packed(docs))
    output.loss.backward()
    assert output.logits is None
    assert output.loss.dtype == torch.float32
    assert_close(output.loss, expected, rtol=1e-5, atol=0)
    expected_gradients = gradients(plain)
    assert len(expected_gradients) == 2 * len(layout_of(base.config).linears) * 2
    for name, gradient in gradients(model).items():
        assert gradient.abs().sum() > 0, name
        assert_close(gradient, expected_gradients[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("layout", FAMILIES)
def test_logits_equal_each_document_alone(layout):
    model = tiny_model(layout)
    plain = plain_float32(model)
    enable_packing(model)
    docs = documents(LENGTHS)
    expected = torch.cat([plain(doc[None], use_cache=False).logits[0] for doc in docs])
    arguments = packed(docs)
    output = model(arguments["input_ids"], sequences=arguments["sequences"])
    assert output.loss is None
    assert_close(output.logits[0], expected, rtol=1e-4, atol=1e-4)


def assert_two_blocks_compute_what_transformers_does(preset, device):
    """Logits and every gradient of two blocks in a published shape, each document alone in float32.

    On both paths; ALiBi has one. The vocabulary is small, as the head is the same in all shapes.
    """
    name = f"random:{preset}?num_hidden_layers=2,vocab_size={VOCABULARY}"
    base = load_model(name, quantize_mode="16bit", device=device, compute_dtype="fp32", seed=1)
    vary_norms(base)
    plain, model = with_adapter(plain_float32(base, device)), with_adapter(base)
    enable_packing(model)
    docs = documents([66, 1, 5], device=device)  # a state space takes 64 tokens at a time
    arguments = packed(docs)
    inputs = {"input_ids": arguments["input_ids"], "sequences": arguments["sequences"]}
    direction = torch.randn(len(inputs["input_ids"][0]), VOCABULARY, device=device)
    expected = torch.cat([plain(doc[None], use_cache=False).logits[0] for doc in docs])
    (expected * direction).sum().backward()
    for fast in (False, True):
        if fast:
            report = apply_fast_path(model)
            assert all(what.startswith("fast") for what in report.values()) == (preset != "falcon-rw-1b")
        model.zero_grad()
        logits = model(**inputs).logits[0]
        (logits * direction).sum().backward()
        for found, truth in [
            (logits, expected),
            *((gradient, gradients(plain)[name]) for name, gradient in gradients(model).items()),
        ]:
            assert_close(found, truth, rtol=1e-4, atol=1e-4 * float(truth.detach().abs().max()))


@pytest.mark.slow
@pytest.mark.parametrize("preset", NARROW)
def test_two_blocks_of_the_narrower_published_shapes(preset):
    assert_two_blocks_compute_what_transformers_does(preset, "cpu")


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layout", FAMILIES)
def test_changing_one_document_leaves_the_others_logits_and_gradients_as_they_were(layout, checkpointing):
    model = with_adapter(tiny_model(layout, "4bit"))
    enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = documents([20, 30, 9])
    after = [documents([20], seed=99)[0], before[1], documents([9], seed=99)[0]]
    of_the_second = slice(20, 49)
    results = []
    for docs in (before, after):
        arguments = packed(docs)
        logits = model(arguments["input_ids"], sequences=arguments["sequences"]).logits[0, 20:50]
        arguments["target_positions"] = torch.arange(49)[of_the_second]
        arguments["targets"] = torch.cat(docs)[arguments["target_positions"] + 1]
        model.zero_grad()
        model(**arguments).loss.backward()
        results.append((logits.detach(), gradients(model)))
    assert not torch.equal(before[0], after[0])
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon-7b", "falcon3"])
def test_gradient_checkpointing_changes_no_gradient(layout):
    model = with_adapter(tiny_model(layout))
    enable_packing(model)
    arguments = packed(documents(LENGTHS))
    model(**arguments).loss.backward()
    without = {name: gradient.clone() for name, gradient in gradients(model).items()}
    model.zero_grad()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model(**arguments).loss.backward()
    assert_close(gradients(model), without)


@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon3"])
def test_attention_dropout_acts_in_training_alone(layout):
    model = tiny_model(layout)
    for module in model.modules():
        if layout == "falcon3" and hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.5
        elif hasattr(module, "attention_dropout"):
            module.attention_dropout.p = 0.5
    enable_packing(model)
    arguments = packed(documents(LENGTHS))
    with torch.no_grad():
        assert torch.equal(model(**arguments).loss, model(**arguments).loss)
        model.train()
        assert not torch.equal(model(**arguments).loss, model(**arguments).loss)


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon3"])
def test_without_sequences_the_model_runs_as_it_did(layout):
    model = tiny_model(layout)
    ids = documents([9])[0][None]
    before = model(ids).logits
    answer = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    enable_packing(model)
    enable_packing(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=0), answer)
    disable_packing(model)
    assert not any("forward" in vars(module) for module in model.modules())
    assert torch.equal(model(ids).logits, before)
    disable_packing(model)


def test_packing_works_on_either_side_of_trls_fused_head():
    docs = documents(LENGTHS)
    arguments = packed(docs)
    first, second = tiny_model("falcon-7b"), tiny_model("falcon-7b")
    enable_packing(first)
    add_fused_lm_head(first)
    add_fused_lm_head(second)
    enable_packing(second)
    losses = [model(**arguments).loss for model in (first, second)]
    assert_close(losses[0], losses[1])
    labels = docs[1][None]
    fused = [model(labels, labels=labels, fused_lm_head=True).loss for model in (first, second)]
    assert_close(fused[0], fused[1])
    with pytest.raises(RuntimeError, match="wrapped after enable_packing"):
        disable_packing(first)


def test_a_deep_copy_runs_on_its_own_weights():
    model = tiny_model("falcon-7b")
    enable_packing(model)
    twin = copy.deepcopy(model)
    arguments = packed(documents(LENGTHS))
    before = model(**arguments).loss
    with torch.no_grad():
        twin.transformer.ln_f.weight.mul_(2)
    assert torch.equal(model(**arguments).loss, before)
    assert not torch.equal(twin(**arguments).loss, before)


@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon-7b", "falcon-40b", "falcon3"])
@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_is_close_to_float32(layout, autocast):
    base = tiny_model(layout, "4bit", compute_dtype="bf16")
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**packed(docs)).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert_close(loss, one_by_one(plain, docs), rtol=3e-2, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_what_packing_cannot_do_is_refused():
    model = tiny_model("falcon-7b")
    enable_packing(model)
    arguments = packed(documents(LENGTHS))
    with pytest.raises(ValueError, match="labels"):
        model(**arguments, labels=arguments["input_ids"])
    with pytest.raises(ValueError, match="differ"):
        model(arguments["input_ids"][:, :-1], sequences=arguments["sequences"])
