"""From a few drawn slices to a volume: the mask of one slice gives the boxes of the next, until the structure ends.

Following a mask by the box around it fails in three ways: the mask shrinks with its own box, it leaks into a neighbour and
never comes back, and it goes on beyond the end. Against the first, boxes with several margins are tried on each slice, and
the mask that the model itself rates best is taken. Against the second and third, the intensities of the slices that were
drawn, inside and just outside, tell the structure's tissue: pixels unlike nearly all of the drawn mask are taken away, and
where a whole mask looks more like what was outside, the structure has ended. A structure that does not differ from its
surroundings by intensity is followed without that.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.boxes import box_of
from medseg.slice_model import SliceModel

__all__ = ["Propagation", "best_start", "propagate", "rectangle_of"]

Array = NDArray[Any]
Progress = Callable[[int, int], None]
BINS = 32
RING_PX = 8  # width of what surrounds a drawn mask
FLOOR = 0.002  # share of pixels of a bin that is expected without having been seen
MOST = 2.0  # largest log ratio that one pixel may add
CLEAR = 0.2  # mean log ratio of a drawn mask below which its intensities tell nothing


@dataclass(frozen=True)
class Propagation:
    """How a structure is followed from slice to slice.

    Parameters
    ----------
    margins : tuple of float
        How much larger than the last mask the boxes are that are tried; each costs one decoding a slice.
    margin_units : "mm" or "px"
        Of the margins; px are pixels of the slice.
    least_tissue : float
        Share of a drawn mask's pixels that belongs to its tissue; the others may be taken away from the masks that
        follow. 0 takes nothing away.
    end_score : float
        Where the mean log ratio of a mask, as a share of the drawn mask's, falls below it, the structure has ended.
    end_iou : float
        The structure has ended where the predicted IoU is below.
    end_area : float
        The structure has ended where the area is below this share of the largest so far.

    Raises
    ------
    ValueError
        If there is no margin, or one is negative.
    """

    margins: tuple[float, ...] = (3.0, 9.0, 18.0)
    margin_units: Literal["mm", "px"] = "mm"
    least_tissue: float = 0.99
    end_score: float = -0.5
    end_iou: float = 0.6
    end_area: float = 0.02

    def __post_init__(self) -> None:
        if not self.margins or not all(0 <= m < np.inf for m in self.margins):
            raise ValueError(f"margins must be one number or more, none negative, got {self.margins}")

    def margins_px(self, pixel_mm: tuple[float, float]) -> Array:
        """(N, 2) margins along x and y in pixels."""
        sides = (1.0, 1.0) if self.margin_units == "px" else pixel_mm[::-1]
        return np.asarray(self.margins)[:, None] / np.asarray(sides)


class Tissue:
    """Which intensities are a structure's rather than its surroundings', from the slices where it was drawn.

    Parameters
    ----------
    model : SliceModel
        The slices.
    seeds : mapping
        Slice -> drawn mask (H, W), none of them empty.
    least : float
        Share of the pixels drawn that is tissue.
    """

    def __init__(self, model: SliceModel, seeds: Mapping[int, Array], least: float) -> None:
        self.model = model
        inside, outside = np.zeros(BINS), np.zeros(BINS)
        for number, mask in seeds.items():
            levels = self._levels(number)
            ring = ndimage.binary_dilation(mask, iterations=RING_PX) & ~ndimage.binary_dilation(mask)
            inside += np.bincount(levels[mask], minlength=BINS)
            outside += np.bincount(levels[ring], minlength=BINS)
        a, b = (ndimage.gaussian_filter1d(h / max(1, h.sum()), 1.0) + FLOOR for h in (inside, outside))
        self.ratio = np.clip(np.log(a / b), -MOST, MOST)
        self.usual = float((inside * self.ratio).sum() / max(1, inside.sum()))
        self.tells = self.usual > CLEAR
        drawn = [self.evidence(number)[mask] for number, mask in seeds.items()] if least > 0 else []
        self.least = float(np.quantile(np.concatenate(drawn), 1 - least)) if drawn else -np.inf

    def _levels(self, number: int) -> Array:
        window, planes = self.model.window, self.model.planes
        plane = np.asarray(planes.take(self.model.image.array, number), np.float32)
        grey = ndimage.uniform_filter(plane.mean(0) if len(plane) == 3 else plane[0], 3)
        return np.asarray((np.clip((grey - window.low) / (window.high - window.low), 0, 0.999) * BINS).astype(int))

    def evidence(self, number: int) -> Array:
        """(H, W) log ratio of the likelihoods of inside and outside on a slice, slightly smoothed."""
        return np.asarray(ndimage.gaussian_filter(self.ratio[self._levels(number)], 1.0))

    def cleaned(self, mask: Array, evidence: Array) -> Array:
        """The mask without regions unlike the tissue; single pixels and rims of them, which blur with the outside, stay."""
        if not self.tells or not np.isfinite(self.least):
            return mask
        unlike = ndimage.binary_opening(mask & (evidence < self.least), np.ones((3, 3)))
        return np.asarray(mask & ~unlike)

    def score(self, mask: Array, evidence: Array) -> float:
        """Mean evidence over a mask as a share of that where it was drawn; 1 where intensities tell nothing."""
        return float(evidence[mask].mean()) / self.usual if self.tells and mask.any() else 1.0


@dataclass(frozen=True)
class _Walk:
    """What stays the same from slice to slice."""

    model: SliceModel
    settings: Propagation
    tissue: Tissue
    within: Array | None

    @cached_property
    def margins(self) -> Array:
        return self.settings.margins_px(self.model.planes.pixel_mm)

    def next(self, number: int, previous: Array) -> tuple[Array, float, float]:
        """Mask on a slice beside one whose mask is known, its predicted IoU, and its score."""
        box = box_of(previous)
        boxes = np.unique([self._grown(box, m) for m in self.margins], axis=0)[::-1]  # the smallest wins a tie
        logits, ious = self.model.logits(number, boxes)
        evidence = self.tissue.evidence(number)
        best, value = (np.zeros_like(previous), 0.0, 1.0), -np.inf
        for layer, iou in zip(logits, ious.tolist(), strict=True):
            mask = _touching(self.tissue.cleaned(_touching(layer > 0, previous), evidence), previous)
            if mask.any() and iou > value:
                best, value = (mask, iou, self.tissue.score(mask, evidence)), iou
        return best

    def _grown(self, box: Array, margin: Array) -> Array:
        height, width = self.model.planes.size
        low, high = np.zeros(2), np.array([width - 1.0, height - 1.0])
        if self.within is not None:
            low, high = self.within[:2], self.within[2:]
        return np.concatenate([np.maximum(box[:2] - margin, low), np.minimum(box[2:] + margin, high)])


def propagate(
    model: SliceModel,
    seeds: Mapping[int, Array],
    *,
    limits: tuple[int, int],
    still: Collection[int] = (),
    within: Array | None = None,
    settings: Propagation | None = None,
    progress: Progress | None = None,
) -> dict[int, Array]:
    """Follow a structure both ways from each slice where it was drawn.

    Parameters
    ----------
    model : SliceModel
        The slices.
    seeds : mapping of int to (H, W) bool array
        Slice -> what was drawn there; an empty mask says that the structure is not there. Between two of them each is
        followed to the middle.
    limits : (first, last)
        Slices that are looked at; both count.
    still : collection of int
        Slices from which the structure is not followed.
    within : (4,) array, optional
        x0, y0, x1, y1: boxes stay in it. The structure then reaches from the first to the last slice and has no other
        end; else it ends by the rules of the settings.
    settings : Propagation, optional
        How it is followed.
    progress : callable, optional
        Called with the number of slices that were looked at and of those that there are.

    Returns
    -------
    dict of int to (H, W) bool array
        Masks of the slices on which the structure was found, seeds included.

    Notes
    -----
    Time grows with the slices that the structure reaches: one embedding (once) and a decoding for each margin. Memory is
    that of one slice, and a mask for each.
    """
    settings = settings or Propagation()
    found = {n: np.asarray(mask, bool) for n, mask in seeds.items()}
    drawn = {n: mask for n, mask in found.items() if mask.any()}
    if not drawn:
        return found
    walk = _Walk(model, settings, Tissue(model, drawn, settings.least_tissue), within)
    looked, ends_by_rule = 0, within is None
    for start in sorted(set(drawn) - set(still)):
        for step in (1, -1):
            mask, largest = found[start], int(found[start].sum())
            other, end = _end(start, step, seeds, limits)
            bounded = other is not None and bool(found[other].any())
            for number in range(start + step, end, step):
                after, iou, score = walk.next(number, mask)
                looked += 1
                if progress is not None:
                    progress(looked, limits[1] - limits[0] + 1)
                small = after.sum() < settings.end_area * largest
                over = small or score < settings.end_score or iou < settings.end_iou
                if not after.any() or (over and ends_by_rule and not bounded):
                    break
                mask, largest, found[number] = after, max(largest, int(after.sum())), after
    return found


def _end(start: int, step: int, seeds: Mapping[int, Array], limits: tuple[int, int]) -> tuple[int | None, int]:
    """The next drawn slice, and the slice before which a walk ends: the middle to it, itself if empty, or the limit."""
    others = [n for n in seeds if (n - start) * step > 0]
    if not others:
        return None, limits[1] + 1 if step > 0 else limits[0] - 1
    other = min(others, key=lambda n: abs(n - start))
    if not seeds[other].any():
        return other, other
    distance = abs(other - start)
    reach = distance // 2 if step > 0 else (distance - 1) // 2  # the slice in the middle is the lower one's
    return other, start + step * (reach + 1) if distance > 1 else other


def _touching(mask: Array, previous: Array) -> Array:
    """The components of a mask that touch the one before."""
    parts, count = ndimage.label(mask, np.ones((3, 3)))
    keep = np.zeros(count + 1, bool)
    keep[np.unique(parts[previous])] = True
    keep[0] = False
    return np.asarray(keep[parts])


def rectangle_of(mask: Array | None) -> Array | None:
    """x0, y0, x1, y1 of a mask (H, W): centres of its outermost pixels; None where it is empty or there is none."""
    return None if mask is None or not mask.any() else box_of(mask)


def best_start(model: SliceModel, first: int, last: int, within: Array) -> tuple[int, Array]:
    """Of five slices of a box in space the one whose mask fills the rectangle best, and that mask."""
    numbers = dict.fromkeys(round(first + share * (last - first)) for share in (0.5, 0.375, 0.625, 0.25, 0.75))
    best, value = (next(iter(numbers)), np.zeros(model.planes.size, bool)), -np.inf
    for number in numbers:
        logits, iou = model.logits(number, within[None])
        mask = logits[0] > 0
        box = rectangle_of(mask)
        if box is None:
            continue
        fill = np.prod(np.minimum(box[2:], within[2:]) - np.maximum(box[:2], within[:2]) + 1)
        if fill * float(iou[0]) > value:
            best, value = (number, mask), fill * float(iou[0])
    return best
