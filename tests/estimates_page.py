"""README's table of what fits which card, its picture, and the guide's example, as the command says them.

``python -m tests.estimates_page`` writes them.
"""

from __future__ import annotations

import contextlib
import io
from pathlib import Path

from falcon_qlora.__main__ import main

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "tests/benchmarks/what_fits.png"
COMMANDS = {
    ROOT / "README.md": "estimate --table --method lora -q 4bit",
    ROOT / "falcon_qlora/guide/choosing.md": "estimate -m tiiuae/falcon-7b --max_steps 200 --gpu 4090",
}
_BEGIN, _END = "<!-- Written by `python -m tests.estimates_page`: falcon-qlora {} -->\n", "<!-- end -->\n"


def output(command: str) -> str:
    """What a command prints, in columns that hold its tables."""
    told = io.StringIO()
    with contextlib.redirect_stdout(told), contextlib.redirect_stderr(io.StringIO()):
        assert main(command.split()) == 0
    return "".join(f"{line.rstrip()}\n" for line in told.getvalue().splitlines())


def text(page: Path) -> str:
    """The page with its command's present output."""
    command = COMMANDS[page]
    begin = _BEGIN.format(command)
    before, _, rest = page.read_text(encoding="utf-8").partition(begin)
    _, end, after = rest.partition(_END)
    assert end, f"{page} has no {begin} … {_END}"
    told = output(command)
    if "--table" not in command:
        told = f"```text\n{told}```\n"
    return f"{before}{begin}\n{told}\n{_END}{after}"


if __name__ == "__main__":
    for page in COMMANDS:
        page.write_text(text(page), encoding="utf-8")
    assert main([*COMMANDS[ROOT / "README.md"].split(), "--plot", str(PICTURE)]) == 0
