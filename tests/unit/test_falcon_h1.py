"""Falcon-H1 on both paths; Transformers' own model on each document alone is the truth."""

import copy
import json

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, FalconH1Config, FalconH1ForCausalLM

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import collate
from falcon_qlora.inference.evaluation import folder_predictions, predictions, token_losses
from falcon_qlora.kernels import ssd
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import method_of, trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.fast_path import apply_fast_path, choose_kernels, remove_fast_path
from falcon_qlora.models.forward import disable_packing, enable_packing, pack_batches
from falcon_qlora.models.layouts import layout_of, preset_config, read_config
from falcon_qlora.models.layouts.falcon_h1 import FalconH1
from falcon_qlora.models.load import load_model
from falcon_qlora.models.step_memory import Step
from falcon_qlora.step.loss import documents_of, evaluated
from falcon_qlora.training import leak_probe
from tests.layouts import MODES, attach_lora, check_adapter, documents, plain_float32, tiny_model
from tests.packing import gradients, one_by_one, packed, with_adapter

# Of one token; that end on a chunk's edge (128 and 512 tokens are before them); many in one chunk; over many.
LENGTHS = [100, 28, 1, 290, 60, 33, 9, 1, 1, 5]
SIZES = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden / heads
    "mamba_d_ssm": 128,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_d_state": 16,
    "mamba_chunk_size": 32,
    "rope_theta": 1e11,
    "initializer_range": 0.1,
    "bos_token_id": 1,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "embedding_multiplier": 3.0,
    "lm_head_multiplier": 0.4,
    "key_multiplier": 0.7,
    "attention_in_multiplier": 1.3,
    "attention_out_multiplier": 0.8,
    "ssm_in_multiplier": 1.25,
    "ssm_out_multiplier": 0.9,
    "mlp_multipliers": [0.9, 0.6],
    "ssm_multipliers": [0.8, 0.6, 0.9, 1.2, 0.7],
}
KINDS = {
    "one group, no norm": {"tie_word_embeddings": True},
    "two groups, no norm, no bias": {"mamba_n_groups": 2, "mamba_conv_bias": False},
    "norm behind the gate": {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": False},
    "norm before the gate": {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": True},
    "limited steps": {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "time_step_limit": (0.3, 0.6)},
}


def plain_model(seed=0, dtype=torch.float32, **settings):
    """Transformers' own, of which no parameter is what it would be at the start."""
    torch.manual_seed(seed)
    plain = FalconH1ForCausalLM(FalconH1Config(**SIZES | settings))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            if "norm" in name or name.endswith((".D", "conv1d.weight")):
                parameter.uniform_(0.3, 1.0)
            elif name.endswith((".A_log", ".dt_bias", ".bias")):
                parameter.uniform_(-2.0, -0.5)
    return plain.to(dtype).eval()


def loaded(folder, plain, **how):
    plain.save_pretrained(folder)
    return load_model(str(folder), device="cpu", **{"quantize_mode": "16bit"} | how)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Kind → a model as Transformers has it, and as it is loaded here, with the same adapter."""
    made = {}

    def of(kind):
        if kind not in made:
            plain = plain_model(**KINDS[kind])
            ours = loaded(tmp_path_factory.mktemp("falcon-h1"), plain)
            enable_packing(ours)
            made[kind] = with_adapter(plain), with_adapter(ours)
        return made[kind]

    return of


@pytest.fixture(params=[False, True], ids=["reference", "fast"])
def on_path(request):
    """Runs a model on one path, and then leaves it on the reference path."""
    used = []

    def run(model):
        if request.param:
            report = apply_fast_path(model)
            assert all(
                what.startswith("fast (") and "state space: PyTorch" in what for what in report.values()
            )
            used.append(model)

    yield run
    for model in used:
        remove_fast_path(model)


@pytest.mark.parametrize("kind", KINDS)
def test_logits_loss_and_gradients_are_those_of_each_document_alone(models, kind, on_path):
    plain, ours = models(kind)
    on_path(ours)
    docs, ids = documents(LENGTHS), packed(documents(LENGTHS))
    with torch.no_grad():
        alone = [plain(doc[None], use_cache=False).logits[0] for doc in docs]
        together = plain(ids["input_ids"], position_ids=ids["sequences"].position_ids).logits[0]
        logits = ours(ids["input_ids"], sequences=ids["sequences"]).logits[0]
    for length, theirs, own in zip(LENGTHS, alone, logits.split(LENGTHS), strict=True):
        assert_close(own, theirs, rtol=0, atol=1e-4, msg=f"document of {length}")
    # What is told apart is large: Transformers packs with leaks.
    assert (together - torch.cat(alone)).abs().max() > 0.1
    for model in (plain, ours):
        model.zero_grad()
    expected, loss = one_by_one(plain, docs), ours(**ids).loss
    assert_close(loss, expected, rtol=1e-6, atol=1e-4)
    (expected / sum(LENGTHS)).backward()
    (loss / sum(LENGTHS)).backward()
    of_theirs, of_ours = gradients(plain), gradients(ours)
    assert of_ours.keys() == of_theirs.keys()
    assert len(of_ours) == 2 * 2 * 8
    for name, gradient in of_ours.items():
        assert gradient.abs().max() > 1e-4, name
        assert_close(gradient, of_theirs[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("kind", ["two groups, no norm, no bias", "limited steps"])
def test_changing_one_document_moves_no_other_by_a_bit(models, kind, recompute, on_path):
    ours = copy.deepcopy(models(kind)[1])
    on_path(ours)
    if recompute:
        ours.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours.train()
    lengths = [20, 150, 9]
    before = documents(lengths)
    after = [documents([20], seed=99)[0], before[1], documents([9], seed=99)[0]]
    results = []
    for docs in (before, after):
        arguments = packed(docs)
        arguments["target_positions"] = torch.arange(20, 169)
        arguments["targets"] = torch.cat(docs)[arguments["target_positions"] + 1]
        ours.zero_grad()
        ours(**arguments).loss.backward()
        logits = ours(arguments["input_ids"], sequences=arguments["sequences"]).logits[0, 20:170]
        results.append((logits.detach(), gradients(ours)))
    assert torch.equal(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_all_nine_linears_are_quantized_and_the_rest_stays_as_it_is(tmp_path, mode):
    plain = plain_model(dtype=torch.bfloat16, **KINDS["norm behind the gate"])
    for block in plain.model.layers:
        for name in ("A_log", "D", "dt_bias"):  # as some files have them
            parameter = getattr(block.mamba, name)
            parameter.data = torch.rand_like(parameter, dtype=torch.float32)
    ours = loaded(tmp_path, plain, quantize_mode=mode, compute_dtype="bf16")
    theirs = dict(plain.named_parameters())
    quantized = {
        n.rpartition(".")[2]
        for n, m in ours.named_modules()
        if hasattr(m, "weight") and m.weight.itemsize == 1
    }
    assert quantized == set(layout_of(ours.config).linears)
    assert len(quantized) == 9
    for name, parameter in ours.named_parameters():
        if parameter.itemsize > 1:
            assert parameter.dtype == theirs[name].dtype, name
            assert torch.equal(parameter, theirs[name]), name
    assert_close(
        ours.model.layers[1].mamba.mup_vector,
        plain_model(**KINDS["norm behind the gate"]).model.layers[1].mamba.mup_vector,
    )
    assert all(each.device.type == "cpu" for each in ours.buffers())


@pytest.mark.parametrize("mode", MODES)
def test_bfloat16_is_close_to_float32(tmp_path, mode):
    base = loaded(
        tmp_path, plain_model(**KINDS["norm behind the gate"]), quantize_mode=mode, compute_dtype="bf16"
    )
    plain, model = with_adapter(plain_float32(base)), with_adapter(base)
    enable_packing(model)
    docs = documents([40, 7, 100])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**packed(docs)).loss
    loss.backward()
    assert_close(loss, one_by_one(plain, docs), rtol=3e-2, atol=0)
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(model).values())


def test_the_probe_finds_documents_that_reach_each_other(models, on_path, monkeypatch):
    model = models("two groups, no norm, no bias")[1].train()
    on_path(model)
    ids = [np.arange(1, 1 + length) for length in (9, 4, 30, 1, 7, 5, 5, 5, 5)]
    batch = collate(ids, [np.ones(len(each)) for each in ids])
    cpu = torch.device("cpu")
    model(**packed(documents([5]))).loss.backward()
    states, before = torch.get_rng_state(), {name: each.clone() for name, each in gradients(model).items()}
    found = leak_probe.probe(model, batch, cpu)
    assert torch.equal(torch.get_rng_state(), states)
    assert all(torch.equal(gradient, before[name]) for name, gradient in gradients(model).items())
    assert model.training
    assert (found.documents, found.targets, found.moved) == (8, 58, 0)
    first = documents_of(batch, 0, 8)
    assert found.loss == pytest.approx(float(evaluated(model.eval(), first, device=cpu)) / 58)
    assert found.apart == pytest.approx(found.loss)
    assert found.passed
    for name in ("convolve", "scan"):
        original = getattr(ssd, name)
        for boundary in (9, 44):  # one alone lets through what is before it

            def carrying(*given, original=original, boundary=boundary):
                positions = given[-1].clone()
                begins = [at for at in (positions == 0).nonzero().flatten().tolist() if at > boundary]
                if begins:  # else it is a document by itself
                    behind = slice(boundary, begins[0])
                    positions[behind] += positions[boundary - 1] + 1
                return original(*given[:-1], positions)

            with monkeypatch.context() as bug:
                bug.setattr(ssd, name, carrying)
                leaking = leak_probe.probe(model, batch, cpu)
            assert leaking.moved > 0, (name, boundary)
            assert not leaking.passed
            assert "packed documents reach each other" in leak_probe.warning(leaking)
    assert "one document" in leak_probe.probe(model, collate(ids[:1], [np.ones(9)]), cpu)
    assert "no trained token" in leak_probe.probe(
        model, collate(ids, [np.zeros(len(each)) for each in ids]), cpu
    )


def test_padded_batches_and_generation_are_transformers_own(models):
    plain, ours = models("norm behind the gate")
    long, short = documents([40, 13])
    ids = torch.stack([long, torch.cat([torch.zeros(27, dtype=torch.int64), short])])
    mask = torch.tensor([[1] * 40, [0] * 27 + [1] * 13])
    greedy = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None}
    expected = plain.generate(ids, attention_mask=mask, **greedy)
    assert len(set(expected[1, 40:].tolist())) > 3
    assert torch.equal(ours.generate(ids, attention_mask=mask, **greedy), expected)
    logits = torch.cat([plain(doc[None], use_cache=False).logits[0] for doc in (long, short)])
    apply_fast_path(ours)  # which packs batches
    try:
        for cache in (True, False):
            assert torch.equal(ours.generate(ids, attention_mask=mask, use_cache=cache, **greedy), expected)
        padded = ours(ids, attention_mask=mask, use_cache=False).logits
        assert_close(padded[mask.bool()], logits, rtol=0, atol=1e-4)
        positions = torch.cat([torch.arange(40), torch.arange(13)])[None]
        flat = ours(torch.cat([long, short])[None], position_ids=positions, use_cache=False).logits
        assert_close(flat[0], logits, rtol=0, atol=1e-4)
    finally:
        pack_batches(ours, on=False)


def test_a_folder_is_measured_a_block_at_a_time_as_the_whole_is(tmp_path):
    plain = plain_model(**KINDS["norm before the gate"])
    ours, docs = loaded(tmp_path, plain), documents([140, 9, 30])
    batches = [collate([doc.numpy() for doc in docs], [np.ones(len(doc), dtype=np.int8) for doc in docs])]
    of_folder = folder_predictions(
        tmp_path, batches, answers_only=False, device=torch.device("cpu"), dtype=torch.float32
    )
    for predicted in (of_folder, predictions(ours, batches, answers_only=False)):
        assert_close(token_losses(predicted).sum(), one_by_one(plain, docs).detach(), rtol=1e-6, atol=1e-4)


def test_packing_can_be_undone(models):
    ours = copy.deepcopy(models("limited steps")[1]).unload()
    ids = documents([12])[0][None]
    before = ours(ids).logits
    disable_packing(ours)
    assert not any("forward" in vars(module) for module in ours.modules())
    assert torch.equal(ours(ids).logits, before)


def test_every_weight_can_be_trained(tmp_path):
    plain = plain_model(**KINDS["norm behind the gate"])
    model = Full().attach(loaded(tmp_path / "base", plain))
    enable_packing(model)
    plain.requires_grad_(True)
    docs = documents([140, 1, 30])
    model(**packed(docs)).loss.backward()
    one_by_one(plain, docs).backward()
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert_close(ours.grad, theirs.grad, rtol=1e-3, atol=1e-3, msg=name)
    (tmp_path / "full").mkdir()
    Full().save(model, tmp_path / "full")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    ids = docs[0][None]
    assert_close(again(ids).logits, plain(ids).logits)


def test_trained_parameters_are_as_many_as_published():
    """At rank 32, on what PEFT accepts and on all: the guide of TII leaves out_proj alone too."""
    nine = Lora(r=32, target_modules=tuple(FalconH1.linears))
    for preset, eight, all_nine in (("7b", 100_959_232, 109_609_984), ("34b", 278_470_656, 299_704_320)):
        config = preset_config(f"falcon-h1-{preset}")
        assert (trainable_count(Lora(r=32), config), trainable_count(nine, config)) == (eight, all_nine)


def test_lora_on_out_proj_where_it_is_named(tmp_path):
    plain = plain_model(**KINDS["norm behind the gate"])
    ours, docs = loaded(tmp_path / "base", plain), documents([140, 9, 30])
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        get_peft_model(plain, LoraConfig(target_modules=["out_proj"], task_type="CAUSAL_LM"))
    both = [attach_lora(each, r=4, target_modules=[*FalconH1.linears]) for each in (plain, ours)]
    assert ours.config.model_type == "falcon_h1"
    for model in both:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.constant_(parameter, 0.01)
    enable_packing(both[1])
    (one_by_one(both[0], docs) / 100).backward()
    (both[1](**packed(docs)).loss / 100).backward()
    expected, found = map(gradients, both)
    assert len(found) == 2 * 2 * 9
    for name, gradient in found.items():
        assert gradient.abs().max() > 1e-4, name
        assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
    (tmp_path / "adapter").mkdir()
    method_of(both[1]).save(both[1], tmp_path / "adapter")
    check_adapter(tmp_path / "adapter", both[1])
    again = load_adapter(
        tmp_path / "adapter", base_model=str(tmp_path / "base"), quantize_mode="16bit", device="cpu"
    )
    assert torch.equal(again(docs[0][None]).logits, both[1].eval()(docs[0][None]).logits)


def test_what_it_cannot_do_is_refused_and_told():
    config = FalconH1Config(**SIZES)
    with pytest.raises(UserError, match="Falcon-H1 has three"):
        Lora(slices=("query",)).targets(config)
    for method in (Adapter(first_block=0), AdapterV2(first_block=0)):
        with pytest.raises(UserError, match=f"--method {method.name} does not train a Falcon-H1"):
            method.parameter_groups(config)
    model = tiny_model("falcon-h1")
    report = choose_kernels(model, kernels="required", compute_dtype="auto")
    told = "fast (attention: padded batches, weights: as stored, SwiGLU: PyTorch, between: PyTorch, "
    assert report == dict.fromkeys(["model.layers.0", "model.layers.1"], f"{told}state space: PyTorch)")


def test_fast_blocks_take_as_much_memory_as_their_formulas_say():
    # By hand, of 7B, r 32, bfloat16: two inputs, W_in's output, attention's and the state space's, nine t of
    # LoRA; attention's statistics; gate and up.
    one = Step(config=preset_config("falcon-h1-7b"), tokens=16384, trainable=0, fast=True, lora_rank=32)
    without = 2 * (2 * 3072 + 2048 + 6680 + 1536 + 3072 + 7 * 32) + 4 * 12
    assert one._kept("selective") == without
    assert one._kept("none") == without + 2 * (24576 + 2 * 32)
    assert 44 * one._kept("none") / 1e6 == pytest.approx(3.9, abs=0.05)  # as computed beforehand, rounded
    assert 44 * one._kept("selective") / 1e6 == pytest.approx(1.7, abs=0.05)
    needs = [one.bytes([way] * 44) for way in ("none", "selective", "full", "offload")]
    assert needs == sorted(needs, reverse=True)


# Falcon-H1-0.5B's file, as NVIDIA's Megatron-Bridge has it.
PUBLISHED = {
    "architectures": ["FalconH1ForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "attention_in_multiplier": 1.0,
    "attention_out_multiplier": 0.9375,
    "attn_layer_indices": None,
    "embedding_multiplier": 5.656854249492381,
    "head_dim": 64,
    "hidden_act": "silu",
    "hidden_size": 1024,
    "initializer_range": 0.02,
    "intermediate_size": 2048,
    "key_multiplier": 0.39062499999999994,
    "lm_head_multiplier": 0.0390625,
    "mamba_chunk_size": 128,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 64,
    "mamba_d_ssm": 1536,
    "mamba_d_state": 128,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 24,
    "mamba_norm_before_gate": False,
    "mamba_proj_bias": False,
    "mamba_rms_norm": False,
    "mamba_use_mlp": True,
    "max_position_embeddings": 16384,
    "mlp_bias": False,
    "mlp_multipliers": [0.8838834764831844, 0.5859375],
    "model_type": "falcon_h1",
    "num_attention_heads": 8,
    "num_hidden_layers": 36,
    "num_key_value_heads": 2,
    "projectors_bias": False,
    "rms_norm_eps": 1e-5,
    "rope_scaling": None,
    "rope_theta": 100000000000.0,
    "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.3535533905932738, 0.5, 0.3535533905932738],
    "ssm_out_multiplier": 0.23570226039551587,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "vocab_size": 32784,
}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"mamba_d_ssm": None, "mamba_d_head": "auto", "mamba_n_heads": 32, "ssm_multipliers": None},
        {"time_step_limit": [0.0, {"__float__": "Infinity"}]},
        {"time_step_limit": [0.001, 0.1]},
    ],
)
def test_a_published_configuration_is_read_and_written_as_transformers_reads_it(tmp_path, more):
    raw = PUBLISHED | more
    (tmp_path / "config.json").write_text(json.dumps(raw))
    ignored = {"dtype", "architectures", "attn_layer_indices", "mamba_use_mlp", "transformers_version"}

    def told(config):
        return {name: value for name, value in config.to_dict().items() if name not in ignored}

    theirs = FalconH1Config.from_pretrained(tmp_path)
    theirs.mamba_d_ssm = theirs.mamba_d_ssm or 2 * 1024
    ours = read_config(json.loads(json.dumps(raw)))
    assert told(ours) == told(theirs)
    assert told(FalconH1Config(**layout_of(ours).published_config())) == told(theirs)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"projectors_bias": True}, "its linears have biases"),
        ({"mamba_proj_bias": True}, "its linears have biases"),
        ({"attention_bias": True}, "its linears have biases"),
        ({"mlp_bias": True}, "its linears have biases"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"scaled \(linear\)"),
        ({"num_key_value_heads": 3}, "8 attention heads are no multiple of 3"),
        ({"mamba_n_groups": 5}, "24 heads of the state space are no multiple of 5"),
        ({"mamba_n_heads": 7}, "mamba_n_heads must divide"),
        ({"mamba_d_state": 0}, "mamba_d_state is '0'; expected 1 to"),
        ({"ssm_multipliers": [1.0, 2.0]}, "ssm_multipliers is .* not 5 finite numbers"),
        ({"time_step_limit": [1.0, 0.5]}, r"time_step_limit is 1\.0 to 0\.5"),
    ],
)
def test_what_is_no_falcon_h1_of_the_published_kind_is_refused(settings, told):
    with pytest.raises(UserError, match=told):
        read_config(PUBLISHED | settings, source="config.json")
