"""The adapter gate: what was saved is what is in memory, whole and trained; each way of being otherwise."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from falcon_qlora.checkpoint.adapter_check import AdapterFaultError, check_opening, check_reading
from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.adapter_v2 import AdapterV2
from falcon_qlora.methods.full import Full
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.forward import enable_packing
from tests.layouts import MODES, attach_lora, check_adapter, tiny_model, trainable_names

WEIGHTS = "adapter_model.safetensors"


def trained_model(mode: Any = "4bit", **options: Any) -> Any:
    return away_from_start(attach_lora(tiny_model("falcon-7b", mode, compute_dtype="bf16"), r=4, **options))


def away_from_start(model: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.fixture(scope="module")
def model() -> Any:
    return trained_model()


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, save_embedding_layers=False)
    return folder


@pytest.mark.parametrize(
    ("mode", "options"),
    [*((mode, {"use_rslora": True, "dropout": 0.5}) for mode in MODES), ("4bit", {"use_dora": True})],
)
def test_a_saved_adapter_passes_and_the_model_is_left_as_it_was(tmp_path, mode, options):
    model = trained_model(mode, **options)
    enable_packing(model)
    before = {name: (id(p), p.requires_grad, p.detach().clone()) for name, p in model.named_parameters()}
    save(model, tmp_path)
    drawn = torch.random.get_rng_state(), random.getstate(), np.random.get_state(legacy=False)
    check_adapter(tmp_path, model)
    assert torch.equal(torch.random.get_rng_state(), drawn[0])
    assert random.getstate() == drawn[1]
    np.testing.assert_equal(np.random.get_state(legacy=False), drawn[2])
    after = {name: (id(p), p.requires_grad, p.detach()) for name, p in model.named_parameters()}
    assert before.keys() == after.keys()
    for name, (identity, needed, value) in before.items():
        # PEFT's DoRA puts the base's weights anew at every forward on the CPU.
        assert after[name][1] == needed, name
        assert after[name][0] == identity or "use_dora" in options, name
        assert torch.equal(after[name][2], value), name
    assert all(module.training for module in model.modules())
    assert list(model.peft_config) == ["default"]
    assert model.active_adapter == "default"


@pytest.mark.parametrize("compute_dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("mode", MODES)
def test_it_passes_on_the_fast_path(tmp_path, mode, compute_dtype):
    model = attach_lora(tiny_model("falcon-7b", mode, compute_dtype=compute_dtype), r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(std=0.1)
    enable_packing(model)
    report = apply_fast_path(model)
    check_adapter(save(model, tmp_path), model)
    assert report
    with torch.no_grad():
        next(p for name, p in model.named_parameters() if "lora_A" in name).mul_(2)
    with pytest.raises(AdapterFaultError, match="not what the model in memory has"):
        check_adapter(tmp_path, model)


def change(folder: Path, how: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(folder / WEIGHTS)
    how(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def first(tensors: dict[str, torch.Tensor], part: str) -> str:
    return next(name for name in tensors if part in name)


@pytest.mark.parametrize(
    ("how", "match"),
    [
        (lambda t: t.pop(first(t, "lora_B")), "is missing"),
        (lambda t: t[first(t, "lora_B")].view(-1)[3:4].fill_(float("nan")), "non-finite"),
        (lambda t: t[first(t, "lora_B")].view(-1)[3:4].add_(1e-6), "not what the model in memory has"),
        (lambda t: t.update({first(t, "lora_A"): torch.zeros(3, 192)}), "has the shape"),
        (lambda t: t.update({first(t, "lora_A"): t[first(t, "lora_A")].double()}), "not what the model in"),
        (lambda t: t.update({"base_model.model.other": torch.ones(3)}), "belongs to no part"),
    ],
)
def test_altered_tensors_are_named(tmp_path, model, how, match):
    change(save(model, tmp_path), how)
    with pytest.raises(AdapterFaultError, match=match):
        check_adapter(tmp_path, model)


def test_files_that_are_cut_short_or_gone(tmp_path, model):
    content = (save(model, tmp_path) / WEIGHTS).read_bytes()
    for length in (0, 7, 500, len(content) - 1):
        (tmp_path / WEIGHTS).write_bytes(content[:length])
        with pytest.raises(AdapterFaultError, match=f"{WEIGHTS} is damaged"):
            check_adapter(tmp_path, model)
    (tmp_path / WEIGHTS).unlink()
    with pytest.raises(AdapterFaultError, match="has no adapter_model"):
        check_adapter(tmp_path, model)


def altered_settings(folder: Path, **changes: Any) -> Path:
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | changes))
    return folder


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lora_alpha": 8}, "scales .* by 2, the model in memory by 4$"),
        ({"use_rslora": True}, "scales .* by 8, "),
        ({"use_dora": True}, "lora_magnitude_vector|scales"),
        ({"r": 3}, "(?s)cannot be opened again: .*size mismatch"),
        ({"target_modules": ["dense", "dense_h_to_4h", "dense_4h_to_h"]}, "cannot be opened|lacks"),
        ({"peft_type": "NONE"}, "cannot be opened again"),
    ],
)
def test_settings_that_are_not_the_models_show_without_its_weights(tmp_path, model, changes, match):
    check_reading(save(model, tmp_path), model)
    with pytest.raises(AdapterFaultError, match=match):
        check_reading(altered_settings(tmp_path, **changes), model)


def test_a_wrong_scale_shows_in_the_loss(tmp_path, model):
    with pytest.raises(AdapterFaultError, match="opened again, has loss"):
        check_opening(altered_settings(save(model, tmp_path), lora_alpha=8), model)
    assert list(model.peft_config) == ["default"]


@pytest.mark.parametrize(
    "method", [Adapter(prefix_length=5, first_block=1), AdapterV2(prefix_length=5, first_block=1)]
)
def test_our_own_loader_is_tried_for_what_peft_does_not_open(tmp_path, monkeypatch, method):
    model = away_from_start(method.attach(tiny_model("falcon-7b"), seed=0))
    method.save(model, tmp_path)
    before = {name: tensor.clone() for name, tensor in method.saved_tensors(model).items()}
    opened = check_opening(tmp_path, model)
    assert (opened.by, opened.difference, opened.why_not) == ("falcon-qlora", 0, None)
    put = type(method).put

    def forgetful(self: Any, into: Any, tensors: dict[str, torch.Tensor]) -> None:
        put(self, into, {name: each for name, each in tensors.items() if not name.endswith(".gate")})

    with monkeypatch.context() as bug:
        bug.setattr(type(method), "put", forgetful)
        with pytest.raises(AdapterFaultError, match="opened again, has loss nan"):
            check_opening(tmp_path, model)
    method.put(model, before)
    assert all(torch.equal(before[name], each) for name, each in method.saved_tensors(model).items())


def test_what_peft_reads_is_compared_with_what_was_held(tmp_path, model):
    held = {name: tensor.clone() for name, tensor in method_of(model).trained_state(model).items()}
    check_reading(save(model, tmp_path), model, held)
    change(tmp_path, lambda tensors: tensors[first(tensors, "lora_B")].view(-1)[3:4].add_(1e-6))
    with pytest.raises(AdapterFaultError, match="not what the model in memory has"):
        check_reading(tmp_path, model, held)


def test_an_adapter_that_was_never_trained(tmp_path):
    untrained = attach_lora(tiny_model("falcon-7b"), r=4)
    save(untrained, tmp_path)
    with pytest.raises(
        AdapterFaultError, match=r"lora_B.* is still all zeros after training .8 such tensors"
    ):
        check_adapter(tmp_path, untrained, trained=True)
    check_adapter(tmp_path, untrained, trained=False)
    check_adapter(tmp_path, untrained)


def test_one_that_has_not_moved_among_others_that_have(tmp_path):
    partly = trained_model()
    with torch.no_grad():
        next(p for name, p in partly.named_parameters() if "1.mlp.dense_4h_to_h.lora_B" in name).zero_()
    with pytest.raises(
        AdapterFaultError, match=r"1\.mlp\.dense_4h_to_h\.lora_B.* is still all zeros .*1 such"
    ):
        check_adapter(save(partly, tmp_path), partly)


OTHERS = {
    "slices": Lora(r=2, alpha=8, slices=("query", "value")),
    "adapter": Adapter(prefix_length=5, first_block=1),
    "adapter_v2": AdapterV2(prefix_length=5, first_block=1),
    "full": Full(),
}


@pytest.mark.parametrize("name", OTHERS)
def test_every_method_is_compared_tensor_by_tensor(tmp_path, name):
    method = OTHERS[name]
    model = away_from_start(method.attach(tiny_model("falcon-7b", "16bit"), seed=3))
    method.save(model, tmp_path)
    if name == "slices":
        (tmp_path / "falcon_qlora.json").write_text('{"lora_slices": ["query", "value"]}')
    before = {key: each.detach().clone() for key, each in model.named_parameters()}
    needed = trainable_names(model)
    check_adapter(tmp_path, model)
    assert trainable_names(model) == needed
    assert all(torch.equal(each, before[key]) for key, each in model.named_parameters())
    last = dict(model.named_parameters())[needed[-1]].data.view(-1)[-1:]
    last += 1e-4
    with pytest.raises(AdapterFaultError, match="not what the model in memory has"):
        check_adapter(tmp_path, model)
    last.fill_(float("inf"))
    method.save(model, tmp_path)
    with pytest.raises(AdapterFaultError, match=r"not finite|non-finite"):
        check_adapter(tmp_path, model)


def test_prefixes_of_another_run_or_never_trained(tmp_path):
    model = Adapter(prefix_length=5, first_block=1).attach(tiny_model("falcon-7b"), seed=3)
    method_of(model).save(model, tmp_path)
    with pytest.raises(AdapterFaultError, match=r"gate.* is still all zeros"):
        check_adapter(tmp_path, model, trained=True)
    check_adapter(tmp_path, model, trained=False)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    settings["settings"]["first_block"] = 0
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(AdapterFaultError, match=r"h\.0.* is missing"):
        check_adapter(tmp_path, model)
