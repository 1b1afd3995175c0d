from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_run import Tiny, TinyMixture
from torch import nn

from trivium.errors import TriviumError
from trivium.invariance import unit
from trivium.models.albef import Albef, AlbefConfig
from trivium.models.albef_heads import TwoPictures, decoder_config
from trivium.models.clip import Clip, ClipConfig
from trivium.models.dino import Dino, DinoConfig
from trivium.models.unit import Unit
from trivium.train import optim
from trivium.train.optim import Group, Optim
from trivium.train.protocol import Key
from trivium.train.step import step


class Towers(nn.Module):
    """Two towers of different depth and what a real model has around them."""

    def __init__(self) -> None:
        super().__init__()
        self.image_encoder = self._tower(3)
        self.image_encoder.stack = nn.Module()  # one level deeper than in the other tower
        self.image_encoder.stack.blocks = self.image_encoder.blocks
        del self.image_encoder.blocks
        self.text_encoder = self._tower(2)
        self.head = nn.Linear(4, 4)
        self.logit_scale = nn.Parameter(torch.ones(1))

    def _tower(self, depth: int) -> nn.Module:
        tower = nn.Module()
        tower.class_token = nn.Parameter(torch.zeros(1, 1, 4))
        tower.position_embedding = nn.Parameter(torch.zeros(1, 5, 4))
        tower.patch_embedding = nn.Conv2d(3, 4, 2)
        tower.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 4)) for _ in range(depth))
        tower.norm = nn.LayerNorm(4)
        return tower


def groups_of(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, dict[str, Any]]:
    names = {parameter: name for name, parameter in model.named_parameters()}
    return {names[parameter]: group for group in optimizer.param_groups for parameter in group["params"]}


def test_learning_rate_at_known_points() -> None:
    cosine = Optim(warmup=10, schedule="cosine", final=0.1)
    assert optim.learning_rate(cosine, 0, 110) == pytest.approx(0.1)
    assert optim.learning_rate(cosine, 9, 110) == 1.0
    assert optim.learning_rate(cosine, 10, 110) == 1.0
    assert optim.learning_rate(cosine, 60, 110) == pytest.approx(0.55)
    assert optim.learning_rate(cosine, 110, 110) == pytest.approx(0.1)
    assert optim.learning_rate(cosine, 35, 110) == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 4)) / 2)
    linear = Optim(warmup=0.1, schedule="linear", final=0.0)  # a share of the steps
    assert optim.learning_rate(linear, 4, 100) == pytest.approx(0.5)
    assert optim.learning_rate(linear, 55, 100) == pytest.approx(0.5)
    constant = Optim(warmup=0, schedule="constant")
    assert {optim.learning_rate(constant, at, 9) for at in range(9)} == {1.0}


@given(
    st.sampled_from(["cosine", "linear", "constant"]),
    st.floats(0, 50),
    st.floats(0, 1),
    st.integers(1, 200),
)
def test_rates_rise_once_and_fall_once(schedule: Any, warmup: float, final: float, total: int) -> None:
    rates = [
        optim.learning_rate(Optim(warmup=warmup, schedule=schedule, final=final), at, total) for at in range(total)
    ]
    assert all(0 <= rate <= 1 for rate in rates)
    peak = rates.index(max(rates))
    assert rates[: peak + 1] == sorted(rates[: peak + 1])
    assert all(later <= earlier + 1e-12 for earlier, later in zip(rates[peak:], rates[peak + 1 :], strict=False))


def test_weight_decay_schedule_ends_where_told() -> None:
    model = nn.Linear(3, 3)
    recipe = Optim(weight_decay=0.04, weight_decay_final=0.4, warmup=0)
    optimizer = optim.build(model, recipe)
    group = groups_of(model, optimizer)["weight"]
    for at, expected in ((0, 0.04), (50, 0.22), (100, 0.4)):
        optim.set_step(optimizer, recipe, at, 100)
        assert group["weight_decay"] == pytest.approx(expected)
    assert groups_of(model, optimizer)["bias"]["weight_decay"] == 0


def test_what_is_not_decayed() -> None:
    model = Towers()
    groups = groups_of(model, optim.build(model, Optim(weight_decay=0.1)))
    decayed = {name for name, group in groups.items() if group["weight_decay"] > 0}
    assert decayed == {
        *(f"image_encoder.stack.blocks.{n}.1.weight" for n in range(3)),
        *(f"text_encoder.blocks.{n}.1.weight" for n in range(2)),
        *(f"{tower}.patch_embedding.weight" for tower in ("image_encoder", "text_encoder")),
        "head.weight",
    }
    assert groups.keys() == dict(model.named_parameters()).keys()


