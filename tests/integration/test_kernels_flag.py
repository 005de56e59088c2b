"""``--kernels off`` and ``auto`` train the same, and a run says which it was."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

import falcon_qlora
from falcon_qlora import __main__ as cli
from falcon_qlora.common.errors import UserError
from falcon_qlora.kernels import fp8
from falcon_qlora.models import fast_path
from falcon_qlora.run_folder.directory import RunDirectory
from tests.integration.runs import metrics


def fine_tune(output: Path, **settings: object) -> Path:
    defaults: dict[str, object] = {
        "model_name_or_path": "tiny",
        "dataset_name": "sample",
        "max_rows": 200,
        "eval_split": 0.2,
        "eval_steps": 12,
        "max_steps": 12,
        "max_length": 128,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lora_r": 16,
        "report_to": "none",
        "output_dir": output,
    }
    return falcon_qlora.train(**defaults | settings)


# Products in bfloat16 take processors that have none ten times as long as in float32: those runs are short.
BF16: dict[str, object] = {"max_steps": 5, "eval_steps": 5, "max_rows": 80, "max_length": 48}


@pytest.fixture(scope="module")
def in_bfloat16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on the fast path."""
    return fine_tune(tmp_path_factory.mktemp("bf16"), compute_dtype="bf16", **BF16)


# In bfloat16 the reference path adds LoRA to outputs that have been rounded, which swallows a part of its
# update; in 8 bits it quantizes activations too.
@pytest.mark.parametrize(
    ("compute_dtype", "quantize_mode", "rel"),
    [
        ("fp32", "4bit", 1e-4),
        pytest.param("fp32", "8bit", 3e-2, marks=pytest.mark.slow),
        pytest.param("bf16", "4bit", 2e-2, marks=pytest.mark.slow),
    ],
)
def test_the_fast_path_trains_what_the_reference_path_trains(
    tmp_path: Path, in_bfloat16: Path, quantize_mode: str, compute_dtype: str, rel: float
) -> None:
    shared: dict[str, object] = {"quantize_mode": quantize_mode, "compute_dtype": compute_dtype}
    shared |= BF16 if compute_dtype == "bf16" else {"max_steps": 8, "eval_steps": 8, "max_rows": 128}
    runs = {"off": fine_tune(tmp_path / "off", kernels="off", **shared), "auto": in_bfloat16}
    if compute_dtype == "fp32":
        runs["auto"] = fine_tune(tmp_path / "auto", **shared)
    off, auto = (metrics(runs[kernels]) for kernels in ("off", "auto"))
    assert off[-1]["loss"] < 0.95 * off[0]["loss"]
    # A step's loss is of few tokens, and rounding grows from step to step; the held-out loss averages.
    for one, other in zip(off[:4], auto[:4], strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=rel)
    assert auto[-1]["eval_loss"] == pytest.approx(off[-1]["eval_loss"], rel=rel)
    kernels = RunDirectory(runs["auto"]).read("kernels")
    assert len(kernels) == 5
    assert all(what.startswith("fast") for what in kernels.values())
    assert RunDirectory(runs["off"]).read("kernels") == {"all blocks": "reference path: --kernels off"}


def test_a_library_that_fails_is_told_at_the_start_and_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    failure = "flash-attn-4 failed: OSError: libcute.so: cannot open shared object file"
    monkeypatch.setattr(fast_path, "choose_attention", lambda *_, **__: ("padded batches", failure))
    short: dict[str, object] = {"max_steps": 1, "eval_steps": 1, "max_rows": 20, "max_length": 32}
    run = fine_tune(tmp_path / "run", **short)
    (note,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: flash-attn-4")]
    assert note.startswith(f"note: {failure}. The run is slower without it. ")
    assert all(f"[{failure}]" in what for what in RunDirectory(run).read("kernels").values())
    with pytest.raises(UserError, match=f"--kernels required: {failure}"):
        fine_tune(tmp_path / "refused", kernels="required", **short)
    assert not (tmp_path / "refused").exists()


@pytest.mark.parametrize(
    ("method", "rate"), [pytest.param("adapter", 1e-1, marks=pytest.mark.slow), ("adapter_v2", 1e-2)]
)
def test_so_it_does_with_adapters(tmp_path: Path, method: str, rate: float) -> None:
    shared: dict[str, object] = {"method": method, "learning_rate": rate, "lora_r": None}
    shared |= {"max_steps": 6, "eval_steps": 3, "max_length": 64, "max_rows": 100, "compute_dtype": "fp32"}
    runs = {kernels: fine_tune(tmp_path / kernels, kernels=kernels, **shared) for kernels in ("off", "auto")}
    off, auto = (metrics(runs[kernels]) for kernels in ("off", "auto"))
    assert off[5]["eval_loss"] < 0.95 * off[2]["eval_loss"]
    for one, other in zip(off, auto, strict=True):
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-4)
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-3)
        assert other.get("eval_loss", 0) == pytest.approx(one.get("eval_loss", 0), rel=1e-4)
    kernels = list(RunDirectory(runs["auto"]).read("kernels").values())
    assert len(kernels) == 5
    assert all(what.startswith("fast") for what in kernels)
    assert [("prefix: PyTorch" in what) for what in kernels] == [False, False, True, True, True]


