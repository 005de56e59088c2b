"""What blocks keep for the backward pass changes where it is, and no gradient."""

import gc

import pytest
import torch

from falcon_qlora.kernels import fp8
from falcon_qlora.kernels.offload import Offload, _Moved
from falcon_qlora.models.activations import a_block_of_each_kind, blocks_of, set_checkpointing
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model
from falcon_qlora.models.step_memory import Step
from tests.layouts import LAYOUTS, attach_lora, documents
from tests.packing import gradients, packed
from tests.unit.test_fast_path import LENGTHS, adapted, step

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

MODES = ["none", "selective", "full", "offload"]
KEEPS = ["all", "attention", "input", "offload"]


def assert_no_gradient_changed(ours, expected, tolerance=1e-5):
    """The operations are the same; but products on the CPU round by where their operands lie."""
    for name, gradient in expected.items():
        scale = tolerance * float(gradient.abs().max())
        torch.testing.assert_close(ours[name], gradient, rtol=0, atol=scale, msg=name)


@pytest.mark.parametrize(
    ("layout", "compute_dtype", "tolerance"),
    [
        ("falcon-7b", "fp32", 1e-5),
        ("falcon-40b", "bf16", 1e-2),
        ("falcon-11b", "fp32", 1e-5),
        ("falcon3", "fp32", 1e-5),
        ("falcon-h1", "fp32", 1e-5),
    ],
)
def test_no_way_to_keep_changes_a_gradient(layout, compute_dtype, tolerance):
    model = adapted(layout, "4bit", compute_dtype=compute_dtype)
    arguments = packed(documents(LENGTHS))
    reference = [["none"] * 2, ["full"] * 2, ["offload"] * 2, ["offload", "none"]]
    for ways in (reference, [*reference, ["selective"] * 2, ["full", "selective"]]):
        set_checkpointing(model, ways[0])
        expected = step(model, arguments)
        for way in ways[1:]:
            set_checkpointing(model, way)
            loss, found = step(model, arguments)
            assert torch.equal(loss, expected[0]), way
            assert_no_gradient_changed(found, expected[1], tolerance)
        apply_fast_path(model)


def test_apply_fast_path_takes_one_way_to_keep_or_one_a_block():
    model = adapted("falcon-7b", "4bit")
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model)
    expected = step(model, arguments)[1]
    for keep in [*KEEPS, ["offload", "all"]]:
        apply_fast_path(model, keep=keep)
        assert_no_gradient_changed(step(model, arguments)[1], expected)
    with pytest.raises(ValueError, match="shorter"):
        apply_fast_path(model, keep=["all"])


@pytest.fixture
def saved(monkeypatch):
    """What is saved where something may be moved: tensors that stay, and those that move."""
    found = {"stay": [], "move": [], "moved": []}
    original = Offload.moving

    def moving(self, tensor):
        hooks = original(self, tensor)
        pack = hooks.pack_hook

        def recording(each):
            packed = pack(each)
            found["move" if type(packed) is _Moved else "stay"].append(each)
            if type(packed) is _Moved:
                found["moved"].append(packed)
            return packed

        hooks.pack_hook = recording
        return hooks

    monkeypatch.setattr(Offload, "moving", moving)
    return found


@pytest.mark.parametrize(
    ("kept", "few"),
    [
        (["none", "none", "selective", "full", "full", "full"], [0, 2, 3, 4, 5]),
        (["none"] * 6, [0, 4, 5]),
        (["full"], [0]),
    ],
)
def test_a_block_of_each_kind_and_then_all_again(kept, few):
    layers = f"num_hidden_layers={len(kept)}"
    base = load_model(LAYOUTS["falcon-7b"].replace("num_hidden_layers=2", layers), quantize_mode="16bit")
    model = attach_lora(base, r=2)
    enable_packing(model)
    apply_fast_path(model)
    set_checkpointing(model, kept)
    every = blocks_of(model)
    with a_block_of_each_kind(model):
        assert blocks_of(model) == [every[index] for index in few]
        model(**packed(documents([5, 3]))).loss.backward()
    assert blocks_of(model) == every


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3", "falcon-h1"])
def test_offloaded_inputs_are_elsewhere_between_the_passes(layout, fast, saved):
    model = adapted(layout, "4bit")
    if fast:
        apply_fast_path(model)
    arguments = packed(documents(LENGTHS))
    expected = step(model, arguments)[1]
    set_checkpointing(model, ["offload"] * 2)
    model.zero_grad()
    loss = model(**arguments).loss
    assert len(saved["move"]) == len(saved["moved"]) == 2
    # The last one is needed next, so it has not left yet.
    assert [moved._here is None for moved in saved["moved"]] == [True, False]
    with torch.no_grad():
        saved["move"][0].fill_(float("nan"))
    loss.backward()
    assert_no_gradient_changed(gradients(model), expected)


