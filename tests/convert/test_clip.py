"""CLIP's weights in three layouts: bit-equal round trips, and what a checkpoint that does not fit says."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.convert.peers import shuffled
from trivium.convert import clip
from trivium.convert.weights import read_weights
from trivium.errors import TriviumError
from trivium.invariance.clip import TINY, random_clip
from trivium.models.clip import SIZES, Clip, ClipConfig

# Heads of 64, as OpenAI's layout takes them to be.
PLAIN = replace(TINY, image_width=128, image_heads=2, text_width=64, text_heads=1, end_id=None, image_layers=1)


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert left.keys() == right.keys(), left.keys() ^ right.keys()
    for name in left:
        assert left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]), name


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    heads=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    layers=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    patch_size=st.integers(2, 6),
    grid=st.integers(1, 4),
    vocab_size=st.integers(8, 40),
    projection=st.integers(3, 20),
    activation=st.sampled_from(["gelu", "quick_gelu"]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
)
def test_every_layout_comes_back_bit_equal_at_any_size(
    heads: tuple[int, int],
    layers: tuple[int, int],
    patch_size: int,
    grid: int,
    vocab_size: int,
    projection: int,
    activation: str,
    dtype: torch.dtype,
) -> None:
    config = ClipConfig(
        image_width=64 * heads[0], image_layers=layers[0], image_heads=heads[0], image_mlp_width=72,
        text_width=64 * heads[1], text_layers=layers[1], text_heads=heads[1], text_mlp_width=40,
        image_size=grid * patch_size, patch_size=patch_size, vocab_size=vocab_size, max_length=9, end_id=None,
        projection_width=projection, activation=activation,
    )  # fmt: skip
    ours = random_clip(config, dtype=dtype).state_dict()
    theirs = transformers.CLIPModel(transformers.CLIPConfig(**clip.config_to_hf(config)))
    hf = clip.to_hf(ours, config)
    assert {name: tensor.shape for name, tensor in hf.items()} == {
        name: tensor.shape for name, tensor in theirs.state_dict().items()
    }
    read, back = clip.from_hf(hf, json.loads(theirs.config.to_json_string(use_diff=False)))
    assert read == config
    same(back, ours)
    openai = clip.to_openai(ours, config)
    read, back = clip.from_openai(openai, activation, {})
    assert read == config
    same(back, ours)
    same(clip.to_openai(back, config), openai)
    same(clip.to_hf(back, config), hf)
    read, back = clip.from_openai(openai, "gelu", clip.config_to_open_clip(config))
    assert read == config
    same(back, ours)


class PlainOpenAI(nn.Module):
    """A CLIP as OpenAI's code builds it, under its names: torch's own attention, projections from the right."""

    class Block(nn.Module):
        def __init__(self, width: int, heads: int, mlp_width: int) -> None:
            super().__init__()
            self.attn = nn.MultiheadAttention(width, heads)
            self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
            self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, mlp_width), "c_proj": nn.Linear(mlp_width, width)})

        def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
            normed = self.ln_1(x)
            x = x + self.attn(normed, normed, normed, need_weights=False, attn_mask=mask)[0]
            hidden = self.mlp["c_fc"](self.ln_2(x))
            return x + self.mlp["c_proj"](hidden * torch.sigmoid(1.702 * hidden))

    class Transformer(nn.Module):
        def __init__(self, width: int, layers: int, heads: int, mlp_width: int) -> None:
            super().__init__()
            self.resblocks = nn.ModuleList(PlainOpenAI.Block(width, heads, mlp_width) for _ in range(layers))

        def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
            x = x.permute(1, 0, 2)
            for block in self.resblocks:
                x = block(x, mask)
            return x.permute(1, 0, 2)

    class Visual(nn.Module):
        def __init__(self, c: ClipConfig) -> None:
            super().__init__()
            self.conv1 = nn.Conv2d(3, c.image_width, c.patch_size, c.patch_size, bias=False)
            self.class_embedding = nn.Parameter(torch.randn(c.image_width))
            self.positional_embedding = nn.Parameter(torch.randn(c.grid**2 + 1, c.image_width))
            self.ln_pre, self.ln_post = nn.LayerNorm(c.image_width), nn.LayerNorm(c.image_width)
            self.transformer = PlainOpenAI.Transformer(c.image_width, c.image_layers, c.image_heads, c.image_mlp_width)
            self.proj = nn.Parameter(torch.randn(c.image_width, c.projection_width))

    def __init__(self, c: ClipConfig) -> None:
        super().__init__()
        self.visual = self.Visual(c)
        self.transformer = self.Transformer(c.text_width, c.text_layers, c.text_heads, c.text_mlp_width)
        self.token_embedding = nn.Embedding(c.vocab_size, c.text_width)
        self.positional_embedding = nn.Parameter(torch.randn(c.max_length, c.text_width))
        self.ln_final = nn.LayerNorm(c.text_width)
        self.text_projection = nn.Parameter(torch.randn(c.text_width, c.projection_width))
        self.logit_scale = nn.Parameter(torch.ones([]))

    def encode_image(self, pixels: Tensor) -> Tensor:
        v = self.visual
        x = v.conv1(pixels).flatten(2).permute(0, 2, 1)
        x = torch.cat([v.class_embedding + torch.zeros(len(x), 1, x.shape[2], dtype=x.dtype), x], dim=1)
        x = v.transformer(v.ln_pre(x + v.positional_embedding))
        return v.ln_post(x[:, 0]) @ v.proj

    def encode_text(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)
        x = self.transformer(self.token_embedding(ids) + self.positional_embedding[:length], mask)
        return self.ln_final(x)[torch.arange(len(x)), ids.argmax(-1)] @ self.text_projection


def test_what_the_model_computes_is_what_openai_s_code_computes() -> None:
    """A permuted q, k, v or an untransposed square projection would survive any round trip, but not this."""
    config = replace(PLAIN, projection_width=64)  # as wide as the text tower: its projection is square
    peer = PlainOpenAI(config).double()
    with torch.no_grad():
        for parameter in peer.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    read, ours = clip.from_openai(dict(peer.state_dict()), "quick_gelu", {})
    assert read == config
    model = Clip(config).double()
    model.load_state_dict(ours)
    pixels, ids = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.randint(1, 60, (2, 9))
    image, text = peer.encode_image(pixels), peer.encode_text(ids)
    for mine, theirs in ((model.encode_image(pixels).projected, image), (model.encode_text(ids).projected, text)):
        assert torch.allclose(mine, nn.functional.normalize(theirs, dim=-1), rtol=0, atol=1e-12)
    same(clip.to_openai(model.state_dict(), config), dict(peer.state_dict()))


def test_other_shapes_of_the_same_layout() -> None:
    """OpenAI's archives hold sizes beside the weights, in half precision; CustomTextCLIP has its words under text."""
    ours = random_clip(PLAIN, dtype=torch.float32).state_dict()
    theirs = clip.to_openai(ours, PLAIN)
    sizes = {"input_resolution": 32, "context_length": 16, "vocab_size": 61}
    archive = {name: tensor.half() for name, tensor in theirs.items()} | {n: torch.tensor(s) for n, s in sizes.items()}
    config, read = clip.from_openai(archive, "quick_gelu", {})
    assert config == PLAIN
    same(read, {name: tensor.half() for name, tensor in ours.items()})
    assert {parameter.dtype for parameter in clip.build(config, read).parameters()} == {torch.float32}
    words = ("token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection")
    custom = {f"text.{name}" if name.startswith(words) else name: tensor for name, tensor in theirs.items()}
    custom["text.attn_mask"] = torch.zeros(16, 16)
    same(clip.from_openai(custom, "quick_gelu", {})[1], ours)


