"""A table of metrics: rows per case and structure, a summary with confidence intervals."""

from __future__ import annotations

import base64
import csv
import html
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from medseg.cohort import pooled
from medseg.distribution import distribution_picture
from medseg.io.files import atomic_path, require_free

__all__ = [
    "COLUMNS",
    "DIFFERENCES",
    "FILES",
    "METRICS",
    "ROW_FILES",
    "VOLUMES",
    "Evaluation",
    "Row",
    "plain",
    "require_rows",
    "write_rows",
]

Row = dict[str, Any]
METRICS = ("iou", "dice", "hd95_mm", "nsd", "hd_mm", "assd_mm", "precision", "recall")
VOLUMES = ("volume_mm3", "reference_volume_mm3")
DIFFERENCES = ("volume_difference_mm3", "volume_difference")
COLUMNS = ("case", "structure", "label", *METRICS[:4], *VOLUMES, *METRICS[4:], *DIFFERENCES, "note", "error")
LESION_COLUMNS = (
    "case", "structure", "label", "side", "lesion", "volume_mm3", "x_mm", "y_mm", "z_mm", "outcome", "partners", "iou",
    "note",
)  # fmt: skip
TEXTS = ("label", "note", "error")  # null where there is none
FILES = ("metrics.json", "metrics.csv", "lesions.csv", "comparison.csv")  # of an evaluation
ROW_FILES = (".csv", ".parquet")
OVER_STRUCTURES = "mean"
RESAMPLES, SEED = 2000, 0
DRAWS_AT_ONCE = 100  # of the bootstrap, so that its memory is that of a few numbers per case


