"""Time variants in turn, round after round, so that drifting clocks and heat affect all of them alike.

A variant is built anew in every round and freed at its end, so two are never in memory together.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from falcon_qlora.bench import devices, say
from falcon_qlora.bench.documents import Document
from falcon_qlora.bench.machine import GpuLog, Sample
from falcon_qlora.bench.runners import OwnRunner, Settings, build
from falcon_qlora.bench.variants import Impossible, Pace, Variant
from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.common.quantities import GB
from falcon_qlora.models.load import free_bytes, load_model
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.models.sizes import weight_bytes
from falcon_qlora.processes.devices import free_memory

LARGEST_BATCHES = (64, 48, 32, 16, 8, 4, 2, 1)
# All quantizations of a model stay loaded together up to this share of the GPU's free memory. Beyond it they
# would decide which batches fit.
_SHARE_FOR_BASES = 0.25
# How the CUDA runtime and cuBLAS report OOM; PyTorch's allocator has an exception of its own.
_OUT_OF_MEMORY = ("out of memory", "ALLOC_FAILED")


@dataclass(kw_only=True)
class Result:
    """A row of the table: what to measure, and the results.

    Attributes:
        model: its name.
        parameters: of the model, the head counted once.
        variant: which one.
        batches: documents of each micro-batch, taken in turn. For a variant that searches for the largest
            batch, one batch with the most documents that are tried.
        micro_batch_tokens: capacity of a micro-batch.
        whole: whether a round goes through all batches once instead of a number of steps.
        seconds: of each round.
        tokens: real tokens of each round.
        steps: optimizer steps of each round.
        peak_allocated_gb, peak_reserved_gb: GB (10^9), the largest of all rounds; on the CPU both are the
            process's resident memory.
        loss: of the first step.
        documents: of the micro-batch, where the largest that fits was searched for.
        states_of_gpu: samples of `GpuLog` while it was timed.
        notes: for the reader.
        failure: why there are no figures, or None.
        kept: passed on from one build of the variant to the next.
    """

    model: str
    parameters: int
    variant: Variant
    batches: Sequence[Sequence[Document]]
    micro_batch_tokens: int
    whole: bool = False
    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    peak_allocated_gb: float = 0.0
    peak_reserved_gb: float = 0.0
    loss: float | None = None
    documents: int = 0
    states_of_gpu: list[Sample] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str | None = None
    kept: dict[str, Any] = field(default_factory=dict, repr=False)

    @property
    def tokens_per_second(self) -> float:
        return sum(self.tokens) / sum(self.seconds)

    @property
    def step_ms(self) -> float:
        return 1e3 * sum(self.seconds) / sum(self.steps)

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)


@dataclass(eq=False)
class Bench:
    """One model's variants on one device.

    Args:
        model: a name, see `load_model`.
        results: what to measure, in the order of the table.
        settings: common to all variants.
        pace: how long to measure.
        device: where to measure.
        log: the GPU's clock and power.
        revision: of a model on the hub.

    Attributes:
        interrupted: whether `run` was interrupted.
    """

    model: str
    results: list[Result]
    settings: Settings
    pace: Pace
    device: torch.device
    log: GpuLog
    revision: str | None = None

    def __post_init__(self) -> None:
        self.config = open_checkpoint(self.model, revision=self.revision).config
        self._deadline = time.perf_counter() + 60 * self.pace.minutes
        self._bases: dict[str, Any] = {}
        self._base_bytes: dict[str, int] = {}
        self.interrupted = False

    def run(self) -> list[Result]:
        """Measure everything and return the results in the order of the table.

        A KeyboardInterrupt ends it early: the results then hold what was measured, and `interrupted` is set.
        """
        try:
            self._measure_all()
        except KeyboardInterrupt:
            self.interrupted = True
            say("interrupted: the table has what was measured by now")
            self._bases.clear()
            free_memory()
        for result in self.results:
            if not result.seconds and result.failure is None:
                result.failure = "not measured: interrupted"
        return self.results

    def _measure_all(self) -> None:
        groups = self._groups()
        if len(groups) > 1:
            kinds = ", then ".join(" with ".join(group) for group in groups)
            say(
                f"{self.model}: not all its weights fit together, so they are loaded in turn ({kinds}); "
                "only variants on the same weights alternate"
            )
        for number, group in enumerate(groups):
            members = [result for result in self.results if result.variant.base in group]
            self._load(group, members)
            for turn in range(self.pace.rounds):
                if turn and time.perf_counter() > self._deadline:
                    say(f"the time is up after {turn} of {self.pace.rounds} rounds")
                    break
                # Alternating order, so that no variant always comes first.
                for result in members if turn % 2 == 0 else reversed(members):
                    if result.failure is None:
                        self._turn(result, turn)
            self._bases.clear()
            free_memory()
            if number:
                for result in members:
                    result.note("not in the same rounds as the first row")

    def _groups(self) -> list[list[str]]:
        variants = {result.variant.base: result.variant for result in self.results}
        sizes = [weight_bytes(self.config, variant.quantize_mode) for variant in variants.values()]
        if self.device.type != "cuda" or sum(sizes) <= _SHARE_FOR_BASES * free_bytes(self.device):
            return [list(variants)]
        return [[base] for base in variants]

    def _load(self, group: Sequence[str], members: Sequence[Result]) -> None:
        for base in group:
            started = time.perf_counter()
            before = devices.allocated(self.device)
            on_it = [result for result in members if result.variant.base == base]
            try:
                self._bases[base] = self._loaded(on_it[0].variant)
            except (UserError, Impossible, torch.OutOfMemoryError) as error:
                for result in on_it:
                    result.failure = one_line(error)
            if base not in self._bases:
                free_memory()  # not in the except clause: there the exception holds what was loaded
                continue
            self._base_bytes[base] = devices.allocated(self.device) - before
            say(f"{self.model} in {base}: loaded in {time.perf_counter() - started:.1f} s")

    def _loaded(self, variant: Variant) -> Any:
        if variant.engine and variant.engine.load:
            return variant.engine.load(self.model, self.settings, self.device)
        return load_model(
            self.model,
            quantize_mode=variant.quantize_mode,
            device=self.device,
            compute_dtype="bf16",
            revision=self.revision,
            seed=self.settings.seed,
        )

    def _turn(self, result: Result, turn: int) -> None:
        if not result.variant.largest_batch:
            result.failure = self._attempt(result, result.batches, turn)
            return
        documents = result.batches[0]
        # The search is for what GPU memory holds. On a CPU the large batches would only make it swap.
        tried = LARGEST_BATCHES if self.device.type == "cuda" else LARGEST_BATCHES[3:]
        for count in [result.documents] if turn else tried:
            result.documents = count
            result.failure = self._attempt(result, [documents[:count]], turn)
            if turn or result.failure is None or not result.failure.startswith("out of memory"):
                return
            result.note(f"batch {count} is out of memory")

    def _attempt(self, result: Result, batches: Sequence[Sequence[Document]], turn: int) -> str | None:
        """Measure one turn; None, or why it failed."""
        failure = None
        free_memory()
        try:
            self._measure(result, batches, turn)
        except torch.OutOfMemoryError:
            tokens = max(sum(len(ids) for ids, _ in batch) for batch in batches)
            failure = f"out of memory with {tokens:,} tokens a micro batch"
        except (Impossible, UserError) as error:
            failure = one_line(error)
        except Exception as error:
            # One row that fails must not lose the others.
            failure = f"failed: {type(error).__name__}: {one_line(error)}"
            if any(sign in str(error) for sign in _OUT_OF_MEMORY):
                failure = f"out of memory ({one_line(error)})"
        # Not in the except clauses: there the exception holds the step's memory on the device.
        free_memory()
        if failure:
            say(f"{result.model} {result.variant.name}: {failure}")
        return failure

    def _measure(self, result: Result, batches: Sequence[Sequence[Document]], turn: int) -> None:
        variant, pace = result.variant, self.pace
        base = self._bases[variant.base]
        others = devices.allocated(self.device) - self._base_bytes[variant.base]
        devices.reset_peak(self.device)
        with build(variant, base, self.settings, result.kept) as runner:
            prepared = [runner.prepare(batch) for batch in batches]
            steps = len(prepared) if result.whole else pace.steps
            warmup = max(1, pace.warmup - (1 if turn else 0))
            if result.whole:
                warmup = max(warmup, len(prepared))  # so that every shape has run before
            first = turn * steps
            loss = _steps(runner, prepared, 0, warmup)[0]
            devices.synchronize(self.device)
            with self.log.window() as state:
                started = time.perf_counter()
                _steps(runner, prepared, first, steps)
                devices.synchronize(self.device)
                seconds = time.perf_counter() - started
            timed = [batches[(first + step) % len(batches)] for step in range(steps)]
            for note in runner.notes:
                result.note(note)
            del prepared
        allocated, reserved = devices.peaks(self.device)
        result.peak_allocated_gb = max(result.peak_allocated_gb, (allocated - others) / GB)
        result.peak_reserved_gb = max(result.peak_reserved_gb, (reserved - others) / GB)
        result.loss = float(loss) if result.loss is None else result.loss
        if not result.whole:
            result.micro_batch_tokens = sum(len(ids) for ids, _ in batches[0])
        result.seconds.append(seconds)
        result.tokens.append(sum(len(ids) for batch in timed for ids, _ in batch))
        result.steps.append(steps)
        result.states_of_gpu += state
        say(
            f"{result.model} {variant.name}, {result.micro_batch_tokens:,} tokens, round {turn + 1}: "
            f"{1e3 * seconds / steps:,.0f} ms a step, {result.tokens[-1] / seconds:,.0f} tokens/s"
        )


def _steps(runner: OwnRunner, prepared: Sequence[Any], first: int, count: int) -> list[torch.Tensor]:
    return [runner.step(prepared[(first + step) % len(prepared)]) for step in range(count)]
