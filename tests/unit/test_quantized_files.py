"""Quantized checkpoints are Transformers' own: it writes what is read here, and opens what is written."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from falcon_qlora.commands import prepare
from falcon_qlora.common.errors import UserError
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import stored
from tests.layouts import FALCON_H1, FAMILIES, tiny_model, vary_norms
from tests.unit.test_falcon_h1 import plain_model

STORAGES: dict[str, dict[str, Any]] = {
    "nested": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "plain": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "8bit": {"load_in_8bit": True},
}
FLAGS = {"nested": ["-q", "4bit"], "plain": ["--double_quantization", "false"], "8bit": ["-q", "8bit"]}
LINEAR = "model.layers.1.mlp.up_proj.weight"


def falcon3(**settings: Any) -> LlamaForCausalLM:
    """A Falcon3 of Transformers' own, in bfloat16 as the published ones."""
    torch.manual_seed(3)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, initializer_range=0.15, **settings))
    vary_norms(model)
    return model.to(torch.bfloat16).eval()


def falcon_h1() -> torch.nn.Module:
    # bitsandbytes' own layer wants outputs in 32s on some CPUs: in_proj has 352.
    return plain_model(dtype=torch.bfloat16, mamba_n_groups=2, mamba_n_heads=32, mamba_d_head=4)


MODELS: dict[str, Callable[[], Any]] = {"falcon3": falcon3, "falcon-h1": falcon_h1}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Each of MODELS, and under its name and a storage's what Transformers makes of it."""
    folder = tmp_path_factory.mktemp("bases")
    for name, make in MODELS.items():
        make().save_pretrained(folder / name)
        for storage in STORAGES:
            quantized(folder / name, storage).save_pretrained(folder / f"{name}-{storage}")
    return folder


def quantized(base: Path, storage: str, **more: Any) -> Any:
    """A 16-bit model, quantized by Transformers on the CPU."""
    how = BitsAndBytesConfig(**STORAGES[storage], **more)
    return AutoModelForCausalLM.from_pretrained(base, quantization_config=how, device_map="cpu").eval()


def prepared(base: str | Path, out: Path, *flags: str) -> Path:
    assert prepare.main(["-m", str(base), "--output_dir", str(out), *flags]) == 0
    return out


def same_weights(one: Any, other: Any) -> bool:
    """Whether all parameters and what quantizes them are equal to the last bit."""
    for mine, theirs in zip(one.modules(), other.modules(), strict=True):
        if type(mine) is not type(theirs):
            return False
        if hasattr(mine, "in_features"):
            parts = [stored(each) for each in (mine, theirs)]
            if parts[0].keys() != parts[1].keys():
                return False
            if not all(_equal(parts[0][part], parts[1][part]) for part in parts[0]):
                return False
            states = [getattr(each.weight, "quant_state", None) for each in (mine, theirs)]
            if states[0] is not None and (states[0].dtype, states[0].shape) != (
                states[1].dtype,
                states[1].shape,
            ):
                return False
    mine, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    return mine.keys() == theirs.keys() and all(_equal(mine[name], theirs[name]) for name in mine)


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_what_is_written_is_what_transformers_writes(
    bases: Path, tmp_path: Path, name: str, storage: str
) -> None:
    out = prepared(bases / name, tmp_path / "out", *FLAGS[storage])
    theirs = bases / f"{name}-{storage}"
    files = [safe_open(folder / "model.safetensors", "pt") for folder in (out, theirs)]
    assert sorted(files[0].keys()) == sorted(files[1].keys())
    assert len([each for each in files[0].keys() if each.endswith(("SCB", "nf4"))]) == 2 * (  # noqa: SIM118
        7 if name == "falcon3" else 9
    )
    for each in files[1].keys():  # noqa: SIM118 (no mapping)
        mine, other = (file.get_tensor(each) for file in files)
        assert _equal(mine, other), each
    assert files[0].metadata() == files[1].metadata()
    told, expected = (json.loads((folder / "config.json").read_text()) for folder in (out, theirs))
    assert told["quantization_config"] == expected["quantization_config"]
    ids = torch.arange(24).view(2, 12)
    opened = AutoModelForCausalLM.from_pretrained(out, device_map="cpu").eval()
    with torch.no_grad():
        assert torch.equal(opened(ids).logits, quantized(bases / name, storage)(ids).logits)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", MODELS)
