"""Comparison of runs, ranking, worst cases, files of rows."""

from __future__ import annotations

import csv

import numpy as np
import pytest
from scipy import stats

from medseg.scores import Evaluation
from medseg.statistics import compare, holm, rank, worst_cases, write_rows


def run(values, failed=(), **more) -> Evaluation:
    """An evaluation from Dice by structure and case; None is left out."""
    rows = [
        {"case": f"c{n:02d}", "structure": name, "label": 1, "dice": v, "hd95_mm": 10 * (1 - v)}
        for name, column in values.items() for n, v in enumerate(column) if v is not None
    ]  # fmt: skip
    rows += [{"case": c, "structure": "", "label": None, "error": "must be readable, got none"} for c in failed]
    return Evaluation(tuple(rows))


def test_two_runs_on_the_same_cases():
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.6, 0.8, 20), rng.uniform(0.6, 0.8, 20)
    gain = rng.uniform(0.01, 0.1, 20)
    first = run({"liver": a, "spleen": b, "only": [0.5]})
    second = run({"liver": a + gain, "spleen": rng.permutation(b)})
    liver, spleen = compare(first, second)
    assert (liver.structure, liver.n, liver.better, liver.n_first, liver.n_second) == ("liver", 20, 20, 0, 0)
    assert liver.difference == pytest.approx(gain.mean())
    assert liver.second - liver.first == pytest.approx(liver.difference)
    assert liver.p == pytest.approx(stats.wilcoxon(a + gain, a).pvalue)
    assert liver.p_holm == pytest.approx(min(1, 2 * liver.p))
    assert liver.low < gain.mean() < liver.high
    half = 1.96 * gain.std() / np.sqrt(20)  # the normal approximation of the interval
    assert liver.high - liver.low == pytest.approx(2 * half, rel=0.15)
    assert spleen.p_holm == pytest.approx(spleen.p)
    distance = compare(first, second, "hd95_mm")[0]
    assert (distance.better, distance.difference < 0) == (20, True)


def test_only_pairs_count():
    first = run({"a": [0.5, 0.6, float("nan"), 0.9]}, failed=["c09"])
    second = run({"a": [0.7, None, 0.4, 0.9]}, failed=["c01"])
    (found,) = compare(first, second)
    assert (found.n, found.n_first, found.n_second) == (2, 1, 1)
    assert found.difference == pytest.approx(0.1)
    assert compare(first, first)[0].p == 1
    (alone,) = compare(run({"a": [0.5]}), run({"a": [0.6]}))
    assert np.isnan(alone.p) and np.isnan(alone.low) and np.isnan(alone.p_holm)
    with pytest.raises(ValueError, match="share cases and structures with a value of dice"):
        compare(run({"a": [0.5]}), run({"b": [0.5]}))
    with pytest.raises(ValueError, match="metric must be a column of the rows, got 'dic'"):
        compare(first, second, "dic")


def test_holm():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])  # by hand
    assert holm([0.9, 0.8]) == [1, 1]
    corrected = holm([0.02, float("nan"), 0.01])
    assert corrected[::2] == pytest.approx([0.02, 0.02]) and np.isnan(corrected[1])
    assert holm([]) == []


def test_ranking():
    runs = {
        "middle": run({"a": [0.7, 0.8, 0.6], "b": [0.5, 0.5, 0.5]}),
        "best": run({"a": [0.9, 0.9, 0.9], "b": [0.6, 0.6, 0.5]}),
        "fails": run({"a": [0.95, None, None], "b": [0.7, None, None]}, failed=["c01", "c02"]),
    }
    best, middle, fails = rank(runs)
    assert [r.run for r in (best, middle, fails)] == ["best", "middle", "fails"]
    # ranks by (case, structure): best 2 2 1 1 1 1.5, middle 3 3 2 2 2 1.5, fails 1 1 3 3 3 3
    assert (best.mean_rank, middle.mean_rank, fails.mean_rank) == pytest.approx((8.5 / 6, 13.5 / 6, 14 / 6))
    assert (fails.missing, fails.mean) == (4, pytest.approx(0.825))  # its high mean does not help it
    assert best.low <= best.mean_rank <= best.high
    assert [r.place for r in rank({"x": runs["best"], "y": runs["best"]})] == [1, 1]
    assert [r.run for r in rank(runs, "hd95_mm")] == ["best", "middle", "fails"]
    with pytest.raises(ValueError, match="at least two"):
        rank({"x": runs["best"]})


