"""What is in a folder: headers read in parallel, frames grouped, volumes named."""

from __future__ import annotations

import os
import re
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from medseg.io.dicom_files import DicomFile, open_folder
from medseg.io.dicom_frames import Frame
from medseg.io.dicom_grid import grid_of, picture_grid
from medseg.io.dicom_group import Stack, group
from medseg.io.dicom_header import Header, read_header, referenced_files
from medseg.io.dicom_objects import frames_of, object_kind_of
from medseg.io.dicom_pixels import same_pixels
from medseg.io.info import VolumeInfo
from medseg.volume import DicomError

__all__ = ["Scan", "info_of", "kind_of_file", "safe_name", "scan", "select"]

PathLike = str | os.PathLike[str]
_CHUNK = 64  # files a task: enough that threads wait for disks, not for each other
_THREADS = 8
_SHOWN = 8


@dataclass(frozen=True)
class Scan:
    """The volumes of a folder, and sentences on what was left out."""

    path: Path
    stacks: list[Stack]
    notes: list[str]


def kind_of_file(path: PathLike) -> str:
    """What one DICOM file holds: "image", "seg", "rtstruct" or "other" (not DICOM included)."""
    path = Path(path)
    try:
        return object_kind_of(read_header(DicomFile(path, path.stat().st_size)))
    except (DicomError, OSError):
        return "other"


def scan(path: PathLike, show_patient: bool = False) -> Scan:
    """Find the volumes in a folder (with its subfolders), file, zip or DICOMDIR.

    Names begin with the patient's id and name with ``show_patient``. Reads the headers only, some 16 KiB a file, several
    files at a time; pixel data are read where only they can tell a duplicate from a second time point. Memory: about
    6 KiB a file.

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    DicomError
        If it holds no DICOM image, or the one file given is not readable.
    """
    folder = open_folder(path, referenced_files)
    chunks = [folder.files[k : k + _CHUNK] for k in range(0, len(folder.files), _CHUNK)]
    with ThreadPoolExecutor(min(_THREADS, max(1, len(chunks)))) as pool:
        results = [r for chunk in pool.map(_read_chunk, chunks) for r in chunk]
    frames = [f for r in results if isinstance(r, list) for f in r]
    problems = [r for r in results if isinstance(r, str)]
    if not frames:
        reason = problems[0] if len(problems) == 1 and len(folder.files) == 1 else f"{len(folder.files)} other files"
        raise DicomError(f"input must hold DICOM images, got {reason} in {Path(path).name}")
    stacks = group(frames, same_pixels)
    _name(stacks, show_patient)
    notes = [*folder.notes]
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        notes.append(f"{len(problems)} files skipped: {'; '.join(problems[:_SHOWN])}{more}")
    return Scan(Path(path), stacks, notes)


def _read_chunk(files: Sequence[DicomFile]) -> list[list[Frame] | str | None]:
    """The frames of each file, or why it was skipped; None for a DICOMDIR, which belongs there."""
    found: list[list[Frame] | str | None] = []
    for file in files:
        try:
            header = read_header(file)
            kind = object_kind_of(header)
            if kind == "image":
                found.append(frames_of(header))
            else:
                found.append(None if _is_directory(header) else f"{file.name} ({_what(header, kind)})")
        except DicomError as error:
            found.append(str(error) if file.name in str(error) else f"{error} in {file.name}")
    return found


def _is_directory(header: Header) -> bool:
    return "DirectoryRecordSequence" in header.item or header.file.name.upper() == "DICOMDIR"


def _what(header: Header, kind: str) -> str:
    modality = re.sub(r"[^A-Z]", "", header.item.text("Modality"))[:16]
    return {"seg": "a SEG object", "rtstruct": "an RTSTRUCT"}.get(kind) or (
        f"{modality} without pixels" if modality else "no image"
    )


# ---------------------------------------------------------------------------------------------------------------------
# Names


def safe_name(text: str) -> str:
    """Text as part of a file name: letters, digits and ``. + -``, at most 64 characters."""
    return re.sub(r"_+", "_", re.sub(r"[^A-Za-z0-9.+-]", "_", text)).strip("_.")[:64]


