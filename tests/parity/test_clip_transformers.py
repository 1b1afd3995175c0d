"""CLIP against transformers.CLIPModel: loss, logits, states, gradients of every parameter.

Tiny in float64: within 1e-9 of the largest value of each tensor. Base (ViT-B/16) in float32, one step of two rows:
states within 1e-5 x max(1, largest value), loss 1e-5 relative, gradients ||a - b|| <= 1e-4 ||b||. Key biases, whose
true gradient is zero, stay below 1e-9 and 1e-6 of the norm of their key weight's gradient.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig as TheirConfig
from transformers import CLIPModel

from trivium.convert.clip import config_from_hf, config_to_hf, from_hf, to_hf
from trivium.invariance.clip import TINY, clip_method, make_batch, random_clip
from trivium.models.clip import Clip, ClipConfig
from trivium.train.protocol import Key
from trivium.train.step import backward

CASES = {
    "the end token is named": TINY,
    "the end token is the largest id": replace(TINY, end_id=None),
    "exact GELU": replace(TINY, activation="gelu"),
    "wide: activations are computed again": replace(TINY, text_width=512, text_heads=8, text_layers=1),
}


def both_models(config: ClipConfig, dtype: torch.dtype) -> tuple[Clip, CLIPModel]:
    """Weights are drawn in ours and handed over, then read back: the converter runs in both directions."""
    ours = random_clip(config, dtype=dtype)
    # "eager" takes the softmax in float32, whatever the precision of the model.
    theirs = CLIPModel(TheirConfig(**config_to_hf(config), attn_implementation="sdpa")).to(dtype)
    theirs.load_state_dict(to_hf(ours.state_dict(), config), strict=True)
    read_config, read = from_hf(theirs.state_dict(), theirs.config.to_dict())
    assert read_config == config == config_from_hf(theirs.config.to_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, read[name]), name
    return ours, theirs.train()


def run_both(config: ClipConfig, dtype: torch.dtype, rows: int) -> dict[str, tuple[dict, dict]]:
    """Losses, states, gradients: (ours, theirs) each, under the same names."""
    ours, theirs = both_models(config, dtype)
    batch = make_batch(rows, config)
    method, images, texts = clip_method(ours), batch.images[0], batch.texts[0]
    sums, counts, _ = backward(method, [batch], Key(0, "pairs", 0))
    pixels_BCHW = method.pixels(images.pixels_BCHW)
    output = theirs(texts.ids_BT, pixels_BCHW, texts.mask_BT.long(), return_loss=True)
    output.loss.backward()

    real_BT1 = texts.mask_BT[:, :, None]  # a pad sees other things there, and nobody sees it
    with torch.no_grad():
        image, text = ours.encode_image(pixels_BCHW), ours.encode_text(texts.ids_BT, texts.mask_BT)
        mine = {"image": image.states, "image pooled": image.pooled, "image projected": image.projected,
                "text": text.tokens * real_BT1, "text pooled": text.pooled, "text projected": text.projected,
                "logits": ours.logit_scale.exp() * image.projected @ text.projected.T}  # fmt: skip
    pictures, words = output.vision_model_output, output.text_model_output
    yours = {"image": pictures.last_hidden_state, "image projected": output.image_embeds,
             "text": words.last_hidden_state * real_BT1, "text projected": output.text_embeds,
             "logits": output.logits_per_image}  # fmt: skip
    with torch.no_grad():  # their pooler_output is the projected one
        yours["image pooled"] = theirs.vision_model(pixels_BCHW).pooler_output
        yours["text pooled"] = theirs.text_model(texts.ids_BT, texts.mask_BT.long()).pooler_output
    my_grads = to_hf({name: p.grad for name, p in ours.named_parameters() if p.grad is not None}, config)
    their_grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    return {
        "losses": ({"loss": sums["contrastive"] / counts["contrastive"]}, {"loss": output.loss.detach()}),
        "states": (mine, {name: tensor.detach() for name, tensor in yours.items()}),
        "gradients": (my_grads, their_grads),
    }


def key_biases(grads: dict[str, Tensor]) -> dict[str, float]:
    """The size of each key bias's gradient, in units of the norm of its weight's gradient."""
    names = [name for name in grads if name.endswith("k_proj.bias")]
    return {name: float(grads[name].norm() / grads[name[:-4] + "weight"].norm()) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_tiny_agrees_in_float64(name: str) -> None:
    found = run_both(CASES[name], torch.float64, rows=5)
    for mine, yours in found.values():
        assert set(mine) == set(yours), set(mine) ^ set(yours)
        for tensor, expected in yours.items():
            if not tensor.endswith("k_proj.bias"):
                error = float((mine[tensor] - expected).abs().max())
                assert error <= 1e-9 * float(expected.abs().max()), f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(found["gradients"][0]) | key_biases(found["gradients"][1])).items():
        assert size <= 1e-9, f"{tensor}: {size:.3g}"


def test_base_agrees_in_float32() -> None:
    found = run_both(ClipConfig(), torch.float32, rows=2)
    assert float(found["losses"][0]["loss"]) == pytest.approx(float(found["losses"][1]["loss"]), rel=1e-5)
    mine, yours = found["states"]
    for state, expected in yours.items():
        error = float((mine[state] - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"{state}: differs by {error:.3g}"
    mine, yours = found["gradients"]
    assert set(mine) == set(yours), set(mine) ^ set(yours)
    for tensor, expected in yours.items():
        if not tensor.endswith("k_proj.bias"):
            error = float((mine[tensor] - expected).norm() / expected.norm())
            assert error <= 1e-4, f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(mine) | key_biases(yours)).items():
        assert size <= 1e-6, f"{tensor}: {size:.3g}"


@pytest.mark.parametrize("size", [(48, 48), (24, 64)])
def test_positions_are_interpolated_for_another_picture_size(size: tuple[int, int]) -> None:
    ours, theirs = both_models(TINY, torch.float64)
    pixels_BCHW = torch.randn(2, 3, *size, dtype=torch.float64)
    there = theirs.vision_model(pixels_BCHW, interpolate_pos_encoding=True)
    assert torch.allclose(ours.encode_image(pixels_BCHW).pooled, there.pooler_output, rtol=0, atol=1e-9)


@pytest.mark.parametrize("end_id", [60, None])
@pytest.mark.parametrize("pad", [0, 60], ids=["padded with 0", "padded with the end token"])
def test_both_rules_of_pooling_take_the_first_end_token(end_id: int | None, pad: int) -> None:
    """OpenAI pads with 0 and Hugging Face with the end token: neither may matter."""
    ours, theirs = both_models(replace(TINY, end_id=end_id), torch.float64)
    texts = make_batch(6).texts[0]
    ids_BT = texts.ids_BT.where(texts.mask_BT, pad)
    pooled = ours.encode_text(ids_BT, texts.mask_BT).pooled
    assert torch.allclose(pooled, theirs.text_model(ids_BT).pooler_output, rtol=0, atol=1e-9)
    assert torch.equal(ours.ends(ids_BT), texts.mask_BT.sum(1) - 1)


def test_the_two_rules_differ_where_a_larger_id_stands_in_a_text() -> None:
    """As after tokens were added to the vocabulary, which is why Hugging Face has two."""
    texts = make_batch(4).texts[0]
    ids_BT = texts.ids_BT.clone()
    ids_BT[ids_BT == 60] = 30
    ids_BT[:, 1] = 60
    named, largest = replace(TINY, end_id=30), replace(TINY, end_id=None)
    for config in (named, largest):
        ours, theirs = both_models(config, torch.float64)
        mine, yours = ours.encode_text(ids_BT).pooled, theirs.text_model(ids_BT).pooler_output
        assert torch.allclose(mine, yours, rtol=0, atol=1e-9)
    assert random_clip(largest).ends(ids_BT).tolist() == [1] * 4
