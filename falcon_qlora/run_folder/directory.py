"""The run directory: the record of a run, and what every later command reads.

    config.yaml        the resolved configuration; `--config` takes it back
    environment.json   versions, GPUs, commit
    data.json          fingerprint, rows read, dropped, truncated, tokens
    kernels.json       module → kernel, or the reason it was left alone
    metrics.jsonl      one line a log step
    summary.json       the run in a few numbers
    loss.png           the losses and the learning rate
    checkpoints/step-N/
    adapter/           what was trained, with a model card
    samples.jsonl      the sample answers at each evaluation, if asked for
    trackers.json      each tracker's id of the run
    tensorboard/, wandb/   what those trackers write themselves
    flight_record/     after a hang: NCCL's last collectives, one file a process

The main process writes all but ``flight_record/`` and the parts of a sharded model's checkpoint. A file
appears whole or not at all.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import deque
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, Literal

from falcon_qlora.common.errors import reason_of
from falcon_qlora.common.files import plain, quoted, replaced, write_json, write_text
from falcon_qlora.common.record_files import (
    SETTINGS,
    SETTINGS_FORMAT,
    SIGNS_OF_A_RUN,
    is_no_run,
    run_of,
    settings_as_now,
    without_format,
)
from falcon_qlora.common.untrusted import as_yaml, read_json, read_text, read_yaml
from falcon_qlora.run_folder.lock import LOCK
from falcon_qlora.terminal import charts
from falcon_qlora.terminal.console import note

METRICS_FIELDS = (
    "step",
    "epoch",
    "loss",
    "grad_norm",
    "loss_scale",
    "learning_rate",
    "tokens",
    "tokens_per_second",
    "wall_tokens_per_second",
    "samples_per_second_512",
    "peak_memory_gib",
    "packing_efficiency",
    "eval_loss",
)

# What a run writes, most wanted first.
_CONTENTS = (
    "adapter",
    "loss.png",
    "metrics.jsonl",
    "summary.json",
    "checkpoints",
    "config.yaml",
    "environment.json",
    "data.json",
    "kernels.json",
    "samples.jsonl",
    "trackers.json",
    "tensorboard",
    "wandb",
    "flight_record",
)
Record = Literal["environment", "kernels", "summary"]
LAUNCHER = ".launcher"  # in a fresh folder: which launcher made it
_LARGEST_FIGURE = 1e300
_FORMAT = 1  # of environment, kernels and summary; a file without a number is of the first
_METRICS_LIMIT_BYTES = 2**30  # at some hundred bytes a line, for more steps than any run has


class RunDirectory:
    """One run's folder: where each file is, and how it is written.

    Args:
        path: The folder; made at the first write.
        address: of the object store to which it is copied; None: it is not.
    """

    def __init__(self, path: str | Path, *, address: str | None = None):
        self.path = Path(path)
        self.address = address
        self.config_file = self.path / "config.yaml"
        self.data_file = self.path / "data.json"
        self.kernels_file = self.path / "kernels.json"
        self.metrics_file = self.path / "metrics.jsonl"
        self.summary_file = self.path / "summary.json"
        self.loss_picture = self.path / "loss.png"
        self.trackers_file = self.path / "trackers.json"
        self.checkpoints = self.path / "checkpoints"
        self.adapter = self.path / "adapter"

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    @classmethod
    def of_adapter(cls, folder: Path) -> RunDirectory | None:
        """The run whose adapter or checkpoint lies in `folder`; None for an adapter by itself."""
        run = run_of(folder)
        return None if run is None else cls(run)

    def holds_run(self) -> bool:
        """Whether a run has written here."""
        return any((self.path / sign).exists() for sign in SIGNS_OF_A_RUN)

    def holds_what_is_no_runs(self) -> bool:
        """Whether things with the names of a run's are here, and no run, which `--overwrite` may replace."""
        return self.path.is_dir() and is_no_run({each.name for each in self.path.iterdir()})

    @property
    def name(self) -> str:
        """What commands call it: its address, if it has one, else its folder."""
        return self.address or str(self.path)

    def told_contents(self) -> list[str]:
        """`contents` in lines for the terminal; of a run with an address the folder here is named once."""
        names = [f"{path.name}/" if path.is_dir() else path.name for path in self.contents()]
        if self.address is None:
            return [str(self.path / name) + "/" * name.endswith("/") for name in names]
        return [f"{self.path}/: {', '.join(names)}"]

    def contents(self) -> list[Path]:
        """The files and folders of the run that exist, most wanted first."""
        return [self.path / name for name in _CONTENTS if (self.path / name).exists()]

    @staticmethod
    def names() -> tuple[str, ...]:
        """The files and folders that a run may write."""
        return _CONTENTS

    def clear(self, *, keep: Collection[str] = ()) -> None:
        """Remove an earlier run's files, and nothing else in the folder.

        For `--overwrite`: call it once the new run is sure to start, so that a bad flag costs nothing.

        Args:
            keep: names of files and folders that stay: the new run has already written there.
        """
        # The settings last: without them nothing here is taken for a run's.
        ordered = sorted(_CONTENTS, key=lambda name: name == SETTINGS)
        for path in (self.path / name for name in ordered if name not in keep):
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)

    def remove_if_empty(self) -> None:
        """Remove the folder of a run that never started: one with only its marks and its trackers' files."""
        marks = {LAUNCHER, LOCK, self.trackers_file.name, "wandb"}
        if self.path.is_dir() and {entry.name for entry in self.path.iterdir()} <= marks:
            shutil.rmtree(self.path, ignore_errors=True)

    def write_config(self, resolved: Mapping[str, Any]) -> None:
        """Write everything a re-run needs; the caller leaves secrets out."""
        record = {"format": SETTINGS_FORMAT, **plain(resolved)}  # copies of lists, so YAML needs no aliases
        text = as_yaml(record)
        config = quoted(str(self.config_file))
        header = f"# Run again:  falcon-qlora train --config {config} --output_dir NEW_FOLDER\n"
        write_text(self.config_file, header + text)

    def read_config(self) -> dict[str, Any]:
        """The settings of the run.

        Raises:
            UserError: if they cannot be read, or a later release wrote them in another format.
        """
        return settings_as_now(read_yaml(self.config_file), str(self.config_file))

    def write(self, name: Record, record: Mapping[str, Any]) -> None:
        """Write a record, with its format number."""
        write_json(self.path / f"{name}.json", {"format": _FORMAT, **record})

    def read(self, name: Record) -> dict[str, Any]:
        """What `write` wrote, without the format number.

        Raises:
            UserError: if it cannot be read, or a later release wrote it in another format.
        """
        file = self.path / f"{name}.json"
        return without_format(read_json(file), str(file), _FORMAT)

    def append_metrics(self, step: int, logs: Mapping[str, Any]) -> None:
        """Append one line for `step` with the METRICS_FIELDS in `logs`, if it has any besides the epoch.

        A non-finite number becomes null: JSON has no name for it.

        Raises:
            OSError: if it cannot be written; the file is then as it was.
        """
        record = {"step": step} | {name: logs[name] for name in METRICS_FIELDS[1:] if name in logs}
        if not record.keys() - {"step", "epoch"}:
            return
        line = json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"
        append_lines(self.metrics_file, line)

    def read_metrics(self) -> list[dict[str, Any]]:
        """The log steps so far; a last line cut short by a crash is left out."""
        return read_metrics(self.metrics_file)

    def drop_metrics_after(self, step: int) -> None:
        """Remove the log steps and sample answers after `step`: a run resumed there makes them again."""
        for file in (self.metrics_file, self.path / "samples.jsonl"):
            if file.exists():
                kept = [record for record in read_metrics(file) if record["step"] <= step]
                lines = [json.dumps(record, ensure_ascii=False) + "\n" for record in kept]
                write_text(file, "".join(lines))

    def draw_loss(self, title: str = "", *, kept: int | None = None) -> None:
        """Draw `loss.png` from the metrics, if there is a loss to draw; a failure prints a note.

        Args:
            title: above the picture.
            kept: the step whose weights the run leaves.
        """
        try:
            with replaced(self.loss_picture) as temporary:
                charts.draw_loss(self.read_metrics(), temporary, title=title, kept=kept)
        except Exception as error:
            note(f"{self.loss_picture} could not be written ({reason_of(error)})")

    def tracker_record(self, tracker: str) -> dict[str, Any]:
        """What a tracker needs to resume the same run; {} if there is none yet."""
        record = read_json(self.trackers_file).get(tracker) if self.trackers_file.exists() else None
        return record if isinstance(record, dict) else {}

    def write_tracker_record(self, tracker: str, record: Mapping[str, Any]) -> None:
        everything = read_json(self.trackers_file) if self.trackers_file.exists() else {}
        write_json(self.trackers_file, {**everything, tracker: dict(record)})


