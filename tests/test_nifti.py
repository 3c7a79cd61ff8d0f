"""NIfTI files against nibabel and SimpleITK, and everything that headers get wrong."""

from __future__ import annotations

import gzip
import tracemalloc
import warnings
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk
from conftest import geometries, rotation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medseg.io import list_series, read, read_labels, write
from medseg.volume import Code, Geometry, GeometryError, LabelMap, Structure, Volume

QUICK = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
AFFINE = np.array([[-0.0, -1.9, 0.2, 30], [0.7, 0.0, 0.0, -40], [0.0, 0.3, 2.9, 11], [0, 0, 0, 1]])
SHAPE = (4, 6, 5)


def oblique(shape: tuple[int, int, int] = SHAPE) -> Geometry:
    direction = rotation((0.3, -0.2, 0.4))[:, [1, 0, 2]] * (1, -1, 1)
    return Geometry.from_parts(shape, (0.8, 1.5, 3.0), (-17, 42, 9), direction)


def header_of(array: np.ndarray, **fields: Any) -> bytes:
    """Bytes of a NIfTI-1 file with header fields set as given, whatever they are."""
    header = nib.Nifti1Header()
    header.set_data_shape(array.shape)
    header.set_data_dtype(array.dtype)
    header.set_sform(AFFINE, 1)
    header["magic"], header["vox_offset"] = b"n+1", 352
    header["pixdim"][1:4] = np.linalg.norm(AFFINE[:3, :3], axis=0)
    for name, value in fields.items():
        header[name] = value
    return bytes(header.binaryblock) + bytes(4) + array.tobytes(order="F")


