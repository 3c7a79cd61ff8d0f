"""Masks and polygons, exact both ways; slice-wise and in 3D.

The rule of the house: **a pixel is in when its centre is inside the polygon**, and polygons of one slice combine by XOR
(even-odd), so a hole is simply another ring. Polygons are ``(n, 2)`` arrays of vertices in the index coordinates of the
slice ``(a, b)``, closed without repeating the first vertex; integers name pixel centres, so pixel edges lie at halves.

A centre exactly on an edge of a polygon follows a half-open rule: edges that face lower ``a`` or lower ``b`` are in, the
opposite ones out, so polygons that share an edge neither overlap nor leave a gap. Contours made here never come near that
case: their edges stay clear of every pixel centre, and rounding them for a file changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter
from skimage.measure import find_contours

from medseg.volume import LabelMap

__all__ = [
    "ContourStyle",
    "HoleStyle",
    "bounding_box",
    "contours_of",
    "fill_polygons",
    "join_keyholes",
    "mask_to_polygons",
    "polygons_to_mask",
    "stack_to_polygons",
]

Array = NDArray[Any]
ContourStyle = Literal["edge", "smooth"]
HoleStyle = Literal["xor", "keyhole"]

BLUR_PX = 0.8  # enough to round the stairs of a mask, little enough to keep its shape
MARGIN = 0.05  # the smooth surface passes at least about this far (pixels) from every pixel centre
TIE_PX = 1e-7  # nearer to a centre than this, an edge counts as passing through it
CHUNK = 1 << 21  # crossings handled at a time: bounds the memory that hostile polygons can take


def bounding_box(mask: Array) -> tuple[slice, ...] | None:
    """Smallest box of slices around the set voxels of a bool array of any rank; None when it is empty."""
    box: list[slice] = []
    for axis in range(mask.ndim):
        view = mask[tuple(box)]  # what earlier axes have cropped need not be looked at again
        used = np.flatnonzero(view.any(axis=tuple(a for a in range(mask.ndim) if a != axis)))
        if not used.size:
            return None
        box.append(slice(int(used[0]), int(used[-1]) + 1))
    return tuple(box)


# ---------------------------------------------------------------------------------------------------------------------
# Mask -> polygons


def mask_to_polygons(mask: Array, style: ContourStyle = "edge", holes: HoleStyle = "xor") -> list[Array]:
    """Contours of one slice.

    Parameters
    ----------
    mask : (A, B) array of bool
        Pixels of one structure.
    style : "edge" or "smooth"
        "edge" follows the pixel edges, collinear vertices merged: the area inside is exactly that of the pixels. "smooth"
        is a marching-squares line through the slightly blurred mask, kept at least 0.05 pixel on the right side of every
        pixel centre. Both give the mask back, pixel for pixel, by the centre rule.
    holes : "xor" or "keyhole"
        A hole becomes a ring of its own, or is joined to the ring around it by a channel of no width.

    Returns
    -------
    list of (n, 2) array
        Rings in index coordinates; outer rings and holes run in opposite senses. Pixels that touch by a corner only
        belong to different rings (foreground 4-connected), so no ring crosses itself.

    Examples
    --------
    >>> mask_to_polygons(np.array([[False, True]]))[0].tolist()
    [[-0.5, 0.5], [-0.5, 1.5], [0.5, 1.5], [0.5, 0.5]]
    """
    mask = np.asarray(mask)
    if mask.ndim != 2:
        raise ValueError(f"mask of a slice must have two axes, got {mask.ndim}")
    return stack_to_polygons(mask[None], style, holes).get(0, [])


def stack_to_polygons(masks: Array, style: ContourStyle = "edge", holes: HoleStyle = "xor") -> dict[int, list[Array]]:
    """Contours of every slice of a stack (K, A, B) that has set pixels, as :func:`mask_to_polygons`; {k: [rings]}.

    All slices are traced at once in arrays; cost grows with the voxels of the bounding box and the corners found.
    """
    if style not in ("edge", "smooth"):
        raise ValueError(f"style of contours must be 'edge' or 'smooth', got {style!r}")
    if holes not in ("xor", "keyhole"):
        raise ValueError(f"holes must be 'xor' or 'keyhole', got {holes!r}")
    masks = np.asarray(masks, bool)
    box = bounding_box(masks)
    if box is None:
        return {}
    cropped = np.pad(masks[box], ((0, 0), (1, 1), (1, 1)))
    rings = _edge_rings(cropped) if style == "edge" else _smooth_rings(cropped)
    k0, shift = box[0].start, np.array([box[1].start - 1, box[2].start - 1], float)
    return {k + k0: [r + shift for r in (join_keyholes(rs) if holes == "keyhole" else rs)] for k, rs in rings.items()}


def _edge_rings(masks: Array) -> dict[int, list[Array]]:
    """Rings along the pixel edges of padded slices (K, A, B).

    A lattice point is a corner where the 2x2 pixels around it hold 1 or 3 set ones (one corner) or two diagonal ones
    (two corners at one place). Along each lattice row, and along each lattice column, consecutive corners are the two
    ends of one straight edge: pairing them both ways links every corner to its two neighbours on its ring.
    """
    nw, ne, sw, se = masks[:, :-1, :-1], masks[:, :-1, 1:], masks[:, 1:, :-1], masks[:, 1:, 1:]
    saddle = (nw == se) & (ne == sw) & (nw != ne)
    corner = (nw ^ ne ^ sw ^ se) | saddle
    k, a, b = np.nonzero(corner)
    double = saddle[k, a, b]
    falling = nw[k, a, b]  # at a saddle: the set pixels are the north-west and the south-east one
    repeat = 1 + double
    second = np.repeat(np.cumsum(repeat) - repeat, repeat) != np.arange(repeat.sum())
    k, a, b, falling, double = (np.repeat(v, repeat) for v in (k, a, b, falling, double))
    # In a row the first corner of a saddle ends the edge from the left. Going down the column it must come first where
    # it belongs to the pixel above (north-west set) and last otherwise, so that each ring hugs one pixel.
    lower = np.where(double, second == falling, False)
    down = np.lexsort((lower, a, b, k))
    partner = np.empty(len(a), np.int64)
    partner[down[0::2]], partner[down[1::2]] = down[1::2], down[0::2]
    slices, filled = k.tolist(), se[k, a, b].tolist()
    rings: dict[int, list[Array]] = defaultdict(list)
    points = np.stack([a, b], axis=1) + 0.5
    for ring in _cycles(partner.tolist()):
        # every walk starts at the top left of its ring and goes right: below lies the structure, or else a hole
        rings[slices[ring[0]]].append(points[ring if filled[ring[0]] else ring[::-1]])
    return rings


def _cycles(partner: list[int]) -> list[list[int]]:
    """Walk all rings: corner n is joined to n ^ 1 along its row and to partner[n] along its column."""
    seen = bytearray(len(partner))
    found = []
    for start in range(0, len(partner), 2):
        if seen[start]:
            continue
        ring: list[int] = []
        at = start
        while not seen[at]:
            across = at ^ 1
            seen[at] = seen[across] = 1
            ring += (at, across)
            at = partner[across]
        found.append(ring)
    return found


def _smooth_rings(masks: Array) -> dict[int, list[Array]]:
    """Marching squares through each blurred slice of (K, A, B), every pixel centre kept on its side of the level."""
    rings: dict[int, list[Array]] = {}
    for k, mask in enumerate(masks):
        if not mask.any():
            continue
        level = gaussian_filter(mask.astype(np.float64), BLUR_PX)
        level = np.where(mask, np.maximum(level, 0.5 + MARGIN), np.minimum(level, 0.5 - MARGIN))
        rings[k] = [ring[:-1] for ring in find_contours(level, 0.5, fully_connected="low")]
    return rings


def join_keyholes(rings: Sequence[Array]) -> list[Array]:
    """Join each hole to the ring around it by a channel of no width, walked there and back.

    Both ways of the channel pass through the same vertices, so by the even-odd rule they cancel exactly and the area is
    untouched. Channels run along ``a`` from the top of a hole to what bounds the structure above it; for rings along
    pixel edges they lie between pixels. The result has one polygon per outer ring.
    """
    order = sorted(range(len(rings)), key=lambda n: (rings[n][:, 0].min(), n))
    outer_sign = np.sign(_signed_area(rings[order[0]])) if order else 0.0  # the topmost ring is an outer one
    joined: dict[int, list[tuple[float, float]]] = {}
    group: dict[int, int] = {}  # ring -> the joined polygon that holds it
    for n in order:
        points = [(float(a), float(b)) for a, b in rings[n]]
        group[n] = n
        if np.sign(_signed_area(rings[n])) != outer_sign:
            top = int(np.argmin(rings[n][:, 0]))
            points = points[top:] + points[:top]
            if any(abs(a - round(a)) < 1e-9 or abs(b - round(b)) < 1e-9 for a, b in points[:1]):  # a smooth ring
                points = [_between(points[0], points[1]), *points[1:], points[0]]
            hit = _first_above(points[0], joined)
            if hit is not None:
                host, after, meet = hit
                around = joined[host]
                joined[host] = [*around[: after + 1], meet, *points, points[0], meet, *around[after + 1 :]]
                group[n] = host
                continue
        joined[n] = points
    return [np.asarray([p for p, q in zip(v, v[-1:] + v[:-1], strict=True) if p != q]) for v in joined.values()]


def _between(p: tuple[float, float], q: tuple[float, float]) -> tuple[float, float]:
    return ((p[0] + q[0]) / 2, (p[1] + q[1]) / 2)


def _first_above(
    start: tuple[float, float], polygons: dict[int, list[tuple[float, float]]]
) -> tuple[int, int, tuple[float, float]] | None:
    """Where a line from ``start`` towards lower a first meets a polygon: its key, the edge's first vertex, the point."""
    best: tuple[int, int, tuple[float, float]] | None = None
    a0, b0 = start
    for key, vertices in polygons.items():
        p = np.asarray(vertices)
        q = np.roll(p, -1, axis=0)
        step = q[:, 1] - p[:, 1]
        crosses = (np.minimum(p[:, 1], q[:, 1]) <= b0) & (np.maximum(p[:, 1], q[:, 1]) >= b0) & (step != 0)
        edges = np.flatnonzero(crosses)
        at = p[edges, 0] + (b0 - p[edges, 1]) / step[edges] * (q[edges, 0] - p[edges, 0])
        above = at < a0 - 1e-9
        if above.any():
            n = int(np.argmax(np.where(above, at, -np.inf)))
            if best is None or at[n] > best[2][0]:
                best = key, int(edges[n]), (float(at[n]), b0)
    return best


