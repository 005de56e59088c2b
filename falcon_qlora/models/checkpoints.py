"""A model's weights as a stream: read from its folder, or random in a published shape.

Files are read and released one tensor at a time, so memory stays bounded whatever their size.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from falcon_qlora.common.errors import UserError, nearest, one_line
from falcon_qlora.common.untrusted import file_beside, is_count, read_json
from falcon_qlora.models.layouts import PRESETS, layout_of, layout_of_preset, preset_config, read_config
from falcon_qlora.models.layouts.base import Layout
from falcon_qlora.models.prepared import read_prepared
from falcon_qlora.models.schemes import Scheme

if TYPE_CHECKING:
    import torch
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

    from falcon_qlora.models.quantized_files import StoredLinear

RANDOM = "random:"


def read_folder_config(folder: Path, *, source: str | None = None) -> PreTrainedConfig:
    """Read ``config.json`` of a model folder; `source` is what messages call it.

    Raises:
        UserError: if there is none, it is not JSON, or the model is of no known layout.
    """
    return read_config(raw_config(folder), source=source or str(folder / "config.json"))


def raw_config(folder: Path) -> dict[str, Any]:
    """The content of a model folder's ``config.json``.

    Raises:
        UserError: if there is none, or it is not JSON.
    """
    path = folder / "config.json"
    refuse_adapter(folder)
    if not path.exists():
        inside = folder / "adapter"  # of a run that trained every weight
        meant = f"; did you mean {inside}?" if (inside / "config.json").is_file() else ""
        raise UserError(f"{folder} holds no config.json: it is not a model's folder{meant}")
    return read_json(path)


def refuse_adapter(folder: Path) -> None:
    """Refuse a folder that was named as a model but holds an adapter, or the run of one.

    Raises:
        UserError: if it does.
    """
    is_one = any((each / "adapter_config.json").is_file() for each in (folder, folder / "adapter"))
    if is_one and not (folder / "config.json").exists():
        raise UserError(
            f"{folder} holds an adapter, not a model: name it with --adapter, and its base with -m"
        )


@dataclass(frozen=True, kw_only=True)
class RandomCheckpoint:
    """A published shape with random weights, generated on the device one tensor at a time.

    Attributes:
        scheme: None: they are not quantized.
    """

    name: str
    config: PreTrainedConfig
    seed: int
    scheme: Scheme | None = None

    def tensors(
        self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield each parameter of the empty `model` once, by its full name; any device and floating dtype."""
        import torch

        generator = torch.Generator(device).manual_seed(self.seed)
        layout = layout_of(self.config)
        # A list, because the caller replaces parameters during the loop.
        for name, parameter in list(model.named_parameters()):
            if name in layout.tied:
                continue
            leaf = name.rpartition(".")[2]
            if leaf == "bias":
                yield name, torch.zeros(parameter.shape, dtype=dtype, device=device)
            elif leaf == "weight" and parameter.dim() == 1:  # a norm's
                yield name, torch.ones(parameter.shape, dtype=dtype, device=device)
            else:
                weight = torch.empty(parameter.shape, dtype=dtype, device=device)
                yield name, weight.normal_(0.0, self.config.initializer_range, generator=generator)


def check_preset(name: str) -> tuple[str, str]:
    """The preset of ``random:<preset>[?...]``, and the text after the ``?``.

    Raises:
        UserError: if there is no such preset.
    """
    preset, _, query = name.removeprefix(RANDOM).partition("?")
    if preset not in PRESETS:
        raise UserError(
            f"{name}: no preset {preset!r}{nearest(preset, PRESETS)}. There are {', '.join(PRESETS)}"
        )
    return preset, query


def parse_random(name: str, seed: int) -> RandomCheckpoint:
    """Read ``random:<preset>[?key=value,...]``, where a key is one of the configuration's, or ``seed``.

    A seed in the name wins over `seed`. Otherwise a `seed` other than 0 becomes part of the name.

    Raises:
        UserError: if there is no such preset or key.
    """
    preset, query = check_preset(name)
    layout = layout_of_preset(preset)
    overrides = _overrides(name, {*layout.config_class().to_dict(), *layout.presets[preset], "rope_theta"})
    if "seed" in overrides:
        seed = overrides.pop("seed")
    elif seed:
        # An adapter trained on it needs this to find the same base again.
        name = f"{name}{',' if query else '?'}seed={seed}"
    layout.read({"model_type": layout.model_types[0], **layout.presets[preset], **overrides}, name)
    try:
        config = preset_config(preset, **overrides)
    except Exception as error:  # of settings that no file's are read
        raise UserError(f"{name}: {one_line(error)}") from None
    return RandomCheckpoint(name=name, config=config, seed=seed)


def outline_of_random(name: str) -> Any:
    """`Layout.outline` of ``random:<preset>[?...]``, for which no library is loaded.

    Raises:
        UserError: as `parse_random`, and for settings that no published file has.
    """
    preset, _ = check_preset(name)
    layout = layout_of_preset(preset)
    overrides = _overrides(name, {*layout.kept, *layout.presets[preset]})
    raw = {"model_type": layout.model_types[0], **layout.presets[preset], **overrides}
    return layout.outline(raw, name)


