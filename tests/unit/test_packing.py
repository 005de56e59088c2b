"""Which documents make a step, and how they are dealt, whatever the lengths."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from falcon_qlora.data.packing import Plan, deal

LENGTHS = st.lists(st.integers(1, 64), min_size=1, max_size=200).map(lambda x: np.array(x, dtype=np.int64))


def plan(lengths: np.ndarray, **changes) -> Plan:
    settings = {
        "lengths": lengths,
        "fingerprint": "c0ffee" * 8,
        "seed": 7,
        "global_batch": 4,
        "max_length": 64,
    }
    return Plan(**settings | changes)


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.sampled_from(["random", "sequential", "group_by_length"]), st.booleans())
def test_an_epoch_has_every_document_once(lengths, order, packed):
    steps = plan(lengths, order=order, packed=packed).epoch(0)
    assert sorted(np.concatenate(steps).tolist()) == list(range(len(lengths)))


@settings(max_examples=30, deadline=None)
@given(LENGTHS, st.sampled_from(["random", "sequential", "group_by_length"]), st.booleans())
def test_an_epoch_has_what_is_drawn_for_it_as_often(lengths, order, packed):
    def draw(epoch):
        return np.random.default_rng(epoch).integers(0, len(lengths), len(lengths) + epoch)

    drawn = plan(lengths, order=order, packed=packed, draw=draw)
    steps = [drawn.steps(epochs) for epochs in (1, 2, 3)]
    made = [drawn.documents(step) for step in range(steps[-1])]
    for epoch, (first, last) in enumerate(itertools.pairwise([0, *steps])):
        assert sorted(np.concatenate(made[first:last])) == sorted(draw(epoch))
    assert drawn.documents_until(steps[-1]) == sum(map(len, made))
    # Asked for the last step alone, as a resumed run does.
    again = plan(lengths, order=order, packed=packed, draw=draw)
    assert (again.documents(steps[-1] - 1) == made[-1]).all()


@settings(max_examples=60, deadline=None)
@given(LENGTHS, st.integers(1, 4), st.integers(1, 3), st.booleans())
def test_dealing_keeps_every_document_and_the_limit_of_a_micro_batch(lengths, processes, micro_batch, packed):
    documents = np.arange(len(lengths))
    shares = deal(
        documents, lengths, processes=processes, micro_batch=micro_batch, max_length=64, packed=packed
    )
    assert len(shares) == processes
    parts = [part for share in shares for part in share]
    assert sorted(np.concatenate(parts).tolist()) == documents.tolist()
    if packed:
        assert max(lengths[part].sum() for part in parts) <= micro_batch * 64
    else:
        assert max(len(part) for part in parts) <= micro_batch


def test_a_step_is_the_same_for_any_number_of_processes_and_another_for_another_seed():
    lengths = np.random.default_rng(0).integers(5, 60, 300)
    first, again, other = plan(lengths), plan(lengths), plan(lengths, seed=8)
    # Asked out of order, as a resumed run does.
    assert (again.documents(12) == first.documents(12)).all()
    assert (again.documents(3) == first.documents(3)).all()
    assert not np.array_equal(first.documents(3), other.documents(3))
    second_epoch = first.steps(1)
    assert not np.array_equal(first.documents(0), first.documents(second_epoch))
    assert first.locate(second_epoch) == (1, 0)


def test_packed_steps_are_nearly_full_and_processes_nearly_even():
    lengths = np.clip(np.random.default_rng(0).gamma(3, 47, 7473), 20, 446).astype(np.int64)
    packed = plan(lengths, global_batch=16, max_length=512)
    steps = packed.epoch(0)[:-1]
    assert np.mean([lengths[step].sum() for step in steps]) > 0.95 * 16 * 512
    for step in steps:
        shares = deal(step, lengths, processes=2, micro_batch=4, max_length=512)
        loads = [sum(lengths[part].sum() for part in share) for share in shares]
        assert max(loads) < 1.01 * np.mean(loads)


def test_a_fraction_of_an_epoch_is_that_part_of_its_steps():
    sized = plan(np.full(100, 64), global_batch=10)
    assert (sized.steps(1), sized.steps(0.5), sized.steps(2.05), sized.steps(0.001)) == (10, 5, 21, 1)


@pytest.mark.parametrize("step", [0, 3, 11, 25])
def test_documents_until_a_step_are_those_of_the_steps_before(step):
    sized = plan(np.random.default_rng(0).integers(1, 65, 100), global_batch=6)
    assert sized.documents_until(step) == sum(len(sized.documents(before)) for before in range(step))


def test_group_by_length_brings_similar_lengths_together():
    lengths = np.random.default_rng(0).integers(1, 65, 800)
    spread = {
        order: np.mean([np.ptp(lengths[step]) for step in plan(lengths, order=order, packed=False).epoch(0)])
        for order in ("random", "group_by_length")
    }
    assert spread["group_by_length"] < spread["random"] / 4


def test_a_document_longer_than_a_sequence_is_refused():
    with pytest.raises(ValueError, match="65 tokens, over 64"):
        plan(np.array([3, 65]))
