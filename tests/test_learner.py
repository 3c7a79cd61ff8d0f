"""The training loop: exact resume after a kill, several processes, losses that are not finite, budgets, small sets."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from safetensors.torch import load_file

import medseg
from medseg import learner, pace
from medseg.config import TrainConfig
from medseg.run import Run

SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import tiny
import medseg
from medseg import learner
learner.CHECKPOINT_S = 0.0
config = medseg.TrainConfig.make(
    dataset={dataset!r}, out={out!r}, epochs=2, folds=3, device="cpu", learning_rate=0.01, seed=4, precision="32-true",
    resume={resume},
)
medseg.train(config, tiny.plan())
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_dataset(tmp_path_factory.mktemp("set"))


def config(dataset: Path, out: Path, **changes: object) -> TrainConfig:
    return tiny.config(dataset, out, **{"seed": 4, **changes})


@pytest.fixture(scope="module")
def whole(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A training of 40 steps that nothing stopped."""
    return medseg.train(config(dataset, tmp_path_factory.mktemp("whole") / "run"), tiny.plan())


def script(dataset: Path, out: Path, resume: bool = False) -> str:
    return SCRIPT.format(tests=str(Path(__file__).parent), dataset=str(dataset), out=str(out), resume=resume)


def same_state(a: Run, b: Run, tolerance: float = 0.0) -> None:
    """Weights, averaged weights and optimiser state of the last checkpoints, and all losses."""
    one, two = (load_file(r.path / "checkpoint.safetensors") for r in (a, b))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.allclose(tensor, two[name], rtol=tolerance, atol=tolerance), name
    losses = [[h["loss"] for h in json.loads((r.path / "history.json").read_text())] for r in (a, b)]
    assert len(losses[0]) > 1
    assert np.allclose(*losses, rtol=tolerance, atol=tolerance)


def step_on_disk(out: Path) -> int:
    """Step of the last checkpoint of a run that another process is writing: 0 before the first, or between two names."""
    try:
        return int(Run.open(out).load_checkpoint()[1]["step"])
    except (OSError, RuntimeError):  # renamed between looking for it and opening it
        return 0


def test_killed_at_any_step_it_resumes_to_the_same_losses_and_weights(
    whole: Run, dataset: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}  # sums depend on their number
    child = subprocess.Popen([sys.executable, "-c", script(dataset, out)], env=environment, stderr=subprocess.PIPE)
    until = time.monotonic() + 300
    while step_on_disk(out) < 5:
        assert child.poll() is None and time.monotonic() < until
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    assert not (out / "metrics.json").exists()
    stopped_at = Run.open(out).load_checkpoint()[1]["step"]
    assert 0 < stopped_at < 40
    resumed = medseg.train(config(dataset, out, resume=True))
    same_state(whole, resumed)
    assert torch.equal(*(load_file(r.path / "weights.safetensors")["heads.0.weight"] for r in (whole, resumed)))


def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(
    whole: Run, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = learner.Learner._train_step

    def stopped(self: learner.Learner, batch: learner.Batch, progress: float) -> float:
        self.stop_asked = self.step == 24
        return step(self, batch, progress)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Learner, "_train_step", stopped)
        medseg.train(config(dataset, tmp_path / "run"), tiny.plan())
    checkpoint = tmp_path / "run" / "checkpoint.safetensors"
    checkpoint.write_bytes(checkpoint.read_bytes()[:1000])
    with caplog.at_level(logging.WARNING):
        resumed = medseg.train(config(dataset, tmp_path / "run", resume=True))
    assert "checkpoint is damaged, going on from the one before it" in caplog.text
    same_state(whole, resumed)


def test_two_processes_do_what_one_does(whole: Run, dataset: Path, tmp_path: Path) -> None:
    file = tmp_path / "script.py"
    file.write_text(script(dataset, tmp_path / "run"))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-3000:]
    both = Run.open(tmp_path / "run")
    same_state(whole, both, tolerance=2e-4)
    facts = json.loads((both.path / "training.json").read_text())
    assert facts["processes"] == 2
    assert [r["case"] for r in both.evaluation().rows] == [r["case"] for r in whole.evaluation().rows]
    assert both.evaluation().mean("dice") == pytest.approx(whole.evaluation().mean("dice"), abs=0.02)


@pytest.mark.parametrize("launcher", ["torch.distributed.run", "fabric"])
def test_processes_agree_on_the_clock(dataset: Path, tmp_path: Path, launcher: str) -> None:
    """With minutes all go by the clock of the first: a validation that one begins and another does not would hang."""
    file = tmp_path / "script.py"
    text = script(dataset, tmp_path / "run").replace("epochs=2", "minutes=0.15")
    slow = """
draw = learner.draw_batch
def slowly(*given):
    import os, time
    time.sleep(0.03 * int(os.environ["RANK"]))
    return draw(*given)
learner.draw_batch = slowly
"""
    file.write_text(text.replace("learner.CHECKPOINT_S = 0.0", slow))
    command = [sys.executable, "-m", launcher, "--standalone", "--nproc-per-node", "2", str(file)]
    if launcher == "fabric":
        code = "from lightning_fabric.cli import _main; _main()"
        command = [sys.executable, "-c", code, "run", "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp"]
        command.append(str(file))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert Run.open(tmp_path / "run").evaluation().rows
    assert json.loads((tmp_path / "run" / "training.json").read_text())["processes"] == 2


