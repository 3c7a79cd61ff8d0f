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
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from medseg.config import TrainConfig
from medseg.embeddings import EmbeddingCache, embedding_key
from medseg.evaluation import Evaluation, score_case
from medseg.losses import DiceBCELoss
from medseg.models.sam import PromptableModel, load_promptable
from medseg.models.sam_layouts import LAYOUTS
from medseg.network_plan import parse_bytes
from medseg.pace import flat_since, peak_bytes, schedule, training_bar
from medseg.plan import Plan
from medseg.prepared import PreparedCase
from medseg.report import report_of_run
from medseg.run import WEIGHTS, Run, save_tensors, write_json
from medseg.scoring import mean
from medseg.volume import LabelMap

__all__ = ["AUTOMATIC", "BOX_MODEL", "MODELS_FROZEN", "RATE", "PromptTuner", "picture", "promptable_of", "slices_plan"]

log = logging.getLogger("medseg")
BOX_MODEL = "sam-med-box"  # as a model of a training: the decoder for boxes
AUTOMATIC = "sam-med"  # and the one without prompts
MODELS_FROZEN = (AUTOMATIC, BOX_MODEL)
MIN_PIXELS = 10  # of a structure on a slice to be prompted for
JITTER = 20 / 1024  # of the longest side: by so much each side of a box may lie outside of the structure
RATE = 0.1  # of the learning rate: the decoder has learnt before
BATCH = 8  # prompts a step
SOFT_TISSUE_HU = (-160.0, 240.0)  # the window that MedSAM's family learnt CT in
ENCODING_SHARE = 0.5  # of the minutes that embeddings may take
SHOWN_SLICES = 120  # validation slices at most
VALIDATIONS = 8  # during a training
MAX_NORM = 1.0  # of the gradient
DISPLAY = dict(zip("RLAPSI", "LLPPII", strict=True))  # slices lie as they are shown: right on the left, head up


def slices_plan(plan: Plan, config: TrainConfig) -> Plan:
    """The plan of a 2D network as one for a frozen encoder: whole slices, lying as they are shown to a reader."""
    name, _ = _named(config.init)
    changes: dict[str, Any] = {
        "model": AUTOMATIC, "encoder": name, "features": (), "strides": (), "kernels": (), "mirror": (), "swaps": (),
        "batch": config.batch or BATCH, "precision": "32-true",
    }  # fmt: skip
    if plan.orientation is not None:
        changes["orientation"] = "".join(DISPLAY[letter] for letter in plan.orientation)
    if config.model == BOX_MODEL:
        window = {"low": SOFT_TISSUE_HU[0], "high": SOFT_TISSUE_HU[1]}
        changes["channels"] = tuple(c.model_copy(update=window) if c.scheme == "ct" else c for c in plan.channels)
    kept = {n: r for n, r in plan.reasons.items() if n not in changes}
    why = f"frozen encoder of {name}: whole slices, as they are shown"
    return plan.model_copy(update={**changes, "reasons": {**kept, "encoder": why}})


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


def picture(image: np.ndarray) -> Tensor:
    """What a promptable model sees of a slice (C, I, J): (3, J, I) in 0..1, each channel stretched to 8 bits.

    Rows of the picture run along J, columns along I: planes are stored with the column first.
    """
    low, high = image.min((1, 2), keepdims=True), image.max((1, 2), keepdims=True)
    scaled = np.round((image - low) / np.maximum(high - low, 1e-6) * 255).astype(np.float32) / 255
    return torch.from_numpy(scaled[[n % len(scaled) for n in range(3)]].transpose(0, 2, 1).copy())


