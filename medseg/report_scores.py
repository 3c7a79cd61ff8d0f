"""Tables of a report on an evaluation: how it was measured, volumes, probabilities, lesions, other runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from medseg.report import METRIC_NAMES
from medseg.report_html import Block, Cell, Interval, Named, Table, Text
from medseg.scores import Evaluation
from medseg.statistics import RunComparison, worst_cases

__all__ = ["case_table", "comparison_blocks", "lesion_blocks", "note_blocks", "rules", "summary_tables"]

Colors = Mapping[str, tuple[int, int, int]]
DETECTION = {
    "lesion_sensitivity": "sensitivity", "lesion_precision": "precision", "lesion_f1": "F1", "sq": "SQ", "pq": "PQ",
    "ap50": "AP50", "ap75": "AP75",
}  # fmt: skip
COUNTS = {
    "reference_lesions": "lesions", "lesions_found": "found", "false_positives": "false positives", "merges": "merges",
    "splits": "splits",
}  # fmt: skip
MORE = {
    "Volumes: mean over cases with its 95 % bootstrap interval; differences are prediction minus reference": {
        "precision": "precision", "recall": "recall", "volume_difference_mm3": "volume difference (ml)",
        "volume_difference": "volume difference (share of the reference)",
    },
    "Probabilities: mean over cases with its 95 % bootstrap interval": {
        "soft_dice": "soft Dice", "brier": "Brier score", "ece": "expected calibration error",
    },
}  # fmt: skip
SHARES = ("precision", "recall", "soft_dice")  # drawn as a bar
SURFACES = {
    "voxel": "border voxels, the larger of both directed percentiles",
    "pooled": "border voxels, the percentile of both directions together",
    "area": "elements weighted by their area, the larger of both directed percentiles",
}


def rules(evaluation: Evaluation) -> list[Block]:
    """How distances were measured, in words."""
    how = evaluation.settings
    if not how.get("surface"):
        return []
    both = [row for row in evaluation.rows if "error" not in row and np.isfinite(row["dice"])]
    missed, false = (sum(row[key] == 0 for row in both) for key in ("volume_mm3", "reference_volume_mm3"))
    stands = "the diagonal of the image" if how["missing"] == "diagonal" else "no distance (these cases do not count)"
    return [
        Text(
            f"Surfaces: {SURFACES[how['surface']]}. NSD: within {how['tolerance_mm']:g} mm. Where one side alone has a "
            f"structure ({missed} missed, {false} made up), Dice, IoU and NSD are 0 and the distances are {stands}."
        )
    ]


def summary_tables(evaluation: Evaluation, colors: Colors) -> list[Block]:
    """Precision, recall and differences of volume; and the metrics of probabilities, where these were measured."""
    blocks: list[Block] = []
    for caption, metrics in MORE.items():
        shown = {m: name for m, name in metrics.items() if _is_measured(evaluation, m)}
        if not shown:
            continue
        rows: list[list[Cell]] = [
            [_named(entry["structure"], colors), *(_estimate(entry[m], m) for m in shown)]
            for entry in evaluation.summary
        ]
        blocks.append(Table(caption, ["structure", *shown.values()], rows, is_open=True))
    return blocks


def _is_measured(evaluation: Evaluation, metric: str) -> bool:
    return metric in evaluation.metrics and any(np.isfinite(e[metric]["mean"]) for e in evaluation.summary)


def _named(name: str, colors: Colors) -> Cell:
    return Named(name, colors[name]) if name in colors else name


def _estimate(estimate: Mapping[str, Any], metric: str) -> Interval:
    scale = 1000 if metric == "volume_difference_mm3" else 1  # ml
    value = estimate["mean"] if "mean" in estimate else estimate["value"]
    low, high = (v / scale if np.isfinite(v) else None for v in estimate["ci95"])
    return Interval(value / scale if np.isfinite(value) else None, low, high, metric in SHARES)


# ---------------------------------------------------------------------------------------------------------------------
# Lesions


def lesion_blocks(evaluation: Evaluation, colors: Colors) -> list[Block]:
    """Lesions of all cases together, means per case, sensitivity by size, and the lesions that went wrong."""
    if not evaluation.pooled:
        return []
    what = "Instances" if evaluation.are_instances else "Lesions"
    together: list[list[Cell]] = [
        [
            _named(e["structure"], colors), *(e[key] for key in COUNTS),
            *(_estimate(e[m], "") for m in DETECTION),
        ]
        for e in evaluation.pooled
    ]  # fmt: skip
    means: list[list[Cell]] = [
        [
            _named(e["structure"], colors), *(e[key]["mean"] for key in ("reference_lesions", "false_positives")),
            *(_estimate(e[m], "") for m in (*DETECTION, "ap")),
        ]
        for e in evaluation.summary
    ]  # fmt: skip
    blocks: list[Block] = [
        Table(f"{what} of all cases together, with 95 % bootstrap intervals over cases",
              ["structure", *COUNTS.values(), *DETECTION.values()], together, is_open=True),
        Table(f"{what}: means of the values per case", ["structure", "lesions per case", "false positives per case",
              *DETECTION.values(), "mean AP"], means, is_open=True),
        _by_size(evaluation, colors, what),
    ]  # fmt: skip
    told: list[list[Cell]] = [
        [
            row["case"], row["structure"], f"{row['side']} {row['lesion']}", row["volume_mm3"],
            ", ".join(f"{row[k]:.1f}" for k in ("x_mm", "y_mm", "z_mm")), row["outcome"], row["note"],
        ]
        for row in evaluation.lesions
        if row["note"] or row["outcome"] in ("missed", "false positive")
    ]  # fmt: skip
    head = ["case", "structure", "lesion", "volume (mm³)", "centre (RAS, mm)", "outcome", "merges and splits"]
    return [*blocks, Table(f"{what} missed, made up, merged or split", head, told)] if told else blocks


def _by_size(evaluation: Evaluation, colors: Colors, what: str) -> Table:
    """Sensitivity over all cases, one row per structure and class of size."""
    sizes = [key.removeprefix("sensitivity_") for key in evaluation.pooled[0] if key.startswith("sensitivity_")]
    rows: list[list[Cell]] = []
    for entry in evaluation.pooled:
        for size in sizes:
            lesions, estimate = entry[f"reference_lesions_{size}"], entry[f"sensitivity_{size}"]
            found = round(lesions * estimate["value"]) if lesions else 0
            words = size.removesuffix("_mm3").replace("_", " ")
            rows.append([
                _named(entry["structure"], colors), words if words[0] in "tf" else f"from {words}", lesions, found,
                _estimate(estimate, "recall"),
            ])  # fmt: skip
    head = ["structure", "volume (mm³)", "lesions", "found", "sensitivity (95 %)"]
    return Table(f"{what} by size, all cases together", head, rows, is_open=len(rows) <= 2 * len(sizes))


# ---------------------------------------------------------------------------------------------------------------------
# Cases and runs


def comparison_blocks(found: RunComparison) -> list[Block]:
    """Ranks, and differences metric by metric; a sentence where runs have nothing in common."""
    blocks: list[Block] = []
    if found.ranking:
        rows: list[list[Cell]] = [
            ["this run" if r.run == "this" else r.run, r.place, Interval(r.mean_rank, _end(r.low), _end(r.high)), r.mean,
             r.missing]
            for r in found.ranking
        ]  # fmt: skip
        head = ["run", "place", "mean rank (95 %)", "mean Dice", "missing"]
        blocks.append(Table("Ranks by Dice, averaged over cases and structures, the best first", head, rows, True))
    for name, own in found.pairs.items():
        for metric in dict.fromkeys(c.metric for c in own):
            rows = [
                [
                    c.structure, c.n, c.first, c.second, Interval(c.difference, _end(c.low), _end(c.high)),
                    f"{c.better} / {c.n}", c.p, c.p_holm,
                ]
                for c in own
                if c.metric == metric
            ]  # fmt: skip
            head = ["structure", "pairs", "other run", "this run", "difference (95 %)", "better", "p", "p (Holm)"]
            caption = f"{METRIC_NAMES[metric]}: this run minus {name}, same cases, Wilcoxon signed-rank"
            blocks.append(Table(caption, head, rows, True))
    return [*blocks, *(Text(f"{p[:1].upper()}{p[1:]}") for p in found.problems)]


def _end(value: float) -> float | None:
    return value if np.isfinite(value) else None


def case_table(evaluation: Evaluation) -> Table:
    """Mean Dice of each case, the worst first."""
    order: list[list[Cell]] = [[case, value] for case, value in worst_cases(evaluation)]
    return Table("Mean Dice over structures, the worst case first", ["case", "mean Dice"], order)


def note_blocks(evaluation: Evaluation) -> list[Block]:
    """What is missing of cases that were scored, and why."""
    notes: list[list[Cell]] = [[case, why] for case, why in evaluation.notes.items()]
    return [Table("Scored in part", ["case", "reason"], notes, is_open=True)] if notes else []
