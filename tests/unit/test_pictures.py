"""What is read off a picture: names that lie upon nothing, the step that was kept, an honest smooth line."""

from __future__ import annotations

import io
import itertools
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.text import Text

from falcon_qlora.data.report import draw_histogram
from falcon_qlora.terminal import charts, drawing
from falcon_qlora.terminal.charts import PRODUCTS, Bar, Line

pytestmark = pytest.mark.filterwarnings("error")
FILE = Path("unused.png")
TITLE = "a_$b_{$.jsonl, 数据 \x1b[1m" * 9


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """What is drawn, and not written."""
    drawn: list[Figure] = []
    monkeypatch.setattr(drawing, "_write", lambda figure, file: drawn.append(figure))
    return drawn


def run(steps: int, *, seed: int = 0, skipped: tuple[int, ...] = ()) -> list[dict[str, Any]]:
    """A log whose loss falls, with ten evaluations."""
    draw = random.Random(seed)
    lines = []
    for step in range(1, steps + 1):
        loss = None if step in skipped else 1.2 + 9 * math.exp(-30 * step / steps) + draw.gauss(0, 0.1)
        lines.append({"step": step, "loss": loss, "learning_rate": 2e-4 * (1 - step / steps)})
        if step % max(1, steps // 10) == 0:
            lines.append({"step": step, "eval_loss": 1.2 + 2 * (step / steps - 0.6) ** 2})
    return lines


def names(count: int, seed: int) -> list[str]:
    """Short, long and equal but for a digit; with signs that a formula has."""
    kinds = ("ours-{}", "20261128-2038{}-falcon-7b-4bit-lora64", "{}_$\\frac{{$_" + "x_" * 40, "$数据_{}")
    return [kinds[(seed + number) % 4].format(number) for number in range(count)]


def speed_and_memory(seed: int) -> None:
    """Fifteen lines: all over the picture, in one heap, or each two at nearly one place."""
    draw = random.Random(seed)
    spread = (1, 0.02, 1e-4)[seed % 3]
    series = {}
    for number, name in enumerate(names(15, seed)):
        centre = draw.uniform(5, 90), draw.uniform(2000, 30_000)
        middle = centre if seed % 3 == 0 else ((20, 20_000) if seed % 3 == 1 else (6 * (number // 2), 2e4))
        points = [
            (middle[0] + 9 * spread * draw.random(), middle[1] * (1 + spread * draw.random() / 9))
            for _ in range(1 + number % 2)
        ]
        series[name] = Line([*PRODUCTS][number % 4], points)
    charts.draw_speed_and_memory(series, FILE, title=TITLE)


def crowd(seed: int) -> None:
    """Fifteen points with a little room between them."""
    draw = random.Random(seed)
    series = {
        f"ours-8bit-fp8-{number}": Line("FP8", [(20 + 10.8 * draw.random(), 20_000 + 2400 * draw.random())])
        for number in range(15)
    }
    charts.draw_speed_and_memory(series, FILE, title=TITLE)


def scaling(seed: int) -> None:
    series = {
        name: Line([*PRODUCTS][number % 4], [(gpus, (9 + number // 3) * gpus) for gpus in (1, 2, 4, 8)])
        for number, name in enumerate(names(15, seed))
    }
    charts.draw_scaling(series, FILE, title=TITLE)


def curves(seed: int) -> None:
    charts.draw_curves([(name, run(60, seed=seed)) for name in names(15, seed)], FILE, title=TITLE)


def bars(seed: int) -> None:
    series = [Bar(name, 1.0 + seed, "1.000", 0.9 + seed, 1.1 + seed) for name in names(15, seed)]
    charts.draw_bars({"after training": series, "before": series[1:]}, FILE, axis="loss", title=TITLE)


def losses(seed: int) -> None:
    charts.draw_loss(run((3, 60, 300)[seed % 3], seed=seed), FILE, title=TITLE, kept=(3, 6, 300)[seed % 3])


def lengths(seed: int) -> None:
    tokens = np.random.default_rng(seed).lognormal(5, seed, 500).astype(int) + 1
    draw_histogram(tokens, 1024, FILE, title=TITLE)


@pytest.mark.parametrize(
    ("draw", "seed"),
    [
        *itertools.product((speed_and_memory, losses), range(3)),
        *((crowd, 22), (scaling, 0), (curves, 1), (bars, 2), (lengths, 0), (lengths, 1)),
    ],
)
def test_no_text_lies_upon_another_or_upon_a_point(
    draw: Callable[[int], None], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Figure] = []
    texts: list[Text] = []

    def drawn(figure: Figure, file: Path) -> None:
        figures.append(figure)
        with pytest.MonkeyPatch.context() as noted:
            as_before = Text.draw
            noted.setattr(Text, "draw", lambda text, *args: (texts.append(text), as_before(text, *args)))
            figure.canvas.draw()

    monkeypatch.setattr(drawing, "_write", drawn)
    draw(seed)
    (figure,) = figures
    boxes = [
        (text.get_text(), Text.get_window_extent(text))
        for text in texts
        if text.get_text() and text.get_visible()
    ]
    assert len(boxes) > 8
    for text, box in boxes:
        assert figure.bbox.x0 <= box.x0 <= box.x1 <= figure.bbox.x1, text
        assert figure.bbox.y0 <= box.y0 <= box.y1 <= figure.bbox.y1, text
    for (one, box), (other, others_box) in itertools.combinations(boxes, 2):
        assert not box.overlaps(others_box), (one, other)
    if draw in (speed_and_memory, crowd):
        (axes,) = figure.axes
        for line in axes.lines:
            for point in axes.transData.transform(line.get_xydata()):
                assert not any(box.contains(*point) for _, box in boxes)
        assert len(axes.texts) == len(axes.lines) == 15


@pytest.mark.parametrize("kept", [40, 100])
def test_the_step_that_was_kept_is_marked(kept: int, figures: list[Figure]) -> None:
    lines = run(100)
    charts.draw_loss(lines, FILE, kept=kept)
    charts.draw_loss([line for line in lines if "eval_loss" not in line], FILE, kept=kept)
    axes, without = figures[0].axes[0], figures[1].axes[0]
    (loss,) = (line["eval_loss"] for line in lines if line["step"] == kept and "eval_loss" in line)
    (ring,) = (line for line in axes.lines if line.get_label() == "kept")
    assert ring.get_xydata().tolist() == [[kept, loss]]
    assert f"kept: step {kept}, held-out loss {loss:.4g}" in [text.get_text() for text in axes.texts]
    assert [text.get_text() for text in without.texts] == ["training, smoothed"]


@pytest.mark.parametrize("kind", ["constant", "linear", "noise"])
def test_the_smooth_line_is_the_mean_around_each_value(kind: str, figures: list[Figure]) -> None:
    count, half = 300, 10  # a fifteenth of them
    noise = np.random.default_rng(0).normal(2, 0.3, count)
    values = {"constant": np.full(count, 2.5), "linear": 9 - np.arange(count) / 50, "noise": noise}[kind]
    values[[40, 41, 150]] = math.nan
    shown = [None if math.isnan(value) else value for value in values]
    charts.draw_loss([{"step": step, "loss": loss} for step, loss in enumerate(shown, 1)], FILE)
    raw, smooth = (line.get_ydata() for line in figures[0].axes[0].lines)
    np.testing.assert_array_equal(raw, values)
    known = ~np.isnan(values)
    np.testing.assert_array_equal(np.isnan(smooth), ~known)
    for index in np.flatnonzero(known):
        reach = min(index, half)
        around = values[index - reach : index + reach + 1]
        assert smooth[index] == pytest.approx(np.nanmean(around))
    if kind == "constant":
        assert smooth[known] == pytest.approx(2.5)
    if kind == "linear":
        assert smooth[:30] == pytest.approx(values[:30]), "a loss that falls at the start is not drawn higher"


def test_skipped_steps_are_gaps_and_what_is_between_them_is_seen(figures: list[Figure]) -> None:
    charts.draw_loss(run(60, skipped=(20, 22, 23)), FILE)
    charts.draw_loss(run(3, skipped=(2,)), FILE)
    charts.draw_loss([{"step": 1, "loss": None}, {"step": 2, "loss": math.nan}], FILE)
    charts.draw_loss([], FILE)
    long, short = (figure.axes[0].lines for figure in figures)
    for line in long[:2]:
        assert [step for step, loss in line.get_xydata() if math.isnan(loss)] == [20, 22, 23]
        assert [line.get_xdata()[index] for index in line.get_markevery()] == [21]
    assert [math.isnan(loss) for loss in short[0].get_ydata()] == [False, True, False]
    assert short[0].get_marker() == "o"
    assert short[0].get_markevery() is None


def test_a_long_run_and_a_resumed_one(figures: list[Figure]) -> None:
    lines = run(30_000)
    charts.draw_loss([*lines, *lines[-9:]], FILE)  # steps that were done, and written, once more
    steps = figures[0].axes[0].lines[0].get_xdata()
    assert list(steps) == list(range(1, 30_001))


def test_a_picture_does_not_depend_on_the_callers_own_style() -> None:
    def picture() -> bytes:
        file = io.BytesIO()
        charts.draw_loss(run(30), file, title="t", kept=15)
        return file.getvalue()

    expected = picture()
    own = {"figure.facecolor": "black", "text.usetex": True, "font.size": 30, "savefig.transparent": True}
    with matplotlib.rc_context(own):
        assert picture() == expected
        assert matplotlib.rcParams["font.size"] == 30
