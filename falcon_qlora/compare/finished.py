"""Find existing runs in the folders that a user names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from falcon_qlora.common.errors import UserError
from falcon_qlora.compare.figures import Compared
from falcon_qlora.run_folder.choose import RUNS
from falcon_qlora.run_folder.directory import RunDirectory

_NAMED_NEARBY = 8


def runs_in(folders: Sequence[Path]) -> list[Compared]:
    """The runs in these folders. Each is named by the shortest end of its path that no other shares.

    Raises:
        UserError: for a folder that is given twice or holds no run; the message names some runs nearby.
    """
    paths = [folder.resolve() for folder in folders]
    for folder, path in zip(folders, paths, strict=True):
        if not _holds_figures(path):
            near = ", ".join(dict.fromkeys(map(_as_typed, _near(path))))
            raise UserError(
                f"{folder} holds no run (looked for config.yaml with metrics.jsonl or summary.json); "
                + (f"runs nearby: {near}" if near else "there are none nearby")
            )
        if paths.count(path) > 1:
            raise UserError(f"{folder} is given twice; name each run once")
    return [
        Compared(name=_name(path, paths), folder=folder) for folder, path in zip(folders, paths, strict=True)
    ]


def _name(path: Path, among: Sequence[Path]) -> str:
    """The shortest end of a path that no other path has."""
    ends = (path.parts[-length:] for length in range(1, len(path.parts) + 1))
    return "/".join(next(end for end in ends if [p.parts[-len(end) :] for p in among].count(end) == 1))


def _holds_figures(folder: Path) -> bool:
    run = RunDirectory(folder)
    return run.config_file.is_file() and (run.metrics_file.is_file() or run.summary_file.is_file())


def _near(folder: Path) -> Iterator[Path]:
    """Some of the runs in and beside this folder, around it and in the default one; newest of each first."""
    count = 0
    # Two up lies the run of a checkpoint; what is beside that may be others'.
    alone = folder.parent.parent
    for place in (folder, folder / RUNS, folder.parent, alone, RUNS.resolve()):
        with contextlib.suppress(OSError):  # a folder that this user may not read
            inside = [] if place == alone else place.glob("*")
            found = [entry for entry in (place, *inside) if _holds_figures(entry)]
            found.sort(key=lambda entry: entry.stat().st_mtime, reverse=True)
            yield from found[: max(_NAMED_NEARBY - count, 0)]
            count += len(found)


def _as_typed(folder: Path) -> str:
    here = Path.cwd()
    return str(folder.relative_to(here) if folder.is_relative_to(here) else folder)
