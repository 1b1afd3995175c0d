"""The ViT tower against transformers.ViTModel: states, attention maps, gradients of every parameter.

Tiny in float64: within 1e-9 of the largest value of each tensor. Base in float32, two rows: states within
1e-5 x max(1, largest value), gradients ||a - b|| <= 1e-4 ||b||. Key biases, whose true gradient is zero, stay below
1e-9 and 1e-6 of the norm of their key weight's gradient.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import ViTConfig as TheirConfig
from transformers import ViTModel

from trivium.convert.vit import config_to_hf, from_hf, to_hf
from trivium.models.vit import ViT, ViTConfig

TINY = ViTConfig(
    width=32, num_heads=4, mlp_width=48, num_layers=3, image_size=32, patch_size=8, mask_token=True,
)  # fmt: skip


def both_models(config: ViTConfig, dtype: torch.dtype) -> tuple[ViT, ViTModel]:
    """Every tensor drawn in ours and handed over, then read back: the converter runs in both directions."""
    ours = ViT(config).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            centre = 1.0 if name.endswith("norm.weight") else 0.0
            parameter.copy_(centre + 0.05 * torch.randn(parameter.shape, generator=generator))
    their_config = TheirConfig(**config_to_hf(config), attn_implementation="sdpa")
    theirs = ViTModel(their_config, add_pooling_layer=False, use_mask_token=config.mask_token).to(dtype)
    _, in_memory, _ = from_hf(theirs.state_dict(), their_config.to_dict())
    theirs.load_state_dict(renamed(to_hf(ours), theirs))
    config_again, read, left = from_hf(theirs.state_dict(), their_config.to_dict())
    assert config_again == config and left == []
    assert read.keys() == in_memory.keys() == ours.state_dict().keys()
    assert all(torch.equal(tensor, read[name]) for name, tensor in ours.state_dict().items())
    return ours, theirs.train()


def renamed(state: dict[str, Tensor], theirs: ViTModel) -> dict[str, Tensor]:
    """Names of files -> those in memory: both lists stand in the same order inside a block."""
    names = {}
    for name in theirs.state_dict():
        on_file = (
            name.replace("layers.", "encoder.layer.")
            .replace("attention.q_proj", "attention.attention.query")
            .replace("attention.k_proj", "attention.attention.key")
            .replace("attention.v_proj", "attention.attention.value")
            .replace("attention.o_proj", "attention.output.dense")
            .replace("mlp.fc1", "intermediate.dense")
            .replace("mlp.fc2", "output.dense")
        )
        names[name] = on_file
    assert set(names.values()) == set(state)
    return {name: state[on_file].clone() for name, on_file in names.items()}


def their_gradients(theirs: ViTModel) -> dict[str, Tensor]:
    """In our names: their gradients through `from_hf`, their three of q, k, v in our one."""
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    return from_hf(grads, theirs.config.to_dict())[1]


def key_biases(grads: dict[str, Tensor]) -> list[float]:
    """The size of each key bias's gradient, in units of the norm of its weight's gradient."""
    found = []
    for name, grad in grads.items():
        if name.endswith("qkv.bias"):
            found.append(float(grad.chunk(3)[1].norm() / grads[f"{name[:-4]}weight"].chunk(3)[1].norm()))
    return found


def without_key_biases(grads: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: torch.cat([grad.chunk(3)[0], grad.chunk(3)[2]]) if name.endswith("qkv.bias") else grad
        for name, grad in grads.items()
    }


def compared(
    config: ViTConfig, dtype: torch.dtype, size: tuple[int, int], masked: bool
) -> tuple[tuple[dict[str, Tensor], dict[str, Tensor]], tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """(ours, theirs) of states and of gradients."""
    ours, theirs = both_models(config, dtype)
    pixels = torch.randn(2, 3, *size, dtype=dtype)
    masked_BN = torch.rand(2, size[0] * size[1] // config.patch_size**2) < 0.4 if masked else None
    mine = ours.encode_image(pixels, masked_BN)
    there = theirs(
        pixels, bool_masked_pos=masked_BN, interpolate_pos_encoding=True, output_hidden_states=True,
    )  # fmt: skip
    states = (
        {"states": mine.states, "tokens": mine.tokens, "pooled": mine.pooled},
        {
            "states": there.hidden_states[-1],
            "tokens": there.last_hidden_state,
            "pooled": there.last_hidden_state[:, 0],
        },
    )
    weight = torch.randn(mine.tokens.shape, dtype=dtype)
    (mine.tokens * weight).sum().backward()
    (there.last_hidden_state * weight).sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in ours.named_parameters()}
    return states, (grads, their_gradients(theirs))


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("size", [(32, 32), (48, 48), (24, 64)])
def test_tiny_agrees_in_float64(size: tuple[int, int], masked: bool) -> None:
    states, grads = compared(TINY, torch.float64, size, masked)
    for mine, theirs in (states, (without_key_biases(grads[0]), without_key_biases(grads[1]))):
        assert set(mine) == set(theirs)
        for name, expected in theirs.items():
            error = float((mine[name] - expected).abs().max())
            assert error <= 1e-9 * float(expected.abs().max()), f"{name}: differs by {error:.3g}"
    assert max(key_biases(grads[0]) + key_biases(grads[1])) <= 1e-9


@pytest.mark.parametrize("size", [(32, 32), (48, 48)])
def test_attention_maps_agree(size: tuple[int, int]) -> None:
    """As near as float32: the peer's plain attention takes its softmax in it, whatever the model's precision."""
    ours, theirs = both_models(TINY, torch.float64)
    with torch.no_grad():  # at 0.05 all maps are flat
        for parameter in (*ours.encoder.parameters(), *theirs.layers.parameters()):
            parameter.mul_(3)
    theirs.set_attn_implementation("eager")
    pixels = torch.randn(2, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mine = ours.attention_maps(pixels)
    there = theirs(pixels, interpolate_pos_encoding=True, output_attentions=True).attentions[-1]
    assert mine.shape == there.shape == (2, 4, mine.shape[-1], mine.shape[-1])
    assert mine.max() > 0.2
    assert torch.allclose(mine, there, rtol=0, atol=1e-5)  # scores of up to a hundred, rounded to float32


def test_base_agrees_in_float32() -> None:
    states, grads = compared(replace(ViTConfig(), eps=1e-12), torch.float32, (224, 224), masked=False)
    for name, expected in states[1].items():
        error = float((states[0][name] - expected).abs().max())
        assert error <= 1e-5 * max(1.0, float(expected.abs().max())), f"{name}: differs by {error:.3g}"
    mine, theirs = map(without_key_biases, grads)
    assert set(mine) == set(theirs)
    for name, expected in theirs.items():
        error = float((mine[name] - expected).norm() / expected.norm())
        assert error <= 1e-4, f"{name}: differs by {error:.3g}"
    assert max(key_biases(grads[0]) + key_biases(grads[1])) <= 1e-6
