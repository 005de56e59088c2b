"""Charts of runs and measurements, drawn without a display."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Literal, NamedTuple

from falcon_qlora.terminal import drawing
from falcon_qlora.terminal.drawing import Points, picture

Product = Literal["bf16", "FP8", "reference", "other tools"]
PRODUCTS: dict[Product, str] = {
    "bf16": drawing.BLUE,
    "FP8": drawing.GREEN,
    "reference": drawing.GREY,
    "other tools": drawing.RED,
}
_WIDEST = 200  # at most so many values are averaged into one of the smoothed line
_FEW = 20  # up to so many points are marked one by one, and not smoothed


class Bar(NamedTuple):
    """A bar's label, length and end text, and the lowest and highest of the values that it averages."""

    label: str
    height: float
    text: str
    low: float
    high: float


class Range(NamedTuple):
    """A bar's label, and where it begins and ends."""

    label: str
    low: float
    high: float


class Line(NamedTuple):
    """Measured points that belong together, and what computed them."""

    product: Product
    points: list[tuple[float, float]]


def draw_loss(
    metrics: Sequence[Mapping[str, Any]],
    file: Path | BinaryIO,
    *,
    title: str = "",
    kept: int | None = None,
) -> None:
    """Draw the training loss, the held-out loss and the learning rate over the steps as a PNG.

    Args:
        metrics: the lines of `metrics.jsonl`; one without a loss, whose steps were skipped, leaves a gap.
        file: the PNG to write, or a stream for its bytes.
        title: a line above the chart.
        kept: the step whose weights the run keeps; marked only if there are held-out losses.
    """
    train, held_out = _series(metrics, "loss"), _series(metrics, "eval_loss")
    rate = _series(metrics, "learning_rate")
    if not _known(train) and not _known(held_out):
        return
    panels: dict[str, Any] = {"nrows": 2, "height_ratios": [3, 1]} if rate else {}
    with picture(file, title=title, sharex=True, squeeze=False, **panels) as (figure, grid):
        losses, last = grid[0, 0], grid[-1, 0]
        ends = {}
        if _known(train):
            smoothed = _smooth(train) if len(train) > _FEW else train
            if smoothed is not train:
                _plot(losses, train, drawing.PALE_BLUE, linewidth=0.8)
            _plot(losses, smoothed, drawing.BLUE)
            ends["training" + ", smoothed" * (smoothed is not train)] = (*_known(smoothed)[-1], drawing.BLUE)
        if _known(held_out):
            _plot(losses, held_out, drawing.RED, marked=True)
            ends["held out"] = (*_known(held_out)[-1], drawing.RED)
            if kept is not None:
                _mark_kept(losses, kept, dict(held_out).get(kept))
        losses.set_ylabel("loss (nats per target token)")
        if rate:
            _plot(last, rate, drawing.GREY)
            last.set_ylabel("learning rate")
            last.set_ylim(bottom=0)
            last.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
        _over_steps(last)
        drawing.lay_out(figure)
        drawing.name_ends(losses, ends)


def draw_speed_and_memory(series: Mapping[str, Line], file: Path, *, title: str = "") -> None:
    """Draw tokens/s against peak memory as a PNG; the points of a label are joined.

    Args:
        series: label to GiB and tokens/s.
        file: the PNG to write.
        title: a line above the chart.
    """
    if not series:
        return
    height = max(6, drawing.height_of_names(2 * len(series)))
    with picture(file, title=title, names=list(series), width=10, height=height) as (_, axes):
        axes.set(xlabel="peak memory allocated, GiB", ylabel="tokens/s")
        lines = {
            label: (sorted(line.points), PRODUCTS[line.product])
            # The fastest are named first, so that their names are nearest to their points.
            for label, line in sorted(series.items(), key=lambda item: -max(y for _, y in item[1].points))
        }
        for points, color in lines.values():
            _plot(axes, points, color, marked=True, linewidth=1)
        # Names need room beyond the outermost points.
        axes.set_xlim(0, 1.12 * max(x for points, _ in lines.values() for x, _ in points) or 1)
        axes.set_ylim(0, 1.08 * max(y for points, _ in lines.values() for _, y in points) or 1)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        _key(axes, series)
        drawing.name_points(axes, lines)


