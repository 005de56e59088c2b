"""How a process's part of a step is cut into micro-batches, and what they recompute: `--batch_tokens`.

With `auto` a run takes the cut that `cuts.decide` finds for its cards: the same command makes the same sums,
whatever is free. If the first step shows that there is less memory than the model says, all ranks take the
next smaller cut and begin the step again. It is computed beside as much taken memory as the optimizer's state
will take from then on.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.quantities import counted
from falcon_qlora.config import Configuration
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.training.cards import Card, card_here
from falcon_qlora.training.cuts import decide, given, of_b
from falcon_qlora.training.estimate import Estimate, Estimator, micro_batches_of, of_rows
from falcon_qlora.training.rows import global_batch
from falcon_qlora.training.same_run import recorded_cut

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from falcon_qlora.data.packing import Plan
    from falcon_qlora.models.step_memory import Checkpointing
    from falcon_qlora.training.activations import Activations

# Where memory has run out, the share of it that the next cut may take.
_LESS = 0.85


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What was decided.

    Attributes:
        tokens: that a micro-batch may hold at most.
        part: tokens of a process's even part of a step.
        micro_batches: of a step on each process.
        why: for the terminal.
        found: by the memory model; None where what blocks keep depends on what is free.
        gib: of the card's memory that was reckoned with; None: all of it.
    """

    tokens: int
    part: int
    micro_batches: int
    why: str
    found: Estimate | None = None
    gib: float | None = None

    @property
    def blocks(self) -> list[Checkpointing] | None:
        return None if self.found is None else self.found.blocks

    @property
    def keeps_fp8(self) -> bool:
        return self.found is not None and "weights in FP8" in self.found.parts

    @property
    def filled(self) -> int:
        """Tokens of a micro-batch, no more than there are to fill it."""
        return min(self.tokens, self.part)

    def told(self) -> str:
        count = counted(self.micro_batches, "micro-batch", "micro-batches")
        return f"{count} of {self.filled:,} tokens on each device ({self.why})"


