"""The sources of rows: data sets on the hub, local files, and folders of files."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import datetime
import functools
import hashlib
import itertools
import logging
import random
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from falcon_qlora.common.errors import UserError, first_line, nearest_path
from falcon_qlora.common.files import sha256
from falcon_qlora.common.stores import fetched, is_address
from falcon_qlora.data import sample_data
from falcon_qlora.data.files import data_suffix, iterate_rows, remarks
from falcon_qlora.data.folders import cure_of, files_of_folder, kinds, listed
from falcon_qlora.data.json_rows import Row, columns_of, table_row
from falcon_qlora.data.origins import Origin

PACKAGED = "sample"

_SAMPLE_ROWS = 1000
_ROWS_LOOKED_AT = 100  # of each file, for notes
# Hashing all of a stream's files could delay the start too long. A source below the first limit is hashed
# whole, in a second or two. In a larger one, this many bytes at both ends of each file are hashed, and its
# modification time is compared too.
_HASHED_WHOLE_BYTES = 10**9
_HASHED_END_BYTES = 10**6
_BATCH_ROWS = 1000


class Rows(Iterator[tuple[str, Row]]):
    """Yields ``(place, row)`` one by one, and knows the position of the next."""

    @abc.abstractmethod
    def position(self) -> Any:
        """Where the next row is, as values for JSON; `Source.read` takes it."""

    @abc.abstractmethod
    def origin(self) -> Origin:
        """The part of the source that the last row came from, and its number in that part."""


class Source(Protocol):
    """The rows of one name in `--dataset_name`."""

    @property
    def name(self) -> str:
        """As the user gave it."""

    def parts(self) -> list[str]:
        """Names of the parts in which rows are counted: each file, or the data set."""

    def identity(self) -> str:
        """A hash of the content."""

    def read(self, shuffle_files: random.Random | None = None, position: Any = None) -> Rows:
        """The rows one by one, without holding them.

        Args:
            shuffle_files: draws the order of files or shards; None keeps it.
            position: of the row to begin at, from a `Rows` in the same order; None for the first.
        """

    def columns(self) -> dict[str, bool]:
        """As `columns_of`, for the first rows."""

    def describe(self) -> dict[str, Any]:
        """What a stream reads, as values for JSON: each file's size and hash, or a hub data set's commit."""

    def notes(self) -> list[str]:
        """Notes on what is left out or read in an unusual way, judged by the beginning of each file."""

    def rows(self, max_rows: int | None) -> Iterator[tuple[str, Row]]:
        """Yield ``(place, row)`` in order; a hub data set is read from its copy on disk."""

    def rows_of_parts(self, max_rows: int | None) -> list[int]:
        """How many of these rows each part has; counting may read them all."""


def find_source(name: str, *, config: str | None = None, split: str = "train") -> Source:
    """Find the file, folder, or data set on the hub that `name` means.

    Args:
        name: a path that exists, a hub id, or ``"sample"`` for the rows that come with the package.
        config: configuration of a hub data set.
        split: of a hub data set, or of a folder whose file names say which split they belong to.

    Raises:
        UserError: if a path does not exist or holds no rows, or a single file is asked for another split.
    """
    path = fetched(name, "--dataset_name") if is_address(name) else Path(name).expanduser()
    if name == PACKAGED and not path.exists():
        path = sample_data.path()
    if path.is_dir():
        files, notes = files_of_folder(path, name, split)
        return LocalSource(name, tuple(files), tuple(notes))
    if path.is_file():
        if data_suffix(path) is None:
            what = cure_of(path) or "not a kind of file that holds rows"
            raise UserError(f"{name}: {what}. Rows are read from {kinds()}")
        if split != "train":
            raise UserError(
                f"{name}: a single file has no split {split!r}; name another file, or hold out a fraction"
            )
        return LocalSource(name, (path,))
    if _looks_like_path(name):
        where = "" if path.parent.is_dir() else f" (nor is there a folder {path.parent})"
        raise UserError(f"file not found: {name}{nearest_path(path)}{where}")
    return HubSource(name, config, split)


@dataclass(eq=False)
class _LocalRows(Rows):
    """The rows of files one after another, beginning at row `row` of the `file`-th file, both from 0.

    Args:
        order: the indexes of the files, in the order in which they are read.
    """

    files: Sequence[Path]
    order: Sequence[int]
    file: int
    row: int
    opened: Iterator[tuple[str, Row]] | None = None

    def __next__(self) -> tuple[str, Row]:
        while self.file < len(self.order):
            if self.opened is None:
                self.opened = iterate_rows(self.files[self.order[self.file]], skip=self.row)
            found = next(self.opened, None)
            if found is not None:
                self.row += 1
                return found
            self.file, self.row, self.opened = self.file + 1, 0, None
        raise StopIteration

    def position(self) -> list[int]:
        return [self.file, self.row]

    def origin(self) -> Origin:
        return self.order[self.file], self.row


class _HubRows(Rows):
    """The rows of a streamed `datasets.IterableDataset`, beginning at one of its states.

    Args:
        number: rows before that state.
        state: None for the first row.
    """

    def __init__(self, source: HubSource, stream: Any, number: int, state: Any):
        self._source = source
        self._stream = stream
        self._number = number
        if state is not None:
            stream.load_state_dict(state)
        self._rows = iter(stream)

    def __next__(self) -> tuple[str, Row]:
        with _hub_errors(self._source):
            row = next(self._rows, None)
        if row is None:
            raise StopIteration
        self._number += 1
        place = f"{self._source.name} row {self._number}"
        return place, table_row(row, place)

    def position(self) -> list[Any]:
        return [self._number, self._stream.state_dict()]

    def origin(self) -> Origin:
        return 0, 0  # with shuffled shards, the row's number is unknown


@dataclass(frozen=True)
class LocalSource:
    """Files on this machine, in reading order."""

    name: str
    files: tuple[Path, ...]
    left_out: tuple[str, ...] = ()

    def parts(self) -> list[str]:
        packaged = self.files == (sample_data.path(),)
        return [self.name] if packaged else [str(path) for path in self.files]

    def identity(self) -> str:
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{data_suffix(path)} {path.suffix.lower() == '.gz'} ".encode())
            try:
                with path.open("rb") as handle:
                    digest.update(hashlib.file_digest(handle, "sha256").digest())
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        try:
            whole = sum(path.stat().st_size for path in self.files) < _HASHED_WHOLE_BYTES
            return {"name": self.name, "files": [_describe_file(path, whole) for path in self.files]}
        except OSError as error:
            raise UserError(f"{error.filename or self.name}: cannot be read: {error.strerror}") from None

    def read(self, shuffle_files: random.Random | None = None, position: Any = None) -> Rows:
        order = list(range(len(self.files)))
        if shuffle_files is not None:
            shuffle_files.shuffle(order)
        return _LocalRows(self.files, order, *(position or (0, 0)))

    def notes(self) -> list[str]:
        told: dict[str, list[str]] = {}
        columns: dict[str, list[str]] = {}
        for path in self.files:
            found: dict[str, None] = {}
            for _, row in itertools.islice(iterate_rows(path), _ROWS_LOOKED_AT):
                found.update(dict.fromkeys(row))
            for remark in remarks(path) if found else ["holds no row"]:
                told.setdefault(remark, []).append(str(path))
            if found:
                columns.setdefault(", ".join(sorted(found)), []).append(str(path))
        notes = [*self.left_out, *(f"{listed(names)}: {remark}" for remark, names in told.items())]
        if len(columns) > 1:
            told_apart = "; ".join(f"{listed(names)}: {found}" for found, names in columns.items())
            notes.append(f"{self.name}: the files' columns differ: {told_apart}")
        return notes

    def columns(self) -> dict[str, bool]:
        return columns_of(row for _, row in self.rows(_SAMPLE_ROWS))

    def rows(self, max_rows: int | None) -> Iterator[tuple[str, Row]]:
        return itertools.islice(self.read(), max_rows)

    def rows_of_parts(self, max_rows: int | None) -> list[int]:
        counts, rows = [0] * len(self.files), self.read()
        for _ in itertools.islice(rows, max_rows):
            counts[rows.origin()[0]] += 1
        return counts


@dataclass(frozen=True)
class HubSource:
    """A split of a data set on the Hugging Face hub."""

    name: str
    config: str | None
    split: str

    def parts(self) -> list[str]:
        return [f"{self.name}{f' ({self.config})' if self.config else ''}, split {self.split}"]

    def identity(self) -> str:
        # The builder derives it from the repository's commit, configuration and split.
        return f"{self.name} {self.config} {self.split} {self._load(streaming=False)._fingerprint}"

    def describe(self) -> dict[str, Any]:
        import datasets

        with _hub_errors(self), quiet_datasets():
            commit = str(datasets.load_dataset_builder(self.name, self.config).hash)
        return {"name": self.name, "commit": commit}

    def notes(self) -> list[str]:
        return []

    def read(self, shuffle_files: random.Random | None = None, position: Any = None) -> Rows:
        stream = self._load(streaming=True)
        if shuffle_files is not None:
            # A buffer of 1 shuffles only the order of the shards.
            stream = stream.shuffle(seed=shuffle_files.randrange(2**31), buffer_size=1)
        return _HubRows(self, stream, *(position or (0, None)))

    def columns(self) -> dict[str, bool]:
        return columns_of(row for _, row in self.rows(_SAMPLE_ROWS))

    def rows(self, max_rows: int | None) -> Iterator[tuple[str, Row]]:
        number = 0
        for batch in self._head(max_rows).iter(batch_size=_BATCH_ROWS):
            for values in zip(*batch.values(), strict=True):
                number += 1
                place = f"{self.name} row {number}"
                yield place, table_row(dict(zip(batch, values, strict=True)), place)

    def rows_of_parts(self, max_rows: int | None) -> list[int]:
        return [len(self._head(max_rows))]

    def _head(self, max_rows: int | None) -> Any:
        dataset = self._load(streaming=False)
        return dataset if max_rows is None else dataset.select(range(min(max_rows, len(dataset))))

    def _load(self, *, streaming: bool) -> Any:
        with _hub_errors(self), quiet_datasets():
            return _load_dataset(self.name, self.config, self.split, streaming)


def _describe_file(path: Path, whole: bool) -> dict[str, Any]:
    about = path.stat()
    described: dict[str, Any] = {"file": str(path), "bytes": about.st_size}
    if whole:
        return described | {"sha256": sha256(path)}
    with path.open("rb") as opened:
        digest = hashlib.sha256(opened.read(_HASHED_END_BYTES))
        opened.seek(-min(_HASHED_END_BYTES, about.st_size), 2)
        digest.update(opened.read())
    # Whole seconds: some file systems keep no more.
    modified = datetime.datetime.fromtimestamp(int(about.st_mtime), datetime.UTC).isoformat()
    return described | {"modified": modified, "sha256_of_ends": digest.hexdigest()}


@functools.lru_cache(maxsize=8)
def _load_dataset(name: str, config: str | None, split: str, streaming: bool) -> Any:
    # Cached, as one preparation calls it several times and every call would ask the hub again.
    import datasets

    found = datasets.load_dataset(name, config, split=split, streaming=streaming)
    stored = {column: _as_stored(feature) for column, feature in (found.features or {}).items()}
    if stored == (found.features or {}):
        return found
    if streaming:
        return found.decode(False)
    found = found.with_format(None)  # a copy
    found.info.features = datasets.Features(stored)
    return found


def _as_stored(feature: Any) -> Any:
    """A column's type with images, audio and the like as bytes: only text is trained, so none is decoded."""
    import datasets

    if isinstance(feature, dict):
        return {name: _as_stored(each) for name, each in feature.items()}
    if isinstance(feature, datasets.List | datasets.LargeList):
        return dataclasses.replace(feature, feature=_as_stored(feature.feature))
    if getattr(feature, "decode", False) and not isinstance(feature, datasets.Json):
        return dataclasses.replace(feature, decode=False)
    return feature


