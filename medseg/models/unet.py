"""U-Net with residual blocks, instance normalisation and deep supervision, in 2D and 3D.

The encoder halves the grid stage by stage and the decoder doubles it again, with skip connections between equal
resolutions. Every stage of the encoder is one residual block (two convolutions); every stage of the decoder fuses the
upsampled features with the skip by one convolution block. Each decoder resolution has a 1x1 head of its own, so that the
loss can look at all of them in training.

References
----------
Ronneberger, Fischer, Brox (2015), doi:10.1007/978-3-319-24574-4_28; Cicek et al. (2016), doi:10.1007/978-3-319-46723-8_49;
He et al. (2016), doi:10.1109/CVPR.2016.90; Isensee et al. (2021), doi:10.1038/s41592-020-01008-z.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from medseg.models.network import SegmentationNetwork

__all__ = ["UNet"]

CONV: dict[int, Any] = {2: nn.Conv2d, 3: nn.Conv3d}
UP: dict[int, Any] = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
POOL: dict[int, Any] = {2: nn.AvgPool2d, 3: nn.AvgPool3d}


class _InstanceNormCPU(torch.autograd.Function):
    """Group normalisation of one channel a group, with a backward pass of few memory sweeps.

    torch's own backward kernel takes six times as long on channels-last bfloat16, two fifths of a training step.
    With m, r the mean and 1/std of a channel over S voxels and x^ = (x - m) r, the gradient is
    w r (dy - mean(dy) - x^ mean(dy x^)), which is one multiply-add of x and one of dy.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        batch, channels = x.shape[:2]
        y, mean, rstd = torch.native_group_norm(x, weight, bias, batch, channels, x[0, 0].numel(), channels, eps)
        ctx.save_for_backward(x, weight, mean, rstd)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        x, weight, mean, rstd = ctx.saved_tensors
        batch, channels = x.shape[:2]
        mean, rstd = (t.view(batch, channels).to(torch.promote_types(t.dtype, torch.float32)) for t in (mean, rstd))
        dy_rows, x_rows = (t.flatten(2).transpose(1, 2) for t in (dy, x))  # (B, S, C): contiguous when channels last
        sum_dy = dy_rows.sum(1, dtype=mean.dtype)
        sum_dy_xhat = ((dy_rows * x_rows).sum(1, dtype=mean.dtype) - mean * sum_dy) * rstd
        scale = weight * rstd
        slope = -scale * rstd * sum_dy_xhat / x_rows.shape[1]
        offset = -scale * sum_dy / x_rows.shape[1] - slope * mean
        dx = torch.addcmul(offset[:, None], slope[:, None], x_rows).addcmul_(scale[:, None], dy_rows).to(x.dtype)
        dx = dx.transpose(1, 2).unflatten(2, x.shape[2:])
        return dx, sum_dy_xhat.sum(0).to(weight.dtype), sum_dy.sum(0).to(weight.dtype), None


class InstanceNorm(nn.GroupNorm):
    """Instance normalisation with scale and shift.

    One group per channel is the same thing as ``nn.InstanceNorm``, but the CPU kernel of group normalisation works on
    channels-last memory without a copy.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type == "cpu" and torch.is_grad_enabled():
            return _InstanceNormCPU.apply(x, self.weight, self.bias, self.eps)
        return super().forward(x)


class ConvBlock(nn.Sequential):
    """Convolution, instance normalisation, leaky ReLU."""

    def __init__(self, dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        padding = [k // 2 for k in kernel]
        super().__init__(
            CONV[dims](inputs, outputs, tuple(kernel), tuple(stride), tuple(padding), bias=False),
            InstanceNorm(outputs),
            nn.LeakyReLU(0.01, inplace=True),
        )


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut (pooled and projected where the shape changes)."""

    def __init__(self, dims: int, inputs: int, outputs: int, kernel: Sequence[int], stride: Sequence[int]) -> None:
        super().__init__()
        padding = tuple(k // 2 for k in kernel)
        self.first = ConvBlock(dims, inputs, outputs, kernel, stride)
        self.second = CONV[dims](outputs, outputs, tuple(kernel), 1, padding, bias=False)
        self.norm = InstanceNorm(outputs)
        self.pool = POOL[dims](tuple(stride)) if max(stride) > 1 else nn.Identity()
        self.project = CONV[dims](inputs, outputs, 1, bias=False) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.second(self.first(x)))
        return F.leaky_relu(y + self.project(self.pool(x)), 0.01)


