"""VQAv2 (Goyal et al. 2017) in its official layout, below one folder:

    v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
    v2_mscoco_{train2014,val2014}_annotations.json
    train2014/COCO_train2014_000000000009.jpg   val2014/   test2015/

Answers are classes: those that are the commonest answer of at least 9 questions of train and val together, in normal
form, 3,129 of them in the whole data set (Teney et al. 2018, section 3.7). What an answer is worth as a target is said
in `answers.soft_scores`; a question whose answers are all rare has no right class.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import Any

from trivium.data.answers import normalized, soft_scores
from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.data.records import Record, json_object
from trivium.errors import BadSample, TriviumError

MIN_QUESTIONS = 9  # with an answer, for it to be a class
SPLITS = {"dev": "val2014", "test": "test2015", "test_dev": "test-dev2015"}


def read_vqa(root: str, min_questions: int = MIN_QUESTIONS) -> Splits:
    """Train and, as "dev", val; test and test-dev where their questions are there. Raises TriviumError."""
    if not os.path.isfile(_questions(root, "train2014")):
        raise TriviumError(
            f"{root} holds no {os.path.basename(_questions(root, 'train2014'))}: give the folder with the questions,"
            " annotations and pictures of VQAv2 as visualqa.org publishes them"
        )
    counts: Counter[str] = Counter()
    for split in ("train2014", "val2014"):
        if os.path.isfile(_annotations(root, split)):
            for each in json_object(_annotations(root, split)).items("annotations"):
                counts[normalized(str(each.get("multiple_choice_answer", "")))] += 1
    labels = tuple(sorted(answer for answer, number in counts.items() if answer and number >= min_questions))
    if len(labels) < 2:
        raise TriviumError(
            f"{root}: only {len(labels)} answers are given to {min_questions} questions or more, which makes no"
            " vocabulary of answers: lower --data.min-questions"
        )
    number_of = {answer: number for number, answer in enumerate(labels)}
    held_out = {name: split for name, split in SPLITS.items() if os.path.isfile(_questions(root, split))}
    return Splits(
        _read(root, "train2014", number_of),
        {name: _read(root, split, number_of) for name, split in held_out.items()},
        labels,
    )


def _questions(root: str, split: str) -> str:
    return os.path.join(root, f"v2_OpenEnded_mscoco_{split}_questions.json")


def _annotations(root: str, split: str) -> str:
    return os.path.join(root, f"v2_mscoco_{split}_annotations.json")


def _read(root: str, split: str, number_of: dict[str, int]) -> LabelledRows:
    annotated = os.path.isfile(_annotations(root, split))
    answers = dict(_answers(_annotations(root, split))) if annotated else {}
    file = _questions(root, split)
    rows: list[Row | BadSample] = []
    for number, fields in enumerate(json_object(file).items("questions")):
        record = Record(file, f"entry {number}", fields)
        try:
            question = record.integer("question_id")
            if annotated and question not in answers:
                raise record.bad(f"question {question} has no answers in {_annotations(root, split)}")
            truths = answers.get(question, ())
            scores = soft_scores(truths) if truths else {}
            row = Row(
                file,
                record.entry,
                str(question),
                text=record.text("question"),
                image=_picture(root, split, record.integer("image_id")),
                answers={number_of[a]: s for a, s in scores.items() if a in number_of} if truths else None,
                truths=truths,
            )
        except BadSample as bad:
            rows.append(bad)
            continue
        rows.append(row)
    return LabelledRows(rows, "pairs")


def _answers(file: str) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Question and its answers; those that are damaged are left out, so that their question says it."""
    for number, fields in enumerate(json_object(file).items("annotations")):
        record = Record(file, f"entry {number}", fields)
        try:
            given: list[Any] = record.items("answers")
            texts = tuple(str(each["answer"]) for each in given)
            if texts:
                yield record.integer("question_id"), texts
        except (BadSample, KeyError, TypeError):
            continue


def _picture(root: str, split: str, number: int) -> str:
    folder = split.replace("-dev", "")  # test-dev is a part of test
    return os.path.join(root, folder, f"COCO_{folder}_{number:012d}.jpg")
