"""Load a model with every linear of every block quantized, or raise.

The model is built on the meta device. Its tensors then come one at a time, from files or a random generator,
move to the device and are quantized there. So the CPU never holds more than a few tensors, whatever the
model's size and however many processes load it. The device never holds more than one unquantized weight
beyond the model.

A quantized checkpoint's weights are read as they are stored, and mapped straight from the file cache to the
device.

Transformers' own loader is not used: it quantizes only modules that are exactly ``nn.Linear``, and Falcon's
are a subclass. It would leave every block unquantized, and its only warning is about something else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedConfig, PreTrainedModel

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.checkpoints import Checkpoint, RandomCheckpoint
from falcon_qlora.models.fingerprint import changed_files, content_hash
from falcon_qlora.models.host_base import HostCopy
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.locate import open_checkpoint
from falcon_qlora.models.prepared import changed_since, read_prepared
from falcon_qlora.models.quantize import (
    NF4_BLOCK,
    QuantizeMode,
    empty_quantized_linear,
    fill_quantized_weight,
    holds_quantized_weight,
    is_quantized_linear,
    quantize_mode_of,
)
from falcon_qlora.models.quantized_files import StoredLinear
from falcon_qlora.models.sharded_base import Parts
from falcon_qlora.models.sizes import check_fits, check_host
from falcon_qlora.models.streamed_base import StreamedBase
from falcon_qlora.models.undrawn import Undrawn
from falcon_qlora.processes import devices, ranks
from falcon_qlora.terminal.console import note


def load_model(
    model_name_or_path: str,
    *,
    quantize_mode: QuantizeMode | None = None,
    device: torch.device | str | None = None,
    compute_dtype: torch.dtype | str = "auto",
    double_quantization: bool | None = None,
    norms_in_float32: bool = False,
    llm_int8_threshold: float = 6.0,
    revision: str | None = None,
    seed: int = 0,
    share_out: bool = False,
    offload: bool = False,
    ways: Sequence[str] = (),
) -> PreTrainedModel:
    """Load a model onto one device: frozen, in evaluation mode, the linears of its blocks quantized.

    Args:
        model_name_or_path: ``tiny`` (packaged), ``random:<preset>`` (a published shape with random weights,
            single values replaced as in ``random:falcon-7b?num_hidden_layers=2,seed=1``), a local folder, or
            a hub id, which is downloaded where it is not in the cache. A checkpoint that bitsandbytes has
            quantized is read as it is stored.
        quantize_mode: ``4bit`` (NF4), ``8bit`` (LLM.int8()) or ``16bit`` (not quantized, in the compute
            dtype); None: as the checkpoint is stored, or ``4bit`` if it is not quantized.
        device: where to load it; None: this process's own GPU, or the CPU.
        compute_dtype: a dtype, ``bf16``, ``fp16``, ``fp32``, or ``auto``: bfloat16 where the GPU has it,
            float16 on other GPUs, float32 on the CPU; ``fp8`` is ``bf16`` until `apply_fast_path` is asked
            for more.
        double_quantization: quantize NF4's scales too; None: as the checkpoint is stored, else True.
        norms_in_float32: keep the layer norms' weights and arithmetic in float32.
        llm_int8_threshold: with ``8bit``, activations above it are multiplied in 16 bits; 0 turns that off.
        revision: of a hub model.
        seed: of random weights.
        share_out: of the blocks' linears keep only this process's part, see `sharded_base`; all processes
            load the model then.
        offload: keep the blocks' linears in CPU memory, see `host_base`; not with `share_out`.
        ways: flags with which less would be on the device, for the message where it does not fit.

    Raises:
        UserError: if the model cannot be found, is of no known layout, does not fit the device or, with
            `offload`, CPU memory; the mode cannot run here; or a quantized checkpoint is stored otherwise or
            was changed since it was prepared.
        RuntimeError: if a linear that should be quantized is not, or one that should not be is.
    """
    device = devices.resolve(device)
    dtype = devices.compute_dtype(compute_dtype, device)
    check_mode_runs_on(quantize_mode or "4bit", dtype, device)
    checkpoint = open_checkpoint(model_name_or_path, revision=revision, seed=seed)
    check_unchanged(checkpoint)
    scheme = checkpoint.scheme
    if scheme is not None:
        scheme.refuse_others(model_name_or_path, quantize_mode, double_quantization)
        quantize_mode, double_quantization = scheme.mode, scheme.double_quantization
        check_mode_runs_on(quantize_mode, dtype, device)
    quantize_mode = quantize_mode or "4bit"
    double_quantization = double_quantization is not False
    check_shapes_quantize_on(checkpoint.config, quantize_mode, device)
    if device.type == "cuda":
        check_fits(
            checkpoint.config,
            quantize_mode,
            trainable=0,
            free_bytes=free_bytes(device),
            double_quantization=double_quantization,
            processes=ranks.world_size() if share_out else 1,
            offloaded=offload,
            ways=ways,
            fixed=scheme is not None,
        )
    if offload:
        check_host(
            checkpoint.config,
            quantize_mode,
            double_quantization=double_quantization,
            compute_bytes=dtype.itemsize,
            fixed=scheme is not None,
        )
    model = empty_model(
        checkpoint.config,
        quantize_mode=quantize_mode,
        dtype=dtype,
        double_quantization=double_quantization,
        norms_in_float32=norms_in_float32,
        llm_int8_threshold=llm_int8_threshold,
    )
    streamed = None
    if share_out or offload:
        assert not (share_out and offload)
        streamed = StreamedBase(model, device, dtype, Parts if share_out else HostCopy)
    tensors = checkpoint.tensors(model, device, dtype)
    left = _fill(model, tensors, device, dtype, source=checkpoint.name, streamed=streamed)
    if scheme is not None and left and ranks.is_main_process():
        every = len(layout_of(checkpoint.config).expected_linears())
        note(
            f"{checkpoint.name} leaves {len(left)} of {every} linears in 16 bits, {left[0]} first: they are "
            f"quantized here, as the others are"
        )
    _finish(model, checkpoint.name, device)
    if streamed is not None:
        streamed.finish()
    model.config._commit_hash = revision  # where Transformers used to keep it; it is written to no file
    verify_quantized(model, quantize_mode)
    return model


def free_bytes(device: torch.device) -> int:
    """GPU memory that is free for this process, including what PyTorch keeps cached."""
    cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + cached


def verify_quantized(model: nn.Module, quantize_mode: QuantizeMode) -> None:
    """Check that exactly the blocks' linears are stored as `quantize_mode` says.

    Raises:
        RuntimeError: naming the first layer that is not as it should be.
    """
    modules = dict(model.named_modules())
    expected = set() if quantize_mode == "16bit" else set(layout_of(model.config).expected_linears())
    for name in sorted(expected - modules.keys()):
        raise RuntimeError(f"{name} should be quantized and is not there")
    for name, module in modules.items():
        if name in expected:
            if not holds_quantized_weight(module, quantize_mode):
                raise RuntimeError(
                    f"{name} was left unquantized: {type(module).__name__}, {module.weight.dtype}"
                )
        elif is_quantized_linear(module):
            raise RuntimeError(f"{name} is quantized and should not be")


def check_mode_runs_on(mode: str, dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a quantization or a compute dtype that `device` does not support.

    Raises:
        UserError: naming what to use instead.
    """
    if mode not in ("4bit", "8bit", "16bit"):
        raise UserError(f"quantize_mode {mode!r} is none of 4bit, 8bit, 16bit")
    if device.type != "cuda":
        return
    devices.check_served(device)
    capability = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    if mode == "8bit" and capability < (7, 5):
        raise UserError(
            f"8bit needs a GPU of compute capability 7.5 or later; {name} has "
            f"{capability[0]}.{capability[1]}. Use --quantize_mode 4bit"
        )
    if dtype == torch.bfloat16 and not devices.has_bfloat16(device):
        raise UserError(f"{name} has no bfloat16. Use --compute_dtype auto or fp16")