class UNet(SegmentationNetwork):
    """Residual U-Net.

    Parameters
    ----------
    in_channels, out_channels : int
        Channels of the image; channels of the logits (background included for exclusive classes).
    dims : 2 or 3
        Dimensions of the grid.
    features : sequence of int
        Channels of each stage, finest first.
    strides : sequence of sequences of int, optional
        Downsampling per axis from each stage to the next (``len(features) - 1`` entries); 2 everywhere by default.
    kernels : sequence of sequences of int, optional
        Kernel size per axis in each stage; 3 everywhere by default. Thick slices want 1 across them in fine stages.

    Notes
    -----
    Memory and time grow linearly with the voxels of the input; about ``4 * features[0] / in_channels`` times the input
    is held by activations of the finest stage in training.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        dims: int = 3,
        features: Sequence[int] = (32, 64, 128, 256),
        strides: Sequence[Sequence[int]] | None = None,
        kernels: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        strides = strides or [(2,) * dims] * (len(features) - 1)
        kernels = kernels or [(3,) * dims] * len(features)
        if dims not in (2, 3):
            raise ValueError(f"dims must be 2 or 3, got {dims}")
        if len(strides) != len(features) - 1 or len(kernels) != len(features):
            raise ValueError(
                f"strides and kernels must fit {len(features)} stages, got {len(strides)} strides, {len(kernels)} kernels"
            )
        self.dims, self.strides = dims, [tuple(s) for s in strides]
        widths = list(pairwise([in_channels, *features]))
        self.encoder: nn.ModuleList = nn.ModuleList(
            ResidualBlock(dims, a, b, k, s)
            for (a, b), k, s in zip(widths, kernels, [(1,) * dims, *self.strides], strict=True)
        )
        deep_first = list(zip(list(pairwise(features)), kernels[:-1], self.strides, strict=True))[::-1]
        self.up = nn.ModuleList(UP[dims](deep, fine, s, s, bias=False) for (fine, deep), _, s in deep_first)
        self.decoder = nn.ModuleList(
            ConvBlock(dims, 2 * fine, fine, kernel, (1,) * dims) for (fine, _), kernel, _ in deep_first
        )
        self.heads = nn.ModuleList(CONV[dims](fine, out_channels, 1) for (fine, _), _, _ in deep_first)
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
                nn.init.kaiming_normal_(module.weight, a=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def divisor(self) -> tuple[int, ...]:
        return tuple(math.prod(s[axis] for s in self.strides) for axis in range(self.dims))

    @property
    def input_tensors(self) -> tuple[str, ...]:
        shortcut = ("encoder.0.project.weight",) if "encoder.0.project.weight" in self.state_dict() else ()
        return ("encoder.0.first.0.weight", *shortcut)

    @property
    def output_tensors(self) -> tuple[str, ...]:
        return tuple(f"heads.{level}.{kind}" for level in range(len(self.heads)) for kind in ("weight", "bias"))

    def decode(self, image: Tensor) -> list[Tensor]:
        x, skips = image, []
        for block in self.encoder:
            x = block(x)
            skips.append(x)
        logits = []
        for skip, up, block, head in zip(skips[-2::-1], self.up, self.decoder, self.heads, strict=True):
            x = block(torch.cat([up(x), skip], 1))
            if self.training or skip is skips[0]:
                logits.append(head(x))
        return logits[::-1]
