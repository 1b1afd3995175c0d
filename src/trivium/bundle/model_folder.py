"""A Bundle on disk: config.json, model.safetensors (or shards of it and their index), preprocessor.json, where there is
one tokenizer.json, labels.json, image_tokenizer.safetensors and, of a fine-tuned model, head.safetensors, and a
manifest.json with the checksum of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from trivium.manifest import write_manifest
from trivium.models.encoded import EncodesImage
from trivium.models.image_tokenizer import ImageTokenizer
from trivium.tensor_files import save_tensors

if TYPE_CHECKING:
    from trivium.bundle import Bundle


def write(
    folder: Path,
    bundle: Bundle,
    weights: Mapping[str, Tensor],
    shard_bytes: int,
    head_weights: Mapping[str, Tensor] | None,
) -> None:
    """Every file of it into a folder that is there. weights, head_weights: in place of the model's own."""
    config = {
        "family": bundle.family,
        "model": bundle.model.config_dict(),  # type: ignore[operator]
        "max_length": bundle.max_length,
        "false_pairs": bundle.false_pairs,
        "image_tokenizer": image_tokenizer_entry(bundle.image_tokenizer),
    }
    if bundle.fusion_trained is not None:
        config["fusion_trained"] = bundle.fusion_trained
    if bundle.untrained:
        config["untrained"] = list(bundle.untrained)
    if bundle.tuned_for:
        config["tuned_for"] = list(bundle.tuned_for)
    if bundle.head is not None and bundle.head_config is not None:
        config["head"] = asdict(bundle.head_config)
        head_weights = bundle.head.state_dict() if head_weights is None else head_weights
        save_tensors(head_weights, folder / "head.safetensors")
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n", encoding="utf-8")
    save_tensors(weights, folder / "model.safetensors", shard_bytes)
    if isinstance(bundle.model, EncodesImage):
        (folder / "preprocessor.json").write_text(bundle.transform.to_json(), encoding="utf-8")
    if bundle.tokenizer is not None:
        bundle.tokenizer.save(folder / "tokenizer.json")
    named = bundle.labels if bundle.labels_of is None else bundle.labels_of
    if named is not None:
        labels = json.dumps(named, indent=1, ensure_ascii=False) + "\n"
        (folder / "labels.json").write_text(labels, encoding="utf-8")
    if bundle.image_tokenizer is not None:
        save_tensors(bundle.image_tokenizer.state_dict(), folder / "image_tokenizer.safetensors")
    write_manifest(folder)


def image_tokenizer_entry(tokenizer: ImageTokenizer | None) -> dict[str, Any] | None:
    return None if tokenizer is None else {"kind": tokenizer.kind, **tokenizer.config_dict()}
