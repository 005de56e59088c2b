"""LoRA, PEFT's own, on a quantized model: float32 adapters that plain PEFT opens.

This file has the settings and what follows from them. lora_folder.py reads them from an adapter, and
lora_layers.py changes a model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from falcon_qlora.common.errors import UserError, nearest
from falcon_qlora.common.files import disk_errors
from falcon_qlora.methods import new_tokens
from falcon_qlora.methods.interface import Method, ParameterGroup, setting
from falcon_qlora.methods.lora_folder import settings_in

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel
    from torch import Tensor
    from transformers import PreTrainedConfig, PreTrainedModel

SLICES = ("query", "key", "value")
_ROWS = ".token_adapter.trainable_tokens_delta"  # PEFT's name for trained rows, within their module


@dataclass(frozen=True, kw_only=True)
class Lora(Method):
    """Train two low-rank matrices on each of some linears.

    Attributes:
        token_rows: ids of the tokens whose rows of the embedding, and so of a tied head, are trained too.
            They follow from `new_tokens` and a tokenizer; an adapter from elsewhere may have them without
            names.
        head_rows: whether they are trained in an untied head as well.

    Raises:
        UserError: for unknown slices, invalid tokens, or settings that do not go together.
    """

    r: int = setting(64, "Rank.", name="lora_r", label="r {}", least=1)
    alpha: float = setting(
        16,
        "Scale: the update is multiplied by alpha / r.",
        name="lora_alpha",
        label="alpha {}",
        above=0,
        most=2**20,
    )
    dropout: float = setting(
        0.0,
        "Dropout before the low-rank product.",
        name="lora_dropout",
        label="dropout {}",
        least=0,
        below=1,
        in_weights=False,
    )
    target_modules: tuple[str, ...] | None = setting(
        None,
        "Linear layers to adapt, by name; unset: all of every block that PEFT accepts.",
        name="lora_target_modules",
        label="on {}",
    )
    slices: tuple[str, ...] | None = setting(
        None,
        "Adapt only these slices of the fused query-key-value projection, each with rank lora_r.",
        name="lora_slices",
        label="on {}",
        choices=SLICES,
        alternative="lora_target_modules",
    )
    use_rslora: bool = setting(
        False, "Scale by alpha / sqrt(r) instead (rank-stabilised LoRA).", name="use_rslora", label="rsLoRA"
    )
    use_dora: bool = setting(
        False, "Train magnitude and direction apart (DoRA).", name="use_dora", label="DoRA"
    )
    new_tokens: tuple[str, ...] | None = setting(
        None,
        "Add these special tokens, or those of a .txt file (one a line), and train their rows of the "
        "embedding and the head.",
        name="new_tokens",
        label="rows of the new tokens {} in embedding and head",
    )
    token_rows: tuple[int, ...] | None = None
    head_rows: bool = True

    name: ClassVar[str] = "lora"
    title: ClassVar[str] = "LoRA"
    trains: ClassVar[str] = "low-rank matrices beside the linears"
    opened_by: ClassVar[str] = "peft"
    why_not_merged: ClassVar[str | None] = None
    starts_at_zero: ClassVar[tuple[str, ...]] = (".lora_B.weight",)

    def __post_init__(self) -> None:
        for name in self.slices or ():
            if name not in SLICES:
                raise UserError(
                    f"lora_slices: {name!r} is not one of {', '.join(SLICES)}{nearest(name, SLICES)}"
                )
        new_tokens.check_tokens(self.new_tokens or ())
        if self.alpha == int(self.alpha):
            object.__setattr__(self, "alpha", int(self.alpha))  # in PEFT it is mostly a whole number
        if not self.slices:
            return
        if self.use_rslora or self.use_dora:
            raise UserError("--lora_slices goes with neither --use_rslora nor --use_dora")
        # In the projection's own order.
        object.__setattr__(self, "slices", tuple(name for name in SLICES if name in self.slices))

    @classmethod
    def read_folder(cls, folder: Path, record: dict[str, Any]) -> Lora:
        return cls(**settings_in(folder, record))

    @property
    def short(self) -> str:
        return f"{self.name}{self.r}"

    @property
    def draws(self) -> bool:
        return self.dropout > 0

    @property
    def why_base_stays_whole(self) -> str | None:
        return "DoRA reads every weight of the base before the first step" if self.use_dora else None

    @property
    def saved_rank(self) -> int:
        """Rank of the matrices as PEFT has them: slices of rank r are one adapter of their joint rank."""
        return self.r * (len(self.slices or ()) or 1)

    def fp8_facts(self) -> dict[str, Any]:
        return {"lora_dropout": self.dropout}

    def step_memory(self) -> dict[str, Any]:
        return {"lora_rank": self.r, "lora_dropout": self.dropout > 0}

    def targets(self, config: PreTrainedConfig) -> list[str]:
        """The adapted linears of a model of `config`, by the last part of their name.

        Raises:
            UserError: for a name that its blocks do not have, or slices where no projection is fused.
        """
        from falcon_qlora.models.layouts import layout_of

        layout = layout_of(config)
        linears = list(layout.linears)
        if self.slices:
            if layout.fused is None:
                raise UserError(
                    "--lora_slices trains slices of a projection that is queries, keys and values at once, "
                    f"and {layout.family} has three: name those that are meant as --lora_target_modules"
                )
            if self.target_modules not in (None, (layout.fused,)):
                raise UserError(
                    f"--lora_slices trains slices of {layout.fused} alone: leave out --lora_target_modules"
                )
            return [layout.fused]
        if self.target_modules in (None, ("all-linear",)):
            return [name for name in linears if name not in layout.not_for_peft]
        for name in self.target_modules or ():
            if name not in linears:
                raise UserError(
                    f"--lora_target_modules: the blocks have no linear {name!r}{nearest(name, linears)}. "
                    f"{layout.family}'s: {', '.join(linears)}"
                )
        return list(self.target_modules or ())

    @property
    def refused_by_peft(self) -> list[str]:
        """Adapted linears because of which plain PEFT does not open the adapter."""
        from falcon_qlora.models.layouts import LAYOUTS

        refused = {name for layout in LAYOUTS for name in layout.not_for_peft}
        return [name for name in self.target_modules or () if name in refused]

    def parameter_groups(self, config: PreTrainedConfig) -> list[ParameterGroup]:
        from falcon_qlora.models.layouts import layout_of

        if not self.slices:
            return super().parameter_groups(config)
        shapes = self._row_shapes(config)
        # Only blocks of the saved matrices are trained.
        (projection,) = self.targets(config)
        fused, hidden = layout_of(config).linear_shapes()[projection]
        rows = {"query": hidden, "key": (fused - hidden) // 2, "value": (fused - hidden) // 2}
        blocks = config.num_hidden_layers
        return [
            ParameterGroup(kind=f"LoRA on {name}", count=blocks * self.r * (hidden + rows[name]))
            for name in self.slices
        ] + [ParameterGroup(kind=self.kind(name), count=n * width) for name, (n, width) in shapes.items()]

    def kind(self, name: str) -> str:
        if name.endswith(_ROWS):
            return f"rows of tokens in {name.removesuffix(_ROWS).rpartition('.')[2]}"
        return "DoRA magnitudes" if name.endswith("magnitude_vector") else f"LoRA on {name.split('.')[-3]}"

    def saved_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
        from falcon_qlora.models.layouts import layout_of

        shapes: dict[str, tuple[int, ...]] = {}
        layout = layout_of(config)
        linears = layout.linear_shapes()
        for module in layout.linears_of(self.targets(config)):
            out, into = linears[module.rpartition(".")[2]]
            prefix = f"base_model.model.{module}.lora_"
            shapes[f"{prefix}A.weight"] = (self.saved_rank, into)
            shapes[f"{prefix}B.weight"] = (out, self.saved_rank)
            if self.use_dora:
                shapes[f"{prefix}magnitude_vector"] = (out,)
        return shapes | self._row_shapes(config)

    def _row_shapes(self, config: PreTrainedConfig) -> dict[str, tuple[int, int]]:
        self.vocab_size(config)
        count = len(self.token_rows or self.new_tokens or ())
        return {
            f"base_model.model.{module}{_ROWS}": (count, config.hidden_size)
            for module in self._with_rows(config)
        }

    def _with_rows(self, config: PreTrainedConfig) -> list[str]:
        """Full names of the modules with trained rows; a tied head shares the embedding's."""
        from falcon_qlora.models.layouts import layout_of

        if not (self.token_rows or self.new_tokens):
            return []
        layout = layout_of(config)
        untied = self.head_rows and not config.tie_word_embeddings
        return [f"{layout.backbone}.{layout.embedding}", *([layout.head] if untied else [])]

    @property
    def new_token_count(self) -> int:
        return len(self.new_tokens or ())

    def add_tokens(self, tokenizer: Any) -> None:
        new_tokens.add_to(tokenizer, self.new_tokens or ())

    def for_tokenizer(self, tokenizer: Any) -> Lora:
        if not self.new_tokens:
            return self
        ids = tokenizer.convert_tokens_to_ids(list(self.new_tokens))
        return dataclasses.replace(self, token_rows=tuple(ids))

    def vocab_size(self, config: PreTrainedConfig) -> int:
        return new_tokens.grown(self.token_rows or (), config.vocab_size)

    def rows_for_peft(self, config: PreTrainedConfig) -> dict[str, Any]:
        """`peft_config`'s `trainable_token_indices` for a model of `config`; {} without trained rows."""
        if not self.token_rows:
            if self.new_tokens:
                raise ValueError("new_tokens have no ids before for_tokenizer")
            return {}
        modules, rows = self._with_rows(config), list(self.token_rows)
        if len(modules) == 1:
            return {"trainable_token_indices": rows}
        return {"trainable_token_indices": {name.rpartition(".")[2]: rows for name in modules}}

    def peft_config(self, target_modules: list[str], **other: Any) -> LoraConfig:
        """PEFT's configuration with these settings and `other`, for linears of these names."""
        from peft import LoraConfig

        settings = {
            "r": self.saved_rank,
            # So that the scale is alpha / r for slices too.
            "lora_alpha": self.alpha * (self.saved_rank // self.r),
            "lora_dropout": self.dropout,
            "bias": "none",
            "target_modules": target_modules,
            "use_rslora": self.use_rslora,
            "use_dora": self.use_dora,
            "task_type": "CAUSAL_LM",
        }
        return LoraConfig(**settings | other)

    def attach(self, model: PreTrainedModel, *, seed: int = 0) -> PeftModel:
        from falcon_qlora.methods.lora_layers import add_lora

        return add_lora(model, self, seed=seed)

    def trained_state(self, model: PeftModel) -> dict[str, Tensor]:
        state: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            # By module, as PEFT knows slices as whole matrices. Only trainable ones: the base would be
            # packed.
            if any(each.requires_grad for each in module.parameters(recurse=False)):
                module._save_to_state_dict(state, f"{name}.", False)
        return state

    def saved_tensors(self, model: PeftModel, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        from peft import get_peft_model_state_dict

        tensors: dict[str, Tensor] = get_peft_model_state_dict(
            model, state_dict=None if state is None else dict(state), save_embedding_layers=False
        )
        return tensors

    def save(self, model: PeftModel, folder: Path, state: Mapping[str, Tensor] | None = None) -> None:
        # Not the embeddings, which are never trained whole: PEFT would ask the hub whether they were.
        held = {} if state is None else {"state_dict": dict(state)}
        with disk_errors(folder / "adapter_model.safetensors"):
            model.save_pretrained(folder, save_embedding_layers=False, **held)

    def put(self, model: PeftModel, tensors: dict[str, Tensor]) -> None:
        from peft import set_peft_model_state_dict

        set_peft_model_state_dict(model, tensors)

    def open(self, base: PreTrainedModel, folder: Path, *, trainable: bool) -> PeftModel:
        from falcon_qlora.methods.lora_layers import open_lora

        return open_lora(base, folder, self, trainable=trainable)

    def merged_weight(self, weight: Tensor, module: str, folder: Path, config: PreTrainedConfig) -> Tensor:
        from falcon_qlora.methods.lora_layers import merged_weight

        adapted = module.rpartition(".")[2] in self.targets(config)
        return merged_weight(self, weight, module, folder) if adapted else weight

    def merged_tensor(self, name: str, tensor: Tensor, folder: Path, config: PreTrainedConfig) -> Tensor:
        from falcon_qlora.methods.adapter_folder import tensors_file
        from falcon_qlora.models.layouts import layout_of
        from falcon_qlora.models.tensor_files import read_tensor
        from falcon_qlora.models.token_rows import with_rows

        layout, module = layout_of(config), name.removesuffix(".weight")
        if not self.token_rows or module not in (f"{layout.backbone}.{layout.embedding}", layout.head):
            return tensor
        rows = None
        if module in self._with_rows(config):
            rows = read_tensor(tensors_file(folder), f"base_model.model.{module}{_ROWS}")
        return with_rows(tensor, self.vocab_size(config), self.token_rows, rows)

    def disabled(self, model: PeftModel) -> AbstractContextManager[None]:
        return model.disable_adapter()
