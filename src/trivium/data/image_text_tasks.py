"""Tasks of a picture and a text in their official layouts: SNLI-VE and Hateful Memes.

SNLI-VE (Xie et al. 2019): snli_ve_{train,dev,test}.jsonl, pictures flickr30k_images/<id>.jpg. The field of the picture
is spelled Flickr30K_ID or Flikr30kID; a gold label of "-" means that annotators did not agree: left out, and counted.
Or as ALBEF has it: ve_{train,dev,test}.json, lists of {image, sentence, label}, pictures flickr30k-images/<image>.jpg.

Hateful Memes (Kiela et al. 2020): train.jsonl and dev_seen, dev_unseen, test_seen, test_unseen (in older copies dev and
test), pictures img/01235.png. The text is the one that was transcribed; the FLAVA paper reads its own OCR instead.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

from trivium.data.labelled import LabelledRows, Row, Splits
from trivium.data.records import Record, json_elements, json_lines
from trivium.errors import BadSample, TriviumError

ENTAILMENT = ("entailment", "neutral", "contradiction")
HATEFUL = ("not_hateful", "hateful")
MEME_SPLITS = ("dev_seen", "dev_unseen", "dev", "test_seen", "test_unseen", "test")


def read_snli_ve(root: str) -> Splits:
    """In either layout, the splits whose files are there. Raises TriviumError where none is."""
    files = {name: os.path.join(root, f"ve_{name}.json") for name in ("train", "dev", "test")}
    there = {name: json_elements(file) for name, file in files.items() if os.path.isfile(file)}
    if "train" in there or (there and not os.path.isfile(os.path.join(root, "snli_ve_train.jsonl"))):
        read = {name: LabelledRows([_albef_ve(root, each) for each in found], "pairs") for name, found in there.items()}
        return Splits(read.pop("train", LabelledRows([], "pairs")), read, ENTAILMENT)
    splits = {name: f"snli_ve_{name}" for name in ("train", "dev", "test")}
    opened = _open(root, splits, "the files that github.com/necla-ml/SNLI-VE makes, beside flickr30k_images")
    notes = []
    read = {}
    for name, records in opened.items():
        decided = [each for each in records if isinstance(each, BadSample) or _gold(each) != "-"]
        if undecided := len(records) - len(decided):
            notes.append(f"{name}: {undecided} rows are left out, since their annotators did not agree")
        read[name] = LabelledRows([_snli_ve(root, each) for each in decided], "pairs")
    return Splits(read.pop("train", LabelledRows([], "pairs")), read, ENTAILMENT, notes=notes)


def read_hateful_memes(root: str) -> Splits:
    """The splits whose files are there. Raises TriviumError where none is."""
    splits = {name: name for name in ("train", *MEME_SPLITS)}
    opened = _open(root, splits, "the files of the Hateful Memes Challenge (drivendata.org), beside img")
    read = {name: LabelledRows([_meme(root, each) for each in found], "pairs") for name, found in opened.items()}
    return Splits(read.pop("train", LabelledRows([], "pairs")), read, HATEFUL)


Records = Sequence["Record | BadSample"]


def _open(root: str, splits: dict[str, str], published: str) -> dict[str, Records]:
    paths = {name: os.path.join(root, f"{file}.jsonl") for name, file in splits.items()}
    there: dict[str, Records] = {n: list(json_lines(path)) for n, path in paths.items() if os.path.isfile(path)}
    if not there:
        raise TriviumError(f"{root} holds no {os.path.basename(paths['train'])}: give the folder with {published}")
    return there


def _gold(record: Record) -> str:
    return str(record.fields.get("gold_label", "")) if isinstance(record.fields, dict) else ""


def _snli_ve(root: str, record: Record | BadSample) -> Row | BadSample:
    if isinstance(record, BadSample):
        return record
    try:
        gold = record.text("gold_label")
        if gold not in ENTAILMENT:
            raise record.bad(f'its label "{gold}" is none of {", ".join(ENTAILMENT)}')
        image = _photo(root, str(record.value("Flickr30K_ID", "Flikr30kID")), "flickr30k_images")
        key = str(record.optional("pairID") or record.entry)
        return Row(record.file, record.entry, key, record.text("sentence2"), image=image, label=ENTAILMENT.index(gold))
    except BadSample as bad:
        return bad


def _albef_ve(root: str, record: Record) -> Row | BadSample:
    try:
        label = record.text("label")
        if label not in ENTAILMENT:
            raise record.bad(f'its label "{label}" is none of {", ".join(ENTAILMENT)}')
        image = _photo(root, str(record.value("image")), "flickr30k-images")
        return Row(record.file, record.entry, record.entry, record.text("sentence"), image=image,
                   label=ENTAILMENT.index(label))  # fmt: skip
    except BadSample as bad:
        return bad


def _photo(root: str, number: str, usual: str) -> str:
    """The path of a photo of Flickr30K, whose folder its owners and others spell differently."""
    folders = [usual, "flickr30k_images", "flickr30k-images"]
    folder = next((name for name in folders if os.path.isdir(os.path.join(root, name))), usual)
    return os.path.join(root, folder, number if number.endswith(".jpg") else f"{number}.jpg")


def _meme(root: str, record: Record | BadSample) -> Row | BadSample:
    if isinstance(record, BadSample):
        return record
    try:
        label = None if record.optional("label") is None else record.integer("label")
        if label not in (None, 0, 1):
            raise record.bad(f"its label {label} is neither 0 ({HATEFUL[0]}) nor 1 ({HATEFUL[1]})")
        image = os.path.join(root, record.text("img"))
        return Row(record.file, record.entry, str(record.value("id")), record.text("text"), image=image, label=label)
    except BadSample as bad:
        return bad
