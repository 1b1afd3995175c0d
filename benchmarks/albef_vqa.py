"""Tiny ALBEF asked: questions on shapes (easy-VQA) and on rooms (DAQUAR), statements on two scenes (as in NLVR2).

    pip download --no-deps easy-vqa --dest EASY
    python benchmarks/albef_vqa.py --easy-vqa EASY/easy_vqa-1.0-py3-none-any.whl --data.root DATA --out runs/albef-vqa

    easy-vqa      the official test questions; answers written and ranked. Beside it: the same without the pictures, a
                  linear model of the questions' words (scikit-learn), and the answer that is commonest in training
    daquar        questions with a single answer; likewise. Five runs, each of which holds out another tenth of the
                  photographs, those with md5(file) % 10 = 0 to 4: one tenth alone has 635 questions on 78 photographs,
                  which tell little apart. It begins from `--init`, which should have seen photographs:
                  runs/albef-real/flickr8k of albef_real.py. Pictures of 128 pixels and random crops were chosen once,
                  on some of the photographs that are no 0
    nlvr2         two-picture statements of `trivium data scenes`, on new scenes; with and without text assignment on
                  the captions of the training scenes, and without the pictures

easy-VQA is read from its wheel and never installed. Runs that are done are not repeated, and one that was begun goes
on: give the same command again. All that are done are summed up in results/albef_vqa.json and .md. What `--init` is not
for begins from a tiny ALBEF that is pretrained on the embedded pairs.
"""

from __future__ import annotations

import argparse
import csv
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import side_by_side
from albef_runs import (
    always_the_commonest,
    as_json,
    difference,
    mean_over,
    per_cent,
    run,
    tenth,
    tiny_tuning,
    units,
    write_beside,
)

from trivium.data.labelled import LabelledRows
from trivium.data.scene_files import write_scenes
from trivium.data.scenes import Scenes
from trivium.data.small_vqa import PicturesInMemory, read_daquar, read_easy_vqa
from trivium.data.statements import read_nlvr2
from trivium.evaluate import results, vqa
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result

TIMES = {"easy-vqa": 1, "daquar": 5}  # runs, each with its own seed, of DAQUAR with its own held-out tenth too
ROOMS = {"data.image-size": 128, "data.crop-scale": [0.4, 1], "data.random-changes": 2}
PARTS = {  # and the runs of each below OUT
    **{part: tuple(f"{part}-{seen}-{seed}" for seed in range(count) for seen in ("whole", "blind"))
       for part, count in TIMES.items()},
    "nlvr2": ("nlvr2-assigned", "nlvr2-prepared", "nlvr2-plain", "nlvr2-blind"),
}  # fmt: skip
ASKED = ("image", "question", "answer")  # columns
LINEAR = "words of the question, linear"
QUESTIONS = "question answering"  # how `trivium finetune` calls tables of one's own
Line = tuple[str, str, str]  # picture below the folder, question, answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", type=Path, help="the ALBEF that daquar begins from; by default as the others")
    parser.add_argument("--easy-vqa", type=Path, help="the wheel of easy-VQA")
    parser.add_argument("--data.root", dest="root", type=Path, help="the folder with daquar/")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--pretraining-steps", type=int, default=2000)
    parser.add_argument("--steps", type=int, default=1500, help="of each fine-tuning")
    parser.add_argument("--scenes", type=int, default=6000, help="of training; a fifth as many are held out")
    parser.add_argument("--questions", type=int, help="at most so many of each table, for a first try in a new OUT")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; by default as torch finds best")
    given = parser.parse_args()
    found: dict[str, dict[str, Result]] = {}
    init: Path | None = None

    def pretrained() -> Path:
        values = {"size": "tiny", "train.steps": given.pretraining_steps, "train.save-every": 200, "train.keep-last": 1}
        return run(given.out / "pretrained", ["pretrain", "albef"], values, given.device, given.threads)

    def tuned(name: str, task: str, values: dict[str, Any]) -> Path:
        if part not in given.parts:  # done, by whatever command
            return given.out / name
        settings = {"init": init, **tiny_tuning(given.steps), **values}
        return run(given.out / name, ["finetune", task], settings, given.device, given.threads)

    for part, runs in PARTS.items():
        if part not in given.parts and not all((given.out / name / "results.json").is_file() for name in runs):
            continue
        if part in given.parts:
            init = given.init if part == "daquar" and given.init else pretrained()
        if part == "nlvr2":
            found[part] = statements(given.out, given.scenes, tuned)
        else:
            read, where = (easy_vqa, given.easy_vqa) if part == "easy-vqa" else (daquar, given.root)
            folders = [read(where, given.out, given.questions, number) for number in range(TIMES[part])]
            found[part] = questions(part, folders, ROOMS if part == "daquar" else {}, tuned)
        print(part, {name: per_cent(result) for name, result in found[part].items()}, flush=True)
    command = "python benchmarks/albef_vqa.py --easy-vqa WHEEL --data.root DATA --out RUNS"
    command += f" --pretraining-steps {given.pretraining_steps} --steps {given.steps} --scenes {given.scenes}"
    command += " --init ALBEF" if given.init else ""
    if given.questions:
        print("nothing is written of a first try")
        return
    named = {part: {name: as_json(result) for name, result in row.items()} for part, row in found.items()}
    side_by_side.write("albef_vqa", named, command=command)
    write_beside(side_by_side.RESULTS / "albef_vqa.md", lambda beside: beside.write_text(page(found, command)))


