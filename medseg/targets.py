"""From the label map of a case to what a network is trained on: classes or layers on the planned grid."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.losses import IGNORE
from medseg.plan import ANY, Plan, StructurePlan
from medseg.resample import resample_to
from medseg.volume import Geometry, LabelMap, Structure, Volume, present_labels

__all__ = ["known_structures", "make_target", "numbered_by_name", "values_present"]

Array = NDArray[Any]
TOGETHER = 8  # layers that are resampled at once
TOLERANCE = 1e-3  # by which probabilities of exclusive structures may sum to more than 1
NAMED = ("SEG", "RTSTRUCT")  # kinds of file whose numbers are in no order: names decide


def make_target(labels: LabelMap, grid: Geometry, plan: Plan, case: str) -> Array:
    """The training target of a case.

    Parameters
    ----------
    labels : LabelMap
        Exclusive labels, bool layers that may overlap, or float layers of probabilities (soft labels).
    grid : Geometry
        The planned grid.
    plan : Plan
        Its structures unite labels; ``overlapping`` decides the form, ``ignore`` is the label that does not count.
    case : str
        For messages.

    Returns
    -------
    (I, J, K) int16, or (S, I, J, K) int8 or float16
        Exclusive: the class of each voxel, 1..S in the order of the plan's structures, 0 the background. Overlapping: a
        layer per structure, of 0 and 1, or of 0..1 (float16) where labels are soft. -1 where the label is to be ignored.

    Raises
    ------
    ValueError
        If a label is not in the plan; or, where the plan is not overlapping, two structures share a voxel or labels are
        probabilities.

    Notes
    -----
    Regions are united before anything is resampled. Classes: the largest interpolated share wins, the ignored among
    them. Layers: the share is interpolated linearly, relative to the volume that counts, and cut at one half where hard.
    The union of soft layers is their sum where all layers are exclusive (sum to at most 1 everywhere), else the largest.

    Time grows with voxels times structures; memory beyond the result is that of a few layers.
    """
    allowed = {0, plan.ignore, *(v for s in plan.structures for v in s.values)}
    strange = [] if ANY in allowed else [n for n in values_present(labels) if n not in allowed]
    if strange:
        numbers = ", ".join(str(v) for s in plan.structures for v in s.values)
        name = labels.names.get(strange[0], "")
        named = f" ({name})" if name not in ("", f"label {strange[0]}") else ""
        raise ValueError(
            f"labels must be in the plan ({numbers}), got {strange[0]}{named} in case {case}; run medseg check, or plan "
            "anew"
        )
    return _layers(labels, grid, plan) if plan.overlapping else _classes(labels, grid, plan, case)


def known_structures(plan: Plan, unknown: Collection[int], present: Collection[int] = ()) -> tuple[bool, ...]:
    """Whether each structure of the plan counts in a case.

    Parameters
    ----------
    plan : Plan
        Its structures unite labels.
    unknown : collection of int
        Labels that nobody drew in this case.
    present : collection of int
        Labels that the file holds all the same: those were drawn.

    Notes
    -----
    A region counts only if each of its labels was drawn or is truly absent: where one is unknown, voxels outside the
    others may belong to the region or not.
    """
    missing = set(unknown) - set(present)
    return tuple(not (missing - {plan.ignore} if ANY in s.values else missing & set(s.values)) for s in plan.structures)


def values_present(labels: LabelMap) -> list[int]:
    """Labels with at least one voxel (of a probability above 0), without the background."""
    if not labels.is_layered:
        return [n for n in present_labels(labels.array) if n]
    return [s.number for s, layer in zip(labels.structures, labels.array, strict=True) if layer.any()]


def numbered_by_name(labels: LabelMap, plan: Plan) -> LabelMap:
    """Structures of a SEG or RTSTRUCT with the plan's number of their name, if any name of the file is one of the plan.

    The numbers of these files count segments or contours as they came, and differ from case to case. Labels of other
    formats, and plans of regions, go by number alone.
    """
    if labels.meta.get("modality") not in NAMED:
        return labels
    number_of = {s.name.strip().lower(): s.number for s in plan.structures}
    if any(s.labels for s in plan.structures) or len(number_of) < len(plan.structures):
        return labels
    wanted = {s.number: number_of.get(s.name.strip().lower()) for s in labels.structures}
    wanted |= {n: n for n in wanted if n == plan.ignore}
    if not any(wanted.values()):
        return labels
    free = max([*number_of.values(), *wanted]) + 1  # structures that the plan lacks get numbers that it lacks, too
    numbers = {old: n if n is not None else free + at for at, (old, n) in enumerate(wanted.items())}
    if len(set(numbers.values())) < len(numbers):
        return labels
    structures = tuple(replace(s, number=numbers[s.number]) for s in labels.structures)
    if labels.is_layered:
        return replace(labels, structures=structures)
    array = np.zeros(labels.array.shape, np.int32)
    for old, new in numbers.items():
        array[labels.array == old] = new
    return replace(labels, array=array, structures=structures)


def planned_labels(labels: LabelMap, plan: Plan) -> tuple[LabelMap, Array | None]:
    """Labels on their own grid in the structures of the plan, and the mask of voxels that do not count, if any.

    Voxels that do not count are background. Soft labels stay soft.

    Raises
    ------
    ValueError
        If structures overlap that the plan holds exclusive.
    """
    labels = numbered_by_name(labels, plan)
    hidden = _ignored(labels, plan)
    counted = True if hidden is None else ~hidden
    soft = labels.is_layered and labels.array.dtype != bool
    if labels.is_layered or plan.overlapping or any(s.labels for s in plan.structures):
        layers = [layer for _, some in _native_layers(labels, plan, soft) for layer in some]
    else:
        array = labels.array if hidden is None else np.where(hidden, np.zeros((), labels.array.dtype), labels.array)
        return replace(labels, array=array, structures=labels.structures), hidden
    planned = replace(labels, array=np.stack(layers) * counted, structures=plan.as_structures())
    return (planned if plan.overlapping else planned.exclusive()), hidden


# ---------------------------------------------------------------------------------------------------------------------
# Exclusive classes


def _classes(labels: LabelMap, grid: Geometry, plan: Plan, case: str) -> Array:
    if labels.is_layered and labels.array.dtype != bool:
        raise ValueError(
            f"labels must be whole numbers or masks in a plan without overlap, got probabilities in case {case}; "
            "plan with overlapping = true (--overlapping)"
        )
    ignored = len(plan.structures) + 1
    native = np.zeros(labels.geometry.shape, np.int16)
    for c, s in enumerate(plan.structures, start=1):
        mask = _mask(labels, s, plan)
        if labels.is_layered:
            taken = native[mask]
            if taken.any():
                other = plan.structures[int(taken[taken > 0][0]) - 1].name
                raise ValueError(
                    f"structures must not share voxels in a plan without overlap, got {s.name!r} over {other!r} in case "
                    f"{case}; plan with overlapping = true (--overlapping)"
                )
        native[mask] = c
    hidden = _ignored(labels, plan)
    if hidden is not None:
        native[hidden] = ignored
    moved = np.array(resample_to(LabelMap(native, labels.geometry, _stand_ins(ignored)), grid).array, np.int16)
    if hidden is not None:
        moved[moved == ignored] = IGNORE
    return moved


def _mask(labels: LabelMap, structure: StructurePlan, plan: Plan) -> Array:
    """(I, J, K) bool mask of the voxels that belong to a structure."""
    if labels.is_layered:
        chosen = [labels.array[n] for n in _rows(labels, structure, plan)]
        return np.logical_or.reduce(chosen) if chosen else np.zeros(labels.geometry.shape, bool)
    if ANY in structure.values:
        mask = labels.array != 0
        return np.asarray(mask if plan.ignore is None else mask & (labels.array != plan.ignore))
    first, *others = structure.values
    mask = labels.array == first
    for value in others:
        mask |= labels.array == value
    return np.asarray(mask)


def _rows(labels: LabelMap, structure: StructurePlan, plan: Plan) -> list[int]:
    """Indices of the layers that make up a structure."""
    every = ANY in structure.values
    numbers = [s.number for s in labels.structures]
    return [i for i, n in enumerate(numbers) if n in structure.values or (every and n != plan.ignore)]


def _ignored(labels: LabelMap, plan: Plan) -> Array | None:
    """(I, J, K) bool mask of the voxels that do not count, None where all do."""
    if plan.ignore is None:
        return None
    if labels.is_layered:
        found = [
            layer >= 0.5 for s, layer in zip(labels.structures, labels.array, strict=True) if s.number == plan.ignore
        ]
        mask = np.logical_or.reduce(found) if found else None
    else:
        mask = np.asarray(labels.array == plan.ignore)
    return mask if mask is not None and mask.any() else None


def _stand_ins(count: int) -> tuple[Structure, ...]:
    return tuple(Structure(n, str(n)) for n in range(1, count + 1))


# ---------------------------------------------------------------------------------------------------------------------
# Layers


def _layers(labels: LabelMap, grid: Geometry, plan: Plan) -> Array:
    soft = labels.is_layered and labels.array.dtype != bool
    hidden = _ignored(labels, plan)
    out = np.empty((len(plan.structures), *grid.shape), np.float16 if soft else np.int8)
    share = None  # of the volume of each voxel that counts
    if hidden is not None:
        share = _interpolated(1 - hidden[None].astype(np.float32), labels.geometry, grid, outside=1)[0]
    for rows, native in _native_layers(labels, plan, soft):
        if share is None and not soft:
            out[rows] = resample_to(LabelMap(native, labels.geometry, _stand_ins(len(native))), grid).array
            continue
        if hidden is not None:
            native = np.where(hidden, 0, native)
        moved = _interpolated(native.astype(np.float32), labels.geometry, grid)
        if share is not None:
            moved = moved / np.maximum(share, 1e-6)
        out[rows] = np.clip(moved, 0, 1) if soft else moved > 0.5
    if share is not None:
        out[:, share < 0.5] = IGNORE
    return out


def _interpolated(array: Array, geometry: Geometry, grid: Geometry, outside: float = 0) -> Array:
    """(S, I, J, K) float32 shares on another grid."""
    return np.asarray(resample_to(Volume(array, geometry), grid, "linear", outside).array, np.float32)


def _native_layers(labels: LabelMap, plan: Plan, soft: bool) -> Iterator[tuple[slice, Array]]:
    """Layers of the plan's structures, a few at a time, with the rows that they take."""
    sums = soft and bool((labels.array.sum(0) <= 1 + TOLERANCE).all())
    for start in range(0, len(plan.structures), TOGETHER):
        some = plan.structures[start : start + TOGETHER]
        made = [_soft_union(labels, s, plan, sums) if soft else _mask(labels, s, plan) for s in some]
        yield slice(start, start + len(some)), np.stack(made)


def _soft_union(labels: LabelMap, structure: StructurePlan, plan: Plan, sums: bool) -> Array:
    chosen: Sequence[Array] = [labels.array[n] for n in _rows(labels, structure, plan)]
    if not chosen:
        return np.zeros(labels.geometry.shape, np.float32)
    union = np.sum(chosen, axis=0) if sums else np.max(chosen, axis=0)
    return np.clip(union, 0, 1).astype(np.float32)
