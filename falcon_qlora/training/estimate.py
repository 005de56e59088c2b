"""What a run would take on a card: memory by part and tokens/s, from the settings alone. Imports no torch."""

from __future__ import annotations

import functools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.fp8 import FIRST_CAPABILITY, fp8_excludes
from falcon_qlora.common.quantities import GIB
from falcon_qlora.data.packing import fill, mean_document
from falcon_qlora.methods.interface import trainable_count
from falcon_qlora.methods.lora import Lora
from falcon_qlora.models import step_memory
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.sizes import stored_bytes, weight_bytes
from falcon_qlora.models.step_memory import Checkpointing, Step
from falcon_qlora.processes import devices
from falcon_qlora.training import sharding
from falcon_qlora.training.cards import MEASURED, Card
from falcon_qlora.training.expected_speed import StepTime
from falcon_qlora.training.rows import global_batch

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from falcon_qlora.config import Configuration
    from falcon_qlora.config.arguments import RunArguments
    from falcon_qlora.data.packing import Plan
    from falcon_qlora.methods.interface import Method

# Beside PyTorch's own: what nvidia-smi counts of an H200 for CUDA and loaded kernels, and for NCCL.
_CONTEXT_BYTES, _NCCL_BYTES = int(0.85 * GIB), int(0.7 * GIB)
_ALL: tuple[Checkpointing, ...] = ("none", "selective", "full", "offload")


def step_of(
    config: PreTrainedConfig,
    method: Method,
    *,
    tokens: int,
    micro_batches: int,
    optimizer: str,
    fast: bool,
    in_fp8: bool,
    value_bytes: int,
    trainable: int,
    processes: int,
    is_sharded: bool,
) -> Step:
    """A process's step, for its memory.

    Args:
        config: the model, or its outline.
        tokens: of a micro batch.
        micro_batches: of a step.
        optimizer: by the trainer's name.
        fast, in_fp8, value_bytes: as in `Step`.
        trainable: parameters that this process trains: its part of a sharded model's.
        is_sharded: whether full fine-tuning's model is.
    """
    trainable_bytes = 4 if method.trains_in_float32 else value_bytes
    return Step(
        config=config,
        tokens=tokens,
        trainable=trainable,
        trainable_bytes=trainable_bytes,
        gradients_stay=micro_batches > 1 or (processes > 1 and not is_sharded),
        gathered=step_memory.gathered_bytes(config, trainable_bytes) if is_sharded else 0,
        fast=fast,
        in_fp8=in_fp8,
        **method.step_memory(),
        value_bytes=value_bytes,
        optimizer_bytes=step_memory.allocated_optimizer_bytes(
            optimizer,
            trainable_bytes,
            embedded=step_memory.embedded_share(config) if method.is_whole else 0.0,
        ),
    )


def micro_batches_of(run: RunArguments, *, tokens: int, max_length: int, processes: int) -> int:
    """Micro-batches of so many tokens that a process has in a step, where documents fill it."""
    return max(1, math.ceil(global_batch(run, processes) * max_length / (tokens * processes)))


def told_blocks(blocks: Sequence[Checkpointing]) -> str:
    """What each block keeps, in few words."""
    (first, _), *rest = Counter(blocks).most_common()
    of_some = [f"{what} in {count} of {len(blocks)}" for what, count in rest]
    return ", ".join([*of_some, f"else {first}"] if rest else [first])


def why_reference(
    configuration: Configuration, config: PreTrainedConfig, card: Card | None = None
) -> str | None:
    """Why the blocks would run on the reference path of a card; None where they run on the fast one."""
    method, layout = configuration.method, layout_of(config)
    if configuration.model.kernels == "off":
        return "--kernels off"
    if _dtype_on(configuration, card) == "float16":
        return "computes in float16"
    if method.is_whole:
        return "every weight is trained"
    if method.step_memory().get("scaled") and layout.residuals == 2:
        return "scales and biases on the linears"
    return "DoRA" if isinstance(method, Lora) and method.use_dora else layout.unlike_fast_block()