def test_what_transformers_writes_is_read_as_if_quantized_anew(bases: Path, name: str, storage: str) -> None:
    mode: Any = "8bit" if storage == "8bit" else "4bit"
    opened = load_model(str(bases / f"{name}-{storage}"), device="cpu")
    anew = load_model(
        str(bases / name), device="cpu", quantize_mode=mode, double_quantization=storage == "nested"
    )
    assert same_weights(opened, anew)
    in_bf16 = load_model(str(bases / f"{name}-{storage}"), device="cpu", compute_dtype="bf16")
    assert not same_weights(opened, in_bf16)  # what is not quantized is in the compute dtype
    other = load_model(
        str(bases / name), device="cpu", quantize_mode=mode, double_quantization=storage != "nested"
    )
    assert same_weights(opened, other) == (storage == "8bit")


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("name", [*FAMILIES, "falcon-h1"])
def test_every_layout_is_prepared_and_read_to_the_last_bit(tmp_path: Path, name: str, storage: str) -> None:
    base = (FAMILIES | FALCON_H1)[name] + ",seed=7"
    out = prepared(base, tmp_path / "out", *FLAGS[storage])
    mode: Any = "8bit" if storage == "8bit" else "4bit"
    how = {"device": "cpu", "quantize_mode": mode, "double_quantization": storage != "plain"}
    assert same_weights(load_model(str(out), **how), load_model(base, **how))  # type: ignore[arg-type]


def test_a_float32_base_is_rounded_as_its_training_rounds_it(tmp_path: Path) -> None:
    tiny_model("falcon-7b").save_pretrained(tmp_path / "base")
    for dtype in ("fp32", "bf16"):
        out = prepared(tmp_path / "base", tmp_path / dtype, "--compute_dtype", dtype)
        opened = load_model(str(out), device="cpu", compute_dtype=dtype)
        assert same_weights(opened, load_model(str(tmp_path / "base"), device="cpu", compute_dtype=dtype))


def test_large_files_are_split_and_their_parts_lie_anywhere(tmp_path: Path, bases: Path) -> None:
    theirs = quantized(bases / "falcon3", "nested")
    theirs.save_pretrained(tmp_path / "split", max_shard_size="20KB")
    assert len([*(tmp_path / "split").glob("*.safetensors")]) > 3
    assert same_weights(
        load_model(str(tmp_path / "split"), device="cpu"), load_model(str(bases / "falcon3"), device="cpu")
    )


