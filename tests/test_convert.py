"""medseg convert: one file per volume, single files, 4D, labels in and out of every format."""

from __future__ import annotations

from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from dicom_made import AXIAL, SAGITTAL, SHAPE, enhanced, image, pixels, save, series, stack_positions
from pydicom.uid import MRImageStorage

from medseg.io import read, read_labels, write
from medseg.io.convert import convert
from medseg.io.dicom import read_series
from medseg.volume import DicomError, Geometry, LabelMap, Structure, Volume

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def names(paths: list[Path]) -> list[str]:
    return [p.name for p in paths]


def test_a_folder_becomes_one_file_per_volume_named_by_what_it_is(tmp_path: Path) -> None:
    source = tmp_path / "in"
    for e, t in ((e, t) for e in (5.0, 9.0) for t in (1, 2)):
        series(source, stack_positions(3), prefix=f"{e}{t}", seed=t, EchoTime=e, TemporalPositionIdentifier=t,
               Modality="MR", SOPClassUID=MRImageStorage, SeriesDescription="T2* map/Müller")  # fmt: skip
    series(source, stack_positions(2, axes=SAGITTAL), SAGITTAL, prefix="s", SeriesInstanceUID="1.2.9", SeriesNumber=1)
    written = convert(source, f"{tmp_path / 'out'}/")
    assert names(written) == [
        "1_made_up.nii.gz",
        *(f"3_T2_map_M_ller_e{e}_t{t}.nii.gz" for e in (1, 2) for t in (1, 2)),
    ]
    volume = read_series(source, "3_T2_map_M_ller_e2_t1")
    loaded = nib.load(written[3])
    assert np.allclose(loaded.affine, volume.geometry.affine) and np.array_equal(loaded.get_fdata(), volume.array[0])
    with pytest.raises(FileExistsError):
        convert(source, f"{tmp_path / 'out'}/")
    assert len(convert(source, tmp_path / "out", force=True, to="nrrd")) == 5


def test_patients_are_in_names_only_when_asked(tmp_path: Path) -> None:
    series(tmp_path / "in", stack_positions(3))
    assert names(convert(tmp_path / "in", f"{tmp_path / 'a'}/")) == ["3_made_up.nii.gz"]
    assert names(convert(tmp_path / "in", f"{tmp_path / 'b'}/", show_patient=True)) == [
        "SECRET-ID_Secret_Name_3_made_up.nii.gz"
    ]


def test_equal_names_are_made_unique(tmp_path: Path) -> None:
    for k in range(3):
        series(tmp_path / "in", stack_positions(2), prefix=f"{k}", SeriesInstanceUID=f"1.2.{k + 1}")
    assert names(convert(tmp_path / "in", f"{tmp_path / 'out'}/")) == [f"3_made_up_{k}.nii.gz" for k in (1, 2, 3)]


def test_one_file_takes_one_volume(tmp_path: Path) -> None:
    source = tmp_path / "in"
    series(source, stack_positions(3), prefix="a")
    series(source, stack_positions(3), prefix="b", SeriesInstanceUID="1.2.8", SeriesNumber=7)
    with pytest.raises(DicomError, match=r"3_made_up, 7_made_up .*--series"):
        convert(source, tmp_path / "x.nii.gz")
    assert convert(source, tmp_path / "x.nii.gz", series="7") == [tmp_path / "x.nii.gz"]
    assert read(tmp_path / "x.nii.gz").geometry.shape == (*SHAPE, 3)


def test_time_series_as_one_file(tmp_path: Path) -> None:
    frames = [{"position": (0, 0, 2.5 * k), "time": t} for t in (1, 2, 3) for k in range(4)]
    arrays = [pixels(k) for k in range(12)]
    save(enhanced(arrays, frames), tmp_path / "in" / "e.dcm")
    written = convert(tmp_path / "in", f"{tmp_path / 'out'}/", four_d=True)
    assert names(written) == ["3_made_up.nii.gz"]
    data = nib.load(written[0]).get_fdata()
    assert data.shape == (*SHAPE, 4, 3)
    assert all(np.array_equal(data[:, :, k, t].T, arrays[4 * t + k]) for t in range(3) for k in range(4))
    assert convert(tmp_path / "in", tmp_path / "one.nii.gz", four_d=True) == [tmp_path / "one.nii.gz"]


def test_refused_volumes_are_said_and_the_others_written(tmp_path: Path) -> None:
    series(tmp_path / "in", stack_positions(3), prefix="a")
    series(tmp_path / "in", [(0, 0, z) for z in (0, 1, 5)], prefix="b", SeriesInstanceUID="1.2.8", SeriesNumber=7)
    with pytest.warns(UserWarning, match="refused: slices must be evenly spaced") as said:
        written = convert(tmp_path / "in", f"{tmp_path / 'out'}/")
    assert names(written) == ["3_made_up.nii.gz"] and len(said) == 1
    assert len(convert(tmp_path / "in", f"{tmp_path / 'o2'}/", resample=True)) == 2
    with pytest.raises(DicomError, match="evenly spaced"):
        convert(tmp_path / "in", f"{tmp_path / 'o3'}/", series="7")
    assert len(convert(tmp_path / "in", f"{tmp_path / 'o4'}/", series="7", slices=True)) == 3


