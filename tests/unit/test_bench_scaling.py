"""``falcon-qlora bench --gpus``: what each row runs, and the arithmetic of what it finds."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from falcon_qlora.__main__ import main
from falcon_qlora.bench import documents, scaling
from falcon_qlora.bench.scaling import Measured, Row, Work, read_run, reason
from falcon_qlora.bench.tables import COLUMNS
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import write_json
from falcon_qlora.config import parse
from falcon_qlora.models.tokenizer import load_tokenizer
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.charts import draw_scaling
from tests.benchmarks import recipe

HALF_A_MINUTE = 30.0


@pytest.fixture(autouse=True)
def the_guides_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """As tests/benchmarks/against.py enters it beside ours."""
    monkeypatch.setitem(scaling.COMMANDS, "recipe", recipe.COMMAND)


def row(name="ours", gpus=1, model="random:falcon-7b", mode="4bit", work=None, flags=()):
    return Row(name=name, model=model, quantize_mode=mode, gpus=gpus, work=work or Work(), flags=flags)


def kept(**more):
    summary = {
        "total_parameters": 7_000_000_100,
        "trainable_parameters": 100,
        "first_loss": 2.0,
        "final_loss": 1.0,
    }
    packages = {"torch": "2.0", "peft": "1.0"}
    return {"summary": summary, "environment": {"packages": packages}, "kernels": {}, "last": {}, **more}


def test_texts_have_as_many_tokens_as_asked(tmp_path: Path) -> None:
    tokenizer = load_tokenizer("tiny")
    lengths = documents.uneven_lengths(200, 256, seed=3)
    documents.write_texts(tmp_path / "rows.jsonl", tokenizer, lengths, seed=3)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    found = [len(tokenizer(row["text"])["input_ids"]) + 1 for row in rows]  # and the end token
    assert found == lengths.tolist()
    documents.write_texts(tmp_path / "again.jsonl", load_tokenizer("tiny"), lengths, seed=3)
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_uneven_lengths_are_guanacos() -> None:
    lengths = documents.uneven_lengths(5000, 2048, seed=1)
    assert lengths.mean() == pytest.approx(324, abs=1)
    assert lengths.max() == 2048
    # Of a log-normal distribution the logarithms are normal: as many below the mean as above.
    logs = np.log(lengths[lengths < 2048])
    assert np.median(logs) == pytest.approx(logs.mean(), abs=0.03)
    assert logs.std() == pytest.approx(0.8, abs=0.02)
    assert np.median(lengths) < 0.8 * lengths.mean()
    # No place in the order knows more than another.
    assert lengths[:2500].mean() == pytest.approx(lengths[2500:].mean(), rel=0.1)


@pytest.mark.parametrize(
    ("model", "mode", "name"),
    [("tiiuae/Falcon-40B", "8bit", "lambda-40b-8bit"), ("random:falcon-7b", "4bit", "lambda-7b-4bit")],
)
def test_the_guides_row_is_its_recipe_setting_for_setting(model: str, mode: str, name: str) -> None:
    words = row("recipe", 8, model, mode).words(Path("out"), steps=30, on_gpu=True)
    assert words[:3] == ["train", "--gpus", "8"]
    got = parse([*words[3:]]).resolved()
    expected = parse(["--recipe", name]).resolved()
    differing = {name for name in expected if got[name] != expected[name]}
    assert differing == {"model_name_or_path", "max_steps", "report_to"}
    assert got["per_device_train_batch_size"] == 16
    assert got["quantize_mode"] == mode


@pytest.mark.parametrize("gpus", [1, 8])
def test_the_same_work_for_both(gpus: int) -> None:
    for work, expected in ((Work(), 8192 * gpus), (Work(global_tokens=131072), 131072)):
        for name in scaling.COMMANDS:
            words = row(name, gpus, work=work).words(Path("out"), steps=3, on_gpu=True)
            got = parse(words[3:])
            micro = got.run.per_device_train_batch_size * got.data.max_length
            assert micro == 8192
            step = got.run.global_batch_size
            assert (gpus * micro if step is None else step * got.data.max_length) == expected
            assert work.step_tokens(gpus) == expected
            assert got.model.compute_dtype == {"recipe": "fp16", "ours": "auto", "ours-fp8": "fp8"}[name]


def test_speeds_are_those_of_the_steps_after_the_first(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    directory.write("summary", {"steps": 5, "peak_memory_gib": 10.0})
    directory.write("environment", {})
    write_json(directory.data_file, {})
    directory.write("kernels", {})
    # Steps 1 and 2 took ten seconds each; 3 and 4 two seconds each, 5 four, of 600 tokens in 1,024 positions.
    seconds = {1: 10, 2: 10, 4: 4, 5: 4}
    steps = {1: 1, 2: 1, 4: 2, 5: 1}
    for step, spent in seconds.items():
        logs = {"loss": 1.0, "tokens": 600 * step, "tokens_per_second": 600 * steps[step] / spent}
        directory.append_metrics(
            step, {**logs, "samples_per_second_512": 2 * steps[step] / spent, "peak_memory_gib": 9.0}
        )
    measured = read_run(row(), directory, warmup=2)
    assert (measured.steps, measured.timed_steps) == (5, 3)
    assert measured.tokens_per_second == pytest.approx(1800 / 8)
    assert measured.samples_per_second == pytest.approx(6 / 8)
    assert measured.step_seconds == pytest.approx(8 / 3)
    assert measured.step_range == pytest.approx((2, 4))
    assert measured.peak_gb == pytest.approx(10 * 1.073741824)
    # An interval that began before the end of the warm-up does not count.
    assert read_run(row(), directory, warmup=3).tokens_per_second == pytest.approx(600 / 4)
    assert read_run(row(), directory, warmup=5).failure == (
        "not measured: no step was logged after the first 5"
    )


@pytest.mark.parametrize(
    ("printed", "expected"),
    [
        ("step 1\nerror: --gpus 8: this machine shows 4\nbye\n", "failed: --gpus 8: this machine shows 4"),
        (
            "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB\nbye",
            "failed: out of memory: [rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried 2 GiB",
        ),
        ("Traceback\n  File\nValueError: no\nterminated\n", "failed: ValueError: no"),
        ("", "failed: it said nothing"),
    ],
)
def test_a_failure_is_told_in_a_line(printed: str, expected: str) -> None:
    assert reason(1, printed).removesuffix(" (exit status 1)") == expected


def stand_in(monkeypatch: pytest.MonkeyPatch, calls: list[Row], *, fails: tuple[int, ...] = ()) -> None:
    """Measure without running: 4 seconds and 100 tokens/s on one GPU, 3.9 times that on four."""
    speeds = {1: 100, 2: 198, 4: 390}

    def measure(row: Row, **settings: object) -> Measured:
        calls.append(row)
        if row.gpus in fails:
            return Measured(row=row, failure="failed: out of memory", command_seconds=1.0)
        speed = speeds[row.gpus]
        return Measured(
            row=row,
            command_seconds=4.0,
            steps=3,
            timed_steps=2,
            tokens_per_second=speed,
            samples_per_second=speed / 512,
            step_seconds=1.0,
            peak_gb=5.0,
            kept=kept(),
        )

    machine = {"commit": "0f" * 20, "gpus": [], "packages": {"torch": "2.0"}}
    monkeypatch.setattr("falcon_qlora.commands.scaling.environment_of_a_child", lambda: machine)
    monkeypatch.setattr(scaling, "measure", measure)


BENCH = ("bench", "--models", "tiny", "--tokens", "128", "--max_length", "32", "--steps", "2")


def test_scaling_is_to_one_gpu_and_what_broke_has_a_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Row] = []
    stand_in(monkeypatch, calls, fails=(2,))
    files = ("--csv", str(tmp_path / "a.csv"), "--plot", str(tmp_path / "a.png"))
    flags = ("--gpus", "4,1,2", "--variants", "ours,recipe", "--lora_r", "4", "--checkpointing", "full")
    flags += ("--method", "lora", "--new_tokens", "<|a|>", "<|b|>")
    assert main([*BENCH, *flags, *files]) == 1  # as two rows broke
    with (tmp_path / "a.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    found = [(row["variant"], row["gpus"], row["ratio_to_first"]) for row in rows]
    assert found == [
        *[("ours", "1", "1.0")] * 4,
        ("ours", "2", ""),
        ("ours", "4", "3.9"),
        *[("lambda-7b-4bit", "1", "1.0")] * 4,
        ("lambda-7b-4bit", "2", ""),
        ("lambda-7b-4bit", "4", "3.9"),
    ]
    # 4 operations a parameter and token, of 7 billion parameters without the trained ones.
    assert [row["tflops_4n"] for row in rows[3:6]] == ["2.8", "", "10.92"]
    broken = [row["note"].startswith("failed: out of memory; ") for row in rows]
    assert broken == [*[False] * 4, True, False] * 2
    assert "GPU 3 alone" in rows[3]["note"]
    assert "97.5% of the same GPUs alone (100 + 100 + 100 + 100 tokens/s)" in rows[5]["note"]
    assert all("command_seconds 4.0" in row["note"] for row in rows if row["gpus"] != "2")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    output = capsys.readouterr().out
    assert "| ours | 4 | 0.76 | 390 | 3.900x | 97.5% | 4.7 | 1,000.0 | 4 |" in output
    assert "| ours | 2 | failed: out of memory |" in output
    # What the user asks of ours is not put into the guide's recipe; what the runs share is.
    asked = {call.name: " ".join(call.flags) for call in calls}
    for words in ("--checkpointing full", "--method lora"):
        assert words in asked["ours"]
        assert words not in asked["recipe"]
    assert all("--lora_r 4" in flags and "--new_tokens <|a|> <|b|>" in flags for flags in asked.values())


def test_rows_are_appended_below_a_last_line_without_its_newline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stand_in(monkeypatch, [])
    file = tmp_path / "a.csv"
    file.write_text(",".join(COLUMNS))
    for rows in (3, 6, 9):
        assert main([*BENCH, "--gpus", "1,2", "--variants", "ours", "--csv", str(file)]) == 0
        text = file.read_text()
        assert text.endswith("\n")
        assert "\n\n" not in text
        with file.open(newline="") as opened:
            assert [row["gpus"] for row in csv.DictReader(opened)] == ["1", "1", "2"] * (rows // 3)
        file.write_text(text.removesuffix("\n"))


def test_no_row_begins_after_the_minutes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[Row] = []
    stand_in(monkeypatch, calls)
    assert main([*BENCH, "--gpus", "1,2", "--minutes", "0"]) == 0
    assert calls == []
    assert "0 minutes are over" in capsys.readouterr().err


def test_ours_alone_is_timed_whole_with_cold_and_warm_caches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Row] = []
    stand_in(monkeypatch, calls)
    file = tmp_path / "a.csv"
    asked = ("--gpus", "1", "--variants", "ours", "--whole_run", "--csv", str(file))
    assert main(["bench", "--models", "tiny", "--steps", "3", "--tokens", "2048", *asked]) == 0
    with file.open(newline="") as opened:
        labels = [row["variant"] for row in csv.DictReader(opened)]
    assert labels == ["ours, cold caches", "ours, warm caches"]
    (cache, again) = (call.flags[call.flags.index("--cache_dir") + 1] for call in calls)
    assert cache == again
    words = [call.words(tmp_path, steps=3, on_gpu=False) for call in (*calls, row())]
    assert ["--save_strategy" in each for each in words] == [False, False, True]


def test_a_whole_run_counts_the_steps_left_out(tmp_path: Path) -> None:
    seen = []

    def run(row: Row, steps: int, warmup: int, environment: dict[str, str]) -> Measured:
        cache = Path(row.flags[row.flags.index("--cache_dir") + 1])
        seen.append((row.name, steps, warmup, cache.exists(), Path(environment["TRITON_CACHE_DIR"]).exists()))
        cache.mkdir(parents=True, exist_ok=True)
        Path(environment["TRITON_CACHE_DIR"]).mkdir(exist_ok=True)
        ours = row.name == "ours"
        found = kept(last={"epoch": 2.5}, data={"rows_read": 1000})
        seconds = (20.0 if row.caches == "cold" else 10.0) if ours else HALF_A_MINUTE
        return Measured(row=row, command_seconds=seconds, step_seconds=2.0, kept=found)

    rows = [row("recipe"), row("ours")]
    found = list(recipe.whole_runs(rows, steps=200, share=0.1, warmup=10, run=run))
    # 2.5 passes over 1,000 rows, 16 at a time: 157 steps, of which 16 are run.
    assert seen == [
        ("ours", 200, 10, False, False),
        ("recipe", 16, 10, False, False),  # as soon as its rows are known
        ("ours", 200, 10, True, True),
    ]
    measured, note = found[1]
    assert measured.command_seconds == pytest.approx(HALF_A_MINUTE + 141 * 2.0)
    assert "157 steps over the same rows as ours; 16 of them run, the seconds of the others extra" in note
    assert "ours, cold caches 15.60x as fast (20.0 s)" in note
    assert "31.20x as fast as the recipe (312.0 s)" in found[2][1]
    with pytest.raises(UserError, match="--variants needs ours"):
        list(recipe.whole_runs(rows[:1], steps=200, share=0.1, warmup=10, run=run))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--gpus", "1,x"), "--gpus: 'x' is not a whole number above 0"),
        (("--gpus", "1", "--variants", "our"), "with --gpus there is no 'our' (did you mean ours?)"),
        (("--gpus", "1", "--variants", ""), "--variants: the value is empty"),
        (("--gpus", "1", "--quantize_modes", ","), "--quantize_modes: nothing is named"),
        (("--gpus", "1", "--quantize_modes", "2bit"), "--quantize_modes: '2bit' is not one of 4bit, 8bit"),
        (("--gpus", "1", "--tokens", "1000"), "--tokens 1000: must be a multiple of 512"),
        (("--gpus", "1", "--fixed", "global", "--global_tokens", "3000"), "--global_tokens 3000: must be a"),
        (("--gpus", "1", "--whole_run", "--cache_dir", "rows"), "--whole_run starts with an empty cache"),
        (("--gpus", "1", "--rounds", "2"), "--rounds does nothing with --gpus"),
        (("--gpus", "1", "--global_tokens", "512"), "--global_tokens does nothing with --fixed work"),
        (
            ("--gpus", "1", "--lengths", "even", "--dataset_name", "sample"),
            "--lengths does nothing with --da",
        ),
        (("--lengths", "uneven"), "--lengths is a setting of --gpus"),
        (("--fixed", "global", "--lengths", "uneven", "--whole_run"), "3 things to mend\n  --fixed is a"),
        (
            ("--models", "tiny", "--new_tokens", "<|a|>"),
            "--new_tokens: the variants train plain LoRA on all linears; --gpus",
        ),
        (("--models", "tiny", "--use_dora"), "--use_dora: the variants train plain LoRA"),
        (("--models", "tiny", "--use_dora", "--use_rslora"), "2 things to mend\n  --use_rslora: the var"),
        (("--models", "tiny", "--lora_slices", "query"), "--lora_slices: the variants train plain LoRA"),
        (("--models", "tiny", "--method", "adapter"), "--method adapter: the variants are of LoRA"),
    ],
)
def test_what_cannot_be_is_refused(
    flags: tuple[str, ...], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", *flags]) == 2
    assert said in capsys.readouterr().err


def test_no_speeds_no_picture(tmp_path: Path) -> None:
    draw_scaling({}, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()
