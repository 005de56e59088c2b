"""Run packed documents through a loaded model, one model at a time and reversibly.

`enable_packing` replaces ``forward`` on one model's modules. The new one acts only when called with
``sequences``: generation and plain use of the model run as before, and nothing is changed at import.
`pack_batches` makes the model pack other trainers' batches too, both padded and already packed ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions, CausalLMOutput

from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.packed_attention import Sequences, packed_attention, rotate
from falcon_qlora.models.scaled import head_loss

_BEFORE = "_replaced_forward"


def enable_packing(model: nn.Module) -> None:
    """Let `model` take packed documents.

    It is then called with ``input_ids`` ``[1, T]``; with ``sequences``, which says where the documents lie;
    with ``target_positions``, int64 ``[N]``, the positions that predict a target, each once; and with
    ``targets``, int64 ``[N]``, what they should predict. The output's ``loss`` is the float32 *sum* of the N
    cross entropies, its ``logits`` None. Without targets the output has ``logits`` ``[1, T, V]`` and no loss.
    Without ``sequences`` the model runs as before.

    Args:
        model: of a known layout, as it is or inside PEFT's wrapper.
    """
    base = causal_lm_in(model)
    if forward_is_replaced(base):
        return
    for module, forward in _mixers(base):
        replace_forward(module, forward)
    replace_forward(base, _like(_model_forward, layout_of(base.config).model_class))


def pack_batches(model: nn.Module, *, on: bool = True) -> None:
    """Set whether a model with `enable_packing` also packs the batches of ordinary calls.

    Those are the batches of Transformers' and TRL's trainers: ``input_ids`` ``[B, L]`` with an
    ``attention_mask`` of left or right padding, or without one and with ``position_ids`` that restart in
    every document. Padding is not computed, and documents do not see each other. The hidden states
    ``[B, L, H]`` are those of Transformers' own forward for each row, or document, by itself; at padding they
    are 0.

    Batches are packed in training, and where the call asks for no cache. Other calls (with a cache, all
    hidden states, a mask with holes) run as before. A packed call waits for the GPU once, to learn where the
    documents lie.
    """
    backbone = causal_lm_in(model).base_model
    forward = _like(_backbone_forward, layout_of(backbone.config).backbone_class)
    if on and not forward_is_replaced(backbone):
        replace_forward(backbone, forward)
    elif not on and forward_is_replaced(backbone):
        restore_forward(backbone, forward, "enable_packing")


def disable_packing(model: nn.Module) -> None:
    """Undo `enable_packing`.

    Raises:
        RuntimeError: if something else has wrapped a forward since; undo that first.
    """
    base = causal_lm_in(model)
    if not forward_is_replaced(base):
        return
    pack_batches(base, on=False)
    restore_forward(base, _like(_model_forward, layout_of(base.config).model_class), "enable_packing")
    for module, forward in _mixers(base):
        restore_forward(module, forward, "enable_packing")


def _mixers(base: Any) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """The modules that mix tokens, each with its ``forward`` for packed documents."""
    layout = layout_of(base.config)
    forwards = {kind: _on_documents(mix) for kind, mix in layout.other_mixers().items()}
    forwards[layout.attention_class] = _attention_forward
    for module in base.modules():
        if type(module) in forwards:
            yield module, forwards[type(module)]


@functools.cache
def _on_documents(mix: Callable[[Any, Tensor, Sequences], Tensor]) -> Callable[..., Tensor]:
    def forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sequences = kwargs.get("attention_mask")
        if isinstance(sequences, Sequences):
            return mix(self, hidden_states, sequences)
        output: Tensor = forward_before(self)(hidden_states, *args, **kwargs)
        return output

    return forward


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Make this one module run `forward`, which may call `forward_before`."""
    # Bound methods and plain attributes, not closures: the model can still be deep-copied.
    setattr(module, _BEFORE, module.__dict__.get("forward"))
    module.forward = MethodType(forward, module)  # type: ignore[method-assign]


def forward_is_replaced(module: nn.Module) -> bool:
    """Whether `replace_forward` was called on a module, and not undone."""
    return hasattr(module, _BEFORE)


def restore_forward(module: nn.Module, forward: Callable[..., Any], since: str) -> None:
    """Undo `replace_forward`; `since` names the function that called it.

    Raises:
        RuntimeError: if something else has wrapped the module's forward since.
    """
    if getattr(module.forward, "__func__", None) is not forward:
        raise RuntimeError(f"the forward of {type(module).__name__} was wrapped after {since}")
    before = getattr(module, _BEFORE)
    delattr(module, _BEFORE)
    del module.forward
    if before is not None:
        module.forward = before  # type: ignore[method-assign]


def forward_before(module: nn.Module) -> Callable[..., Any]:
    """The ``forward`` that `replace_forward` replaced."""
    return getattr(module, _BEFORE) or functools.partial(type(module).forward, module)


@functools.cache
def _like(forward: Callable[..., Any], kind: Any) -> Callable[..., Any]:
    """`forward` with the signature of the class's own, which `generate` checks its arguments against."""

    @functools.wraps(kind.forward)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(self, *args, **kwargs)

    return method


