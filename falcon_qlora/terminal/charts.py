"""Pictures of runs and measurements, drawn without a screen."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_TRAIN = "#9db8d9"
_SMOOTH = "#1f5aa6"
_EVAL = "#d1495b"
_RATE = "#5b8c5a"


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


def draw_bars(
    series: Mapping[str, Sequence[tuple[str, float, str]]], file: Path, *, axis: str, title: str = ""
) -> None:
    """Draw bars as a PNG, those of one label from every series beside each other.

    Args:
        series: name to its bars: label, height and what stands above it.
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
    labels = list(dict.fromkeys(label for bars in series.values() for label, _, _ in bars))
    width = 0.8 / len(series)
    for place, ((name, bars), color) in enumerate(
        zip(series.items(), (_SMOOTH, _TRAIN, _EVAL), strict=False)
    ):
        middles = [labels.index(label) - 0.4 + (place + 0.5) * width for label, _, _ in bars]
        drawn = axes.bar(middles, [height for _, height, _ in bars], width * 0.95, color=color, label=name)
        axes.bar_label(drawn, [text for _, _, text in bars], padding=2, fontsize=8)
    axes.set_xticks(range(len(labels)), labels)
    axes.margins(y=0.12)
    axes.set_axisbelow(True)
    if len(series) > 1:
        axes.legend(frameon=False)
    _write(figure, file)


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
