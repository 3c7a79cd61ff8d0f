"""The DICOM reader on series made with pydicom, on pydicom's own files, and on the development data."""

from __future__ import annotations

import json
import os
import warnings
import zipfile
from pathlib import Path

import numpy as np
import pydicom
import pydicom.data
import pytest
from dicom_made import (
    AXIAL,
    CORONAL,
    SAGITTAL,
    SHAPE,
    SPACING,
    affine_of,
    csa,
    dose,
    enhanced,
    image,
    mosaic,
    oblique,
    pixels,
    save,
    series,
    stack_positions,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import (
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGLSLossless,
    MRImageStorage,
    RLELossless,
    SecondaryCaptureImageStorage,
    UltrasoundMultiFrameImageStorage,
)

from medseg.io import dicom_header
from medseg.io.dicom import list_series, lps_to_ras, object_kind, read_all, read_series, source_frames, source_series
from medseg.io.dicom_files import DicomFile
from medseg.io.dicom_mosaic import read_csa
from medseg.io.dicom_workers import Task, _Worker
from medseg.volume import DicomError, Volume

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental
    import nibabel.nicom.dicomwrappers as nicom

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
STEP = np.array([0.0, 0.0, 2.5])


def values(volume: Volume, k: int, channel: int = 0) -> np.ndarray:
    """(rows, columns) of slice k, as DICOM stores it."""
    return np.asarray(volume.array[channel, :, :, k].T)


def volumes(path: Path, **options: bool) -> dict[str, Volume | DicomError]:
    return {info.name: v for info, v in read_all(path, **options)}


def good(found: dict[str, Volume | DicomError]) -> dict[str, Volume]:
    assert all(isinstance(v, Volume) for v in found.values()), found
    return found  # type: ignore[return-value]


# ---------------------------------------------------------------------------------------------------------------------
# Geometry


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    angle=st.floats(-0.7, 0.7),
    count=st.integers(2, 6),
    gap=st.floats(0.5, 8),
    shear=st.tuples(st.floats(-2, 2), st.floats(-2, 2)),
    start=st.tuples(*[st.floats(-200, 200)] * 3),
)
def test_affine_is_that_of_the_standard(
    tmp_path_factory: pytest.TempPathFactory,
    angle: float,
    count: int,
    gap: float,
    shear: tuple[float, float],
    start: tuple,
) -> None:
    folder, axes = tmp_path_factory.mktemp("oblique"), oblique(angle)
    step = gap * np.cross(axes[:3], axes[3:]) + shear[0] * np.array(axes[:3]) + shear[1] * np.array(axes[3:])
    positions = [np.asarray(start) + k * step for k in range(count)]
    arrays = series(folder, positions, axes)
    volume = read_series(folder)
    assert np.allclose(volume.geometry.affine, affine_of(start, axes, step), atol=1e-2 if count == 2 else 5e-3)
    for k in range(count):
        corner = np.asarray(volume.geometry.to_world([SHAPE[0] - 1, SHAPE[1] - 1, k]))
        want = positions[k] + 6 * SPACING[1] * np.array(axes[:3]) + 4 * SPACING[0] * np.array(axes[3:])
        assert np.allclose(corner, lps_to_ras(want), atol=0.011)
        assert np.array_equal(values(volume, k), arrays[k])


@pytest.mark.parametrize("axes", [AXIAL, CORONAL, SAGITTAL, oblique()])
@pytest.mark.parametrize("descending", [False, True])
def test_order_is_by_position_whatever_names_and_numbers_say(tmp_path: Path, axes: tuple, descending: bool) -> None:
    positions = stack_positions(5, axes=axes)[:: -1 if descending else 1]
    arrays = series(tmp_path, positions, axes)[:: -1 if descending else 1]
    volume = read_series(tmp_path)
    assert all(np.array_equal(values(volume, k), arrays[k]) for k in range(5))
    assert np.linalg.det(volume.geometry.affine[:3, :3]) > 0
    assert volume.geometry.shape == (*SHAPE, 5) and np.allclose(volume.geometry.spacing, (0.8, 1.5, 2.5))


def test_gantry_tilt_is_kept_exactly_and_said(tmp_path: Path) -> None:
    step = np.array([0.0, 0.7, 2.4])
    series(tmp_path, [k * step for k in range(4)])
    with pytest.warns(UserWarning, match="gantry tilt of 16.3 degrees"):
        volume = read_series(tmp_path)
    assert volume.geometry.is_skewed
    assert np.allclose(volume.geometry.affine, affine_of((0, 0, 0), AXIAL, step))


