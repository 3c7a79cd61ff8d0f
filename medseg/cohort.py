"""Lesions of a whole cohort: counts summed over all cases, and the metrics of detection that follow from the sums."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["pooled"]

Array = NDArray[Any]
COUNTS = ("lesions", "reference_lesions", "lesions_found", "lesions_missed", "false_positives", "merges", "splits")
PRECISIONS = ("ap50", "ap75")
SIZE = re.compile(r"sensitivity_(.*_mm3)")
TOGETHER = "all"
RESAMPLES, SEED = 2000, 0


def pooled(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Metrics of detection over the lesions of all cases, beside which the summary holds means of the metrics per case.

    A mean per case weighs a case with one lesion as one with fifty and leaves out those without any, whose false
    positives count here.

    Parameters
    ----------
    rows : sequence of mapping
        Rows of an evaluation, one per case and structure, with the metrics of :func:`medseg.lesions.detection`.

    Returns
    -------
    list of dict
        One per structure, and "all" over structures where there are several: "cases", the counts of
        :func:`medseg.lesions.detection` and the reference lesions of each class of size (reference_lesions_to_10_mm3 ...);
        and lesion_f1, lesion_sensitivity, lesion_precision, sq, rq, pq, ap50, ap75 and sensitivity_to_10_mm3 ... of the
        sums over cases, as {"value", "ci95"}, the 95 % interval by bootstrap over cases (fixed seed). NaN as there. Empty
        where no lesions were counted.

    Notes
    -----
    O(cases x structures), 2000 times for the intervals. The sum of the IoUs of the pairs is sq x lesions_found, one to one.
    """
    counted = [row for row in rows if "error" not in row and "reference_lesions" in row]
    sizes = [match[1] for key in (counted[0] if counted else ()) if (match := SIZE.fullmatch(key))]
    names = list(dict.fromkeys(row["structure"] for row in counted))
    sums: dict[str, dict[str, Counter[str]]] = {}  # by structure, then case
    for row in counted:
        own = _sums(row, sizes)
        for name in (row["structure"], *([TOGETHER] if len(names) > 1 else [])):
            sums.setdefault(name, {}).setdefault(row["case"], Counter()).update(own)
    return [_entry(name, list(sums[name].values()), sizes) for name in (*names, TOGETHER) if name in sums]


def _sums(row: Mapping[str, Any], sizes: Sequence[str]) -> dict[str, float]:
    """What adds up over cases: counts, IoUs, pairs at the IoUs of the precisions, lesions found by size."""
    found = {key: float(row[key]) for key in COUNTS}
    all_of_them = found["lesions"] + found["reference_lesions"]
    # NaN for pairs that are many to many, which have no mean IoU, also where there is none
    no_pair = 0.0 if np.isfinite(row["rq"]) or not all_of_them else np.nan
    found["ious"] = row["sq"] * row["lesions_found"] if row["lesions_found"] else no_pair
    for key in PRECISIONS:  # pairs / (lesions of both sides - pairs)
        found[key] = row[key] * all_of_them / (1 + row[key]) if all_of_them else 0.0
    for size in sizes:
        lesions = float(row[f"reference_lesions_{size}"])
        found[f"reference_lesions_{size}"] = lesions
        found[f"found_{size}"] = lesions * row[f"sensitivity_{size}"] if lesions else 0.0
    return found


def _entry(name: str, by_case: Sequence[Mapping[str, float]], sizes: Sequence[str]) -> dict[str, Any]:
    cases = len(by_case)
    sums = {key: np.array([own[key] for own in by_case]) for key in by_case[0]}
    counts = [key for key in sums if key in COUNTS or key.startswith("reference_lesions_")]
    values = _ratios({key: own.sum(keepdims=True) for key, own in sums.items()}, sizes)
    ends = dict.fromkeys(values, (float("nan"), float("nan")))
    if cases > 1:
        weights = np.random.default_rng(SEED).multinomial(cases, np.full(cases, 1 / cases), RESAMPLES)
        ends = {key: _interval(own) for key, own in _ratios({k: weights @ v for k, v in sums.items()}, sizes).items()}
    return {
        "structure": name,
        "cases": cases,
        **{key: int(sums[key].sum()) for key in counts},
        **{key: {"value": float(own[0]), "ci95": list(ends[key])} for key, own in values.items()},
    }


def _interval(values: Array) -> tuple[float, float]:
    values = values[np.isfinite(values)]
    low, high = np.percentile(values, (2.5, 97.5)) if values.size else (np.nan, np.nan)
    return float(low), float(high)


def _ratios(sums: Mapping[str, Array], sizes: Sequence[str]) -> dict[str, Array]:
    """The metrics of sums, each an array; the undefined as in :func:`medseg.lesions.detection`."""
    predicted, true, found = sums["lesions"], sums["reference_lesions"], sums["lesions_found"]
    right = predicted - sums["false_positives"]
    sensitivity, sq = _share(found, true), _share(sums["ious"], found)
    precision = np.where(predicted > 0, _share(right, predicted), np.where(true > 0, 0.0, np.nan))
    both = (found > 0) & (right > 0)
    f1 = np.where(both, _share(2 * sensitivity * precision, sensitivity + precision), 0.0)
    f1 = np.where(predicted + true > 0, f1, np.nan)
    rq = np.where(np.isfinite(sums["ious"]), f1, np.nan)
    return {
        "lesion_f1": f1,
        "lesion_sensitivity": sensitivity,
        "lesion_precision": precision,
        "sq": sq,
        "rq": rq,
        "pq": np.where(found > 0, sq * rq, rq),
        **{key: _share(sums[key], predicted + true - sums[key]) for key in PRECISIONS},
        **{f"sensitivity_{size}": _share(sums[f"found_{size}"], sums[f"reference_lesions_{size}"]) for size in sizes},
    }


def _share(part: Array, whole: Array) -> Array:
    return np.asarray(np.where(whole > 0, part / np.where(whole > 0, whole, 1), np.nan))
