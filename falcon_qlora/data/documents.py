"""One source's rows as documents on disk, tokenized once for everything that decides the tokens."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256, write_json
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.data import cache
from falcon_qlora.data.encode import Encoder
from falcon_qlora.data.formats import recognise, renamed_columns, render, resolve_template
from falcon_qlora.data.processes import run_each
from falcon_qlora.data.sources import Source, quiet_datasets, row_of
from falcon_qlora.data.templates import Template, get_template

# Raised whenever the same rows and settings would give other tokens than before, or an entry holds more.
_VERSION = 2
_META = "meta.json"
_ROWS_PER_PROCESS = 4000
_FEATURES = datasets.Features(
    {
        "input_ids": datasets.List(datasets.Value("int32")),
        "mask": datasets.List(datasets.Value("int8")),
        "row": datasets.Value("int64"),
        "status": datasets.Value("int8"),
        "change": datasets.Value("int8"),
        "targets": datasets.Value("int64"),
        "content": datasets.Value("int64"),
    }
)


@dataclass(frozen=True)
class Documents:
    """The cached documents of one source, in the order of its rows.

    A row of which nothing is kept has one document without tokens, whose status says why.
    Arrays are ``[documents]``.

    Attributes:
        source: whose rows they are.
        format: a key of `formats.FORMATS`.
        template: the template's name.
        dataset: columns `input_ids`, `mask`, `row`.
        fingerprint: hexadecimal hash of the documents.
        rows_of_parts: how many rows each of the source's parts has.
        row: int64, the index of the source row.
        status: int8, an `encode.Status`.
        change: int8, an `encode.Change`.
        targets: int64, target tokens.
        content: int64, a hash of the whole row; 0 where it has no answer.
        lengths: int64, tokens.
    """

    source: Source
    format: str
    template: str
    dataset: datasets.Dataset
    fingerprint: str
    rows_of_parts: list[int]
    row: np.ndarray
    status: np.ndarray
    change: np.ndarray
    targets: np.ndarray
    content: np.ndarray
    lengths: np.ndarray

    @property
    def rows(self) -> int:
        """How many rows the source has."""
        return int(self.row[-1]) + 1 if len(self.row) else 0


@dataclass(frozen=True, kw_only=True)
class Reading:
    """How rows are read and tokenized; the arguments are those of `tokenize.prepare_corpora`."""

    encoder: Encoder
    tokenizer_fingerprint: str
    dataset_format: str
    columns: dict[str, str]
    template: str
    num_proc: int | None
    cache_dir: Path | None
    progress: Callable[[str], None]

    def documents(self, source: Source, max_rows: int | None) -> Documents:
        """The documents of `source`, tokenized now if they never were."""
        found = source.columns()
        if not found:
            raise UserError(f"{source.name}: the data is empty, there is no row in it")
        columns = renamed_columns(found, self.columns, source.name)
        row_format = recognise(found, columns=columns, dataset_format=self.dataset_format, source=source.name)
        template = load_template(self.template, row_format, self.encoder.tokenizer)
        key = cache.key_of(
            {
                "version": _VERSION,
                "rows": source.identity(),
                "max_rows": max_rows,
                "format": row_format,
                "columns": columns,
                "template": template.identity,
                "tokenizer": self.tokenizer_fingerprint,
                "train_on": self.encoder.train_on,
                "append_end_token": self.encoder.append_end_token,
                "overlong": self.encoder.overlong,
                "max_length": self.encoder.max_length,
            }
        )
        rows_to_documents = _RowsToDocuments(self.encoder, source.name, row_format, template, columns)

        def fill(folder: Path) -> None:
            self._fill(folder, key, source, max_rows, rows_to_documents)

        entry = cache.entry(self.cache_dir, key, fill)
        wrong = _damage(entry)
        if wrong is not None:
            self.progress(
                f"{entry} is not what was written there ({wrong}): {source.name} is tokenized again"
            )
            cache.remove(entry)
            entry = cache.entry(self.cache_dir, key, fill)
        return _open(entry, source, row_format, template.name)

    def _fill(
        self, folder: Path, key: str, source: Source, max_rows: int | None, work: _RowsToDocuments
    ) -> None:
        self.progress(f"reading {source.name}")
        rows = source.table(folder, max_rows)
        if len(rows) == 0:
            raise UserError(f"{source.name}: the data is empty, there is no row in it")
        processes = _processes(self.num_proc, len(rows))
        in_processes = f" in {processes} processes" if processes > 1 else ""
        self.progress(f"tokenizing {len(rows):,} rows of {source.name}{in_processes}")
        parts = [_Part(rows, work, folder, key[:32], each, processes) for each in range(processes)]
        if processes > 1:
            run_each(parts)
        else:
            parts[0]()
        documents = _read(folder)
        meta = {
            "content": _content_hash(documents),
            "source": source.name,
            "rows": source.rows_of_parts(rows),
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in _files(folder)
            },
        }
        write_json(folder / _META, {**meta, "key": cache.key_of(meta)})
        del rows, parts, documents
        (folder / "rows.arrow").unlink(missing_ok=True)


@dataclass(frozen=True)
class _Part:
    """The work of one process: its share of the rows, tokenized into a file of its own."""

    rows: datasets.Dataset
    work: _RowsToDocuments
    folder: Path
    fingerprint: str
    index: int
    processes: int

    def __call__(self) -> None:
        of_all = f"_{self.index:05d}_of_{self.processes:05d}" if self.processes > 1 else ""
        first, end = (len(self.rows) * each // self.processes for each in (self.index, self.index + 1))
        with quiet_datasets(bars=self.index == 0):
            self.rows.select(range(first, end)).map(
                dataclasses.replace(self.work, first=first),
                batched=True,
                with_indices=True,
                remove_columns=self.rows.column_names,
                features=_FEATURES,
                cache_file_name=str(self.folder / f"documents{of_all}.arrow"),
                load_from_cache_file=False,
                new_fingerprint=self.fingerprint,
                desc="tokenizing",
            )


@dataclass(frozen=True)
class _RowsToDocuments:
    """The function that `datasets.map` runs."""

    encoder: Encoder
    source: str
    format: str
    template: Template
    columns: dict[str, str]
    first: int = 0

    def __call__(self, batch: dict[str, list[Any]], indices: list[int]) -> dict[str, list[Any]]:
        segments = []
        numbers = [self.first + index for index in indices]
        for index, number in enumerate(numbers):
            place, row = row_of(batch, index, self.source, number)
            segments.append(render(row, self.format, self.template, columns=self.columns, place=place))
        columns: dict[str, list[Any]] = {name: [] for name in _FEATURES}
        for number, documents in zip(numbers, self.encoder.documents(segments), strict=True):
            for document in documents:
                columns["input_ids"].append(document.input_ids)
                columns["mask"].append(document.mask)
                columns["row"].append(number)
                columns["status"].append(int(document.status))
                columns["change"].append(int(document.change))
                columns["targets"].append(document.targets)
                columns["content"].append(document.content)
        return columns


def load_template(template: str, row_format: str, tokenizer: Any) -> Template:
    """The template that `--template` means for rows of this format, with the tokenizer's special tokens."""
    special_tokens = {
        name: getattr(tokenizer, name)
        for name in ("bos_token", "eos_token")
        if getattr(tokenizer, name) is not None
    }
    return get_template(resolve_template(template, row_format), special_tokens)


