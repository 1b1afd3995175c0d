"""The ablation's runs: what each column is given, and that they are compared on equal terms."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from trivium.data import embedded
from trivium.data.mixture import StreamMixture
from trivium.errors import TriviumError
from trivium.evaluate.ablation import COLUMNS
from trivium.methods.flava import LOSSES
from trivium.recipes import ablation
from trivium.recipes.ablation import AblationRun, total_updates
from trivium.recipes.clip import ClipRecipe
from trivium.recipes.data import Data, open_sources
from trivium.recipes.flava import FlavaRecipe
from trivium.recipes.stages import Stages, flava_stages
from trivium.train.config import set_leaves
from trivium.train.protocol import Stream


@pytest.fixture(scope="module")
def tree() -> Stages:
    return set_leaves(flava_stages("tiny"), {
        "train.steps": 7, "model.width": 32, "model.mlp_width": 64, "model.num_heads": 2, "model.image_layers": 1,
        "model.text_layers": 1, "model.multimodal_layers": 1, "model.num_codes": 16, "model.vocab_size": 300,
        "train.workers": 0, "data.batch": 16, "data.cache_megabytes": 0,
    })  # fmt: skip


def planned(tree: Stages, out: Path, *columns: str, seeds: tuple[int, ...] = (0,)) -> dict[str, AblationRun]:
    return {run.name: run for run in ablation.plan(tree, "tiny", out, columns, seeds)}


def test_every_column_has_its_losses_and_what_it_starts_from(tree: Stages, tmp_path: Path) -> None:
    runs = planned(tree, tmp_path, *COLUMNS, seeds=(0, 4))
    assert len(runs) == 2 * (10 + 3)
    assert set(ablation.TRAINED_BY) | {"clip"} == set(COLUMNS)
    for name, losses in ablation.TRAINED_BY.items():
        run = runs[f"{name}-seed4"]
        assert isinstance(run.recipe, FlavaRecipe)
        objectives = run.recipe.objectives
        assert {loss for loss in LOSSES if getattr(objectives, loss)} == set(losses), name
        assert objectives.contrastive_scope == ("local_gradient" if name == "contrastive_local" else "global")
        assert (run.recipe.train.seed, run.pair_updates, run.recipe.validate) == (4, 7, 0)
        assert (run.recipe.data.false_pairs > 0) == ("itm" in losses or name in ("mim", "mlm"))
    clip = runs["clip-seed0"].recipe
    assert isinstance(clip, ClipRecipe)
    assert (clip.objectives.contrastive_scope, clip.objectives.num_ranks) == ("local_gradient", 8)
    assert runs["contrastive_local-seed0"].recipe.objectives.num_ranks == 8  # type: ignore[union-attr]
    full, blank = runs["flava-seed4"], runs["joint-seed4"]
    assert full.needs == ("tower-text-seed4", "tower-dino-seed4") and blank.needs == ()
    assert isinstance(full.recipe, FlavaRecipe) and isinstance(blank.recipe, FlavaRecipe)
    assert full.recipe.init_image == str(tmp_path / "tower-dino-seed4")
    assert replace(full.recipe, init_text=None, init_image=None) == blank.recipe
    by_mim = runs["flava_mim-seed4"].recipe
    assert isinstance(by_mim, FlavaRecipe) and by_mim.init_image == str(tmp_path / "tower-mim-seed4")
    assert list(runs)[:6] == [f"tower-{t}-seed{s}" for s in (0, 4) for t in ("text", "dino", "mim")]
    assert set(planned(tree, tmp_path, "clip", "mm")) == {"clip-seed0", "mm-seed0"}  # no tower that nobody needs


def test_a_mixture_takes_as_many_steps_as_its_pairs_ask_for() -> None:
    def stream(name: str, ratio: float) -> Stream:
        return Stream(name, embedded.text("val"), _Collate(), 8, 8, ratio)

    mixture = StreamMixture([stream("pairs", 0.7), stream("images", 0.15), stream("text", 0.15)], seed=3)
    for wanted in (1, 14, 33):
        total = total_updates(mixture, wanted)
        drawn = [mixture.stream_at(step).name for step in range(total)]
        assert drawn.count("pairs") == wanted and drawn[-1] == "pairs"
    assert total_updates(StreamMixture([stream("text", 1.0)], seed=0), 9) == 9


class _Collate:
    false_pairs, sort_by_length = 0.0, False


@pytest.fixture(scope="module")
def shared(tree: Stages, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ablation")
    ablation.share_parts(tree, out)
    return out


def test_a_seed_draws_the_same_weights_in_every_column(tree: Stages, shared: Path) -> None:
    """Whatever it is trained by; the heads' biases alone start at the frequencies of their labels."""
    before = {path.name: path.stat().st_mtime_ns for path in (shared / "shared").iterdir()}
    ablation.share_parts(tree, shared)
    assert {path.name: path.stat().st_mtime_ns for path in (shared / "shared").iterdir()} == before
    runs = planned(tree, shared, "mim", "mlm", "contrastive", "joint")
    states = {}
    for run in runs.values():
        assert isinstance(run.recipe, FlavaRecipe)
        prepared = run.recipe.prepare(run.recipe_name, {"size": "tiny"})
        states[run.name] = prepared.run.method.model.state_dict()
        if run.column is not None and run.column.name in ("mim", "mlm"):
            [stream] = prepared.mixture_of(run.recipe.train).streams
            assert stream.name == ("images" if run.column.name == "mim" else "text")
            assert stream.source == embedded.pairs("train")  # of the pairs, as the paper's are of its pairs
    first, *others = states.values()
    for other in others:
        for name, tensor in first.items():
            assert name.endswith("decoder.bias") or torch.equal(tensor, other[name]), name


