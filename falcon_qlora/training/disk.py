"""Checks that the disk has room for a run's checkpoints, and host memory for a copy of one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from falcon_qlora.checkpoint.host_copy import copy_bytes
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import free_bytes
from falcon_qlora.common.quantities import counted, sized
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.sharded import is_sharded, local_tensor, whole_bytes
from falcon_qlora.models.step_memory import embedded_share, optimizer_bytes
from falcon_qlora.processes import agreement, ranks
from falcon_qlora.run_folder.directory import RunDirectory

if TYPE_CHECKING:
    from trl import SFTConfig

    from falcon_qlora.training.trainer import FalconTrainer

# The small files beside the weights, with room to spare for the file system: the adapter's, a checkpoint's.
_SMALL_FILES, _SMALL_FILES_OF_CHECKPOINT = 16 * 2**20, 2 * 2**20


@dataclass(frozen=True)
class Needed:
    """What a run needs of the disk, at most.

    Attributes:
        adapter_bytes: of the adapter at the end.
        checkpoints: that lie there at once, while a new one is written.
        checkpoint_bytes: of each.
    """

    adapter_bytes: int
    checkpoints: int
    checkpoint_bytes: int

    @property
    def bytes(self) -> int:
        """Of all."""
        return self.checkpoints * self.checkpoint_bytes + self.adapter_bytes + _SMALL_FILES

    def __str__(self) -> str:
        count = f"{counted(self.checkpoints, 'checkpoint')} of {sized(self.checkpoint_bytes)} at once, "
        return (
            f"at most {sized(self.bytes)}: {count * (self.checkpoints > 0)}the adapter of "
            f"{sized(self.adapter_bytes)} and {sized(_SMALL_FILES)} for small files"
        )


def check_disk(
    directory: RunDirectory,
    model: Any,
    training: SFTConfig,
    *,
    optimizer: str,
    whole: bool,
    steps: int,
    by_clock: bool,
) -> Needed:
    """Refuse a disk without room for the run's checkpoints.

    Args:
        directory: where they will be.
        model: with its trainable parameters.
        training: says how often to save, and how many checkpoints to keep.
        optimizer: by the trainer's name.
        whole: whether all parameters of the model are trained.
        steps: of the run.
        by_clock: whether checkpoints are also saved by the clock.

    Raises:
        UserError: with what is needed and what is free.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    trainable = sum(parameter.numel() for parameter in trained)
    saves = _saves(training, steps) + (training.save_total_limit or 1) * by_clock
    needed = predicted_bytes(
        trainable,
        bytes_each=trained[0].element_size(),
        embedded=embedded_share(model.config) if whole else 0.0,
        optimizer=optimizer,
        saves=min(saves, steps),
        limit=training.save_total_limit,
        keeps_best=training.load_best_model_at_end,
        with_state=not training.save_only_model,
        with_tokenizer=method_of(model).new_token_count > 0,
    )
    fewest = min(needed.checkpoints, 2 + training.load_best_model_at_end)  # with --save_total_limit 1
    spare = (needed.checkpoints - fewest) * needed.checkpoint_bytes
    agreement.from_main_process(lambda: _check_room(directory, needed.bytes, spare))
    return needed


def waiting_saves(trainer: FalconTrainer, *, optimizer: str) -> list[str]:
    """A note for the user if the host lacks memory to save while training goes on; else nothing.

    Args:
        trainer: whose checkpointer decides.
        optimizer: by the trainer's name.
    """
    model, checkpointer = trainer.model, trainer.checkpointer
    if not ranks.is_main_process():
        return []
    if sharded := is_sharded(model):
        sizes = list(whole_bytes(model).values())
    else:
        sizes = [each.nbytes for each in method_of(model).trained_state(model).values()]
    states: list[int] = []
    if not checkpointer.weights_only:
        embedded = embedded_share(model.config) if method_of(model).is_whole else 0.0
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        state = optimizer_bytes(optimizer, trained[0].element_size(), embedded=embedded)
        # Most optimizers keep two tensors for each parameter.
        states = [int(local_tensor(each).numel() * state / 2) for each in trained for _ in range(2)]
    others = ranks.local_world_size() - 1 if sharded else 0  # on this host, with parts of their own
    why = checkpointer.too_large(copy_bytes(sizes + states) + others * copy_bytes(states))
    return [] if why is None else [why]


def predicted_bytes(
    trainable: int,
    *,
    optimizer: str,
    saves: int,
    limit: int | None,
    keeps_best: bool = False,
    bytes_each: int = 4,
    embedded: float = 0.0,
    with_state: bool = True,
    with_tokenizer: bool = False,
) -> Needed:
    """The checkpoints that lie on the disk at once, and the adapter at the end.

    Args:
        trainable: parameters.
        optimizer: by the trainer's name.
        saves: checkpoints in the whole run.
        limit: how many are kept; the new one is complete before an old one is removed.
        keeps_best: whether the best may stay beyond the limit.
        bytes_each: of a parameter.
        embedded: share of the parameters that are an embedding's.
        with_state: whether checkpoints have the optimizer's state.
        with_tokenizer: whether they have the tokenizer, as the adapter has.
    """
    state = optimizer_bytes(optimizer, bytes_each, embedded=embedded) if with_state else 0
    at_once = saves if limit is None else min(saves, limit + 1 + keeps_best)
    weights, small = int(trainable * bytes_each), _SMALL_FILES_OF_CHECKPOINT + with_tokenizer * _SMALL_FILES
    each = weights + int(trainable * state) + small
    return Needed(weights, at_once, each)


def _saves(training: Any, steps: int) -> int:
    if training.save_strategy == "no":
        return 0
    if training.save_strategy != "steps":
        return 1 + int(training.num_train_epochs)
    every = training.save_steps if training.save_steps >= 1 else max(steps * training.save_steps, 1)
    return max(int(steps / every), 1)


def _check_room(directory: RunDirectory, needed: int, spare: int) -> None:
    """Refuse if `needed` bytes do not fit; `spare` of them a smaller ``--save_total_limit`` would save."""
    free = free_bytes(directory.path)
    # What an earlier part of the run has written is replaced.
    written = sum(path.stat().st_size for path in directory.checkpoints.rglob("*") if path.is_file())
    if (short := needed - free - written) > 0:
        fewer = ", or keep fewer with --save_total_limit" * (short <= spare)
        where = "Free some" if written else "Name another folder with --output_dir"
        raise UserError(
            f"{directory}: the run's checkpoints need {sized(needed)}, and only {sized(free)} are free: "
            f"{sized(short)} short. {where}{fewer}"
        )
