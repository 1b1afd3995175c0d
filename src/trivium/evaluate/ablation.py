"""The table that justifies FLAVA (Singh et al. 2022, tables 4 and C.1), made of runs of our own: its columns, its
figures, its averages, and which of the paper's orderings hold here.

A figure of a column is the mean over its seeds. Intervals are percentile bootstraps of 95 %: seeds are drawn again, and
within a figure its units (pictures, names, sentences), the same ones for every column and seed. So the interval of a
difference between two columns is a paired one, and what is hard for both cancels.

What a column cannot do is a dash. The average of a domain is taken over the figures that every column able in that
domain has, so that columns are compared on equal terms; a domain that a column cannot do at all counts 0 in the macro
average, as in the paper. Beside it stands the macro average in which every dash counts 0. A figure that a column could
have and was not asked for, GLUE say, is named as missing and enters no average.

R replicates, S seeds, N units.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from trivium.errors import TriviumError
from trivium.evaluate import published
from trivium.evaluate.compare import STATISTICS
from trivium.evaluate.outcomes import Outcomes
from trivium.evaluate.paper_tasks import DOMAINS
from trivium.evaluate.results import LEVEL, REPLICATES, Draws, Results
from trivium.train.protocol import hash64

ALL = ("vision", "language", "retrieval")  # what a model of both towers can do
FLAVAS = ("mm", "mm_init", "joint", "flava", "flava_mim")


@dataclass(frozen=True)
class Column:
    """One column: what was trained, what it can do, and its counterpart in the paper."""

    name: str
    title: str
    abilities: tuple[str, ...]  # see evaluate/ablation_figures.py
    paper: tuple[str, str]  # system and setting in published.csv
    starts_from: tuple[str, ...] = ()  # towers that were trained before


COLUMNS = {
    column.name: column
    for column in (
        Column("mim", "MIM", ("vision",), ("FLAVA", "MIM only, PMD images (col 1)")),
        Column("mlm", "MLM", ("language", "masked words"), ("FLAVA", "MLM only, PMD text (col 2)")),
        Column(
            "contrastive_local", "FLAVA-C, local gradient", ALL,
            ("FLAVA", "FLAVA_C, local contrastive loss, PMD (C.1 col 3)"),
        ),
        Column("contrastive", "FLAVA-C, global", ALL, ("FLAVA", "FLAVA_C, contrastive only, PMD (col 3)")),
        Column("mm", "FLAVA-MM", (*ALL, "matching"), ("FLAVA", "FLAVA_MM, PMD (col 4)")),
        Column(
            "mm_init", "FLAVA-MM, DINO and MLM start", (*ALL, "matching"),
            ("FLAVA", "FLAVA_MM, DINO init, PMD (C.1 col 9)"), ("text", "dino"),
        ),
        Column(
            "joint", "FLAVA joint, no start", (*ALL, "matching", "masked words"),
            ("FLAVA", "FLAVA without unimodal init (col 5)"),
        ),
        Column(
            "flava", "FLAVA, DINO and MLM start", (*ALL, "matching", "masked words"),
            ("FLAVA", "FLAVA full (col 6)"), ("text", "dino"),
        ),
        Column(
            "flava_mim", "FLAVA, MIM and MLM start", (*ALL, "matching", "masked words"),
            ("FLAVA", "FLAVA full, BEiT init (C.1 col 11)"), ("text", "mim"),
        ),
        Column("clip", "CLIP, local gradient", ALL, ("CLIP", "ViT-B/16 trained on PMD (col 7)")),
    )
}  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """One row of the table. Shares of 1; the paper's numbers are per cent."""

    name: str  # of the result
    title: str
    domain: str
    paper: tuple[str, str] | None = None  # task and metric in published.csv

    @property
    def ability(self) -> str:
        """Of the columns that can have it."""
        if self.domain == "multimodal":
            return "matching" if self.name == "itm.auroc" else "retrieval"
        return "masked words" if self.name == "masked_words" else self.domain


