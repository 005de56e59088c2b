"""Each operation in Triton beside its plain form, as a dry run compares them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

from falcon_qlora.kernels import gelu, ops
from falcon_qlora.kernels.comparing import comparing


def run(device: torch.device) -> tuple[torch.Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(5, 64, generator=generator).to(device, torch.bfloat16)
    norm = torch.ones(64, device=device), torch.zeros(64, device=device)
    with ops.using("triton"), comparing() as found:
        y = ops.gelu(ops.layer_norms(x, [norm], 1e-5)[0][0])
        ops.gelu(y, out=y)  # in its own place
    return y, found


def loaded(operation: Any) -> Any:
    """The function that keeps an operation's Triton form."""
    return inspect.getclosurevars(operation).nonlocals["in_triton"]


def test_each_is_compared_and_what_is_computed_stays(device):
    y, found = run(device)
    assert found.keys() == {"gelu", "layer_norms"}
    assert all(0 <= each.excess < 1 for each in found.values()), found
    x = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)).to(device, torch.bfloat16)
    right = torch.nn.functional.layer_norm(x.float(), (64,))
    for _ in range(2):
        right = torch.nn.functional.gelu(right)
    torch.testing.assert_close(y.float(), right, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("wrong", [lambda y: y * 1.05, lambda y: y * float("nan")])
def test_a_wrong_one_is_named(device, monkeypatch, wrong):
    plain_gelu = ops.gelu.__wrapped__

    def faulty(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        y = wrong(plain_gelu(x))
        return y if out is None else out.copy_(y)

    monkeypatch.setattr(gelu, "gelu", faulty)
    loaded(ops.gelu).cache_clear()
    _, found = run(device)
    loaded(ops.gelu).cache_clear()
    assert found["gelu"].excess > 1
    assert found["layer_norms"].excess < 1
