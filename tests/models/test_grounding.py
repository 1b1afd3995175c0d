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
from trivium.layers import attention
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


def published_picture(
    peer: PublishedAlbef, pixels: Tensor, ids: Tensor, mask: Tensor, block: int, patched: pytest.MonkeyPatch
) -> Tensor:
    """The same of the picture's tower (itc); its attention written out, since in float64 it is the fused one there."""
    kept: list[Tensor] = []

    def plain(query: Tensor, key: Tensor, value: Tensor, **_: object) -> Tensor:
        kept.append((query @ key.transpose(-2, -1) / query.shape[-1] ** 0.5).softmax(-1))
        kept[-1].retain_grad()
        return kept[-1] @ value

    with patched.context() as context:
        context.setattr(F, "scaled_dot_product_attention", plain)
        image = peer.image_states(pixels)
    image_feat = F.normalize(peer.vision_proj(image[:, 0]), dim=-1)
    text_feat = F.normalize(peer.text_proj(peer.text_encoder.read(ids, mask)[:, 0]), dim=-1)
    (image_feat * text_feat).sum().backward()
    slope = kept[block].grad
    assert slope is not None
    return (kept[block] * slope.clamp(min=0)).mean(1)[:, 0, 1:].detach()


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
def test_the_pictures_tower_looks_where_the_public_code_says(
    block: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = albef.random_albef(TINY)
    pixels, ids, mask = inputs()
    mine = picture_heat(model, pixels, model.encode_text(ids, mask).projected, block)
    peer = published_from(albef.albef_method(model)).eval()
    number = TINY.image_layers - 1 if block is None else block
    theirs = published_picture(peer, pixels, ids, mask, number, monkeypatch)
    assert float((mine - theirs).abs().max()) <= 1e-9 * float(theirs.abs().max())


def test_by_default_it_is_the_middle_block_of_six_the_third_as_published() -> None:
    for layers, middle in ((6, 2), (3, 1), (2, 0), (1, 0)):
        six = albef.random_albef(replace(TINY, fusion_layers=layers))
        assert six.gaze(PATCHES).attention is six.fusion.blocks[middle].cross_attention
    model = albef.random_albef(TINY)
    with pytest.raises(IndexError):
        model.gaze(PATCHES, 3)


def test_in_the_last_block_the_first_token_alone_is_warm() -> None:
    model = albef.random_albef(TINY)
    pixels, ids, mask = inputs()
    image, text = model.encode_image(pixels), model.encode_text(ids, mask)
    last, middle = word_heat(model, image, text, 2), word_heat(model, image, text)
    assert float(last[:, 0].max()) > 0 and float(last[:, 1:].max()) == 0
    assert float(middle[:, 1:].max()) > 0


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


def test_flava_grounds_through_its_multimodal_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slope is what the score gains where one head moves a little more of a token's attention to a patch."""
    torch.manual_seed(0)
    model = random_flava(FLAVA_TINY).double().eval()
    assert isinstance(model, Grounds) and not isinstance(model, Compares)
    P, token, patch, step = model.config.grid**2, 3, 2, 1e-5
    pixels = torch.randn(2, 3, model.config.image_size, model.config.image_size, dtype=torch.float64)
    image, text = model.encode_image(pixels), model.encode_text(torch.randint(5, model.config.vocab_size, (2, 6)))
    heat_BTP = word_heat(model, image, text)
    assert heat_BTP.shape == (2, 6, P)
    gaze = model.gaze(P)

    def score(weights: Tensor | None) -> Tensor:
        with monkeypatch.context() as patched, gaze.attention.watched() as seen, torch.no_grad():
            if weights is not None:
                patched.setattr(attention, "attention_weights", lambda *_: weights)
            found = model.match(model.fuse(image, text))[:, 1]
        kept.append(seen[0])
        return found

    kept: list[Tensor] = []
    assert torch.allclose(score(None), model.match(model.fuse(image, text))[:, 1])
    [weights_BHLL] = kept
    expected = torch.zeros(2, dtype=torch.float64)
    for head in range(model.config.num_heads):
        place = (slice(None), head, 2 + P + token, 2 + patch)
        more, less = weights_BHLL.clone(), weights_BHLL.clone()
        more[place] += step
        less[place] -= step
        slope_B = (score(more) - score(less)) / (2 * step)
        expected += slope_B.relu() * weights_BHLL[place] / model.config.num_heads
    assert float(expected.max()) > 0
    assert torch.allclose(heat_BTP[:, token, patch], expected, rtol=1e-5, atol=1e-14)
