"""What the verbs ask of a recipe, and of a run: a recipe with its parts in memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from trivium.bundle import Bundle
from trivium.bundle.untrained import no_cosine
from trivium.data.mixture import StreamMixture, refuse_uneven_shares
from trivium.evaluate import embedded, pairs
from trivium.evaluate.embedded import Evaluation
from trivium.recipes import validation
from trivium.recipes.data import PairData, Sources, absolute
from trivium.recipes.notices import cut_in_streams, noticed
from trivium.recipes.validation import Validation
from trivium.train import distributed
from trivium.train.checkpoint import Export
from trivium.train.config import Config, leaves
from trivium.train.optim import Optim
from trivium.train.protocol import Method, Stream
from trivium.train.run import Run, Train

# name -> (on held-out samples, for a guess from the labels' frequencies; None: there is no such guess)
Losses = dict[str, tuple[float, float | None]]
Schedule = Literal["ratio", "round-robin"]  # see data/mixture.py

NOTHING_HELD_OUT = (
    "nothing was held out: give --data.validation captioned pictures that are not trained on, or measure the run on"
    " some with trivium evaluate RUN --pairs"
)


class Recipe:
    """What recipes have in common: dataclasses with `data` and `train`, and with models to start from."""

    data: Any
    train: Train

    @property
    def rows_at_once(self) -> int:
        """Samples of one forward, in steps and in validation; the whole batch until "auto" is settled."""
        return self.train.micro_batch if isinstance(self.train.micro_batch, int) else self.data.batch

    def refuse_uneven_shares(self) -> None:
        """Raises TriviumError where the processes of this run cannot share its batches. All of them call it, before
        anything is opened or learned; the first one says why."""
        world = distributed.world()
        # "auto" finds one that they can share; what is no batch at all is refused with its own sentence.
        micro_batch = 1 if self.train.micro_batch == "auto" else max(1, self.rows_at_once)
        distributed.first_process_does(lambda: refuse_uneven_shares("this run", self.data.batch, micro_batch, world))

    def with_absolute_paths(self) -> Self:
        """The same for whoever stands in another folder: what a config that is kept should state."""
        recipe: Any = self
        given = {name: getattr(self, name, None) for name in ("init", "init_text", "init_image")}
        starts = {name: absolute(path) for name, path in given.items() if path is not None}
        return replace(recipe, data=self.data.with_absolute_paths(), **starts)


@dataclass
class Prepared(ABC):
    """What `prepare` of a recipe returns."""

    recipe: Any  # a dataclass with `train` and `with_absolute_paths`, as it runs
    run: Run
    bundle: Bundle | None  # of the model that is being trained; None: it is an image tokenizer
    mixture_of: Callable[[Train], StreamMixture]
    name: str  # of the recipe, and its arguments, as config.json states them
    arguments: dict[str, Any]
    notes: list[str]  # sentences on what the model starts from and what of the data is cut, for the start of a run

    @classmethod
    def of(
        cls,
        recipe: Any,
        name: str,
        arguments: dict[str, Any],
        method: Method,
        bundle: Bundle,
        mixture_of: Callable[[Train], StreamMixture],
        notes: list[str],
        *,
        optim: Optim | None = None,
        export: Export | None = None,
        select: str | None = None,
        measures_start: bool = False,
        **parts: Any,
    ) -> Self:
        """A recipe whose parts are made. optim: None: the recipe's. export: None: `bundle.save`. select,
        measures_start: see `Run`. parts: this class's own."""
        model: Any = bundle.model
        run = Run(
            method,
            mixture_of(recipe.train),
            optim or recipe.optim,
            recipe.train,
            export=export or bundle.save,
            config=Config(name, arguments, leaves(recipe)),
            blocks=model.blocks,
            select=select,
            measures_start=measures_start,
        )
        prepared = cls(recipe, run, bundle, mixture_of, name, arguments, notes, **parts)
        run.evaluate = prepared.measures(recipe)
        return prepared

    @abstractmethod
    def measures(self, recipe: Any) -> Callable[[Method], dict[str, Any]] | None:
        """What `run.evaluate` is, where `recipe` is this one with other values of `train`."""

    @abstractmethod
    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        """What a run is measured on when it ends, and its losses on held-out samples.

        say: told the name of each part as it begins. final: the losses, where they are known already.
        """

    def settle(self, out: Path) -> str | None:
        """Before a run is measured: put into the method what the run in `out` chose among its checkpoints, and say it.
        Default: the last one, which is there already."""
        return None

    def with_train(self, **changes: Any) -> Self:
        """The same with some values of `train` settled: nothing is opened or learned again."""
        recipe = replace(self.recipe, train=replace(self.recipe.train, **changes))
        run = replace(
            self.run,
            train=recipe.train,
            mixture=self.mixture_of(recipe.train),
            evaluate=self.measures(recipe),
            config=Config(self.name, self.arguments, leaves(recipe)),
        )
        return replace(self, recipe=recipe, run=run)


