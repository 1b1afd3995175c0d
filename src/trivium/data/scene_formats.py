"""Scenes as the rows of the published data sets: COCO, Visual Genome, VQAv2, SNLI-VE, NLVR2, RefCOCO.

Each format says where a picture lies, what rows a run of scenes gives, and what files the rows become; scene_files.py
writes them. The split "train" takes the names of the published training half, every other split those of the published
validation half, so that one folder can hold both: numbers of pictures never meet (FIRST_ID).

Easy to get wrong: COCO numbers categories from 1 and its masks run down the columns; Visual Genome in the form that
UniT reads has 16 attribute numbers a box, padded with -1, and no attribute 0; REFER's file of references is a
pickle, which is not written here: `refs(unc).json` holds the same list.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from trivium.data.drawings import HUES
from trivium.data.scene_language import captions, described, expressions, pair_statements, questions, statements
from trivium.data.scenes import SIDE, SIZES, Scene, Scenes

Half = str  # "train" or "val"
Rows = dict[str, list[Any]]  # what a run of scenes gives, by name
Files = dict[str, Any]  # path below the format's folder -> its JSON, or the list of its lines

FIRST_ID = {"train": 1, "val": 500_000_001}  # of pictures
OBJECTS_PER_PICTURE = 10  # room that numbers of annotations leave
QUESTIONS_PER_PICTURE = 1000  # as in VQAv2
NUM_ATTRIBUTES = 16  # room for the attributes of one box
ATTRIBUTES = (*HUES, *SIZES)  # numbered from 1
NUM_ANSWERS = 10  # of a question
SET_SIZE = 4  # scenes to a set of NLVR2: two pairs, for one of which each sentence holds
YEAR = "2026"
INFO = {"description": "Scenes composed of drawings, by Trivium", "version": "1.0", "year": int(YEAR)}
LICENSES = [{"id": 1, "name": "several: see ATTRIBUTION.txt", "url": "https://creativecommons.org/licenses/by/4.0/"}]


class Format(NamedTuple):
    picture: Callable[[Half, int], str]  # the path of a picture from its half and number, below the format's folder
    rows: Callable[[Half, Scenes, Sequence[Scene]], Rows]
    files: Callable[[Half, Scenes, Rows], Files]
    suffix: str = "jpg"  # of pictures
    lines: bool = False  # files hold a JSON a line


def half_of(scenes: Scenes) -> Half:
    return "train" if scenes.split == "train" else "val"


def picture_id(half: Half, scene: Scene) -> int:
    return FIRST_ID[half] + scene.index


# ---------------------------------------------------------------------------------------- COCO, Visual Genome


def run_lengths(mask_HW: np.ndarray) -> dict[str, Any]:
    """A mask as COCO's uncompressed run lengths: down the columns, beginning with the pixels that are outside."""
    column_wise = mask_HW.T.ravel()
    changes = np.flatnonzero(np.diff(column_wise)) + 1
    ends = [0] * int(column_wise[0]) + [*changes.tolist(), column_wise.size]  # "outside" may have no pixels
    return {"size": list(mask_HW.shape), "counts": np.diff([0, *ends]).tolist()}


def object_annotations(half: Half, scene: Scene) -> list[dict[str, Any]]:
    """COCO's entries of the objects of one scene."""
    number = picture_id(half, scene)
    return [
        {
            "id": number * OBJECTS_PER_PICTURE + place,
            "image_id": number,
            "category_id": thing.category + 1,
            "bbox": list(thing.box),
            "area": thing.area,
            "iscrowd": 0,
            "segmentation": run_lengths(scene.mask(place)),
        }
        for place, thing in enumerate(scene.objects)
    ]


def _image(half: Half, scene: Scene, file_name: str) -> dict[str, Any]:
    number = picture_id(half, scene)
    return {"id": number, "file_name": file_name, "width": SIDE, "height": SIDE, "license": 1}


def _instances(scenes: Scenes, rows: Rows) -> dict[str, Any]:
    categories = [
        {"id": number, "name": each.name, "supercategory": each.group}
        for number, each in enumerate(scenes.categories, start=1)
    ]
    return {
        "info": INFO,
        "licenses": LICENSES,
        "images": rows["images"],
        "annotations": rows["annotations"],
        "categories": categories,
    }


def _coco_picture(half: Half, number: int) -> str:
    return f"{half}2017/{number:012d}.jpg"


def _coco_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    rows: Rows = {"images": [], "annotations": [], "captions": []}
    for scene in run:
        number = picture_id(half, scene)
        rows["images"].append(_image(half, scene, _coco_picture(half, number).partition("/")[2]))
        rows["annotations"] += object_annotations(half, scene)
        rows["captions"] += [
            {"id": number * OBJECTS_PER_PICTURE + place, "image_id": number, "caption": caption}
            for place, caption in enumerate(captions(scene, scenes.draws(scene.index)))
        ]
    return rows


