"""The probe and its peer in small: the same values of C from the same starts, judged on the same rows."""

from __future__ import annotations

import io
from pathlib import Path

import linear_probe
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

SMALL = linear_probe.synthetic(600, 12, 3)


@pytest.mark.filterwarnings("ignore:lbfgs failed to converge")
def test_both_search_the_same_values_and_come_to_the_same() -> None:
    found = linear_probe.search_case(SMALL, rounds=1)
    assert found["order"][:3] == [1e-6, 1e-4, 1e-2] and len(found["order"]) <= 15
    assert sorted(found["order"]) == [each["c"] for each in found["fits"]]
    for each in found["fits"]:
        assert each["above"] < 1e-4, "no worse than the peer anywhere"
        if 1e-3 < each["c"] < 1:
            assert each["above"] == pytest.approx(0, abs=1e-3)
            assert each["ours"]["accuracy"] == pytest.approx(each["peer"]["accuracy"], abs=0.02)
    best = {name: max(each[name]["accuracy"] for each in found["fits"]) for name in ("ours", "peer")}
    at = {each["c"]: each for each in found["fits"]}
    for name in ("ours", "peer"):
        assert at[found["chosen"][name]][name]["accuracy"] == best[name]


def test_a_fit_starts_from_the_one_that_the_plan_names() -> None:
    peer, ours = linear_probe.Peer(SMALL, 1e-4), linear_probe.Ours(SMALL, 1e-4)
    for side in (peer, ours):
        side.run([(0.01, None), (1.0, None), (1.0001, 1.0)])
        assert side.fits[1.0001][2] <= 2 < side.fits[1.0][2], "it was nearly there"


def test_tolerances_alike_give_objectives_and_accuracies_alike() -> None:
    found = linear_probe.cifar10_case(SMALL, linear_probe.synthetic(900, 12, 3), rounds=1)
    assert [each["c"] for each in found["fits"]] == list(linear_probe.OF_PIXELS)
    assert all(abs(each["above"]) < 1e-4 for each in found["fits"])
    apart = [abs(each["ours"]["accuracy"] - each["peer"]["accuracy"]) for each in found["fits"]]
    assert found["accuracy_apart"] == max(apart) <= 0.005


def test_pictures_are_read_as_means_of_four_by_four_pixels(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(picture).save(file, "PNG")
    pq.write_table(pa.table({"image": [file.getvalue()] * 2, "label": [3, 1]}), tmp_path / "train.parquet")
    features_ND, labels_N = linear_probe.pixels(tmp_path / "train.parquet")
    means = picture.reshape(8, 4, 8, 4, 3).mean((1, 3)).ravel() / 255
    assert labels_N.tolist() == [3, 1]
    torch.testing.assert_close(features_ND[1].double(), torch.from_numpy(means), atol=0.5 / 255 + 1e-6, rtol=0)
