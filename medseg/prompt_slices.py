"""One object from its prompts: what the model draws on the slices that were prompted, and how it goes on from there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.draw import line

from medseg.prompt_log import Prompt
from medseg.propagation import Propagation, best_start, propagate, rectangle_of
from medseg.scribbles import corrected
from medseg.slice_model import SliceModel

__all__ = ["contour_object"]

Array = NDArray[Any]
Progress = Callable[[int, int], None]
SURE = 0.7  # predicted IoU below which a structure may be too small for the model


@dataclass
class _OnSlice:
    """What was prompted on one slice, in pixels."""

    rectangle: Array | None = None
    points: list[tuple[float, float, bool]] = field(default_factory=list)
    inside: Array | None = None
    outside: Array | None = None
    spread: bool = True

    @property
    def is_correction(self) -> bool:
        """Whether it changes what is there from elsewhere."""
        return self.rectangle is None


def contour_object(
    model: SliceModel,
    prompts: Sequence[Prompt],
    masks: Mapping[int, Array],
    settings: Propagation,
    progress: Progress | None = None,
) -> Array:
    """The mask of an object.

    Parameters
    ----------
    model : SliceModel
        On the slices of the object.
    prompts : sequence of Prompt
        Of the object, in the order in which they were given.
    masks : mapping
        Number of a prompt -> its bool mask (I, J, K).
    settings : Propagation
        How it goes on from slice to slice.
    progress : callable, optional
        Called with slices done and slices there may be.

    Returns
    -------
    (I, J, K) bool array
    """
    planes = model.planes
    on, volume = _sorted_by_slice(model, prompts, masks)
    model = _near_enough(model, on)
    first, last, within = 0, planes.count - 1, None
    seeds = {n: _drawn(model, n, p, p.rectangle) for n, p in on.items() if not p.is_correction}
    if volume is not None:
        ends = np.sort(np.round(volume.reshape(2, 3)[:, planes.axis]).astype(int))
        first, last, within = int(ends[0]), int(ends[1]), planes.rectangle(volume)
        seeds = {n: mask for n, mask in seeds.items() if first <= n <= last}
        if not seeds:
            start, mask = best_start(model, first, last, within)
            seeds[start] = mask
    rest = {n: p for n, p in on.items() if n not in seeds and p.is_correction}
    still = {n for n, p in on.items() if not p.spread}

    def spread() -> dict[int, Array]:
        return propagate(
            model, seeds, still=still, limits=(first, last), within=within, settings=settings, progress=progress
        )

    if rest:
        before = spread() if seeds else {}
        for n, prompt in rest.items():
            there = rectangle_of(before.get(n))
            if there is None and prompt.inside is not None:
                there = rectangle_of(prompt.inside)
            seeds[n] = _drawn(model, n, prompt, there)
    out = np.zeros(planes.geometry.shape, bool)
    for n, mask in spread().items():
        planes.put(out, n, mask)
    return out


def _near_enough(model: SliceModel, on: Mapping[int, _OnSlice]) -> SliceModel:
    """The slices as they are, or zoomed, where the model doubts what is in the first box and is surer when it is near."""
    number, rectangle = next(((n, p.rectangle) for n, p in on.items() if p.rectangle is not None), (0, None))
    if rectangle is None:
        return model
    rated = float(model.logits(number, rectangle[None])[1][0])
    if rated >= SURE:
        return model
    near = model.zoomed(rectangle)
    return near if float(near.logits(number, rectangle[None])[1][0]) > rated else model


def _sorted_by_slice(
    model: SliceModel, prompts: Sequence[Prompt], masks: Mapping[int, Array]
) -> tuple[dict[int, _OnSlice], Array | None]:
    """Prompts by slice, and the last box that has an extent along all axes."""
    planes, volume = model.planes, None
    on: dict[int, _OnSlice] = defaultdict(_OnSlice)
    for number, prompt in enumerate(prompts):
        if prompt.kind == "mask":
            mask = masks[number]
            for n in np.flatnonzero(mask.any(axis=tuple(a for a in range(3) if a != planes.axis))).tolist():
                on[n].rectangle, on[n].spread = rectangle_of(planes.take(mask, n)), prompt.spread
            continue
        places = np.asarray(prompt.places)
        if prompt.kind == "box" and places[0, planes.axis] != places[1, planes.axis]:
            volume = places.ravel()
            continue
        here = on[int(np.clip(np.round(places[0, planes.axis]), 0, planes.count - 1))]
        if prompt.kind == "box" or here.is_correction:
            here.spread = prompt.spread
        if prompt.kind == "box":
            here.rectangle = planes.rectangle(places.ravel())
        elif prompt.kind == "point":
            x, y = planes.pixel(places[0]).tolist()
            here.points.append((x, y, prompt.inside))
        else:
            _draw(here, planes.pixel(places), planes.size, prompt.inside)
    return dict(on), volume


def _draw(on: _OnSlice, pixels: Array, size: tuple[int, int], inside: bool) -> None:
    """Draw a line through pixels; a later stroke wins over an earlier one."""
    stroke = np.zeros(size, bool)
    corners = np.clip(np.round(pixels), 0, np.array(size[::-1]) - 1).astype(int)
    for (x0, y0), (x1, y1) in zip(corners, corners[1:] if len(corners) > 1 else corners, strict=False):
        stroke[line(y0, x0, y1, x1)] = True
    nothing = np.zeros(size, bool)
    before_in = nothing if on.inside is None else on.inside
    before_out = nothing if on.outside is None else on.outside
    if inside:
        on.inside, on.outside = before_in | stroke, before_out & ~stroke
    else:
        on.inside, on.outside = before_in & ~stroke, before_out | stroke


def _drawn(model: SliceModel, number: int, on: _OnSlice, rectangle: Array | None) -> Array:
    """The mask (H, W) on a slice that was prompted; empty where only what is no part of the object was shown."""
    size = model.planes.size
    boxes = None if rectangle is None else rectangle[None]
    points, inside = None, None
    if on.points:
        points = np.array([[(x, y) for x, y, _ in on.points]])
        inside = np.array([[int(i) for _, _, i in on.points]])
    if boxes is None and (inside is None or not inside.any()):
        logits = np.full(size, -1.0, np.float32)
    else:
        logits = model.logits(number, boxes, points, inside)[0][0]
    if on.inside is None or on.outside is None:
        return np.asarray(logits > 0)
    return corrected(logits, model.whole(number), on.inside, on.outside)
