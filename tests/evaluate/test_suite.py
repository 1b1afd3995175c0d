"""The suite on miniatures: what is there is measured, what is not is listed, what was done is kept."""

from __future__ import annotations

import csv
import errno
import html
import io
import json
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from sklearn.metrics import balanced_accuracy_score

from tests.cli.test_evaluate import Addresses
from tests.data.test_vqa import vqa
from tests.evaluate.datasets import miniatures
from tests.evaluate.datasets.test_captions import CAPTIONS, flickr
from tests.evaluate.test_grounding import tiny_bundle
from tests.test_load import new_bundle
from trivium.bundle import Bundle
from trivium.bundle.hashes import model_hash
from trivium.data import duplicates
from trivium.data.detection import find_val
from trivium.data.glue import GLUE
from trivium.data.referring import read_referring
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.transforms import ImageTransform
from trivium.evaluate import comparable, detection, feature_store, grounding, suite, suite_report, task_runs
from trivium.evaluate.classification import Measured, accuracies, classification, leakage
from trivium.evaluate.datasets import find, layouts
from trivium.evaluate.datasets.captions import BY_NAME as CAPTIONED
from trivium.evaluate.datasets.captions import Captioned
from trivium.evaluate.datasets.pictures import DataSet, PictureFiles
from trivium.evaluate.feature_store import Features, ModelEncoder, PixelEncoder, features
from trivium.evaluate.paper_tasks import SUITES
from trivium.evaluate.published import Cell, Column
from trivium.evaluate.results import Result
from trivium.evaluate.suite import OwnTask
from trivium.evaluate.suite_report import SuiteReport
from trivium.evaluate.task_runs import SuiteRun, TaskRun
from trivium.evaluate.tuned_runs import TunedRun
from trivium.models.encoded import Matches
from trivium.models.unit import Unit, UnitConfig, UnitTask
from trivium.recipes.tasks import TASKS as TUNED
from trivium.recipes.tasks import TaskData

TASKS = {task.name: task for task in SUITES["flava35"]}


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    torch.manual_seed(3)
    return new_bundle()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets of 35, one of them damaged."""
    folder = tmp_path_factory.mktemp("data")
    miniatures.dtd(folder)
    miniatures.cifar10(folder)
    flickr(folder, "karpathy")
    miniatures.pets(folder)
    (folder / "oxford-iiit-pet" / "annotations" / "test.txt").write_text("Abyssinian_1 2 1 1\n")
    (folder / "cifar-10-batches-py" / "classnames.txt").write_text("a red thing\na pink thing\nan orange thing\n")
    return folder


def data_of(name: str, root: Path) -> DataSet:
    data = find(layouts.BY_NAME[name], root)
    assert isinstance(data, DataSet)
    return data


# ------------------------------------------------------------------------------------------------ features


def test_features_are_those_of_the_model_and_are_kept_by_pieces(
    bundle: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "PIECE", 5)
    monkeypatch.setattr(feature_store, "BATCH", 2)
    pictures = data_of("DTD", root).train.pictures
    encoder = ModelEncoder(bundle)
    seen: list[int] = []

    class Counting(ModelEncoder):
        def __call__(self, pictures):  # type: ignore[no-untyped-def]
            seen.append(len(pictures))
            return super().__call__(pictures)

    found = features(Counting(bundle), pictures, tmp_path)
    assert sum(seen) == len(pictures) == 12
    direct = encoder([pictures.read(row) for row in range(12)])
    for name in ("pooled", "projected"):
        torch.testing.assert_close(found.readings[name], direct[name])
    assert found.rows_N.tolist() == list(range(12))
    [folder] = tmp_path.iterdir()
    pieces = sorted(folder.iterdir())
    assert [piece.name for piece in pieces] == [
        "000000000.safetensors",
        "000000005.safetensors",
        "000000010.safetensors",
    ]
    # One is lost, one damaged: they alone are made again.
    before = pieces[0].stat().st_mtime_ns
    pieces[1].unlink()
    os.truncate(pieces[2], 40)
    seen.clear()
    again = features(Counting(bundle), pictures, tmp_path)
    assert sum(seen) == 7 and pieces[0].stat().st_mtime_ns == before
    torch.testing.assert_close(again.readings["pooled"], found.readings["pooled"])
    assert again.digests == found.digests and np.array_equal(again.colours_NC, found.colours_NC)


def test_of_training_pictures_the_reading_of_the_probe_alone_is_held(
    bundle: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[str]] = []

    def recording(*parts):  # type: ignore[no-untyped-def]
        held.extend(sorted(part.features.readings) for part in parts)
        return []

    monkeypatch.setattr("trivium.evaluate.classification.leakage", recording)
    data, encoder = data_of("CIFAR10", root), ModelEncoder(bundle)
    for _ in ("made", "read again"):
        held.clear()
        measured = classification(data, encoder, tmp_path, bundle)
        assert held == [["pooled"], ["pooled", "projected"]]
    assert "zero_shot.accuracy" in measured.results
    kept = features(encoder, data.train.pictures, tmp_path)
    assert kept.readings.keys() == {"pooled", "projected"}, "all are on the disk"


def test_another_model_or_another_file_is_another_key(bundle: Bundle, tmp_path: Path) -> None:
    miniatures.dtd(tmp_path)
    torch.manual_seed(4)
    other = new_bundle()
    assert model_hash(bundle) != model_hash(other)
    assert model_hash(bundle) == model_hash(bundle)
    train = data_of("DTD", tmp_path).train
    before = feature_store.identity(train.pictures)
    file = tmp_path / "dtd" / "images" / train.pictures.name(0)
    os.utime(file, ns=(1, 1))
    assert feature_store.identity(train.pictures) != before
    assert feature_store.identity(train[np.arange(3)].pictures) != feature_store.identity(train.pictures)


def test_pixels_are_the_floor(root: Path, tmp_path: Path) -> None:
    """Colours alone tell the miniature's classes apart."""
    measured = classification(data_of("DTD", root), PixelEncoder(), tmp_path)
    assert measured.results["linear_probe.accuracy"].value == 1.0
    assert measured.results["knn.accuracy"].value == 1.0
    assert not any(name.startswith("zero_shot") for name in measured.results)


# -------------------------------------------------------------------------------------------- one data set


def part(labels: list[int]):  # type: ignore[no-untyped-def]
    from trivium.evaluate.classification import Part

    empty = Features({}, np.arange(len(labels)), [b""] * len(labels), np.zeros(len(labels), np.uint64), np.zeros(0), [])
    return Part("test", np.array(labels), [f"{row}" for row in range(len(labels))], empty)


def test_accuracy_and_mean_per_class() -> None:
    """Nine of class 0, one of class 4: always answering 0 is right nine times of ten, and half of the time by class."""
    found = accuracies("knn", np.zeros(10, dtype=np.int64), part([0] * 9 + [4]))
    assert found["knn.accuracy"].value == pytest.approx(0.9)
    assert found["knn.mean_per_class"].value == pytest.approx(0.5)
    low, high = found["knn.mean_per_class"].low, found["knn.mean_per_class"].high
    assert low is not None and high is not None and low < 0.75 < high <= 1.0
    assert accuracies("knn", np.full(4, 7), part([0, 1, 2, 3]))["knn.mean_per_class"].value == 0


