"""Blocks with FP8 products, multiplied on the CPU: as near to float32 as the format is, and no further."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8
from falcon_qlora.models.fast_path import apply_fast_path, decide, fp8_weight_bytes, keep_fp8_weights
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.layouts.falcon import Falcon
from falcon_qlora.models.layouts.falcon_h1 import FalconH1
from falcon_qlora.models.layouts.llama import Llama
from falcon_qlora.models.step_memory import Step
from falcon_qlora.training.activations import _keep_fp8_weights
from tests.layouts import FALCON_H1, FAMILIES, documents, tiny_model
from tests.packing import packed
from tests.unit.test_fast_path import (
    LAYOUTS_AND_MODES,
    LENGTHS,
    SEQUENTIAL_MODES,
    adapted,
    assert_same,
    facts,
    step,
)

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

# e4m3 rounds by up to 2^-4 of a value, in the mean square by 2^-4 / 3^0.5 / 1.5; a product has two factors.
PRODUCT_ERROR = 2**-4 / 3**0.5 / 1.5 * 2**0.5
# The way to a gradient leads through some six products one after the other, forward and back through two
# blocks, in Falcon3 twice as many; their errors are independent.
GRADIENT_ERROR = 6**0.5 * PRODUCT_ERROR


@pytest.fixture
def emulated():
    with fp8.emulated():
        yield


@pytest.fixture
def exact(emulated, monkeypatch):
    """The same operations, with operands that are not rounded."""
    monkeypatch.setattr(fp8, "DTYPE", torch.float32)


@pytest.fixture
def tame(monkeypatch):
    """Weights with which attention does not choose single tokens: errors are not magnified on the way."""
    for labels in (FAMILIES, FALCON_H1):
        for layout, label in labels.items():
            monkeypatch.setitem(labels, layout, label.replace("range=0.15", "range=0.05"))


def distances(ours: tuple[Tensor, dict], theirs: tuple[Tensor, dict]) -> list[float]:
    return [float((ours[1][name] - grad).norm() / grad.norm()) for name, grad in theirs[1].items()]


@pytest.mark.parametrize(("layout", "mode"), [*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES])
def test_gradients_are_as_near_to_float32_as_e4m3_is_and_those_of_e5m2_are_not(
    layout, mode, tame, emulated, monkeypatch
):
    model = adapted(layout, mode)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    report = apply_fast_path(model, fp8_products=True)
    assert all(what.startswith("fast") and "FP8" in what for what in report.values())
    ours = step(model, arguments)
    assert_close(ours[0], reference[0], rtol=0.01, atol=0)
    errors = distances(ours, reference)
    expected = GRADIENT_ERROR * (2**0.5 if layout == "falcon3" else 1)
    assert sum(errors) / len(errors) < expected
    assert max(errors) < 1.5 * expected
    monkeypatch.setattr(fp8, "DTYPE", torch.float8_e5m2)
    coarser = distances(step(model, arguments), reference)
    assert sum(coarser) / len(coarser) > 1.2 * expected


@pytest.mark.parametrize(("layout", "mode"), [*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES])
def test_but_for_rounding_it_is_the_same(layout, mode, exact):
    model = adapted(layout, mode)
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model, fp8_products=True)
    assert_same(step(model, arguments), reference)


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
@pytest.mark.parametrize(
    "settings",
    [
        *({"target_modules": [name], "r": 5} for name in Falcon.linears),
        {"target_modules": ["query_key_value", "dense"], "r": 1},
        {"target_modules": ["dense_h_to_4h", "dense_4h_to_h"], "r": 17, "use_rslora": True},
    ],
    ids=str,
)
def test_lora_on_some_linears_with_ranks_of_any_size(layout, settings, exact):
    same_on_some_linears(layout, settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"target_modules": [name], "r": 5} for name in Llama.linears),
        {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 1},
        {"target_modules": ["k_proj", "up_proj", "o_proj"], "r": 17, "use_rslora": True},
    ],
    ids=str,
)
def test_and_on_some_of_falcon3s(settings, exact):
    same_on_some_linears("falcon3", settings)


@pytest.mark.parametrize(
    "settings",
    [
        *({"target_modules": [name], "r": 5} for name in FalconH1.linears),
        {"target_modules": ["v_proj", "in_proj", "out_proj", "up_proj"], "r": 1},
        {"target_modules": ["out_proj", "o_proj", "down_proj"], "r": 17, "use_rslora": True},
    ],
    ids=str,
)
def test_and_on_some_of_falcon_h1s(settings, exact):
    same_on_some_linears("falcon-h1", settings)


def same_on_some_linears(layout, settings):
    model = adapted(layout, "4bit", **settings)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model, fp8_products=True)
    assert_same(step(model, arguments), reference)


@pytest.mark.parametrize(
    ("layout", "keep"),
    [
        ("falcon-7b", "attention"),
        ("falcon-40b", "input"),
        *product(["falcon3", "falcon-h1"], ["attention", "input"]),
    ],
)
def test_what_is_not_kept_is_computed_again(layout, keep, emulated):
    model = adapted(layout, "4bit")
    apply_fast_path(model, fp8_products=True)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model, fp8_products=True, keep=keep)
    assert_same(step(model, arguments), reference, 1e-6)


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        ("falcon-7b", "4bit"),
        ("falcon-40b", "8bit"),
        ("falcon-11b", "16bit"),
        ("falcon3", "4bit"),
        ("falcon-h1", "8bit"),
    ],
)
def test_weights_that_are_kept_are_those_that_would_be_made(layout, mode, emulated, monkeypatch):
    model = adapted(layout, mode)
    apply_fast_path(model, fp8_products=True)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    # The 580 outputs of Falcon-H1's queries, keys, values and in_proj are 592 with padding.
    padding = 2 * 12 * 64 if layout == "falcon-h1" else 0
    assert fp8_weight_bytes(model) == 2 * (layout_of(model.config).linear_parameter_count() + padding)
    made = []
    quantize = fp8.quantize_weight
    monkeypatch.setattr(fp8, "quantize_weight", lambda *a: made.append(a) or quantize(*a))
    keep_fp8_weights(model)
    of_block = len(layout_of(model.config).linears)
    assert len(made) == 2 * of_block * 2
    ours = step(model, arguments)
    assert len(made) == 2 * of_block * 2
    assert torch.equal(ours[0], reference[0])
    assert all(torch.equal(ours[1][name], grad) for name, grad in reference[1].items())


@pytest.mark.parametrize("layout", ["falcon3", "falcon-h1"])
def test_every_operand_is_quantized_once(layout, emulated, monkeypatch):
    model = adapted(layout, "4bit")
    apply_fast_path(model, fp8_products=True)
    made = []
    quantize = fp8.quantize_rows
    monkeypatch.setattr(fp8, "quantize_rows", lambda x: made.append(x) or quantize(x))
    step(model, packed(documents(LENGTHS)))
    # Two products forward and two back in each of four sublayers, but no gradient of the first input.
    assert len(made) == 2 * 2 * 4 - 1


def test_weights_are_kept_where_there_is_room_beside_all_activations(emulated):
    model = adapted("falcon-7b", "4bit")
    needed_and_kept = []
    for fp8_products, checkpointing, spare in [
        (True, "none", 1.0),
        (True, "none", 0.5),
        (True, "full", 1.0),
        (False, "none", 1.0),
    ]:
        apply_fast_path(model, fp8_products=fp8_products)
        needed = fp8_weight_bytes(model)
        blocks = [checkpointing] * 2
        one = Step(config=model.config, tokens=100, trainable=0, fast=True)
        free = int((one.bytes(blocks) + spare * needed) / 0.92) + 2  # 8 % are left alone
        kept = _keep_fp8_weights(model, one, blocks, free)
        needed_and_kept.append((needed > 0, kept))
    assert needed_and_kept == [(True, True), (True, False), (True, False), (False, False)]


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3", "falcon-h1"])
def test_without_lora_and_without_gradients(layout, exact):
    model = tiny_model(layout, "4bit")
    enable_packing(model)
    arguments = packed(documents(LENGTHS))
    with torch.no_grad():
        reference = model(**arguments).loss
        apply_fast_path(model, fp8_products=True)
        assert_close(model(**arguments).loss, reference)


def test_evaluation_and_training_alternate_in_bfloat16(tame, emulated):
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16")
    apply_fast_path(model, fp8_products=True)
    arguments = packed(documents(LENGTHS))
    before = step(model, arguments)
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert torch.equal(model(**arguments).loss, before[0])
    after = step(model, arguments)
    assert all(torch.equal(after[1][name], grad) for name, grad in before[1].items())


def outliers(model: Any, factor: float = 50.0) -> None:
    """Make a few channels of every norm's output larger, and all that multiplies them as much smaller."""
    channels = [3, 17, 40]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".h." in name and ("ln_" in name or "layernorm" in name):
                parameter[channels] *= factor
            elif ("query_key_value" in name or "dense_h_to_4h" in name) and "lora_B" not in name:
                parameter[:, channels] /= factor


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_outliers_cost_no_precision(layout, tame, emulated):
    arguments = packed(documents(LENGTHS))
    errors, losses = [], []
    for with_outliers in (False, True):
        model = adapted(layout, "16bit")
        if with_outliers:
            outliers(model)
        reference = step(model, arguments)
        apply_fast_path(model, fp8_products=True)
        losses.append(reference[0])
        found = distances(step(model, arguments), reference)
        errors.append(sum(found) / len(found))
    assert_close(*losses)
    print(errors)
    assert errors[1] < 1.2 * errors[0], errors


def test_an_adapter_larger_than_the_base_does_not_overflow(emulated):
    model = adapted("falcon-7b", "4bit")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.mul_(1e3)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model, fp8_products=True)
    ours = step(model, arguments)
    assert_close(ours[0], reference[0], rtol=0.1, atol=0)
    assert all(torch.isfinite(gradient).all() for gradient in ours[1].values())


def test_decide_says_so():
    given = facts(dtype=torch.bfloat16)
    said = decide(given, triton=True, attention="variable-length kernel", fp8_products=True)
    assert said["weights"] == "NF4 dequantized to FP8"


def test_it_is_refused_where_there_is_no_fp8(monkeypatch):
    model = adapted("falcon-7b", "4bit", compute_dtype="bf16")
    with pytest.raises(UserError, match="there is no FP8 on the CPU"):
        apply_fast_path(model, fp8_products=True)
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert fp8.why_not(gpu) == (
        "NVIDIA A100 has no FP8: its compute capability is 8.0, and FP8 begins at 8.9"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    assert fp8.why_not(gpu) is None
    assert "computes in float32" in str(fp8.why_not(gpu, torch.float32))
