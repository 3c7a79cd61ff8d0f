"""Sliding windows against brute force, MONAI, and networks whose answer is known."""

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.inferers import sliding_window_inference

from medseg.sliding_window import (
    gaussian_weights,
    labels_of,
    predict_labels,
    predict_probabilities,
    sliding_logits_slabs,
    window_starts,
)


def whole_logits(network, image, patch, **options):
    """All logits, put together from copies of the slabs, which must come in order without gap or overlap."""
    parts, done, axis = [], 0, 0
    for slab in sliding_logits_slabs(network, image, patch, **options):
        assert slab.start == done and slab.stop - slab.start == slab.logits.shape[slab.axis + 1] > 0
        done, axis = slab.stop, slab.axis
        parts.append(slab.logits.clone())
    assert done == image.shape[axis + 1] and axis == (0 if len(patch) == 3 else 2)
    return torch.cat(parts, axis + 1)


def brute_force(network, image, patch, overlap):
    """Every window weighted and added in float64 arrays of the full size, by loops."""
    pads = [
        (max(0, p - n) // 2, max(0, p - n) - max(0, p - n) // 2) for p, n in zip(patch, image.shape[1:], strict=True)
    ]
    padded = np.pad(image.numpy(), [(0, 0), *pads], mode="edge")
    weight = np.ones(())
    for p in patch:
        x = np.arange(p) - (p - 1) / 2
        weight = weight[..., None] * np.maximum(np.exp(-(x**2) / (2 * (0.125 * p) ** 2)), 1e-6)
    total = None
    for start in product(*(window_starts(n, p, overlap) for n, p in zip(padded.shape[1:], patch, strict=True))):
        here = (slice(None), *(slice(s, s + p) for s, p in zip(start, patch, strict=True)))
        with torch.no_grad():
            logits = network(torch.from_numpy(padded[here].copy())[None])[0].double().numpy()
        if total is None:
            total, count = np.zeros((len(logits), *padded.shape[1:])), np.zeros(padded.shape[1:])
        total[here] += weight * logits
        count[here[1:]] += weight
    inner = tuple(slice(a, a + n) for (a, _), n in zip(pads, image.shape[1:], strict=True))
    return (total / count)[(slice(None), *inner)]


class Warped(torch.nn.Module):
    """A network whose answer depends on the place in the window, so that weights and places matter."""

    def __init__(self, classes, channels, dimensions):
        super().__init__()
        kind = torch.nn.Conv3d if dimensions == 3 else torch.nn.Conv2d
        self.conv = kind(channels, classes, 3, padding=1)

    def forward(self, x):
        ramp = torch.linspace(-1, 1, x.shape[-1]) + torch.linspace(-2, 2, x.shape[-2])[:, None]
        return self.conv(x) * (1 + ramp)


# ---------------------------------------------------------------------------------------------------------------------
# Windows and weights


@given(st.integers(1, 300), st.integers(1, 120), st.floats(0, 0.95))
def test_starts_cover_the_axis_evenly(size, patch, overlap):
    starts = window_starts(size, patch, overlap)
    if size <= patch:
        assert starts == [0]
        return
    steps = np.diff(starts)
    assert starts[0] == 0 and starts[-1] == size - patch
    assert steps.min() >= 1 and steps.max() <= max(1, math.floor(patch * (1 - overlap) + 1e-9))
    assert steps.max() - steps.min() <= 1
    assert len(starts) == 1 + math.ceil((size - patch) / max(1, math.floor(patch * (1 - overlap) + 1e-9)))


def test_starts_known_by_hand():
    assert window_starts(512, 128, 0.5) == [0, 64, 128, 192, 256, 320, 384]
    assert window_starts(10, 4, 0) == [0, 3, 6]
    assert window_starts(5, 4, 0.9) == [0, 1]


@pytest.mark.parametrize("arguments", [(0, 4, 0.5), (4, 0, 0.5), (8, 4, 1.0), (8, 4, -0.1), (8, 4, math.nan)])
def test_starts_refuse_what_makes_no_sense(arguments):
    with pytest.raises(ValueError, match="must be"):
        window_starts(*arguments)


def test_weights_are_a_positive_product_of_gaussians():
    weights = gaussian_weights((8, 5, 3)).numpy()
    assert weights.shape == (8, 5, 3) and weights.min() > 0
    x = [(np.arange(n) - (n - 1) / 2) / (0.125 * n) for n in (8, 5, 3)]
    expected = np.exp(-0.5 * sum(np.meshgrid(*(v**2 for v in x), indexing="ij")))
    np.testing.assert_allclose(weights, expected, rtol=1e-12)
    assert gaussian_weights((64, 2), 0.01).min() > 0


# ---------------------------------------------------------------------------------------------------------------------
# Logits


sizes = st.integers(1, 14)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, sizes),
    patch=st.tuples(*(st.integers(1, 9),) * 3),
    overlap=st.sampled_from([0.0, 0.25, 0.5, 0.7]),
    batch=st.integers(1, 7),
    seed=st.integers(0, 99),
)
def test_3d_equals_brute_force(shape, patch, overlap, batch, seed):
    torch.manual_seed(seed)
    network, image = Warped(3, 2, 3).eval(), torch.randn(2, *shape)
    got = whole_logits(network, image, patch, overlap=overlap, batch=batch)
    assert got.dtype == torch.float32
    np.testing.assert_allclose(got.numpy(), brute_force(network, image, patch, overlap), atol=1e-5)


