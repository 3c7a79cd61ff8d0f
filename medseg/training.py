"""Training: one loop that reads on one screen, on Lightning Fabric.

Every step is a function of the seed and its number (patches, augmentation), so that a resumed run goes on as if it had
never stopped. With a time budget, the learning rate anneals to zero exactly when the budget ends.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.utils.tensorboard import SummaryWriter

from medseg.augmentation import Augmentation
from medseg.config import TrainConfig
from medseg.data import Case, labelled_folds, load_dataset
from medseg.device import pick_device
from medseg.evaluation import Evaluation, score_case
from medseg.inference import Predictor
from medseg.io import read_channels, read_labels
from medseg.losses import DeepSupervision, DiceBCELoss
from medseg.patches import draw_batch
from medseg.plan import Plan, make_plan
from medseg.prepared import PreparedCase, prepare
from medseg.report import Block, picture_blocks, report_of_run
from medseg.run import Run, write_json

__all__ = ["require_fresh", "train"]

log = logging.getLogger("medseg")
SHOWN_CASES = 24  # validation cases scored during training; all of them at the end
MIN_STEPS = 20  # of an epoch
WARM_UP = 0.03  # share of the training over which the learning rate rises


def train(config: TrainConfig, plan: Plan | None = None, *, cache: Path | None = None) -> Run:
    """Train a model and validate it on whole cases.

    Parameters
    ----------
    config : TrainConfig
        What to train, on what, for how long. ``config.resume`` goes on from the last checkpoint of ``config.out``.
    plan : Plan, optional
        A plan to use instead of ``config.plan`` or of planning.
    cache : Path, optional
        Folder of preprocessed cases that is used and kept; by default one inside the run, removed at the end.

    Returns
    -------
    Run
        The run folder: best weights by mean volumetric IoU of the validation cases on their native grids, checkpoint,
        history, metrics.

    Raises
    ------
    FileExistsError
        If the run folder exists and neither ``resume`` nor ``force`` is set.
    ValueError
        If data, plan or configuration do not fit.
    KeyboardInterrupt
        After writing a checkpoint; the log says how to resume.
    """
    started = time.monotonic()
    device = str(pick_device(config.device))
    dataset = load_dataset(config.dataset, group=config.group)
    parts = labelled_folds(dataset, config.folds)
    training, validation = parts[config.fold]
    begun = config.resume and (config.out / "plan.json").is_file()
    if begun:
        run = _resumed(config, plan, [c.id for c in validation])
        config = run.config
    else:
        require_fresh(config)
        with _bar("planning", len(training)) as update:
            plan = plan or (Plan.load(config.plan) if config.plan else None)
            plan = plan or make_plan(
                dataset, training, model=config.model, device=device, minutes=config.minutes, workers=config.workers,
                progress=update,
            )  # fmt: skip
        if config.out.exists():
            shutil.rmtree(config.out)
        run = Run.create(config.out, config, plan, [c.id for c in validation])
    try:
        with _bar("preprocessing", len(training) + len(validation)) as update:
            folder = cache or run.path / "cache"
            prepared = prepare([*training, *validation], run.plan, folder, workers=config.workers, progress=update)
    except KeyboardInterrupt:
        log.warning("stopped while preprocessing; go on with the same command and --resume")
        raise
    learner = Learner(run, config, prepared[: len(training)], validation, prepared[len(training) :], started)
    learner.fit()
    if cache is None:
        shutil.rmtree(folder)
    return run


def require_fresh(config: TrainConfig) -> None:
    """The run folder must be new, or one that medseg made if ``force``: nothing else is ever deleted."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"run folder must be a folder, got the file {out}; use another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    if not (out / "plan.json").is_file():
        raise FileExistsError(f"run folder must be new or a former run, got {out} with other files; use another --out")
    if not config.force:
        raise FileExistsError(f"run folder must be new, got {out}; use --resume, --force or another --out")
    if config.dataset.resolve().is_relative_to(out.resolve()):
        raise FileExistsError(f"run folder must not hold the data set, got {out}; use another --out")


