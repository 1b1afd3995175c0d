"""An average of weights: all tensors in one call against one after the other."""

from __future__ import annotations

import torch
from torch import nn

from trivium.methods.momentum import follow, follower


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_following_is_the_plain_average_of_every_parameter() -> None:
    student, teacher = model().double(), follower(model().double())
    plain = [p.clone() for p in teacher.parameters()]
    buffers = [b.clone() for b in teacher.buffers()]
    for momentum in (0.9, 0.996, 1.0, 0.0):
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.add_(torch.randn_like(parameter))
            student[1].running_mean.add_(1)  # type: ignore[operator, union-attr]
            for mine, theirs in zip(plain, student.parameters(), strict=True):
                mine.mul_(momentum).add_((1 - momentum) * theirs)
        follow(teacher, student, momentum)
        for expected, parameter in zip(plain, teacher.parameters(), strict=True):
            assert torch.allclose(parameter, expected, rtol=1e-14, atol=1e-15)
    assert all(torch.equal(a, b) for a, b in zip(buffers, teacher.buffers(), strict=True))  # parameters alone


def test_a_follower_is_a_copy_without_gradient() -> None:
    student = model()
    teacher = follower(student)
    assert not any(p.requires_grad for p in teacher.parameters())
    assert all(p.requires_grad for p in student.parameters())
    assert all(
        torch.equal(a, b) and a is not b for a, b in zip(teacher.parameters(), student.parameters(), strict=True)
    )
