"""The same invariants as on the CPU, with the kernels that a GPU runs."""

import copy
import gc
import time

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from falcon_qlora.commands import prepare
from falcon_qlora.common.quantities import GIB
from falcon_qlora.kernels.cross_entropy import chunked_cross_entropy
from falcon_qlora.models import packed_attention as attention
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import PRESETS, layout_of, preset_config
from falcon_qlora.models.layouts.falcon import alibi_bias
from falcon_qlora.models.load import load_model
from falcon_qlora.models.packed_attention import Sequences, packed_attention
from falcon_qlora.models.sizes import weight_bytes
from tests.benchmarks.loading import rss_anon
from tests.layouts import FAMILIES, LAYOUTS, MODES, attach_lora, documents, plain_float32, tiny_model
from tests.packing import gradients, one_by_one, packed, with_adapter
from tests.unit.test_cross_entropy import reference
from tests.unit.test_models_forward import assert_two_blocks_compute_what_transformers_does
from tests.unit.test_quantized_files import same_weights

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
LENGTHS = [7, 300, 1, 130, 64]


def relative(a, b):
    return ((a.float() - b.float()).norm() / b.float().norm()).item()


def attention_inputs(heads, kv_heads, head_dim, lengths, dtype):
    tokens = sum(lengths)
    shapes = [(tokens, heads, head_dim), (tokens, kv_heads, head_dim), (tokens, kv_heads, head_dim)]
    return [torch.randn(s, device="cuda", dtype=dtype, requires_grad=True) for s in shapes]


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "with_alibi"),
    [(71, 1, 64, False), (128, 8, 64, False), (32, 8, 128, False), (32, 32, 64, True)],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_variable_length_kernel_computes_what_float32_does(heads, kv_heads, head_dim, with_alibi, dtype):
    inputs = attention_inputs(heads, kv_heads, head_dim, LENGTHS, dtype)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    sequences = Sequences.from_lengths(LENGTHS, "cuda")
    bias = alibi_bias(sequences, heads, dtype) if with_alibi else None
    width = head_dim + 8 if with_alibi else head_dim
    assert attention.takes_varlen(torch.device("cuda", 0), dtype, width, 0.0)
    assert not attention.takes_varlen(torch.device("cuda", 0), torch.float32, width, 0.0)
    output = packed_attention(*inputs, sequences, bias=bias)
    expected = packed_attention(*exact, sequences, bias=None if bias is None else bias.float())
    upstream = torch.randn_like(expected)
    assert relative(output, expected) < 1e-2
    ours = torch.autograd.grad(output, inputs, upstream.to(dtype))
    theirs = torch.autograd.grad(expected, exact, upstream)
    assert all(relative(a, b) < 2e-2 for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_exactly_the_blocks_linears_are_quantized_on_the_gpu(layout, mode):
    model = tiny_model(layout, mode, device="cuda")
    assert {t.device.type for t in [*model.parameters(), *model.buffers()]} == {"cuda"}
    stored = {"4bit": torch.uint8, "8bit": torch.int8, "16bit": model.dtype}[mode]
    linears = layout_of(model.config).expected_linears()
    assert {model.get_submodule(n).weight.dtype for n in linears} == {stored}


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}, {"token_rows": [3, 5]}])
@pytest.mark.parametrize("layout", FAMILIES)
def test_lora_starts_with_the_numbers_that_peft_draws_on_the_cpu(layout, settings):
    there, here = (
        attach_lora(tiny_model(layout, "16bit", device, compute_dtype="fp32"), r=4, seed=5, **settings)
        for device in ("cuda", "cpu")
    )
    base = tiny_model(layout, "16bit", compute_dtype="fp32")
    torch.manual_seed(5)
    again = get_peft_model(base, copy.copy(here.peft_config["default"]))
    for name, parameter in again.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            assert torch.equal(here.get_parameter(name), parameter), name
            assert torch.equal(there.get_parameter(name).cpu(), parameter), name


@pytest.mark.parametrize("layout", FAMILIES)
def test_in_float32_loss_and_gradients_equal_each_document_alone(layout):
    base = tiny_model(layout, "4bit", device="cuda", compute_dtype="fp32")
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    expected = one_by_one(plain, docs)
    expected.backward()
    loss = model(**packed([doc.cuda() for doc in docs])).loss
    loss.backward()
    assert_close(loss.cpu(), expected, rtol=1e-5, atol=0)
    expected_gradients = gradients(plain)
    for name, gradient in gradients(model).items():
        assert relative(gradient.cpu(), expected_gradients[name]) < 1e-3, name


