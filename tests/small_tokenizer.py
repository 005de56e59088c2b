"""A byte-level tokenizer like Falcon's, small enough to be made for every test."""

from __future__ import annotations

import functools
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

END = "<|endoftext|>"
_TEXT = [
    "Below is an instruction that describes a task.",
    "Write a response that appropriately completes the request.",
    "### Instruction: ### Input: ### Response: ### Human: ### Assistant: User: Assistant: System:",
    "the answer is yes, the question was what is the name of the river that runs through the town",
    "one two three four five six seven eight nine ten",
] * 4


@functools.lru_cache
def small_tokenizer(*, trim_offsets: bool = False) -> Any:
    """A fast tokenizer of some 400 entries whose only special token is the end token.

    Args:
        trim_offsets: leave the space out of the offsets of `` word``, as many published tokenizers do.
    """
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if trim_offsets:
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
