"""Moving patches: one interpolation for rotation, scaling and bending, and matrices that work along axes.

Tensors in, tensors out; any device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.losses import IGNORE

__all__ = ["Resampler", "along_axes", "blur_matrix", "bspline_matrix", "low_resolution_matrix", "rotation_matrix"]


class Resampler:
    """Reads an image at other places of its own grid; made once, used for every channel and for the labels.

    Eight (in a plane four) gathers and a few interpolations between them: on one CPU core a third of the time of
    ``grid_sample`` in 3D. Axes that do not move are not interpolated, and cost nothing.

    Parameters
    ----------
    matrix : (D, D) tensor
        Turns an offset from the centre of the moved patch into the offset of its source, in voxels.
    shape : sequence of int
        D lengths of both grids.
    bend : (D, *shape) tensor, optional
        Added to the places of the source, in voxels.
    device : torch.device, optional
        Of the images and labels.
    """

    def __init__(
        self, matrix: Tensor, shape: Sequence[int], bend: Tensor | None = None, device: torch.device | None = None
    ) -> None:
        self.shape = tuple(shape)
        dims, rows = len(shape), matrix.tolist()
        moved = [bend is not None or row != [float(d == e) for e in range(dims)] for d, row in enumerate(rows)]
        self.margins = [int(m) for m in moved]
        padded = [n + 2 * m for n, m in zip(self.shape, self.margins, strict=True)]
        exact = torch.float32 if math.prod(padded) < 2**24 else torch.float64  # integers up to there
        axes = [torch.arange(n, device=device, dtype=torch.float32).sub_((n - 1) / 2) for n in shape]
        axes = [a.view([-1 if d == e else 1 for e in range(dims)]) for d, a in enumerate(axes)]
        near, corner = (torch.zeros([1] * dims, dtype=exact, device=device) for _ in range(2))
        self.steps: list[tuple[int, Tensor]] = []  # stride and share of the farther neighbour, of each axis that moves
        for d, n in enumerate(self.shape):
            stride, padded_stride = math.prod(self.shape[d + 1 :]), math.prod(padded[d + 1 :])
            place = axes[d].add((n - 1) / 2)
            if moved[d]:
                parts = [axes[e] * rows[d][e] for e in range(dims) if rows[d][e]]
                place = sum(parts[1:], parts[0] + (n - 1) / 2)
                place = place if bend is None else place + bend[d]
                near = near.add(place.round().clamp_(-1, n).add_(1), alpha=padded_stride)
                place.clamp_(0, n - 1)
                below = place.floor().clamp_(max=max(n - 2, 0))
                corner = corner.add(below, alpha=stride)
                self.steps.append((stride if n > 1 else 0, place.sub_(below)))
            else:
                near, corner = near.add(place, alpha=padded_stride), corner.add(place, alpha=stride)
        self.near = near.int().expand(self.shape).reshape(-1)
        self.corner = corner.int().expand(self.shape).reshape(-1)

    def linear(self, image: Tensor) -> Tensor:
        """An image (*shape), float, linearly interpolated; the edge goes on beyond it."""
        flat, offsets = image.reshape(-1), [0]
        for stride, _ in self.steps:
            offsets = [o + s for o in offsets for s in (0, stride)]
        values = [flat[o:].index_select(0, self.corner).view(self.shape) for o in offsets]
        for _, share in reversed(self.steps):
            pairs = zip(values[::2], values[1::2], strict=True)
            values = [low.lerp_(high, share.expand(self.shape)) for low, high in pairs]
        return values[0]

    def nearest(self, labels: Tensor) -> Tensor:
        """Labels (*shape) of the nearest voxel; ``IGNORE`` beyond the edge."""
        padding = [m for margin in reversed(self.margins) for m in (margin, margin)]
        return F.pad(labels, padding, value=IGNORE).reshape(-1).index_select(0, self.near).view(self.shape)

    def labels(self, labels: Tensor) -> Tensor:
        """Labels (*shape) or (S, *shape) by nearest neighbour, soft ones (float) linearly; what does not count stays so."""
        if labels.ndim == len(self.shape):
            return self.nearest(labels)
        near = torch.stack([self.nearest(layer) for layer in labels])
        if not labels.is_floating_point():
            return near
        soft = torch.stack([self.linear(layer) for layer in labels.clamp(min=0).float()])
        return torch.where(near < 0, near, soft.to(near.dtype))


def rotation_matrix(angles: Sequence[float], dims: int, only_about: int | None = None) -> Tensor:
    """Rotation by angles (radians): in the plane (2D, the first angle), about all three axes, or about a single one."""
    matrix = torch.eye(dims)
    for about in [None] if dims == 2 else range(3):
        if about is not None and only_about is not None and about != only_about:
            continue
        a, b = (0, 1) if about is None else (x for x in range(3) if x != about)
        cos, sin = math.cos(angles[about or 0]), math.sin(angles[about or 0])
        turn = torch.eye(dims)
        turn[a, a] = turn[b, b] = cos
        turn[a, b], turn[b, a] = -sin, sin
        matrix = matrix @ turn
    return matrix


def along_axes(image: Tensor, matrices: Sequence[Tensor | None]) -> Tensor:
    """Image (n1, ..., nD) multiplied along each axis by a matrix (m, n), None leaves an axis.

    Blurring and low resolution are such products: O(voxels x edge), which BLAS does faster than a convolution for
    edges of patches.
    """
    for axis, matrix in enumerate(matrices):
        if matrix is None:
            continue
        before, n, after = image.shape[:axis], image.shape[axis], image.shape[axis + 1 :]
        if after:
            image = matrix @ image.reshape(math.prod(before), n, math.prod(after))
        else:
            image = image.reshape(-1, n) @ matrix.T
        image = image.reshape(*before, len(matrix), *after)
    return image


def blur_matrix(n: int, sigma: float) -> Tensor:
    """(n, n): a Gaussian of ``sigma`` voxels, cut at 3.5 sigma; the edge goes on beyond the image."""
    reach = max(1, round(3.5 * sigma))
    offsets = torch.arange(-reach, reach + 1)
    weights = torch.exp(-(offsets.float() ** 2) / (2 * sigma**2))
    weights = (weights / weights.sum()).expand(n, -1)
    return torch.zeros(n, n).scatter_add_(1, (torch.arange(n)[:, None] + offsets).clamp(0, n - 1), weights)


def low_resolution_matrix(n: int, zoom: float) -> Tensor:
    """(n, n): take the nearest of ``zoom`` times as many voxels, and come back linearly."""
    coarse = F.interpolate(torch.eye(n)[None], size=max(1, round(n * zoom)), mode="nearest-exact")
    return F.interpolate(coarse, size=n, mode="linear")[0].T


def bspline_matrix(n: int, knots: float) -> Tensor:
    """(n, m): a smooth curve through m >= 4 values ``knots`` voxels apart, by cubic B-splines."""
    place = torch.arange(n)[:, None] / knots + 1
    distance = (place - torch.arange(math.ceil((n - 1) / knots) + 3)).abs()
    near = 2 / 3 - distance**2 + distance**3 / 2
    far = (2 - distance).clamp(min=0) ** 3 / 6
    return torch.where(distance < 1, near, far)