def _resumed(config: TrainConfig, plan: Plan | None, validation: list[str]) -> Run:
    """The run to go on with; only its length and what does not change its result may differ from before."""
    run = Run.open(config.out)
    free = {"epochs", "minutes", "device", "resume", "force", "workers", "out", "dataset", "precision"}
    for name in type(config).model_fields:
        old, new = getattr(run.config, name), getattr(config, name)
        if name not in free and new != old and not (name in ("model", "plan") and new is None):
            raise ValueError(f"{name} must stay {old!r} in a resumed run, got {new!r}")
    if plan is not None and plan != run.plan:
        raise ValueError(f"plan must stay that of {config.out} in a resumed run, got another")
    if run.validation_ids() != validation:
        raise ValueError(
            f"validation cases must stay the same in a resumed run, got others from {config.dataset}; train anew"
        )
    if config.epochs is None and config.minutes is None:
        config = config.model_copy(update={"epochs": run.config.epochs, "minutes": run.config.minutes})
    config.save(run.path / "config.json", force=True)
    return Run(run.path, config, run.plan)


@dataclass
class Learner:
    """The state of one training."""

    run: Run
    config: TrainConfig
    training: Sequence[PreparedCase]
    validation: Sequence[Case]
    prepared_validation: Sequence[PreparedCase]
    started: float
    step: int = 0
    before_s: float = 0.0  # seconds spent before a resume
    best_iou: float = -1.0
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, plan = self.config, self.run.plan
        torch.manual_seed(config.seed)
        self.device = pick_device(config.device)
        self.batch = config.batch or plan.batch
        network = self.run.build().to(memory_format=_memory_format(plan.dims))
        auto = config.precision == "auto"
        precision: Any = _fastest_precision(network, plan, self.device) if auto else config.precision
        self.precision = str(precision)
        devices: Any = [self.device.index or 0] if self.device.type == "cuda" else 1
        self.fabric = Fabric(accelerator=self.device.type, devices=devices, precision=precision)
        optimizer = torch.optim.AdamW(
            network.parameters(),
            config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cpu",
        )
        self.network, self.optimizer = self.fabric.setup(network, optimizer)
        self.network.mark_forward_method("multiscale")
        self.ema = {name: t.detach().clone() for name, t in self.network.module.state_dict().items()}
        self.loss = DeepSupervision(DiceBCELoss(exclusive=True))
        self.augmentation = Augmentation.of(plan)
        self.epoch_steps = max(MIN_STEPS, math.ceil(len(self.training) / self.batch))
        self.total_steps = None if config.minutes else (config.epochs or 100) * self.epoch_steps
        self.validation_s = 0.0
        self.next_validation = 0.1
        if config.resume and self.run.has_checkpoint():
            self._restore(*self.run.load_checkpoint())

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on this training, those before a resume included."""
        return self.before_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1: of the steps, or of the minutes less the final validation's."""
        if self.total_steps is not None:
            return min(1.0, self.step / self.total_steps)
        budget = 60 * (self.config.minutes or 0)
        cases = len(self.validation) / max(1, len(self.shown))
        return min(1.0, self.elapsed_s / max(1e-6, budget - 1.5 * self.validation_s * cases))

    @property
    def shown(self) -> list[int]:
        """Validation cases scored during training, evenly spread."""
        count = min(SHOWN_CASES, len(self.validation))
        return [round(i) for i in np.linspace(0, len(self.validation) - 1, count)]

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the budget, then validate the best weights on all cases."""
        writer = SummaryWriter(str(self.run.path / "tensorboard"))
        threads = ThreadPoolExecutor(1)
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        try:
            with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bar:
                task = bar.add_task("training", total=1.0, left="")
                ahead = threads.submit(self._draw, self.step)
                losses: list[float] = []
                while self.progress < 1 or not self.history:  # at least one step and one validation
                    images, labels, known = ahead.result()
                    ahead = threads.submit(self._draw, self.step + 1)
                    losses.append(self._train_step(images, labels, known))
                    self.step += 1
                    words = f"epoch {self.step / self.epoch_steps:.1f}  loss {np.mean(losses[-20:]):.3f}"
                    words += f"  best IoU {self.best_iou:.3f}" if self.best_iou >= 0 else ""
                    bar.update(task, completed=self.progress, description=words, left=self._time_left())
                    if self.progress >= self.next_validation or self.progress >= 1:
                        self._validate(float(np.mean(losses)), writer)
                        losses = []
        except KeyboardInterrupt:
            self._checkpoint()
            log.warning("stopped at step %d; go on with the same command and --resume", self.step)
            raise
        finally:
            threads.shutdown(cancel_futures=True)
            writer.close()
        self._finish()

    def _draw(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        return draw_batch(self.training, self.run.plan, self.batch, self.config.seed, step)

    def _train_step(self, images: Tensor, labels: Tensor, known: Tensor) -> float:
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        images, labels, known = self.augmentation(
            images.to(self.device), labels.to(self.device), known.to(self.device), generator
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * _schedule(self.progress)
        self.network.train()
        images = images.to(memory_format=_memory_format(self.run.plan.dims))
        loss = self.loss(self.network.multiscale(images), labels)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise ValueError(
                f"loss must stay finite, got {value} at step {self.step}; lower --learning-rate or use --precision 32-true"
            )
        self.optimizer.zero_grad()
        self.fabric.backward(loss)
        self.fabric.clip_gradients(self.network, self.optimizer, max_norm=12.0)
        self.optimizer.step()
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        for name, tensor in self.network.module.state_dict().items():
            self.ema[name].lerp_(tensor.detach(), 1 - decay)
        return value

    def _validate(self, loss: float, writer: SummaryWriter) -> None:
        begin = time.monotonic()
        predictor = self._predictor()
        rows = [row for i in self.shown for row in self._score(predictor, i, surface=False)]
        self.validation_s = time.monotonic() - begin
        iou = _mean(row["iou"] for row in rows)
        at = {"step": self.step, "epoch": self.step / self.epoch_steps, "minutes": self.elapsed_s / 60}
        self.history.append({**at, "loss": loss, "iou": iou, "dice": _mean(row["dice"] for row in rows)})
        for name in ("loss", "iou", "dice"):
            writer.add_scalar(name, self.history[-1][name], self.step)
        log.info(
            "epoch %.1f, %.1f min: loss %.3f, validation IoU %.3f, Dice %.3f",
            at["epoch"], at["minutes"], loss, iou, self.history[-1]["dice"],
        )  # fmt: skip
        if iou >= self.best_iou or not math.isfinite(self.best_iou):
            self.best_iou = iou
            self.run.save_weights(self.ema)
        self._checkpoint()
        write_json(self.run.path / "history.json", self.history)
        spent = self.elapsed_s / max(self.progress, 1e-6)  # expected seconds of the whole training
        self.next_validation = self.progress + max(0.05, 9 * self.validation_s / spent)

    def _score(self, predictor: Predictor, index: int, surface: bool) -> list[dict[str, Any]]:
        """Rows of metrics of one validation case, predicted with the averaged weights, on its native grid."""
        case, prepared = self.validation[index], self.prepared_validation[index]
        if case.label is None:
            raise ValueError(f"validation case must have a label, got none for {case.id}")
        reference = read_labels(case.label).exclusive()
        prediction = predictor.from_prepared(prepared.image, prepared.geometry, reference.geometry)
        return score_case(case.id, prediction, reference, surface=surface)

    def _predictor(self) -> Predictor:
        network = self.run.build()
        network.load_state_dict(self.ema)
        network = network.to(self.device).to(memory_format=_memory_format(self.run.plan.dims))  # type: ignore[call-overload]
        return Predictor(self.run.plan, network.eval(), self.device, self.precision)

    def _finish(self) -> None:
        predictor = replace(Predictor.load(self.run, str(self.device)), precision=self.precision)
        with _bar("validation", len(self.validation)) as update:
            rows = []
            for i in range(len(self.validation)):
                rows += self._score(predictor, i, surface=True)
                update(i + 1)
        evaluation = Evaluation(tuple(rows))
        evaluation.write(self.run.path, force=True)
        report_of_run(self.run, pictures=self._pictures(predictor, evaluation))
        log.info(
            "validation of %d cases: mean IoU %.3f, mean Dice %.3f after %.1f min",
            len(self.validation), evaluation.mean("iou"), evaluation.mean("dice"), self.elapsed_s / 60,
        )  # fmt: skip

    def _pictures(self, predictor: Predictor, evaluation: Evaluation) -> list[Block]:
        """The worst and the median validation case, with contours of prediction and reference."""
        dice = [_mean(r["dice"] for r in evaluation.rows if r["case"] == c.id) for c in self.validation]
        order = np.argsort(dice)
        blocks: list[Block] = []
        for name, i in {"worst": order[0], "median": order[len(order) // 2]}.items():
            case = self.validation[i]
            image, reference = read_channels(case.images), read_labels(str(case.label)).exclusive()
            prediction, _ = predictor.predict(image)
            blocks += picture_blocks(f"{name} case {case.id}, mean Dice {dice[i]:.3f}", image, prediction, reference)
        return blocks

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        tensors = {f"model.{n}": t for n, t in self.network.module.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{n}": torch.as_tensor(v) for n, v in entry.items()}
        state = {
            "step": self.step, "elapsed_s": self.elapsed_s, "best_iou": self.best_iou, "history": self.history,
            "validation_s": self.validation_s, "next_validation": self.next_validation,
        }  # fmt: skip
        self.run.save_checkpoint(tensors, state)

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.network.module.load_state_dict(parts["model"])
        self.ema = {n: t.to(self.device) for n, t in parts["ema"].items()}
        moments: dict[int, dict[str, Tensor]] = {}
        parameters = self.optimizer.param_groups[0]["params"]
        for name, tensor in parts["optimizer"].items():
            index, key = name.split(".", 1)
            if tensor.ndim:  # the fused optimiser walks parameters and moments in memory order: it must be the same
                tensor = torch.empty_like(parameters[int(index)]).copy_(tensor)
            moments.setdefault(int(index), {})[key] = tensor
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.step, self.before_s, self.best_iou = state["step"], state["elapsed_s"], state["best_iou"]
        self.history, self.validation_s = state["history"], state["validation_s"]
        self.next_validation = state["next_validation"]

    def _time_left(self) -> str:
        left = self.elapsed_s * (1 - self.progress) / max(self.progress, 1e-6)
        return f"{int(left // 60)}:{int(left % 60):02d} left"


def _schedule(progress: float) -> float:
    """Learning rate as a share of its maximum: a short linear rise, then half a cosine down to 0."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _mean(values: Iterable[float]) -> float:
    array = np.array(list(values), float)
    return float(np.nanmean(array)) if np.isfinite(array).any() else math.nan


def _memory_format(dims: int) -> torch.memory_format:
    return torch.channels_last if dims == 2 else torch.channels_last_3d


def _fastest_precision(network: nn.Module, plan: Plan, device: torch.device) -> str:
    """bf16 on GPUs that have it, fp16 on others; on a CPU whichever of fp32 and bf16 does a step faster, by trying."""
    if device.type == "cuda":
        return "bf16-mixed" if torch.cuda.is_bf16_supported() else "16-mixed"
    image = torch.randn(1, len(plan.channels), *plan.patch).to(memory_format=_memory_format(plan.dims))
    seconds = {}
    for precision in ("32-true", "bf16-mixed"):
        for _ in range(3):  # the first passes warm up
            begin = time.perf_counter()
            with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
                logits = network(image)
            logits.float().mean().backward()
            seconds[precision] = time.perf_counter() - begin
    network.zero_grad(set_to_none=True)
    return min(seconds, key=lambda p: seconds[p])


@contextmanager
def _bar(what: str, total: int) -> Iterator[Any]:
    """A progress bar on stderr; gives the function that sets it."""
    with Progress(console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
