"""Preprocessing against nibabel and plain numpy."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from conftest import geometries
from hypothesis import given, settings

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
