"""Questions on pictures: one's own tables (`read_questions`), and VQAv2 (Goyal et al. 2017) in its official layout,
below one folder:

    v2_OpenEnded_mscoco_{train2014,val2014,test2015,test-dev2015}_questions.json
    v2_mscoco_{train2014,val2014}_annotations.json
    train2014/COCO_train2014_000000000009.jpg   val2014/   test2015/
    annotations/instances_val2017.json          COCO's own, where it is there: val2017 is 5,000 of the pictures of
                                                val2014, and the questions on them, which UniT is measured by, are a
                                                split beside that of all ("dev")

or in ALBEF's, whose pictures lie below the same folder (those of Visual Genome below vg/, where there is one):

    vqa_train.json   vg_qa.json         both are trained on; a question of Visual Genome has one answer, of half weight
    vqa_val.json                        to choose the checkpoint by
    vqa_test.json    vqa_test_dev.json
    answer_list.json                    the list that answers are ranked in

Answers are classes: those that are the commonest answer of at least 9 questions of train and val together, in normal
form, 3,129 of them in the whole data set (Teney et al. 2018, section 3.7). What an answer is worth as a target is said
in `answers.soft_scores`; a question whose answers are all rare has no right class.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from trivium.data.answers import normalized, soft_scores
from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.data.labelled_tables import Columns, good, open_tables
from trivium.data.records import Record, json_elements, json_object
from trivium.errors import BadSample, TriviumError

MIN_QUESTIONS = 9  # with an answer, for it to be a class
SPLITS = {"dev": "val2014", "test": "test2015", "test_dev": "test-dev2015"}
NUM_VAL2017 = 5000  # pictures


def read_vqa(root: str, min_questions: int = MIN_QUESTIONS) -> Splits:
    """Train and, as "dev", val; test and test-dev; each where its questions are there; of val the part on the pictures
    of val2017, where a file says which these are. Raises TriviumError."""
    trains = os.path.isfile(_questions(root, "train2014"))
    of_albef = [name for name, files in ALBEF_SPLITS.items() for f in files if os.path.isfile(os.path.join(root, f))]
    if "train" in of_albef or (of_albef and not trains):
        return _read_albef(root, min_questions)
    held_out = {name: split for name, split in SPLITS.items() if os.path.isfile(_questions(root, split))}
    if not trains and not held_out:
        raise TriviumError(
            f"{root} holds neither {os.path.basename(_questions(root, 'train2014'))} nor vqa_train.json: give the"
            " folder with the questions, annotations and pictures of VQAv2 as visualqa.org publishes them, or ALBEF's"
        )
    counts: Counter[str] = Counter()
    for split in ("train2014", "val2014"):
        if os.path.isfile(_annotations(root, split)):
            for record in _entries(_annotations(root, split), "annotations"):
                try:
                    answer = record.optional("multiple_choice_answer")
                except BadSample:
                    continue  # its question says it
                counts[normalized(str(answer or ""))] += 1
    labels = _common(root, counts, min_questions, trains)
    number_of = {answer: number for number, answer in enumerate(labels)}
    read = {name: _read(root, split, number_of) for name, split in held_out.items()}
    notes: list[str] = []
    listed = os.path.join(root, "annotations", "instances_val2017.json")
    if "dev" in read and os.path.isfile(listed):
        pictures = _val2017(root, listed)
        if len(pictures) == NUM_VAL2017:
            read["val2017"] = read["dev"].with_rows([row for row in read["dev"].good() if row.image in pictures])
            notes.append(
                "val2017 is a part of dev, by which fine-tuning chooses its checkpoint where nothing else is said: its"
                " figure is then of questions that had a part in the choice"
            )
        else:  # scenes, or a part of it: another figure than the published one
            notes.append(f"{listed} names {len(pictures):,} pictures, COCO's own {NUM_VAL2017:,}: val2017 is left out")
    train = _read(root, "train2014", number_of) if trains else LabelledRows([], "pairs")
    return Splits(train, read, labels, notes=notes)


def _val2017(root: str, listed: str) -> set[str]:
    """The pictures that COCO's file lists, as val2014 calls them. Raises TriviumError."""
    pictures = set()
    for record in _entries(listed, "images"):
        with suppress(BadSample):
            pictures.add(_picture(root, "val2014", record.integer("id")))
    return pictures