def test_orientation_that_drifts_in_the_eighth_digit_is_one_volume(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(4), each=lambda k: {"ImageOrientationPatient": [1, 3e-8 * k, 0, 0, 1, 0]})
    assert read_series(tmp_path).geometry.shape[2] == 4


def test_single_slice_has_its_thickness(tmp_path: Path) -> None:
    series(tmp_path, [(1, 2, 3)])
    assert read_series(tmp_path).geometry.spacing == pytest.approx((0.8, 1.5, 2.5))


def test_missing_and_uneven_slices_are_refused_with_positions_or_resampled(tmp_path: Path) -> None:
    arrays = series(tmp_path, [(0, 0, z) for z in (0.0, 2.0, 4.0, 8.0)])
    with pytest.raises(DicomError, match=r"gaps of 2 mm but 4 mm between 4\.00 and 8\.00 .*--resample"):
        read_series(tmp_path)
    info = list_series(tmp_path)[0]
    assert info.shape == () and info.quirks[0].startswith("refused: slices must be evenly spaced")
    with pytest.warns(UserWarning, match="resampled to 5"):
        volume = read_series(tmp_path, resample=True)
    assert volume.geometry.shape == (*SHAPE, 5) and volume.geometry.spacing[2] == pytest.approx(2.0)
    middle = np.rint((arrays[2].astype(float) + arrays[3]) / 2)
    assert np.array_equal(values(volume, 3), middle) and np.array_equal(values(volume, 4), arrays[3])


def test_a_gap_too_long_to_fill_is_refused_even_for_resampling(tmp_path: Path) -> None:
    series(tmp_path, [(0, 0, z) for z in (0.0, 1.0, 2.0, 200.0)])
    with pytest.raises(DicomError, match="at most 4 times"):
        read_series(tmp_path, resample=True)


def test_slices_beside_the_line_are_refused(tmp_path: Path) -> None:
    series(tmp_path, [(3.0 * (k == 1), 0, 2.0 * k) for k in range(4)])
    with pytest.raises(DicomError, match="must lie on one line"):
        read_series(tmp_path, resample=True)


# ---------------------------------------------------------------------------------------------------------------------
# What belongs together


def test_two_series_in_a_folder_are_listed_and_chosen_by_name_uid_or_number(tmp_path: Path) -> None:
    a = series(tmp_path, stack_positions(3), prefix="a")
    b = series(tmp_path, stack_positions(4), prefix="b", seed=1, SeriesInstanceUID="1.2.3.4.9.77", SeriesNumber=8)
    with pytest.raises(DicomError, match=r"3_made_up .* 8_made_up .*--series") as refusal:
        read_series(tmp_path)
    assert "1.2.3.4.5" not in str(refusal.value) and "Secret" not in str(refusal.value)
    for key in ("8", "8_made_up", "1.2.3.4.9.77", "9.77"):
        assert np.array_equal(values(read_series(tmp_path, key), 3), b[3])
    assert np.array_equal(values(read_series(tmp_path, "3"), 0), a[0])
    with pytest.raises(DicomError, match="--series must name one of 3_made_up"):
        read_series(tmp_path, "99")


def test_three_planes_of_one_series_are_three_volumes(tmp_path: Path) -> None:
    for name, axes in (("a", AXIAL), ("c", CORONAL), ("s", SAGITTAL)):
        series(tmp_path, stack_positions(3, axes=axes), axes, prefix=name)
    found = good(volumes(tmp_path))
    assert sorted(found) == ["3_made_up_axial", "3_made_up_coronal", "3_made_up_sagittal"]


def test_slices_that_rotate_about_an_axis_are_no_volume(tmp_path: Path) -> None:
    for k in range(6):
        c, s = np.cos(0.3 * k), np.sin(0.3 * k)
        series(tmp_path, [(0, 0, 0)], (c, s, 0, 0, 0, -1), prefix=f"r{k}", seed=k)
    with pytest.raises(DicomError, match=r"rotate about an axis .*--slices"):
        read_series(tmp_path)
    found = good(volumes(tmp_path, slices=True))
    assert len(found) == 6 and all(v.geometry.shape[2] == 1 for v in found.values())


def test_echoes_and_components_are_volumes_of_their_own(tmp_path: Path) -> None:
    for echo in (4.6, 9.2):
        for part in ("M", "P"):
            series(
                tmp_path, stack_positions(3), prefix=f"{echo}{part}", seed=int(echo), Modality="MR",
                SOPClassUID=MRImageStorage, EchoTime=echo, ImageType=["ORIGINAL", "PRIMARY", part],
            )  # fmt: skip
    names = sorted(good(volumes(tmp_path)))
    assert names == [f"3_made_up_e{e}_{c}" for e in (1, 2) for c in ("magnitude", "phase")]