def saved(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Round trips and oracles


@QUICK
@given(
    geometries(),
    st.sampled_from(["uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "float32", "float64"]),
    st.integers(1, 3),
    st.sampled_from([".nii", ".nii.gz"]),
)
def test_written_images_are_read_by_others_and_by_us(
    tmp_path: Path, geometry: Geometry, dtype: str, channels: int, suffix: str
) -> None:
    array = (np.random.default_rng(1).normal(size=(channels, *geometry.shape)) * 50).astype(dtype)
    path = tmp_path / f"image{len(suffix)}{suffix}"  # ITK would read image.nii for image.nii.gz
    write(Volume(array, geometry, {"modality": "MR"}), path, force=True)

    theirs = nib.load(path)
    expected = array[0] if channels == 1 else np.moveaxis(array, 0, 3)
    assert theirs.get_data_dtype() == dtype and theirs.header.get_xyzt_units()[0] == "mm"
    np.testing.assert_array_equal(np.asarray(theirs.dataobj), expected)
    np.testing.assert_allclose(theirs.affine, geometry.affine, atol=1e-3)
    np.testing.assert_allclose(theirs.get_qform(), geometry.affine, atol=0.3)  # float32 quaternions
    if channels == 1:
        itk = sitk.ReadImage(str(path))
        corner = [n - 1 for n in geometry.shape]
        world = np.array(itk.TransformIndexToPhysicalPoint(corner)) * (-1, -1, 1)
        np.testing.assert_allclose(world, geometry.to_world(corner), atol=0.05)
        np.testing.assert_array_equal(sitk.GetArrayFromImage(itk).T, array[0])

    ours = read(path)
    assert ours.array.dtype == dtype and ours.modality == "MR" and ours.meta["quirks"] == ()
    assert ours.geometry.is_close(geometry, 1e-3)
    np.testing.assert_array_equal(ours.array, array)


@QUICK
@given(
    geometries(),
    st.sampled_from([nib.Nifti1Image, nib.Nifti2Image]),
    st.sampled_from(["<", ">"]),
    st.sampled_from(["u1", "i2", "u2", "f4", "f8"]),
    st.sampled_from([".nii", ".nii.gz"]),
)
def test_files_of_nibabel_in_both_versions_and_byte_orders(
    tmp_path: Path, geometry: Geometry, kind: Any, order: str, dtype: str, suffix: str
) -> None:
    array = np.random.default_rng(2).integers(0, 99, geometry.shape).astype(dtype)
    image = kind(array, geometry.affine, kind.header_class(endianness=order))
    image.set_data_dtype(np.dtype(dtype).newbyteorder(order))
    nib.save(image, tmp_path / f"theirs{suffix}")
    ours = read(tmp_path / f"theirs{suffix}")
    np.testing.assert_array_equal(ours.array[0], array)
    assert ours.array.dtype.isnative and ours.array.dtype == np.dtype(dtype)
    assert ours.geometry.is_close(geometry, 1e-3)


def test_qform_alone_is_nibabels(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    for n in range(40):
        angles = rng.uniform(-np.pi, np.pi, 3) if n % 2 else rng.choice([0, np.pi / 2, np.pi, -np.pi / 2], 3)
        geometry = Geometry.from_parts(SHAPE, rng.uniform(0.4, 5, 3), rng.uniform(-99, 99, 3), rotation(tuple(angles)))
        image = nib.Nifti1Image(np.zeros(SHAPE, np.uint8), None)
        image.header.set_qform(geometry.affine @ np.diag([1, 1, rng.choice([-1, 1]), 1]), 1)
        image.header.set_sform(None, 0)
        nib.save(image, tmp_path / "q.nii")
        theirs = nib.load(tmp_path / "q.nii").affine
        np.testing.assert_allclose(read(tmp_path / "q.nii").geometry.affine, theirs, atol=0.02)


def test_large_dimensions_become_nifti_2(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((40000, 2, 3), (1, 2, 3))
    array = np.arange(240000, dtype=np.int32).reshape(geometry.shape)
    write(Volume(array, geometry), tmp_path / "long.nii.gz")
    assert isinstance(nib.load(tmp_path / "long.nii.gz"), nib.Nifti2Image)
    np.testing.assert_array_equal(read(tmp_path / "long.nii.gz").array[0], array)


def test_skewed_grids_have_no_qform(tmp_path: Path) -> None:
    shear = np.eye(4)
    shear[1, 2] = 0.3
    geometry = Geometry(SHAPE, oblique().affine @ shear)
    write(Volume(np.zeros(SHAPE, np.int16), geometry), tmp_path / "skewed.nii.gz")
    header = nib.load(tmp_path / "skewed.nii.gz").header
    assert int(header["qform_code"]) == 0 and int(header["sform_code"]) == 1
    ours = read(tmp_path / "skewed.nii.gz")
    assert ours.geometry.is_close(geometry, 1e-3) and "axes of the grid are not at right angles" in ours.meta["quirks"]


def test_same_voxels_give_the_same_bytes(tmp_path: Path) -> None:
    labels = LabelMap(np.arange(120).reshape(SHAPE) % 3, oblique())
    for name in ("a.nii.gz", "b.nii.gz"):
        write(labels, tmp_path / name)
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_any_memory_order_is_written_right(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 99, SHAPE).astype(np.int16)
    for n, view in enumerate((array, np.asfortranarray(array), array[::-1], array.astype(">i2"))):
        write(Volume(view, oblique()), tmp_path / f"{n}.nii.gz")
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / f"{n}.nii.gz").dataobj), view)


# ---------------------------------------------------------------------------------------------------------------------
# Values: scaling, channels, labels


@pytest.mark.parametrize(("slope", "inter"), [(2.5, -1024.0), (1.0, 3.0), (1.0, 0.0), (0.0, 7.0), (np.nan, np.nan)])
def test_scaling_is_nibabels(tmp_path: Path, slope: float, inter: float) -> None:
    array = np.random.default_rng(0).integers(-1000, 1000, SHAPE).astype(np.int16)
    path = saved(tmp_path / "s.nii.gz", header_of(array, scl_slope=slope, scl_inter=inter))
    theirs = nib.load(path).get_fdata()
    ours = read(path).array
    np.testing.assert_allclose(ours[0], theirs, rtol=1e-6)
    plain = (slope in (0.0, 1.0) and inter != 3.0) or np.isnan(slope)
    assert ours.dtype == (np.int16 if plain else np.float32)


def test_scaling_of_32_bit_integers_stays_exact(tmp_path: Path) -> None:
    array = np.full(SHAPE, 123456789, np.int32)
    assert (read(saved(tmp_path / "s.nii", header_of(array, scl_slope=1, scl_inter=2))).array == 123456791).all()


def test_infinite_scaling_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path / "s.nii", header_of(np.zeros(SHAPE, np.int16), scl_slope=np.inf))
    with pytest.raises(ValueError, match=r"scl_slope and scl_inter must be finite, got inf .* in .*s\.nii"):
        read(path)


def test_channels_vectors_and_colours(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    four, five = rng.normal(size=(*SHAPE, 7)), rng.normal(size=(*SHAPE, 1, 3))
    nib.save(nib.Nifti1Image(four, AFFINE), tmp_path / "four.nii.gz")
    nib.save(nib.Nifti1Image(five, AFFINE), tmp_path / "five.nii.gz")
    np.testing.assert_array_equal(np.moveaxis(read(tmp_path / "four.nii.gz").array, 0, 3), four)
    np.testing.assert_array_equal(np.moveaxis(read(tmp_path / "five.nii.gz").array, 0, 3), five[..., 0, :])
    assert list_series(tmp_path / "four.nii.gz")[0].shape == (7, *SHAPE)
    for names in ("RGB", "RGBA"):
        colours = rng.integers(0, 255, (*SHAPE, len(names))).astype(np.uint8)
        struct = np.dtype([(name, "u1") for name in names])
        nib.save(nib.Nifti1Image(colours.view(struct)[..., 0], AFFINE), tmp_path / "rgb.nii.gz")
        np.testing.assert_array_equal(np.moveaxis(read(tmp_path / "rgb.nii.gz").array, 0, 3), colours)
    with pytest.raises(ValueError, match=r"label map must be 3D, got 7 channels of \(4, 6, 5\) in .*four"):
        read_labels(tmp_path / "four.nii.gz")
    nib.save(nib.Nifti1Image(rng.normal(size=(*SHAPE, 2, 3)), AFFINE), tmp_path / "six.nii.gz")
    with pytest.raises(ValueError, match="one axis of channels at most"):
        read(tmp_path / "six.nii.gz")


def test_one_and_two_dimensions(tmp_path: Path) -> None:
    flat = np.arange(30, dtype=np.int16).reshape(5, 6)
    nib.save(nib.Nifti1Image(flat, np.diag([1, 2, 3, 1])), tmp_path / "flat.nii")
    ours = read(tmp_path / "flat.nii")
    assert ours.geometry.shape == (5, 6, 1)
    np.testing.assert_array_equal(ours.array[0, :, :, 0], flat)


def test_complex_voxels_are_refused(tmp_path: Path) -> None:
    nib.save(nib.Nifti1Image(np.zeros(SHAPE, np.complex64), AFFINE), tmp_path / "c.nii")
    with pytest.raises(ValueError, match=r"voxels must be integers or floats .* got complex64 in .*c\.nii"):
        read(tmp_path / "c.nii")
    with pytest.raises(ValueError, match="got complex64"):
        write(Volume(np.zeros(SHAPE, np.complex64), oblique()), tmp_path / "d.nii")
    assert not (tmp_path / "d.nii").exists()


def test_labels_stored_as_floats(tmp_path: Path) -> None:
    labels = (np.arange(120).reshape(SHAPE) % 4 * 100).astype(np.float32)
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "f.nii.gz")
    ours = read_labels(tmp_path / "f.nii.gz")
    np.testing.assert_array_equal(ours.array, labels)
    assert ours.array.dtype == np.int16 and ours.names == {100: "label 100", 200: "label 200", 300: "label 300"}
    assert "float32" in ours.meta["quirks"][-1]
    for wrong, shown in ((0.375, "0.375"), (np.nan, "nan"), (np.inf, "inf"), (1e12, "1e")):
        labels[1, 2, 3] = wrong
        nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "w.nii.gz")
        with pytest.raises(ValueError, match=rf"labels must .* got .*{shown}.* in .*w\.nii\.gz"):
            read_labels(tmp_path / "w.nii.gz")