def test_tilted_series_straightened_on_demand(tmp_path: Path) -> None:
    series(tmp_path / "in", [(0, 0.7 * k, 2.4 * k) for k in range(4)])
    kept, straight = (
        read(convert(tmp_path / "in", f"{tmp_path / name}/", resample=flag)[0]).geometry
        for name, flag in (("a", False), ("b", True))
    )
    assert kept.is_skewed and not straight.is_skewed


def test_an_image_becomes_a_dicom_series_and_comes_back(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((6, 5, 4), (0.7, 1.1, 3.0), (-10, 20, 30))
    volume = Volume(np.random.default_rng(0).integers(-900, 900, (6, 5, 4)).astype(np.int16), geometry)
    write(volume, tmp_path / "a.nii.gz")
    convert(tmp_path / "a.nii.gz", tmp_path / "series", to="dicom")
    back = read(convert(tmp_path / "series", tmp_path / "b.nii.gz")[0])
    index = np.rint(back.geometry.to_index(geometry.to_world([[0, 0, 0], [5, 4, 3], [2, 3, 1]]))).astype(int)
    assert [back.array[(0, *i)] for i in index] == [volume.array[(0, *i)] for i in ((0, 0, 0), (5, 4, 3), (2, 3, 1))]
    assert back.geometry.is_close(geometry.cropped((0, 0, 0), (6, 5, 4))) or not np.isnan(back.array).any()


@pytest.fixture
def labelled(tmp_path: Path) -> tuple[Path, Path, LabelMap]:
    """A series, and a label map on its grid as NIfTI."""
    series(tmp_path / "in", stack_positions(6), AXIAL)
    geometry = read_series(tmp_path / "in").geometry
    array = np.zeros(geometry.shape, np.uint8)
    array[1:4, 1:3, 1:4], array[4:6, 2:5, 2:5] = 1, 4
    labels = LabelMap(array, geometry, (Structure(1, "Liver"), Structure(4, "left kidney / cortex")))
    write(labels, tmp_path / "labels.nii.gz")
    return tmp_path / "in", tmp_path / "labels.nii.gz", labels


@pytest.mark.parametrize("to", ["seg", "rtstruct"])
def test_labels_go_to_dicom_and_back(tmp_path: Path, labelled: tuple[Path, Path, LabelMap], to: str) -> None:
    source, path, labels = labelled
    (there,) = convert(path, tmp_path / f"x.{to}.dcm", labels=True, like=source)
    (back,) = convert(there, tmp_path / "back.nii.gz", like=source)
    assert np.array_equal(read_labels(back).array, labels.array)
    other = "rtstruct" if to == "seg" else "seg"
    (across,) = convert(there, f"{tmp_path / 'd'}/", to=other, like=source)
    assert across.name == f"x.{other}.dcm"
    masks = convert(across, f"{tmp_path / 'masks'}/", split=True, like=source)
    assert names(masks) == ["1_Liver.nii.gz", "4_left_kidney_cortex.nii.gz"]
    for mask, number in zip(masks, (1, 4), strict=True):
        assert np.array_equal(nib.load(mask).get_fdata() > 0, labels.array == number)


def test_the_series_that_labels_refer_to_is_found(tmp_path: Path, labelled: tuple[Path, Path, LabelMap]) -> None:
    source, path, labels = labelled
    (seg,) = convert(path, tmp_path / "x.dcm", labels=True, like=source)
    series(source, stack_positions(3, gap=9), prefix="other", SeriesInstanceUID="1.2.8", SeriesNumber=7)
    (back,) = convert(seg, tmp_path / "back.nii.gz", like=source)
    assert np.array_equal(read_labels(back).array, labels.array)


def test_bad_requests(tmp_path: Path, labelled: tuple[Path, Path, LabelMap]) -> None:
    source, path, _ = labelled
    with pytest.raises(ValueError, match="--labels"):
        convert(source, tmp_path / "x.dcm", to="seg")
    with pytest.raises(ValueError, match="--like"):
        convert(path, tmp_path / "x.dcm", labels=True)
    with pytest.raises(ValueError, match="format must be one of"):
        convert(path, tmp_path / "x", to="doc")
    with pytest.raises(TypeError):
        convert(path, tmp_path / "x", nonsense=1)
    with pytest.raises(FileNotFoundError):
        convert(tmp_path / "none", tmp_path / "x.nii.gz")
    with pytest.raises(ValueError, match="one object holds all"):
        convert(path, f"{tmp_path}/", labels=True, split=True, to="seg")


def test_pictures_of_a_capture(tmp_path: Path) -> None:
    save(image(pixels(0), None, None, Modality="OT", SOPClassUID="1.2.840.10008.5.1.4.1.1.7"), tmp_path / "in" / "a")
    with pytest.warns(UserWarning, match="2D picture"):
        (path,) = convert(tmp_path / "in", f"{tmp_path / 'out'}/")
    assert nib.load(path).shape == (*SHAPE, 1)
