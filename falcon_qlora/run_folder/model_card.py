"""The README.md of an adapter: what it is, how it was trained, how it is used."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from falcon_qlora.common.errors import printable
from falcon_qlora.common.files import write_text
from falcon_qlora.common.untrusted import as_yaml
from falcon_qlora.common.version import VERSION
from falcon_qlora.terminal import markdown
from falcon_qlora.terminal.markdown import code, escaped


@dataclass(frozen=True, kw_only=True)
class ModelCard:
    """What the card says.

    Attributes:
        base_model: Hub id, path or label (``tiny``, ``random:falcon-7b``) of the model the adapter is for.
        method: What was trained, as `--method` takes it.
        title, trains, opened_by: As the method says, see `Method`.
        datasets: What `--dataset_name` named.
        settings: Setting → value, in the order in which they are shown.
        data: What became of the rows: label → count.
        summary: The fields of `summary.json`.
        template: The prompt template of the rows, which later prompts must use too.
        template_sha256: Of its text, if it does not come with falcon_qlora.
        refused_by_peft: Linears with LoRA for which plain PEFT does not open the adapter.
        began_from: Folder of the adapter that the training began from, and the SHA-256 of its weights.
        vocabulary: Size of the adapter's own tokenizer; None if it is the base's.
    """

    base_model: str
    method: str
    title: str
    trains: str
    opened_by: str
    datasets: Sequence[str] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    summary: Mapping[str, Any] = field(default_factory=dict)
    template: str = ""
    template_sha256: str | None = None
    refused_by_peft: Sequence[str] = ()
    began_from: tuple[str, str] | None = None
    vocabulary: int | None = None

    def write(self, adapter: Path) -> Path:
        """Write the card into the adapter's folder, in place of PEFT's empty one."""
        file = adapter / "README.md"
        write_text(file, self.render())
        return file

    def render(self) -> str:
        """The card: the hub's metadata as front matter, then Markdown."""
        sections = [
            f"---\n{as_yaml(self._metadata())}---\n",
            self._introduction(),
            self._usage(),
            table("Settings", "setting", self.settings),
            table("Data", "rows and tokens", self.data),
            table("Result", "measure", self._result()),
        ]
        return "\n".join(section for section in sections if section)

    @property
    def _is_whole(self) -> bool:
        return self.opened_by == "transformers"

    @property
    def _base_is_random(self) -> bool:
        """Whether the adapter is only a test of the software, which its card then says."""
        return self.base_model.startswith("random:")

    def _metadata(self) -> dict[str, Any]:
        metadata: dict[str, Any] = {"library_name": self.opened_by, "pipeline_tag": "text-generation"}
        if names_hub_model(self.base_model):
            relation = "finetune" if self._is_whole else "adapter"
            metadata |= {"base_model": self.base_model, "base_model_relation": relation}
        on_hub = [name for name in self.datasets if names_hub_dataset(name)]
        if on_hub:
            metadata["datasets"] = on_hub
        tags = [self.method.replace("_", "-"), *(["qlora", "peft"] if self.opened_by == "peft" else [])]
        return metadata | {"tags": ["falcon", *tags, "falcon-qlora"]}

    def _introduction(self) -> str:
        quantized = self.settings.get("quantize_mode", "")
        held = f" on the base model held in {quantized}" if quantized and not self._is_whole else ""
        text = (
            f"# {self.title} {'of' if self._is_whole else 'for'} {escaped(self.base_model)}\n\n"
            f"{self.title} ({self.trains}) of {code(self.base_model)}, trained{held} with "
            f"falcon_qlora {VERSION}.\n"
        )
        if self.began_from is not None:
            folder, checksum = self.began_from
            text += f"\nThe training began from the adapter in {code(folder)} "
            text += f"(SHA-256 of its weights: {checksum}).\n"
        if self._base_is_random:
            text += (
                "\n**The base model's weights are random**: this shows that and how fast the training runs, "
                "and is of no other use.\n"
            )
        return text

    def _usage(self) -> str:
        text = "## Use\n\n"
        if self._is_whole:
            text += (
                "A whole model, which Transformers opens as any (`ADAPTER` is this folder or its hub id):\n\n"
                f"```python\n{_WHOLE_EXAMPLE}```\n\n"
                "With falcon_qlora (`ADAPTER` is this folder):\n\n"
            )
        elif self.refused_by_peft:
            names = ", ".join(map(code, self.refused_by_peft))
            text += (
                f"Plain PEFT refuses LoRA on {names} of this model and does not open\n"
                "the adapter. falcon_qlora opens it on the base model, quantized or not, and merges it\n"
                "(`ADAPTER` is this folder or a copy of it).\n\n"
            )
        elif self.opened_by != "peft":
            text += (
                "PEFT has no such method; falcon_qlora opens it on the base model, quantized or not\n"
                "(`ADAPTER` is this folder or a copy of it). It cannot be merged into the base's weights.\n\n"
            )
        elif not self._base_is_random:
            text += (
                "With plain Transformers and PEFT (`ADAPTER` is this folder or its hub id):\n\n"
                f"```python\n{self._plain_example()}```\n\n"
                "For a quantized base use falcon_qlora (of a classic Falcon, Transformers' own quantization\n"
                "leaves the linear layers as they are):\n\n"
            )
        text += (
            "```python\n"
            "import falcon_qlora\n\n"
            'model = falcon_qlora.load_adapter("ADAPTER")\n'
            "```\n\n"
            '```\nfalcon-qlora generate --adapter ADAPTER --prompt "…"\n```\n'
        )
        if self.template:
            known = f" (SHA-256 `{self.template_sha256}`)" if self.template_sha256 else ""
            text += f"\nIt was trained with the prompt template {code(self.template)}{known}; "
            text += "ask it in the same form.\n"
        return text

    def _plain_example(self) -> str:
        packaged = self.base_model == "tiny"
        base, own = "tiny_path()" if packaged else _python(self.base_model), '"ADAPTER"'
        return (
            "from peft import PeftModel\n"
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            + ("\nfrom falcon_qlora.models.tiny import tiny_path\n" if packaged else "")
            + f'\nbase = AutoModelForCausalLM.from_pretrained({base}, dtype="bfloat16")\n'
            + self._resizing()
            + 'model = PeftModel.from_pretrained(base, "ADAPTER")\n'
            f"tokenizer = AutoTokenizer.from_pretrained({base if self.vocabulary is None else own})\n"
        )

    def _resizing(self) -> str:
        """If the adapter has tokens of its own, the lines that make room for their rows."""
        if self.vocabulary is None:
            return ""
        size = self.vocabulary
        return f"if base.config.vocab_size < {size}:\n    base.resize_token_embeddings({size})\n"

    def _result(self) -> dict[str, Any]:
        known = {label: self.summary.get(name) for name, label in _RESULTS.items()}
        return {label: value for label, value in known.items() if value is not None}


