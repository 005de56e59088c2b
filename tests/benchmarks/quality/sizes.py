"""The gate as it is, and the same in small."""

from __future__ import annotations

from dataclasses import dataclass, field

from tests.benchmarks.quality.learning import Schedule
from tests.benchmarks.quality.variants import VARIANTS
from tests.layouts import FALCON_H1, FAMILIES, VOCABULARY
from tests.tiny_model.train import Settings

SHAPES = {
    **dict.fromkeys(("falcon-7b", "falcon-11b", "falcon-40b", "falcon3-7b"), ""),
    # 34B's groups, with the multipliers of 7B's file, and weights as large as these are made for: with usual
    # random ones the state space adds less to a block than bfloat16's rounding, and faults in it hide there.
    "falcon-h1-7b": ",mamba_n_groups=2,initializer_range=0.1",
}


TINY_SHAPES = ("falcon-7b", "falcon-11b", "falcon-40b", "falcon3", "falcon-h1")


@dataclass(frozen=True, kw_only=True)
class Size:
    """What differs between the gate and its tiny form.

    Attributes:
        shapes: label → model of part (a).
        lengths: tokens of its documents.
        vocabulary: of its models.
        adapter_std: of LoRA's second matrices in part (a): LoRA adds a tenth or more to what a linear gives.
        variants: run where none are named, the most important first.
        held_out: rows of the data to evaluate on.
        rows: of the data at most, the held-out ones included; all where None.
        schedule: of fine-tuning.
        workers: processes that fine-tune side by side; 0 for this one alone.
        hidden_size: of the base that is trained.
        layers: its blocks.
        base_batch_tokens: tokens of a step of its training.
    """

    shapes: dict[str, str]
    lengths: tuple[int, ...]
    vocabulary: int
    adapter_std: float
    variants: tuple[str, ...]
    held_out: int
    rows: int | None
    schedule: Schedule = field(default_factory=Schedule)
    workers: int
    hidden_size: int
    layers: int
    base_batch_tokens: int

    def base_settings(self, seconds: float) -> Settings:
        """How the base is trained for `seconds`."""
        return Settings(
            minutes=seconds / 60,
            epochs=2,
            batch_tokens=self.base_batch_tokens,
            learning_rate=1e-3,
            compile_model=False,
            seed=0,
        )


FULL = Size(
    shapes={name: f"random:{name}?num_hidden_layers=2{more}" for name, more in SHAPES.items()},
    lengths=(700, 1, 512, 3, 387, 129, 300, 16),
    vocabulary=65_024,
    adapter_std=0.02,
    variants=("4bit", "8bit", "4bit-fp8", "16bit"),
    held_out=600,
    # 31 runs of some 0.7 million tokens: two or three minutes of an H200.
    rows=4_100,
    schedule=Schedule(epochs=1, batch_tokens=8192),
    workers=3,
    hidden_size=768,
    layers=12,
    base_batch_tokens=32_768,
)
TINY = Size(
    shapes={name: (FAMILIES | FALCON_H1)[name] for name in TINY_SHAPES},
    lengths=(70, 1, 51, 3, 38, 12, 25),
    vocabulary=VOCABULARY,
    adapter_std=0.1,
    variants=tuple(VARIANTS),
    held_out=30,
    rows=80,
    schedule=Schedule(epochs=1, batch_tokens=1024),
    workers=0,
    hidden_size=128,
    layers=2,
    base_batch_tokens=2048,
)
