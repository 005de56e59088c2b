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
from transformers import PreTrainedConfig, PreTrainedModel

from falcon_qlora.methods.adapter import add_prefixes, prefix_groups, prefix_shapes, switched_off
from falcon_qlora.methods.folder import restore_adapter, write_adapter
from falcon_qlora.methods.interface import ParameterGroup, remember
from falcon_qlora.models.layouts import layout_of
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
        "attention reads the learned prefix in a softmax of its own, which no weights of the model express; "
        "nor have its linears biases, or the output head one, to take what was learned"
    )

    def describe(self) -> str:
        return (
            f"{self.title}, prefix of {self.prefix_length} in every block from {self.first_block} on, "
            "scales, biases and norms in all"
        )

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        layout = layout_of(config)
        outputs = config.vocab_size + config.num_hidden_layers * layout.outputs_per_block()
        return [
            *prefix_groups(config, length=self.prefix_length, first_block=self.first_block),
            ParameterGroup(kind="scales", count=outputs),
            ParameterGroup(kind="biases", count=outputs),
            ParameterGroup(kind="norms", count=layout.norm_parameter_count(), of_base=True),
        ]

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, of every tensor of a saved adapter of a model of `config`."""
        shapes = prefix_shapes(config, length=self.prefix_length, first_block=self.first_block)
        layout = layout_of(config)
        outputs = layout.linear_shapes()
        outputs_of = {name: outputs[name.rpartition(".")[2]][0] for name in layout.expected_linears()}
        for name, out in {**outputs_of, layout.head: config.vocab_size}.items():
            shapes |= {f"{name}.{SCALE_AND_BIAS}.{vector}": (out,) for vector in ("scale", "bias")}
        for name, module in empty_model(copy.deepcopy(config), dtype=torch.float32).named_modules():
            if isinstance(module, layout.norm_class):
                shapes |= {
                    f"{name}.{vector}": (config.hidden_size,) for vector, _ in module.named_parameters()
                }
        return shapes

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
        # First: the prefix passes through the scaled projection.
        layout = layout_of(model.config)
        for name in [*layout.expected_linears(), layout.head]:
            add_scale_and_bias(model.get_submodule(name))
        add_prefixes(model, length=self.prefix_length, first_block=self.first_block, seed=seed)
        for norm in _norms(model):
            vectors = list(norm.parameters())
            norm.register_buffer(_BASE, torch.stack([each.data for each in vectors]), persistent=False)
            for parameter in vectors:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        remember(model, self)
        return model.train()

    def save(self, model: PreTrainedModel, folder: Path) -> None:
        write_adapter(folder, model, self.name, asdict(self))

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        restore_adapter(folder, model)

    @contextmanager
    def disabled(self, model: PreTrainedModel) -> Iterator[None]:
        scales = [module for module in model.modules() if isinstance(module, ScaleAndBias)]
        with switched_off([*prefixes(model), *scales]), ExitStack() as stack:
            for norm in _norms(model):
                stack.enter_context(_base_weights(norm))
            yield


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    kind = layout_of(model.config).norm_class
    return [module for module in model.modules() if isinstance(module, kind)]


@contextmanager
def _base_weights(norm: nn.Module) -> Iterator[None]:
    vectors = list(norm.parameters())
    trained = [each.data for each in vectors]
    for vector, base in zip(vectors, getattr(norm, _BASE), strict=True):
        vector.data = base
    try:
        yield
    finally:
        for vector, data in zip(vectors, trained, strict=True):
            vector.data = data
