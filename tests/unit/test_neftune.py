"""NEFTune's noise is of each document's length, however documents are packed (arXiv 2310.05914)."""

from __future__ import annotations

import math

import pytest
import torch
from transformers.integrations.neftune import activate_neftune

from falcon_qlora.methods.full import Full
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.step.neftune import add_noise
from tests.layouts import documents, tiny_model
from tests.packing import packed

ALPHA = 15.0


def noise_of(model, call):
    """What the embedding gives in training beyond what it gives in evaluation, in float64 ``[T, H]``."""
    given = []
    embedding = causal_lm_in(model).get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, args, output: given.append(output.detach()))
    for training in (True, False):
        model.train(training)
        torch.manual_seed(0)
        with torch.no_grad():
            model(**call)
    handle.remove()
    noisy, clean = (each[0].double() for each in given)
    return noisy - clean


@pytest.mark.parametrize("method", [Lora(r=2, alpha=4), Full()])
def test_each_document_has_noise_of_its_own_length(method):
    model = tiny_model("falcon-7b", "16bit" if method.is_whole else "4bit", "cpu", "fp32")
    model = method.attach(model)
    enable_packing(model)
    lengths = [3, 50, 7, 200, 12, 9, 100, 31]
    call = packed(documents(lengths))
    assert not noise_of(model, call).any()
    add_noise(model, ALPHA)
    noise = noise_of(model, call)
    assert torch.equal(noise, noise_of(model, call))  # by the generator alone
    hidden = noise.shape[1]
    for part, length in zip(noise.split(lengths), lengths, strict=True):
        bound = ALPHA / math.sqrt(length * hidden)
        assert bound * 0.95 < part.abs().max() <= bound * (1 + 1e-4)
        # A uniform number's deviation, by four standard errors.
        assert part.std().item() == pytest.approx(bound / math.sqrt(3), rel=4 / math.sqrt(2 * part.numel()))


def test_a_document_by_itself_has_the_noise_of_transformers():
    (document,) = documents([40])
    ours, theirs = (tiny_model("falcon-7b", "16bit", "cpu", "fp32") for _ in range(2))
    enable_packing(ours)
    add_noise(ours, ALPHA)
    activate_neftune(theirs, ALPHA)
    call = {"input_ids": document[None], "use_cache": False}
    torch.testing.assert_close(
        noise_of(ours, packed([document])), noise_of(theirs, call), rtol=1e-5, atol=1e-6
    )
