"""Metrics against brute force in float64 and independent packages."""

from __future__ import annotations

import itertools
from functools import lru_cache

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from scipy.spatial.distance import cdist
from skimage import measure

from medseg import label_counts, metrics, surface

SIDES = (("gt_to_pred", "gt"), ("pred_to_gt", "pred"))  # of surface-distance


def blobs(rng: np.random.Generator, shape: tuple[int, ...], wobble: float = 0.4) -> tuple[np.ndarray, np.ndarray]:
    """Two masks that look alike, with holes, thin parts and contact with the edge."""
    field = ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    other = field + wobble * ndimage.gaussian_filter(rng.standard_normal(shape), 1.5)
    return field > 0.02, other > 0.02


def brute_border(mask: np.ndarray, spacing: tuple[float, ...]) -> np.ndarray:
    """(N, axes) positions in mm of the voxels with a face neighbour outside, voxel by voxel."""
    found = []
    for index in zip(*np.nonzero(mask), strict=True):
        for axis, step in itertools.product(range(mask.ndim), (-1, 1)):
            near = list(index)
            near[axis] += step
            if not 0 <= near[axis] < mask.shape[axis] or not mask[tuple(near)]:
                found.append(index)
                break
    return np.array(found, float) * spacing


def brute_scores(p: np.ndarray, r: np.ndarray, spacing: tuple[float, ...], tolerance: float) -> dict[str, float]:
    d = cdist(brute_border(p, spacing), brute_border(r, spacing))
    a, b = d.min(1), d.min(0)
    both = np.concatenate([a, b])
    return {
        "hd": both.max(),
        "voxel": max(np.percentile(a, 95), np.percentile(b, 95)),
        "pooled": np.percentile(both, 95),
        "assd": both.mean(),
        "nsd": np.mean(both <= tolerance + 1e-4),
    }


spacings = st.tuples(*[st.sampled_from([0.4, 0.8, 1.0, 1.3, 2.5, 5.0])] * 3)
shapes = st.tuples(st.integers(3, 9), st.integers(2, 12), st.integers(1, 7))


@settings(max_examples=60, deadline=None)
@given(shapes, spacings, st.integers(0, 10_000), st.sampled_from([0.4, 1.0, 2.4]), st.booleans())
def test_surface_scores_equal_brute_force(shape, spacing, seed, tolerance, fortran):
    p, r = blobs(np.random.default_rng(seed), shape)
    if not p.any() or not r.any():
        return
    order = np.asfortranarray if fortran else np.ascontiguousarray
    flat = [a for a, n in enumerate(shape) if n > 1]
    squeezed = brute_scores(p.squeeze(), r.squeeze(), tuple(spacing[a] for a in flat), tolerance)
    for definition in ("voxel", "pooled"):
        got = metrics.surface_scores(order(p), r, spacing, tolerance_mm=tolerance, definition=definition)
        assert got.hd_mm == pytest.approx(squeezed["hd"], abs=1e-4)
        assert got.hd95_mm == pytest.approx(squeezed[definition], abs=1e-4)
        assert got.assd_mm == pytest.approx(squeezed["assd"], abs=1e-4)
        assert got.nsd == pytest.approx(squeezed["nsd"], abs=1e-12)


@lru_cache(maxsize=4096)
def brute_area(cell: bytes, spacing: tuple[float, ...]) -> float:
    """Area between 8 voxel centres: each part of the rarer kind, joined by faces, is wrapped on its own."""
    inside = np.frombuffer(cell, bool).reshape(2, 2, 2)
    parts, count = ndimage.label(inside if inside.sum() <= 4 else ~inside)
    meshes = [
        measure.marching_cubes((parts == n).astype(np.float32), 0.5, spacing=spacing)[:2] for n in range(1, count + 1)
    ]
    total = 0.0
    for vertices, faces in meshes:
        a, b, c = vertices[faces].astype(float).transpose(1, 0, 2)
        total += float(np.linalg.norm(np.cross(b - a, c - a), axis=1).sum()) / 2
    return total


