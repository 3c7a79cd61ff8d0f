"""Pictures of the worst and the median cases of an evaluation, contours of both masks over the scan."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from medseg.case_files import Sources, case_id, case_pairs, declared_names
from medseg.case_reading import read_case
from medseg.case_structures import aligned_pair
from medseg.io import read
from medseg.report_html import Block, Picture
from medseg.report_pictures import planes_picture
from medseg.resample import resample_to
from medseg.scores import Evaluation
from medseg.statistics import worst_cases
from medseg.volume import Geometry, LabelMap, Volume

__all__ = ["Images", "case_pictures"]

WORST = 3
Image = Volume | str | os.PathLike[str]
Images = Image | Mapping[str, Image] | Callable[[str], Image]
log = logging.getLogger("medseg")


def case_pictures(
    evaluation: Evaluation, prediction: Sources, reference: Sources, image: Images | None, resample: bool
) -> tuple[list[Block], dict[str, tuple[int, int, int]]]:
    """Pictures of the worst and the median cases, and the colours of the structures in them.

    The label maps of these, at most four cases, are read again: those of a cohort would not fit the memory.
    """
    instances = evaluation.are_instances
    ordered = [(case, value) for case, value in worst_cases(evaluation) if np.isfinite(value)]
    pairs = case_pairs(prediction, reference)
    given = evaluation.settings.get("structures")
    declared = declared_names(reference, prediction)
    channels = tuple({int(n): name for n, name in own.items()} for own in (given, declared) if isinstance(own, Mapping))
    chosen = {case: f"number {n} from the worst" for n, (case, _) in enumerate(ordered[:WORST], 1)}
    if ordered:
        chosen.setdefault(ordered[len(ordered) // 2][0], "the median case")
    blocks: list[Block] = []
    colors: dict[str, tuple[int, int, int]] = {}
    scores = dict(ordered)
    for case, why in chosen.items():
        names = {} if instances else {r["label"]: r["structure"] for r in evaluation.rows if r["case"] == case}
        pair = read_case(*pairs[case], channels, probabilities=False)
        p, r = (_named(side, names) for side in aligned_pair(case, pair.prediction, pair.reference, resample))
        colors.update({s.name: s.color for s in (*p.structures, *r.structures)})
        scan = _scan(image, case, r, is_alone=len(pairs) == 1)
        shown = planes_picture(scan, p, r, focus="disagreement", zoom=True)
        values = ", ".join(
            f"{row['structure']} {row['dice']:.3f}"
            for row in evaluation.rows
            if row["case"] == case and np.isfinite(row["dice"])
        )
        caption = (
            f"{case}, {why}: mean Dice {scores[case]:.3f} ({values}). Planes in which prediction (solid) and reference "
            "(dashed) differ most."
        )
        blocks.append(Picture(shown, caption, f"Case {case} in three planes, contours of both masks"))
    return blocks, colors


def _named(labels: LabelMap, names: Mapping[int, str]) -> LabelMap:
    """The structures that have rows, called as there; all of them where nothing is named."""
    if not names:
        return labels
    at = [n for n, s in enumerate(labels.structures) if s.number in names]
    kept = tuple(replace(labels.structures[n], name=names[labels.structures[n].number]) for n in at)
    if labels.is_layered:
        return replace(labels, array=labels.array[at], structures=kept)
    scored = np.isin(labels.array, [s.number for s in kept])
    return replace(labels, array=np.where(scored, labels.array, np.zeros((), labels.array.dtype)), structures=kept)


def _scan(image: Images | None, case: str, labels: LabelMap, is_alone: bool) -> Volume:
    """The scan of a case on the grid of its labels; black where there is none."""
    grid: Geometry = labels.geometry
    black = Volume(np.zeros(grid.shape, np.uint8), grid)
    try:
        found = _image_of(image, case, is_alone)
        if found is None:
            return black
        scan = found if isinstance(found, Volume) else read(found)
    except (OSError, ValueError) as problem:  # the tables are worth a report without it
        log.warning("scan of case %s is left out of the report: %s", case, problem)
        return black
    return scan if scan.geometry.is_close(grid) else resample_to(scan, grid)


def _image_of(image: Images | None, case: str, is_alone: bool) -> Image | None:
    """The image of a case: one named like it in a folder, which may itself be the series of a case that is alone."""
    if isinstance(image, Mapping):
        return image.get(case)
    if callable(image):
        return image(case)
    if image is None or isinstance(image, Volume) or not Path(image).is_dir():
        return image
    files = [f for f in sorted(Path(image).iterdir()) if case_id(f) in (case, f"{case}_0000")]
    return files[0] if files else image if is_alone else None
