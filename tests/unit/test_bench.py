"""The benchmark's own arithmetic, and that its variants leave a base as they found it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from falcon_qlora.__main__ import main
from falcon_qlora.bench import devices, measure, runners
from falcon_qlora.bench.documents import made_up, same_rows
from falcon_qlora.bench.machine import Machine
from falcon_qlora.bench.measure import Result
from falcon_qlora.bench.runners import Settings, build
from falcon_qlora.bench.tables import ratio_interval, rows_of_steps, speed_over_memory, steps_in_markdown
from falcon_qlora.bench.variants import VARIANTS
from falcon_qlora.common.quantities import GIB
from falcon_qlora.models import locate
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.load import load_model
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.models.tiny import tiny_path
from falcon_qlora.terminal.charts import draw_speed_and_memory
from tests.layouts import LAYOUTS, VOCABULARY

SETTINGS = Settings(r=4, alpha=8, max_length=24)
MACHINE = Machine(commit="", gpu="CPU", gpus=0, driver="", torch="")


@pytest.fixture(scope="module")
def base():
    return load_model(LAYOUTS["falcon-7b"], quantize_mode="4bit", device="cpu", compute_dtype="bf16", seed=1)


@pytest.mark.parametrize("name", ["reference-full", "ours"])
def test_a_variant_leaves_the_base_as_it_was(name: str, base) -> None:
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


@pytest.mark.parametrize(
    ("name", "lengths"),
    [("packed", (20, 9, 17)), ("padded-512", (24, 24, 24)), ("padded-longest", (20, 20, 20))],
)
def test_a_data_variant_packs_or_pads(name: str, lengths: tuple[int, ...], base) -> None:
    whole = made_up(3, 24, VOCABULARY, seed=0)
    documents = [(ids[:count], mask[:count]) for (ids, mask), count in zip(whole, (20, 9, 17), strict=True)]
    with build(VARIANTS[name], base, SETTINGS, {}) as runner:
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
    return Result(
        model="random:falcon-7b",
        parameters=7_000_000_000,
        micro_batch_tokens=tokens,
        variant=VARIANTS[name],
        batches=[],
        seconds=[tokens / speed for speed in speeds],
        tokens=[tokens] * len(speeds),
        steps=[1] * len(speeds),
        peak_allocated_gb=10.0,
        failure=failure,
    )


def test_the_interval_is_students_of_the_paired_ratios() -> None:
    first, second = result("reference", [100, 110, 90]), result("ours", [200, 242, 162])
    logs = np.log([2.0, 2.2, 1.8])
    half = 4.302653 * logs.std(ddof=1) / math.sqrt(3)  # the table's value for 95 % and two degrees of freedom
    expected = np.exp([logs.mean() - half, logs.mean() + half])
    assert ratio_interval(first, second) == pytest.approx(tuple(expected), rel=1e-5)
    assert ratio_interval(first, first) is None
    assert ratio_interval(first, result("ours", [100])) is None


def test_a_step_as_fast_as_plain_products_has_the_whole_ceiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """The share of the ceiling that a step reaches, on a machine whose clock is PyTorch's own count."""
    with FlopCounterMode(display=False) as counter:
        clock = SimpleNamespace(perf_counter=lambda: counter.get_total_flops() / 700e12)
        monkeypatch.setattr(devices, "time", clock)
        ceiling = devices.product_ceiling(torch.device("cpu"), 64, 32)
    assert ceiling == pytest.approx(700)

    # Falcon-7B's products, by its published shapes: 71 heads and one for keys and values of 64, 4x MLP, head.
    hidden = 71 * 64
    weights = 32 * hidden * ((71 + 2) * 64 + hidden + 4 * hidden + 4 * hidden) + 65024 * hidden
    step = result("ours", [1.0])
    step.parameters = layout_of(open_checkpoint("random:falcon-7b").config).parameter_count()
    # Forward, and backward to the inputs: a multiplication and an addition a weight and token each.
    step.seconds = [2 * 2 * weights * step.tokens[0] / 700e12]
    (row,) = rows_of_steps([step], MACHINE, {("random:falcon-7b", "bf16"): ceiling})
    assert row["ceiling_share"] == pytest.approx(1, abs=1e-3)
    assert row["tflops_4n"] == 700


