"""Augmentation against scipy, and against what each change must and must not do."""

from __future__ import annotations

import math
from dataclasses import fields

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import ndimage
from torch.nn import functional as F

from medseg.augmentation import Augmentation, _curve
from medseg.losses import IGNORE
from medseg.spatial import (
    Resampler,
    along_axes,
    blur_matrix,
    bspline_matrix,
    low_resolution_matrix,
    rotation_matrix,
)

OFF = {f.name: 0.0 for f in fields(Augmentation) if f.name.endswith("_chance")}
SHAPES = st.one_of(
    st.tuples(st.integers(4, 19), st.integers(4, 17)),
    st.tuples(st.integers(4, 13), st.integers(4, 9), st.integers(1, 7)),
)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def only(spacing: tuple[float, ...], **changes: object) -> Augmentation:
    """An augmentation that does nothing but what is named."""
    return Augmentation(spacing, **{**OFF, **changes})  # type: ignore[arg-type]


def known(count: int, structures: int = 2) -> torch.Tensor:
    return torch.ones(count, structures, dtype=torch.bool)


def sources(matrix: torch.Tensor, shape: tuple[int, ...], bend: np.ndarray | float = 0.0) -> np.ndarray:
    """(D, *shape) places that a moved patch reads, by hand in float64."""
    centre = (np.array(shape) - 1) / 2
    index = np.stack(np.meshgrid(*map(np.arange, shape), indexing="ij")) - centre.reshape(-1, *[1] * len(shape))
    return np.tensordot(matrix.double().numpy(), index, 1) + centre.reshape(-1, *[1] * len(shape)) + bend


class TestResampler:
    @given(shape=SHAPES, seed=st.integers(0, 999))
    def test_scipy_agrees(self, shape: tuple[int, ...], seed: int) -> None:
        generator = np.random.default_rng(seed)
        matrix = torch.from_numpy(np.eye(len(shape)) + generator.normal(0, 0.3, (len(shape),) * 2)).float()
        image = torch.from_numpy(generator.normal(size=shape)).float()
        labels = torch.from_numpy(generator.integers(0, 4, shape))
        bend = generator.normal(0, 0.7, (len(shape), *shape)).astype(np.float32) if seed % 2 else None
        resampler = Resampler(matrix, shape, None if bend is None else torch.from_numpy(bend))
        at = sources(matrix, shape, 0.0 if bend is None else bend)
        expected = ndimage.map_coordinates(image.double().numpy(), at, order=1, mode="nearest")
        assert np.abs(resampler.linear(image).numpy() - expected).max() < 1e-4
        limits = np.array(shape).reshape(-1, *[1] * len(shape)) - 0.5
        clear = (np.abs(at - np.floor(at) - 0.5) > 1e-4).all(0)  # not halfway between two voxels
        inside = ((at > -0.5) & (at < limits)).all(0)
        nearest = ndimage.map_coordinates(labels.numpy(), at, order=0, mode="nearest")
        got = resampler.labels(labels).numpy()
        assert np.array_equal(got[clear], np.where(inside, nearest, IGNORE)[clear])

    def test_affine_transform_agrees_and_axes_that_stay_are_exact(self) -> None:
        image = torch.randn(14, 11, 6, generator=seeded(0))
        matrix = rotation_matrix((0.0, 0.0, 0.4), 3, only_about=2)
        centre = (np.array(image.shape) - 1) / 2
        offset = centre - matrix.numpy() @ centre
        expected = ndimage.affine_transform(image.numpy(), matrix.numpy(), offset, order=1, mode="nearest")
        assert np.abs(Resampler(matrix, image.shape).linear(image).numpy() - expected).max() < 1e-5
        labels = torch.arange(6).expand(14, 11, 6)
        moved = Resampler(matrix, labels.shape).nearest(labels)
        assert all(torch.equal(moved[..., k][moved[..., k] != IGNORE].unique(), torch.tensor([k])) for k in range(6))

    def test_soft_labels_are_interpolated_and_what_does_not_count_stays_so(self) -> None:
        shape = (15, 12, 9)
        soft = torch.rand(2, *shape, generator=seeded(1))
        soft[1, :4] = IGNORE
        matrix = rotation_matrix((0.1, 0.2, 0.3), 3)
        resampler = Resampler(matrix, shape)
        moved = resampler.labels(soft)
        at = sources(matrix, shape)
        expected = ndimage.map_coordinates(soft[0].numpy(), at, order=1, mode="nearest")
        counted = resampler.nearest(torch.zeros(shape)) == 0
        assert np.abs(moved[0].numpy() - expected)[counted.numpy()].max() < 1e-4
        assert (moved[0][~counted] == IGNORE).all()
        assert ((moved[1] == IGNORE) == (resampler.nearest(soft[1]) == IGNORE)).all()
        assert moved[moved != IGNORE].min() >= 0
        hard = (soft > 0.5).to(torch.int8)
        assert resampler.labels(hard).dtype == torch.int8
        assert set(resampler.labels(hard).unique().tolist()) == {-1, 0, 1}


