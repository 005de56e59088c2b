"""What was proved about a finished run: the section `checks` of its summary, one key a check.

Each has a ``state``: ``passed``, ``failed``, ``not checked`` with the reason, or ``recorded`` where there is
nothing to compare with. ``told`` is its line for a reader; the other keys are its figures. A check is of the
whole run or of what has happened since its last start.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from falcon_qlora.checkpoint import manifest
from falcon_qlora.checkpoint.adapter_check import WHOLE, Reopened
from falcon_qlora.common.files import quoted
from falcon_qlora.common.quantities import GIB, counted, sized
from falcon_qlora.data.tokens import COUNTED
from falcon_qlora.methods.adapter_folder import TENSORS, read_record
from falcon_qlora.methods.interface import method_of
from falcon_qlora.models.fingerprint import model_fingerprint, shown
from falcon_qlora.models.layouts import causal_lm_in, layout_of
from falcon_qlora.models.quantize import QuantizeMode, holds_quantized_weight
from falcon_qlora.processes import ranks
from falcon_qlora.processes.command_clock import command_words
from falcon_qlora.run_folder.directory import RunDirectory
from falcon_qlora.run_folder.environment import versions, without_secrets
from falcon_qlora.training.answers import Answers
from falcon_qlora.training.kernel_check import Distance
from falcon_qlora.training.leak_probe import LeakProbe
from falcon_qlora.training.trainer import FalconTrainer

Check = dict[str, Any]

# What a measured peak may be above the predicted one: beyond that, a run that fits by prediction may not.
_MEMORY_ABOVE = 0.05
# Of the wall clock: what adding up its parts may lose.
_CLOCK_ERROR = 0.01


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What one process knows by itself; small, for `gather_objects`.

    Attributes:
        rank: and host, for messages.
        unquantized: linears of the blocks that are not stored as the settings say; none for 16bit.
        adapted: linears of the blocks under which something is trained.
        answers: since the last start.
        kernels: the fast path beside the model's own forward; or why they were not compared.
        leak_probe: of the first documents; or why there was none.
        versions: of Python, the packages and the GPU's driver.
    """

    rank: str
    unquantized: list[str]
    adapted: list[str]
    answers: Answers
    kernels: Distance | str
    leak_probe: LeakProbe | str
    versions: dict[str, str]


def facts(trainer: FalconTrainer, mode: QuantizeMode) -> Facts:
    """What this process knows of a run whose base is to be stored in `mode`; nothing runs on the device."""
    base = causal_lm_in(trainer.model)
    layout = layout_of(base.config)
    linears = {name: base.get_submodule(name) for name in layout.expected_linears()}
    return Facts(
        rank=ranks.named(),
        unquantized=[
            name
            for name, linear in linears.items()
            if mode != "16bit" and not holds_quantized_weight(getattr(linear, "base_layer", linear), mode)
        ],
        adapted=[
            name for name, linear in linears.items() if any(p.requires_grad for p in linear.parameters())
        ],
        answers=trainer.answers,
        kernels=trainer.kernel_check,
        leak_probe=trainer.leak_probe,
        versions=versions(),
    )


def collect(
    everyone: list[Facts],
    model: nn.Module,
    *,
    mode: QuantizeMode,
    replicas: str | None,
    reopened: Reopened | None,
    predicted_gib: float | None,
    measured_gib: float,
    clock: Mapping[str, float],
    data: Mapping[str, Any],
    account_at_end: Mapping[str, Any] | None,
    documents: int | None,
    end_token_appended: bool,
    base: tuple[str, str | None],
    directory: RunDirectory,
) -> dict[str, Check]:
    """The checks of a run whose adapter is written; on the main process.

    Args:
        everyone: each process's facts, by rank.
        model: that was trained.
        mode: how its base is to be stored.
        replicas: checksum of what all ranks hold alike; None if it was not compared.
        reopened: from `check_opening`.
        predicted_gib, measured_gib: a process's peak memory; predicted None on the CPU.
        clock: the seconds of the summary.
        data: the record in data.json.
        account_at_end: of a stream's rows, None for other data.
        documents: that were trained on; None if not known.
        end_token_appended: the setting.
        base: its name and revision.
        directory: of the run.
    """
    return {
        "quantized": _quantized(everyone, model, mode),
        "adapter_coverage": _coverage(everyone, model),
        "end_token": _end_token([each.answers for each in everyone], appended=end_token_appended),
        "kernels": _kernels([each.kernels for each in everyone]),
        "packing": _packing([each.leak_probe for each in everyone]),
        "ranks": _ranks(everyone, replicas),
        "reopened": _reopened(reopened),
        "memory": _memory(predicted_gib, measured_gib),
        "clock": _clock(clock),
        "data": _data(data, account_at_end, documents),
        "versions": _versions(everyone),
        "fingerprints": _fingerprints(directory, data, *base),
        "command": _command(),
    }


