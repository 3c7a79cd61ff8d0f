"""The dense CRF against the exact mean field, all pairs in float64."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import numpy as np
import pytest
import torch
from conftest import rotation
from scipy import ndimage

from medseg import crf_kernels, crf_meanfield
from medseg.crf import CRFParameters, dense_crf, refine
from medseg.crf_parts import Parts
from medseg.volume import Geometry, GeometryError, LabelMap, Structure, Volume

CLASSIC = (3.0, 3.0, 80.0, 13.0, 10.0)
GENTLE = ((1.0, 2.0), 1.0, (4.0, 8.0), 13.0, 1.0)
NAMES = (
    "gaussian_sigma_px", "gaussian_weight", "bilateral_sigma_px", "bilateral_sigma_intensity", "bilateral_weight"
)  # fmt: skip


def exact_marginals(image: np.ndarray, probabilities: np.ndarray, setting: tuple, iterations: int = 5) -> np.ndarray:
    """Mean field of every image (N, C, H, W) by explicit N x N kernel matrices."""
    sigma_g, weight_g, sigma_b, sigma_i, weight_b = setting
    found = []
    for im, p in zip(image.astype(float), probabilities.astype(float), strict=True):
        c, h, w = im.shape
        where = np.array([(y, x) for y in range(h) for x in range(w)], float)
        kernels = []
        spatial = where / np.array(sigma_b)
        features = (
            (where / np.array(sigma_g), weight_g),
            (np.hstack([spatial, im.reshape(c, -1).T / sigma_i]), weight_b),
        )
        for f, weight in features:
            kernel = np.exp(-0.5 * np.square(f[:, None] - f[None]).sum(2))
            norm = 1 / np.sqrt(kernel.sum(1))
            weight = np.asarray(weight, float)
            kernels.append(
                (norm[:, None] * kernel * norm, (weight + weight.T) / 2 if weight.ndim else weight * np.eye(len(p)))
            )
        unary = -np.log(np.clip(p, 1e-5, 1)).reshape(len(p), -1)

        def softmax(x: np.ndarray) -> np.ndarray:
            e = np.exp(x - x.max(0))
            return e / e.sum(0)

        q = softmax(-unary)
        for _ in range(iterations):
            q = softmax(-unary + sum(weight @ (q @ kernel) for kernel, weight in kernels))
        found.append(q.reshape(-1, h, w))
    return np.stack(found)


def scene(seed: int, k: int = 2, c: int = 1, n: int = 1, h: int = 38, w: int = 44) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (N, C, H, W) in 0..255 of K regions, and noisy, blurred probabilities (N, K, H, W) of them."""
    rng = np.random.default_rng(seed)
    regions = ndimage.gaussian_filter(rng.standard_normal((n, k, h, w)), (0, 0, 6, 6)).argmax(1)
    grey = rng.uniform(30, 220, (c, k))
    image = np.stack([[level[r] + 8 * rng.standard_normal((h, w)) for level in grey] for r in regions])
    logits = 6 * ndimage.gaussian_filter(np.eye(k)[regions].transpose(0, 3, 1, 2), (0, 0, 2, 2))
    p = np.exp(logits + 0.8 * rng.standard_normal(logits.shape))
    image, p = np.clip(image, 0, 255).round(), p / p.sum(1, keepdims=True)
    return torch.tensor(image, dtype=torch.float32), torch.tensor(p, dtype=torch.float32)


@pytest.mark.parametrize(
    ("k", "c", "setting"),
    [
        *product((2, 6), (1,), (CLASSIC, (3.0, 3.0, 20.0, 13.0, 5.0), GENTLE, (1.0, 1.0, 8.0, 13.0, 3.0))),
        (2, 2, GENTLE),
        (3, 3, CLASSIC),
        (3, 4, CLASSIC),
        (2, 4, (3.0, 3.0, 20.0, 13.0, 5.0)),
        (20, 1, CLASSIC),
    ],
)
def test_marginals_are_those_of_all_pairs(k, c, setting):
    image, p = scene(k + 10 * c, k, c, **({"h": 26, "w": 30} if c > 2 else {}))
    got = dense_crf(image, p, **dict(zip(NAMES, setting, strict=True))).numpy()
    want = exact_marginals(image.numpy(), p.numpy(), setting)
    assert np.abs(got - want).max() <= 0.05
    assert np.abs(got - want).mean() <= 5e-4
    assert (got.argmax(1) != want.argmax(1)).mean() <= 0.002 < (want.argmax(1) != p.numpy().argmax(1)).mean()
    np.testing.assert_allclose(got.sum(1), 1, atol=1e-5)


