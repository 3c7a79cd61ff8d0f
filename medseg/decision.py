"""From logits on the planned grid to labels or probabilities on the scanner's own grid.

The logits are interpolated linearly on the way, the decision comes last: labels are never resampled. Neither the logits
on the target grid nor, where slabs come from :func:`medseg.sliding_window.sliding_logits_slabs`, the logits on the
planned grid exist as a whole. Voxels of the target whose centre lies outside the planned grid (outside its outer voxel
faces) are background; between the outermost voxel centre and the face the outermost value holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np
import torch

from medseg.sliding_window import Slab, labels_of, probabilities_of
from medseg.volume import Geometry

__all__ = ["decide", "probabilities_on"]

PARALLEL_TOLERANCE = 0.01  # voxels that axes may stray over the whole grid and still count as parallel
FACE_TOLERANCE = 1e-3  # voxels beyond the outer face that still count as inside
CHUNK = 1 << 18  # points interpolated at a time


@dataclass(frozen=True)
class _Axis:
    """Linear interpolation along one axis, for the target voxels ``start..stop`` that lie inside the source.

    Their values are ``(1 - fraction) * source[low] + fraction * source[high]``; ``exact`` where all fractions are zero.
    """

    start: int
    stop: int
    low: torch.Tensor
    high: torch.Tensor
    fraction: torch.Tensor
    exact: bool

    @classmethod
    def make(cls, positions: np.ndarray, size: int, device: torch.device) -> _Axis:
        """From the monotonic source positions of all target voxels and the number of source voxels."""
        (inside,) = np.nonzero((positions > -0.5 - FACE_TOLERANCE) & (positions < size - 0.5 + FACE_TOLERANCE))
        start, stop = (int(inside[0]), int(inside[-1]) + 1) if len(inside) else (0, 0)
        low, high, fraction = _split(torch.from_numpy(positions[start:stop]), size)
        return cls(start, stop, low.to(device), high.to(device), fraction.to(device), not bool(fraction.any()))


def _split(positions: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Lower and upper neighbour (int64) and distance from the lower (float32), positions held inside the centres."""
    positions = positions.clamp(0, size - 1)
    nearest = positions.round()
    positions = torch.where((positions - nearest).abs() < 1e-6, nearest, positions)
    low = positions.floor()
    return low.long(), (low.long() + 1).clamp_max(size - 1), (positions - low).float()


def _source_indices(source: Geometry, target: Geometry) -> np.ndarray:
    """4x4 matrix from indices of the target to indices of the source."""
    return np.linalg.solve(source.affine, target.affine)


def _parallel_axes(matrix: np.ndarray, shape: tuple[int, int, int]) -> tuple[int, int, int] | None:
    """For each target axis the source axis that runs along it, or None for grids that lie oblique to each other."""
    axes = tuple(int(a) for a in np.abs(matrix[:3, :3]).argmax(0))
    rest = np.abs(matrix[:3, :3]) * np.maximum(np.asarray(shape) - 1, 0)
    for b, a in enumerate(axes):
        rest[a, b] = 0
    return axes if sorted(axes) == [0, 1, 2] and rest.sum(1).max() < PARALLEL_TOLERANCE else None  # type: ignore[return-value]


def _as_slabs(logits: torch.Tensor | Iterable[Slab], source: Geometry) -> Iterator[Slab]:
    """Slabs that are checked to cover the source grid in order."""
    if isinstance(logits, torch.Tensor):
        logits = [Slab(0, 0, int(logits.shape[1]), logits)]
    done, axis = 0, 0
    for slab in logits:
        axis = slab.axis
        expected = list(source.shape)
        expected[axis] = slab.stop - slab.start
        if slab.logits.ndim != 4 or list(slab.logits.shape[1:]) != expected or slab.start != done:
            raise ValueError(
                f"logits must cover the source grid {source.shape} in order, got {tuple(slab.logits.shape)} "
                f"for planes {slab.start} to {slab.stop} of axis {axis} after {done}"
            )
        done = slab.stop
        yield slab
    if done != source.shape[axis]:
        raise ValueError(f"logits must cover the source grid {source.shape}, got {done} planes along axis {axis}")


# ---------------------------------------------------------------------------------------------------------------------
# Parallel grids: one plane of the target at a time


@dataclass(frozen=True)
class _Plane:
    """Logits (K, U, V) interpolated to plane ``index`` along target axis ``axis``; U and V are still source voxels."""

    axis: int
    index: int
    logits: torch.Tensor
    rows: _Axis
    columns: _Axis


