"""Preprocessing as a MONAI dictionary pipeline.

This is the only module that builds MONAI pipelines. A case goes in as ``{"image": paths or Volume, "label": path,
LabelMap or None, "unknown": numbers}`` and comes out on the planned grid, normalised, as MetaTensors.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from monai.data import MetaTensor
from monai.transforms import Compose, MapTransform

from medseg.data import read_reference
from medseg.io import read_channels
from medseg.plan import ChannelPlan, Plan
from medseg.resample import resample_to, straighten
from medseg.targets import known_structures, make_target, numbered_by_name, values_present
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["grey_as_color", "normalise", "planned_geometry", "preprocessing"]

SPACING_TOLERANCE = 0.01  # a grid within 1 % of the planned spacing is not resampled


def planned_geometry(native: Geometry, plan: Plan) -> Geometry:
    """The planned grid over the box of a straight native grid: axes reordered, spacing as planned.

    Raises
    ------
    GeometryError
        If the native grid is skewed.
    """
    native.require_straight("grid of an image")
    grid = native if plan.orientation is None else native.reoriented(plan.orientation)
    target = [old if new is None else new for old, new in zip(grid.spacing, plan.spacing, strict=True)]
    close = all(abs(t / s - 1) <= SPACING_TOLERANCE for t, s in zip(target, grid.spacing, strict=True))
    return grid if close else grid.with_spacing(target)


def grey_as_color(array: np.ndarray, channels: Sequence[ChannelPlan]) -> np.ndarray:
    """A grey picture (1, I, J, K) as (3, I, J, K) where colours are planned: its values are red, green and blue alike."""
    is_color = len(channels) == 3 and all(c.scheme == "color" for c in channels)
    return np.broadcast_to(array, (3, *array.shape[1:])) if is_color and len(array) == 1 else array


def normalise(
    array: np.ndarray, channels: Sequence[ChannelPlan], case: str = "the image", missing: Collection[int] = ()
) -> np.ndarray:
    """Normalise the channels of an image (C, I, J, K) as planned; float32, 0 (the mean) in channels that are missing.

    One grey channel stands for three that are colours.

    Raises
    ------
    ValueError
        If the number of channels is not the planned one, or a voxel is NaN or infinite.
    """
    array = grey_as_color(array, channels)
    if len(array) != len(channels):
        raise ValueError(f"image must have {len(channels)} channels as planned, got {len(array)} in {case}")
    out = np.empty(array.shape, np.float32)
    for number, (values, plan, target) in enumerate(zip(array, channels, out, strict=True)):
        if number in missing:
            target[...] = 0
            continue
        target[...] = values
        if not np.isfinite(target).all():
            raise ValueError(
                f"voxels must be finite, got NaN or Inf in channel {plan.name} of {case}; run medseg check"
            )
        low, high, mean, std = plan.low, plan.high, plan.mean, plan.std
        if plan.scheme == "zscore":
            body = target[target > target.min()] if plan.masked else target.reshape(-1)
            body = body if body.size else target.reshape(-1)
            step = max(1, body.size // 500_000)  # a sample gives the percentiles to a thousandth of the range
            low, high = (float(v) for v in np.percentile(body[::step], (0.5, 99.5)))
            low = float(target.min()) if plan.masked else low  # what is blank stays apart from what is dark
            inside = np.clip(body, low, high)
            mean, std = float(inside.mean(dtype=np.float64)), float(inside.std(dtype=np.float64))
        if plan.scheme != "color" and high > low:
            np.clip(target, low, high, out=target)
        target -= mean
        target /= std if std > 0 else 1.0
    return out


def _to_meta(array: np.ndarray, geometry: Geometry) -> MetaTensor:
    writable = np.require(array, requirements=["C", "W"])
    return MetaTensor(torch.from_numpy(writable), affine=torch.from_numpy(geometry.affine.copy()))


class ReadCased(MapTransform):
    """Read "image" (paths of the channels, or a Volume) and "label" (a path or a LabelMap) on their native grid.

    A channel whose path is None is missing. Skewed images are straightened; a label must lie on the grid of its image.
    """

    def __init__(self) -> None:
        super().__init__(["image", "label"], allow_missing_keys=True)

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        image = out["image"] if isinstance(out["image"], Volume) else read_channels(out["image"])
        label = out.get("label")
        case = str(out.get("case", "?"))
        if isinstance(label, LabelMap):
            image.geometry.require_close(label.geometry, f"label map and image of case {case}")
            label = replace(label, geometry=image.geometry)
        elif label is not None:
            label = read_reference(label, image, case)
        if image.geometry.is_skewed:
            image = straighten(image)
            label = None if label is None else resample_to(label, image.geometry)
        out["image"] = image
        out["label"] = label
        return out


class Normalised(MapTransform):
    """Normalise "image" as planned, on its native grid: resampling would blur the blank around a body into it."""

    def __init__(self, channels: Sequence[ChannelPlan]) -> None:
        super().__init__(["image"])
        self.channels = channels

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        image = data["image"]
        case = str(data.get("case") or image.meta.get("path") or "the image")
        missing = image.meta.get("missing_channels", ())
        array = normalise(image.array, self.channels, case, missing)
        return {**data, "image": Volume(array, image.geometry, image.meta)}


class PlannedGridd(MapTransform):
    """Put "image" (cubic) and "label" (:func:`medseg.targets.make_target`) on the planned grid.

    "unknown" (labels that nobody drew) becomes "known", one answer per structure.
    """

    def __init__(self, plan: Plan) -> None:
        super().__init__(["image", "label"], allow_missing_keys=True)
        self.plan = plan

    def __call__(self, data: Mapping[Hashable, Any]) -> dict[Hashable, Any]:
        out = dict(data)
        image, label = out["image"], out.get("label")
        grid = planned_geometry(image.geometry, self.plan)
        moved = np.array(resample_to(image, grid, "cubic").array, np.float32)
        for channel, native in zip(moved, image.array, strict=True):  # a spline overshoots at edges: no new extremes
            np.clip(channel, native.min(), native.max(), out=channel)
        out["image"], out["geometry"] = _to_meta(moved, grid), grid
        if label is not None:
            label = numbered_by_name(label, self.plan)
            out["label"] = _to_meta(make_target(label, grid, self.plan, str(out.get("case", "?"))), grid)
        if "unknown" in out:
            present = () if label is None else values_present(label)
            out["known"] = known_structures(self.plan, out.pop("unknown"), present)
        return out


class Pipeline(Compose):
    """A MONAI pipeline that lets our errors through as they are, and writes no voxels into logs."""

    def __init__(self, transforms: Sequence[MapTransform]) -> None:
        super().__init__(transforms, log_stats=False)

    def __call__(self, *args: Any, **options: Any) -> Any:
        try:
            return super().__call__(*args, **options)
        except RuntimeError as problem:
            if isinstance(problem.__cause__, ValueError | TypeError | OSError):
                raise problem.__cause__ from None
            raise


def preprocessing(plan: Plan) -> Compose:
    """The pipeline from files to network input.

    Returns
    -------
    monai.transforms.Compose
        Takes ``{"case": id, "image": paths or Volume, "label": path, LabelMap or None, "unknown": label numbers}``; gives
        "image", a float32 MetaTensor (C, I, J, K), 0 in channels that are missing; "label", a MetaTensor of classes
        (I, J, K) int16 or, where the plan is overlapping, layers (S, I, J, K) int8 or float16, -1 where a voxel does not
        count, or None; "known", one bool per structure, where "unknown" is given; "geometry".
    """
    return Pipeline([ReadCased(), Normalised(plan.channels), PlannedGridd(plan)])
