"""The norms that replace Transformers' and PyTorch's, see `Layout.norm`."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm


class SameDtypeLayerNorm(nn.LayerNorm):
    """A layer norm whose arithmetic is float32 and whose output has its input's dtype, under autocast too.

    PyTorch's own returns float32 under autocast.
    """

    def forward(self, input: Tensor) -> Tensor:
        with torch.autocast(input.device.type, enabled=False):
            # The CPU's kernel takes float32 weights with an input of another dtype, and gives the same result
            # as with weights of the input's dtype.
            if self.weight.dtype == input.dtype or input.device.type == "cpu":
                return super().forward(input).to(input.dtype)
            return super().forward(input.float()).to(input.dtype)


class _SameDtype:
    """Arithmetic is float32 and the output has its input's dtype, whatever the weight's is."""

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if self.weight.dtype == hidden_states.dtype:
            return super().forward(hidden_states)  # type: ignore[misc,no-any-return]
        return super().forward(hidden_states.float()).to(hidden_states.dtype)  # type: ignore[misc,no-any-return]


class SameDtypeRMSNorm(_SameDtype, LlamaRMSNorm):
    """Falcon3's."""


class SameDtypeFalconH1RMSNorm(_SameDtype, FalconH1RMSNorm):
    """Falcon-H1's, which computes the same."""