def _name(stacks: list[Stack], show_patient: bool) -> None:
    """Names: ``<series number>_<description>[_e<echo>][_<type>][_<plane>][_t<time>]``, made unique."""
    width = {s.family: len(str(max(o.time for o in stacks if o.family == s.family))) for s in _first_of_family(stacks)}
    for s in stacks:
        header = s.frames[0].header
        number = header.item.number("SeriesNumber")
        description = safe_name(header.label("SeriesDescription")) or safe_name(header.item.text("Modality"))
        parts = [safe_name(header.label(k)) for k in ("PatientID", "PatientName")] if show_patient else []
        parts += [f"{int(number)}" if number is not None and abs(number) < 1e12 else "", description]
        parts += [safe_name(s.parts.get(k, "")) for k in ("echo", "type", "plane")]
        parts += [f"t{s.time:0{width[s.family]}d}"] if s.time else []
        s.name = "_".join(p for p in parts if p) or "image"
    total = Counter(s.name for s in stacks)
    used: Counter[str] = Counter()
    taken = {name for name, n in total.items() if n == 1}
    for s in stacks:
        base = s.name
        while total[base] > 1 or s.name in taken - {base}:
            used[base] += 1
            s.name = f"{base}_{used[base]}"
            if s.name not in taken:
                break
        taken.add(s.name)


def _first_of_family(stacks: list[Stack]) -> list[Stack]:
    return list({s.family: s for s in stacks}.values())


def select(found: Scan, series: str | None) -> list[Stack]:
    """The stacks that ``series`` names: a name that ``medseg info`` shows, a SeriesInstanceUID (or its end), or a number.

    Raises
    ------
    DicomError
        If it names none.
    """
    if series is None:
        return found.stacks
    wanted = str(series).strip()

    def uid(s: Stack) -> str:
        return s.frames[0].header.item.text("SeriesInstanceUID")

    def number(s: Stack) -> str:
        value = s.frames[0].header.item.number("SeriesNumber")
        return "" if value is None else f"{value:g}"

    tests = (
        lambda s: s.name == wanted,
        lambda s: uid(s) == wanted,
        lambda s: number(s) == wanted,
        lambda s: len(wanted) >= 4 and uid(s).endswith(wanted),
    )
    for test in tests:
        chosen = [s for s in found.stacks if test(s)]
        if chosen:
            return chosen
    raise DicomError(f"--series must name one of {listing(found.stacks)}, got another in {found.path.name}")


def listing(stacks: Sequence[Stack]) -> str:
    """Names and shapes of stacks, for messages."""
    shown = [f"{s.name} ({' x '.join(map(str, _shape(s)))}{'; refused' if s.problem else ''})" for s in stacks[:20]]
    return ", ".join(shown) + (f" and {len(stacks) - 20} more" if len(stacks) > 20 else "")


def _shape(stack: Stack) -> tuple[int, ...]:
    return stack.geometry.shape if stack.geometry else (*stack.frames[0].shape, len(stack.frames))


def info_of(stack: Stack) -> VolumeInfo:
    """What is known of a stack without its voxels."""
    header = stack.frames[0].header
    item, geometry = header.item, stack.geometry
    channels = item.integer("SamplesPerPixel", 1)
    shape: tuple[int, ...] = geometry.shape if geometry else ()
    paths = {f.header.file.path for f in stack.frames}
    path = paths.pop() if len(paths) == 1 else header.file.path.parent
    problem = [f"refused: {stack.problem}"] if stack.problem else []
    return VolumeInfo(
        str(path),
        item.text("SeriesInstanceUID"),
        header.label("SeriesDescription"),
        item.text("Modality"),
        (channels, *shape) if channels > 1 and shape else shape,
        geometry.spacing if geometry else (float("nan"),) * 3,
        geometry.affine.tolist() if geometry else [],
        (*problem, *stack.quirks, *stack.facts),
        stack.name,
    )


def as_slices(stack: Stack) -> list[Stack]:
    """Each frame of a stack that is no volume as a stack of its own."""
    width, slices = len(str(len(stack.frames))), []
    for number, f in enumerate(stack.frames, 1):
        placed = f.position is not None and f.axes is not None
        geometry, quirks = grid_of([f]) if placed else (picture_grid(f), ["no position in the patient"])
        name = f"{stack.name}_s{number:0{width}d}"
        slice_of = replace(stack, frames=[f], geometry=geometry, problem="", name=name, family=id(f))
        slice_of.quirks = [*stack.quirks, *quirks]
        slice_of.facts = [f"slice {number} of {len(stack.frames)}"]
        slices.append(slice_of)
    return slices


def tell(name: str, sentences: Sequence[str], stacklevel: int = 3) -> None:
    """Warn of what was decided or left out."""
    for sentence in sentences:
        warnings.warn(f"{name}: {sentence}", UserWarning, stacklevel=stacklevel)
