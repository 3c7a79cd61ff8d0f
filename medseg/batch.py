"""Prediction of many inputs: files, folders of files, DICOM series; one set of outputs for each."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from medseg.cases import stem
from medseg.crf import CRFParameters
from medseg.inference import Predictor, load_image
from medseg.io import is_dicom, read, supported_suffix, write
from medseg.io.convert import mask_paths, write_masks
from medseg.io.files import require_free
from medseg.probability_maps import labels_of
from medseg.volume import Structure, Volume

__all__ = ["Input", "Predictions", "find_inputs", "labels_of", "predict_files"]

SUFFIXES = {"nifti": ".nii.gz", "nrrd": ".nrrd", "seg": ".seg.dcm", "rtstruct": ".rtstruct.dcm"}
PROBABILITIES = "_probabilities.nii.gz"
PICTURES = (".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp")
CHANNEL = re.compile(r"(.+)_(\d{4})")
FAILURES = (OSError, ValueError, TypeError, RuntimeError, MemoryError)  # RuntimeError: memory of the device, too


@dataclass(frozen=True)
class Input:
    """One image to predict: a name for the outputs and the paths of its channels (or of the DICOM series)."""

    name: str
    paths: tuple[Path, ...]
    series: str | None = None

    @property
    def dicom(self) -> bool:
        """Whether the image is a DICOM series, onto which SEG and RTSTRUCT can be written."""
        return is_dicom(self.paths[0])

    def read(self) -> Volume:
        """The image."""
        return read(self.paths[0], self.series) if self.series else load_image(self.paths)


@dataclass(frozen=True)
class Predictions:
    """What became of each input, by name: the files written, or why there are none."""

    written: dict[str, list[Path]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------------------------
# What is to be predicted


def find_inputs(
    paths: Sequence[str | PathLike[str]],
    channels: int,
    series: str | None = None,
    *,
    numbers: Sequence[int] | None = None,
) -> list[Input]:
    """The images that paths name: a file is one image; a folder is a DICOM series or holds image files.

    Files ``name_0000``, ``name_0001`` ... of one folder are the channels of one image where the model takes several.
    Where it takes one, the ending ``_0000`` is no part of the name if all files have it, as in nnU-Net's folders.

    Parameters
    ----------
    paths : sequence of path
        Files and folders.
    channels : int
        Number of channels that the model takes.
    series : str, optional
        Which series, where a DICOM folder holds several; as in :func:`medseg.read`.
    numbers : sequence of int, optional
        Numbers of the channels in the training, where some are missing: files may bear these instead of 0, 1, ...

    Raises
    ------
    FileNotFoundError
        If a path does not exist or a folder holds no image.
    ValueError
        If two inputs share one name, an image lacks a channel file, a folder holds DICOM and other volumes, or ``series``
        is given for an input that is not DICOM.
    """
    found: list[Input] = []
    files: dict[Path, list[Path]] = defaultdict(list)  # image files by folder
    for path in map(Path, paths):
        if not path.exists():
            raise FileNotFoundError(f"input must exist, got {path}; check the name")
        for part in _images_in(path) if path.is_dir() else [path]:
            if is_dicom(part):
                found.append(Input(part.resolve().name if part.is_dir() else stem(part.name), (part,), series))
            else:
                files[part.parent].append(part)
    for group in files.values():
        found += _grouped(group, channels, numbers)
    names = [one.name for one in found]
    for one in found:
        if names.count(one.name) > 1:
            raise ValueError(
                f"inputs must have distinct names, got {one.name} twice; predict them into different folders"
            )
        if series and not one.series:
            raise ValueError(f"series must be given for DICOM only, got {series!r} for {one.paths[0]}")
    return found


def _images_in(folder: Path) -> list[Path]:
    """The image files of a folder, or the folder itself where it holds DICOM files (pictures beside them are no input)."""
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    images = [p for p in files if p.parent == folder and supported_suffix(p)]
    dicom = next((p for p in files if is_dicom(p) and not (images and p.suffix.lower() == ".zip")), None)
    if dicom is None:
        if not images:
            raise FileNotFoundError(f"input folder must hold images, got {'none' if files else 'no file'} in {folder}")
        return images
    volumes = [p for p in images if supported_suffix(p) not in PICTURES]
    if volumes:
        raise ValueError(
            f"input folder must hold DICOM or other volumes, got {dicom.relative_to(folder)} and {volumes[0].name} in "
            f"{folder}; move one kind away"
        )
    return [folder]


def _grouped(files: Sequence[Path], channels: int, wanted: Sequence[int] | None) -> list[Input]:
    """Image files of one folder as images, channel files together."""
    matches = {file: CHANNEL.fullmatch(stem(file.name)) for file in files}
    if channels == 1:
        is_first = all(m and m[2] == "0000" for m in matches.values())
        return [Input(m[1] if is_first and (m := matches[f]) else stem(f.name), (f,)) for f in files]
    found: list[Input] = []
    groups: dict[str, dict[Path, int]] = defaultdict(dict)
    for file in files:
        if match := matches[file]:
            groups[match[1]][file] = int(match[2])
        else:
            found.append(Input(stem(file.name), (file,)))
    for name, numbers in groups.items():
        ordered = sorted(numbers, key=lambda f: numbers[f])
        if len(ordered) == 1:  # one file may hold all channels; its number is then part of its name
            found.append(Input(stem(ordered[0].name) if numbers[ordered[0]] else name, (ordered[0],)))
        elif wanted is not None and sorted(numbers.values()) == sorted(wanted):
            found.append(Input(name, tuple(sorted(numbers, key=lambda f: wanted.index(numbers[f])))))
        elif [numbers[f] for f in ordered] != list(range(channels)):
            raise ValueError(
                f"image must be one file with all channels or {channels} files _0000 to _{channels - 1:04d}, got "
                f"{', '.join(f.name for f in ordered[:5])} for {name} in {ordered[0].parent}; add or rename files"
            )
        else:
            found.append(Input(name, tuple(ordered)))
    return sorted(found, key=lambda one: one.name)


# ---------------------------------------------------------------------------------------------------------------------
# Prediction


def predict_files(
    predictor: Predictor,
    inputs: Sequence[Input],
    out: str | PathLike[str],
    *,
    to: Sequence[str] = ("nifti",),
    channels: Sequence[str] | None = None,
    probabilities: bool = False,
    split: bool = False,
    crf: CRFParameters | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Predictions:
    """Predict each input and write its label map (and probabilities) into a folder.

    An input that cannot be read or predicted does not stop the others.

    Parameters
    ----------
    to : sequence of str
        Formats: "nifti", "nrrd", "seg", "rtstruct"; the last two need a DICOM series as input.
    channels : sequence of str, optional
        Names of the channels that the inputs hold, in their order, where some of the model's are missing.
    probabilities : bool
        Whether to write ``<name>_probabilities.nii.gz``, too: float32, channel 0 the background; where structures
        overlap, one channel for each of them alone.
    split : bool
        Write one mask of each structure, ``<name>/<number>_<label>.nii.gz``, in place of one file.
    crf : CRFParameters, optional
        Refine the probabilities before the decision.
    progress : callable, optional
        Called with the number of windows done and of all windows of an input.

    Returns
    -------
    Predictions
        Files by name of the input, and reasons, which name the file, by name of the inputs that failed. Structures that
        overlap are channels of one NIfTI or NRRD file, and segments or contours of a SEG or RTSTRUCT.

    Raises
    ------
    FileExistsError
        If an output exists and ``force`` is not set.
    NotADirectoryError, PermissionError
        If outputs cannot be written there.
    ValueError
        If a format is unknown or does not fit an input, or two outputs share a name.

    All of these before anything is predicted.
    """
    out, result = Path(out), Predictions()
    structures = predictor.plan.as_structures() if split else None
    planned = {one.name: _outputs(one, out, to, probabilities, structures) for one in inputs}
    _require_writable(out, [p for outputs in planned.values() for paths in outputs.values() for p in paths], force)
    for one in inputs:
        try:
            labels, soft = predictor.predict(
                one.read(), channels=channels, probabilities=probabilities, crf=crf, progress=progress
            )
            for suffix, (path, *_) in planned[one.name].items():
                if suffix == PROBABILITIES:
                    if soft is not None:
                        write(soft, path, force=force)
                elif split and not suffix.endswith(".dcm"):
                    write_masks(labels, out / one.name, suffix, force)
                else:
                    write(labels, path, source=one.paths[0] if one.dicom else None, series=one.series, force=force)
        except FAILURES as problem:
            where = "" if str(one.paths[0]) in str(problem) else f" in {one.paths[0]}"
            result.failed[one.name] = f"{problem}{where}"
        else:
            result.written[one.name] = [path for paths in planned[one.name].values() for path in paths]
    return result


def _outputs(
    one: Input, out: Path, to: Sequence[str], probabilities: bool, split: Sequence[Structure] | None
) -> dict[str, list[Path]]:
    """The files to be written for an input, by suffix: one, or one for each structure of ``split``."""
    for kind in to:
        if kind not in SUFFIXES:
            raise ValueError(f"format must be one of {', '.join(SUFFIXES)}, got {kind!r}")
        if kind in ("seg", "rtstruct") and not one.dicom:
            raise ValueError(f"input must be a DICOM series for --to {kind}, got {one.paths[0]}; use --to nifti")
    suffixes = [*(SUFFIXES[kind] for kind in to), *([PROBABILITIES] if probabilities else [])]
    found = {suffix: [out / f"{one.name}{suffix}"] for suffix in suffixes}
    for suffix in found if split else ():
        if suffix in (SUFFIXES["nifti"], SUFFIXES["nrrd"]):  # the DICOM objects hold all structures
            found[suffix] = mask_paths(split or (), out / one.name, suffix)
    return found


def _require_writable(out: Path, outputs: Sequence[Path], force: bool) -> None:
    there = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"output must go into a folder, got the file {there}; use another --out")
    if not os.access(there, os.W_OK):
        raise PermissionError(f"output folder must be writable, got {there}; use another --out")
    for path in outputs:
        if outputs.count(path) > 1:
            raise ValueError(f"outputs must have distinct names, got {path.name} twice; rename an input")
        require_free(path, force)
