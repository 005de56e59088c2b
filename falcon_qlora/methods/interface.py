"""What a training method is: one file with one dataclass whose fields are its settings, listed in `table.py`.

A field defines everything about its setting: its flag and help, how the start summary and `inspect` show it,
what the model card and the adapter's record hold, and what a resume compares.

This module and the methods import neither torch nor PEFT before training starts, because `--help` reads them.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.settings import setting as setting_of_any
from falcon_qlora.common.settings import settings_of

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import PreTrainedConfig, PreTrainedModel

_METHOD = "_method"


def setting(default: Any, text: str, *, name: str, label: str, decisive: bool = True, **more: Any) -> Any:
    """A field of a method, see `common.settings.Setting`; `name` is its flag's."""
    return setting_of_any(default, text, name=name, label=label, decisive=decisive, **more)


@dataclass(frozen=True, kw_only=True)
class ParameterGroup:
    """Trainable parameters of one kind.

    Attributes:
        kind: its name for users.
        count: how many numbers, over the whole model.
        of_base: whether they are parameters of the base model rather than added to it.
    """

    kind: str
    count: int
    of_base: bool = False


@dataclass(frozen=True, kw_only=True)
class Method(ABC):
    """A way to train a loaded model.

    A method defines `saved_shapes`, `kinds` and `attach`. The rest suits any method whose parameters are
    saved by their names in the model.

    Attributes:
        name: as `--method` takes it.
        title: its name for readers.
        trains: what is trained, in a few words.
        opened_by: what opens what it saves: ``falcon-qlora`` alone, ``peft``, or ``transformers``.
        is_whole: whether it saves a whole model rather than an adapter; its parameters may then be sharded.
        trains_in_float32: whether the trainable parameters are float32 whatever the base's dtype.
        needs_16bit: why the base must not be quantized, or None if it may.
        why_not_merged: why what was trained cannot become part of the base's own weights, or None if it can.
        kinds: suffix of a saved tensor's name → its kind, as users know it; the first match counts.
        kinds_of_base: those kinds that are parameters of the base model.
        starts_at_zero: name suffixes of its tensors that are zero before training.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    trains: ClassVar[str]
    opened_by: ClassVar[str] = "falcon-qlora"
    is_whole: ClassVar[bool] = False
    trains_in_float32: ClassVar[bool] = True
    needs_16bit: ClassVar[str | None] = None
    why_not_merged: ClassVar[str | None] = "what it trains is no sum that the base's weights could take"
    kinds: ClassVar[dict[str, str]] = {}
    kinds_of_base: ClassVar[tuple[str, ...]] = ()
    starts_at_zero: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def read(cls, values: Mapping[str, Any], where: object, *, by_flag: bool = False) -> Self:
        """The method with these settings, and defaults for the rest.

        Args:
            values: from a file that others may have written, or from the command line.
            where: where they come from, for messages.
            by_flag: whether `values` has them by flag, among other keys; else by field.

        Raises:
            UserError: for an invalid value.
        """
        settings: dict[str, Any] = {}
        for each in settings_of(cls):
            key = each.name if by_flag else each.field
            if key in values:
                value = each.read(values[key], f"{where}: {key}")
                settings[each.field] = tuple(value) if isinstance(value, list) else value
        return cls(**settings)

    @classmethod
    def read_folder(cls, folder: Path, record: dict[str, Any]) -> Self:
        """The method with the settings of an adapter that it saved.

        Args:
            folder: the adapter's.
            record: from `read_record`.

        Raises:
            UserError: if it is not one that is trained here.
        """
        settings, expected = record["settings"], {each.field for each in settings_of(cls)}
        where = folder / "adapter_config.json"
        if not isinstance(settings, dict) or settings.keys() != expected:
            raise UserError(f"{where}: settings must be {', '.join(sorted(expected)) or 'empty'}")
        return cls.read(settings, where)

    def settings(self) -> dict[str, Any]:
        """Its settings as plain values, by field name."""
        return {
            name: list(value) if isinstance(value, tuple) else value for name, value in vars(self).items()
        }

    def flags(self) -> dict[str, Any]:
        """`settings` by flag name."""
        values = self.settings()
        return {each.name: values[each.field] for each in settings_of(type(self))}

    def describe(self) -> str:
        """The method and its settings in one line."""
        told = [each.told(getattr(self, each.field)) for each in settings_of(type(self))]
        return f"{self.title} {', '.join(filter(None, told))}".strip()

    @property
    def short(self) -> str:
        """The method's part of a run folder's name."""
        return self.name

    @property
    def draws(self) -> bool:
        """Whether a step draws random numbers."""
        return False

    @property
    def why_base_stays_whole(self) -> str | None:
        """Why the base's frozen weights must all be on the device, or None if a block at a time is enough."""
        return None

    @property
    def new_token_count(self) -> int:
        """How many tokens it adds to a base's tokenizer."""
        return 0

    def add_tokens(self, tokenizer: Any) -> None:
        """Add the method's new tokens to a tokenizer.

        Raises:
            UserError: if the tokenizer has one already.
        """
        return None

    def for_tokenizer(self, tokenizer: Any) -> Self:
        """The method with the ids of its new tokens, which `attach` needs."""
        return self

    def vocab_size(self, config: PreTrainedConfig) -> int:
        """How many embeddings a base of this configuration has with the method attached."""
        size: int = config.vocab_size
        return size

    def fp8_facts(self) -> dict[str, Any]:
        """Its features that may exclude FP8 products, as arguments of `fp8_excludes`."""
        return {}

    def step_memory(self) -> dict[str, Any]:
        """What predicting a step's memory needs to know of it, as arguments of `step_memory.Step`."""
        return {}

    @abstractmethod
    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        """Name in the file → shape, for every tensor saved for a model of `config`; needs no model.

        Raises:
            UserError: if the settings do not suit the model.
        """

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        """What is trained on a model of this configuration.

        Raises:
            UserError: as `saved_shapes`.
        """
        return self.groups_of(self.saved_shapes(config))

    def groups_of(self, shapes: Mapping[str, tuple[int, ...]]) -> list[ParameterGroup]:
        """These tensors by kind; `shapes` are like those of `saved_shapes`."""
        counts: Counter[str] = Counter()
        for name, shape in shapes.items():
            counts[self.kind(name)] += math.prod(shape)
        return [
            ParameterGroup(kind=kind, count=count, of_base=kind in self.kinds_of_base)
            for kind, count in counts.items()
        ]

    def kind(self, name: str) -> str:
        """The kind of the tensor of this name in the file."""
        return next(kind for end, kind in self.kinds.items() if name.endswith(end))

    @abstractmethod
    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> Any:
        """Make a model from `load_model` trainable; until the first step it computes the same as before.

        Raises:
            UserError: if the method cannot train this model.
        """

    def trained_state(self, model: Any) -> dict[str, Tensor]:
        """The trained tensors as they are now, by their names in the model's `state_dict`."""
        return {name: each.detach() for name, each in model.named_parameters() if each.requires_grad}

    def saved_tensors(self, model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """What is trained of a model, by the names in the file.

        Args:
            model: to which the method is attached.
            state: an earlier result of `trained_state`, or copies of it; None: the current tensors.
        """
        of = model.get_parameter if state is None else state.__getitem__
        return {name: of(name).detach() for name in self.saved_shapes(model.config)}

    def save(self, model: Any, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        """Write what was trained into a folder that describes itself.

        Args:
            folder: an existing one.
            state: see `saved_tensors`.
        """
        from falcon_qlora.methods.adapter_folder import write_adapter

        write_adapter(folder, model, self, state)

    def restore(self, model: Any, folder: Path) -> None:
        """Load what `save` wrote into a model that has the same method attached.

        Raises:
            RuntimeError: if it does not fit.
        """
        from falcon_qlora.methods.adapter_folder import fitting_tensors

        self.put(model, fitting_tensors(folder, self.saved_tensors(model)))

    def put(self, model: Any, tensors: dict[str, Tensor]) -> None:
        """Put tensors like those of `saved_tensors` into a model."""
        for name, tensor in tensors.items():
            model.get_parameter(name).data.copy_(tensor)

    def open(self, base: PreTrainedModel, folder: Path, *, trainable: bool) -> Any:
        """Put a saved and checked adapter on its base.

        Args:
            base: from `load_model`.
            folder: the adapter's.
            trainable: whether to continue training; else for inference.
        """
        model = self.attach(base, seed=0)
        self.restore(model, folder)
        return model if trainable else model.requires_grad_(False).eval()

    def merged_weight(self, weight: Tensor, module: str, folder: Path, config: PreTrainedConfig) -> Tensor:
        """A weight of the base merged with what was learned for it; only for methods that can be merged.

        Args:
            weight: float32 ``[out, in]``; may be changed in place.
            module: the full name of its linear.
            folder: the saved adapter's.
            config: of the base.
        """
        raise AssertionError(f"{self.title} cannot be merged: {self.why_not_merged}")

    def merged_tensor(self, name: str, tensor: Tensor, folder: Path, config: PreTrainedConfig) -> Tensor:
        """A parameter of the base that is no linear's weight, as it is in the merged model.

        Args:
            name: its full name.
            tensor: as the base has it.
            folder, config: as for `merged_weight`.
        """
        return tensor

    def disabled(self, model: Any) -> AbstractContextManager[None]:
        """A context in which the model computes what the base does.

        Raises:
            UserError: if the base's weights are no longer there.
        """
        raise UserError("full fine-tuning cannot be switched off: open the base model instead")


def trainable_count(method: Method, config: PreTrainedConfig) -> int:
    """How many parameters a method trains on a model of this configuration."""
    return sum(group.count for group in method.parameter_groups(config))


def remember(model: nn.Module, method: Method) -> None:
    """Record on a model which method is attached to it."""
    setattr(model, _METHOD, method)


def method_of(model: nn.Module) -> Method:
    """The method that `attach` or `load_adapter` put on a model."""
    method: Method = getattr(model, _METHOD)
    return method


@contextmanager
def switched_off(modules: Iterable[Any]) -> Iterator[None]:
    """A context in which these modules do nothing, by their attribute `enabled`."""
    modules = list(modules)
    for module in modules:
        module.enabled = False
    try:
        yield
    finally:
        for module in modules:
            module.enabled = True
