"""The fast path computes what the reference path does: the same model, with and without it."""

import copy
import dataclasses
from itertools import product

import pytest
import torch
from torch.testing import assert_close
from transformers.models.falcon.modeling_falcon import FalconDecoderLayer

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.kernels import block as kernel
from falcon_qlora.kernels import fp8, ops, sublayer
from falcon_qlora.kernels.gelu_products import GeluProducts
from falcon_qlora.kernels.libraries import Loaded
from falcon_qlora.kernels.workspace import Workspace
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models import fast_path, forward
from falcon_qlora.models.blocks import falcon_h1, llama
from falcon_qlora.models.blocks.falcon import block_facts
from falcon_qlora.models.fast_path import (
    apply_fast_path,
    choose_kernels,
    decide,
    described,
    keep_dequantized_weights,
    remove_fast_path,
)
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.layouts.falcon import Falcon
from falcon_qlora.models.layouts.falcon_h1 import FalconH1
from falcon_qlora.models.layouts.llama import Llama
from falcon_qlora.models.packed_attention import Sequences
from tests.layouts import LAYOUTS, MODES, attach_lora, documents, plain_float32, tiny_model, vary_norms
from tests.packing import gradients, one_by_one, packed, with_adapter

pytestmark = pytest.mark.usefixtures("unwritten_memory_is_nan")

PARALLEL = [layout for layout in LAYOUTS if layout != "falcon-rw-1b"]
FAST_LAYOUTS = [*PARALLEL, "falcon3", "falcon-h1"]
# Layouts differ in norms and heads, modes in how a weight is read: each of one kind with few of the other.
LAYOUTS_AND_MODES = [
    *((layout, "4bit") for layout in PARALLEL),
    ("falcon-7b", "8bit"),
    ("falcon-40b", "16bit"),
]
FALCON3_MODES = [("falcon3", mode) for mode in MODES]
SEQUENTIAL_MODES = [*FALCON3_MODES, *(("falcon-h1", mode) for mode in MODES)]
LENGTHS = [7, 40, 1, 12]


@pytest.fixture
def calls(monkeypatch):
    """How often a block's function ran forward and backward."""
    counted = {"forward": 0, "backward": 0}
    for function, name in product([kernel._BlockFunction, sublayer._SublayersFunction], counted):
        original = getattr(function, name)

        def run(*args, _name=name, _original=original):
            counted[_name] += 1
            return _original(*args)

        monkeypatch.setattr(function, name, staticmethod(run))
    return counted


def adapted(layout, mode="16bit", *, r=4, seed=3, device="cpu", compute_dtype="auto", **settings):
    """LoRA with two matrices that matter, packing enabled."""
    base = tiny_model(layout, mode, device, compute_dtype)
    peft_model = attach_lora(base, r=r, alpha=8, seed=seed, **settings)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    enable_packing(peft_model)
    return peft_model


def step(model, arguments):
    """Loss and every gradient, from a clean start."""
    model.zero_grad()
    loss = model(**arguments).loss
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(model).items() if grad is not None}


def assert_same(ours, theirs, tolerance=1e-4):
    assert_close(ours[0], theirs[0], rtol=1e-5, atol=0)
    assert ours[1].keys() == theirs[1].keys()
    for name, gradient in ours[1].items():
        assert gradient.dtype == torch.float32
        assert theirs[1][name].abs().max() > 0, name
        scale = float(theirs[1][name].abs().max())
        assert_close(gradient, theirs[1][name], rtol=tolerance, atol=tolerance * scale, msg=name)


@pytest.mark.parametrize(("layout", "mode"), [*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES])
def test_loss_and_adapter_gradients_equal_each_document_alone(layout, mode, calls):
    base = tiny_model(layout, mode)
    vary_norms(base)
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    report = apply_fast_path(model)
    assert len(report) == 2
    assert all(line.startswith("fast (") for line in report.values())
    docs = documents(LENGTHS)
    expected = one_by_one(plain, docs)
    expected.backward()
    ours = step(model, packed(docs))
    assert calls == {"forward": 2, "backward": 2}
    layout_facts = layout_of(model.config)
    assert len(ours[1]) == 2 * (len(layout_facts.linears) - len(layout_facts.not_for_peft)) * 2
    assert_same(ours, (expected.detach(), gradients(plain)))


