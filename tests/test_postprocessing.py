"""Component filters and temperature: against scipy, brute force, and answers known by hand."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny
from conftest import geometries
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, optimize, special

import medseg
from medseg.calibration import reliability
from medseg.config import TrainConfig
from medseg.postprocessing import ComponentFilter, Components, Postprocessing, choose_filter, find_components
from medseg.run import Run
from medseg.temperature import fit_temperature, negative_log_likelihood, tempered
from medseg.validation import choose_postprocessing, held_out
from medseg.volume import Geometry, LabelMap, Structure, Volume

CORNERS = np.ones((3, 3, 3))


def filtered_by_hand(mask: np.ndarray, largest: bool, least_voxels: float) -> np.ndarray:
    numbered, count = ndimage.label(mask, CORNERS)
    sizes = ndimage.sum_labels(mask, numbered, np.arange(1, count + 1))
    keep = [n for n in range(1, count + 1) if sizes[n - 1] >= least_voxels]
    if largest and count:
        keep = [int(np.argmax(sizes)) + 1]
    return np.isin(numbered, keep) & mask


@settings(max_examples=40)
@given(geometries(4, 9), st.integers(0, 10_000), st.booleans(), st.booleans(), st.sampled_from([0.0, 1.5, 3.0]))
def test_filters_leave_what_scipy_leaves(
    geometry: Geometry, seed: int, layered: bool, largest: bool, voxels: float
) -> None:
    generator = np.random.default_rng(seed)
    structures = (Structure(3, "a"), Structure(70, "b"))
    values = generator.choice([0, 3, 70], geometry.shape, p=[0.8, 0.1, 0.1]).astype(np.uint8)
    array = generator.random((2, *geometry.shape)) < 0.15 if layered else values
    labels = LabelMap(array, geometry, structures)
    rule = ComponentFilter(
        number=70,
        name="b",
        largest=largest,
        min_mm3=voxels * geometry.voxel_mm3 * (1 - 1e-9),
        dice_before=0,
        dice_after=1,
    )
    result = Postprocessing(cases=3, filters=(rule,)).apply(labels)
    assert result.geometry == geometry
    assert result.structures == structures
    assert np.array_equal(result.mask(3), labels.mask(3))
    assert np.array_equal(result.mask(70), filtered_by_hand(labels.mask(70), largest, voxels))
    assert np.array_equal(labels.array, array)  # the argument stays as it was


def test_structure_that_is_not_there_is_no_trouble() -> None:
    geometry = Geometry.from_parts((4, 5, 6), (1, 2, 3))
    rule = ComponentFilter(number=9, name="x", largest=True, dice_before=0, dice_after=1)
    for array in (np.zeros((4, 5, 6), np.uint8), np.zeros((1, 4, 5, 6), bool)):
        labels = LabelMap(array, geometry, (Structure(9, "x"),))
        assert not Postprocessing(cases=1, filters=(rule,)).apply(labels).array.any()


@settings(max_examples=40)
@given(geometries(4, 9), st.integers(0, 10_000))
def test_dice_of_kept_components(geometry: Geometry, seed: int) -> None:
    generator = np.random.default_rng(seed)
    prediction, reference = generator.random((2, *geometry.shape)) < 0.15
    found = find_components(prediction, reference, geometry.voxel_mm3)
    for largest, voxels in ((False, 0.0), (False, 2.0), (True, 0.0)):
        kept = filtered_by_hand(prediction, largest, voxels)
        rule = ComponentFilter(
            number=1, name="x", largest=largest, min_mm3=voxels * geometry.voxel_mm3 * (1 - 1e-9), dice_before=0,
            dice_after=0,
        )  # fmt: skip
        total = kept.sum() + reference.sum()
        expected = 2 * (kept & reference).sum() / total if total else 1.0
        assert found.dice(rule.kept(found.sizes, geometry.voxel_mm3)) == pytest.approx(expected)


def case(sizes: list[int], shared: list[int], reference: int) -> Components:
    return Components(np.array(sizes, int), np.array(shared, int), reference, 2.0)


class TestChoice:
    def test_specks_are_left_out_by_the_least_size_that_does(self) -> None:
        cases = [case([500, 4, 3], [450, 0, 0], 500)] * 3  # specks of 6 and 8 mm3
        rule = choose_filter(1, "liver", cases)
        assert rule is not None
        assert (rule.largest, rule.min_mm3) == (False, 10.0)
        assert rule.dice_before == pytest.approx(2 * 450 / 1007)
        assert rule.dice_after == pytest.approx(2 * 450 / 1000)
        assert rule.words == "liver: no component below 10 mm3 (Dice 0.8937 to 0.9000)"

    def test_second_large_component_goes_by_the_largest(self) -> None:
        rule = choose_filter(1, "x", [case([500, 200], [450, 0], 500)] * 3)
        assert rule is not None
        assert rule.largest

    def test_two_true_parts_stay(self) -> None:
        assert choose_filter(1, "kidneys", [case([500, 490], [490, 480], 1000)] * 5) is None

    def test_false_alarms_where_the_structure_is_absent_count(self) -> None:
        """A case without the structure, whose Dice would be undefined, counts as right when nothing is left."""
        cases = [case([500], [480], 500)] * 3 + [case([5, 3], [0, 0], 0)]
        rule = choose_filter(1, "x", cases)
        assert rule is not None
        assert (rule.min_mm3, rule.dice_after - rule.dice_before) == (20.0, 0.25)  # 5 voxels of 2 mm3 are not below 10

    def test_gain_too_small_or_cases_too_few(self) -> None:
        assert choose_filter(1, "x", [case([100_000, 1], [90_000, 0], 100_000)] * 9) is None
        assert choose_filter(1, "x", [case([500, 200], [450, 0], 500)] * 2) is None


class TestTemperature:
    @pytest.mark.parametrize("true_temperature", [0.4, 1.0, 3.0])
    def test_it_is_found_by_independent_minimisation(self, true_temperature: float) -> None:
        """Labels drawn from softmax(logits / T) give T back, as does scipy's minimum of the raw cross-entropy."""
        generator = np.random.default_rng(0)
        logits = generator.normal(0, 3, (20_000, 4))
        soft = special.softmax(logits / true_temperature, axis=1)
        labels = (soft.cumsum(1) > generator.random((len(soft), 1))).argmax(1)

        def loss(beta: np.ndarray) -> float:
            return float(-np.mean(special.log_softmax(logits * beta[0], axis=1)[np.arange(len(labels)), labels]))

        beta = optimize.minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-12}).x[0]
        found = fit_temperature(logits, np.eye(4, dtype=bool)[labels])
        assert found == pytest.approx(1 / beta, rel=1e-3)
        assert found == pytest.approx(true_temperature, rel=0.05)
        log_soft = special.log_softmax(logits, axis=1)  # logarithms of probabilities are logits, too
        assert fit_temperature(log_soft, np.eye(4, dtype=bool)[labels]) == pytest.approx(found, rel=1e-3)

    def test_sigmoids_with_unknown_entries(self) -> None:
        generator = np.random.default_rng(1)
        logits = generator.normal(0, 4, (20_000, 2))
        truth = (generator.random(logits.shape) < special.expit(logits / 2.5)).astype(float)
        truth[:5000, 1] = np.nan
        logits[:5000, 1] = 1000.0  # must not matter
        assert fit_temperature(logits, truth, overlapping=True) == pytest.approx(2.5, rel=0.05)
        known = np.concatenate([logits[:, 0], logits[5000:, 1]])
        y = np.concatenate([truth[:, 0], truth[5000:, 1]])
        p = 1 / (1 + np.exp(-known / 2))
        expected = -np.mean(y * np.log(p) + (1 - y) * np.log(1 - p))
        found = negative_log_likelihood(logits, truth, 2.0, overlapping=True)
        assert found == pytest.approx(expected, rel=1e-6)

    def test_unknown_structures_share_the_background(self) -> None:
        logits = np.log([[0.5, 0.2, 0.3]])
        truth = np.array([[True, False, True]])
        assert negative_log_likelihood(logits, truth, 1.0) == pytest.approx(-np.log(0.8))

    def test_tempered(self) -> None:
        logits = np.array([[1.0, -2.0, 0.5]])
        np.testing.assert_allclose(tempered(logits, 2.0), special.softmax(logits / 2, axis=1))
        np.testing.assert_allclose(tempered(logits, 2.0, True), special.expit(logits / 2))


