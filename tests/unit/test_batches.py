"""What a micro batch tells the model: positions, boundaries, targets."""

from __future__ import annotations

import json
from typing import Any

import datasets
import numpy as np
import pytest

from falcon_qlora.data.batches import Dealing, DocumentReader, StreamingSteps, TrainingSteps
from falcon_qlora.data.packing import Plan, collate

DOCUMENTS = [np.array([5, 6, 7]), np.array([8, 9]), np.array([4, 11, 11, 11])]
MASKS = [np.array([1, 1, 1]), np.array([0, 1]), np.array([0, 0, 1, 1])]


def test_packed_targets_never_cross_a_boundary_and_keep_the_end_token():
    batch = collate(DOCUMENTS, MASKS)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 4, 11, 11, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 1, 2, 3]]
    assert batch.cu_seqlens.tolist() == [0, 3, 5, 9]
    # Position p predicts token p + 1: of the third document only the two trained end tokens.
    assert batch.target_positions.tolist() == [0, 1, 3, 6, 7]
    assert batch.targets.tolist() == [6, 7, 9, 11, 11]


def test_padding_is_never_a_target_though_it_is_the_end_token():
    batch = collate(DOCUMENTS, MASKS, pad_to=5, padding_id=11)
    assert batch.input_ids.reshape(3, 5).tolist() == [
        [5, 6, 7, 11, 11],
        [8, 9, 11, 11, 11],
        [4, 11, 11, 11, 11],
    ]
    assert batch.targets.tolist() == [6, 7, 9, 11, 11]
    assert batch.lengths == (5, 5, 5)
    assert batch.tokens == 9


def corpus(count: int) -> tuple[datasets.Dataset, np.ndarray]:
    rng = np.random.default_rng(3)
    rows = [rng.integers(0, 50, rng.integers(2, 30)).tolist() for _ in range(count)]
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "mask": [[1] * len(row) for row in rows]})
    return dataset, np.array([len(row) for row in rows])


def steps(process: int, processes: int, padding: str | None = None) -> TrainingSteps:
    dataset, lengths = corpus(80)
    plan = Plan(
        lengths=lengths, fingerprint="ab", seed=1, global_batch=6, max_length=32, packed=padding is None
    )
    reader = DocumentReader(dataset, padding=padding, max_length=32, padding_id=0)
    return TrainingSteps(
        reader,
        plan,
        lengths - 1,
        steps=2 * plan.steps(1),
        dealing=Dealing(micro_batch=2, process=process, processes=processes),
    )


def test_processes_together_hold_exactly_the_global_batch():
    alone, pair = steps(0, 1), [steps(0, 2), steps(1, 2)]
    for step in range(len(alone)):
        whole = alone[step]
        halves = [each[step] for each in pair]
        targets = [sorted(t for b in share.micro_batches for t in b.targets.tolist()) for share in halves]
        everything = sorted(t for b in whole.micro_batches for t in b.targets.tolist())
        assert sorted(targets[0] + targets[1]) == everything
        assert whole.global_targets == len(everything) == halves[0].global_targets
        assert whole.global_tokens == sum(b.tokens for share in halves for b in share.micro_batches)


def test_a_process_without_documents_gets_a_batch_without_targets():
    share = steps(63, 64)[0]
    assert [(batch.lengths, len(batch.targets)) for batch in share.micro_batches] == [((1,), 0)]


def test_positions_count_padding_and_tokens_do_not():
    share = steps(0, 1, padding="max_length")[0]
    assert share.global_positions == 6 * 32 == share.global_capacity
    assert share.global_tokens == sum(b.tokens for b in share.micro_batches) < share.global_positions


class Documents:
    """A corpus as a stream, which keeps how many documents it has given."""

    def __init__(self, dataset: Any, state: dict[str, int] | None):
        self.dataset = dataset
        self.given = state["given"] if state else 0

    def __iter__(self) -> Documents:
        return self

    def __next__(self) -> dict[str, Any]:
        if self.given == len(self.dataset):
            raise StopIteration
        row = self.dataset[self.given]
        self.given += 1
        return {
            "input_ids": np.array(row["input_ids"], np.int32),
            "mask": np.array(row["mask"], np.int8),
            "origin": (0, self.given),
        }

    def state(self) -> Any:
        state = {"given": self.given}
        return lambda: state


@pytest.mark.parametrize("padding", [None, "longest"])
def test_a_stream_goes_on_with_any_step(padding: str | None) -> None:
    dataset, _ = corpus(30)
    opened: list[Documents] = []

    def stream(epoch: int, state: dict[str, int] | None, account: Any) -> Documents:
        opened.append(Documents(dataset, state))
        return opened[-1]

    def made() -> StreamingSteps:
        return StreamingSteps(
            stream,  # type: ignore[arg-type]
            steps=20,
            global_batch=6,
            max_length=32,
            padding=padding,
            padding_id=0,
            dealing=Dealing(micro_batch=2, process=0, processes=1),
        )

    def content(share: Any) -> Any:
        return (
            share.step,
            share.epoch,
            share.global_targets,
            share.origins,
            [batch.input_ids.tolist() for batch in share.micro_batches],
            [batch.targets.tolist() for batch in share.micro_batches],
        )

    whole = list(made())
    assert len({share.epoch for share in whole}) > 2
    # Made long after, as a save is behind what is read ahead.
    cursors = [json.loads(json.dumps(share.cursor())) for share in whole]
    for done, cursor in enumerate(cursors, start=1):
        opened.clear()
        again = made()
        again.go_on(cursor)
        rest = list(again)
        assert rest[:done] == [None] * done
        assert [content(share) for share in rest[done:]] == [content(share) for share in whole[done:]]
        assert cursor["step"] == done


def test_a_stream_makes_full_steps_of_every_document_in_turn():
    dataset, lengths = corpus(80)

    def run(process: int, processes: int) -> list:
        return list(
            StreamingSteps(
                lambda epoch, state, account: Documents(dataset, state),
                steps=9,
                global_batch=6,
                max_length=32,
                padding=None,
                padding_id=0,
                dealing=Dealing(micro_batch=2, process=process, processes=processes),
            )
        )

    alone, first, second = run(0, 1), run(0, 2), run(1, 2)
    ids = [sorted(i for b in s.micro_batches for i in b.input_ids[0].tolist()) for s in alone]
    halves = [
        sorted(i for s in pair for b in s.micro_batches for i in b.input_ids[0].tolist())
        for pair in zip(first, second, strict=True)
    ]
    assert ids == halves
    assert all(share.global_tokens > 0.6 * 6 * 32 for share in alone[:7])
    expected = sorted(i for row in dataset for i in row["input_ids"])
    per_epoch = next(n for n in range(1, 10) if sum(s.global_tokens for s in alone[:n]) == lengths.sum())
    assert sorted(i for each in ids[:per_epoch] for i in each) == expected
