"""ViT, DeiT and DINO weights in every layout they come in, and what is wrong with those that do not fit."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from tests.convert import peers
from tests.dino_batches import random_dino
from trivium.cli.convert import convert
from trivium.convert import vit
from trivium.convert.weights import read_weights
from trivium.data.transforms import IMAGENET_MEAN, IMAGENET_STD, ImageTransform
from trivium.errors import TriviumError
from trivium.invariance.dino import TINY
from trivium.load import load
from trivium.models.dino import Dino, DinoConfig
from trivium.models.vit import ViT, ViTConfig

WIDE = replace(TINY, width=128, num_heads=2, mask_token=False)  # heads as wide as in released models


def timm_state(width: int = 64, layers: int = 2, grid: int = 4, patch: int = 8, mlp: int = 96) -> dict[str, Tensor]:
    """The names of a released file, written out; every number another."""
    shapes = {
        "cls_token": (1, 1, width), "pos_embed": (1, grid**2 + 1, width),
        "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
        "norm.weight": (width,), "norm.bias": (width,),
    }  # fmt: skip
    for n in range(layers):
        shapes |= {
            f"blocks.{n}.norm1.weight": (width,), f"blocks.{n}.norm1.bias": (width,),
            f"blocks.{n}.attn.qkv.weight": (3 * width, width), f"blocks.{n}.attn.qkv.bias": (3 * width,),
            f"blocks.{n}.attn.proj.weight": (width, width), f"blocks.{n}.attn.proj.bias": (width,),
            f"blocks.{n}.norm2.weight": (width,), f"blocks.{n}.norm2.bias": (width,),
            f"blocks.{n}.mlp.fc1.weight": (mlp, width), f"blocks.{n}.mlp.fc1.bias": (mlp,),
            f"blocks.{n}.mlp.fc2.weight": (width, mlp), f"blocks.{n}.mlp.fc2.bias": (width,),
        }  # fmt: skip
    return {name: 0.05 * torch.randn(shape) for name, shape in shapes.items()}


def full_checkpoint(model: Dino) -> dict[str, Any]:
    """What DINO's training writes: a student from a data-parallel wrapper, a teacher, an argparse.Namespace."""
    teacher = vit.to_dino(model)
    student = {f"module.{name}": tensor + 1 for name, tensor in teacher.items()}
    args = argparse.Namespace(arch="vit_small", patch_size=8, out_dim=24, lr=0.0005, data_path="/data")
    return {
        "student": student, "teacher": teacher, "optimizer": {"state": {}, "param_groups": [{"lr": 0.1}]},
        "epoch": 100, "args": args, "dino_loss": {"center": torch.zeros(1, 24)}, "fp16_scaler": {"scale": 65536.0},
    }  # fmt: skip


@settings(max_examples=8)
@given(heads=st.integers(1, 3), layers=st.integers(1, 3), grid=st.integers(1, 5), patch=st.sampled_from([2, 4, 8]))
def test_timm_weights_come_back_bit_equal_at_any_size(heads: int, layers: int, grid: int, patch: int) -> None:
    theirs = timm_state(64 * heads, layers, grid, patch)
    config, state, left = vit.from_timm(theirs, {})
    assert left == []
    assert (config.num_heads, config.num_layers, config.image_size) == (heads, layers, grid * patch)
    assert (config.eps, config.position_offset) == (1e-6, 0.1)
    model = ViT(config)
    model.load_state_dict(state)
    back = vit.to_timm(model)
    assert back.keys() == theirs.keys()
    assert all(torch.equal(back[name], theirs[name]) for name in theirs)