def test_pairs_taken_apart(tree: Stages) -> None:
    sources = open_sources(Data(split_pairs=True))
    assert sources.images == sources.text == sources.pairs == embedded.pairs("train")
    assert sources.validation_text == embedded.pairs("val")
    with pytest.raises(TriviumError, match="takes pictures and text from the pairs"):
        open_sources(Data(split_pairs=True, pairs=("a.csv",), images=("b",)))


def test_mistakes_are_told(tree: Stages) -> None:
    def refused(sentence: str, columns: tuple[str, ...], **data: object) -> None:
        with pytest.raises(TriviumError, match=sentence):
            ablation.check(replace(tree, data=replace(tree.data, **data)), columns)  # type: ignore[arg-type]

    refused("there is no column flavor: there are mim, mlm", ("flavor",))
    refused("trains on captioned pictures: give --data.pairs", ("mm",), images=("pictures",))
    refused("the column joint trains on pictures and texts alone too", ("mm", "joint"), pairs=("a.csv",))
    ablation.check(replace(tree, data=replace(tree.data, pairs=("a.csv",), split_pairs=True)), tuple(COLUMNS))
    ablation.check(replace(tree, data=replace(tree.data, pairs=("a.csv",))), ("mim", "mlm", "mm", "clip"))


def test_what_is_measured_on_what_is_said(tree: Stages) -> None:
    """Pairs of one's own without held-out ones: the drawings, which none of them resembles, do not stand in."""
    own = replace(tree.data, pairs=("a.csv",))
    held_out = replace(own, validation=("b.csv",))
    mm, mlm = COLUMNS["mm"], COLUMNS["mlm"]
    assert ablation.measurable(mm, own) == ("vision", "language")
    assert ablation.measurable(mm, held_out) == ablation.measurable(mm, tree.data) == mm.abilities
    assert ablation.measurable(mlm, own) == mlm.abilities
    [embedded_alone] = ablation.measured_on(tree.data, glue=False)
    assert embedded_alone.endswith("retrieval and matching, the embedded drawings and their names.")
    assert "SST-2" not in embedded_alone
    [by_pairs] = ablation.measured_on(held_out, glue=True)
    assert by_pairs.endswith("names of embedded drawings and SST-2, CoLA and RTE; retrieval and matching, the held-out"
                             " pairs of b.csv.")  # fmt: skip
    measured, dashes = ablation.measured_on(own, glue=False)
    assert measured.endswith("retrieval and matching, nothing.") and "give --data.validation" in dashes
