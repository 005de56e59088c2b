"""The flags of ``falcon-qlora bench`` beside those of a run, and how lists of them are read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from dataclasses import field as setting
from typing import Literal

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import counted


@dataclass(kw_only=True)
class BenchArguments:
    """What is compared, how long, and where the figures go."""

    _argument_group_name = "Benchmark"

    models: list[str] | None = setting(
        default=None,
        metadata={
            "help": "Models, also with commas between; unset: --model_name_or_path, else random:falcon-7b."
        },
    )
    variants: list[str] | None = setting(
        default=None,
        metadata={
            "help": "What to compare, in the table's order, also with commas between; unset: the usual."
        },
    )
    list_variants: bool = setting(default=False, metadata={"help": "Show the variants there are, and end."})
    against: Literal["litgpt"] | None = setting(
        default=None, metadata={"help": "A peer to measure too; it must be installed."}
    )
    tokens: list[str] = setting(
        default_factory=lambda: ["8192"],
        metadata={"help": "Tokens of a micro batch, one or several; stock variants run at the first."},
    )
    whole_run: float | None = setting(
        default=None,
        metadata={
            "help": "With --gpus: time whole runs of 200 --steps of 16,384 --tokens, to the adapter on disk, "
            "with cold and warm caches; the recipe over this share of the same rows, the rest extrapolated."
        },
    )
    rounds: int = setting(default=5, metadata={"help": "How often every variant has its turn."})
    warmup: int | None = setting(
        default=None, metadata={"help": "Untimed steps before the timed ones; unset: 3, with --gpus 10."}
    )
    gpus: list[str] | None = setting(
        default=None,
        metadata={
            "help": "Run the real command on so many GPUs, one after the other (1,2,4,8): the guide's recipe "
            "and ours, 20 timed --steps each. --variants are then recipe, ours, ours-fp8."
        },
    )
    quantize_modes: list[str] | None = setting(
        default=None, metadata={"help": "With --gpus: how bases are stored, one or several."}
    )
    fixed: Literal["work", "global"] = setting(
        default="work",
        metadata={
            "help": "With --gpus: each GPU has the same work on any number of them, or a step has "
            "--global_tokens over all."
        },
    )
    global_tokens: int = setting(default=131072, metadata={"help": "Of a step with --fixed global."})
    lengths: Literal["even", "uneven"] = setting(
        default="even",
        metadata={
            "help": "With --gpus and made-up rows: documents of --max_length tokens, or uneven as guanaco's."
        },
    )
    minutes: float | None = setting(
        default=None,
        metadata={"help": "Begin no further round of a model, with --gpus no further row, after this long."},
    )
    csv: str | None = setting(default=None, metadata={"help": "Append a row a variant to this CSV."})
    plot: str | None = setting(
        default=None,
        metadata={"help": "PNG of tokens/s against peak memory; with --gpus of samples/s over GPUs."},
    )
    commit: str | None = setting(
        default=None, metadata={"help": "For the record, where this is no checkout."}
    )


def names(flag: str, given: Sequence[str]) -> list[str]:
    """What a flag names, in words or with commas between; each once.

    Raises:
        UserError: if it names nothing.
    """
    found = [part.strip() for word in given for part in word.split(",") if part.strip()]
    if not found:
        raise UserError(f"{flag}: names none")
    return list(dict.fromkeys(found))


def numbers(flag: str, given: Sequence[str]) -> list[int]:
    """The whole numbers above 0 that a flag names; each once.

    Raises:
        UserError: if it names nothing, or something else.
    """
    found = names(flag, given)
    for word in found:
        if not word.isdecimal() or int(word) < 1:
            raise UserError(f"{flag}: {word!r} is not a whole number above 0")
    return list(dict.fromkeys(int(word) for word in found))


def said_of_broken(rows: int) -> str:
    """What is said at the end, where rows of the table broke."""
    return f"{counted(rows, 'row')} broke; the table says how"
