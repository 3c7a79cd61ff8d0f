"""SAM 2 on slices, with a small random network: shapes, directions, objects and memory. Nothing here is about accuracy."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="extra sam2 is not installed")
from transformers.models import sam2_video
from transformers.models.sam2 import configuration_sam2 as config2

import medseg
from medseg.models.sam2 import SliceTracker, load_sam2

SIZE, COUNT, HEIGHT, WIDTH = 64, 9, 30, 44


@pytest.fixture(scope="module")
def model() -> Any:
    """SAM 2 of 0.2 M parameters with random weights, large enough that the memory changes masks."""
    torch.manual_seed(0)
    backbone = config2.Sam2HieraDetConfig(
        hidden_size=8, image_size=[SIZE, SIZE], patch_kernel_size=[7, 7], patch_stride=[4, 4], patch_padding=[3, 3],
        blocks_per_stage=[1, 1, 2, 1], embed_dim_per_stage=[8, 16, 24, 32], num_attention_heads_per_stage=[1, 1, 1, 1],
        window_size_per_stage=[8, 4, 8, 4], global_attention_blocks=[3], window_positional_embedding_background_size=[2, 2],
    )  # fmt: skip
    vision = config2.Sam2VisionConfig(
        backbone_config=backbone, backbone_channel_list=[32, 24, 16, 8], fpn_hidden_size=128,
        backbone_feature_sizes=[[16, 16], [8, 8], [4, 4]],
    )  # fmt: skip
    config = sam2_video.Sam2VideoConfig(
        vision_config=vision,
        prompt_encoder_config={"hidden_size": 128, "image_size": SIZE, "mask_input_channels": 8},
        mask_decoder_config={
            "hidden_size": 128, "mlp_dim": 32, "num_attention_heads": 2, "iou_head_hidden_dim": 32, "iou_head_depth": 2,
        },
        image_size=SIZE, num_maskmem=3, max_object_pointers_in_encoder=4, memory_attention_hidden_size=128,
        memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=32,
        memory_attention_rope_feat_sizes=[4, 4], memory_encoder_hidden_size=128, memory_encoder_output_channels=64,
        mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=32,
        enable_occlusion_spatial_embedding=False,
    )  # fmt: skip
    built = sam2_video.Sam2VideoModel(config).eval()
    for parameter in built.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.1)
    return built


def slices(count: int = COUNT, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(1, count, 4, 5, generator=generator)
    return torch.nn.functional.interpolate(coarse, (HEIGHT, WIDTH), mode="bicubic")[0].clamp(0, 1)


def test_objects_are_followed_to_both_ends(model: Any) -> None:
    one = SliceTracker(model, slices())
    one.add_box("liver", 4, (5, 6, 30, 25))
    seen: list[tuple[int, int]] = []
    masks = one.track(lambda done, total: seen.append((done, total)))
    assert list(masks) == ["liver"] and masks["liver"].shape == (COUNT, HEIGHT, WIDTH)
    assert masks["liver"].dtype == torch.bool
    assert seen == [(n + 1, COUNT) for n in range(COUNT)]  # five forwards, four backwards
    assert 0 < masks["liver"].float().mean() < 1


def test_both_directions_are_alike(model: Any) -> None:
    """Turning the volume round turns the masks round."""
    volume = slices()
    there, back = SliceTracker(model, volume), SliceTracker(model, volume.flip(0))
    there.add_box("a", 2, (5, 6, 30, 25))
    back.add_box("a", COUNT - 3, (5, 6, 30, 25))
    assert torch.equal(there.track()["a"], back.track()["a"].flip(0))


def test_objects_do_not_depend_on_each_other_nor_on_order(model: Any) -> None:
    alone = SliceTracker(model, slices())
    alone.add_box("a", 6, (2, 3, 20, 20))
    wanted = alone.track()["a"]
    alone.add_point("b", 1, 30, 12)  # added after tracking
    alone.add_point("b", 1, 5, 25, inside=False)
    mask = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
    mask[5:20, 8:30] = True
    alone.add_mask("c", 3, mask)
    together = alone.track()
    assert torch.equal(together["a"], wanted)
    other = SliceTracker(model, slices())
    other.add_mask("c", 3, mask)
    other.add_point("b", 1, 30, 12)
    other.add_point("b", 1, 5, 25, inside=False)
    other.add_box("a", 6, (2, 3, 20, 20))
    again = other.track()
    assert all(torch.equal(again[name], together[name]) for name in "abc")
    # The network gives a mask back as it came, to the resolution of its grid.
    assert (together["c"][3] & mask).sum() / (together["c"][3] | mask).sum() > 0.8
    assert not torch.equal(together["a"], together["b"])
    other.remove("b")
    assert set(other.track()) == {"a", "c"}


def test_a_second_prompt_changes_what_follows(model: Any) -> None:
    one = SliceTracker(model, slices())
    one.add_box("a", 2, (5, 6, 30, 25))
    before = one.track()["a"]
    one.add_box("a", 5, (1, 1, 9, 9))
    after = one.track()["a"]
    assert not torch.equal(before, after)
    one.remove("a", 5)
    assert torch.equal(one.track()["a"], before)


def test_first_pass_is_that_of_transformers(model: Any) -> None:
    """Forwards from the first slice, an object alone: the loop of transformers itself, on frames prepared by it."""
    volume = slices(6)
    one = SliceTracker(model, volume)
    one.add_box("a", 0, (5, 6, 30, 25))
    found = one.track()["a"]
    frames = torch.stack([one.frames[n] for n in range(6)])
    session = sam2_video.modeling_sam2_video.Sam2VideoInferenceSession(frames, HEIGHT, WIDTH, dtype=torch.float32)
    session.obj_id_to_idx(1)
    corners = torch.tensor([[5.0, 6], [30, 25]]) * torch.tensor([SIZE / WIDTH, SIZE / HEIGHT])
    labels = torch.tensor([[[2, 3]]], dtype=torch.int32)
    session.add_point_inputs(0, 0, {"point_coords": corners.view(1, 1, 2, 2), "point_labels": labels})
    session.obj_with_new_inputs = [1]
    with torch.inference_mode():
        model(session, frame_idx=0)
        for output in model.propagate_in_video_iterator(session, start_frame_idx=0):
            logits = torch.nn.functional.interpolate(output.pred_masks, (HEIGHT, WIDTH), mode="bilinear")
            assert torch.equal(found[output.frame_idx], logits[0, 0] > 0), output.frame_idx


def test_memory_does_not_grow_with_the_slices(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[int] = []
    sessions = []
    step = SliceTracker._step

    def counted(self: SliceTracker, session: Any, number: int, back: bool) -> Tensor:
        mask = step(self, session, number, back)
        sessions.append(session)
        outputs = session.output_dict_per_obj[0]
        kept.append(len(outputs["non_cond_frame_outputs"]))
        assert not any("high_res_masks" in o for group in outputs.values() for o in group.values())
        assert len(session.cache._vision_features) <= 1
        return mask

    monkeypatch.setattr(SliceTracker, "_step", counted)
    one = SliceTracker(model, slices(16))
    one.add_box("a", 1, (5, 6, 30, 25))
    one.track()
    assert max(kept) <= one.span + 1 < 14
    assert sessions[0].processed_frames is one.frames  # slices are made when they are needed


def test_weights_come_from_a_folder(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "sam2")
    loaded = load_sam2(tmp_path / "sam2")
    one, other = SliceTracker(model, slices(4)), SliceTracker(loaded, slices(4))
    for each in (one, other):
        each.add_box("a", 2, (5, 6, 30, 25))
    assert torch.equal(one.track()["a"], other.track()["a"])
    with pytest.raises(FileNotFoundError, match="SAM 2 must be a folder"):
        load_sam2(tmp_path / "nothing")


def test_recipe_writes_on_the_grid_of_the_scan(model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same masks as from the slices as they are shown, on a scan stored in another order."""
    shape, spacing = (COUNT, WIDTH, HEIGHT), (4.0, 1.0, 1.5)  # head to feet first
    direction = np.array([[0, -1, 0], [0, 0, 1], [-1, 0, 0]], float)
    grid = medseg.Geometry.from_parts(shape, spacing, (10, -20, 30), direction)
    assert grid.orientation == "ILA"
    volume = slices()  # (slice, row, column)
    stored = volume.numpy().transpose(0, 2, 1)[:, :, ::-1] * 400 - 160
    medseg.write(medseg.Volume(np.round(stored).astype(np.int16), grid), tmp_path / "scan.nii.gz")
    model.save_pretrained(tmp_path / "weights")
    path = Path(__file__).resolve().parents[1] / "workflows" / "propagate_sam2.py"
    monkeypatch.syspath_prepend(str(path.parent))
    recipe = import_module("propagate_sam2")
    out = tmp_path / "out.nii.gz"
    recipe.main(
        recipe.Recipe(tmp_path / "scan.nii.gz", str(tmp_path / "weights"), ["a:4:5,6,30,25"], out=out, device="cpu")
    )
    found = medseg.read_labels(out)
    found.geometry.require_close(grid, "label map")
    one = SliceTracker(model, torch.from_numpy(np.round(volume.numpy() * 400 - 160).astype(np.float32) + 160) / 400)
    one.add_box("a", 4, (5, 6, 30, 25))
    wanted = one.track()["a"].numpy().transpose(0, 2, 1)[:, :, ::-1]
    assert np.mean(found.array.astype(bool) != wanted) < 1e-3 and wanted.any()