@given(st.integers(1, 6).flatmap(lambda k: st.lists(st.tuples(st.integers(0, k), st.integers(0, k)), min_size=1)))
@settings(deadline=None, max_examples=40)
def test_accuracy_by_class_is_scikit_learns_balanced_accuracy(rows: list[tuple[int, int]]) -> None:
    """Classes that no test picture has, constant answers, answers that are no class of the test among them."""
    answers, truths = np.array(rows).T
    found = accuracies("knn", answers, part(truths.tolist()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of answers that are no class of the test
        assert found["knn.mean_per_class"].value == pytest.approx(balanced_accuracy_score(truths, answers), abs=1e-12)
        constant = accuracies("knn", np.full_like(truths, truths[0]), part(truths.tolist()))
    assert constant["knn.mean_per_class"].value == pytest.approx(1 / len(set(truths.tolist())), abs=1e-12)


@pytest.mark.parametrize(("name", "classes"), [("Country211", "AD, AE"), ("ImageNet", "n01440764, n01443537")])
def test_without_words_for_the_classes_there_is_no_zero_shot_and_a_sentence_says_so(
    bundle: Bundle, tmp_path: Path, name: str, classes: str
) -> None:
    """The official layouts of codes: countries, and ImageNet without its devkit."""
    miniatures.BUILDERS[name](tmp_path)
    [found] = suite.run([TASKS[name]], bundle, tmp_path, tmp_path / "cache").tasks
    assert f"{name}.knn.accuracy" in found.results and not any("zero_shot" in each for each in found.results)
    [why] = [note for note in found.notes if "zero-shot" in note]
    assert why.startswith(f"no zero-shot: the files have no words for the classes, which they call {classes} and so on")
    page = suite_report.render(SuiteReport(name, SuiteRun([found]), {}), suite_report.columns([found.task]))
    assert why in html.unescape(page)
    (tmp_path / name.lower() / "classnames.txt").write_text("red\nblue\nmug\n")
    [found] = suite.run([TASKS[name]], bundle, tmp_path, tmp_path / "cache").tasks
    assert f"{name}.zero_shot.accuracy" in found.results and why not in found.notes
    drawn = replace(bundle, untrained=("text_projection",))
    [found] = suite.run([TASKS[name]], drawn, tmp_path, tmp_path / "cache").tasks  # the same tensors
    assert f"{name}.knn.accuracy" in found.results and not any("zero_shot" in each for each in found.results)
    assert any(note.startswith("no zero-shot: nothing has trained this model's projections") for note in found.notes)


def test_a_picture_that_cannot_be_read_is_counted_and_a_class_without_training_named(
    bundle: Bundle, tmp_path: Path
) -> None:
    miniatures.dtd(tmp_path)
    data = data_of("DTD", tmp_path)
    for row in (0, 3):
        (tmp_path / "dtd" / "images" / data.train.pictures.name(row)).write_bytes(b"no picture")
    (tmp_path / "dtd" / "images" / data.test.pictures.name(1)).unlink()
    measured = classification(data, ModelEncoder(bundle), tmp_path / "store", bundle)
    assert measured.results["linear_probe.accuracy"].n == len(data.test) - 1
    notes = "\n".join(measured.notes)
    assert re.search(
        r"2 of 12 training pictures cannot be read and are left out; the first: .*banded_train_0000.jpg", notes
    )
    assert re.search(r"1 of 9 test pictures cannot be read", notes)
    assert "the official split 1 of 10: 12 training, 6 validation, 9 test" in notes
    assert re.search(
        r"linear probe: C = \S+, chosen by \S+ % on 6 pictures of the validation split; fitted on 16", notes
    )


def test_a_class_whose_training_pictures_cannot_be_read_is_named(bundle: Bundle, tmp_path: Path) -> None:
    """Unless the validation split, which the last fit takes too, has one that can."""
    miniatures.dtd(tmp_path)
    data = data_of("DTD", tmp_path)
    sentence = "no training picture of blotchy can be read, so it is never answered"
    for split, is_lost in (("train", False), ("val", True)):
        for path in (tmp_path / "dtd" / "images").glob(f"blotchy/*_{split}_*.jpg"):
            path.write_bytes(b"no picture")
        notes = classification(data, ModelEncoder(bundle), tmp_path / "store", bundle).notes
        assert (sentence in notes) == is_lost
    [found] = suite.run([TASKS["DTD"]], bundle, tmp_path, tmp_path / "cache").tasks
    assert sentence in found.warnings


def test_what_the_disk_does_not_give_today_is_asked_for_again(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    miniatures.dtd(tmp_path)
    flickr(tmp_path, "karpathy")
    tasks = [TASKS["DTD"], TASKS["Flickr30K retrieval"]]
    wanted = (tmp_path / "dtd" / "images" / data_of("DTD", tmp_path).test.pictures.name(1), "1001.jpg")
    whole = Path.read_bytes

    def read_bytes(path: Path) -> bytes:
        if path == wanted[0] or path.name == wanted[1]:
            raise OSError(errno.EIO, "Input/output error")
        return whole(path)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", read_bytes)
        first = suite.run(tasks, bundle, tmp_path, tmp_path / "cache").tasks
    assert [each.state for each in first] == ["measured", "measured"]
    assert all("it cannot be read (Input/output error)" in "\n".join(each.notes) for each in first)
    again = suite.run(tasks, bundle, tmp_path, tmp_path / "cache").tasks
    assert [each.state for each in again] == ["measured", "measured"]
    assert not any("cannot be read" in note for each in again for note in each.notes)
    assert again[0].results["DTD.knn.accuracy"].n == 9
    assert [each.state for each in suite.run(tasks, bundle, tmp_path, tmp_path / "cache").tasks] == ["kept", "kept"]


def test_leakage_is_found_exactly_and_nearly_and_reported_only(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def photograph(seed: int) -> np.ndarray:
        small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        return np.asarray(Image.fromarray(small).resize((96, 96), Image.Resampling.BICUBIC))

    def as_jpeg(picture: np.ndarray) -> np.ndarray:
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, "JPEG", quality=60)
        return np.asarray(Image.open(buffer))

    def of(pictures: list[np.ndarray]):  # type: ignore[no-untyped-def]
        prints = [duplicates.fingerprint(picture) for picture in pictures]
        found = Features({}, np.arange(len(prints)), [p.pixels for p in prints], *duplicates.arrays(prints), [])
        made = part([0] * len(prints))
        made.features = found
        return made

    train = [photograph(seed) for seed in range(200)]
    test = [photograph(1000 + seed) for seed in range(50)] + [train[7], as_jpeg(train[11]), as_jpeg(train[12])]
    notes = leakage(of(train), of(test))
    assert len(notes) == 2
    assert "1 of 53 test pictures stand, equal to the pixel, in training" in notes[0] and notes[0].endswith("50 and 7")
    assert "2 of 53 test pictures have a near copy (at most 6 of 64 bits" in notes[1] and notes[1].endswith("51 and 11")
    assert leakage(of(train), of(test[:50])) == []
    # The same pairs as the search inside one set finds.
    prints = [duplicates.fingerprint(picture) for picture in train + test]
    inside = {tuple(pair) for pair in duplicates.near_pairs(prints).tolist()}
    across = duplicates.near_across(*duplicates.arrays(prints[:200]), *duplicates.arrays(prints[200:]))
    assert {(one, 200 + other) for one, other in across.tolist()} == {p for p in inside if p[0] < 200 <= p[1]}
    assert rng is not None


def test_pictures_of_shards_are_told_by_the_folder_of_their_split(bundle: Bundle, tmp_path: Path) -> None:
    """Training and test number their shards, and what is in them, alike."""
    miniatures.webdataset(tmp_path / "wds_fer2013")
    shutil.copy(tmp_path / "wds_fer2013" / "train" / "0.tar", tmp_path / "wds_fer2013" / "test" / "0.tar")
    [found] = suite.run([TASKS["FER2013"]], bundle, tmp_path, tmp_path / "cache").tasks
    [leak] = [note for note in found.notes if "equal to the pixel" in note]
    assert leak.endswith("the first: test/0.tar s000000000 and train/0.tar s000000000")
    assert "zero-shot: 1 template, of the copy or the user's" in found.notes


def test_many_alike_pictures_are_compared_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    flat = [duplicates.fingerprint(np.full((8, 8, 3), value, dtype=np.uint8)) for value in (10, 10, 200, 12)]
    monkeypatch.setattr(duplicates, "AT_ONCE", 3)
    found = duplicates.near_across(*duplicates.arrays(flat), *duplicates.arrays(flat[::-1]))
    assert found[:, 1].tolist() == [0, 1, 2, 3]
    assert all(abs([10, 10, 200, 12][one] - [12, 200, 10, 10][other]) <= 4 for one, other in found.tolist())


# ------------------------------------------------------------------------------------------------ retrieval


def test_retrieval_has_five_right_answers_a_picture_one_way_and_one_the_other(
    bundle: Bundle, root: Path, tmp_path: Path
) -> None:
    [found] = suite.run([TASKS["Flickr30K retrieval"]], bundle, root, tmp_path).tasks
    assert found.state == "measured"
    results = found.results
    assert results["Flickr30K retrieval.zero_shot.tr_r1"].n == 3
    assert results["Flickr30K retrieval.zero_shot.ir_r1"].n == 15
    with torch.no_grad():
        captions = [text for texts in CAPTIONS for text in texts]
        pictures = [root / "flickr30k" / "flickr30k-images" / f"{1000 + label}.jpg" for label in range(3)]
        scores = bundle.encode_text(captions).projected @ bundle.encode_image(pictures).projected.T
    own = torch.arange(15) // 5
    wrong_beside = [(scores[row] >= scores[row, own[row]]).sum() for row in range(15)]  # itself and wrong ones as high
    expected = float(np.mean([int(rank) <= 1 for rank in wrong_beside]))
    assert results["Flickr30K retrieval.zero_shot.ir_r1"].value == pytest.approx(expected)
    ranks = [1 + int((scores[own != p, p] >= scores[own == p, p].max()).sum()) for p in range(3)]
    assert results["Flickr30K retrieval.zero_shot.tr_r5"].value == pytest.approx(np.mean([rank <= 5 for rank in ranks]))


def test_retrieval_is_re_ranked_beside_and_albefs_table_takes_that(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    assert isinstance(bundle.model, Matches)
    task = next(task for task in SUITES["albef"] if task.kind == "retrieval" and task.name.startswith("Flickr30K"))
    [found] = suite.run([task], bundle, root, tmp_path).tasks
    captions = [text for texts in CAPTIONS for text in texts]
    logits = torch.empty(3, 15)
    for label in range(3):
        image = bundle.encode_image(root / "flickr30k" / "flickr30k-images" / f"{1000 + label}.jpg")
        with torch.no_grad():
            fused = bundle.fuse(image, bundle.encode_text(captions))
            logits[label] = bundle.model.match(fused)[:, 1]
    own = torch.arange(15) // 5
    right = [int((logits[:, row] >= logits[own[row], row]).sum()) == 1 for row in range(15)]
    reranked = found.results["Flickr30K retrieval.zero_shot.ir_reranked_r1"]
    assert reranked.value == pytest.approx(np.mean(right))
    [figure] = [each for each in task.figures if each.metric == "IR R@1"]
    assert found.figure(figure) == reranked
    [of_flava] = [each for each in TASKS["Flickr30K retrieval"].figures if each.metric == "IR R@1"]
    assert found.figure(of_flava) == found.results["Flickr30K retrieval.zero_shot.ir_r1"]
    [alone] = suite.run([task], replace(bundle, fusion_trained=False), root, tmp_path).tasks
    assert alone.state == "measured", "what was kept is of a model that re-ranks"
    by_cosine = alone.figure(figure)
    assert by_cosine is not None and by_cosine.value == found.results["Flickr30K retrieval.zero_shot.ir_r1"].value
    assert any("no loss has trained what this model reads" in note for note in alone.notes)
    [headless] = suite.run([task], replace(bundle, untrained=("itm_head",)), root, tmp_path).tasks
    assert headless.figure(figure) == by_cosine
    assert any("nothing has trained this model's matching head" in note for note in headless.notes)


# --------------------------------------------------------------------------------------------------- suite


def test_what_is_there_is_measured_what_is_not_is_listed_and_one_failure_stops_nothing(
    bundle: Bundle, root: Path, tmp_path: Path
) -> None:
    said: list[str] = []
    run = suite.run(SUITES["flava35"], bundle, root, tmp_path, say=said.append)
    states = {each.task.name: each.state for each in run.tasks}
    assert states["DTD"] == states["CIFAR10"] == states["Flickr30K retrieval"] == "measured"
    assert states["Pets"] == "damaged"
    assert states["ImageNet"] == states["COCO retrieval"] == "missing"
    assert states["SST-2"] == states["VQAv2"] == "not fine-tuned"
    pets = next(each for each in run.tasks if each.task.name == "Pets")
    assert "class 2 is american_bulldog and Abyssinian" in pets.notes[0]
    assert any("Pets" in sentence for sentence in said)
    names = set(run.results)
    assert {
        f"DTD.{p}.{f}" for p in ("linear_probe", "knn", "zero_shot") for f in ("accuracy", "mean_per_class")
    } <= names
    sst2 = next(each for each in run.tasks if each.task.name == "SST-2")
    assert "trivium finetune sst2" in sst2.notes[0]


def test_a_second_call_reads_what_the_first_kept(bundle: Bundle, root: Path, tmp_path: Path) -> None:
    tasks = [TASKS["DTD"], TASKS["Flickr30K retrieval"]]
    first = suite.run(tasks, bundle, root, tmp_path)
    second = suite.run(tasks, bundle, root, tmp_path)
    assert [each.state for each in second.tasks] == ["kept", "kept"]
    assert second.results == first.results
    units = second.results["DTD.linear_probe.accuracy"].outcomes
    assert units is not None and units.units == first.results["DTD.linear_probe.accuracy"].outcomes.units  # type: ignore[union-attr]
    assert [each.notes for each in second.tasks] == [each.notes for each in first.tasks]
    # Damage, another cap on the rows or another model is measured anew.
    for name in ("about.json", "outcomes.parquet"):
        [file] = (tmp_path / "tasks").glob(f"DTD-*/{name}")
        file.write_text("{")
        assert suite.run(tasks, bundle, root, tmp_path).tasks[0].state == "measured"
    [file] = (tmp_path / "tasks").glob("DTD-*/outcomes.parquet")
    file.unlink()
    again = suite.run(tasks, bundle, root, tmp_path).tasks
    assert [each.state for each in again] == ["measured", "kept"]
    assert again[0].results["DTD.linear_probe.accuracy"].outcomes is not None and file.is_file()
    capped = suite.run(tasks[:1], bundle, root, tmp_path, rows=5).tasks[0]
    assert capped.state == "measured" and capped.results["DTD.knn.accuracy"].n == 5
    assert set(capped.parts.values()) == {"at most 5 of each split"}
    assert [set(each.parts.values()) for each in second.tasks] == [{"9 of 1,880"}, {"3 of 1,000"}]
    assert "at most 5 pictures of each split" in capped.notes[0]
    # A cap above what is there is the same rows, and what is said of it is not kept.
    above = suite.run(tasks[:1], bundle, root, tmp_path, rows=5000).tasks[0]
    assert above.state == "kept" and "at most 5,000 pictures of each split" in above.notes[0]
    assert suite.run(tasks[:1], bundle, root, tmp_path).tasks[0].notes == again[0].notes
    torch.manual_seed(4)
    assert suite.run(tasks[:1], new_bundle(), root, tmp_path).tasks[0].state == "measured"


def test_what_never_had_outcomes_is_kept_without_them(tmp_path: Path) -> None:
    found = TaskRun(TASKS["DTD"], "measured", {"DTD.knn.accuracy": Result(0.5)})
    task_runs.keep(found, tmp_path, 1.0)
    assert not (tmp_path / "outcomes.parquet").exists()
    kept = task_runs.kept(TASKS["DTD"], tmp_path)
    assert kept is not None and kept.results == found.results


def test_an_interrupted_call_goes_on(
    bundle: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [TASKS["DTD"], TASKS["CIFAR10"]]

    def interrupted(data, encoder, store, bundle, say):  # type: ignore[no-untyped-def]
        if len(data.classes) == 3 and data.prompts[0] == "a red thing":
            raise KeyboardInterrupt
        return classification(data, encoder, store, bundle, say)

    monkeypatch.setattr(suite, "classification", interrupted)
    with pytest.raises(KeyboardInterrupt):
        suite.run(tasks, bundle, root, tmp_path)
    monkeypatch.setattr(suite, "classification", classification)
    assert [each.state for each in suite.run(tasks, bundle, root, tmp_path).tasks] == ["kept", "measured"]


def test_a_mistake_of_ours_in_one_task_leaves_the_others(
    bundle: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(suite, "zero_shot_retrieval", lambda *_: 1 / 0)
    run = suite.run([TASKS["Flickr30K retrieval"], TASKS["DTD"]], bundle, root, tmp_path)
    assert [each.state for each in run.tasks] == ["failed", "measured"]
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_figures_of_fine_tuning_are_read_under_their_title(bundle: Bundle, tmp_path: Path) -> None:
    tuned = {
        "SST-2": Result(0.9), "SST-2.dev.accuracy": Result(0.9), "MNLI.median": Result(0.7),
        "Hateful Memes (concatenated)": Result(0.6), "Hateful Memes (concatenated).dev_seen.auroc": Result(0.6),
        "SST-20": Result(0.1),
    }  # fmt: skip
    run = suite.run(SUITES["flava35"], bundle, None, tmp_path, fine_tuned=[TunedRun(Path(), tuned)])
    values = run.values()
    assert values == {("SST-2 (fine-tune)", 0): 90, ("MNLI (fine-tune)", 0): 70}
    memes = next(each for each in run.tasks if each.task.name == "HatefulMemes")
    assert memes.state == "read" and "side by side" in memes.notes[0]
    assert memes.figure(memes.task.figures[0]) == Result(0.6)
    assert "ours is dev_seen.auroc, since dev_unseen, on which" in memes.notes[1]
    tuned |= {"Hateful Memes (concatenated).dev_unseen.auroc": Result(0.5)}
    run = suite.run([memes.task], bundle, None, tmp_path, fine_tuned=[TunedRun(Path(), tuned)])
    assert run.values() == {("HatefulMemes (fine-tune)", 0): 50} and len(run.tasks[0].notes) == 1


def test_a_capped_retrieval_is_evenly_spread() -> None:
    captions = tuple((f"caption {n}",) for n in range(10))
    some = Captioned(PictureFiles(Path(), [f"{n}.jpg" for n in range(10)]), captions).first(4)
    assert [some.pictures.name(row) for row in range(len(some))] == ["0.jpg", "2.jpg", "5.jpg", "7.jpg"]
    assert [text for (text,) in some.captions] == ["caption 0", "caption 2", "caption 5", "caption 7"]


def test_vqa_is_shown_on_dev_where_the_answers_of_the_papers_split_are_not_public_and_compared_with_nothing(
    bundle: Bundle, tmp_path: Path
) -> None:
    tuned = {"VQAv2": Result(0.6), "VQAv2.dev.accuracy": Result(0.6)}
    for name in ("flava35", "albef", "unit"):
        run = suite.run(SUITES[name], bundle, None, tmp_path, fine_tuned=[TunedRun(Path(), tuned)])
        [vqa] = [each for each in run.tasks if each.task.name == "VQAv2"]
        assert vqa.figure(vqa.task.figures[0]) == Result(0.6)
        assert any("ours is dev.accuracy, since" in note for note in vqa.notes)
        published = suite_report.columns([vqa.task])
        beside = suite_report.with_published(run, published)
        assert all(result.published is None for result in beside.values()), "another split"
        assert run.values() == {} and not vqa.is_comparable, "no average is made with it"
        assert suite_report.OURS not in suite_report.chart(run, published)["columns"]
        page = suite_report.render(SuiteReport(name, run, {}), published)
        assert "60.00" in page and "Multimodal: " not in page
        line = next(csv.DictReader(io.StringIO(suite_report.as_csv(SuiteRun([vqa]), []))))
        metric = "VQA accuracy, test-dev" if name == "albef" else "VQA accuracy"  # which has two of this metric
        assert line["metric"] == f"{metric} (ours: dev.accuracy)" and line["this model"] == "60.000"
    run = suite.run(
        SUITES["albef"],
        bundle,
        None,
        tmp_path,
        fine_tuned=[TunedRun(Path(), tuned | {"VQAv2.test_dev.accuracy": Result(0.5)})],
    )
    [vqa] = [each for each in run.tasks if each.task.name == "VQAv2"]
    assert run.values()[vqa.task.key, 0] == 50 and not any("ours is dev" in note for note in vqa.notes)


OFFICIAL = {  # task -> its files, by the last part of their names; what stands in them does not matter here
    "nlvr2": ("data/{}.json", ("train", "dev", "test1")),
    "snli_ve": ("snli_ve_{}.jsonl", ("train", "dev", "test")),
    "visual_entailment": ("ve_{}.json", ("train", "dev", "test")),
    "hateful_memes": ("{}.jsonl", ("train", "dev", "dev_seen", "dev_unseen", "test_seen", "test_unseen")),
    **{name: (f"{files.folder}/{{}}.tsv", ("train", *files.dev)) for name, files in GLUE.items()},
}


def splits_of(verb: str, folder: Path) -> list[str]:
    """The held-out splits that a task's reader makes of its official files."""
    if verb in ("vqav2", "vqa"):
        test = Path(vqa(folder)) / "v2_OpenEnded_mscoco_test-dev2015_questions.json"
        (folder / test.name.replace("-dev", "")).write_bytes(test.read_bytes())
        (folder / "annotations").mkdir()
        pictures = [{"id": number} for number in range(5000)]
        (folder / "annotations" / "instances_val2017.json").write_text(json.dumps({"images": pictures}))
    else:
        name, parts = OFFICIAL[verb]
        for part in parts:
            path = folder / name.format(part)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text({".tsv": 12 * "\t", ".jsonl": "{}", ".json": "[{}]"}[path.suffix] + "\n")
    return list(TUNED[verb].open(TaskData(root=str(folder), min_questions=1)).held_out)


def test_a_suite_asks_for_figures_under_the_names_that_fine_tuning_gives_them(tmp_path: Path) -> None:
    asked = {task for tasks in SUITES.values() for task in tasks if task.verb in TUNED}
    splits = {verb: splits_of(verb, tmp_path / verb) for verb in {task.verb for task in asked}}
    for each in asked:
        task, names = TUNED[each.verb], splits[each.verb]
        assert each.prefix == task.title
        known = {"", *(f"{split}.{metric}" for split in names for metric in task.metrics)}
        for figure in each.figures:
            assert known >= {figure.result, figure.instead, figure.first}, (each.name, figure)


def test_albefs_suite_fine_tunes_with_albefs_settings_where_there_are_some(bundle: Bundle, tmp_path: Path) -> None:
    """`visual_entailment` and `vqa` are SNLI-VE and VQAv2 once more, with ALBEF's own settings."""
    distilled = {task.title: name for name, task in TUNED.items() if task.distillation.alpha}
    named = {task.prefix: task.verb for task in SUITES["albef"] if task.verb in TUNED}
    assert named == {title: distilled[title] for title in ("VQAv2", "NLVR2", "SNLI-VE")}
    asked = next(task for task in SUITES["albef"] if task.name == "VQAv2")
    [found] = suite.run([asked], bundle, None, tmp_path).tasks
    assert "trivium finetune vqa --init" in found.notes[0]


def test_fine_tuned_retrieval_takes_the_re_ranked_figures_where_there_are_some(bundle: Bundle, tmp_path: Path) -> None:
    task = next(t for t in SUITES["albef"] if t.name == "COCO retrieval" and t.protocol == "fine-tune")
    read = {f"COCO retrieval.{name}": Result(value) for name, value in
            (("test.tr_r1", 0.7), ("test.tr_reranked_r1", 0.77), ("test.ir_r1", 0.5), ("dev.tr_r1", 0.6))}  # fmt: skip
    [found] = suite.run([task], bundle, None, tmp_path, fine_tuned=[TunedRun(Path(), read)]).tasks
    values = {figure.metric: found.figure(figure) for figure in task.figures}
    assert found.state == "read"
    assert values["TR R@1"] == Result(0.77) and values["IR R@1"] == Result(0.5) and values["IR R@5"] is None


def test_zero_shot_figures_stand_in_no_fine_tuned_row_and_in_no_average_of_them(
    bundle: Bundle, root: Path, tmp_path: Path
) -> None:
    def fine_tuned(of: Bundle) -> dict[str, TaskRun]:
        run = suite.run([t for t in SUITES["albef"] if t.name in CAPTIONED], of, root, tmp_path)
        assert run.tasks[0].state in ("measured", "kept"), "the zero-shot row"
        values = [name for name, _ in run.values() if name.endswith("(fine-tune)")]
        found = {each.task.name: each for each in run.tasks if each.task.protocol == "fine-tune"}
        assert not values, "three pictures are a part of the data"
        return found

    pretrained = fine_tuned(bundle)
    assert {each.state for each in pretrained.values()} == {"not fine-tuned"}
    assert not any(each.results for each in pretrained.values())
    [why] = pretrained["Flickr30K retrieval"].notes
    assert why.startswith("nothing says that this model was fine-tuned for Flickr30K retrieval")
    tuned = fine_tuned(replace(bundle, tuned_for=("Flickr30K retrieval",)))
    assert tuned["Flickr30K retrieval"].state == "kept", "they are the same figures"
    assert "Flickr30K retrieval.test.tr_r1" in tuned["Flickr30K retrieval"].results
    assert tuned["COCO retrieval"].state == "not fine-tuned", "it was fine-tuned for another"
    tuned = fine_tuned(replace(bundle, tuned_for=("COCO retrieval",)))
    assert tuned["COCO retrieval"].state == "missing", "it lacks the data, and no tuning"


# ---------------------------------------------------------------------------------------------- detection


@pytest.fixture(scope="module")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("scenes")
    write_scenes(Scenes("new-scenes", 6), folder, ("coco", "vg"))
    return folder


def detector(scenes: Path, tasks: tuple[str, ...] = ("coco", "vg")) -> Bundle:
    torch.manual_seed(0)
    named = {name: find_val(name, str(scenes))[1] for name in tasks}  # type: ignore[index]
    of = tuple(UnitTask(name, "detection", "image", len(named[name]), n, 4) for n, name in enumerate(tasks))
    model = Unit(
        UnitConfig.of_size(
            "tiny", tasks=of, width=16, num_heads=2, mlp_width=16, decoder_layers=1, image_width=16, image_layers=1,
            backbone_widths=(8, 8), backbone_blocks=(1, 1), text_layers=0,
        )
    )  # fmt: skip
    transform = ImageTransform(32, crop="shortest", longest=64)
    return Bundle("unit", model, None, transform, labels_of={name: list(names) for name, names in named.items()})


def test_boxes_are_measured_where_a_model_detects(scenes: Path, tmp_path: Path) -> None:
    bundle = detector(scenes)
    runs = {each.task.name: each for each in suite.run(SUITES["unit"], bundle, scenes, tmp_path).tasks}
    for name, task, split in (("COCO detection", "coco", "val2017"), ("VG detection", "vg", "val")):
        found = runs[name]
        assert found.state == "measured"
        result = found.results[f"{name}.{split}.ap"]
        rows, classes = find_val(task, str(scenes))  # type: ignore[misc]
        seen, _ = detection.find(bundle, rows, task)
        assert result == detection.measure(rows, seen, classes)["ap"] and result.low is not None and result.n == 6
        assert found.figure(found.task.figures[0]) == result
    assert runs["COCO detection"].notes == ["6 pictures where the published figures rest on 5,000"]
    again = suite.run(SUITES["unit"][:2], bundle, scenes, tmp_path).tasks
    assert [each.state for each in again] == ["kept", "kept"] and again[0].results == runs["COCO detection"].results
    few = suite.run(SUITES["unit"][:1], bundle, scenes, tmp_path, rows=2).tasks[0]
    assert few.state == "measured" and few.results["COCO detection.val2017.ap"].n == 2
    assert few.notes[0] == "at most 2 pictures of each split, evenly spread: not the papers' figures"


def test_boxes_that_cannot_be_measured_are_told_why(bundle: Bundle, scenes: Path, tmp_path: Path) -> None:
    def state_and_note(of: Bundle, root: Path | None) -> tuple[str, str]:
        [found] = suite.run(SUITES["unit"][1:2], of, root, tmp_path).tasks
        return found.state, " ".join(found.notes)

    assert state_and_note(bundle, scenes) == ("not applicable", "Flava has no `detect`")
    only = detector(scenes, ("coco",))
    assert state_and_note(only, scenes) == ("not applicable", "this Unit has no task vg: it detects for coco")
    assert state_and_note(detector(scenes), None)[0] == state_and_note(detector(scenes), tmp_path)[0] == "missing"
    other = detector(scenes)
    assert other.labels_of is not None
    other.labels_of["vg"][2] = "a cat"
    state, note = state_and_note(other, scenes)
    assert state == "damaged" and "class 2" in note and "knows it as 'a cat'" in note
    tuned = {"VG detection.val.ap": Result(0.1)}
    [read] = suite.run(
        SUITES["unit"][1:2], detector(scenes), scenes, tmp_path, fine_tuned=[TunedRun(Path(), tuned)]
    ).tasks
    assert read.state == "read" and read.results == tuned


def test_grounding_is_measured_by_the_block_that_is_asked_for(tmp_path: Path) -> None:
    write_scenes(Scenes("held-out-style", 3, seed=3), tmp_path, ("refcoco",))
    [grounded] = [task for task in SUITES["albef"] if task.kind == "grounding"]
    task, bundle, root = replace(grounded, name="RefCOCO"), tiny_bundle(), tmp_path / "refcoco"

    def found(block: int | None) -> TaskRun:
        return suite.run([task], bundle, root, tmp_path / "cache", block=block).tasks[0]

    usual, first = found(None), found(0)
    assert found(0).state == "kept" and "by the attention of block 0" in found(0).notes
    expected = grounding.run(bundle, read_referring(str(root)), block=0).results
    assert {name.partition(".")[2]: result.value for name, result in first.results.items()} == {
        name: result.value for name, result in expected.items()
    }
    last = found(bundle.model.config.fusion_layers - 1)
    assert "damaged" == found(99).state and "no block 99" in found(99).notes[0]
    assert len({each.results["RefCOCO.val.among_annotated"].value for each in (usual, first, last)}) > 1


@pytest.mark.parametrize("kind", ["detection", "grounding"])
def test_a_figure_over_boxes_is_kept_for_these_pictures_alone(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "detection":
        write_scenes(Scenes("new-scenes", 3), tmp_path, ("coco",))
        task, of, root = SUITES["unit"][0], detector(tmp_path, ("coco",)), tmp_path
    else:
        write_scenes(Scenes("held-out-style", 3, seed=3), tmp_path, ("refcoco",))
        [grounded] = [task for task in SUITES["albef"] if task.kind == "grounding"]
        task, of, root = replace(grounded, name="RefCOCO"), tiny_bundle(), tmp_path / "refcoco"
    picture = sorted(path for path in root.rglob("*.[jp][pn]g") if "val" in str(path.relative_to(root)))[0]

    def found() -> TaskRun:
        return suite.run([task], of, root, tmp_path / "cache").tasks[0]

    whole = found()
    assert whole.state == "measured" and found().state == "kept"
    os.utime(picture, ns=(1, 1))
    assert found().state == "measured", "another picture of the same name"
    content = picture.read_bytes()
    picture.unlink()
    partial = found()
    assert partial.state == "measured" and any(str(picture) in note for note in partial.notes)
    picture.write_bytes(content)
    again = found()
    assert again.state == "measured" and again.results == whole.results

    read_bytes = Path.read_bytes

    def fails(path: Path) -> bytes:
        if path == picture:
            raise OSError(errno.EIO, "Input/output error")
        return read_bytes(path)

    os.utime(picture, ns=(2, 2))
    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", fails)
        assert "Input/output error" in "\n".join(found().notes)
    assert found().state == "measured", "what the disk did not give is asked for again"
    assert found().state == "kept"


def test_a_model_without_texts_is_told_what_it_cannot_do(tmp_path: Path) -> None:
    class Pictures(torch.nn.Module):
        def encode_image(self, pixels_BCHW: torch.Tensor) -> None: ...
        def config_dict(self) -> dict[str, int]:
            return {}

    blind = Bundle("dino", Pictures(), None, new_bundle().transform)
    run = suite.run(SUITES["flava35"], blind, None, tmp_path)
    assert run.cannot() == ["language", "multimodal"]
    assert {each.notes[0] for each in run.tasks if each.task.domain == "language"} == {"Pictures reads no texts"}


# -------------------------------------------------------------------------------------------------- report


@pytest.fixture(scope="module")
def written(bundle: Bundle, root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report")
    rte = TunedRun(Path("rte"), {"RTE": Result(0.5776, 0.52, 0.63, 277), "seconds.total": Result(3754.0)})
    run = suite.run(SUITES["flava35"], bundle, root, out / "cache", fine_tuned=[rte])
    suite_report.write(out, SuiteReport("FLAVA's tasks <a miniature>", run, {"total": 1.5}, "trivium evaluate x"))
    return out


def test_results_have_the_papers_own_number_beside_ours(written: Path) -> None:
    found = json.loads((written / "results.json").read_text())["results"]
    assert found["RTE"]["published"] == pytest.approx(0.5776)
    assert "published" not in found["CIFAR10.linear_probe.accuracy"], "a few pictures of 10,000"
    assert "published" not in found["CIFAR10.knn.accuracy"]


def test_the_papers_number_stands_beside_that_of_ours_which_the_page_shows() -> None:
    def beside(suite: str, name: str, **values: float) -> dict[str, float | None]:
        task = next(task for task in SUITES[suite] if task.name == name)
        ours = {f"{task.prefix}.{result.replace('__', '.')}": Result(value) for result, value in values.items()}
        run = SuiteRun([TaskRun(task, "read", ours)])
        found = suite_report.with_published(run, suite_report.columns(SUITES[suite]))
        return {name.removeprefix(f"{task.prefix}."): result.published for name, result in found.items()}

    recalls = beside("albef", "COCO retrieval", test__tr_r1=0.5, test__tr_reranked_r1=0.7)
    assert recalls["test.tr_r1"] is None and recalls["test.tr_reranked_r1"] == pytest.approx(0.776)
    assert beside("albef", "COCO retrieval", test__tr_r1=0.5)["test.tr_r1"] == pytest.approx(0.776)
    memes = beside("flava35", "HatefulMemes", dev__auroc=0.6, dev_unseen__auroc=0.7, dev_seen__auroc=0.8)
    assert memes["dev_unseen.auroc"] == pytest.approx(0.7609)
    assert memes["dev.auroc"] is None and memes["dev_seen.auroc"] is None


@pytest.mark.parametrize(("n", "rows"), [(1_880, None), (1_870, None), (1_850, None), (1_880, 5_000)])
def test_a_figure_of_a_part_of_the_data_is_marked_and_not_compared(n: int, rows: int | None) -> None:
    tasks = [TaskRun(TASKS["DTD"], "measured", {"DTD.linear_probe.accuracy": Result(0.5, n=n)})]
    tasks[0].parts = comparable.parts(tasks[0], rows)
    run, is_whole = SuiteRun(tasks), rows is None and n != 1_850
    published = suite_report.columns([TASKS["DTD"]])
    beside = suite_report.with_published(run, published)["DTD.linear_probe.accuracy"].published
    assert (beside is not None) == is_whole
    page = suite_report.render(SuiteReport("DTD", run, {}), published)
    data = json.loads(re.search(r'<script id="numbers"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert ("this model" in data["columns"]) == is_whole
    line = next(csv.DictReader(io.StringIO(suite_report.as_csv(run, published))))
    marked = (
        "accuracy"
        if is_whole
        else f"accuracy (ours: {'1,850 of 1,880' if rows is None else 'at most 5,000 of each split'})"
    )
    assert line["metric"] == marked and f"<small>{marked}</small>" in page and line["this model"] == "50.000"


def test_what_was_fine_tuned_on_a_part_stands_beside_nothing(bundle: Bundle, tmp_path: Path) -> None:
    for rows, n, part in ((None, 87, "87 of 872"), (400, 872, "fine-tuned on at most 400 training rows")):
        tuned = TunedRun(Path("few"), {"SST-2": Result(0.9, n=n)}, rows=rows)
        run = suite.run([TASKS["SST-2"]], bundle, None, tmp_path, fine_tuned=[tuned])
        assert list(run.tasks[0].parts.values()) == [part] and run.values() == {}
    entailment = next(task for task in SUITES["albef"] if task.name == "SNLI-VE")
    tuned = TunedRun(Path("few"), {"SNLI-VE.dev.accuracy": Result(0.6, n=17_858)}, rows=400)
    [found] = suite.run([entailment], bundle, None, tmp_path, fine_tuned=[tuned]).tasks
    assert [found.metric(figure) for figure in entailment.figures] == [
        "accuracy, val (ours: fine-tuned on at most 400 training rows)", "accuracy, test",
    ]  # fmt: skip


def test_a_model_that_was_tuned_for_retrieval_does_not_stand_as_a_zero_shot_one(
    bundle: Bundle, root: Path, tmp_path: Path
) -> None:
    task = TASKS["Flickr30K retrieval"]
    [found] = suite.run([task], replace(bundle, tuned_for=("Flickr30K retrieval",)), root, tmp_path).tasks
    assert found.state == "measured" and SuiteRun([found]).values() == {}
    assert found.metric(task.figures[0]) == "TR R@1 (ours: of a model that was tuned for it)"
    # An official file does not say which of two it is for, and the paper's own zero-shot figure is of such a one.
    either = replace(bundle, tuned_for=("Flickr30K retrieval", "COCO retrieval"))
    [found] = suite.run([task], either, root, tmp_path).tasks
    assert set(found.parts.values()) == {"3 of 1,000"}
    assert any("fine-tuned for Flickr30K retrieval or COCO retrieval" in note for note in found.notes)


class Dev(OwnTask):
    """A head of its own that is measured on the dev part alone."""

    identity = "dev"

    def first(self, rows: int) -> Dev:
        return self

    def measure(self, folder: Path, say: Callable[[str], None]) -> Measured:
        return Measured({"dev.accuracy": Result(0.6, n=17_858)}, ["by its own head"])


def test_what_is_kept_says_nothing_of_the_suite_that_asked(bundle: Bundle, tmp_path: Path) -> None:
    notes = {}
    for name in ("flava35", "unit", "flava35"):
        [task] = [each for each in SUITES[name] if each.name == "SNLI-VE"]
        [found] = suite.run([task], bundle, None, tmp_path, own=lambda *_: Dev()).tasks
        notes[name, found.state] = found.notes
    assert notes["flava35", "measured"] == notes["flava35", "kept"]
    assert notes["flava35", "kept"][1].startswith("ours is dev.accuracy, since test, on which")
    assert notes["unit", "kept"] == ["by its own head"], "there it is the published split"


def test_a_full_disk_takes_no_figure_away(
    bundle: Bundle, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(suite.task_runs, "keep", full)
    [found] = suite.run([TASKS["DTD"]], bundle, root, tmp_path).tasks
    assert found.state == "measured" and "DTD.linear_probe.accuracy" in found.results
    assert "it is not kept for the next call: [Errno 28] No space left on device" in found.notes


def test_rows_of_a_suite_can_be_told_apart() -> None:
    for name, tasks in SUITES.items():
        run = SuiteRun([TaskRun(task, "missing") for task in tasks])
        shown = [(run.title(task), each.metric(figure)) for each in run.tasks for task in [each.task]
                 for figure in task.figures]  # fmt: skip
        assert len(set(shown)) == len(shown), name
        labels = suite_report.chart(run, [])["figures"]
        assert len(set(labels)) == len(labels), name
    [vqa] = [task for task in SUITES["albef"] if task.name == "VQAv2"]
    assert [vqa.metric(figure) for figure in vqa.figures] == ["VQA accuracy, test-dev", "VQA accuracy, test-std"]


def test_albefs_own_numbers_stand_beside_every_kind_of_task() -> None:
    own = suite_report.papers_own(suite_report.columns(SUITES["albef"]))
    assert own is not None and own.name == "ALBEF: 14M images, fine-tuned"
    places = {(task.key, figure.metric, figure.splits[0]): (task.key, place) for task in SUITES["albef"]
              for place, figure in enumerate(task.figures)}  # fmt: skip
    for key, value in {
        ("Flickr30K retrieval (zero-shot)", "TR R@1", "test (1K)"): 94.1,
        ("RefCOCO+ (weakly supervised)", "accuracy at IoU 0.5", "testA"): 65.89,
        ("VQAv2 (fine-tune)", "VQA accuracy", "test-dev"): 75.84,
    }.items():
        assert own.cells[places[key]].value == value


def test_of_unit_the_numbers_that_were_read_are_its_own() -> None:
    own = suite_report.papers_own(suite_report.columns(SUITES["unit"]))
    assert own is not None and own.setting == "8 datasets, shared decoder, COCO init, released model"
    assert own.cells and all(cell.is_comparable for cell in own.cells.values())
    assert own.name in suite_report.chart(SuiteRun([]), suite_report.columns(SUITES["unit"]))["columns"]


def test_files_say_where_a_head_read_vectors_side_by_side(bundle: Bundle, tmp_path: Path) -> None:
    tuned = {"SNLI-VE (concatenated).test.accuracy": Result(0.7, n=17_901), "SST-2": Result(0.9, n=872)}
    tasks = [TASKS["SNLI-VE"], TASKS["SST-2"]]
    run = suite.run(tasks, bundle, None, tmp_path, fine_tuned=[TunedRun(Path("tuned"), tuned)])
    suite_report.write(tmp_path / "out", SuiteReport("Two", run, {}))
    found = json.loads((tmp_path / "out" / "results.json").read_text())["results"]
    assert {"SNLI-VE (concatenated).test.accuracy", "SST-2"} <= found.keys() and "SNLI-VE.test.accuracy" not in found
    assert found["SNLI-VE (concatenated).test.accuracy"]["published"] == 0.7889
    lines = list(csv.DictReader((tmp_path / "out" / "results.csv").open()))
    assert [line["metric"] for line in lines] == ["accuracy (ours: picture and text vector side by side)", "accuracy"]


def test_the_csv_has_a_line_a_figure_and_a_column_a_system(written: Path) -> None:
    rows = list(csv.DictReader((written / "results.csv").open()))
    assert len(rows) == sum(len(task.figures) for task in SUITES["flava35"])
    rte = next(row for row in rows if row["task"] == "RTE")
    assert (rte["this model"], rte["low"], rte["high"], rte["n"], rte["state"]) == (
        "57.760",
        "52.000",
        "63.000",
        "277",
        "read",
    )
    assert rte["FLAVA: FLAVA full (col 6)"] == "57.76"
    assert rte["seconds"] == "3754.0", "of its run"
    qqp = next(row for row in rows if row["task"] == "QQP")
    assert qqp["FLAVA: FLAVA without unimodal init (col 5)"] == "88.60*" and qqp["this model"] == ""
    assert qqp["CLIP: ViT-B/16 trained on PMD (Table 5 row 10)"] == "75.4 / 43.0*"


def test_the_page_stands_alone_and_says_everything(written: Path) -> None:
    page = (written / "report.html").read_text(encoding="utf-8")
    assert Addresses(page).found == []
    assert "&lt;a miniature&gt;" in page
    scripts = re.findall(r"<script.*?</script>", page, re.DOTALL)
    assert len(scripts) == 2 and "http" not in "".join(scripts)
    for said in (
        "Figures of 4 of 35 tasks", "Beside FLAVA paper, Table 4", "Not on the disk", "To be fine-tuned first",
        "There, but not readable", '<a href="https://image-net.org/download.php"', "88.60*", "What took how long",
    ):  # fmt: skip
        assert said in page, said
    assert "<td>RTE<small>its run of trivium finetune, which took this long</small></td><td>62 min 34 s</td>" in page
    data = json.loads(re.search(r'<script id="numbers"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    assert data["columns"][0] == "this model"
    flava = data["columns"].index("FLAVA: FLAVA full (col 6)")
    assert sum(len(rows) for _, rows in data["pairs"][flava][flava]) == 45 - 4, "the paper prints no R@10"
    assert [domain for domain, _ in data["pairs"][flava][flava]] == ["Language", "Vision", "Multimodal"]
    [language, *_] = data["pairs"][0][flava]
    assert language == ["Language", [[data["figures"].index("RTE"), 0.0]]], "57.76 both"
    assert "/ row.b" not in page and "numbers.pairs[first.value][second.value]" in page


def test_a_difference_is_a_share_of_the_second_column() -> None:
    a, b, c, d = ("A", 0), ("B", 0), ("C", 0), ("D", 0)
    differences = suite_report.relative_differences
    assert differences({a: 60.0, b: 40.0}, {a: 50.0, b: 50.0}) == {a: 20.0, b: -20.0}
    assert differences({a: 50.0, b: 0.0}, {a: 40.0, b: 50.0}) == {a: 25.0, b: -100.0}
    assert differences({a: 1.0, b: 2.0, c: 3.0}, {a: 0.0, c: 3.0, d: 4.0}) == {c: 0.0}
    assert differences({a: 5.0, b: -10.0}, {a: -10.0, b: -5.0}) == {a: 150.0, b: -100.0}, "better is up"


def test_the_chart_has_the_rows_of_every_two_columns_by_domain() -> None:
    ours = {"RTE": 0.6, "CoLA": 0.25, "CIFAR10.linear_probe.accuracy": 0.9, "Pets.linear_probe.accuracy": float("nan")}
    asked = ("CIFAR10", "RTE", "Pets", "CoLA")  # vision first: the page orders them
    runs = [
        TaskRun(TASKS[name], "read", {key: Result(x) for key, x in ours.items() if key.partition(".")[0] == name})
        for name in asked
    ]
    theirs = {"RTE (fine-tune)": 50.0, "CoLA (fine-tune)": 0.0, "CIFAR10 (linear probe)": 95.0}
    cells = {(key, 0): Cell(value, f"{value}", "read") for key, value in theirs.items()}
    cells["Pets (linear probe)", 0] = Cell(80.0, "80.0", "recalled")
    found = suite_report.chart(SuiteRun(runs), [Column("S", "s", "a table", cells)])
    assert (found["columns"], found["figures"]) == (["this model", "S: s"], ["RTE", "CoLA", "CIFAR10", "Pets"])
    assert found["pairs"][0][1] == [("Language", [(0, 20.0)]), ("Vision", [(2, -5.3)])], "CoLA of the second is 0"
    assert found["pairs"][1][0] == [("Language", [(0, -16.7), (1, -100.0)]), ("Vision", [(2, 5.6)])]
    nothing = suite_report.chart(
        SuiteRun(runs[:1]), [Column("S", "s", "a table", {("RTE (fine-tune)", 0): cells["RTE (fine-tune)", 0]})]
    )
    assert nothing["pairs"][0][1] == []


def test_published_neighbours_stand_beside_our_neighbours() -> None:
    task = TASKS["ImageNet"]
    ours = {"linear_probe.accuracy": 0.61, "knn.accuracy": 0.52, "zero_shot.accuracy": 0.43,
            "zero_shot.top5_accuracy": 0.7}  # fmt: skip
    run = SuiteRun([TaskRun(task, "measured", {f"ImageNet.{name}": Result(value) for name, value in ours.items()})])
    published = suite_report.columns([task])
    rows = list(csv.DictReader(io.StringIO(suite_report.as_csv(run, published))))
    dino, flava = "DINO: ViT-B/16, released", "FLAVA: released weights (flava-full)"
    assert [(row["protocol"], row["metric"], row["this model"], row[flava]) for row in rows[:4]] == [
        ("linear probe", "accuracy", "61.000", ""),
        ("k-NN", "k-NN accuracy", "52.000", ""),
        ("zero-shot", "zero-shot accuracy (top-1)", "43.000", "56.91"),
        ("zero-shot", "zero-shot top-5 accuracy", "70.000", "83.92"),
    ]
    assert rows[1][dino] == "76.1"
    drawn = suite_report.chart(run, published)
    place = drawn["columns"].index(dino)
    assert (drawn["figures"].index("ImageNet k-NN accuracy"), -31.7) in dict(drawn["pairs"][0][place])["Vision"]
    page = suite_report.render(SuiteReport("ImageNet", run, {}), published)
    assert "<small>k-NN accuracy</small>" in page and "DINO repository README" in page


def test_where_there_is_nothing_to_compare_with_no_chart_is_drawn() -> None:
    [task] = SUITES["own"]
    run = SuiteRun([TaskRun(task, "measured", {f"{task.name}.linear_probe.accuracy": Result(0.6, 0.5, 0.7, 872)})])
    page = suite_report.render(SuiteReport("Our own", run, {}), suite_report.columns([task]))
    assert "60.00" in page and "Relative difference" not in page and "<script" not in page and "Beside" not in page


def test_recalled_numbers_are_grey_and_in_the_csv_questioned_and_do_not_enter_the_chart(bundle: Bundle) -> None:
    run = SuiteRun([TaskRun(task, "missing") for task in SUITES["unit"]])
    published = suite_report.columns([each.task for each in run.tasks])
    recalled = [cell for column in published for cell in column.cells.values() if cell.is_recalled]
    assert recalled
    lines = csv.DictReader(io.StringIO(suite_report.as_csv(run, published)))
    shown = [line[column.name] for line in lines for column in published]
    assert sorted(each for each in shown if each.endswith("?")) == sorted(f"{cell.shown}?" for cell in recalled)
    assert sum(map(bool, shown)) == sum(len(column.cells) for column in published), "all that the page shows"
    page = suite_report.render(SuiteReport("UniT", run, {}), published)
    assert page.count('class="recalled"') == suite_report.OPEN_TABLES + sum(  # the legend of each
        cell.is_recalled for column in published for cell in column.cells.values()
    )
    data = json.loads(re.search(r'<script id="numbers"[^>]*>(.*?)</script>', page, re.DOTALL)[1])  # type: ignore[index]
    drawn = sum(len(rows) for place, pairs in enumerate(data["pairs"]) for _, rows in pairs[place])
    assert drawn == sum(not cell.is_recalled for column in published for cell in column.cells.values())
