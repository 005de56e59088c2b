"""Shapes and counts of the published models, and configurations old and new."""

from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.layouts import PRESETS, family_of, layout_of, preset_config, read_config
from falcon_qlora.models.layouts.llama import Llama
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.sizes import check_fits, weight_bytes

PARAMETERS = {
    "falcon-rw-1b": 1_311_625_216,
    "falcon-7b": 6_921_720_704,
    "falcon-11b": 11_102_822_400,
    "falcon-40b": 41_303_293_952,
    "falcon-180b": 178_557_088_768,
    "falcon3-1b": 1_669_408_768,
    "falcon3-3b": 3_227_655_168,
    "falcon3-7b": 7_455_550_464,
    "falcon3-10b": 10_305_653_760,
    "falcon-h1-0.5b": 521_411_104,
    "falcon-h1-1.5b-deep": 1_554_874_768,
    "falcon-h1-7b": 7_585_654_880,
    "falcon-h1-34b": 33_642_516_224,
}

OLD_7B = {
    "model_type": "RefinedWebModel",
    "architectures": ["RWForCausalLM"],
    "alibi": False,
    "apply_residual_connection_post_layernorm": False,
    "attention_dropout": 0.0,
    "auto_map": {"AutoModelForCausalLM": "modelling_RW.RWForCausalLM"},
    "bias": False,
    "bos_token_id": 11,
    "eos_token_id": 11,
    "hidden_dropout": 0.0,
    "hidden_size": 4544,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "multi_query": True,
    "n_head": 71,
    "n_layer": 32,
    "parallel_attn": True,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 65024,
}
OLD_40B = {
    **{name: value for name, value in OLD_7B.items() if name != "multi_query"},
    "model_type": "RefinedWeb",
    "hidden_size": 8192,
    "n_head": 128,
    "n_head_kv": 8,
    "n_layer": 60,
}
OLD_RW_1B = {
    **OLD_7B,
    "model_type": "RefinedWeb",
    "alibi": True,
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_size": 2048,
    "multi_query": False,
    "n_head": 32,
    "n_layer": 24,
    "parallel_attn": False,
    "vocab_size": 50304,
}


@pytest.mark.parametrize("preset", PRESETS)
def test_counts_and_shapes_are_those_of_the_model_that_transformers_builds(preset):
    config = preset_config(preset)
    layout = layout_of(config)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert layout.parameter_count() == sum(p.numel() for p in model.parameters())
    assert layout.parameter_count() == PARAMETERS[preset]
    linears = dict.fromkeys(layout.expected_linears())
    assert set(linears) == {
        name for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"
    }
    assert layout.linear_parameter_count() == sum(model.get_submodule(n).weight.numel() for n in linears)
    for name in list(linears)[: len(layout.linears)]:
        shape = layout.linear_shapes()[name.rpartition(".")[2]]
        assert tuple(model.get_submodule(name).weight.shape) == shape


@pytest.mark.parametrize(("preset", "trainable"), [("falcon-7b", 130_547_712), ("falcon-40b", 444_334_080)])
def test_lora_on_all_four_linears_has_the_reference_guides_counts(preset, trainable):
    assert trainable_count(Lora(r=64), preset_config(preset)) == trainable


@pytest.mark.parametrize(
    ("old", "preset"), [(OLD_7B, "falcon-7b"), (OLD_40B, "falcon-40b"), (OLD_RW_1B, "falcon-rw-1b")]
)
def test_configurations_from_before_transformers_had_falcon_are_read(old, preset):
    assert read_config(old).to_dict() == preset_config(preset).to_dict()


def test_a_current_configuration_is_read_as_transformers_reads_it():
    config = preset_config("falcon-11b")
    again = read_config(config.to_dict())
    assert again.rope_parameters["rope_theta"] == 500042.0
    assert again.to_dict() == config.to_dict()


@pytest.mark.parametrize(
    ("model_type", "named"),
    [("falcon_mamba", "Falcon-Mamba"), ("gpt2", "gpt2")],
)
def test_other_models_are_refused_as_what_they_are(model_type, named):
    with pytest.raises(UserError, match=named):
        read_config({"model_type": model_type, "hidden_size": 64})


