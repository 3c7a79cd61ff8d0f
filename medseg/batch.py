"""Prediction of many inputs: files, folders of files, DICOM series; one set of outputs for each."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path

from medseg.crf import CRFParameters
from medseg.data import stem
from medseg.inference import Predictor, load_image
from medseg.io import is_dicom, supported_suffix, write
from medseg.io.files import require_free

__all__ = ["Input", "find_inputs", "predict_files"]

SUFFIXES = {"nifti": ".nii.gz", "nrrd": ".nrrd", "seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
CHANNEL = re.compile(r"(.+)_(\d{4})")


@dataclass(frozen=True)
class Input:
    """One image to predict: a name for the outputs and the paths of its channels (or of the DICOM series)."""

    name: str
    paths: tuple[Path, ...]

    @property
    def dicom(self) -> bool:
        """Whether the image is a DICOM series, onto which SEG and RTSTRUCT can be written."""
        return is_dicom(self.paths[0])


def find_inputs(paths: Sequence[str | PathLike[str]], channels: int) -> list[Input]:
    """The images that paths name: a file is one image; a folder is a DICOM series or holds image files.

    Files ``name_0000``, ``name_0001`` ... are the channels of one image where the model takes several.

    Raises
    ------
    FileNotFoundError
        If a path does not exist or a folder holds no image.
    ValueError
        If two inputs share one name.
    """
    found: list[Input] = []
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"input must exist, got {path}; check the name")
        files = sorted(p for p in path.iterdir() if supported_suffix(p)) if path.is_dir() else []
        if files:
            grouped: dict[str, list[Path]] = defaultdict(list)
            for file in files:
                match = CHANNEL.fullmatch(stem(file.name))
                grouped[match[1] if match and channels > 1 else stem(file.name)].append(file)
            found += [Input(name, tuple(group)) for name, group in grouped.items()]
        elif path.is_dir() and not any(p.is_file() for p in path.rglob("*")):
            raise FileNotFoundError(f"input folder must hold images, got no file in {path}")
        else:
            found.append(Input(stem(path.name) if path.is_file() else path.resolve().name, (path,)))
    names = [one.name for one in found]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"inputs must have distinct names, got {name} twice; predict them into different folders")
    return found


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    out: str | PathLike[str],
    *,
    to: Sequence[str] = ("nifti",),
    probabilities: bool = False,
    crf: CRFParameters | None = None,
    force: bool = False,
    done: Callable[[Input, list[Path]], None] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, list[Path]]:
    """Predict each input and write its label map (and probabilities) into a folder.

    Parameters
    ----------
    to : sequence of str
        Formats: "nifti", "nrrd", "seg", "rtstruct"; the last two need a DICOM series as input.
    crf : CRFParameters, optional
        Refine the probabilities before the decision.
    done : callable, optional
        Called after each input with what was written.

    Returns
    -------
    dict
        Files by name of the input.

    Raises
    ------
    FileExistsError
        If an output exists and ``force`` is not set; looked at before anything is predicted.
    ValueError
        If a format is unknown or does not fit the input.
    """
    out = Path(out)
    for kind in to:
        if kind not in SUFFIXES:
            raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, got {kind!r}")
        for one in inputs:
            require_free(out / f"{one.name}{SUFFIXES[kind]}", force)
            if kind in ("seg", "rtstruct") and not one.dicom:
                raise ValueError(f"input must be a DICOM series for --to {kind}, got {one.paths[0]}; use --to nifti")
    written: dict[str, list[Path]] = {}
    for one in inputs:
        labels, soft = predictor.predict(load_image(one.paths), probabilities=probabilities, crf=crf, progress=progress)
        files = []
        for kind in to:
            path = out / f"{one.name}{SUFFIXES[kind]}"
            write(labels, path, source=one.paths[0] if one.dicom else None, force=force)
            files.append(path)
        if soft is not None:
            path = out / f"{one.name}_probabilities.nii.gz"
            write(soft, path, force=force)
            files.append(path)
        written[one.name] = files
        if done:
            done(one, files)
    return written
