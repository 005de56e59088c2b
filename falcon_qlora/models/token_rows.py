"""Single rows of the embedding and the output head, trained in place of the frozen ones.

They are PEFT's ``trainable_token_indices``. In every forward PEFT copies the whole matrix to put them in.
Here the frozen matrix stays as it is, and its output for their tokens is overwritten.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from falcon_qlora.models.layouts import causal_lm_in

# The head's matrix product is slow on a GPU where its width is no multiple of this.
_MULTIPLE = 64
_ALIGNED = 8  # rows of 16 bytes; with other numbers the product is several times as slow
_PADDED = "_padded"


@dataclass(frozen=True)
class TokenRows:
    """The active trained rows of a module.

    Attributes:
        ids: of their n tokens.
        values: the rows, float32 ``[n, H]``.
        frozen: the whole matrix ``[V, H]``, whose dtype they are cast to.
    """

    ids: tuple[int, ...]
    values: Tensor
    frozen: Tensor

    @property
    def index(self) -> Tensor:
        """`ids` on the rows' device: int64 ``[n]``."""
        return _index(self.ids, self.values.device)


def rows_of(module: Any) -> TokenRows | None:
    """The active trained rows of an embedding or a head; None where there are none or they are off."""
    adapter = getattr(module, "token_adapter", None)
    if adapter is None or module.disable_adapters or adapter.merged:
        return None
    for name in module.active_adapters:
        if name in adapter.trainable_tokens_delta:
            ids, values = adapter.token_indices[name], adapter.trainable_tokens_delta[name]
            return TokenRows(tuple(ids), values, adapter.base_layer.weight)
    return None


def frozen_weight(module: Any) -> Tensor:
    """The matrix of an embedding or a head without what is trained beside it."""
    weight: Tensor = getattr(module, "original_module", module).weight
    return weight


def modules_with_rows(model: nn.Module) -> list[Any]:
    """The embedding and the head, if they have trained rows."""
    base = causal_lm_in(model)
    both = (base.get_input_embeddings(), base.get_output_embeddings())
    return [module for module in both if hasattr(module, "token_adapter")]


def padded(weight: Tensor) -> Tensor:
    """A matrix with the rows of zeros after it in memory that `grow_vocabulary` and `pad_head` put there."""
    whole: Tensor = getattr(weight, _PADDED, weight)
    return whole


def forward_of(module: Any) -> Callable[..., Tensor]:
    """The replacement ``forward`` for one of `modules_with_rows`."""
    return _embed if isinstance(module.original_module, nn.Embedding) else _project


@torch.no_grad()
def grow_vocabulary(model: Any, size: int) -> None:
    """Give a model from `load_model` embeddings for `size` ids, where it has fewer.

    Each new row, in an untied head too, is the mean of the existing rows. Transformers'
    `resize_token_embeddings` does the same but adds a little noise.
    """
    before = model.config.vocab_size
    if size <= before:
        return
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    for module in (embedding,) if model.config.tie_word_embeddings else (embedding, head):
        weight = module.weight
        module.weight = _with_zeros(weight, size)
        module.weight[before:] = _mean_row(weight)
    embedding.num_embeddings = head.out_features = size
    model.config.vocab_size = size
    model.tie_weights()


@torch.no_grad()
def pad_head(model: Any) -> None:
    """Give a frozen head `padded` rows where its number of rows would make its products slow.

    Heads that are trained, or have trained rows or vectors, stay as they are.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    alone = type(head) is nn.Linear and not list(head.children())
    if alone and len(head.weight) % _ALIGNED and not head.weight.requires_grad:
        before = head.weight
        if padded(before) is before:
            head.weight = _with_zeros(before, len(before))
            if embedding.weight is before:
                embedding.weight = head.weight


def _with_zeros(weight: Tensor, size: int) -> nn.Parameter:
    """`weight` with zeros up to `size` rows, and behind these what `padded` tells of."""
    whole = weight.new_zeros(-(-size // _MULTIPLE) * _MULTIPLE, weight.shape[1])
    whole[: len(weight)] = weight
    parameter = nn.Parameter(whole[:size], requires_grad=False)
    setattr(parameter, _PADDED, whole)
    return parameter


@torch.no_grad()
def start_at_the_mean(model: nn.Module, vocabulary: int) -> None:
    """Set every trained row to the mean of the base's own `vocabulary` rows, in float32."""
    for module in modules_with_rows(model):
        rows = rows_of(module)
        assert rows is not None
        rows.values.copy_(_mean_row(rows.frozen[:vocabulary]).expand_as(rows.values))


def with_rows(weight: Tensor, size: int, ids: Sequence[int], values: Tensor | None) -> Tensor:
    """A matrix ``[V, H]`` grown as by `grow_vocabulary`, with `values` as the rows `ids`: float32."""
    whole = torch.cat([weight.float(), _mean_row(weight).expand(size - len(weight), -1)])
    if values is not None:
        whole[list(ids)] = values.to(whole)
    return whole


def _mean_row(weight: Tensor) -> Tensor:
    return weight.mean(0, dtype=torch.float32)


def _embed(self: Any, input_ids: Tensor) -> Tensor:
    looked_up: Tensor = self.original_module(input_ids)
    rows = rows_of(self)
    if rows is None:
        return looked_up
    count = len(rows.ids)
    places = _places(rows.ids, len(rows.frozen), input_ids.device)[input_ids]
    # One extra row stands for all other tokens; it gets no gradient.
    table = nn.functional.pad(rows.values.to(looked_up.dtype), (0, 0, 0, 1))
    found = nn.functional.embedding(places, table, padding_idx=count)
    return torch.where((places < count)[..., None], found, looked_up)


def _project(self: Any, hidden: Tensor) -> Tensor:
    logits: Tensor = self.original_module(hidden)
    rows = rows_of(self)
    if rows is None:
        return logits
    columns = nn.functional.linear(hidden, rows.values.to(rows.frozen.dtype))
    return logits.index_copy_(-1, rows.index, columns)


@functools.lru_cache(maxsize=8)
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)


@functools.lru_cache(maxsize=8)
def _places(ids: tuple[int, ...], vocabulary: int, device: torch.device) -> Tensor:
    """Each token's place among `ids`, or ``len(ids)`` for all others: int64 ``[V]``."""
    with torch.inference_mode(False):
        places = torch.full((vocabulary,), len(ids))
        places[list(ids)] = torch.arange(len(ids))
        return places.to(device)
