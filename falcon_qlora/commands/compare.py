"""`falcon-qlora compare`: train with several methods in turn on the same rows, and compare the results.

Each method is trained by ``falcon-qlora train`` in a process of its own, so that its losses are those of that
command and its memory is not shared with other methods.
"""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from falcon_qlora import config
from falcon_qlora.checkpoint import manifest
from falcon_qlora.commands.first_look import look
from falcon_qlora.commands.opening import note_aside
from falcon_qlora.commands.words import split
from falcon_qlora.common.errors import EXIT_BUG, EXIT_USER_ERROR, UserError, one_line, printable
from falcon_qlora.common.files import quoted
from falcon_qlora.common.record_files import LATEST
from falcon_qlora.common.settings import setting
from falcon_qlora.common.stores import is_address
from falcon_qlora.compare import plan, report
from falcon_qlora.compare.figures import Compared
from falcon_qlora.compare.finished import runs_in
from falcon_qlora.compare.plan import METHODS, Planned
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.config.parser import refuse
from falcon_qlora.processes import launcher
from falcon_qlora.processes.stop_signals import stop_signals_to
from falcon_qlora.run_folder.choose import RUNS, choose
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

_REASON_LINES = 50
_OUT_OF_MEMORY = re.compile(r"out ?of ?memory", re.IGNORECASE)


@dataclass(kw_only=True)
class CompareArguments(LaunchArguments):
    """Which methods, and what sets them apart."""

    _argument_group_name = "Comparison, and the processes of each run"

    methods: list[str] = setting(
        list(METHODS), "Methods to train by, in this order, also with commas between."
    )
    recipes: list[str] = setting([], "METHOD=RECIPE: another --recipe for one method.")
    learning_rates: list[str] = setting([], "METHOD=RATE: a learning rate for one method.")
    seeds: int = setting(1, "Train each method with so many seeds, from --seed on.", least=1)