def draw_scaling(series: Mapping[str, Line], file: Path, *, title: str = "") -> None:
    """Draw samples/s over GPUs as a PNG, each with the ideal line from its fewest GPUs.

    Args:
        series: label to GPUs and samples/s.
        file: the PNG to write.
        title: a line above the chart.
    """
    if not series:
        return
    height = max(5.2, 1.5 + drawing.height_of_names(len(series)))
    with picture(file, title=title, names=list(series), height=height) as (figure, axes):
        axes.set(xlabel="GPUs", ylabel="samples/s (512 tokens); dotted: in proportion to the GPUs")
        counts = sorted({gpus for line in series.values() for gpus, _ in line.points})
        ends = {}
        for label, line in series.items():
            color, points = PRODUCTS[line.product], sorted(line.points)
            _plot(axes, points, color, marked=True)
            ends[label] = (*points[-1], color)
            fewest, speed = points[0]
            ideal = [0, speed / fewest * counts[-1]]
            axes.plot([0, counts[-1]], ideal, color=color, linestyle=":", linewidth=1)
        axes.set_xticks(counts)
        axes.set_xlim(0, 1.05 * counts[-1])
        axes.set_ylim(bottom=0)
        _key(axes, series)
        drawing.lay_out(figure)
        drawing.name_ends(axes, ends)


def draw_bars(series: Mapping[str, Sequence[Bar]], file: Path, *, axis: str, title: str = "") -> None:
    """Draw horizontal bars as a PNG; the bars of one label, one per series, are below each other.

    Args:
        series: name to its bars; an error bar goes from the lowest to the highest, where these differ.
        file: the PNG to write.
        axis: what the lengths are, with their unit.
        title: a line above the chart.
    """
    series = {name: bars for name, bars in series.items() if bars}
    if not series:
        return
    labels = list(dict.fromkeys(bar.label for bars in series.values() for bar in bars))
    height = 1.2 + drawing.height_of_names(len(labels) * (len(series) + 1)) * 1.3
    with picture(file, title=title, names=labels, height=height) as (_, axes):
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(axis)
        width = 0.8 / len(series)
        colors = (drawing.BLUE, drawing.PALE_BLUE, drawing.RED)
        for place, ((name, bars), color) in enumerate(zip(series.items(), colors, strict=False)):
            spread = [[bar.height - bar.low for bar in bars], [bar.high - bar.height for bar in bars]]
            drawn = axes.barh(
                [labels.index(bar.label) - 0.4 + (place + 0.5) * width for bar in bars],
                [bar.height for bar in bars],
                width * 0.92,
                color=color,
                label=name,
                xerr=spread if any(map(any, spread)) else None,
                error_kw={"elinewidth": 1, "capsize": 3, "ecolor": "#333333"},
            )
            texts = [bar.text for bar in bars]
            if len(series) > 1:  # the first bar of a series has its name
                texts[0] += f"  {name}"
            axes.bar_label(drawn, texts, padding=3, fontsize=drawing.NAME_SIZE)
        axes.set_yticks(range(len(labels)), [drawing.shown(label) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.5, -0.5)


def draw_ranges(
    ranges: Sequence[Range], file: Path, *, axis: str, marks: Mapping[float, str], title: str = ""
) -> None:
    """Draw horizontal bars from a low to a high value as a PNG, over a logarithmic axis with marked places.

    Args:
        ranges: the bars, from above to below.
        file: the PNG to write.
        axis: what the values are, with their unit.
        marks: value to its name.
        title: a line above the chart.
    """
    if not ranges:
        return
    height = 1.6 + drawing.height_of_names(len(ranges)) * 1.5
    labels = [each.label for each in ranges]
    with picture(file, title=title, names=labels, width=9, height=height) as (_, axes):
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=axis, xscale="log")
        axes.barh(
            range(len(ranges)),
            [each.high - each.low for each in ranges],
            0.62,
            left=[each.low for each in ranges],
            color=drawing.BLUE,
        )
        named = 0.0
        for place in sorted(marks):
            axes.axvline(place, color=drawing.RED, linewidth=0.8)
            if place > 1.1 * named:  # else the name before is of both
                near = [name for at, name in sorted(marks.items()) if place <= at <= 1.1 * place]
                named, text = place, ", ".join(near)
                axes.text(place, -0.7, text, color=drawing.RED, fontsize=drawing.NAME_SIZE, rotation=30)
        axes.set_yticks(range(len(labels)), [drawing.shown(label) for label in labels])
        axes.tick_params(axis="y", length=0)
        axes.set_ylim(len(labels) - 0.5, -0.6)
        within = axes.get_xlim()
        axes.set_xticks([first * 10**power for power in range(-3, 6) for first in (1, 2, 5)])
        axes.set_xlim(within)
        axes.minorticks_off()
        axes.xaxis.set_major_formatter("{x:g}")


