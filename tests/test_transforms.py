"""Preprocessing against nibabel and plain numpy."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import geometries
from hypothesis import given, settings
from hypothesis import strategies as st

from medseg.losses import IGNORE
from medseg.patches import PreparedCase, draw_batch
from medseg.plan import ChannelPlan, Plan, StructurePlan
from medseg.transforms import normalise, planned_geometry, preprocessing
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume


def make_plan(dims: int = 3, **changes: object) -> Plan:
    values = {
        "model": f"unet{dims}d",
        "dims": dims,
        "channels": (ChannelPlan(name="MR", scheme="zscore"),),
        "structures": (StructurePlan(number=7, name="b", color=(1, 2, 3)),),
        "orientation": "RAS",
        "spacing": (1.0, 1.5, 2.0),
        "patch": (8, 6, 4)[:dims],
        "batch": 4,
        "features": (4, 6),
        "strides": ((2,) * dims,),
        "kernels": ((3,) * dims,) * 2,
        "mirror": (),
    }
    return Plan.model_validate({**values, **changes})


class TestPlannedGrid:
    @settings(deadline=None, max_examples=40)
    @given(geometry=geometries())
    def test_orientation_is_nibabels_and_the_box_stays(self, geometry: Geometry) -> None:
        grid = planned_geometry(geometry, make_plan(spacing=geometry.spacing))
        image = nib.Nifti1Image(np.zeros(geometry.shape, np.int16), geometry.affine)
        canonical = nib.as_closest_canonical(image)
        moved = planned_geometry(geometry, make_plan(spacing=tuple(np.abs(nib.affines.voxel_sizes(canonical.affine)))))
        assert moved.shape == canonical.shape
        assert np.allclose(moved.affine, canonical.affine, atol=1e-6)
        assert set("".join(nib.aff2axcodes(grid.affine))) <= set("RAS")

    @settings(deadline=None, max_examples=40)
    @given(geometry=geometries(low=5, high=20))
    def test_respacing_keeps_the_outer_faces(self, geometry: Geometry) -> None:
        grid = planned_geometry(geometry, make_plan())

        def faces(g: Geometry) -> np.ndarray:
            ends = [(-0.5, n - 0.5) for n in g.shape]
            return g.to_world([(a, b, c) for a in ends[0] for b in ends[1] for c in ends[2]])

        old, new = faces(geometry), faces(grid)
        gaps = np.linalg.norm(old[:, None] - new[None], axis=2).min(1)  # the corners may have changed order
        assert gaps.max() < 1e-6

    def test_skewed_grids_are_refused(self) -> None:
        affine = np.diag([1.0, 1, 2, 1])
        affine[1, 2] = 0.6
        with pytest.raises(GeometryError, match="right angles"):
            planned_geometry(Geometry((4, 5, 6), affine), make_plan())


class TestPreprocessing:
    def test_labels_become_class_indices_on_the_same_voxels_as_the_image(self) -> None:
        geometry = Geometry.from_parts((9, 7, 5), (1.0, 1.5, 2.0), (3, 4, 5), np.diag([-1.0, -1, 1]))
        array = np.zeros(geometry.shape, np.float32)
        labels = np.zeros(geometry.shape, np.uint8)
        array[1:4, 2:5, 1:3], labels[1:4, 2:5, 1:3] = 50, 7
        out = preprocessing(make_plan())(
            {"case": "x", "image": Volume(array, geometry), "label": LabelMap(labels, geometry, (Structure(7, "b"),))}
        )
        assert set(np.unique(out["label"])) == {0, 1}
        image = out["image"][0].numpy()
        assert np.array_equal(image > image.mean(), out["label"].numpy() == 1)
        assert np.array_equal(np.flip(array, (0, 1)) > 0, out["label"].numpy() == 1)  # LPS became RAS
        assert out["geometry"].orientation == "RAS"
        assert torch.allclose(out["image"].affine, torch.from_numpy(out["geometry"].affine))

    def test_skewed_image_and_label_are_straightened_together(self) -> None:
        affine = np.diag([1.0, 1.5, 2.0, 1])
        affine[1, 2] = 0.6
        geometry = Geometry((12, 11, 10), affine)
        labels = np.zeros(geometry.shape, np.uint8)
        labels[3:9, 3:8, 2:8] = 7
        image = Volume(labels * 100.0, geometry)
        out = preprocessing(make_plan())({"case": "x", "image": image, "label": LabelMap(labels, geometry)})
        assert not out["geometry"].is_skewed
        assert out["label"].shape == out["geometry"].shape == out["image"].shape[1:]
        inside = out["image"][0].numpy()[out["label"].numpy() == 1]
        outside = out["image"][0].numpy()[out["label"].numpy() == 0]
        assert np.median(inside) > np.percentile(outside, 95)

    def test_label_that_is_not_in_the_plan_is_refused(self) -> None:
        geometry = Geometry((4, 5, 6), np.diag([1.0, 1.5, 2, 1]))
        labels = LabelMap(np.full(geometry.shape, 9, np.uint8), geometry)
        with pytest.raises(ValueError, match=r"labels must be in the plan \(7\), got 9 in case x"):
            preprocessing(make_plan())({"case": "x", "image": Volume(np.ones((4, 5, 6)), geometry), "label": labels})

    def test_label_on_another_grid_is_refused(self) -> None:
        geometry = Geometry((4, 5, 6), np.diag([1.0, 2, 3, 1]))
        moved = Geometry((4, 5, 6), np.diag([1.0, 2, 3.1, 1]))
        data = {"case": "x", "image": Volume(np.ones((4, 5, 6)), geometry)}
        with pytest.raises(GeometryError, match="label map and image of case x"):
            preprocessing(make_plan())({**data, "label": LabelMap(np.ones((4, 5, 6), int), moved)})


class TestNormalise:
    def test_zscore_is_robust_to_absurd_voxels(self) -> None:
        generator = np.random.default_rng(0)
        clean = generator.normal(500, 50, (1, 20, 22, 24)).astype(np.float32)
        spoilt = clean.copy()
        spoilt[0, 3, 4, 5] = 1.7e6
        channel = [ChannelPlan(name="MR", scheme="zscore")]
        a, b = normalise(clean, channel), normalise(spoilt, channel)
        assert abs(float(a.mean())) < 1e-3
        assert float(a.std()) == pytest.approx(1, abs=1e-3)
        assert np.abs(np.delete(a - b, np.ravel_multi_index((3, 4, 5), (20, 22, 24)))).max() < 0.02

    def test_ct_by_hand(self) -> None:
        channel = [ChannelPlan(name="CT", scheme="ct", low=-100, high=300, mean=50, std=25)]
        values = np.array([-1000, -100, 50, 75, 300, 3000.0]).reshape(1, 1, 1, 6)
        assert normalise(values, channel).ravel().tolist() == [-6, -6, 0, 1, 10, 10]

    def test_constant_image_stays_finite(self) -> None:
        assert np.array_equal(
            normalise(np.full((1, 2, 3, 4), 9.0), [ChannelPlan(name="m", scheme="zscore")]), np.zeros((1, 2, 3, 4))
        )

    def test_wrong_channels_and_nan_are_refused(self) -> None:
        with pytest.raises(ValueError, match="image must have 1 channels as planned, got 2"):
            normalise(np.ones((2, 2, 3, 4)), [ChannelPlan(name="m", scheme="zscore")])
        with pytest.raises(ValueError, match="voxels must be finite, got NaN or Inf in channel m"):
            normalise(np.full((1, 2, 3, 4), np.nan), [ChannelPlan(name="m", scheme="zscore")])


@dataclass(frozen=True)
class InMemory:
    """A prepared case whose voxels need no files."""

    image: np.ndarray
    label: np.ndarray
    places: dict[int, np.ndarray]
    known: tuple[bool, ...] = (True,)


def prepared(image: np.ndarray, label: np.ndarray, places: dict[int, np.ndarray]) -> PreparedCase:
    return cast(PreparedCase, InMemory(image, label, places))


class TestPatches:
    @settings(deadline=None, max_examples=30)
    @given(shape=st.tuples(st.integers(3, 14), st.integers(3, 9), st.integers(2, 9)), seed=st.integers(0, 99))
    def test_patches_are_true_windows_and_padding_is_ignored(self, shape: tuple[int, int, int], seed: int) -> None:
        voxels = np.arange(np.prod(shape), dtype=np.float32).reshape(1, *shape) + 1
        label = (voxels[0] % 5 == 0).astype(np.int16)
        places = {1: np.argwhere(label == 1)} if label.any() else {}
        case = prepared(voxels, label, places)
        images, labels, _ = draw_batch([case], make_plan(), 4, seed, step=1)
        assert images.shape == (4, 1, 8, 6, 4)
        for image, target in zip(images[:, 0].numpy(), labels.numpy(), strict=True):
            known = target != IGNORE
            assert known.sum() == np.prod(np.minimum(shape, (8, 6, 4)))  # as much of the image as fits
            at = np.argwhere(known)
            index = np.stack(np.unravel_index((image[known] - 1).astype(int), shape), 1)
            assert len(np.unique(index - at, axis=0)) == 1  # one shift: no voxel is out of place
            assert np.array_equal(target[known], label[tuple(index.T)])

    def test_forced_patches_hold_the_structure_anywhere_inside(self) -> None:
        label = np.zeros((40, 30, 20), np.int16)
        label[33, 4, 15] = 1
        case = prepared(label[None].astype(np.float32), label, {1: np.argwhere(label)})
        seen = set()
        for step in range(200):
            _, labels, _ = draw_batch([case], make_plan(), 2, 0, step)
            assert (labels[0] == 1).sum() == 1
            seen.add(tuple(np.argwhere(labels[0].numpy() == 1)[0]))
        assert len(seen) > 60  # not always in the middle

    def test_a_step_draws_the_same_patches_whenever_it_is_drawn(self) -> None:
        generator = np.random.default_rng(0)
        array = generator.normal(size=(1, 20, 18, 16)).astype(np.float32)
        case = prepared(array, np.zeros((20, 18, 16), np.int16), {})
        first, again = (draw_batch([case], make_plan(), 3, 7, 5)[0] for _ in range(2))
        other = draw_batch([case], make_plan(), 3, 7, 6)[0]
        assert torch.equal(first, again)
        assert not torch.equal(first, other)

    def test_slices_for_2d_networks(self) -> None:
        array = np.arange(10 * 9 * 5, dtype=np.float32).reshape(1, 10, 9, 5)
        case = prepared(array, np.zeros((10, 9, 5), np.int16), {})
        images, labels, _ = draw_batch([case], make_plan(dims=2), 3, 0, 0)
        assert images.shape == (3, 1, 8, 6)
        assert labels.shape == (3, 8, 6)
        assert all(len(np.unique(image.numpy() % 5)) == 1 for image in images)  # one slice each
