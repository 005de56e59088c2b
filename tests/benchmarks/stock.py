"""The peers' way: Transformers' own forward, PEFT's LoRA, TRL's training step, padded batches.

Nothing of this project is in the step. Only the weights come from its loader, because Transformers 5 leaves
every linear of a Falcon unquantized; the layers are bitsandbytes' own. The norms are the model's own in
float32, as the 2023 recipe casts them. Packed, Transformers' Falcon-H1 would mix documents. ``stock-liger``
has Liger's kernels for Llama (`pip install liger-kernel`), as TRL switches them on: rotation, norms and
SwiGLU.
"""

from __future__ import annotations

import functools
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast
from transformers.integrations.liger import apply_liger_kernel
from transformers.models.llama import modeling_llama
from trl import SFTConfig, SFTTrainer

from falcon_qlora.bench.documents import Document
from falcon_qlora.bench.runners import Settings, adapted
from falcon_qlora.bench.variants import Engine, Impossible, Variant
from falcon_qlora.models.blocks.fast_block import base_of
from falcon_qlora.models.layouts import layout_of
from falcon_qlora.models.layouts.norms import (
    SameDtypeFalconH1RMSNorm,
    SameDtypeLayerNorm,
    SameDtypeRMSNorm,
)
from falcon_qlora.models.load import quantization_of
from falcon_qlora.models.quantize import holds_quantized_weight
from falcon_qlora.models.tiny import tiny_path

_IGNORED = -100
_REPLACED_BY_LIGER = ("apply_rotary_pos_emb", "LlamaRMSNorm", "LlamaMLP")
_WEIGHTS = {"4bit": "NF4, doubly quantized", "8bit": "int8", "16bit": "bfloat16"}


def variants() -> Iterator[Variant]:
    """The 2023 recipe on today's libraries, the same as fast as flags make it, and with Liger's kernels."""
    engine = Engine(name="stock", build=build)
    yield Variant(
        name="stock-liger",
        what="stock-fast with Liger's kernels, Falcon3 alone",
        engine=Engine(name="stock-liger", build=functools.partial(build, liger=True)),
        kernels="off",
        largest_batch=True,
    )
    for mode in ("4bit", "8bit", "16bit"):
        name = "stock" if mode == "4bit" else f"stock-{mode}"
        yield Variant(
            name=name,
            what=f"Transformers + PEFT + TRL in {mode}, the 2023 recipe: padded, recomputing, dropout 0.1",
            engine=engine,
            quantize_mode=mode,
            checkpointing="full",
            kernels="off",
            lora_dropout=0.1,
        )
        yield Variant(
            name=f"{name}-fast",
            what=f"Transformers + PEFT + TRL in {mode}, as fast as flags make it, largest batch",
            engine=engine,
            quantize_mode=mode,
            kernels="off",
            largest_batch=True,
        )


@contextmanager
def build(
    variant: Variant, base: Any, settings: Settings, kept: dict[str, Any], *, liger: bool = False
) -> Iterator[StockRunner]:
    """Put PEFT and TRL on `base` as their users would; take them off again when the block ends."""
    if liger and not isinstance(base, modeling_llama.LlamaForCausalLM):
        raise Impossible("Liger's kernels are put on Falcon3 alone here")
    norms = _plain_norms(base)
    patched = {name: getattr(modeling_llama, name) for name in _REPLACED_BY_LIGER}
    recompute = variant.checkpointing == "full"
    model = None
    try:
        model = adapted(base, variant, settings)
        trainer = _trainer(model, base, settings, recompute, liger)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        verify_quantized_under_lora(model, variant)
        yield StockRunner(trainer, kept, weights=_WEIGHTS[variant.quantize_mode])
    finally:
        base.__dict__.pop("forward", None)  # TRL's fused head
        base.gradient_checkpointing_disable()
        if recompute:
            base.disable_input_require_grads()
        if model is not None:
            model.unload()
        for name, norm in norms.items():
            base.set_submodule(name, norm)
        for name, own in patched.items():
            setattr(modeling_llama, name, own)
        for module in base.modules():
            if isinstance(module, patched["LlamaMLP"]):
                for name in ("forward", "_get_name"):
                    module.__dict__.pop(name, None)


def _plain_norms(base: Any) -> dict[str, nn.Module]:
    """Replace the loader's norms by the model's own in float32; returns the loader's by name."""
    norms: dict[str, nn.Module] = {}
    for name, norm in base.named_modules():
        if not isinstance(norm, SameDtypeLayerNorm | SameDtypeRMSNorm | SameDtypeFalconH1RMSNorm):
            continue
        epsilon = norm.eps if isinstance(norm, SameDtypeLayerNorm) else norm.variance_epsilon
        plain: nn.Module = layout_of(base.config).norm_class(len(norm.weight), eps=epsilon)
        norms[name] = norm
        plain.load_state_dict(norm.state_dict())
        base.set_submodule(name, plain.to(norm.weight.device).requires_grad_(False))
    return norms


