"""Voxels of a stack of frames: stored values to values, into one array that is allocated once.

The array is laid out so that each frame of an uncompressed file is read straight into its place; integers stay integers
(int16 where they fit) unless a slope makes fractions of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.io.dicom_decode import decode_frame, split_frames
from medseg.io.dicom_frames import Frame
from medseg.io.dicom_header import BIG, DEFLATED, EXPLICIT, GE_PRIVATE, IMPLICIT, Header
from medseg.io.dicom_workers import Task, decode_parallel, worker_count
from medseg.volume import DicomError

__all__ = ["Voxels", "read_voxels", "same_pixels", "stored_frames"]

Array = NDArray[Any]
_NATIVE = {IMPLICIT, EXPLICIT, BIG, DEFLATED, GE_PRIVATE}
_FLOATS = {"FloatPixelData": "f4", "DoubleFloatPixelData": "f8"}


@dataclass(frozen=True)
class Voxels:
    """What was read: (C, I, J, K) values, how many voxels hold the padding value, that value, and sentences."""

    array: Array
    padding: float | None = None
    padded: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Layout:
    """How the stored values of one file are laid out."""

    rows: int
    columns: int
    samples: int
    planar: int
    allocated: int
    stored: int
    high: int
    signed: bool
    count: int
    photometric: str
    keyword: str

    @property
    def frame_bytes(self) -> int:
        return self.rows * self.columns * self.samples * self.allocated // 8

    @property
    def dtype(self) -> str:
        return _FLOATS.get(self.keyword) or f"{'i' if self.signed else 'u'}{self.allocated // 8}"


def _layout(header: Header) -> _Layout:
    item, name = header.item, header.file.name
    if header.pixels is None:
        raise DicomError(f"image must have pixel data, got none in {name}")
    allocated = item.integer("BitsAllocated")
    stored = item.integer("BitsStored", allocated)
    samples = item.integer("SamplesPerPixel", 1)
    floating = {"FloatPixelData": 32, "DoubleFloatPixelData": 64}.get(header.pixels.keyword)
    if floating:
        allocated, stored = floating, floating
    if allocated not in (8, 16, 32, 64) or not 0 < stored <= allocated or samples not in (1, 3):
        raise DicomError(
            f"image must have 8, 16, 32 or 64 bits and 1 or 3 samples, got {allocated} bits ({stored} stored) and "
            f"{samples} samples in {name}"
        )
    return _Layout(
        item.integer("Rows"), item.integer("Columns"), samples, item.integer("PlanarConfiguration"), allocated, stored,
        item.integer("HighBit", stored - 1), item.integer("PixelRepresentation") == 1,
        item.integer("NumberOfFrames", 1), item.text("PhotometricInterpretation", "MONOCHROME2"),
        header.pixels.keyword,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------------------
# Stored values


def stored_frames(header: Header, wanted: Sequence[int]) -> Iterator[Array]:
    """The frames of these numbers (ascending) as stored values: (rows, columns) or, in colour, (rows, columns, 3) RGB.

    Bits beyond BitsStored are masked and signs extended. Memory: one frame, and all compressed bytes of the file.

    Raises
    ------
    DicomError
        If the pixel data are shorter than the header says, or damaged.
    """
    layout = _layout(header)
    require_whole(header, layout, max(wanted, default=0) + 1)
    decoded = _native(header, layout, wanted) if _is_native(header) else _compressed(header, layout, wanted)
    for array in decoded:
        yield _masked(array, layout)


def _is_native(header: Header) -> bool:
    return header.syntax in _NATIVE and header.pixels is not None and header.pixels.length is not None


def require_whole(header: Header, layout: _Layout, count: int) -> None:
    """Raise unless the file holds the pixel data of ``count`` frames that its header promises."""
    if header.pixels is None or not _is_native(header):
        return
    needed = count * layout.frame_bytes
    if layout.photometric == "YBR_FULL_422":
        needed = needed * 2 // 3
    available = min(header.pixels.length or 0, (header.inflated or header.file.size) - header.pixels.offset)
    if needed > available:
        raise DicomError(f"pixel data must hold {needed} bytes, got {available} in {header.file.name} (truncated?)")


def _order(header: Header) -> str:
    return ">" if header.syntax in (BIG, GE_PRIVATE) else "<"


def _native(header: Header, layout: _Layout, wanted: Sequence[int]) -> Iterator[Array]:
    pixels, name = header.pixels, header.file.name
    if pixels is None:
        raise DicomError(f"image must have pixel data, got none in {name}")
    dtype = np.dtype(_order(header) + layout.dtype)
    # PS3.5 8.1.2: big endian 8-bit values in OW words come with the two bytes of each word swapped.
    swapped = layout.allocated == 8 and header.syntax == BIG and pixels.vr == b"OW"
    with header.open() as stream:
        for number in wanted:
            if layout.photometric == "YBR_FULL_422":
                yield _subsampled(stream.seek, stream.read, pixels.offset, layout, number)
                continue
            stream.seek(pixels.offset + number * layout.frame_bytes)
            data = bytearray(layout.frame_bytes + layout.frame_bytes % 2 * swapped)
            _fill(stream, memoryview(data), name)
            array = np.frombuffer(data, dtype)
            if swapped:
                array = array.reshape(-1, 2)[:, ::-1].reshape(-1)[: layout.frame_bytes]
            array = array.astype(dtype.newbyteorder("="), copy=False)
            if layout.samples == 1:
                yield array.reshape(layout.rows, layout.columns)
                continue
            if layout.planar == 1:
                array = np.moveaxis(array.reshape(layout.samples, layout.rows, layout.columns), 0, -1)
            array = array.reshape(layout.rows, layout.columns, layout.samples)
            yield _rgb(array) if layout.photometric == "YBR_FULL" else array


def _fill(stream: Any, view: memoryview, name: str) -> None:
    """Read exactly as many bytes as the view holds."""
    done = 0
    while done < len(view):
        got = stream.readinto(view[done:])
        if not got:
            raise DicomError(f"pixel data must be whole, got {done} of {len(view)} bytes in {name}")
        done += got


def _subsampled(seek: Any, read: Any, offset: int, layout: _Layout, number: int) -> Array:
    """A YBR_FULL_422 frame: two pixels share their chrominance (Y1 Y2 Cb Cr)."""
    size = layout.rows * layout.columns * 2
    seek(offset + number * size)
    quads = np.frombuffer(read(size), np.uint8).reshape(layout.rows, layout.columns // 2, 4)
    full = np.empty((layout.rows, layout.columns // 2, 2, 3), np.uint8)
    full[..., 0], full[..., 1], full[..., 2] = quads[..., :2], quads[..., 2:3], quads[..., 3:4]
    return _rgb(full.reshape(layout.rows, layout.columns, 3))


def _rgb(array: Array) -> Array:
    """RGB of YBR_FULL values (PS3.3 C.7.6.3.1.2)."""
    y, b, r = (array[..., c].astype(np.float32) - (128 if c else 0) for c in range(3))
    rgb = np.stack([y + 1.402 * r, y - 0.344136 * b - 0.714136 * r, y + 1.772 * b], -1)
    return np.clip(np.rint(rgb), 0, 255).astype(np.uint8)


def _compressed(header: Header, layout: _Layout, wanted: Sequence[int]) -> Iterator[Array]:
    for task in _tasks(header, layout, {number: [number] for number in wanted}):
        yield decode_frame(task.frame, task.syntax, task.options, task.name)


def _tasks(header: Header, layout: _Layout, places: dict[int, list[int]]) -> Iterator[Task]:
    """What decoding these frames of a file takes; the key of each is the layout and where its values go."""
    pixels, name = header.pixels, header.file.name
    if pixels is None:
        raise DicomError(f"image must have pixel data, got none in {name}")
    with header.open() as stream:
        stream.seek(pixels.offset)
        value = stream.read(pixels.length if pixels.length is not None else -1)
    options = _decode_options(layout)
    frames = split_frames(value, layout.count, name)
    for number in sorted(places):
        yield Task((layout, places[number]), frames[number], header.syntax, options, name)


def _decode_options(layout: _Layout) -> dict[str, Any]:
    """pydicom's names for what its decoders must know."""
    options: dict[str, Any] = {
        "rows": layout.rows,
        "columns": layout.columns,
        "samples_per_pixel": layout.samples,
        "bits_allocated": layout.allocated,
        "bits_stored": layout.stored,
        "pixel_representation": int(layout.signed),
        "photometric_interpretation": layout.photometric,
        "pixel_keyword": layout.keyword,
    }
    if layout.samples > 1:
        options["planar_configuration"] = layout.planar
    return options


