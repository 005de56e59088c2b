"""Which activations the blocks keep for the backward pass: chosen, then tried before the first step."""

from __future__ import annotations

import contextlib
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.quantities import GIB
from falcon_qlora.config.arguments import RunArguments
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.fast_path import reason_left_alone, runs_fast
from falcon_qlora.processes import agreement, devices, ranks
from falcon_qlora.training.estimate import micro_batches_of, step_of

if TYPE_CHECKING:
    from falcon_qlora.data.batches import TrainingSteps
    from falcon_qlora.data.packing import MicroBatch
    from falcon_qlora.models.step_memory import Checkpointing, Step
    from falcon_qlora.training.batch_tokens import Cut
    from falcon_qlora.training.trainer import FalconTrainer

_DESCRIPTIONS: dict[Checkpointing, str] = {
    "none": "kept",
    "selective": "the largest recomputed",
    "full": "recomputed",
    "offload": "recomputed from inputs in CPU memory",
}


@dataclass(frozen=True)
class Activations:
    """What was chosen.

    Attributes:
        blocks: the choice for each block.
        predicted_gib: the process's predicted peak memory, GiB; None on the CPU and with ZeRO-3.
        fp8_weights_kept: whether there was room to keep the frozen weights in FP8, converted only once.
        held_bytes: what lay on the device before a step; 0 on the CPU.
    """

    blocks: list[Checkpointing]
    predicted_gib: float | None = None
    fp8_weights_kept: bool = False
    held_bytes: int = 0

    def described(self) -> str:
        """For the terminal, such as ``activations: kept; recomputed in 12 of 60 blocks``."""
        counts = Counter(self.blocks)
        (first, _), *rest = [(what, counts[what]) for what in _DESCRIPTIONS if what in counts]
        told = [f"activations: {_DESCRIPTIONS[first]}"]
        told += [f"{_DESCRIPTIONS[what]} in {count} of {len(self.blocks)} blocks" for what, count in rest]
        if self.fp8_weights_kept:
            told.append("weights kept in FP8")
        if self.predicted_gib is not None:
            told.append(f"{self.predicted_gib:.1f} GiB predicted on one device")
        return "; ".join(told)


def choose_activations(
    run: RunArguments,
    model: Any,
    kernels: dict[str, str],
    *,
    max_length: int,
    optimizer: str,
    cut: Cut | None = None,
    held_bytes: int | None = None,
) -> Activations:
    """Set what each block keeps: as `--checkpointing` says; with auto, as much as memory allows.

    Args:
        run: holds `--checkpointing`, and how many sequences a micro-batch and a step have.
        cut: of a step into micro-batches, and what was decided with it; None: what `-b` says.
        held_bytes: what lay on the device when this was called before.
        model: with a method attached.
        max_length: tokens of a sequence.
        optimizer: by the trainer's name.
        kernels: from `choose_kernels`.

    Raises:
        UserError: if ``--checkpointing selective`` meets a block on the reference path.
    """
    from falcon_qlora.models.activations import blocks_of, set_checkpointing
    from falcon_qlora.models.fast_path import fp8_weight_bytes

    wanted = run.checkpointing
    count = len(blocks_of(model))
    left = on_reference_path(kernels)
    if wanted == "selective" and left:
        raise UserError(
            f"--checkpointing selective is the fast path's, and {len(left) if kernels else count} of {count} "
            f"blocks run on the reference path ({reason_left_alone(left[0])}); "
            "give --checkpointing full, none or auto"
        )
    blocks: list[Checkpointing] = ["none" if wanted == "auto" else wanted] * count
    device = devices.local_device()
    predicted, kept, held = None, False, 0
    decided = cut is not None and cut.blocks is not None
    if cut is not None and cut.blocks is not None:
        blocks = cut.blocks
    if device.type == "cuda":
        step = _step(run, model, cut, max_length=max_length, optimizer=optimizer, fast=not left)
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info(device)[0]
        if wanted == "auto" and not decided:
            blocks = step.choose(free)
        # What was decided is decided, whatever is free now.
        room = free if not decided else math.inf if cut is not None and cut.keeps_fp8 else 0
        held = torch.cuda.memory_allocated(device) if held_bytes is None else held_bytes
        kept = _keep_fp8_weights(model, step, blocks, room)
        if run.sharding != "zero3":  # of DeepSpeed's buffers nothing is known here
            predicted = (held + kept * fp8_weight_bytes(model) + step.bytes(blocks)) / GIB
    set_checkpointing(model, blocks)
    return Activations(blocks, predicted, kept, held)


def on_reference_path(kernels: dict[str, str]) -> list[str]:
    """Of blocks that run on the reference path, why; `kernels`: from `choose_kernels`."""
    return [what for what in kernels.values() if not runs_fast(what)] if kernels else ["--kernels off"]


