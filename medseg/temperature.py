"""Temperature of probabilities: one number that divides the logits, so that 0.8 means right in 80 of 100 voxels."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize_scalar
from scipy.special import log_expit, logsumexp

__all__ = ["fit_temperature", "negative_log_likelihood", "tempered"]

Array = NDArray[Any]
RANGE = (0.05, 20.0)


def tempered(logits: Array, temperature: float, overlapping: bool = False) -> Array:
    """Probabilities (N, K) of logits (N, K) at a temperature; logarithms of probabilities are logits, too."""
    scaled = np.asarray(logits, np.float64) / temperature
    if overlapping:
        return np.asarray(np.exp(log_expit(scaled)))
    return np.asarray(np.exp(scaled - logsumexp(scaled, 1, keepdims=True)))


def negative_log_likelihood(logits: Array, truth: Array, temperature: float, overlapping: bool = False) -> float:
    """Mean over voxels of minus the logarithm of the probability of what is true (nats).

    Parameters
    ----------
    logits : (N, K) floats
    truth : (N, K)
        Exclusive classes: bool, the classes that may be true (several where a structure is unknown); their probabilities
        add up. Overlapping ones: 1 or 0, and NaN where unknown.
    temperature : float
    overlapping : bool
    """
    scaled = np.asarray(logits, np.float64) / temperature
    if overlapping:
        lost = -np.where(truth > 0.5, log_expit(scaled), log_expit(-scaled))
        return float(np.nanmean(np.where(np.isnan(truth), np.nan, lost)))
    return float(np.mean(logsumexp(scaled, 1) - logsumexp(np.where(truth, scaled, -np.inf), 1)))


def fit_temperature(logits: Array, truth: Array, overlapping: bool = False) -> float:
    """The temperature between 0.05 and 20 of the least :func:`negative_log_likelihood` [1]_; O(N K) a try, about 20 tries.

    .. [1] Guo et al., On Calibration of Modern Neural Networks, ICML 2017, doi:10.48550/arXiv.1706.04599
    """
    found = minimize_scalar(
        lambda log: negative_log_likelihood(logits, truth, float(np.exp(log)), overlapping),
        bounds=np.log(RANGE),
        method="bounded",
        options={"xatol": 1e-4},
    )
    return float(np.exp(found.x))
