"""Pictures: PNG, JPEG, BMP (Pillow) and TIFF (tifffile, pages become slices).

A picture has no patient space. Its world is fixed here: index i is the column and grows to the patient's Left, j is the
row and grows to the Posterior (so a radiological axial picture is upright, and the grid is ITK's for the same file), k is
the page and grows to the Superior; voxel (0, 0, 0) is at 0 mm.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import tifffile
from numpy.typing import NDArray
from PIL import Image

from medseg.io.files import atomic_path
from medseg.io.info import VolumeInfo
from medseg.io.labels import exclusive_array, integer_labels
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["UNCLEAR", "describe", "read_label_map", "read_volume", "unclear_share", "write"]

Array = NDArray[Any]
_TIFF, _JPEG = (".tif", ".tiff"), (".jpg", ".jpeg")
_LARGEST_RATIO = 4096  # no compression of these formats expands more, but for JPEG's of one flat colour
UNCLEAR = 0.01  # share of the voxels of a JPEG mask that may lie between black and white
_SCREEN_DPI = (72, 96)  # what programs write when they know nothing
_MM = {"mm": 1.0, "cm": 10.0, "um": 1e-3, "µm": 1e-3, "\\u00b5m": 1e-3, "micron": 1e-3, "nm": 1e-6, "inch": 25.4}


@dataclass(frozen=True)
class _Picture:
    array: Array  # (C, I, J, K)
    spacing: tuple[float, float, float]  # mm
    quirks: tuple[str, ...]
    palette: Array | None = None  # (N, 3) colours where the voxels are indices


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read a picture: (C, I, J, K) with C = 1 (grey), 3 (RGB) or 4 (RGB and an alpha that is not opaque); 8 or 16 bit.

    Palette colours are looked up. The voxel size is the resolution where the file declares one, else 1 mm; ``quirks``
    says which.

    Raises
    ------
    ValueError
        If the file is damaged or claims more pixels than it can hold.
    """
    picture = _read(Path(path))
    array, quirks = picture.array, picture.quirks
    if picture.palette is not None:
        array = np.moveaxis(picture.palette[array[0]], -1, 0)
        if (array == array[:1]).all():
            array = array[:1]
    return Volume(array, _geometry(picture), {"path": str(path), "quirks": quirks})


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Read labels: the grey values, or the indices of a palette.

    A JPEG holds no exact numbers, but a mask in black and white survives it: such a file is cut at 128 into 0 and 1, and
    ``quirks`` says so.

    Raises
    ------
    ValueError
        As :func:`read_volume`, and if the file has colours, or is a JPEG where more than 1 % of the voxels lie between
        black and white.
    """
    path = Path(path)
    picture = _read(path)
    array, quirks = picture.array, picture.quirks
    if path.suffix.lower() in _JPEG:
        unclear = unclear_share(array)
        if unclear > UNCLEAR:
            raise ValueError(
                f"labels must be stored exactly, got the lossy JPEG {path}, where {100 * unclear:.0f} % of the voxels are "
                "neither black nor white; write a PNG with one number per structure"
            )
        white = array >= 128
        if not (white == white[:1]).all():
            raise ValueError(f"labels must be grey values or a palette, got {len(array)} colour channels in {path}")
        array = white[:1].astype(np.uint8)
        quirks = (*quirks, f"mask is a lossy JPEG; cut at 128 ({100 * unclear:.3f} % of the voxels are unclear)")
    if len(array) > 1:
        if not (array == array[:1]).all():
            raise ValueError(f"labels must be grey values or a palette, got {len(array)} colour channels in {path}")
        quirks = (*quirks, "labels are stored as colours; all channels are equal")
    labels, more = integer_labels(array[0], str(path))
    return LabelMap(labels, _geometry(picture), (), {"path": str(path), "quirks": (*quirks, *more)})


def unclear_share(values: Array) -> float:
    """Share of voxels of an 8 bit picture that are clearly neither black nor white: 32 to 223."""
    return float(np.mean((values >= 32) & (values < 224)))


def describe(path: str | os.PathLike[str]) -> VolumeInfo:
    """Shape, voxel size and quirks (reads the pixels too: pictures are small)."""
    volume = read_volume(path)
    g = volume.geometry
    shape = g.shape if volume.channels == 1 else (volume.channels, *g.shape)
    return VolumeInfo(str(path), "", "", "", shape, g.spacing, g.affine.tolist(), volume.meta["quirks"])


def _geometry(picture: _Picture) -> Geometry:
    return Geometry.from_parts(picture.array.shape[1:], picture.spacing, (0, 0, 0), np.diag([-1.0, -1.0, 1.0]))


def _read(path: Path) -> _Picture:
    try:
        picture = _read_tiff(path) if path.suffix.lower() in _TIFF else _read_picture(path)
    except Image.DecompressionBombError as error:
        raise ValueError(f"picture must be of a sane size, got {error} in {path}") from error
    except (OSError, SyntaxError, EOFError, struct.error, tifffile.TiffFileError, KeyError, IndexError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's error, not the file's
        raise ValueError(f"picture must be whole and readable, got {error} in {path}") from error
    array, quirks = picture.array, picture.quirks
    with_alpha = (4,) if path.suffix.lower() in _TIFF else (2, 4)
    if len(array) in with_alpha and (array[-1] == (np.iinfo(array.dtype).max if array.dtype.kind == "u" else 1)).all():
        array, quirks = array[:-1], (*quirks, "alpha channel is opaque everywhere; left out")
    return _Picture(array, picture.spacing, quirks, picture.palette)


def _require_room(path: Path, claimed: int) -> None:
    room = path.stat().st_size * _LARGEST_RATIO
    if claimed > room:
        raise ValueError(
            f"picture must not claim more than its file can hold, got {claimed} bytes (at most {room} possible) in {path}"
        )


def _read_picture(path: Path) -> _Picture:
    """PNG, JPEG and BMP."""
    with path.open("rb") as file:
        head = file.read(26)
    if head[:8] == b"\x89PNG\r\n\x1a\n" and head[24:26] in (b"\x10\x02", b"\x10\x06"):
        # Pillow cuts 16 bit colours to 8; ITK does not. It loads for these few files only.
        volume = import_module("medseg.io.itk").read_volume(path)
        return _Picture(volume.array, (1.0, 1.0, 1.0), ("no voxel size in the file; 1 mm taken",))
    quirks: list[str] = []
    with Image.open(path) as image:
        _require_room(path, image.width * image.height * len(image.getbands()))
        turn = image.getexif().get(0x0112, 1)
        if turn != 1:
            quirks.append(f"EXIF asks to turn the picture (orientation {turn}); left as stored")
        if getattr(image, "n_frames", 1) > 1:
            quirks.append(f"only the first of {image.n_frames} frames is read")  # type: ignore[attr-defined]
        dpi = image.info.get("dpi") if image.format == "PNG" else None
        mode, palette = image.mode, None
        if mode == "P":
            colours = np.asarray(image.getpalette("RGB"), np.uint8).reshape(-1, 3)
            palette = np.concatenate([colours, np.zeros((256 - len(colours), 3), np.uint8)])
        elif mode in ("CMYK", "YCbCr", "LAB", "HSV", "PA"):
            quirks.append(f"colours are stored as {mode}; converted to RGB")
            image = image.convert("RGBA" if mode == "PA" else "RGB")  # type: ignore[assignment]
        array = np.asarray(image)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    if mode == "I" and array.min() >= 0 and array.max() < 1 << 16:
        array = array.astype(np.uint16)
    array = array[..., None] if array.ndim == 2 else array  # (J, I, C)
    spacing, quirk = _from_dpi(dpi)
    return _Picture(array.transpose(2, 1, 0)[..., None], spacing, (*quirks, quirk), palette)


def _from_dpi(dpi: tuple[float, float] | None) -> tuple[tuple[float, float, float], str]:
    if not dpi or not all(np.isfinite(d) and d > 0 for d in map(float, dpi)):
        return (1.0, 1.0, 1.0), "no voxel size in the file; 1 mm taken"
    x, y = (float(d) for d in dpi)
    if all(round(d, 1) in _SCREEN_DPI for d in (x, y)):
        return (1.0, 1.0, 1.0), f"resolution of {x:.0f} dpi is a screen's default; 1 mm taken"
    return (25.4 / x, 25.4 / y, 1.0), f"voxel size {25.4 / x:.4g} x {25.4 / y:.4g} mm from the file's resolution"


def _read_tiff(path: Path) -> _Picture:
    with tifffile.TiffFile(path) as tiff:
        if not tiff.series:
            raise ValueError(f"picture must hold an image, got none in {path}")
        series, quirks = tiff.series[0], []
        _require_room(path, int(series.nbytes))
        page: Any = series.keyframe
        if len(tiff.series) > 1:
            quirks.append(f"only the first of {len(tiff.series)} images of different kinds is read")
        if page.photometric == tifffile.PHOTOMETRIC.MINISWHITE:
            quirks.append("zero is stored as white; values left as they are")
        axes = series.axes
        if series.dtype is None or series.dtype.kind not in "biuf":
            raise ValueError(f"voxels must be real numbers, got {series.dtype} in {path}")
        try:
            array = np.asarray(series.asarray())
        except ValueError as error:  # a compression for which tifffile needs another package
            array, axes = _pillow_pages(path, error)
        palette = None
        if page.photometric == tifffile.PHOTOMETRIC.PALETTE and page.colormap is not None:
            palette = (np.asarray(page.colormap).T >> 8).astype(np.uint8)
        spacing, quirk = _tiff_spacing(tiff, page)
    if array.dtype == bool:
        array = array.astype(np.uint8)
    return _Picture(_channels_first(array, axes, path), spacing, (*quirks, quirk), palette)


def _pillow_pages(path: Path, error: ValueError) -> tuple[Array, str]:
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "I;16", "RGB", "RGBA", "F"):
            raise ValueError(f"picture must have a supported compression, got {error} in {path}") from error
        pages = []
        for n in range(getattr(image, "n_frames", 1)):
            image.seek(n)
            pages.append(np.asarray(image))
    array = np.stack(pages)
    return array, "ZYXS" if array.ndim == 4 else "ZYX"


def _channels_first(array: Array, axes: str, path: Path) -> Array:
    """(C, I, J, K) from axes named by tifffile: Y, X, S or C for channels, any other for pages."""
    kept = [(n, a) for n, a in zip(array.shape, axes, strict=True) if n > 1 or a in "YX"]
    array, axes = array.reshape([n for n, _ in kept]), "".join(a for _, a in kept)
    channels = [a for a in axes if a in "SC"]
    pages = [a for a in axes if a not in "YXSC"]
    if len(channels) > 1 or len(pages) > 1:
        raise ValueError(f"picture must have one axis of channels and one of pages at most, got {axes} in {path}")
    missing = (0 if channels else 1) + (0 if pages else 1)
    array = array.reshape(*array.shape, *(1,) * missing)
    order = [axes.index(channels[0]) if channels else len(axes)]
    order += [axes.index("X"), axes.index("Y")]
    order += [axes.index(pages[0]) if pages else array.ndim - 1]
    return array.transpose(order)


def _tiff_spacing(tiff: Any, page: Any) -> tuple[tuple[float, float, float], str]:
    def per_unit(name: str) -> float:
        value = page.tags.get(name)
        top, bottom = value.value if value is not None and isinstance(value.value, tuple) else (0, 1)
        return top / bottom if bottom else 0.0

    x, y = per_unit("XResolution"), per_unit("YResolution")
    imagej = tiff.imagej_metadata or {}
    if imagej and x > 0 and y > 0 and (mm := _MM.get(str(imagej.get("unit", "")))):
        spacing = (mm / x, mm / y, mm * float(imagej.get("spacing", 1 / mm)))
        return spacing, "voxel size " + " x ".join(f"{s:.4g}" for s in spacing) + " mm from ImageJ's description"
    unit = page.tags.get("ResolutionUnit")
    per_inch = {2: 1.0, 3: 2.54}.get(int(unit.value)) if unit is not None else None
    return _from_dpi((x * per_inch, y * per_inch) if per_inch else None)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(value: Volume | LabelMap, path: Path, *, force: bool = False) -> None:
    """Write a picture: the index axes as columns, rows and (TIFF only) pages, and the voxel size, but no position.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    ValueError
        If the format cannot hold the voxels exactly: more than one slice or other types than 8 and 16 bit integers
        outside TIFF; labels as JPEG.
    """
    suffix = path.suffix.lower()
    if isinstance(value, LabelMap):
        if suffix in _JPEG:
            raise ValueError(f"labels must be stored exactly, got the lossy JPEG {path}; use .png or .nii.gz")
        array = exclusive_array(value, str(path))[None]
        if array.dtype.itemsize > 2 and array.min() >= 0 and array.max() < 1 << 16:
            array = array.astype(np.uint16)
    else:
        array = value.array
    rows = array.transpose(3, 2, 1, 0)  # (K, J, I, C)
    rows = rows[..., 0] if rows.shape[-1] == 1 else rows
    if suffix in _TIFF:
        with atomic_path(path, force) as temporary:
            _write_tiff(temporary, rows, value.geometry)
        return
    allowed = {".png": ("uint8", "uint16")}.get(suffix, ("uint8",))
    depth = rows.shape[-1] if rows.ndim == 4 else 1
    colours = (1, 3, 4) if suffix == ".png" else (1, 3)
    if (
        len(rows) > 1
        or rows.dtype.name not in allowed
        or depth not in colours
        or (depth > 1 and rows.dtype != np.uint8)
    ):
        raise ValueError(
            f"picture must be one slice of {' or '.join(allowed)} (colours: uint8) to be {suffix}, got "
            f"{value.geometry.shape} with {len(array)} channels of {array.dtype} for {path}; use .tif or .nii.gz"
        )
    x, y, _ = value.geometry.spacing
    options: dict[str, Any] = {"quality": 95} if suffix in _JPEG else {}
    if suffix == ".png" and (x, y) != (1, 1):
        options["dpi"] = (25.4 / x, 25.4 / y)
    with atomic_path(path, force) as temporary:
        Image.fromarray(np.ascontiguousarray(rows[0])).save(temporary, **options)


def _write_tiff(path: Path, rows: Array, geometry: Geometry) -> None:
    x, y, z = geometry.spacing
    colour = rows.ndim == 4 and rows.shape[-1] in (3, 4) and rows.dtype.name in ("uint8", "uint16")
    data = rows if rows.ndim == 3 or colour else np.moveaxis(rows, -1, 1)
    axes = "ZYX" if rows.ndim == 3 else "ZYXS" if colour else "ZCYX"
    options: dict[str, Any] = {"metadata": {"axes": axes}, "compression": "zlib"}
    if data.dtype.name in ("uint8", "uint16", "float32") and not (colour and data.dtype != np.uint8):
        options |= {"imagej": True, "resolution": (1 / x, 1 / y)}
        options["metadata"] |= {"unit": "mm", "spacing": z}
    else:
        options |= {"resolution": (10 / x, 10 / y), "resolutionunit": "CENTIMETER"}
    tifffile.imwrite(path, np.ascontiguousarray(data), photometric="rgb" if colour else "minisblack", **options)
