"""Prediction and reference of one case as label maps, with the probabilities behind the prediction; each file read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from medseg.case_files import FORMATS, PROBABILITIES, Source, case_id, is_made_up
from medseg.io import is_dicom, is_mask_folder, read, read_labels
from medseg.io.dicom import object_kind
from medseg.probability_maps import labels_of, layers_of, with_structures
from medseg.volume import LabelMap, Volume

__all__ = ["CasePair", "read_case"]

ROUNDING = 1e-6  # by which stored probabilities may leave 0..1


@dataclass(frozen=True)
class CasePair:
    """What is compared in one case.

    Attributes
    ----------
    prediction, reference : LabelMap
    probabilities : LabelMap or None
        Behind the prediction, one float layer per structure, where there are any apart from the prediction itself.
    note : str
        Why a file of probabilities beside the prediction is not used, "" where there is none or it is.
    """

    prediction: LabelMap
    reference: LabelMap
    probabilities: LabelMap | None = None
    note: str = ""


def read_case(
    prediction: Source,
    reference: Source,
    names: tuple[Mapping[int, str], ...] = (),
    *,
    probabilities: bool = True,
) -> CasePair:
    """Read both sides; a SEG or RTSTRUCT is put on the grid of the other side, of two such objects on that of a SEG.

    Parameters
    ----------
    prediction, reference : LabelMap or path
        The prediction may be a file of probabilities, whose largest, or those from one half, are then the label map.
    names : tuple of mapping of number to name
        What the structures may be called where a file of probabilities does not say. The first with one entry per channel
        (the background apart) counts, in the order of the numbers; before these those of the label map beside it, after
        these those of the reference, where files name them; but not those of a DICOM object, which lists but what the
        case has. Else channel n is number n.
    probabilities : bool
        Whether to read those in ``<prediction>_probabilities.nii.gz`` (or .nrrd, .mha ...) beside the prediction, too.
    """
    from_series = [_takes_a_grid(source) for source in (prediction, reference)]
    if from_series == [False, True] or (all(from_series) and _is_rtstruct(reference)):  # contours have no grid
        found = _prediction(prediction)
        true = _labels(reference, found)
    else:
        true = _labels(reference)
        found = _prediction(prediction, true if from_series[0] else None)
        names = (*names, *([] if from_series[1] else _own_names(true)))
    if isinstance(found, Volume):
        found = with_structures(found, names)
        return CasePair(labels_of(found), true, layers_of(found) if probabilities else None)
    beside = _beside(prediction) if probabilities else None
    if beside is None:
        return CasePair(found, true)
    try:
        image = read(beside)
    except (ValueError, OSError) as problem:
        return CasePair(found, true, note=str(problem))
    if not _are_probabilities(image):
        return CasePair(found, true, note=f"probabilities must be floats of 0 to 1, got others in {beside}")
    names = (*([] if from_series[0] else _own_names(found)), *names)
    return CasePair(found, true, layers_of(with_structures(image, names)))


def _own_names(labels: LabelMap) -> list[Mapping[int, str]]:
    """The names of the structures by number, where a file names any."""
    return [labels.names] if any(not is_made_up(s.name, s.number) for s in labels.structures) else []


def _takes_a_grid(source: Source) -> bool:
    return not isinstance(source, LabelMap) and is_dicom(source) and not is_mask_folder(source)


def _is_rtstruct(source: Source) -> bool:
    return not isinstance(source, LabelMap) and Path(source).is_file() and object_kind(source) == "rtstruct"


def _labels(source: Source, like: LabelMap | Volume | None = None) -> LabelMap:
    return source if isinstance(source, LabelMap) else read_labels(source, like=like)


def _prediction(source: Source, like: LabelMap | None = None) -> LabelMap | Volume:
    """The label map, or the probabilities where the file is an image of these.

    A file named as such is read once; another that turns out to be one is read twice.
    """
    if isinstance(source, LabelMap) or is_dicom(source):
        return _labels(source, like)
    if case_id(source).endswith(PROBABILITIES) and _are_probabilities(image := read(source)):
        return image
    try:
        return read_labels(source, like=like)
    except ValueError:
        if not Path(source).is_file() or not _are_probabilities(image := read(source)):
            raise
        return image


def _are_probabilities(image: Volume) -> bool:
    is_float = image.array.dtype.kind == "f"
    return is_float and bool(image.array.min() > -ROUNDING and image.array.max() < 1 + ROUNDING)


def _beside(prediction: Source) -> Path | None:
    """The file of the probabilities of a label map, a SEG, an RTSTRUCT or a folder of masks."""
    if isinstance(prediction, LabelMap):
        return None
    path = Path(prediction).absolute()
    suffixes = (suffix for alike in FORMATS for suffix in alike)
    found = (path.with_name(f"{case_id(path)}{PROBABILITIES}{suffix}") for suffix in suffixes)
    return next((p for p in found if p.is_file()), None)