def test_a_bitnet_is_refused_as_falcon_e():
    raw = preset_config("falcon3-1b").to_dict() | {"quantization_config": {"quant_method": "bitnet"}}
    with pytest.raises(UserError, match=r"this model is a BitNet, as Falcon-E is"):
        read_config(raw)


def test_a_configuration_without_sizes_is_refused():
    with pytest.raises(UserError, match="num_attention_heads missing"):
        read_config({"model_type": "falcon", "hidden_size": 64, "num_hidden_layers": 1})


def test_weight_bytes_are_ordered_and_near_what_is_known():
    config = preset_config("falcon-40b")
    sizes = [weight_bytes(config, mode) / 1e9 for mode in ("4bit", "8bit", "16bit")]
    assert sizes == sorted(sizes)
    assert 21 < sizes[0] < 23
    assert weight_bytes(config, "4bit", double_quantization=False) > weight_bytes(config, "4bit")


def test_a_model_that_does_not_fit_is_refused_with_the_difference():
    config = preset_config("falcon-40b")
    free = 24 * 2**30
    check_fits(config, "4bit", trainable=444_334_080, free_bytes=free)
    with pytest.raises(UserError, match=r"39\.0 GiB and the adapter 1\.7 GiB.* 16\.6 GiB short.*4bit"):
        check_fits(config, "8bit", trainable=444_334_080, free_bytes=free)
    # Of a checkpoint that is stored so, and of --method full, which trains 16 bits.
    with pytest.raises(UserError, match=r"short\. Use --offload_base, a smaller model, or"):
        check_fits(config, "8bit", trainable=0, free_bytes=free, ways=["--offload_base"], fixed=True)


_THREE = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3}


@pytest.mark.parametrize(
    "raw",
    [
        *[preset_config(preset).to_dict() for preset in PRESETS],
        *[layout_of(preset_config(preset)).published_config() for preset in PRESETS],
        *[OLD_7B, OLD_40B, OLD_RW_1B],
        # What is not said is as Transformers has it.
        {"model_type": "falcon", **_THREE},
        {"model_type": "falcon", **_THREE, "num_kv_heads": None, "ffn_hidden_size": None},
        {"model_type": "falcon", **_THREE, "new_decoder_architecture": True, "num_ln_in_parallel_attn": 1},
        {"model_type": "falcon", **_THREE, "alibi": True, "bias": True, "multi_query": False},
        {"model_type": "RefinedWeb", **_THREE},
        {"model_type": "llama", **_THREE},
        {"model_type": "llama", **_THREE, "num_key_value_heads": 2, "head_dim": 32},
        {"model_type": "falcon_h1", **_THREE, "num_key_value_heads": 2},
        {"model_type": "falcon_h1", **_THREE, "num_key_value_heads": 2, "mamba_d_ssm": None},
    ],
)
def test_counts_without_a_library_are_those_of_transformers_configuration(raw: dict[str, Any]) -> None:
    family = family_of(raw, source="config.json")
    outline, config = family.outline(raw, "config.json"), read_config(raw)
    assert family(outline).base_parameter_kinds() == family(config).base_parameter_kinds()
    assert family(outline).parameter_count() == sum(
        each.numel() for each in empty_model(config, dtype=torch.float32).parameters()
    )
    for method in (Lora(), Full(), *([Adapter(first_block=0)] if family.no_prefix is None else [])):
        assert method.parameter_groups(outline) == method.parameter_groups(config)


@pytest.mark.parametrize("more", [{"attention_bias": True}, {"mlp_bias": True}, {"hidden_act": "gelu"}])
def test_counts_of_what_is_not_trained_here_are_refused(more: dict[str, Any]) -> None:
    raw = {"model_type": "llama", **_THREE, **more}
    for read in (Llama.outline, Llama.read):
        with pytest.raises(UserError, match="this Llama is not as Falcon3 is"):
            read(raw, "config.json")
