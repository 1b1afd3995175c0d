"""What features of pictures alone must beat: the same network before training, and no network at all.

Nearest neighbours on the embedded drawings, as in the suite (embedded.py), and the difference picture by picture with
its interval: above 0 at its low end, features are better by more than chance.
"""

from __future__ import annotations

import numpy as np

from trivium.bundle import Bundle
from trivium.evaluate import embedded, features
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result, Results, mean_of

FLOORS = ("random_start", "pixels")
FIGURES = ("group", "subgroup", "other_concepts.group", "other_concepts.subgroup")


def neighbours(bundle: Bundle, name: str = "knn") -> Results:
    """Nearest neighbours of a model's class tokens: a few seconds, for the midst of a run."""
    found = Evaluation()
    noto, gallery = embedded.queries_and_gallery(bundle)
    queries, rows = (getattr(drawn.of_model, embedded.PROBE_READING) for drawn in (noto, gallery))
    embedded.votes(found, name, noto, gallery, queries, rows)
    return found.results


def add(found: Evaluation, untrained: Bundle) -> None:
    """Both floors, and how much better each figure is than they are: `above.pixels.knn.subgroup` and so on.

    Args:
        found: with nearest neighbours of the trained model in it.
        untrained: the model as it was before its first step.
    """
    noto, gallery = embedded.queries_and_gallery(untrained)
    queries, rows = (getattr(drawn.of_model, embedded.PROBE_READING) for drawn in (noto, gallery))
    embedded.votes(found, "knn.random_start", noto, gallery, queries, rows)
    queries, rows = features.of_pixels(noto.pixels), features.of_pixels(gallery.pixels)
    mean = rows.mean(dim=0)
    embedded.votes(found, "knn.pixels", noto, gallery, queries - mean, rows - mean)
    for floor in FLOORS:
        for figure in FIGURES:
            difference = _difference(found.results[f"knn.{figure}"], found.results[f"knn.{floor}.{figure}"])
            found.results[f"above.{floor}.knn.{figure}"] = difference


def _difference(figure: Result, floor: Result) -> Result:
    assert figure.outcomes is not None and floor.outcomes is not None
    assert figure.outcomes.units == floor.outcomes.units
    kept = figure.outcomes
    return mean_of(np.asarray(kept.values) - np.asarray(floor.outcomes.values), kept.units, kept.groups)
