"""Cases of a data set compared with each other: outliers, duplicates, splits, structures."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import ArrayLike

from medseg.data import Dataset
from medseg.inspection import CaseFacts, Finding, Parts
from medseg.volume import Geometry

__all__ = ["compare"]

FEW_CASES = 5  # fewer make neither five folds nor a judgement on outliers
FENCE = 3.0  # Tukey's "far out": this many interquartile ranges beyond the quartiles
INTENSITY_FACTOR = (
    20.0  # and at least this factor from the median, since scales of MR, and 8-bit exports, differ by less anyway
)
SPACING_FACTOR = 2.0
BEFORE_LAST_NUMBER = r"(.*\d.*\D)\d+"  # of an id, where that holds a number too
MOST_LABELS = 255  # different labels of a set
USUAL_PARTS = 0.8  # a structure in one part in this share of the cases should be in one part in all


def compare(dataset: Dataset, facts: Sequence[CaseFacts]) -> list[Finding]:
    """Findings on the set as a whole, from the facts on its cases; the cost is negligible beside reading them."""
    findings = [
        *_intensity_outliers(facts),
        *_spacing_outliers(facts),
        *_duplicates(facts),
        *_splits(dataset),
        *_patients(dataset),
        *_channels(dataset, facts),
        *_structures(dataset, facts),
        *_quirks(facts),
    ]
    orientations = Counter(f.geometry.orientation for f in facts if f.geometry is not None)
    if len(orientations) > 1:
        findings.append(
            Finding(
                "note", "", "orientations differ", _counted(orientations), "none needed: medseg reorients every case"
            )
        )
    dtypes = Counter(f.dtype for f in facts if f.dtype)
    if len(dtypes) > 1:
        findings.append(
            Finding("note", "", "stored types differ", _counted(dtypes), "check that all went through the same export")
        )
    if len(facts) < FEW_CASES:
        detail = f"{len(facts)}: too few for the usual 5 folds and for a judgement on outliers"
        findings.append(Finding("note", "", "very few cases", detail, "add cases"))
    return findings


def _counted(counts: Counter[str]) -> str:
    return ", ".join(f"{name} in {n}" for name, n in counts.most_common())


def _outlying(values: ArrayLike, factor: float) -> list[int]:
    """Indices of positive values beyond Tukey's far-out fence on a log scale and a factor away from the median."""
    logs = np.log(values)
    low, median, high = np.percentile(logs, (25, 50, 75))
    reach, least = FENCE * (high - low), np.log(factor)
    is_out = ((logs > high + reach) | (logs < low - reach)) & (np.abs(logs - median) >= least)
    return [int(i) for i in np.flatnonzero(is_out)]


