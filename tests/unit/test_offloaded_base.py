"""A base in CPU memory computes what one on the device does, bit for bit, and no copy overtakes a kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from falcon_qlora import config
from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models import sizes, streamed_base
from falcon_qlora.models.activations import Checkpointing
from falcon_qlora.models.host_base import HostCopy
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.locate import find_config
from falcon_qlora.models.quantize import stored
from falcon_qlora.models.sizes import stored_bytes, weight_bytes
from falcon_qlora.models.streamed_base import held_for_good, replicated, streamed_base_of
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.training import preflight, sharding
from falcon_qlora.training.sharding import ways_to_take_less
from tests.integration.shared_out import BLOCKS, CASES, computing, difference, made, one_pass
from tests.layouts import documents
from tests.packing import packed

CPU = torch.device("cpu")
Case = tuple[str, Any, str, Checkpointing, str]
# Every way to store, to run and to keep; the rest is slow.
QUICK: tuple[Case, ...] = (
    ("falcon-7b", "4bit", "torch", "none", "lora"),
    ("falcon-40b", "16bit", "reference", "none", "lora"),
    ("falcon3", "8bit", "torch", "full", "lora"),
    ("falcon-40b", "4bit", "torch", "offload", "lora"),
    ("falcon-rw-1b", "8bit", "reference", "full", "adapter"),
)
# Interpreted kernels take their time, and do not know where a weight comes from.
REST = [
    pytest.param(case, marks=pytest.mark.slow) for case in CASES if case not in QUICK and case[2] != "triton"
]


class AtTheLastMoment(streamed_base._OnCpu):
    """A copy that happens only where it is waited for."""

    def run(self, place: int, fetch: Callable[[], Any]) -> None:
        self.wait(place)
        self._arriving[place] = SimpleNamespace(wait=fetch)


@pytest.mark.parametrize("queue", [streamed_base._OnCpu, AtTheLastMoment])
@pytest.mark.parametrize("case", [*QUICK, *REST], ids=" ".join)
def test_what_is_offloaded_computes_what_is_on_the_device(
    case: Case, queue: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streamed_base, "_OnCpu", queue)
    models = made(CPU, *case), made(CPU, *case, offload=True)
    batches = [packed(documents(lengths, seed=seed)) for seed, lengths in enumerate(([7, 40, 3], [12]))]
    with computing(CPU, case[2]):
        # What is in the buffers, and copied ahead, follows from the pass before.
        for batch, trains in ((0, True), (1, True), (0, False), (1, False), (0, True)):
            assert difference(*(one_pass(model, batches[batch], trains) for model in models)) == ""
    if case[4] == "lora":  # Adapter v2 shows another model's linears
        _check_what_it_holds(*models)


def _check_what_it_holds(whole: Any, offloaded: Any) -> None:
    base = streamed_base_of(offloaded)
    assert base is not None
    linears = layout_of(whole.config).expected_linears()
    total = 0
    for name in linears:
        one, two = (
            getattr(each, "base_layer", each)
            for each in (model.get_base_model().get_submodule(name) for model in (whole, offloaded))
        )
        total += sum(each.nbytes for each in stored(one).values())
        assert all(map(base.holds, stored(two).values()))
    resident = list(held_for_good(offloaded))
    assert len([*offloaded.parameters(), *offloaded.buffers()]) == len(resident) + len(linears)
    held = sum(each.nbytes for each in base.buffers)
    assert 2 * total / BLOCKS <= held <= 2 * total / BLOCKS + 2 * 256 * 5 * len(linears)


def test_replicas_are_compared_with_what_they_hold_in_cpu_memory() -> None:
    models = [made(CPU, *QUICK[0], offload=True) for _ in range(2)]
    assert agreement.checksum(replicated(models[0])) == agreement.checksum(replicated(models[1]))
    base = streamed_base_of(models[1])
    assert base is not None
    assert isinstance(base.storage, HostCopy)
    block = torch.zeros(base.storage.room(3), dtype=torch.uint8)
    base.storage.fetch(3, block)
    base.storage.put(3, 7, block[7:8] ^ 1)
    assert agreement.checksum(replicated(models[0])) != agreement.checksum(replicated(models[1]))


class Order:
    """Which launch on a stream comes after which, by streams' own clocks: a stand-in for CUDA's."""

    def __init__(self) -> None:
        self.main, self.now = Stream(), None
        self.copies: list[tuple[int, int, dict[Any, int]]] = []  # buffer, block, and all that it comes after
        self.reads: list[tuple[int, int, dict[Any, int], int]] = []  # those, and its own time
        self.faults: list[str] = []

    def copied(self, block: int) -> None:
        stream = self.now or self.main
        for place, other, _, time in self.reads:
            if place == block % 2 and other != block and stream.seen.get(self.main, 0) < time:
                self.faults.append(f"block {block} is copied before block {other} was read")
        stream.tick()
        self.copies.append((block % 2, block, dict(stream.seen)))

    def read(self, block: int) -> None:
        """Launch a kernel of a block, on the main stream."""
        place, held, seen = next(each for each in reversed(self.copies) if each[0] == block % 2)
        if held != block or any(self.main.seen.get(stream, 0) < time for stream, time in seen.items()):
            self.faults.append(f"block {block} is read where block {held} may be")
        self.reads.append((place, block, {}, self.main.tick()))


class Stream:
    def __init__(self, *_: Any, **__: Any) -> None:
        self.seen: dict[Any, int] = {self: 0}

    def tick(self) -> int:
        self.seen[self] += 1
        return self.seen[self]

    def wait_stream(self, other: Stream) -> None:
        self._come_after(other.seen)

    def wait_event(self, event: Event) -> None:
        self._come_after(event.seen)

    def _come_after(self, seen: dict[Any, int]) -> None:
        for stream, time in seen.items():
            self.seen[stream] = max(self.seen.get(stream, 0), time)


class Event:
    def __init__(self) -> None:
        self.seen: dict[Any, int] = {}

    def record(self, stream: Stream) -> None:
        self.seen = dict(stream.seen)


@pytest.fixture
def order(monkeypatch: pytest.MonkeyPatch) -> Order:
    order = Order()

    @contextmanager
    def entered(stream: Stream) -> Iterator[None]:
        order.now = stream
        yield
        order.now = None

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: order.main)
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(streamed_base, "_OnCpu", partial(streamed_base._SideStream, CPU))
    return order


@pytest.mark.parametrize(
    "case",
    [
        ("falcon-7b", "16bit", "torch", "none", "lora"),
        ("falcon-7b", "16bit", "torch", "full", "lora"),
        ("falcon-7b", "16bit", "reference", "full", "lora"),
    ],
    ids=" ".join,
)
def test_on_streams_no_copy_overtakes_a_kernel_and_each_has_a_blocks_time(case: Case, order: Order) -> None:
    model = made(CPU, *case, offload=True)
    base = streamed_base_of(model)
    assert base is not None
    told: list[str] = []
    fetch, use = base.storage.fetch, base._use

    def fetched(index: int, into: Any) -> None:
        order.copied(index)
        told.append(f"copy {index}")
        fetch(index, into)

    def used(index: int) -> None:
        if base._current is not None:
            order.read(base._current)  # the last kernels of the block before
        told.append(f"run {index}")
        use(index)
        order.read(index)

    base.storage.fetch, base._use = fetched, used  # type: ignore[method-assign]
    batch = packed(documents([7, 12], seed=1))
    with computing(CPU, case[2]):
        one_pass(model, batch, True)
        told.clear()
        one_pass(model, batch, True)
        one_pass(model, batch, False)
        one_pass(model, batch, True)
    assert order.faults == []
    # Twice where the reference path recomputes: its forward runs again.
    once = [each for each, before in zip(told, [None, *told], strict=False) if each != before]
    forward = "run 0 run 1 copy 2 run 2 copy 3 run 3 copy 4 run 4"
    assert " ".join(once).startswith(f"{forward} run 3 copy 2 run 2 copy 1 run 1 copy 0 run 0 run 1 copy 2")
    assert len(order.copies) > 20


def test_memory_is_two_blocks_on_the_card_and_all_in_page_locked_memory() -> None:
    from tests.unit.test_memory import step

    config = step("falcon-40b").config
    on_host = stored_bytes(config, "4bit")
    resident, offloaded = (weight_bytes(config, "4bit", offloaded=each) for each in (False, True))
    assert offloaded == resident - on_host + 2 * on_host // 60
    assert on_host / 60 == pytest.approx(350e6, rel=0.01)


def _refusal(words: str, *, free: int, monkeypatch: pytest.MonkeyPatch, processes: int = 1) -> str:
    monkeypatch.setattr(sizes, "free_host_bytes", lambda: free)
    monkeypatch.setattr(ranks, "local_world_size", lambda: processes)
    asked = config.parse([*words.split(), "--dataset_name", "sample"])
    try:
        asked.run.device = "cpu"
        preflight._check_model(asked)
    except UserError as error:
        return str(error)
    return ""


def test_a_base_that_cpu_memory_does_not_hold_as_often_as_processes_need_it_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = "-m random:falcon-40b --offload_base"
    refused = partial(_refusal, words, monkeypatch=monkeypatch)
    assert refused(free=22 * 10**9) == ""
    assert "take 19.6 GiB of CPU memory, and 18.6 GiB are free: 1.0 GiB short" in refused(free=20 * 10**9)
    assert "39.2 GiB for the 2 processes here" in refused(free=22 * 10**9, processes=2)
    assert "--quantize_mode 4bit" in _refusal(f"{words} -q 8bit", free=22 * 10**9, monkeypatch=monkeypatch)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--method full -q 16bit", "--method full trains every weight"),
        ("--use_dora", "DoRA reads every weight"),
        ("--sharding fsdp", "--offload_base and --sharding fsdp both say where the base lies"),
    ],
)
def test_what_needs_the_whole_base_on_the_device_is_refused_by_name(words: str, told: str) -> None:
    with pytest.raises(UserError, match=told):
        config.parse(["-m", "tiny", "--dataset_name", "sample", "--offload_base", *words.split()])


@pytest.mark.parametrize("flag", ["--offload_base", "--sharding fsdp"])
def test_an_adapter_to_begin_from_that_needs_the_whole_base_is_refused(flag: str) -> None:
    asked = config.parse(["-m", "tiny", "--dataset_name", "sample", *flag.split()])
    asked.method = Lora(use_dora=True)  # as it is adopted from the adapter
    with pytest.raises(UserError, match=f"^{flag}: DoRA reads every weight .*; drop it$"):
        sharding.check(asked, find_config("tiny"))


@pytest.mark.parametrize(
    "words",
    [
        "",
        "--offload_base --recipe smallest --batch_tokens 2048",
        "--packing false",
        "--sharding fsdp",
        "--use_dora",
        "--method full -q 16bit",
    ],
)
def test_what_a_run_out_of_memory_is_told_to_take_is_taken(words: str) -> None:
    given = ["-m", "tiny", "--dataset_name", "sample", *words.split()]
    ways = ways_to_take_less(config.parse(given))
    helps = not words or words in ("--packing false", "--sharding fsdp")
    assert any("--offload_base" in way for way in ways) is helps
    assert ("a smaller -b" in ways) is (words == "--packing false")
    for way in ways:
        if not way.startswith("a smaller"):
            new, _, old = way.partition(" instead of ")
            config.parse([*" ".join(given).replace(old, "").split(), *new.split()])
