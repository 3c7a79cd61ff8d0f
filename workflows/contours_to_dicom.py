"""Contours of a NIfTI mask back onto the source series, as RTSTRUCT and DICOM-SEG.

python workflows/contours_to_dicom.py MASK.nii.gz DICOM_FOLDER --out OUT --names 1 liver 2 kidney_left
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import tyro
from tyro.conf import Positional

import medseg


@dataclass(frozen=True)
class Recipe:
    """Which mask, which series, where the objects go."""

    mask: Positional[Path]
    """Label map on the voxels of the series (any order of axes, as converters make it)."""
    source: Positional[Path]
    """Folder of one DICOM series."""
    out: Path = Path("contours")
    """Folder for the two objects."""
    names: dict[int, str] = field(default_factory=dict)
    """Names of the labels; common ones ("liver", "kidney_left") get SNOMED CT codes."""
    force: bool = False
    """Replace existing files."""


def main(recipe: Recipe) -> None:
    """Write both objects (each is read back and compared before it gets its name), and show that they agree."""
    labels = medseg.read_labels(recipe.mask)
    named = tuple(replace(s, name=recipe.names.get(s.number, s.name)) for s in labels.structures)
    labels = replace(labels, structures=named)
    paths = [recipe.out / f"{recipe.mask.name.split('.')[0]}{suffix}" for suffix in (".rtstruct.dcm", ".seg.dcm")]
    found = []
    for path in paths:
        medseg.write(labels, path, source=recipe.source, force=recipe.force)
        found.append(medseg.read_labels(path, like=recipe.source))
    for s in named:
        counts = [int(np.count_nonzero(f.mask(s.number))) for f in found]
        print(f"{s.number:3d} {s.name:24s} {counts[0]:9d} voxels in the RTSTRUCT, {counts[1]:9d} in the DICOM-SEG")
    print(f"written: {paths[0]}, {paths[1]}")


if __name__ == "__main__":
    main(tyro.cli(Recipe))
