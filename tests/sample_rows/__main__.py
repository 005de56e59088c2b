"""``python -m tests.sample_rows build``: write the sample rows and prompts anew, the same each time."""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path
from random import Random

from falcon_qlora.data.sample_data import path, prompts_path
from tests.sample_rows.questions import KINDS, Task

# Asked before and after fine-tuning; what they ask for is known to the packaged model and in no row.
PROMPTS = [
    "What is the opposite of cold?",
    "Where does a whale live?",
    "Name the capital of Japan.",
]
_HELD_OUT_ANSWERS = {
    "The opposite of cold is hot.",
    "A whale lives in the sea.",
    "The capital of Japan is Tokyo.",
}


def rows(count: int, seed: int) -> list[Task]:
    """`count` different tasks, every kind as often as any other that has enough, none that answers a prompt."""
    rng = Random(seed)
    tasks: dict[tuple[str, str], Task] = {}
    for kind in itertools.cycle(sorted(KINDS)):
        if len(tasks) == count:
            break
        task = KINDS[kind](rng)
        if task.output not in _HELD_OUT_ANSWERS and task.instruction not in PROMPTS:
            tasks.setdefault((task.instruction, task.input), task)
    return rng.sample(list(tasks.values()), count)


def build(folder: Path, count: int, seed: int) -> None:
    """Write ``instructions.jsonl`` and ``prompts.json`` to `folder`."""
    lines = [
        json.dumps({"instruction": task.instruction, "input": task.input, "output": task.output})
        for task in rows(count, seed)
    ]
    (folder / path().name).write_text("\n".join(lines) + "\n", encoding="utf-8")
    (folder / prompts_path().name).write_text(json.dumps(PROMPTS, indent=1) + "\n", encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run ``build`` or ``path``."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.sample_rows", description=__doc__, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    flags = verbs.add_parser("build", help="write the rows and prompts")
    flags.add_argument("--out", type=Path, default=path().parent, help="folder to write")
    flags.add_argument("--rows", type=int, default=800)
    flags.add_argument("--seed", type=int, default=0)
    verbs.add_parser("path", help="print where the rows are")
    arguments = parser.parse_args(argv)
    if arguments.verb == "path":
        print(path())
    else:
        build(arguments.out, arguments.rows, arguments.seed)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