def _coco_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    captioned = {"info": INFO, "licenses": LICENSES, "images": rows["images"], "annotations": rows["captions"]}
    return {
        f"annotations/instances_{half}2017.json": _instances(scenes, rows),
        f"annotations/captions_{half}2017.json": captioned,
    }


def _vg_picture(half: Half, number: int) -> str:
    return f"images/{number}.jpg"


def _vg_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    rows: Rows = {
        name: [] for name in ("images", "annotations", "image_data", "attributes", "region_descriptions", "qas")
    }
    for scene in run:
        number = picture_id(half, scene)
        rows["images"].append(_image(half, scene, f"{number}.jpg"))
        things = []
        regions = []
        for thing, annotation in zip(scene.objects, object_annotations(half, scene), strict=True):
            named = [word for word in (thing.hue, thing.size) if word is not None]
            numbers = [ATTRIBUTES.index(word) + 1 for word in named]
            rows["annotations"].append(
                annotation | {"attribute_ids_max16": numbers + [-1] * (NUM_ATTRIBUTES - len(numbers))}
            )
            box = dict(zip("xywh", thing.box, strict=True))
            noun = scene.categories[thing.category].noun
            things.append({"object_id": annotation["id"], "names": [noun], "attributes": named, "synsets": [], **box})
            left, top, width, height = thing.box
            place = {"x": left, "y": top, "width": width, "height": height}
            phrase = described(scene, thing)
            regions.append({"region_id": annotation["id"], "image_id": number, "phrase": phrase, **place})
        rows["image_data"].append(
            {"image_id": number, "width": SIDE, "height": SIDE, "coco_id": None, "flickr_id": None, "url": ""}
        )
        rows["attributes"].append({"image_id": number, "attributes": things})
        rows["region_descriptions"].append({"id": number, "regions": regions})
        asked = [
            {
                "qa_id": number * QUESTIONS_PER_PICTURE + place,
                "image_id": number,
                "question": question.text,
                "answer": question.answer,
                "a_objects": [],
                "q_objects": [],
            }
            for place, question in enumerate(questions(scene, scenes))
        ]
        rows["qas"].append({"id": number, "qas": asked})
    return rows


def _vg_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    names = [{"id": number, "name": name} for number, name in enumerate(ATTRIBUTES, start=1)]
    return {
        f"annotations/instances_{half}_split_by_coco_2017.json": _instances(scenes, rows) | {"attCategories": names},
        f"{half}/image_data.json": rows["image_data"],
        f"{half}/attributes.json": rows["attributes"],
        f"{half}/region_descriptions.json": rows["region_descriptions"],
        f"{half}/question_answers.json": rows["qas"],
    }


# --------------------------------------------------------------------------------------------------- VQAv2


def _coco_2014(half: Half, number: int) -> str:
    return f"{half}2014/COCO_{half}2014_{number:012d}.jpg"


def _vqa_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    rows: Rows = {"questions": [], "annotations": []}
    for scene in run:
        number = picture_id(half, scene)
        for place, question in enumerate(questions(scene, scenes)):
            ids = {"image_id": number, "question_id": number * QUESTIONS_PER_PICTURE + place}
            rows["questions"].append(ids | {"question": question.text})
            rows["annotations"].append(
                ids
                | {
                    "question_type": question.question_type,
                    "answer_type": question.answer_type,
                    "multiple_choice_answer": question.answer,
                    "answers": [
                        {"answer": question.answer, "answer_confidence": "yes", "answer_id": answer}
                        for answer in range(1, NUM_ANSWERS + 1)
                    ],
                }
            )
    return rows


def _vqa_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    subset = f"{half}2014"
    said = {"info": INFO, "license": LICENSES[0], "data_type": "mscoco", "data_subtype": subset}
    return {
        f"v2_OpenEnded_mscoco_{subset}_questions.json": said
        | {"task_type": "Open-Ended", "questions": rows["questions"]},
        f"v2_mscoco_{subset}_annotations.json": said | {"annotations": rows["annotations"]},
    }


# ----------------------------------------------------------------------------------------- SNLI-VE and NLVR2


def _flickr_picture(half: Half, number: int) -> str:
    return f"flickr30k_images/{number}.jpg"


