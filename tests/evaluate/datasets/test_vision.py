"""Each reader against a miniature of its official layout: every picture stands with its own label."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.io import savemat

from tests.evaluate.datasets import miniatures
from tests.evaluate.datasets.miniatures import BUILDERS, PER_CLASS, red
from trivium.errors import BadSample, TriviumError
from trivium.evaluate import feature_store
from trivium.evaluate.datasets import Missing, copies, find
from trivium.evaluate.datasets.layouts import BY_NAME, VISION
from trivium.evaluate.datasets.pictures import SUFFIXES, DataSet, Split, UnreadableNow, capped, held_out

HAS_VALIDATION = {"Aircraft", "DTD", "Flowers102", "PCAM", "RenderedSST2", "Country211"}
CLASSES = {"CLEVR": 8, "PCAM": 2, "RenderedSST2": 2, "FER2013": 7}
SIGNS = {0: 0, 4: 1, 8: 2}  # GTSRB's miniature has three of its classes


def opened(name: str, root: Path) -> DataSet:
    data = find(BY_NAME[name], root)
    assert isinstance(data, DataSet), data
    return data


def check_pictures(split: Split, name: str = "") -> None:
    """The red, or the grey, of every picture tells its label; the white corner stands where it was put."""
    for row, label in enumerate(split.labels_N.tolist()):
        picture = split.pictures.read(row)
        assert picture.dtype == np.uint8 and picture.shape[2] == 3
        shown = SIGNS[label] if name == "GTSRB" else label
        assert abs(int(picture[-1, 0, 0]) - red(shown)) <= 3, (split.pictures.name(row), label)
        assert picture[0, -1].min() >= 250, split.pictures.name(row)
        assert picture[-1, 0].max() < 250 and picture[0, 0].max() < 250


@pytest.mark.parametrize("name", [layout.name for layout in VISION])
def test_official_layout(name: str, tmp_path: Path) -> None:
    if name == "PCAM":
        pytest.importorskip("h5py", reason="PCAM's miniature is HDF5: install trivium[vision]")
    BUILDERS[name](tmp_path)
    data = opened(name, tmp_path)
    classes = CLASSES.get(name, 3)
    assert (data.validation is not None) == (name in HAS_VALIDATION)
    for split in data.every:
        check_pictures(split, name)
    if name not in ("Caltech101", "EuroSAT", "KITTI", "FER2013"):
        found = {"train": data.train, "test": data.test, "validation": data.validation}
        for split_name, split in found.items():
            if split is not None:
                numbers = split.labels_N.tolist()
                counts = np.bincount([SIGNS[n] for n in numbers] if name == "GTSRB" else numbers, minlength=classes)
                assert counts.tolist() == [PER_CLASS[split_name]] * classes, split_name
    names = [split.pictures.name(row) for split in data.every for row in range(len(split))]
    if name not in ("CIFAR10", "CIFAR100", "MNIST", "STL10", "FER2013", "PCAM", "CLEVR", "GTSRB", "Cars", "ImageNet"):
        assert len(set(names)) == len(names), "no picture stands in two splits"
    for file in [*data.tables, *(file for split in data.every for file in split.pictures.files())]:
        assert file.is_file()


def test_every_layout_is_in_the_table_with_its_owners_and_no_two_take_the_same_folder() -> None:
    assert len(VISION) == 22 and set(BUILDERS) == {layout.name for layout in VISION}
    places = [place for layout in BY_NAME.values() for place in layout.places]
    assert len(set(places)) == len(places)
    assert all(layout.owners.startswith("http") for layout in BY_NAME.values())


def test_whose_data_is_missing_is_offered_a_copy_in_tar_shards(tmp_path: Path) -> None:
    for layout in VISION:
        missing = find(layout, tmp_path)
        assert isinstance(missing, Missing) and "/{train,test}/*.tar" in missing.expected, layout.name
    miniatures.webdataset(tmp_path / "wds_ucf101")
    assert opened("UCF101", tmp_path).splits == "the splits of the copy in tar shards"


@pytest.mark.parametrize("form", ["tar", "parquet"])
def test_too_few_names_for_the_labels_of_a_copy_are_the_fault_of_their_file(tmp_path: Path, form: str) -> None:
    if form == "tar":
        miniatures.webdataset(folder := tmp_path / "wds_fer2013", ("glad", "sad"))
    else:
        miniatures.parquet(folder := tmp_path / "fer2013", ())
        (folder / "classnames.txt").write_text("glad\nsad\n")
    with pytest.raises(TriviumError, match=rf"^{folder}/classnames.txt has 2 lines for 3 classes: one line a class"):
        find(BY_NAME["FER2013"], tmp_path)


def test_classes_and_prompts_are_words(tmp_path: Path) -> None:
    for name in ("Pets", "EuroSAT", "Food101", "CIFAR100", "SUN397", "UCF101"):
        BUILDERS[name](tmp_path)
    assert opened("Pets", tmp_path).prompts == ("abyssinian", "american bulldog", "yorkshire terrier")
    assert opened("EuroSAT", tmp_path).prompts == ("annual crop", "forest", "sea lake")
    assert opened("Food101", tmp_path).prompts[1] == "baby back ribs"
    assert opened("CIFAR100", tmp_path).classes == ("apple", "aquarium_fish", "baby")
    assert opened("SUN397", tmp_path).prompts[1] == "apartment building outdoor"
    assert opened("UCF101", tmp_path).prompts[0] == "apply eye makeup"


def test_data_that_is_not_there_is_named_with_its_layout_and_owners(tmp_path: Path) -> None:
    for layout in VISION:
        found = find(layout, tmp_path)
        assert isinstance(found, Missing)
        assert layout.expected in found.expected and found.owners == layout.owners


# ------------------------------------------------------------------------------------------- other forms


def test_imagenet_with_a_flat_validation_folder_and_the_devkit(tmp_path: Path) -> None:
    miniatures.imagenet(tmp_path, flat=True)
    data = opened("ImageNet", tmp_path)
    check_pictures(data.test)
    assert data.prompts == ("tench", "goldfish", "great white shark")
    shutil.rmtree(tmp_path / "imagenet" / "ILSVRC2012_devkit_t12")
    with pytest.raises(TriviumError, match="val is flat, so the devkit must tell the classes"):
        find(BY_NAME["ImageNet"], tmp_path)


def test_mnist_packed(tmp_path: Path) -> None:
    miniatures.mnist(tmp_path, packed=True)
    check_pictures(opened("MNIST", tmp_path).train)


@pytest.mark.parametrize("form", ["fer2013.csv", "icml_face_data.csv", "folders"])
def test_forms_of_fer2013(form: str, tmp_path: Path) -> None:
    miniatures.fer2013(tmp_path, form)
    data = opened("FER2013", tmp_path)
    check_pictures(data.test)
    if form == "folders":
        assert data.classes == ("angry", "happy", "sad") and len(data.test) == 9
    else:
        assert data.classes[4:] == ("sad", "surprise", "neutral")
        assert len(data.test) == 2 * 7 * PER_CLASS["test"], "the public and the private test set"
    assert data.prompts[0] == "an angry face"


def test_sun397_without_the_lists_of_its_partitions_says_so(tmp_path: Path) -> None:
    miniatures.sun397(tmp_path, lists=False)
    data = opened("SUN397", tmp_path)
    assert "70, 10 and 20 %" in data.splits and data.validation is not None
    assert [len(split) for split in data.every] == [75, 9, 21]
    for split in data.every:
        check_pictures(split)
        assert np.bincount(split.labels_N).std() == 0


def test_splits_that_nobody_publishes(tmp_path: Path) -> None:
    for name in ("Caltech101", "EuroSAT", "KITTI"):
        BUILDERS[name](tmp_path)
    caltech, eurosat, kitti = (opened(name, tmp_path) for name in ("Caltech101", "EuroSAT", "KITTI"))
    assert np.bincount(caltech.train.labels_N).tolist() == [30, 30, 30]
    assert np.bincount(caltech.test.labels_N).tolist() == [2, 3, 4]
    again = opened("Caltech101", tmp_path)
    assert [again.test.pictures.name(row) for row in range(9)] == [caltech.test.pictures.name(row) for row in range(9)]
    assert np.bincount(eurosat.train.labels_N).tolist() == [10, 10, 10]
    assert np.bincount(eurosat.test.labels_N).tolist() == [5, 5, 5]
    assert eurosat.train.pictures.name(0).endswith("AnnualCrop_1.jpg")
    assert eurosat.train.pictures.name(1).endswith("AnnualCrop_10.jpg"), "sorted by name, not by number"
    assert len(kitti.test) == 8 and len(kitti.train) == 32
    for data in (caltech, eurosat, kitti):
        assert "cannot be made again" in data.splits


@pytest.mark.parametrize("depth", [(7.99, 0), (8.0, 0), (8.01, 1), (20.0, 1), (20.01, 2), (999.5, 3)])
def test_the_distances_of_kitti_are_those_of_vtab(depth: tuple[float, int], tmp_path: Path) -> None:
    miniatures.kitti(tmp_path)
    file = tmp_path / "Kitti" / "raw" / "training" / "label_2" / "000000.txt"
    file.write_text(f"Van 0 0 0 0 0 0 0 0 0 0 0 0 {depth[0]} 0\nTruck 0 0 0 0 0 0 0 0 0 0 0 0 2000 0\nTram" + " 0" * 14)
    data = opened("KITTI", tmp_path)
    rows = {split.pictures.name(row): label for split in data.every for row, label in enumerate(split.labels_N)}
    assert rows["000000.png"] == depth[1]


@pytest.mark.parametrize("folder", ["wds_vtab-cifar10", "wds_cifar10", "vtab-cifar10"])
def test_webdataset_copy(folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    miniatures.webdataset(tmp_path / folder)
    data = opened("CIFAR10", tmp_path)
    for split in data.every:
        check_pictures(split)
    assert data.prompts == data.classes == ("a red thing", "a green thing", "a blue thing")
    assert data.templates == ("a photo of {c}.",)
    assert "3 classes where the data set has 10" in data.notes
    assert data.train.labels_N.tolist() == miniatures.labels_of("train", 3)


def test_parquet_copy(tmp_path: Path) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    data = opened("CIFAR10", tmp_path)
    for split in data.every:
        check_pictures(split)
    assert data.classes == ("red", "green", "blue")


def test_a_parquet_copy_whose_splits_number_their_classes_differently_is_refused(tmp_path: Path) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    miniatures.parquet(tmp_path / "cifar10", ("red", "blue", "green"), ["test"])
    with pytest.raises(
        TriviumError, match=r"test-.* and train-.* differently: 1 is 'blue' in the one and 'green' in the"
    ):
        find(BY_NAME["CIFAR10"], tmp_path)
    miniatures.parquet(tmp_path / "cifar10", ("red", "green"), ["test"])
    with pytest.raises(TriviumError, match=r"2 is without a name in the one and 'blue' in the other"):
        find(BY_NAME["CIFAR10"], tmp_path)


def test_a_damaged_parquet_copy_is_said(tmp_path: Path) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    for file in sorted((tmp_path / "cifar10" / "data").iterdir()):
        whole = file.read_bytes()
        for damaged in (b"", whole[: len(whole) // 2], whole[:4] + bytes(len(whole) - 400) + whole[-396:]):
            file.write_bytes(damaged)
            with pytest.raises(TriviumError, match=file.name):
                find(BY_NAME["CIFAR10"], tmp_path)
        for column in ("img", "label"):
            table = pq.read_table(io.BytesIO(whole))
            pq.write_table(table.set_column(table.schema.get_field_index(column), column, [["x"] * len(table)]), file)
            with pytest.raises(TriviumError, match=file.name):
                find(BY_NAME["CIFAR10"], tmp_path)
        file.write_bytes(whole)


def in_row_groups(folder: Path, size: int) -> None:
    for file in folder.glob("data/*.parquet"):
        pq.write_table(pq.read_table(file), file, row_group_size=size)


@pytest.fixture
def groups_read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, list[str]]]:
    """Row groups and columns, in the order in which they are read; two groups at most are kept."""
    read: list[tuple[int, list[str]]] = []
    whole = pq.ParquetFile.read_row_group

    def counted(self: pq.ParquetFile, number: int, columns: list[str]) -> pa.Table:
        read.append((number, columns))
        time.sleep(0.01)  # long enough for other threads to want it, too
        return whole(self, number, columns)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    monkeypatch.setattr("trivium.data.parquet.CACHE_BYTES", 1)
    return read


def test_pictures_of_a_parquet_copy_are_read_by_row_groups_when_their_turn_comes(
    tmp_path: Path, groups_read: list[tuple[int, list[str]]]
) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    in_row_groups(tmp_path / "cifar10", 2)
    train = opened("CIFAR10", tmp_path).train
    assert train.labels_N.tolist() == miniatures.labels_of("train", 3) and not groups_read
    feature_store.identity(train.pictures)
    assert not groups_read
    check_pictures(train)
    assert groups_read == [(number, ["img"]) for number in range(6)]
    check_pictures(train[np.arange(2)])
    assert groups_read[6:] == [(0, ["img"])], "the first is no longer kept"
    check_pictures(train[np.random.default_rng(0).permutation(12)])
    check_pictures(Split(pickle.loads(pickle.dumps(train.pictures)), train.labels_N))


def test_threads_that_want_the_same_row_group_read_it_once(
    tmp_path: Path, groups_read: list[tuple[int, list[str]]]
) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    in_row_groups(tmp_path / "cifar10", 6)
    train = opened("CIFAR10", tmp_path).train
    with ThreadPoolExecutor(8) as pool:
        read = list(pool.map(train.pictures.read, range(12)))
    assert sorted(groups_read) == [(0, ["img"]), (1, ["img"])]
    assert [int(picture[-1, 0, 0]) for picture in read] == [red(label) for label in train.labels_N.tolist()]


def test_what_a_parquet_copy_holds_beside_the_splits_in_use_is_not_read(tmp_path: Path) -> None:
    miniatures.parquet(tmp_path / "cifar10", splits=("train", "validation", "test"))
    for unused in ("val", "unlabelled"):
        (tmp_path / "cifar10" / "data" / f"{unused}-00000-of-00001.parquet").write_bytes(b"damaged")
    data = opened("CIFAR10", tmp_path)
    assert [len(split) for split in data.every] == [12, 6, 9]


def test_a_damaged_picture_of_a_parquet_copy_is_named_by_its_own_file_and_row(tmp_path: Path) -> None:
    miniatures.parquet(tmp_path / "cifar10")
    first = tmp_path / "cifar10" / "data" / "train-00000-of-00001.parquet"
    second = first.with_name("train-00001-of-00002.parquet")
    table = pq.read_table(first)
    cells = [{"bytes": b"no picture", "path": None}, {"bytes": None, "path": None}, *table["img"].to_pylist()[2:]]
    pq.write_table(table.set_column(0, "img", [cells]), second)
    train = opened("CIFAR10", tmp_path).train
    assert len(train) == 24 and list(train.pictures.files()) == [first, second]
    assert train.pictures.name(14) == "train-00000-of-00001.parquet 14"
    check_pictures(train[np.r_[:12, 14:24]])
    for row in (0, 1):
        with pytest.raises(BadSample, match=rf"train-00001-of-00002\.parquet \(row {row}\)"):
            train.pictures.read(12 + row)


def test_a_users_own_names_and_templates_come_first(tmp_path: Path) -> None:
    miniatures.cifar10(tmp_path)
    folder = tmp_path / "cifar-10-batches-py"
    (folder / "classnames.txt").write_text("plane\ncar\nbird\n")
    (folder / "zeroshot_classification_templates.txt").write_text("a blurry {}\n")
    data = opened("CIFAR10", tmp_path)
    assert data.prompts == ("plane", "car", "bird") and data.templates == ("a blurry {}",)
    (folder / "classnames.txt").write_text("plane\ncar\n")
    with pytest.raises(TriviumError, match=r"^\S+/cifar-10-batches-py/classnames.txt has 2 lines for 3 classes"):
        find(BY_NAME["CIFAR10"], tmp_path)
    (folder / "classnames.txt").unlink()
    (folder / "zeroshot_classification_templates.txt").write_text("a blurry thing\n")
    with pytest.raises(TriviumError, match=r"has no {c} where the class is to stand"):
        find(BY_NAME["CIFAR10"], tmp_path)


# --------------------------------------------------------------------------------------------- what is wrong


def break_food(root: Path) -> None:
    table = root / "food-101" / "meta" / "test.json"
    table.write_text(json.dumps({"sushi": ["sushi/1"]}))


def break_pets(root: Path) -> None:
    table = root / "oxford-iiit-pet" / "annotations" / "test.txt"
    table.write_text(table.read_text().replace("Abyssinian_13 1", "Abyssinian_13 2"))


def break_ucf(root: Path) -> None:
    table = root / "ucfTrainTestlist" / "trainlist01.txt"
    table.write_text(table.read_text().replace(".avi 3", ".avi 2"))


def only_videos(root: Path) -> None:
    for file in (root / "UCF-101").rglob("*.jpg"):
        file.rename(file.with_suffix(".avi"))


def break_cars(root: Path) -> None:
    savemat(root / "stanford_cars" / "cars_test_annos_withlabels.mat",
            {"annotations": np.array([(1, "00001.jpg")], dtype=[("bbox_x1", "f8"), ("fname", "O")])})  # fmt: skip


def break_country(root: Path) -> None:
    (root / "country211" / "test" / "AD").rename(root / "country211" / "test" / "XX")


def break_clevr(root: Path) -> None:
    table = root / "clevr" / "CLEVR_v1.0" / "scenes" / "CLEVR_val_scenes.json"
    table.write_text(json.dumps({"scenes": [{"image_filename": "a.png", "objects": [{}] * 2}]}))


def break_mnist(root: Path) -> None:
    file = root / "MNIST" / "raw" / "t10k-labels-idx1-ubyte"
    file.write_bytes(file.read_bytes()[:-1])


def break_stl(root: Path) -> None:
    (root / "stl10_binary" / "train_y.bin").write_bytes(b"\1\2")


def break_fer(root: Path) -> None:
    with (root / "fer2013" / "fer2013.csv").open("a") as file:
        file.write("3,1 2 3,Training\n")


def break_kitti(root: Path) -> None:
    (root / "Kitti" / "raw" / "training" / "label_2" / "000003.txt").write_text("Car 0 0\n")


def break_aircraft(root: Path) -> None:
    with (root / "fgvc-aircraft-2013b" / "data" / "images_variant_val.txt").open("a") as file:
        file.write("1000099 Concorde\n")


def break_cifar(root: Path) -> None:
    batch = {b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch))


def too_high_a_label(root: Path) -> None:
    batch = {b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 7]}
    (root / "cifar-10-batches-py" / "test_batch").write_bytes(pickle.dumps(batch))


@pytest.mark.parametrize(
    ("name", "damage", "says"),
    [
        ("Food101", break_food, r"test.json \(line 1\): sushi is no class"),
        ("Pets", break_pets, r"test.txt \(line 1\): class 2 is american_bulldog and Abyssinian"),
        ("UCF101", break_ucf, r"trainlist01.txt \(line 3\): YoYo has another number in classInd.txt"),
        ("UCF101", only_videos, "holds videos alone: extract the middle frame of each"),
        ("Cars", break_cars, "holds no classes: fetch cars_test_annos_withlabels.mat"),
        ("Country211", break_country, "the class AD stands in one split and not in the other"),
        ("CLEVR", break_clevr, "a.png has 2 objects, where CLEVR has 3 to 10"),
        ("MNIST", break_mnist, "t10k-labels-idx1-ubyte is no IDX file of 1 dimensions"),
        ("STL10", break_stl, "do not hold STL-10 .12 pictures and 2 labels."),
        ("FER2013", break_fer, r"fer2013.csv \(line 72\) is no line of FER2013"),
        ("KITTI", break_kitti, r"000003.txt \(line 1\) is no object of KITTI"),
        ("Aircraft", break_aircraft, r"images_variant_val.txt \(line 7\): 1000099 Concorde names no variant"),
        ("CIFAR10", break_cifar, "test_batch is no batch of CIFAR"),
        ("CIFAR10", too_high_a_label, "batches-py: the test split has labels from 0 to 7, but there are 3 classes"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_sentence(name: str, damage, says: str, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    BUILDERS[name](tmp_path)
    damage(tmp_path)
    with pytest.raises(TriviumError, match=says):
        find(BY_NAME[name], tmp_path)


def test_a_class_without_a_training_picture_is_named(tmp_path: Path) -> None:
    miniatures.gtsrb(tmp_path)
    data = opened("GTSRB", tmp_path)
    assert any(
        note.startswith("no training picture of 00001, 00002, 00003, 00005, 00006 and 35 more") for note in data.notes
    )


def test_a_damaged_picture_is_a_bad_sample(tmp_path: Path) -> None:
    miniatures.dtd(tmp_path)
    data = opened("DTD", tmp_path)
    files = data.train.pictures
    file = tmp_path / "dtd" / "images" / files.name(1)
    file.write_bytes(file.read_bytes()[:80])
    with pytest.raises(BadSample, match=files.name(1)):
        files.read(1)
    file.unlink()
    with pytest.raises(BadSample, match="does not exist"):
        files.read(1)
    file.mkdir()
    with pytest.raises(UnreadableNow, match="cannot be read"):
        files.read(1)


def test_without_h5py_pcam_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pcam").mkdir()
    (tmp_path / "pcam" / "camelyonpatch_level_2_split_train_x.h5").touch()
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(TriviumError, match=r"pip install 'trivium\[vision\]'"):
        find(BY_NAME["PCAM"], tmp_path)


# ---------------------------------------------------------------------------------------- parts of a split


def test_capping_and_joining_keep_labels_with_their_pictures(tmp_path: Path) -> None:
    miniatures.caltech101(tmp_path)
    data = opened("Caltech101", tmp_path)
    few = capped(data.train, 10)
    assert len(few) == 10 and capped(data.train, 90) is data.train
    both = data.train + data.test
    assert len(both) == len(data.train) + len(data.test)
    for part in (few, both):
        check_pictures(part)


def test_a_fifth_of_each_class_is_held_out_and_no_class_loses_its_last() -> None:
    labels = np.repeat([0, 1, 2, 7], [10, 50, 1, 4])
    taken = held_out(labels)
    assert np.bincount(labels[taken], minlength=8).tolist() == [2, 10, 0, 0, 0, 0, 0, 0]
    assert np.array_equal(taken, held_out(labels)) and not np.array_equal(taken, held_out(labels, seed=1))


def _opened_or_told(name: str, root: Path) -> None:
    """Whatever is wrong with a copy is said in a sentence, or it is not there at all."""
    told = ""
    try:
        found = find(BY_NAME[name], root)
        assert isinstance(found, DataSet | Missing)
    except TriviumError as error:
        told = str(error)
    assert not told or str(root) in told or name in told


@pytest.mark.parametrize("name", [layout.name for layout in VISION])
def test_no_part_of_a_layout_that_is_missing_or_damaged_ends_in_a_traceback(name: str, tmp_path: Path) -> None:
    if name == "PCAM":
        pytest.importorskip("h5py", reason="PCAM's miniature is HDF5: install trivium[vision]")
    whole, root = tmp_path / "whole", tmp_path / "root"
    whole.mkdir()
    BUILDERS[name](whole)
    if name == "ImageNet":
        miniatures.imagenet(tmp_path / "flat", flat=True)
        shutil.copytree(tmp_path / "flat", whole, dirs_exist_ok=True)
        shutil.rmtree(whole / "imagenet" / "val" / "n01440764")
    paths = sorted(path.relative_to(whole) for path in whole.rglob("*"))
    folders = [path for path in paths if (whole / path).is_dir()]
    tables = [path for path in paths if (whole / path).is_file() and path.suffix.lower() not in SUFFIXES]

    def anew() -> None:
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(whole, root, copy_function=os.link)

    for path in folders:
        anew()
        shutil.rmtree(root / path)
        _opened_or_told(name, root)
        root.joinpath(path).mkdir(parents=True, exist_ok=True)  # there, and empty
        _opened_or_told(name, root)
    for path in tables:
        data = (whole / path).read_bytes()
        half = data[: len(data) // 2]
        for damaged in (None, b"", half, half + b"\xff\xfe{", b"\n".join(line[::-1] for line in data.splitlines())):
            anew()
            (root / path).unlink()
            if damaged is not None:
                (root / path).write_bytes(damaged)
            _opened_or_told(name, root)


@pytest.mark.parametrize("is_there", [True, False])
def test_validation_stands_for_a_test_split_whose_labels_nobody_publishes(tmp_path: Path, is_there: bool) -> None:
    splits = ("train", "validation", "test") if is_there else ("train", "validation")
    miniatures.parquet(tmp_path / "imagenet", splits=splits)
    if is_there:
        file = tmp_path / "imagenet" / "data" / "test-00000-of-00001.parquet"
        table = pq.read_table(file)
        hidden = pa.array([-1] * len(table), pa.int64())
        pq.write_table(table.set_column(table.schema.get_field_index("label"), "label", hidden), file)
    data = copies.parquet(tmp_path / "imagenet")
    why = "has no labels" if is_there else "is not there"
    assert data.validation is None and data.splits.endswith(f"measured on its validation split, since test {why}")
    assert all("validation" in str(path) for path in data.test.pictures.files()) and data.test.labels_N.min() == 0
    (tmp_path / "imagenet" / "data" / "validation-00000-of-00001.parquet").unlink()
    if not is_there:
        with pytest.raises(TriviumError, match=r"must hold train\*\.parquet and test"):
            copies.parquet(tmp_path / "imagenet")