def _keep_fp8_weights(model: Any, step: Step, blocks: list[Checkpointing], free_bytes: float) -> bool:
    from falcon_qlora.models.fast_path import drop_fp8_weights, fp8_weight_bytes, keep_fp8_weights
    from falcon_qlora.models.streamed_base import streamed_base_of

    needed = 0 if streamed_base_of(model) is not None else fp8_weight_bytes(model)  # all would be kept
    if not needed or set(blocks) != {"none"} or not step.fits(blocks, free_bytes, beside=needed):
        drop_fp8_weights(model)
        return False
    with contextlib.suppress(torch.OutOfMemoryError):  # where others use the GPU too
        keep_fp8_weights(model)
        return True
    drop_fp8_weights(model)
    devices.free_memory()
    return False


def _step(
    run: RunArguments, model: Any, cut: Cut | None, *, max_length: int, optimizer: str, fast: bool
) -> Step:
    from falcon_qlora.models.fast_path import fp8_weight_bytes
    from falcon_qlora.models.sharded import is_sharded, local_count

    processes = ranks.world_size()
    tokens = run.per_device_train_batch_size * max_length if cut is None else cut.filled
    return step_of(
        model.config,
        method_of(model),
        tokens=tokens,
        micro_batches=micro_batches_of(run, tokens=tokens, max_length=max_length, processes=processes),
        optimizer=optimizer,
        fast=fast,
        in_fp8=fp8_weight_bytes(model) > 0,
        value_bytes=model.dtype.itemsize,
        trainable=local_count(model),
        processes=processes,
        is_sharded=is_sharded(model),
    )


def warm_up(trainer: FalconTrainer, less: Callable[[int], list[str]]) -> None:
    """On a GPU, run the largest micro-batch of the run once, forward and backward, and drop the gradients.

    So too little memory is found before the first step, and PyTorch's allocator begins with the largest
    pieces it will need. Kernels are compiled first, by a pass through few blocks in which none runs. No
    parameter and no random state changes. A stream does nothing here: its largest micro-batch is not known.

    Args:
        less: what takes less memory than a micro-batch of so many tokens, for the error.

    Raises:
        UserError: if the GPU's memory is too small.
    """
    from falcon_qlora.kernels.compiling import compiled_ahead
    from falcon_qlora.models.activations import a_block_of_each_kind, has_fast_blocks
    from falcon_qlora.models.sharded import needs_all_processes
    from falcon_qlora.models.zero3 import is_zero3
    from falcon_qlora.step.loss import sum_of_losses

    device = trainer.args.device
    # ZeRO-3 shards the model together with its optimizer, when training starts.
    tries = warms_up(device) and not is_zero3(trainer.model)
    batch = largest_micro_batch(trainer) if tries else None
    if batch is None:
        return
    model = trainer.model

    def there_and_back(batch: MicroBatch) -> None:
        with devices.draws_undone(device), trainer.accelerator.autocast():
            loss = sum_of_losses(model, batch.to(device))
        loss.backward()

    def fits(batch: MicroBatch) -> bool:
        was_training = model.training
        model.train()
        try:
            # Which blocks are few depends on this process's memory, and all must gather the same.
            if not needs_all_processes(model) and has_fast_blocks(model):
                with compiled_ahead(), a_block_of_each_kind(model):
                    there_and_back(batch)
                model.zero_grad(set_to_none=True)
            there_and_back(batch)
        except torch.OutOfMemoryError:
            return False
        finally:
            model.zero_grad(set_to_none=True)
            model.train(was_training)
        return True

    fitted = fits(batch)
    while trainer.cutter.may_shrink:
        without = [rank for rank, fitted in enumerate(agreement.met_by_all(fitted)) if not fitted]
        if not without or not trainer.shrink(without):
            break
        devices.free_memory()
        batch = largest_micro_batch(trainer)
        assert batch is not None
        fitted = fits(batch)
    if not fitted:
        tokens = sum(batch.lengths)
        raise UserError(
            f"The largest micro batch of the run, {tokens:,} tokens, does not fit into the GPU's memory. "
            f"Take less: {', '.join(less(tokens))}"
        )
    agreement.wait_for_all()  # nothing is written where another process lacks memory


def warms_up(device: torch.device) -> bool:
    return device.type == "cuda"


def largest_micro_batch(trainer: FalconTrainer) -> MicroBatch | None:
    """This process's largest, of the step with the most tokens; if padded, with the longest document."""
    from falcon_qlora.data.batches import TrainingSteps

    steps = trainer.steps
    if not isinstance(steps, TrainingSteps):
        return None
    share = trainer.as_cut(steps[largest_step(steps)])
    return max(share.micro_batches, key=lambda batch: sum(batch.lengths))


def largest_step(steps: TrainingSteps) -> int:
    """The step of the first epoch with the most tokens; if padded, with the longest document."""
    plan = steps.plan
    first = plan.epoch(0)[: len(steps)]
    return max(
        range(len(first)),
        key=lambda n: plan.lengths[first[n]].sum() if plan.packed else plan.lengths[first[n]].max(),
    )
