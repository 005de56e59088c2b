"""Loading: every expected linear is quantized, the rest is exact, and what is wrong is said."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import FalconForCausalLM

from falcon_qlora.common.errors import UserError
from falcon_qlora.inference.base_and_adapter import Source, load_adapted
from falcon_qlora.models import load, quantize
from falcon_qlora.models.layouts import layout_of, preset_config
from falcon_qlora.models.load import load_model, quantization_of, verify_quantized
from falcon_qlora.models.quantize import dequantized_weight
from falcon_qlora.processes import devices
from tests.layouts import FAMILIES, LAYOUTS, MODES, UNTIED, documents, plain_float32, tiny_model


def save_plain(folder: Path, layout="falcon-7b", dtype=torch.float32, **options) -> FalconForCausalLM:
    """Save a tiny model the way Transformers does, and return it."""
    plain = plain_float32(tiny_model(layout)).to(dtype)
    plain.save_pretrained(folder, **options)
    return plain


def load_here(folder, **options):
    return load_model(str(folder), device="cpu", **options)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_exactly_the_blocks_linears_are_quantized(layout, mode):
    model = tiny_model(layout, mode)
    kinds = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}
    quantized = {n for n, m in model.named_modules() if isinstance(m, tuple(kinds.values()))}
    assert quantized == (set() if mode == "16bit" else set(layout_of(model.config).expected_linears()))
    assert quantization_of(model) == mode
    for name in quantized:
        module = model.get_submodule(name)
        assert type(module) is kinds[mode]
        assert module.weight.dtype == {"4bit": torch.uint8, "8bit": torch.int8}[mode]
    assert not any(p.requires_grad for p in model.parameters())
    assert not model.training
    tied = model.lm_head.weight is model.get_input_embeddings().weight
    assert tied == (layout not in UNTIED)


@pytest.mark.parametrize("mode", ["4bit", "8bit"])
def test_quantized_weights_stand_for_the_original_ones(mode):
    original = tiny_model("falcon-7b")
    model = tiny_model("falcon-7b", mode)
    for name in layout_of(model.config).expected_linears():
        exact, stored = original.get_submodule(name).weight, dequantized_weight(model.get_submodule(name))
        assert (stored - exact).norm() / exact.norm() < {"4bit": 0.12, "8bit": 0.02}[mode]
    assert_close(model.transformer.word_embeddings.weight, original.transformer.word_embeddings.weight)


@pytest.mark.parametrize("double", [True, False])
def test_double_quantization_is_on_or_off(double):
    model = load_model(LAYOUTS["falcon-7b"], device="cpu", double_quantization=double)
    states = [model.get_submodule(n).weight.quant_state for n in layout_of(model.config).expected_linears()]
    assert all(state.nested == double and state.quant_type == "nf4" for state in states)


def test_a_layer_left_alone_is_an_error_that_names_it():
    model = tiny_model("falcon-7b", "4bit")
    names = layout_of(model.config).expected_linears()
    model.set_submodule(names[5], nn.Linear(192, 192))
    with pytest.raises(RuntimeError, match=f"{names[5]} was left unquantized"):
        verify_quantized(model, "4bit")
    with pytest.raises(RuntimeError, match=f"{names[0]} was left unquantized: Linear4bit"):
        verify_quantized(model, "8bit")
    with pytest.raises(RuntimeError, match=f"{names[0]} is quantized and should not be"):
        verify_quantized(model, "16bit")


def test_a_quantized_layer_that_was_never_filled_is_an_error(monkeypatch):
    monkeypatch.setattr(load, "fill_quantized_weight", lambda layer, weight: None)
    with pytest.raises(RuntimeError, match=r"transformer\.h\.0\..*meta"):
        tiny_model("falcon-7b", "4bit")


@pytest.mark.parametrize("layout", FAMILIES)
def test_a_folder_gives_the_model_that_transformers_loads(tmp_path, layout):
    plain = save_plain(tmp_path, layout)
    model = load_here(tmp_path, quantize_mode="16bit")
    ids = documents([11])[0][None]
    assert_close(model(ids).logits, plain(ids).logits)
    inverse = model.base_model.rotary_emb.inv_freq
    assert_close(inverse, plain.base_model.rotary_emb.inv_freq)
    assert inverse.dtype == torch.float32


def test_shards_and_half_precision_files_are_read(tmp_path):
    save_plain(tmp_path, dtype=torch.bfloat16, max_shard_size="300KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    plain = FalconForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    model = load_here(tmp_path, quantize_mode="16bit", compute_dtype="bf16")
    assert model.dtype == torch.bfloat16
    ids = documents([11])[0][None]
    assert_close(model(ids).logits, plain(ids).logits)


def as_torch_files(folder: Path, rename=lambda name: name, extra=None, **options) -> None:
    """Turn a folder's safetensors into a ``.bin`` as they were published in 2023."""
    tensors = load_file(folder / "model.safetensors")
    state = {rename(name): tensor for name, tensor in tensors.items()} | (extra or {})
    torch.save(state, folder / "pytorch_model.bin", **options)
    (folder / "model.safetensors").unlink()


