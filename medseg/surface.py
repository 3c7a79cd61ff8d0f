"""Distances between the surfaces of two masks, in mm, exact on anisotropic grids."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import edt
import numpy as np
import torch
from numpy.typing import NDArray
from scipy.spatial import cKDTree
from skimage import measure

__all__ = ["DEFAULT_DEFINITION", "Definition", "Distances", "distance_transform", "surface_distances"]

Array = NDArray[Any]
Definition = Literal["voxel", "pooled", "area"]
DEFAULT_DEFINITION: Definition = "voxel"
NEIGHBOURS = 400  # offsets looked at around each surface element before a distance transform takes over
LOOKUPS_PER_VOXEL, LOOKUPS_PER_STEP = 4, 2000  # when a transform is cheaper: its cost, and that of a step, in lookups
VOXELS_PER_QUERY = 200  # of a distance transform, that cost as much as one query of a search tree
CHUNK = 1 << 25  # elements of the largest temporary on a device


class Distances(NamedTuple):
    """Distances (mm) from the elements of one surface to the other surface, with the weights of the elements.

    ``beyond`` holds the distances that are not 0, ``weights`` their weights (None: 1 each); ``size`` is the weight of
    the whole surface.
    """

    beyond: Array
    weights: Array | None
    size: float

    @property
    def total(self) -> float:
        """Sum of weight times distance."""
        if self.weights is None:
            return float(self.beyond.sum(dtype=np.float64))
        return float(np.dot(self.beyond.astype(np.float64), self.weights))

    @property
    def largest(self) -> float:
        """The largest distance (mm)."""
        return float(self.beyond.max(initial=0))

    def within(self, limit_mm: float) -> float:
        """Weight of the elements that are at most this far from the other surface."""
        far = self.beyond > limit_mm
        return self.size - float(np.count_nonzero(far) if self.weights is None else self.weights[far].sum())

    def joined(self, other: Distances) -> Distances:
        """Both sets of (unweighted) distances as one."""
        return Distances(np.concatenate([self.beyond, other.beyond]), None, self.size + other.size)

    def percentile(self, percent: float) -> float:
        """Percentile (mm): linear between order statistics, or the first whose weight reaches the share."""
        if self.weights is not None:
            return self._weighted_percentile(percent)
        rank = percent / 100 * (self.size - 1)
        low = int(np.floor(rank))
        zeros = int(self.size) - len(self.beyond)
        wanted = [max(0, n - zeros) for n in (low, min(low + 1, int(self.size) - 1))]
        if not len(self.beyond):
            return 0.0
        ordered = np.partition(self.beyond, wanted)
        a, b = (float(ordered[w]) if n >= zeros else 0.0 for w, n in zip(wanted, (low, low + 1), strict=True))
        return a + (b - a) * (rank - low)

    def _weighted_percentile(self, percent: float) -> float:
        order = np.argsort(self.beyond, kind="stable")
        weights = np.asarray(self.weights)[order]
        at_zero, wanted = self.size - float(weights.sum()), percent / 100 * self.size
        if at_zero >= wanted or not len(order):
            return 0.0
        place = int(np.searchsorted(at_zero + np.cumsum(weights), wanted))
        return float(self.beyond[order[min(place, len(order) - 1)]])


def surface_distances(
    prediction: Array | torch.Tensor, reference: Array | torch.Tensor, spacing: Sequence[float], definition: Definition
) -> tuple[Distances, Distances]:
    """Distances from each surface to the other.

    Parameters
    ----------
    prediction, reference : (*spatial) bool, 1 to 3 axes
        Masks, neither empty; what lies beyond their edge counts as outside. Crop them to the box around both.
    spacing : sequence of float (mm)
    definition : {"voxel", "pooled", "area"}
        What a surface is: see :func:`medseg.metrics.surface_scores`.

    Returns
    -------
    (prediction to reference, reference to prediction) : Distances

    Notes
    -----
    On the CPU the voxels around each element are looked at in the order of their distance, which ends soon where the
    masks agree; elements farther apart are left to a search tree or, if many, to an exact distance transform [1]_. On
    other devices the distance transform is separable lower envelopes by brute force, O(voxels x (I + J + K)).

    References
    ----------
    .. [1] Felzenszwalb & Huttenlocher, Theory of Computing 2012, doi:10.4086/toc.2012.v008a019
    """
    if definition not in ("voxel", "pooled", "area"):
        raise ValueError(f"definition must be 'voxel', 'pooled' or 'area', got {definition!r}")
    area = definition == "area"
    sides = [_elements(mask, tuple(spacing)) if area else (_border(mask), None) for mask in (prediction, reference)]
    (p, p_weight), (r, r_weight) = sides
    return _directed(p, r, p_weight, spacing), _directed(r, p, r_weight, spacing)


def _directed(surface: Any, other: Any, weights: Any, spacing: Sequence[float]) -> Distances:
    """Distances of the elements marked in ``surface`` to those marked in ``other``."""
    apart = surface & ~other
    if isinstance(surface, torch.Tensor):
        beyond = distance_transform(other, spacing)[apart].cpu().numpy()
        size = float((surface.sum() if weights is None else weights[surface].double().sum()).item())
        return Distances(beyond, None if weights is None else weights[apart].double().cpu().numpy(), size)
    beyond = _nearest(apart, other, tuple(spacing))
    if weights is None:
        return Distances(beyond, None, float(np.count_nonzero(surface)))
    return Distances(beyond, weights[apart], float(weights[surface].sum()))


# ---------------------------------------------------------------------------------------------------------------------
# Surfaces


def _border(mask: Any) -> Any:
    """Voxels of a mask with a face neighbour outside it; beyond the edge of the array is outside."""
    inner: Any = mask.clone() if isinstance(mask, torch.Tensor) else mask.copy()
    for axis in range(mask.ndim):
        before = (slice(None),) * axis
        for here, there, edge in ((slice(1, None), slice(None, -1), 0), (slice(None, -1), slice(1, None), -1)):
            inner[(*before, here)] &= mask[(*before, there)]
            inner[(*before, edge)] = False
    return mask ^ inner


def _elements(mask: Any, spacing: tuple[float, ...]) -> tuple[Any, Any]:
    """Surface elements between voxels, and their area (mm2; mm in 2D): one place per corner shared by 2^n voxels."""
    shape = [n + 1 for n in mask.shape]
    on_device = isinstance(mask, torch.Tensor)
    code: Any = torch.zeros(shape, dtype=torch.uint8, device=mask.device) if on_device else np.zeros(shape, np.uint8)
    voxels = mask.to(torch.uint8) if on_device else mask.view(np.uint8)
    for bit in range(2**mask.ndim):
        at = tuple(slice(0, -1) if bit >> axis & 1 else slice(1, None) for axis in range(mask.ndim))
        code[at] |= voxels << bit
    surface = (code != 0) & (code != 2 ** (2**mask.ndim) - 1)
    table = _element_sizes(spacing)
    if on_device:
        return surface, torch.tensor(table, dtype=torch.float32, device=mask.device)[code.long()]
    return surface, table[code]


@lru_cache(maxsize=64)
def _element_sizes(spacing: tuple[float, ...]) -> Array:
    """Size of the surface in the cell between 2^n voxel centres for each pattern of inside and outside.

    Where voxels of the rarer kind (inside or outside) meet only along an edge or at a corner, the surface keeps them apart.
    """
    corners = 2 ** len(spacing)
    sizes = np.zeros(2**corners)
    for code in range(1, 2**corners - 1):
        bits = [code >> bit & 1 for bit in range(corners)]
        cell = np.array(bits, np.float32).reshape((2,) * len(spacing)).T  # bit b is the corner with index bits of b
        if len(spacing) == 1:
            sizes[code] = 1.0
        elif len(spacing) == 2:
            lines = measure.find_contours(cell, 0.5)
            sizes[code] = sum(np.linalg.norm(np.diff(line, axis=0) * spacing, axis=1).sum() for line in lines)
        elif 2 * sum(bits) <= corners:
            # a level a hair above the middle keeps the voxels inside apart
            vertices, faces, _, _ = measure.marching_cubes(cell, 0.5 + 1e-6, spacing=spacing)
            sizes[code] = sizes[2**corners - 1 - code] = measure.mesh_surface_area(vertices, faces)
    sizes.flags.writeable = False
    return sizes


# ---------------------------------------------------------------------------------------------------------------------
# Nearest elements


def _nearest(queries: Array, targets: Array, spacing: tuple[float, ...]) -> Array:
    """Distance (mm, float32) from each voxel marked in ``queries``, in C order, to the nearest one in ``targets``."""
    offsets, lengths, shells = _neighbourhood(spacing)
    margin = np.abs(offsets).max(axis=0)
    padded = np.pad(targets, [(m, m) for m in margin.tolist()])
    steps = (offsets @ (np.array(padded.strides) // padded.itemsize)).tolist()
    flat, at = padded.reshape(-1), _flat_index(queries, padded.shape, margin)
    distances = np.zeros(len(at), np.float32)
    left, budget = np.arange(len(at), dtype=at.dtype), LOOKUPS_PER_VOXEL * queries.size
    for start, stop in shells:  # all offsets of one length
        budget -= (stop - start) * (len(at) + LOOKUPS_PER_STEP)
        if not len(at) or budget < 0:
            break
        hit = flat[at + steps[start]]
        for step in steps[start + 1 : stop]:
            hit |= flat[at + step]
        if hit.any():
            distances[left[hit]] = lengths[start]
            np.logical_not(hit, out=hit)
            left, at = left[hit], at[hit]
    if len(left):
        distances[left] = _far(np.argwhere(queries)[left], targets, spacing)
    return distances


def _far(queries: Array, targets: Array, spacing: tuple[float, ...]) -> Array:
    """Distance (mm) of the indices ``queries`` (n, axes) to the nearest voxel in ``targets``, for any distance."""
    if len(queries) * VOXELS_PER_QUERY < targets.size:
        tree = cKDTree(np.argwhere(targets) * spacing)
        return np.asarray(tree.query(queries * spacing)[0])
    whole = edt.edt(~targets, anisotropy=spacing if len(spacing) > 1 else spacing[0])
    return np.asarray(whole[tuple(queries.T)])


def _flat_index(marked: Array, padded_shape: Sequence[int], margin: Array) -> Array:
    """Index, in the flattened padded array, of the voxels marked."""
    where = np.nonzero(marked)
    index = np.ravel_multi_index(tuple(w + m for w, m in zip(where, margin.tolist(), strict=True)), tuple(padded_shape))
    return index.astype(np.int32 if np.prod(padded_shape) < 1 << 31 else np.int64)


@lru_cache(maxsize=64)
def _neighbourhood(spacing: tuple[float, ...]) -> tuple[Array, Array, list[tuple[int, int]]]:
    """The nearest index offsets, (n, axes), their lengths (mm), sorted by these, and the ends of the runs of one length.

    Whole shells, the origin left out.
    """
    ball = {1: 2.0, 2: np.pi, 3: 4 / 3 * np.pi}[len(spacing)]
    radius = max((NEIGHBOURS * float(np.prod(spacing)) / ball) ** (1 / len(spacing)), min(spacing))
    reach = [int(radius / s) for s in spacing]
    offsets = np.stack(np.meshgrid(*(np.arange(-n, n + 1) for n in reach), indexing="ij"), -1).reshape(-1, len(spacing))
    lengths = np.linalg.norm(offsets * np.array(spacing), axis=1)
    inside = np.flatnonzero((lengths > 0) & (lengths <= radius))
    order = inside[np.argsort(lengths[inside], kind="stable")]
    lengths = lengths[order]
    starts = np.flatnonzero(np.diff(lengths, prepend=-1.0) > 1e-9)
    return offsets[order], lengths, list(zip(starts.tolist(), [*starts[1:].tolist(), len(lengths)], strict=True))


def distance_transform(targets: torch.Tensor, spacing: Sequence[float]) -> torch.Tensor:
    """Exact distance (mm) of every voxel to the nearest one marked, on any device.

    Parameters
    ----------
    targets : (*spatial) bool tensor
        At least one voxel must be marked.
    spacing : sequence of float (mm)

    Returns
    -------
    (*spatial) float32 tensor
    """
    squared = torch.where(targets, 0.0, torch.inf).to(torch.float32)
    for axis, step in enumerate(spacing):
        lines = squared.movedim(axis, -1)
        n = lines.shape[-1]
        place = torch.arange(n, device=targets.device, dtype=torch.float32) * step
        cost = (place[:, None] - place[None, :]) ** 2
        flat = lines.reshape(-1, n)
        parts = [(part[:, None, :] + cost).amin(-1) for part in flat.split(max(1, CHUNK // n**2))]
        squared = torch.cat(parts).reshape(lines.shape).movedim(-1, axis)
    return squared.sqrt()
