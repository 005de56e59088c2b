"""Benchmarks: variants of one training step, paired on the same rows; and whole commands on several GPUs.

For steps, `variants.py` lists the variants, `runners.py` builds one, and `measure.py` times them in rounds.
For commands, `scaling.py` does everything. `tables.py` writes the results. Other tools' recipes, to compare
with, are in ``tests/benchmarks``.
"""

import sys


def say(message: str) -> None:
    """Report progress on standard error: standard output is for the table alone."""
    print(f"- {message}", file=sys.stderr, flush=True)