@pytest.mark.parametrize(
    ("layout", "mode"),
    [("falcon-7b", "4bit"), ("falcon-40b", "16bit"), ("falcon3", "4bit"), ("falcon-h1", "4bit")],
)
def test_with_and_without_it_a_model_computes_the_same(layout, mode):
    model = adapted(layout, mode)
    arguments = packed(documents(LENGTHS))
    logits = {"input_ids": arguments["input_ids"], "sequences": arguments["sequences"]}
    reference, reference_logits = step(model, arguments), model(**logits).logits
    apply_fast_path(model)
    assert_same(step(model, arguments), reference)
    assert_close(model(**logits).logits, reference_logits, rtol=1e-4, atol=1e-4)


def few_targets(arguments):
    """Arguments of a call that trains on each document's last two tokens."""
    positions = arguments["target_positions"]
    ends = torch.bucketize(positions, arguments["sequences"].cu_seqlens, right=True)
    few = positions[positions >= arguments["sequences"].cu_seqlens[ends] - 3]
    return arguments | {"target_positions": few, "targets": arguments["input_ids"][0, few + 1]}


@pytest.mark.parametrize("keep", ["all", "attention", "input", "offload"])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-11b", "falcon-40b", "falcon3"])
def test_the_last_block_computes_the_feed_forward_of_few_targets_alone(layout, keep, monkeypatch):
    model = adapted(layout, "4bit")
    vary_norms(model)
    every = packed(documents(LENGTHS))
    few = few_targets(every)
    reference, of_every = step(model, few), step(model, every)
    report = apply_fast_path(model, keep=keep)
    rows = []
    gelu = ops.gelu
    monkeypatch.setattr(ops, "gelu", lambda x, out: rows.append(len(x)) or gelu(x, out))
    assert_same(step(model, few), reference)
    tokens = sum(LENGTHS)
    if layout != "falcon3":  # where feed-forward follows attention, all of it is computed
        assert set(rows[:2]) == {tokens, len(few["targets"])}
        assert ["of targets alone" in what for what in report.values()] == [False, True]
        assert described(report).startswith("2 of 2 blocks fast (")
    rows.clear()
    assert_same(step(model, every), of_every)
    assert set(rows) <= {tokens}
    without = few | {"target_positions": few["target_positions"][:0], "targets": few["targets"][:0]}
    assert step(model, without)[0] == 0


@pytest.mark.parametrize("how", ["fp8", "GELU in products", "adapter", "adapter_v2"])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_so_it_does_with_other_products_and_methods(layout, how, monkeypatch):
    if "adapter" in how:
        method = METHODS[how](prefix_length=5, first_block=0)
        model = method.attach(tiny_model(layout, "4bit").requires_grad_(False), seed=3)
        enable_packing(model)
    else:
        model = adapted(layout, "4bit")
    few = few_targets(packed(documents(LENGTHS)))
    if how == "GELU in products":
        monkeypatch.setattr(fast_path, "_gelu_products", lambda falcon: Loaded(GeluProductsInPyTorch()))
    with fp8.emulated():
        apply_fast_path(model, fp8_products=how == "fp8")
        ours = step(model, few)
        monkeypatch.setattr(forward, "FEW_ROWS", 0)
        of_all = step(model, few)
    # A product of fewer rows may round otherwise, and in FP8 a value then falls on the other side of a step.
    assert_close(ours[0], of_all[0], rtol=1e-5, atol=0)
    for name, gradient in of_all[1].items():
        assert float((ours[1][name] - gradient).norm()) <= 1e-3 * float(gradient.norm()), name


PAIRS = [["query_key_value", "dense"], ["dense_h_to_4h", "dense_4h_to_h"]]
SOME = [["q_proj", "v_proj"], ["k_proj", "up_proj"], ["o_proj", "down_proj"]]
BESIDE = [["o_proj", "out_proj"], ["in_proj", "down_proj"], [*FalconH1.linears]]


@pytest.mark.parametrize(
    ("layout", "targets"),
    [
        *product(["falcon-7b", "falcon-40b"], [*([name] for name in Falcon.linears), *PAIRS]),
        *product(["falcon3"], [*([name] for name in Llama.linears), *SOME]),
        *product(["falcon-h1"], [*([name] for name in FalconH1.linears), *SOME, *BESIDE]),
    ],
)
def test_lora_on_some_linears(layout, targets, calls):
    model = adapted(layout, "4bit", target_modules=targets)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model)
    assert_same(step(model, arguments), reference)
    assert calls["backward"] == 2


