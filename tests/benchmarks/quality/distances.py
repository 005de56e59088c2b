"""How far a path's results are from float32's: block outputs, logits and every gradient.

And how far packed documents' logits move when their neighbours change: not by a bit, whatever the dtype. A
state that is carried over one boundary may be smaller than bfloat16's rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from falcon_qlora.models.activations import blocks_of
from tests.benchmarks.quality.mutants import RoundedProducts, mutants_of
from tests.benchmarks.quality.variants import (
    Variant,
    autocast,
    build,
    copy_adapter,
    exact,
    fill_adapter,
    stock_on_dequantized_weights,
)
from tests.packing import packed

Results = dict[str, dict[str, Tensor]]  # group → name → tensor
Distances = dict[str, dict[str, float]]  # group → name → distance by norms, relative to float32's
REACH = "reach of neighbours"

# A path whose mean distance is the yardstick's and a tenth more, or that has a tensor half as far again, is
# further away. Between two ways of rounding the same sums to bfloat16 the mean moves by a few per cent.
MEAN_SLACK, WORST_SLACK = 1.1, 1.5
FLOAT32_LIMIT = 1e-4


@dataclass(kw_only=True)
class Comparison:
    """One variant on one model.

    Attributes:
        model: its name in the report.
        variant: the variant's name.
        yardstick: what the fast path is held against.
        distances: of ``fast``, of the yardstick and of what is shown beside them, by name.
        failures: why the fast path is rejected; none where it passes.
        mutants: the same for each mutant.
    """

    model: str
    variant: str
    yardstick: str
    distances: dict[str, Distances] = field(default_factory=dict)
    failures: list[str] = field(default_factory=list)
    mutants: dict[str, list[str]] = field(default_factory=dict)


def compare(
    variant: Variant, label: str, model_name: str, documents: list[Tensor], adapter_std: float
) -> Comparison:
    """Hold the fast path and its mutants against float32 and a yardstick.

    The yardstick is the stock path in bfloat16 on the same weights; in 8 bits these are plain bfloat16
    weights, LLM.int8() itself is shown beside it. FP8 is held against a simulation of it. Float32 is held
    against a fixed limit.

    Args:
        variant: of the fast path.
        label: of the model, for the report.
        model_name: as `load_model` takes it.
        documents: int64 ``[length]`` each, on the device to run on.
        adapter_std: of the entries of LoRA's second matrices.

    Raises:
        NotBuilt: if there is no such fast path.
    """
    device = documents[0].device
    model = build(variant, model_name, device, "fast")
    fill_adapter(model, adapter_std)
    truth = exact(variant, model_name, device)
    copy_adapter(model, truth)
    expected = _one_by_one(truth, documents)
    del truth

    def distances_of(each: nn.Module, inside: AbstractContextManager[Any] | None = None) -> Distances:
        with inside or nullcontext(), autocast(variant, device):
            found = _packed(each, documents)
            reach = _reach(each, documents, found["logits"]["all"])
        return _distances(found, expected) | {REACH: {"all": reach}}

    result = Comparison(model=label, variant=variant.name, yardstick="")
    result.distances["fast"] = distances_of(model)
    mutants = {name: distances_of(model, mutant(model)) for name, mutant in mutants_of(model).items()}
    del model
    for name, make in _others(variant, model_name, device).items():
        other, inside = make()
        fill_adapter(other, adapter_std)
        result.distances[name] = distances_of(other, inside)
        del other
    result.yardstick = _yardstick(variant)
    yardstick = result.distances.get(result.yardstick)
    result.failures = rejections(result.distances["fast"], yardstick)
    result.mutants = {name: rejections(found, yardstick) for name, found in mutants.items()}
    result.distances |= mutants
    return result


def rejections(found: Distances, yardstick: Distances | None) -> list[str]:
    """Why these distances are too large; none where they are not. Without a yardstick: float32's limit."""
    reasons = []
    for group, of_group in found.items():
        if group == REACH:
            if of_group["all"] != 0:
                reasons.append(f"logits move by {of_group['all']:.1e} when other documents change")
            continue
        if yardstick is None:
            worst = max(of_group.values())
            if not worst <= FLOAT32_LIMIT:
                reasons.append(f"{group}: {worst:.1e} from float32")
            continue
        mean, allowed = _mean(of_group), _mean(yardstick[group])
        if not mean <= MEAN_SLACK * allowed:  # written so that a NaN is rejected
            reasons.append(f"{group}: {mean:.2%} on average, {allowed:.2%} allowed")
            continue
        for name, distance in of_group.items():
            if not distance <= WORST_SLACK * max(yardstick[group][name], allowed):
                reasons.append(f"{group}: {distance:.2%} at {name}, {yardstick[group][name]:.2%} there")
                break
    return reasons


