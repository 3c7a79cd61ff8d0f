"""Resampling 512 x 512 x 256 from 0.8 x 0.8 x 1.5 mm to 1.5 mm, ours and others, one thread.

Run ``python workflows/bench/resample.py``; peers that are not installed are left out. The largest difference from
scipy's B-spline (mirror boundaries), of the range of values, is the note of the cubic rows.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch reads it

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import numpy as np
import SimpleITK as sitk
import torch
from _measure import Measurement, measure, show
from scipy import ndimage

import medseg

SOURCE = medseg.Geometry.from_parts((512, 512, 256), (0.8, 0.8, 1.5), (10, 20, 30))
TARGET = SOURCE.with_spacing((1.5, 1.5, 1.5))


def oblique() -> medseg.Geometry:
    """The target, turned by some degrees about its centre."""
    c, s = np.cos(0.15), np.sin(0.15)
    turn = np.array([[c, -s, 0], [s, c, 0], [0, 0, 1]]) @ np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    centre = TARGET.to_world((np.asarray(TARGET.shape) - 1) / 2)
    corner = centre - turn @ (np.asarray(TARGET.spacing) * (np.asarray(TARGET.shape) - 1) / 2)
    return medseg.Geometry.from_parts(TARGET.shape, TARGET.spacing, corner, turn)


def image() -> np.ndarray:
    """Smooth tissue with noise, float32, i fastest as readers give it."""
    rng = np.random.default_rng(0)
    zoom = [n / m for n, m in zip(SOURCE.shape[::-1], (9, 17, 17), strict=True)]
    array = ndimage.zoom(rng.normal(size=(9, 17, 17)), zoom, order=1).astype(np.float32) * 300
    array += 20 * rng.standard_normal(array.shape, np.float32)
    return array.T


def labels() -> np.ndarray:
    """Five ellipsoids on background."""
    i, j, k = np.ogrid[:512, :512, :256]
    array = np.zeros(SOURCE.shape, np.uint8, order="F")
    for n in range(1, 6):
        array[((i - 80 * n) / 60) ** 2 + ((j - 250) / 90) ** 2 + ((k - 128) / 60) ** 2 < 1] = n
    return array


def itk(array: np.ndarray, geometry: medseg.Geometry) -> Any:
    """A SimpleITK image."""
    made = sitk.GetImageFromArray(array.T)
    flip = np.diag([-1.0, -1.0, 1.0])
    made.SetSpacing(geometry.spacing)
    made.SetOrigin((flip @ geometry.origin).tolist())
    made.SetDirection((flip @ geometry.direction).ravel().tolist())
    return made


def with_itk(how: int, target: medseg.Geometry) -> Callable[[Any], Any]:
    """A resampler of SimpleITK."""
    flip = np.diag([-1.0, -1.0, 1.0])
    origin, direction = (flip @ target.origin).tolist(), (flip @ target.direction).ravel().tolist()
    return lambda made: sitk.Resample(made, target.shape, sitk.Transform(), how, origin, target.spacing, direction, 0.0)


def with_torch(array: np.ndarray) -> Any:
    return torch.nn.functional.interpolate(
        torch.from_numpy(array.T)[None, None], size=TARGET.shape[::-1], mode="trilinear"
    )


def scipy_points(order: int) -> Callable[[np.ndarray], Any]:
    step = np.linalg.inv(SOURCE.affine) @ TARGET.affine
    return lambda a: ndimage.affine_transform(
        a, np.diag(step)[:3], step[:3, 3], TARGET.shape, order=order, mode="mirror"
    )


def ours(target: medseg.Geometry, how: str | None) -> Callable[[Any], Any]:
    return lambda value: medseg.resample_to(value, target, how)


def with_monai(how: str | int) -> Callable[[np.ndarray], Any]:
    from monai.data import MetaTensor
    from monai.transforms import Spacing

    spacing = Spacing(pixdim=(1.5, 1.5, 1.5), mode=how)
    return lambda a: spacing(MetaTensor(torch.from_numpy(np.ascontiguousarray(a))[None], affine=SOURCE.affine))


def agreement() -> str:
    """Largest difference of ours from scipy's B-spline on a part, where both are inside."""
    part = medseg.crop(medseg.Volume(image(), SOURCE), (0, 0, 0), (128, 96, 64))
    target = part.geometry.with_spacing((1.5, 1.4, 1.3))
    index = np.moveaxis(part.geometry.to_index(target.to_world(np.moveaxis(np.indices(target.shape), 0, -1))), -1, 0)
    theirs = ndimage.map_coordinates(part.array[0].astype(float), index, order=3, mode="mirror")
    mine = medseg.resample_to(part, target, "cubic").array[0]
    return f"{np.abs(mine - theirs).max() / np.ptp(part.array):.1e} of the range from scipy"


def main() -> None:
    """Measure images, then labels, then an oblique target."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    torch.set_num_threads(1)
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    array, numbers, turned = image(), labels(), oblique()
    volume, label_map = medseg.Volume(array, SOURCE), medseg.LabelMap(numbers, SOURCE)
    grey, coded = itk(array, SOURCE), itk(numbers, SOURCE)
    has_monai = importlib.util.find_spec("monai") is not None

    def table(
        title: str, mine: tuple[Callable[[Any], Any], Any], peers: dict[str, tuple[Callable[[Any], Any], Any]]
    ) -> None:
        rows: dict[str, Measurement] = {}
        for name, (run, value) in {"medseg": mine, **peers}.items():
            rows[name] = measure(lambda r=run, v=value: r(v), repeats=repeats if name == "medseg" else min(2, repeats))
        show(title, rows, "medseg")

    table(
        f"Cubic ({agreement()})",
        (ours(TARGET, "cubic"), volume),
        {
            "SimpleITK B-spline": (with_itk(sitk.sitkBSpline3, TARGET), grey),
            "scipy affine_transform order 3": (scipy_points(3), array),
            **({"MONAI Spacing order 3": (with_monai(3), array)} if has_monai else {}),
        },
    )
    table(
        "Linear",
        (ours(TARGET, "linear"), volume),
        {
            "torch interpolate (axes of one box only)": (with_torch, array),
            "SimpleITK": (with_itk(sitk.sitkLinear, TARGET), grey),
            "scipy affine_transform order 1": (scipy_points(1), array),
            **({"MONAI Spacing bilinear": (with_monai("bilinear"), array)} if has_monai else {}),
        },
    )
    table(
        "Labels, 5 structures: class by class, linear",
        (ours(TARGET, None), label_map),
        {
            "medseg nearest": (ours(TARGET, "nearest"), label_map),
            "SimpleITK nearest": (with_itk(sitk.sitkNearestNeighbor, TARGET), coded),
            "SimpleITK label linear": (with_itk(sitk.sitkLabelLinear, TARGET), coded),
        },
    )
    table("Oblique, linear", (ours(turned, "linear"), volume), {"SimpleITK": (with_itk(sitk.sitkLinear, turned), grey)})
    table("Oblique, cubic", (ours(turned, "cubic"), volume), {"SimpleITK": (with_itk(sitk.sitkBSpline3, turned), grey)})


if __name__ == "__main__":
    main()
