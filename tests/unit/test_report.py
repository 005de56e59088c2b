"""The comparison's table, CSV file and pictures, from run directories whose figures are known."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from falcon_qlora.common.errors import UserError
from falcon_qlora.compare import report
from falcon_qlora.compare.figures import Compared
from falcon_qlora.compare.finished import runs_in
from falcon_qlora.compare.report import Comparison
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.summary import Summary
from falcon_qlora.terminal import drawing

OLD = Path(__file__).parents[1] / "integration" / "old_run" / "runs" / "old"
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
                wall_seconds=2 * seconds,
                wall_tokens_per_second=50 * len(speeds) / seconds,
            )
        ),
    )
    directory.adapter.mkdir()
    (directory.adapter / "adapter_model.safetensors").write_bytes(bytes(2_500_000))
    (directory.adapter / "tokenizer.json").write_bytes(bytes(1000))
    return folder


def ran(name: str, folder: Path) -> Compared:
    return Compared(name=name, folder=folder, command=f"train {name}")


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    # After the first interval 400 tokens/s, so 16 samples/s: 62.5 s for 1,000; full 100 tokens/s: 250 s.
    adapter = make_run(
        tmp_path / "adapter", speeds=[20, 400, 400], gpus=1, evaluations={0: 3.0, 2: 1.5, 3: 1.75}
    )
    full = make_run(tmp_path / "full", speeds=[10, 100, 100], gpus=2, evaluations={0: 3.0, 3: 1.25})
    lora = Compared(name="lora", folder=tmp_path / "lora", reason="out of\nmemory | here")
    return Comparison(
        title="three", compared=[ran("adapter", adapter), lora, ran("full", full)], published=True
    )


def table(markdown: str) -> dict[str, dict[str, str]]:
    """The first table: name → title → text."""
    lines = markdown[markdown.index("\n|") :].split("\n\n")[0].split("\n")
    (_, *names), _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line)
    return {name: {row[0]: row[1 + index] for row in rows} for index, name in enumerate(names)}


def test_the_table_says_what_the_runs_did(comparison: Comparison) -> None:
    found = table(comparison.markdown())
    assert list(found) == ["adapter", "full"]
    assert found["adapter"] == {
        "base": "16bit",
        "trainable parameters": "1,365,330",
        "GPUs": "1",
        "steps": "3",
        "samples": "12",
        "time of the steps": "5.5 s",
        "of the whole command": "11.0 s",
        "tokens/s in the steps": "55",
        "over the whole command": "27",
        "s per 1,000 samples": "62.5",
        "ratio to full": "0.25",
        "peak GiB a GPU": "9.31",
        "peak GiB in total": "9.31",
        "last training loss": "1.0000",
        "evaluation loss before": "3.0000",
        "evaluation loss after": "1.5000",
        "on disk": "2.4 MiB",
    }
    assert [found["full"][title] for title in ("GPUs", "ratio to full", "peak GiB in total")] == [
        "2",
        "1.00",
        "18.63",
    ]
    for line in (r"lora was not run: out of memory \| here", "- full: `train full`"):
        assert line in comparison.markdown().split("\n")


def test_of_several_seeds_there_are_the_mean_and_what_it_lies_between(tmp_path: Path) -> None:
    losses, runs = (1.5, 1.25, 1.6), []
    for number, loss in enumerate(losses):
        speeds = [20, 400 + 100 * number, 400 + 100 * number]
        folder = tmp_path / f"lora-{number}"
        runs.append(ran("lora", make_run(folder, speeds=speeds, gpus=1, evaluations={0: 3.0, 3: loss})))
    made = Comparison(title="one", compared=runs)
    found = table(made.markdown())["lora"]
    assert found["evaluation loss after"] == "1.4500 (1.2500 to 1.6000)"
    assert found["evaluation loss before"] == "3.0000"
    assert found["s per 1,000 samples"] == "51.39 (41.67 to 62.5)"
    (after,), (before,) = made.loss_bars().values()
    assert after == ("lora", pytest.approx(1.45), "1.450", 1.25, 1.6)
    assert before == ("lora", 3.0, "3.000", 3.0, 3.0)
    (bar,) = made.time_bars()["this comparison"]
    assert (bar.low, bar.high) == pytest.approx((1000 / 24, 62.5))
    assert [float(row["eval_loss_after"]) for row in csv.DictReader(io.StringIO(made.csv()))] == list(losses)
    for number in range(3):
        assert f"- lora-{number}: `train lora`" in made.markdown()


def test_the_published_bars(comparison: Comparison) -> None:
    # 1:09 h for 52,000 and 8:52 h for 300,000; 6 GPUs of 39.45 GB, of 10^9 bytes.
    of_time, of_memory = (
        bars()["June 2023, A100"] for bars in (comparison.time_bars, comparison.memory_bars)
    )
    assert {bar.label: bar.height for bar in of_time} == pytest.approx(
        {"adapter": 79.615, "lora": 79.615, "full": 106.4}, rel=1e-4
    )
    assert {bar.label: (bar.height, bar.text) for bar in of_memory} == {
        "adapter": (pytest.approx(16.20e9 / GIB), "15.09"),
        "lora": (pytest.approx(16.27e9 / GIB), "15.15"),
        "full": (pytest.approx(236.7e9 / GIB), "6 × 36.74"),
    }


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
    """What is drawn, by the name of its file, which is not written."""
    drawn: dict[str, Figure] = {}
    monkeypatch.setattr(drawing, "_write", lambda figure, file: drawn.setdefault(file.name, figure))
    monkeypatch.setattr(report, "replaced", contextlib.nullcontext)
    return drawn


def test_the_pictures_show_what_the_table_says(
    comparison: Comparison, tmp_path: Path, figures: dict[str, Figure]
) -> None:
    comparison.write(tmp_path)
    ours, theirs = comparison.markdown().split("As published in June 2023")
    measured = {"this comparison": table(ours), "June 2023, A100": table(theirs)}
    titles = {
        ("training-time.png", series): ("s per 1,000 samples", series_table)
        for series, series_table in measured.items()
    }
    titles |= {
        ("memory-requirements.png", series): ("peak GiB in total", series_table)
        for series, series_table in measured.items()
    }
    titles["evaluation-loss.png", "after training"] = "evaluation loss after", table(ours)
    titles["evaluation-loss.png", "before"] = "evaluation loss before", table(ours)
    seen = set()
    for picture in ("training-time.png", "memory-requirements.png", "evaluation-loss.png"):
        (axes,) = figures[picture].axes
        labels = [tick.get_text() for tick in axes.get_yticklabels()]
        for bars in axes.containers:
            title, rows = titles[picture, str(bars.get_label())]
            names = [labels[round(bar.get_y() + bar.get_height() / 2)] for bar in bars]
            assert names == [name for name in rows if rows[name].get(title)]
            for name, bar in zip(names, bars, strict=True):
                assert bar.get_width() == pytest.approx(float(rows[name][title]), rel=1e-3)
            seen.add((picture, bars.get_label()))
    assert seen == titles.keys()
    losses, held_out = figures["loss-curves.png"].axes
    assert [list(line.get_ydata()) for line in losses.lines] == [[1.0] * 3] * 2
    assert [list(line.get_ydata()) for line in held_out.lines] == [[3.0, 1.5, 1.75], [3.0, 1.25]]
    for axes in (losses, held_out):
        assert sorted(text.get_text() for text in axes.texts) == ["adapter", "full"]


def test_the_files_hold_the_same(comparison: Comparison, tmp_path: Path) -> None:
    written = comparison.write(tmp_path / "out")
    assert [path.name for path in written] == [
        "comparison.md",
        "comparison.csv",
        "training-time.png",
        "memory-requirements.png",
        "evaluation-loss.png",
        "loss-curves.png",
    ]
    rows = list(csv.DictReader(io.StringIO((tmp_path / "out" / "comparison.csv").read_text())))
    assert float(rows[0]["seconds"]) == pytest.approx(5.5)
    assert rows[0]["disk_bytes"] == "2500000"
    assert rows[1]["reason"] == "out of\nmemory | here"
    assert float(rows[2]["total_peak_memory_gib"]) == pytest.approx(20e9 / GIB)
    for path in written[2:]:
        assert path.read_bytes().startswith(b"\x89PNG")


def test_other_models_have_no_published_figures(comparison: Comparison) -> None:
    other = Comparison(title="two", compared=comparison.compared[:1])
    assert list(other.time_bars()) == list(other.memory_bars()) == ["this comparison"]
    assert "June 2023" not in other.markdown()
    environment = other.compared[0].folder / "environment.json"
    environment.write_text(json.dumps({"gpus": []}))
    again = Comparison(title="two", compared=other.compared)
    assert "peak GiB a process" in again.markdown()


def test_runs_are_compared_that_have_no_summary_and_that_are_of_before(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter" / "summary.json").unlink()
    shutil.copytree(OLD, tmp_path / "runs" / "full")
    runs = runs_in([Path("adapter"), Path("full"), Path("runs/full")])
    assert [run.name for run in runs] == ["adapter", f"{tmp_path.name}/full", "runs/full"]
    made = Comparison(title="three", compared=runs)
    stopped, _, before = table(made.markdown()).values()
    assert stopped["steps"] == "3, not finished"
    assert [stopped[title] for title in ("time of the steps", "tokens/s in the steps")] == ["5.5 s", "55"]
    assert [stopped[title] for title in ("evaluation loss after", "s per 1,000 samples")] == ["1.7500", ""]
    assert [before[title] for title in ("steps", "over the whole command")] == ["4", ""]
    assert before["last training loss"] == "2.4634"
    settings = made.markdown().split("## Settings that differ")[1]
    assert "| optim | sgd | sgd | adamw_torch_fused |" in settings
    assert "lora_r" not in settings  # which only one of them has


def test_the_size_of_a_step_differs_where_it_does_however_it_was_written_down(tmp_path: Path) -> None:
    made = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "global_batch_size": None}
    went_on = made | {"gradient_accumulation_steps": 6, "global_batch_size": 6}
    runs = {}
    for name, gpus, batch in (("one", 1, made), ("resumed", 1, went_on), ("on_two", 2, made)):
        folder = make_run(tmp_path / name, speeds=[1], gpus=gpus, evaluations={1: 1.0})
        directory = RunDirectory(folder)
        directory.write_config({"seed": 1, **directory.read_config(), **batch})
        runs[name] = ran(name, folder)
    alike = Comparison(title="alike", compared=[runs["one"], runs["resumed"]])
    assert "Settings that differ" not in alike.markdown()
    unlike = Comparison(title="unlike", compared=list(runs.values())).markdown()
    assert "| global_batch_size | 6 | 6 | 12 |" in unlike
    assert "gradient_accumulation_steps" not in unlike


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["typo"], "typo holds no run .*; runs nearby: (adapter, full|full, adapter)$"),
        (["full", "adapter/checkpoints"], "adapter/checkpoints holds no run .*; runs nearby: adapter"),
        (["adapter/checkpoints/step-2"], "step-2 holds no run .*; runs nearby: adapter$"),
        (["not_mine/typo"], "not_mine/typo holds no run .*; there are none nearby$"),
        (["adapter", "full", "./adapter"], "adapter is given twice"),
    ],
)
def test_a_folder_that_is_no_run_is_refused_with_those_that_are(
    comparison: Comparison, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folders: list[str], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        runs_in([Path(folder) for folder in folders])
