"""A run that begins from an adapter does what PEFT would do with it, or is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256
from falcon_qlora.config import configure
from falcon_qlora.methods.adapter_folder import read_adapter
from falcon_qlora.methods.open_adapter import load_adapter
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.training import start_adapter
from tests.integration.runs import metrics, summary, write_jsonl

TEXTS = ["The cat sleeps.", "A river runs through the old town to the sea.", "One and one is two."]
RATE = 0.5
NAMES = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
WHOLE = [
    f"transformer.h.{block}.{part}"
    for block in range(5)
    for part in ("self_attention.dense", "self_attention.query_key_value")
]
# As PEFT's configurations of 2023 to now have them: settings, whether the weights are a torch file.
ADAPTERS: dict[str, tuple[dict[str, Any], bool]] = {
    "auto_mapping": (
        {
            "target_modules": NAMES,
            "task_type": None,
            "auto_mapping": {"base_model_class": "FalconForCausalLM"},
        },
        False,
    ),
    "bin": ({"target_modules": NAMES, "enable_lora": None, "merge_weights": False}, True),
    "bin_by_pattern": (
        {"target_modules": r".*\.h\.\d+\.(self_attention\.(query_key_value|dense)|mlp.*4h)"},
        True,
    ),
    "all_linear": (
        {
            "target_modules": "all-linear",
            "use_rslora": True,
            "auto_mapping": {
                "base_model_class": "FalconForCausalLM",
                "parent_library": "transformers.models.falcon.modeling_falcon",
            },
        },
        False,
    ),
    "whole_names": (
        {"target_modules": WHOLE, "use_dora": True, "auto_mapping": {"parent_library": "x"}},
        False,
    ),
    "ends_of_names": (
        {"target_modules": ["self_attention.dense", "mlp.dense_h_to_4h"], "lora_alpha": 8},
        True,
    ),
    "fractional_alpha": ({"target_modules": NAMES, "lora_alpha": 22.6}, False),
    # Rows of tokens that no --new_tokens names.
    "rows": ({"target_modules": ["dense"], "trainable_token_indices": [11, 7], "lora_alpha": 0.5}, False),
}
MORE = ("ends_of_names", "whole_names", "fractional_alpha")


def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_path(), dtype=torch.float32)


def make(folder: Path, name: str) -> Path:
    """An adapter that PEFT has written, as if it had been trained."""
    settings, as_torch_file = ADAPTERS[name]
    of_others = ("enable_lora", "merge_weights")
    torch.manual_seed(1)
    for_peft = {"lora_alpha": 16, **{key: settings[key] for key in settings.keys() - set(of_others)}}
    model = get_peft_model(base(), LoraConfig(r=4, **for_peft))
    for key, parameter in model.named_parameters():
        if "lora_B" in key:
            torch.nn.init.normal_(parameter, std=0.05)
    model.save_pretrained(folder, save_embedding_layers=False)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny"} | settings))
    if as_torch_file:
        weights = folder / "adapter_model.safetensors"
        torch.save(load_file(weights), folder / "adapter_model.bin")
        weights.unlink()
    return folder


def train(folder: Path, **settings: Any) -> Path:
    """One step a pass over all rows, in which nothing depends on their order."""
    rows = write_jsonl(folder / "rows.jsonl", [{"text": text} for text in TEXTS])
    defaults: dict[str, Any] = {
        "quantize_mode": "16bit",
        "dataset_name": rows,
        "output_dir": folder / "run",
        "template": "none",
        "max_length": 64,
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "max_grad_norm": 0.0,
        "weight_decay": 0.0,
        "report_to": "none",
        "cache_dir": folder / "cache",
    }
    return falcon_qlora.train(**defaults | settings)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=pytest.mark.slow) if n in MORE else n for n in ADAPTERS]
)
def test_it_opens_and_goes_on_as_in_peft(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "adapter", name)
    ids = torch.arange(40).reshape(2, 20) * 7 % 300
    theirs: Any = PeftModel.from_pretrained(base(), folder, is_trainable=True)
    ours: Any = load_adapter(
        folder, base_model="tiny", quantize_mode="16bit", compute_dtype="fp32", device="cpu"
    )
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, theirs.eval()(ids).logits, atol=2e-5)
    run = train(tmp_path, adapter=folder, compute_dtype="fp32")
    # PEFT's own step: the mean over all tokens but the first of each text.
    theirs.train()
    tokenizer, total, count = load_tokenizer("tiny"), torch.zeros(()), 0
    for text in TEXTS:
        tokens = torch.tensor([[*tokenizer(text)["input_ids"], tokenizer.eos_token_id]])
        logits = theirs(tokens).logits[0, :-1]
        total = total + torch.nn.functional.cross_entropy(logits, tokens[0, 1:], reduction="sum")
        count += len(logits)
    (total / count).backward()
    assert metrics(run)[0]["loss"] == pytest.approx((total / count).item(), abs=1e-4)
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    moved = 0.0
    for key, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            expected = (parameter - RATE * parameter.grad).detach()
            found = trained.pop(
                key.replace(".default", "").removesuffix(".weight")
                if "magnitude" in key
                else key.replace(".default", "")
            )
            assert torch.allclose(found, expected, atol=2e-6), key
            moved = max(moved, (found - parameter).abs().max().item())
    assert not trained
    assert moved > 1e-3
    # The record says from what.
    file = next(folder.glob("adapter_model.*"))
    told = {"adapter": str(folder), "adapter_sha256": sha256(file)}
    assert summary(run).items() >= told.items()
    assert all(f"{key}: {value}\n" in (run / "config.yaml").read_text() for key, value in told.items())
    assert (
        f"`{folder}` (SHA-256 of its weights: {sha256(file)})" in (run / "adapter" / "README.md").read_text()
    )


@pytest.mark.parametrize(
    "method",
    [
        {"method": "adapter_v2"},
        {"lora_r": 2, "lora_slices": ["query", "value"]},
        pytest.param({"method": "adapter", "adapter_prefix_length": 3}, marks=pytest.mark.slow),
        pytest.param({"lora_r": 2, "use_dora": True, "quantize_mode": "4bit"}, marks=pytest.mark.slow),
    ],
)
def test_two_runs_of_a_step_are_one_of_two(tmp_path: Path, method: dict[str, Any]) -> None:
    both = train(
        tmp_path, **method, model_name_or_path="tiny", max_steps=2, save_steps=1, output_dir=tmp_path / "both"
    )
    # From a checkpoint; base, method and quantization are the adapter's.
    held = {name: method[name] for name in ("quantize_mode",) if name in method}
    second = train(tmp_path, adapter=both / "checkpoints" / "step-1", output_dir=tmp_path / "second", **held)
    weights = [load_file(run / "adapter" / "adapter_model.safetensors") for run in (both, second)]
    assert weights[0].keys() == weights[1].keys()
    for key, tensor in weights[0].items():
        assert torch.allclose(weights[1][key], tensor, atol=1e-6), key
    first = load_file(both / "checkpoints" / "step-1" / "adapter_model.safetensors")
    assert max((first[key] - tensor).abs().max() for key, tensor in weights[0].items()) > 1e-4
    if method.get("method", "lora") == "lora":
        assert cli.main(["merge", "--adapter", str(second), "--out", str(tmp_path / "merge")]) == 0


@pytest.mark.parametrize(
    "name", ["rows", *(pytest.param(name, marks=pytest.mark.slow) for name in ("bin", "fractional_alpha"))]
)
def test_it_resumes_exactly_without_the_adapter_that_it_began_from(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path / "adapter", name)
    settings = {"adapter": folder, "lora_dropout": 0.2, "max_steps": 2, "save_steps": 1}
    whole = train(tmp_path, **settings)
    stopped = Path(shutil.copytree(whole, tmp_path / "stopped"))
    shutil.rmtree(stopped / "checkpoints" / "step-2")
    shutil.rmtree(stopped / "adapter")
    with pytest.raises(UserError, match=r"adapter was .*/adapter in the run to resume and is .*/whole_names"):
        falcon_qlora.train(resume=stopped, adapter=make(tmp_path / "whole_names", "whole_names"))
    # The same command line once more, as job scripts have it.
    shutil.rmtree(folder)
    train(tmp_path, **settings, resume="latest", output_dir=stopped)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, stopped)]
    assert weights[0] == weights[1]
    assert summary(stopped)["adapter"] == str(folder)


@pytest.mark.parametrize(
    "fate", ["other_weights", *(pytest.param(fate, marks=pytest.mark.slow) for fate in ("gone", "another"))]
)
def test_a_restart_of_torchrun_goes_on_without_the_adapter_or_begins_from_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fate: str
) -> None:
    folder = make(tmp_path / "adapter", "rows")
    settings = {"adapter": folder, "max_steps": 2, "save_steps": 1, "overwrite": True}
    whole = train(tmp_path, **settings)
    broken = Path(shutil.copytree(whole, tmp_path / "broken"))
    shutil.rmtree(broken / "checkpoints" / "step-2")
    shutil.rmtree(broken / "adapter")
    settings["output_dir"] = broken
    if fate == "other_weights":
        file = folder / "adapter_model.safetensors"
        save_file({name: tensor / 2 for name, tensor in load_file(file).items()}, file)
    else:
        shutil.rmtree(folder)
    if fate == "another":
        make(folder, "all_linear")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    train(tmp_path, **settings)
    weights = [(run / "adapter" / "adapter_model.safetensors").read_bytes() for run in (whole, broken)]
    assert weights[0] == weights[1]
    assert (
        summary(broken).items()
        >= {name: summary(whole)[name] for name in ("adapter", "adapter_sha256")}.items()
    )
    # Before there was a checkpoint.
    shutil.rmtree(broken / "checkpoints")
    told = "there is no such folder" if fate == "gone" else "the SHA-256 of its weights is "
    with pytest.raises(UserError, match=told):
        train(tmp_path, **settings)
    # Of another launch nothing is taken.
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "another")
    if fate != "gone":
        train(tmp_path, **settings)


def test_rows_in_a_torch_file_are_merged_as_in_peft(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter", "rows")
    weights = folder / "adapter_model.safetensors"
    rows = {name: tensor + 1 if "delta" in name else tensor for name, tensor in load_file(weights).items()}
    torch.save(rows, folder / "adapter_model.bin")
    weights.unlink()
    name, plain = "transformer.word_embeddings.weight", base()
    embedding = plain.get_parameter(name).detach().clone()
    merged = PeftModel.from_pretrained(plain, folder).merge_and_unload().get_parameter(name)
    assert not torch.equal(merged, embedding)
    found = read_adapter(folder).method.merged_tensor(name, embedding, folder, plain.config)
    assert torch.equal(found, merged)


def test_what_contradicts_the_adapter_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "adapter", "all_linear")

    def adopt(**settings: Any) -> Any:
        configuration = configure({"adapter": str(folder), **settings})
        start_adapter.adopt(configuration)
        return configuration.method

    assert adopt().settings() | {"target_modules": None} == {
        "r": 4,
        "alpha": 16,
        "dropout": 0.0,
        "target_modules": None,
        "slices": None,
        "use_rslora": True,
        "use_dora": False,
        "new_tokens": None,
        "token_rows": None,
        "head_rows": True,
    }
    # What may differ, and what says the same in other words.
    assert adopt(lora_dropout=0.3, lora_r=4, lora_target_modules=NAMES[::-1], use_rslora=True).dropout == 0.3
    assert adopt(recipe="lambda-7b-4bit", model_name_or_path="tiny").r == 4
    for settings, told in (
        ({"lora_r": 8}, "--lora_r is 8, but the adapter in .* has 4"),
        ({"lora_alpha": 32}, "--lora_alpha is 32, but .* has 16"),
        (
            {"lora_alpha": 32, "lora_dropout": 0.3, "lora_r": 8},
            "^2 things to mend\n  --lora_r is 8, but .* has 4: .*\n  --lora_alpha is 32, but .* has 16: .*$",
        ),
        ({"use_rslora": False}, "--use_rslora is False, but .* has True"),
        ({"use_dora": True}, "--use_dora is True, but .* has False"),
        (
            {"lora_target_modules": ["dense"]},
            "--lora_target_modules is dense, but .* has dense, dense_4h_to_h, ",
        ),
        ({"method": "adapter"}, "--method is adapter, but .* has lora"),
        ({"model_name_or_path": "random:falcon-7b"}, "adapter is damaged or of another model"),
        ({"adapter_sha256": "0" * 64}, "the SHA-256 of its weights is "),
        ({"compute_dtype": "fp8", "lora_dropout": 0.3}, "fp8"),
    ):
        with pytest.raises(UserError, match=told):
            adopt(**settings)
    file = tmp_path / "settings.yaml"
    file.write_text("lora_r: 8\n")
    with pytest.raises(UserError, match=r"lora_r in .*settings.yaml is 8, but"):
        adopt(config=str(file))
    with pytest.raises(UserError, match="give --adapter too"):
        configure({"adapter_sha256": "0"})


def test_an_adapter_and_a_model_are_not_taken_for_each_other(
    written: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(UserError, match=r"holds a whole model: train on from it with -m .*/full/adapter"):
        train(tmp_path, adapter=written / "full")
    with pytest.raises(UserError, match="holds no adapter"):
        train(tmp_path, adapter=tiny_path())
    for folder in (written / "run", written / "run" / "adapter", make(tmp_path / "adapter", "bin")):
        with pytest.raises(UserError, match="holds an adapter, not a model: name it with --adapter"):
            train(tmp_path, model_name_or_path=folder)
        for words in (["generate", "--prompt", "x"], ["params"], ["eval", "--dataset_name", "sample"]):
            assert cli.main([*words, "-m", str(folder)]) == 2
            assert "name it with --adapter, and its base with -m" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert cli.main(["params", "--adapter", str(written / "run")]) == 0
    assert "Trained: LoRA r 4" in capsys.readouterr().out