FIGURES = (
    Figure("names.group", "group (9), from the name alone", "language"),
    Figure("names.subgroup", "subgroup (98), from the name alone", "language"),
    Figure("masked_words", "masked words of names never seen", "language"),
    Figure("glue.sst2", "SST-2, linear probe", "language", ("SST-2", "accuracy")),
    Figure("glue.cola", "CoLA (Matthews), linear probe", "language", ("CoLA", "Matthews")),
    Figure("glue.rte", "RTE, linear probe", "language", ("RTE", "accuracy")),
    Figure("knn.other_concepts.subgroup", "subgroup, unseen style, own concept left out: neighbours", "vision"),
    Figure("probe.other_concepts.subgroup", "the same, linear probe", "vision"),
    Figure("knn.category", "category of clip art: neighbours", "vision"),
    Figure("probe.category", "the same, linear probe", "vision"),
    Figure("retrieval.style.text_to_image_r10", "text to image, unseen style, R@10", "multimodal"),
    Figure("retrieval.style.image_to_text_r10", "image to text, unseen style, R@10", "multimodal"),
    Figure("retrieval.concepts.text_to_image_r10", "text to image, things never seen, R@10", "multimodal"),
    Figure("retrieval.concepts.image_to_text_r10", "image to text, things never seen, R@10", "multimodal"),
    Figure("retrieval.pairs.text_to_image_r10", "text to image, held-out pairs, R@10", "multimodal"),
    Figure("retrieval.pairs.image_to_text_r10", "image to text, held-out pairs, R@10", "multimodal"),
    Figure("itm.auroc", "true pair above false pair, AUROC", "multimodal"),
)
BOTH_TOWERS = "language and vision"  # the mean of the two averages
PAPER_AVERAGES = {"language": "NLP average", "vision": "Vision average", "multimodal": "Multimodal average"}
MACRO = "mean of the NLP, vision and multimodal averages"


@dataclass(frozen=True)
class Claim:
    """An ordering of the paper: the first column against the second, domain by domain."""

    sentence: str
    first: str
    second: str
    domains: tuple[str, ...]


STARTED = ("language", "vision", "multimodal", BOTH_TOWERS)
CLAIMS = (
    Claim(
        "the global contrastive loss is above that with local gradient on vision and language", "contrastive",
        "contrastive_local", ("vision", "language"),
    ),
    Claim("FLAVA-MM is above FLAVA-C in all three domains", "mm", "contrastive", DOMAINS),
    Claim("joint training is above FLAVA-MM on language and below it elsewhere", "joint", "mm", DOMAINS),
    Claim("towers from DINO and MLM lift the averages of joint training", "flava", "joint", STARTED),
    Claim("towers from MIM and MLM lift the averages of joint training", "flava_mim", "joint", STARTED),
    Claim("towers from DINO and MLM lift the averages of FLAVA-MM", "mm_init", "mm", STARTED),
)  # fmt: skip


# --------------------------------------------------------------------------------------------- what was measured


@dataclass(frozen=True)
class Measured:
    """One finished run."""

    column: str
    seed: int
    results: Results
    outcomes: Mapping[str, Outcomes]
    updates: int  # of the column itself
    pair_updates: int
    tower_updates: int  # of the towers that it started from
    seconds: float  # of training, the towers' too


@dataclass(frozen=True)
class Value:
    """A number of the table, a share. low and high: None where units or seeds cannot be drawn again."""

    value: float
    low: float | None = None
    high: float | None = None
    n: int | None = None  # units
    paper: float | None = None  # per cent


@dataclass(frozen=True)
class Difference:
    """Of two columns in one domain."""

    domain: str
    ours: Value
    paper: float  # points

    @property
    def verdict(self) -> str:
        """ "holds" or "does not hold" where the interval leaves out 0, else "open"."""
        if self.ours.low is None or self.ours.high is None or self.ours.low <= 0 <= self.ours.high:
            return "open"
        return "holds" if (self.ours.low > 0) == (self.paper > 0) else "does not hold"


@dataclass(frozen=True)
class Ordering:
    claim: Claim
    differences: tuple[Difference, ...]
    seeds: tuple[int, ...]  # that both columns have

    @property
    def verdict(self) -> str:
        found = {difference.verdict for difference in self.differences}
        if "does not hold" in found:
            return "does not hold"
        return "holds" if found == {"holds"} else "open"

    def sentence(self) -> str:
        """What is found, with the numbers that say so."""
        first = {
            "holds": "Holds here",
            "does not hold": "Does not hold here",
            "open": "Cannot be told here",
        }[self.verdict]
        numbers = ", ".join(
            f"{each.domain} {100 * each.ours.value:+.1f}{_interval(each.ours)} (paper {each.paper:+.2f})"
            for each in self.differences
        )
        return f"{first}: {self.claim.sentence}. {numbers[0].upper()}{numbers[1:]}."


def _interval(value: Value) -> str:
    return "" if value.low is None or value.high is None else f" [{100 * value.low:+.1f}, {100 * value.high:+.1f}]"