def test_bad_input_is_refused(model: Any) -> None:
    one = SliceTracker(model, slices())
    with pytest.raises(ValueError, match="finite and in 0 to 1, got nan"):
        SliceTracker(model, torch.full((3, 8, 8), torch.nan))
    with pytest.raises(ValueError, match=r"shape \(N, H, W\)"):
        SliceTracker(model, torch.zeros(8, 8))
    with pytest.raises(ValueError, match="box must be x0 < x1"):
        one.add_box("a", 0, (30, 6, 5, 25))
    with pytest.raises(ValueError, match="in a slice of 44 x 30 pixels"):
        one.add_box("a", 0, (0, 0, 45, 25))
    with pytest.raises(ValueError, match="slice must be from 0 to 8, got 9"):
        one.add_box("a", 9, (0, 0, 5, 5))
    with pytest.raises(ValueError, match="point must lie"):
        one.add_point("a", 0, 44, 2)
    with pytest.raises(ValueError, match="mask must be of"):
        one.add_mask("a", 0, torch.zeros(HEIGHT, WIDTH, dtype=torch.bool))
    with pytest.raises(ValueError, match="object must have been prompted, got 'x'"):
        one.remove("x")
    with pytest.raises(ValueError, match="got no prompt"):
        SliceTracker(model, slices()).track()
