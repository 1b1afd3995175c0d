"""Attention maps as figures, and their overlap with what is drawn."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.dino_batches import TINY, random_dino
from trivium.bundle import Bundle
from trivium.data.sources import open_source
from trivium.data.transforms import ImageTransform
from trivium.evaluate import attention
from trivium.models.vit import ViTConfig


def bundle(scale: float = 1.0) -> Bundle:
    model = random_dino(dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.backbone.encoder.parameters():
            parameter.mul_(scale)
    return Bundle("dino", model.eval(), None, ImageTransform(32))


def test_maps_are_the_class_tokens_over_patches() -> None:
    pictures = list(np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8))
    maps, pixels = attention.maps(bundle(6.0), pictures)
    assert maps.shape == (3, 4, 8, 8)  # twice the size: 8 patches of 8 pixels a side
    assert pixels.shape == (3, 3, 64, 64) and pixels.dtype == torch.uint8
    assert torch.allclose(maps.sum((2, 3)), torch.ones(3, 4), atol=1e-5)
    model = bundle(6.0).model
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ImageTransform().mean, ImageTransform().std))
    rows = model.attention_maps((pixels / 255 - mean) / std)[:, :, 0, 1:]  # type: ignore[operator]
    assert torch.allclose(maps.flatten(2), rows / rows.sum(-1, keepdim=True), atol=1e-5)


def test_the_set_that_holds_the_mass_is_the_smallest() -> None:
    torch.manual_seed(1)
    maps = torch.rand(6, 2, 2, 3).double()
    maps = maps / maps.sum((2, 3), keepdim=True)
    chosen = attention.holding(maps, 0.6)
    for flat, picked in zip(maps.flatten(0, 1).flatten(1), chosen.flatten(0, 1).flatten(1), strict=True):
        assert float(flat[picked].sum()) >= 0.6
        size = int(picked.sum())
        smaller = combinations(flat.tolist(), size - 1)
        assert all(sum(each) < 0.6 for each in smaller)


def test_jaccard_by_hand() -> None:
    drawn = torch.zeros(1, 4, 4, dtype=torch.bool)
    drawn[0, :2] = True  # the upper half
    maps = torch.zeros(1, 3, 2, 2)
    maps[0, 0, 0] = 0.5  # all on the upper patches
    maps[0, 1, 1, 1] = 1.0  # on one patch below
    maps[0, 2] = torch.tensor([[0.35, 0.1], [0.3, 0.25]])  # left above, left below
    assert attention.jaccard(maps, drawn)[0].tolist() == pytest.approx([1.0, 0.0, 4 / 12])


def test_what_is_drawn_is_what_is_not_white() -> None:
    pixels = torch.full((1, 3, 4, 4), 255, dtype=torch.uint8)
    pixels[0, 2, 1, 2] = 100
    pixels[0, :, 3, 3] = 250  # what a compressed picture makes of white
    assert attention.drawn(pixels).nonzero().tolist() == [[0, 1, 2]]


def test_figures_and_results_of_the_drawings() -> None:
    results, figures = attention.boundaries(bundle(6.0), bundle())
    heads = [f"attention.jaccard.{prefix}head_{n}" for prefix in ("", "random_start.") for n in range(1, 5)]
    assert set(results) == {*heads, "attention.jaccard.all"}
    assert all(0 <= result.low <= result.value <= result.high <= 1 for result in results.values())  # type: ignore[operator]
    assert [figure.title for figure in figures] == ["Where it looks", "Does it look at the object?"]
    assert figures[0].image.startswith("data:image/png") and figures[1].image.startswith("data:image/svg+xml")
    assert "looking everywhere" in figures[1].alt
    tower = replace(bundle(), model=random_dino(dtype=torch.float32).backbone.eval())
    assert isinstance(tower.model.config, ViTConfig) and tower.model.config == TINY
    assert torch.equal(attention.maps(tower, [np.zeros((32, 32, 3), np.uint8)])[0],
                       attention.maps(bundle(), [np.zeros((32, 32, 3), np.uint8)])[0])  # fmt: skip


def test_maps_of_ones_own_pictures_take_no_labels_and_pass_over_what_cannot_be_read(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    for number in range(10):
        Image.fromarray(rng.integers(0, 256, (40, 56, 3), np.uint8)).save(tmp_path / f"{number}.png")
    for number in (2, 7):
        (tmp_path / f"{number}.png").write_bytes(b"<html>404</html>")
    figure = attention.on_pictures(bundle(6.0), open_source("images", [str(tmp_path)]))
    assert figure is not None and figure.title == "Where it looks" and "was trained on" in figure.note
    shown = figure.alt.removeprefix("attention maps of ").split(", ")
    assert sorted(shown) == [f"{number}.png" for number in range(10) if number not in (2, 7)]
    page = np.asarray(Image.open(io.BytesIO(base64.b64decode(figure.image.partition(",")[2]))))
    assert page.shape == (8 * 64, (1 + 4) * 64, 3)  # a line a picture: itself, then four heads, at twice the size
    for line, name in enumerate(shown):
        picture = np.asarray(Image.open(tmp_path / name))
        maps, pixels = attention.maps(bundle(6.0), [picture])
        assert np.array_equal(page[64 * line : 64 * line + 64, :64], pixels[0].permute(1, 2, 0).numpy()), name
        brightest = int(maps[0, 2].argmax())  # of the third head: no patch of its tile is lighter
        top, left = 64 * line + 8 * (brightest // 8), 3 * 64 + 8 * (brightest % 8)
        assert (page[top + 2 : top + 6, left + 2 : left + 6] == 255).all(), name
    for number in range(10):
        (tmp_path / f"{number}.png").write_bytes(b"<html>404</html>")
    assert attention.on_pictures(bundle(), open_source("images", [str(tmp_path)])) is None
