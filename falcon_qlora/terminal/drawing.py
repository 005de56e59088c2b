"""The style that all charts share: background, fonts, colours, and names beside what they name."""

from __future__ import annotations

import itertools
import logging
import math
import textwrap
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from falcon_qlora.common.errors import printable

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation

# Distinct from their neighbours for the colour-blind too, and readable as text on the background.
BLUE, GREEN, GREY, RED, PURPLE, AMBER = "#1f5aa6", "#00806a", "#6b6b6b", "#c2410c", "#8e4585", "#8a6d00"
PALE_BLUE = "#9db8d9"
CYCLE = (BLUE, RED, GREEN, PURPLE, AMBER, GREY)
NAME_SIZE = 8.0
_DPI = 130
_NAME_LETTERS = 60
# The background is opaque, as a page may be light or dark. A user's own matplotlibrc has no effect.
_STYLE = {
    "figure.facecolor": "#ffffff",
    "figure.dpi": _DPI,
    "savefig.dpi": "figure",
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": "#333333",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "agg.path.chunksize": 20_000,  # the renderer can fail on a line of more points
    "text.parse_math": False,  # names may have a dollar sign
}

Points = Sequence[tuple[float, float]]


@contextmanager
def picture(
    file: Path | BinaryIO,
    *,
    title: str = "",
    names: Sequence[str] = (),
    width: float = 8,
    height: float = 5.2,
    **layout: Any,
) -> Iterator[tuple[Figure, Any]]:
    """Yield a figure and its `Figure.subplots(**layout)`; write it to `file` as a PNG after the block.

    Args:
        file: the PNG to write, or a stream for its bytes.
        title: a line or two above the chart.
        names: texts beside the axes: long ones make the figure wider, not the axes narrower.
        width: in inches, without long names.
        height: in inches.
    """
    # Without this, Matplotlib logs that it builds its font cache, at the first chart on a machine.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib import style
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    width += 0.6 * NAME_SIZE / 72 * max(0, *(len(shown(name)) - 20 for name in names), 0)
    with style.context(["default", _STYLE]), warnings.catch_warnings():
        # A name may have characters that the font lacks.
        warnings.filterwarnings("ignore", "Glyph", UserWarning)
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(figure)
        if title:
            lines = textwrap.wrap(printable(title), int(10 * width), max_lines=2, placeholder=" …")
            figure.suptitle("\n".join(lines), fontsize=11, x=0.01, ha="left", color="#222222")
        yield figure, figure.subplots(**layout)
        _write(figure, file)


def shown(name: str) -> str:
    """`name` as it is drawn: no control characters, its middle left out if long."""
    name = printable(name)
    if len(name) > _NAME_LETTERS:
        name = f"{name[: _NAME_LETTERS // 2]}…{name[1 - _NAME_LETTERS // 2 :]}"
    return name


def lay_out(figure: Figure) -> None:
    """Give the axes their place, from where lengths in pixels convert to their units."""
    if (engine := figure.get_layout_engine()) is not None:
        engine.execute(figure)


def name_ends(axes: Axes, ends: Mapping[str, tuple[float, float, str]]) -> list[Annotation]:
    """Write names beside the right edge, each as near to its line's end as the other names allow.

    Args:
        axes: their limits and their height in the figure must be final.
        ends: name to x and y of a line's end, and its colour.
    """
    low, high = axes.get_ylim()
    gap = height_of_names(1) * _DPI * (high - low) / axes.get_window_extent().height
    ordered = sorted(ends.items(), key=lambda end: end[1][1])
    places: list[float] = []
    for _, (_, value, _) in ordered:
        places.append(max(value, places[-1] + gap) if places else value)
    for index in range(len(places)):  # names pushed above the axes push the others down
        places[index] = min(places[index], high - gap * (len(places) - 1 - index))
    line = {"arrowstyle": "-", "alpha": 0.4, "linewidth": 0.8, "relpos": (0, 0.5)}
    return [
        axes.annotate(
            shown(name),
            (x, value),
            xytext=(1.02, place),
            textcoords=axes.get_yaxis_transform(),
            va="center",
            color=color,
            fontsize=NAME_SIZE,
            annotation_clip=False,
            arrowprops={**line, "color": color},
        )
        for (name, (x, value, color)), place in zip(ordered, places, strict=True)
    ]


def height_of_names(count: int) -> float:
    """The height in inches of so many names below each other."""
    return 1.4 * NAME_SIZE / 72 * count


def key(axes: Axes, handles: Sequence[Artist] | None = None) -> None:
    """Draw a legend for `handles`, or for everything with a label, in a row above the axes."""
    handles = axes.get_legend_handles_labels()[0] if handles is None else handles
    axes.legend(
        handles=handles,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
        borderpad=0,
        ncols=len(handles),
        handlelength=1.2,
        labelcolor="linecolor",
        frameon=False,
        fontsize=NAME_SIZE,
    )


