"""How pictures are prepared, as the files beside foreign weights say it: against the processors that wrote them."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.models.beit.image_processing_pil_beit import BeitImageProcessorPil
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.flava.image_processing_pil_flava import FlavaImageProcessorPil, FlavaMaskingGenerator
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

from trivium.convert import processor
from trivium.data.masking import block_mask
from trivium.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform, normalize
from trivium.errors import TriviumError

HALF = (0.5, 0.5, 0.5)
OF_CLIP = {"size": 32, "crop": "center"}  # what a model of the family stands for itself
OF_VIT = {"size": 32, "crop": "squash", "filter": "bilinear", "mean": HALF, "std": HALF}
OF_BEIT, OF_FLAVA = {"size": 32, "mean": HALF, "std": HALF}, {"size": 32}
SHORT_37, SQUARE_32, SQUARE_37 = {"shortest_edge": 37}, {"height": 32, "width": 32}, {"height": 37, "width": 37}
OLD_CLIP = {"size": 32, "crop_size": 32, "do_center_crop": True, "feature_extractor_type": "CLIPFeatureExtractor"}
FILES: list[tuple[type[PilBackend], dict[str, Any], dict[str, Any]]] = [
    (CLIPImageProcessorPil, OF_CLIP, OLD_CLIP),  # as the published weights have it
    (CLIPImageProcessorPil, OF_CLIP, {"size": 32, "crop_size": 32}),
    (CLIPImageProcessorPil, OF_CLIP, {**OLD_CLIP, "size": 37, "resample": 2}),
    (CLIPImageProcessorPil, OF_CLIP, {"size": SHORT_37, "crop_size": SQUARE_32}),
    (CLIPImageProcessorPil, OF_VIT, {**OLD_CLIP, "image_mean": HALF, "image_std": HALF, "resample": 3}),
    (BitImageProcessorPil, OF_VIT, {"size": SHORT_37, "crop_size": SQUARE_32, "image_mean": HALF, "image_std": HALF,
                                    "image_processor_type": "BitImageProcessor", "resample": 3}),
    (ViTImageProcessorPil, OF_VIT, {"size": 32, "feature_extractor_type": "ViTFeatureExtractor"}),
    (ViTImageProcessorPil, OF_VIT, {"size": SQUARE_32, "resample": 3, "image_mean": [0.1, 0.2, 0.3]}),
    (ViTImageProcessorPil, OF_CLIP, {"size": 32, "image_processor_type": "ViTImageProcessor", "resample": 2,
                                     "image_mean": HALF, "image_std": HALF}),
    (DeiTImageProcessorPil, OF_VIT, {"size": 37, "crop_size": 32, "feature_extractor_type": "DeiTFeatureExtractor",
                                     "do_center_crop": True, "resample": 3, "image_mean": HALF, "image_std": HALF}),
    (DeiTImageProcessorPil, OF_VIT, {"size": SQUARE_37, "crop_size": SQUARE_32, "resample": 3, "do_center_crop": True}),
    (BeitImageProcessorPil, OF_BEIT, {"size": 32, "crop_size": 24, "do_center_crop": False}),
    (FlavaImageProcessorPil, OF_FLAVA, {"size": 32, "crop_size": 32, "do_center_crop": True}),
    (FlavaImageProcessorPil, OF_FLAVA, {"size": [32, 32], "crop_size": [32, 32],
                                        "image_processor_type": "FlavaImageProcessor"}),
]  # fmt: skip


@pytest.mark.parametrize(("kind", "default", "file"), FILES)
@pytest.mark.parametrize("shape", [(64, 32), (45, 80), (32, 32)])
def test_pictures_are_prepared_as_the_processor_of_a_file_does(
    kind: type[PilBackend], default: dict[str, Any], file: dict[str, Any], shape: tuple[int, int], tmp_path: Path
) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(file))
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*shape, 3), dtype=np.uint8))
    theirs = kind.from_pretrained(tmp_path)(picture, return_tensors="pt")["pixel_values"]
    ours = ImageTransform(**processor.transform_from_hf(file, default))
    assert torch.allclose(normalize(ours(picture)[None], ours.mean, ours.std), theirs, atol=1e-5)


@pytest.mark.parametrize("crop", ["center", "squash"])
@pytest.mark.parametrize("resize", [None, 37])
@pytest.mark.parametrize("write", [processor.image_processor_to_hf, processor.vit_processor_to_hf])
def test_a_transform_comes_back_from_a_processors_file(crop: Any, resize: int | None, write: Any) -> None:
    transform = ImageTransform(32, "bilinear", HALF, (0.1, 0.2, 0.3), crop, resize=resize)
    for default in (OF_CLIP, OF_VIT):
        assert ImageTransform(**processor.transform_from_hf(write(**asdict(transform)), default)) == transform


@pytest.mark.parametrize(
    "file",
    [
        {"size": {"height": 32, "width": 48}},
        {"size": {"shortest_edge": 32, "longest_edge": 48}},
        {"size": "32"},
        {"size": [[32], [32]]},
        {"size": 32, "crop_size": 48},
        {"size": 32, "crop_size": {"height": 24, "width": 32}},
        {"size": 32, "crop_size": 32, "resample": 0},
    ],
)
def test_what_cannot_be_done_is_refused_with_its_fields(file: dict[str, Any]) -> None:
    with pytest.raises(TriviumError, match=r"preprocessor_config.json: size .* and crop_size .* not supported"):
        processor.transform_from_hf(file, OF_CLIP)


# ------------------------------------------------------------------------------------------------------ timm and DINO


@pytest.mark.parametrize(
    ("config", "size", "expected"),
    [
        ({}, 224, {"resize": 256}),  # the published evaluation of DINO and DeiT
        ({"model_args": {"num_heads": 3}}, 384, {"resize": 438}),
        ({"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "bilinear"}}, 224,
         {"resize": 248, "filter": "bilinear"}),
        ({"pretrained_cfg": {"crop_pct": 1.0, "mean": [0.5] * 3, "std": [0.5] * 3}}, 384, {"mean": HALF, "std": HALF}),
        ({"pretrained_cfg": {"crop_pct": 0.95, "crop_mode": "squash"}}, 224, {"resize": 235, "crop": "squash"}),
        ({"architecture": "vit", "crop_pct": 0.9}, 224, {"resize": 248}),  # an older file
    ],
)  # fmt: skip
def test_pictures_of_timms_models_are_prepared_as_for_their_published_figures(
    config: dict[str, Any], size: int, expected: dict[str, Any]
) -> None:
    """floor(size / crop_pct) pixels, then the middle, as timm's transforms_imagenet_eval."""
    fields, said = processor.transform_from_timm(config, size)
    plain = ImageTransform(size, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop="center")
    assert said == [] and ImageTransform(**fields) == replace(plain, **expected)


