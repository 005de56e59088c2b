"""`--batch_tokens`: which cut a card gets, that it decides no more, and that no free byte is asked."""

from __future__ import annotations

import itertools
import json
import math
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.config import parse
from falcon_qlora.data.batches import Dealing, DocumentReader, Share, TrainingSteps, recut
from falcon_qlora.data.packing import Plan, deal
from falcon_qlora.models.locate import find_outline_here
from falcon_qlora.models.step_memory import USABLE_SHARE
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.training import batch_tokens
from falcon_qlora.training.activations import Activations
from falcon_qlora.training.cards import CARDS, Card, card_here, card_of
from falcon_qlora.training.cuts import MOST_TOKENS, as_trained, decide
from falcon_qlora.training.estimate import Estimate, Estimator

GIB = 2**30
OUTLINE = find_outline_here("random:falcon-7b")


def estimator(words: str, processes: int = 1, **more: Any) -> Estimator:
    return Estimator(parse(["-m", "random:falcon-7b", *words.split()]), OUTLINE, processes=processes, **more)


def needs(found: Estimate) -> float:
    """GiB of a card that holds it with the model's margin, added up from the parts."""
    outside = ("weights", "adapter", "CUDA and kernels", "NCCL", "pages of the optimizer")
    beside = sum(size for name, size in found.parts.items() if name in outside)
    return (beside + (sum(found.parts.values()) - beside) / USABLE_SHARE) / GIB


def step_seconds(found: Estimate, tokens: int) -> float:
    assert found.tokens_per_second is not None
    return tokens / found.tokens_per_second