def draw_curves(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], file: Path, *, title: str = ""
) -> None:
    """Draw the losses of several runs over the steps as a PNG, each with its name at its end.

    Args:
        runs: name and lines of `metrics.jsonl` of each; runs of one name share a colour and a label.
        file: the PNG to write.
        title: a line above the chart.
    """
    panels = {"loss": "training loss", "eval_loss": "loss on held-out rows"}
    shown = [name for name in panels if any(_known(_series(metrics, name)) for _, metrics in runs)]
    if not shown:
        return
    names = list(dict.fromkeys(name for name, _ in runs))
    height = 1.2 + max(4, drawing.height_of_names(len(names))) * len(shown)
    with picture(
        file, title=title, names=names, height=height, nrows=len(shown), sharex=True, squeeze=False
    ) as (figure, grid):
        ends: dict[str, dict[str, tuple[float, float, str]]] = {panel: {} for panel in shown}
        for panel, axes in zip(shown, grid[:, 0], strict=True):
            series = [(name, points) for name, metrics in runs if _known(points := _series(metrics, panel))]
            many = panel == "loss" and any(len(points) > _FEW for _, points in series)
            for name, measured in series:
                points = _smooth(measured) if many else measured
                turn, place = divmod(names.index(name), len(drawing.CYCLE))
                color, style = drawing.CYCLE[place], ("-", "--", "-.", ":")[turn % 4]
                _plot(axes, points, color, marked=panel == "eval_loss", linestyle=style)
                ends[panel].setdefault(name, (*_known(points)[-1], color))
            axes.set_ylabel(panels[panel] + ", smoothed" * many)
        _over_steps(grid[-1, 0])
        drawing.lay_out(figure)  # from here on lengths in pixels convert to units of the axes
        for panel, axes in zip(shown, grid[:, 0], strict=True):
            drawing.name_ends(axes, ends[panel])


def _plot(axes: Any, points: Points, color: str, *, marked: bool = False, **style: Any) -> None:
    """Plot a line, broken where a value is NaN; a point without neighbours is marked."""
    known = [False, *(math.isfinite(value) for _, value in points), False]
    alone = [
        index
        for index, (before, here, after) in enumerate(zip(known, known[1:], known[2:], strict=False))
        if here and not before and not after
    ]
    marks = {} if marked or len(points) <= _FEW else {"markevery": alone}
    axes.plot(*zip(*points, strict=True), color=color, marker="o", markersize=4, **marks, **style)


def _over_steps(axes: Any) -> None:
    """Label the lower edge with whole steps, even if there is only one."""
    low, high = axes.get_xlim()
    if high - low < 1:
        axes.set_xlim(low - 1, high + 1)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.set_xlabel("step")


def _mark_kept(axes: Any, step: int, loss: float | None) -> None:
    """Draw a line at the kept step, its label above the axes, and a ring around its held-out loss."""
    axes.axvline(step, color="#333333", linewidth=0.8, linestyle=(0, (2, 2)))
    text = f"kept: step {step:,}"
    if loss is not None and math.isfinite(loss):
        text += f", held-out loss {loss:.4g}"
        axes.plot([step], [loss], "o", markersize=9, fillstyle="none", color="#333333", label="kept")
    low, high = axes.get_xlim()
    axes.annotate(
        text,
        (step, 1),
        xycoords=axes.get_xaxis_transform(),
        xytext=(0, 3),
        textcoords="offset points",
        ha="left" if step < (low + high) / 2 else "right",
        fontsize=drawing.NAME_SIZE,
        color="#333333",
        annotation_clip=False,
    )


def _key(axes: Any, series: Mapping[str, Line]) -> None:
    """Draw a legend of the products' colours above the axes."""
    from matplotlib.lines import Line2D

    found = {line.product for line in series.values()}
    products = [product for product in PRODUCTS if product in found]
    if len(products) > 1:
        drawing.key(axes, [Line2D([], [], color=PRODUCTS[product], label=product) for product in products])


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> Points:
    """Steps and values in order; NaN where a non-finite value was logged."""
    found = {
        line["step"]: math.nan if line[name] is None else float(line[name])
        for line in metrics
        if name in line
    }
    return sorted(found.items())


def _known(points: Points) -> Points:
    return [point for point in points if math.isfinite(point[1])]


def _smooth(points: Points) -> Points:
    """The moving average over a fifteenth of the values, 200 at most; NaN where a value is NaN.

    At the start the window is symmetric and so narrow: a loss that falls there is not drawn too low. At the
    end only its right half shrinks, so that the line does not end in one noisy value.
    """
    half = max(1, min(len(points) // 30, _WIDEST // 2))
    values = [value for _, value in points]
    finite = [math.isfinite(value) for value in values]
    # Running sums and counts of the finite values.
    sums = [
        0.0,
        *itertools.accumulate(value if known else 0.0 for value, known in zip(values, finite, strict=True)),
    ]
    counts = [0, *itertools.accumulate(finite)]
    smoothed = []
    for index, (step, _) in enumerate(points):
        reach = min(index, half)
        low, high = index - reach, min(len(points), index + reach + 1)
        mean = (sums[high] - sums[low]) / (counts[high] - counts[low]) if finite[index] else math.nan
        smoothed.append((step, mean))
    return smoothed
