"""What the commands print: results on stdout, progress and messages on stderr."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from json import dumps
from typing import Annotated, Any

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress
from rich.table import Table
from tyro.conf import arg

import medseg

__all__ = ["Device", "bar", "print_json", "print_table", "say", "show_evaluation", "show_warning"]

Device = Annotated[str, arg(metavar="auto|cpu|cuda[:n]")]
ERR = Console(stderr=True)
METRICS = {"iou": "IoU", "dice": "Dice", "hd95_mm": "HD95 (mm)", "nsd": "NSD"}
LESIONS = {
    "lesion_f1": "lesion F1", "lesion_sensitivity": "sensitivity", "false_positives": "false positives", "pq": "PQ",
}  # fmt: skip
WORST = 3
POOLED = {"lesion_f1": "F1", "lesion_sensitivity": "sensitivity", "pq": "PQ"}
INSTANCES = {"lesion_f1": "F1", "pq": "PQ", "ap50": "AP50", "ap75": "AP75", "ap": "mean AP"}
PROBABILITIES = {"soft_dice": "soft Dice", "brier": "Brier score", "ece": "calibration error"}


def show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    ours = issubclass(category, UserWarning) and not issubclass(category, DeprecationWarning)
    if ours:
        say(f"warning: {message}")


def say(line: str) -> None:
    ERR.print(line, markup=False, highlight=False, soft_wrap=True)


def print_table(table: Table) -> None:
    console = Console()
    console.print(table) if console.is_terminal else Console(width=160).print(table)


def print_json(value: Any) -> None:
    print(dumps(value, indent=1))


def show_evaluation(evaluation: Any, json: bool, runs: Any = None, more: Mapping[str, Any] | None = None) -> None:
    """Print an Evaluation, and a RunComparison with other runs, as JSON (with further entries) or as tables."""
    if json:
        print(evaluation.to_json({**(runs.as_rows() if runs else {}), **(more or {})}))
        return
    _print_summary(evaluation)
    _print_pooled(evaluation)
    _print_worst(evaluation)
    for row in evaluation.failed:
        say(f"{row['case']}: {row['error']}")
    for case, note in evaluation.notes.items():
        say(f"{case}: scored without probabilities: {note}")
    if runs:
        _print_runs(runs)


def _print_worst(evaluation: Any) -> None:
    """The worst of several cases, without those that failed or have nothing defined."""
    ordered = [(case, value) for case, value in medseg.statistics.worst_cases(evaluation) if value == value]
    if len(ordered) > 1:
        worst = ", ".join(f"{case} {value:.3f}" for case, value in ordered[:WORST])
        print(f"worst by mean Dice: {worst}; median {ordered[len(ordered) // 2][1]:.3f} of {len(ordered)}")


def _print_runs(runs: Any) -> None:
    for problem in runs.problems:
        say(problem)
    for name, own in runs.pairs.items():
        table = Table(
            "structure", "pairs", "Dice of the other", "Dice", "difference", "p (Wilcoxon, Holm)", title=escape(name)
        )
        for c in (one for one in own if one.metric == "dice"):
            change = f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
            table.add_row(escape(c.structure), str(c.n), f"{c.first:.3f}", f"{c.second:.3f}", change, f"{c.p_holm:.3g}")
        if table.row_count:
            print_table(table)
    if runs.ranking:
        table = Table("place", "run", "mean rank by Dice", "mean Dice", "missing")
        for r in runs.ranking:
            interval = f"{r.mean_rank:.2f} [{r.low:.2f}, {r.high:.2f}]"
            table.add_row(str(r.place), escape(r.run), interval, f"{r.mean:.3f}", str(r.missing))
        print_table(table)


def _print_pooled(evaluation: Any) -> None:
    """Lesions of all cases together."""
    if not evaluation.pooled:
        return
    table = Table("all cases together", "lesions", "found", "false positives", *POOLED.values())
    for e in evaluation.pooled:
        counts = (str(e[key]) for key in ("reference_lesions", "lesions_found", "false_positives"))
        estimates = (_interval({"mean": e[m]["value"], "ci95": e[m]["ci95"]}) for m in POOLED)
        table.add_row(escape(e["structure"]), *counts, *estimates)
    print_table(table)


def _print_summary(evaluation: Any) -> None:
    """Means with their intervals, of the usual metrics and of those of lesions and probabilities where measured."""
    for metrics in (METRICS, INSTANCES if evaluation.are_instances else LESIONS, PROBABILITIES):
        shown = {m: name for m, name in metrics.items() if m in evaluation.metrics}
        if not shown:
            continue
        table = Table("structure", "cases", *shown.values())
        for row in evaluation.summary:
            table.add_row(escape(row["structure"]), str(row["n_defined"]), *(_interval(row[m]) for m in shown))
        print_table(table)


def _interval(estimate: Mapping[str, Any]) -> str:
    mean, (low, high) = estimate["mean"], estimate["ci95"]
    shown = "–" if mean != mean else f"{mean:.3f}"
    return shown if low != low else f"{shown} [{low:.3f}, {high:.3f}]"


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives a function of done and total."""
    with Progress(console=ERR, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
