"""Resampling against SimpleITK, scipy and nibabel on oblique, anisotropic grids."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import geometries, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.resample import crop, pad, reorient, resample_to, straighten
from medseg.sampling import IndexMap, blocks, weight_matrix
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

QUICK = settings(max_examples=25, deadline=None)


def itk_image(array: np.ndarray, geometry: Geometry) -> sitk.Image:
    """Written here again, so that the oracle shares no code with the package."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.T))
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(geometry.spacing)
    image.SetOrigin((flip @ geometry.origin).tolist())
    image.SetDirection((flip @ geometry.direction).ravel().tolist())
    return image


def itk_resample(array: np.ndarray, source: Geometry, target: Geometry, how: int, fill: float) -> np.ndarray:
    like = itk_image(np.zeros(target.shape, np.float32), target)
    resampled = sitk.Resample(itk_image(array, source), like, sitk.Transform(), how, fill)
    return sitk.GetArrayFromImage(resampled).T


def source_index(source: Geometry, target: Geometry) -> np.ndarray:
    """(3, I, J, K) continuous source index of every target voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, target.shape), indexing="ij"), -1)
    return np.moveaxis(source.to_index(target.to_world(index)), -1, 0)


def off_border(x: np.ndarray, shape: tuple[int, ...], inner: float = -0.5) -> np.ndarray:
    """Points that are clearly inside or clearly outside the outer half voxel."""
    n = np.asarray(shape).reshape(3, 1, 1, 1)
    return (np.minimum(np.abs(x - inner), np.abs(x - (n - 1 - inner))) > 1e-3).all(0)


def nearby(source: Geometry, seed: int) -> Geometry:
    """An oblique grid of another spacing that overlaps a part of the source."""
    rng = np.random.default_rng(seed)
    direction = rotation(tuple(rng.uniform(-0.6, 0.6, 3))) @ source.direction
    shape = rng.integers(3, 9, 3)
    spacing = np.asarray(source.spacing) * rng.uniform(0.5, 1.7, 3)
    centre = source.to_world((np.asarray(source.shape) - 1) / 2) + rng.uniform(-1, 1, 3)
    return Geometry.from_parts(shape, spacing, centre - direction @ (spacing * (shape - 1) / 2), direction)


def parallel(source: Geometry, seed: int) -> Geometry:
    """A grid with the source's axes in another order, flipped, shifted and scaled."""
    rng = np.random.default_rng(seed)
    order, signs = rng.permutation(3), rng.choice([-1.0, 1.0], 3)
    shape = rng.integers(3, 9, 3)
    spacing = np.asarray(source.spacing)[order] * rng.uniform(0.5, 1.7, 3)
    direction = source.direction[:, order] * signs
    centre = source.to_world((np.asarray(source.shape) - 1) / 2) + rng.uniform(-1, 1, 3)
    return Geometry.from_parts(shape, spacing, centre - direction @ (spacing * (shape - 1) / 2), direction)


seeds = st.integers(0, 10**6)
grids = st.one_of(
    st.tuples(geometries(), seeds).map(lambda t: (t[0], nearby(*t), t[1])),
    st.tuples(geometries(), seeds).map(lambda t: (t[0], parallel(*t), t[1])),
)


@QUICK
@given(grids)
def test_linear_is_itks(pair: tuple[Geometry, Geometry, int]) -> None:
    source, target, seed = pair
    array = np.random.default_rng(seed).normal(size=source.shape).astype(np.float32)
    ours = resample_to(Volume(array, source), target, fill=-7)
    assert ours.geometry == target and ours.array.dtype == np.float32
    sure = off_border(source_index(source, target), source.shape)
    theirs = itk_resample(array, source, target, sitk.sitkLinear, -7)
    np.testing.assert_allclose(ours.array[0][sure], theirs[sure], atol=2e-4)


@QUICK
@given(grids)
def test_cubic_is_scipys_and_itks_b_spline(pair: tuple[Geometry, Geometry, int]) -> None:
    source, target, seed = pair
    array = np.random.default_rng(seed).normal(size=source.shape).astype(np.float32)
    ours = resample_to(Volume(array, source), target, "cubic", fill=-7).array[0]
    x = source_index(source, target)
    sure = off_border(x, source.shape)
    inside = sure & (ours != -7)
    scipys = ndimage.map_coordinates(array.astype(float), x, order=3, mode="mirror")
    tolerance = 1e-4 * float(np.ptp(array))
    np.testing.assert_allclose(ours[inside], scipys[inside], atol=tolerance)
    itks = itk_resample(array.astype(float), source, target, sitk.sitkBSpline3, -7)
    np.testing.assert_allclose(ours[sure], itks[sure], atol=tolerance)