class TestMatrices:
    @given(n=st.integers(1, 30), sigma=st.floats(0.5, 1.0))
    def test_blur_is_scipys(self, n: int, sigma: float) -> None:
        image = torch.randn(n, generator=seeded(n))
        reach = max(1, round(3.5 * sigma))
        expected = ndimage.gaussian_filter1d(image.double().numpy(), sigma, mode="nearest", radius=reach)
        assert np.abs((blur_matrix(n, sigma) @ image).numpy() - expected).max() < 1e-5

    def test_low_resolution_is_two_interpolations(self) -> None:
        image = torch.randn(13, 18, 7, generator=seeded(0))
        small = [round(n * 0.6) for n in image.shape]
        coarse = F.interpolate(image[None, None], size=small, mode="nearest-exact")
        expected = F.interpolate(coarse, size=image.shape, mode="trilinear")[0, 0]
        got = along_axes(image, [low_resolution_matrix(n, 0.6) for n in image.shape])
        assert torch.allclose(got, expected, atol=1e-5)

    @given(n=st.integers(2, 70), knots=st.floats(1.0, 40.0))
    def test_bspline_reproduces_straight_lines(self, n: int, knots: float) -> None:
        matrix = bspline_matrix(n, knots)
        assert torch.allclose(matrix.sum(1), torch.ones(n), atol=1e-5)
        places = (torch.arange(matrix.shape[1]) - 1) * knots
        assert torch.allclose(matrix @ places, torch.arange(n).float(), atol=1e-2)


