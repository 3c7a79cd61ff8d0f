"""Training targets against scipy's interpolation and loops over voxels, from every kind of label file."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from conftest import geometries
from dicom_source import GRIDS, write_source
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage
from test_transforms import make_plan

import medseg
from medseg.data import Case, read_case_labels
from medseg.io import read_channels
from medseg.plan import ANY, ChannelPlan, Plan, StructurePlan
from medseg.targets import known_structures, make_target, numbered_by_name, values_present
from medseg.transforms import normalise, preprocessing
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

GRID = Geometry.from_parts((11, 9, 6), (1.3, 0.9, 2.5), (5, -7, 30))
FINE = Geometry.from_parts((15, 8, 9), (0.9, 1.0, 1.6), (5.2, -6.8, 30.1))


def plan_of(structures: dict[str, tuple[int, ...]], **changes: object) -> Plan:
    made = tuple(
        StructurePlan(number=n, name=name, color=(1, 2, 3), labels=labels)
        for n, (name, labels) in enumerate(structures.items(), start=1)
    )
    return make_plan(structures=made, **changes)


BRATS = {"whole": (1, 2, 3), "core": (2, 3), "enhancing": (3,)}


def random_labels(seed: int, geometry: Geometry, most: int = 4) -> LabelMap:
    smooth = ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=geometry.shape), 1.0)
    edges = np.quantile(smooth, np.linspace(0.4, 1, most + 1)[:-1])
    return LabelMap(np.digitize(smooth, edges).astype(np.uint8), geometry)


def linear(array: np.ndarray, source: Geometry, grid: Geometry) -> np.ndarray:
    """scipy's linear interpolation of a source at the voxel centres of a grid, the edge going on by half a voxel."""
    index = np.stack(np.meshgrid(*map(np.arange, grid.shape), indexing="ij"), -1).reshape(-1, 3)
    at = source.to_index(grid.to_world(index)).T
    return ndimage.map_coordinates(array.astype(float), at, order=1, mode="nearest").reshape(grid.shape)


# --- the form of a target


@given(seed=st.integers(0, 999), geometry=geometries(low=4, high=8))
def test_regions_of_exclusive_labels_are_unions_on_the_same_grid(seed: int, geometry: Geometry) -> None:
    labels = random_labels(seed, geometry)
    target = make_target(labels, geometry, plan_of(BRATS, overlapping=True, ignore=4), "x")
    assert target.dtype == np.int8
    for index in np.ndindex(geometry.shape):
        value = int(labels.array[index])
        expected = [-1] * 3 if value == 4 else [int(value in values) for values in BRATS.values()]
        assert target[(slice(None), *index)].tolist() == expected


@given(seed=st.integers(0, 999))
def test_exclusive_unions_are_classes(seed: int) -> None:
    labels = random_labels(seed, GRID)
    target = make_target(labels, GRID, plan_of({"a": (3,), "b": (1, 2)}, ignore=4), "x")
    assert target.dtype == np.int16
    assert np.array_equal(target, np.array([0, 2, 2, 1, -1])[labels.array])


@given(seed=st.integers(0, 999))
def test_any_label_is_one_structure(seed: int) -> None:
    labels = random_labels(seed, GRID)
    plan = plan_of({"all": (ANY,)}, ignore=4)
    assert np.array_equal(make_target(labels, GRID, plan, "x"), np.array([0, 1, 1, 1, -1])[labels.array])


@settings(max_examples=20)
@given(seed=st.integers(0, 999), ignore=st.sampled_from([None, 4]))
def test_layers_are_interpolated_and_cut_at_one_half_of_what_counts(seed: int, ignore: int | None) -> None:
    labels = random_labels(seed, GRID, 4 if ignore else 3)
    target = make_target(labels, FINE, plan_of(BRATS, overlapping=True, ignore=ignore), "x")
    counts = linear(labels.array != 4, GRID, FINE)
    for layer, values in zip(target, BRATS.values(), strict=True):
        share = linear(np.isin(labels.array, values), GRID, FINE) / np.maximum(counts, 1e-9)
        sure = (np.abs(share - 0.5) > 1e-4) & (np.abs(counts - 0.5) > 1e-4)
        expected = np.where(counts < 0.5, -1, share > 0.5)
        assert np.array_equal(layer[sure], expected[sure])


