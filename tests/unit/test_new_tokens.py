"""Tokens of one's own: the same model, gradients and files as PEFT's with resized embeddings."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from torch.testing import assert_close

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, check_adapter
from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.kernels.cross_entropy import chunked_cross_entropy
from falcon_qlora.methods.adapter_folder import read_adapter
from falcon_qlora.methods.interface import trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models import token_rows
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.tokenizer import check_vocabulary, load_tokenizer
from tests.layouts import UNTIED, VOCABULARY, documents, plain_float32, tiny_model

NEW = (VOCABULARY, VOCABULARY + 1)
SPARE = (VOCABULARY - 1, VOCABULARY - 3)
LAYOUTS = ["falcon-7b", "falcon-11b", "falcon3"]


def method(ids: tuple[int, ...] = NEW, **settings: Any) -> Lora:
    return Lora(r=2, token_rows=ids, **settings)


def moved(model: Any) -> Any:
    """Give every trainable parameter a value that shows."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def peft_twin(plain: Any, ids: tuple[int, ...], ours: Any) -> Any:
    """PEFT's own model on Transformers' with resized embeddings, and the trained tensors of `ours`."""
    untied = not plain.config.tie_word_embeddings
    if max(ids) >= VOCABULARY:
        plain.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    names = {"lm_head": list(ids), plain_embedding(plain): list(ids)} if untied else list(ids)
    config = LoraConfig(
        r=2,
        lora_alpha=16,
        target_modules=ours.peft_config["default"].target_modules,
        trainable_token_indices=names,
    )
    twin = get_peft_model(plain, config)
    with torch.no_grad():
        theirs = dict(twin.named_parameters())
        for name, parameter in ours.named_parameters():
            if parameter.requires_grad:
                theirs[name].copy_(parameter)
    return twin


def plain_embedding(model: Any) -> str:
    return "embed_tokens" if model.config.model_type == "llama" else "word_embeddings"


def sample(ids: tuple[int, ...]) -> Tensor:
    """A document of 24 tokens in which each of `ids` stands twice."""
    text = documents([24])[0]
    text[[3, 11]], text[[7, 8]] = ids[0], ids[1]
    return text


def packed_loss(model: Any, text: Tensor) -> Tensor:
    loss: Tensor = model(
        input_ids=text[None],
        sequences=Sequences.from_lengths([len(text)], text.device),
        target_positions=torch.arange(len(text) - 1),
        targets=text[1:],
    ).loss
    return loss


@pytest.mark.parametrize("fast", [False, True])
@pytest.mark.parametrize("ids", [NEW, SPARE])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_gradients_and_logits_are_pefts(layout: str, ids: tuple[int, ...], fast: bool) -> None:
    base = tiny_model(layout)
    plain = plain_float32(base)
    ours = moved(method(ids).attach(base))
    text = sample(ids)
    twin = peft_twin(plain, ids, ours)
    enable_packing(ours)
    if fast:
        report = apply_fast_path(ours)
        assert all(what.startswith("fast") for what in report.values()) == (layout != "falcon3")
    loss = packed_loss(ours.train(), text)
    loss.backward()
    expected = torch.nn.functional.cross_entropy(twin.train()(text[None]).logits[0, :-1], text[1:], reduction="sum")
    expected.backward()
    assert_close(loss, expected, rtol=1e-5, atol=1e-4)
    theirs = {name: p.grad for name, p in twin.named_parameters() if p.requires_grad}
    found = {name: p.grad for name, p in ours.named_parameters() if p.requires_grad}
    assert found.keys() == theirs.keys()
    assert sum("trainable_tokens_delta" in name for name in found) == 1 + (layout in UNTIED)
    for name, gradient in found.items():
        assert gradient.dtype == torch.float32
        assert theirs[name].abs().sum() > 0
        assert_close(gradient, theirs[name], rtol=1e-3, atol=2e-4, msg=lambda text, name=name: f"{name}: {text}")
    # As generation calls it, and where the batch is another trainer's.
    ours.eval(), twin.eval()
    assert_close(ours(text[None]).logits, twin(text[None]).logits, rtol=1e-4, atol=1e-4)
    with ours.disable_adapter(), twin.disable_adapter():
        width = min(ids[0], VOCABULARY)
        assert_close(
            ours(documents([9])[0][None]).logits[..., :VOCABULARY],
            twin(documents([9])[0][None]).logits[..., :VOCABULARY],
            rtol=1e-4,
            atol=1e-4,
        )


@pytest.mark.parametrize("chunk_tokens", [7, 1000])
@pytest.mark.parametrize(("dtype", "allowed"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_rows_of_the_head_have_the_gradients_of_a_whole_matrix(dtype: Any, allowed: float, chunk_tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(33, 24, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(97, 24, generator=generator).to(dtype)
    values = torch.randn(3, 24, generator=generator).requires_grad_()
    places = torch.tensor([96, 5, 40])
    targets = torch.randint(0, 97, (33,), generator=generator)
    targets[:6] = places.repeat(2)
    exact_states, exact_values = (each.detach().double().requires_grad_() for each in (states, values))
    whole = weight.double().index_copy(0, places, exact_values)
    exact = torch.nn.functional.cross_entropy(exact_states @ whole.T, targets, reduction="sum")
    expected = torch.autograd.grad(0.37 * exact, [exact_states, exact_values])
    loss = chunked_cross_entropy(states, weight, targets, rows=(places, values), chunk_tokens=chunk_tokens)
    assert_close(loss.double(), exact, rtol=allowed, atol=0)
    for found, gradient in zip(torch.autograd.grad(0.37 * loss, [states, values]), expected, strict=True):
        assert (found - gradient).norm() < allowed * gradient.norm()