@pytest.mark.parametrize(
    ("keyword", "told"),
    [
        ("TemporalPositionIdentifier", [1, 2, 10]),
        ("TriggerTime", [0.0, 250.0, 1100.0]),
        ("AcquisitionNumber", [1, 2, 3]),
        ("AcquisitionTime", ["090000.10", "090002.10", "100000"]),
        ("DiffusionBValue", [0.0, 500.0, 1000.0]),
    ],
)
def test_time_points_are_told_apart_by_each_attribute(tmp_path: Path, keyword: str, told: list) -> None:
    arrays = [
        series(tmp_path, stack_positions(4), prefix=f"t{t}", seed=t, Modality="MR", SOPClassUID=MRImageStorage,
               **{keyword: value})
        for t, value in enumerate(told)
    ]  # fmt: skip
    found = good(volumes(tmp_path))
    assert sorted(found) == [f"3_made_up_t{t}" for t in (1, 2, 3)]
    for t in range(3):
        assert all(np.array_equal(values(found[f"3_made_up_t{t + 1}"], k), arrays[t][k]) for k in range(4))


def test_phases_are_in_order_of_their_trigger_time_not_of_acquisition(tmp_path: Path) -> None:
    for t, trigger in enumerate((0.0, 90.0, 800.0)):
        series(
            tmp_path, stack_positions(3), prefix=f"t{t}", seed=t, TriggerTime=trigger, AcquisitionTime=f"{100900 - t}"
        )
    found = good(volumes(tmp_path))
    assert [int(values(found[f"3_made_up_t{t + 1}"], 0)[0, 0]) for t in range(3)] == [
        int(pixels(0, seed=t)[0, 0]) for t in range(3)
    ]


def test_kinds_of_image_at_one_position_are_named_by_their_type(tmp_path: Path) -> None:
    for t, kind in enumerate(("TRACEW", "ADC")):
        series(
            tmp_path, stack_positions(3), prefix=f"t{t}", seed=t, ImageType=["DERIVED", "PRIMARY", "DIFFUSION", kind]
        )
    assert sorted(good(volumes(tmp_path))) == ["3_made_up_adc", "3_made_up_tracew"]


def test_time_points_known_by_order_alone(tmp_path: Path) -> None:
    arrays = []
    for t in range(3):
        arrays.append([pixels(k, seed=t) for k in range(4)])
        for k, p in enumerate(stack_positions(4)):
            save(image(arrays[t][k], p, InstanceNumber=1 + t + 3 * k), tmp_path / f"{(k * 5 + t * 3) % 13}_{k}{t}.dcm")
    found = good(volumes(tmp_path))
    for t in range(3):
        assert all(np.array_equal(values(found[f"3_made_up_t{t + 1}"], k), arrays[t][k]) for k in range(4))


def test_images_at_one_position_that_nothing_tells_apart_are_refused(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(3), prefix="a", InstanceNumber=1)
    series(tmp_path, stack_positions(3)[1:2], prefix="b", seed=4, InstanceNumber=1)
    with pytest.raises(DicomError, match=r"got several that nothing tells apart at 7\.50 mm"):
        read_series(tmp_path)


def test_a_time_series_of_one_slice_is_no_volume(tmp_path: Path) -> None:
    arrays = [pixels(0, seed=t) for t in range(4)]
    for t, a in enumerate(arrays):
        save(image(a, (0, 0, 5), AcquisitionNumber=t), tmp_path / f"{t}.dcm")
    with pytest.raises(DicomError, match="4 images at one position"):
        read_series(tmp_path)
    found = good(volumes(tmp_path, slices=True))
    assert [v.geometry.shape[2] for v in found.values()] == [1] * 4
    assert np.array_equal(values(found["3_made_up_s3"], 0), arrays[2])


def test_an_interrupted_last_time_point_says_so(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(5), prefix="a", TemporalPositionIdentifier=1)
    series(tmp_path, stack_positions(5)[:3], prefix="b", seed=1, TemporalPositionIdentifier=2)
    found = good(volumes(tmp_path))
    assert found["3_made_up_t2"].geometry.shape[2] == 3
    assert "holds 3 of 5 positions" in found["3_made_up_t2"].meta["quirks"]


