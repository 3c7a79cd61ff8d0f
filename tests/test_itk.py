"""NRRD and MetaImage files against SimpleITK and hand-written headers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from conftest import geometries, rotation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.io import list_series, read, read_labels, write
from medseg.volume import Code, Geometry, GeometryError, LabelMap, Structure, Volume

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
GRID = Geometry.from_parts((4, 6, 5), (0.8, 1.5, 3.0), (-17, 42, 9), rotation((0.3, -0.2, 0.4))[:, [1, 0, 2]])


@QUICK
@given(
    geometries(),
    st.sampled_from(["uint8", "int16", "uint16", "int32", "float32", "float64"]),
    st.integers(1, 3),
    st.sampled_from([".nrrd", ".mha"]),
)
def test_images_lie_where_itk_says(tmp_path: Path, geometry: Geometry, dtype: str, channels: int, suffix: str) -> None:
    array = np.random.default_rng(1).integers(0, 99, (channels, *geometry.shape)).astype(dtype)
    path = tmp_path / f"image{suffix}"
    write(Volume(array, geometry, {"modality": "CT"}), path, force=True)

    theirs = sitk.ReadImage(str(path))
    assert theirs.GetSize() == geometry.shape
    for corner in ((0, 0, 0), tuple(n - 1 for n in geometry.shape), (1, 2, 0)):
        world = np.array(theirs.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1)
        np.testing.assert_allclose(world, geometry.to_world(corner), atol=1e-6)
        voxel = np.atleast_1d(theirs[corner])
        np.testing.assert_array_equal(voxel, array[(slice(None), *corner)])

    ours = read(path)
    assert ours.array.dtype == dtype and ours.modality == "CT" and ours.meta["quirks"] == ()
    assert ours.geometry.is_close(geometry, 1e-6)
    np.testing.assert_array_equal(ours.array, array)
    shape = geometry.shape if channels == 1 else (channels, *geometry.shape)
    info = list_series(path)[0]
    assert (info.shape, info.modality) == (shape, "CT")


@pytest.mark.parametrize("name", ["l.nrrd", "l.seg.nrrd", "l.mha"])
def test_structures_survive(tmp_path: Path, name: str) -> None:
    liver = Structure(3, "Liver left", (10, 20, 30), Code("1", "SCT", "Tissue"), Code("2", "SCT", "Liver"))
    structures = (liver, Structure(400, "absent", region=Code("9", "SCT", "Body")))
    labels = LabelMap((np.arange(120).reshape(GRID.shape) % 2 * 3).astype(np.int16), GRID, structures)
    write(labels, tmp_path / name)
    ours = read_labels(tmp_path / name)
    assert ours.structures == structures and ours.geometry.is_close(GRID, 1e-6)
    np.testing.assert_array_equal(ours.array, labels.array)


def test_overlapping_segments_become_layers(tmp_path: Path) -> None:
    masks = np.random.default_rng(0).random((2, *GRID.shape)) > 0.5
    structures = (Structure(3, "a"), Structure(300, "b"))
    write(LabelMap(masks, GRID, structures), tmp_path / "o.seg.nrrd")
    ours = read_labels(tmp_path / "o.seg.nrrd")
    assert ours.is_layered and ours.structures == structures
    np.testing.assert_array_equal(ours.array, masks)
    with pytest.raises(ValueError, match="must not overlap"):
        write(LabelMap(masks, GRID, structures), tmp_path / "o.mha")
    with pytest.raises(ValueError, match="must not be probabilities"):
        write(LabelMap(masks.astype(np.float32), GRID, structures), tmp_path / "p.nrrd")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o.seg.nrrd"]


def nrrd(path: Path, header: str, data: bytes) -> Path:
    path.write_bytes(b"NRRD0005\n" + header.encode() + b"\n\n" + data)
    return path


SPACE = "space: left-posterior-superior\nspace origin: (1,2,3)\n"
DIRECTIONS = "space directions: (0,2,0) (1,0,0) (0,0,3)\n"


def test_layers_as_slicer_writes_them(tmp_path: Path) -> None:
    """Two layers; values repeat from layer to layer; the layer axis is the first and is called a list."""
    layers = np.zeros((2, 3, 4, 5), np.uint8)
    layers[0, 0], layers[0, 1], layers[1, :2] = 1, 2, 1
    header = (
        "type: unsigned char\ndimension: 4\nsizes: 2 3 4 5\nkinds: list domain domain domain\nencoding: raw\n"
        f"{SPACE}space directions: none (0,2,0) (1,0,0) (0,0,3)\n"
        "Segment0_ID:=S1\nSegment0_Name:=upper\nSegment0_LabelValue:=1\nSegment0_Layer:=0\nSegment0_Color:=1 0.5 0\n"
        "Segment1_ID:=S2\nSegment1_Name:=lower\nSegment1_LabelValue:=2\nSegment1_Layer:=0\n"
        "Segment2_ID:=S3\nSegment2_Name:=both\nSegment2_LabelValue:=1\nSegment2_Layer:=1\n"
        "Segment2_Tags:=Segmentation.Status:inprogress|TerminologyEntry:Segmentation category and type - DICOM master "
        "list~SCT^85756007^Tissue~SCT^10200004^Liver~^^~Anatomic codes - DICOM master list~SCT^818981001^Abdomen~^^|"
    )
    ours = read_labels(nrrd(tmp_path / "s.seg.nrrd", header, layers.tobytes(order="F")))
    assert [s.name for s in ours.structures] == ["upper", "lower", "both"]
    assert ours.structures[0].color == (255, 128, 0)
    assert ours.structures[2].category == Code("85756007", "SCT", "Tissue")
    assert ours.structures[2].type == Code("10200004", "SCT", "Liver")
    assert ours.structures[2].region == Code("818981001", "SCT", "Abdomen")
    np.testing.assert_array_equal(ours.array, np.stack([layers[0] == 1, layers[0] == 2, layers[1] == 1]))
    np.testing.assert_allclose(
        ours.geometry.affine, [[0, -1, 0, -1], [-2, 0, 0, -2], [0, 0, 3, 3], [0, 0, 0, 1]], atol=1e-12
    )


def test_values_without_a_segment_are_told(tmp_path: Path) -> None:
    labels = np.arange(60, dtype=np.uint8).reshape(3, 4, 5) % 3
    header = (
        f"type: uint8\ndimension: 3\nsizes: 3 4 5\nencoding: raw\n{SPACE}{DIRECTIONS}"
        "Segment0_ID:=S1\nSegment0_Name:=one\nSegment0_LabelValue:=1"
    )
    ours = read_labels(nrrd(tmp_path / "s.nrrd", header, labels.tobytes(order="F")))
    assert ours.names == {1: "one", 2: "label 2"} and "values [2] have no segment" in ours.meta["quirks"][0]


@pytest.mark.parametrize(
    ("space", "signs"),
    [
        ("left-posterior-superior", (-1, -1, 1)),
        ("right-anterior-superior", (1, 1, 1)),
        ("left-anterior-superior", (-1, 1, 1)),
    ],
)
def test_spaces_of_nrrd(tmp_path: Path, space: str, signs: tuple[int, int, int]) -> None:
    header = f"type: short\ndimension: 3\nsizes: 2 3 4\nencoding: raw\nendian: little\nspace: {space}\n"
    header += "space origin: (1,2,3)\nspace directions: (2,0,0) (0,3,0) (0,0,4)"
    ours = read(nrrd(tmp_path / "s.nrrd", header, bytes(48)))
    expected = np.diag([*signs, 1.0]) @ [[2, 0, 0, 1], [0, 3, 0, 2], [0, 0, 4, 3], [0, 0, 0, 1]]
    np.testing.assert_allclose(ours.geometry.affine, expected)


def test_what_a_header_leaves_out_is_told(tmp_path: Path) -> None:
    base = "type: short\ndimension: 3\nsizes: 2 3 4\nencoding: raw\nendian: little"
    quirks = read(nrrd(tmp_path / "n.nrrd", base + "\nspacings: 1 2 3", bytes(48))).meta["quirks"]
    assert quirks == ("no space directions: orientation and position are unknown, only the voxel sizes were used",)
    assert "1 mm taken" in read(nrrd(tmp_path / "m.nrrd", base, bytes(48))).meta["quirks"][0]
    (tmp_path / "m.mha").write_bytes(
        b"ObjectType = Image\nNDims = 3\nDimSize = 2 3 4\nElementType = MET_SHORT\nElementDataFile = LOCAL\n"
        + bytes(48)
    )
    assert read(tmp_path / "m.mha").meta["quirks"] == ("no voxel size in the header; 1 mm taken",)


def test_two_and_four_dimensions(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    flat = rng.integers(0, 99, (6, 5)).astype(np.int16)
    sitk.WriteImage(sitk.GetImageFromArray(flat), str(tmp_path / "flat.mha"))
    ours = read(tmp_path / "flat.mha")
    assert ours.geometry.shape == (5, 6, 1) and ours.geometry.orientation == "LPS"
    np.testing.assert_array_equal(ours.array[0, :, :, 0], flat.T)
    colours = rng.integers(0, 99, (6, 5, 3)).astype(np.uint8)
    sitk.WriteImage(sitk.GetImageFromArray(colours, isVector=True), str(tmp_path / "rgb.mha"))
    np.testing.assert_array_equal(read(tmp_path / "rgb.mha").array[:, :, :, 0], colours.T)
    moving = rng.integers(0, 99, (7, 4, 6, 5)).astype(np.int16)  # time, k, j, i
    image = sitk.GetImageFromArray(moving, isVector=False)
    image.SetSpacing((1, 2, 3, 0.1))
    for name in ("t.nrrd", "t.mha"):
        sitk.WriteImage(image, str(tmp_path / name))
        ours = read(tmp_path / name)
        assert ours.geometry.shape == (5, 6, 4) and ours.geometry.spacing == (1, 2, 3)
        np.testing.assert_array_equal(ours.array, moving.transpose(0, 3, 2, 1))
        assert list_series(tmp_path / name)[0].shape == (7, 5, 6, 4)
        with pytest.raises(ValueError, match="label map must be 3D or name its segments, got 7 channels"):
            read_labels(tmp_path / name)


def test_header_and_voxels_in_two_files(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 99, (4, 5, 6)).astype(np.int16)
    for name in ("d.mhd", "d.nhdr"):
        sitk.WriteImage(sitk.GetImageFromArray(array), str(tmp_path / name))
        np.testing.assert_array_equal(read(tmp_path / name).array[0], array.T)
        with pytest.raises(ValueError, match=r"must be written to one file, got .*; use \.nrrd or \.mha"):
            write(Volume(array.T, Geometry.from_parts((6, 5, 4), (1, 1, 1))), tmp_path / name, force=True)


def test_bad_files(tmp_path: Path) -> None:
    write(Volume(np.random.default_rng(0).integers(0, 9999, GRID.shape).astype(np.int16), GRID), tmp_path / "w.nrrd")
    write(Volume(np.random.default_rng(0).integers(0, 9999, GRID.shape).astype(np.int16), GRID), tmp_path / "w.mha")
    for suffix in (".nrrd", ".mha"):
        content = (tmp_path / f"w{suffix}").read_bytes()
        for keep in (0, 30, len(content) - 60):
            (tmp_path / f"cut{suffix}").write_bytes(content[:keep])
            with pytest.raises(ValueError, match=r" in .*cut\."):
                read(tmp_path / f"cut{suffix}")
    base = "type: short\ndimension: 3\nencoding: raw\nendian: little\n"
    huge = nrrd(tmp_path / "huge.nrrd", base + f"sizes: 10000 10000 10000\n{SPACE}{DIRECTIONS}", bytes(48))
    with pytest.raises(ValueError, match=r"must not claim more voxels.*1000000000000 .* in .*huge\.nrrd"):
        read(huge)
    with pytest.raises(GeometryError, match=r"voxel sizes must be finite, got 1 nan 3 in .*nan\.nrrd"):
        read(nrrd(tmp_path / "nan.nrrd", base + "sizes: 2 3 4\nspacings: 1 nan 3", bytes(48)))
    flat = nrrd(
        tmp_path / "flat.nrrd", base + f"sizes: 2 3 4\n{SPACE}space directions: (1,0,0) (1,0,0) (0,0,1)", bytes(48)
    )
    with pytest.raises(ValueError, match=r" in .*flat\.nrrd"):
        read(flat)
    (tmp_path / "text.nrrd").write_text("hello")
    with pytest.raises(ValueError, match="must begin with NRRD"):
        read(tmp_path / "text.nrrd")
    sitk.WriteImage(sitk.Image((3, 4, 5), sitk.sitkComplexFloat32), str(tmp_path / "c.nrrd"))
    with pytest.raises(ValueError, match="voxels must be real numbers"):
        read(tmp_path / "c.nrrd")
    floats = sitk.GetImageFromArray(np.full((3, 4, 5), 0.25, np.float32))
    sitk.WriteImage(floats, str(tmp_path / "f.mha"))
    with pytest.raises(ValueError, match=r"labels must be integers, got 0\.25 in .*f\.mha"):
        read_labels(tmp_path / "f.mha")


def test_skewed_grids_are_told(tmp_path: Path) -> None:
    shear = np.eye(4)
    shear[1, 2] = 0.3
    geometry = Geometry(GRID.shape, GRID.affine @ shear)
    write(Volume(np.zeros(GRID.shape, np.int16), geometry), tmp_path / "s.nrrd")
    ours = read(tmp_path / "s.nrrd")
    assert ours.geometry.is_close(geometry, 1e-6) and ours.meta["quirks"] == (
        "axes of the grid are not at right angles",
    )


def test_real_tumours_overlay_their_images(data_dir: Path) -> None:
    for name in ("brain1", "brain2", "breast1"):
        image = read(data_dir / "tumours_mr" / f"{name}_image.nrrd")
        labels = read_labels(data_dir / "tumours_mr" / f"{name}_label.nrrd")
        theirs = sitk.ReadImage(str(data_dir / "tumours_mr" / f"{name}_image.nrrd"))
        np.testing.assert_array_equal(image.array[0].T, sitk.GetArrayFromImage(theirs))
        inside = image.geometry.to_index(labels.geometry.to_world(np.argwhere(labels.array > 0)))
        assert (inside > -0.5).all() and (inside < np.asarray(image.geometry.shape) - 0.5).all()
