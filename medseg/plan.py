"""From a look at the data to an explained plan of what is trained and how.

The fingerprint is one streaming pass over the cases; the rules follow nnU-Net's published ones (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z) where they are about the data, and fit patch, batch and width to the machine.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, Self

import numpy as np
from pydantic import model_validator

from medseg.config import Record
from medseg.data import Case, Dataset
from medseg.fingerprint import CaseFingerprint, fingerprint
from medseg.models import MODELS
from medseg.volume import Structure, default_color

__all__ = ["ChannelPlan", "Plan", "StructurePlan", "make_plan"]

FORMAT = 1  # of plan and run folder; a run of another format is refused
MIN_EDGE = 4  # no axis is pooled below this many voxels
CPU_BATCH_VOXELS = 360_000  # about half a second a step on two cores at 16 to 128 features
GPU_BATCH_VOXELS = 4_000_000
BLANK = 0.25  # share of an image at its lowest value from which that counts as outside the body
BLANK_INSIDE = 0.005  # unless so many of the structures' own voxels hold it
SHORT_MINUTES = 5  # trainings below this halve the batch


class ChannelPlan(Record):
    """How one image channel is normalised.

    "ct": clip to [low, high] HU, then (x - mean) / std of the training set's foreground. "zscore": clip to the image's
    own 0.5 and 99.5 percentiles, then its own mean and standard deviation; where ``masked`` these are of the voxels
    above its lowest value alone, and voxels that are blank all around are background. "color": (x - mean) / std of the
    training set.
    """

    name: str
    scheme: Literal["ct", "zscore", "color"]
    masked: bool = False
    low: float = 0.0
    high: float = 0.0
    mean: float = 0.0
    std: float = 1.0


class StructurePlan(Record):
    """One structure that is learnt: voxels whose value in the label file is one of ``values``.

    A region unites several labels: its ``labels`` name them; a plain structure is its own number.
    """

    number: int
    name: str
    color: tuple[int, int, int]
    labels: tuple[int, ...] = ()

    @property
    def values(self) -> tuple[int, ...]:
        """Values of label files that belong to the structure."""
        return self.labels or (self.number,)


class Plan(Record):
    """What is trained and how; every entry can be set by hand, ``reasons`` says where each comes from.

    Spacing (mm), patch, strides and kernels are along the axes of ``orientation``; a spacing of None keeps the slices
    as they are (2D networks see one slice at a time along the last axis).

    Structures are exclusive (softmax, channel 0 the background) or, where ``overlapping``, each has a sigmoid of its own
    and there is no channel for the background. Voxels of the value ``ignore`` in label files do not count. ``swaps``
    pairs the numbers of left and right structures, which change places when an image is mirrored.
    """

    format: int = FORMAT
    model: str
    dims: Literal[2, 3]
    channels: tuple[ChannelPlan, ...]
    structures: tuple[StructurePlan, ...]
    orientation: str | None
    spacing: tuple[float, float, float | None]
    patch: tuple[int, ...]
    batch: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]
    mirror: tuple[int, ...]
    overlapping: bool = False
    ignore: int | None = None
    swaps: tuple[tuple[int, int], ...] = ()
    reasons: Mapping[str, str] = {}

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.format != FORMAT:
            raise ValueError(f"format of a plan must be {FORMAT}, got {self.format}; plan anew")
        if self.model not in MODELS or MODELS[self.model].dims != self.dims:
            raise ValueError(f"model must be one of {', '.join(MODELS)} and fit dims, got {self.model} and {self.dims}")
        for name in ("patch", *("strides",) * bool(self.strides), "kernels"):
            rows = getattr(self, name) if name != "patch" else (self.patch,)
            if any(len(row) != self.dims or min(row) < 1 for row in rows):
                raise ValueError(f"{name} must be {self.dims} positive numbers each, got {getattr(self, name)}")
        if len(self.features) != len(self.strides) + 1 or len(self.kernels) != len(self.features):
            raise ValueError("features must be one more than strides and as many as kernels, got other numbers")
        if min(self.batch, *self.features) < 1 or any(s is not None and not s > 0 for s in self.spacing):
            raise ValueError("batch, features and spacing must be positive, got a value that is not")
        if any(not 0 <= a < self.dims for a in self.mirror):
            raise ValueError(f"mirror must name axes below {self.dims}, got {self.mirror}")
        numbers = [s.number for s in self.structures]
        if not numbers or len(set(numbers)) < len(numbers) or min(numbers) < 1:
            raise ValueError(f"structures must have distinct numbers of at least 1, got {numbers}")
        if not {n for pair in self.swaps for n in pair} <= set(numbers):
            raise ValueError(f"swaps must pair numbers of structures, got {self.swaps}")
        if self.ignore in {v for s in self.structures for v in s.values}:
            raise ValueError(f"ignore must be a label of no structure, got {self.ignore}")
        return self

    @property
    def outputs(self) -> int:
        """Channels of the logits: the structures, and the background where they are exclusive."""
        return len(self.structures) + (not self.overlapping)

    def summary(self) -> dict[str, str]:
        """Each entry in words, in the order of the plan."""
        by = " x "
        spacing = by.join("native" if s is None else f"{s:g}" for s in self.spacing)
        return {
            "model": self.model,
            "channels": "; ".join(f"{c.name}: {c.scheme}" for c in self.channels),
            "structures": ", ".join(f"{s.number} {s.name}" for s in self.structures),
            "orientation": self.orientation or "as stored",
            "spacing": f"{spacing} mm",
            "patch": by.join(map(str, self.patch)),
            "batch": str(self.batch),
            "features": ", ".join(map(str, self.features)),
            "strides": ", ".join(by.join(map(str, s)) for s in self.strides),
            "kernels": ", ".join(by.join(map(str, k)) for k in self.kernels),
            "mirror": ", ".join(f"axis {a}" for a in self.mirror) or "off",
        }

    def as_structures(self) -> tuple[Structure, ...]:
        """The structures of predicted label maps."""
        return tuple(Structure(s.number, s.name, s.color) for s in self.structures)


def make_plan(
    dataset: Dataset,
    cases: Sequence[Case] | None = None,
    *,
    model: str | None = None,
    device: str = "cpu",
    minutes: float | None = None,
    spacing: tuple[float, float, float] | None = None,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Plan preprocessing, patch, batch and network for a data set, with a reason for each choice.

    Parameters
    ----------
    dataset : Dataset
        The set; its declared channels and labels are used where there are any.
    cases : sequence of Case, optional
        The training cases, all by default: nothing of the validation cases enters the plan.
    model : str, optional
        A name of ``MODELS``; by default "unet2d" for pictures and "unet3d" for volumes.
    device : str
        "cpu" or "cuda...": decides patch, batch and width.
    minutes : float, optional
        Time there will be: a short training takes more and smaller steps.
    spacing : (3,) tuple of float (mm), optional
        Spacing along the axes of the planned orientation, instead of the median; coarser is faster.

    Raises
    ------
    ValueError
        If there is no case, no label, a label that is not declared, or a model that does not fit the images.
    """
    cases = [c for c in (dataset.cases if cases is None else cases) if c.label is not None]
    if not cases:
        raise ValueError(f"data set must hold labelled cases, got none in {dataset.root}")
    looks = fingerprint(cases, workers=workers, progress=progress)
    reasons: dict[str, str] = {}
    model = _choose_model(looks, model, reasons)
    dims = MODELS[model].dims
    orientation, planned, shape = _choose_grid(looks, dims, reasons)
    if spacing is not None:
        shape = tuple(max(1, round(n * (p or s) / s)) for n, p, s in zip(shape, planned, spacing, strict=True))  # type: ignore
        planned = (spacing[0], spacing[1], spacing[2] if dims == 3 else None)
        reasons["spacing"] = "asked for"
    structures = _choose_structures(looks, dataset, reasons)
    on_gpu = device.startswith("cuda")
    budget = GPU_BATCH_VOXELS if on_gpu else CPU_BATCH_VOXELS
    if minutes is not None and minutes < SHORT_MINUTES:
        budget //= 2
    patch, strides, kernels = _choose_patch(shape[:dims], [s or 1.0 for s in planned[:dims]], budget // 2, reasons)
    widths = (32, 64, 128, 256, 320, 320, 320) if on_gpu else (16, 32, 64, 128, 160, 160, 160)
    why = "room on the GPU" if on_gpu else "what a CPU trains in minutes"
    reasons["features"] = f"{widths[0]} in the finest stage, doubled per stage: {why}"
    voxels = int(np.prod(patch))
    batch = int(np.clip(budget // voxels, 2, 16))
    reasons["batch"] = (
        f"{batch} patches of {voxels} voxels: about {budget} voxels a step on the {'GPU' if on_gpu else 'CPU'}"
    )
    return Plan(
        model=model,
        dims=dims,  # type: ignore[arg-type]
        channels=_choose_normalisation(looks, dataset, reasons),
        structures=structures,
        orientation=orientation,
        spacing=planned,
        patch=patch,
        batch=batch,
        features=widths[: len(strides) + 1],
        strides=strides,
        kernels=kernels,
        mirror=_choose_mirror(structures, dims, orientation, reasons),
        reasons=reasons,
    )


def _choose_model(looks: Sequence[CaseFingerprint], model: str | None, reasons: dict[str, str]) -> str:
    pictures = sum(look.picture for look in looks)
    if model is None:
        model = "unet2d" if pictures == len(looks) else "unet3d"
        reasons["model"] = "all images are single slices" if model == "unet2d" else "the images are volumes"
    elif model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    else:
        reasons["model"] = "asked for"
    if MODELS[model].dims == 3 and pictures:
        one = next(look.id for look in looks if look.picture)
        raise ValueError(f"images must be volumes for {model}, got a single slice in case {one}; use --model unet2d")
    return model


def _choose_grid(
    looks: Sequence[CaseFingerprint], dims: int, reasons: dict[str, str]
) -> tuple[str | None, tuple[float, float, float | None], tuple[int, int, int]]:
    """Orientation, spacing (mm) and the median shape on that grid."""
    if all(look.picture for look in looks):
        median = tuple(float(v) for v in np.median([look.spacing for look in looks], axis=0))
        reasons["orientation"] = "pictures stay as they are stored"
        reasons["spacing"] = "median of the pictures"
        sizes = np.array([np.array(look.shape) * look.spacing / median for look in looks])
        size = tuple(np.median(sizes, axis=0).round().astype(int).tolist())
        return None, (median[0], median[1], None), size  # type: ignore[return-value]
    spacings = np.array([look.spacing for look in looks])
    median_spacing = np.median(spacings, axis=0)
    thick = int(np.argmax(median_spacing)) if median_spacing.max() > 1.05 * median_spacing.min() else 2
    order = [a for a in range(3) if a != thick] + [thick]
    orientation = "".join("RAS"[a] for a in order)
    widest = "the widest spacing is" if thick != 2 or median_spacing[2] > median_spacing[:2].max() else "slices are"
    reasons["orientation"] = f"{orientation}: one orientation for all, {widest} along the last axis"
    spacings = spacings[:, order]
    spacing = np.median(spacings, axis=0)
    why = "median of the training cases"
    sizes = np.array([look.shape for look in looks])[:, order] * spacings
    others = spacing[:2].max()
    if (
        dims == 3
        and spacing[2] > 3 * others
        and np.median(sizes[:, 2]) / spacing[2] * 3 < np.median(sizes[:, :2]) / others
    ):
        spacing[2] = max(np.percentile(spacings[:, 2], 10), others)
        why += "; 10th percentile across the thick slices, so that thin ones keep their detail"
    rounded = tuple(round(float(s), 4) for s in spacing)
    shape = tuple(np.maximum(1, np.median(sizes / np.asarray(rounded), axis=0).round()).astype(int).tolist())
    reasons["spacing"] = why + ("; slices stay as they are" if dims == 2 else "")
    return orientation, (rounded[0], rounded[1], rounded[2] if dims == 3 else None), shape  # type: ignore[return-value]


def _choose_structures(
    looks: Sequence[CaseFingerprint], dataset: Dataset, reasons: dict[str, str]
) -> tuple[StructurePlan, ...]:
    seen: Counter[int] = Counter()
    for look in looks:
        seen.update({n: c for n, c in look.counts.items() if n > 0})
    negative = [look.id for look in looks if min(look.counts, default=0) < 0]
    if negative:
        raise ValueError(f"labels must be at least 0, got a negative label in case {negative[0]}; run medseg check")
    if not seen:
        raise ValueError("labels must mark at least one structure, got only background; run medseg check")
    declared = dataset.labels
    if declared is not None:
        for look in looks:
            strange = [n for n in look.counts if n > 0 and n not in declared]
            if strange:
                raise ValueError(
                    f"labels must be declared ({', '.join(map(str, declared))}), got {strange[0]} in case {look.id}; "
                    "run medseg check"
                )
    if len(seen) > 255:
        raise ValueError(f"labels must be at most 255 structures, got {len(seen)}; are these instances?")
    found = {n: name for look in looks for n, name in look.names.items()}
    names = dict(declared) if declared is not None else {n: found.get(n, f"label {n}") for n in sorted(seen)}
    absent = [f"{name} ({n})" for n, name in names.items() if n not in seen]
    if absent:
        raise ValueError(
            f"structures must occur in the training cases, got none of {', '.join(absent)}; drop the label"
        )
    reasons["structures"] = (
        "declared by the data set" if declared is not None else "the values present, named as in the label files"
    )
    return tuple(StructurePlan(number=n, name=names[n], color=default_color(n)) for n in sorted(names))


def _choose_patch(
    shape: Sequence[int], spacing: Sequence[float], budget: int, reasons: dict[str, str]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Patch, strides and kernels: the median image if it fits the budget, else shrunk evenly in millimetres."""
    patch = np.asarray(shape, float)
    while True:
        final, strides, kernels = _poolings(patch, spacing)
        if np.prod(final) <= budget or patch.max() <= MIN_EDGE:
            break
        axis = int(np.argmax(np.where(patch > MIN_EDGE, patch * np.asarray(spacing), -1)))
        patch[axis] = max(MIN_EDGE, np.floor(patch[axis] * 0.95))
    whole = all(p >= s for p, s in zip(final, shape, strict=True))
    median = " x ".join(map(str, shape))
    reasons["patch"] = (
        f"the median image ({median}), rounded up to what {len(strides)} poolings divide"
        if whole
        else f"as much of the median image ({median}) as {budget} voxels hold, even in mm"
    )
    reasons["strides"] = f"{len(strides)} poolings, until an edge would fall below {MIN_EDGE} voxels"
    reasons["kernels"] = "3 along axes within a factor of 2 of the finest spacing, 1 across thicker slices"
    return final, strides, kernels


def _poolings(
    patch: np.ndarray, spacing: Sequence[float]
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Patch rounded up to what the poolings divide, strides and kernels."""
    size, step = np.ceil(patch).astype(int), np.asarray(spacing, float)
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = []
    while len(strides) < 6:
        fine = step < 2 * step.min()
        kernels.append(tuple(3 if f else 1 for f in fine))
        pool = (size >= 2 * MIN_EDGE) & fine
        if not pool.any() or (pool.sum() == 1 and size[pool][0] < 3 * MIN_EDGE):
            break
        strides.append(tuple(2 if p else 1 for p in pool))
        size, step = np.where(pool, -(-size // 2), size), np.where(pool, step * 2, step)
    else:
        kernels.append((3,) * len(patch))
    divisor = np.prod(np.asarray(strides, int).reshape(-1, len(patch)), axis=0)
    final = tuple(int(n) for n in -(-np.ceil(patch).astype(int) // divisor) * divisor)
    return final, tuple(strides), tuple(kernels)


def _choose_normalisation(
    looks: Sequence[CaseFingerprint], dataset: Dataset, reasons: dict[str, str]
) -> tuple[ChannelPlan, ...]:
    count = len(looks[0].samples)
    for look in looks:
        if len(look.samples) != count:
            raise ValueError(
                f"images must have {count} channels as {looks[0].id} has, got {len(look.samples)} in {look.id}"
            )
    names = dataset.channels if len(dataset.channels) == count else tuple(f"channel {c}" for c in range(count))
    plans, why = [], []
    for c, name in enumerate(names):
        values = np.concatenate([look.samples[c] for look in looks])
        mean, std = float(values.mean()), float(values.std()) or 1.0
        declared = name.strip().lower()
        looks_ct = all(look.modality == "CT" or (look.integers and look.lowest <= -900) for look in looks)
        if declared in ("ct", "cbct") or (declared in ("image", f"channel {c}") and looks_ct):
            low, high = (float(v) for v in np.percentile(values, (0.5, 99.5)))
            inside = np.clip(values, low, high)
            mean, std = float(inside.mean()), float(inside.std()) or 1.0
            plans.append(ChannelPlan(name=name, scheme="ct", low=low, high=high, mean=mean, std=std))
            why.append(
                f"{name}: CT, clipped to the 0.5 to 99.5 percentiles of the foreground ({low:.0f} to {high:.0f} HU)"
            )
        elif count == 3 and all(look.picture and look.integers for look in looks):
            plans.append(ChannelPlan(name=name, scheme="color", mean=mean, std=std))
            why.append(f"{name}: colour, by mean and spread of the training set")
        else:
            blank = float(np.median([look.blank for look in looks]))
            masked = blank > BLANK and float(np.median([look.blank_inside for look in looks])) < BLANK_INSIDE
            plans.append(ChannelPlan(name=name, scheme="zscore", masked=masked))
            why.append(f"{name}: no fixed unit, by each image's own mean and spread within 0.5 to 99.5 percentiles")
            if masked:
                why[-1] += f", of the voxels above the lowest value ({100 * blank:.0f} % of an image are blank)"
    reasons["channels"] = "; ".join(dict.fromkeys(why))
    return tuple(plans)


def _choose_mirror(
    structures: Sequence[StructurePlan], dims: int, orientation: str | None, reasons: dict[str, str]
) -> tuple[int, ...]:
    if orientation is None:
        reasons["mirror"] = "off: pictures may have a fixed view"
        return ()
    sided = [s.name for s in structures if {"left", "right"} & _words(s.name)]
    if sided:
        reasons["mirror"] = f"off: left and right differ ({sided[0]})"
        return ()
    axis = next(a for a, letter in enumerate(orientation) if letter in "RL")
    if axis >= dims:
        reasons["mirror"] = "off: left and right lie across the slices"
        return ()
    reasons["mirror"] = "left to right only: bodies are nearly symmetric that way"
    return (axis,)


def _words(name: str) -> set[str]:
    spaced = "".join(f" {ch.lower()}" if ch.isupper() else (ch if ch.isalnum() else " ") for ch in name)
    words = set(spaced.split())
    short = {"l": "left", "r": "right", "lt": "left", "rt": "right"}
    return words | {short[w] for w in words if w in short}
