"""That other tools' recipes in the benchmark are theirs: the same work as ours, their own code."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from falcon_qlora.bench import variants
from falcon_qlora.bench.documents import made_up
from falcon_qlora.bench.runners import Settings, adapted, build
from falcon_qlora.bench.variants import Impossible
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import bnb
from tests.benchmarks import against, litgpt
from tests.layouts import FALCON_H1, FAMILIES, VOCABULARY, plain_float32
from tests.packing import one_by_one

SETTINGS = Settings(r=4, alpha=8, max_length=24)
LAYERS = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}
VARIANTS = variants.VARIANTS | against.PEERS


def base_model(mode="4bit", layout="falcon-7b"):
    return load_model(
        (FAMILIES | FALCON_H1)[layout], quantize_mode=mode, device="cpu", compute_dtype="bf16", seed=1
    )


def gradients(model):
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("mode", "name"), [("4bit", "stock-fast"), ("8bit", "stock-8bit-fast")])
def test_the_stock_variant_is_huggingfaces_forward_on_quantized_layers(mode: str, name: str) -> None:
    base = base_model(mode)
    with build(VARIANTS[name], base, SETTINGS, {}) as runner:
        for linear in layout_of(base.config).expected_linears():
            assert type(base.get_submodule(linear).get_base_layer()) is LAYERS[mode]
        patched = [n for n, module in base.named_modules() if n and "forward" in vars(module)]
        assert patched == []
        # TRL's own head on the whole model, and nothing else.
        assert Path(base.forward.__func__.__code__.co_filename).parts[-3:] == ("trl", "trainer", "utils.py")
        norms = [module for module in base.modules() if isinstance(module, nn.LayerNorm)]
        assert {type(norm) for norm in norms} == {nn.LayerNorm}
        assert {norm.weight.dtype for norm in norms} == {torch.float32}
        inputs = runner.prepare(made_up(3, 24, VOCABULARY, seed=0))
        assert inputs["input_ids"].shape == (3, 24)
        assert ("doubly quantized" if mode == "4bit" else "(int8)") in runner.notes[0]


def test_stock_recomputes_and_drops_as_the_recipe_did() -> None:
    base = base_model()
    with build(VARIANTS["stock"], base, SETTINGS, {}) as runner:
        assert base.is_gradient_checkpointing
        linear = base.get_submodule(layout_of(base.config).expected_linears()[0])
        assert linear.lora_dropout["default"].p == 0.1
        assert runner.trainer.args.max_grad_norm == 0.3


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b", "falcon3", "falcon-h1"])
def test_stock_and_ours_do_the_same_work(layout: str) -> None:
    """Loss and gradients of both on the same documents, against Transformers' model in float32."""
    base = base_model("16bit" if layout == "falcon-40b" else "4bit", layout)
    mode = "-16bit" if layout == "falcon-40b" else ""
    whole = made_up(3, 24, VOCABULARY, seed=0)
    lengths = (24, 9, 17)  # so that stock pads
    documents = [(ids[:count], mask[:count]) for (ids, mask), count in zip(whole, lengths, strict=True)]
    truth = adapted(plain_float32(base), VARIANTS["reference"], SETTINGS)
    exact = one_by_one(truth, [torch.as_tensor(ids) for ids, _ in documents]) / (23 + 8 + 16)
    exact.backward()
    exact_gradients = gradients(truth)
    # The first matrices get none as long as the second ones are zero.
    assert all(p.grad.abs().max() > 0 for n, p in truth.named_parameters() if "lora_A" in n)
    for name in (f"stock{mode}-fast", f"reference{mode}", f"ours{mode}"):
        with build(VARIANTS[name], base, SETTINGS, {}) as runner:
            padded = "padded: packed, Transformers' documents reach each other; without mamba-ssm"
            assert (padded in runner.notes) == (layout == "falcon-h1" and name.startswith("stock"))
            loss = runner.loss(runner.prepare(documents))
            loss.backward()
            found = gradients(runner.model)
        assert loss.item() == pytest.approx(exact.item(), rel=2e-3), name
        # bfloat16 has 8 bits; a token more or less, or a wrong scale, would show as several per cent.
        assert float((found - exact_gradients).norm() / exact_gradients.norm()) < 0.03, name


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-h1"])
def test_a_variant_leaves_the_base_as_it_was(layout: str) -> None:
    base = base_model(layout=layout)
    ids = torch.as_tensor(made_up(2, 24, VOCABULARY, seed=0)[0][0])[None]
    before = [(n, type(module)) for n, module in base.named_modules()]
    logits = base(ids).logits
    with build(VARIANTS["stock"], base, SETTINGS, {}) as runner:
        inputs = runner.prepare(made_up(3, 24, VOCABULARY, seed=0))
        first, *_, last = [runner.step(inputs) for _ in range(4)]
        assert float(last) < float(first)  # it does train
    assert [(n, type(module)) for n, module in base.named_modules()] == before
    assert [n for n, module in base.named_modules() if "forward" in vars(module)] == []
    assert [n for n, p in base.named_parameters() if p.requires_grad] == []
    assert not base.is_gradient_checkpointing
    assert torch.equal(base(ids).logits, logits)


def test_what_litgpt_does_not_know_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def from_name(name: str, **_settings: object) -> None:
        raise ValueError(f"{name!r} is not a supported config name")  # LitGPT's own words

    stand_ins = {
        "lightning": SimpleNamespace(),
        "lightning.fabric.plugins": SimpleNamespace(BitsandbytesPrecision=None),
        "litgpt.lora": SimpleNamespace(
            GPT=None, Config=SimpleNamespace(from_name=from_name), mark_only_lora_as_trainable=None
        ),
    }
    for name, module in stand_ins.items():
        monkeypatch.setitem(sys.modules, name, module)
    with pytest.raises(Impossible, match=r"LitGPT has no such model .*'falcon-rw-1b' is not a supported"):
        litgpt.load("random:falcon-rw-1b", SETTINGS, torch.device("cuda", 0))


def test_the_guides_table_stands_first_and_its_recipe_is_a_row(capsys: pytest.CaptureFixture[str]) -> None:
    assert against.main(["--gpus", "1", "--variants", "recipe,stocks"]) == 2
    output, told = capsys.readouterr()
    assert "there is no 'stocks'; there are ours, ours-fp8, recipe" in told
    # As in the guide, whose text says over 7.8x from one GPU to eight.
    assert "| Falcon-7B | 4bit | H100 80GB SXM5 | 6.7 | 55.423 | 8.27x |" in output
    assert "| Falcon-40B | 8bit | A100 80GB SXM4 | 0.36 | 2.85 | 7.92x |" in output
    assert output.count("| Falcon-") == 10


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--variants", "stock", "--dataset_name", "rows.jsonl"], "leave --dataset_name out"),
        (["--variants", "stocks"], "did you mean stock?"),
        (["--gpus", "1", "--whole_run", "--recipe_share", "2"], "--recipe_share 2: must be above 0"),
    ],
)
def test_a_wrong_flag_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert against.main(flags) == 2
    assert told in capsys.readouterr().err
