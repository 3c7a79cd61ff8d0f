"""Scores of whole cases on their native grids, during a training and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric

from medseg.data import Case, read_case_labels
from medseg.evaluation import score_case
from medseg.inference import Predictor
from medseg.io import is_dicom, read_channels, read_labels, write
from medseg.plan import Plan
from medseg.prepared import PreparedCase
from medseg.report import Block, picture_blocks
from medseg.sliding_window import window_starts
from medseg.targets import planned_labels
from medseg.volume import LabelMap

__all__ = ["Scoring", "mean", "read_reference_of"]


@dataclass(frozen=True)
class Scoring:
    """The validation cases of a training, scored by all processes together."""

    fabric: Fabric
    cases: Sequence[Case]
    prepared: Sequence[PreparedCase]

    def spread(self, count: int) -> list[int]:
        """So many cases, evenly spread."""
        return [round(i) for i in np.linspace(0, len(self.cases) - 1, min(count, len(self.cases)))]

    def windows(self, plan: Plan) -> list[int]:
        """How many windows the network sees of each case."""
        patch = plan.patch if plan.dims == 3 else (*plan.patch, 1)
        return [
            math.prod(len(window_starts(n, p, 0.5)) for n, p in zip(case.geometry.shape, patch, strict=True))
            for case in self.prepared
        ]

    def score(
        self,
        predictor: Predictor,
        indices: Sequence[int],
        *,
        keep: Path | None = None,
        progress: Callable[[int], None] = lambda done: None,
    ) -> list[dict[str, Any]]:
        """Rows of metrics of cases; each process predicts its share, and all get the rows of all in order.

        With a folder to ``keep`` the label maps in, surface distances are measured, too.
        """
        own: dict[int, list[dict[str, Any]]] = {}
        for done, i in enumerate(indices[self.fabric.global_rank :: self.fabric.world_size], start=1):
            own[i] = self._score(predictor, i, keep)
            progress(done * self.fabric.world_size)
        shares: list[Any] = [own]
        if self.fabric.world_size > 1:
            shares = [None] * self.fabric.world_size
            torch.distributed.all_gather_object(shares, own)
        found = {i: rows for share in shares for i, rows in share.items()}
        return [row for i in indices for row in found[i]]

    def _score(self, predictor: Predictor, index: int, keep: Path | None) -> list[dict[str, Any]]:
        case, prepared = self.cases[index], self.prepared[index]
        reference, ignored = planned_labels(read_reference_of(case), predictor.plan)
        prediction = predictor.from_prepared(prepared.image, prepared.geometry, reference.geometry)
        if keep is not None:
            write(prediction, keep / f"{case.id}.nii.gz", force=True)
        if ignored is not None:
            prediction = _without(prediction, ignored)
        known = [s.number for s, k in zip(predictor.plan.structures, prepared.known, strict=True) if k]
        return score_case(case.id, prediction, reference, surface=keep is not None, known=known)

    def pictures(self, plan: Plan, rows: Sequence[dict[str, Any]], kept: Path) -> list[Block]:
        """The worst and the median case, with contours of the prediction that was kept and of the reference."""
        dice = [mean(r["dice"] for r in rows if r["case"] == c.id) for c in self.cases]
        order = np.argsort(dice)
        blocks: list[Block] = []
        names = {order[len(order) // 2]: "median", order[0]: "worst"}  # the same case where there is one alone
        for i, name in reversed(names.items()):
            case = self.cases[i]
            reference, _ = planned_labels(read_reference_of(case), plan)
            image, prediction = read_channels(case.images), read_labels(kept / f"{case.id}.nii.gz")
            blocks += picture_blocks(f"{name} case {case.id}, mean Dice {dice[i]:.3f}", image, prediction, reference)
        return blocks


def read_reference_of(case: Case) -> LabelMap:
    """The label map of a case; a DICOM-SEG or RTSTRUCT is put on the grid of its image."""
    image = read_channels(case.images) if case.label is not None and is_dicom(case.label) else None
    return read_case_labels(case, image)


def _without(labels: LabelMap, ignored: np.ndarray) -> LabelMap:
    array = np.where(ignored, np.zeros((), labels.array.dtype), labels.array)
    return LabelMap(array, labels.geometry, labels.structures, labels.meta)


def mean(values: Iterable[float]) -> float:
    """Mean of the defined values, NaN where there is none."""
    array = np.array(list(values), float)
    return float(np.nanmean(array)) if np.isfinite(array).any() else math.nan
