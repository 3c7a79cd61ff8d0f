"""DICOM-SEG: own files read by highdicom and SimpleITK, files of every encoding, and answers of real ones."""

from __future__ import annotations

import contextlib
import warnings
import zlib

import highdicom as hd
import numpy as np
import pydicom
import pytest
import SimpleITK as sitk
from conftest import geometries
from dicom_source import GRIDS, shapes, write_source
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.encaps import encapsulate
from pydicom.sr.codedict import codes
from pydicom.uid import UID, JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from medseg.io.dicom import source_series
from medseg.io.dicom_codes import UNKNOWN, _table, meaning_of
from medseg.io.dicom_seg import read_seg
from medseg.io.dicom_seg_write import write_seg
from medseg.io.placing import SeriesIdentity, clean_errors
from medseg.volume import Code, DicomError, Geometry, GeometryError, LabelMap, Structure

GRID = GRIDS["non-square"]
KINDS = ["binary", "labelmap", "fractional"]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    return {name: write_source(folder / name, grid) for name, grid in GRIDS.items()}


@pytest.fixture
def labels():
    """Three structures; the first and last slices, and structure 12, are empty."""
    array = np.zeros(GRID.shape, np.uint8)
    array[2:9, 3:8, 1:4] = 3
    array[11:20, 1:7, 2:5] = 7
    return LabelMap(array, GRID, (Structure(3, "liver"), Structure(7, "Kidney_L", (10, 200, 30)), Structure(12, "foo")))


