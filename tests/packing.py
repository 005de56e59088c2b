"""Packed documents as a model takes them, and the truth about them."""

from itertools import pairwise

import torch
import torch.nn.functional as F

from falcon_qlora.models.packed_attention import Sequences
from tests.layouts import attach_lora


def packed(docs):
    """Arguments of a call that trains on every next token."""
    lengths = [len(doc) for doc in docs]
    sequences = Sequences.from_lengths(lengths, docs[0].device)
    starts = sequences.cu_seqlens.tolist()
    positions = [p for start, end in pairwise(starts) for p in range(start, end - 1)]
    ids = torch.cat(docs)
    target_positions = torch.tensor(positions, dtype=torch.int64, device=ids.device)
    return {
        "input_ids": ids[None],
        "sequences": sequences,
        "target_positions": target_positions,
        "targets": ids[target_positions + 1],
    }


def with_adapter(model, seed=3, r=4):
    """LoRA whose second matrices are not zero, so that all of it matters."""
    peft_model = attach_lora(model, r=r, alpha=2 * r, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in peft_model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return peft_model


def gradients(model):
    return {name: p.grad for name, p in model.named_parameters() if p.requires_grad}


def one_by_one(plain, docs):
    """Sum of the losses of each document on its own, through Transformers' forward."""
    losses = [
        F.cross_entropy(plain(doc[None], use_cache=False).logits[0, :-1], doc[1:], reduction="sum")
        for doc in docs
        if len(doc) > 1
    ]
    return torch.stack(losses).sum()
