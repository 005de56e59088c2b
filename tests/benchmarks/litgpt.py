"""LitGPT's own model, LoRA and quantization, where LitGPT is installed."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from falcon_qlora.bench.documents import Document
from falcon_qlora.bench.runners import Settings
from falcon_qlora.bench.variants import Engine, Impossible, Variant
from falcon_qlora.models.checkpoints import RANDOM

_HEAD_CHUNK = 128  # as LitGPT's own fine-tuning calls it


@dataclass
class LitgptBase:
    """LitGPT's quantized model with LoRA on every linear of the blocks, and its optimizer."""

    model: Any
    fabric: Any
    optimizer: torch.optim.Optimizer
    compiled: Any = field(default=None)


def load(name: str, settings: Settings, device: torch.device) -> LitgptBase:
    """Build LitGPT's model of a preset's shapes with random weights, nf4-dq.

    Raises:
        Impossible: where LitGPT is not installed, or has no such model.
    """
    preset = name.removeprefix(RANDOM)
    if device.type != "cuda":
        raise Impossible("LitGPT's quantized model needs a GPU")
    if not name.startswith(RANDOM) or "?" in preset:
        raise Impossible("LitGPT is measured on the published shapes alone, such as random:falcon-7b")
    try:
        import lightning
        from lightning.fabric.plugins import BitsandbytesPrecision
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable
    except ImportError as error:
        raise Impossible(f"LitGPT is not installed ({error})") from None
    lora = dict.fromkeys(("query", "key", "value", "projection", "mlp"), True) | {"head": False}
    try:
        config = Config.from_name(
            preset,
            lora_r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            **{f"lora_{part}": on for part, on in lora.items()},
        )
    except ValueError as error:
        raise Impossible(f"LitGPT has no such model ({error})") from None
    fabric = lightning.Fabric(devices=[device.index], plugins=BitsandbytesPrecision("nf4-dq", torch.bfloat16))
    torch.manual_seed(settings.seed)
    with fabric.init_module(empty_init=False):
        model = GPT(config)
    mark_only_lora_as_trainable(model)
    model = fabric.setup_module(model)
    model.max_seq_length = settings.max_length
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if "lora_B" in parameter_name:
                parameter.normal_(std=0.01)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate, weight_decay=0.0, fused=True)
    return LitgptBase(model, fabric, optimizer)


class LitgptRunner:
    """LitGPT's fine-tuning step, eager or compiled."""

    def __init__(self, base: LitgptBase, settings: Settings, *, compiled: bool):
        self._base, self._settings = base, settings
        self._model = base.model
        if compiled:
            if base.compiled is None:
                base.compiled = torch.compile(base.model)
            self._model = base.compiled
        self._trained = [p for p in base.model.parameters() if p.requires_grad]
        self.notes = ["LitGPT's own model, LoRA and nf4-dq"]

    def prepare(self, documents: Sequence[Document]) -> Tensor:
        return torch.stack([torch.as_tensor(ids) for ids, _ in documents]).to(self._trained[0].device)

    def step(self, inputs: Tensor) -> Tensor:
        from litgpt.utils import chunked_cross_entropy

        logits = self._model(inputs, lm_head_chunk_size=_HEAD_CHUNK)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, inputs[..., 1:])
        self._base.fabric.backward(loss)
        torch.nn.utils.clip_grad_norm_(self._trained, self._settings.max_grad_norm)
        self._base.optimizer.step()
        self._base.optimizer.zero_grad(set_to_none=True)
        return loss.detach()


@contextmanager
def _build(
    variant: Variant, base: LitgptBase, settings: Settings, kept: dict[str, Any], *, compiled: bool
) -> Iterator[LitgptRunner]:
    yield LitgptRunner(base, settings, compiled=compiled)


def _engine(*, compiled: bool) -> Engine:
    return Engine(name="litgpt", build=functools.partial(_build, compiled=compiled), load=load)


VARIANTS = (
    Variant(
        name="litgpt",
        what="LitGPT, nf4-dq, padded, eager (needs litgpt)",
        engine=_engine(compiled=False),
    ),
    Variant(
        name="litgpt-compiled",
        what="the same through torch.compile (needs litgpt)",
        engine=_engine(compiled=True),
    ),
)
