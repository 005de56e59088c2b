"""What every method promises: it starts as the base, all of it trains, and what it saves opens again."""

import copy
import json
from functools import partial

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

import falcon_qlora
from falcon_qlora.common.errors import UserError, reason_of
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_folder import RECORD, TENSORS
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import method_of, trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.table import METHODS
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import layout_of, preset_config
from falcon_qlora.models.quantize import holds_quantized_weight
from falcon_qlora.models.tokenizer import save_tokenizer
from tests.integration.runs import room_for
from tests.layouts import FAMILIES, LAYOUTS, MODES, documents, plain_float32, tiny_model, trainable_names
from tests.packing import gradients, packed
from tests.small_tokenizer import small_tokenizer

LENGTHS = [7, 40, 1, 12]
METHODS_TO_TRY = {
    "lora": Lora(r=4, alpha=8),
    "lora on slices": Lora(r=2, alpha=8, slices=("query", "value")),
    "adapter": Adapter(prefix_length=5, first_block=1),
    "adapter_v2": AdapterV2(prefix_length=5, first_block=1),
}
ADAPTERS = ("adapter", "adapter_v2")


def base_model(layout, mode="16bit", compute_dtype="auto"):
    model = tiny_model(layout, mode, compute_dtype=compute_dtype)
    enable_packing(model)
    return model


