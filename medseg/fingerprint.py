"""What planning needs to know of the cases, found in one streaming pass."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from medseg.cases import Case
from medseg.data import read_case_labels
from medseg.io import read_channels
from medseg.volume import LabelMap

__all__ = ["MOST_LABELS", "CaseFingerprint", "fingerprint"]

ALL_SAMPLES = 2_000_000  # foreground voxels kept of the whole set and per channel
CASE_SAMPLES = 20_000  # of one case at most
MOST_LABELS = 255  # distinct values of a label file; more are instances
BLOCK = 1 << 22  # voxels looked at together
COMPONENT_VOXELS = 1 << 24  # structures in larger boxes are not taken apart


@dataclass(frozen=True)
class CaseFingerprint:
    """What planning needs to know of one case; shape and spacing along R, A, S where ``picture`` is False."""

    id: str
    picture: bool
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    modality: str
    integers: bool  # whole numbers, however they are stored
    present: tuple[bool, ...]  # channels that are not missing in this case
    samples: np.ndarray  # (C, n) intensities of foreground voxels, of any voxels where there is no foreground
    lowest: float
    blank: float  # share of the voxels of the first channel that is there that hold its lowest value
    blank_inside: float  # the same share of the foreground
    names: Mapping[int, str]
    counts: Mapping[int, int]  # voxels per label
    components: Mapping[int, tuple[int, int, int]]  # per label: how many, voxels of the smallest and of the largest
    unknown: tuple[int, ...] = ()  # labels that nobody drew here
    overlapping: bool = False  # two structures share a voxel, or they are probabilities


def fingerprint(
    cases: Sequence[Case],
    *,
    united: bool = False,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> list[CaseFingerprint]:
    """Look at every case once, in parallel.

    Parameters
    ----------
    cases : sequence of Case
        With or without labels.
    united : bool
        Count all labels as one structure of the number 1.
    workers : int
        Threads; decompression and array arithmetic run outside Python's lock.
    progress : callable, optional
        Called with the number of cases that are done.

    Raises
    ------
    ValueError
        If voxels are not finite, labels are negative or have more than ``MOST_LABELS`` values, or an image and its
        label map do not lie on one grid.

    Notes
    -----
    Time grows with the voxels. Memory holds ``workers`` cases at a time, about twice their voxels, and of each one that
    is done a sample of its foreground: together at most two million voxels per channel, whatever the size of the set.
    """
    samples = max(100, min(CASE_SAMPLES, ALL_SAMPLES // max(1, len(cases))))
    found = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        tasks = [pool.submit(_look, case, samples, united) for case in cases]
        try:
            for done, task in enumerate(tasks, start=1):
                found.append(task.result())
                if progress:
                    progress(done)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)  # the first wrong case ends it
            raise
    return found


def _look(case: Case, count: int, united: bool) -> CaseFingerprint:
    image = read_channels(case.images)
    native = np.asarray(image.array)
    missing = image.meta.get("missing_channels", ())
    present = tuple(c not in missing for c in range(image.channels))
    first = native[present.index(True)]
    labels = None if case.label is None else read_case_labels(case, image)
    drawn = _Drawn({}, {}, {}, False) if labels is None else _look_at_labels(labels, united, case.id)
    seed = np.random.default_rng(0)
    samples = _sample(native, None if labels is None else np.asarray(labels.array), count, seed)
    values = samples[list(present)]
    if not np.isfinite(values).all():
        raise ValueError(f"voxels must be finite, got NaN or Inf in case {case.id}; run medseg check")
    picture = image.geometry.shape[2] == 1
    geometry = image.geometry if picture else image.geometry.reoriented("RAS")
    least = first.min()
    return CaseFingerprint(
        id=case.id,
        picture=picture,
        shape=geometry.shape,
        spacing=geometry.spacing,
        modality=image.modality,
        integers=bool(np.issubdtype(native.dtype, np.integer) or (values == np.rint(values)).all()),
        present=present,
        samples=samples,
        lowest=float(native[list(present)].min()) if missing else float(native.min()),
        blank=_share(first, least),
        blank_inside=float(np.mean(values[0] == least)),
        names=drawn.names,
        counts=drawn.counts,
        components=drawn.components,
        unknown=case.unknown,
        overlapping=drawn.overlapping,
    )


def _slabs(shape: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Slabs along the last axis of an (I, J, K) grid, of about ``BLOCK`` voxels, as indices with all that stands before."""
    thickness = max(1, BLOCK // max(1, shape[-3] * shape[-2]))
    for start in range(0, shape[-1], thickness):
        yield (..., slice(start, start + thickness))  # type: ignore[misc]


def _share(array: np.ndarray, value: float) -> float:
    return sum(int(np.count_nonzero(array[at] == value)) for at in _slabs(array.shape)) / max(1, array.size)


def _sample(image: np.ndarray, labels: np.ndarray | None, most: int, seed: np.random.Generator) -> np.ndarray:
    """(C, n) intensities of random voxels of the foreground, of all voxels where there is none; float32."""
    total = 0 if labels is None else sum(np.count_nonzero(_foreground(labels[at])) for at in _slabs(labels.shape))
    if labels is None or not total:
        places = seed.choice(image[0].size, min(image[0].size, most), replace=False)
        return image[(slice(None), *np.unravel_index(places, image.shape[1:]))].astype(np.float32)
    chosen = []
    for at in _slabs(labels.shape):
        inside = np.flatnonzero(_foreground(labels[at]))
        if total > most:
            inside = seed.choice(inside, round(most * len(inside) / total), replace=False)
        if len(inside):
            chosen.append(image[at].reshape(len(image), -1)[:, inside])
    return np.concatenate(chosen, 1).astype(np.float32)


def _foreground(labels: np.ndarray) -> np.ndarray:
    mask = np.asarray(labels > 0)
    return np.asarray(mask.any(0)) if mask.ndim == 4 else mask


# ---------------------------------------------------------------------------------------------------------------------
# Labels


class _Drawn(NamedTuple):
    """What a label map holds."""

    names: Mapping[int, str]
    counts: Mapping[int, int]
    components: Mapping[int, tuple[int, int, int]]
    overlapping: bool


def _look_at_labels(labels: LabelMap, united: bool, case: str) -> _Drawn:
    if united:
        total = sum(int(np.count_nonzero(_foreground(labels.array[at]))) for at in _slabs(labels.array.shape))
        return _Drawn({}, {1: total} if total else {}, {}, False)
    names = {n: name for n, name in labels.names.items() if name != f"label {n}"}
    if labels.is_layered:
        counts = {s.number: int(np.count_nonzero(labels.mask(s.number))) for s in labels.structures}
        counts = {n: count for n, count in counts.items() if count}
        soft = labels.array.dtype != bool
        shared = soft or any((labels.array[at].sum(0) > 1).any() for at in _slabs(labels.array.shape))
        return _Drawn(names, counts, {n: sizes for n in counts if (sizes := _sizes(labels.mask(n)))}, shared)
    array = np.asarray(labels.array)
    counts = _count(array, case)
    room, components = COMPONENT_VOXELS, {}
    boxes = ndimage.find_objects(array) if max(counts, default=0) <= 1 << 16 and min(counts, default=0) >= 0 else []
    by_size = sorted(
        (math.prod(s.stop - s.start for s in box), n, box) for n, box in enumerate(boxes, start=1) if box is not None
    )
    for size, n, box in by_size:
        room -= size
        if room < 0:
            break
        components[n] = _sizes(array[box] == n)
    return _Drawn(names, counts, components, False)


def _count(array: np.ndarray, case: str) -> dict[int, int]:
    """Voxels of each value but the background."""
    counts: Counter[int] = Counter()
    for at in _slabs(array.shape):
        slab = array[at].ravel()
        low, high = int(slab.min(initial=0)), int(slab.max(initial=0))
        if low >= 0 and high < 1 << 20:
            found = np.bincount(slab)
            counts.update({int(n): int(found[n]) for n in np.flatnonzero(found)[: MOST_LABELS + 2]})
        else:
            numbers, found = np.unique(slab, return_counts=True)
            counts.update(dict(zip(numbers[: MOST_LABELS + 2].tolist(), found.tolist(), strict=False)))
        if len(counts) > MOST_LABELS + 1:
            raise ValueError(
                f"labels must be at most {MOST_LABELS} structures, got more in case {case}; where each number is one "
                "instance (a nucleus, a lesion), use --foreground to learn them all as one structure"
            )
    del counts[0]
    return dict(counts)


def _sizes(mask: np.ndarray) -> tuple[int, int, int]:
    """How many connected components (corners touch), voxels of the smallest and of the largest."""
    pieces, count = ndimage.label(mask, np.ones((3,) * mask.ndim))
    sizes = np.bincount(pieces.ravel())[1:]
    return int(count), int(sizes.min()), int(sizes.max())
