"""Values of one grid at the voxel centres of another, block by block.

A map from target indices to source indices is affine. Where it only scales, flips and shifts the axes (after they have
been put in matching order), interpolation is separable and becomes three small matrix products per block; any other map
gathers the neighbours of each point. Coordinates are float64, values float32, in torch on any device.

References
----------
Unser, Aldroubi, Eden, "B-spline signal processing", IEEE Trans. Signal Processing 41 (1993) 821,
doi:10.1109/78.193220.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import solve_banded
from torch.nn.functional import grid_sample

__all__ = ["Block", "IndexMap", "Interpolation", "blocks", "coefficients"]

Array = NDArray[Any]
Interpolation = Literal["nearest", "linear", "cubic"]
Slices = tuple[slice, slice, slice]

_ALIGNED = 1e-4  # voxels: axes that drift less than this over the whole grid count as parallel, shifts as whole
_BORDER = 0.5 + 1e-6  # voxels beyond the outer centres that still count as inside
_NEGLIGIBLE = 1e-7  # weights of a B-spline's infinite prefilter below this (of 1) are left out


def blocks(shape: tuple[int, ...], size: int) -> Iterator[Slices]:
    """Boxes of at most ``size`` voxels a side that cover a grid, of nearly equal sides, last axis fastest."""
    edges = [np.linspace(0, n, -(-n // size) + 1).round().astype(int) for n in shape]
    for corner in product(*(zip(e[:-1].tolist(), e[1:].tolist(), strict=True) for e in edges)):
        a, b, c = (slice(low, high) for low, high in corner)
        yield a, b, c


@dataclass(frozen=True)
class Block:
    """What a box of target voxels needs: the box of source voxels, and the function from one to the other.

    ``inside`` is a mask of the target voxels within the source grid, None where all are.
    """

    columns: Slices
    inside: Array | None
    apply: Callable[[torch.Tensor], torch.Tensor]


class IndexMap:
    """The map from target to source indices of two grids, and how to interpolate along it.

    Parameters
    ----------
    matrix, offset : (3, 3) and (3,) array of float64
        ``source index = matrix @ target index + offset``.
    source, target : (I, J, K)
        Shapes of both grids.
    """

    def __init__(self, matrix: Array, offset: Array, source: tuple[int, ...], target: tuple[int, ...]) -> None:
        self.matrix, self.offset, self.source, self.target = matrix, offset, source, target
        drift = np.abs(matrix * (1 - np.eye(3))) @ (np.asarray(target) - 1)
        self.is_separable = bool((drift < _ALIGNED).all())
        self._weights: dict[tuple[int, str], tuple[Array, Array, Array]] = {}

    def terms(self, rows: Slices) -> list[list[Array]]:
        """Source coordinates of a box of target voxels, in terms: ``[s][a]`` is what target axis a adds to axis s.

        The terms of one source axis broadcast to the box, and their sum is the coordinate.
        """
        found = []
        for s in range(3):
            axes = [s] if self.is_separable else [0, 1, 2]
            terms = [self.matrix[s, a] * _along(rows[a], a) for a in axes]
            terms[0] = terms[0] + self.offset[s]
            found.append(terms)
        return found

    def coordinates(self, rows: Slices) -> list[Array]:
        """Source coordinates of a box of target voxels, one array an axis, that broadcast to the box."""
        return [np.asarray(sum(terms[1:], terms[0])) for terms in self.terms(rows)]

    def inside(self, coordinates: list[Array]) -> Array | None:
        """Mask of the points at most half a voxel beyond the outer centres; None where all are."""
        masks = [(x >= -_BORDER) & (x <= n - 1 + _BORDER) for x, n in zip(coordinates, self.source, strict=True)]
        return None if all(m.all() for m in masks) else masks[0] & masks[1] & masks[2]

    def whole_shift(self) -> tuple[Array, Array] | None:
        """(signs, shifts) where every target centre is a source centre on the same axes, possibly flipped; else None."""
        signs = np.round(np.diag(self.matrix))
        shifts = np.round(self.offset)
        if not self.is_separable or (np.abs(signs) != 1).any():
            return None
        drift = np.abs(np.diag(self.matrix) - signs) * np.asarray(self.target) + np.abs(self.offset - shifts)
        return (signs.astype(int), shifts.astype(int)) if (drift < _ALIGNED).all() else None

    def nearest(self, rows: Slices) -> tuple[list[Array], Array | None]:
        """Indices of the nearest source voxels of a box of target voxels, and the mask of those inside."""
        x = self.coordinates(rows)
        index = [np.clip(np.floor(c + 0.5), 0, n - 1).astype(np.intp) for c, n in zip(x, self.source, strict=True)]
        return index, self.inside(x)

    def block(self, rows: Slices, mode: str, device: torch.device, local: bool = False) -> Block | None:
        """How to compute a box of target voxels ("linear" or "cubic"); None where all of it is outside.

        With ``local`` no weights of zero are multiplied, so that NaN and infinity stay where they are. For "cubic"
        along a map that is not separable, the values must be :func:`coefficients`.
        """
        terms = self.terms(rows)
        low = [sum(float(t.min()) for t in axis) for axis in terms]
        high = [sum(float(t.max()) for t in axis) for axis in terms]
        if any(b < -_BORDER or a > n - 1 + _BORDER for a, b, n in zip(low, high, self.source, strict=True)):
            return None
        inside = None
        if any(a < -_BORDER or b > n - 1 + _BORDER for a, b, n in zip(low, high, self.source, strict=True)):
            inside = self.inside(self.coordinates(rows))
            if inside is not None and not inside.any():
                return None
        if self.is_separable and not local:
            return self._products(rows, mode, device, inside)
        around = self._linear if mode == "linear" else self._cubic
        return around(terms, low, high, device, inside)

    # -- separable: matrix products ---------------------------------------------------------------------------------

    def _axis(self, axis: int, mode: str) -> tuple[Array, Array, Array]:
        """Weights (n_out, n_in) float32 along an axis, and the first and one past the last column used by each row."""
        if (axis, mode) not in self._weights:
            x = self.matrix[axis, axis] * np.arange(self.target[axis]) + self.offset[axis]
            weights = weight_matrix(x, self.source[axis], mode)
            used = np.abs(weights) > _NEGLIGIBLE
            weights[~used] = 0  # tails would become denormal float32, whose products are slow
            first = used.argmax(1)
            last = used.shape[1] - used[:, ::-1].argmax(1)
            self._weights[axis, mode] = weights.astype(np.float32), first, last
        return self._weights[axis, mode]

    def _products(self, rows: Slices, mode: str, device: torch.device, inside: Array | None) -> Block:
        matrices, columns = [], []
        for axis, r in enumerate(rows):
            weights, first, last = self._axis(axis, mode)
            c = slice(int(first[r].min()), int(last[r].max()))
            part = np.ascontiguousarray(weights[r, c])
            same = part.shape[0] == part.shape[1] and np.array_equal(part, np.eye(len(part), dtype=np.float32))
            matrices.append(None if same else torch.from_numpy(part).to(device))
            columns.append(c)

        def apply(values: torch.Tensor) -> torch.Tensor:
            a, b, c = matrices
            if c is not None:
                values = values @ c.T
            if b is not None:
                values = b @ values
            if a is not None:
                values = (a @ values.reshape(len(values), -1)).reshape(len(a), *values.shape[1:])
            return values

        return Block((columns[0], columns[1], columns[2]), inside, apply)

    # -- any other map: the neighbours of each point ------------------------------------------------------------------

    def _linear(
        self, terms: list[list[Array]], low: list[float], high: list[float], device: torch.device, inside: Array | None
    ) -> Block:
        """Eight neighbours, by torch; coordinates count from the block's corner, where float32 is fine enough."""
        columns, parts = [], []
        for axis, a, b, n in zip(terms, low, high, self.source, strict=True):
            first = int(np.floor(np.clip(a, 0, n - 1)))
            last = min(int(np.floor(np.clip(b, 0, n - 1))) + 1, n - 1)
            columns.append(slice(first, last + 1))
            scale = 2 / max(last - first, 1)  # torch counts from -1 to 1, outer centre to outer centre
            shifted = [axis[0] - first, *axis[1:]]
            parts.append([scale * shifted[0] - 1, *(scale * t for t in shifted[1:])])
        grid = torch.stack(torch.broadcast_tensors(*(_sum(p, device) for p in reversed(parts))), -1)[None]

        def apply(values: torch.Tensor) -> torch.Tensor:
            return grid_sample(values[None, None], grid, padding_mode="border", align_corners=True)[0, 0]

        return Block((columns[0], columns[1], columns[2]), inside, apply)

    def _cubic(
        self, terms: list[list[Array]], low: list[float], high: list[float], device: torch.device, inside: Array | None
    ) -> Block:
        """64 neighbours, mirrored beyond the edges."""
        starts, taps, columns, picks, shape = [], [], [], [], []
        for axis, a, b, n in zip(terms, low, high, self.source, strict=True):
            first = int(np.floor(np.clip(a, -0.5, n - 0.5))) - 1
            last = int(np.floor(np.clip(b, -0.5, n - 0.5))) + 2
            pick = _mirror(np.arange(first, last + 1), n)
            columns.append(slice(int(pick.min()), int(pick.max()) + 1))
            picks.append(None if first >= 0 and last < n else torch.from_numpy(pick - pick.min()).to(device))
            x = _sum([axis[0] - first, *axis[1:]], device).clamp(-0.5 - first, n - 0.5 - first)
            whole = x.floor().clamp(1, last - first - 2)  # rounding must not leave the block
            taps.append(_taps(x - whole, "cubic"))
            starts.append(whole.to(torch.int32) - 1)
            shape.append(last - first + 1)
        strides = (shape[1] * shape[2], shape[2], 1)
        base = starts[0] * strides[0] + starts[1] * strides[1] + starts[2]
        index = base.reshape(-1)

        def apply(values: torch.Tensor) -> torch.Tensor:
            for axis, pick in enumerate(picks):
                if pick is not None:
                    values = values.index_select(axis, pick)
            flat = values.reshape(-1)
            total = torch.zeros(base.shape, device=device)
            for (p, wp), (q, wq) in product(enumerate(taps[0]), enumerate(taps[1])):
                line = torch.zeros(base.shape, device=device)
                for r, wr in enumerate(taps[2]):
                    shifted = flat[p * strides[0] + q * strides[1] + r :]
                    line.addcmul_(wr, shifted.index_select(0, index).view(base.shape))
                total.addcmul_(wp * wq, line)
            return total

        return Block((columns[0], columns[1], columns[2]), inside, apply)