def test_label_with_a_single_fourth_axis(tmp_path: Path) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (*SHAPE, 1)).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, AFFINE), tmp_path / "l.nii.gz")
    np.testing.assert_array_equal(read_labels(tmp_path / "l.nii.gz").array, labels[..., 0])


def test_structures_survive(tmp_path: Path) -> None:
    liver = Structure(3, "Leber, links – größer", (1, 2, 3), Code("1", "SCT", "Tissue"), Code("2", "SCT", "Liver"))
    structures = (liver, Structure(7, "absent", region=Code("9", "SCT", "Body")))
    labels = LabelMap((np.arange(120).reshape(SHAPE) % 2 * 3).astype(np.uint8), oblique(), structures)
    for name in ("l.nii", "l.nii.gz"):
        write(labels, tmp_path / name)
        ours = read_labels(tmp_path / name)
        assert ours.structures == structures and ours.array.dtype == np.uint8
        np.testing.assert_array_equal(np.asarray(nib.load(tmp_path / name).dataobj), labels.array)
    extension = nib.load(tmp_path / "l.nii.gz").header.extensions[0]
    assert extension.get_code() == 6 and '"medseg"' in str(extension.get_content())


def test_layers(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    probabilities = rng.random((2, *SHAPE)).astype(np.float32)
    structures = (Structure(2, "a"), Structure(5, "b"))
    write(LabelMap(probabilities, oblique(), structures), tmp_path / "p.nii.gz")
    ours = read_labels(tmp_path / "p.nii.gz")
    assert ours.is_layered and ours.structures == structures
    np.testing.assert_array_equal(ours.array, probabilities)
    np.testing.assert_array_equal(read(tmp_path / "p.nii.gz").array, probabilities)
    masks = np.stack([probabilities[0] > 0.5, probabilities[0] <= 0.3])
    write(LabelMap(masks, oblique(), structures), tmp_path / "m.nii.gz")
    apart = read_labels(tmp_path / "m.nii.gz")
    np.testing.assert_array_equal(apart.exclusive().array, masks[0] * 2 + masks[1] * 5)
    masks[1, 0, 0, 0] = masks[0, 0, 0, 0] = True
    write(LabelMap(masks, oblique(), structures), tmp_path / "o.nii.gz")
    ours = read_labels(tmp_path / "o.nii.gz")
    assert ours.array.dtype == bool and ours.structures == structures
    np.testing.assert_array_equal(ours.array, masks)
    theirs = nib.load(tmp_path / "o.nii.gz")
    np.testing.assert_array_equal(np.asanyarray(theirs.dataobj), np.moveaxis(masks, 0, -1))
    with pytest.raises(ValueError, match=r"must not overlap .* got 'b' over 'a'.*--split"):
        ours.exclusive()


# ---------------------------------------------------------------------------------------------------------------------
# Grids


def test_sform_before_qform_and_disagreement_is_reported(tmp_path: Path) -> None:
    image = nib.Nifti1Image(np.zeros(SHAPE, np.int16), None)
    image.header.set_sform(oblique().affine, 1)
    image.header.set_qform(oblique().affine, 1)
    nib.save(image, tmp_path / "same.nii")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert read(tmp_path / "same.nii").meta["quirks"] == ()
    moved = oblique().affine.copy()
    moved[0, 3] += 4
    image.header.set_qform(moved, 1)
    nib.save(image, tmp_path / "moved.nii")
    with pytest.warns(UserWarning, match=r"moved\.nii: sform and qform disagree by up to 4\.000 mm; sform used"):
        ours = read(tmp_path / "moved.nii")
    assert ours.geometry.is_close(oblique(), 1e-3) and "disagree by up to 4.000 mm" in ours.meta["quirks"][0]
    assert list_series(tmp_path / "moved.nii")[0].quirks == ours.meta["quirks"]


def test_voxel_sizes_alone(tmp_path: Path) -> None:
    content = header_of(np.zeros(SHAPE, np.int16), sform_code=0, qform_code=0, pixdim=[1, 2, 3, 4, 1, 1, 1, 1])
    ours = read(saved(tmp_path / "p.nii", content))
    np.testing.assert_array_equal(ours.geometry.affine, np.diag([2, 3, 4, 1]))
    assert "orientation and position are unknown" in ours.meta["quirks"][0]


@pytest.mark.parametrize(("code", "factor", "name"), [(1, 1000.0, "metres"), (3, 0.001, "micrometres")])
def test_units_become_millimetres(tmp_path: Path, code: int, factor: float, name: str) -> None:
    ours = read(saved(tmp_path / "u.nii", header_of(np.zeros(SHAPE, np.int16), xyzt_units=code)))
    np.testing.assert_allclose(ours.geometry.affine[:3], AFFINE[:3] * factor, rtol=1e-6)
    assert f"lengths are stored in {name}; converted to mm" in ours.meta["quirks"]


def test_voxel_sizes_that_differ_from_the_sform_are_told(tmp_path: Path) -> None:
    ours = read(saved(tmp_path / "d.nii", header_of(np.zeros(SHAPE, np.int16), pixdim=[1, 1, 1, 9, 1, 1, 1, 1])))
    assert "differ from those of the sform" in ours.meta["quirks"][0]


@pytest.mark.parametrize(
    "fields",
    [
        {"sform_code": 0, "pixdim": [1, np.nan, 1, 1, 1, 1, 1, 1]},
        {"sform_code": 0, "pixdim": [1, 1, np.inf, 1, 1, 1, 1, 1]},
        {"sform_code": 0, "qform_code": 1, "pixdim": [1, 1, 1, 0, 1, 1, 1, 1]},
        {"sform_code": 0, "qform_code": 1, "quatern_b": np.nan},
        {"srow_x": [0, 0, 0, 0]},
        {"srow_y": [np.nan, 1, 0, 0]},
        {"srow_z": [1, 0, np.inf, 0]},
    ],
)
def test_unusable_grids_are_refused_with_the_name(tmp_path: Path, fields: dict[str, Any]) -> None:
    path = saved(tmp_path / "bad.nii.gz", header_of(np.zeros(SHAPE, np.int16), **fields))
    with pytest.raises(GeometryError, match=r"got .* in .*bad\.nii\.gz"):
        read(path)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def test_truncated_files(tmp_path: Path) -> None:
    array = np.random.default_rng(0).integers(0, 9999, (30, 40, 50)).astype(np.int16)
    write(Volume(array, oblique((30, 40, 50))), tmp_path / "whole.nii.gz")
    write(Volume(array, oblique((30, 40, 50))), tmp_path / "whole.nii")
    for suffix in (".nii.gz", ".nii"):
        content = (tmp_path / f"whole{suffix}").read_bytes()
        for keep in (0, 10, 100, 400, len(content) // 2, len(content) - 4):
            cut = tmp_path / f"cut{suffix}"
            cut.write_bytes(content[:keep])
            with pytest.raises(ValueError, match=r"must .* in .*cut\.nii"):
                read(cut)


def test_damaged_bytes_fail_the_checksum(tmp_path: Path) -> None:
    path = saved(tmp_path / "d.nii.gz", header_of(np.zeros(SHAPE, np.int16)))
    content = bytearray(path.read_bytes())
    content[-6] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"damaged or truncated gzip data in .*d\.nii\.gz"):
        read(path)


@pytest.mark.parametrize("name", ["huge.nii", "huge.nii.gz"])
def test_a_header_of_10_to_the_12_voxels_is_refused_before_allocation(tmp_path: Path, name: str) -> None:
    content = header_of(np.zeros(SHAPE, np.int16), dim=[3, 10000, 10000, 10000, 1, 1, 1, 1])
    path = saved(tmp_path / name, content)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match=r"must not claim more voxels than the file can hold.*2000000000000 bytes"):
            read(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 24
    finally:
        tracemalloc.stop()
    with pytest.raises(ValueError, match="must not claim more voxels"):
        list_series(path)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"dim": [3, 4, -6, 5, 1, 1, 1, 1]}, "dimensions must be 1 to 7 positive numbers"),
        ({"dim": [0, 4, 6, 5, 1, 1, 1, 1]}, "dimensions must be"),
        ({"dim": [9, 4, 6, 5, 1, 1, 1, 1]}, "dimensions must be"),
        ({"datatype": 77}, "voxel type must be a known one, got code 77"),
        ({"vox_offset": 1e9}, "voxels must begin within the file"),
        ({"vox_offset": np.nan}, "voxels must begin within the file"),
        ({"magic": b"abc"}, "must begin with a whole NIfTI header"),
        ({"sizeof_hdr": 349}, "must begin with a whole NIfTI header"),
    ],
)
def test_nonsense_headers(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"{message}.* in .*n\.nii"):
        read(saved(tmp_path / "n.nii", header_of(np.zeros(SHAPE, np.int16), **fields)))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, 360), st.integers(0, 255)), min_size=1, max_size=6))
