"""Pictures against Pillow, tifffile and SimpleITK."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import tifffile
from PIL import Image

from medseg.io import list_series, read, read_labels, write
from medseg.volume import Geometry, LabelMap, Volume

RNG = np.random.default_rng(0)
FLIP = np.diag([-1.0, -1.0, 1.0])


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif"])
@pytest.mark.parametrize("bands", [1, 3])
def test_columns_rows_and_orientation(tmp_path: Path, suffix: str, bands: int) -> None:
    pixels = RNG.integers(0, 255, (5, 7, bands)).astype(np.uint8)  # row, column
    path = tmp_path / f"p{suffix}"
    Image.fromarray(pixels[..., 0] if bands == 1 else pixels).save(path)
    ours = read(path)
    assert ours.array.shape == (bands, 7, 5, 1) and ours.array.dtype == np.uint8
    np.testing.assert_array_equal(ours.array[:, :, :, 0], pixels.transpose(2, 1, 0))
    assert ours.geometry.orientation == "LPS" and ours.meta["quirks"] == ("no voxel size in the file; 1 mm taken",)
    assert list_series(path)[0].shape == ((7, 5, 1) if bands == 1 else (3, 7, 5, 1))
    if suffix != ".tif":
        itk = sitk.ReadImage(str(path))  # the world is ITK's
        world = np.array([*itk.TransformIndexToPhysicalPoint((3, 2)), 0]) * (-1, -1, 1)
        np.testing.assert_allclose(ours.geometry.to_world((3, 2, 0)), world)


def test_jpeg_images_but_not_labels(tmp_path: Path) -> None:
    pixels = np.repeat(np.linspace(0, 255, 8).astype(np.uint8), 64).reshape(16, 32)
    Image.fromarray(pixels).save(tmp_path / "p.jpg", quality=95, dpi=(300, 300))
    ours = read(tmp_path / "p.jpg")
    assert ours.geometry.spacing == (1, 1, 1)
    assert np.abs(ours.array[0, :, :, 0].T.astype(int) - pixels).max() < 12
    with pytest.raises(ValueError, match=r"labels must be stored exactly, got the lossy JPEG .*p\.jpg, .* write a PNG"):
        read_labels(tmp_path / "p.jpg")
    with pytest.raises(ValueError, match="lossy JPEG"):
        write(LabelMap(np.zeros((3, 4, 1), np.uint8), Geometry.from_parts((3, 4, 1), (1, 1, 1))), tmp_path / "l.jpg")


def png_16_bit_rgb(pixels: np.ndarray) -> bytes:
    """A PNG by hand: Pillow cannot write 16 bit colours."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")

    rows, columns, _ = pixels.shape
    head = columns.to_bytes(4, "big") + rows.to_bytes(4, "big") + bytes([16, 2, 0, 0, 0])
    lines = b"".join(b"\0" + line.astype(">u2").tobytes() for line in pixels)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(lines)) + chunk(b"IEND", b"")


def test_sixteen_bits_are_kept(tmp_path: Path) -> None:
    grey = RNG.integers(0, 65535, (5, 7)).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / "g.png")
    np.testing.assert_array_equal(read(tmp_path / "g.png").array[0, :, :, 0], grey.T)
    assert read_labels(tmp_path / "g.png").array.dtype == np.uint16
    colours = RNG.integers(0, 65535, (5, 7, 3)).astype(np.uint16)
    (tmp_path / "c.png").write_bytes(png_16_bit_rgb(colours))
    ours = read(tmp_path / "c.png")
    assert ours.array.dtype == np.uint16 and ours.geometry.orientation == "LPS"
    np.testing.assert_array_equal(ours.array[:, :, :, 0], colours.transpose(2, 1, 0))
    tifffile.imwrite(tmp_path / "c.tif", colours, photometric="rgb")
    np.testing.assert_array_equal(read(tmp_path / "c.tif").array[:, :, :, 0], colours.transpose(2, 1, 0))


def test_palettes_are_labels_or_colours(tmp_path: Path) -> None:
    index = RNG.integers(0, 3, (5, 7)).astype(np.uint8)
    image = Image.fromarray(index).convert("P")
    image.putdata(index.ravel().tolist())
    image.putpalette([0, 0, 0, 255, 0, 0, 0, 128, 255])
    image.save(tmp_path / "p.png")
    np.testing.assert_array_equal(read_labels(tmp_path / "p.png").array[:, :, 0], index.T)
    colours = np.array([[0, 0, 0], [255, 0, 0], [0, 128, 255]])[index]
    np.testing.assert_array_equal(read(tmp_path / "p.png").array[:, :, :, 0], colours.transpose(2, 1, 0))
    lut = np.zeros((3, 256), np.uint16)
    lut[:, 1], lut[:, 2] = (65535, 0, 0), (0, 32896, 65535)
    tifffile.imwrite(tmp_path / "p.tif", index, photometric="palette", colormap=lut)
    np.testing.assert_array_equal(read_labels(tmp_path / "p.tif").array[:, :, 0], index.T)
    np.testing.assert_array_equal(read(tmp_path / "p.tif").array[:, :, :, 0], colours.transpose(2, 1, 0))


