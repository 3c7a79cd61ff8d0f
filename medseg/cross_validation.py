"""All folds of a cross-validation: one process each, on the devices at hand; one folder, whose folds predict together.

``OUT/fold0``, ``OUT/fold1`` ... are ordinary run folders. OUT itself reads like a run: the plan that all folds share (made
from all labelled cases: of a case that is held out later, only its grid and intensities enter), ``metrics.json`` and
``report.html`` of all cases, each predicted by the fold that never saw it, ``ensemble.json`` and ``postprocessing.json``.
"""

from __future__ import annotations

import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from medseg.config import TrainConfig
from medseg.data import Case, Dataset
from medseg.device import pick_device
from medseg.ensemble import Ensemble, Fold
from medseg.evaluation import Evaluation
from medseg.plan import Plan
from medseg.report import report_of_run
from medseg.run import Run
from medseg.training import FOLDS, dataset_of, planned, prepared_cases, require_fresh, resumed, train
from medseg.validation import choose_postprocessing

__all__ = ["train_folds"]

log = logging.getLogger("medseg")
CORES = 8  # of a fold, where there are more they are trained side by side
GRACE_S = 60.0  # for a checkpoint when stopped
POLL_S = 0.2
SHARE_OF_CHOICE = 0.1  # of the minutes of a fold, to choose filters and temperature
ERROR = "medseg: error: "


