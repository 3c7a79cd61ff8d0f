"""DICOM headers, fast and with bounds: only the elements that reading an image needs, up to the pixel data.

A generic parser makes an object of every element; a folder of 10,000 slices spends its time there. This one walks over
the elements, keeps those of :data:`WANTED` as bytes and decodes them when asked; everything else is skipped unread. The
same walk serves explicit and implicit VR in both byte orders, deflated files, files without preamble, and sequences to
any sane depth. The tests hold it against pydicom.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import IO, NamedTuple

from pydicom.charset import convert_encodings, decode_bytes
from pydicom.datadict import dictionary_VR, tag_for_keyword

from medseg.io.dicom_files import DicomFile
from medseg.volume import DicomError

__all__ = ["Header", "Item", "PixelElement", "read_header", "referenced_files"]

_KEYWORDS = """
SpecificCharacterSet ImageType SOPClassUID SOPInstanceUID StudyDate SeriesDate AcquisitionDate ContentDate
AcquisitionDateTime SeriesTime AcquisitionTime ContentTime Modality Manufacturer SeriesDescription ConversionType
StudyInstanceUID SeriesInstanceUID SeriesNumber AcquisitionNumber InstanceNumber ImagePositionPatient
ImageOrientationPatient FrameOfReferenceUID TemporalPositionIdentifier StackID
PatientName PatientID PatientWeight EchoTime EchoNumbers FlipAngle RepetitionTime ConvolutionKernel InversionTime
TriggerTime SliceThickness SpacingBetweenSlices DiffusionBValue
DiffusionGradientOrientation ImagerPixelSpacing NominalScannedPixelSpacing CardiacNumberOfImages
ComplexImageComponent
SamplesPerPixel PhotometricInterpretation PlanarConfiguration NumberOfFrames Rows Columns PixelSpacing BitsAllocated
BitsStored HighBit PixelRepresentation PixelPaddingValue PixelPaddingRangeLimit RescaleIntercept RescaleSlope
ModalityLUTSequence Units SUVType DecayCorrection CorrectedImage GridFrameOffsetVector DoseGridScaling DoseUnits
RadiopharmaceuticalInformationSequence RadiopharmaceuticalStartTime RadiopharmaceuticalStartDateTime
RadionuclideTotalDose RadionuclideHalfLife
SharedFunctionalGroupsSequence PerFrameFunctionalGroupsSequence PlanePositionSequence PlaneOrientationSequence
PixelMeasuresSequence PixelValueTransformationSequence FrameContentSequence MREchoSequence EffectiveEchoTime
MRImageFrameTypeSequence CTImageFrameTypeSequence PETFrameTypeSequence FrameType MRDiffusionSequence
DiffusionGradientDirectionSequence DiffusionDirectionality CardiacSynchronizationSequence
NominalCardiacTriggerDelayTime InStackPositionNumber TemporalPositionIndex FrameAcquisitionNumber
FrameAcquisitionDateTime FrameReferenceDateTime UnassignedPerFrameConvertedAttributesSequence
UnassignedSharedConvertedAttributesSequence DetectorInformationSequence PlanePositionSlideSequence
DirectoryRecordSequence ReferencedFileID DirectoryRecordType ReferencedSOPClassUIDInFile
""".split()  # noqa: SIM905  one word after the other reads better than a list of strings


def _tag(keyword: str) -> int:
    tag = tag_for_keyword(keyword)
    if tag is None:
        raise KeyError(keyword)
    return tag


WANTED = {_tag(k): (k, dictionary_VR(_tag(k)).split()[0].encode()) for k in _KEYWORDS}
_PIXELS = {0x7FE00010: "PixelData", 0x7FE00008: "FloatPixelData", 0x7FE00009: "DoubleFloatPixelData"}
_PRIVATE_GROUPS = {0x0009, 0x0029, 0x0043, 0x0065, 0x7053}
_LONG = {b"OB", b"OD", b"OF", b"OL", b"OV", b"OW", b"SQ", b"SV", b"UC", b"UN", b"UR", b"UT", b"UV"}
_SHORT = {b"AE", b"AS", b"AT", b"CS", b"DA", b"DS", b"DT", b"FD", b"FL", b"IS", b"LO", b"LT", b"PN", b"SH", b"SL",
          b"SS", b"ST", b"TM", b"UI", b"UL", b"US"}  # fmt: skip
_BINARY = {b"US": "H", b"SS": "h", b"UL": "I", b"SL": "i", b"FL": "f", b"FD": "d", b"UV": "Q", b"SV": "q"}
_ITEM, _ITEM_END, _SEQUENCE_END, _UNDEFINED = 0xFFFEE000, 0xFFFEE00D, 0xFFFEE0DD, 0xFFFFFFFF
_CHUNK, _MAX_VALUE, _MAX_DEPTH, _INFLATED = 16384, 8 << 20, 24, 64 << 20
IMPLICIT, EXPLICIT, BIG, DEFLATED, GE_PRIVATE = (
    "1.2.840.10008.1.2", "1.2.840.10008.1.2.1", "1.2.840.10008.1.2.2", "1.2.840.10008.1.2.1.99",
    "1.2.840.113619.5.2",
)  # fmt: skip


class PixelElement(NamedTuple):
    """Where the pixel data lie: keyword, VR, offset of the first byte of the value, and length (None: encapsulated)."""

    keyword: str
    vr: bytes
    offset: int
    length: int | None


class Private(NamedTuple):
    """A private element of interest: VR, place of its value, and the value itself when it is small."""

    vr: bytes
    offset: int
    length: int
    value: bytes


class Item:
    """The wanted elements of one data set, decoded on demand; empty and absent elements are the same."""

    __slots__ = ("elements", "little", "sequences")

    def __init__(self, little: bool) -> None:
        self.elements: dict[str, tuple[bytes, bytes]] = {}
        self.sequences: dict[str, list[Item]] = {}
        self.little = little

    def __contains__(self, keyword: str) -> bool:
        return bool(self.elements.get(keyword, (b"", b""))[1]) or keyword in self.sequences

    def raw(self, keyword: str) -> bytes:
        """The bytes of the value, without padding."""
        return self.elements.get(keyword, (b"", b""))[1].strip(b" \0")

    def raw_value(self, keyword: str) -> bytes:
        """The bytes of the value as they are."""
        return self.elements.get(keyword, (b"", b""))[1]

    def text(self, keyword: str, default: str = "") -> str:
        """A value as text, its padding removed; free text is decoded by the character set of the header."""
        data = self.raw(keyword)
        if not data:
            return default
        try:
            return data.decode("ascii")
        except UnicodeDecodeError:
            return data.decode("latin-1")

    def texts(self, keyword: str) -> tuple[str, ...]:
        """The values of a text element."""
        return _texts(self.raw(keyword))

    def numbers(self, keyword: str) -> tuple[float, ...]:
        """The values of a numeric element, text (DS, IS) or binary.

        Raises
        ------
        DicomError
            If they are no numbers.
        """
        vr, data = self.elements.get(keyword, (b"", b""))
        code = _BINARY.get(vr)
        if code is None:
            return _floats(keyword, data.strip(b" \0"))
        count = len(data) // struct.calcsize(code)
        return struct.unpack_from(f"{'<' if self.little else '>'}{count}{code}", data)

    def number(self, keyword: str, default: float | None = None) -> float | None:
        """The first value of a numeric element."""
        values = self.numbers(keyword)
        return values[0] if values else default

    def integer(self, keyword: str, default: int = 0) -> int:
        """The first value of a numeric element, which must be a whole number."""
        value = self.number(keyword)
        if value is None:
            return default
        if value != value or abs(value) > 2**53 or value != int(value):
            raise DicomError(f"{keyword} must be a whole number, got {value}")
        return int(value)

    def items(self, keyword: str) -> list[Item]:
        """The items of a sequence."""
        return self.sequences.get(keyword, [])


@lru_cache(4096)
def _floats(keyword: str, data: bytes) -> tuple[float, ...]:
    if not data:
        return ()
    try:
        return tuple(float(part) for part in data.replace(b"\0", b" ").split(b"\\") if part.strip())
    except ValueError:
        raise DicomError(f"{keyword} must be numbers, got {data[:40].decode('latin-1')!r}") from None


@lru_cache(4096)
def _texts(data: bytes) -> tuple[str, ...]:
    return tuple(part.strip(b" \0").decode("latin-1") for part in data.split(b"\\")) if data else ()


@dataclass(eq=False, slots=True)
class Header:
    """The header of one file: its elements, its transfer syntax, and where its pixel data lie."""

    file: DicomFile
    syntax: str
    item: Item
    pixels: PixelElement | None
    explicit: bool
    little: bool
    inflated: int = 0  # bytes of the stream after inflation; 0 where nothing is deflated
    private: dict[tuple[int, int], Private] = field(default_factory=dict)
    creators: dict[tuple[int, int], str] = field(default_factory=dict)

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The stream in which the offsets of this header count (inflated where the file is deflated)."""
        with self.file.open() as stream:
            if self.syntax == DEFLATED:
                yield _inflated(stream, _meta(stream, self.file)[1], self.file)
            else:
                yield stream

    def find_private(self, group: int, creator: str, element: int) -> Private | None:
        """A private element by its creator, whatever block the writer reserved for it."""
        for (g, block), name in self.creators.items():
            if g == group and name == creator:
                return self.private.get((group, block << 8 | element))
        return None

    def private_bytes(self, element: Private) -> bytes:
        """The value of a private element, read now unless it was small."""
        if len(element.value) == element.length:
            return element.value
        with self.open() as stream:
            stream.seek(element.offset)
            return stream.read(min(element.length, _MAX_VALUE))

    def private_items(self, element: Private) -> list[Item]:
        """The items of a private sequence."""
        with self.open() as stream:
            walk = _Walk(stream, self.inflated or self.file.size, self.little, self.file)
            length = _UNDEFINED if element.length < 0 else element.length
            return walk.items(element.offset, length, True, self.explicit, 1)[0]

    def label(self, keyword: str) -> str:
        """Free text, decoded by the character set that the header names."""
        data = self.item.raw(keyword)
        try:
            return data.decode("ascii")
        except UnicodeDecodeError:
            try:
                encodings = convert_encodings(list(self.item.texts("SpecificCharacterSet")))
                return str(decode_bytes(data, encodings, {0x5C}))
            except (LookupError, ValueError):
                return data.decode("latin-1")


