"""Whether the CRF helps a trained model, decided on its validation cases and kept with the run."""

from __future__ import annotations

import logging
from dataclasses import asdict
from typing import Self

import numpy as np
from pydantic import model_validator

from medseg.config import Record
from medseg.crf import CRFParameters, refine
from medseg.data import Case, load_dataset
from medseg.evaluation import score_case
from medseg.inference import Predictor, load_image
from medseg.io import read_labels
from medseg.run import Run

__all__ = ["CRFChoice", "crf_of_run", "fit_crf"]

log = logging.getLogger("medseg")
FILE = "crf.json"
CASES = 12  # validation cases looked at
LEAST_GAIN = 0.001  # of mean IoU, below which the CRF stays off


class CRFChoice(Record):
    """What validation said about the CRF: settings that helped (or None), and mean IoU before and with each setting."""

    settings: dict[str, float] | None
    iou_before: float
    iou_with: dict[str, float]
    cases: int

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


def crf_of_run(run: Run) -> CRFParameters | None:
    """What ``predict --crf`` uses: the choice stored in the run (None where it does not help), else gentle defaults."""
    path = run.path / FILE
    if not path.is_file():
        log.info("CRF with gentle defaults: nothing was fitted on validation")
        return CRFParameters()
    choice = CRFChoice.load(path)
    log.info("%s", choice.reason)
    return choice.parameters


def candidates() -> dict[str, CRFParameters]:
    """Settings that are tried, gentle ones."""
    return {
        "gentle": CRFParameters(),
        "gentler": CRFParameters(gaussian_weight=0.3, bilateral_weight=0.3, bilateral_sigma_mm=4.0),
        "borders": CRFParameters(gaussian_weight=0.1, bilateral_weight=1.0, bilateral_sigma_mm=3.0),
    }


def fit_crf(run: Run, *, device: str = "auto") -> CRFChoice:
    """Try settings of the CRF on validation cases of a run, and store the choice in the run.

    The CRF is chosen only if it raises the mean volumetric IoU by at least 0.001.

    Parameters
    ----------
    run : Run
        A finished run whose data set is still in place.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".

    Raises
    ------
    FileNotFoundError, ValueError
        If the data set of the run is gone or has changed.
    """
    cases = _validation(run)[:CASES]
    predictor = Predictor.load(run, device)
    settings = candidates()
    scores: dict[str, list[float]] = {name: [] for name in ("", *settings)}
    for case in cases:
        image, reference = load_image(case.images), read_labels(str(case.label)).exclusive()
        labels, soft = predictor.predict(image, probabilities=True)
        if soft is None:
            raise ValueError(f"prediction must give probabilities, got none for {case.id}")
        scores[""] += [row["iou"] for row in score_case(case.id, labels, reference)]
        for name, parameters in settings.items():
            refined = refine(image, soft, parameters=parameters, device=str(predictor.device))
            labels = predictor.label_map(np.asarray(refined.array).argmax(0), image.geometry)
            scores[name] += [row["iou"] for row in score_case(case.id, labels, reference)]
    means = {name: float(np.nanmean(values)) for name, values in scores.items()}
    before = means.pop("")
    best = max(means, key=lambda name: means[name])
    helps = means[best] >= before + LEAST_GAIN
    choice = CRFChoice(
        settings=asdict(settings[best]) if helps else None, iou_before=before, iou_with=means, cases=len(cases)
    )
    choice.save(run.path / FILE, force=True)
    return choice


def _validation(run: Run) -> list[Case]:
    cases = {c.id: c for c in load_dataset(run.config.dataset, group=run.config.group).cases}
    missing = [n for n in run.validation_ids() if n not in cases or cases[n].label is None]
    if missing:
        raise ValueError(
            f"data set must hold the validation cases of the run, got no {missing[0]} in {run.config.dataset}"
        )
    return [cases[n] for n in run.validation_ids()]
