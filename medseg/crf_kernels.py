"""Kernels of the dense CRF: Gaussians of position, and of position and intensity, normalised.

All work on pairs (label, pixel), not on all labels of all pixels: of many labels few are anywhere near a given pixel,
and a label that is nearly everywhere is written as 1 less the others. Each kernel is applied once to all pixels;
``focus`` then makes it a function of the pairs that still move, everything else standing still.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise, product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["Bilateral", "Gaussian", "Pairs", "pairs_of"]

NODES_PER_SIGMA = 3.0, 2.0, 1.5, 1.0  # of the bilateral grid, in space the first, in intensity the first that will do
WIDE = 12.0  # px; the first of them only for a kernel at least so wide: one less wide has many nodes and gentle weights
MOST_COLOURS = 4096  # nodes of several channels; up to three times as many at the last resort
LARGEST_GRID = 1 << 26  # nodes
TILE = 32  # side of the squares (px) in which the Gaussian is worked out
TILES = 512  # as many at a time
BLOCK = 64  # lines of a banded matrix multiplied at a time
REACH = 3.7  # sigmas beyond which a Gaussian counts as 0


# ---------------------------------------------------------------------------------------------------------------------
# Pairs


class Pairs(NamedTuple):
    """Some labels at some pixels: label (E,), flat pixel (E,), and label * P + pixel (E,), all int64."""

    label: Tensor
    pixel: Tensor
    place: Tensor


def pairs_of(mask: Tensor) -> Pairs:
    """The pairs that a mask (K, P) holds, in order."""
    flat = mask.flatten()
    if len(flat) % 8 == 0:  # most of it is empty: look at eight at a time
        eights = flat.view(torch.int64).nonzero()[:, 0]
        inner = flat.view(-1, 8)[eights].nonzero()
        place = eights[inner[:, 0]] * 8 + inner[:, 1]
    else:
        place = flat.nonzero()[:, 0]
    label = torch.div(place, mask.shape[1], rounding_mode="floor")
    return Pairs(label, place - label * mask.shape[1], place)


# ---------------------------------------------------------------------------------------------------------------------
# Position


class Gaussian:
    """The kernel of position alone. It is separable, and so is its normalisation: two small matrices for each tile."""

    def __init__(self, shape: Sequence[int], sigma: tuple[float, float], like: Tensor) -> None:
        n, h, w = self.shape = tuple(shape)
        self.rows, self.lines = self._axis(h, sigma[0], like)  # (ty, TILE, S) and (ty, S)
        columns, self.across = self._axis(w, sigma[1], like)
        self.columns = columns.transpose(1, 2).contiguous()  # (tx, S, TILE)
        sums = [m.sum(2).flatten()[:length] for m, length in ((self.rows, h), (columns, w))]
        self.of_ones = (sums[0][:, None] * sums[1]).flatten().repeat(n)  # (P,), the kernel applied to 1
        self.grid = n, len(self.rows), len(columns)
        self.near = [-(-(m.shape[1] - TILE) // 2 // TILE) for m in (self.lines, self.across)]
        y, x = (torch.arange(a, device=like.device) for a in (h, w))
        tile = (y // TILE)[:, None] * self.grid[2] + x // TILE
        first = torch.arange(n, device=like.device)[:, None] * (self.grid[1] * self.grid[2])
        self.tile_of = (first + tile.flatten()).flatten()  # (P,)
        self.place_in = ((y % TILE)[:, None] * TILE + x % TILE).flatten().repeat(n)

    @staticmethod
    def _axis(length: int, sigma: float, like: Tensor) -> tuple[Tensor, Tensor]:
        """For each tile along an axis: its lines of the normalised kernel, and the lines that they take in."""
        reach, count = min(int(REACH * sigma) + 1, length - 1), -(-length // TILE)
        own = torch.arange(TILE, device=like.device)
        span = torch.arange(-reach, TILE + reach, device=like.device)
        apart = span - own[:, None]
        kernel = torch.where(apart.abs() <= reach, torch.exp(-0.5 * (apart.to(like.dtype) / sigma) ** 2), 0)
        lines = torch.arange(0, count * TILE, TILE, device=like.device)[:, None] + span
        inside = ((lines >= 0) & (lines < length)).to(like.dtype)
        scale = (inside @ kernel.T).flatten()[:length].rsqrt()
        lines.clamp_(0, length - 1)
        scales = torch.nn.functional.pad(scale, (0, count * TILE - length)).view(count, TILE, 1)
        return scales * kernel * (inside * scale[lines])[:, None], lines

    def _touched(self, pairs: Pairs, labels: int, around: bool) -> Tensor:
        """Flat indices (B,) over (labels, n, ty, tx) of the tiles that hold pairs, or are near enough to see them."""
        n, ty, tx = self.grid
        flags = torch.zeros(labels * n * ty * tx, device=self.rows.device)
        flags[pairs.label * (n * ty * tx) + self.tile_of[pairs.pixel]] = 1
        if around:
            kernel = [2 * near + 1 for near in self.near]
            flags = torch.nn.functional.max_pool2d(flags.view(-1, 1, ty, tx), kernel, 1, self.near).flatten()
        return flags.nonzero()[:, 0]

    def _places(self, tiles: Tensor, lines: Tensor, across: Tensor) -> Tensor:
        """Flat indices (B, rows, columns) over (labels, P) of the lines (ty, rows), (tx, columns) of tiles."""
        _, h, w = self.shape
        _, ty, tx = self.grid
        first = tiles // (ty * tx) * (h * w)
        return (first[:, None] + lines[tiles // tx % ty] * w)[:, :, None] + across[tiles % tx][:, None]

    def _filtered(self, patches: Tensor, tiles: Tensor) -> Tensor:
        _, ty, tx = self.grid
        return self.rows[tiles // tx % ty] @ patches @ self.columns[tiles % tx]

    def __call__(self, q: Tensor, pairs: Pairs, base: Tensor) -> Tensor:
        """The normalised kernel applied to q (K, P), which is about base (K,) but at the pairs; (K, P)."""
        found = torch.zeros_like(q).flatten()
        own = torch.arange(TILE, device=q.device)
        lines, across = (
            (torch.arange(count, device=q.device)[:, None] * TILE + own).clamp_(max=length - 1)
            for count, length in zip(self.grid[1:], self.shape[1:], strict=True)
        )
        for tiles in self._touched(pairs, len(q), around=True).split(TILES):
            level = base[tiles // int(np.prod(self.grid))][:, None, None]
            patches = q.take(self._places(tiles, self.lines, self.across)) - level
            places = self._places(tiles, lines, across)  # beyond the image the result is 0
            found = found.scatter_add_(0, places.flatten(), self._filtered(patches, tiles).flatten())
        found = found.view_as(q)
        for label in base.nonzero()[:, 0].tolist():
            found[label] += base[label] * self.of_ones
        return found

    def focus(self, rest: Tensor, pairs: Pairs) -> Callable[[Tensor], Tensor]:
        """The normalised kernel as a function of q at the pairs, (E,) to (E,); all else is in ``rest`` (K, P)."""
        tiles, count = self._touched(pairs, len(rest), around=False), len(pairs.label)
        places = self._places(tiles, self.lines, self.across)
        slot = torch.full((rest.numel(),), count, device=rest.device, dtype=torch.int32)
        slot[pairs.place] = torch.arange(count, device=rest.device, dtype=torch.int32)
        moving = slot.take(places).long()  # which pair is at each place of a patch; count where none is
        size = int(np.prod(self.grid))
        number = torch.zeros(len(rest) * size, device=rest.device, dtype=torch.long)
        number[tiles] = torch.arange(len(tiles), device=rest.device)
        at = number[pairs.label * size + self.tile_of[pairs.pixel]] * TILE**2 + self.place_in[pairs.pixel]
        still = self._filtered(rest.take(places), tiles).take(at)
        nothing = rest.new_zeros(1)
        return lambda q: still + self._filtered(torch.cat([q, nothing]).take(moving), tiles).take(at)


# ---------------------------------------------------------------------------------------------------------------------
# Position and intensity


def _along(x: Tensor, matrix: Tensor, reach: int) -> Tensor:
    """Multiply a symmetric banded (L, L) matrix onto axis 1 of x (B, L, M), a block of lines at a time."""
    length = len(matrix)
    if x.shape[2] <= 4 and length <= 2 * BLOCK:  # few columns: as one product
        return (x.transpose(1, 2).reshape(-1, length) @ matrix).view(len(x), -1, length).transpose(1, 2)
    if length <= 2 * BLOCK or 2 * reach + BLOCK >= length:
        return torch.matmul(matrix, x)
    parts = []
    for start in range(0, length, BLOCK):
        stop = min(start + BLOCK, length)
        low, high = max(0, start - reach), min(length, stop + reach)
        parts.append(torch.matmul(matrix[start:stop, low:high], x[:, low:high]))
    return torch.cat(parts, dim=1)


def _require_small(shape: Sequence[int]) -> None:
    if float(np.prod([float(s) for s in shape])) > LARGEST_GRID:
        raise ValueError(
            f"bilateral grid must have at most {LARGEST_GRID} nodes, got {' x '.join(map(str, shape))}; use larger "
            "sigmas, clip the intensities or pass fewer slices"
        )


class _Colours:
    """Nodes in the space of the channels: corners of the simplices (Kuhn's) of a cubic grid that hold a pixel.

    Each pixel lies linearly between C + 1 of them. Of one channel all nodes are kept, an even line; of more only those
    in use, and the grid is made wider until they are few enough.
    """

    def __init__(self, image: Tensor, sigma: float, nodes_per_sigma: Sequence[float]) -> None:
        channels = image.shape[1]
        place = image.transpose(0, 1).flatten(1)  # (C, P)
        place = (place - place.amin(1, keepdim=True)) / sigma
        for per_sigma in nodes_per_sigma if channels > 1 else nodes_per_sigma[:1]:
            used, counts = self._nodes(place * per_sigma)
            if len(used) <= MOST_COLOURS:
                break
        self.count = len(used)
        if channels > 1 and self.count > 3 * MOST_COLOURS:
            raise ValueError(
                f"intensities of {channels} channels must have at most {3 * MOST_COLOURS} nodes, got {self.count}; use a "
                "larger sigma, denoise the image or leave channels out"
            )
        # Interpolating twice adds 1/3 to the variance of a channel, in steps, and 1/6 to the covariance of two.
        one = torch.eye(channels, device=image.device, dtype=torch.float64)
        covariance = per_sigma**2 * one - (one + 1) / 6
        strides = np.cumprod([1, *counts[:0:-1]])[::-1].tolist()
        where = torch.stack([used // s % c for s, c in zip(strides, counts, strict=True)], 1)
        where = (where.double() @ torch.linalg.cholesky(torch.linalg.inv(covariance))).to(image.dtype)
        apart = torch.cdist(where, where, compute_mode="donot_use_mm_for_euclid_dist")
        self.kernel = torch.exp(-0.5 * apart**2)
        self.reach = int(REACH * per_sigma) + 1 if channels == 1 else self.count

    def _nodes(self, place: Tensor) -> tuple[Tensor, list[int]]:
        """Sets the C + 1 nodes of pixels (C, P) and their shares; returns all nodes, as places in a grid of a shape."""
        counts = [int(top) + 2 for top in place.amax(1).tolist()]
        _require_small(counts)
        strides = np.cumprod([1, *counts[:0:-1]])[::-1].tolist()
        cell = place.floor()
        fraction = place - cell
        if len(place) == 1:
            corner = cell[0].long()
            self.node, self.share = torch.stack([corner, corner + 1]), torch.cat([1 - fraction, fraction])
            return torch.arange(counts[0], device=place.device), counts
        fraction, order = fraction.sort(0, descending=True)
        corners = [(cell.long() * torch.tensor(strides, device=place.device)[:, None]).sum(0)]
        for axis in order:
            corners.append(corners[-1] + torch.tensor(strides, device=place.device)[axis])
        edges = [torch.ones_like(fraction[0]), *fraction, torch.zeros_like(fraction[0])]
        self.share = torch.stack([a - b for a, b in pairwise(edges)])  # (C + 1, P)
        used = torch.zeros(int(np.prod(counts)), device=place.device, dtype=torch.long)
        used[torch.stack(corners)] = 1
        self.node = (used.cumsum(0) - 1)[torch.stack(corners)]
        return used.nonzero()[:, 0], counts


class Bilateral:
    """The kernel of position and intensity, on a grid of nodes over (N, H, W, intensities): splat, blur, slice."""

    def __init__(self, image: Tensor, sigma: tuple[float, float], sigma_intensity: float) -> None:
        n, _, h, w = image.shape
        nodes_per_sigma = NODES_PER_SIGMA[0 if min(sigma) >= WIDE else 1 :]
        colours = _Colours(image, sigma_intensity, nodes_per_sigma)
        self.shape, self.blurs = [n], []  # type: tuple[list[int], list[tuple[Tensor, int]]]
        sides = [self._axis(a, s, s / nodes_per_sigma[0], image) for a, s in zip((h, w), sigma, strict=True)]
        self.shape.append(colours.count)
        self.blurs.append((colours.kernel, colours.reach))
        _require_small(self.shape)
        self.nodes = int(np.prod(self.shape))
        # Each pixel has T nodes around it, some in space times some in intensity: their numbers and shares, (P, T).
        around = [
            ((y[:, None] * self.shape[2] + x) * colours.count, y_share[:, None] * x_share)
            for (y, y_share), (x, x_share) in product(*sides)
        ]
        space, share = (torch.stack(a).view(1, -1, 1, h * w) for a in zip(*around, strict=True))
        first = torch.arange(n, device=image.device)[:, None] * (self.nodes // n)
        node = colours.node.view(-1, 1, n, h * w) + first
        self.index = (node + space).view(-1, n * h * w).T.contiguous()
        self.weight = (colours.share.view(-1, 1, n, h * w) * share).view(-1, n * h * w).T.contiguous()
        ones = self.blurred(self._sums(self.index, self.weight, 1))
        self.scale = self.slice(ones, slice(None))[0].clamp(min=1e-20).rsqrt()  # (P,)
        self.of_ones = self._sums(self.index, self.weight * self.scale[:, None], 1)  # (nodes, 1), the splat of 1

    def _axis(self, length: int, sigma: float, step: float, image: Tensor) -> list[tuple[Tensor, Tensor]]:
        """The two nodes (or one) around each line along an axis, and their shares, (length,) each."""
        lines = torch.arange(length, device=image.device)
        if step < 1.5:  # then a node per pixel: nothing to interpolate
            step, count, narrowed = 1.0, length, sigma
            near = [(lines, torch.ones_like(lines, dtype=image.dtype))]
        else:
            place = lines.to(image.dtype) / step
            cell = place.floor()
            count, narrowed = int(cell[-1]) + 2, (sigma**2 - step**2 / 3) ** 0.5
            near = [(cell.long(), 1 - (place - cell)), (cell.long() + 1, place - cell)]
        apart = torch.arange(count, device=image.device, dtype=image.dtype) * (step / narrowed)
        kernel = torch.exp(-0.5 * (apart[:, None] - apart).square())
        self.blurs.append((kernel, int(REACH * narrowed / step) + 1))
        self.shape.append(count)
        return near

    def _sums(self, index: Tensor, values: Tensor, labels: int) -> Tensor:
        """Values added up at their places in a table (nodes, labels)."""
        sums = values.new_zeros(self.nodes * labels)
        return sums.scatter_add_(0, index.reshape(-1), values.reshape(-1)).view(-1, labels)

    def splat(self, values: Tensor, pairs: Pairs, base: Tensor) -> Tensor:
        """The table (nodes, K) of values (E,) at pairs and base (K,) everywhere."""
        weight = self.weight[pairs.pixel] * (values * self.scale[pairs.pixel])[:, None]
        index = self.index[pairs.pixel] * len(base) + pairs.label[:, None]
        return self._sums(index, weight, len(base)) + self.of_ones * base

    def blurred(self, table: Tensor) -> Tensor:
        """The kernel between nodes, applied to a table (nodes, K)."""
        labels = table.shape[1]
        for axis, (matrix, reach) in enumerate(self.blurs, 1):
            outer = int(np.prod(self.shape[:axis]))
            table = _along(table.reshape(outer, self.shape[axis], -1), matrix, reach)
        return table.reshape(-1).view(-1, labels)  # with the strides that embedding_bag is fast for

    def slice(self, table: Tensor, part: slice) -> Tensor:
        """A table (nodes, K) interpolated at a run of pixels, (K, pixels)."""
        index, weight = self.index[part], self.weight[part]
        return torch.nn.functional.embedding_bag(index, table, per_sample_weights=weight, mode="sum").T

    def focus(self, rest: Tensor, pairs: Pairs, heard: Pairs | None = None) -> Callable[[Tensor], Tensor]:
        """The normalised kernel as a function of q at the pairs (E,), all else being in the table ``rest``.

        The message is that at the pairs, or at others where it is heard.
        """
        labels = rest.shape[1]

        def around(of: Pairs) -> tuple[Tensor, Tensor]:  # (E, T) each
            weight = self.weight[of.pixel] * self.scale[of.pixel][:, None]
            return self.index[of.pixel] * labels + of.label[:, None], weight

        index, weight = around(pairs)
        to, share = (index, weight) if heard is None else around(heard)

        def message(q: Tensor) -> Tensor:
            table = self.blurred(rest + self._sums(index, weight * q[:, None], labels))
            return (table.take(to) * share).sum(1)

        return message
