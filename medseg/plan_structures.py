"""Which structures are learnt, and which of them change places in a mirror."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from medseg.cases import Dataset
from medseg.fingerprint import MOST_LABELS, CaseFingerprint
from medseg.plan_record import ANY, StructurePlan
from medseg.volume import default_color

__all__ = ["choose_mirror", "choose_structures", "side_pairs", "united"]

LEAST_INSTANCES = 16  # fewer numbers may be structures that are cut off in some cases
SIDES = {
    "left": "left", "l": "left", "lt": "left", "lh": "left",
    "right": "right", "r": "right", "rt": "right", "rh": "right",
}  # fmt: skip
# Sides of the heart, and lobes of the lung, are no mirror images of each other.
ASYMMETRIC = {
    "ventricle",
    "atrium",
    "atrial",
    "auricle",
    "appendage",
    "heart",
    "cardiac",
    "coronary",
    "lobe",
    "bronchus",
}
CHAMBERS = {"lv", "rv", "la", "ra", "lad", "rca"}  # sided without saying so
SYMMETRIC = {"lateral", "frontal", "temporal", "parietal", "occipital", "insular"}  # the brain's ventricles and lobes


def united(dataset: Dataset) -> Dataset:
    """The same data set, of which all labels are learnt as one structure: instances, each with a number of its own."""
    return replace(dataset, regions={"foreground": (ANY,)})


def choose_structures(
    looks: Sequence[CaseFingerprint], dataset: Dataset, overlapping: bool, reasons: dict[str, str]
) -> tuple[tuple[StructurePlan, ...], bool]:
    """The structures, and whether each has a sigmoid of its own.

    Raises
    ------
    ValueError
        If nothing is labelled, labels are negative or not declared, look like instances, or a structure is in no case.
    """
    ignore = dataset.ignore
    cases_with: Counter[int] = Counter(n for look in looks for n in look.counts if n != ignore)
    negative = [look.id for look in looks if min((n for n in look.counts if n != ignore), default=0) < 0]
    if negative:
        raise ValueError(f"labels must be at least 0, got a negative label in case {negative[0]}; run medseg check")
    if not cases_with:
        raise ValueError("labels must mark at least one structure, got only background; run medseg check")
    is_united = any(ANY in labels for labels in dataset.regions.values())
    if dataset.labels is not None and not is_united:
        _require_declared(looks, dataset)
    if dataset.regions:
        found = _regions(dataset.regions, cases_with)
        why = "all labels as one" if is_united else "regions declared by the data set"
    else:
        found, why = _plain(looks, dataset, cases_with)
    values = [v for s in found for v in s.values]
    shared = len(set(values)) < len(values)
    together = any(look.overlapping for look in looks)
    if overlapping:
        reasons["overlapping"] = "asked for"
    elif shared or together:
        reasons["overlapping"] = "regions share labels" if shared else "label files have structures that overlap"
    if ignore is not None:
        reasons["ignore"] = "declared by the data set: voxels of this label do not count"
    reasons["structures"] = why + _occurrence(found, looks)
    return found, overlapping or shared or together


def _require_declared(looks: Sequence[CaseFingerprint], dataset: Dataset) -> None:
    for look in looks:
        strange = [n for n in look.counts if n not in (dataset.labels or ()) and n != dataset.ignore]
        if strange:
            raise ValueError(
                f"labels must be declared ({', '.join(map(str, dataset.labels or ()))}), got {strange[0]} in case "
                f"{look.id}; run medseg check"
            )


def _regions(regions: Mapping[str, Sequence[int]], cases_with: Counter[int]) -> tuple[StructurePlan, ...]:
    absent = [name for name, labels in regions.items() if ANY not in labels and not set(labels) & set(cases_with)]
    if absent:
        raise ValueError(
            f"regions must occur in the training cases, got none of {', '.join(absent)}; drop the region, or hold out "
            "another fold"
        )
    return tuple(
        StructurePlan(number=n, name=name, color=default_color(n), labels=tuple(labels))
        for n, (name, labels) in enumerate(regions.items(), start=1)
    )


def _plain(
    looks: Sequence[CaseFingerprint], dataset: Dataset, cases_with: Counter[int]
) -> tuple[tuple[StructurePlan, ...], str]:
    """One structure per number."""
    declared = dataset.labels
    if declared is None:
        _require_no_instances(looks, cases_with)
        names = {n: f"label {n}" for n in sorted(cases_with)} | _names_in_files(looks)
        names = {n: name for n, name in names.items() if n in cases_with}
    else:
        names = dict(declared)
    absent = [f"{name} ({n})" for n, name in names.items() if n not in cases_with]
    if absent:
        raise ValueError(
            f"structures must occur in the training cases, got none of {', '.join(absent)}; drop the label, or hold out "
            "another fold"
        )
    why = "declared by the data set" if declared is not None else "the values present, named as in the label files"
    found = tuple(StructurePlan(number=n, name=names[n], color=default_color(n)) for n in sorted(names))
    return found, why


def _names_in_files(looks: Sequence[CaseFingerprint]) -> dict[int, str]:
    """Names by number, which all label files must agree on."""
    names: dict[int, str] = {}
    owner: dict[int, str] = {}
    for look in looks:
        for n, name in look.names.items():
            if n not in look.counts:
                continue
            if names.setdefault(n, name).strip().lower() != name.strip().lower():
                raise ValueError(
                    f"a number must name one structure in all label files, got {n} for {names[n]!r} in case {owner[n]} "
                    f"and for {name!r} in case {look.id}; give them the same numbers, or declare labels in dataset.json"
                )
            owner.setdefault(n, look.id)
    return names


def _require_no_instances(looks: Sequence[CaseFingerprint], cases_with: Counter[int]) -> None:
    """Instances are numbered 1 to N in each case, with another N; structures keep their numbers."""
    counts = [len(look.counts) for look in looks if look.counts]
    consecutive = all(set(look.counts) == set(range(1, len(look.counts) + 1)) for look in looks)
    like_instances = consecutive and max(counts) >= LEAST_INSTANCES and len(set(counts)) > 1
    if like_instances or len(cases_with) > MOST_LABELS:
        raise ValueError(
            f"labels must be structures, got what looks like instances ({min(counts)} to {max(counts)} numbers a case); "
            "use --foreground to learn them all as one structure, or declare labels in dataset.json"
        )


def _occurrence(structures: Sequence[StructurePlan], looks: Sequence[CaseFingerprint]) -> str:
    """In how many cases each structure was drawn where that is not all of them, and of how many pieces it is."""
    parts = []
    for s in structures:
        known = [look for look in looks if not set(s.values) & set(look.unknown)]
        values = [n for look in looks for n in look.counts] if ANY in s.values else s.values
        drawn = [look for look in known if any(look.counts.get(v) for v in values)]
        if len(known) < len(looks):
            parts.append(f"{s.name} unknown in {len(looks) - len(known)} of {len(looks)} cases")
        if len(drawn) < len(known):
            parts.append(f"{s.name} absent in {len(known) - len(drawn)} of {len(known)}")
        pieces = [look.components[v] for look in drawn for v in s.values if v in look.components]
        many = float(np.median([p[0] for p in pieces])) if pieces else 0
        if many >= 3:
            small, large = min(p[1] for p in pieces), max(p[2] for p in pieces)
            parts.append(f"{s.name} in about {many:.0f} pieces of {small} to {large} voxels")
    return "; " + ", ".join(parts) if parts else ""


# ---------------------------------------------------------------------------------------------------------------------
# Left and right


def choose_mirror(
    structures: Sequence[StructurePlan], dims: int, orientation: str | None, reasons: dict[str, str]
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...]]:
    """Axes that training may mirror, and the pairs of structures that then change places."""
    if orientation is None:
        reasons["mirror"] = "off: pictures may have a fixed view"
        return (), ()
    pairs, unpaired = side_pairs({s.number: s.name for s in structures})
    if unpaired:
        reasons["mirror"] = f"off: left and right differ ({unpaired[0]} has no counterpart)"
        return (), ()
    axis = next(a for a, letter in enumerate(orientation) if letter in "RL")
    if axis >= dims:
        reasons["mirror"] = "off: left and right lie across the slices"
        return (), ()
    reasons["mirror"] = "left to right only: bodies are nearly symmetric that way"
    if pairs:
        reasons["swaps"] = "these change places when an image is mirrored"
    return (axis,), pairs


def side_pairs(names: Mapping[int, str]) -> tuple[tuple[tuple[int, int], ...], list[str]]:
    """Numbers of structures that are left and right of one kind, and names with a side that have no counterpart.

    Sides are words of the name ("left kidney", "KidneyRight", "L_Parotid", "lung_lt"). Parts of the heart and of the
    lungs count as without counterpart: they are no mirror images.

    >>> side_pairs({1: "left kidney", 2: "liver", 3: "kidney_R"})
    (((1, 3),), [])
    """
    by_rest: dict[tuple[str, ...], dict[str, int]] = {}
    unpaired = []
    for number, name in names.items():
        words = _words(name)
        sides = {SIDES[w] for w in words if w in SIDES}
        if set(words) & CHAMBERS or (sides and set(words) & ASYMMETRIC and not set(words) & SYMMETRIC):
            unpaired.append(name)
        elif len(sides) == 1:
            rest = tuple(sorted(w for w in words if w not in SIDES))
            taken = by_rest.setdefault(rest, {}).setdefault(sides.pop(), number)
            unpaired += [name] if taken != number else []
    unpaired += [names[n] for found in by_rest.values() if len(found) == 1 for n in found.values()]
    pairs = tuple((f["left"], f["right"]) for f in by_rest.values() if len(f) == 2)
    return pairs, unpaired


def _words(name: str) -> list[str]:
    """Words of a name in lower case, split where the case changes too: "LParotid" is l and parotid."""
    return [w.lower() for w in re.findall(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|\d+|[^\W\d_A-Za-z]+", name)]