@settings(max_examples=40, deadline=None)
@given(
    shape=st.tuples(sizes, sizes, st.integers(1, 6)),
    patch=st.tuples(*(st.integers(1, 9),) * 2),
    overlap=st.sampled_from([0.0, 0.5, 0.7]),
    batch=st.integers(1, 9),
    seed=st.integers(0, 99),
)
def test_2d_equals_brute_force_slice_by_slice(shape, patch, overlap, batch, seed):
    torch.manual_seed(seed)
    network, image = Warped(3, 2, 2).eval(), torch.randn(2, *shape)
    got = whole_logits(network, image, patch, overlap=overlap, batch=batch)
    expected = [brute_force(network, image[..., k], patch, overlap) for k in range(shape[2])]
    np.testing.assert_allclose(got.numpy(), np.stack(expected, -1), atol=1e-5)


@pytest.mark.parametrize("patch", [(4, 6, 5), (16, 4, 4), (4, 6), (20, 3)])
@pytest.mark.parametrize("batch", [1, 4])
def test_a_network_that_returns_its_input_returns_the_coordinates(patch, batch):
    shape = (11, 8, 13)
    image = torch.stack(torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in shape), indexing="ij"))
    got = whole_logits(lambda x: x, image, patch, batch=batch)
    torch.testing.assert_close(got, image, atol=1e-5, rtol=0)


def test_windows_arrive_as_they_are_in_the_image():
    image, seen = torch.arange(2 * 7 * 6 * 5, dtype=torch.float32).reshape(2, 7, 6, 5), []

    def network(x):
        seen.append(x.clone())
        return x

    list(sliding_logits_slabs(network, image, (4, 3, 5), overlap=0.5))
    starts = list(product(window_starts(7, 4, 0.5), window_starts(6, 3, 0.5), [0]))
    assert len(seen) == len(starts)
    for window, (i, j, _) in zip(seen, starts, strict=True):
        torch.testing.assert_close(window[0], image[:, i : i + 4, j : j + 3], atol=0, rtol=0)


def test_equals_monai_where_the_windows_agree():
    torch.manual_seed(0)
    network, image, patch = Warped(4, 1, 3).eval(), torch.randn(1, 24, 30, 20), (8, 12, 8)
    assert [window_starts(n, p, 0.5) for n, p in zip(image.shape[1:], patch, strict=True)] == [
        [0, 4, 8, 12, 16], [0, 6, 12, 18], [0, 4, 8, 12]
    ]  # fmt: skip
    with torch.no_grad():
        same = sliding_window_inference(image[None], patch, 3, network, 0.5, roi_weight_map=gaussian_weights(patch))[0]
    torch.testing.assert_close(whole_logits(network, image, patch, batch=3), same.float(), atol=1e-5, rtol=1e-5)
    # MONAI's own map lifts weights below 1e-3 of the centre's, so compare where the windows hardly contradict each other
    network = torch.nn.Conv3d(1, 4, 3, padding=1)
    with torch.no_grad():
        own = sliding_window_inference(image[None], patch, 3, network, 0.5, mode="gaussian")[0]
    got = whole_logits(network, image, patch, batch=3)
    assert (got - own).abs().mean() < 0.05 * own.std()
    assert (got.argmax(0) == own.argmax(0)).float().mean() > 0.97


def test_small_image_is_padded_with_its_border_and_cropped_back():
    image, seen = torch.arange(1.0, 4).view(1, 3, 1, 1).expand(1, 3, 9, 1), []

    def network(x):
        seen.append(x.clone())
        return torch.cat([x, 2 * x], 1)

    got = whole_logits(network, image, (6, 4, 5))
    assert got.shape == (2, 3, 9, 1)
    torch.testing.assert_close(got[1], 2 * image[0])
    assert all(x.shape == (1, 1, 6, 4, 5) for x in seen)
    assert all(x[0, 0, :, 0, 0].tolist() == [1, 1, 2, 3, 3, 3] for x in seen)


