"""``python -m tests.tiny_model build --out DIR`` makes the packaged model anew.

``corpus`` and ``train`` are its two halves, so that the text can be gathered on one machine and the training
done on another.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    """Run ``corpus``, ``train`` or both (``build``)."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.tiny_model", description=__doc__, allow_abbrev=False
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    for verb, help_text in (
        ("corpus", "gather the text and train the tokenizer (CPU)"),
        ("train", "train on a gathered corpus (GPU, or slowly CPU)"),
        ("build", "both"),
    ):
        flags = verbs.add_parser(verb, help=help_text, allow_abbrev=False)
        flags.add_argument("--out", type=Path, required=True, help="folder to write")
        flags.add_argument("--seed", type=int, default=0)
        if verb != "train":
            flags.add_argument("--tokens", type=int, default=20_000_000, help="size of the training text")
        if verb != "corpus":
            flags.add_argument(
                "--corpus", type=Path, required=verb == "train", help="folder that corpus wrote"
            )
            flags.add_argument("--minutes", type=float, default=60, help="stop after this long")
            flags.add_argument("--epochs", type=float, default=16, help="stop after so many passes")
            flags.add_argument("--batch_tokens", type=int, default=131_072, help="tokens a step")
            flags.add_argument("--learning_rate", type=float, default=3e-3)
            flags.add_argument("--no_compile", action="store_true", help="do not compile the model")
    arguments = parser.parse_args(argv)

    corpus = getattr(arguments, "corpus", None) or arguments.out
    if arguments.verb == "corpus" or (arguments.verb == "build" and arguments.corpus is None):
        from tests.tiny_model.corpus import gather

        gather(corpus, tokens=arguments.tokens, seed=arguments.seed)
    if arguments.verb != "corpus":
        from tests.tiny_model.train import Settings, train

        settings = Settings(
            minutes=arguments.minutes,
            epochs=arguments.epochs,
            batch_tokens=arguments.batch_tokens,
            learning_rate=arguments.learning_rate,
            compile_model=not arguments.no_compile,
            seed=arguments.seed,
        )
        train(corpus, arguments.out, settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
