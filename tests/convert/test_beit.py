"""BEiT as a ViT, against transformers' BEiT: exactly where a ViT can hold it, and told what is lost where it cannot."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

from tests.convert import peers
from trivium.convert.beit import EPS, from_beit
from trivium.errors import TriviumError
from trivium.load import load
from trivium.models.vit import ViT


def peer(**changes: Any) -> transformers.BeitForMaskedImageModeling:
    settings = {
        "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48,
        "image_size": 32, "patch_size": 8, "vocab_size": 17, "use_mask_token": True,
        "use_absolute_position_embeddings": True, "layer_scale_init_value": 0.0,
    }  # fmt: skip
    model = peers.shuffled(transformers.BeitForMaskedImageModeling(transformers.BeitConfig(**settings | changes)))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight"):
                parameter.add_(1.0)
    return model.double()


def saved(model: transformers.BeitForMaskedImageModeling, folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """As Hugging Face's files hold it."""
    model.save_pretrained(folder)
    return load_file(folder / "model.safetensors"), model.config.to_dict()


def of_its_authors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names of the authors' code: one matrix for q, k, v, and two biases."""
    renamed = {}
    for name, tensor in state.items():
        name = name.removeprefix("beit.")
        for theirs, authors in {
            "embeddings.patch_embeddings.projection": "patch_embed.proj", "embeddings.position_embeddings": "pos_embed",
            "embeddings.": "", "encoder.layer": "blocks", "attention.attention.query.bias": "attn.q_bias",
            "attention.attention.value.bias": "attn.v_bias", "attention.output.dense": "attn.proj",
            "intermediate.dense": "mlp.fc1", "output.dense": "mlp.fc2", "layernorm_before": "norm1",
            "layernorm_after": "norm2", "lambda_": "gamma_", "encoder.relative_position_bias": "rel_pos_bias",
        }.items():  # fmt: skip
            name = name.replace(theirs, authors)
        renamed[re.sub(r"^layernorm\.", "norm.", name)] = tensor
    blocks = {name.split(".attention.")[0] for name in renamed if ".attention.attention." in name}
    for block in blocks:
        pieces = [renamed.pop(f"{block}.attention.attention.{name}.weight") for name in ("query", "key", "value")]
        renamed[f"{block}.attn.qkv.weight"] = torch.cat(pieces)
    return renamed


@pytest.mark.parametrize("layer_scale", [0.0, 0.1])
def test_absolute_positions_load_exactly_and_layer_scale_is_folded_in(tmp_path: Path, layer_scale: float) -> None:
    model = peer(layer_scale_init_value=layer_scale)
    state, config = saved(model, tmp_path)
    vit_config, weights, said = from_beit(state, config)
    vit = ViT(vit_config).double()
    vit.load_state_dict(weights)
    assert vit_config.eps == model.config.layer_norm_eps
    assert [sentence for sentence in said if "relative" in sentence] == []
    assert any("head (lm_head)" in sentence for sentence in said)

    pixels, hidden = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.rand(2, 16) < 0.4
    output = model.beit(pixels, bool_masked_pos=hidden).last_hidden_state
    expected = model.layernorm(output)
    found = vit.encode_image(pixels, hidden).tokens
    assert float((found - expected).detach().abs().max()) <= 1e-9 * float(expected.detach().abs().max())
    draw = torch.randn_like(expected)
    (found * draw).sum().backward()
    (expected * draw).sum().backward()
    theirs = model.beit.embeddings.position_embeddings.grad
    assert torch.allclose(vit.positions.grad, theirs, rtol=1e-9, atol=1e-9 * float(theirs.abs().max()))


def test_the_layout_of_its_authors_gives_the_same_weights(tmp_path: Path) -> None:
    state, config = saved(peer(layer_scale_init_value=0.1), tmp_path)
    authors = of_its_authors(state)
    assert {
        "blocks.0.attn.qkv.weight",
        "blocks.2.gamma_2",
        "pos_embed",
        "norm.bias",
        "lm_head.weight",
    } <= authors.keys()
    theirs, other = from_beit(state, config)[1], from_beit(authors, {})[1]
    assert theirs.keys() == other.keys()
    assert all(torch.equal(theirs[name], other[name]) for name in theirs)
    assert from_beit(authors, {})[0].eps == EPS


def test_a_relative_position_bias_is_said_to_be_lost(tmp_path: Path) -> None:
    """The released models: one shared table, no positions."""
    model = peer(use_absolute_position_embeddings=False, use_shared_relative_position_bias=True)
    state, config = saved(model, tmp_path)
    state["beit.encoder.relative_position_bias.relative_position_index"] = torch.zeros(17, 17, dtype=torch.int64)
    vit_config, weights, said = from_beit(of_its_authors(state), {})
    assert (vit_config.num_heads, vit_config.image_size) == (4, 32)  # both from the table
    assert not weights["positions"].any()
    assert any("relative position bias" in sentence and "those here are zero" in sentence for sentence in said)
    assert from_beit(state, config)[0].num_heads == 4


def test_what_is_wrong_with_a_beit_is_said(tmp_path: Path) -> None:
    state = of_its_authors(saved(peer(), tmp_path)[0])
    without = {name: tensor for name, tensor in state.items() if name != "blocks.1.mlp.fc2.bias"}
    with pytest.raises(TriviumError, match=r"misses the tensor blocks\.1\.mlp\.fc2\.bias"):
        from_beit(without, {})
    with pytest.raises(TriviumError, match=r"unexpected 1 tensor \(blocks\.0\.attn\.k_bias\)"):
        from_beit({**state, "blocks.0.attn.k_bias": torch.ones(32)}, {})
    tuned = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: t for name, t in state.items()}
    with pytest.raises(TriviumError, match="fine-tuned"):
        from_beit(tuned, {})
    with pytest.raises(TriviumError, match="hidden_act is 'relu'"):
        from_beit(state, {"hidden_act": "relu"})


def test_both_layouts_are_told_by_their_names(tmp_path: Path) -> None:
    state, _ = saved(peer(layer_norm_eps=EPS).float(), tmp_path / "hf")
    (tmp_path / "authors").mkdir()
    torch.save({"model": of_its_authors(state), "epoch": 799}, tmp_path / "authors" / "beit.pth")
    heads = {}
    for path in (tmp_path / "hf", tmp_path / "authors" / "beit.pth"):
        with pytest.warns(UserWarning, match="head \\(lm_head\\)"):
            bundle = load(path)
        assert bundle.family == "vit"
        assert bundle.transform.size == 32
        assert bundle.transform.mean == (0.5, 0.5, 0.5)
        heads[path.name] = bundle.model.config.num_heads
    assert heads == {"hf": 4, "beit.pth": 1}  # 32 / 64: no shape shows the number of heads
