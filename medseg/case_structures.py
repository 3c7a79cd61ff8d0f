"""The structures of both sides of a case: which belong together, by name or number, on the grid of the reference."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from medseg.case_files import is_made_up
from medseg.resample import resample_to
from medseg.volume import LabelMap, Structure, union

__all__ = ["aligned_pair", "layers_by_number", "structures_of_both", "told_apart"]


def aligned_pair(
    case: str, prediction: LabelMap, reference: LabelMap, resample: bool = False
) -> tuple[LabelMap, LabelMap]:
    """The prediction with the numbers, and with ``resample`` on the grid, of the reference; and the reference.

    Raises
    ------
    GeometryError
        If the grids differ (unless ``resample``).
    """
    prediction = _matched(prediction, reference)
    if resample and not prediction.geometry.is_close(reference.geometry):
        prediction = resample_to(prediction, reference.geometry)
    prediction.geometry.require_close(reference.geometry, f"prediction and reference of {case}")
    return prediction, reference


def layers_by_number(soft: LabelMap, prediction: LabelMap, reference: LabelMap) -> dict[int, int]:
    """The layer of probabilities by the number that its structure has in the rows.

    That is the number of the same structure of the prediction; of one that the prediction lacks, that of the reference.
    """
    own = _matched(soft, prediction)
    in_rows, alone = _new_numbers(prediction, reference), _new_numbers(own, reference)
    found: dict[int, int] = {}
    for layer, s in enumerate(own.structures):
        number = in_rows.get(s.number, alone[s.number])
        if s.number in in_rows or number in reference.names:
            found.setdefault(number, layer)
    return found


def structures_of_both(prediction: LabelMap, reference: LabelMap) -> list[Structure]:
    """Structures of either side; names of the reference before those of the prediction, made-up names last."""
    both = sorted((*reference.structures, *prediction.structures), key=lambda s: is_made_up(s.name, s.number))
    return told_apart(union(both))


def _matched(prediction: LabelMap, reference: LabelMap) -> LabelMap:
    """The prediction with the numbers of :func:`_new_numbers`."""
    numbers = _new_numbers(prediction, reference)
    moved = [replace(s, number=numbers[s.number]) for s in prediction.structures]
    return prediction if tuple(moved) == prediction.structures else _renumbered(prediction, moved)


def _new_numbers(prediction: LabelMap, reference: LabelMap) -> dict[int, int]:
    """The numbers of the reference, by those of the prediction, for the structures whose names both sides have.

    Of the rest, those get new numbers whose own is that of another structure of the reference. Without a name in common,
    all go by number.
    """
    theirs, own = (_distinct_names(side) for side in (reference, prediction))
    shared = theirs.keys() & own.keys()
    if not shared:
        return {s.number: s.number for s in prediction.structures}
    claimed = {theirs[name] for name in shared}
    new = max(s.number for s in (*reference.structures, *prediction.structures))
    numbers = {}
    for s in prediction.structures:
        number = theirs[s.name] if s.name in shared else s.number
        if s.name not in shared and (number in claimed or _are_others(s.name, reference.names.get(number), number)):
            number = new = new + 1
        numbers[s.number] = number
    return numbers


def _are_others(name: str, other: str | None, number: int) -> bool:
    """Whether two names of one number are of two structures; a made-up name may be of any."""
    return other is not None and name != other and not is_made_up(name, number) and not is_made_up(other, number)


def _distinct_names(labels: LabelMap) -> dict[str, int]:
    """Number of each structure by its name, of those that a file names, and no two alike."""
    names = [s.name for s in labels.structures]
    return {
        s.name: s.number for s in labels.structures if not is_made_up(s.name, s.number) and names.count(s.name) == 1
    }


def _renumbered(labels: LabelMap, structures: Sequence[Structure]) -> LabelMap:
    """The same structures, each with the number at its place in ``structures``."""
    if labels.is_layered:
        return replace(labels, structures=tuple(structures))
    kind = np.promote_types(labels.array.dtype, np.min_scalar_type(max(s.number for s in structures)))
    array = np.zeros(labels.geometry.shape, kind)
    for old, new in zip(labels.structures, structures, strict=True):
        array[labels.array == old.number] = new.number
    return replace(labels, array=array, structures=tuple(structures))


def told_apart(structures: Iterable[Structure]) -> list[Structure]:
    """The structures with names of their own: the second "node" becomes "node (2)", by its number."""
    apart: dict[str, Structure] = {}
    for s in structures:
        name = s.name
        while name in apart:
            name = f"{name} ({s.number})"
        apart[name] = replace(s, name=name)
    return list(apart.values())