@pytest.mark.parametrize(
    ("words", "processes"),
    [
        ("-b 4", 1),
        ("-b 2 --gradient_accumulation_steps 8", 1),
        ("--global_batch_size 13 --kernels off", 1),
        ("--global_batch_size 29 --compute_dtype fp8", 3),
        ("--global_batch_size 64", 1),
        ("-b 6 --checkpointing full --method adapter_v2 -q 8bit", 2),
    ],
)
def test_no_cut_that_fits_is_faster_and_of_equals_none_is_smaller(words: str, processes: int) -> None:
    made = estimator(words, processes)
    run, length = made.configuration.run, made.configuration.data.max_length
    total = run.global_batch_size or run.per_device_train_batch_size * processes * (
        run.gradient_accumulation_steps
    )
    share = math.ceil(total / processes)
    sizes = (9, 14, 18, 24, 140)
    for card in (Card(name="x", title="x", gib=gib, bf16=165, fp8=330, terabytes=1) for gib in sizes):
        chosen = decide(made, card)
        # Every size of a micro-batch, and every way to recompute: the same in all blocks, or mixed by auto.
        ways = [None] if run.checkpointing != "auto" else [None, *made.choices(card)]
        every = [
            made.on(card, tokens=sequences * length, checkpointing=way)
            for sequences in range(1, min(share, MOST_TOKENS // length) + 1)
            for way in ways
        ]
        fitting = [each for each in every if needs(each) <= card.gib]
        if not fitting:
            assert chosen.card_gib == min(each.card_gib for each in every)
            continue
        assert needs(chosen) <= card.gib
        best = min(step_seconds(each, share * length) for each in fitting)
        assert step_seconds(chosen, share * length) <= best * 1.0102
        cuts = {math.ceil(share / count) * length for count in range(1, share + 1)}
        cuts = {cut for cut in cuts if cut <= MOST_TOKENS}
        as_fast = [
            found
            for cut in cuts
            if needs(found := made.on(card, tokens=cut)) <= card.gib
            and step_seconds(found, share * length) < best * 1.0098
        ]
        assert all(chosen.card_gib <= found.card_gib for found in as_fast)


@pytest.mark.parametrize("card", ["4090", "a100-80", "h200"])
def test_b_and_accumulation_only_say_how_large_a_step_is(card: str) -> None:
    same = [
        decide(estimator(words), CARDS[card])
        for words in (
            "-b 16",
            "-b 1 --gradient_accumulation_steps 16",
            "-b 4 --gradient_accumulation_steps 4",
            "-b 3 --global_batch_size 16",
        )
    ]
    assert all(each == same[0] for each in same)
    as_b = estimator("-b 16").on(CARDS[card])
    if as_b.has_room and as_b.micro_batch_tokens <= MOST_TOKENS:
        assert same[0].tokens_per_second >= 0.99 * as_b.tokens_per_second  # type: ignore[operator]


def test_a_default_run_keeps_what_b_says_where_it_fits() -> None:
    for card in ("a100-40", "a100-80", "h100", "h200"):
        found = decide(estimator(""), CARDS[card])
        assert (found.micro_batch_tokens, found.checkpointing) == (8192, "none")
        assert found.parts == estimator("").on(CARDS[card]).parts


def test_what_is_named_is_what_is_done() -> None:
    small = card_of("18GiB")
    fixed = decide(estimator("-b 16"), small, tokens=10_000)
    assert (fixed.micro_batch_tokens, fixed.micro_batches) == (10_000, 4)
    assert set(decide(estimator("-b 16 --checkpointing full"), small).blocks) == {"full"}
    given = as_trained(estimator("-b 16 --batch_tokens 4096"), small)
    assert (given.micro_batch_tokens, given.micro_batches) == (4096, 8)
    padded = as_trained(estimator("-b 16 --packing false"), small)
    assert padded == estimator("-b 16 --packing false").on(small)
    shared = as_trained(estimator("-b 16 --sharding fsdp", 2), small)
    assert shared == estimator("-b 16 --sharding fsdp", 2).on(small)


def test_each_next_cut_after_out_of_memory_takes_less_memory_until_the_smallest() -> None:
    made = estimator("-b 8 --gradient_accumulation_steps 2")
    found, seen = decide(made, CARDS["h200"]), []
    while True:
        smaller = decide(made, CARDS["h200"], gib=found.gib_for(0.85))
        if smaller.step_bytes >= found.step_bytes:
            break
        assert smaller.step_bytes <= 0.85 * found.step_bytes or not smaller.has_room
        seen.append(found := smaller)
    assert (found.micro_batch_tokens, set(found.blocks)) == (2048, {"offload"})
    assert len(seen) > 5


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--batch_tokens 2047", "--batch_tokens: 2047 is less than the 2048 tokens that a document may have"),
        ("--batch_tokens many", "--batch_tokens: 'many' is neither auto nor a whole number of tokens"),
        ("--batch_tokens 1.5e4", "is neither auto nor a whole number"),
        ("--batch_tokens 4096 --packing false", "--batch_tokens is a setting of --packing true"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_read(words: str, told: str) -> None:
    with pytest.raises(UserError) as refused:
        parse(words.split())
    assert told in str(refused.value)


# How shares are cut.


def steps(micro_batch: int, tokens: int | None, process: int = 0) -> TrainingSteps:
    """Steps of documents of few lengths, drawn with some of them twice."""
    rng = np.random.default_rng(7)
    rows = [rng.integers(0, 50, rng.choice([3, 5, 5, 9, 17, 31])).tolist() for _ in range(160)]
    masks = [rng.integers(0, 2, len(row)).tolist() for row in rows]
    lengths = np.array([len(row) for row in rows])
    drawn = np.random.default_rng(1).integers(0, len(rows), len(rows))
    plan = Plan(
        lengths=lengths, fingerprint="ab", seed=1, global_batch=16, max_length=32, draw=lambda epoch: drawn
    )
    dataset = datasets.Dataset.from_dict({"input_ids": rows, "mask": masks})
    reader = DocumentReader(dataset, padding=None, max_length=32, padding_id=0)
    dealing = Dealing(micro_batch=micro_batch, process=process, processes=2, tokens=tokens)
    targets = np.array([sum(mask[1:]) for mask in masks])
    return TrainingSteps(reader, plan, targets, steps=plan.steps(1), dealing=dealing)


def plain(share: Share) -> list[Any]:
    return [
        (
            batch.input_ids.tolist(),
            batch.position_ids.tolist(),
            batch.cu_seqlens.tolist(),
            batch.target_positions.tolist(),
            batch.targets.tolist(),
            batch.lengths,
            batch.tokens,
            batch.places,
        )
        for batch in share.micro_batches
    ]


@pytest.mark.parametrize("process", [0, 1])
def test_a_share_that_is_cut_anew_is_the_one_that_was_dealt_so(process: int) -> None:
    cuts = (32, 50, 64, 96, 128, 256)
    dealers = {cut: steps(1, cut, process) for cut in cuts}
    for step in range(3):
        dealt = {cut: dealer[step] for cut, dealer in dealers.items()}
        assert max(len(share.micro_batches) for share in dealt.values()) > 4, "several cuts"
        for before in cuts:
            for after in cuts:
                assert plain(recut(dealt[before], after)) == plain(dealt[after])
        documents = {cut: sorted(_documents(share)) for cut, share in dealt.items()}
        assert all(each == documents[32] for each in documents.values())
        sizes = {
            cut: max(sum(batch.lengths) for batch in share.micro_batches) for cut, share in dealt.items()
        }
        assert all(size <= cut for cut, size in sizes.items())
        assert len({(share.global_targets, share.global_tokens) for share in dealt.values()}) == 1


def _documents(share: Share) -> list[list[int]]:
    return [
        batch.input_ids[0, first:last].tolist()
        for batch in share.micro_batches
        for first, last in itertools.pairwise(batch.cu_seqlens.tolist())
    ]


def test_as_many_tokens_as_b_says_cut_as_b_does() -> None:
    ours, theirs = steps(1, 64), steps(2, None)
    assert [plain(ours[step]) for step in range(3)] == [plain(theirs[step]) for step in range(3)]


def test_a_share_without_documents_stays() -> None:
    share = steps(1, None)[0]
    reader = DocumentReader([], padding=None, max_length=32, padding_id=9)
    empty = Share(**{**vars(share), "micro_batches": [reader.micro_batch(np.array([], dtype=np.int64))]})
    assert recut(empty, 32) is empty


def test_a_document_that_is_too_long_for_a_cut_is_an_error_and_not_dropped() -> None:
    with pytest.raises(ValueError, match="a document has 9 tokens, over 8"):
        deal(np.array([0, 1]), np.array([9, 3]), processes=1, micro_batch=1, max_length=9, tokens=8)


# What a run decides.


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setattr(devices, "local_device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda *_: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    return monkeypatch


def chosen(words: str, checkpoint: Path | None = None, *, shared_out: bool = False) -> batch_tokens.Cutter:
    return batch_tokens.choose(
        parse(["-m", "random:falcon-7b", *words.split()]),
        OUTLINE,
        None,
        reference=None,
        shared_out=shared_out,
        checkpoint=None if checkpoint is None else str(checkpoint),
    )


def test_only_the_size_of_the_card_is_asked_and_not_what_is_free(on_gpu: pytest.MonkeyPatch) -> None:
    found = []
    for free in (0, GIB, 20 * GIB, 24 * GIB):
        on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_, free=free: (free, 24 * GIB))
        found.append(chosen("-b 4 --gradient_accumulation_steps 8").cut)
    assert all(cut == found[0] for cut in found)
    assert found[0].tokens > 2048
    assert card_here() == Card(**{**vars(CARDS["h200"]), "gib": 24.0})


def test_ranks_with_other_cards_take_what_the_smallest_holds(on_gpu: pytest.MonkeyPatch) -> None:
    sizes = (140.0, 18.0, 24.0)
    cards = [Card(**{**vars(CARDS["h200"]), "gib": gib}) for gib in sizes]
    cuts = []
    for mine in cards:
        on_gpu.setattr(batch_tokens, "card_here", lambda mine=mine: mine)
        on_gpu.setattr(agreement, "met_by_all", lambda said: [(card, said[1]) for card in cards])
        cuts.append(chosen("-b 16").cut)
    on_gpu.setattr(agreement, "met_by_all", lambda said: [(cards[1], None)])
    assert [cut == chosen("-b 16").cut for cut in cuts] == [True] * 3
    on_gpu.setattr(agreement, "met_by_all", lambda said: [(card, None) for card in (cards[0], None)])
    assert (chosen("-b 16").cut.tokens, chosen("-b 16").cut.why) == (16 * 2048, "-b, on the CPU")


def test_what_is_a_replica_is_reckoned_with_as_one_on_less_memory_too(
    on_gpu: pytest.MonkeyPatch,
) -> None:
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, int(139.8 * GIB)))
    on_gpu.setattr(ranks, "world_size", lambda: 2)
    on_gpu.setattr(agreement, "met_by_all", lambda said: [said, said])
    words = "--method full --optim adamw_torch_fused -b 4 --gradient_accumulation_steps 4"
    cutter = chosen(words)
    cutter.keep(lambda **_: Activations(["none"] * 32))
    made = estimator(words, 2)
    cuts = []
    while cutter.smaller([0]):
        found = cutter.cut.found
        assert found is not None
        whole = made.on(CARDS["h200"], tokens=found.micro_batch_tokens, checkpointing=found.blocks)
        cuts.append(whole.step_bytes)
        assert found.step_bytes == whole.step_bytes
    assert len(cuts) > 1
    assert cuts == sorted(cuts, reverse=True)


def test_what_stays_as_b_says_and_why(on_gpu: pytest.MonkeyPatch) -> None:
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, 18 * GIB))
    assert chosen("-b 16 --packing false").cut.why == "-b, as rows are padded"
    shared = chosen("-b 16", shared_out=True)
    assert (shared.cut.tokens, shared.cut.blocks) == (16 * 2048, None)
    assert shared.cut.why == "-b, as weights are shared out"
    assert not shared.may_shrink
    named = chosen("-b 16 --batch_tokens 5000", shared_out=True)
    assert (named.cut.tokens, named.cut.why) == (5000, "--batch_tokens")


