"""One contract for every model of the table, and what is special to the U-Net."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from medseg.models import MODELS, build_model
from medseg.models.unet import InstanceNorm, UNet

SMALL = {"features": (4, 6, 8)}
SIZES = {2: (21, 34), 3: (10, 13, 17)}  # no multiple of the strides


def small(name: str, inputs: int = 2, outputs: int = 3) -> nn.Module:
    torch.manual_seed(0)
    return build_model(name, in_channels=inputs, out_channels=outputs, **SMALL)


@pytest.mark.parametrize("name", MODELS)
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

    def test_weights_save_and_load(self, name: str) -> None:
        model, size = small(name).eval(), SIZES[MODELS[name].dims]
        other = build_model(name, in_channels=2, out_channels=3, **SMALL).eval()
        other.load_state_dict(model.state_dict())
        image = torch.randn(1, 2, *size)
        with torch.no_grad():
            assert torch.equal(model(image), other(image))

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


def test_unknown_model_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"model must be one of unet2d, unet3d.*, got 'unet4d'"):
        build_model("unet4d", in_channels=1, out_channels=2)


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
