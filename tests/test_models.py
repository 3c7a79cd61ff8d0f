"""One contract for every model of the table, and what is special to the U-Net."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from medseg.models import MODELS, ModelInfo, build_model
from medseg.models.network import SegmentationNetwork
from medseg.models.sam_layouts import LAYOUTS, Layout, tiny_vit
from medseg.models.unet import InstanceNorm, UNet

SIZES = {2: (21, 34), 3: (10, 13, 17)}  # no multiple of the strides
NEEDS_EXTRA = [
    pytest.param(
        name,
        marks=pytest.mark.skipif(not info.installed, reason=f"{info.needs} is not installed (extra {info.extra})"),
    )
    for name, info in MODELS.items()
]


@pytest.fixture(autouse=True)
def _tiny_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """A promptable model's encoder and decoder that take milliseconds."""
    encoder = partial(tiny_vit, reduce=True, widths=(8,) * 4, depths=(1,) * 4, heads=(1,) * 4, windows=(2,) * 4)
    monkeypatch.setitem(LAYOUTS, "tiny", Layout(encoder, size=32, channels=16))


def small(name: str, inputs: int = 2, outputs: int = 3) -> SegmentationNetwork:
    torch.manual_seed(0)
    options = {"features": (4, 6, 8)} if MODELS[name].encoder is None else {}
    options |= {"encoder": "tiny"} if name == "sam-med" else {}
    model = build_model(name, in_channels=inputs, out_channels=outputs, **options)
    if name == "sam-med":  # timm starts some branches of TinyViT at zero, which no gradient passes
        for parameter in model.parameters():
            parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def image_of(name: str, batch: int = 2, channels: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, *SIZES[MODELS[name].dims], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", NEEDS_EXTRA)
class TestContract:
    def test_logits_have_the_size_of_the_image(self, name: str) -> None:
        model, size = small(name).eval(), SIZES[MODELS[name].dims]
        with torch.no_grad():
            logits = model(torch.randn(2, 2, *size))
        assert logits.shape == (2, 3, *size)
        assert (logits < 0).any()  # logits, not probabilities
        assert torch.isfinite(logits).all()

    def test_every_parameter_gets_a_gradient(self, name: str) -> None:
        model, size = small(name).train(), SIZES[MODELS[name].dims]
        outputs = model.multiscale(torch.randn(2, 2, *size))
        sum(level.square().mean() for level in outputs).backward()
        for key, parameter in model.named_parameters():
            assert parameter.grad is not None, key
            assert parameter.grad.abs().sum() > 0, key

    def test_images_of_a_batch_do_not_see_each_other(self, name: str) -> None:
        model, size = small(name).eval(), SIZES[MODELS[name].dims]
        images = torch.randn(3, 2, *size)
        with torch.no_grad():
            together = model(images)
            alone = torch.cat([model(image[None]) for image in images])
        assert torch.allclose(together, alone, atol=1e-5)

    def test_weights_go_through_a_file(self, name: str, tmp_path: Path) -> None:
        model, image = small(name), image_of(name)
        model.train().multiscale(image)  # statistics of normalisation move too
        save_file({key: t.contiguous() for key, t in model.state_dict().items()}, tmp_path / "weights.safetensors")
        torch.manual_seed(7)
        other = small(name).eval()
        other.load_state_dict(load_file(tmp_path / "weights.safetensors"))
        with torch.no_grad():
            assert torch.equal(model.eval()(image), other(image))

    def test_eval_is_deterministic_and_of_one_resolution(self, name: str) -> None:
        model, image = small(name).eval(), image_of(name)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        with torch.no_grad():
            assert torch.equal(model(image), model(image))
            assert len(model.multiscale(image)) == 1
        assert all(torch.equal(t, before[key]) for key, t in model.state_dict().items())

    @pytest.mark.parametrize("channels", [1, 2, 5])
    def test_outermost_tensors_are_named(self, name: str, channels: int) -> None:
        few, many = small(name, channels, 2), small(name, channels + 1, 3)
        other = many.state_dict()
        changed = {key for key, t in few.state_dict().items() if t.shape != other[key].shape}
        assert changed == {*few.input_tensors, *few.output_tensors}
        assert all(few.state_dict()[key].shape[1] == channels for key in few.input_tensors)
        assert all(few.state_dict()[key].shape[0] == 2 for key in few.output_tensors)

    def test_frozen_encoder_does_not_change_by_a_byte(self, name: str) -> None:
        model, image = small(name), image_of(name)
        model.freeze_encoder()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.1, weight_decay=0.1)
        before = {key: t.clone() for key, t in model.state_dict().items()}
        for _ in range(2):
            model.train()
            assert not any(module.training for module in model.encoder.modules())
            model.multiscale(image)[0].square().mean().backward()
            optimizer.step()
        changed = {key for key, t in model.state_dict().items() if not torch.equal(t, before[key])}
        assert changed
        assert not any(key.startswith("encoder.") for key in changed)
        assert all(p.grad is None for p in model.encoder.parameters())

    def test_padding_repeats_the_border(self, name: str) -> None:
        model, image = small(name).eval(), image_of(name)
        padding = [(-n) % d for n, d in zip(image.shape[2:], model.divisor, strict=True)]
        padded = nn.functional.pad(image, [p for n in padding[::-1] for p in (0, n)], mode="replicate")
        inside = tuple(slice(n) for n in image.shape[2:])
        with torch.no_grad():
            assert torch.allclose(model(image), model(padded)[(..., *inside)], atol=1e-6)

    def test_one_step_lowers_the_loss(self, name: str) -> None:
        model, size = small(name).train(), SIZES[MODELS[name].dims]
        image, target = torch.randn(2, 2, *size), torch.randint(0, 3, (2, *size))
        optimizer = torch.optim.SGD(model.parameters(), 0.05)
        losses = []
        for _ in range(6):
            loss = nn.functional.cross_entropy(model(image), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        assert losses[-1] < losses[0]

    def test_the_table_says_what_it_is_for(self, name: str) -> None:
        info = MODELS[name]
        assert info.dims in (2, 3)
        assert info.task
        assert info.when
        assert "GPL" not in info.licence
        assert (info.needs is None) == (info.extra is None)


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model must be one of unet2d, unet3d.*, got 'unet4d'"):
        build_model("unet4d", in_channels=1, out_channels=2)


def test_what_an_extra_lacks_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(MODELS, "far", ModelInfo(UNet, "semantic", 2, "never", needs="no_such_package", extra="far"))
    with pytest.raises(ValueError, match=r"model far must have no_such_package, got none; pip install 'medseg\[far\]'"):
        build_model("far", in_channels=1, out_channels=2)


@pytest.mark.skipif(not MODELS["deeplabv3plus"].installed, reason="segmentation-models-pytorch is not installed")
class TestEncoders:
    @pytest.mark.parametrize("encoder", ["tu-resnet18", "resnet18"])
    @pytest.mark.parametrize("name", ["unet2d-encoder", "deeplabv3plus"])
    def test_encoder_by_name(self, name: str, encoder: str) -> None:
        model = build_model(name, in_channels=1, out_channels=4, encoder=encoder).eval()
        with torch.no_grad():
            assert model(torch.randn(1, 1, 40, 33)).shape == (1, 4, 40, 33)

    @pytest.mark.parametrize("encoder", ["nope", "tu-nope", "tu-swin_tiny_patch4_window7_224"])
    def test_unknown_or_unfit_encoder_is_named(self, encoder: str) -> None:
        with pytest.raises(ValueError, match=f"encoder must be .*, got '{encoder}'"):
            build_model("deeplabv3plus", in_channels=1, out_channels=2, encoder=encoder)

    def test_single_image_cannot_train_batch_normalisation(self) -> None:
        with pytest.raises(ValueError, match="batch must be at least 2"):
            small("deeplabv3plus").train()(torch.randn(1, 2, 64, 64))
        with pytest.raises(ValueError, match="batch must be at least 2"):
            small("unet2d-encoder").train()(torch.randn(1, 2, 32, 20))
        small("unet2d-encoder").train()(torch.randn(1, 2, 64, 64))

    def test_deeplab_moves_with_its_image(self) -> None:
        """Upsampled by pixel centres: moving the image moves the logits by as much."""
        model = small("deeplabv3plus").eval()
        model.decoder.aspp[0].convs[4] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(320, 256, 1))  # global
        model.decoder.aspp[0].convs[4].forward = lambda x: x.new_zeros(len(x), 256, *x.shape[2:])
        image = torch.randn(1, 2, 32, 4800)
        with torch.no_grad():
            whole, part = model(image), model(image[..., 1600:])
        inner = slice(1500, 1600)  # out of reach of both borders
        assert torch.allclose(whole[..., 1600:][..., inner], part[..., inner], atol=1e-4)
        assert whole[..., inner].std() > 1e-3


