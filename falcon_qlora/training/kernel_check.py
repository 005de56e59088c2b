"""The fast path beside the model's own forward: at every start; in a dry run each Triton kernel as well.

A compiler, a library or a card can make a kernel wrong that is right elsewhere, and wrong gradients may show
in no loss. So their distance is measured on this model's sizes and this GPU, before a run begins. On the CPU,
where nothing is compiled, a dry run alone does so.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.kernels.comparing import Difference, comparing
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.activations import a_block_of_each_kind, blocks_of, has_fast_blocks
from falcon_qlora.models.fast_path import fp8_weight_bytes, on_the_reference_path
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.load import quantization_of
from falcon_qlora.models.sharded import needs_all_processes
from falcon_qlora.processes import devices
from falcon_qlora.step.loss import documents_of, sum_of_losses

_MOST_TOKENS = 2048
# Tokens of each document at a start, and whether they are trained: few, so that they take less than any step,
# and most of them no targets, as in a run that trains answers, whose last block then computes those alone.
_DOCUMENTS = (1, False), (100, True), (37, False), (118, False)
_NUDGE = 0.02  # so that what starts at zero takes part
# A gradient may be off by so much of its norm; one kind of matrices, which the rest might hide, by more.
_FLOAT32, _BFLOAT16, _EIGHT_BITS, _ONE_KIND = 1e-2, 0.2, 0.5, 0.8
# And by so many times what rounding does to the model's own: where attention is sharp that is a lot.
_NOISES = 5


@dataclass(frozen=True)
class Distance:
    """How far the fast path is from the model's own forward, in a block of each kind.

    Attributes:
        loss, right: the loss, and the model's own.
        gradients: the norm of the difference of all gradients, of the norm of these.
        worst: the kind of matrices, such as LoRA's A of one linear in every block, for which that is largest.
        of_worst: of this kind, in terms of its own norm or a hundredth of the whole one, if that is more.
        limit: of loss and gradients.
        noise: of the model's own gradients when its linears round as the fast path does, and `of_worst` of
            that; 0 if it was not measured, as the rest is within the limits.
    """

    loss: float
    right: float
    gradients: float
    worst: str
    of_worst: float
    limit: float
    noise: tuple[float, float] = (0.0, 0.0)

    @property
    def of_loss(self) -> float:
        return abs(self.loss - self.right) / abs(self.right)

    @property
    def passed(self) -> bool:
        found = self.of_loss, self.gradients, self.of_worst
        most = self.limit, *(_NOISES * each for each in self.noise)
        limits = self.limit, max(most[:2]), max(_ONE_KIND, most[2])
        return all(each <= limit for each, limit in zip(found, limits, strict=True))  # NaN is not


def check_kernels(model: nn.Module, device: torch.device, kernels: str = "auto") -> Distance | str:
    """Compare a block of each kind with the model's own forward, on random tokens.

    A model does not expect them, so gradients are large; with a likely next token they would be next to
    nothing, and what is left of them rounding. The trained parameters move a little meanwhile and are put
    back; gradients are dropped.

    Args:
        model: with its kernels chosen.
        device: of the model.
        kernels: the setting by which they were chosen, for the error.

    Returns:
        The distance; or why nothing was compared.

    Raises:
        UserError: if they differ by more than rounding.
    """
    if not is_compiled_for(device):
        return "PyTorch's own, on the CPU"
    if (reason := _why_not(model)) is not None:
        return reason
    generator = np.random.default_rng(0)
    words = causal_lm_in(model).config.vocab_size
    batch = collate(
        [generator.integers(words, size=length) for length, _ in _DOCUMENTS],
        [np.full(length, is_target) for length, is_target in _DOCUMENTS],
    )
    found = _compared(model, batch, device, kernels)
    return found if isinstance(found, str) else found[0]


def is_compiled_for(device: torch.device) -> bool:
    """Whether kernels are compiled on the way."""
    return device.type == "cuda"


def compare_kernels(model: nn.Module, batch: MicroBatch, device: torch.device, kernels: str = "auto") -> str:
    """As `check_kernels`, on documents with unlikely targets; and Triton's kernels with their plain forms.

    Args:
        model: with its kernels chosen.
        batch: on the host; its first documents are used.
        device: of the model.
        kernels: as in `check_kernels`.

    Returns:
        What was compared, in a line.

    Raises:
        UserError: naming the kernel that differs.
    """
    if (reason := _why_not(model)) is not None:
        return f"not compared: {reason}"
    some = _first_documents(batch)
    words = causal_lm_in(model).config.vocab_size
    some = replace(some, targets=(some.targets + words // 2) % words)
    found = _compared(model, some, device, kernels, triton=True)
    if isinstance(found, str):
        return f"not compared: {found}"
    distance, differences = found
    told = (
        f"loss within {distance.of_loss:.1g} and gradients within {distance.gradients:.1g} of the model's own"
    )
    if differences:
        least = max(differences, key=lambda name: differences[name].excess)
        told += f"; {len(differences)} in Triton like their references ({least} the least)"
    return told


def _why_not(model: nn.Module) -> str | None:
    if not has_fast_blocks(model):
        return "the reference path runs"
    if needs_all_processes(model):
        return "the weights are shared out"
    return None


def _compared(
    model: nn.Module, batch: MicroBatch, device: torch.device, kernels: str, *, triton: bool = False
) -> tuple[Distance, dict[str, Difference]] | str:
    """The distance, and with `triton` those of its kernels; or why not.

    Raises:
        UserError: if one is too large.
    """
    differences: dict[str, Difference] = {}
    some, (limit, rounding) = batch.to(device), _precision(model)
    was_training = model.training
    model.eval()  # without dropout
    try:
        with devices.draws_undone(device), a_block_of_each_kind(model), _nudged(model):
            if triton:
                with comparing() as differences:
                    loss, gradients = _loss_and_gradients(model, some)
            else:
                loss, gradients = _loss_and_gradients(model, some)
            with on_the_reference_path(model):
                right, expected = _loss_and_gradients(model, some)
                if not math.isfinite(right):
                    return f"the model's own loss is {right}"
                found = Distance(loss, right, *_apart(gradients, expected), limit)
                if not found.passed:
                    with _rounding(model, rounding):
                        _, rounded = _loss_and_gradients(model, some)
                    of_all, _, of_one = _apart(rounded, expected)
                    found = replace(found, noise=(of_all, of_one))
    except torch.OutOfMemoryError:
        return "out of memory"  # the step itself tells whether the run fits
    finally:
        model.zero_grad(set_to_none=True)
        model.train(was_training)
    instead = ["--kernels off"]
    if fp8_weight_bytes(model):
        instead = ["--compute_dtype auto", "--compute_dtype auto --kernels off"]
    worst = max(differences.items(), key=lambda each: each[1].excess, default=None)
    if worst is not None and worst[1].excess > 1:
        raise UserError(
            f"kernel {worst[0]} in Triton differs from its plain reference by {worst[1].relative:.2g} of the "
            f"largest value: give {instead[-1]}, and report it with the GPU and the version of Triton"
        )
    if not found.passed:
        if kernels in ("auto", "required"):
            instead.insert(0, "--kernels portable, which leaves optional libraries out")
        raise UserError(
            f"the fast path differs from the model's own: a loss of {loss:.5g} against {right:.5g}, "
            f"gradients by {found.gradients:.2g} of their norm (rounding alone: {found.noise[0]:.1g}), "
            f"{found.worst} by {found.of_worst:.2g}. Give {'; or '.join(instead)}; and report it"
        )
    return found, differences


@contextmanager
def _rounding(model: nn.Module, by: float) -> Iterator[None]:
    """Within the block, outputs of the blocks' linears are off by so much of themselves."""

    def rounded(linear: nn.Module, taken: Any, output: Tensor) -> Tensor:
        return output * (1 + by * torch.randn_like(output))

    linears = layout_of(causal_lm_in(model).config).linears
    hooks = [
        linear.register_forward_hook(rounded)
        for block in blocks_of(model)
        for name, linear in block.named_modules()
        if name.rpartition(".")[2] in linears
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _precision(model: nn.Module) -> tuple[float, float]:
    """`Distance.limit`, and by how much of itself a product of fast blocks is rounded."""
    base = causal_lm_in(model)
    if fp8_weight_bytes(model) or quantization_of(base) == "8bit":
        return _EIGHT_BITS, 0.03  # LLM.int8(), 8bit's reference, rounds activations too
    if base.dtype != torch.float32:
        return _BFLOAT16, 2.0**-9
    return _FLOAT32, 2.0**-11 if torch.backends.cuda.matmul.allow_tf32 else 2.0**-22


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
    generators = {each.device: torch.Generator(each.device).manual_seed(0) for each in trained}
    try:
        for each in trained:
            noise = torch.randn(each.shape, generator=generators[each.device], device=each.device) * _NUDGE
            each.data = each.data + noise.to(each)
        yield
    finally:
        for each, data in zip(trained, before, strict=True):
            each.data = data


def _loss_and_gradients(model: Any, batch: MicroBatch) -> tuple[float, dict[str, Tensor]]:
    model.zero_grad(set_to_none=True)
    loss = sum_of_losses(model, batch) / max(len(batch.targets), 1)
    loss.backward()
    gradients = {name: each.grad for name, each in model.named_parameters() if each.grad is not None}
    return float(loss.detach()), gradients


def _apart(found: dict[str, Tensor], expected: dict[str, Tensor]) -> tuple[float, str, float]:
    """`Distance.gradients`, `worst` and `of_worst`; of a kind next to nothing, of 1 % of the whole norm."""
    if different := found.keys() ^ expected.keys():
        return math.inf, _kind(min(different)), math.inf
    off: dict[str, float] = defaultdict(float)
    of: dict[str, float] = defaultdict(float)
    for name, right in expected.items():
        off[_kind(name)] += float((found[name].float() - right.float()).square().sum())
        of[_kind(name)] += float(right.float().square().sum())
    whole = max(sum(of.values()), 1e-30)
    kinds = {kind: math.sqrt(off[kind] / max(of[kind], 1e-4 * whole)) for kind in of}
    worst = max(kinds, key=lambda kind: math.inf if math.isnan(kinds[kind]) else kinds[kind])
    return math.sqrt(sum(off.values()) / whole), worst, kinds[worst]


def _kind(name: str) -> str:
    """Such as ``dense.lora_A``, of a parameter's name."""
    words = [word for word in name.split(".") if not word.isdigit() and word not in ("default", "weight")]
    return ".".join(words[-2:])