# The settings that compare itself uses; the others are passed to `train`.
_OWN = ("methods", "recipes", "learning_rates", "seeds", "output_dir", "overwrite")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status; after a stop that of `train`: 75 if the run was saved."""
    folders = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    if "" in folders:
        raise UserError("a folder to compare has an empty name")
    given = config.read_flags(argv[len(folders) :], verb="compare", extra_arguments=CompareArguments)
    return _side_by_side([Path(folder) for folder in folders], given) if folders else _train_all(given)


def _folder(output_dir: str | None, *, model: str) -> Path:
    if is_address(output_dir):
        raise UserError(f"--output_dir {output_dir}: compare writes into a folder here; name one")
    return choose(output_dir, model=model, settings="comparison")


def _side_by_side(folders: list[Path], given: dict[str, Any]) -> int:
    """Compare finished runs."""
    refuse(
        [
            f"--{name} does nothing where finished runs are compared: drop it"
            for name in given
            if name not in ("output_dir", "overwrite")
        ]
    )
    runs = runs_in(folders)
    folder = _folder(given.get("output_dir"), model=f"{len(runs)}-runs")
    if (folder / report.TABLE).exists() and not given.get("overwrite"):
        raise UserError(
            f"--output_dir {folder}: this folder holds a comparison already. Replace it (--overwrite), or "
            "name another folder"
        )
    made = report.Comparison(title="Runs compared", compared=runs)
    _show(made, made.write(folder))
    return 0


def _train_all(given: dict[str, Any]) -> int:
    """Train with each method and each seed, and compare the runs."""
    own = config.configure(
        {name: given[name] for name in _OWN if name in given}, extra_arguments=CompareArguments
    )
    ours: CompareArguments = own.extra
    planned, refused = plan.plan(
        {name: value for name, value in given.items() if name not in _OWN},
        names=split(ours.methods),
        recipes=split(ours.recipes),
        learning_rates=split(ours.learning_rates),
        extra_arguments=LaunchArguments,
    )
    differences = plan.differences(planned, seeds=ours.seeds)
    # All methods with the first seed come first: a comparison that is stopped later has them all.
    runs = [
        plan.with_seed(method, number, LaunchArguments) for number in range(ours.seeds) for method in planned
    ]
    say_loading()
    look(planned[0].configuration)
    model = planned[0].configuration.model.model_name_or_path
    folder = _folder(own.run.output_dir, model=model)
    overwrite = own.run.overwrite
    if not overwrite:
        _check_earlier(folder, runs)
    published = _has_shapes_of_7b(planned[0])
    for name, why_not in refused.items():
        note_aside(f"{name} will not be run: {one_line(why_not)}")
    if differences:
        print("Each run is what train makes of these flags, but for:")
        print("\n".join(f"- {line}" for line in differences), flush=True)
    made = report.Comparison(
        title=f"Methods compared on {model}",
        compared=[Compared(name=name, folder=folder, reason=reason) for name, reason in refused.items()],
        published=published,
        differences=differences,
    )
    written: list[Path] = []
    failed, stopped, child = False, None, _Child()
    # Around the whole loop: after a signal between two runs, too, how to continue must be printed.
    with stop_signals_to(child.take):
        for number, run in enumerate(runs, 1):
            print(f"\n{printable(str(run.folder))} ({number} of {len(runs)})", flush=True)
            status, reason = 0, refused.get(run.name)
            if reason is None:
                try:
                    status, reason = _train(run, folder, child, overwrite=overwrite)
                except _StoppedError as error:
                    stopped = error.status
                    break
            if reason is not None:
                refused[run.name] = reason
                print(printable(f"{run.folder} is left out: {reason}"), flush=True)
            failed |= status == EXIT_BUG and not _OUT_OF_MEMORY.search(reason or "")
            made = replace(made, compared=[*made.compared, _compared(run, folder, reason)])
            written = made.write(folder)
    some = any(run.reason is None for run in made.compared)
    if some:
        _show(made, written)
    if stopped is not None:
        which = "without --overwrite and with" if overwrite else "with"
        named = quoted(str(folder))
        print(f"Stopped. The same command {which} --output_dir {named} goes on here.", flush=True)
        return stopped
    if not some:
        raise UserError("no method could be trained; the reasons are above")
    return EXIT_BUG if failed else 0


def _compared(run: Planned, folder: Path, reason: str | None) -> Compared:
    return Compared(
        name=run.name if reason is None else run.folder,
        folder=_run_folder(folder, run),
        command=" ".join(map(quoted, ["falcon-qlora", "train", *run.words])),
        reason=reason,
    )


def _show(made: report.Comparison, written: list[Path]) -> None:
    print(f"\n{made.markdown()}\nWritten: {printable(', '.join(map(str, written)))}", flush=True)


def _has_shapes_of_7b(planned: Planned) -> bool:
    """Whether the published figures are of this model. Also refuses a model that is not a Falcon, early."""
    quiet_libraries()
    from falcon_qlora.models.locate import find_config

    settings = planned.configuration.model
    model = find_config(settings.model_name_or_path, revision=settings.model_revision)
    shapes = (model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.vocab_size)
    return shapes == (4544, 32, 71, 65_024)


def _run_folder(folder: Path, run: Planned) -> Path:
    # One level down, as a folder that holds an `adapter` is a run itself.
    return folder / RUNS / run.folder


def _check_earlier(folder: Path, runs: list[Planned]) -> None:
    for run in runs:
        directory = RunDirectory(_run_folder(folder, run))
        if not directory.holds_run():
            continue
        advice = f"give --overwrite, remove {directory}, or name another folder"
        if not plan.read_alike(directory.path, run.configuration):
            raise UserError(f"{directory} holds a run with other settings: {advice}")
        gpus = run.configuration.extra.gpus
        if directory.summary_file.exists() and gpus not in (None, directory.read("summary")["world_size"]):
            raise UserError(f"{directory} holds a run on another number of GPUs: {advice}")


class _StoppedError(Exception):
    """The comparison was asked to stop; it exits with `status`, that of the stopped run."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class _Child:
    """The training command, on this terminal. Signals that ask this process to stop are passed on to it."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def take(self, number: int, frame: Any) -> None:
        self.asked = number
        if self._process is not None:
            # It already got Ctrl-C from the terminal, and takes two signals within a moment as one request.
            self._process.send_signal(number)

    def run(self, command: list[str]) -> tuple[int, list[str]]:
        """The exit status of a command, and its last lines on standard error."""
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        if self.asked is not None:
            self._process.send_signal(self.asked)  # it came while the process was being started
        told: list[str] = []
        for line in self._process.stderr or ():
            text = line.decode(errors="replace")
            print(text, end="", file=sys.stderr, flush=True)
            told.append(text.rstrip())
            del told[:-_REASON_LINES]
        status = self._process.wait()
        self._process = None
        return (128 - status if status < 0 else status), told


def _train(run: Planned, folder: Path, child: _Child, *, overwrite: bool) -> tuple[int, str | None]:
    """Train unless the run is finished; return the exit status, and the reason if training failed.

    An interrupted run resumes from its last whole checkpoint; one without a checkpoint starts again.

    Raises:
        _StoppedError: if a signal has stopped the comparison or the run.
    """
    directory = RunDirectory(_run_folder(folder, run))
    where: dict[str, Any] = {"output_dir": str(directory)}
    if overwrite:
        where["overwrite"] = True
    elif directory.summary_file.exists():
        print(printable(f"trained already: {directory}"), flush=True)
        return 0, None
    else:
        checkpoint, _ = manifest.newest_whole(directory.checkpoints)
        if checkpoint is not None and manifest.read_manifest(checkpoint).get("resumable"):
            where["resume"] = LATEST
        elif directory.holds_run():
            where["overwrite"] = True
    if child.asked is not None:
        raise _StoppedError(128 + child.asked)
    words = launcher.tied("falcon_qlora", "train", *config.as_words(run.settings | where))
    command = [sys.executable, "-m", *words]
    status, told = child.run(command)
    if status and (child.asked is not None or status not in (EXIT_USER_ERROR, EXIT_BUG)):
        raise _StoppedError(status)
    return status, _reason(told) if status else None


def _reason(told: list[str]) -> str:
    """The last error of a failed command: our own error line, or the end of a traceback."""
    errors = [line for line in told if line.startswith("error: ")]
    lines = [line for line in told if line.strip() and not line.startswith(" ")]
    return errors[-1].removeprefix("error: ") if errors else (lines or ["it ended without a word"])[-1]