def quietly(function, *args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return function(*args, **options)


def world_points(mask, affine):
    """Sorted RAS positions of set voxels, to 0.01 mm."""
    points = np.argwhere(mask) @ affine[:3, :3].T + affine[:3, 3]
    return points[np.lexsort(np.round(points, 2).T)]


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("grid", GRIDS)
def test_round_trips_are_exact(grid, sources, tmp_path):
    """Every shape on every grid, overlapping, by our reader (with and without the source grid) and by highdicom."""
    geometry = source_series(sources[grid])[0]
    masks = shapes(geometry.shape)
    structures = tuple(Structure(n, name) for n, name in enumerate(masks, 4))
    labels = LabelMap(np.stack(list(masks.values())), geometry, structures)
    write_seg(labels, tmp_path / "s.dcm", sources[grid])
    found, own = read_seg(tmp_path / "s.dcm", geometry), read_seg(tmp_path / "s.dcm")
    other = hd.seg.segread(tmp_path / "s.dcm")
    for n, (s, mask) in enumerate(zip(structures, masks.values(), strict=True), 1):
        assert np.array_equal(found.mask(s.number), mask)
        truth = world_points(mask, geometry.affine)
        assert world_points(own.mask(s.number), own.geometry.affine) == pytest.approx(truth, abs=0.01)
        if geometry.is_skewed:
            continue  # highdicom has no skewed volumes
        volume = other.get_volume(segment_numbers=[n], combine_segments=False)
        ras = np.diag([-1, -1, 1, 1]) @ volume.affine
        assert world_points(volume.array[..., 0] > 0, ras) == pytest.approx(truth, abs=0.01)


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_names_numbers_colours_and_codes(kind, labels, sources, tmp_path):
    with pytest.warns(UserWarning, match=r"without a voxel are only named \('foo'\)"):
        write_seg(labels, tmp_path / "s.dcm", sources["non-square"], kind=kind)
    found = read_seg(tmp_path / "s.dcm", GRID)
    assert found.names == labels.names and found.meta["segmentation_type"] == kind.upper()
    assert found.is_layered == (kind == "fractional")
    for number in labels.names:
        assert np.array_equal(found.mask(number), labels.mask(number))
    liver, kidney, foo = found.structures
    assert liver.type == Code("10200004", "SCT", "Liver") and kidney.color == (10, 200, 30)
    assert foo.type == UNKNOWN and liver.tracking_uid
    assert found.meta["referenced_series_uids"] == (source_series(sources["non-square"])[1][0].SeriesInstanceUID,)
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    side = dataset.SegmentSequence[-2].SegmentedPropertyTypeCodeSequence[0].SegmentedPropertyTypeModifierCodeSequence[0]
    assert side.CodeMeaning == "Left"
    algorithm = dataset.SegmentSequence[-1].SegmentationAlgorithmIdentificationSequence[0]
    assert algorithm.AlgorithmName == "medseg" and algorithm.AlgorithmVersion
    assert dataset.PatientID == "T1" and dataset.StudyID == "S1"


@pytest.mark.parametrize("kind", ["binary", "labelmap"])
def test_frames_refer_to_their_source_images(kind, labels, sources, tmp_path):
    quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"], kind=kind)
    images = {d.SOPInstanceUID: d for d in map(pydicom.dcmread, sources["non-square"].iterdir())}
    groups = pydicom.dcmread(tmp_path / "s.dcm").PerFrameFunctionalGroupsSequence
    assert len(groups) == (6 if kind == "binary" else 4)
    for group in groups:
        image = group.DerivationImageSequence[0].SourceImageSequence[0]
        position = group.PlanePositionSequence[0].ImagePositionPatient
        assert images[image.ReferencedSOPInstanceUID].ImagePositionPatient == position
        assert image.SpatialLocationsPreserved == "YES"


def test_probabilities_keep_their_steps(sources, tmp_path):
    layers = np.random.default_rng(0).random((2, *GRID.shape)).astype(np.float32)
    layers[0, :, :, 2] = 0
    structures = (Structure(2, "left lung"), Structure(5, "right lung"))
    write_seg(LabelMap(layers, GRID, structures), tmp_path / "s.dcm", sources["non-square"], kind="fractional")
    found = read_seg(tmp_path / "s.dcm", GRID)
    assert found.array.dtype == np.float32 and found.names == {2: "left lung", 5: "right lung"}
    assert np.array_equal(np.round(found.array * 255), np.round(layers * 255))
    with pytest.warns(UserWarning, match=r"probabilities were cut at 0\.5"):
        write_seg(LabelMap(layers, GRID, structures), tmp_path / "b.dcm", sources["non-square"])
    assert np.array_equal(read_seg(tmp_path / "b.dcm", GRID).mask(5), layers[1] >= 0.5)


def test_nothing_labelled_is_still_a_file(sources, tmp_path):
    empty = LabelMap(np.zeros(GRID.shape, np.uint8), GRID, (Structure(1, "tumor"), Structure(4, "liver")))
    for kind in KINDS:
        quietly(write_seg, empty, tmp_path / f"{kind}.dcm", sources["non-square"], kind=kind)
        found = read_seg(tmp_path / f"{kind}.dcm", GRID)
        assert found.names == empty.names and not found.array.any()


def test_simpleitk_sees_the_same_voxels(sources, tmp_path):
    grid = GRIDS["square"]  # frames of a multiple of 8 pixels: ITK decodes no others right
    array = np.zeros(grid.shape, np.uint8)
    array[3:13, 2:9, 1:5] = 1
    write_seg(LabelMap(array, grid), tmp_path / "s.dcm", sources["square"])
    image = sitk.ReadImage(str(tmp_path / "s.dcm"))
    voxels = sitk.GetArrayFromImage(image).T
    affine = np.eye(4)
    affine[:3, :3] = np.reshape(image.GetDirection(), (3, 3)) * image.GetSpacing()
    affine[:3, 3] = image.GetOrigin()
    ras = np.diag([-1, -1, 1, 1]) @ affine
    assert world_points(voxels > 0, ras) == pytest.approx(world_points(array > 0, grid.affine), abs=0.01)


@settings(max_examples=12, deadline=None)
@given(grid=geometries(), seed=st.integers(0, 999), kind=st.sampled_from(KINDS))
def test_random_labels_on_any_grid(grid: Geometry, seed, kind, tmp_path_factory):
    folder = tmp_path_factory.mktemp("any")
    source = quietly(write_source, folder / "in", grid)
    array = np.random.default_rng(seed).integers(0, 4, grid.shape).astype(np.int32) * 3
    write_seg(LabelMap(array, grid), folder / "s.dcm", source, kind=kind)
    found, own = read_seg(folder / "s.dcm", grid), read_seg(folder / "s.dcm")
    for s in found.structures:
        assert np.array_equal(found.mask(s.number), array == s.number)
        assert world_points(own.mask(s.number), own.geometry.affine) == pytest.approx(
            world_points(array == s.number, grid.affine), abs=0.01
        )


def test_reoriented_labels_and_many_numbers(sources, tmp_path):
    """Labels above 255 on a flipped crop of the source grid."""
    grid = source_series(sources["oblique"])[0]
    array = np.random.default_rng(2).choice([0, 5, 300, 70], grid.shape).astype(np.int16)
    array[:, -3:] = 0
    matrix = np.diag([-1.0, 1, -1, 1])
    matrix[:3, 3] = (grid.shape[0] - 1, 0, grid.shape[2] - 1)
    cut = array[::-1, :-3, ::-1]
    part = LabelMap(cut, Geometry(cut.shape, grid.affine @ matrix))
    for kind in ("binary", "labelmap"):
        write_seg(part, tmp_path / f"{kind}.dcm", sources["oblique"], kind=kind)
        assert np.array_equal(read_seg(tmp_path / f"{kind}.dcm", grid).array, array)
        with pytest.raises(GeometryError, match="labelled voxels outside"):
            read_seg(tmp_path / f"{kind}.dcm", grid.cropped((2, 0, 0), grid.shape))
        wide = grid.cropped((-2, -1, -3), np.add(grid.shape, 1))
        assert np.array_equal(read_seg(tmp_path / f"{kind}.dcm", wide).array[2:-1, 1:-1, 3:-1], array)


def test_a_grid_of_other_axes_takes_the_frames(sources, tmp_path):
    """Axial frames on a grid whose slices run sagittally."""
    mask = np.random.default_rng(5).random(GRID.shape) < 0.3
    write_seg(LabelMap(mask, GRID), tmp_path / "s.dcm", sources["non-square"])
    swap = np.zeros((4, 4))
    swap[0, 2] = swap[1, 0] = swap[3, 3] = 1
    swap[2, 1], swap[2, 3] = -1, GRID.shape[2] - 1
    turned = Geometry((GRID.shape[1], GRID.shape[2], GRID.shape[0]), GRID.affine @ swap)
    assert np.array_equal(read_seg(tmp_path / "s.dcm", turned).mask(1), mask.transpose(1, 2, 0)[:, ::-1])


# ---------------------------------------------------------------------------------------------------------------------
# Refusals


def test_refusals(labels, sources, tmp_path):
    overlapping = LabelMap(np.ones((2, *GRID.shape), bool), GRID)
    with pytest.raises(ValueError, match="must not overlap"):
        write_seg(overlapping, tmp_path / "s.dcm", sources["non-square"], kind="labelmap")
    with pytest.raises(GeometryError, match="must lie on the same"):
        write_seg(labels, tmp_path / "s.dcm", sources["oblique"])
    with pytest.raises(ValueError, match="kind of segmentation must be"):
        write_seg(labels, tmp_path / "s.dcm", sources["oblique"], kind="bits")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one structure"):
        write_seg(LabelMap(labels.array * 0, GRID), tmp_path / "s.dcm", sources["non-square"])
    assert list(tmp_path.iterdir()) == []
    quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"])
    with pytest.raises(FileExistsError):
        write_seg(labels, tmp_path / "s.dcm", sources["non-square"])
    with pytest.raises(DicomError, match=r"image series 9\.8, got .*--allow-mismatch"):
        read_seg(tmp_path / "s.dcm", GRID, series=SeriesIdentity("9.8"))
    assert read_seg(tmp_path / "s.dcm", GRID, series=SeriesIdentity("9.8"), allow_mismatch=True).array.any()
    with pytest.raises(DicomError, match="must be a DICOM-SEG object"):
        read_seg(next(sources["square"].iterdir()))
    coarse = Geometry(GRID.shape, GRID.affine @ np.diag([1, 1, 4.0, 1]))
    for grid, words in ((coarse, "beside|between"), (GRID.with_shape((42, 26, 6)), "turned or scaled")):
        with pytest.raises(GeometryError, match=words):
            read_seg(tmp_path / "s.dcm", grid)
    with pytest.raises(FileNotFoundError):
        read_seg(tmp_path / "none.dcm")


def test_a_file_that_does_not_read_back_is_not_written(labels, sources, tmp_path, monkeypatch):
    monkeypatch.setattr("medseg.io.dicom_seg.frames", lambda d: iter([np.zeros((13, 21), bool)] * 6))
    with pytest.raises(DicomError, match="must read back equal"):
        quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"])
    assert list(tmp_path.iterdir()) == []


def test_errors_of_the_system_pass_and_patient_data_stay_out():
    with pytest.raises(PermissionError), clean_errors("SEG", "x.dcm"):
        raise PermissionError(13, "no")
    with pytest.raises(DicomError, match=r"broken one \(KeyError\) in x\.dcm") as caught, clean_errors("SEG", "x.dcm"):
        raise KeyError("Doe^John")
    assert "Doe" not in str(caught.value)


# ---------------------------------------------------------------------------------------------------------------------
# Encodings


def pack_rle(segments: list[bytes]) -> bytes:
    """An RLE frame of annex G: PackBits with literal runs and repeats."""
    out, starts = bytearray(), []
    for data in segments:
        starts.append(64 + len(out))
        at = 0
        while at < len(data):
            run = 1
            while run < 128 and at + run < len(data) and data[at + run] == data[at]:
                run += 1
            out += bytes([257 - run, data[at]]) if run > 1 else bytes([0, data[at]])
            at += run
        out += b"\x80" * (len(out) % 2)
    return np.array([len(segments), *starts, *[0] * (15 - len(starts))], "<u4").tobytes() + bytes(out)


def re_encode(dataset, masks, how):
    """The same segmentation with its frames in another encoding."""
    bits = [np.packbits(m, axis=None, bitorder="little").tobytes() for m in masks]
    meta = dataset.file_meta
    if how == "rle":
        meta.TransferSyntaxUID, frames = RLELossless, [pack_rle([b]) for b in bits]
    else:
        meta.TransferSyntaxUID, frames = JPEG2000Lossless, []
        for b in bits:
            packer = zlib.compressobj(wbits=-15)
            data = packer.compress(b) + packer.flush()
            frames.append(data + b"\0" * (len(data) % 2))
    dataset.PixelData = encapsulate(frames)
    dataset["PixelData"].VR = "OB"
    dataset["PixelData"].is_undefined_length = True
    return dataset


@pytest.mark.parametrize("how", ["rle", "deflated frames"])
def test_compressed_bits(how, labels, sources, tmp_path):
    quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"])
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    masks = [n == labels.array[:, :, k].T for n, ks in ((3, (1, 2, 3)), (7, (2, 3, 4))) for k in ks]
    re_encode(dataset, masks, how).save_as(tmp_path / "c.dcm")
    if how == "deflated frames":  # a transfer syntax that pydicom does not write
        raw = (tmp_path / "c.dcm").read_bytes()
        (tmp_path / "c.dcm").write_bytes(raw.replace(JPEG2000Lossless.encode(), b"1.2.840.10008.1.2.8.1\0"))
    assert np.array_equal(read_seg(tmp_path / "c.dcm", GRID).array, labels.array)


@pytest.mark.parametrize("vr", ["OB", "OW"])
def test_big_endian(vr, labels, sources, tmp_path):
    quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"])
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    if vr == "OW":  # words are swapped as a whole
        data = dataset.PixelData + b"\0" * (len(dataset.PixelData) % 2)
        dataset.PixelData = np.frombuffer(data, "<u2").astype(">u2").tobytes()
    dataset["PixelData"].VR = vr
    dataset.file_meta.TransferSyntaxUID = UID("1.2.840.10008.1.2.2")
    assert sum(1 for _ in dataset.iterall()) > 100  # every value decoded, so that it can be encoded the other way
    pydicom.dcmwrite(tmp_path / "b.dcm", dataset, implicit_vr=False, little_endian=False, enforce_file_format=True)
    assert np.array_equal(read_seg(tmp_path / "b.dcm", GRID).array, labels.array)


def by_highdicom(source, array, segments, **options):
    """A segmentation as another program makes it."""
    headers = sorted((pydicom.dcmread(p) for p in source.iterdir()), key=lambda d: d.InstanceNumber)
    describe = [
        hd.seg.SegmentDescription(n, f"s{n}", codes.SCT.Tissue, codes.SCT.Liver, "MANUAL", tracking_uid="1.2.3",
                                  tracking_id="t") for n in segments
    ]  # fmt: skip
    return hd.seg.Segmentation(
        headers, array, segment_descriptions=describe, series_instance_uid=generate_uid(), series_number=9,
        sop_instance_uid=generate_uid(), instance_number=1, manufacturer="x", manufacturer_model_name="y",
        software_versions="1", device_serial_number="1", **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "syntax"),
    [("BINARY", JPEG2000Lossless), ("LABELMAP", JPEGLSLossless), ("LABELMAP", JPEG2000Lossless),
     ("FRACTIONAL", JPEGLSLossless)],
)  # fmt: skip
def test_codecs(kind, syntax, tmp_path):
    grid = Geometry.from_parts((41, 35, 4), (0.5, 0.7, 2), direction=np.diag([-1, -1, 1]))
    source = write_source(tmp_path / "in", grid)
    array = np.zeros(grid.shape[::-1], np.uint8)
    array[1:, 3:20, 5:17], array[2, 22:30, 11:40] = 1, 2
    made = quietly(by_highdicom, source, array, (1, 2), segmentation_type=kind, transfer_syntax_uid=syntax)
    made.save_as(tmp_path / "h.dcm")
    found = quietly(read_seg, tmp_path / "h.dcm", grid)
    for n in (1, 2):
        assert np.array_equal(found.mask(n), (array == n).T)


