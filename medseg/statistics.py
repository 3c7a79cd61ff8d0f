"""Statistics over evaluations: runs compared case by case, several ranked, the worst cases, rows as files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from medseg.scores import DIFFERENCES, VOLUMES, Evaluation, Row, write_rows

__all__ = [
    "Comparison",
    "Rank",
    "RunComparison",
    "compare",
    "compare_runs",
    "holm",
    "is_better_low",
    "rank",
    "worst_cases",
    "write_rows",
]

Array = NDArray[Any]
RESAMPLES, SEED = 2000, 0
LOW_IS_GOOD = ("hd", "assd", "brier", "ece", "false_positives", "lesions_missed", "merges", "splits")


def is_better_low(metric: str) -> bool:
    """Whether lower values of a metric are better (distances, errors, and differences without their sign)."""
    return metric.startswith(LOW_IS_GOOD) or metric in DIFFERENCES


@dataclass(frozen=True)
class Comparison:
    """Two runs on the same cases, for one structure and metric.

    Attributes
    ----------
    structure, metric : str
    n : int
        Cases in which both have a value; only these count. Where the structure is on neither side for one run, and the
        other has a value (it predicted what is not there), the first is perfect: 1, or 0 mm.
    n_first, n_second : int
        Further cases in which only the first, or only the second, has one.
    first, second : float
        Means over the n cases.
    difference : float
        Mean of second minus first, with ``low`` and ``high``, its 95 % interval by bootstrap over cases.
    better : int
        Cases in which the second is better.
    p, p_holm : float
        Of the Wilcoxon signed-rank test [1]_, two-sided, and corrected for the number of structures [2]_; NaN with fewer
        than two cases.

    References
    ----------
    .. [1] Wilcoxon, Biometrics Bull 1945, doi:10.2307/3001968
    .. [2] Holm, Scand J Stat 1979, jstor:4615733
    """

    structure: str
    metric: str
    n: int
    n_first: int
    n_second: int
    first: float
    second: float
    difference: float
    low: float
    high: float
    better: int
    p: float
    p_holm: float


def compare(first: Evaluation, second: Evaluation, metric: str = "dice") -> list[Comparison]:
    """Compare two runs on the same cases, structure by structure.

    Parameters
    ----------
    first, second : Evaluation
        Of the same references.
    metric : str
        A column of their rows; differences of volume are taken without their sign.

    Returns
    -------
    list of Comparison
        One per structure that both have.

    Raises
    ------
    ValueError
        If the runs share no case and structure with a value of the metric.
    """
    a, b = _values_of_runs((first, second), metric)
    names = [name for name in dict.fromkeys(name for _, name in a) if any(s == name for _, s in b)]
    found: list[dict[str, Any]] = []
    for name in names:
        own = [{case: v for (case, s), v in side.items() if s == name} for side in (a, b)]
        cases = sorted(own[0].keys() & own[1].keys())
        if not cases:
            continue
        x, y = (np.array([side[c] for c in cases]) for side in own)
        change = y - x
        low, high = _interval(change)
        found.append({
            "structure": name, "metric": metric, "n": len(cases), "n_first": len(own[0]) - len(cases),
            "n_second": len(own[1]) - len(cases), "first": float(x.mean()), "second": float(y.mean()),
            "difference": float(change.mean()), "low": low, "high": high,
            "better": int((change < 0).sum() if is_better_low(metric) else (change > 0).sum()), "p": _wilcoxon(change),
        })  # fmt: skip
    if not found:
        raise ValueError(f"runs must share cases and structures with a value of {metric}, got none")
    corrected = holm([entry["p"] for entry in found])
    return [Comparison(**entry, p_holm=p) for entry, p in zip(found, corrected, strict=True)]


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number by Holm's method (step-down Bonferroni); NaN stays and does not count."""
    p = np.asarray(p_values, float)
    known = np.flatnonzero(np.isfinite(p))
    order = known[np.argsort(p[known], kind="stable")]
    out = np.full(len(p), np.nan)
    scaled = p[order] * np.arange(len(order), 0, -1)
    out[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(v) for v in out]