def test_a_config_beside_the_weights_says_what_no_shape_does() -> None:
    config = replace(PLAIN, image_heads=4, text_heads=4, activation="gelu")
    ours = random_clip(config, dtype=torch.float32).state_dict()
    theirs = clip.to_openai(ours, config)
    assert clip.from_openai(theirs, "quick_gelu", {})[0] == PLAIN
    assert clip.from_openai(theirs, "quick_gelu", clip.config_to_open_clip(config))[0] == config
    assert clip.from_openai(theirs, "quick_gelu", clip.config_to_hf(config))[0] == config


def test_config_survives_the_way_out_and_back() -> None:
    for config in (TINY, replace(TINY, end_id=None, activation="gelu", eps=1e-6, dropout=0.1), *SIZES.values()):
        assert clip.config_from_hf(clip.config_to_hf(config)) == config
    assert clip.config_from_hf({}) == ClipConfig(patch_size=32)  # the library's defaults are ViT-B/32


def test_positions_as_counted_by_older_files_are_no_weights() -> None:
    peer = shuffled(transformers.CLIPModel(transformers.CLIPConfig(**clip.config_to_hf(TINY))))
    theirs = dict(peer.state_dict())
    expected = clip.from_hf(theirs, clip.config_to_hf(TINY))[1]
    theirs["text_model.embeddings.position_ids"] = torch.arange(16)[None]
    same(clip.from_hf(theirs, clip.config_to_hf(TINY))[1], expected)


