"""NEFTune: uniform noise on the embeddings in training, scaled for each document.

Transformers' hook treats the embedding's input as one text. Here that is a micro-batch, whose documents lie
end to end: with 8 documents the hook's noise would be 2.8 times too weak.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.models.layouts import causal_lm_in
from falcon_qlora.models.packed_attention import Sequences


def add_noise(model: nn.Module, alpha: float) -> None:
    """Have a model in training mode add noise to its embeddings, drawn by its device's generator.

    For a document of L tokens (padding included) and H hidden channels, noise is drawn from
    ±``alpha / sqrt(L · H)``, as in arXiv 2310.05914.

    Args:
        model: with packing enabled and a method attached.
        alpha: strength of the noise.
    """
    called_with: dict[str, Sequences | None] = {}

    def see(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        called_with["sequences"] = kwargs.get("sequences")

    def noisy(module: nn.Module, args: tuple[Any, ...], embedded: Tensor) -> Tensor:
        sequences = called_with.get("sequences")
        if not module.training or sequences is None:
            return embedded
        lengths = sequences.cu_seqlens.diff()
        scale = alpha / (lengths * embedded.shape[-1]).sqrt()
        scale = scale.repeat_interleave(lengths, output_size=embedded.shape[1])  # the host need not wait
        noise = torch.empty_like(embedded).uniform_(-1, 1)
        return embedded + noise * scale[None, :, None].to(embedded.dtype)

    model.register_forward_pre_hook(see, with_kwargs=True)
    causal_lm_in(model).get_input_embeddings().register_forward_hook(noisy)
