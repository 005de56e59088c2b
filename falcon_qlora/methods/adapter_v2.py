"""Adapter v2: Adapter's prefixes, a scale and a bias on every linear, the output head's too, and the norms.

The definitions are in models/prefix.py and models/scaled.py.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from falcon_qlora.methods.adapter import Adapter
from falcon_qlora.methods.interface import ParameterGroup, remember, switched_off

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

_BASE = "_weights_of_the_base"


@dataclass(frozen=True, kw_only=True)
class AdapterV2(Adapter):
    """Train prefixes and gates, scales and biases of all linears, and the norms."""

    name: ClassVar[str] = "adapter_v2"
    title: ClassVar[str] = "Adapter v2"
    trains: ClassVar[str] = "a learned prefix in attention, scales and biases of the linears, and norms"
    why_not_merged: ClassVar[str | None] = (
        "attention reads the learned prefix in a softmax of its own, which no weights of the model express; "
        "nor have its linears biases, or the output head one, to take what was learned"
    )
    kinds: ClassVar[dict[str, str]] = {
        **Adapter.kinds,
        ".scale": "scales",
        ".scale_and_bias.bias": "biases",
        "": "norms",
    }
    kinds_of_base: ClassVar[tuple[str, ...]] = ("norms",)
    starts_at_zero: ClassVar[tuple[str, ...]] = (".gate", ".scale_and_bias.bias")

    def step_memory(self) -> dict[str, Any]:
        return {"scaled": True}

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        from falcon_qlora.models.layouts import layout_of

        layout = layout_of(config)
        outputs = config.num_hidden_layers * layout.outputs_per_block() + config.vocab_size
        counts = {"scales": outputs, "biases": outputs, "norms": layout.base_parameter_kinds()["norms"]}
        return self.groups_of(super().saved_shapes(config)) + [
            ParameterGroup(kind=kind, count=count, of_base=kind in self.kinds_of_base)
            for kind, count in counts.items()
        ]

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        import torch

        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.load import empty_model
        from falcon_qlora.models.scaled import SCALE_AND_BIAS

        layout, shapes = layout_of(config), super().saved_shapes(config)
        linears = layout.linear_shapes()
        outputs_of = {name: linears[name.rpartition(".")[2]][0] for name in layout.expected_linears()}
        for name, out in {**outputs_of, layout.head: config.vocab_size}.items():
            shapes |= {f"{name}.{SCALE_AND_BIAS}.{vector}": (out,) for vector in ("scale", "bias")}
        for name, module in empty_model(copy.deepcopy(config), dtype=torch.float32).named_modules():
            if isinstance(module, layout.norm_class):
                shapes |= {f"{name}.{each}": (config.hidden_size,) for each, _ in module.named_parameters()}
        return shapes

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
        import torch

        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.scaled import add_scale_and_bias

        # Before the prefixes, which pass through the scaled projection.
        layout = layout_of(model.config)
        for name in [*layout.expected_linears(), layout.head]:
            add_scale_and_bias(model.get_submodule(name))
        self.add_prefixes(model, seed)
        for norm in _norms(model):
            vectors = list(norm.parameters())
            norm.register_buffer(_BASE, torch.stack([each.data for each in vectors]), persistent=False)
            for parameter in vectors:
                parameter.data = parameter.data.float()
                parameter.requires_grad_(True)
        remember(model, self)
        return model.train()

    @contextmanager
    def disabled(self, model: PreTrainedModel) -> Iterator[None]:
        from falcon_qlora.models.scaled import ScaleAndBias

        scales = [module for module in model.modules() if isinstance(module, ScaleAndBias)]
        bases = [
            (each, base)
            for norm in _norms(model)
            for each, base in zip(norm.parameters(), getattr(norm, _BASE), strict=True)
        ]
        trained = [(vector, vector.data) for vector, _ in bases]
        with super().disabled(model), switched_off(scales):
            try:
                for vector, base in bases:
                    vector.data = base
                yield
            finally:
                for vector, data in trained:
                    vector.data = data


def _norms(model: PreTrainedModel) -> list[nn.Module]:
    from falcon_qlora.models.layouts import layout_of

    kind = layout_of(model.config).norm_class
    return [module for module in model.modules() if isinstance(module, kind)]
