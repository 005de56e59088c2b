"""Which kernels run: chosen by a pure function of layout, GPU and settings, then installed on the blocks.

`decide` is that function; its answers, one per block, are written to kernels.json. A block that it leaves
alone runs its own ``forward``, and so does a call without packed documents.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.fp8 import fp8_excludes
from falcon_qlora.kernels import flash_attention, fp8, ops, prefix, ssd_ops
from falcon_qlora.kernels.dequantized import DequantizedProducts
from falcon_qlora.kernels.fp8_block import Fp8
from falcon_qlora.kernels.fp8_gelu_products import Fp8GeluProducts, fp8_gelu_products, supports
from falcon_qlora.kernels.gelu_products import GeluProducts, gelu_products
from falcon_qlora.kernels.libraries import FLASH_ATTENTION_4, QUACK, Loaded, have_gpu, is_installed
from falcon_qlora.kernels.offload import Offload
from falcon_qlora.kernels.scaled_products import ScaledProducts
from falcon_qlora.kernels.sublayer import Fp8Sublayers, Sublayers
from falcon_qlora.kernels.workspace import Workspace
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.blocks import falcon, falcon_h1, llama
from falcon_qlora.models.blocks.attention import AttentionKernel
from falcon_qlora.models.blocks.fast_block import (
    BlockFacts,
    Frozen8,
    Keep,
    MakeProducts,
    State,
    install,
    restore,
    state_of,
)
from falcon_qlora.models.forward import FEW_ROWS, enable_packing, pack_batches
from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.models.packed_attention import takes_varlen
from falcon_qlora.models.streamed_base import streamed_base_of
from falcon_qlora.models.token_rows import pad_head

_FAMILIES: dict[str, ModuleType] = {"falcon": falcon, "llama": llama, "falcon_h1": falcon_h1}
"""Families with fast blocks, by their configuration's ``model_type``; each is a module like `falcon`."""

_REFERENCE = "reference path: "
_FEW_ROWS = f"of targets alone where they are at most {FEW_ROWS:.0%} of tokens"
_BRACKETS = str.maketrans("[]", "()")


def decide(
    facts: BlockFacts | None,
    *,
    triton: bool,
    attention: AttentionKernel,
    gelu_in_products: bool = False,
    fp8_products: bool = False,
    failures: Mapping[str, str | None] | None = None,
    is_last: bool = False,
) -> dict[str, str]:
    """Decide what runs where in a block, and why.

    Args:
        facts: of the block; None where its family has no fast block.
        triton: whether Triton's kernels for the operations between the matrix products can run.
        attention: from `choose_attention`.
        gelu_in_products: whether GELU is computed in the epilogues of products.
        fp8_products: whether the frozen products are to run in FP8.
        is_last: whether no block follows.
        failures: part of the result → what failed that would have computed it faster (`Loaded.failure`).

    Returns:
        ``block``: ``fast`` or ``reference``. With ``reference`` also ``reason``; with ``fast`` what computes
        ``attention``, ``weights``, the activation by its name (``GELU``, ``SwiGLU``) and ``between`` (norms,
        rotation), and ``prefix``, ``scales`` and ``state space`` where there are any.
    """
    reason = _why_not(facts, fp8_products)
    if facts is None or reason is not None:
        return {"block": "reference", "reason": reason or ""}
    small = "Triton" if triton else "PyTorch"
    stored = {"4bit": "NF4 dequantized", "8bit": "int8 dequantized", "16bit": "as stored"}
    if fp8_products:
        stored = {"4bit": "NF4 dequantized to FP8", "8bit": "int8 dequantized to FP8", "16bit": "in FP8"}
    activation = small
    if gelu_in_products and _gelu_may_be_in_products(facts):
        activation = "in products" + (f" forward, {small} backward" if facts.lora_dropout else "")
    ways = {
        "block": "fast",
        "attention": attention,
        "weights": stored[facts.quantize_mode],
        facts.activation: activation,
        "between": small,
    }
    if facts.prefix_rows:
        ways["prefix"] = small if prefix.are_few(facts.prefix_rows, facts.heads[-1]) else "PyTorch"
    if facts.scaled:
        ways["scales"] = small
    if facts.state_space:
        ways["state space"] = small if ssd_ops.heads_fit(*facts.state_space) else "PyTorch"
    if is_last and facts.leaves_rows_out:
        ways["feed-forward"] = _FEW_ROWS
    for part, failure in (failures or {}).items():
        if failure is not None and part in ways:
            ways[part] += f" [{failure.translate(_BRACKETS)}]"
    return ways


