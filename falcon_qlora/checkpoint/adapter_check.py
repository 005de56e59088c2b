"""Checks that a saved adapter is complete, trained, and equal to the one in memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import (
    PeftConfig,
    PeftModel,
    PeftModelForCausalLM,
    load_peft_weights,
    set_peft_model_state_dict,
)
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedConfig

from falcon_qlora.common.errors import UserError
from falcon_qlora.data.packing import MicroBatch, collate
from falcon_qlora.methods.adapter_folder import CONFIG, TENSORS, SavedAdapter, read_adapter
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.lora_layers import past_pefts_refusal
from falcon_qlora.models.checkpoints import parameter_reader, read_folder_config
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.sharded import local_tensor, own_parts
from falcon_qlora.models.tensor_files import read_tensor, stored_tensors
from falcon_qlora.models.token_rows import rows_of
from falcon_qlora.models.undrawn import Undrawn
from falcon_qlora.processes import devices
from falcon_qlora.step.loss import sum_of_losses
from falcon_qlora.terminal.console import note

_DEFAULT, _PROBE = "default", "probe"
_PROBE_LENGTHS = (24, 40)


class AdapterFaultError(RuntimeError):
    """A saved adapter is damaged or wrong; the message names the fault."""


def check_tensors(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None = None, *, trained: bool | None = None
) -> None:
    """Check that a folder holds what was in memory when it was saved.

    All expected tensors must be there, with the right shapes, finite and equal to those in memory. If
    `trained`, none of an adapter's may be all zeros. The settings must be those of the model's method.

    Args:
        folder: written by the model's method.
        model: with a method attached.
        state: what was saved, see `Method.saved_tensors`; None: what the model holds.
        trained: whether an optimizer step with a learning rate above zero has been done; None if not known.
            Then a tensor of zeros counts as lost only if others of its kind are not zero.

    Raises:
        AdapterFaultError: naming the first thing that is wrong.
    """
    try:
        if method_of(model).is_whole:
            _check_whole(folder, model, state)
        else:
            _check_tensors(folder, model, state, trained=trained)
    except UserError as error:
        raise AdapterFaultError(str(error).rstrip(".")) from None


def check_opening(folder: Path, model: nn.Module) -> None:
    """Check that PEFT opens a saved LoRA, and that its loss on a few made-up tokens is the model's own.

    LoRA's scale is in no tensor: only the adapter's output shows a wrong one. The model and the random
    generators are left as they were, except that packing is enabled. `check_tensors` compares the settings of
    other methods.

    Raises:
        AdapterFaultError: if it does not open, or gives another loss.
    """
    if isinstance(model, PeftModel):
        _check_loss(folder, model)


def check_reading(folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None = None) -> None:
    """Check that PEFT reads a saved LoRA on a base without weights: the same tensors, layers and scales.

    Neither the model nor a random generator is touched, so a thread may do it while the model trains.

    Args:
        folder: written by the model's method.
        model: with a LoRA that PEFT opens attached.
        state: what was saved, see `Method.saved_tensors`; None: what the model holds.

    Raises:
        AdapterFaultError: if it does not open, or is another adapter.
    """
    method = method_of(model)
    try:
        opened = _read_by_peft(folder, causal_lm_in(model).config)
    except Exception as error:  # whatever PEFT raises: the adapter does not open
        raise AdapterFaultError(f"{folder} cannot be opened again: {error}") from error
    found = method.saved_tensors(opened)
    for name, tensor in method.saved_tensors(model, state).items():
        if name not in found:
            raise AdapterFaultError(f"{folder}, opened again, lacks {name}")
        _compare(folder, name, found[name], tensor)
    mine, theirs = _scales(model), _scales(opened)
    for name in sorted(mine.keys() | theirs.keys()):
        if mine.get(name) != theirs.get(name):
            raise AdapterFaultError(
                f"{folder}, opened again, scales {name} by {theirs.get(name)}, the model in memory by "
                f"{mine.get(name)}"
            )


def _read_by_peft(folder: Path, config: PreTrainedConfig) -> PeftModel:
    """The folder's adapter on a base of this configuration that has shapes and no weights."""
    with torch.device("meta"), Undrawn():
        base = empty_model(copy.deepcopy(config), dtype=torch.float32)
        weights = [(module, name) for module in base.modules() for name in module._parameters]
        settings = PeftConfig.from_pretrained(str(folder))
        settings.inference_mode = True
        with past_pefts_refusal(base):
            opened = PeftModelForCausalLM(base, settings)
    for module, name in weights:  # PEFT puts what it reads where the base's weight is
        if isinstance(weight := getattr(module, name), Tensor):
            held = torch.zeros(()).expand(weight.shape)
            setattr(module, name, nn.Parameter(held, requires_grad=False))
    for module in opened.modules():  # trained rows of an embedding have their first values beside them
        for name, buffer in module._buffers.items():
            if buffer is not None and buffer.is_meta:
                module._buffers[name] = torch.zeros_like(buffer, device="cpu")
    tensors = load_peft_weights(str(folder), device="cpu")
    result = set_peft_model_state_dict(opened, tensors, low_cpu_mem_usage=True)
    if result.unexpected_keys:
        raise ValueError(f"it has {result.unexpected_keys[0]}, which has no place")
    return opened


