"""Decoded pictures, kept in the memory of a worker."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np


class Decoded:
    """Pictures are kept until the memory is full and then for good: an epoch reads every picture once, so to drop the
    oldest for the newest would drop each just before its turn."""

    def __init__(self, cache_bytes: int) -> None:
        self._free_bytes = cache_bytes
        self._pictures: dict[bytes, np.ndarray] = {}

    def __len__(self) -> int:
        """Pictures that are kept."""
        return len(self._pictures)

    def get(self, digest: bytes, decode: Callable[[], np.ndarray]) -> np.ndarray:
        """uint8 [H, W, 3], not to be written to. digest: of the encoded picture. decode: where it is not kept."""
        known = self._pictures.get(digest)
        if known is not None:
            return known
        picture_HWC = decode()
        if self._free_bytes >= picture_HWC.nbytes:
            picture_HWC.flags.writeable = False
            self._pictures[digest] = picture_HWC
            self._free_bytes -= picture_HWC.nbytes
        return picture_HWC
