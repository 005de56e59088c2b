"""Falcon3: what is particular to it. Tests over all families have the rest."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from transformers import LlamaConfig

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.full import Full
from falcon_qlora.models.fast_path import choose_kernels
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import preset_config, read_config
from falcon_qlora.models.load import load_model
from falcon_qlora.models.step_memory import Step
from tests.layouts import FAMILIES, attach_lora, documents, plain_float32, tiny_model
from tests.packing import one_by_one, packed

LENGTHS = [9, 14, 1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"attention_bias": True}, "its linears have biases"),
        ({"mlp_bias": True}, "its linears have biases"),
        ({"hidden_act": "gelu"}, "its activation is gelu"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 2.0}}, r"scaled \(linear\)"),
        ({"num_key_value_heads": 5}, "12 attention heads are no multiple of 5"),
        ({"head_dim": 255}, "255"),
        ({"hidden_act": "no such"}, "is no such"),
        ({"intermediate_size": 0}, "intermediate_size is '0'; expected 1 to"),
    ],
)
def test_a_llama_that_is_not_as_falcon3_is_refused(settings, told):
    raw = preset_config("falcon3-7b").to_dict()
    assert read_config(raw).to_dict() == raw
    if "rope_scaling" in settings:
        del raw["rope_parameters"]
    with pytest.raises(UserError, match=told):
        read_config(raw | settings, source="config.json")


def test_a_published_configuration_is_read_as_transformers_reads_it():
    """Falcon3-7B-Base's file, in its own names."""
    raw = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "eos_token_id": 11,
        "head_dim": 256,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 23040,
        "max_position_embeddings": 32768,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 12,
        "num_hidden_layers": 28,
        "num_key_value_heads": 4,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000042,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": 131072,
    }
    ours, theirs = read_config(raw).to_dict(), LlamaConfig(**raw).to_dict()
    dtypes = {"dtype", "architectures"}
    assert {k: v for k, v in ours.items() if k not in dtypes} == {
        k: v for k, v in theirs.items() if k not in dtypes
    }
    assert ours["rope_parameters"]["rope_theta"] == 1000042


@pytest.mark.parametrize("head_dim", [64, 256])
def test_heads_of_published_sizes_and_a_tied_head(head_dim):
    changed = f"{FAMILIES['falcon3'].replace('head_dim=32', f'head_dim={head_dim}')},tie_word_embeddings=true"
    model = load_model(changed, quantize_mode="16bit", device="cpu", seed=1)
    plain = plain_float32(model)
    enable_packing(model)
    docs = documents(LENGTHS)
    assert_close(model(**packed(docs)).loss, one_by_one(plain, docs), rtol=1e-5, atol=0)


def test_blocks_are_fast():
    model = tiny_model("falcon3")
    report = choose_kernels(model, kernels="required", compute_dtype="auto")
    told = "fast (attention: padded batches, weights: as stored, SwiGLU: PyTorch, between: PyTorch)"
    assert report == dict.fromkeys(["model.layers.0", "model.layers.1"], told)


def test_fast_blocks_take_as_much_memory_as_their_formulas_say():
    # By hand, of 7B, r 32, bfloat16: two inputs, query key and value, attention's output and LoRA's t;
    # attention's statistics; gate and up.
    one = Step(config=preset_config("falcon3-7b"), tokens=16384, trainable=0, fast=True, lora_rank=32)
    without = 2 * (2 * 3072 + 5120 + 3072 + 5 * 32) + 4 * 12
    assert one._kept("selective") == without
    assert one._kept("none") == without + 2 * (46080 + 2 * 32)
    assert 28 * one._kept("none") / 1e6 == pytest.approx(3.4, rel=0.01)
    assert 28 * one._kept("selective") / 1e6 == pytest.approx(0.8, rel=0.02)
    needs = [one.bytes([way] * 28) for way in ("none", "selective", "full", "offload")]
    assert needs == sorted(needs, reverse=True)
    for free, kept in ((2 * needs[0], {"none"}), (needs[1], {"selective", "full"}), (0, {"offload"})):
        assert set(one.choose(free)) == kept
    in_fp8 = replace(one, in_fp8=True)  # the gradients of gate and up once more, a byte each
    at_work = [2 * sum(each.working_values("none")) for each in (one, in_fp8)]
    assert at_work[1] - at_work[0] == 46080


def test_slices_of_a_projection_that_it_has_not_are_refused():
    with pytest.raises(UserError, match="Falcon3 has three: name those"):
        attach_lora(tiny_model("falcon3"), slices=["query"])


def test_norms_in_float32_round_once_and_keep_their_inputs_dtype():
    model = load_model(FAMILIES["falcon3"], device="cpu", compute_dtype="bf16", norms_in_float32=True, seed=1)
    norm = model.base_model.norm
    assert norm.weight.dtype == torch.float32
    with torch.no_grad():
        norm.weight.uniform_(0.5, 2.0)
    hidden = torch.randn(5, 64, dtype=torch.bfloat16)
    expected = nn.functional.rms_norm(hidden.float(), (64,), norm.weight, eps=1e-6).bfloat16()
    assert norm(hidden).dtype == torch.bfloat16
    assert torch.equal(norm(hidden), expected)


def test_attention_with_a_prefix_is_its_definition():
    """Before o_proj: attention, and what each head reads of the prefix in a softmax of its own, gated."""
    model = tiny_model("falcon3")
    enable_packing(model)
    Adapter(prefix_length=3, first_block=1).attach(model, seed=3)
    attention = model.base_model.layers[1].self_attn
    gate = torch.tensor([0.5, -1.0, 2.0, 0.7])
    seen = {}
    attention.register_forward_hook(
        lambda module, args, kwargs, output: seen.update(kwargs, args=args, output=output[0]),
        with_kwargs=True,
    )
    outputs = []
    arguments = packed(documents(LENGTHS))
    for scale in (0.0, 1.0):
        with torch.no_grad():
            attention.prefix_attention.gate.copy_(scale * gate)
            model(arguments["input_ids"], sequences=arguments["sequences"])
        outputs.append(seen["output"][0])
    hidden = seen["hidden_states"][0]
    cosine, sine = (each[0] for each in seen["position_embeddings"])
    prefix = attention.prefix_attention.prefix
    reads = []
    for head in range(4):
        rows, keys = slice(head * 32, head * 32 + 32), slice(head // 2 * 32, head // 2 * 32 + 32)
        query = hidden @ attention.q_proj.weight[rows].T
        turned = torch.cat([-query[:, 16:], query[:, :16]], dim=1)
        query = query * cosine + turned * sine
        key, value = (prefix @ linear.weight[keys].T for linear in (attention.k_proj, attention.v_proj))
        reads.append(gate[head] * (query @ key.T / math.sqrt(32)).softmax(-1) @ value)
    expected = torch.cat(reads, dim=1) @ attention.o_proj.weight.T
    assert expected.abs().max() > 1e-2
    assert_close(outputs[1] - outputs[0], expected, rtol=1e-4, atol=1e-5)


def test_every_weight_can_be_trained(tmp_path):
    model = Full().attach(tiny_model("falcon3"))
    enable_packing(model)
    model(**packed(documents(LENGTHS))).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    Full().save(model, tmp_path)
    again = load_model(str(tmp_path), quantize_mode="16bit", device="cpu")
    ids = documents([12])[0][None]
    assert torch.equal(again(ids).logits, model.eval()(ids).logits)
