"""Models of transformers with random weights, small enough to save and load in a moment."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "mug", "cat", "##s", "on", "the", "mat", "."]


def config(width: int = 32, layers: tuple[int, int, int] = (2, 3, 1), codebook: bool = True, **changes: Any) -> Any:
    """changes: image_size, patch_size, vocab_size, num_codes, projection_dim, heads."""
    heads, codes = changes.pop("heads", 4), changes.pop("num_codes", 50)
    shared = {"hidden_size": width, "num_attention_heads": heads, "intermediate_size": 2 * width + 8}
    image = {"image_size": changes.pop("image_size", 32), "patch_size": changes.pop("patch_size", 8)}
    return transformers.FlavaConfig(
        image_config=shared | image | {"num_hidden_layers": layers[0], "vocab_size": codes},
        text_config=shared
        | {
            "num_hidden_layers": layers[1],
            "vocab_size": changes.pop("vocab_size", len(WORDS)),
            "max_position_embeddings": 24,
        },
        multimodal_config=shared | {"num_hidden_layers": layers[2]},
        image_codebook_config={"hidden_size": 8, "vocab_size": codes},
        hidden_size=width,
        projection_dim=changes.pop("projection_dim", 24),
        init_codebook=codebook,
        **changes,
    )


def shuffled(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """No tensor may be equal to another, or an exchanged pair would go unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.empty(parameter.shape).normal_(0, 0.05, generator=generator))
    return model.eval()


def pretraining(seed: int = 0, **changes: Any) -> Any:
    return shuffled(transformers.FlavaForPreTraining(config(**changes)), seed)


def save_with_tokenizer(model: Any, folder: Path) -> None:
    """What save_pretrained writes, and the tokenizer beside it."""
    model.save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    transformers.BertTokenizer(vocab=str(folder / "vocab.txt"), model_max_length=24).save_pretrained(folder)
