"""A merge's certificate: how far it is from base and adapter, and what they were made of.

``certificate.json`` is for programs, ``README.md`` for people.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from falcon_qlora.common.untrusted import as_yaml
from falcon_qlora.data.templates import TEMPLATES, TOKENIZER, Turn, get_template
from falcon_qlora.merge.tensors import Onto
from falcon_qlora.models.folder import DTYPES
from falcon_qlora.run_folder.model_card import names_hub_dataset, names_hub_model, table
from falcon_qlora.terminal import markdown
from falcon_qlora.terminal.markdown import code, escaped

FORMAT = 1
ChooseBy = Literal["loss", "kl_divergence"]
_CARD_LIMIT = 2**16
_ONTO = {"16bit": "the original 16-bit base", "dequantized": "what the quantized base stands for"}
_LICENCE = re.compile(r"---\n(?:[^\n]*\n)*?license: *([\w.-]+) *\n")
_APACHE = re.compile(
    r"(tiiuae|ybelkada)/falcon-(rw-1b|rw-7b|7b|40b)(-instruct|-sharded-bf16|-instruct-sharded)?"
)


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What a merge is made of.

    Attributes:
        base_model: name of the base.
        base_revision: branch, tag or commit that was requested; None for the main branch or a folder.
        base_commit: the commit that was read, if it came from the hub.
        base_fingerprint: identifies its content, see `model_fingerprint`.
        adapter_base: name of the base that the adapter was trained on, from the adapter's folder.
        adapter_base_fingerprint: identifies that base's content; None where the folder does not record it.
        is_the_adapters_base: whether both have the same content; None where that cannot be known.
        base_layout: such as ``32 blocks of 4544``.
        licence: the base's, as a hub identifier; None where it is not known.
        quantization: how the base was stored in training, such as ``4bit``.
        template: the prompt template.
        template_sha256: of its text, as the run recorded it; None where the adapter's folder has none.
        datasets: the values of `--dataset_name`.
        data_fingerprint: hash of the tokenized training rows, if the run's record is available.
        settings: the run's settings, name → value.
        adapter: its rank, scale and the like, and a hash of its weights.
        falcon_qlora: the release that made the merge.
    """

    base_model: str
    base_revision: str | None = None
    base_commit: str | None = None
    base_fingerprint: str | None = None
    adapter_base: str | None = None
    adapter_base_fingerprint: str | None = None
    is_the_adapters_base: bool | None = None
    base_layout: str = ""
    licence: str | None = None
    quantization: str
    template: str | None = None
    template_sha256: str | None = None
    datasets: list[str] = field(default_factory=list)
    data_fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    adapter: Mapping[str, Any] = field(default_factory=dict)
    falcon_qlora: str = ""


@dataclass(frozen=True, kw_only=True)
class HeldOut:
    """The text that a certificate's figures were measured on.

    Attributes:
        source: what it is, in words.
        fingerprint: hash of the tokenized documents.
        is_the_runs_own: whether it is the text that the run held out.
    """

    source: str
    fingerprint: str
    documents: int
    tokens: int
    target_tokens: int
    is_the_runs_own: bool


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One merge compared with the quantized base and its adapter, on the held-out text.

    Attributes:
        loss: nats per target token.
        loss_increase: over the loss of base and adapter.
        kl_divergence: mean over the target tokens, from base and adapter to the merge, in nats.
        largest_kl_divergence: of a single token.
        same_top_token: share of the tokens where both rank the same token first.
    """

    loss: float
    loss_increase: float
    kl_divergence: float
    largest_kl_divergence: float
    same_top_token: float


@dataclass(frozen=True, kw_only=True)
class Certificate:
    """The content of `certificate.json`.

    Attributes:
        merged_onto: the base of the merge that was kept.
        dtype: what it is stored in.
        origin: what it is made of.
        held_out: the text measured on.
        adapter_loss: of the quantized base with its adapter, on the path that the run trained on.
        merges: the figures for each base that was tried, computed block by block as Transformers does. In
            16 bits the two paths also round differently, which is part of the difference.
        chosen_by: the figure that the kept merge has lower.
        max_loss_increase: the requested limit.
        max_kl_divergence: likewise.
        tensors: name → SHA-256 of the stored bytes.
        files: name → SHA-256 of the other files that decide what the model says: configuration, tokenizer,
            the weights' index. Model card and this file are not among them.
    """

    merged_onto: Onto
    dtype: str
    origin: Origin
    held_out: HeldOut
    adapter_loss: float
    merges: Mapping[Onto, Measured]
    chosen_by: ChooseBy
    max_loss_increase: float
    max_kl_divergence: float
    tensors: Mapping[str, str]
    files: Mapping[str, str]


def licence_of(base_model: str, folder: Path | None) -> str | None:
    """The base's licence: from its model card, else the known one of the published models."""
    if folder is not None and (file := folder / "README.md").is_file():
        with file.open(encoding="utf-8", errors="replace") as opened:
            match = _LICENCE.match(opened.read(_CARD_LIMIT))
        if match:
            return match[1]
    return "apache-2.0" if _APACHE.fullmatch(base_model) else None


