"""Slices of volumes in any orientation, and prompts in voxels and mm on them."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from conftest import geometries
from hypothesis import given
from hypothesis import strategies as st

from medseg.planes import Planes
from medseg.prompt_places import voxel_box, voxel_points
from medseg.resample import reorient
from medseg.volume import Geometry, Volume


@given(geometries(), st.integers(0, 2), st.integers(0, 99))
def test_slices_are_those_of_a_radiologist(geometry: Geometry, axis: int, seed: int) -> None:
    """Against reorientation to LPS (rows to P or I, columns to L or P) done by other code."""
    voxels = np.random.default_rng(seed).random((2, *geometry.shape)).astype(np.float32)
    planes = Planes(geometry, axis)
    # rows go down: I for coronal and sagittal; columns L, or P for sagittal
    turned = reorient(Volume(voxels, geometry), "LPI")
    world = {"sagittal": 0, "coronal": 1, "axial": 2}[planes.name]
    backwards = geometry.orientation[axis] in "RAS" != "LPI"[world] in "RAS"
    for n in range(planes.count):
        m = n if geometry.orientation[axis] == "LPI"[world] else planes.count - 1 - n
        expected = np.take(turned.array, m, axis=1 + world).swapaxes(1, 2)
        assert np.array_equal(planes.take(voxels, n), expected), backwards
    assert planes.take(voxels, 0).shape[1:] == planes.size


@given(geometries(), st.integers(0, 2), st.integers(0, 99))
def test_pixels_and_indices(geometry: Geometry, axis: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    planes, voxels = Planes(geometry, axis), generator.random(geometry.shape)
    index = np.array([generator.integers(0, n) for n in geometry.shape])
    x, y = planes.pixel(index)
    assert planes.take(voxels, index[axis])[y, x] == voxels[tuple(index)]
    assert np.array_equal(planes.index(np.array([x, y]), int(index[axis])), index)
    out = np.zeros(geometry.shape)
    for n in range(planes.count):
        planes.put(out, n, planes.take(voxels, n))
    assert np.array_equal(out, voxels)


@given(geometries(), st.integers(0, 2), st.integers(0, 99))
def test_rectangles_hold_the_voxels_of_a_box(geometry: Geometry, axis: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    ends = np.sort(np.array([generator.integers(0, n, 2) for n in geometry.shape]), axis=1).T
    planes, mask = Planes(geometry, axis), np.zeros(geometry.shape, bool)
    mask[tuple(slice(a, b + 1) for a, b in ends.T)] = True
    y, x = np.nonzero(planes.take(mask, ends[0, axis]))
    assert planes.rectangle(ends.ravel()).tolist() == [x.min(), y.min(), x.max(), y.max()]


def test_default_planes_and_true_proportions() -> None:
    thick = Geometry.from_parts((40, 9, 50), (0.8, 5.0, 0.9))
    assert Planes.of(thick).axis == 1 and Planes.of(thick).name == "coronal"
    assert Planes.of(Geometry.from_parts((40, 30, 50), (5.0, 5.0, 2.5))).name == "axial"
    assert Planes.of(Geometry.from_parts((40, 30, 1), (1, 1, 1))).axis == 2
    assert Planes.of(thick, "axial").axis == 2
    height, width = Planes.of(thick, "axial").square_of(Planes.of(thick, "axial").size)
    assert (height, width) == (40, round(40 * 32 / 45)) or height / width == pytest.approx(45 / 32, rel=0.05)
    with pytest.raises(ValueError, match="axis must be"):
        Planes.of(thick, "oblique")


@given(geometries(), st.integers(0, 99))
def test_boxes_in_mm_are_those_in_voxels(geometry: Geometry, seed: int) -> None:
    """A box that is drawn on the grid and told in mm, for grids along the world axes."""
    straight = Geometry(geometry.shape, np.diag([*np.sign(np.diag(geometry.affine)[:3] + 1e-9) * geometry.spacing, 1]))
    generator = np.random.default_rng(seed)
    ends = np.sort(np.array([generator.choice(n, 2, replace=False) for n in geometry.shape]), axis=1).T
    world = np.sort(straight.to_world(ends), axis=0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert np.allclose(voxel_box(straight, ends.ravel()), ends.ravel())
    assert np.allclose(voxel_box(straight, world.ravel(), "mm"), ends.ravel())
    flat = world.copy()
    flat[:, 1] = world[0, 1]
    found = voxel_box(straight, flat.ravel(), "mm").reshape(2, 3)
    assert np.isclose(found[0, 1], found[1, 1])


@given(geometries(low=5), st.integers(0, 99))
def test_boxes_in_mm_hold_their_corners_on_oblique_grids(geometry: Geometry, seed: int) -> None:
    middle = geometry.corners.mean(0)
    half = 0.3 * min(geometry.spacing) * np.random.default_rng(seed).uniform(0.5, 1, 3)
    found = voxel_box(geometry, np.concatenate([middle - half, middle + half]), "mm").reshape(2, 3)
    for corner in np.ndindex(2, 2, 2):
        index = geometry.to_index(middle + half * (2 * np.array(corner) - 1))
        assert (index >= found[0] - 1e-9).all() and (index <= found[1] + 1e-9).all()


GRID = Geometry.from_parts((60, 50, 40), (3.0, 3.0, 3.0), (-90.0, -75.0, 200.0))


@pytest.mark.parametrize(
    ("box", "units", "message"),
    [
        ((5, 5, 5, 3, 9, 9), "voxel", "x0 <= x1"),
        ((5, 5, 5, 5, 5, 9), "voxel", "empty"),
        ((5, 5, 5, 61, 9, 9), "voxel", "must lie in the image"),
        ((-60, -60, 210, -20, -10, 260), "voxel", "lie there in mm"),
        ((10, 10, 10, 30, 20, 20), "mm", "lie there in voxel"),
        ((-60, 60, 210, -20, 73, 260), "mm", ""),
        ((20, -70, 210, 89, -20, 260), "mm", "LPS"),
        ((1, 2, 3, 4), "voxel", "six numbers"),
        ((1, 2, 3, 4, np.nan, 6), "voxel", "six numbers"),
    ],
)
def test_bad_boxes(box: tuple[float, ...], units: str, message: str) -> None:
    if not message:
        voxel_box(GRID, box, "mm")
        return
    with pytest.raises(ValueError, match=message):
        voxel_box(
            Geometry.from_parts(GRID.shape, GRID.spacing, (-170.0, -75.0, 200.0)) if message == "LPS" else GRID,
            box,
            units,
        )  # type: ignore[arg-type]


def test_millimetres_taken_for_voxels_are_noticed() -> None:
    grid = Geometry.from_parts((60, 50, 40), (1.2, 1.2, 1.2))
    with pytest.warns(UserWarning, match="nearly the whole image"):
        voxel_box(grid, (0, 0, 0, 58, 49, 39))


def test_boxes_of_pictures_have_four_numbers() -> None:
    picture = Geometry.from_parts((60, 50, 1), (1, 1, 1))
    assert voxel_box(picture, (3, 4, 20, 30)).tolist() == [3, 4, 0, 20, 30, 0]


def test_points() -> None:
    assert voxel_points(GRID, [(-90, -75, 203)], "mm").tolist() == [[0, 0, 1]]
    with pytest.raises(ValueError, match="must lie in the image"):
        voxel_points(GRID, [(3, 3, 3), (3, 3, 45)])
    with pytest.raises(ValueError, match="finite"):
        voxel_points(GRID, [(3, np.inf, 3)])
