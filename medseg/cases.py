"""What a data set is made of: cases, and what is declared about all of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["SUFFIXES", "Case", "Dataset", "some", "stem"]

SUFFIXES = (".nii.gz", ".nii", ".nrrd", ".nhdr", ".mha", ".mhd", ".png", ".tif", ".tiff", ".jpg", ".jpeg", ".bmp")


@dataclass(frozen=True)
class Case:
    """One subject of a data set.

    Parameters
    ----------
    id : str
        Unique in the data set; fit for a file name.
    images : tuple of Path or None
        One file per channel, in the order of the channels, None for a channel that this case lacks (never all); or one
        file (or DICOM folder) that holds them all.
    label : Path or None
        The reference label map: a file, a DICOM-SEG or RTSTRUCT, or a folder of masks ``<number>_<name>.nii.gz``; None
        where there is none.
    group : str
        Cases of one group (patient) stay together when the set is split; the id where nothing is known.
    unknown : tuple of int
        Labels that nobody drew in this case: where the label file does not hold them they are unknown, not absent.
    """

    id: str
    images: tuple[Path | None, ...]
    label: Path | None
    group: str
    unknown: tuple[int, ...] = ()


@dataclass(frozen=True)
class Dataset:
    """Cases sorted by id, with what the data set declares about them.

    Parameters
    ----------
    name : str
        Its own name, else the name of the folder or CSV.
    root : Path
        The folder that holds it.
    cases : tuple of Case
        Sorted by id.
    channels : tuple of str
        Names of the image channels ("CT", "FLAIR", ...), "image" where nothing is declared.
    labels : mapping of int to str, or None
        Declared labels by number, without the background and the label to be ignored; None where nothing is declared.
    regions : mapping of str to tuple of int
        Structures that are unions of labels, which may share labels; empty where each label is a structure.
    ignore : int or None
        Label of voxels that do not count.
    """

    name: str
    root: Path
    cases: tuple[Case, ...]
    channels: tuple[str, ...] = ("image",)
    labels: Mapping[int, str] | None = None
    regions: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    ignore: int | None = None


def stem(name: str) -> str:
    """A file name without its image suffix (".nii.gz" counts as one)."""
    lower = name.lower()
    return next((name[: -len(s)] for s in (*SUFFIXES, ".dcm") if lower.endswith(s)), name)


def some(names: Sequence[str], most: int = 5) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
