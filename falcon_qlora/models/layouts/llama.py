"""Falcon3: ``LlamaForCausalLM``.

A configuration does not say whether a Llama is a Falcon3 or a fine-tune of one. So every Llama is accepted
that is computed exactly as Falcon3 is: SwiGLU, linears without biases, rotary positions that are not
scaled. Any other is refused.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from einops import rearrange

from falcon_qlora.common.errors import UserError
from falcon_qlora.models.layouts.base import OPTIONAL, Imported, Layout, published_rotation

if TYPE_CHECKING:
    from torch import Tensor, nn

_MODEL = "transformers.models.llama.modeling_llama"

# In every published file; `published_config` adds what is only in some.
_PUBLISHED = tuple(
    "attention_bias attention_dropout bos_token_id eos_token_id head_dim hidden_act hidden_size "
    "initializer_range intermediate_size max_position_embeddings mlp_bias num_attention_heads "
    "num_hidden_layers num_key_value_heads rms_norm_eps tie_word_embeddings vocab_size".split()
)


def _falcon3(blocks: int, hidden: int, wide: int, heads: int, positions: int = 32768) -> dict[str, Any]:
    return {
        "vocab_size": 131072,
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": heads,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": positions,
        "rope_theta": 1000042.0,
        "bos_token_id": 11,
        "eos_token_id": 11,
    }


class Llama(Layout):
    """Queries, keys and values are separate projections; feed-forward follows attention."""

    family = "Falcon3"
    published = "tiiuae/Falcon3-1B-Base, Falcon3-3B-Base, Falcon3-7B-Base, Falcon3-10B-Base"
    model_types = ("llama",)
    presets = {
        "falcon3-1b": _falcon3(18, 2048, 8192, 8, positions=8192),
        "falcon3-3b": _falcon3(22, 3072, 9216, 12),
        "falcon3-7b": _falcon3(28, 3072, 23040, 12),
        "falcon3-10b": _falcon3(40, 3072, 23040, 12),
    }
    tokenizers = {preset: f"tiiuae/Falcon3-{preset.partition('-')[2].upper()}-Base" for preset in presets}
    kept = (*_PUBLISHED, *OPTIONAL)
    defaults = {
        "vocab_size": 32000,
        "intermediate_size": 11008,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": 2048,
        "rope_parameters": {"rope_type": "default"},
        "tie_word_embeddings": False,
        "attention_dropout": 0.0,
    }
    config_class = Imported("transformers.models.llama.configuration_llama", "LlamaConfig")
    model_class = Imported(_MODEL, "LlamaForCausalLM")
    backbone_class = Imported(_MODEL, "LlamaModel")
    attention_class = Imported(_MODEL, "LlamaAttention")
    norm_class = Imported(_MODEL, "LlamaRMSNorm")
    norm_vectors = 1
    norm_keeps_float32 = True
    backbone = "model"
    embedding = "embed_tokens"
    blocks = "layers"
    final_norm = "norm"
    attention = "self_attn"
    linears = {
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
        "gate_proj": "mlp.gate_proj",
        "up_proj": "mlp.up_proj",
        "down_proj": "mlp.down_proj",
    }
    attention_inputs = ("q_proj", "k_proj", "v_proj")
    feed_forward_inputs = ("gate_proj", "up_proj")
    query_projection = "q_proj"
    output_projection = "o_proj"
    residuals = 2

    @classmethod
    def derived(cls, kept: dict[str, Any]) -> dict[str, Any]:
        return {"num_key_value_heads": kept["num_attention_heads"]}

    @classmethod
    def check_kind(cls, config: Any, source: str) -> None:
        rope = config.rope_parameters["rope_type"]
        other = {
            f"its activation is {config.hidden_act}": config.hidden_act != "silu",
            "its linears have biases": config.attention_bias or config.mlp_bias,
            f"its rotary positions are scaled ({rope})": rope != "default",
        }
        for what in (what for what, is_so in other.items() if is_so):
            raise UserError(f"{source}: this Llama is not as {cls.family} is, which is trained here: {what}")

    def _try_out(self) -> None:
        from torch import nn

        config = self.config
        heads, keys = config.num_attention_heads, config.num_key_value_heads
        if heads % keys:
            raise ValueError(f"{heads} attention heads are no multiple of {keys}")
        if config.head_dim % 2:
            raise ValueError(f"head_dim {config.head_dim} is odd, and rotation goes by pairs")
        nn.Dropout(config.attention_dropout)
        self.norm(self.norm_class(1, eps=float(config.rms_norm_eps)))
        self.rotary_embedding()

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        config = self.config
        hidden, wide = config.hidden_size, config.intermediate_size
        queries, keys = (
            heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
        )
        return {
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
        }

    @property
    def norms_per_block(self) -> int:
        return 2

    def unlike_fast_block(self) -> str | None:
        config = self.config
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act}"
        if config.attention_dropout:
            return f"attention dropout {config.attention_dropout:g}"
        return super().unlike_fast_block()

    def norm(self, module: nn.Module) -> nn.Module:
        from falcon_qlora.models.layouts.norms import SameDtypeRMSNorm

        assert isinstance(module, self.norm_class)
        return SameDtypeRMSNorm(len(module.weight), eps=module.variance_epsilon)

    def rotary_embedding(self) -> nn.Module:
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        return LlamaRotaryEmbedding(self.config)

    def heads(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            rearrange(linear(hidden), "1 t (heads d) -> t heads d", d=attention.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key, value

    def split(self, attention: Any, projected: Tensor) -> tuple[Tensor, ...]:
        return (rearrange(projected, "t (heads d) -> t heads d", d=attention.head_dim),)

    def attention_dropout(self, attention: Any) -> float:
        return float(attention.attention_dropout)

    def published_config(self) -> dict[str, Any]:
        record: dict[str, Any] = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        record |= {name: getattr(self.config, name) for name in _PUBLISHED}
        return record | published_rotation(self.config)
