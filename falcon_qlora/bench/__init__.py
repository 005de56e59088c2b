"""Paired benchmarks: variants of one training step in turn on the same rows; whole commands on several GPUs.

Of steps `variants.py` names what there is, `runners.py` builds one, `measure.py` times them in rounds. Of
commands `scaling.py` does all of it. `tables.py` writes what was found. Other tools' recipes, which can be
entered beside ours, are in ``tests/benchmarks``.
"""

import sys


def say(message: str) -> None:
    """Tell what is going on; the table alone goes to standard output."""
    print(f"- {message}", file=sys.stderr, flush=True)
