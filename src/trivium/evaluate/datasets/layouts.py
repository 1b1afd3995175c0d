"""The 22 vision data sets of FLAVA's evaluation, and one of our own: how their owners lay them out, and where they
publish them.

One line each; a reader for each official layout stands in arrays.py, folders.py and lists.py, those for copies in
copies.py. Sizes are the official ones. Names are those of the published scores.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from trivium.evaluate.datasets import arrays, folders, lists, rendered
from trivium.evaluate.datasets.pictures import DataSet


@dataclass(frozen=True)
class Layout:
    name: str
    num_classes: int
    train_size: int  # with the validation split, where that is official
    test_size: int
    read: Callable[[Path], DataSet]  # of its folder
    places: tuple[str, ...]  # where that folder may stand below the root of all data
    markers: tuple[str, ...]  # patterns, one of which must match in it
    expected: str  # the official layout in words
    owners: str  # where it is published
    copies: tuple[str, ...] = ()  # names of WebDataset copies, without "wds_"


def _vtab(name: str) -> tuple[str, ...]:
    return (f"vtab-{name}", name)


VISION = (
    Layout(
        "ImageNet", 1000, 1_281_167, 50_000, folders.imagenet, ("imagenet", "ImageNet", "ILSVRC2012", "imagenet-1k"),
        ("train/n*/*",), "imagenet/{train,val}/<wnid>/*.JPEG (val may be flat beside ILSVRC2012_devkit_t12)",
        "https://image-net.org/download.php", ("imagenet1k",),
    ),
    Layout(
        "Food101", 101, 75_750, 25_250, lists.food101, ("food-101", "food101/food-101"), ("meta/train.json",),
        "food-101/images/<class>/*.jpg, food-101/meta/{train,test}.json",
        "https://data.vision.ee.ethz.ch/cvl/datasets_extra/food-101/", ("food101",),
    ),
    Layout(
        "CIFAR10", 10, 50_000, 10_000, arrays.cifar10, ("cifar-10-batches-py", "cifar10/cifar-10-batches-py"),
        ("data_batch_1",), "cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}",
        "https://www.cs.toronto.edu/~kriz/cifar.html", _vtab("cifar10"),
    ),
    Layout(
        "CIFAR100", 100, 50_000, 10_000, arrays.cifar100, ("cifar-100-python", "cifar100/cifar-100-python"), ("meta",),
        "cifar-100-python/{train,test,meta}", "https://www.cs.toronto.edu/~kriz/cifar.html", _vtab("cifar100"),
    ),
    Layout(
        "Cars", 196, 8144, 8041, lists.cars, ("stanford_cars", "cars"), ("devkit/cars_meta.mat",),
        "stanford_cars/{cars_train,cars_test}/*.jpg, devkit/{cars_meta,cars_train_annos}.mat,"
        " cars_test_annos_withlabels.mat",
        "https://ai.stanford.edu/~jkrause/cars/car_dataset.html (its files are gone from there)", ("cars",),
    ),
    Layout(
        "Aircraft", 100, 6667, 3333, lists.aircraft, ("fgvc-aircraft-2013b/data",), ("variants.txt",),
        "fgvc-aircraft-2013b/data/{images/*.jpg,images_variant_{train,val,test}.txt,variants.txt}",
        "https://www.robots.ox.ac.uk/~vgg/data/fgvc-aircraft/", ("fgvc_aircraft",),
    ),
    Layout(
        "DTD", 47, 3760, 1880, folders.dtd, ("dtd", "dtd/dtd"), ("labels/train1.txt",),
        "dtd/images/<class>/*.jpg, dtd/labels/{train,val,test}1.txt", "https://www.robots.ox.ac.uk/~vgg/data/dtd/",
        _vtab("dtd"),
    ),
    Layout(
        "Pets", 37, 3680, 3669, lists.pets, ("oxford-iiit-pet",), ("annotations/trainval.txt",),
        "oxford-iiit-pet/images/*.jpg, oxford-iiit-pet/annotations/{trainval,test}.txt",
        "https://www.robots.ox.ac.uk/~vgg/data/pets/", _vtab("pets"),
    ),
    Layout(
        "Caltech101", 102, 3060, 6085, folders.caltech101,
        ("caltech101/101_ObjectCategories", "caltech-101/101_ObjectCategories", "101_ObjectCategories"),
        ("*/*.jpg",),
        "caltech101/101_ObjectCategories/<class>/*.jpg, BACKGROUND_Google among them",
        "https://data.caltech.edu/records/mzrjq-6wc02", _vtab("caltech101"),
    ),
    Layout(
        "Flowers102", 102, 2040, 6149, lists.flowers102, ("flowers-102", "flowers102"), ("setid.mat",),
        "flowers-102/{jpg/*.jpg,imagelabels.mat,setid.mat}", "https://www.robots.ox.ac.uk/~vgg/data/flowers/102/",
        _vtab("flowers"),
    ),
    Layout(
        "MNIST", 10, 60_000, 10_000, arrays.mnist, ("MNIST/raw", "mnist/raw", "MNIST", "mnist"),
        ("train-images-idx3-ubyte*",),
        "MNIST/raw/{train,t10k}-{images-idx3,labels-idx1}-ubyte[.gz]", "http://yann.lecun.com/exdb/mnist/", ("mnist",),
    ),
    Layout(
        "STL10", 10, 5000, 8000, arrays.stl10, ("stl10_binary", "stl10/stl10_binary"), ("train_X.bin",),
        "stl10_binary/{train_X,train_y,test_X,test_y}.bin, stl10_binary/class_names.txt",
        "https://cs.stanford.edu/~acoates/stl10/", ("stl10",),
    ),
    Layout(
        "EuroSAT", 10, 10_000, 5000, folders.eurosat, ("eurosat/2750", "EuroSAT/2750", "2750"),
        ("*/*.jpg",),
        "eurosat/2750/<Class>/*.jpg", "https://github.com/phelber/EuroSAT", _vtab("eurosat"),
    ),
    Layout(
        "GTSRB", 43, 26_640, 12_630, lists.gtsrb, ("gtsrb", "GTSRB"),
        ("GTSRB/Training", "GTSRB/Final_Training", "Training", "Final_Training"),
        "gtsrb/GTSRB/{Training/<5 digits>,Final_Test/Images}/*.ppm, gtsrb/GT-final_test.csv",
        "https://benchmark.ini.rub.de/gtsrb_dataset.html", ("gtsrb",),
    ),
    Layout(
        "KITTI", 4, 5985, 1496, lists.kitti, ("Kitti/raw", "kitti", "KITTI"), ("training/label_2",),
        "Kitti/raw/training/{image_2/*.png,label_2/*.txt}",
        "https://www.cvlibs.net/datasets/kitti/eval_object.php", _vtab("kitti_closest_vehicle_distance"),
    ),
    Layout(
        "PCAM", 2, 294_912, 32_768, arrays.pcam, ("pcam", "PCAM"), ("camelyonpatch_level_2_split_train_x.h5",),
        "pcam/camelyonpatch_level_2_split_{train,valid,test}_{x,y}.h5", "https://github.com/basveeling/pcam",
        _vtab("pcam"),
    ),
    Layout(
        "UCF101", 101, 9537, 3783, folders.ucf101, ("UCF-101", "ucf101/UCF-101"),
        ("*/v_*",),
        "UCF-101/<class>/<video>.jpg (the middle frame of each video), ucfTrainTestlist/"
        "{trainlist01,testlist01,classInd}.txt",
        "https://www.crcv.ucf.edu/data/UCF101.php", ("ucf101",),
    ),
    Layout(
        "CLEVR", 8, 70_000, 15_000, lists.clevr, ("clevr/CLEVR_v1.0", "CLEVR_v1.0"), ("scenes",),
        "clevr/CLEVR_v1.0/images/{train,val}/*.png, scenes/CLEVR_{train,val}_scenes.json",
        "https://cs.stanford.edu/people/jcjohns/clevr/", _vtab("clevr_count_all"),
    ),
    Layout(
        "FER2013", 7, 28_709, 7178, arrays.fer2013, ("fer2013", "FER2013"),
        ("fer2013.csv", "icml_face_data.csv", "train/*/*"),
        "fer2013/fer2013.csv (or icml_face_data.csv, or train/<emotion>/ and test/<emotion>/)",
        "https://www.kaggle.com/c/challenges-in-representation-learning-facial-expression-recognition-challenge",
        ("fer2013",),
    ),
    Layout(
        "SUN397", 397, 19_850, 19_850, folders.sun397, ("SUN397", "sun397/SUN397"), ("ClassName.txt",),
        "SUN397/<letter>/<class>[/<sub>]/*.jpg, SUN397/{ClassName,Training_01,Testing_01}.txt",
        "https://vision.princeton.edu/projects/2010/SUN/", ("sun397",),
    ),
    Layout(
        "RenderedSST2", 2, 7792, 1821, folders.rendered_sst2, ("rendered-sst2",), ("train/*/*",),
        "rendered-sst2/{train,valid,test}/{negative,positive}/*.png",
        "https://github.com/openai/CLIP/blob/main/data/rendered-sst2.md", ("renderedsst2",),
    ),
    Layout(
        "Country211", 211, 42_200, 21_100, folders.country211, ("country211",), ("train/*/*",),
        "country211/{train,valid,test}/<ISO2>/*.jpg", "https://github.com/openai/CLIP/blob/main/data/country211.md",
        ("country211",),
    ),
)  # fmt: skip
# Not the papers': no published score is set beside them.
OWN = (
    Layout(
        "rendered_sst2_own", 2, 67_349, 872, rendered.sst2, ("glue/SST-2", "glue_data/SST-2", "SST-2"), ("train.tsv",),
        "glue/SST-2/{train,dev}.tsv, whose sentences are drawn here", "https://gluebenchmark.com/tasks",
    ),
)  # fmt: skip
BY_NAME = {layout.name: layout for layout in (*VISION, *OWN)}
