"""`falcon-qlora compare`: train by several methods in turn on the same rows, the results side by side.

Every method is trained by the command ``falcon-qlora train`` in a process of its own, so that its losses are
those of that command and its memory is nobody else's.
"""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from falcon_qlora import config
from falcon_qlora.checkpoint import manifest
from falcon_qlora.commands.train import stop_signals_to
from falcon_qlora.commands.words import split
from falcon_qlora.common.errors import EXIT_BUG, EXIT_USER_ERROR, UserError
from falcon_qlora.common.settings import setting
from falcon_qlora.compare import plan, report
from falcon_qlora.compare.plan import METHODS, Planned
from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import LaunchArguments
from falcon_qlora.run_folder.choose import choose
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
    recipes: list[str] = setting(
        [], "METHOD=RECIPE: the settings of a method; unset: those of its recipe lit-*."
    )
    learning_rates: list[str] = setting([], "METHOD=RATE: a learning rate for one method.")


# What compare itself heeds: all of its own settings but those that say which processes are started.
_OWN = ("methods", "recipes", "learning_rates", "output_dir", "overwrite")


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    given = config.read_flags(argv, verb="compare", extra_arguments=CompareArguments)
    asked = config.configure(plan.for_any_method(given), extra_arguments=CompareArguments)
    ours: CompareArguments = asked.extra
    planned = plan.plan(
        {name: value for name, value in given.items() if name not in _OWN},
        names=split(ours.methods),
        recipes=split(ours.recipes),
        learning_rates=split(ours.learning_rates),
    )
    configurations, refused = _configurations(planned)
    first = next(iter(configurations.values()))
    model = first.model.model_name_or_path
    say_loading()
    from falcon_qlora.commands.first_look import look

    look(first)
    published = _has_shapes_of_7b(first)
    folder = choose(asked.run.output_dir, model=model, settings="comparison")
    overwrite = asked.run.overwrite
    if not overwrite:
        _check_earlier(folder, configurations, ours.gpus)
    done: list[report.Compared] = []
    failed = False
    child = _Child()
    # All along: a signal between two methods, too, must find how to go on told.
    with stop_signals_to(child.take):
        for number, method in enumerate(planned, 1):
            print(f"\n{method.name} ({number} of {len(planned)})", flush=True)
            reason: str | None = refused.get(method.name)
            if reason is None:
                status, reason = _train(method, folder, child, overwrite=overwrite)
                if status not in (0, EXIT_USER_ERROR, EXIT_BUG):
                    which = "without --overwrite and with" if overwrite else "with"
                    named = shlex.quote(str(folder))
                    print(f"Stopped. The same command {which} --output_dir {named} goes on here.", flush=True)
                    return status
                failed |= status == EXIT_BUG and not _OUT_OF_MEMORY.search(reason or "")
            if reason is not None:
                print(f"{method.name} is left out: {reason}", flush=True)
            command = shlex.join(["falcon-qlora", "train", *method.words])
            where, recipe = _run_folder(folder, method.name), method.settings["recipe"]
            done.append(
                report.Compared(
                    method=method.name, folder=where, recipe=recipe, command=command, reason=reason
                )
            )
            made = report.Comparison(title=f"Methods compared on {model}", compared=done, published=published)
            written = made.write(folder)
    print(f"\n{made.markdown()}\nWritten: {', '.join(map(str, written))}", flush=True)
    if all(each.reason is not None for each in done):
        raise UserError("no method could be trained; the reasons are above")
    return EXIT_BUG if failed else 0


def _configurations(planned: list[Planned]) -> tuple[dict[str, Configuration], dict[str, str]]:
    """Each method's configuration, read as `train` will, or why it cannot be trained so."""
    found: dict[str, Configuration] = {}
    refused: dict[str, str] = {}
    for method in planned:
        try:
            configuration = config.configure(method.settings, extra_arguments=LaunchArguments)
            if configuration.data.eval_split is not None:
                method.settings["eval_on_start"] = True
                configuration = config.configure(method.settings, extra_arguments=LaunchArguments)
        except UserError as error:
            refused[method.name] = str(error)
            continue
        if method.name == "qlora" and configuration.model.quantize_mode == "16bit":
            refused[method.name] = "QLoRA is LoRA on a quantized base, and --quantize_mode is 16bit"
        else:
            found[method.name] = configuration
    if not found:
        raise UserError(next(iter(refused.values())))
    plan.check_same_rows(found)
    return found, refused


