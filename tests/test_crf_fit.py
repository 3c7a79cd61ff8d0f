"""Settings of the CRF chosen on held-out cases: the choice, its cross-validated gain, and the command."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from conftest import rotation
from scipy import ndimage
from test_cli import medseg_command
from torch import nn

import medseg
from medseg.crf import CRFParameters
from medseg.crf_choice import CRFChoice, choose
from medseg.crf_fit import Observed, _of_run, candidates, decided, fit_crf, read_probabilities, search
from medseg.ensemble import Members
from medseg.inference import Predictor
from medseg.io.dicom_write import write_series
from medseg.postprocessing import ComponentFilter, Postprocessing
from medseg.validation import HeldOut
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

SETTINGS = candidates(1.5)[:5]
NAMES = ("bright", "dark")
STRUCTURES = (Structure(2, "bright"), Structure(5, "dark"))
SHAPE, SPACING = (48, 40, 3), (1.0, 1.2, 4.0)


def table(seed: int, gains: tuple[float, ...], cases: int = 20, noise: float = 0.02) -> np.ndarray:
    """Dice (cases, 1 + settings, 2) where each of the settings changes every structure by its gain, and noise."""
    rng = np.random.default_rng(seed)
    before = rng.uniform(0.6, 0.8, (cases, 1, 2))
    change = np.array(gains)[None, :, None] + noise * rng.standard_normal((cases, len(gains), 2))
    return np.concatenate([before, before + change], 1)


def patients(count: int, each: int = 1) -> list[str]:
    return [f"p{n // each}" for n in range(count)]


def test_settings_that_help_are_chosen_with_their_gain() -> None:
    dice = table(0, (0.0, 0.01, 0.05, 0.0, -0.1))
    choice = choose(dice, patients(20), SETTINGS, NAMES)
    assert choice.parameters == SETTINGS[2]
    change = (dice[:, 3] - dice[:, 0]).mean(
        1
    )  # every patient is better off with the third: the others always choose it
    assert choice.overall.change == pytest.approx(change.mean())
    assert choice.p < 0.001
    draws = [change[np.random.default_rng(i).integers(0, 20, 20)].mean() for i in range(2000)]
    assert choice.overall.low == pytest.approx(np.percentile(draws, 2.5), abs=1e-3)
    assert choice.overall.high == pytest.approx(np.percentile(draws, 97.5), abs=1e-3)
    assert [g.structure for g in choice.structures] == list(NAMES)
    assert "the CRF is used: 20 validation cases of 20 patients showed a gain" in choice.reason


def test_the_gain_is_that_of_patients_who_did_not_choose() -> None:
    """Against explicit loops: each patient's cases get the settings of the highest mean on the other patients."""
    dice, who = table(3, (0.0, 0.001, 0.002, 0.0, 0.003), 12), patients(12, 2)
    dice[4, :, 1] = dice[7, :, 0] = np.nan  # not drawn
    after = np.full((12, 2), np.nan)
    for case in range(12):
        others = [n for n in range(12) if who[n] != who[case]]
        means = [np.mean([np.nanmean(dice[others, s, o] - dice[others, 0, o]) for o in range(2)]) for s in range(6)]
        best = int(np.argmax(means)) if max(means) >= 0.001 else 0
        after[case] = dice[case, best]
    choice = choose(dice, who, SETTINGS, NAMES)
    for o, gain in enumerate(choice.structures):
        assert gain.change == pytest.approx(np.nanmean(after[:, o] - dice[:, 0, o]))
        assert gain.cases == 11
    assert choice.overall.change == pytest.approx(np.mean([g.change for g in choice.structures]))


def test_luck_among_many_settings_is_no_gain() -> None:
    """No settings do anything: the best of five looks good on its own cases, and is used in few of many trials."""
    lucky, used = [], 0
    for seed in range(60):
        dice = table(seed, (0.0,) * 5, 12)
        lucky.append(max((dice[:, n] - dice[:, 0]).mean() for n in range(1, 6)))
        used += choose(dice, patients(12), SETTINGS, NAMES).parameters is not None
    assert np.mean(lucky) > 0.004
    assert used <= 4


