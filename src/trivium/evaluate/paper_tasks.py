"""The tasks that the papers report, by suite: FLAVA's 35 (22 vision, 8 language, 5 multimodal), ALBEF's and UniT's.

A task says which of its figures stand in which published table, and where ours come from: vision data sets, zero-shot
retrieval, grounding and detection are measured by the suite itself, what takes fine-tuning is read from the results of
`trivium finetune`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Literal

from trivium.data.detection import LAYOUTS
from trivium.evaluate.datasets import captions, layouts

Domain = Literal["language", "vision", "multimodal"]
Kind = Literal["classification", "retrieval", "grounding", "detection", "fine-tuning"]
DOMAINS: tuple[Domain, ...] = ("language", "vision", "multimodal")
GLUE_OWNERS = "https://gluebenchmark.com/tasks"


@dataclass(frozen=True)
class Figure:
    metric: str  # as published.csv calls it
    result: str  # name of ours after the task's title; "" is the title alone
    averaged: bool = True  # into the mean of its domain
    splits: tuple[str, ...] = ()  # of published.csv, the first one that has a value; (): any
    instead: str = ""  # name of ours on another split, where the answers of the published one are not public
    first: str = ""  # another name that stands before `result` where a model has it
    unlike: tuple[str, ...] = ()  # metrics of published.csv that are shown in its place and not compared with
    protocol: str = ""  # of published.csv, where it is not the task's

    @property
    def title(self) -> str:
        return f"{self.protocol} {self.metric}" if self.protocol else self.metric


@dataclass(frozen=True)
class PaperTask:
    name: str  # as published.csv calls it
    domain: Domain
    kind: Kind
    protocol: str  # likewise
    figures: tuple[Figure, ...]
    title: str = ""  # under which `trivium finetune` leaves its results; "": the name
    verb: str = ""  # the task's name there, with the suite's settings, or of detection in the model; "": not built
    expected: str = ""  # of data that `trivium finetune` reads: the official layout
    owners: str = ""
    beside: tuple[str, ...] = ()  # other protocols whose numbers the paper sets beside its own
    shortlist: int = 0  # candidates of retrieval that are re-ranked, where a model matches pictures with texts

    @property
    def prefix(self) -> str:
        return self.title or self.name

    @property
    def key(self) -> str:
        """The name, and the protocol where a suite holds two of the name."""
        return f"{self.name} ({self.protocol})"

    def metric(self, figure: Figure) -> str:
        """What one of its figures is called, with its split where another is of the same metric."""
        alike = sum(each.title == figure.title for each in self.figures)
        return f"{figure.title}, {figure.splits[0]}" if alike > 1 else figure.title


_PROBE = Figure("accuracy", "linear_probe.accuracy", splits=("test", "val", "not stated"))
_RECALLS = tuple(
    Figure(f"{way} R@{cutoff}", f"zero_shot.{way.lower()}_r{cutoff}", cutoff < 10, splits)
    for splits in [("test (1K)", "test (5K)")]
    for way in ("TR", "IR")
    for cutoff in (1, 5, 10)
)
_DEV = ("dev",)

# Measured with every vision task and published of this one alone. They enter no average, which is one of probes.
_BESIDE_THE_PROBE = {
    "ImageNet": (
        Figure("accuracy", "knn.accuracy", averaged=False, splits=("val",), protocol="k-NN"),
        Figure("accuracy (top-1)", "zero_shot.accuracy", averaged=False, splits=("val",), protocol="zero-shot"),
        Figure("top-5 accuracy", "zero_shot.top5_accuracy", averaged=False, splits=("val",), protocol="zero-shot"),
    )
}
VISION = tuple(
    PaperTask(
        layout.name, "vision", "classification", "linear probe", (_PROBE, *_BESIDE_THE_PROBE.get(layout.name, ()))
    )
    for layout in layouts.VISION
)


def _glue(
    name: str, verb: str, metric: str = "accuracy", files: str = "{train,dev}.tsv", unlike: tuple[str, ...] = ()
) -> PaperTask:
    return PaperTask(
        name, "language", "fine-tuning", "fine-tune", (Figure(metric, "", splits=_DEV, unlike=unlike),), verb=verb,
        expected=f"glue_data/{name}/{files}", owners=GLUE_OWNERS, beside=("multi-task training",),
    )  # fmt: skip


# Under a name that no paper has, so nothing is set beside them and they enter no average.
OWN = tuple(
    PaperTask(
        layout.name, "vision", "classification", "linear probe",
        (Figure("accuracy", "linear_probe.accuracy", averaged=False),),
    )
    for layout in layouts.OWN
)  # fmt: skip

LANGUAGE = (
    _glue("MNLI", "mnli", "mean accuracy (m, mm)", "{train,dev_matched,dev_mismatched}.tsv",
          ("accuracy (variant not stated)",)),
    _glue("CoLA", "cola", "Matthews"),
    _glue("MRPC", "mrpc", "mean(accuracy, F1)", unlike=("accuracy", "F1")),
    _glue("QQP", "qqp", "mean(accuracy, F1)", unlike=("accuracy", "F1")),
    _glue("SST-2", "sst2"),
    _glue("QNLI", "qnli"),
    _glue("RTE", "rte"),
    _glue("STS-B", "stsb", "Pearson"),
)  # fmt: skip

VQA = (
    "{v2_OpenEnded_mscoco_{train2014,val2014}_questions,v2_mscoco_{train2014,val2014}_annotations}.json,"
    " {train2014,val2014}/*.jpg",
    "https://visualqa.org/download.html",
)
ENTAILMENT = ("snli_ve_{train,dev,test}.jsonl, flickr30k_images/*.jpg", "https://github.com/necla-ml/SNLI-VE")
MEMES = ("{train,dev_seen,dev_unseen}.jsonl, img/*.png", "https://www.drivendata.org/competitions/64/hateful-memes/")


def _retrieval(name: str, figures: tuple[Figure, ...] = _RECALLS) -> PaperTask:
    """The short lists of re-ranking are as long as in ALBEF's paper."""
    return PaperTask(
        name, "multimodal", "retrieval", "zero-shot", figures, expected=captions.BY_NAME[name].expected,
        owners=captions.BY_NAME[name].owners, shortlist=256 if name.startswith("COCO") else 128,
    )  # fmt: skip