@pytest.mark.parametrize(
    ("layout", "r"),
    [
        ("falcon-7b", 1),
        ("falcon-7b", 5),
        ("falcon-40b", 5),
        ("falcon-40b", 8),
        ("falcon3", 1),
        ("falcon3", 5),
        ("falcon-h1", 5),
    ],
)
def test_ranks_that_fit_no_multiple_of_eight(layout, r):
    model = adapted(layout, "4bit", r=r)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model)
    assert_same(step(model, arguments), reference)


class GeluProductsInPyTorch(GeluProducts):
    """What the library's products compute, into the same kinds of slices."""

    def __init__(self):
        super().__init__(None, None)
        self.columns = []

    def forward(self, x, weight, before, after):
        self.columns.append(x.shape[1])
        before.copy_(x @ weight)
        after.copy_(torch.nn.functional.gelu(before))

    def backward(self, grad, weight, before, of_before, after):
        self.columns.append(grad.shape[1])
        of_before.copy_(torch.ops.aten.gelu_backward(grad @ weight, before))
        after.copy_(torch.nn.functional.gelu(before))


@pytest.mark.parametrize("targets", [[*Falcon.linears], ["dense_4h_to_h", "query_key_value"]], ids="-".join)
@pytest.mark.parametrize("r", [4, 8, 12])
@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
def test_gelu_in_the_epilogues_of_products(layout, r, targets, monkeypatch):
    model = adapted(layout, "4bit", r=r, target_modules=targets)
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    products = GeluProductsInPyTorch()
    monkeypatch.setattr(fast_path, "_gelu_products", lambda falcon: Loaded(products))
    apply_fast_path(model)
    assert_same(step(model, arguments), reference)
    # Of LoRA each product has the columns of its own linear alone.
    hidden, padded = model.config.hidden_size, -(-r // 8) * 8
    before_gelu = hidden + (padded if "dense_h_to_4h" in targets else 0)
    assert products.columns == 2 * [before_gelu] + 2 * [hidden + padded]
    keep_dequantized_weights(model, 2**30)
    for _ in range(2):
        assert_same(step(model, arguments), reference)


@pytest.mark.parametrize(
    ("layout", "use_reentrant"),
    [("falcon-7b", False), ("falcon-40b", True), ("falcon3", False), ("falcon-h1", False)],
)
def test_recomputation_changes_no_gradient(layout, use_reentrant, calls):
    model = adapted(layout, "4bit")
    arguments = packed(documents(LENGTHS))
    apply_fast_path(model)
    without = step(model, arguments)
    if use_reentrant:
        model.enable_input_require_grads()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": use_reentrant})
    calls |= {"forward": 0, "backward": 0}
    assert_same(step(model, arguments), without, 1e-6)
    assert calls == {"forward": 2, "backward": 2}  # no block runs a second time as a whole


def test_recomputation_keeps_no_activation():
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    arguments = packed(documents([200, 100]))
    kept = []
    for recompute in (False, True):
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=sizes: s.append(t.numel()) or t, lambda t: t
        ):
            model(**arguments)
        kept.append(sum(sizes))
    assert kept[1] < 0.5 * kept[0]


def test_what_is_kept_is_what_the_memory_model_counts(monkeypatch):
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    parameters = {p.data_ptr() for p in model.parameters()}
    tokens, config = 300, model.config
    storages = {}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        output = model(**packed(documents([200, 100])))
    assert output.loss.requires_grad
    hidden, head = config.hidden_size, config.hidden_size // config.num_attention_heads
    of_a_block = (
        hidden + (hidden + 2 * head + 4 * hidden) + hidden + 2 * 8
    )  # x, projections, attention, LoRA's t
    shared = (
        3 * hidden + 2 * head
    )  # the last block's output, its norm, the head's gradient; cosines and sines
    assert sum(storages.values()) / 4 / tokens < 1.02 * (2 * of_a_block + shared)


def test_micro_batches_accumulate():
    model = adapted("falcon-7b", "4bit")
    first, second = packed(documents(LENGTHS)), packed(documents([30, 9], seed=5))
    results = []
    for _ in range(2):
        model.zero_grad()
        for arguments in (first, second):
            model(**arguments).loss.backward()
        results.append((torch.zeros(()), {n: g.clone() for n, g in gradients(model).items()}))
        apply_fast_path(model)
    assert_same(results[1], results[0])


