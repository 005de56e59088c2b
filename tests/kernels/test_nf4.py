"""NF4 dequantization gives bitsandbytes' bits, wherever it writes them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from falcon_qlora.models.quantize import bnb

pytest.importorskip("triton", reason="Triton is not installed")

from falcon_qlora.kernels.nf4 import can_dequantize_nf4, dequantize_nf4

DTYPES = [torch.bfloat16, torch.float16, torch.float32]
# Blocks that run over the ends of rows, a last block that is not full, more scales than one nested block has.
SHAPES = [(64, 64), (7, 72), (3, 8), (73, 192), (300, 64), (520, 72)]


def _quantized(
    shape: tuple[int, int], dtype: torch.dtype, nested: bool, device: torch.device
) -> tuple[Tensor, Any]:
    generator = torch.Generator().manual_seed(shape[0])
    weight = torch.randn(shape, generator=generator) * torch.rand(shape[0], 1, generator=generator)
    return bnb.functional.quantize_4bit(
        weight.to(device, dtype), blocksize=64, quant_type="nf4", compress_statistics=nested
    )


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_are_those_of_bitsandbytes(
    dtype: torch.dtype, shape: tuple[int, int], nested: bool, device: torch.device
) -> None:
    packed, state = _quantized(shape, dtype, nested, device)
    expected = bnb.functional.dequantize_4bit(packed, state)
    out = torch.full(shape, torch.nan, dtype=dtype, device=device)
    assert dequantize_nf4(packed, state, out) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("transpose", [False, True])
def test_writes_into_a_part_of_a_larger_buffer_and_nowhere_else(
    shape: tuple[int, int], transpose: bool, device: torch.device
) -> None:
    packed, state = _quantized(shape, torch.bfloat16, True, device)
    expected = bnb.functional.dequantize_4bit(packed, state)
    expected = expected.T if transpose else expected
    rows, columns = expected.shape
    buffer = torch.full((rows + 3, columns + 21), 7.0, dtype=torch.bfloat16, device=device)
    out = buffer[2:-1, 5:-16]
    dequantize_nf4(packed, state, out, transpose=transpose)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert (buffer == 7.0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_transposed_is_the_transpose(dtype: torch.dtype, device: torch.device) -> None:
    packed, state = _quantized((136, 200), dtype, True, device)
    out = torch.empty(200, 136, dtype=dtype, device=device)
    dequantize_nf4(packed, state, out, transpose=True)
    assert torch.equal(out, bnb.functional.dequantize_4bit(packed, state).T)


def test_out_may_have_another_dtype_than_the_weight_had(device: torch.device) -> None:
    packed, state = _quantized((64, 128), torch.float32, True, device)
    out = dequantize_nf4(packed, state, torch.empty(64, 128, dtype=torch.bfloat16, device=device))
    assert torch.equal(out, bnb.functional.dequantize_4bit(packed, state).bfloat16())


def test_what_does_not_fit_is_refused(device: torch.device) -> None:
    packed, state = _quantized((64, 128), torch.bfloat16, True, device)
    with pytest.raises(ValueError, match="out must be"):
        dequantize_nf4(packed, state, torch.empty(128, 64, dtype=torch.bfloat16, device=device))
    with pytest.raises(ValueError, match="out must be"):
        dequantize_nf4(packed, state, torch.empty(128, 64, dtype=torch.bfloat16, device=device).T)
    weight = torch.randn(64, 128, device=device)
    for options in ({"quant_type": "fp4"}, {"blocksize": 128}):
        packed, state = bnb.functional.quantize_4bit(
            weight, **({"blocksize": 64, "quant_type": "nf4"} | options)
        )
        assert not can_dequantize_nf4(state)
        with pytest.raises(ValueError, match="takes NF4"):
            dequantize_nf4(packed, state, torch.empty_like(weight))