def _has_shapes_of_7b(configuration: Configuration) -> bool:
    """Whether the reference's figures are of this model; also refuses one that is no Falcon, at once."""
    quiet_libraries()
    from falcon_qlora.models.locate import find_config

    settings = configuration.model
    model = find_config(settings.model_name_or_path, revision=settings.model_revision)
    shapes = (model.hidden_size, model.num_hidden_layers, model.num_attention_heads, model.vocab_size)
    return shapes == (4544, 32, 71, 65_024)


def _run_folder(folder: Path, name: str) -> Path:
    # A level down: a folder that holds an `adapter` is a run itself.
    return folder / "runs" / name


def _check_earlier(folder: Path, configurations: dict[str, Configuration], gpus: int | None) -> None:
    for name, configuration in configurations.items():
        directory = RunDirectory(_run_folder(folder, name))
        if not directory.holds_run():
            continue
        advice = f"give --overwrite, remove {directory}, or name another folder"
        if not plan.read_alike(directory.path, configuration):
            raise UserError(f"{directory} holds a run with other settings: {advice}")
        if directory.summary_file.exists() and gpus not in (None, directory.read("summary")["world_size"]):
            raise UserError(f"{directory} holds a run of another number of processes: {advice}")


class _Child:
    """The command that trains, on this terminal. What asks this process to stop is passed on to it."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def take(self, number: int, frame: Any) -> None:
        self.asked = number
        # Ctrl-C reaches the child as well; what it makes of it decides.
        if self._process is not None and number != signal.SIGINT:
            self._process.send_signal(number)

    def run(self, command: list[str]) -> tuple[int, list[str]]:
        """The exit status of a command, and its last lines on standard error."""
        self._process = subprocess.Popen(command, stderr=subprocess.PIPE)
        if self.asked is not None:
            self._process.send_signal(self.asked)  # while it was being started
        told: list[str] = []
        for line in self._process.stderr or ():
            text = line.decode(errors="replace")
            print(text, end="", file=sys.stderr, flush=True)
            told.append(text.rstrip())
            del told[:-_REASON_LINES]
        status = self._process.wait()
        self._process = None
        return (128 - status if status < 0 else status), told


def _train(method: Planned, folder: Path, child: _Child, *, overwrite: bool) -> tuple[int, str | None]:
    """Train one method, unless that is done: the exit status, and why it could not be.

    A run that was cut off goes on from its last whole checkpoint; one without any begins again.
    """
    directory = RunDirectory(_run_folder(folder, method.name))
    where: dict[str, Any] = {"output_dir": str(directory)}
    if overwrite:
        where["overwrite"] = True
    elif directory.summary_file.exists():
        print(f"trained already: {directory}", flush=True)
        return 0, None
    else:
        checkpoint, _ = manifest.newest_whole(directory.checkpoints)
        if checkpoint is not None and manifest.read_manifest(checkpoint).get("resumable"):
            where["resume"] = "latest"
        elif directory.holds_run():
            where["overwrite"] = True
    if child.asked is not None:
        return 128 + child.asked, None
    command = [sys.executable, "-m", "falcon_qlora", "train", *config.as_words(method.settings | where)]
    status, told = child.run(command)
    if child.asked is not None and (status or not directory.summary_file.exists()):
        return 128 + child.asked, None
    if status == 0 and not directory.summary_file.exists():
        return 128 + signal.SIGINT, None  # asked to stop by another, it has saved itself and ended in order
    return status, _reason(told) if status else None


def _reason(told: list[str]) -> str:
    """What a failed command said last: our own error line, or the end of a traceback."""
    errors = [line for line in told if line.startswith("error: ")]
    lines = [line for line in told if line.strip() and not line.startswith(" ")]
    return errors[-1].removeprefix("error: ") if errors else (lines or ["it ended without a word"])[-1]
