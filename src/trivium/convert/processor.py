"""The files beside Hugging Face's weights: how pictures are prepared and how texts are cut into tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trivium.errors import TriviumError

RESAMPLE = {"lanczos": 1, "bilinear": 2, "bicubic": 3, "box": 4}  # Pillow's numbers


def transform_from_hf(values: Mapping[str, Any]) -> dict[str, Any]:
    """preprocessor_config.json (or processor_config.json) -> size, filter, mean, std and crop of an image transform."""
    values = values.get("image_processor", values)
    size = values.get("size", 224)
    sides = set(size.values()) if isinstance(size, Mapping) else {size}
    names = {number: name for name, number in RESAMPLE.items()}
    resample = values.get("resample", 3)
    if len(sides) != 1 or resample not in names:
        raise TriviumError(
            f"preprocessor_config.json: size {size!r} with resample {resample!r} is not supported, squares with one of "
            f"{sorted(names)} are"
        )
    fields: dict[str, Any] = {"size": int(sides.pop()), "filter": names[resample]}
    fields |= {ours: tuple(values[theirs]) for ours, theirs in (("mean", "image_mean"), ("std", "image_std"))
               if theirs in values}  # fmt: skip
    if isinstance(size, Mapping) and "shortest_edge" in size:
        fields["crop"] = "center"
    return fields


def processor_to_hf(
    size: int, filter: str, crop: str, mean: Sequence[float], std: Sequence[float], grid: int, codebook_size: int
) -> dict[str, Any]:
    """The preprocessor_config.json of a FlavaProcessor; masks keep BEiT's share of 75 in 196 patches."""
    square = {"height": size, "width": size}
    codebook_square = {"height": codebook_size, "width": codebook_size}
    masked = max(1, round(75 / 196 * grid**2))
    return {
        "processor_class": "FlavaProcessor",
        "image_processor_type": "FlavaImageProcessor",
        "do_resize": True,
        "size": {"shortest_edge": size} if crop == "center" else square,
        "resample": RESAMPLE[filter],
        "do_center_crop": True,
        "crop_size": square,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(mean),
        "image_std": list(std),
        "input_size_patches": grid,
        "total_mask_patches": masked,
        "mask_group_min_patches": min(16, masked),
        "mask_group_min_aspect_ratio": 0.3,
        "codebook_size": codebook_square,
        "codebook_crop_size": codebook_square,
        "codebook_resample": RESAMPLE["lanczos"],
        "codebook_do_map_pixels": True,
        "codebook_image_mean": [0.0, 0.0, 0.0],
        "codebook_image_std": [1.0, 1.0, 1.0],
    }


def tokenizer_to_hf(tokenizer: Mapping[str, Any], specials: Mapping[str, str], max_length: int) -> dict[str, Any]:
    """The tokenizer_config.json that belongs to a tokenizer.json.

    specials: role ("pad", "cls", ...) -> the token that has it.
    """
    config: dict[str, Any] = {"model_max_length": max_length}
    config |= {f"{role}_token": name for role, name in specials.items()}
    if tokenizer["model"]["type"] == "WordPiece":
        normalizer = tokenizer.get("normalizer") or {}
        return config | {
            "tokenizer_class": "BertTokenizer",
            "do_lower_case": normalizer.get("lowercase", False),
            "strip_accents": normalizer.get("strip_accents"),
            "tokenize_chinese_chars": normalizer.get("handle_chinese_chars", True),
        }
    return config | {"tokenizer_class": "PreTrainedTokenizerFast"}


def vocabulary(tokenizer: Mapping[str, Any]) -> list[str]:
    """The pieces of a tokenizer.json in the order of their ids."""
    pieces = tokenizer["model"].get("vocab", {})
    if isinstance(pieces, Mapping):
        return sorted(pieces, key=pieces.__getitem__)
    return [piece for piece, *_ in pieces]  # Unigram: pairs of piece and score