@dataclass
class Table:
    """All of it."""

    columns: list[Column]
    figures: list[Figure]
    runs: list[Measured]
    cells: dict[tuple[str, str], Value]  # by column and figure
    averages: dict[tuple[str, str], Value]  # by column and domain, "macro" and "macro, every dash 0" among them
    shared: dict[str, list[str]]  # domain -> figures that its averages are taken over
    orderings: list[Ordering]
    missing: list[str] = field(default_factory=list)  # sentences on what is not there yet

    def seeds(self, column: str) -> list[int]:
        return sorted(run.seed for run in self.runs if run.column == column)


MACRO_ROWS = ("macro", "macro, every dash 0")


def table(runs: Sequence[Measured]) -> Table:
    """The table of the runs that are finished. Raises TriviumError where there is none."""
    if not runs:
        raise TriviumError("no run of the ablation is finished yet, so there is no table: let one finish first")
    return _Maker(runs).table()


class _Maker:
    """Values and replicates of everything, each computed once."""

    def __init__(self, runs: Sequence[Measured]) -> None:
        self.runs = {(run.column, run.seed): run for run in runs}
        self.columns = [column for name, column in COLUMNS.items() if any(run.column == name for run in runs)]
        self.figures = [figure for figure in FIGURES if any(figure.name in run.results for run in runs)]
        self.shared: dict[str, list[str]] = {
            domain: [f.name for f in self._of(domain) if all(self.has(c.name, f.name) for c in self._able(domain))]
            for domain in DOMAINS
        }

    def table(self) -> Table:
        cells = {
            (column.name, figure.name): self.cell(column, figure)
            for column in self.columns
            for figure in self.figures
            if self.has(column.name, figure.name)
        }
        averages = {}
        for column in self.columns:
            for row in (*DOMAINS, *MACRO_ROWS):
                value = self.average(column, row)
                if value is not None:
                    averages[column.name, row] = value
        present = {column.name for column in self.columns}
        orderings = [o for claim in CLAIMS if (o := self.ordering(claim)) is not None]
        missing = [f"no run of {column.title} is finished" for name, column in COLUMNS.items() if name not in present]
        missing += [
            f"{figure.title} is left out of {column.title}, since {self._how_many(column, figure)} of its seeds have it"
            for column in self.columns
            for figure in self.figures
            if self.lacks(column, figure)
        ]
        return Table(
            self.columns, self.figures, list(self.runs.values()), cells, averages, self.shared, orderings, missing
        )

    def seeds(self, *columns: str) -> tuple[int, ...]:
        """Those that all these columns have."""
        known = [{seed for name, seed in self.runs if name == column} for column in columns]
        return tuple(sorted(set.intersection(*known)))

    def has(self, column: str, figure: str) -> bool:
        return all(figure in self.runs[column, seed].results for seed in self.seeds(column))

    def lacks(self, column: Column, figure: Figure) -> bool:
        """Whether its dash is of what was not measured, not of what it cannot do."""
        return figure.ability in column.abilities and not self.has(column.name, figure.name)

    def _how_many(self, column: Column, figure: Figure) -> str:
        some = any(figure.name in self.runs[column.name, seed].results for seed in self.seeds(column.name))
        return "only some" if some else "none"

    def _of(self, domain: str) -> list[Figure]:
        return [figure for figure in self.figures if figure.domain == domain]

    def _able(self, domain: str) -> list[Column]:
        return [c for c in self.columns if any(self.has(c.name, figure.name) for figure in self._of(domain))]

    # -------------------------------------------------------------------------------- values and replicates

    def cell(self, column: Column, figure: Figure) -> Value:
        seeds = self.seeds(column.name)
        results = [self.runs[column.name, seed].results[figure.name] for seed in seeds]
        low, high = _ends(self.replicates(column.name, figure.name, seeds))
        paper = None if figure.paper is None else _published(column, task=figure.paper[0], metric=figure.paper[1])
        return Value(float(np.mean([result.value for result in results])), low, high, results[0].n, paper)

    @functools.cache  # noqa: B019  # one maker for one table
    def replicates(self, column: str, figure: str, seeds: tuple[int, ...]) -> np.ndarray | None:
        """The figure's mean over the seeds, drawn again: [R]; None where a run kept no outcomes."""
        each = [self.of_run(column, seed, figure) for seed in seeds]
        found = [replicates for replicates in each if replicates is not None]
        if len(found) < len(each):
            return None
        drawn_RS = np.random.default_rng(hash64("ablation", "seeds") % 2**63).integers(
            len(seeds), size=(REPLICATES, len(seeds))
        )
        return np.take_along_axis(np.stack(found, axis=1), drawn_RS, axis=1).mean(axis=1)

    @functools.cache  # noqa: B019
    def of_run(self, column: str, seed: int, figure: str) -> np.ndarray | None:
        """The figure of one run with its units drawn again, the same for every run that was asked the same: [R]."""
        outcomes = self.runs[column, seed].outcomes.get(figure)
        if outcomes is None:
            return None
        rng = np.random.default_rng(hash64("ablation", figure, *outcomes.units) % 2**63)
        drawn, values = Draws(len(outcomes.units), outcomes.groups), outcomes.values.astype(np.float64)
        statistic = STATISTICS[outcomes.statistic]
        return np.array([statistic(values[drawn(rng)]) for _ in range(REPLICATES)])

    # ------------------------------------------------------------------------------------------- averages

    def average(self, column: Column, row: str) -> Value | None:
        found = self.drawn(column.name, row, self.seeds(column.name))
        return None if found is None else Value(found[0], *_ends(found[1]), paper=_paper_average(column, row))

    def drawn(self, column: str, row: str, seeds: tuple[int, ...]) -> tuple[float, np.ndarray | None] | None:
        """An average of a column and its replicates; None where the column cannot do the domain."""
        if row == BOTH_TOWERS:
            return _mean([self.drawn(column, domain, seeds) for domain in ("language", "vision")])
        if row == "macro":
            domains = [domain for domain in DOMAINS if self.shared[domain]]
            return _mean([self.drawn(column, domain, seeds) or ZERO for domain in domains])
        if row == "macro, every dash 0":
            means = []
            for domain in DOMAINS:
                names = [f.name for f in self._of(domain) if not any(self.lacks(c, f) for c in self.columns)]
                if names:
                    means.append(_mean([self.one(column, name, seeds) or ZERO for name in names]))
            return _mean(means)
        return _mean([self.one(column, name, seeds) for name in self.shared[row]])

    def one(self, column: str, figure: str, seeds: tuple[int, ...]) -> tuple[float, np.ndarray | None] | None:
        if not self.has(column, figure):
            return None
        values = [self.runs[column, seed].results[figure].value for seed in seeds]
        return float(np.mean(values)), self.replicates(column, figure, seeds)

    # ------------------------------------------------------------------------------------------ orderings

    def ordering(self, claim: Claim) -> Ordering | None:
        """None where a column is not there, or no seed is common to both."""
        seeds = self.seeds(claim.first, claim.second)
        if not seeds:
            return None
        differences = []
        for domain in claim.domains:
            first, second = (self.drawn(column, domain, seeds) for column in (claim.first, claim.second))
            paper = [_paper_average(COLUMNS[column], domain) for column in (claim.first, claim.second)]
            if first is None or second is None or paper[0] is None or paper[1] is None:
                continue
            both = None if first[1] is None or second[1] is None else first[1] - second[1]
            differences.append(Difference(domain, Value(first[0] - second[0], *_ends(both)), paper[0] - paper[1]))
        return Ordering(claim, tuple(differences), seeds) if differences else None


