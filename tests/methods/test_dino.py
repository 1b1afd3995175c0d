"""DINO's method against its plain form: one forward a crop, the loss pair by pair, all positions, means as the paper
writes them. float64: values and gradients within 1e-10.

B rows, V crops, N patches, K prototypes.
"""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from tests.dino_batches import TINY, dino_method, gradients, make_batch, random_dino, split
from trivium.methods.dino import DinoMethod, Distillation
from trivium.methods.pixels import Pixels
from trivium.models.dino import Dino
from trivium.train.monitors import health
from trivium.train.protocol import Batch, Key
from trivium.train.step import backward, measure, step

KEY = Key(0, "crops", 40)


def outputs_of(model: Dino, pixels_BCHW: Tensor, masked_BN: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Class tokens, their logits and those of patches, of one crop."""
    tokens = model.encode_image((pixels_BCHW.double() / 255 - 0.5) / 0.25, masked_BN).tokens
    return tokens[:, 0], model.head(tokens[:, 0]), model.head(tokens[:, 1:])


def plain_losses(method: DinoMethod, batch: Batch) -> dict[str, Tensor]:
    """Means over the batch, without any trick."""
    masks = batch.targets["patch_mask"].unbind(1) if method.weights["ibot"] else (None, None)
    with torch.no_grad():
        taught = [outputs_of(method.teacher, images.pixels_BCHW) for images in batch.images[:2]]
    crops = [
        outputs_of(method.model, images.pixels_BCHW, mask)
        for images, mask in zip(batch.images, [*masks, *[None] * (len(batch.images) - 2)], strict=True)
    ]
    if method.distillation.centring == "mean":
        shares = [((logits - method.center) / method.temperature).softmax(-1) for _, logits, _ in taught]
    else:
        Q = (torch.cat([logits for _, logits, _ in taught]) / method.temperature).exp().t()
        for _ in range(3):
            Q = Q / Q.sum(1, keepdim=True)
            Q = Q / Q.sum(0, keepdim=True)
        shares = list(Q.t().chunk(2))
    pairs = [
        -(shares[q] * F.log_softmax(crops[v][1] / method.distillation.student_temperature, -1)).sum(-1).mean()
        for q in range(2)
        for v in range(len(crops))
        if v != q
    ]
    losses = {"crops": torch.stack(pairs).mean()}
    if method.weights["koleo"]:
        found = []
        for class_BD, _, _ in crops[:2]:
            unit = F.normalize(class_BD, dim=-1)
            distances = torch.stack([torch.stack([(a - b).norm() for b in unit]) for a in unit])
            distances = distances + 9 * torch.eye(len(unit))
            found.append(-(distances.min(1).values + 1e-8).log())
        losses["koleo"] = torch.stack([of_crop.mean() for of_crop in found]).sum()
    if method.weights["ibot"]:
        found = []
        for (_, _, student_BNK), (_, _, teacher_BNK), mask_BN in zip(crops[:2], taught, masks, strict=True):
            assert mask_BN is not None
            share = ((teacher_BNK - method.patch_center) / method.temperature).softmax(-1)
            crossed_BN = -(share * F.log_softmax(student_BNK / 0.1, -1)).sum(-1)
            found += [crossed_BN[b, mask_BN[b]].mean() if mask_BN[b].any() else crossed_BN.new_zeros(()) for b in
                      range(len(mask_BN))]  # fmt: skip
        losses["ibot"] = torch.stack(found).mean()
    return losses


CASES: dict[str, dict[str, Any]] = {
    "as published": {},
    "sinkhorn": {"centring": "sinkhorn"},
    "koleo": {"weights": {"koleo": 0.1}},
    "ibot": {"weights": {"ibot": 0.7}},
    "all at once": {"weights": {"koleo": 0.1, "ibot": 1.0}, "centring": "sinkhorn"},
}


@pytest.mark.parametrize("num_local", [0, 3])
@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_plain_one(case: str, micro_batches: int, num_local: int) -> None:
    method, batch = dino_method(random_dino(), **CASES[case]), make_batch(6, num_local=num_local)
    method.schedule(KEY.step)
    sums, counts, _ = backward(method, split(batch, micro_batches), KEY)
    mine = {name: value / counts[name] for name, value in sums.items() if not name.startswith("stat/")}
    my_grads = {name: grad.clone() for name, grad in gradients(method).items()}
    method.zero_grad(set_to_none=True)
    plain = plain_losses(method, batch)
    torch.stack([method.weights[name] * value for name, value in plain.items()]).sum().backward()
    assert set(mine) == set(plain)
    for name, value in plain.items():
        assert float(mine[name]) == pytest.approx(value.item(), rel=1e-10), name
    plain_grads = gradients(method)
    assert set(my_grads) == set(plain_grads), set(my_grads) ^ set(plain_grads)
    assert not any(name.startswith("teacher") for name in my_grads)
    for name, grad in plain_grads.items():
        assert float((my_grads[name] - grad).abs().max()) <= 1e-10 * max(1.0, float(grad.abs().max())), name


def test_local_crops_as_large_as_global_ones_go_along() -> None:
    method, batch = dino_method(random_dino()), make_batch(4, num_local=1)
    batch.images = (*batch.images[:2], batch.images[0], batch.images[1], batch.images[2])
    sums, counts, _ = backward(method, [batch], KEY)
    assert float(sums["crops"] / counts["crops"]) == pytest.approx(plain_losses(method, batch)["crops"].item())


def one_step(method: DinoMethod, batch: Batch, parts: int = 1, lr: float = 0.1) -> Any:
    trained = [p for p in method.parameters() if p.requires_grad]
    return step(method, split(batch, parts), KEY, torch.optim.SGD(trained, lr))


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", ["as published", "ibot", "sinkhorn"])
def test_teacher_and_centre_move_after_the_update_as_the_paper_says(case: str, parts: int) -> None:
    """theta_t <- l theta_t + (1 - l) theta_s, with the student *after* its update; equation 4 for the centre, from the
    teacher before it moved."""
    method, batch = dino_method(random_dino(), **CASES[case]), make_batch(4)
    teacher, center = copy.deepcopy(method.teacher), method.center.clone()
    patch_center = None if method.patch_center is None else method.patch_center.clone()
    assert one_step(method, batch, parts).accepted
    momentum = 1 - 0.004 * (1 + math.cos(math.pi * 0.4)) / 2
    students = zip(teacher.parameters(), method.model.parameters(), method.teacher.parameters(), strict=True)
    for before, student, after in students:
        assert torch.allclose(after, momentum * before + (1 - momentum) * student, rtol=0, atol=1e-14)
    taught = [outputs_of(teacher, images.pixels_BCHW) for images in batch.images[:2]]
    mean = torch.cat([logits for _, logits, _ in taught]).mean(0)
    expected = center if case == "sinkhorn" else 0.9 * center + 0.1 * mean
    assert torch.allclose(method.center, expected, rtol=0, atol=1e-13)
    if patch_center is not None:
        hidden = torch.cat([t[2][batch.targets["patch_mask"][:, crop]] for crop, t in enumerate(taught)])
        assert torch.allclose(method.patch_center, 0.9 * patch_center + 0.1 * hidden.mean(0), rtol=0, atol=1e-13)


def test_a_skipped_step_changes_nothing() -> None:
    method, batch = dino_method(random_dino()), make_batch(4)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    with torch.no_grad():
        method.model.head.mlp[0].bias[0] = torch.inf
    before["model.head.mlp.0.bias"] = method.model.head.mlp[0].bias.clone()
    assert not one_step(method, batch).accepted
    assert all(torch.equal(tensor, before[name]) for name, tensor in method.state_dict().items())
    assert method.teacher_entropy.isnan()


def test_a_centre_that_is_not_finite_skips_the_step() -> None:
    """The loss may be finite where the teacher's outputs, whose mean is the centre, are not."""
    method, batch = dino_method(random_dino()), make_batch(4)
    with torch.no_grad():
        method.teacher.head.gain[3] = -torch.inf
    center = method.center.clone()
    assert not one_step(method, batch).accepted
    assert torch.equal(method.center, center)


def test_momentum_and_temperature_are_functions_of_the_share_of_the_run() -> None:
    """Against the arrays of the published code: a cosine over all steps; a line over the warm-up, then constant."""
    settings = Distillation(first_teacher_temperature=0.04, teacher_temperature=0.07, temperature_warmup=0.25)
    steps = 200
    cosine = [1 + 0.5 * (0.996 - 1) * (1 + math.cos(math.pi * i / steps)) for i in range(steps)]
    assert [settings.momentum_at(i, steps) for i in range(steps)] == pytest.approx(cosine, rel=1e-14)
    assert settings.momentum_at(steps, steps) == 1
    found = [settings.temperature_at(i, steps) for i in range(steps)]
    assert found[0] == 0.04
    assert found[25] == pytest.approx(0.055)
    assert set(found[50:]) == {0.07}
    assert replace(settings, temperature_warmup=0.0).temperature_at(0, steps) == 0.07


def test_the_teacher_stands_still_in_evaluation_and_drops_nothing_in_training() -> None:
    config = replace(TINY, dropout=0.3, drop_path=0.3)
    method, batch = dino_method(random_dino(config)), make_batch(4)
    state = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    first, second = (measure(method, [split(batch, parts)], KEY)["crops"] for parts in (1, 2))
    assert first == pytest.approx(second, rel=1e-12)
    assert all(torch.equal(tensor, state[name]) for name, tensor in method.state_dict().items())
    method.train()
    assert method.model.training and not any(module.training for module in method.teacher.modules())
    assert method.exported() is method.teacher
    sums, _, _ = backward(method, [batch], KEY)
    other, _, _ = backward(method, [batch], Key(0, "crops", 41))
    assert not torch.equal(sums["crops"], other["crops"])  # the student drops
    assert torch.equal(sums["stat/center"], other["stat/center"])  # the teacher does not


def test_collapse_is_seen_in_what_a_method_watches() -> None:
    method, batch = dino_method(random_dino()), make_batch(8)
    one_step(method, batch)
    shares = [((outputs_of(method.teacher, i.pixels_BCHW)[1]) / 0.07).softmax(-1) for i in batch.images[:2]]
    assert 0 < float(method.teacher_entropy) < 1
    assert len(shares) == 2
    uniform = dino_method(random_dino(), teacher_temperature=1e6)
    one_step(uniform, batch)
    assert float(uniform.teacher_entropy) == pytest.approx(1.0, abs=1e-6)
    one_answer = dino_method(random_dino(), teacher_temperature=1e-4)
    with torch.no_grad():
        one_answer.center[3] = -50.0
        one_answer.model.backbone.norm.weight.zero_()  # one feature for every picture
    one_step(one_answer, batch)
    assert float(one_answer.prototypes_entropy) == pytest.approx(0.0, abs=1e-6)
    assert float(one_answer.feature_deviation) == pytest.approx(0.0, abs=1e-6)
    crossed = {
        name: {finding.subject for finding in health(each) if finding.crossed}
        for name, each in (("uniform", uniform), ("one", one_answer))
    }
    assert "teacher_entropy" in crossed["uniform"]
    assert {"prototypes_entropy", "feature_deviation"} <= crossed["one"]


def test_feature_deviation_and_entropies_by_hand() -> None:
    method, batch = dino_method(random_dino()), make_batch(6)
    teacher, center, student = copy.deepcopy(method.teacher), method.center.clone(), copy.deepcopy(method.model)
    one_step(method, batch)
    unit = F.normalize(outputs_of(student, batch.images[0].pixels_BCHW)[0], dim=-1)
    deviation = unit.var(0, correction=0).sum().sqrt()
    assert float(method.feature_deviation) == pytest.approx(deviation.item(), rel=1e-9)
    logits = torch.cat([outputs_of(teacher, images.pixels_BCHW)[1] for images in batch.images[:2]])
    share = ((logits - center) / method.temperature).softmax(-1)
    entropies = [-(p * p.log()).sum(-1).mean().item() / math.log(24) for p in (share, share.mean(0))]
    assert float(method.teacher_entropy) == pytest.approx(entropies[0], rel=1e-9)
    assert float(method.prototypes_entropy) == pytest.approx(entropies[1], rel=1e-9)


def test_half_precision_keeps_logits_in_float32() -> None:
    model = random_dino(dtype=torch.float32)
    method = DinoMethod(model, Pixels((0.5,) * 3, (0.25,) * 3), Distillation(), 10)
    with torch.autocast("cpu", torch.bfloat16):
        seen = method._look(make_batch(3))
    assert seen.student_VBK.dtype == seen.teacher_2BK.dtype == torch.float32
    exact = method._look(make_batch(3))
    assert (seen.student_VBK - exact.student_VBK).abs().max() < 0.1