def test_alpha_bits_and_grey_saved_as_colours(tmp_path: Path) -> None:
    rgba = RNG.integers(0, 255, (5, 7, 4)).astype(np.uint8)
    Image.fromarray(rgba).save(tmp_path / "a.png")
    assert read(tmp_path / "a.png").channels == 4
    rgba[..., 3] = 255
    Image.fromarray(rgba).save(tmp_path / "o.png")
    ours = read(tmp_path / "o.png")
    assert ours.channels == 3 and "opaque" in ours.meta["quirks"][-1]
    with pytest.raises(ValueError, match=r"labels must be grey values or a palette, got 3 colour channels in .*o\.png"):
        read_labels(tmp_path / "o.png")
    grey = np.repeat(rgba[..., :1], 3, 2)
    Image.fromarray(grey).save(tmp_path / "g.png")
    labels = read_labels(tmp_path / "g.png")
    np.testing.assert_array_equal(labels.array[:, :, 0], grey[..., 0].T)
    assert "all channels are equal" in labels.meta["quirks"][-1]
    Image.fromarray(rgba[..., 0] > 100).save(tmp_path / "b.png")
    bits = read_labels(tmp_path / "b.png").array
    np.testing.assert_array_equal(bits[:, :, 0], (rgba[..., 0] > 100).T)


@pytest.mark.parametrize(
    ("shape", "axes", "expected"),
    [
        ((4, 5, 7), "ZYX", lambda a: a.transpose(2, 1, 0)[None]),
        ((4, 3, 5, 7), "ZCYX", lambda a: a.transpose(1, 3, 2, 0)),
        ((3, 5, 7), "CYX", lambda a: a.transpose(0, 2, 1)[..., None]),
        ((4, 5, 7, 3), "ZYXS", lambda a: a.transpose(3, 2, 1, 0)),
    ],
)
def test_tiff_pages_and_channels(tmp_path: Path, shape: tuple[int, ...], axes: str, expected: object) -> None:
    pixels = RNG.integers(0, 255, shape).astype(np.uint8)
    photometric = "rgb" if axes.endswith("S") else "minisblack"
    tifffile.imwrite(tmp_path / "t.tif", pixels, imagej=True, photometric=photometric, metadata={"axes": axes})
    np.testing.assert_array_equal(read(tmp_path / "t.tif").array, expected(pixels))  # type: ignore[operator]


def test_spacing_only_where_declared(tmp_path: Path) -> None:
    pixels = RNG.integers(0, 255, (4, 5, 7)).astype(np.uint8)
    resolution = (1 / 0.5, 1 / 0.25)
    tifffile.imwrite(
        tmp_path / "j.tif", pixels, imagej=True, resolution=resolution, metadata={"unit": "um", "spacing": 2.0}
    )
    ours = read(tmp_path / "j.tif")
    np.testing.assert_allclose(ours.geometry.spacing, (0.5e-3, 0.25e-3, 2e-3), rtol=1e-5)
    assert "ImageJ" in ours.meta["quirks"][0]
    tifffile.imwrite(tmp_path / "c.tif", pixels[0], resolution=(20, 40), resolutionunit="CENTIMETER")
    np.testing.assert_allclose(read(tmp_path / "c.tif").geometry.spacing, (0.5, 0.25, 1))
    tifffile.imwrite(tmp_path / "n.tif", pixels[0], resolution=(20, 40), resolutionunit="NONE")
    assert read(tmp_path / "n.tif").geometry.spacing == (1, 1, 1)
    for dpi, spacing in (((72, 72), 1.0), ((96, 96), 1.0), ((254, 254), 0.1)):
        Image.fromarray(pixels[0]).save(tmp_path / "d.png", dpi=dpi)
        ours = read(tmp_path / "d.png")
        np.testing.assert_allclose(ours.geometry.spacing[:2], spacing, rtol=1e-3)
        assert ours.meta["quirks"]


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "int32", "float32", "float64"])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_tiff_round_trips(tmp_path: Path, dtype: str, channels: int) -> None:
    geometry = Geometry.from_parts((4, 5, 6), (0.5, 0.25, 3), (0, 0, 0), FLIP)
    array = (RNG.random((channels, 4, 5, 6)) * 200).astype(dtype)
    write(Volume(array, geometry), tmp_path / "r.tif")
    ours = read(tmp_path / "r.tif")
    assert ours.array.dtype == dtype
    np.testing.assert_array_equal(ours.array, array)
    np.testing.assert_allclose(ours.geometry.spacing[:2], (0.5, 0.25), rtol=1e-6)


