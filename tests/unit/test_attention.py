"""Attention over packed documents is attention over each document alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from falcon_qlora.models import packed_attention as attention
from falcon_qlora.models.layouts.falcon import alibi_bias
from falcon_qlora.models.packed_attention import Sequences, packed_attention

lengths_of_documents = st.lists(st.integers(1, 200), min_size=1, max_size=30)


def one_by_one(query, key, value, lengths, bias=None):
    """Softmax attention written out, a document at a time."""
    heads = query.shape[1]
    outputs = []
    start = 0
    for length in lengths:
        rows = slice(start, start + length)
        start += length
        q = query[rows].transpose(0, 1)
        k, v = (x[rows].repeat_interleave(heads // x.shape[1], dim=1).transpose(0, 1) for x in (key, value))
        scores = q @ k.transpose(1, 2)
        if bias is not None:
            scores = scores + bias[rows].T[:, None, :]
        scores = scores / math.sqrt(query.shape[-1])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        outputs.append((scores.masked_fill(~causal, -torch.inf).softmax(-1) @ v).transpose(0, 1))
    return torch.cat(outputs)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 1), (6, 2)])
@pytest.mark.parametrize("lengths", [[1], [37], [5, 90, 1, 1, 33], [8, 8, 8]])
@pytest.mark.parametrize("with_alibi", [False, True])
def test_forward_and_backward_equal_one_document_at_a_time(heads, kv_heads, lengths, with_alibi):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(lengths)
    shapes = [(tokens, heads, 12), (tokens, kv_heads, 12), (tokens, kv_heads, 12)]
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]
    sequences = Sequences.from_lengths(lengths)
    bias = alibi_bias(sequences, heads, torch.float64) if with_alibi else None
    upstream = torch.randn(shapes[0], generator=generator, dtype=torch.float64)
    output = packed_attention(*inputs, sequences, bias=bias)
    expected = one_by_one(*inputs, lengths, bias)
    assert_close(output, expected)
    assert_close(
        torch.autograd.grad(output, inputs, upstream), torch.autograd.grad(expected, inputs, upstream)
    )


def test_alibi_bias_restarts_with_every_document():
    sequences = Sequences.from_lengths([3, 5])
    bias = alibi_bias(sequences, 4, torch.float32)
    assert bias.shape == (8, 4)
    assert_close(bias[:3], bias[3:6])
    assert not bias[0].any()
    assert (bias[7] > bias[4]).all()


@settings(deadline=None, max_examples=60)
@given(lengths_of_documents)
def test_sequences_describe_the_documents(lengths):
    sequences = Sequences.from_lengths(lengths)
    assert sequences.cu_seqlens.dtype == torch.int32
    assert sequences.cu_seqlens.diff().tolist() == lengths
    assert sequences.position_ids[0].tolist() == [p for length in lengths for p in range(length)]
    assert sequences.max_length == max(lengths)


@settings(deadline=None, max_examples=60)
@given(lengths_of_documents)
def test_groups_hold_every_token_once_and_little_padding(lengths):
    sequences = Sequences.from_lengths(lengths)
    groups = sequences.padded_groups
    tokens = torch.cat([group.tokens for group in groups])
    assert tokens.sort().values.tolist() == list(range(sum(lengths)))
    assert_close(tokens[sequences.group_order], torch.arange(sum(lengths)))
    for group in groups:
        assert group.slots.unique().numel() == group.slots.numel()
        assert group.slots.max() < group.documents * group.length
        assert group.length <= 32 or group.documents * group.length <= 2 * group.tokens.numel()


def test_attention_weights_are_dropped_when_asked():
    query = torch.randn(10, 2, 8)
    value = torch.ones(10, 2, 8)
    sequences = Sequences.from_lengths([10])
    torch.manual_seed(0)
    kept = packed_attention(query, query, value, sequences)
    dropped = packed_attention(query, query, value, sequences, dropout=0.5)
    assert_close(kept, value)
    assert not torch.allclose(dropped, value)


@pytest.mark.parametrize(
    ("capability", "head_dim", "taken"),
    [
        ((9, 0), 256, True),
        ((8, 0), 256, True),
        ((8, 9), 256, False),
        ((8, 9), 128, True),
        ((7, 5), 64, False),
    ],
)
def test_wide_heads_take_the_kernel_only_where_it_was_tried(capability, head_dim, taken, monkeypatch):
    monkeypatch.setattr(attention, "_capability", lambda device: capability)
    device = torch.device("cuda")
    assert attention.takes_varlen(device, torch.bfloat16, head_dim, 0.0) == taken
