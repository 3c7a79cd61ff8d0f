"""Metrics of probabilities against sums written out, scikit-learn and hand-made cases."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss

from medseg import calibration
from medseg.calibration import probability_scores, reliability


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 20), st.booleans(), st.sampled_from([np.float32, np.float64]))
def test_against_sums_written_out(seed, bins, masked, dtype):
    rng = np.random.default_rng(seed)
    p = rng.random((5, 7, 3)).astype(dtype)
    t = rng.random((5, 7, 3)) < p
    w = rng.random((5, 7, 3)) < 0.6 if masked else np.ones((5, 7, 3), bool)
    if not w.any():
        return
    found = reliability(p, t, within=w if masked else None, bins=bins)
    q, y = p[w].astype(float), t[w]
    error = 0.0
    for n in range(bins):
        own = (np.minimum((q * bins).astype(int), bins - 1)) == n
        if own.any():
            error += own.mean() * abs(q[own].mean() - y[own].mean())
    assert found.ece == pytest.approx(error, abs=1e-9)
    assert found.brier == pytest.approx(brier_score_loss(y, q, labels=[False, True]), abs=1e-9)
    assert found.soft_dice == pytest.approx(2 * (q * y).sum() / ((q**2).sum() + y.sum()))
    assert found.count.sum() == w.sum()


def test_hard_masks_have_their_dice():
    p, t = np.zeros((4, 5, 6)), np.zeros((4, 5, 6), bool)
    p[1:3, 1:4], t[1:3, 2:5] = 1, True
    found = reliability(p, t)
    assert found.soft_dice == pytest.approx(2 / 3)
    assert found.brier == found.ece == pytest.approx(24 / 120)


def test_perfectly_calibrated_and_overconfident():
    t = np.arange(1000).reshape(10, 10, 10) % 10 < 7
    assert reliability(np.full(t.shape, 0.7), t).ece == pytest.approx(0, abs=1e-12)
    assert reliability(np.full(t.shape, 0.95), t).ece == pytest.approx(0.25)


def test_pieces_add_up(monkeypatch):
    p = np.random.default_rng(0).random((9, 8, 7))
    whole = reliability(p, p > 0.4)
    monkeypatch.setattr(calibration, "CHUNK", 50)
    pieces = reliability(torch.as_tensor(p), torch.as_tensor(p > 0.4))
    assert (pieces.soft_dice, pieces.brier, pieces.ece) == pytest.approx((whole.soft_dice, whole.brier, whole.ece))


def test_structures_of_layers_and_of_label_maps():
    rng = np.random.default_rng(1)
    p = rng.random((2, 6, 5, 4))
    labels = rng.choice([0, 3, 8], (6, 5, 4))
    a = probability_scores(p, labels, [8, 3])
    b = probability_scores(p, np.stack([labels == 8, labels == 3]))
    assert a == b
    assert a[1]["brier"] == pytest.approx(((p[1] - (labels == 3)) ** 2).mean())


def test_undefined_and_refused():
    empty = np.zeros((3, 4, 5), bool)
    assert np.isnan(reliability(empty.astype(float), empty).soft_dice)
    assert np.isnan(reliability(empty.astype(float), empty, within=empty).brier)
    with pytest.raises(ValueError, match="between 0 and 1, got 0 to 3"):
        reliability(np.array([0.0, 3.0]), np.array([True, False]))
    with pytest.raises(ValueError, match="between 0 and 1"):
        reliability(np.array([0.0, np.nan]), np.array([True, False]))
    with pytest.raises(ValueError, match="one shape"):
        reliability(np.zeros((3, 4)), empty)
    with pytest.raises(TypeError, match="floats and the reference bool"):
        reliability(np.zeros((3, 4, 5), int), empty)
    with pytest.raises(ValueError, match="one layer per structure, got 3 for 2"):
        probability_scores(np.zeros((3, 4, 5)), np.zeros((4, 5), int), [1, 2])
    with pytest.raises(ValueError, match="bins must"):
        reliability(np.zeros(3), np.zeros(3, bool), bins=0)