def test_any_damage_of_the_header_is_read_or_refused_never_a_crash(
    tmp_path: Path, changes: list[tuple[int, int]]
) -> None:
    content = bytearray(header_of(np.zeros(SHAPE, np.int16)))
    for at, value in changes:
        content[at] = value
    path = tmp_path / "fuzz.nii"
    path.write_bytes(content)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        try:
            read(path)
        except ValueError as error:
            assert "fuzz.nii" in str(error)


def test_names_that_lie_about_compression(tmp_path: Path) -> None:
    content = header_of(np.arange(120, dtype=np.int16).reshape(SHAPE))
    (tmp_path / "plain.nii.gz").write_bytes(content)
    (tmp_path / "packed.nii").write_bytes(gzip.compress(content))
    for name, quirk in (("plain.nii.gz", "not compressed"), ("packed.nii", "compressed")):
        ours = read(tmp_path / name)
        np.testing.assert_array_equal(ours.array.ravel(), np.arange(120))
        assert quirk in ours.meta["quirks"][0]


def test_several_gzip_members_and_trailing_bytes(tmp_path: Path) -> None:
    array = np.arange(120, dtype=np.int16).reshape(SHAPE)
    content = header_of(array) + b"more"
    (tmp_path / "m.nii.gz").write_bytes(gzip.compress(content[:400]) + gzip.compress(content[400:]))
    np.testing.assert_array_equal(read(tmp_path / "m.nii.gz").array[0], array)


