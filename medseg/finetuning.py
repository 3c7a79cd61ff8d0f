"""Fine-tuning of promptable models: the image encoder stays as it is, the decoder learns from its cached embeddings.

The result is a run folder that :func:`medseg.models.sam.load_promptable` loads, so that prompts are drawn on with it as
with the model that it started from.

References
----------
Ma et al. (2024), MedSAM, doi:10.1038/s41467-024-44824-z: boxes moved at random, Dice and cross-entropy.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.box_prompts import MIN_PIXELS, BoxModel, Prompt, jittered, prompts_of, rows_of, spread
from medseg.boxes import box_of, ellipse
from medseg.cases import Case, Dataset
from medseg.config import TrainConfig
from medseg.device import pick_device
from medseg.embeddings import EmbeddingCache
from medseg.evaluation import Evaluation
from medseg.io import read_channels
from medseg.losses import DiceBCELoss
from medseg.models.sam import PromptableModel, load_promptable
from medseg.models.sam_layouts import LAYOUTS
from medseg.network_plan import parse_bytes
from medseg.pace import flat_since, peak_bytes, schedule, training_bar
from medseg.plan import Plan
from medseg.planes import THICK
from medseg.prepared import PreparedCase, prepare
from medseg.report import report_of_run
from medseg.run import WEIGHTS, Run, save_tensors, write_json
from medseg.scoring import mean
from medseg.volume import Geometry
from medseg.windows import WINDOWS_HU

__all__ = [
    "AUTOMATIC",
    "BOX_MODEL",
    "MODELS_FROZEN",
    "RATE",
    "PromptTuner",
    "promptable_of",
    "score_boxes",
    "slices_plan",
]

log = logging.getLogger("medseg")
BOX_MODEL = "sam-med-box"  # as a model of a training: the decoder for boxes
AUTOMATIC = "sam-med"  # and the one without prompts
MODELS_FROZEN = (AUTOMATIC, BOX_MODEL)
RATE = 0.1  # of the learning rate: the decoder has learnt before
BATCH = 8  # prompts a step
ENCODING_SHARE = 0.5  # of the minutes that embeddings may take
SHOWN_SLICES = 120  # validation slices at most
VALIDATIONS = 8  # during a training
MAX_NORM = 1.0  # of the gradient
LOOKS = 10  # cases whose grids say which way the slices are


def slices_plan(plan: Plan, config: TrainConfig, cases: Sequence[Case]) -> Plan:
    """The plan of a 2D network as one for a frozen encoder: whole slices of square pixels, as they are shown to a reader.

    Slices are across the axis whose step is clearly wider than the other two, else axial, as prompts find them.
    """
    name, _ = _named(config.init)
    changes: dict[str, Any] = {
        "model": AUTOMATIC, "encoder": name, "features": (), "strides": (), "kernels": (), "mirror": (), "swaps": (),
        "batch": config.batch or BATCH, "precision": "32-true",
    }  # fmt: skip
    if plan.orientation is not None:
        changes["orientation"], changes["spacing"] = _as_shown(
            [read_channels(c.images).geometry for c in cases[:LOOKS]]
        )
    if config.model == BOX_MODEL:
        window = dict(zip(("low", "high"), WINDOWS_HU["soft-tissue"], strict=True))
        changes["channels"] = tuple(c.model_copy(update=window) if c.scheme == "ct" else c for c in plan.channels)
    kept = {n: r for n, r in plan.reasons.items() if n not in changes}
    why = f"frozen encoder of {name}: whole slices, as they are shown"
    return plan.model_copy(update={**changes, "reasons": {**kept, "encoder": why}})


def _as_shown(grids: Sequence[Geometry]) -> tuple[str, tuple[float, float, None]]:
    """Orientation with the slices last, and the spacing (mm) within them: the same along rows and columns."""
    order = [[next(n for n, c in enumerate(g.orientation) if c in pair) for pair in ("RL", "AP", "SI")] for g in grids]
    spacings = np.median([np.asarray(g.spacing)[o] for g, o in zip(grids, order, strict=True)], axis=0)
    widest = int(np.argmax(spacings))
    across = widest if spacings[widest] > THICK * np.sort(spacings)[1] else 2
    within = [a for a in range(3) if a != across]
    step = round(float(min(spacings[a] for a in within)), 4)
    return "".join("LPI"[a] for a in (*within, across)), (step, step, None)


def promptable_of(init: str | None) -> PromptableModel:
    """The model to start from: its name, a run folder, or NAME:FILE with a checkpoint; lite-medsam by default."""
    name, file = _named(init)
    return load_promptable(init if init and Path(init).is_dir() else name, file)


def _named(init: str | None) -> tuple[str, str | None]:
    """Layout and checkpoint of what a training starts from."""
    if init and Path(init).is_dir():
        return load_promptable(init).name, None
    name, _, file = (init or "lite-medsam").partition(":")
    if name not in LAYOUTS:
        raise ValueError(
            f"init must be {', '.join(LAYOUTS)} (with :FILE for a checkpoint) or a run folder for models with a frozen "
            f"encoder, got {init!r}"
        )
    return name, file or None


@dataclass
class PromptTuner:
    """The state of one fine-tuning with boxes."""

    run: Run
    config: TrainConfig
    device: torch.device
    training: Sequence[PreparedCase]
    validation: Sequence[PreparedCase]
    folder: Path  # of the embeddings
    started: float
    step: int = 0
    best_iou: float = -1.0
    losses: list[float] = field(default_factory=list)
    before: dict[str, float] = field(default_factory=dict)  # validation before the first step
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.config.seed)
        self.model = promptable_of(self.config.init).to(self.device)
        self.model.prompt_encoder.requires_grad_(self.config.prompt_encoder)
        cache = EmbeddingCache(self.folder, parse_bytes(self.config.cache_size))
        self.boxes = BoxModel(self.model, cache, self.device)
        self.loss = DiceBCELoss(exclusive=False)
        self.batch = self.config.batch or BATCH
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, weight_decay=self.config.weight_decay)
        shown, prompts = self._shown(), prompts_of(self.training)
        if not prompts or not shown:
            raise ValueError(
                f"cases must show a structure of at least {MIN_PIXELS} pixels on a slice in training and validation, got "
                "none"
            )
        self.shown = self._embedded(shown, "validation", math.inf)
        limit = ENCODING_SHARE * 60 * self.config.minutes if self.config.minutes else math.inf
        self.prompts = self._embedded(prompts, "training", limit)
        self.begun_s = self.elapsed_s

    @property
    def elapsed_s(self) -> float:
        """Seconds since the training was started."""
        return time.monotonic() - self.started

    def fit(self) -> None:
        """Train to the end of the budget; the best weights by validation IoU are in the run, and its metrics."""
        per_epoch = math.ceil(len(self.prompts) / self.batch)
        total = (self.config.epochs or 20) * per_epoch
        next_validation = 0.0
        with training_bar(True) as show:
            while True:
                progress = self.step / total
                if self.config.minutes:
                    budget = 60 * self.config.minutes - self.begun_s
                    progress = (self.elapsed_s - self.begun_s) / max(1e-6, budget)
                if min(progress, 1) >= next_validation:
                    begin = time.monotonic()
                    self._validate(progress, self.step / per_epoch)
                    took = (time.monotonic() - begin) / (60 * self.config.minutes) if self.config.minutes else 0
                    next_validation = min(1.0, progress + max(1 / VALIDATIONS, 10 * took)) if progress < 1 else math.inf
                if progress >= 1:
                    break
                self.losses.append(self._train_step(progress))
                self.step += 1
                words = f"step {self.step}  loss {np.mean(self.losses[-20:]):.3f}  best IoU {self.best_iou:.3f}"
                show(progress, words, (self.elapsed_s - self.begun_s) * (1 - progress) / max(progress, 1e-6))
        self._sum_up(per_epoch)

    # -- slices -------------------------------------------------------------------------------------------------------

    def _shown(self) -> list[Prompt]:
        """Validation prompts on slices spread evenly over all cases."""
        return spread(prompts_of(self.validation), SHOWN_SLICES)

    def _embedded(self, prompts: Sequence[Prompt], what: str, limit: float) -> list[Prompt]:
        """The prompts whose slices have an embedding once the time is up, slices in random order until then."""
        slices = list({(p.case.file.path, p.slice): p for p in prompts}.values())
        order = np.random.default_rng(self.config.seed).permutation(len(slices))
        begin, room = time.monotonic(), self.boxes.cache.limit_bytes // (2 * math.prod(self.model.embedding_shape))
        with training_bar(True) as show:
            for done, n in enumerate(order.tolist()):
                if done and (self.elapsed_s > limit or len(self.boxes.keys) >= room):
                    break
                self.boxes.embedding(slices[n])
                left = (time.monotonic() - begin) / (done + 1) * (len(order) - done - 1)
                show((done + 1) / len(order), f"embedding of {what} slices", left)
        kept = [p for p in prompts if (p.case.file.path, p.slice) in self.boxes.keys]
        log.info(
            "%s: %d prompts on %d of %d slices, embedded in %.1f min",
            what, len(kept), len({(p.case.id, p.slice) for p in kept}), len(order), (time.monotonic() - begin) / 60,
        )  # fmt: skip
        return kept

    # -- training -----------------------------------------------------------------------------------------------------

    def _train_step(self, progress: float) -> float:
        """One step on a batch of prompts drawn anew; the loss."""
        random = np.random.default_rng([self.config.seed, self.step])
        drawn = [self.prompts[int(n)] for n in random.integers(len(self.prompts), size=self.batch)]
        masks = [prompt.read()[1] for prompt in drawn]
        boxes = [jittered(box_of(mask), mask.shape, random) for mask in masks]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * RATE * schedule(progress)
        self.model.train()
        logits, predicted = self.boxes.decode(drawn, boxes, [mask.shape for mask in masks])
        losses = []
        for logit, mask, iou in zip(logits, masks, predicted, strict=True):
            target = torch.from_numpy(mask).to(self.device)[None, None]
            found = iou_of(logit.detach() > 0, target)
            losses.append(self.loss(logit, target.float()) + F.mse_loss(iou, found))
        loss = torch.stack(losses).mean()
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], MAX_NORM)
        self.optimizer.step()
        if not math.isfinite(value := float(loss.detach())):
            raise ValueError(f"loss must stay finite, got {value} at step {self.step}; use a lower --learning-rate")
        return value

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, progress: float, epoch: float) -> None:
        """Score the shown slices as volumes; keep the weights if they are the best so far."""
        totals: dict[tuple[str, int], np.ndarray] = {}
        for prompt, (p, t) in zip(self.shown, self.boxes.predicted(self.shown), strict=True):
            place = (prompt.case.id, prompt.structure)
            totals[place] = totals.get(place, np.zeros(3)) + np.array([(p & t).sum(), p.sum(), t.sum()])
        dice = mean(2 * both / (p + t) for both, p, t in totals.values())
        iou = mean(both / (p + t - both) for both, p, t in totals.values())
        at = {"step": self.step, "epoch": epoch, "minutes": self.elapsed_s / 60, "progress": min(1.0, progress)}
        if self.step:
            self.history.append({**at, "loss": float(np.mean(self.losses)), "iou": iou, "dice": dice})
            self.losses = []
        else:
            self.before = {"iou_before": iou, "dice_before": dice}
        log.info("step %d, %.1f min: validation IoU %.3f, Dice %.3f", self.step, at["minutes"], iou, dice)
        write_json(self.run.path / "history.json", self.history)
        if iou > self.best_iou:
            self.best_iou = iou
            state = {"promptable": self.model.name, "fingerprint": self.model.fingerprint}
            save_tensors(self.run.path / WEIGHTS, self.model.state_dict(), state)

    def _sum_up(self, per_epoch: int) -> None:
        """Score the best weights, and report."""
        best = load_promptable(str(self.run.path))
        self.model.load_state_dict(best.state_dict())
        rows = rows_of(self.shown, self.boxes.predicted(self.shown), self.run.plan)
        facts = {
            "steps": self.step,
            "epochs": self.step / per_epoch,
            "minutes": self.elapsed_s / 60,
            "minutes_embedding": self.begun_s / 60,
            "slices": len(self.boxes.keys),
            "step_s": (self.elapsed_s - self.begun_s) / max(1, self.step),
            "peak_memory_gb": peak_bytes() / 1e9,
            "flat_since": flat_since(self.history),
            **self.before,
        }
        write_json(self.run.path / "training.json", facts)
        Evaluation(tuple(rows)).write(self.run.path, force=True)
        report_of_run(
            self.run,
            notes=[
                f"Scores are of exact boxes on {len(self.shown)} structures on slices of the validation cases; before "
                f"training their mean IoU was {self.before['iou_before']:.3f}, Dice {self.before['dice_before']:.3f}."
            ],
        )


def iou_of(mask: Tensor, target: Tensor) -> Tensor:
    """IoU () of two bool masks."""
    return (mask & target).sum() / (mask | target).sum().clamp(min=1)


def score_boxes(
    run: Run | Path, dataset: Dataset, folder: Path, *, slices: int | None = None, device: str = "auto"
) -> dict[str, Evaluation]:
    """Exact boxes on cases that a fine-tuning never saw, answered by it, by what it started from, and by an ellipse.

    Parameters
    ----------
    run : Run or path
        Of a training of "sam-med-box".
    dataset : Dataset
        Other cases, of the same structures.
    folder : Path
        Where preprocessed cases and embeddings are kept.
    slices : int, optional
        At most so many slices, spread evenly over all cases.
    device : str
        "auto", "cpu", "cuda" or "cuda:n".

    Returns
    -------
    dict of str to Evaluation
        "before", "after" and "ellipse" (the one inscribed in each box): metrics of volumes on the planned grid, of slices
        on which a structure has at least 10 pixels.
    """
    run, where = Run.open(run) if isinstance(run, Path) else run, pick_device(device)
    prompts = prompts_of(prepare([c for c in dataset.cases if c.label is not None], run.plan, folder))
    prompts = prompts if slices is None else spread(prompts, slices)
    cache = EmbeddingCache(folder / "embeddings", parse_bytes(run.config.cache_size))
    pairs = {}
    for name, model in (("before", promptable_of(run.config.init)), ("after", load_promptable(str(run.path)))):
        pairs[name] = BoxModel(model.to(where), cache, where).predicted(prompts)
    pairs["ellipse"] = [(ellipse(box_of(true), true.shape), true) for _, true in pairs["after"]]
    return {name: Evaluation(tuple(rows_of(prompts, some, run.plan))) for name, some in pairs.items()}
