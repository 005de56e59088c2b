"""Falcon-H1: ``FalconH1ForCausalLM``, attention and a state space (Mamba-2's SSD) side by side in each block.

On the reference path its multipliers act in the same places as in Transformers, and between ``in_proj`` and
``out_proj`` everything is float32, whatever the activations' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from einops import rearrange

from falcon_qlora.common.errors import UserError
from falcon_qlora.common.untrusted import is_count, is_number
from falcon_qlora.kernels.chunks import FAST_SSD_TOKENS, SSD_TOKENS
from falcon_qlora.models.layouts.base import OPTIONAL, Imported, Layout, published_rotation

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from falcon_qlora.kernels.ssd import StateSpace
    from falcon_qlora.models.packed_attention import Sequences

_MODEL = "transformers.models.falcon_h1.modeling_falcon_h1"

# In every published file; `published_config` adds what is only in some.
_PUBLISHED = tuple(
    "attention_bias attention_dropout attention_in_multiplier attention_out_multiplier bos_token_id "
    "embedding_multiplier eos_token_id hidden_act hidden_size initializer_range intermediate_size "
    "key_multiplier lm_head_multiplier mamba_chunk_size mamba_conv_bias mamba_d_conv mamba_d_head "
    "mamba_d_ssm mamba_d_state mamba_expand mamba_n_groups mamba_n_heads mamba_norm_before_gate "
    "mamba_proj_bias mamba_rms_norm max_position_embeddings mlp_bias mlp_multipliers num_attention_heads "
    "num_hidden_layers num_key_value_heads num_logits_to_keep projectors_bias rms_norm_eps "
    "ssm_in_multiplier ssm_multipliers ssm_out_multiplier tie_word_embeddings vocab_size".split()
)
_MULTIPLIERS = {"mlp_multipliers": 2, "ssm_multipliers": 5} | dict.fromkeys(
    "attention_in_multiplier attention_out_multiplier embedding_multiplier key_multiplier lm_head_multiplier "
    "ssm_in_multiplier ssm_out_multiplier".split(),
    1,
)
_NO_LIMIT = (0.0, math.inf)  # of Δ
_LARGEST_FLOAT32 = 3e38


def _falcon_h1(
    blocks: int, hidden: int, wide: int, heads: tuple[int, int, int], ssd: tuple[int, int, int], **more: Any
) -> dict[str, Any]:
    (queries, keys, head), (mixers, width, state) = heads, ssd
    return {
        "num_hidden_layers": blocks,
        "hidden_size": hidden,
        "intermediate_size": wide,
        "num_attention_heads": queries,
        "num_key_value_heads": keys,
        "head_dim": head,
        "mamba_n_heads": mixers,
        "mamba_d_head": width,
        "mamba_d_ssm": mixers * width,
        "mamba_d_state": state,
        "mamba_chunk_size": 128,
        "mamba_norm_before_gate": False,
        "mamba_rms_norm": True,
        "rope_theta": 1e11,
        "bos_token_id": 1,
        "eos_token_id": 11,
        **more,
    }


class FalconH1(Layout):
    """Attention and the state space share one norm and one residual; feed-forward follows."""

    family = "Falcon-H1"
    published = "tiiuae/Falcon-H1-0.5B-Base, Falcon-H1-1.5B-Deep-Base, Falcon-H1-7B-Base, Falcon-H1-34B-Base"
    model_types = ("falcon_h1",)
    # For random weights, with which multipliers of 1 do as well. 7B's are those of its file.
    presets = {
        "falcon-h1-0.5b": _falcon_h1(
            *(36, 1024, 2048, (8, 2, 64), (24, 64, 128)),
            vocab_size=32784,
            mamba_rms_norm=False,
            max_position_embeddings=16384,
        ),
        "falcon-h1-1.5b-deep": _falcon_h1(
            *(66, 1280, 3072, (6, 2, 128), (24, 64, 256)),
            vocab_size=65537,
            max_position_embeddings=131072,
        ),
        "falcon-h1-7b": _falcon_h1(
            *(44, 3072, 12288, (12, 2, 128), (24, 128, 256)),
            vocab_size=130049,
            max_position_embeddings=262144,
            mamba_chunk_size=256,
            embedding_multiplier=5.656854,
            lm_head_multiplier=0.0130208,
            key_multiplier=0.0306904,
            attention_out_multiplier=0.1041667,
            ssm_in_multiplier=0.4166667,
            ssm_out_multiplier=0.1178511,
            mlp_multipliers=[0.2946278, 0.0325521],
            ssm_multipliers=[0.3535534, 0.25, 0.1767767, 0.5, 0.3535534],
        ),
        "falcon-h1-34b": _falcon_h1(
            *(72, 5120, 21504, (20, 4, 128), (32, 128, 256)),
            vocab_size=261120,
            max_position_embeddings=262144,
            mamba_n_groups=2,
        ),
    }
    tokenizers = {
        "falcon-h1-0.5b": "tiiuae/Falcon-H1-0.5B-Base",
        "falcon-h1-1.5b-deep": "tiiuae/Falcon-H1-1.5B-Deep-Base",
        "falcon-h1-7b": "tiiuae/Falcon-H1-7B-Base",
        "falcon-h1-34b": "tiiuae/Falcon-H1-34B-Base",
    }
    kept = (*_PUBLISHED, "head_dim", "time_step_limit", *OPTIONAL)
    defaults = {
        "vocab_size": 128000,
        "intermediate_size": 14336,
        "num_key_value_heads": 8,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default"},
        "mamba_d_ssm": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_conv_bias": True,
        "mamba_rms_norm": False,
        "attention_dropout": 0.0,
        "attention_in_multiplier": 1.0,
        "key_multiplier": 1.0,
        **dict.fromkeys(("attention_bias", "mlp_bias", "mamba_proj_bias", "projectors_bias"), False),
    }
    config_class = Imported("transformers.models.falcon_h1.configuration_falcon_h1", "FalconH1Config")
    model_class = Imported(_MODEL, "FalconH1ForCausalLM")
    backbone_class = Imported(_MODEL, "FalconH1Model")
    attention_class = Imported(_MODEL, "FalconH1Attention")
    norm_class = Imported(_MODEL, "FalconH1RMSNorm")
    norm_vectors = 1
    norm_keeps_float32 = True
    backbone = "model"
    embedding = "embed_tokens"
    blocks = "layers"
    final_norm = "final_layernorm"
    attention = "self_attn"
    linears = {
        "gate_proj": "feed_forward.gate_proj",
        "up_proj": "feed_forward.up_proj",
        "down_proj": "feed_forward.down_proj",
        "in_proj": "mamba.in_proj",
        "out_proj": "mamba.out_proj",
        "q_proj": "self_attn.q_proj",
        "k_proj": "self_attn.k_proj",
        "v_proj": "self_attn.v_proj",
        "o_proj": "self_attn.o_proj",
    }
    not_for_peft = {
        "out_proj": "PEFT 0.21 refuses it on a Falcon-H1, as mamba-ssm's training kernel would pass it over"
    }
    no_prefix = "what a prefix does beside a state space was never tried"
    # Small, and most of them in exponents.
    keep_wider = (
        *(".mamba.A_log", ".mamba.D", ".mamba.dt_bias", ".mamba.norm.weight"),
        *(".mamba.conv1d.weight", ".mamba.conv1d.bias"),
    )
    attention_inputs = ("q_proj", "k_proj", "v_proj", "in_proj")
    feed_forward_inputs = ("gate_proj", "up_proj")
    query_projection = "q_proj"
    output_projection = "o_proj"
    residuals = 2

    @classmethod
    def translated(cls, raw: dict[str, Any]) -> dict[str, Any]:
        settings = dict(raw)
        if settings.get("mamba_d_head") == "auto":
            del settings["mamba_d_head"]
        hidden, expand = settings.get("hidden_size"), settings.get("mamba_expand", 2)
        if settings.get("mamba_d_ssm", 0) is None and is_count(hidden) and is_count(expand):
            settings["mamba_d_ssm"] = expand * hidden
        limits = settings.get("time_step_limit")
        if isinstance(limits, list | tuple):  # JSON has no infinity
            settings["time_step_limit"] = tuple(
                math.inf if each == {"__float__": "Infinity"} else each for each in limits
            )
        return settings

    @classmethod
    def derived(cls, kept: dict[str, Any]) -> dict[str, Any]:
        return {}

    @classmethod
    def check_kind(cls, config: Any, source: str) -> None:
        rope = config.rope_parameters["rope_type"]
        biases = (config.attention_bias, config.mlp_bias, config.mamba_proj_bias, config.projectors_bias)
        other = {
            f"its activation is {config.hidden_act}": config.hidden_act != "silu",
            "its linears have biases": any(biases),
            f"its rotary positions are scaled ({rope})": rope != "default",
        }
        for what in (what for what, is_so in other.items() if is_so):
            raise UserError(f"{source}: a {cls.family} is trained here without what this one has: {what}")

    def _try_out(self) -> None:
        from torch import nn

        config = self.config
        for names, whole, what in (
            ("attention heads", config.num_attention_heads, config.num_key_value_heads),
            ("heads of the state space", config.mamba_n_heads, config.mamba_n_groups),
        ):
            if whole % what:
                raise ValueError(f"{whole} {names} are no multiple of {what}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd, and rotation goes by pairs")
        for name, count in _MULTIPLIERS.items():
            value = getattr(config, name)
            values = [value] if count == 1 else value
            if len(values) != count or not all(is_number(each) for each in values):
                raise ValueError(f"{name} is {str(value)[:80]}, not {count} finite numbers")
        least, most = config.time_step_limit
        if not 0 <= least <= most:
            raise ValueError(f"time_step_limit is {least} to {most}")
        nn.Dropout(config.attention_dropout)
        self.norm(self.norm_class(1, eps=float(config.rms_norm_eps)))
        self.rotary_embedding()

    @property
    def head_dim(self) -> int:
        config = self.config
        width: int = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return width

    @property
    def convolved(self) -> int:
        """Channels of the convolution."""
        config = self.config
        return int(config.mamba_d_ssm + 2 * config.mamba_n_groups * config.mamba_d_state)

    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        config = self.config
        hidden, wide, width = config.hidden_size, config.intermediate_size, config.mamba_d_ssm
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        return {
            "gate_proj": (wide, hidden),
            "up_proj": (wide, hidden),
            "down_proj": (hidden, wide),
            "in_proj": (width + self.convolved + config.mamba_n_heads, hidden),
            "out_proj": (hidden, width),
            "q_proj": (queries, hidden),
            "k_proj": (keys, hidden),
            "v_proj": (keys, hidden),
            "o_proj": (hidden, queries),
        }

    def base_parameter_kinds(self) -> dict[str, int]:
        config = self.config
        own = self.convolved * (config.mamba_d_conv + bool(config.mamba_conv_bias)) + 3 * config.mamba_n_heads
        own += config.mamba_d_ssm if config.mamba_rms_norm else 0
        return {"state space": config.num_hidden_layers * own} | super().base_parameter_kinds()

    @property
    def norms_per_block(self) -> int:
        return 2

    @property
    def embedding_multiplier(self) -> float:
        return float(self.config.embedding_multiplier)

    @property
    def head_multiplier(self) -> float:
        return float(self.config.lm_head_multiplier)

    def unlike_fast_block(self) -> str | None:
        config = self.config
        if config.hidden_act != "silu":
            return f"activation {config.hidden_act}"
        if self.score_factor <= 0:  # attention's kernels look for the largest score before they scale it
            return f"key multiplier {config.key_multiplier:g}"
        if config.attention_dropout:
            return f"attention dropout {config.attention_dropout:g}"
        return super().unlike_fast_block()

    @property
    def score_factor(self) -> float:
        """The factor of attention's scores: of queries times that of keys."""
        return float(self.config.attention_in_multiplier**2 * self.config.key_multiplier)

    def norm(self, module: nn.Module) -> nn.Module:
        from falcon_qlora.models.layouts.norms import SameDtypeFalconH1RMSNorm

        assert isinstance(module, self.norm_class)
        return SameDtypeFalconH1RMSNorm(len(module.weight), eps=module.variance_epsilon)

    def rotary_embedding(self) -> nn.Module:
        from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1RotaryEmbedding

        return FalconH1RotaryEmbedding(self.config)

    def fill_buffers(self, backbone: Any, device: torch.device) -> None:
        from transformers.models.falcon_h1.modeling_falcon_h1 import compute_mup_vector

        super().fill_buffers(backbone, device)
        multipliers = compute_mup_vector(self.config).float().to(device)
        for block in backbone.layers:
            block.mamba.mup_vector = multipliers

    def block_arguments(self, backbone: Any, hidden: Tensor, sequences: Sequences) -> dict[str, Any]:
        arguments = super().block_arguments(backbone, hidden, sequences)
        return {"mamba_attention_mask": sequences, **arguments}

    @classmethod
    def other_mixers(cls) -> dict[Any, Callable[[Any, Tensor, Sequences], Tensor]]:
        from transformers.models.falcon_h1.modeling_falcon_h1 import FalconH1Mixer

        return {FalconH1Mixer: _mix}

    def float32_at_work(self) -> float:
        config = self.config
        decays = SSD_TOKENS * config.mamba_n_heads
        states = config.mamba_d_ssm * config.mamba_d_state / SSD_TOKENS
        # What `_states` keeps when it is recomputed, and at the peak three times the decays or the states,
        # for their gradients. Measured on the CPU: 287 KiB a token at 7B's sizes, 120 at 0.5B's and 392 at
        # 34B's. Counted here: 306, 153 and 412.
        kept = 3 * self.convolved + 10 * config.mamba_d_ssm + 2 * decays + 2 * states
        return float(kept + 3 * max(decays, states))

    def fast_bytes_at_work(self, value_bytes: int) -> float:
        config = self.config
        # The gradient of y, the convolution's output and its gradient; states and their gradients; and, in
        # float32, what `ssd_triton` sums over heads, and over lanes for each head.
        rows = config.mamba_d_ssm + 2 * self.convolved
        states = 2 * config.mamba_d_ssm * config.mamba_d_state / FAST_SSD_TOKENS
        sums = 5 * config.mamba_n_groups * FAST_SSD_TOKENS + 20 * config.mamba_n_heads
        return value_bytes * (rows + states) + 4 * sums

    @property
    def mixed(self) -> int:
        return super().mixed + int(self.config.mamba_d_ssm)

    def heads(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = (
            rearrange(linear(hidden), "1 t (heads d) -> t heads d", d=attention.head_dim)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        return query, key * attention.key_multiplier, value

    def split(self, attention: Any, projected: Tensor) -> tuple[Tensor, ...]:
        return (rearrange(projected, "t (heads d) -> t heads d", d=attention.head_dim),)

    def attention_dropout(self, attention: Any) -> float:
        return float(attention.attention_dropout)

    def published_config(self) -> dict[str, Any]:
        config = self.config
        record: dict[str, Any] = {"architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1"}
        record |= {name: getattr(config, name) for name in _PUBLISHED} | {"head_dim": self.head_dim}
        if tuple(config.time_step_limit) != _NO_LIMIT:
            least, most = config.time_step_limit
            record["time_step_limit"] = [least, min(most, _LARGEST_FLOAT32)]
        return record | published_rotation(config)


def _mix(mixer: Any, hidden: Tensor, sequences: Sequences) -> Tensor:
    """What a block's state space adds to ``[1, T, hidden]`` of packed documents, before its multiplier."""
    from torch.utils.checkpoint import checkpoint

    projected = mixer.in_proj(hidden * mixer.ssm_in_multiplier)[0]
    # Recomputed in the backward pass: what it keeps would be some fifteen times as large as its input.
    gated = checkpoint(
        _states, mixer, projected, sequences.position_ids[0], use_reentrant=False, preserve_rng_state=False
    )
    output: Tensor = mixer.out_proj(gated.to(hidden.dtype)[None])
    return output


def _states(mixer: Any, projected: Tensor, positions: Tensor) -> Tensor:
    """From ``in_proj``'s output ``[T, width]`` to ``out_proj``'s input: float32 ``[T, d_ssm]``."""
    import torch

    from falcon_qlora.kernels import ssd

    with torch.autocast(projected.device.type, enabled=False):
        return ssd.mix(projected, state_space(mixer), positions)


def state_space(mixer: Any) -> StateSpace:
    """The parameters of Transformers' ``FalconH1Mixer`` between ``in_proj`` and ``out_proj``."""
    from falcon_qlora.kernels.ssd import StateSpace

    normed = mixer.mamba_rms_norm
    return StateSpace(
        groups=mixer.n_groups,
        state=mixer.ssm_state_size,
        multipliers=mixer.mup_vector.flatten(),
        weight=mixer.conv1d.weight.squeeze(1),
        bias=mixer.conv1d.bias,
        step_bias=mixer.dt_bias,
        limits=mixer.time_step_limit,
        rate=-mixer.A_log.float().exp(),
        skip=mixer.D,
        norm=mixer.norm.weight if normed else None,
        epsilon=mixer.norm.variance_epsilon if normed else 0.0,
        norm_before_gate=normed and mixer.norm.norm_before_gate,
    )
