"""NRRD (.nrrd, .nhdr, .seg.nrrd) and MetaImage (.mha, .mhd) files, through SimpleITK.

ITK's world is LPS+ and its arrays are (k, j, i); both are turned here, by :func:`geometry_from_itk` and
:func:`to_itk`, and nowhere else.

References
----------
NRRD: https://teem.sourceforge.net/nrrd/format.html. Segments in NRRD: 3D Slicer, "Segmentation file format",
https://slicer.readthedocs.io/en/latest/developer_guide/modules/segmentations.html.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from medseg.io.files import atomic_path
from medseg.io.info import VolumeInfo
from medseg.io.labels import exclusive_array, integer_labels
from medseg.volume import Code, Geometry, GeometryError, LabelMap, Structure, Volume, default_color, present_labels

__all__ = ["describe", "geometry_from_itk", "read_label_map", "read_volume", "to_itk", "write"]

Array = NDArray[Any]
_DEFLATE_RATIO = 1032  # no deflate stream expands more
_LONGEST_HEADER = 1 << 20


# ---------------------------------------------------------------------------------------------------------------------
# ITK's images


def geometry_from_itk(image: Any) -> Geometry:
    """The grid of a SimpleITK image, or of an ImageFileReader that has read the header (2D: K = 1; 4D: without time).

    Raises
    ------
    GeometryError
        If the first three axes are mixed with the fourth, or the grid is not usable.
    """
    size, spacing, origin = image.GetSize(), image.GetSpacing(), image.GetOrigin()
    n = len(size)
    direction = np.asarray(image.GetDirection(), float).reshape(n, n)
    if n == 4 and (np.abs(direction[:3, 3]).max() > 1e-6 or np.abs(direction[3, :3]).max() > 1e-6):
        raise GeometryError(f"axes of space must not be mixed with the fourth axis, got {direction.tolist()}")
    d = min(n, 3)
    affine = np.eye(4)
    affine[:d, :d] = direction[:d, :d] * spacing[:d]
    affine[:d, 3] = origin[:d]
    affine[:2] *= -1  # LPS to RAS
    return Geometry((*size[:d], *(1,) * (3 - d)), affine)  # type: ignore[arg-type]


def to_itk(array: Array, geometry: Geometry) -> Any:
    """A SimpleITK image of (C, I, J, K) or (I, J, K) voxels; several channels become a vector image."""
    lps = geometry.affine.copy()
    lps[:2] *= -1
    array = array[0] if array.ndim == 4 and len(array) == 1 else array
    if array.dtype == bool:
        array = array.astype(np.uint8)
    # numpy -> ITK copies, so the array may be a view; the vector axis is the last and fastest.
    image = sitk.GetImageFromArray(array.T, isVector=array.ndim == 4)
    image.SetSpacing(geometry.spacing)
    image.SetOrigin(lps[:3, 3].tolist())
    image.SetDirection((lps[:3, :3] / geometry.spacing).ravel().tolist())
    return image


# ---------------------------------------------------------------------------------------------------------------------
# Reading


def read_volume(path: str | os.PathLike[str]) -> Volume:
    """Read an image; vectors and a fourth axis become channels. Memory: twice the voxels for a moment.

    Raises
    ------
    ValueError
        If the file is damaged, claims more voxels than it can hold, or has complex voxels.
    GeometryError
        If its grid is not usable.
    """
    reader, header = _opened(path)
    return Volume(_voxels(reader, path), header.geometry, _meta(header))


def read_label_map(path: str | os.PathLike[str]) -> LabelMap:
    """Read labels; 3D Slicer's segments (names, colours, codes) where the header has them.

    Segments in several layers may overlap and become boolean layers; else the labels stay exclusive integers.

    Raises
    ------
    ValueError
        As :func:`read_volume`, and if a value is not an integer, or there are several channels without segments.
    """
    reader, header = _opened(path)
    segments = _segments(_keys(reader))
    array = _voxels(reader, path)
    labels, more = integer_labels(array, str(path))
    meta = {**_meta(header), "quirks": (*header.quirks, *more)}
    if len(labels) == 1:
        structures = tuple(s for s, _, _ in segments)
        unnamed = [n for n in present_labels(labels[0]) if n > 0 and n not in {s.number for s in structures}]
        if structures and unnamed:
            meta["quirks"] = (*meta["quirks"], f"values {unnamed} have no segment in the header")
        return LabelMap(labels[0], header.geometry, (*structures, *(Structure(n, f"label {n}") for n in unnamed)), meta)
    if not segments or max(layer for _, _, layer in segments) >= len(labels):
        raise ValueError(
            f"label map must be 3D or name its segments, got {len(labels)} channels of {header.geometry.shape} in {path}"
        )
    masks = np.stack([labels[layer] == value for _, value, layer in segments])
    numbers = [s.number for s, _, _ in segments]
    if len(set(numbers)) < len(numbers):  # values repeat from layer to layer
        numbers = list(range(1, len(numbers) + 1))
    structures = tuple(
        Structure(n, s.name, s.color, s.category, s.type, s.region)
        for n, (s, _, _) in zip(numbers, segments, strict=True)
    )
    return LabelMap(masks, header.geometry, structures, meta)


def describe(path: str | os.PathLike[str]) -> VolumeInfo:
    """What the header says; the voxels are not read."""
    return _opened(path)[1]


def _meta(header: VolumeInfo) -> dict[str, Any]:
    meta = {"path": header.path, "quirks": header.quirks}
    return meta | ({"modality": header.modality} if header.modality else {})


def _keys(reader: Any) -> dict[str, str]:
    return {key: reader.GetMetaData(key) for key in reader.GetMetaDataKeys()}


def _opened(path: str | os.PathLike[str]) -> tuple[Any, VolumeInfo]:
    """A reader that has read the header, and what the header says."""
    path = Path(path)
    fields = _fields(path)
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
    except RuntimeError as error:
        raise ValueError(f"file must be a readable image, got {_reason(error)} in {path}") from error
    size, kind = reader.GetSize(), reader.GetPixelIDValue()
    if not 2 <= len(size) <= 4:
        raise ValueError(f"image must have 2 to 4 dimensions, got {size} in {path}")
    if "complex" in sitk.GetPixelIDValueAsString(kind):
        raise ValueError(f"voxels must be real numbers, got {sitk.GetPixelIDValueAsString(kind)} in {path}")
    channels = reader.GetNumberOfComponents() * (size[3] if len(size) == 4 else 1)
    _require_room(path, fields, int(np.prod(size, dtype=object)) * reader.GetNumberOfComponents())
    try:
        geometry = geometry_from_itk(reader)
    except GeometryError as error:
        raise GeometryError(f"{error} in {path}") from error
    quirks = _quirks(fields, path)
    if geometry.is_skewed:
        quirks.append("axes of the grid are not at right angles")
    keys = _keys(reader)
    modality = keys.get("medseg_modality", "") or keys.get("Modality", "").removeprefix("MET_MOD_")
    shape = geometry.shape if channels == 1 else (channels, *geometry.shape)
    info = VolumeInfo(
        str(path),
        "",
        keys.get("NRRD_content", ""),
        "" if modality == "UNKNOWN" else modality,
        shape,
        geometry.spacing,
        geometry.affine.tolist(),
        tuple(quirks),
    )
    return reader, info


def _voxels(reader: Any, path: str | os.PathLike[str]) -> Array:
    try:
        array = sitk.GetArrayFromImage(reader.Execute())
    except (RuntimeError, MemoryError) as error:
        raise ValueError(f"file must be whole, got {_reason(error)} in {path}") from error
    vector = reader.GetNumberOfComponents() > 1
    if len(reader.GetSize()) == 2:
        array = array[None]
    if len(reader.GetSize()) == 3:
        array = np.moveaxis(array, -1, 0) if vector else array[None]
    elif vector and array.ndim == 5:
        raise ValueError(f"image must have one axis of channels at most, got {array.shape} in {path}; split it first")
    elif vector:  # 2D: (K, J, I, C)
        array = np.moveaxis(array, -1, 0)
    elif array.ndim == 3:
        array = array[None]
    return np.asarray(array.transpose(0, 3, 2, 1))


def _reason(error: Exception) -> str:
    """The last line of ITK's long messages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return repr(lines[-1][:200] if lines else type(error).__name__)


