"""A matching head or projections that nothing has trained: what needs them is refused, since it would be chance.

Files of other libraries may lack them (ALBEF's vqa.pth, ve and nlvr all three), and then they are drawn at random.
"""

from __future__ import annotations

from collections.abc import Collection

MATCHING = ("itm_head",)
COSINE = ("image_projection", "text_projection")


def among(parts: Collection[str], *, matching: bool = False, cosine: bool = False) -> tuple[str, ...]:
    """Those of `parts` that are a matching head or a projection, less what training reaches.

    matching, cosine: whether a loss trains the matching head, and whether one trains the projections.
    """
    left = (() if matching else MATCHING) + (() if cosine else COSINE)
    return tuple(part for part in left if part in parts)


def no_matching(parts: Collection[str]) -> str | None:
    """Why a model with these untrained parts judges no pair; None where it may."""
    if not set(MATCHING).isdisjoint(parts):
        return "nothing has trained this model's matching head, which is drawn at random where a file has none"
    return None


def no_cosine(parts: Collection[str]) -> str | None:
    """Why pictures and texts have no common space in a model with these untrained parts; None where they may."""
    if not set(COSINE).isdisjoint(parts):
        return (
            "nothing has trained this model's projections to the space that pictures and texts share, which are drawn"
            " at random where a file has none"
        )
    return None
