"""The return to the native grid against SimpleITK, scipy and a loop over points."""

from itertools import pairwise

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from conftest import geometries, rotation
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from medseg.decision import decide, probabilities_on
from medseg.sliding_window import Slab, sliding_logits_slabs
from medseg.volume import Geometry


def smooth_logits(classes, shape, seed=0):
    noise = np.random.default_rng(seed).normal(size=(classes, *shape))
    return torch.from_numpy(3 * ndimage.gaussian_filter(noise, (0, 1, 1, 1)).astype(np.float32))


def by_points(logits, source, target):
    """Interpolated logits (K, *target.shape) in float64 and which voxels lie inside, through world coordinates."""
    index = np.moveaxis(np.indices(target.shape), 0, -1)
    position = np.moveaxis(source.to_index(target.to_world(index)), -1, 0)
    limits = np.array(source.shape).reshape(3, 1, 1, 1)
    inside = ((position > -0.501) & (position < limits - 0.499)).all(0)
    sure = ((position > -0.4989) & (position < limits - 0.5011)).all(0) | ~inside
    values = [ndimage.map_coordinates(c, position, order=1, mode="nearest") for c in logits.double().numpy()]
    return np.stack(values), inside, sure


def in_slabs(logits, cuts, axis=0):
    edges = [0, *sorted(cuts), logits.shape[axis + 1]]
    for a, b in pairwise(edges):
        if b > a:
            yield Slab(axis, a, b, logits.narrow(axis + 1, a, b - a).clone())


def clear(values, margin=1e-4):
    """Where the decision is not a matter of rounding: the largest class leads by ``margin``."""
    top = np.sort(values, 0)
    return top[-1] - top[-2] > margin


def itk(array, geometry):
    image = sitk.GetImageFromArray(np.ascontiguousarray(array.transpose(2, 1, 0)))
    flip = np.diag([-1.0, -1.0, 1.0])
    image.SetSpacing(geometry.spacing)
    image.SetOrigin((flip @ geometry.affine[:3, 3]).tolist())
    image.SetDirection((flip @ geometry.affine[:3, :3] / np.array(geometry.spacing)).ravel().tolist())
    return image


def turned(geometry, axes, flips):
    """The same voxels with axes in another order and direction."""
    matrix = np.zeros((4, 4))
    matrix[3, 3] = 1
    for b, a in enumerate(axes):
        matrix[a, b] = -1 if flips[b] else 1
        matrix[a, 3] = geometry.shape[a] - 1 if flips[b] else 0
    return Geometry(tuple(geometry.shape[a] for a in axes), geometry.affine @ matrix)


@settings(max_examples=60, deadline=None)
@given(
    source=geometries(low=1, high=12),
    axes=st.permutations(range(3)),
    flips=st.tuples(*(st.booleans(),) * 3),
    factor=st.tuples(*(st.floats(0.4, 2.5),) * 3),
    margin=st.tuples(*(st.integers(-3, 3),) * 6),
    cuts=st.sets(st.integers(1, 11), max_size=4),
    slab_axis=st.sampled_from([0, 2]),
    seed=st.integers(0, 9),
)
def test_parallel_grids_equal_scipy(source, axes, flips, factor, margin, cuts, slab_axis, seed):
    """Respaced, reoriented, cropped and padded grids, from whole logits and from slabs along either axis."""
    target = turned(source.with_spacing([s * f for s, f in zip(source.spacing, factor, strict=True)]), axes, flips)
    start = margin[:3]
    stop = [max(a + 1, n + m) for a, n, m in zip(start, target.shape, margin[3:], strict=True)]
    target = target.cropped(start, stop)
    logits = smooth_logits(4, source.shape, seed)
    expected, inside, sure = by_points(logits, source, target)
    slabs = in_slabs(logits, [c for c in cuts if c < source.shape[slab_axis]], slab_axis)
    for given_logits in (logits, slabs):
        labels = decide(given_logits, source, target)
        assert labels.dtype == torch.uint8 and labels.shape == target.shape
        wrong = (labels.numpy() != np.where(inside, expected.argmax(0), 0)) & clear(expected) & sure
        assert not wrong.any()
    masks = decide(logits, source, target, overlapping=True).numpy()
    assert not ((masks != ((expected >= 0) & inside)) & (np.abs(expected) > 1e-4) & sure).any()
    got = probabilities_on(in_slabs(logits, []), source, target).numpy()
    softmax = np.exp(expected) / np.exp(expected).sum(0)
    outside = np.eye(4)[0].reshape(4, 1, 1, 1)
    np.testing.assert_allclose(got[:, sure], np.where(inside, softmax, outside)[:, sure], atol=1e-4)


@settings(max_examples=40, deadline=None)
@given(source=geometries(low=2, high=9), target=geometries(low=2, high=9), seed=st.integers(0, 9))
def test_oblique_grids_equal_scipy(source, target, seed):
    shift = source.to_world((np.array(source.shape) - 1) / 2) - target.to_world((np.array(target.shape) - 1) / 2)
    affine = target.affine.copy()
    affine[:3, 3] += shift  # one centre, so that the grids meet
    target = Geometry(target.shape, affine)
    logits = smooth_logits(3, source.shape, seed)
    expected, inside, sure = by_points(logits, source, target)
    for given_logits in (logits, in_slabs(logits, [1])):
        labels = decide(given_logits, source, target).numpy()
        assert not ((labels != np.where(inside, expected.argmax(0), 0)) & clear(expected) & sure).any()
    got = probabilities_on(logits, source, target, overlapping=True).numpy()
    np.testing.assert_allclose(got[:, sure], np.where(inside, 1 / (1 + np.exp(-expected)), 0)[:, sure], atol=1e-4)


