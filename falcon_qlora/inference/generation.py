"""Answers from a model, token by token.

One loop with the key/value cache serves streaming and batches, plain models and those in PEFT's wrapper,
quantized or not, on the CPU and on CUDA. It leaves the model in the mode in which it found it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

Prompt = str | Sequence[int]


def generate_stream(
    model: Any,
    tokenizer: Any,
    prompt: Prompt,
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield an answer's text as it is made, in pieces of whole characters; the end token is not part of it.

    Args:
        model: a causal language model of Transformers, also inside PEFT's wrapper.
        tokenizer: its tokenizer.
        prompt: text, or its token ids.
        max_new_tokens: stop after this many tokens if the model has not ended by then.
        temperature: 0 takes the likeliest token each time; above 0 draws.
        top_p: draw only from the likeliest tokens that together have this probability.
        seed: of the draws, which are then the same on every device.
    """
    writer = _TextWriter(tokenizer)
    tokens = _generate([_ids(tokenizer, prompt)], model, tokenizer, max_new_tokens, temperature, top_p, seed)
    for (token,) in tokens:
        if token is not None and (text := writer.add(token)):
            yield text
    if rest := writer.rest():
        yield rest


def generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> list[str]:
    """Return the answers to several prompts, made side by side; the arguments are `generate_stream`'s."""
    if not prompts:
        return []
    ids = [_ids(tokenizer, prompt) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    for tokens in _generate(ids, model, tokenizer, max_new_tokens, temperature, top_p, seed):
        for answer, token in zip(answers, tokens, strict=True):
            if token is not None:
                answer.append(token)
    return [_decode(tokenizer, answer) for answer in answers]


@torch.no_grad()
def _generate(
    prompts: list[list[int]],
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> Iterator[list[int | None]]:
    """Yield the next token of every prompt, None for those that have ended, until all have."""
    device = next(model.parameters()).device
    longest = max(map(len, prompts))
    # Padded on the left with the end token, masked by position: the newest token is always the last column.
    end = tokenizer.eos_token_id
    gaps = [longest - len(prompt) for prompt in prompts]
    rows = [[end] * gap + prompt for gap, prompt in zip(gaps, prompts, strict=True)]
    ids = torch.tensor(rows, device=device)
    mask = torch.tensor([[0] * gap + [1] * (longest - gap) for gap in gaps], device=device)
    padded = any(gaps)
    draw = torch.Generator().manual_seed(seed)
    ended = [False] * len(prompts)
    cache = None
    was_training = model.training
    model.eval()
    try:
        for _ in range(max_new_tokens):
            output = model(
                input_ids=ids,
                attention_mask=mask if padded else None,
                position_ids=(mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :] if padded else None,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            cache = output.past_key_values
            chosen = choose_tokens(output.logits[:, -1], temperature, top_p, draw)
            tokens: list[int | None] = []
            for row, token in enumerate(chosen.tolist()):
                ended[row] = ended[row] or token == end
                tokens.append(None if ended[row] else token)
            yield tokens
            if all(ended):
                return
            ids = chosen[:, None].to(device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    finally:
        model.train(was_training)


def choose_tokens(logits: Tensor, temperature: float, top_p: float, draw: torch.Generator) -> Tensor:
    """Choose one token a row of `logits` ``[batch, vocabulary]``.

    Args:
        draw: a generator of the CPU, where the draw is made so that a seed means the same on every device.

    Returns:
        Token ids ``[batch]``, on the logits' device where nothing is drawn, else on the CPU.
    """
    if temperature <= 0:
        return logits.argmax(dim=-1)
    probabilities, order = (logits.float().cpu() / temperature).softmax(dim=-1).sort(dim=-1, descending=True)
    # A token stays while those before it have less than top_p, so the likeliest always stays.
    before = probabilities.cumsum(dim=-1) - probabilities
    probabilities = probabilities.masked_fill(before >= top_p, 0.0)
    probabilities[:, 0] = probabilities[:, 0].clamp(min=torch.finfo(torch.float32).tiny)
    return order.gather(-1, torch.multinomial(probabilities, 1, generator=draw))[:, 0]


def _ids(tokenizer: Any, prompt: Prompt) -> list[int]:
    ids = (
        tokenizer(prompt, add_special_tokens=False)["input_ids"] if isinstance(prompt, str) else list(prompt)
    )
    # An empty prompt becomes an end token, after which a document begins.
    return ids or [tokenizer.eos_token_id]


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class _TextWriter:
    """Turns tokens into text, holding back those that end in the middle of a character."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._held: list[int] = []

    def add(self, token: int) -> str:
        self._held.append(token)
        text = _decode(self._tokenizer, self._held)
        # A character of UTF-8 has at most four bytes: held back longer, it is not one.
        if text.endswith("\N{REPLACEMENT CHARACTER}") and len(self._held) < 4:
            return ""
        self._held = []
        return text

    def rest(self) -> str:
        text, self._held = _decode(self._tokenizer, self._held), []
        return text