def _files(folder: Path) -> list[Path]:
    """One for each process that tokenized, in the order of the rows."""
    return sorted(folder.glob("documents*.arrow"))


def _damage(folder: Path) -> str | None:
    """What of an entry is not what was written; None where all is.

    Reading it takes no longer than reading the rows does, which tells their hash each time.
    """
    try:
        meta = read_json(folder / _META)
        if meta.pop("key", None) != cache.key_of(meta):
            return f"{_META} was altered, or is of another release"
        sizes = {file: file.stat().st_size for file in _files(folder) if file.is_file()}
        if {file.name: size for file, size in sizes.items()} != {
            name: entry["bytes"] for name, entry in meta["files"].items()
        }:
            return "its files are of other sizes"
        if any(sha256(file) != meta["files"][file.name]["sha256"] for file in sizes):
            return "its files were altered"
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    return None


def _read(folder: Path) -> datasets.Dataset:
    with quiet_datasets():
        return datasets.concatenate_datasets(
            [datasets.Dataset.from_file(str(file)) for file in _files(folder)]
        )


def _open(folder: Path, source: Source, row_format: str, template: str) -> Documents:
    dataset = _read(folder)
    numbers = {
        name: np.asarray(dataset.data.column(name).to_numpy())
        for name in _FEATURES
        if name not in ("input_ids", "mask")
    }
    meta = read_json(folder / _META)
    return Documents(
        source=source,
        format=row_format,
        template=template,
        dataset=dataset.select_columns(["input_ids", "mask", "row"]),
        fingerprint=meta["content"],
        rows_of_parts=meta["rows"],
        lengths=_lengths(dataset),
        **numbers,
    )


def _processes(asked: int | None, rows: int) -> int:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # Starting one takes a second, in which another tokenizes some thousand rows.
    return max(min(asked, rows) if asked else min(cores, rows // _ROWS_PER_PROCESS), 1)


def _content_hash(dataset: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "mask"):
            column = batch.column(name).combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        digest.update(batch.column("row").to_numpy().tobytes())
    return digest.hexdigest()


def _lengths(dataset: datasets.Dataset) -> np.ndarray:
    import pyarrow.compute

    lengths = pyarrow.compute.list_value_length(dataset.data.column("input_ids"))
    return np.asarray(lengths.to_numpy(), dtype=np.int64)
