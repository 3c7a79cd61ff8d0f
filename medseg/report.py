"""The report: one HTML file that opens anywhere, without network or scripts.

A report is a title and sections; a section holds blocks: text, facts, pictures, tables. The functions here make blocks of
what medseg produces: predictions, evaluations, plans, runs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from medseg.report_html import Block, Cell, Facts, Interval, Named, Picture, Section, Table, Text, write_report
from medseg.report_pictures import curve_picture, overview_picture, planes_picture
from medseg.volume import LabelMap, Volume

__all__ = [
    "Block",
    "Facts",
    "Interval",
    "Named",
    "Picture",
    "Section",
    "Table",
    "Text",
    "curve_picture",
    "metrics_blocks",
    "overview_picture",
    "picture_blocks",
    "plan_table",
    "planes_picture",
    "report_of_prediction",
    "report_of_run",
    "run_sections",
    "volume_table",
    "write_report",
]

METRIC_NAMES = {
    "iou": "IoU",
    "dice": "Dice",
    "nsd": "NSD",
    "hd95_mm": "HD95 (mm)",
    "assd_mm": "ASSD (mm)",
    "hd_mm": "HD (mm)",
    "precision": "precision",
    "recall": "recall",
    "soft_dice": "soft Dice",
    "brier": "Brier",
    "ece": "ECE",
    "lesion_f1": "lesion F1",
    "pq": "PQ",
    "volume_mm3": "volume (ml)",
    "reference_volume_mm3": "reference (ml)",
}
SHARES = ("iou", "dice", "nsd", "precision", "recall")  # between 0 and 1: drawn as a bar
SUMMARY = ("iou", "dice", "nsd", "hd95_mm", "assd_mm")
ROWS = (
    "iou", "dice", "nsd", "hd95_mm", "precision", "recall", "soft_dice", "brier", "ece", "lesion_f1", "pq", "volume_mm3",
    "reference_volume_mm3",
)  # fmt: skip
SIZES = ("spacing", "patch", "strides", "kernels")  # entries of a plan that are lengths along axes


def report_of_prediction(
    path: str | os.PathLike[str],
    *,
    title: str,
    image: Volume,
    prediction: LabelMap,
    reference: LabelMap | None = None,
    evaluation: Any = None,
    run: Any = None,
    notes: Sequence[str] = (),
    force: bool = False,
) -> None:
    """Write a report on one prediction: notes, pictures, structures or metrics, and the run that it comes from.

    Parameters
    ----------
    path : path
        The HTML file.
    title : str
        Its heading.
    image, prediction, reference : Volume and LabelMap
        On one grid.
    evaluation : Evaluation or mapping, optional
        As for :func:`metrics_blocks`; without it the volumes of the structures are listed.
    run : Run or path, optional
        The folder of the run.
    notes : sequence of str
        Paragraphs above the pictures, such as whether the CRF is applied and why.
    force : bool
        Whether an existing file may be replaced.

    Raises
    ------
    FileExistsError
        If the file exists and ``force`` is not set.
    GeometryError
        If the grids differ.
    """
    grid = image.geometry
    facts = Facts(
        {
            "modality": image.modality or "not stated",
            "shape": " × ".join(str(n) for n in grid.shape),
            "spacing": " × ".join(f"{v:.4g}" for v in grid.spacing) + " mm",
            "orientation": grid.orientation,
            "structures": len(prediction.structures),
        }
    )
    sections = [
        Section("Result", [facts, *(Text(n) for n in notes), *picture_blocks("scan", image, prediction, reference)])
    ]
    if evaluation is not None:
        colors = {s.name: s.color for s in prediction.structures}
        sections.append(Section("Metrics", metrics_blocks(evaluation, colors)))
    else:
        sections.append(Section("Structures", [volume_table(prediction)]))
    write_report(path, [*sections, *(run_sections(run) if run is not None else [])], title=title, force=force)


def report_of_run(run: Any, *, title: str = "", pictures: Sequence[Block] = (), notes: Sequence[str] = ()) -> Path:
    """Write ``report.html`` into the folder of a run, over what was there, and return its path.

    Parameters
    ----------
    run : Run or path
        The folder of the run.
    title : str
        Heading; by default the name of the folder.
    pictures : sequence of blocks
        Shown first, as :func:`picture_blocks` makes them.
    notes : sequence of str
        Paragraphs above the pictures.
    """
    folder = Path(getattr(run, "path", run))
    first = [Section("Result", [*(Text(n) for n in notes), *pictures])] if notes or pictures else []
    write_report(
        folder / "report.html",
        [*first, *run_sections(folder)],
        title=title or f"Training {folder.resolve().name}",
        force=True,
    )
    return folder / "report.html"


def volume_table(labels: LabelMap) -> Table:
    """Voxels and volume (ml) of each structure."""
    voxels = {s.number: int(np.count_nonzero(labels.mask(s.number))) for s in labels.structures}
    rows: list[list[Cell]] = [
        [Named(s.name, s.color), voxels[s.number], voxels[s.number] * labels.geometry.voxel_mm3 / 1000]
        for s in labels.structures
    ]
    return Table("What was found", ["structure", "voxels", "volume (ml)"], rows, is_open=True)


def picture_blocks(case: str, image: Volume, prediction: LabelMap, reference: LabelMap | None = None) -> list[Block]:
    """The planes of a case where structures are largest and, with a reference, where it differs most from the prediction.

    Memory and time grow with the voxels of the case; see :func:`medseg.report_pictures.planes_picture`.
    """
    names = ", ".join(s.name for s in prediction.structures[:8])
    what = f"Case {case}: contours of {names}" + (" and more" if len(prediction.structures) > 8 else "")
    orders = "patient's right on the left"
    largest = planes_picture(image, prediction, reference)
    blocks: list[Block] = [Picture(largest, f"{case}: the planes with the largest area of structures, {orders}.", what)]
    if reference is not None:
        differing = planes_picture(image, prediction, reference, focus="disagreement", zoom=True)
        caption = f"{case}: the planes in which prediction (solid) and reference (dashed) differ most, enlarged."
        blocks.append(Picture(differing, caption, what))
    return blocks


def run_sections(run: Any) -> list[Section]:
    """Training curve, validation metrics, plan and versions of a run, from the JSON files in its folder.

    ``run`` is a Run or its folder. A file that is not there yet (a run in training) leaves its section out.
    """
    folder = Path(getattr(run, "path", run))

    def load(name: str) -> Any:
        path = folder / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    plan, history, metrics, versions = (load(f"{n}.json") for n in ("plan", "history", "metrics", "environment"))
    sections = []
    if metrics:
        colors = {s["name"]: tuple(s["color"]) for s in (plan or {}).get("structures", ())}
        sections.append(Section("Validation", metrics_blocks(metrics, colors)))
    if history:
        best = max((row.get("iou") or 0.0 for row in history), default=0.0)
        caption = f"Training loss, and mean IoU of whole validation cases: {best:.3f} at best."
        sections.append(
            Section("Training", [Picture(curve_picture(history), caption, f"Curves of loss and IoU. {caption}")])
        )
    if plan:
        sections.append(Section("Plan", [plan_table(plan)]))
    if versions:
        sections.append(Section("Versions", [Facts(versions)]))
    return sections


def metrics_blocks(
    evaluation: Any, colors: Mapping[str, tuple[int, int, int]] | None = None, *, is_open: bool = False
) -> list[Block]:
    """Tables of an evaluation: a summary by structure with 95 % intervals, and the rows by case.

    Parameters
    ----------
    evaluation : Evaluation or mapping
        Something with ``to_json()``, or ``{"cases": [...], "summary": [...]}`` as in metrics.json.
    colors : mapping of name to (R, G, B), optional
        Colours of the structures.
    is_open : bool
        Whether the rows by case are shown unfolded, however many.
    """
    found = evaluation.to_json() if hasattr(evaluation, "to_json") else evaluation
    found = json.loads(found) if isinstance(found, str) else found
    colors = colors or {}

    def named(name: str) -> Cell:
        return Named(name, colors[name]) if name in colors else name

    shown = [m for m in SUMMARY if any(_number(e.get(m, {}).get("mean")) is not None for e in found["summary"])]
    summary = [
        [
            named(e["structure"]),
            f"{e['n_defined']} / {e.get('n', e['n_defined'])}",
            *(_interval(e.get(m), m) for m in shown),
        ]
        for e in found["summary"]
    ]
    columns = [m for m in ROWS if any(_number(r.get(m)) is not None for r in found["cases"])]
    rows: list[list[Cell]] = [
        [r["case"], named(r["structure"]), *(_value(r.get(m), m) for m in columns)]
        for r in found["cases"]
        if not r.get("error")
    ]
    failed = [[r["case"], str(r["error"])] for r in found["cases"] if r.get("error")]
    blocks: list[Block] = [
        Table(
            "By structure: mean over cases with its 95 % bootstrap interval",
            ["structure", "defined / cases", *(METRIC_NAMES[m] for m in shown)],
            summary,
            is_open=True,
        ),
        Table("By case", ["case", "structure", *(METRIC_NAMES[m] for m in columns)], rows, is_open),
    ]
    return [*blocks, Table("Not scored", ["case", "reason"], failed, is_open=True)] if failed else blocks


def plan_table(plan: Any) -> Table:
    """The plan with the reason of each choice.

    Parameters
    ----------
    plan : Plan or mapping
        Something with ``model_dump(mode="json")``, or the contents of plan.json; its ``reasons`` explain its entries.
    """
    values = dict(plan.model_dump(mode="json") if hasattr(plan, "model_dump") else plan)
    reasons = values.pop("reasons", {})
    values.pop("format", None)
    rows: list[list[Cell]] = [
        [
            "spacing (mm)" if name == "spacing" else name,
            _words(value, " × " if name in SIZES else ", "),
            str(reasons.get(name, "")),
        ]
        for name, value in values.items()
        if value is not None or name not in ("encoder", "ignore")
    ]
    rows += [[name, "", str(reason)] for name, reason in reasons.items() if name not in values]
    return Table("What is trained and how", ["choice", "value", "reason"], rows, is_open=True)


def _words(value: Any, joint: str = ", ") -> str:
    """A value of a plan as a person writes it: 3 × 4 instead of [3, 4], CT (mean 40) instead of {"name": "CT", ...}."""
    if value is None:
        return "as it is"
    if isinstance(value, float):
        return f"{value:.5g}"
    if isinstance(value, Mapping):
        if value.get("scheme") == "zscore":  # its other entries mean nothing
            return f"{value.get('name', '')} (z-score of each image)"
        shown = {k: v for k, v in value.items() if k not in ("name", "color") and v is not False and v != []}
        rest = ", ".join(f"{k} {_words(v)}" for k, v in shown.items())
        return f"{value['name']} ({rest})" if "name" in value else rest
    if isinstance(value, list | tuple):
        is_flat = all(not isinstance(v, list | tuple | Mapping) for v in value)
        return (joint if is_flat else "; ").join(_words(v, joint) for v in value) or "none"
    return str(value)


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _interval(estimate: Mapping[str, Any] | None, metric: str) -> Interval:
    low, high = (estimate or {}).get("ci95", (None, None))
    return Interval(_number((estimate or {}).get("mean")), _number(low), _number(high), metric in SHARES)


def _value(value: Any, metric: str) -> float | None:
    number = _number(value)
    return number / 1000 if number is not None and metric.endswith("mm3") else number
