"""What stands at the end of a run: its evaluation, results.json and report.html."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from trivium import __version__
from trivium.bundle import Bundle
from trivium.evaluate import report, results
from trivium.evaluate.embedded import Evaluation
from trivium.evaluate.results import Result
from trivium.models.encoded import Detects, EncodesImage, EncodesText
from trivium.models.finetuned import Reads
from trivium.recipes.flava import FED_BY, FlavaRecipe
from trivium.recipes.prepared import Losses, Prepared
from trivium.train import run_folder
from trivium.train.config import leaves

# By what a head reads. One on pairs of texts takes `second_texts` too.
ANSWERED: dict[Reads, str] = {
    "text": 'texts=["so it is"]',
    "image": '["photo.jpg"]',
    "fused": '["photo.jpg"], ["what is it?"]',
    "concatenated": '["photo.jpg"], ["what is it?"]',
    "states": '["photo.jpg"], ["what is it?"]',
    "two_pictures": '["left.jpg"], ["both show a cup"], second_pictures=["right.jpg"]',
}
# In a checkout; an installed package comes without.
COMPARISON = Path(__file__).parents[3] / "benchmarks" / "results" / "joint_or_contrastive.md"


def evaluate(
    prepared: Prepared, say: Callable[[str], None] = lambda _: None, final: dict[str, float] | None = None
) -> tuple[Evaluation, Losses]:
    """Measure a run on what it held out. The losses stand among the results too.

    Args:
        final: the validation losses, where they are known already.

    Returns:
        the evaluation, and for each loss (final, chance).
    """
    found, losses = prepared.held_out(say, final)
    for name, (value, guess) in losses.items():
        found.results[f"losses.{name}.final"] = Result(value)
        if guess is not None:
            found.results[f"losses.{name}.chance"] = Result(guess)
    return found, losses


def replaced(run: Path) -> list[str]:
    """A sentence on the training samples in whose place a run took others, where there were any."""
    times = [line["sample"] for line in report.read_lines(run / "skipped.jsonl")]
    samples = list(dict.fromkeys(times))
    if not samples:
        return []
    often = f", {len(times):,} times in all" if len(times) > len(samples) else ""
    were = "sample could not be read and was" if len(samples) == 1 else "samples could not be read and were"
    return [f"{len(samples):,} training {were} replaced{often}; the first: {samples[0]}"]


def write(
    out: Path,
    found: Evaluation,
    losses: Losses,
    *,
    bundle: Bundle | None,
    prepared: Prepared | None,
    run: Path | None,
    seconds: dict[str, float],
    model_path: str,
    title: str,
) -> Path:
    """results.json and report.html into a folder; returns the page's path.

    bundle: what was measured; None: an image tokenizer.
    run: the folder of the run whose curves the page shows.
    """
    use, call = use_of(bundle, None if prepared is None else prepared.recipe)
    command = shlex.join(["trivium", *sys.argv[1:]])
    machine = run_folder.machine()
    results.write(
        out / "results.json",
        found.results,
        command=command,
        version=__version__,
        machine=machine,
        seconds=seconds,
        notes=found.notes,
    )
    page = out / "report.html"
    report.write(
        page,
        report.Report(
            title,
            found,
            losses,
            curves={} if run is None else report.read_curves(run / "metrics.jsonl"),
            measured={} if run is None else report.read_curves(run / "metrics.jsonl", "results"),
            monitors=[] if run is None else report.read_lines(run / "monitors.jsonl"),
            seconds=seconds,
            machine=machine,
            config={} if prepared is None else leaves(prepared.recipe),
            command=command,
            model_path=model_path,
            use=use,
            call=call,
            comparison=os.path.relpath(COMPARISON, out) if COMPARISON.is_file() and found.walls else "",
        ),
    )
    return page


def use_of(bundle: Bundle | None, recipe: object = None) -> tuple[report.Use, str]:
    """What a model is for, and how its head is called, where it has one. recipe: how it was trained; None: unknown."""
    if bundle is None:
        return "codes", ""
    model, config, head = bundle.model, cast(Any, bundle.model.config), bundle.head_config
    if head is not None:
        reads: Reads = "two_pictures" if head.num_pictures == 2 else head.reads
        is_asked = reads in ("fused", "concatenated", "states") and head.gives != "number"
        return "questions" if is_asked else "answers", f"bundle.answer({ANSWERED[reads]})"
    tasks = getattr(config, "tasks", ())
    if isinstance(model, Detects) and any(task.kind == "detection" for task in tasks):
        return "boxes", ""
    sees = isinstance(model, EncodesImage) and (not tasks or any(task.reads != "text" for task in tasks))
    compares = True
    if isinstance(recipe, FlavaRecipe):  # what its losses leave out is as it was drawn
        weights = vars(recipe.objectives)
        sees = any(weights[loss] for stream in ("pairs", "images") for loss in FED_BY[stream])
        compares = weights["contrastive"] > 0
    if not sees:
        return "texts", ""
    shares = isinstance(model, EncodesText) and bundle.tokenizer is not None and compares
    return "words" if shares and bundle.encode_text(["a red mug"]).is_projected else "pictures", ""


def summary(found: Evaluation) -> list[str]:
    """The sentences that a terminal shows."""
    sentences = report.headline(found)
    for way in ("text_to_image", "image_to_text", "text_to_image_reranked", "image_to_text_reranked"):
        name = f"retrieval.pairs.{way}"
        if f"{name}_r10" in found.results:
            recall, median = found.results[f"{name}_r10"], found.results[f"{name}_median_rank"]
            chance, told = found.chance[f"{name}_r10"], way.replace("_reranked", ", re-ranked,").replace("_", " ")
            sentences.append(
                f"{told} on these pairs: R@10 {recall.value:.3f} (chance {chance:.3f}), median rank {median.value:g}"
            )
    return sentences + [f"not measured: {sentence}" for sentence in found.not_applicable]
