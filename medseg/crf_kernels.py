"""Kernels of the dense CRF: normalised Gaussian filters over position, and over position and intensity."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bilateral", "Gaussian"]

NODES_PER_SIGMA = 3.0, 2.0  # of the bilateral grid, along a spatial axis and along intensity
LARGEST_GRID = 1 << 26  # nodes
BLOCK = 64  # lines of a banded matrix multiplied at a time
REACH = 4.5  # sigmas beyond which a Gaussian counts as 0


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
        self.pixels = image.shape[0], *image.shape[2:]
        self.reach = [int(REACH * s) + 1 for s in sigma]
        axes = list(zip(image.shape[2:], sigma, strict=True))
        made = {axis: self._matrix(*axis, image.device) for axis in set(axes)}
        self.matrices = [made[axis] for axis in axes]

    @staticmethod
    def _matrix(length: int, sigma: float, device: torch.device) -> Tensor:
        gram = _gram(torch.arange(length, device=device, dtype=torch.float32), sigma)
        scale = gram.sum(1).rsqrt()
        return scale[:, None] * gram * scale[None, :]

    def __call__(self, q: Tensor) -> Tensor:
        """The normalised kernel applied to q (C, P)."""
        n, h, w = self.pixels
        columns = _along(q.reshape(-1, h, w), self.matrices[0], self.reach[0])
        return _along_last(columns.reshape(-1, w), self.matrices[1], self.reach[1]).reshape(len(q), n * h * w)


class _Taps:
    """The nodes around each of P pixels, and their shares in linear interpolation."""

    def __init__(self, base: Tensor, steps: Sequence[int], weight: Tensor, nodes: int) -> None:
        self.base, self.steps, self.weight, self.nodes = base, steps, weight, nodes  # (P,), corners, (corners, P)
        self.index = base.int()[:, None] + torch.tensor(steps, dtype=torch.int32, device=base.device)
        self.weight_rows = weight.T.contiguous()

    def at(self, where: Tensor) -> _Taps:
        """Those of some pixels only."""
        return _Taps(self.base[where], self.steps, self.weight[:, where], self.nodes)

    def splat(self, q: Tensor) -> Tensor:
        """Values (C, P) of pixels to sums (C, nodes)."""
        sums = [torch.zeros(self.nodes, device=q.device) for _ in q]
        for step, weight in zip(self.steps, self.weight, strict=True):
            index = self.base + step
            for total, channel in zip(sums, q, strict=True):
                total.scatter_add_(0, index, channel * weight)
        return torch.stack(sums)

    def slice(self, nodes: Tensor) -> Tensor:
        """Values (C, nodes) interpolated at the pixels, (C, P)."""
        table = nodes.T.contiguous()
        rows = torch.nn.functional.embedding_bag(self.index, table, per_sample_weights=self.weight_rows, mode="sum")
        return rows.T.contiguous()


class Bilateral:
    """The kernel of position and intensity, on a grid of nodes over (H, W, intensity ...): splat, blur, slice."""

    def __init__(self, image: Tensor, sigma: tuple[float, float], sigma_intensity: float) -> None:
        n, channels, h, w = image.shape
        device = image.device
        self.batch, self.shape = n, []  # type: tuple[int, list[int]]
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
            step = s / per_sigma
            on_nodes = axis < 2 and step < 1.5  # then a node per pixel: nothing to interpolate
            if on_nodes:
                step = 1.0
            place = place / step
            count = int(place.max()) + (1 if on_nodes else 2)
            self._require_small([*self.shape, count])
            cell = place.floor().clamp_(max=max(count - 2, 0))
            fractions.append(place - cell)
            base = base * count + cell.long()
            narrowed = (s**2 - (0 if on_nodes else step**2 / 3)) ** 0.5
            nodes = torch.arange(count, device=device, dtype=torch.float32) * step
            self.blurs.append((_gram(nodes, narrowed), int(REACH * narrowed / step) + 1))
            self.shape.append(count)
        self.taps = self._taps(base, fractions)
        ones = torch.ones(1, n * h * w, device=device)
        self.scale = self._filter(self.taps, self.taps.splat(ones)).clamp(min=1e-20).rsqrt()

    def _require_small(self, shape: Sequence[int]) -> None:
        if self.batch * float(np.prod(shape)) > LARGEST_GRID:
            raise ValueError(
                f"bilateral grid must have at most {LARGEST_GRID} nodes, got {self.batch} x {list(shape)}; use larger "
                "sigmas, clip the intensities or pass fewer slices"
            )

    def _taps(self, base: Tensor, fractions: list[Tensor]) -> _Taps:
        strides = np.cumprod([1, *self.shape[:0:-1]])[::-1].tolist()
        used = [axis for axis, f in enumerate(fractions) if bool((f != 0).any())]  # the others lie on their nodes
        steps, weights = [], []
        for bits in product((0, 1), repeat=len(used)):
            steps.append(sum(strides[axis] * bit for axis, bit in zip(used, bits, strict=True)))
            share = torch.ones(1, 1, 1, device=base.device)
            for axis, bit in zip(used, bits, strict=True):
                share = share * (fractions[axis] if bit else 1 - fractions[axis])
            weights.append(share.expand(base.shape).flatten())
        return _Taps(base.flatten(), steps, torch.stack(weights), self.batch * int(np.prod(self.shape)))

    def _filter(self, taps: _Taps, nodes: Tensor) -> Tensor:
        """Blur sums at the nodes (C, nodes) and read them at pixels."""
        channels = len(nodes)
        for axis, (matrix, reach) in enumerate(self.blurs):
            outer = channels * self.batch * int(np.prod(self.shape[:axis]))
            if axis == len(self.blurs) - 1:
                nodes = _along_last(nodes.reshape(outer, self.shape[axis]), matrix, reach)
            else:
                nodes = _along(nodes.reshape(outer, self.shape[axis], -1), matrix, reach)
        return taps.slice(nodes.reshape(channels, -1))

    def __call__(self, q: Tensor) -> Tensor:
        """The normalised kernel applied to q (C, P)."""
        return self.scale * self._filter(self.taps, self.taps.splat(self.scale * q))

    def focus(self, q: Tensor, where: Tensor) -> Callable[[Tensor], Tensor]:
        """The kernel as a function of q at the pixels ``where`` (A,) alone, (C, A) to (C, A); elsewhere q stays."""
        taps, scale = self.taps.at(where), self.scale[:, where]
        rest = self.taps.splat(self.scale * q) - taps.splat(scale * q[:, where])
        return lambda moving: scale * self._filter(taps, rest + taps.splat(scale * moving))
