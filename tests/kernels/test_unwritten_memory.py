"""Kernels are tested with memory in which NaN lies where nothing was written."""

import torch


def test_memory_that_nothing_wrote_is_nan(device):
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        x = torch.empty(3, 2, dtype=dtype, device=device)
        for each in (x, torch.empty_like(x), x.new_empty(4)):
            assert each.float().isnan().all()
    assert (torch.empty(3, dtype=torch.int8, device=device) == 127).all()
