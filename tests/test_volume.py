"""Geometry, Volume and LabelMap against SimpleITK, nibabel and hand-computed values."""

from __future__ import annotations

import io
from dataclasses import FrozenInstanceError, replace

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import geometries, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume, default_color, present_labels, union

QUICK = settings(max_examples=40, deadline=None)
GRID = Geometry.from_parts((4, 6, 5), (0.8, 1.5, 3.0), (-17, 42, 9), rotation((0.3, -0.2, 0.4))[:, [1, 0, 2]])


def itk(geometry: Geometry) -> sitk.Image:
    image = sitk.Image(geometry.shape, sitk.sitkUInt8)
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(geometry.spacing)
    image.SetOrigin((flip @ geometry.origin).tolist())
    image.SetDirection((flip @ geometry.direction).ravel().tolist())
    return image


@QUICK
@given(geometries(), st.tuples(*[st.floats(-5, 20)] * 3))
def test_positions_are_itks(geometry: Geometry, index: tuple[float, float, float]) -> None:
    world = np.array(itk(geometry).TransformContinuousIndexToPhysicalPoint(index)) * (-1, -1, 1)
    np.testing.assert_allclose(geometry.to_world(index), world, atol=1e-9)
    np.testing.assert_allclose(geometry.to_index(world), index, atol=1e-9)


@QUICK
@given(geometries())
def test_parts_are_nibabels(geometry: Geometry) -> None:
    np.testing.assert_allclose(geometry.spacing, nib.affines.voxel_sizes(geometry.affine))
    assert geometry.orientation == "".join(nib.aff2axcodes(geometry.affine))
    again = Geometry.from_parts(geometry.shape, geometry.spacing, geometry.origin, geometry.direction)
    assert again.is_close(geometry, 1e-9) and not geometry.is_skewed
    assert geometry.voxel_mm3 == pytest.approx(np.prod(geometry.spacing))
    far = geometry.to_world(np.asarray(geometry.shape) - 1)
    np.testing.assert_allclose(geometry.corners[0], geometry.origin)
    np.testing.assert_allclose(geometry.corners[-1], far)


@QUICK
@given(geometries(), st.tuples(*[st.floats(-2, 2)] * 3), st.floats(0, 0.01))
def test_is_close_is_the_largest_corner_distance(
    geometry: Geometry, move: tuple[float, float, float], turn: float
) -> None:
    affine = geometry.affine.copy()
    affine[:3, :3] = rotation((turn, 0, 0)) @ affine[:3, :3]
    affine[:3, 3] += move
    other = Geometry(geometry.shape, affine)
    index = np.stack(np.meshgrid(*map(np.arange, geometry.shape), indexing="ij"), -1)
    largest = np.linalg.norm(other.to_world(index) - geometry.to_world(index), axis=-1).max()  # over all voxels
    assert geometry.corner_distance(other) == pytest.approx(largest, abs=1e-9)
    assert geometry.is_close(other, largest + 1e-6)
    assert largest < 1e-3 or not geometry.is_close(other, largest / 2)
    if largest > 0.01:
        with pytest.raises(
            GeometryError, match=rf"x and y must lie on the same grid, got corners up to {largest:.3f} mm"
        ):
            geometry.require_close(other, "x and y")


def test_other_shapes_are_far() -> None:
    other = GRID.cropped((0, 0, 0), (4, 6, 4))
    assert GRID.corner_distance(other) == float("inf") and not GRID.is_close(other, 1e9)
    with pytest.raises(GeometryError, match=r"got shapes \(4, 6, 5\) and \(4, 6, 4\)"):
        GRID.require_close(other, "x and y")