def kept_bytes(model, mode, saved, lengths):
    """Of the tensors saved on the device, parameters left out, that of a storage counted once."""
    set_checkpointing(model, [mode] * 2)
    for found in saved.values():
        found.clear()
    here = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: here.append(t) or t, lambda t: t):
        loss = model(**packed(documents(lengths))).loss
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    storages = {
        each.untyped_storage().data_ptr(): each.untyped_storage().nbytes()
        for each in here + saved["stay"]
        if each.data_ptr() not in parameters
    }
    assert loss.requires_grad
    return sum(storages.values())


@pytest.mark.parametrize(
    ("layout", "in_fp8"),
    [
        *((layout, False) for layout in ("falcon-7b", "falcon-40b", "falcon-11b", "falcon3", "falcon-h1")),
        ("falcon3", True),
        ("falcon-h1", True),
    ],
)
def test_what_is_saved_is_what_the_memory_model_counts(layout, in_fp8, saved):
    model = adapted(layout, "4bit", r=8)
    with fp8.emulated():
        apply_fast_path(model, fp8_products=in_fp8)
        config, lengths = model.config, [200, 100]
        kept = {mode: kept_bytes(model, mode, saved, lengths) for mode in MODES}
    one = Step(config=config, tokens=300, trainable=0, fast=True, lora_rank=8, value_bytes=4)
    # Attention's statistics are the GPU kernel's; cosines, sines, and what the head keeps are in all of them.
    for mode in MODES[:3]:
        predicted = 2 * one._kept(mode)
        if mode != "full":
            predicted -= 2 * 4 * config.num_attention_heads
        assert (kept[mode] - kept["offload"]) / 300 == pytest.approx(predicted, rel=0.01), mode
    assert kept["none"] > kept["selective"] > kept["full"] > kept["offload"]


def test_reference_blocks_keep_less_too(saved):
    model = adapted("falcon-7b", "4bit")
    kept = [kept_bytes(model, mode, saved, [200, 100]) for mode in ("none", "full", "offload")]
    assert kept[0] > 4 * kept[1] > 4 * kept[2]
    with pytest.raises(ValueError, match="no selective recomputation"):
        set_checkpointing(model, ["selective"] * 2)


def chain(home, tensor, length):
    for _ in range(length):
        with home.moving(tensor):
            tensor = tensor.sin()
    return tensor.sum()


def test_one_is_fetched_while_the_next_is_used_and_buffers_are_used_again(monkeypatch):
    home, events = Offload(), []
    monkeypatch.setattr(_Moved, "fetch", _noting(_Moved.fetch, events, "fetch"))
    monkeypatch.setattr(_Moved, "back", _noting(_Moved.back, events, "back"))
    start = torch.randn(50, 7, requires_grad=True)
    loss = chain(home, start, 4)
    assert not home._buffers
    loss.backward()
    order = list(dict.fromkeys(moved for name, moved in events if name == "back"))
    for place, moved in enumerate(order[:-1]):
        begun = events.index(("fetch", order[place + 1]))
        assert events.index(("back", moved)) < begun < events.index(("back", order[place + 1]))
    expected = torch.autograd.grad(start.sin().sin().sin().sin().sum(), start)[0]
    assert torch.equal(start.grad, expected)
    del loss
    gc.collect()
    addresses = {buffer.data_ptr() for buffer in home._buffers}
    assert len(addresses) == 4
    for rows in (50, 20, 45):
        chain(home, torch.randn(rows, 7, requires_grad=True), 4).backward()
    assert {buffer.data_ptr() for buffer in home._buffers} == addresses
    chain(home, torch.randn(500, 7, requires_grad=True), 4).backward()
    assert [buffer.numel() for buffer in home._buffers] == [2**14] * 4


def _noting(method, events, name):
    def noted(self):
        events.append((name, id(self)))
        return method(self)

    return noted


def test_two_micro_batches_may_wait_for_their_backward_and_one_may_run_twice():
    home = Offload()
    start = torch.randn(9, 3, requires_grad=True)
    first, second = chain(home, start, 3), chain(home, start * 2, 3)
    for loss in (first, first, second):
        loss.backward(retain_graph=True)
    sines = [start.sin().sin().sin().sum(), (start * 2).sin().sin().sin().sum()]
    expected = torch.autograd.grad(2 * sines[0] + sines[1], start)[0]
    torch.testing.assert_close(start.grad, expected)
