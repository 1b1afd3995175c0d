"""FLAVA's weights in the layout of torchmultimodal (`flava_model_for_pretraining`), in and out.

Its names follow from Hugging Face's by renaming. Easy to get wrong: with dropout the second linear map of a block moves
from ``feedforward.model.2`` to ``.3``; the masked heads normalise with eps 1e-5 there, and with the model's own here;
its multimodal encoder attends the pads of a text, which here is FlavaConfig's `pads_visible`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trivium.convert.flava import take, to_hf
from trivium.convert.weights import State
from trivium.errors import TriviumError
from trivium.models.flava import FlavaConfig

_RENAMED = [
    # Order matters: the first that fits at a place wins, then the next rule looks at the result.
    (r"^flava\.image_model\.", "model.image_encoder."),
    (r"^flava\.text_model\.", "model.text_encoder."),
    (r"^flava\.multimodal_model\.", "model.mm_encoder."),
    (r"^flava\.logit_scale$", "loss.contrastive_loss.logit_scale"),
    (r"^flava\.", "model."),
    (r"\.attention\.attention\.(query|key|value)\.", r".attention.\1."),
    (r"\.attention\.output\.dense\.", ".attention.output."),
    (r"\.layernorm_before\.", ".attention_layernorm."),
    (r"\.layernorm_after\.", ".feedforward_layernorm."),
    (r"\.intermediate\.dense\.", ".feedforward.model.0."),
    (r"(\.layer\.\d+)\.output\.dense\.", r"\1.feedforward.model.2."),
    (r"\.embeddings\.LayerNorm\.", ".embeddings.layer_norm."),
    (r"^itm_head\.pooler\.", "loss.itm_loss.pooler."),
    (r"^itm_head\.seq_relationship\.", "loss.itm_loss.cls.seq_relationship."),
    (r"^(mim|mlm)_head\.", r"loss.\1_loss.cls."),
    (r"^mmm_image_head\.", "loss.mmm_loss.mim.cls."),
    (r"^mmm_text_head\.", "loss.mmm_loss.mlm.cls."),
    (r"\.cls\.transform\.dense\.", ".cls.dense."),
    (r"\.cls\.transform\.LayerNorm\.", ".cls.layer_norm."),
]


def torchmultimodal_name(name: str) -> str:
    """A Hugging Face name of FlavaForPreTraining -> the name in torchmultimodal's flava_model_for_pretraining."""
    for pattern, replacement in _RENAMED:
        name = re.sub(pattern, replacement, name)
    return name


def from_torchmultimodal(state: Mapping[str, Tensor], num_heads: int | None = None) -> tuple[FlavaConfig, State]:
    """A state dict of torchmultimodal's FLAVA (with or without its losses) -> ours. Sizes are read from the shapes.

    Args:
        num_heads: attention heads, which no shape tells; None = heads of 64, as in every published size.
    """
    if not any(key.startswith("model.") for key in state):  # FLAVAModel alone
        state = {key if key.startswith(("loss.", "image_codebook.")) else f"model.{key}": state[key] for key in state}
    config = _config_from_shapes(state, num_heads)
    return config, take(state, config, torchmultimodal_name)


def to_torchmultimodal(state: Mapping[str, Tensor], config: FlavaConfig) -> State:
    """Our weights under the names of torchmultimodal's flava_model_for_pretraining."""
    return {torchmultimodal_name(name): tensor for name, tensor in to_hf(state, config).items()}


def config_to_torchmultimodal(config: FlavaConfig) -> dict[str, Any]:
    """The arguments of torchmultimodal's `flava_model_for_pretraining` that make a model of this size."""
    towers = {"image": config.image_layers, "text": config.text_layers, "multimodal": config.multimodal_layers}
    arguments: dict[str, Any] = {}
    for tower, num_layers in towers.items():
        arguments |= {
            f"{tower}_hidden_size": config.width,
            f"{tower}_num_attention_heads": config.num_heads,
            f"{tower}_num_hidden_layers": num_layers,
            f"{tower}_intermediate_size": config.mlp_width,
            f"{tower}_layer_norm_eps": config.eps,
        }
    return arguments | {
        "image_size": config.image_size,
        "patch_size": config.patch_size,
        "vocab_size": config.vocab_size,
        "pad_token_id": config.pad_id,
        "type_vocab_size": config.num_segments,
        "max_position_embeddings": config.max_length,
        "hidden_size": config.width,
        "text_and_image_proj_size": config.projection_width,
        "image_vocab_size": config.num_codes,
        "text_vocab_size": config.vocab_size,
        "use_image_masking": True,
    }


def _config_from_shapes(state: Mapping[str, Tensor], num_heads: int | None) -> FlavaConfig:
    def shape(name: str) -> tuple[int, ...]:
        if name not in state:
            raise TriviumError(f"no tensor {name}: this is no FLAVA state dict in torchmultimodal's layout")
        return tuple(state[name].shape)

    def layers(tower: str) -> int:
        numbers = [re.match(rf"model\.{tower}_encoder\.encoder\.layer\.(\d+)\.", key) for key in state]
        return 1 + max((int(match[1]) for match in numbers if match), default=-1)

    width, _, patch_size, _ = shape("model.image_encoder.embeddings.patch_embeddings.projection.weight")
    grid = math.isqrt(shape("model.image_encoder.embeddings.position_embeddings")[1] - 1)
    if num_heads is None and width % 64:
        raise TriviumError(
            f"the number of attention heads is not in the file and width {width} is no multiple of 64: put a "
            'config.json with {"image_num_attention_heads": n} beside the weights'
        )
    codes = "loss.mim_loss.cls.decoder.weight"
    text = "model.text_encoder.embeddings"
    return FlavaConfig(
        width=width,
        num_heads=num_heads or width // 64,
        mlp_width=shape("model.image_encoder.encoder.layer.0.feedforward.model.0.weight")[0],
        image_layers=layers("image"),
        text_layers=layers("text"),
        multimodal_layers=layers("mm"),
        image_size=grid * patch_size,
        patch_size=patch_size,
        vocab_size=shape(f"{text}.word_embeddings.weight")[0],
        max_length=shape(f"{text}.position_embeddings.weight")[0],
        num_segments=shape(f"{text}.token_type_embeddings.weight")[0],
        num_codes=shape(codes)[0] if codes in state else FlavaConfig.num_codes,
        projection_width=shape("model.image_projection.weight")[0],
    )