def _scales(model: nn.Module) -> dict[str, str]:
    """Each adapted linear's factor of B·A, and whether it is a DoRA."""
    return {
        name: f"{module.scaling[_DEFAULT]:.9g}" + (" with DoRA" if module.use_dora[_DEFAULT] else "")
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


def form_of(folder: Path) -> str:
    """All that decides how PEFT opens a LoRA, except its numbers: configuration, names, shapes and dtypes.

    What `check_reading` finds for one folder holds for any other of the same form whose tensors are right.
    """
    stored = stored_tensors(folder / TENSORS)
    shapes = {name: [tensor.dtype, *tensor.shape] for name, tensor in sorted(stored.items())}
    return f"{(folder / CONFIG).read_text(encoding='utf-8')}{shapes}"


def _check_tensors(
    folder: Path, model: nn.Module, state: Mapping[str, Tensor] | None, *, trained: bool | None
) -> None:
    saved = read_adapter(folder)
    config: Any = model.config
    with ThreadPoolExecutor(2) as beside:  # each reads all tensors
        equal = beside.submit(_check_equal, saved, model, state)
        zeros = beside.submit(saved.zero_tensors, config)
        saved.check(config)
        equal.result()
    # PEFT's file records less than the method; _check_loss tries out what it does record.
    if saved.method.opened_by != "peft" and saved.method != method_of(model):
        raise AdapterFaultError(
            f"{folder} is of {saved.method.describe()}; the model in memory is of "
            f"{method_of(model).describe()}"
        )
    zero = [] if trained is False else zeros.result()
    if trained is None:
        moved = {_kind(name) for name in saved.method.saved_shapes(config).keys() - set(zero)}
        zero = [name for name in zero if _kind(name) in moved]
    if zero:
        raise AdapterFaultError(
            f"{folder}: {zero[0]} is still all zeros after training ({len(zero)} such tensors)"
        )


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])


def _check_equal(saved: SavedAdapter, model: nn.Module, state: Mapping[str, Tensor] | None) -> None:
    file = saved.folder / TENSORS
    in_memory = method_of(model).saved_tensors(model, state)
    config: Any = model.config
    expected = saved.method.saved_shapes(config)
    for name, tensor in in_memory.items():
        if name not in expected:
            raise AdapterFaultError(f"{file} lacks {name}, which the model in memory has")
        _compare(file, name, read_tensor(file, name), tensor)
    for name in expected:
        if name not in in_memory:
            raise AdapterFaultError(f"{file} has {name}, which the model in memory has not")


def _check_whole(folder: Path, model: Any, state: Mapping[str, Tensor] | None) -> None:
    read = parameter_reader(folder, read_folder_config(folder))
    for name, parameter in model.named_parameters() if state is None else state.items():
        stored = read(name).to(local_tensor(parameter).device)  # comparing is faster there
        if not torch.isfinite(stored).all():
            raise AdapterFaultError(f"{folder}: {name} holds numbers that are not finite")
        mine, expected = own_parts(parameter, stored)  # of a sharded model: its parts go out one by one
        _compare(folder, name, expected, mine)


def _compare(place: Path, name: str, stored: Tensor, in_memory: Tensor) -> None:
    if stored.dtype != in_memory.dtype or not torch.equal(stored.to(in_memory.device), in_memory.detach()):
        raise AdapterFaultError(f"{place}: {name} is not what the model in memory has")


def _check_loss(folder: Path, peft_model: PeftModel) -> None:
    enable_packing(peft_model)
    probe = _made_up(peft_model)
    device = causal_lm_in(peft_model).device
    try:
        with _left_as_it_was(peft_model, device), torch.no_grad():
            found, expected = _losses(folder, peft_model, probe.to(device), device)
    except torch.OutOfMemoryError:
        note(f"{folder}: out of memory while the adapter was opened again: its loss was not compared")
        return
    # The model's quality is not checked here: a NaN loss is fine if both have it.
    if not (math.isclose(found, expected, rel_tol=1e-5) or (math.isnan(found) and math.isnan(expected))):
        raise AdapterFaultError(
            f"{folder}, opened again, has loss {found / len(probe.targets):.6g} on a probe, the model in "
            f"memory {expected / len(probe.targets):.6g}"
        )


def _losses(
    folder: Path, peft_model: PeftModel, batch: MicroBatch, device: torch.device
) -> tuple[float, float]:
    """The loss of the folder's adapter, loaded beside the model's, and the model's own."""
    expected = sum_of_losses(peft_model.eval(), batch).item()
    try:
        # Not with low_cpu_mem_usage: PEFT would round the adapter to the base's dtype.
        with past_pefts_refusal(causal_lm_in(peft_model)), Undrawn():
            peft_model.load_adapter(str(folder), _PROBE, torch_device=str(device))
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever PEFT raises: the adapter does not open
        raise AdapterFaultError(f"{folder} cannot be opened again: {error}") from error
    peft_model.set_adapter(_PROBE)
    return sum_of_losses(peft_model.eval(), batch).item(), expected


@contextlib.contextmanager
def _left_as_it_was(peft_model: PeftModel, device: torch.device) -> Iterator[None]:
    """Remove the probe adapter at the end and undo what adding it changed, random generators included."""
    training: dict[nn.Module, bool] = {module: module.training for module in peft_model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in peft_model.parameters()}
    active = peft_model.active_adapter
    try:
        with devices.draws_undone(device):
            yield
    finally:
        peft_model.set_adapter(active)
        if _PROBE in peft_model.peft_config:
            peft_model.delete_adapter(_PROBE)
        for parameter, needed in trainable.items():
            parameter.requires_grad_(needed)
        for module, was_training in training.items():
            module.training = was_training


def _made_up(peft_model: Any) -> MicroBatch:
    """Two short documents of random tokens; the first ends with tokens whose embedding rows are trained."""
    vocabulary = peft_model.config.vocab_size
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocabulary, length) for length in _PROBE_LENGTHS]
    rows = rows_of(causal_lm_in(peft_model).get_input_embeddings())
    if rows is not None:
        own = rows.ids[: _PROBE_LENGTHS[0]]
        documents[0][-len(own) :] = own
    return collate(documents, [np.ones(length, dtype=np.int8) for length in _PROBE_LENGTHS])
