"""The named variants of the training step that can be compared, and how long each is measured."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Literal, get_args

from falcon_qlora.common.errors import UserError, nearest

Mode = Literal["4bit", "8bit", "16bit"]
Dtype = Literal["bf16", "fp8"]
Checkpointing = Literal["none", "selective", "full", "offload"]


class Impossible(Exception):
    """A variant that cannot run on this machine, version or model; the message says why."""


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Another tool's training step; ``tests/benchmarks/against.py`` adds some to `VARIANTS`.

    Attributes:
        name: the tool's.
        build: replaces `runners.build`, with the same arguments; yields an object with `prepare`, `step` and
            `notes` like those of `runners.OwnRunner`.
        load: loads the tool's own weights, given a model's name, `Settings` and the device; None uses those
            of `load_model`.
    """

    name: str
    build: Callable[..., AbstractContextManager[Any]]
    load: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One row of the table.

    Attributes:
        name: as `--variants` takes it.
        what: one-line description.
        quantize_mode: how the frozen weights are stored.
        compute_dtype: of the products with frozen weights.
        checkpointing: how activations are kept between forward and backward.
        kernels: ``auto`` runs the fast blocks, ``off`` the reference path.
        libraries: whether optional kernel libraries may be used if installed.
        lora_dropout: before the low-rank product.
        keep: whether the frozen weights are made once rather than for every product: in FP8, as training does
            if memory allows, or dequantized.
        padding: None packs; ``longest`` and ``max_length`` pad the same rows instead.
        engine: another tool's step; None for this project's.
        largest_batch: whether the micro-batch is the largest that fits, whatever ``--tokens`` says.
    """

    name: str
    what: str
    quantize_mode: Mode = "4bit"
    compute_dtype: Dtype = "bf16"
    checkpointing: Checkpointing = "none"
    kernels: Literal["auto", "off"] = "auto"
    libraries: bool = True
    lora_dropout: float = 0.0
    keep: bool = False
    padding: Literal["longest", "max_length"] | None = None
    engine: Engine | None = None
    largest_batch: bool = False

    @property
    def base(self) -> str:
        """Name of the weights it runs on; variants with the same name share them."""
        return self.engine.name if self.engine and self.engine.load else self.quantize_mode


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long to measure.

    Attributes:
        rounds: how often every variant has its turn.
        steps: timed steps of a variant in a round.
        warmup: untimed steps before the timed ones of the first round; later rounds have one less.
        minutes: no further round begins after these.
    """

    rounds: int = 5
    steps: int = 2
    warmup: int = 3
    minutes: float = math.inf


def _ours() -> Iterator[Variant]:
    for mode in get_args(Mode):
        suffix = "" if mode == "4bit" else f"-{mode}"
        stored = functools.partial(Variant, quantize_mode=mode)
        name, what = f"reference{suffix}", f"packed, {mode}, without fast blocks (--kernels off)"
        yield stored(name=name, what=what, kernels="off")
        what = f"the same, recomputing every block, {mode}"
        yield stored(name=f"{name}-full", what=what, kernels="off", checkpointing="full")
        for dtype in get_args(Dtype):
            computed = functools.partial(stored, compute_dtype=dtype)
            name = f"ours{suffix}" if dtype == "bf16" else f"ours{suffix}-fp8"
            yield computed(name=name, what=f"packed, {mode}, fast blocks, products in {dtype}")
            for how in get_args(Checkpointing)[1:]:
                what = f"the same with --checkpointing {how}, {mode}, {dtype}"
                yield computed(name=f"{name}-{how}", what=what, checkpointing=how)
            what = f"with PyTorch and Triton alone, {mode}, {dtype}"
            yield computed(name=f"{name}-no-libraries", what=what, libraries=False)
            what = f"with frozen weights kept in {dtype}, {mode}"
            yield computed(name=f"{name}-kept", what=what, keep=True)
            what += ", PyTorch and Triton alone"
            yield computed(name=f"{name}-kept-no-libraries", what=what, keep=True, libraries=False)
        yield stored(name=f"ours{suffix}-dropout", what=f"with LoRA dropout 0.1, {mode}", lora_dropout=0.1)


ON_DATA = (
    Variant(name="packed", what="real rows laid end to end (needs --dataset_name)"),
    Variant(
        name="padded-512", what="the same rows, each padded to --max_length, 512 here", padding="max_length"
    ),
    Variant(
        name="padded-longest", what="the same rows, padded to the longest of the batch", padding="longest"
    ),
)
VARIANTS = {variant.name: variant for variant in (*_ours(), *ON_DATA)}
DEFAULT = ["reference-full", "reference", "ours", "ours-full"]


def choose(names: list[str] | None, *, on_data: bool) -> list[Variant]:
    """The variants of these names, in this order; the default ones for None.

    Args:
        names: as given; repeated ones count once.
        on_data: whether real rows were given.

    Raises:
        UserError: for an unknown name, or a variant that does not fit the data.
    """
    if names is None:
        return list(ON_DATA) if on_data else [VARIANTS[name] for name in DEFAULT]
    for name in names:
        if name not in VARIANTS:
            raise UserError(
                f"--variants: there is no {name!r}{nearest(name, VARIANTS)}; --list_variants shows all"
            )
        variant = VARIANTS[name]
        if on_data and variant.engine:
            raise UserError(f"--variants {name} is measured on made-up documents; leave --dataset_name out")
        if not on_data and variant in ON_DATA:
            raise UserError(f"--variants {name} needs real rows: give --dataset_name")
    return [VARIANTS[name] for name in dict.fromkeys(names)]
