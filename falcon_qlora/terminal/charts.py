"""Pictures of runs and measurements, drawn without a screen."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN = "#9db8d9"
_SMOOTH = "#1f5aa6"
_EVAL = "#d1495b"
_RATE = "#5b8c5a"
# Letters of names that have room side by side under bars.
_LETTERS_IN_A_ROW = 90


class Bar(NamedTuple):
    """A bar's label, height and the text above it; and the lowest and highest of what it is the mean of."""

    label: str
    height: float
    text: str
    low: float
    high: float


def draw_loss(metrics: Sequence[Mapping[str, Any]], file: Path | BinaryIO, *, title: str = "") -> None:
    """Draw the training loss, the held-out loss and the learning rate over the steps as a PNG.

    Args:
        metrics: The lines of `metrics.jsonl`.
        file: The PNG to write, or what takes its bytes.
        title: A line above the picture.
    """
    train = _series(metrics, "loss")
    held_out = _series(metrics, "eval_loss")
    rate = _series(metrics, "learning_rate")
    if not train and not held_out:
        return
    figure, (losses, rates) = _figure(title, nrows=2, sharex=True, height_ratios=[3, 1])
    if train:
        steps, values = zip(*train, strict=True)
        many = len(values) > 20
        losses.plot(steps, values, color=_TRAIN if many else _SMOOTH, linewidth=1.2, label="training")
        if many:
            losses.plot(steps, _smooth(values), color=_SMOOTH, linewidth=1.8, label="training, smoothed")
    if held_out:
        losses.plot(*zip(*held_out, strict=True), color=_EVAL, marker="o", markersize=4, label="held out")
    losses.set_ylabel("loss (nats per target token)")
    losses.legend(frameon=False)
    if rate:
        rates.plot(*zip(*rate, strict=True), color=_RATE)
    rates.set(xlabel="step", ylabel="learning rate")
    rates.set_ylim(bottom=0)
    rates.ticklabel_format(axis="y", style="sci", scilimits=(-2, 2))
    _write(figure, file)


def draw_speed_and_memory(
    series: Mapping[str, Sequence[tuple[float, float]]],
    file: Path,
    *,
    peers: Collection[str] = (),
    title: str = "",
) -> None:
    """Draw tokens/s against peak memory as a PNG; the points of a label are joined.

    Args:
        series: label to GB (10^9 bytes) and tokens/s.
        file: The PNG to write.
        peers: The last words of the labels that get another colour.
        title: A line above the picture.
    """
    if not series:
        return
    figure, axes = _figure(title, width=10)
    axes.set(xlabel="peak memory allocated, GB", ylabel="tokens/s")
    # Names beside the points would lie upon each other: they have numbers, the fastest the first.
    fastest_first = sorted(series.items(), key=lambda item: -max(speed for _, speed in item[1]))
    for number, (label, unsorted) in enumerate(fastest_first, start=1):
        memory, speeds = zip(*sorted(unsorted), strict=True)
        color = _EVAL if label.split()[-1] in peers else _SMOOTH
        axes.plot(
            memory, speeds, color=color, marker="o", markersize=5, linewidth=1, label=f"{number}  {label}"
        )
        # Alternately above and below.
        offset = (4, 4) if number % 2 else (4, -10)
        axes.annotate(
            str(number), (memory[0], speeds[0]), xytext=offset, textcoords="offset points", fontsize=8
        )
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    figure.legend(loc="outside right upper", frameon=False, fontsize=8, handlelength=1)
    _write(figure, file)


def draw_scaling(series: Mapping[str, Sequence[tuple[float, float]]], file: Path, *, title: str = "") -> None:
    """Draw samples/s over GPUs as a PNG, each with the line that its fewest GPUs would give ideally.

    Args:
        series: label to GPUs and samples/s.
        file: The PNG to write.
        title: A line above the picture.
    """
    if not series:
        return
    figure, axes = _figure(title)
    axes.set(xlabel="GPUs", ylabel="samples/s (512 tokens)")
    counts = sorted({gpus for points in series.values() for gpus, _ in points})
    for label, unsorted in series.items():
        points = sorted(unsorted)
        (line,) = axes.plot(*zip(*points, strict=True), marker="o", markersize=5, linewidth=1.5, label=label)
        fewest, speed = points[0]
        ideal = [speed * gpus / fewest for gpus in (0, counts[-1])]
        axes.plot([0, counts[-1]], ideal, color=line.get_color(), linestyle=":", linewidth=1)
    axes.plot([], [], color="black", linestyle=":", linewidth=1, label="ideal")
    axes.set_xticks(counts)
    axes.set_xlim(0, 1.05 * counts[-1])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=8)
    _write(figure, file)


