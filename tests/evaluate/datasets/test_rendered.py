"""Our own rendering of sentences: legible, told apart, and never beside a published score."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from trivium.evaluate.datasets import find
from trivium.evaluate.datasets.layouts import BY_NAME
from trivium.evaluate.datasets.pictures import DataSet
from trivium.evaluate.datasets.rendered import SIDE, SIZES, rendered
from trivium.evaluate.paper_tasks import OWN, SUITES
from trivium.evaluate.published import columns

LONG = "one of those films that only someone with a heart of stone could possibly dislike , even at its great length . "


def test_a_sentence_is_drawn_inside_the_picture_and_a_longer_one_smaller() -> None:
    short, long = rendered("a gem ."), rendered(LONG * 4)
    for picture in (short, long):
        assert picture.shape == (SIDE, SIDE, 3) and picture.dtype == np.uint8
        assert picture.min() < 30 and (picture == 255).mean() > 0.5, "black on white"
        assert (picture[:, :20] == 255).all() and (picture[-20:] == 255).all(), "nothing runs over the edge"

    def height_of_first_line(picture: np.ndarray) -> int:
        rows = (picture[..., 0] < 128).any(axis=1)
        first = int(rows.argmax())
        return int((~rows[first:]).argmax())

    assert height_of_first_line(short) > 1.5 * height_of_first_line(long)
    assert not np.array_equal(rendered("good"), rendered("bad"))
    assert np.array_equal(rendered("good"), rendered("good"))


def test_what_no_size_fits_is_cut_and_ends_in_no_error() -> None:
    assert rendered("word " * 3000).shape == rendered("w" * 500).shape == (SIDE, SIDE, 3)
    assert rendered("").min() == 255 and len(SIZES) > 1


def test_the_sentences_of_glue_with_their_labels(tmp_path: Path) -> None:
    folder = tmp_path / "glue" / "SST-2"
    folder.mkdir(parents=True)
    (folder / "train.tsv").write_text("sentence\tlabel\na gem .\t1\na bore .\t0\nbroken\n")
    (folder / "dev.tsv").write_text("sentence\tlabel\nfun\t1\n")
    data = find(BY_NAME["rendered_sst2_own"], tmp_path)
    assert isinstance(data, DataSet)
    assert data.classes == ("negative", "positive") and data.prompts == ("a negative review", "a positive review")
    assert data.train.labels_N.tolist() == [1, 0] and data.test.labels_N.tolist() == [1]
    assert np.array_equal(data.train.pictures.read(1), rendered("a bore ."))
    assert "1 of 3 lines of train.tsv cannot be used and are left out" in data.notes
    assert "not the official pictures" in data.splits


def test_no_paper_stands_beside_it_and_no_suite_of_a_paper_holds_it() -> None:
    assert columns(OWN) == []
    assert not any(task in SUITES[name] for name in SUITES if name != "own" for task in OWN)
    assert not any(figure.averaged for task in OWN for figure in task.figures)