@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_with_old_names_and_an_old_configuration_are_read(tmp_path, zipped):
    plain = save_plain(tmp_path)
    head = plain.transformer.word_embeddings.weight.detach().clone()
    extra = {
        "lm_head.weight": head,
        "transformer.h.0.self_attention.rotary.inv_freq": torch.zeros(8),
        "transformer.h.0.self_attention.maybe_rotary.inv_freq": torch.zeros(8),
    }
    as_torch_files(tmp_path, extra=extra, _use_new_zipfile_serialization=zipped)
    old = {
        "model_type": "RefinedWebModel",
        "n_head": 3,
        "n_layer": 2,
        "hidden_size": 192,
        "vocab_size": 128,
        "multi_query": True,
        "parallel_attn": True,
        "alibi": False,
        "bias": False,
    }
    (tmp_path / "config.json").write_text(json.dumps(old))
    model = load_here(tmp_path, quantize_mode="16bit")
    ids = documents([11])[0][None]
    assert_close(model(ids).logits, plain(ids).logits)
    assert model.lm_head.weight is model.transformer.word_embeddings.weight


def test_names_without_the_models_prefix_are_read(tmp_path):
    plain = save_plain(tmp_path)
    as_torch_files(tmp_path, rename=lambda name: name.removeprefix("transformer."))
    ids = documents([11])[0][None]
    assert_close(load_here(tmp_path, quantize_mode="16bit")(ids).logits, plain(ids).logits)


def test_of_two_tied_tensors_either_may_be_stored(tmp_path):
    plain = save_plain(tmp_path)
    rename = {"transformer.word_embeddings.weight": "lm_head.weight"}
    as_torch_files(tmp_path, rename=lambda name: rename.get(name, name))
    ids = documents([11])[0][None]
    assert_close(load_here(tmp_path, quantize_mode="16bit")(ids).logits, plain(ids).logits)


class TestWhatIsWrongWithAFolderIsSaid:
    def test_a_tensor_missing(self, tmp_path):
        save_plain(tmp_path)
        tensors = load_file(tmp_path / "model.safetensors")
        del tensors["transformer.h.1.mlp.dense_h_to_4h.weight"]
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=r"lacks 1 .* transformer\.h\.1\.mlp\.dense_h_to_4h\.weight"):
            load_here(tmp_path)

    def test_a_shape_that_the_configuration_contradicts(self, tmp_path):
        save_plain(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps(config | {"ffn_hidden_size": 128}))
        with pytest.raises(UserError, match=r"mlp.* has the shape \[192, 768\].*\[192, 128\]"):
            load_here(tmp_path)

    def test_a_shard_missing(self, tmp_path):
        save_plain(tmp_path, max_shard_size="300KB")
        next(tmp_path.glob("model-00002-*")).unlink()
        with pytest.raises(UserError, match=r"names model-00002-.*not there"):
            load_here(tmp_path)

    def test_a_file_cut_short(self, tmp_path):
        save_plain(tmp_path)
        path = tmp_path / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-1000])
        with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
            load_here(tmp_path)

    def test_no_weights(self, tmp_path):
        save_plain(tmp_path)
        (tmp_path / "model.safetensors").unlink()
        with pytest.raises(UserError, match="holds no weights"):
            load_here(tmp_path)

    def test_no_configuration_or_a_broken_one(self, tmp_path):
        with pytest.raises(UserError, match=r"no config\.json"):
            load_here(tmp_path)
        (tmp_path / "config.json").write_text("{")
        with pytest.raises(UserError, match="not valid JSON"):
            load_here(tmp_path)

    def test_another_model(self, tmp_path):
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "falcon_mamba", "hidden_size": 8}))
        with pytest.raises(UserError, match="Falcon-Mamba"):
            load_here(tmp_path)

    def test_a_pickle_that_is_more_than_tensors(self, tmp_path):
        save_plain(tmp_path)
        as_torch_files(tmp_path, extra={"a": Path("b")})
        with pytest.raises(UserError, match=r"pytorch_model\.bin"):
            load_here(tmp_path)


