"""Whether the CRF helps a trained model, decided on its validation cases and kept with the run."""

from __future__ import annotations

import logging
from dataclasses import asdict
from os import PathLike
from pathlib import Path
from typing import ClassVar, Self

import numpy as np
from pydantic import model_validator

from medseg.choice import Choice
from medseg.crf import CRFParameters
from medseg.metrics import iou, overlap
from medseg.run import Run
from medseg.validation import HeldOut, held_out
from medseg.volume import LabelMap

__all__ = ["CRFChoice", "crf_of_run", "fit_crf"]

log = logging.getLogger("medseg")
CASES = 12  # validation cases looked at
LEAST_GAIN = 0.001  # of mean IoU, below which the CRF stays off


class CRFChoice(Choice):
    """What validation said about the CRF: settings that helped (or None), and mean IoU before and with each setting."""

    file: ClassVar[str] = "crf.json"
    settings: dict[str, float] | None
    iou_before: float
    iou_with: dict[str, float]

    @model_validator(mode="after")
    def _valid_settings(self) -> Self:
        self.parameters  # noqa: B018  refuses unknown or impossible settings
        return self

    @property
    def parameters(self) -> CRFParameters | None:
        """Parameters for :func:`medseg.refine`, or None where the CRF does not help."""
        if self.settings is None:
            return None
        iterations = int(self.settings["iterations"])
        return CRFParameters(**{**self.settings, "iterations": iterations})  # type: ignore[arg-type]

    @property
    def reason(self) -> str:
        """One sentence for people."""
        best = max(self.iou_with, key=lambda name: self.iou_with[name])
        change = f"mean IoU {self.iou_before:.4f} without, {self.iou_with[best]:.4f} with the best setting ({best})"
        verdict = "off: it does not help here" if self.settings is None else "on"
        return f"CRF {verdict} ({change}, {self.cases} validation cases)"


def crf_of_run(run: Run | str | PathLike[str]) -> CRFParameters | None:
    """What ``predict --crf`` uses: the choice stored in the run (None where it does not help), else gentle defaults."""
    choice = CRFChoice.of(run.path if isinstance(run, Run) else run)
    if choice is None:
        log.info("CRF with gentle defaults: nothing was fitted on validation")
        return CRFParameters()
    log.info("%s", choice.reason)
    return choice.parameters


def candidates() -> dict[str, CRFParameters]:
    """Settings that are tried, gentle ones."""
    return {
        "gentle": CRFParameters(),
        "gentler": CRFParameters(gaussian_weight=0.3, bilateral_weight=0.3, bilateral_sigma_mm=4.0),
        "borders": CRFParameters(gaussian_weight=0.1, bilateral_weight=1.0, bilateral_sigma_mm=3.0),
    }


def fit_crf(run: Run | str | Path, *, device: str = "auto", seconds: float = float("inf")) -> CRFChoice:
    """Try settings of the CRF on validation cases of a run or cross-validation, and store the choice in its folder.

    The CRF is chosen only if it raises the mean volumetric IoU by at least 0.001.

    Parameters
    ----------
    run : Run or path
        A finished run, or cross-validation, whose data set is still in place.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    seconds : float
        Time there is; fewer cases are looked at where it is short.

    Raises
    ------
    FileNotFoundError, ValueError
        If the data set of the run is gone or has changed, or there was no time for one case.
    """
    folder = run.path if isinstance(run, Run) else Path(run)
    settings = candidates()
    scores: dict[str, list[float]] = {name: [] for name in ("", *settings)}
    count = 0
    for one in held_out(folder, device, most=CASES, seconds=seconds):
        count += 1
        labels, soft = one.predict()
        scores[""] += _ious(one, labels)
        for name, parameters in settings.items():
            refined = one.predictor.refined(one.image, soft, parameters)
            scores[name] += _ious(one, one.predictor.decided(refined))
    if not count:
        raise ValueError(f"time must suffice for one validation case, got {seconds:g} s; allow more")
    means = {name: float(np.nanmean(values)) for name, values in scores.items()}
    before = means.pop("")
    best = max(means, key=lambda name: means[name])
    helps = means[best] >= before + LEAST_GAIN
    choice = CRFChoice(
        settings=asdict(settings[best]) if helps else None, iou_before=before, iou_with=means, cases=count
    )
    return choice.store(folder)


def _ious(one: HeldOut, labels: LabelMap) -> list[float]:
    """IoU of each structure that was drawn in the case."""
    found = []
    for structure in one.plan.structures:
        if one.known(structure):
            masks = np.stack([labels.mask(structure.number), one.truth(structure)])
            masks = masks if one.counted is None else masks & one.counted
            found.append(float(iou(overlap(masks[:1], masks[1:]))[0]))
    return found