@settings(max_examples=20)
@given(seed=st.integers(0, 999))
def test_classes_go_to_the_largest_share(seed: int) -> None:
    labels = random_labels(seed, GRID)
    target = make_target(labels, FINE, plan_of({"a": (3,), "b": (1, 2)}, ignore=4), "x")
    order = [0, 1, 2, -1]
    shares = np.stack([linear(np.isin(labels.array, v), GRID, FINE) for v in ((0,), (3,), (1, 2), (4,))])
    ranked = np.sort(shares, 0)
    sure = ranked[-1] - ranked[-2] > 1e-4
    assert np.array_equal(target[sure], np.array(order)[shares.argmax(0)][sure])


def soft_layers(seed: int, exclusive: bool) -> LabelMap:
    layers = np.random.default_rng(seed).random((3, *GRID.shape)).astype(np.float32)
    if exclusive:
        layers /= layers.sum(0) * 1.2
    return LabelMap(layers, GRID, tuple(Structure(n, f"s{n}") for n in (1, 2, 3)))


@settings(max_examples=20)
@given(seed=st.integers(0, 999), exclusive=st.booleans())
def test_soft_labels_stay_shares(seed: int, exclusive: bool) -> None:
    labels = soft_layers(seed, exclusive)
    plan = plan_of(BRATS, overlapping=True)
    target = make_target(labels, FINE, plan, "x")
    assert target.dtype == np.float16
    for layer, values in zip(target, BRATS.values(), strict=True):
        parts = labels.array[[v - 1 for v in values]]
        union = parts.sum(0) if exclusive else parts.max(0)
        assert np.abs(layer - linear(union, GRID, FINE)).max() < 1e-3


def test_soft_labels_with_an_ignored_region() -> None:
    labels = soft_layers(0, exclusive=True)
    layers = np.concatenate([labels.array, np.zeros((1, *GRID.shape), np.float32)])
    layers[:, :4] = 0
    layers[3, :4] = 1
    labels = LabelMap(layers, GRID, (*labels.structures, Structure(4, "ignore")))
    target = make_target(labels, GRID, plan_of(BRATS, overlapping=True, ignore=4), "x")
    assert (target[:, :4] == -1).all()
    assert np.abs(target[1, 4:] - (layers[1] + layers[2])[4:]).max() < 1e-3


def test_many_layers_keep_their_order() -> None:
    masks = np.random.default_rng(0).random((19, *GRID.shape)) < 0.3
    numbers = list(range(19, 0, -1))
    labels = LabelMap(masks, GRID, tuple(Structure(n, str(n)) for n in numbers))
    plan = plan_of({str(n): (n,) for n in range(1, 20)}, overlapping=True)
    assert np.array_equal(make_target(labels, GRID, plan, "x"), masks[::-1])


# --- labels that do not fit the plan


def overlapping_masks() -> LabelMap:
    masks = np.zeros((2, *GRID.shape), bool)
    masks[0, 2:6, 2:6, 1:4] = masks[1, 5:9, 2:6, 1:4] = True
    return LabelMap(masks, GRID, (Structure(1, "heart"), Structure(2, "vessel")))


def test_overlap_needs_a_plan_of_overlapping_structures() -> None:
    plan = plan_of({"heart": (), "vessel": ()})
    with pytest.raises(
        ValueError, match=r"got 'vessel' over 'heart' in case c7; plan with overlapping = true \(--over"
    ):
        make_target(overlapping_masks(), GRID, plan, "c7")
    with pytest.raises(ValueError, match=r"got probabilities in case c7; plan with overlapping = true"):
        make_target(soft_layers(0, True), GRID, plan_of({"a": (), "b": (), "c": ()}), "c7")
    together = make_target(overlapping_masks(), GRID, plan_of({"both": (1, 2)}), "c7")
    assert np.array_equal(together, overlapping_masks().array.any(0))
    layers = make_target(overlapping_masks(), GRID, plan_of({"heart": (), "vessel": ()}, overlapping=True), "c7")
    assert np.array_equal(layers, overlapping_masks().array)