def test_shapes_that_bitsandbytes_would_misread_on_the_cpu_are_refused():
    name = "random:falcon-7b?num_hidden_layers=1,hidden_size=80,num_attention_heads=5,vocab_size=64"
    with pytest.raises(UserError, match="multiple of 64; query_key_value has 80"):
        load_model(name, device="cpu")
    load_model(name, device="cpu", quantize_mode="8bit")


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantizing_in_slices_gives_what_bitsandbytes_gives(dtype, nested):
    weight = torch.randn(1031, 192).to(dtype)  # more than two slices, the last one short
    packed, state = quantize._quantize_nf4(weight, nested)
    expected, expected_state = bnb.functional.quantize_4bit(
        weight, blocksize=64, compress_statistics=nested, quant_type="nf4"
    )
    assert torch.equal(packed, expected)
    ours, theirs = state.as_dict(), expected_state.as_dict()
    assert ours.keys() == theirs.keys()
    for key, value in theirs.items():
        assert_close(ours[key], value, rtol=0, atol=0) if torch.is_tensor(value) else ours[key] == value


def test_norms_in_float32_keep_the_compute_dtype_around_them():
    model = load_model(LAYOUTS["falcon-rw-1b"], device="cpu", compute_dtype="bf16", norms_in_float32=True)
    norms = [m for m in model.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 5
    assert all(p.dtype == torch.float32 for norm in norms for p in norm.parameters())
    assert norms[0](torch.ones(2, 64, dtype=torch.bfloat16)).dtype == torch.bfloat16
    ids = documents([9])[0][None]
    assert model(ids).logits.dtype == torch.bfloat16
    without = load_model(LAYOUTS["falcon-rw-1b"], device="cpu", compute_dtype="bf16")
    assert_close(model(ids).logits, without(ids).logits, rtol=0.1, atol=0.3)


def test_evaluating_between_two_trainings_changes_no_quantized_weight():
    model = tiny_model("falcon-7b", "4bit")
    name = layout_of(model.config).expected_linears()[0]
    before = model.get_submodule(name).weight.data.clone()
    with torch.no_grad():
        model.eval()(documents([9])[0][None])
    assert torch.equal(model.get_submodule(name).weight.data, before)


def test_random_models_are_the_same_for_a_seed_and_say_it_in_their_name():
    name = LAYOUTS["falcon-7b"]
    models = [load_model(n, device="cpu", seed=s) for n, s in [(name, 0), (name, 5), (name + ",seed=5", 0)]]
    first = [m.transformer.h[0].mlp.dense_4h_to_h.weight for m in models]
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], first[2])
    assert [m.name_or_path for m in models] == [name, name + ",seed=5", name + ",seed=5"]
    norm = models[0].transformer.ln_f
    assert norm.weight.unique().tolist() == [1]
    assert not norm.bias.any()


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("random:falcon-7", "did you mean falcon-7b"),
        ("random:falcon-7b?hidden=3", "did you mean hidden_size"),
        ("random:falcon-7b?num_hidden_layers=2&seed=1", "num_hidden_layers is '2&seed=1'; expected 1 to"),
        ("random:falcon-7b?num_attention_heads=0", "num_attention_heads is '0'; expected 1 to"),
        ("random:falcon-7b?hidden_size=64,num_attention_heads=3", "64 is no multiple of 3 attention heads"),
        ("random:falcon-7b?seed=x", "the seed is 'x'; expected a whole number"),
        ("random:falcon-7b?multi_query=maybe", "not the configuration of a Falcon: .*multi_query"),
        ("random:falcon-7b?id2label=3", "random:falcon-7b.id2label=3: "),
        ("no/such/folder", "no folder"),
        ("./missing", "no folder"),
    ],
)
def test_names_of_nothing_are_refused(name, said):
    with pytest.raises(UserError, match=said):
        load_model(name, device="cpu")


