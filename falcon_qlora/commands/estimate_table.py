"""``falcon-qlora estimate --table``: models by methods by quantizations, on each card, in Markdown."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError, printable
from falcon_qlora.config import Configuration
from falcon_qlora.methods.interface import Method
from falcon_qlora.methods.table import METHODS
from falcon_qlora.training.cards import CARDS, Card
from falcon_qlora.training.cuts import as_trained
from falcon_qlora.training.estimate import Estimate, Estimator
from falcon_qlora.training.rows import global_batch

_MODELS = (
    "falcon3-1b falcon3-3b falcon3-7b falcon3-10b falcon-h1-0.5b falcon-h1-1.5b-deep falcon-h1-7b "
    "falcon-h1-34b falcon-7b falcon-11b falcon-40b falcon-180b"
).split()
_LEGEND = (
    "Estimated tokens/s of one GPU with {}, cut as --batch_tokens says. –: does not fit. A letter says what "
    "some or all blocks recompute: s the largest activation, f all, o all, with their inputs in CPU memory. "
    "Memory, and the speed of the H200, were fitted to an H200. Other speeds are published ceilings times "
    "the share of them that the H200 reached."
)
_LETTERS = {"offload": " o", "full": " f", "selective": " s"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A model with a method on a base that is stored in one way.

    Attributes:
        estimator: of it.
        cards: what each does with it.
    """

    model: str
    method: Method
    quantize_mode: str
    estimator: Estimator
    cards: dict[str, Estimate]

    @property
    def label(self) -> str:
        return f"{self.model.removeprefix('random:')}, {self.method.short}, {self.quantize_mode}"


def show(configuration: Configuration, card: Card | None) -> int:
    """Print the table, and draw it if that is asked for.

    Args:
        card: the only one; None: every named one.
    """
    wanted = configuration.extra
    cards = list(CARDS.values()) if card is None else [card]
    left_out: dict[str, list[str]] = {}
    rows = list(_rows(configuration, cards, left_out))
    for why, of in left_out.items():
        if not rows:
            raise UserError(why)
        print(printable(f"note: left out: {', '.join(of)}: {why}"), file=sys.stderr)
    if wanted.plot is not None:
        _draw(rows, cards, Path(wanted.plot))
    print(json.dumps(_record(rows), indent=2) if wanted.json else markdown(configuration, rows, cards))
    return 0


def _rows(configuration: Configuration, cards: list[Card], left_out: dict[str, list[str]]) -> Iterator[Row]:
    """The rows; `left_out` gets those that cannot be, by the reason."""
    from falcon_qlora.models.locate import find_outline_here

    named = configuration.explicit
    base = configuration.model
    models = [f"random:{name}" for name in _MODELS]
    if "model_name_or_path" in named:
        models = [base.model_name_or_path]
    methods = [configuration.method]
    if "method" not in named:
        methods += [each() for each in METHODS.values() if not isinstance(configuration.method, each)]
    modes = [base.quantize_mode] if "quantize_mode" in named else ["4bit", "8bit", "16bit"]
    for model in models:
        config = find_outline_here(model, revision=base.model_revision)
        for method in methods:
            for mode in modes:
                if method.needs_16bit and mode != "16bit":
                    continue
                changed = dataclasses.replace(base, model_name_or_path=model, quantize_mode=mode)  # type: ignore[arg-type]
                settings = dataclasses.replace(configuration, model=changed, method=method)
                try:
                    estimator = Estimator(settings, config, processes=configuration.extra.gpus)
                except UserError as error:  # Falcon-H1 has no Adapter
                    name, of = model.removeprefix("random:"), left_out.setdefault(str(error), [])
                    of += [name] * (name not in of)
                    continue
                able = [card for card in cards if estimator.why_not_on(card) is None]
                on = {card.name: as_trained(estimator, card) for card in able}
                yield Row(model=model, method=method, quantize_mode=mode, estimator=estimator, cards=on)


def markdown(configuration: Configuration, rows: list[Row], cards: list[Card]) -> str:
    """The table, and what its cells mean."""
    run, data = configuration.run, configuration.data
    lines = [
        f"| model | method | base | {' | '.join(card.title for card in cards)} |",
        "|---" * (3 + len(cards)) + "|",
    ]
    for row in rows:
        cells = [_cell(row.cards.get(card.name)) for card in cards]
        name = row.model.removeprefix("random:")
        lines.append(f"| {name} | {row.method.short} | {row.quantize_mode} | {' | '.join(cells)} |")
    batch = f"{global_batch(run, configuration.extra.gpus)} × {data.max_length:,} tokens a step"
    return "\n".join([*lines, "", _LEGEND.format(batch)])


def _cell(found: Estimate | None) -> str:
    if found is None or not found.fits:
        return "–"
    speed = found.tokens_per_second
    letter = next((letter for what, letter in _LETTERS.items() if what in found.blocks), "")
    return (f"{_rounded(speed):,}" if speed is not None else "fits") + letter


def _rounded(speed: float) -> int:
    """To two figures: the rest is not known."""
    digits = len(str(int(speed))) - 2
    return int(round(speed, -max(digits, 0)))


def _record(rows: list[Row]) -> list[dict[str, Any]]:
    return [
        {
            "model": row.model,
            "method": row.method.name,
            "quantize_mode": row.quantize_mode,
            "gpu": name,
            "micro_batch_tokens": found.micro_batch_tokens,
            "card_gib": round(found.card_gib, 2),
            "fits": found.fits,
            "checkpointing": found.checkpointing,
            "tokens_per_second": round(speed, 1)
            if found.fits and (speed := found.tokens_per_second)
            else None,
        }
        for row in rows
        for name, found in row.cards.items()
    ]


def _draw(rows: list[Row], cards: list[Card], file: Path) -> None:
    from falcon_qlora.terminal.charts import Range, draw_ranges

    ranges = []
    for row in rows:
        least, most = (row.estimator.on(None, checkpointing=what).card_gib for what in ("offload", "none"))
        ranges.append(Range(row.label, least, most))
    marks: dict[float, str] = {}
    for card in cards:
        marks[card.gib] = f"{marks[card.gib]}, {card.name}" if card.gib in marks else card.name
    draw_ranges(
        ranges,
        file,
        axis="GiB of the card, estimated: everything recomputed from CPU memory, to everything kept",
        marks=marks,
    )
