"""The doctor: what is wrong with a data set before it is trained on, and a repaired copy of what can be repaired."""

from __future__ import annotations

import json
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from medseg.comparison import compare
from medseg.data import Dataset, load_dataset
from medseg.inspection import CaseFacts, Finding, inspect
from medseg.io.files import require_free
from medseg.repair import Repair, write_repaired

__all__ = ["Checkup", "Finding", "check"]

SEVERITIES = ("error", "warning", "note")
FEW, MOST_LINES = 3, 12  # findings of one kind, and structures, that are printed one by one


@dataclass(frozen=True)
class Checkup:
    """What the doctor found.

    Parameters
    ----------
    dataset : Dataset
        What was looked at.
    findings : tuple of Finding
        Errors first, then warnings, then notes.
    summary : mapping
        Facts on the set as JSON types: cases, groups, shapes, spacing, voxels and cases of each structure.
    repairs : tuple of Repair
        What was repaired in the copy, in the order of the cases.
    repaired : Path or None
        The repaired copy.
    """

    dataset: Dataset
    findings: tuple[Finding, ...]
    summary: dict[str, Any]
    repairs: tuple[Repair, ...] = ()
    repaired: Path | None = None

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings that would stop or spoil a training."""
        return tuple(f for f in self.findings if f.severity == "error")

    def to_json(self) -> str:
        """Everything as JSON text: dataset, path, summary, findings, repairs, repaired."""
        content = {
            "dataset": self.dataset.name,
            "path": str(self.dataset.root),
            "summary": self.summary,
            "findings": [f._asdict() for f in self.findings],
            "repairs": [r._asdict() for r in self.repairs],
            "repaired": str(self.repaired) if self.repaired else None,
        }
        return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False)

    def __str__(self) -> str:
        s = self.summary
        lines = [f"{self.dataset.name}: cases: {s['cases']}, patients: {s['groups']}, labelled: {s['labelled']}"]
        if s["shape"]:
            shape, spacing = (
                " x ".join(
                    f"{low:g}" if low == high else f"{low:g}-{high:g}" for low, high in zip(*s[key], strict=True)
                )
                for key in ("shape", "spacing_mm")
            )
            lines.append(
                f"  shape {shape}, spacing {spacing} mm, {', '.join(s['orientations'])}, {', '.join(s['dtypes'])}"
            )
        lines += [
            f"  {t['name'] or 'label'} ({t['number']}): in {t['cases']} cases"
            + (f", unknown in {t['unknown']}" if t["unknown"] else "")
            for t in s["structures"][:MOST_LINES]
        ]
        if len(s["structures"]) > MOST_LINES:
            lines.append(f"  and {len(s['structures']) - MOST_LINES} more structures")
        for severity in SEVERITIES:
            for (what, remedy), found in _by_kind(f for f in self.findings if f.severity == severity).items():
                lines += _told(severity, what, found)
                lines.append(f"    -> {remedy}")
        lines += [f"repaired: {r.case}: {r.what} ({r.detail})" for r in self.repairs[:20]]
        if len(self.repairs) > 20:
            lines.append(f"repaired: {len(self.repairs) - 20} more, see {self.repaired}/repairs.json")
        lines += [] if self.findings else ["nothing to report"]
        return "\n".join(lines)


def check(
    dataset: Dataset | str | os.PathLike[str],
    *,
    fix: str | os.PathLike[str] | None = None,
    group: str | None = None,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Checkup:
    """Look at every file of a data set once and report what is wrong or odd.

    Each case by itself: files that cannot be read, image and label (or the images of a case) on different grids, labels
    that are not whole numbers, not declared, stored as float, lossy or empty, NaN and infinity, constant images. The
    cases together: outliers of intensity and spacing, the same image twice, one patient on both sides of a split,
    numbers of channels and orientations that differ, structures that are missing or in more parts than usual.

    An intensity outlier is an image whose range (percentiles 0.1 to 99.9) lies more than 3 interquartile ranges outside
    the quartiles of the set, on a log scale, and at least a factor of 20 from the median; for spacing, along each
    patient axis, the factor is 2.

    Parameters
    ----------
    dataset : Dataset or path
        What to look at.
    fix : path, optional
        New folder for a repaired copy with ``repairs.json``. Originals are never touched; intensities are never changed
        but for NaN and infinity.
    group : str, optional
        As in :func:`medseg.load_dataset`.
    workers : int, optional
        Threads, by default one per CPU up to 8. Each holds one case in memory at a time.
    progress : callable, optional
        Called with the number of cases done and their total.

    Returns
    -------
    Checkup
        Findings, a summary, and the repairs.

    Raises
    ------
    FileExistsError
        If ``fix`` exists.
    FileNotFoundError, ValueError
        If the data set cannot be loaded.

    Notes
    -----
    Reads every file once: time grows with bytes, memory with ``workers`` times the largest case
    (about ten times the bytes of its label map where a structure falls into parts).
    """
    if not isinstance(dataset, Dataset):
        dataset = load_dataset(dataset, group=group)
    if fix is not None:
        require_free(fix)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # what the readers warn of is among their quirks, so a finding
        facts = _inspect_all(dataset, workers or min(8, os.cpu_count() or 1), progress)
    findings = [f for case in facts for f in case.findings] + compare(dataset, facts)
    findings.sort(key=lambda f: SEVERITIES.index(f.severity))
    repairs = write_repaired(dataset, findings, Path(fix)) if fix is not None else ()
    return Checkup(dataset, tuple(findings), _summary(dataset, facts), tuple(repairs), Path(fix) if fix else None)


def _inspect_all(dataset: Dataset, workers: int, progress: Callable[[int, int], None] | None) -> list[CaseFacts]:
    declared = None if dataset.labels is None else frozenset(dataset.labels)
    look = partial(inspect, declared=declared, ignore=dataset.ignore)
    pool, facts = ThreadPoolExecutor(workers), []
    try:
        for done in pool.map(look, dataset.cases):
            facts.append(done)
            if progress:
                progress(len(facts), len(dataset.cases))
    finally:
        pool.shutdown(cancel_futures=True)
    return facts


def _told(severity: str, what: str, found: Sequence[Finding]) -> list[str]:
    """Lines on findings of one kind: each of them where there are few, else how many and an example."""
    cases = list(dict.fromkeys(f.case for f in found))
    if len(found) > FEW and cases[0]:
        names = ", ".join(cases[:6]) + (" ..." if len(cases) > 6 else "")
        return [f"{severity}: {what}: {len(cases)} cases: {names}", f"    e.g. {found[0].detail}"]
    shown = found[: MOST_LINES if len(found) <= MOST_LINES else FEW]
    lines = [f"{severity}: {what}: {f.case}{': ' if f.case else ''}{f.detail}" for f in shown]
    return [*lines, f"    and {len(found) - len(shown)} more"] if len(shown) < len(found) else lines


def _by_kind(findings: Iterable[Finding]) -> dict[tuple[str, str], list[Finding]]:
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for f in findings:
        kinds[f.what, f.remedy].append(f)
    return kinds


def _summary(dataset: Dataset, facts: Sequence[CaseFacts]) -> dict[str, Any]:
    grids = [f.geometry for f in facts if f.geometry is not None]
    names, found = dict(dataset.labels or {}), Counter(n for f in facts for n in f.voxels)
    unknown = Counter(n for f in facts if f.case.label is not None for n in set(f.case.unknown) - set(f.voxels))
    numbers = sorted({*names, *found})
    return {
        "cases": len(facts),
        "groups": len({c.group for c in dataset.cases}),
        "labelled": sum(c.label is not None for c in dataset.cases),
        "channels": list(dataset.channels),
        "shape": _span([g.shape for g in grids]),
        "spacing_mm": _span([g.spacing for g in grids], 3),
        "orientations": sorted({g.orientation for g in grids}),
        "dtypes": sorted({f.dtype for f in facts if f.dtype}),
        "structures": [
            {
                "number": n,
                "name": names.get(n, ""),
                "cases": found[n],
                "unknown": unknown[n],
                "voxels": sum(f.voxels.get(n, 0) for f in facts),
            }
            for n in (numbers if len(numbers) <= 150 else [])
        ],
    }


def _span(rows: Sequence[Sequence[float]], digits: int = 0) -> list[list[float]]:
    if not rows:
        return []
    return [[round(v, digits) for v in edge.tolist()] for edge in (np.min(rows, axis=0), np.max(rows, axis=0))]
