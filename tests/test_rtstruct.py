"""RTSTRUCT: round trips against an independent reader, foreign files of every kind, and authors' masks."""

from __future__ import annotations

import contextlib
import warnings
from itertools import pairwise

import nibabel as nib
import numpy as np
import pydicom
import pytest
from conftest import geometries
from dicom_source import GRIDS, LPS, shapes, write_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.dataset import Dataset

from medseg.contours import polygons_to_mask
from medseg.io.dicom import source_series
from medseg.io.placing import SeriesIdentity
from medseg.io.rtstruct import read_rtstruct
from medseg.io.rtstruct_write import _decimal_strings, write_rtstruct
from medseg.volume import Code, DicomError, Geometry, GeometryError, LabelMap, Structure

GRID = GRIDS["non-square"]
NAMES = list(shapes((9, 9, 6)))


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A series on each grid, made once."""
    folder = tmp_path_factory.mktemp("sources")
    return {
        name: write_source(folder / name.replace(" ", ""), grid, order=-1 if name == "square" else 1)
        for name, grid in GRIDS.items()
    }


def independent_masks(path, source):
    """Masks by a reader of its own: per image, contours of its plane, even-odd at each pixel centre, XOR."""
    images = [pydicom.dcmread(p) for p in source.iterdir()]
    normal = np.cross(images[0].ImageOrientationPatient[:3], images[0].ImageOrientationPatient[3:])
    images.sort(key=lambda d: float(np.dot(normal, np.array(d.ImagePositionPatient, float))))
    dataset, out = pydicom.dcmread(path), {}
    names = {r.ROINumber: r.ROIName for r in dataset.StructureSetROISequence}
    for roi in dataset.ROIContourSequence:
        mask = np.zeros((images[0].Columns, images[0].Rows, len(images)), bool)
        for contour in roi.get("ContourSequence", []):
            points = np.array([float(v) for v in contour.ContourData]).reshape(-1, 3)
            assert len(points) == contour.NumberOfContourPoints
            k = next(
                n for n, d in enumerate(images)
                if np.abs((points - np.array(d.ImagePositionPatient, float)) @ normal).max() < 0.01
            )  # fmt: skip
            assert contour.ContourImageSequence[0].ReferencedSOPInstanceUID == images[k].SOPInstanceUID
            right, down = np.reshape(np.array(images[k].ImageOrientationPatient, float), (2, 3))
            offset = points - np.array(images[k].ImagePositionPatient, float)
            x, y = offset @ right / float(images[k].PixelSpacing[1]), offset @ down / float(images[k].PixelSpacing[0])
            i, j = np.mgrid[: mask.shape[0], : mask.shape[1]]
            inside = np.zeros(i.shape, bool)
            for (x0, y0), (x1, y1) in pairwise([*zip(x, y, strict=True), (x[0], y[0])]):
                crosses = (y0 > j) != (y1 > j)
                inside ^= crosses & (i < x0 + (j - y0) / np.where(crosses, y1 - y0, 1) * (x1 - x0))
            mask[:, :, k] ^= inside
        out[names[roi.ReferencedROINumber]] = mask
    return out


# ---------------------------------------------------------------------------------------------------------------------
# The table of round trips


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize(("style", "holes"), [("edge", "xor"), ("edge", "keyhole"), ("smooth", "xor")])
def test_round_trips_are_exact(grid, style, holes, sources, tmp_path):
    """Shape x grid x reader: Dice 1.000 in every cell."""
    geometry = source_series(sources[grid])[0]
    masks = shapes(geometry.shape)
    structures = tuple(Structure(n, name) for n, name in enumerate(NAMES, 5))
    labels = LabelMap(np.stack([masks[n] for n in NAMES]), geometry, structures)
    write_rtstruct(labels, tmp_path / "c.dcm", sources[grid], style=style, holes=holes)
    ours, other = read_rtstruct(tmp_path / "c.dcm", geometry), independent_masks(tmp_path / "c.dcm", sources[grid])
    assert ours.names == labels.names
    table = {n: (np.array_equal(ours.mask(n), masks[n]), np.array_equal(other[n], masks[n])) for n in NAMES}
    assert table == dict.fromkeys(NAMES, (True, True))
    assert all(len(v) <= 16 for v in _all_strings(tmp_path / "c.dcm"))


def _all_strings(path):
    raw = path.read_bytes()
    for roi in pydicom.dcmread(path).ROIContourSequence:
        for contour in roi.get("ContourSequence", []):
            yield from (v.original_string for v in contour.ContourData)
    assert b"\\" in raw


@pytest.mark.parametrize("grid", [g for g in GRIDS if g != "gantry-tilted"])  # it reads through ITK: no shear
def test_dcmrtstruct2nii_reads_the_same(grid, sources, tmp_path, monkeypatch):
    """A released reader, where it is installed."""
    monkeypatch.setattr(pydicom, "read_file", pydicom.dcmread, raising=False)  # it was written for pydicom 2
    peer = pytest.importorskip("dcmrtstruct2nii", reason="dcmrtstruct2nii is not installed")
    geometry = source_series(sources[grid])[0]
    masks = list(shapes(geometry.shape).values())
    structures = tuple(Structure(n, f"s{n}") for n in range(1, len(masks) + 1))
    write_rtstruct(LabelMap(np.stack(masks), geometry, structures), tmp_path / "c.dcm", sources[grid])
    peer.dcmrtstruct2nii(
        str(tmp_path / "c.dcm"), str(sources[grid]), str(tmp_path / "out"), convert_original_dicom=False
    )
    for n, mask in enumerate(masks, 1):
        image = nib.load(tmp_path / "out" / f"mask_s{n}.nii.gz")
        found = np.asarray(image.dataobj) > 0
        index = np.argwhere(mask)
        nearest = (geometry.to_world(index) - image.affine[:3, 3]) @ np.linalg.inv(image.affine[:3, :3]).T
        assert found.sum() == len(index) and found[tuple(np.rint(nearest).astype(int).T)].all()


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(grid=geometries(), seed=st.integers(0, 999))
def test_random_masks_on_any_grid(grid: Geometry, seed, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    source = write_source(folder / "in", grid)
    mask = np.random.default_rng(seed).random(grid.shape) < 0.4
    write_rtstruct(LabelMap(mask, grid, (Structure(1, "noise"),)), folder / "c.dcm", source)
    found = read_rtstruct(folder / "c.dcm", grid)
    assert np.array_equal(found.mask("noise"), mask)


def test_labels_on_a_reoriented_grid_are_written_in_the_source_order(sources, tmp_path):
    """A NIfTI of the same voxels in another order of axes, as converters make it, cropped on top."""
    grid = source_series(sources["oblique"])[0]
    array = np.random.default_rng(2).integers(0, 3, grid.shape).astype(np.uint8)
    array[:2] = 0
    flipped = array.transpose(2, 0, 1)[::-1, 2:, ::-1]
    matrix = np.zeros((4, 4))
    matrix[2, 0], matrix[0, 1], matrix[1, 2], matrix[3, 3] = -1, 1, -1, 1
    matrix[:3, 3] = (2, grid.shape[1] - 1, grid.shape[2] - 1)
    labels = LabelMap(flipped, Geometry(flipped.shape, (grid.affine @ matrix).astype(np.float32)))
    write_rtstruct(labels, tmp_path / "c.dcm", sources["oblique"])
    assert np.array_equal(read_rtstruct(tmp_path / "c.dcm", grid).array, array)


def test_names_colours_codes_and_empty_structures_survive(sources, tmp_path):
    array = np.zeros(GRID.shape, np.uint8)
    array[3:6, 4:9, 2] = 40
    structures = (
        Structure(7, "Kidney_L", (10, 20, 30)),
        Structure(40, "Läsion", (200, 0, 255), type=Code("52988006", "SCT", "Lesion")),
    )
    write_rtstruct(LabelMap(array, GRID, structures), tmp_path / "c.dcm", sources["non-square"])
    found = read_rtstruct(tmp_path / "c.dcm", GRID)
    assert found.names == {7: "Kidney_L", 40: "Läsion"} and not found.is_layered
    assert [s.color for s in found.structures] == [(10, 20, 30), (200, 0, 255)]
    assert [s.type.value for s in found.structures] == ["64033007", "52988006"]
    assert np.array_equal(found.array, array)
    assert found.meta["frame_of_reference_uid"] == source_series(sources["non-square"])[1][0].FrameOfReferenceUID


def test_probabilities_are_cut_and_said(sources, tmp_path):
    layers = np.random.default_rng(3).random((2, *GRID.shape)).astype(np.float32)
    with pytest.warns(UserWarning, match=r"probabilities were cut at 0\.5"):
        write_rtstruct(LabelMap(layers, GRID), tmp_path / "c.dcm", sources["non-square"])
    assert np.array_equal(read_rtstruct(tmp_path / "c.dcm", GRID).mask(2), layers[1] >= 0.5)


def test_decimal_strings_equal_python_formatting():
    rng = np.random.default_rng(0)
    values = np.concatenate([rng.uniform(-9e4, 9e4, 500), rng.normal(size=500), [0, -0.0, 1e-9, -1e-9, 10, -100.5]])
    text, ends = _decimal_strings(values)
    strings = text.decode().split("\\")[:-1]
    assert ends[-1] == len(text) and len(strings) == len(values)
    for string, value in zip(strings, values, strict=True):
        assert float(string) == pytest.approx(value, abs=0.51e-8) and len(string) <= 16
        assert string in (f"{value:.8f}".rstrip("0").rstrip("."), "0", f"{float(string):.8f}".rstrip("0").rstrip("."))
    with pytest.raises(DicomError, match="less than 100 m"):
        _decimal_strings(np.array([1e5]))


# ---------------------------------------------------------------------------------------------------------------------
# Files of others


def contour(points_index, kind="CLOSED_PLANAR", grid=GRID):
    item = Dataset()
    item.ContourGeometricType = kind
    world = grid.to_world(points_index) * (-1, -1, 1)
    item.NumberOfContourPoints = len(world)
    item.ContourData = [f"{v:.9g}" for v in world.ravel()]
    return item


def box(i0, i1, j0, j1, k):
    return [(i0 - 0.5, j0 - 0.5, k), (i1 + 0.5, j0 - 0.5, k), (i1 + 0.5, j1 + 0.5, k), (i0 - 0.5, j1 + 0.5, k)]


def structure_set(path, rois, frame="1.2.3"):
    """An RTSTRUCT as little as can be; rois = {number: (name, [contours])}."""
    ds = Dataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = "1.2.840.10008.5.1.4.1.1.481.3", "1.2.3.4", "RTSTRUCT"
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for number, (name, contours) in rois.items():
        roi, item = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, item.ReferencedROINumber = number, name, number
        if frame:
            roi.ReferencedFrameOfReferenceUID = frame
        if contours is not None:
            item.ContourSequence = contours
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(item)
    ds.save_as(path, implicit_vr=True, little_endian=True)  # no preamble, no file meta
    return path


def read_silently(path, grid=GRID, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return read_rtstruct(path, grid, **options)


def expected(*boxes):
    mask = np.zeros(GRID.shape, bool)
    for i0, i1, j0, j1, k in boxes:
        mask[max(i0, 0) : i1 + 1, max(j0, 0) : j1 + 1, k] ^= True
    return mask


def test_all_closed_kinds_combine_by_xor(tmp_path):
    rois = {
        1: ("hole", [contour(box(2, 9, 2, 9, 1)), contour(box(4, 6, 4, 6, 1))]),
        2: ("hole by type", [contour(box(2, 9, 2, 9, 3), "CLOSEDPLANAR_XOR"),
                             contour(box(4, 6, 4, 6, 3), "CLOSEDPLANAR_XOR")]),
        3: ("interpolated", [contour(box(12, 14, 2, 5, 2), "INTERPOLATED_PLANAR")]),
    }  # fmt: skip
    found = read_silently(structure_set(tmp_path / "c.dcm", rois))
    assert np.array_equal(found.mask(1), expected((2, 9, 2, 9, 1), (4, 6, 4, 6, 1)))
    assert np.array_equal(found.mask(2), expected((2, 9, 2, 9, 3), (4, 6, 4, 6, 3)))
    assert np.array_equal(found.mask(3), expected((12, 14, 2, 5, 2)))
    assert not found.is_layered


def test_what_is_no_mask_is_left_out_and_said_and_harms_nothing_else(tmp_path):
    k_off = GRID.shape[2] + 3
    bad = contour(box(1, 3, 1, 3, 1))
    bad.ContourData = bad.ContourData[:-1]
    rois = {
        1: ("points", [contour([(3, 3, 1)], "POINT"), contour([(3, 3, 1), (5, 5, 1)], "OPEN_PLANAR")]),
        2: ("partly off", [contour(box(2, 5, 2, 5, 2)), contour(box(2, 5, 2, 5, k_off))]),
        3: ("clipped", [contour(box(-6, 3, -6, 2, 4))]),
        4: ("beside", [contour(box(90, 95, 2, 4, 3))]),
        5: ("two points", [contour([(3, 3, 1), (5, 5, 1)])]),
        6: ("broken", [bad]),
        7: ("empty", None),
        8: ("slanted", [contour([(2, 2, 0), (9, 2, 3), (9, 9, 5)])]),
    }
    path = structure_set(tmp_path / "c.dcm", rois)
    with pytest.warns(UserWarning) as record:
        found = read_rtstruct(path, GRID)
    said = " | ".join(str(w.message) for w in record)
    for words in ("of type POINT", "of type OPEN_PLANAR", "slices that the grid does not have", "clipped at the border",
                  "beside the grid", "fewer than three points", "unreadable vertices", "not in a plane"):  # fmt: skip
        assert words in said
    assert list(found.names) == list(range(1, 9)) and len(found.meta["quirks"]) == len(record)
    assert np.array_equal(found.mask(2), expected((2, 5, 2, 5, 2)))
    assert np.array_equal(found.mask(3), expected((-6, 3, -6, 2, 4)))
    assert np.isin(found.array, (0, 2, 3)).all()


def test_overlapping_structures_become_layers(tmp_path):
    rois = {3: ("a", [contour(box(2, 6, 2, 6, 1))]), 9: ("b", [contour(box(5, 9, 5, 9, 1))])}
    found = read_silently(structure_set(tmp_path / "c.dcm", rois))
    assert found.is_layered and found.array.dtype == bool and found.names == {3: "a", 9: "b"}
    assert np.array_equal(found.mask("a"), expected((2, 6, 2, 6, 1)))
    assert np.array_equal(found.mask("b"), expected((5, 9, 5, 9, 1)))


@pytest.mark.parametrize("shift", [0.0, 0.3, -0.45])
def test_contours_belong_to_the_slice_whose_slab_holds_them(tmp_path, shift):
    found = read_silently(structure_set(tmp_path / "c.dcm", {1: ("a", [contour(box(2, 6, 2, 6, 2 + shift))])}))
    assert np.array_equal(found.mask(1), expected((2, 6, 2, 6, 2)))


def test_of_two_planes_in_one_slice_the_nearer_counts(tmp_path):
    rois = {1: ("fine", [contour(box(2, 4, 2, 4, 2.4)), contour(box(2, 9, 2, 9, 1.9)), contour(box(4, 5, 4, 5, 1.9))])}
    path = structure_set(tmp_path / "c.dcm", rois)
    with pytest.warns(UserWarning, match="1 contours in a second plane of one slice"):
        found = read_rtstruct(path, GRID)
    assert np.array_equal(found.mask(1), expected((2, 9, 2, 9, 2), (4, 5, 4, 5, 2)))


def test_contours_across_another_axis_of_the_grid(tmp_path):
    """Drawn on sagittal reformats, put on the axial grid."""
    side = [(5, 2.5, 0.5), (5, 9.5, 0.5), (5, 9.5, 3.5), (5, 2.5, 3.5)]
    found = read_silently(structure_set(tmp_path / "c.dcm", {1: ("a", [contour(side)])}))
    mask = np.zeros(GRID.shape, bool)
    mask[5, 3:10, 1:4] = True
    assert np.array_equal(found.mask(1), mask)


def test_frames_of_reference(tmp_path):
    inside = [contour(box(2, 6, 2, 6, 1))]
    path = structure_set(tmp_path / "c.dcm", {1: ("a", inside), 2: ("b", inside)}, frame="1.2.3")
    with pytest.raises(DicomError, match=r"image series 9\.8\.7, got 1\.2\.3 in .*--allow-mismatch"):
        read_silently(path, series=SeriesIdentity("9.8.7"))
    assert read_silently(path, series=SeriesIdentity("9.8.7"), allow_mismatch=True).mask(1).any()
    assert read_silently(path, series=SeriesIdentity("1.2.3")).mask(1).any()
    both = pydicom.dcmread(path, force=True)
    both.StructureSetROISequence[1].ReferencedFrameOfReferenceUID = "5.5"
    both.save_as(tmp_path / "two.dcm", implicit_vr=True, little_endian=True)
    with pytest.warns(UserWarning, match="1 structures lie in another frame of reference"):
        found = read_rtstruct(tmp_path / "two.dcm", GRID, series=SeriesIdentity("1.2.3"))
    assert found.names == {1: "a"}


def test_images_referred_to(tmp_path):
    item = contour(box(2, 6, 2, 6, 1))
    path = structure_set(tmp_path / "c.dcm", {1: ("a", [item])})
    with pytest.warns(UserWarning, match="do not say on which images"):
        read_rtstruct(path, GRID, series=SeriesIdentity("1.2.3", frozenset({"7.7"})))
    image = Dataset()
    image.ReferencedSOPClassUID, image.ReferencedSOPInstanceUID = "1.2", "6.6"
    item.ContourImageSequence = [image]
    path = structure_set(tmp_path / "d.dcm", {1: ("a", [item])})
    with pytest.warns(UserWarning, match="1 of 1 images that contours refer to are not in the series"):
        read_rtstruct(path, GRID, series=SeriesIdentity("1.2.3", frozenset({"7.7"})))


def test_odd_numbers_and_missing_entries(tmp_path):
    one = [contour(box(2, 4, 2, 4, 1))]
    path = structure_set(tmp_path / "c.dcm", {0: ("zero", one), 3: ("three", [contour(box(7, 9, 7, 9, 2))])})
    ds = pydicom.dcmread(path, force=True)
    ds.ROIContourSequence[1].ReferencedROINumber = 8
    ds.StructureSetROISequence.append(ds.StructureSetROISequence[1])
    ds.save_as(path, implicit_vr=True, little_endian=True)
    found = read_silently(path)
    assert found.names == {9: "zero", 3: "three", 8: "ROI 8"}
    assert found.mask("zero").sum() == found.mask("ROI 8").sum() == 9 and not found.mask("three").any()
    said = " ".join(found.meta["quirks"])
    assert "became 9" in said and "no entry in the list" in said and "two structures have the number 3" in said


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_files_end_in_a_value_or_a_dicom_error(data, tmp_path):
    path = tmp_path / "whole.dcm"
    if not path.exists():
        structure_set(path, {1: ("a", [contour(box(2, 6, 2, 6, 1))]), 2: ("b", [contour(box(5, 9, 5, 9, 1))])})
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at] = data.draw(st.integers(0, 255))
    raw = raw[: data.draw(st.integers(len(raw) // 2, len(raw)))]
    (tmp_path / "broken.dcm").write_bytes(raw)
    with contextlib.suppress(DicomError):
        assert isinstance(read_silently(tmp_path / "broken.dcm"), LabelMap)


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_refusals(sources, tmp_path):
    path = structure_set(tmp_path / "c.dcm", {1: ("a", [contour(box(2, 6, 2, 6, 1))])})
    with pytest.raises(DicomError, match="grid of an RTSTRUCT must be given"):
        read_rtstruct(path)
    with pytest.raises(DicomError, match="must be an RTSTRUCT object"):
        read_rtstruct(next(sources["square"].iterdir()), GRID)
    labels = LabelMap(np.ones(GRID.shape, np.uint8), GRID)
    with pytest.raises(FileExistsError):
        write_rtstruct(labels, path, sources["non-square"])
    with pytest.raises(GeometryError, match="must lie on the same"):
        write_rtstruct(labels, tmp_path / "d.dcm", sources["square"])
    shifted = LabelMap(labels.array, GRID.cropped((1, 0, 0), (GRID.shape[0] + 1, *GRID.shape[1:])))
    with pytest.raises(GeometryError, match="outside the grid"):
        write_rtstruct(shifted, tmp_path / "d.dcm", sources["non-square"])
    with pytest.raises(ValueError, match="at least one structure"):
        write_rtstruct(LabelMap(np.zeros(GRID.shape, np.uint8), GRID), tmp_path / "d.dcm", sources["non-square"])
    assert not (tmp_path / "d.dcm").exists()


def test_a_file_that_does_not_read_back_is_not_written(sources, tmp_path, monkeypatch):
    labels = LabelMap(np.ones(GRID.shape, np.uint8), GRID)
    monkeypatch.setattr("medseg.io.rtstruct.fill_polygons", lambda p, s: ((slice(0, 1),) * 2, np.ones((1, 1), bool)))
    with pytest.raises(DicomError, match="must read back equal"):
        write_rtstruct(labels, tmp_path / "c.dcm", sources["non-square"])
    assert list(tmp_path.iterdir()) == []


def test_source_without_frame_of_reference_or_patient(tmp_path):
    drop = ("FrameOfReferenceUID", "PatientName", "PatientSex", "StudyID", "AccessionNumber", "StudyDate")
    source = write_source(tmp_path / "in", GRID, drop=drop)
    labels = LabelMap(np.ones(GRID.shape, np.uint8), GRID)
    write_rtstruct(labels, tmp_path / "c.dcm", source)
    assert pydicom.dcmread(tmp_path / "c.dcm").FrameOfReferenceUID
    assert read_rtstruct(tmp_path / "c.dcm", GRID).mask(1).all()


# ---------------------------------------------------------------------------------------------------------------------
# Real files


@pytest.mark.data
@pytest.mark.parametrize("case", ["ct_sts002", "mr_sts002", "mr_sts003", "pt_ge_sts001"])
def test_authors_masks(case, data_dir):
    folder = data_dir / "dicom" / case
    grid, headers = source_series(folder / "in")
    found = read_silently(folder / "rtstruct.dcm", grid, series=SeriesIdentity.of(headers))
    image = nib.load(folder / "ref_mask.nii.gz")
    truth = np.argwhere(np.asarray(image.dataobj) > 0)
    truth = truth @ image.affine[:3, :3].T + image.affine[:3, 3]
    nearest = grid.to_index(truth)
    assert np.abs(nearest - np.round(nearest)).max() < 0.01
    mask = np.zeros(grid.shape, bool)
    mask[tuple(np.round(nearest).astype(int).T)] = True
    assert np.array_equal(found.mask(1), mask)


@pytest.mark.data
@pytest.mark.parametrize(
    ("case", "counts"),
    [
        ("rt_rtutils_missing_images", [4976, 3697, 4519, 6954]),
        ("rt_dicompyler_10rois", [40396, *[0] * 9]),
    ],
)
def test_voxel_counts(case, counts, data_dir):
    grid, headers = source_series(data_dir / "dicom" / case / "in")
    found = read_silently(data_dir / "dicom" / case / "rtstruct.dcm", grid, series=SeriesIdentity.of(headers))
    assert [int(found.mask(s.number).sum()) for s in found.structures] == counts


def test_the_oracle_is_no_copy_of_ours():
    """The independent reader's rule and ours agree on a polygon whose answer is known by hand."""
    diamond = np.array([(-2.0, 0.25), (0.25, 2.5), (2.5, 0.25), (0.25, -2.0)])
    by_hand = np.abs(np.mgrid[:4, :4] - 0.25).sum(axis=0) < 2.25
    assert np.array_equal(polygons_to_mask([diamond], (4, 4)), by_hand)
    assert LPS[0, 0] == -1