def brute_elements(mask: np.ndarray, spacing: tuple[float, ...]) -> tuple[np.ndarray, np.ndarray]:
    """(N, 3) positions in mm of the cells between voxels, some inside and some outside, and the area in each."""
    padded = np.pad(mask, 1)
    places, areas = [], []
    for at in np.ndindex(*(n - 1 for n in padded.shape)):
        cell = padded[tuple(slice(i, i + 2) for i in at)]
        if cell.any() and not cell.all():
            places.append(at)
            areas.append(brute_area(cell.tobytes(), spacing))
    return (np.array(places) + 0.5) * spacing, np.array(areas)


@pytest.mark.parametrize(
    ("inside", "area"),
    [
        # triangles over half edges of 0.5, 1 and 1.5 mm: |(0.5, 1, 0) x (0.5, 0, 1.5)| / 2
        ([(0, 0, 0)], np.sqrt(1.5**2 + 0.75**2 + 0.5**2) / 2),
        ([(0, 0, 0), (1, 1, 0)], np.sqrt(1.5**2 + 0.75**2 + 0.5**2)),  # meet along an edge
        ([(0, 0, 0), (1, 1, 1)], np.sqrt(1.5**2 + 0.75**2 + 0.5**2)),  # meet at a corner
        ([(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 0)], 2 * np.sqrt(1.5**2 + 0.75**2 + 0.5**2)),
        ([(0, 0, 0), (0, 0, 1)], 3 * np.hypot(0.5, 1)),  # a rectangle
        ([(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)], 2 * 3),  # a plane
    ],
)
def test_area_of_elements_by_hand(inside, area):
    """Voxels of 1 x 2 x 3 mm; a pattern and its complement have one area."""
    sizes = surface._element_sizes((1.0, 2.0, 3.0))
    code = sum(1 << (i + 2 * j + 4 * k) for i, j, k in inside)
    assert sizes[code] == pytest.approx(area, rel=1e-5)
    assert sizes[255 - code] == sizes[code]


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.7, 1.1, 2.5), (0.4, 5.0, 1.3), (0.7, 2.5), (3.0, 0.5)])
def test_area_of_every_pattern_equals_surface_distance(spacing):
    tables = pytest.importorskip("surface_distance.lookup_tables", reason="surface-distance is not installed")
    if len(spacing) == 3:
        want = tables.create_table_neighbour_code_to_surface_area(spacing)
        kernel = tables.ENCODE_NEIGHBOURHOOD_3D_KERNEL
    else:
        want = tables.create_table_neighbour_code_to_contour_length(spacing)
        kernel = tables.ENCODE_NEIGHBOURHOOD_2D_KERNEL
    ours = surface._element_sizes(spacing)
    for code, cell in enumerate(itertools.product((0, 1), repeat=kernel.size)):
        corners = np.array(cell[::-1]).reshape(kernel.shape).T
        assert ours[code] == pytest.approx(want[int((corners * kernel).sum())], rel=1e-5), code


