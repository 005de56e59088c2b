"""LoRA on a quantized Falcon: float32, whole, opened by plain PEFT, and left alone by TRL."""

import contextlib
import json
import math
import warnings
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import PeftModel
from peft.tuners.lora.bnb import Linear4bit, Linear8bitLt
from torch import nn
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.undrawn import DrawnOnHost
from tests.layouts import FAMILIES, LAYOUTS, MODES, attach_lora, documents, plain_float32, tiny_model


def test_modules_made_elsewhere_draw_what_they_would_on_the_cpu():
    def drawn(*modes):
        torch.manual_seed(3)
        with contextlib.ExitStack() as stack:
            for mode in modes:
                stack.enter_context(mode)
            down, up = nn.Linear(50, 4, bias=False), nn.Linear(4, 60)
            nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))
            nn.init.zeros_(up.weight)
            nn.init.normal_(tensor=down.weight, std=0.1)
        return down.weight, torch.get_rng_state()

    (here, state), (there, as_here) = drawn(), drawn(torch.device("meta"), DrawnOnHost())
    assert there.is_meta
    assert torch.equal(as_here, state)
    (inside, state) = drawn(DrawnOnHost())
    assert torch.equal(inside, here)
    assert torch.equal(as_here, state)


def trainable(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def randomized(model, seed=0):
    """Give every trainable parameter a value that shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("layout", FAMILIES)
def test_adapters_are_float32_on_all_linears_and_the_rest_is_frozen(layout, mode):
    base = tiny_model(layout, mode, compute_dtype="bf16")
    shapes = layout_of(base.config).linear_shapes()
    model = attach_lora(base, r=4)
    parameters = trainable(model)
    assert all("lora_" in name and p.dtype == torch.float32 for name, p in parameters.items())
    assert sum(p.numel() for p in parameters.values()) == 2 * sum(4 * (o + i) for o, i in shapes.values())
    layer = {"4bit": Linear4bit, "8bit": Linear8bitLt}.get(mode)
    if layer:
        assert sum(isinstance(m, layer) for m in model.modules()) == 2 * len(shapes)
    assert not getattr(model, "is_loaded_in_4bit", False)
    assert not getattr(model, "is_loaded_in_8bit", False)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}, {"dropout": 0.1}])
def test_every_trainable_parameter_gets_a_gradient_and_moves(mode, options):
    model = randomized(attach_lora(tiny_model("falcon-7b", mode), r=4, **options))
    parameters = trainable(model)
    if options.get("use_dora"):
        assert any("magnitude" in name for name in parameters)
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = torch.optim.SGD(parameters.values(), lr=1e-3)
    ids = documents([30])[0][None]
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    for name, parameter in parameters.items():
        assert parameter.dtype == torch.float32, name
        assert not torch.equal(parameter, before[name]), name


def test_targets_can_be_chosen_and_are_checked():
    model = attach_lora(tiny_model("falcon-7b", "4bit"), r=2, target_modules=["dense", "query_key_value"])
    modules = {name.split(".lora_")[0].rpartition(".")[2] for name in trainable(model)}
    assert modules == {"dense", "query_key_value"}
    with pytest.raises(UserError, match="did you mean query_key_value"):
        attach_lora(tiny_model("falcon-7b"), target_modules=["query_key"])


def test_the_seed_decides_the_start_and_nothing_else_is_drawn_from():
    torch.manual_seed(7)
    expected = torch.rand(1)
    starts = []
    for seed, outside in [(1, 7), (1, 8), (2, 7)]:
        torch.manual_seed(outside)
        starts.append(trainable(attach_lora(tiny_model("falcon-7b", "4bit"), r=2, seed=seed)))
        drawn = torch.rand(1)
    assert torch.equal(drawn, expected)
    name = next(iter(starts[0]))
    assert torch.equal(starts[0][name], starts[1][name])
    assert not torch.equal(starts[0][name], starts[2][name])


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}])
@pytest.mark.parametrize("layout", FAMILIES)
def test_a_saved_adapter_opens_in_plain_peft_with_the_same_logits(tmp_path, layout, options):
    base = tiny_model(layout, "16bit")
    plain_float32(base).save_pretrained(tmp_path / "base")
    model = randomized(attach_lora(base, r=4, **options)).eval()
    model.save_pretrained(tmp_path / "adapter")
    ids = documents([12])[0][None]
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    opened = PeftModel.from_pretrained(plain, tmp_path / "adapter")
    assert_close(opened(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", MODES)
def test_load_adapter_finds_the_base_and_gives_the_same_logits(tmp_path, mode):
    model = randomized(attach_lora(tiny_model("falcon-7b", mode), r=4)).eval()
    model.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == LAYOUTS["falcon-7b"] + ",seed=1"
    again = load_adapter(tmp_path, quantize_mode=mode, device="cpu")
    ids = documents([12])[0][None]
    assert torch.equal(again(ids).logits, model(ids).logits)
    assert not trainable(again)
    to_train = load_adapter(tmp_path, base_model=tiny_model("falcon-7b", mode), trainable=True)
    assert {p.dtype for p in trainable(to_train).values()} == {torch.float32}
    assert to_train.training


def test_a_folder_without_an_adapter_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no adapter"):
        load_adapter(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="names no base model"):
        load_adapter(tmp_path)


@pytest.fixture(scope="module")
def tokenizer():
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    vocabulary = {f"w{i}": i for i in range(126)} | {"<|end|>": 126}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, "w0")), eos_token="<|end|>", pad_token="<|end|>"
    )


@pytest.mark.parametrize("mode", MODES)
def test_trls_trainer_trains_the_adapters_in_float32(tmp_path, tokenizer, mode):
    model = attach_lora(tiny_model("falcon-7b", mode), r=4)
    before = {name: p.detach().clone() for name, p in trainable(model).items()}
    settings = SFTConfig(
        output_dir=str(tmp_path),
        max_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-5,
        report_to=[],
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        packing=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        disable_tqdm=True,
    )
    rows = Dataset.from_dict({"input_ids": [doc.tolist() for doc in documents([9] * 8)]})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = SFTTrainer(model=model, args=settings, train_dataset=rows, processing_class=tokenizer)
        trainer.train()
        trainer.save_model(str(tmp_path / "adapter"))
    for name, parameter in trainable(model).items():
        assert parameter.dtype == torch.float32, name
        if "lora_B" in name:
            assert not torch.equal(parameter, before[name]), name
    assert (Path(tmp_path) / "adapter" / "adapter_model.safetensors").stat().st_size > 10_000


@pytest.mark.parametrize(("use_rslora", "scale"), [(False, 6 / 4), (True, 6 / 2)])
def test_the_update_is_scaled_as_asked(use_rslora, scale):
    """The truth is Transformers' own model with the update added to its weights by hand."""
    base = tiny_model("falcon-7b")
    plain = plain_float32(base)
    model = attach_lora(base, r=4, alpha=6, use_rslora=use_rslora, seed=3)
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "lora_A")}
    with torch.no_grad():
        for name, layer in layers.items():
            first, second = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            second.normal_(std=0.1)
            own_name = name.removeprefix("base_model.model.")
            plain.get_submodule(own_name).weight += scale * second @ first
        ids = documents([30])[0][None]
        torch.testing.assert_close(model(ids).logits, plain(ids).logits, rtol=1e-4, atol=1e-4)
    assert len(layers) == 8
