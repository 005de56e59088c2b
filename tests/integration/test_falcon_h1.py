"""Falcon-H1 by the command line: trained, resumed, merged, asked; Transformers and PEFT are the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from transformers import AutoModelForCausalLM

from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8
from falcon_qlora.methods.open_adapter import load_adapter
from tests.integration.runs import metrics, write_jsonl
from tests.integration.test_falcon3 import check_merge, check_opened_by_peft, losses, run, settings
from tests.small_tokenizer import small_tokenizer
from tests.unit.test_falcon_h1 import KINDS, plain_model

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("forked")]

LINEARS = {"q_proj", "k_proj", "v_proj", "o_proj", "in_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny Falcon-H1 as Transformers saves it, `model`, and `rows.jsonl`."""
    folder = tmp_path_factory.mktemp("falcon-h1")
    plain_model(vocab_size=512, **KINDS["norm behind the gate"]).save_pretrained(folder / "model")
    small_tokenizer().save_pretrained(folder / "model")
    rows = [{"instruction": f"Say {number}.", "output": f"It is {number}."} for number in range(24)]
    write_jsonl(folder / "rows.jsonl", rows)
    return folder


def test_a_run_is_resumed_merged_and_asked(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = [word for name, value in settings(folder, "run", 4).items() for word in (f"--{name}", str(value))]
    flags += ["--eval_split", "0.2", "--gpus", "1"]
    assert cli.main(["train", *flags, "--max_steps", "2"]) == 0
    told = " ".join("".join(capfd.readouterr()).split())
    assert "out_proj stays without LoRA: PEFT 0.21 refuses it on a Falcon-H1" in told
    assert "18 linear layers" in told
    kernels = json.loads((folder / "run/kernels.json").read_text())
    for block in ("model.layers.0", "model.layers.1"):
        assert kernels[block].startswith("fast (")
        assert "state space: PyTorch" in kernels[block]
    assert cli.main(["train", *flags, "--resume"]) == 0
    checks = json.loads((folder / "run/summary.json").read_text())["checks"]
    assert checks["packing"]["documents"] > 1
    assert checks["packing"]["moved"] == 0
    assert checks["adapter_coverage"]["found"] < checks["adapter_coverage"]["of"]  # not out_proj
    assert {checks[name]["state"] for name in ("packing", "adapter_coverage", "reopened")} == {"passed"}
    assert "did not move by a bit when others changed" in " ".join("".join(capfd.readouterr()).split())
    resumed = losses(metrics(folder / "run"))
    assert len(resumed) == 4
    assert resumed == run(folder, "whole", 4, eval_split=0.2)
    record = json.loads((folder / "run/adapter/adapter_config.json").read_text())
    assert set(record["target_modules"]) == LINEARS
    check_merge(folder, most="0.5")


@pytest.mark.parametrize("mode", ["16bit", "8bit"])
def test_packed_gives_the_losses_of_padded_and_plain_peft_opens_the_adapter(folder: Path, mode: str) -> None:
    same: dict[str, Any] = {"quantize_mode": mode, "compute_dtype": "fp32"}
    if mode == "8bit":  # outlier columns would be chosen over a whole micro batch
        same |= {"kernels": "off", "llm_int8_threshold": 0}
    packed = run(folder, f"packed-{mode}", 4, **same)
    assert packed[0] > packed[-1]
    assert packed == pytest.approx(run(folder, f"padded-{mode}", 4, packing=False, **same), abs=1e-4)
    run(folder, f"stream-{mode}", 1, streaming=True, **same)
    for kind in ("packed", "padded", "stream"):
        found = json.loads((folder / f"{kind}-{mode}/summary.json").read_text())["checks"]["packing"]
        assert found["documents"] > 1
        assert found["moved"] == 0
    check_opened_by_peft(folder, folder / f"packed-{mode}/adapter")


@pytest.mark.parametrize("more", [{}, {"lora_target_modules": ["in_proj", "out_proj"]}], ids=["eight", "two"])
def test_fp8_trains_what_bfloat16_trains(folder: Path, more: dict[str, Any]) -> None:
    in_bfloat16 = run(folder, f"in_bf16-{len(more)}", 3, compute_dtype="bf16", **more)
    with fp8.emulated():
        in_fp8 = run(folder, f"in_fp8-{len(more)}", 3, compute_dtype="fp8", **more)
    assert "FP8" in (folder / f"in_fp8-{len(more)}/kernels.json").read_text()
    assert in_fp8 != in_bfloat16
    assert in_fp8 == pytest.approx(in_bfloat16, rel=0.03)


def test_out_proj_is_adapted_where_it_is_named(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    more: dict[str, Any] = {"lora_target_modules": ["in_proj", "out_proj"], "compute_dtype": "fp32"}
    run(folder, "nine", 2, **more)
    told = " ".join("".join(capfd.readouterr()).split())
    assert "LoRA on out_proj: falcon_qlora opens and merges the adapter, plain PEFT does not" in told
    assert "falcon_qlora, not plain PEFT (LoRA on out_proj)" in told
    assert json.loads((folder / "nine/summary.json").read_text())["refused_by_peft"] == ["out_proj"]
    card = (folder / "nine/adapter/README.md").read_text()
    assert "Plain PEFT refuses LoRA on `out_proj`" in card
    assert "PeftModel" not in card
    assert run(folder, "nine", 4, **more, resume=True) == run(folder, "nine-whole", 4, **more)
    with pytest.raises(ValueError, match="incompatible with Mamba-based models"):
        PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(folder / "model"), folder / "nine/adapter"
        )
    merged = folder / "nine-merged"
    words = ["merge", "--adapter", str(folder / "nine"), "--out", str(merged), "--max_loss_increase", "0.5"]
    assert cli.main([*words, "--max_kl_divergence", "0.5", "--dtype", "fp32", "--base", "dequantized"]) == 0
    ours = load_adapter(folder / "nine/adapter", base_model=str(folder / "model"), device="cpu")
    ids = torch.arange(20)[None]
    merge = AutoModelForCausalLM.from_pretrained(merged)
    assert_close(merge(ids).logits, ours(ids).logits, rtol=1e-3, atol=1e-3)
    assert cli.main(["inspect", str(folder / "nine")]) == 0


def test_every_weight_is_trained_and_the_run_resumed(folder: Path) -> None:
    more: dict[str, Any] = {"method": "full", "quantize_mode": "16bit", "learning_rate": 1e-3, "lora_r": None}
    run(folder, "full", 2, **more)
    assert run(folder, "full", 4, **more, resume=True) == run(folder, "full-whole", 4, **more)
    before = AutoModelForCausalLM.from_pretrained(folder / "model").state_dict()
    after = AutoModelForCausalLM.from_pretrained(folder / "full/adapter").state_dict()
    assert all(not torch.equal(before[name], after[name]) for name in before if "norm" not in name)


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"lora_slices": ["query"]}, "--lora_slices trains slices of a projection"),
        ({"method": "adapter", "lora_r": None}, "--method adapter does not train a Falcon-H1"),
        ({"method": "adapter_v2", "lora_r": None}, "--method adapter_v2 does not train a Falcon-H1"),
    ],
)
def test_what_it_cannot_do_is_refused(folder: Path, more: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        run(folder, "refused", 1, **more)
    assert not (folder / "refused").exists()
