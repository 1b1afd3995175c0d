"""A tiny FLAVA drawn at random, saved as a model folder, and a few pictures in a folder tree."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trivium.data.tokenizer import Tokenizer
from trivium.data.transforms import ImageTransform
from trivium.load import Bundle
from trivium.models.flava import Flava, FlavaConfig

TEXTS = ["a red mug", "a blue cup", "the green tree", "nine yellow birds"]


def make_bundle(seed: int) -> Bundle:
    torch.manual_seed(seed)
    tokenizer = Tokenizer.train(TEXTS * 3, 120)
    config = FlavaConfig.of_size(
        "tiny", image_size=32, patch_size=8, vocab_size=tokenizer.vocab_size, pad_id=tokenizer.pad_id
    )
    model = Flava(config)
    with torch.no_grad():  # far enough from zero that different inputs lie far apart
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.08)
    return Bundle("flava", model.eval(), tokenizer, ImageTransform(config.image_size), max_length=16)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "tiny"
    make_bundle(0).save(folder)
    return folder


@pytest.fixture(scope="session")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "other"
    make_bundle(1).save(folder)
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Nine pictures in two folders: noise, each of its own seed, in several formats."""
    folder = tmp_path / "pictures"
    (folder / "below").mkdir(parents=True)
    for number, suffix in enumerate((".png", ".jpg", ".webp") * 3):
        pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        where = folder / "below" if number % 2 else folder
        picture = Image.fromarray(pixels).resize((48, 40), Image.Resampling.NEAREST)
        picture.save(where / f"{number}{suffix}", lossless=True) if suffix == ".webp" else picture.save(
            where / f"{number}{suffix}"
        )
    return folder