@QUICK
@given(geometries(), st.tuples(*[st.floats(0.3, 9)] * 3))
def test_new_spacings_keep_the_box(geometry: Geometry, spacing: tuple[float, float, float]) -> None:
    other = geometry.with_spacing(spacing)
    for end in (0, 1):  # outer faces, half a voxel beyond the outer centres
        old = geometry.to_world(np.where(end, np.asarray(geometry.shape) - 0.5, -0.5))
        new = other.to_world(np.where(end, np.asarray(other.shape) - 0.5, -0.5))
        np.testing.assert_allclose(new, old, atol=1e-8)
    extent = np.asarray(geometry.shape) * geometry.spacing
    assert all(abs(n - e / s) <= 0.5 + 1e-9 or n == 1 for n, e, s in zip(other.shape, extent, spacing, strict=True))


@pytest.mark.parametrize(
    ("shape", "affine", "message"),
    [
        ((4, 5), np.eye(4), "three positive integers"),
        ((4, 5, 0), np.eye(4), "three positive integers"),
        ((4, 5, 6), np.full((4, 4), np.nan), "finite 4x4"),
        ((4, 5, 6), np.eye(3), "finite 4x4"),
        ((4, 5, 6), np.diag([1, 1, 0, 1]), "invertible"),
        ((4, 5, 6), np.diag([1, 1, 1, 2]), "last row"),
        ((4, 5, 6), np.array([[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]), "invertible"),
    ],
)
def test_unusable_grids(shape: tuple[int, ...], affine: np.ndarray, message: str) -> None:
    with pytest.raises(GeometryError, match=message):
        Geometry(shape, affine)  # type: ignore[arg-type]
    with pytest.raises(GeometryError, match="spacing must be positive"):
        GRID.with_spacing((1, 0, 1))


def test_skewed_grids_are_their_own_kind() -> None:
    shear = np.eye(4)
    shear[1, 2] = 0.2
    skewed = Geometry(GRID.shape, GRID.affine @ shear)
    assert skewed.is_skewed and "skewed" in repr(skewed) and not GRID.is_skewed
    with pytest.raises(GeometryError, match="image must have axes at right angles"):
        skewed.require_straight("image")
    GRID.require_straight("image")


def test_values_are_frozen() -> None:
    own = np.zeros(GRID.shape, np.int16)
    volume, labels = Volume(own, GRID, {"path": "x"}), LabelMap(own, GRID)
    for array in (volume.array, labels.array, GRID.affine):
        with pytest.raises(ValueError, match="read-only"):
            array[0, 0] = 1
    with pytest.raises(FrozenInstanceError):
        volume.array = own  # type: ignore[misc]
    with pytest.raises(TypeError):
        volume.meta["path"] = "y"  # type: ignore[index]
    own[:] = 3  # the caller's array stays the caller's
    assert replace(volume, meta={}).meta == {}


def test_equal_grids_are_equal() -> None:
    other = Geometry(GRID.shape, GRID.affine.copy())
    assert other == GRID and hash(other) == hash(GRID) and GRID.cropped((0, 0, 0), (4, 6, 4)) != GRID and GRID != 3


def test_volumes_check_their_shape_and_type() -> None:
    assert Volume(np.zeros(GRID.shape), GRID).array.shape == (1, *GRID.shape)
    assert Volume(np.zeros((3, *GRID.shape)), GRID).channels == 3
    with pytest.raises(GeometryError, match=r"must have shape \(C, \*\(4, 6, 5\)\) as their grid, got \(1, 5, 6, 4\)"):
        Volume(np.zeros((5, 6, 4)), GRID)
    with pytest.raises(TypeError, match="must be numbers"):
        Volume(np.full(GRID.shape, "x"), GRID)
    volume = Volume(np.zeros(GRID.shape, np.int16), GRID, {"modality": "CT"})
    assert volume.modality == "CT" and np.asarray(volume, np.float32).dtype == np.float32
    assert repr(volume) == "Volume(int16, C=1, Geometry(4 x 6 x 5, 0.8 x 1.5 x 3 mm, ARS))"


def test_label_maps_and_their_structures() -> None:
    array = np.zeros(GRID.shape, np.int16)
    array[0], array[1] = 7, 2
    labels = LabelMap(array, GRID)
    assert labels.names == {2: "label 2", 7: "label 7"} and not labels.is_layered
    np.testing.assert_array_equal(labels.mask("label 7"), array == 7)
    np.testing.assert_array_equal(labels.mask(2), array == 2)
    with pytest.raises(ValueError, match="structure must be one of"):
        labels.mask("liver")
    with pytest.raises(TypeError, match="labels must be integers, got float64"):
        LabelMap(array.astype(float), GRID)
    with pytest.raises(GeometryError, match="labels must have the shape"):
        LabelMap(array[1:], GRID)
    with pytest.raises(ValueError, match="distinct numbers"):
        LabelMap(array, GRID, (Structure(1, "a"), Structure(1, "b")))
    with pytest.raises(ValueError, match="at least 1, got 0"):
        Structure(0, "background")
    assert LabelMap(array > 0, GRID).array.dtype == np.uint8
    assert Structure(5, "a").color == default_color(5)


def test_layers_become_exclusive_or_are_refused() -> None:
    masks = np.zeros((2, *GRID.shape), bool)
    masks[0, 0], masks[1, 1] = True, True
    layered = LabelMap(masks, GRID, (Structure(300, "a"), Structure(4, "b")))
    flat = layered.exclusive()
    assert flat.array.dtype == np.uint16 and [s.number for s in flat.structures] == [4, 300]
    np.testing.assert_array_equal(flat.array, masks[0] * 300 + masks[1] * 4)
    np.testing.assert_array_equal(LabelMap(masks * 0.7, GRID).mask(1), masks[0])
    masks[1, 0, 0] = True
    with pytest.raises(ValueError, match=r"got 'b' over 'a'.*--split"):
        LabelMap(masks, GRID, layered.structures).exclusive()
    with pytest.raises(ValueError, match="one per structure, got 2 for 1"):
        LabelMap(masks, GRID, (Structure(1, "a"),))
    with pytest.raises(TypeError, match="layers must be bool or float"):
        LabelMap(masks.astype(np.uint8), GRID)


@QUICK
@given(st.lists(st.integers(-3, 300), max_size=40), st.sampled_from([np.int16, np.int64]))
def test_present_labels_is_unique(values: list[int], dtype: type) -> None:
    assert present_labels(np.array(values, dtype)) == sorted(set(values))
    assert present_labels(np.array([5, 1 << 40])) == [5, 1 << 40]


def test_union_keeps_the_first_of_each_number() -> None:
    a, b, c = Structure(2, "a"), Structure(1, "b"), Structure(2, "c")
    assert union([a, b, c]) == (b, a)


def test_previews_show_the_radiological_view() -> None:
    """Left of the patient at the right of the picture, anterior at the top, whatever the order of the voxels."""
    patient = Geometry.from_parts((20, 30, 25), (2, 1, 3))  # RAS
    bright = np.zeros(patient.shape, np.uint8)
    bright[0:5, 25:30, :] = 255  # Left, Anterior
    flipped = Volume(bright[::-1, ::-1], Geometry(patient.shape, patient.affine @ np.array(
        [[-1, 0, 0, 19], [0, -1, 0, 29], [0, 0, 1, 0], [0, 0, 0, 1]]
    )))  # fmt: skip
    pictures = [v._repr_png_() for v in (Volume(bright, patient), flipped)]
    assert pictures[0] == pictures[1]
    axial = np.asarray(Image.open(io.BytesIO(pictures[0])).convert("L"))
    width = round(256 * 1.0)
    height = 256 * 30 // 40
    assert axial[10, width - 10] > 200 and axial[10, 10] < 50 and axial[height - 10, width - 10] < 50
    labels = LabelMap(bright // 255, patient, (Structure(1, "a", (255, 0, 0)),))
    colours = np.asarray(Image.open(io.BytesIO(labels._repr_png_())).convert("RGB"))
    assert colours[10, width - 10].tolist() == [255, 0, 0]
    flat = Volume(np.zeros((4, 5, 1)), Geometry.from_parts((4, 5, 1), (1, 1, 1)))
    assert Image.open(io.BytesIO(flat._repr_png_())).size == (204, 256)
