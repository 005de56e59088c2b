"""What the package needs to know about a model family, and the counts that follow from it.

A family is a subclass of `Layout` in a file of its own, listed in `layouts.LAYOUTS`. With that alone it is
loaded, quantized, trained and merged on the reference path; its fast path may come later.
"""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, ClassVar

from falcon_qlora.common.errors import UserError, one_line
from falcon_qlora.common.untrusted import is_count

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import PreTrainedConfig

    from falcon_qlora.models.packed_attention import Sequences

# Far beyond any published model: a larger value is a mistake, or meant to exhaust the machine.
_LARGEST = {
    "vocab_size": 2**24,
    "hidden_size": 2**18,
    "num_hidden_layers": 2**12,
    **dict.fromkeys(("num_attention_heads", "num_kv_heads", "num_key_value_heads", "head_dim"), 2**14),
    **dict.fromkeys(("ffn_hidden_size", "intermediate_size"), 2**20),
    "max_position_embeddings": 2**28,
    **dict.fromkeys(("mamba_d_ssm", "mamba_d_state"), 2**18),
    **dict.fromkeys(("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_conv"), 2**14),
    **dict.fromkeys(("mamba_expand", "mamba_chunk_size"), 2**14),
}
OPTIONAL = ("pad_token_id", "rope_theta", "rope_scaling", "rope_parameters")
"""Settings that only some files have, in any family."""
PREFIX = "prefix_attention"
"""Name of a learned prefix within a block's attention."""


class Imported:
    """A class attribute that is imported when it is accessed: facts and counts need no model."""

    def __init__(self, module: str, name: str):
        self._module, self._name = module, name

    def __get__(self, instance: Any, owner: Any) -> Any:
        return getattr(importlib.import_module(self._module), self._name)


