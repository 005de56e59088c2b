"""What only a GPU can show: the variable-length kernel in bfloat16, quantized kernels, processes on GPUs."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.load import load_model, verify_quantized
from falcon_qlora.models.packed_attention import takes_varlen
from tests.integration.runs import summary, train, write_jsonl
from tests.layouts import FAMILIES, documents, plain_float32, tiny_model
from tests.packing import gradients, one_by_one, packed, with_adapter

pytestmark = pytest.mark.gpu

LENGTHS = [70, 300, 1, 129, 256]


def distance(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return float((ours.float().cpu() - truth).norm() / truth.norm())


@pytest.mark.parametrize("layout", [*FAMILIES, "falcon-h1"])
def test_the_variable_length_kernel_runs_and_is_as_near_to_float32_as_stock_bfloat16(layout: str) -> None:
    base = tiny_model(layout, "4bit", device="cuda", compute_dtype="bf16")
    head_dim = base.config.head_dim + (8 if layout == "falcon-rw-1b" else 0)
    assert takes_varlen(torch.device("cuda", 0), torch.bfloat16, head_dim, 0.0)
    truth = with_adapter(plain_float32(base))
    stock = copy.deepcopy(truth).to("cuda", torch.bfloat16)
    model = with_adapter(base)
    enable_packing(model)
    docs = documents(LENGTHS)
    on_gpu = [doc.cuda() for doc in docs]
    expected = one_by_one(truth, docs)
    expected.backward()
    one_by_one(stock, on_gpu).backward()
    with torch.autocast("cuda", torch.bfloat16):
        loss = model(**packed(on_gpu)).loss
    loss.backward()
    assert abs(loss.item() / expected.item() - 1) < 5e-3
    exact, of_stock = gradients(truth), gradients(stock)
    ours = gradients(model)
    our_error = sum(distance(ours[name], exact[name]) for name in exact) / len(exact)
    stock_error = sum(distance(of_stock[name], exact[name]) for name in exact) / len(exact)
    assert our_error < 1.1 * stock_error, f"{our_error:.2e} against stock's {stock_error:.2e}"


# Of 8bit, see test_models_gpu.py: LLM.int8() chooses its outlier columns over the whole micro batch.
@pytest.mark.parametrize("mode", ["4bit", "16bit"])
@pytest.mark.parametrize("layout", [*FAMILIES, "falcon-h1"])
def test_one_document_does_not_reach_another(layout: str, mode: str) -> None:
    model = with_adapter(tiny_model(layout, mode, device="cuda", compute_dtype="bf16"))
    enable_packing(model)
    before = documents([200, 300, 90], device="cuda")
    after = [
        documents([200], seed=99, device="cuda")[0],
        before[1],
        documents([90], seed=9, device="cuda")[0],
    ]
    results = []
    for docs in (before, after):
        arguments = packed(docs)
        with torch.autocast("cuda", torch.bfloat16):
            logits = model(arguments["input_ids"], sequences=arguments["sequences"]).logits[0, 200:500]
        arguments["target_positions"] = torch.arange(200, 499, device="cuda")
        arguments["targets"] = torch.cat(docs)[arguments["target_positions"] + 1]
        model.zero_grad()
        with torch.autocast("cuda", torch.bfloat16):
            loss = model(**arguments).loss
        loss.backward()
        results.append((logits.detach(), {name: grad.clone() for name, grad in gradients(model).items()}))
    assert torch.equal(results[0][0], results[1][0])
    for name, gradient in results[0][1].items():
        # Attention's backward adds up in any order: on an H200 Falcon-H1's differed by 3e-4 of the largest
        # value. What leaked would be far larger.
        torch.testing.assert_close(
            gradient, results[1][1][name], rtol=2e-2, atol=2e-3 * float(gradient.abs().max()) + 1e-7
        )


@pytest.mark.parametrize("mode", ["4bit", "8bit", "16bit"])
def test_a_real_shape_loads_quantized_and_small(mode: str) -> None:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    model = load_model("random:falcon-7b?num_hidden_layers=8", quantize_mode=mode, device="cuda")
    verify_quantized(model, mode)
    linears = 8 * 2 * (4672 + 4544 + 2 * 4 * 4544) * 4544 / 2
    rest = 65024 * 4544 * 2
    expected = rest + {"4bit": 0.52, "8bit": 1.001, "16bit": 2.0}[mode] * linears
    assert torch.cuda.memory_allocated() - held < 1.02 * expected + 2**20
    assert torch.cuda.max_memory_allocated() - held < 1.02 * expected + rest + 8 * 4544 * 4544


def _rows(folder: Path) -> Path:
    texts = [
        f"Row {number}: " + "the cat sat on the mat and looked. " * (number % 7 + 1) for number in range(96)
    ]
    return write_jsonl(folder / "rows.jsonl", [{"text": text} for text in texts])


SETTINGS = "-m tiny -q 4bit --max_length 256 --steps 20 --logging_steps 1 --save_strategy no --warmup_steps 0"


def test_the_loss_falls_on_one_gpu(tmp_path: Path) -> None:
    lines = train(tmp_path / "run", *SETTINGS.split(), "-b", "4", "--dataset_name", _rows(tmp_path))
    assert lines[-1]["loss"] < 0.8 * lines[0]["loss"]
    assert summary(tmp_path / "run")["quantized_linears"] == 20


def test_full_determinism_gives_the_same_losses_to_the_last_bit(tmp_path: Path) -> None:
    settings = [*SETTINGS.split(), "--dataset_name", _rows(tmp_path), "-b", "4", "--full_determinism", "true"]
    first, again = (train(tmp_path / name, *settings) for name in ("first", "again"))
    assert [line["loss"] for line in first] == [line["loss"] for line in again]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_what_one_trains(tmp_path: Path) -> None:
    settings = [
        *SETTINGS.split(),
        "--dataset_name",
        _rows(tmp_path),
        "--compute_dtype",
        "fp32",
        "-q",
        "16bit",
    ]
    settings += ["--optim", "sgd", "--learning_rate", "1.0", "--global_batch_size", "8"]
    alone = train(tmp_path / "alone", *settings, "-b", "4")
    pair = train(tmp_path / "pair", *settings, "-b", "2", gpus=2)
    for one, two in zip(alone, pair, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-4)