ZERO = (0.0, np.zeros(REPLICATES))


def _mean(parts: Sequence[tuple[float, np.ndarray | None] | None]) -> tuple[float, np.ndarray | None] | None:
    """Of values and of their replicates; None where there is none, or one is missing."""
    known = [part for part in parts if part is not None]
    if not parts or len(known) < len(parts):
        return None
    drawn = [replicates for _, replicates in known if replicates is not None]
    return float(np.mean([v for v, _ in known])), np.mean(drawn, axis=0) if len(drawn) == len(known) else None


def _ends(replicates_R: np.ndarray | None) -> tuple[float | None, float | None]:
    if replicates_R is None:
        return None, None
    low, high = np.quantile(replicates_R, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


# ------------------------------------------------------------------------------------------------- the paper


def _published(column: Column, **wanted: str) -> float | None:
    """A number of the column's counterpart, in per cent; where there is a corrected one, that."""
    rows = [
        row
        for row in published.rows()
        if (row["system"], row["setting"]) == column.paper and all(row[name] == value for name, value in wanted.items())
    ]
    rows.sort(key=lambda row: row["confidence"] != "corrected")
    return float(rows[0]["value"]) if rows else None


def _paper_average(column: Column, row: str) -> float | None:
    if row == BOTH_TOWERS:
        both = [_paper_average(column, domain) for domain in ("language", "vision")]
        return None if None in both else sum(value for value in both if value is not None) / 2
    if row in PAPER_AVERAGES:
        return _published(column, task=PAPER_AVERAGES[row])
    return _published(column, task="Macro average", metric=MACRO) if row == "macro" else None
