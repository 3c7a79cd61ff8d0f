"""The bilateral kernel where labels keep to parts of the image and the kernel is narrow: only those parts are worked on.

A label's message is 0 where the label is farther away than the kernel reaches. So each label has boxes around its pixels,
with a margin, and each box is an image of its own, whose intensities span less than those of the whole.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from scipy import ndimage
from torch import Tensor

from medseg.crf_kernels import Bilateral, Pairs

__all__ = ["Parts"]

MARGIN = 3.0  # sigmas in space around the pixels of a label
CELL = 8  # px; boxes begin and end at multiples of it, less and plus the margin
SPECK = 4.0  # times the least difference: pixels below it count only where the mean of a cell is above the least
WORTH = 0.7  # parts that are more than this share of all labels of all pixels save nothing


class Box(NamedTuple):
    """Lines top to bottom and columns left to right (exclusive) of an image."""

    top: int
    bottom: int
    left: int
    right: int

    def of(self, x: Tensor) -> Tensor:
        """The box of images (..., H, W)."""
        return x[..., self.top : self.bottom, self.left : self.right]

    def meets(self, other: Box) -> bool:
        across = self.left < other.right and other.left < self.right
        return across and self.top < other.bottom and other.top < self.bottom

    @property
    def size(self) -> int:
        return (self.bottom - self.top) * (self.right - self.left)


def boxes(mask: Tensor, margin: tuple[int, int]) -> list[Box]:
    """Disjoint boxes that hold all pixels of a mask (H, W) with a margin along each axis, cut off at the image's end."""
    h, w = mask.shape
    coarse = torch.nn.functional.max_pool2d(mask[None, None].float(), CELL, ceil_mode=True)[0, 0].bool().cpu().numpy()
    found: list[Box] = []
    for rows, columns in ndimage.find_objects(ndimage.label(coarse, np.ones((3, 3)))[0]):
        box = Box(
            max(0, rows.start * CELL - margin[0]),
            min(h, rows.stop * CELL + margin[0]),
            max(0, columns.start * CELL - margin[1]),
            min(w, columns.stop * CELL + margin[1]),
        )
        while near := [other for other in found if other.meets(box)]:
            found = [other for other in found if other not in near]
            tops, bottoms, lefts, rights = zip(box, *near, strict=True)
            box = Box(min(tops), max(bottoms), min(lefts), max(rights))
        found.append(box)
    return found