@pytest.mark.parametrize("shape", [(24, 19, 13), (31, 26)])
@pytest.mark.parametrize("seed", range(4))
def test_area_scores_equal_surface_distance(shape, seed):
    """Blobs, and noise with every pattern of neighbours."""
    deepmind = pytest.importorskip("surface_distance", reason="surface-distance is not installed")
    rng = np.random.default_rng(seed)
    spacing = (0.7, 1.1, 2.5)[: len(shape)]
    p, r = blobs(rng, shape) if seed % 2 else rng.random((2, *shape)) < (0.06, 0.5)[seed // 2]
    distances = deepmind.compute_surface_distances(r, p, spacing)
    got = metrics.surface_scores(p, r, spacing, tolerance_mm=0.9, definition="area")
    total = sum(float(distances[f"distances_{d}"] @ distances[f"surfel_areas_{s}"]) for d, s in SIDES)
    size = sum(float(distances[f"surfel_areas_{s}"].sum()) for _, s in SIDES)
    assert got.hd_mm == pytest.approx(deepmind.compute_robust_hausdorff(distances, 100), abs=1e-5)
    assert got.hd95_mm == pytest.approx(deepmind.compute_robust_hausdorff(distances, 95), abs=1e-5)
    assert got.assd_mm == pytest.approx(total / size, abs=1e-6)
    assert got.nsd == pytest.approx(deepmind.compute_surface_dice_at_tolerance(distances, 0.9), abs=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.tuples(st.integers(3, 8), st.integers(2, 9), st.integers(2, 6)), spacings, st.integers(0, 10_000))
def test_area_scores_equal_brute_force(shape, spacing, seed):
    p, r = blobs(np.random.default_rng(seed), shape)
    if not p.any() or not r.any():
        return
    (x, w), (y, v) = brute_elements(p, spacing), brute_elements(r, spacing)
    d = cdist(x, y)
    a, b = d.min(1), d.min(0)
    got = metrics.surface_scores(p, r, spacing, tolerance_mm=1.5, definition="area")
    assert got.hd_mm == pytest.approx(max(a.max(), b.max()), abs=1e-4)
    assert got.assd_mm == pytest.approx((a @ w + b @ v) / (w.sum() + v.sum()), abs=1e-4)
    assert got.nsd == pytest.approx((w[a <= 1.5001].sum() + v[b <= 1.5001].sum()) / (w.sum() + v.sum()), abs=1e-5)
    ends = []
    for share in (0.95 - 1e-5, 0.95 + 1e-5):  # where the share falls between two elements, either is right
        sides = []
        for values, weights in ((a, w), (b, v)):
            order = np.argsort(values)
            sides.append(values[order][np.searchsorted(np.cumsum(weights[order]), share * weights.sum())])
        ends.append(max(sides))
    assert ends[0] - 1e-4 <= got.hd95_mm <= ends[1] + 1e-4


@pytest.mark.parametrize("definition", ["voxel", "pooled", "area"])
@pytest.mark.parametrize("shift", [0, 1, 9])
def test_tensor_path_equals_array_path(definition, shift, monkeypatch):
    p, r = blobs(np.random.default_rng(shift), (21, 30, 14))
    r = np.roll(r, shift, 1)
    spacing = (0.7, 1.1, 3.0)
    monkeypatch.setattr(surface, "CHUNK", 5000)  # several chunks
    tensors = surface.surface_distances(torch.as_tensor(p), torch.as_tensor(r), spacing, definition)
    arrays = surface.surface_distances(p, r, spacing, definition)
    for t, a in zip(tensors, arrays, strict=True):
        np.testing.assert_allclose(t.beyond, a.beyond, atol=1e-4)
        assert t.size == pytest.approx(a.size, rel=1e-5)
        assert t.percentile(95) == pytest.approx(a.percentile(95), abs=1e-4)
        assert t.total == pytest.approx(a.total, rel=1e-5)


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (0.3, 2.0, 5.0)])
def test_search_hands_over_to_a_distance_transform(spacing):
    """Far apart, the search around each voxel gives up; the result stays exact."""
    p, r = np.zeros((60, 12, 18), bool), np.zeros((60, 12, 18), bool)
    p[1:4, 2:9, 3:11] = True
    r[50:58, 1:5, 12:17] = r[10, 6, 4] = True
    got = metrics.surface_scores(p, r, spacing)
    want = brute_scores(p, r, spacing, 1.0)
    assert (got.hd_mm, got.hd95_mm, got.assd_mm) == pytest.approx((want["hd"], want["voxel"], want["assd"]), abs=1e-4)