class Layout(ABC):
    """A model's layout: the facts of its family, and of one configuration.

    Modules are named as in Transformers' model. A linear of a block may also go by the last part of its name.

    Args:
        config: of the model.

    Attributes:
        family: its name for readers.
        published: some published models, for messages.
        model_types: ``model_type`` of its configurations, the one of current Transformers first.
        presets: name → arguments of `config_class`, for the published models' shapes.
        tokenizers: preset → hub model whose tokenizer goes with it.
        kept: settings of a configuration that are read; the rest have no effect.
        defaults: `config_class`'s defaults of the settings that counts depend on.
        config_class, model_class, backbone_class, attention_class, norm_class: Transformers'.
        norm_vectors: how many parameter vectors of the hidden size a norm has.
        norm_keeps_float32: whether a norm keeps its input in float32 for the backward pass.
        backbone: name of the model without its head.
        embedding, blocks, final_norm: names of these modules within the backbone.
        head: name of the output head.
        attention: name of the attention within a block.
        linears: last part of the name → name within the block, of every linear that is quantized and adapted,
            in the model's order.
        not_for_peft: those of `linears` on which plain PEFT refuses LoRA → why, for messages; they get LoRA
            only where they are named.
        no_prefix: why attention takes no learned prefix, or None if it does.
        keep_wider: name suffixes of parameters that keep their file's dtype where it is wider.
        attention_inputs: those of `linears` that read what attention reads.
        feed_forward_inputs: those that read what the feed-forward layer reads.
        query_projection: the one whose output holds the queries.
        output_projection: the one that attention ends with.
        fused: the one that gives queries, keys and values at once, or None.
        residuals: how often a fast block adds to the hidden states: once where attention and feed-forward
            layer are parallel, twice where one follows the other.
    """

    family: ClassVar[str]
    published: ClassVar[str]
    model_types: ClassVar[tuple[str, ...]]
    presets: ClassVar[dict[str, dict[str, Any]]]
    tokenizers: ClassVar[dict[str, str]]
    kept: ClassVar[tuple[str, ...]]
    defaults: ClassVar[dict[str, Any]]
    config_class: ClassVar[Any]
    model_class: ClassVar[Any]
    backbone_class: ClassVar[Any]
    attention_class: ClassVar[Any]
    norm_class: ClassVar[Any]
    norm_vectors: ClassVar[int]
    norm_keeps_float32: ClassVar[bool] = False
    backbone: ClassVar[str]
    embedding: ClassVar[str]
    blocks: ClassVar[str]
    final_norm: ClassVar[str]
    head: ClassVar[str] = "lm_head"
    attention: ClassVar[str]
    linears: ClassVar[dict[str, str]]
    not_for_peft: ClassVar[dict[str, str]] = {}
    no_prefix: ClassVar[str | None] = None
    keep_wider: ClassVar[tuple[str, ...]] = ()
    attention_inputs: ClassVar[tuple[str, ...]]
    feed_forward_inputs: ClassVar[tuple[str, ...]]
    query_projection: ClassVar[str]
    output_projection: ClassVar[str]
    fused: ClassVar[str | None] = None
    residuals: ClassVar[int] = 1

    def __init__(self, config: PreTrainedConfig):
        self.config = config

    @classmethod
    def read(cls, raw: dict[str, Any], source: str) -> PreTrainedConfig:
        """Turn a published ``config.json`` of the family into a configuration, whatever its age.

        Args:
            raw: the parsed file.
            source: where it was read, for messages.

        Raises:
            UserError: if it is incomplete, or of a kind that is not computed exactly here.
        """
        config = cls._made(cls._checked(raw, source), source)
        cls.check_kind(config, source)
        return config

    @classmethod
    def outline(cls, raw: dict[str, Any], source: str) -> Any:
        """As `read`, but only the settings that counts depend on, and without loading a library.

        Raises:
            UserError: if it is incomplete, or of a kind whose counts differ.
        """
        kept = cls._checked(raw, source)
        kept.pop("rope_parameters", None)  # rotation changes no count
        derived = cls.derived(kept) | {"head_dim": kept["hidden_size"] // kept["num_attention_heads"]}
        outline = SimpleNamespace(model_type=cls.model_types[0], **cls.defaults | derived | kept)
        cls.check_kind(outline, source)
        return outline

    @classmethod
    def translated(cls, raw: dict[str, Any]) -> dict[str, Any]:
        """The settings of a published ``config.json`` under their current names."""
        return raw

    @classmethod
    @abstractmethod
    def derived(cls, kept: dict[str, Any]) -> dict[str, Any]:
        """Those of `defaults` that follow from other settings."""

    @classmethod
    def check_kind(cls, config: Any, source: str) -> None:
        """Refuse a configuration of the family that is not computed exactly here.

        Raises:
            UserError: saying how it differs.
        """
        return None

    @abstractmethod
    def linear_shapes(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of each linear of a block, by the last part of its name."""

    @property
    @abstractmethod
    def norms_per_block(self) -> int: ...

    def unlike_fast_block(self) -> str | None:
        """What of this configuration the family's fast block does not compute, or None."""
        return "linears with biases" if self.has_biases else None

    @property
    def has_biases(self) -> bool:
        """Whether the blocks' linears have biases."""
        return False

    @abstractmethod
    def norm(self, module: nn.Module) -> nn.Module:
        """The replacement for a norm: it computes in float32, and its output has its input's dtype.

        Linears keep their input's dtype. After a norm that returned float32 the whole residual stream would
        be float32: twice the memory and, in 8 bits, a third of the speed.
        """

    @abstractmethod
    def rotary_embedding(self) -> nn.Module:
        """A new rotary embedding."""

    def fill_buffers(self, backbone: Any, device: torch.device) -> None:
        """Compute the buffers that no file holds; in a model built on the meta device they are empty."""
        backbone.rotary_emb = self.rotary_embedding().to(device)

    @property
    def embedding_multiplier(self) -> float:
        """Factor of the embedding's output."""
        return 1.0

    @property
    def head_multiplier(self) -> float:
        """Factor of the logits."""
        return 1.0

    def embed(self, embedding: nn.Module, input_ids: Tensor) -> Tensor:
        """The first block's input: ``[1, T]`` → ``[1, T, hidden]``."""
        hidden: Tensor = embedding(input_ids)
        scale = self.embedding_multiplier
        return hidden if scale == 1 else hidden * scale

    @classmethod
    def other_mixers(cls) -> dict[Any, Callable[[Any, Tensor, Sequences], Tensor]]:
        """The modules of a block, beside attention, that mix tokens.

        Returns:
            Class of the module → function of it, ``[1, T, hidden]`` of packed documents and where they lie. A
            block passes the module its documents as ``attention_mask``.
        """
        return {}

    def float32_at_work(self) -> float:
        """Float32 values per token that exist during the backward pass of a block's `other_mixers`."""
        return 0.0

    def fast_bytes_at_work(self, value_bytes: int) -> float:
        """Bytes per token of the same on the fast path, with activations of `value_bytes`."""
        return 0.0

    @property
    def mixed(self) -> int:
        """Width of what attention, and a mixer beside it, give to the linears they end with."""
        return self.linear_shapes()[self.output_projection][1]

    @abstractmethod
    def heads(self, attention: Any, hidden: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project ``[1, T, hidden]`` to query ``[T, Q, D]``, key and value ``[T, G, D]``, not rotated."""

    @abstractmethod
    def split(self, attention: Any, projected: Tensor) -> tuple[Tensor, ...]:
        """Split the output of `query_projection`, ``[T, width]``, into heads.

        Returns:
            query ``[T, Q, D]``; of a `fused` projection also key and value ``[T, G, D]``, not copied.
        """

    @abstractmethod
    def attention_dropout(self, attention: Any) -> float:
        """Probability with which Transformers drops an attention weight while training."""

    @abstractmethod
    def published_config(self) -> dict[str, Any]:
        """``config.json`` in the published models' names and form, which any release reads."""

    def block_arguments(self, backbone: Any, hidden: Tensor, sequences: Sequences) -> dict[str, Any]:
        """Arguments of every block beside the hidden states ``[1, T, hidden]`` of packed documents."""
        return {
            # A block passes its attention mask to its attention unchanged, where the packed forward finds the
            # documents.
            "attention_mask": sequences,
            "position_ids": sequences.position_ids,
            "use_cache": False,
            "position_embeddings": backbone.rotary_emb(hidden, position_ids=sequences.position_ids),
        }

    @classmethod
    def _checked(cls, raw: dict[str, Any], source: str) -> dict[str, Any]:
        """The settings that are `kept`.

        Raises:
            UserError: if one is missing or too large.
        """
        settings = cls.translated(raw)
        missing = [
            n for n in ("hidden_size", "num_hidden_layers", "num_attention_heads") if n not in settings
        ]
        if missing:
            raise UserError(f"{source}: {', '.join(missing)} missing; is the file complete?")
        kept = {name: settings[name] for name in cls.kept if settings.get(name) is not None}
        for name, largest in _LARGEST.items():
            value = kept.get(name, 1)
            if not is_count(value, least=1, most=largest):
                raise UserError(f"{source}: {name} is {str(value)[:40]!r}; expected 1 to {largest:,}")
        if "head_dim" not in kept and kept["hidden_size"] % kept["num_attention_heads"]:
            raise UserError(
                f"{source}: hidden_size {kept['hidden_size']} is no multiple of "
                f"{kept['num_attention_heads']} attention heads"
            )
        return kept

    @classmethod
    def _made(cls, kept: dict[str, Any], source: str) -> PreTrainedConfig:
        try:
            config = cls.config_class(**kept)
            cls(config)._try_out()
            return config
        except Exception as error:  # its checks raise errors of several libraries
            reason = one_line(error)
            raise UserError(f"{source}: not the configuration of a {cls.family}: {reason}") from None

    @abstractmethod
    def _try_out(self) -> None:
        """Use the settings that the configuration's own checks accept unseen, so that bad ones raise."""

    @property
    def tied(self) -> set[str]:
        """Parameters that files need not hold: the head's, where it is tied to the embedding."""
        return {f"{self.head}.weight"} if self.config.tie_word_embeddings else set()

    def linears_of(self, names: Iterable[str]) -> list[str]:
        """Full names, in order, of these linears in every block; `names` are the last parts of names."""
        wanted = set(names)
        return [
            f"{self.backbone}.{self.blocks}.{block}.{module}"
            for block in range(self.config.num_hidden_layers)
            for name, module in self.linears.items()
            if name in wanted
        ]

    def expected_linears(self) -> list[str]:
        """Full names of every linear of every block, in order; never the output head."""
        return self.linears_of(self.linears)

    def linear_parameter_count(self) -> int:
        """Number of weights in all linears of all blocks: those that are quantized."""
        return self.config.num_hidden_layers * sum(out * into for out, into in self.linear_shapes().values())

    def outputs_per_block(self) -> int:
        """Outputs of all linears of a block."""
        return sum(out for out, _ in self.linear_shapes().values())

    def base_parameter_kinds(self) -> dict[str, int]:
        """Parameters by kind; no output head where it is tied to the embedding."""
        blocks = self.config.num_hidden_layers
        kinds = {name: blocks * out * into for name, (out, into) in self.linear_shapes().items()}
        if self.has_biases:
            kinds["biases"] = blocks * self.outputs_per_block()
        kinds["norms"] = self.norm_vectors * self.config.hidden_size * (blocks * self.norms_per_block + 1)
        kinds["embedding"] = self.config.vocab_size * self.config.hidden_size
        if not self.config.tie_word_embeddings:
            kinds["output head"] = kinds["embedding"]
        return kinds

    @property
    def position_limit(self) -> str:
        """What happens to a document longer than the model was made for, for messages."""
        return "rotary positions beyond were never trained, and answers there may be nonsense"

    def told_beyond_positions(self, tokens: int, what: str) -> str | None:
        """That `what`, of so many `tokens`, is longer than the model was made for; None if it is not."""
        positions = self.config.max_position_embeddings
        if tokens <= positions:
            return None
        return (
            f"{what} is beyond the {positions:,} positions that the model was made for "
            f"(max_position_embeddings): {self.position_limit}"
        )

    def parameter_count(self) -> int:
        """All parameters, a head tied to the embedding counted once."""
        return sum(self.base_parameter_kinds().values())


def published_rotation(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of rotary positions as in files from before Transformers 5."""
    rope = dict(config.rope_parameters)
    record: dict[str, Any] = {"rope_theta": rope.pop("rope_theta", 10000.0)}
    if rope.get("rope_type", "default") != "default":
        record["rope_scaling"] = rope
    return record
