"""`trivium demo`: FLAVA from nothing on real drawings and words, and a page that shows what it learned."""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from trivium.errors import TriviumError

if TYPE_CHECKING:
    from trivium.recipes.flava import FlavaRecipe
    from trivium.recipes.prepared import Prepared

TRAINING_MINUTES = 6.8  # it may come to an eighth more where the machine slows down after the steps were timed
QUICK_MINUTES = 0.75
MOST_STEPS = 2000  # a trial of 3,000 left the matching head worse than chance on things never seen


def demo(*, quick: bool = False, out: Path | None = None, minutes: float | None = None) -> int:
    """Pretrain a small FLAVA on the embedded drawings and texts, evaluate it and write a report.

    Args:
        quick: a first picture wall within two minutes; the model has then seen little.
        out: the run folder to make; by default demo, or demo-2, demo-3 where that stands already.
        minutes: of training, instead of 6.8, or of the fewer that 2,000 steps take.
    """
    begun = time.perf_counter()
    from trivium.cli import pretrain as pretrain_verb

    if minutes is not None and not 0 < minutes < math.inf:
        raise TriviumError(f"--minutes {minutes:g}: the demo needs a number of minutes above 0 to train")
    if out is None:
        out = _fresh(Path("demo"))
    elif out.exists():
        raise TriviumError(f"{out} exists already: give a folder that does not, or remove it")
    budget = minutes or (QUICK_MINUTES if quick else TRAINING_MINUTES)
    print(f"FLAVA from nothing: {budget:g} minutes of training, then a report in {out}", file=sys.stderr)
    prepared = pretrain_verb.with_budget(demo_recipe(budget).prepare("flava", {"size": "tiny"}))
    return pretrain_verb.run(bounded(prepared) if minutes is None else prepared, out, begun)


def bounded(prepared: Prepared) -> Prepared:
    """The same with no more steps than the demo's few pairs bear, however fast the machine is."""
    from trivium.cli.pretrain import say

    if prepared.recipe.train.steps <= MOST_STEPS:
        return prepared
    say(f"it stops after {MOST_STEPS}: with more, matching would get worse on things that it never saw")
    return prepared.with_train(steps=MOST_STEPS)


def demo_recipe(minutes: float) -> FlavaRecipe:
    """The tiny recipe under a time budget, changed where 4,346 pairs seen twenty to forty times over ask for it.

    Two of five pairs take the masked pass: what is seen in few minutes is seen by the contrastive loss, which learns
    the most from it and counts twice. Cosines are multiplied by 8 throughout: a factor that learns grows with each
    pass over the pairs, until the model is so sure of those it knows by heart that it does worse than chance on things
    it never saw. For the same reason the matching head learns slowly, half of the pictures are mirrored and they are
    cropped. A fifth of the pairs is false, so that matching has something to tell apart. Words are what a short run
    learns last, so half of them are masked, a quarter of the steps is text alone, words beside a picture count six
    times as much as patches there, and the heads that predict words learn faster; weights a little smaller than the
    tiny recipe's serve them too.
    """
    from trivium.recipes.flava import flava
    from trivium.train.optim import Group

    recipe = flava("tiny")
    return replace(
        recipe,
        model=replace(recipe.model, start_logit_scale=8.0),
        objectives=replace(recipe.objectives, masked_share=0.4, mmm_image=0.5, mmm_text=3.0, contrastive=2.0),
        data=replace(
            recipe.data,
            crop_scale=(0.7, 1.0),
            flip=0.5,
            false_pairs=0.2,
            mask_probability=0.5,
            pairs_ratio=0.7,
            images_ratio=0.05,
            text_ratio=0.25,
        ),
        optim=replace(
            recipe.optim,
            groups=(
                Group("mlm_head.*", rate=2.0),
                Group("mmm_text_head.*", rate=2.0),
                Group("itm_head.*", rate=0.05),
            ),
            freeze=("logit_scale",),
        ),
        train=replace(recipe.train, minutes=minutes, save_every=10**9, keep_last=1),
        init_std=0.1,
    )


def _fresh(folder: Path) -> Path:
    candidate, number = folder, 1
    while candidate.exists():
        number += 1
        candidate = folder.with_name(f"{folder.name}-{number}")
    return candidate