@contextlib.contextmanager
def quiet_datasets() -> Iterator[None]:
    """Silence retry notices, as failures are raised anyway, and show progress bars only on a terminal."""
    import datasets

    hub_logger = logging.getLogger("huggingface_hub")
    level, disabled = hub_logger.level, datasets.are_progress_bars_disabled()
    hub_logger.setLevel(logging.ERROR)
    if sys.stderr is None or not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        hub_logger.setLevel(level)
        if not disabled and datasets.are_progress_bars_disabled():
            datasets.enable_progress_bars()


@contextlib.contextmanager
def _hub_errors(source: HubSource) -> Iterator[None]:
    import datasets.exceptions
    from huggingface_hub.errors import HTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    name = source.name
    flags = (
        f"--dataset_config {source.config}, split {source.split}"
        if source.config
        else f"split {source.split}"
    )
    try:
        yield
    except datasets.exceptions.DatasetNotFoundError as error:
        raise UserError(
            f"--dataset_name {name}: no such data set on the hub, nor a file or folder of that name here; "
            f"a private or gated one needs `hf auth login` first ({first_line(error)})"
        ) from None
    except datasets.exceptions.DatasetGenerationError as error:
        raise UserError(
            f"--dataset_name {name}: cannot be read ({first_line(error.__cause__ or error)})"
        ) from None
    except (
        ConnectionError,
        TimeoutError,
        HTTPError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
    ) as error:
        raise UserError(
            f"--dataset_name {name}: the hub cannot be reached, and this machine's cache does not have the "
            f"data set ({first_line(error)}).",
            "To run offline: run `falcon-qlora prepare` with the same flags on a machine that reaches the "
            "hub, bring its Hugging Face cache (HF_HOME, by default ~/.cache/huggingface) here and set "
            f"HF_HUB_OFFLINE=1; or name a local {kinds()} file or a folder of them",
        ) from None
    except (ValueError, FileNotFoundError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise UserError(f"--dataset_name {name} ({flags}): {first_line(error)}") from None


def _looks_like_path(name: str) -> bool:
    if data_suffix(Path(name)) is not None or cure_of(Path(name)) is not None:
        return True
    return name.startswith((".", "/", "~")) or name.count("/") > 1 or re.fullmatch(r"[\w./-]+", name) is None