def test_distance_transform_equals_scipy():
    targets = np.random.default_rng(1).random((9, 17, 6)) > 0.97
    got = surface.distance_transform(torch.as_tensor(targets), (0.5, 1.5, 4.0))
    np.testing.assert_allclose(got, ndimage.distance_transform_edt(~targets, sampling=(0.5, 1.5, 4.0)), atol=1e-4)


def test_hausdorff_equals_simpleitk():
    p, r = blobs(np.random.default_rng(3), (20, 25, 12))
    images = []
    for mask in (p, r):
        image = sitk.GetImageFromArray(mask.transpose(2, 1, 0).astype(np.uint8))
        image.SetSpacing((0.8, 1.2, 3.0))
        images.append(image)
    # ITK measures from every voxel of one mask to the other mask, which has the same maximum
    sitk_filter = sitk.HausdorffDistanceImageFilter()
    sitk_filter.Execute(*images)
    got = metrics.surface_scores(p, r, (0.8, 1.2, 3.0))
    assert got.hd_mm >= sitk_filter.GetHausdorffDistance() - 1e-4
    solid = np.zeros((20, 25, 12), bool)
    solid[4:12, 5:20, 3:9] = True
    moved = np.roll(solid, 3, 0)
    assert metrics.surface_scores(solid, moved, (0.8, 1.2, 3.0)).hd_mm == pytest.approx(2.4, abs=1e-4)


def test_peers_agree_on_their_own_definitions():
    monai = pytest.importorskip("monai.metrics")
    peer = pytest.importorskip("medpy.metric.binary")
    deepmind = pytest.importorskip("surface_distance")
    spacing = (0.7, 1.1, 2.5)
    p, r = blobs(np.random.default_rng(5), (26, 22, 15))
    voxel, pooled, area = (metrics.surface_scores(p, r, spacing, definition=d) for d in ("voxel", "pooled", "area"))
    pair = [torch.as_tensor(m)[None, None].float() for m in (p, r)]
    hd95 = monai.compute_hausdorff_distance(*pair, include_background=True, spacing=spacing, percentile=95)
    assert voxel.hd95_mm == pytest.approx(float(hd95), abs=1e-3)
    nsd = monai.compute_surface_dice(*pair, [1.0], include_background=True, spacing=spacing)
    assert voxel.nsd == pytest.approx(float(nsd), abs=1e-5)
    assert pooled.hd95_mm == pytest.approx(peer.hd95(p, r, spacing), abs=1e-3)
    assert pooled.assd_mm == pytest.approx(peer.assd(p, r, spacing), abs=1e-3)
    distances = deepmind.compute_surface_distances(r, p, spacing)
    assert area.hd95_mm == pytest.approx(deepmind.compute_robust_hausdorff(distances, 95), abs=1e-3)
    assert area.nsd == pytest.approx(deepmind.compute_surface_dice_at_tolerance(distances, 1.0), abs=1e-6)


def test_area_of_a_box_and_a_plane():
    """A slab's elements sum to its area (mm2); a shift along the normal moves every weighted percentile by it."""
    slab = np.zeros((40, 50, 20), bool)
    slab[:, :, 5:9] = True
    (a, _) = surface.surface_distances(slab, slab, (2.0, 1.0, 3.0), "area")
    assert a.size == pytest.approx(2 * (40 * 2 * 50 * 1 + 4 * 3 * (40 * 2 + 50 * 1)), rel=0.05)
    moved = np.roll(slab, 1, 2)
    assert metrics.surface_scores(slab, moved, (2.0, 1.0, 3.0), definition="area").hd95_mm == pytest.approx(3, abs=1e-4)


def test_tolerance_counts_multiples_of_the_spacing():
    p = np.zeros((30, 8, 9), bool)
    p[3:9, 2:6, 2:7] = True
    r = np.roll(p, 3, 0)
    scores = metrics.surface_scores(p[:, 2:6, 2:7], r[:, 2:6, 2:7], (0.8, 1.0, 1.0), tolerance_mm=2.4)
    assert scores.nsd == 1


