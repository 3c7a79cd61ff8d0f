"""Training: from a data set and a configuration to a run folder."""

from __future__ import annotations

import logging
import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies import DDPStrategy
from rich.console import Console
from rich.progress import Progress

from medseg.config import TrainConfig
from medseg.data import Case, Dataset, folds, load_dataset
from medseg.device import pick_device
from medseg.evaluation import Evaluation
from medseg.finetuning import BOX_MODEL, MODELS_FROZEN, PromptTuner, promptable_of, slices_plan
from medseg.inference import Predictor
from medseg.learner import Learner
from medseg.models.sam_med import SamMed
from medseg.plan import Plan, make_plan, smaller_plan, united
from medseg.prepared import PreparedCase, prepare
from medseg.report import report_of_run
from medseg.run import Run, is_run_file, write_json
from medseg.sam_learner import SamLearner, embedding_once
from medseg.scoring import Scoring
from medseg.transfer import initialise, plan_of, with_architecture_of
from medseg.validation import choose_postprocessing

__all__ = ["dataset_of", "planned", "prepared_cases", "require_fresh", "resumed", "split", "train"]

log = logging.getLogger("medseg")
FOLDS = 5
ROOM = "1000GB"  # for plans whose patch nothing shall make smaller


def train(config: TrainConfig, plan: Plan | None = None, *, cache: Path | None = None) -> Run:
    """Train a model and validate it on whole cases.

    Under ``torchrun`` or ``fabric run`` the processes share each batch: losses and weights are those of one process
    with the same batch.

    Parameters
    ----------
    config : TrainConfig
        What to train, on what, for how long. ``config.resume`` goes on from the last checkpoint of ``config.out``: with
        a number of epochs, on a CPU, to exactly the weights of a training that was never stopped.
    plan : Plan, optional
        A plan to use instead of ``config.plan`` or of planning.
    cache : Path, optional
        Folder of preprocessed cases that is used and kept, instead of ``config.cache``; without either one inside the
        run, removed at the end.

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
    device = pick_device(config.device)
    dataset = dataset_of(config)
    training, validation = split(dataset, config)
    processes = _fabric(device)
    with processes.rank_zero_first(), _deterministic(config.deterministic):
        if processes.is_global_zero:
            run = _begun(config, plan, dataset, training, validation, str(device))
        else:
            run = Run.open(config.out)
        cases = list({c.id: c for c in (*training, *validation)}.values())
        folder = cache or config.cache or run.path / "cache"
        prepared = prepared_cases(run, cases, folder, config.workers, processes.is_global_zero)
    config = run.config.model_copy(update={"resume": config.resume})
    parts = [[prepared[c.id] for c in some] for some in (training, validation)]
    if config.model == BOX_MODEL:
        PromptTuner(run, config, device, parts[0], parts[1], folder / "embeddings", started).fit()
    else:
        with _deterministic(config.deterministic), embedding_once(config, run.plan, folder):
            _learn(run, config, device, validation, parts, started)
    if folder == run.path / "cache" and processes.is_global_zero:
        shutil.rmtree(folder)
    return run


def _learn(
    run: Run,
    config: TrainConfig,
    device: torch.device,
    validation: tuple[Case, ...],
    prepared: list[list[PreparedCase]],
    started: float,
) -> None:
    """All steps, the validation of the best weights and the choice of the postprocessing."""
    precision = run.precision
    fabric = _fabric(device, precision)
    scores = Scoring(fabric, validation, prepared[1])
    network = _network(run, config, fabric)
    kind = SamLearner if isinstance(network, SamMed) else Learner
    learner = kind(run, config, fabric, precision, network, prepared[0], scores, started)
    with _memory_explained(run, str(device)):
        learner.fit()
    try:
        _finish(run, fabric, precision, scores)
        if fabric.is_global_zero and prepared[0] != prepared[1]:
            left = 60 * config.minutes - learner.elapsed_s if config.minutes else math.inf
            log.info("postprocessing %s", choose_postprocessing(run, str(fabric.device), seconds=left).reason)
    except KeyboardInterrupt:
        log.warning("stopped after the last step; the same command with --resume makes the rest")
        raise
    fabric.barrier()


def dataset_of(config: TrainConfig) -> Dataset:
    """The data set as configured."""
    dataset = load_dataset(config.dataset, group=config.group, absent=config.absent)
    return united(dataset) if config.foreground else dataset


def split(dataset: Dataset, config: TrainConfig) -> tuple[tuple[Case, ...], tuple[Case, ...]]:
    """Training and validation cases as configured; the same cases twice where none is held out.

    Raises
    ------
    ValueError
        If no case has a label, or the fold is not below the number of folds.
    """
    cases = tuple(c for c in dataset.cases if c.label is not None)
    if not cases:
        raise ValueError(f"data set must hold labelled cases, got none in {dataset.root}")
    if config.fold == "all":
        raise ValueError("fold must be a number or none for one training, got all; use medseg train --fold all")
    groups = len({c.group for c in cases})
    if config.fold == "none" or groups == 1:
        why = "" if config.fold == "none" else "there is one patient only; "
        log.warning("%sno case is held out: the scores are of cases that were trained on", why)
        return cases, cases
    count = config.folds or min(FOLDS, groups)
    if config.fold >= count:
        raise ValueError(f"fold must be below the number of folds {count}, got {config.fold}")
    return folds(cases, count, config.split_seed)[config.fold]


def require_fresh(config: TrainConfig) -> None:
    """The run folder must be new, or one that medseg made if ``force``: nothing else is ever deleted."""
    out = config.out
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"run folder must be a folder, got the file {out}; use another --out")
    if not out.exists() or not any(out.iterdir()):
        return
    foreign = [p.name for p in out.iterdir() if not is_run_file(p.name)]
    if foreign or not all((out / name).is_file() for name in ("config.json", "plan.json", "validation.json")):
        found = ", ".join(sorted(foreign)[:3]) or "parts of one alone"
        raise FileExistsError(f"run folder must be new or a former run, got {out} with {found}; use another --out")
    if not config.force:
        raise FileExistsError(f"run folder must be new, got {out}; use --resume, --force or another --out")
    if config.dataset.resolve().is_relative_to(out.resolve()):
        raise FileExistsError(f"run folder must not hold the data set, got {out}; use another --out")
    if config.init and Path(config.init).resolve().is_relative_to(out.resolve()):
        raise FileExistsError(f"run folder must not hold the weights to start from, got {out}; use another --out")


# ---------------------------------------------------------------------------------------------------------------------
# Before the first step


def _begun(
    config: TrainConfig,
    plan: Plan | None,
    dataset: Dataset,
    training: tuple[Case, ...],
    validation: tuple[Case, ...],
    device: str,
) -> Run:
    """The run to go on with, or a new one with its plan."""
    if config.resume and config.model == BOX_MODEL:
        raise ValueError(f"resume must go with another model than {BOX_MODEL}, which trains in minutes; use --force")
    if config.resume and (config.out / "plan.json").is_file():
        return resumed(config, plan, [c.id for c in validation])
    require_fresh(config)
    plan = plan or planned(config, dataset, training, device)
    if config.out.exists():
        shutil.rmtree(config.out)
    return Run.create(config.out, config, plan, [c.id for c in validation])


def planned(config: TrainConfig, dataset: Dataset, cases: tuple[Case, ...], device: str) -> Plan:
    """The plan that the configuration names, or one made from the cases given."""
    if config.plan:
        return Plan.load(config.plan)
    if config.model in MODELS_FROZEN:  # planned as on a GPU: the network sees whole slices wherever it runs
        with _bar("planning", len(cases)) as update:
            plan = make_plan(
                dataset, cases, model="unet2d", device="cuda", overlapping=config.overlapping, workers=config.workers,
                memory=ROOM, progress=update,
            )  # fmt: skip
        return slices_plan(plan, config, cases)
    source = plan_of(config.init) if config.init else None
    if source and config.model not in (None, source.model):
        raise ValueError(f"model must be {source.model} as in the run {config.init} to start from, got {config.model}")
    model = source.model if source else config.model
    with _bar("planning", len(cases)) as update:
        plan = make_plan(
            dataset, cases, model=model, device=device, minutes=config.minutes, memory=config.memory,
            overlapping=config.overlapping, workers=config.workers, progress=update,
        )  # fmt: skip
    return with_architecture_of(plan, source) if source else plan


def resumed(config: TrainConfig, plan: Plan | None, validation: list[str]) -> Run:
    """The run to go on with; only its length and what does not change its result may differ from before."""
    run = Run.open(config.out)
    free = {"epochs", "minutes", "device", "resume", "force", "workers", "out", "dataset", "precision", "plan", "cache"}
    for name in type(config).model_fields:
        old, new = getattr(run.config, name), getattr(config, name)
        if name not in free and new != old and not (name in ("model", "init") and new is None):
            raise ValueError(f"{name} must stay {old!r} in a resumed run, got {new!r}")
    plan = plan or (Plan.load(config.plan) if config.plan else None)
    if plan is not None and plan != run.plan:
        raise ValueError(f"plan must stay that of {config.out} in a resumed run, got another")
    if run.validation_ids() != validation:
        raise ValueError(
            f"validation cases must stay the same in a resumed run, got others from {config.dataset}; train anew"
        )
    kept: dict[str, Any] = {"init": run.config.init, "plan": run.config.plan}
    if config.precision == "auto":
        kept["precision"] = run.config.precision
    if config.epochs is None and config.minutes is None:
        kept |= {"epochs": run.config.epochs, "minutes": run.config.minutes}
    config = config.model_copy(update=kept)
    config.save(run.path / "config.json", force=True)
    return Run(run.path, config, run.plan)


def prepared_cases(run: Run, cases: list[Case], folder: Path, workers: int, is_first: bool) -> dict[str, PreparedCase]:
    try:
        with _bar("preprocessing", len(cases), hidden=not is_first) as update:
            found = prepare(cases, run.plan, folder, workers=workers, progress=update)
    except KeyboardInterrupt:
        log.warning("stopped while preprocessing; go on with the same command and --resume")
        raise
    return {c.id: c for c in found}


def _network(run: Run, config: TrainConfig, fabric: Fabric) -> Any:
    """The planned network, with the weights that it starts from."""
    torch.manual_seed(config.seed)
    network = run.build()
    if isinstance(network, SamMed):
        if not (config.resume and run.has_checkpoint()):
            network.start_from(promptable_of(config.init))
        network.freeze_encoder()
    elif config.init is not None and not (config.resume and run.has_checkpoint()):
        transfer = initialise(network, run.plan, config.init, whole_encoder=config.freeze)
        if fabric.is_global_zero:
            log.info("%s", transfer.summary())
            write_json(run.path / "transfer.json", transfer.as_dict())
    if config.freeze:
        network.freeze_encoder()
    return network


def _fabric(device: torch.device, precision: Any = "32-true") -> Fabric:
    """Lightning Fabric on this device, or on those of all processes that torchrun or ``fabric run`` started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        devices: Any = [device.index or 0] if device.type == "cuda" else 1
        return Fabric(accelerator=device.type, devices=devices, precision=precision)
    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    by_fabric = os.environ.get("LT_CLI_USED") == "1"  # ``fabric run`` chooses the strategy and launches by itself
    # The others wait while the first plans and reports.
    strategy: Any = "auto" if by_fabric else DDPStrategy(timeout=timedelta(days=1))
    fabric = Fabric(
        accelerator=device.type, devices=local, num_nodes=world // local, strategy=strategy, precision=precision
    )
    if not by_fabric:
        fabric.launch()
    return fabric


