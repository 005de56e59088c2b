"""Which folder a run writes into: the named one, a fresh one, or that of the run it resumes."""

from __future__ import annotations

import datetime
import os
import re
import socket
from pathlib import Path

from falcon_qlora.common.by_url import folder_of, holds_run, holds_what_is_no_runs
from falcon_qlora.common.errors import UserError, nearest_path
from falcon_qlora.common.files import quoted, try_to_write
from falcon_qlora.common.record_files import AUTO, LATEST, SIGNS_OF_A_RUN
from falcon_qlora.common.stores import is_address
from falcon_qlora.run_folder.directory import LAUNCHER, RunDirectory

RUNS = Path("runs")


def choose(
    output_dir: str | Path | None,
    *,
    model: str,
    settings: str,
    resume: str | Path | None = None,
    overwrite: bool = False,
    restarted: bool = False,
    make: bool = True,
    dry_run: bool = False,
    root: Path = RUNS,
    now: datetime.datetime | None = None,
) -> Path:
    """Decide where a run writes; the main process calls this.

    Args:
        output_dir: The folder the user named; None for a fresh one under `root`.
        model: What is trained; the last part of a path or hub id goes into the fresh folder's name.
        settings: A few words that tell runs of one model apart, such as ``4bit-lora64``.
        resume: ``--resume``: LATEST for the run in `output_dir`, AUTO if there is one, or a run directory or
            one of its checkpoints.
        overwrite: ``--overwrite``: `output_dir` may hold a run; RunDirectory.clear removes it later.
        restarted: torchrun has restarted this group of processes: the run in the folder is their own.
        make: Make the folder. Otherwise only check that it could be made; another run may still take the
            name of a fresh one.
        dry_run: Nothing there is replaced, and no run goes on.
        root: Where fresh folders are made.
        now: The time in a fresh folder's name.

    Raises:
        UserError: if the named folder is a file, holds a run without `resume` or `overwrite`, or is not
            that of the run to resume; if there is no such run; or if the folder cannot be written.
    """
    by_folder = resume is None or resume in (LATEST, AUTO)
    resumed_from = None if by_folder else _run_of(Path(str(resume)))
    if output_dir is None and resumed_from is not None:
        return resumed_from
    if output_dir is None:
        if resume:
            newest = _newest(root)
            hint = f", for example --resume {quoted(str(newest))}" if newest else ""
            raise UserError(f"--resume: which run? Name its folder with --output_dir or --resume PATH{hint}")
        return _fresh(root, model, settings, restarted, make, now or datetime.datetime.now())
    by_url = is_address(output_dir)
    path = folder_of(output_dir)
    if any("\udc80" <= sign <= "\udcff" for sign in str(path)):
        raise UserError(
            f"--output_dir {quoted(str(path))}: not a name in UTF-8, and safetensors files can be written "
            "under no other; name another folder"
        )
    if resumed_from is not None and resumed_from.resolve() != path.resolve():
        raise UserError(
            f"--resume {resume}: a run goes on in its own folder, {resumed_from}, and --output_dir {path} is "
            "another; leave --output_dir out"
        )
    if path.exists() and not path.is_dir():
        raise UserError(f"--output_dir {path}: this is a file; name a folder")
    if (
        resume == LATEST
        and not restarted
        and not path.exists()
        and not (by_url and holds_run(str(output_dir)))
    ):
        raise UserError(f"--resume: {output_dir}: there is no run") if by_url else _not_there(path)
    if not restarted and (overwrite or not resume or (resume == AUTO and by_url)):
        _refuse_others(str(output_dir), path, by_url=by_url)
    if not (resume or overwrite or restarted):
        ways = "Replace it (--overwrite), or name another folder"
        if not dry_run:
            ways = f"Go on with it (--resume{' auto' * by_url}), {ways[0].lower()}{ways[1:]}"
        _refuse_second(str(output_dir), path, ways, by_url=by_url)
    try:
        if make:
            path.mkdir(parents=True, exist_ok=True)
        try_to_write(path)
    except OSError as error:
        raise UserError(
            f"--output_dir {path}: cannot write there ({error.strerror}); name another folder"
        ) from error
    return path


def _refuse_second(output_dir: str, path: Path, ways: str, *, by_url: bool) -> None:
    if by_url and holds_run(output_dir):
        raise UserError(f"--output_dir {output_dir}: a run is there already. {ways}")
    if RunDirectory(path).holds_run():
        of_url = f" of {output_dir}" if by_url else ""
        raise UserError(f"--output_dir {path}: this folder{of_url} holds a run already. {ways}")


def _refuse_others(output_dir: str, path: Path, *, by_url: bool) -> None:
    """Refuse to replace things that have the names of a run's, and are none."""
    if RunDirectory(path).holds_what_is_no_runs() or (by_url and holds_what_is_no_runs(output_dir)):
        raise UserError(
            f"--output_dir {output_dir}: there is no run, but things with the names of a run's ("
            f"{', '.join(SIGNS_OF_A_RUN[1:])}), which it would replace; name another folder"
        )


def _fresh(
    root: Path, model: str, settings: str, restarted: bool, make: bool, now: datetime.datetime
) -> Path:
    # torchrun's agent, this process's parent, outlives restarts: by its process id a restarted run finds the
    # folder it first got.
    launcher = f"{socket.gethostname()} {os.getppid()}"
    if restarted:
        marks = sorted(root.glob(f"*/{LAUNCHER}"), key=lambda mark: mark.stat().st_mtime, reverse=True)
        for mark in marks:
            if mark.read_text(encoding="utf-8") == launcher:
                return mark.parent
    short = _slug(model.rstrip("/").split("/")[-1])
    name = f"{now:%Y%m%d-%H%M%S}-{short}-{_slug(settings)}".rstrip("-")
    for attempt in range(1, 1000):
        path = root / (name if attempt == 1 else f"{name}-{attempt}")
        try:
            if not make:
                try_to_write(path)
                return path
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{path}: cannot write there ({error.strerror}); name a folder with --output_dir"
            ) from error
        (path / LAUNCHER).write_text(launcher, encoding="utf-8")
        return path
    raise UserError(f"{root}: too many runs named {name}; name a folder with --output_dir")


def _run_of(path: Path) -> Path:
    """The run directory that `path`, a run directory or a checkpoint in one, belongs to."""
    if path.parent.name == "checkpoints" and path.is_dir():
        return path.parent.parent
    if RunDirectory(path).holds_run():
        return path
    if not path.exists():
        raise _not_there(path)
    raise UserError(f"--resume {path}: no run there (looked for config.yaml, checkpoints/, metrics.jsonl)")


def _not_there(path: Path) -> UserError:
    return UserError(f"--resume: {path}: there is no such folder{nearest_path(path)}")


def _newest(root: Path) -> Path | None:
    runs = [entry for entry in root.glob("*") if entry.is_dir() and RunDirectory(entry).holds_run()]
    return max(runs, key=lambda entry: entry.stat().st_mtime, default=None)


def _slug(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._]+", "-", text).strip("-.") or "run"