def test_labels_round_trip_or_are_refused(tmp_path: Path) -> None:
    geometry = Geometry.from_parts((4, 5, 1), (0.5, 0.25, 1), (0, 0, 0), FLIP)
    labels = (np.arange(20).reshape(4, 5, 1) * 300).astype(np.int32)
    for suffix in (".png", ".tif"):
        write(LabelMap(labels, geometry), tmp_path / f"l{suffix}")
        ours = read_labels(tmp_path / f"l{suffix}")
        np.testing.assert_array_equal(ours.array, labels)
        np.testing.assert_allclose(ours.geometry.spacing[:2], (0.5, 0.25), rtol=1e-3)
    deep = Geometry.from_parts((4, 5, 6), (1, 1, 1), (0, 0, 0), FLIP)
    with pytest.raises(ValueError, match=r"picture must be one slice of uint8 or uint16 .* got \(4, 5, 6\)"):
        write(Volume(np.zeros((4, 5, 6), np.uint8), deep), tmp_path / "deep.png")
    with pytest.raises(ValueError, match="channels of float32"):
        write(Volume(np.zeros((4, 5, 1), np.float32), geometry), tmp_path / "float.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["l.png", "l.tif"]


def test_damaged_and_bombs(tmp_path: Path) -> None:
    Image.fromarray(RNG.integers(0, 255, (50, 70)).astype(np.uint8)).save(tmp_path / "w.png")
    tifffile.imwrite(tmp_path / "w.tif", RNG.integers(0, 255, (50, 70)).astype(np.uint8))
    for suffix in (".png", ".tif"):
        content = (tmp_path / f"w{suffix}").read_bytes()
        for keep in (0, 5, 100, len(content) // 2):
            (tmp_path / f"cut{suffix}").write_bytes(content[:keep])
            with pytest.raises(ValueError, match=r"picture must .* in .*cut\."):
                read(tmp_path / f"cut{suffix}")
    bomb = bytearray(png_16_bit_rgb(np.zeros((1, 1, 3), np.uint16)))
    bomb[16:24] = (100000).to_bytes(4, "big") * 2
    bomb[24] = 8
    bomb[29:33] = zlib.crc32(bytes(bomb[12:29])).to_bytes(4, "big")
    (tmp_path / "bomb.png").write_bytes(bomb)
    with pytest.raises(ValueError, match=r"picture must .* in .*bomb\.png"):
        read(tmp_path / "bomb.png")


def test_real_pictures(data_dir: Path) -> None:
    for name, shape in (("img2d.tif", (256, 256, 1)), ("img3d.tif", (57, 61, 31))):
        ours = read(data_dir / "stardist" / name)
        assert ours.geometry.shape == shape
        pages = tifffile.imread(data_dir / "stardist" / name)
        np.testing.assert_array_equal(ours.array[0].T, pages if pages.ndim == 3 else pages[None])
    nuclei = sorted((data_dir / "dsb2018" / "labels").glob("*.png"))[0]
    np.testing.assert_array_equal(read_labels(nuclei).array[:, :, 0].T, np.asarray(Image.open(nuclei)))


def test_a_mask_in_black_and_white_survives_jpeg(tmp_path: Path) -> None:
    rows, columns = np.mgrid[:90, :130]
    mask = (rows - 40) ** 2 / 900 + (columns - 70) ** 2 / 1600 < 1
    Image.fromarray(np.where(mask, 255, 0).astype(np.uint8)).save(tmp_path / "m.jpg", quality=95)
    labels = read_labels(tmp_path / "m.jpg")
    assert np.array_equal(labels.array[..., 0], mask.T)
    assert any("cut at 128" in q for q in labels.meta["quirks"])
    red = np.where(mask[..., None], (254, 0, 0), 0).astype(np.uint8)
    Image.fromarray(red).save(tmp_path / "red.jpg", quality=98, subsampling=0)
    with pytest.raises(ValueError, match="grey values or a palette"):
        read_labels(tmp_path / "red.jpg")
