"""Take training steps on kernels for a GPU that need not be there, and print what is compiled for which.

    python tests/kernels/specialize.py

Prints one JSON object: ``kernels``, those launched, and ``again``, those that other numbers of tokens would
have compiled once more. Runs outside the interpreter, so in a process of its own. Nothing is compiled or
computed: Triton's own hook tells what it would compile, and outputs stay as they were allocated.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from falcon_qlora.kernels import fp8, ops, ssd_ops
from falcon_qlora.kernels.fp8_gelu_products import PLAIN
from falcon_qlora.kernels.libraries import Loaded
from falcon_qlora.kernels.low_rank import Dropout
from falcon_qlora.models import fast_path
from falcon_qlora.models.fast_path import apply_fast_path
from falcon_qlora.models.packed_attention import Sequences
from tests.kernels.compile_ahead import name_of
from tests.kernels.test_ssd import parameters
from tests.layouts import documents, tiny_model
from tests.packing import packed
from tests.unit.test_fast_adapters import attached
from tests.unit.test_fast_path import adapted

# Documents' lengths. Of whole numbers Triton tells multiples of 16 and 1 from others.
FIRST = ([64], [2] * 8)  # the second: with few targets
OTHERS = ([40, 25], [9, 7], [3, 2, 14], [1], [2, 2, 1], [2])
# Dropout's seeds, which are other ones in every call.
SEEDS = (17, 19), (32, 16)


IN_PRODUCTS = "fp8, GELU in products"


class Driver:
    """As much of a GPU's as is asked before a kernel is compiled."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def models() -> Iterator[tuple[str, Any, bool]]:
    """A name, what trains on the kernels, and whether in FP8. Rows are multiples of 16, as in Falcons."""
    lora: dict[str, Any] = {"r": 16, "compute_dtype": "bf16"}
    yield "lora", adapted("falcon-7b", "4bit", **lora), False
    yield "lora, two norms, 8bit", adapted("falcon-180b", "8bit", **lora), False
    yield "lora, one after the other", adapted("falcon3", "4bit", **lora), False
    yield "lora, beside a state space", adapted("falcon-h1", "4bit", **lora), False
    yield "lora, dropout", adapted("falcon-11b", "4bit", dropout=0.1, **lora), False
    for name in ("adapter", "adapter_v2"):
        yield name, attached(name, tiny_model("falcon-7b", "4bit", compute_dtype="bf16")), False
    yield "fp8", adapted("falcon-7b", "4bit", **lora), True
    yield "fp8, a large rank", adapted("falcon-7b", "4bit", **lora | {"r": 80}), True
    yield "fp8, two norms, 8bit", adapted("falcon-180b", "8bit", **lora), True
    yield IN_PRODUCTS, adapted("falcon-7b", "4bit", **lora), True
    yield "fp8, beside a state space", adapted("falcon-h1", "4bit", **lora), True


def step(model: Any, lengths: list[int]) -> None:
    low, high = SEEDS[lengths not in FIRST]
    Dropout.draw = staticmethod(lambda p: Dropout(p, low, high))  # type: ignore[method-assign]
    model(**packed(documents(lengths))).loss.backward()


def mix(lengths: list[int], dtype: torch.dtype) -> None:
    """A state space there and back, of two groups with a norm."""
    space = parameters(groups=2, norm=True)
    sequences = Sequences.from_lengths(lengths)
    documents = sequences.position_ids[0], sequences.cu_seqlens
    projected, out = (
        torch.zeros(sum(lengths), n, dtype=dtype) for n in (len(space.multipliers), space.width)
    )
    y = ssd_ops.mix_forward(projected, space, *documents)
    ssd_ops.mix_output(projected, y, space, out)
    ssd_ops.mix_backward(out, projected, y, space, *documents, torch.empty_like(projected), out)


def main() -> None:
    driver.set_active(Driver())
    asked: dict[str, set[str]] = defaultdict(set)

    def note(*, key: Any, fn: Any, **_: Any) -> bool:
        asked[name_of(fn.jit_function)].add(str(key))
        return True  # it need not be compiled

    triton.knobs.runtime.jit_cache_hook = note
    again = []

    def compare(name: str, run: Callable[[list[int]], None]) -> None:
        for lengths in FIRST:
            run(lengths)
        for lengths in OTHERS:
            before = {kernel: len(keys) for kernel, keys in asked.items()}
            run(lengths)
            again.extend([k, name, sum(lengths)] for k, keys in asked.items() if len(keys) != before.get(k))

    with ops.using("triton"):
        for in_dtype in (torch.float32, torch.bfloat16):
            compare(f"state space, {in_dtype}", lambda lengths, dtype=in_dtype: mix(lengths, dtype))
        for name, model, in_fp8 in models():
            with fp8.emulated() if in_fp8 else nullcontext():
                products = Loaded(PLAIN if name == IN_PRODUCTS else None)
                fast_path._fp8_gelu_products = lambda base, found=products: found
                report = apply_fast_path(model, fp8_products=in_fp8)
                assert all(what.startswith("fast") for what in report.values()), report
                model.train()
                compare(name, lambda lengths, model=model: step(model, lengths))
    print(json.dumps({"kernels": sorted(asked), "again": again}))


if __name__ == "__main__":
    main()