class TestSpace:
    @pytest.mark.parametrize("size", [(24, 31), (17, 24, 21)])
    def test_image_and_label_move_together(self, size: tuple[int, ...]) -> None:
        axes = torch.meshgrid(*[torch.arange(n, dtype=torch.float32) for n in size], indexing="ij")
        image = torch.exp(-sum((a - n * 0.4) ** 2 for a, n in zip(axes, size, strict=True)) / 18)
        labels = (image > 0.3).long()
        augment = only(
            (1.0, 2.0, 1.5)[: len(size)], mirror=(0, 1), rotation_chance=1.0, scaling_chance=1.0, elastic_chance=0.5
        )
        images, moved, _ = augment(image.expand(6, 1, *size), labels.expand(6, *size), known(6), seeded(1))
        for one, label in zip(images[:, 0], moved, strict=True):
            assert ((one > 0.3) == (label == 1))[label != IGNORE].float().mean() > 0.98
            assert not torch.equal(label, labels)

    @pytest.mark.parametrize("spacing", [(1.0, 1.3, 0.8), (0.7, 0.7, 5.0)])
    def test_no_border_artefacts(self, spacing: tuple[float, ...]) -> None:
        """Where a label counts, the image is what lay there: a ramp stays a ramp in mm, up to the outermost half voxel."""
        shape = (20, 16, 12)
        augment = only(spacing, rotation_chance=1.0, scaling_chance=1.0)
        index = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij")).float()
        labels = torch.arange(math.prod(shape)).view(shape)  # each voxel has a label of its own: it says where it was
        images, moved, _ = augment(index.expand(8, -1, *shape), labels.expand(8, *shape), known(8), seeded(2))
        for image, label in zip(images, moved, strict=True):
            counted = label != IGNORE
            assert 0.2 < counted.float().mean() <= 1
            was = torch.stack(torch.unravel_index(label[counted], shape)).float()
            assert (image[:, counted] - was).abs().max() <= 0.501
            inner = (was > 0).all(0) & (was < torch.tensor(shape)[:, None] - 1).all(0)
            places = np.c_[index[:, counted][:, inner].T, np.ones(int(inner.sum()))]
            values = image[:, counted][:, inner].T.numpy()
            assert np.abs(places @ np.linalg.lstsq(places, values)[0] - values).max() < 1e-3
            if spacing[2] == 5.0:  # thick slices are neither tilted nor scaled
                assert torch.equal(image[2], index[2])

    def test_rotation_is_in_millimetres(self) -> None:
        """Turned by any angle on an anisotropic grid, a point 8 mm from the centre stays 8 mm from it."""
        spacing = (2.0, 1.0)
        augment = only(spacing, rotation_chance=1.0, max_angle_deg=180.0)
        image = torch.zeros(1, 1, 21, 41)
        image[0, 0, 13:16, 19:22] = 1  # about 4 voxels of 2 mm from the centre
        angles = []
        for seed in range(60):
            _, moved, _ = augment(image, image[:, 0].long(), known(1), seeded(seed))
            at = torch.nonzero(moved[0] == 1).float().mean(0)
            offset = (at - torch.tensor([10.0, 20.0])) * torch.tensor(spacing)
            assert float(offset.norm()) == pytest.approx(8, abs=0.7)
            angles.append(math.atan2(offset[1], offset[0]))
        assert min(angles) < -2.5
        assert max(angles) > 2.5

    def test_scaling_is_what_it_says(self) -> None:
        augment = only((1.0, 2.0, 1.5), scaling_chance=1.0, scale=(0.5, 0.5))
        image = torch.zeros(1, 1, 24, 20, 16)
        image[0, 0, 6:18, 5:15, 4:12] = 1
        _, moved, _ = augment(image, image[:, 0].long(), known(1), seeded(0))
        assert int((moved == 1).sum()) == 6 * 5 * 4

    def test_mirroring_swaps_sides_in_labels_and_in_known(self) -> None:
        labels = torch.randint(-1, 4, (32, 5, 4, 3), generator=seeded(0))
        drawn = known(32, 3)
        drawn[:, 0] = False
        augment = only((1.0,) * 3, mirror=(0, 1), swaps=((0, 2),), sided=1)
        images, moved, seen = augment(labels[:, None].float(), labels, drawn, seeded(3))
        table = torch.tensor([0, 3, 2, 1, -1])  # the last entry is IGNORE's
        cases = set()
        for before, image, after, k in zip(labels, images[:, 0], moved, seen, strict=True):
            options = {
                axes: (before.flip(axes), (table[before] if 1 in axes else before).flip(axes))
                for axes in ((), (0,), (1,), (0, 1))
            }
            (axes,) = (a for a, (i, t) in options.items() if torch.equal(image, i.float()) and torch.equal(after, t))
            assert k.tolist() == ([True, True, False] if 1 in axes else [False, True, True])
            cases.add(axes)
        assert len(cases) == 4

    def test_mirroring_swaps_layers(self) -> None:
        layers = torch.randint(-1, 2, (8, 2, 5, 4), generator=seeded(0), dtype=torch.int8)
        augment = only((1.0, 1.0), mirror=(0,), swaps=((0, 1),), sided=0)
        _, moved, _ = augment(torch.zeros(8, 1, 5, 4), layers, known(8), seeded(1))
        flipped = [torch.equal(a, b.flip(0, 1)) for a, b in zip(moved, layers, strict=True)]
        same = [torch.equal(a, b) for a, b in zip(moved, layers, strict=True)]
        assert all(a != b for a, b in zip(flipped, same, strict=True))
        assert 0 < sum(flipped) < 8

    def test_of_a_plan(self) -> None:
        plan = tiny.plan().model_copy(update={"swaps": ((5, 2),), "mirror": (1,), "orientation": "ARS"})
        augment = Augmentation.of(plan, channel_dropout=0.3)
        assert augment.swaps == ((1, 0),)
        assert augment.sided == 1
        assert augment.mirror == (1,)
        assert augment.channel_dropout == 0.3
        assert Augmentation.of(tiny.plan(2)).spacing == (1.0, 1.2)