@pytest.mark.parametrize(("k", "most"), [(2, 0), (2, 1), (4, 2)])
def test_parts_give_what_all_pairs_give(k, most, monkeypatch):
    """Labels that keep to parts of the image, two parts for one of them, are worked on in these parts alone."""
    rng = np.random.default_rng(k + most)
    shape = h, w = 56, 72
    y, x = np.mgrid[:h, :w]
    regions = np.full(shape, most)
    others = [label for label in range(k) if label != most]
    discs = ((14, 14, 6), (38, 16, 5), (16, 48, 4))[: k - 1]
    for label, (a, b, r) in ((others[0], (40, 56, 5)), *zip(others, discs, strict=True)):
        regions[(y - a) ** 2 + (x - b) ** 2 < r**2] = label
    image = np.clip(rng.uniform(30, 220, k)[regions] + 8 * rng.standard_normal(shape), 0, 255).round()[None, None]
    logits = 12 * ndimage.gaussian_filter(np.eye(k)[regions].transpose(2, 0, 1), (0, 1.5, 1.5))
    p = np.exp(logits + 0.5 * rng.standard_normal(logits.shape))
    p = (p / p.sum(0))[None]
    found = []
    worth = Parts.worth
    monkeypatch.setattr(Parts, "worth", lambda *given: found.append(worth(*given)) or found[-1])
    setting = ((1.0, 2.0), 1.0, (2.0, 3.5), 13.0, 1.0)
    got = dense_crf(torch.tensor(image), torch.tensor(p), **dict(zip(NAMES, setting, strict=True))).numpy()
    want = exact_marginals(image, p, setting)
    assert len(found[0].parts) > k - 1
    assert sum(box.size for _, box, _ in found[0].parts) < 0.6 * (k - 1) * h * w
    assert np.abs(got - want).max() <= 0.02
    assert np.abs(got - want).mean() <= 2e-4
    assert np.abs(p - want).max() > 0.15

    q, turn = torch.tensor(p, requires_grad=True), torch.tensor(p * rng.standard_normal(p.shape))
    share = torch.tensor(rng.standard_normal(p.shape))

    def total(q: torch.Tensor) -> torch.Tensor:
        return (dense_crf(torch.tensor(image), q, **dict(zip(NAMES, setting, strict=True))) * share).sum()

    (slope,) = torch.autograd.grad(total(q), q)
    with torch.no_grad():
        want = (total(q + 1e-6 * turn) - total(q - 1e-6 * turn)) / 2e-6
    np.testing.assert_allclose(float((slope * turn).sum()), float(want), rtol=1e-4)


@pytest.fixture
def no_short_cuts(monkeypatch):
    for name, value in (("CERTAIN", 2.0), ("SILENT", 1e-9), ("POSSIBLE", 0.0)):
        monkeypatch.setattr(crf_meanfield, name, value)


@pytest.mark.parametrize("setting", [(2.0, 3.0, 1.0, 1.0, 0.0), (0.7, 4.0, 1.0, 1.0, 0.0), (14.0, 3.0, 1.0, 1.0, 0.0)])
def test_gaussian_kernel_alone_is_exact(setting, no_short_cuts):
    image, p = scene(3, 3, h=150, w=17)
    got = dense_crf(image, p, **dict(zip(NAMES, setting, strict=True)))
    np.testing.assert_allclose(got, exact_marginals(image.numpy(), p.numpy(), setting), atol=2e-3)


def test_no_kernel_leaves_the_normalised_probabilities():
    image, p = scene(4, 4)
    got = dense_crf(image, p, gaussian_weight=0, bilateral_weight=0)
    np.testing.assert_allclose(got, p, atol=1e-5)
    np.testing.assert_allclose(dense_crf(image, p, iterations=0), p, atol=1e-5)


def test_two_labels_as_two_of_three():
    """The shortcut for two labels equals the general rule with a third label that is nowhere."""
    image, p = scene(5)
    third = torch.cat([p, torch.full_like(p[:, :1], 1e-5)], 1)
    a = dense_crf(image, p, **dict(zip(NAMES, GENTLE, strict=True)))
    b = dense_crf(image, third, **dict(zip(NAMES, GENTLE, strict=True)))
    np.testing.assert_allclose(a, b[:, :2], atol=2e-4)


