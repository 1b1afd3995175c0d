"""Heat of words over patches: against the public computation with hooks, and for every family that can."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from published_albef import PublishedAlbef, published_from
from torch import Tensor
from torch.nn import functional as F

from tests.flava_batches import TINY as FLAVA_TINY
from tests.flava_batches import random_flava
from trivium.invariance import albef
from trivium.models.encoded import Encoded
from trivium.models.grounding import Compares, Grounds, picture_heat, word_heat

TINY = replace(albef.TINY, fusion_layers=3)
PATCHES = TINY.grid**2


def published_words(peer: PublishedAlbef, pixels: Tensor, ids: Tensor, mask: Tensor, layer: int) -> Tensor:
    """Grounding.py with block_num: a hook on the probabilities of cross-attention, a backward pass through everything,
    both times the mask of tokens, the mean over heads."""
    kept: dict[str, Tensor] = {}
    attention = peer.text_encoder.bert.encoder.layer[layer].crossattention.self

    def keep(module: object, arguments: object, output: tuple[Tensor, ...]) -> None:
        kept["map"] = output[1]
        output[1].register_hook(lambda slope: kept.__setitem__("slope", slope))

    handle = attention.register_forward_hook(keep)
    image = peer.image_states(pixels)
    fused = peer.text_encoder.fuse(peer.text_encoder.read(ids, mask), mask, image)
    handle.remove()
    peer.zero_grad()
    peer.itm_head(fused[:, 0])[:, 1].sum().backward()
    real = mask.to(image.dtype)[:, None, :, None]
    maps, slopes = kept["map"][..., 1:] * real, kept["slope"][..., 1:].clamp(min=0) * real
    return (maps * slopes).mean(1)


def published_picture(peer: PublishedAlbef, pixels: Tensor, ids: Tensor, mask: Tensor, block: int) -> Tensor:
    """The same of the picture's tower (itc), by finite work: attention written out from the layer's own projections."""
    layer = peer.visual_encoder.layers[block] if hasattr(peer.visual_encoder, "layers") else None
    layer = layer or peer.visual_encoder.encoder.layer[block]
    kept: dict[str, Tensor] = {}
    original = F.scaled_dot_product_attention

    def plain(query: Tensor, key: Tensor, value: Tensor, **more: object) -> Tensor:
        if counted["calls"] == block:
            kept["map"] = (query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1)
            kept["map"].retain_grad()
            counted["calls"] += 1
            return kept["map"] @ value
        counted["calls"] += 1
        return original(query, key, value)

    counted = {"calls": 0}
    torch.nn.functional.scaled_dot_product_attention = plain  # type: ignore[assignment]
    try:
        image = peer.image_states(pixels)
    finally:
        torch.nn.functional.scaled_dot_product_attention = original
    image_feat = F.normalize(peer.vision_proj(image[:, 0]), dim=-1)
    text_feat = F.normalize(peer.text_proj(peer.text_encoder.read(ids, mask)[:, 0]), dim=-1)
    (image_feat * text_feat).sum().backward()
    slope = kept["map"].grad
    assert slope is not None
    return (kept["map"] * slope.clamp(min=0)).mean(1)[:, 0, 1:].detach()


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    batch = albef.make_batch(4)
    return (batch.images[0].pixels_BCHW.double() / 64 - 2, batch.texts[0].ids_BT, batch.texts[0].mask_BT)


@pytest.mark.parametrize("block", [0, 1, 2])
def test_words_look_where_the_public_code_says(block: int) -> None:
    model = albef.random_albef(TINY)
    pixels, ids, mask = inputs()
    assert not bool(mask.all()), "some text is padded"
    mine = word_heat(model, model.encode_image(pixels), model.encode_text(ids, mask), block)
    peer = published_from(albef.albef_method(model)).eval()
    theirs = published_words(peer, pixels, ids, mask, TINY.text_layers + block).detach()
    assert mine.shape == (4, ids.shape[1], PATCHES) and float(theirs.abs().max()) > 0
    assert float((mine - theirs).abs().max()) <= 1e-9 * float(theirs.abs().max())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("block", [0, 1, None])
def test_the_pictures_tower_looks_where_the_public_code_says(block: int | None) -> None:
    model = albef.random_albef(TINY)
    pixels, ids, mask = inputs()
    mine = picture_heat(model, pixels, model.encode_text(ids, mask).projected, block)
    peer = published_from(albef.albef_method(model)).eval()
    theirs = published_picture(peer, pixels, ids, mask, TINY.image_layers - 1 if block is None else block)
    assert float((mine - theirs).abs().max()) <= 1e-9 * float(theirs.abs().max())


def test_by_default_it_is_the_third_block_as_published() -> None:
    model = albef.random_albef(TINY)
    assert model.gaze(PATCHES).attention is model.fusion.blocks[2].cross_attention
    two = albef.random_albef(replace(TINY, fusion_layers=2))
    assert two.gaze(PATCHES).attention is two.fusion.blocks[1].cross_attention
    with pytest.raises(IndexError):
        model.gaze(PATCHES, 3)


def test_rows_of_a_batch_do_not_see_each_other_and_a_pad_is_cold() -> None:
    model = albef.random_albef(TINY)
    pixels, ids, mask = inputs()
    whole = word_heat(model, model.encode_image(pixels), model.encode_text(ids, mask))
    for row in range(4):
        length = int(mask[row].sum())
        alone = word_heat(
            model, model.encode_image(pixels[row : row + 1]), model.encode_text(ids[row : row + 1, :length])
        )
        assert torch.allclose(whole[row, :length], alone[0], rtol=1e-9, atol=1e-15)
        assert float(whole[row, length:].abs().sum()) == 0


def test_flava_grounds_through_its_multimodal_encoder() -> None:
    """The slope of a patch's weight is what the score gains by it: moving attention there raises the score."""
    model = random_flava(FLAVA_TINY).double().eval()
    assert isinstance(model, Grounds) and not isinstance(model, Compares)
    config = model.config
    pixels = torch.randn(2, 3, config.image_size, config.image_size, dtype=torch.float64)
    ids = torch.randint(5, config.vocab_size, (2, 6))
    image, text = model.encode_image(pixels), model.encode_text(ids)
    heat = word_heat(model, image, text)
    assert heat.shape == (2, 6, config.grid**2)
    gaze = model.gaze(config.grid**2)
    with gaze.attention.watched() as seen, torch.no_grad():
        before = model.match(model.fuse(image, text))[:, 1]
    assert torch.allclose(before, model.match(model.fuse(image, text))[:, 1])
    patch, token = 2, 3
    step = 1e-5
    moved = [_score_with(model, image, text, seen[0], token, patch, amount) for amount in (step, -step)]
    slope = (moved[0] - moved[1]) / (2 * step)
    P = config.grid**2
    weights = seen[0][:, 0, gaze.text, gaze.patches][:, token, patch]
    gain = torch.relu(slope) * weights
    rest = _heat_of_other_heads(model, image, text, token, patch)
    assert torch.allclose(heat[:, token, patch], (gain + rest) / config.num_heads, rtol=1e-4, atol=1e-12)
    assert P == heat.shape[2]