@pytest.mark.slow
def test_fp8_trains_what_bfloat16_trains(tmp_path: Path, in_bfloat16: Path) -> None:
    with fp8.emulated():
        run = fine_tune(tmp_path / "fp8", compute_dtype="fp8", **BF16)
        with pytest.raises(UserError, match=r"fp8 does not go with LoRA dropout"):
            fine_tune(tmp_path / "refused", compute_dtype="fp8", lora_dropout=0.1)
    expected, loss = (metrics(each)[-1]["eval_loss"] for each in (in_bfloat16, run))
    assert loss == pytest.approx(expected, rel=0.03)  # after five steps, when it still falls fast
    assert loss != expected
    kernels = RunDirectory(run).read("kernels")
    assert all("weights: NF4 dequantized to FP8" in what for what in kernels.values())
    with pytest.raises(UserError, match="--compute_dtype fp8: there is no FP8 on the CPU"):
        fine_tune(tmp_path / "refused", compute_dtype="fp8")


def measured_again(run: Path, *words: str) -> tuple[float, str]:
    """What `eval` says of a run's adapter: the answers' loss, and on which kernels."""
    results = run / "figures.json"
    assert cli.main(["eval", "--adapter", str(run), "--results", str(results), *words]) == 0
    figures = json.loads(results.read_text())
    return figures["answer_loss"], figures["kernels"]


@pytest.mark.parametrize(
    ("settings", "kernels", "rel"),
    [
        # The batches are others than in the run: sums of float32 are taken in another order.
        ({}, "weights: int8 dequantized", 1e-5),
        # LLM.int8() would choose outlier columns over a whole batch.
        pytest.param(
            {"kernels": "off", "llm_int8_threshold": 0.0}, "the reference path", 1e-4, marks=pytest.mark.slow
        ),
        pytest.param({"lora_dropout": 0.1}, "int8 dequantized", 1e-5, marks=pytest.mark.slow),
        pytest.param(
            {"compute_dtype": "fp8", "quantize_mode": "4bit"},
            "NF4 dequantized to FP8",
            2e-4,
            marks=pytest.mark.slow,
        ),
        pytest.param(
            {"method": "full", "quantize_mode": "16bit", "lora_r": None, "learning_rate": 2e-4},
            "the reference path",
            1e-5,
            marks=pytest.mark.slow,
        ),
    ],
    ids=["8bit", "off", "dropout", "fp8", "full"],
)
def test_eval_and_merge_measure_what_the_run_measured(
    tmp_path: Path, settings: dict[str, object], kernels: str, rel: float, capsys: pytest.CaptureFixture[str]
) -> None:
    in_fp8 = settings.get("compute_dtype") == "fp8"
    with fp8.emulated() if in_fp8 else nullcontext():
        shared = {"quantize_mode": "8bit"} | (BF16 if in_fp8 else {"max_steps": 6, "eval_steps": 6})
        run = fine_tune(tmp_path / "run", **shared | settings)
        noted = metrics(run)[-1]["eval_loss"]
        loss, ran = measured_again(run)
        assert loss == pytest.approx(noted, rel=rel)
        assert kernels in ran
        if not settings:
            # What the other path makes of the same adapter lies further away.
            other, ran = measured_again(run, "--kernels", "off")
            assert (abs(other - noted) > 1e-4 * noted, ran) == (True, "the reference path")
        if "method" in settings:
            return
        words = ["--adapter", str(run), "--out", str(tmp_path / "merged"), "--base", "dequantized"]
        assert cli.main(["merge", *words]) == 0
        certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
        assert certificate["adapter_loss"] == pytest.approx(noted, rel=rel)
    if in_fp8:
        capsys.readouterr()
        assert cli.main(["eval", "--adapter", str(run)]) == 2
        assert "there is no FP8 on the CPU" in capsys.readouterr().err
        # Asked for otherwise, it is measured otherwise.
        assert "NF4 dequantized," in measured_again(run, "--compute_dtype", "bf16")[1]
        capsys.readouterr()
        words = ["--adapter", str(run), "--prompt", "Name a bird.", "--max_new_tokens", "1"]
        assert cli.main(["generate", *words, "--compute_dtype", "fp8"]) == 0
        told = capsys.readouterr()
        assert "in bfloat16" in told.err
        assert "bfloat16" not in told.out


def test_what_cannot_run_fast_says_why_and_is_refused_where_it_must(tmp_path: Path) -> None:
    run = fine_tune(tmp_path / "run", use_dora=True, max_steps=1)
    kernels = RunDirectory(run).read("kernels")
    assert set(kernels.values()) == {"reference path: Dora instead of plain LoRA"}
    with pytest.raises(
        UserError, match=r"--kernels required: .*Dora instead of plain LoRA \(5 of 5 blocks\)"
    ):
        fine_tune(tmp_path / "refused", use_dora=True, kernels="required")