def _along(rows: slice, axis: int) -> Array:
    """The indices of a slice, shaped to run along an axis of a box."""
    return np.arange(rows.start, rows.stop, dtype=np.float64).reshape([-1 if a == axis else 1 for a in range(3)])


def _sum(terms: list[Array], device: torch.device) -> torch.Tensor:
    """The float32 sum of terms that broadcast."""
    first, *others = (torch.from_numpy(np.asarray(t, np.float32)).to(device) for t in terms)
    for term in others:
        first = first + term
    return first


# ---------------------------------------------------------------------------------------------------------------------
# Kernels


def _clamp(index: Array, n: int) -> Array:
    return np.asarray(np.clip(index, 0, n - 1))


def _mirror(index: Array, n: int) -> Array:
    """Indices reflected at the outer centres: ... 2 1 0 1 2 ..."""
    if n == 1:
        return np.zeros_like(index)
    index = np.abs(index) % (2 * n - 2)
    return np.asarray(np.minimum(index, 2 * n - 2 - index))


def _taps(fraction: Any, mode: str) -> list[Any]:
    """Weights of the neighbours of a point, given its distance from the one below."""
    if mode == "linear":
        return [1 - fraction, fraction]
    t, u = fraction, 1 - fraction
    return [u**3 / 6, (3 * t**3 - 6 * t**2 + 4) / 6, (3 * u**3 - 6 * u**2 + 4) / 6, t**3 / 6]