@pytest.mark.parametrize("overlapping", [False, True])
def test_labels_beyond_the_plan_are_refused_by_name(overlapping: bool) -> None:
    plan = plan_of({"heart": ()}, overlapping=overlapping)
    with pytest.raises(ValueError, match=r"must be in the plan \(1\), got 2 \(vessel\) in case c7"):
        make_target(overlapping_masks(), GRID, plan, "c7")
    many = LabelMap(
        np.arange(np.prod(GRID.shape), dtype=np.int32).reshape(GRID.shape) * 181, GRID, (Structure(9, "x"),)
    )
    with pytest.raises(ValueError, match=r"must be in the plan \(1\), got 181 in case c7"):
        make_target(many, GRID, plan, "c7")


# --- which structures are known


@given(unknown=st.sets(st.integers(1, 5)), present=st.sets(st.integers(1, 5)))
def test_a_region_is_known_where_each_of_its_labels_is(unknown: set[int], present: set[int]) -> None:
    known = known_structures(plan_of(BRATS, overlapping=True), unknown, present)
    for answer, values in zip(known, BRATS.values(), strict=True):
        # whether a voxel without label may belong to the region: some label of it may be there, undrawn
        in_doubt = any(v in unknown and v not in present for v in values)
        assert answer == (not in_doubt)
    assert known_structures(plan_of({"all": (ANY,)}, ignore=5), unknown, present) == (not unknown - present - {5},)


def test_the_pipeline_says_what_is_known() -> None:
    labels = random_labels(0, GRID, 3)
    image = Volume(np.random.default_rng(1).normal(size=GRID.shape), GRID)
    run = preprocessing(plan_of({"a": (1,), "b": (2,), "c": (3,), "d": (4,)}))
    out = run({"case": "x", "image": image, "label": labels, "unknown": (2, 4)})
    assert out["known"] == (True, True, True, False)  # label 2 is in the file after all
    assert run({"case": "x", "image": image, "label": None, "unknown": (2,)})["known"] == (True, False, True, True)
    assert "known" not in run({"case": "x", "image": image, "label": labels})


# --- label files of every kind


def target_of(label: Path, image: Volume, plan: Plan) -> tuple[np.ndarray, tuple[bool, ...]]:
    out = preprocessing(plan)({"case": "x", "image": image, "label": label, "unknown": ()})
    assert out["geometry"].is_close(image.geometry)
    return out["label"].numpy(), out["known"]


def native_plan(geometry: Geometry, structures: dict[str, tuple[int, ...]], **changes: object) -> Plan:
    return plan_of(structures, orientation=None, spacing=geometry.spacing, **changes)


@pytest.mark.parametrize("overlap", [False, True])
def test_folders_of_masks(tmp_path: Path, overlap: bool) -> None:
    masks = overlapping_masks()
    if not overlap:
        masks = LabelMap(masks.array & ~np.stack([np.zeros(GRID.shape, bool), masks.array[0]]), GRID, masks.structures)
    medseg.write(
        masks.exclusive() if not overlap else LabelMap(masks.array * 1.0, GRID, masks.structures), tmp_path / "l.nii.gz"
    )
    medseg.convert(tmp_path / "l.nii.gz", tmp_path / "split/", split=True, labels=True)
    assert sorted(p.name for p in (tmp_path / "split").iterdir()) == ["1_heart.nii.gz", "2_vessel.nii.gz"]
    found = medseg.read_labels(tmp_path / "split")
    assert found.is_layered == overlap
    assert found.names == {1: "heart", 2: "vessel"}
    assert all(np.array_equal(found.mask(n), masks.mask(n)) for n in (1, 2))
    image = Volume(np.random.default_rng(1).normal(size=GRID.shape), GRID)
    plan = native_plan(GRID, {"heart": (), "vessel": ()}, overlapping=True)
    assert np.array_equal(target_of(tmp_path / "split", image, plan)[0], masks.array)


