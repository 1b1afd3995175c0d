"""A folder that holds two layouts of a task: the one with the training file is read, whatever lies beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from trivium.data.image_text_tasks import read_snli_ve
from trivium.data.statements import read_nlvr2
from trivium.data.vqa import read_vqa

PAIR = {"image": "1", "sentence": "a dog", "label": "neutral"}
SNLI = {"Flickr30K_ID": "1", "sentence2": "a dog", "gold_label": "neutral"}
JUDGED = {"images": ["0.png", "1.png"], "sentence": "both", "label": "True"}
NLVR = {"identifier": "dev-1-0-1", "directory": 3, "sentence": "both", "label": "True"}
ASKED = {"question_id": 1, "image_id": 1, "question": "what?"}
ANSWERED = {"question_id": 1, "multiple_choice_answer": "red", "answers": [{"answer": "red"}, {"answer": "blue"}]}
ALBEFS = {"question_id": 1, "image": "0.png", "question": "what?", "dataset": "vqa"}
OFFICIAL_VQA = {
    "v2_OpenEnded_mscoco_train2014_questions.json": {"questions": [ASKED, {**ASKED, "question_id": 2}]},
    "v2_mscoco_train2014_annotations.json": {
        "annotations": [ANSWERED, {**ANSWERED, "question_id": 2, "multiple_choice_answer": "blue"}]
    },
}


@pytest.mark.parametrize(
    ("read", "training", "other"),
    [
        (read_snli_ve, {"snli_ve_train.jsonl": SNLI}, {"ve_test.json": [PAIR]}),
        (read_snli_ve, {"ve_train.json": [PAIR]}, {"snli_ve_dev.jsonl": SNLI}),
        (read_nlvr2, {"nlvr_train.json": [JUDGED]}, {"data/dev.json": NLVR}),
        (read_nlvr2, {"data/train.json": NLVR}, {"nlvr_dev.json": [JUDGED]}),
        (lambda root: read_vqa(root, 1), OFFICIAL_VQA, {"vqa_test.json": [ALBEFS]}),
    ],
)
def test_the_layout_with_the_training_file_is_read(tmp_path: Path, read, training, other) -> None:  # type: ignore[no-untyped-def]
    (tmp_path / "data").mkdir()
    for file, content in (training | other).items():
        (tmp_path / file).write_text(json.dumps(content))
    splits = read(str(tmp_path))
    assert {Path(row.file).name for row in splits.train.good()} <= {Path(file).name for file in training}
    assert len(splits.train) > 0
    assert not splits.held_out