class _Walk:
    """Reads elements one after the other through a window over the file."""

    def __init__(self, stream: IO[bytes], size: int, little: bool, file: DicomFile) -> None:
        self.stream, self.size, self.file = stream, size, file
        self.buffer, self.base = b"", 0
        self.little = little
        order = "<" if little else ">"
        self.explicit_head, self.implicit_head = struct.Struct(order + "HH2sH"), struct.Struct(order + "HHI")
        self.long = struct.Struct(order + "I")
        self.pixels: PixelElement | None = None
        self.private: dict[tuple[int, int], Private] = {}
        self.creators: dict[tuple[int, int], str] = {}

    def take(self, position: int, count: int) -> bytes:
        """``count`` bytes from ``position``."""
        start = position - self.base
        if start < 0 or start + count > len(self.buffer):
            if count > _MAX_VALUE or position + count > self.size:
                raise DicomError(f"file must hold whole elements, got one that ends beyond it in {self.file.name}")
            self.stream.seek(position)
            self.buffer, self.base, start = self.stream.read(max(count, _CHUNK)), position, 0
            if len(self.buffer) < count:
                raise DicomError(f"file must hold whole elements, got one that ends beyond it in {self.file.name}")
        return self.buffer[start : start + count]

    def elements(self, position: int, end: int | None, keep: bool, explicit: bool, depth: int) -> tuple[Item, int]:
        """The elements from ``position`` up to ``end`` (None: a delimiter), and where they end."""
        item, limit = Item(self.little), self.size if end is None else end
        while position + 8 <= limit:
            offset = position - self.base
            if offset < 0 or offset + 12 > len(self.buffer):
                self.take(position, min(12, self.size - position))
                offset = position - self.base
            if explicit:
                group, element, vr, length = self.explicit_head.unpack_from(self.buffer, offset)
            else:
                group, element, length = self.implicit_head.unpack_from(self.buffer, offset)
                vr = b""
            tag, value = group << 16 | element, position + 8
            if group == 0xFFFE:
                if tag in (_ITEM_END, _SEQUENCE_END):
                    return item, value
                raise DicomError(f"file must hold elements in order, got a stray item in {self.file.name}")
            if explicit:
                if vr in _LONG:
                    length, value = self.long.unpack(self.take(position + 8, 4))[0], position + 12
                elif vr not in _SHORT:
                    raise DicomError(f"element must have a known VR, got {vr!r} in {self.file.name}")
            if depth == 0 and tag in _PIXELS:
                self.pixels = PixelElement(_PIXELS[tag], vr, value, None if length == _UNDEFINED else length)
                return item, position
            position = self._one(item, tag, vr, value, length, keep, explicit, depth)
            if position > limit:
                raise DicomError(f"file must hold whole elements, got one that ends beyond it in {self.file.name}")
        return item, limit if end is not None else position

    def _one(
        self, item: Item, tag: int, vr: bytes, value: int, length: int, keep: bool, explicit: bool, depth: int
    ) -> int:
        """Keep or skip one element; gives where the next begins."""
        known = WANTED.get(tag) if keep else None
        group = tag >> 16
        if keep and depth == 0 and group in _PRIVATE_GROUPS:
            element = tag & 0xFFFF
            small = self.take(value, length) if length <= 512 else b""
            if element < 0x100:
                self.creators[group, element] = small.strip(b" \0").decode("latin-1")
            self.private[group, element] = Private(vr, value, -1 if length == _UNDEFINED else length, small)
        sequence = known is not None and known[1] == b"SQ"
        if length == _UNDEFINED or (sequence and vr in (b"", b"SQ", b"UN")):
            inner = explicit and vr != b"UN"  # PS3.5 6.2.2: UN of undefined length holds implicit VR
            items, after = self.items(value, length, sequence, inner, depth + 1)
            if known is not None and sequence:
                item.sequences[known[0]] = items
            return after
        if known is not None and not sequence:
            item.elements[known[0]] = (vr if vr and vr != b"UN" else known[1], self.take(value, length))
        return value + length

    def items(self, position: int, length: int, keep: bool, explicit: bool, depth: int) -> tuple[list[Item], int]:
        """The items of a sequence (or the fragments of an encapsulated value), and where it ends."""
        if depth > _MAX_DEPTH:
            raise DicomError(f"sequences must be nested at most {_MAX_DEPTH} deep, got more in {self.file.name}")
        end = self.size if length == _UNDEFINED else position + length
        if end > self.size:
            raise DicomError(f"file must hold whole elements, got one that ends beyond it in {self.file.name}")
        found: list[Item] = []
        while position + 8 <= end:
            group, element, size = self.implicit_head.unpack(self.take(position, 8))
            tag = group << 16 | element
            if tag == _SEQUENCE_END:
                return found, position + 8
            if tag != _ITEM:
                raise DicomError(f"sequence must hold items, got another element in {self.file.name}")
            position += 8
            if size == _UNDEFINED:
                one, position = self.elements(position, None, keep, explicit, depth)
            elif keep:
                if position + size > end:
                    raise DicomError(f"item must end within its sequence, got a longer one in {self.file.name}")
                one, position = self.elements(position, position + size, keep, explicit, depth)
            else:
                one, position = Item(self.little), position + size
            if keep:
                found.append(one)
        return found, end