def test_probabilities_in_one_file_or_one_each_are_soft_labels(tmp_path: Path) -> None:
    labels = soft_layers(3, exclusive=False)
    medseg.write(labels, tmp_path / "l.nii.gz")
    medseg.convert(tmp_path / "l.nii.gz", tmp_path / "split/", split=True, labels=True)
    image = Volume(np.random.default_rng(1).normal(size=GRID.shape), GRID)
    plan = native_plan(GRID, {"s1": (), "s2": (), "s3": ()}, overlapping=True)
    for name in ("l.nii.gz", "split"):
        target, _ = target_of(tmp_path / name, image, plan)
        assert target.dtype == np.float16
        assert np.abs(target - labels.array).max() < 1e-3


def test_wrong_masks_are_refused(tmp_path: Path) -> None:
    def put(name: str, array: np.ndarray, grid: Geometry = GRID) -> None:
        medseg.write(Volume(array, grid), tmp_path / name)

    put("1_a.nii.gz", np.zeros(GRID.shape, np.uint8))
    put("2_b.nii.gz", np.where(np.indices(GRID.shape)[0] > 3, 255, 0).astype(np.uint8))
    assert medseg.read_labels(tmp_path).array.max() == 2
    put("3_c.nii.gz", np.indices(GRID.shape)[0].astype(np.uint8))
    with pytest.raises(ValueError, match=r"mask must hold 0 and one other value.* got 0 to 10 in .*3_c"):
        medseg.read_labels(tmp_path)
    (tmp_path / "3_c.nii.gz").unlink()
    put("2_d.nii.gz", np.zeros(GRID.shape, np.uint8))
    with pytest.raises(ValueError, match="distinct numbers"):
        medseg.read_labels(tmp_path)
    (tmp_path / "2_d.nii.gz").unlink()
    put("4_e.nii.gz", np.zeros(FINE.shape, np.uint8), FINE)
    with pytest.raises(GeometryError, match=r"4_e\.nii\.gz"):
        medseg.read_labels(tmp_path)


@pytest.mark.parametrize("suffix", ["seg.dcm", "rtstruct.dcm"])
def test_dicom_labels_that_overlap_become_layers_on_the_image(tmp_path: Path, suffix: str) -> None:
    source = write_source(tmp_path / "ct", GRIDS["oblique"])
    image = medseg.read(source)
    masks = np.zeros((2, *image.geometry.shape), bool)
    masks[0, 3:9, 4:12, 1:4] = masks[1, 6:12, 5:10, 2:5] = True
    labels = LabelMap(masks, image.geometry, (Structure(3, "heart"), Structure(7, "vessel")))
    medseg.write(labels, tmp_path / f"l.{suffix}", source)
    plan = make_plan(
        structures=(
            StructurePlan(number=3, name="Vessel", color=(1, 2, 3)),  # the file counts the other way round
            StructurePlan(number=7, name="heart", color=(1, 2, 3)),
        ),
        overlapping=True, orientation=None, spacing=image.geometry.spacing,
    )  # fmt: skip
    target, known = target_of(tmp_path / f"l.{suffix}", image, plan)
    assert np.array_equal(target, masks[::-1])
    assert known == (True, True)
    case = Case("x", (source,), tmp_path / f"l.{suffix}", "x")
    assert read_case_labels(case, image).geometry.is_close(image.geometry)


