"""What two gloo processes must agree on, and a method in parts over both. One world of processes for this file."""

from __future__ import annotations

import io
from functools import partial
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from tests.flava_batches import flava_method, random_flava
from trivium.data.collate import ImageCollate, ImageInput
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.invariance import (
    CASES,
    DROPOUT,
    MICRO_BATCHES,
    TOLERANCE,
    flava,
    on_processes,
    share_of_this_process,
    split,
)
from trivium.recipes.data import Data, Sources, make_image_tokenizer
from trivium.recipes.priors import start_at_frequencies
from trivium.train import distributed
from trivium.train.protocol import Key, Sample, Stream
from trivium.train.sharding import shard
from trivium.train.step import backward, step

CLIPS = ("none", "global", "per_tensor")
STEPS = (  # precision, stream, micro-batches
    *(("float64", "pairs", 2), ("float64", "pairs", 8), ("float64", "images", 2), ("float64", "text", 2)),
    ("float32", "pairs", 8),
)
SMALLEST = max(MICRO_BATCHES)  # micro-batches
PASSES = (("float64", 0.0, 2), ("float64", DROPOUT, SMALLEST), ("float32", 0.0, SMALLEST))
SHORT = {PASSES[0]: tuple(CASES), PASSES[1]: ("FLAVA, pairs", "DINO"), PASSES[2]: ("ALBEF",)}
WHOLE = dict.fromkeys(PASSES[1:], tuple(CASES))
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two() -> list[dict[str, Tensor]]:
    return on_processes(2, everything)


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return sharded_steps()


def everything() -> dict[str, Tensor]:
    found = {f"sharded/{name}": value for name, value in sharded_steps().items()}
    found |= {f"any family/{name}": value for name, value in of_any_family(SHORT).items()}
    found |= {"accepted with a NaN on the second process": a_nan_on_the_last_process()}
    found |= {f"learned/{name}": value for name, value in learned_from_data().items()}
    return found | {"refused": a_mistake_of_the_first_process()}


def under(found: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in found.items() if name.startswith(prefix)}


# A method in parts.


def sharded_steps() -> dict[str, Tensor]:
    """Losses, whole gradients, their norm, and the whole parameters after a clipped step. On one process: unsharded."""
    found: dict[str, Tensor] = {}
    for dtype, stream, parts in STEPS:
        for name, value in losses_and_gradients(stream, getattr(torch, dtype), parts).items():
            found[f"{dtype}/{stream}, {parts} micro-batches: {name}"] = value
    for clip in CLIPS:
        for name, value in parameters_after_a_step(clip).items():
            found[f"float64/{clip}: {name}"] = value
    return found


def prepared(stream: str, dtype: torch.dtype, parts: int) -> tuple[Any, Any]:
    method, batch = flava.case(stream, dtype, 0.0, (1, 6), contrastive_form="sigmoid")
    if distributed.world() > 1:
        shard(method, method.model.blocks(), CPU)
        held = sum(distributed.own_part(parameter).numel() for parameter in method.parameters())
        assert held < 0.6 * sum(parameter.numel() for parameter in method.parameters())
    return method, share_of_this_process(split(batch, parts))


def losses_and_gradients(stream: str, dtype: torch.dtype, parts: int) -> dict[str, Tensor]:
    method, mine = prepared(stream, dtype, parts)
    method.train()
    sums, counts, _ = backward(method, mine, Key(0, stream, 0))
    parameters = list(method.parameters())
    distributed.sum_gradients(parameters)
    sums = distributed.sum_over_processes(sums)
    found = {f"loss of {name}": value / counts[name] for name, value in sums.items()}
    found["norms"] = distributed.norms([p.grad for p in parameters if p.grad is not None])
    grads = {name: p.grad for name, p in method.named_parameters() if p.grad is not None}
    return found | {f"gradient of {name}": distributed.whole(grad) for name, grad in grads.items()}


def of_any_family(cases: dict[tuple[str, float, int], tuple[str, ...]]) -> dict[str, Tensor]:
    """Losses and whole gradients of these cases of each pass, in parts over two processes."""
    found: dict[str, Tensor] = {}
    for passed, case in ((passed, case) for passed, names in cases.items() for case in names):
        precision, dropout, parts = passed
        name = f"{precision}/dropout {dropout} in {parts} micro-batches, {case}"
        method, batch = CASES[case](getattr(torch, precision), dropout)
        if distributed.world() > 1:
            shard(method, getattr(method.model, "blocks", list)(), CPU)  # a fine-tuned model names none
        method.train()
        sums, _, _ = backward(method, share_of_this_process(split(batch, parts)), Key(0, batch.stream, 0))
        distributed.sum_gradients(list(method.parameters()))
        found |= {f"{name}: loss of {n}": value for n, value in distributed.sum_over_processes(sums).items()}
        grads = {n: p.grad for n, p in method.named_parameters() if p.grad is not None}
        found |= {f"{name}: gradient of {n}": distributed.whole(grad) for n, grad in grads.items()}
    return found


