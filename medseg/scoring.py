"""Scores of whole cases on their native grids, during a training and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from medseg.data import Case, read_case_labels
from medseg.evaluation import score_case
from medseg.inference import Predictor
from medseg.io import is_dicom, read_channels
from medseg.plan import Plan
from medseg.prepared import PreparedCase
from medseg.report import Block, picture_blocks
from medseg.targets import planned_labels
from medseg.volume import LabelMap

__all__ = ["Scoring", "mean", "planned_reference"]

SHOWN_CASES = 24  # scored during training; all of them at the end


@dataclass(frozen=True)
class Scoring:
    """The validation cases of a training, scored by all processes together."""

    fabric: Fabric
    cases: Sequence[Case]
    prepared: Sequence[PreparedCase]

    @property
    def shown(self) -> list[int]:
        """Cases scored during training, evenly spread."""
        count = min(SHOWN_CASES, len(self.cases))
        return [round(i) for i in np.linspace(0, len(self.cases) - 1, count)]

    def score(
        self,
        predictor: Predictor,
        indices: Sequence[int],
        *,
        surface: bool,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any]]:
        """Rows of metrics of cases; each process predicts its share, and all get the rows of all in order."""
        own: dict[int, list[dict[str, Any]]] = {}
        for done, i in enumerate(indices[self.fabric.global_rank :: self.fabric.world_size], start=1):
            own[i] = self._score(predictor, i, surface)
            progress(done * self.fabric.world_size)
        shares: list[Any] = [own]
        if self.fabric.world_size > 1:
            shares = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(shares, own)
        found = {i: rows for share in shares for i, rows in share.items()}
        return [row for i in indices for row in found[i]]

    def _score(self, predictor: Predictor, index: int, surface: bool) -> list[dict[str, Any]]:
        case, prepared = self.cases[index], self.prepared[index]
        reference, ignored = planned_reference(case, predictor.plan)
        prediction = predictor.from_prepared(prepared.image, prepared.geometry, reference.geometry)
        if ignored is not None:
            prediction = _without(prediction, ignored)
        known = [s.number for s, k in zip(predictor.plan.structures, prepared.known, strict=True) if k]
        return score_case(case.id, prediction, reference, surface=surface, known=known)

    def pictures(self, predictor: Predictor, rows: Sequence[dict[str, Any]]) -> list[Block]:
        """The worst and the median case, with contours of prediction and reference."""
        dice = [mean(r["dice"] for r in rows if r["case"] == c.id) for c in self.cases]
        order = np.argsort(dice)
        blocks: list[Block] = []
        for name, i in {"worst": order[0], "median": order[len(order) // 2]}.items():
            case, prepared = self.cases[i], self.prepared[i]
            reference, _ = planned_reference(case, predictor.plan)
            image = read_channels(case.images)
            prediction = predictor.from_prepared(prepared.image, prepared.geometry, image.geometry)
            blocks += picture_blocks(f"{name} case {case.id}, mean Dice {dice[i]:.3f}", image, prediction, reference)
        return blocks


def planned_reference(case: Case, plan: Plan) -> tuple[LabelMap, np.ndarray | None]:
    """The reference of a case in the structures of the plan, and the mask of voxels that do not count, if any.

    Ignored voxels are background in the reference.

    Raises
    ------
    ValueError
        If the case has no label, or structures overlap that the plan holds exclusive.
    """
    if case.label is None:
        raise ValueError(f"validation case must have a label, got none for {case.id}")
    image = read_channels(case.images) if is_dicom(case.label) else None  # on whose grid such labels are put
    return planned_labels(read_case_labels(case, image), plan)


def _without(labels: LabelMap, ignored: np.ndarray) -> LabelMap:
    array = np.where(ignored, np.zeros((), labels.array.dtype), labels.array)
    return LabelMap(array, labels.geometry, labels.structures, labels.meta)


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values, NaN where there is none."""
    array = np.array(list(values), float)
    return float(np.nanmean(array)) if np.isfinite(array).any() else math.nan
