"""``falcon-qlora bench`` with other tools' recipes beside ours.

    python -m tests.benchmarks.against --models random:falcon-7b --variants stock,litgpt,ours --tokens 8192

Takes the flags of `falcon-qlora bench`. Its variants are also ``stock`` and ``stock-fast`` (Transformers,
PEFT and TRL; with ``-8bit`` and ``-16bit``), ``litgpt`` and ``litgpt-compiled``; with ``--gpus`` also
``recipe``, the 2023 guide's, and the guide's own figures come first. ``--recipe_share 0.05`` is the
share of the recipe's steps that ``--whole_run`` runs, the others extrapolated.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from falcon_qlora.bench import variants
from falcon_qlora.bench.scaling import COMMANDS
from falcon_qlora.commands import bench
from falcon_qlora.common.errors import EXIT_USER_ERROR, UserError
from tests.benchmarks import litgpt, recipe, stock

PEERS = {variant.name: variant for variant in (*stock.variants(), *litgpt.VARIANTS)}


@contextmanager
def entered() -> Iterator[None]:
    """Within the block the other tools' variants are in the tables of the bench."""
    variants.VARIANTS.update(PEERS)
    variants.DEFAULT[:0] = ["stock", "stock-fast"]
    COMMANDS["recipe"] = recipe.COMMAND
    try:
        yield
    finally:
        for name in PEERS:
            del variants.VARIANTS[name]
        del variants.DEFAULT[:2], COMMANDS["recipe"]


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--recipe_share", type=float, default=0.05)
    own, rest = parser.parse_known_args(argv)
    try:
        if not 0 < own.recipe_share <= 1:
            raise UserError(f"--recipe_share {own.recipe_share:g}: must be above 0 and at most 1")
        if "--gpus" in rest:
            print(recipe.published(), "\n", sep="", flush=True)
        with entered():
            return bench.main(rest, whole_runs=functools.partial(recipe.whole_runs, share=own.recipe_share))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USER_ERROR


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
