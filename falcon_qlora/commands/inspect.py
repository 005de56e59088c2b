"""``falcon-qlora inspect DIR``: what a run, checkpoint, adapter or merge is, and whether it is whole."""

from __future__ import annotations

from pathlib import Path

from falcon_qlora.commands.inspection import inspect_folder
from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError
from falcon_qlora.config.verbs import VERBS
from falcon_qlora.terminal.console import print_plain
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

_HELP = f"""falcon-qlora inspect DIR

Say what DIR is - a run, a checkpoint, an adapter, a merge, a model - what it was trained on, and whether
it is whole: every expected tensor there, of its shape, finite, and what its manifest or certificate says.

The exit status is 0 where it is whole and 2 where it is not. An adapter that is whole and changes nothing,
such as that of a first step at rate 0, is called "not trained yet", with exit status 0. Nothing in DIR is
executed or downloaded.

Example, after that of train --help:
  falcon-qlora inspect {VERBS["inspect"].examples[0]}"""


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    if any(word in ("-h", "--help", "--help-all") for word in argv):
        print(_HELP)
        return 0
    if len(argv) != 1 or argv[0].startswith("-"):
        raise UserError("name one folder: falcon-qlora inspect DIR")

    if Path(argv[0]).is_file():
        raise UserError(f"{argv[0]}: this is a file; name the folder that it lies in")
    if not Path(argv[0]).is_dir():
        raise UserError(f"{argv[0]}: there is no such folder")
    say_loading(aside=True)
    quiet_libraries()
    found = inspect_folder(Path(argv[0]))
    print_plain(f"{argv[0]}: {found.kind}, {found.state}")
    width = max((len(label) for label, _ in found.rows), default=0) + 2
    for label, text in found.rows:
        print_plain(f"  {label.ljust(width)}{text}")
    for fault in found.faults:
        print_plain(f"  fault: {fault}")
    return EXIT_USER_ERROR if found.faults else 0
