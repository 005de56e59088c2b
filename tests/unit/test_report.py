"""The comparison's table, CSV file and bars, from run directories whose figures are known."""

from __future__ import annotations

import contextlib
import csv
import io
import json
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from falcon_qlora.compare import report
from falcon_qlora.compare.report import Compared, Comparison
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.summary import Summary
from falcon_qlora.terminal import charts

GIB = 2**30


def make_run(folder: Path, *, speeds: list[float], gpus: int, evaluations: dict[int, float]) -> Path:
    """A finished run of 100 tokens and 4 samples a step, a log line a step."""
    directory = RunDirectory(folder)
    for step in range(len(speeds) + 1):
        if step:
            directory.append_metrics(
                step, {"loss": 1.0, "tokens": 100 * step, "tokens_per_second": speeds[step - 1]}
            )
        if step in evaluations:
            directory.append_metrics(step, {"eval_loss": evaluations[step]})
    directory.write_config(
        {
            "quantize_mode": "16bit",
            "load_best_model_at_end": True,
            "learning_rate": 1e-3,
            "lr_scheduler_type": "constant",
            "optim": "sgd",
            "compute_dtype": "bf16",
        }
    )
    directory.write("environment", {"gpus": [{"name": "a GPU"}] * gpus})
    seconds = sum(100 / speed for speed in speeds)
    directory.write(
        "summary",
        vars(
            Summary(
                steps=len(speeds),
                first_loss=1.0,
                final_loss=1.0,
                train_seconds=seconds,
                tokens_per_second=100 * len(speeds) / seconds,
                samples_per_second_512=1.0,
                peak_memory_gib=10e9 / GIB,
                total_peak_memory_gib=gpus * 10e9 / GIB,
                trainable_parameters=1_365_330,
                total_parameters=6_923_086_034,
                quantized_linears=0,
                world_size=gpus,
                best_eval_loss=min(evaluations.values()),
                tokens=100 * len(speeds),
                samples=4 * len(speeds),
            )
        ),
    )
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").write_bytes(bytes(2_500_000))
    (directory.adapter / "tokenizer.json").write_bytes(bytes(1000))
    return folder


def ran(method: str, folder: Path) -> Compared:
    return Compared(method=method, folder=folder, recipe=f"lit-{method}", command=f"train {method}")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    # After the first interval 400 tokens/s, so 16 samples/s: 62.5 s for 1,000; full 100 tokens/s: 250 s.
    adapter = make_run(
        tmp_path / "adapter", speeds=[20, 400, 400], gpus=1, evaluations={0: 3.0, 2: 1.5, 3: 1.75}
    )
    full = make_run(tmp_path / "full", speeds=[10, 100, 100], gpus=2, evaluations={0: 3.0, 3: 1.25})
    lora = Compared(
        method="lora",
        folder=tmp_path / "lora",
        recipe="lit-lora",
        command="train lora",
        reason="out of\nmemory | here",
    )
    return Comparison(
        title="three", compared=[ran("adapter", adapter), lora, ran("full", full)], published=True
    )


def cells(markdown: str) -> dict[str, list[str]]:
    rows = [line.strip("| ").split(" | ") for line in markdown.splitlines() if line.startswith("| ")]
    return {row[0]: [cell.strip() for cell in row] for row in reversed(rows)}


def test_the_table_says_what_the_runs_did(comparison: Comparison) -> None:
    assert cells(comparison.markdown())["adapter"] == (
        "adapter|16bit|1,365,330|1|12|5.5 s|62.5|0.25|10.00|10.00|3.0000|1.5000|2.50".split("|")
    )
    full = cells(comparison.markdown())["full"]
    assert full[3:10] == ["2", "12", "12.0 s", "250", "1.00", "10.00", "20.00"]
    assert "out of memory / here" in cells(comparison.markdown())["lora"][1]
    for line in ("- adapter: recipe lit-adapter; learning rate 0.001", "`train full`"):
        assert line in comparison.markdown()


def test_the_published_bars(comparison: Comparison) -> None:
    # 1:09 h for 52,000 and 8:52 h for 300,000; 6 GPUs of 39.45 GB.
    of_time, of_memory = (
        bars()["June 2023, A100"] for bars in (comparison.time_bars, comparison.memory_bars)
    )
    assert {label: height for label, height, _ in of_time} == pytest.approx(
        {"adapter": 79.615, "lora": 79.615, "full": 106.4}, rel=1e-4
    )
    assert {label: (height, text) for label, height, text in of_memory} == {
        "adapter": (16.20, "16.20"),
        "lora": (16.27, "16.27"),
        "full": (pytest.approx(236.7), "6 × 39.45"),
    }


def test_the_pictures_bars_are_as_high_and_say_what_the_table_does(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: dict[str, Figure] = {}
    monkeypatch.setattr(charts, "_write", lambda figure, file: figures.setdefault(file.name, figure))
    monkeypatch.setattr(report, "replaced", contextlib.nullcontext)
    comparison.write(tmp_path)
    ours, theirs = comparison.markdown().split("As published in June 2023")
    # Of both tables: seconds for 1,000 samples, and GB of a GPU and of all.
    tables = {"this comparison": (cells(ours), 6, 8, 3), "June 2023, A100": (cells(theirs), 4, 5, 1)}
    for picture, of_time in (("training-time.png", True), ("memory-requirements.png", False)):
        (axes,) = figures[picture].axes
        labels = [tick.get_text() for tick in axes.get_xticklabels()]
        assert sorted(labels) == ["adapter", "full", "lora"]
        assert [text.get_text() for text in axes.get_legend().get_texts()] == list(tables)
        texts = iter(text.get_text() for text in axes.texts)
        for bars in axes.containers:
            table, seconds, memory, count = tables[str(bars.get_label())]
            methods = [labels[round(bar.get_x() + bar.get_width() / 2)] for bar in bars]
            assert sorted(methods) == sorted(m for m in table if m in labels and len(table[m]) > 2)
            for method, bar in zip(methods, bars, strict=True):
                row = table[method]
                gpus, each = int(row[count]), f"{float(row[memory]):.2f}"
                height, text = row[memory + 1], each if gpus == 1 else f"{gpus} × {each}"
                if of_time:
                    height, text = row[seconds], f"{float(row[seconds]):.3g} s"
                assert bar.get_height() == pytest.approx(float(height), rel=1e-3)
                assert next(texts) == text
        assert next(texts, None) is None


def test_the_files_hold_the_same(comparison: Comparison, tmp_path: Path) -> None:
    written = comparison.write(tmp_path / "out")
    assert [path.name for path in written] == [
        "comparison.md",
        "comparison.csv",
        "training-time.png",
        "memory-requirements.png",
    ]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert float(rows[0]["seconds"]) == pytest.approx(5.5)
    assert rows[0]["disk_bytes"] == "2500000"
    assert rows[1]["reason"] == "out of\nmemory | here"
    assert float(rows[2]["total_peak_memory_gb"]) == pytest.approx(20)
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_other_models_have_no_published_figures(comparison: Comparison) -> None:
    other = Comparison(title="two", compared=comparison.compared[:1])
    assert list(other.time_bars()) == list(other.memory_bars()) == ["this comparison"]
    assert "June 2023" not in other.markdown()
    environment = other.compared[0].folder / "environment.json"
    environment.write_text(json.dumps({"gpus": []}))
    assert "peak GB a process" in other.markdown()