def test_what_keeps_the_crf_off() -> None:
    good = table(1, (0.05,) * 5)
    few = choose(good[:5], patients(5), SETTINGS, NAMES)
    assert few.parameters is None and few.best is not None
    assert "cannot show a gain, 6 patients are needed" in few.reason
    assert choose(good[:18], patients(18, 6), SETTINGS, NAMES).parameters is None  # 18 cases of 3 patients
    worse = good.copy()
    worse[:, 1:, 0] += 0.1
    worse[:, 1:, 1] -= 0.08  # the mean gains, and one structure loses
    choice = choose(worse, patients(20), SETTINGS, NAMES)
    assert choice.overall.low > 0 > choice.structures[1].high and choice.parameters is None
    nothing = choose(table(2, (-0.02,) * 5), patients(20), SETTINGS, NAMES)
    assert nothing.best is None and nothing.overall.change == 0 and "20 patients showed no gain" in nothing.reason


def test_the_reason_says_what_speaks_against_the_crf() -> None:
    worse = table(1, (0.05,) * 5)
    worse[:, 1:] += np.array([0.1, -0.13])
    assert (
        "the CRF is not used: 20 validation cases of 20 patients showed a loss for dark; all"
        in choose(worse, patients(20), SETTINGS, NAMES).reason
    )
    choice = choose(table(0, (0.05,) * 5), patients(20), SETTINGS, NAMES)
    lucky = choice.model_copy(update={"settings": None, "p": 0.04})
    assert "showed no more than luck among 5 settings can bring (p = 0.040); all" in lucky.reason


def test_a_structure_of_one_patient_has_no_interval() -> None:
    dice = table(1, (0.05,) * 5, 8)
    dice[2:, :, 1] = np.nan  # drawn in two scans of one patient
    choice = choose(dice, ["a", "a", "b", "c", "d", "e", "f", "g"], SETTINGS, NAMES)
    bright, dark = choice.structures
    assert dark.cases == 2 and dark.low is None and dark.high is None
    assert bright.low is not None and "dark: Dice" in choice.reason


