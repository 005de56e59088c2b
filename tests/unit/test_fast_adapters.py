"""Adapters on the fast path: what Transformers computes of each document with the same parameters."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from falcon_qlora.kernels import fp8
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.fast_path import apply_fast_path, remove_fast_path
from falcon_qlora.models.forward import causal_lm_in, enable_packing
from falcon_qlora.models.step_memory import Step
from tests.layouts import documents, plain_float32, tiny_model
from tests.packing import gradients, one_by_one, packed, with_adapter
from tests.unit.test_activations import kept_bytes, saved  # noqa: F401
from tests.unit.test_fast_path import FALCON3_MODES, LAYOUTS_AND_MODES, calls  # noqa: F401
from tests.unit.test_methods import away_from_start

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

LENGTHS = [7, 40, 1, 12]
METHODS = {"adapter": Adapter, "adapter_v2": AdapterV2}
NAMES = ["adapter", "adapter_v2"]


def attached(name, base, *, first_block=0):
    """With packing, and parameters that matter: the same for the same name."""
    base.requires_grad_(False)
    model = METHODS[name](prefix_length=5, first_block=first_block).attach(base, seed=3)
    enable_packing(model)
    return away_from_start(model)


def step(model, run):
    """Loss and the gradients of every parameter and of the input, from a clean start."""
    inputs = []

    def wants_gradient(module, args, output):
        inputs.append(output.requires_grad_())
        output.retain_grad()

    model.zero_grad()
    hook = causal_lm_in(model).get_input_embeddings().register_forward_hook(wants_gradient)
    try:
        loss = run(model)
        loss.backward()
    finally:
        hook.remove()
    found = {name: grad.clone() for name, grad in gradients(model).items()}
    found["the input"] = torch.cat([each.grad[0] for each in inputs])
    return loss.detach(), found


def truth(model, docs):
    return step(model, lambda model: one_by_one(model, [doc for doc in docs if len(doc) > 1]))


def on_packed(model, docs):
    return step(model, lambda model: model(**packed(docs)).loss)


def distance(found, exact):
    """The mean over parameters of how far the gradients are, relative to their size."""
    ratios = [float((found[name].float() - grad).norm() / grad.norm()) for name, grad in exact.items()]
    return sum(ratios) / len(ratios)


def assert_same(ours, theirs, tolerance=1e-4):
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in theirs[1].items():
        scale = float(gradient.abs().max())
        assert scale > 0, name
        assert_close(ours[1][name], gradient, rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(
    ("name", "layout", "mode"),
    [
        *((name, *each) for name in NAMES for each in LAYOUTS_AND_MODES),
        *(("adapter", *each) for each in FALCON3_MODES),
    ],
)
def test_loss_and_every_gradient_equal_each_document_alone(name, layout, mode, calls):  # noqa: F811
    base = tiny_model(layout, mode)
    plain = attached(name, plain_float32(base))
    model = attached(name, base)
    docs = [doc for doc in documents(LENGTHS) if len(doc) > 1]
    expected = truth(plain, docs)
    report = apply_fast_path(model)
    assert all(line.startswith("fast (") and "prefix: PyTorch" in line for line in report.values())
    with torch.no_grad():
        assert_close(model(**packed(docs)).loss, expected[0], rtol=1e-5, atol=0)
    assert_same(on_packed(model, docs), expected)
    assert calls == {"forward": 4, "backward": 2}


@pytest.mark.parametrize(
    ("name", "layout", "keep"),
    [
        *(
            (name, *each)
            for name in NAMES
            for each in [
                *product(["falcon-7b"], ["input", "offload"]),
                *product(["falcon-40b"], ["attention", "input"]),
            ]
        ),
        ("adapter", "falcon3", "attention"),
        ("adapter", "falcon3", "input"),
    ],
)
def test_what_is_kept_changes_no_gradient(name, layout, keep, calls):  # noqa: F811
    model = attached(name, tiny_model(layout, "4bit"), first_block=1)
    docs = documents(LENGTHS)
    reference = on_packed(model, docs)
    apply_fast_path(model, keep=keep)
    assert_same(on_packed(model, docs), reference)
    assert calls == {"forward": 2, "backward": 2}


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_saved_is_what_the_memory_model_counts(name, layout, saved):  # noqa: F811
    model = attached(name, tiny_model(layout, "4bit"))
    apply_fast_path(model)
    config, lengths = model.config, [200, 100]
    kept = {way: kept_bytes(model, way, saved, lengths) for way in ("none", "selective", "full", "offload")}
    one = Step(config=config, tokens=300, trainable=0, fast=True, scaled=name == "adapter_v2", value_bytes=4)
    # Attention's statistics are the GPU kernel's; cosines, sines, and what the head keeps are in all of them.
    statistics = 2 * 4 * config.num_attention_heads
    for way, of_kernel in (("none", statistics), ("selective", statistics), ("full", 0)):
        predicted = 2 * one._kept(way) - of_kernel
        assert (kept[way] - kept["offload"]) / 300 == pytest.approx(predicted, rel=0.01), way


@pytest.mark.parametrize(
    ("name", "layout", "autocast"),
    [
        *((name, *each) for name in NAMES for each in [("falcon-7b", True), ("falcon-40b", False)]),
        ("adapter", "falcon3", True),
    ],
)
def test_in_bfloat16_gradients_are_as_near_to_float32_as_on_the_reference_path(name, layout, autocast):
    base = tiny_model(layout, "4bit", compute_dtype="bf16")
    plain = attached(name, plain_float32(base))
    model = attached(name, base)
    docs = [doc for doc in documents(LENGTHS) if len(doc) > 1]
    exact = truth(plain, docs)[1]
    errors = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            errors.append(distance(on_packed(model, docs)[1], exact))
        report = apply_fast_path(model)
    assert all(line.startswith("fast") for line in report.values())
    assert errors[1] < 1.15 * errors[0], errors
    assert errors[1] < 0.05


@pytest.mark.parametrize("name", NAMES)
def test_switched_off_it_is_the_base(name, calls):  # noqa: F811
    base = tiny_model("falcon-40b", "4bit")
    enable_packing(base)
    arguments = packed(documents(LENGTHS))
    with torch.no_grad():
        expected = base(**arguments).loss
        model = attached(name, base)
        apply_fast_path(model)
        with method_of(model).disabled(model):
            assert_close(model(**arguments).loss, expected)
        assert abs(model(**arguments).loss - expected) > 0.01 * expected


@pytest.mark.parametrize("trained", [True, False], ids=["trained", "opened for inference"])
def test_where_it_cannot_run_the_report_says_why(trained):
    models = [
        attached("adapter", tiny_model(layout), first_block=1) for layout in ("falcon-rw-1b", "falcon-7b")
    ]
    if not trained:
        for model in models:
            model.requires_grad_(False)
    assert set(apply_fast_path(models[0]).values()) == {"reference path: positions by ALiBi"}
    with fp8.emulated():
        report = list(apply_fast_path(models[1], fp8_products=True).values())
    assert report[0].startswith("fast")
    assert report[1] == "reference path: fp8 does not go with a learned prefix in attention (Adapter)"
    model = attached("adapter_v2", tiny_model("falcon-7b"))
    if not trained:
        model.requires_grad_(False)
    with fp8.emulated():
        reasons = set(apply_fast_path(model, fp8_products=True).values())
    assert reasons == {"reference path: fp8 does not go with scales and biases on the linears (Adapter v2)"}


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon3"])
def test_lora_beside_a_prefix_takes_the_reference_path(layout):
    model = attached("adapter", tiny_model(layout), first_block=1)
    report = apply_fast_path(with_adapter(model))
    assert [line.split(" (")[0] for line in report.values()] == [
        "fast",
        "reference path: LoRA where attention looks at a learned prefix",
    ]
    model = attached("adapter_v2", tiny_model(layout))
    reasons = {line.split(" (")[0] for line in apply_fast_path(with_adapter(model)).values()}
    told = "LoRA beside scales and biases" if layout == "falcon-7b" else "scales and biases"
    assert reasons == {f"reference path: {told} on the linears"}


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon3"])
@pytest.mark.parametrize("name", NAMES)
def test_what_is_attached_later_is_not_computed_wrongly(name, layout):
    model = tiny_model(layout, "4bit")
    enable_packing(model)
    apply_fast_path(model)
    attached(name, model)
    docs = documents(LENGTHS)
    ours = on_packed(model, docs)
    remove_fast_path(model)
    assert_same(ours, on_packed(model, docs))


@pytest.mark.parametrize(("name", "layout"), [*product(NAMES, ["falcon-7b"]), ("adapter", "falcon3")])
def test_nor_is_lora_put_on_later(name, layout, calls):  # noqa: F811
    model = attached(name, tiny_model(layout, "4bit"))
    apply_fast_path(model)
    model = with_adapter(model)
    docs = documents(LENGTHS)
    ours = on_packed(model, docs)
    assert calls["forward"] == 0
    remove_fast_path(model)
    assert_same(ours, on_packed(model, docs))


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
def test_at_the_start_a_prefix_adds_exactly_nothing(compute_dtype, calls):  # noqa: F811
    model = tiny_model("falcon-40b", "4bit", compute_dtype=compute_dtype)
    enable_packing(model)
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model)
    losses = [model(**arguments).loss.detach()]
    Adapter(prefix_length=5, first_block=0).attach(model)
    losses.append(model(**arguments).loss.detach())
    assert calls["forward"] == 4
    assert torch.equal(*losses)


def scales(parameters):
    return {name: each for name, each in parameters.items() if name.endswith("scale_and_bias.scale")}


@pytest.mark.parametrize("keep", ["all", "input"])
def test_the_gradient_of_a_scale_is_as_good_however_small_it_is(keep):
    base = tiny_model("falcon-7b", "4bit", compute_dtype="bf16")
    plain = attached("adapter_v2", plain_float32(base))
    model = attached("adapter_v2", base)
    for each in (plain, model):
        for scale in scales(dict(each.named_parameters())).values():
            scale.data[::2] *= 1e-4
    docs = [doc for doc in documents(LENGTHS) if len(doc) > 1]
    apply_fast_path(model, keep=keep)
    exact, found = scales(truth(plain, docs)[1]), scales(on_packed(model, docs)[1])
    for name, gradient in exact.items():
        for part in (slice(0, None, 2), slice(1, None, 2)):
            assert (found[name][part] - gradient[part]).norm() < 0.06 * gradient[part].norm(), name
    for scale in scales(dict(model.named_parameters())).values():
        scale.data[::2] = 0
    assert all(gradient.isfinite().all() for gradient in on_packed(model, docs)[1].values())