def _gelu_may_be_in_products(facts: BlockFacts) -> bool:
    return facts.activation == "GELU" and not facts.scaled


def _why_not(facts: BlockFacts | None, fp8_products: bool) -> str | None:
    if facts is None:
        return "no fast block for this layout yet"
    if facts.unlike:
        return facts.unlike
    if facts.dtype not in (torch.bfloat16, torch.float32):
        return f"computes in {str(facts.dtype).removeprefix('torch.')}"
    if facts.lora_unknown:
        return facts.lora_unknown
    if facts.trainable:
        return f"trains more than LoRA: {facts.trainable[0]}"
    if fp8_products:
        return fp8_excludes(
            lora_dropout=facts.lora_dropout,
            scales=facts.scaled,
            prefix=bool(facts.prefix_rows),
        )
    return None


def choose_attention(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int, int], *, libraries: bool
) -> tuple[AttentionKernel, str | None]:
    """Choose the fastest attention kernel that can run.

    Args:
        device: of the model.
        dtype: of the activations.
        heads: Q, G and D.
        libraries: whether optional libraries may be used.

    Returns:
        The kernel, and what failed that would have been faster.
    """
    if not takes_varlen(device, dtype, heads[-1], 0.0):
        return "padded batches", None
    if not libraries or not _takes_flash_attention_4(device, dtype, heads[-1]):
        return "variable-length kernel", None
    flash = flash_attention.flash_attention_4(device, *heads)
    return "variable-length kernel" if flash.part is None else "FlashAttention-4", flash.failure