def test_labels_of_sixteen_bits_and_a_palette_free_background(sources, tmp_path):
    array = np.random.default_rng(0).choice([0, 7, 4000], GRID.shape[::-1]).astype(np.uint16)
    made = quietly(by_highdicom, sources["non-square"], array, (7, 4000), segmentation_type="LABELMAP")
    made.save_as(tmp_path / "h.dcm")
    found = quietly(read_seg, tmp_path / "h.dcm", GRID)
    assert found.array.dtype == np.uint16 and np.array_equal(found.array, array.T) and list(found.names) == [7, 4000]
    raw = [made.pixel_array[n].tobytes() for n in range(made.NumberOfFrames)]
    rle = pydicom.dcmread(tmp_path / "h.dcm")
    rle.file_meta.TransferSyntaxUID = RLELossless
    rle.PixelData = encapsulate([pack_rle([r[1::2], r[0::2]]) for r in raw])
    rle["PixelData"].VR, rle["PixelData"].is_undefined_length = "OB", True
    rle.save_as(tmp_path / "r.dcm")
    assert np.array_equal(quietly(read_seg, tmp_path / "r.dcm", GRID).array, array.T)
    del made.SegmentSequence[1]
    made.PixelPaddingValue = 4000
    made.save_as(tmp_path / "p.dcm")
    with pytest.warns(UserWarning, match=r"labels \[7\] are not described"):
        found = read_seg(tmp_path / "p.dcm", GRID)
    assert found.names == {7: "label 7"} and np.array_equal(found.array == 7, array.T == 7) and found.array.max() == 7