def _wilcoxon(change: Array) -> float:
    if len(change) < 2:
        return float("nan")
    if not change.any():
        return 1.0
    return float(stats.wilcoxon(change).pvalue)


def _interval(values: Array) -> tuple[float, float]:
    """95 % interval of the mean by bootstrap (fixed seed); NaN with fewer than two values."""
    if len(values) < 2:
        return float("nan"), float("nan")
    weights = np.random.default_rng(SEED).multinomial(len(values), np.full(len(values), 1 / len(values)), RESAMPLES)
    low, high = np.percentile(weights @ values / len(values), (2.5, 97.5))
    return float(low), float(high)


def _values(evaluation: Evaluation, metric: str) -> dict[tuple[str, str], float]:
    """Defined values by case and structure; differences without their sign, which neither ranks nor averages well."""
    rows = [row for row in evaluation.rows if "error" not in row]
    if rows and not any(metric in row for row in rows):
        raise ValueError(f"metric must be a column of the rows, got {metric!r}; there are {sorted(rows[0])}")
    values = {(row["case"], row["structure"]): float(row.get(metric, np.nan)) for row in rows}
    return {key: abs(v) if metric in DIFFERENCES else v for key, v in values.items() if np.isfinite(v)}


def _values_of_runs(runs: Sequence[Evaluation], metric: str) -> list[dict[tuple[str, str], float]]:
    """Values of each run; one that rightly left empty what another has a value for is perfect there.

    Two empty masks have no overlap and no distance, but among several runs the one without a false positive must not
    look like one that failed.
    """
    values = [_values(run, metric) for run in runs]
    known = set().union(*values)
    perfect = 0.0 if is_better_low(metric) else 1.0
    for run, own in zip(runs, values, strict=True):
        if run.settings.get("missing") == "nan" and metric.endswith("_mm"):
            continue  # no distance is defined where a side is empty
        right = {(row["case"], row["structure"]) for row in run.rows if _is_empty(row)}
        own.update(dict.fromkeys((right & known) - own.keys(), perfect))
    return values


def _is_empty(row: Row) -> bool:
    """Whether the row is of a structure that is on neither side."""
    return "error" not in row and all(row.get(key) == 0 for key in VOLUMES)


# ---------------------------------------------------------------------------------------------------------------------
# Several runs


@dataclass(frozen=True)
class Rank:
    """The place of a run among several.

    Attributes
    ----------
    run : str
    place : int
        1 is the best; runs of one mean rank share a place.
    mean_rank : float
        Mean over cases and structures of the rank in each, with ``low`` and ``high``, its 95 % interval by bootstrap over
        cases.
    mean : float
        Mean of the metric where it is defined; perfect where this run alone is right that there is no such structure.
    missing : int
        Cases and structures that other runs have a value for and this one has not: it comes last there.
    """

    run: str
    place: int
    mean_rank: float
    low: float
    high: float
    mean: float
    missing: int


