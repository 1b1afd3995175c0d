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
from trivium import invariance
from trivium.data.collate import ImageCollate, ImageInput
from trivium.data.views import Views
from trivium.errors import TriviumError
from trivium.invariance import (
    CASES,
    DROPOUT,
    MICRO_BATCHES,
    Deviation,
    Layout,
    Make,
    flava,
    on_processes,
    share_of_this_process,
    split,
)
from trivium.recipes.data import Data, Sources, make_image_tokenizer
from trivium.recipes.priors import start_at_frequencies
from trivium.train import distributed
from trivium.train.protocol import Batch, Key, Method, Sample, Stream
from trivium.train.sharding import shard
from trivium.train.step import backward, step

CLIPS = ("none", "global", "per_tensor")
STEPS = (  # precision, stream, micro-batches
    *(("float64", "pairs", 2), ("float64", "pairs", 8), ("float64", "images", 2), ("float64", "text", 2)),
    ("float32", "pairs", 8),
)
SMALLEST = max(MICRO_BATCHES)
SHORT = {
    Layout(2, 2, 0.0, "float64"): tuple(CASES),
    Layout(2, SMALLEST, DROPOUT, "float64"): ("FLAVA, pairs", "DINO"),
    Layout(2, SMALLEST, 0.0, "float32"): ("ALBEF",),
}
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def two() -> list[dict[str, Tensor]]:
    return on_processes(2, everything)


@pytest.fixture(scope="module")
def one() -> dict[str, Tensor]:
    return sharded_steps()


def everything() -> dict[str, Tensor]:
    found = {f"sharded/{name}": value for name, value in sharded_steps().items()}
    found |= {f"any family/{name}": value for name, value in of_any_family().items()}
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


def in_parts(make: Make, dtype: torch.dtype, dropout: float) -> tuple[Method, Batch]:
    """A case of invariance, its method in parts where there are several processes."""
    method, batch = make(dtype, dropout)
    if distributed.world() > 1:
        shard(method, getattr(method.model, "blocks", list)(), CPU)  # a fine-tuned model names none
    return method, batch


def of_any_family() -> dict[str, Tensor]:
    """Losses and whole gradients of the short form. On one process: what they are compared with."""
    return {
        f"{layout}|{case}: {name}": value
        for layout, cases in SHORT.items()
        for case in cases
        for name, value in invariance.losses_and_gradients(
            partial(in_parts, CASES[case]), layout if distributed.world() > 1 else layout.reference
        ).items()
    }


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


def test_a_sharded_step_of_any_family_equals_one_process(two: list[dict[str, Tensor]]) -> None:
    """Every case, and a few with dropout and in float32, in the smallest micro-batches."""
    whole = of_any_family()
    for found in two:
        for layout in SHORT:
            mine, reference = under(found, f"any family/{layout}|"), under(whole, f"{layout}|")
            deviation = Deviation(layout, *invariance._deviation(mine, reference))
            assert deviation.within and len(reference) > 50, deviation


@pytest.mark.slow
def test_a_sharded_step_of_every_family_equals_one_process_at_all_layouts() -> None:
    """What a step that is not in parts is held to: any micro-batch, dropout, both precisions."""
    found = invariance.compare({name: partial(in_parts, make) for name, make in CASES.items()}, worlds=(2,))
    of_two = [each for each in found if each.layout.processes == 2]
    assert len(of_two) == 2 * (3 + 1)
    assert all(each.within and each.worst > 0 for each in of_two), "\n".join(map(str, of_two))


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
