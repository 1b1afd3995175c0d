"""The runs of FLAVA's ablation: each column of evaluate/ablation.py as a recipe, and the towers that some start from.

Every column gets the same number of updates on pairs; where pictures and texts alone are trained on besides, as many
more as their share of the steps asks for. Columns of one tower take as many updates on the pictures, or the texts, of
the pairs. Vocabulary and image codebook are made once and shared by all; the weights of a seed are the same in every
column, since they are a function of seed and name, and so are the towers of a seed, which are trained once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trivium.data.mixture import StreamMixture
from trivium.errors import TriviumError
from trivium.evaluate.ablation import COLUMNS, Column
from trivium.load import save_image_tokenizer
from trivium.manifest import file_beside
from trivium.methods.flava import LOSSES, Scope
from trivium.recipes.clip import ClipRecipe, clip
from trivium.recipes.clip import Objective as ClipObjective
from trivium.recipes.data import PairData, make_tokenizer, open_sources
from trivium.recipes.dino import DinoRecipe
from trivium.recipes.flava import FlavaRecipe
from trivium.recipes.stages import Stages
from trivium.train.run import Train

PAIR_LOSSES = ("mmm_image", "mmm_text", "itm", "contrastive")
TRAINED_BY = {  # column -> its losses
    "mim": ("mim",),
    "mlm": ("mlm",),
    "contrastive_local": ("contrastive",),
    "contrastive": ("contrastive",),
    "mm": PAIR_LOSSES,
    "mm_init": PAIR_LOSSES,
    **dict.fromkeys(("joint", "flava", "flava_mim"), LOSSES),
}
TOWERS = {"text": ("dino",), "dino": ("dino",), "mim": ("mim",)}  # stage -> a way (`image_by`) that it is part of
OF_PAIRS = ("retrieval", "matching")  # abilities that pairs show
MOST_RANKS = 8  # that the batch is cut into where gradient is local
SHARED = "shared"  # the folder of vocabulary and codebook


@dataclass(frozen=True)
class AblationRun:
    """One run: a column, or a tower that columns start from."""

    name: str  # of its folder
    seed: int
    recipe_name: str  # by which config.json knows it
    recipe: FlavaRecipe | ClipRecipe | DinoRecipe
    column: Column | None = None  # None: a tower
    pair_updates: int = 0
    needs: tuple[str, ...] = ()  # runs that must be finished first


def check(tree: Stages, columns: Sequence[str]) -> None:
    """Raises TriviumError for a column that there is not, or whose data there is not."""
    for name in columns:
        if name not in COLUMNS:
            raise TriviumError(f"there is no column {name}: there are {', '.join(COLUMNS)}")
    if not (tree.data.is_embedded or tree.data.pairs):
        raise TriviumError("the ablation trains on captioned pictures: give --data.pairs")
    joint = [name for name in columns if TRAINED_BY.get(name) == LOSSES]
    if joint and not tree.data.is_embedded and not tree.data.split_pairs and not (tree.data.images and tree.data.text):
        raise TriviumError(
            f"the column {joint[0]} trains on pictures and texts alone too: give --data.images and --data.text, or"
            " --data.split-pairs true for those of the pairs, or leave it out with --columns"
        )


def measurable(column: Column, data: PairData) -> tuple[str, ...]:
    """The abilities of a column that this data lets be measured: retrieval and matching are of pairs as those that it
    was trained on, and without held-out ones of them they are dashes."""
    if data.is_embedded or data.validation:
        return column.abilities
    return tuple(ability for ability in column.abilities if ability not in OF_PAIRS)


def measured_on(data: PairData, glue: bool) -> list[str]:
    """Sentences on what the columns are measured on, for the terminal and the page. glue: whether its tasks were."""
    both = "the embedded drawings and their names"
    if not data.is_embedded:
        both = f"the held-out pairs of {', '.join(data.validation)}" if data.validation else "nothing"
    sentences = [
        "Measured on: vision, the embedded drawings of the held-out style and the embedded clip art; language, the"
        f" names of embedded drawings{' and SST-2, CoLA and RTE' if glue else ''}; retrieval and matching, {both}."
    ]
    if both == "nothing":
        sentences.append(
            "Retrieval and matching are not measured, since no pairs were held out, and stand as dashes that no average"
            " counts: give --data.validation captioned pictures that are not trained on, and another folder with --out."
        )
    return sentences


def share_parts(tree: Stages, out: Path) -> None:
    """Make the vocabulary and the image codebook that all runs read; what is there stays."""
    folder = out / SHARED
    folder.mkdir(parents=True, exist_ok=True)
    if tree.data.vocabulary == "learned" and not (folder / "tokenizer.json").is_file():
        tokenizer = make_tokenizer(tree.data, open_sources(tree.data), tree.model.vocab_size)
        with file_beside(folder / "tokenizer.json") as beside:
            tokenizer.save(beside)
    if tree.data.image_tokenizer == "patches" and not (folder / "image_tokenizer").is_dir():
        _, _, image_tokenizer = tree.pictures()
        save_image_tokenizer(image_tokenizer, folder / "image_tokenizer")


def plan(tree: Stages, size: str, out: Path, columns: Sequence[str], seeds: Sequence[int]) -> list[AblationRun]:
    """Every run of these columns and seeds, towers first.

    Args:
        tree: the stages, whose joint `train.steps` are the updates on pairs.
        size: of the recipe of CLIP.
        out: the folder that holds the runs and what `share_parts` made.
    """
    data = tree.data
    if data.vocabulary == "learned":
        data = replace(data, vocabulary=str(out.absolute() / SHARED / "tokenizer.json"))
    if data.image_tokenizer == "patches":
        data = replace(data, image_tokenizer=str(out.absolute() / SHARED / "image_tokenizer"))
    tree = replace(tree, data=data, validate=0)
    runs: list[AblationRun] = []
    for seed in seeds:
        seeded = _with_seed(tree, seed)
        wanted = dict.fromkeys(tower for name in columns for tower in COLUMNS[name].starts_from)
        runs += [_tower(seeded, tower, seed, out) for tower in wanted]
    for seed in seeds:
        seeded = _with_seed(tree, seed)
        # Several processes end together where what takes longest comes first.
        longest_first = sorted(columns, key=lambda name: -len(COLUMNS[name].abilities))
        runs += [_column(seeded, COLUMNS[name], size, seed, out) for name in longest_first]
    return runs


def total_updates(mixture: StreamMixture, pair_updates: int) -> int:
    """Steps until so many were drawn from the pairs; of a mixture without pairs, as many steps."""
    if all(stream.name != "pairs" for stream in mixture.streams):
        return pair_updates
    step = taken = 0
    while taken < pair_updates:
        taken += mixture.stream_at(step).name == "pairs"
        step += 1
    return step


def _with_seed(tree: Stages, seed: int) -> Stages:
    def seeded(train: Train) -> Train:
        return replace(train, seed=seed)

    stages = {name: replace(getattr(tree, name), train=seeded(getattr(tree, name).train)) for name in TOWERS}
    return replace(tree, train=seeded(tree.train), **stages)


def _tower(tree: Stages, tower: str, seed: int, out: Path) -> AblationRun:
    by: Any = TOWERS[tower]
    stage = next(stage for stage in replace(tree, image_by=by).plan(out) if stage.name == tower)
    return AblationRun(_tower_name(tower, seed), seed, stage.recipe_name, stage.recipe)


def _tower_name(tower: str, seed: int) -> str:
    return f"tower-{tower}-seed{seed}"


def _column(tree: Stages, column: Column, size: str, seed: int, out: Path) -> AblationRun:
    name, steps = f"{column.name}-seed{seed}", tree.train.steps
    needs = tuple(_tower_name(tower, seed) for tower in column.starts_from)
    if column.name == "clip":
        return AblationRun(name, seed, "clip", _clip(tree, size), column, steps)
    losses = TRAINED_BY[column.name]
    weights: dict[str, Any] = {loss: getattr(tree.objectives, loss) * (loss in losses) for loss in LOSSES}
    scope: Scope = "local_gradient" if column.name == "contrastive_local" else "global"
    objectives = replace(tree.objectives, **weights, contrastive_scope=scope, num_ranks=_ranks(tree, scope))
    data = tree.data
    if len(losses) == 1 and losses[0] in ("mim", "mlm"):
        data = replace(data, images=(), text=(), split_pairs=True)
    elif "itm" not in losses:
        data = replace(data, false_pairs=0.0)
    towers = dict(zip(column.starts_from, needs, strict=True))
    image = towers.get("dino") or towers.get("mim")
    plain = {field.name: getattr(tree, field.name) for field in fields(FlavaRecipe)}
    recipe = FlavaRecipe(**plain | {
        "objectives": objectives, "data": data,
        "init_text": str((out / towers["text"]).absolute()) if towers else None,
        "init_image": str((out / image).absolute()) if image else None,
    })  # fmt: skip
    return AblationRun(name, seed, "flava", recipe, column, steps, needs)


def _ranks(tree: Stages, scope: Scope) -> int:
    """Of a local gradient: at most so many that each has a pair at least."""
    return 1 if scope == "global" else max(ranks for ranks in range(1, MOST_RANKS + 1) if tree.data.batch % ranks == 0)


def _clip(tree: Stages, size: str) -> ClipRecipe:
    """CLIP of that size on the same pairs, cut into the same patches; its text tower and its optimizer are its own."""
    recipe, flava = clip(size), tree.model
    model = replace(
        recipe.model, image_size=flava.image_size, patch_size=flava.patch_size, vocab_size=flava.vocab_size,
        max_length=max(recipe.model.max_length, tree.data.max_length),
    )  # fmt: skip
    data = PairData(**{field.name: getattr(tree.data, field.name) for field in fields(PairData)})
    objectives = ClipObjective(contrastive_scope="local_gradient", num_ranks=_ranks(tree, "local_gradient"))
    return replace(recipe, model=model, objectives=objectives, data=data, train=tree.train, validate=0)