def batch_of(settings: Mapping[str, Any], processes: int | None) -> Any:
    """Sequences of a step in a run with these recorded settings; None if they do not say."""
    whole = settings.get("global_batch_size")
    each, pieces = (
        settings.get(name) for name in ("per_device_train_batch_size", "gradient_accumulation_steps")
    )
    if whole is None and all(isinstance(factor, int) for factor in (each, pieces, processes)):
        return each * pieces * processes  # type: ignore[operator]
    return whole


class Backlog:
    """Writes what a run can do without: the first OSError prints a note, and each call retries what failed.

    Args:
        write: the function to call; each call must write all or nothing.
        what: for the message, such as a file's name.
    """

    def __init__(self, write: Callable[..., None], what: str):
        self._write = write
        self._what = what
        self._waiting: deque[tuple[Any, ...]] = deque()
        self._told = False

    def __call__(self, *arguments: Any) -> None:
        self._waiting.append(arguments)
        try:
            while self._waiting:
                self._write(*self._waiting[0])
                self._waiting.popleft()
        except OSError as error:
            if not self._told:
                note(
                    f"{self._what} cannot be written ({reason_of(error)}). The training goes on; "
                    "what is missing is added once it can be written again"
                )
            self._told = True


def append_lines(file: Path, lines: str) -> None:
    """Append whole lines in one write, so that a reader never sees half a line.

    Raises:
        OSError: if they cannot all be written; the file is then as it was.
    """
    content = lines.encode()
    file.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        before = os.fstat(handle).st_size
        if os.write(handle, content) < len(content):  # the disk had no more room
            os.ftruncate(handle, before)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
    finally:
        os.close(handle)


def read_metrics(file: Path) -> list[dict[str, Any]]:
    """Read a `metrics.jsonl`; [] where there is none.

    A line that is no record of a step is left out, such as a last line cut short by a crash.
    """
    records: list[dict[str, Any]] = []
    if not file.exists():
        return records
    for line in read_text(file, limit_bytes=_METRICS_LIMIT_BYTES).splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if _is_of_a_step(record):
            records.append(record)
    return records


def _is_of_a_step(record: Any) -> bool:
    if not isinstance(record, dict) or not isinstance(record.get("step"), int):
        return False
    figures = [record[name] for name in METRICS_FIELDS if record.get(name) is not None]
    return all(isinstance(each, int | float) and abs(each) < _LARGEST_FIGURE for each in figures)