@dataclass
class PreparedPairs(Prepared):
    """A run on pairs, and perhaps on pictures and texts alone, whose losses are measured on held-out samples.

    `recipe` has `data`, `validate` and `rows_at_once` too.
    """

    sources: Sources
    validation: Validation

    @classmethod
    def of_streams(
        cls,
        recipe: Any,
        name: str,
        arguments: dict[str, Any],
        method: Method,
        bundle: Bundle,
        sources: Sources,
        streams: Sequence[Stream],
        held_out: Sequence[Stream],
        notes: list[str],
        schedule: Schedule = "ratio",
        optim: Optim | None = None,
    ) -> Self:
        """streams, held_out: over rows to train on, and over those that are not. optim: None: the recipe's."""
        batches = validation.of_streams(held_out, recipe.data.batch, recipe.validate, notes)
        notes += [*noticed(sources), *cut_in_streams(streams, held_out, bundle.tokenizer)]
        return cls.of(
            recipe, name, arguments, method, bundle, mixtures(recipe, streams, schedule), notes,
            optim=optim, sources=sources, validation=batches,
        )  # fmt: skip

    @abstractmethod
    def chance(self) -> dict[str, float]:
        """What each validation loss is for a guess from the labels' frequencies alone (see evaluate/losses.py)."""

    def measures(self, recipe: Any) -> Callable[[Method], dict[str, Any]]:
        return validation.measures(self.validation, recipe.train.seed, recipe.rows_at_once)

    def held_out(self, say: Callable[[str], None], final: dict[str, float] | None) -> tuple[Evaluation, Losses]:
        recipe = self.recipe
        if final is None:
            if self.validation:
                say("validation losses")
            final = validation.losses(self.run.method, self.validation, recipe.train.seed, recipe.rows_at_once)
        chance = self.chance() if self.validation else {}
        found = self.evaluation(say)
        if not recipe.validate:
            found.not_applicable.append("losses on held-out samples: --validate is 0")
        return found, {name: (final[name], chance[name]) for name in final}

    def evaluation(self, say: Callable[[str], None]) -> Evaluation:
        """What the model can do, beside its losses."""
        assert self.bundle is not None
        return on_pairs(self.bundle, self.recipe.data, self.sources, say)


def mixtures(recipe: Any, streams: Sequence[Stream], schedule: Schedule = "ratio") -> Callable[[Train], StreamMixture]:
    """What `mixture_of` is where the micro-batches of all streams are the rows that the recipe computes at once."""

    def mixture_of(train: Train) -> StreamMixture:
        rows = replace(recipe, train=train).rows_at_once
        return StreamMixture([replace(s, micro_batch=rows) for s in streams], train.seed, schedule, train.workers)

    return mixture_of


def on_pairs(bundle: Bundle, data: PairData, sources: Sources, say: Callable[[str], None]) -> Evaluation:
    """The embedded drawings where a run was trained on them, else its validation pairs, where it has any."""
    if data.is_embedded:
        return on_drawings(bundle, say)
    if sources.validation_pairs is None:
        return Evaluation(not_applicable=[NOTHING_HELD_OUT])
    if (why := no_cosine(bundle.untrained)) is not None:  # no error, at the end of a training
        return Evaluation(not_applicable=[f"retrieval on the validation pairs: {why}"])
    say("retrieval on the validation pairs")
    return pairs.run(bundle, sources.validation_pairs)


def on_drawings(bundle: Bundle, say: Callable[[str], None]) -> Evaluation:
    """What a model can do on the embedded drawings, as far as its abilities go."""
    if bundle.false_pairs is not None:
        return embedded.run(bundle, bundle.false_pairs, say)
    found = embedded.run(bundle, say=say)
    if "itm.accuracy" in found.results:
        found.not_applicable.append(
            "itm.accuracy takes half of the training pairs as false, since this model does not say how many were:"
            " evaluate its run folder, where there is one, for the exact figure"
        )
    return found