# ---------------------------------------------------------------------------------------------------------------------
# Geometry of the frames


def test_own_grid_fills_gaps_and_refuses_nonsense(labels, sources, tmp_path):
    sparse = np.zeros(GRID.shape, np.uint8)
    sparse[2:5, 3:6, [0, 1, 5]] = 1
    write_seg(LabelMap(sparse, GRID), tmp_path / "s.dcm", sources["non-square"])
    with pytest.warns(UserWarning, match="3 of 6 slices have no frame"):
        own = read_seg(tmp_path / "s.dcm")
    assert own.geometry.is_close(GRID) and np.array_equal(own.array, sparse)
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    del dataset.SharedFunctionalGroupsSequence[0].PixelMeasuresSequence[0].SpacingBetweenSlices
    dataset.save_as(tmp_path / "n.dcm")
    assert np.array_equal(quietly(read_seg, tmp_path / "n.dcm").array, sparse)  # from the positions alone
    position = dataset.PerFrameFunctionalGroupsSequence[1].PlanePositionSequence[0]
    for z, words in ((-622.61, "evenly spaced"), (1e9, "one volume")):
        position.ImagePositionPatient = [*position.ImagePositionPatient[:2], z]
        dataset.save_as(tmp_path / "u.dcm")
        with pytest.raises(DicomError, match=words):
            quietly(read_seg, tmp_path / "u.dcm")