def test_stopped_in_the_last_validation_it_is_made_again(whole: Run, dataset: Path, tmp_path: Path) -> None:
    score = learner.Scoring.score

    def stopped(self: learner.Scoring, predictor: object, indices: list[int], **given: object) -> object:
        if len(calls) == 9:
            given["progress"].__closure__[0].cell_contents.stop_asked = True  # type: ignore[attr-defined]
        calls.append(1)
        return score(self, predictor, indices, **given)  # type: ignore[arg-type]

    calls: list[int] = []
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(learner.Scoring, "score", stopped)
        medseg.train(config(dataset, tmp_path / "run"), tiny.plan())
    assert not (tmp_path / "run" / "metrics.json").exists()
    same_state(whole, medseg.train(config(dataset, tmp_path / "run", resume=True)))


def test_scores_that_are_not_defined_still_leave_weights(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(learner, "mean", lambda _: float("nan"))
    run = medseg.train(config(dataset, tmp_path / "run", epochs=1), tiny.plan())
    assert (run.path / "weights.safetensors").is_file()


def test_a_validation_that_does_not_fit_the_time_is_left_out(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(learner.Scoring, "windows", lambda self, plan: [100_000] * len(self.cases))
    with caplog.at_level(logging.WARNING):
        run = medseg.train(config(dataset, tmp_path / "run", epochs=None, minutes=0.2), tiny.plan())
    assert "validating all cases at the end will take about" in caplog.text
    assert not (run.path / "history.json").exists()
    assert run.evaluation().rows
    assert json.loads((run.path / "training.json").read_text())["steps"] > 0


def test_parts_of_a_batch_take_less_memory_and_nearly_the_same_step(dataset: Path, tmp_path: Path) -> None:
    runs = [
        medseg.train(config(dataset, tmp_path / f"run{n}", accumulate=n, epochs=1, optimizer="sgd"), tiny.plan())
        for n in (1, 4)
    ]
    one, four = (json.loads((r.path / "history.json").read_text())[0]["loss"] for r in runs)
    assert four == pytest.approx(one, rel=0.25)  # Dice is pooled over less
    assert four != one


def spoil(monkeypatch: pytest.MonkeyPatch, call: int, how: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """Do something to the loss of one call of it, counted from 1."""
    forward, calls = learner.DeepSupervision.forward, []

    def once(self: learner.DeepSupervision, *inputs: object) -> torch.Tensor:
        calls.append(1)
        loss: torch.Tensor = forward(self, *inputs)  # type: ignore[arg-type]
        return how(loss) if len(calls) == call else loss

    monkeypatch.setattr(learner.DeepSupervision, "forward", once)


def infinite_gradient(loss: torch.Tensor) -> torch.Tensor:
    loss.register_hook(lambda g: g * float("inf"))
    return loss


class TestLossThatIsNotFinite:
    def test_it_goes_back_and_on_with_half_the_rate(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        spoil(monkeypatch, 12, lambda loss: loss * float("nan"))
        with caplog.at_level(logging.WARNING):
            run = medseg.train(config(dataset, tmp_path / "run"), tiny.plan())
        assert "loss was nan at step 11: back to step" in caplog.text
        assert "0.5 of the learning rate" in caplog.text
        assert json.loads((run.path / "training.json").read_text())["rollbacks"] == 1
        assert all(torch.isfinite(t).all() for t in load_file(run.path / "weights.safetensors").values())

    def test_gradients_too(
        self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        spoil(monkeypatch, 5, infinite_gradient)
        with caplog.at_level(logging.WARNING):
            run = medseg.train(config(dataset, tmp_path / "run", epochs=1), tiny.plan())
        assert "back to step" in caplog.text
        assert all(torch.isfinite(t).all() for t in load_file(run.path / "checkpoint.safetensors").values())

    def test_in_the_end_it_is_explained(self, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            learner.DeepSupervision, "forward", lambda *_: torch.tensor(float("nan"), requires_grad=True)
        )
        with pytest.raises(
            ValueError, match=r"must stay finite, got nan at step 0 after 3 returns .* lower --learning"
        ):
            medseg.train(config(dataset, tmp_path / "run"), tiny.plan())


class TestSmallSets:
    def test_one_case_is_trained_on_and_said_to_be(
        self, dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        table = tmp_path / "one.csv"
        table.write_text(f"case,image,label\na,{dataset}/images/case0.nii.gz,{dataset}/labels/case0.nii.gz\n")
        with caplog.at_level(logging.WARNING):
            run = medseg.train(config(table, tmp_path / "run", folds=None, epochs=1), tiny.plan())
        assert "there is one patient only; no case is held out" in caplog.text
        assert {r["case"] for r in run.evaluation().rows} == {"a"}

    def test_fewer_patients_than_folds(self, dataset: Path, tmp_path: Path) -> None:
        table = tmp_path / "three.csv"
        rows = [f"c{n},{dataset}/images/case{n}.nii.gz,{dataset}/labels/case{n}.nii.gz" for n in range(3)]
        table.write_text("\n".join(["case,image,label", *rows]))
        run = medseg.train(config(table, tmp_path / "run", folds=None, epochs=1), tiny.plan())
        assert len(run.validation_ids()) == 1

    def test_no_case_held_out(self, dataset: Path, tmp_path: Path) -> None:
        run = medseg.train(config(dataset, tmp_path / "run", fold="none", epochs=1), tiny.plan())
        assert len(run.validation_ids()) == 6


def test_partial_labels_train_and_are_scored_where_drawn(dataset: Path, tmp_path: Path) -> None:
    """Half of the cases lack the dark ball: as background it would be unlearnt, as unknown it is learnt."""
    rows = ["case,image,label,unknown"]
    for n in range(6):
        label = dataset / "labels" / f"case{n}.nii.gz"
        if n % 2:
            found = medseg.read_labels(label)
            array = np.where(np.asarray(found.array) == 5, 0, found.array)
            label = tmp_path / f"label{n}.nii.gz"
            medseg.write(medseg.LabelMap(array, found.geometry, found.structures), label)
        rows.append(f"case{n},{dataset}/images/case{n}.nii.gz,{label},{'5' if n % 2 else ''}")
    table = tmp_path / "partial.csv"
    table.write_text("\n".join(rows))
    run = medseg.train(config(table, tmp_path / "run", epochs=12), tiny.plan())
    scored = {(r["case"], r["structure"]) for r in run.evaluation().rows}
    assert all(("dark" in structure) <= (int(case[-1]) % 2 == 0) for case, structure in scored)
    image, truth = tiny.case(1)
    predicted = np.asarray(medseg.predict(run, image, device="cpu").array) == 5
    true = np.asarray(truth.array) == 5
    assert 2 * (predicted & true).sum() / (predicted.sum() + true.sum()) > 0.6


def test_start_from_another_run_with_a_frozen_encoder(whole: Run, dataset: Path, tmp_path: Path) -> None:
    plan = tiny.plan()
    run = medseg.train(config(dataset, tmp_path / "run", init=str(whole.path), freeze=True, epochs=1), plan)
    before, after = (load_file(r.path / "weights.safetensors") for r in (whole, run))
    frozen = [n for n in after if n.startswith("encoder.")]
    assert frozen
    assert all(torch.equal(before[n], after[n]) for n in frozen)
    assert not all(torch.equal(before[n], after[n]) for n in after)
    assert json.loads((run.path / "transfer.json").read_text())["share"] == 1
    with pytest.raises(ValueError, match="freeze must go with init"):
        config(dataset, tmp_path, freeze=True)


def test_the_plateau_is_found() -> None:
    rise = [{"iou": v, "progress": p} for p, v in [(0.2, 0.5), (0.4, 0.8), (0.6, 0.799), (0.8, 0.8), (1.0, 0.8005)]]
    assert pace.flat_since(rise) == 0.4
    assert pace.flat_since([{"iou": v, "progress": p} for p, v in [(0.5, 0.5), (1.0, 0.6)]]) == 1.0


def test_settings_of_torch_are_put_back(dataset: Path, tmp_path: Path) -> None:
    medseg.train(config(dataset, tmp_path / "run", deterministic=True, epochs=1), tiny.plan())
    assert not torch.are_deterministic_algorithms_enabled()


def test_full_memory_names_a_smaller_plan_and_writes_it(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(learner.DeepSupervision, "forward", full)
    with pytest.raises(ValueError, match=r"must fit the memory of cpu, got a batch of 4 patches of 16 x 16 x 12"):
        medseg.train(config(dataset, tmp_path / "run"), tiny.plan())
    smaller = medseg.Plan.load(tmp_path / "run-smaller-plan.json")
    assert smaller.batch * np.prod(smaller.patch) < 4 * 16 * 16 * 12


def test_a_reader_that_fails_shows_its_own_error(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw = learner.draw_batch

    def broken(*inputs: object) -> learner.Batch:
        if inputs[-1] == 7:
            raise OSError("disk is gone in case case3")
        return draw(*inputs)  # type: ignore[arg-type]

    monkeypatch.setattr(learner, "draw_batch", broken)
    with pytest.raises(OSError, match="disk is gone in case case3"):
        medseg.train(config(dataset, tmp_path / "run"), tiny.plan())
    assert Run.open(tmp_path / "run").has_checkpoint()


def test_all_labels_as_one_structure(dataset: Path, tmp_path: Path) -> None:
    base = tiny.plan()
    one = base.structures[0].model_copy(update={"number": 1, "name": "foreground", "labels": (-1,)})
    plan = base.model_copy(update={"structures": (one,)})
    run = medseg.train(config(dataset, tmp_path / "run", foreground=True, epochs=8), plan)
    assert {r["structure"] for r in run.evaluation().rows} == {"foreground"}
    assert run.evaluation().mean("dice") > 0.6
