"""The models that learning is compared on: a Falcon trained for the purpose, and the same with outliers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, FalconConfig, FalconForCausalLM

from falcon_qlora.common.errors import UserError
from tests.benchmarks.quality.sizes import Size
from tests.tiny_model.train import WINDOW, Settings, fit, untrained

OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 50.0
_HELD_OUT = 2**16
_GATHERING_SECONDS = 120


def configuration(vocabulary: int, hidden_size: int, layers: int) -> FalconConfig:
    """Falcon-7B's layout in small: 122 million parameters with 12 layers of 768."""
    return FalconConfig(
        vocab_size=vocabulary,
        hidden_size=hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=11,
        eos_token_id=11,
        architectures=["FalconForCausalLM"],
    )


class Gathering:
    """Text that another process is reading and tokenizing."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process

    def wait(self) -> None:
        """Until the text is there; ends the program if it will not be."""
        try:
            status = self._process.wait(_GATHERING_SECONDS)
        except subprocess.TimeoutExpired:
            raise SystemExit(f"the text was not there after {_GATHERING_SECONDS} s") from None
        if status:
            raise SystemExit("the text could not be gathered; see above")


@contextmanager
def gathering(tokens: Path, tokenizer: Path, megabytes: float, text: Path | None) -> Iterator[Gathering]:
    """Start to gather text into the file `tokens`; whatever still runs is ended on leaving."""
    command = [sys.executable, "-m", "tests.benchmarks.quality.corpus", "--megabytes", str(megabytes)]
    command += ["--tokenizer", str(tokenizer), "--out", str(tokens)]
    command += ["--text", str(text)] if text else []
    process = subprocess.Popen(command, start_new_session=True)
    try:
        yield Gathering(process)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)  # with the processes that it started
            process.wait()


def train_on_gathered(out: Path, tokenizer: Any, size: Size, seconds: float, device: torch.device) -> str:
    """Train the base in ``out/base`` on the tokens of ``out/tokens.npy``.

    Returns:
        What came of it, for the report.
    """
    config = configuration(len(tokenizer), size.hidden_size, size.layers)
    notes = train_base(out / "tokens.npy", out / "base", config, size.base_settings(seconds), device)
    (out / "base" / "training.json").write_text(json.dumps(notes, indent=1) + "\n")
    last = notes[-1]
    return (
        f"{last['tokens']:,} tokens in {last['seconds']} s, held-out loss {last['held_out_loss']['text']:.3f}"
    )


def train_base(
    tokens: Path, folder: Path, config: FalconConfig, settings: Settings, device: torch.device
) -> list[dict[str, Any]]:
    """Train a model of `config` from scratch on the tokens of a file and save it to `folder`.

    Returns:
        Ten notes of how far it had come.

    Raises:
        UserError: if the tokens are too few.
    """
    torch.manual_seed(settings.seed)
    all_tokens = torch.from_numpy(np.load(tokens).astype(np.int32)).to(device)
    held_out = min(_HELD_OUT, len(all_tokens) // 20)
    if held_out <= WINDOW:
        raise UserError(f"{tokens} holds {len(all_tokens):,} tokens: too few to train a base on.")
    with device:
        model = untrained(config)
    notes = fit(model, all_tokens[:-held_out], {"text": all_tokens[-held_out:].long()}, settings)
    model.save_pretrained(folder)
    return notes


def save_with_outliers(base: Path, folder: Path, seed: int = 0) -> None:
    """Put outliers into the model of one folder and save it to another."""
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    put_outliers_in(model, seed)
    model.save_pretrained(folder)


@torch.no_grad()
def put_outliers_in(model: FalconForCausalLM, seed: int = 0) -> None:
    """Make a few channels of every block's norms large without changing what the model computes.

    A channel's weight and bias are multiplied, and the columns that read it divided by the same. The last
    norm stays as it is: what reads it is the output head, and that is the embedding too.

    Args:
        model: float32, of any layout.
        seed: of the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    for block in model.transformer.h:
        attention, mlp = block.self_attention.query_key_value, block.mlp.dense_h_to_4h
        if hasattr(block, "ln_attn"):
            readers = {block.ln_attn: [attention], block.ln_mlp: [mlp]}
        elif block.config.parallel_attn:
            readers = {block.input_layernorm: [attention, mlp]}
        else:
            readers = {block.input_layernorm: [attention], block.post_attention_layernorm: [mlp]}
        for norm, linears in readers.items():
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:OUTLIER_CHANNELS]
            norm.weight[channels] *= OUTLIER_FACTOR
            norm.bias[channels] *= OUTLIER_FACTOR
            for linear in linears:
                linear.weight[:, channels] /= OUTLIER_FACTOR