def checkpoint(folder: Path, **record: Any) -> Path:
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": 2, "files": {}, **record}))
    return folder


def test_a_resumed_run_keeps_its_cut(on_gpu: pytest.MonkeyPatch, tmp_path: Path) -> None:
    words = "-b 4 --gradient_accumulation_steps 8"
    settings = {"batch_tokens": "auto", "per_device_train_batch_size": 4}
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, 80 * GIB))
    begun = chosen(words)
    begun_tokens = begun.cut.tokens
    saved = checkpoint(tmp_path / "saved", settings=settings, cut=begun.record())
    again = chosen(words, saved)
    assert (again.cut.tokens, again.cut.blocks) == (begun.cut.tokens, begun.cut.blocks)
    assert (again.cut.why, again.may_shrink, again.notes) == ("as the run began", True, [])

    # After a lack of memory in its first step too.
    begun.keep(lambda **_: Activations(["none"] * 32))
    while set(begun.cut.blocks or ()) == {"none"}:
        assert begun.smaller([0])
    fallen = checkpoint(tmp_path / "fallen", settings=settings, cut=begun.record())
    again = chosen(words, fallen)
    assert (again.cut.tokens, again.cut.blocks) == (begun.cut.tokens, begun.cut.blocks)

    # On a larger card, and on a smaller one that still holds it, recomputing.
    for gib in (139, 20):
        on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_, gib=gib: (GIB, gib * GIB))
        assert chosen(words, saved).cut.tokens == begun_tokens
    # On one that does not.
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, int(7.2 * GIB)))
    small = chosen(words, saved)
    assert small.cut.tokens < begun_tokens
    (note,) = small.notes
    assert note.startswith("the run's micro-batches of ")
    assert "do not fit H200 (7.2 GiB) by the memory model: from here on they have" in note
    assert "--batch_tokens N says otherwise" in note
    # What a user named stays on every card.
    named = checkpoint(
        tmp_path / "named",
        settings={**settings, "batch_tokens": "40000"},
        cut={**begun.record(), "tokens": 40000},
    )
    assert chosen(f"{words} --batch_tokens 40000", named).cut.tokens == 40000


