"""Patches, poolings and memory: hand-worked plans, and the real network as oracle of what a step keeps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from medseg.models import build_model
from medseg.network_plan import MIN_EDGE, Network, fit_memory, fit_patch, parse_bytes, poolings, widths

EDGES = st.integers(1, 300)
SPACINGS = st.floats(0.2, 9.0)


def network(patch: tuple[int, ...], spacing: tuple[float, ...], first: int = 16, **changes: int) -> Network:
    final, strides, kernels = poolings(np.array(patch), spacing)
    values = {"inputs": 1, "outputs": 3, "batch": 4, **changes}
    return Network(patch=final, features=widths(first, len(kernels)), strides=strides, kernels=kernels, **values)


class TestPoolings:
    def test_cubes_are_halved_evenly(self) -> None:
        """40 x 56 x 40 at 1 mm: 20 28 20, 10 14 10, 5 7 5; 5 is less than twice 4."""
        patch, strides, kernels = poolings(np.array((35, 51, 35)), (1, 1, 1))
        assert patch == (40, 56, 40)
        assert strides == ((2, 2, 2),) * 3
        assert kernels == ((3, 3, 3),) * 4

    def test_thick_slices_wait(self) -> None:
        """0.625 mm becomes 1.25 (3.6 / 1.25 > 2), 2.5 (3.6 / 2.5 < 2): from the third stage on all three axes; 20 slices
        become 10 and 5, which is too few for more, while the others go on to 5 x 4."""
        patch, strides, kernels = poolings(np.array((320, 256, 20)), (0.625, 0.625, 3.6))
        assert patch == (320, 256, 20)
        assert strides == ((2, 2, 1), (2, 2, 1), (2, 2, 2), (2, 2, 2), (2, 2, 1), (2, 2, 1))
        assert kernels == ((3, 3, 1), (3, 3, 1), *((3, 3, 3),) * 5)

    def test_thin_axis_does_not_stop_the_others(self) -> None:
        """12 voxels become 6 and stay; the other axes go on until 200 has become 7 (rounded up at each step)."""
        patch, strides, kernels = poolings(np.array((200, 200, 12)), (1, 1, 1))
        assert strides == ((2, 2, 2), *((2, 2, 1),) * 4)
        assert patch == (224, 224, 12)
        assert set(kernels) == {(3, 3, 3)}

    def test_last_single_axis_needs_more(self) -> None:
        assert poolings(np.array((11, 5)), (1, 1))[1] == ()
        assert poolings(np.array((12, 5)), (1, 1))[1] == ((2, 1),)

    @given(st.lists(EDGES, min_size=2, max_size=3), st.data(), st.integers(2_000, 400_000))
    def test_patches_are_always_consistent(self, shape: list[int], data: st.DataObject, voxels: int) -> None:
        spacing = data.draw(st.lists(SPACINGS, min_size=len(shape), max_size=len(shape)))
        patch, strides, kernels = fit_patch(shape, spacing, voxels)
        divisor = np.prod(np.array(strides, int).reshape(-1, len(shape)), axis=0)
        assert min(patch) >= 1
        assert not (np.array(patch) % divisor).any()
        assert len(kernels) == len(strides) + 1 <= 7
        assert math.prod(patch) <= voxels or max(patch) <= MIN_EDGE
        bottom = np.array(patch) // divisor
        assert (bottom >= np.minimum(MIN_EDGE, shape)).all()  # no axis is pooled below 4 voxels

    @given(st.lists(st.integers(8, 60), min_size=3, max_size=3))
    def test_whole_image_where_it_fits(self, shape: list[int]) -> None:
        patch, _, _ = fit_patch(shape, (1.0, 1.1, 1.3), 10**6)
        assert all(p >= s for p, s in zip(patch, shape, strict=True))

    def test_cut_patch_is_even_in_millimetres(self) -> None:
        patch, _, _ = fit_patch((512, 512, 120), (0.7, 0.7, 1.5), 500_000)
        sizes = np.array(patch) * (0.7, 0.7, 1.5)
        assert sizes.max() / sizes.min() < 1.5
        assert 250_000 < math.prod(patch) <= 500_000


class TestMemory:
    @pytest.mark.parametrize(
        ("patch", "spacing", "channels", "outputs"),
        [
            ((40, 56, 40), (1, 1, 1), 1, 3),
            ((48, 40, 12), (1, 1, 5), 2, 2),
            ((96, 80), (1, 1), 3, 2),
            ((32, 24, 32), (1, 1.2, 1), 1, 20),
        ],
    )
    def test_parameters_and_what_the_backward_pass_keeps(
        self, patch: tuple[int, ...], spacing: tuple[float, ...], channels: int, outputs: int
    ) -> None:
        """Autograd itself counts the bytes of distinct tensors it saves; 4 bytes each in fp32."""
        plan = network(patch, spacing, inputs=channels, outputs=outputs, batch=2)
        built = build_model(
            f"unet{len(patch)}d", in_channels=channels, out_channels=outputs,
            features=plan.features, strides=plan.strides, kernels=plan.kernels,
        )  # fmt: skip
        assert plan.parameters == sum(p.numel() for p in built.parameters())
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        weights = {p.untyped_storage().data_ptr() for p in built.parameters()}
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            built.train().multiscale(torch.randn(2, channels, *plan.patch))
        kept = sum(size for key, size in saved.items() if key not in weights)
        assert 0.8 < plan.kept_bytes("32-true") / kept < 1.25

    def test_grows_as_it_should(self) -> None:
        one = network((40, 56, 40), (1, 1, 1))
        fixed = network((40, 56, 40), (1, 1, 1), batch=0).training_bytes("32-true")
        twice = network((40, 56, 40), (1, 1, 1), batch=8)
        assert twice.training_bytes("32-true") - fixed == pytest.approx(
            2 * (one.training_bytes("32-true") - fixed), 1e-6
        )
        assert one.training_bytes("bf16-mixed") < one.training_bytes("32-true")
        wide = network((40, 56, 40), (1, 1, 1), outputs=60)
        assert wide.training_bytes("32-true") > 1.5 * one.training_bytes("32-true")

    @given(
        st.lists(EDGES, min_size=2, max_size=3),
        st.data(),
        st.sampled_from([8, 12, 16, 32]),
        st.integers(1, 16),
        st.integers(320, 4000).map(lambda mb: mb * 10**6),
    )
    def test_what_is_fitted_fits(
        self, shape: list[int], data: st.DataObject, first: int, batch: int, memory: int
    ) -> None:
        spacing = tuple(data.draw(st.lists(SPACINGS, min_size=len(shape), max_size=len(shape))))
        whole = network(fit_patch(shape, spacing, 300_000)[0], spacing, first, batch=batch)
        fitted, shrunk = fit_memory(whole, spacing, "32-true", memory)
        assert fitted.training_bytes("32-true") <= memory
        assert (fitted == whole) == (shrunk == []) == (whole.training_bytes("32-true") <= memory)
        divisor = np.prod(np.array(fitted.strides, int).reshape(-1, len(shape)), axis=0)
        assert min(fitted.patch) >= 1 and not (np.array(fitted.patch) % divisor).any()
        assert fitted.batch >= 1
        assert fitted.features[0] >= min(8, first)
        assert len(fitted.features) == len(fitted.kernels) == len(fitted.strides) + 1

    def test_order_of_shrinking(self) -> None:
        """The batch goes first, then the patch down to 32 voxels an edge, then the width."""
        whole = network((128, 128, 128), (1, 1, 1), first=32, batch=4)
        three = network((128, 128, 128), (1, 1, 1), first=32, batch=3).training_bytes("32-true")
        small, words = fit_memory(whole, (1, 1, 1), "32-true", three)
        assert (small.batch, small.patch) == (3, whole.patch)
        assert words == ["batch from 4 to 3"]
        small, words = fit_memory(whole, (1, 1, 1), "32-true", 3 * 10**9)
        assert (small.batch, small.features[0]) == (2, 32)
        assert 64 <= max(small.patch) < 128
        assert words[0] == "batch from 4 to 2" and words[1].startswith("patch from 128 x 128 x 128 to ")
        small, words = fit_memory(whole, (1, 1, 1), "32-true", 450 * 10**6)
        assert small.features[0] < 32 and max(small.patch) == 32
        assert "features from 32 to 8" in words or "features from 32 to 16" in words

    def test_too_little_for_anything(self) -> None:
        with pytest.raises(
            ValueError,
            match=r"memory must leave 30\d.\d MB for a training step beside the program itself, the least .* got 100.0 MB",
        ):
            fit_memory(network((40, 56, 40), (1, 1, 1)), (1, 1, 1), "32-true", 10**8)


@pytest.mark.parametrize(
    ("text", "amount"),
    [("4GB", 4e9), ("4 gb", 4e9), ("4", 4e9), ("1.5GiB", 1.5 * 2**30), ("900MB", 9e8), ("2TB", 2e12), ("4096 B", 4096)],
)
def test_amounts_of_memory(text: str, amount: float) -> None:
    assert parse_bytes(text) == amount


@pytest.mark.parametrize("text", ["", "much", "0GB", "-1GB", "4 GBit", "1,5GB", "nan"])
def test_amounts_that_are_none(text: str) -> None:
    with pytest.raises(ValueError, match="memory must be an amount like 4GB or 900MB, got"):
        parse_bytes(text)