def test_a_picture_has_a_point_for_each_row_with_figures(tmp_path: Path) -> None:
    results = [
        result("reference", [100, 100]),
        result("ours", [199, 201]),
        result("ours", [219, 221], tokens=16384),
        result("ours-fp8", [], failure="fp8 needs a GPU"),
        result("ours-8bit-fp8", [300]),
    ]
    made = rows_of_steps(results, MACHINE, {})
    made.append({**made[0], "variant": "stock"})
    # The records have GB, people get GiB.
    assert {row["peak_allocated_gb"] for row in made} == {10.0, ""}
    gib = 10e9 / GIB
    assert speed_over_memory(made) == {
        "reference": ("reference", [(gib, 100)]),
        "ours": ("bf16", [(gib, 200), (gib, 220)]),
        "ours-8bit-fp8": ("FP8", [(gib, 300)]),
        "stock": ("other tools", [(gib, 100)]),
    }
    header, _, first = steps_in_markdown(made).splitlines()[2:5]
    cells = dict(zip(header.split(" | "), first.split(" | "), strict=True))
    assert cells["peak GiB allocated"] == "9.31"
    assert made[1]["tflops_4n"] == pytest.approx(4 * 7e9 * 200 / 1e12)
    draw_speed_and_memory(speed_over_memory(made), tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--variants", "ours,ours-fp9"], "did you mean ours-fp8?"),
        (["--variants", ""], "--variants: the value is empty"),
        (["--tokens", "²"], "'²' is not a whole number"),
        (["--variants", "packed"], "give --dataset_name"),
        (["--tokens", "8192,many"], "'many' is not a whole number"),
        (["--tokens", "100"], "whole documents of 512 tokens"),
        (["--rounds", "0"], "--rounds: 0 is too small; at least 1"),
    ],
)
def test_a_wrong_flag_is_told(flags: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", *flags]) == 2
    assert told in capsys.readouterr().err


SHORT = ("--tokens", "48", "--max_length", "24", "--lora_r", "4", "--steps", "1", "--rounds", "1")


@pytest.mark.parametrize("how", [("--variants", "ours", *SHORT), ("--gpus", "1", "--variants", "ours")])
@pytest.mark.parametrize("flag", ["--csv", "--plot"])
def test_a_file_that_cannot_be_written_is_told_before_anything_else(
    flag: str, how: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.write_text("no folder")
    for path, why in (
        (tmp_path, "this is a folder; name a file"),
        (Path("/proc/x/records"), "cannot write there (No such file or directory); name another file"),
        (file / "records", "cannot write there (Not a directory); name another file"),
    ):
        assert main(["bench", "--models", "tiny", *how, flag, str(path)]) == 2
        assert capsys.readouterr().err == f"error: {flag} {path}: {why}\n"
    assert [*tmp_path.iterdir()] == [file]


def test_all_models_are_looked_up_before_the_first_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--models", "tiny,nobody/nothing", "--variants", "ours", *SHORT]) == 2
    told = capsys.readouterr()
    assert "nobody/nothing" in told.err
    assert "tiny" not in told.err + told.out


def test_variants_of_another_storage_than_the_models_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_path() / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert main(["bench", "--models", str(tmp_path), "--variants", "ours,ours-8bit,reference", *SHORT]) == 2
    told = (
        f"--variants ours,reference: {tmp_path} is stored in 8bit; measure variants of that, such as ours-8"
    )
    assert told in capsys.readouterr().err


def test_the_revision_that_is_named_is_measured(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened = []

    def of_hub(real: Callable[..., Any]) -> Callable[..., Any]:
        def found(name: str, *, revision: str | None = None, **named: Any) -> Any:
            opened.append((real.__name__, name, revision))
            return real("tiny", **named)

        return found

    for module, name in ((locate, "open_checkpoint"), (measure, "open_checkpoint"), (measure, "load_model")):
        monkeypatch.setattr(module, name, of_hub(getattr(module, name)))
    flags = ("-m", "somebody/falcon", "--model_revision", "first", "--variants", "reference", *SHORT)
    assert main(["bench", *flags]) == 0, capsys.readouterr().err
    assert {revision for *_, revision in opened} == {"first"}
    assert {name for name, *_ in opened} == {"open_checkpoint", "load_model"}


@pytest.mark.slow
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
    assert told.endswith("- 1 row failed; see the table\n")

    status, table, told = bench("ours-selective")
    assert status == 1
    assert told.endswith("- nothing was measured; the table says why\n")
