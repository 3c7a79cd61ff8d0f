"""What planning needs to know of the cases, found in one streaming pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from medseg.data import Case
from medseg.io import read_channels, read_labels
from medseg.volume import present_labels

__all__ = ["CaseFingerprint", "fingerprint"]

SAMPLES = 20_000  # foreground voxels looked at per case and channel


@dataclass(frozen=True)
class CaseFingerprint:
    """What planning needs to know of one case; shape and spacing along R, A, S where ``picture`` is False."""

    id: str
    picture: bool
    shape: tuple[int, int, int]
    spacing: tuple[float, float, float]
    modality: str
    integers: bool
    samples: np.ndarray  # (C, n) intensities of foreground voxels, of any voxels where there is no foreground
    lowest: float
    blank: float  # share of the voxels of the first channel that hold its lowest value
    blank_inside: float  # the same share of the foreground
    names: Mapping[int, str]
    counts: Mapping[int, int]  # voxels per label


def _look(case: Case) -> CaseFingerprint:
    image = read_channels(case.images)
    picture = image.geometry.shape[2] == 1
    native = np.asarray(image.array)
    counts: dict[int, int] = {}
    names: dict[int, str] = {}
    mask = None
    if case.label is not None:
        labels = read_labels(case.label).exclusive()
        image.geometry.require_close(labels.geometry, f"label map and image of case {case.id}")
        names = {n: name for n, name in labels.names.items() if name != f"label {n}"}
        counts = {n: int(np.count_nonzero(labels.array == n)) for n in present_labels(labels.array)}
        mask = np.asarray(labels.array) > 0
    if mask is None or not mask.any():
        mask = np.ones(image.geometry.shape, bool)
    index = np.flatnonzero(mask)
    index = np.random.default_rng(0).choice(index, min(len(index), SAMPLES), replace=False)
    samples = np.stack([channel.reshape(-1)[index] for channel in native]).astype(np.float32)
    if not np.isfinite(samples).all():
        raise ValueError(f"voxels must be finite, got NaN or Inf in case {case.id}; run medseg check")
    geometry = image.geometry if picture else image.geometry.reoriented("RAS")
    integers = bool(np.issubdtype(native.dtype, np.integer))
    lowest = float(native.min())
    least = native[0].min()
    blank, blank_inside = float(np.mean(native[0] == least)), float(np.mean(samples[0] == least))
    return CaseFingerprint(
        case.id, picture, geometry.shape, geometry.spacing, image.modality, integers, samples, lowest, blank,
        blank_inside, names, counts,
    )  # fmt: skip


def fingerprint(
    cases: Iterable[Case], *, workers: int = 2, progress: Callable[[int], None] | None = None
) -> list[CaseFingerprint]:
    """Look at every case once, in parallel; memory does not grow with the size of the set but by samples kept."""
    found = []
    with ThreadPoolExecutor(max(1, workers)) as pool:
        for done, one in enumerate(pool.map(_look, cases), start=1):
            found.append(one)
            if progress:
                progress(done)
    return found