def test_images_of_a_batch_do_not_mix():
    image, p = scene(6, 3, n=3)
    whole = dense_crf(image, p)
    for n in range(3):
        # the grid's origin in intensity is shared by a batch, so the interpolation differs a little
        np.testing.assert_allclose(whole[n], dense_crf(image[n : n + 1], p[n : n + 1])[0], atol=0.05)
    same = dense_crf(image[:1].repeat(3, 1, 1, 1), p[:1].repeat(3, 1, 1, 1))
    np.testing.assert_allclose(same[2], same[0], atol=1e-6)


def test_banded_blocks_equal_whole_matrices(monkeypatch):
    image, p = scene(7, h=90, w=70)
    setting = dict(zip(NAMES, (2.0, 2.0, 5.0, 20.0, 2.0), strict=True))
    whole = dense_crf(image, p, **setting)
    monkeypatch.setattr(crf_kernels, "BLOCK", 8)
    np.testing.assert_allclose(dense_crf(image, p, **setting), whole, atol=2e-3)


def test_short_cuts_cost_little(monkeypatch, no_short_cuts):
    """All labels of all pixels in all steps give nearly what the labels give that matter."""
    image, p = scene(15, 6)
    whole = dense_crf(image, p)
    monkeypatch.undo()
    quick = dense_crf(image, p)
    assert 0 < float((whole - quick).abs().max()) < 0.03


WEIGHTS = np.array([[2.0, -0.5, 0.3], [0.1, 4.0, 0.0], [0.0, 1.0, 3.0]])


def test_matrix_of_weights_is_that_of_all_pairs():
    image, p = scene(12, 3)
    setting = (2.0, WEIGHTS, 20.0, 13.0, 2 * WEIGHTS)
    got = dense_crf(
        image,
        p,
        gaussian_sigma_px=2.0,
        gaussian_weight=torch.tensor(WEIGHTS),
        bilateral_sigma_px=20.0,
        bilateral_weight=torch.tensor(2 * WEIGHTS),
    )
    assert np.abs(got.numpy() - exact_marginals(image.numpy(), p.numpy(), setting)).max() < 0.02
    times_one = {"gaussian_weight": 3 * torch.eye(3), "bilateral_weight": 10 * torch.eye(3)}
    assert float((dense_crf(image, p, **times_one) - dense_crf(image, p)).abs().max()) < 0.02


def test_matrix_of_weights_is_the_negative_of_that_of_pydensecrf():
    peer = pytest.importorskip("pydensecrf.densecrf", reason="needs pydensecrf2, which compiles")
    image, p = scene(13, 3)
    h, w = image.shape[2:]
    crf = peer.DenseCRF2D(w, h, 3)
    crf.setUnaryEnergy(np.ascontiguousarray(-np.log(p[0].numpy()).reshape(3, -1)))
    crf.addPairwiseGaussian(sxy=2, compat=-WEIGHTS.astype(np.float32))
    want = np.array(crf.inference(5)).reshape(3, h, w)
    got = dense_crf(image, p, gaussian_sigma_px=2.0, gaussian_weight=torch.tensor(WEIGHTS), bilateral_weight=0)
    assert np.abs(got[0].numpy() - want).mean() < 0.01  # its lattice is coarse
    assert (
        (got[0].argmax(0).numpy() != want.argmax(0)).mean() < 0.01 < (p[0].argmax(0).numpy() != want.argmax(0)).mean()
    )


