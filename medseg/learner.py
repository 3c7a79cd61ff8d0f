"""The training loop, on Lightning Fabric: on one screen, exact when resumed, annealed to the end of its budget.

Every step is a function of the seed and its number (patches, augmentation), so that a resumed run goes on as if it had
never stopped. With a time budget, the learning rate anneals to zero exactly when the budget ends.
"""

from __future__ import annotations

import logging
import math
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil
import torch
from lightning_fabric import Fabric
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.utils.tensorboard import SummaryWriter

from medseg.augmentation import Augmentation
from medseg.config import TrainConfig
from medseg.inference import Predictor
from medseg.losses import DeepSupervision, DiceBCELoss
from medseg.models.network import SegmentationNetwork
from medseg.patches import draw_batch
from medseg.prepared import PreparedCase
from medseg.run import Run, write_json
from medseg.scoring import Scoring, mean

if sys.platform != "win32":
    import resource

__all__ = ["Learner", "memory_format"]

log = logging.getLogger("medseg")
MIN_STEPS = 20  # of an epoch
WARM_UP = 0.03  # share of the training over which the learning rate rises
CHECKPOINT_S = 120.0  # between checkpoints
ROLLBACKS = 3  # times that a loss which is not finite is mended by going back
CHOICES = 1.5  # validations that choosing the postprocessing may last
PLATEAU = 0.002  # change of the validation IoU that counts as none
COMPILE_MINUTES = 10.0  # of training on a GPU from which a minute of compilation pays
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Learner:
    """The state of one training."""

    run: Run
    config: TrainConfig
    fabric: Fabric
    network: SegmentationNetwork
    training: Sequence[PreparedCase]
    validation: Scoring
    started: float
    step: int = 0
    before_s: float = 0.0  # seconds spent before a resume
    network_s: float = 0.0  # seconds spent in forward, backward and optimiser
    best_iou: float = -1.0
    rate: float = 1.0  # factor of the learning rate, halved when a loss was not finite
    rollbacks: int = 0
    losses: list[float] = field(default_factory=list)  # since the last validation
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        config, plan = self.config, self.run.plan
        self.device = self.fabric.device
        self.batch = config.batch or plan.batch
        if self.batch % self.fabric.world_size:
            raise ValueError(
                f"batch must be divisible by the number of processes {self.fabric.world_size}, got {self.batch}; "
                "set --batch"
            )
        network = self.network.to(memory_format=memory_format(plan.dims))  # type: ignore[call-overload]
        if self.device.type == "cuda" and (config.minutes or COMPILE_MINUTES) >= COMPILE_MINUTES:
            network.multiscale = torch.compile(network.multiscale)  # type: ignore[method-assign]
        self.module, self.optimizer = self.fabric.setup(network, self._optimizer())
        self.module.mark_forward_method("multiscale")
        self.ema = {name: t.detach().clone() for name, t in network.state_dict().items()}
        together = _over_processes if self.fabric.world_size > 1 else None
        self.loss = DeepSupervision(DiceBCELoss(exclusive=not plan.overlapping, together=together))
        self.augmentation = Augmentation.of(plan, config.channel_dropout)
        self.epoch_steps = max(MIN_STEPS, math.ceil(len(self.training) / self.batch))
        self.total_steps = None if config.minutes else (config.epochs or 100) * self.epoch_steps
        self.validation_s = 0.0
        self.next_validation = 0.1
        self.written = time.monotonic()
        if config.resume and self.run.has_checkpoint():
            self._restore(*self.run.load_checkpoint())
        else:
            self._checkpoint()  # what a loss that is not finite at once goes back to

    def _optimizer(self) -> torch.optim.Optimizer:
        config, parameters = self.config, [p for p in self.network.parameters() if p.requires_grad]
        if config.optimizer == "sgd":
            return torch.optim.SGD(
                parameters, config.learning_rate, momentum=0.99, nesterov=True, weight_decay=config.weight_decay
            )
        fused = self.device.type == "cpu"
        return torch.optim.AdamW(parameters, config.learning_rate, weight_decay=config.weight_decay, fused=fused)

    # -- time ---------------------------------------------------------------------------------------------------------

    @property
    def elapsed_s(self) -> float:
        """Seconds spent on this training, those before a resume included."""
        return self.before_s + time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Share of the training that is done, 0 to 1: of the steps, or of the minutes less what comes after it."""
        if self.total_steps is not None:
            return min(1.0, self.step / self.total_steps)
        budget = 60 * (self.config.minutes or 0)
        cases = len(self.validation.cases) / max(1, len(self.validation.shown))
        after = (1.5 * cases + CHOICES) * self.validation_s  # the last validation, surfaces too; choices made on it
        share = min(1.0, self.elapsed_s / max(1e-6, budget - after))
        return share if self.fabric.world_size == 1 else float(self.fabric.broadcast(share))  # one clock for all

    def _expectation(self, progress: float) -> str:
        """What the training will have done at its end, at the pace so far."""
        spent = self.elapsed_s / max(progress, 1e-6)
        steps = self.total_steps or round(self.step / max(progress, 1e-6))
        return f"about {steps} steps ({steps / self.epoch_steps:.1f} epochs) in {spent / 60:.1f} min"

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the budget; the best weights are in the run."""
        writer = SummaryWriter(str(self.run.path / "tensorboard")) if self.fabric.is_global_zero else None
        with ThreadPoolExecutor(1) as threads, _terminable(), _progress(self.fabric) as show:
            ahead = threads.submit(self._draw, self.step)
            try:
                progress, expected = self.progress, self.step > 0
                while progress < 1 or not self.history:  # at least one step and one validation
                    batch, ahead = self._next(ahead, threads)
                    loss = self._train_step(batch, progress)
                    if not math.isfinite(loss):
                        self._roll_back(loss)
                        ahead = threads.submit(self._draw, self.step)
                        progress = self.progress
                        continue
                    self.losses.append(loss)
                    self.step += 1
                    progress = self.progress
                    if not expected and (self.step >= 20 and progress >= 0.01):
                        log.info("expecting %s", self._expectation(progress))
                        expected = True
                    show(progress, self._words(), self.elapsed_s * (1 - progress) / max(progress, 1e-6))
                    if progress >= self.next_validation or progress >= 1:
                        self._validate(writer, progress)
                    elif time.monotonic() - self.written > CHECKPOINT_S:
                        self._checkpoint()
            except KeyboardInterrupt:
                self._checkpoint()
                log.warning("stopped at step %d; go on with the same command and --resume", self.step)
                raise
            finally:
                ahead.cancel()
                if writer:
                    writer.close()
        self._sum_up()

    def _draw(self, step: int) -> Batch:
        return draw_batch(self.training, self.run.plan, self.batch, self.config.seed, step)

    def _next(self, ahead: Future[Batch], threads: ThreadPoolExecutor) -> tuple[Batch, Future[Batch]]:
        """The batch that was drawn ahead, while the next one is drawn."""
        batch = ahead.result()
        return batch, threads.submit(self._draw, self.step + 1)

    def _train_step(self, batch: Batch, progress: float) -> float:
        """One step on a whole batch: of several processes each takes its share of it. Returns the loss."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        images, labels, known = self.augmentation(
            batch[0].to(self.device), batch[1].to(self.device), batch[2], generator
        )
        own = slice(self.fabric.global_rank, None, self.fabric.world_size)
        images = images[own].to(memory_format=memory_format(self.run.plan.dims))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.rate * _schedule(progress)
        torch.manual_seed(self.config.seed * 1_000_003 + self.step)  # of dropout, where the network has any
        begin = time.monotonic()
        self.module.train()
        self.optimizer.zero_grad()
        count = min(self.config.accumulate, len(images))
        parts = list(zip(*(t.chunk(count) for t in (images, labels[own], known[own])), strict=True))
        total = 0.0
        for n, (image, label, is_known) in enumerate(parts, start=1):
            with self.fabric.no_backward_sync(self.module, enabled=n < len(parts)):
                loss = self.loss(self.module.multiscale(image), label, is_known) / len(parts)
                total += float(loss.detach())
                if not math.isfinite(total):
                    return total
                self.fabric.backward(loss)
        scaled = self.fabric._precision.precision == "16-mixed"  # whose scaler skips what is not finite by itself
        norm = self.fabric.clip_gradients(self.module, self.optimizer, max_norm=12.0, error_if_nonfinite=False)
        if not scaled and norm is not None and not bool(torch.isfinite(norm)):
            return math.nan
        self.optimizer.step()
        self._average()
        self.network_s += time.monotonic() - begin
        return total

    def _average(self) -> None:
        """Move the averaged weights, which are those that predict, towards the present ones."""
        decay = min(0.995, (1 + self.step) / (10 + self.step))
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                self.ema[name].lerp_(tensor.detach(), 1 - decay)
            else:
                self.ema[name].copy_(tensor)

    def _roll_back(self, loss: float) -> None:
        """Go back to the last checkpoint with half the learning rate."""
        at, rate = self.step, self.rate / 2
        if self.rollbacks == ROLLBACKS:
            raise ValueError(
                f"loss must stay finite, got {loss} at step {at} after {ROLLBACKS} returns to a checkpoint with half the "
                "learning rate; lower --learning-rate, use --precision 32-true, or run medseg check on the data"
            )
        rollbacks, elapsed = self.rollbacks + 1, self.elapsed_s
        self._restore(*self.run.load_checkpoint())
        self.rate, self.rollbacks = rate, rollbacks
        self.before_s, self.started = elapsed, time.monotonic()
        log.warning(
            "loss was %s at step %d: back to step %d with %g of the learning rate (exploding gradients, or numbers beyond "
            "the range of %s)", loss, at, self.step, rate, self.run.plan.precision,
        )  # fmt: skip
        self._checkpoint()

    def _words(self) -> str:
        words = f"epoch {self.step / self.epoch_steps:.1f}  loss {np.mean(self.losses[-20:]):.3f}"
        return words + (f"  best IoU {self.best_iou:.3f}" if self.best_iou >= 0 else "")

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, writer: SummaryWriter | None, progress: float) -> None:
        begin = time.monotonic()
        rows = self.validation.score(self.predictor(), self.validation.shown, surface=False)
        self.validation_s = time.monotonic() - begin
        iou, dice = mean(row["iou"] for row in rows), mean(row["dice"] for row in rows)
        at = {"step": self.step, "epoch": self.step / self.epoch_steps, "minutes": self.elapsed_s / 60}
        self.history.append({**at, "progress": progress, "loss": float(np.mean(self.losses)), "iou": iou, "dice": dice})
        self.losses = []
        for name in ("loss", "iou", "dice") if writer else ():
            writer.add_scalar(name, self.history[-1][name], self.step)  # type: ignore[union-attr]
        log.info(
            "epoch %.1f, %.1f min: loss %.3f, validation IoU %.3f, Dice %.3f",
            at["epoch"], at["minutes"], self.history[-1]["loss"], iou, dice,
        )  # fmt: skip
        if iou >= self.best_iou or not math.isfinite(self.best_iou):
            self.best_iou = iou
            if self.fabric.is_global_zero:
                self.run.save_weights(self.ema)
        spent = self.elapsed_s / max(progress, 1e-6)  # expected seconds of the whole training
        by_clock = 9 * self.validation_s / spent if self.total_steps is None else 0.05
        self.next_validation = progress + max(0.05, by_clock)
        self._checkpoint()
        if self.fabric.is_global_zero:
            write_json(self.run.path / "history.json", self.history)

    def predictor(self) -> Predictor:
        """The averaged weights as they are now."""
        network = self.run.build()
        network.load_state_dict(self.ema)
        network = network.to(self.device).to(memory_format=memory_format(self.run.plan.dims))  # type: ignore[call-overload]
        return Predictor(self.run.plan, network.eval(), self.device, self.fabric._precision.precision)

    def _sum_up(self) -> None:
        """Say and keep what the training took and whether it had stopped to improve."""
        flat = _flat_since(self.history)
        if flat < 0.7:
            log.info("validation IoU changed by less than %g since %.0f %% of the training", PLATEAU, 100 * flat)
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else _peak_bytes()
        facts = {
            "steps": self.step,
            "epochs": self.step / self.epoch_steps,
            "minutes": self.elapsed_s / 60,
            "step_s": self.elapsed_s / max(1, self.step),
            "share_outside_network": 1 - self.network_s / max(1e-9, self.elapsed_s),
            "peak_memory_gb": peak / 1e9,
            "flat_since": flat,
            "rollbacks": self.rollbacks,
            "precision": self.fabric._precision.precision,
            "processes": self.fabric.world_size,
        }
        if self.fabric.is_global_zero:
            write_json(self.run.path / "training.json", facts)

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _checkpoint(self) -> None:
        self.written = time.monotonic()
        if not self.fabric.is_global_zero:
            return
        tensors = {f"model.{n}": t for n, t in self.network.state_dict().items()}
        tensors |= {f"ema.{n}": t for n, t in self.ema.items()}
        for index, entry in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{n}": torch.as_tensor(v) for n, v in entry.items() if v is not None}
        names = ("step", "elapsed_s", "network_s", "best_iou", "rate", "rollbacks", "losses", "history")
        state = {name: getattr(self, name) for name in (*names, "validation_s", "next_validation")}
        self.run.save_checkpoint(tensors, state)
        self.written = time.monotonic()

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        parts: dict[str, dict[str, Tensor]] = {"model": {}, "ema": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, rest = name.split(".", 1)
            parts[part][rest] = tensor
        self.network.load_state_dict(parts["model"])
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
        self.before_s = state.pop("elapsed_s")
        for name, value in state.items():
            setattr(self, name, value)


def memory_format(dims: int) -> torch.memory_format:
    """Channels last: several times as fast on a CPU."""
    return torch.channels_last if dims == 2 else torch.channels_last_3d


def _schedule(progress: float) -> float:
    """Learning rate as a share of its maximum: a short linear rise, then half a cosine down to 0."""
    if progress < WARM_UP:
        return (progress + 1e-3) / (WARM_UP + 1e-3)
    return 0.5 * (1 + math.cos(math.pi * (progress - WARM_UP) / (1 - WARM_UP)))


def _flat_since(history: Sequence[dict[str, float]]) -> float:
    """Share of the training after which the validation IoU stayed within ``PLATEAU`` of its best."""
    best = max((h["iou"] for h in history if math.isfinite(h["iou"])), default=math.nan)
    flat = 1.0
    for entry in reversed(history):
        if not entry["iou"] >= best - PLATEAU:
            break
        flat = entry["progress"]
    return flat


def _peak_bytes() -> int:
    """Most memory that this process had at a time."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, with its gradient."""
    total: Tensor = all_reduce(values)
    return total


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite request to end (SIGTERM, as schedulers send) is a Ctrl-C: a checkpoint is written first."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _progress(fabric: Fabric) -> Iterator[Any]:
    """A progress bar on stderr; gives the function of share, words and seconds left that sets it."""
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(
        *columns, console=Console(stderr=True), refresh_per_second=2, disable=not fabric.is_global_zero
    ) as bar:
        task = bar.add_task("training", total=1.0, left="")

        def show(share: float, words: str, left: float) -> None:
            bar.update(task, completed=share, description=words, left=f"{int(left // 60)}:{int(left % 60):02d} left")

        yield show