def _intensity_outliers(facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    for channel in range(max((len(f.spreads) for f in facts), default=0)):
        known = [f for f in facts if len(f.spreads) > channel and f.spreads[channel] > 0]
        if len(known) < FEW_CASES:
            continue
        spreads = [f.spreads[channel] for f in known]
        median = float(np.median(spreads))
        for i in _outlying(spreads, INTENSITY_FACTOR):
            where = f"channel {channel}: " if len(known[i].spreads) > 1 else ""
            yield Finding(
                "warning",
                known[i].case.id,
                "intensity outlier",
                f"{where}range {spreads[i]:.4g}, median of the set {median:.4g} (factor {spreads[i] / median:.3g})",
                "normalise each image by itself (z-score), or find out how it was exported; --fix leaves it as it is",
            )


def _spacing_outliers(facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    known = [(f, g) for f in facts if (g := f.geometry) is not None]
    if len(known) < FEW_CASES:
        return
    spacings = np.array([[g.spacing[_axis(g, world)] for world in range(3)] for _, g in known])
    out = sorted({i for world in range(3) for i in _outlying(spacings[:, world], SPACING_FACTOR)})
    median = np.median(spacings, axis=0)
    for i in out:
        got, usual = (" x ".join(f"{v:.3g}" for v in row) for row in (spacings[i], median))
        yield Finding(
            "warning",
            known[i][0].case.id,
            "spacing outlier",
            f"{got} mm along R, A, S; median of the set {usual} mm",
            "check the header; resampling to the planned spacing evens it out where it is true",
        )


def _axis(geometry: Geometry, world: int) -> int:
    """The index axis that runs along a world axis."""
    return next(a for a, letter in enumerate(geometry.orientation) if letter in ("RL", "AP", "SI")[world])


def _duplicates(facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    same: dict[str, list[CaseFacts]] = defaultdict(list)
    for f in facts:
        if f.digest:
            same[f.digest].append(f)
    for twins in same.values():
        if len(twins) < 2:
            continue
        names = ", ".join(t.case.id for t in twins)
        is_leak = len({t.case.group for t in twins}) > 1
        yield Finding(
            "error" if is_leak else "warning",
            twins[0].case.id,
            "same image twice",
            f"voxels are equal in {names}" + (": a split could put one on each side" if is_leak else ""),
            "keep one of them, or give them one group",
        )


def _splits(dataset: Dataset) -> Iterable[Finding]:
    """Groups on both sides of the splits that nnU-Net's ``splits_final.json`` fixes."""
    path = dataset.root / "splits_final.json"
    if not path.is_file():
        return
    group_of = {c.id: c.group for c in dataset.cases}
    try:
        splits = [(set(map(str, s["train"])), set(map(str, s["val"]))) for s in json.loads(path.read_text("utf-8"))]
    except (ValueError, KeyError, TypeError) as error:
        yield Finding("error", "", "splits not readable", f"{path.name}: {error!r}", "correct or remove the file")
        return
    for number, (train, validation) in enumerate(splits):
        unknown = sorted((train | validation) - group_of.keys())
        if unknown:
            detail = f"fold {number} of {path.name} names {', '.join(unknown[:5])}"
            yield Finding("warning", "", "split names unknown cases", detail, "correct the file")
        both = {group_of.get(i, i) for i in train} & {group_of.get(i, i) for i in validation}
        for name in sorted(both):
            detail = f"{name} is in train and validation of fold {number} of {path.name}"
            yield Finding("error", "", "one patient on both sides of a split", detail, "split by patient")


def _patients(dataset: Dataset) -> Iterable[Finding]:
    """Whether ids look like several images of one patient where no groups are given."""
    if any(c.group != c.id for c in dataset.cases):
        return
    bases = [m[1] for c in dataset.cases if (m := re.search(BEFORE_LAST_NUMBER, c.id))]
    counts = Counter(bases)
    if len(bases) == len(dataset.cases) and 2 <= len(counts) <= len(bases) / 2 and min(counts.values()) > 1:
        yield Finding(
            "warning",
            "",
            "patients may share a split",
            f"{len(bases)} ids have only {len(counts)} beginnings, such as {min(counts)}: several images of one patient?",
            f"name the patient by --group, such as '{BEFORE_LAST_NUMBER}', so that splits keep patients apart",
        )


def _quirks(facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    """What readers found unusual: once where it is the same in all cases, else case by case."""
    remedy = "check that grids and sizes are what you expect"
    cases = Counter(text for f in facts for text in {text for _, text in f.quirks})
    everywhere = {text for text, n in cases.items() if n == len(facts) > 1}
    for text in sorted(everywhere):
        yield Finding("note", "", "unusual files", f"in every case: {text}", remedy)
    for f in facts:
        for name, text in f.quirks:
            if text not in everywhere:
                yield Finding("note", f.case.id, "unusual file", f"{name}: {text}", remedy)


def _channels(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    counts = Counter(f.channels for f in facts if f.geometry is not None)
    if not counts:
        return
    is_declared = dataset.channels != ("image",)
    usual = len(dataset.channels) if is_declared else counts.most_common(1)[0][0]
    for f in facts:
        if f.geometry is not None and f.channels != usual:
            detail = f"{f.channels} channels, {'declared' if is_declared else 'usual'} are {usual}"
            yield Finding("error", f.case.id, "number of channels differs", detail, "convert to the same channels")


def _structures(dataset: Dataset, facts: Sequence[CaseFacts]) -> Iterable[Finding]:
    labelled = [f for f in facts if f.voxels]
    names = dataset.labels or {}
    present = Counter(n for f in labelled for n in f.voxels)
    if dataset.labels is None and _are_objects(labelled):
        most = max(len(f.voxels) for f in labelled)
        detail = f"labels count from 1 to a number that differs by case, up to {most}"
        yield Finding("note", "", "labels number objects", detail, "for one structure, make the labels binary first")
        return
    if len(present) > MOST_LABELS:
        detail = f"{len(present)} different labels, more than the {MOST_LABELS} that can be learnt"
        remedy = "for instances, make the labels binary first; else look whether these are images or interpolated"
        yield Finding("error", "", "too many labels", detail, remedy)
        return
    for number in sorted({*names, *present}):
        title = f"{names[number]} ({number})" if number in names else f"label {number}"
        unknown = [f.case.id for f in labelled if number not in f.voxels and number in f.case.unknown]
        missing = [f.case.id for f in labelled if number not in f.voxels and number not in f.case.unknown]
        if unknown:
            detail = f"{title} was not drawn in {len(unknown)} of {len(labelled)} labelled cases"
            yield Finding(
                "note", "", "structure unknown in some cases", detail, "none needed: these do not count for it"
            )
        if labelled and not present[number]:
            yield Finding("warning", "", "structure in no case", f"{title} is declared", "check the declared numbers")
        elif missing:
            which = ", not in " + ", ".join(missing) if len(missing) <= 5 else ""
            yield Finding(
                "note",
                "",
                "structure missing in some cases",
                f"{title} is in {present[number]} of {len(labelled)} labelled cases{which}",
                "if it was not contoured there, say so: --absent unknown, or the column unknown of a CSV",
            )
        if present[number] >= FEW_CASES:
            yield from _extra_parts(title, [(f, f.parts[number]) for f in labelled if number in f.parts])
    if dataset.labels is None and len(present) == 1 and 1 not in present:
        number = next(iter(present))
        yield Finding(
            "note", "", "one structure", f"labels are 0 and {number}", f"none needed: it is called label {number}"
        )


def _extra_parts(title: str, found: Sequence[tuple[CaseFacts, Parts]]) -> Iterable[Finding]:
    usual = sum(p.number == 1 for _, p in found)
    if not found or usual < USUAL_PARTS * len(found):
        return
    for f, parts in found:
        if parts.number > 1:
            yield Finding(
                "note",
                f.case.id,
                "structure in several parts",
                f"{title} has {parts.number} parts that share no face, one of {parts.voxels} voxels "
                f"{parts.distance_mm:.1f} mm away; it is one part in {usual} of {len(found)} cases",
                "look at it: stray voxels spoil distances, a second part may be real",
            )


def _are_objects(labelled: Sequence[CaseFacts]) -> bool:
    """Whether labels look like instances: numbers 1 to n without gaps in every case, n differing and large."""
    counts = [len(f.voxels) for f in labelled]
    is_consecutive = all(min(f.voxels) == 1 and max(f.voxels) == len(f.voxels) for f in labelled)
    return bool(counts) and is_consecutive and float(np.median(counts)) > 10 and len(set(counts)) > 1