def _entries(file: str, name: str) -> Iterator[Record]:
    """Of a list in a JSON file. Raises TriviumError where there is none."""
    try:
        entries = json_object(file).items(name)
    except BadSample as bad:
        raise TriviumError(f"{bad}: is it the file you mean?") from None
    for number, fields in enumerate(entries):
        yield Record(file, f"entry {number}", fields)


def _common(root: str, counts: Counter[str], min_questions: int, trains: bool) -> tuple[str, ...]:
    """trains: whether these are to be learned. Raises TriviumError where they are, and are too few."""
    labels = tuple(sorted(answer for answer, number in counts.items() if answer and number >= min_questions))
    if trains and len(labels) < 2:
        raise TriviumError(
            f"{root}: only {len(labels)} answers are given to {min_questions} questions or more, which makes no"
            " vocabulary of answers: lower --data.min-questions"
        )
    return labels


def _questions(root: str, split: str) -> str:
    return os.path.join(root, f"v2_OpenEnded_mscoco_{split}_questions.json")


def _annotations(root: str, split: str) -> str:
    return os.path.join(root, f"v2_mscoco_{split}_annotations.json")


def _read(root: str, split: str, number_of: dict[str, int]) -> LabelledRows:
    annotated = os.path.isfile(_annotations(root, split))
    answers = dict(_answers(_annotations(root, split))) if annotated else {}
    file = _questions(root, split)
    rows: list[Row | BadSample] = []
    for record in _entries(file, "questions"):
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
    for record in _entries(file, "annotations"):
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


# -------------------------------------------------------------------------------------------- one answer each


def read_questions(
    train: Sequence[str], dev: Sequence[str], test: Sequence[str], columns: Columns, held_out_share: float
) -> Splits:
    """Questions of one's own tables with one right answer each. The answers of the training rows are the list to choose
    from; a held-out answer that is not among them is never right. Raises TriviumError."""
    opened, notes = open_tables(train, dev, test, columns, "pairs", False, held_out_share)
    labels = tuple(sorted({answer for _, answer in good(opened["train"]) if answer}))
    if len(labels) < 2:
        raise TriviumError(
            f"{', '.join(train)}: the training rows have {len(labels)} answers, and two at least are needed"
        )
    number_of = {answer: number for number, answer in enumerate(labels)}
    splits = {
        name: LabelledRows([_one_answer(each, number_of, trained=name == "train") for each in found], "pairs")
        for name, found in opened.items()
    }
    for name, rows in splits.items():
        outside = [row for row in rows.good() if row.truths and not row.answers]
        if outside:
            notes.append(
                f"{name}: {len(outside):,} of {len(rows):,} questions have an answer that no training row has, which"
                f' counts as not found; the first: {outside[0].file} ({outside[0].where}), "{outside[0].truths[0]}"'
            )
    return Splits(splits.pop("train"), splits, labels, notes=notes)


def _one_answer(each: tuple[Row, str] | BadSample, number_of: Mapping[str, int], trained: bool) -> Row | BadSample:
    if isinstance(each, BadSample):
        return each
    row, answer = each
    if not answer:
        return BadSample(row.file, row.where, "it has no answer, and the model is trained on it") if trained else row
    answers = {number_of[answer]: 1.0} if answer in number_of else {}
    return replace(row, answers=answers, truths=(answer,))


# -------------------------------------------------------------------------------------------------- ALBEF's files

ALBEF_SPLITS = {
    "train": ("vqa_train.json", "vg_qa.json"), "dev": ("vqa_val.json",), "test": ("vqa_test.json",),
    "test_dev": ("vqa_test_dev.json",),
}  # fmt: skip
VG_WEIGHT = 0.5  # of an answer of Visual Genome