# ---------------------------------------------------------------------------------------------------------------------
# With a run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    root = tmp_path_factory.mktemp("post")
    tiny.write_dataset(root / "set", 7)
    config = TrainConfig(
        dataset=root / "set", out=root / "run", epochs=4, folds=2, precision="32-true", device="cpu", learning_rate=0.01
    )
    return medseg.train(config, tiny.plan())


def test_choice_is_stored_with_what_it_gains(run: Run) -> None:
    choice = choose_postprocessing(run, "cpu")
    assert choice.cases == len(run.validation_ids())
    assert Postprocessing.of(run.path) == choice
    assert "chosen on" in choice.reason
    assert choice.nll is not None and choice.ece is not None
    assert choice.nll[1] <= choice.nll[0] and choice.ece[1] <= choice.ece[0]
    for rule in choice.filters:  # the figures are those of predictions as a user gets them
        scores = {False: [], True: []}
        for raw in scores:
            predictor = medseg.Predictor.load(run, "cpu", raw=raw)
            for one in held_out(run, "cpu"):
                labels = predictor.predict(one.image)[0]
                p, r = labels.mask(rule.number), one.truth(one.plan.structures[0 if rule.number == 2 else 1])
                scores[raw].append(2 * (p & r).sum() / (p.sum() + r.sum()) if (p | r).any() else 1.0)
        assert np.mean(scores[True]) == pytest.approx(rule.dice_before, abs=1e-9)
        assert np.mean(scores[False]) == pytest.approx(rule.dice_after, abs=1e-9)