def _score_with(
    model: object, image: Encoded, text: Encoded, weights: Tensor, token: int, patch: int, amount: float
) -> Tensor:
    """The score where the first head of the block gives one patch more of one token's attention."""
    changed = weights.clone()
    P = image.states.shape[1] - 1
    changed[:, 0, 2 + P + token, 2 + patch] += amount
    return _score_under(model, image, text, changed)


def _score_under(model: object, image: Encoded, text: Encoded, weights: Tensor) -> Tensor:
    from trivium.layers import attention

    original, gaze = attention.attention_weights, model.gaze(image.states.shape[1] - 1)  # type: ignore[attr-defined]
    attention.attention_weights = lambda *_: weights  # type: ignore[assignment]
    try:
        with gaze.attention.watched(), torch.no_grad():
            return model.match(model.fuse(image, text))[:, 1]  # type: ignore[attr-defined]
    finally:
        attention.attention_weights = original


def _heat_of_other_heads(model: object, image: Encoded, text: Encoded, token: int, patch: int) -> Tensor:
    P = image.states.shape[1] - 1
    gaze = model.gaze(P)  # type: ignore[attr-defined]
    with gaze.attention.watched() as seen, torch.no_grad():
        model.fuse(image, text)  # type: ignore[attr-defined]
    step, total = 1e-5, torch.zeros(len(image.states), dtype=torch.float64)
    for head in range(1, seen[0].shape[1]):
        scores = []
        for amount in (step, -step):
            changed = seen[0].clone()
            changed[:, head, 2 + P + token, 2 + patch] += amount
            scores.append(_score_under(model, image, text, changed))
        total += torch.relu((scores[0] - scores[1]) / (2 * step)) * seen[0][:, head, 2 + P + token, 2 + patch]
    return total