def _speaks(q: Tensor, least: float) -> Tensor:
    """Mask (H, W) of where a label (N, H, W) is at least ``least``, but for lone pixels little above it."""
    mean = torch.nn.functional.avg_pool2d(q[:, None], CELL, 1, CELL // 2, count_include_pad=False)[:, 0]
    return ((q > SPECK * least) | ((q > least) & (mean[:, : q.shape[1], : q.shape[2]] > least))).any(0)


class Parts:
    """The normalised bilateral kernel of labels q (K, P), each of them 0, or 1, but in some boxes.

    Of three labels or more, one is 1 less the others and has no boxes of its own. The kernel applied to 1 is about 1
    where no label is near, and counts as 1 there.
    """

    def __init__(
        self,
        image: Tensor,
        sigma: tuple[float, float],
        sigma_intensity: float,
        base: Tensor,
        own: list[tuple[int, Box]],
        shared: list[Box],
    ) -> None:
        self.shape, self.base = (len(image), *image.shape[2:]), base

        def kernel(box: Box) -> Bilateral:
            return Bilateral(box.of(image), sigma, sigma_intensity)

        made = {box: kernel(box) for box in shared}
        ones = image.new_ones(self.shape)
        for box, whole in made.items():
            message = whole.slice(whole.blurred(whole.of_ones), slice(None))[0] * whole.scale
            box.of(ones).copy_(message.view(box.of(ones).shape))
        self.of_ones = ones.flatten()  # (P,)
        self.parts = [(label, box, made[box] if box in made else kernel(box)) for label, box in own]
        self.rest = int(base.argmax()) if len(base) > 1 else None  # the label that is 1 less the others

    @classmethod
    def worth(
        cls, image: Tensor, sigma: tuple[float, float], sigma_intensity: float, q: Tensor, least: float
    ) -> Parts | None:
        """The kernel by parts, if most pixels have one label and the parts are small; what differs less than least is 0."""
        n, _, h, w = image.shape
        margin = int(MARGIN * sigma[0]) + 1, int(MARGIN * sigma[1]) + 1
        if 2 * min(margin[0] / h, margin[1] / w) > WORTH:
            return None
        q = q.detach().view(len(q), n, h, w)
        base = (q.mean((1, 2, 3)) > 0.5).to(q.dtype)
        if len(q) == 1:
            own = [(0, box) for box in boxes(_speaks((q[0] - base).abs(), least), margin)]
            shared = [box for _, box in own]
        elif base.any():
            rest = int(base.argmax())
            shared = boxes(_speaks(1 - q[rest], least), margin)
            others = [label for label in range(len(q)) if label != rest]
            left_out = 1 - q[rest] - sum(q[label] * (q[label] > least) for label in others)
            own = []
            for label in others:  # what is left out at a pixel adds up to less than least
                part = _speaks(q[label] * ((q[label] > least) | (left_out > least)), least)
                own += [(label, box) for box in boxes(part, margin)]
        else:
            return None
        if sum(box.size for _, box in own) > WORTH * len(q) * h * w:
            return None
        return cls(image, sigma, sigma_intensity, base, own, shared)

    def __call__(self, q: Tensor) -> Tensor:
        """The kernel applied to q (K, P), (K, P)."""
        found = torch.zeros_like(q).view(-1, *self.shape)
        for label, box, kernel in self.parts:
            message = kernel.slice(kernel.blurred(self._table(q, label, box, kernel)), slice(None))[0] * kernel.scale
            here = box.of(found[label])
            here += message.view(here.shape)
        found = found.flatten(1)
        if self.rest is not None:
            found[self.rest] = -found.sum(0)
        return found + self.base[:, None] * self.of_ones

    def focus(self, rest: Tensor, pairs: Pairs) -> Callable[[Tensor], Tensor]:
        """The kernel as a function of q at the pairs, (E,) to (E,); all else is in ``rest`` (K, P)."""
        _, h, w = self.shape
        line, column = torch.div(pairs.pixel, w, rounding_mode="floor"), pairs.pixel % w
        image, line = torch.div(line, h, rounding_mode="floor"), line % h
        still = self.base[pairs.label] * self.of_ones[pairs.pixel]
        rows = []
        for label, box, kernel in self.parts:
            high, wide = box.bottom - box.top, box.right - box.left
            y, x = line - box.top, column - box.left
            inside = (y >= 0) & (y < high) & (x >= 0) & (x < wide)
            own = (inside & (pairs.label == label)).nonzero()[:, 0]
            told = (inside & (pairs.label == self.rest)).nonzero()[:, 0] if self.rest is not None else own[:0]
            pixel = (image * high + y) * wide + x
            heard = torch.cat([own, told])
            sign = torch.ones_like(still[heard])
            sign[len(own) :] = -1
            of = [Pairs(torch.zeros_like(a), pixel[a], pixel[a]) for a in (own, heard)]
            rows.append((own, heard, sign, kernel.focus(self._table(rest, label, box, kernel), *of)))

        def message(q: Tensor) -> Tensor:
            total = still
            for own, heard, sign, part in rows:
                total = total.index_add(0, heard, sign * part(q[own]))
            return total

        return message

    def _table(self, q: Tensor, label: int, box: Box, kernel: Bilateral) -> Tensor:
        """The splat of one label of q (K, P), less its base, in a box."""
        values = box.of(q[label].view(self.shape)).flatten() - self.base[label]
        every = torch.arange(len(values), device=q.device)
        return kernel.splat(values, Pairs(torch.zeros_like(every), every, every), values.new_zeros(1))