@pytest.mark.parametrize("angle", [0.0, 0.2])
def test_labels_lie_where_simpleitk_puts_them(angle):
    source = Geometry.from_parts((17, 23, 11), (1.5, 1.1, 2.9), (-20, 31, 5), rotation((0.1, -0.2, 0.3)))
    turn = np.eye(4)
    turn[:3, :3] = rotation((angle, 0, angle))
    finer = source.with_spacing((0.9, 0.8, 2.0))
    target = Geometry(finer.shape, turn @ finer.affine).cropped((2, 2, 2), [n - 2 for n in finer.shape])
    logits = smooth_logits(3, source.shape)
    reference = [
        sitk.GetArrayFromImage(sitk.Resample(itk(c, source), itk(np.zeros(target.shape), target), sitk.Transform(),
                                             sitk.sitkLinear, float("nan"), sitk.sitkFloat64)).transpose(2, 1, 0)
        for c in logits.double().numpy()
    ]  # fmt: skip
    expected = np.stack(reference)
    known = np.isfinite(expected).all(0)
    assert known.mean() > 0.3
    labels = decide(logits, source, target).numpy()
    assert not (labels != expected.argmax(0))[known & clear(np.nan_to_num(expected))].any()


def test_labels_equal_torch_trilinear_where_most_voxels_are_uniform_and_where_none_is():
    source = Geometry.from_parts((13, 40, 34), (3, 0.9, 0.8))
    target = source.with_shape((26, 75, 64))
    blob = torch.full((3, 13, 40, 34), -1.0)
    blob[0] = 0
    blob[1, 3:9, 10:30, 8:20] = 2
    blob[2, 5:8, 15:20, 10:14] = 5
    noise = torch.randn(3, 13, 40, 34, generator=torch.Generator().manual_seed(0))
    for logits in (blob, noise):
        up = torch.nn.functional.interpolate(logits[None].double(), target.shape, mode="trilinear")[0].numpy()
        labels = decide(logits, source, target).numpy()
        assert not (labels != up.argmax(0))[clear(up)].any() and len(np.unique(labels)) == 3


def test_same_grid_gives_the_argmax_itself():
    source = Geometry.from_parts((5, 7, 6), (1, 2, 3))
    logits = smooth_logits(300, source.shape)
    labels = decide(logits, source, source)
    assert labels.dtype == torch.int16 and torch.equal(labels.long(), logits.argmax(0))


def test_half_precision_logits_and_results():
    source = Geometry.from_parts((5, 7, 6), (1, 2, 3))
    target = source.with_shape((9, 8, 11))
    logits = smooth_logits(3, source.shape).half()
    got = probabilities_on(logits, source, target, dtype=torch.float16)
    assert got.dtype == torch.float16
    torch.testing.assert_close(got.float(), probabilities_on(logits.float(), source, target), atol=1e-3, rtol=0)
    assert torch.equal(got.float().argmax(0), decide(logits, source, target).long()) or clear(got.numpy()).mean() < 1


def test_a_target_beside_the_source_is_background():
    source = Geometry.from_parts((5, 7, 6), (1, 2, 3))
    target = Geometry.from_parts((4, 4, 4), (1, 2, 3), (100, 0, 0))
    logits = smooth_logits(2, source.shape)
    assert not decide(logits, source, target).any()
    probabilities = probabilities_on(in_slabs(logits, [2]), source, target)
    assert (probabilities[0] == 1).all() and not probabilities[1].any()


@pytest.mark.parametrize("patch", [(6, 5, 4), (6, 5)])
def test_from_windows_to_the_native_grid_without_all_logits(patch):
    """The identity as a network: labels of an image of logits, in 3D and slice by slice."""
    source = Geometry.from_parts((14, 9, 8), (1.5, 2, 3))
    target = turned(source.with_shape((21, 13, 10)), (2, 0, 1), (True, False, True))
    image = smooth_logits(3, source.shape)
    largest = 0

    def watched():
        nonlocal largest
        for slab in sliding_logits_slabs(lambda x: x, image, patch, batch=2):
            largest = max(largest, slab.logits.untyped_storage().nbytes())
            yield slab

    labels = decide(watched(), source, target)
    expected, _, _ = by_points(image, source, target)
    assert not (labels.numpy() != expected.argmax(0))[clear(expected)].any()
    assert largest < image.nbytes


def test_bad_input_is_refused():
    source = Geometry.from_parts((5, 7, 6), (1, 2, 3))
    target = source.with_shape((9, 8, 11))
    logits = smooth_logits(2, source.shape)
    with pytest.raises(ValueError, match="logits must cover the source grid"):
        decide(logits[:, 1:], source, target)
    with pytest.raises(ValueError, match="logits must cover the source grid"):
        decide([Slab(0, 0, 3, logits[:, :3])], source, target)
    with pytest.raises(ValueError, match="logits must cover the source grid"):
        decide([Slab(0, 0, 3, logits[:, :3]), Slab(0, 4, 5, logits[:, 4:])], source, target)
    with pytest.raises(ValueError, match="logits must cover the source grid"):
        decide([], source, target)
    logits[1, 2, 2, 2] = float("nan")
    for overlapping in (False, True):
        with pytest.raises(ValueError, match="got NaN"):
            decide(logits, source, target, overlapping=overlapping)