def test_layer_decay_counts_from_the_top_of_each_tower() -> None:
    model = Towers()
    groups = groups_of(model, optim.build(model, Optim(lr=1.0, layer_decay=0.5)))
    rate = {name: group["lr"] for name, group in groups.items()}
    assert rate["head.weight"] == rate["image_encoder.norm.weight"] == rate["logit_scale"] == 1
    assert [rate[f"image_encoder.stack.blocks.{n}.1.weight"] for n in range(3)] == [0.125, 0.25, 0.5]
    assert [rate[f"text_encoder.blocks.{n}.1.weight"] for n in range(2)] == [0.25, 0.5]
    assert rate["image_encoder.class_token"] == rate["image_encoder.patch_embedding.weight"] == 0.5**4
    assert rate["text_encoder.position_embedding"] == 0.5**3


def blocks_above(model: nn.Module) -> dict[str, int]:
    """How often the decay is taken into each parameter's rate."""
    groups = groups_of(model, optim.build(model, Optim(lr=1.0, layer_decay=0.5)))
    return {name: round(-math.log2(group["lr"])) for name, group in groups.items()}


def test_layer_decay_spares_heads_though_their_layers_are_numbered() -> None:
    of_heads: dict[str, int] = {}
    for model in (Dino(DinoConfig.of_size("tiny")), Unit(unit.TINY)):
        found = blocks_above(model)
        of_heads |= {name: above for name, above in found.items() if name.startswith(("head.", "heads."))}
        assert max(found.values()) > 1
    assert {"head.mlp.0.weight", "heads.vg.boxes.2.bias", "heads.qnli.norm.weight"} <= of_heads.keys()
    albef = AlbefConfig.of_size("tiny")
    tuned = nn.ModuleDict({"backbone": Albef(albef), "head": TwoPictures(decoder_config(albef), 8, 2)})
    found = blocks_above(tuned)
    of_heads |= {name: above for name, above in found.items() if name.startswith("head.")}
    assert "head.seconds.0.attention.qkv.weight" in of_heads and set(of_heads.values()) == {0}
    assert [found[f"backbone.fusion.blocks.{n}.mlp_in.weight"] for n in range(3)] == [3, 2, 1]
    assert found["backbone.text.embeddings.norm.weight"] == 4 and found["backbone.image.positions"] == 7


def test_layer_decay_is_strongest_on_what_a_first_block_reads() -> None:
    clip = blocks_above(Clip(ClipConfig.of_size("tiny")))  # of 6 and 4 blocks
    inputs = ("patches.projection.weight", "class_token", "positions", "pre_norm.weight", "pre_norm.bias")
    assert {clip[f"image.{name}"] for name in inputs} == {7}
    assert clip["text.embeddings.word.weight"] == 5
    tops = ("image.norm.weight", "text.norm.weight", "image_projection.weight", "logit_scale")
    assert {clip[name] for name in tops} == {0}
    found = blocks_above(Unit(unit.TINY))  # of 4 stages, and 1 and 2 blocks
    assert [found[f"image.backbone.stages.{n}.0.convolutions.0.conv.weight"] for n in range(4)] == [4, 3, 2, 1]
    assert found["image.backbone.stem.conv.weight"] == found["image.backbone.stem.norm.weight"] == 5
    assert found["image.task_tokens.of.vg.weight"] == 2  # the blocks read them, and not the stages
    assert found["text_task_tokens.of.qnli.weight"] == found["text.embeddings.position.weight"] == 3


def test_freezing_and_groups_by_pattern() -> None:
    method = nn.Module()
    method.model = Towers()
    recipe = Optim(
        lr=1.0,
        weight_decay=0.1,
        freeze=("image_encoder.*",),  # the student's "model." may be left out
        groups=(Group("*head*", rate=10, weight_decay=0.5), Group("model.head.bias", rate=2, freeze_until=3)),
    )
    optimizer = optim.build(method, recipe)
    groups = groups_of(method, optimizer)
    assert not any(name.startswith("model.image_encoder") for name in groups)
    assert not any(p.requires_grad for p in method.model.image_encoder.parameters())
    assert all(p.requires_grad for p in method.model.text_encoder.parameters())
    assert (groups["model.head.weight"]["lr"], groups["model.head.weight"]["weight_decay"]) == (10, 0.5)
    assert groups["model.head.bias"]["lr"] == 2  # the last group that matches
    for at, trained in ((2, False), (3, True), (0, False)):
        optim.set_step(optimizer, recipe, at, 10)
        assert method.model.head.bias.requires_grad is trained
    assert len({group["name"] for group in optimizer.param_groups}) == len(optimizer.param_groups)


def test_vectors_decay_where_asked() -> None:
    """As UniT's authors decay biases and norms with the rest."""
    model = Towers()
    everywhere = groups_of(model, optim.build(model, Optim(weight_decay=0.1, no_decay=(), decay_vectors=True)))
    assert {group["weight_decay"] for group in everywhere.values()} == {0.1}
    usual = groups_of(model, optim.build(model, Optim(weight_decay=0.1, no_decay=())))
    assert usual["head.bias"]["weight_decay"] == 0 and usual["head.weight"]["weight_decay"] == 0.1
    of_group = (Group("*head*", weight_decay=0.5), Group("logit_scale", rate=2.0, weight_decay=0.3))
    named = groups_of(model, optim.build(model, Optim(weight_decay=0.1, no_decay=("*bias",), groups=of_group)))
    assert [named[name]["weight_decay"] for name in ("logit_scale", "head.weight", "head.bias")] == [0.3, 0.5, 0]


