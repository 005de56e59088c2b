"""``falcon-qlora merge --adapter DIR --out DIR``: make a model that needs no adapter and no quantization.

The adapter's folder and its run say which base, template and held-out text it was trained with; flags
override them.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from falcon_qlora.commands.first_look import look_at_held_out
from falcon_qlora.commands.opening import less_memory, parse_with_run, source_of
from falcon_qlora.common.errors import UserError
from falcon_qlora.common.files import quoted, sha256
from falcon_qlora.common.settings import setting
from falcon_qlora.common.stores import is_address
from falcon_qlora.common.version import VERSION
from falcon_qlora.config import Configuration
from falcon_qlora.inference.base_and_adapter import Source, load_measured, tokenizer_of
from falcon_qlora.merge.out import check_disk, check_out, shard_bytes
from falcon_qlora.methods.adapter_folder import read_record
from falcon_qlora.methods.table import method_named
from falcon_qlora.processes.watchdog import end_native_code_after
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.terminal.console import note, print_plain, progress
from falcon_qlora.terminal.library_logging import quiet_libraries
from falcon_qlora.terminal.output import say_loading

if TYPE_CHECKING:
    from falcon_qlora.merge.build import Request
    from falcon_qlora.merge.certificate import Certificate, ChooseBy, Origin
    from falcon_qlora.models.checkpoints import Checkpoint

_SHOWN_SETTINGS = (
    "quantize_mode double_quantization compute_dtype max_length packing train_on num_train_epochs max_steps "
    "optim learning_rate lr_scheduler_type seed"
).split()


@dataclass(kw_only=True)
class MergeArguments:
    """What to merge, onto what, and how good it must be."""

    _argument_group_name = "Merge"

    adapter: str | None = setting(
        None, "Folder of a trained adapter, or of the run that made it.", needed=True
    )
    out: str | None = setting(None, "Folder to write; must not exist.", needed=True)
    base: Literal["auto", "16bit", "dequantized"] = setting(
        "auto",
        "Merge onto the original base, or onto what its quantized weights stand for; auto: both, and keep "
        "the one of the lower held-out loss, or without held-out rows the one nearer to the adapter.",
    )
    dtype: Literal["bf16", "fp16", "fp32"] = setting("bf16", "Store the merged weights in this type.")
    max_shard_size: str = setting("5GB", "Largest weights file, such as 500MB.")
    max_loss_increase: float = setting(
        0.02, "Refuse a merge whose held-out loss is above the adapter's by more, nats a token.", least=0
    )
    max_kl_divergence: float = setting(
        0.1, "Refuse a merge further than this from the adapter, nats a token.", least=0
    )
    held_out_tokens: int = setting(
        16384,
        "Measure on the first whole held-out documents of at most so many tokens, one at least.",
        least=2,
    )


def main(argv: list[str]) -> int:
    """Run the command and return its exit status."""
    configuration, named, folder, run = parse_with_run(argv, verb="merge", extra_arguments=MergeArguments)
    wanted: MergeArguments = configuration.extra
    if folder is None or not wanted.out:
        missing = "out" if folder else "adapter"
        raise UserError(f"--{missing} is needed: falcon-qlora merge --adapter DIR --out DIR")
    if is_address(wanted.out):
        raise UserError(f"--out {wanted.out}: a merge is written into a folder here")
    hub, out = _hub_settings(configuration, named), Path(wanted.out)
    check_out(out, overwrite=configuration.run.overwrite)
    largest_file = shard_bytes(wanted.max_shard_size)
    method = method_named(read_record(folder)["method"], folder)
    if method.why_not_merged is not None:
        raise UserError(
            f"{folder} was trained with {method.title} and cannot be merged: {method.why_not_merged}. Use it "
            "as it is: falcon-qlora generate and falcon_qlora.load_adapter open it"
        )
    end_native_code_after(configuration.run.hang_minutes)
    say_loading()
    quiet_libraries()
    source, record = source_of(configuration, folder, named=named)
    look_at_held_out(configuration.data)

    # Only now, so that errors above are reported without loading libraries.
    from falcon_qlora.merge.build import needed_bytes

    choose_by: ChooseBy = "kl_divergence" if configuration.data.eval_split is None else "loss"
    request = _request(source, wanted, folder, largest_file, choose_by)
    check_out(out, overwrite=configuration.run.overwrite)  # libraries took their time to load
    check_disk(out, needed_bytes(request))
    with progress() as say, less_memory(source, "a smaller -b or --max_length"):
        certificate = _merge(configuration, source, request, out, run, record, say)
    _tell(certificate, out)
    if hub is not None:
        from falcon_qlora.models.hub import push_folder

        print_plain(f"uploaded to {push_folder(out, **hub)}")
    return 0


def _merge(
    configuration: Configuration,
    source: Source,
    request: Request,
    out: Path,
    run: RunDirectory | None,
    record: dict[str, Any],
    say: Callable[[str], None],
) -> Certificate:
    from falcon_qlora.inference.evaluation import batches_of, mean_loss, predictions, token_losses
    from falcon_qlora.merge import build
    from falcon_qlora.merge.certificate import HeldOut
    from falcon_qlora.models.tokenizer import check_vocabulary
    from falcon_qlora.training.held_out import held_out_text

    tokenizer = tokenizer_of(source)
    check_vocabulary(tokenizer, request.config.vocab_size, name=request.checkpoint.name)
    text = held_out_text(configuration, tokenizer, run)
    for each in text.told("--held_out_tokens", configuration.extra.held_out_tokens):
        note(each)
    if configuration.data.eval_split is None:
        note(
            f"no held-out rows are known: the merge is measured on {text.source}. Give --eval_split FILE to "
            "measure on your own data, and to keep the merge of the lower loss instead of the nearer one"
        )
    batches = batches_of(
        text,
        max_tokens=configuration.data.max_length * configuration.run.per_device_train_batch_size,
        most_tokens=configuration.extra.held_out_tokens,
    )
    say(f"loading {source.model}")
    model, _ = load_measured(source, run)
    say("measuring the adapter")
    reference = predictions(model, batches, answers_only=True)
    del model
    gc.collect()
    measured = sum(len(batch.lengths) for batch in batches)
    if run is not None and text.is_the_runs_own and measured == len(text.lengths):
        _check_recorded_loss(configuration, request, run, mean_loss(token_losses(reference)))
    held_out = HeldOut(
        source=text.source,
        fingerprint=text.fingerprint,
        documents=measured,
        tokens=sum(batch.tokens for batch in batches),
        target_tokens=len(reference.targets),
        is_the_runs_own=text.is_the_runs_own,
    )
    origin = _origin(configuration, request, run, record)
    return build.merge(
        request,
        out,
        overwrite=configuration.run.overwrite,
        origin=origin,
        held_out=held_out,
        batches=batches,
        reference=reference,
        say=say,
    )


def _request(
    source: Source, wanted: MergeArguments, folder: Path, largest_file: int, choose_by: ChooseBy
) -> Request:
    from falcon_qlora.merge.build import Request
    from falcon_qlora.methods.adapter_folder import read_adapter
    from falcon_qlora.models.checkpoints import RANDOM
    from falcon_qlora.models.locate import find_folder, open_checkpoint
    from falcon_qlora.models.tokenizer import find_tokenizer
    from falcon_qlora.processes import devices

    adapter = read_adapter(folder)
    opened = open_checkpoint(source.model, revision=source.revision)
    checkpoint, revision = _original(opened, source.revision)
    name, scheme = checkpoint.name, opened.scheme
    zero = adapter.check(checkpoint.config)
    if zero:
        raise UserError(
            f"{folder}: {len(zero)} of its tensors are zero throughout, the first {zero[0]}: the adapter is "
            "damaged, or was never trained"
        )
    device = devices.local_device()
    candidates = ["16bit", "dequantized"] if wanted.base == "auto" else [wanted.base]
    if checkpoint.scheme is not None:
        told = f"the 16-bit model that {name} was quantized from is not known here, or has changed"
        if wanted.base == "16bit":
            raise UserError(f"--base 16bit: {told}. Name it with -m, or merge onto --base dequantized")
        note(f"{told}: merging onto what the quantized weights stand for")
        candidates = ["dequantized"]
    mode = scheme.mode if scheme is not None else source.quantize_mode or "4bit"
    double = source.double_quantization is not False if scheme is None else scheme.double_quantization
    return Request(
        checkpoint=checkpoint,
        revision=revision,
        quantized=opened if scheme is not None else None,
        base_folder=None if name.startswith(RANDOM) else find_folder(name, revision=revision),
        tokenizer_folder=find_tokenizer(
            source.model, tokenizer_name_or_path=source.tokenizer, revision=source.revision
        ),
        adapter=adapter,
        quantize_mode=mode,
        double_quantization=double,
        compute_dtype=devices.compute_dtype(source.compute_dtype, device),
        # For a base that was not quantized, both are the same.
        candidates=candidates[:1] if mode == "16bit" else candidates,  # type: ignore[arg-type]
        dtype=wanted.dtype,
        max_shard_bytes=largest_file,
        max_loss_increase=wanted.max_loss_increase,
        max_kl_divergence=wanted.max_kl_divergence,
        choose_by=choose_by,
        device=device,
    )


def _original(opened: Checkpoint, revision: str | None) -> tuple[Checkpoint, str | None]:
    """The model that a prepared base was made of, and its revision; else what was opened.

    Only if its fingerprint is as recorded: the record may name any folder.
    """
    from falcon_qlora.models.checkpoints import FolderCheckpoint
    from falcon_qlora.models.fingerprint import is_fingerprint_of
    from falcon_qlora.models.locate import open_checkpoint
    from falcon_qlora.models.prepared import read_prepared

    prepared = read_prepared(opened.folder) if isinstance(opened, FolderCheckpoint) else None
    if prepared is None:
        return opened, revision
    known = is_fingerprint_of(prepared.fingerprints[0], prepared.origin, revision=prepared.revision)
    if not known:
        return opened, revision
    return open_checkpoint(prepared.origin, revision=prepared.revision), prepared.revision


def _origin(
    configuration: Configuration, request: Request, run: RunDirectory | None, record: dict[str, Any]
) -> Origin:
    from falcon_qlora.merge.certificate import Origin, licence_of
    from falcon_qlora.methods.open_adapter import is_as_recorded
    from falcon_qlora.models.fingerprint import model_fingerprint
    from falcon_qlora.training.held_out import data_record

    name, revision = request.checkpoint.name, request.revision
    config, adapter, base = request.checkpoint.config, request.adapter, request.base_folder
    resolved = configuration.resolved() if run is not None else {}
    shown = [*configuration.method.flags(), *_SHOWN_SETTINGS]
    fingerprint = data_record(run).get("fingerprint")
    return Origin(
        base_model=name,
        base_revision=revision,
        base_commit=base.name if base is not None and base.parent.name == "snapshots" else None,
        base_fingerprint=model_fingerprint(name, revision=revision),
        adapter_base=record.get("base_model"),
        adapter_base_fingerprint=record.get("base_fingerprint"),
        is_the_adapters_base=is_as_recorded(name, "base model", record, revision=revision),
        base_layout=f"{config.num_hidden_layers} blocks of {config.hidden_size}",
        licence=licence_of(name, base),
        quantization=request.quantize_mode,
        template=record.get("template"),
        template_sha256=record.get("template_fingerprint"),
        datasets=list(resolved.get("dataset_name", [])),
        data_fingerprint=fingerprint if isinstance(fingerprint, str) else None,
        settings={name: resolved[name] for name in shown if resolved.get(name) is not None},
        adapter={
            "method": adapter.method.name,
            **{name: value for name, value in adapter.method.settings().items() if value is not None},
            "sha256": sha256(adapter.file),
        },
        falcon_qlora=VERSION,
    )


def _check_recorded_loss(
    configuration: Configuration, request: Request, run: RunDirectory, loss: float
) -> None:
    """Compare the adapter's loss on its run's held-out rows with the loss that the run recorded."""
    is_the_best = configuration.trainer.get("load_best_model_at_end")
    if not is_the_best or request.adapter.folder.name != run.adapter.name or not run.summary_file.is_file():
        return
    recorded = run.read("summary").get("best_eval_loss")
    if isinstance(recorded, float) and not loss <= recorded + request.max_loss_increase:
        raise UserError(
            f"{request.adapter.folder}: the held-out loss is {loss:.4f}, but its run has {recorded:.4f}: "
            "the adapter or its base was altered since. Nothing was written"
        )


def _hub_settings(configuration: Configuration, named: Collection[str]) -> dict[str, Any] | None:
    """Where and how to upload; None unless a flag asks for it.

    A run's recorded settings may ask for an upload of the run: that does not ask for one of its merge.
    """
    settings, explicit = configuration.trainer, configuration.explicit
    if explicit.get("push_to_hub") != "flag" or not settings["push_to_hub"]:
        return None
    if explicit.get("hub_model_id") != "flag" or not settings["hub_model_id"]:
        raise UserError("--push_to_hub needs to know where to: --hub_model_id NAME/MODEL")
    others = {"private": "hub_private_repo", "token": "hub_token", "revision": "hub_revision"}
    how = {word: settings.get(name) if name in named else None for word, name in others.items()}
    return {"repository": settings["hub_model_id"], **how}


def _tell(certificate: Certificate, out: Path) -> None:
    print_plain(
        f"held-out loss  {certificate.adapter_loss:.4f} of {certificate.origin.quantization} base and adapter"
        f", on {certificate.held_out.target_tokens:,} tokens of {certificate.held_out.source}"
    )
    for onto, each in certificate.merges.items():
        kept = "  (kept)" if onto == certificate.merged_onto and len(certificate.merges) > 1 else ""
        print_plain(
            f"merged onto {onto}: loss {each.loss:.4f} ({each.loss_increase:+.4f}), KL divergence "
            f"{each.kl_divergence:.5f}, same likeliest token {100 * each.same_top_token:.1f} %{kept}"
        )
    print_plain(f"wrote {out}/ ({certificate.dtype}); serve it: vllm serve {quoted(str(out))}")