def told_in_lines(checks: Mapping[str, Check]) -> list[str]:
    """The checks in a few lines for the terminal: what failed, what passed in pairs, what was not checked."""
    lines = (
        "quantized adapter_coverage",
        "end_token packing",
        "kernels ranks reopened",
        "memory clock",
        "data",
    )
    told = [line(each) for each in checks.values() if each["state"] == "failed"]
    for names in lines:
        of_line = [checks[name] for name in names.split()]
        passed = [each["told"] for each in of_line if each["state"] in ("passed", "recorded")]
        told += [" · ".join(passed)] if passed else []
    missing = [each["told"] for each in checks.values() if each["state"] == "not checked"]
    return told + ([f"not checked: {'; '.join(missing)}"] if missing else [])


def line(check: Mapping[str, Any]) -> str:
    """A check in one line, from its state and what it tells."""
    told, state = str(check.get("told", "")), check.get("state")
    if state in ("passed", "recorded"):
        return told
    return f"{'FAILED' if state == 'failed' else state}: {told}"


def _check(passed: bool, told: str, **figures: Any) -> Check:
    return {"state": "passed" if passed else "failed", "told": told, **figures}


def _not_checked(told: str, **figures: Any) -> Check:
    return {"state": "not checked", "told": told, **figures}


def _quantized(everyone: list[Facts], model: nn.Module, mode: QuantizeMode) -> Check:
    of = len(layout_of(causal_lm_in(model).config).expected_linears())
    if mode == "16bit":
        return _not_checked("the base is not quantized (16bit)", of=of)
    worst = max(everyone, key=lambda each: len(each.unquantized))
    found = of - len(worst.unquantized)
    told = f"{found:,} of {of:,} linears quantized to {mode}"
    if worst.unquantized:
        told += f" ({worst.rank}: {worst.unquantized[0]} is not)"
    return _check(found == of, told, found=found, of=of, mode=mode)


def _coverage(everyone: list[Facts], model: nn.Module) -> Check:
    """Of all linears of the blocks, those with something trained; and whether the method means those."""
    layout, method = layout_of(causal_lm_in(model).config), method_of(model)
    linears = layout.expected_linears()
    asked = linears
    if not method.is_whole:
        saved = [name.removeprefix("base_model.model.") for name in method.saved_shapes(layout.config)]
        asked = [name for name in linears if any(each.startswith(f"{name}.") for each in saved)]
    if not asked:
        return _not_checked(f"{method.title} trains no linear: it trains {method.trains}", of=len(linears))
    sizes = {name: math.prod(layout.linear_shapes()[name.rpartition(".")[2]]) for name in linears}
    least = min(everyone, key=lambda each: len(each.adapted))
    share = sum(sizes[name] for name in least.adapted) / sum(sizes.values())
    told = (
        f"{method.title} on {len(least.adapted):,} of {len(linears):,} linears, {share:.1%} of their weights"
    )
    wrong = next((each for each in everyone if each.adapted != asked), None)
    if wrong is not None:
        (name, *_) = [each for each in linears if (each in asked) != (each in wrong.adapted)]
        told += f" ({wrong.rank}: {name} {'is not trained' if name in asked else 'was to be left alone'})"
    return _check(
        wrong is None, told, found=len(least.adapted), of=len(linears), asked=len(asked), weights=share
    )


def _end_token(everyone: list[Answers], *, appended: bool) -> Check:
    answers, ended, cut = (
        sum(getattr(each, name) for each in everyone) for name in ("answers", "ended", "cut")
    )
    if not answers:
        return _not_checked("no answer was trained since the last start")
    told = f"the end token trained in {ended / answers:.1%} of {counted(answers, 'answer')}"
    if cut:
        told += f"; {cut:,} of them cut at --max_length"
    figures = {"answers": answers, "ended": ended, "cut": cut, "share": ended / answers}
    if not appended:
        return {"state": "recorded", "told": f"{told} (--append_end_token false)", **figures}
    return _check(ended + cut == answers, told, **figures)


def _kernels(everyone: list[Distance | str]) -> Check:
    compared = [each for each in everyone if isinstance(each, Distance)]
    if not compared:
        return _not_checked(f"kernels ({everyone[0]})")
    worst = max(compared, key=lambda each: each.gradients)
    told = f"gradients of fast blocks within {worst.gradients:.1g} of the model's own"
    if worst.noise[0]:
        told += f" (rounding alone: {worst.noise[0]:.1g})"
    return _check(True, told, **asdict(worst), ranks=len(compared))  # else the run would not have begun


def _packing(everyone: list[LeakProbe | str]) -> Check:
    probes = [each for each in everyone if isinstance(each, LeakProbe)]
    if not probes:
        return _not_checked(f"whether documents reach each other: {everyone[0]}")
    worst = max(probes, key=lambda each: (not each.passed, each.moved))
    moved = "did not move by a bit" if worst.moved == 0 else f"moved by {worst.moved:.2g}"
    told = (
        f"the loss of {worst.documents} packed documents ({worst.loss:.4f}; apart {worst.apart:.4f}) {moved} "
        "when others changed"
    )
    return _check(all(each.passed for each in probes), told, **asdict(worst), ranks=len(probes))