def check_shapes_quantize_on(config: PreTrainedConfig, mode: QuantizeMode, device: torch.device) -> None:
    """Refuse linears of a shape that the mode does not compute on the device.

    Raises:
        UserError: naming one.
    """
    # bitsandbytes' CPU kernel reads blocks as if each row of a weight began a new one. Every published Falcon
    # has rows of whole blocks.
    if mode != "4bit" or device.type != "cpu":
        return
    for name, (_, into) in layout_of(config).linear_shapes().items():
        if into % NF4_BLOCK:
            raise UserError(
                f"4bit on the CPU needs linears whose inputs are a multiple of {NF4_BLOCK}; {name} has "
                f"{into}. Use --quantize_mode 8bit or 16bit, or a GPU"
            )


def empty_model(
    config: PreTrainedConfig,
    *,
    dtype: torch.dtype,
    quantize_mode: QuantizeMode = "16bit",
    double_quantization: bool = True,
    norms_in_float32: bool = False,
    llm_int8_threshold: float = 6.0,
) -> PreTrainedModel:
    """Build the model on the meta device, with the layers it will have; arguments as for `load_model`."""
    config.dtype = dtype
    config._attn_implementation = "sdpa"
    layout = layout_of(config)
    with torch.device("meta"):
        with Undrawn():
            model = layout.model_class(config)
        if quantize_mode != "16bit":
            for name in layout.expected_linears():
                linear = model.get_submodule(name)
                quantized = empty_quantized_linear(
                    linear,
                    quantize_mode,
                    compute_dtype=dtype,
                    double_quantization=double_quantization,
                    llm_int8_threshold=llm_int8_threshold,
                )
                model.set_submodule(name, quantized)
        for name, module in list(model.named_modules()):
            if isinstance(module, layout.norm_class):
                norm = layout.norm(module)
                model.set_submodule(name, norm.float() if norms_in_float32 else norm.to(dtype))
    if quantize_mode != "16bit":
        # Read by model cards; says how the weights are stored.
        model.config.quantization_config = BitsAndBytesConfig(
            load_in_4bit=quantize_mode == "4bit",
            load_in_8bit=quantize_mode == "8bit",
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double_quantization,
            bnb_4bit_compute_dtype=dtype,
            llm_int8_threshold=llm_int8_threshold,
        )
    return model


