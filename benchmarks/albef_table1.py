"""Table 1 of ALBEF in pocket form: which training task helps which downstream task, row by row as printed.

    python benchmarks/albef_table1.py --data.root DATA --out runs/albef-table1

Pretraining: the tiny ALBEF on Flickr8k's training photographs and on scenes with their captions, STEPS updates for
every row alike, with one vocabulary. Columns: retrieval on Flickr8k's dev photographs after fine-tuning (mean of R@1, 5
and 10, re-ranked), entailment on its triples (photographs with md5(file) % 10 = 0 held out, and never pretrained on),
NLVR2 and VQA on scenes, whose pictures stay whole. The last row is pretrained on a quarter of the pairs, as 4M stands
to 14M in the paper. Cells of two seeds; 95 % intervals over the units of the test.

Several processes share the work, each with some `--rows`, `--columns` and `--seeds` of the same --out; whatever is done
is not repeated. `--table` only sums up what is there, and writes results/albef_table1.json and .md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import side_by_side
from albef_runs import (
    ENTAILMENT,
    NO_QUEUE,
    Photographs,
    alone,
    always_the_commonest,
    as_json,
    compared,
    mean_over,
    per_cent,
    run,
    spread,
    tiny_tuning,
    units,
    write_beside,
)

from trivium.cli import main as trivium
from trivium.data.statements import read_nlvr2
from trivium.data.vqa import read_vqa
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.results import Result


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    title: str
    itc: float = 1.0
    negatives: str = "hard"
    itc_distilled: float = 0.4
    mlm_distilled: float = 0.4
    tuned_distilled: float = 0.0  # downstream
    every: int = 1  # of the pairs
    published: tuple[float, ...] = ()  # TR, IR, VE, NLVR2, VQA, at 4M pairs

    def pretraining(self) -> dict[str, Any]:
        return {"objectives.itc": self.itc, "objectives.negatives": self.negatives,
                "distillation.itc": self.itc_distilled, "distillation.mlm": self.mlm_distilled}  # fmt: skip


ALBEF_4M, ALBEF_14M = (97.83, 92.65, 80.30, 80.50, 74.54), (98.70, 94.07, 80.91, 83.14, 75.84)  # as printed
ROWS = {
    "mlm-itm": Row("MLM + ITM", 0.0, "random", 0.0, 0.0, published=(93.96, 88.55, 77.06, 77.51, 71.40)),
    "itc": Row("ITC + MLM + ITM", 1.0, "random", 0.0, 0.0, published=(96.55, 91.69, 79.15, 79.88, 73.29)),
    "hard": Row("ITC + MLM + ITM_hard", 1.0, "hard", 0.0, 0.0, published=(97.01, 92.16, 79.77, 80.35, 73.81)),
    "itc-mod": Row("ITC_MoD + MLM + ITM_hard", 1.0, "hard", 0.4, 0.0, published=(97.33, 92.43, 79.99, 80.34, 74.06)),
    "full": Row("Full (ITC_MoD + MLM_MoD + ITM_hard)", published=(97.47, 92.58, 80.12, 80.44, 74.42)),
    "albef": Row("ALBEF (Full + MoD downstream)", tuned_distilled=0.4, published=ALBEF_4M),
    "quarter": Row("ALBEF on a quarter of the pairs", tuned_distilled=0.4, every=4, published=ALBEF_4M),
}
# The paper has its rows at 4M pairs and the last at 14M too; here they stand at all pairs, the last at a quarter too.
ORDERINGS = [(row, other) for row, other in zip(list(ROWS)[1:6], list(ROWS)[:5], strict=True)] + [("albef", "quarter")]
MEASURED = 400  # scenes at most that questions are asked of: several each, which leaves about two points
# Mirrored or cut, a scene no longer shows what is said of left and right and of how many.
WHOLE_PICTURES: dict[str, Any] = {"data.crop-scale": [1, 1], "data.flip": 0, "data.random-changes": 0}


@dataclass(frozen=True)
class Cell:
    """One row and seed, on one machine."""

    row: str
    seed: int
    photographs: Photographs
    steps: int
    tuning_steps: int
    scenes: int
    device: str
    threads: int | None

    @property
    def out(self) -> Path:
        return self.photographs.out

    @property
    def folder(self) -> Path:
        return self.out / f"seed-{self.seed}" / self.row

    def made_scenes(self, format: str) -> Path:
        """Scenes in a published form, a fifth as many to be measured on; written once."""
        folder, held_out = self.out / "data" / f"scenes-{self.scenes}", max(8, self.scenes // 5)
        counts = {"train": self.scenes, "new-scenes": min(MEASURED, held_out) if format == "vqa" else held_out}
        with alone(folder):
            for split, count in counts.items():
                done = folder / f".{format}-{split}"
                if not done.is_file():
                    words = ["data", "scenes", "--out", str(folder), "--split", split, "--count", str(count)]
                    if code := trivium([*words, "--format", format]):
                        raise SystemExit(code)
                    done.touch()
        return folder / format

    def captioned_scenes(self, every: int) -> Path:
        """Their pictures and captions, every so many of them, as a table."""
        coco = self.made_scenes("coco")
        path = coco / f"captions-{every}.jsonl"
        if not path.is_file():
            content = json.loads((coco / "annotations" / "captions_train2017.json").read_text())
            captions: dict[int, list[str]] = {}
            for entry in content["annotations"]:
                captions.setdefault(entry["image_id"], []).append(entry["caption"])
            lines = [
                json.dumps({"image": f"train2017/{image['file_name']}", "captions": captions[image["id"]]}) + "\n"
                for image in content["images"][::every]
            ]
            write_beside(path, lambda beside: beside.write_text("".join(lines)))
        return path

    def pairs(self) -> Path:
        """The photographs that the row is pretrained on."""
        every = ROWS[self.row].every
        return self.photographs.written("pairs" if every == 1 else f"pairs-{every}", every)

    def pretrained(self) -> Path:
        """Rows that differ downstream alone share their pretraining."""
        row = ROWS[self.row]
        name = next(n for n, o in ROWS.items() if (o.pretraining(), o.every) == (row.pretraining(), row.every))
        values = {
            "size": "tiny", "data.pairs": [self.pairs(), self.captioned_scenes(row.every)],
            "data.validation": self.photographs.dev, "data.text-column": "captions",
            "data.vocabulary": self.photographs.vocabulary(self.captioned_scenes(1)), "train.steps": self.steps,
            "train.seed": self.seed, "train.save-every": 200, "train.keep-last": 1, **row.pretraining(),
        }  # fmt: skip
        out = self.out / f"seed-{self.seed}" / name / "pretraining"
        return run(out, ["pretrain", "albef"], values, self.device, self.threads)

    def tuned(self, column: str, task: str, values: dict[str, Any]) -> Path:
        common = {
            "init": self.pretrained(), **tiny_tuning(self.tuning_steps), "train.seed": self.seed,
            "data.image-size": None, "distillation.alpha": ROWS[self.row].tuned_distilled,
        }  # fmt: skip
        return run(self.folder / column, ["finetune", task], common | values, self.device, self.threads)


def _recalls(cell: Cell, way: str) -> Outcomes:
    train = cell.photographs.written("pairs")  # all of them for every row, as in the paper
    values = {"data.train": [train], "data.dev": cell.photographs.dev, "data.text-column": "captions", **NO_QUEUE}
    out = cell.tuned("retrieval", "retrieval", values)
    return units(out, [f"retrieval.dev.{way}_reranked_r{cutoff}" for cutoff in (1, 5, 10)])


def text_retrieval(cell: Cell) -> Outcomes:
    return _recalls(cell, "tr")


def image_retrieval(cell: Cell) -> Outcomes:
    return _recalls(cell, "ir")


def entailment(cell: Cell) -> Outcomes:
    paths = cell.photographs.entailment()
    values: dict[str, Any] = {f"data.{split}": [path] for split, path in paths.items()}
    values |= {"head.activation": "relu", "head.dropout": 0.0}
    out = cell.tuned("entailment", "image_text_classification", values)
    return units(out, [f"{ENTAILMENT}.test.accuracy"])


def two_pictures(cell: Cell) -> Outcomes:
    out = cell.tuned("nlvr2", "nlvr2", {"data.root": cell.made_scenes("nlvr2"), **WHOLE_PICTURES})
    return units(out, ["NLVR2.dev.accuracy"])


def questions(cell: Cell) -> Outcomes:
    out = cell.tuned("vqa", "vqa", {"data.root": cell.made_scenes("vqa"), **WHOLE_PICTURES})
    return units(out, ["VQAv2.dev.accuracy"])


# Each gives a value for every unit of its test.
COLUMNS: dict[str, Callable[[Cell], Outcomes]] = {
    "TR": text_retrieval,
    "IR": image_retrieval,
    "VE": entailment,
    "NLVR2": two_pictures,
    "VQA": questions,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data.root", dest="root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=list(COLUMNS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--steps", type=int, default=300, help="of pretraining")
    parser.add_argument("--tuning-steps", type=int, default=300, help="of each fine-tuning")
    parser.add_argument("--scenes", type=int, default=10_000)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--threads", type=int, help="of torch; by default as torch finds best")
    parser.add_argument("--table", action="store_true", help="sum up what is done, and train nothing")
    given = parser.parse_args()

    def cell(row: str, seed: int) -> Cell:
        return Cell(
            row, seed, Photographs(given.root, given.out), given.steps, given.tuning_steps, given.scenes, given.device,
            given.threads,
        )  # fmt: skip

    if not given.table:
        for seed in given.seeds:
            for row in given.rows:
                for name in given.columns:
                    COLUMNS[name](cell(row, seed))
    command = f"python benchmarks/albef_table1.py --data.root DATA --out {given.out.name} --steps {given.steps}"
    command += f" --tuning-steps {given.tuning_steps} --scenes {given.scenes}"
    seeds = sorted({*given.seeds, *(int(path.name.removeprefix("seed-")) for path in given.out.glob("seed-*"))})
    command += f" --seeds {' '.join(map(str, seeds))}"  # those of other processes too
    table(cell, seeds, command, commonest(cell(next(iter(ROWS)), seeds[0])))


def commonest(cell: Cell) -> dict[str, Result]:
    """What the answer that is commonest in training comes to, of each column that has one."""
    tried = {
        "VE": always_the_commonest(cell.photographs.judged(), "test"),
        "NLVR2": always_the_commonest(read_nlvr2(str(cell.made_scenes("nlvr2"))), "dev"),
        "VQA": always_the_commonest(read_vqa(str(cell.made_scenes("vqa"))), "dev"),
    }
    return {column: result for column, (_, result) in tried.items()}


FOLDERS = {"TR": "retrieval", "IR": "retrieval", "VE": "entailment", "NLVR2": "nlvr2", "VQA": "vqa"}
HOLDS = {"better": "holds", "worse": "reversed"}


def table(cell: Callable[[str, int], Cell], seeds: list[int], command: str, floors: Mapping[str, Result]) -> None:
    """What is done, as a page and as numbers. floors: by column, of what has learned nothing."""
    found: dict[str, dict[str, dict[int, Outcomes]]] = {}  # by row, column and seed
    for row in ROWS:
        for name, column in COLUMNS.items():
            for each in (cell(row, seed) for seed in seeds):
                if (each.folder / FOLDERS[name] / "results.json").is_file():
                    found.setdefault(row, {}).setdefault(name, {})[each.seed] = column(each)
    any_cell = cell(next(iter(ROWS)), seeds[0])
    lines = [
        "# ALBEF's Table 1 in pocket form",
        "",
        f"Tiny ALBEF, {any_cell.steps:,} updates of pretraining, {any_cell.tuning_steps:,} of each fine-tuning, seeds"
        f" {', '.join(map(str, seeds))}; per cent, with 95 % intervals over the pictures of each test, of NLVR2 over"
        " the pairs of them, and in round brackets the paper's figures, at 4M pairs and on its own data. The last row"
        " is to the one above it, which has the paper's at 14M too, as 4M pairs are to 14M there; it is fine-tuned on"
        " what the others are. At this size no row has a queue: the contrastive loss and its soft labels are over the"
        " batch.",
        "",
        "TR and IR, texts of a picture and pictures of a text, are the mean of R@1, 5 and 10 on Flickr8k's dev"
        " photographs, re-ranked; VE is entailment on Flickr8k's triples, a tenth of the photographs held out; NLVR2"
        " and VQA are statements and questions on scenes, which are composed of drawings.",
        "",
        "Fine-tuning on retrieval is by ITC and by ITM with hard negatives for every row, that of MLM + ITM too: TR and"
        " IR tell what pretraining leaves of the difference. The last checkpoint of each run is measured, and the rows"
        " that differ downstream alone share their pretraining. Intervals of differences hold the spread of seeds too,"
        " taken over the rows of a column. An ordering holds, or is reversed, where that interval is beyond 0 and every"
        " seed has its sign.",
        "",
        "| training tasks | " + " | ".join(COLUMNS) + " |",
        "|---" * (1 + len(COLUMNS)) + "|",
    ]
    results: dict[str, Any] = {}
    for row, facts in ROWS.items():
        cells = []
        for place, name in enumerate(COLUMNS):
            several = found.get(row, {}).get(name)
            result = None if several is None else mean_over(list(several.values()))
            results.setdefault(row, {})[name] = as_json(result) and {
                **(as_json(result) or {}),
                "seeds": len(several or ()),
            }
            more = f", at 14M {ALBEF_14M[place]:.2f}" if row == "albef" else ""
            fewer = f", {len(several)} of {len(seeds)} seeds" if several and len(several) < len(seeds) else ""
            cells.append(f"{per_cent(result)}{fewer} ({facts.published[place]:.2f}{more})")
        lines.append(f"| {facts.title} | {' | '.join(cells)} |")
    lines.append(f"| commonest answer of training | {' | '.join(per_cent(floors.get(name)) for name in COLUMNS)} |")
    lines += ["", "| ordering | " + " | ".join(COLUMNS) + " |", "|---" * (1 + len(COLUMNS)) + "|"]
    orderings: dict[str, Any] = {}
    of_seeds = {name: spread([list(row[name].values()) for row in found.values() if name in row]) for name in COLUMNS}
    for row, other in ORDERINGS:
        cells = []
        for place, name in enumerate(COLUMNS):
            mine, theirs = found.get(row, {}).get(name), found.get(other, {}).get(name)
            both = sorted((mine or {}).keys() & (theirs or {}).keys())  # seeds
            if mine is None or theirs is None or not both:
                cells.append("–")
                continue
            pair = [mine[seed] for seed in both], [theirs[seed] for seed in both]
            gap, said, by_seed = compared(*pair, of_seeds[name], len(seeds))
            holds = HOLDS.get(said, said)
            at_all = ALBEF_14M if other == "quarter" else ROWS[row].published
            papers = at_all[place] - ROWS[other].published[place]
            orderings.setdefault(f"{row} over {other}", {})[name] = {
                **gap.as_json(), "verdict": holds, "paper": papers, "each seed": by_seed
            }  # fmt: skip
            cells.append(f"{per_cent(gap)} {holds} (paper {papers:+.2f})")
        lines.append(f"| {ROWS[row].title} over {ROWS[other].title} | {' | '.join(cells)} |")
    print("\n".join(lines))
    written = side_by_side.write("albef_table1", results, command=command, orderings=orderings,
                                commonest={name: as_json(result) for name, result in floors.items()})  # fmt: skip
    written.with_suffix(".md").write_text("\n".join([*lines, "", f"    {command}", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
