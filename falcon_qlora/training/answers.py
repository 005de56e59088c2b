"""Whether the answers that a run trains on teach the model to end them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from falcon_qlora.data.packing import MicroBatch


@dataclass
class Answers:
    """Counts answers: unbroken stretches of target tokens within a document.

    Args:
        end_token: its id; None where the tokenizer has none.
        max_length: tokens of a sequence: a document of so many may have been cut.

    Attributes:
        answers: how many there were.
        ended: those with the end token among their targets.
        cut: those without, at the end of such a document.
    """

    end_token: int | None
    max_length: int
    answers: int = 0
    ended: int = 0
    cut: int = 0

    def see(self, batch: MicroBatch) -> None:
        """Count the answers of a micro-batch, which is on the host."""
        places = batch.target_positions.numpy() + 1
        if not len(places):
            return
        firsts = np.flatnonzero(np.diff(places, prepend=-1) != 1)
        ended = np.logical_or.reduceat(batch.targets.numpy() == self.end_token, firsts)
        after = places[np.append(firsts[1:], len(places)) - 1] + 1
        full = np.cumsum(batch.lengths)[np.array(batch.lengths) == self.max_length]
        self.answers += len(firsts)
        self.ended += int(ended.sum())
        self.cut += int((~ended & np.isin(after, full)).sum())