def train_folds(config: TrainConfig, plan: Plan | None = None) -> Run:
    """Train every fold, validate every case with the fold that never saw it, and make an ensemble of them.

    GPUs each train one fold at a time; without them the cores do, one fold per 8 of them at a time. Epochs and minutes
    are those of each fold. With ``config.resume`` folds that have finished are kept and the others go on.

    Parameters
    ----------
    config : TrainConfig
        As for one training; ``fold`` does not matter.
    plan : Plan, optional
        A plan for all folds, instead of ``config.plan`` or of planning on all labelled cases.

    Returns
    -------
    Run
        The folder of all: ``evaluation()`` is of all cases, ``medseg.predict`` averages the folds.

    Raises
    ------
    FileExistsError
        If the folder exists and neither ``resume`` nor ``force`` is set.
    ValueError
        If data, plan or configuration do not fit, or there is one patient only.
    ChildProcessError
        If a fold failed; what the others gave is in the folder and can be used, and ``resume`` goes on.
    KeyboardInterrupt
        After all folds have written a checkpoint; the log says how to resume.

    Notes
    -----
    Cases are preprocessed once, before the first fold starts. Children write to ``OUT/foldK.log``.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError(
            "folds must be trained from one process, got several of torchrun; start medseg train --fold all alone"
        )
    dataset = dataset_of(config)
    cases = tuple(c for c in dataset.cases if c.label is not None)
    groups = len({c.group for c in cases})
    if groups < 2:
        raise ValueError(f"cross-validation must have labelled cases of 2 patients, got {groups} in {config.dataset}")
    count = config.folds or min(FOLDS, groups)
    devices = _devices(config.device, count)
    run = _begun(config.model_copy(update={"fold": "all"}), plan, dataset, cases, devices)
    cache = run.path / "cache"
    prepared_cases(run, list(cases), cache, config.workers, True)
    waiting = [k for k in range(count) if not _finished(run.path / f"fold{k}")]
    if len(waiting) < count:
        log.info("%d of %d folds have finished and are kept", count - len(waiting), count)
    failed = _train_all(run, waiting, devices, cache)
    done = [k for k in range(count) if _finished(run.path / f"fold{k}")]
    if not done:
        raise ChildProcessError(f"a fold must finish, got none: {'; '.join(failed.values())}")
    _sum_up(run, done, failed)
    if failed:
        raise ChildProcessError(
            f"every fold must finish, got {'; '.join(f'{name}: {why}' for name, why in failed.items())}; the other "
            f"{len(done)} can be used; go on with --resume"
        )
    shutil.rmtree(cache)
    return run


def _devices(device: str, count: int) -> list[str]:
    """Where folds are trained at the same time: one entry for each."""
    where = pick_device(device)
    if where.type == "cuda":
        return [str(where)] if where.index is not None else [f"cuda:{n}" for n in range(torch.cuda.device_count())]
    return ["cpu"] * min(count, max(1, _cores() // CORES))


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _begun(
    config: TrainConfig, plan: Plan | None, dataset: Dataset, cases: tuple[Case, ...], devices: list[str]
) -> Run:
    """The folder to go on with, or a new one with its plan."""
    ids = [c.id for c in cases]
    if config.resume and (config.out / "plan.json").is_file():
        return resumed(config, plan, ids)
    require_fresh(config)
    sharing = config
    if devices.count("cpu") > 1 and config.memory is None:  # half of what is free, for all together
        share = psutil.virtual_memory().available / 2 / len(devices)
        sharing = config.model_copy(update={"memory": f"{share / 1e9:.2f}GB"})
    plan = plan or planned(sharing, dataset, cases, devices[0])
    if config.out.exists():
        shutil.rmtree(config.out)
    return Run.create(config.out, config, plan, ids)


def _finished(folder: Path) -> bool:
    return (folder / "metrics.json").is_file()


# ---------------------------------------------------------------------------------------------------------------------
# Processes


@dataclass
class _Children:
    """The processes that train; each ends itself, after a checkpoint, when its standard input is closed."""

    running: list[subprocess.Popen[str]] = field(default_factory=list)
    stopped: bool = False

    def start(self, order: str, log_file: Path, threads: int | None) -> subprocess.Popen[str]:
        """Begin with a line of JSON on standard input, and everything that is said into a file."""
        threading_of = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
        with log_file.open("a") as sink:
            child = subprocess.Popen(
                [sys.executable, "-m", "medseg.cross_validation"], stdin=subprocess.PIPE, stdout=sink, stderr=sink,
                env={**os.environ, **threading_of}, text=True, start_new_session=True,  # Ctrl-C reaches us alone
            )  # fmt: skip
        self.running.append(child)
        if child.stdin is not None:
            child.stdin.write(order + "\n")
            child.stdin.flush()
        return child

    def stop(self) -> None:
        """Let all write a checkpoint and end; those that last longer than a minute are killed."""
        self.stopped = True
        for child in self.running:
            if child.stdin is not None:
                child.stdin.close()
        deadline = time.monotonic() + GRACE_S
        for child in self.running:
            try:
                child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.kill()


def _train_all(run: Run, folds: list[int], devices: list[str], cache: Path) -> dict[str, str]:
    """Train folds in processes of their own; why they failed, by name, for those that did."""
    free: SimpleQueue[str] = SimpleQueue()
    for device in devices:
        free.put(device)
    children, failed = _Children(), {}
    threads = max(1, _cores() // len(devices)) if len(devices) > 1 else None
    with _bars() as bars, ThreadPoolExecutor(len(devices)) as pool:

        def one(k: int) -> str:
            if children.stopped:
                return "stopped"
            device = free.get()
            try:
                return _train_one(run, k, device, cache, threads, children, bars)
            finally:
                free.put(device)

        waiting = {pool.submit(one, k): f"fold{k}" for k in folds}
        try:
            for future in as_completed(waiting):
                if reason := future.result():
                    failed[waiting[future]] = reason
                    log.error("%s failed: %s", waiting[future], reason)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            children.stop()
            log.warning("stopped; go on with the same command and --resume")
            raise
        finally:
            children.stop()
    return failed


def _train_one(
    run: Run, k: int, device: str, cache: Path, threads: int | None, children: _Children, bars: Progress
) -> str:
    """Train one fold to its end and show how far it is; the reason why it failed, or ""."""
    folder, log_file = run.path / f"fold{k}", run.path / f"fold{k}.log"
    changes = {"fold": k, "out": folder, "device": device, "plan": run.path / "plan.json", "resume": True}
    config = run.config.model_copy(update={**changes, "force": False})
    order = json.dumps({"config": json.loads(config.model_dump_json()), "cache": str(cache)})
    begin = time.monotonic()
    task = bars.add_task(f"fold {k} on {device}", total=1.0, left="")
    child = children.start(order, log_file, threads)
    while child.poll() is None:
        time.sleep(POLL_S)
        entry = _last_entry(folder / "history.json")
        by_clock = (time.monotonic() - begin) / (60 * config.minutes) if config.minutes else 0.0
        share = min(0.99, max(by_clock, entry.get("progress", 0.0)))
        words = f"IoU {entry['iou']:.3f}" if math.isfinite(entry.get("iou", math.nan)) else ""
        bars.update(task, completed=share, left=words)
    bars.update(task, completed=1.0)
    if child.returncode == 0 and _finished(folder):
        evaluation = Run.open(folder).evaluation()
        log.info(
            "fold %d: mean IoU %.3f, mean Dice %.3f after %.1f min",
            k, evaluation.mean("iou"), evaluation.mean("dice"), (time.monotonic() - begin) / 60,
        )  # fmt: skip
        return ""
    if children.stopped:
        return "stopped"
    said = [line for line in log_file.read_text(errors="replace").splitlines() if line.strip()]
    last = said[-1].strip().removeprefix(ERROR) if said else "nothing was said"
    ending = f"killed by signal {-child.returncode}" if child.returncode < 0 else last
    return f"{ending} (see {log_file})"


def _last_entry(path: Path) -> dict[str, float]:
    """The last validation of a training that is going on."""
    try:
        history = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    return {k: v for k, v in history[-1].items() if v is not None} if history else {}


@contextmanager
def _bars() -> Iterator[Progress]:
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=Console(stderr=True), refresh_per_second=2) as bars:
        yield bars


def _child() -> int:
    """One fold, as ordered on standard input; a checkpoint and the end when that is closed."""
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    log.setLevel(logging.INFO)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # also below nohup, which has it ignored
    order = json.loads(sys.stdin.readline())

    def watch() -> None:
        while os.read(0, 1024):  # not sys.stdin, whose lock would outlast the main thread
            pass
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
    try:
        train(TrainConfig.make(**order["config"]), cache=Path(order["cache"]))
    except KeyboardInterrupt:
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, MemoryError) as problem:
        log.error("%s%s", ERROR, " ".join(str(problem).split()))
        return 1
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# After the last fold


def _sum_up(run: Run, done: list[int], failed: dict[str, str]) -> None:
    """Metrics and report of all cases, the ensemble, and what is chosen on them."""
    rows, members = [], []
    for k in done:
        member = Run.open(run.path / f"fold{k}")
        evaluation = member.evaluation()
        rows += list(evaluation.rows)
        means = {name: evaluation.mean(name) for name in ("iou", "dice")}
        known = {name: value if math.isfinite(value) else None for name, value in means.items()}
        members.append(Fold(name=member.path.name, cases=len(member.validation_ids()), **known))
    Ensemble(folds=tuple(members), failed=failed).save(run.path / Ensemble.file, force=True)
    evaluation = Evaluation(tuple(rows))
    evaluation.write(run.path, force=True)
    log.info(
        "%d cases of %d folds: mean IoU %.3f, mean Dice %.3f",
        sum(m.cases for m in members), len(members), evaluation.mean("iou"), evaluation.mean("dice"),
    )  # fmt: skip
    minutes = run.config.minutes
    seconds = math.inf if minutes is None else SHARE_OF_CHOICE * 60 * minutes
    choice = choose_postprocessing(run, run.config.device, seconds=seconds)
    log.info("postprocessing %s", choice.reason)
    notes = [
        f"{m.name}: {m.cases} cases, mean IoU {m.iou or math.nan:.3f}, Dice {m.dice or math.nan:.3f}" for m in members
    ]
    notes += [f"{name} failed: {why}" for name, why in failed.items()]
    report_of_run(
        run, title=f"Cross-validation {run.path.resolve().name}", notes=[*notes, f"Prediction {choice.reason}."]
    )


if __name__ == "__main__":
    sys.exit(_child())
