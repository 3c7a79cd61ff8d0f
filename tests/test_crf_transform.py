"""The CRF as a MONAI transform, against refine on volumes."""

from __future__ import annotations

import doctest

import numpy as np
import pytest
import torch
from conftest import rotation
from monai.data import MetaTensor, decollate_batch
from monai.data.utils import list_data_collate
from monai.transforms import Activationsd, AsDiscreted, Compose

from medseg import crf_transform
from medseg.crf import CRFParameters, refine
from medseg.crf_transform import CRFd
from medseg.volume import Geometry, LabelMap, Volume

SHAPE = (18, 14, 3)
GRID = Geometry.from_parts(SHAPE, (0.8, 1.7, 4.0), (-12, 30, 7), rotation((0.2, -0.1, 0.3)))
PARAMETERS = CRFParameters(bilateral_weight=3.0, bilateral_sigma_mm=8.0)


def scene(seed: int, k: int = 3) -> tuple[MetaTensor, MetaTensor]:
    """An image (1, *SHAPE) of regions and noisy logits (K, *SHAPE) of them."""
    rng = np.random.default_rng(seed)
    regions = np.add.outer(np.arange(18) // 7, np.arange(14) // 8)[..., None] % k + np.zeros(SHAPE, int)
    image = 50.0 * regions + 4 * rng.standard_normal(SHAPE)
    logits = 1.2 * np.eye(k)[regions].transpose(3, 0, 1, 2) + rng.standard_normal((k, *SHAPE))
    affine = torch.as_tensor(np.array(GRID.affine))
    return (
        MetaTensor(torch.tensor(image, dtype=torch.float32)[None], affine=affine, meta={"filename_or_obj": "a"}),
        MetaTensor(torch.tensor(logits, dtype=torch.float32), affine=affine),
    )


def expected(image: torch.Tensor, soft: torch.Tensor, grid: Geometry = GRID, axis: int = 2) -> np.ndarray:
    volumes = [Volume(np.asarray(x), grid) for x in (image, soft)]
    return np.asarray(refine(*volumes, parameters=PARAMETERS, axis=axis, device="cpu").array)


@pytest.mark.parametrize("axis", [0, 2])
def test_spacing_comes_from_the_affine(axis: int) -> None:
    image, logits = scene(0)
    soft = logits.softmax(0)
    found = CRFd("pred", parameters=PARAMETERS, axis=axis)({"image": image, "pred": soft, "other": 3})
    assert isinstance(found["pred"], MetaTensor)
    assert found["other"] == 3 and found["image"] is image
    torch.testing.assert_close(found["pred"].affine, soft.affine)
    np.testing.assert_array_equal(found["pred"], expected(image, soft, axis=axis))
    unit = expected(image, soft, Geometry.from_parts(SHAPE, (1, 1, 1)), axis)
    assert np.abs(np.asarray(found["pred"]) - unit).max() > 0.01
    bare = CRFd("pred", parameters=PARAMETERS, axis=axis)({"image": image.as_tensor(), "pred": soft.as_tensor()})
    assert not isinstance(bare["pred"], MetaTensor)
    np.testing.assert_array_equal(bare["pred"], unit)


def test_in_a_compose_on_a_batch_that_is_decollated() -> None:
    pairs = [scene(seed) for seed in (1, 2)]
    batch = list_data_collate([{"image": image, "pred": logits} for image, logits in pairs])
    after = Compose([
        Activationsd("pred", softmax=True), CRFd("pred", parameters=PARAMETERS), AsDiscreted("pred", argmax=True),
    ])  # fmt: skip
    for item, (image, logits) in zip(decollate_batch(batch), pairs, strict=True):
        labels = after(item)["pred"]
        want = expected(image, logits.softmax(0)).argmax(0)
        np.testing.assert_array_equal(labels[0], want)
        assert (want != np.asarray(logits).argmax(0)).any()


@pytest.mark.filterwarnings("ignore:structure 'label 3' would lose")
def test_two_dimensions_one_channel_and_layers() -> None:
    image, logits = (x[..., 1] for x in scene(3))
    grid = Geometry.from_parts((18, 14, 1), (0.8, 1.7, 1.0))
    soft = logits.softmax(0)
    crf = CRFd("pred", parameters=PARAMETERS)
    found = crf({"image": image, "pred": soft})["pred"]
    np.testing.assert_allclose(found, expected(image[..., None], soft[..., None], grid)[..., 0], atol=1e-6)
    one = crf({"image": image, "pred": soft[1:2]})["pred"]
    pair = crf({"image": image, "pred": torch.cat([1 - soft[1:2], soft[1:2]])})["pred"]
    np.testing.assert_allclose(one[0], pair[1], atol=1e-6)
    each = CRFd("pred", parameters=PARAMETERS, exclusive=False)({"image": image, "pred": logits.sigmoid()})["pred"]
    layers = LabelMap(np.asarray(logits.sigmoid())[..., None], grid)
    want = refine(Volume(np.asarray(image)[..., None], grid), layers, parameters=PARAMETERS, device="cpu").array
    np.testing.assert_allclose(each, want[..., 0], atol=1e-6)


def test_what_does_not_fit_is_refused() -> None:
    image, logits = scene(4)
    soft = logits.softmax(0)
    for data, kind, message in (
        ({"pred": soft}, KeyError, "must hold the image"),
        ({"image": image}, KeyError, "pred"),
        ({"image": image[:, 2:], "pred": soft}, ValueError, "of one grid"),
        ({"image": image[None], "pred": soft[None]}, ValueError, "of one grid"),
        ({"image": image, "pred": logits}, ValueError, "probabilities must be in 0..1"),
    ):
        with pytest.raises(kind, match=message):
            CRFd("pred")(data)
    assert CRFd("pred", allow_missing_keys=True)({"image": image}).keys() == {"image"}


def test_the_example_in_the_docstring() -> None:
    assert doctest.testmod(crf_transform).failed == 0