class TestIntensities:
    @given(shape=SHAPES, seed=st.integers(0, 99), layered=st.booleans())
    def test_same_generator_same_result_and_the_input_is_untouched(
        self, shape: tuple[int, ...], seed: int, layered: bool
    ) -> None:
        images = torch.randn(3, 2, *shape, generator=seeded(seed))
        labels = torch.randint(-1, 2, (3, *(2,) * layered, *shape), generator=seeded(seed))
        before = images.clone(), labels.clone()
        augment = Augmentation(
            (1.0, 1.2, 6.0)[: len(shape)], (0,), ((0, 1),), 0, elastic_chance=0.3, channel_dropout=0.3
        )
        drawn = known(3)
        a, b = (augment(images, labels, drawn, seeded(seed)) for _ in range(2))
        other = augment(images, labels, drawn, seeded(seed + 1))
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
        assert not torch.equal(a[0], other[0]) or torch.equal(a[0], images)
        assert torch.equal(images, before[0])
        assert torch.equal(labels, before[1])
        assert drawn.all()
        assert torch.isfinite(a[0]).all()
        assert set(a[1].unique().tolist()) <= {-1, 0, 1, 2}

    def test_each_change_does_what_it_says(self) -> None:
        image = torch.randn(1, 1, 13, 17, 9, generator=seeded(0)) * 2 + 1
        labels = torch.zeros(1, 13, 17, 9, dtype=torch.long)

        def changed(seed: int = 0, **changes: object) -> torch.Tensor:
            return only((1.0, 1.2, 0.9), **changes)(image, labels, known(1), seeded(seed))[0]

        assert torch.equal(changed(), image)
        bright = changed(brightness_chance=1.0, factor=(0.75, 1.25)) / image
        assert bright.std() < 1e-5
        assert 0.75 <= float(bright.mean()) <= 1.25
        for seed in range(4):
            contrasted = changed(seed, contrast_chance=1.0)
            assert contrasted.min() >= image.min()
            assert contrasted.max() <= image.max()
            line = np.polyfit(image.flatten().sort().values[300:-300], contrasted.flatten().sort().values[300:-300], 1)
            assert 0.75 <= line[0] <= 1.25
            assert np.polyval(line, float(image.mean())) == pytest.approx(float(image.mean()), abs=1e-3)
            noisy = changed(seed, noise_chance=1.0, noise=(0.2, 0.2)) - image
            assert float(noisy.std()) == pytest.approx(0.2, rel=0.1)
            curved = changed(seed, gamma_chance=1.0, inverted_share=float(seed % 2), gamma=(0.7, 1.5))
            assert float(curved.mean()) == pytest.approx(float(image.mean()), abs=1e-3)
            assert float(curved.std()) == pytest.approx(float(image.std()), rel=1e-3)
            assert (curved.flatten()[image.flatten().argsort()].diff() >= -1e-5).all()  # order is kept
        blurred = changed(blur_chance=1.0, sigma=(0.8, 0.8))[0, 0]
        expected = ndimage.gaussian_filter(image[0, 0].numpy(), 0.8, mode="nearest", radius=3)
        assert np.abs(blurred.numpy() - expected).max() < 1e-4
        coarse = changed(low_resolution_chance=1.0, zoom=(0.5, 0.5))
        assert 0.2 < float(coarse.std() / image.std()) < 0.9

    @pytest.mark.parametrize("inverted", [False, True])
    @pytest.mark.parametrize("gamma", [0.7, 1.0, 1.5])
    def test_gamma_by_hand(self, gamma: float, inverted: bool) -> None:
        image = torch.linspace(-1, 3, 24).view(2, 3, 4)
        share = (image + 1) / 4
        curve = 1 - (1 - share) ** gamma if inverted else share**gamma
        expected = (curve - curve.mean()) / curve.std() * image.std() + image.mean()
        _curve(image, gamma, inverted)
        assert torch.allclose(image, expected, atol=1e-5)
        constant = torch.full((2, 3, 4), 7.0)
        _curve(constant, gamma, inverted)
        assert torch.equal(constant, torch.full((2, 3, 4), 7.0))

    def test_chances_are_as_planned(self) -> None:
        image = torch.randn(1, 1, 6, 5, 4, generator=seeded(0)).expand(2000, 1, 6, 5, 4)
        labels = torch.zeros(2000, 6, 5, 4, dtype=torch.long)
        for name in OFF:
            augmented = only((1.0, 1.2, 1.1), zoom=(0.5, 0.6), **{name: 0.2})(image, labels, known(2000), seeded(4))[0]
            share = (augmented != image).flatten(1).any(1).float().mean()
            assert float(share) == pytest.approx(0.2, abs=0.03), name  # three standard errors

    def test_channels_are_dropped_but_never_all_and_missing_ones_stay_missing(self) -> None:
        images = torch.randn(400, 3, 4, 5, generator=seeded(0))
        images[:200, 1] = 0
        labels = torch.zeros(400, 4, 5, dtype=torch.long)
        augment = Augmentation((1.0, 1.0), channel_dropout=0.5, noise_chance=1.0)
        present = augment(images, labels, known(400), seeded(0))[0].flatten(2).any(2)
        assert not present[:200, 1].any()
        assert present.any(1).all()
        assert 0.3 < float((~present[200:]).any(1).float().mean()) < 0.55
        whole = Augmentation((1.0, 1.0))(images, labels, known(400), seeded(0))[0].flatten(2).any(2)
        assert torch.equal(whole, images.flatten(2).any(2))