def test_gradients_reach_the_parameters_through_hooks_as_data_parallel_needs():
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    seen = []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.append(name))
    model(**packed(documents(LENGTHS))).loss.backward()
    assert sorted(seen) == sorted(gradients(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_distributed_data_parallel_reduces_every_gradient_once(checkpointing):
    model = adapted("falcon-7b", "4bit")
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    reduced = []

    def count(_, bucket):
        reduced.extend(bucket.parameters())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        parallel.register_comm_hook(None, count)
        model.zero_grad()
        with parallel.no_sync():
            parallel(**arguments).loss.backward()
        assert not reduced
        parallel(**arguments).loss.backward()
    finally:
        torch.distributed.destroy_process_group()
    assert len(reduced) == len({id(p) for p in reduced}) == len(reference[1])
    for name, gradient in gradients(model).items():
        assert_close(gradient, 2 * reference[1][name], rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3", "falcon-h1"])
def test_one_document_does_not_reach_another(layout):
    model = adapted(layout, "4bit")
    apply_fast_path(model)
    before = documents([20, 30, 9])
    after = [documents([20], seed=99)[0], before[1], documents([9], seed=99)[0]]
    logits = [
        model(torch.cat(docs)[None], sequences=Sequences.from_lengths([20, 30, 9])).logits[0, 20:50]
        for docs in (before, after)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize(
    ("layout", "norms_in_float32", "autocast"),
    [
        ("falcon-7b", False, False),
        ("falcon-7b", True, True),
        ("falcon-40b", True, False),
        ("falcon-40b", False, True),
        ("falcon3", False, False),
        ("falcon3", True, True),
        ("falcon-h1", False, False),
        ("falcon-h1", True, True),
    ],
)
def test_in_bfloat16_gradients_are_as_near_to_float32_as_on_the_reference_path(
    layout, norms_in_float32, autocast
):
    base = tiny_model(layout, "4bit", compute_dtype="bf16")
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    if norms_in_float32:
        for module in model.modules():
            if isinstance(module, layout_of(base.config).norm_class):
                module.float()
    enable_packing(model)
    docs = documents(LENGTHS)
    one_by_one(plain, docs).backward()
    exact = gradients(plain)
    errors = []
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss, ours = step(model, packed(docs))
        assert loss.dtype == torch.float32
        errors.append(sum(float((ours[n] - exact[n]).norm() / exact[n].norm()) for n in exact) / len(exact))
        apply_fast_path(model)
    assert errors[1] < 1.15 * errors[0], errors
    assert errors[1] < 0.05


@pytest.mark.parametrize(
    ("layout", "mode"),
    [
        ("falcon-7b", "4bit"),
        ("falcon-40b", "16bit"),
        ("falcon-11b", "4bit"),
        ("falcon3", "4bit"),
        ("falcon-h1", "4bit"),
    ],
)
def test_in_bfloat16_a_young_adapter_reaches_the_logits(layout, mode):
    # PEFT adds what LoRA gives to an output that is rounded already: after a first step less than half of its
    # last place, and mostly lost.
    docs = documents([200, 300, 120])
    sequences = Sequences.from_lengths([len(document) for document in docs])

    def change(model):
        found = []
        for size in (0.0, 1e-3):
            generator = torch.Generator().manual_seed(0)
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_B" in name:  # as Adam's first step leaves it
                        parameter.copy_(torch.randn(parameter.shape, generator=generator).sign() * size)
                found.append(model(torch.cat(docs)[None], sequences=sequences).logits.double())
        return found[1] - found[0]

    exact = change(adapted(layout, mode, r=16, compute_dtype="fp32"))
    model = adapted(layout, mode, r=16, compute_dtype="bf16")
    arrives = []
    for _ in range(2):
        arrives.append(float((change(model) * exact).sum() / exact.square().sum()))
        apply_fast_path(model)
    assert arrives[0] < 0.75, arrives
    assert arrives[1] == pytest.approx(1, abs=0.15), arrives


def test_evaluation_and_training_may_alternate_with_several_lengths():
    model = adapted("falcon-7b", "4bit")
    arguments = packed(documents(LENGTHS))
    reference = step(model, arguments)
    apply_fast_path(model)
    model.eval()
    for mode in (torch.inference_mode, torch.no_grad):
        with mode():
            assert_close(model(**arguments).loss, reference[0])
    model.train()
    assert_same(step(model, arguments), reference)


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon3"])
def test_where_there_is_a_cache_nothing_changes(layout, calls):
    model = adapted(layout, "4bit").eval()
    ids = documents([9])[0][None]
    before = model(ids).logits
    answer = model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0)
    apply_fast_path(model)
    assert torch.equal(model(ids).logits, before)
    assert torch.equal(
        model.generate(input_ids=ids, max_new_tokens=4, do_sample=False, pad_token_id=0), answer
    )
    assert calls["forward"] == 0


def test_it_is_idempotent_and_reversible(calls):
    model = adapted("falcon-7b", "4bit")
    arguments = packed(documents(LENGTHS))
    before = step(model, arguments)
    names = dict(model.named_parameters()).keys()
    assert apply_fast_path(model) == apply_fast_path(model)
    assert dict(model.named_parameters()).keys() == names
    remove_fast_path(model)
    remove_fast_path(model)
    blocks = [m for m in model.modules() if isinstance(m, FalconDecoderLayer)]
    assert not any(key.startswith("_f") and "fast" in key for block in blocks for key in vars(block))
    assert not any("forward" in vars(block) for block in blocks)
    after = step(model, arguments)
    assert torch.equal(before[0], after[0])
    assert calls["forward"] == 0
    apply_fast_path(model)
    blocks[0].forward = lambda *args, **kwargs: None
    with pytest.raises(RuntimeError, match="wrapped after"):
        remove_fast_path(model)


def test_a_deep_copy_runs_on_its_own_weights():
    model = adapted("falcon-7b", "4bit")
    apply_fast_path(model)
    arguments = packed(documents(LENGTHS))
    before = model(**arguments).loss
    twin = copy.deepcopy(model)
    assert torch.equal(twin(**arguments).loss, before)
    with torch.no_grad():
        for parameter in twin.parameters():
            if parameter.requires_grad:
                parameter.mul_(2)
    assert torch.equal(model(**arguments).loss, before)
    assert not torch.equal(twin(**arguments).loss, before)


def test_adapters_switched_off_or_merged_are_respected(calls):
    model = adapted("falcon-7b", "16bit")
    arguments = packed(documents(LENGTHS))
    with model.disable_adapter():
        without = model(**arguments).loss
    with_it = model(**arguments).loss
    apply_fast_path(model)
    with model.disable_adapter():
        assert_close(model(**arguments).loss, without)
    assert_close(model(**arguments).loss, with_it)
    model.merge_adapter()
    assert_close(model(**arguments).loss, with_it, rtol=1e-4, atol=0)
    assert calls["forward"] == 6


@pytest.mark.parametrize(
    ("layout", "settings", "reason"),
    [
        ("falcon-rw-1b", {}, "positions by ALiBi"),
        ("falcon-7b", {"use_dora": True}, "Dora instead of plain LoRA"),
        ("falcon3", {"use_dora": True}, "Dora instead of plain LoRA"),
        ("falcon-h1", {"use_dora": True}, "Dora instead of plain LoRA"),
    ],
)
def test_what_it_does_not_know_is_left_alone_with_the_reason(layout, settings, reason, calls):
    model = adapted(layout, **settings)
    assert set(apply_fast_path(model).values()) == {f"reference path: {reason}"}
    assert not any("forward" in vars(block) for block in fast_path.blocks_of(model))
    model(**packed(documents(LENGTHS))).loss.backward()
    assert calls["forward"] == 0


@pytest.mark.parametrize(
    ("kernels", "compute_dtype", "asked"),
    [
        ("auto", "auto", None),
        ("required", "auto", "--kernels required"),
        ("auto", "fp8", "--compute_dtype fp8 needs fast kernels"),
    ],
)
def test_a_family_without_a_fast_block_takes_the_reference_path(kernels, compute_dtype, asked, monkeypatch):
    monkeypatch.delitem(fast_path._FAMILIES, "llama")
    model = tiny_model("falcon3")
    reason = "no fast block for this layout yet"
    with fp8.emulated():
        if asked is not None:
            with pytest.raises(UserError) as refused:
                choose_kernels(model, kernels=kernels, compute_dtype=compute_dtype)
            left = f"model.layers.0 runs on the reference path: {reason} (2 of 2 blocks)"
            assert str(refused.value) == f"{asked}: {left}"
            return
        report = choose_kernels(model, kernels=kernels, compute_dtype=compute_dtype)
    assert report == {f"model.layers.{n}": f"reference path: {reason}" for n in range(2)}
    assert not any("forward" in vars(layer) for layer in model.model.layers)


def test_an_adapter_that_changes_later_is_not_computed_wrongly(calls):
    model = adapted("falcon-7b")
    apply_fast_path(model)
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    model(**packed(documents(LENGTHS))).loss.backward()
    assert calls["forward"] == 0


@pytest.mark.parametrize(
    ("layout", "targets", "weights"),
    [
        # Two products a block forward and two backward, but nothing before the first block wants a gradient.
        ("falcon-7b", None, 2 * 4 - 1),
        ("falcon3", None, 2 * 8 - 1),
        ("falcon-h1", None, 2 * 8 - 1),
        ("falcon3", ["gate_proj"], 2 * 8 - 3),  # nor does the first attention
    ],
)
def test_only_gradients_that_are_needed_are_computed(layout, targets, weights):
    model = adapted(layout, "4bit", **({} if targets is None else {"target_modules": targets}))
    apply_fast_path(model)
    rows = []
    take = Workspace.take

    def counted(self, count, columns, like):
        rows.append((count, columns))
        return take(self, count, columns, like)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Workspace, "take", counted)
        model(**packed(documents(LENGTHS))).loss.backward()
    assert len(rows) == weights


@pytest.mark.parametrize(
    ("layout", "mode", "room"),
    [
        *((*case, "for all") for case in (*LAYOUTS_AND_MODES, *SEQUENTIAL_MODES)),
        ("falcon-40b", "4bit", "for half"),
        ("falcon3", "8bit", "for half"),
        ("falcon-7b", "4bit", "for none"),
    ],
)
def test_weights_that_are_kept_are_dequantized_once(layout, mode, room, monkeypatch):
    model = adapted(layout, mode)
    vary_norms(model)
    every = packed(documents(LENGTHS))
    few = few_targets(every)
    reference, of_few = step(model, every), step(model, few)
    with model.disable_adapter(), torch.no_grad():
        without = model(**every).loss
    apply_fast_path(model)
    made = []
    dequantize = ops.dequantize
    monkeypatch.setattr(ops, "dequantize", lambda *a: made.append(a) or dequantize(*a))
    assert_same(step(model, every), reference)
    always, linears = len(made), len(layout_of(model.config).linears)
    size = 4 * layout_of(model.config).linear_parameter_count()
    keep_dequantized_weights(model, {"for all": 2 * size, "for half": size // 2, "for none": 0}[room])
    # A call without adapters is the first, and one of fewer rows reads and writes beside the weights.
    with model.disable_adapter(), torch.inference_mode():
        assert_close(model(**every).loss, without, rtol=1e-5, atol=0)
    assert_same(step(model, few), of_few)
    assert_same(step(model, every), reference)
    made.clear()
    with model.disable_adapter(), torch.no_grad():
        assert_close(model(**every).loss, without, rtol=1e-5, atol=0)
    assert len(made) == {"for all": 0, "for none": 2 * linears}.get(room, len(made))
    made.clear()
    assert_same(step(model, every), reference)
    assert (len(made) == 0, len(made) == always) == (room == "for all", room == "for none")


def facts(**changes):
    model = adapted("falcon-7b", "4bit")
    block = next(m for m in model.modules() if isinstance(m, FalconDecoderLayer))
    return dataclasses.replace(block_facts(block, torch.float32), **changes)


@pytest.mark.parametrize("activation", ["GELU", "SwiGLU"])
def test_decide_says_what_runs(activation):
    given = facts(dtype=torch.bfloat16, activation=activation)
    assert decide(given, triton=True, attention="variable-length kernel") == {
        "block": "fast",
        "attention": "variable-length kernel",
        "weights": "NF4 dequantized",
        activation: "Triton",
        "between": "Triton",
    }
    # Other activations than GELU have no products that compute them.
    ways = decide(given, triton=True, attention="variable-length kernel", gelu_in_products=True)
    assert ways[activation] == {"GELU": "in products", "SwiGLU": "Triton"}[activation]


@pytest.mark.parametrize(("sizes", "way"), [((128, 256), "Triton"), ((24, 256), "PyTorch")])
def test_decide_says_where_a_state_space_runs(sizes, way):
    ways = decide(facts(state_space=sizes), triton=True, attention="variable-length kernel")
    assert ways["state space"] == way


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"alibi": True}, "positions by ALiBi"),
        ({"parallel_attn": False}, "attention and feed-forward are not parallel"),
        ({"activation": "relu"}, "activation relu"),
        ({"hidden_dropout": 0.1}, "hidden dropout 0.1"),
    ],
)
def test_a_falcon_unlike_the_fast_block_is_told_by_what_is_different(changes, reason):
    block = fast_path.blocks_of(adapted("falcon-7b"))[0]
    for name, value in changes.items():
        setattr(block.config, name, value)
    assert block_facts(block, torch.float32).unlike == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [({"hidden_act": "gelu"}, "activation gelu"), ({"attention_dropout": 0.1}, "attention dropout 0.1")],
)
def test_and_so_is_a_falcon3(changes, reason):
    block = fast_path.blocks_of(adapted("falcon3"))[0]
    for name, value in changes.items():
        setattr(block.self_attn.config, name, value)
    assert llama.block_facts(block, torch.float32).unlike == reason


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"hidden_act": "gelu"}, "activation gelu"),
        ({"attention_dropout": 0.1}, "attention dropout 0.1"),
        ({"key_multiplier": -0.5}, "key multiplier -0.5"),
    ],
)
def test_and_so_is_a_falcon_h1(changes, reason):
    block = fast_path.blocks_of(adapted("falcon-h1"))[0]
    for name, value in changes.items():
        setattr(block.self_attn.config, name, value)
    assert falcon_h1.block_facts(block, torch.float32).unlike == reason