def _overrides(name: str, known: set[str]) -> dict[str, Any]:
    """The settings behind the ``?``, each of them `known` or ``seed``."""
    preset, query = check_preset(name)
    overrides = {}
    for item in filter(None, query.split(",")):
        key, separator, text = item.partition("=")
        if not separator or key not in known | {"seed"}:
            family = layout_of_preset(preset).family
            raise UserError(
                f"{name}: {item!r} is not KEY=VALUE of a {family} configuration{nearest(key, known)}"
            )
        try:
            overrides[key] = json.loads(text.lower())
        except json.JSONDecodeError:
            overrides[key] = text
        if key == "seed" and not is_count(overrides[key], least=0, most=2**63 - 1):
            raise UserError(f"{name}: the seed is {text[:40]!r}; expected a whole number of at least 0")
    return overrides


@dataclass(frozen=True)
class FolderCheckpoint:
    """A folder with ``config.json`` and ``.safetensors`` or ``.bin`` files.

    Attributes:
        scheme: how its linears are quantized; None if they are not.
    """

    name: str
    config: PreTrainedConfig
    folder: Path
    scheme: Scheme | None = None

    def tensors(
        self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype
    ) -> Iterator[tuple[str, Tensor | StoredLinear]]:
        """See `RandomCheckpoint.tensors`; a quantized linear comes as it is stored, on the device.

        Raises:
            UserError: if a linear is stored in another way than the scheme's, or a prepared folder's tensor
                is not as it was written.
        """
        from falcon_qlora.models.tensor_files import read_tensor

        layout = layout_of(self.config)
        wanted = set(dict(model.named_parameters())) - layout.tied
        places = _places(self.folder, layout)
        if self.scheme is not None:
            yield from self._quantized_tensors(self.scheme, wanted, places, device)
            return
        for name, (path, stored_name) in places.items():
            if name in wanted:
                yield name, read_tensor(path, stored_name)

    def _quantized_tensors(
        self, scheme: Scheme, wanted: set[str], places: dict[str, tuple[Path, str]], device: torch.device
    ) -> Iterator[tuple[str, Tensor | StoredLinear]]:
        from falcon_qlora.models.quantized_files import Sums, names_beside, read_linear
        from falcon_qlora.models.tensor_files import opened_tensors

        prepared, sums = read_prepared(self.folder), Sums()

        def placed(name: str, tensor: Tensor, *, copy: bool = True) -> Tensor:
            # A copy where nothing else makes one: the tensor is a view into a file.
            tensor = tensor.to(device, copy=copy and device.type == "cpu")
            if prepared is not None:
                sums.add(name, tensor)
            return tensor

        with opened_tensors({path for path, _ in places.values()}) as read:
            for name, (path, stored_name) in places.items():
                if name not in wanted:
                    continue
                tensor = read(path, stored_name)
                if tensor.is_floating_point():
                    yield name, placed(name, tensor, copy=False)
                    continue
                names = [name, *(each for each in names_beside(name, scheme) if each in places)]
                stored = {each: read(*places[each]) for each in names}
                yield name, read_linear(name, scheme, stored, place=placed, source=self.name)
                del tensor, stored
        if prepared is not None:
            sums.check(prepared.sums, self.name)


Checkpoint = RandomCheckpoint | FolderCheckpoint
"""A named model whose tensors can be streamed."""


def parameter_reader(folder: Path, config: PreTrainedConfig) -> Callable[[str], Tensor]:
    """Return a function that reads one of the model's parameters, by name, from the folder's files.

    It raises a `UserError` for a parameter that the files lack.
    """
    from falcon_qlora.models.tensor_files import read_tensor

    places = _places(folder, layout_of(config))

    def read(name: str) -> Tensor:
        if name not in places:
            raise UserError(f"{folder} lacks {name}. Is the copy complete?")
        return read_tensor(*places[name])

    return read


def _places(folder: Path, layout: Layout) -> dict[str, tuple[Path, str]]:
    """Map each parameter to its file and its name there, in the files' order."""
    from falcon_qlora.models.tensor_files import stored_tensors

    names = {path: list(stored_tensors(path)) for path in weight_files(folder)}
    stored = {name for inside in names.values() for name in inside}
    places: dict[str, tuple[Path, str]] = {}
    for path, inside in names.items():
        for name in inside:
            places.setdefault(_parameter_name(name, stored, layout), (path, name))
    return places


def _parameter_name(stored: str, everything: set[str], layout: Layout) -> str:
    """The parameter's name for a stored tensor, which may lack the model's prefix."""
    prefixes = (f"{layout.backbone}.", f"{layout.head}.")
    name = stored if stored.startswith(prefixes) else f"{layout.backbone}.{stored}"
    embedding = f"{layout.backbone}.{layout.embedding}.weight"
    if name in layout.tied and embedding not in everything:
        return embedding  # files may hold either of two tied tensors
    return name


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights: safetensors where there are any, else torch files.

    Raises:
        UserError: if there are none, or an index names a missing one.
    """
    for kind in ("model.safetensors", "pytorch_model.bin"):
        suffix = Path(kind).suffix
        index = folder / f"{kind}.index.json"
        if index.is_file():
            files = sorted(_files_in_index(index))
        else:
            files = sorted(folder.glob(f"{Path(kind).stem}*{suffix}"))
        absent = [path.name for path in files if not path.is_file()]
        if absent:
            raise UserError(
                f"{folder}: {index.name} names {absent[0]}, which is not there. Is the copy complete?"
            )
        if files:
            return files
    raise UserError(f"{folder} holds no weights (model*.safetensors or pytorch_model*.bin)")


def _files_in_index(index: Path) -> set[Path]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index} is not valid: it has no weight_map")
    return {file_beside(index, name) for name in weight_map.values()}