def _takes_flash_attention_4(device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    # Its gradients were wrong on an H200 for heads of 8 and 16. Falcon's have 64 or 128.
    return takes_varlen(device, dtype, head_dim, 0.0) and head_dim in (64, 128)


def choose_kernels(model: Any, *, kernels: str, compute_dtype: str) -> dict[str, str]:
    """Install the fast path on the blocks that it supports.

    Args:
        model: with packing enabled.
        kernels, compute_dtype: the settings of these names.

    Returns:
        Block name → what runs, or why it was left alone; {} with ``--kernels off``.

    Raises:
        UserError: if ``--kernels required`` or FP8 is set and a block or the device cannot run it, or if
            ``--kernels required`` is set and a library that is installed fails.
    """
    if kernels == "off":
        return {}
    in_fp8 = compute_dtype == "fp8"
    report = apply_fast_path(model, fp8_products=in_fp8, libraries=kernels != "portable")
    left = [f"{name} runs on the {what}" for name, what in report.items() if not runs_fast(what)]
    if left and (kernels == "required" or in_fp8):
        asked = "--kernels required" if kernels == "required" else "--compute_dtype fp8 needs fast kernels"
        raise UserError(f"{asked}: {left[0]} ({len(left)} of {len(report)} blocks)")
    if kernels == "required" and (failed := failed_libraries(report)):
        raise UserError(f"--kernels required: {'; '.join(failed)}. {MEND}")
    return report


MEND = "Mend or remove it (flash-attn-4 and quack-kernels: pip install 'falcon-qlora[kernels]')"
"""What to do about a library that failed."""


def failed_libraries(kernels: Mapping[str, str]) -> list[str]:
    """Libraries that are installed and support the GPU and failed, from the result of `choose_kernels`.

    Returns:
        Each library's name and its error, in one line.
    """
    return list(dict.fromkeys(re.findall(r"\[(.*? failed: .*?)\]", "\n".join(kernels.values()))))


def runs_fast(what: str) -> bool:
    """Whether an entry of `choose_kernels` says that a block runs on the fast path."""
    return not what.startswith("reference")  # older runs wrote "reference: " and the reason


def reason_left_alone(what: str) -> str:
    """Why a block does not run on the fast path, from its entry."""
    return what.removeprefix(_REFERENCE)


def described(kernels: dict[str, str]) -> str:
    """The result of `choose_kernels` in one line."""
    if not kernels:
        return "the reference path"
    last = f", feed-forward: {_FEW_ROWS}"  # of the last block alone
    ways = Counter(what.replace(last, "") for what in kernels.values())
    return "; ".join(f"{count} of {len(kernels)} blocks {what}" for what, count in ways.items())


def apply_fast_path(
    model: nn.Module,
    *,
    keep: Keep | Sequence[Keep] = "all",
    fp8_products: bool = False,
    libraries: bool = True,
) -> dict[str, str]:
    """Make each block of `model` run as one function where it can, in any training loop.

    It does so on packed documents (see `enable_packing`), and on other trainers' batches with labels (see
    `pack_batches`). Both are switched on.

    A fast block recomputes what it does not keep. Where a trainer switches gradient checkpointing on, it
    keeps its input, and its ``forward`` is not run a second time.

    Args:
        model: a model from `load_model`, as it is or inside PEFT's wrapper.
        keep: what the blocks keep for the backward pass; one for all, or one per block.
        fp8_products: multiply by the frozen weights in FP8 (e4m3), with LoRA beside it in bfloat16, or as
            exact within the product.
        libraries: whether to use FlashAttention-4 and quack-kernels where they are installed and support the
            GPU; without them PyTorch and Triton do everything.

    Returns:
        Module name of each block → what runs, or why it is left alone.

    Raises:
        UserError: if FP8 is asked for where it cannot run.
    """
    base = causal_lm_in(model)
    device, dtype = base.device, base.dtype
    reason = fp8.why_not(device, dtype) if fp8_products else None
    if reason is not None:
        raise UserError(f"{reason}. Use --compute_dtype auto")
    enable_packing(model)
    pack_batches(model)
    if device.type == "cuda":
        pad_head(base)
    family = _FAMILIES.get(base.config.model_type)
    workspace, offload = Workspace(), Offload()
    names = {module: name for name, module in base.named_modules()}
    blocks = blocks_of(base)
    report = {}
    keeps = [keep] * len(blocks) if isinstance(keep, str) else keep
    streamed = streamed_base_of(base)
    for index, (block, kept) in enumerate(zip(blocks, keeps, strict=True)):
        facts = family.block_facts(block, dtype) if family is not None else None
        # Libraries are tried, and may compile, only for blocks that they would run in.
        found = facts if facts is not None and _why_not(facts, fp8_products) is None else None
        heads = (0, 0, 0) if found is None else found.heads
        attention, slower = choose_attention(device, dtype, heads, libraries=libraries)
        gelu: Loaded[Any] = Loaded()
        if libraries and found is not None and _gelu_may_be_in_products(found):
            gelu = _fp8_gelu_products(base) if fp8_products else _gelu_products(base)
        decision = decide(
            facts,
            triton=ops.triton_runs_on(device),
            attention=attention,
            gelu_in_products=gelu.part is not None,
            fp8_products=fp8_products,
            is_last=block is blocks[-1],
            failures={
                "attention": slower,
                "GELU": gelu.failure,
                "between": ops.triton(device).failure if device.type == "cuda" else None,
            },
        )
        report[names[block]] = _told(decision)
        if family is None or facts is None:
            continue
        if decision["block"] == "reference":
            restore(block, family.block_forward)
            continue
        products: MakeProducts = partial(DequantizedProducts, gelu_products=gelu.part)
        if facts.scaled:
            products = ScaledProducts
        state = State(kept, workspace, offload, attention, products)
        install(block, family.block_forward, state)
        if fp8_products:
            if streamed is not None:
                streamed.fetch(index)
            parts = family.block_and_adapters(block, state)[0]
            if isinstance(parts, Sublayers):
                state.products = Fp8Sublayers.measure(parts)
            else:
                state.products = Fp8.measure(parts, gelu.part)
    return report


def _told(decision: dict[str, str]) -> str:
    if decision["block"] == "reference":
        return f"{_REFERENCE}{decision['reason']}"
    return f"fast ({', '.join(f'{part}: {way}' for part, way in decision.items() if part != 'block')})"


def _gelu_products(base: PreTrainedModel) -> Loaded[GeluProducts]:
    of_gpu = base.device.type == "cuda" and base.dtype == torch.bfloat16
    return gelu_products(base.device) if of_gpu else Loaded()


def _fp8_gelu_products(base: PreTrainedModel) -> Loaded[Fp8GeluProducts]:
    of_gpu = base.device.type == "cuda" and base.dtype == torch.bfloat16
    return fp8_gelu_products(base.device) if of_gpu else Loaded()


def missing_libraries(model: nn.Module, device: torch.device, *, fp8_products: bool) -> list[str]:
    """Optional libraries that are not installed, and that would run in blocks of `model` on `device`."""
    dtype, cuda = causal_lm_in(model).dtype, int((torch.version.cuda or "0").partition(".")[0])
    if not have_gpu() or cuda < 13 or dtype != torch.bfloat16:
        return []
    wanted = []
    for facts in _facts_of_blocks(model):
        if facts is not None and _why_not(facts, fp8_products) is None:
            if _takes_flash_attention_4(device, dtype, facts.heads[-1]):
                wanted.append(FLASH_ATTENTION_4)
            if _gelu_may_be_in_products(facts) and (supports(device) or not fp8_products):
                wanted.append(QUACK)
    return [library for library in dict.fromkeys(wanted) if not is_installed(library)]


def may_run_in_fp8(model: nn.Module, device: torch.device) -> bool:
    """Whether all blocks of `model` could multiply in FP8 on `device`."""
    if fp8.why_not(device, causal_lm_in(model).dtype) is not None:
        return False
    return all(_why_not(facts, fp8_products=True) is None for facts in _facts_of_blocks(model))


def _facts_of_blocks(model: nn.Module) -> list[BlockFacts | None]:
    base = causal_lm_in(model)
    family = _FAMILIES.get(base.config.model_type)
    return [None if family is None else family.block_facts(block, base.dtype) for block in blocks_of(base)]


def remove_fast_path(model: nn.Module) -> None:
    """Undo `apply_fast_path`; the model still takes packed documents.

    Raises:
        RuntimeError: if something else has wrapped a block's forward since; undo that first.
    """
    pack_batches(model, on=False)
    family = _FAMILIES.get(causal_lm_in(model).config.model_type)
    if family is not None:
        for block in blocks_of(model):
            restore(block, family.block_forward)


@contextmanager
def on_the_reference_path(model: nn.Module) -> Iterator[None]:
    """Within the block, the blocks that `apply_fast_path` took run their own forward."""
    family = _FAMILIES.get(causal_lm_in(model).config.model_type)
    fast = [(block, state) for block in blocks_of(model) if (state := state_of(block)) is not None]
    if family is None:
        yield
        return
    for block, _ in fast:
        restore(block, family.block_forward)
    try:
        yield
    finally:
        for block, state in fast:
            install(block, family.block_forward, state)


def fp8_weight_bytes(model: nn.Module) -> int:
    """Bytes that `keep_fp8_weights` takes: two or a little more per weight of blocks with products in FP8."""
    return sum(products.kept_bytes(block) for products, block in _fp8_blocks(model))


def keep_fp8_weights(model: nn.Module) -> None:
    """Quantize the frozen weights to FP8 once, rather than for every product; the results are the same."""
    for products, block in _fp8_blocks(model):
        products.keep(block)


def drop_fp8_weights(model: nn.Module) -> None:
    """Undo `keep_fp8_weights`."""
    for products, _ in _fp8_blocks(model):
        for weight in products.weights:
            weight.kept.clear()


def keep_dequantized_weights(model: nn.Module, room: int) -> None:
    """Keep the frozen weights of products in the activations' dtype rather than dequantize them for each.

    Args:
        model: with the fast path, and a base that stays as it is.
        room: bytes that they may take; linears that are multiplied as one are kept from their first product
            on while it lasts.
    """
    for block in blocks_of(model):
        state = state_of(block)
        if state is not None:  # of one workspace
            state.workspace.room = room


def _fp8_blocks(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    family = _FAMILIES.get(causal_lm_in(model).config.model_type)
    for block in blocks_of(model):
        state = state_of(block)
        if family is not None and state is not None and isinstance(state.products, Frozen8):
            yield state.products, family.block_and_adapters(block, state)[0]
