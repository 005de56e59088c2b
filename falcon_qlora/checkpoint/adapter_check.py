"""Checks that a saved adapter is complete, trained, and equal to the one in memory."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
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
from falcon_qlora.methods.adapter_folder import CONFIG, TENSORS, read_adapter
from falcon_qlora.methods.interface import method_of
from falcon_qlora.methods.lora import Lora
from falcon_qlora.methods.lora_layers import past_pefts_refusal
from falcon_qlora.models.checkpoints import parameter_reader, read_folder_config
from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.models.load import empty_model
from falcon_qlora.models.packed_attention import Sequences
from falcon_qlora.models.sharded import local_tensor, own_parts
from falcon_qlora.models.tensor_files import stored_tensors
from falcon_qlora.models.token_rows import rows_of
from falcon_qlora.models.undrawn import Undrawn
from falcon_qlora.processes import devices
from falcon_qlora.processes.cores import on_one_core
from falcon_qlora.terminal.console import note

_DEFAULT, _PROBE = "default", "probe"
_PROBE_LENGTHS = (24, 40)
WHOLE = "what is saved is a whole model"


class AdapterFaultError(RuntimeError):
    """A saved adapter is damaged or wrong; the message names the fault."""


@dataclass(frozen=True)
class Reopened:
    """What a saved adapter, opened again on the run's own base, computes beside the one in memory.

    Attributes:
        by: what opened it: ``plain PEFT`` or ``falcon-qlora``.
        logits: how many were compared, over two short documents of made-up tokens.
        difference: the largest between two of them.
        why_not: why none were, or None.
    """

    by: str
    logits: int = 0
    difference: float = 0.0
    why_not: str | None = None


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


def check_opening(folder: Path, model: nn.Module) -> Reopened:
    """Check that a saved adapter opens, and computes what the model does on a few made-up tokens.

    A LoRA is opened by PEFT, beside the one in memory: LoRA's scale is in no tensor, so only the adapter's
    output shows a wrong one. Another adapter is read by our loader into the model, whose own is taken out
    meanwhile. The model and the random generators are left as they were, except that packing is enabled.

    Raises:
        AdapterFaultError: if it does not open, or gives another loss.
    """
    method = method_of(model)
    if method.is_whole:
        return Reopened("falcon-qlora", why_not=WHOLE)
    by_peft = isinstance(method, Lora) and not method.refused_by_peft
    by = "plain PEFT" if by_peft else "falcon-qlora"
    enable_packing(model)
    probe, device = _made_up(model), causal_lm_in(model).device
    open_again = _opened_by_peft if isinstance(model, PeftModel) else _read_into
    try:
        with _left_as_it_was(model, device), torch.no_grad():
            batch = probe.to(device)
            expected = _logits(model, batch)
            with open_again(folder, model):
                found = _logits(model, batch)
            difference = float((found - expected).abs().nan_to_num(nan=0.0).max())
            losses = [
                float(F.cross_entropy(each, batch.targets, reduction="sum")) for each in (found, expected)
            ]
    except torch.OutOfMemoryError:
        note(f"{folder}: out of memory while the adapter was opened again: its loss was not compared")
        return Reopened(by, why_not="out of memory")
    mean = [each / len(probe.targets) for each in losses]
    # The model's quality is not checked here: a NaN loss is fine if both have it.
    if not (math.isclose(*losses, rel_tol=1e-5) or all(map(math.isnan, losses))):
        raise AdapterFaultError(
            f"{folder}, opened again, has loss {mean[0]:.6g} on a probe, the model in memory {mean[1]:.6g}"
        )
    return Reopened(by, logits=found.numel(), difference=difference)


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
    with on_one_core():
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
    in_memory = method_of(model).saved_tensors(model, state)

    def compare(name: str, values: Tensor) -> None:
        if name not in in_memory:
            raise AdapterFaultError(f"{saved.file} has {name}, which the model in memory has not")
        _compare(saved.file, name, values, in_memory[name])

    config: Any = model.config
    zero = saved.check(config, compare)
    for name in sorted(in_memory.keys() - saved.method.saved_shapes(config).keys()):
        raise AdapterFaultError(f"{saved.file} lacks {name}, which the model in memory has")
    # PEFT's file records less than the method; check_opening tries out what it does record.
    if saved.method.opened_by != "peft" and saved.method != method_of(model):
        raise AdapterFaultError(
            f"{folder} is of {saved.method.describe()}; the model in memory is of "
            f"{method_of(model).describe()}"
        )
    if trained is False:
        return
    if trained is None:
        moved = {_kind(name) for name in saved.method.saved_shapes(config).keys() - set(zero)}
        zero = [name for name in zero if _kind(name) in moved]
    if zero:
        raise AdapterFaultError(
            f"{folder}: {zero[0]} is still all zeros after training ({len(zero)} such tensors)"
        )


def _kind(name: str) -> str:
    return ".".join(name.split(".")[-2:])


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


def _logits(model: nn.Module, batch: MicroBatch) -> Tensor:
    """Float32 ``[N, V]``, at the targets of `batch`."""
    sequences = Sequences(
        cu_seqlens=batch.cu_seqlens,
        position_ids=batch.position_ids,
        lengths=batch.lengths,
        max_length=max(batch.lengths),
    )
    logits: Tensor = model.eval()(input_ids=batch.input_ids, sequences=sequences).logits
    return logits[0].index_select(0, batch.target_positions).float()


@contextlib.contextmanager
def _opened_by_peft(folder: Path, model: Any) -> Iterator[None]:
    """A context in which the folder's adapter, loaded beside the model's, is the active one."""
    base = causal_lm_in(model)
    method: Any = method_of(model)
    refused = past_pefts_refusal(base) if method.refused_by_peft else contextlib.nullcontext()
    active = model.active_adapter
    try:
        try:
            # Not with low_cpu_mem_usage: PEFT would round the adapter to the base's dtype.
            with refused, base.device, Undrawn():  # made where it lies: moving each there takes longer
                model.load_adapter(str(folder), _PROBE, torch_device=str(base.device))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # whatever PEFT raises: the adapter does not open
            raise AdapterFaultError(f"{folder} cannot be opened again: {error}") from error
        model.set_adapter(_PROBE)
        yield
    finally:
        model.set_adapter(active)
        if _PROBE in model.peft_config:
            model.delete_adapter(_PROBE)


@contextlib.contextmanager
def _read_into(folder: Path, model: nn.Module) -> Iterator[None]:
    """A context in which the model has the folder's tensors; its own are NaN first, so that none is left."""
    method = method_of(model)
    own = {name: tensor.clone() for name, tensor in method.saved_tensors(model).items()}
    try:
        for tensor in method.saved_tensors(model).values():
            tensor.fill_(math.nan)
        try:
            method.restore(model, folder)
        except RuntimeError as error:
            raise AdapterFaultError(f"{folder} cannot be opened again: {error}") from error
        yield
    finally:
        method.put(model, own)


@contextlib.contextmanager
def _left_as_it_was(model: nn.Module, device: torch.device) -> Iterator[None]:
    """Undo at the end what opening an adapter changes in the model, random generators included."""
    training: dict[nn.Module, bool] = {module: module.training for module in model.modules()}
    trainable = {parameter: parameter.requires_grad for parameter in model.parameters()}
    try:
        with devices.draws_undone(device):
            yield
    finally:
        for parameter, needed in trainable.items():
            parameter.requires_grad_(needed)
        for module, was_training in training.items():
            module.training = was_training


def _made_up(model: Any) -> MicroBatch:
    """Two short documents of random tokens; the first ends with tokens whose embedding rows are trained."""
    vocabulary = model.config.vocab_size
    generator = np.random.default_rng(0)
    documents = [generator.integers(0, vocabulary, length) for length in _PROBE_LENGTHS]
    rows = rows_of(causal_lm_in(model).get_input_embeddings())
    if rows is not None:
        own = rows.ids[: _PROBE_LENGTHS[0]]
        documents[0][-len(own) :] = own
    return collate(documents, [np.ones(length, dtype=np.int8) for length in _PROBE_LENGTHS])