def weight_matrix(x: Array, n: int, mode: str) -> Array:
    """(len(x), n) float64 weights that give the values at coordinates ``x`` from ``n`` samples.

    Linear holds the edge value in the outer half voxel. Cubic is the interpolating B-spline of order 3 with mirror
    boundaries (scipy's and ITK's), its prefilter included. Cost and memory O(len(x) * n).
    """
    if mode == "coefficients":  # those of the B-spline itself, at the samples
        return _prefiltered(np.eye(n), n)
    x = np.clip(x, -0.5, n - 0.5)
    whole = np.floor(x).astype(np.intp)
    taps = _taps(x - whole, mode)
    first, extend = (0, _clamp) if mode == "linear" else (-1, _mirror)
    weights = np.zeros((len(x), n))
    for step, weight in enumerate(taps):
        np.add.at(weights, (np.arange(len(x)), extend(whole + first + step, n)), weight)
    return weights if mode == "linear" else _prefiltered(weights, n)


def _prefiltered(weights: Array, n: int) -> Array:
    """Weights of samples from weights of B-spline coefficients: times the inverse of the sampled B-spline."""
    if n == 1:
        return weights
    bands = np.zeros((3, n))  # of the transposed matrix; mirror boundaries count the neighbour of each end twice
    bands[0, 1:] = bands[2, :-1] = 1 / 6
    bands[1] = 4 / 6
    bands[2, 0] = bands[0, -1] = 2 / 6
    return np.asarray(solve_banded((1, 1), bands, weights.T).T)


def coefficients(array: Array, device: torch.device, size: int = 128) -> Array:
    """B-spline coefficients (float32) of an image (I, J, K), by matrix products, block by block."""
    identity = IndexMap(np.eye(3), np.zeros(3), array.shape, array.shape)
    out = np.empty(array.shape, np.float32)
    for rows in blocks(array.shape, size):
        block = identity.block(rows, "coefficients", device)
        if block is not None:
            values = torch.from_numpy(np.array(array[block.columns], np.float32, order="C")).to(device)
            out[rows] = block.apply(values).cpu().numpy()
    return out
