"""Faults put into the fast path on purpose: the gate must reject each.

A mutant is a context manager around calls of a model from `build`. `mutants_of` names those of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from itertools import pairwise
from typing import Any
from unittest.mock import patch

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

from falcon_qlora.kernels import ssd_ops
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.packed_attention import Sequences

_aten = torch.ops.aten
# Which argument is the left factor, the activations.
_PRODUCTS = {_aten.mm: 0, _aten.addmm: 1, _aten._scaled_mm: 0}


@contextmanager
def packing_leak(model: nn.Module) -> Iterator[None]:
    """Attention crosses the documents' boundaries; positions stay as they are."""

    def one_document(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> Any:
        sequences = kwargs["attention_mask"]
        if isinstance(sequences, Sequences):
            tokens = sum(sequences.lengths)
            ends = sequences.cu_seqlens.new_tensor([0, tokens])
            joined = replace(sequences, cu_seqlens=ends, lengths=(tokens,), max_length=tokens)
            kwargs = kwargs | {"attention_mask": joined}
        return args, kwargs

    hooks = [block.register_forward_pre_hook(one_document, with_kwargs=True) for block in blocks_of(model)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def half_scale(model: nn.Module) -> Iterator[None]:
    """LoRA's product counts half."""
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    before = [dict(layer.scaling) for layer in layers]
    try:
        for layer in layers:
            layer.scaling.update({name: scale / 2 for name, scale in layer.scaling.items()})
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling.update(scaling)


@contextmanager
def missing_adapter(model: nn.Module) -> Iterator[None]:
    """The middle block runs without its LoRA."""
    blocks = blocks_of(model)
    layers = [m for m in blocks[len(blocks) // 2].modules() if isinstance(m, LoraLayer)]
    try:
        for layer in layers:
            layer._disable_adapters = True  # PEFT's own switch would freeze the matrices too
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@contextmanager
def coarse_float(model: nn.Module) -> Iterator[None]:
    """Activations, and in the backward pass gradients, have two bits of mantissa when they are multiplied."""
    with RoundedProducts(torch.float8_e5m2) as mode:
        yield
    assert mode.count, "no product was rounded: this mutant changes nothing"


def carried_state(model: nn.Module) -> AbstractContextManager[Any]:
    """The state space goes on over one boundary, in every block."""
    return _carrying("scan", "scan_backward")


def carried_taps(model: nn.Module) -> AbstractContextManager[Any]:
    """The convolution's taps reach over one boundary, in every block."""
    return _carrying("convolve", "convolve_backward")


@contextmanager
def missing_multiplier(model: nn.Module) -> Iterator[None]:
    """The segment C of ``in_proj``'s output goes without its multiplier."""
    mixers = _mixers(model)
    before = [mixer.mup_vector for mixer in mixers]
    try:
        for mixer in mixers:
            shared = mixer.n_groups * mixer.ssm_state_size
            start = 2 * mixer.intermediate_size + shared
            mixer.mup_vector = mixer.mup_vector.clone()
            mixer.mup_vector[..., start : start + shared] = 1
        yield
    finally:
        for mixer, vector in zip(mixers, before, strict=True):
            mixer.mup_vector = vector


@contextmanager
def mixed_groups(model: nn.Module) -> Iterator[None]:
    """Heads read B and C of the last group instead of the first, and so on."""

    scan, scan_backward = ssd_ops.scan, ssd_ops.scan_backward

    def forward(channels: Tensor, steps: Tensor, space: Any, *args: Any) -> Tensor:
        return scan(_others(channels, space), steps, space, *args)

    def backward(grad: Tensor, channels: Tensor, steps: Tensor, space: Any, *args: Any) -> Tensor:
        return _others(scan_backward(grad, _others(channels, space), steps, space, *args), space)

    with patch.multiple(ssd_ops, scan=forward, scan_backward=backward):
        yield


Mutants = dict[str, Callable[[nn.Module], AbstractContextManager[Any]]]
MUTANTS: Mutants = {
    "packing leak": packing_leak,
    "half the LoRA scale": half_scale,
    "one block without its adapter": missing_adapter,
    "e5m2 activations": coarse_float,
}
OF_STATE_SPACES: Mutants = {
    "state carried over one boundary": carried_state,
    "taps carried over one boundary": carried_taps,
    "one segment's multiplier left out": missing_multiplier,
    "groups mixed up": mixed_groups,
}


def mutants_of(model: nn.Module) -> Mutants:
    """The mutants that change `model`."""
    found, mixers = dict(MUTANTS), _mixers(model)
    if mixers:
        found |= OF_STATE_SPACES
        if mixers[0].n_groups == 1:
            del found["groups mixed up"]
    return found


def _mixers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(module, FalconH1Mixer)]


def _carrying(*names: str) -> AbstractContextManager[Any]:
    """These functions of `ssd_ops` carry over one boundary."""
    return patch.multiple(ssd_ops, **{name: _over_one_boundary(getattr(ssd_ops, name)) for name in names})


def _over_one_boundary(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`function` that takes two documents for one, those of which the shorter is longest."""

    def joined(*args: Any) -> Tensor:
        (positions,) = (each for each in args if isinstance(each, Tensor) and each.dtype == torch.int64)
        begins = [*(positions == 0).nonzero().flatten().tolist(), len(positions)]
        lengths = [end - start for start, end in pairwise(begins)]
        second = max(range(1, len(lengths)), key=lambda each: min(lengths[each - 1 : each + 1]))
        places = positions.clone()
        places[begins[second] : begins[second + 1]] += lengths[second - 1]
        starts = positions.new_tensor(begins[:second] + begins[second + 1 :], dtype=torch.int32)
        instead = {torch.int64: places, torch.int32: starts}
        return function(*(instead.get(getattr(each, "dtype", None), each) for each in args))

    return joined


def _others(channels: Tensor, space: Any) -> Tensor:
    """x, B and C, ``[T, MP + 2GN]``, with the groups of B and of C the other way round."""
    x, shared = channels.tensor_split([space.width], dim=1)
    turned = shared.unflatten(1, (2, space.groups, space.state)).flip(2)
    return torch.cat([x, turned.flatten(1)], dim=1)


class RoundedProducts(TorchDispatchMode):
    """Round the left factor of every matrix product, or both, to `dtype`, row by row within its range.

    Args:
        dtype: an 8-bit floating point.
        both: whether the right factor, the weights, is rounded too.
    """

    def __init__(self, dtype: torch.dtype, both: bool = False) -> None:
        super().__init__()
        self.dtype, self.both, self.count = dtype, both, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = _PRODUCTS.get(func.overloadpacket)
        if first is not None:
            self.count += 1
            factors = list(args)
            factors[first] = self._rounded(factors[first])
            if self.both:
                factors[first + 1] = self._rounded(factors[first + 1].T).T
            args = tuple(factors)
        return func(*args, **(kwargs or {}))

    def _rounded(self, x: Tensor) -> Tensor:
        """``[rows, columns]``; each row is scaled by a power of two, which rounds nothing by itself."""
        wide = x.float()
        largest = wide.abs().amax(-1, keepdim=True).clamp(min=1e-30)
        scale = torch.exp2(torch.floor(torch.log2(torch.finfo(self.dtype).max / largest)))
        return ((wide * scale).to(self.dtype).float() / scale).to(x.dtype)
