"""How much memory a training step takes, from the configuration alone, and what to recompute.

It counts the activations that the backward pass needs, the gradients, the optimizer's state, and what exists
only briefly: a block's dequantized weights, its backward pass's temporaries, a chunk of the logits. Measured
on an H200 for 7B without recomputation, in bfloat16: 2.22 MB a token with fast blocks, 3.9 without (10^6
bytes).

The smallest setting, 8,192 tokens, LoRA r 64, 4 bits, ``offload``, paged 8-bit AdamW, in GB (10^9 bytes):

| | 7B | 40B |
|---|---|---|
| weights: NF4 and its scales | 3.42 | 21.04 |
| embedding, which is the head | 0.59 | 1.07 |
| adapter, float32 | 0.52 | 1.78 |
| gradients, float32 | 0.52 | 1.78 |
| dequantized weights of a group | 0.21 | 0.68 |
| inputs: the block's, the next to come, and the gradient | 0.22 | 0.40 |
| projections, which become their gradients | 0.38 | 0.69 |
| joined: its gradient, attention's output, the gradient copied beside u | 0.52 | 0.94 |
| libraries' own, and rounding | 0.27 | 0.27 |
| together | 6.66 | 28.64 |

A test compares these rows. The optimizer's state is in paged memory, outside of PyTorch's allocator. The head
runs when no block does, and takes less: 0.13 GB for the logits of 1,024 tokens, which become their gradient.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from falcon_qlora.kernels.chunks import LOGIT_TOKENS
from falcon_qlora.models.layouts import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

Checkpointing = Literal["none", "selective", "full", "offload"]

# Measured: the reference path also keeps the outputs of norms and GELU, and copies of inputs.
_REFERENCE_FACTOR, _ALL_TRAINED_FACTOR = 1.9, 2.0
# The libraries' workspaces, and what the allocator rounds up.
_UNCOUNTED_BYTES = 2**28
USABLE_SHARE = 0.92
"""Of what is free, that a step may be predicted to take."""
# What the allocator leaves unused in FP8, whose pieces are of many sizes: nothing where documents are of one
# length, 9 % of what is kept in batches of Alpaca's rows.
_FP8_ROUNDING = 0.045
# One float32 scale for every 256 values of an 8-bit optimizer's state.
_SCALE_BYTES = 4 / 256


@dataclass(frozen=True, kw_only=True)
class Step:
    """One process's training step.

    Attributes:
        config: the model.
        tokens: of one micro-batch.
        trainable: number of trainable parameters.
        trainable_bytes: of each, and of its gradient; adapters are float32.
        gradients_stay: whether gradients are in memory when a micro-batch begins: those of the one before it,
            or the buffer of the gradient all-reduce. Else they appear while activations are freed.
        all_trained: whether every weight is trained; the head's gradient is summed in float32.
        gathered: bytes of a sharded model's weights and gradients that are whole at one time.
        fast: whether the blocks run on the fast path.
        lora_rank: of the adapter on every linear; 0 where something else is trained.
        lora_dropout: whether LoRA has dropout.
        scaled: whether every linear has a learned scale and bias (Adapter v2).
        in_fp8: whether the blocks' products are in FP8.
        value_bytes: of an activation.
        optimizer_bytes: of the optimizer's state for one parameter, as far as PyTorch's allocator holds it.
    """

    config: PreTrainedConfig
    tokens: int
    trainable: int
    fast: bool
    lora_rank: int = 0
    lora_dropout: bool = False
    scaled: bool = False
    in_fp8: bool = False
    value_bytes: int = 2
    trainable_bytes: int = 4
    optimizer_bytes: float = 8
    gradients_stay: bool = True
    all_trained: bool = False
    gathered: int = 0

    def bytes(self, blocks: Sequence[Checkpointing]) -> int:
        """Bytes that a step takes beyond the loaded model and its adapter; `blocks`: one per block."""
        return sum(self.parts(blocks).values())

    def parts(self, blocks: Sequence[Checkpointing]) -> dict[str, int]:
        """What `bytes` adds up, by name: what there is at the fullest moment.

        That is in the head, when the forward pass is done and all activations are kept, or in a block's
        backward pass.
        """
        counts = Counter(blocks)
        key = frozenset(counts.items())
        if key not in self._found:  # asked again for every card
            self._found[key] = self._add_up(counts)
        return dict(self._found[key])

    @cached_property
    def _found(self) -> dict[frozenset[tuple[Checkpointing, int]], dict[str, int]]:
        return {}

    def _add_up(self, blocks: Counter[Checkpointing]) -> dict[str, int]:
        kept = self.tokens * sum(count * self._kept(each) for each, count in blocks.items())
        if self.in_fp8:
            kept *= 1 + _FP8_ROUNDING
        gradients = self.trainable * self.trainable_bytes
        working = self.tokens * max(sum(self.working_values(each)) for each in blocks) * self.value_bytes
        in_block = {"activations": kept, "gradients": gradients, "block at work": working}
        in_head = {"activations": kept, "gradients": gradients, "head at work": self._head}
        if not self.gradients_stay:  # they come as activations go
            in_block["gradients"], in_head["gradients"] = max(gradients - kept, 0), 0
        fullest = max(in_block, in_head, key=lambda parts: sum(parts.values()))
        fullest |= {
            "dequantized weights": self._weights,
            "optimizer": self.trainable * self.optimizer_bytes,
            "gathered": self.gathered,
            "workspaces": _UNCOUNTED_BYTES,
        }
        return {name: int(size) for name, size in fullest.items() if size}

    def fits(self, blocks: Sequence[Checkpointing], free_bytes: float, *, beside: int = 0) -> bool:
        """Whether a step and `beside` more bytes fit into the free memory with some to spare."""
        return self.bytes(blocks) + beside <= USABLE_SHARE * free_bytes

    def choose(self, free_bytes: float) -> list[Checkpointing]:
        """Choose what each block keeps, so that no more is recomputed than `free_bytes` demand.

        As few blocks as possible move from ``none`` to ``selective``, then from ``selective`` to ``full``,
        then from ``full`` to ``offload``. Each takes less memory and more time than the one before. Where
        even that is not enough, all are on ``offload``.
        """
        layers = self.config.num_hidden_layers
        smaller: list[Checkpointing] = ["none", "selective", "full", "offload"]
        if not self.fast:
            smaller.remove("selective")
        if self.fits([smaller[0]] * layers, free_bytes):
            return [smaller[0]] * layers
        for before, after in pairwise(smaller):
            if not self.fits([after] * layers, free_bytes):
                continue
            # From the first on, each takes less.
            few, many = 0, layers
            while many - few > 1:
                middle = (few + many) // 2
                fits = self.fits([after] * middle + [before] * (layers - middle), free_bytes)
                few, many = (few, middle) if fits else (middle, many)
            return [after] * many + [before] * (layers - many)
        return [smaller[-1]] * layers

    def working_values(self, checkpointing: Checkpointing) -> tuple[float, float, float]:
        """Values per token that exist at the peak of a block's backward pass, beside those kept.

        Returns:
            Inputs and the incoming gradient; recomputed projections, or their gradients; and the rest, at the
            backward pass of dense and 4h_to_h or of attention.
        """
        if self.fast and self._sequential:
            return self._sequential_working_values(checkpointing)
        hidden, fused, wide, rank = self._sizes
        projected = fused + wide + rank
        joined = hidden + wide
        # With dropout, GELU's output is beside its gradient rather than in its place, and so is its
        # dropped-out copy.
        at_gelu = hidden + rank + (2 * wide if self.lora_dropout else 0)
        # As in FlashAttention-2: three gradients for all heads, one of them in float32 too.
        attention = max(5 * hidden, 4 / self.value_bytes * layout_of(self.config).float32_at_work())
        if checkpointing == "none":
            return hidden, projected, joined + max(at_gelu, attention)
        if checkpointing == "selective":
            return hidden, projected, joined + max(wide + at_gelu, attention)
        inputs = 3 * hidden if checkpointing == "offload" else hidden
        if not self.fast:  # the whole block is run again and all of it kept
            return inputs, projected + self._all_of_a_block(), joined + max(hidden + rank, attention)
        rest = hidden + max(joined + at_gelu, hidden + attention)
        return inputs, projected, rest + self._products_kept

    @cached_property
    def _sequential(self) -> bool:
        return layout_of(self.config).residuals == 2

    def _sequential_working_values(self, checkpointing: Checkpointing) -> tuple[float, float, float]:
        """`working_values` of a fast block whose feed-forward layer follows attention.

        The peak is in the feed-forward layer's backward pass or in attention's, whose gradients take as much
        as in a parallel block, or in that of a mixer beside it.
        """
        hidden, fused, wide, _ = self._sizes
        layout = layout_of(self.config)
        attended, joined = layout.linear_shapes()[layout.output_projection][1], wide // 2
        of_fused, of_wide = fused + len(layout.attention_inputs) * self.lora_rank, wide + 2 * self.lora_rank
        copied = hidden + self.lora_rank  # the gradient beside u
        at_swiglu = joined * (2 if self.lora_dropout else 1)
        before = 0 if checkpointing in ("none", "selective") else hidden + of_fused + layout.mixed
        of_wide_too = wide / self.value_bytes if self.in_fp8 else 0  # in FP8
        feed_forward = of_wide, before + at_swiglu + copied + of_wide_too
        beside = layout.fast_bytes_at_work(self.value_bytes) / self.value_bytes
        at_attention = max(before - of_fused, 0) + layout.mixed + max(5 * attended, beside) + copied
        projected, rest = max(feed_forward, (of_fused, at_attention), key=sum)
        return 3 * hidden if checkpointing == "offload" else hidden, projected, rest

    @cached_property
    def _sizes(self) -> tuple[int, int, int, int]:
        """Hidden size, widths of attention's and feed-forward's input projections, a group's LoRA columns."""
        layout = layout_of(self.config)
        shapes = layout.linear_shapes()
        fused = sum(shapes[name][0] for name in layout.attention_inputs)
        wide = sum(shapes[name][0] for name in layout.feed_forward_inputs)
        return self.config.hidden_size, fused, wide, 2 * self.lora_rank

    def _all_of_a_block(self) -> float:
        """Values per token that a reference block keeps."""
        factor = _ALL_TRAINED_FACTOR if self.all_trained else _REFERENCE_FACTOR
        layout = layout_of(self.config)
        copied = 4 * self.config.hidden_size * layout.norms_per_block if layout.norm_keeps_float32 else 0
        return (factor * self._kept_fast("none") + copied) / self.value_bytes

    def _kept(self, checkpointing: Checkpointing) -> float:
        """Bytes per token that a block keeps from the forward to the backward pass."""
        if checkpointing == "offload":
            return 0.0
        if checkpointing == "full":
            return self.config.hidden_size * self.value_bytes
        return self._kept_fast(checkpointing) if self.fast else self._all_of_a_block() * self.value_bytes

    def _kept_fast(self, checkpointing: Checkpointing) -> float:
        """Bytes per token that a fast block keeps: input, projections, attention's output and LoRA's t."""
        hidden, fused, wide, rank = self._sizes
        if self.fast and self._sequential:  # the inputs of both, and a t for each linear
            layout = layout_of(self.config)
            values = 2 * hidden + fused + layout.mixed + (len(layout.linears) - 2) * self.lora_rank
            values += wide + 2 * self.lora_rank if checkpointing == "none" else 0
        else:
            values = 2 * hidden + fused + 2 * rank + (wide if checkpointing == "none" else 0)
        values += self._products_kept
        return values * self.value_bytes + 4 * self.config.num_attention_heads

    @cached_property
    def _products_kept(self) -> int:
        """Values per token of dense's and 4h_to_h's outputs, which the gradients of their scales need."""
        return 2 * self.config.hidden_size if self.scaled else 0

    @cached_property
    def _weights(self) -> int:
        """Bytes of one group's dequantized weights and its LoRA: see `kernels.frozen_linear`."""
        hidden, fused, wide, rank = self._sizes
        shared = layout_of(self.config).norms_per_block == 1
        into = (fused + wide if shared else wide) * hidden
        return int(max(into, (hidden + wide) * hidden) + rank * (hidden + wide)) * self.value_bytes

    @cached_property
    def _head(self) -> int:
        """Bytes that the head needs: three hidden-size tensors, some logits, the weight's gradient."""
        logits = min(self.tokens, LOGIT_TOKENS) * self.config.vocab_size * self.value_bytes
        logits *= 2 if self.scaled else 1  # before and after the head's scale
        gradient = self.config.vocab_size * self.config.hidden_size * (4 + self.value_bytes)
        hidden = 3 * self.tokens * self.config.hidden_size * self.value_bytes
        return int(hidden + logits + (gradient if self.all_trained else 0))


