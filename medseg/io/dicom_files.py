"""Where DICOM files come from: a folder, a single file, a zip, a DICOMDIR; nothing outside is touched.

Files are named by their base names in messages. Zips are read member by member in memory, never unpacked to disk, so no
member can escape a folder; what they unpack to is bounded beforehand by what their directory declares (zipfile never
yields more than that).
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import IO

from medseg.volume import DicomError

__all__ = ["DicomFile", "Folder", "open_folder"]

MAX_MEMBERS = 200_000
MAX_TOTAL_BYTES = 64 << 30
MAX_MEMBER_BYTES = 4 << 30
MAX_RATIO = 300  # of members above 64 MiB: images compress far less
READ_ERRORS = (OSError, EOFError, zipfile.BadZipFile, NotImplementedError, RuntimeError)  # RuntimeError: encrypted


@dataclass(frozen=True, slots=True)
class DicomFile:
    """One file, on disk or in a zip."""

    path: Path
    size: int
    member: zipfile.ZipInfo | None = field(default=None, compare=False)
    archive: zipfile.ZipFile | None = field(default=None, compare=False, repr=False)

    @property
    def name(self) -> str:
        """Base name, for messages."""
        return PurePosixPath(self.member.filename).name if self.member else self.path.name

    @contextmanager
    def open(self) -> Iterator[IO[bytes]]:
        """The bytes, seekable.

        Raises
        ------
        DicomError
            If the file or its place in the zip cannot be read.
        """
        try:
            if self.archive is not None and self.member is not None:
                with self.archive.open(self.member) as stream:
                    yield stream
            else:
                with open(self.path, "rb", buffering=0) as raw:
                    yield raw  # type: ignore[misc]
        except READ_ERRORS as error:
            raise DicomError(f"file must be readable, got {type(error).__name__} in {self.name}") from error


@dataclass(frozen=True)
class Folder:
    """What to read: the files found, and sentences on what was left out."""

    path: Path
    files: tuple[DicomFile, ...]
    notes: tuple[str, ...] = ()


def open_folder(path: str | os.PathLike[str], referenced_files: Callable[[DicomFile], list[tuple[str, ...]]]) -> Folder:
    """List the files of a folder (with its subfolders), zip or DICOMDIR, or the one file itself.

    Symbolic links that lead out of the folder are not followed. Cost: one directory walk; no file is read (except a
    DICOMDIR, by ``referenced_files``, or the directory of a zip).

    Raises
    ------
    FileNotFoundError
        If there is no such path.
    DicomError
        If a zip is damaged or unpacks to more than the bounds allow.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"input must exist, got {path}; check the name")
    if path.is_dir():
        return _walk(path)
    if path.name.upper() == "DICOMDIR":
        return _referenced(path, referenced_files(DicomFile(path, path.stat().st_size)))
    if zipfile.is_zipfile(path) and not _begins_like_dicom(path):
        return _zip(path)
    return Folder(path, (DicomFile(path, path.stat().st_size),))


def _begins_like_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _walk(root: Path) -> Folder:
    real_root, files, notes = root.resolve(), [], []
    for folder, folders, names in os.walk(root):
        folders.sort()
        for name in [n for n in folders if (Path(folder) / n).is_symlink()]:
            folders.remove(name)
            notes.append(f"linked folder {name} not followed")
        for name in sorted(names):
            entry = Path(folder) / name
            if entry.is_symlink() and not entry.resolve().is_relative_to(real_root):
                notes.append(f"link {name} leads out of the folder: not followed")
            elif entry.is_file():
                files.append(DicomFile(entry, entry.stat().st_size))
    return Folder(root, tuple(files), tuple(notes))


def _zip(path: Path) -> Folder:
    try:
        archive = zipfile.ZipFile(path)
    except READ_ERRORS as error:
        raise DicomError(f"zip must be readable, got {type(error).__name__} in {path.name}") from error
    members = [m for m in archive.infolist() if not m.is_dir() and not m.filename.startswith("__MACOSX/")]
    if len(members) > MAX_MEMBERS:
        raise DicomError(f"zip must hold at most {MAX_MEMBERS} files, got {len(members)} in {path.name}")
    total = sum(m.file_size for m in members)
    if total > MAX_TOTAL_BYTES:
        raise DicomError(f"zip must unpack to at most {MAX_TOTAL_BYTES >> 30} GiB, got {total >> 30} in {path.name}")
    for m in members:
        if m.file_size > MAX_MEMBER_BYTES or m.file_size > max(64 << 20, MAX_RATIO * m.compress_size):
            raise DicomError(
                f"zip must hold files of at most {MAX_MEMBER_BYTES >> 30} GiB and {MAX_RATIO} times their packed size, "
                f"got {m.compress_size} bytes that unpack to {m.file_size} in {path.name}"
            )
    members.sort(key=lambda m: m.filename)
    return Folder(path, tuple(DicomFile(path, m.file_size, m, archive) for m in members))


def _referenced(path: Path, wanted: list[tuple[str, ...]]) -> Folder:
    """The files that a DICOMDIR names, found whatever the case of their names."""
    root = path.parent.resolve()
    listing = {tuple(p.upper() for p in f.path.relative_to(path.parent).parts): f for f in _walk(path.parent).files}
    files, missing = [], 0
    for parts in wanted:
        found = listing.get(tuple(p.upper() for p in parts))
        if found is None or not found.path.resolve().is_relative_to(root):
            missing += 1
        else:
            files.append(found)
    notes = (f"{missing} of {len(wanted)} files named in the DICOMDIR are missing",) if missing else ()
    return Folder(path.parent, tuple(files), notes)
