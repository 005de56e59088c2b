"""Decide which documents make each step, deal them to processes, and lay them out in micro-batches.

From top to bottom: `Plan` orders a corpus and cuts it into steps. `deal` gives the documents of a step to
processes and cuts each share into micro-batches. `collate` lays the documents of a micro-batch end to end,
with their boundaries in `cu_seqlens`; attention does not cross these.

Which documents make a step is a pure function of the corpus's fingerprint, the seed, the step and the global
batch. It does not depend on the number of processes, so resuming only needs the step. How a global batch is
dealt and cut only balances the work.

Shape legend: T tokens of a micro-batch laid end to end, D documents, N target tokens.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

_MEGABATCH = 50


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The order of a whole training run.

    Args:
        lengths: ``[documents]``, tokens of each document; none is longer than `max_length`.
        fingerprint: hexadecimal content hash of the corpus.
        seed: of the order.
        global_batch: sequences of one optimizer step, over all processes and micro-batches. Packed, a
            step holds as many whole documents as fit into `global_batch` sequences of `max_length`
            tokens; padded, it holds `global_batch` documents.
        max_length: tokens of one sequence.
        packed: whether documents are laid end to end.
        order: ``"random"``, ``"sequential"`` or ``"group_by_length"`` (documents of similar length
            meet in one batch, as in Transformers' sampler of that name).
        draw: a pure function that returns the documents of an epoch (from 0); None: every document once.

    Raises:
        ValueError: if there is no document, or one is longer than `max_length`.
    """

    lengths: np.ndarray
    fingerprint: str
    seed: int
    global_batch: int
    max_length: int
    packed: bool = True
    order: str = "random"
    draw: Callable[[int], np.ndarray] | None = None
    _epochs: dict[int, list[np.ndarray]] = field(default_factory=dict, repr=False, compare=False)
    _step_counts: dict[int, int] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        if len(self.lengths) == 0:
            raise ValueError("a plan needs at least one document")
        if int(self.lengths.max()) > self.max_length:
            raise ValueError(f"a document has {int(self.lengths.max())} tokens, over {self.max_length}")

    def epoch(self, epoch: int) -> list[np.ndarray]:
        """The documents of every step of `epoch` (from 0): a list of int64 arrays of document indexes."""
        if epoch not in self._epochs:
            self._epochs.clear()
            self._epochs[epoch] = self._cut(self._ordered(epoch))
        return self._epochs[epoch]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch of `step` (from 0) and its place in that epoch."""
        epoch = 0
        while step >= (steps := self._steps_of(epoch)):
            step -= steps
            epoch += 1
        return epoch, step

    def documents(self, step: int) -> np.ndarray:
        """The document indexes of `step` (from 0), in the order of the epoch."""
        epoch, place = self.locate(step)
        return self.epoch(epoch)[place]

    def documents_until(self, step: int) -> int:
        """How many documents the steps before `step` hold; one is counted again in every pass."""
        epoch, place = self.locate(step)
        before = sum(len(self._drawn(earlier)) for earlier in range(epoch))
        return before + sum(len(documents) for documents in self.epoch(epoch)[:place])

    def steps(self, epochs: float) -> int:
        """Optimizer steps in `epochs` passes; part of a pass has that part of its steps, rounded up."""
        whole = int(epochs)
        total = sum(self._steps_of(epoch) for epoch in range(whole))
        if epochs > whole:
            total += int(np.ceil((epochs - whole) * self._steps_of(whole)))
        return max(total, 1)

    def _steps_of(self, epoch: int) -> int:
        if epoch not in self._step_counts:
            self._step_counts[epoch] = len(self.epoch(epoch))
        return self._step_counts[epoch]

    def _drawn(self, epoch: int) -> np.ndarray:
        return np.arange(len(self.lengths)) if self.draw is None else self.draw(epoch)

    def _ordered(self, epoch: int) -> np.ndarray:
        drawn = self._drawn(epoch)
        if self.order == "sequential":
            return drawn
        documents = len(drawn)
        entropy = [self.seed, epoch, int(self.fingerprint[:16] or "0", 16)]
        order = drawn[np.random.default_rng(np.random.SeedSequence(entropy)).permutation(documents)]
        if self.order == "random":
            return order
        size = self.global_batch * max(min(documents // (self.global_batch * 4), _MEGABATCH), 1)
        parts = [order[start : start + size] for start in range(0, documents, size)]
        return np.concatenate([part[np.argsort(-self.lengths[part], kind="stable")] for part in parts])

    def _cut(self, order: np.ndarray) -> list[np.ndarray]:
        if not self.packed:
            return [order[i : i + self.global_batch] for i in range(0, len(order), self.global_batch)]
        ends = np.cumsum(self.lengths[order])
        budget = self.global_batch * self.max_length
        steps, start = [], 0
        while start < len(order):
            used = int(ends[start - 1]) if start else 0
            within = int(np.searchsorted(ends, used + budget, side="right"))
            count = fitting(self.lengths[order[start:within]], self.global_batch, self.max_length)
            steps.append(order[start : start + count])
            start += count
        return steps


def fitting(lengths: np.ndarray, sequences: int, max_length: int) -> int:
    """How many of these documents, from the first on, fit whole into `sequences` of `max_length` tokens."""
    count = len(lengths)
    retreat = max(1, count // 64)
    # One document always fits, so this ends.
    while count > 1 and not _fits(lengths[:count], sequences, max_length):
        count = max(count - retreat, 1)
    return count


def fill(plan: Plan, *, micro_batch: int, padding: str | None) -> float:
    """Real tokens over the positions of its steps in the first epoch of a run on one device.

    Args:
        plan: of the run.
        micro_batch: sequences in one micro-batch.
        padding: None for packed; ``"longest"`` pads to the longest of the micro-batch, ``"max_length"`` to
            the plan's.
    """
    steps = plan.epoch(0)
    drawn = np.concatenate(steps)
    if padding is None:
        positions = len(steps) * plan.global_batch * plan.max_length
    elif padding == "max_length":
        positions = len(drawn) * plan.max_length
    else:
        positions = 0
        for documents in steps:
            for part in deal(
                documents,
                plan.lengths,
                processes=1,
                micro_batch=micro_batch,
                max_length=plan.max_length,
                packed=False,
            )[0]:
                positions += len(part) * int(plan.lengths[part].max())
    return float(plan.lengths[drawn].sum()) / positions


def mean_document(lengths: np.ndarray) -> float:
    """Tokens of the document that a token is in, on average."""
    return float((lengths.astype(np.float64) ** 2).sum() / lengths.sum())


def deal(
    documents: np.ndarray,
    lengths: np.ndarray,
    *,
    processes: int,
    micro_batch: int,
    max_length: int,
    packed: bool = True,
    tokens: int | None = None,
) -> list[list[np.ndarray]]:
    """Deal the documents of one global batch to processes and cut each share into micro-batches.

    Args:
        documents: int64 document indexes of the step.
        lengths: ``[documents of the corpus]``, tokens.
        processes: number of processes to deal to.
        micro_batch: sequences of `max_length` tokens in one micro-batch: packed, it holds at most
            ``micro_batch * max_length`` tokens; padded, at most `micro_batch` documents.
        tokens: that a packed micro-batch holds at most instead; no less than the longest document has.

    Returns:
        For each process its micro-batches, each an array of document indexes. A process may get none.
    """
    descending = documents[np.argsort(-lengths[documents], kind="stable")]
    if not packed:
        per_process = -(-len(descending) // (micro_batch * processes))
        parts = np.array_split(descending, min(per_process * processes, len(descending)))
        return [parts[index::processes] for index in range(processes)]
    capacity = tokens or micro_batch * max_length
    shares = _balance(descending, lengths, processes)
    return [micro_batches(share, lengths, capacity) for share in shares]


def micro_batches(share: np.ndarray, lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """Cut a process's share of a step, longest first, into micro-batches of at most so many tokens.

    Raises:
        ValueError: if a document alone is longer.
    """
    if len(share) and int(lengths[share].max()) > capacity:
        raise ValueError(f"a document has {int(lengths[share].max())} tokens, over {capacity}")
    if len(share) == 0:
        return []
    bins = -(-int(lengths[share].sum()) // capacity)
    while True:
        for split in (_balance, _first_fit):
            parts = split(share, lengths, bins, capacity)
            if parts is not None and all(int(lengths[part].sum()) <= capacity for part in parts):
                return [part for part in parts if len(part)]
        bins += 1


def _balance(
    descending: np.ndarray, lengths: np.ndarray, bins: int, capacity: int | None = None
) -> list[np.ndarray]:
    """Longest first, each to the bin with the fewest tokens (Graham's LPT rule)."""
    heap = [(0, index) for index in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for document in descending.tolist():
        load, index = heapq.heappop(heap)
        members[index].append(document)
        heapq.heappush(heap, (load + int(lengths[document]), index))
    return [np.array(part, dtype=np.int64) for part in members]


def _first_fit(
    descending: np.ndarray, lengths: np.ndarray, bins: int, capacity: int
) -> list[np.ndarray] | None:
    """Longest first, each into the fullest bin it still fits; None if one fits nowhere."""
    free = [(capacity, index) for index in range(bins)]
    members: list[list[int]] = [[] for _ in range(bins)]
    for document in descending.tolist():
        length = int(lengths[document])
        place = bisect_left(free, (length, -1))
        if place == len(free):
            return None
        room, index = free.pop(place)
        members[index].append(document)
        insort(free, (room - length, index))
    return [np.array(part, dtype=np.int64) for part in members]


def _fits(lengths: np.ndarray, bins: int, capacity: int) -> bool:
    """Whether best-fit decreasing places documents of these lengths in `bins` sequences."""
    free = [capacity] * bins
    for length in np.sort(lengths)[::-1].tolist():
        place = bisect_left(free, length)
        if place == len(free):
            return False
        insort(free, free.pop(place) - length)
    return True


@dataclass(frozen=True, kw_only=True)
class MicroBatch:
    """The input of one forward pass: documents laid end to end in one row.

    In a padded batch, padding is part of the documents, at their ends, where a causal model does not see it.

    Attributes:
        input_ids: int64 ``[1, T]``.
        position_ids: int64 ``[1, T]``, restarting at 0 in every document.
        cu_seqlens: int32 ``[D + 1]``, where each document begins, then T.
        target_positions: int64 ``[N]``, positions whose next token is a target.
        targets: int64 ``[N]``, those next tokens.
        lengths: tokens of each document, padding included, on the host.
        tokens: real tokens, without padding.
        places: of each document in its step, by which documents of one length are ordered, on the host.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    target_positions: torch.Tensor
    targets: torch.Tensor
    lengths: tuple[int, ...]
    tokens: int
    places: tuple[int, ...] = ()

    def _each_tensor(self, change: Any) -> MicroBatch:
        import torch

        tensors = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: change(v) for k, v in tensors.items() if isinstance(v, torch.Tensor)})

    def to(self, device: torch.device) -> MicroBatch:
        return self._each_tensor(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> MicroBatch:
        return self._each_tensor(lambda tensor: tensor.pin_memory())


def collate(
    documents: Sequence[np.ndarray],
    masks: Sequence[np.ndarray],
    *,
    pad_to: int | None = None,
    padding_id: int = 0,
) -> MicroBatch:
    """Lay documents end to end.

    Args:
        documents: each int ``[length]``, token ids.
        masks: each ``[length]``, 1 where the token is a training target.
        pad_to: pad every document to this many positions; None packs.
        padding_id: the token to pad with. Padding is never a target, whatever its id.
    """
    import torch

    lengths = [pad_to or len(document) for document in documents]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(starts[-1])
    ids = np.full(total, padding_id, dtype=np.int64)
    is_target = np.zeros(total, dtype=bool)
    for start, document, mask in zip(starts[:-1], documents, masks, strict=True):
        ids[start : start + len(document)] = document
        is_target[start : start + len(document)] = mask
    is_target[starts[:-1]] = False  # nothing precedes a document's first token
    predicted = np.flatnonzero(is_target)
    positions = np.arange(total) - np.repeat(starts[:-1], lengths)
    return MicroBatch(
        input_ids=torch.from_numpy(ids)[None],
        position_ids=torch.from_numpy(positions)[None],
        cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
        target_positions=torch.from_numpy(predicted - 1),
        targets=torch.from_numpy(ids[predicted]),
        lengths=tuple(lengths),
        tokens=sum(len(document) for document in documents),
    )