def test_what_cannot_run_here_is_refused():
    with pytest.raises(UserError, match="none of 4bit"):
        load_model(LAYOUTS["falcon-7b"], device="cpu", quantize_mode="3bit")
    with pytest.raises(UserError, match="none of auto"):
        devices.compute_dtype("float", "cpu")
    assert devices.compute_dtype("auto", "cpu") == torch.float32


def run_python(code: str, **environment: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "kernels-community" not in result.stderr
    return result.stdout


@pytest.mark.slow
def test_importing_and_running_asks_no_kernel_hub_compiles_nothing_and_says_nothing(tmp_path):
    (tmp_path / "kernels.py").write_text("def get_kernel(*_, **__): raise SystemExit('the hub was asked')")
    run_python(
        """
        import logging; logging.basicConfig(level=logging.WARNING)
        from falcon_qlora.models.load import load_model
        import peft
        small = "num_hidden_layers=1,hidden_size=64,num_attention_heads=4,vocab_size=64"
        model = load_model(f"random:falcon-7b?{small}")
        from bitsandbytes.backends.default import ops
        assert not hasattr(ops._dequantize_4bit_compute, "__wrapped__"), "compiled"
        """,
        PYTHONPATH=f"{tmp_path}:{Path(__file__).parents[2]}",
    )


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_cpu_memory_of_a_load_stays_far_below_the_models_size(tmp_path, kind):
    """500 MB of weights in two files; what a load may take beyond the quantized model is a few tensors."""
    config = preset_config(
        "falcon-7b", hidden_size=1024, num_attention_heads=16, num_hidden_layers=24, vocab_size=1024
    )
    with torch.device("meta"):
        empty = FalconForCausalLM(config.__class__(**config.to_dict()))
    config.save_pretrained(tmp_path)
    named = [(n, p) for n, p in empty.named_parameters() if n != "lm_head.weight"]
    for part, chosen in enumerate([named[: len(named) // 2], named[len(named) // 2 :]]):
        state = {n: torch.full(p.shape, 0.01, dtype=torch.bfloat16) for n, p in chosen}
        if kind == "safetensors":
            save_file(state, tmp_path / f"model-{part}.safetensors")
        else:
            torch.save(state, tmp_path / f"pytorch_model-{part}.bin")
        del state
    size = sum(path.stat().st_size for path in tmp_path.glob("*model-*"))
    assert size > 450e6
    taken = run_python(
        f"""
        import torch
        from falcon_qlora.models.load import load_model

        def peak():
            line = next(l for l in open("/proc/self/status") if l.startswith("VmHWM"))
            return int(line.split()[1]) * 1024

        tiny = "random:falcon-7b?num_hidden_layers=1,hidden_size=64,num_attention_heads=4,vocab_size=64"
        load_model(tiny, device="cpu")
        before = peak()
        load_model({str(tmp_path)!r}, device="cpu", compute_dtype="bf16")
        print(peak() - before)
        """,
        PYTHONPATH=str(Path(__file__).parents[2]),
    )
    quantized = 0.52 * size / 2
    assert int(taken) < quantized + 50e6 < 0.4 * size


def test_a_missing_tokenizer_is_told_before_the_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr("falcon_qlora.models.load.load_model", lambda *_, **__: pytest.fail("loaded"))
    with pytest.raises(UserError, match="tokenizer"):
        load_adapted(Source(model="tiny", tokenizer=str(tmp_path)))
