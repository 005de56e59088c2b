"""The settings that decide which documents rows become, for a corpus and for a stream alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.data import cache
from falcon_qlora.data.formats import load_template, recognise
from falcon_qlora.data.json_rows import listed
from falcon_qlora.data.sources import HubSource, Source, find_source
from falcon_qlora.data.templates import Template
from falcon_qlora.data.tokens import Encoder

# Raise it when the same rows and settings would give other tokens, or when an entry stores something new.
_VERSION = 8


@dataclass(frozen=True, kw_only=True)
class RowSettings:
    """How rows are found, read and tokenized.

    Args:
        dataset_name: hub ids, files or folders.
        dataset_weights: proportions in which their rows are drawn; None takes each row once.
        dataset_config: configuration of hub data sets.
        dataset_split: split to train on.
        dataset_format: a key of `formats.FORMATS`, or ``"auto"``.
        columns: standard column name → its name in the data, for those that differ.
        template: a name of `templates.TEMPLATES`, a ``.jinja`` file, ``"auto"`` or ``"format"``.
        train_on: ``"answers"`` or ``"all"``.
        append_end_token: whether the end token follows every answer.
        overlong: ``"split"``, ``"truncate"`` or ``"drop"``, for rows longer than `max_length`.
        max_length: the most tokens of a document.
        held_out: of held-out rows, which need not have the columns that flags name for the training's.

    Raises:
        UserError: for weights that are not one per data set, or not above 0.
    """

    dataset_name: list[str]
    dataset_weights: list[float] | None = None
    dataset_config: str | None = None
    dataset_split: str = "train"
    dataset_format: str = "auto"
    columns: dict[str, str] = field(default_factory=dict)
    template: str = "auto"
    train_on: str = "answers"
    append_end_token: bool = True
    overlong: str = "split"
    max_length: int
    held_out: bool = False

    def __post_init__(self) -> None:
        weights = self.dataset_weights
        if weights is None:
            return
        if len(weights) != len(self.dataset_name):
            raise UserError(
                f"--dataset_weights has {len(weights)} numbers, "
                f"but --dataset_name has {len(self.dataset_name)} data sets"
            )
        if not all(0 < weight < float("inf") for weight in weights):
            raise UserError(
                f"--dataset_weights {' '.join(map(str, weights))}: every weight must be a number above 0"
            )

    def sources(self, split: str | None = None) -> list[Source]:
        """The sources that `dataset_name` names, for `dataset_split` or another split."""
        split = self.dataset_split if split is None else split
        return [find_source(name, config=self.dataset_config, split=split) for name in self.dataset_name]

    def held_out_sources(self, split: str) -> list[Source]:
        """What ``--eval_split`` names, if that is no share of the rows."""
        if split.startswith("split:"):
            return self.sources(split.removeprefix("split:"))
        of_file = "train" if Path(split).expanduser().is_file() else self.dataset_split  # it has no splits
        return [find_source(split, config=self.dataset_config, split=of_file)]

    def limits(self, max_rows: int | None) -> list[int | None]:
        """How many rows of each source are read at most: `max_rows` in all, or None for every row.

        Raises:
            UserError: if that leaves a source without a row.
        """
        count = len(self.dataset_name)
        if max_rows is None:
            return [None] * count
        if max_rows < count:
            raise UserError(
                f"--max_rows {max_rows}: must be at least {count}, one for each data set of --dataset_name"
            )
        return [max_rows // count + (index < max_rows % count) for index in range(count)]

    def recognise(self, found: Mapping[str, bool], source: str) -> tuple[str, dict[str, str]]:
        """As `formats.recognise`, for the columns that `columns_of` found."""
        return recognise(
            found,
            arrays=[name for name, is_array in found.items() if is_array],
            columns=self.columns,
            dataset_format=self.dataset_format,
            source=source,
            others=self.held_out or len(self.dataset_name) > 1,
        )

    def check_used(self, renamed: Iterable[Mapping[str, str]]) -> None:
        """Refuse a flag that names a column which no data set has, though some have the standard column.

        Args:
            renamed: for each data set, the second result of `recognise`.

        Raises:
            UserError: naming the flag.
        """
        used = {standard for each in renamed for standard in each}
        for standard, given in self.columns.items():
            if standard not in used:
                names = listed(self.dataset_name)
                first, *others = self.sources()
                told = f"no such column in {names}"
                if not isinstance(first, HubSource):  # whose rows would be asked for once more
                    told += f", which has {listed(first.columns())}"
                if others:
                    told = f"none of {names} has such a column and a format with {standard}"
                raise UserError(
                    f"--{standard}_column {given}: {told}. Drop the flag if the column is called {standard}, "
                    "or name the right column"
                )

    def cache_key(
        self,
        source: Source,
        max_rows: int | None,
        row_format: str,
        columns: Mapping[str, str],
        template: Template,
        tokenizer_fingerprint: str,
    ) -> str:
        """The key of a source's documents in the cache: of everything that decides their tokens.

        Args:
            max_rows: that are read of it.
            row_format, columns: from `recognise`.
            template: that writes the rows.
            tokenizer_fingerprint: identifies the tokenizer.
        """
        return cache.key_of(
            {
                "version": _VERSION,
                "rows": source.identity(),
                "max_rows": max_rows,
                "format": row_format,
                "columns": columns,
                "template": template.identity,
                "tokenizer": tokenizer_fingerprint,
                "train_on": self.train_on,
                "append_end_token": self.append_end_token,
                "overlong": self.overlong,
                "max_length": self.max_length,
            }
        )

    def load_template(self, row_format: str, tokenizer: Any) -> Template:
        """As `formats.load_template`."""
        return load_template(self.template, row_format, tokenizer)

    def encoder(self, tokenizer: Any) -> Encoder:
        """The encoder that makes documents of rendered rows."""
        return Encoder(
            tokenizer=tokenizer,
            train_on=self.train_on,
            append_end_token=self.append_end_token,
            overlong=self.overlong,
            max_length=self.max_length,
        )