def test_foreign_and_broken_extensions_do_no_harm(tmp_path: Path) -> None:
    array = np.arange(120, dtype=np.int16).reshape(SHAPE)
    for text in (b'{"medseg": {"structures": 3}}', b'{"medseg": [', b'{"medseg": 5}', b"plain words"):
        image = nib.Nifti1Image(array, AFFINE)
        image.header.extensions.append(nib.nifti1.Nifti1Extension(6, text))
        image.header.extensions.append(nib.nifti1.Nifti1Extension(4, b"<xml/>"))
        nib.save(image, tmp_path / "e.nii.gz")
        ours = read_labels(tmp_path / "e.nii.gz")
        np.testing.assert_array_equal(ours.array, array)
        assert ours.names[119] == "label 119"


def test_structures_of_probabilities(tmp_path: Path) -> None:
    structures = (Structure(3, "liver", (1, 2, 3), type=Code("10200004", "SCT", "Liver")), Structure(300, "tumour"))
    array = np.random.default_rng(0).dirichlet((1, 1, 1), SHAPE).transpose(3, 0, 1, 2).astype(np.float32)
    write(Volume(array, oblique(), {"structures": structures}), tmp_path / "p.nii.gz")
    ours = read(tmp_path / "p.nii.gz")
    assert ours.meta["structures"] == structures
    np.testing.assert_array_equal(np.moveaxis(nib.load(tmp_path / "p.nii.gz").get_fdata(), 3, 0), ours.array)
    with pytest.raises(ValueError, match=r"got 1 channels for 2 structures in .*q.nii"):
        write(Volume(array[:1], oblique(), {"structures": structures}), tmp_path / "q.nii")
    write(LabelMap(np.ones(SHAPE, np.uint8), oblique(), structures), tmp_path / "labels.nii.gz")
    assert "structures" not in read(tmp_path / "labels.nii.gz").meta  # one channel: labels, no probabilities


def test_real_files_are_as_nibabel_reads_them(data_dir: Path) -> None:
    files = sorted((data_dir / "hippocampus" / "imagesTr").glob("*.nii.gz"))[:10]
    files += sorted((data_dir / "ms_lesions").rglob("*.nii.gz"))[:3] + sorted((data_dir / "sct_cord").rglob("*.nii.gz"))
    for path in files:
        theirs, ours = nib.load(path), read(path)
        np.testing.assert_array_equal(ours.array[0], np.asarray(theirs.dataobj), err_msg=str(path))
        np.testing.assert_allclose(ours.geometry.affine, theirs.affine, atol=1e-3)
