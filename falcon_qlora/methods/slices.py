"""LoRA on slices of a fused projection: to PEFT one adapter, of which only some blocks are trained.

Rank r on each of n slices is rank ``n * r`` on the whole projection, whose second matrix is zero but for the
rows of slice i in the columns ``i * r`` to ``(i + 1) * r``. Those blocks alone are parameters; what is saved
is the whole matrix, so plain PEFT opens it as it opens any.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from falcon_qlora.models.layouts.base import Layout

SLICES = ("query", "key", "value")


class SlicedUp(nn.Module):
    """The second matrix of such an adapter; takes the place of PEFT's ``nn.Linear``.

    Args:
        rows: for each slice's name the rows of the projection's output that belong to it, int64.
        out_features: of the whole projection.
        r: rank of each slice.

    Attributes:
        query, key, value: those that are there: float32 ``[rows, r]``, zero at the start.
    """

    bias = None

    def __init__(self, rows: dict[str, Tensor], out_features: int, r: int):
        super().__init__()
        self.in_features, self.out_features, self.r = r * len(rows), out_features, r
        self._slices = tuple(rows)
        for name, of_slice in rows.items():
            start = torch.zeros(len(of_slice), r, device=of_slice.device)
            self.register_parameter(name, nn.Parameter(start))
            self.register_buffer(f"_rows_of_{name}", of_slice, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The whole matrix ``[out_features, n * r]``."""
        whole = getattr(self, self._slices[0]).new_zeros(self.out_features, self.in_features)
        for place, name in enumerate(self._slices):
            sides = (place * self.r, (len(self._slices) - 1 - place) * self.r)
            whole = whole.index_copy(0, getattr(self, f"_rows_of_{name}"), F.pad(getattr(self, name), sides))
        return whole

    def forward(self, low: Tensor) -> Tensor:
        return F.linear(low, self.weight)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        destination[f"{prefix}weight"] = self.weight if keep_vars else self.weight.detach()

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *args: Any) -> None:
        if f"{prefix}weight" not in state_dict:
            return
        whole = state_dict[f"{prefix}weight"]
        with torch.no_grad():
            for place, name in enumerate(self._slices):
                rows = whole[getattr(self, f"_rows_of_{name}").to(whole.device)]
                getattr(self, name).copy_(rows[:, place * self.r : (place + 1) * self.r])
        if not torch.equal(self.weight.to(whole), whole):
            raise RuntimeError(f"{prefix}weight is trained outside the slices {', '.join(self._slices)}")


def slice_rows(layout: Layout, attention: Any, linear: Any) -> dict[str, Tensor]:
    """Which outputs of an attention's fused projection are queries, keys and values: int64 each, in order."""
    places = torch.arange(linear.out_features, device=linear.weight.device)
    heads = layout.split(attention, places[None])
    return {name: each.flatten() for name, each in zip(SLICES, heads, strict=True)}