def plain_block(state: dict[str, Tensor], x: Tensor, heads: int) -> Tensor:
    """timm's block from its own tensors: queries, keys and values in this order, exact GELU, eps 1e-6."""
    F = torch.nn.functional
    width = x.shape[-1]
    normed = F.layer_norm(x, (width,), state["norm1.weight"], state["norm1.bias"], 1e-6)
    qkv = F.linear(normed, state["attn.qkv.weight"], state["attn.qkv.bias"])
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
    share = (q @ k.transpose(-2, -1) * (width // heads) ** -0.5).softmax(-1)
    x = x + F.linear((share @ v).transpose(1, 2).flatten(2), state["attn.proj.weight"], state["attn.proj.bias"])
    normed = F.layer_norm(x, (width,), state["norm2.weight"], state["norm2.bias"], 1e-6)
    hidden = F.gelu(F.linear(normed, state["mlp.fc1.weight"], state["mlp.fc1.bias"]))
    return x + F.linear(hidden, state["mlp.fc2.weight"], state["mlp.fc2.bias"])


def test_what_the_model_computes_is_what_timms_would() -> None:
    """A permuted q, k, v or a transposed patch would survive any round trip, but not this."""
    theirs = {name: 4 * tensor.double() for name, tensor in timm_state(128).items()}
    config, state, _ = vit.from_timm(theirs, {})
    model = ViT(config).double()
    model.load_state_dict(state)
    pixels = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    patches = torch.nn.functional.conv2d(
        pixels, theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"], stride=8
    )
    x = torch.cat([theirs["cls_token"].expand(2, -1, -1), patches.flatten(2).transpose(1, 2)], 1) + theirs["pos_embed"]
    for n in range(2):
        prefix = f"blocks.{n}."
        block = {name.removeprefix(prefix): tensor for name, tensor in theirs.items() if name.startswith(prefix)}
        x = plain_block(block, x, heads=2)
    expected = torch.nn.functional.layer_norm(x, (128,), theirs["norm.weight"], theirs["norm.bias"], 1e-6)
    assert torch.allclose(model.encode_image(pixels).tokens, expected, rtol=0, atol=1e-10)


def test_a_classifier_is_left_out_and_named() -> None:
    theirs = timm_state() | {"head.weight": torch.ones(10, 64), "head.bias": torch.ones(10)}
    config, state, left = vit.from_timm(theirs, {})
    assert left == ["head.bias", "head.weight"]
    assert config.position_offset == 0.0
    assert state.keys() == ViT(config).state_dict().keys()


def test_heads_are_told_by_timms_config_where_shapes_do_not() -> None:
    model = ViT(replace(ViTConfig(), width=32, num_heads=4, mlp_width=48, num_layers=2, image_size=32, patch_size=8))
    theirs, config = vit.to_timm(model), vit.config_to_timm(model.config)
    assert vit.from_timm(theirs, config)[0] == replace(model.config, position_offset=0.1)
    with pytest.raises(TriviumError, match="width 32 is no multiple of 64"):
        vit.from_timm(theirs, {})


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("fixed_gain", [True, False])
def test_a_full_checkpoint_of_dino_gives_its_teacher(tmp_path: Path, zipped: bool, fixed_gain: bool) -> None:
    model = random_dino(replace(WIDE, fixed_gain=fixed_gain), dtype=torch.float32)
    if fixed_gain:
        torch.nn.init.ones_(model.head.gain)
    torch.save(full_checkpoint(model), tmp_path / "checkpoint.pth", _use_new_zipfile_serialization=zipped)
    read = read_weights(tmp_path / "checkpoint.pth")
    assert read["head.last_layer.weight_g"].shape == (24, 1)
    config, state = vit.from_dino(read, {})
    assert config == model.config
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    back = vit.to_dino(model)
    assert back.keys() == read.keys() and all(torch.equal(back[name], read[name]) for name in read)


@pytest.mark.parametrize("layout", ["dino", "timm-vit", "hf-vit"])
def test_how_pictures_are_prepared_travels_with_the_weights(layout: str, tmp_path: Path) -> None:
    published = tmp_path / "published"
    published.mkdir()
    torch.save(full_checkpoint(random_dino(WIDE, dtype=torch.float32)), published / "checkpoint.pth")
    side = WIDE.image_size
    read = load(published / "checkpoint.pth")
    assert read.transform == ImageTransform(
        side, mean=IMAGENET_MEAN, std=IMAGENET_STD, crop="center", resize=side * 256 // 224
    )
    picture = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    half = (0.5, 0.5, 0.5)
    for n, resize in enumerate((read.transform.resize, None, side + 5)):
        ours = replace(read, transform=replace(read.transform, filter="bilinear", std=half, resize=resize))
        ours.save(tmp_path / f"ours-{n}")
        convert(tmp_path / f"ours-{n}", to=layout, out=tmp_path / f"theirs-{n}")
        assert load(tmp_path / f"ours-{n}").transform == ours.transform
        again = load(tmp_path / f"theirs-{n}")
        assert again.transform == ours.transform
        assert torch.allclose(again.encode_image([picture]).pooled, ours.encode_image([picture]).pooled, atol=1e-5)


def test_what_timms_config_wants_of_pictures_is_heard_or_said(tmp_path: Path) -> None:
    save_file(timm_state(), tmp_path / "model.safetensors")
    cfg = {"pretrained_cfg": {"crop_pct": 0.9, "interpolation": "nearest"}}
    (tmp_path / "config.json").write_text(json.dumps(cfg))
    with pytest.warns(UserWarning, match="interpolation 'nearest' of pictures is not supported"):
        bundle = load(tmp_path)
    assert (bundle.transform.size, bundle.transform.resize, bundle.transform.filter) == (32, 35, "bicubic")


def test_a_published_backbone_is_a_full_checkpoints_tower(tmp_path: Path) -> None:
    model = random_dino(WIDE, dtype=torch.float32)
    torch.save(vit.to_timm(model), tmp_path / "pretrain.pth")
    config, state, left = vit.from_timm(read_weights(tmp_path / "pretrain.pth"), {})
    tower = ViT(config)
    tower.load_state_dict(state)
    pixels = torch.randn(2, 3, 48, 48)  # positions as DINO resamples them
    assert left == []
    assert torch.equal(tower.encode_image(pixels).tokens, model.encode_image(pixels).tokens)


@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "ViTForMaskedImageModeling"])
def test_files_of_hugging_face(kind: str, tmp_path: Path) -> None:
    their_config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, intermediate_size=48, num_hidden_layers=2, image_size=32, patch_size=8,
        encoder_stride=8, layer_norm_eps=1e-6,
    )  # fmt: skip
    peer = peers.shuffled(getattr(transformers, kind)(their_config))
    peer.save_pretrained(tmp_path)
    config, state, left = vit.from_hf(read_weights(tmp_path), their_config.to_dict())
    assert (
        left
        == {
            "ViTModel": ["pooler.dense.bias", "pooler.dense.weight"],
            "ViTForImageClassification": ["classifier.bias", "classifier.weight"],
            "ViTForMaskedImageModeling": ["decoder.0.bias", "decoder.0.weight"],
        }[kind]
    )
    model = ViT(config)
    model.load_state_dict(state)
    pixels = torch.randn(2, 3, 32, 32)
    tower = getattr(peer, "vit", peer)
    with torch.no_grad():
        expected = tower(pixels).last_hidden_state
        assert torch.allclose(model.eval().encode_image(pixels).tokens, expected, atol=1e-6)
    if kind == "ViTModel":
        files = {name: tensor for name, tensor in read_weights(tmp_path).items() if name not in left}
        back = vit.to_hf(model)
        assert back.keys() == files.keys() and all(torch.equal(back[name], files[name]) for name in files)
        assert vit.config_from_hf(vit.config_to_hf(config), mask_token=False) == config