# ------------------------------------------------------------------------------------------------------ questions


def easy_vqa(wheel: Path | None, out: Path, most: int | None, number: int) -> Path:
    """Pictures and tables of easy-VQA below OUT/data, as its wheel has them."""
    folder = out / "data" / "easy-vqa"
    if (folder / "test.csv").is_file():
        return folder
    if wheel is None:
        raise SystemExit("give --easy-vqa the wheel: pip download --no-deps easy-vqa")
    splits = read_easy_vqa(str(wheel), held_out=0.0)
    for split, rows in (("train", splits.train), ("test", splits.held_out["test"])):  # "test" last: where it is, all is
        lines = _with_pictures(folder, split, rows)
        _table(folder / f"{split}.csv", ASKED, lines[:most])
    return folder


def daquar(root: Path | None, out: Path, most: int | None, number: int) -> Path:
    """Pictures and tables of DAQUAR below OUT/data: its questions with one answer. number: of the tenth that is held
    out."""
    folder = out / "data" / ("daquar" if not number else f"daquar-{number}")
    if (folder / "test.csv").is_file():
        return folder
    if root is None:
        raise SystemExit("give --data.root the folder with daquar/")
    parts: dict[str, list[Line]] = {"train": [], "test": []}
    for picture, question, answer in _with_pictures(folder, "pictures", read_daquar(str(root / "daquar"), 0.0).train):
        parts["test" if tenth(Path(picture).name) == number else "train"].append(
            (picture, question, answer.replace("_", " "))
        )
    for split, lines in parts.items():
        _table(folder / f"{split}.csv", ASKED, lines[:most])
    return folder


def _with_pictures(folder: Path, name: str, rows: LabelledRows) -> list[Line]:
    """Each question whose row is sound, its picture written into a folder of this name."""
    assert isinstance(rows, PicturesInMemory)
    (folder / name).mkdir(parents=True, exist_ok=True)
    lines = [(f"{name}/{Path(row.image or '').name}", row.text or "", row.truths[0]) for row in rows.good()]
    for path in {row.image or "" for row in rows.good()} & rows.pictures.keys():
        (folder / name / Path(path).name).write_bytes(rows.pictures[path])
    return lines


