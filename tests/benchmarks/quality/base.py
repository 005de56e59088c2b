"""The models that learning is compared on: one trained for the purpose, and the same with outliers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconH1Config,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.activations import blocks_of
from falcon_qlora.models.layouts import layout_of
from tests.benchmarks.quality.sizes import Size
from tests.tiny_model.train import WINDOW, Settings, fit, untrained

OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 50.0
# Of a block, the one that attention reads first.
_NORMS = ("ln_attn", "input_layernorm", "ln_mlp", "post_attention_layernorm", "pre_ff_layernorm")
_HELD_OUT = 2**16
_GATHERING_SECONDS = 120


def configuration(family: str, vocabulary: int, hidden_size: int, layers: int) -> PreTrainedConfig:
    """A family's layout in small: Falcon-7B has 122 million parameters with 12 layers of 768."""
    return _FAMILIES[family](vocabulary, hidden_size, layers)


def _falcon(vocabulary: int, hidden_size: int, layers: int) -> FalconConfig:
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


def _falcon3(vocabulary: int, hidden_size: int, layers: int) -> LlamaConfig:
    return LlamaConfig(**_common(vocabulary, hidden_size, layers), rms_norm_eps=1e-6, rope_theta=1000042.0)


def _falcon_h1(vocabulary: int, hidden_size: int, layers: int) -> FalconH1Config:
    """Two groups, as 34B has, and multipliers like those of 7B's file."""
    return FalconH1Config(
        **_common(vocabulary, hidden_size, layers),
        rope_theta=1e11,
        mamba_d_ssm=2 * hidden_size,
        mamba_n_heads=hidden_size // 32,
        mamba_d_head=64,
        mamba_d_state=64,
        mamba_n_groups=2,
        mamba_chunk_size=128,
        mamba_rms_norm=True,
        mamba_norm_before_gate=False,
        embedding_multiplier=5.0,
        lm_head_multiplier=0.2,
        key_multiplier=0.4,
        attention_out_multiplier=0.8,
        ssm_in_multiplier=0.9,
        ssm_out_multiplier=0.6,
        mlp_multipliers=[0.7, 0.5],
        ssm_multipliers=[0.7, 0.5, 0.7, 0.5, 0.7],
        time_step_limit=(0.0, float("inf")),
    )


def _common(vocabulary: int, hidden_size: int, layers: int) -> dict[str, Any]:
    return {
        "vocab_size": vocabulary,
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden_size // 32,
        "num_key_value_heads": hidden_size // 64,
        "head_dim": 64,  # twice hidden / heads, as in no other
        "tie_word_embeddings": False,
        "max_position_embeddings": 2048,
        "bos_token_id": 11,
        "eos_token_id": 11,
        "pad_token_id": None,
    }


_FAMILIES: dict[str, Callable[[int, int, int], PreTrainedConfig]] = {
    "falcon": _falcon,
    "falcon3": _falcon3,
    "falcon-h1": _falcon_h1,
}
FAMILIES = tuple(_FAMILIES)


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


def train_on_gathered(
    out: Path, tokenizer: Any, size: Size, family: str, seconds: float, device: torch.device
) -> str:
    """Train the base in ``out/base`` on the tokens of ``out/tokens.npy``.

    Returns:
        What came of it, for the report.
    """
    config = configuration(family, len(tokenizer), size.hidden_size, size.layers)
    notes = train_base(out / "tokens.npy", out / "base", config, size.base_settings(seconds), device)
    (out / "base" / "training.json").write_text(json.dumps(notes, indent=1) + "\n")
    last = notes[-1]
    return (
        f"{last['tokens']:,} tokens in {last['seconds']} s, held-out loss {last['held_out_loss']['text']:.3f}"
    )


def train_base(
    tokens: Path, folder: Path, config: PreTrainedConfig, settings: Settings, device: torch.device
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
def put_outliers_in(model: PreTrainedModel, seed: int = 0) -> None:
    """Make a few channels of every block's norms large without changing what the model computes.

    A channel's weight and bias are multiplied, and the columns that read it divided by the same. The last
    norm stays as it is: what reads it is the output head, and that is the embedding too.

    Args:
        model: float32, of any layout.
        seed: of the channels.
    """
    generator = torch.Generator().manual_seed(seed)
    layout = layout_of(model.config)
    for block in blocks_of(model):
        children = dict(block.named_children())
        first, *second = [children[name] for name in _NORMS if name in children]
        readers = {norm: list[Any]() for norm in (first, *second)}
        for norm, names in (
            (first, layout.attention_inputs),
            (second[0] if second else first, layout.feed_forward_inputs),
        ):
            readers[norm] += [block.get_submodule(layout.linears[name]) for name in names]
        for norm, linears in readers.items():
            channels = torch.randperm(norm.weight.numel(), generator=generator)[:OUTLIER_CHANNELS]
            for parameter in norm.parameters():
                parameter[channels] *= OUTLIER_FACTOR
            for linear in linears:
                linear.weight[:, channels] /= OUTLIER_FACTOR