@dataclass(frozen=True, eq=False)
class Evaluation:
    """A table of metrics.

    Attributes
    ----------
    rows : tuple of dict
        One per case and structure, with the keys case, structure, label, iou, dice, hd95_mm, nsd, volume_mm3,
        reference_volume_mm3, hd_mm, assd_mm, precision, recall, volume_difference_mm3 (prediction minus reference) and
        volume_difference (the same as a share of the reference), NaN where undefined or not measured; those of
        :func:`medseg.lesions.detection` and :mod:`medseg.calibration` where measured. A case that could not be scored is
        one row with its reason under "error"; one that lacks a part, such as probabilities, has that reason under "note".
    lesions : tuple of dict
        One per case, structure and lesion, of either side, where lesions were asked for: see
        :func:`medseg.lesions.lesion_rows`.
    settings : mapping
        What was scored, and how distances were measured and lesions matched.
    """

    rows: tuple[Row, ...]
    lesions: tuple[Row, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_json(cls, text: str) -> Evaluation:
        """The inverse of :meth:`to_json`, without the lesions."""
        found = json.loads(text)
        rows = [{k: np.nan if v is None and k not in TEXTS else v for k, v in row.items()} for row in found["cases"]]
        return cls(tuple(rows), settings=found.get("settings", {}))

    @property
    def failed(self) -> tuple[Row, ...]:
        """The rows of cases that could not be scored."""
        return tuple(row for row in self.rows if "error" in row)

    @property
    def are_instances(self) -> bool:
        """Whether label maps held the numbers of instances instead of structures."""
        return bool((self.settings.get("lesions") or {}).get("instances", False))

    @property
    def notes(self) -> dict[str, str]:
        """What is missing of cases that were scored, by case."""
        return {row["case"]: row["note"] for row in self.rows if row.get("note")}

    @cached_property
    def metrics(self) -> tuple[str, ...]:
        """Columns that the summary holds: the usual ones, and those measured on demand."""
        found = dict.fromkeys(key for row in self.rows for key in row)
        return (*METRICS, *DIFFERENCES, *(key for key in found if key not in COLUMNS))

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns of the rows, in the order of files."""
        return (*COLUMNS[:-2], *self.metrics[len(METRICS) + len(DIFFERENCES) :], *COLUMNS[-2:])

    @cached_property
    def summary(self) -> list[dict[str, Any]]:
        """Per structure, and "mean" over structures: n (cases), n_defined (cases with a Dice), and for each metric
        "mean" over the cases in which it is defined, their number "n", and "ci95", the 95 % interval by bootstrap over
        cases (fixed seed).
        """
        scored = [row for row in self.rows if "error" not in row]
        names = list(dict.fromkeys(row["structure"] for row in scored))
        cases = list(dict.fromkeys(row["case"] for row in scored))
        case_at, name_at = ({key: n for n, key in enumerate(keys)} for keys in (cases, names))
        values = np.full((len(self.metrics), len(cases), len(names)), np.nan)
        listed = np.zeros((len(cases), len(names)), bool)
        for row in scored:
            at = case_at[row["case"]], name_at[row["structure"]]
            values[(slice(None), *at)] = [row.get(metric, np.nan) for metric in self.metrics]
            listed[at] = True
        estimates = {metric: _bootstrap(values[m]) for m, metric in enumerate(self.metrics)}
        is_defined = np.isfinite(values)
        defined = is_defined[METRICS.index("dice")]
        table = []
        for s, name in enumerate([*names, OVER_STRUCTURES]):
            whole = s == len(names)
            entry: dict[str, Any] = {
                "structure": name,
                "n": len(cases) if whole else int(listed[:, s].sum()),
                "n_defined": int((defined.any(axis=1) if whole else defined[:, s]).sum()),
            }
            for own, (metric, (mean, low, high)) in zip(is_defined, estimates.items(), strict=True):
                n = int((own.any(axis=1) if whole else own[:, s]).sum())
                entry[metric] = {"mean": float(mean[s]), "ci95": [float(low[s]), float(high[s])], "n": n}
            table.append(entry)
        return table

    @cached_property
    def pooled(self) -> list[dict[str, Any]]:
        """Lesions of all cases together: see :func:`medseg.cohort.pooled`."""
        return pooled(self.rows)

    def mean(self, metric: str = "iou", structure: str = OVER_STRUCTURES) -> float:
        """Mean of a metric over cases, for one structure or (the mean of these) over all of them."""
        for entry in self.summary:
            if entry["structure"] == structure and metric in self.metrics:
                return float(entry[metric]["mean"])
        names = [entry["structure"] for entry in self.summary]
        raise ValueError(
            f"metric must be one of {self.metrics} and structure of {names}, got {metric!r} of {structure!r}"
        )

    def to_json(self, more: Mapping[str, Any] | None = None) -> str:
        """``{"cases": [rows], "summary": [...], "settings": {...}}``; NaN is null.

        With lesions, "pooled", too; and further entries where given.
        """
        found = {"cases": self.rows, "summary": self.summary, "settings": self.settings}
        return json.dumps(
            plain({**found, **({"pooled": self.pooled} if self.pooled else {}), **(more or {})}), indent=1
        )

    def to_pandas(self) -> Any:
        """The rows as a pandas DataFrame.

        Raises
        ------
        ValueError
            If pandas is not installed.
        """
        try:
            import pandas  # an optional extra
        except ImportError as error:
            raise ValueError("a DataFrame needs pandas, got none installed; pip install pandas, or use rows") from error
        empty = {"note"} if not self.notes else set()
        empty |= {"error"} if not self.failed else set()
        return pandas.DataFrame(self.rows, columns=[c for c in self.columns if c not in empty])

    def write(
        self,
        folder: str | os.PathLike[str],
        *,
        comparison: Mapping[str, Sequence[Row]] | None = None,
        force: bool = False,
    ) -> None:
        """Write metrics.json and metrics.csv (the rows) into a folder.

        Where lesions were asked for, lesions.csv, too, and comparison.csv with a comparison of runs. metrics.json appears
        last: where it is, the others are complete. With ``force`` none of a former evaluation stays.

        Parameters
        ----------
        folder : path
        comparison : mapping, optional
            "comparison" and "ranking" of :meth:`medseg.statistics.RunComparison.as_rows`; entries of metrics.json.
        force : bool

        Raises
        ------
        FileExistsError
            If one of the files, written now or not, exists and ``force`` is not set.
        """
        tables: dict[str, tuple[Sequence[Row], Sequence[str] | None]] = {"metrics.csv": (self.rows, self.columns)}
        if self.settings.get("lesions"):
            tables["lesions.csv"] = self.lesions, LESION_COLUMNS
        if comparison is not None:
            tables["comparison.csv"] = comparison["comparison"], None
        for name in FILES:
            require_free(Path(folder) / name, force)
        with ExitStack() as files:  # each gets its name at the end, the first last
            path = files.enter_context(atomic_path(Path(folder) / FILES[0], force))
            path.write_text(self.to_json(comparison) + "\n", encoding="utf-8")
            for name, (rows, columns) in tables.items():
                _write_csv(rows, files.enter_context(atomic_path(Path(folder) / name, force)), columns)
        for name in set(FILES[1:]) - tables.keys():
            (Path(folder) / name).unlink(missing_ok=True)

    def __repr__(self) -> str:
        cases = {row["case"] for row in self.rows} - {row["case"] for row in self.failed}
        return f"Evaluation({len(cases)} cases, {len(self.failed)} failed, mean iou {self.mean('iou'):.3f})"

    def _repr_html_(self) -> str:
        shown = [m for m in self.metrics if any(np.isfinite(entry[m]["mean"]) for entry in self.summary)]
        head = "".join(f"<th>{h}</th>" for h in ("structure", "defined / cases", *shown))
        body = "".join(
            f"<tr><td>{html.escape(e['structure'])}</td><td>{e['n_defined']} / {e['n']}</td>"
            + "".join(f"<td>{_interval(e[m])}</td>" for m in shown)
            + "</tr>"
            for e in self.summary
        )
        failed = "".join(f"<li>{html.escape(r['case'])}: {html.escape(r['error'])}</li>" for r in self.failed)
        drawn = {m: m for m in ("dice", "hd95_mm") if any(np.isfinite(row.get(m, np.nan)) for row in self.rows)}
        picture = base64.b64encode(distribution_picture(self.rows, drawn)).decode() if drawn else ""
        plot = f'<img alt="distribution over cases" src="data:image/png;base64,{picture}">' if drawn else ""
        return f"<table><tr>{head}</tr>{body}</table>{plot}" + (f"<p>Failed:</p><ul>{failed}</ul>" if failed else "")


def _interval(estimate: Mapping[str, Any]) -> str:
    low, high = estimate["ci95"]
    return f"{estimate['mean']:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")


def _bootstrap(values: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Means over cases and their 95 % bounds, each (S + 1,), of values (cases, S) that may be NaN; the last entry is the
    mean over structures. Cases are drawn with replacement, all structures of a case together; O(draws x cases x S).
    """
    cases = len(values)
    defined = np.isfinite(values)
    generator = np.random.default_rng(SEED)
    parts = [_weighted_means(values, defined, np.ones((1, cases)))]
    for draws in (DRAWS_AT_ONCE,) * (RESAMPLES // DRAWS_AT_ONCE) if cases else ():
        weights = generator.multinomial(cases, np.full(cases, 1 / cases), draws)
        parts.append(_weighted_means(values, defined, weights))
    means = np.concatenate(parts)
    low, high = np.full((2, means.shape[1]), np.nan)
    for s in range(means.shape[1]):
        enough = (defined.any(axis=1) if s == values.shape[1] else defined[:, s]).sum() > 1
        draws = means[1:, s][np.isfinite(means[1:, s])]
        if enough:
            low[s], high[s] = np.percentile(draws, (2.5, 97.5))
    return means[0], low, high


def _weighted_means(values: NDArray[Any], defined: NDArray[Any], weights: NDArray[Any]) -> NDArray[Any]:
    """Means (W, S + 1) of values (cases, S) by weights (W, cases); the last column is the mean over structures."""
    count = weights @ defined
    with np.errstate(invalid="ignore", divide="ignore"):
        means = (weights @ np.where(defined, values, 0)) / np.where(count > 0, count, np.nan)
        seen = np.isfinite(means)
        over = np.where(seen, means, 0).sum(1, keepdims=True) / np.where(seen.any(1), seen.sum(1), np.nan)[:, None]
    return np.concatenate([means, over], axis=1)


def plain(value: Any) -> Any:
    """A value as JSON types: NaN is null, numbers of numpy are Python's, keys are text."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set):
        return [plain(v) for v in value]
    value = value.item() if isinstance(value, np.generic) else value
    return None if isinstance(value, float) and not np.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Files


def write_rows(
    rows: Sequence[Row], path: str | os.PathLike[str], columns: Sequence[str] | None = None, *, force: bool = False
) -> None:
    """Write rows as CSV or Parquet, as the suffix says; NaN is an empty cell or null.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    ValueError
        If the suffix is another, or Parquet is asked for and pyarrow is not installed.
    """
    require_rows(path, force)
    with atomic_path(path, force) as temporary:
        if Path(path).suffix.lower() == ".csv":
            _write_csv(rows, temporary, columns)
            return
        pyarrow, parquet = _parquet()
        values = [plain(row) for row in rows]
        columns = columns or list(dict.fromkeys(key for row in rows for key in row))
        parquet.write_table(pyarrow.Table.from_pydict({c: [r.get(c) for r in values] for c in columns}), temporary)


def _write_csv(rows: Sequence[Row], path: Path, columns: Sequence[str] | None) -> None:
    columns = columns or list(dict.fromkeys(key for row in rows for key in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(plain(row) for row in rows)


def require_rows(path: str | os.PathLike[str], force: bool = False) -> None:
    """Refuse what :func:`write_rows` would refuse, before there are rows."""
    suffix = Path(path).suffix.lower()
    if suffix not in ROW_FILES:
        raise ValueError(f"rows must go into a .csv or .parquet file, got {Path(path).name}")
    if suffix == ".parquet":
        _parquet()
    require_free(path, force)


def _parquet() -> tuple[Any, Any]:
    try:
        import pyarrow  # an optional extra
        from pyarrow import parquet
    except ImportError as error:
        raise ValueError("Parquet needs pyarrow, got none installed; pip install pyarrow, or write .csv") from error
    return pyarrow, parquet