# ---------------------------------------------------------------------------------------------------------------------
# Overlap


@settings(max_examples=40, deadline=None)
@given(shapes, st.integers(0, 10_000), st.sampled_from([np.uint8, np.int16, np.uint16, np.int64]), st.booleans())
def test_overlap_equals_counting(shape, seed, dtype, on_device_path):
    rng = np.random.default_rng(seed)
    p, r = rng.choice([0, 0, 0, 1, 4, 7, 99], (2, *shape)).astype(dtype)
    labels = [4, 1, 7, 5]
    if on_device_path:
        table = np.zeros(9, np.intp)
        table[labels] = np.arange(1, 5)
        tensors = [torch.as_tensor(x.astype(np.int64)) for x in (p, r)]
        matrix, boxes = label_counts._scan_device(*tensors, table, 5)
    else:
        matrix, boxes = label_counts.scan(np.asfortranarray(p), r, labels)
    assert matrix.sum() == p.size
    for n, label in enumerate(labels, 1):
        for m, other in enumerate(labels, 1):
            assert matrix[n, m] == np.sum((r == label) & (p == other))
        either = np.nonzero((p == label) | (r == label))
        want = tuple(slice(int(e.min()), int(e.max()) + 1) for e in either) if either[0].size else None
        assert boxes[n - 1] == want
    counts = metrics.overlap(p, r, labels)
    sets = [(set(np.flatnonzero(p == n)), set(np.flatnonzero(r == n))) for n in labels]
    for n, (a, b) in enumerate(sets):
        if a | b:
            assert metrics.iou(counts)[n] == pytest.approx(len(a & b) / len(a | b))
            assert metrics.dice(counts)[n] == pytest.approx(2 * len(a & b) / (len(a) + len(b)))
        else:
            assert np.isnan(metrics.iou(counts)[n])
        if a and b:
            assert metrics.precision(counts)[n] == pytest.approx(len(a & b) / len(a))
            assert metrics.recall(counts)[n] == pytest.approx(len(a & b) / len(b))


def test_negative_labels_are_background():
    p = np.array([[-1, 2, -2, 0, 300]], np.int16)
    assert metrics.confusion(p, np.full_like(p, 2), [2]).tolist() == [[0, 0], [4, 1]]


def test_layers_may_overlap():
    p, r = np.zeros((2, 2, 5, 4, 3), bool)
    p[0, :3], p[1, 2:] = True, True
    r[0, :2], r[1, 1:] = True, True
    rows = metrics.structure_scores(p, r, None, (2.0, 1.0, 1.0))
    assert [row["iou"] for row in rows] == pytest.approx([2 / 3, 3 / 4])
    assert rows[1]["volume_mm3"] == 3 * 4 * 3 * 2
    assert [row["hd_mm"] for row in rows] == pytest.approx([2, 2])


def test_label_maps_and_layers_give_the_same_rows():
    rng = np.random.default_rng(0)
    a, b = blobs(rng, (17, 13, 9))
    c, d = blobs(rng, (17, 13, 9))
    p, r = np.where(a, 1, 3 * c), np.where(b, 1, 3 * d)
    spacing = (0.9, 1.4, 2.0)
    maps = metrics.structure_scores(p.astype(np.uint8), r.astype(np.int16), [1, 3], spacing, tolerance_mm=1.5)
    layers = metrics.structure_scores(
        np.stack([p == 1, p == 3]), np.stack([r == 1, r == 3]), None, spacing, tolerance_mm=1.5
    )
    assert maps == layers
    tensors = metrics.structure_scores(torch.as_tensor(p), torch.as_tensor(r), [1, 3], spacing, tolerance_mm=1.5)
    assert maps == tensors