@pytest.mark.parametrize("matrix", [False, True])
def test_gradients_are_those_of_finite_differences(matrix):
    image, p = scene(8, 3, h=6, w=5)
    weight = torch.tensor(WEIGHTS if matrix else 1.5, dtype=torch.float64, requires_grad=True)
    settings = {"gaussian_sigma_px": (1.0, 2.0), "bilateral_sigma_px": (4.0, 8.0), "iterations": 3}

    def marginals(q: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return dense_crf(image, q, gaussian_weight=weight, bilateral_weight=2 * weight, **settings)

    assert torch.autograd.gradcheck(marginals, (p.double().requires_grad_(), weight), atol=1e-6)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_devices_agree():
    image, p = scene(9, 3)
    np.testing.assert_allclose(dense_crf(image.cuda(), p.cuda()).cpu(), dense_crf(image, p), atol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.zeros(1, 1, 4, 5)}, "must agree in N, H and W"),
        ({"image": torch.full((1, 1, 8, 9), torch.nan)}, "image must be finite"),
        ({"image": torch.zeros(1, 5, 8, 9)}, "1 to 4 channels, got 5"),
        ({"probabilities": torch.ones(1, 1, 8, 9)}, "at least 2 labels"),
        ({"probabilities": torch.ones(2, 8, 9)}, "4 axes"),
        ({"gaussian_sigma_px": 0}, "gaussian_sigma_px must be positive"),
        ({"bilateral_sigma_intensity": -1}, "bilateral_sigma_intensity must be positive"),
        ({"iterations": -1}, "must not be negative"),
        ({"bilateral_weight": -1}, "must not be negative"),
        ({"gaussian_weight": torch.eye(3)}, r"must be a number or \(2, 2\)"),
        ({"image": torch.arange(72.0).view(1, 1, 8, 9) * 1e7}, "bilateral grid must have at most"),
        ({"image": torch.arange(288.0).view(1, 4, 8, 9) * 1e7}, "bilateral grid must have at most"),
    ],
)
def test_bad_input(change, message):
    given = {"image": torch.zeros(1, 1, 8, 9), "probabilities": torch.full((1, 2, 8, 9), 0.5), **change}
    with pytest.raises(ValueError, match=message):
        dense_crf(given.pop("image"), given.pop("probabilities"), **given)


# ---------------------------------------------------------------------------------------------------------------------
# Volumes


def volumes(axis: int = 2, k: int = 3) -> tuple[Volume, Volume]:
    """Slices (K = 5) of scenes along an axis of an oblique grid with spacings 0.5, 1.5 and 4 mm."""
    image, p = scene(11, k, n=5, h=24, w=20)
    array, soft = (np.moveaxis(x.numpy(), 0, axis + 1) for x in (image, p))
    spacing = np.array([0.5, 1.5, 4.0])
    return tuple(
        Volume(a, Geometry.from_parts(a.shape[1:], spacing, (1, 2, 3), rotation((0.3, 0.1, -0.4))))
        for a in (array, soft)
    )


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_volume_is_refined_slice_by_slice_in_mm(axis, monkeypatch):
    image, soft = volumes(axis)
    parameters = CRFParameters(1.0, 1.5, 5.0, 0.06, 2.0, largest_loss=1.0)
    monkeypatch.setattr("medseg.crf.SLAB", 1000)  # several slabs
    got = np.moveaxis(
        np.asarray(refine(image, soft, parameters=parameters, axis=axis, device="cpu").array), axis + 1, 0
    )
    low, high = np.percentile(image.array, (0.5, 99.5))
    grey = np.moveaxis(np.clip((image.array - low) / (high - low), 0, 1), axis + 1, 0)
    h, w = (image.geometry.spacing[a] for a in range(3) if a != axis)
    clipped = np.clip(np.moveaxis(soft.array, axis + 1, 0), 1e-3, 1 - 1e-3)
    want = exact_marginals(grey, clipped, ((1 / h, 1 / w), 1.5, (5 / h, 5 / w), 0.06, 2.0))
    assert np.abs(got - want).max() < 0.05
    assert np.abs(got - want).mean() < 3e-4


def test_slices_without_foreground_stay():
    image, soft = volumes()
    array = np.array(soft.array)
    array[:, :, :, 1] = np.array([0.995, 0.0025, 0.0025]).reshape(3, 1, 1)
    got = refine(image, replace(soft, array=array), device="cpu")
    np.testing.assert_array_equal(got.array[..., 1], array[..., 1])
    assert np.abs(got.array[..., 0] - array[..., 0]).max() > 0.1


def test_layers_are_refined_one_by_one():
    image, soft = volumes(k=2)
    pair = refine(image, soft, device="cpu")
    alone = refine(image, replace(soft, array=soft.array[1:]), device="cpu")
    np.testing.assert_allclose(alone.array[0], pair.array[1], atol=1e-5)
    structures = (Structure(4, "a"), Structure(7, "b"))
    layers = LabelMap(np.stack([soft.array[1], soft.array[1]]), image.geometry, structures)
    got = refine(image, layers, device="cpu")
    assert got.structures == structures
    np.testing.assert_allclose(got.array, np.repeat(alone.array, 2, 0), atol=1e-6)


