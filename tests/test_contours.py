"""Contours against brute force, areas, and matplotlib's point-in-polygon."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from conftest import geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from matplotlib.path import Path as MplPath
from scipy.ndimage import label

from medseg.contours import contours_of, join_keyholes, mask_to_polygons, polygons_to_mask, stack_to_polygons
from medseg.volume import Geometry, LabelMap

STYLES = [("edge", "xor"), ("edge", "keyhole"), ("smooth", "xor"), ("smooth", "keyhole")]
masks = hnp.arrays(bool, hnp.array_shapes(min_dims=2, max_dims=2, min_side=1, max_side=13))


def even_odd(polygons, shape):
    """Ray casting pixel by pixel: the rule in its plainest form."""
    out = np.zeros(shape, bool)
    for a, b in np.ndindex(shape):
        for polygon in polygons:
            corners = [*polygon.tolist(), polygon[0].tolist()]
            for (a0, b0), (a1, b1) in pairwise(corners):
                if (a0 > a) != (a1 > a) and b < b0 + (a - a0) / (a1 - a0) * (b1 - b0):
                    out[a, b] ^= True
    return out


def area(ring):
    a, b = np.asarray(ring).T
    return float(np.dot(a, np.roll(b, -1)) - np.dot(b, np.roll(a, -1))) / 2


@pytest.mark.parametrize(("style", "holes"), STYLES)
@settings(max_examples=40, deadline=None)
@given(mask=masks)
def test_contours_give_the_mask_back(mask, style, holes):
    rings = mask_to_polygons(mask, style, holes)
    assert np.array_equal(polygons_to_mask(rings, mask.shape), mask)
    assert np.array_equal(even_odd(rings, mask.shape), mask)


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_edge_contours_follow_the_pixels(mask):
    rings = mask_to_polygons(mask)
    assert abs(sum(area(r) for r in rings)) == mask.sum()  # holes run the other way round
    for ring in rings:
        assert (ring % 1 == 0.5).all()
        steps = np.diff(np.vstack([ring, ring[:1]]), axis=0)
        assert ((steps != 0).sum(axis=1) == 1).all()  # along one axis each
        assert ((steps[:, 0] == 0) != (np.roll(steps[:, 0], 1) == 0)).all()  # and turning at every vertex
    outer = [r for r in rings if np.sign(area(r)) == np.sign(area(rings[0]))]
    assert len(outer) == label(mask)[1]  # pixels that touch by a corner lie in different rings


@settings(max_examples=60, deadline=None)
@given(mask=masks)
def test_keyholes_leave_one_polygon_per_piece(mask):
    for style in ("edge", "smooth"):
        rings = mask_to_polygons(mask, style, "keyhole")
        assert len(rings) == label(mask)[1]
        assert abs(sum(map(area, rings))) == pytest.approx(abs(sum(map(area, mask_to_polygons(mask, style)))), abs=1e-9)


@settings(max_examples=30, deadline=None)
@given(mask=hnp.arrays(bool, hnp.array_shapes(min_dims=3, max_dims=3, min_side=1, max_side=8)))
def test_a_stack_is_its_slices(mask):
    found = stack_to_polygons(mask)
    assert sorted(found) == np.flatnonzero(mask.any(axis=(1, 2))).tolist()
    for k, rings in found.items():
        alone = mask_to_polygons(mask[k])
        assert sorted(r.tolist() for r in rings) == sorted(r.tolist() for r in alone)


def test_smooth_contours_are_smooth_and_clear_of_the_centres():
    a, b = np.mgrid[:60, :72]
    mask = (a - 28.3) ** 2 + ((b - 35.1) * 0.8) ** 2 < 20**2
    (ring,) = mask_to_polygons(mask, "smooth")
    steps = np.diff(np.vstack([ring, ring[:2]]), axis=0)
    steps = steps[np.linalg.norm(steps, axis=1) > 1e-9]
    turn = np.abs(np.angle(np.exp(1j * np.diff(np.arctan2(steps[:, 1], steps[:, 0])))))
    assert np.degrees(turn).mean() < 12  # a contour along pixel edges turns by 90 degrees each time
    assert np.abs(ring - np.round(ring)).max(axis=1).min() > 0.04


@settings(max_examples=60, deadline=None)
@given(
    data=st.lists(st.tuples(st.floats(-4, 16), st.floats(-4, 20)), min_size=3, max_size=9),
)
def test_filling_equals_matplotlib_on_triangles(data):
    for corners in (data[i : i + 3] for i in range(len(data) - 2)):
        triangle = np.array(corners)
        if abs(area(triangle)) < 1e-3:
            continue
        a, b = np.mgrid[:11, :15]
        centres = np.stack([a.ravel(), b.ravel()], axis=1).astype(float)
        path = MplPath(triangle)
        inner, outer = (path.contains_points(centres, radius=r) for r in (-1e-6, 1e-6))
        sure = (inner == outer).reshape(a.shape)  # away from the edges
        found = polygons_to_mask([triangle], a.shape)
        assert np.array_equal(found[sure], inner.reshape(a.shape)[sure])


def test_a_centre_on_the_edge_belongs_to_one_side():
    left = np.array([[0.0, 0.0], [0.0, 3.0], [4.0, 3.0], [4.0, 0.0]])
    right = left + np.array([0.0, 3.0])
    a, b = polygons_to_mask([left], (6, 8)), polygons_to_mask([right], (6, 8))
    assert not (a & b).any()
    assert np.array_equal(a | b, polygons_to_mask([left, right], (6, 8)))
    assert a[0, 0] and not a[4, 0] and not a[0, 3] and b[0, 3]
    noisy = left + 1e-9 * np.array([[1, -1], [-1, 1], [1, 1], [-1, -1]])
    assert np.array_equal(polygons_to_mask([noisy], (6, 8)), a)


def test_polygons_beyond_the_slice_are_clipped():
    huge = np.array([[-1e9, -1e9], [-1e9, 1e9], [1e9, 1e9], [1e9, -1e9]])
    assert polygons_to_mask([huge], (5, 7)).all()
    assert not polygons_to_mask([huge + 3e9], (5, 7)).any()
    assert np.array_equal(polygons_to_mask([huge, np.array([[1.5, 1.5], [1.5, 4.5], [3.5, 4.5], [3.5, 1.5]])], (5, 7)),
                          ~np.pad(np.ones((2, 3), bool), ((2, 1), (2, 2))))  # fmt: skip


def test_many_crossings_do_not_need_memory(monkeypatch):
    monkeypatch.setattr("medseg.contours.CHUNK", 64)
    rng = np.random.default_rng(4)
    polygon = rng.uniform(-3, 40, (200, 2))
    assert np.array_equal(polygons_to_mask([polygon], (23, 31)), even_odd([polygon], (23, 31)))


@pytest.mark.parametrize("bad", [np.zeros((3, 3)), np.array([[0, 0], [0, np.nan], [1, 1]]), np.zeros(4)])
def test_bad_polygons_are_refused(bad):
    with pytest.raises(ValueError, match="polygon must be"):
        polygons_to_mask([bad], (4, 4))


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="style of contours must be"):
        mask_to_polygons(np.ones((2, 2), bool), "round")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="holes must be"):
        mask_to_polygons(np.ones((2, 2), bool), "edge", "none")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="must have two axes"):
        mask_to_polygons(np.ones((2, 2, 2), bool))


def test_nothing_gives_nothing():
    assert mask_to_polygons(np.zeros((4, 6), bool)) == []
    assert join_keyholes([]) == []
    assert not polygons_to_mask([], (4, 6)).any()


@settings(max_examples=25, deadline=None)
@given(grid=geometries(), seed=st.integers(0, 99), axis=st.integers(0, 2))
def test_contours_lie_in_the_patient(grid: Geometry, seed, axis):
    """In 3D: every contour lies in its slice's plane, and encloses the voxel centres of the mask and no others."""
    mask = np.random.default_rng(seed).random(grid.shape) < 0.4
    found = contours_of(LabelMap(mask, grid), 1, axis)
    others = [a for a in range(3) if a != axis]
    back = np.zeros(grid.shape, bool)
    for k, rings in found.items():
        index = [np.linalg.solve(grid.affine, np.c_[r, np.ones(len(r))].T).T[:, :3] for r in rings]
        assert all(np.abs(i[:, axis] - k).max() < 1e-6 for i in index)
        plane = even_odd([i[:, others] for i in index], tuple(grid.shape[a] for a in others))
        back[tuple(k if a == axis else slice(None) for a in range(3))] = plane
    assert np.array_equal(back, mask)
