"""``falcon-qlora inspect DIR``: what a run, checkpoint, adapter or merge is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from falcon_qlora.commands.inspection import Inspection, inspect_folder
from falcon_qlora.common.by_url import opened
from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError
from falcon_qlora.common.stores import is_address
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.terminal.console import print_plain
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.markdown import escaped, table
from falcon_qlora.terminal.output import say_loading

_HOLDS = ("passed", "recorded")
_NOT_RECORDED = "not recorded: an earlier release made this run"

_HELP = f"""falcon-qlora inspect DIR [--markdown]

Say what DIR is - a run, a checkpoint, an adapter, a merge, a model - what it was trained on, and whether
it is whole: every expected tensor there, of its shape, finite, and what its manifest or certificate says.

The exit status is 0 where it is whole and 2 where it is not. An adapter that is whole and changes nothing,
such as that of a first step at rate 0, is called "not trained yet", with exit status 0. Nothing in DIR is
executed or downloaded; an address, s3://… or gs://…, is copied here first. Of a finished run it also says
what was proved at its end: the section "checks" of summary.json. A check that failed there changes no exit
status here.

  --markdown   print the same as a sheet in Markdown, to hand on

Example, after that of train --help:
  falcon-qlora inspect {VERBS["inspect"].examples[0]}"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    if any(word in ("-h", "--help", "--help-all") for word in argv):
        print(_HELP)
        return 0
    as_markdown = "--markdown" in argv
    argv = [word for word in argv if word != "--markdown"]
    if unknown := [word for word in argv if word.startswith("-")]:
        flags = f"unknown flag{'s' * (len(unknown) > 1)} {', '.join(unknown)}"
        raise UserError(f"{flags}: inspect takes --markdown alone")
    if len(argv) != 1 or not argv[0]:
        raise UserError("name one folder: falcon-qlora inspect DIR [--markdown]")

    folder = opened(argv[0], "inspect", whole=True) if is_address(argv[0]) else Path(argv[0])
    if folder.is_file():
        raise UserError(
            f"{argv[0]}: this is a file; name the folder of its run or model, or have rows shown by "
            "falcon-qlora data --dataset_name FILE"
        )
    if not folder.is_dir():
        raise UserError(f"{argv[0]}: there is no such folder")
    say_loading(aside=True)
    quiet_libraries()
    found = inspect_folder(folder)
    for line in (_sheet if as_markdown else _lines)(argv[0], found):
        print_plain(line)
    return EXIT_USER_ERROR if found.faults else 0


def _lines(name: str, found: Inspection) -> list[str]:
    rows = list(found.rows)
    rows += [
        (label, told if state in _HOLDS else f"{state.upper()}: {told}")
        for label, state, told in found.checks or ()
    ]
    if found.checks == []:
        rows.append(("checks", _NOT_RECORDED))
    width = max((len(label) for label, _ in rows), default=0) + 2
    return [
        f"{name}: {found.kind}, {found.state}",
        *(f"  {label.ljust(width)}{text}" for label, text in rows),
        *(f"  fault: {fault}" for fault in found.faults),
    ]


def _sheet(name: str, found: Inspection) -> list[str]:
    lines = [f"# {escaped(name)}: {found.kind}, {found.state}", "", *table(("", ""), found.rows)]
    if found.checks is not None:
        lines += ["", "## What was proved at the end of the run", ""]
        lines += table(("check", "state", "figure"), found.checks) if found.checks else [_NOT_RECORDED]
    if found.faults:
        lines += ["", "## Faults", "", *(f"- {escaped(fault)}" for fault in found.faults)]
    return lines