@dataclass(frozen=True)
class Prompt:
    """One structure on one slice of a case."""

    case: PreparedCase
    slice: int
    structure: int  # from 0, in the order of the plan

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Slice (C, I, J) and mask (J, I)."""
        shape = self.case.geometry.shape
        image, label = self.case.window((0, 0, self.slice), (shape[0], shape[1], self.slice + 1))
        layered = label.ndim == 4
        mask = label[self.structure] >= 0.5 if layered else label == self.structure + 1
        return image[..., 0].astype(np.float32), mask[..., 0].T.copy()


def prompts_of(cases: Sequence[PreparedCase]) -> list[Prompt]:
    """Every structure on every slice of cases, where it is large enough and was drawn, slice by slice."""
    found = []
    for case in cases:
        label = case.label
        layers = [label[n] >= 0.5 if label.ndim == 4 else label == n + 1 for n in range(len(case.known))]
        counts = np.stack([layer.sum((0, 1)) for layer in layers])
        found += [
            Prompt(case, int(k), int(n)) for k, n in np.argwhere(counts.T >= MIN_PIXELS).tolist() if case.known[n]
        ]
    return found


def box_of(mask: np.ndarray) -> np.ndarray:
    """x0, y0, x1, y1 (pixels, the outermost of the structure) of a mask (rows, columns)."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return np.array([columns[0], rows[0], columns[-1], rows[-1]], np.float32)


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
        self.cache = EmbeddingCache(self.folder, parse_bytes(self.config.cache_size))
        self.loss = DiceBCELoss(exclusive=False)
        self.keys: dict[tuple[Path, int], str] = {}  # of slices that were embedded
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
        by_slice = [list(group) for _, group in groupby(prompts_of(self.validation), lambda p: (p.case.id, p.slice))]
        places = np.linspace(0, len(by_slice) - 1, min(SHOWN_SLICES, len(by_slice))).round().astype(int)
        return [prompt for n in dict.fromkeys(places.tolist()) for prompt in by_slice[n]]

    def _embedded(self, prompts: Sequence[Prompt], what: str, limit: float) -> list[Prompt]:
        """The prompts whose slices have an embedding once the time is up, slices in random order until then."""
        slices = list({(p.case.file.path, p.slice): p for p in prompts}.values())
        order = np.random.default_rng(self.config.seed).permutation(len(slices))
        begin, room = time.monotonic(), self.cache.limit_bytes // (2 * math.prod(self.model.embedding_shape))
        with training_bar(True) as show:
            for done, n in enumerate(order.tolist()):
                if done and (self.elapsed_s > limit or len(self.keys) >= room):
                    break
                self.embedding(slices[n])
                left = (time.monotonic() - begin) / (done + 1) * (len(order) - done - 1)
                show((done + 1) / len(order), f"embedding of {what} slices", left)
        kept = [p for p in prompts if (p.case.file.path, p.slice) in self.keys]
        log.info(
            "%s: %d prompts on %d of %d slices, embedded in %.1f min", what, len(kept), min(done + 1, len(order)),
            len(order), (time.monotonic() - begin) / 60,
        )  # fmt: skip
        return kept

    def embedding(self, prompt: Prompt) -> Tensor:
        """Embedding (256, h, h) of the slice of a prompt, float16 on the CPU."""
        place = (prompt.case.file.path, prompt.slice)
        if place not in self.keys:
            self.keys[place] = self._key(prompt)
        return self.cache.get(self.keys[place], lambda: self._encode(prompt))

    def _key(self, prompt: Prompt) -> str:
        image = (picture(prompt.read()[0]).numpy() * 255).round().astype(np.uint8)
        return embedding_key(image, self.model.fingerprint, None, self.model.size)

    def _encode(self, prompt: Prompt) -> Tensor:
        return self.model.encode(picture(prompt.read()[0])[None].to(self.device))[0]

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
        logits, predicted = self._decode(drawn, boxes, [mask.shape for mask in masks])
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

    def _decode(
        self, prompts: Sequence[Prompt], boxes: Sequence[np.ndarray], sizes: Sequence[tuple[int, ...]]
    ) -> tuple[list[Tensor], Tensor]:
        """Logits (1, 1, rows, columns) of each prompt on its slice, and predicted IoU (N,)."""
        embeddings = torch.stack([self.embedding(p) for p in prompts]).to(self.device).float()
        square = [self.model.on_square(torch.from_numpy(b), s) for b, s in zip(boxes, sizes, strict=True)]
        sparse, dense = self.model.prompt_encoder(None, torch.stack(square).to(self.device), None)
        low, iou = self.model.masks(embeddings, sparse, dense, tokens=1)
        return [self.model.on_image(one[None], s) for one, s in zip(low, sizes, strict=True)], iou[:, 0]

    # -- validation ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def predicted(self, prompts: Sequence[Prompt]) -> list[tuple[np.ndarray, np.ndarray]]:
        """Predicted and true mask (rows, columns) of each prompt, with exact boxes."""
        self.model.eval()
        pairs = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            masks = [p.read()[1] for p in part]
            logits, _ = self._decode(part, [box_of(m) for m in masks], [m.shape for m in masks])
            pairs += [((logit[0, 0] > 0).cpu().numpy(), m) for logit, m in zip(logits, masks, strict=True)]
        return pairs

    def _validate(self, progress: float, epoch: float) -> None:
        """Score the shown slices as volumes; keep the weights if they are the best so far."""
        totals: dict[tuple[str, int], np.ndarray] = {}
        for prompt, (p, t) in zip(self.shown, self.predicted(self.shown), strict=True):
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
        rows: list[dict[str, Any]] = []
        for case, prompts in groupby(self.shown, lambda p: p.case):
            rows += self._rows(case, list(prompts))
        facts = {
            "steps": self.step,
            "epochs": self.step / per_epoch,
            "minutes": self.elapsed_s / 60,
            "minutes_embedding": self.begun_s / 60,
            "slices": len(self.keys),
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

    def _rows(self, case: PreparedCase, prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
        """Metrics of a case on the planned grid; slices that are not shown are empty on both sides."""
        structures = self.run.plan.as_structures()
        layers = np.zeros((2, len(structures), *case.geometry.shape), bool)
        for prompt, pair in zip(prompts, self.predicted(prompts), strict=True):
            for layer, mask in zip(layers, pair, strict=True):
                layer[prompt.structure, :, :, prompt.slice] = mask.T
        found, true = (LabelMap(layer, case.geometry, structures) for layer in layers)
        return score_case(case.id, found, true, known=[structures[p.structure].number for p in prompts])


def iou_of(mask: Tensor, target: Tensor) -> Tensor:
    """IoU () of two bool masks."""
    return (mask & target).sum() / (mask | target).sum().clamp(min=1)


def jittered(box: np.ndarray, size: Sequence[int], random: np.random.Generator) -> np.ndarray:
    """A box whose sides lie up to 20 pixels of 1024 further out, as those that a reader draws do."""
    height, width = size
    out = random.uniform(0, JITTER * max(size), 4).astype(np.float32)
    moved = box + out * np.array([-1, -1, 1, 1], np.float32)
    return np.clip(moved, 0, np.array([width - 1, height - 1] * 2, np.float32))