@pytest.mark.slow
@pytest.mark.parametrize("preset", PRESETS)
def test_two_blocks_of_every_published_shape(preset, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # in Transformers' convolution
    gc.collect()
    torch.cuda.empty_cache()
    assert_two_blocks_compute_what_transformers_does(preset, "cuda")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("autocast", [False, True])
def test_in_bfloat16_they_are_as_close_as_bfloat16_is(layout, mode, autocast):
    base = tiny_model(layout, mode, device="cuda", compute_dtype="bf16")
    plain = with_adapter(plain_float32(base))
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    expected = one_by_one(plain, docs)
    expected.backward()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=autocast):
        loss = model(**packed([doc.cuda() for doc in docs])).loss
    loss.backward()
    assert_close(loss.cpu(), expected, rtol=3e-2, atol=0)
    expected_gradients = gradients(plain)
    for name, gradient in gradients(model).items():
        assert gradient.dtype == torch.float32
        # LLM.int8() also quantizes the activations.
        assert relative(gradient.cpu(), expected_gradients[name]) < (0.3 if mode == "8bit" else 0.1), name


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("mode", ["4bit", "16bit"])
@pytest.mark.parametrize("layout", FAMILIES)
def test_changing_one_document_leaves_the_others_as_they_were(layout, mode, checkpointing):
    model = with_adapter(tiny_model(layout, mode, device="cuda", compute_dtype="bf16"))
    enable_packing(model)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    before = documents([200, 300, 90], device="cuda")
    after = [documents([200], seed=9, device="cuda")[0], before[1], documents([90], seed=8, device="cuda")[0]]
    results = []
    for docs in (before, after):
        arguments = packed(docs)
        logits = model(arguments["input_ids"], sequences=arguments["sequences"]).logits[0, 200:500]
        positions = torch.arange(200, 499, device="cuda")
        arguments |= {"target_positions": positions, "targets": torch.cat(docs)[positions + 1]}
        model.zero_grad()
        model(**arguments).loss.backward()
        results.append((logits.detach(), copy.deepcopy(gradients(model))))
    assert torch.equal(results[0][0], results[1][0])
    # The kernel's backward adds up queries' gradients in no fixed order.
    for name, gradient in results[0][1].items():
        assert relative(gradient, results[1][1][name]) < 2e-2, name


def test_int8_without_a_threshold_leaks_nothing_either():
    model = load_model(
        LAYOUTS["falcon-7b"],
        quantize_mode="8bit",
        device="cuda",
        compute_dtype="bf16",
        llm_int8_threshold=0.0,
    )
    enable_packing(model)
    before = documents([200, 300], device="cuda")
    after = [documents([200], seed=9, device="cuda")[0], before[1]]
    logits = [
        model(torch.cat(docs)[None], sequences=Sequences.from_lengths([200, 300], "cuda")).logits[0, 200:]
        for docs in (before, after)
    ]
    assert torch.equal(*logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_cross_entropy_at_falcons_vocabulary_keeps_no_logits(dtype):
    hidden = torch.randn(3000, 512, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(65024, 512, device="cuda", dtype=dtype) * 0.05
    targets = torch.randint(0, 65024, (3000,), device="cuda")
    expected = reference(hidden, weight, targets)
    expected_gradient = torch.autograd.grad(expected, hidden)[0]
    del expected
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss = chunked_cross_entropy(hidden, weight, targets)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert torch.cuda.max_memory_allocated() - before < 1.2 * GIB
    assert_close(loss, reference(hidden, weight, targets), rtol=1e-5, atol=1e-2)
    assert relative(gradient, expected_gradient) < {torch.float32: 1e-4}.get(dtype, 1e-2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "mode"), [("falcon-7b", "4bit"), ("falcon-7b", "8bit"), ("falcon-40b", "4bit")]
)
def test_real_shapes_load_in_seconds_and_take_what_the_arithmetic_says(preset, mode):
    config = preset_config(preset)
    gc.collect()  # what another test has left would be freed while this one measures
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    started = time.perf_counter()
    model = load_model(f"random:{preset}", quantize_mode=mode, device="cuda")
    torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    taken = torch.cuda.memory_allocated() - before
    peak = torch.cuda.max_memory_allocated() - before
    expected = weight_bytes(config, mode)
    assert seconds < 60
    assert 0.99 < taken / expected < 1.02
    embedding = 2 * config.vocab_size * config.hidden_size
    assert peak < taken + 4 * embedding
    trainable = sum(p.numel() for p in attach_lora(model, r=64).parameters() if p.requires_grad)
    assert trainable == {"falcon-7b": 130_547_712, "falcon-40b": 444_334_080}[preset]


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_a_prepared_base_loads_at_once_to_the_last_bit_and_takes_no_memory_of_the_host(tmp_path, mode):
    name, folder = "random:falcon-7b", str(tmp_path / "prepared")
    assert prepare.main(["-m", name, "-q", mode, "--output_dir", folder]) == 0
    load_model("tiny")
    gc.collect()
    before = rss_anon()
    torch.cuda.synchronize()
    started = time.perf_counter()
    model = load_model(folder)
    torch.cuda.synchronize()
    seconds, grown = time.perf_counter() - started, rss_anon() - before
    assert same_weights(model, load_model(name, quantize_mode=mode))
    assert grown < 2 * GIB
    assert seconds < {"4bit": 3, "8bit": 6}[mode]
