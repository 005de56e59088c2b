"""Copying rows into and out of slices."""

import pytest
import torch

from falcon_qlora.kernels import ops


@pytest.mark.parametrize(("columns", "scale"), [(1, 1.0), (7, 1.0), (64, 0.25), (4097, 1.0)])
@pytest.mark.parametrize("form", ["torch", "triton"])
def test_rows_arrive_and_nothing_beside_them_is_touched(form, columns, scale, device):
    x = torch.randn(5, columns + 2, device=device)[:, 1 : columns + 1]
    room = torch.full((5, columns + 9), 7.0, device=device)
    with ops.using(form):
        ops.copy_rows(x, room[:, 4 : 4 + columns], scale)
    assert torch.equal(room[:, 4 : 4 + columns], scale * x)
    assert (room[:, :4] == 7).all()
    assert (room[:, 4 + columns :] == 7).all()