def _ranks(everyone: list[Facts], replicas: str | None) -> Check:
    if len(everyone) == 1:
        return _not_checked("whether ranks are alike (there is one)", ranks=1)
    if replicas is None:
        return _not_checked("each rank holds its own part of the weights", ranks=len(everyone))
    return _check(
        True, f"{len(everyone)} ranks identical ({replicas[:12]})", ranks=len(everyone), checksum=replicas
    )


def _reopened(reopened: Reopened | None) -> Check:
    if reopened is None:
        return _not_checked("the adapter was not opened again")
    if reopened.why_not == WHOLE:
        told = "every tensor of the saved model, read back, is the one in memory"
        return _check(True, told, by=reopened.by)
    if reopened.why_not is not None:
        return _not_checked(f"the adapter was not opened again: {reopened.why_not}", by=reopened.by)
    same = "the same logits" if reopened.difference == 0 else f"logits within {reopened.difference:.2g}"
    told = f"adapter reopened by {reopened.by}: {same}"
    return _check(True, told, by=reopened.by, logits=reopened.logits, difference=reopened.difference)


def _memory(predicted: float | None, measured: float) -> Check:
    if predicted is None:
        return _not_checked(f"{sized(measured * GIB)} used (nothing was predicted)", measured_gib=measured)
    ratio = measured / predicted
    told = f"{sized(measured * GIB)} used of {sized(predicted * GIB)} predicted ({ratio - 1:+.1%})"
    return _check(ratio <= 1 + _MEMORY_ABOVE, told, measured_gib=measured, predicted_gib=predicted)


def _clock(clock: Mapping[str, float]) -> Check:
    """The share of the steps; whether no second was counted twice."""
    parts = ("train_seconds", "start_seconds", "save_seconds", "evaluation_seconds")
    wall, share = clock["wall_seconds"], clock["step_share"]
    spent = sum(clock[name] for name in parts)
    told = f"{share:.1%} of the clock in steps"
    if not (passed := spent <= wall * (1 + _CLOCK_ERROR)):
        told += f" (but its parts add up to {spent:.1f} of {wall:.1f} s)"
    return _check(passed, told, step_share=share, wall_seconds=wall)


def _data(data: Mapping[str, Any], at_end: Mapping[str, Any] | None, documents: int | None) -> Check:
    """Rows read, used, and left out by reason; whether they add up."""
    reasons: Counter[str] = Counter()
    if data.get("streaming"):
        if at_end is None:
            return _not_checked("what became of the stream's rows was not counted")
        reasons.update(at_end["dropped"])
        read = at_end["counts"].get("rows_read", 0)
        used = read - reasons.total()
        left_out = reasons.total()
    else:
        for source in data["sources"]:
            reasons.update(source["account"].get("dropped", {}))
        read, used = data["rows_read"], sum(source["rows_kept"] for source in data["sources"])
        left_out = sum(data[name] for name in COUNTED.values())
    why = ", ".join(f"{number:,} {reason}" for reason, number in reasons.most_common())
    told = f"{counted(read, 'row')} read, {used:,} used, {left_out:,} left out{f' ({why})' if why else ''}"
    if documents is not None:
        told += f"; {counted(documents, 'document')} trained on"
    missing = max(abs(read - used - left_out), abs(left_out - reasons.total()))
    if missing:
        told += f": they do not add up, as {missing:,} are not accounted for"
    figures = {"read": read, "used": used, "left_out": dict(reasons), "documents": documents}
    return _check(not missing, told, **figures)


def _versions(everyone: list[Facts]) -> Check:
    first = everyone[0].versions
    for each in everyone[1:]:
        for name in first.keys() | each.versions.keys():
            if each.versions.get(name) != first.get(name):
                told = f"{each.rank} has {name} {each.versions.get(name)}, rank 0 {first.get(name)}"
                return _check(False, told, **first)
    told = ", ".join(f"{name} {version}" for name, version in first.items())
    if len(everyone) == 1:
        return {"state": "recorded", "told": told, "of": first}
    return _check(True, f"{told}: the same on {len(everyone)} ranks", of=first)


def _fingerprints(directory: RunDirectory, data: Mapping[str, Any], base: str, revision: str | None) -> Check:
    """What the run was made of and what it made; whether the base is still what it was at the start."""
    record = read_record(directory.adapter)
    files = manifest.read_manifest(directory.adapter).get("files", {})
    written = {name: about["sha256"] for name, about in files.items() if "sha256" in about}
    of = {
        "base": record.get("base_fingerprint"),
        "tokenizer": record.get("tokenizer_fingerprint"),
        "template": record.get("template_fingerprint"),
        "data": data.get("fingerprint"),
        "adapter": written.get(TENSORS),
    }
    now = model_fingerprint(base, revision=revision)
    told = ", ".join(f"{name} {shown(value)}" for name, value in of.items() if value is not None)
    if now != of["base"]:
        return _check(False, f"the base's files changed during the run: now {shown(now)}; {told}", of=of)
    return _check(True, told, of=of)


def _command() -> Check:
    words = without_secrets(command_words())
    return {"state": "recorded", "told": " ".join(map(quoted, words)), "words": words}
