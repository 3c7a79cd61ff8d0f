"""The training loop, on Lightning Fabric: on one screen, exact when resumed, annealed to the end of its budget.

Every step is a function of the seed and its number (patches, augmentation), so that a resumed run goes on as if it had
never stopped. With a time budget, the learning rate anneals to zero exactly when the budget ends.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from torch import Tensor
from torch.distributed.nn.functional import all_reduce
from torch.utils.tensorboard import SummaryWriter

from medseg.augmentation import Augmentation
from medseg.config import TrainConfig
from medseg.inference import Predictor
from medseg.losses import DeepSupervision, DiceBCELoss
from medseg.models.network import SegmentationNetwork
from medseg.pace import PLATEAU, flat_since, memory_format, peak_bytes, schedule, stops, training_bar
from medseg.patches import draw_batch
from medseg.prepared import PreparedCase
from medseg.run import Run, write_json
from medseg.scoring import Scoring, mean

__all__ = ["Learner"]

log = logging.getLogger("medseg")
MIN_STEPS = 20  # of an epoch
CHECKPOINT_S = 120.0  # between checkpoints
WARM_STEPS = 3  # from which the pace is known
ROLLBACKS = 3  # times that a loss which is not finite is mended by going back
SHOWN_CASES = 24  # validation cases scored during training at most; all of them at the end
VALIDATION_SHARE = 0.05  # of the minutes that one validation during training may take
SURFACES = 1.2  # the last validation takes so many times as long, with surface distances and files
REPORT_S = 3.0  # to write the report
CHOICES = 1.2  # choosing the postprocessing takes so many times as long as a validation
AFTER_SHARE = 0.5  # of the minutes that all of this may take after the last step
FEW_STEPS = 200  # with fewer a model is hardly usable
COMPILE_MINUTES = 10.0  # of training on a GPU from which a minute of compilation pays
STATE = (
    "step", "elapsed_s", "begun_s", "loop_s", "network_s", "window_s", "validation_s", "next_validation", "validated",
    "shown", "best_iou", "rate", "rollbacks", "losses", "history",
)  # fmt: skip
Batch = tuple[Tensor, Tensor, Tensor]


@dataclass
class Learner:
    """The state of one training."""

    run: Run
    config: TrainConfig
    fabric: Fabric
    precision: str
    network: SegmentationNetwork
    training: Sequence[PreparedCase]
    validation: Scoring
    started: float
    step: int = 0
    before_s: float = 0.0  # seconds spent before a resume
    begun_s: float = -1.0  # seconds spent before the first step
    loop_s: float = 0.0  # seconds spent in steps
    network_s: float = 0.0  # of these, in forward, backward and optimiser
    best_iou: float = -1.0
    rate: float = 1.0  # factor of the learning rate, halved when a loss was not finite
    rollbacks: int = 0
    window_s: float = 0.0  # expected seconds to predict a window
    shown: list[int] | None = None  # validation cases scored during training, once that is decided
    validated: int = 0  # step of the last validation
    stop_asked: bool = False
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
        self.windows = self.validation.windows(plan)
        self.validation_s = 0.0
        self.next_validation = 0.1
        self.written = time.monotonic()
        if config.resume and self.run.has_checkpoint():
            self._restore(*self.run.load_checkpoint())
            self.rollbacks = 0
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
        begun, budget = max(0.0, self.begun_s), 60 * (self.config.minutes or 0)
        room = budget - begun - min(self._after_s, AFTER_SHARE * budget)
        return self._of_first(min(1.0, (self.elapsed_s - begun) / max(1e-6, room)))

    def _of_first(self, value: float) -> float:
        """The value of the first process: its clock is that of all."""
        return value if self.fabric.world_size == 1 else float(self.fabric.broadcast(value))

    def _whole_s(self, progress: float) -> float:
        """Expected seconds of all steps and the validations between them."""
        return (self.elapsed_s - max(0.0, self.begun_s)) / max(progress, 1e-6)

    @property
    def _after_s(self) -> float:
        """Expected seconds after the last step: the validation of all cases, and the choices made on some."""
        some = sum(self.windows[i] for i in self.validation.spread(SHOWN_CASES))
        return REPORT_S + (SURFACES * sum(self.windows) + CHOICES * some) * self.window_s / self.fabric.world_size

    def _expect(self, progress: float) -> None:
        """Say what the training will have done at its end, at the pace so far; decide how much to validate meanwhile."""
        steps = self.total_steps or round(self.step / progress)
        minutes = (max(0.0, self.begun_s) + self._whole_s(progress) + self._after_s) / 60
        log.info("expecting about %d steps (%.1f epochs), %.1f min in all", steps, steps / self.epoch_steps, minutes)
        if steps < FEW_STEPS:
            log.warning("a model of %d steps will hardly be usable; give it more time", steps)
        if self.config.minutes and self._after_s > AFTER_SHARE * 60 * self.config.minutes:
            log.warning(
                "validating all cases at the end will take about %.1f min, beyond --minutes", self._after_s / 60
            )

    def _choose_shown(self) -> list[int]:
        """As many validation cases as a small share of the time allows; by number of epochs, always as many."""
        every = self.validation.spread(SHOWN_CASES)
        if self.total_steps is not None:
            return every
        limit = VALIDATION_SHARE * 60 * (self.config.minutes or 0) * self.fabric.world_size
        for count in range(len(every), 0, -1):
            some = self.validation.spread(count)
            if sum(self.windows[i] for i in some) * self.window_s <= limit:
                return some
        return []

    # -- the loop -----------------------------------------------------------------------------------------------------

    def fit(self) -> None:
        """Train to the end of the budget; the best weights are in the run."""
        is_first = self.fabric.is_global_zero
        writer = SummaryWriter(str(self.run.path / "tensorboard")) if is_first else None
        if self.begun_s < 0:
            self.begun_s = self._of_first(self.elapsed_s)
        with ThreadPoolExecutor(1) as threads, stops(self._ask_to_stop), training_bar(is_first) as show:
            ahead = threads.submit(self._draw, self.step)
            expected = self.step > 0
            try:
                while True:
                    progress = self.progress
                    if self.step > self.validated and (progress >= self.next_validation or progress >= 1):
                        self._validate(writer, progress)
                    elif time.monotonic() - self.written > CHECKPOINT_S:
                        self._checkpoint()
                    if self.step and progress >= 1:
                        break
                    if self._of_first(self.stop_asked):  # all processes stop at the same step
                        self._stop()
                    begin = time.monotonic()
                    batch = ahead.result()
                    ahead = threads.submit(self._draw, self.step + 1)
                    if not self._step(batch, progress, begin):
                        ahead = threads.submit(self._draw, self.step)
                        continue
                    if not expected and (self.step >= 20 or progress > 0.1):
                        self._expect(max(progress, 1e-6))
                        expected = True
                    show(progress, self._words(), self._whole_s(progress) * (1 - progress))
            finally:
                ahead.cancel()
                if writer:
                    writer.close()
        self._sum_up()

    def _ask_to_stop(self) -> None:
        self.stop_asked = True
        log.warning("stopping after this step; once more stops at once")

    def _stop(self) -> None:
        """Stop between two steps, where all that was learnt is in the checkpoint."""
        self._checkpoint()
        log.warning("stopped at step %d; go on with the same command and --resume", self.step)
        raise KeyboardInterrupt

    def _step(self, batch: Batch, progress: float, begin: float) -> bool:
        """One step; False where its loss was not finite and the training went back."""
        loss = self._train_step(batch, progress)
        if not math.isfinite(loss):
            self._roll_back(loss)
            return False
        self.losses.append(loss)
        self.step += 1
        self.loop_s += time.monotonic() - begin
        if self.window_s == 0 and self.step >= WARM_STEPS:  # half a step looks forward only
            self.window_s = self._of_first(self.network_s / self.step / self.batch / 2)
        return True

    def _draw(self, step: int) -> Batch:
        return draw_batch(self.training, self.run.plan, self.batch, self.config.seed, step)

    def _train_step(self, batch: Batch, progress: float) -> float:
        """One step on a whole batch: of several processes each takes its share of it. Returns the loss."""
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        images, labels, known = self.augmentation(
            batch[0].to(self.device), batch[1].to(self.device), batch[2], generator
        )
        own = slice(self.fabric.global_rank, None, self.fabric.world_size)
        images = images[own].to(memory_format=memory_format(self.run.plan.dims))
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate * self.rate * schedule(progress)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # what the augmentation queued is not the network's
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
        scaled = self.precision == "16-mixed"  # whose scaler skips what is not finite by itself
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
                "learning rate; go on with --resume --precision 32-true, train anew with a lower --learning-rate, or look "
                "for strange images with medseg check"
            )
        rollbacks, elapsed = self.rollbacks + 1, self.elapsed_s
        self._restore(*self.run.load_checkpoint())
        self.fabric.barrier()  # all have read it before it is written anew
        self.rate, self.rollbacks = rate, rollbacks
        self.before_s, self.started = elapsed, time.monotonic()
        log.warning(
            "loss was %s at step %d: back to step %d with %g of the learning rate (exploding gradients, or numbers beyond "
            "the range of %s)", loss, at, self.step, rate, self.precision,
        )  # fmt: skip
        self._checkpoint()

    def _words(self) -> str:
        words = f"epoch {self.step / self.epoch_steps:.1f}  loss {np.mean(self.losses[-20:]):.3f}"
        return words + (f"  best IoU {self.best_iou:.3f}" if self.best_iou >= 0 else "")

    # -- validation ---------------------------------------------------------------------------------------------------

    def _validate(self, writer: SummaryWriter | None, progress: float) -> None:
        begin = time.monotonic()
        if self.shown is None:
            self.shown = self._choose_shown()
        rows = self.validation.score(self.predictor(), self.shown, progress=lambda _: self._stop_validating())
        self.validation_s = self._of_first(time.monotonic() - begin)
        self.validated = self.step
        if not rows:  # there is no time for it: the last weights are the best
            self.next_validation = 1.0
            self._keep_weights()
            return
        self.window_s = self.fabric.world_size * self.validation_s / sum(self.windows[i] for i in self.shown)
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
        if not iou < self.best_iou:  # nothing to score (NaN) is no reason to keep older weights
            self.best_iou = iou if math.isfinite(iou) else self.best_iou
            self._keep_weights()
        by_clock = 9 * self.validation_s / self._whole_s(progress) if self.total_steps is None else 0.05
        self.next_validation = self._of_first(progress + max(0.05, by_clock))
        self._checkpoint()
        if self.fabric.is_global_zero:
            rows = [{k: None if math.isnan(v) else v for k, v in row.items()} for row in self.history]
            write_json(self.run.path / "history.json", rows)

    def _stop_validating(self) -> None:
        """Leave a validation that is made again when the training goes on; several processes finish it together."""
        if self.stop_asked and self.fabric.world_size == 1:
            self._stop()

    def _keep_weights(self) -> None:
        if self.fabric.is_global_zero:
            self.run.save_weights(self.ema)

    def predictor(self) -> Predictor:
        """The averaged weights as they are now."""
        network = self.run.build()
        network.load_state_dict(self.ema)
        network = network.to(self.device).to(memory_format=memory_format(self.run.plan.dims))  # type: ignore[call-overload]
        return Predictor(self.run.plan, network.eval(), self.device, self.precision)

    def _sum_up(self) -> None:
        """Say and keep what the training took and whether it had stopped to improve."""
        flat = flat_since(self.history)
        if flat < 0.7:
            log.info("validation IoU changed by less than %g since %.0f %% of the training", PLATEAU, 100 * flat)
        on_gpu = self.device.type == "cuda"
        peak = torch.cuda.max_memory_allocated(self.device) if on_gpu else peak_bytes()
        facts = {
            "steps": self.step,
            "epochs": self.step / self.epoch_steps,
            "minutes": self.elapsed_s / 60,
            "step_s": self.loop_s / max(1, self.step),
            "share_outside_network": 1 - self.network_s / max(1e-9, self.loop_s),
            "share_outside_steps": 1 - self.loop_s / max(1e-9, self.elapsed_s),
            "peak_memory_gb": peak / 1e9,
            "flat_since": flat,
            "rollbacks": self.rollbacks,
            "precision": self.precision,
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
        state = {name: getattr(self, name) for name in STATE}
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


def _over_processes(values: Tensor) -> Tensor:
    """The sum over all processes, with its gradient."""
    total: Tensor = all_reduce(values)
    return total