def test_linears_that_were_left_in_16_bits_are_told_and_quantized(
    bases: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    skipped = ["lm_head", "o_proj", "model.layers.0.mlp.down_proj"]
    quantized(bases / "falcon3", "nested", llm_int8_skip_modules=skipped).save_pretrained(tmp_path / "part")
    opened = load_model(str(tmp_path / "part"), device="cpu")
    told = re.search(r"leaves (\d+) of (\d+) linears in 16 bits, (\S+) first", capsys.readouterr().out)
    assert told is not None
    assert told.groups() == ("3", "14", "model.layers.0.mlp.down_proj")
    assert same_weights(opened, load_model(str(bases / "falcon3"), device="cpu"))


def test_a_quantized_head_is_refused(bases: Path, tmp_path: Path) -> None:
    quantized(bases / "falcon3", "nested", llm_int8_skip_modules=["nothing"]).save_pretrained(tmp_path / "x")
    with pytest.raises(UserError, match=r"lm_head\.weight is quantized, and is trained here in 16 bits only"):
        load_model(str(tmp_path / "x"), device="cpu")


def _without(tensors: dict[str, torch.Tensor], part: str) -> None:
    del tensors[f"{LINEAR}{part}"]


def _state(tensors: dict[str, torch.Tensor], **changes: Any) -> None:
    name = f"{LINEAR}.quant_state.bitsandbytes__nf4"
    told = json.loads(bytes(tensors[name].tolist())) | changes
    tensors[name] = torch.tensor([*json.dumps(told).encode()], dtype=torch.uint8)


CHANGES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], None], str]] = {
    "blocks": ("nested", lambda t: _state(t, blocksize=128), "its blocksize is '128', not 64"),
    "nested blocks": ("nested", lambda t: _state(t, nested_blocksize=64), "nested_blocksize is '64'"),
    "type": ("nested", lambda t: _state(t, quant_type="fp4"), "its quant_type is 'fp4', not 'nf4'"),
    "shape": ("nested", lambda t: _state(t, shape=[192, 128]), r"is torch.uint8 \[\d+"),
    "other way": ("nested", lambda t: _state(t, shape=[64, 192]), r"the shape \[64, 192\], config.json asks"),
    "offset": ("nested", lambda t: _state(t, nested_offset="0"), "nf4 is damaged"),
    "no offset": ("nested", lambda t: _state(t, nested_offset=None), "nf4 is damaged"),
    "no state": ("nested", lambda t: _without(t, ".quant_state.bitsandbytes__nf4"), "nf4 is missing"),
    "no scales": ("nested", lambda t: _without(t, ".absmax"), "absmax is missing"),
    "no weight": ("nested", lambda t: _without(t, ""), "lacks 1 of the model's tensors"),
    "scales of scales": ("nested", lambda t: _without(t, ".nested_absmax"), "config.json says otherwise"),
    "table": ("nested", lambda t: t[f"{LINEAR}.quant_map"].mul_(2), "is not bitsandbytes' own table"),
    "no SCB": ("8bit", lambda t: _without(t, "") or t.pop(LINEAR.replace("weight", "SCB")), "lacks 1"),
    "format": ("8bit", lambda t: t[LINEAR.replace("weight", "weight_format")].fill_(2), "not stored in rows"),
}


@pytest.mark.parametrize(("storage", "change", "told"), CHANGES.values(), ids=CHANGES)
def test_a_linear_that_is_stored_otherwise_is_refused(
    bases: Path, tmp_path: Path, storage: str, change: Callable[..., None], told: str
) -> None:
    folder = Path(shutil.copytree(bases / f"falcon3-{storage}", tmp_path / "changed"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=told):
        load_model(str(folder), device="cpu")


@pytest.mark.parametrize(
    ("declared", "told"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantized by 'gptq'"),
        ({"quant_method": "awq"}, "quantized by 'awq'"),
        ({"quant_method": "fp8"}, "quantized by 'fp8'"),
        ({"quant_method": "compressed-tensors"}, "quantized by 'compressed-tensors'"),
        ({}, "quantized by 'None'"),
        ("4bit", "quantization_config is '4bit'"),
        ({"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"}, "4 bits of type 'fp4'"),
        ({"load_in_4bit": True}, "4 bits of type 'fp4'"),
        (
            {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16"},
            "NF4 packed into 'bfloat16'",
        ),
        ({"quant_method": "bitsandbytes"}, "in neither 4 nor 8 bits"),
        ({"load_in_8bit": True, "llm_int8_has_fp16_weight": True}, "weights kept in fp16"),
    ],
)
def test_other_schemes_are_refused_by_name(bases: Path, tmp_path: Path, declared: Any, told: str) -> None:
    folder = Path(shutil.copytree(bases / "falcon3-nested", tmp_path / "other"))
    raw = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(raw | {"quantization_config": declared}))
    with pytest.raises(UserError, match=told):
        load_model(str(folder), device="cpu")


def test_codes_without_a_scheme_are_refused(bases: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bases / "falcon3-8bit", tmp_path / "other"))
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(UserError, match=r"is torch\.int8, and config.json has no quantization_config"):
        load_model(str(folder), device="cpu")