def test_and_so_is_one_with_biases():
    block = fast_path.blocks_of(adapted("falcon-7b"))[0]
    block.mlp.dense_h_to_4h.base_layer.bias = torch.nn.Parameter(torch.zeros(768), requires_grad=False)
    assert block_facts(block, torch.float32).unlike == "linears with biases"
    block = fast_path.blocks_of(adapted("falcon3"))[0]
    block.mlp.down_proj.base_layer.bias = torch.nn.Parameter(torch.zeros(64), requires_grad=False)
    assert llama.block_facts(block, torch.float32).unlike == "linears with biases"


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"unlike": "positions by ALiBi"}, "positions by ALiBi"),
        ({"dtype": torch.float16}, "computes in float16"),
        ({"trainable": ("ln_attn.weight",)}, "trains more than LoRA: ln_attn.weight"),
        ({"lora_unknown": "2 adapters are active"}, "2 adapters are active"),
    ],
)
def test_decide_says_why_not(changes, reason):
    decision = decide(facts(**changes), triton=True, attention="variable-length kernel")
    assert decision == {"block": "reference", "reason": reason}


@pytest.mark.parametrize(
    ("changes", "asked"),
    [
        ({"lora_dropout": 0.05}, {"lora_dropout": 0.05}),
        ({"scaled": True}, {"scales": True}),
        ({"prefix_rows": 5}, {"prefix": True}),
    ],
)
def test_what_fp8_excludes_is_told_of_a_block_in_the_words_of_the_one_who_decides(changes, asked):
    given = facts(**changes)
    decision = decide(given, triton=True, attention="variable-length kernel", fp8_products=True)
    assert decision == {"block": "reference", "reason": fp8_excludes(**asked)}
    assert "fp8" in decision["reason"].lower()
    assert decide(given, triton=True, attention="variable-length kernel")["block"] == "fast"


def test_the_facts_see_more_than_one_adapter_and_trainable_norms():
    model = adapted("falcon-7b", "4bit")
    model.add_adapter("second", model.peft_config["default"])
    model.base_model.set_adapter(["default", "second"])
    block = next(m for m in model.modules() if isinstance(m, FalconDecoderLayer))
    assert block_facts(block, torch.float32).lora_unknown == "2 adapters are active"
    block.input_layernorm.weight.requires_grad_()
    assert block_facts(block, torch.float32).trainable == ("input_layernorm.weight",)