def draw_bars(series: Mapping[str, Sequence[Bar]], file: Path, *, axis: str, title: str = "") -> None:
    """Draw bars as a PNG, those of one label from every series beside each other.

    Args:
        series: name to its bars; a line on a bar goes from its lowest to its highest, where these differ.
        file: The PNG to write.
        axis: What the heights are, with their unit.
        title: A line above the picture.
    """
    series = {name: bars for name, bars in series.items() if bars}
    if not series:
        return
    figure, axes = _figure(title)
    axes.grid(visible=False, axis="x")
    axes.set_ylabel(axis)
    labels = list(dict.fromkeys(bar.label for bars in series.values() for bar in bars))
    width = 0.8 / len(series)
    for place, ((name, bars), color) in enumerate(
        zip(series.items(), (_SMOOTH, _TRAIN, _EVAL), strict=False)
    ):
        middles = [labels.index(bar.label) - 0.4 + (place + 0.5) * width for bar in bars]
        spread = [[bar.height - bar.low for bar in bars], [bar.high - bar.height for bar in bars]]
        drawn = axes.bar(
            middles,
            [bar.height for bar in bars],
            width * 0.95,
            color=color,
            label=name,
            yerr=spread if any(map(any, spread)) else None,
            error_kw={"elinewidth": 1, "capsize": 3},
        )
        axes.bar_label(drawn, [bar.text for bar in bars], padding=2, fontsize=8)
    slanted = max(map(len, labels)) * len(labels) > _LETTERS_IN_A_ROW
    axes.set_xticks(range(len(labels)), labels, rotation=20 * slanted, ha="right" if slanted else "center")
    axes.margins(y=0.12)
    axes.set_axisbelow(True)
    if len(series) > 1:
        figure.legend(loc="outside lower center", frameon=False, ncols=len(series))
    _write(figure, file)


def draw_curves(
    runs: Sequence[tuple[str, Sequence[Mapping[str, Any]]]], file: Path, *, title: str = ""
) -> None:
    """Draw the losses of several runs over the steps as a PNG, each with its name at its end.

    Args:
        runs: name and lines of `metrics.jsonl` of each; those of one name have one colour, and one label.
        file: The PNG to write.
        title: A line above the picture.
    """
    panels = {"loss": "training loss", "eval_loss": "loss on held-out rows"}
    shown = [name for name in panels if any(_series(metrics, name) for _, metrics in runs)]
    if not shown:
        return
    figure, grid = _figure(title, nrows=len(shown), sharex=True, squeeze=False)
    figure.set_figheight(1.2 + 4 * len(shown))
    names = list(dict.fromkeys(name for name, _ in runs))
    ends: dict[str, dict[str, tuple[float, float, str]]] = {panel: {} for panel in shown}
    for panel, axes in zip(shown, grid[:, 0], strict=True):
        series = [(name, points) for name, metrics in runs if (points := _series(metrics, panel))]
        many = panel == "loss" and any(len(points) > 20 for _, points in series)
        for name, points in series:
            steps, losses = zip(*points, strict=True)
            values = _smooth(losses) if many else losses
            color, marker = f"C{names.index(name) % 10}", "o" if panel == "eval_loss" else None
            axes.plot(steps, values, color=color, linewidth=1.5, marker=marker, markersize=4)
            ends[panel].setdefault(name, (steps[-1], values[-1], color))
        axes.set_ylabel(panels[panel] + ", smoothed" * many)
    grid[-1, 0].set_xlabel("step")
    figure.draw_without_rendering()  # from here on a length on the paper is known in the units of the axes
    for panel, axes in zip(shown, grid[:, 0], strict=True):
        _name_at_edge(axes, ends[panel])
    _write(figure, file)


def _name_at_edge(axes: Any, ends: Mapping[str, tuple[float, float, str]]) -> None:
    """Write names beside the right edge, each as near to its curve's end as the others leave room.

    Args:
        ends: name to step and value of a curve's end, and its colour.
    """
    size = 8
    low, high = axes.get_ylim()
    gap = 1.4 * size * axes.figure.dpi / 72 * (high - low) / axes.get_window_extent().height
    ordered = sorted(ends.items(), key=lambda end: end[1][1])
    places: list[float] = []
    for _, (_, value, _) in ordered:
        places.append(max(value, places[-1] + gap) if places else value)
    for index in range(len(places)):  # what has come to lie above the picture pushes down
        places[index] = min(places[index], high - gap * (len(places) - 1 - index))
    for (name, (step, value, color)), place in zip(ordered, places, strict=True):
        line = {"arrowstyle": "-", "color": color, "alpha": 0.4, "linewidth": 0.8, "relpos": (0, 0.5)}
        axes.annotate(
            name,
            (step, value),
            xytext=(1.02, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontsize=size,
            annotation_clip=False,
            arrowprops=line,
        )


def _figure(title: str, *, width: float = 8, **layout: Any) -> tuple[Figure, Any]:
    """A figure and what `Figure.subplots` makes of `layout`, each with a grid."""
    # Without this, the first picture on a machine announces that fonts are being looked for.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 5.2), layout="constrained")
    if title:
        figure.suptitle(title, fontsize=11)
    axes = figure.subplots(**layout)
    for each in figure.axes:
        each.grid(alpha=0.3)
    return figure, axes


def _write(figure: Figure, file: Path | BinaryIO) -> None:
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=130, format="png")


def _series(metrics: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def _smooth(values: Sequence[float]) -> list[float]:
    """Exponential mean over about a tenth of the values, started without a bias towards zero."""
    keep = 1 - 1 / max(1.0, len(values) / 10)
    smoothed: list[float] = []
    mean = weight = 0.0
    for value in values:
        mean = keep * mean + (1 - keep) * value
        weight = keep * weight + (1 - keep)
        smoothed.append(mean / weight)
    return smoothed
