"""Walls of pictures: queries with the six nearest pictures of each, right ones marked. What people look at first.

Q queries, C candidates, D width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trivium.data.embedded import Emoji
from trivium.evaluate import retrieval

SHOWN = 6
SEEN_NAMES = (
    "red heart", "hot dog", "rocket", "violin", "sunflower", "castle", "snowman", "octopus", "pizza", "bicycle",
    "smiling face with sunglasses", "Christmas tree",
)  # fmt: skip
SEEN_SHOWN = 8
NEW_SHOWN = 6
PICTURES_SHOWN = 8


@dataclass(frozen=True)
class Picture:
    image: bytes  # WebP
    name: str
    right: bool = False


@dataclass(frozen=True)
class Query:
    text: str
    picture: Picture | None  # the query itself, where it is a picture
    rank: int  # of the first right answer
    answers: list[Picture]  # the nearest first
    is_new: bool  # a concept that no training stream held


@dataclass(frozen=True)
class Wall:
    title: str
    note: str
    queries: list[Query]


def text_wall(records: Sequence[Emoji], names_BD: Tensor, pictures_BD: Tensor, concepts: Tensor) -> Wall:
    """Names, some of them of concepts never trained on, against all pictures of the held-out style."""
    row_of = {record.name: row for row, record in enumerate(records)}
    seen = [row_of[name] for name in SEEN_NAMES if name in row_of and records[row_of[name]].split == "train"]
    chosen = seen[:SEEN_SHOWN] + _drawn([row for row, r in enumerate(records) if r.split == "test"], NEW_SHOWN)
    queries = _queries(chosen, records, names_BD, concepts, records, pictures_BD, concepts, with_picture=False)
    return Wall(
        "Ask in words",
        f"The six nearest of {len(records):,} drawings in a style that the model never saw. A green frame marks a right"
        " one. “New” marks a thing that the model never saw in any style, nor its name.",
        queries,
    )


def picture_wall(
    records: Sequence[Emoji],
    pictures_BD: Tensor,
    concepts: Tensor,
    gallery: Sequence[Emoji],
    gallery_BD: Tensor,
    gallery_concepts: Tensor,
) -> Wall:
    """Held-out pictures against the pictures of the other styles that the model was trained on."""
    answerable = torch.isin(concepts, gallery_concepts).tolist()
    rows = [row for row, record in enumerate(records) if record.split == "train" and answerable[row]]
    queries = _queries(
        _drawn(rows, PICTURES_SHOWN), records, pictures_BD, concepts, gallery, gallery_BD, gallery_concepts,
        with_picture=True,
    )  # fmt: skip
    return Wall(
        "Ask with a picture",
        f"A drawing in the unseen style (left), and the six nearest of {len(gallery):,} in the styles of training.",
        queries,
    )


def _drawn(rows: list[int], number: int) -> list[int]:
    """The same random few each time, so that two reports can be laid side by side."""
    return np.random.default_rng(0).permutation(rows)[:number].tolist()


def _queries(
    rows: list[int],
    records: Sequence[Emoji],
    queries_BD: Tensor,
    concepts: Tensor,
    candidates: Sequence[Emoji],
    candidates_CD: Tensor,
    candidate_concepts: Tensor,
    with_picture: bool,
) -> list[Query]:
    scores_QC = retrieval.scores(queries_BD[rows], candidates_CD)
    right_QC = concepts[rows, None] == candidate_concepts
    ranks = retrieval.ranks(scores_QC, right_QC).tolist()
    nearest = scores_QC.topk(min(SHOWN, len(candidates)), dim=1).indices.tolist()
    return [
        Query(
            text=records[row].name,
            picture=Picture(records[row].image, records[row].name) if with_picture else None,
            rank=ranks[query],
            answers=[
                Picture(candidates[index].image, candidates[index].name, bool(right_QC[query, index]))
                for index in nearest[query]
            ],
            is_new=records[row].split != "train",
        )
        for query, row in enumerate(rows)
    ]