@QUICK
@given(grids)
def test_nearest_is_itks(pair: tuple[Geometry, Geometry, int]) -> None:
    source, target, seed = pair
    array = np.random.default_rng(seed).integers(-1000, 3000, source.shape).astype(np.int16)
    ours = resample_to(Volume(array, source), target, "nearest", fill=-7)
    assert ours.array.dtype == np.int16
    x = source_index(source, target)
    sure = (np.abs(x - np.floor(x) - 0.5) > 1e-3).all(0)
    np.testing.assert_array_equal(
        ours.array[0][sure], itk_resample(array, source, target, sitk.sitkNearestNeighbor, -7)[sure]
    )


@QUICK
@given(grids)
def test_labels_are_the_largest_interpolated_indicator(pair: tuple[Geometry, Geometry, int]) -> None:
    source, target, seed = pair
    numbers = np.array([0, 2, 5, 300])
    labels = numbers[np.random.default_rng(seed).integers(0, 4, source.shape)].astype(np.int16)
    ours = resample_to(LabelMap(labels, source), target)
    assert ours.array.dtype == np.int16
    x = source_index(source, target)
    weights = np.stack([itk_resample((labels == n).astype(float), source, target, sitk.sitkLinear, 0) for n in numbers])
    weights[0] += weights.sum(0) == 0  # outside is background
    ranked = np.sort(weights, 0)
    sure = off_border(x, source.shape) & (ranked[-1] - ranked[-2] > 1e-3)
    np.testing.assert_array_equal(ours.array[sure], numbers[weights.argmax(0)][sure])
    nearest = resample_to(LabelMap(labels, source), target, "nearest").array
    sure = (np.abs(x - np.floor(x) - 0.5) > 1e-3).all(0)
    theirs = itk_resample(labels, source, target, sitk.sitkNearestNeighbor, 0)
    np.testing.assert_array_equal(nearest[sure], theirs[sure])


@QUICK
@given(grids)
def test_layers_overlap_and_keep_their_kind(pair: tuple[Geometry, Geometry, int]) -> None:
    source, target, seed = pair
    probabilities = np.random.default_rng(seed).random((2, *source.shape)).astype(np.float32)
    structures = (Structure(4, "a"), Structure(9, "b"))
    sure = off_border(source_index(source, target), source.shape)
    soft = resample_to(LabelMap(probabilities, source, structures), target)
    hard = resample_to(LabelMap(probabilities > 0.4, source, structures), target)
    assert soft.array.dtype == np.float32 and hard.array.dtype == bool and hard.structures == structures
    for n in range(2):
        theirs = itk_resample(probabilities[n], source, target, sitk.sitkLinear, 0)
        np.testing.assert_allclose(soft.array[n][sure], theirs[sure], atol=1e-4)
        theirs = itk_resample((probabilities[n] > 0.4).astype(float), source, target, sitk.sitkLinear, 0)
        decided = sure & (np.abs(theirs - 0.5) > 1e-4)
        np.testing.assert_array_equal(hard.array[n][decided], theirs[decided] > 0.5)


@QUICK
@given(geometries(), st.permutations(["RL", "AP", "SI"]), st.tuples(*[st.integers(0, 1)] * 3))
def test_reorient_is_exact_and_nibabels(geometry: Geometry, pairs: list[str], picks: tuple[int, int, int]) -> None:
    letters = "".join(pair[n] for pair, n in zip(pairs, picks, strict=True))
    array = np.random.default_rng(0).integers(0, 9, (2, *geometry.shape)).astype(np.uint8)
    ours = reorient(Volume(array, geometry), letters)
    assert ours.geometry.orientation == letters
    start = nib.orientations.io_orientation(geometry.affine)
    change = nib.orientations.ornt_transform(start, nib.orientations.axcodes2ornt(tuple(letters)))
    theirs = nib.Nifti1Image(np.moveaxis(array, 0, 3), geometry.affine).as_reoriented(change)
    np.testing.assert_array_equal(np.moveaxis(ours.array, 0, 3), np.asarray(theirs.dataobj))
    np.testing.assert_allclose(ours.geometry.affine, theirs.affine, atol=1e-9)
    back = reorient(ours, geometry.orientation)
    assert back.geometry.is_close(geometry, 1e-6)
    np.testing.assert_array_equal(back.array, array)


def test_reorient_default_is_closest_canonical() -> None:
    geometry = Geometry.from_parts((3, 5, 4), (1, 2, 3), (5, 6, 7), rotation((0.2, 0.1, 0.3))[:, [2, 0, 1]])
    array = np.arange(60, dtype=np.int16).reshape(3, 5, 4)
    theirs = nib.as_closest_canonical(nib.Nifti1Image(array, geometry.affine))
    ours = reorient(LabelMap(array, geometry))
    np.testing.assert_array_equal(ours.array, np.asarray(theirs.dataobj))
    np.testing.assert_allclose(ours.geometry.affine, theirs.affine, atol=1e-9)


