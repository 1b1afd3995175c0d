from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.convert import peers
from trivium.convert import flava, torchmultimodal
from trivium.errors import TriviumError
from trivium.models.flava import Flava, FlavaConfig


def parts(model: transformers.PreTrainedModel) -> tuple[dict[str, torch.Tensor], dict]:
    return dict(model.state_dict()), json.loads(model.config.to_json_string(use_diff=False))


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.integers(1, 4),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 2)),
    patch_size=st.integers(2, 6),
    grid=st.integers(1, 4),
    vocab_size=st.integers(8, 40),
    num_codes=st.integers(4, 40),
    projection_dim=st.integers(3, 20),
)
def test_hugging_face_weights_come_back_bit_equal_at_any_size(
    heads: int,
    layers: tuple[int, int, int],
    patch_size: int,
    grid: int,
    vocab_size: int,
    num_codes: int,
    projection_dim: int,
) -> None:
    peer = peers.pretraining(
        width=8 * heads, heads=heads, layers=layers, patch_size=patch_size, image_size=grid * patch_size,
        vocab_size=vocab_size, num_codes=num_codes, projection_dim=projection_dim, codebook=False,
    )  # fmt: skip
    theirs, written = parts(peer)
    config, ours = flava.from_hf(theirs, written)
    model = Flava(config)
    model.load_state_dict(ours)  # strict: every tensor of ours is there
    back = flava.to_hf(model.state_dict(), config)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)
    # And by way of torchmultimodal's names, where sizes are read from shapes.
    other, again = torchmultimodal.from_torchmultimodal(torchmultimodal.to_torchmultimodal(ours, config), heads)
    assert other == config
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], ours[name]) for name in ours)


def test_config_survives_the_way_out_and_back() -> None:
    config = FlavaConfig.of_size("tiny", dropout=0.1, eps=1e-6, pad_id=3)
    assert flava.config_from_hf(flava.config_to_hf(config, None)) == config
    assert flava.config_from_hf({}) == FlavaConfig()  # the library's defaults are the published model


def test_what_the_model_computes_is_what_the_peer_computes() -> None:
    """A permuted q, k, v or a transposed patch would survive any round trip, but not this."""
    peer = peers.pretraining(codebook=False)
    config, ours = flava.from_hf(*parts(peer))
    model, drawn = flava.build(config, ours)
    assert drawn == []
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.randint(5, len(peers.WORDS), (2, 7))
    with torch.no_grad():
        theirs = peer.flava(input_ids=ids, pixel_values=pixels, output_hidden_states=True)
        image, text = model.encode_image(pixels), model.encode_text(ids)
        fused = model.fuse(image, text)
    assert torch.allclose(image.tokens, theirs.image_embeddings, atol=1e-5)
    assert torch.allclose(text.tokens, theirs.text_embeddings, atol=1e-5)
    assert torch.allclose(fused.tokens, theirs.multimodal_embeddings, atol=1e-5)


def test_known_torchmultimodal_names() -> None:
    """The names of its released checkpoint, written out."""
    names = {
        "flava.image_model.encoder.layer.3.attention.attention.key.bias":
            "model.image_encoder.encoder.layer.3.attention.key.bias",
        "flava.text_model.encoder.layer.0.attention.output.dense.weight":
            "model.text_encoder.encoder.layer.0.attention.output.weight",
        "flava.multimodal_model.encoder.layer.5.output.dense.weight":
            "model.mm_encoder.encoder.layer.5.feedforward.model.2.weight",
        "flava.multimodal_model.encoder.layer.5.intermediate.dense.bias":
            "model.mm_encoder.encoder.layer.5.feedforward.model.0.bias",
        "flava.multimodal_model.cls_token": "model.mm_encoder.cls_token",
        "flava.image_model.encoder.layer.0.layernorm_before.weight":
            "model.image_encoder.encoder.layer.0.attention_layernorm.weight",
        "flava.image_model.layernorm.weight": "model.image_encoder.layernorm.weight",
        "flava.text_model.embeddings.LayerNorm.bias": "model.text_encoder.embeddings.layer_norm.bias",
        "flava.text_model.pooler.dense.bias": "model.text_encoder.pooler.dense.bias",
        "flava.image_to_mm_projection.weight": "model.image_to_mm_projection.weight",
        "flava.logit_scale": "loss.contrastive_loss.logit_scale",
        "mmm_text_head.transform.LayerNorm.weight": "loss.mmm_loss.mlm.cls.layer_norm.weight",
        "mmm_image_head.bias": "loss.mmm_loss.mim.cls.bias",
        "mim_head.transform.dense.weight": "loss.mim_loss.cls.dense.weight",
        "mlm_head.decoder.bias": "loss.mlm_loss.cls.decoder.bias",
        "itm_head.pooler.dense.weight": "loss.itm_loss.pooler.dense.weight",
        "itm_head.seq_relationship.bias": "loss.itm_loss.cls.seq_relationship.bias",
    }  # fmt: skip
    assert {name: torchmultimodal.torchmultimodal_name(name) for name in names} == names