def name_points(axes: Axes, series: Mapping[str, tuple[Points, str]]) -> None:
    """Write each name beside one of its points, or at the right edge if it would overlap something.

    Args:
        axes: everything else must be drawn, and their limits final.
        series: name to its points, joined by lines, and its colour.
    """
    figure: Any = axes.figure
    lay_out(figure)  # from here on lengths in pixels convert to units of the axes
    at_edge: dict[str, tuple[float, float, str]] = {}
    while True:
        written = name_ends(axes, at_edge)
        lay_out(figure)  # names at the edge take room from the axes
        near = {
            name: axes.annotate(
                shown(name),
                points[-1],
                xytext=(0, 0),
                textcoords="offset points",
                ha="center",
                va="center",
                color=color,
                fontsize=NAME_SIZE,
            )
            for name, (points, color) in series.items()
            if name not in at_edge
        }
        homeless = _find_room(axes, {name: points for name, (points, _) in series.items()}, near, written)
        if not homeless:
            return
        for text in (*written, *near.values()):
            text.remove()
        at_edge |= {name: (*series[name][0][-1], series[name][1]) for name in homeless}


def _find_room(
    axes: Axes, series: Mapping[str, Points], texts: Mapping[str, Annotation], at_edge: Sequence[Annotation]
) -> list[str]:
    """Put each text beside one of its points; returns the names for which there is no room.

    Args:
        axes: in their final layout.
        series: name to points, including series that are named at the edge.
        texts: name to the text to place.
        at_edge: names at the edge, whose lines are kept free too.
    """
    import numpy as np
    from matplotlib.text import Text

    if not texts:
        return []
    paper = {name: axes.transData.transform(points) for name, points in series.items()}
    dots = np.concatenate(list(paper.values()))
    lines = [_along(*ends) for points in paper.values() for ends in itertools.pairwise(points)]
    for text in at_edge:
        box = Text.get_window_extent(text)
        lines.append(_along(axes.transData.transform([text.xy])[0], (box.x0, (box.y0 + box.y1) / 2)))
    crossed = np.concatenate([*lines, np.empty((0, 2))])
    sizes = {name: np.add(Text.get_window_extent(text).size, (10, 4)) for name, text in texts.items()}
    line_height = min(size[1] for size in sizes.values())
    turns = np.linspace(0, 2 * math.pi, 16, endpoint=False)
    ways = np.stack([np.cos(turns), np.sin(turns)], axis=1).round(6)
    steps = np.concatenate([radius * line_height * ways for radius in _RADII])
    farther = np.repeat(_RADII, len(ways))
    frame = axes.get_window_extent()
    placed: dict[str, Any] = {}
    # The first names were placed before the last were, so all are placed again.
    for name, text in [*texts.items()] * 3:
        own, half = paper[name], sizes[name] / 2
        middles = (own[:, None] + steps + np.sign(steps) * half).reshape(-1, 2)
        low, high = middles - half, middles + half
        others = np.array([box for other, box in placed.items() if other != name]).reshape(-1, 4)
        strange = np.concatenate([*(points for other, points in paper.items() if other != name), dots[:0]])
        upon = (low[:, None] < others[:, 2:]).all(axis=2) & (high[:, None] > others[:, :2]).all(axis=2)
        impossible = upon.any(axis=1) | (low < frame.min).any(axis=1) | (high > frame.max).any(axis=1)
        impossible |= (_distances(low, high, dots) < 0.2 * line_height).any(axis=1)
        away = _distances(low, high, strange) / line_height
        costs = np.tile(farther, len(own)) + 0.5 * (_distances(low, high, crossed) < 1).sum(axis=1)
        costs += 2 * np.maximum(0, 1 - away).sum(axis=1)  # it would be read as the name of another series
        costs[impossible] = math.inf
        best = int(costs.argmin())
        placed.pop(name, None)
        if costs[best] <= _ENOUGH:
            placed[name] = np.concatenate([low[best], high[best]])
            text.xy = series[name][best // len(steps)]
            text.set_position(tuple((middles[best] - own[best // len(steps)]) * 72 / _DPI))
    return [name for name in texts if name not in placed]


# How far names may be from their points, in line heights; and the cost above which there is no room.
_RADII = (0.3, 0.6, 1.0)
_ENOUGH = 4.0


def _along(start: Any, end: Any) -> Any:
    """Points on the line from `start` to `end`, one for every 4 pixels."""
    import numpy as np

    return np.linspace(start, end, max(2, int(math.dist(start, end) / 4)))


def _distances(low: Any, high: Any, points: Any) -> Any:
    """``[boxes, points]``: the distance of each point from each box; 0 inside."""
    import numpy as np

    beyond = np.maximum(low[:, None] - points, points - high[:, None])
    return np.linalg.norm(np.maximum(beyond, 0), axis=2)


def _write(figure: Figure, file: Path | BinaryIO) -> None:
    if isinstance(file, Path):
        file.parent.mkdir(parents=True, exist_ok=True)
    canvas: FigureCanvasAgg = figure.canvas  # type: ignore[assignment]
    canvas.print_png(file)  # `savefig` would lay out and draw everything once more before it writes