def card(certificate: Certificate) -> str:
    """The README.md: the hub's metadata as front matter, then Markdown."""
    front = as_yaml(_metadata(certificate))
    sections = [
        f"---\n{front}---\n",
        _introduction(certificate),
        _usage(certificate),
        _proof(certificate),
        table("Made of", "", _made_of(certificate)),
        table("Settings of the training", "setting", certificate.origin.settings),
    ]
    return "\n".join(section for section in sections if section)


def _metadata(certificate: Certificate) -> dict[str, Any]:
    origin = certificate.origin
    # The base's licence also applies to the merge; "other" sends the reader to it.
    metadata: dict[str, Any] = {
        "license": origin.licence or "other",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
    }
    if names_hub_model(origin.base_model):
        metadata |= {"base_model": origin.base_model, "base_model_relation": "finetune"}
    on_hub = [name for name in origin.datasets if names_hub_dataset(name)]
    if on_hub:
        metadata["datasets"] = on_hub
    return metadata | {"tags": ["falcon", "lora", "qlora", "falcon-qlora"]}


def _introduction(certificate: Certificate) -> str:
    origin = certificate.origin
    text = (
        f"# {escaped(origin.base_model)}, fine-tuned\n\nA LoRA adapter merged onto "
        f"{_ONTO[certificate.merged_onto]} of {code(origin.base_model)}, stored in {certificate.dtype}, with "
        f"falcon_qlora {origin.falcon_qlora}. The adapter was trained on the base held in "
        f"{escaped(origin.quantization)}.\n"
    )
    if origin.base_model.startswith("random:"):
        text += "\n**The base model's weights are random**: this is a test of the machinery.\n"
    if origin.is_the_adapters_base is False:
        text += f"\n**The adapter was trained on another base**, {code(origin.adapter_base or '')}.\n"
    if origin.licence is None:
        text += "\nThe base model's licence holds; it could not be read here.\n"
    return text


def _usage(certificate: Certificate) -> str:
    dtype = str(DTYPES[certificate.dtype]).removeprefix("torch.")
    text = (
        "## Use\n\n```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'model = AutoModelForCausalLM.from_pretrained("MODEL", dtype="{dtype}")\n'
        'tokenizer = AutoTokenizer.from_pretrained("MODEL")\n```\n\n'
        "```\nvllm serve MODEL\npython convert_hf_to_gguf.py MODEL    # llama.cpp\n```\n"
    )
    if certificate.origin.template:
        text += f"\nIt was trained with the prompt template {code(certificate.origin.template)}.\n"
    if certificate.origin.template in {*TEMPLATES} - {"none", TOKENIZER}:
        prompt = get_template(certificate.origin.template).prompt([Turn("user", "QUESTION")])
        text += f"It writes a question so, and other programs must as well:\n\n```\n{prompt}\n```\n"
    return text


def _proof(certificate: Certificate) -> str:
    held_out = certificate.held_out
    rows = [["quantized base and adapter", f"{certificate.adapter_loss:.4f}"]]
    for onto, measured in certificate.merges.items():
        kept = " (this one)" if onto == certificate.merged_onto else ""
        losses = [f"{measured.loss:.4f}", f"{measured.loss_increase:+.4f}"]
        distances = [f"{measured.kl_divergence:.5f}", f"{100 * measured.same_top_token:.1f} %"]
        rows.append([f"merged onto {_ONTO[onto]}{kept}", *losses, *distances])
    titles = ["", "loss", "more than the adapter", "KL divergence", "same likeliest token"]
    text = escaped(held_out.source)
    measured_on = f"Measured on {held_out.target_tokens:,} tokens of {text}; see `certificate.json`."
    return "\n".join(["## What the merge did\n", measured_on, "", *markdown.table(titles, rows), ""])


def _made_of(certificate: Certificate) -> dict[str, Any]:
    origin = certificate.origin
    rows = {
        "base model": origin.base_model,
        "layout": origin.base_layout,
        "revision": origin.base_revision,
        "commit": origin.base_commit,
        "licence": origin.licence,
        "data": ", ".join(origin.datasets),
        "hash of the tokenized data": origin.data_fingerprint,
        "template": origin.template,
        "template's SHA-256": origin.template_sha256,
        **{f"adapter: {name}": value for name, value in origin.adapter.items()},
    }
    return {label: value for label, value in rows.items() if value not in (None, "")}