def _dtype_on(configuration: Configuration, card: Card | None) -> str:
    bfloat16 = card is None or card.bfloat16
    return devices.dtype_name(configuration.model.compute_dtype, bfloat16=bfloat16)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A run on a card.

    Attributes:
        card: None where none was named; then nothing limits it.
        parts: bytes on the card at the fullest moment, by name.
        blocks: what each block keeps.
        micro_batch_tokens: the micro batch's capacity.
        micro_batches: of a step.
        has_room: whether it fits with what `Step.fits` leaves to spare.
        step_bytes: of the parts, those that a step takes, with weights kept in FP8.
        tokens_per_second: over all processes; None where the card's ceilings are not known.
        host_bytes: page-locked CPU memory of a process, with ``--offload_base``.
        passes: with it, `StepTime.passes`; None where the card's ceilings are not known.
    """

    card: Card | None
    parts: dict[str, int]
    blocks: list[Checkpointing]
    micro_batch_tokens: int
    tokens_per_second: float | None
    micro_batches: int = 1
    has_room: bool = True
    step_bytes: int = 0
    host_bytes: int = 0
    passes: tuple[tuple[float, float], tuple[float, float]] | None = None

    @property
    def card_gib(self) -> float:
        """All of it, as nvidia-smi would count it at the peak; GiB."""
        return sum(self.parts.values()) / GIB

    @property
    def fits(self) -> bool | None:
        return None if self.card is None else self.card_gib <= self.card.gib

    def gib_for(self, share: float) -> float:
        """The GiB of a card that has room for a step that takes this share of what this one does."""
        beside = sum(self.parts.values()) - self.step_bytes
        return (beside + share * self.step_bytes / step_memory.USABLE_SHARE) / GIB

    @property
    def basis(self) -> str:
        """What the speed is estimated from."""
        if self.card is None or self.card.bf16 is None:
            return "the speed of this card is not known"
        if self.card == MEASURED or self.card.title == MEASURED.title:
            return f"the speed by steps measured on an {MEASURED.title}"
        return f"the speed by published ceilings and the share of them reached on an {MEASURED.title}"

    @property
    def checkpointing(self) -> str:
        """What the blocks keep, such as ``none`` or ``full in 6 of 32, else selective``."""
        return told_blocks(self.blocks)


def of_rows(configuration: Configuration, plan: Plan) -> dict[str, Any]:
    """What the speed depends on of the rows in `plan`, as arguments of `Estimator`."""
    data, run = configuration.data, configuration.run
    padded = 1.0
    if not data.packing:
        padded = fill(plan, micro_batch=run.per_device_train_batch_size, padding=data.padding)
    return {"document_tokens": mean_document(plan.lengths), "real_share": padded}


class Estimator:
    """Estimates runs with the settings of a configuration.

    Args:
        configuration: as for training.
        config: the base model's, or its outline.
        processes: one a GPU.
        document_tokens: of the document that a token is in, on average.
        real_share: of the positions that are computed, those that are no padding.
        reference: why the blocks run on the reference path here, where the settings would have the fast one.
        stays_whole: the model is there, and is not sharded, whatever else is asked of smaller cards.

    Raises:
        UserError: for settings that training would refuse.
    """

    def __init__(
        self,
        configuration: Configuration,
        config: PreTrainedConfig,
        *,
        processes: int = 1,
        document_tokens: float = 512,
        real_share: float = 1.0,
        reference: str | None = None,
        stays_whole: bool = False,
    ):
        self.configuration, self.config, self.processes = configuration, config, processes
        self.document_tokens = min(document_tokens, configuration.data.max_length)
        self.real_share = real_share
        settings, method = configuration.model, configuration.method
        self._reference, self._stays_whole = reference, stays_whole
        self.in_fp8 = settings.compute_dtype == "fp8"
        excluded = fp8_excludes(kernels=settings.kernels, **method.fp8_facts()) if self.in_fp8 else None
        if self.in_fp8 and (excluded := excluded or self.reason_on(None)):
            raise UserError(f"--compute_dtype fp8: {excluded}. Use --compute_dtype auto.")
        self.optim = configuration.trainer["optim"]
        if configuration.run.sharding == "zero3":
            of = " with --gpus, of how many processes" if processes == 1 else ""
            raise UserError(f"--sharding zero3 is not estimated: --sharding fsdp shares out as much{of}")
        if configuration.run.sharding == "fsdp" and processes == 1:
            raise UserError(
                "--sharding fsdp splits the model over several processes: say of how many by --gpus"
            )
        self.trainable = trainable_count(method, config)
        self._step = functools.cache(self._step_of)  # the same on every card of a kind

    def largest(self, card: Card, checkpointing: Checkpointing) -> int:
        """The most sequences of a micro batch that fit, where all blocks do the same; 0: none does."""
        few, many = 0, 1
        while self._all(card, checkpointing, many).fits:
            few, many = many, 2 * many
        while many - few > 1:
            middle = (few + many) // 2
            few, many = (middle, many) if self._all(card, checkpointing, middle).fits else (few, middle)
        return few

    def _all(self, card: Card | None, checkpointing: Checkpointing, sequences: int) -> Estimate:
        return self.on(card, checkpointing=checkpointing, sequences=sequences)

    def reason_on(self, card: Card | None) -> str | None:
        """See `why_reference`."""
        return why_reference(self.configuration, self.config, card) or self._reference

    def choices(self, card: Card | None) -> Sequence[Checkpointing]:
        """What the blocks may be asked to keep."""
        return [each for each in _ALL if each != "selective" or self.reason_on(card) is None]

    def why_not_on(self, card: Card) -> str | None:
        """Why a card cannot compute what is asked for; None where it can."""
        dtype = self.configuration.model.compute_dtype
        if self.in_fp8 and card.bf16 and card.fp8 is None:
            first = ".".join(map(str, FIRST_CAPABILITY))
            return f"--compute_dtype fp8: {card.title} has no FP8, which begins at compute capability {first}"
        if dtype == "bf16" and not card.bfloat16:
            return f"--compute_dtype bf16: {card.title} has no bfloat16"
        if self.configuration.method.is_whole and _dtype_on(self.configuration, card) == "float16":
            return f"--method full does not train in fp16, in which {card.title} computes"
        return None

    def on(
        self,
        card: Card | None,
        *,
        checkpointing: str | list[Checkpointing] | None = None,
        sequences: int | None = None,
        tokens: int | None = None,
    ) -> Estimate:
        """The run on a card; None: on one without limits.

        Args:
            checkpointing: instead of the configuration's, for all blocks or for each.
            sequences: of a micro batch, likewise.
            tokens: of a micro batch, into which the global batch is cut; None: what `-b` says.

        Raises:
            UserError: if the card cannot compute in what is asked for.
        """
        settings, method, run = self.configuration.model, self.configuration.method, self.configuration.run
        if card is not None and (reason := self.why_not_on(card)):
            raise UserError(f"{reason}. Use --compute_dtype {'fp32' if method.is_whole else 'auto'}.")
        if sequences is not None:
            run = replace(run, per_device_train_batch_size=sequences)
        fast = self.reason_on(card) is None
        value_bytes = 4 if _dtype_on(self.configuration, card) == "float32" else 2
        sharded, shared_out = self._is_sharded(card, value_bytes), self._shares_out
        optim = sharding.OPTIMIZER if sharded else self.optim
        parts = self.processes if sharded else 1
        length = self.configuration.data.max_length
        cut = tokens or run.per_device_train_batch_size * length
        count = micro_batches_of(run, tokens=cut, max_length=length, processes=self.processes)
        of_step = math.ceil(global_batch(run, self.processes) / self.processes) * length if tokens else cut
        evenly = min(cut, math.ceil(of_step / count)) if tokens else cut
        step = self._step(min(cut, of_step), count, optim, fast, value_bytes, sharded)
        stored: dict[str, Any] = {
            "double_quantization": settings.double_quantization,
            "compute_bytes": value_bytes,
        }
        weights = weight_bytes(
            self.config,
            settings.quantize_mode,
            processes=self.processes if shared_out else 1,
            offloaded=run.offload_base,
            **stored,
        )
        on_host = stored_bytes(self.config, settings.quantize_mode, **stored) if run.offload_base else 0
        held = {"weights": weights // parts}
        if not method.is_whole:
            held["adapter"] = 4 * self.trainable
        outside = {"CUDA and kernels": _CONTEXT_BYTES}
        if self.processes > 1:
            outside["NCCL"] = _NCCL_BYTES
        if optim.startswith("paged"):
            outside["pages of the optimizer"] = int(
                step.trainable * step_memory.optimizer_bytes(optim, step.trainable_bytes)
            )
        free = math.inf
        if card is not None:
            free = card.gib * GIB - sum(held.values()) - sum(outside.values())
        blocks, kept = self._blocks(step, card, free, checkpointing or run.checkpointing)
        if kept:
            held["weights in FP8"] = kept
        time = self._time(step, blocks, evenly, fp8_kept=bool(kept), streamed=on_host)
        known = card if card is not None and card.bf16 is not None else None
        return Estimate(
            card=card,
            parts=held | step.parts(blocks) | outside,
            blocks=blocks,
            micro_batch_tokens=cut,
            tokens_per_second=None if known is None else self._speed(known, time, count),
            micro_batches=count,
            has_room=step.fits(blocks, free, beside=kept),
            step_bytes=step.bytes(blocks) + kept,
            host_bytes=on_host,
            passes=time.passes(known) if known is not None and on_host else None,
        )

    def _step_of(
        self, tokens: int, micro_batches: int, optim: str, fast: bool, value_bytes: int, is_sharded: bool
    ) -> Step:
        return step_of(
            self.config,
            self.configuration.method,
            tokens=tokens,
            micro_batches=micro_batches,
            optimizer=optim,
            fast=fast,
            in_fp8=self.in_fp8,
            value_bytes=value_bytes,
            trainable=self.trainable // (self.processes if is_sharded else 1),
            processes=self.processes,
            is_sharded=is_sharded,
        )

    def shares_out(self, card: Card | None) -> bool:
        """Whether the processes share out the weights, so that every forward pass needs all of them."""
        value_bytes = 4 if self.configuration.model.compute_dtype == "fp32" else 2
        return self.processes > 1 and (self._shares_out or self._is_sharded(card, value_bytes))

    @property
    def _shares_out(self) -> bool:
        return sharding.shares_out_base(self.configuration)

    def _is_sharded(self, card: Card | None, value_bytes: int) -> bool:
        """Whether full fine-tuning shards its model."""
        wanted, whole = self.configuration.run.sharding, self.configuration.method.is_whole
        if self._stays_whole:
            return False
        if wanted != "auto" or not whole or self.processes == 1 or card is None:
            return wanted == "fsdp" and whole
        return sharding.replica_is_too_large(self.config, self.optim, value_bytes, card.gib * GIB)

    def _blocks(
        self, step: Step, card: Card | None, free: float, wanted: str | list[Checkpointing]
    ) -> tuple[list[Checkpointing], int]:
        """What the blocks keep, and bytes of weights kept in FP8, as `choose_activations` would have it."""
        if wanted == "selective" and not step.fast:
            reason = self.reason_on(card)
            raise UserError(
                f"--checkpointing selective is the fast path's: {reason}. Give full, none or auto"
            )
        if wanted == "auto":
            blocks = step.choose(free)
        elif isinstance(wanted, list):
            blocks = wanted
        else:
            blocks = [wanted] * self.config.num_hidden_layers  # type: ignore[list-item]
        in_fp8 = 2 * layout_of(self.config).linear_parameter_count() if self.in_fp8 else 0
        stays = not (self._shares_out or self.configuration.run.offload_base)
        keeps = set(blocks) == {"none"} and stays and step.fits(blocks, free, beside=in_fp8)
        return blocks, in_fp8 if keeps else 0

    def _time(
        self, step: Step, blocks: list[Checkpointing], tokens: int, *, fp8_kept: bool, streamed: int
    ) -> StepTime:
        settings, method = self.configuration.model, self.configuration.method
        return StepTime(
            config=self.config,
            quantize_mode=settings.quantize_mode,
            tokens=tokens,
            blocks=blocks,
            trained=step.trainable,
            document_tokens=self.document_tokens,
            low_rank=isinstance(method, Lora),
            dropout=step.lora_dropout,
            fast=step.fast,
            all_trained=method.is_whole,
            in_fp8=self.in_fp8,
            fp8_kept=fp8_kept,
            optim=self.optim,
            streamed=streamed,
        )

    def _speed(self, card: Card, time: StepTime, micro_batches: int) -> float:
        return self.real_share * self.processes * time.tokens_per_second(card, micro_batches=micro_batches)