@QUICK
@given(geometries(), st.data())
def test_crop_and_pad_keep_voxels_in_place(geometry: Geometry, data: st.DataObject) -> None:
    start = [data.draw(st.integers(0, n - 1)) for n in geometry.shape]
    stop = [data.draw(st.integers(a + 1, n)) for a, n in zip(start, geometry.shape, strict=True)]
    volume = Volume(np.random.default_rng(1).integers(1, 99, (2, *geometry.shape)), geometry)
    part = crop(volume, start, stop)
    np.testing.assert_array_equal(part.array, volume.array[(slice(None), *map(slice, start, stop))])
    np.testing.assert_allclose(part.geometry.to_world((0, 0, 0)), geometry.to_world(start), atol=1e-9)
    after = [n - b for n, b in zip(geometry.shape, stop, strict=True)]
    whole = pad(part, start, after, fill=-3)
    assert whole.geometry.is_close(geometry, 1e-6)
    kept = whole.array != -3
    assert kept.sum() == part.array.size
    np.testing.assert_array_equal(whole.array[kept], volume.array[kept])
    labels = pad(LabelMap(part.array[0], part.geometry), start, after, fill=5)
    assert set(np.unique(labels.array[~kept[0]])) <= {0}


@QUICK
@given(geometries(), st.floats(-0.4, 0.4), seeds)
def test_straighten_covers_a_tilted_grid(geometry: Geometry, tilt: float, seed: int) -> None:
    shear = np.eye(4)
    shear[1, 2] = tilt
    skewed = Geometry(geometry.shape, geometry.affine @ shear)
    array = np.random.default_rng(seed).normal(size=skewed.shape).astype(np.float32)
    ours = straighten(Volume(array, skewed))
    if not skewed.is_skewed:
        assert ours.geometry == skewed
        return
    assert not ours.geometry.is_skewed and "skewed" in ours.meta["quirks"][0]
    at = ours.geometry.to_index(skewed.corners)
    assert (at > -1e-3).all() and (at < np.asarray(ours.geometry.shape) - 1 + 1e-3).all()
    slices = np.round(at[:, 2], 4)
    np.testing.assert_allclose(slices, np.round(slices), atol=2e-4)  # tilted slices stay slices
    x = source_index(skewed, ours.geometry)
    n = np.asarray(skewed.shape).reshape(3, 1, 1, 1)
    inner = ((x > 1e-4) & (x < n - 1 - 1e-4) | (np.abs(x - np.round(x)) < 1e-4) & (x > -0.4) & (x < n - 0.6)).all(0)
    expected = ndimage.map_coordinates(array.astype(float), x, order=1, mode="nearest")
    np.testing.assert_allclose(ours.array[0][inner], expected[inner], atol=2e-4)
    outside = ((x < -0.501) | (x > n - 0.499)).any(0)
    assert (ours.array[0][outside] == array.min()).all()


def test_exact_grids_copy_and_never_interpolate() -> None:
    geometry = Geometry.from_parts((5, 6, 7), (1, 2, 3), (9, 9, 9), rotation((0.3, 0.2, 0.1)))
    array = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    array[2, 3, 4] = np.nan
    for mode in ("linear", "cubic", "nearest"):
        moved = resample_to(Volume(array, geometry), geometry.cropped((1, -2, 0), (5, 6, 9)), mode, fill=4)
        np.testing.assert_array_equal(moved.array[0, :, 2:, :7], array[1:])
        assert (moved.array[0, :, :2] == 4).all() and (moved.array[0, :, :, 7:] == 4).all()


def test_nan_stays_local() -> None:
    geometry = Geometry.from_parts((30, 31, 32), (1, 2, 3))
    array = np.zeros(geometry.shape, np.float32)
    array[10, 11, 12] = np.nan
    ours = resample_to(Volume(array, geometry), geometry.with_spacing((0.8, 1.7, 2.6)))
    bad = ours.geometry.to_world(np.argwhere(np.isnan(ours.array[0])))
    assert 0 < len(bad) < 40
    assert (np.abs(bad - geometry.to_world((10, 11, 12))) < (1, 2, 3)).all()


