"""Training the packaged model from scratch, on a GPU in minutes or, worse, on a CPU.

The model is `FalconForCausalLM`; its forward pass is written out here for full windows of one length, where
causal attention needs no mask, so that it runs in fused kernels and compiles into few.
"""

from __future__ import annotations

import json
import math
import platform
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    FalconForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers import __version__ as transformers_version

from falcon_qlora.models.forward import enable_packing
from falcon_qlora.models.packed_attention import Sequences

WINDOW = 512


def configuration(vocabulary: int) -> FalconConfig:
    """Falcon-7B's layout, small: one key/value head, parallel blocks, rotary positions, tied head."""
    return FalconConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        num_hidden_layers=5,
        num_attention_heads=4,
        multi_query=True,
        parallel_attn=True,
        new_decoder_architecture=False,
        alibi=False,
        bias=False,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        bos_token_id=0,
        eos_token_id=0,
        architectures=["FalconForCausalLM"],
        dtype="bfloat16",
    )


def window_logits(model: FalconForCausalLM, ids: Tensor) -> Tensor:
    """Next-token logits ``[batch, window, vocabulary]`` of `ids` ``[batch, window]``, without padding."""
    config = model.config
    heads, size = config.num_attention_heads, config.hidden_size // config.num_attention_heads
    batch, window = ids.shape
    angles = torch.arange(window, device=ids.device)[:, None] * model.transformer.rotary_emb.inv_freq[None, :]
    angles = torch.cat([angles, angles], dim=-1)
    cosine, sine = angles.cos(), angles.sin()

    def rotated(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., size // 2 :], x[..., : size // 2]], dim=-1)
        return (x * cosine + half * sine).to(x.dtype)

    hidden = model.transformer.word_embeddings(ids)
    for block in model.transformer.h:
        normed = block.input_layernorm(hidden)
        fused = F.linear(normed, block.self_attention.query_key_value.weight)
        fused = fused.view(batch, window, heads + 2, size).transpose(1, 2)
        query = rotated(fused[:, :heads])
        key = rotated(fused[:, heads : heads + 1]).expand_as(query)
        value = fused[:, heads + 1 :].expand_as(query)
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        attended = attended.transpose(1, 2).reshape(batch, window, heads * size)
        wide = F.gelu(F.linear(normed, block.mlp.dense_h_to_4h.weight))
        hidden = (
            hidden
            + F.linear(attended, block.self_attention.dense.weight)
            + F.linear(wide, block.mlp.dense_4h_to_h.weight)
        )
    return F.linear(model.transformer.ln_f(hidden), model.transformer.word_embeddings.weight)


def window_loss(model: PreTrainedModel, windows: Tensor) -> Tensor:
    """Mean cross entropy, in nats a token, of `windows` ``[batch, window + 1]``."""
    ids, targets = windows[:, :-1], windows[:, 1:].flatten()
    if isinstance(model, FalconForCausalLM):
        return F.cross_entropy(window_logits(model, ids).float().flatten(0, 1), targets)
    # Packed: without mamba-ssm Transformers' own Falcon-H1 is fifty times slower.
    sequences = Sequences.from_lengths([ids.shape[1]] * len(ids), ids.device)
    places = torch.arange(len(targets), device=ids.device)
    packed = ids.reshape(1, -1)
    output = model(input_ids=packed, sequences=sequences, target_positions=places, targets=targets)
    return output.loss / len(targets)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long and how to train.

    Attributes:
        minutes: stop after this long.
        epochs: or after so many passes over the text.
        batch_tokens: tokens of a step.
        learning_rate: the highest; it warms up and then follows a cosine to zero.
        compile_model: compile the forward pass where that works.
        seed: of the weights and the order of the windows.
    """

    minutes: float
    epochs: float
    batch_tokens: int
    learning_rate: float
    compile_model: bool
    seed: int


def train(corpus: Path, out: Path, settings: Settings) -> dict[str, Any]:
    """Train on what `tests.tiny_model.corpus.gather` wrote to `corpus`; save the model to `out`.

    Returns:
        The record, also written to ``training.json``: settings, losses in nats a token, versions.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(settings.seed)
    torch.set_float32_matmul_precision("high")
    arrays = np.load(corpus / "tokens.npz")
    tokens = torch.from_numpy(arrays["train"].astype(np.int32)).to(device)
    held_out = {name: torch.from_numpy(arrays[name].astype(np.int64)).to(device) for name in _HELD_OUT}
    about = json.loads((corpus / "corpus.json").read_text())

    model = untrained(configuration(about["vocabulary"])).to(device)
    progress = fit(model, tokens, held_out, settings)
    record = {
        "held_out_loss": progress[-1]["held_out_loss"],
        "unigram_loss": {
            name: _unigram_loss(tokens, held_out[name], about["vocabulary"]) for name in _HELD_OUT
        },
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "settings": {**asdict(settings), "window": WINDOW},
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
        "corpus": about,
        "progress": progress,
    }
    _save(model, corpus, out, record)
    return record


_HELD_OUT = ("documentation", "generated")


def untrained(config: PreTrainedConfig) -> PreTrainedModel:
    """A float32 model to train: what Falcon adds to the residual stream starts smaller the deeper it is."""
    model = AutoModelForCausalLM.from_config(config).float()
    if not isinstance(model, FalconForCausalLM):
        enable_packing(model)
        return model
    for block in model.transformer.h:
        for last in (block.self_attention.dense, block.mlp.dense_4h_to_h):
            last.weight.data.mul_(1 / math.sqrt(2 * len(model.transformer.h)))
    return model


def fit(
    model: PreTrainedModel, tokens: Tensor, held_out: dict[str, Tensor], settings: Settings
) -> list[dict[str, Any]]:
    """Train `model` in place.

    The schedule follows the nearer of the two limits, time and passes, so that it always ends at zero.

    Args:
        model: from `untrained`; a Falcon has the layout that `window_logits` computes.
        tokens: ``[n]``, on the model's device.
        held_out: name → int64 ``[m]``, on the model's device.
        settings: how long and how.

    Returns:
        Ten notes of how far it had come, the last after the last step.
    """
    device = tokens.device
    batch = settings.batch_tokens // WINDOW
    optimizer = _optimizer(model, settings.learning_rate, device)
    loss_of = _loss_function(model, device, settings.compile_model, batch)
    windows = _windows(tokens, batch, settings.seed)
    planned = tokens.numel() * settings.epochs
    started = time.monotonic()
    step, used, done = 0, 0, 0.0
    notes: list[dict[str, Any]] = []
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * _schedule(step, done)
        with _autocast(device):
            loss = loss_of(next(windows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step, used = step + 1, used + batch * WINDOW
        if step % 20 == 0:
            loss.item()  # the clock below must not run ahead of the device
        seconds = time.monotonic() - started
        done = max(used / planned, seconds / (60 * settings.minutes))
        if done < 0.1 * (len(notes) + 1) and done < 1:
            continue
        # On the way a part of the held-out text will do.
        some = None if done >= 1 else 16 * WINDOW
        losses = {name: held_out_loss(model, held_out[name][:some]) for name in held_out}
        notes.append({"step": step, "tokens": used, "seconds": round(seconds), "held_out_loss": losses})
        shown = ", ".join(f"{name} {value:.3f}" for name, value in losses.items())
        print(
            f"step {step}  {used / seconds:,.0f} tokens/s  train {loss.item():.3f}  held out: {shown}",
            flush=True,
        )
    return notes


def _autocast(device: torch.device) -> torch.autocast:
    """Bfloat16 on a GPU; many CPUs emulate it, slowly."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def _optimizer(model: PreTrainedModel, learning_rate: float, device: torch.device) -> torch.optim.Optimizer:
    matrices = [parameter for parameter in model.parameters() if parameter.ndim > 1]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=device.type == "cuda")


def _loss_function(
    model: PreTrainedModel, device: torch.device, compile_model: bool, batch: int
) -> Callable[[Tensor], Tensor]:
    """`window_loss` of `model`, compiled where that is asked for and works."""

    def plain(windows: Tensor) -> Tensor:
        return window_loss(model, windows)

    if not compile_model or device.type != "cuda":
        return plain
    try:
        compiled = torch.compile(plain)
        started = time.monotonic()
        with torch.autocast(device.type, dtype=torch.bfloat16):
            compiled(torch.zeros(batch, WINDOW + 1, dtype=torch.int64, device=device)).backward()
        torch.cuda.synchronize()
        print(f"compiled in {time.monotonic() - started:.0f} s", flush=True)
    except Exception as error:  # a missing compiler is no reason not to train
        print(f"not compiled ({type(error).__name__}: {str(error)[:200]}); going on without", flush=True)
        compiled = plain
    model.zero_grad(set_to_none=True)
    return compiled


def _windows(tokens: Tensor, batch: int, seed: int) -> Iterator[Tensor]:
    """Yield ``[batch, WINDOW + 1]`` int64 windows without end; each pass is cut at another offset."""
    generator = torch.Generator().manual_seed(seed)
    reach = torch.arange(WINDOW + 1, device=tokens.device)
    left = torch.zeros(0, dtype=torch.int64)
    while True:
        while left.numel() < batch:
            offset = int(torch.randint(WINDOW, (1,), generator=generator))
            starts = torch.arange(offset, tokens.numel() - WINDOW - 1, WINDOW)
            left = torch.cat([left, starts[torch.randperm(starts.numel(), generator=generator)]])
        chosen, left = left[:batch].to(tokens.device), left[batch:]
        yield tokens[chosen[:, None] + reach].long()


def _schedule(step: int, progress: float) -> float:
    """Warm-up over 100 steps or a tenth of the way, and a cosine from 1 to 0 over `progress`."""
    return min(1.0, max((step + 1) / 100, 10 * progress)) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


@torch.no_grad()
def held_out_loss(model: PreTrainedModel, tokens: Tensor, batch: int = 32) -> float:
    """Mean loss, in nats a token, over `tokens` ``[n]`` in windows of up to `WINDOW`."""
    windows = [tokens[start : start + WINDOW + 1] for start in range(0, tokens.numel() - 1, WINDOW)]
    total = 0.0
    full = [window for window in windows if window.numel() == WINDOW + 1]
    groups = [torch.stack(full[start : start + batch]) for start in range(0, len(full), batch)]
    groups += [window[None] for window in windows if window.numel() <= WINDOW]
    for group in groups:
        with _autocast(tokens.device):
            total += window_loss(model, group).item() * group[:, 1:].numel()
    return total / (tokens.numel() - 1)


def _unigram_loss(train: Tensor, held_out: Tensor, vocabulary: int) -> float:
    """Loss of guessing every token by how often it occurs in `train`."""
    counts = torch.bincount(train, minlength=vocabulary).double() + 1
    return float(-(counts / counts.sum()).log()[held_out[1:]].mean())


def _save(model: PreTrainedModel, corpus: Path, out: Path, record: dict[str, Any]) -> None:
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)
    for name in ("tokenizer.json", "tokenizer_config.json", "held_out.json"):
        shutil.copyfile(corpus / name, out / name)
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n")