@dataclass(kw_only=True)
class Cutter:
    """A run's cut, and the smaller ones if memory runs out in its first step; the same on all processes.

    Attributes:
        cut: now.
        notes: what a user should know of it.
        may_shrink: whether the first step may take a smaller one.
        without: ranks whose memory has run out, until that is told.
        as_before: see `_Wanted`.
        activations: what `keep` chose.
    """

    cut: Cut
    notes: list[str] = field(default_factory=list)
    may_shrink: bool = False
    without: list[int] = field(default_factory=list)
    as_before: bool = False
    activations: Activations = field(init=False)
    _estimator: Estimator | None = None
    _card: Card | None = None
    _fixed: int | None = None
    _choose: Callable[..., Activations] = field(init=False, repr=False)

    def keep(self, choose: Callable[..., Activations]) -> None:
        """Have the blocks keep what was decided; `choose`: `choose_activations` but for the cut."""
        self._choose = choose
        self.activations = choose(cut=self.cut)

    @property
    def optimizer_bytes(self) -> int:
        """Of its state in PyTorch's allocator, by the memory model; 0 where that decides nothing."""
        return 0 if self.cut.found is None else self.cut.found.parts.get("optimizer", 0)

    def told_smaller(self) -> str | None:
        """What a user should know once a smaller cut has done, told once; None if none was taken."""
        if not self.without:
            return None
        ranks = f"{'rank' if len(self.without) == 1 else 'ranks'} {', '.join(map(str, self.without))}"
        self.without = []
        return (
            f"out of memory in the first step on {ranks}: all ranks began it again with {self.cut.told()}; "
            f"{self.activations.described()}"
        )

    def smaller(self, without: list[int]) -> bool:
        """Take the next cut that needs less memory; False: there is none.

        Args:
            without: ranks whose memory has run out.
        """
        if not self.may_shrink or self._estimator is None or self._card is None or self.cut.found is None:
            return False
        gib = self.cut.found.gib_for(_LESS)
        found = decide(self._estimator, self._card, tokens=self._fixed, gib=gib)
        if found.step_bytes >= self.cut.found.step_bytes:
            return False
        self.cut = _decided(found, "smaller, as memory had run out", part=self.cut.part, gib=gib)
        self.activations = self._choose(cut=self.cut, held_bytes=self.activations.held_bytes)
        self.without = sorted({*self.without, *without})
        return True

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps, see `recorded_cut`."""
        return {
            "tokens": self.cut.tokens,
            "checkpointing": None if self.cut.found is None else self.cut.found.checkpointing,
            "card_gib": None if self._card is None else self._card.gib,
            "gib": self.cut.gib,
            "as_before": self.as_before,
        }


def _decided(found: Estimate, why: str, *, part: int, gib: float | None = None) -> Cut:
    tokens, count = found.micro_batch_tokens, found.micro_batches
    return Cut(tokens=tokens, part=part, micro_batches=count, why=why, found=found, gib=gib)


def choose(
    configuration: Configuration,
    config: PreTrainedConfig,
    plan: Plan | None,
    *,
    reference: str | None,
    shared_out: bool,
    checkpoint: str | None,
) -> Cutter:
    """Decide a run's cut; all processes decide the same, for the smallest of their cards.

    Args:
        config: the model's.
        plan: of the run; None for a stream.
        reference: why blocks run on the reference path here; None: they do not.
        shared_out: whether the processes share out the weights.
        checkpoint: that the run resumes from.
    """
    run, data, processes = configuration.run, configuration.data, ranks.world_size()
    part = math.ceil(global_batch(run, processes) / processes) * data.max_length
    wanted = _Wanted(tokens=given(run), why="--batch_tokens")
    if checkpoint is not None and data.packing:
        wanted = _of_resumed(configuration, checkpoint)
    card, reference = _agreed(reference)
    as_b = None
    if not data.packing or card is None or shared_out:
        place = "on the CPU" if card is None else "as weights are shared out"
        as_b = f"-b, {place if data.packing else 'as rows are padded'}"
    elif wanted.as_before:
        as_b = wanted.why
    if as_b is not None or card is None:
        tokens = wanted.tokens or of_b(configuration)
        count = micro_batches_of(run, tokens=tokens, max_length=data.max_length, processes=processes)
        why = wanted.why if wanted.tokens else as_b or ""
        cut = Cut(tokens=tokens, part=part, micro_batches=count, why=why)
        return Cutter(cut=cut, notes=wanted.notes, as_before=wanted.as_before)
    rows = of_rows(configuration, plan) if plan is not None else {}
    estimator = Estimator(
        configuration, config, processes=processes, reference=reference, stays_whole=True, **rows
    )
    gib = wanted.gib if wanted.card_gib == card.gib else None
    found = decide(estimator, card, tokens=wanted.tokens, gib=gib)
    if wanted.kept and given(run) is None and wanted.card_gib != card.gib and not found.has_room:
        before, wanted = wanted, _Wanted(notes=wanted.notes)
        found = decide(estimator, card)
        wanted.notes.append(
            f"the run's micro-batches of {before.tokens:,} tokens do not fit {card.title} "
            f"({card.gib:.1f} GiB) by the memory model: from here on they have {found.micro_batch_tokens:,} "
            "(--batch_tokens N says otherwise), and the losses agree up to rounding, but not with dropout"
        )
    return Cutter(
        cut=_decided(
            found, wanted.why if wanted.tokens else "auto: the fastest that fits", part=part, gib=gib
        ),
        notes=wanted.notes,
        may_shrink=True,
        _estimator=estimator,
        _card=card,
        _fixed=wanted.tokens,
    )


def estimate_here(
    configuration: Configuration, config: PreTrainedConfig, plan: Plan | None, cutter: Cutter | None = None
) -> Estimate | None:
    """The run on this process's GPU; None on the CPU, and with ZeRO-3.

    Args:
        config: the model's.
        plan: of the run; None for a stream.
        cutter: how it is cut, and what blocks keep; None: what `-b` says, and as memory allows.
    """
    card = card_here()
    if card is None or configuration.run.sharding == "zero3":
        return None
    rows = of_rows(configuration, plan) if plan is not None else {}
    estimator = Estimator(configuration, config, processes=ranks.world_size(), **rows)
    if cutter is None or not configuration.data.packing:
        return estimator.on(card)
    blocks = cutter.activations.blocks if estimator.reason_on(card) is None else None
    return estimator.on(card, tokens=cutter.cut.tokens, checkpointing=blocks)


@dataclass(kw_only=True)
class _Wanted:
    """What a run is to have: these tokens, or None to decide; `kept`: those of the run that it resumes.

    `as_before`: the blocks keep what memory is free for, as in the release that began the run.
    """

    tokens: int | None = None
    why: str = ""
    kept: bool = False
    as_before: bool = False
    card_gib: float | None = None
    gib: float | None = None
    notes: list[str] = field(default_factory=list)


def _of_resumed(configuration: Configuration, checkpoint: str) -> _Wanted:
    """What a resumed run is to have: its own cut, unless its settings say another now."""
    run, named = configuration.run, given(configuration.run)
    before, cut = recorded_cut(checkpoint)
    same = before.get("batch_tokens") == run.batch_tokens
    same &= before.get("per_device_train_batch_size") == run.per_device_train_batch_size
    as_before = cut is not None and cut.pop("as_before")
    if cut is not None and same and not as_before:
        return _Wanted(kept=True, why="as the run began", **cut)
    by_flag = configuration.explicit.get("batch_tokens") == "flag"
    if named is None and not by_flag and before.get("batch_tokens", "auto") == "auto":
        # An older release began it, or another -b is given now.
        return _Wanted(tokens=of_b(configuration), why="-b, as the run is resumed", as_before=True)
    notes = []
    if "batch_tokens" not in before:
        notes.append(
            f"--batch_tokens {run.batch_tokens}: the run began with what -b says, and the losses agree up to "
            "rounding, but not with dropout"
        )
    return _Wanted(tokens=named, why="--batch_tokens", notes=notes)


def _agreed(reference: str | None) -> tuple[Card | None, str | None]:
    """The smallest card of all, None if a process has none; and why one computes on the reference path."""
    everyone = agreement.met_by_all((card_here(), reference))
    cards = [card for card, _ in everyone if card is not None]
    smallest = min(cards, key=lambda card: card.gib) if len(cards) == len(everyone) else None
    return smallest, next((each for _, each in everyone if each), None)
