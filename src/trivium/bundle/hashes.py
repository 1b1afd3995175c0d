"""Names for exactly one model, by which figures, features and embeddings of two are never taken for each other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from trivium.bundle import Bundle


def model_hash(bundle: Bundle) -> str:
    """A name for exactly this model: sha256 over its settings, its transform, its tokenizer and its tensors."""
    settings = {"family": bundle.family, "transform": asdict(bundle.transform), "max_length": bundle.max_length}
    settings["model"] = bundle.model.config_dict()  # type: ignore[operator]
    if bundle.untrained:  # what the same tensors do not say
        settings["untrained"] = bundle.untrained
    if bundle.tokenizer is not None:
        settings["tokenizer"] = bundle.tokenizer.to_json()
    return _hash(settings, bundle.model)


def head_hash(bundle: Bundle) -> str:
    """Likewise for the head of a fine-tuned model: its settings, its labels and its tensors."""
    assert bundle.head is not None and bundle.head_config is not None
    return _hash({"head": asdict(bundle.head_config), "labels": bundle.labels}, bundle.head)


def _hash(settings: Mapping[str, Any], module: torch.nn.Module) -> str:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"\n{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