def test_a_bare_model_gets_heads_from_the_seed_and_says_which() -> None:
    bare = peers.shuffled(transformers.FlavaModel(peers.config()))
    config, ours = flava.from_hf(*parts(bare))
    model, drawn = flava.build(config, ours)
    assert drawn == ["mim_head", "mlm_head", "mmm_image_head", "mmm_text_head", "itm_head"]
    again, _ = flava.build(config, ours)
    other, _ = flava.build(config, ours, seed=1)
    assert torch.equal(model.mlm_head.decoder.weight, again.mlm_head.decoder.weight)
    assert not torch.equal(model.mlm_head.decoder.weight, other.mlm_head.decoder.weight)
    assert not torch.equal(model.mlm_head.decoder.weight, model.mmm_text_head.decoder.weight)
    assert torch.equal(model.text.embeddings.word.weight, bare.text_model.embeddings.word_embeddings.weight)


def test_extra_counting_buffers_are_ignored_and_either_name_of_a_tied_bias_will_do() -> None:
    theirs, written = parts(peers.pretraining(codebook=False))
    _, expected = flava.from_hf(theirs, written)
    theirs["flava.text_model.embeddings.position_ids"] = torch.arange(24)[None]
    del theirs["mlm_head.bias"], theirs["mim_head.decoder.bias"]
    _, ours = flava.from_hf(theirs, written)
    assert ours.keys() == expected.keys()
    assert all(torch.equal(ours[name], expected[name]) for name in expected)
    theirs["mlm_head.bias"] = torch.ones(len(peers.WORDS))
    with pytest.raises(TriviumError, match=r"mlm_head\.decoder\.bias and mlm_head\.bias are one tensor"):
        flava.from_hf(theirs, written)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "clip"}, 'model_type "clip"'),
        ({"text_config": {"hidden_size": 64}}, "hidden_size must be one for all three encoders.*text 64"),
        ({"image_config": {"hidden_act": "relu"}}, "image_config.hidden_act is 'relu'"),
        ({"multimodal_config": {"use_cls_token": False}}, "use_cls_token is False"),
        ({"image_config": {"image_size": [32, 64]}}, "only squares"),
        ({"text_config": {"vocab_size": 99}}, "word_embeddings.weight has shape .14, 32. where its config .* .99, 32."),
        ({"image_config": {"num_hidden_layers": 3}}, "misses 16 tensors .* and 11 more"),
        ({"image_config": {"num_hidden_layers": 1}}, "unexpected 16 tensors"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(change: dict, says: str) -> None:
    theirs, written = parts(peers.pretraining(codebook=False))
    for name, value in change.items():
        written[name] = {**written[name], **value} if isinstance(value, dict) else value
    with pytest.raises(TriviumError, match=says):
        flava.from_hf(theirs, written)


def test_half_a_head_is_an_error_although_a_whole_one_may_be_absent() -> None:
    theirs, written = parts(peers.pretraining(codebook=False))
    del theirs["itm_head.pooler.dense.weight"]
    with pytest.raises(TriviumError, match=r"misses 1 tensor \(itm_head.pooler.dense.weight\)"):
        flava.from_hf(theirs, written)


def test_bert_gives_embeddings_and_the_head_of_masked_words() -> None:
    bert = peers.shuffled(
        transformers.BertForMaskedLM(
            transformers.BertConfig(
                vocab_size=40,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=30,
            )
        )
    )
    config = FlavaConfig.of_size("tiny", width=16, num_heads=2, vocab_size=40, max_length=20)
    theirs = dict(bert.state_dict())
    taken, left_out = flava.text_from_bert(theirs, config)
    model = Flava(config)
    assert not model.load_state_dict(taken, strict=False).unexpected_keys
    ids = torch.randint(5, 40, (2, 9))
    with torch.no_grad():
        assert torch.allclose(model.eval().text.embeddings(ids), bert.bert.embeddings(ids), atol=1e-6)
        rows = torch.randn(3, 16)
        assert torch.allclose(model.mmm_text_head(rows), bert.cls(rows), atol=1e-6)
    assert all("encoder.layer" in name or "pooler" in name for name in left_out)
    assert len(left_out) == 32
    with pytest.raises(TriviumError, match="40 words of width 16, the model 40 of width 32"):
        flava.text_from_bert(theirs, replace(config, width=32))


def test_torchmultimodal_without_losses_and_without_a_number_of_heads(tmp_path: Path) -> None:
    config = FlavaConfig.of_size("tiny", width=64, num_heads=1, mlp_width=96, num_codes=8192)
    model, _ = flava.build(config, {})
    theirs = torchmultimodal.to_torchmultimodal(model.state_dict(), config)
    bare = {name.removeprefix("model."): theirs[name] for name in theirs if name.startswith("model.")}
    read, ours = torchmultimodal.from_torchmultimodal(bare)
    assert read == config
    _, drawn = flava.build(read, ours)
    assert drawn == ["mim_head", "mlm_head", "mmm_image_head", "mmm_text_head", "itm_head", "logit_scale"]
    odd = dict(theirs.items())
    name = "model.image_encoder.embeddings.patch_embeddings.projection.weight"
    odd[name] = odd[name][:60]
    with pytest.raises(TriviumError, match="width 60 is no multiple of 64"):
        torchmultimodal.from_torchmultimodal(odd)