@pytest.mark.parametrize("threads", [2, 9])
def test_structures_at_a_time_give_the_same_rows(threads):
    rng = np.random.default_rng(0)
    (a, b), (c, d) = blobs(rng, (19, 14, 9)), blobs(rng, (19, 14, 9))
    p, r = np.where(a, 1, 3 * c).astype(np.uint8), np.where(b, 1, 3 * d).astype(np.uint8)
    one, several = (metrics.structure_scores(p, r, [3, 1, 8], (0.9, 1.4, 2.0), threads=n) for n in (1, threads))
    np.testing.assert_equal(several, one)
    assert metrics.structure_scores(p, r, [], (0.9, 1.4, 2.0), threads=threads) == []


@pytest.mark.parametrize("definition", ["voxel", "pooled", "area"])
def test_what_runs_on_a_gpu_gives_the_same_rows(definition, monkeypatch):
    """The path of tensors on another device, taken on the CPU: the same numbers as arrays, in the form of both inputs."""
    rng = np.random.default_rng(0)
    (a, b), (c, d) = blobs(rng, (19, 14, 9)), blobs(rng, (19, 14, 9))
    p, r = np.where(a, 1, 3 * c).astype(np.uint8), np.where(b, 1, 3 * d).astype(np.uint8)
    p[0, 0, 0], spacing = 7, (0.9, 1.4, 2.0)
    labels = [1, 3, 7, 9]
    host = metrics.structure_scores(p, r, labels, spacing, definition=definition)
    monkeypatch.setattr(label_counts, "HOST", "none")
    tensors = torch.as_tensor(p), torch.as_tensor(r)
    monkeypatch.setattr(label_counts, "_scan_host", None)  # would fail
    monkeypatch.setattr(surface, "_nearest", None)
    layers = [torch.stack([x == n for n in labels]) for x in tensors]
    for device in (
        metrics.structure_scores(*tensors, labels, spacing, definition=definition),
        metrics.structure_scores(*layers, None, spacing, definition=definition),
    ):
        for got, want in zip(device, host, strict=True):
            assert got == pytest.approx(want, abs=2e-5, nan_ok=True)


@pytest.mark.parametrize("host", ["cpu", "none"])
def test_label_beyond_the_type_of_a_map_is_missing_there(host, monkeypatch):
    """300 is 44 modulo 256: a map of uint8 that holds 44 does not hold 300."""
    monkeypatch.setattr(label_counts, "HOST", host)
    p, r = torch.zeros(8, 7, 5, dtype=torch.uint8), torch.zeros(8, 7, 5, dtype=torch.int16)
    p[2:5, 1:4, 1:3], r[2:5, 1:4, 1:3] = 44, 300
    for pair in ((p, r), (r, p)):
        (row,) = metrics.structure_scores(*pair, [300], (1.0, 2.0, 3.0))
        assert (row["hd_mm"], row["hd95_mm"], row["nsd"]) == pytest.approx((np.sqrt(8**2 + 14**2 + 15**2),) * 2 + (0,))
        assert row["dice"] == 0


def test_distances_of_tensors_are_exact():
    """Against the exact transform in C++, on anisotropic grids with few and many targets."""
    edt = pytest.importorskip("edt")
    rng = np.random.default_rng(2)
    for shape, spacing in (((31, 17, 12), (0.7, 1.1, 4.0)), ((1, 40, 9), (2.0, 0.5, 0.9)), ((23, 18), (0.3, 3.0))):
        for share in (0.002, 0.2):
            targets = rng.random(shape) < share
            targets.flat[5] = True
            got = surface.distance_transform(torch.as_tensor(targets), spacing)
            np.testing.assert_allclose(got, edt.edt(~targets, anisotropy=spacing), rtol=2e-6, atol=1e-6)


