"""One source's rows as tokenized documents on disk, cached by everything that decides the tokens."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import sha256, write_json
from falcon_qlora.common.quantities import counted
from falcon_qlora.common.untrusted import read_json
from falcon_qlora.data import cache
from falcon_qlora.data.account import Account
from falcon_qlora.data.rendering import render
from falcon_qlora.data.settings import RowSettings
from falcon_qlora.data.sources import HubSource, Source, quiet_datasets
from falcon_qlora.data.special_text import SpecialText
from falcon_qlora.data.templates import Segment
from falcon_qlora.data.tokens import Document, Encoder

_META = "meta.json"
# Enough to keep the tokenizer's threads busy, and few enough that Ctrl-C need not wait for them.
_ROWS_AT_A_TIME = 256
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

    A dropped row has one document without tokens, whose status says why.

    Attributes:
        source: whose rows they are.
        format: a key of `formats.FORMATS`.
        columns: standard column name → its name in the data, for those that differ.
        template: the template's name.
        dataset: columns `input_ids` and `mask`; `row`, the index of the source row; `status`, a
            `tokens.Status`; `change`, a `tokens.Change`; `targets`, target tokens; `content`, a hash of the
            whole row, 0 if there is none.
        fingerprint: hexadecimal hash of the documents.
        rows_of_parts: how many rows each of the source's parts has.
        account: counts what was not read, was missing or was altered.
        train_on: the setting.
    """

    source: Source
    format: str
    columns: dict[str, str]
    template: str
    dataset: datasets.Dataset
    fingerprint: str
    rows_of_parts: list[int]
    account: Account
    train_on: str


@dataclass(frozen=True, kw_only=True)
class Tokenizing:
    """Tokenizes sources; its arguments are those of `corpus.prepare_corpora`."""

    settings: RowSettings
    tokenizer: Any
    tokenizer_fingerprint: str
    num_proc: int | None
    cache_dir: Path | None
    progress: Callable[[str], None]

    def documents(self, source: Source, max_rows: int | None) -> Documents:
        """The documents of `source`, from the cache or tokenized now."""
        settings, encoder = self.settings, self.settings.encoder(self.tokenizer)
        if isinstance(source, HubSource):
            self.progress(f"asking the hub for {source.name}")
        row_format, columns = settings.recognise(source.columns(), source.name)
        template = settings.load_template(row_format, self.tokenizer)
        key = settings.cache_key(source, max_rows, row_format, columns, template, self.tokenizer_fingerprint)

        def fill(folder: Path) -> None:
            self.progress(f"reading {source.name}")
            counts = source.rows_of_parts(max_rows)
            account, special = Account(), SpecialText(self.tokenizer)
            rows = (
                (
                    place,
                    render(
                        row,
                        row_format,
                        template,
                        columns=columns,
                        place=place,
                        special=special,
                        account=account,
                    ),
                )
                for place, row in source.rows(max_rows)
            )
            self._fill(folder, source, counts, encoder, rows, account)

        def is_whole(entry: Path) -> bool:
            if (wrong := _damage(entry)) is not None:
                self.progress(f"damaged cache entry {entry} ({wrong}): {source.name} is tokenized again")
            return wrong is None

        entry = cache.entry(self.cache_dir, key, fill, is_whole)
        meta = read_json(entry / _META)
        return Documents(
            source,
            row_format,
            columns,
            template.name,
            _read(entry),
            meta["content"],
            meta["rows"],
            Account.from_plain(meta["account"]).moved(meta["parts"], source.parts()),
            settings.train_on,
        )

    def _fill(
        self,
        folder: Path,
        source: Source,
        rows_of_parts: list[int],
        encoder: Encoder,
        rows: Iterator[tuple[str, list[Segment]]],
        account: Account,
    ) -> None:
        total = sum(rows_of_parts)
        if total == 0:
            raise UserError(f"{source.name}: the data is empty, there is no row in it")
        self.progress(f"tokenizing {counted(total, 'row')} of {source.name}")
        with quiet_datasets(), _tokenizer_threads(self.num_proc):
            shown = datasets.utils.tqdm(rows, desc="tokenizing", total=total, unit=" rows")
            _write(folder / "documents.arrow", encoder, iter(shown), account)
        meta = {
            "content": _content_hash(_read(folder)),
            "source": source.name,
            "rows": rows_of_parts,
            "parts": source.parts(),
            "account": account.plain(),
            "files": {
                file.name: {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in _files(folder)
            },
        }
        write_json(folder / _META, {**meta, "key": cache.key_of(meta)})


@contextlib.contextmanager
def _tokenizer_threads(count: int | None) -> Iterator[None]:
    """Let the tokenizer use `count` threads of its own; None: one per core.

    Elsewhere they stay off, because they would hang in a data loader's workers, which are forks.
    """
    before = os.environ.get("TOKENIZERS_PARALLELISM", "false")
    os.environ["TOKENIZERS_PARALLELISM"] = "false" if count == 1 else "true"
    if count is not None:
        os.environ["RAYON_NUM_THREADS"] = str(count)  # read once in a process, when the first thread starts
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before


def _write(file: Path, encoder: Encoder, rows: Iterator[tuple[str, list[Segment]]], account: Account) -> None:
    schema = _FEATURES.arrow_schema
    first = 0
    with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as writer:
        while some := list(itertools.islice(rows, _ROWS_AT_A_TIME)):
            places, segments = zip(*some, strict=True)
            numbered = [
                (number, document)
                for number, documents in enumerate(encoder.documents(segments, account, places), start=first)
                for document in documents
            ]
            writer.write_batch(pa.record_batch(_columns(numbered), schema=schema))
            first += len(some)


def _columns(numbered: Sequence[tuple[int, Document]]) -> list[pa.Array]:
    """Documents and the indexes of their rows, as columns in the order of `_FEATURES`."""
    documents = [document for _, document in numbered]
    return [
        _lists([document.input_ids for document in documents]),
        _lists([document.mask for document in documents]),
        pa.array([number for number, _ in numbered], pa.int64()),
        pa.array([int(document.status) for document in documents], pa.int8()),
        pa.array([int(document.change) for document in documents], pa.int8()),
        pa.array([document.targets for document in documents], pa.int64()),
        pa.array([document.content for document in documents], pa.int64()),
    ]


def _lists(arrays: list[np.ndarray]) -> pa.Array:
    ends = np.cumsum([0, *map(len, arrays)], dtype=np.int32)
    return pa.ListArray.from_arrays(pa.array(ends), pa.array(np.concatenate(arrays)))


def _files(folder: Path) -> list[Path]:
    """The files in row order: one, or in entries of earlier releases one per tokenizing process."""
    return sorted(folder.glob("documents*.arrow"))


def _damage(folder: Path) -> str | None:
    """How an entry differs from what was written; None if it does not.

    Hashing it takes no longer than reading the rows, which are hashed each time anyway.
    """
    try:
        meta = read_json(folder / _META)
        if meta.pop("key", None) != cache.key_of(meta):
            return f"{_META} was altered, or is of another release"
        sizes = {file: file.stat().st_size for file in _files(folder) if file.is_file()}
        if {file.name: size for file, size in sizes.items()} != {
            name: entry["bytes"] for name, entry in meta["files"].items()
        }:
            return "file sizes differ"
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


def _content_hash(dataset: datasets.Dataset) -> str:
    digest = hashlib.sha256()
    for batch in dataset.with_format("arrow").iter(batch_size=1000):
        for name in ("input_ids", "mask"):
            column = batch.column(name).combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).tobytes())
        digest.update(batch.column("row").to_numpy().tobytes())
    return digest.hexdigest()
