"""ImageNet-1k's training pictures: train/nXXXXXXXX/*.JPEG, the class of a picture being its folder's place in order."""

from __future__ import annotations

import os
import re

from trivium.data.files import Folder
from trivium.errors import TriviumError

NUM_CLASSES, NUM_PICTURES = 1000, 1_281_167  # of the official training set


def open_imagenet(folder: str) -> Folder:
    """Pictures with the number of their class, by the order of the WordNet ids. Raises TriviumError."""
    if not os.path.isdir(folder):
        raise TriviumError(f"{folder} is no folder: name ImageNet's train, whose folders are called as n01440764")
    source = Folder(folder, "images", classes=True)
    stray = next((name for name in source.class_names if not re.fullmatch(r"n\d{8}", name)), None)
    if stray is not None:
        raise TriviumError(f"{folder}/{stray} is no class of ImageNet: its folders are called as n01440764")
    return source