def test_predict_applies_it_and_raw_does_not(run: Run, caplog: pytest.LogCaptureFixture) -> None:
    rules = tuple(ComponentFilter(number=n, name=str(n), min_mm3=1e9, dice_before=0.1, dice_after=0.2) for n in (2, 5))
    stored = Postprocessing(cases=3, filters=rules[:1], temperature=2.0, nll=(2, 1), ece=(0.2, 0.1)).store(run.path)
    image, _ = tiny.case(33)
    raw, before = medseg.Predictor.load(run, "cpu", raw=True).predict(image, probabilities=True)
    with caplog.at_level("INFO"):
        labels, after = medseg.Predictor.load(run, "cpu").predict(image, probabilities=True)
    assert stored.reason in caplog.text
    assert raw.mask(2).any() and not labels.mask(2).any()
    assert np.array_equal(raw.mask(5), labels.mask(5))
    assert before is not None and after is not None
    # one window of the size of the image or several: dividing logits commutes with averaging and interpolating them
    logits = np.log(np.maximum(before.array.astype(np.float64), 1e-30))
    expected = special.softmax(logits / 2, axis=0)
    np.testing.assert_allclose(after.array, expected, atol=2e-4)
    (run.path / Postprocessing.file).unlink()


def test_calibration_error_is_that_of_reliability(run: Run) -> None:
    choice = choose_postprocessing(run, "cpu")
    assert choice.ece is not None
    errors = []
    for n in (1, 2):
        soft, true = [], []
        for one in held_out(run, "cpu"):
            labels, p = one.predict()
            around = np.argwhere((labels.array > 0) | (one.reference.array > 0))
            box = tuple(
                slice(max(0, low - 10), high + 11) for low, high in zip(around.min(0), around.max(0), strict=True)
            )
            soft.append(p.array[n][box].ravel())
            true.append(one.truth(one.plan.structures[n - 1])[box].ravel())
        errors.append(reliability(np.concatenate(soft), np.concatenate(true)).ece)
    assert choice.ece[0] == pytest.approx(np.mean(errors), rel=1e-3)


def test_time_bounds_the_cases(run: Run) -> None:
    assert [one.case.id for one in held_out(run, "cpu", most=2)] == [run.validation_ids()[0], run.validation_ids()[-1]]
    assert not list(held_out(run, "cpu", seconds=-1.0))
    choice = choose_postprocessing(run, "cpu", seconds=-1.0)
    assert (choice.cases, choice.filters, choice.temperature) == (0, (), 1.0)
    assert json.loads((run.path / Postprocessing.file).read_text())["cases"] == 0
    (run.path / Postprocessing.file).unlink()


def test_data_set_that_is_gone(run: Run, tmp_path: Path) -> None:
    moved = Run(run.path, run.config.model_copy(update={"dataset": tmp_path / "no"}), run.plan)
    moved.config.save(run.path / "config.json", force=True)
    try:
        with pytest.raises(FileNotFoundError, match="data set must exist"):
            choose_postprocessing(moved, "cpu")
    finally:
        run.config.save(run.path / "config.json", force=True)


def test_mirror_images_are_averaged(run: Run, tmp_path: Path) -> None:
    """What is predicted of a mirror image is then the mirror image, left and right in each other's place."""
    with pytest.raises(ValueError, match="plan must mirror an axis in training"):
        medseg.Predictor.load(run, "cpu", mirror=True)
    shutil.copytree(run.path, tmp_path / "run")
    plan = run.plan.model_copy(update={"mirror": (0,), "swaps": ((2, 5),)})
    (tmp_path / "run/plan.json").write_text(plan.model_dump_json())
    image, _ = tiny.case(0)  # its axes are those of the planned grid
    other = Volume(image.array[:, ::-1].copy(), image.geometry)
    for mirror in (False, True):
        predictor = medseg.Predictor.load(tmp_path / "run", "cpu", raw=True, mirror=mirror)
        (_, soft), (_, turned) = (predictor.predict(i, probabilities=True) for i in (image, other))
        assert soft is not None and turned is not None
        difference = np.abs(turned.array[[0, 2, 1], ::-1] - soft.array).max()
        assert difference < 1e-4 if mirror else difference > 0.01


@pytest.mark.parametrize(
    ("trained", "able", "used"),
    [("bf16-mixed", True, "bf16-mixed"), ("bf16-mixed", False, "32-true"), ("32-true", True, "32-true")],
)
def test_a_cpu_predicts_in_bf16_where_it_can_and_training_did(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: str, able: bool, used: str
) -> None:
    shutil.copytree(run.path, tmp_path / "run")
    config = json.loads((tmp_path / "run/config.json").read_text())
    (tmp_path / "run/config.json").write_text(json.dumps({**config, "precision": "auto"}))
    plan = run.plan.model_copy(update={"precision": trained})
    (tmp_path / "run/plan.json").write_text(plan.model_dump_json())
    monkeypatch.setattr("medseg.inference.has_bf16", lambda device: able)
    predictor = medseg.Predictor.load(tmp_path / "run", "cpu", raw=True)
    assert predictor.precision == used
    image, _ = tiny.case(33)
    labels, exact = predictor.predict(image)[0], medseg.Predictor.load(run, "cpu", raw=True).predict(image)[0]
    assert (labels.array != exact.array).mean() < 0.01