def _meta(stream: IO[bytes], file: DicomFile) -> tuple[str, int]:
    """Transfer syntax ("" when the file does not say) and where the data set begins."""
    stream.seek(0)
    head = stream.read(_CHUNK)
    position = 132 if head[128:132] == b"DICM" else 0
    if position == 0 and head[:2] not in (b"\x02\x00", b"\x08\x00", b"\x00\x08", b"\x00\x02"):
        raise DicomError(f"file must be DICOM, got something else in {file.name}")
    syntax = ""
    while position + 8 <= len(head) and head[position : position + 2] == b"\x02\x00":
        element, vr, length = struct.unpack_from("<H2sH", head, position + 2)
        value = position + 8
        if vr in _LONG:
            if position + 12 > len(head):
                break
            length, value = struct.unpack_from("<I", head, position + 8)[0], position + 12
        elif vr not in _SHORT:  # an implicit VR meta header, against the standard but seen
            length = struct.unpack_from("<I", head, position + 4)[0]
        if element == 0x0010:
            syntax = head[value : value + length].strip(b" \0").decode("latin-1")
        position = value + length
        if position > min(file.size, 1 << 24):
            raise DicomError(f"file meta information must lie within the file, got more in {file.name}")
        if position + 8 > len(head) and position < file.size:
            stream.seek(position)
            head = head[:position].ljust(position, b"\0") + stream.read(_CHUNK)
    return syntax, position


