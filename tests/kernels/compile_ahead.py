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

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime import JITFunction

from falcon_qlora.kernels import gelu, layer_norm, nf4, rotary, rows, softmax

MODULES: tuple[ModuleType, ...] = (gelu, layer_norm, nf4, rotary, rows, softmax)
FLOAT32 = {"code_ptr", "offset_ptr", "nested_code_ptr", "nested_absmax_ptr", "mean_ptr", "rstd_ptr"}
FLOAT32 |= {"cosine_ptr", "sine_ptr", "losses_ptr"}


def variants() -> Iterator[tuple[JITFunction, dict[str, Any]]]:
    """Kernels and the constants they are launched with, the number of warps among them."""
    for kernel in (gelu._gelu, gelu._gelu_backward):
        yield kernel, {"BLOCK": gelu._BLOCK, "num_warps": gelu._WARPS}
    for hidden in (4544, 8192, 14848):
        for two in (False, True):
            options = layer_norm._row_options(hidden, "forward")
            yield layer_norm._layer_norm, {"TWO": two, **options}
            options = layer_norm._row_options(hidden, "backward")
            yield layer_norm._layer_norm_backward, {"TWO": two, "ADD": True, **options}
    for nested in (False, True):
        options = {"NESTED": nested, "num_warps": nf4._WARPS, "enable_fp_fusion": False}
        for contiguous in (False, True):
            yield nf4._dequantize_rows, {"CONTIGUOUS": contiguous, "WORDS": nf4._WORDS_A_PROGRAM, **options}
        yield (
            nf4._dequantize_transposed,
            {"ROWS": nf4._TILE_ROWS, "WORDS": nf4._TILE_WORDS, **options},
        )
    yield rows._copy, {"BLOCK": rows._BLOCK, "num_warps": rows._WARPS}
    yield (
        softmax._cross_entropy,
        {"GRADIENT": True, "BLOCK": softmax._BLOCK, "num_warps": softmax._WARPS},
    )
    tile = {"TOKENS": rotary._TOKENS_A_PROGRAM, "HEADS": rotary._HEADS_A_PROGRAM, "num_warps": rotary._WARPS}
    for way in range(3):
        yield rotary._rotate, {"WAY": way, "INVERSE": way == 2, "HALF": 32, "LANES": 32, **tile}


def compile_for(capability: int, kernel: JITFunction, options: dict[str, Any]) -> Any:
    constants = {name: options[name] for name in kernel.arg_names if name in options}
    types = {name: _type(name, options) for name in kernel.arg_names if name not in constants}
    # All addresses and strides are multiples of 16 at Falcon's sizes, except what counts few things.
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(kernel.arg_names)
        if name in types and name not in ("eps", "tokens", "kv_heads", "group")
    }
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    launch = {name: value for name, value in options.items() if name not in constants}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch)


def _type(name: str, options: dict[str, Any]) -> str:
    if name == "eps":
        return "fp32"
    if not name.endswith("_ptr"):
        return "i32"
    if name == "word_ptr":
        return "*i32"
    if name == "targets_ptr":
        return "*i64"
    if name == "absmax_ptr":
        return "*u8" if options["NESTED"] else "*fp32"
    return "*fp32" if name in FLOAT32 else "*bf16"


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
    for kernel, options in variants():
        compiled = compile_for(capability, kernel, options)
        taken.append(
            {
                "kernel": kernel.__name__,
                "options": options,
                "shared_bytes": compiled.metadata.shared,
                "vector_stores": compiled.asm["ptx"].count("st.global.v4"),
                **_registers(compiled.asm["cubin"]),
            }
        )
    print(json.dumps(taken))


if __name__ == "__main__":
    main(int(sys.argv[1]))
