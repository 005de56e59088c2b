"""The verdict, and the report that says how it came about."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from tests.benchmarks.quality.distances import Comparison
from tests.benchmarks.quality.learning import Job, Run
from tests.benchmarks.quality.variants import VARIANTS, Variant

LEAST_FALL = 0.10  # of the loss: where nothing was learned, nothing was compared


@dataclass(kw_only=True)
class Findings:
    """Everything that was measured.

    Attributes:
        about: versions, machine, settings and durations.
        kernel: two blocks of each published shape.
        model: whole trained models.
        learning: fine-tuning runs.
        skipped: variant → why it was not run.
        missing: variant → comparisons and runs that there are no figures of, and why.
    """

    about: dict[str, Any] = field(default_factory=dict)
    kernel: list[Comparison] = field(default_factory=list)
    model: list[Comparison] = field(default_factory=list)
    learning: list[Run] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def miss(self, variant: str, place: str, reason: str) -> None:
        """Note that there are no figures of `place`."""
        self.missing.setdefault(variant, []).append(f"{place}: {reason}")

    @property
    def comparisons(self) -> list[tuple[str, Comparison]]:
        return [("a", each) for each in self.kernel] + [("b", each) for each in self.model]


def failures(findings: Findings) -> dict[str, list[str]]:
    """What is wrong, by who is to blame: a variant's name, or a mutant that passed.

    A mutant must be rejected in every comparison of parts (a) and (b); what (c) says of it is reported.
    """
    found = {name: [f"was not run: {reason}"] for name, reason in findings.skipped.items() if decides(name)}
    for name, places in findings.missing.items():
        found.setdefault(name, []).extend(places)
    for part, comparison in findings.comparisons:
        place = f"({part}) {comparison.model}, {comparison.variant}"
        for reason in comparison.failures:
            found.setdefault(comparison.variant, []).append(f"{place}: {reason}")
        for mutant, reasons in comparison.mutants.items():
            if not reasons:
                found.setdefault(f"mutant: {mutant}", []).append(f"{place}: passes")
    for fast, stock in pairs(findings.learning):
        if fast.job.mutant is None:
            reasons = learning_rejections(fast, stock)
            place = f"(c) {name_of(fast.job)}"
            if reasons:
                found.setdefault(fast.job.variant.name, []).extend(f"{place}: {r}" for r in reasons)
    return found


def decides(name: str) -> bool:
    """Whether what `failures` found under this name fails the gate."""
    variant = VARIANTS.get(name)
    return variant is None or variant.on_by_default


def stock_of(variant: Variant) -> Variant:
    """The variant whose stock path this one is held against: without FP8."""
    return VARIANTS[variant.quantize_mode] if variant.compute_dtype == "fp8" else variant


def pairs(runs: list[Run]) -> list[tuple[Run, Run]]:
    """Each run of the fast path, mutants included, with the stock path's of the same base and seed.

    A run whose partner is not there, or not yet, is left out.
    """
    stock = {
        (run.job.base, run.job.variant.name, run.job.seed): run
        for run in runs
        if run.job.path == "stock" and not run.job.repeat
    }
    keys = {
        run.job: (run.job.base, stock_of(run.job.variant).name, run.job.seed)
        for run in runs
        if run.job.path == "fast"
    }
    return [(run, stock[keys[run.job]]) for run in runs if keys.get(run.job) in stock]


def learning_rejections(fast: Run, stock: Run) -> list[str]:
    """Why the fast path did not learn what the stock path did; none where it did."""
    reasons = []
    tolerance = fast.job.variant.loss_tolerance
    for through, loss in (("its own path", fast.own), ("the stock path", fast.by_stock)):
        if not abs(loss / stock.own - 1) <= tolerance:
            reasons.append(f"loss {loss / stock.own - 1:+.2%} through {through}, {tolerance:.1%} allowed")
    for run in (fast, stock):
        if not 1 - run.own / run.untrained >= LEAST_FALL:
            fell = 1 - run.own / run.untrained
            reasons.append(f"the {run.job.path} path's loss fell by {fell:.1%}: nothing to compare")
    return reasons


def name_of(job: Job) -> str:
    """A run, for people to read."""
    again = ", again" if job.repeat else ""
    return f"{job.base}, {job.variant.name}, {job.mutant or job.path}, seed {job.seed}{again}"


def run_line(run: Run) -> str:
    """What came of a fine-tuning run."""
    return (
        f"- (c) {name_of(run.job)}: {run.untrained:.4f} → {run.own:.4f}, "
        f"on the stock path {run.by_stock:.4f}; {run.steps} steps, {run.seconds:.0f} s"
    )


def comparison_lines(part: str, comparison: Comparison) -> list[str]:
    """A line a path: how far from float32 it is."""
    lines = []
    for path, distances in comparison.distances.items():
        if path in comparison.mutants:
            continue
        figures = ", ".join(f"{group} {_mean_and_worst(each.values())}" for group, each in distances.items())
        lines.append(f"- ({part}) {comparison.model}, {comparison.variant}, {path}: {figures}")
        if path == "fast":
            rejected = sum(map(bool, comparison.mutants.values()))
            lines[-1] += "; " + ("; ".join(comparison.failures) or "passes")
            lines[-1] += f"; {rejected} of {len(comparison.mutants)} mutants rejected"
    return lines


def to_json(findings: Findings) -> str:
    everything = asdict(findings) | {"failures": failures(findings)}
    return json.dumps(everything, indent=1) + "\n"


def to_markdown(findings: Findings) -> str:
    found = failures(findings)
    bad = {name: reasons for name, reasons in found.items() if decides(name)}
    lines = ["# Quality gate: " + ("failed" if bad else "passed"), ""]
    lines += [f"- {name}: {value}" for name, value in findings.about.items()]
    lines += [f"- {name} was not run: {reason}" for name, reason in findings.skipped.items()]
    for name, reasons in found.items():
        verdict = "fails" if decides(name) else "fails, and is off by default"
        lines += [f"- **{name}** {verdict}:", *(f"  - {reason}" for reason in reasons)]
    lines += [f"- mutant, {name}: rejected by {by}" for name, by in _rejected_by(findings).items()]
    titles = {
        "kernel": "(a) Kernel: two blocks of the published shapes, random weights",
        "model": "(b) Model: whole trained models",
    }
    for part, title in titles.items():
        comparisons: list[Comparison] = getattr(findings, part)
        if comparisons:
            lines += ["", f"## {title}", "", *_distance_table(comparisons)]
            lines += ["", *_mutant_table(comparisons)]
    if findings.learning:
        lines += ["", "## (c) Learning", "", *_learning_table(findings.learning)]
        lines += ["", *_noise(findings.learning)]
    return "\n".join(lines) + "\n"


def _rejected_by(findings: Findings) -> dict[str, str]:
    """Mutant → the parts that reject it, and how often."""
    counted: dict[str, dict[str, list[bool]]] = {}
    for part, comparison in findings.comparisons:
        for name, reasons in comparison.mutants.items():
            counted.setdefault(name, {}).setdefault(part, []).append(bool(reasons))
    for fast, stock in pairs(findings.learning):
        if fast.job.mutant is not None:
            of_mutant = counted.setdefault(fast.job.mutant, {})
            of_mutant.setdefault("c", []).append(bool(learning_rejections(fast, stock)))
    return {
        name: ", ".join(f"({part}) {sum(each)} of {len(each)}" for part, each in parts.items())
        for name, parts in counted.items()
    }


def _distance_table(comparisons: list[Comparison]) -> list[str]:
    lines = ["Relative distance (norms) from float32 on the same weights, mean (worst):", ""]
    rows = []
    for comparison in comparisons:
        for path, distances in comparison.distances.items():
            if path in comparison.mutants:
                continue
            columns = [_mean_and_worst(of_group.values()) for of_group in distances.values()]
            verdict = ("rejected" if comparison.failures else "passes") if path == "fast" else ""
            verdict = "yardstick" if path == comparison.yardstick else verdict
            rows.append([comparison.model, comparison.variant, path, *columns, verdict])
    groups = list(comparisons[0].distances["fast"])
    return lines + _table(["model", "variant", "path", *groups, ""], rows)


def _mutant_table(comparisons: list[Comparison]) -> list[str]:
    rows = []
    for name in dict.fromkeys(name for comparison in comparisons for name in comparison.mutants):
        having = [c for c in comparisons if name in c.mutants]
        each = [c.distances[name] for c in having]
        columns = [_range([_mean(d[group]) for d in each]) for group in each[0]]
        rejected = sum(bool(c.mutants[name]) for c in having)
        rows.append([name, *columns, f"{rejected} of {len(having)}"])
    groups = list(comparisons[0].distances["fast"])
    return _table(["mutant: least to largest mean", *groups, "rejected"], rows)


def _learning_table(runs: list[Run]) -> list[str]:
    rows = []
    for fast, stock in pairs(runs):
        reasons = learning_rejections(fast, stock)
        job = fast.job
        rows.append(
            [
                job.base,
                job.variant.name + (f", {job.mutant}" if job.mutant else ""),
                str(job.seed),
                f"{stock.untrained:.4f}",
                f"{stock.own:.4f}",
                f"{1 - stock.own / stock.untrained:.1%}",
                f"{fast.own:.4f} ({fast.own / stock.own - 1:+.3%})",
                f"{fast.by_stock:.4f} ({fast.by_stock / stock.own - 1:+.3%})",
                f"{job.variant.loss_tolerance:.1%}",
                f"{stock.seconds:.0f} / {fast.seconds:.0f}",
                "rejected" if reasons else "passes",
            ]
        )
    head = "base, variant, seed, untrained, stock, fell by, fast, fast's adapter on stock, allowed, seconds, "
    return _table([*head.split(", ")], rows)


def _noise(runs: list[Run]) -> list[str]:
    lines = []
    by_seed: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        if run.job.path == "stock" and not run.job.repeat:
            by_seed.setdefault((run.job.base, run.job.variant.name), []).append(run.own)
    spread = [max(losses) / min(losses) - 1 for losses in by_seed.values() if len(losses) > 1]
    if spread:
        lines.append(f"Between seeds the stock path's loss differs by {_range(spread, 3)}.")
    for run in runs:
        if run.job.repeat:
            lines += [
                f"The same run of the stock path again, {run.job.variant.name} on {run.job.base}: "
                f"{abs(run.own / same.own - 1):.3%}."
                for same in runs
                if same.job == replace(run.job, repeat=0)
            ]
    return lines


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(cells) + " |" for cells in lines]


def _mean(values: dict[str, float]) -> float:
    return sum(values.values()) / len(values)


def _mean_and_worst(values: Iterable[float]) -> str:
    listed = list(values)
    mean, worst = sum(listed) / len(listed), max(listed)
    if worst == 0:
        return "0"
    if worst < 1e-3:
        return f"{mean:.0e} ({worst:.0e})"
    return f"{mean:.2%}" if len(listed) == 1 else f"{mean:.2%} ({worst:.2%})"


def _range(values: list[float], digits: int = 1) -> str:
    low, high = f"{min(values):.{digits}%}", f"{max(values):.{digits}%}"
    return low if low == high else f"{low}–{high}"
