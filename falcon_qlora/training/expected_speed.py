"""How long a step takes, from the configuration alone: operations and bytes over a card's ceilings.

A frozen base costs 4 operations a weight and token, and 2 for what is computed again. Beside the products
there is what lies between them, which moves bytes for every value that a linear reads or gives; and what a
micro-batch costs however few tokens it has, which moves bytes for every weight: it is dequantized.

The shares below are this project's on an H200, fitted to ``tests/benchmarks/records.csv``; a test compares
every measured step. For another card they are taken of its published ceilings, which was never measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from falcon_qlora.models.layouts import layout_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

    from falcon_qlora.models.sizes import QuantizeMode
    from falcon_qlora.models.step_memory import Checkpointing
    from falcon_qlora.training.cards import Card

# Of the published ceilings, what products and attention reach.
_SHARE = {"bf16": 0.74, "fp8": 0.67}
# Bytes that are moved, at the published speed: for a value that a linear reads or gives, on the fast path and
# on the reference path; for a value of a state space; and for a weight, once a micro-batch.
_OF_VALUE, _OF_VALUE_REFERENCE = 21.0, 53.0
_OF_DROPOUT = 13.0  # further ones of a value on the fast path
_OF_STATE, _OF_STATE_REFERENCE = 154.0, 3800.0
_OF_WEIGHT = {"4bit": 19.5, "8bit": 18.5, "16bit": 28.0}
_OF_KEPT_WEIGHT = 16.0  # in FP8 already
# Low-rank products are narrow: as if there were twice as many operations.
_LOW_RANK = 12
# What recomputation adds of the bytes of values, on the fast path.
_AGAIN = {"none": 0.0, "selective": 0.18, "full": 0.45, "offload": 0.45}
# For a trained parameter, once a step: bytes, of an optimizer in 32 bits and in 8; and seconds, where its
# state is in CPU memory.
_OPTIMIZER_BYTES, _OPTIMIZER_BYTES_8BIT = 28, 110
_PAGED_SECONDS = 1.1e-10
# Of a slot's published speed, what a copy from page-locked memory reaches; not measured here.
_SHARE_OF_PCIE = 0.8
# Seconds in which the host starts the kernels of a block, forward and backward, kept and recomputed: of small
# micro-batches the card waits for it. From steps of 2,048 tokens, and none that is slower at 8,192.
_HOST_SECONDS = {"Falcon": (5.5e-3, 5.75e-3), "Falcon3": (7.5e-3, 10.2e-3), "Falcon-H1": (12e-3, 17e-3)}


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """One process's micro-batch and optimizer step.

    Attributes:
        config: the model, or its outline.
        quantize_mode: how the base is stored.
        tokens: of a micro-batch, padding included.
        document_tokens: of the document that a token is in, on average: attention's work.
        blocks: what each block keeps.
        trained: number of trainable parameters.
        low_rank: whether they are LoRA's.
        fast: whether the blocks run on the fast path.
        all_trained: whether every weight is trained.
        in_fp8: whether the frozen products run in FP8.
        fp8_kept: whether FP8 weights are kept.
        dropout: whether LoRA has dropout.
        optim: the optimizer, by Transformers' name.
        streamed: bytes of the base in CPU memory, which are copied to the card in each pass.
    """

    config: PreTrainedConfig
    quantize_mode: QuantizeMode
    tokens: int
    blocks: Sequence[Checkpointing]
    trained: int
    document_tokens: float = 512
    low_rank: bool = True
    fast: bool = True
    all_trained: bool = False
    in_fp8: bool = False
    fp8_kept: bool = False
    dropout: bool = False
    optim: str = "adamw_torch_fused"
    streamed: int = 0

    def micro_batch_seconds(self, card: Card) -> float:
        """Forward and backward of a micro-batch: of each block its work or its copy, whichever takes longer.

        Args:
            card: one whose ceilings are known.
        """
        if not self.streamed:
            return self._work_seconds(card)
        return sum(map(max, self.passes(card)))

    def passes(self, card: Card) -> tuple[tuple[float, float], tuple[float, float]]:
        """Seconds of a micro-batch's forward and backward pass: of each pass its work, and what it copies.

        Backward also copies the inputs that blocks have offloaded; forward, those go the other way.
        """
        whole = self._work_seconds(card)
        # Two operations a weight and token are the forward pass's.
        forward = whole * 2 * layout_of(self.config).linear_parameter_count() / self._operations()[0]
        moved = list(self.blocks).count("offload") * self.tokens * self.config.hidden_size * 2
        of_copies = [each / (card.pcie * _SHARE_OF_PCIE * 1e9) for each in (self.streamed, moved)]
        return (forward, of_copies[0]), (whole - forward, sum(of_copies))

    def _work_seconds(self, card: Card) -> float:
        """Forward and backward of a micro-batch whose weights are on the card."""
        assert card.bf16
        assert card.terabytes
        frozen, other = self._operations()
        of_frozen = (card.fp8 or 0) * _SHARE["fp8"] if self.in_fp8 else card.bf16 * _SHARE["bf16"]
        a_token = frozen / of_frozen / 1e12 + other / (card.bf16 * _SHARE["bf16"]) / 1e12
        a_token += self._bytes() / card.terabytes / 1e12
        linears = layout_of(self.config).linear_parameter_count()
        of_weight = _OF_KEPT_WEIGHT if self.fp8_kept else _OF_WEIGHT[self.quantize_mode]
        return max(self.tokens * a_token + linears * of_weight / card.terabytes / 1e12, self._of_host())

    def optimizer_seconds(self, card: Card) -> float:
        """Of an optimizer step."""
        assert card.terabytes
        moved = _OPTIMIZER_BYTES_8BIT if "8bit" in self.optim else _OPTIMIZER_BYTES
        paged = _PAGED_SECONDS if self.optim.startswith("paged") else 0
        return self.trained * (moved / card.terabytes / 1e12 + paged)

    def tokens_per_second(self, card: Card, *, micro_batches: int = 1) -> float:
        """Tokens a second of one process, where a step has so many micro-batches."""
        seconds = micro_batches * self.micro_batch_seconds(card) + self.optimizer_seconds(card)
        return micro_batches * self.tokens / seconds

    def _operations(self) -> tuple[float, float]:
        """Operations for a token: of the blocks' frozen products, and the others'."""
        config, layout = self.config, layout_of(self.config)
        sizes = {name: out * into for name, (out, into) in layout.linear_shapes().items()}
        wide = sum(sizes[name] for name in layout.feed_forward_inputs)
        inputs = wide + sum(sizes[name] for name in layout.attention_inputs)
        attended = layout.linear_shapes()[layout.output_projection][1] * self.document_tokens
        again = {"none": 0, "selective": wide, "full": inputs, "offload": inputs}
        frozen = attention = 0.0
        for what, count in Counter(self.blocks).items():
            repeated = again[what] if self.fast or what == "none" else sum(sizes.values())
            frozen += count * ((6 if self.all_trained else 4) * sum(sizes.values()) + 2 * repeated)
            # Half of the pairs are masked. Backward has five products where forward has two.
            attention += count * attended * (9 if what in ("full", "offload") else 7)
        head = (6 if self.all_trained else 4) * config.vocab_size * config.hidden_size
        return frozen, attention + head + (_LOW_RANK * self.trained if self.low_rank else 0)

    def _of_host(self) -> float:
        """The least that a micro-batch takes, however few tokens it has."""
        kept, recomputed = _HOST_SECONDS[layout_of(self.config).family]
        return sum(kept if what == "none" else recomputed for what in self.blocks)

    def _bytes(self) -> float:
        """Bytes that are moved for a token beside the products."""
        layout = layout_of(self.config)
        values = sum(out + into for out, into in layout.linear_shapes().values())
        states = layout.mixed - layout.linear_shapes()[layout.output_projection][1]
        of_value = _OF_VALUE + self.dropout * _OF_DROPOUT if self.fast else _OF_VALUE_REFERENCE
        of_state = _OF_STATE if self.fast else _OF_STATE_REFERENCE
        total = 0.0
        for what, count in Counter(self.blocks).items():
            again = _AGAIN[what] if self.fast else 0.5 * (what != "none")
            total += count * (1 + again) * (values * of_value + states * of_state)
        return total
