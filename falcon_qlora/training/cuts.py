"""Which cut of a step into micro-batches is the fastest on a card: pure functions. Imports no torch.

A token weighs the same in every cut, so a cut decides speed and memory, and the rounding of sums. The models
of a step's time and of its memory know the settings and the card's size, and nothing of what is free.
"""

from __future__ import annotations

import math
from dataclasses import replace

from falcon_qlora.config import Configuration
from falcon_qlora.config.arguments import RunArguments
from falcon_qlora.training.cards import MEASURED, Card
from falcon_qlora.training.estimate import Estimate, Estimator
from falcon_qlora.training.rows import global_batch

# Speeds so close are one: then the cut that takes less memory is better.
_TIE = 0.01
# The largest micro-batches whose speed was measured: larger ones were hardly faster where memory let them be.
MOST_TOKENS = 16384


def given(run: RunArguments) -> int | None:
    """The tokens that `--batch_tokens` names; None for auto."""
    return None if run.batch_tokens == "auto" else int(run.batch_tokens)


def of_b(configuration: Configuration) -> int:
    """The tokens of a micro-batch that `-b` says."""
    return configuration.run.per_device_train_batch_size * configuration.data.max_length


def candidates(sequences: int) -> list[int]:
    """Sequences of a micro-batch, one for each number of micro-batches that this many can be cut into."""
    return sorted({math.ceil(sequences / count) for count in range(1, sequences + 1)})


def decide(
    estimator: Estimator, card: Card, *, tokens: int | None = None, gib: float | None = None
) -> Estimate:
    """The fastest cut on a card, and what its blocks keep; the smallest, if none fits. A pure function.

    Args:
        tokens: of a micro-batch, where that is fixed and only what is recomputed is open.
        gib: of the card's memory, so much is reckoned with; None: all of it.
    """
    within = card if gib is None else replace(card, gib=gib)
    if tokens is not None:
        return estimator.on(within, tokens=tokens)
    # Where ceilings are not known, cuts compare as they would on the card that was measured.
    known = (
        within
        if card.bf16
        else replace(within, bf16=MEASURED.bf16, fp8=MEASURED.fp8, terabytes=MEASURED.terabytes)
    )
    batch = global_batch(estimator.configuration.run, estimator.processes)
    length = estimator.configuration.data.max_length
    counts = candidates(math.ceil(batch / estimator.processes))
    cuts = [count * length for count in counts if count * length <= MOST_TOKENS] or [counts[0] * length]
    found = [estimator.on(known, tokens=cut) for cut in cuts]
    fitting = [each for each in found if each.has_room]
    if fitting:
        fastest = max(each.tokens_per_second or 0.0 for each in fitting)
        close = [each for each in fitting if (each.tokens_per_second or 0.0) >= (1 - _TIE) * fastest]
        best = min(close, key=lambda each: (each.card_gib, each.micro_batch_tokens))
    else:
        best = min(found, key=lambda each: (each.card_gib, each.micro_batch_tokens))
    return best if known is within else estimator.on(within, tokens=best.micro_batch_tokens)


def as_trained(estimator: Estimator, card: Card | None) -> Estimate:
    """The run on a card, cut as training would cut it from its first step on."""
    configuration = estimator.configuration
    tokens = given(configuration.run)
    if not configuration.data.packing or (tokens is None and (card is None or estimator.shares_out(card))):
        return estimator.on(card)
    return estimator.on(card, tokens=tokens) if card is None else decide(estimator, card, tokens=tokens)
