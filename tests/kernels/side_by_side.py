"""Compile a step's kernels for a GPU that need not be there, and print which are ready.

    python tests/kernels/side_by_side.py LAYOUT

Prints one JSON object: kernel → how many of its forms. Runs outside the interpreter, so in a process of its
own.
"""

from __future__ import annotations

import json
import sys

from triton.compiler import CompiledKernel
from triton.runtime import driver

from falcon_qlora.kernels import ops
from falcon_qlora.kernels.compiling import compiled_ahead
from falcon_qlora.models.activations import a_block_of_each_kind
from falcon_qlora.models.fast_path import apply_fast_path
from tests.kernels.compile_ahead import variants
from tests.kernels.specialize import Driver, step
from tests.unit.test_fast_path import adapted


def main(layout: str) -> None:
    driver.set_active(Driver())
    model = adapted(layout, "4bit", r=16, compute_dtype="bf16")
    with ops.using("triton"):
        apply_fast_path(model)
        with compiled_ahead(), a_block_of_each_kind(model.train()):
            step(model, [64])
    ready = {}
    for kernel in {each for each, _ in variants(90)}:
        held = [each for cache in kernel.device_caches.values() for each in cache[0].values()]
        assert all(isinstance(each, CompiledKernel) for each in held), held
        if held:
            ready[kernel.fn.__name__] = len(held)
    print(json.dumps(ready))


if __name__ == "__main__":
    main(sys.argv[1])
