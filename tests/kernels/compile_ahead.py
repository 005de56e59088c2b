"""Compile every kernel for a GPU that need not be there, and print what it takes, as one JSON object.

    python tests/kernels/compile_ahead.py 90

Runs outside the interpreter, so in a process of its own. The options are those of Falcon's own sizes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from falcon_qlora.kernels import (
    convolution_triton,
    dropout_triton,
    fp8_bounds,
    fp8_gelu,
    fp8_low_rank,
    fp8_quantize,
    fp8_swiglu,
    gate_triton,
    gelu,
    int8,
    layer_norm,
    nf4,
    prefix_triton,
    rms_norm,
    rotary,
    rows,
    scale_shift_triton,
    softmax,
    ssd_triton,
    swiglu,
)

MODULES: tuple[ModuleType, ...] = (gelu, int8, layer_norm, nf4, rms_norm, rotary, rows, softmax, swiglu)
MODULES += (dropout_triton, prefix_triton, scale_shift_triton)
MODULES += (convolution_triton, gate_triton, ssd_triton)
FP8_MODULES: tuple[ModuleType, ...] = (fp8_bounds, fp8_gelu, fp8_low_rank, fp8_quantize, fp8_swiglu)
FP8_CAPABILITY = 89
FLOAT32 = {"code_ptr", "offset_ptr", "nested_code_ptr", "nested_absmax_ptr", "mean_ptr", "rstd_ptr"}
FLOAT32 |= {"cosine_ptr", "sine_ptr", "losses_ptr", "scale_ptr", "scales_ptr", "lengths_ptr", "bound_ptr"}
FLOAT32 |= {"least_ptr", "longest_ptr", "factors_ptr", "gate_ptr", "of_gate_ptr", "sums_ptr", "bias_ptr"}
FLOAT32 |= {"first_scale_ptr", "first_bias_ptr", "second_scale_ptr", "second_bias_ptr"}
FLOAT32 |= {"multipliers_ptr", "rate_ptr", "steps_ptr", "inner_ptr", "of_inner_ptr", "direct_ptr"}
FLOAT32 |= {"of_scales_ptr", "grad_bound_ptr", "of_longest_ptr", "balance_ptr", "largest_ptr"}
FLOAT32 |= {"of_rank_ptr", "within_ptr", "entered_ptr", "leaving_ptr", "past_ptr"}
FP8 = {"values_ptr", "of_values_ptr", "halves_ptr"}
# What counts few things, or things of any number: no multiples of 16.
UNALIGNED = {"eps", "scale", "tokens", "groups", "group", "keys", "queries", "prefix"}
UNALIGNED |= {"low", "high", "threshold", "factor", "gate_multiplier", "multiplier"}
UNALIGNED |= {"heads", "least", "most", "raw_stride", "of_raw_stride", "z_stride", "dz_stride"}


def variants(capability: int) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    """Kernels and the constants they are launched with, the number of warps among them."""
    yield from plain_variants()
    if capability >= FP8_CAPABILITY:
        yield from fp8_variants(capability)


def plain_variants() -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    for kernel in (gelu._gelu, gelu._gelu_backward):
        yield kernel, {"BLOCK": gelu._BLOCK, "num_warps": gelu._WARPS}
    # 7B has one norm a block, whose gradient comes from two sides where targets are few.
    for hidden, two in ((4544, False), (4544, True), (8192, True), (14848, True)):
        options = layer_norm.row_options(hidden, "forward")
        yield layer_norm._layer_norm, {"TWO": two, **options}
        options = layer_norm.row_options(hidden, "backward")
        yield layer_norm._layer_norm_backward, {"TWO": two, "ADD": True, **options}
    for hidden in (2048, 3072, 5120):
        yield rms_norm._rms_norm, layer_norm.row_options(hidden, "forward")
        options = layer_norm.row_options(hidden, "backward")
        yield rms_norm._rms_norm_backward, {"ADD": True, **options}
    for kernel in (swiglu._swiglu, swiglu._swiglu_backward):
        yield kernel, {"BLOCK": swiglu._BLOCK, "num_warps": swiglu._WARPS}
    yield from nf4_variants(scaled=False)
    yield int8._dequantize, {"BLOCK": int8._BLOCK, "num_warps": int8._WARPS}
    yield rows._copy, {"BLOCK": rows._BLOCK, "num_warps": rows._WARPS}
    yield (
        softmax._cross_entropy,
        {"GRADIENT": True, "BLOCK": softmax._BLOCK, "num_warps": softmax._WARPS},
    )
    for head_dim, prefix_rows in ((64, 64), (128, 10), (256, 10), (256, 32)):
        heads = torch.empty(1, 1, 1, head_dim), torch.empty(prefix_rows, 1, head_dim)
        yield prefix_triton._add_read, prefix_triton._options(*heads, "forward")
        yield prefix_triton._add_read_backward, prefix_triton._options(*heads, "backward")
    for gelu_too in (False, True):
        yield scale_shift_triton._scale_shift, {"GELU": gelu_too, **scale_shift_triton._TILE}
        tile = {"NORM": False, **scale_shift_triton._SUMS_TILE}
        yield scale_shift_triton._sum_columns, {"GELU": gelu_too, **tile}
    yield scale_shift_triton._sum_columns, {"GELU": False, "NORM": True, **scale_shift_triton._SUMS_TILE}
    yield scale_shift_triton._add_scaled, dict(scale_shift_triton._TILE)
    yield dropout_triton._drop, {"BLOCK": dropout_triton._BLOCK, "num_warps": dropout_triton._BLOCK_WARPS}
    tile = dict(zip(("TOKENS", "FEATURES", "num_warps"), dropout_triton._TILE, strict=True))
    for rank in (16, 128, 512):  # the largest in pieces
        yield dropout_triton._add_dropped, {"RANK": rank, **tile}
    yield from state_space_variants()
    for head_dim in (64, 128, 256):  # 128: 11B and Falcon-H1; 256: Falcon3
        for join in (False, True):
            yield rotary._rotate, {"JOIN": join, **rotary._options(head_dim)}


def state_space_variants() -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    """At the sizes of H1-7B, and of others where tiles are smaller."""
    convolution = {"TAPS": 4, "BIAS": True, "UNIT": 8, **convolution_triton._TILE}
    yield convolution_triton._convolve, convolution
    yield convolution_triton._convolve_backward, convolution
    for columns, norm, before in ((3072, True, False), (2048, True, True), (768, False, False)):
        options = {"NORM": norm, "NORM_BEFORE": before, "UNIT": 8, **gate_triton._lanes(columns)}
        yield gate_triton._gate, options
        yield gate_triton._gate_backward, options
    chunk = ssd_triton._CHUNK
    small = {"CHUNK": chunk, "HEADS": 32}
    yield ssd_triton._sum_decays, {**small, **ssd_triton._STEPS}
    yield ssd_triton._of_steps, {"BLOCKS": 8, **small, **ssd_triton._STEPS}
    for head_size, state in ((128, 256), (64, 128), (32, 64)):
        sizes = {"CHUNK": chunk, "WIDTH": head_size, "STATE": state}
        yield ssd_triton._match, {"CHUNK": chunk, "STATE": state, **ssd_triton._OUTPUTS}
        walk = ssd_triton._WALK | {"ROWS": min(head_size, ssd_triton._WALK["ROWS"])}
        for reverse in (False, True):
            yield ssd_triton._walk, {"REVERSE": reverse, **sizes, **walk}
            yield ssd_triton._outputs, {"REVERSE": reverse, **sizes, **ssd_triton._OUTPUTS}
        scores = {"HEADS": ssd_triton._HEADS_A_PROGRAM, "CHUNK": chunk, "WIDTH": head_size}
        yield ssd_triton._of_scores, {**scores, **ssd_triton._OF_SCORES}
        yield ssd_triton._of_shared, {"BLOCKS": 4, **sizes, **ssd_triton._OF_SHARED}


def nf4_variants(scaled: bool) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    options = {"SCALED": scaled, "num_warps": nf4._WARPS, "enable_fp_fusion": False}
    words = {"WORDS": nf4._WORDS_A_PROGRAM, **options}
    for nested, contiguous in ((True, False), (True, True), (False, True)):
        yield nf4._dequantize_rows, {"NESTED": nested, "CONTIGUOUS": contiguous, **words}
    tile = {"ROWS": nf4._TILE_ROWS, "WORDS": nf4._TILE_WORDS, **options}
    yield nf4._dequantize_transposed, {"NESTED": True, **tile}


def fp8_variants(capability: int) -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    yield from nf4_variants(scaled=True)
    for features in (4544, 8192, 14848, 46080):  # the last: Falcon3's gate and up
        for bounded in (False, True):
            yield fp8_quantize._quantize_rows, {"LEAST": bounded, **fp8_quantize._row_options(features)}
    for of_weight in (False, True):
        options = {"ROWS": fp8_quantize._SPLIT_ROWS, "RANK": 64, "num_warps": 4}
        yield fp8_quantize._split_columns, {"OF_WEIGHT": of_weight, **options}
    for kernel in (fp8_swiglu._swiglu, fp8_swiglu._swiglu_backward):
        yield kernel, fp8_swiglu._options(23040)
    for is_int8 in (False, True):
        for transpose in (False, True):
            tile = {"TILE": fp8_quantize._TILE, "num_warps": fp8_quantize._TILE_WARPS}
            yield fp8_quantize._quantize_weight, {"INT8": is_int8, "TRANSPOSE": transpose, **tile}
    for addends, rank in ((0, 64), (1, 128), (2, 1024), (2, 0)):
        yield fp8_quantize._add, {"ADDENDS": addends, "RANK": rank, **fp8_quantize.sum_options()}
    for rank in (0, 64, 512):
        tile = dict(zip(("TOKENS", "FEATURES", "num_warps"), fp8_gelu._FORWARD, strict=True))
        yield fp8_gelu._gelu, {"RANK": rank, **tile}
        tile = dict(zip(("TOKENS", "FEATURES", "num_warps"), fp8_gelu._BACKWARD, strict=True))
        yield fp8_gelu._gelu_backward, {"RANK": rank, "OF_RANK": rank, **tile}
    if capability // 10 in fp8_gelu.WITH_REGISTERS:
        yield fp8_gelu._gelu_backward_and_low_rank, {"RANK": 64, "OF_RANK": 64, **fp8_gelu._along_columns()}
    yield fp8_low_rank._into_low_rank, {"RANK": 64, **fp8_low_rank._options(fp8_low_rank._INTO)}
    split = {"PARTS": 256, "RANK": 64, "FEATURES": fp8_low_rank._SPLIT_FEATURES, "num_warps": 4}
    yield fp8_low_rank._split_rows, split
    yield fp8_low_rank._gathered, {"RANK": 64, **fp8_low_rank._options(fp8_low_rank._SUM)}
    yield fp8_bounds._measure, {"RANK": 64, "FEATURES": fp8_bounds._FEATURES, "num_warps": fp8_bounds._WARPS}
    yield fp8_bounds._balance, {"PARTS": 256, "LANES": fp8_bounds._LANES, "num_warps": fp8_bounds._WARPS}
    yield fp8_bounds._least, fp8_bounds._rows(64)
    yield fp8_bounds._bound_scales, {"LOW": True, "PARTS": 256, **fp8_bounds._rows(64)}


def name_of(kernel: Any) -> str:
    """With its module: names come up twice."""
    return f"{kernel.module.rpartition('.')[2]}.{kernel.__name__}"


def compile_for(capability: int, kernel: JITFunction, options: dict[str, Any]) -> Any:
    constants = {name: options[name] for name in kernel.arg_names if name in options}
    types = {name: _type(name, options) for name in kernel.arg_names if name not in constants}
    # All addresses and strides are multiples of 16 at Falcon's sizes.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and name not in UNALIGNED
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    launch = {name: value for name, value in options.items() if name not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def _type(name: str, options: dict[str, Any]) -> str:
    if name in ("eps", "factor", "scale", "gate_multiplier", "multiplier", "least", "most"):
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name == "word_ptr":
        return "*i32"
    if name == "starts_ptr":
        return "*i32"
    if name in ("targets_ptr", "positions_ptr"):
        return "*i64"
    if name in FP8 or (name == "out_ptr" and (options.get("SCALED") or "TRANSPOSE" in options)):
        return "*fp8e4nv"
    if name == "int8_ptr" or (name == "weight_ptr" and options.get("INT8")):
        return "*i8"
    if name == "absmax_ptr":
        return "*u8" if options["NESTED"] else "*fp32"
    return "*fp32" if name in FLOAT32 else "*bf16"


def _vector_stores(code: str, options: dict[str, Any]) -> int:
    """Stores of 16 bytes; of 8 where a thread makes eight values of one byte, or the convolution's four."""
    short = (options.get("SCALED") and "CONTIGUOUS" in options) or "TAPS" in options
    return code.count("st.global.v2" if short else "st.global.v4")


def _registers(machine_code: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of what did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(machine_code)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    assert found is not None, usage
    return {"registers": int(found[1]), "stack_bytes": int(found[2])}


def main(capability: int) -> None:
    taken = []
    for kernel, options in variants(capability):
        compiled = compile_for(capability, kernel, options)
        taken.append(
            {
                "kernel": name_of(kernel),
                "options": options,
                "shared_bytes": compiled.metadata.shared,
                "vector_stores": _vector_stores(compiled.asm["ptx"], options),
                **_registers(compiled.asm["cubin"]),
            }
        )
    print(json.dumps(taken))


if __name__ == "__main__":
    main(int(sys.argv[1]))