def _planes(slabs: Iterator[Slab], source: Geometry, target: Geometry, axes: tuple[int, int, int]) -> Iterator[_Plane]:
    """The planes of the target that lie inside the source, each as soon as the slabs that it needs have come."""
    matrix = _source_indices(source, target)
    positions = [matrix[a, b] * np.arange(target.shape[b]) + matrix[a, 3] for b, a in enumerate(axes)]
    sizes = [source.shape[a] for a in axes]
    waiting: list[int] | None = None
    last: torch.Tensor | None = None
    along, rows, columns = (_Axis.make(np.zeros(1), 1, torch.device("cpu")),) * 3
    for slab in slabs:
        axis = axes.index(slab.axis)
        logits = slab.logits.permute(0, *(a + 1 for a in axes)).movedim(axis + 1, 1)
        if waiting is None:
            along = _Axis.make(positions[axis], sizes[axis], torch.device("cpu"))
            rows, columns = (_Axis.make(positions[b], sizes[b], logits.device) for b in range(3) if b != axis)
            waiting = torch.argsort(along.low, stable=True).tolist() if rows.stop > 0 and columns.stop > 0 else []
        while waiting and int(along.high[waiting[0]]) < slab.stop:
            n = waiting.pop(0)
            low, high = int(along.low[n]), int(along.high[n])
            below = logits[:, low - slab.start] if low >= slab.start or last is None else last
            plane = below.float()
            if float(along.fraction[n]):
                plane = torch.lerp(plane, logits[:, high - slab.start].float(), float(along.fraction[n]))
            yield _Plane(axis, along.start + n, plane.contiguous(), rows, columns)
        last = logits[:, -1].clone()


def _interpolate_plane(plane: _Plane) -> torch.Tensor:
    """(K, U', V') logits of the part of the plane that lies inside the source."""
    rows, columns = plane.rows, plane.columns
    result = plane.logits.new_empty((len(plane.logits), len(rows.low), len(columns.low)))
    for one, out in zip(plane.logits, result, strict=True):  # one class stays in a processor's cache
        values = one.index_select(1, columns.low)
        if not columns.exact:
            values = torch.lerp(values, one.index_select(1, columns.high), columns.fraction)
        if rows.exact:
            torch.index_select(values, 0, rows.low, out=out)
        else:
            first, second = values.index_select(0, rows.low), values.index_select(0, rows.high)
            torch.lerp(first, second, rows.fraction[:, None], out=out)
    return result


def _decide_plane(plane: _Plane) -> torch.Tensor:
    """(U', V') labels of the part of the plane that lies inside the source.

    Where the four neighbours agree on the largest class, so does every point between them: a weighted mean keeps the
    order. Only points between neighbours that differ, near the boundaries of structures, are interpolated.
    """
    logits, rows, columns = plane.logits, plane.rows, plane.columns
    mixed = len(logits)  # no class has this number
    labels = labels_of(logits)
    cells = labels.clone()
    if not rows.exact:
        cells[:-1].masked_fill_(labels[1:] != labels[:-1], mixed)
    if not columns.exact:
        cells[:, :-1].masked_fill_(cells[:, 1:] != cells[:, :-1], mixed)
    result = cells.index_select(1, columns.low).index_select(0, rows.low)
    undecided = result == mixed
    if int(torch.count_nonzero(undecided)) > result.numel() // 8:
        return labels_of(_interpolate_plane(plane))
    for some in torch.nonzero(undecided.view(-1))[:, 0].split(CHUNK):
        u, v = some // result.shape[1], some % result.shape[1]
        ends = [(rows.low[u], rows.high[u], rows.fraction[u]), (columns.low[v], columns.high[v], columns.fraction[v])]
        result.view(-1)[some] = labels_of(_interpolate_points(logits, ends))
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Any grids: points


