"""Validation cases predicted by networks that never saw them, and what is chosen on them at the end of a training."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage

from medseg.calibration import probability_scores
from medseg.data import Case, load_dataset
from medseg.ensemble import member_runs
from medseg.inference import Predictor, load_image
from medseg.plan import Plan, StructurePlan
from medseg.postprocessing import Components, Postprocessing, choose_filter, find_components
from medseg.run import Run
from medseg.scoring import read_reference_of
from medseg.targets import known_structures, numbered_by_name, planned_labels, values_present
from medseg.temperature import fit_temperature, negative_log_likelihood, tempered
from medseg.volume import LabelMap, Volume

__all__ = ["HeldOut", "choose_postprocessing", "held_out"]

log = logging.getLogger("medseg")
Array = NDArray[Any]
CASES = 24  # validation cases looked at
MARGIN = 10  # voxels around the structures from which the temperature is fitted
SAMPLE = 20_000  # voxels of a case for that
LEAST_PROBABILITY = 1e-7  # of sigmoids, whose logits would be infinite beyond


@dataclass(frozen=True)
class HeldOut:
    """A validation case, and the predictor that never saw it.

    Parameters
    ----------
    case : Case
    predictor : Predictor
        Without postprocessing.
    """

    case: Case
    predictor: Predictor

    @property
    def plan(self) -> Plan:
        """The plan of the predictor."""
        return self.predictor.plan

    @cached_property
    def image(self) -> Volume:
        """The channels that the case has."""
        return load_image([path for path in self.case.images if path is not None])

    @cached_property
    def _labels(self) -> LabelMap:
        return numbered_by_name(read_reference_of(self.case), self.plan)

    @cached_property
    def _planned(self) -> tuple[LabelMap, Array | None]:
        return planned_labels(self._labels, self.plan)

    @property
    def reference(self) -> LabelMap:
        """The label map in the structures of the plan."""
        return self._planned[0]

    def predict(self) -> tuple[LabelMap, Volume | LabelMap]:
        """Label map and probabilities."""
        names = [c.name for c, path in zip(self.plan.channels, self.case.images, strict=False) if path is not None]
        some = len(self.case.images) == len(self.plan.channels) > len(names)
        labels, soft = self.predictor.predict(self.image, channels=names if some else None, probabilities=True)
        if soft is None:
            raise ValueError(f"prediction must give probabilities, got none for {self.case.id}")
        return labels, soft

    @cached_property
    def _known(self) -> dict[int, bool]:
        answers = known_structures(self.plan, self.case.unknown, values_present(self._labels))
        return {s.number: known for s, known in zip(self.plan.structures, answers, strict=True)}

    def known(self, structure: StructurePlan) -> bool:
        """Whether the structure was drawn in this case, by the rule of the training."""
        return self._known[structure.number]

    def truth(self, structure: StructurePlan) -> Array:
        """(I, J, K) bool mask of a structure in the reference."""
        if structure.number in self.reference.names:
            return self.reference.mask(structure.number)
        return np.zeros(self.reference.geometry.shape, bool)

    @property
    def counted(self) -> Array | None:
        """(I, J, K) bool: what does not bear the label to be ignored; None where everything counts."""
        ignored = self._planned[1]
        return None if ignored is None else ~ignored


def held_out(
    run: Run | Path, device: str = "auto", *, most: int = CASES, seconds: float = float("inf")
) -> Iterator[HeldOut]:
    """Validation cases of a run, or of all folds of a cross-validation in turn, evenly spread.

    Ends early where the next case would last beyond ``seconds`` from the first request, if it takes as long as the longest
    so far.

    Raises
    ------
    FileNotFoundError, ValueError
        If the data set of the run is gone or has changed.
    """
    started = time.monotonic()
    members = member_runs(run.path if isinstance(run, Run) else run)
    cases = [_spread(_validation(member), -(-most // len(members))) for member in members]
    predictors = [Predictor.load(member, device, raw=True) for member in members]
    mixed = [HeldOut(case, p) for turn in zip_longest(*cases) for case, p in zip(turn, predictors, strict=True) if case]
    longest, before = 0.0, time.monotonic()
    for one in mixed[:most]:
        if before - started + longest > seconds:
            return
        yield one
        now = time.monotonic()
        longest, before = max(longest, now - before), now


def _spread(cases: Sequence[Case], most: int) -> list[Case]:
    count = min(most, len(cases))
    return [cases[round(i)] for i in np.linspace(0, len(cases) - 1, count)]


def _validation(run: Run) -> list[Case]:
    config = run.config
    cases = {c.id: c for c in load_dataset(config.dataset, group=config.group, absent=config.absent).cases}
    missing = [n for n in run.validation_ids() if n not in cases or cases[n].label is None]
    if missing:
        raise ValueError(
            f"data set must hold the validation cases of the run, got no {missing[0]} in {run.config.dataset}"
        )
    return [cases[n] for n in run.validation_ids()]


# ---------------------------------------------------------------------------------------------------------------------
# Filters and temperature


def choose_postprocessing(
    run: Run | str | Path,
    device: str = "auto",
    *,
    most: int = CASES,
    seconds: float = float("inf"),
    progress: Callable[[int, int], None] | None = None,
) -> Postprocessing:
    """Choose filters of components and the temperature on validation cases, and store them with the run.

    Parameters
    ----------
    run : Run or path
        A finished run, or a cross-validation, each case of which is predicted by the fold that never saw it.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".
    most : int
        Cases looked at.
    seconds : float
        Time there is; fewer cases are looked at where it is short, and with fewer than 3 no filter is chosen.
    progress : callable, optional
        Called with the number of cases done and of all.

    Returns
    -------
    Postprocessing
        Also ``postprocessing.json`` in the folder of the run, in place of a former one.

    Raises
    ------
    FileNotFoundError, ValueError
        If the run has not finished, or its data set is gone.

    Notes
    -----
    Memory is that of a prediction with probabilities, and 20 000 voxels of each case. The temperature is taken if it
    lowers the negative log-likelihood and not at the price of a larger calibration error.
    """
    folder = run.path if isinstance(run, Run) else Path(run)
    plan = member_runs(folder)[0].plan
    tables: dict[int, list[Components]] = defaultdict(list)
    samples: list[tuple[Array, Array]] = []
    count = 0
    for one in held_out(folder, device, most=most, seconds=seconds):
        try:
            labels, soft = one.predict()
        except MemoryError as problem:  # K times the image: a training that has ended well does not fail by it
            log.warning("case %s is left out of the choice of filters and temperature: %s", one.case.id, problem)
            continue
        count += 1
        for structure in plan.structures:
            if one.known(structure):
                pair = labels.mask(structure.number), one.truth(structure)
                if one.counted is not None:
                    pair = pair[0] & one.counted, pair[1] & one.counted
                tables[structure.number].append(find_components(*pair, labels.geometry.voxel_mm3))
        samples.append(_sample(one, labels, soft))
        if progress:
            progress(count, most)
    filters = [choose_filter(s.number, s.name, tables[s.number]) for s in plan.structures]
    choice = Postprocessing(cases=count, filters=tuple(f for f in filters if f is not None))
    samples = [s for s in samples if len(s[0])]
    if samples:
        logits, truth = (np.concatenate(arrays) for arrays in zip(*samples, strict=True))
        choice = _with_temperature(choice, logits, truth, plan)
    return choice.store(folder)


def _sample(one: HeldOut, labels: LabelMap, soft: Volume | LabelMap) -> tuple[Array, Array]:
    """Logits (N, K) around the structures of a case, and what is true there, as the fit of the temperature wants them."""
    plan, shape = one.plan, labels.geometry.shape
    around = (labels.array != 0).any(0) if labels.is_layered else labels.array != 0
    for structure in plan.structures:
        around = around | one.truth(structure)
    box = next(iter(ndimage.find_objects(around.view(np.uint8))), None)
    if box is None:
        return np.empty((0, plan.outputs)), np.empty((0, plan.outputs))
    box = tuple(slice(max(0, s.start - MARGIN), min(n, s.stop + MARGIN)) for s, n in zip(box, shape, strict=True))
    inside = np.ones([s.stop - s.start for s in box], bool) if one.counted is None else one.counted[box]
    places = np.flatnonzero(inside)
    places = places[:: max(1, len(places) // SAMPLE)]
    probabilities = np.stack([np.ravel(layer[box])[places] for layer in soft.array], 1).astype(np.float64)
    masks = [np.ravel(one.truth(s)[box])[places] for s in plan.structures]
    known = [one.known(s) for s in plan.structures]
    if plan.overlapping:
        p = np.clip(probabilities, LEAST_PROBABILITY, 1 - LEAST_PROBABILITY)
        truth = np.stack([m if k else np.full(m.shape, np.nan) for m, k in zip(masks, known, strict=True)], 1)
        return np.log(p) - np.log1p(-p), truth.astype(np.float64)
    background = ~np.logical_or.reduce([m & k for m, k in zip(masks, known, strict=True)])
    columns = [background, *(m if k else background for m, k in zip(masks, known, strict=True))]
    return np.log(np.maximum(probabilities, np.finfo(np.float32).tiny)), np.stack(columns, 1).astype(np.float64)


def _with_temperature(choice: Postprocessing, logits: Array, truth: Array, plan: Plan) -> Postprocessing:
    """The choice with the temperature, if it helps, and with both figures before and after."""
    over = plan.overlapping
    kind = truth if over else truth > 0
    sure = ~np.isnan(truth).any(1) if over else truth.sum(1) == 1  # where no structure is unknown

    def calibration_error(temperature: float) -> float:
        soft = tempered(logits[sure], temperature, over)[:, 0 if over else 1 :]
        scores = probability_scores(soft.T, truth[sure][:, 0 if over else 1 :].T > 0.5)
        return float(np.mean([row["ece"] for row in scores]))

    found = fit_temperature(logits, kind, over)
    nll = [negative_log_likelihood(logits, kind, t, over) for t in (1.0, found)]
    ece = [calibration_error(t) for t in (1.0, found)] if sure.any() else [0.0, 0.0]
    if nll[1] >= nll[0] or ece[1] > ece[0]:
        found, nll, ece = 1.0, [nll[0]] * 2, [ece[0]] * 2
    return choice.model_copy(update={"temperature": found, "nll": tuple(nll), "ece": tuple(ece)})