def test_a_plain_picture_has_no_position(tmp_path):
    """A radiograph: no frame of reference, one image, segments overlapping."""
    grid = Geometry.from_parts((19, 14, 1), (0.2, 0.3, 1))
    drop = ("FrameOfReferenceUID", "ImagePositionPatient", "ImageOrientationPatient")
    source = write_source(tmp_path / "in", grid, drop=drop)
    for path in source.iterdir():
        image = pydicom.dcmread(path)
        image.SOPClassUID = image.file_meta.MediaStorageSOPClassUID = "1.2.840.10008.5.1.4.1.1.1"
        image.save_as(path)
    array = np.zeros((1, 14, 19, 2), np.uint8)
    array[0, 2:9, 3:12, 0] = array[0, 5:11, 7:17, 1] = 1
    made = quietly(by_highdicom, source, array, (1, 2), segmentation_type="BINARY")
    made.save_as(tmp_path / "h.dcm")
    with pytest.warns(UserWarning, match="no position in the patient"):
        found = read_seg(tmp_path / "h.dcm")
    assert found.geometry.shape == (19, 14, 1) and found.is_layered
    assert np.array_equal(found.array, array.transpose(3, 2, 1, 0).astype(bool))


def test_headers_that_lie_are_refused(labels, sources, tmp_path):
    quietly(write_seg, labels, tmp_path / "s.dcm", sources["non-square"])
    lies = {
        "must have the": {"Rows": 4000, "Columns": 4000},
        "at most": {"Rows": 65535, "Columns": 65535},
        "must describe": {"NumberOfFrames": 1 << 30},
        "1, 8 or 16 bits": {"BitsAllocated": 32},
        "pixel data, got none": {"PixelData": None},
    }
    for words, changes in lies.items():
        dataset = pydicom.dcmread(tmp_path / "s.dcm")
        for keyword, value in changes.items():
            delattr(dataset, keyword) if value is None else setattr(dataset, keyword, value)
        dataset.save_as(tmp_path / "l.dcm")
        with pytest.raises(DicomError, match=words):
            read_seg(tmp_path / "l.dcm")
    dataset = pydicom.dcmread(tmp_path / "s.dcm")
    dataset.PerFrameFunctionalGroupsSequence[0].SegmentIdentificationSequence[0].ReferencedSegmentNumber = 99
    dataset.save_as(tmp_path / "l.dcm")
    with pytest.raises(DicomError, match="got segment 99"):
        read_seg(tmp_path / "l.dcm")


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_broken_files_end_in_a_value_or_an_error_of_ours(data, labels, sources, tmp_path):
    path = tmp_path / "whole.dcm"
    if not path.exists():
        quietly(write_seg, labels, path, sources["non-square"], kind="labelmap")
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "broken.dcm").write_bytes(raw[: data.draw(st.integers(len(raw) // 2, len(raw)))])
    with contextlib.suppress(DicomError, GeometryError):
        assert isinstance(quietly(read_seg, tmp_path / "broken.dcm"), LabelMap)


# ---------------------------------------------------------------------------------------------------------------------
# Codes


def test_codes_are_those_of_the_standard():
    """Every value of the table is in pydicom's copy of the SNOMED CT codes that DICOM uses."""
    known = {c.value for name in codes.SCT.dir() for c in [getattr(codes.SCT, name)]}
    assert {m.type.value for m in _table().values()} <= known


@pytest.mark.parametrize(
    ("name", "type_", "region", "side"),
    [
        ("liver", "Liver", None, None),
        ("Lt Lung", "Lung", None, "Left"),
        ("kidney_right", "Kidney", None, "Right"),
        ("LeftKidney", "Kidney", None, "Left"),
        ("vertebrae_L4", "L4 vertebra", None, None),
        ("Tumor of liver", "Neoplasm", "Liver", None),
        ("heart_ventricle_left", "Left ventricle", None, None),
        ("something else", "Image Region", None, None),
        ("left", "Image Region", None, None),
    ],
)
def test_names_have_meanings(name, type_, region, side):
    meaning = meaning_of(name)
    assert meaning.type.meaning == type_
    assert (meaning.region.meaning if meaning.region else None, meaning.side.meaning if meaning.side else None) == (
        region,
        side,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Real files


CASES = [
    "seg_dcmqi_24cols", "seg_dcmqi_liver", "seg_hd_binary", "seg_hd_fractional", "seg_hd_fractional_binary",
    "seg_labelmap_sparse", "seg_liver_deflate", "seg_liver_expb", "seg_liver_nonbyte_aligned", "seg_liver_rle",
    "seg_sr_example_noimages",
]  # fmt: skip


@pytest.mark.data
@pytest.mark.parametrize("case", CASES)
def test_real_segmentations(case, data_dir):
    found = quietly(read_seg, data_dir / "dicom" / case / "seg.dcm")
    answers = np.load(data_dir / "dicom" / case / "expected.npz")
    numbers = [int(name[3:]) for name in answers.files if name.startswith("ras")]
    assert numbers == [s.number for s in found.structures]
    for n, s in enumerate(found.structures):
        values = found.array[n] if found.is_layered else found.mask(s.number).astype(float)
        nearest = found.geometry.to_index(answers[f"ras{s.number}"])
        index = np.round(nearest).astype(int)
        assert np.abs(nearest - index).max() < 0.01 and np.count_nonzero(values) == len(index)
        assert values[tuple(index.T)] == pytest.approx(answers[f"val{s.number}"], abs=1e-6)