_RESULTS = {
    "steps": "optimizer steps",
    "first_loss": "training loss, first",
    "final_loss": "training loss, last",
    "best_eval_loss": "best loss on held-out data",
    "trainable_parameters": "trainable parameters",
    "total_parameters": "parameters of base and adapter",
    "train_seconds": "seconds of the steps",
    "tokens_per_second": "tokens/s in the steps",
    "wall_seconds": "seconds of the whole command",
    "peak_memory_gib": "peak memory on one device, GiB",
    "world_size": "devices",
}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?", re.ASCII)
_WHOLE_EXAMPLE = """\
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("ADAPTER", dtype="bfloat16")
tokenizer = AutoTokenizer.from_pretrained("ADAPTER")
"""


def names_hub_model(name: str) -> bool:
    """Whether a base model's name can be a hub id."""
    return name.count("/") == 1 and _HUB_ID.fullmatch(name) is not None and not Path(name).exists()


def names_hub_dataset(name: str) -> bool:
    """Whether a data set's name can be a hub id: a local file's name is of no use elsewhere."""
    return _HUB_ID.fullmatch(name) is not None and "." not in name.split("/")[-1]


def table(title: str, label: str, rows: Mapping[str, Any]) -> str:
    """A section with a two-column table; nothing where there are no rows."""
    if not rows:
        return ""
    lines = markdown.table([label, ""], [[name, _cell(value)] for name, value in rows.items()])
    return "\n".join([f"## {title}\n", *lines, ""])


def _python(text: str) -> str:
    """`text` as Python writes it."""
    quoted = text.replace("\\", r"\\").replace('"', r"\"")
    return f'"{printable(quoted)}"'


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)