def _yardstick(variant: Variant) -> str:
    if variant.compute_dtype == "fp32":
        return f"{FLOAT32_LIMIT:.0e}"
    if variant.compute_dtype == "fp8":
        return "simulated FP8"
    return "stock, dequantized" if variant.quantize_mode == "8bit" else "stock"


def _others(
    variant: Variant, model_name: str, device: torch.device
) -> dict[str, Callable[[], tuple[Any, AbstractContextManager[Any] | None]]]:
    """What is measured beside the fast path: name → the model and what its calls run inside."""
    others: dict[str, Callable[[], tuple[Any, AbstractContextManager[Any] | None]]] = {
        "stock": lambda: (build(variant, model_name, device, "stock"), None)
    }
    if _yardstick(variant) == "stock, dequantized":
        others["stock, dequantized"] = lambda: (
            stock_on_dequantized_weights(variant, model_name, device),
            None,
        )
    if _yardstick(variant) == "simulated FP8":
        others["simulated FP8"] = lambda: (
            stock_on_dequantized_weights(variant, model_name, device),
            RoundedProducts(torch.float8_e4m3fn, both=True),
        )
    return others


def _packed(model: Any, documents: list[Tensor]) -> Results:
    """All documents in one call."""
    arguments = packed(documents)
    model.zero_grad(set_to_none=True)
    with _recorded(model) as record:
        model(**arguments).loss.backward()
    with torch.no_grad():
        logits = model(input_ids=arguments["input_ids"], sequences=arguments["sequences"]).logits[0]
    return _results(model, record, logits)


@torch.no_grad()
def _reach(model: Any, documents: list[Tensor], logits: Tensor) -> float:
    """How far the logits of every second document move when all tokens of the others change."""
    lengths = [len(document) for document in documents]
    moved, vocabulary = 0.0, model.config.vocab_size
    for odd in (0, 1):
        changed = [each if at % 2 == odd else (each + 1) % vocabulary for at, each in enumerate(documents)]
        arguments = packed(changed)
        found = model(input_ids=arguments["input_ids"], sequences=arguments["sequences"]).logits[0]
        for one, other in list(zip(found.split(lengths), logits.split(lengths), strict=True))[odd::2]:
            moved = max(moved, float((one - other).norm() / other.norm()))
    return moved


def _one_by_one(model: Any, documents: list[Tensor]) -> Results:
    """Each document on its own, through Transformers' forward: it knows nothing of packing."""
    model.zero_grad(set_to_none=True)
    logits, loss = [], torch.zeros((), device=documents[0].device)
    with _recorded(model) as record:
        for document in documents:
            logits.append(model(document[None], use_cache=False).logits[0])
            if len(document) > 1:
                loss = loss + F.cross_entropy(logits[-1][:-1], document[1:], reduction="sum")
        loss.backward()
    return _results(model, record, torch.cat(logits).detach())


@dataclass
class _Record:
    embedded: list[Tensor] = field(default_factory=list)
    outputs: dict[str, list[Tensor]] = field(default_factory=dict)


@contextmanager
def _recorded(model: Any) -> Iterator[_Record]:
    """Note what goes into the first block, so that it gets a gradient, and what every block gives."""
    record = _Record()

    def note_input(_: nn.Module, __: Any, output: Tensor) -> None:
        record.embedded.append(output.requires_grad_())

    hooks = []
    for index, block in enumerate(blocks_of(model)):
        noted = record.outputs.setdefault(f"block {index}", [])

        def note_output(_: nn.Module, __: Any, output: Any, noted: list[Tensor] = noted) -> None:
            noted.append((output[0] if isinstance(output, tuple) else output).detach()[0])

        hooks.append(block.register_forward_hook(note_output))
    hooks.append(model.get_input_embeddings().register_forward_hook(note_input))
    try:
        yield record
    finally:
        for hook in hooks:
            hook.remove()


def _results(model: nn.Module, record: _Record, logits: Tensor) -> Results:
    gradients = [e.grad if e.grad is not None else torch.zeros_like(e) for e in record.embedded]
    adapters = {
        _short(name): p.grad if p.grad is not None else torch.zeros_like(p)
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    model.zero_grad(set_to_none=True)
    return {
        "block outputs": {name: torch.cat(parts) for name, parts in record.outputs.items()},
        "logits": {"all": logits},
        "input gradient": {"all": torch.cat([gradient[0] for gradient in gradients])},
        "LoRA gradients": adapters,
    }


def _short(name: str) -> str:
    """``base_model.model.transformer.h.3.mlp.dense_h_to_4h.lora_A.default.weight`` → its telling parts."""
    parts = name.split(".")
    block = next(part for part in parts if part.isdigit())
    return f"block {block} {parts[-4]} {parts[-3]}"


def _distances(found: Results, expected: Results) -> Distances:
    return {
        group: {
            name: float((found[group][name].float() - tensor).norm() / tensor.norm().clamp(min=1e-30))
            for name, tensor in tensors.items()
        }
        for group, tensors in expected.items()
    }


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)
