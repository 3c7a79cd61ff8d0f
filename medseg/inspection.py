"""Looking at one case: what its files hold, and what is wrong with them. The doctor compares cases with each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from edt import edt
from numpy.typing import NDArray
from scipy import ndimage

from medseg.data import Case
from medseg.io import read, read_labels
from medseg.io.picture import UNCLEAR, unclear_share
from medseg.volume import Geometry, LabelMap, Volume, present_labels

__all__ = ["CaseFacts", "Finding", "LabelFile", "inspect", "read_label_file"]

Array = NDArray[Any]
READ_ERRORS = (OSError, EOFError, ValueError, TypeError)  # what a damaged file makes readers raise
GRID_TOLERANCE_MM = 0.01
MOST_STRUCTURES = 150  # more numbers in one label map are objects, not structures: their parts are not analysed
LOSSY = (".jpg", ".jpeg")
SAMPLE = 1 << 20  # voxels looked at for percentiles


class Finding(NamedTuple):
    """One thing the doctor has to say.

    ``severity`` is "error" (training would stop, or learn or score nonsense), "warning" (probably wrong) or "note"
    (worth knowing); ``case`` is the id, "" for the set as a whole; ``what`` is a short name of the kind of finding.
    """

    severity: str
    case: str
    what: str
    detail: str
    remedy: str


class Parts(NamedTuple):
    """Parts of one structure that share no voxel face: how many; voxels and distance (mm) of the farthest small one."""

    number: int
    voxels: int
    distance_mm: float


@dataclass
class CaseFacts:
    """What one case holds, small enough to keep for all cases of a set."""

    case: Case
    geometry: Geometry | None = None
    channels: int = 0
    dtype: str = ""
    spreads: tuple[float, ...] = ()
    digest: str = ""
    voxels: dict[int, int] = field(default_factory=dict)
    parts: dict[int, Parts] = field(default_factory=dict)
    quirks: list[tuple[str, str]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(self, severity: str, what: str, detail: str, remedy: str) -> None:
        """Note a finding on this case."""
        self.findings.append(Finding(severity, self.case.id, what, detail, remedy))


class LabelFile(NamedTuple):
    """A label file as it is stored, before any rule for labels is applied: (I, J, K) values, or a layered label map."""

    values: Array
    geometry: Geometry
    is_lossy: bool
    layered: LabelMap | None = None


def read_label_file(path: Path, geometry: Geometry) -> LabelFile:
    """Read a label file without refusing what is wrong with it.

    Raises
    ------
    ValueError, OSError
        If the file cannot be read at all, or has more than one channel that differ.
    """
    if path.is_dir() or path.suffix.lower() == ".dcm":
        labels = read_labels(path, like=geometry)
        return LabelFile(labels.array, labels.geometry, False, labels if labels.is_layered else None)
    is_lossy = path.name.lower().endswith(LOSSY)
    if path.name.lower().endswith((".png", ".tif", ".tiff", ".bmp")):  # only the label reader knows palettes of labels
        labels = read_labels(path)
        return LabelFile(labels.array, labels.geometry, False)
    volume = read(path)
    channels = volume.array
    if len(channels) > 1 and not is_lossy and not all(np.array_equal(channels[0], c) for c in channels[1:]):
        labels = read_labels(path)  # layers that medseg or 3D Slicer wrote
        if labels.is_layered:
            return LabelFile(labels.array, labels.geometry, False, labels)
        raise ValueError(f"label map must have one channel, got {len(channels)} in {path}; write one number per voxel")
    return LabelFile(channels[0], volume.geometry, is_lossy)


def inspect(case: Case, declared: frozenset[int] | None, ignore: int | None = None) -> CaseFacts:
    """Read all files of a case once and collect facts and findings; memory as for one case.

    Parameters
    ----------
    case : Case
        What to look at.
    declared : set of int, or None
        Numbers of the declared labels, None where nothing is declared.
    ignore : int, optional
        Label of voxels that do not count.
    """
    facts, digest = CaseFacts(case), hashlib.blake2b(digest_size=16)
    for number, path in enumerate(case.images):
        if path is None:
            facts.channels, facts.spreads = facts.channels + 1, (*facts.spreads, 0.0)
            digest.update(b"missing")
            remedy = "none needed: it counts as average intensity; networks learn to do without it"
            facts.add("note", "channel missing", f"no file for channel {number}", remedy)
            continue
        try:
            volume = read(path)
        except READ_ERRORS as error:
            facts.add("error", "image not readable", str(error), "replace the file, or leave the case out")
            continue
        _look_at_image(facts, volume, path, digest)
    facts.digest = digest.hexdigest() if facts.geometry is not None else ""
    if case.label is not None and facts.geometry is not None:
        try:
            label = read_label_file(case.label, facts.geometry)
        except READ_ERRORS as error:
            facts.add("error", "label not readable", str(error), "replace the file, or leave the case out")
        else:
            _look_at_label(facts, label, declared, ignore)
    return facts


def _look_at_image(facts: CaseFacts, volume: Volume, path: Path, digest: Any) -> None:
    if facts.geometry is None:
        facts.geometry = volume.geometry
        if volume.geometry.is_skewed:
            facts.add("warning", "skewed grid", f"axes of {path.name} are not at right angles", "use medseg.straighten")
    elif not volume.geometry.is_close(facts.geometry):
        facts.add(
            "error",
            "images of a case differ in grid",
            f"{path.name}: {_difference(volume.geometry, facts.geometry)}",
            "register the channels and resample them onto one grid",
        )
    facts.quirks += [
        (path.name, q) for q in volume.meta.get("quirks", ()) if "right angles" not in q
    ]  # that is said above
    facts.channels += volume.channels
    facts.dtype = facts.dtype or str(volume.array.dtype)
    for number, channel in enumerate(volume.array):
        where = path.name if volume.channels == 1 else f"channel {number} of {path.name}"
        bad = 0
        for slab in _slabs(channel):
            digest.update(np.ascontiguousarray(slab.T, np.float32).data)
            bad += int(slab.size - np.isfinite(slab).sum()) if np.issubdtype(slab.dtype, np.floating) else 0
        if bad:
            facts.add(
                "error",
                "NaN or infinity in image",
                f"{bad} of {channel.size} voxels of {where}",
                "--fix fills in the minimum",
            )
        facts.spreads += (_spread(channel),)
        if facts.spreads[-1] == 0 and channel.min() == channel.max():
            facts.add("warning", "constant image", f"all voxels of {where} are {channel.flat[0]}", "leave the case out")
    digest.update(repr(volume.array.shape).encode())


def _slabs(channel: Array) -> Iterator[Array]:
    """Pieces of a channel (I, J, K) along k of about a million voxels."""
    thickness = max(1, SAMPLE // (channel.shape[0] * channel.shape[1]))
    for start in range(0, channel.shape[2], thickness):
        yield channel[:, :, start : start + thickness]


def _spread(channel: Array) -> float:
    """Range of intensities between the percentiles 0.1 and 99.9 of a regular sample of finite voxels."""
    sample = channel.ravel(order="K")[:: max(1, channel.size // SAMPLE)]
    finite = sample[np.isfinite(sample)]
    if not finite.size:
        return 0.0
    low, high = np.percentile(finite, (0.1, 99.9))
    return float(high - low)


def _difference(grid: Geometry, other: Geometry) -> str:
    if grid.shape != other.shape:
        return f"shapes {grid.shape} and {other.shape}"
    return f"corners up to {grid.corner_distance(other):.3f} mm apart"


# ---------------------------------------------------------------------------------------------------------------------
# Labels


def _look_at_label(facts: CaseFacts, label: LabelFile, declared: frozenset[int] | None, ignore: int | None) -> None:
    geometry, name = facts.geometry, facts.case.label.name if facts.case.label else ""
    if geometry is not None and label.geometry.corner_distance(geometry) > GRID_TOLERANCE_MM:
        detail = f"{name}: {_difference(label.geometry, geometry)}"
        facts.add("error", "image and label differ in grid", detail, "--fix resamples the label where both overlap")
    if label.layered is not None:
        for s in label.layered.structures:
            _look_at_structure(facts, s.number, label.layered.mask(s.number), label.geometry)
    else:
        labels = _whole_numbers(facts, label, name)
        if labels is None:
            return
        numbers = [n for n in present_labels(labels) if n not in (0, ignore)]
        if len(numbers) > MOST_STRUCTURES:
            facts.voxels = dict(
                zip(*(v.tolist() for v in np.unique(labels[labels != 0], return_counts=True)), strict=True)
            )
            facts.voxels.pop(ignore or 0, None)
        else:
            _look_at_structures(facts, labels, numbers, label.geometry)
    undeclared = sorted(set(facts.voxels) - declared) if declared is not None else []
    undeclared += [n for n in facts.voxels if n < 0 and n not in undeclared]
    if undeclared:
        counts = ", ".join(f"{n} ({facts.voxels[n]} voxels)" for n in undeclared[:5])
        facts.add("error", "labels not declared", f"{name} holds {counts}", "declare them in dataset.json or relabel")
    both = sorted(set(facts.voxels) & set(facts.case.unknown))
    if both:
        detail = f"{name} holds {', '.join(map(str, both))}, declared unknown in this case"
        facts.add("note", "unknown label is there", detail, "none needed: it counts as drawn")
    if not facts.voxels:
        facts.add("warning", "empty label", f"{name} holds background only", "check that nothing was to be labelled")


def _whole_numbers(facts: CaseFacts, label: LabelFile, name: str) -> Array | None:
    """Labels as integers, with findings on how they are stored; None where the values are no labels."""
    values = label.values
    if label.is_lossy:
        unclear = unclear_share(values)
        detail = f"{name} is a JPEG: {100 * unclear:.3f} % of the voxels are neither black nor white"
        remedy = "it is read as a mask, cut at 128; --fix writes that as a PNG"
        if unclear > UNCLEAR:
            remedy = "draw it again as a PNG with one number per structure; --fix cuts at 128, which may be wrong here"
        facts.add("error" if unclear > UNCLEAR else "warning", "lossy label", detail, remedy)
        return np.asarray(values >= 128).astype(np.uint8)
    if not np.issubdtype(values.dtype, np.floating):
        return values.astype(np.uint8) if values.dtype == bool else values
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        facts.add(
            "error", "NaN or infinity in label", f"{bad} voxels of the label {name}", "--fix makes them background"
        )
        values = np.where(np.isfinite(values), values, 0)
    rounded = np.round(values)
    broken = int((rounded != values).sum())
    if broken:
        example = float(values[rounded != values].flat[0])
        is_soft = values.min() >= 0 and values.max() <= 1
        facts.add(
            "error",
            "labels not integer",
            f"{broken} voxels of {name} are not whole numbers ({example:g})",
            "--fix cuts at 0.5" if is_soft else "the labels were probably interpolated: go back to the original ones",
        )
        return np.asarray(values >= 0.5).astype(np.uint8) if is_soft else None
    facts.add("note", "labels stored as float", f"{name} is {values.dtype}", "--fix stores them as integers")
    return rounded.astype(np.int64)


def _look_at_structures(facts: CaseFacts, labels: Array, numbers: list[int], geometry: Geometry) -> None:
    if not numbers:
        return
    positive = labels if min(numbers) > 0 else np.maximum(labels, 0)
    boxes = ndimage.find_objects(positive, max_label=max(0, max(numbers))) if max(numbers) < 1 << 16 else []
    for number in numbers:
        box = boxes[number - 1] if 0 < number <= len(boxes) else None
        _look_at_structure(facts, number, (labels if box is None else labels[box]) == number, geometry)


def _look_at_structure(facts: CaseFacts, number: int, mask: Array, geometry: Geometry) -> None:
    voxels = int(np.count_nonzero(mask))
    if not voxels:
        return
    facts.voxels[number] = voxels
    components, count = ndimage.label(mask)
    facts.parts[number] = Parts(int(count), 0, 0.0)
    if count == 1:
        return
    sizes = np.bincount(components.ravel())
    sizes[0] = 0
    distance = edt(components != sizes.argmax(), anisotropy=geometry.spacing)
    others = [n for n in range(1, count + 1) if n != sizes.argmax()]
    gaps = ndimage.minimum(distance, components, others)
    far = int(np.argmax(gaps))
    facts.parts[number] = Parts(int(count), int(sizes[others[far]]), float(gaps[far]))