def _interpolate_points(
    logits: torch.Tensor, ends: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """(K, N) values of logits (K, *S) at N points; ``ends`` holds (low, high, fraction), each (N,), for each axis."""
    corners = [torch.zeros_like(ends[0][0])]
    for size, (low, high, _) in zip(logits.shape[1:], ends, strict=True):
        corners = [corner * size + index for corner in corners for index in (low, high)]
    values = torch.empty((len(logits), len(corners[0])), device=logits.device)
    for one, value in zip(logits.flatten(1), values, strict=True):
        level = [one[corner].float() for corner in corners]
        for _, _, fraction in reversed(ends):
            level = [torch.lerp(a, b, fraction) for a, b in zip(level[::2], level[1::2], strict=True)]
        value.copy_(level[0])
    return values


def _point_runs(
    source: Geometry, target: Geometry, device: torch.device
) -> Iterator[tuple[torch.Tensor, list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]]:
    """The voxels of the target inside the source, by runs: flat index in the target, and neighbours in the source."""
    matrix = torch.from_numpy(_source_indices(source, target)).to(device)
    sizes = torch.tensor(source.shape, device=device)
    _, columns, depth = target.shape
    count = int(np.prod(target.shape))
    for start in range(0, count, CHUNK):
        flat = torch.arange(start, min(count, start + CHUNK), device=device)
        index = torch.stack([flat // (columns * depth), flat // depth % columns, flat % depth]).double()
        position = matrix[:3, :3] @ index + matrix[:3, 3:]
        inside = ((position > -0.5 - FACE_TOLERANCE) & (position < sizes[:, None] - 0.5 + FACE_TOLERANCE)).all(0)
        if bool(inside.any()):
            yield flat[inside], [_split(p, n) for p, n in zip(position[:, inside], source.shape, strict=True)]


def _gather(slabs: Iterator[Slab], source: Geometry) -> torch.Tensor:
    """All logits (K, *source.shape) in one tensor."""
    whole = torch.empty(0)
    for slab in slabs:
        if slab.stop - slab.start == source.shape[slab.axis]:
            return slab.logits
        if slab.start == 0:
            whole = slab.logits.new_empty((len(slab.logits), *source.shape))
        whole.narrow(slab.axis + 1, slab.start, slab.stop - slab.start).copy_(slab.logits)
    return whole


# ---------------------------------------------------------------------------------------------------------------------
# Public functions


def decide(
    logits: torch.Tensor | Iterable[Slab], source: Geometry, target: Geometry, *, overlapping: bool = False
) -> torch.Tensor:
    """Labels on the target grid: logits interpolated linearly, then the class of the largest.

    Parameters
    ----------
    logits : (K, *source.shape) tensor or iterable of Slab
        Logits on any device; slabs in order, as from :func:`medseg.sliding_window.sliding_logits_slabs`.
    source : Geometry
        The grid of the logits.
    target : Geometry
        The grid of the result, which may be resampled, reoriented, cropped, or turned by any angle.
    overlapping : bool
        The classes may overlap: one mask per class where its logit is at least 0 (probability 0.5).

    Returns
    -------
    (*target.shape) tensor of uint8 (int16 above 255 classes), or (K, *target.shape) of bool where ``overlapping``; on
    the CPU, 0 or False outside the source

    Raises
    ------
    ValueError
        If the logits do not cover the source grid, or hold NaN.

    Notes
    -----
    Grids with parallel axes (in any order and direction) go plane by plane: memory is the result and a few planes, time
    grows with the target's voxels, for all classes only near boundaries. Grids oblique to each other need all logits
    of the source at once, and about 8 K operations per voxel of the target.
    """

    def of_plane(plane: _Plane) -> torch.Tensor:
        return labels_of(_interpolate_plane(plane), overlapping) if overlapping else _decide_plane(plane)

    return _fill(logits, source, target, of_plane, lambda values: labels_of(values, overlapping), False)


def probabilities_on(
    logits: torch.Tensor | Iterable[Slab],
    source: Geometry,
    target: Geometry,
    *,
    overlapping: bool = False,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Probabilities on the target grid: softmax (or sigmoids, where classes overlap) of the interpolated logits.

    The class of the largest is therefore the one that :func:`decide` gives. Parameters are those of :func:`decide`.

    Returns
    -------
    (K, *target.shape) tensor of ``dtype`` (float32 or float16) on the CPU; outside the source the first class has
    probability 1 (where classes overlap, none has any)
    """

    def of(values: torch.Tensor) -> torch.Tensor:
        return probabilities_of(values, overlapping).to(dtype)

    return _fill(logits, source, target, lambda plane: of(_interpolate_plane(plane)), of, not overlapping)


def _fill(
    logits: torch.Tensor | Iterable[Slab],
    source: Geometry,
    target: Geometry,
    of_plane: Callable[[_Plane], torch.Tensor],
    of_points: Callable[[torch.Tensor], torch.Tensor],
    first_outside: bool,
) -> torch.Tensor:
    """What the functions make of each plane or of (K, N) values, on the target grid; zero (first class 1) outside."""
    slabs = _as_slabs(logits, source)
    axes = _parallel_axes(_source_indices(source, target), target.shape)
    first = next(slabs)
    result = of_points(torch.zeros_like(first.logits[:, 0, 0, :1]).float())
    result = torch.zeros((*result.shape[:-1], *target.shape), dtype=result.dtype)
    if first_outside:
        result[0] = 1
    slabs = chain([first], slabs)
    if axes is not None:
        for plane in _planes(slabs, source, target, axes):
            part = result.select(plane.axis - 3, plane.index)
            part = part[..., plane.rows.start : plane.rows.stop, plane.columns.start : plane.columns.stop]
            part.copy_(of_plane(plane))
        return result
    whole = _gather(slabs, source)
    flat = result.flatten(-3)
    for index, ends in _point_runs(source, target, whole.device):
        flat[..., index.cpu()] = of_points(_interpolate_points(whole, ends)).cpu()
    return result
