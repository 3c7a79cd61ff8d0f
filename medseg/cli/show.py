"""What the commands print: results on stdout, progress and messages on stderr."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Annotated, Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from tyro.conf import arg

__all__ = ["Device", "bar", "print_json", "print_table", "say", "show_evaluation", "show_warning"]

Device = Annotated[str, arg(metavar="auto|cpu|cuda[:n]")]
ERR = Console(stderr=True)
METRICS = ("iou", "dice", "hd95_mm", "nsd")


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
    print(json.dumps(value, indent=1))


def show_evaluation(evaluation: Any, json: bool, comparisons: Sequence[Any] = ()) -> None:
    """Print an Evaluation, and how it compares with another, as JSON or as tables."""
    if json:
        _print_evaluation(evaluation, comparisons)
        return
    table = Table("structure", "cases", "IoU", "Dice", "HD95 (mm)", "NSD")
    for row in evaluation.summary:
        cells = [f"{row[m]['mean']:.3f} [{row[m]['ci95'][0]:.3f}, {row[m]['ci95'][1]:.3f}]" for m in METRICS]
        table.add_row(row["structure"], str(row["n_defined"]), *cells)
    print_table(table)
    for row in evaluation.failed:
        say(f"{row['case']}: {row['error']}")
    if comparisons:
        table = Table("structure", "pairs", "Dice of --compare", "Dice", "difference", "p (Wilcoxon, Holm)")
        for c in comparisons:
            change = f"{c.difference:+.3f} [{c.low:+.3f}, {c.high:+.3f}]"
            table.add_row(c.structure, str(c.n), f"{c.first:.3f}", f"{c.second:.3f}", change, f"{c.p_holm:.3g}")
        print_table(table)


def _print_evaluation(evaluation: Any, comparisons: Sequence[Any]) -> None:
    """The JSON of an Evaluation, with the key "comparison" where there is one; NaN is null."""
    if not comparisons:
        print(evaluation.to_json())
        return
    rows = [{key: None if v != v else v for key, v in asdict(c).items()} for c in comparisons]
    print_json({**json.loads(evaluation.to_json()), "comparison": rows})


@contextmanager
def bar(what: str) -> Iterator[Callable[..., None]]:
    """A progress bar on stderr; gives a function of done and total."""
    with Progress(console=ERR, transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total=None: bar.update(task, completed=done, total=total)