def _model_forward(
    self: Any,
    input_ids: Tensor | None = None,
    *args: Any,
    sequences: Sequences | None = None,
    target_positions: Tensor | None = None,
    targets: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    if sequences is None:
        return forward_before(self)(input_ids, *args, **kwargs)
    _refuse_what_packing_cannot_do(args, kwargs)
    assert input_ids is not None
    if input_ids.shape != sequences.position_ids.shape:
        raise ValueError(
            f"input_ids {list(input_ids.shape)} and sequences of {sum(sequences.lengths)} tokens differ"
        )
    hidden = run_blocks(self.base_model, input_ids, sequences, wanted=target_positions)
    norm, head = final_norm(self.base_model), self.get_output_embeddings()
    scale = layout_of(self.config).head_multiplier
    if targets is None:
        logits = head(norm(hidden))
        return CausalLMOutput(logits=logits if scale == 1 else logits * scale)
    assert target_positions is not None
    if hidden.shape[1] == input_ids.shape[1]:
        hidden = hidden.index_select(1, target_positions)
    hidden = norm(hidden[0])
    return CausalLMOutput(loss=head_loss(hidden, head, targets, scale=scale))


def _backbone_forward(self: Any, input_ids: Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
    documents = None
    if input_ids is not None and input_ids.numel() and not args and _may_be_packed(self, kwargs):
        documents = _documents_of(input_ids, kwargs.get("attention_mask"), kwargs.get("position_ids"))
    if input_ids is None or documents is None:
        return forward_before(self)(input_ids, *args, **kwargs)
    flat, sequences = documents
    packed = input_ids.flatten().index_select(0, flat)[None]
    hidden = final_norm(self)(run_blocks(self, packed, sequences))[0]
    if len(flat) < input_ids.numel():
        hidden = hidden.new_zeros(input_ids.numel(), hidden.shape[1]).index_copy(0, flat, hidden)
    hidden = hidden.view(*input_ids.shape, -1)
    if kwargs.get("return_dict") is False:
        return (hidden,)
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=hidden)


def _may_be_packed(self: Any, kwargs: dict[str, Any]) -> bool:
    given = {name for name, value in kwargs.items() if value is not None and value is not False}
    no_cache = kwargs.get("use_cache") is False or (self.training and torch.is_grad_enabled())
    return no_cache and given <= {"attention_mask", "position_ids", "use_cache", "return_dict"}


def _documents_of(
    input_ids: Tensor, mask: Tensor | None, positions: Tensor | None
) -> tuple[Tensor, Sequences] | None:
    """Flat indices of a batch's real tokens, and the documents they form; None if it cannot be packed."""
    if mask is not None and (positions is not None or mask.shape != input_ids.shape):
        return None
    if mask is not None:
        real = mask.bool()
        begins = real & ~nn.functional.pad(real, (1, -1))
        odd = begins.sum(1) > 1  # a mask with holes
    else:
        if positions is None:
            positions = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
        real = torch.ones_like(input_ids, dtype=torch.bool)
        begins = (positions == 0).expand(real.shape).clone()
        begins[:, 0] = True
        odd = (positions.diff() != 1) & ~begins[:, 1:]
    flat = real.flatten().nonzero().squeeze(1)
    starts = begins.flatten()[flat].nonzero().squeeze(1)
    *at, is_odd = torch.cat([starts, odd.any().long()[None]]).tolist()
    if is_odd or not at:
        return None
    lengths = [end - start for start, end in pairwise([*at, len(flat)])]
    return flat, Sequences.from_lengths(lengths, input_ids.device)


def _refuse_what_packing_cannot_do(args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    kwargs = {name: value for name, value in kwargs.items() if name not in ("use_cache", "return_dict")}
    asked = [name for name, value in kwargs.items() if value is not None and value is not False]
    if args or asked:
        raise ValueError(
            f"with sequences the model takes no {', '.join(asked) or 'other positional arguments'}"
        )


FEW_ROWS = 0.8
"""The largest share of the tokens whose output alone the last block is asked for, where no other is used.

Then what it saves, the feed-forward layer of the others, is far more than two products instead of one and
copies of rows cost.
"""


def run_blocks(
    backbone: Any, input_ids: Tensor, sequences: Sequences, *, wanted: Tensor | None = None
) -> Tensor:
    """Embed and run every block: ``[1, T]`` → ``[1, T, hidden]``, before the final norm.

    With `wanted`, int64 ``[N]``, only these tokens' output is used: if they are few, the result may have
    theirs alone, ``[1, N, hidden]``.
    """
    layout = layout_of(backbone.config)
    hidden = layout.embed(backbone.get_input_embeddings(), input_ids)
    arguments = layout.block_arguments(backbone, hidden, sequences)
    *blocks, last = getattr(backbone, layout.blocks)
    for block in blocks:
        hidden = run_block(block, hidden, arguments)
    if wanted is not None and 0 < len(wanted) <= FEW_ROWS * input_ids.shape[1]:
        arguments["attention_mask"] = replace(sequences, wanted=wanted)
    return run_block(last, hidden, arguments)


def final_norm(backbone: Any) -> nn.Module:
    """The norm between the last block and the head."""
    norm: nn.Module = getattr(backbone, layout_of(backbone.config).final_norm)
    return norm


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """Run one block on packed documents ``[1, T, hidden]``; `arguments` are `Layout.block_arguments`."""
    output = block(hidden, **arguments)
    return output[0] if isinstance(output, tuple) else output


def _attention_forward(self: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
    sequences = kwargs.get("attention_mask")
    if not isinstance(sequences, Sequences):
        return forward_before(self)(hidden_states, *args, **kwargs)
    layout, bias = layout_of(self.config), kwargs.get("alibi")
    query, key, value = layout.heads(self, hidden_states)
    if bias is None:
        cosine, sine = (each[0].unsqueeze(1) for each in kwargs["position_embeddings"])
        query, key = rotate(query, cosine, sine), rotate(key, cosine, sine)
    dropout = layout.attention_dropout(self) if self.training else 0.0
    device_type = query.device.type
    if torch.is_autocast_enabled(device_type):
        dtype = torch.get_autocast_dtype(device_type)
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    output = packed_attention(query, key, value, sequences, bias=bias, dropout=dropout)
    output = getattr(self, layout.output_projection)(rearrange(output, "t heads d -> 1 t (heads d)"))
    return output, None