def _entailment_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    rows: Rows = {"lines": []}
    for scene in run:
        number = picture_id(half, scene)
        premise = captions(scene, scenes.draws(scene.index))[0]
        for place, statement in enumerate(statements(scene, scenes)):
            rows["lines"].append(
                {
                    "Flickr30K_ID": str(number),
                    "Flikr30kID": f"{number}.jpg",  # so spelled and so written by one of the two published readers
                    "annotator_labels": [statement.label],
                    "captionID": f"{number}.jpg#0",
                    "gold_label": statement.label,
                    "pairID": f"{number}.jpg#0r{place}",
                    "sentence1": premise,
                    "sentence2": statement.text,
                }
            )
    return rows


def _entailment_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    return {f"snli_ve_{'train' if half == 'train' else 'dev'}.jsonl": rows["lines"]}


def _pair_place(number: int) -> tuple[int, int, int]:
    """The set of a picture, its pair there, and 0 for left or 1 for right."""
    place = (number - 1) % (FIRST_ID["val"] - 1)
    return place // SET_SIZE, place % SET_SIZE // 2, place % 2


def _nlvr2_picture(half: Half, number: int) -> str:
    group, pair, side = _pair_place(number)
    name = f"{group}-{pair}-img{side}.png"
    return f"images/train/{group % 100}/train-{name}" if half == "train" else f"dev/dev-{name}"


def _nlvr2_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    """run: whole sets; a set that lacks scenes at the very end gives nothing."""
    rows: Rows = {"lines": []}
    part = "train" if half == "train" else "dev"
    for begin in range(0, len(run) - SET_SIZE + 1, SET_SIZE):
        first, second, third, fourth = run[begin : begin + SET_SIZE]
        group, _, _ = _pair_place(picture_id(half, first))
        for place, (text, *held) in enumerate(pair_statements(((first, second), (third, fourth)), scenes)):
            for pair, holds in enumerate(held):
                line = {
                    "identifier": f"{part}-{group}-{pair}-{place}",
                    "sentence": text,
                    "label": str(holds),
                    "left_url": "",
                    "right_url": "",
                    "writer": "",
                    "validation": {},
                    "synset": "",
                    "query": "",
                }
                rows["lines"].append(line | ({"directory": group % 100} if half == "train" else {}))
    return rows


def _nlvr2_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    return {f"data/{'train' if half == 'train' else 'dev'}.json": rows["lines"]}


# -------------------------------------------------------------------------------------------------- RefCOCO


def _refer_picture(half: Half, number: int) -> str:
    return f"{half}/images/mscoco/images/train2014/COCO_train2014_{number:012d}.jpg"


def _refer_rows(half: Half, scenes: Scenes, run: Sequence[Scene]) -> Rows:
    rows: Rows = {"images": [], "annotations": [], "refs": []}
    for scene in run:
        number = picture_id(half, scene)
        file_name = f"COCO_train2014_{number:012d}.jpg"
        rows["images"].append(_image(half, scene, file_name))
        rows["annotations"] += (entries := object_annotations(half, scene))
        by_object: dict[int, list[str]] = {}
        for expression in expressions(scene, scenes):
            by_object.setdefault(expression.object, []).append(expression.text)
        for place, texts in by_object.items():
            entry = entries[place]
            sentences = [
                {"sent_id": entry["id"] * OBJECTS_PER_PICTURE + nth, "raw": text, "sent": text, "tokens": text.split()}
                for nth, text in enumerate(texts)
            ]
            rows["refs"].append(
                {
                    "ref_id": entry["id"],
                    "ann_id": entry["id"],
                    "image_id": number,
                    "category_id": entry["category_id"],
                    "file_name": f"{file_name.removesuffix('.jpg')}_{entry['id']}.jpg",
                    "split": half,
                    "sent_ids": [sentence["sent_id"] for sentence in sentences],
                    "sentences": sentences,
                }
            )
    return rows


def _refer_files(half: Half, scenes: Scenes, rows: Rows) -> Files:
    return {
        f"{half}/refcoco/refs(unc).json": rows["refs"],
        f"{half}/refcoco/instances.json": _instances(scenes, rows),
    }


FORMATS: Mapping[str, Format] = {
    "coco": Format(_coco_picture, _coco_rows, _coco_files),
    "vg": Format(_vg_picture, _vg_rows, _vg_files),
    "vqa": Format(_coco_2014, _vqa_rows, _vqa_files),
    "snli-ve": Format(_flickr_picture, _entailment_rows, _entailment_files, lines=True),
    "nlvr2": Format(_nlvr2_picture, _nlvr2_rows, _nlvr2_files, suffix="png", lines=True),
    "refcoco": Format(_refer_picture, _refer_rows, _refer_files),
}


def text_of(content: Any, lines: bool) -> str:
    """What a file holds, as text."""
    if lines:
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
    return json.dumps(content, ensure_ascii=False) + "\n"
