"""Full fine-tuning: every weight of a base that is not quantized.

The weights are trained in the dtype in which they are loaded: bfloat16 on most GPUs, where a step much
smaller than a weight is lost in rounding; float32 loses none and takes twice the memory.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

from falcon_qlora.common.errors import UserError
from falcon_qlora.methods.interface import Method, ParameterGroup, remember

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel


@dataclass(frozen=True, kw_only=True)
class Full(Method):
    """Train everything."""

    name: ClassVar[str] = "full"
    title: ClassVar[str] = "Full fine-tuning"
    trains: ClassVar[str] = "every weight"
    opened_by: ClassVar[str] = "transformers"
    is_whole: ClassVar[bool] = True
    trains_in_float32: ClassVar[bool] = False
    needs_16bit: ClassVar[str | None] = "trains every weight, and quantized weights cannot take a step"
    why_not_merged: ClassVar[str | None] = "there is nothing apart: what is saved is a whole model already"

    @classmethod
    def read_folder(cls, folder: Path, record: dict[str, Any]) -> NoReturn:
        raise UserError(f"{folder} is a fully fine-tuned model, not an adapter")

    def step_memory(self) -> dict[str, Any]:
        return {"all_trained": True}

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        from falcon_qlora.models.layouts import layout_of

        kinds = layout_of(config).base_parameter_kinds()
        return [ParameterGroup(kind=kind, count=count, of_base=True) for kind, count in kinds.items()]

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        raise AssertionError("a whole model is read as a model, see models/checkpoints.py")

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PreTrainedModel:
        import torch

        from falcon_qlora.models.load import quantization_of

        mode = quantization_of(model)
        if mode != "16bit":
            raise UserError(
                f"--method full trains every weight, and weights stored in {mode} cannot take a step: give "
                "--quantize_mode 16bit, or train an adapter on the quantized base with --method lora"
            )
        if model.dtype == torch.float16:
            raise UserError(
                "--method full does not train in fp16, where gradients overflow: give --compute_dtype bf16 "
                "or fp32"
            )
        if model.device.type == "cpu":
            # Transformers would take this map, which names the CPU, as a sign that the model did not fit a
            # GPU.
            vars(model).pop("hf_device_map", None)
        model.requires_grad_(True)
        remember(model, self)
        return model.train()

    def save(self, model: PreTrainedModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        from falcon_qlora.methods.adapter_folder import write_record
        from falcon_qlora.models.sharded import save_whole

        save_whole(model, folder, state)
        write_record(folder, {"method": self.name, "base_model": model.name_or_path})

    def restore(self, model: PreTrainedModel, folder: Path) -> None:
        from safetensors.torch import load_file

        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.sharded import fill, whole_shape

        parameters = dict(model.named_parameters(remove_duplicate=False))
        missing = set(parameters)
        for file in sorted(folder.glob("model*.safetensors")):
            tensors = load_file(file)
            for name, tensor in tensors.items():
                if name not in parameters or whole_shape(parameters[name]) != tensor.shape:
                    raise RuntimeError(f"{folder} does not fit this model: {name}")
                fill(parameters[name], tensor)
            missing -= tensors.keys()
        missing -= layout_of(model.config).tied
        if missing:
            raise RuntimeError(f"{folder} does not fit this model: {min(missing)} is not there")

    def open(self, base: PreTrainedModel, folder: Path, *, trainable: bool) -> PreTrainedModel:
        if trainable:
            return self.attach(base)
        remember(base, self)
        return base