MULTIMODAL = (
    PaperTask(
        "VQAv2", "multimodal", "fine-tuning", "fine-tune",
        (Figure("VQA accuracy", "test_dev.accuracy", splits=("not stated", "test-dev"), instead="dev.accuracy"),),
        "VQAv2", "vqav2", *VQA,
        ("multi-task training",),
    ),
    PaperTask(
        "SNLI-VE", "multimodal", "fine-tuning", "fine-tune",
        (Figure("accuracy", "test.accuracy", splits=("not stated", "test"), instead="dev.accuracy"),),
        "SNLI-VE", "snli_ve", *ENTAILMENT, ("multi-task training",),
    ),
    PaperTask(
        "HatefulMemes", "multimodal", "fine-tuning", "fine-tune",
        (Figure("AUROC", "dev.auroc", splits=("not stated", "dev_unseen"), instead="dev_seen.auroc",
                first="dev_unseen.auroc"),),
        "Hateful Memes", "hateful_memes", *MEMES,
    ),
    _retrieval("Flickr30K retrieval"),
    _retrieval("COCO retrieval"),
)  # fmt: skip

_RERANKED = tuple(replace(f, first=re.sub(r"_r(\d+)$", r"_reranked_r\1", f.result)) for f in _RECALLS)
_TUNED_RECALLS = tuple(
    replace(f, result=f.result.replace("zero_shot", "test"), first=f.first.replace("zero_shot", "test"), averaged=True)
    for f in _RERANKED
)
ALBEF = (
    _retrieval("Flickr30K retrieval", _RERANKED),
    PaperTask(
        "Flickr30K retrieval", "multimodal", "fine-tuning", "fine-tune", _TUNED_RECALLS,
        verb="retrieval_flickr30k",
        expected="flickr30k_{train,val,test}.json (ALBEF) or dataset_flickr30k.json (Karpathy), flickr30k-images/*.jpg",
        owners=captions.BY_NAME["Flickr30K retrieval"].owners, shortlist=128,
    ),
    PaperTask(
        "COCO retrieval", "multimodal", "fine-tuning", "fine-tune", _TUNED_RECALLS,
        verb="retrieval_coco",
        expected="coco_{train,val,test}.json (ALBEF) or dataset_coco.json (Karpathy), {train2014,val2014}/*.jpg",
        owners=captions.BY_NAME["COCO retrieval"].owners, shortlist=256,
    ),
    PaperTask(
        "VQAv2", "multimodal", "fine-tuning", "fine-tune",
        (Figure("VQA accuracy", "test_dev.accuracy", splits=("test-dev",), instead="dev.accuracy"),
         Figure("VQA accuracy", "test.accuracy", splits=("test-std",))), "VQAv2", "vqa", *VQA,
    ),
    PaperTask(
        "NLVR2", "multimodal", "fine-tuning", "fine-tune",
        (Figure("accuracy", "dev.accuracy", splits=_DEV), Figure("accuracy", "test-P.accuracy", splits=("test-P",))),
        "NLVR2", "nlvr2", "data/{train,dev,test1}.json, images/train/, dev/, test1/",
        "https://lil.nlp.cornell.edu/nlvr/",
    ),
    PaperTask(
        "SNLI-VE", "multimodal", "fine-tuning", "fine-tune",
        (Figure("accuracy", "dev.accuracy", splits=("val", "dev")),
         Figure("accuracy", "test.accuracy", splits=("test",))),
        "SNLI-VE", "visual_entailment", *ENTAILMENT,
    ),
    PaperTask(
        "RefCOCO+", "multimodal", "grounding", "weakly supervised",
        tuple(Figure("accuracy at IoU 0.5", f"{name}.accuracy", splits=(name,)) for name in ("val", "testA", "testB")),
        verb="grounding", expected="refcoco+/{refs(unc).p,instances.json,dets.json}, train2014/*.jpg",
        owners="https://github.com/lichengunc/refer; dets.json: https://github.com/salesforce/ALBEF",
    ),
)  # fmt: skip


