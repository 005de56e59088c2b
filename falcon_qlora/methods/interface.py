"""What every way to train has in common."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

_METHOD, _NAMES = "_method", "_method_trains"


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Trainable parameters of one kind.

    Attributes:
        kind: as a user knows it.
        count: how many numbers, over the whole model.
        of_base: they are parameters of the base model, not added to it.
    """

    kind: str
    count: int
    of_base: bool = False


class Method(Protocol):
    """A way to train a loaded model; its settings are its fields.

    Attributes:
        name: as `--method` takes it.
        title: as a reader knows it.
        trains_in_float32: whether the trainable parameters are float32 whatever the base.
        why_not_merged: why what was trained cannot become part of the base's own weights, or None if it can.
    """

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def trains_in_float32(self) -> bool: ...

    @property
    def why_not_merged(self) -> str | None: ...

    def describe(self) -> str:
        """The method and its settings in one line."""
        ...

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        """What is trained on a model of this configuration; needs no model.

        Raises:
            UserError: if the settings do not suit the model.
        """
        ...

    def attach(self, model: PreTrainedModel, *, seed: int) -> nn.Module:
        """Make a model from `load_model` trainable: it computes what it did until a step is taken.

        Raises:
            UserError: if the method cannot train this model.
        """
        ...

    def save(self, model: Any, folder: Path) -> None:
        """Write what is trained into a folder that says by itself what it is."""
        ...

    def restore(self, model: Any, folder: Path) -> None:
        """Put what `save` wrote into a model to which the same method is attached.

        Raises:
            RuntimeError: if it does not fit.
        """
        ...

    def disabled(self, model: Any) -> AbstractContextManager[None]:
        """Have the model compute what the base does.

        Raises:
            UserError: if the base's weights are no longer there.
        """
        ...


def trainable_count(method: Method, config: PreTrainedConfig) -> int:
    """How many parameters a method trains on a model of this configuration."""
    return sum(group.count for group in method.parameter_groups(config))


def trainable_names(model: nn.Module) -> list[str]:
    """Names of a model's trainable parameters, in its order."""
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def remember(model: nn.Module, method: Method) -> None:
    """Note on a model, of which now only that is trainable, what was attached to it."""
    setattr(model, _METHOD, method)
    setattr(model, _NAMES, trainable_names(model))


def method_of(model: nn.Module) -> Method:
    """The method that `attach` or `load_adapter` put on a model."""
    method: Method = getattr(model, _METHOD)
    return method


def attached_names(model: nn.Module) -> list[str]:
    """Names of the parameters that a model's method trains, also where they are frozen now."""
    names: list[str] = getattr(model, _NAMES)
    return names
