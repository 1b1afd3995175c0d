"""What features must beat: the differences are those of the figures, picture by picture."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.dino_batches import random_dino
from trivium.bundle import Bundle
from trivium.data.transforms import ImageTransform
from trivium.evaluate import embedded, features, floors, knn
from trivium.evaluate.embedded import Evaluation


def bundle(seed: int) -> Bundle:
    return Bundle("dino", random_dino(seed=seed, dtype=torch.float32).eval(), None, ImageTransform(32))


def test_neighbours_and_floors() -> None:
    found = Evaluation(results=floors.neighbours(bundle(0)))
    floors.add(found, bundle(1))
    for figure in floors.FIGURES:
        value = found.results[f"knn.{figure}"].value
        for floor in ("random_start", "pixels"):
            difference = found.results[f"above.{floor}.knn.{figure}"]
            assert difference.value == pytest.approx(value - found.results[f"knn.{floor}.{figure}"].value, abs=1e-6)
            assert difference.low is not None and difference.high is not None
            assert difference.low <= difference.value <= difference.high
    same = Evaluation(results=floors.neighbours(bundle(1)))
    floors.add(same, bundle(1))
    difference = same.results["above.random_start.knn.other_concepts.subgroup"]
    assert (difference.low, difference.value, difference.high) == (0.0, 0.0, 0.0)


def test_pixels_vote_as_the_plain_rule_says() -> None:
    found = Evaluation(results=floors.neighbours(bundle(0)))
    floors.add(found, bundle(1))
    noto, gallery = embedded.queries_and_gallery(bundle(0))
    rows, queries = features.of_pixels(gallery.pixels), features.of_pixels(noto.pixels)
    names = sorted({record.subgroup for record in noto.records} - {""})
    labels, answers = (
        np.array([names.index(r.subgroup) if r.subgroup in names else -1 for r in drawn.records])
        for drawn in (noto, gallery)
    )
    known, usable = torch.from_numpy(labels >= 0), torch.from_numpy(answers >= 0)
    mean = rows.mean(0)
    predicted = knn.predict((queries - mean)[known], (rows - mean)[usable], torch.from_numpy(answers)[usable])
    right = (predicted == torch.from_numpy(labels)[known]).float().mean()
    assert found.results["knn.pixels.subgroup"].value == pytest.approx(float(right), abs=1e-6)
