"""The mean field of the dense CRF: steps at all pixels, then at those alone that still move."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from medseg.crf_kernels import Bilateral, Gaussian, Pairs, pairs_of
from medseg.crf_parts import Parts

__all__ = ["MeanField", "moving"]

SILENT = 0.05  # log-odds; labels whose message could not be more are left out
CERTAIN = 0.99  # after the first step only pixels below this probability, and those within 3 px, move ...
SHIFTS = 1, 2  # px, whose sum is that 3
POSSIBLE = 1e-4  # ... and there only labels above this one
CHUNK = 1 << 14  # pixels at a time, so that a CPU's cache holds them


class _Softmax:
    """Softmax over the pairs of each pixel, which share the probability that they have in q (K, P)."""

    def __init__(self, pairs: Pairs, q: Tensor) -> None:
        self.pixel, self.zeros = pairs.pixel, q.new_zeros(q.shape[1])
        self.share = self.zeros.index_add(0, self.pixel, q.take(pairs.place))

    def __call__(self, x: Tensor) -> Tensor:
        top = self.zeros.scatter_reduce(0, self.pixel, x.detach(), "amax", include_self=False)
        e = (x - top[self.pixel]).exp()
        total = self.zeros.index_add(0, self.pixel, e).clamp(min=1e-30)
        return e * (self.share / total)[self.pixel]


class MeanField:
    """Steps of the mean field of K labels at P pixels, with the kernels and their weights, () or (K, K).

    Of two labels the second alone is carried, K = 1: the messages of both add up to the kernels applied to 1, and its
    logits are the difference.
    """

    def __init__(
        self,
        logits: Tensor,
        gaussian: tuple[Gaussian, Tensor] | None,
        bilateral: tuple[Bilateral | Parts, Tensor] | None,
    ) -> None:
        self.logits, self.gaussian, self.bilateral = logits, gaussian, bilateral
        self.both = logits.new_zeros(logits.shape[1])  # the sum of the messages of two labels, (P,)

    def step(self, q: Tensor) -> Tensor:
        """One step at all pixels, (K, P) to (K, P)."""
        binary, near, table = len(q) == 1, q.new_zeros(1, 1), None
        grid = None

        def weighted(found: Tensor, of_ones: Tensor, weight: Tensor) -> Tensor:
            found = torch.cat([found, of_ones[None]]) if binary else found
            return found * weight if weight.ndim == 0 else weight @ found

        if self.gaussian:
            blur, weight = self.gaussian
            near = weighted(blur(q, *_deviating(q, weight)), blur.of_ones, weight)
        if self.bilateral:
            kernel, weight = self.bilateral
            if isinstance(kernel, Parts):
                near = near + weighted(kernel(q), kernel.of_ones, weight)
            else:
                grid, table = kernel, self._table(kernel, weight, q)
                table = kernel.blurred(torch.cat([table, kernel.of_ones], 1) if binary else table)
                table = table * weight if weight.ndim == 0 else table @ weight
        parts, both = [], []
        run = CHUNK if q.device.type == "cpu" else q.shape[1]
        for start in range(0, q.shape[1], run):
            part = slice(start, start + run)
            message = near[:, part] if near.shape[1] > 1 else near
            if grid is not None and table is not None:
                message = message + grid.slice(table, part) * grid.scale[part]
            if binary and len(message) == 2:
                parts.append((self.logits[:, part] + 2 * message[:1] - message[1:]).sigmoid())
                both.append(message[1])
            else:
                x = self.logits[:, part] + message
                parts.append(x.sigmoid() if binary else x.softmax(0))
        self.both = torch.cat(both) if both else self.both
        return torch.cat(parts, 1)

    def settle(self, q: Tensor, moves: Tensor, steps: int) -> Tensor:
        """Some steps at those pairs alone that a mask (K, P) says move."""
        pairs = pairs_of(moves)
        now, rest = q.take(pairs.place), q.flatten().index_fill(0, pairs.place, 0).view_as(q)
        kernels: list[tuple[Tensor, Callable[[Tensor], Tensor]]] = []
        if self.gaussian:
            kernels.append((self.gaussian[1], self.gaussian[0].focus(rest, pairs)))
        if self.bilateral:
            kernel, weight = self.bilateral
            known = rest if isinstance(kernel, Parts) else self._table(kernel, weight, rest)
            kernels.append((weight, kernel.focus(known, pairs)))
        softmax, logits, both = _Softmax(pairs, q), self.logits.take(pairs.place), self.both[pairs.pixel]
        for _ in range(steps):
            message = sum((weight * kernel(now) for weight, kernel in kernels), torch.zeros_like(now))
            now = (logits + 2 * message - both).sigmoid() if len(q) == 1 else softmax(logits + message)
        return rest.flatten().index_copy(0, pairs.place, now).view_as(q)

    @staticmethod
    def _table(kernel: Bilateral, weight: Tensor, q: Tensor) -> Tensor:
        """The splat of q (K, P)."""
        pairs, base = _deviating(q, weight)
        return kernel.splat(q.take(pairs.place) - base[pairs.label], pairs, base)


def _deviating(q: Tensor, weight: Tensor) -> tuple[Pairs, Tensor]:
    """Pairs where q (K, P) is not just base (K,): 1 for a label that most pixels have, else 0.

    One that differs by less could not change a message, which is an average of q times the weight, by SILENT.
    """
    q, weight = q.detach(), weight.detach()
    least = SILENT / max(1e-9, float(weight if weight.ndim == 0 else weight.abs().sum(1).max()))
    base = (q.mean(1) > 0.5).to(q.dtype)
    mask = q > least
    for label in base.nonzero()[:, 0].tolist():
        mask[label] = q[label] < 1 - least
    return pairs_of(mask), base


def moving(q: Tensor, pixels: tuple[int, int, int]) -> Tensor:
    """Mask (K, P) of what still moves: labels that are not out of the question, near pixels that are not certain."""
    q = q.detach()
    binary = len(q) == 1
    near = ((q - 0.5).abs()[0] < CERTAIN - 0.5 if binary else q.amax(0) < CERTAIN).view(pixels)
    for shift in SHIFTS:
        for axis in (1, 2):
            wider, length = near.clone(), near.shape[axis] - shift
            if length > 0:
                wider.narrow(axis, shift, length).logical_or_(near.narrow(axis, 0, length))
                wider.narrow(axis, 0, length).logical_or_(near.narrow(axis, shift, length))
            near = wider
    return near.view(1, -1) if binary else (q > POSSIBLE) & near.flatten()
