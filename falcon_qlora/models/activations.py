"""What each block keeps for its backward pass, and what it recomputes.

| | fast block | reference block |
|---|---|---|
| none | all it needs | all it needs |
| selective | all but the feed-forward's first outputs, the largest | – |
| full | its input | its input: Transformers' checkpointing |
| offload | its input, in CPU memory | its input, in CPU memory |

PyTorch's selective policies choose by operation. A reference block's products dequantize their weights on the
way, and a policy would have to tell those from activations for every quantization. So reference blocks have
no ``selective``.

Offloading moves only the inputs. A 7B's are 0.29 MB a token: at 18,000 tokens/s that is 5 GB/s, a tenth of
what PCIe 5 moves one way. So there is room for eight GPUs on one host, and for older links. What
``selective`` keeps is three times as much (0.91 MB); offloading it would save a twelfth of the step. What
``none`` keeps is seven times as much, more than the link moves during a forward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from falcon_qlora.kernels.offload import Offload
from falcon_qlora.models.blocks.fast_block import Keep, state_of
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.step_memory import Checkpointing

_KEEP: dict[Checkpointing, Keep] = {
    "none": "all",
    "selective": "attention",
    "full": "input",
    "offload": "offload",
}


def blocks_of(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """The blocks of `model`, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def has_fast_blocks(model: nn.Module) -> bool:
    """Whether `apply_fast_path` has taken any block of `model`."""
    return any(state_of(block) is not None for block in blocks_of(model))


@contextmanager
def a_block_of_each_kind(model: nn.Module) -> Iterator[None]:
    """Within the block, `model` has few blocks: with them every kernel runs that runs with all.

    These are the first and the last two, and the first that keeps what no earlier one does.
    """
    backbone: Any = causal_lm_in(model).base_model
    name = layout_of(backbone.config).blocks
    blocks = getattr(backbone, name)
    firsts: dict[Any, int] = {}
    for index, block in enumerate(blocks):
        firsts.setdefault(getattr(state_of(block), "keep", None), index)
    few = sorted({0, *range(len(blocks))[-2:], *firsts.values()})
    setattr(backbone, name, nn.ModuleList(blocks[index] for index in few))
    try:
        yield
    finally:
        setattr(backbone, name, blocks)


def set_checkpointing(model: nn.Module, checkpointing: Sequence[Checkpointing]) -> None:
    """Set what each block keeps. Call it after `apply_fast_path`.

    Args:
        model: with packing enabled.
        checkpointing: one per block.

    Raises:
        ValueError: if ``selective`` is asked of a reference block.
    """
    offload = Offload()
    for index, (block, wanted) in enumerate(zip(blocks_of(model), checkpointing, strict=True)):
        fast = state_of(block)
        if fast is not None:
            fast.keep = _KEEP[wanted]
            continue
        if wanted == "selective":
            raise ValueError(
                f"block {index} runs on the reference path, which has no selective recomputation"
            )
        block.gradient_checkpointing = wanted != "none"
        # The reentrant kind does not work under DistributedDataParallel.
        again: Any = partial(checkpoint, use_reentrant=False)
        block._gradient_checkpointing_func = (
            partial(_moving_its_input, offload) if wanted == "offload" else again
        )


def _moving_its_input(offload: Offload, run: Callable[..., Any], hidden: Tensor, *args: Any) -> Any:
    with offload.moving(hidden):
        return checkpoint(run, hidden, *args, use_reentrant=False)