def _shared(name: str, domain: Domain, figure: Figure, expected: str, owners: str, verb: str = "") -> PaperTask:
    return PaperTask(name, domain, "fine-tuning", "multi-task training", (figure,), name, verb, expected, owners)


def _detection(task: str, split: str, expected: str) -> PaperTask:
    """task: of the model, and of LAYOUTS. split: as published.csv calls it."""
    layout = LAYOUTS[task]
    figure = Figure("mAP 0.50:0.95", f"{layout.validation}.ap", splits=(split,))
    return PaperTask(layout.figure, "vision", "detection", "multi-task training", (figure,), verb=task,
                     expected=expected, owners=layout.owners)  # fmt: skip


UNIT = (
    _detection("coco", "val2017", "coco/{annotations/instances_val2017.json, val2017/*.jpg}"),
    _detection(
        "vg", "val (disjoint from COCO val2017)",
        "visual_genome/{annotations/instances_val_split_by_coco_2017.json, images/ or VG_100K/ and VG_100K_2/}",
    ),
    _shared("VQAv2", "multimodal",  # val2017: the questions of val2014 on those of its pictures that are COCO's val2017
            Figure("VQA accuracy", "val2017.accuracy", splits=("val2017 images",), instead="dev.accuracy"),
            f"{VQA[0]}, annotations/instances_val2017.json of COCO", VQA[1], "vqav2"),
    _shared("SNLI-VE", "multimodal", Figure("accuracy", "dev.accuracy", splits=_DEV), *ENTAILMENT, "snli_ve"),
    *(
        _shared(name, "language", Figure(metric, result, splits=_DEV), f"glue_data/{name}/*.tsv", GLUE_OWNERS, verb)
        for name, metric, result, verb in (
            ("QNLI", "accuracy", "dev.accuracy", "qnli"), ("QQP", "accuracy", "dev.accuracy", "qqp"),
            ("MNLI", "accuracy (mismatched)", "dev_mismatched.accuracy", "mnli"),
            ("SST-2", "accuracy", "dev.accuracy", "sst2"),
        )
    ),
)  # fmt: skip

SUITES: dict[str, tuple[PaperTask, ...]] = {
    "flava35": (*LANGUAGE, *VISION, *MULTIMODAL),
    "vision": VISION,
    "language": LANGUAGE,
    "multimodal": MULTIMODAL,
    "albef": ALBEF,
    "unit": UNIT,
    "own": OWN,
}
