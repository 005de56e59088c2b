"""The methods on a GPU: exact at the start, all of it trained, packed as each document alone."""

from __future__ import annotations

import pytest
import torch

from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from tests.layouts import LAYOUTS, MODES, documents, tiny_model, trainable_names
from tests.packing import gradients, packed

pytestmark = pytest.mark.gpu
METHODS = {
    "lora on slices": Lora(r=4, alpha=8, slices=("query", "value")),
    "adapter": Adapter(prefix_length=10, first_block=1),
    "adapter_v2": AdapterV2(prefix_length=10, first_block=1),
}
LENGTHS = [7, 40, 1, 12]


def base_model(layout, mode, compute_dtype="bf16"):
    model = tiny_model(layout, mode, "cuda", compute_dtype)
    enable_packing(model)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_the_start_the_output_is_exactly_the_bases(layout, mode):
    ids = documents([30], device="cuda")[0][None]
    docs = packed(documents(LENGTHS, device="cuda"))
    for method in [*METHODS.values(), *([Full()] if mode == "16bit" else [])]:
        model = base_model(layout, mode)
        with torch.no_grad():
            expected = model(ids).logits, model(docs["input_ids"], sequences=docs["sequences"]).logits
            model = method.attach(model, seed=3).eval()
            assert torch.equal(model(ids).logits, expected[0]), method
            again = model(input_ids=docs["input_ids"], sequences=docs["sequences"]).logits
            assert torch.equal(again, expected[1]), method


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon-7b", "falcon-40b"])
@pytest.mark.parametrize("name", METHODS)
def test_every_trainable_parameter_has_a_gradient_and_moves(name, layout, mode):
    model = METHODS[name].attach(base_model(layout, mode), seed=3)
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS, device="cuda"))
    parameters, names = dict(model.named_parameters()), trainable_names(model)
    optimizer = torch.optim.AdamW([parameters[n] for n in names], lr=1e-3, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            loss = model(**arguments).loss
        loss.backward()
        optimizer.step()

    for _ in range(2):
        step()
    before = {n: parameters[n].detach().clone() for n in names}
    found = gradients(model)
    assert not [n for n in names if found[n] is None or not found[n].count_nonzero()]
    for _ in range(10):
        step()
    assert not [n for n in names if torch.equal(parameters[n], before[n])]
    assert all(parameters[n].isfinite().all() for n in names)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ["adapter", "adapter_v2"])
def test_packed_is_each_document_alone(name, layout):
    model = METHODS[name].attach(base_model(layout, "16bit", "fp32"), seed=3).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        docs = documents(LENGTHS, device="cuda")
        arguments = packed(docs)
        logits = model(arguments["input_ids"], sequences=arguments["sequences"]).logits[0]
        alone = torch.cat([model(doc[None]).logits[0] for doc in docs])
    torch.testing.assert_close(logits, alone, rtol=1e-3, atol=1e-3)
