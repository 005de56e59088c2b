"""Each kernel that a run uses, once, against its plain reference: for a dry run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import MicroBatch
from falcon_qlora.kernels.comparing import comparing
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.activations import a_block_of_each_kind, has_fast_blocks
from falcon_qlora.models.fast_path import fp8_weight_bytes, on_the_reference_path
from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.models.load import quantization_of
from falcon_qlora.models.sharded import needs_all_processes
from falcon_qlora.processes import devices
from falcon_qlora.step.loss import documents_of, sum_of_losses

_MOST_TOKENS = 2048
_NUDGE = 0.02  # so that what starts at zero takes part
# Of a gradient's norm: what rounding may change, by what the blocks compute in.
_FLOAT32, _BFLOAT16, _EIGHT_BITS = 1e-3, 0.1, 0.3


def compare_kernels(model: nn.Module, batch: MicroBatch, device: torch.device) -> str:
    """Compare a block of each kind with the model's own forward, and Triton's kernels with their plain forms.

    The trained parameters move a little meanwhile and are put back; gradients are dropped.

    Args:
        model: with its kernels chosen.
        batch: on the host; its first documents are used.
        device: of the model.

    Returns:
        What was compared, in a line.

    Raises:
        UserError: naming the kernel that differs.
    """
    if not has_fast_blocks(model):
        return "none: the reference path"
    if needs_all_processes(model):
        return "not compared by themselves: the weights are shared out"
    some = _first_documents(batch).to(device)
    was_training = model.training
    model.eval()  # without dropout
    try:
        with devices.draws_undone(device), _nudged(model), a_block_of_each_kind(model):
            with comparing() as differences:
                loss, gradients = _loss_and_gradients(model, some)
            with on_the_reference_path(model):
                right, expected = _loss_and_gradients(model, some)
    except torch.OutOfMemoryError:
        return "not compared: out of memory"  # the step itself tells whether the run fits
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    without = f"{'--compute_dtype auto ' if fp8_weight_bytes(model) else ''}--kernels off"
    worst = max(differences.items(), key=lambda each: each[1].excess, default=None)
    if worst is not None and worst[1].excess > 1:
        raise UserError(
            f"kernel {worst[0]} in Triton differs from its plain reference by {worst[1].relative:.2g} of the "
            f"largest value: give {without}, and report it with the GPU and the version of Triton"
        )
    off = abs(loss - right) / abs(right)
    off_gradient = _relative(gradients, expected)
    limit = _limit(model)
    if not (off <= limit and off_gradient <= limit):
        raise UserError(
            f"the fast path differs from the model's own: a loss of {loss:.5g} against {right:.5g}, "
            f"gradients by {off_gradient:.2g} of their norm (limit {limit:g}). Give --kernels portable, or "
            f"{without}, and report it"
        )
    told = f"loss within {off:.1g} and gradients within {off_gradient:.1g} of the model's own"
    if worst is not None:
        told += f"; {len(differences)} in Triton like their references ({worst[0]} the least)"
    return told


def _limit(model: nn.Module) -> float:
    base = causal_lm_in(model)
    if fp8_weight_bytes(model) or quantization_of(base) == "8bit":
        return _EIGHT_BITS  # whose reference is LLM.int8(), which rounds activations too
    return _FLOAT32 if base.dtype == torch.float32 else _BFLOAT16


def _first_documents(batch: MicroBatch) -> MicroBatch:
    count = 1
    while count < len(batch.lengths) and sum(batch.lengths[: count + 1]) <= _MOST_TOKENS:
        count += 1
    return documents_of(batch, 0, count)


@contextmanager
def _nudged(model: nn.Module) -> Iterator[None]:
    """Within the block every trained number is a little away from where it was; not of a whole model."""
    trained = [each for each in model.parameters() if each.requires_grad]
    if method_of(model).is_whole:
        trained = []
    before = [each.data for each in trained]
    generator = torch.Generator().manual_seed(0)
    try:
        for each in trained:
            noise = torch.randn(each.shape, generator=generator) * _NUDGE
            each.data = each.data + noise.to(each)
        yield
    finally:
        for each, data in zip(trained, before, strict=True):
            each.data = data


def _loss_and_gradients(model: Any, batch: MicroBatch) -> tuple[float, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = sum_of_losses(model, batch) / max(len(batch.targets), 1)
    loss.backward()
    gradients = [each.grad for each in model.parameters() if each.grad is not None]
    return float(loss.detach()), gradients


def _relative(found: list[Tensor], expected: list[Tensor]) -> float:
    """The norm of the difference of all, of the norm of what is expected."""
    if len(found) != len(expected):
        return float("inf")
    off = sum(float((a.float() - b.float()).square().sum()) for a, b in zip(found, expected, strict=True))
    of = sum(float(each.float().square().sum()) for each in expected)
    return (off / of) ** 0.5 if of else (0.0 if off == 0 else float("inf"))