def _table(path: Path, columns: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> None:
    def write(beside: Path) -> None:
        with beside.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([columns, *lines])

    write_beside(path, write)


def _lines(path: Path) -> list[Line]:
    with path.open(newline="", encoding="utf-8") as file:
        return [(row["image"], row["question"], row["answer"]) for row in csv.DictReader(file)]


def questions(part: str, folders: list[Path], values: dict[str, Any], tuned: Any) -> dict[str, Result]:
    """Accuracy on all test tables together: of the model, of the same without pictures, of a linear model of the
    questions' words, and of the commonest answer."""

    def right(number: int, name: str, blank: str) -> Outcomes:
        tables = {"data.train": folders[number] / "train.csv", "data.test": folders[number] / "test.csv"}
        settings = {**tables, **values, "data.blank-pictures": blank, "train.seed": number}
        out = tuned(f"{part}-{name}-{number}", "question_answering", settings)
        found = units(out, [f"{QUESTIONS}.test.accuracy"])  # in the order of the table
        pictures = tuple(str(folders[number] / picture) for picture, _, _ in _lines(folders[number] / "test.csv"))
        assert found.groups in (None, pictures), "questions are grouped by their pictures"  # None: of older runs
        return replace(found, groups=pictures)

    several = range(len(folders))
    mine, other = ([right(number, *of) for number in several] for of in (("whole", "false"), ("blind", "true")))
    always, commonest = [], ""
    for folder, each in zip(folders, mine, strict=True):
        [(answer, _)] = Counter(answer for _, _, answer in _lines(folder / "train.csv")).most_common(1)
        assert commonest in ("", answer), "another answer is the commonest in another part of the data"
        commonest = answer
        truths = [answer for _, _, answer in _lines(folder / "test.csv")]
        always.append(replace(each, values=np.array([vqa.exact(commonest, truth) for truth in truths])))
    linear = [replace(each, values=from_words(folder)) for folder, each in zip(folders, mine, strict=True)]
    whole, blind, words, guessed = map(joined, (mine, other, linear, always))
    found = {
        "ALBEF": mean_over([whole]),
        "question alone": mean_over([blind]),
        LINEAR: mean_over([words]),
        f"always {commonest}": mean_over([guessed]),
        "ALBEF less question alone": difference([whole], [blind]),
        f"ALBEF less {LINEAR}": difference([whole], [words]),
        f"ALBEF less always {commonest}": difference([whole], [guessed]),
    }
    if len(folders) > 1:
        found |= {f"less question alone, tenth {n}": difference([mine[n]], [other[n]]) for n in several}
    return found


def from_words(folder: Path) -> np.ndarray:
    """Whether each answer of the test table is right, of logistic regression on which words and pairs of neighbouring
    words a question has."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    train, test = (_lines(folder / f"{split}.csv") for split in ("train", "test"))
    words = CountVectorizer(ngram_range=(1, 2), token_pattern=r"\w+", binary=True)
    model = make_pipeline(words, LogisticRegression(max_iter=1000))
    model.fit([question for _, question, _ in train], [answer for _, _, answer in train])
    given = model.predict([question for _, question, _ in test])
    return np.array([vqa.exact(answer, truth) for answer, (_, _, truth) in zip(given, test, strict=True)])


def joined(several: list[Outcomes]) -> Outcomes:
    """Those of different units, which have groups, as one."""
    units_of_all = tuple(unit for each in several for unit in each.units)
    groups = tuple(group for each in several for group in each.groups or ())
    return replace(several[0], units=units_of_all, groups=groups, values=np.concatenate([e.values for e in several]))


# ------------------------------------------------------------------------------------------------------ statements


def statements(out: Path, count: int, tuned: Any) -> dict[str, Result]:
    """Accuracy on statements about pairs of new scenes."""
    folder = out / "data" / "scenes"
    write_scenes(Scenes("train", count, 0, 0.5, "group"), folder, ("coco", "nlvr2"))
    write_scenes(Scenes("new-scenes", max(8, count // 5), 0, 0.5, "group"), folder, ("nlvr2",))
    captioned = json.loads((folder / "coco" / "annotations" / "captions_train2017.json").read_text())
    file_of = {image["id"]: image["file_name"] for image in captioned["images"]}
    pairs = folder / "coco" / "pairs.csv"
    if not pairs.is_file():
        lines = [(f"train2017/{file_of[a['image_id']]}", a["caption"]) for a in captioned["annotations"]]
        _table(pairs, ("image", "caption"), lines)
    own = {"data.image-size": None, "data.crop-scale": [1, 1], "data.flip": 0, "data.random-changes": 0,
           "data.max-length": 32}  # fmt: skip
    assigned = tuned("nlvr2-assigned", "text_assignment", {"data.train": pairs, **own})
    nlvr2 = {"data.root": folder / "nlvr2", **own}
    runs = {
        "after text assignment": tuned("nlvr2-prepared", "nlvr2", {**nlvr2, "init": assigned / "model"}),
        "without it": tuned("nlvr2-plain", "nlvr2", nlvr2),
        "statement alone": tuned("nlvr2-blind", "nlvr2", {**nlvr2, "data.blank-pictures": "true"}),
    }
    found = {name: results.read(each / "results.json")["NLVR2.dev.accuracy"] for name, each in runs.items()}
    commonest, always = always_the_commonest(read_nlvr2(str(folder / "nlvr2")), "dev")
    found[f"always {commonest}"] = always
    mine, other = (units(each, ["NLVR2.dev.accuracy"]) for each in list(runs.values())[:2])
    found["what text assignment adds"] = difference([mine], [other])
    assignment = results.read(assigned / "results.json")["text assignment.dev.accuracy"]
    return found | {"text assignment itself": assignment}


def page(found: dict[str, dict[str, Result]], command: str) -> str:
    said = "Accuracy in per cent, with 95 % intervals over the pictures or, where there are two, over the pairs;"
    said += " one seed, of DAQUAR five runs, each of which held out another tenth of the photographs. At this size"
    said += " pretraining has no queue."
    lines = ["# Tiny ALBEF, asked", "", f"`{command}`", "", said, ""]
    for part, row in found.items():
        lines += [f"## {part}", "", "| | |", "|---|---|"]
        lines += [f"| {name} | {per_cent(result)} |" for name, result in row.items()] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