def rank(runs: Mapping[str, Evaluation], metric: str = "dice") -> list[Rank]:
    """Rank runs on the same cases: first in each case and structure, then by the mean of these ranks [1]_.

    Parameters
    ----------
    runs : mapping of name to Evaluation
        At least two.
    metric : str
        A column of the rows; differences of volume are taken without their sign.

    Returns
    -------
    list of Rank
        The best first.

    References
    ----------
    .. [1] Wiesenfarth et al., Sci Rep 2021, doi:10.1038/s41598-021-82017-6
    """
    if len(runs) < 2:
        raise ValueError(f"runs must be at least two to be ranked, got {list(runs)}")
    values = _values_of_runs(list(runs.values()), metric)
    keys = sorted(set().union(*values))
    if not keys:
        raise ValueError(f"runs must have values of {metric}, got none")
    table = np.array([[side.get(key, np.nan) for side in values] for key in keys])
    missing = ~np.isfinite(table)
    worst = np.where(missing, np.inf, table if is_better_low(metric) else -table)
    ranks = stats.rankdata(worst, axis=1)
    cases = [case for case, _ in keys]
    by_case = np.array([ranks[[c == case for c in cases]].sum(axis=0) for case in dict.fromkeys(cases)])
    sizes = np.array([cases.count(case) for case in dict.fromkeys(cases)])
    low, high = np.full((2, len(runs)), np.nan)
    if len(sizes) > 1:
        drawn = np.random.default_rng(SEED).multinomial(len(sizes), np.full(len(sizes), 1 / len(sizes)), RESAMPLES)
        low, high = np.percentile((drawn @ by_case) / (drawn @ sizes)[:, None], (2.5, 97.5), axis=0)
    mean_rank = ranks.mean(axis=0)
    places = stats.rankdata(np.round(mean_rank, 12), method="min").astype(int)
    with np.errstate(invalid="ignore"):
        means = np.where(missing, 0, table).sum(0) / np.where(missing.all(0), np.nan, (~missing).sum(0))
    found = [
        Rank(name, int(places[n]), float(mean_rank[n]), float(low[n]), float(high[n]), float(means[n]),
             int(missing[:, n].sum()))
        for n, name in enumerate(runs)
    ]  # fmt: skip
    return sorted(found, key=lambda r: r.mean_rank)


@dataclass(frozen=True)
class RunComparison:
    """A run beside others on the same cases.

    Attributes
    ----------
    pairs : mapping of the other run's name to sequence of Comparison
        The run minus the other, metric by metric.
    ranking : sequence of Rank
        All of them by Dice, the best first; the run itself is called "this".
    problems : sequence of str
        What could not be compared, and why.
    """

    pairs: Mapping[str, Sequence[Comparison]]
    ranking: Sequence[Rank]
    problems: Sequence[str] = ()

    def as_rows(self) -> dict[str, list[Row]]:
        """ "comparison" and "ranking" as rows of a file; in each comparison "first" is the other run."""
        pairs = [{"run": name, **asdict(one)} for name, own in self.pairs.items() for one in own]
        return {"comparison": pairs, "ranking": [asdict(one) for one in self.ranking]}


def compare_runs(
    evaluation: Evaluation, others: Mapping[str, Evaluation], metrics: Sequence[str] = ("dice", "nsd", "hd95_mm")
) -> RunComparison:
    """Compare a run with others on the same cases by each metric that was measured, and rank all of them by Dice.

    p-values are corrected for the number of structures, not for that of metrics or runs.
    """
    problems: list[str] = []
    pairs: dict[str, list[Comparison]] = {}
    measured = [m for m in metrics if any(np.isfinite(row.get(m, np.nan)) for row in evaluation.rows)]
    for name, other in others.items():
        pairs[name] = []
        for metric in measured:
            try:
                pairs[name] += compare(other, evaluation, metric)
            except ValueError as problem:
                problems.append(f"no comparison with {name} by {metric}: {problem}")
    ranking: list[Rank] = []
    try:
        ranking = rank({"this": evaluation, **others})
    except ValueError as problem:
        problems.append(f"no ranks: {problem}")
    return RunComparison(pairs, ranking, problems)


def worst_cases(evaluation: Evaluation, metric: str = "dice") -> list[tuple[str, float]]:
    """Cases with the mean of a metric over their structures, the worst first.

    Differences of volume are taken without their sign. Cases that could not be scored come first (NaN), those in which
    nothing is defined last (NaN).
    """
    by_case: dict[str, list[float]] = {row["case"]: [] for row in evaluation.rows if "error" not in row}
    for (case, _), value in _values(evaluation, metric).items():
        by_case[case].append(value)
    means = {case: float(np.mean(v)) for case, v in by_case.items() if v}
    sign = -1 if is_better_low(metric) else 1
    ordered = sorted(means.items(), key=lambda item: (sign * item[1], item[0]))
    nan = float("nan")
    failed = [(row["case"], nan) for row in evaluation.failed]
    return [*failed, *ordered, *((case, nan) for case, v in by_case.items() if not v)]