def test_a_pattern_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(TriviumError, match='no parameter is called "imge_encoder'):
        optim.build(Towers(), Optim(freeze=("imge_encoder.*",)))
    with pytest.raises(TriviumError, match='no parameter is called "haed'):
        optim.build(Towers(), Optim(groups=(Group("haed"),)))
    with pytest.raises(TriviumError, match="leaves no parameter"):
        optim.build(Towers(), Optim(freeze=("*",)))


def test_a_frozen_group_does_not_move_until_its_step() -> None:
    method = Tiny()
    recipe = Optim(lr=0.1, warmup=0, groups=(Group("text_head.*", freeze_until=4),))
    optimizer = optim.build(method, recipe)
    before = method.model.text_head.weight.clone()
    moved = []
    for at, batches in enumerate(TinyMixture().loader(0, 0, 1, 9)):
        optim.set_step(optimizer, recipe, at, 9)
        step(method, batches, Key(0, batches[0].stream, at), optimizer)
        moved.append(not torch.equal(method.model.text_head.weight, before))
    assert moved == [False] * 5 + [True] * 4  # "text" is drawn at steps 2, 5, 8


def test_parameters_without_gradient_are_left_alone() -> None:
    """A stream that does not use a head neither decays it nor ages its moments."""
    method = Tiny()
    optimizer = optim.build(method, Optim(lr=0.1, weight_decay=0.5))
    before = method.model.text_head.weight.clone()
    batches = next(iter(TinyMixture().loader(0, 0, 1, 1)))
    assert batches[0].stream == "pairs"
    step(method, batches, Key(0, "pairs", 0), optimizer)
    assert torch.equal(method.model.text_head.weight, before)
    assert method.model.text_head.weight not in optimizer.state


@pytest.mark.parametrize("clip", ["none", "global", "per_tensor"])
def test_clipping_against_the_plain_form(clip: str) -> None:
    method, plain = Tiny(), Tiny()
    batches = next(iter(TinyMixture().loader(0, 0, 1, 1)))

    def sgd(module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=1.0)

    result = step(method, batches, Key(0, "pairs", 0), sgd(method), clip=clip, clip_norm=0.3)
    start = dict(Tiny().model.named_parameters())
    step(plain, batches, Key(0, "pairs", 0), sgd(plain))
    gradients = {name: (start[name] - now).detach() for name, now in plain.model.named_parameters()}
    norm = torch.stack([gradient.norm() for gradient in gradients.values()]).norm()
    assert result.grad_norm == pytest.approx(float(norm), rel=1e-4)
    for name, now in method.model.named_parameters():
        own_norm = gradients[name].norm().clamp(min=1e-12)
        scale = {"none": 1.0, "global": min(1.0, 0.3 / norm), "per_tensor": min(1.0, 0.3 / own_norm)}[clip]
        torch.testing.assert_close(start[name] - now, gradients[name] * scale, rtol=1e-4, atol=1e-6)


def test_state_by_name_survives_other_groups_and_strides() -> None:
    torch.manual_seed(0)
    first, second = (nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)) for _ in range(2))
    first.to(memory_format=torch.channels_last)
    second.load_state_dict(first.state_dict())
    second.to(memory_format=torch.channels_last)
    one = optim.build(first, Optim(lr=0.1))
    two = optim.build(second, Optim(lr=0.1, groups=(Group("1.*"), Group("0.bias", rate=1.0, weight_decay=0.0))))

    def update(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    update(first, one, 0)
    tensors = {key: value.contiguous().clone() for key, value in optim.state_by_name(one, first).items()}
    assert set(tensors) == {f"{k}/{n}" for n, _ in first.named_parameters() for k in ("step", "exp_avg", "exp_avg_sq")}
    second.load_state_dict(first.state_dict())
    optim.load_state_by_name(two, second, tensors)
    update(first, one, 1)
    update(second, two, 1)
    for left, right in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(left, right)


def test_saved_state_of_what_is_not_trained_is_refused() -> None:
    model = nn.Linear(2, 2)
    optimizer = optim.build(model, Optim(freeze=("bias",)))
    with pytest.raises(TriviumError, match="holds bias, which this run does not train"):
        optim.load_state_by_name(optimizer, model, {"exp_avg/bias": torch.zeros(2)})
    with pytest.raises(TriviumError, match=r"exp_avg of weight has shape \[3, 2\], not \[2, 2\]"):
        optim.load_state_by_name(optimizer, model, {"exp_avg/weight": torch.zeros(3, 2)})