def _fields(path: Path) -> dict[str, str]:
    """The "key: value" or "key = value" lines of the header, keys in lower case."""
    with path.open("rb") as file:
        head = file.read(_LONGEST_HEADER)
    if not head.startswith(b"NRRD") and path.suffix.lower() in (".nrrd", ".nhdr"):
        raise ValueError(f"file must begin with NRRD, got {head[:4]!r} in {path}")
    pattern = re.compile(rb"([A-Za-z][A-Za-z ]*?) ?(?:: |= ?)(.*)")
    fields: dict[str, str] = {}
    for line in head.splitlines():
        if not line.strip() and head.startswith(b"NRRD"):
            break
        if match := pattern.fullmatch(line):
            fields[match[1].decode().lower()] = match[2].decode("utf-8", "replace").strip()
            if match[1] == b"ElementDataFile":
                break
    return fields


def _require_room(path: Path, fields: Mapping[str, str], voxels: int) -> None:
    """Refuse a header that claims more bytes than its data can hold, before anything is allocated."""
    detached = fields.get("data file", fields.get("datafile", fields.get("elementdatafile", "LOCAL"))) != "LOCAL"
    files = [p for p in path.parent.iterdir() if p.is_file()] if detached else [path]
    room = sum(p.stat().st_size for p in files)
    if fields.get("encoding", "raw") != "raw" or fields.get("compresseddata", "false").lower() == "true":
        room *= _DEFLATE_RATIO
    if voxels > room:
        raise ValueError(
            f"header must not claim more voxels than the file can hold, got {voxels} (at most {room} possible) in {path}; "
            "the file is damaged or truncated"
        )