def test_a_choice_is_a_file_that_is_checked(tmp_path: Path) -> None:
    choice = choose(table(0, (0.05,) * 5), patients(20), SETTINGS, NAMES).store(tmp_path)
    assert CRFChoice.of(tmp_path) == choice
    assert medseg.crf_fit.crf_of_run(tmp_path) == choice.parameters
    values = json.loads((tmp_path / "crf.json").read_text())
    for settings, message in (
        ({"strength": 3}, "settings must be those"),
        ({"clip": 2.0}, "clip must be in"),
        ({"iterations": 2.5}, "iterations must be a whole number, got 2.5"),
    ):
        (tmp_path / "crf.json").write_text(json.dumps({**values, "settings": settings}))
        with pytest.raises(ValueError, match=message):
            CRFChoice.of(tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Data sets


def case(seed: int, coarse: int) -> tuple[Volume, Volume, LabelMap]:
    """An oblique image of a bright and a dark blob, probabilities in blocks of so many pixels, and the reference."""
    rng = np.random.default_rng(seed)
    geometry = Geometry.from_parts(SHAPE, SPACING, (-30, 8, 5), rotation((0.1, -0.2, 0.3)))
    smooth = ndimage.gaussian_filter(rng.standard_normal((2, *SHAPE)), (0, 6, 6, 2))
    labels = np.where(smooth[0] > 0.4 * smooth[0].max(), 2, np.where(smooth[1] > 0.4 * smooth[1].max(), 5, 0))
    labels = labels.astype(np.uint8)
    image = 100 + 60.0 * (labels == 2) - 60.0 * (labels == 5) + 6 * rng.standard_normal(SHAPE)
    blocks = labels[coarse // 2 :: coarse, coarse // 2 :: coarse]
    blocks = np.kron(blocks, np.ones((coarse, coarse, 1), int))
    pad = [(0, n - m) for n, m in zip(SHAPE, blocks.shape, strict=True)]
    blocks = np.pad(blocks, pad, mode="edge")
    p = np.stack([blocks == n for n in (0, 2, 5)]) * 0.6 + 0.4 / 3
    meta = {"structures": STRUCTURES}
    return (
        Volume(image.astype(np.float32), geometry),
        Volume(p.astype(np.float32), geometry, meta),
        LabelMap(labels, geometry, STRUCTURES),
    )


def write_set(root: Path, coarse: int, count: int = 7) -> Path:
    for n in range(count):
        image, soft, labels = case(n, coarse)
        medseg.write(image, root / "images" / f"c{n}.nii.gz")
        medseg.write(labels, root / "labels" / f"c{n}.nii.gz")
        medseg.write(soft, root / "probabilities" / f"c{n}_probabilities.nii.gz")
    return root


@pytest.fixture(scope="module")
def blocky(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("blocky"), 4)


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """The four settings of middle weight."""
    monkeypatch.setattr("medseg.crf_fit.candidates", lambda mm: candidates(mm)[4:8])


@pytest.mark.usefixtures("few")
def test_blocky_masks_gain_and_every_way_to_use_the_choice_does(blocky: Path, tmp_path: Path) -> None:
    out = tmp_path / "crf.json"
    steps: list[tuple[int, int]] = []
    choice = fit_crf(blocky, device="cpu", progress=lambda done, total: steps.append((done, total)))
    assert steps[-1] == (28, 28)
    assert choice.parameters in candidates(1.095)[4:8]
    assert choice.overall.low > 0.01
    printed = medseg_command("refine", "--fit", blocky, "--out", out, "--device", "cpu", "--json").stdout
    assert json.loads(printed) == json.loads(out.read_text()) == json.loads(choice.model_dump_json())
    image, soft, labels = case(20, 4)  # another case
    medseg.write(image, tmp_path / "i.nii.gz")
    medseg.write(soft, tmp_path / "p.nii.gz")
    done = medseg_command(
        "refine", tmp_path / "i.nii.gz", tmp_path / "p.nii.gz", "--parameters", out, "--out", tmp_path / "r.nii.gz",
        "--device", "cpu",
    )  # fmt: skip
    assert "the CRF is used: 7 validation cases" in done.stderr
    got = medseg.read_labels(tmp_path / "r.nii.gz")
    want = decided(medseg.refine(image, soft, parameters=choice.parameters, device="cpu"))
    np.testing.assert_array_equal(got.array, want.array)
    assert (got.array == labels.array).mean() > (decided(soft).array == labels.array).mean()


@pytest.mark.usefixtures("few")
def test_right_probabilities_are_left_alone(tmp_path: Path) -> None:
    choice = fit_crf(write_set(tmp_path / "set", 1), device="cpu")
    assert choice.parameters is None
    assert choice.overall.change == 0
    choice.save(tmp_path / "off.json")
    done = medseg_command(
        "refine", tmp_path / "set/images/c0.nii.gz", tmp_path / "set/probabilities/c0_probabilities.nii.gz",
        "--parameters", tmp_path / "off.json", "--out", tmp_path / "same.nii.gz",
    )  # fmt: skip
    assert "the CRF is not used: 7 validation cases of 7 patients showed no gain" in done.stderr
    np.testing.assert_array_equal(medseg.read_labels(tmp_path / "same.nii.gz").array, case(0, 1)[2].array)


def test_data_sets_that_do_not_fit(blocky: Path, tmp_path: Path) -> None:
    bad = write_set(tmp_path / "bad", 4, 2)
    path = bad / "labels" / "c1.nii.gz"
    labels = medseg.read_labels(path)
    medseg.write(LabelMap(np.where(labels.array == 5, 7, labels.array), labels.geometry), path, force=True)
    with pytest.raises(ValueError, match=r"labels must be among .* \(2 bright, 5 dark\), got 7 in case c1"):
        fit_crf(bad, device="cpu", most=2)
    soft = bad / "probabilities" / "c1_probabilities.nii.gz"
    other = medseg.read(soft)
    medseg.write(replace(other, meta={"structures": (Structure(2, "bright"), Structure(6, "grey"))}), soft, force=True)
    with pytest.raises(ValueError, match=r"same structures .* \(2 bright, 5 dark\), got 2 bright, 6 grey in case c1"):
        fit_crf(bad, device="cpu", most=2)
    soft = bad / "probabilities" / "c0_probabilities.nii.gz"
    moved = read_probabilities(soft)
    grid = moved.geometry.affine.copy()
    grid[0, 3] += 1
    medseg.write(replace(moved, geometry=Geometry(moved.geometry.shape, grid)), soft, force=True)
    with pytest.raises(GeometryError, match="image and probabilities of case c0"):
        fit_crf(bad, device="cpu", most=2)
    with pytest.raises(FileNotFoundError, match="probabilities must be files <case>_probabilities"):
        fit_crf(blocky, probabilities=blocky / "images" / "..", device="cpu")
    with pytest.raises(FileNotFoundError, match="--fit-probabilities"):
        fit_crf(blocky, probabilities=blocky / "none", device="cpu")
    with pytest.raises(ValueError, match=r"floats, got uint8 .* may be a label map"):
        read_probabilities(blocky / "labels" / "c0.nii.gz")
    for wrong in ({"most": 0}, {"seconds": 0.0}):
        with pytest.raises(ValueError, match="cases and time must be more than 0"):
            fit_crf(blocky, device="cpu", **wrong)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").touch()
    with pytest.raises(ValueError, match="probabilities must be given for a data set alone"):
        fit_crf(tmp_path / "run", probabilities=blocky / "probabilities", device="cpu")
    nothing = replace(observed(0), references={})
    with pytest.raises(ValueError, match="at least one in which a structure was drawn"):
        search([nothing], STRUCTURES, SETTINGS[:1], device="cpu")


def observed(seed: int) -> Observed:
    image, soft, labels = case(seed, 4)
    return Observed(f"p{seed}", image, soft, decided, {s.number: labels.mask(s.number) for s in STRUCTURES})


def test_layers_that_overlap() -> None:
    """Dice of layers, by hand; a structure that was not drawn has none."""
    one = observed(1)
    layers = LabelMap(np.asarray(one.probabilities.array)[1:], one.image.geometry, STRUCTURES)
    masks = {2: one.references[2]}
    found = search([replace(one, probabilities=layers, references=masks)], STRUCTURES, SETTINGS[:1], device="cpu")
    refined = medseg.refine(one.image, layers, parameters=SETTINGS[0], device="cpu")
    assert found.dice.shape == (1, 2, 2) and np.isnan(found.dice[0, :, 1]).all()
    for soft, dice in zip((layers, refined), found.dice[0, :, 0], strict=True):
        mask = np.asarray(soft.array)[0] >= 0.5
        assert dice == pytest.approx(2 * (mask & masks[2]).sum() / (mask.sum() + masks[2].sum()))


def test_probabilities_beside_the_label_maps_that_predict_writes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    root = write_set(tmp_path / "set", 4, 3)
    for n in range(3):
        shutil.copy(root / "labels" / f"c{n}.nii.gz", root / "probabilities")
    (root / "probabilities" / "c2_probabilities.nii.gz").unlink()
    (root / "probabilities" / "c2.nii.gz").unlink()
    choice = fit_crf(root, device="cpu")
    before = np.mean([observed(n).dice(case(n, 4)[1], STRUCTURES) for n in range(2)])
    assert choice.cases == 2 and choice.overall.before == pytest.approx(before)
    assert "1 of 3 labelled cases have no probabilities and are left out" in caplog.text


# ---------------------------------------------------------------------------------------------------------------------
# Runs


class Thresholds(nn.Module):
    """Bright is 2, dark is 5, by intensity alone."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([torch.ones_like(x), 2 * x - 1, -2 * x - 1], 1)


def test_cases_of_a_run_are_those_that_predict_would_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With its temperature and filters, and without the voxels that do not count, in prediction and reference."""
    root = tiny.write_dataset(tmp_path / "set", 2)
    for path in sorted((root / "labels").iterdir()):
        labels = medseg.read_labels(path)
        array = np.array(labels.array)
        array[:, :, :5] = 9
        medseg.write(replace(labels, array=array, structures=()), path, force=True)
    plan = tiny.plan().model_copy(update={"ignore": 9})
    drop = ComponentFilter(number=2, name="bright", min_mm3=60.0, dice_before=0.0, dice_after=0.0)
    chosen = Postprocessing(cases=2, temperature=2.5, filters=(drop,)).store(tmp_path)

    def predictor(temperature: float, chosen: Postprocessing | None) -> Predictor:
        members = Members([Thresholds()], plan.overlapping, temperature).eval()
        return Predictor(plan, members, torch.device("cpu"), "32-true", chosen)

    cases = [HeldOut(one, predictor(1.0, None)) for one in medseg.load_dataset(root).cases]
    monkeypatch.setattr("medseg.crf_fit.held_out", lambda folder, device, most: cases[:most])
    parameters = CRFParameters(bilateral_weight=2.0, largest_loss=1.0)
    for one, seen in zip(cases, _of_run(tmp_path, "cpu", 2), strict=True):
        drawn = np.asarray(medseg.read_labels(one.case.label).array)
        both = seen.probabilities, seen.refined(parameters, "cpu")
        dices = []
        for soft, crf in zip(both, (None, parameters), strict=True):
            want = np.asarray(predictor(2.5, chosen).predict(one.image, crf=crf)[0].array)
            got = np.asarray(seen.decide(soft).array)
            np.testing.assert_array_equal(got, np.where(drawn == 9, 0, want))
            assert (want[drawn == 9] > 0).any()
            pairs = [((want == n) & (drawn != 9), drawn == n) for n in (2, 5)]
            dices.append([2 * (a & b).sum() / (a.sum() + b.sum()) for a, b in pairs])
            assert seen.dice(soft, STRUCTURES) == pytest.approx(dices[-1])
        assert dices[0] != dices[1]
        raw = one.predictor.predict(one.image)[0].mask(2) & (drawn != 9)
        assert raw.sum() > seen.decide(both[0]).mask(2).sum()  # the filter did something


# ---------------------------------------------------------------------------------------------------------------------
# The command on one image


def test_refine_says_what_is_wrong(blocky: Path, tmp_path: Path) -> None:
    image, soft = blocky / "images" / "c0.nii.gz", blocky / "probabilities" / "c0_probabilities.nii.gz"
    labels, out = blocky / "labels" / "c0.nii.gz", tmp_path / "o.nii.gz"
    small = medseg.crop(medseg.read(image), (0, 0, 0), (20, 20, 3))
    medseg.write(small, tmp_path / "small.nii.gz")
    for arguments, code, message in (
        ((image, labels, "--out", out), 1, "probabilities must be floats, got uint8"),
        ((soft, image, "--out", out), 1, "probabilities must be in 0..1"),
        ((tmp_path / "small.nii.gz", soft, "--out", out), 1, "must lie on the same grid, got shapes"),
        ((image, soft, "--out", image), 1, "output must not exist yet"),
        ((image, soft, "--out", out, "--clip", "0.7"), 1, "clip must be in (0, 0.5)"),
        ((image, soft, "--out", out, "--parameters", labels, "--clip", "0.1"), 2, "takes no preset"),
        ((image, soft, "--out", tmp_path / "o.seg.dcm"), 1, "image must be a DICOM series for o.seg.dcm"),
        ((image, soft, "--out", out, "--minutes", 3), 2, "go with --fit"),
        (("--fit", blocky, "--out", out, "--minutes", 0), 1, "cases and time must be more than 0"),
        (("--fit", blocky, "--out", out, "--cases", 0), 1, "cases and time must be more than 0"),
        ((image, soft), 2, "--out are needed"),
        (("--fit", blocky), 2, "needs --out"),
        ((image, "--fit", blocky), 2, "--fit takes no image"),
    ):
        done = medseg_command("refine", *arguments, "--device", "cpu", code=code)
        assert message in done.stderr.replace("\n", " ")
        assert not done.stdout
    assert not out.exists()


def test_refine_settings_axis_guard_and_json(blocky: Path, tmp_path: Path) -> None:
    image, soft = blocky / "images" / "c1.nii.gz", blocky / "probabilities" / "c1_probabilities.nii.gz"
    own = ("--gaussian-weight", 0.5, "--bilateral-sigma-mm", 4, "--bilateral-weight", 2, "--axis", 0)
    found = json.loads(
        medseg_command("refine", image, soft, "--out", tmp_path / "a.nii.gz", *own, "--device", "cpu", "--json").stdout
    )
    parameters = medseg.CRFParameters(gaussian_weight=0.5, bilateral_sigma_mm=4.0, bilateral_weight=2.0)
    assert found["settings"] == asdict(parameters)
    want = decided(medseg.refine(medseg.read(image), medseg.read(soft), parameters=parameters, axis=0, device="cpu"))
    np.testing.assert_array_equal(medseg.read_labels(tmp_path / "a.nii.gz").array, want.array)
    volumes = {row["structure"]: row["after_mm3"] for row in found["structures"]}
    assert volumes == {s.name: pytest.approx(want.mask(s.number).sum() * 4.8) for s in STRUCTURES}

    mixed = ("--preset", "pydensecrf", "--gaussian-sigma-mm", 30)
    assert (
        "counts pixels" in medseg_command("refine", image, soft, "--out", tmp_path / "b.nii.gz", *mixed, code=2).stderr
    )
    strong = ("--preset", "pydensecrf", "--gaussian-weight", 600, "--device", "cpu")
    done = medseg_command("refine", image, soft, "--out", tmp_path / "b.nii.gz", *strong)
    assert "often erases organs" in done.stderr
    erased = medseg.read_labels(tmp_path / "b.nii.gz")
    done = medseg_command("refine", image, soft, "--out", tmp_path / "c.nii.gz", *strong, "--largest-loss", 0.2)
    before, kept = decided(medseg.read(soft)), medseg.read_labels(tmp_path / "c.nii.gz")
    for s in STRUCTURES:
        lost = 1 - erased.mask(s.number).sum() / before.mask(s.number).sum()
        if lost > 0.2:
            assert "is kept unrefined" in done.stderr
            np.testing.assert_array_equal(kept.mask(s.number), before.mask(s.number))
    assert any(erased.mask(s.number).sum() < 0.8 * before.mask(s.number).sum() for s in STRUCTURES)


def test_refine_on_a_dicom_series_and_into_dicom(tmp_path: Path) -> None:
    image, soft, _ = case(3, 4)
    write_series(
        Volume(image.array.astype(np.int16), image.geometry), tmp_path / "scan", description="x", modality="MR"
    )
    scan = medseg.read(tmp_path / "scan")
    flipped = medseg.reorient(soft, scan.geometry.orientation)
    medseg.write(replace(flipped, geometry=scan.geometry), tmp_path / "p.nii.gz")
    for name in ("r.nii.gz", "r.seg.dcm"):
        medseg_command("refine", tmp_path / "scan", tmp_path / "p.nii.gz", "--out", tmp_path / name, "--device", "cpu")
    nifti, seg = (medseg.read_labels(tmp_path / name, like=scan) for name in ("r.nii.gz", "r.seg.dcm"))
    for s in STRUCTURES:
        assert nifti.mask(s.number).any()
        np.testing.assert_array_equal(seg.mask(s.name), nifti.mask(s.number))
