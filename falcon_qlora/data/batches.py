"""A run as a sequence of steps, each with the micro-batches that this process computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import datasets
import numpy as np
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.account import Account
from falcon_qlora.data.cursor import State
from falcon_qlora.data.origins import Origin
from falcon_qlora.data.packing import MicroBatch, Plan, collate, deal, fitting, micro_batches
from falcon_qlora.data.stream import DocumentStream, document_of, plain_document

Cursor = dict[str, Any]
"""Where a stream's next step begins, as values for JSON."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """One process's part of one optimizer step.

    Attributes:
        micro_batches: at least one, possibly without targets.
        step: from 0.
        epoch: passes over the data after the step, as a fraction; of a stream, the whole passes before it.
        global_targets: target tokens of the step over all processes: what the loss is divided by.
        global_tokens: real tokens of the step over all processes.
        global_positions: computed positions over all processes, padding included.
        global_capacity: tokens that would fill the global batch; padded, the same as the positions.
        cursor: for a stream, returns what `StreamingSteps.go_on` takes to resume at the next step. None for
            a corpus, or if a data loader's worker reads the stream.
        origins: for a stream, the rows of the step over all processes; for a corpus, `Plan` knows them.
        account: for a stream, `Account.plain` of its first pass until now; None if an earlier release began
            the run, and did not count.
    """

    micro_batches: list[MicroBatch]
    step: int
    epoch: float
    global_targets: int
    global_tokens: int
    global_positions: int
    global_capacity: int
    cursor: Callable[[], Cursor] | None = None
    origins: tuple[Origin, ...] = ()
    account: dict[str, dict[str, Any]] | None = None

    def pin_memory(self) -> Share:
        return replace(self, micro_batches=[batch.pin_memory() for batch in self.micro_batches])


@dataclass(eq=False)
class DocumentReader:
    """Reads tokenized documents by index.

    Args:
        documents: those of a corpus, or a list of ``{"input_ids": int [tokens], "mask": [tokens]}``.
        padding: None packs; ``"longest"`` and ``"max_length"`` pad.
        max_length: what ``"max_length"`` pads to.
        padding_id: token id to pad with.
    """

    documents: datasets.Dataset | list[dict[str, Any]]
    padding: str | None
    max_length: int
    padding_id: int

    def __post_init__(self) -> None:
        if isinstance(self.documents, datasets.Dataset):
            self.documents = self.documents.with_format("numpy", columns=["input_ids", "mask"])

    @property
    def packed(self) -> bool:
        return self.padding is None

    def micro_batch(self, documents: np.ndarray) -> MicroBatch:
        """The micro-batch of these documents; without any, a single padding token that is no target."""
        if len(documents) == 0:
            return collate([np.array([self.padding_id])], [np.array([0])], padding_id=self.padding_id)
        if isinstance(self.documents, list):
            some = [self.documents[index] for index in documents]
            ids, masks = [each["input_ids"] for each in some], [each["mask"] for each in some]
        else:
            rows = self.documents[documents.tolist()]
            ids, masks = list(rows["input_ids"]), list(rows["mask"])
        pad_to = self._padded_length(max(len(document) for document in ids))
        return collate(ids, masks, pad_to=pad_to, padding_id=self.padding_id)

    def positions(self, lengths: np.ndarray) -> int:
        """Positions that the model computes for one micro-batch of documents of these lengths."""
        pad_to = self._padded_length(int(lengths.max(initial=0)))
        return int(lengths.sum()) if pad_to is None else pad_to * len(lengths)

    def _padded_length(self, longest: int) -> int | None:
        if self.packed:
            return None
        return self.max_length if self.padding == "max_length" else longest


@dataclass(frozen=True, kw_only=True)
class Dealing:
    """Which part of every global batch this process computes, and in which micro-batches.

    Attributes:
        micro_batch: sequences in one micro-batch.
        tokens: that one holds at most instead, where documents are packed.
        process: this process's index.
        processes: how many there are.
        even: whether all processes get the same number of micro-batches, some possibly without documents.
    """

    micro_batch: int
    process: int
    processes: int
    even: bool = False
    tokens: int | None = None

    def share(
        self,
        documents: np.ndarray,
        reader: DocumentReader,
        *,
        lengths: np.ndarray,
        targets: int,
        step: int,
        epoch: float,
        global_batch: int,
    ) -> Share:
        """This process's share of a step.

        Args:
            documents: int64, the step's documents.
            reader: of the corpus.
            lengths: ``[documents of the corpus]``, tokens.
            targets: target tokens of the step.
            step, epoch: as in `Share`.
            global_batch: sequences of the step.
        """
        of_step = lengths[documents]
        shares = deal(
            np.arange(len(documents)),
            of_step,
            processes=self.processes,
            micro_batch=self.micro_batch,
            max_length=reader.max_length,
            packed=reader.packed,
            tokens=self.tokens,
        )
        parts = filled_up(shares[self.process], max(map(len, shares)) if self.even else 1)
        positions = sum(reader.positions(of_step[part]) for share in shares for part in share)
        return Share(
            micro_batches=[
                replace(reader.micro_batch(documents[part]), places=tuple(part.tolist())) for part in parts
            ],
            step=step,
            epoch=epoch,
            global_targets=targets,
            global_tokens=int(of_step.sum()),
            global_positions=positions,
            global_capacity=global_batch * reader.max_length if reader.packed else positions,
        )


def filled_up(parts: list[np.ndarray], count: int) -> list[np.ndarray]:
    """`parts`, with empty ones appended up to `count`."""
    return parts + [np.array([], dtype=np.int64)] * (count - len(parts))


def recut(share: Share, tokens: int) -> Share:
    """A packed share as a `Dealing` whose micro-batches hold at most so many tokens would have cut it."""
    ids, masks = [], []
    lengths: list[int] = []
    places: list[int] = []
    for batch in share.micro_batches:
        is_target = np.zeros(sum(batch.lengths), dtype=bool)
        is_target[batch.target_positions.numpy() + 1] = True
        starts = batch.cu_seqlens.tolist()
        for first, last in itertools.pairwise(starts):
            ids.append(batch.input_ids[0, first:last].numpy())
            masks.append(is_target[first:last])
        lengths += batch.lengths
        places += batch.places
    if not places:  # a single padding token
        return share
    order = np.lexsort((places, [-length for length in lengths]))
    parts = micro_batches(order, np.array(lengths), tokens)
    cut = [
        replace(
            collate([ids[each] for each in part], [masks[each] for each in part]),
            places=tuple(places[each] for each in part),
        )
        for part in parts
    ]
    return replace(share, micro_batches=cut)


@dataclass(eq=False)
class TrainingSteps(Dataset[Share]):
    """The whole run as a sequence: item n is this process's share of step n.

    Args:
        reader: of the corpus that `plan` is about.
        plan: which documents make a step.
        target_counts: ``[documents]``, target tokens of each document.
        steps: length of the run.
        dealing: which part of a step this process computes.
    """

    reader: DocumentReader
    plan: Plan
    target_counts: np.ndarray
    steps: int
    dealing: Dealing

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Share:
        if not 0 <= step < self.steps:
            raise IndexError(step)
        epoch, place = self.plan.locate(step)
        of_epoch = self.plan.epoch(epoch)
        documents = of_epoch[place]
        return self.dealing.share(
            documents,
            self.reader,
            lengths=self.plan.lengths,
            targets=int(self.target_counts[documents].sum()),
            step=step,
            epoch=epoch + (place + 1) / len(of_epoch),
            global_batch=self.plan.global_batch,
        )


@dataclass(eq=False)
class StreamingSteps(IterableDataset[Share | None]):
    """`TrainingSteps` over documents that arrive one by one and are never held as a whole.

    Every process reads the whole stream and keeps its own share, so that a step's documents do not depend
    on the number of processes.

    Args:
        stream: opens the stream, given the epoch, a state of `DocumentStream` or None, and an account.
        steps: length of the run; a stream that ends earlier is opened again.
        global_batch, max_length: as in `Plan`.
        padding, padding_id: as in `DocumentReader`.
        dealing: which part of a step this process computes.

    Raises:
        UserError: if the stream has no document.
    """

    stream: Callable[[int, State | None, Account], DocumentStream]
    steps: int
    global_batch: int
    max_length: int
    padding: str | None
    padding_id: int
    dealing: Dealing

    def __post_init__(self) -> None:
        self._cursor: Cursor = {
            **dict.fromkeys(("step", "epoch", "began"), 0),
            "stream": None,
            "waiting": [],
            "account": Account().plain(),
        }

    def go_on(self, cursor: Cursor) -> None:
        """Resume at a share's cursor. Earlier steps are yielded as None, which the training loop skips."""
        self._cursor = cursor

    def __iter__(self) -> Iterator[Share | None]:
        step, epoch, began = (self._cursor[name] for name in ("step", "epoch", "began"))
        waiting = [document_of(each) for each in self._cursor["waiting"]]
        before = self._cursor.get("account")
        account = Account.from_plain(before or {})
        # Later passes read the same rows.
        documents = self.stream(epoch, self._cursor["stream"], Account() if epoch else account)
        yield from itertools.repeat(None, step)
        while step < self.steps:
            for batch in self._global_batches(documents, waiting):
                share = self._share(batch, step, epoch)
                step += 1
                share = replace(share, account=None if before is None else account.plain())
                cursor = _cursor(step, epoch, began, documents, waiting, share.account)
                yield share if get_worker_info() else replace(share, cursor=cursor)
                if step == self.steps:
                    return
            if step == began:
                raise UserError("the stream has no document with a trained token")
            epoch, began = epoch + 1, step
            documents = self.stream(epoch, None, Account())

    def _global_batches(
        self, documents: DocumentStream, waiting: list[dict[str, Any]]
    ) -> Iterator[list[dict[str, Any]]]:
        """Yield each step's documents; those in `waiting` come first, and leftover ones stay there."""
        tokens = sum(len(each["input_ids"]) for each in waiting)
        budget = self.global_batch * self.max_length
        for document in documents:
            waiting.append(document)
            tokens += len(document["input_ids"])
            full = len(waiting) == self.global_batch if self.padding else tokens > budget
            if full:
                count = len(waiting)
                if not self.padding:
                    lengths = np.array([len(each["input_ids"]) for each in waiting[:-1]])
                    count = fitting(lengths, self.global_batch, self.max_length)
                batch, waiting[:] = waiting[:count], waiting[count:]
                tokens = sum(len(each["input_ids"]) for each in waiting)
                yield batch
        if waiting:
            batch, waiting[:] = waiting[:], []
            yield batch

    def _share(self, documents: list[dict[str, Any]], step: int, epoch: int) -> Share:
        reader = DocumentReader(
            documents,
            padding=self.padding,
            max_length=self.max_length,
            padding_id=self.padding_id,
        )
        lengths = np.array([len(document["input_ids"]) for document in documents], dtype=np.int64)
        targets = sum(int(np.sum(document["mask"][1:])) for document in documents)
        share = self.dealing.share(
            np.arange(len(documents)),
            reader,
            lengths=lengths,
            targets=targets,
            step=step,
            epoch=float(epoch),
            global_batch=self.global_batch,
        )
        return replace(share, origins=tuple(document["origin"] for document in documents))


def _cursor(
    step: int,
    epoch: int,
    began: int,
    documents: DocumentStream,
    waiting: list[dict[str, Any]],
    account: dict[str, dict[str, Any]] | None,
) -> Callable[[], Cursor]:
    """A function that returns the cursor as it is now; `began` is the epoch's first step."""
    stream, kept = documents.state(), list(waiting)
    return lambda: {
        "step": step,
        "epoch": epoch,
        "began": began,
        "stream": stream(),
        "waiting": [plain_document(each) for each in kept],
        "account": account,
    }