def _read_albef(root: str, min_questions: int) -> Splits:
    """Raises TriviumError."""
    found = {
        name: [each for file in files if os.path.isfile(path := os.path.join(root, file)) for each in _albef_rows(path)]
        for name, files in ALBEF_SPLITS.items()
    }
    notes = []
    if os.path.isfile(listed := os.path.join(root, "answer_list.json")):
        labels, doubles = _answer_list(listed)
        notes += doubles
    else:
        given = [row for name in ("train", "dev") for row in found[name] if isinstance(row, Row) and row.truths]
        counts = Counter(Counter(map(normalized, row.truths)).most_common(1)[0][0] for row in given)
        labels = _common(root, counts, min_questions, bool(found["train"]))
        notes.append(f"{root} holds no answer_list.json: {len(labels):,} answers are common enough to be ranked")
    number_of: dict[str, int] = {}
    for number, label in enumerate(labels):
        number_of.setdefault(normalized(label), number)
    splits = {
        name: LabelledRows([_scored(row, number_of) for row in rows], "pairs") for name, rows in found.items() if rows
    }
    notes += [sentence for name, rows in splits.items() for sentence in outside_list(name, rows, number_of)]
    return Splits(splits.pop("train", LabelledRows([], "pairs")), splits, labels, notes=notes)


def outside_list(name: str, rows: LabelledRows, answers: Collection[str]) -> list[str]:
    """A sentence on questions of a split none of whose answers is in a list, where there are any. answers: in normal
    form."""
    outside = [row for row in rows.good() if row.truths and not any(normalized(a) in answers for a in row.truths)]
    if not outside:
        return []
    return [
        f"{name}: {len(outside):,} of {len(rows):,} questions have no answer that is in the list; the first:"
        f' {outside[0].file} ({outside[0].where}), "{outside[0].truths[0]}"'
    ]


def _answer_list(file: str) -> tuple[tuple[str, ...], list[str]]:
    """Each answer once, whatever its case, since one that stands there twice is ranked twice, with a part of its share
    each; and a sentence on those. Raises TriviumError."""
    first: dict[str, tuple[str, str]] = {}
    doubles = []
    for record in json_elements(file):
        if not isinstance(record.fields, str) or not record.fields.strip():
            raise TriviumError(f"{file} ({record.entry}) is no answer: the file must hold a list of texts")
        answer = record.fields.strip()
        entry, _ = first.setdefault(answer.casefold(), (record.entry, answer))
        if entry != record.entry:
            doubles.append(f'"{answer}" ({record.entry}), as {entry}')
    if len(first) < 2:
        raise TriviumError(f"{file} holds {len(first)} answers: two at least are needed")
    labels = tuple(answer for _, answer in first.values())
    return labels, [f"{file}: what stands there again is left out: {doubles[0]}"] if doubles else []


def _albef_rows(file: str) -> list[Row | BadSample]:
    rows: list[Row | BadSample] = []
    for record in json_elements(file):
        try:
            rows.append(_albef_row(record))
        except BadSample as bad:
            rows.append(bad)
    return rows


def _albef_row(record: Record) -> Row:
    """Raises BadSample."""
    root, name = os.path.split(record.file)
    of_genome = record.optional("dataset") == "vg"
    given = record.optional("answer")
    truths = tuple(given) if isinstance(given, list) else () if given is None else (given,)
    if not all(isinstance(answer, str) and answer.strip() for answer in truths):
        raise record.bad('its "answer" is neither a text nor a list of texts')
    if not truths and "test" not in name:
        raise record.bad('it has no "answer"')
    if of_genome and os.path.isdir(os.path.join(root, "vg")):
        root = os.path.join(root, "vg")
    return Row(
        record.file, record.entry, str(record.value("question_id")), record.text("question"),
        image=os.path.join(root, record.text("image")), truths=truths, weight=VG_WEIGHT if of_genome else 1.0,
    )  # fmt: skip


def _scored(row: Row | BadSample, number_of: Mapping[str, int]) -> Row | BadSample:
    if isinstance(row, BadSample) or not row.truths:
        return row
    scores = soft_scores(row.truths) if len(row.truths) > 1 else {normalized(row.truths[0]): 1.0}
    return replace(row, answers={number_of[answer]: score for answer, score in scores.items() if answer in number_of})