def _quirks(fields: Mapping[str, str], path: Path) -> list[str]:
    spacings = fields.get("spacings", fields.get("elementspacing", fields.get("elementsize", "")))
    nrrd = "encoding" in fields
    axes = int(fields.get("dimension", "3")) if fields.get("dimension", "3").isdigit() else 3
    if re.search(r"inf", spacings, re.I) or len(re.findall("nan", spacings, re.I)) > max(0, axes - 3):
        raise GeometryError(f"voxel sizes must be finite, got {spacings} in {path}")
    if nrrd and "space directions" not in fields:
        what = "only the voxel sizes were used" if spacings else "1 mm taken as voxel size"
        return [f"no space directions: orientation and position are unknown, {what}"]
    if not nrrd and not spacings:
        return ["no voxel size in the header; 1 mm taken"]
    if nrrd and "space" not in fields:
        return ["no name of the space; left-posterior-superior taken"]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Segments, as 3D Slicer keeps them


def _segments(keys: Mapping[str, str]) -> list[tuple[Structure, int, int]]:
    """(structure, value, layer) of every Segment<n>_... entry."""
    found = []
    names = {key.lower(): text for key, text in keys.items()}
    for n in sorted(int(m[1]) for key in keys if (m := re.fullmatch(r"Segment(\d+)_ID", key, re.I))):
        entry = {
            field: names.get(f"segment{n}_{field}", "")
            for field in ("name", "color", "labelvalue", "layer", "tags", "id")
        }
        value = int(entry["labelvalue"] or n + 1)
        if value < 1:
            continue
        parts = entry["color"].split()
        color = (
            tuple(round(255 * min(1.0, max(0.0, float(c)))) for c in parts) if len(parts) == 3 else default_color(value)
        )
        category, kind, region = _terms(entry["tags"])
        structure = Structure(value, entry["name"] or entry["id"], color, category, kind, region)  # type: ignore[arg-type]
        found.append((structure, value, int(entry["layer"] or 0)))
    return found


def _terms(tags: str) -> tuple[Code | None, Code | None, Code | None]:
    """Category, type and anatomic region of a terminology entry: "context~category~type~modifier~context~region~..."."""
    match = re.search(r"TerminologyEntry:([^|]*)", tags)
    parts = match[1].split("~") if match else []
    codes: list[Code | None] = []
    for index in (1, 2, 5):
        fields = parts[index].split("^") if index < len(parts) else []
        scheme, value, meaning = [*fields, "", "", ""][:3]
        codes.append(Code(value, scheme, meaning) if value else None)
    return codes[0], codes[1], codes[2]


def _set_segments(image: Any, structures: tuple[Structure, ...], layered: bool) -> None:
    for n, s in enumerate(structures):
        fields = {
            "ID": f"Segment_{s.number}",
            "Name": s.name,
            "Color": " ".join(f"{c / 255:.6f}" for c in s.color),
            "LabelValue": str(s.number),
            "Layer": str(n if layered else 0),
        }
        if s.category or s.type or s.region:
            category, kind, region = (
                f"{c.scheme}^{c.value}^{c.meaning}" if c else "^^" for c in (s.category, s.type, s.region)
            )
            fields["Tags"] = f"TerminologyEntry:medseg~{category}~{kind}~^^~medseg~{region}~^^|"
        for key, text in fields.items():
            image.SetMetaData(f"Segment{n}_{key}", text)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def write(value: Volume | LabelMap, path: Path, *, force: bool = False) -> None:
    """Write one compressed .nrrd or .mha; labels carry their segments as 3D Slicer keeps them, in layers if they overlap.

    Memory: twice the voxels for a moment.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    ValueError
        If the name asks for header and voxels in two files, or the voxels are probabilities of overlapping structures.
    """
    if path.suffix.lower() not in (".nrrd", ".mha"):
        raise ValueError(f"image must be written to one file, got {path}; use .nrrd or .mha")
    if isinstance(value, Volume):
        array = value.array.astype(np.float32) if value.array.dtype == np.float16 else value.array
        image = to_itk(array, value.geometry)
    elif (
        value.is_layered and value.array.dtype == bool and len(value.structures) > 1 and path.suffix.lower() == ".nrrd"
    ):
        numbers = np.array([s.number for s in value.structures])
        layers = value.array * numbers.astype(np.min_scalar_type(numbers.max()))[:, None, None, None]
        image = to_itk(layers, value.geometry)
        _set_segments(image, value.structures, layered=True)
    else:
        image = to_itk(exclusive_array(value, str(path)), value.geometry)
        _set_segments(image, value.structures, layered=False)
    if value.meta.get("modality"):
        image.SetMetaData("medseg_modality", str(value.meta["modality"]))
    with atomic_path(path, force) as temporary:
        writer = sitk.ImageFileWriter()
        writer.SetFileName(str(temporary))
        writer.UseCompressionOn()
        writer.SetCompressionLevel(1)
        try:
            writer.Execute(image)
        except RuntimeError as error:
            raise OSError(f"image must be writable, got {_reason(error)} for {path}") from error