def parameters_after_a_step(clip: str) -> dict[str, Tensor]:
    method, mine = prepared("pairs", torch.float64, 2)
    with torch.no_grad():
        method.model.logit_scale.fill_(5.0)  # the step must hold it below a hundred
    optimizer = torch.optim.SGD(method.parameters(), lr=1.0)
    result = step(method, mine, Key(0, "pairs", 0), optimizer, clip=clip, clip_norm=0.05)
    assert result.accepted
    found = {name: distributed.whole(parameter.detach()) for name, parameter in method.named_parameters()}
    return found | {"norm": torch.tensor(result.grad_norm, dtype=torch.float64)}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float64", 1e-9), ("float32", 1e-5)])
def test_a_sharded_step_equals_one_process(
    one: dict[str, Tensor], two: list[dict[str, Tensor]], dtype: str, tolerance: float
) -> None:
    expected = under(one, f"{dtype}/")
    assert len(expected) > 100
    for found in two:
        mine = under(found, f"sharded/{dtype}/")
        assert set(mine) == set(expected)
        for name, reference in expected.items():
            error = float((mine[name].double() - reference.double()).norm())
            assert error <= tolerance * float(reference.double().norm()), f"{name}: differs by {error:.3g}"


def assert_families_agree(expected: dict[str, Tensor], found: list[dict[str, Tensor]]) -> None:
    for mine in found:
        assert set(mine) == set(expected)
        for name, reference in expected.items():
            error = float((mine[name].double() - reference.double()).norm())
            allowed = TOLERANCE[name.partition("/")[0]] * (float(reference.double().norm()) + 1e-3)
            assert error <= allowed, f"{name}: differs by {error:.3g}"


def test_a_sharded_step_of_any_family_equals_one_process(two: list[dict[str, Tensor]]) -> None:
    """Every case, and a few with dropout and in float32, in the smallest micro-batches."""
    assert_families_agree(of_any_family(SHORT), [under(found, "any family/") for found in two])


@pytest.mark.slow
def test_a_sharded_step_of_every_family_equals_one_process_with_dropout_and_in_float32() -> None:
    assert_families_agree(of_any_family(WHOLE), on_processes(2, partial(of_any_family, WHOLE)))


# What all of them must do alike.


def a_nan_on_the_last_process() -> Tensor:
    method, batch = flava.case("pairs", torch.float64, 0.0)
    if distributed.rank() == distributed.world() - 1:
        method.model.logit_scale.register_hook(lambda grad: grad * float("nan"))
    optimizer = torch.optim.SGD(method.parameters(), lr=0.1)
    mine = share_of_this_process(split(batch, 2))
    return torch.tensor(step(method, mine, Key(0, "pairs", 0), optimizer).accepted)


def test_what_is_not_finite_on_one_process_is_skipped_by_all(two: list[dict[str, Tensor]]) -> None:
    assert not any(found["accepted with a NaN on the second process"] for found in two)


class Drawings:
    """Six pictures of stripes, which the second process may not read: what they teach is learned once."""

    def __len__(self) -> int:
        return 6

    def blocks(self) -> list[range]:
        return [range(6)]

    def lengths(self) -> None:
        return None

    def read(self, image_row: int, text_row: int) -> Sample:
        assert distributed.rank() == 0, "learned twice"
        file = io.BytesIO()
        Image.linear_gradient("L").rotate(60 * image_row).resize((32, 32)).convert("RGB").save(file, "PNG")
        return {"image": file.getvalue(), "name": f"stripe {image_row}"}


def learned_from_data() -> dict[str, Tensor]:
    views = Views(flava.TINY.image_size)
    sources = Sources(None, Drawings(), None, None, None, None)
    codebook = make_image_tokenizer(Data(), sources, views, flava.TINY, seed=distributed.rank())
    method = flava_method(random_flava(dtype=torch.float32))
    method.image_tokenizer = codebook
    stream = Stream("images", Drawings(), ImageCollate(ImageInput(views, flava.TINY.patch_size, None), True), 4, 4)
    start_at_frequencies(method, [stream], (), seed=0)
    return {"centres": codebook.centres, "bias": method.model.mim_head.decoder.bias}


def test_the_first_process_learns_codebook_and_frequencies_for_all(two: list[dict[str, Tensor]]) -> None:
    alone = learned_from_data()
    assert len(alone["centres"].unique(dim=0)) > 3
    for found in two:
        for name, value in alone.items():
            assert torch.equal(found[f"learned/{name}"], value), name


def a_mistake_of_the_first_process() -> Tensor:
    def make() -> list[Tensor]:
        raise TriviumError("there is no picture to learn from")

    expected = "there is no picture" if distributed.rank() == 0 else "the first process stopped"
    with pytest.raises(TriviumError, match=expected):
        distributed.from_first(make)
    return torch.tensor(True)


def test_a_mistake_while_the_first_process_learns_stops_both(two: list[dict[str, Tensor]]) -> None:
    assert all(found["refused"] for found in two)
