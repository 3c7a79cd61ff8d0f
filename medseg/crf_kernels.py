"""Kernels of the dense CRF: normalised Gaussian filters over position, and over position and intensity."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bilateral", "Gaussian", "Kernel"]

NODES_PER_SIGMA = 3.0, 2.0  # of the bilateral grid, along a spatial axis and along intensity
LARGEST_GRID = 1 << 26  # nodes
BLOCK = 64  # lines of a banded matrix multiplied at a time
REACH = 4.5  # sigmas beyond which a Gaussian counts as 0


class Kernel(Protocol):
    """A symmetrically normalised kernel matrix."""

    def __call__(self, q: Tensor) -> Tensor:
        """N^-1/2 K N^-1/2 applied to q (N, C, H, W)."""
        ...


def _gram(positions: Tensor, sigma: float) -> Tensor:
    """(L, L) matrix exp(-(a - b)^2 / 2 sigma^2)."""
    apart = (positions[:, None] - positions[None, :]) / sigma
    return torch.where(apart.abs() <= REACH + 1, torch.exp(-0.5 * apart**2), 0.0)


def _along(x: Tensor, matrix: Tensor, reach: int) -> Tensor:
    """Multiply a symmetric banded (L, L) matrix onto axis 1 of x (B, L, M), a block of lines at a time."""
    length = len(matrix)
    if length <= 2 * BLOCK or 2 * reach + BLOCK >= length:
        return torch.matmul(matrix, x)
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = max(0, start - reach), min(length, stop + reach)
        parts.append(torch.matmul(matrix[start:stop, low:high], x[:, low:high]))
    return torch.cat(parts, dim=1)


def _along_last(x: Tensor, matrix: Tensor, reach: int) -> Tensor:
    """As :func:`_along` for the last axis of x (M, L)."""
    length = len(matrix)
    if length <= 2 * BLOCK or 2 * reach + BLOCK >= length:
        return x @ matrix
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = max(0, start - reach), min(length, stop + reach)
        parts.append(x[:, low:high] @ matrix[low:high, start:stop])
    return torch.cat(parts, dim=1)


class Gaussian:
    """The kernel of position alone: separable, and so is its normalisation."""

    def __init__(self, image: Tensor, sigma: tuple[float, float]) -> None:
        self.matrices, self.reach = [], []
        for length, s in zip(image.shape[2:], sigma, strict=True):
            gram = _gram(torch.arange(length, device=image.device, dtype=torch.float32), s)
            scale = gram.sum(1).rsqrt()
            self.matrices.append(scale[:, None] * gram * scale[None, :])
            self.reach.append(int(REACH * s) + 1)

    def __call__(self, q: Tensor) -> Tensor:
        n, c, h, w = q.shape
        columns = _along(q.reshape(n * c, h, w), self.matrices[0], self.reach[0])
        return _along_last(columns.reshape(n * c * h, w), self.matrices[1], self.reach[1]).reshape(n, c, h, w)


class Bilateral:
    """The kernel of position and intensity, on a grid of nodes over (H, W, intensity ...): splat, blur, slice."""

    def __init__(self, image: Tensor, sigma: tuple[float, float], sigma_intensity: float) -> None:
        n, channels, h, w = image.shape
        device = image.device
        self.shape: list[int] = []  # nodes along each axis
        self.blurs: list[tuple[Tensor, int]] = []
        base = torch.arange(n, device=device).view(n, 1, 1)
        fractions = []
        axes: list[tuple[Tensor, float, float]] = [
            (torch.arange(h, device=device, dtype=torch.float32).view(1, h, 1), sigma[0], NODES_PER_SIGMA[0]),
            (torch.arange(w, device=device, dtype=torch.float32).view(1, 1, w), sigma[1], NODES_PER_SIGMA[0]),
        ]
        low = image.amin((0, 2, 3))
        axes += [(image[:, c] - low[c], sigma_intensity, NODES_PER_SIGMA[1]) for c in range(channels)]
        for axis, (place, s, per_sigma) in enumerate(axes):
            spatial = axis < 2
            step = s / per_sigma
            if spatial and step < 1.5:
                step = 1.0  # a node per pixel: nothing to interpolate
            place = place / step
            count = int(place.max()) + (1 if spatial and step == 1.0 else 2)
            self._require_small(n, [*self.shape, count])
            cell = place.floor().clamp_(max=max(count - 2, 0))
            fractions.append(place - cell)
            base = base * count + cell.long()
            narrowed = (s**2 - (0 if spatial and step == 1.0 else step**2 / 3)) ** 0.5
            nodes = torch.arange(count, device=device, dtype=torch.float32) * step
            self.blurs.append((_gram(nodes, narrowed), int(REACH * narrowed / step) + 1))
            self.shape.append(count)
        self.batch, self.pixels = n, (n, h, w)
        self._corners(base, fractions)
        ones = torch.ones(n, 1, h, w, device=device)
        self.scale = self._filter(ones).clamp(min=1e-20).rsqrt()

    def _require_small(self, batch: int, shape: Sequence[int]) -> None:
        if batch * float(np.prod(shape)) > LARGEST_GRID:
            raise ValueError(
                f"bilateral grid must have at most {LARGEST_GRID} nodes, got {batch} x {list(shape)}; use larger sigmas, "
                "clip the intensities or pass fewer slices"
            )

    def _corners(self, base: Tensor, fractions: list[Tensor]) -> None:
        """Index (P, corners) and weight of the nodes around each pixel."""
        strides = np.cumprod([1, *self.shape[:0:-1]])[::-1].tolist()
        used = [axis for axis, f in enumerate(fractions) if bool((f != 0).any())]  # the others lie on their nodes
        index, weight = [], []
        for bits in product((0, 1), repeat=len(used)):
            step = sum(strides[axis] * bit for axis, bit in zip(used, bits, strict=True))
            share = torch.ones(1, 1, 1, device=base.device)
            for axis, bit in zip(used, bits, strict=True):
                share = share * (fractions[axis] if bit else 1 - fractions[axis])
            index.append((base + step).flatten())
            weight.append(share.expand(self.pixels).flatten())
        self.index = torch.stack(index, 1)
        self.weight = torch.stack(weight, 1)

    def _filter(self, q: Tensor) -> Tensor:
        """K applied to q (N, C, H, W), without normalisation."""
        n, h, w = self.pixels
        channels = q.shape[1]
        rows = q.permute(0, 2, 3, 1).reshape(-1, channels)
        nodes = torch.zeros(self.batch * int(np.prod(self.shape)), channels, device=q.device)
        for corner in range(self.index.shape[1]):
            nodes = nodes.index_add(0, self.index[:, corner], rows * self.weight[:, corner, None])
        for axis, (matrix, reach) in enumerate(self.blurs):
            outer = self.batch * int(np.prod(self.shape[:axis]))
            nodes = _along(nodes.reshape(outer, self.shape[axis], -1), matrix, reach)
        table = nodes.reshape(-1, channels)
        rows = torch.nn.functional.embedding_bag(self.index, table, per_sample_weights=self.weight, mode="sum")
        return rows.reshape(n, h, w, channels).permute(0, 3, 1, 2)

    def __call__(self, q: Tensor) -> Tensor:
        return self.scale * self._filter(self.scale * q)
