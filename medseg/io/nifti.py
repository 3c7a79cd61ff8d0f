"""NIfTI-1 and NIfTI-2 files (.nii, .nii.gz).

nibabel reads and writes the headers; the voxels go through isal's gzip straight into an array of the file's own type, so
that the peak memory is that of the array. Index axes and world (RAS+ mm) are NIfTI's own: nothing is flipped.

References
----------
Cox et al., "A (sort of) new image data format standard: NIfTI-1", NeuroImage 22 (2004) e1440;
https://nifti.nimh.nih.gov/nifti-1.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from isal import igzip, isal_zlib
from nibabel.nifti1 import Nifti1Extension
from nibabel.nifti1 import Nifti1Header as _Nifti1Header
from nibabel.nifti2 import Nifti2Header as _Nifti2Header
from nibabel.spatialimages import HeaderDataError
from numpy.typing import NDArray

from medseg.io.files import atomic_path
from medseg.io.info import VolumeInfo
from medseg.io.labels import integer_labels, structures_from_json, structures_to_json
from medseg.volume import Geometry, GeometryError, LabelMap, Volume

__all__ = ["describe", "read_label_map", "read_volume", "write"]

Array = NDArray[Any]
_STEP = 1 << 18  # bytes inflated at a time: they are still in the cache when they are copied
_DEFLATE_RATIO = 1032  # no deflate stream expands more
_LARGEST_EXTENSION = 1 << 26
_GZIP_LEVEL = 2  # isal: 0.74 s and 84 MB for a CT of 128 MB; level 1 0.64 s and 88 MB, level 3 0.75 s and 83 MB
_MM = {0: 1.0, 1: 1000.0, 2: 1.0, 3: 0.001}  # spatial unit codes: unknown (taken as mm), metre, mm, micrometre
_COMMENT = 6  # code of a header extension with plain text


@dataclass(frozen=True)
class _Layout:
    """What a header says of the voxels that follow."""

    geometry: Geometry
    channels: int
    components: int  # 3 or 4 for RGB(A) voxels, else 1
    dtype: np.dtype[Any]
    offset: int
    slope: float
    intercept: float
    description: str
    extra: dict[str, Any]  # our own header extension
    quirks: tuple[str, ...]


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read an image: (C, I, J, K), of the file's type, or floating point where the header scales the values.

    A fourth axis (time, channels), a vector (fifth axis) and RGB(A) voxels become channels. Probabilities that medseg
    wrote have ``meta["structures"]``: that of channel c >= 1 is number c - 1. Cost: one pass; memory: the array, twice
    that where the header scales integers.

    Raises
    ------
    ValueError
        If the file is damaged, claims more voxels than it can hold, or has complex voxels.
    GeometryError
        If its grid is not usable (not finite, singular).
    """
    layout, array = _load(Path(path))
    _warn(layout, path)
    meta = _meta(layout, path)
    structures = structures_from_json(layout.extra.get("structures", {}))
    if structures and len(array) == len(structures) + (not layout.extra.get("layers")):
        meta["structures"] = structures
    return Volume(array, layout.geometry, meta)


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Read labels: integers, or floats that hold integers; 4D only where the last axis is 1 or medseg wrote layers.

    Raises
    ------
    ValueError
        As :func:`read_volume`, and if a value is not an integer or the file has several channels.
    """
    layout, array = _load(Path(path))
    _warn(layout, path)
    structures = structures_from_json(layout.extra["structures"]) if "structures" in layout.extra else ()
    meta = _meta(layout, path)
    if layout.extra.get("layers") and len(structures) == len(array):
        masks = array.view(bool) if array.dtype == np.uint8 and array.max(initial=0) <= 1 else array
        return LabelMap(masks, layout.geometry, structures, meta)
    if len(array) != 1:
        raise ValueError(
            f"label map must be 3D, got {len(array)} channels of {layout.geometry.shape} in {path}; write one file each"
        )
    labels, quirks = integer_labels(array[0], str(path))
    return LabelMap(labels, layout.geometry, structures, {**meta, "quirks": (*layout.quirks, *quirks)})


def describe(path: str | os.PathLike[str]) -> VolumeInfo:
    """What the header says; the voxels are not read."""
    path = Path(path)
    with _opened(path) as (stream, limit, quirks):
        layout = _parse(stream, path, limit, quirks)
    g = layout.geometry
    shape = g.shape if layout.channels * layout.components == 1 else (layout.channels * layout.components, *g.shape)
    modality = str(layout.extra.get("modality", ""))
    return VolumeInfo(str(path), "", layout.description, modality, shape, g.spacing, g.affine.tolist(), layout.quirks)


def _meta(layout: _Layout, path: str | os.PathLike[str]) -> dict[str, Any]:
    meta = {"path": str(path), "description": layout.description, "quirks": layout.quirks}
    return meta | ({"modality": str(layout.extra["modality"])} if "modality" in layout.extra else {})


def _warn(layout: _Layout, path: str | os.PathLike[str]) -> None:
    for quirk in layout.quirks:
        if "disagree" in quirk:
            warnings.warn(f"{path}: {quirk}", stacklevel=3)


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int, list[str]]]:
    """The stream of the uncompressed file, the most bytes it can hold, and quirks; its errors told as ours."""
    size = path.stat().st_size
    with path.open("rb", buffering=0) as raw:
        compressed = raw.read(2) == b"\x1f\x8b"
        raw.seek(0)
        named = path.name.lower().endswith(".gz")
        quirks = [] if compressed == named else [f"file is {'' if compressed else 'not '}compressed despite its name"]
        if not compressed:
            yield raw, size, quirks  # type: ignore[misc]
            return
        try:
            with igzip.open(raw, "rb") as stream:
                yield stream, size * _DEFLATE_RATIO, quirks  # type: ignore[misc]
        except (EOFError, isal_zlib.error, gzip.BadGzipFile) as error:  # type: ignore[misc]  # wrong in the stub
            raise ValueError(f"file must be whole, got damaged or truncated gzip data in {path} ({error})") from error


def _load(path: Path) -> tuple[_Layout, Array]:
    with _opened(path) as (stream, limit, quirks):
        layout = _parse(stream, path, limit, quirks)
        array = _voxels(stream, layout, path)
    if layout.components > 1:
        return layout, array.reshape(layout.components, *layout.geometry.shape, order="F")
    array = np.moveaxis(array.reshape(*layout.geometry.shape, layout.channels, order="F"), 3, 0)
    if (layout.slope, layout.intercept) != (1.0, 0.0):
        # A float32 holds every 16 bit integer exactly, but not every 32 bit one: those become float64.
        array = array.astype(np.result_type(array.dtype, np.float32), copy=False)
        array *= array.dtype.type(layout.slope)
        array += array.dtype.type(layout.intercept)
    return layout, array


def _voxels(stream: BinaryIO, layout: _Layout, path: Path) -> Array:
    count = int(np.prod(layout.geometry.shape, dtype=object)) * layout.channels * layout.components
    try:
        array = np.empty(count, layout.dtype)
    except MemoryError as error:
        raise ValueError(f"image must fit in memory, got {count * layout.dtype.itemsize} bytes in {path}") from error
    view, done = array.view(np.uint8).data, 0
    while done < len(view):
        got = stream.readinto(view[done : done + _STEP])  # type: ignore[attr-defined]
        if not got:
            raise ValueError(f"file must be whole, got {done} of {len(view)} bytes of voxels in {path}")
        done += got
    stream.read(1)  # at the end of a gzip stream this compares the checksum
    if not array.dtype.isnative:
        array = array.byteswap(inplace=True).view(array.dtype.newbyteorder())
    return array


# ---------------------------------------------------------------------------------------------------------------------
# Headers


def _parse(stream: BinaryIO, path: Path, limit: int, quirks: list[str]) -> _Layout:
    """Read header and extensions, up to the first voxel."""
    header, head = _header(stream, path)
    least = header.single_vox_offset
    where = float(header["vox_offset"])
    offset = int(where) if np.isfinite(where) else limit + _LARGEST_EXTENSION
    if offset < least:
        quirks.append(f"header says that voxels begin at byte {offset}; {least} taken")
        offset = least
    if offset - least > min(_LARGEST_EXTENSION, limit):
        raise ValueError(f"voxels must begin within the file, got byte {where:g} in {path}")
    head += stream.read(offset - len(head))
    shape, channels = _shape(header, path)
    try:
        dtype = header.get_data_dtype()
    except (HeaderDataError, KeyError) as error:
        raise ValueError(f"voxel type must be a known one, got code {int(header['datatype'])} in {path}") from error
    components = len(dtype.names or (1,))
    if components > 1:
        if channels > 1:
            raise ValueError(f"RGB voxels must be single ones, got {channels} images in {path}; split it first")
        dtype = np.dtype(np.uint8)
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(f"voxels must be integers or floats of at most 64 bits, got {dtype} in {path}")
    claimed = int(np.prod(shape, dtype=object)) * channels * components * dtype.itemsize
    if offset + claimed > limit:
        raise ValueError(
            f"header must not claim more voxels than the file can hold, got {shape} with {channels} channels "
            f"({claimed} bytes, at most {max(limit - offset, 0)} possible) in {path}; the file is damaged or truncated"
        )
    affine = _affine(header, shape, path, quirks)
    slope, intercept = _scaling(header, path) if components == 1 else (1.0, 0.0)
    try:
        geometry = Geometry(shape, affine)
    except GeometryError as error:
        raise GeometryError(f"{error} in {path}") from error
    if geometry.is_skewed:
        quirks.append("axes of the grid are not at right angles")
    text = bytes(header["descrip"].tobytes()).split(b"\0")[0].decode("utf-8", "replace").strip()
    extra = _extension(header, head, quirks)
    return _Layout(geometry, channels, components, dtype, offset, slope, intercept, text, extra, tuple(quirks))


def _header(stream: BinaryIO, path: Path) -> tuple[Any, bytes]:
    """The header (either version, either byte order) and its bytes."""
    head = stream.read(348)
    kinds = {348: (_Nifti1Header, b"n+1"), 540: (_Nifti2Header, b"n+2")}
    for order, endianness in (("little", "<"), ("big", ">")):
        kind, magic = kinds.get(int.from_bytes(head[:4], order), (None, b""))  # type: ignore[arg-type]
        if kind is None:
            continue
        head += stream.read(kind.template_dtype.itemsize - len(head))
        if len(head) < kind.template_dtype.itemsize:
            break
        header = kind(head, endianness, check=False)
        if bytes(header["magic"].tobytes())[:3] == magic:
            return header, head
    raise ValueError(f"file must begin with a whole NIfTI header (n+1 or n+2), got {head[:4]!r} in {path}")


def _shape(header: Any, path: Path) -> tuple[tuple[int, int, int], int]:
    """(I, J, K) and the number of channels; trailing axes of length 1 do not count."""
    dims = [int(n) for n in header["dim"]]
    if not 1 <= dims[0] <= 7 or min(dims[1 : dims[0] + 1]) < 1:
        raise ValueError(f"dimensions must be 1 to 7 positive numbers, got {dims} in {path}")
    sizes = dims[1 : dims[0] + 1] + [1] * (7 - dims[0])
    beyond = [n for n in sizes[3:] if n > 1]
    if len(beyond) > 1:
        raise ValueError(f"image must have one axis of channels at most, got {sizes} in {path}; split it first")
    return (sizes[0], sizes[1], sizes[2]), (beyond or [1])[0]


def _scaling(header: Any, path: Path) -> tuple[float, float]:
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if slope == 0 or np.isnan(slope):
        return 1.0, 0.0
    if not np.isfinite((slope, intercept)).all():
        raise ValueError(f"scl_slope and scl_inter must be finite, got {slope} and {intercept} in {path}")
    return slope, intercept


def _affine(header: Any, shape: tuple[int, int, int], path: Path, quirks: list[str]) -> Array:
    """Index -> RAS+ mm: the sform if its code is set, else the qform, else the voxel sizes alone."""
    unit = int(header["xyzt_units"]) & 7
    if unit not in _MM:
        quirks.append(f"unit of length has the unknown code {unit}; millimetres taken")
    scale = _MM.get(unit, 1.0)
    if scale != 1:
        quirks.append(f"lengths are stored in {'metres' if unit == 1 else 'micrometres'}; converted to mm")
    steps = np.array(header["pixdim"][1:4], np.float64)
    for axis in range(3):
        if steps[axis] == 0 and shape[axis] == 1:
            steps[axis] = 1 / scale  # the thickness of a single slice is often left out
            quirks.append(f"voxel size along the single voxel of axis {'ijk'[axis]} is missing; 1 mm taken")
    has_sform, has_qform = int(header["sform_code"]) > 0, int(header["qform_code"]) > 0
    if not has_sform and not (np.isfinite(steps).all() and (steps != 0).all()):
        raise GeometryError(f"voxel sizes must be finite and not zero, got {steps.tolist()} in {path}")
    sform, qform = np.eye(4), np.diag([*np.abs(steps), 1.0])
    sform[:3] = [header[name] for name in ("srow_x", "srow_y", "srow_z")]
    if has_qform:
        qform = _qform(header, np.abs(steps))
        if (steps < 0).any() and not has_sform:
            quirks.append("voxel sizes are negative; their absolute values taken")
    affine = sform if has_sform else qform
    affine[:3] *= scale
    if not has_sform and not has_qform:
        quirks.append("no sform or qform: orientation and position are unknown, only the voxel sizes were used")
    elif has_sform and has_qform:
        qform[:3] *= scale
        _compare(shape, sform, qform, quirks)
    elif has_sform and not np.allclose(np.linalg.norm(affine[:3, :3], axis=0), np.abs(steps) * scale, rtol=0.01):
        quirks.append(f"voxel sizes {(steps * scale).round(4).tolist()} mm differ from those of the sform; sform used")
    return affine


def _qform(header: Any, steps: Array) -> Array:
    """The affine of the unit quaternion (a, b, c, d), the offsets and qfac, the sign of the third axis."""
    b, c, d = (float(header[f"quatern_{n}"]) for n in "bcd")
    norm = b * b + c * c + d * d
    if norm > 1 - 1e-7:  # a half turn, but for rounding: float32 does not give a better a
        a, (b, c, d) = 0.0, (v / max(norm, 1e-30) ** 0.5 for v in (b, c, d))
    else:
        a = float((1 - norm) ** 0.5)
    rotation = np.array(
        [
            [a * a + b * b - c * c - d * d, 2 * (b * c - a * d), 2 * (b * d + a * c)],
            [2 * (b * c + a * d), a * a + c * c - b * b - d * d, 2 * (c * d - a * b)],
            [2 * (b * d - a * c), 2 * (c * d + a * b), a * a + d * d - b * b - c * c],
        ]
    )
    affine = np.eye(4)
    affine[:3, :3] = rotation * steps * (1, 1, -1 if float(header["pixdim"][0]) < 0 else 1)
    affine[:3, 3] = [header[f"qoffset_{n}"] for n in "xyz"]
    return affine


def _compare(shape: tuple[int, int, int], sform: Array, qform: Array, quirks: list[str]) -> None:
    """Say so when sform and qform put a corner more than a quarter voxel apart (float32 quaternions are no better)."""
    try:
        one, other = Geometry(shape, sform), Geometry(shape, qform)
    except GeometryError:
        quirks.append("sform and qform disagree: one of them is no usable grid; sform used")
        return
    distance = one.corner_distance(other)
    if distance > 0.25 * min(one.spacing):
        quirks.append(f"sform and qform disagree by up to {distance:.3f} mm; sform used")


def _extension(header: Any, head: bytes, quirks: list[str]) -> dict[str, Any]:
    """Our own comment among the header extensions: {"medseg": {...}}."""
    size = header.template_dtype.itemsize
    if len(head) < size + 16 or head[size] == 0:
        return {}
    try:
        extensions = type(header).from_fileobj(io.BytesIO(head), header.endianness, check=False).extensions
        for extension in extensions:
            text = extension.get_content()
            text = text.encode() if isinstance(text, str) else text
            if extension.get_code() == _COMMENT and b'"medseg"' in text[:16]:
                found = json.loads(text.rstrip(b"\0 "))["medseg"]
                structures_from_json(found.get("structures", {}))
                return dict(found)
    except (HeaderDataError, ValueError, KeyError, TypeError, AttributeError) as error:
        quirks.append(f"header extensions cannot be read ({error}); left out")
    return {}


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(value: Volume | LabelMap, path: Path, *, force: bool = False) -> None:
    """Write .nii or .nii.gz: the array's own type, millimetres, sform and (where the grid is straight) qform.

    Names, colours and codes of structures (of an image: ``meta["structures"]``, one per channel after the background), and
    the modality, go into a header extension; layers (masks that may overlap, as 0 and 1, or probabilities) become
    channels, one per structure. One slab of slices is held as bytes at a time.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    ValueError
        If the structures of an image do not fit its channels, or NIfTI has no such voxel type.
    """
    extra: dict[str, Any] = {"modality": value.meta["modality"]} if value.meta.get("modality") else {}
    if isinstance(value, Volume):
        array, structures = value.array, value.meta.get("structures", ())
        if structures:
            if len(array) - len(structures) not in (0, 1):
                raise ValueError(
                    f"channels must be one per structure in meta, with or without the background, got {len(array)} "
                    f"channels for {len(structures)} structures in {path}; leave the structures out of meta"
                )
            extra["structures"] = structures_to_json(structures)
            if len(array) == len(structures):
                extra["layers"] = True
    else:
        extra["structures"] = structures_to_json(value.structures)
        array = value.array
        if value.is_layered:
            extra["layers"] = True
        else:
            array = array[None]
    widened = {"bool": np.uint8, "float16": np.float32}
    dtype = np.dtype(widened.get(array.dtype.name, array.dtype)).newbyteorder("=")
    if dtype.kind not in "iuf" or dtype.itemsize > 8:
        raise ValueError(f"voxels must be integers or floats of at most 64 bits, got {dtype} for {path}")
    header = _new_header(value.geometry, len(array), dtype, extra)
    with atomic_path(path, force) as temporary, temporary.open("wb") as raw:
        if path.name.lower().endswith(".gz"):
            # No name and no time in the stream: the same voxels give the same bytes.
            with igzip.IGzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as stream:
                _write_to(stream, header, array, dtype)
        else:
            _write_to(raw, header, array, dtype)


def _write_to(stream: Any, header: Any, array: Array, dtype: np.dtype[Any]) -> None:
    header.write_to(stream)
    slices = max(1, (1 << 22) // (array[0, :, :, 0].size * dtype.itemsize))
    for channel in array:
        for start in range(0, channel.shape[2], slices):
            slab = channel[:, :, start : start + slices]
            stream.write(slab.astype(dtype, copy=False).tobytes(order="F"))


def _new_header(geometry: Geometry, channels: int, dtype: np.dtype[Any], extra: dict[str, Any]) -> Any:
    shape = geometry.shape if channels == 1 else (*geometry.shape, channels)
    header: Any = _Nifti1Header() if max(shape) < 1 << 15 else _Nifti2Header()
    header.set_data_dtype(dtype)
    header.set_data_shape(shape)
    header.set_sform(geometry.affine, 1)
    header.set_qform(geometry.affine, 0 if geometry.is_skewed else 1)
    header.set_xyzt_units("mm")
    header.set_slope_inter(1, 0)
    if extra:
        # Padded with spaces: nibabel pads with zeros, which a reader of the text would have to know of.
        text = json.dumps({"medseg": extra}).encode()
        header.extensions.append(Nifti1Extension(_COMMENT, text + b" " * (-(len(text) + 8) % 16)))
    return header