def test_a_vit_of_hugging_face_is_the_one_of_timm() -> None:
    model = random_dino(WIDE)
    config, state, _ = vit.from_hf(vit.to_hf(model), vit.config_to_hf(model.config))
    assert config == replace(vit.from_timm(vit.to_timm(model), {})[0], position_offset=0.0)
    assert all(torch.equal(state[name], tensor) for name, tensor in model.backbone.state_dict().items())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "clip"}, 'model_type "clip" where "vit" is needed'),
        ({"model_type": "deit"}, "distilled DeiT"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"qkv_bias": False}, "qkv_bias is False"),
        ({"image_size": [32, 64]}, "only squares"),
        ({"num_hidden_layers": 4}, "misses 16 tensors"),
        ({"num_hidden_layers": 2}, "unexpected 16 tensors"),
        ({"image_size": 64}, r"position_embeddings has shape \[1, 17, 32\] where its config makes \[1, 65, 32\]"),
    ],
)
def test_a_checkpoint_that_does_not_fit_says_what_differs(change: dict[str, Any], says: str) -> None:
    model = ViT(replace(ViTConfig(), width=32, num_heads=4, mlp_width=48, num_layers=3, image_size=32, patch_size=8))
    with pytest.raises(TriviumError, match=says):
        vit.from_hf(vit.to_hf(model), vit.config_to_hf(model.config) | change)


def test_what_is_wrong_with_a_timm_file_is_said() -> None:
    theirs = timm_state()
    with pytest.raises(TriviumError, match="distilled DeiT"):
        vit.from_timm(theirs | {"dist_token": torch.zeros(1, 1, 64)}, {})
    with pytest.raises(TriviumError, match=r"misses 1 tensor \(pos_embed\)"):
        vit.from_timm({name: tensor for name, tensor in theirs.items() if name != "pos_embed"}, {})
    with pytest.raises(TriviumError, match=r"misses 1 tensor \(blocks\.1\.attn\.proj\.bias\)"):
        vit.from_timm({name: tensor for name, tensor in theirs.items() if name != "blocks.1.attn.proj.bias"}, {})
    with pytest.raises(TriviumError, match=r"unexpected 1 tensor \(blocks\.0\.ls1\.gamma\)"):
        vit.from_timm(theirs | {"blocks.0.ls1.gamma": torch.ones(64)}, {})
    with pytest.raises(TriviumError, match="batch norm in its head"):
        vit.from_dino({f"backbone.{name}": tensor for name, tensor in theirs.items()}, {})


def test_a_config_of_the_published_model_is_the_default() -> None:
    assert vit.config_from_hf({"model_type": "vit"}, mask_token=False) == replace(ViTConfig(), eps=1e-12)
    assert vit.config_from_hf(vit.config_to_hf(DinoConfig()), False) == ViTConfig()