def _fill(
    model: PreTrainedModel,
    tensors: Iterator[tuple[str, Tensor | StoredLinear]],
    device: torch.device,
    dtype: torch.dtype,
    *,
    source: str,
    streamed: StreamedBase | None,
) -> list[str]:
    """Put each named tensor where it belongs, quantized where its layer is; store what is streamed.

    Returns:
        Names of the linears that were quantized here.
    """
    layout = layout_of(model.config)
    quantized: list[str] = []
    missing = {name: p for name, p in model.named_parameters() if name not in layout.tied}
    for name, tensor in tensors:
        wanted = missing.pop(name)
        if tuple(tensor.shape) != tuple(wanted.shape):
            raise UserError(
                f"{source}: {name} has the shape {list(tensor.shape)}, config.json asks for "
                f"{list(wanted.shape)}"
            )
        module = model.get_submodule(name.rpartition(".")[0])
        leaf = name.rpartition(".")[2]
        if isinstance(tensor, StoredLinear):
            if not is_quantized_linear(module):
                raise UserError(f"{source}: {name} is quantized, and is trained here in 16 bits only")
            tensor.fill(module, dtype)
        elif not tensor.is_floating_point():
            raise UserError(f"{source}: {name} is {tensor.dtype}, and config.json has no quantization_config")
        elif leaf == "weight" and is_quantized_linear(module):
            quantized.append(name.removesuffix(".weight"))
            fill_quantized_weight(module, tensor.to(device).to(dtype))
        else:
            tensor = tensor.to(device)
            kept = wanted.dtype if isinstance(module, layout.norm_class) else dtype
            if name.endswith(layout.keep_wider):
                kept = torch.promote_types(tensor.dtype, dtype)
            # A copy where nothing else makes one: the tensor may be a view into a file.
            tensor = tensor.to(kept, copy=tensor.device.type == "cpu")
            setattr(module, leaf, nn.Parameter(tensor, requires_grad=False))
        if leaf == "weight" and streamed is not None:
            streamed.take(module)
        del tensor
    if missing:
        raise UserError(
            f"{source} lacks {len(missing)} of the model's tensors, the first {next(iter(missing))}. "
            "Is the download complete?"
        )
    return quantized


def check_unchanged(checkpoint: Checkpoint) -> None:
    """Refuse a prepared base whose configuration or files are not as they were written.

    Large files are looked at in samples; a load compares every tensor.

    Raises:
        UserError: naming the folder.
    """
    prepared = None if isinstance(checkpoint, RandomCheckpoint) else read_prepared(checkpoint.folder)
    if prepared is not None and prepared.content != content_hash(checkpoint.folder):  # type: ignore[union-attr]
        changed = changed_files(checkpoint.folder, prepared)  # type: ignore[union-attr,arg-type]
        of_model = [name for name in changed if name == "config.json" or "safetensors" in name]
        raise changed_since(checkpoint.name, ", ".join(of_model) or "config.json or a file of weights")


def _finish(model: PreTrainedModel, name: str, device: torch.device) -> None:
    """Set what the tensors do not: buffers, the tied head, and what other libraries read from a model."""
    layout_of(model.config).fill_buffers(model.base_model, device)
    model.tie_weights()
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = True
    model.config.name_or_path = model.name_or_path = name
    model.hf_device_map = {"": device.index if device.type == "cuda" else "cpu"}
    for tensor_name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.device != device:
            raise RuntimeError(f"{tensor_name} is on {tensor.device}, not on {device}")


def quantization_of(model: Any) -> QuantizeMode:
    """How the blocks of a model from `load_model` are stored; LoRA may be on them."""
    linear = model.get_submodule(layout_of(model.config).expected_linears()[0])
    return quantize_mode_of(getattr(linear, "base_layer", linear))