def _signed_area(ring: Array) -> float:
    a, b = ring[:, 0], ring[:, 1]
    return float(np.sum(a * np.roll(b, -1) - b * np.roll(a, -1)) / 2)


# ---------------------------------------------------------------------------------------------------------------------
# Polygons -> mask


def polygons_to_mask(polygons: Sequence[Array], shape: tuple[int, int]) -> Array:
    """(A, B) bool mask of the pixels whose centre is inside an odd number of polygons.

    Parameters
    ----------
    polygons : sequence of (n, 2) array
        Vertices in index coordinates; may reach beyond the slice, and are then clipped.
    shape : (A, B)
        Size of the slice.

    Raises
    ------
    ValueError
        If a vertex is not finite, or a polygon is not an (n, 2) array.

    Notes
    -----
    Scan lines through the pixel centres of each row toggle the pixels at and beyond each crossing; the even-odd sum is one
    cumulative XOR. An edge is always evaluated from its lower end, so that an edge walked in both directions (a keyhole,
    a neighbour's border) cancels exactly. Cost O(crossings + pixels), memory O(pixels) whatever the polygons.
    """
    mask = np.zeros(shape, bool)
    box, inside = fill_polygons(polygons, shape)
    mask[box] = inside
    return mask


def fill_polygons(polygons: Sequence[Array], shape: tuple[int, int]) -> tuple[tuple[slice, slice], Array]:
    """As :func:`polygons_to_mask`, only the box that holds all polygons: its slices and the bool mask in it."""
    used = [_vertices(p) for p in polygons]
    used = [p for p in used if len(p) >= 3]
    if not used:
        return (slice(0, 0), slice(0, 0)), np.zeros((0, 0), bool)
    low = np.clip(np.floor(np.min([p.min(axis=0) for p in used], axis=0)), 0, shape).astype(int)
    high = np.clip(np.ceil(np.max([p.max(axis=0) for p in used], axis=0)) + 1, low, shape).astype(int)
    rows, columns = (high - low).tolist()
    toggles = np.zeros((rows, columns + 1), np.uint8)
    for p in used:
        _toggle(toggles, p - low)
    box = slice(int(low[0]), int(high[0])), slice(int(low[1]), int(high[1]))
    return box, np.logical_xor.accumulate(toggles[:, :columns].view(bool), axis=1)