@pytest.mark.parametrize("batch", [1, 2, 5, 100])
def test_memory_is_bounded_by_the_patch(batch, monkeypatch):
    made = []
    original = torch.zeros

    def zeros(*arguments, **options):
        made.append(original(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch, "zeros", zeros)
    image, patch = torch.zeros(1, 60, 12, 9), (8, 6, 9)
    made.clear()
    largest = 0
    for slab in sliding_logits_slabs(lambda x: x.repeat(1, 5, 1, 1, 1), image, patch, batch=batch):
        largest = max(largest, slab.logits.untyped_storage().nbytes() // 4)
    windows_per_row = 3  # 12 voxels, patch 6, overlap one half
    reach = 4 * math.ceil((batch - 1) / windows_per_row)
    assert largest <= 5 * min(60, patch[0] + reach) * 12 * 9
    assert max(t.numel() for t in made) == largest


def test_images_of_any_type_and_memory_layout():
    image = torch.randint(-1000, 1000, (7, 9, 1, 8), dtype=torch.int16).permute(2, 3, 0, 1)
    got = whole_logits(lambda x: x.float(), image, (5, 4, 6))
    torch.testing.assert_close(got, image.float(), atol=1e-3, rtol=0)


def test_autocast_runs_the_network_in_half_precision_and_sums_in_full():
    torch.manual_seed(0)
    network, image, types = torch.nn.Conv3d(1, 3, 1), torch.randn(1, 12, 10, 9), set()

    def spy(x):
        y = network(x)
        types.add(y.dtype)
        return y

    got = whole_logits(spy, image, (6, 5, 9), autocast=torch.bfloat16)
    assert types == {torch.bfloat16} and got.dtype == torch.float32
    with torch.no_grad():
        torch.testing.assert_close(got, network(image[None])[0], atol=0.03, rtol=0.03)


def test_progress_counts_windows():
    calls = []
    list(
        sliding_logits_slabs(
            lambda x: x, torch.zeros(1, 8, 8, 4), (4, 4, 4), batch=4, progress=lambda *c: calls.append(c)
        )
    )
    assert calls == [(4, 9), (8, 9), (9, 9)]


# ---------------------------------------------------------------------------------------------------------------------
# Decisions


@pytest.mark.parametrize("patch", [(8, 7, 6), (9, 5)])
def test_labels_and_probabilities_agree_with_the_logits(patch):
    torch.manual_seed(1)
    network, image = Warped(5, 1, len(patch)).eval(), torch.randn(1, 19, 15, 11)
    logits = whole_logits(network, image, patch, batch=2)
    labels = predict_labels(network, image, patch, batch=3)
    assert labels.dtype == torch.uint8 and labels.shape == image.shape[1:]
    assert torch.equal(labels.long(), logits.argmax(0))
    probabilities = predict_probabilities(network, image, patch)
    torch.testing.assert_close(probabilities, logits.softmax(0), atol=1e-5, rtol=0)
    half = predict_probabilities(network, image, patch, dtype=torch.float16, overlapping=True)
    assert half.dtype == torch.float16
    torch.testing.assert_close(half.float(), logits.sigmoid(), atol=1e-3, rtol=0)
    masks = predict_labels(network, image, patch, overlapping=True)
    assert masks.dtype == torch.bool and torch.equal(masks, logits >= 0)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 300), st.integers(0, 9))
def test_argmax_equals_numpy_and_takes_the_first_of_equals(classes, seed):
    logits = np.random.default_rng(seed).integers(-3, 3, (classes, 5, 4, 3)).astype(np.float32)
    labels = labels_of(torch.from_numpy(logits))
    assert labels.dtype == (torch.uint8 if classes < 256 else torch.int16)
    np.testing.assert_array_equal(labels.numpy(), logits.argmax(0))


# ---------------------------------------------------------------------------------------------------------------------
# Bad input


def test_bad_input_is_refused():
    good = torch.zeros(1, 8, 8, 8)

    def run(network=lambda x: x, image=good, patch=(4, 4, 4), **options):
        return list(sliding_logits_slabs(network, image, patch, **options))

    with pytest.raises(ValueError, match=r"image must have shape \(C, I, J, K\), got \(8, 8, 8\)"):
        run(image=good[0])
    with pytest.raises(ValueError, match="patch must be two or three positive integers"):
        run(patch=(4, 4, 4, 4))
    with pytest.raises(ValueError, match="patch must be two or three positive integers"):
        run(patch=(4, 0, 4))
    with pytest.raises(ValueError, match="batch must be at least 1"):
        run(batch=0)
    with pytest.raises(ValueError, match="overlap must be"):
        run(overlap=1)
    with pytest.raises(ValueError, match="network must return logits of the size it is given"):
        run(network=lambda x: x[..., ::2])
    with pytest.raises(ValueError, match="network must return logits of the size it is given"):
        run(network=lambda x: x[0])


@pytest.mark.parametrize("overlapping", [False, True])
def test_nan_logits_are_refused_not_called_background(overlapping):
    image = torch.zeros(1, 8, 8, 8)
    image[0, 5, 5, 5] = math.nan
    with pytest.raises(ValueError, match="logits must be numbers, got NaN"):
        predict_labels(lambda x: torch.cat([x, x], 1), image, (4, 4, 4), overlapping=overlapping)