class TestUNet:
    def test_deep_supervision_halves_as_the_strides_say(self) -> None:
        model = UNet(
            1, 2, features=(4, 6, 8), strides=[(1, 2, 2), (2, 2, 2)], kernels=[(1, 3, 3), (3, 3, 3), (3, 3, 3)]
        )
        levels = model.train().multiscale(torch.randn(1, 1, 8, 16, 24))
        assert [tuple(level.shape[2:]) for level in levels] == [(8, 16, 24), (8, 8, 12)]
        assert model.divisor == (2, 4, 4)
        assert len(model.eval().multiscale(torch.randn(1, 1, 8, 16, 24))) == 1

    def test_padding_does_not_shift_the_image(self) -> None:
        """A crop whose size is a multiple of the strides and a larger odd one agree far from the added border."""
        model = UNet(1, 2, dims=2, features=(4, 6)).eval()
        for module in model.modules():  # without normalisation over the whole image outputs are local
            if isinstance(module, InstanceNorm):
                module.forward = lambda x: x  # type: ignore[method-assign]
        image = torch.randn(1, 1, 33, 47)
        with torch.no_grad():
            odd, even = model(image), model(image[:, :, :32, :46])
        assert torch.allclose(odd[:, :, :20, :30], even[:, :, :20, :30], atol=1e-5)

    @pytest.mark.parametrize("options", [{"dims": 4}, {"strides": [(2, 2, 2)]}, {"kernels": [(3, 3, 3)]}])
    def test_wrong_options_are_refused(self, options: dict) -> None:
        with pytest.raises(ValueError, match="must"):
            UNet(1, 2, features=(4, 6, 8), **options)