@pytest.mark.parametrize("order", ["C", "F"])
def test_memory_order_types_and_many_blocks(order: str) -> None:
    source = Geometry.from_parts((150, 40, 70), (0.7, 1.1, 2.0), (1, 2, 3), rotation((0.2, 0.0, 0.1)))
    target = source.with_spacing((1.0, 0.6, 1.3))
    array = np.asarray(np.random.default_rng(2).integers(-1000, 1000, source.shape), np.int16, order=order)
    for mode, degree in (("linear", 1), ("cubic", 3)):
        for grid in (target, nearby(source, 3).with_shape((80, 55, 60))):
            ours = resample_to(Volume(array, source), grid, mode, fill=0).array[0]
            x = source_index(source, grid)
            n = np.asarray(source.shape).reshape(3, 1, 1, 1)
            inside = ((x > 0) & (x < n - 1)).all(0)
            theirs = ndimage.map_coordinates(array.astype(float), x, order=degree, mode="mirror")
            np.testing.assert_allclose(ours[inside], theirs[inside], atol=0.2)


def test_a_slice_resamples_in_its_plane() -> None:
    source = Geometry.from_parts((20, 30, 1), (1, 2, 5))
    array = np.random.default_rng(3).normal(size=source.shape).astype(np.float32)
    target = source.with_spacing((1.5, 1.2, 5))
    for mode, degree in (("linear", 1), ("cubic", 3)):
        ours = resample_to(Volume(array, source), target, mode).array[0, :, :, 0]
        x = source_index(source, target)[:2, :, :, 0]
        theirs = ndimage.map_coordinates(array[..., 0].astype(float), x, order=degree, mode="mirror")
        inner = ((x > 0) & (x < np.array([19, 29]).reshape(2, 1, 1))).all(0)
        np.testing.assert_allclose(ours[inner], theirs[inner], atol=1e-4)


def test_ties_between_classes_go_to_the_smaller_number() -> None:
    source = Geometry.from_parts((4, 3, 5), (1, 2, 3))
    labels = np.zeros(source.shape, np.uint8)
    labels[2:] = 3
    labels[:2, :, 3:] = 7
    half = Geometry.from_parts((2, 3, 5), (2, 2, 3), (0.5, 0, 0))
    shifted = Geometry.from_parts((3, 3, 5), (1, 2, 3), (0.5, 0, 0))
    assert resample_to(LabelMap(labels, source), half).array[:, 0, 0].tolist() == [0, 3]
    between = resample_to(LabelMap(labels, source), shifted)
    assert between.array[1, 0, 0] == 0 and between.array[1, 0, 4] == 3
    turned = Geometry(
        shifted.shape, shifted.affine @ np.block([[rotation((0, 0, 1e-3)), np.zeros((3, 1))], [0, 0, 0, 1]])
    )
    np.testing.assert_array_equal(resample_to(LabelMap(labels, source), turned).array[1, 0], between.array[1, 0])


def test_weights_reproduce_samples_and_add_up() -> None:
    for n in (1, 2, 3, 17):
        for mode in ("linear", "cubic"):
            np.testing.assert_allclose(weight_matrix(np.arange(n), n, mode), np.eye(n), atol=1e-12)
            weights = weight_matrix(np.linspace(-0.5, n - 0.5, 50), n, mode)
            np.testing.assert_allclose(weights.sum(1), 1, atol=1e-12)


def test_blocks_cover_once() -> None:
    seen = np.zeros((7, 65, 130), int)
    for rows in blocks(seen.shape, 64):
        seen[rows] += 1
    assert (seen == 1).all()


def test_index_map_knows_its_kind() -> None:
    g = Geometry.from_parts((9, 8, 7), (1, 2, 3))
    assert IndexMap(np.diag([1.0, -1, 1]), np.array([0.0, 7, 2]), g.shape, g.shape).whole_shift() is not None
    assert IndexMap(np.diag([1.0, -1, 1]), np.array([0.5, 7, 2]), g.shape, g.shape).whole_shift() is None
    assert not IndexMap(rotation((0, 0, 0.1)), np.zeros(3), g.shape, g.shape).is_separable


def test_bad_requests_are_refused() -> None:
    g = Geometry.from_parts((9, 8, 7), (1, 2, 3))
    image, labels = Volume(np.zeros(g.shape), g), LabelMap(np.zeros(g.shape, np.uint8), g)
    with pytest.raises(ValueError, match="interpolation must be nearest, linear or cubic, got 'lanczos'"):
        resample_to(image, g, "lanczos")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="labels must be nearest or linear"):
        resample_to(labels, g, "cubic")
    with pytest.raises(ValueError, match="three letters"):
        reorient(image, "RAR")
    with pytest.raises(GeometryError, match="box to crop must lie within"):
        crop(image, (0, 0, 0), (9, 8, 8))
    with pytest.raises(GeometryError, match="must not be negative"):
        pad(image, (0, -1, 0), (0, 0, 0))