def _vertices(polygon: Array) -> Array:
    p = np.asarray(polygon, np.float64)
    if p.ndim != 2 or p.shape[1] != 2 or not np.isfinite(p).all():
        raise ValueError(f"polygon must be (n, 2) finite vertices, got an array of shape {p.shape}")
    return p


def _toggle(toggles: Array, vertices: Array) -> None:
    """Flip, for each crossing of a polygon with a row of centres, the first pixel at or beyond it."""
    rows, columns = toggles.shape[0], toggles.shape[1] - 1
    p, q = vertices, np.roll(vertices, -1, axis=0)
    swap = p[:, 0] > q[:, 0]
    low, high = np.where(swap[:, None], q, p), np.where(swap[:, None], p, q)
    first = np.clip(np.ceil(low[:, 0] - TIE_PX), 0, rows).astype(np.int64)
    last = np.clip(np.ceil(high[:, 0] - TIE_PX), 0, rows).astype(np.int64)
    used = last > first
    low, high, first, count = low[used], high[used], first[used], (last - first)[used]
    total = np.cumsum(count)
    start = 0
    while start < len(count):
        stop = max(start + 1, int(np.searchsorted(total, (total[start - 1] if start else 0) + CHUNK, side="right")))
        n = count[start:stop]
        edge = np.repeat(np.arange(start, stop), n)
        row = first[edge] + np.arange(n.sum()) - np.repeat(np.cumsum(n) - n, n)
        share = (row - low[edge, 0]) / (high[edge, 0] - low[edge, 0])
        crossing = low[edge, 1] + share * (high[edge, 1] - low[edge, 1])
        column = np.clip(np.ceil(crossing - TIE_PX), 0, columns).astype(np.int64)
        hits = np.bincount(row * (columns + 1) + column, minlength=toggles.size)
        toggles ^= (hits & 1).astype(np.uint8).reshape(toggles.shape)
        start = stop


# ---------------------------------------------------------------------------------------------------------------------
# In 3D


def contours_of(
    labels: LabelMap,
    which: int | str,
    axis: int = 2,
    style: ContourStyle = "edge",
    holes: HoleStyle = "xor",
) -> dict[int, list[Array]]:
    """Contours of one structure in every slice across an axis of its grid.

    Parameters
    ----------
    labels : LabelMap
        The structures.
    which : int or str
        Number or name of the structure.
    axis : 0, 1 or 2
        Index axis that counts the slices.
    style, holes
        As in :func:`mask_to_polygons`.

    Returns
    -------
    dict of int to list of (n, 3) array
        For each slice with set voxels, its closed polygons as RAS+ positions in mm; exact on oblique and skewed grids.
    """
    if axis not in (0, 1, 2):
        raise ValueError(f"axis of the slices must be 0, 1 or 2, got {axis}")
    stack = np.moveaxis(labels.mask(which), axis, 0)
    return {
        k: [labels.geometry.to_world(np.insert(ring, axis, k, axis=1)) for ring in rings]
        for k, rings in stack_to_polygons(stack, style, holes).items()
    }
