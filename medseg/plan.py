"""From a look at the data to an explained plan of what is trained and how.

The fingerprint is one streaming pass over the cases; the rules follow nnU-Net's published ones (Isensee et al. 2021,
doi:10.1038/s41592-020-01008-z) where they are about the data, and fit patch, batch, width and precision to the memory,
the speed of this machine and the time there is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from medseg.cases import Case, Dataset
from medseg.fingerprint import CaseFingerprint, fingerprint
from medseg.models import MODELS
from medseg.network_plan import (
    MIN_EDGE,
    WORKSPACE_BYTES,
    Network,
    fit_memory,
    fit_patch,
    free_bytes,
    parse_bytes,
    widths,
)
from medseg.plan_channels import choose_channels
from medseg.plan_record import ANY, FORMAT, ChannelPlan, Plan, StructurePlan, chosen_setting
from medseg.plan_structures import choose_mirror, choose_structures, united
from medseg.probe import fastest_precision, step_seconds

__all__ = [
    "ANY", "FORMAT", "ChannelPlan", "Plan", "StructurePlan", "chosen_setting", "make_plan", "smaller_plan", "united",
]  # fmt: skip

CPU_BATCH_VOXELS = 360_000  # about half a second a step on two cores at 16 to 128 features
GPU_BATCH_VOXELS = 4_000_000
MOST_PATCHES = 16  # in a batch
ENCODER_DIVISOR = 32  # of patches of networks around an image classifier
CPU_WIDTHS = (16, 24, 32)  # features of the finest stage; wider where there is time
GPU_WIDTHS = (32,)
CPU_SHARE, GPU_SHARE = 0.5, 0.85  # of the free memory, where none is given
PROGRAM_BYTES = 700_000_000  # what the program takes before any network: libraries, or the GPU's context
TRAINING_SHARE = 0.85  # of the minutes; reading, validation and reports take the rest
FEW_STEPS = 300  # a training of fewer halves its batch
MANY_STEPS = 3000  # that a wider network must have
FEW_SLICES = 8  # a stack of fewer is trained slice by slice
THICK_SLICES = 10.0  # and so are slices that many times as thick as their voxels are wide


def make_plan(
    dataset: Dataset,
    cases: Sequence[Case] | None = None,
    *,
    model: str | None = None,
    device: str = "cpu",
    memory: str | None = None,
    minutes: float | None = None,
    spacing: Sequence[float | None] | None = None,
    overlapping: bool = False,
    workers: int = 2,
    progress: Callable[[int], None] | None = None,
) -> Plan:
    """Plan preprocessing, patch, batch, network and precision for a data set, with a reason for each choice.

    Parameters
    ----------
    dataset : Dataset
        The set; its declared channels, labels, regions and ignore label are used where there are any.
    cases : sequence of Case, optional
        The training cases, all by default: nothing of the validation cases enters the plan.
    model : str, optional
        A name of ``MODELS``; by default "unet2d" for pictures and for few or very thick slices, else "unet3d".
    device : str
        "cpu" or "cuda...": decides patch, batch, width and precision.
    memory : str, optional
        What the whole training may take ("4GB"); by default half of the machine's free memory, or 85 % of the GPU's.
        Batch, patch and features shrink, in this order, until a step fits; the reasons say so.
    minutes : float, optional
        Time there will be. A short training takes smaller batches, a long one a wider network where the machine is fast
        enough for it, by timing a few steps.
    spacing : (3,) sequence of float or None (mm), optional
        Spacing along the axes of the planned orientation, instead of the median; coarser is faster. Patch, batch and
        poolings are fitted to it. None leaves an axis as it would be planned; slices of a 2D network stay as they are.
    overlapping : bool
        Whether each structure gets a sigmoid of its own even if the labels exclude each other.
    workers : int
        Threads that read the cases.
    progress : callable, optional
        Called with the number of cases looked at.

    Raises
    ------
    ValueError
        If there is no case, no label, a label that is not declared, a model that does not fit the images, or too little
        memory for the smallest network.

    Notes
    -----
    Time: one pass over the files, then a second or two of trial steps (a few more where ``minutes`` leave room for a
    wider network). Memory and time of the training grow linearly with the voxels of a batch; memory grows linearly and
    time with the square of the features.
    """
    cases = [c for c in (dataset.cases if cases is None else cases) if c.label is not None]
    if not cases:
        raise ValueError(f"data set must hold labelled cases, got none in {dataset.root}")
    is_united = any(ANY in labels for labels in dataset.regions.values())
    looks = fingerprint(cases, united=is_united, workers=workers, progress=progress)
    reasons: dict[str, str] = {}
    structures, overlapping = choose_structures(looks, dataset, overlapping, reasons)
    channels = choose_channels(looks, dataset, reasons)
    model = _choose_model(looks, model, reasons)
    dims = MODELS[model].dims
    orientation, planned, shape = _choose_grid(looks, dims, reasons)
    if spacing is not None:
        shape, planned = _as_asked(shape, planned, spacing)
        reasons["spacing"] = "asked for"
    mirror, swaps = choose_mirror(structures, dims, orientation, reasons)
    base = {
        "model": model, "dims": dims, "channels": channels, "structures": structures, "orientation": orientation,
        "spacing": planned, "mirror": mirror, "swaps": swaps, "overlapping": overlapping,
        "ignore": dataset.ignore, "encoder": MODELS[model].encoder,
    }  # fmt: skip
    machine = _Machine(device, memory, minutes)
    return _choose_network(base, shape[:dims], [s or 1.0 for s in planned[:dims]], machine, reasons)


def smaller_plan(plan: Plan, share: float = 0.7) -> tuple[Plan, str]:
    """A plan whose training step takes at most so large a share of the memory, and what is smaller in it.

    For networks that are planned stage by stage; others lose patches of the batch alone.

    Raises
    ------
    ValueError
        If there is no smaller one.
    """
    network = Network(
        inputs=len(plan.channels), outputs=plan.outputs, patch=plan.patch, batch=plan.batch, features=plan.features,
        strides=plan.strides, kernels=plan.kernels,
    )  # fmt: skip
    if plan.encoder is not None:
        if plan.batch <= 2:
            raise ValueError(f"memory must hold a batch of 2 for the encoder {plan.encoder}; use unet{plan.dims}d")
        batch = max(2, int(plan.batch * share))
        return plan.model_copy(update={"batch": batch}), f"batch from {plan.batch} to {batch}"
    step = network.training_bytes(plan.precision) - WORKSPACE_BYTES
    spacing = [s or 1.0 for s in plan.spacing[: plan.dims]]
    small, shrunk = fit_memory(network, spacing, plan.precision, int(share * step) + WORKSPACE_BYTES)
    changed = {n: getattr(small, n) for n in ("patch", "batch", "features", "strides", "kernels")}
    return plan.model_copy(update=changed), ", ".join(shrunk)


def _as_asked(
    shape: tuple[int, int, int], planned: tuple[float, float, float | None], asked: Sequence[float | None]
) -> tuple[tuple[int, int, int], tuple[float, float, float | None]]:
    """Median shape and spacing where a spacing is asked for; slices of a 2D network (None) stay as they are."""
    if len(asked) != 3 or any(s is not None and not 0 < s < math.inf for s in asked):
        raise ValueError(f"spacing must be three positive numbers in mm, got {list(asked)}")
    across = None if planned[2] is None else asked[2] or planned[2]
    new = (asked[0] or planned[0], asked[1] or planned[1], across)
    i, j, k = (max(1, round(n * (p or 1) / (s or 1))) for n, p, s in zip(shape, planned, new, strict=True))
    return (i, j, k), new


def _choose_model(looks: Sequence[CaseFingerprint], model: str | None, reasons: dict[str, str]) -> str:
    pictures = sum(look.picture for look in looks)
    if model is None:
        model, reasons["model"] = _two_or_three(looks, pictures == len(looks))
    elif model not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {model!r}")
    else:
        reasons["model"] = "asked for"
    if MODELS[model].dims == 3 and pictures:
        one = next(look.id for look in looks if look.picture)
        raise ValueError(f"images must be volumes for {model}, got a single slice in case {one}; use --model unet2d")
    return model


def _two_or_three(looks: Sequence[CaseFingerprint], are_pictures: bool) -> tuple[str, str]:
    """2D or 3D U-Net, and why."""
    if are_pictures:
        return "unet2d", "all images are single slices"
    spacings, shapes = (np.array([getattr(look, name) for look in looks]) for name in ("spacing", "shape"))
    spacing, shape = np.median(spacings, axis=0), np.median(shapes, axis=0)
    axis = int(np.argmax(spacing)) if spacing.max() > 1.05 * spacing.min() else int(np.argmin(shape))
    ratio = spacing[axis] / np.delete(spacing, axis).max()
    if ratio > THICK_SLICES:
        return "unet2d", f"slice by slice: slices are {ratio:.0f} times as thick as their voxels are wide"
    if shape[axis] < FEW_SLICES:
        return "unet2d", f"slice by slice: {shape[axis]:.0f} slices are too few for a network across them"
    return "unet3d", "the images are volumes"


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


# ---------------------------------------------------------------------------------------------------------------------
# The network and the machine


@dataclass(frozen=True)
class _Machine:
    """What there is to train with: device, memory ("4GB") and minutes."""

    device: str
    memory: str | None
    minutes: float | None

    @property
    def is_gpu(self) -> bool:
        return self.device.startswith("cuda")

    def room(self) -> tuple[int, str]:
        """Bytes for a training step, and where they come from."""
        if self.memory is None:
            share = GPU_SHARE if self.is_gpu else CPU_SHARE
            free = free_bytes(self.device)
            return int(free * share), f"{free * share / 1e9:.1f} GB, {100 * share:.0f} % of what is free"
        given = parse_bytes(self.memory)
        if given <= PROGRAM_BYTES:
            raise ValueError(
                f"memory must be more than the {PROGRAM_BYTES / 1e6:.0f} MB that the program itself takes, got "
                f"{self.memory}; give more"
            )
        return given - PROGRAM_BYTES, f"{self.memory}, of which the program itself takes {PROGRAM_BYTES / 1e9:.1f} GB"

    def steps(self, seconds: float) -> int:
        """Steps that the minutes allow."""
        return round(60 * (self.minutes or 0) * TRAINING_SHARE / max(seconds, 1e-6))


@dataclass(frozen=True)
class _Sketch:
    """What of a plan follows from the data alone, and what there is to train it with."""

    base: Mapping[str, Any]
    shape: Sequence[int]  # of the median image
    spacing: Sequence[float]  # mm
    machine: _Machine
    bytes: int

    def network(self, voxels: int, first: int, precision: str) -> tuple[Network, list[str]]:
        """The network with so many voxels in a batch and features in its first stage, and how it shrank to fit."""
        patch, strides, kernels = fit_patch(self.shape, self.spacing, voxels // 2)
        network = Network(
            inputs=len(self.base["channels"]),
            outputs=len(self.base["structures"]) + (not self.base["overlapping"]),
            patch=patch,
            batch=int(np.clip(voxels // math.prod(patch), 2, MOST_PATCHES)),
            features=widths(first, len(kernels)),
            strides=strides,
            kernels=kernels,
        )
        return fit_memory(network, self.spacing, precision, self.bytes)

    def plan(self, network: Network, precision: str) -> Plan:
        options: dict[str, Any] = {"features": network.features, "strides": network.strides, "kernels": network.kernels}
        patch = network.patch
        if self.base["encoder"] is not None:
            options = {}
            patch = tuple(-(-n // ENCODER_DIVISOR) * ENCODER_DIVISOR for n in patch)
        return Plan(**self.base, **options, patch=patch, batch=network.batch, precision=precision)  # type: ignore[arg-type]


def _choose_network(
    base: Mapping[str, Any], shape: Sequence[int], spacing: Sequence[float], machine: _Machine, reasons: dict[str, str]
) -> Plan:
    """Patch, batch, features and precision: the usual ones, made to fit first the memory and then the time."""
    room, room_from = machine.room()
    sketch = _Sketch(base, shape, spacing, machine, room)
    voxels = GPU_BATCH_VOXELS if machine.is_gpu else CPU_BATCH_VOXELS
    first, *wider = GPU_WIDTHS if machine.is_gpu else CPU_WIDTHS
    tried = "bf16-mixed" if machine.is_gpu else "32-true"
    precision, reasons["precision"], seconds = fastest_precision(
        sketch.plan(sketch.network(voxels, first, tried)[0], tried), machine.device
    )
    timed = machine.minutes is not None and math.isfinite(seconds)
    time = ""
    if timed and machine.steps(seconds) < FEW_STEPS:
        time = f"; half the usual, as {seconds:.2g} s a step leave but {machine.steps(seconds)} steps"
        voxels, seconds = voxels // 2, seconds / 2
    network, shrunk = sketch.network(voxels, first, precision)
    width = "what a GPU has room for" if machine.is_gpu else "what a CPU trains in minutes"
    if timed and not shrunk:
        network, width = _widened(sketch, network, wider, precision, seconds)
    plan = sketch.plan(network, precision)
    reasons |= _explained_network(sketch, network)
    reasons["features"] = f"{network.features[0]} in the finest stage, doubled per stage: {width}"
    need = network.training_bytes(precision)
    reasons["batch"] += f"{time}; a step takes about {need / 1e9:.1f} GB of {room_from}"
    if shrunk:
        reasons["batch"] += f"; made smaller to fit: {', '.join(shrunk)}"
    return plan.model_copy(update={"reasons": reasons})


def _widened(
    sketch: _Sketch, network: Network, wider: Sequence[int], precision: str, seconds: float
) -> tuple[Network, str]:
    """The widest network that still gets many steps in the time, and why."""
    machine = sketch.machine
    best, best_s, limit = network, seconds, ""
    for first in wider:
        other = replace(network, features=widths(first, len(network.features)))
        least = best_s * first / best.features[0]  # it takes at least that long
        if machine.steps(least) >= MANY_STEPS and other.training_bytes(precision) <= sketch.bytes:
            least = step_seconds(sketch.plan(other, precision), machine.device)
        if machine.steps(least) < MANY_STEPS:
            limit = f"; {first} would leave {machine.steps(least)} or fewer, and a wider network wants {MANY_STEPS}"
            break
        if other.training_bytes(precision) > sketch.bytes:
            limit = f"; {first} would not fit the memory"
            break
        best, best_s = other, least
    steps = machine.steps(best_s)
    return best, f"{best_s:.2g} s a step, about {steps} steps in {machine.minutes:g} min{limit}"


def _explained_network(sketch: _Sketch, network: Network) -> dict[str, str]:
    by = " x "
    median = by.join(map(str, sketch.shape))
    count, device = math.prod(network.patch), "GPU" if sketch.machine.is_gpu else "CPU"
    whole = all(p >= s for p, s in zip(network.patch, sketch.shape, strict=True))
    return {
        "patch": f"the median image ({median}), rounded up to what {len(network.strides)} poolings divide"
        if whole
        else f"as much of the median image ({median}) as {count} voxels hold, even in mm",
        "batch": f"{network.batch} patches of {count} voxels, {network.batch * count} a step on the {device}",
        "strides": f"{len(network.strides)} poolings, until an edge would fall below {MIN_EDGE} voxels",
        "kernels": "3 along axes within a factor of 2 of the finest spacing, 1 across thicker slices",
    }