def volumes(case, predicted, true, dice, distance) -> dict:
    return {"case": case, "structure": "tumour", "label": 1, "volume_mm3": predicted, "reference_volume_mm3": true,
            "dice": dice, "hd95_mm": distance, "volume_difference_mm3": predicted - true}  # fmt: skip


def test_a_run_that_is_right_about_an_empty_reference_is_perfect_there():
    nan = float("nan")
    both = volumes("c", 0.0, 0.0, nan, nan)  # empty for every run: undefined
    right = Evaluation((volumes("a", 8.0, 8.0, 0.9, 1.0), volumes("b", 0.0, 0.0, nan, nan), both))
    wrong = Evaluation((volumes("a", 8.0, 8.0, 0.9, 1.0), volumes("b", 5.0, 0.0, 0.0, 60.0), both))
    failed = {"case": "b", "structure": "", "label": None, "error": "must be readable, got none"}
    fails = Evaluation((volumes("a", 8.0, 8.0, 0.9, 1.0), failed, both))
    for metric, mean, other in (("dice", 0.95, 0.45), ("hd95_mm", 0.5, 30.5)):
        (found,) = compare(wrong, right, metric)
        assert (found.n, found.n_first, found.n_second, found.better) == (2, 0, 0, 1)
        assert (found.first, found.second) == pytest.approx((other, mean))
        ranked = rank({"wrong": wrong, "fails": fails, "right": right}, metric)
        assert [r.run for r in ranked] == ["right", "wrong", "fails"]
        assert [r.missing for r in ranked] == [0, 0, 1]
        assert ranked[0].mean == pytest.approx(mean)
    undefined = Evaluation(right.rows, settings={"missing": "nan"})
    assert compare(wrong, undefined, "hd95_mm")[0].n == 1
    assert compare(wrong, undefined)[0].n == 2


@pytest.mark.parametrize("metric", ["volume_difference_mm3", "volume_difference"])
def test_differences_count_without_their_sign(metric):
    def volume_run(*values):
        return Evaluation(tuple(
            {"case": f"c{n}", "structure": "a", "label": 1, metric: v} for n, v in enumerate(values)
        ))  # fmt: skip

    small, large = volume_run(1.0, -2.0, 3.0), volume_run(-8.0, 9.0, -7.0)
    (found,) = compare(large, small, metric)
    assert (found.first, found.second, found.better) == (pytest.approx(8), pytest.approx(2), 3)
    assert [r.run for r in rank({"large": large, "small": small}, metric)] == ["small", "large"]
    assert worst_cases(small, metric) == [("c2", 3), ("c1", 2), ("c0", 1)]


def test_worst_first():
    found = run({"a": [0.7, 0.2, 0.9, float("nan")], "b": [0.1, 0.4, 0.9, float("nan")]}, failed=["c07"])
    assert [case for case, _ in worst_cases(found)] == ["c07", "c01", "c00", "c02", "c03"]
    assert worst_cases(found)[1][1] == pytest.approx(0.3)
    assert [case for case, _ in worst_cases(found, "hd95_mm")] == ["c07", "c01", "c00", "c02", "c03"]


def test_rows_as_files(tmp_path):
    rows = run({"a": [0.5, float("nan")]}, failed=["c07"]).rows
    write_rows(rows, tmp_path / "rows.csv")
    with (tmp_path / "rows.csv").open(newline="") as file:
        back = list(csv.DictReader(file))
    assert [(r["case"], r["dice"]) for r in back] == [("c00", "0.5"), ("c01", ""), ("c07", "")]
    assert back[2]["error"] == "must be readable, got none"
    with pytest.raises(FileExistsError):
        write_rows(rows, tmp_path / "rows.csv")
    with pytest.raises(ValueError, match=r"\.csv or \.parquet"):
        write_rows(rows, tmp_path / "rows.txt")
    parquet = pytest.importorskip("pyarrow.parquet")
    write_rows(rows, tmp_path / "rows.parquet")
    table = parquet.read_table(tmp_path / "rows.parquet")
    assert table.column("dice").to_pylist() == [0.5, None, None]
    assert table.column("error").to_pylist() == [None, None, "must be readable, got none"]