def test_a_torchscript_archive_is_refused_and_the_state_dict_that_the_sentence_makes_is_read(tmp_path: Path) -> None:
    class Archive(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.visual = PlainOpenAI.Visual(PLAIN)
            self.input_resolution: Tensor
            self.register_buffer("input_resolution", torch.tensor(32))

        def forward(self, x: Tensor) -> Tensor:
            return x

    path = tmp_path / "ViT-B-16.pt"
    torch.jit.trace(Archive(), torch.zeros(1)).save(path)
    with pytest.raises(TriviumError, match=r"TorchScript archive.*torch\.save\(torch\.jit\.load") as refused:
        read_weights(path)
    command = str(refused.value).split("with ", 1)[1].replace("ViT-B-16.pt", str(path))
    exec(command.replace('"weights.pt"', repr(str(tmp_path / "weights.pt"))), {"torch": torch})
    assert "visual.conv1.weight" in read_weights(tmp_path / "weights.pt")


def hf(change: Callable[[dict[str, Any]], object]) -> tuple[ClipConfig, dict[str, Tensor]]:
    config = clip.config_to_hf(TINY)
    change(config)
    return clip.from_hf(clip.to_hf(random_clip().state_dict(), TINY), config)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda c: c.update(model_type="siglip"), 'model_type "siglip" where "clip"'),
        (lambda c: c["text_config"].update(hidden_act="gelu"), "hidden_act must be one.*quick_gelu.*gelu for text"),
        (lambda c: [c[f"{t}_config"].update(hidden_act="silu") for t in ("text", "vision")], "hidden_act is 'silu'"),
        (lambda c: c["vision_config"].update(image_size=[32, 64]), "only squares"),
        (lambda c: c["vision_config"].update(num_channels=4), "num_channels is 4"),
        (lambda c: c["text_config"].update(eos_token_id=[5, 60]), r"eos_token_id is \[5, 60\]"),
        (lambda c: c["text_config"].update(vocab_size=99), r"shape \[61, 24\] where its config makes \[99, 24\]"),
        (lambda c: c["vision_config"].update(num_hidden_layers=3), "this CLIP checkpoint misses 16 tensors"),
        (lambda c: c["vision_config"].update(num_hidden_layers=1), "unexpected 16 tensors"),
    ],
)
def test_a_hugging_face_checkpoint_that_does_not_fit_says_what_differs(
    change: Callable[[dict[str, Any]], object], says: str
) -> None:
    with pytest.raises(TriviumError, match=says):
        hf(change)


@pytest.mark.parametrize(
    ("change", "config", "says"),
    [
        ({"visual.trunk.norm.weight": 3}, {}, "a tower of timm"),
        ({"visual.layer1.0.conv1.weight": 3}, {}, "a ResNet"),
        ({"logit_bias": 1}, {}, r"unexpected 1 tensor \(logit_bias\)"),
        ({"visual.proj": None}, {}, "no tensor visual.proj"),
        ({"ln_final.bias": None}, {}, r"misses 1 tensor \(ln_final.bias\)"),
        ({"text_projection": 3}, {}, r"text_projection has shape \[3\] where its config makes \[64, 20\]"),
        ({}, {"model_cfg": {"vision_cfg": {"pool_type": "avg"}}}, "vision_cfg.pool_type is 'avg'"),
        ({}, {"model_cfg": {"text_cfg": {"no_causal_mask": True}}}, "text_cfg.no_causal_mask is True"),
    ],
)
def test_an_open_clip_checkpoint_that_does_not_fit_says_what_differs(change: dict, config: dict, says: str) -> None:
    theirs = clip.to_openai(random_clip(PLAIN).state_dict(), PLAIN)
    for name, size in change.items():
        theirs.pop(name, None)
        if size is not None:
            theirs[name] = torch.zeros(size)
    with pytest.raises(TriviumError, match=says):
        clip.from_openai(theirs, "gelu", config)


def test_what_a_layout_has_no_place_for_is_not_written() -> None:
    state = random_clip().state_dict()
    with pytest.raises(TriviumError, match="end with id 3 of 61"):
        clip.to_openai(state, replace(TINY, end_id=3))
    with pytest.raises(TriviumError, match="end with id 2,"):
        clip.config_to_hf(replace(TINY, end_id=2))
    odd = replace(TINY, end_id=None)
    with pytest.raises(TriviumError, match="width 32 is no multiple of 64"):
        clip.from_openai(clip.to_openai(state, odd), "gelu", {})
    assert math.isclose(clip.config_to_hf(TINY)["logit_scale_init_value"], math.log(1 / 0.07))