def test_duplicates_are_dropped_by_uid_and_by_equal_pixels_and_said(tmp_path: Path) -> None:
    arrays = [pixels(k) for k in range(4)]
    for k, p in enumerate(stack_positions(4)):
        ds = image(arrays[k], p, InstanceNumber=k + 1)
        save(ds, tmp_path / f"{k}.dcm")
        if k % 2:
            save(ds, tmp_path / f"same_uid_{k}.dcm")
        else:
            save(image(arrays[k], p, InstanceNumber=k + 1), tmp_path / f"new_uid_{k}.dcm")
    with pytest.warns(UserWarning) as said:
        volume = read_series(tmp_path)
    assert volume.geometry.shape[2] == 4
    assert {"2 duplicate images dropped (same SOPInstanceUID)",
            "2 duplicate images dropped (same position and equal pixels)"} <= set(volume.meta["quirks"])  # fmt: skip
    assert sum("duplicate" in str(w.message) for w in said) == 2


def test_one_uid_for_every_image_is_no_reason_to_drop_any(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(4), SOPInstanceUID="1.2.3")
    assert read_series(tmp_path).geometry.shape[2] == 4


def test_junk_is_skipped_and_named(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(3))
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    whole = save(image(pixels(9), (0, 0, 99)), tmp_path / "cut.dcm")
    whole.write_bytes(whole.read_bytes()[:-9])
    (tmp_path / "random.dcm").write_bytes(np.random.default_rng(0).bytes(3000))
    with pytest.warns(UserWarning) as said:
        volume = read_series(tmp_path)
    text = " ".join(str(w.message) for w in said)
    assert volume.geometry.shape[2] == 3
    assert all(name in text for name in ("4 files skipped", "notes.txt", "empty", "cut.dcm (truncated?)", "random.dcm"))
    assert "Secret" not in text and "SECRET" not in text and "1.2.3.4" not in text


def test_nothing_but_junk_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DicomError, match="must hold DICOM images"):
        read_series(tmp_path)
    with pytest.raises(FileNotFoundError):
        read_series(tmp_path / "none")


