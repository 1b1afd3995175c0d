"""What the ablation measures on held-out pairs of one's own, and what it says of those that it cannot use."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest

from tests.recipes.shop import THINGS, drawing
from tests.search.conftest import make_bundle
from trivium.data.sources import open_source
from trivium.evaluate.ablation_figures import measure

CAPTIONS = [f"a {colour} {shape}" for colour, shape in THINGS[:6]]


def table(folder: Path, captions: list[str]) -> Path:
    """The third picture is no picture."""
    with (folder / "held-out.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number, ((colour, shape), caption) in enumerate(zip(THINGS, captions, strict=False)):
            drawing(colour, shape).save(folder / f"{number}.png")
            writer.writerow([f"{number}.png", caption])
    (folder / "2.png").write_bytes(b"<html>404</html>")
    return folder / "held-out.csv"


def test_true_pairs_above_false_ones_and_a_broken_one_is_told(tmp_path: Path) -> None:
    bundle, said = make_bundle(0), []
    source = open_source("pairs", [table(tmp_path, CAPTIONS)])
    found = measure(bundle, ("retrieval", "matching"), pairs_held_out=source, say=said.append)
    [told] = [sentence for sentence in said if sentence.startswith("left out: ")]
    assert "a pair that cannot be read" in told and "held-out.csv" in told
    assert found["retrieval.pairs.text_to_image_r10"].n == found["retrieval.pairs.image_to_text_r10"].n == 5
    kept = [0, 1, 3, 4, 5]
    own = [float(bundle.match(str(tmp_path / f"{n}.png"), [CAPTIONS[n]])) for n in kept]
    others = [
        float(bundle.match(str(tmp_path / f"{n}.png"), [CAPTIONS[other]]))
        for n, other in zip(kept, [*kept[1:], kept[0]], strict=True)
    ]
    difference = np.subtract.outer(own, others)
    expected = ((difference > 0) + 0.5 * (difference == 0)).mean()
    assert found["itm.auroc"].value == pytest.approx(expected)


def test_pairs_that_all_say_the_same_are_not_matched_and_that_is_told(tmp_path: Path) -> None:
    said: list[str] = []
    source = open_source("pairs", [table(tmp_path, ["a thing"] * 4)])
    found = measure(make_bundle(0), ("retrieval", "matching"), pairs_held_out=source, say=said.append)
    assert not any(name.startswith("itm") for name in found)
    assert any("matching is not measured" in sentence for sentence in said)
