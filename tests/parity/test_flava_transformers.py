"""FLAVA against transformers.FlavaForPreTraining: losses, states, gradients of every parameter.

Tiny in float64: within 1e-9 of the largest value of each tensor. Base in float32, one step of two rows: states within
1e-5 x max(1, largest value), losses 1e-5 relative, gradients ||a - b|| <= 1e-4 ||b||. Key biases, whose true gradient
is zero, stay below 1e-9 and 1e-6 of the norm of their key weight's gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import FlavaConfig as TheirConfig
from transformers import FlavaForPreTraining, FlavaImageCodebook, FlavaImageCodebookConfig

from tests.flava_batches import TINY, flava_method, make_batch, random_flava
from trivium.convert.dalle import to_hf as codebook_to_hf
from trivium.convert.flava import config_from_hf, config_to_hf, from_hf, to_hf
from trivium.models.dvae import DVae, DVaeConfig
from trivium.models.flava import Flava, FlavaConfig
from trivium.train.protocol import Batch, Images, Key
from trivium.train.step import backward

BASE = FlavaConfig()


@dataclass
class Case:
    stream: str
    false_rows: tuple[int, ...] = ()
    padded: bool = True
    itm_labels: bool = True  # False: the peer is given none and has no ITM loss; ours has weight 0


CASES = {
    "images": Case("images"),
    "text": Case("text"),
    "text, not padded": Case("text", padded=False),
    "pairs, all true": Case("pairs"),
    "pairs, mixed": Case("pairs", false_rows=(1, 3)),
    "pairs, one true": Case("pairs", false_rows=(0, 1, 3)),
    "pairs, all false": Case("pairs", false_rows=(0, 1, 2, 3)),
    "pairs, no ITM labels": Case("pairs", itm_labels=False),
    "pairs, not padded, mixed": Case("pairs", false_rows=(2,), padded=False),
}


def both_models(config: FlavaConfig, dtype: torch.dtype) -> tuple[Flava, FlavaForPreTraining]:
    """Weights are drawn in ours and handed over, then read back: the converter runs in both directions."""
    ours = random_flava(config, dtype=dtype)
    their_config = TheirConfig(**config_to_hf(config, None), attn_implementation="eager")
    with torch.device("meta"):
        theirs = FlavaForPreTraining(their_config)
    state = {name: tensor.clone() for name, tensor in to_hf(ours.state_dict(), config).items()}
    for module in theirs.modules():  # counting buffers are not part of a state
        for name, buffer in module._buffers.items():
            if buffer is not None:
                length = buffer.shape[-1]
                counted = (
                    torch.arange(length)[None] if name == "position_ids" else torch.zeros(1, length, dtype=torch.int64)
                )
                module._buffers[name] = counted
    theirs.load_state_dict(state, strict=True, assign=True)
    for parameter in theirs.parameters():
        parameter.requires_grad_(True)
    read_config, read = from_hf(theirs.state_dict(), theirs.config.to_dict())
    assert read_config == config == config_from_hf(theirs.config.to_dict())
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, read[name]), name
    return ours, theirs.train()


def their_arguments(batch: Batch, case: Case) -> dict[str, Tensor]:
    arguments: dict[str, Any] = {}
    targets = batch.targets
    if batch.images:
        mean, std = 0.5, 0.25
        arguments["pixel_values"] = (batch.images[0].pixels_BCHW.double() / 255 - mean) / std
        arguments["bool_masked_pos"] = targets["image_mask"]
        arguments["mim_labels"] = targets["codes"].clone()  # the peer writes into it
    if batch.texts:
        text = batch.texts[0]
        arguments["input_ids"] = text.ids_BT
        arguments["input_ids_masked"] = targets["masked_ids"]
        arguments["attention_mask"] = text.mask_BT.long() if case.padded else None
        arguments["mlm_labels"] = text.ids_BT.masked_fill(~targets["selected"], -100)
    if batch.stream == "pairs" and case.itm_labels:
        arguments["itm_labels"] = targets["matched"].long()
    return arguments


def run_both(config: FlavaConfig, dtype: torch.dtype, case: Case, rows: int) -> dict[str, tuple[dict, dict]]:
    """Losses, states, gradients: (ours, theirs) each, under the same names."""
    ours, theirs = both_models(config, dtype)
    batch = make_batch(case.stream, rows, config, false_rows=case.false_rows, padded=case.padded)
    method = flava_method(ours, weights={} if case.itm_labels else {"itm": 0.0})
    sums, counts, _ = backward(method, [batch], Key(0, case.stream, 0))
    losses = {name: value / counts[name] for name, value in sums.items()}

    arguments = their_arguments(batch, case)
    if batch.images:
        arguments["pixel_values"] = arguments["pixel_values"].to(dtype)
    output = theirs(**arguments)
    output.loss.backward()
    their_losses = {name: value.detach().double() for name, value in output.loss_info.items()}
    if "global_contrastive" in their_losses:
        their_losses["contrastive"] = their_losses.pop("global_contrastive")

    mine, yours = states(method, batch, case, output)
    their_grads = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False) if p.grad is not None}
    my_grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}

    def filled(value: float) -> dict[str, Tensor]:  # one number seen as each tensor that has no gradient
        return {n: p.new_tensor(value).expand_as(p) for n, p in ours.named_parameters() if n not in my_grads}

    marked = to_hf({name: grad.new_zeros(()).expand_as(grad) for name, grad in my_grads.items()} | filled(1.0), config)
    absent_there = {name for name, mark in marked.items() if mark.flatten()[0] == 1}
    zeros = filled(0.0)
    in_their_names = {n: g for n, g in to_hf(zeros | my_grads, config).items() if n not in absent_there}
    for name in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head"):  # the tied bias has one gradient
        their_grads.pop(f"{name}.bias", None)
        in_their_names.pop(f"{name}.bias", None)
    return {"losses": (losses, their_losses), "states": (mine, yours), "gradients": (in_their_names, their_grads)}


@torch.no_grad()
def states(method: Any, batch: Batch, case: Case, output: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """States before and after the final norms, plain and masked, and what the contrastive loss reads."""
    mine, yours = {}, {}
    model, targets = method.model, batch.targets
    for marker, theirs in (("", ""), ("masked ", "masked_")):
        if batch.images:
            mask_BN = targets["image_mask"] if marker else None
            image = model.encode_image(method.pixels(batch.images[0].pixels_BCHW), mask_BN)
            mine[f"{marker}image"], mine[f"{marker}image tokens"] = image.states, image.tokens
            yours[f"{marker}image"] = output[f"image_{theirs}output"].hidden_states[-1]
            yours[f"{marker}image tokens"] = output[f"image_{theirs}embeddings"]
        if batch.texts:
            ids_BT = targets["masked_ids"] if marker else batch.texts[0].ids_BT
            text = model.encode_text(ids_BT, batch.texts[0].mask_BT)
            mine[f"{marker}text"], mine[f"{marker}text tokens"] = text.states, text.tokens
            yours[f"{marker}text"] = output[f"text_{theirs}output"].hidden_states[-1]
            yours[f"{marker}text tokens"] = output[f"text_{theirs}embeddings"]
        if batch.stream == "pairs" and not marker:
            scale = model.logit_scale.exp()
            mine["logits"] = scale * image.projected @ text.projected.T
            yours["logits"] = output.contrastive_logits_per_image
            kept_B = targets["matched"] | ~targets["matched"].any()
            mine["logits"] = mine["logits"][kept_B if case.itm_labels else slice(None)]
        if batch.stream == "pairs" and marker:
            fused = model.fuse(image, text)
            mine["fused"], yours["fused"] = fused.tokens, output.multimodal_masked_output.last_hidden_state
            mine["match"], yours["match"] = model.match(fused), output.itm_logits
    return mine, {name: tensor.detach() for name, tensor in yours.items()}


def key_biases(grads: dict[str, Tensor]) -> dict[str, float]:
    """The size of each key bias's gradient, in units of the norm of its weight's gradient."""
    names = [name for name in grads if name.endswith("attention.key.bias")]
    return {name: float(grads[name].norm() / grads[name[:-4] + "weight"].norm()) for name in names}


@pytest.mark.parametrize("name", CASES)
def test_tiny_agrees_in_float64(name: str) -> None:
    found = run_both(TINY, torch.float64, CASES[name], rows=4)
    for mine, yours in found.values():
        assert set(mine) == set(yours), set(mine) ^ set(yours)
        assert mine
        for tensor, expected in yours.items():
            if not tensor.endswith("attention.key.bias"):
                error = float((mine[tensor] - expected).abs().max())
                assert error <= 1e-9 * float(expected.abs().max()), f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(found["gradients"][0]) | key_biases(found["gradients"][1])).items():
        assert size <= 1e-9, f"{tensor}: {size:.3g}"


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name",
    [
        "pairs, mixed",
        "images",
        "text",
        pytest.param("pairs, all true", marks=slow),
        pytest.param("pairs, all false", marks=slow),
        pytest.param("pairs, no ITM labels", marks=slow),
    ],
)
def test_base_agrees_in_float32(name: str) -> None:
    case = CASES[name]
    case = Case(case.stream, tuple(row for row in case.false_rows if row < 2), case.padded, case.itm_labels)
    found = run_both(BASE, torch.float32, case, rows=2)
    for loss, expected in found["losses"][1].items():
        assert float(found["losses"][0][loss]) == pytest.approx(float(expected), rel=1e-5), loss
    assert set(found["losses"][0]) == set(found["losses"][1])
    mine, yours = found["states"]
    for state, expected in yours.items():
        error = float((mine[state] - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"{state}: differs by {error:.3g}"
    mine, yours = found["gradients"]
    assert set(mine) == set(yours), set(mine) ^ set(yours)
    for tensor, expected in yours.items():
        if not tensor.endswith("attention.key.bias"):
            error = float((mine[tensor] - expected).norm() / expected.norm())
            assert error <= 1e-4, f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(mine) | key_biases(yours)).items():
        assert size <= 1e-6, f"{tensor}: {size:.3g}"


# What the peer can compute, but not through FlavaForPreTraining.forward.


def their_fusion(theirs: FlavaForPreTraining, image_BND: Tensor, text_BTD: Tensor, mask_BL: Tensor | None) -> Tensor:
    flava = theirs.flava
    both = torch.cat([flava.image_to_mm_projection(image_BND), flava.text_to_mm_projection(text_BTD)], dim=1)
    return flava.multimodal_model(both, attention_mask=mask_BL).last_hidden_state


def assert_same_gradients(ours: Flava, theirs: FlavaForPreTraining) -> None:
    """In our names this time: their gradients through `from_hf`, their three of q, k, v in our one."""
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters(remove_duplicate=False)
    }
    for head in ("mim_head", "mlm_head", "mmm_image_head", "mmm_text_head"):
        grads[f"{head}.bias"] = grads[f"{head}.decoder.bias"]
    _, expected = from_hf(grads, theirs.config.to_dict())
    for name, parameter in ours.named_parameters():
        mine = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        error = float((mine - expected[name]).abs().max())
        assert error <= 1e-9 * float(expected[name].abs().max()), f"{name}: differs by {error:.3g}"


@pytest.mark.parametrize("size", [(48, 48), (24, 64), (16, 16)])
def test_positions_are_interpolated_for_another_picture_size_also_through_the_fusion(size: tuple[int, int]) -> None:
    ours, theirs = both_models(TINY, torch.float64)
    pixels_BCHW, ids_BT = torch.randn(2, 3, *size, dtype=torch.float64), torch.randint(5, 61, (2, 6))
    image, text = ours.encode_image(pixels_BCHW), ours.encode_text(ids_BT)
    fused = ours.fuse(image, text).tokens
    there = theirs.flava.image_model(pixels_BCHW, interpolate_pos_encoding=True, output_hidden_states=True)
    text_there = theirs.flava.text_model(ids_BT, output_hidden_states=True)
    fused_there = their_fusion(theirs, there.hidden_states[-1], text_there.hidden_states[-1], None)
    assert torch.allclose(image.tokens, there.last_hidden_state, rtol=0, atol=1e-9)
    assert torch.allclose(fused, fused_there, rtol=0, atol=1e-9)
    weight = torch.randn_like(fused)
    (fused * weight).sum().backward()
    (fused_there * weight).sum().backward()
    assert_same_gradients(ours, theirs)


@pytest.mark.parametrize("pads_visible", [False, True])
def test_pads_of_the_text_are_seen_by_the_multimodal_encoder_only_where_asked(pads_visible: bool) -> None:
    ours, theirs = both_models(TINY, torch.float64)
    ours.config = FlavaConfig(**{**ours.config_dict(), "pads_visible": pads_visible})
    batch = make_batch("pairs", 3)
    text, pixels_BCHW = batch.texts[0], torch.randn(3, 3, 32, 32, dtype=torch.float64)
    fused = ours.fuse(ours.encode_image(pixels_BCHW), ours.encode_text(text.ids_BT, text.mask_BT)).tokens
    image_there = theirs.flava.image_model(pixels_BCHW, output_hidden_states=True)
    text_there = theirs.flava.text_model(text.ids_BT, attention_mask=text.mask_BT.long(), output_hidden_states=True)
    mask_BL = torch.cat([torch.ones(3, 18, dtype=torch.int64), text.mask_BT.long()], dim=1)
    fused_there = their_fusion(
        theirs, image_there.hidden_states[-1], text_there.hidden_states[-1], None if pads_visible else mask_BL
    )
    assert torch.allclose(fused, fused_there, rtol=0, atol=1e-9)
    other = their_fusion(
        theirs, image_there.hidden_states[-1], text_there.hidden_states[-1], mask_BL if pads_visible else None
    )
    assert not torch.allclose(fused, other, rtol=0, atol=1e-6)
    weight = torch.randn_like(fused)
    (fused * weight).sum().backward()
    (fused_there * weight).sum().backward()
    assert_same_gradients(ours, theirs)


def test_segments_of_a_text_agree() -> None:
    ours, theirs = both_models(TINY, torch.float64)
    batch = make_batch("text", 3)
    text, segments_BT = batch.texts[0], torch.randint(0, 2, (3, 9))
    mine = ours.encode_text(text.ids_BT, text.mask_BT, segments_BT).tokens
    there = theirs.flava.text_model(text.ids_BT, attention_mask=text.mask_BT.long(), token_type_ids=segments_BT)
    assert torch.allclose(mine, there.last_hidden_state, rtol=0, atol=1e-9)


@pytest.mark.parametrize("case", [Case("images"), Case("pairs", false_rows=(1,))], ids=["images", "pairs"])
def test_codes_made_during_the_step_agree_with_the_image_codebook(case: Case) -> None:
    ours, theirs = both_models(TINY, torch.float64)
    tokenizer = DVae(DVaeConfig(width=16, num_codes=TINY.num_codes)).double()
    view = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8)  # a picture of its own: the tokenizer's view
    mapped = 0.8 * view.double() / 255 + 0.1
    with torch.no_grad():  # or else one code is the largest everywhere
        tokenizer.encoder.head.bias -= tokenizer.encoder(mapped).mean((0, 2, 3))
    state, config = codebook_to_hf(tokenizer)
    theirs.image_codebook = FlavaImageCodebook(FlavaImageCodebookConfig(**config)).double()
    theirs.image_codebook.load_state_dict(state)

    batch = make_batch(case.stream, 4, false_rows=case.false_rows, padded=case.padded)
    arguments = their_arguments(batch, case)
    del arguments["mim_labels"]
    output = theirs(**arguments, codebook_pixel_values=mapped)
    output.loss.backward()

    targets = {name: target for name, target in batch.targets.items() if name != "codes"}
    batch = replace(batch, images=(*batch.images, Images(view, batch.images[0].same_B)), targets=targets)
    method = flava_method(ours)
    method.image_tokenizer = tokenizer.frozen(torch.float64)
    codes_BN = method.codes(batch, torch.arange(4))
    assert torch.equal(codes_BN, theirs.image_codebook.get_codebook_indices(mapped).flatten(1))
    assert len(codes_BN.unique()) > 3
    sums, counts, _ = backward(method, [batch], Key(0, case.stream, 0))
    name = "mim" if case.stream == "images" else "mmm_image"
    assert float(sums[name] / counts[name]) == pytest.approx(output.loss_info[name].item(), rel=1e-9)
    assert_same_gradients(ours, theirs)