def gathered_bytes(config: PreTrainedConfig, value_bytes: int) -> int:
    """The most that PyTorch's fully_shard holds beside a process's own part.

    The embedding and its gradient are whole throughout a micro-batch. So are two blocks, the running one and
    the next, each with its all-gather buffer, and gradients in flight.
    """
    embedding = config.vocab_size * config.hidden_size
    block = (layout_of(config).parameter_count() - embedding) // config.num_hidden_layers
    return value_bytes * (2 * embedding + 7 * block)


def optimizer_bytes(optim: str, value_bytes: int = 4, *, embedded: float = 0.0) -> float:
    """Bytes of an optimizer's state for one parameter, in whatever memory.

    Args:
        optim: Transformers' name.
        value_bytes: of a parameter, whose dtype PyTorch's own optimizers follow.
        embedded: share of the parameters that are an embedding's, for which 8-bit optimizers keep 32 bits.
    """
    if optim in ("sgd", "adafactor"):  # Adafactor's rows and columns are next to nothing
        return 0
    single = any(word in optim for word in ("lion", "rmsprop", "adagrad"))
    states = 3 if "ademamix" in optim else 1 if single else 2
    if "8bit" in optim:
        return states * ((1 - embedded) * (1 + _SCALE_BYTES) + embedded * 4)
    in_float32 = any(word in optim for word in ("32bit", "bnb", "ademamix"))  # bitsandbytes'
    return states * (4 if in_float32 else value_bytes)


def embedded_share(config: PreTrainedConfig) -> float:
    """Share of a model's parameters that are its embedding's; a head tied to it is counted once."""
    return config.vocab_size * config.hidden_size / layout_of(config).parameter_count()


def allocated_optimizer_bytes(optim: str, value_bytes: int = 4, *, embedded: float = 0.0) -> float:
    """The part of `optimizer_bytes` in PyTorch's allocator: paged optimizers keep theirs in CPU memory."""
    return 0 if optim.startswith("paged") else optimizer_bytes(optim, value_bytes, embedded=embedded)
