"""Writing never leaves half a file, never overwrites unasked; reading names what is missing."""

from __future__ import annotations

import errno
import io
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medseg.io import is_dicom, list_series, nifti, read, read_labels, supported_suffix, write
from medseg.io.files import atomic_folder, atomic_path, require_free
from medseg.volume import Geometry, GeometryError, LabelMap, Volume

GRID = Geometry.from_parts((4, 5, 1), (1, 2, 3))
IMAGE = Volume(np.zeros(GRID.shape, np.uint8), GRID)
LABELS = LabelMap(np.ones(GRID.shape, np.uint8), GRID)
NAMES = ["a.nii", "a.nii.gz", "a.nrrd", "a.mha", "a.png", "a.tif"]


class FullDisk(io.RawIOBase):
    """A file that takes some bytes and then finds the disk full."""

    def __init__(self, room: int) -> None:
        self.room = room

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return len(data)


@pytest.mark.parametrize("name", ["a.nii", "a.nii.gz"])
@pytest.mark.parametrize("room", [0, 20])
def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, room: int) -> None:
    real = Path.open

    def opened(self: Path, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        return FullDisk(room) if "w" in mode else real(self, mode, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", opened)
        with pytest.raises(OSError, match="No space left"):
            write(IMAGE, tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_failed_rename_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / name).write_bytes(b"old")

    def replace(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)
        with pytest.raises(OSError, match="No space left"):
            write(IMAGE, tmp_path / name, force=True)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_bytes() == b"old"


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten_unasked(tmp_path: Path, name: str) -> None:
    write(LABELS, tmp_path / name)
    before = (tmp_path / name).read_bytes()
    with pytest.raises(FileExistsError, match=rf"output must not exist yet, got .*{name}; .*--force"):
        write(IMAGE, tmp_path / name)
    assert (tmp_path / name).read_bytes() == before
    write(IMAGE, tmp_path / name, force=True)
    assert not read(tmp_path / name).array.any()
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_ctrl_c_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), atomic_path(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "folder") as temporary:
        (temporary / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folders_are_replaced_as_a_whole(tmp_path: Path) -> None:
    for text in ("one", "two"):
        with atomic_folder(tmp_path / "folder", force=text == "two") as temporary:
            (temporary / text).write_text(text)
    assert [p.name for p in (tmp_path / "folder").iterdir()] == ["two"]
    with pytest.raises(FileExistsError), atomic_folder(tmp_path / "folder"):
        pass
    assert require_free(tmp_path / "new") == tmp_path / "new"


@pytest.mark.parametrize("name", NAMES)
def test_an_output_below_a_file_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError):
        write(IMAGE, tmp_path / "file" / name)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_parents_are_made_and_rights_are_the_users(tmp_path: Path) -> None:
    write(IMAGE, tmp_path / "new" / "folder" / "a.nii.gz")
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "new" / "folder" / "a.nii.gz").stat().st_mode & 0o777 == 0o666 & ~mask


def test_missing_and_unknown(tmp_path: Path) -> None:
    for function in (read, read_labels, list_series):
        with pytest.raises(FileNotFoundError, match=r"input must exist, got .*missing\.nii"):
            function(tmp_path / "missing.nii")
    (tmp_path / "a.xyz").write_text("hello")
    with pytest.raises(ValueError, match=r"must end in \.nii\.gz .* or be DICOM, got .*a\.xyz"):
        read(tmp_path / "a.xyz")
    with pytest.raises(ValueError, match="must end in"):
        write(LABELS, tmp_path / "b.xyz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="folder must hold images, got no file"):
        list_series(tmp_path / "empty")
    with pytest.raises((ValueError, FileNotFoundError), match="empty"):
        read(tmp_path / "empty")
    write(IMAGE, tmp_path / "a.nii")
    with pytest.raises(ValueError, match=r"series must be given for DICOM only, got '1\.2'"):
        read(tmp_path / "a.nii", series="1.2")


def test_dicom_objects_need_their_series(tmp_path: Path) -> None:
    for name in ("a.seg.dcm", "a.dcm", "a.rtstruct.dcm"):
        with pytest.raises(ValueError, match="source must name the DICOM series"):
            write(LABELS, tmp_path / name)
        with pytest.raises(FileNotFoundError):
            write(LABELS, tmp_path / name, source=tmp_path / "none")
    assert list(tmp_path.iterdir()) == []


def test_labels_must_lie_on_the_grid_asked_for(tmp_path: Path) -> None:
    write(LABELS, tmp_path / "l.nii.gz")
    write(IMAGE, tmp_path / "i.nii.gz")
    for like in (GRID, IMAGE, LABELS, tmp_path / "i.nii.gz", str(tmp_path / "i.nii.gz")):
        assert read_labels(tmp_path / "l.nii.gz", like).geometry == GRID
    moved = Geometry.from_parts(GRID.shape, GRID.spacing, (0, 0.5, 0))
    with pytest.raises(GeometryError, match=r"l\.nii\.gz .* got corners up to 0\.500 mm apart"):
        read_labels(tmp_path / "l.nii.gz", moved)


def test_a_folder_lists_what_it_holds(tmp_path: Path) -> None:
    write(IMAGE, tmp_path / "b.nii.gz")
    write(IMAGE, tmp_path / "sub" / "c.mha")
    write(IMAGE, tmp_path / "d.png")
    (tmp_path / "broken.nii").write_bytes(b"nothing")
    (tmp_path / "notes.txt").write_text("read me")
    found = list_series(tmp_path)
    assert [Path(v.path).name for v in found] == ["b.nii.gz", "broken.nii", "d.png", "c.mha"]
    assert found[1].shape == () and found[1].quirks[0].startswith("not readable: file must begin with a whole NIfTI")
    assert found[0].to_json() == {
        "path": str(tmp_path / "b.nii.gz"),
        "series": "",
        "description": "",
        "modality": "",
        "shape": [4, 5, 1],
        "spacing_mm": [1.0, 2.0, 3.0],
        "affine": [[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 3.0, 0.0], [0.0, 0.0, 0.0, 1.0]],
        "quirks": [],
    }
    assert found[0].geometry == GRID


def test_kinds_of_names(tmp_path: Path) -> None:
    for name, suffix in (
        ("A.NII.GZ", ".nii.gz"),
        ("x.seg.nrrd", ".nrrd"),
        ("a.tiff", ".tiff"),
        ("a.dcm", ""),
        ("a", ""),
    ):
        assert supported_suffix(name) == suffix
    assert is_dicom(tmp_path) and is_dicom("a/DICOMDIR") and is_dicom("x.IMA") and not is_dicom("x.nii")
    for head, expected in ((bytes(128) + b"DICM", True), (b"\x08\x00\x05\x00", True), (b"hello", False), (b"", False)):
        (tmp_path / "file").write_bytes(head)
        assert is_dicom(tmp_path / "file") is expected


def test_sixteen_bit_floats_are_widened(tmp_path: Path) -> None:
    array = np.random.default_rng(0).normal(size=GRID.shape).astype(np.float16)
    nifti.write(Volume(array, GRID), tmp_path / "h.nii")
    np.testing.assert_array_equal(read(tmp_path / "h.nii").array[0], array.astype(np.float32))
