"""The files beside Hugging Face's weights: how pictures are prepared and how texts are cut into tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from trivium.errors import TriviumError

RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's numbers
# How the names of processors begin, to which one number for a size is the short side, and to which it is both sides.
_SHORT_SIDE, _BOTH_SIDES = ("CLIP", "ChineseCLIP", "Bit"), ("ViT", "DeiT", "Beit", "Flava")
_CUTS = (*_SHORT_SIDE, "DeiT", "Flava")  # those that cut out the middle unless they are told not to


def transform_from_hf(values: Mapping[str, Any], default: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json (or processor_config.json) -> the fields of an image transform.

    Args:
        default: the fields that the model stands for itself: what holds where the file, or the processor's name, says
            nothing.

    Raises:
        TriviumError: sizes that are no squares, a middle larger than the picture it is cut out of, another filter.
    """
    values = values.get("image_processor", values)
    name = values.get("image_processor_type") or values.get("feature_extractor_type") or ""
    model_cuts = default.get("crop") == "center"
    size = values.get("size", default.get("size", 224))
    by_short_side = name.startswith(_SHORT_SIDE) or (model_cuts and not name.startswith(_BOTH_SIDES))
    if isinstance(size, Mapping):
        by_short_side = "shortest_edge" in size
    middle = size
    if values.get("do_center_crop", name.startswith(_CUTS) if name else model_cuts):
        middle = values.get("crop_size", default.get("size", size))
    side, cut = _side(size), _side(middle)
    filters = {number: filter for filter, number in RESAMPLE.items()}
    resample = values.get("resample", RESAMPLE[default.get("filter", "bicubic")])
    if side is None or cut is None or cut > side or resample not in filters:
        raise TriviumError(
            f"preprocessor_config.json: size {size!r} and crop_size {middle!r} with resample {resample!r} are not"
            f" supported: squares are, the second no larger than the first, with one of {sorted(filters)}"
        )
    said = {ours: tuple(values[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
            if theirs in values}  # fmt: skip
    return {
        **default, **said, "size": cut, "resize": side if side > cut else None, "filter": filters[resample],
        "crop": "center" if by_short_side else "squash",
    }  # fmt: skip


def _side(size: Any) -> int | None:
    """Pixels of a square's side, as one number, a pair or a mapping says them; None for what is no square."""
    sides = list(size.values() if isinstance(size, Mapping) else size if isinstance(size, list | tuple) else [size])
    return sides[0] if sides and type(sides[0]) is int and sides.count(sides[0]) == len(sides) else None


def image_processor_to_hf(
    size: int, filter: str, crop: str, mean: Sequence[float], std: Sequence[float], longest: None = None,
    resize: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of an image transform as the preprocessor_config.json of a FLAVA or a CLIP."""
    square, side = {"height": size, "width": size}, resize or size
    return {
        "do_resize": True,
        "size": {"shortest_edge": side} if crop == "center" else {"height": side, "width": side},
        "resample": RESAMPLE[filter],
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
    }


def masks_and_codebook_to_hf(grid: int, codebook_size: int) -> dict[str, Any]:
    """What a FlavaImageProcessor has beyond; masks keep BEiT's shares, 75 of 196 patches and 16 in a block."""
    codebook_square = {"height": codebook_size, "width": codebook_size}
    masked = max(1, round(75 / 196 * grid**2))
    return {
        "input_size_patches": grid,
        "total_mask_patches": masked,
        "mask_group_min_patches": max(1, round(16 / 196 * grid**2)),
        "mask_group_min_aspect_ratio": 0.3,
        "codebook_size": codebook_square,
        "codebook_crop_size": codebook_square,
        "codebook_resample": RESAMPLE["lanczos"],
        "codebook_do_map_pixels": True,
        "codebook_image_mean": [0.0, 0.0, 0.0],
        "codebook_image_std": [1.0, 1.0, 1.0],
    }


def open_clip_preprocessing(
    size: int, filter: str, crop: str, mean: Sequence[float], std: Sequence[float], longest: None = None,
    resize: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of an image transform as the preprocess_cfg of an open_clip_config.json, without resize."""
    mode = "shortest" if crop == "center" else "squash"
    return {"size": size, "mean": list(mean), "std": list(std), "interpolation": filter, "resize_mode": mode}


def transform_from_open_clip(values: Mapping[str, Any]) -> dict[str, Any]:
    """What of an image transform the preprocess_cfg of an open_clip_config.json states."""
    crops = {"shortest": "center", "squash": "squash"}
    mode, interpolation = values.get("resize_mode", "shortest"), values.get("interpolation", "bicubic")
    if mode not in crops or interpolation not in RESAMPLE:
        raise TriviumError(
            f"open_clip_config.json: resize_mode {mode!r} with interpolation {interpolation!r} is not supported"
        )
    fields = {name: tuple(values[name]) for name in ("mean", "std") if name in values}
    return {**fields, "crop": crops[mode], "filter": interpolation}


def vit_processor_to_hf(
    size: int, filter: str, crop: str, mean: Sequence[float], std: Sequence[float], longest: None = None,
    resize: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The preprocessor_config.json of a ViT. One that crops the middle is CLIP's processor there: ViT's own cannot."""
    settings = image_processor_to_hf(size, filter, crop, mean, std, longest, resize)
    if crop == "center" or resize is not None:
        return {"image_processor_type": "CLIPImageProcessor", **settings}
    kept = {name: value for name, value in settings.items() if name not in ("do_center_crop", "crop_size")}
    return {"image_processor_type": "ViTImageProcessor", **kept}


def transform_from_timm(values: Mapping[str, Any], size: int) -> tuple[dict[str, Any], list[str]]:
    """timm's config.json -> the fields of an image transform, and sentences for what of it cannot be done here.

    Without one, or where it says nothing: the short side to 256 for a size of 224, the middle, bicubic, and ImageNet's
    mean and std. That is the published evaluation of DINO and DeiT, and timm's own where nothing is said.
    """
    values = values.get("pretrained_cfg") or values  # older files have its fields at the top
    said = []

    def known(field: str, default: Any, fits: Callable[[Any], bool]) -> Any:
        value = values.get(field) or default
        if fits(value):
            return value
        said.append(
            f"config.json: {field} {value!r} of pictures is not supported and {default!r} is taken, so that figures may"
            " differ from published ones"
        )
        return default

    crop = known("crop_mode", "center", lambda mode: mode in ("center", "squash"))
    filter = known("interpolation", "bicubic", lambda name: name in list(RESAMPLE))
    share = known("crop_pct", 224 / 256, lambda share: isinstance(share, int | float) and 0 < share <= 1)
    mean, std = values.get("mean") or (0.485, 0.456, 0.406), values.get("std") or (0.229, 0.224, 0.225)
    side = math.floor(size / share)
    fields = {"size": size, "filter": filter, "mean": tuple(mean), "std": tuple(std), "crop": crop,
              "resize": side if side > size else None}  # fmt: skip
    return fields, said


def transform_to_timm(
    size: int, filter: str, crop: str, mean: Sequence[float], std: Sequence[float], longest: None = None,
    resize: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of an image transform as the pretrained_cfg of timm's config.json."""
    side = resize or size
    share = size / side
    if math.floor(size / share) < side:  # as it is read; a quotient may be a hair too large
        share = math.nextafter(share, 0)
    return {"input_size": [3, size, size], "interpolation": filter, "crop_pct": share, "crop_mode": crop,
            "mean": list(mean), "std": list(std)}  # fmt: skip


def tokenizer_to_hf(tokenizer: Mapping[str, Any], specials: Mapping[str, str], max_length: int) -> dict[str, Any]:
    """The tokenizer_config.json that belongs to a tokenizer.json.

    specials: role ("pad", "cls", ...) -> the token that has it.
    """
    config: dict[str, Any] = {"model_max_length": max_length}
    config |= {f"{role}_token": name for role, name in specials.items()}
    if tokenizer["model"]["type"] == "WordPiece":
        whole: Mapping[str, Any] = tokenizer.get("normalizer") or {}
        steps: list[Mapping[str, Any]] = whole.get("normalizers", [whole])  # of captions several, BERT's among them
        normalizer: Mapping[str, Any] = next((step for step in steps if step.get("type") == "BertNormalizer"), {})
        return config | {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.get("lowercase", False),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        }
    is_clip = tokenizer["model"].get("end_of_word_suffix") == "</w>"
    return config | {"tokenizer_class": "CLIPTokenizer" if is_clip else "PreTrainedTokenizerFast"}


def vocabulary(tokenizer: Mapping[str, Any]) -> list[str]:
    """The pieces of a tokenizer.json in the order of their ids."""
    pieces = tokenizer["model"].get("vocab", {})
    if isinstance(pieces, Mapping):
        return sorted(pieces, key=pieces.__getitem__)
    return [piece for piece, *_ in pieces]  # Unigram: pairs of piece and score
