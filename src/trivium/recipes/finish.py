"""What stands at the end of a run: its evaluation, results.json and report.html."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path

from trivium import __version__
from trivium.evaluate import embedded, pairs, report, results
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.load import Bundle
from trivium.recipes.flava import Prepared, chance_of, validation_losses
from trivium.train import run_folder
from trivium.train.config import leaves

# In a checkout; an installed package comes without.
COMPARISON = Path(__file__).parents[3] / "benchmarks" / "results" / "joint_or_contrastive.md"
NOTHING_HELD_OUT = (
    "nothing was held out: give --data.validation captioned pictures that are not trained on, or measure the run on"
    " some with trivium evaluate RUN --pairs"
)


def evaluate(
    bundle: Bundle,
    prepared: Prepared | None,
    say: Callable[[str], None] = lambda _: None,
    final: dict[str, float] | None = None,
) -> tuple[Evaluation, dict[str, tuple[float, float]]]:
    """Evaluate a model on the embedded drawings, or on the validation pairs of the run that it comes from.

    Args:
        final: the validation losses, where they are known already.

    Returns:
        the evaluation, and for each loss (final, chance) where there is a run to measure them on.
    """
    if prepared is None:
        return _on_drawings(bundle, say), {}
    data = prepared.recipe.data
    if final is None:
        if prepared.validation:
            say("validation losses")
        recipe = prepared.recipe
        final = validation_losses(prepared.run.method, prepared.validation, recipe.train.seed, recipe.rows_at_once)
    chance = chance_of(prepared) if prepared.validation else {}
    if data.is_embedded:
        found = _on_drawings(bundle, say)
    elif prepared.sources.validation_pairs is not None:
        say("retrieval on the validation pairs")
        found = pairs.run(bundle, prepared.sources.validation_pairs)
    else:
        found = Evaluation(not_applicable=[NOTHING_HELD_OUT])
    if not prepared.recipe.validate:
        found.not_applicable.append("losses on held-out samples: --validate is 0")
    losses = {name: (final[name], chance[name]) for name in final}
    for name, (value, guess) in losses.items():
        found.results[f"losses.{name}.final"] = Result(value)
        found.results[f"losses.{name}.chance"] = Result(guess)
    return found, losses


def _on_drawings(bundle: Bundle, say: Callable[[str], None]) -> Evaluation:
    if bundle.false_pairs is not None:
        return embedded.run(bundle, bundle.false_pairs, say)
    found = embedded.run(bundle, say=say)
    if "itm.accuracy" in found.results:
        found.not_applicable.append(
            "itm.accuracy takes half of the training pairs as false, since this model does not say how many were:"
            " evaluate its run folder, where there is one, for the exact figure"
        )
    return found


def write(
    out: Path,
    found: Evaluation,
    losses: dict[str, tuple[float, float]],
    *,
    prepared: Prepared | None,
    run: Path | None,
    seconds: dict[str, float],
    model_path: str,
    title: str,
) -> Path:
    """results.json and report.html into a folder; returns the page's path.

    run: the folder of the run whose curves the page shows.
    """
    command = shlex.join(["trivium", *sys.argv[1:]])
    machine = run_folder.machine()
    results.write(
        out / "results.json",
        found.results,
        command=command,
        version=__version__,
        machine=machine,
        seconds=seconds,
    )
    page = out / "report.html"
    report.write(
        page,
        report.Report(
            title,
            found,
            losses,
            curves={} if run is None else report.read_curves(run / "metrics.jsonl"),
            monitors=[] if run is None else report.read_lines(run / "monitors.jsonl"),
            seconds=seconds,
            machine=machine,
            config={} if prepared is None else leaves(prepared.recipe),
            command=command,
            model_path=model_path,
            comparison=os.path.relpath(COMPARISON, out) if COMPARISON.is_file() and found.walls else "",
        ),
    )
    return page


def summary(found: Evaluation) -> list[str]:
    """The sentences that a terminal shows."""
    sentences = report.headline(found)
    for way in ("text_to_image", "image_to_text"):
        name = f"retrieval.pairs.{way}"
        if f"{name}_r10" in found.results:
            recall, median = found.results[f"{name}_r10"], found.results[f"{name}_median_rank"]
            chance = found.chance[f"{name}_r10"]
            sentences.append(
                f"{way.replace('_', ' ')} on these pairs: R@10 {recall.value:.3f} (chance {chance:.3f}),"
                f" median rank {median.value:g}"
            )
    return sentences + [f"not measured: {sentence}" for sentence in found.not_applicable]