def test_contract_of_the_undefined():
    nothing, something = np.zeros((6, 5, 4), np.uint8), np.zeros((6, 5, 4), np.uint8)
    something[2:4, 1:3, 1:3] = 1
    spacing = (1.0, 2.0, 3.0)
    (both_empty,) = metrics.structure_scores(nothing, nothing, [1], spacing)
    assert both_empty.pop("volume_mm3") == both_empty.pop("reference_volume_mm3") == 0
    assert all(np.isnan(v) for v in both_empty.values())
    diagonal = np.sqrt(6**2 + 10**2 + 12**2)
    for pair in ((nothing, something), (something, nothing)):
        (row,) = metrics.structure_scores(*pair, [1], spacing)
        assert [row[k] for k in ("iou", "dice", "precision", "recall", "nsd")] == [0] * 5
        assert [row[k] for k in ("hd_mm", "hd95_mm", "assd_mm")] == pytest.approx([diagonal] * 3)
        assert np.isnan(metrics.surface_scores(*pair, spacing, missing="nan").hd95_mm)
    full = np.ones((6, 5, 4), bool)
    assert metrics.surface_scores(full, full, spacing) == (0, 0, 0, 1)


def test_missing_is_never_nearer_than_the_farthest_mistake():
    p, r = np.zeros((2, 7, 6, 5), bool)
    p[0, 0, 0], r[-1, -1, -1] = True, True
    spacing = (0.5, 1.0, 4.0)
    assert metrics.surface_scores(p, r, spacing).hd_mm < metrics.surface_scores(p * False, r, spacing).hd_mm


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((np.zeros((2, 3)), np.zeros((2, 3), int), [1]), TypeError, "prediction must hold integers"),
        ((np.zeros((2, 3), int), np.zeros((3, 2), int), [1]), ValueError, r"one shape, got \(2, 3\) and \(3, 2\)"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), [0, 1]), ValueError, "labels must be distinct numbers from 1"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), [2, 2]), ValueError, "labels must be distinct"),
        ((np.zeros((2, 3), int), np.zeros((2, 3), int), None), TypeError, "layers must be bool"),
        ((torch.zeros(2, 3), torch.zeros(2, 3), [1]), TypeError, "prediction must hold integers"),
    ],
)
def test_bad_input(arguments, error, message):
    with pytest.raises(error, match=message):
        metrics.overlap(*arguments)


@pytest.mark.parametrize("spacing", [(1.0, 1.0), (1.0, 0.0, 1.0), (1.0, np.nan, 1.0)])
def test_bad_spacing(spacing):
    mask = np.ones((3, 4, 5), bool)
    with pytest.raises(ValueError, match="spacing must be 3 positive numbers"):
        metrics.surface_scores(mask, mask, spacing)


@pytest.mark.parametrize("more", [{"definition": "mesh"}, {"missing": "zero"}])
@pytest.mark.parametrize("full", [True, False])
def test_bad_rules(more, full):
    """Refused whether there is a surface or not."""
    mask = np.full((3, 4, 5), full)
    ((name, value),) = more.items()
    for score in (
        metrics.surface_scores,
        lambda p, r, s, **m: metrics.structure_scores(p[None], r[None], None, s, **m),
    ):
        with pytest.raises(ValueError, match=f"{name} must be one of .*, got '{value}'"):
            score(mask, mask, (1, 1, 1), **more)


@pytest.mark.parametrize("tolerance", [-0.5, np.nan])
def test_bad_tolerance(tolerance):
    mask = np.ones((3, 4, 5), bool)
    with pytest.raises(ValueError, match=r"tolerance_mm must be 0 or more \(mm\), got"):
        metrics.surface_scores(mask, mask, (1, 1, 1), tolerance_mm=tolerance)
    for labels, maps in (([1], mask.astype(np.uint8)), (None, mask[None])):
        with pytest.raises(ValueError, match=r"tolerance_mm must be 0 or more \(mm\), got"):
            metrics.structure_scores(maps, maps, labels, (1, 1, 1), tolerance_mm=tolerance)
    assert metrics.surface_scores(mask, mask, (1, 1, 1), tolerance_mm=0).nsd == 1
