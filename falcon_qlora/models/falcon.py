"""What each Falcon layout is: shapes, names of its linears, counts and FLOPs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from transformers import FalconConfig

from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.common.untrusted import is_count

PRESETS: dict[str, dict[str, Any]] = {
    "falcon-rw-1b": {
        "vocab_size": 50304,
        "hidden_size": 2048,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
        "alibi": True,
        "bias": True,
        "multi_query": False,
        "parallel_attn": False,
        "new_decoder_architecture": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "falcon-7b": {
        "vocab_size": 65024,
        "hidden_size": 4544,
        "num_hidden_layers": 32,
        "num_attention_heads": 71,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
    },
    "falcon-11b": {
        "vocab_size": 65024,
        "hidden_size": 4096,
        "num_hidden_layers": 60,
        "num_attention_heads": 32,
        "num_kv_heads": 8,
        "num_ln_in_parallel_attn": 1,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "max_position_embeddings": 8192,
        "rope_theta": 500042.0,
        "tie_word_embeddings": False,
    },
    "falcon-40b": {
        "vocab_size": 65024,
        "hidden_size": 8192,
        "num_hidden_layers": 60,
        "num_attention_heads": 128,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "parallel_attn": True,
    },
    "falcon-180b": {
        "vocab_size": 65024,
        "hidden_size": 14848,
        "num_hidden_layers": 80,
        "num_attention_heads": 232,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "parallel_attn": True,
    },
}
"""The published models' shapes, as arguments of ``FalconConfig``."""

LINEARS = ("query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h")
"""The linears of a block, by the last part of their name."""

_MODULE_OF_LINEAR = {
    "query_key_value": "self_attention.query_key_value",
    "dense": "self_attention.dense",
    "dense_h_to_4h": "mlp.dense_h_to_4h",
    "dense_4h_to_h": "mlp.dense_4h_to_h",
}

# Names that the configurations published before Falcon joined Transformers give to the same things.
_OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}
# Far beyond any published model: what is larger is a mistake, or meant to exhaust the machine.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_hidden_layers": 2**12,
    "num_attention_heads": 2**14,
    "num_kv_heads": 2**14,
    "ffn_hidden_size": 2**20,
    "max_position_embeddings": 2**28,
}
_OLD_MODEL_TYPES = ("RefinedWeb", "RefinedWebModel")
_NOT_CLASSIC = {
    "llama": "a Llama (as Falcon3 models are)",
    "falcon_h1": "a Falcon-H1",
    "falcon_mamba": "a Falcon-Mamba",
    "mamba": "a Mamba",
}
_KEPT = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_kv_heads",
    "num_ln_in_parallel_attn",
    "layer_norm_epsilon",
    "initializer_range",
    "hidden_dropout",
    "attention_dropout",
    "alibi",
    "new_decoder_architecture",
    "multi_query",
    "parallel_attn",
    "bias",
    "max_position_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "ffn_hidden_size",
    "activation",
    "tie_word_embeddings",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
)


def read_config(raw: dict[str, Any], *, source: str = "config.json") -> FalconConfig:
    """Turn a published ``config.json`` into a ``FalconConfig``, old names (RefinedWeb) included.

    Args:
        raw: the parsed file.
        source: where it was read, for messages.

    Raises:
        UserError: if the model is not a classic Falcon, or a size is missing.
    """
    model_type = raw.get("model_type")
    if model_type != "falcon" and model_type not in _OLD_MODEL_TYPES:
        what = _NOT_CLASSIC.get(str(model_type), f"of type {model_type!r}")
        raise UserError(
            f"{source}: this model is {what}, not a classic Falcon. falcon_qlora trains the classic layouts: "
            "tiiuae/falcon-rw-1b, falcon-7b, falcon-11B, falcon-40b, falcon-180B and their fine-tunes."
        )
    settings = {_OLD_NAMES.get(name, name): value for name, value in raw.items()}
    missing = [n for n in ("hidden_size", "num_hidden_layers", "num_attention_heads") if n not in settings]
    if missing:
        raise UserError(f"{source}: {', '.join(missing)} missing; is the file complete?")
    if model_type in _OLD_MODEL_TYPES:
        # The old code had no such switch: it used the 40B block wherever the key/value heads were counted.
        settings.setdefault("new_decoder_architecture", "n_head_kv" in raw)
        settings.setdefault("multi_query", settings["new_decoder_architecture"])
        settings.setdefault("parallel_attn", False)
    if settings.get("new_decoder_architecture"):
        settings["parallel_attn"] = True  # always so there; some files say otherwise and were never read
    kept = {name: settings[name] for name in _KEPT if settings.get(name) is not None}
    _check_sizes(kept, source)
    try:
        config = FalconConfig(**kept)
        _try_out(config)
        return config
    except Exception as error:  # its checks raise errors of several libraries
        reason = one_line(error)
        raise UserError(f"{source}: not the configuration of a Falcon: {reason}") from None