def test_a_blocky_mask_is_straightened():
    """A disc decoded to a mask at a quarter of the resolution comes nearer to the disc in the image."""
    y, x, _ = np.mgrid[:64, :80, :1]
    disc = (y - 30.3) ** 2 + (x - 41.7) ** 2 < 19**2
    rng = np.random.default_rng(0)
    image = Volume(100.0 * disc + 5 * rng.standard_normal(disc.shape), Geometry.from_parts(disc.shape, (1, 1, 3)))
    blocky = ndimage.zoom(disc[2::4, 2::4, 0].astype(np.float32), 4, order=1, grid_mode=True, mode="nearest")[..., None]
    got = np.asarray(refine(image, LabelMap(blocky[None], image.geometry), device="cpu").array[0]) > 0.5

    def dice(a: np.ndarray) -> float:
        return 2 * (a & disc).sum() / (a.sum() + disc.sum())

    assert dice(got) > dice(blocky > 0.5) + 0.01


def test_guard_keeps_a_structure_that_would_vanish():
    shape = (40, 32, 3)
    thin = np.zeros(shape, bool)
    thin[10:30, 15] = True
    image = Volume(np.random.default_rng(0).standard_normal(shape), Geometry.from_parts(shape, (1, 1, 3)))
    soft = Volume(np.where(thin, 0.8, 0.1)[None], image.geometry)
    strong = replace(CRFParameters.pydensecrf, largest_loss=0.3)
    with pytest.warns(UserWarning, match=r"structure 'label 1' would lose 100% of its volume and is kept unrefined"):
        kept = refine(image, soft, parameters=strong, device="cpu")
    assert np.array_equal(kept.array[0] > 0.5, thin)
    assert not (refine(image, soft, parameters=CRFParameters.pydensecrf, device="cpu").array > 0.5).any()
    both = Volume(np.concatenate([1 - soft.array, soft.array]), image.geometry, {"structures": (Structure(2, "vein"),)})
    with pytest.warns(UserWarning, match="structure 'vein' would lose 100%"):
        refine(image, both, parameters=strong, device="cpu")


def test_sigmas_in_pixels_and_in_units_of_the_image():
    image, soft = volumes()  # anisotropic
    spacing = image.geometry.spacing
    pixels = CRFParameters(2.0, 1.0, 5.0, 0.2, 2.0, in_pixels=True)
    cubic = Geometry.from_parts(image.geometry.shape, (1, 1, 1), (0, 0, 0), np.eye(3))
    want = refine(
        replace(image, geometry=cubic), replace(soft, geometry=cubic), parameters=replace(pixels, in_pixels=False),
        device="cpu",
    )  # fmt: skip
    got = refine(image, soft, parameters=pixels, device="cpu")
    assert len({round(s, 3) for s in spacing}) > 1
    np.testing.assert_allclose(got.array, want.array, atol=1e-6)
    low, high = np.percentile(image.array, (0.5, 99.5))
    units = replace(pixels, bilateral_sigma_intensity=0.2 * float(high - low), bilateral_sigma_share=0.9)
    np.testing.assert_allclose(refine(image, soft, parameters=units, device="cpu").array, got.array, atol=2e-3)
    for wrong in ({"bilateral_sigma_intensity": 0.0}, {"iterations": 2.5}):
        with pytest.raises(ValueError, match="must be"):
            CRFParameters(**wrong)


def test_bad_volumes():
    image, soft = volumes()
    moved = Geometry.from_parts(image.geometry.shape, image.geometry.spacing)
    with pytest.raises(GeometryError, match="image and probabilities must lie on the same grid"):
        refine(image, replace(soft, geometry=moved))
    with pytest.raises(ValueError, match=r"probabilities must be in 0\.\.1, got"):
        refine(image, replace(soft, array=10 * soft.array))
    with pytest.raises(TypeError, match="probabilities must be float layers"):
        refine(image, LabelMap(np.zeros(image.geometry.shape, np.uint8), image.geometry))
    with pytest.raises(ValueError, match="axis must be 0, 1 or 2"):
        refine(image, soft, axis=3)
    affine = np.array(image.geometry.affine)
    affine[:3, 1] += affine[:3, 0]
    skewed = Geometry(image.geometry.shape, affine)
    with pytest.raises(GeometryError, match="axes of a slice must be at right angles"):
        refine(replace(image, geometry=skewed), replace(soft, geometry=skewed))
    with pytest.raises(ValueError, match="bilateral_sigma_mm must be positive"):
        CRFParameters(bilateral_sigma_mm=0)
    with pytest.raises(ValueError, match=r"clip must be in \(0, 0\.5\)"):
        CRFParameters(clip=0.7)