def test_a_file_without_meta_is_read(tmp_path: Path) -> None:
    for syntax in (ImplicitVRLittleEndian, ExplicitVRLittleEndian):
        path = save(image(pixels(1), (0, 0, 0)), tmp_path / "x.dcm", syntax)
        ds = pydicom.dcmread(path)
        pydicom.dcmwrite(path, ds, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
        raw = path.read_bytes()
        start = raw.index(b"\x08\x00\x08\x00")
        path.write_bytes(raw[start:])
        assert np.array_equal(values(read_series(path), 0), pixels(1))


# ---------------------------------------------------------------------------------------------------------------------
# Multi-frame


def test_enhanced_frames_are_placed_and_told_apart_one_by_one(tmp_path: Path) -> None:
    keys = [(t, c, k) for c in ("MAGNITUDE", "PHASE") for k in (2, 0, 1) for t in (1, 2)]
    arrays = {key: pixels(key[2], seed=10 * key[0] + len(key[1])) for key in keys}
    axes = oblique()
    positions = stack_positions(3, axes=axes)
    frames = [{"position": positions[k], "axes": axes, "time": t, "component": c, "slope": 1 + k} for t, c, k in keys]
    save(enhanced([arrays[key] for key in keys], frames), tmp_path / "e.dcm")
    found = good(volumes(tmp_path))
    assert sorted(found) == [f"3_made_up_{c}_t{t}" for c in ("magnitude", "phase") for t in (1, 2)]
    for (t, c, k), a in arrays.items():
        volume = found[f"3_made_up_{c.lower()}_t{t}"]
        assert np.array_equal(values(volume, k), a.astype(int) * (1 + k))
        assert np.allclose(
            volume.geometry.affine, affine_of(positions[0], axes, positions[1] - positions[0]), atol=1e-6
        )


def test_enhanced_with_fewer_groups_than_frames_is_refused(tmp_path: Path) -> None:
    ds = enhanced([pixels(k) for k in range(3)], [{"position": (0, 0, k)} for k in range(3)])
    ds.PerFrameFunctionalGroupsSequence.pop()
    save(ds, tmp_path / "e.dcm")
    with pytest.raises(DicomError, match="one functional group per frame, got 2 for 3"):
        read_series(tmp_path / "e.dcm")


@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
def test_dose_grid(tmp_path: Path, absolute: bool, sign: int) -> None:
    arrays = [np.full(SHAPE[::-1], 70_000 * (k + 1), np.uint32) for k in range(4)]
    offsets = [sign * 3.0 * k + (50.0 if absolute else 0) for k in range(4)]
    save(dose(arrays, (1, 2, 50), offsets, 1e-4), tmp_path / "d.dcm")
    volume = read_series(tmp_path)
    order = range(4) if sign > 0 else range(3, -1, -1)
    assert volume.meta["units"] == "Gy" and volume.geometry.spacing[2] == pytest.approx(3)
    assert np.allclose(volume.array[0, 0, 0], [7.0 * (k + 1) for k in order])
    assert volume.geometry.origin == pytest.approx((-1, -2, 50 if sign > 0 else 41))


def test_cine_and_captures_are_no_volumes(tmp_path: Path) -> None:
    ds = image(np.stack([pixels(k) for k in range(4)]), None, None, SOPClassUID=UltrasoundMultiFrameImageStorage,
               Modality="US", PixelSpacing=None)  # fmt: skip
    ds.Rows, ds.Columns, ds.NumberOfFrames = SHAPE[1], SHAPE[0], 4
    save(ds, tmp_path / "us.dcm")
    with pytest.raises(DicomError, match=r"state the position of its frames.*--slices"):
        read_series(tmp_path)
    found = good(volumes(tmp_path, slices=True))
    assert len(found) == 4 and np.array_equal(values(found["3_made_up_s4"], 0), pixels(3))
    colour = np.random.default_rng(0).integers(0, 255, (*SHAPE[::-1], 3)).astype(np.uint8)
    ds = image(colour, None, None, SOPClassUID=SecondaryCaptureImageStorage, SamplesPerPixel=3, PlanarConfiguration=0,
               PhotometricInterpretation="RGB", Modality="OT")  # fmt: skip
    save(ds, tmp_path / "rgb" / "x.dcm")
    with pytest.warns(UserWarning, match="2D picture"):
        volume = read_series(tmp_path / "rgb")
    assert volume.channels == 3 and np.array_equal(np.moveaxis(volume.array[..., 0], 0, -1).swapaxes(0, 1), colour)


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("axes", [AXIAL, CORONAL, SAGITTAL, oblique()])
@pytest.mark.parametrize("sign", [1, -1])
def test_siemens_mosaic_equals_nibabel(tmp_path: Path, version: int, axes: tuple, sign: int) -> None:
    normal = sign * np.cross(axes[:3], axes[3:])
    arrays = [pixels(k) for k in range(7)]
    path = save(mosaic(arrays, (-10, 20, 5), axes, normal, 3.0, csa_version=version), tmp_path / "m.dcm")
    volume = read_series(tmp_path)
    for k in range(7):
        world = lps_to_ras(np.array([-10, 20, 5]) + 3.0 * k * normal)
        index = np.rint(volume.geometry.to_index(world)).astype(int)
        assert np.allclose(volume.geometry.to_world(index), world, atol=1e-4)
        assert np.array_equal(values(volume, int(index[2])), arrays[k])
    theirs = nicom.wrapper_from_file(path)
    theirs_affine, theirs_data = lps_to_ras(theirs.affine), theirs.get_data()
    for index in ((0, 0, 0), (3, 2, 4), (4, 6, 6)):
        at = np.rint(volume.geometry.to_index((theirs_affine @ [*index, 1])[:3])).astype(int)
        assert theirs_data[index] == volume.array[(0, *at)]


def test_mosaic_without_csa_header_is_refused(tmp_path: Path) -> None:
    ds = mosaic([pixels(k) for k in range(4)], (0, 0, 0), AXIAL, (0, 0, 1), 3.0)
    del ds[0x00291010]
    save(ds, tmp_path / "m.dcm")
    with pytest.raises(DicomError, match="CSA header"):
        read_series(tmp_path / "m.dcm")


@pytest.mark.parametrize("version", [1, 2])
def test_csa_header_is_parsed_and_bounded(version: int) -> None:
    data = csa({"A": [], "Bc": ["x"], "SliceNormalVector": ["0.0", "-1.5", "2"]}, version)
    assert read_csa(data)["SliceNormalVector"] == ["0.0", "-1.5", "2"]
    for cut in range(len(data)):
        try:
            read_csa(data[:cut])
        except DicomError:
            continue
    with pytest.raises(DicomError):
        read_csa(b"SV10" + b"\xff" * 40)


def test_uih_vframe(tmp_path: Path) -> None:
    arrays = [pixels(k) for k in range(5)]
    big = np.zeros((2 * SHAPE[1], 3 * SHAPE[0]), np.uint16)
    positions = stack_positions(5, axes=CORONAL)
    items = []
    for k, a in enumerate(arrays):
        r, c = divmod(k, 3)
        big[r * 5 : r * 5 + 5, c * 7 : c * 7 + 7] = a
        item = pydicom.Dataset()
        item.ImagePositionPatient = [float(v) for v in positions[k]]
        items.append(item)
    ds = image(big, None, CORONAL, Modality="MR", ImageType=["ORIGINAL", "PRIMARY", "M", "VFRAME"])
    block = ds.private_block(0x65, "Image Private Header", create=True)
    block.add_new(0x51, "SQ", items)
    save(ds, tmp_path / "u.dcm")
    volume = read_series(tmp_path)
    assert np.allclose(volume.geometry.affine, affine_of(positions[0], CORONAL, positions[1] - positions[0]))
    assert all(np.array_equal(values(volume, k), arrays[k]) for k in range(5))


# ---------------------------------------------------------------------------------------------------------------------
# Values


def test_slope_and_sign_may_differ_in_every_slice(tmp_path: Path) -> None:
    positions = stack_positions(3)
    signed = np.array([[-5, 100], [2000, -2000]], np.int16)
    twelve = np.array([[0xF005, 100], [0x0FFF, 0x1001]], np.uint16)  # garbage above bit 12
    save(image(signed, positions[0], RescaleSlope=2, RescaleIntercept=-3), tmp_path / "a")
    save(image(twelve, positions[1], BitsStored=12, HighBit=11), tmp_path / "b")
    save(image(signed.view(np.uint16), positions[2], RescaleSlope=0.5), tmp_path / "c")
    volume = read_series(tmp_path)
    assert volume.array.dtype == np.float32
    assert np.allclose(values(volume, 0), signed * 2.0 - 3)
    assert np.array_equal(values(volume, 1), twelve & 0xFFF)
    assert np.allclose(values(volume, 2), signed.view(np.uint16) * 0.5)


@pytest.mark.parametrize(
    ("stored", "intercept", "kind"),
    [
        (np.array([[0, 4000]], np.uint16), -1024, np.int16),
        (np.array([[-2000, 3000]], np.int16), 0, np.int16),
        (np.array([[0, 60000]], np.uint16), 0, np.uint16),
        (np.array([[0, 60000]], np.uint16), -1024, np.int32),
        (np.array([[-32768, 32767]], np.int16), -1024, np.int32),
        (np.array([[3, 200]], np.uint8), 0, np.uint8),
        (np.array([[3, 200]], np.uint8), -100, np.int16),
        (np.array([[-3, 100]], np.int8), 0, np.int16),
    ],
)
def test_integers_stay_integers_and_exact(tmp_path: Path, stored: np.ndarray, intercept: int, kind: type) -> None:
    save(image(stored, (0, 0, 0), RescaleIntercept=intercept), tmp_path / "a.dcm")
    volume = read_series(tmp_path)
    assert volume.array.dtype == kind and np.array_equal(values(volume, 0), stored.astype(int) + intercept)


def test_sign_of_twelve_bits_is_extended(tmp_path: Path) -> None:
    stored = np.array([[0x0FFF, 0x0800, 0x07FF, 0xF001]], np.uint16)
    save(image(stored, (0, 0, 0), BitsStored=12, HighBit=11, PixelRepresentation=1), tmp_path / "a.dcm")
    assert values(read_series(tmp_path), 0).tolist() == [[-1, -2048, 2047, 1]]


def test_padding_is_reported(tmp_path: Path) -> None:
    stored = np.array([[-2000, -2000, 0, 50]], np.int16)
    ds = image(stored, (0, 0, 0), RescaleIntercept=-24)
    ds.add_new("PixelPaddingValue", "SS", -2000)
    save(ds, tmp_path / "a.dcm")
    with pytest.warns(UserWarning, match=r"50\.0 % of the voxels hold the padding value -2024"):
        volume = read_series(tmp_path)
    assert volume.meta["padding"] == -2024


@pytest.mark.parametrize(
    "syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian, ExplicitVRBigEndian, DeflatedExplicitVRLittleEndian]
)
def test_uncompressed_syntaxes(tmp_path: Path, syntax: str) -> None:
    for k, p in enumerate(stack_positions(3)):
        save(image(pixels(k), p, RescaleIntercept=-1000), tmp_path / f"{k}", syntax)
    volume = read_series(tmp_path)
    assert all(np.array_equal(values(volume, k), pixels(k).astype(int) - 1000) for k in range(3))


@pytest.mark.parametrize("syntax", [RLELossless, JPEG2000Lossless, JPEGLSLossless])
@pytest.mark.parametrize("fragments", [1, 3])
def test_compressed_syntaxes(tmp_path: Path, syntax: str, fragments: int) -> None:
    shape = (64, 48)
    for k, p in enumerate(stack_positions(3)):
        ds = image(pixels(k, shape), p)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(syntax)
        if fragments > 1 and syntax != RLELossless:
            frame = next(pydicom.encaps.generate_frames(ds.PixelData, number_of_frames=1))
            ds.PixelData = pydicom.encaps.encapsulate([frame], fragments_per_frame=fragments)
        ds.save_as(tmp_path / f"{k}", enforce_file_format=True)
    volume = read_series(tmp_path)
    assert all(np.array_equal(values(volume, k), pixels(k, shape)) for k in range(3))


def test_frames_decoded_in_parallel_come_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medseg.io.dicom_pixels.worker_count", lambda pixels: 2)
    shape = (64, 48)
    for k, p in enumerate(stack_positions(7)):
        ds = image(pixels(k, shape), p)
        ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        ds.compress(JPEG2000Lossless)
        ds.save_as(tmp_path / f"{k}", enforce_file_format=True)
    volume = read_series(tmp_path)
    assert all(np.array_equal(values(volume, k), pixels(k, shape)) for k in range(7))
    data = (tmp_path / "3").read_bytes()
    (tmp_path / "3").write_bytes(data.replace(b"\xff\x51\x00\x29", b"\xff\x51\x00\x2a"))
    with pytest.raises(DicomError, match="frame must be"):
        read_series(tmp_path)


def test_a_codec_that_crashes_takes_down_its_worker_only() -> None:
    task = Task(0, b"x", JPEG2000Lossless, {"rows": 1}, "a.dcm")
    worker = _Worker()
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(DicomError, match=r"crash of the codec on a\.dcm"):
        worker.decode(task)
    worker.close()


def test_a_codec_sees_no_stream_of_another_size_than_its_header(tmp_path: Path) -> None:
    ds = image(pixels(0, (64, 48)), (0, 0, 0))
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.compress(JPEG2000Lossless)
    ds.Rows = 4800
    ds.save_as(tmp_path / "x.dcm", enforce_file_format=True)
    with pytest.raises(DicomError, match=r"must be 4800 x 64 x 1 as its header, got \(48, 64, 1\)"):
        read_series(tmp_path)


@pytest.mark.parametrize(("correction", "factor"), [("START", 2 ** (3600 / 6600)), ("ADMIN", 1.0)])
def test_suv_by_body_weight(tmp_path: Path, correction: str, factor: float) -> None:
    drug = pydicom.Dataset()
    drug.RadionuclideTotalDose, drug.RadionuclideHalfLife = 3.5e8, 6600.0
    drug.RadiopharmaceuticalStartTime = "100000.00"
    arrays = series(
        tmp_path, stack_positions(3), Modality="PT", Units="BQML", DecayCorrection=correction, PatientWeight=70.0,
        SeriesDate="20200101", SeriesTime="110000", AcquisitionDate="20200101", AcquisitionTime="110500",
        RadiopharmaceuticalInformationSequence=[drug], each=lambda k: {"RescaleSlope": 1.5 + k},
    )  # fmt: skip
    volume = read_series(tmp_path, suv=True)
    for k in range(3):
        assert np.allclose(values(volume, k), arrays[k] * (1.5 + k) * 70_000 / 3.5e8 * factor, rtol=1e-6)
    assert np.allclose(values(read_series(tmp_path), 1), arrays[1] * 2.5)


def test_suv_without_weight_is_refused(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(2), Modality="PT", Units="BQML")
    with pytest.raises(DicomError, match="dose and half life"):
        read_series(tmp_path, suv=True)


# ---------------------------------------------------------------------------------------------------------------------
# Where files come from


def test_zip_is_read_without_unpacking_and_bounded(tmp_path: Path) -> None:
    arrays = series(tmp_path / "in", stack_positions(3))
    with zipfile.ZipFile(tmp_path / "s.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number, p in enumerate(sorted((tmp_path / "in").iterdir())):
            archive.write(p, f"../../escape/{number}.dcm")
    before = sorted(tmp_path.rglob("*"))
    volume = read_series(tmp_path / "s.zip")
    assert sorted(tmp_path.rglob("*")) == before
    assert all(np.array_equal(values(volume, k), arrays[k]) for k in range(3))
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("zeros.dcm", b"\0" * (80 << 20))
    with pytest.raises(DicomError, match="times their packed size"):
        list_series(tmp_path / "bomb.zip")
    (tmp_path / "cut.zip").write_bytes((tmp_path / "s.zip").read_bytes()[:-30])
    with pytest.raises(DicomError):
        list_series(tmp_path / "cut.zip")


def test_dicomdir_names_the_files(tmp_path: Path) -> None:
    path = Path(pydicom.data.get_testdata_file("DICOMDIR"))  # type: ignore[arg-type]
    listed = list_series(path)
    assert {i.modality for i in listed} <= {"CT", "MR", "CR"} and len(listed) > 3


def test_links_out_of_the_folder_are_not_followed(tmp_path: Path) -> None:
    series(tmp_path / "in", stack_positions(3))
    series(tmp_path / "out", stack_positions(3, start=(0, 0, 60)))
    (tmp_path / "in" / "more").symlink_to(tmp_path / "out", target_is_directory=True)
    for p in (tmp_path / "out").iterdir():
        (tmp_path / "in" / f"link_{p.name}").symlink_to(p)
    with pytest.warns(UserWarning, match="not followed"):
        assert read_series(tmp_path / "in").geometry.shape[2] == 3


def test_kind_and_source_headers(tmp_path: Path) -> None:
    series(tmp_path, stack_positions(4)[::-1])
    geometry, headers = source_series(tmp_path)
    assert geometry.shape == (*SHAPE, 4) and "PixelData" not in headers[0]
    assert [float(h.ImagePositionPatient[2]) for h in headers] == [5.0, 7.5, 10.0, 12.5]
    frames = [{"position": (0, 0, z)} for z in (4, 2, 0)]
    path = save(enhanced([pixels(k) for k in range(3)], frames), tmp_path / "e" / "e.dcm")
    assert [number for _, number in source_frames(path)[1]] == [3, 2, 1]
    assert object_kind(path) == "image" and object_kind(tmp_path / "none") == "other"


def test_header_equals_pydicom_on_all_its_test_files() -> None:
    checked = 0
    for path in sorted(Path(pydicom.data.__file__).parent.rglob("*.dcm")):
        try:
            header = dicom_header.read_header(DicomFile(path, path.stat().st_size))
        except DicomError:
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            ds = pydicom.dcmread(path, stop_before_pixels=True, force=True)
            for keyword in ("Rows", "Columns", "BitsStored", "ImagePositionPatient", "PixelSpacing", "RescaleSlope"):
                value = ds.get(keyword)
                want = [] if value is None else list(value) if hasattr(value, "__iter__") else [value]
                assert list(header.item.numbers(keyword)) == pytest.approx([float(v) for v in want]), path.name
            for keyword in ("SOPInstanceUID", "Modality", "SeriesInstanceUID"):
                assert header.item.text(keyword) == str(ds.get(keyword) or "").strip(), path.name
        checked += 1
    assert checked > 60


# ---------------------------------------------------------------------------------------------------------------------
# Development data


def cases(kind: str) -> list[str]:
    root = Path(os.environ.get("MEDSEG_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "dicom"
    if not (root / "manifest.json").exists():
        return []
    manifest = json.loads((root / "manifest.json").read_text())["cases"]
    return [c["case"] for c in manifest if c["kind"] == kind and c.get("scored", True)]


@pytest.mark.parametrize(
    "case", [c for k in ("volume", "sheared", "multi", "4d", "mosaic") for c in cases(k)] or [None]
)
def test_real_series_hold_the_points_known_of_them(case: str | None, data_dir: Path) -> None:
    if case is None:
        pytest.skip("development data not found (set MEDSEG_DATA)")
    answers = np.load(data_dir / "dicom" / case / "points.npz")
    found = good(volumes(data_dir / "dicom" / case / "in"))
    for name in (n[3:] for n in answers.files if n.startswith("ras")):
        ras, value = answers[f"ras{name}"], answers[f"val{name}"]
        scores = []
        for volume in found.values():
            at = volume.geometry.to_index(ras)
            index = np.rint(at).astype(int)
            ok = ((index >= 0) & (index < volume.geometry.shape)).all(1) & (np.abs(at - index) < 0.1).all(1)
            held = volume.array[(0, *index[ok].T)]
            slack = np.maximum(1e-4 * np.abs(value[ok]), 1e-3 * max(np.ptp(value), 1e-6))
            scores.append((np.abs(held - value[ok]) <= slack).sum() / len(value))
        assert max(scores) >= 0.99


@pytest.mark.parametrize("case", cases("irregular") + cases("notvolume") or [None])
def test_real_series_that_are_no_volume_are_refused(case: str | None, data_dir: Path) -> None:
    if case is None:
        pytest.skip("development data not found (set MEDSEG_DATA)")
    with pytest.raises(DicomError, match=r"--resample|--slices"):
        read_series(data_dir / "dicom" / case / "in")