def test_another_cut_on_resume_and_a_run_of_an_older_release(
    on_gpu: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_gpu.setattr(torch.cuda, "mem_get_info", lambda *_: (GIB, 140 * GIB))
    words = "-b 4 --gradient_accumulation_steps 8"
    old = checkpoint(tmp_path / "old", settings={"per_device_train_batch_size": 4})
    older = checkpoint(tmp_path / "older")
    for each in (old, older):
        again = chosen(words, each)
        # As that release had it: the blocks keep what memory is free for.
        assert (again.cut.tokens, again.cut.blocks, again.notes) == (8192, None, [])
        named = chosen(f"{words} --batch_tokens 20000", each)
        assert named.cut.tokens == 20000
        assert "agree up to rounding" in named.notes[0]
        assert chosen(f"{words} --batch_tokens auto", each).cut == chosen(words).cut
    settings = {"batch_tokens": "auto", "per_device_train_batch_size": 4}
    # And again from the checkpoints that this release has made of it since.
    since = checkpoint(tmp_path / "since", settings=settings, cut=chosen(words, old).record())
    again = chosen(words, since)
    assert (again.cut.tokens, again.cut.blocks, again.as_before) == (8192, None, True)
    new = checkpoint(tmp_path / "new", settings=settings, cut=chosen(words).record())
    assert chosen(f"{words} --batch_tokens 20000", new).cut.tokens == 20000
    other_b = chosen("-b 2 --gradient_accumulation_steps 16", new).cut
    assert (other_b.tokens, other_b.blocks) == (4096, None)
    for wrong in (7, {"tokens": "1"}, {"tokens": 4096, "gib": "x"}, {"tokens": -1}):
        faulty = checkpoint(tmp_path / f"faulty{wrong}"[:60].replace("/", ""), settings=settings, cut=wrong)
        with pytest.raises(UserError, match=r"is not what training wrote \(cut is"):
            chosen(words, faulty)
