"""What a residual U-Net costs in training, and the largest that fits a memory.

Memory and time of a step grow linearly with batch and patch voxels. Memory grows linearly with the features and, where
there are many structures, with their number (the loss works on logits of full resolution in 32 bits); time grows with
the square of the features.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import psutil
import torch

__all__ = ["MIN_EDGE", "WORKSPACE_BYTES", "Network", "fit_memory", "fit_patch", "free_bytes", "parse_bytes", "widths"]

MIN_EDGE = 4  # no axis is pooled below this many voxels
SMALL_EDGE = 32  # patches are cut down to this before the network gets narrower
MOST_POOLINGS = 6
LEAST_FEATURES = 8
# Measured on 22 networks (peak of the process): the estimate is 0.85 to 1.15 of what two steps took.
HALF_BYTES = 2.8  # of an element in 16 bits; some operations keep 32
LOSS_COPIES = 7  # of the logits in 32 bits: softmax, cross-entropy, products of Dice and their gradients
WORKSPACE_BYTES = 300_000_000  # what libraries take at the first step
WEIGHT_BYTES = 20  # weight, gradient, two moments and the running average, 32 bits each
UNITS = {"": 10**9, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


@dataclass(frozen=True)
class Network:
    """Shape of a U-Net and of the batch it sees."""

    inputs: int
    outputs: int
    patch: tuple[int, ...]
    batch: int
    features: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    kernels: tuple[tuple[int, ...], ...]

    @property
    def voxels(self) -> list[float]:
        """Voxels of one patch at each stage, finest first."""
        found = [float(math.prod(self.patch))]
        for stride in self.strides:
            found.append(found[-1] / math.prod(stride))
        return found

    @property
    def parameters(self) -> int:
        """Number of weights."""
        count = 0
        taps = [math.prod(k) for k in self.kernels]
        for n, (a, b) in enumerate(pairwise((self.inputs, *self.features))):
            count += taps[n] * (a * b + b * b) + (a * b if a != b else 0) + 4 * b
        for n, (fine, deep) in enumerate(pairwise(self.features)):
            count += fine * deep * math.prod(self.strides[n]) + taps[n] * 2 * fine * fine + 2 * fine
            count += self.outputs * (fine + 1)
        return count

    def kept_bytes(self, precision: str) -> float:
        """Memory of the activations of one step that its backward pass needs."""
        kept = 0.0  # elements per sample
        for n, (a, b) in enumerate(pairwise((self.inputs, *self.features))):
            kept += self.voxels[n] * (a + 5 * b)
        for n, fine in enumerate(self.features[:-1]):
            kept += self.voxels[n] * 4 * fine
        return self.batch * kept * _element_bytes(precision)

    def training_bytes(self, precision: str) -> int:
        """Memory that one training step takes at its peak, beyond what the program holds before."""
        passing = self.voxels[0] * 3 * self.features[0]  # gradients and results that come and go at the finest stage
        loss = sum(self.voxels[:-1]) * (self.outputs * LOSS_COPIES * 4 + 16)
        step = self.kept_bytes(precision) + self.batch * (passing * _element_bytes(precision) + loss)
        return int(step + WEIGHT_BYTES * self.parameters + WORKSPACE_BYTES)


def _element_bytes(precision: str) -> float:
    return 4.0 if precision == "32-true" else HALF_BYTES


def widths(first: int, stages: int) -> tuple[int, ...]:
    """Features of each stage: doubled from stage to stage, to at most ten times the first."""
    return tuple(min(first * 2**n, 10 * first) for n in range(stages))


# ---------------------------------------------------------------------------------------------------------------------
# Patches


def fit_patch(
    shape: Sequence[int], spacing: Sequence[float], voxels: int
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Patch, strides and kernels: the whole image if it has no more than so many voxels, else even in millimetres.

    Parameters
    ----------
    shape : sequence of int
        Voxels of the median image along each axis.
    spacing : sequence of float (mm)
        Along the same axes.
    voxels : int
        Most voxels of a patch; no axis falls below ``MIN_EDGE`` for it.
    """
    patch, step = np.maximum(np.asarray(shape, float), 1), np.asarray(spacing, float)
    while True:
        final, strides, kernels = poolings(patch, step)
        if math.prod(final) <= voxels or patch.max() <= MIN_EDGE:
            return final, strides, kernels
        axis = int(np.argmax(np.where(patch > MIN_EDGE, patch * step, -1)))
        patch[axis] = max(MIN_EDGE, np.floor(patch[axis] * 0.95))


