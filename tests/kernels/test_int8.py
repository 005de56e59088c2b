"""Dequantization of int8 rows, against PyTorch."""

import pytest
import torch

from falcon_qlora.kernels.int8 import dequantize_int8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 64), (5, 2049), (2, 4544)])
def test_it_writes_what_the_rows_stand_for_and_nothing_beside_them(rows, columns, dtype, device):
    generator = torch.Generator().manual_seed(columns)
    weight = torch.randint(-127, 128, (rows, columns), dtype=torch.int8, generator=generator).to(device)
    scales = (0.1 + torch.rand(rows, generator=generator)).to(device)
    room = torch.full((rows, columns + 5), 7.0, dtype=dtype, device=device)
    dequantize_int8(weight, scales, room[:, 2 : 2 + columns])
    expected = (weight.float() * (scales / 127)[:, None]).to(dtype)
    torch.testing.assert_close(
        room[:, 2 : 2 + columns], expected, rtol=2**-8 if dtype != torch.float32 else 1e-6, atol=0
    )
    assert (room[:, :2] == 7).all()
    assert (room[:, 2 + columns :] == 7).all()


def test_it_is_bitsandbytes_own(device):
    from falcon_qlora.models.quantize import bnb

    weight = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    values, scales, _ = bnb.functional.int8_vectorwise_quant(weight.half().to(device))
    found = dequantize_int8(values, scales, torch.empty(6, 40, device=device))
    expected = bnb.functional.int8_vectorwise_dequant(values, scales)
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-6)