def _trainer(model: Any, base: Any, settings: Settings, recompute: bool, liger: bool) -> SFTTrainer:
    on_gpu = base.device.type == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder,
            bf16=True,
            use_cpu=not on_gpu,
            optim="paged_adamw_32bit" if on_gpu else "adamw_torch",
            learning_rate=settings.learning_rate,
            weight_decay=0.0,
            max_grad_norm=settings.max_grad_norm,
            max_steps=1,
            report_to=[],
            use_liger_kernel=liger,
            disable_tqdm=True,
            dataset_kwargs={"skip_prepare_dataset": True},
            remove_unused_columns=False,
        )
        # Transformers renames the first to the second.
        arguments.gradient_checkpointing = arguments.activation_checkpointing = recompute
        mode = quantization_of(base)
        told = None if mode == "16bit" else f"is_loaded_in_{mode}"
        if told:
            setattr(base, told, True)  # what Transformers' quantizers say; TRL then keeps LoRA in bfloat16
        try:
            trainer = SFTTrainer(
                model,
                arguments,
                train_dataset=_one_row(),
                processing_class=PreTrainedTokenizerFast.from_pretrained(tiny_path()),  # never asked
                data_collator=lambda rows: rows,
            )
        finally:
            if told:
                delattr(base, told)
    trainer.model_wrapped = trainer.accelerator.prepare_model(model)  # autocast around the forward
    if liger:
        apply_liger_kernel(model, arguments.liger_kernel_config)  # as the loop would, which is ours here
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # set by the loop, which is ours here
    return trainer


def _one_row() -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"input_ids": [0, 1], "labels": [0, 1]}])


def verify_quantized_under_lora(model: Any, variant: Variant) -> None:
    """Check that every linear, or what PEFT's layer wraps, is quantized as the variant says.

    Raises:
        RuntimeError: naming the first layer that is not.
    """
    if variant.quantize_mode == "16bit":
        return
    falcon = model.get_base_model()
    for name in layout_of(falcon.config).expected_linears():
        if not holds_quantized_weight(base_of(falcon.get_submodule(name)), variant.quantize_mode):
            raise RuntimeError(f"{name} was left unquantized in the stock variant")


class StockRunner:
    """TRL's training step on padded batches, its clipping, its optimizer."""

    def __init__(self, trainer: SFTTrainer, kept: dict[str, Any], *, weights: str):
        self.trainer = trainer
        self.model = trainer.model_wrapped
        self._parameters = [p for p in self.model.parameters() if p.requires_grad]
        self._kept = kept
        on_gpu = self._parameters[0].device.type == "cuda"
        self.notes = [f"TRL's step, weights by this project's loader ({weights})"]
        if layout_of(trainer.model.config).other_mixers():
            with_kernels = "with" if find_spec("mamba_ssm") else "without"
            self.notes.append(
                f"padded: packed, Transformers' documents reach each other; {with_kernels} mamba-ssm"
            )
        if on_gpu:
            self.notes.append("optimizer state is paged and not in the memory shown")
        # bitsandbytes never frees paged memory, so the states of the last round are used again.
        for parameter, state in zip(self._parameters, kept.get("states", []), strict=False):
            trainer.optimizer.state[parameter] = state

    def prepare(self, documents: Sequence[Document]) -> dict[str, Tensor]:
        longest = max(len(ids) for ids, _ in documents)
        shape = (len(documents), longest)
        ids = torch.zeros(shape, dtype=torch.int64)
        attention = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape, _IGNORED, dtype=torch.int64)
        for row, (tokens, mask) in enumerate(documents):
            count = len(tokens)
            ids[row, :count] = torch.as_tensor(tokens)
            attention[row, :count] = 1
            is_target = torch.as_tensor(mask, dtype=torch.bool)
            labels[row, :count] = torch.where(is_target, ids[row, :count], _IGNORED)
        device = self._parameters[0].device
        return {
            "input_ids": ids.to(device),
            "attention_mask": attention.to(device),
            "labels": labels.to(device),
        }

    def loss(self, inputs: dict[str, Tensor]) -> Tensor:
        with self.trainer.compute_loss_context_manager():
            return self.trainer.compute_loss(self.model, dict(inputs))

    def step(self, inputs: dict[str, Tensor]) -> Tensor:
        trainer = self.trainer
        loss = trainer.training_step(self.model, dict(inputs))
        trainer._clip_grad_norm(self.model)
        trainer.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        if "states" not in self._kept:
            self._kept["states"] = [trainer.optimizer.state[p] for p in self._parameters]
        return loss