def test_numbers_of_dicom_objects_follow_names_only_where_they_can() -> None:
    plan = plan_of({"heart": (), "lung": ()})
    array = np.zeros(GRID.shape, np.uint8)
    array[:2], array[2:5], array[5:7] = 1, 2, 3
    structures = (Structure(1, "Lung "), Structure(2, "couch"), Structure(3, "HEART"))
    segments = LabelMap(array, GRID, structures, {"modality": "RTSTRUCT"})
    found = numbered_by_name(segments, plan)
    assert {s.name: s.number for s in found.structures} == {"Lung ": 2, "couch": 5, "HEART": 1}
    assert np.array_equal(found.array[[0, 3, 6], 0, 0], [2, 5, 1])
    assert values_present(found) == [1, 2, 5]
    plain = LabelMap(array, GRID, structures)
    assert numbered_by_name(plain, plan) is plain
    assert numbered_by_name(segments, plan_of({"liver": (), "spleen": ()})) is segments
    assert numbered_by_name(segments, plan_of(BRATS, overlapping=True)) is segments


def test_layers_of_a_skewed_image_are_straightened_with_it() -> None:
    affine = np.diag([1.0, 1.5, 2.0, 1])
    affine[1, 2] = 0.6
    geometry = Geometry((12, 11, 10), affine)
    masks = np.zeros((2, *geometry.shape), bool)
    masks[0, 3:9, 3:8, 2:8] = masks[1, 3:9, 3:8, 4:9] = True
    image = Volume(masks[0] * 100.0, geometry)
    plan = plan_of({"a": (), "b": ()}, overlapping=True)
    out = preprocessing(plan)({"case": "x", "image": image, "label": LabelMap(masks, geometry)})
    assert out["label"].shape == (2, *out["geometry"].shape)
    volume = out["label"].numpy().sum((1, 2, 3)) * out["geometry"].voxel_mm3
    assert np.allclose(volume, masks.sum((1, 2, 3)) * geometry.voxel_mm3, rtol=0.12)


# --- missing channels


@pytest.mark.parametrize("missing", [(0,), (1,), (0, 2)])
def test_a_missing_channel_is_zero_and_the_others_as_ever(tmp_path: Path, missing: tuple[int, ...]) -> None:
    paths: list[Path | None] = []
    for n in range(3):
        array = np.random.default_rng(n).normal(100 * n, 5, GRID.shape).astype(np.float32 if n else np.int16)
        medseg.write(Volume(array, GRID), tmp_path / f"{n}.nii.gz")
        paths.append(tmp_path / f"{n}.nii.gz")
    channels = (
        ChannelPlan(name="a", scheme="zscore"),
        ChannelPlan(name="b", scheme="ct", low=50, high=300, mean=90, std=7),
        ChannelPlan(name="c", scheme="zscore", masked=True),
    )
    run = preprocessing(make_plan(channels=channels))
    whole = run({"case": "x", "image": paths})["image"].numpy()
    partial = run({"case": "x", "image": [None if n in missing else p for n, p in enumerate(paths)]})["image"].numpy()
    for n in range(3):
        assert np.allclose(partial[n], 0 if n in missing else whole[n], atol=1e-6)


def test_channels_that_cannot_be_missing(tmp_path: Path) -> None:
    two = Volume(np.zeros((2, *GRID.shape), np.float32), GRID)
    medseg.write(two, tmp_path / "two.nii.gz")
    with pytest.raises(ValueError, match=r"one channel each where another is missing, got several in .*two"):
        read_channels([tmp_path / "two.nii.gz", None])
    with pytest.raises(ValueError, match="at least one channel, got none of 2"):
        read_channels([None, None])


@given(subset=st.sampled_from([c for n in range(3) for c in combinations(range(3), n)]))
def test_missing_channels_may_hold_anything(subset: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).normal(size=(3, 4, 5, 6))
    channels = [ChannelPlan(name=c, scheme="zscore") for c in "abc"]
    expected = normalise(array, channels)
    array[list(subset)] = np.nan
    found = normalise(array, channels, missing=subset)
    assert all(np.array_equal(found[c], np.zeros((4, 5, 6)) if c in subset else expected[c]) for c in range(3))