class TestInstanceNorm:
    @settings(deadline=None, max_examples=25)
    @given(
        shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(2, 6), st.integers(2, 5), st.integers(1, 4)),
        channels_last=st.booleans(),
    )
    def test_equals_instance_norm_of_torch(self, shape: tuple[int, ...], channels_last: bool) -> None:
        if shape[2] * shape[3] * shape[4] < 2:
            return
        torch.manual_seed(1)
        ours, theirs = InstanceNorm(shape[1]).double(), nn.InstanceNorm3d(shape[1], affine=True).double()
        with torch.no_grad():
            for module in (ours, theirs):
                module.weight.copy_(torch.linspace(0.5, 2, shape[1]))
                module.bias.copy_(torch.linspace(-1, 1, shape[1]))
        x = torch.randn(*shape, dtype=torch.float64) * 3 + 5
        if channels_last:
            x = x.to(memory_format=torch.channels_last_3d)
        upstream = torch.randn(*shape, dtype=torch.float64)
        grads = []
        for module in (ours, theirs):
            leaf = x.clone().requires_grad_()
            y = module(leaf)
            y.backward(upstream)
            grads.append((y.detach(), leaf.grad, module.weight.grad, module.bias.grad))
        for a, b in zip(*grads, strict=True):
            assert torch.allclose(a, b, atol=1e-9)

    def test_bfloat16_gradient_is_as_exact_as_torchs(self) -> None:
        torch.manual_seed(0)
        norm = InstanceNorm(6)
        x = torch.randn(2, 6, 9, 7, 5).to(memory_format=torch.channels_last_3d).bfloat16()
        upstream = torch.randn_like(x)
        exact = x.double().requires_grad_()
        nn.functional.instance_norm(exact, eps=1e-5).backward(upstream.double())
        ours = x.clone().requires_grad_()
        norm(ours).backward(upstream)
        theirs = x.clone().requires_grad_()
        nn.functional.group_norm(theirs, 6, norm.weight, norm.bias).backward(upstream)
        error = (ours.grad.double() - exact.grad).abs().max()
        assert error <= 1.5 * (theirs.grad.double() - exact.grad).abs().max()
