"""PET activity to standardised uptake values by body weight."""

from __future__ import annotations

import math
from collections.abc import Sequence
from datetime import datetime, timedelta

from medseg.io.dicom_frames import Frame
from medseg.io.dicom_header import Header, Item
from medseg.volume import DicomError

__all__ = ["suv_factors"]


def suv_factors(frames: Sequence[Frame]) -> list[float]:
    """What to multiply the values of each frame with to get SUV by body weight (g/ml).

    The injected dose is decayed from injection to the start of the scan, to which DecayCorrection START refers the
    values; with ADMIN the values refer to the injection itself. Files in g/ml already, and Philips files in counts with
    the maker's own factor, are taken as they are.

    Raises
    ------
    DicomError
        If it is no PET, or weight, dose, half life or times are missing.

    References
    ----------
    QIBA SUV vendor-neutral pseudo-code (RSNA QIBA FDG-PET/CT Technical Committee, 2012).
    """
    header = frames[0].header
    item = header.item
    if item.text("Modality") != "PT":
        raise DicomError(f"--suv must be used on PET, got modality {item.text('Modality')!r}")
    units = item.text("Units")
    if units == "GML" and item.text("SUVType", "BW") == "BW":
        return [1.0] * len(frames)
    if units == "CNTS":
        element = header.find_private(0x7053, "Philips PET Private Group", 0x00)
        factor = _text_number(element.value) if element is not None else 0.0
        if factor <= 0:
            raise DicomError("PET in counts must state the maker's SUV factor, got none; SUV cannot be computed")
        return [factor] * len(frames)
    if units != "BQML":
        raise DicomError(f"PET must be in BQML, GML or CNTS for SUV, got {units!r}")
    weight, (dose, half_life, injected) = item.number("PatientWeight"), _injection(header)
    if not weight or not 0 < weight < 1000:
        raise DicomError(f"PET must state the weight of the patient for SUV, got {weight}")
    correction = item.text("DecayCorrection")
    if correction == "ADMIN":
        return [1000 * weight / dose] * len(frames)
    if correction != "START":
        raise DicomError(f"DecayCorrection must be START or ADMIN for SUV, got {correction!r}")
    delay = (_scan_start(frames) - injected).total_seconds()
    if not 0 <= delay < 24 * 3600:
        raise DicomError(f"scan must begin within a day after the injection, got {delay:.0f} s; SUV cannot be computed")
    return [1000 * weight / (dose * math.exp(-math.log(2) * delay / half_life))] * len(frames)


def _text_number(value: bytes) -> float:
    try:
        return float(value.strip(b" \0"))
    except ValueError:
        return 0.0


def _injection(header: Header) -> tuple[float, float, datetime]:
    """Dose (Bq), half life (s) and time of the injection."""
    drug = (header.item.items("RadiopharmaceuticalInformationSequence") or [Item(True)])[0]
    dose, half_life = drug.number("RadionuclideTotalDose"), drug.number("RadionuclideHalfLife")
    if not dose or not half_life or min(dose, half_life) <= 0:
        raise DicomError(f"PET must state dose and half life for SUV, got {dose} and {half_life}")
    when = _moment(drug.text("RadiopharmaceuticalStartDateTime")[:14], "")
    if when is None:
        date = header.item.text("SeriesDate") or header.item.text("AcquisitionDate")
        when = _moment(date, drug.text("RadiopharmaceuticalStartTime"))
        start = _moment(date, header.item.text("SeriesTime") or header.item.text("AcquisitionTime"))
        if when is not None and start is not None and when > start:  # injected before midnight
            when -= timedelta(days=1)
    if when is None:
        raise DicomError("PET must state the time of the injection for SUV, got none")
    return dose, half_life, when


def _scan_start(frames: Sequence[Frame]) -> datetime:
    """SeriesDate and Time, unless a slice was acquired before (then the series was made later: the earliest slice)."""
    items = {id(f.header): f.header.item for f in frames}.values()
    acquired = [m for i in items if (m := _moment(i.text("AcquisitionDate"), i.text("AcquisitionTime"))) is not None]
    first = next(iter(items))
    series = _moment(first.text("SeriesDate"), first.text("SeriesTime"))
    times = [*acquired] if series is None or (acquired and min(acquired) < series) else [series]
    if not times:
        raise DicomError("PET must state the time of the scan for SUV, got none")
    return min(times)


def _moment(date: str, time: str) -> datetime | None:
    text = (date + time).replace(":", "")
    try:
        return datetime.strptime(text[:14], "%Y%m%d%H%M%S") if len(text) >= 14 else None
    except ValueError:
        return None