def _masked(array: Array, layout: _Layout) -> Array:
    """Stored values without what lies beyond BitsStored (overlays, garbage), the sign extended."""
    shift = layout.high + 1 - layout.stored
    if layout.keyword in _FLOATS or (layout.stored == layout.allocated and shift == 0):
        return array
    if shift < 0 or layout.high >= layout.allocated:
        raise DicomError(f"HighBit must lie within the bits allocated, got {layout.high} of {layout.allocated}")
    low, high = (
        (-(1 << layout.stored - 1), (1 << layout.stored - 1) - 1) if layout.signed else (0, (1 << layout.stored) - 1)
    )
    if shift == 0 and int(array.min()) >= low and int(array.max()) <= high:
        return array
    up = layout.allocated - 1 - layout.high
    kind = np.dtype(f"{'i' if layout.signed else 'u'}{layout.allocated // 8}")
    return np.right_shift(np.left_shift(array.astype(kind), up), layout.allocated - layout.stored)


def same_pixels(first: Frame, second: Frame) -> bool:
    """Whether two frames hold the same values."""
    if (first.slope, first.intercept, first.shape) != (second.slope, second.intercept, second.shape):
        return False
    a, b = (_cut(next(stored_frames(f.header, [f.index])), f) for f in (first, second))
    return bool(np.array_equal(a, b))


