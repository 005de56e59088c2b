"""Adapter v2: Adapter's prefixes, a scale and a bias on every linear, the output head's too, and the norms.

The definitions are in models/prefix.py and models/scaled.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn
from transformers import FalconConfig, FalconForCausalLM

from falcon_qlora.methods.adapter import add_prefixes, prefix_groups, prefix_shapes, switched_off
from falcon_qlora.methods.folder import restore_adapter, write_adapter
from falcon_qlora.methods.interface import ParameterGroup, remember
from falcon_qlora.models.falcon import expected_linears, linear_shapes, norms_per_block
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.prefix import prefixes
from falcon_qlora.models.scaled import SCALE_AND_BIAS, ScaleAndBias, add_scale_and_bias

_BASE = "_weights_of_the_base"


@dataclass(frozen=True, kw_only=True)
class AdapterV2:
    """Train prefixes and gates, scales and biases of all linears, and the norms.

    Args:
        prefix_length: rows of each prefix.
        first_block: the first block that has one.
    """

    prefix_length: int = 10
    first_block: int = 2

    name: ClassVar[str] = "adapter_v2"
    title: ClassVar[str] = "Adapter v2"
    trains_in_float32: ClassVar[bool] = True
    why_not_merged: ClassVar[str | None] = (
        "attention reads the learned prefix in a softmax of its own, which no weights of a Falcon express; "
        "nor have its linears biases, or the output head one, to take what was learned"
    )

    def describe(self) -> str:
        return (
            f"{self.title}, prefix of {self.prefix_length} in every block from {self.first_block} on, "
            "scales, biases and norms in all"
        )

    def parameter_groups(self, config: FalconConfig) -> list[ParameterGroup]:
        outputs = config.vocab_size + config.num_hidden_layers * sum(
            out for out, _ in linear_shapes(config).values()
        )
        norms = config.num_hidden_layers * norms_per_block(config) + 1
        return [
            *prefix_groups(config, length=self.prefix_length, first_block=self.first_block),
            ParameterGroup(kind="scales", count=outputs),
            ParameterGroup(kind="biases", count=outputs),
            ParameterGroup(kind="norms", count=2 * norms * config.hidden_size, of_base=True),
        ]

    def saved_shapes(self, config: FalconConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor of a saved adapter of a model of `config`."""
        shapes = prefix_shapes(config, length=self.prefix_length, first_block=self.first_block)
        outputs = linear_shapes(config)
        outputs_of = {name: outputs[name.rpartition(".")[2]][0] for name in expected_linears(config)}
        for name, out in {**outputs_of, "lm_head": config.vocab_size}.items():
            shapes |= {f"{name}.{SCALE_AND_BIAS}.{vector}": (out,) for vector in ("scale", "bias")}
        for name, module in empty_model(copy.deepcopy(config), dtype=torch.float32).named_modules():
            if isinstance(module, nn.LayerNorm):
                shapes |= {f"{name}.{vector}": (config.hidden_size,) for vector in ("weight", "bias")}
        return shapes

    def attach(self, model: FalconForCausalLM, *, seed: int = 0) -> FalconForCausalLM:
        # First: the prefix passes through the scaled projection.
        for name in [*expected_linears(model.config), "lm_head"]:
            add_scale_and_bias(model.get_submodule(name))
        add_prefixes(model, length=self.prefix_length, first_block=self.first_block, seed=seed)
        for norm in _norms(model):
            norm.register_buffer(_BASE, torch.stack([norm.weight.data, norm.bias.data]), persistent=False)
            for parameter in (norm.weight, norm.bias):
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        remember(model, self)
        return model.train()

    def save(self, model: FalconForCausalLM, folder: Path) -> None:
        write_adapter(folder, model, self.name, asdict(self))

    def restore(self, model: FalconForCausalLM, folder: Path) -> None:
        restore_adapter(folder, model)

    @contextmanager
    def disabled(self, model: FalconForCausalLM) -> Iterator[None]:
        scales = [module for module in model.modules() if isinstance(module, ScaleAndBias)]
        with switched_off([*prefixes(model), *scales]), ExitStack() as stack:
            for norm in _norms(model):
                stack.enter_context(_base_weights(norm))
            yield


def _norms(model: FalconForCausalLM) -> list[nn.LayerNorm]:
    return [module for module in model.modules() if isinstance(module, nn.LayerNorm)]


@contextmanager
def _base_weights(norm: nn.LayerNorm) -> Iterator[None]:
    trained = norm.weight.data, norm.bias.data
    norm.weight.data, norm.bias.data = getattr(norm, _BASE)
    try:
        yield
    finally:
        norm.weight.data, norm.bias.data = trained