@contextmanager
def _memory_explained(run: Run, device: str) -> Iterator[None]:
    """Memory that is full is an error that names a smaller plan, which it writes."""
    try:
        yield
    except RuntimeError as problem:
        if not isinstance(problem, torch.OutOfMemoryError) and "allocate memory" not in str(problem):
            raise
        plan, words = smaller_plan(run.plan)
        path = run.path.with_name(f"{run.path.name}-smaller-plan.json")
        plan.save(path, force=True)
        patch = " x ".join(map(str, run.plan.patch))
        raise ValueError(
            f"training step must fit the memory of {device}, got a batch of {run.plan.batch} patches of {patch} that does "
            f"not; a smaller plan ({words}) is in {path}: train again with --plan {path} --force, or with --accumulate 2"
        ) from problem


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    """Kernels that give the same result each time, where wanted; afterwards as before."""
    before = torch.are_deterministic_algorithms_enabled()
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


# ---------------------------------------------------------------------------------------------------------------------
# After the last step


def _finish(run: Run, fabric: Fabric, precision: str, validation: Scoring) -> None:
    """Score the best weights on all validation cases, and report."""
    device = str(fabric.device)
    fabric.barrier()  # the weights are written
    predictor = replace(Predictor.load(run, device, raw=True), precision=precision)
    every = range(len(validation.cases))
    with _bar("validation", len(every), hidden=not fabric.is_global_zero) as update:
        rows = validation.score(predictor, every, keep=run.path / "predictions", progress=update)
    if not fabric.is_global_zero:
        return
    evaluation = Evaluation(tuple(rows))
    evaluation.write(run.path, force=True)
    report_of_run(run, pictures=validation.pictures(run.plan, rows, run.path / "predictions"))
    log.info(
        "validation of all %d: mean IoU %.3f, mean Dice %.3f",
        len(every), evaluation.mean("iou"), evaluation.mean("dice"),
    )  # fmt: skip


@contextmanager
def _bar(what: str, total: int, *, hidden: bool = False) -> Iterator[Any]:
    """A progress bar on stderr; gives the function that sets it."""
    with Progress(console=Console(stderr=True), transient=True, disable=hidden) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)
