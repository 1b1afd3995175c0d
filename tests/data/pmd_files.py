"""Annotation files of PMD's subsets in their official form, a few entries each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def write_json(path: Path, content: Any) -> str:
    path.write_text(json.dumps(content), encoding="utf-8")
    return str(path)


def write_lines(path: Path, lines: list[str]) -> str:
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return str(path)


def coco_captions(path: Path) -> str:
    """Two pictures with two captions and one, in the order of the captions' ids."""
    images = [
        {
            "license": 5, "file_name": f"COCO_train2014_{number:012d}.jpg", "height": 360, "width": 640, "id": number,
            "coco_url": f"http://images.cocodataset.org/train2014/COCO_train2014_{number:012d}.jpg",
            "date_captured": "2013-11-14 11:18:45", "flickr_url": "http://farm9.staticflickr.com/8_z.jpg",
        }
        for number in (57870, 384029)
    ]  # fmt: skip
    annotations = [
        {"image_id": 57870, "id": 787980, "caption": "A restaurant has modern wooden tables and chairs."},
        {"image_id": 384029, "id": 789366, "caption": " A man preparing desserts in a kitchen.\n"},
        {"image_id": 57870, "id": 789366, "caption": "A long restaurant table."},
    ]
    return write_json(path, {"info": {}, "images": images, "licenses": [], "annotations": annotations})


def karpathy(path: Path, dataset: str, splits: dict[int, str]) -> str:
    images = [
        {
            "cocoid": number,
            "filename": f"{number}.jpg",
            "filepath": "val2014",
            "split": split,
            "sentids": [],
            "imgid": 0,
        }
        for number, split in splits.items()
    ]
    if dataset != "coco":
        images = [{name: value for name, value in image.items() if name != "cocoid"} for image in images]
    return write_json(path, {"images": images, "dataset": dataset})


def visual_genome(folder: Path) -> list[str]:
    """Two pictures of 80 x 40 with two regions and one; one of them is a picture of COCO."""
    regions = [
        {"region_id": 1382, "x": 40, "y": 0, "width": 40, "height": 20, "image_id": 1, "phrase": "the clock is green"},
        {"region_id": 1383, "x": -3, "y": 10, "width": 200, "height": 100, "image_id": 1, "phrase": "a long shadow "},
    ]
    others = [{"region_id": 7, "x": 0, "y": 0, "width": 8, "height": 8, "image_id": 2, "phrase": "sky"}]
    pictures = [
        {
            "image_id": number, "width": 80, "height": 40, "flickr_id": None, "coco_id": coco_id,
            "url": f"https://cs.stanford.edu/people/rak248/VG_100K_2/{number}.jpg",
        }
        for number, coco_id in ((1, None), (2, 511))
    ]  # fmt: skip
    return [
        write_json(folder / "region_descriptions.json", [{"id": 1, "regions": regions}, {"id": 2, "regions": others}]),
        write_json(folder / "image_data.json", pictures),
    ]


def localized_narratives(path: Path) -> str:
    narratives = [
        ("mscoco_train2017", "139", "In this image there is a table. On the table, I can see a vase.  It is blue"),
        ("open_images_train", "000b0f4d98b3f4ee", "A dog runs."),
        ("ADE20k_train", "ADE_train_00000001", "We see an airport."),
        ("Flickr30k_train", "1000092795", "Two men stand."),
    ]
    return write_lines(
        path,
        [
            json.dumps(
                {
                    "dataset_id": dataset, "image_id": image, "annotator_id": 48, "caption": caption,
                    "timed_caption": [{"utterance": "In", "start_time": 0, "end_time": 0.2}],
                    "traces": [[{"x": 0.1, "y": 0.2, "t": 0.0}]], "voice_recording": "a.ogg",
                }
            )
            for dataset, image, caption in narratives
        ],
    )  # fmt: skip


def redcaps(path: Path) -> str:
    annotations = [
        {
            "image_id": "bpzj7r", "author": "djasz1", "image_url": "https://i.redd.it/ho0wntksivy21.jpg",
            "raw_caption": "Found on a friend’s property in the Keys FL.", "subreddit": 3, "score": 72,
            "caption": "found on a friend's property in the keys fl.", "created_utc": 1, "crosspost_parents": None,
            "permalink": "/r/airplants/comments/bpzj7r/found/",
        }
    ]  # fmt: skip
    return write_json(path, {"info": {"url": "https://redcaps.xyz/"}, "annotations": annotations})