def _cut(array: Array, frame: Frame) -> Array:
    """The tile of a mosaic."""
    if frame.tile is None:
        return array
    row, column = frame.tile
    return array[row : row + frame.shape[1], column : column + frame.shape[0]]


# ---------------------------------------------------------------------------------------------------------------------
# Values


def read_voxels(frames: Sequence[Frame], factors: Sequence[float] | None = None) -> Voxels:
    """The values of a stack, (C, I, J, K) in memory order K, J, I, C.

    Integers stay integers as long as every slope and intercept is a whole number; otherwise float32. Peak memory is the
    array and one frame (compressed files: also the bytes of one file).

    Parameters
    ----------
    frames : sequence of Frame
        Sorted along k, all of one shape.
    factors : sequence of float, optional
        One more factor per frame (SUV).

    Raises
    ------
    DicomError
        If pixel data are missing, damaged or too short.
    """
    layouts = {id(f.header): _layout(f.header) for f in frames}
    for f in frames:
        require_whole(f.header, layouts[id(f.header)], f.index + 1)
    direct = None if factors else _direct(frames, layouts)
    return direct or _general(frames, layouts, factors)


def _padding(header: Header, layout: _Layout) -> tuple[int, int] | None:
    """The range of stored values that mean "no image here"."""
    bits, signed = layout.allocated, layout.signed

    def value(keyword: str) -> int | None:
        raw = header.item.raw_value(keyword)
        number = int.from_bytes(raw[:2], "little" if header.little else "big") if len(raw) >= 2 else None
        return number - (1 << 16) if number is not None and signed and bits == 16 and number >> 15 else number

    first = value("PixelPaddingValue")
    if first is None:
        return None
    last = value("PixelPaddingRangeLimit")
    last = first if last is None else last
    return min(first, last), max(first, last)


def _direct(frames: Sequence[Frame], layouts: dict[int, _Layout]) -> Voxels | None:
    """Uncompressed 16-bit frames with whole intercepts, read in place; None where that does not do."""
    one = layouts[id(frames[0].header)]
    for f in frames:
        layout = layouts[id(f.header)]
        same = (layout.allocated, layout.samples, layout.rows, layout.columns, layout.signed) == (
            16, 1, one.rows, one.columns, one.signed,
        )  # fmt: skip
        if not same or not _is_native(f.header) or f.tile or f.slope != 1 or f.intercept != int(f.intercept):
            return None
        if layout.high != layout.stored - 1 or abs(f.intercept) > 32768:
            return None
    dest = np.empty((len(frames), one.rows, one.columns), np.int16 if one.signed else np.uint16)
    padded, padding = 0, _padding(frames[0].header, one)
    low, high = 1 << 20, -(1 << 20)
    for k, f in enumerate(frames):
        layout, plane = layouts[id(f.header)], dest[k]
        with f.header.open() as stream:
            stream.seek(f.header.pixels.offset + f.index * one.frame_bytes)  # type: ignore[union-attr]
            _fill(stream, memoryview(plane).cast("B"), f.header.file.name)
        if _order(f.header) == ">":
            plane.byteswap(inplace=True)
        if layout.stored < 16:
            masked = _masked(plane, layout)
            if masked is not plane:
                plane[...] = masked
        if padding is not None:
            padded += int(np.count_nonzero((plane >= padding[0]) & (plane <= padding[1])))
        low, high = min(low, int(plane.min()) + int(f.intercept)), max(high, int(plane.max()) + int(f.intercept))
        if low < -32768 or high > (32767 if low < 0 or one.signed else 65535):
            return None
        if f.intercept:
            # Wraps around in 16 bits, which is exact because the result is known to fit.
            words = plane.view(np.uint16)
            np.add(words, np.uint16(int(f.intercept) % 65536), out=words)
    if high <= 32767:
        dest = dest.view(np.int16)
    elif one.signed:
        return None
    value = None if padding is None else float(padding[0] + frames[0].intercept)
    return Voxels(dest.transpose(2, 1, 0)[None], value, padded)