def _try_out(config: FalconConfig) -> None:
    """Use the settings that the configuration's own checks let pass whatever they are."""
    from torch import nn
    from transformers.activations import get_activation
    from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

    get_activation(config.activation)
    nn.Dropout(config.hidden_dropout)
    nn.Dropout(config.attention_dropout)
    nn.LayerNorm(1, eps=float(config.layer_norm_epsilon))
    if not config.alibi:
        FalconRotaryEmbedding(config)


def _check_sizes(settings: dict[str, Any], source: str) -> None:
    for name, largest in _LARGEST.items():
        value = settings.get(name, 1)
        if not is_count(value, least=1, most=largest):
            raise UserError(f"{source}: {name} is {str(value)[:40]!r}; expected 1 to {largest:,}")
    heads = settings["num_attention_heads"]
    if settings["hidden_size"] % heads:
        raise UserError(
            f"{source}: hidden_size {settings['hidden_size']} is no multiple of {heads} attention heads"
        )
    if settings.get("new_decoder_architecture") and heads % settings.get("num_kv_heads", heads):
        raise UserError(f"{source}: {heads} attention heads are no multiple of {settings['num_kv_heads']}")


def preset_config(name: str, **overrides: Any) -> FalconConfig:
    """The configuration of a published model, with single values replaced."""
    return FalconConfig(**{**PRESETS[name], **overrides})


def linear_shapes(config: FalconConfig) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of each linear of a block, by the last part of its name."""
    hidden, head_dim = config.hidden_size, config.hidden_size // config.num_attention_heads
    if config.new_decoder_architecture:
        kv_heads = config.num_kv_heads
    else:
        kv_heads = 1 if config.multi_query else config.num_attention_heads
    return {
        "query_key_value": ((config.num_attention_heads + 2 * kv_heads) * head_dim, hidden),
        "dense": (hidden, hidden),
        "dense_h_to_4h": (config.ffn_hidden_size, hidden),
        "dense_4h_to_h": (hidden, config.ffn_hidden_size),
    }


def expected_linears(config: FalconConfig) -> list[str]:
    """Full module names of every linear of every block, in order; never the output head."""
    return [
        f"transformer.h.{block}.{_MODULE_OF_LINEAR[linear]}"
        for block in range(config.num_hidden_layers)
        for linear in LINEARS
    ]


def norms_per_block(config: FalconConfig) -> int:
    if config.new_decoder_architecture:
        return 2 if config.num_ln_in_parallel_attn in (None, 2) else 1
    return 1 if config.parallel_attn else 2


def linear_parameter_count(config: FalconConfig) -> int:
    """Weights of every linear of every block: what is quantized."""
    return config.num_hidden_layers * sum(out * into for out, into in linear_shapes(config).values())


def head_count(config: FalconConfig) -> int:
    """How many matrices of vocabulary times hidden there are: one where the head is tied to the embedding."""
    return 1 if config.tie_word_embeddings else 2


def base_parameter_kinds(config: FalconConfig) -> dict[str, int]:
    """Parameters by kind; no output head where it is tied to the embedding."""
    blocks, shapes = config.num_hidden_layers, linear_shapes(config)
    kinds = {name: blocks * out * into for name, (out, into) in shapes.items()}
    if config.bias:
        kinds["biases"] = blocks * sum(out for out, _ in shapes.values())
    kinds["norms"] = 2 * config.hidden_size * (blocks * norms_per_block(config) + 1)
    kinds["embedding"] = config.vocab_size * config.hidden_size
    if head_count(config) == 2:
        kinds["output head"] = kinds["embedding"]
    return kinds


def parameter_count(config: FalconConfig) -> int:
    """All parameters, a head tied to the embedding counted once."""
    return sum(base_parameter_kinds(config).values())


def flops_per_token(config: FalconConfig, sequence_length: int = 0) -> int:
    """Floating-point operations of one token's forward pass, the output head included.

    Args:
        config: the model.
        sequence_length: tokens of the document, for the attention's share (causal: half of them on average).
    """
    head = config.vocab_size * config.hidden_size
    attention = 2 * config.num_hidden_layers * config.hidden_size * sequence_length // 2
    return 2 * (linear_parameter_count(config) + head + attention)


def lora_parameter_count(config: FalconConfig, *, r: int, target_modules: Iterable[str] = LINEARS) -> int:
    """Trainable parameters of LoRA of rank `r` on these linears of every block."""
    shapes = linear_shapes(config)
    return config.num_hidden_layers * r * sum(sum(shapes[name]) for name in set(target_modules))
