"""Where the tensors of a model stand in another layout, and how they are moved there and back, bit for bit."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.convert.weights import State, listed
from trivium.errors import TriviumError


@dataclass(frozen=True)
class Place:
    """Where one tensor of ours stands in another layout."""

    ours: str
    theirs: tuple[str, ...]  # several: pieces that are stacked (q, k, v), or one tensor under several names (tied)
    kind: str = "plain"  # plain | stacked | tied | transposed
    shape: tuple[int, ...] | None = None  # of theirs, where it holds the same numbers in another shape


def pair(ours: str, theirs: str) -> Iterator[Place]:
    """A weight and a bias."""
    for part in ("weight", "bias"):
        yield Place(f"{ours}.{part}", (f"{theirs}.{part}",))


def take(
    state: Mapping[str, Tensor],
    places: Iterable[Place],
    shapes: Mapping[str, tuple[int, ...]],
    family: str,
    optional: Sequence[str] = (),
) -> State:
    """Tensors of theirs -> ours, every one accounted for.

    Args:
        shapes: of ours, by name.
        family: how a message calls it.
        optional: beginnings of our names; a file may lack each such part as a whole, never half of one.

    Raises:
        TriviumError: missing, unexpected or wrongly shaped tensors (the first five and how many).
    """
    places = list(places)
    left = set(state)
    taken: State = {}
    missing: list[str] = []
    for place in places:
        there = [name for name in place.theirs if name in state]
        if len(there) < len(place.theirs) and not (place.kind == "tied" and there):
            missing += [name for name in place.theirs if name not in state]
            continue
        left -= set(there)
        pieces = [state[name] for name in there]
        if place.kind == "tied" and not all(torch.equal(piece, pieces[0]) for piece in pieces):
            raise TriviumError(
                f"{' and '.join(there)} are one tensor in {family}, but differ here: the file is damaged"
            )
        tensor = torch.cat(pieces) if place.kind == "stacked" else pieces[0]
        wanted = shapes[place.ours]
        of_theirs = wanted[::-1] if place.kind == "transposed" else place.shape
        if tuple(tensor.shape) not in ({of_theirs} if place.kind == "transposed" else {wanted, of_theirs}):
            raise TriviumError(
                f"{there[0]} has shape {list(tensor.shape)} where its config makes {list(of_theirs or wanted)}: "
                "weights and config belong to different models"
            )
        taken[place.ours] = tensor.t().contiguous() if place.kind == "transposed" else tensor.reshape(wanted)
    ours_of = {name: place.ours for place in places for name in place.theirs}
    whole = tuple(part for part in optional if not any(name.startswith(part) for name in taken))
    missing = [name for name in missing if not ours_of[name].startswith(whole)]
    if missing or left:
        found = [listed("misses", missing), listed("has unexpected", sorted(left))]
        raise TriviumError(f"this {family} checkpoint {' and '.join(part for part in found if part)}")
    return taken


def give(state: Mapping[str, Tensor], places: Iterable[Place]) -> State:
    """Ours under their names. Tensors may be views."""
    return dict(pair for place in places for pair in _given(place, state[place.ours]))


def _given(place: Place, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    if place.kind == "stacked":
        yield from zip(place.theirs, tensor.chunk(len(place.theirs)), strict=True)
        return
    for name in place.theirs:
        if place.kind == "transposed":
            yield name, tensor.t()
        else:
            yield name, tensor if place.shape is None else tensor.reshape(place.shape)