def _general(frames: Sequence[Frame], layouts: dict[int, _Layout], factors: Sequence[float] | None) -> Voxels:
    whole = factors is None and all(
        f.slope == int(f.slope) and f.intercept == int(f.intercept) and layouts[id(f.header)].keyword not in _FLOATS
        for f in frames
    )
    one = layouts[id(frames[0].header)]
    samples = one.samples
    if any(layout.samples != samples for layout in layouts.values()):
        raise DicomError("images of a series must be all grey or all in colour, got both")
    columns, rows = frames[0].shape
    kind: Any = (np.uint8 if one.allocated == 8 else np.int16) if whole else np.float32
    if one.keyword == "DoubleFloatPixelData":
        kind = np.float64
    dest = np.empty((len(frames), rows, columns, samples), kind)
    padded, padding = 0, _padding(frames[0].header, one) if samples == 1 else None
    for k, array in _in_file_order(frames):
        f = frames[k]
        if padding is not None:
            padded += int(np.count_nonzero((array >= padding[0]) & (array <= padding[1])))
        factor = factors[k] if factors is not None else 1.0
        plane = array.reshape(rows, columns, samples)
        if whole:
            values, dest = _whole(plane, int(f.slope), int(f.intercept), dest)
        else:
            values = plane * (f.slope * factor) + f.intercept * factor
        dest[k] = values
    value = None if padding is None else padding[0] * frames[0].slope + frames[0].intercept
    return Voxels(dest.transpose(3, 2, 1, 0), value, padded)


def _in_file_order(frames: Sequence[Frame]) -> Iterator[tuple[int, Array]]:
    """(k, stored values) of every frame, each file opened and each picture decoded once."""
    files: dict[int, dict[int, list[int]]] = {}
    for k, f in enumerate(frames):
        files.setdefault(id(f.header), {}).setdefault(f.index, []).append(k)
    headers = {id(f.header): f.header for f in frames}
    packed = {key: _layout(header) for key, header in headers.items() if not _is_native(header)}
    size = sum(layout.rows * layout.columns * len(files[key]) for key, layout in packed.items())
    tasks = (task for key, layout in packed.items() for task in _tasks(headers[key], layout, files[key]))
    for (layout, places), array in decode_parallel(tasks, worker_count(size)):
        for k in places:
            yield k, _cut(_masked(array, layout), frames[k])
    for key in headers.keys() - packed.keys():
        numbers = sorted(files[key])
        for number, array in zip(numbers, stored_frames(headers[key], numbers), strict=True):
            for k in files[key][number]:
                yield k, _cut(array, frames[k])


def _whole(plane: Array, slope: int, intercept: int, dest: Array) -> tuple[Array, Array]:
    """Whole values of a plane, and the destination in a type that holds them (widened when they outgrow it)."""
    values = plane if slope == 1 and intercept == 0 else plane.astype(np.int64) * slope + intercept
    low, high = int(values.min()), int(values.max())
    for kind in (dest.dtype, np.dtype(np.int16), np.dtype(np.int32), np.dtype(np.float64)):
        if kind.kind == "f" or (
            np.iinfo(kind).min <= low and high <= np.iinfo(kind).max and np.can_cast(dest.dtype, kind)
        ):
            return values, dest.astype(kind, copy=False)
    return values, dest
