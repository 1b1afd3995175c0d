"""BERT against transformers: states, pooled and word logits, gradients of every parameter.

Tiny in float64: within 1e-9 of the largest value of each tensor. Base in float32, one step of two rows: states within
1e-5 x max(1, largest value), the loss 1e-5 relative, gradients ||a - b|| <= 1e-4 ||b||. Key biases, whose true gradient
is zero, stay below 1e-9 and 1e-6 of the norm of their key weight's gradient.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from torch.nn import functional as F

from trivium.convert.bert import config_to_hf, from_hf, to_hf
from trivium.invariance.finetune import TINY as TINY_BERT
from trivium.invariance.finetune import random_bert
from trivium.layers.attention import causal
from trivium.models.bert import Bert, BertConfig

TINY = replace(TINY_BERT, mlm_head=True)
BASE = BertConfig(dropout=0.0, mlm_head=True)
KINDS = ("BertModel", "BertForMaskedLM", "BertLMHeadModel")


def of_kind(kind: str, config: BertConfig) -> BertConfig:
    """What of ours a class of theirs is compared with."""
    if kind == "BertModel":
        return replace(config, mlm_head=False)
    return replace(config, pooler=False, memory_width=config.width if kind == "BertLMHeadModel" else None)


def both_models(kind: str, config: BertConfig, dtype: torch.dtype) -> tuple[Bert, Any]:
    """Weights are drawn in ours and handed over, then read back: the converter runs in both directions."""
    config = of_kind(kind, config)
    # Larger weights at base size make a model that amplifies the rounding of float32 beyond any bound.
    ours = random_bert(config, dtype, 0.05 if config.width < 100 else 0.02)
    their_config = transformers.BertConfig(**config_to_hf(config), attn_implementation="eager")
    theirs = getattr(transformers, kind)(their_config).to(dtype).train()
    state = {name: tensor.clone() for name, tensor in to_hf(ours.state_dict(), config).items()}
    theirs.load_state_dict(state, strict=True)
    read_config, read, said = from_hf(theirs.state_dict(), theirs.config.to_dict())
    assert read_config == config
    assert not said
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, read[name]), name
    return ours, theirs


def inputs(config: BertConfig, rows: int, length: int = 9) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(1)
    mask_BT = torch.arange(length) < torch.tensor([length, *[4 + n for n in range(rows - 1)]])[:, None]
    ids_BT = torch.randint(5, config.vocab_size, (rows, length), generator=draw).where(mask_BT, config.pad_id)
    return {
        "ids": ids_BT,
        "mask": mask_BT,
        "segments": torch.randint(0, 2, (rows, length), generator=draw),
        "memory": torch.randn(rows, 7, config.width, generator=draw),
        "memory_mask": torch.arange(7) < torch.tensor([5, 7, 3, 6])[:rows, None],
        "labels": torch.where(torch.rand(rows, length, generator=draw) < 0.4, ids_BT, -100),
    }


def run_both(kind: str, config: BertConfig, dtype: torch.dtype, rows: int) -> dict[str, tuple[dict, dict]]:
    """States, losses and gradients: (ours, theirs) each, under the same names."""
    ours, theirs = both_models(kind, config, dtype)
    given = inputs(config, rows)
    mask_BT, memory = given["mask"], given["memory"].to(dtype).requires_grad_()
    arguments = {"input_ids": given["ids"], "attention_mask": mask_BT.long(), "token_type_ids": given["segments"]}
    if kind == "BertLMHeadModel":
        their_memory = memory.detach().clone().requires_grad_()
        arguments |= {"encoder_hidden_states": their_memory, "encoder_attention_mask": given["memory_mask"].long()}
        text = ours.encode_text(given["ids"], causal(mask_BT), given["segments"], None, memory, given["memory_mask"])
        output = theirs(**arguments, output_hidden_states=True, use_cache=False)
        states = {"states": (text.tokens, output.hidden_states[-1])}
    else:
        text = ours.encode_text(given["ids"], mask_BT, given["segments"])
        output = theirs(**arguments, output_hidden_states=True)
        states = {"states": (text.tokens, output.hidden_states[-1])}
    if kind == "BertModel":
        states["pooled"] = (ours.pool(text), output.pooler_output)
        draw = torch.Generator().manual_seed(2)
        weights = {name: torch.randn(pair[0].shape, generator=draw).to(dtype) for name, pair in states.items()}
        losses = [sum((pair[side] * weights[name]).square().sum() for name, pair in states.items()) for side in (0, 1)]
    else:
        states["words"] = (ours.predict_words(text.tokens), output.logits)
        losses = [F.cross_entropy(states["words"][side].flatten(0, 1), given["labels"].flatten()) for side in (0, 1)]
    for loss in losses:
        loss.backward()
    my_grads = {name: p.grad for name, p in ours.named_parameters()}
    in_their_names = to_hf(my_grads, ours.config)
    their_grads = {name: p.grad for name, p in theirs.named_parameters(remove_duplicate=False)}
    if kind == "BertLMHeadModel":
        in_their_names["memory"], their_grads["memory"] = memory.grad, their_memory.grad
    return {
        "states": ({n: pair[0].detach() for n, pair in states.items()}, {n: p[1].detach() for n, p in states.items()}),
        "losses": ({"loss": losses[0].detach()}, {"loss": losses[1].detach()}),
        "gradients": (in_their_names, their_grads),
    }


def key_biases(grads: dict[str, Tensor]) -> dict[str, float]:
    """The size of each key bias's gradient, in units of the norm of its weight's gradient."""
    names = [name for name in grads if name.endswith("self.key.bias")]
    return {name: float(grads[name].norm() / grads[name[:-4] + "weight"].norm()) for name in names}


@pytest.mark.parametrize("kind", KINDS)
def test_tiny_agrees_in_float64(kind: str) -> None:
    found = run_both(kind, TINY, torch.float64, rows=4)
    for mine, yours in found.values():
        assert set(mine) == set(yours), set(mine) ^ set(yours)
        for tensor, expected in yours.items():
            if not tensor.endswith("self.key.bias"):
                error = float((mine[tensor] - expected).abs().max())
                assert error <= 1e-9 * float(expected.abs().max()), f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(found["gradients"][0]) | key_biases(found["gradients"][1])).items():
        assert size <= 1e-9, f"{tensor}: {size:.3g}"


@pytest.mark.parametrize(
    "kind", ["BertForMaskedLM", *[pytest.param(k, marks=pytest.mark.slow) for k in ("BertModel", "BertLMHeadModel")]]
)
def test_base_agrees_in_float32(kind: str) -> None:
    found = run_both(kind, BASE, torch.float32, rows=2)
    assert float(found["losses"][0]["loss"]) == pytest.approx(float(found["losses"][1]["loss"]), rel=1e-5)
    for state, expected in found["states"][1].items():
        error = float((found["states"][0][state] - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"{state}: differs by {error:.3g}"
    mine, yours = found["gradients"]
    assert set(mine) == set(yours), set(mine) ^ set(yours)
    for tensor, expected in yours.items():
        if not tensor.endswith("self.key.bias"):
            error = float((mine[tensor] - expected).norm() / expected.norm())
            assert error <= 1e-4, f"{tensor}: differs by {error:.3g}"
    for tensor, size in (key_biases(mine) | key_biases(yours)).items():
        assert size <= 1e-6, f"{tensor}: {size:.3g}"


@pytest.mark.parametrize("rows", [1, 3, torch.tensor([[0, 4], [2, 1], [0, 3], [1, 1]])])
@pytest.mark.parametrize("masked", ["pads", "causal"])
def test_the_last_block_at_some_positions_alone_gives_what_the_whole_gives_there(
    rows: int | Tensor, masked: str
) -> None:
    config = replace(TINY, memory_width=32)
    model, given = random_bert(config), inputs(config, 4)
    mask = given["mask"] if masked == "pads" else causal(given["mask"])
    memory = (given["memory"].double(), given["memory_mask"])
    whole = model.encode_text(given["ids"], mask, given["segments"], None, *memory).states
    some = model.encode_text(given["ids"], mask, given["segments"], rows, *memory).states
    index = torch.arange(rows).expand(4, -1) if isinstance(rows, int) else rows
    expected = whole.gather(1, index[:, :, None].expand(-1, -1, config.width))
    weight = torch.randn_like(expected)
    mine, theirs = (
        torch.autograd.grad((states * weight).sum(), list(model.encoder.parameters())) for states in (some, expected)
    )
    torch.testing.assert_close(some, expected, rtol=0, atol=1e-12)
    for gradient, wanted in zip(mine, theirs, strict=True):
        torch.testing.assert_close(gradient, wanted, rtol=0, atol=1e-11)
