"""Falcon3 by the command line: trained, resumed, merged, asked; plain Transformers and PEFT are the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8
from falcon_qlora.methods.open_adapter import load_adapter
from tests.integration.runs import metrics, write_jsonl
from tests.small_tokenizer import small_tokenizer

pytestmark = pytest.mark.usefixtures("forked")

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Falcon3 as Transformers saves it, `model`, and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("falcon3")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        rope_theta=1000042.0,
        bos_token_id=0,
        eos_token_id=0,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    small_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(24)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def settings(folder: Path, output: str, steps: int) -> dict[str, Any]:
    return {
        "model_name_or_path": folder / "model",
        "dataset_name": folder / "rows.jsonl",
        "output_dir": folder / output,
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "max_length": 64,
        "lora_r": 4,
        "learning_rate": 1e-2,
        "warmup_steps": 0,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "report_to": "none",
    }


def run(folder: Path, output: str, steps: int, **more: Any) -> list[float]:
    """The losses of a run in this process."""
    return losses(metrics(falcon_qlora.train(**settings(folder, output, steps) | more)))


def losses(lines: list[dict[str, Any]]) -> list[float]:
    return [line["loss"] for line in lines if "loss" in line]


def check_merge(folder: Path, *, most: str) -> None:
    """Merge `run`, within so much loss and divergence; what comes of it is asked, inspected and evaluated."""
    merged = folder / "merged"
    bounds = ["--max_loss_increase", most, "--max_kl_divergence", most]
    words = ["merge", "--adapter", str(folder / "run"), "--out", str(merged), "--base", "dequantized"]
    assert cli.main([*words, *bounds, "--dtype", "fp32"]) == 0
    reference = load_adapter(folder / "run/adapter", base_model=str(folder / "model"), device="cpu")
    ids = torch.arange(20)[None]
    merge = AutoModelForCausalLM.from_pretrained(merged)
    assert_close(merge(ids).logits, reference(ids).logits, rtol=1e-3, atol=1e-3)
    for words in (["inspect", str(folder / "run")], ["inspect", str(merged)]):
        assert cli.main(words) == 0
    for which in (["--adapter", str(folder / "run")], ["-m", str(merged)]):
        assert cli.main(["generate", *which, "--prompt", "Say 3.", "--max_new_tokens", "5"]) == 0
    assert cli.main(["eval", "-m", str(merged), "--dataset_name", str(folder / "rows.jsonl")]) == 0


def check_opened_by_peft(folder: Path, adapter: Path) -> None:
    """Plain PEFT on plain Transformers computes with an adapter what is computed here."""
    plain = AutoModelForCausalLM.from_pretrained(folder / "model")
    opened = PeftModel.from_pretrained(plain, adapter)
    ids = torch.arange(20)[None]
    base = str(folder / "model")
    ours = load_adapter(adapter, base_model=base, quantize_mode="16bit", device="cpu")
    assert_close(ours(ids).logits, opened(ids).logits, rtol=1e-4, atol=1e-4)
    with opened.disable_adapter():
        assert not torch.allclose(ours(ids).logits, opened(ids).logits, atol=1e-2)


@pytest.mark.slow
def test_a_run_is_resumed_merged_and_asked(folder: Path) -> None:
    flags = [word for name, value in settings(folder, "run", 4).items() for word in (f"--{name}", str(value))]
    flags += ["--eval_split", "0.2", "--gpus", "1"]
    assert cli.main(["train", *flags, "--max_steps", "2"]) == 0
    kernels = json.loads((folder / "run/kernels.json").read_text())
    for block in ("model.layers.0", "model.layers.1"):
        assert kernels[block].startswith("fast (")
        assert "SwiGLU: PyTorch" in kernels[block]
    assert cli.main(["train", *flags, "--resume"]) == 0
    resumed = losses(metrics(folder / "run"))
    assert len(resumed) == 4
    assert resumed == run(folder, "whole", 4, eval_split=0.2)
    assert (
        set(json.loads((folder / "run/adapter/adapter_config.json").read_text())["target_modules"]) == LINEARS
    )
    check_merge(folder, most="0.2")


def test_fp8_trains_what_bfloat16_trains(folder: Path) -> None:
    in_bfloat16 = run(folder, "in_bf16", 3, compute_dtype="bf16")
    with fp8.emulated():
        in_fp8 = run(folder, "in_fp8", 3, compute_dtype="fp8")
    assert "FP8" in (folder / "in_fp8/kernels.json").read_text()
    assert in_fp8 != in_bfloat16
    assert in_fp8 == pytest.approx(in_bfloat16, rel=0.03)


def test_packed_gives_the_losses_of_padded_and_plain_peft_opens_the_adapter(folder: Path) -> None:
    same = {"quantize_mode": "16bit", "compute_dtype": "fp32"}
    packed = run(folder, "packed", 3, **same)
    assert packed[0] > packed[-1]
    assert packed == pytest.approx(run(folder, "padded", 3, packing=False, **same), abs=1e-4)
    check_opened_by_peft(folder, folder / "packed/adapter")


@pytest.mark.slow
# Adapter v2 has all that Adapter has.
@pytest.mark.parametrize(("method", "mode"), [("adapter_v2", "8bit"), ("full", "16bit")])
def test_other_methods_train_it_and_are_resumed(folder: Path, method: str, mode: str) -> None:
    more: dict[str, Any] = {"method": method, "quantize_mode": mode, "learning_rate": 1e-3, "lora_r": None}
    more |= {"adapter_first_block": 0} if method != "full" else {}
    name = f"{method}-{mode}"
    run(folder, name, 2, **more)
    resumed = run(folder, name, 4, **more, resume=True)
    assert resumed == run(folder, f"{name}-whole", 4, **more)
    assert cli.main(["inspect", str(folder / name)]) == 0


@pytest.mark.parametrize(
    ("more", "told"),
    [
        (
            {"kernels": "required", "method": "adapter_v2", "adapter_first_block": 0, "lora_r": None},
            "--kernels required: model.layers.0 runs on the reference path: scales and biases",
        ),
        ({"lora_slices": ["query"]}, "--lora_slices trains slices of a projection"),
        ({"lora_target_modules": ["query_key_value"]}, "the blocks have no linear 'query_key_value'"),
    ],
)
def test_what_it_cannot_do_is_refused(folder: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        run(folder, "refused", 1, **more)
    assert not (folder / "refused").exists()