@pytest.mark.parametrize(("field", "value"), [("interpolation", "nearest"), ("crop_mode", "border"), ("crop_pct", 1.2)])
def test_what_of_timms_preparation_cannot_be_done_is_said(field: str, value: object) -> None:
    fields, [said] = processor.transform_from_timm({"pretrained_cfg": {field: value}}, 224)
    assert fields == processor.transform_from_timm({}, 224)[0]
    assert said.startswith(f"config.json: {field} {value!r} of pictures is not supported")


@given(st.integers(1, 600), st.integers(0, 400), st.sampled_from(["center", "squash"]))
def test_a_transform_comes_back_from_timms_config(size: int, margin: int, crop: Any) -> None:
    transform = ImageTransform(size, "bilinear", HALF, (0.1, 0.2, 0.3), crop, resize=size + margin if margin else None)
    written = {"pretrained_cfg": processor.transform_to_timm(**asdict(transform))}
    fields, said = processor.transform_from_timm(json.loads(json.dumps(written)), size)
    assert said == [] and ImageTransform(**fields) == transform


@pytest.mark.parametrize("grid", [4, 8, 14])
def test_masks_of_the_processor_are_those_that_training_draws(grid: int) -> None:
    """FLAVA's processor and `block_mask` hide as many patches on average, on a grid of any size."""
    told = processor.masks_and_codebook_to_hf(grid, 8)
    names = ("total_mask_patches", "mask_group_min_patches", "mask_group_min_aspect_ratio")
    generator = FlavaMaskingGenerator(grid, **{name: told[name] for name in names})
    random.seed(0)
    rng = np.random.default_rng(0)
    theirs = [int(generator().sum()) for _ in range(400)]
    mine = [int(block_mask(rng, grid, grid).sum()) for _ in range(400)]
    assert np.mean(theirs) == pytest.approx(np.mean(mine), rel=0.05)