def _inflated(stream: IO[bytes], start: int, file: DicomFile) -> IO[bytes]:
    """The data set of a deflated file, at the offsets that it would have in the file."""
    limit = _INFLATED + 64 * file.size
    stream.seek(start)
    engine = zlib.decompressobj(-zlib.MAX_WBITS)
    try:
        data = engine.decompress(stream.read(file.size), limit)
    except zlib.error as error:
        raise DicomError(f"deflated data set must be whole, got {error} in {file.name}") from None
    if engine.unconsumed_tail:
        raise DicomError(f"deflated data set must unpack to at most {limit} bytes, got more in {file.name}")
    return io.BytesIO(bytes(start) + data)


def _encoding(head: bytes, syntax: str) -> tuple[bool, bool]:
    """(explicit VR, little endian) of a data set: what the file says, unless its first element shows otherwise."""
    explicit, little = syntax not in (IMPLICIT, GE_PRIVATE), syntax != BIG
    if not syntax:
        little = head[:2] != b"\x00\x08"
    if len(head) >= 8:
        vr = head[4:6]
        explicit = (vr in _LONG or vr in _SHORT) if not syntax or explicit or vr.isalpha() else explicit
    return explicit, little


def read_header(file: DicomFile) -> Header:
    """The header of a DICOM file.

    Reads some 16 KiB of the file, whatever its size, unless wanted elements lie further on; microseconds an element.

    Raises
    ------
    DicomError
        If the file is no DICOM file, or ends in the middle of its header.
    """
    with file.open() as stream:
        syntax, start = _meta(stream, file)
        size, inflated = file.size, 0
        if syntax == DEFLATED:
            stream = _inflated(stream, start, file)
            size = inflated = len(stream.getvalue())  # type: ignore[attr-defined]
        stream.seek(start)
        explicit, little = _encoding(stream.read(8), syntax)
        walk = _Walk(stream, size, little, file)
        item, _ = walk.elements(start, size, True, explicit, 0)
    if not syntax:
        syntax = EXPLICIT if explicit and little else BIG if explicit else IMPLICIT
    return Header(file, syntax, item, walk.pixels, explicit, little, inflated, walk.private, walk.creators)


def referenced_files(file: DicomFile) -> list[tuple[str, ...]]:
    """The files that a DICOMDIR refers to, as path components below its folder."""
    records = read_header(file).item.items("DirectoryRecordSequence")
    names = [record.texts("ReferencedFileID") for record in records if record.raw("ReferencedFileID")]
    return [n for n in names if all(part not in ("", ".", "..") and "/" not in part for part in n)]