def poolings(
    patch: np.ndarray, spacing: Sequence[float] | np.ndarray
) -> tuple[tuple[int, ...], tuple[tuple[int, ...], ...], tuple[tuple[int, ...], ...]]:
    """Patch rounded up to what the poolings divide, strides and kernels.

    Axes that have room for it (at least twice ``MIN_EDGE`` voxels) and lie within a factor of two of the finest spacing
    of such axes are halved; a last single one needs three times ``MIN_EDGE``. A kernel is 1 along an axis until its
    spacing comes within a factor of two of the finest, then 3; the coarsest stage has 3 everywhere.

    References
    ----------
    Isensee et al. (2021), doi:10.1038/s41592-020-01008-z.
    """
    size, step = np.ceil(patch).astype(int), np.asarray(spacing, float)
    strides: list[tuple[int, ...]] = []
    kernels: list[tuple[int, ...]] = []
    wide = np.zeros(len(size), bool)
    while len(strides) < MOST_POOLINGS:
        room = size >= 2 * MIN_EDGE
        pool = room & (step < 2 * step.min(where=room, initial=np.inf))
        if not pool.any() or (pool.sum() == 1 and size[pool][0] < 3 * MIN_EDGE):
            break
        wide |= step < 2 * step.min()
        kernels.append(tuple(3 if w else 1 for w in wide))
        strides.append(tuple(2 if p else 1 for p in pool))
        size, step = np.where(pool, -(-size // 2), size), np.where(pool, step * 2, step)
    kernels.append((3,) * len(size))
    divisor = np.prod(np.asarray(strides, int).reshape(-1, len(size)), axis=0)
    final = tuple(int(n) for n in -(-np.ceil(patch).astype(int) // divisor) * divisor)
    return final, tuple(strides), tuple(kernels)


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def parse_bytes(text: str) -> int:
    """Bytes of "4GB", "512 MiB" or "4" (GB).

    Raises
    ------
    ValueError
        If it is not such an amount, or none.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    unit = UNITS.get(match[2].upper()) if match else None
    if match is None or unit is None or float(match[1]) <= 0:
        raise ValueError(f"memory must be an amount like 4GB or 900MB, got {text!r}")
    return int(float(match[1]) * unit)


def free_bytes(device: str) -> int:
    """Memory that is free now: of the GPU where ``device`` is one that is there, else of the machine."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return int(torch.cuda.mem_get_info(torch.device(device))[0])
    return int(psutil.virtual_memory().available)


def fit_memory(network: Network, spacing: Sequence[float], precision: str, memory: int) -> tuple[Network, list[str]]:
    """The network made smaller until a training step fits so many bytes, and what was made smaller.

    First the batch shrinks to 2, then the patch to edges of 32 voxels, then the features to 8, then batch and patch as
    far as they go.

    Raises
    ------
    ValueError
        If not even the smallest network fits.
    """
    shrunk: dict[str, str] = {}
    small = network
    while small.training_bytes(precision) > memory:
        smaller = _smaller(small, spacing)
        if smaller is None:
            raise ValueError(
                f"memory must leave {small.training_bytes(precision) / 1e6:.1f} MB for a training step beside the program "
                f"itself, the least for these images, got {memory / 1e6:.1f} MB; give more"
            )
        small = smaller
    by = " x "
    if small.batch != network.batch:
        shrunk["batch"] = f"batch from {network.batch} to {small.batch}"
    if small.patch != network.patch:
        shrunk["patch"] = f"patch from {by.join(map(str, network.patch))} to {by.join(map(str, small.patch))}"
    if small.features[0] != network.features[0]:
        shrunk["features"] = f"features from {network.features[0]} to {small.features[0]}"
    return small, list(shrunk.values())


def _smaller(network: Network, spacing: Sequence[float]) -> Network | None:
    """The next smaller network, None where there is none."""
    if network.batch > 2:
        return replace(network, batch=network.batch - 1)
    for edge in (SMALL_EDGE, MIN_EDGE):
        if max(network.patch) > edge:
            return _with_smaller_patch(network, spacing, edge)
        if network.features[0] > LEAST_FEATURES:
            first = max(LEAST_FEATURES, network.features[0] // 2)
            return replace(network, features=widths(first, len(network.features)))
        if network.batch > 1:
            return replace(network, batch=1)
    return None


def _with_smaller_patch(network: Network, spacing: Sequence[float], edge: int) -> Network:
    """The network with a patch that is about a tenth smaller along its longest axis (mm) above ``edge`` voxels."""
    patch, step = np.asarray(network.patch, float), np.asarray(spacing, float)
    axis = int(np.argmax(np.where(patch > edge, patch * step, -1)))
    final = network.patch
    while final[axis] >= network.patch[axis] and patch[axis] > MIN_EDGE:
        patch[axis] = max(MIN_EDGE, min(patch[axis] - 1, np.floor(patch[axis] * 0.9)))
        final, strides, kernels = poolings(patch, step)
    return replace(
        network, patch=final, strides=strides, kernels=kernels, features=widths(network.features[0], len(kernels))
    )
