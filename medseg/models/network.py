"""What every network for whole images has in common: padding, resolutions, and an encoder that can be frozen."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Self

from torch import Tensor, nn
from torch.nn import functional as F

__all__ = ["SegmentationNetwork"]


class SegmentationNetwork(nn.Module, ABC):
    """Image (B, C, \\*S) in, logits (B, K, \\*S) out, of any size; an ``encoder`` and what decodes its features.

    A subclass gives :attr:`divisor`, :meth:`decode` and the names of its outermost tensors, which depend on the channels
    of the image and of the logits.
    """

    encoder: nn.Module
    encoder_name: str | None = None  # where it is one of a library
    encoder_frozen: bool = False

    @property
    @abstractmethod
    def divisor(self) -> tuple[int, ...]:
        """Total downsampling per axis; inputs of other sizes are padded inside."""

    @property
    @abstractmethod
    def input_tensors(self) -> tuple[str, ...]:
        """Names of the tensors whose axis 1 is the channels of the image."""

    @property
    @abstractmethod
    def output_tensors(self) -> tuple[str, ...]:
        """Names of the tensors whose axis 0 is the channels of the logits."""

    @abstractmethod
    def decode(self, image: Tensor) -> list[Tensor]:
        """Logits of an image whose sizes :attr:`divisor` divides, finest first; one resolution in eval mode."""

    def multiscale(self, image: Tensor) -> list[Tensor]:
        """Logits at every resolution that the loss looks at, finest first.

        Parameters
        ----------
        image : (B, C, *S) tensor
            Any size; padded at the end of each axis to a multiple of :attr:`divisor` by repeating the border.

        Returns
        -------
        list of (B, K, *S') tensors
            The first has exactly the size of the image. A U-Net in training gives more, which cover the padded grid at
            half, a quarter ... of its resolution (as its strides say).
        """
        size = image.shape[2:]
        padding = [(-n) % d for n, d in zip(size, self.divisor, strict=True)]
        if not any(padding):
            return self.decode(image)
        logits = self.decode(F.pad(image, [p for n in reversed(padding) for p in (0, n)], mode="replicate"))
        for axis, n in enumerate(size, start=2):
            logits[0] = logits[0].narrow(axis, 0, n)
        return logits

    def forward(self, image: Tensor) -> Tensor:
        """Logits (B, K, *S) of an image (B, C, *S)."""
        return self.multiscale(image)[0]

    def freeze_encoder(self) -> None:
        """Leave the encoder as it is from now on: no gradient, and eval mode whatever :meth:`train` says.

        In eval mode normalisation keeps its statistics and dropout is off, so that training changes no byte of it.
        """
        self.encoder_frozen = True
        self.encoder.requires_grad_(False)
        self.encoder.eval()

    def train(self, mode: bool = True) -> Self:
        """Training or eval mode; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.encoder_frozen:
            self.encoder.eval()
        return self