def away_from_start(model, seed=0):
    """Move every trainable parameter by an amount that shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                step = 1.0 if "prefix_attention" in name else 0.1
                change = torch.randn(parameter.shape, generator=generator) * step
                parameter.add_(change.to(parameter.device))
    return model


def attached(name, layout, mode="16bit", compute_dtype="auto"):
    return away_from_start(METHODS_TO_TRY[name].attach(base_model(layout, mode, compute_dtype), seed=3))


@pytest.mark.parametrize("compute_dtype", ["bf16", "fp32"])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_at_the_start_the_output_is_exactly_the_bases(layout, mode, compute_dtype):
    ids = documents([30])[0][None]
    docs = packed(documents(LENGTHS))
    for method in [*METHODS_TO_TRY.values(), *([Full()] if mode == "16bit" else [])]:
        model = base_model(layout, mode, compute_dtype)
        with torch.no_grad():
            expected = model(ids).logits, model(docs["input_ids"], sequences=docs["sequences"]).logits
            model = method.attach(model, seed=3).eval()
            assert torch.equal(model(ids).logits, expected[0]), method
            packed_logits = model(input_ids=docs["input_ids"], sequences=docs["sequences"]).logits
            assert torch.equal(packed_logits, expected[1]), method


@pytest.mark.parametrize(("mode", "compute_dtype"), [("16bit", "bf16"), ("4bit", "bf16"), ("8bit", "fp32")])
@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon-7b", "falcon-40b"])
@pytest.mark.parametrize("name", METHODS_TO_TRY)
def test_every_trainable_parameter_has_a_gradient_and_moves(name, layout, mode, compute_dtype):
    method = METHODS_TO_TRY[name]
    model = method.attach(base_model(layout, mode, compute_dtype), seed=3)
    with torch.no_grad():
        model(documents([30])[0][None])  # nothing that it computes may be kept
    arguments = packed(documents(LENGTHS))
    with torch.no_grad():
        model(**arguments)
    parameters = dict(model.named_parameters())
    names = trainable_names(model)
    assert sum(parameters[n].numel() for n in names) == trainable_count(method, model.config)
    assert {parameters[n].dtype for n in names} == {torch.float32}
    optimizer = torch.optim.AdamW([parameters[n] for n in names], lr=1e-3, weight_decay=0.0)

    def step():
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=compute_dtype == "bf16"):
            loss = model(**arguments).loss
        loss.backward()
        optimizer.step()

    step()
    away_from_start(model)
    model.zero_grad()
    model(**arguments).loss.backward()
    found = gradients(model)
    assert sorted(found) == sorted(names)
    without = [n for n in names if found[n] is None or not found[n].count_nonzero()]
    assert not without
    before = {n: parameters[n].detach().clone() for n in names}
    for _ in range(10):
        step()
    assert not [n for n in names if torch.equal(parameters[n], before[n])]
    assert all(parameters[n].isfinite().all() for n in names)


def vectors_of(linear):
    """A linear's weight and bias, and Adapter v2's scale and bias or what stands for none; float32."""
    outputs = linear.out_features
    weight = linear.weight.detach().float()
    bias = torch.zeros(outputs) if linear.bias is None else linear.bias.detach().float()
    learned = getattr(linear, "scale_and_bias", None)
    scale, shift = (torch.ones(outputs), torch.zeros(outputs)) if learned is None else learned.parameters()
    return weight, bias, scale.detach(), shift.detach()


def reference_attention(attention, hidden, prefix, gate):
    """A Falcon block's attention with a prefix, head by head from the definition, in float32.

    Args: `hidden` [S, hidden] after the norm; `prefix` [P, hidden]; `gate` [Q]. Returns [S, hidden].
    """
    weight, bias, scale, shift = vectors_of(attention.query_key_value)
    dim = attention.head_dim
    heads, length = attention.num_heads, hidden.shape[0]
    if attention.new_decoder_architecture:
        group = heads // attention.num_kv_heads
        places = [
            tuple((group + 2) * (h // group) + place for place in (h % group, group, group + 1))
            for h in range(heads)
        ]
    elif attention.multi_query:
        places = [(h, heads, heads + 1) for h in range(heads)]
    else:
        places = [(3 * h, 3 * h + 1, 3 * h + 2) for h in range(heads)]

    def project(place, rows):
        part = slice(place * dim, (place + 1) * dim)
        return scale[part] * (rows @ weight[part].T + bias[part] + shift[part])

    def rotate(rows):
        rotated = torch.empty_like(rows)
        for position in range(length):
            for pair in range(dim // 2):
                angle = torch.tensor(
                    position * attention.config.rope_parameters["rope_theta"] ** (-2 * pair / dim)
                )
                one, two = rows[position, pair], rows[position, pair + dim // 2]
                rotated[position, pair] = one * angle.cos() - two * angle.sin()
                rotated[position, pair + dim // 2] = two * angle.cos() + one * angle.sin()
        return rotated

    outputs = []
    for head, (of_query, of_key, of_value) in enumerate(places):
        query, key, value = (project(place, hidden) for place in (of_query, of_key, of_value))
        if not attention.config.alibi:
            query, key = rotate(query), rotate(key)
        scores = query @ key.T
        if attention.config.alibi:
            scores = scores + 2 ** (-8 * (head + 1) / heads) * torch.arange(length)
        scores = (scores / dim**0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        output = scores.softmax(-1) @ value
        prefix_key, prefix_value = project(of_key, prefix), project(of_value, prefix)
        read = (query @ prefix_key.T / dim**0.5).softmax(-1) @ prefix_value
        outputs.append(output + gate[head] * read)
    weight, bias, scale, shift = vectors_of(attention.dense)
    return scale * (torch.cat(outputs, -1) @ weight.T + bias + shift)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ADAPTERS)
def test_attention_with_a_prefix_is_its_definition(name, layout):
    model = attached(name, layout)
    attention = model.transformer.h[1].self_attention
    assert not hasattr(model.transformer.h[0].self_attention, "prefix_attention")
    seen = []
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.append((args[0], output[0])), with_kwargs=True
    )
    docs = documents([9, 14])
    arguments = packed(docs)
    with torch.no_grad():
        model(docs[1][None], use_cache=False)
        model(arguments["input_ids"], sequences=arguments["sequences"])
        added = attention.prefix_attention
        assert added.gate.abs().min() > 1e-3
        for (hidden, output), document in [(seen[0], slice(0, 14)), (seen[1], slice(9, 23))]:
            expected = reference_attention(attention, hidden[0, document], added.prefix, added.gate)
            assert_close(output[0, document], expected, rtol=1e-4, atol=1e-5)
            without = reference_attention(attention, hidden[0, document], added.prefix, 0 * added.gate)
            assert (expected - without).abs().max() > 1e-3, "the prefix hardly matters: this says little"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_adapter_v2s_linears_are_their_definition(layout):
    model = attached("adapter_v2", layout)
    block = model.transformer.h[1]
    linears = [block.self_attention.query_key_value, block.mlp.dense_4h_to_h, model.lm_head]
    for linear in linears:
        rows = torch.randn(6, linear.in_features)
        vectors = linear.scale_and_bias
        offset = 0 if linear.bias is None else linear.bias
        expected = vectors.scale * (rows @ linear.weight.T + offset + vectors.bias)
        assert_close(linear(rows), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", ["falcon-rw-1b", "falcon-7b", "falcon-11b", "falcon-40b", "falcon3"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_packed_gives_the_loss_and_gradients_of_each_document_alone(name, layout, mode):
    model = attached(name, layout, mode)
    docs = documents(LENGTHS)
    losses = [
        torch.nn.functional.cross_entropy(model(doc[None]).logits[0, :-1], doc[1:], reduction="sum")
        for doc in docs
        if len(doc) > 1
    ]
    expected = torch.stack(losses).sum()
    expected.backward()
    alone = {n: g.clone() for n, g in gradients(model).items()}
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        loss = model(**packed(docs)).loss
        loss.backward()
        assert_close(loss, expected, rtol=1e-5, atol=0)
        for n, gradient in gradients(model).items():
            assert_close(gradient, alone[n], rtol=1e-3, atol=2e-4, msg=n)


@pytest.mark.parametrize("layout", FAMILIES)
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_cache_and_a_padded_batch_change_nothing(name, layout):
    model = attached(name, layout).eval()
    long, short = documents([12, 7])
    with torch.no_grad():
        expected = model(long[None], use_cache=False).logits
        cache, logits = None, []
        for part in long[None].split([8, 1, 3], dim=1):
            output = model(part, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            logits.append(output.logits)
        assert_close(torch.cat(logits, 1), expected, rtol=1e-4, atol=1e-4)
        batch = torch.stack([long, torch.cat([torch.zeros(5, dtype=torch.int64), short])])
        mask = torch.tensor([[1] * 12, [0] * 5 + [1] * 7])
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        padded = model(batch, attention_mask=mask, position_ids=positions).logits
        assert_close(padded[0], expected[0], rtol=1e-4, atol=1e-4)
        assert_close(padded[1, 5:], model(short[None]).logits[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS_TO_TRY)
@torch.no_grad()
def test_what_is_saved_opens_by_itself_and_can_be_switched_off(tmp_path, name, mode):
    ids = documents([12])[0][None]
    base = base_model("falcon-40b", mode)(ids).logits
    model = attached(name, "falcon-40b", mode).eval()
    method = method_of(model)
    expected = model(ids).logits
    method.save(model, tmp_path)
    opened = falcon_qlora.load_adapter(tmp_path, quantize_mode=mode, device="cpu")
    assert torch.equal(opened(ids).logits, expected)
    assert (expected - base).abs().max() > 0.1
    assert not trainable_names(opened)
    assert not opened.training
    with method_of(opened).disabled(opened):
        assert torch.equal(opened(ids).logits, base)
    assert torch.equal(opened(ids).logits, expected)
    assert type(method_of(opened)) is type(method)
    assert (method.why_not_merged is None) == name.startswith("lora")
    other = method.attach(base_model("falcon-40b", mode), seed=9)
    method.restore(other, tmp_path)
    assert trainable_names(other) == trainable_names(model)
    assert torch.equal(other.eval()(ids).logits, expected)
    twin = copy.deepcopy(other)
    away_from_start(other)
    assert torch.equal(twin(ids).logits, expected)


def test_an_adapter_of_another_shape_is_refused(tmp_path):
    model = attached("adapter", "falcon-7b")
    method_of(model).save(model, tmp_path)
    other = Adapter(prefix_length=4, first_block=1).attach(tiny_model("falcon-7b"))
    with pytest.raises(RuntimeError, match="does not fit"):
        method_of(other).restore(other, tmp_path)
    with pytest.raises(UserError, match="no block would have a prefix"):
        Adapter(first_block=2).attach(tiny_model("falcon-7b"))


@pytest.mark.parametrize("method", [METHODS_TO_TRY["lora"], METHODS_TO_TRY["adapter"], Full()])
def test_it_opens_as_its_record_says_unless_the_caller_does(tmp_path, method):
    model = method.attach(base_model("falcon-40b"))
    method.save(model, tmp_path)
    record = tmp_path / RECORD
    alone = {"method": method.name}
    said = {**alone, "quantize_mode": "4bit", "double_quantization": False}

    def opened(content, **arguments):
        record.write_text(json.dumps(content))
        model = falcon_qlora.load_adapter(tmp_path, device="cpu", **arguments)
        states = [p.quant_state.nested for p in model.parameters() if hasattr(p, "quant_state")]
        linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
        stored = [m for m in ("4bit", "8bit") for linear in linears if holds_quantized_weight(linear, m)]
        return (stored or ["16bit"])[0], any(states)

    assert opened({**alone, "quantize_mode": "8bit"}) == ("8bit", False)
    assert opened({**alone, "quantize_mode": "16bit"}) == ("16bit", False)
    assert opened(said) == ("4bit", False)
    assert opened({**said, "double_quantization": True}) == ("4bit", True)
    assert opened(said, double_quantization=True) == ("4bit", True)
    assert opened(said, quantize_mode="8bit") == ("8bit", False)
    assert opened(alone) == (("16bit", False) if method.name == "full" else ("4bit", True))


class TestSlices:
    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("slices", [("query", "value"), ("key",), ("query", "key", "value")])
    def test_only_they_are_adapted_and_plain_peft_opens_it(self, tmp_path, layout, slices):
        from peft import PeftModel

        base = tiny_model(layout)
        plain = plain_float32(base)
        plain.save_pretrained(tmp_path / "base")
        method = Lora(r=3, alpha=6, slices=slices)
        model = away_from_start(method.attach(base, seed=3)).eval()
        assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trainable_count(
            method, base.config
        )
        method.save(model, tmp_path / "adapter")
        ids = documents([12])[0][None]
        opened = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
        )
        assert_close(opened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)
        assert (opened(ids).logits - plain(ids).logits).abs().max() > 1e-2
        merged = opened.merge_and_unload()
        attention, before = merged.transformer.h[0].self_attention, plain.transformer.h[0].self_attention
        change = attention.query_key_value.weight - before.query_key_value.weight
        moved = dict(zip(("query", "key", "value"), attention._split_heads(change.T[None]), strict=True))
        for name, heads in moved.items():
            assert bool(heads.abs().max() > 1e-4) == (name in slices), name
        # Each slice has an update of its own rank and scale.
        layer = model.base_model.model.transformer.h[0].self_attention.query_key_value
        first = layer.lora_A["default"].weight[:3]
        expected = 6 / 3 * getattr(layer.lora_B["default"], slices[0]) @ first
        rows = getattr(layer.lora_B["default"], f"_rows_of_{slices[0]}")
        assert_close(change[rows], expected, rtol=1e-4, atol=1e-6)

    @pytest.mark.parametrize("mode", MODES)
    def test_they_run_on_the_fast_path_with_the_same_gradients(self, mode):
        model = attached("lora on slices", "falcon-40b", mode)
        arguments = packed(documents(LENGTHS))
        results = []
        for fast in (False, True):
            if fast:
                assert all(what.startswith("fast") for what in apply_fast_path(model).values())
            model.zero_grad()
            loss = model(**arguments).loss
            loss.backward()
            results.append((loss.detach(), {n: g.clone() for n, g in gradients(model).items()}))
        assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)

    def test_training_on_goes_on_with_the_slices_alone(self, tmp_path):
        model = attached("lora on slices", "falcon-7b")
        method_of(model).save(model, tmp_path)
        (tmp_path / "falcon_qlora.json").write_text('{"method": "lora", "lora_slices": ["value", "query"]}')
        again = falcon_qlora.load_adapter(tmp_path, quantize_mode="16bit", trainable=True)
        assert trainable_names(again) == trainable_names(model)
        assert method_of(again).describe() == method_of(model).describe()
        parameters, others = dict(model.named_parameters()), dict(again.named_parameters())
        assert all(torch.equal(parameters[name], others[name]) for name in trainable_names(model))

    def test_an_adapter_of_the_whole_projection_is_refused(self, tmp_path):
        whole = away_from_start(
            Lora(r=4, target_modules=("query_key_value",)).attach(tiny_model("falcon-7b"))
        )
        method_of(whole).save(whole, tmp_path)
        model = METHODS_TO_TRY["lora on slices"].attach(tiny_model("falcon-7b"))
        with pytest.raises(RuntimeError, match="outside the slices"):
            method_of(model).restore(model, tmp_path)

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"slices": ("querry",)}, "did you mean query"),
            ({"slices": ("query",), "target_modules": ("dense",)}, "slices of query_key_value alone"),
            ({"slices": ("query",), "use_dora": True}, "neither"),
        ],
    )
    def test_what_they_do_not_go_with_is_refused(self, settings, message):
        with pytest.raises(UserError, match=message):
            Lora(**settings).attach(tiny_model("falcon-7b"))


class TestFull:
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_it_trains_and_saves_a_whole_model_that_transformers_opens(self, tmp_path, layout):
        model = Full().attach(base_model(layout))
        assert sum(p.numel() for p in model.parameters()) == trainable_count(Full(), model.config)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        arguments = packed(documents(LENGTHS))
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        for _ in range(3):
            optimizer.zero_grad()
            model(**arguments).loss.backward()
            assert not [
                n for n, p in model.named_parameters() if p.grad is None or not p.grad.count_nonzero()
            ]
            optimizer.step()
        assert not [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
        method_of(model).save(model.eval(), tmp_path)
        ids = documents([12])[0][None]
        opened = AutoModelForCausalLM.from_pretrained(tmp_path)
        assert_close(opened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)
        ours = falcon_qlora.load_adapter(tmp_path)
        assert torch.equal(ours(ids).logits, model(ids).logits)
        fresh = Full().attach(base_model(layout))
        Full().restore(fresh, tmp_path)
        assert torch.equal(fresh.eval()(ids).logits, model(ids).logits)

    @pytest.mark.parametrize("mode", ["4bit", "8bit"])
    def test_a_quantized_base_is_refused(self, mode):
        with pytest.raises(UserError, match=f"stored in {mode} cannot take a step"):
            Full().attach(tiny_model("falcon-7b", mode))


PUBLISHED = {
    "adapter": (Adapter(), 1_365_330),
    "adapter_v2": (AdapterV2(), 3_839_186),
    "lora": (Lora(r=8, slices=("query", "value")), 3_506_176),
    "full": (Full(), 6_921_720_704),
}


@pytest.mark.parametrize("name", METHODS)
def test_falcon_7b_trains_as_many_parameters_as_published(name):
    method, count = PUBLISHED[name]
    assert trainable_count(method, preset_config("falcon-7b")) == count
    untied = preset_config("falcon-7b", tie_word_embeddings=False)
    assert layout_of(untied).parameter_count() == 7_217_189_760


@pytest.mark.parametrize(
    ("layout", "name"),
    [
        (layout, name)
        for layout in FAMILIES
        for name in METHODS_TO_TRY
        if not (layout == "falcon3" and "slices" in name)  # its projections are not fused
    ],
)
def test_the_counts_and_the_saved_shapes_are_those_of_the_tensors(tmp_path, layout, name):
    method = METHODS_TO_TRY[name]
    model = method.attach(tiny_model(layout))
    shapes = {n: p.numel() for n, p in model.named_parameters() if p.requires_grad}
    assert sum(shapes.values()) == trainable_count(method, model.config)
    groups = method.parameter_groups(model.config)
    total = sum(p.numel() for p in model.parameters())
    assert total == layout_of(model.config).parameter_count() + sum(g.count for g in groups if not g.of_base)
    method.save(model, tmp_path)
    saved = {name: tuple(each.shape) for name, each in load_file(tmp_path / TENSORS).items()}
    dtype = model.config.dtype
    assert method.saved_shapes(model.config) == saved
    assert model.config.dtype == dtype


@pytest.mark.parametrize("name", ["lora", "adapter", "full", "tokenizer"])
def test_each_file_that_cannot_be_saved_is_named(name, tmp_path):
    if name == "tokenizer":
        save = partial(save_tokenizer, small_tokenizer())
    else:
        method = (METHODS_TO_TRY | {"full": Full()})[name]
        save = partial(method.save, method.attach(base_model("falcon-7b"), seed=3))
    folders = [tmp_path / each for each in ("whole", *"0123")]
    for each in folders:
        each.mkdir()
    save(folders[0])
    sizes = {file.name: file.stat().st_size for file in folders[0].iterdir()}
    told = set()
    for folder, size in zip(folders[1:], sizes.values(), strict=False):
        with room_for(size - 1), pytest.raises(OSError, match="File too large") as failed:
            save(folder)
        file = reason_of(failed.value, folder).removesuffix(": File too large")
        assert sizes[file] >= size
        told.add(file)
    assert max(sizes, key=sizes.get) in told
