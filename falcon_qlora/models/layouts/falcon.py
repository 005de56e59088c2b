"""Falcon: the five layouts of ``FalconForCausalLM``, from rw-1b to 180B, and Falcon2's 11B."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from einops import rearrange

from falcon_qlora.models.layouts.base import OPTIONAL, Imported, Layout, published_rotation

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from falcon_qlora.models.packed_attention import Sequences

_MODEL = "transformers.models.falcon.modeling_falcon"


def _falcon(blocks: int, hidden: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": 65024,
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "parallel_attn": True,
        "new_decoder_architecture": "num_kv_heads" in more,
        **more,
    }


# Names of the same settings in configurations published before Falcon joined Transformers.
_OLD_NAMES = {
    "n_layer": "num_hidden_layers",
    "n_head": "num_attention_heads",
    "n_head_kv": "num_kv_heads",
    "n_embed": "hidden_size",
}
# In every published file; `published_config` adds what is only in some.
_PUBLISHED = tuple(
    "activation alibi attention_dropout bias bos_token_id eos_token_id ffn_hidden_size hidden_dropout "
    "hidden_size initializer_range layer_norm_epsilon max_position_embeddings multi_query "
    "new_decoder_architecture num_attention_heads num_hidden_layers parallel_attn tie_word_embeddings "
    "vocab_size".split()
)


class Falcon(Layout):
    """Queries, keys and values are one projection; attention and feed-forward are parallel except in rw."""

    family = "Falcon"
    published = "tiiuae/falcon-rw-1b, falcon-7b, falcon-11B, falcon-40b, falcon-180B"
    model_types = ("falcon", "RefinedWeb", "RefinedWebModel")
    presets = {
        "falcon-rw-1b": _falcon(
            24,
            2048,
            32,
            vocab_size=50304,
            alibi=True,
            bias=True,
            multi_query=False,
            parallel_attn=False,
            bos_token_id=1,
            eos_token_id=2,
        ),
        "falcon-7b": _falcon(32, 4544, 71, multi_query=True),
        "falcon-11b": _falcon(
            60,
            4096,
            32,
            num_kv_heads=8,
            num_ln_in_parallel_attn=1,
            max_position_embeddings=8192,
            rope_theta=500042.0,
            tie_word_embeddings=False,
        ),
        "falcon-40b": _falcon(60, 8192, 128, num_kv_heads=8),
        "falcon-180b": _falcon(80, 14848, 232, num_kv_heads=8),
    }
    tokenizers = {
        preset: f"tiiuae/{preset.replace('11b', '11B').replace('180b', '180B')}" for preset in presets
    }
    kept = (*_PUBLISHED, "num_kv_heads", "num_ln_in_parallel_attn", *OPTIONAL)
    defaults = {
        "vocab_size": 65024,
        "multi_query": True,
        "parallel_attn": True,
        "new_decoder_architecture": False,
        "num_ln_in_parallel_attn": None,
        "bias": False,
        "alibi": False,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": True,
        "activation": "gelu",
        "hidden_dropout": 0.0,
    }
    config_class = Imported("transformers.models.falcon.configuration_falcon", "FalconConfig")
    model_class = Imported(_MODEL, "FalconForCausalLM")
    backbone_class = Imported(_MODEL, "FalconModel")
    attention_class = Imported(_MODEL, "FalconAttention")
    norm_class = Imported("torch.nn", "LayerNorm")
    norm_vectors = 2
    backbone = "transformer"
    embedding = "word_embeddings"
    blocks = "h"
    final_norm = "ln_f"
    attention = "self_attention"
    linears = {
        "query_key_value": "self_attention.query_key_value",
        "dense": "self_attention.dense",
        "dense_h_to_4h": "mlp.dense_h_to_4h",
        "dense_4h_to_h": "mlp.dense_4h_to_h",
    }
    attention_inputs = ("query_key_value",)
    feed_forward_inputs = ("dense_h_to_4h",)
    query_projection = "query_key_value"
    output_projection = "dense"
    fused = "query_key_value"

    @classmethod
    def translated(cls, raw: dict[str, Any]) -> dict[str, Any]:
        settings = {_OLD_NAMES.get(name, name): value for name, value in raw.items()}
        if raw["model_type"] != "falcon":
            # The old code had no such switch: it used the 40B block wherever the key/value heads were given.
            settings.setdefault("new_decoder_architecture", "n_head_kv" in raw)
            settings.setdefault("multi_query", settings["new_decoder_architecture"])
            settings.setdefault("parallel_attn", False)
        if settings.get("new_decoder_architecture"):
            settings["parallel_attn"] = True  # always so there, whatever the file says
        return settings

    @classmethod
    def derived(cls, kept: dict[str, Any]) -> dict[str, Any]:
        return {"num_kv_heads": kept["num_attention_heads"], "ffn_hidden_size": 4 * kept["hidden_size"]}

    def _try_out(self) -> None:
        from torch import nn
        from transformers.activations import get_activation

        config = self.config
        if config.new_decoder_architecture and config.num_attention_heads % config.num_kv_heads:
            raise ValueError(
                f"{config.num_attention_heads} attention heads are no multiple of {config.num_kv_heads}"
            )
        get_activation(config.activation)
        nn.Dropout(config.hidden_dropout)
        nn.Dropout(config.attention_dropout)
        nn.LayerNorm(1, eps=float(config.layer_norm_epsilon))
        if not config.alibi:
            self.rotary_embedding()

    @property
    def position_limit(self) -> str:
        return (
            "ALiBi has no limit, but none was trained beyond" if self.config.alibi else super().position_limit
        )

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        config = self.config
        if config.new_decoder_architecture:
            kv_heads = config.num_kv_heads
        else:
            kv_heads = 1 if config.multi_query else config.num_attention_heads
        hidden, wide = config.hidden_size, config.ffn_hidden_size
        return {
            "query_key_value": ((config.num_attention_heads + 2 * kv_heads) * config.head_dim, hidden),
            "dense": (hidden, hidden),
            "dense_h_to_4h": (wide, hidden),
            "dense_4h_to_h": (hidden, wide),
        }

    @property
    def norms_per_block(self) -> int:
        config = self.config
        if config.new_decoder_architecture:
            return 2 if config.num_ln_in_parallel_attn in (None, 2) else 1
        return 1 if config.parallel_attn else 2

    @property
    def has_biases(self) -> bool:
        return bool(self.config.bias)

    def unlike_fast_block(self) -> str | None:
        config = self.config
        if config.alibi:
            return "positions by ALiBi"
        if not (config.parallel_attn or config.new_decoder_architecture):
            return "attention and feed-forward are not parallel"
        if self.has_biases or config.activation != "gelu":
            return super().unlike_fast_block() or f"activation {config.activation}"
        return f"hidden dropout {config.hidden_dropout:g}" if config.hidden_dropout else None

    def norm(self, module: nn.Module) -> nn.Module:
        from falcon_qlora.models.layouts.norms import SameDtypeLayerNorm

        assert isinstance(module, self.norm_class)
        return SameDtypeLayerNorm(module.normalized_shape, eps=module.eps)

    def rotary_embedding(self) -> nn.Module:
        from transformers.models.falcon.modeling_falcon import FalconRotaryEmbedding

        return FalconRotaryEmbedding(self.config)

    def block_arguments(self, backbone: Any, hidden: Tensor, sequences: Sequences) -> dict[str, Any]:
        alibi = None
        if self.config.alibi:
            alibi = alibi_bias(sequences, self.config.num_attention_heads, hidden.dtype)
        return {"alibi": alibi, **super().block_arguments(backbone, hidden, sequences)}

    def heads(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return split_heads(attention.query_key_value(hidden)[0], attention)

    def split(self, attention: Any, projected: Tensor) -> tuple[Tensor, ...]:
        return split_heads(projected, attention)

    def attention_dropout(self, attention: Any) -> float:
        # Transformers drops attention weights only in the layouts with ALiBi.
        return attention.attention_dropout.p if self.config.alibi else 0.0

    def published_config(self) -> dict[str, Any]:
        config = self.config
        record: dict[str, Any] = {"architectures": ["FalconForCausalLM"], "model_type": "falcon"}
        record |= {name: getattr(config, name) for name in _PUBLISHED}
        if config.new_decoder_architecture:
            # Only there: it is read as the number of key/value heads, which it is not in the other layouts.
            record["num_kv_heads"] = config.num_kv_heads
            record["num_ln_in_parallel_attn"] = config.num_ln_in_parallel_attn
        if not config.alibi:
            record |= published_rotation(config)
        return record


def split_heads(fused: Tensor, attention: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Split a block's fused projection, without copying keys and values to every query head.

    Args:
        fused: ``[T, width]``, the output of ``query_key_value``.
        attention: the ``FalconAttention`` it belongs to, which knows the layout.

    Returns:
        query ``[T, Q, D]``, key ``[T, G, D]``, value ``[T, G, D]``.
    """
    head_dim = attention.head_dim
    if attention.new_decoder_architecture:
        groups = rearrange(fused, "t (k group d) -> t k group d", k=attention.num_kv_heads, d=head_dim)
        query = rearrange(groups[:, :, :-2], "t k group d -> t (k group) d")
        return query, groups[:, :, -2], groups[:, :, -1]
    if attention.multi_query:
        heads = rearrange(fused, "t (heads d) -> t heads d", d=head_dim)
        return heads[:, :-2], heads[:, -2:-1], heads[:, -1:]
    query, key, value = rearrange(fused, "t (heads three d) -> three t heads d", three=3, d=head_dim)
    return query, key, value


def alibi_bias(sequences: Sequences, heads: int, dtype: torch.dtype) -> Tensor:
    """What ALiBi adds to the unscaled scores of each key, rounded as in Transformers: ``[T, heads]``."""
    import torch
    from transformers.models.falcon.modeling_falcon import build_alibi_tensor

    positions = sequences.position_ids[0]
    ones = torch.ones((1, sequences.max_length), dtype=torch.int64, device=positions.device)
    bias_HL = build_alibi_tensor(ones, heads, dtype)[:, 0]
    return bias_HL.T[positions]
