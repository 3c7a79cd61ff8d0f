"""Rows of metrics of one case: two label maps in, one row per structure out."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, get_args

import numpy as np
from numpy.typing import NDArray

from medseg.calibration import probability_scores
from medseg.case_files import declared_in
from medseg.case_reading import CasePair
from medseg.case_structures import aligned_pair, layers_by_number, structures_of_both, told_apart
from medseg.lesions import Lesions, lesion_rows, match_lesions
from medseg.metrics import Missing, require_tolerance, structure_boxes, structure_scores
from medseg.scores import COLUMNS, VOLUMES, Row
from medseg.surface import DEFAULT_DEFINITION, Definition
from medseg.volume import LabelMap, Structure, present_labels

__all__ = [
    "CaseRows",
    "ScoringOptions",
    "Structures",
    "Surface",
    "empty_row",
    "require_names",
    "row_of",
    "score",
    "score_case",
]

Array = NDArray[Any]
Structures = Mapping[int, str] | Sequence[int | str] | str | os.PathLike[str]
INSTANCES = Structure(1, "instances")


@dataclass(frozen=True)
class Surface:
    """How surface distances are measured: see :func:`medseg.metrics.surface_scores`."""

    definition: Definition = DEFAULT_DEFINITION
    missing: Missing = "diagonal"

    def __post_init__(self) -> None:
        for name, kind in (("definition", Definition), ("missing", Missing)):
            if (value := getattr(self, name)) not in get_args(kind):
                raise ValueError(f"{name} must be one of {', '.join(get_args(kind))}, got {value!r}")


@dataclass(frozen=True)
class ScoringOptions:
    """What is measured, as :func:`medseg.evaluate` takes it.

    ``declared`` are the names of a dataset.json, ``threads`` the structures of a case that are worked on at a time.

    Raises
    ------
    ValueError
        If they are no tolerance, numbers or names, or have no meaning for instances.
    """

    structures: Structures | None = None
    tolerance_mm: float = 1.0
    surface: bool | Surface = True
    lesions: bool | Lesions = False
    labels_present: bool = False
    resample: bool = False
    declared: Mapping[int, str] = field(default_factory=dict)
    threads: int = 1

    def __post_init__(self) -> None:
        require_tolerance(self.tolerance_mm)
        wanted = self.structures
        if isinstance(wanted, str | os.PathLike):
            wanted = declared_in(wanted)
        if isinstance(wanted, Mapping):
            wanted = {int(n): str(name) for n, name in wanted.items()}
        elif wanted is not None:
            wanted = tuple(key if isinstance(key, str) else int(key) for key in wanted)
        if wanted is not None and (not wanted or any(not isinstance(key, str) and key < 1 for key in wanted)):
            raise ValueError(f"structures must be names, or numbers of at least 1, got {wanted or 'none'}")
        object.__setattr__(self, "structures", wanted)
        if self.instances and (wanted is not None or self.labels_present):
            raise ValueError("structures and labels_present must not be given for instances, which are all of one kind")

    @property
    def rule(self) -> Lesions | None:
        """How lesions are counted, if they are."""
        return Lesions() if self.lesions is True else self.lesions or None

    @property
    def instances(self) -> bool:
        """Whether label maps hold the numbers of instances."""
        return self.rule is not None and self.rule.instances

    def settings(self) -> dict[str, Any]:
        """What a reader of the numbers has to know; "surface" is None where no distances are measured."""
        surface = Surface() if self.surface is True else self.surface or None
        found: dict[str, Any] = {"surface": None if surface is None else surface.definition}
        if surface is not None:
            found |= {"missing": surface.missing, "tolerance_mm": self.tolerance_mm}
        found |= {"labels_present": self.labels_present, "resample": self.resample}
        if self.structures is not None:
            found["structures"] = self.structures
        return found if self.rule is None else {**found, "lesions": asdict(self.rule)}


@dataclass(frozen=True)
class CaseRows:
    """Rows of one case: one per structure, and one per lesion where these were asked for.

    ``names`` are those of the structures that either side or the data set knows.
    """

    structures: list[Row]
    lesions: list[Row]
    names: frozenset[str] = frozenset()


def score_case(
    case: str,
    prediction: LabelMap,
    reference: LabelMap,
    *,
    structures: Structures | None = None,
    tolerance_mm: float = 1.0,
    surface: bool | Surface = False,
    lesions: bool | Lesions = False,
    labels_present: bool = False,
    known: Collection[int] | None = None,
    resample: bool = False,
) -> list[Row]:
    """Rows of one case, one per structure: see :func:`medseg.evaluate`.

    ``known`` are the numbers of the structures that somebody drew in the reference: no other is scored, and one of them
    that the reference does not hold is truly absent. All are known by default.

    Raises
    ------
    GeometryError
        If the grids differ (unless ``resample``), or surface distances are asked for on a skewed grid.
    """
    how = ScoringOptions(structures, tolerance_mm, surface, lesions, labels_present, resample)
    found = score(case, CasePair(prediction, reference), how, known=known)
    require_names(how, found.names)
    return found.structures


def require_names(how: ScoringOptions, names: Collection[str]) -> None:
    """Refuse structures that are asked for by a name that none of these is."""
    wanted = how.structures if isinstance(how.structures, tuple) else ()
    if unknown := [key for key in wanted if isinstance(key, str) and key not in names]:
        raise ValueError(f"structures must be among {sorted(names)}, got {unknown}")


def score(case: str, pair: CasePair, how: ScoringOptions, *, known: Collection[int] | None = None) -> CaseRows:
    """Rows of one case.

    Probabilities that cannot be used (on another grid, beyond 0..1) leave the rows without their metrics, and with the
    reason under "note". Structures asked for by a name that neither side knows have no row.
    """
    prediction, reference = aligned_pair(case, pair.prediction, pair.reference, how.resample)
    p, r, names = prediction, reference, frozenset[str]()
    if how.instances:
        p, r, wanted = _foreground(p), _foreground(r), [INSTANCES]
    else:
        there = structures_of_both(prediction, reference)
        wanted = _chosen(there, reference, how)
        names = names.union(how.declared.values(), (s.name for s in there))
        wanted = wanted if known is None else [s for s in wanted if s.number in known]
    numbers = [s.number for s in wanted]
    rows = [row_of(case, s, v) for s, v in zip(wanted, _values(case, p, r, numbers, how), strict=True)]
    found: list[Row] = []
    if how.instances:
        whole = (slice(0, None),) * 3
        found = _add_lesions(rows, [(prediction.array, reference.array, whole)], reference, how)
    elif how.rule is not None:
        found = _add_lesions(rows, _crops(p, r, numbers), reference, how)
    note, soft = pair.note, pair.probabilities
    if soft is None and pair.prediction.is_layered and pair.prediction.array.dtype != bool:
        soft = pair.prediction
    if soft is not None and not how.instances:
        try:
            layers = layers_by_number(soft, pair.prediction, reference)
            soft, _ = aligned_pair(f"{case} (probabilities)", soft, reference, how.resample)
            _add_probabilities(rows, soft, layers, reference)
        except ValueError as problem:
            note = str(problem)
    if note:
        rows = [{**row, "note": note} for row in rows]
    return CaseRows(rows, found, names)


def _add_lesions(
    rows: Sequence[Row],
    crops: Iterable[tuple[Array, Array, tuple[slice, ...]]],
    reference: LabelMap,
    how: ScoringOptions,
) -> list[Row]:
    """Adds the metrics of lesions to the rows of the structures; rows of the lesions, from masks and their box."""
    found: list[Row] = []
    grid = reference.geometry
    for row, (mask, true_mask, box) in zip(rows, crops, strict=True):
        # only the volume of a voxel counts, which on skewed grids is not the product of the spacings
        match = match_lesions(mask, true_mask, (1.0, 1.0, grid.voxel_mm3), how.rule)
        row.update(match.scores())
        affine = np.array(grid.affine)
        affine[:3, 3] += affine[:3, :3] @ [s.start for s in box]
        of = {key: row[key] for key in ("case", "structure", "label")}
        found += [{**of, **one} for one in lesion_rows(match, affine)]
    return found


def _values(
    case: str, prediction: LabelMap, reference: LabelMap, numbers: list[int], how: ScoringOptions
) -> list[dict[str, float]]:
    """Overlap, volumes and surface distances of each structure."""
    grid, surface = reference.geometry, Surface() if how.surface is True else how.surface or None
    options: dict[str, Any] = {"tolerance_mm": how.tolerance_mm, "surface": surface is not None}
    spacing = (1.0, 1.0, grid.voxel_mm3)  # without distances, also right on skewed grids
    if surface is not None:
        grid.require_straight(f"prediction and reference of {case}, for surface distances,")
        options.update(definition=surface.definition, missing=surface.missing)
        spacing = grid.spacing
    if not prediction.is_layered and not reference.is_layered:
        return structure_scores(prediction.array, reference.array, numbers, spacing, threads=how.threads, **options)
    pairs = ((_mask(prediction, n), _mask(reference, n)) for n in numbers)
    return [structure_scores(p, r, [1], spacing, **options)[0] for p, r in pairs]


def _crops(
    prediction: LabelMap, reference: LabelMap, numbers: list[int]
) -> Iterator[tuple[Array, Array, tuple[slice, ...]]]:
    """Both masks of each structure in the box around them, and the box."""
    nothing = (slice(0, 0),) * 3
    if not prediction.is_layered and not reference.is_layered:
        boxes = structure_boxes(prediction.array, reference.array, numbers)
        for n, box in zip(numbers, (b or nothing for b in boxes), strict=True):
            yield prediction.array[box] == n, reference.array[box] == n, box
        return
    for n in numbers:
        p, r = _mask(prediction, n), _mask(reference, n)
        box = structure_boxes(p, r, [1])[0] or nothing
        yield p[box], r[box], box


def _add_probabilities(rows: Sequence[Row], soft: LabelMap, layers: Mapping[int, int], reference: LabelMap) -> None:
    found = {}
    for row in rows:
        if (layer := layers.get(row["label"])) is not None:
            truth = _mask(reference, row["label"])
            found[row["label"]] = probability_scores(soft.array[layer][None], truth[None])[0]
    for row in rows:  # when all of them are known to be probabilities
        row.update(found.get(row["label"], {}))


def row_of(case: str, structure: Structure, score: Mapping[str, float]) -> Row:
    row: Row = {"case": case, "structure": structure.name, "label": structure.number}
    row.update({key: score.get(key, np.nan) for key in COLUMNS[3:-2]})
    volume, true = (row[key] for key in VOLUMES)
    row["volume_difference_mm3"] = volume - true
    row["volume_difference"] = (volume - true) / true if true > 0 else np.nan
    return row


def empty_row(case: str, structure: Structure, how: ScoringOptions) -> Row:
    """The row of a structure that is on neither side."""
    row = row_of(case, structure, dict.fromkeys(VOLUMES, 0.0))
    if how.rule is not None:
        nothing = np.zeros((0, 0, 0), bool)
        row.update(match_lesions(nothing, nothing, (1.0, 1.0, 1.0), how.rule).scores())
    return row


def _foreground(labels: LabelMap) -> LabelMap:
    """All instances as one structure."""
    if labels.is_layered:
        raise ValueError(f"instances must be numbers in one label map, got {len(labels.structures)} layers")
    return replace(labels, array=labels.array > 0, structures=(INSTANCES,))


def _mask(labels: LabelMap, number: int) -> NDArray[Any]:
    return labels.mask(number) if number in labels.names else np.zeros(labels.geometry.shape, bool)


def _chosen(there: Sequence[Structure], reference: LabelMap, how: ScoringOptions) -> list[Structure]:
    """Structures to score, by number, of those that are ``there`` and of those that are asked for by number."""
    found = {s.number: s for s in there}
    if isinstance(how.structures, Mapping):
        found = {n: replace(found.get(n, Structure(n, name)), name=name) for n, name in how.structures.items()}
    elif isinstance(how.structures, Sequence):
        number_of = {name: n for n, name in how.declared.items()} | {s.name: n for n, s in found.items()}
        wanted = [number_of.get(key, 0) if isinstance(key, str) else int(key) for key in how.structures]
        found = {n: found.get(n, Structure(n, how.declared.get(n, f"label {n}"))) for n in wanted if n}
    if how.labels_present:
        if reference.is_layered:
            drawn = {s.number for s in reference.structures if reference.mask(s.number).any()}
        else:
            drawn = {*present_labels(reference.array)}  # one pass over the voxels for all
        found = {n: s for n, s in found.items() if n in drawn and n in reference.names}
    return told_apart(found[n] for n in sorted(found))
