"""What methods that read pictures have in common: uint8 until the device, normalised there. B rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.train.protocol import Method


@dataclass(frozen=True)
class Pixels:
    """How uint8 pixels are normalised on the device, in units of [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


class MethodOfPictures(Method):
    """A method whose batches hold pictures. Its mean also says where the method is."""

    mean: Tensor
    std: Tensor

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.register_buffer("mean", torch.tensor(pixels.mean).view(1, 3, 1, 1) * 255, persistent=False)
        self.register_buffer("std", torch.tensor(pixels.std).view(1, 3, 1, 1) * 255, persistent=False)

    def pixels(self, pixels_BCHW: Tensor) -> Tensor:
        """uint8, wherever they are -> normalised, on the device."""
        return (self._to(pixels_BCHW) - self.mean) / self.std

    def _to(self, tensor: Tensor) -> Tensor:
        """On the device. From pinned memory, as else the copy may wait for what the device has still to do."""
        if self.mean.is_cuda and not tensor.is_cuda:
            tensor = tensor.pin_memory()
        return tensor.to(self.mean.device, non_blocking=True)
