"""Initial weights are a function of (seed, parameter name) and of nothing else."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from tests.flava_batches import TINY
from trivium.models.flava import Flava
from trivium.train.initial import initialise


def started(seed: int, torch_seed: int, **changes: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(torch_seed)
    model = Flava(replace(TINY, **changes))
    initialise(model, seed)
    return {name: value.clone() for name, value in model.state_dict().items()}


def test_torch_has_no_say_in_it() -> None:
    first, second = started(1, torch_seed=0), started(1, torch_seed=99)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_more_layers_leave_the_others_as_they_were() -> None:
    small, large = started(1, 0), started(1, 0, image_layers=4, num_codes=99)
    for name, value in small.items():
        if not name.startswith(("mim_head.decoder", "mmm_image_head.decoder")):
            assert torch.equal(value, large[name]), name


def test_another_seed_draws_every_tensor_anew() -> None:
    first, second = started(1, 0), started(2, 0)
    for name, value in first.items():
        assert torch.equal(value, second[name]) == (value.ndim < 2), name


def test_no_two_tensors_start_alike() -> None:
    starts = [round(float(value.flatten()[-1]), 12) for value in started(1, 0).values() if value.ndim >= 2]
    assert len(set(starts)) == len(starts)


def test_each_tensor_has_the_spread_and_the_zeros_it_should() -> None:
    for name, value in started(1, 0).items():
        if value.ndim >= 2:
            rows = value[1:] if name == "text.embeddings.word.weight" else value
            assert float(rows.std()) == pytest.approx(0.02, rel=6 / rows.numel() ** 0.5), name
        elif name.endswith("bias"):
            assert not value.any(), name
        elif name != "logit_scale":
            assert (value == 1).all(), name
    assert not started(1, 0)["text.embeddings.word.weight"][0].any()  # padding


def test_class_token_and_positions_are_drawn_unless_zeros_are_asked_for() -> None:
    names = ("image.class_token", "image.positions", "multimodal.class_token", "image.mask_token")
    model = Flava(TINY)
    initialise(model, 0)
    assert all(model.get_parameter(name).all() for name in names)
    initialise(model, 0, zeros=names[:2])
    assert not any(model.get_parameter(name).any() for name in names[:2])
    assert all(model.get_parameter(name).all() for name in names[2:])
