"""The benchmark's own arithmetic, and that the peers in it are the peers: the same work, their own code."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from falcon_qlora.__main__ import main
from falcon_qlora.bench import litgpt, runners
from falcon_qlora.bench.measure import Entry, Result
from falcon_qlora.bench.rows import made_up, same_rows
from falcon_qlora.bench.runners import build
from falcon_qlora.bench.settings import Settings, adapted
from falcon_qlora.bench.table import Machine, points, ratio_interval, rows
from falcon_qlora.bench.variants import VARIANTS, Impossible
from falcon_qlora.models.falcon import expected_linears
from falcon_qlora.models.load import load_model
from falcon_qlora.models.quantize import bnb
from falcon_qlora.terminal.charts import draw_speed_and_memory
from tests.layouts import LAYOUTS, VOCABULARY, plain_float32
from tests.packing import one_by_one

SETTINGS = Settings(r=4, alpha=8, max_length=24)
LAYERS = {"4bit": bnb.nn.Linear4bit, "8bit": bnb.nn.Linear8bitLt}


def base_model(mode="4bit", layout="falcon-7b"):
    return load_model(LAYOUTS[layout], quantize_mode=mode, device="cpu", compute_dtype="bf16", seed=1)


def gradients(model):
    return torch.cat([p.grad.flatten().float() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize(("mode", "name"), [("4bit", "stock-fast"), ("8bit", "stock-8bit-fast")])
def test_the_stock_variant_is_huggingfaces_forward_on_quantized_layers(mode: str, name: str) -> None:
    base = base_model(mode)
    with build(VARIANTS[name], base, SETTINGS, {}) as runner:
        for linear in expected_linears(base.config):
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
        linear = base.get_submodule(expected_linears(base.config)[0])
        assert linear.lora_dropout["default"].p == 0.1
        assert runner.trainer.args.max_grad_norm == 0.3


@pytest.mark.parametrize("layout", ["falcon-7b", "falcon-40b"])
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
            loss = runner.loss(runner.prepare(documents))
            loss.backward()
            found = gradients(runner.model)
        assert loss.item() == pytest.approx(exact.item(), rel=2e-3), name
        # bfloat16 has 8 bits; a token more or less, or a wrong scale, would show as several per cent.
        assert float((found - exact_gradients).norm() / exact_gradients.norm()) < 0.03, name


@pytest.mark.parametrize("name", ["stock", "reference-full", "ours"])
def test_a_variant_leaves_the_base_as_it_was(name: str) -> None:
    base = base_model()
    ids = torch.as_tensor(made_up(2, 24, VOCABULARY, seed=0)[0][0])[None]
    before = [(n, type(module)) for n, module in base.named_modules()]
    logits = base(ids).logits
    with build(VARIANTS[name], base, SETTINGS, {}) as runner:
        inputs = runner.prepare(made_up(3, 24, VOCABULARY, seed=0))
        first, *_, last = [runner.step(inputs) for _ in range(4)]
        assert float(last) < float(first)  # it does train
    assert [(n, type(module)) for n, module in base.named_modules()] == before
    assert [n for n, module in base.named_modules() if "forward" in vars(module)] == []
    assert [n for n, p in base.named_parameters() if p.requires_grad] == []
    assert not base.is_gradient_checkpointing
    assert torch.equal(base(ids).logits, logits)


def test_what_cannot_run_says_why() -> None:
    base = base_model()
    with (
        pytest.raises(Impossible, match=r"no FP8 on the CPU"),
        build(VARIANTS["ours-fp8"], base, SETTINGS, {}),
    ):
        pass


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


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("packed", (20, 9, 17)), ("padded-512", (24, 24, 24)), ("padded-longest", (20, 20, 20))],
)
def test_a_data_variant_packs_or_pads(name: str, lengths: tuple[int, ...]) -> None:
    whole = made_up(3, 24, VOCABULARY, seed=0)
    documents = [(ids[:count], mask[:count]) for (ids, mask), count in zip(whole, (20, 9, 17), strict=True)]
    with build(VARIANTS[name], base_model(), SETTINGS, {}) as runner:
        inputs = runner.prepare(documents)
        assert inputs.lengths == lengths
        assert inputs.input_ids.shape == (1, sum(lengths))
        assert (inputs.tokens, len(inputs.targets)) == (46, 43)  # what there is to learn stays the same


def test_the_same_rows_are_packed_and_padded() -> None:
    class Corpus:
        lengths = np.array([3, 9, 5, 7, 2, 8, 4, 6])
        fingerprint = "0f"

        class dataset:
            @staticmethod
            def with_format(*_args, **_kwargs):
                return Corpus.Rows

        class Rows:
            def __class_getitem__(cls, indexes):
                ids = [np.full(Corpus.lengths[i], i) for i in indexes]
                return {"input_ids": ids, "mask": [np.ones(len(row)) for row in ids]}

    packed, padded = same_rows(Corpus, tokens=20, max_length=10, batches=2, seed=1)
    order = [int(ids[0]) for batch in packed for ids, _ in batch]
    assert order == [int(ids[0]) for batch in padded for ids, _ in batch]
    assert all(sum(len(ids) for ids, _ in batch) <= 20 for batch in packed)
    assert [len(batch) for batch in padded[:-1]] == [2] * (len(padded) - 1)


def result(name: str, speeds: list[float], tokens: int = 8192, failure: str | None = None) -> Result:
    entry = Entry(variant=VARIANTS[name], tokens=tokens, batches=[])
    return Result(
        model="random:falcon-7b",
        parameters=7_000_000_000,
        micro_batch_tokens=tokens,
        entry=entry,
        seconds=[tokens / speed for speed in speeds],
        tokens=[tokens] * len(speeds),
        steps=[1] * len(speeds),
        peak_allocated_gb=10.0,
        failure=failure,
    )


def test_the_interval_is_students_of_the_paired_ratios() -> None:
    first, second = result("stock", [100, 110, 90]), result("ours", [200, 242, 162])
    logs = np.log([2.0, 2.2, 1.8])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # the table's value for 95 % and two degrees of freedom
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    assert ratio_interval(first, second) == pytest.approx(tuple(expected), rel=1e-5)
    assert ratio_interval(first, first) is None
    assert ratio_interval(first, result("ours", [100])) is None


def test_a_picture_has_a_point_for_each_row_with_figures(tmp_path: Path) -> None:
    results = [
        result("stock", [100, 100]),
        result("ours", [199, 201]),
        result("ours", [219, 221], tokens=16384),
        result("ours-fp8", [], failure="fp8 needs a GPU"),
    ]
    machine = Machine(commit="", gpu="CPU", driver="", torch="", ceilings={("random:falcon-7b", "bf16"): 1.0})
    made = rows(results, machine)
    assert points(made) == [("stock", 10.0, 100), ("ours", 10.0, 200), ("ours", 10.0, 220)]
    assert made[1]["tflops_4n"] == pytest.approx(4 * 7e9 * 200 / 1e12)
    assert draw_speed_and_memory(points(made), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--variants", "ours,ours-fp9"], "did you mean ours-fp8?"),
        (["--variants", ""], "--variants: names none"),
        (["--tokens", "²"], "'²' is not a whole number"),
        (["--against", "litgpt", "--dataset_name", "rows.jsonl"], "leave --dataset_name out"),
        (["--variants", "packed"], "give --dataset_name"),
        (["--variants", "stock", "--dataset_name", "rows.jsonl"], "leave --dataset_name out"),
        (["--tokens", "8192,many"], "'many' is not a whole number"),
        (["--tokens", "100"], "whole documents of 512 tokens"),
        (["--rounds", "0"], "--rounds 0: must be at least 1"),
    ],
)
def test_a_wrong_flag_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert told in capsys.readouterr().err


def test_litgpt_asked_for_and_not_there(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("falcon_qlora.bench.settings.is_installed", lambda package: False)
    assert main(["bench", "--against", "litgpt"]) == 2
    assert "LitGPT is not installed" in capsys.readouterr().err


SHORT = ("--tokens", "48", "--max_length", "24", "--lora_r", "4", "--steps", "1", "--rounds", "1")


@pytest.mark.parametrize("how", [("--variants", "ours"), ("--gpus", "1", "--variants", "ours")])
@pytest.mark.parametrize("flag", ["--csv", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_anything_else(
    flag: str, how: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for path, why in (
        (tmp_path, "this is a folder; name a file"),
        (Path("/proc/x/records"), "cannot write there (No such file or directory)"),
        (file / "records", "cannot write there (Not a directory)"),
    ):
        assert main(["bench", "--models", "tiny", *how, *SHORT, flag, str(path)]) == 2
        assert capsys.readouterr().err == f"error: {flag} {path}: {why}\n"
    assert [*tmp_path.iterdir()] == [file]


def test_what_a_model_cannot_do_is_not_broken_and_what_breaks_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def bench(*names: str) -> tuple[int, str, str]:
        flags = ("--models", LAYOUTS["falcon-rw-1b"], "--variants", *names, *SHORT)
        return main(["bench", *flags]), *capsys.readouterr()

    status, table, told = bench("reference", "ours-selective")
    assert status == 0
    assert "broke" not in told
    assert "| ours-selective | 4bit | 48 | not run: block 0 runs on the reference path, which has no" in table

    def breaks(*_anything: object) -> None:
        raise ValueError("a bug")

    monkeypatch.setattr(runners.OwnRunner, "step", breaks)
    status, table, told = bench("reference")
    assert status == 1
    assert "| reference | 4bit | 48 | not run: failed: ValueError: a bug |" in table
    assert told.endswith("- 1 row broke; the table says how\n")
